//! Places for checkpoints that are full, read-only or stuck, and machines that are taken away:
//! training goes on, what was saved stays, and no bit changes.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lacuna_store::testing::{Fault, Kind, Server};
use lacuna_tests::disks::SmallDisk;
use lacuna_tests::processes::wait_for_end;
use lacuna_tests::{Cluster, Fixture, Seen, said, saves, send_signal, under};
use rustix::process::Signal;

use crate::faults::finished_with;
use crate::fixture;
use crate::syscalls::cannot_trace;

/// What a supervisor gives before it kills.
const GRACE: Duration = Duration::from_secs(5);

/// Bytes of a page, in which a file system in memory counts.
const PAGE: u64 = 4096;

/// The digest of an undisturbed run.
fn undisturbed(fixture: &mut Fixture, steps: u64) -> u64 {
    fixture.env = vec![("LACUNA_FAKE_SLOT_MS".to_string(), "0".to_string())];
    let digest = crate::faults::undisturbed(fixture, steps);
    fixture.env.clear();
    digest
}

/// Puts coordinators and workers on a small disk at `ckpt`; says why, where that is not possible.
fn on_small_disk(fixture: &mut Fixture, bytes: u64) -> Option<SmallDisk> {
    let disk = SmallDisk::mount(&fixture.path("ckpt"), bytes);
    let disk = disk.map_err(|why| println!("skipped: no disk of its own: {why}")).ok()?;
    let words = disk.words(fixture.dir.path());
    (fixture.under.coordinator, fixture.under.worker) = (words.clone(), words);
    Some(disk)
}

fn saved(seen: &Seen) -> u64 {
    seen.run.checkpoint_step.unwrap_or(0)
}

fn texts<'a>(seen: &'a Seen, kind: &str) -> Vec<&'a str> {
    let of_kind = seen.events.iter().filter(|event| event.kind == kind);
    of_kind.map(|event| event.text.as_str()).collect()
}

/// No step was lost, redone or computed by another group than the first.
fn undisturbed_training(seen: &Seen, steps: u64) {
    assert_eq!(seen.steps, (1..=steps).collect::<Vec<u64>>(), "{}", seen.text());
    assert_eq!((seen.count("lost"), seen.count("formed")), (0, 1), "{}", seen.text());
}

/// Every checkpoint reads back, and there is one of `step`.
fn verified(fixture: &Fixture, disk: &SmallDisk, run: &str, step: u64) {
    let folder = disk.outside(&fixture.path("ckpt").join(run));
    let output = fixture.run(&["ckpt", "verify", "--all", folder.to_str().unwrap()]);
    let (code, out, err) = said(&output);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains(&step.to_string()), "step {step} in {out}");
}

/// Takes all of a disk's room; returns how many bytes that took.
fn fill(path: &Path) -> u64 {
    let mut file = File::options().create(true).append(true).open(path).unwrap();
    let page = [1u8; PAGE as usize];
    while file.write_all(&page).is_ok() {}
    file.metadata().unwrap().len()
}

/// A place that could never hold a checkpoint refuses the run when it is submitted, not when the
/// first one is due.
#[test]
fn a_run_that_its_disk_cannot_hold_does_not_start() {
    let mut fixture = fixture();
    let Some(_disk) = on_small_disk(&mut fixture, 128 << 10) else { return };
    let cluster = Cluster::start(&fixture);
    let (code, text) = cluster.try_submit(&fixture.spec("small", 10, &[]));
    assert_eq!(code, i32::from(lacuna_types::exit::IO), "{text}");
    let why = "it was tried and does not keep what checkpoints are built on: `a large file appears";
    assert!(text.contains(why) && text.contains("No space left on device"), "{text}");
    assert!(std::fs::read_dir(fixture.path("ckpt")).unwrap().next().is_none(), "nothing stays");
}

