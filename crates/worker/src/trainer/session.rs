//! The control session's driver: stream, beats, signals and the step loop around the pure machine.

use std::cell::Cell;
use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use lacuna_api::{v1, wire};
use lacuna_checkpoint::chain;
use lacuna_collective::AbortHandle;
use lacuna_control::message::{FaultKind, ToCoordinator};
use lacuna_control::worker::{Command, Event, Patience, Report, Session};
use lacuna_types::{Generation, Incarnation, Timestamp, WorkerId, exit};
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use super::job::Job;
use super::meter::memory_in_use;
use super::metrics::MetricsFile;
use super::reconstructions::Gallery;
use super::save_meter::SaveMeter;
use super::saver::Saver;
use super::shared::{Order, Shared, SharedHandle};
use super::step_loop::StepLoop;
use super::uplink::{HelloFacts, Net, QUEUE, Uplink};
use crate::args::TrainerArgs;
use crate::engine::{Backend, whole_probe};
use crate::transport::Peers;

/// Longest time for the last message to arrive before the process ends.
const LAST_WORDS_DEADLINE: Duration = Duration::from_millis(500);

/// Bytes of pictures after which no other is sent before the next beat.
const PICTURE_BYTES_A_BEAT: usize = 128 << 10;
/// Longest time for the last pictures to go out.
const PICTURES_DEADLINE: Duration = Duration::from_secs(3);

/// Signals within this time of the first one are one wish: whoever ends a whole job signals all of
/// its processes at once, and the agent asks its trainers too.
const SIGNAL_BURST: Duration = Duration::from_secs(1);

/// Runs the session of one trainer.
pub struct Driver {
    args: TrainerArgs,
    worker: WorkerId,
    incarnation: Incarnation,
    endpoint: String,
    peers: Option<Peers>,
    backend: Arc<dyn Backend>,
    machine: Session,
    started: Instant,
    shared: SharedHandle,
    orders: Option<SyncSender<Order>>,
    abort: AbortHandle,
    requests: Option<mpsc::Sender<v1::SessionRequest>>,
    reports: mpsc::Sender<Report>,
    inbox: mpsc::Receiver<Report>,
    facts: watch::Sender<HelloFacts>,
    beat: Duration,
    /// When as many pictures went out as may at a time.
    pictures_sent: Instant,
    /// Exit code of an end that no command asked for.
    exit: Option<u8>,
    /// Run, maths and data of the first welcome.
    working_for: Option<String>,
}

impl Driver {
    /// Prepares the session.
    pub fn new(
        args: TrainerArgs,
        worker: WorkerId,
        incarnation: Incarnation,
        peers: Peers,
        backend: Arc<dyn Backend>,
    ) -> Self {
        let started = Instant::now();
        let (reports, inbox) = mpsc::channel(QUEUE);
        Driver {
            // Until a welcome says how long an orphan trains on.
            machine: Session::new(
                Patience { orphan: args.give_up(), give_up: args.give_up() },
                Timestamp(0),
            ),
            worker,
            incarnation,
            endpoint: peers.listener.advertised().to_string(),
            peers: Some(peers),
            backend,
            started,
            shared: Arc::new(Shared::default()),
            orders: None,
            abort: AbortHandle::new(),
            requests: None,
            reports,
            inbox,
            facts: watch::Sender::new(HelloFacts::default()),
            beat: Duration::from_millis(500),
            pictures_sent: started - Duration::from_secs(60),
            exit: None,
            working_for: None,
            args,
        }
    }

    fn now(&self) -> Timestamp {
        Timestamp(0) + self.started.elapsed()
    }

    /// Runs until something ends the process; returns the exit code.
    pub async fn run(mut self) -> u8 {
        let (events, mut net) = mpsc::channel(QUEUE);
        let uplink = Uplink {
            url: self.args.coordinator.clone(),
            credentials: self.args.credentials.clone(),
            was_let_in: AtomicBool::new(false),
            worker: self.worker.clone(),
            incarnation: self.incarnation,
            endpoint: self.endpoint.clone(),
            device: self.backend.library(),
            facts: self.facts.subscribe(),
            events,
        };
        let uplink = tokio::spawn(uplink.run());
        let mut parent = watch_parent();
        let mut signals = Signals::new();
        let mut asked: Option<Instant> = None;
        let mut beat = beats(self.beat);
        let code = loop {
            if beat.period() != self.beat {
                beat = beats(self.beat);
            }
            let event = tokio::select! {
                event = net.recv() => match event {
                    Some(event) => self.on_net(event),
                    None => break exit::INTERNAL,
                },
                report = self.inbox.recv() => {
                    let report = report.expect("the session holds a sender itself");
                    // Before what ends an epoch or the run.
                    self.send_bad_samples();
                    self.send_pictures();
                    Some(Event::Report(report))
                }
                _ = beat.tick() => {
                    self.send_beat();
                    self.send_bad_samples();
                    self.send_pictures();
                    Some(Event::Tick)
                }
                name = signals.next() => {
                    if asked.is_some_and(|at| at.elapsed() < SIGNAL_BURST) {
                        continue;
                    }
                    asked.get_or_insert_with(Instant::now);
                    Some(Event::Drain { why: name.to_string() })
                }
                _ = &mut parent => {
                    warn!("the agent is gone");
                    break exit::FAILED;
                }
            };
            let done = match event {
                Some(event) => self.feed(event),
                None => Some(self.fatal()),
            };
            if let Some(code) = done {
                break code;
            }
        };
        self.say_last_words(&mut net).await;
        uplink.abort();
        code
    }

