//! The claim on real processes with the torch engine: the same bits, whoever computed what.
//!
//! Needs the `lacuna` binary beside `lacuna-worker`; `make test` builds both.

use std::path::PathBuf;

use lacuna_tests::{Binaries, Cluster, Fixture, Seen, send_signal};
use rustix::process::Signal;

const STEPS: u64 = 250;

fn fixture() -> Fixture {
    let worker = PathBuf::from(env!("CARGO_BIN_EXE_lacuna-worker"));
    let lacuna = worker.with_file_name("lacuna");
    assert!(lacuna.is_file(), "{} is missing: `make build` makes it", lacuna.display());
    Fixture::new(Binaries { lacuna, worker }, 256, 8)
}

/// Loss of every tenth step of the run with one worker, keyed by the probe class that gave it.
const GOLDEN: &str = "../../tests/golden/loss_cpu.txt";

/// Compares with the committed curve: bit for bit on machines of its probe class, else to 1e-5.
/// `UPDATE_GOLDEN=1` writes it anew; a commit that does must say why the numbers moved.
fn compare_with_golden(fixture: &Fixture, run: &str, seen: &Seen) {
    let losses: Vec<(u64, f64)> =
        (10..=STEPS).step_by(10).map(|step| (step, seen.figures[&step].loss)).collect();
    let class = fixture.probe_class(run);
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(GOLDEN);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        let lines: Vec<String> = losses.iter().map(|(s, l)| format!("{s} {l:?}")).collect();
        std::fs::write(&path, format!("{class}\n{}\n", lines.join("\n"))).expect("it is written");
    }
    let text = std::fs::read_to_string(&path).expect("the golden curve is there");
    let (golden_class, lines) = text.split_once('\n').expect("a class, then losses");
    let same = golden_class == class;
    if !same {
        println!(
            "golden losses are of probe class {golden_class}, this machine's is {class}: 1e-5"
        );
    }
    assert_eq!(lines.lines().count(), losses.len(), "one line per tenth step");
    for (line, (step, loss)) in lines.lines().zip(losses) {
        let (golden_step, golden) = line.split_once(' ').expect("step and loss");
        let golden: f64 = golden.parse().expect("a loss");
        assert_eq!(golden_step, step.to_string());
        let near = (golden - loss).abs() <= 1e-5 * golden;
        assert!(if same { golden == loss } else { near }, "step {step}: {loss}, golden {golden}");
    }
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
    if n == 1 {
        compare_with_golden(fixture, &run, &seen);
    }
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

/// Over NCCL's interface a kill and a replacement change no bit either: the code of GPUs, and a
/// library that stands in for NCCL and the driver.
#[test]
fn sums_over_nccl_and_a_kill_have_the_bits_of_one_worker_over_tcp() {
    let fixture = fixture();
    let want = undisturbed(&fixture, 1);
    let library = lacuna_nccl_standin::path();
    let library = library.to_str().expect("a path in UTF-8");
    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("over-nccl", STEPS, &[("elastic.workers", "\"2:2\"")]);
    let run = cluster.submit(&spec);
    for node in ["a", "b"] {
        let env = [
            ("LACUNA_COLLECTIVE", "nccl"),
            ("LACUNA_NCCL_LIBRARY", library),
            ("LACUNA_CUDA_LIBRARY", library),
            // Both nodes are this machine: without a name each, their devices would be the same.
            ("NCCL_HOSTID", node),
            // It is not handed on.
            ("NCCL_COMM_BLOCKING", "1"),
        ];
        cluster.add_with(node, 1, &[], &env);
    }
    cluster.wait(&run, "some steps", |seen| seen.step() >= 10);
    let trainer = cluster.pid("b:cpu0");
    let env = std::fs::read(format!("/proc/{trainer}/environ")).expect("it runs");
    let env = String::from_utf8_lossy(&env);
    assert!(env.contains("NCCL_HOSTID=b") && !env.contains("NCCL_COMM_BLOCKING"), "{env}");
    send_signal(trainer, Signal::KILL);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.final_digest, Some(want), "{}", seen.text());
    assert_eq!(seen.count("lost"), 1, "{}", seen.text());
    let healed = seen.events.iter().any(|e| e.text.contains("b:cpu0 healed from"));
    assert!(healed, "its replacement joined: {}", seen.text());
    // Each process says what carries its sums: one of `a`, and two of `b`.
    for (node, n) in [("a", 1), ("b", 2)] {
        let log = std::fs::read_to_string(fixture.path(&format!("{node}.log"))).expect("a log");
        assert!(log.matches("nccl=\"NCCL 2.28.9 (").count() >= n, "it was NCCL: {log}");
    }
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

