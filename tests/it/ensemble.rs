//! Several coordinators over etcd, as it is: leaders are killed, cut off and replaced, and so are
//! etcd's own servers.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lacuna_api::client::{Client, ClientError};
use lacuna_api::error::{Reason, reason};
use lacuna_tests::ports::free_addr;
use lacuna_tests::processes::wait_for_end;
use lacuna_tests::{Cluster, Fixture, Process, is_alive, said};
use lacuna_types::exit;
use rustix::process::Signal;

use crate::fixture;

/// How long anything here may take.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long nobody leads after a leader is lost.
const LEASE: &str = "3s";

/// Finds etcd: LACUNA_ETCD, what `make peers` fetched, the path.
fn etcd_program() -> Option<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let fetched = root.join("third_party/tools/bin/etcd");
    let named = std::env::var_os("LACUNA_ETCD").map(PathBuf::from);
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&on_path).map(|folder| folder.join("etcd"));
    named.into_iter().chain([fetched]).chain(on_path).find(|path| path.is_file())
}

/// Three servers of etcd.
struct Etcds {
    program: PathBuf,
    folder: PathBuf,
    ports: [(u16, u16); 3],
    servers: [Option<Process>; 3],
    /// Folder of certificates, where clients speak TLS and show one.
    tls: Option<PathBuf>,
}

impl Etcds {
    /// Starts them; `None`, with a line that says so, where there is no etcd.
    fn start(fixture: &Fixture) -> Option<Self> {
        Etcds::start_with(fixture, None)
    }

    fn start_with(fixture: &Fixture, tls: Option<PathBuf>) -> Option<Self> {
        let Some(program) = etcd_program() else {
            println!("skipped: there is no etcd (make peers)");
            return None;
        };
        let port = || free_addr().unwrap().port();
        let ports = [(); 3].map(|()| (port(), port()));
        let folder = fixture.path("etcd");
        std::fs::create_dir(&folder).unwrap();
        let mut all = Etcds { program, folder, ports, servers: [None, None, None], tls };
        (0..3).for_each(|i| all.start_one(i));
        Some(all)
    }

    fn start_one(&mut self, i: usize) {
        let peer = |i: usize| format!("http://127.0.0.1:{}", self.ports[i].1);
        let members: Vec<String> = (0..3).map(|i| format!("e{i}={}", peer(i))).collect();
        let client = self.endpoint(i);
        let log = std::fs::File::create(self.folder.join(format!("e{i}.log"))).unwrap();
        let mut command = Command::new(&self.program);
        command
            .args(["--name", &format!("e{i}"), "--data-dir"])
            .arg(self.folder.join(format!("e{i}")))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer(i), "--initial-advertise-peer-urls", &peer(i)])
            .args(["--initial-cluster", &members.join(","), "--initial-cluster-state", "new"])
            .stdout(Stdio::null())
            .stderr(log);
        if let Some(tls) = &self.tls {
            let own = tls.join("server");
            command
                .arg("--client-cert-auth")
                .args(["--trusted-ca-file".into(), own.join("ca.pem")])
                .args(["--cert-file".into(), own.join("cert.pem")])
                .args(["--key-file".into(), own.join("key.pem")]);
        }
        self.servers[i] = Some(Process::start(&mut command));
    }

    fn kill(&mut self, i: usize) {
        self.servers[i] = None;
    }

    fn endpoint(&self, i: usize) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.ports[i].0)
    }

    fn endpoints(&self) -> String {
        [0, 1, 2].map(|i| self.endpoint(i)).join(",")
    }
}

/// Coordinators of one ensemble; each keeps its port.
struct Coordinators<'a> {
    fixture: &'a Fixture,
    etcd: String,
    etcd_tls: Option<PathBuf>,
    ports: Vec<u16>,
    running: Vec<Option<Process>>,
}

impl<'a> Coordinators<'a> {
    fn start(fixture: &'a Fixture, etcds: &Etcds, n: usize) -> Self {
        let ports = (0..n).map(|_| free_addr().unwrap().port()).collect();
        let running = (0..n).map(|_| None).collect();
        let etcd_tls = etcds.tls.as_ref().map(|tls| tls.join("admin"));
        let etcd = etcds.endpoints();
        let mut all = Coordinators { fixture, etcd, etcd_tls, ports, running };
        (0..n).for_each(|i| all.start_one(i));
        all
    }

