//! Real processes under test: a coordinator, agents and their trainers, on this machine.
//!
//! A test does not sleep: it waits for what the run's own stream of updates says, with a deadline.
//! Tests of one situation use [`Cluster`]; [`chaos`] and [`bench`] put whole runs under faults, on
//! a [`rig::Rig`] whose network obeys too.
#![forbid(unsafe_code)]

pub mod bench;
pub mod chaos;
pub mod dice;
pub mod disks;
pub mod history;
pub mod ports;
pub mod processes;
pub mod proxy;
pub mod rig;
pub mod saves;
pub mod strace;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use lacuna_api::client::Client;
use lacuna_api::v1;
use lacuna_api::v1::watch_run_response::Update;
use lacuna_checkpoint::catalog;
use lacuna_checkpoint::layout::RunDir;
use lacuna_data::ImageShape;
use lacuna_data::pack::{Existing, PackConfig, PackSource, SHARD_BYTES_DEFAULT, pack};
use lacuna_data::synthetic::SyntheticSpec;
use rustix::process::{Pid, Signal, kill_process};

/// Longest wait for anything in a test: far above what it takes, below a hung build's patience.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// The binaries under test.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// The command line.
    pub lacuna: PathBuf,
    /// The worker.
    pub worker: PathBuf,
}

/// What stands in front of the command lines of long-lived processes: a tracer, another namespace.
#[derive(Clone, Debug, Default)]
pub struct Under {
    /// In front of coordinators.
    pub coordinator: Vec<String>,
    /// In front of agents; their trainers inherit it.
    pub worker: Vec<String>,
}

/// Puts words in front of a command line.
pub fn under(words: &[String], command: &Command) -> Command {
    let program = command.get_program();
    let mut out = match words.split_first() {
        None => Command::new(program),
        Some((first, rest)) => {
            let mut out = Command::new(first);
            out.args(rest).arg(program);
            out
        }
    };
    out.args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => out.env(key, value),
            None => out.env_remove(key),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        out.current_dir(dir);
    }
    out
}

/// A folder with a packed data set and a run spec.
pub struct Fixture {
    /// The folder; removed at the end.
    pub dir: tempfile::TempDir,
    /// What runs.
    pub binaries: Binaries,
    /// What all processes find in their environment.
    pub env: Vec<(String, String)>,
    /// What coordinators and agents run under.
    pub under: Under,
}

impl Fixture {
    /// Packs `n` made-up images of `side` pixels and three channels.
    pub fn new(binaries: Binaries, n: u64, side: u32) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let shape = ImageShape { height: side, width: side, channels: 3 };
        let source = PackSource::Synthetic(SyntheticSpec { n_images: n, shape, seed: 7 });
        let config = PackConfig {
            name: "made-up".into(),
            shard_bytes: SHARD_BYTES_DEFAULT,
            existing: Existing::Refuse,
        };
        pack(&source, &dir.path().join("data"), &config, &mut |_| {}).expect("packing works");
        Fixture { dir, binaries, env: Vec::new(), under: Under::default() }
    }

    /// Returns a path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a run spec of the micro model under `name`; `extra` replaces or adds lines of
    /// sections.
    pub fn spec(&self, name: &str, steps: u64, extra: &[(&str, &str)]) -> PathBuf {
        let mut keys: BTreeMap<&str, String> = BTreeMap::from([
            ("data.shards", "\"data\"".to_string()),
            ("data.threads", "1".to_string()),
            ("data.mean", "[0.5, 0.5, 0.5]".to_string()),
            ("data.std", "[0.25, 0.25, 0.25]".to_string()),
            ("train.duration", format!("\"{steps}step\"")),
            ("train.batch", "32".to_string()),
            ("train.slot_batch", "4".to_string()),
            ("train.digest_every", "10".to_string()),
            ("optim.base_lr", "0.01".to_string()),
            ("optim.warmup", "\"10step\"".to_string()),
            ("elastic.workers", "\"1:3\"".to_string()),
            ("checkpoint.to", "\"ckpt\"".to_string()),
            ("checkpoint.every", "[\"25step\"]".to_string()),
            ("track.every", "\"1step\"".to_string()),
        ]);
        for (key, value) in extra {
            keys.insert(key, (*value).to_string());
        }
        let mut text = format!("schema = 1\nname = \"{name}\"\nbase = \"preset:micro\"\n");
        for (key, value) in keys {
            text += &format!("{key} = {value}\n");
        }
        let path = self.path(&format!("{name}.toml"));
        std::fs::write(&path, text).expect("the spec is written");
        path
    }

    /// Returns the probe class that a run's newest checkpoint was made in.
    pub fn probe_class(&self, run: &str) -> String {
        let dir = RunDir::new(self.path("ckpt"), run.parse().expect("a run's name"));
        let entries = catalog::list(&dir).expect("checkpoints are listed");
        let newest = catalog::newest_good(&entries).expect("there is a checkpoint");
        newest.state.facts.probe_class.clone()
    }

    /// Prepares a `lacuna` command in the folder, with the worker under test.
    pub fn lacuna(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binaries.lacuna);
        command
            .args(args)
            .current_dir(self.dir.path())
            .env("LACUNA_WORKER", &self.binaries.worker)
            .env("LACUNA_FAKE_SLOT_MS", "3")
            .env_remove("LACUNA_COORDINATOR")
            .env_remove("RUST_LOG")
            .envs(self.env.iter().cloned());
        command
    }

    /// Runs a `lacuna` command to its end.
    pub fn run(&self, args: &[&str]) -> Output {
        self.lacuna(args).stdin(Stdio::null()).output().expect("the command starts")
    }
}

