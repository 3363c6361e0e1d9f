//! The claim on real processes with the torch engine: the same bits, whoever computed what.
//!
//! Needs the `lacuna` binary beside `lacuna-worker`; `make test` builds both.

use std::path::PathBuf;

use lacuna_tests::{Binaries, Cluster, Fixture, send_signal};
use rustix::process::Signal;

const STEPS: u64 = 250;

fn fixture() -> Fixture {
    let worker = PathBuf::from(env!("CARGO_BIN_EXE_lacuna-worker"));
    let lacuna = worker.with_file_name("lacuna");
    assert!(lacuna.is_file(), "{} is missing: `make build` makes it", lacuna.display());
    Fixture::new(Binaries { lacuna, worker }, 256, 8)
}

/// The digest of an undisturbed run with `n` workers.
fn undisturbed(fixture: &Fixture, n: usize) -> u64 {
    let mut cluster = Cluster::start(fixture);
    let workers = format!("\"{n}:{n}\"");
    let spec = fixture.spec(&format!("quiet-{n}"), STEPS, &[("elastic.workers", &workers)]);
    let run = cluster.submit(&spec);
    cluster.add("a", n);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    let (first, last) = (&seen.figures[&1], &seen.figures[&STEPS]);
    assert!(last.loss < first.loss, "it learns: {} to {}", first.loss, last.loss);
    seen.run.final_digest.expect("a finished run has a digest")
}

#[test]
fn one_two_and_three_workers_and_a_kill_give_the_same_bits() {
    let fixture = fixture();
    let want = undisturbed(&fixture, 1);
    assert_eq!(undisturbed(&fixture, 2), want);
    assert_eq!(undisturbed(&fixture, 3), want);

    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("killed", STEPS, &[("elastic.workers", "\"2:3\"")]);
    let run = cluster.submit(&spec);
    for node in ["a", "b", "c"] {
        cluster.add(node, 1);
    }
    // Any step will do; this one differs from run to run.
    let at = 5 + u64::from(std::process::id()) % 15;
    cluster.wait(&run, "some steps", |seen| seen.step() >= at && seen.run.workers.len() == 3);
    send_signal(cluster.pid("b:cpu0"), Signal::KILL);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.final_digest, Some(want), "{}", seen.text());
    assert_eq!(seen.count("lost"), 1, "{}", seen.text());
    let healed = seen.events.iter().any(|e| e.text.contains("b:cpu0 healed from"));
    assert!(healed, "its replacement joined: {}", seen.text());
}

#[test]
fn a_run_stopped_and_resumed_with_other_workers_has_the_bits_of_an_undisturbed_one() {
    let fixture = fixture();
    let want = undisturbed(&fixture, 1);
    let mut cluster = Cluster::start(&fixture);
    let run = cluster.submit(&fixture.spec("resumed", STEPS, &[]));
    cluster.add("a", 2);
    cluster.wait(&run, "some steps", |seen| seen.step() >= 12);
    let stopped = fixture.run(&["stop", &run, "--coordinator", &cluster.url]);
    assert!(stopped.status.success(), "{}", String::from_utf8_lossy(&stopped.stderr));
    drop(cluster.take("a"));
    let spec = fixture.path("resumed.toml");
    cluster.submit(&spec);
    cluster.add("b", 1);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.final_digest, Some(want), "{}", seen.text());
    assert!(seen.text().contains("from the newest checkpoint"), "{}", seen.text());
}

/// The engine keeps the contract of the interface.
#[test]
fn the_torch_engine_keeps_the_contract() {
    let worker = env!("CARGO_BIN_EXE_lacuna-worker");
    let output = std::process::Command::new(worker)
        .args(["conformance"])
        .envs(lacuna_mae::runtime::CPU_ENV.iter().copied())
        .output()
        .expect("the worker starts");
    let said = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{err}");
    assert!(said.contains("engine conformance: passed"), "{said}");
}
