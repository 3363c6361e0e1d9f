//! Devices that hang, lie, die or slow down; machines that are taken away: who is named, and that
//! no bit changes.

use lacuna_checkpoint::commit;
use lacuna_checkpoint::layout::{Attempt, RunDir};
use lacuna_tests::{Cluster, Fixture, Seen, said};
use lacuna_types::{AttemptSeq, CoordEpoch, Generation, Step};
use rustix::process::Signal;

use crate::fixture;

const STEPS: u64 = 120;

pub fn undisturbed(fixture: &Fixture, steps: u64) -> u64 {
    let mut cluster = Cluster::start(fixture);
    let spec = fixture.spec("alone", steps, &[("elastic.workers", "\"1:1\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 1);
    cluster.wait_end(&run).run.final_digest.expect("a finished run has a digest")
}

pub fn finished_with(seen: &Seen, digest: u64) {
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    assert_eq!(seen.run.final_digest, Some(digest), "{}", seen.text());
}

#[test]
fn who_holds_the_group_up_is_named_killed_and_replaced() {
    let fixture = fixture();
    let want = undisturbed(&fixture, STEPS);
    let waits = ["stall=6s", "quarantine=1s"];
    let mut cluster = Cluster::start_with(&fixture, &waits);
    let spec = fixture.spec("stuck", STEPS, &[("elastic.workers", "\"2:3\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 1);
    cluster.add("b", 1);
    cluster.add_with("c", 1, &[], &[("LACUNA_FAKE_HANG_AT", "40")]);
    cluster.wait(&run, "three members", |seen| seen.run.workers.len() == 3 && seen.step() > 5);
    let pid = cluster.pid("c:cpu0");
    let seen = cluster.wait_end(&run);
    finished_with(&seen, want);
    let stuck = seen.events.iter().find(|e| e.kind == "stuck").expect("it is noticed");
    let names = stuck.text.starts_with("c:cpu0 holds step 40 up: in compute since ");
    assert!(names && stuck.text.contains("a:cpu0, b:cpu0 wait in operation"), "{}", stuck.text);
    assert!(!lacuna_tests::is_alive(pid), "the process that hung was killed");
}

#[test]
fn a_flipped_bit_is_outvoted_and_the_run_goes_back_to_what_all_agreed_on() {
    let fixture = fixture();
    let want = undisturbed(&fixture, STEPS);
    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("flipped", STEPS, &[("elastic.workers", "\"3:3\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 1);
    cluster.add("b", 1);
    cluster.add_with("c", 1, &[], &[("LACUNA_FAKE_CORRUPT_AT", "63")]);
    let seen = cluster.wait_end(&run);
    finished_with(&seen, want);
    assert_eq!(seen.count("doubted"), 1, "{}", seen.text());
    assert!(
        seen.text().contains("c:cpu0: its state differed from most others'"),
        "{}",
        seen.text()
    );
    let back = seen.events.iter().find(|e| e.kind == "distrusted").expect("it goes back");
    assert!(back.text.contains("going back to the checkpoint of step"), "{}", back.text);
}

#[test]
fn of_two_that_differ_the_one_with_another_probe_goes() {
    let fixture = fixture();
    let want = undisturbed(&fixture, STEPS);
    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("drifted", STEPS, &[("elastic.workers", "\"1:2\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 1);
    cluster.add_with("b", 1, &[], &[("LACUNA_FAKE_DRIFT_AT", "63")]);
    let agent = cluster.take("b");
    let seen = cluster.wait_end(&run);
    finished_with(&seen, want);
    let refused = seen.events.iter().find(|e| e.kind == "refused").expect("b is refused");
    assert!(refused.text.starts_with("b:cpu0 computes other bits"), "{}", refused.text);
    assert_eq!(agent.wait().code(), Some(78), "unfit: its agent does not try again");
}

#[test]
fn two_that_differ_and_cannot_be_told_apart_pause_the_run() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("undecided", STEPS, &[("elastic.workers", "\"2:2\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 1);
    cluster.add_with("b", 1, &[], &[("LACUNA_FAKE_CORRUPT_AT", "63")]);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "paused", "{}", seen.text());
    assert!(seen.run.why.contains("a:cpu0 and b:cpu0"), "{}", seen.run.why);
}

#[test]
fn a_step_that_kills_whoever_computes_it_is_named_with_its_samples() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("deadly", STEPS, &[("elastic.workers", "\"1:4\"")]);
    let run = cluster.submit(&spec);
    for node in ["a", "b", "c"] {
        cluster.add_with(node, 1, &[], &[("LACUNA_FAKE_DIE_AT", "30")]);
    }
    cluster.add("d", 1);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "paused", "{}", seen.text());
    assert!(seen.run.why.starts_with("step 30 ended 3 generations in a row"), "{}", seen.run.why);
    let samples = seen.events.iter().find(|e| e.kind == "samples").expect("samples are named");
    assert!(samples.text.starts_with("step 30 holds samples "), "{}", samples.text);
    assert_eq!(samples.text.split(' ').count(), 4 + 32, "{}", samples.text);
}

#[test]
fn a_slow_worker_gets_fewer_slots_and_the_communicator_is_kept() {
    let fixture = fixture();
    let want = undisturbed(&fixture, 400);
    let mut cluster = Cluster::start_with(&fixture, &["straggler_window=1s"]);
    let spec = fixture.spec("uneven", 400, &[("elastic.workers", "\"2:2\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 1);
    cluster.add_with("b", 1, &[], &[("LACUNA_FAKE_SLOT_MS", "12")]);
    let seen = cluster.wait_end(&run);
    finished_with(&seen, want);
    let formed: Vec<&str> =
        seen.events.iter().filter(|e| e.kind == "formed").map(|e| e.text.as_str()).collect();
    assert!(formed[0].ends_with("slots: a:cpu0 4, b:cpu0 4"), "{}", seen.text());
    assert!(formed[1].contains("state in memory; slots: a:cpu0 "), "{}", seen.text());
    assert!(!formed[1].ends_with("b:cpu0 4"), "b computes fewer: {}", seen.text());
    let journal = fixture.run(&["journal", "uneven", "--state", "state"]);
    let (code, out, err) = said(&journal);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("kept communicator"), "{out}");
    assert!(out.contains("finished at step 400 with state"), "{out}");
}

#[test]
fn a_broken_device_is_left_out_for_a_while_and_others_go_on() {
    let fixture = fixture();
    let want = undisturbed(&fixture, STEPS);
    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("broken", STEPS, &[("elastic.workers", "\"1:2\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 1);
    cluster.add_with("b", 1, &[], &[("LACUNA_FAKE_FAIL_AT", "30")]);
    let seen = cluster.wait_end(&run);
    finished_with(&seen, want);
    assert!(seen.text().contains("slot 4 of step 30 on a broken device"), "{}", seen.text());
    assert!(seen.text().contains("b:cpu0 is kept out for 10s"), "{}", seen.text());
}

/// What schedulers send before they take a machine away, and the end of its time.
#[test]
fn notices_and_walltime_drain_a_worker_at_a_boundary() {
    let fixture = fixture();
    let want = undisturbed(&fixture, 300);
    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("noticed", 300, &[("elastic.workers", "\"1:4\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 1);
    cluster.add("b", 1);
    cluster.add("c", 1);
    cluster.add_with("d", 1, &["--walltime", "4", "--drain-margin", "2"], &[]);
    cluster.wait(&run, "all are there", |seen| seen.run.workers.len() == 4 && seen.step() >= 5);
    for (node, signal) in [("b", Signal::USR1), ("c", Signal::USR2)] {
        let agent = cluster.take(node);
        agent.signal(signal);
        assert_eq!(agent.wait().code(), Some(75), "{node}");
    }
    assert_eq!(cluster.take("d").wait().code(), Some(75), "its time was over");
    let seen = cluster.wait_end(&run);
    finished_with(&seen, want);
    assert_eq!(seen.count("lost"), 0, "nothing was redone: {}", seen.text());
}

/// The agent is killed: its trainers see their pipe close and end.
#[test]
fn a_killed_agent_leaves_no_orphan() {
    let fixture = fixture();
    let want = undisturbed(&fixture, STEPS);
    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("agentless", STEPS, &[("elastic.workers", "\"1:3\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 1);
    cluster.add("b", 2);
    cluster.wait(&run, "all are there", |seen| seen.run.workers.len() == 3 && seen.step() >= 10);
    let pids = [cluster.pid("b:cpu0"), cluster.pid("b:cpu1")];
    let agent = cluster.take("b");
    agent.signal(Signal::KILL);
    agent.wait();
    let seen = cluster.wait_end(&run);
    finished_with(&seen, want);
    assert!(pids.iter().all(|&pid| !lacuna_tests::is_alive(pid)), "no orphan stays");
}

#[test]
fn a_spare_takes_a_lost_members_place_in_the_same_change() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let extra = [("elastic.workers", "\"2:2\""), ("elastic.spares", "1")];
    let run = cluster.submit(&fixture.spec("spared", 300, &extra));
    for node in ["a", "b", "c"] {
        cluster.add(node, 1);
    }
    let ready = |seen: &Seen| {
        let spare = seen.run.workers.iter().any(|w| w.state == "spare");
        spare && seen.run.state == "running" && seen.step() >= 10
    };
    let seen = cluster.wait(&run, "two members and a spare", ready);
    let member = seen.run.workers.iter().find(|w| w.rank == Some(1)).expect("a second member");
    lacuna_tests::send_signal(cluster.pid(&member.worker_id), Signal::KILL);
    let seen = cluster.wait(&run, "a second generation", |seen| seen.count("formed") == 2);
    let formed = seen.events.iter().rfind(|e| e.kind == "formed").expect("just seen");
    assert!(formed.text.contains("2 workers at step"), "at full strength at once: {}", formed.text);
    cluster.wait_end(&run);
}

fn ask(fixture: &Fixture, cluster: &Cluster<'_>, command: &str, name: &str) -> (i32, String) {
    let output = fixture.run(&[command, name, "--coordinator", &cluster.url]);
    let (code, out, err) = said(&output);
    (code, out + &err)
}

#[test]
fn an_operator_lets_a_worker_back_in() {
    let fixture = fixture();
    let want = undisturbed(&fixture, 400);
    let mut cluster = Cluster::start_with(&fixture, &["quarantine=600s"]);
    let spec = fixture.spec("mended", 400, &[("elastic.workers", "\"1:2\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 1);
    cluster.add_with("b", 1, &[], &[("LACUNA_FAKE_FAIL_AT", "30")]);
    cluster.wait(&run, "b is kept out", |seen| seen.text().contains("b:cpu0 is kept out for 600s"));
    let (code, text) = ask(&fixture, &cluster, "release", "nobody:cpu0");
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("no run keeps a worker nobody:cpu0 out"), "{text}");
    assert_eq!(ask(&fixture, &cluster, "release", "b:cpu0").0, 0);
    cluster.wait(&run, "b is back", |seen| {
        let released = seen.events.iter().position(|e| e.kind == "released");
        released.is_some_and(|n| seen.events[n..].iter().any(|e| e.text.contains("b:cpu0 ")))
            && seen.run.workers.iter().any(|w| w.worker_id == "b:cpu0" && w.rank.is_some())
    });
    finished_with(&cluster.wait_end(&run), want);
}

#[test]
fn an_operator_gives_silent_members_up() {
    let fixture = fixture();
    let want = undisturbed(&fixture, STEPS);
    let mut cluster = Cluster::start_with(&fixture, &["disjoint=600s"]);
    let spec = fixture.spec("silent", STEPS, &[("elastic.workers", "\"1:2\"")]);
    let run = cluster.submit(&spec);
    cluster.add("a", 1);
    cluster.wait(&run, "a trains", |seen| seen.step() >= 10);
    let (code, text) = ask(&fixture, &cluster, "force", &run);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("run silent waits for no silent members"), "{text}");
    let (agent, trainer) = (cluster.take("a"), cluster.pid("a:cpu0"));
    agent.signal(Signal::STOP);
    lacuna_tests::send_signal(trainer, Signal::STOP);
    cluster.add("z", 1);
    let waits = |seen: &Seen| seen.text().contains("the members of generation 1 (a:cpu0)");
    let seen = cluster.wait(&run, "z waits for a", waits);
    assert_eq!(seen.count("forced"), 0, "{}", seen.text());
    assert_eq!(ask(&fixture, &cluster, "force", &run).0, 0);
    let seen = cluster.wait_end(&run);
    finished_with(&seen, want);
    assert_eq!(seen.count("forced"), 1, "{}", seen.text());
    // What was given up wakes, is told so, and ends.
    lacuna_tests::send_signal(trainer, Signal::CONT);
    drop(agent);
}

/// Each run has its own workers, its own group and its own result.
#[test]
fn two_runs_at_once_do_not_disturb_each_other() {
    let fixture = fixture();
    let want = undisturbed(&fixture, STEPS);
    let mut cluster = Cluster::start(&fixture);
    let runs = ["first", "second"]
        .map(|name| cluster.submit(&fixture.spec(name, STEPS, &[("elastic.workers", "\"2:2\"")])));
    for node in ["a", "b", "c", "d"] {
        cluster.add(node, 1);
    }
    let members = |run: &String| {
        let trains = |seen: &Seen| seen.run.workers.len() == 2 && seen.step() >= 3;
        let seen = cluster.wait(run, "both have two members", trains);
        seen.run.workers.iter().map(|w| w.worker_id.clone()).collect::<Vec<String>>()
    };
    let [first, second] = [members(&runs[0]), members(&runs[1])];
    assert!(first.iter().all(|worker| !second.contains(worker)), "{first:?} and {second:?}");
    lacuna_tests::send_signal(cluster.pid(&first[0]), Signal::KILL);
    let seen = runs.each_ref().map(|run| cluster.wait_end(run));
    seen.iter().for_each(|seen| finished_with(seen, want));
    assert_eq!(seen[1].count("lost"), 0, "the other run lost nobody: {}", seen[1].text());
}

/// How a trainer ended is in the event of its loss, and its agent waits longer each time.
#[test]
fn ends_say_how_and_new_processes_wait_longer() {
    let fixture = fixture();
    let mut cluster = Cluster::start_with(&fixture, &["quarantine=600s"]);
    let spec = fixture.spec("words", 400, &[("elastic.workers", "\"2:2\"")]);
    let run = cluster.submit(&spec);
    // Rank 0 computes the first slot, which is the one that kills.
    cluster.add_with("a", 1, &[], &[("LACUNA_FAKE_DIE_AT", "30")]);
    cluster.add("b", 1);
    let seen = cluster.wait(&run, "a dies twice", |seen| seen.count("lost") >= 2);
    let lost = seen.events.iter().find(|event| event.kind == "lost").expect("just seen");
    assert!(lost.text.contains("signal 6"), "{}", lost.text);
    let log = std::fs::read_to_string(fixture.path("a.log")).expect("a has a log");
    let pauses: Vec<&str> = log.split("starting the trainer again").skip(1).collect();
    assert!(pauses[0].contains("pause=200ms"), "{log}");
    assert!(pauses.len() < 2 || pauses[1].contains("pause=400ms"), "{log}");
}

/// A coordinator whose run another one took gives the workers back, and removes nothing of what the
/// other makes.
#[test]
fn a_run_that_another_coordinator_claimed_rests() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let keys = [("checkpoint.every", "[\"10step\"]"), ("elastic.workers", "\"1:1\"")];
    let run = cluster.submit(&fixture.spec("taken", 100_000, &keys));
    cluster.add("a", 1);
    cluster.wait(&run, "a checkpoint", |seen| seen.run.checkpoint_step.is_some());
    let dir = RunDir::new(fixture.path("ckpt"), run.parse().unwrap());
    // To who lost the claim it looks like what is left of an old attempt.
    let attempt = Attempt::new(Generation(0), AttemptSeq(1));
    let part = dir.attempt(Step(3), attempt).join("part");
    commit::claim(&dir, CoordEpoch(1000)).unwrap();
    std::fs::create_dir_all(part.parent().unwrap()).unwrap();
    std::fs::write(&part, "being made").unwrap();
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "paused", "{}", seen.text());
    assert!(seen.run.why.contains("another coordinator, start 1000,"), "{}", seen.run.why);
    assert!(part.exists(), "{}", seen.text());
    // Its worker serves the next run.
    let other = cluster.submit(&fixture.spec("other", 20, &[]));
    assert_eq!(cluster.wait_end(&other).run.state, "finished");
    // Started again it leaves the claim where it is; asked to go on it takes the run back.
    cluster.kill_coordinator();
    cluster.start_coordinator();
    let seen = cluster.wait(&run, "it is looked at", |seen| seen.run.state == "paused");
    let claimed = || commit::highest_claim(&dir).unwrap().unwrap();
    assert_eq!(claimed(), CoordEpoch(1000));
    let (code, _, err) = said(&fixture.run(&["resume", "taken", "-c", &cluster.url]));
    assert_eq!(code, 0, "{err}");
    let before = seen.run.checkpoint_step;
    cluster.wait(&run, "another checkpoint", |seen| seen.run.checkpoint_step > before);
    assert!(claimed() > CoordEpoch(1000) && !part.exists());
}