/// Weights that another run learned are where a new one begins, with any number of workers.
#[test]
fn a_run_begins_with_imported_weights() {
    const MORE: u64 = 20;
    let fixture = fixture();
    let lacuna = |args: &[&str]| {
        let output = fixture.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    undisturbed(&fixture, 1);
    lacuna(&["ckpt", "export", "ckpt/quiet-1", "--layout", "mae", "--to", "learned"]);
    let learned = fixture.path("learned/mae.safetensors");
    let cluster = |run: &str, n: usize, is_imported: bool| {
        let workers = format!("\"{n}:{n}\"");
        let spec = fixture.spec(run, MORE, &[("elastic.workers", &workers)]);
        let spec = spec.to_str().expect("a path in UTF-8");
        if is_imported {
            lacuna(&["ckpt", "import", learned.to_str().expect("UTF-8"), "--run", spec]);
        }
        let mut cluster = Cluster::start(&fixture);
        cluster.submit(spec.as_ref());
        cluster.add("a", n);
        let seen = cluster.wait_end(run);
        assert_eq!(seen.run.state, "finished", "{}", seen.text());
        assert_eq!(seen.steps, (1..=MORE).collect::<Vec<u64>>(), "{}", seen.text());
        (seen.figures[&1].loss, seen.run.final_digest.expect("a finished run has a digest"))
    };
    let (fresh, _) = cluster("fresh", 1, false);
    let (alone, want) = cluster("imported-1", 1, true);
    assert!(alone < 0.9 * fresh, "what was learned shows at once: {alone}, afresh {fresh}");
    assert_eq!(cluster("imported-2", 2, true), (alone, want));
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

/// What `lacuna plan` says of a run before it is there is what the run then shows.
#[test]
fn a_plan_agrees_with_its_run() {
    let fixture = fixture();
    let keys = [
        ("model.width", "192"),
        ("model.depth", "6"),
        ("model.heads", "3"),
        ("model.decoder_width", "96"),
        ("model.decoder_heads", "3"),
        ("elastic.workers", "\"1:1\""),
    ];
    let spec = fixture.spec("planned", 40, &keys);
    let output = fixture.run(&["plan", spec.to_str().unwrap(), "-o", "json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let number = |key: &str| plan[key].as_f64().unwrap_or_else(|| panic!("{key} in {plan}"));

    let mut cluster = Cluster::start(&fixture);
    let run = cluster.submit(&spec);
    cluster.add("a", 1);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    assert_eq!(seen.run.total_steps as f64, number("steps"));
    assert_eq!(seen.run.steps_per_epoch as f64, number("steps_per_epoch"));
    assert_eq!(f64::from(seen.run.n_slots), number("slots"));
    let peak = seen.figures.values().map(|figures| figures.lr).fold(0.0, f64::max);
    assert!((peak / number("peak_lr") - 1.0).abs() < 1e-9, "{peak} {plan}");
    let saved = cluster.ask(async |mut client| client.list_checkpoints("planned").await.unwrap());
    let bytes = saved.last().expect("the last one").bytes as f64;
    // The parts' own heads come on top.
    assert!((0.99..1.05).contains(&(bytes / number("checkpoint_bytes"))), "{bytes} {plan}");
    let planned = plan["memory_bytes"]["total"].as_f64().unwrap();
    let memory = seen.figures.values().map(|figures| figures.memory_bytes).max().unwrap() as f64;
    assert!((0.75..1.25).contains(&(memory / planned)), "{memory} of {planned}");
}
