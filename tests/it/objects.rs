//! Checkpoints in an object store: a run that is stopped and resumed there gives the bits of a run
//! over files.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use lacuna_api::client::ClientError;
use lacuna_api::error::{Reason, reason};
use lacuna_api::v1;
use lacuna_store::testing::{Fault, Kind, Server, mixed};
use lacuna_tests::{Cluster, said, send_signal};
use rustix::process::Signal;
use serde_json::Value;

use crate::fixture;
use crate::remote::{STEPS, undisturbed};

/// Answers that are lost, refusals and resets, of reads and writes alike.
fn unreliable(fixture: &lacuna_tests::Fixture) -> Server {
    std::fs::create_dir(fixture.path("bucket")).unwrap();
    let shares = [
        (8, Fault::Lost),
        (3, Fault::Reset),
        (3, Fault::CutBody(50)),
        (3, Fault::Status(500)),
        (3, Fault::Status(503)),
    ];
    Server::start(fixture.dir.path(), Duration::from_millis(2), mixed(11, &shares)).unwrap()
}

/// What programs need to find a server that stands for S3.
fn env_of(server: &Server) -> Vec<(String, String)> {
    [
        ("AWS_ENDPOINT_URL", server.url().as_str()),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "us-east-1"),
    ]
    .map(|(key, value)| (key.to_string(), value.to_string()))
    .to_vec()
}

/// A worker is killed, then everything; a coordinator without memory finds the checkpoints.
#[test]
fn a_run_is_resumed_from_a_store() {
    let mut fixture = fixture();
    let want = undisturbed(&fixture);
    let server = unreliable(&fixture);
    fixture.env = env_of(&server);
    let keys = [
        ("checkpoint.to", "\"s3://bucket/ckpts\""),
        ("checkpoint.every", "[\"20step\"]"),
        ("elastic.workers", "\"1:2\""),
    ];
    let spec = fixture.spec("stored", STEPS, &keys);
    let mut cluster = Cluster::start(&fixture);
    let run = cluster.submit(&spec);
    cluster.add("a", 2);
    cluster.wait(&run, "some steps", |seen| seen.step() >= 10 && seen.run.workers.len() == 2);
    send_signal(cluster.pid("a:cpu1"), Signal::KILL);
    let saved = |seen: &lacuna_tests::Seen| seen.run.checkpoint_step.unwrap_or(0);
    let seen = cluster.wait(&run, "a checkpoint", |seen| saved(seen) >= 40);
    assert!(seen.run.exit_code.is_none(), "{}", seen.text());
    drop(cluster);
    std::fs::remove_dir_all(fixture.path("state")).unwrap();
    let before = server.seen().len();
    let mut cluster = Cluster::start(&fixture);
    assert_eq!(cluster.submit(&spec), run);
    cluster.add("b", 2);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    assert_eq!(seen.run.final_digest, Some(want), "{}", seen.text());
    let after = server.seen().split_off(before);
    let read = after.iter().any(|seen| seen.kind == Kind::Get && seen.path.contains("/part-"));
    assert!(read, "it went on from a checkpoint");
    assert!(after.iter().any(|seen| seen.fault == Fault::Lost), "answers were lost");
    tools_read_it(&fixture);
}

/// Keeps every answer of a store until it is opened.
#[derive(Default)]
struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
    n_asked: AtomicUsize,
}

impl Gate {
    fn pass(&self) {
        self.n_asked.fetch_add(1, Ordering::SeqCst);
        let closed = self.closed.lock().unwrap();
        drop(self.opened.wait_while(closed, |closed| *closed).unwrap());
    }

    fn set(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.opened.notify_all();
    }
}

/// A store whose answers pass a gate.
fn gated(fixture: &lacuna_tests::Fixture) -> (Server, Arc<Gate>) {
    std::fs::create_dir(fixture.path("bucket")).unwrap();
    let gate = Arc::new(Gate::default());
    let plan = gate.clone();
    let passing = Box::new(move |_, _: &str| {
        plan.pass();
        Fault::None
    });
    (Server::start(fixture.dir.path(), Duration::ZERO, passing).unwrap(), gate)
}

