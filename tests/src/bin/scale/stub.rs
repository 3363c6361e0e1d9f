//! A trainer without engine, data or peers: the real session machine on a real stream, and a step
//! loop whose steps are a matter of time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lacuna_api::{v1, wire};
use lacuna_control::message::{Beat, Phase, StepMark, ToCoordinator};
use lacuna_control::plan::{Origin, Plan, Sync};
use lacuna_control::worker::{Command, Event, Patience, Report, Session};
use lacuna_types::{Generation, Incarnation, RunId, Step, Timestamp, WorkerId};
use lacuna_worker::trainer::uplink::{HelloFacts, Net, QUEUE, Uplink};
use tokio::sync::{mpsc, oneshot, watch};

/// Steps between two marks, as `track.every` and `train.digest_every` of the runs say.
pub const MARK_EVERY: u64 = 2;
/// Probe class of every stub.
const PROBE: u64 = 0x5ca1e;
/// No test lasts as long.
const PATIENCE: Duration = Duration::from_secs(3600);

/// What a stub tells the conductor.
#[derive(Debug)]
pub enum News {
    /// The coordinator has given it to a run.
    Welcomed,
    /// It may train.
    Started {
        /// Which run.
        run: String,
        /// Which generation.
        generation: Generation,
        /// How many members that has.
        world: usize,
        /// When it was told.
        at: Instant,
    },
}

/// How a stub ends.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// As by SIGKILL: its connection breaks.
    Die,
    /// As by SIGSTOP: its connection stays, and nothing comes.
    Silence,
}

/// When the members of each generation began: they share their steps, as a sum would make them.
#[derive(Default)]
pub struct Clocks(Mutex<BTreeMap<(String, Generation), Instant>>);

impl Clocks {
    fn begin(&self, run: &str, generation: Generation) -> Instant {
        let mut begun = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *begun.entry((run.to_string(), generation)).or_insert_with(Instant::now)
    }
}

/// What all stubs of a fleet share.
#[derive(Clone)]
pub struct Shared {
    /// Address of the coordinator.
    pub url: String,
    /// Length of a step.
    pub step: Duration,
    /// When generations began.
    pub clocks: Arc<Clocks>,
    /// True from when devices count as warm.
    pub warm: watch::Receiver<bool>,
    /// Where news goes.
    pub news: mpsc::Sender<News>,
}

/// A generation that trains.
struct Training {
    generation: Generation,
    from: Step,
    since: Instant,
    marked: u64,
}

/// One stub.
pub struct Stub {
    shared: Shared,
    machine: Session,
    born: Instant,
    run: String,
    requests: Option<mpsc::Sender<v1::SessionRequest>>,
    facts: watch::Sender<HelloFacts>,
    beat: Duration,
    plan: Option<(Arc<Plan>, Step)>,
    training: Option<Training>,
}

impl Stub {
    /// Runs one life of a worker until `end` says how it is over.
    pub async fn live(
        shared: Shared,
        worker: WorkerId,
        incarnation: Incarnation,
        mut end: oneshot::Receiver<End>,
    ) {
        let (events, net) = mpsc::channel(QUEUE);
        let facts = watch::Sender::new(HelloFacts::default());
        let uplink = Uplink {
            url: shared.url.clone(),
            credentials: Default::default(),
            was_let_in: Default::default(),
            worker,
            incarnation,
            endpoint: "10.128.128.128:40000".to_string(),
            device: "stub".to_string(),
            facts: facts.subscribe(),
            events,
        };
        let patience = Patience { orphan: PATIENCE, give_up: PATIENCE };
        let stub = Stub {
            shared,
            machine: Session::new(patience, Timestamp(0)),
            born: Instant::now(),
            run: String::new(),
            requests: None,
            facts,
            beat: Duration::from_millis(500),
            plan: None,
            training: None,
        };
        // Held beyond the loop: one that falls silent keeps its connection.
        let mut uplink = std::pin::pin!(uplink.run());
        let mut work = std::pin::pin!(stub.work(net));
        let end = tokio::select! {
            () = &mut uplink => return,
            () = &mut work => return,
            end = &mut end => end.unwrap_or(End::Die),
        };
        if matches!(end, End::Silence) {
            std::future::pending().await
        }
    }

