//! The product's claim on real processes: the same bits, whoever computed what.

use std::time::{Duration, Instant};

use lacuna_tests::{Cluster, Fixture, said, send_signal};
use rustix::process::Signal;

use crate::fixture;

const STEPS: u64 = 120;

/// Long enough for a worker to be evicted and to come back.
const LONG: u64 = 500;

/// The digest of an undisturbed run with `n` workers.
fn undisturbed(fixture: &Fixture, n: usize) -> u64 {
    undisturbed_steps(fixture, n, STEPS)
}

fn undisturbed_steps(fixture: &Fixture, n: usize, steps: u64) -> u64 {
    let mut cluster = Cluster::start(fixture);
    let workers = format!("\"{n}:{n}\"");
    let spec = fixture.spec(&format!("quiet-{n}"), steps, &[("elastic.workers", &workers)]);
    let run = cluster.submit(&spec);
    cluster.add("a", n);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    assert_eq!(seen.run.step, steps);
    assert_eq!(seen.run.checkpoint_step, Some(steps));
    assert_eq!(seen.count("formed"), 1, "one generation: {}", seen.text());
    assert_eq!(seen.figures.len() as u64, steps, "every step was reported once");
    seen.run.final_digest.expect("a finished run has a digest")
}

/// Waits for a condition that no update tells; panics with `what` if it does not come true.
fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::yield_now();
    }
}

#[test]
fn one_two_and_three_workers_give_the_same_bits() {
    let fixture = fixture();
    let one = undisturbed(&fixture, 1);
    assert_eq!(undisturbed(&fixture, 2), one);
    assert_eq!(undisturbed(&fixture, 3), one);
    // Plain Rust with IEEE arithmetic: the same on every machine. A commit that moves it says why.
    assert_eq!(format!("{one:016x}"), "71dfbee5180d1b53");
}

#[test]
fn an_operator_changes_the_number_of_workers_and_no_bit() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let run = cluster.submit(&fixture.spec("scaled", STEPS, &[("elastic.workers", "\"2:2\"")]));
    // Slow enough that three are there before the end.
    cluster.add_with("a", 3, &[], &[("LACUNA_FAKE_SLOT_MS", "20")]);
    cluster.wait(&run, "some steps", |seen| seen.step() >= 15);
    let scale = |cluster: &Cluster<'_>, workers: &str| {
        let args = ["scale", "scaled", workers, "--coordinator", &cluster.url];
        said(&fixture.run(&args))
    };
    let (code, _, err) = scale(&cluster, "1:1");
    assert_eq!(code, 0, "{err}");
    let ranks = |seen: &lacuna_tests::Seen| {
        seen.run.workers.iter().filter(|worker| worker.rank.is_some()).count()
    };
    cluster.wait(&run, "one worker", |seen| ranks(seen) == 1 && seen.run.state == "running");
    // It holds after a restart of the coordinator, too.
    cluster.kill_coordinator();
    cluster.start_coordinator();
    let (code, _, err) = scale(&cluster, "1:3");
    assert_eq!(code, 0, "{err}");
    cluster.wait(&run, "three workers", |seen| ranks(seen) == 3);
    let (code, _, err) = scale(&cluster, "3:1");
    assert_eq!(code, 2, "{err}");
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    assert_eq!(seen.count("resized"), 2, "{}", seen.text());
    assert_eq!(format!("{:016x}", seen.run.final_digest.unwrap()), "71dfbee5180d1b53");
}

#[test]
fn sums_of_32_bits_give_the_same_bits_too() {
    let fixture = fixture();
    let train = |name: &str, n: usize, kills: bool| {
        let mut cluster = Cluster::start(&fixture);
        // Patches so large that a tensor has two exponents.
        let extra = [
            ("elastic.workers", "\"1:3\""),
            ("train.reduce", "\"exact32\""),
            ("model.patch_size", "4"),
        ];
        let run = cluster.submit(&fixture.spec(name, STEPS, &extra));
        (0..n).for_each(|i| cluster.add(&format!("n{i}"), 1));
        if kills {
            cluster
                .wait(&run, "some steps", |seen| seen.step() >= 20 && seen.run.workers.len() == n);
            send_signal(cluster.pid("n1:cpu0"), Signal::KILL);
        }
        let seen = cluster.wait_end(&run);
        assert_eq!(seen.run.state, "finished", "{}", seen.text());
        seen.run.final_digest.expect("a finished run has a digest")
    };
    let want = train("alone", 1, false);
    assert_eq!(train("three", 3, true), want);
    // Exponents of chunks are in its checkpoints, which every command reads.
    let verified = fixture.run(&["ckpt", "verify", "ckpt/three"]);
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stdout));
    assert_eq!(format!("{want:016x}"), "cd8f74e395eb1b36");
}

