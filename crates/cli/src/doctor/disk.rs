//! How quickly a folder takes and gives bytes.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Finding, Verdict, finding};

/// Bytes that are written: enough to be past a disk's cache of its own, and done in seconds.
const TRIAL_BYTES: usize = 128 << 20;
const PIECE_BYTES: usize = 4 << 20;
/// Below this a checkpoint of a common model takes minutes, MB/s.
const SLOW: f64 = 50.0;
/// A disk that takes longer than this is slow enough to be told.
const LIMIT: Duration = Duration::from_secs(20);

/// Removes the trial's file however it ends.
struct Trial(PathBuf);

impl Drop for Trial {
    fn drop(&mut self) {
        // What cannot be removed is named by the one who lists the folder.
        let _ = fs::remove_file(&self.0);
    }
}

/// Writes a file into the folder, durably, and reads it back.
pub(super) fn speed(folder: &Path) -> Finding {
    match measure(folder) {
        Ok((write, read)) => {
            let text = format!(
                "`{}`: writes {write:.0} MB/s and syncs them, reads {read:.0} MB/s",
                folder.display()
            );
            let verdict = if write < SLOW { Verdict::Note } else { Verdict::Fine };
            let slow = "; slow: checkpoints hold no step up, and take as long as they take";
            finding("disk", verdict, text + if write < SLOW { slow } else { "" })
        }
        Err(error) => finding("disk", Verdict::Bad, format!("`{}`: {error}", folder.display())),
    }
}

/// Returns MB/s written and read.
fn measure(folder: &Path) -> io::Result<(f64, f64)> {
    let trial = Trial(folder.join(format!(".lacuna-speed-{}", std::process::id())));
    // Bytes that no file system compresses to nothing.
    let piece: Vec<u8> = (0..PIECE_BYTES as u64)
        .map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect();
    let start = Instant::now();
    let mut file = File::options().write(true).create_new(true).open(&trial.0)?;
    let mut written = 0usize;
    while written < TRIAL_BYTES && start.elapsed() < LIMIT {
        file.write_all(&piece)?;
        written += piece.len();
    }
    file.sync_all()?;
    let write = rate(written, start.elapsed());
    // What the system has in memory says nothing of the disk.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    drop(file);
    let (start, mut buffer) = (Instant::now(), piece);
    let mut file = File::open(&trial.0)?;
    let mut n_read = 0usize;
    loop {
        let n = file.read(&mut buffer)?;
        n_read += n;
        if n == 0 || start.elapsed() > LIMIT {
            break;
        }
    }
    Ok((write, rate(n_read, start.elapsed())))
}

fn rate(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64().max(1e-6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_measured_and_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let found = speed(folder.path());
        assert_ne!(found.verdict, Verdict::Bad, "{}", found.text);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let found = speed(&folder.path().join("missing"));
        assert_eq!(found.verdict, Verdict::Bad);
        assert!(found.text.contains("missing"), "{}", found.text);
    }
}
