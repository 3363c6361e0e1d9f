//! Runs that learn classes, on real processes: the claim of every other run holds for them, and
//! what they learned is there to be judged.
//!
//! Needs the `lacuna` binary beside `lacuna-worker`; `make test` builds both.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use lacuna_data::Dataset;
use lacuna_data::synthetic::N_CLASSES;
use lacuna_mae::classify::EncoderWeights;
use lacuna_recipe::model::ModelConfig;
use lacuna_tests::{Binaries, Cluster, Fixture, Seen, said, send_signal};
use lacuna_types::SampleId;
use rustix::process::Signal;
use tch::Tensor;

const STEPS: u64 = 120;

fn fixture() -> Fixture {
    let worker = PathBuf::from(env!("CARGO_BIN_EXE_lacuna-worker"));
    let lacuna = worker.with_file_name("lacuna");
    assert!(lacuna.is_file(), "{} is missing: `make build` makes it", lacuna.display());
    Fixture::new(Binaries { lacuna, worker }, 256, 8)
}

/// Prepares `lacuna-worker` in the fixture's folder.
fn worker(fixture: &Fixture, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna-worker"));
    command.args(words).current_dir(fixture.dir.path());
    command.envs(lacuna_mae::runtime::CPU_ENV.iter().copied());
    command
}

/// Runs it to its end; returns the exit code, stdout and stderr.
fn run_worker(fixture: &Fixture, words: &[&str]) -> (i32, String, String) {
    said(&worker(fixture, words).output().expect("it starts"))
}

/// Asks for features of the fixture's images, in `tuned.npy`.
fn features_of(fixture: &Fixture, source: &str, more: &[&str]) -> (i32, String, String) {
    let words = ["features", source, "--data", "data", "--out", "tuned.npy", "--force"];
    run_worker(fixture, &[&words, more].concat())
}

/// Returns the bytes of that file.
fn features(fixture: &Fixture, source: &str, more: &[&str]) -> Vec<u8> {
    let (code, out, err) = features_of(fixture, source, more);
    assert_eq!(code, 0, "{source}: {out}{err}");
    std::fs::read(fixture.path("tuned.npy")).expect("features")
}

/// Pre-trains a little, under the name `pre`.
fn pretrain(fixture: &Fixture) {
    let mut cluster = Cluster::start(fixture);
    let run = cluster.submit(&fixture.spec("pre", 60, &[("elastic.workers", "\"1:1\"")]));
    cluster.add("a", 1);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
}

/// Keys of a task, and of an optimizer that learns something in a few steps.
fn keys(kind: &str, workers: &str) -> Vec<(&'static str, String)> {
    let mut keys = vec![
        ("task.kind", format!("\"{kind}\"")),
        ("task.encoder", "\"ckpt/pre\"".to_string()),
        ("task.classes", N_CLASSES.to_string()),
        ("elastic.workers", format!("\"{workers}\"")),
        ("checkpoint.keep.last", "9".to_string()),
    ];
    if kind == "finetune" {
        keys.push(("optim.base_lr", "0.05".to_string()));
    } else {
        keys.push(("task.optimizer", "\"sgd\"".to_string()));
        keys.push(("optim.base_lr", "0.5".to_string()));
    }
    keys
}

