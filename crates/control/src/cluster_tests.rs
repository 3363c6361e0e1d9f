//! A whole cluster in one thread: the two real machines over a simulated network and clock.
//!
//! The step loop is modelled: a step takes time, needs every member of the generation, and gives
//! the state whose digest is the step's number. What is checked is the protocol: that the run ends,
//! at one state, whatever happens on the way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use lacuna_types::{AttemptSeq, Generation, Incarnation, Step, Timestamp, WorkerId};

use crate::coordinator::{self, Coordinator, Ending, Hello, RunConfig};
use crate::journal::{Record, Saved};
use crate::message::{Beat, FaultKind, Phase, ToCoordinator, ToWorker};
use crate::plan::{CheckpointRef, Origin, Plan, Sync};
use crate::timing::Timing;
use crate::worker::{self, Patience, Report, Session};

const MS: Duration = Duration::from_millis(1);
const STEP_TIME: Duration = Duration::from_millis(20);

/// A modelled step loop.
#[derive(Debug, Default)]
struct Trainer {
    state: Option<u64>,
    plan: Option<Arc<Plan>>,
    /// Ready to train: (generation, running).
    training: bool,
    stop: bool,
    save: Option<AttemptSeq>,
    broken: bool,
}

struct Process {
    session: Session,
    incarnation: Incarnation,
    trainer: Trainer,
    connected: bool,
    stopped: bool,
}

#[derive(Debug)]
enum Wire {
    ToWorker(WorkerId, Incarnation, ToWorker),
    ToCoordinator(WorkerId, Incarnation, ToCoordinator),
    Exited(WorkerId, Incarnation),
    Hello(WorkerId, Incarnation),
    Report(WorkerId, Incarnation, Report),
    Done(coordinator::Event),
}

struct Cluster {
    now: Timestamp,
    rng: u64,
    config: RunConfig,
    timing: Timing,
    coordinator: Coordinator,
    processes: BTreeMap<WorkerId, Process>,
    wires: Vec<(Timestamp, u64, Wire)>,
    sent: u64,
    next_step: Timestamp,
    saved: Saved,
    incarnations: u64,
    applied: BTreeMap<(Generation, u64), usize>,
    notes: Vec<String>,
    exits: Vec<(WorkerId, u8)>,
    /// One step in this many loses a member between two members' updates; 0 for never.
    torn_one_in: u64,
}

impl Cluster {
    fn new(config: RunConfig, seed: u64) -> Self {
        let timing = Timing::one_machine();
        let now = Timestamp::from_millis(1000);
        let coordinator = Coordinator::new(config.clone(), timing.clone(), Saved::default(), now);
        Cluster {
            now,
            rng: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            config,
            timing,
            coordinator,
            processes: BTreeMap::new(),
            wires: Vec::new(),
            sent: 0,
            next_step: now,
            saved: Saved::default(),
            incarnations: 0,
            applied: BTreeMap::new(),
            notes: Vec::new(),
            exits: Vec::new(),
            torn_one_in: 40,
        }
    }

    fn random(&mut self, n: u64) -> u64 {
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        (self.rng >> 11) % n
    }

    fn post(&mut self, wire: Wire) {
        // Streams keep order, so later messages are never earlier: one growing delay for all.
        let delay = MS * (1 + self.random(4) as u32);
        let last = self.wires.iter().map(|(at, _, _)| *at).max().unwrap_or_default();
        let at = (self.now + delay).max(last);
        self.sent += 1;
        self.wires.push((at, self.sent, wire));
    }

    fn spawn(&mut self, name: &str) {
        let worker: WorkerId = name.parse().unwrap();
        self.incarnations += 1;
        let incarnation = Incarnation(self.incarnations);
        let session = Session::new(
            Patience { orphan: Duration::from_secs(60), give_up: Duration::from_secs(600) },
            self.now,
        );
        let trainer = Trainer::default();
        let process = Process { session, incarnation, trainer, connected: false, stopped: false };
        self.processes.insert(worker.clone(), process);
        self.post(Wire::Hello(worker.clone(), incarnation));
        self.post(Wire::Report(worker, incarnation, Report::Warm { probe: 7 }));
    }

    fn kill(&mut self, name: &str) {
        let worker: WorkerId = name.parse().unwrap();
        if let Some(process) = self.processes.remove(&worker) {
            self.break_peers(&process.trainer);
            self.post(Wire::Exited(worker, process.incarnation));
        }
    }