    fn start_one(&mut self, i: usize) {
        let listen = format!("127.0.0.1:{}", self.ports[i]);
        let state = self.fixture.path(&format!("state-{i}"));
        let log = self.fixture.path(&format!("coordinator-{i}.log"));
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        let mut command = self.fixture.lacuna(&["coordinator", "--local", "--listen", &listen]);
        command
            .args(["--etcd", &self.etcd, "--etcd-prefix", "/test", "--etcd-lease", LEASE])
            .arg("--state")
            .arg(state)
            .stdout(Stdio::piped())
            .stderr(log);
        if let Some(tls) = &self.etcd_tls {
            command.arg("--etcd-tls-dir").arg(tls);
        }
        let mut process = Process::start(&mut command);
        let mut line = String::new();
        BufReader::new(process.take_stdout().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("listening on "), "{line}");
        self.running[i] = Some(process);
    }

    fn url(&self, i: usize) -> String {
        format!("http://127.0.0.1:{}", self.ports[i])
    }

    fn urls(&self) -> String {
        let all: Vec<String> = (0..self.ports.len()).map(|i| self.url(i)).collect();
        all.join(",")
    }

    /// Asks one over HTTP; returns the status and the body, nothing where it does not answer.
    fn get_bytes(&self, i: usize, path: &str) -> Option<(u16, Vec<u8>)> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.ports[i])).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        let head = format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).ok()?;
        let end = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&answer[..end]).into_owned();
        Some((head.split(' ').nth(1)?.parse().ok()?, answer.split_off(end + 4)))
    }

    fn get(&self, i: usize, path: &str) -> Option<(u16, String)> {
        let (code, body) = self.get_bytes(i, path)?;
        Some((code, String::from_utf8_lossy(&body).into_owned()))
    }

    /// Waits until one of those that run leads, other than `not`. One that ended because it lost
    /// its lease is started again, as a supervisor would.
    fn leader(&mut self, not: Option<usize>) -> usize {
        let until = Instant::now() + DEADLINE;
        loop {
            for i in 0..self.ports.len() {
                if self.running[i].as_ref().is_some_and(|process| !is_alive(process.pid())) {
                    self.start_one(i);
                }
            }
            let leads = |i: &usize| {
                Some(*i) != not
                    && self.running[*i].is_some()
                    && self.get(*i, "/readyz").is_some_and(|(code, _)| code == 200)
            };
            if let Some(i) = (0..self.ports.len()).find(leads) {
                return i;
            }
            assert!(Instant::now() < until, "nobody leads\n{}", self.logs());
            std::thread::yield_now();
        }
    }

    fn logs(&self) -> String {
        let log = |i| {
            let path = self.fixture.path(&format!("coordinator-{i}.log"));
            format!("-- {i}\n{}", std::fs::read_to_string(path).unwrap_or_default())
        };
        (0..self.ports.len()).map(log).collect()
    }
}

/// The digest of an undisturbed run.
fn undisturbed(fixture: &Fixture, steps: u64) -> u64 {
    let mut cluster = Cluster::start(fixture);
    let run = cluster.submit(&fixture.spec("alone", steps, &[]));
    cluster.add_with("u", 1, &[], &[("LACUNA_FAKE_SLOT_MS", "0")]);
    cluster.wait_end(&run).run.final_digest.expect("it finished")
}