/// The room comes back page by page, so that attempts fail at every place where they can.
#[test]
fn a_full_disk_costs_checkpoints_and_no_step() {
    const STEPS: u64 = 400;
    let mut fixture = fixture();
    let want = undisturbed(&mut fixture, STEPS);
    let Some(disk) = on_small_disk(&mut fixture, 64 << 20) else { return };
    let mut cluster = Cluster::start(&fixture);
    let keys = [
        ("checkpoint.every", "[\"5step\"]"),
        ("checkpoint.keep", "{ last = 1000 }"),
        ("elastic.workers", "\"2:2\""),
    ];
    let run = cluster.submit(&fixture.spec("full", STEPS, &keys));
    cluster.add("a", 2);
    let seen = cluster.wait(&run, "a checkpoint", |seen| saved(seen) > 0);
    let needs = pages(&disk.outside(&fixture.path("ckpt/full/ckpt")), saved(&seen));
    let path = disk.outside(&fixture.path("ckpt/ballast"));
    let mut ballast = fill(&path);
    // Less than two parts take.
    let mut freed = needs / 2 - 2;
    let mut failed = 0;
    let seen = loop {
        let more = |seen: &Seen| {
            let last = seen.events.iter().rposition(|e| e.kind == "not-saved");
            let since = last.map_or(&[][..], |last| &seen.events[last..]);
            let over = seen.run.exit_code.is_some();
            over || seen.count("not-saved") > failed || since.iter().any(|e| e.kind == "saved")
        };
        let seen = cluster.wait(&run, "another attempt", more);
        if seen.count("not-saved") == failed || seen.run.exit_code.is_some() {
            break seen;
        }
        if failed == 0 {
            verified(&fixture, &disk, &run, saved(&seen));
        }
        let come_back = if failed == 0 { freed } else { 1 };
        freed += u64::from(failed > 0);
        failed = seen.count("not-saved");
        ballast -= come_back * PAGE;
        File::options().write(true).open(&path).unwrap().set_len(ballast).unwrap();
    };
    assert!(seen.run.exit_code.is_none(), "the run still trains: {}", seen.text());
    for text in texts(&seen, "not-saved") {
        let named = text.contains("No space left on device") && text.contains("/ckpt/full/ckpt/");
        assert!(named, "{text}");
    }
    std::fs::remove_file(path).unwrap();
    let step = saved(&seen);
    let seen = cluster.wait_end(&run);
    finished_with(&seen, want);
    undisturbed_training(&seen, STEPS);
    assert!(saved(&seen) == STEPS && step < STEPS);
    println!("{failed} attempts failed while {freed} pages came back; one takes {needs}");
    // Folders take a page, and a document is there under two names for a while.
    assert!(freed <= needs + 8, "failed attempts leave something: {freed} pages for {needs}");
    verified(&fixture, &disk, &run, step);
    nothing_is_left(&fixture, &disk, cluster, &run);
}

