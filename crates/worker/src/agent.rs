//! The agent: one per node. Starts a trainer per device, reports how they end, starts them again.
//!
//! It holds no device and computes nothing, so it outlives whatever its trainers die of. Trainers
//! hold a pipe from it and end when it closes: a dead agent leaves no orphan.

use std::collections::VecDeque;
use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use lacuna_api::client::connect;
use lacuna_api::tls::TlsError;
use lacuna_api::v1;
use lacuna_api::v1::worker_service_client::WorkerServiceClient;
use lacuna_checkpoint::chain;
use lacuna_types::{BuildId, exit};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tracing::{error, info, warn};
use v1::agent_request::Message;

use crate::args::{AgentArgs, CredentialArgs, OnDrain};
use crate::devices::devices;
use crate::engine::Backend;
use crate::entry::CodedError;
use crate::trainer::session::Signals;
use crate::trainer::uplink::{hopeless, refused};

mod slurm;

/// First and longest pause before a trainer that died is started again.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// A trainer that lived this long was healthy: the pause starts from the beginning.
const HEALTHY: Duration = Duration::from_secs(30);
/// Lines of a trainer's stderr that are kept for its report.
const TAIL_LINES: usize = 20;
/// How long trainers get to leave their run before they are killed.
const LEAVE_DEADLINE: Duration = Duration::from_secs(120);
/// Bound of the report queue: lines of trainers, and a report of each one's end.
const QUEUE: usize = 1024;
/// Longest line of a trainer, bytes; a longer one is two.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// Longest line of a trainer that the coordinator gets.
const LINE_CHARS_MAX: usize = 1000;

/// Runs an agent until its trainers have nothing more to do; returns the exit code.
pub fn run(args: AgentArgs, backend: Arc<dyn Backend>) -> anyhow::Result<u8> {
    let usage = |message: String| CodedError { code: exit::USAGE, message };
    let devices = devices(&args)?;
    let credentials = args.credentials.read().map_err(|err| match &err {
        TlsError::OutOfDate { .. } => CodedError { code: exit::UNAUTHORISED, message: chain(&err) },
        _ => usage(chain(&err)),
    })?;
    if !args.bind_addr.ip().is_loopback() && credentials.is_empty() {
        let message = format!(
            "refusing to listen on {}: the coordinator, which tells members of a group their key, \
             would give it to everybody who can reach it; give `--token-file` or `--tls-dir`, or \
             use a loopback `--bind-addr`",
            args.bind_addr
        );
        return Err(usage(message).into());
    }
    if args.on_drain == OnDrain::SlurmRequeue && args.slurm_job.is_none() {
        let message = "--on-drain slurm-requeue: this is not a Slurm job (SLURM_JOB_ID is not set)";
        return Err(usage(message.to_string()).into());
    }
    let node = args.node_name.clone().unwrap_or_else(host_name);
    let check = format!("{node}:{}", devices[0]).parse::<lacuna_types::WorkerId>();
    check.map_err(|err| usage(format!("--node-name: {err}")))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("start the agent's thread")?;
    Ok(runtime.block_on(Agent { args, node, devices, backend }.run()))
}

fn host_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    name.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '.', "-")
}

struct Agent {
    args: AgentArgs,
    node: String,
    devices: Vec<String>,
    backend: Arc<dyn Backend>,
}

/// How a device's supervision ended.
struct DeviceEnd {
    device: String,
    code: u8,
}