/// Returns exit code, stdout and stderr.
pub fn said(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// A process that is killed when dropped.
pub struct Process(Child);

impl From<Child> for Process {
    fn from(child: Child) -> Self {
        Process(child)
    }
}

impl Process {
    /// Starts a command.
    pub fn start(command: &mut Command) -> Self {
        Process(command.spawn().expect("the process starts"))
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Takes what it writes to stdout, where that is a pipe.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.0.stdout.take()
    }

    /// Waits for the end, and returns what it wrote to stderr, where that is a pipe.
    pub fn last_words(mut self) -> String {
        let mut text = String::new();
        if let Some(mut stderr) = self.0.stderr.take() {
            // What cannot be read is not shown.
            let _ = stderr.read_to_string(&mut text);
        }
        text.trim().to_string()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        send_signal(self.pid(), signal);
    }

    /// Waits for the end.
    pub fn wait(mut self) -> ExitStatus {
        self.0.wait().expect("the process can be waited for")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only where it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a signal to a process that may have ended.
pub fn send_signal(pid: u32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid as i32) {
        let _ = kill_process(pid, signal);
    }
}

/// Tells whether a process is there and has not ended.
pub fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    state.is_some_and(|state| state != 'Z')
}

/// Finds the trainer process of a worker by its command line.
pub fn trainer_pid(worker: &str, url: &str) -> Option<u32> {
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let args: Vec<&[u8]> = line.split(|&b| b == 0).collect();
        let has = |wanted: &str| args.contains(&wanted.as_bytes());
        if has("trainer") && has(worker) && has(url) {
            return Some(pid);
        }
    }
    None
}

/// A coordinator, its agents, and a client.
pub struct Cluster<'a> {
    fixture: &'a Fixture,
    /// Address of the coordinator.
    pub url: String,
    coordinator: Option<Process>,
    agents: BTreeMap<String, Process>,
    runtime: tokio::runtime::Runtime,
    listen: String,
    waits: Vec<String>,
}

impl<'a> Cluster<'a> {
    /// Starts a coordinator on a free port.
    pub fn start(fixture: &'a Fixture) -> Self {
        Self::start_with(fixture, &[])
    }