/// Returns the pages that the checkpoint of a step takes.
fn pages(checkpoints: &Path, step: u64) -> u64 {
    let mut open: Vec<PathBuf> = vec![checkpoints.join(format!("step-{step:09}"))];
    let mut n = 0;
    while let Some(path) = open.pop() {
        let found = std::fs::metadata(&path).unwrap();
        n += if found.is_dir() { 1 } else { found.len().div_ceil(PAGE) };
        if found.is_dir() {
            open.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    n
}

/// A coordinator that starts again leaves nothing but checkpoints.
fn nothing_is_left(fixture: &Fixture, disk: &SmallDisk, mut cluster: Cluster<'_>, run: &str) {
    cluster.kill_coordinator();
    cluster.start_coordinator();
    drop(cluster);
    let root = disk.outside(&fixture.path("ckpt"));
    let dir = lacuna_checkpoint::layout::RunDir::new(root, run.parse().unwrap());
    let garbage = saves::garbage_of(&dir).unwrap();
    assert!(garbage.is_empty(), "{garbage:?}");
}

#[test]
fn a_read_only_folder_is_named_and_the_run_goes_on_once_it_is_writable() {
    const STEPS: u64 = 200;
    let mut fixture = fixture();
    let want = undisturbed(&mut fixture, STEPS);
    let Some(disk) = on_small_disk(&mut fixture, 16 << 20) else { return };
    let mut cluster = Cluster::start(&fixture);
    let keys = [("checkpoint.every", "[\"20step\"]"), ("elastic.workers", "\"2:2\"")];
    let spec = fixture.spec("locked", STEPS, &keys);
    let run = cluster.submit(&spec);
    cluster.add("a", 2);
    cluster.wait(&run, "a checkpoint", |seen| saved(seen) > 0);
    disk.set_read_only(true);
    let seen = cluster.wait(&run, "a failed attempt", |seen| seen.count("not-saved") > 0);
    let step = saved(&seen);
    let seen = cluster.wait_end(&run);
    assert_eq!((seen.run.state.as_str(), seen.run.exit_code), ("failed", Some(74)));
    let why = texts(&seen, "not-saved");
    for text in why.iter().chain([&seen.run.why.as_str()]) {
        let named = text.contains("Read-only file system") && text.contains("/ckpt/locked/ckpt/");
        assert!(named, "{text}");
    }
    assert!(why[0].starts_with("checkpoint given up, training goes on: "), "{why:?}");
    undisturbed_training(&seen, STEPS);
    assert_eq!(saved(&seen), step, "{}", seen.text());
    verified(&fixture, &disk, &run, step);
    let waited = fixture.run(&["wait", &run, "--coordinator", &cluster.url]);
    assert_eq!(said(&waited).0, 20, "{waited:?}");
    disk.set_read_only(false);
    assert_eq!(cluster.submit(&spec), run);
    let seen = cluster.wait(&run, "the run ends again", |seen| {
        seen.count("resumed") > 0 && seen.run.exit_code.is_some() && seen.run.state != "failed"
    });
    finished_with(&seen, want);
    assert_eq!(saved(&seen), STEPS);
    verified(&fixture, &disk, &run, STEPS);
    nothing_is_left(&fixture, &disk, cluster, &run);
}

/// The attempt is over at its deadline, training never waits, and a later attempt succeeds.
fn survives_a_stall(seen: &Seen, want: u64, steps: u64) {
    finished_with(seen, want);
    undisturbed_training(seen, steps);
    let late = "checkpoint given up, training goes on: it took longer than 1s while training";
    let at = seen.events.iter().position(|event| event.text == late);
    let at = at.unwrap_or_else(|| panic!("an attempt is given up: {}", seen.text()));
    let before = seen.events[..at].iter().any(|event| event.kind == "saved");
    let after = seen.events[at..].iter().filter(|event| event.kind == "saved").count();
    assert!(before && after > 1, "saved before, later and at the end: {}", seen.text());
}

#[test]
fn a_disk_that_does_not_answer_costs_the_attempts_until_it_does() {
    const STEPS: u64 = 700;
    if cannot_trace() {
        return;
    }
    let mut fixture = fixture();
    let want = undisturbed(&mut fixture, STEPS);
    // The saver's twelfth sync is not in its first part. Nobody else syncs in an agent or trainer.
    let log = fixture.path("strace.log").display().to_string();
    let words = ["strace", "-D", "-f", "--seccomp-bpf", "-qq", "-e", "signal=none", "-o", &log];
    let calls = ["-e", "trace=fsync", "-e", "inject=fsync:delay_enter=3000000:when=12", "--"];
    fixture.under.worker = words.into_iter().chain(calls).map(String::from).collect();
    let mut cluster = Cluster::start_with(&fixture, &["attempt=1s"]);
    let keys = [("checkpoint.every", "[\"20step\"]"), ("elastic.workers", "\"1:1\"")];
    let run = cluster.submit(&fixture.spec("stuck-disk", STEPS, &keys));
    cluster.add_with("a", 1, &[], &[("LACUNA_FAKE_SLOT_MS", "1")]);
    let given_up = |seen: &Seen| seen.count("not-saved") > 0;
    let first = cluster.wait(&run, "the attempt is given up", given_up);
    let on = cluster.wait(&run, "steps go on", |seen| seen.step() > first.step() + 30);
    assert_eq!(saved(&on), saved(&first), "the disk is stuck yet: {}", on.text());
    survives_a_stall(&cluster.wait_end(&run), want, STEPS);
}

#[test]
fn a_store_that_does_not_answer_costs_the_attempts_until_it_does() {
    const STEPS: u64 = 700;
    let mut fixture = fixture();
    let want = undisturbed(&mut fixture, STEPS);
    std::fs::create_dir(fixture.path("bucket")).unwrap();
    let stuck = Arc::new(AtomicBool::new(false));
    let is_stuck = stuck.clone();
    let writes = |kind| matches!(kind, Kind::Put | Kind::Part | Kind::Complete);
    let plan = move |asked: lacuna_store::testing::Asked<'_>| {
        let hangs = is_stuck.load(Ordering::Relaxed) && writes(asked.kind);
        if hangs { Fault::Hang(Duration::from_secs(3)) } else { Fault::None }
    };
    let latency = Duration::from_millis(1);
    let server = Server::start_by_kind(fixture.dir.path(), latency, Box::new(plan)).unwrap();
    fixture.env = [
        ("AWS_ENDPOINT_URL", server.url().as_str()),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "us-east-1"),
    ]
    .map(|(key, value)| (key.to_string(), value.to_string()))
    .to_vec();
    let mut cluster = Cluster::start_with(&fixture, &["attempt=1s"]);
    let keys = [
        ("checkpoint.to", "\"s3://bucket/ckpts\""),
        ("checkpoint.every", "[\"20step\"]"),
        ("elastic.workers", "\"1:1\""),
    ];
    let run = cluster.submit(&fixture.spec("stuck-store", STEPS, &keys));
    cluster.add_with("a", 1, &[], &[("LACUNA_FAKE_SLOT_MS", "1")]);
    cluster.wait(&run, "a checkpoint", |seen| saved(seen) > 0);
    stuck.store(true, Ordering::Relaxed);
    let given_up = |seen: &Seen| seen.count("not-saved") > 0;
    let first = cluster.wait(&run, "the attempt is given up", given_up);
    cluster.wait(&run, "steps go on", |seen| seen.step() > first.step() + 30);
    stuck.store(false, Ordering::Relaxed);
    survives_a_stall(&cluster.wait_end(&run), want, STEPS);
}

