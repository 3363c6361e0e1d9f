//! Checkpoints in an object store: a run that is stopped and resumed there gives the bits of a run
//! over files.

use std::time::Duration;

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

/// A worker is killed, then everything; a coordinator without memory finds the checkpoints.
#[test]
fn a_run_is_resumed_from_a_store() {
    let mut fixture = fixture();
    let want = undisturbed(&fixture);
    let server = unreliable(&fixture);
    fixture.env = [
        ("AWS_ENDPOINT_URL", server.url().as_str()),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "us-east-1"),
    ]
    .map(|(key, value)| (key.to_string(), value.to_string()))
    .to_vec();
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
