//! The coordinator's process: the real machine, its journal, and a driver that may die between any
//! two commands.

use std::collections::{BTreeMap, VecDeque};

use lacuna_control::coordinator::{Command, Coordinator, Ending, Event};
use lacuna_control::invariants::{Invariant, Observation};
use lacuna_control::journal::{Record, Saved};
use lacuna_control::message::{ToCoordinator, ToWorker};
use lacuna_types::{CoordEpoch, Generation, Incarnation, Timestamp, WorkerId};

use crate::bugs::Bug;
use crate::catalogue::Disk;
use crate::fence::{restamp, stale_for};
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
    pub(crate) saved: Saved,
    pending: VecDeque<Command>,
    writing: Vec<Record>,
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
            pending: VecDeque::new(),
            writing: Vec::new(),
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

    /// Tells whether everything that the machine said so far was carried out.
    pub(crate) fn is_settled(&self) -> bool {
        self.pending.is_empty() && self.writing.is_empty()
    }

    /// Returns how the run came to rest, as far as the disk knows.
    pub(crate) fn ending(&self) -> Option<&Ending> {
        self.saved.ending.as_ref()
    }

    /// Returns the run's probe class, as far as the disk knows.
    pub(crate) fn probe(&self) -> Option<u64> {
        self.saved.probe
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
        self.host.epoch = epoch;
        self.host.life += 1;
        self.say(|| format!("coordinator starts ({epoch})"));
        self.add_news();
        let mut saved = self.host.saved.clone();
        if self.setup.plant == Bug::ReuseGeneration {
            saved.generation.0 = saved.generation.0.saturating_sub(1);
            saved.plan = None;
        }
        self.begin(saved);
    }

    /// Puts the machine of these facts to work.
    fn begin(&mut self, saved: Saved) {
        let host = &mut self.host;
        host.generation = saved.generation;
        host.stalled = false;
        let now = host.clock.show(self.now);
        host.last_woke = now;
        host.machine = Some(Coordinator::new(self.setup.config(), self.setup.timing(), saved, now));
        self.schedule_tick();
    }

    /// An operator lets a run go on that came to rest.
    pub(crate) fn resume(&mut self) {
        if !self.host.is_up() || self.host.ending().is_none() || !self.host.is_settled() {
            return;
        }
        self.say(|| "the run goes on".to_string());
        self.durable(&Record::Resumed);
        let saved = self.host.saved.clone();
        self.begin(saved);
        self.host_input(Event::Tick);
    }

    /// The process is gone, at once.
    pub(crate) fn crash_host(&mut self, write: Option<Write>) {
        let Some(machine) = self.host.machine.take() else { return };
        self.say(|| "coordinator crashes".to_string());
        let settled = self.host.is_settled();
        let written = std::mem::take(&mut self.host.writing);
        if !written.is_empty() {
            let kept = match write {
                Some(write) => write == Write::Kept,
                None => self.rng.one_in(2),
            };
            if kept {
                written.iter().for_each(|record| self.durable(record));
            }
        }
        if settled && self.host.saved != *machine.saved() {
            let (before, after) =
                (format!("{:?}", machine.saved()), format!("{:?}", self.host.saved));
            self.observe(&Observation::Replayed { before: &before, after: &after });
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
        while self.host.is_up() && !self.host.stalled && self.host.writing.is_empty() {
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
                    self.host.writing = vec![record.clone()];
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
        let stale = stale_for(&event, self.host.generation);
        if self.setup.plant == Bug::DropFence {
            restamp(&mut event, self.host.generation);
        }
        let Some(machine) = &mut self.host.machine else { return };
        self.coverage.coordinator(machine, &event);
        if self.verbose {
            self.show_event(&event);
        }
        let Some(machine) = &mut self.host.machine else { return };
        let commands = match stale {
            None => machine.handle(now, event),
            Some(generation) => {
                // What time alone does is done first, so that the rest is the message's.
                let mut commands = machine.handle(now, Event::Tick);
                let before = (machine.state_word(), machine.status().step);
                let more = machine.handle(now, event);
                let after = (machine.state_word(), machine.status().step);
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

    fn show_event(&mut self, event: &Event) {
        match event {
            Event::Tick | Event::Message { message: ToCoordinator::Beat(_), .. } => {}
            Event::Message { worker, message, .. } => {
                self.say(|| format!("    {worker}: {message:?}"));
            }
            other => self.say(|| format!("    {other:?}")),
        }
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
            Command::Examine(checkpoint) => self.begin_examination(checkpoint),
            Command::Kill { worker, incarnation, .. } => {
                let after = self.latency();
                self.later(after, Ev::Kill { worker, incarnation });
            }
            Command::Note(note) => self.take_note(note.kind, &note.text),
            Command::Mark(_) | Command::NameSamples(_) => {}
        }
    }

    fn take_note(&mut self, kind: &str, text: &str) {
        self.say(|| format!("{kind}: {text}"));
        match kind {
            "formed" => self.counts.generations += 1,
            "differs" | "doubted" | "distrusted" if !self.tainted => {
                self.breach(Invariant::OneDigest, text);
            }
            _ => {}
        }
    }

    /// Begins to write a fact, with those that follow it at once.
    fn persist(&mut self, record: Record) {
        let mut facts = vec![record];
        while let Some(Command::Persist(record)) =
            self.host.pending.pop_front_if(|c| matches!(c, Command::Persist(_)))
        {
            facts.push(record);
        }
        for record in &facts {
            if let Record::Planned(plan) = record {
                self.host.generation = plan.generation;
            }
        }
        let plant = self.setup.plant;
        facts.retain(|record| match record {
            Record::Planned(_) => plant != Bug::SkipPersist,
            Record::Ended(_) => plant != Bug::SkipEnding,
            Record::Started { .. } => plant != Bug::SkipStarted,
            _ => true,
        });
        if facts.is_empty() {
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
        self.host.writing = facts;
        self.later(after, Ev::HostSynced { life });
    }

    pub(crate) fn on_host_synced(&mut self, life: u64) {
        if self.host.life != life || !self.host.is_up() {
            return;
        }
        let written = std::mem::take(&mut self.host.writing);
        written.iter().for_each(|record| self.durable(record));
        self.serve();
    }

    pub(crate) fn durable(&mut self, record: &Record) {
        self.host.saved.apply(record);
        let epoch = self.host.epoch;
        match record {
            Record::Planned(plan) => {
                let generation = plan.generation;
                self.observe(&Observation::Durable { epoch, generation });
            }
            Record::Checkpoint(checkpoint) => {
                self.observe(&Observation::Newest { step: checkpoint.step });
            }
            Record::NoCheckpoint => self.observe(&Observation::SetAside),
            Record::SetAside { next, .. } => {
                self.observe(&Observation::SetAside);
                self.observe(&Observation::Newest { step: next.step });
            }
            Record::Ended(ending) => self.ended(ending),
            _ => {}
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
            Ending::Stopped { .. } | Ending::Cancelled { .. } => {}
            Ending::Paused { why } if why.contains("differ") && !self.tainted => {
                self.breach(Invariant::OneDigest, &format!("paused: {why}"));
            }
            Ending::Paused { why } | Ending::Failed { why, .. } => {
                if self.host.excuses == 0 || !self.harmed {
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
        if self.verbose {
            self.say(|| format!("    to {to}: {message:?}"));
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
