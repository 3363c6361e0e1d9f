//! The owner of one run's machine: one task, one bounded queue in, commands out in order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lacuna_api::{v1, wire};
use lacuna_checkpoint::layout::Attempt;
use lacuna_control::coordinator::{
    Command, CommitOrder, Coordinator, Ending, Event, Hello, Note, Status,
};
use lacuna_control::journal::Record;
use lacuna_control::message::{StepMark, ToCoordinator, ToWorker};
use lacuna_control::plan::CheckpointRef;
use lacuna_spec::{RunSpec, Workers};
use lacuna_track::Figures;
use lacuna_types::{Generation, Incarnation, RunId, Timestamp, WorkerId};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use crate::account::{Account, figures as figures_of};
use crate::catalogue::Catalogue;
use crate::clock::now_ms;
use crate::registry::Shared;
use crate::state_writer::Down;
use crate::store::{Entry, StoredRun, Update};

mod claiming;
mod derived;

pub(crate) use derived::run_config;

/// Bound of a run's queue: a few hundred workers may beat at once while the task writes to disk.
pub(crate) const INPUT_QUEUE: usize = 1024;
/// Bound of a worker's outgoing queue: a handful of messages are under way at any time, so a full
/// one means a worker that does not read.
pub(crate) const SESSION_QUEUE: usize = 64;
/// Updates a watcher may lag behind before it reads them from the store instead.
pub(crate) const WATCH_QUEUE: usize = 256;

/// What others see of a run is at most this old, where nothing happened that they should see at
/// once.
const PUBLISH_EVERY: Duration = Duration::from_millis(250);

/// A pause of the task longer than this is no fault of the workers: a slow disk, a stopped process.
const STALL: Duration = Duration::from_millis(500);

/// The sender of a session's stream.
pub(crate) type SessionSender = mpsc::Sender<Result<v1::SessionResponse, tonic::Status>>;

/// Ends a session's stream when the machine gives its worker up.
pub(crate) type Gone = Arc<tokio::sync::Notify>;

/// What reaches a run's task.
pub(crate) enum Input {
    /// A trainer's stream is up.
    Attach { session: u64, hello: Hello, device: String, out: SessionSender, gone: Gone },
    /// A trainer said something.
    Message { worker: WorkerId, incarnation: Incarnation, message: ToCoordinator },
    /// A trainer's stream is gone.
    Detach { session: u64, worker: WorkerId, incarnation: Incarnation },
    /// Something happened that the machine knows.
    Event(Event),
    /// Somebody asks for something, and is told once it is durable.
    Ask { event: Event, done: oneshot::Sender<bool> },
    /// Go on after an end or in the midst of a stop, with this spec.
    Resume(Box<RunSpec>),
    /// Other numbers of workers; told whether they count once that is durable. They do not where
    /// they are no longer what they were when the asker looked.
    Scale { workers: Workers, was: Option<Workers>, done: oneshot::Sender<bool> },
    /// A background job has something for the log.
    Remark { warning: bool, text: String },
}

/// What others see of a run.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub status: Status,
    pub ending: Option<Ending>,
    pub figures: Option<Figures>,
    pub devices: BTreeMap<WorkerId, String>,
    pub last_seq: u64,
    /// What was counted since this coordinator started.
    pub account: Account,
}

struct Attached {
    session: u64,
    incarnation: Incarnation,
    device: String,
    out: SessionSender,
    gone: Gone,
}

/// The state of a run's task.
pub(crate) struct RunTask {
    shared: Arc<Shared>,
    id: RunId,
    stored: StoredRun,
    machine: Coordinator,
    catalogue: Catalogue,
    sessions: BTreeMap<WorkerId, Attached>,
    figures: Option<Figures>,
    last_seq: u64,
    /// Attempts of one generation that are over: what was not committed of them is garbage.
    over: Vec<Attempt>,
    /// Commits under way: meanwhile an attempt that is over may yet become a checkpoint.
    commits: Arc<AtomicUsize>,
    /// The newest plan, encoded: all members get the same.
    plan: Option<(Generation, prost::bytes::Bytes)>,
    last_published: Timestamp,
    account: Account,
    /// Whether something happened since that others should see at once.
    unpublished: bool,
    input: mpsc::Sender<Input>,
    view: watch::Sender<View>,
    updates: broadcast::Sender<(u64, Update)>,
}