/// A run whose checkpoints do not answer keeps nobody from another one, and loses no worker.
#[test]
fn a_run_that_cannot_be_opened_yet_is_waited_for_and_the_others_go_on() {
    let mut fixture = fixture();
    let want = undisturbed(&fixture);
    let (server, gate) = gated(&fixture);
    fixture.env = env_of(&server);
    let mut cluster = Cluster::start(&fixture);
    let keys = [("checkpoint.to", "\"s3://bucket/ckpts\""), ("elastic.workers", "\"1:1\"")];
    let run = cluster.submit(&fixture.spec("slow", STEPS, &keys));
    cluster.add_with("a", 1, &[], &[("LACUNA_FAKE_SLOT_MS", "20")]);
    cluster.wait(&run, "some steps", |seen| seen.step() >= 10);
    let pid = cluster.pid("a:cpu0");
    cluster.kill_coordinator();
    gate.set(true);
    cluster.start_coordinator();
    let shown = cluster.status(&run);
    assert_eq!(shown.state, "opening");
    assert!(shown.why.contains("not looked at yet"), "{}", shown.why);
    let listed = cluster.ask(async |mut client| client.list_runs().await.unwrap());
    assert!(listed.contains(&shown) && listed.len() == 2, "{listed:?}");
    let page = String::from_utf8(cluster.get("/").1).unwrap();
    assert!(page.contains("opening") && page.contains("slow"), "{page}");
    assert_eq!(cluster.get("/runs/slow").0, 503);
    let refused = cluster.ask(async |mut client| client.stop_run("slow", "no").await.unwrap_err());
    let ClientError::Refused(refusal) = refused else { panic!("{refused}") };
    assert_eq!(reason(&refusal), Some(Reason::Starting), "{refusal}");
    assert!(refusal.message().contains("run `slow` is not open yet"), "{refusal}");
    // Its worker was told to come again, and has its state; a run's end is a worker's too.
    assert_eq!(cluster.pid("a:cpu0"), pid, "the same process");
    gate.set(false);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.final_digest, Some(want), "{}", seen.text());
    assert_eq!((seen.count("lost"), seen.count("formed")), (0, 1), "{}", seen.text());
    let other = cluster.submit(&fixture.spec("other", 20, &[]));
    assert_eq!(cluster.wait_end(&other).run.state, "finished");
}

/// Two who ask for the same run are one, also where the first has stopped listening.
#[test]
fn a_submit_that_nobody_waits_for_is_not_done_twice() {
    let mut fixture = fixture();
    let (server, gate) = gated(&fixture);
    fixture.env = env_of(&server);
    let mut cluster = Cluster::start(&fixture);
    let keys = [("checkpoint.to", "\"s3://bucket/ckpts\""), ("checkpoint.every", "[\"5step\"]")];
    let spec = fixture.spec("raced", 20, &keys);
    let request = {
        let (code, out, err) = said(&fixture.run(&["submit", spec.to_str().unwrap(), "--dry-run"]));
        assert_eq!(code, 0, "{err}");
        let text: Value = serde_json::from_str(&out).unwrap();
        v1::CreateRunRequest {
            spec: text["spec"].to_string(),
            resume: true,
            n_samples: text["n_samples"].as_u64().unwrap(),
            fingerprint: text["fingerprint"].as_str().unwrap().to_string(),
            request_id: String::new(),
        }
    };
    gate.set(true);
    let before = gate.n_asked.load(Ordering::SeqCst);
    // The first is gone as soon as the store is asked.
    cluster.ask(async |mut client| {
        let (mut create, mut asked) = (Box::pin(client.create_run(request.clone())), false);
        while !asked {
            let waiting = tokio::time::timeout(Duration::from_millis(50), &mut create).await;
            assert!(waiting.is_err(), "{waiting:?}");
            asked = gate.n_asked.load(Ordering::SeqCst) > before;
        }
    });
    let url = cluster.url.clone();
    let run = std::thread::scope(|scope| {
        let second =
            scope.spawn(|| said(&fixture.run(&["submit", spec.to_str().unwrap(), "-c", &url])));
        gate.set(false);
        second.join().unwrap()
    });
    assert_eq!(run.0, 0, "{}{}", run.1, run.2);
    cluster.add("a", 1);
    let seen = cluster.wait_end("raced");
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    assert_eq!(seen.count("not-saved"), 0, "{}", seen.text());
    let claims = server.seen().into_iter().filter(|seen| seen.path.contains("/claims/"));
    let puts: Vec<_> = claims.filter(|seen| seen.kind == Kind::Put).collect();
    assert_eq!(puts.len(), 1, "one claim: {puts:?}");
}