impl Agent {
    async fn run(self) -> u8 {
        let (reports, outbox) = mpsc::channel(QUEUE);
        let (fatal, mut fatal_code) = mpsc::channel(1);
        let (kills, killed) = tokio::sync::broadcast::channel(QUEUE);
        let uplink = Uplink {
            kills: kills.clone(),
            url: self.args.coordinator.clone(),
            credentials: self.args.credentials.clone(),
            was_let_in: AtomicBool::new(false),
            node: self.node.clone(),
            devices: self.devices.clone(),
            fatal,
        };
        let uplink = tokio::spawn(uplink.run(outbox));
        let (stop, stopping) = tokio::sync::watch::channel(Stop::No);
        let mut devices = tokio::task::JoinSet::new();
        for device in &self.devices {
            let supervisor =
                self.supervisor(device, reports.clone(), stopping.clone(), killed.resubscribe());
            devices.spawn(supervisor.run());
        }
        drop(killed);
        let mut parent = self.args.with_parent.then(watch_stdin);
        let mut walltime = std::pin::pin!(drain_time(self.args.drain_after()));
        let mut signals = Signals::new();
        let mut ends: Vec<DeviceEnd> = Vec::new();
        while ends.len() < self.devices.len() {
            tokio::select! {
                Some(end) = devices.join_next() => match end {
                    Ok(end) => ends.push(end),
                    Err(err) => {
                        error!(error = %err, "a supervisor died");
                        return exit::INTERNAL;
                    }
                },
                name = signals.next() => {
                    info!("{name}: asking trainers to leave");
                    let again = *stop.borrow() != Stop::No;
                    stop.send_replace(if again { Stop::Kill } else { Stop::Leave });
                }
                () = &mut walltime, if *stop.borrow() == Stop::No => {
                    info!("this machine's time is nearly over: asking trainers to leave");
                    stop.send_replace(Stop::Leave);
                }
                Some(code) = fatal_code.recv() => {
                    stop.send_replace(Stop::Kill);
                    while devices.join_next().await.is_some() {}
                    return code;
                }
                () = gone(&mut parent) => {
                    warn!("the parent is gone");
                    stop.send_replace(Stop::Kill);
                    while devices.join_next().await.is_some() {}
                    return exit::FAILED;
                }
            }
        }
        uplink.abort();
        let code = self.verdict(&ends);
        let asked_to_leave = *stop.borrow() != Stop::No;
        if let Some(job) = self.args.job_to_requeue().filter(|_| asked_to_leave) {
            slurm::requeue(job).await;
        }
        code
    }

    /// The worst of what the devices ended with; a drain counts if nothing failed.
    fn verdict(&self, ends: &[DeviceEnd]) -> u8 {
        let rank = |code: u8| match code {
            exit::OK => 0,
            exit::DRAINED => 1,
            exit::INTERRUPTED => 2,
            _ => 3,
        };
        for end in ends {
            info!(node = %self.node, device = end.device, code = end.code, "device done");
        }
        ends.iter().map(|end| end.code).max_by_key(|code| rank(*code)).unwrap_or(exit::OK)
    }

    fn supervisor(
        &self,
        device: &str,
        reports: mpsc::Sender<Message>,
        stopping: tokio::sync::watch::Receiver<Stop>,
        kills: tokio::sync::broadcast::Receiver<v1::NodeKill>,
    ) -> Supervisor {
        Supervisor {
            args: self.args.clone(),
            worker_id: format!("{}:{device}", self.node),
            device: device.to_string(),
            local_world: self.devices.len(),
            env: self.backend.trainer_env(device),
            env_removed: self.backend.trainer_env_removed(),
            reports,
            stopping,
            kills,
        }
    }
}

/// Completes when the trainers should leave because the machine's time ends; never without one.
async fn drain_time(after: Option<Duration>) {
    match after {
        Some(after) => tokio::time::sleep(after).await,
        None => std::future::pending().await,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    No,
    Leave,
    Kill,
}

async fn gone(parent: &mut Option<tokio::sync::oneshot::Receiver<()>>) {
    match parent {
        Some(notice) => {
            // An error means that the watching thread is gone, which says the same.
            let _ = notice.await;
        }
        None => std::future::pending().await,
    }
}

fn watch_stdin() -> tokio::sync::oneshot::Receiver<()> {
    let (gone, notice) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let mut sink = [0u8; 64];
        let mut stdin = std::io::stdin().lock();
        while matches!(stdin.read(&mut sink), Ok(n) if n > 0) {}
        // Fails only when the agent is gone.
        let _ = gone.send(());
    });
    notice
}