/// The ends of a run's task that the registry keeps.
pub(crate) struct RunEnds {
    pub input: mpsc::Sender<Input>,
    pub view: watch::Receiver<View>,
    pub updates: broadcast::Sender<(u64, Update)>,
}

/// The kind of note that tells that an operator's wish changed something, where it may change
/// nothing.
fn answer_to(event: &Event) -> Option<&'static str> {
    match event {
        Event::Release { .. } => Some("released"),
        Event::Force => Some("forced"),
        _ => None,
    }
}

impl RunTask {
    /// Builds the task of a run; a run with an ending rests until [`Input::Resume`].
    pub(crate) fn create(
        shared: &Arc<Shared>,
        stored: StoredRun,
        spec: RunSpec,
        catalogue: Catalogue,
    ) -> Result<(RunTask, RunEnds, mpsc::Receiver<Input>), String> {
        let config = run_config(&spec, stored.n_samples)?;
        let figures = shared.newest_figures(&stored.run_id).map_err(|err| err.to_string())?;
        let last_seq = shared.store().last_seq(&stored.run_id).map_err(|err| err.to_string())?;
        let (timing, now) = (shared.options.timing.clone(), shared.now());
        let machine = Coordinator::new(config, timing, stored.saved.clone(), now);
        let (input, inputs) = mpsc::channel(INPUT_QUEUE);
        let account = Account::open(spec.train.batch, figures.as_ref(), now);
        let view = View {
            status: machine.status(),
            ending: stored.saved.ending.clone(),
            figures,
            devices: BTreeMap::new(),
            last_seq,
            account: account.clone(),
        };
        let (view, view_rx) = watch::channel(view);
        let (updates, _) = broadcast::channel(WATCH_QUEUE);
        let ends = RunEnds { input: input.clone(), view: view_rx, updates: updates.clone() };
        let task = RunTask {
            shared: shared.clone(),
            id: stored.run_id.clone(),
            stored,
            machine,
            catalogue,
            sessions: BTreeMap::new(),
            figures,
            last_seq,
            over: Vec::new(),
            commits: Arc::default(),
            plan: None,
            last_published: now,
            account,
            unpublished: false,
            input,
            view,
            updates,
        };
        Ok((task, ends, inputs))
    }

    /// Runs until the service goes down or its store fails.
    pub(crate) async fn run(mut self, mut inputs: mpsc::Receiver<Input>) {
        let mut last_woke = self.shared.now();
        loop {
            // At least every beat, so that a pause of this process shows as a gap.
            let beat = self.shared.options.timing.beat;
            let due = self.machine.next_deadline().map_or(last_woke + beat, |(at, _)| at);
            let at = self.shared.instant(due.min(last_woke + beat));
            let input = tokio::select! {
                input = inputs.recv() => match input {
                    Some(input) => input,
                    None => return,
                },
                () = tokio::time::sleep_until(at.into()) => Input::Event(Event::Tick),
            };
            let woke = self.shared.now();
            self.excuse(woke.since(last_woke + beat));
            last_woke = woke;
            if self.take(input).await.is_err() {
                return;
            }
            // In a burst the last of many states is enough.
            let news = self.unpublished && inputs.is_empty();
            if news || woke.since(self.last_published) > PUBLISH_EVERY {
                self.unpublished = false;
                self.last_published = woke;
                self.publish();
            }
        }
    }

    /// Does not hold a pause of this process against the workers, whose beats were waiting.
    fn excuse(&mut self, late: Duration) {
        if late > STALL {
            let paused = late + self.shared.options.timing.beat;
            warn!(run_id = %self.id, ?paused, "the coordinator was stalled");
            self.machine.excuse(paused);
        }
    }

