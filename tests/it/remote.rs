//! Data behind a URL: a run over HTTP that fails in every way gives the bits of a run over files.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lacuna_store::testing::{Fault, Server, mixed};
use lacuna_tests::{Cluster, said, send_signal};
use rustix::process::Signal;

use crate::fixture;

pub(crate) const STEPS: u64 = 120;

/// Late answers, resets, cut answers and refusals, but an index that comes whole.
fn unreliable(fixture: &lacuna_tests::Fixture) -> Server {
    let shares = [
        (5, Fault::Reset),
        (5, Fault::Cut(40)),
        (5, Fault::Status(500)),
        (5, Fault::Status(503)),
        (2, Fault::Drip { bytes: 2000, pause: Duration::from_millis(10) }),
    ];
    Server::start(&fixture.path(""), Duration::from_millis(2), mixed(7, &shares)).unwrap()
}

/// Two workers of one machine share a cache; one is killed again and again, while it downloads and
/// afterwards.
#[test]
fn a_run_over_a_bad_network_with_kills_changes_no_bit() {
    let fixture = fixture();
    let want = undisturbed(&fixture);
    let mut cluster = Cluster::start(&fixture);
    let server = unreliable(&fixture);
    let shards = format!("\"{}/data\"", server.url());
    let keys = [
        ("data.shards", shards.as_str()),
        ("data.order", "\"global\""),
        ("data.cache", "{ dir = \"chunks\", size = \"1GB\", mode = \"jpeg\" }"),
        ("elastic.workers", "\"1:2\""),
    ];
    let run = cluster.submit(&fixture.spec("remote", STEPS, &keys));
    cluster.add("a", 2);
    for at in [1, 30, 60] {
        cluster.wait(&run, "some steps", |seen| seen.step() >= at && seen.run.workers.len() == 2);
        send_signal(cluster.pid("a:cpu1"), Signal::KILL);
    }
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    assert_eq!(seen.run.final_digest, Some(want), "{}", seen.text());
    let kept = std::fs::read_dir(fixture.path("chunks")).unwrap().count();
    assert_eq!(kept, 1, "a folder of this data set");
    assert!(server.seen().iter().any(|seen| seen.fault != Fault::None), "faults were met");
}

/// A store that is away for longer than its deadline costs time: nobody is unfit, no process ends,
/// and the run goes on where it was.
#[test]
fn an_outage_costs_no_worker_and_no_bit() {
    let fixture = fixture();
    let want = undisturbed(&fixture);
    let mut cluster = Cluster::start(&fixture);
    let away = Arc::new(AtomicBool::new(false));
    let of_plan = away.clone();
    let plan = move |_: u64, path: &str| match of_plan.load(Ordering::Relaxed) {
        true if path.ends_with(".tar") => Fault::Status(503),
        _ => Fault::None,
    };
    let server = Server::start(&fixture.path(""), Duration::ZERO, Box::new(plan)).unwrap();
    let shards = format!("\"{}/data\"", server.url());
    // Without a cache each step asks the store.
    let keys = [
        ("data.shards", shards.as_str()),
        ("data.deadline_seconds", "1"),
        ("elastic.workers", "\"2:2\""),
    ];
    let run = cluster.submit(&fixture.spec("outage", STEPS, &keys));
    // Slow enough that the run does not end before its workers are looked at.
    cluster.add_with("a", 2, &[], &[("LACUNA_FAKE_SLOT_MS", "10")]);
    cluster.wait(&run, "some steps", |seen| seen.step() >= 20);
    let pids = [cluster.pid("a:cpu0"), cluster.pid("a:cpu1")];
    away.store(true, Ordering::Relaxed);
    cluster.wait(&run, "the group forms anew", |seen| seen.count("formed") >= 2);
    away.store(false, Ordering::Relaxed);
    let seen = cluster.wait(&run, "steps after it", |seen| seen.step() >= 60);
    assert_eq!([cluster.pid("a:cpu0"), cluster.pid("a:cpu1")], pids, "{}", seen.text());
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    assert_eq!(seen.run.final_digest, Some(want), "{}", seen.text());
    assert!(seen.text().contains("given up after"), "{}", seen.text());
}