/// Keeps one device's trainer alive.
struct Supervisor {
    args: AgentArgs,
    worker_id: String,
    device: String,
    local_world: usize,
    env: Vec<(String, String)>,
    /// What it does not inherit.
    env_removed: &'static [&'static str],
    reports: mpsc::Sender<Message>,
    stopping: tokio::sync::watch::Receiver<Stop>,
    kills: tokio::sync::broadcast::Receiver<v1::NodeKill>,
}

impl Supervisor {
    async fn run(mut self) -> DeviceEnd {
        let mut pause = BACK_OFF.0;
        loop {
            let started = Instant::now();
            let code = self.one_life().await;
            if let Some(code) = self.final_code(code) {
                return DeviceEnd { device: self.device, code };
            }
            pause = if started.elapsed() > HEALTHY { BACK_OFF.0 } else { pause };
            info!(worker_id = self.worker_id, ?pause, "starting the trainer again");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = self.stopping.wait_for(|stop| *stop != Stop::No) => {
                    return DeviceEnd { device: self.device, code: exit::DRAINED };
                }
            }
            pause = (pause * 2).min(BACK_OFF.1);
        }
    }

    /// Decides what an exit code means for this device; `None` starts the trainer again.
    fn final_code(&self, code: Option<u8>) -> Option<u8> {
        let stopping = *self.stopping.borrow() != Stop::No;
        match code {
            Some(exit::USAGE | exit::VERSION | exit::UNAUTHORISED | exit::UNFIT) => code,
            Some(exit::UNREACHABLE | exit::INTERRUPTED) => code,
            // Drained: taken out on purpose, so it stays out.
            Some(exit::DRAINED) => code,
            Some(exit::OK) if stopping || self.args.once => code,
            Some(exit::IO | exit::FAILED) if self.args.once => code,
            _ if stopping => Some(code.unwrap_or(exit::DRAINED)),
            _ => None,
        }
    }

    /// Starts a trainer and waits for its end; `None` if a signal ended it.
    async fn one_life(&mut self) -> Option<u8> {
        let incarnation = draw_incarnation();
        let mut child = match self.spawn(incarnation) {
            Ok(child) => child,
            Err(err) => {
                error!(worker_id = self.worker_id, error = %err, "failed to start a trainer");
                return Some(exit::FAILED);
            }
        };
        let stderr = child.stderr.take().expect("stderr is a pipe");
        // The trainer lives as long as this end is open; waiting for it would close it otherwise.
        let _lifeline = child.stdin.take();
        let forward = Forward { worker_id: self.worker_id.clone(), reports: self.reports.clone() };
        let tail = tokio::spawn(forward.run(stderr));
        let status = self.wait(&mut child, incarnation).await;
        let tail = tail.await.unwrap_or_default();
        let how = describe(status);
        info!(worker_id = self.worker_id, how, "trainer ended");
        let report = v1::TrainerExited {
            worker_id: self.worker_id.clone(),
            incarnation: Some(incarnation),
            how,
            stderr_tail: tail,
        };
        if self.reports.try_send(Message::TrainerExited(report)).is_err() {
            warn!("the report queue is full; the coordinator will notice by itself");
        }
        status.and_then(|status| status.code()).and_then(|code| u8::try_from(code).ok())
    }

    fn spawn(&self, incarnation: u64) -> std::io::Result<Child> {
        // This very build, even if its file was replaced since.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0(std::env::args_os().next().unwrap_or_else(|| "lacuna-worker".into()))
            .arg("trainer")
            .args(["--coordinator", &self.args.coordinator])
            .args(["--worker-id", &self.worker_id])
            .args(["--incarnation", &incarnation.to_string()])
            .args(["--device", &self.device])
            .args(["--local-world", &self.local_world.to_string()])
            .args(["--bind-addr", &self.args.bind_addr.to_string()])
            .args(["--give-up-seconds", &self.args.give_up_seconds.to_string()])
            .args(self.args.credentials.to_args())
            .args(self.args.transport.to_args())
            .envs(self.env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            // Its own group: Ctrl-C reaches the agent alone, which asks trainers in order.
            .process_group(0)
            .kill_on_drop(true);
        for key in self.env_removed {
            command.env_remove(key);
        }
        if let Some(addr) = self.args.advertise_addr {
            command.args(["--advertise-addr", &addr.to_string()]);
        }
        if let Some(dir) = &self.args.metrics_dir {
            command.arg("--metrics-dir").arg(dir);
        }
        command.spawn()
    }

    /// Waits for the end, asking the trainer to leave or killing it when the agent stops.
    async fn wait(&mut self, child: &mut Child, incarnation: u64) -> Option<ExitStatus> {
        let mut deadline: Option<tokio::time::Instant> = None;
        loop {
            let expired = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                status = child.wait() => return status.ok(),
                changed = self.stopping.changed() => {
                    let stop = if changed.is_ok() { *self.stopping.borrow() } else { Stop::Kill };
                    match stop {
                        Stop::No => {}
                        Stop::Leave => {
                            terminate(child);
                            deadline = Some(tokio::time::Instant::now() + LEAVE_DEADLINE);
                        }
                        Stop::Kill => {
                            // Fails only where it ended by itself.
                            let _ = child.start_kill();
                        }
                    }
                }
                () = killed(&mut self.kills, &self.worker_id, incarnation) => {
                    // Fails only where it ended by itself.
                    let _ = child.start_kill();
                }
                () = expired => {
                    warn!(worker_id = self.worker_id, "trainer did not leave in time; killing it");
                    // Fails only where it ended by itself.
                    let _ = child.start_kill();
                    deadline = None;
                }
            }
        }
    }
}