    async fn take(&mut self, input: Input) -> Result<(), Down> {
        let now: Timestamp = self.shared.now();
        let mut asked: Option<oneshot::Sender<bool>> = None;
        let event = match input {
            Input::Event(event) => event,
            Input::Ask { event, done } => {
                asked = Some(done);
                event
            }
            Input::Message { worker, incarnation, message } => {
                Event::Message { worker, incarnation, message }
            }
            Input::Attach { session, hello, device, out, gone } => {
                let incarnation = hello.incarnation;
                info!(run_id = %self.id, worker_id = %hello.worker, %device, "worker joined");
                let attached = Attached { session, incarnation, device, out, gone };
                self.sessions.insert(hello.worker.clone(), attached);
                Event::Hello(hello)
            }
            Input::Detach { session, worker, incarnation } => {
                if self.sessions.get(&worker).is_none_or(|s| s.session != session) {
                    return Ok(());
                }
                self.sessions.remove(&worker);
                Event::StreamLost { worker, incarnation }
            }
            Input::Resume(spec) => {
                self.resume(*spec).await?;
                Event::Tick
            }
            Input::Scale { workers, was, done } => {
                if let Ok(mut spec) = serde_json::from_str::<RunSpec>(&self.stored.spec) {
                    if was.is_some_and(|was| was != spec.elastic.workers) {
                        let _ = done.send(false);
                        return Ok(());
                    }
                    spec.elastic.workers = workers;
                    self.keep_spec(spec)?;
                }
                // Nobody waits any more if it fails.
                let _ = done.send(true);
                Event::Resize { min: workers.min as usize, max: workers.max as usize }
            }
            Input::Remark { warning, text } => {
                return self.tell(Note { kind: "remark", warning, text }).await;
            }
        };
        let answer = answer_to(&event);
        let saved = matches!(event, Event::CheckpointDone { .. });
        if let Event::CheckpointDone { generation, attempt, .. } = &event {
            self.account.committed(*generation, *attempt, now);
        }
        let generation = self.machine.saved().generation;
        let commands = self.machine.handle(now, event);
        self.unpublished |= !commands.is_empty();
        self.account.begin(self.machine.saved().generation, &commands, now);
        let closed = self.note_closed(generation, &commands);
        let met = answer.is_none_or(|kind| {
            commands.iter().any(|command| matches!(command, Command::Note(n) if n.kind == kind))
        });
        self.carry_out_all(commands).await?;
        if self.machine.ended() != self.view.borrow().ending.as_ref() {
            // Workers were told; whoever sees them go looks here next.
            self.publish();
        }
        // After the commands: one of them may have begun the commit of what is over.
        if closed && !saved {
            self.collect(generation);
        }
        if let Some(done) = asked {
            // Whoever asked looks next.
            self.publish();
            // Nobody waits any more if it fails.
            let _ = done.send(met);
        }
        Ok(())
    }

    /// Carries commands out in order. What is written becomes durable together, before anything
    /// that follows it.
    async fn carry_out_all(&mut self, commands: Vec<Command>) -> Result<(), Down> {
        let mut entries: Vec<Entry> = Vec::new();
        for command in commands {
            match command {
                Command::Persist(record) => entries.push(Entry::Fact(record)),
                Command::Note(note) => entries.push(self.note(note)),
                Command::Mark(mark) => entries.push(self.mark(mark)),
                Command::NameSamples(step) => {
                    let note = self.name_samples(step);
                    entries.push(self.note(note));
                }
                other => {
                    self.write(&mut entries).await?;
                    self.carry_out(other);
                }
            }
        }
        self.write(&mut entries).await
    }

    /// Writes entries, and passes the updates among them on to watchers.
    async fn write(&mut self, entries: &mut Vec<Entry>) -> Result<(), Down> {
        if entries.is_empty() {
            return Ok(());
        }
        let update = |entry: &Entry| match entry {
            Entry::Update(update) => Some(update.clone()),
            Entry::Picture(update, _) => Some(update.clone()),
            Entry::Fact(_) => None,
        };
        let updates: Vec<Update> = entries.iter().filter_map(update).collect();
        let numbers = self.shared.scribe.write(&self.id, std::mem::take(entries)).await?;
        for (seq, update) in numbers.into_iter().zip(updates) {
            self.last_seq = seq;
            // Without watchers there is nobody to send to.
            let _ = self.updates.send((seq, update));
        }
        Ok(())
    }

