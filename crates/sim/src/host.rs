//! The coordinator's process: the real machine, its journal, and a driver that may die between any
//! two commands.

use std::collections::{BTreeMap, VecDeque};

use lacuna_control::coordinator::{
    Command, CommitOrder, Coordinator, Ending, Event, Record, Saved,
};
use lacuna_control::invariants::{Invariant, Observation};
use lacuna_control::message::{FaultKind, ToCoordinator, ToWorker};
use lacuna_control::plan::CheckpointRef;
use lacuna_types::{CoordEpoch, Generation, Incarnation, Step, Timestamp, WorkerId};

use crate::bugs::Bug;
use crate::catalogue::Disk;
use crate::rng::Rng;
use crate::setup::{MS, Setup};
use crate::world::{Clock, Ev, World};

/// A pause of the process longer than this is no fault of the workers.
const STALL: u64 = 500 * MS;

/// What waits for the driver's loop.
#[derive(Debug)]
enum Input {
    Attach { conn: usize },
    Detach { conn: usize },
    Event(Event),
}

/// Where a crash is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// Before the n-th command from here on.
    Command(u64),
    /// At the n-th durable write from here on.
    Persist(u64, Write),
}

/// What becomes of a write that a crash comes into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// It is lost.
    Lost,
    /// It reached the disk.
    Kept,
}

/// The process, over all its lives.
pub struct Host {
    pub(crate) machine: Option<Coordinator>,
    /// Counts starts.
    pub(crate) life: u64,
    /// Its claim.
    pub(crate) epoch: CoordEpoch,
    /// Newest generation that this start made durable or found.
    pub(crate) generation: Generation,
    pub(crate) clock: Clock,
    /// How its durable writes go.
    pub(crate) disk: Disk,
    pub(crate) trap: Option<Trap>,
    /// After a crash that was set: when it starts again.
    pub(crate) back_after: u64,
    /// A life whose commits are still under way though it is gone.
    pub(crate) zombie: Option<u64>,
    /// Times that the run may still give up without being called stuck.
    pub(crate) excuses: u32,
    pub(crate) stalled: bool,
    saved: Saved,
    ending: Option<Ending>,
    pending: VecDeque<Command>,
    writing: Option<Record>,
    inbox: VecDeque<Input>,
    last_woke: Timestamp,
    tick: (u64, Timestamp),
    sessions: BTreeMap<WorkerId, (Incarnation, usize)>,
    live: BTreeMap<WorkerId, (Incarnation, usize)>,
}

impl Host {
    pub(crate) fn new(rng: &mut Rng, setup: &Setup) -> Self {
        Host {
            machine: None,
            life: 0,
            epoch: CoordEpoch(0),
            generation: Generation(0),
            clock: Clock::draw(rng, setup.skew_ppm),
            disk: Disk::Fine,
            trap: None,
            back_after: 1_000 * MS,
            zombie: None,
            excuses: u32::MAX,
            stalled: false,
            saved: Saved::default(),
            ending: None,
            pending: VecDeque::new(),
            writing: None,
            inbox: VecDeque::new(),
            last_woke: Timestamp(0),
            tick: (0, Timestamp(0)),
            sessions: BTreeMap::new(),
            live: BTreeMap::new(),
        }
    }

    /// Tells whether the process runs.
    pub(crate) fn is_up(&self) -> bool {
        self.machine.is_some()
    }

    /// Returns how the run came to rest, as far as the disk knows.
    pub(crate) fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    /// Returns the run's probe class, as far as the disk knows.
    pub(crate) fn probe(&self) -> Option<u64> {
        self.saved.probe
    }

    fn save(&mut self, record: &Record) {
        match record {
            Record::Generation(generation) => self.saved.generation = *generation,
            Record::Probe(probe) => self.saved.probe = Some(*probe),
            Record::Checkpoint(checkpoint) => self.saved.checkpoint = Some(checkpoint.clone()),
            Record::Ended(ending) => self.ending = Some(ending.clone()),
        }
    }