#[test]
fn a_worker_that_is_told_to_end_saves_and_another_one_goes_on() {
    const STEPS: u64 = 120;
    let mut fixture = fixture();
    let want = undisturbed(&mut fixture, STEPS);
    let mut cluster = Cluster::start(&fixture);
    let keys = [("checkpoint.every", "[\"1000step\"]"), ("elastic.workers", "\"1:2\"")];
    let run = cluster.submit(&fixture.spec("told", STEPS, &keys));
    for (node, at) in [("a", 20), ("b", 50), ("c", 80)] {
        cluster.add(node, 1);
        cluster.wait(&run, "some steps", |seen| seen.step() >= at);
        let trainer = cluster.pid(&format!("{node}:cpu0"));
        let agent = cluster.take(node);
        // Whoever ends a job signals all of its processes.
        [agent.pid(), trainer].into_iter().for_each(|pid| send_signal(pid, Signal::TERM));
        assert!(wait_for_end(agent.pid(), GRACE), "it ends in time");
        assert_eq!(agent.wait().code(), Some(75), "{node}");
        let where_it_stopped = |seen: &Seen| seen.step() >= at && saved(seen) == seen.step();
        cluster.wait(&run, "it was saved where it stopped", where_it_stopped);
    }
    cluster.add("d", 1);
    let seen = cluster.wait_end(&run);
    finished_with(&seen, want);
    assert_eq!(seen.steps, (1..=STEPS).collect::<Vec<u64>>(), "each step once");
    assert_eq!(seen.count("lost"), 0, "{}", seen.text());
}