    fn publish(&mut self) {
        let ended = self.machine.ended().is_some();
        let (status, before) = (self.machine.status(), self.view.borrow().status.state);
        self.account.pass(before, self.shared.now());
        self.account.reach(status.generation, status.step);
        let ended_before = self.view.borrow().ending.is_some();
        let devices = self.sessions.iter().map(|(id, s)| (id.clone(), s.device.clone())).collect();
        self.view.send_replace(View {
            status,
            ending: self.machine.ended().cloned(),
            figures: self.figures,
            devices,
            last_seq: self.last_seq,
            account: self.account.clone(),
        });
        if ended != ended_before {
            self.shared.runs_changed();
        }
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Send { to, incarnation, message } => self.send(&to, incarnation, message),
            Command::Disconnect { worker, incarnation } => {
                if self.sessions.get(&worker).is_some_and(|s| s.incarnation == incarnation) {
                    self.close(&worker);
                }
            }
            Command::DrawCommId(generation) => {
                let mut comm_id = vec![0u8; 32];
                getrandom::fill(&mut comm_id).expect("the system has a random source");
                self.later(Input::Event(Event::CommId { generation, comm_id }));
            }
            Command::Kill { worker, incarnation, why } => {
                self.shared.kill(&worker, incarnation, &why);
            }
            Command::Commit(order) => self.commit(order),
            Command::Examine(checkpoint) => self.examine(checkpoint),
            Command::Persist(_) | Command::Note(_) | Command::Mark(_) | Command::NameSamples(_) => {
                unreachable!("written by `carry_out_all`")
            }
        }
    }

    /// Queues an input for this task itself. Commands never wait for the queue they feed.
    fn later(&self, input: Input) {
        let queue = self.input.clone();
        tokio::spawn(async move {
            // Fails only when the task is gone, and nobody waits for it then.
            let _ = queue.send(input).await;
        });
    }

    /// Ends a session: its worker notices, and says hello again if it lives.
    fn close(&mut self, worker: &WorkerId) {
        if let Some(session) = self.sessions.remove(worker) {
            session.gone.notify_one();
        }
    }

    fn send(&mut self, to: &WorkerId, incarnation: Incarnation, message: ToWorker) {
        let Some(session) = self.sessions.get(to).filter(|s| s.incarnation == incarnation) else {
            debug!(run_id = %self.id, worker_id = %to, ?message, "no stream to send on");
            return;
        };
        let leaves = matches!(message, ToWorker::Exit { .. });
        let message = match message {
            ToWorker::Prepare(plan) => {
                let newest = self.plan.take().filter(|(g, _)| *g == plan.generation);
                let encoded = newest.map_or_else(|| wire::encode_plan(&plan), |(_, bytes)| bytes);
                self.plan = Some((plan.generation, encoded.clone()));
                wire::prepare(encoded)
            }
            other => wire::to_worker(other),
        };
        if session.out.try_send(Ok(message)).is_err() {
            warn!(run_id = %self.id, worker_id = %to, "a worker does not read its stream");
            self.close(to);
        } else if leaves {
            self.sessions.remove(to);
        }
    }

    /// Remembers which attempts are over from now on; says whether there are any.
    fn note_closed(&mut self, generation: Generation, commands: &[Command]) -> bool {
        self.over.retain(|attempt| attempt.generation == generation);
        let n_before = self.over.len();
        for command in commands {
            if let Command::Persist(Record::AttemptClosed(seq)) = command {
                self.over.push(Attempt::new(generation, *seq));
            }
        }
        self.over.len() > n_before
    }

    /// Removes what a failed attempt left: on a full disk the next one needs the room.
    fn collect(&self, generation: Generation) {
        if self.commits.load(Ordering::Acquire) > 0 {
            // It is removed after the next commit.
            return;
        }
        let (catalogue, over, queue) =
            (self.catalogue.clone(), self.over.clone(), self.input.clone());
        tokio::task::spawn_blocking(move || {
            if let Err(err) = catalogue.collect(generation, &over) {
                let text = format!("what a failed attempt left was not removed: {err}");
                // Fails only when the task is gone.
                let _ = queue.blocking_send(Input::Remark { warning: true, text });
            }
        });
    }

    fn commit(&mut self, order: CommitOrder) {
        let catalogue = self.catalogue.clone();
        let saved = self.machine.saved();
        let (parent, probe) = (saved.checkpoint.clone(), saved.probe);
        let loss = self.figures.map(|figures| figures.loss);
        let (queue, over, commits) = (self.input.clone(), self.over.clone(), self.commits.clone());
        commits.fetch_add(1, Ordering::AcqRel);
        tokio::task::spawn_blocking(move || {
            let (generation, attempt) = (order.generation, order.attempt);
            let event = match catalogue.commit(&order, parent.as_ref(), probe, loss) {
                Ok(checkpoint) => Event::CheckpointDone { generation, attempt, checkpoint },
                // Where even that cannot be read, the next attempt finds out.
                Err(err) => match catalogue.superseded() {
                    Ok(Some(why)) => Event::Superseded { why },
                    _ => Event::CheckpointFailed { generation, attempt, why: err.to_string() },
                },
            };
            let others = commits.fetch_sub(1, Ordering::AcqRel) - 1;
            let saved = match &event {
                Event::CheckpointDone { checkpoint, .. } => Some(checkpoint.clone()),
                _ => None,
            };
            if queue.blocking_send(Input::Event(event)).is_err() {
                return;
            }
            let Some(checkpoint) = saved else { return };
            // A commit that is under way needs parts that would be in nobody's way otherwise; the
            // next one cleans up.
            let cleans = others == 0;
            let say = |(warning, text)| {
                // Fails only when the task is gone.
                let _ = queue.blocking_send(Input::Remark { warning, text });
            };
            if cleans {
                catalogue.clean_up(generation, &over).map(say);
            }
            catalogue.read_back(&checkpoint).map(say);
        });
    }

    fn examine(&self, checkpoint: CheckpointRef) {
        let catalogue = self.catalogue.clone();
        let queue = self.input.clone();
        tokio::task::spawn_blocking(move || {
            let found = catalogue.examine(&checkpoint);
            // Fails only when the task is gone.
            let _ = queue.blocking_send(Input::Event(Event::Examined { checkpoint, found }));
        });
    }

    async fn tell(&mut self, note: Note) -> Result<(), Down> {
        let mut entries = vec![self.note(note)];
        self.write(&mut entries).await
    }

    /// Logs a note, and makes it an update.
    fn note(&mut self, note: Note) -> Entry {
        let Note { kind, warning, text } = note;
        self.account.event(kind);
        if warning {
            warn!(run_id = %self.id, kind, "{text}");
        } else {
            info!(run_id = %self.id, kind, "{text}");
        }
        let kind = kind.to_string();
        Entry::Update(Update::Event { kind, warning, text, at_ms: now_ms() })
    }

    fn mark(&mut self, mark: StepMark) -> Entry {
        let started = self.machine.saved().started;
        self.account.mark(self.figures.as_ref(), started, &mark);
        let figures = figures_of(&mark);
        self.figures = Some(figures);
        Entry::Update(Update::Figures { figures, at_ms: now_ms() })
    }

    /// Makes a spec the run's, durably.
    fn keep_spec(&mut self, spec: RunSpec) -> Result<(), Down> {
        self.stored.spec = spec.to_json().to_string();
        self.shared.set_spec(&self.id, &spec);
        self.catalogue.set_spec(spec);
        let put = self.shared.store().put_run(&self.stored);
        put.map_err(|err| {
            self.shared.fail(err);
            Down
        })
    }

    /// Starts the machine again from what is stored.
    async fn resume(&mut self, spec: RunSpec) -> Result<(), Down> {
        // Nobody is left to carry out a stop that an earlier life was asked for.
        let stops = self.machine.saved().stopping.is_some() && self.sessions.is_empty();
        if self.machine.ended().is_none() && !stops {
            return Ok(());
        }
        let config = match run_config(&spec, self.stored.n_samples) {
            Ok(config) => config,
            Err(text) => return self.tell(Note { kind: "refused", warning: true, text }).await,
        };
        let mut saved = self.machine.saved().clone();
        let mut news = match self.claim_again(&spec).await {
            Ok(found) => found.map_or_else(Vec::new, |found| found.news(&saved)),
            Err(why) => {
                let text = format!("it does not go on: {why}");
                return self.tell(Note { kind: "refused", warning: true, text }).await;
            }
        };
        self.keep_spec(spec)?;
        news.push(Record::Resumed);
        news.iter().for_each(|record| saved.apply(record));
        self.write(&mut news.into_iter().map(Entry::Fact).collect()).await?;
        let text = match &saved.checkpoint {
            Some(checkpoint) => {
                format!("going on; newest checkpoint is of step {}", checkpoint.step)
            }
            None => "starting again; there is no checkpoint".to_string(),
        };
        let timing = self.shared.options.timing.clone();
        self.machine = Coordinator::new(config, timing, saved, self.shared.now());
        self.tell(Note { kind: "resumed", warning: false, text }).await
    }
}

impl Drop for RunTask {
    fn drop(&mut self) {
        self.shared.tasks.fetch_sub(1, Ordering::Relaxed);
    }
}