    /// The facts that a start needs, from the journal and the folder of checkpoints.
    fn found(&self, newest: Option<CheckpointRef>) -> Saved {
        let mut saved = self.saved.clone();
        let old = saved.checkpoint.as_ref().map(|c| c.step);
        if let Some(newest) = newest.filter(|c| old < Some(c.step)) {
            saved.checkpoint = Some(newest);
        }
        saved
    }
}

impl World {
    /// The coordinator starts, claims the run, and reads its journal.
    pub(crate) fn start_host(&mut self) {
        if self.host.is_up() {
            return;
        }
        self.counts.starts += 1;
        let epoch = self.store.claim.max(self.host.epoch).next();
        self.store.claim = epoch;
        let mut saved = self.host.found(self.store.newest());
        match self.setup.plant {
            Bug::ReuseGeneration => saved.generation.0 = saved.generation.0.saturating_sub(1),
            Bug::CheckpointGoesBack => {
                let first = self.store.manifests.first_key_value();
                saved.checkpoint = first.map(|(step, (manifest, _))| CheckpointRef {
                    step: Step(*step),
                    manifest: manifest.clone(),
                });
            }
            _ => {}
        }
        let newest = saved.checkpoint.as_ref().map(|c| c.step);
        let host = &mut self.host;
        host.life += 1;
        host.epoch = epoch;
        host.generation = saved.generation;
        host.stalled = false;
        let now = host.clock.show(self.now);
        host.last_woke = now;
        let (config, timing) = (self.setup.config(), self.setup.timing());
        host.machine = Some(match host.ending.clone() {
            None => Coordinator::new(config, timing, saved, now),
            Some(ending) => Coordinator::at_rest(config, timing, saved, ending, now),
        });
        self.say(|| format!("coordinator starts ({epoch})"));
        if let Some(step) = newest {
            self.observe(&Observation::Newest { step });
        }
        self.schedule_tick();
    }

    /// An operator lets a run go on that came to rest.
    pub(crate) fn resume(&mut self) {
        if !self.host.is_up() || self.host.ending.is_none() || !self.host.pending.is_empty() {
            return;
        }
        self.host.ending = None;
        let saved = self.host.found(self.store.newest());
        self.say(|| "the run goes on".to_string());
        let now = self.host.clock.show(self.now);
        let (config, timing) = (self.setup.config(), self.setup.timing());
        self.host.machine = Some(Coordinator::new(config, timing, saved, now));
        self.host_input(Event::Tick);
    }

    /// The process is gone, at once.
    pub(crate) fn crash_host(&mut self, write: Option<Write>) {
        let Some(machine) = self.host.machine.take() else { return };
        self.say(|| "coordinator crashes".to_string());
        let settled = self.host.pending.is_empty() && self.host.writing.is_none();
        if let Some(record) = self.host.writing.take() {
            let kept = match write {
                Some(write) => write == Write::Kept,
                None => self.rng.one_in(2),
            };
            if kept {
                self.durable(&record);
            }
        }
        if settled {
            self.check_replay(&machine);
        }
        let host = &mut self.host;
        host.pending.clear();
        host.inbox.clear();
        host.sessions.clear();
        host.live.clear();
        host.trap = None;
        host.stalled = false;
        for conn in 0..self.conns.len() {
            self.close_down(conn);
        }
    }

    /// What the machine would be built from is what it was.
    fn check_replay(&mut self, machine: &Coordinator) {
        let status = machine.status();
        let text = |g: Generation, c: &Option<CheckpointRef>, e: Option<&Ending>| {
            let step = c.as_ref().map(|c| c.step.0);
            format!("generation {g}, checkpoint {step:?}, {:?}", e.map(std::mem::discriminant))
        };
        let before = text(status.generation, &status.checkpoint, machine.ended());
        let saved = self.host.found(self.store.newest());
        let mut after = text(saved.generation, &saved.checkpoint, self.host.ending.as_ref());
        // A manifest may exist whose answer was under way.
        if saved.checkpoint != status.checkpoint {
            after = text(saved.generation, &status.checkpoint, self.host.ending.as_ref());
        }
        self.observe(&Observation::Replayed { before: &before, after: &after });
    }