    /// Closes the stream behind what was said last, so that it arrives before the process ends.
    async fn say_last_words(&mut self, net: &mut mpsc::Receiver<Net>) {
        let Some(requests) = self.requests.take() else { return };
        let pictures = async {
            while let Some(picture) = self.shared.pictures.take()
                && requests.send(picture_message(picture)).await.is_ok()
            {}
        };
        // They are for people; a coordinator that is slow gets no more of them.
        let _ = tokio::time::timeout(PICTURES_DEADLINE, pictures).await;
        drop(requests);
        let closed = async {
            while let Some(event) = net.recv().await {
                if matches!(event, Net::Down { .. }) {
                    return;
                }
            }
        };
        // Whoever does not hear them learns of the end from the agent.
        let _ = tokio::time::timeout(LAST_WORDS_DEADLINE, closed).await;
    }

    /// Turns news of the connection into an event; `None` ends the process.
    fn on_net(&mut self, net: Net) -> Option<Event> {
        match net {
            Net::Open { requests } => {
                self.requests = Some(requests);
                Some(Event::Connected)
            }
            Net::Welcome(welcome) => match self.on_welcome(&welcome) {
                Ok(()) => {
                    self.shared.bad_samples.say_again();
                    self.shared.pictures.say_again();
                    Some(Event::Welcomed)
                }
                Err((code, why)) => {
                    error!("{why}");
                    self.exit = Some(code);
                    None
                }
            },
            Net::Message(message) => Some(Event::Received(message)),
            Net::Down { why, fatal } => {
                self.requests = None;
                if let Some(code) = fatal {
                    error!("{why}");
                    self.exit = Some(code);
                    return None;
                }
                info!(why, "not connected to the coordinator");
                Some(Event::Disconnected)
            }
        }
    }

    /// The first welcome says what to do; a later one must say the same.
    fn on_welcome(&mut self, welcome: &v1::Welcome) -> Result<(), (u8, String)> {
        self.beat = Duration::from_millis(welcome.beat_ms.max(10));
        self.machine.set_patience(Patience {
            orphan: Duration::from_millis(welcome.orphan_ms).min(self.args.give_up()),
            give_up: self.args.give_up(),
        });
        let said = format!("{} {} {}", welcome.run_id, welcome.spec_digest, welcome.fingerprint);
        match &self.working_for {
            None => {
                self.working_for = Some(said);
                self.start_loop(welcome)
            }
            Some(known) if *known == said => Ok(()),
            Some(_) => {
                let text =
                    format!("told to work for another run, {}: starting anew", welcome.run_id);
                Err((exit::FAILED, text))
            }
        }
    }