/// The tools take the URL where they take a folder, and a spec that names it.
fn tools_read_it(fixture: &lacuna_tests::Fixture) {
    let url = "s3://bucket/ckpts/stored";
    for name in [url, "stored.toml"] {
        let (code, out, err) = said(&fixture.run(&["ckpt", "ls", name, "-o", "json"]));
        assert_eq!(code, 0, "{out}{err}");
        let list: Value = serde_json::from_str(&out).unwrap();
        let newest = list.as_array().unwrap().last().unwrap();
        assert_eq!(
            (newest["step"].as_u64(), newest["status"].as_str()),
            (Some(STEPS), Some("good"))
        );
        assert!(newest["folder"].as_str().unwrap().starts_with(url), "{newest}");
    }
    let (code, out, err) = said(&fixture.run(&["ckpt", "verify", url]));
    assert_eq!(code, 0, "{out}{err}");
    let (code, out, err) = said(&fixture.run(&["ckpt", "diff", url, &format!("{url}@{STEPS}")]));
    assert_eq!(code, 0, "{out}{err}");
    let (code, _, err) = said(&fixture.run(&["ckpt", "ls", "http://host/ckpts/stored"]));
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("plain HTTP cannot create"), "{err}");
    assert!(!fixture.path("s3:").exists(), "no folder was made of a URL");
}

/// The files that people's tools read are in the store as they are on the coordinator's disk, after
/// it was killed on the way too.
#[test]
fn files_for_tensorboard_are_copied_to_a_store() {
    let mut fixture = fixture();
    std::fs::create_dir(fixture.path("bucket")).unwrap();
    // No lost answers: a coordinator that ends does not wait for those.
    let shares = [(10, Fault::Reset), (10, Fault::Status(503))];
    let server = Server::start(fixture.dir.path(), Duration::ZERO, mixed(5, &shares)).unwrap();
    fixture.env = env_of(&server);
    let keys = [("track.tensorboard", "\"s3://bucket/tb\""), ("track.every", "\"5step\"")];
    let mut cluster = Cluster::start(&fixture);
    let run = cluster.submit(&fixture.spec("told", STEPS, &keys));
    cluster.add("a", 1);
    cluster.wait(&run, "some steps", |seen| seen.step() >= 20);
    cluster.kill_coordinator();
    cluster.start_coordinator();
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    // It ends in order, and copies what is left.
    cluster.end_coordinator();
    drop(cluster);
    let files = |folder: &str| {
        let entries = std::fs::read_dir(fixture.path(folder)).unwrap().map(|entry| entry.unwrap());
        let content = |e: std::fs::DirEntry| (e.file_name(), std::fs::read(e.path()).unwrap());
        entries.map(content).collect::<std::collections::BTreeMap<_, _>>()
    };
    let (there, here) = (files("bucket/tb/told"), files("state/track/told"));
    assert_eq!(there.keys().collect::<Vec<_>>(), here.keys().collect::<Vec<_>>());
    for (name, content) in &here {
        let copied = &there[name];
        let bytes = (copied.len(), content.len());
        assert!(copied == content, "{name:?}: {bytes:?}\n{}", seen.text());
    }
    let n_boards = there.keys().filter(|name| name.to_string_lossy().starts_with("events.out."));
    assert!(n_boards.count() >= 1, "{:?}", there.keys());
    let lines = String::from_utf8(there[std::ffi::OsStr::new("metrics.jsonl")].clone()).unwrap();
    let steps = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let steps: Vec<u64> = steps.map(|line| line["step"].as_u64().unwrap()).collect();
    assert!(steps.windows(2).all(|pair| pair[0] < pair[1]), "each once: {steps:?}");
    assert_eq!(steps.last(), Some(&STEPS));
    // Nothing of a run that other files lie beside is written over.
    std::fs::remove_dir_all(fixture.path("state")).unwrap();
    let mut cluster = Cluster::start(&fixture);
    let run = cluster.submit(&fixture.spec("told", STEPS, &keys));
    cluster.add("a", 1);
    let seen = cluster.wait(&run, "a remark", |seen| {
        seen.text().contains("another run wrote there, or the state file lost")
    });
    assert!(files("bucket/tb/told") == there, "{}", seen.text());
}