    /// Lets a worker in, unless a live one has its name.
    pub(crate) fn host_admits(&mut self, conn: usize) -> bool {
        let hello = &self.conns[conn].hello;
        let (worker, incarnation) = (hello.worker.clone(), hello.incarnation);
        let namesake = self.host.live.get(&worker);
        if namesake.is_some_and(|(i, c)| *i != incarnation && self.conns[*c].host_open) {
            return false;
        }
        self.host.live.insert(worker, (incarnation, conn));
        true
    }

    pub(crate) fn host_left(&mut self, worker: &WorkerId, incarnation: Incarnation) {
        if self.host.live.get(worker).is_some_and(|(i, _)| *i == incarnation) {
            self.host.live.remove(worker);
        }
    }

    pub(crate) fn attach(&mut self, conn: usize) {
        self.input(Input::Attach { conn });
    }

    pub(crate) fn on_up(&mut self, conn: usize, message: ToCoordinator) {
        if self.conns[conn].host_open {
            let hello = &self.conns[conn].hello;
            let (worker, incarnation) = (hello.worker.clone(), hello.incarnation);
            self.host_input(Event::Message { worker, incarnation, message });
        }
    }

    pub(crate) fn on_echo(&mut self, pid: usize, message: ToCoordinator) {
        let process = &self.procs[pid];
        let (worker, incarnation) = (process.worker.clone(), process.incarnation);
        self.host_input(Event::Message { worker, incarnation, message });
    }

    pub(crate) fn on_up_broken(&mut self, conn: usize) {
        if std::mem::replace(&mut self.conns[conn].host_open, false) {
            let hello = &self.conns[conn].hello;
            let (worker, incarnation) = (hello.worker.clone(), hello.incarnation);
            self.host_left(&worker, incarnation);
            self.input(Input::Detach { conn });
        }
    }

    pub(crate) fn host_input(&mut self, event: Event) {
        self.input(Input::Event(event));
    }

    fn input(&mut self, input: Input) {
        if !self.host.is_up() {
            return;
        }
        self.host.inbox.push_back(input);
        self.serve();
    }

    /// The driver's loop: one input after the other, every command in order.
    fn serve(&mut self) {
        while self.host.is_up() && !self.host.stalled && self.host.writing.is_none() {
            if let Some(command) = self.host.pending.pop_front() {
                match self.trapped(&command) {
                    // A batch that was not carried out whole has not settled.
                    Some(write) => {
                        self.host.pending.push_front(command);
                        self.crash_host(write);
                        let after = self.host.back_after;
                        self.later(after, Ev::HostStart);
                    }
                    None => self.carry_out(command),
                }
                continue;
            }
            let Some(input) = self.host.inbox.pop_front() else {
                self.schedule_tick();
                return;
            };
            self.wake();
            self.take_input(input);
        }
    }

    /// Tells whether a crash is set before this command, and what becomes of a write.
    fn trapped(&mut self, command: &Command) -> Option<Option<Write>> {
        let persists = matches!(command, Command::Persist(_));
        match &mut self.host.trap {
            Some(Trap::Command(0)) => Some(None),
            Some(Trap::Persist(0, write)) if persists => {
                let write = *write;
                if let Command::Persist(record) = command {
                    self.host.writing = Some(record.clone());
                }
                Some(Some(write))
            }
            Some(Trap::Command(n)) => {
                *n -= 1;
                None
            }
            Some(Trap::Persist(n, _)) if persists => {
                *n -= 1;
                None
            }
            _ => None,
        }
    }

    /// Does not hold a pause of this process against the workers.
    fn wake(&mut self) {
        let beat = self.setup.timing().beat;
        let host = &mut self.host;
        let woke = host.clock.show(self.now);
        let late = woke.since(host.last_woke + beat);
        host.last_woke = woke;
        if late.as_nanos() as u64 > STALL
            && let Some(machine) = &mut host.machine
        {
            machine.excuse(late + beat);
        }
    }