/// Leaders are killed, a server of etcd too: the same bits, no worker started again, and a history
/// without a gap.
#[test]
fn leaders_are_killed_and_no_bit_changes() {
    let fixture = fixture();
    let Some(mut etcds) = Etcds::start(&fixture) else { return };
    let steps = 200;
    let want = undisturbed(&fixture, steps);
    let mut coordinators = Coordinators::start(&fixture, &etcds, 3);
    let first = coordinators.leader(None);
    let mut cluster = Cluster::of(&fixture, &coordinators.urls());
    let keys = [
        ("elastic.workers", "\"1:2\""),
        ("track.reconstructions.every", "\"10step\""),
        ("track.reconstructions.images", "2"),
    ];
    let run = cluster.submit(&fixture.spec("kept", steps, &keys));
    cluster.add_with("a", 2, &[], &[("LACUNA_FAKE_SLOT_MS", "20")]);
    let both = |seen: &lacuna_tests::Seen| seen.step() >= 20 && seen.run.workers.len() == 2;
    cluster.wait(&run, "some steps", both);
    let pids = ["a:cpu0", "a:cpu1"].map(|worker| cluster.pid(worker));

    coordinators.running[first] = None;
    coordinators.leader(Some(first));
    let seen = cluster.wait(&run, "news of the second leader", |seen| seen.step() >= 50);
    assert!(seen.run.exit_code.is_none(), "{}", seen.text());
    coordinators.start_one(first);
    etcds.kill(0);
    let before = seen.step();
    cluster.wait(&run, "steps with two servers of etcd", |seen| seen.step() >= before + 20);
    assert_eq!(pids, ["a:cpu0", "a:cpu1"].map(|worker| cluster.pid(worker)), "the same workers");
    let second = coordinators.leader(None);
    coordinators.running[second] = None;
    coordinators.leader(Some(second));
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.final_digest, Some(want), "{}\n{}", seen.text(), coordinators.logs());
    let logs = format!("{}\n{}", coordinators.logs(), cluster.logs());
    assert_eq!(seen.count("lost"), 0, "{}\n{logs}", seen.text());
    // Who leads last knows what the first two were told, and says each once. (Marks that nobody
    // heard, because nobody led, are not said again.)
    let last = |told: &lacuna_tests::Seen| told.count("finished") > 0;
    let seen = if last(&seen) { seen } else { cluster.wait(&run, "the end", last) };
    let all = cluster.wait(&run, "the whole history", last);
    assert_eq!(all.steps, seen.steps);
    assert!(all.steps.windows(2).all(|pair| pair[0] < pair[1]), "{:?}", all.steps);
    assert!(all.steps[0] <= 20 && all.count("formed") == 1, "{}", all.text());
    // A picture that the first one got; its bytes are in etcd too.
    let path = format!("/runs/{run}/pictures/0/0");
    let last = coordinators.leader(None);
    let (code, _) = coordinators.get_bytes(last, &path).expect("an answer");
    assert_eq!(code, 200, "{path}");
    assert!(seen.count("saved") >= 1, "{}", seen.text());
}

/// A leader that is stopped for longer than its lease finds itself replaced, and ends.
#[test]
fn a_leader_that_slept_is_replaced_and_writes_nothing() {
    let fixture = fixture();
    let Some(etcds) = Etcds::start(&fixture) else { return };
    let steps = 300;
    let want = undisturbed(&fixture, steps);
    let mut coordinators = Coordinators::start(&fixture, &etcds, 2);
    let first = coordinators.leader(None);
    let mut cluster = Cluster::of(&fixture, &coordinators.urls());
    let run = cluster.submit(&fixture.spec("slept", steps, &[("elastic.workers", "\"1:1\"")]));
    cluster.add("a", 1);
    cluster.wait(&run, "some steps", |seen| seen.step() >= 20);
    let sleeper = coordinators.running[first].take().unwrap();
    sleeper.signal(Signal::STOP);
    let second = coordinators.leader(Some(first));
    assert_ne!(first, second);
    sleeper.signal(Signal::CONT);
    assert!(wait_for_end(sleeper.pid(), DEADLINE), "it ends\n{}", coordinators.logs());
    let code = sleeper.wait().code();
    assert_eq!(code, Some(i32::from(exit::DRAINED)), "{}", coordinators.logs());
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.final_digest, Some(want), "{}\n{}", seen.text(), coordinators.logs());
}