    /// Starts the thread that computes, for the run of the first welcome.
    fn start_loop(&mut self, welcome: &v1::Welcome) -> Result<(), (u8, String)> {
        let job = Job::from_welcome(welcome, self.args.local_world);
        let job = job.map_err(|err| (exit::USAGE, chain(&err)))?;
        info!(run_id = %job.run, worker_id = %self.worker, "working for run");
        self.facts.send_modify(|facts| facts.run = Some(job.run.clone()));
        let (orders, inbox) = sync_channel(QUEUE);
        self.orders = Some(orders);
        let start = Start {
            job,
            identity: (self.worker.clone(), self.incarnation),
            args: self.args.clone(),
            backend: self.backend.clone(),
            peers: self.peers.take().expect("one loop a process"),
            shared: self.shared.clone(),
            reports: self.reports.clone(),
        };
        let reports = self.reports.clone();
        let work = move || match start.build() {
            Ok(step_loop) => step_loop.run(inbox),
            Err((kind, detail)) => {
                let (generation, suspects) = (Generation(0), Vec::new());
                let fault = Report::Fault { generation, kind, suspects, detail };
                // Fails only when the session is gone.
                let _ = reports.blocking_send(fault);
            }
        };
        let backend = self.backend.clone();
        let guarded = move || {
            // The panic is printed already; a process without its loop must not live on.
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
                backend.end(exit::INTERNAL);
            }
        };
        let spawned = std::thread::Builder::new().name("step-loop".to_string()).spawn(guarded);
        spawned
            .map(|_| ())
            .map_err(|err| (exit::FAILED, format!("failed to start a thread: {err}")))
    }

    fn feed(&mut self, event: Event) -> Option<u8> {
        let now = self.now();
        let commands = self.machine.handle(now, event);
        let machine = &self.machine;
        let known = (machine.state(), machine.taking_part_in(), machine.is_up());
        let told = {
            let facts = self.facts.borrow();
            (facts.state, facts.generation, facts.up)
        };
        if known != told {
            self.facts.send_modify(|facts| (facts.state, facts.generation, facts.up) = known);
        }
        for command in commands {
            if let Some(code) = self.carry_out(command) {
                return Some(code);
            }
        }
        None
    }

    fn carry_out(&mut self, command: Command) -> Option<u8> {
        use std::sync::atomic::Ordering::Release;
        match command {
            Command::Send(message) => self.send(message),
            Command::Reconnect => self.requests = None,
            Command::Leave { .. } => {
                self.abort.abort("the generation is over");
                self.order(Order::Leave);
            }
            Command::Connect { plan, comm_id, sync } => {
                self.abort = AbortHandle::new();
                let abort = self.abort.clone();
                self.order(Order::Connect { plan, comm_id, sync, abort });
            }
            Command::Adopt { plan } => self.order(Order::Adopt { plan }),
            Command::Audit { generation } => self.order(Order::Audit { generation }),
            Command::Start { generation } => self.order(Order::Start { generation }),
            Command::RaiseStop { change, .. } => self.shared.stop.store(change, Release),
            Command::Save { attempt, held: false, .. } => {
                self.shared.save.store(attempt.0, Release);
            }
            Command::Save { generation, attempt, held: true } => {
                self.order(Order::Save { generation, attempt });
            }
            Command::AbortAttempt { attempt, .. } => {
                // Lowers the lane if it is still this attempt's, and ends a part under way.
                self.shared.give_up_saving(attempt);
                let _ = self.shared.save.compare_exchange(
                    attempt.0,
                    0,
                    std::sync::atomic::Ordering::AcqRel,
                    std::sync::atomic::Ordering::Relaxed,
                );
            }
            Command::Note(text) => info!("{text}"),
            Command::Exit { code, why } => {
                info!(code, "leaving: {why}");
                return Some(code);
            }
        }
        None
    }

    fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // The loop takes orders in time: at most a handful belong to one generation.
            if orders.try_send(order).is_err() {
                warn!("the step loop does not take orders");
            }
        }
    }

    fn send(&mut self, message: ToCoordinator) {
        let Some(requests) = &self.requests else { return };
        if requests.try_send(wire::to_coordinator(message)).is_err() {
            warn!("the coordinator's stream does not take messages; connecting again");
            self.requests = None;
        }
    }

    fn send_beat(&mut self) {
        if self.orders.is_some() {
            let beat = self.shared.beat();
            self.send(ToCoordinator::Beat(beat));
        }
    }

    /// Sends bad samples while the stream has room: half of it is for what the group waits for.
    fn send_bad_samples(&mut self) {
        let room = |requests: &mpsc::Sender<_>| requests.capacity() > QUEUE / 2;
        while self.requests.as_ref().is_some_and(room)
            && let Some(report) = self.shared.bad_samples.take()
        {
            self.send(ToCoordinator::BadSamples(report));
        }
    }

    /// Sends some pictures where nothing else waits: signs of life must not queue behind them.
    fn send_pictures(&mut self) {
        let idle = |requests: &&mpsc::Sender<_>| requests.capacity() == QUEUE;
        let Some(requests) = self.requests.as_ref().filter(idle) else { return };
        if self.pictures_sent.elapsed() < self.beat {
            return;
        }
        let mut n_bytes = 0;
        while n_bytes < PICTURE_BYTES_A_BEAT
            && requests.capacity() > QUEUE / 2
            && let Some(picture) = self.shared.pictures.take()
        {
            n_bytes += picture.png.len();
            // There is room; a stream that broke is noticed by what must arrive.
            let _ = requests.try_send(picture_message(picture));
        }
        if n_bytes >= PICTURE_BYTES_A_BEAT {
            self.pictures_sent = Instant::now();
        }
    }

    fn fatal(&self) -> u8 {
        self.exit.unwrap_or(exit::INTERNAL)
    }
}