/// The digest of the run over files.
pub(crate) fn undisturbed(fixture: &lacuna_tests::Fixture) -> u64 {
    let mut cluster = Cluster::start(fixture);
    let spec = fixture.spec("local", STEPS, &[("elastic.workers", "\"1:1\"")]);
    let run = cluster.submit(&spec);
    cluster.add("l", 1);
    cluster.wait_end(&run).run.final_digest.expect("a finished run has a digest")
}

/// The tools that look at data take a URL where they take a folder; S3 is found by its variables.
#[test]
fn tools_take_urls() {
    let fixture = fixture();
    let server = Server::plain(fixture.dir.path()).unwrap();
    let with_s3 = |args: &[&str]| {
        let mut command = fixture.lacuna(args);
        command
            .env("AWS_ENDPOINT_URL", server.url())
            .env("AWS_ALLOW_HTTP", "true")
            .env("AWS_ACCESS_KEY_ID", "key")
            .env("AWS_SECRET_ACCESS_KEY", "secret")
            .env("AWS_REGION", "us-east-1");
        said(&command.output().unwrap())
    };
    std::fs::create_dir(fixture.path("bucket")).unwrap();
    std::fs::rename(fixture.path("data"), fixture.path("bucket/data")).unwrap();
    let (code, out, err) = with_s3(&["data", "verify", "s3://bucket/data"]);
    assert_eq!(code, 0, "{out}{err}");
    let local = said(&fixture.run(&["data", "index", "bucket/data", "-o", "json"]));
    let (code, remote, err) = with_s3(&["data", "index", "s3://bucket/data", "-o", "json"]);
    assert_eq!(code, 0, "{remote}{err}");
    let fingerprint = |text: &str| {
        let value: serde_json::Value = serde_json::from_str(text).unwrap();
        value["fingerprint"].as_str().unwrap().to_string()
    };
    assert_eq!(fingerprint(&remote), fingerprint(&local.1));
    let url = format!("{}/bucket/data", server.url());
    let spec = fixture.spec("spec", 20, &[("data.shards", &format!("\"{url}\""))]);
    let spec = spec.to_str().unwrap();
    let (code, out, err) =
        said(&fixture.run(&["data", "simulate", spec, "--nodes", "2", "--workers", "2"]));
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("holds what is in use"), "{out}");
    let (code, _, err) = said(&fixture.run(&["data", "simulate", spec, "--nodes", "9"]));
    assert_eq!(code, 2, "{err}");
    let (code, _, err) = said(&fixture.run(&["data", "verify", &format!("{url}-not")]));
    assert_eq!(code, 74, "{err}");
    assert!(err.contains("-not` holds no index.lacuna"), "{err}");
}

/// Numbers about loading lie in a file for each worker, in Prometheus' text format.
#[test]
fn workers_write_metrics() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let run = cluster.submit(&fixture.spec("counted", 20, &[("elastic.workers", "\"2:2\"")]));
    let dir = fixture.path("metrics");
    cluster.add_with("m", 2, &["--once", "--metrics-dir", dir.to_str().unwrap()], &[]);
    cluster.wait_end(&run);
    assert!(cluster.take("m").wait().success());
    let mut slots = 0;
    for worker in ["m-cpu0", "m-cpu1"] {
        let path = fixture.path(&format!("metrics/lacuna-data-{worker}.prom"));
        let text = std::fs::read_to_string(path).unwrap();
        let labels = format!("{{run=\"counted\",worker=\"{}\"}} ", worker.replace('-', ":"));
        let start = format!("lacuna_data_slots_total{labels}");
        let line = text.lines().find(|line| line.starts_with(&start));
        let value = line.unwrap_or_else(|| panic!("{text}")).rsplit(' ').next().unwrap();
        slots += value.parse::<u64>().unwrap();
    }
    assert_eq!(slots, 20 * 8, "every slot was delivered once");
}
