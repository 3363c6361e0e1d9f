//! Checkpoints whose bytes change behind the run's back.

use std::fs;

use lacuna_checkpoint::catalog::{self, Entry};
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::manifest::Manifest;
use lacuna_tests::{Cluster, Fixture, said};
use lacuna_types::Step;

use crate::faults::{finished_with, undisturbed};
use crate::fixture;

const STEPS: u64 = 120;

fn newest(fixture: &Fixture, run: &str) -> Manifest {
    let dir = RunDir::new(fixture.path("ckpt"), run.parse().unwrap());
    let entries = catalog::list(&dir).unwrap();
    entries.iter().rev().find_map(Entry::good).expect("there is a checkpoint").clone()
}

/// Changes one bit in the middle of a part of the run's newest checkpoint; returns its step.
fn flip_newest(fixture: &Fixture, run: &str) -> u64 {
    let manifest = newest(fixture, run);
    let dir = RunDir::new(fixture.path("ckpt"), run.parse().unwrap());
    let folder = dir.attempt(manifest.step(), manifest.attempt);
    let path = folder.join(&manifest.files[0].name);
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(&path, bytes).unwrap();
    manifest.step
}

/// All workers are gone and the newest checkpoint is not what was saved: it is set aside, the run
/// goes back to the one before, and the steps in between give the same bits again.
#[test]
fn a_flipped_bit_at_rest_costs_steps_and_no_bit() {
    let fixture = fixture();
    let want = undisturbed(&fixture, STEPS);
    let mut cluster = Cluster::start(&fixture);
    let keys = [
        ("elastic.workers", "\"2:2\""),
        ("checkpoint.every", "[\"10step\"]"),
        ("checkpoint.when_busy", "\"wait\""),
    ];
    let spec = fixture.spec("flipped", STEPS, &keys);
    let run = cluster.submit(&spec);
    cluster.add("a", 2);
    cluster.wait(&run, "two checkpoints", |seen| seen.count("saved") >= 2);
    cluster.take("a").signal(rustix::process::Signal::KILL);
    cluster.wait(&run, "the group to be over", |seen| seen.count("lost") >= 1);
    let step = flip_newest(&fixture, &run);
    cluster.add("b", 2);
    let seen = cluster.wait_end(&run);
    finished_with(&seen, want);
    let aside = seen.events.iter().find(|e| e.kind == "set-aside").expect("people are told");
    let names = format!("the checkpoint of step {step} is damaged and set aside: ");
    assert!(aside.text.starts_with(&names), "{}", aside.text);
    assert!(aside.text.contains("part-00000-of-00002.safetensors is damaged: bytes "));
    assert!(aside.text.contains("(affects "), "{}", aside.text);
    assert_eq!(seen.count("unfit"), 0, "no worker is to blame: {}", seen.text());
    drop(cluster);
    let folder = format!("ckpt/{run}");
    let (code, out, err) = said(&fixture.run(&["ckpt", "verify", &folder]));
    assert_eq!(code, 0, "the newest is sound: {out}{err}");
    let (_, out, _) = said(&fixture.run(&["ckpt", "ls", &folder]));
    let damaged = out.lines().filter(|line| line.contains("damaged"));
    let aside = format!("damaged: set aside: checkpoint step {step}: ");
    assert!(damaged.into_iter().all(|line| line.contains(&aside)), "{out}");
    a_manifest_is_made_again(&fixture, &run);
}

/// A run that wants it has its checkpoints read back while it trains.
#[test]
fn checkpoints_are_read_back_where_a_run_wants_it() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let keys = [("checkpoint.every", "[\"10step\"]"), ("checkpoint.read_back", "true")];
    let run = cluster.submit(&fixture.spec("read", STEPS, &keys));
    cluster.add("a", 1);
    cluster.wait_end(&run);
    let is_verified =
        |line: &str| line.contains(&format!(" {STEPS} ")) && line.contains("verified");
    let verified = cluster.wait(&run, "the last one to be read back", |seen| {
        let of_last = format!("checkpoint step {STEPS} was read back and is sound");
        seen.events.iter().any(|event| event.text == of_last)
    });
    assert_eq!(verified.count("set-aside"), 0);
    let (code, out, err) = said(&fixture.run(&["ckpt", "ls", &format!("ckpt/{run}")]));
    assert!(code == 0 && out.lines().any(is_verified), "{out}{err}");
}

/// What the coordinator wrote down of the run is enough to make a lost manifest again.
fn a_manifest_is_made_again(fixture: &Fixture, run: &str) {
    let before = newest(fixture, run);
    let dir = RunDir::new(fixture.path("ckpt"), run.parse().unwrap());
    fs::remove_file(dir.manifest(before.step())).unwrap();
    let folder = format!("ckpt/{run}");
    let step = before.step.to_string();
    let args = ["ckpt", "rebuild-manifest", &folder, "--step", &step];
    let (code, out, err) = said(&fixture.run(&args));
    assert_eq!(code, 0, "{out}{err}");
    let after = newest(fixture, run);
    assert_eq!((after.step, after.state_digest), (before.step, before.state_digest));
    assert_eq!((&after.files, &after.tensors), (&before.files, &before.tensors));
    assert_eq!(after.state.facts.spec_digest, before.state.facts.spec_digest);
    assert_eq!(after.state.facts.samples, before.state.facts.samples);
}

/// Without another checkpoint the run fails and says so, rather than begin again unasked.
#[test]
fn the_only_checkpoint_is_not_replaced_by_the_seed_unasked() {
    let fixture = fixture();
    let want = undisturbed(&fixture, STEPS);
    let mut cluster = Cluster::start(&fixture);
    let keys = [("elastic.workers", "\"1:1\""), ("checkpoint.every", "[\"60step\"]")];
    let run = cluster.submit(&fixture.spec("single", STEPS, &keys));
    cluster.add("a", 1);
    cluster.wait(&run, "a checkpoint", |seen| seen.run.checkpoint_step >= Some(60));
    cluster.take("a").signal(rustix::process::Signal::KILL);
    cluster.wait(&run, "the group to be over", |seen| seen.count("lost") >= 1);
    let step = flip_newest(&fixture, &run);
    assert!(step < STEPS, "the second one is that of the end");
    cluster.add("b", 1);
    let seen = cluster.wait_end(&run);
    assert_eq!((seen.run.state.as_str(), seen.run.exit_code), ("failed", Some(74)));
    assert!(seen.run.why.contains("there is no other to go back to"), "{}", seen.run.why);
    let dir = RunDir::new(fixture.path("ckpt"), run.parse().unwrap());
    fs::remove_dir_all(dir.step(Step(step))).unwrap();
    cluster.submit(&fixture.path("single.toml"));
    cluster.add("c", 1);
    let seen = cluster.wait_end(&run);
    finished_with(&seen, want);
}