/// Finds a process's children and theirs, itself first.
fn family(pid: u32) -> Vec<u32> {
    let mut out = vec![pid];
    let mut at = 0;
    while let Some(pid) = out.get(at) {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
        for task in tasks.flatten() {
            let children = std::fs::read_to_string(task.path().join("children"));
            let children = children.unwrap_or_default();
            out.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        at += 1;
    }
    out
}

/// Reads what `lacuna train --progress json` says until `at` likes a line; then signals all of its
/// processes, and kills them where they have not ended after the grace. Returns the steps and the
/// end.
fn end_train(command: Command, at: impl Fn(&serde_json::Value) -> bool) -> (Vec<u64>, Output) {
    use std::io::{BufRead as _, BufReader};
    let mut command = under(&[], &command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (mut text, mut steps) = (String::new(), Vec::new());
    let mut told = None;
    while let Some(Ok(line)) = lines.next() {
        let value: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
        steps.extend(value["step"].as_u64().filter(|_| value["loss"].is_number()));
        if told.is_none() && at(&value) {
            let family = family(child.id());
            assert!(family.len() >= 3, "train, agent and trainers: {family:?}");
            family.iter().for_each(|&pid| send_signal(pid, Signal::TERM));
            let kill = move || {
                let ended = wait_for_end(family[0], GRACE);
                if !ended {
                    family.iter().for_each(|&pid| send_signal(pid, Signal::KILL));
                }
                ended
            };
            told = Some(std::thread::spawn(kill));
        }
        text += &(line + "\n");
    }
    if let Some(told) = told {
        told.join().unwrap();
    }
    let mut output = child.wait_with_output().unwrap();
    output.stdout = text.into_bytes();
    (steps, output)
}

#[test]
fn a_local_run_whose_processes_are_all_told_to_end_goes_on_where_it_was() {
    const STEPS: u64 = 120;
    let mut fixture = fixture();
    let want = undisturbed(&mut fixture, STEPS);
    let spec = fixture.spec("ended", STEPS, &[("checkpoint.every", "[\"1000step\"]")]);
    let train = |workers: &str| {
        let spec = spec.to_str().unwrap();
        fixture.lacuna(&["train", spec, "--workers", workers, "--progress", "json"])
    };
    let mut all: Vec<u64> = Vec::new();
    for (workers, stop_at) in [("2", 20), ("1", 45), ("3", 70)] {
        let at = |line: &serde_json::Value| {
            line["loss"].is_number() && line["step"].as_u64() >= Some(stop_at)
        };
        let (steps, output) = end_train(train(workers), at);
        let (code, out, err) = said(&output);
        assert_eq!(code, 75, "{out}{err}");
        let last = steps.last().copied().unwrap_or(0);
        let saved = format!("stopped at step {last}; checkpoint of step {last} in ");
        assert!(out.contains(&saved), "{saved}: {out}{err}");
        all.extend(steps);
    }
    // A step takes longer than there is time: the newest checkpoint stays.
    let mut slow = train("1");
    slow.env("LACUNA_FAKE_SLOT_MS", "2000");
    let (steps, output) = end_train(slow, |line| line["event"] == "formed");
    assert_eq!((output.status.code(), steps.len()), (None, 0), "{output:?}");
    let (steps, output) = end_train(train("2"), |_| false);
    let (code, out, err) = said(&output);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains(&format!("state digest {want:016x}")), "{want:016x} in {out}");
    all.extend(steps);
    assert_eq!(all, (1..=STEPS).collect::<Vec<u64>>(), "each step once");
}
