//! Bad input: a clear message with the place, the right exit code, and nothing left half-written.

use std::process::Stdio;

use lacuna_tests::{Cluster, said};
use lacuna_types::BuildId;

use crate::fixture;

#[test]
fn an_unknown_key_names_its_place_and_the_right_one() {
    let fixture = fixture();
    let spec = fixture.spec("typo", 10, &[("data.shrads", "\"data\"")]);
    for command in ["train", "submit", "plan"] {
        let output = fixture.run(&[command, spec.to_str().unwrap()]);
        let (code, out, err) = said(&output);
        assert_eq!(code, 2, "{command}: {out}{err}");
        assert!(err.contains("typo.toml:") && err.contains("did you mean"), "{command}: {err}");
    }
    assert!(!fixture.path("ckpt").exists(), "nothing was written");
}

#[test]
fn missing_data_names_the_path() {
    let fixture = fixture();
    let spec = fixture.spec("no-data", 10, &[("data.shards", "\"nowhere\"")]);
    let (code, _, err) = said(&fixture.run(&["train", spec.to_str().unwrap()]));
    assert_eq!(code, 74, "{err}");
    assert!(err.contains("nowhere"), "{err}");
    assert!(!fixture.path("ckpt").exists(), "nothing was written");
}

#[test]
fn a_corrupt_shard_fails_the_run_and_names_shard_and_sample() {
    let fixture = fixture();
    let shard = std::fs::read_dir(fixture.path("data"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|e| e == "tar"))
        .unwrap();
    let mut bytes = std::fs::read(&shard).unwrap();
    for at in (600..bytes.len()).step_by(1024) {
        bytes[at] ^= 0x40;
    }
    std::fs::write(&shard, bytes).unwrap();
    let spec = fixture.spec("corrupt", 10, &[("data.bad_samples", "\"fail\"")]);
    let (code, out, err) = said(&fixture.run(&["train", spec.to_str().unwrap(), "--workers", "2"]));
    assert_eq!(code, 74, "{out}{err}");
    let name = shard.file_name().unwrap().to_str().unwrap();
    assert!(out.contains(name) || err.contains(name), "{out}{err}");
}

#[test]
fn an_occupied_port_is_named() {
    let fixture = fixture();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let output = fixture.run(&["coordinator", "--listen", &addr, "--state", "state"]);
    let (code, _, err) = said(&output);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains(&addr) && err.contains("in use"), "{err}");
}

#[test]
fn a_second_coordinator_on_one_state_is_told_who_has_it() {
    let fixture = fixture();
    let cluster = Cluster::start(&fixture);
    let output = fixture.run(&["coordinator", "--listen", "127.0.0.1:0", "--state", "state"]);
    let (code, _, err) = said(&output);
    assert_eq!(code, 1, "{err}");
    let addr = cluster.url.trim_start_matches("http://");
    assert!(err.contains("in use by process") && err.contains(addr), "{err}");
}

#[test]
fn listening_to_the_network_without_protection_is_refused() {
    let fixture = fixture();
    let output = fixture.run(&["coordinator", "--listen", "0.0.0.0:0", "--state", "state"]);
    let (code, _, err) = said(&output);
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("without tokens or TLS"), "{err}");
    assert!(!fixture.path("state").exists(), "nothing was written");
    let output = std::process::Command::new(&fixture.binaries.worker)
        .args(["--bind-addr", "0.0.0.0:0"])
        .output()
        .unwrap();
    let (code, _, err) = said(&output);
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("refusing to listen on") && err.contains("--tls-dir"), "{err}");
}

#[test]
fn an_unreachable_coordinator_has_its_own_code() {
    let fixture = fixture();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{closed}");
    let (code, _, err) = said(&fixture.run(&["status", "x", "--coordinator", &url]));
    assert_eq!(code, 69, "{err}");
    assert!(err.contains(&url), "{err}");
    let worker = std::process::Command::new(&fixture.binaries.worker)
        .args(["--coordinator", &url, "--give-up-seconds", "1", "--node-name", "n"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (code, _, err) = said(&worker);
    assert_eq!(code, 69, "{err}");
}

#[test]
fn a_missing_or_broken_worker_binary_says_how_to_get_one() {
    let fixture = fixture();
    let spec = fixture.spec("no-worker", 10, &[]);
    let train = |worker: &std::path::Path| {
        let mut command = fixture.lacuna(&["train", spec.to_str().unwrap()]);
        said(&command.env("LACUNA_WORKER", worker).output().unwrap())
    };
    let (code, _, err) = train(&fixture.path("nowhere"));
    assert_eq!(code, 78, "{err}");
    assert!(err.contains("nowhere"), "{err}");
    let broken = fixture.path("broken");
    std::fs::write(&broken, "#!/bin/sh\necho 'libtorch_cpu.so: cannot open' >&2\nexit 127\n")
        .unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&broken, executable).unwrap();
    let (code, _, err) = train(&broken);
    assert_eq!(code, 78, "{err}");
    assert!(err.contains("libtorch_cpu.so") && err.contains("make setup"), "{err}");
    let other = fixture.path("other");
    std::fs::write(&other, "#!/bin/sh\necho 'lacuna 9.9.9 (protocol 1, numerics 1), x'\n").unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&other, executable).unwrap();
    let (code, _, err) = train(&other);
    assert_eq!(code, 76, "{err}");
    assert!(err.contains("9.9.9") && err.contains("install the same build"), "{err}");
    assert!(!fixture.path("ckpt").exists(), "nothing was written");
}

#[test]
fn a_worker_of_another_build_is_refused_by_the_coordinator() {
    use lacuna_api::v1;
    let fixture = fixture();
    let cluster = Cluster::start(&fixture);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let status = runtime.block_on(async {
        let channel =
            lacuna_api::client::connect(&cluster.url, lacuna_tests::DEADLINE, &Default::default())
                .await
                .unwrap();
        let mut client = v1::worker_service_client::WorkerServiceClient::new(channel);
        let mut build: v1::BuildId = BuildId::this().into();
        build.numerics += 1;
        let hello = v1::Hello {
            worker_id: "n:cpu0".into(),
            incarnation: 1,
            build: Some(build),
            ..Default::default()
        };
        let message = Some(v1::session_request::Message::Hello(hello));
        let requests = tokio_stream::iter([v1::SessionRequest { message }]);
        client.session(requests).await.unwrap_err()
    });
    assert_eq!(lacuna_api::error::reason(&status), Some(lacuna_api::error::Reason::VersionSkew));
    assert!(status.message().contains("numerics 2"), "{}", status.message());
}

#[test]
fn a_run_of_the_same_name_with_other_mathematics_is_refused_with_the_difference() {
    let fixture = fixture();
    let cluster = Cluster::start(&fixture);
    let spec = fixture.spec("same", 10, &[]);
    cluster.submit(&spec);
    cluster.submit(&spec);
    let path = spec.to_str().unwrap();
    let args = ["submit", path, "--set", "train.seed=9", "--coordinator", &cluster.url];
    let (code, _, err) = said(&fixture.run(&args));
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("train.seed: 0 -> 9 [maths]"), "{err}");
    let args = ["submit", path, "--set", "elastic.workers=\"1:2\"", "--coordinator", &cluster.url];
    assert_eq!(said(&fixture.run(&args)).0, 0, "placement may change");
}
