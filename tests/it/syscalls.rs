//! Every system call on a checkpoint's files, as the last one of its process and as one that fails:
//! the checkpoint before it is intact, or the new one is there; never nothing, never a mix.
//!
//! `LACUNA_STRACE=all` (`make strace`) does it on a disk instead of in memory, and lets calls that
//! only read fail with ENOSPC too.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lacuna_tests::saves::{self, Coordinator};
use lacuna_tests::strace::{self, Fault, Point};

/// Step of the checkpoint that is there, of the one that is being made, and of the next.
const STEPS: [u64; 3] = [10, 20, 30];

/// Whose calls are broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// What the workers do: write all parts.
    Parts,
    /// What a coordinator does: claim, clean up, commit, read back, remove what is old.
    Commit,
}

/// How a process under test ended.
struct Ran {
    /// Exit code; none if it was killed.
    code: Option<i32>,
    out: String,
    err: String,
}

/// Tells whether every fault is asked for, however long it takes.
pub fn all_is_asked_for() -> bool {
    std::env::var("LACUNA_STRACE").is_ok_and(|word| word == "all")
}

/// Says that a test is skipped, and why, where processes cannot be traced.
pub fn cannot_trace() -> bool {
    let why = strace::unavailable();
    if let Some(why) = &why {
        println!("skipped: no system call is broken: {why}");
    }
    why.is_some()
}

/// Makes a folder with a checkpoint, and with what crashes left.
fn before(root: &Path, role: Role) {
    let coordinator = Coordinator::open(root).unwrap();
    coordinator.save(STEPS[0]).unwrap();
    if role == Role::Parts {
        return;
    }
    let dir = saves::run_dir(root);
    // An attempt that was never committed, a removal that was not finished, and half a claim.
    saves::write_parts(root, 15, 1).unwrap();
    let receipts = saves::write_parts(root, 5, 1).unwrap();
    coordinator.commit(5, receipts).unwrap();
    let step = lacuna_types::Step(5);
    std::fs::rename(dir.manifest(step), dir.deleted_manifest(step)).unwrap();
    std::fs::write(dir.claims().join("00000001.json.partial"), "").unwrap();
}

/// Makes a folder, in memory unless all is asked for: there the calls are the same, and no sync
/// waits for a disk.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let in_memory = if all_is_asked_for() { None } else { tempfile::tempdir_in(memory).ok() };
    in_memory.unwrap_or_else(|| tempfile::tempdir().unwrap())
}

/// Copies a folder with everything in it.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (from, to) = {
            let entry = entry.unwrap();
            (entry.path(), to.join(entry.file_name()))
        };
        if from.is_dir() {
            copy(&from, &to);
        } else {
            std::fs::copy(&from, &to).unwrap();
        }
    }
}

/// Runs one process to its end behind `words`.
fn run(role: Role, root: &Path, words: &[String]) -> Ran {
    let binary = env!("CARGO_BIN_EXE_lacuna-save-once").to_string();
    let words: Vec<String> = words.iter().cloned().chain([binary]).collect();
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).env_remove("RUST_LOG");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let step = STEPS[1].to_string();
    match role {
        Role::Parts => command.arg("parts").arg(root).args([&step, "2"]),
        Role::Commit => command.arg("commit").arg(root).arg(&step),
    };
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut out = String::new();
    if role == Role::Commit {
        // It says its generation once it has the run; then the workers write.
        stdout.read_line(&mut out).unwrap();
        if let Some(generation) = out.trim().strip_prefix("generation ") {
            let generation = generation.parse().unwrap();
            let receipts = saves::write_parts(root, STEPS[1], generation).unwrap();
            // Fails where the process is gone.
            let _ = stdin.write_all(receipts.concat().as_bytes());
        }
    }
    drop(stdin);
    stdout.read_to_string(&mut out).unwrap();
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    Ran { code: output.status.code(), out, err }
}

/// All calls of a role, and which of them commits.
struct Plan {
    role: Role,
    folder: tempfile::TempDir,
    points: Vec<Point>,
    commits: Option<usize>,
}

impl Plan {
    fn make(role: Role) -> Self {
        let folder = folder();
        let (template, root) = (folder.path().join("template"), folder.path().join("listed"));
        before(&template, role);
        copy(&template, &root);
        let log = folder.path().join("log");
        let ran = run(role, &root, &strace::watch(&log, false));
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        let points = strace::points(&std::fs::read_to_string(log).unwrap(), &root);
        let commits = points.iter().position(|point| {
            point.call.starts_with("rename") && point.path.ends_with("/manifest.json.partial")
        });
        assert_eq!(commits.is_some(), role == Role::Commit, "{points:?}");
        Plan { role, folder, points, commits }
    }

    /// Plays the role with a fault at a point; returns the folder and how the process ended.
    fn play(&self, point: &Point, fault: Fault) -> (PathBuf, Ran) {
        let (root, log) = (self.folder.path().join("root"), self.folder.path().join("log"));
        // There is none before the first.
        let _ = std::fs::remove_dir_all(&root);
        copy(&self.folder.path().join("template"), &root);
        let ran = run(self.role, &root, &strace::inject(&log, false, &root, point, fault));
        let log = std::fs::read_to_string(&log).unwrap();
        let killed = ran.code.is_none() || ran.code == Some(137);
        let met = if fault == Fault::Kill { killed } else { log.contains("(INJECTED)") };
        assert!(met, "{point} is not met: {log} {}{}", ran.out, ran.err);
        (root, ran)
    }