fn train(
    fixture: &Fixture,
    name: &str,
    kind: &str,
    workers: &str,
    disturb: impl FnOnce(&mut Cluster<'_>, &str),
) -> Seen {
    run(fixture, name, &keys(kind, workers), disturb)
}

fn run(
    fixture: &Fixture,
    name: &str,
    keys: &[(&'static str, String)],
    disturb: impl FnOnce(&mut Cluster<'_>, &str),
) -> Seen {
    let keys: Vec<(&str, &str)> = keys.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let mut cluster = Cluster::start(fixture);
    let run = cluster.submit(&fixture.spec(name, STEPS, &keys));
    disturb(&mut cluster, &run);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    seen
}

#[test]
fn tasks_have_the_same_bits_for_any_workers_and_over_a_kill() {
    let fixture = fixture();
    pretrain(&fixture);
    for kind in ["finetune", "linear"] {
        let alone =
            train(&fixture, &format!("{kind}-1"), kind, "1:1", |cluster, _| cluster.add("a", 1));
        let want = alone.run.final_digest.expect("a finished run has a digest");
        let spec: serde_json::Value = serde_json::from_str(&alone.run.spec).expect("JSON");
        let encoder = spec["task"]["encoder"].as_str().expect("a place");
        assert!(encoder.ends_with("ckpt/pre@60"), "pinned to what was newest: {encoder}");
        let mut fresh = keys(kind, "1:1");
        fresh.retain(|(key, _)| *key != "task.encoder");
        let fresh =
            run(&fixture, &format!("{kind}-fresh"), &fresh, |cluster, _| cluster.add("a", 1));
        assert_ne!(fresh.run.final_digest, Some(want), "{kind}: its encoder takes part");
        let (first, last) = (&alone.figures[&1], &alone.figures[&STEPS]);
        assert!(last.loss < first.loss, "{kind} learns: {} to {}", first.loss, last.loss);
        let seen = train(&fixture, &format!("{kind}-killed"), kind, "1:2", |cluster, run| {
            cluster.add("a", 2);
            let at = 5 + u64::from(std::process::id()) % 15;
            cluster.wait(run, "some steps", |seen| {
                seen.step() >= at
                    && seen.run.workers.iter().filter(|w| w.rank.is_some()).count() == 2
            });
            send_signal(cluster.pid("a:cpu1"), Signal::KILL);
        });
        assert_eq!(seen.run.final_digest, Some(want), "{kind}: {}", seen.text());
        assert_eq!(seen.count("lost"), 1, "{kind}: {}", seen.text());
    }
    let (code, held, _) = said(&fixture.run(&["ckpt", "hold", "ckpt/pre"]));
    assert!(code == 0 && held.contains("step 60 is held by encoder-of-linear-1"), "{held}");
    exported(&fixture);
    weights_say_what_they_are(&fixture);
    weights_stay_what_they_were(&fixture);
    judged(&fixture, "linear-1");
    what_cannot_be_read_is_in_no_statistics(&fixture);
    other_data_is_no_training_set(&fixture);
    // What was fine-tuned stands for itself.
    std::fs::rename(fixture.path("ckpt/pre"), fixture.path("elsewhere")).expect("a move");
    judged(&fixture, "finetune-1");
}

/// An encoder in a file is refused where the file says that it is another one.
fn weights_say_what_they_are(fixture: &Fixture) {
    let to = fixture.path("weights");
    let to = to.to_str().expect("a plain path");
    let export = ["ckpt", "export", "ckpt/pre", "--layout", "timm", "--to", to];
    let (code, _, err) = said(&fixture.run(&export));
    assert_eq!(code, 0, "{err}");
    let file = format!("{to}/timm.safetensors");
    let micro = ModelConfig::preset("micro").expect("a preset");
    let (mean, std) = ([0.5; 3], [0.25; 3]);
    EncoderWeights::read(&file, &micro, (&mean, &std), true).expect("it fits");
    let other = ModelConfig { heads: 4, ..micro.clone() };
    let error = EncoderWeights::read(&file, &other, (&mean, &std), true).unwrap_err().to_string();
    assert!(error.contains("`model.heads` is 2 there and 4 here"), "{error}");
    let error =
        EncoderWeights::read(&file, &micro, (&[0.4; 3], &std), true).unwrap_err().to_string();
    assert!(error.contains("it has seen images with `data.mean` [0.5, 0.5, 0.5]"), "{error}");
}

/// Statistics of a part of the images would be kept and be wrong for ever.
fn what_cannot_be_read_is_in_no_statistics(fixture: &Fixture) {
    let (from, to) = (fixture.path("data"), fixture.path("rotten"));
    std::fs::create_dir(&to).expect("a folder");
    for entry in std::fs::read_dir(&from).expect("the data").flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy");
    }
    let place = Dataset::open(&to).expect("the copy").place(SampleId(5));
    let mut bytes = std::fs::read(&place.shard).expect("a shard");
    bytes[place.offset as usize + 20] ^= 1;
    std::fs::write(&place.shard, bytes).expect("a damaged shard");
    let kept = fixture.path("ckpt/linear-1/probe-statistics.json");
    let before = std::fs::read(&kept).expect("it was judged before");
    std::fs::remove_file(&kept).expect("it goes");
    let words = ["eval", "classify", "ckpt/linear-1", "--val", "data", "--out", "rotten.json"];
    let (code, _, err) = run_worker(fixture, &[&words[..], &["--train", "rotten"]].concat());
    assert!(code == 74 && err.contains("sample 5 (") && err.contains("is corrupt"), "{code} {err}");
    assert!(!kept.exists(), "what was not computed is not kept");
    std::fs::write(&kept, before).expect("as it was");
}

/// A probe's statistics are those of what it learned from, wherever that lies now.
fn other_data_is_no_training_set(fixture: &Fixture) {
    let judge = |more: &[&str]| {
        let words = ["eval", "classify", "ckpt/linear-1", "--val", "moved", "--out", "moved.json"];
        let (code, out, err) = run_worker(fixture, &[&words, more].concat());
        (code, out + &err)
    };
    let make = ["data", "synthetic", "data", "--n", "64", "--size", "8x8", "--seed", "9"];
    std::fs::rename(fixture.path("data"), fixture.path("moved")).expect("a move");
    let kept = fixture.path("ckpt/linear-1/probe-statistics.json");
    std::fs::remove_file(&kept).expect("it was judged before");
    let (code, text) = judge(&[]);
    assert!(code == 74 && text.contains("--train says"), "{code} {text}");
    let (code, _, err) = said(&fixture.run(&make));
    assert_eq!(code, 0, "{err}");
    let (code, text) = judge(&[]);
    assert!(code == 74 && text.contains("and the run learned from"), "{code} {text}");
    let (code, text) = judge(&["--train", "moved", "--page", "nowhere/page.html"]);
    assert!(code == 74 && !text.contains("top-1"), "told before it computes: {text}");
    let (code, text) = judge(&["--train", "moved", "--tensorboard", "ckpt/linear-1"]);
    assert!(code == 2 && text.contains("a run's own folder"), "{code} {text}");
    let (code, text) = judge(&["--train", "moved"]);
    assert_eq!(code, 0, "{text}");
    // From then on they are kept, and the training set is not needed; another view has others.
    let report = || std::fs::read(fixture.path("moved.json")).expect("a report");
    let with_data = report();
    let (code, text) = judge(&[]);
    assert!(code == 0 && report() == with_data, "{text}");
    let (code, text) = judge(&["--crop-pct", "0.875"]);
    assert!(code == 74 && text.contains("and the run learned from"), "{code} {text}");
    std::fs::remove_dir_all(fixture.path("data")).expect("the other data goes");
    std::fs::rename(fixture.path("moved"), fixture.path("data")).expect("a move back");
}

/// A run is pinned to the content of the weights that it was created with, and nothing takes others
/// for them; a probe of exported weights is that of the checkpoint.
fn weights_stay_what_they_were(fixture: &Fixture) {
    let mut keys = keys("linear", "1:1");
    keys.retain(|(key, _)| *key != "task.encoder");
    keys.push(("task.encoder", "\"weights/timm.safetensors\"".to_string()));
    let seen = run(fixture, "linear-file", &keys, |cluster, _| cluster.add("a", 1));
    let spec: serde_json::Value = serde_json::from_str(&seen.run.spec).expect("JSON");
    let encoder = spec["task"]["encoder"].as_str().expect("a place");
    assert!(encoder.contains("timm.safetensors@blake3:"), "{encoder}");
    judged(fixture, "linear-file");

    let file = fixture.path("weights/timm.safetensors");
    let mut bytes = std::fs::read(&file).expect("weights");
    *bytes.last_mut().expect("a byte") ^= 1;
    std::fs::write(&file, bytes).expect("other weights");
    let words = ["eval", "classify", "ckpt/linear-file", "--val", "data", "--out", "other.json"];
    let (code, _, err) = run_worker(fixture, &words);
    assert!(code == 74 && err.contains("other weights lie in its place"), "{code} {err}");
    // A pin that somebody wrote by hand is looked at when the run is created.
    for (encoder, why) in [
        (format!("weights/timm.safetensors@blake3:{:064}", 0), "other weights lie in its place"),
        ("weights/timm.safetensors@5".to_string(), "it is weights, which have no steps"),
        ("ckpt/pre@7".to_string(), "the run has no usable checkpoint of that step"),
    ] {
        keys.retain(|(key, _)| *key != "task.encoder");
        keys.push(("task.encoder", format!("\"{encoder}\"")));
        let keys: Vec<(&str, &str)> = keys.iter().map(|(k, value)| (*k, value.as_str())).collect();
        let spec = fixture.spec("by-hand", STEPS, &keys);
        let (code, _, err) = said(&fixture.run(&["train", spec.to_str().expect("UTF-8")]));
        assert!(code != 0 && err.contains(why), "{encoder}: {code} {err}");
    }
}

/// A fine-tuned model goes to timm, a probe and other layouts are refused.
fn exported(fixture: &Fixture) {
    let export = |run: &str, layout: &str| {
        let folder = format!("ckpt/{run}");
        let to = format!("export-{run}-{layout}");
        said(&fixture.run(&["ckpt", "export", &folder, "--layout", layout, "--to", &to]))
    };
    let (code, out, err) = export("finetune-1", "timm");
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("does not name 4 classes: the file will not either"), "{err}");
    assert!(out.contains("num_classes=4, global_pool=\"avg\""), "{out}");
    let file = std::fs::read(fixture.path("export-finetune-1-timm/timm.safetensors")).expect("it");
    let head = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    let head: serde_json::Value = serde_json::from_slice(&file[8..8 + head]).expect("JSON");
    let names: Vec<&String> = head.as_object().expect("an object").keys().collect();
    for name in
        ["head.weight", "head.bias", "fc_norm.weight", "pos_embed", "blocks.1.attn.qkv.weight"]
    {
        assert!(names.iter().any(|known| *known == name), "{name}: {names:?}");
    }
    assert!(!names.iter().any(|name| name.starts_with("norm.") || name.contains("decoder")));
    // Features of the run and of its export are the same.
    let (code, _, err) = features_of(fixture, "ckpt/linear-1", &[]);
    assert!(code == 2 && err.contains("the encoder of another one"), "{code} {err}");
    let weights = "export-finetune-1-timm/timm.safetensors";
    let (code, _, err) = features_of(fixture, weights, &["--pool", "cls"]);
    assert!(code == 2 && err.contains("take --pool mean"), "{code} {err}");
    let of_run = features(fixture, "ckpt/finetune-1", &[]);
    assert!(of_run == features(fixture, weights, &[]), "of the run and of its export");
    the_head_makes_logits_of_the_features(fixture, weights);
    // Its norm is for the mean of the patches: what reads tokens behind it would read nothing.
    let (place, micro) = (fixture.path(weights), ModelConfig::preset("micro").expect("a preset"));
    let place = place.to_str().expect("a plain path");
    let encoder = |reads_tokens: bool| {
        EncoderWeights::read(place, &micro, (&[0.5; 3], &[0.25; 3]), reads_tokens)
    };
    let error = encoder(true).unwrap_err().to_string();
    assert!(error.contains("its last norm is `fc_norm`"), "{error}");
    encoder(false).expect("fine-tuned again it begins anew");
    let (code, _, err) = export("finetune-1", "hf");
    assert!(code == 2 && err.contains("the layout `timm` only"), "{err}");
    let (code, _, err) = export("linear-1", "timm");
    assert!(code == 2 && err.contains("linear probe"), "{err}");
}

/// The default features of a fine-tuned encoder are what its head reads.
fn the_head_makes_logits_of_the_features(fixture: &Fixture, weights: &str) {
    let words = ["predict", "ckpt/finetune-1", "--data", "data", "--out", "logits.npy"];
    let (code, _, err) = run_worker(fixture, &words);
    assert_eq!(code, 0, "{err}");
    let read = |name: &str| Tensor::read_npy(fixture.path(name)).expect("an array");
    let tensors = Tensor::read_safetensors(fixture.path(weights)).expect("weights");
    let head = |name: &str| {
        let found = tensors.iter().find(|(known, _)| known == name);
        found.map(|(_, tensor)| tensor.shallow_clone()).expect("a head")
    };
    let (features, logits) = (read("tuned.npy"), read("logits.npy"));
    let got = features.linear(&head("head.weight"), Some(head("head.bias")));
    let off = (got - &logits).abs().max().double_value(&[]);
    assert!(off < 1e-5, "off by {off:e}");
    assert!(logits.std(true).double_value(&[]) > 1e-3, "they say something");
}

/// Holds the numbers of a report against its confusion matrix: rows are true classes.
fn agrees_with_itself(result: &serde_json::Value) {
    let list = |value: &serde_json::Value| value.as_array().expect("a list").clone();
    let number = |value: &serde_json::Value| value.as_f64().expect("a number");
    let confusion: Vec<Vec<f64>> = list(&result["confusion"])
        .iter()
        .map(|row| list(row).iter().map(number).collect())
        .collect();
    assert_eq!(confusion.len(), N_CLASSES as usize);
    let all: f64 = confusion.iter().flatten().sum();
    let right: f64 = (0..confusion.len()).map(|class| confusion[class][class]).sum();
    let share = |key: &str| number(&result[key]);
    assert!((share("top1") - right / all).abs() < 1e-9, "{result}");
    assert!(share("top5") >= share("top1"), "{result}");
    for of in list(&result["per_class"]) {
        let row = &confusion[of["class"].as_u64().expect("a class") as usize];
        let n: f64 = row.iter().sum();
        let right = row[of["class"].as_u64().expect("a class") as usize];
        assert_eq!((number(&of["samples"]), number(&of["top1"])), (n, right / n), "{result}");
    }
}

/// Finds the first of the best results: its step and its share of right predictions.
fn best_of(results: &[serde_json::Value]) -> (u64, f64) {
    let mut best = (0, -1.0);
    for result in results {
        let top1 = result["top1"].as_f64().expect("a share");
        if top1 > best.1 {
            best = (result["step"].as_u64().expect("a step"), top1);
        }
    }
    best
}

/// Classifies with what a run learned: better than guessing, and the report says so.
fn judged(fixture: &Fixture, run: &str) {
    let folder = format!("ckpt/{run}");
    let out = fixture.path(&format!("{run}.json"));
    let mut command = worker(fixture, &["eval", "classify", &folder, "--val", "data", "--all"]);
    command.arg("--out").arg(&out).arg("--page").arg(out.with_extension("html"));
    let (code, text, err) = said(&command.output().expect("it starts"));
    assert_eq!(code, 0, "{text}{err}");
    assert_eq!(err.matches("how well it remembers them").count(), 1, "{err}");
    let page = std::fs::read_to_string(out.with_extension("html")).expect("a page");
    assert!(page.contains("What was taken for what") && !page.contains("http"), "{page}");
    assert!(page.contains("data:image/png;base64,"), "mistakes are shown: {page}");
    let report: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(out).expect("a report")).expect("JSON");
    let results = report["results"].as_array().expect("results");
    assert_eq!(results.last().expect("one")["step"], STEPS);
    assert!(results.len() >= 3, "every checkpoint: {text}");
    assert_eq!(report["val"]["fingerprint"], results[0]["train_fingerprint"], "one data set");
    for result in results {
        agrees_with_itself(result);
    }
    let states: std::collections::BTreeSet<_> =
        results.iter().map(|one| one["state_digest"].as_str().expect("a digest")).collect();
    assert_eq!(states.len(), results.len(), "each is another state");
    let (step, best) = best_of(results);
    assert_eq!(report["best_step"], step, "{report}");
    assert!(
        best > 1.2 / f64::from(N_CLASSES),
        "{run}: {best} of guessing's {}",
        1.0 / f64::from(N_CLASSES)
    );
}

/// Validation beside a run: each checkpoint as it comes, and the last one ends it.
#[test]
fn a_run_is_judged_while_it_trains() {
    let fixture = fixture();
    pretrain(&fixture);
    let mut judge = None;
    run(&fixture, "followed", &keys("finetune", "1:1"), |cluster, run| {
        cluster.add("a", 1);
        cluster.wait(run, "a checkpoint", |seen| seen.run.checkpoint_step.is_some());
        let mut command = worker(&fixture, &["eval", "classify", "ckpt/followed", "--val", "data"]);
        command
            .args(["--out", "followed.json", "--follow", "--patience", "2min"])
            .args(["--tensorboard", "tb", "--hold-best"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        judge = Some(command.spawn().expect("it starts"));
    });
    let output = judge.expect("it was started").wait_with_output().expect("it ends");
    let (code, out, err) = said(&output);
    assert_eq!(code, 0, "{out}{err}");
    let text = std::fs::read_to_string(fixture.path("followed.json")).expect("a report");
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let results = report["results"].as_array().expect("results");
    let steps: Vec<u64> = results.iter().map(|r| r["step"].as_u64().expect("a step")).collect();
    assert!(steps.is_sorted() && steps.len() >= 2 && steps.last() == Some(&STEPS), "{steps:?}");
    let held = format!("step {} is held by best", best_of(results).0);
    assert!(out.contains(&held), "{held} in {out}");
    assert!(std::fs::read_dir(fixture.path("tb")).expect("a folder").count() >= 1);
    // Alone it has nothing to choose from.
    let words = ["eval", "classify", "ckpt/followed", "--val", "data", "--out", "x.json"];
    let (code, _, err) = run_worker(&fixture, &[&words[..], &["--hold-best"]].concat());
    assert!(code == 2 && err.contains("--all or --follow"), "{err}");
}

/// An average of the weights is part of the state: equal digests over a kill, and it is judged and
/// exported by itself.
#[test]
fn an_average_of_the_weights_is_kept_over_a_kill() {
    let fixture = fixture();
    pretrain(&fixture);
    let with_average = |workers: &str| {
        let mut keys = keys("finetune", workers);
        keys.push(("task.ema", "0.9".to_string()));
        keys
    };
    let alone = run(&fixture, "kept-1", &with_average("1:1"), |cluster, _| cluster.add("a", 1));
    let seen = run(&fixture, "kept-2", &with_average("1:2"), |cluster, run| {
        cluster.add("a", 2);
        cluster.wait(run, "a checkpoint", |seen| {
            seen.run.checkpoint_step.is_some()
                && seen.run.workers.iter().filter(|w| w.rank.is_some()).count() == 2
        });
        // All of them: nobody has the state in memory any more.
        let pids = ["a:cpu0", "a:cpu1"].map(|worker| cluster.pid(worker));
        pids.into_iter().for_each(|pid| send_signal(pid, Signal::KILL));
    });
    assert_eq!(seen.run.final_digest, alone.run.final_digest, "{}", seen.text());
    assert!(seen.text().contains("from the newest checkpoint"), "{}", seen.text());
    let judge = |run: &str, more: &[&str]| {
        let run = format!("ckpt/{run}");
        let words = ["eval", "classify", &run, "--val", "data", "--out", "judged.json"];
        let (code, text, err) = run_worker(&fixture, &[&words, more].concat());
        let report = std::fs::read_to_string(fixture.path("judged.json"));
        (code, text + &err, report.unwrap_or_default())
    };
    let (code, text, last) = judge("kept-1", &[]);
    assert_eq!(code, 0, "{text}");
    let more = ["--ema", "--all", "--hold-best", "--tensorboard", "tb"];
    let (code, text, average) = judge("kept-1", &more);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("is held by best-ema"), "{text}");
    let (code, held, _) = said(&fixture.run(&["ckpt", "hold", "ckpt/kept-1"]));
    assert!(code == 0 && held.contains("is held by best-ema: top-1"), "{held}");
    // Again: the pin moves, and TensorBoard's folder has another file.
    let (code, text, _) = judge("kept-1", &more);
    assert_eq!(code, 0, "{text}");
    let boards = std::fs::read_dir(fixture.path("tb")).expect("a folder");
    assert_eq!(boards.count(), 2, "{text}");
    assert!(last.contains("\"weights\":\"last\"") && average.contains("\"weights\":\"ema\""));
    let export = |name: &str, more: &[&str]| {
        let to = format!("{name}.safetensors");
        let words = [&["ckpt", "export", "ckpt/kept-1", "--layout", "timm", "--to", &to], more];
        let (code, out, err) = said(&fixture.run(&words.concat()));
        assert_eq!(code, 0, "{out}{err}");
        std::fs::read(fixture.path(&to)).expect("the file")
    };
    let (last, average) = (export("last", &[]), export("average", &["--ema"]));
    assert_eq!(last.len(), average.len(), "the same tensors");
    assert_ne!(last, average);
    // So have features.
    let average = features(&fixture, "ckpt/kept-1", &["--ema"]);
    let of_export = features(&fixture, "average.safetensors", &[]);
    assert!(average == of_export, "of the run and of its export");
    assert!(average != features(&fixture, "ckpt/kept-1", &[]), "of the average");
    let plain = run(&fixture, "plain", &keys("finetune", "1:1"), |cluster, _| cluster.add("a", 1));
    assert_eq!(plain.figures[&STEPS].loss, alone.figures[&STEPS].loss, "it changes no step");
    let (code, text, _) = judge("plain", &["--ema"]);
    assert!(code == 2 && text.contains("task.ema"), "{text}");
}

/// A run goes on with the encoder that it began with, whatever its encoder's run saved since: under
/// a coordinator that starts again, and under one that never heard of it.
#[test]
fn a_task_goes_on_with_its_encoder() {
    let fixture = fixture();
    pretrain(&fixture);
    let newest = fixture.path("ckpt/pre/ckpt/step-000000060");
    let later = fixture.path("later");
    std::fs::rename(&newest, &later).expect("not there yet");
    let keys = keys("linear", "1:1");
    let keys: Vec<(&str, &str)> = keys.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let spec = fixture.spec("on", 100_000, &keys);
    let go_on = |from: u64| {
        let mut cluster = Cluster::start(&fixture);
        let run = cluster.submit(&spec);
        cluster.add("a", 1);
        let seen = cluster.wait(&run, "another checkpoint", |seen| {
            seen.step() > from && seen.run.checkpoint_step.is_some_and(|step| step > from)
        });
        let spec: serde_json::Value = serde_json::from_str(&seen.run.spec).expect("JSON");
        let encoder = spec["task"]["encoder"].as_str().expect("a place");
        assert!(encoder.contains("ckpt/pre@") && !encoder.ends_with("@60"), "{encoder}");
        assert!(from == 0 || seen.text().contains("from the newest checkpoint"), "{}", seen.text());
        (seen.run.checkpoint_step.expect("it was awaited"), encoder.to_string())
    };
    let (first, encoder) = go_on(0);
    std::fs::rename(&later, &newest).expect("there now");
    let (second, again) = go_on(first);
    std::fs::remove_dir_all(fixture.path("state")).expect("forgotten");
    let (_, anew) = go_on(second);
    assert_eq!([again, anew], [encoder.clone(), encoder]);
}

/// An encoder of 8 x 8 pixels goes on with 12 x 12: more patches, and a table for them.
#[test]
fn fine_tuning_shows_images_of_another_size() {
    let fixture = fixture();
    pretrain(&fixture);
    let mut larger = keys("finetune", "1:1");
    larger.push(("model.img_size", "[12, 12]".to_string()));
    let seen = run(&fixture, "larger", &larger, |cluster, _| cluster.add("a", 1));
    let (first, last) = (&seen.figures[&1], &seen.figures[&STEPS]);
    assert!(last.loss < first.loss, "it learns: {} to {}", first.loss, last.loss);
    let mut other = keys("finetune", "1:1");
    other.push(("model.patch_size", "4".to_string()));
    let other: Vec<(&str, &str)> =
        other.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let spec = fixture.spec("patches", STEPS, &other);
    let (code, out, err) = said(&fixture.run(&["train", spec.to_str().expect("UTF-8")]));
    let told = out + &err;
    assert!(code != 0 && told.contains("`model.patch_size` is 2 there and 4 here"), "{told}");
}

#[test]
fn a_task_that_cannot_start_says_why() {
    let fixture = fixture();
    let try_with = |name: &str, extra: &[(&str, &str)]| {
        let mut keys = vec![
            ("task.kind", "\"linear\""),
            ("task.classes", "10"),
            ("elastic.workers", "\"1:1\""),
            ("optim.warmup", "\"1step\""),
        ];
        keys.extend(extra);
        let spec = fixture.spec(name, 4, &keys);
        let spec = spec.to_str().expect("a path in UTF-8");
        said(&fixture.run(&["train", spec, "--workers", "1"]))
    };
    let (code, out, err) = try_with("nowhere", &[("task.encoder", "\"ckpt/nobody\"")]);
    assert!(code != 0 && (out + &err).contains("ckpt/nobody"), "{err}");
    let (code, out, err) = try_with("few", &[("task.classes", "2")]);
    assert!(code != 0 && (out + &err).contains("`task.classes` = 2"), "{err}");
}