/// Floats promise no bits, and all else: members agree, a dead one is replaced, the run ends.
#[test]
fn a_run_that_sums_floats_survives_as_well() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let extra = [("elastic.workers", "\"1:3\""), ("train.reduce", "\"fast\"")];
    let run = cluster.submit(&fixture.spec("floats", STEPS, &extra));
    (0..3).for_each(|i| cluster.add(&format!("n{i}"), 1));
    cluster.wait(&run, "some steps", |seen| seen.step() >= 20 && seen.run.workers.len() == 3);
    send_signal(cluster.pid("n1:cpu0"), Signal::KILL);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    assert_eq!(seen.count("lost"), 1, "{}", seen.text());
    let (first, last) = (seen.figures[&1].loss, seen.figures[&STEPS].loss);
    assert!(last < first, "it learns: {first} to {last}");
}

#[test]
fn a_sigkill_and_a_joiner_change_no_bit_and_restart_no_survivor() {
    let fixture = fixture();
    let want = undisturbed_steps(&fixture, 1, LONG);
    let mut cluster = Cluster::start(&fixture);
    let run = cluster.submit(&fixture.spec("killed", LONG, &[("elastic.workers", "\"2:3\"")]));
    for node in ["a", "b", "c"] {
        cluster.add(node, 1);
    }
    // Any step will do; this one differs from run to run.
    let at = 15 + u64::from(std::process::id()) % 50;
    cluster.wait(&run, "some steps", |seen| seen.step() >= at && seen.run.workers.len() == 3);
    let survivors = [cluster.pid("a:cpu0"), cluster.pid("c:cpu0")];
    send_signal(cluster.pid("b:cpu0"), Signal::KILL);
    cluster.wait(&run, "its replacement joins and is healed by a peer", |seen| {
        seen.events.iter().any(|event| event.text.contains("b:cpu0 healed from"))
    });
    let alive = ["a:cpu0", "c:cpu0"].map(|worker| cluster.pid(worker));
    assert_eq!(alive, survivors, "the same processes");
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    assert_eq!(seen.run.final_digest, Some(want), "{}", seen.text());
    assert_eq!(seen.count("lost"), 1, "{}", seen.text());
    for (worker, pid) in ["a:cpu0", "c:cpu0"].iter().zip(survivors) {
        let lost = format!("worker {worker} lost");
        assert!(!seen.text().contains(&lost), "{worker} ({pid}) survived: {}", seen.text());
    }
}

