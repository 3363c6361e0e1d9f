//! Workers that reach each other over a network's address, behind certificates and tokens.

use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, UdpSocket};
use std::process::{Command, Stdio};

use lacuna_tests::{Fixture, Process, said};
use lacuna_types::exit;

use crate::fixture;

/// An address of this machine that others can reach, if it has one. Nothing is sent.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}

/// Starts a coordinator; returns it with its URL.
fn coordinator(fixture: &Fixture, address: IpAddr, args: &[&str]) -> (Process, String) {
    let listen = format!("{address}:0");
    let mut command = fixture.lacuna(&["coordinator", "--local", "--listen", &listen]);
    command.args(["--state", "state"]).args(args).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut process = Process::start(&mut command);
    let mut line = String::new();
    let stdout = process.take_stdout().expect("stdout is a pipe");
    BufReader::new(stdout).read_line(&mut line).expect("the coordinator says its address");
    let url = line.trim().strip_prefix("listening on ").expect("its address").to_string();
    (process, url)
}

fn agent(fixture: &Fixture, url: &str, address: IpAddr, name: &str, args: &[&str]) -> Command {
    let mut command = Command::new(&fixture.binaries.worker);
    command
        .args(["--coordinator", url, "--devices", "cpu:1", "--node-name", name, "--bind-addr"])
        .arg(format!("{address}:0"))
        .args(args)
        .current_dir(fixture.dir.path())
        .env("LACUNA_FAKE_SLOT_MS", "3")
        .env_remove("RUST_LOG")
        .envs(fixture.env.iter().cloned())
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

/// Trains with two workers and checks the digest, which is that of any other run of the spec.
fn trains(fixture: &Fixture, url: &str, address: IpAddr, worker: &[&str], client: &[&str]) {
    let spec = fixture.spec("far", 120, &[("elastic.workers", "\"2:2\"")]);
    let spec = spec.to_str().expect("a path in UTF-8");
    let _agents = ["a", "b"].map(|name| {
        Process::start(agent(fixture, url, address, name, worker).stderr(Stdio::null()))
    });
    let submit = ["submit", spec, "--watch", "--progress", "off", "-c", url];
    let (code, _, err) = said(&fixture.run(&[&submit[..], client].concat()));
    assert_eq!(code, 0, "{err}");
    let status = ["status", "far", "-o", "json", "-c", url];
    let (code, out, err) = said(&fixture.run(&[&status[..], client].concat()));
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("\"final_digest\":\"71dfbee5180d1b53\""), "{out}");
}

#[test]
fn certificates_between_machines_change_no_bit() {
    let Some(address) = own_address() else {
        println!("skipped: this machine has no address but loopback");
        return;
    };
    let fixture = fixture();
    let host = address.to_string();
    let (code, _, err) = said(&fixture.run(&["tls", "init", "tls", "--host", &host]));
    assert_eq!(code, 0, "{err}");
    let (_coordinator, url) = coordinator(&fixture, address, &["--tls-dir", "tls/server"]);
    assert!(url.starts_with("https://"), "{url}");
    let (worker, client) = (["--tls-dir", "tls/worker"], ["--tls-dir", "tls/submit"]);
    trains(&fixture, &url, address, &worker, &client);
    // Who may look may not compute, and says so at once.
    let refused = agent(&fixture, &url, address, "c", &["--tls-dir", "tls/view"])
        .stderr(Stdio::piped())
        .output()
        .expect("the agent starts");
    let (code, _, err) = said(&refused);
    assert_eq!(code, i32::from(exit::UNAUTHORISED), "{err}");
    assert!(err.contains("needs the role `worker`, and the caller has the role `view`"), "{err}");
}

#[test]
fn tokens_between_machines_change_no_bit() {
    let Some(address) = own_address() else {
        println!("skipped: this machine has no address but loopback");
        return;
    };
    let fixture = fixture();
    for role in ["worker", "submit"] {
        let args = ["token", "new", "--role", role, "--add-to", "tokens", "--out", role];
        let (code, _, err) = said(&fixture.run(&args));
        assert_eq!(code, 0, "{err}");
    }
    let (_coordinator, url) = coordinator(&fixture, address, &["--token-file", "tokens"]);
    let (worker, client) = (["--token-file", "worker"], ["--token-file", "submit"]);
    trains(&fixture, &url, address, &worker, &client);
    // Without a token the agent opens no port that others reach.
    let refused = agent(&fixture, &url, address, "c", &[])
        .stderr(Stdio::piped())
        .output()
        .expect("the agent starts");
    let (code, _, err) = said(&refused);
    assert_eq!(code, i32::from(exit::USAGE), "{err}");
    assert!(err.contains("refusing to listen on") && err.contains("--token-file"), "{err}");
}