    /// Starts a coordinator with waits changed, like `stall=7s`.
    pub fn start_with(fixture: &'a Fixture, waits: &[&str]) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let mut cluster = Cluster {
            fixture,
            url: String::new(),
            coordinator: None,
            agents: BTreeMap::new(),
            runtime: runtime.expect("a runtime"),
            listen: "127.0.0.1:0".to_string(),
            waits: waits.iter().map(ToString::to_string).collect(),
        };
        cluster.start_coordinator();
        cluster
    }

    /// Agents and a client of coordinators at `url` that somebody else starts.
    pub fn of(fixture: &'a Fixture, url: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Cluster {
            fixture,
            url: url.to_string(),
            coordinator: None,
            agents: BTreeMap::new(),
            runtime: runtime.expect("a runtime"),
            listen: String::new(),
            waits: Vec::new(),
        }
    }

    /// Starts the coordinator again on the state and port of the one before.
    pub fn start_coordinator(&mut self) {
        let state = self.fixture.path("state");
        let mut command =
            self.fixture.lacuna(&["coordinator", "--local", "--listen", &self.listen]);
        for wait in &self.waits {
            command.args(["--set", wait]);
        }
        command.arg("--state").arg(state);
        let mut command = under(&self.fixture.under.coordinator, &command);
        command.stdout(Stdio::piped()).stderr(self.log("coordinator"));
        let mut process = Process::start(&mut command);
        let stdout = process.take_stdout().expect("stdout is a pipe");
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).expect("the coordinator says its address");
        let url = line.trim().strip_prefix("listening on ").expect("its address").to_string();
        self.listen = url.trim_start_matches("http://").to_string();
        self.url = url;
        self.coordinator = Some(process);
    }

    /// Kills the coordinator with SIGKILL.
    pub fn kill_coordinator(&mut self) {
        self.coordinator = None;
    }

    /// Ends the coordinator in order, with SIGTERM.
    pub fn end_coordinator(&mut self) {
        let coordinator = self.coordinator.take().expect("it runs");
        coordinator.signal(Signal::TERM);
        let limit = Duration::from_secs(30);
        assert!(processes::wait_for_end(coordinator.pid(), limit), "the coordinator ends");
    }

    /// Stops the coordinator for a while, as a laptop's lid or a stuck disk would.
    pub fn stall_coordinator(&self, time: Duration) {
        let coordinator = self.coordinator.as_ref().expect("it runs");
        coordinator.signal(Signal::STOP);
        let (_never, wait) = std::sync::mpsc::channel::<()>();
        // Nothing is sent: the time itself is what this is for.
        let _ = wait.recv_timeout(time);
        coordinator.signal(Signal::CONT);
    }

    fn log(&self, name: &str) -> Stdio {
        let path = self.fixture.path(&format!("{name}.log"));
        let file = std::fs::File::options().create(true).append(true).open(path);
        file.expect("a log file").into()
    }

    /// Starts an agent called `node` with `n` trainers.
    pub fn add(&mut self, node: &str, n: usize) {
        self.add_with(node, n, &[], &[]);
    }

    /// Starts an agent with more arguments, and with more in its environment.
    pub fn add_with(&mut self, node: &str, n: usize, args: &[&str], env: &[(&str, &str)]) {
        let worker = self.fixture.binaries.worker.clone();
        self.add_other(&worker, node, n, args, env);
    }

    /// The same with another worker binary than the fixture's.
    pub fn add_other(
        &mut self,
        worker: &Path,
        node: &str,
        n: usize,
        args: &[&str],
        env: &[(&str, &str)],
    ) {
        let mut command = Command::new(worker);
        command
            .args(["--coordinator", &self.url, "--node-name", node])
            .args(["--devices", &format!("cpu:{n}")])
            .args(args)
            .env("LACUNA_FAKE_SLOT_MS", "3")
            .envs(self.fixture.env.iter().cloned())
            .envs(env.iter().copied());
        let mut command = under(&self.fixture.under.worker, &command);
        command.stdin(Stdio::null()).stderr(self.log(node));
        self.agents.insert(node.to_string(), Process::start(&mut command));
    }

    /// Takes an agent over, to signal it or wait for it.
    pub fn take(&mut self, node: &str) -> Process {
        self.agents.remove(node).expect("the agent was started")
    }

    /// Submits a spec and returns the run's name.
    pub fn submit(&self, spec: &Path) -> String {
        let (code, text) = self.try_submit(spec);
        assert_eq!(code, 0, "{text}");
        spec.file_stem().expect("a file").to_string_lossy().into_owned()
    }

    /// Submits a spec that may be refused; returns the exit code and what was said.
    pub fn try_submit(&self, spec: &Path) -> (i32, String) {
        let path = spec.to_str().expect("a path in UTF-8");
        let output = self.fixture.run(&["submit", path, "--coordinator", &self.url]);
        let (code, out, err) = said(&output);
        (code, out + &err)
    }

    /// Returns the process id of the coordinator.
    pub fn coordinator_pid(&self) -> u32 {
        self.coordinator.as_ref().expect("it was started").pid()
    }

    /// Returns what the coordinator says of a run.
    pub fn status(&self, run: &str) -> v1::Run {
        self.runtime.block_on(async {
            let mut client = Client::connect(&self.url, DEADLINE).await.expect("a coordinator");
            client.get_run(run).await.expect("the run is there")
        })
    }

    /// Asks the coordinator something.
    pub fn ask<T>(&self, ask: impl AsyncFnOnce(Client) -> T) -> T {
        self.runtime.block_on(async {
            ask(Client::connect(&self.url, DEADLINE).await.expect("a coordinator")).await
        })
    }

    /// Gets what a browser would: the status and the body.
    pub fn get(&self, path: &str) -> (u16, Vec<u8>) {
        self.request("GET", path, "")
    }

    /// Presses a button of a page, which stands at `origin`: the status and the body.
    pub fn press(&self, path: &str, origin: &str) -> (u16, Vec<u8>) {
        self.request("POST", path, &format!("Origin: {origin}\r\nContent-Length: 0\r\n"))
    }

    fn request(&self, method: &str, path: &str, headers: &str) -> (u16, Vec<u8>) {
        let addr = self.url.trim_start_matches("http://");
        let mut stream = std::net::TcpStream::connect(addr).expect("a coordinator");
        stream.set_read_timeout(Some(DEADLINE)).expect("a socket");
        let head = format!("{method} {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n");
        let request = format!("{head}{headers}\r\n");
        stream.write_all(request.as_bytes()).expect("the request is sent");
        let mut answer: Vec<u8> = Vec::new();
        stream.read_to_end(&mut answer).expect("an answer");
        let end = answer.windows(4).position(|w| w == b"\r\n\r\n").expect("a head");
        let head = String::from_utf8_lossy(&answer[..end]).into_owned();
        let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
        (code, answer.split_off(end + 4))
    }

    /// Follows a run until `done` says so of what was seen so far.
    pub fn wait(&self, run: &str, what: &str, done: impl Fn(&Seen) -> bool) -> Seen {
        self.wait_unless(run, what, done, || false)
    }

    /// The same, also ended where `gone` says that it can never come.
    pub fn wait_unless(
        &self,
        run: &str,
        what: &str,
        done: impl Fn(&Seen) -> bool,
        gone: impl Fn() -> bool,
    ) -> Seen {
        let started = Instant::now();
        let mut seen = Seen::default();
        let follow = async {
            while !gone() {
                if let Ok(mut client) = Client::connect(&self.url, DEADLINE).await
                    && let Ok(mut updates) = client.watch_run(run, seen.seq).await
                {
                    while let Ok(Some(update)) = updates.message().await {
                        seen.take(update);
                        if done(&seen) {
                            return;
                        }
                    }
                }
                tokio::task::yield_now().await;
            }
        };
        let in_time = self.runtime.block_on(async { tokio::time::timeout(DEADLINE, follow).await });
        if in_time.is_err() {
            let logs = self.logs();
            panic!("{what}: not within {:?}\n{}\n{logs}", started.elapsed(), seen.text());
        }
        seen
    }

    /// Waits until a run has ended and all that was told of it is seen.
    pub fn wait_end(&self, run: &str) -> Seen {
        let is_over = |seen: &Seen| seen.run.exit_code.is_some() && seen.seq >= seen.run.last_seq;
        self.wait(run, "the run ends", is_over)
    }

    /// Returns the process id of a trainer.
    pub fn pid(&self, worker: &str) -> u32 {
        trainer_pid(worker, &self.url).unwrap_or_else(|| panic!("no trainer {worker}"))
    }

    /// Returns what agents and the coordinator logged.
    pub fn logs(&self) -> String {
        let mut out = String::new();
        for name in self.agents.keys().map(String::as_str).chain(["coordinator"]) {
            let path = self.fixture.path(&format!("{name}.log"));
            let text = std::fs::read_to_string(path).unwrap_or_default();
            let from = text.len().saturating_sub(6000);
            out += &format!("--- {name}\n{}\n", text.get(from..).unwrap_or(&text));
        }
        out
    }
}