fn picture_message(picture: v1::Picture) -> v1::SessionRequest {
    v1::SessionRequest { message: Some(v1::session_request::Message::Picture(picture)) }
}

/// What the step loop's thread needs to begin.
struct Start {
    job: Job,
    identity: (WorkerId, Incarnation),
    args: TrainerArgs,
    backend: Arc<dyn Backend>,
    peers: Peers,
    shared: SharedHandle,
    reports: mpsc::Sender<Report>,
}

impl Start {
    /// Opens the data, builds the engine, probes it, and says that this worker is warm.
    fn build(self) -> Result<StepLoop, (FaultKind, String)> {
        let storage = |err: &dyn std::error::Error| (FaultKind::Storage, chain_of(err));
        let local = |err: &dyn std::error::Error| (FaultKind::Local, chain_of(err));
        let dataset = self.job.open_data(self.args.local_world).map_err(|err| storage(&err))?;
        let gallery = Gallery::open(&self.job, &dataset);
        let loader = self
            .job
            .loader(dataset, self.args.local_world, self.shared.clone())
            .map_err(|err| storage(&err))?;
        let meter = SaveMeter::default();
        let metrics = self.args.metrics_dir.as_deref().map(|dir| {
            let run = self.job.run.to_string();
            let names = (run.as_str(), self.args.worker_id.as_str());
            MetricsFile::start(dir, names, loader.watch(), meter.clone())
        });
        let engine_spec = self.job.engine_spec(&self.args.device);
        let mut engine = self.backend.engine(&engine_spec).map_err(|err| local(&err))?;
        let probe = whole_probe(engine.as_mut()).map_err(|err| local(&err))?;
        // It is for people: a device without room for it can train all the same.
        let yardstick = engine.yardstick().unwrap_or_else(|err| {
            warn!(error = lacuna_checkpoint::chain(&err), "no MFU: the device's rate is not known");
            None
        });
        self.shared.uses_memory(memory_in_use(engine.as_ref()));
        info!(device = engine.describe(), probe = format!("{probe:016x}"), "engine ready");
        let saver =
            Saver::start(self.job.dir.clone(), self.job.write_rate(), self.reports.clone(), meter);
        let saver = saver.map_err(|err| local(&err))?;
        // Fails only when the session is gone.
        let _ = self.reports.blocking_send(Report::Warm { probe });
        Ok(StepLoop {
            job: self.job,
            identity: self.identity,
            engine,
            loader,
            saver,
            peers: self.peers,
            shared: self.shared,
            reports: self.reports,
            counters: None,
            raised_save: 0,
            metrics,
            gallery,
            yardstick,
            n_late: Cell::default(),
        })
    }
}

fn chain_of(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut next = err.source();
    while let Some(cause) = next {
        text += &format!(": {cause}");
        next = cause.source();
    }
    text
}

/// Ticks for signs of life; after a pause of this process they do not come in a burst.
fn beats(period: Duration) -> tokio::time::Interval {
    let mut beats = tokio::time::interval(period);
    beats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    beats
}

/// Completes when standard input closes: the agent holds its other end.
fn watch_parent() -> tokio::sync::oneshot::Receiver<()> {
    let (gone, notice) = tokio::sync::oneshot::channel();
    let wait = move || {
        let mut sink = [0u8; 64];
        let mut stdin = std::io::stdin().lock();
        while matches!(stdin.read(&mut sink), Ok(n) if n > 0) {}
        // Fails only when the session is gone.
        let _ = gone.send(());
    };
    // Without the thread the notice never comes, and the process lives until told otherwise.
    if let Err(err) = std::thread::Builder::new().name("parent-watch".to_string()).spawn(wait) {
        warn!(error = %err, "cannot watch the agent");
    }
    notice
}

/// Signals that ask a worker to go: the usual two, and the two that schedulers send some time
/// before they take a machine away.
pub(crate) struct Signals {
    term: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    user_1: tokio::signal::unix::Signal,
    user_2: tokio::signal::unix::Signal,
}

impl Signals {
    pub(crate) fn new() -> Self {
        use tokio::signal::unix::{SignalKind, signal};
        let install = |kind| signal(kind).expect("the runtime handles signals");
        Signals {
            term: install(SignalKind::terminate()),
            interrupt: install(SignalKind::interrupt()),
            user_1: install(SignalKind::user_defined1()),
            user_2: install(SignalKind::user_defined2()),
        }
    }

    pub(crate) async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.user_1.recv() => "SIGUSR1",
            _ = self.user_2.recv() => "SIGUSR2",
        }
    }
}