    async fn work(mut self, mut net: mpsc::Receiver<Net>) {
        let mut warm = self.shared.warm.clone();
        let mut is_warm = false;
        let mut beat = tokio::time::interval(self.beat);
        loop {
            if beat.period() != self.beat {
                beat = tokio::time::interval(self.beat);
            }
            let mark_at = self.mark_at();
            let event = tokio::select! {
                news = net.recv() => match news {
                    Some(news) => self.on_net(news).await,
                    None => return,
                },
                told = async { warm.wait_for(|warm| *warm).await.is_ok() }, if !is_warm => {
                    if !told {
                        return;
                    }
                    is_warm = true;
                    Some(Event::Report(Report::Warm { probe: PROBE }))
                }
                () = tokio::time::sleep_until(mark_at.into()), if self.training.is_some() => {
                    self.mark().map(|mark| Event::Report(Report::Mark(mark)))
                }
                _ = beat.tick() => {
                    if !self.run.is_empty() {
                        let beat = self.beat();
                        self.send(ToCoordinator::Beat(beat));
                    }
                    Some(Event::Tick)
                }
            };
            if let Some(event) = event
                && self.feed(event).await.is_err()
            {
                return;
            }
        }
    }

    async fn on_net(&mut self, net: Net) -> Option<Event> {
        match net {
            Net::Open { requests } => {
                self.requests = Some(requests);
                Some(Event::Connected)
            }
            Net::Welcome(welcome) => {
                self.beat = Duration::from_millis(welcome.beat_ms);
                self.run.clone_from(&welcome.run_id);
                let run: Option<RunId> = welcome.run_id.parse().ok();
                self.facts.send_modify(|facts| facts.run = run);
                // Fails only when the conductor is gone.
                let _ = self.shared.news.send(News::Welcomed).await;
                Some(Event::Welcomed)
            }
            Net::Message(message) => Some(Event::Received(message)),
            Net::Down { why, .. } => {
                eprintln!("a stream is gone: {why}");
                self.requests = None;
                Some(Event::Disconnected)
            }
        }
    }

    /// Feeds the machine, and answers at once what it orders; `Err` ends the stub.
    async fn feed(&mut self, event: Event) -> Result<(), ()> {
        let mut pending = vec![event];
        while let Some(event) = pending.pop() {
            let now = Timestamp(0) + self.born.elapsed();
            for command in self.machine.handle(now, event) {
                if let Some(report) = self.carry_out(command).await? {
                    pending.push(Event::Report(report));
                }
            }
        }
        let machine = &self.machine;
        let known = (machine.state(), machine.taking_part_in(), machine.is_up());
        self.facts.send_if_modified(|facts| {
            let told = (facts.state, facts.generation, facts.up);
            (facts.state, facts.generation, facts.up) = known;
            told != known
        });
        Ok(())
    }

    async fn carry_out(&mut self, command: Command) -> Result<Option<Report>, ()> {
        match command {
            Command::Send(message) => self.send(message),
            Command::Reconnect => self.requests = None,
            Command::Leave { .. } => {
                let state = self.state();
                self.training = None;
                return Ok(Some(Report::Down { state }));
            }
            Command::Connect { plan, sync, .. } => return Ok(Some(self.synchronise(plan, sync))),
            Command::Start { generation } => self.start(generation).await,
            Command::Adopt { plan } => {
                let state = self.state().unwrap_or_default();
                let generation = plan.generation;
                self.plan = Some((plan, state));
                return Ok(Some(Report::Adopted { generation, state }));
            }
            Command::Audit { generation } => {
                return Ok(Some(Report::Audited { generation, probe: PROBE }));
            }
            Command::Save { generation, attempt, .. } => {
                let detail = "a stub has nothing to save".to_string();
                return Ok(Some(Report::PartFailed { generation, attempt, detail }));
            }
            // No joins, drains or stops happen here, so no group stands still.
            Command::RaiseStop { .. } | Command::AbortAttempt { .. } | Command::Note(_) => {}
            Command::Exit { code, why } => {
                eprintln!("a stub was told to exit with {code}: {why}");
                return Err(());
            }
        }
        Ok(None)
    }

