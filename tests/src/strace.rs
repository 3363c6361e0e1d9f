//! System calls of processes under test, listed and broken one by one with `strace`.
//!
//! A [`Point`] is named by the call, the file and how often the process has made this call on this
//! file before, so that the order of what other threads do does not matter.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Calls that a file system sees; `close` reports nothing that matters after a sync.
const CALLS: &[&str] = &[
    "open",
    "openat",
    "openat2",
    "creat",
    "stat",
    "statx",
    "newfstatat",
    "fstat",
    "getdents64",
    "read",
    "pread64",
    "write",
    "pwrite64",
    "fallocate",
    "ftruncate",
    "truncate",
    "sync_file_range",
    "fsync",
    "fdatasync",
    "syncfs",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "unlink",
    "unlinkat",
    "mkdir",
    "mkdirat",
    "rmdir",
    "chmod",
    "fchmod",
    "fcntl",
];

/// Calls that change nothing and promise nothing.
const READERS: &[&str] =
    &["stat", "statx", "newfstatat", "fstat", "getdents64", "read", "pread64", "fcntl"];

/// Stops processes at the calls that are traced only.
const FILTER: &str = "--seccomp-bpf";

/// A call of a process on a file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point {
    /// Its name.
    pub call: String,
    /// The file, below the folder that is watched; of two, the first.
    pub path: String,
    /// The how manieth call of this name on this file it is in its thread, from 1.
    pub nth: usize,
    /// Whether it may create the file.
    creates: bool,
}

impl Point {
    /// Tells whether the call changes a file system or makes a change last.
    pub fn changes(&self) -> bool {
        let opens = self.call.starts_with("open");
        if opens { self.creates } else { !READERS.contains(&self.call.as_str()) }
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} #{}", self.call, self.path, self.nth)
    }
}

/// What happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The process is killed before the call does anything.
    Kill,
    /// The call fails with this error and does nothing.
    Error(&'static str),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Kill => f.write_str("SIGKILL"),
            Fault::Error(name) => f.write_str(name),
        }
    }
}

impl Fault {
    /// What a message says of the error; `None` for a kill.
    pub fn words(self) -> Option<&'static str> {
        match self {
            Fault::Error("EIO") => Some("Input/output error"),
            Fault::Error("ENOSPC") => Some("No space left on device"),
            _ => None,
        }
    }
}

/// Says why processes cannot be traced here, if they cannot.
pub fn unavailable() -> Option<String> {
    let output = Command::new("strace")
        .args(["-f", "--seccomp-bpf", "-qq", "-e", "trace=fsync"])
        .args(["-e", "inject=fsync:error=EIO:when=1", "-o", "/dev/null", "true"])
        .stdin(Stdio::null())
        .output();
    match output {
        Err(err) => Some(format!("strace cannot be started: {err}")),
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Some(format!("strace cannot trace: {}", said.trim().lines().next().unwrap_or_default()))
        }
    }
}

fn strace(log: &Path, detached: bool, rest: &[String]) -> Vec<String> {
    let mut words: Vec<String> =
        ["strace", "-f", "-y", "-s", "0", "-e", "signal=none", "-o"].map(String::from).to_vec();
    words.push(log.display().to_string());
    // The process keeps its place under its parent, and the tracer ends with it.
    words.extend(detached.then(|| "-D".to_string()));
    words.extend_from_slice(rest);
    words.push("--".to_string());
    words
}

/// Returns the words in front of a command that log its calls.
///
/// `detached`: the process is the started one, and the tracer stands beside it.
pub fn watch(log: &Path, detached: bool) -> Vec<String> {
    // Names that this machine does not know are passed over where they begin with a question mark.
    let calls: Vec<String> = CALLS.iter().map(|call| format!("?{call}")).collect();
    strace(log, detached, &[FILTER, "-e", &format!("trace={}", calls.join(","))].map(String::from))
}