    /// The communicator of a dead member fails at its peers.
    fn break_peers(&mut self, dead: &Trainer) {
        let Some(plan) = &dead.plan else { return };
        let generation = plan.generation;
        let in_it = |t: &Trainer| t.plan.as_ref().is_some_and(|p| p.generation == generation);
        let hit: Vec<(WorkerId, Incarnation)> = self
            .processes
            .iter_mut()
            .filter(|(_, p)| in_it(&p.trainer) && !p.trainer.broken)
            .map(|(id, p)| {
                p.trainer.broken = true;
                (id.clone(), p.incarnation)
            })
            .collect();
        for (worker, incarnation) in hit {
            let kind = FaultKind::Communicator;
            let (detail, suspects) = ("peer lost".to_string(), vec![]);
            let fault = Report::Fault { generation, kind, suspects, detail };
            self.post(Wire::Report(worker, incarnation, fault));
        }
    }

    fn feed_coordinator(&mut self, event: coordinator::Event) {
        for command in self.coordinator.handle(self.now, event) {
            self.carry_out(command);
        }
        self.check_invariants();
    }

    fn carry_out(&mut self, command: coordinator::Command) {
        use coordinator::{Command, Event};
        match command {
            Command::Persist(record) => {
                if let Record::Planned(plan) = &record {
                    assert!(plan.generation > self.saved.generation, "I1: generations grow");
                }
                self.saved.apply(&record);
            }
            Command::Mark(_) | Command::NameSamples(_) | Command::Kill { .. } => {}
            Command::Send { to, incarnation, message } => {
                self.post(Wire::ToWorker(to, incarnation, message));
            }
            Command::Disconnect { worker, incarnation } => {
                if let Some(p) = self.processes.get_mut(&worker)
                    && p.incarnation == incarnation
                {
                    p.connected = false;
                }
            }
            Command::DrawCommId(generation) => {
                let comm_id = vec![1, 2, 3];
                self.post(Wire::Done(Event::CommId { generation, comm_id }));
            }
            Command::Commit(order) => {
                let manifest = format!("manifest-{}", order.step);
                assert_eq!(order.digest, order.step.0, "a checkpoint holds the state it names");
                let checkpoint = CheckpointRef { step: order.step, manifest };
                let (generation, attempt) = (order.generation, order.attempt);
                let done = Event::CheckpointDone { generation, attempt, checkpoint };
                self.post(Wire::Done(done));
            }
            Command::Note(note) => self.notes.push(format!("{}: {}", note.kind, note.text)),
        }
    }

    fn feed_worker(&mut self, worker: &WorkerId, incarnation: Incarnation, event: worker::Event) {
        let now = self.now;
        let Some(p) = self.processes.get_mut(worker).filter(|p| p.incarnation == incarnation)
        else {
            return;
        };
        for command in p.session.handle(now, event) {
            self.obey(worker, incarnation, command);
        }
    }

    fn obey(&mut self, worker: &WorkerId, incarnation: Incarnation, command: worker::Command) {
        use worker::Command;
        let Some(p) = self.processes.get_mut(worker) else {
            return;
        };
        let report = |report| Wire::Report(worker.clone(), incarnation, report);
        match command {
            Command::Send(message) if p.connected => {
                self.post(Wire::ToCoordinator(worker.clone(), incarnation, message));
            }
            Command::Send(_) | Command::Note(_) | Command::AbortAttempt { .. } => {}
            Command::Reconnect => p.connected = false,
            Command::Leave { .. } => {
                let left = std::mem::take(&mut p.trainer);
                p.trainer.state = left.state;
                let state = left.state.map(Step);
                self.break_peers(&left);
                self.post(Wire::Report(worker.clone(), incarnation, Report::Down { state }));
            }
            Command::Connect { plan, sync, .. } => {
                let wire = report(synchronise(&mut p.trainer, plan, &sync, worker, incarnation));
                self.post(wire);
            }
            Command::Start { .. } => p.trainer.training = true,
            Command::Adopt { plan } => {
                let generation = plan.generation;
                p.trainer =
                    Trainer { state: p.trainer.state, plan: Some(plan), ..Trainer::default() };
                let state = Step(p.trainer.state.unwrap());
                self.post(report(Report::Adopted { generation, state }));
            }
            Command::Audit { generation } => {
                self.post(report(Report::Audited { generation, probe: 7 }));
            }
            Command::RaiseStop { .. } => p.trainer.stop = true,
            Command::Save { attempt, held: false, .. } => p.trainer.save = Some(attempt),
            Command::Save { attempt, held: true, .. } => {
                self.save(worker, attempt);
            }
            Command::Exit { code, .. } => {
                self.exits.push((worker.clone(), code));
                let p = self.processes.remove(worker).unwrap();
                self.break_peers(&p.trainer);
                self.post(Wire::Exited(worker.clone(), incarnation));
            }
        }
    }