/// Completes when the coordinator wants this life of this worker killed.
async fn killed(
    kills: &mut tokio::sync::broadcast::Receiver<v1::NodeKill>,
    worker_id: &str,
    incarnation: u64,
) {
    use tokio::sync::broadcast::error::RecvError;
    loop {
        match kills.recv().await {
            Ok(kill) if kill.worker_id == worker_id && kill.incarnation == incarnation => {
                warn!(worker_id, why = kill.why, "told to kill the trainer");
                return;
            }
            // For another device or an earlier life. Who missed one is left out all the same.
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            // The agent is going; `stopping` says how.
            Err(RecvError::Closed) => return std::future::pending().await,
        }
    }
}

fn terminate(child: &Child) {
    let pid = child.id().and_then(|id| rustix::process::Pid::from_raw(id as i32));
    if let Some(pid) = pid {
        // Fails only where it ended by itself.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}

fn draw_incarnation() -> u64 {
    let mut bytes = [0u8; 8];
    getrandom::fill(&mut bytes).expect("the system has a random source");
    u64::from_ne_bytes(bytes)
}

/// Says how a process ended, for people.
fn describe(status: Option<ExitStatus>) -> String {
    match status {
        None => "its end could not be seen".to_string(),
        Some(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("killed by signal {signal}"),
            (None, None) => status.to_string(),
        },
    }
}

/// Passes a trainer's stderr on: to this process's, each line behind its name, and to the
/// coordinator.
struct Forward {
    worker_id: String,
    reports: mpsc::Sender<Message>,
}

impl Forward {
    /// Runs to the end of the stream; returns its last lines.
    async fn run(self, stderr: tokio::process::ChildStderr) -> String {
        let mut stderr = BufReader::new(stderr);
        let mut bytes: Vec<u8> = Vec::new();
        let mut tail: VecDeque<String> = VecDeque::with_capacity(TAIL_LINES);
        let mut missed = 0;
        loop {
            bytes.clear();
            // Whatever it writes is read, or it would be stopped by a full pipe.
            let mut piece = (&mut stderr).take(LINE_BYTES_MAX);
            if !matches!(piece.read_until(b'\n', &mut bytes).await, Ok(1..)) {
                break;
            }
            let text = String::from_utf8_lossy(&bytes);
            let line = text.trim_end_matches(['\n', '\r']).to_string();
            eprintln!("[{}] {line}", self.worker_id);
            self.report(&line, &mut missed);
            if tail.len() == TAIL_LINES {
                tail.pop_front();
            }
            tail.push_back(line);
        }
        Vec::from(tail).join("\n")
    }

    /// Queues a line for the coordinator while there is room: half of the queue is for what it
    /// must hear. What does not fit is counted.
    fn report(&self, line: &str, missed: &mut u64) {
        let text: String = line.chars().take(LINE_CHARS_MAX).collect();
        let log = v1::TrainerLog { worker_id: self.worker_id.clone(), text, missed: *missed };
        let has_room = self.reports.capacity() > QUEUE / 2;
        let queued = has_room && self.reports.try_send(Message::TrainerLog(log)).is_ok();
        *missed = if queued { 0 } else { *missed + 1 };
    }
}

/// The agent's stream to the coordinator.
struct Uplink {
    url: String,
    /// Read anew for each connection: files may have been replaced since.
    credentials: CredentialArgs,
    was_let_in: AtomicBool,
    node: String,
    devices: Vec<String>,
    fatal: mpsc::Sender<u8>,
    kills: tokio::sync::broadcast::Sender<v1::NodeKill>,
}

impl Uplink {
    async fn run(self, mut outbox: mpsc::Receiver<Message>) {
        let mut pause = BACK_OFF.0;
        // A report that could not be sent goes first on the next stream.
        let mut pending: Option<Message> = None;
        loop {
            match self.once(&mut outbox, &mut pending).await {
                Ok(()) => pause = BACK_OFF.0,
                Err((why, Some(code))) => {
                    error!("{why}");
                    // The agent has its code already.
                    let _ = self.fatal.try_send(code);
                    return;
                }
                Err((why, None)) => {
                    info!(why, "agent not connected to the coordinator");
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn once(
        &self,
        outbox: &mut mpsc::Receiver<Message>,
        pending: &mut Option<Message>,
    ) -> Result<(), (String, Option<u8>)> {
        let credentials = self.credentials.read().map_err(|err| (chain(&err), None))?;
        let opened = connect(&self.url, Duration::from_secs(5), &credentials).await;
        let channel = opened.map_err(|err| {
            (chain(&err), hopeless(&err, self.was_let_in.load(Ordering::Relaxed)))
        })?;
        let (requests, outgoing) = mpsc::channel(QUEUE);
        // The queue is new and has room.
        let _ = requests.try_send(self.hello());
        let mut client = WorkerServiceClient::new(channel);
        let opened = client.agent(ReceiverStream::new(outgoing)).await;
        let mut answers = opened
            .map_err(|status| {
                let (why, fatal, _) = refused(&status, self.was_let_in.load(Ordering::Relaxed));
                (why, fatal)
            })?
            .into_inner();
        self.was_let_in.store(true, Ordering::Relaxed);
        loop {
            tokio::select! {
                // Beside listening: a coordinator that reads slowly is heard all the same.
                place = requests.reserve(), if pending.is_some() => match place {
                    Ok(place) => place.send(v1::AgentRequest { message: pending.take() }),
                    Err(_) => return Ok(()),
                },
                report = outbox.recv(), if pending.is_none() => match report {
                    Some(report) => *pending = Some(report),
                    None => return Ok(()),
                },
                answer = answers.message() => match answer {
                    Ok(Some(answer)) => {
                        if let Some(v1::agent_response::Message::Kill(kill)) = answer.message {
                            // Without supervisors there is nothing left to kill.
                            let _ = self.kills.send(kill);
                        }
                    }
                    Ok(None) => return Ok(()),
                    Err(status) => {
                        let (why, fatal, _) = refused(&status, true);
                        return Err((why, fatal));
                    }
                },
            }
        }
    }

    fn hello(&self) -> v1::AgentRequest {
        let hello = v1::NodeHello {
            node: self.node.clone(),
            build: Some(BuildId::this().into()),
            devices: self.devices.clone(),
        };
        v1::AgentRequest { message: Some(Message::Hello(hello)) }
    }
}