    fn synchronise(&mut self, plan: Arc<Plan>, sync: Sync) -> Report {
        assert!(!matches!(sync.origin, Origin::Checkpoint { .. }), "stubs save nothing");
        let (generation, step) = (plan.generation, sync.resume_step);
        self.plan = Some((plan, step));
        Report::Synced { generation, step, digest: digest(step.0) }
    }

    async fn start(&mut self, generation: Generation) {
        let at = Instant::now();
        let Some((plan, from)) = &self.plan else { return };
        let (from, world) = (*from, plan.world());
        let since = self.shared.clocks.begin(&self.run, generation);
        self.training = Some(Training { generation, from, since, marked: from.0 });
        let run = self.run.clone();
        // Fails only when the conductor is gone.
        let _ = self.shared.news.send(News::Started { run, generation, world, at }).await;
    }

    fn send(&mut self, message: ToCoordinator) {
        if let Some(requests) = &self.requests
            && requests.try_send(wire::to_coordinator(message)).is_err()
        {
            eprintln!("the coordinator does not take messages");
            self.requests = None;
        }
    }

    /// Steps done, as the time says.
    fn state(&self) -> Option<Step> {
        let before = self.plan.as_ref().map(|(_, step)| *step);
        self.training.as_ref().map(|t| self.step_of(t)).or(before)
    }

    fn step_of(&self, training: &Training) -> Step {
        let steps = training.since.elapsed().as_nanos() / self.shared.step.as_nanos();
        Step(training.from.0 + steps as u64)
    }

    fn mark_at(&self) -> Instant {
        let Some(training) = &self.training else { return self.born };
        let next = (training.marked / MARK_EVERY + 1) * MARK_EVERY - training.from.0;
        training.since + self.shared.step * next as u32
    }

    fn mark(&mut self) -> Option<StepMark> {
        let training = self.training.as_mut()?;
        training.marked = (training.marked / MARK_EVERY + 1) * MARK_EVERY;
        Some(StepMark {
            generation: training.generation,
            step: Step(training.marked),
            loss: 1.0 / training.marked as f64,
            lr: 1e-3,
            grad_norm: 1.0,
            images_per_second: 4096.0 / self.shared.step.as_secs_f64(),
            data_wait: 0.01,
            digest: Some(digest(training.marked)),
            skipped: 0,
            redone: 0,
            memory_bytes: 8 << 30,
            mfu: Some(0.5),
        })
    }

    fn beat(&self) -> Beat {
        let Some(training) = &self.training else {
            let (generation, step) = (Generation(0), Step(0));
            let phase = Phase::Idle;
            return Beat {
                generation,
                step,
                phase,
                phase_ms: 0,
                op_seq: 0,
                in_op: false,
                slot_us: 0,
                data_us: 0,
                memory_bytes: 0,
            };
        };
        let step = self.step_of(training);
        let into = training.since.elapsed() - self.shared.step * (step.0 - training.from.0) as u32;
        // The last tenth of a step is its reduction.
        let reduces = into * 10 > self.shared.step * 9;
        Beat {
            generation: training.generation,
            step,
            phase: if reduces { Phase::Reduce } else { Phase::Compute },
            phase_ms: into.as_millis() as u64,
            op_seq: step.0 - training.from.0 + u64::from(reduces),
            in_op: reduces,
            slot_us: 20_000,
            data_us: 0,
            memory_bytes: 8 << 30,
        }
    }
}

/// A digest that all members agree on.
fn digest(step: u64) -> u64 {
    step.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