    fn take_input(&mut self, input: Input) {
        let event = match input {
            Input::Event(event) => event,
            Input::Attach { conn } => {
                let hello = self.conns[conn].hello.clone();
                let session = (hello.incarnation, conn);
                // A session that is replaced is dropped, which ends its stream.
                if let Some((_, old)) = self.host.sessions.insert(hello.worker.clone(), session) {
                    self.close_down(old);
                }
                Event::Hello(hello)
            }
            Input::Detach { conn } => {
                let hello = &self.conns[conn].hello;
                let (worker, incarnation) = (hello.worker.clone(), hello.incarnation);
                if self.host.sessions.get(&worker).is_none_or(|(_, c)| *c != conn) {
                    return;
                }
                self.host.sessions.remove(&worker);
                Event::StreamLost { worker, incarnation }
            }
        };
        self.handle(event);
    }

    fn handle(&mut self, mut event: Event) {
        let now = self.host.clock.show(self.now);
        if self.setup.plant == Bug::DropFence {
            restamp(&mut event, self.host.generation);
        }
        let stale = stale_for(&event, self.host.generation);
        let Some(machine) = &mut self.host.machine else { return };
        self.coverage.coordinator(machine, &event);
        let commands = match stale {
            None => machine.handle(now, event),
            Some(generation) => {
                // What time alone does is done first, so that the rest is the message's.
                let mut commands = machine.handle(now, Event::Tick);
                let before = (machine.stage_word(), machine.status().step);
                let more = machine.handle(now, event);
                let after = (machine.stage_word(), machine.status().step);
                let answer = |c: &Command| {
                    matches!(c, Command::Send { message: ToWorker::Stale { .. }, .. })
                };
                if before != after || !more.iter().all(answer) {
                    let (epoch, current) = (self.host.epoch, self.host.generation);
                    self.changed((epoch, generation), (epoch, current));
                }
                commands.extend(more);
                commands
            }
        };
        self.host.pending.extend(commands);
    }