/// What operators asked for holds under the next leader; etcd speaks TLS, and wants a certificate.
#[test]
fn what_was_asked_for_holds_under_the_next_leader() {
    let fixture = fixture();
    let tls = fixture.path("tls");
    let folder = tls.display().to_string();
    let (code, out, err) = said(&fixture.run(&["tls", "init", &folder, "--host", "127.0.0.1"]));
    assert_eq!(code, 0, "{out}{err}");
    let Some(etcds) = Etcds::start_with(&fixture, Some(tls.clone())) else { return };
    let mut coordinators = Coordinators::start(&fixture, &etcds, 2);
    let first = coordinators.leader(None);
    let urls = coordinators.urls();
    let cluster = Cluster::of(&fixture, &urls);
    let workers = [("elastic.workers", "\"1:4\"")];
    let [ended, scaled] =
        ["ended", "scaled"].map(|name| cluster.submit(&fixture.spec(name, 50, &workers)));
    let lacuna = |args: &[&str]| said(&fixture.run(&[&["-c", &urls], args].concat()));
    for args in [
        &["ban", "bad-node", "--for", "7d", "--why", "its memory"][..],
        &["cancel", &ended, "--why", "a typo"],
        &["scale", &scaled, "2:3"],
    ] {
        let (code, out, err) = lacuna(args);
        assert_eq!(code, 0, "{args:?}: {out}{err}");
    }
    coordinators.running[first] = None;
    coordinators.leader(Some(first));
    let (code, out, err) = lacuna(&["ban"]);
    assert!(code == 0 && out.contains("bad-node") && out.contains("its memory"), "{out}{err}");
    let run = cluster.status(&ended);
    assert_eq!((run.state.as_str(), run.why.as_str()), ("cancelled", "a typo"));
    let run = cluster.status(&scaled);
    assert_eq!(run.state, "waiting");
    assert!(run.spec.contains("\"workers\":\"2:3\""), "{}", run.spec);
    // A folder without an authority is refused before anybody is asked.
    let stranger = [
        ["coordinator", "--listen", "127.0.0.1:0", "--etcd-prefix", "/test", "--etcd"],
        [&etcds.endpoint(0), "--etcd-tls-dir", &folder, "--state", &folder, "-q"],
    ];
    let (code, out, err) = said(&fixture.run(&stranger.concat()));
    assert!(code == i32::from(exit::USAGE) && err.contains("ca.pem"), "{code} {out}{err}");
}

/// Asks for metrics on a connection that stays open; nothing where it was closed.
fn ask_on(stream: &mut TcpStream) -> Option<u16> {
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").ok()?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let code = line.split(' ').nth(1)?.parse().ok()?;
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = n.trim().parse().ok()?;
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(code)
}

#[test]
fn one_that_follows_says_who_leads() {
    let fixture = fixture();
    let Some(etcds) = Etcds::start(&fixture) else { return };
    let mut coordinators = Coordinators::start(&fixture, &etcds, 2);
    let leader = coordinators.leader(None);
    let follower = 1 - leader;
    let (url, leads) = (coordinators.url(follower), coordinators.url(leader));
    // It learns who leads within a second or so.
    let until = Instant::now() + DEADLINE;
    while !coordinators.get(follower, "/runs").is_some_and(|(_, text)| text.contains(&leads)) {
        assert!(Instant::now() < until, "{}", coordinators.logs());
        std::thread::yield_now();
    }
    let cluster = Cluster::of(&fixture, &url);
    let refusal = cluster.ask(async |mut client: Client| client.list_runs().await.unwrap_err());
    let ClientError::Refused(status) = refusal else { panic!("{refusal}") };
    assert_eq!(reason(&status), Some(Reason::NotLeader));
    assert!(status.message().contains(&leads), "{}", status.message());
    assert_eq!(coordinators.get(follower, "/healthz").unwrap().0, 200);
    let (code, text) = coordinators.get(follower, "/runs").unwrap();
    assert!(code == 503 && text.contains(&leads), "{code} {text}");
    let (code, _, err) = said(&fixture.run(&["runs", "-c", &url]));
    assert_eq!(code, i32::from(exit::UNREACHABLE), "{err}");
    // With all addresses a command finds the leader, whatever their order.
    let both = format!("{url},{leads}");
    assert_eq!(said(&fixture.run(&["runs", "-c", &both])).0, 0);
    // A connection that is kept open over the change, as a scraper's is.
    let mut kept = TcpStream::connect(("127.0.0.1", coordinators.ports[follower])).unwrap();
    kept.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(ask_on(&mut kept), Some(503));
    // One that ends in order gives its lease back: nobody waits for it to run out.
    let process = coordinators.running[leader].take().unwrap();
    process.signal(Signal::TERM);
    assert!(wait_for_end(process.pid(), DEADLINE), "{}", coordinators.logs());
    assert_eq!(coordinators.leader(None), follower);
    // It was told to end, or asks the leader now; it does not stay with one that follows.
    assert!(matches!(ask_on(&mut kept), None | Some(200)));
    let ended = Instant::now();
    assert_eq!(said(&fixture.run(&["runs", "-c", &both])).0, 0, "{:?}", ended.elapsed());
}