    fn save(&mut self, worker: &WorkerId, attempt: AttemptSeq) {
        let p = &self.processes[worker];
        let generation = p.trainer.plan.as_ref().unwrap().generation;
        let digest = p.trainer.state.unwrap();
        let (step, incarnation) = (Step(digest), p.incarnation);
        let taken = Report::Snapshotted { generation, attempt, step, digest };
        self.post(Wire::Report(worker.clone(), incarnation, taken));
        let receipt = format!("{worker}@{step}");
        let done = Report::PartDone { generation, attempt, receipt };
        self.post(Wire::Report(worker.clone(), incarnation, done));
    }

    /// One step of every generation whose members are all training.
    fn train(&mut self) {
        let mut groups: BTreeMap<Generation, Vec<WorkerId>> = BTreeMap::new();
        for (id, p) in &self.processes {
            if p.trainer.training && !p.trainer.broken && !p.stopped {
                let generation = p.trainer.plan.as_ref().unwrap().generation;
                groups.entry(generation).or_default().push(id.clone());
            }
        }
        for (generation, members) in groups {
            let plan = self.processes[&members[0]].trainer.plan.clone().unwrap();
            let alive = |m: &crate::plan::Member| {
                self.processes.get(&m.worker).is_some_and(|p| p.incarnation == m.incarnation)
            };
            if members.len() < plan.world() || !plan.members.iter().all(alive) {
                continue;
            }
            self.step_of(generation, &members);
        }
    }

    fn step_of(&mut self, generation: Generation, members: &[WorkerId]) {
        let state = |c: &Cluster, id: &WorkerId| c.processes[id].trainer.state.unwrap();
        let before = state(self, &members[0]);
        assert!(members.iter().all(|id| state(self, id) == before), "I3: members are in step");
        let ended = before >= self.config.total_steps;
        let stop = members.iter().all(|id| self.processes[id].trainer.stop);
        let saves: Vec<Option<AttemptSeq>> =
            members.iter().map(|id| self.processes[id].trainer.save).collect();
        let save = saves[0].filter(|_| saves.iter().all(|s| *s == saves[0]));
        // A kill may come between two members' updates: the unlucky ones stay a step behind.
        let torn = !ended && self.torn_one_in > 0 && self.random(self.torn_one_in) == 0;
        for (i, id) in members.iter().enumerate() {
            let unlucky = torn && i == 0;
            if !ended && !unlucky {
                self.processes.get_mut(id).unwrap().trainer.state = Some(before + 1);
            }
        }
        if torn {
            let victim = members[0].as_str().to_string();
            self.kill(&victim);
            self.spawn(&victim);
            return;
        }
        *self.applied.entry((generation, before)).or_default() += 1;
        for id in members {
            let incarnation = self.processes[id].incarnation;
            if let Some(attempt) = save.filter(|_| !ended) {
                self.processes.get_mut(id).unwrap().trainer.save = None;
                self.save(id, attempt);
            }
            let p = self.processes.get_mut(id).unwrap();
            let digest = p.trainer.state.unwrap();
            if stop || digest >= self.config.total_steps {
                p.trainer.training = false;
                let report = Report::Held { generation, step: Step(digest), digest };
                self.post(Wire::Report(id.clone(), incarnation, report));
            }
        }
    }

    fn beats(&mut self) {
        let say: Vec<(WorkerId, Incarnation, Beat)> = self
            .processes
            .iter()
            .filter(|(_, p)| p.connected && !p.stopped)
            .map(|(id, p)| {
                let generation = p.session.generation();
                let step = Step(p.trainer.state.unwrap_or(0));
                let beat = Beat {
                    generation,
                    step,
                    phase: Phase::Compute,
                    phase_ms: 0,
                    op_seq: 0,
                    in_op: false,
                    slot_us: 0,
                };
                (id.clone(), p.incarnation, beat)
            })
            .collect();
        for (id, incarnation, beat) in say {
            self.post(Wire::ToCoordinator(id, incarnation, ToCoordinator::Beat(beat)));
        }
        let lost: Vec<(WorkerId, Incarnation)> = self
            .processes
            .iter()
            .filter(|(_, p)| !p.connected && !p.stopped)
            .map(|(id, p)| (id.clone(), p.incarnation))
            .collect();
        for (id, incarnation) in lost {
            self.feed_worker(&id, incarnation, worker::Event::Disconnected);
            self.post(Wire::Hello(id, incarnation));
        }
    }