    pub(crate) fn changed(
        &mut self,
        message: (CoordEpoch, Generation),
        receiver: (CoordEpoch, Generation),
    ) {
        self.observe(&Observation::Changed { message, receiver });
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Persist(record) => self.persist(record),
            Command::Send { to, incarnation, message } => self.host_send(&to, incarnation, message),
            Command::Disconnect { worker, incarnation } => {
                let session = self.host.sessions.get(&worker).copied();
                if let Some((_, conn)) = session.filter(|(i, _)| *i == incarnation) {
                    self.host.sessions.remove(&worker);
                    self.host_left(&worker, incarnation);
                    self.close_down(conn);
                }
            }
            Command::DrawCommId(generation) => {
                let life = self.host.life;
                let event = Event::CommId { generation, comm_id: vec![7; 32] };
                let slow = if self.rng.one_in(20) { 300 * MS } else { 0 };
                let after = self.rng.range(100_000, 2 * MS) + slow;
                self.later(after, Ev::HostAnswer { life, event: Box::new(event) });
            }
            Command::Commit(order) => self.begin_commit(order),
            Command::Note(note) => {
                if note.kind == "formed" {
                    self.counts.generations += 1;
                }
                self.say(|| format!("{}: {}", note.kind, note.text));
            }
            Command::Mark(_) => {}
        }
    }

    fn persist(&mut self, record: Record) {
        if let Record::Generation(generation) = &record {
            self.host.generation = *generation;
        }
        let plant = self.setup.plant;
        let skipped = match record {
            Record::Generation(_) => plant == Bug::SkipPersist,
            Record::Ended(_) => plant == Bug::SkipEnding,
            _ => false,
        };
        if skipped {
            return;
        }
        let life = self.host.life;
        let slow = match self.host.disk {
            Disk::Slow(ms) => ms * MS,
            _ => 0,
        };
        let after = self.rng.range(100_000, 2 * self.setup.sync_ms * MS) + slow;
        if plant == Bug::SayBeforeDurable {
            let pending = std::mem::take(&mut self.host.pending);
            for command in pending {
                self.carry_out(command);
            }
        }
        self.host.writing = Some(record);
        self.later(after, Ev::HostSynced { life });
    }

    pub(crate) fn on_host_synced(&mut self, life: u64) {
        if self.host.life != life || !self.host.is_up() {
            return;
        }
        if let Some(record) = self.host.writing.take() {
            self.durable(&record);
        }
        self.serve();
    }

    fn durable(&mut self, record: &Record) {
        self.host.save(record);
        let epoch = self.host.epoch;
        match record {
            Record::Generation(generation) => {
                let generation = *generation;
                self.observe(&Observation::Durable { epoch, generation });
            }
            Record::Checkpoint(checkpoint) => {
                self.observe(&Observation::Newest { step: checkpoint.step });
            }
            Record::Ended(ending) => self.ended(ending),
            Record::Probe(_) => {}
        }
    }

    /// Judges how the run came to rest.
    fn ended(&mut self, ending: &Ending) {
        match ending {
            Ending::Finished { step, digest } => {
                let right = self.reference.at(step.0) == Some(*digest);
                if step.0 != self.setup.steps || !(right || self.tainted) {
                    let text = format!("finished at step {step} with {digest:016x}");
                    self.breach(Invariant::OneDigest, &text);
                }
            }
            Ending::Stopped { .. } => {}
            Ending::Paused { why } if why.contains("differ") && !self.tainted => {
                self.breach(Invariant::OneDigest, &format!("paused: {why}"));
            }
            Ending::Paused { why } | Ending::Failed { why, .. } => {
                if self.host.excuses == 0 {
                    self.breach(Invariant::Liveness, &format!("gave up: {why}"));
                }
                self.host.excuses = self.host.excuses.saturating_sub(1);
            }
        }
    }

    fn host_send(&mut self, to: &WorkerId, incarnation: Incarnation, message: ToWorker) {
        if let ToWorker::Prepare(plan) = &message {
            self.observe(&Observation::Said { plan });
        }
        if matches!(message, ToWorker::Stale { .. }) {
            self.counts.stale += 1;
        }
        let session = self.host.sessions.get(to).copied();
        let Some((_, conn)) = session.filter(|(i, _)| *i == incarnation) else { return };
        if matches!(message, ToWorker::Exit { .. }) {
            self.host.sessions.remove(to);
        }
        self.send_down(conn, message);
    }

    fn begin_commit(&mut self, order: CommitOrder) {
        let parts = order.receipts.iter().filter_map(|r| self.store.parts.get(r));
        let writers: Vec<(WorkerId, Incarnation)> = parts.map(|p| p.writer.clone()).collect();
        let seen = Observation::Committing {
            epoch: self.host.epoch,
            current: self.host.generation,
            generation: order.generation,
            writers: &writers,
        };
        self.observe(&seen);
        let slow = match self.store.disk {
            Disk::Slow(ms) => ms * MS,
            _ => 0,
        };
        let after = self.setup.commit_ms * MS * self.rng.range(50, 300) / 100 + slow;
        let (life, epoch) = (self.host.life, self.host.epoch);
        self.later(after, Ev::Commit { life, epoch, order: Box::new(order) });
    }

    pub(crate) fn on_commit(&mut self, life: u64, epoch: CoordEpoch, order: CommitOrder) {
        let lives = self.host.is_up() && self.host.life == life;
        if !lives && self.host.zombie != Some(life) {
            return;
        }
        let (generation, attempt) = (order.generation, order.attempt);
        let event = match self.try_commit(epoch, &order) {
            Ok(checkpoint) => Event::CheckpointDone { generation, attempt, checkpoint },
            Err(why) => Event::CheckpointFailed { generation, attempt, why },
        };
        let after = self.rng.range(100_000, 5 * MS);
        self.later(after, Ev::HostAnswer { life, event: Box::new(event) });
    }

    fn try_commit(
        &mut self,
        epoch: CoordEpoch,
        order: &CommitOrder,
    ) -> Result<CheckpointRef, String> {
        if self.store.disk == Disk::Full {
            return Err("no space left on device".to_string());
        }
        if epoch < self.store.claim && self.setup.plant != Bug::CommitFromOld {
            self.counts.fenced += 1;
            return Err(format!("start {epoch} is fenced off by {}", self.store.claim));
        }
        let mut receipts: Vec<&String> = order.receipts.iter().collect();
        if self.setup.plant == Bug::CommitWithoutPart && receipts.len() > 1 {
            receipts.pop();
        }
        let parts = receipts.iter().filter_map(|r| self.store.parts.get(*r));
        let states: Vec<_> = parts.map(|part| part.state).collect();
        let first = *states.first().ok_or("no part exists")?;
        if states.iter().any(|s| s.digest != first.digest) || first.digest != order.digest {
            return Err("replicas differ".to_string());
        }
        let step = order.step;
        if let Some((manifest, known)) = self.store.manifests.get(&step.0) {
            if known.digest != first.digest {
                return Err(format!("checkpoint step {step} exists already"));
            }
            return Ok(CheckpointRef { step, manifest: manifest.clone() });
        }
        let manifest = format!("m{step}.{}.{}", order.generation, order.attempt);
        self.store.manifests.insert(step.0, (manifest.clone(), first));
        self.counts.commits += 1;
        if !first.tainted {
            let seen = Observation::Committed {
                epoch,
                newest_epoch: self.store.claim,
                generation: order.generation,
                step,
                digest: first.digest,
                parts: states.len(),
            };
            self.observe(&seen);
        }
        Ok(CheckpointRef { step, manifest })
    }

    pub(crate) fn on_host_answer(&mut self, life: u64, event: Event) {
        if self.host.life == life {
            self.host_input(event);
        }
    }

    pub(crate) fn on_host_tick(&mut self, life: u64, tick: u64) {
        if self.host.life == life && self.host.tick.0 == tick {
            self.host_input(Event::Tick);
        }
    }

    pub(crate) fn on_host_awake(&mut self, life: u64) {
        if self.host.life == life {
            self.host.stalled = false;
            self.host_input(Event::Tick);
        }
    }

    fn schedule_tick(&mut self) {
        let beat = self.setup.timing().beat;
        let host = &mut self.host;
        let Some(machine) = &host.machine else { return };
        let latest = host.last_woke + beat;
        let due = machine.next_deadline().map_or(latest, |(at, _)| at.min(latest));
        if host.tick.0 > 0 && host.tick.1 == due {
            return;
        }
        host.tick = (host.tick.0 + 1, due);
        let (life, tick) = (host.life, host.tick.0);
        // The timer is never early, and a little late.
        let at = host.clock.when(due).max(self.now) + MS / 2;
        self.at(at, Ev::HostTick { life, tick });
    }
}

