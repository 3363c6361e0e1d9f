//! Small file systems that fill up or refuse writes, without rights on the rest of the machine.
//!
//! They are mounted in a namespace of their own, in which the processes under test run; it goes
//! with the last of them, so that nothing stays mounted whatever happens to a test.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::Process;

/// Longest wait until no file of a disk is open for writing any more.
const QUIET_DEADLINE: Duration = Duration::from_secs(10);

/// A folder of its own file system, seen by processes behind [`SmallDisk::words`].
pub struct SmallDisk {
    holder: Process,
    folder: PathBuf,
    /// Whether it took a user namespace to mount it.
    as_user: bool,
}

impl SmallDisk {
    /// Makes `folder` a file system of `bytes` bytes, in memory.
    ///
    /// # Errors
    /// Why that is not possible here.
    pub fn mount(folder: &Path, bytes: u64) -> Result<Self, String> {
        std::fs::create_dir_all(folder).map_err(|err| err.to_string())?;
        let as_user = !rustix::process::geteuid().is_root();
        // The second mount is one that can be made read-only.
        let script = "mount -t tmpfs -o size=$2 tmpfs \"$1\" && mount --bind \"$1\" \"$1\" \
                      && echo mounted && exec cat";
        let mut command = Command::new("unshare");
        command.args(if as_user {
            ["--map-root-user", "--mount"].as_slice()
        } else {
            &["--mount"]
        });
        command.args(["sh", "-c", script, "sh"]).arg(folder).arg(bytes.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().map_err(|err| format!("unshare cannot be started: {err}"))?;
        let mut holder = Process::from(child);
        let stdout = holder.take_stdout().expect("stdout is a pipe");
        let mut said = String::new();
        BufReader::new(stdout).read_line(&mut said).map_err(|err| err.to_string())?;
        if said.trim() != "mounted" {
            return Err(format!("no file system can be mounted: {}", holder.last_words()));
        }
        Ok(SmallDisk { holder, folder: folder.to_path_buf(), as_user })
    }

    /// Returns the words in front of a command line that run it in `folder`, where the disk is.
    pub fn words(&self, folder: &Path) -> Vec<String> {
        let mut out = vec!["nsenter".to_string(), format!("--target={}", self.holder.pid())];
        if self.as_user {
            out.extend(["--user", "--preserve-credentials"].map(String::from));
        }
        out.extend(["--mount", "sh", "-c", "cd \"$0\" && exec \"$@\""].map(String::from));
        out.push(folder.display().to_string());
        out
    }

    /// Returns a path as the machine outside sees it.
    pub fn outside(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.holder.pid()));
        root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Makes the disk read-only or writable.
    pub fn set_read_only(&self, read_only: bool) {
        let options = if read_only { "remount,bind,ro" } else { "remount,bind,rw" };
        let words = self.words(Path::new("/"));
        let deadline = Instant::now() + QUIET_DEADLINE;
        loop {
            let mut command = Command::new(&words[0]);
            command.args(&words[1..]).args(["mount", "-o", options]).arg(&self.folder);
            let output = command.output().expect("nsenter starts");
            if output.status.success() {
                return;
            }
            // It is busy while a checkpoint is being written.
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.contains("busy") && Instant::now() < deadline, "{options}: {said}");
        }
    }
}
