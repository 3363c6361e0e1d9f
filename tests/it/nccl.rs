//! Whole workers whose sums travel over NCCL's interface: the code of a GPU, and a library that
//! stands in for NCCL and the driver.

use lacuna_tests::{Cluster, Fixture, Seen, said};
use rustix::process::Signal;

use crate::faults::{finished_with, undisturbed};
use crate::fixture;

const STEPS: u64 = 120;

fn library() -> String {
    lacuna_nccl_standin::path().to_str().expect("a path in UTF-8").to_string()
}

/// What makes trainers use the library that stands in for NCCL and the driver.
fn stand_in(library: &str) -> Vec<(&str, &str)> {
    vec![
        ("LACUNA_COLLECTIVE", "nccl"),
        ("LACUNA_NCCL_LIBRARY", library),
        ("LACUNA_CUDA_LIBRARY", library),
    ]
}

/// Starts an agent whose trainers use NCCL; `more` adds to its environment.
fn add(cluster: &mut Cluster<'_>, node: &str, n: usize, more: &[(&str, &str)]) {
    let library = library();
    let mut env = stand_in(&library);
    // All nodes are this machine: without a name each, their devices would be the same.
    env.push(("NCCL_HOSTID", node));
    env.retain(|(name, _)| !more.iter().any(|(other, _)| other == name));
    env.extend(more);
    cluster.add_with(node, n, &[], &env);
}

fn submit(cluster: &Cluster<'_>, fixture: &Fixture, name: &str, workers: &str) -> String {
    let workers = format!("\"{workers}\"");
    cluster.submit(&fixture.spec(name, STEPS, &[("elastic.workers", &workers)]))
}

fn log(fixture: &Fixture, node: &str) -> String {
    std::fs::read_to_string(fixture.path(&format!("{node}.log"))).expect("the node has a log")
}

#[test]
fn sums_over_nccl_have_the_bits_of_tcp_in_every_world() {
    let fixture = fixture();
    let want = undisturbed(&fixture, STEPS);
    let mut cluster = Cluster::start(&fixture);
    for world in 1..=3 {
        let name = format!("world-{world}");
        let run = submit(&cluster, &fixture, &name, &format!("{world}:{world}"));
        if world == 1 {
            add(&mut cluster, "a", 1, &[]);
        } else {
            add(&mut cluster, &format!("n{world}"), world, &[]);
        }
        finished_with(&cluster.wait_end(&run), want);
    }
    assert!(log(&fixture, "a").contains("NCCL 2.28.9"), "it was NCCL: {}", log(&fixture, "a"));
}

/// State, sums and updates on the device: the numbers of the host.
#[test]
fn a_state_on_a_device_has_the_bits_of_the_host() {
    let fixture = fixture();
    let want = undisturbed(&fixture, 300);
    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("on-device", 300, &[("elastic.workers", "\"1:3\"")]);
    let run = cluster.submit(&spec);
    let there = [("LACUNA_FAKE_DEVICE", "1")];
    add(&mut cluster, "a", 2, &there);
    add(&mut cluster, "b", 1, &there);
    cluster.wait(&run, "three train", |seen| seen.run.workers.len() == 3 && seen.step() >= 10);
    lacuna_tests::send_signal(cluster.pid("a:cpu1"), Signal::KILL);
    let healed = |seen: &Seen| {
        let formed = seen.events.iter().rfind(|event| event.kind == "formed");
        seen.count("lost") == 1 && formed.is_some_and(|event| event.text.contains("3 workers"))
    };
    cluster.wait(&run, "the killed one is back", healed);
    finished_with(&cluster.wait_end(&run), want);
}

/// Devices in a group of hosts: sums make the way over the host.
#[test]
fn a_state_on_a_device_is_summed_over_tcp_too() {
    let fixture = fixture();
    let want = undisturbed(&fixture, STEPS);
    let mut cluster = Cluster::start(&fixture);
    let run = submit(&cluster, &fixture, "over-tcp", "2:2");
    add(&mut cluster, "a", 1, &[("LACUNA_FAKE_DEVICE", "1"), ("LACUNA_COLLECTIVE", "tcp")]);
    add(&mut cluster, "b", 1, &[("LACUNA_COLLECTIVE", "tcp")]);
    finished_with(&cluster.wait_end(&run), want);
}