/// Returns the words in front of a command that break it at a point below `root`.
pub fn inject(log: &Path, detached: bool, root: &Path, point: &Point, fault: Fault) -> Vec<String> {
    let Point { call, path, nth, .. } = point;
    let what = match fault {
        Fault::Kill => "signal=KILL".to_string(),
        Fault::Error(name) => format!("error={name}"),
    };
    let path = if path == "." { root.to_path_buf() } else { root.join(path) };
    let path = path.display().to_string();
    let (trace, inject) = (format!("trace={call}"), format!("inject={call}:{what}:when={nth}"));
    let rest = ["-P", &path, "-e", &trace, "-e", &inject, FILTER];
    // Where the kernel filters, a signal at the beginning of a call is dropped.
    let n = rest.len() - usize::from(fault == Fault::Kill);
    strace(log, detached, &rest[..n].iter().map(|word| word.to_string()).collect::<Vec<String>>())
}

/// Tells whether a log says that a point was met.
pub fn was_met(log: &str) -> bool {
    // A call whose process is killed has no result.
    log.contains("(INJECTED)") || log.lines().any(|line| line.trim_end().ends_with("= ?"))
}

/// Reads from a log which calls touched `root` or something in it, in their order.
pub fn points(log: &str, root: &Path) -> Vec<Point> {
    let root = root.display().to_string();
    let mut counts: BTreeMap<(String, String, String), usize> = BTreeMap::new();
    let mut out: Vec<Point> = Vec::new();
    for line in log.lines() {
        let Some((pid, rest)) = line.split_once(' ') else { continue };
        let Some((call, rest)) = rest.trim_start().split_once('(') else { continue };
        if !CALLS.contains(&call) {
            // An exit, a signal, or the end of a call that was listed when it began.
            continue;
        }
        // The result may name files too.
        let arguments = rest.rsplit_once(") = ").map_or(rest, |(arguments, _)| arguments);
        let paths = paths_below(arguments, &root);
        for path in &paths {
            *counts.entry((pid.to_string(), call.to_string(), path.clone())).or_default() += 1;
        }
        // Debug builds ask whether a descriptor that they close is open.
        let counts_only = arguments.ends_with("F_GETFD");
        if let Some(path) = paths.first().filter(|_| !counts_only) {
            let nth = counts[&(pid.to_string(), call.to_string(), path.clone())];
            let creates = arguments.contains("O_CREAT");
            out.push(Point { call: call.to_string(), path: path.clone(), nth, creates });
        }
    }
    out
}

/// Finds the files in a call's arguments: quoted, or in the angle brackets behind a descriptor.
fn paths_below(arguments: &str, root: &str) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for (at, _) in arguments.match_indices(root) {
        let end = match arguments[..at].chars().next_back() {
            Some('"') => '"',
            Some('<') => '>',
            _ => continue,
        };
        let rest = &arguments[at + root.len()..];
        let Some(rest) = rest.split(end).next() else { continue };
        let path = match rest.strip_prefix('/') {
            Some(below) => below,
            None if rest.is_empty() => ".",
            // Another folder whose name begins alike.
            None => continue,
        };
        if !out.iter().any(|known| known == path) {
            out.push(path.to_string());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_file() {
        let log = r#"7 openat(-100</w>, "/r/a/x.partial", O_RDWR|O_CREAT, 0666) = 3</r/a/x.partial>
7 pwrite64(3</r/a/x.partial>, ""..., 4096, 0) = 4096
8 fsync(4</r/a> <unfinished ...>
7 fsync(3</r/a/x.partial>) = 0
8 <... fsync resumed>) = 0
7 renameat2(-100</w>, "/r/a/x.partial", -100</w>, "/r/a/x", RENAME_NOREPLACE) = 0
7 fsync(3</r/a>) = 0
7 fsync(3</r/a>) = 0
7 openat(AT_FDCWD</w>, "/roots/b", O_RDONLY) = 3</roots/b>
7 openat(AT_FDCWD</w>, "/r", O_RDONLY) = 3</r>
7 +++ exited with 0 +++
"#;
        let found: Vec<String> =
            points(log, Path::new("/r")).iter().map(ToString::to_string).collect();
        let want = [
            "openat a/x.partial #1",
            "pwrite64 a/x.partial #1",
            "fsync a #1",
            "fsync a/x.partial #1",
            "renameat2 a/x.partial #1",
            "fsync a #1",
            "fsync a #2",
            "openat . #1",
        ];
        assert_eq!(found, want);
        let changes: Vec<bool> = points(log, Path::new("/r")).iter().map(Point::changes).collect();
        assert_eq!(changes, [true, true, true, true, true, true, true, false]);
    }
}