    fn deliver(&mut self, wire: Wire) {
        use coordinator::Event;
        match wire {
            Wire::ToWorker(id, incarnation, message) => {
                if self.processes.get(&id).is_some_and(|p| p.stopped) {
                    return self.post(Wire::ToWorker(id, incarnation, message));
                }
                self.feed_worker(&id, incarnation, worker::Event::Received(message));
            }
            Wire::ToCoordinator(worker, incarnation, message) => {
                self.feed_coordinator(Event::Message { worker, incarnation, message });
            }
            Wire::Exited(worker, incarnation) => {
                let (incarnation, how) = (Some(incarnation), "killed by signal 9".to_string());
                self.feed_coordinator(Event::TrainerExited { worker, incarnation, how });
            }
            Wire::Hello(worker, incarnation) => {
                let process = self.processes.get_mut(&worker);
                let Some(p) = process.filter(|p| p.incarnation == incarnation && !p.connected)
                else {
                    return;
                };
                p.connected = true;
                let (endpoint, state) = ("127.0.0.1:1".to_string(), p.session.state());
                let (generation, up) = (p.session.taking_part_in(), p.session.is_up());
                let hello =
                    Hello { worker: worker.clone(), incarnation, endpoint, state, generation, up };
                self.feed_coordinator(Event::Hello(hello));
                self.feed_worker(&worker, incarnation, worker::Event::Connected);
                self.feed_worker(&worker, incarnation, worker::Event::Welcomed);
            }
            Wire::Report(id, incarnation, report) => {
                self.feed_worker(&id, incarnation, worker::Event::Report(report));
            }
            Wire::Done(event) => self.feed_coordinator(event),
        }
    }

    /// Runs until `done` or for `limit` of simulated time; tells whether `done` came true.
    fn run(&mut self, limit: Duration, done: impl Fn(&Cluster) -> bool) -> bool {
        let end = self.now + limit;
        let mut next_beat = self.now;
        while self.now < end {
            if done(self) {
                return true;
            }
            self.now = self.now + MS;
            while let Some(at) = self.wires.iter().position(|(at, _, _)| *at <= self.now) {
                let (_, _, wire) = self.wires.remove(at);
                self.deliver(wire);
            }
            if self.now >= self.next_step {
                self.next_step = self.now + STEP_TIME;
                self.train();
            }
            if self.now >= next_beat {
                next_beat = self.now + self.timing.beat;
                self.beats();
            }
            if self.coordinator.next_deadline().is_some_and(|(at, _)| at <= self.now) {
                self.feed_coordinator(coordinator::Event::Tick);
            }
        }
        done(self)
    }

    fn finished(&self) -> bool {
        matches!(self.coordinator.ended(), Some(Ending::Finished { .. }))
    }

    fn check_invariants(&self) {
        let ranks: Vec<usize> =
            self.coordinator.status().workers.iter().filter_map(|w| w.rank).collect();
        let slots: u32 = self.coordinator.status().workers.iter().map(|w| w.slots).sum();
        assert!(slots <= self.config.n_slots, "I4: no slot twice");
        let unique: std::collections::BTreeSet<&usize> = ranks.iter().collect();
        assert_eq!(unique.len(), ranks.len(), "one worker a rank");
    }

    fn transcript(&self) -> String {
        let process = |(id, p): (&WorkerId, &Process)| {
            format!("{id} connected {} stopped {} {:?}\n", p.connected, p.stopped, p.trainer)
        };
        let processes: String = self.processes.iter().map(process).collect();
        format!("{}\n{processes}{:?}", self.notes.join("\n"), self.coordinator.status())
    }
}

/// Models heal, load and init: afterwards the state is the plan's.
fn synchronise(
    trainer: &mut Trainer,
    plan: Arc<Plan>,
    sync: &Sync,
    worker: &WorkerId,
    incarnation: Incarnation,
) -> Report {
    let rank = plan.rank(worker, incarnation).expect("only members connect");
    if let Origin::Memory { healed, .. } = &sync.origin
        && !healed.contains(&rank)
    {
        assert_eq!(trainer.state, Some(sync.resume_step.0), "a source has the state it sends");
    }
    trainer.state = Some(sync.resume_step.0);
    let generation = plan.generation;
    *trainer = Trainer { state: trainer.state, plan: Some(plan), ..Trainer::default() };
    Report::Synced { generation, step: sync.resume_step, digest: sync.resume_step.0 }
}

mod histories;
