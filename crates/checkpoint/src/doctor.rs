//! Whether a place keeps what checkpoints are built on: tried, not believed.

use std::path::Path;
use std::time::SystemTime;

use crate::storage::{FsError, Published, Storage, chain};

/// Bytes of the large file that is written where a run is about to start: they cost it little.
pub const BRIEF_BYTES: usize = 1 << 20;

/// Bytes of one that object stores take in several parts.
pub const THOROUGH_BYTES: usize = 24 << 20;

/// Free space that a run wants, in checkpoints: an old one, a new one, and some air.
const ROOM: f64 = 2.2;

/// What was tried and how it went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What must hold.
    pub what: &'static str,
    /// Why it does not, if so.
    pub problem: Option<String>,
}

/// What trying a place has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Examined {
    /// What must hold, in the order in which it was tried.
    pub findings: Vec<Finding>,
    /// Bytes that are free, where that can be known.
    pub free_bytes: Option<u64>,
    /// Whether large files are written past the cache, where that can be told apart.
    pub writes_direct: Option<bool>,
}

impl Examined {
    /// Tells whether checkpoints can be trusted to this place.
    pub fn is_sound(&self) -> bool {
        self.problem().is_none()
    }

    /// Names the first thing that does not hold, and why.
    pub fn problem(&self) -> Option<String> {
        let told = |f: &Finding| f.problem.as_ref().map(|why| format!("`{}`: {why}", f.what));
        self.findings.iter().find_map(told)
    }

    /// Tells whether so many bytes are known to be more than are free.
    pub fn lacks(&self, bytes: u64) -> bool {
        self.free_bytes.is_some_and(|free| free < bytes)
    }
}

/// Returns the free bytes that a run with checkpoints of `bytes` wants.
pub fn room_for(bytes: u64) -> u64 {
    (bytes as f64 * ROOM) as u64
}

/// Tells whether something holds.
type Trial<'a> = dyn Fn() -> Result<bool, FsError> + 'a;

/// Tries everything in a folder in `base` that is removed afterwards; one file has `large_bytes`.
pub fn examine(storage: &dyn Storage, base: &Path, large_bytes: usize) -> Examined {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    // Nobody else uses this name.
    let trial = format!(".lacuna-trial-{}-{}", std::process::id(), now.as_nanos());
    let folder = base.join(trial);
    let file = folder.join("file");
    let trials: [(&'static str, &Trial<'_>); 7] = [
        ("folders can be made", &|| storage.prepare(base, &folder).map(|()| true)),
        ("a name is taken once", &|| {
            let first = storage.create_small(&file, &file, "1")?;
            let second = storage.create_small(&file, &file, "2")?;
            Ok((first, second) == (Published::Created, Published::Exists))
        }),
        ("what was written is read", &|| Ok(storage.read_small(&file, 16)? == b"1")),
        ("a file can be replaced", &|| {
            storage.replace_small(&file, "3")?;
            Ok(storage.read_small(&file, 16)? == b"3")
        }),
        ("a large file appears whole", &|| large(storage, &folder.join("large"), large_bytes)),
        ("a file can be hidden", &|| {
            storage.hide(&file, &folder.join("hidden"))?;
            Ok(storage.size(&file).is_err_and(|error| error.is_not_found()))
        }),
        ("files can be listed and removed", &|| {
            let listed = storage.names(&folder)?.contains(&"large".to_string());
            storage.remove_file(&folder.join("large"))?;
            Ok(listed && !storage.names(&folder)?.contains(&"large".to_string()))
        }),
    ];
    let mut findings: Vec<Finding> = Vec::new();
    for (what, tried) in trials {
        let problem = match tried() {
            Ok(true) => None,
            Ok(false) => Some("it is not so".to_string()),
            Err(error) => Some(chain(&error)),
        };
        findings.push(Finding { what, problem });
    }
    let (free_bytes, writes_direct) = (storage.free_bytes(base), storage.writes_direct(&folder));
    let problem = storage.remove_folder(&folder).err().map(|error| chain(&error));
    findings.push(Finding { what: "folders can be removed", problem });
    Examined { findings, free_bytes, writes_direct }
}

/// A large file is not there before it is published, and then has its bytes and its name alone.
fn large(storage: &dyn Storage, path: &Path, n: usize) -> Result<bool, FsError> {
    let bytes: Vec<u8> = (0..n).map(|i| (i % 251) as u8).collect();
    let mut sink = storage.begin(path, bytes.len() as u64)?;
    sink.fill(&bytes)?;
    let early = storage.size(path).is_ok();
    let first = sink.publish()?;
    let mut found: Vec<u8> = vec![0; bytes.len()];
    let read = storage.open(path)?.read_exact_at(&mut found, 0);
    read.map_err(|source| FsError::new("read", path, source))?;
    let mut again = storage.begin(path, 1)?;
    again.fill(&b"x".to_vec())?;
    let second = again.publish()?;
    Ok(!early && (first, second) == (Published::Created, Published::Exists) && found == bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Disk;

    #[test]
    fn this_machine_is_sound() {
        let root = tempfile::tempdir().unwrap();
        let found = examine(&Disk::new(), root.path(), BRIEF_BYTES);
        assert!(found.is_sound(), "{found:?}");
        assert!(found.writes_direct.is_some());
        let free = found.free_bytes.unwrap();
        assert!(free > 0 && !found.lacks(free) && found.lacks(room_for(free)));
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0, "nothing stays");
    }

    /// A place that cannot be written to is found out, and says why.
    #[test]
    fn a_place_that_refuses_is_not() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("file");
        std::fs::write(&base, "").unwrap();
        let found = examine(&Disk::new(), &base, BRIEF_BYTES);
        let problem = found.problem().unwrap();
        assert!(problem.starts_with("`folders can be made`: failed to create"), "{problem}");
    }
}
