//! Workers that reach each other over a network's address, behind certificates and tokens.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, TcpStream, UdpSocket};
use std::process::{Command, Stdio};

use lacuna_tests::{DEADLINE, Fixture, Process, said};
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
    let state: &[&str] = if args.contains(&"--state") { &[] } else { &["--state", "state"] };
    command.args(state).args(args).stdout(Stdio::piped()).stderr(Stdio::null());
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

/// Opens callers that never finish what they say; some say nothing, some a little at a time.
fn slow_callers(addr: &str, n: usize) -> Vec<TcpStream> {
    let beginnings: [&[u8]; 3] = [b"", b"GET /runs", b"PRI * HTTP/2.0\r\n"];
    (0..n)
        .map(|i| {
            let mut stream = TcpStream::connect(addr).expect("a connection");
            stream.write_all(beginnings[i % beginnings.len()]).expect("it is taken");
            stream.set_read_timeout(Some(DEADLINE)).expect("a socket");
            stream
        })
        .collect()
}

#[test]
fn callers_that_take_their_time_are_hung_up_on_and_keep_nobody_waiting() {
    let fixture = fixture();
    let loopback = IpAddr::from([127, 0, 0, 1]);
    let (code, _, err) = said(&fixture.run(&["tls", "init", "tls", "--host", "127.0.0.1"]));
    assert_eq!(code, 0, "{err}");
    let plain = coordinator(&fixture, loopback, &[]);
    let locked_state = ["--tls-dir", "tls/server", "--state", "other"];
    let locked = coordinator(&fixture, loopback, &locked_state);
    let callers: Vec<Vec<TcpStream>> = [&plain.1, &locked.1]
        .map(|url| slow_callers(url.split_once("//").expect("a URL").1, 60))
        .into();
    // Others are answered meanwhile.
    for (url, args) in [(&plain.1, &[][..]), (&locked.1, &["--tls-dir", "tls/view"])] {
        let runs = ["runs", "-c", url, "--timeout", "5s"];
        let (code, out, err) = said(&fixture.run(&[&runs[..], args].concat()));
        assert_eq!(code, 0, "{url}: {out}{err}");
    }
    for mut caller in callers.into_iter().flatten() {
        let mut rest: Vec<u8> = Vec::new();
        // An end or a reset, within the deadline of the socket.
        let ended = caller.read_to_end(&mut rest);
        let timed_out = ended.is_err_and(|err| err.kind() == std::io::ErrorKind::WouldBlock);
        assert!(!timed_out, "a caller that says nothing is still there");
    }
}