    fn name(&self, point: &Point, fault: Fault) -> String {
        format!("{fault} at {:?} {point}", self.role)
    }
}

/// Another coordinator takes the run and saves; then nothing is there but what counts.
fn goes_on(root: &Path, case: &str) {
    let coordinator = Coordinator::open(root).unwrap_or_else(|err| panic!("{case}: {err:#}"));
    coordinator.save(STEPS[2]).unwrap_or_else(|err| panic!("{case}: {err:#}"));
    assert_eq!(saves::newest(root).unwrap(), STEPS[2], "{case}");
    let garbage = saves::garbage(root).unwrap();
    assert!(garbage.is_empty(), "{case}: {garbage:?}");
}

fn newest(root: &Path, case: &str) -> u64 {
    saves::newest(root).unwrap_or_else(|err| panic!("{case}: {err:#}"))
}

fn kill_at_each(role: Role) {
    if cannot_trace() {
        return;
    }
    let plan = Plan::make(role);
    for (i, point) in plan.points.iter().enumerate() {
        let case = plan.name(point, Fault::Kill);
        let (root, _) = plan.play(point, Fault::Kill);
        let committed = plan.commits.is_some_and(|commits| i > commits);
        assert_eq!(newest(&root, &case), STEPS[usize::from(committed)], "{case}");
        goes_on(&root, &case);
    }
    println!("{role:?}: killed at each of {} calls", plan.points.len());
}

/// Errors that are nobody's business.
fn may_be_silent(point: &Point) -> bool {
    let name = point.path.rsplit_once('/').map_or(point.path.as_str(), |(_, name)| name);
    match point.call.as_str() {
        // Past the cache, where that can be had.
        "fcntl" => true,
        // What stays is removed by the next start.
        "rmdir" => true,
        "unlink" => name.ends_with(".partial"),
        // The folders above the root may belong to others.
        _ if point.path == "." => !point.changes(),
        // What cannot be read now is left alone when old checkpoints and garbage are removed.
        _ => !point.changes() && (name.starts_with("part-") || name.starts_with("manifest.")),
    }
}

fn fail_at_each(role: Role) {
    if cannot_trace() {
        return;
    }
    let plan = Plan::make(role);
    let mut n_cases = 0;
    let mut silent: Vec<Point> = Vec::new();
    for point in &plan.points {
        for error in ["EIO", "ENOSPC"] {
            if error == "ENOSPC" && !point.changes() && !all_is_asked_for() {
                continue;
            }
            let fault = Fault::Error(error);
            let case = plan.name(point, fault);
            let (root, ran) = plan.play(point, fault);
            n_cases += 1;
            silent.extend(check_failed(&plan, point, fault, &root, &ran).then(|| point.clone()));
            goes_on(&root, &case);
        }
    }
    let unsaid: Vec<&Point> = silent.iter().filter(|point| !may_be_silent(point)).collect();
    assert!(unsaid.is_empty(), "{role:?}: nobody says that these fail: {unsaid:?}");
    println!("{role:?}: {n_cases} failed calls, {} of no consequence", silent.len());
}

/// Returns how a message names the file: by its path, or within a checkpoint by its name.
fn file_of(point: &Point, root: &Path) -> String {
    match point.path.rsplit_once('/') {
        Some((_, name)) if name.starts_with("part-") && !point.changes() => name.to_string(),
        _ if point.path == "." => root.display().to_string(),
        _ => root.join(&point.path).display().to_string(),
    }
}

/// Checks what a call that failed did; tells whether nobody said anything.
fn check_failed(plan: &Plan, point: &Point, fault: Fault, root: &Path, ran: &Ran) -> bool {
    let case = plan.name(point, fault);
    let words = fault.words().expect("an error");
    let step = newest(root, &case);
    if ran.out.contains("committed") {
        assert_eq!(step, STEPS[1], "{case}");
    }
    if plan.role == Role::Parts && point.call != "unlink" {
        let left: Vec<String> = saves::garbage(root).unwrap();
        let partial = left.iter().any(|path| path.ends_with(".partial"));
        assert!(!partial, "{case}: {left:?}");
    }
    let named = ran.err.contains(words) && ran.err.contains(&file_of(point, root));
    if ran.code == Some(0) && !named {
        return true;
    }
    assert!(ran.code == Some(0) || ran.code == Some(74), "{case}: {:?} {}", ran.code, ran.err);
    assert!(named, "{case}: {}", ran.err);
    false
}

#[test]
fn a_worker_may_be_killed_at_each_call() {
    kill_at_each(Role::Parts);
}

#[test]
fn a_coordinator_may_be_killed_at_each_call() {
    kill_at_each(Role::Commit);
}

#[test]
fn each_call_of_a_worker_may_fail() {
    fail_at_each(Role::Parts);
}

#[test]
fn each_call_of_a_coordinator_may_fail() {
    fail_at_each(Role::Commit);
}