#[test]
fn a_killed_worker_changes_no_bit_and_comes_back() {
    let fixture = fixture();
    let want = undisturbed(&fixture, 300);
    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("killed", 300, &[("elastic.workers", "\"1:3\"")]);
    let run = cluster.submit(&spec);
    add(&mut cluster, "a", 2, &[]);
    add(&mut cluster, "b", 1, &[]);
    cluster.wait(&run, "three train", |seen| seen.run.workers.len() == 3 && seen.step() >= 10);
    lacuna_tests::send_signal(cluster.pid("a:cpu1"), Signal::KILL);
    let healed = |seen: &Seen| {
        let formed = seen.events.iter().rfind(|event| event.kind == "formed");
        seen.count("lost") == 1 && formed.is_some_and(|event| event.text.contains("3 workers"))
    };
    cluster.wait(&run, "the killed one is back", healed);
    finished_with(&cluster.wait_end(&run), want);
}

/// Has a trainer's state on its device.
const THERE: (&str, &str) = ("LACUNA_FAKE_DEVICE", "1");

/// How an agent logs that a device of its trainer broke.
const DEVICE_BROKE: &str = "how=\"exit code 74\"";

/// Runs with a sound worker `a` and a broken one `b`, which must not keep `a` from the end. Both
/// have their states where `b` has its.
fn with_broken(name: &str, broken: &[(&str, &str)], look: impl Fn(&Fixture, &Seen)) {
    let sound: &[(&str, &str)] = if broken.contains(&THERE) { &[THERE] } else { &[] };
    let fixture = fixture();
    let want = undisturbed(&fixture, STEPS);
    let mut cluster = Cluster::start_with(&fixture, &["stall=6s", "quarantine=600s"]);
    let run = submit(&cluster, &fixture, name, "1:2");
    add(&mut cluster, "a", 1, sound);
    add(&mut cluster, "b", 1, broken);
    let seen = cluster.wait_end(&run);
    finished_with(&seen, want);
    // It has logged all ends of its trainers once it has ended itself.
    let agent = cluster.take("b");
    agent.signal(Signal::TERM);
    agent.wait();
    look(&fixture, &seen);
}

#[test]
fn a_lost_device_costs_its_process_and_no_step_of_the_others() {
    let lost = ("LACUNA_STANDIN_FAULTS", "device-lost@20");
    // With the state on the host, and there.
    for (name, broken) in [("lost", &[lost][..]), ("lost-there", &[lost, THERE][..])] {
        with_broken(name, broken, |fixture, seen| {
            let text = seen.text();
            assert!(text.contains("b:cpu0 is kept out for 600s"), "{text}");
            let log = log(fixture, "b");
            assert!(
                log.contains("CUDA_ERROR_ILLEGAL_ADDRESS") || log.contains("Cuda failure"),
                "{log}"
            );
            assert!(log.contains(DEVICE_BROKE), "{log}");
        });
    }
}

#[test]
fn an_abort_that_hangs_costs_its_process_only() {
    let fixture = fixture();
    let want = undisturbed(&fixture, 300);
    let mut cluster = Cluster::start_with(&fixture, &["revoke=20s"]);
    let spec = fixture.spec("hung-abort", 300, &[("elastic.workers", "\"1:3\"")]);
    let run = cluster.submit(&spec);
    add(&mut cluster, "a", 1, &[]);
    add(&mut cluster, "b", 1, &[("LACUNA_STANDIN_FAULTS", "abort-hangs,once")]);
    add(&mut cluster, "c", 1, &[]);
    cluster.wait(&run, "three train", |seen| seen.run.workers.len() == 3 && seen.step() >= 10);
    let stuck = cluster.pid("b:cpu0");
    // A change of the group: everybody leaves it, and b cannot.
    lacuna_tests::send_signal(cluster.pid("c:cpu0"), Signal::KILL);
    let seen = cluster.wait_end(&run);
    finished_with(&seen, want);
    let (text, log) = (seen.text(), log(&fixture, "b"));
    assert!(log.contains("`ncclCommAbort` did not return within 5s"), "{text}\n{log}");
    assert!(log.contains(DEVICE_BROKE), "{text}\n{log}");
    assert!(!lacuna_tests::is_alive(stuck), "the process that hung has ended");
}