/// What a run's updates have said so far.
#[derive(Default)]
pub struct Seen {
    /// Newest snapshot.
    pub run: v1::Run,
    /// Figures by step.
    pub figures: BTreeMap<u64, v1::Figures>,
    /// Steps with figures, in order.
    pub steps: Vec<u64>,
    /// Events in order.
    pub events: Vec<v1::RunEvent>,
    /// Pictures in order.
    pub pictures: Vec<v1::RunPicture>,
    seq: u64,
}

impl Seen {
    fn take(&mut self, response: v1::WatchRunResponse) {
        self.seq = self.seq.max(response.seq);
        match response.update {
            Some(Update::Snapshot(run)) => self.run = run,
            Some(Update::Figures(figures)) => {
                self.steps.push(figures.step);
                self.figures.insert(figures.step, figures);
            }
            Some(Update::Event(event)) => self.events.push(event),
            Some(Update::Picture(picture)) => self.pictures.push(picture),
            None => {}
        }
    }

    /// Returns the newest step with figures.
    pub fn step(&self) -> u64 {
        self.figures.keys().next_back().copied().unwrap_or(0)
    }

    /// Returns how many events of a kind there were.
    pub fn count(&self, kind: &str) -> usize {
        self.events.iter().filter(|event| event.kind == kind).count()
    }

    /// Returns the events as text.
    pub fn text(&self) -> String {
        let lines: Vec<String> =
            self.events.iter().map(|e| format!("{}: {}", e.kind, e.text)).collect();
        format!("step {}, {}\n{}", self.step(), self.run.state, lines.join("\n"))
    }
}