/// Returns the generation that a message belongs to, where it is bound to one.
fn generation_of(message: &mut ToCoordinator) -> Option<&mut Generation> {
    match message {
        ToCoordinator::Beat(beat) => Some(&mut beat.generation),
        ToCoordinator::StepMark(mark) => Some(&mut mark.generation),
        ToCoordinator::Fault { kind: FaultKind::Communicator, generation, .. }
        | ToCoordinator::Prepared { generation, .. }
        | ToCoordinator::Synced { generation, .. }
        | ToCoordinator::Held { generation, .. }
        | ToCoordinator::Snapshotted { generation, .. }
        | ToCoordinator::PartDone { generation, .. }
        | ToCoordinator::PartFailed { generation, .. } => Some(generation),
        // What is wrong with a process is wrong in every generation.
        ToCoordinator::Fault { .. }
        | ToCoordinator::Warm { .. }
        | ToCoordinator::Leaving { .. } => None,
    }
}

fn stale_for(event: &Event, current: Generation) -> Option<Generation> {
    let Event::Message { message, .. } = event else { return None };
    let generation = generation_of(&mut message.clone()).copied()?;
    (generation < current && generation.0 > 0).then_some(generation)
}

/// The planted bug: the message counts for the present generation.
fn restamp(event: &mut Event, current: Generation) {
    if let Event::Message { message, .. } = event
        && let Some(generation) = generation_of(message)
    {
        *generation = current.max(*generation);
    }
}