#[test]
fn a_stopped_process_is_evicted_and_its_return_changes_no_bit() {
    let fixture = fixture();
    let want = undisturbed_steps(&fixture, 2, LONG);
    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("stopped", LONG, &[("elastic.workers", "\"1:2\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 1);
    cluster.add("b", 1);
    cluster.wait(&run, "some steps", |seen| seen.step() >= 20 && seen.run.workers.len() == 2);
    let pid = cluster.pid("b:cpu0");
    send_signal(pid, Signal::STOP);
    let seen = cluster.wait(&run, "the lease runs out", |seen| seen.count("lost") == 1);
    assert!(seen.text().contains("no beat for 3."), "{}", seen.text());
    send_signal(pid, Signal::CONT);
    let back = |seen: &lacuna_tests::Seen| {
        seen.run.workers.iter().filter(|w| w.rank.is_some()).count() == 2
    };
    cluster.wait(&run, "it is a member again", back);
    assert_eq!(cluster.pid("b:cpu0"), pid, "the same process");
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.final_digest, Some(want), "{}", seen.text());
}

#[test]
fn a_killed_coordinator_comes_back_and_the_run_goes_on() {
    let fixture = fixture();
    let want = undisturbed(&fixture, 2);
    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("headless", STEPS, &[("elastic.workers", "\"2:2\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 2);
    cluster.wait(&run, "some steps", |seen| seen.step() >= 30);
    let pids = [cluster.pid("a:cpu0"), cluster.pid("a:cpu1")];
    cluster.kill_coordinator();
    cluster.start_coordinator();
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.final_digest, Some(want), "{}", seen.text());
    assert!(seen.run.step == STEPS && pids[0] != pids[1]);
    assert_eq!(seen.count("formed"), 1, "no new generation: {}", seen.text());
    assert_eq!(seen.count("recovered"), 1, "{}", seen.text());
    assert_eq!(seen.run.generation, 1);
}

/// Workers that were without a coordinator for long stand still with their state until it is back.
#[test]
fn a_coordinator_that_is_away_for_long_finds_its_workers_standing_with_their_state() {
    let fixture = fixture();
    let want = undisturbed_steps(&fixture, 2, LONG);
    let mut cluster = Cluster::start_with(&fixture, &["orphan=700ms"]);
    let spec = fixture.spec("orphaned", LONG, &[("elastic.workers", "\"2:2\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 2);
    cluster.wait(&run, "some steps", |seen| seen.step() >= 30);
    let pids = [cluster.pid("a:cpu0"), cluster.pid("a:cpu1")];
    cluster.kill_coordinator();
    let log = || std::fs::read_to_string(fixture.path("a.log")).unwrap();
    let stand = || log().matches("standing still at the next boundary").count() == 2;
    wait_until("both stand still", stand);
    cluster.start_coordinator();
    cluster.wait(&run, "they go on", |seen| seen.count("formed") == 2);
    assert_eq!([cluster.pid("a:cpu0"), cluster.pid("a:cpu1")], pids, "the same processes");
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.final_digest, Some(want), "{}", seen.text());
    assert_eq!(seen.count("lost"), 0, "{}", seen.text());
    assert!(!log().contains("panicked"), "{}", log());
}

#[test]
fn a_stalled_coordinator_does_not_hold_it_against_the_workers() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("stalled", LONG, &[("elastic.workers", "\"2:2\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 2);
    cluster.wait(&run, "some steps", |seen| seen.step() >= 20);
    cluster.stall_coordinator(std::time::Duration::from_secs(4));
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    assert_eq!(seen.count("lost"), 0, "{}", seen.text());
}

#[test]
fn a_drained_worker_leaves_with_its_code_and_changes_no_bit() {
    let fixture = fixture();
    let want = undisturbed(&fixture, 1);
    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("drained", STEPS, &[("elastic.workers", "\"1:2\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 1);
    cluster.add("b", 1);
    cluster.wait(&run, "some steps", |seen| seen.step() >= 20 && seen.run.workers.len() == 2);
    let agent = cluster.take("b");
    agent.signal(Signal::TERM);
    assert_eq!(agent.wait().code(), Some(75));
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.final_digest, Some(want), "{}", seen.text());
    assert_eq!(seen.count("lost"), 0, "{}", seen.text());
}

/// `lacuna train`: Ctrl-C at any step, then on with another number of workers.
#[test]
fn stop_and_resume_with_other_workers_give_the_bits_of_an_undisturbed_run() {
    let fixture = fixture();
    let want = undisturbed(&fixture, 1);
    let spec = fixture.spec("resumed", STEPS, &[]);
    let spec = spec.to_str().unwrap();
    let train = |workers: &str| {
        fixture.lacuna(&["train", spec, "--workers", workers, "--progress", "json"])
    };
    for (workers, stop_at) in [("2", 20), ("1", 55), ("3", 80)] {
        let output = signal_train_at(train(workers), stop_at, Signal::INT);
        let (code, out, err) = said(&output);
        assert_eq!(code, 75, "{out}{err}");
        assert!(out.contains("stopped at step"), "{out}{err}");
    }
    let output = train("2").output().unwrap();
    let (code, out, err) = said(&output);
    assert_eq!(code, 0, "{out}{err}");
    let digest = format!("state digest {want:016x}");
    assert!(out.contains(&digest), "{digest} in {out}");

    let again = train("1").output().unwrap();
    let (code, out, _) = said(&again);
    assert_eq!(code, 0);
    assert!(out.contains("is finished already"), "{out}");

    let listed = fixture.run(&["ckpt", "ls", spec]);
    let (code, out, err) = said(&listed);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains(&STEPS.to_string()), "{out}");
}

/// `lacuna train` is killed, and goes on with more workers, all of which train; of another interval
/// of checkpoints it says that the old one is kept.
#[test]
fn a_killed_train_goes_on_with_more_workers() {
    let fixture = fixture();
    let want = undisturbed(&fixture, 1);
    let spec = fixture.spec("killed", STEPS, &[]);
    let spec = spec.to_str().unwrap();
    let train =
        |more: &[&str]| fixture.lacuna(&[&["train", spec, "--progress", "json"], more].concat());
    let output = signal_train_at(train(&["--workers", "1"]), 20, Signal::KILL);
    assert_eq!(output.status.code(), None, "{output:?}");
    let more = ["--workers", "3", "--set", "checkpoint.every=[\"7step\"]"];
    let (code, out, err) = said(&train(&more).output().unwrap());
    assert_eq!(code, 0, "{out}{err}");
    let digest = format!("state digest {want:016x}");
    assert!(out.contains(&digest), "{digest} in {out}");
    assert!(out.contains("\"rank\":2"), "{out}{err}");
    assert!(err.contains("keeps checkpoint.every"), "{err}");
    assert!(!err.contains("did not end in time"), "{err}");
}

/// Starts `lacuna train --progress json`, sends a signal once step `at` is reported, and returns
/// its end.
fn signal_train_at(
    mut command: std::process::Command,
    at: u64,
    signal: Signal,
) -> std::process::Output {
    use std::io::{BufRead as _, BufReader};
    use std::process::Stdio;
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut text = String::new();
    let mut sent = false;
    while let Some(Ok(line)) = lines.next() {
        let value: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
        let step = value["step"].as_u64().filter(|_| value["loss"].is_number()).unwrap_or(0);
        if !sent && step >= at {
            send_signal(child.id(), signal);
            sent = true;
        }
        text += &(line + "\n");
    }
    let mut output = child.wait_with_output().unwrap();
    output.stdout = text.into_bytes();
    output
}