#[test]
fn memory_that_runs_out_is_named() {
    with_broken("small", &[("LACUNA_STANDIN_MEMORY", "1000")], |fixture, seen| {
        let (text, log) = (seen.text(), log(fixture, "b"));
        assert!(text.contains("b:cpu0 is unfit") && text.contains("out of memory"), "{text}");
        assert!(log.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{log}");
        assert!(log.contains(DEVICE_BROKE), "{log}");
    });
}

/// A device too small for the engine: nothing of it can be made ready.
const TOO_SMALL: [(&str, &str); 2] = [THERE, ("LACUNA_STANDIN_MEMORY", "1000")];

/// Before the group forms, where the engine is built: the usual case of a card that is too small.
#[test]
fn memory_that_runs_out_while_the_engine_is_built_ends_that_process_alone() {
    with_broken("tiny", &TOO_SMALL, |fixture, seen| {
        let (text, log) = (seen.text(), log(fixture, "b"));
        let why = "worker b:cpu0 is unfit: ";
        assert!(text.contains(why) && text.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{text}");
        assert_eq!(text.matches(why).count(), 1, "once, however often it tries: {text}");
        assert!(!text.contains("kept out") && seen.count("lost") == 0, "{text}");
        assert!(log.contains(DEVICE_BROKE) && log.contains("starting the trainer again"), "{log}");
    });
}

#[test]
fn a_run_that_fits_on_no_device_fails_and_says_so() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let run = submit(&cluster, &fixture, "too-large", "2:2");
    add(&mut cluster, "a", 1, &TOO_SMALL);
    add(&mut cluster, "b", 1, &TOO_SMALL);
    let seen = cluster.wait_end(&run);
    let text = seen.text();
    assert_eq!(seen.run.state, "failed", "{text}");
    for name in ["a:cpu0", "b:cpu0"] {
        assert!(seen.run.why.contains(name), "{}", seen.run.why);
    }
    assert!(seen.run.why.contains("no worker can go on ("), "{}", seen.run.why);
    assert!(seen.run.why.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{}", seen.run.why);
}

/// Its agent ends with its trainers, a little before the coordinator has ended the run.
#[test]
fn training_on_devices_that_are_too_small_says_why() {
    let fixture = fixture();
    let spec = fixture.spec("too-large-here", STEPS, &[]);
    let mut command = fixture.lacuna(&["train", spec.to_str().unwrap(), "--workers", "2"]);
    command.envs(stand_in(&library())).envs(TOO_SMALL);
    let out = command.output().expect("`lacuna` starts");
    let (code, out, err) = said(&out);
    let text = format!("{out}{err}");
    assert_eq!(code, 74, "{text}");
    assert!(text.contains("no worker can go on (") && !text.contains("workers ended"), "{text}");
    assert!(text.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{text}");
}

/// A worker that cannot take part says why, ends with 78, and the run goes on without it.
fn refused(name: &str, broken: &[(&str, &str)], words: &str) {
    let fixture = fixture();
    let want = undisturbed(&fixture, STEPS);
    let mut cluster = Cluster::start(&fixture);
    let run = submit(&cluster, &fixture, name, "1:2");
    add(&mut cluster, "a", 1, &[]);
    cluster.wait(&run, "a trains", |seen| seen.step() >= 5);
    add(&mut cluster, "b", 1, broken);
    assert_eq!(cluster.take("b").wait().code(), Some(78), "{}", log(&fixture, "b"));
    assert!(log(&fixture, "b").contains(words), "{}", log(&fixture, "b"));
    finished_with(&cluster.wait_end(&run), want);
}

#[test]
fn a_machine_without_nccl_is_refused() {
    let words = "NCCL cannot be used: no NCCL: /nowhere.so";
    refused("no-nccl", &[("LACUNA_NCCL_LIBRARY", "/nowhere.so")], words);
}

#[test]
fn an_old_nccl_is_refused() {
    let words = "is too old: it is 2.10.3, needed is 2.18.0 or newer";
    refused("old-nccl", &[("LACUNA_STANDIN_NCCL", "21003")], words);
}

#[test]
fn a_machine_without_a_driver_is_refused() {
    let words = "device cuda0 cannot be used: no NVIDIA driver: /nowhere.so";
    refused("no-driver", &[("LACUNA_CUDA_LIBRARY", "/nowhere.so")], words);
}

#[test]
fn an_old_driver_is_refused() {
    let words = "the NVIDIA driver in `libc.so.6` is too old: it has no `cuInit`";
    refused("old-driver", &[("LACUNA_CUDA_LIBRARY", "libc.so.6")], words);
}

#[test]
fn a_machine_without_a_device_is_refused() {
    refused("no-device", &[("LACUNA_STANDIN_DEVICES", "0")], "the NVIDIA driver shows no device");
}

#[test]
fn the_second_worker_on_a_device_is_refused() {
    let fixture = fixture();
    let want = undisturbed(&fixture, STEPS);
    let mut cluster = Cluster::start(&fixture);
    let run = submit(&cluster, &fixture, "shared", "1:2");
    add(&mut cluster, "a", 1, &[]);
    cluster.wait(&run, "a trains", |seen| seen.step() >= 5);
    add(&mut cluster, "b", 1, &[("NCCL_HOSTID", "a")]);
    assert_eq!(cluster.take("b").wait().code(), Some(78), "{}", log(&fixture, "b"));
    let words = "device 0000:00:00.0 of host a is used by rank 0 already";
    assert!(log(&fixture, "b").contains(words), "{}", log(&fixture, "b"));
    finished_with(&cluster.wait_end(&run), want);
}
