//! Objectives of somebody else's on the same machinery: the same bits with any number of workers,
//! with a kill in between, and no mixture of objectives.
//!
//! Needs the `lacuna` binary and the examples beside `lacuna-worker`; `make test` builds them.

use std::path::PathBuf;

use lacuna_recipe::philox::{Draws, Tag};
use lacuna_tests::{Binaries, Cluster, Fixture, Seen, send_signal};
use rustix::process::Signal;

#[path = "../examples/blockwise.rs"]
#[allow(dead_code, reason = "only the masks are of interest here; the rest is the worker's")]
mod blockwise;

const STEPS: u64 = 60;

fn worker_of(example: &str) -> PathBuf {
    let worker = PathBuf::from(env!("CARGO_BIN_EXE_lacuna-worker"));
    worker.with_file_name("examples").join(example)
}

fn fixture(worker: PathBuf) -> Fixture {
    let lacuna = PathBuf::from(env!("CARGO_BIN_EXE_lacuna-worker")).with_file_name("lacuna");
    for file in [&lacuna, &worker] {
        assert!(file.is_file(), "{} is missing: `make test` builds it", file.display());
    }
    Fixture::new(Binaries { lacuna, worker }, 256, 8)
}

/// Trains with `n` workers to the end; the second one dies on the way where `kills`.
fn train(fixture: &Fixture, n: usize, kills: bool) -> Seen {
    let mut cluster = Cluster::start(fixture);
    let name = format!("with-{n}");
    let run = cluster.submit(&fixture.spec(&name, STEPS, &[("elastic.workers", "\"1:3\"")]));
    (0..n).for_each(|i| cluster.add(&format!("n{i}"), 1));
    if kills {
        cluster.wait(&run, "some steps", |seen| seen.step() >= 5 && seen.run.workers.len() == n);
        send_signal(cluster.pid("n1:cpu0"), Signal::KILL);
    }
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    seen
}

/// One, two and three workers agree, and it learns.
fn keeps_the_promise(example: &str) -> u64 {
    let fixture = fixture(worker_of(example));
    let alone = train(&fixture, 1, false);
    let (first, last) = (alone.figures[&1].loss, alone.figures[&STEPS].loss);
    assert!(last < 0.97 * first, "it learns: {first} to {last}");
    let want = alone.run.final_digest.expect("a finished run has a digest");
    assert_eq!(train(&fixture, 2, false).run.final_digest, Some(want));
    let killed = train(&fixture, 3, true);
    assert_eq!(killed.run.final_digest, Some(want), "{}", killed.text());
    assert_eq!(killed.count("lost"), 1, "{}", killed.text());
    encoder_is_exported(&fixture);
    want
}

/// What was learned leaves like any other encoder.
fn encoder_is_exported(fixture: &Fixture) {
    let args =
        ["ckpt", "export", "ckpt/with-1", "--layout", "timm", "--encoder-only", "--to", "out"];
    let output = fixture.run(&args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(fixture.path("out/timm.safetensors").is_file());
}

#[test]
fn block_wise_masks_and_simmim_give_the_same_bits_on_any_workers() {
    let blockwise = keeps_the_promise("blockwise");
    assert_ne!(blockwise, keeps_the_promise("simmim"));
}

/// A worker with another objective does not join a run, which goes on without it.
#[test]
fn objectives_are_not_mixed() {
    let fixture = fixture(worker_of("blockwise"));
    let mut cluster = Cluster::start(&fixture);
    let run = cluster.submit(&fixture.spec("mixed", STEPS, &[("elastic.workers", "\"1:3\"")]));
    cluster.add("ours", 1);
    cluster.wait(&run, "some steps", |seen| seen.step() >= 2);
    cluster.add_other(env!("CARGO_BIN_EXE_lacuna-worker").as_ref(), "theirs", 1, &[], &[]);
    let refused = |seen: &Seen| seen.events.iter().any(|e| e.text.contains("the probe of theirs"));
    cluster.wait(&run, "the other worker to be refused", refused);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    assert_eq!(seen.count("lost"), 0, "{}", seen.text());
}

#[test]
fn block_wise_masks_remove_as_many_patches_as_asked_and_neighbours() {
    let (grid, n_removed) = ([14, 14], 147);
    let mut neighbours = 0;
    for sample in 0..200 {
        let draws = Draws::new(1, Tag::User, 0, sample);
        let order = blockwise::block_order(&draws, grid, n_removed);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..196).collect::<Vec<u32>>(), "each patch once");
        let removed = &order[196 - n_removed..];
        let right = |p: &&u32| **p % 14 < 13 && removed.contains(&(**p + 1));
        neighbours += removed.iter().filter(right).count();
    }
    // Of 147 of 196 patches at random, 102 have a removed one to their right.
    assert!(neighbours > 200 * 115, "{}", neighbours / 200);
}
