//! Checkpoints in an object store: a run that is stopped and resumed there gives the bits of a run
//! over files.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use lacuna_api::client::{Client, ClientError};
use lacuna_api::error::{Reason, reason};
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
}

impl Gate {
    fn pass(&self) {
        let closed = self.closed.lock().unwrap();
        drop(self.opened.wait_while(closed, |closed| *closed).unwrap());
    }

    fn set(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.opened.notify_all();
    }
}

/// Checkpoints that are slow to be looked at keep nobody without an answer.
#[test]
fn a_coordinator_that_still_reads_its_state_says_so() {
    let mut fixture = fixture();
    std::fs::create_dir(fixture.path("bucket")).unwrap();
    let gate = Arc::new(Gate::default());
    let plan = gate.clone();
    let passing = Box::new(move |_, _: &str| {
        plan.pass();
        Fault::None
    });
    let server = Server::start(fixture.dir.path(), Duration::ZERO, passing).unwrap();
    fixture.env = env_of(&server);
    let mut cluster = Cluster::start(&fixture);
    let spec = fixture.spec("slow", STEPS, &[("checkpoint.to", "\"s3://bucket/ckpts\"")]);
    let run = cluster.submit(&spec);
    cluster.kill_coordinator();
    gate.set(true);
    let address = cluster.url.trim_start_matches("http://").to_string();
    let (url, since) = (cluster.url.clone(), Instant::now());
    std::thread::scope(|scope| {
        scope.spawn(|| cluster.start_coordinator());
        let not_ready = loop {
            assert!(since.elapsed() < Duration::from_secs(60), "it says nothing");
            match get(&address, "/readyz") {
                Some(answer) => break answer,
                None => std::thread::yield_now(),
            }
        };
        assert!(not_ready.contains(" 503 ") && not_ready.contains("reading its state"));
        assert!(get(&address, "/healthz").unwrap().contains(" 200 "));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let asked = runtime.block_on(async {
            Client::connect(&url, Duration::from_secs(10)).await.unwrap().list_runs().await
        });
        let Err(ClientError::Refused(refusal)) = asked else { panic!("{asked:?}") };
        assert_eq!(reason(&refusal), Some(Reason::Starting));
        gate.set(false);
    });
    assert_eq!(cluster.status(&run).state, "waiting");
}

/// Asks what a browser would, and returns the answer; none where nobody listens.
fn get(address: &str, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
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
