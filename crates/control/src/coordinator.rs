//! The coordinator's side of one run.
//!
//! [`Coordinator::handle`] takes one event and the time and returns what to do, in order. After
//! every event [`Coordinator::settle`] looks at the whole state and starts whatever is due, so no
//! event needs to know what else is going on.
//!
//! ```text
//! no group ── enough warm workers ──▶ Preparing ─ all prepared ─▶ Syncing ─ all synced ─▶ Running
//!    ▲                                    ▲                                      │
//!    │ fewer than min                     │ next generation                      │ all agreed to
//!    stop └────────────────── failure ◀────────┴───────────────── Held ◀──────────────┘
//! ```

mod forming;
mod members;
mod saving;

use std::collections::BTreeMap;
use std::time::Duration;

use lacuna_types::{AttemptSeq, Generation, Incarnation, Step, Timestamp, WorkerId, exit};

use crate::message::{StepMark, ToCoordinator, ToWorker};
use crate::plan::CheckpointRef;
use crate::timing::Timing;
use forming::{Group, Stage};
use members::Worker;

/// What the machine has to know of a run. Fixed when the run is created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunConfig {
    /// V, the slots of a step.
    pub n_slots: u32,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Fewest workers that train.
    pub workers_min: usize,
    /// Most workers that train; others stay spares.
    pub workers_max: usize,
    /// Checkpoint whenever this many steps have passed.
    pub checkpoint_steps: Option<u64>,
    /// Checkpoint whenever this much time has passed.
    pub checkpoint_interval: Option<Duration>,
}

/// What is known of a run from before: all zero for a new one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Highest generation that was ever named.
    pub generation: Generation,
    /// Probe class of the run, once a worker has set it.
    pub probe: Option<u64>,
    /// Newest committed checkpoint.
    pub checkpoint: Option<CheckpointRef>,
}

/// What happens to a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Time passed; nothing else.
    Tick,
    /// A trainer opened its stream for this run.
    Hello(Hello),
    /// A trainer said something.
    Message {
        /// Who.
        worker: WorkerId,
        /// Which life of it.
        incarnation: Incarnation,
        /// What.
        message: ToCoordinator,
    },
    /// A trainer's stream broke.
    StreamLost {
        /// Who.
        worker: WorkerId,
        /// Which life of it.
        incarnation: Incarnation,
    },
    /// The agent of a trainer saw it end.
    TrainerExited {
        /// Who.
        worker: WorkerId,
        /// Which life of it; `None` if it ended before it said.
        incarnation: Option<Incarnation>,
        /// Exit status or signal, for people.
        how: String,
    },
    /// The driver drew the communicator's id.
    CommId {
        /// For this generation.
        generation: Generation,
        /// Key or unique id.
        comm_id: Vec<u8>,
    },
    /// The manifest is durable.
    CheckpointDone {
        /// Generation of the attempt.
        generation: Generation,
        /// The attempt.
        attempt: AttemptSeq,
        /// The checkpoint.
        checkpoint: CheckpointRef,
    },
    /// The manifest could not be committed.
    CheckpointFailed {
        /// Generation of the attempt.
        generation: Generation,
        /// The attempt.
        attempt: AttemptSeq,
        /// Why, for people.
        why: String,
    },
    /// Take one worker out at the next boundary.
    Drain {
        /// Who.
        worker: WorkerId,
        /// Why, for people.
        why: String,
    },
    /// Stop the run at the next boundary, with a checkpoint, so that it can go on later.
    Stop {
        /// Why, for people.
        why: String,
    },
    /// Checkpoint at the next boundary.
    Checkpoint,
}

/// How a trainer introduces itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Who.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: Incarnation,
    /// Where peers reach its collective.
    pub endpoint: String,
    /// Step of the state in its memory, if there is one.
    pub state: Option<Step>,
}

/// What the driver must do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Make durable before carrying out anything that follows.
    Persist(Record),
    /// Send to one life of a worker; dropped if its stream is gone.
    Send {
        /// To whom.
        to: WorkerId,
        /// To which life of it.
        incarnation: Incarnation,
        /// What.
        message: ToWorker,
    },
    /// Close the stream of one life of a worker.
    Disconnect {
        /// Whose.
        worker: WorkerId,
        /// Which life.
        incarnation: Incarnation,
    },
    /// Draw the communicator's id and answer with [`Event::CommId`].
    DrawCommId(Generation),
    /// Commit the checkpoint and answer with [`Event::CheckpointDone`] or
    /// [`Event::CheckpointFailed`].
    Commit(CommitOrder),
    /// Tell people.
    Note(Note),
    /// Record the figures of a step.
    Mark(StepMark),
}

/// A durable fact of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The highest generation that was ever named.
    Generation(Generation),
    /// The run's probe class.
    Probe(u64),
    /// The newest committed checkpoint.
    Checkpoint(CheckpointRef),
    /// The run is over, or rests.
    Ended(Ending),
}

/// How a run came to rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All steps are done and saved.
    Finished {
        /// Steps done.
        step: Step,
        /// Digest of the final state.
        digest: u64,
    },
    /// Cannot go on.
    Failed {
        /// Why, for people.
        why: String,
        /// Exit code for whoever waits.
        code: u8,
    },
    /// Stopped on request after a checkpoint; can go on.
    Stopped {
        /// Steps done.
        step: Step,
        /// Why, for people.
        why: String,
    },
    /// Waits for an operator.
    Paused {
        /// Why, for people.
        why: String,
    },
}

/// A checkpoint that is complete but for its manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitOrder {
    /// Generation of the attempt.
    pub generation: Generation,
    /// The attempt.
    pub attempt: AttemptSeq,
    /// Step of the state.
    pub step: Step,
    /// Digest of the state, equal on all members.
    pub digest: u64,
    /// Receipts by rank.
    pub receipts: Vec<String>,
}

/// Something people want to know. One value for logs, status and tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Short machine-readable word: `lost`, `formed`, `joined`, `saved`, …
    pub kind: &'static str,
    /// Whether a person should look.
    pub warning: bool,
    /// One sentence.
    pub text: String,
}

/// The machine. One for each run.
#[derive(Debug)]
pub struct Coordinator {
    config: RunConfig,
    timing: Timing,
    generation: Generation,
    probe: Option<u64>,
    checkpoint: Option<CheckpointRef>,
    checkpoint_base: (Step, Timestamp),
    workers: BTreeMap<WorkerId, Worker>,
    group: Option<Group>,
    /// Rank order of the newest group: survivors keep it.
    order: Vec<WorkerId>,
    /// When to form the next generation, and why.
    reform: Option<(Timestamp, String)>,
    changes: u64,
    last_change: Option<Timestamp>,
    /// Steps known to be applied.
    progress: Step,
    fruitless: u32,
    failed_attempts: u32,
    checkpoint_asked: bool,
    stopping: Option<String>,
    ended: Option<Ending>,
    last_waiting: String,
    out: Vec<Command>,
}

impl Coordinator {
    /// Creates the machine of a run, new or from before, at `now`.
    pub fn new(config: RunConfig, timing: Timing, saved: Saved, now: Timestamp) -> Self {
        let base = saved.checkpoint.as_ref().map_or(Step(0), |c| c.step);
        Coordinator {
            config,
            timing,
            generation: saved.generation,
            probe: saved.probe,
            checkpoint: saved.checkpoint,
            checkpoint_base: (base, now),
            workers: BTreeMap::new(),
            group: None,
            order: Vec::new(),
            reform: None,
            changes: 0,
            last_change: None,
            progress: base,
            fruitless: 0,
            failed_attempts: 0,
            checkpoint_asked: false,
            stopping: None,
            ended: None,
            last_waiting: String::new(),
            out: Vec::new(),
        }
    }

    /// Creates the machine of a run that came to rest: it answers, and does nothing.
    pub fn at_rest(
        config: RunConfig,
        timing: Timing,
        saved: Saved,
        ending: Ending,
        now: Timestamp,
    ) -> Self {
        let mut machine = Coordinator::new(config, timing, saved, now);
        if let Ending::Finished { step, .. } | Ending::Stopped { step, .. } = &ending {
            machine.progress = *step;
        }
        machine.ended = Some(ending);
        machine
    }

    /// Takes one event and returns what to do, in order. Remote input never makes it fail.
    pub fn handle(&mut self, now: Timestamp, event: Event) -> Vec<Command> {
        match event {
            Event::Tick => {}
            Event::Hello(hello) => self.on_hello(now, hello),
            Event::Message { worker, incarnation, message } => {
                self.on_message(now, &worker, incarnation, message);
            }
            Event::StreamLost { worker, incarnation } => {
                self.on_stream_lost(now, &worker, incarnation);
            }
            Event::TrainerExited { worker, incarnation, how } => {
                self.on_exited(now, &worker, incarnation, &how);
            }
            Event::CommId { generation, comm_id } => self.on_comm_id(generation, comm_id),
            Event::CheckpointDone { generation, attempt, checkpoint } => {
                self.on_checkpoint_done(now, generation, attempt, checkpoint);
            }
            Event::CheckpointFailed { generation, attempt, why } => {
                if self.attempt_is(generation, attempt) {
                    self.attempt_failed(&why);
                }
            }
            Event::Drain { worker, why } => self.on_leaving(&worker, &why),
            Event::Stop { why } => self.stopping = Some(why),
            Event::Checkpoint => self.checkpoint_asked = true,
        }
        self.settle(now);
        std::mem::take(&mut self.out)
    }

    /// Forgives workers a time in which this process could not listen.
    pub fn excuse(&mut self, paused: Duration) {
        for worker in self.workers.values_mut() {
            worker.last_seen = worker.last_seen + paused;
            worker.stream_lost = worker.stream_lost.map(|at| at + paused);
        }
    }

    /// Returns when [`Event::Tick`] is due at the latest, and for what.
    pub fn next_deadline(&self) -> Option<(Timestamp, &'static str)> {
        if self.ended.is_some() {
            return None;
        }
        let mut all: Vec<(Timestamp, &'static str)> = Vec::new();
        for worker in self.workers.values() {
            all.push((worker.last_seen + self.timing.lease, "lease"));
            if let Some(lost) = worker.stream_lost {
                all.push((lost + self.timing.stream_grace, "stream grace"));
            }
        }
        if let Some((at, _)) = &self.reform {
            all.push((*at, "form"));
        }
        if let Some(group) = &self.group {
            if matches!(group.stage, Stage::Preparing | Stage::Syncing) {
                all.push((group.deadline, "forming"));
            }
            if let Some(attempt) = &group.attempt {
                all.push((attempt.deadline, "attempt"));
            }
            if group.stage == Stage::Running {
                all.extend(self.checkpoint_time().map(|at| (at, "checkpoint")));
                all.extend(self.join_time().map(|at| (at, "join")));
            }
        }
        all.into_iter().min()
    }

    /// Returns how the run came to rest, if it did.
    pub fn ended(&self) -> Option<&Ending> {
        self.ended.as_ref()
    }

    /// Returns what the run is doing, for people.
    pub fn status(&self) -> Status {
        let group = self.group.as_ref();
        let worker = |(id, worker): (&WorkerId, &Worker)| WorkerStatus {
            worker: id.clone(),
            rank: group.and_then(|g| g.plan.rank(id, worker.incarnation)),
            slots: group.map_or(0, |g| {
                g.plan
                    .rank(id, worker.incarnation)
                    .map_or(0, |rank| g.plan.members[rank].slots.len() as u32)
            }),
            state: worker.word(),
            step: worker.beat.as_ref().map_or(Step(0), |b| b.step),
            phase: worker.beat.as_ref().map_or("idle", |b| b.phase.word()),
        };
        Status {
            state: self.stage_word(),
            generation: self.generation,
            step: self.progress,
            checkpoint: self.checkpoint.clone(),
            workers: self.workers.iter().map(worker).collect(),
        }
    }

    /// Returns what the run is doing in one word, as [`Status::state`] has it.
    pub fn stage_word(&self) -> &'static str {
        match (&self.ended, self.group.as_ref().map(|g| g.stage)) {
            (Some(Ending::Finished { .. }), _) => "finished",
            (Some(Ending::Failed { .. }), _) => "failed",
            (Some(Ending::Stopped { .. }), _) => "stopped",
            (Some(Ending::Paused { .. }), _) => "paused",
            (None, None) => "waiting",
            (None, Some(Stage::Preparing)) => "forming",
            (None, Some(Stage::Syncing)) => "syncing",
            (None, Some(Stage::Running)) => "running",
            (None, Some(Stage::Held)) => "held",
        }
    }

    /// Starts everything that is due.
    fn settle(&mut self, now: Timestamp) {
        if self.ended.is_some() {
            return;
        }
        self.expire_workers(now);
        self.expire_forming(now);
        self.expire_attempt(now);
        if self.ended.is_some() {
            return;
        }
        if self.group.is_none() && self.reform.is_none() {
            self.consider_first_group(now);
        }
        match self.group.as_ref().map(|g| g.stage) {
            Some(Stage::Running) => self.consider_running(now),
            Some(Stage::Held) => self.consider_held(now),
            _ => {}
        }
        if self.ended.is_none() && self.reform.as_ref().is_some_and(|(at, _)| *at <= now) {
            let (_, why) = self.reform.take().expect("just seen");
            self.form(now, &why);
            if self.group.is_none() && self.ended.is_none() {
                self.consider_first_group(now);
            }
        }
        self.dismiss_leavers();
    }

    fn on_message(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        incarnation: Incarnation,
        message: ToCoordinator,
    ) {
        let Some(record) = self.workers.get_mut(worker).filter(|w| w.incarnation == incarnation)
        else {
            let message = ToWorker::Stale { current: self.generation };
            self.send_to(worker, incarnation, message);
            return;
        };
        record.last_seen = now;
        match message {
            ToCoordinator::Beat(beat) => self.on_beat(worker, beat),
            ToCoordinator::Warm { probe } => self.on_warm(now, worker, probe),
            ToCoordinator::Prepared { generation, state } => {
                self.on_prepared(worker, generation, state);
            }
            ToCoordinator::Synced { generation, step, digest } => {
                self.on_synced(now, worker, generation, step, digest);
            }
            ToCoordinator::Fault { generation, kind, detail } => {
                self.on_fault(now, worker, generation, kind, &detail);
            }
            ToCoordinator::StepMark(mark) => self.on_mark(worker, mark),
            ToCoordinator::Held { generation, step, digest } => {
                self.on_held(worker, generation, step, digest);
            }
            ToCoordinator::Snapshotted { generation, attempt, step, digest } => {
                self.on_snapshotted(worker, generation, attempt, step, digest);
            }
            ToCoordinator::PartDone { generation, attempt, receipt } => {
                self.on_part_done(worker, generation, attempt, receipt);
            }
            ToCoordinator::PartFailed { generation, attempt, detail } => {
                if self.attempt_is(generation, attempt) {
                    self.attempt_failed(&format!("{worker}: {detail}"));
                }
            }
            ToCoordinator::Leaving { why } => self.on_leaving(worker, &why),
        }
    }

    /// Comes to rest: tells everybody, and says so durably first.
    fn end(&mut self, ending: Ending) {
        self.out.push(Command::Persist(Record::Ended(ending.clone())));
        let (code, why) = match &ending {
            Ending::Finished { step, .. } => (exit::OK, format!("finished at step {step}")),
            Ending::Failed { why, code } => (*code, why.clone()),
            // The workers did nothing wrong and may serve another run.
            Ending::Stopped { why, .. } => (exit::OK, why.clone()),
            // What is in memory may be what differs: the next group starts from a checkpoint.
            Ending::Paused { why } => (exit::OK, why.clone()),
        };
        let (kind, warning) = match &ending {
            Ending::Finished { .. } => ("finished", false),
            Ending::Failed { .. } => ("failed", true),
            Ending::Stopped { .. } => ("stopped", false),
            Ending::Paused { .. } => ("paused", true),
        };
        self.note(kind, warning, why.clone());
        if let Some(group) = self.group.take() {
            let generation = group.plan.generation;
            self.broadcast(&group, &ToWorker::Revoke { generation, why: why.clone() });
        }
        let everybody: Vec<(WorkerId, Incarnation)> =
            self.workers.iter().map(|(id, w)| (id.clone(), w.incarnation)).collect();
        for (worker, incarnation) in everybody {
            self.send_to(&worker, incarnation, ToWorker::Exit { code, why: why.clone() });
        }
        self.reform = None;
        self.ended = Some(ending);
    }

    fn note(&mut self, kind: &'static str, warning: bool, text: String) {
        self.out.push(Command::Note(Note { kind, warning, text }));
    }

    fn send_to(&mut self, to: &WorkerId, incarnation: Incarnation, message: ToWorker) {
        self.out.push(Command::Send { to: to.clone(), incarnation, message });
    }

    fn broadcast(&mut self, group: &Group, message: &ToWorker) {
        for member in &group.plan.members {
            self.send_to(&member.worker, member.incarnation, message.clone());
        }
    }
}

/// What a run is doing, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// One word.
    pub state: &'static str,
    /// Newest generation.
    pub generation: Generation,
    /// Steps known to be applied.
    pub step: Step,
    /// Newest committed checkpoint.
    pub checkpoint: Option<CheckpointRef>,
    /// Workers of the run, by name.
    pub workers: Vec<WorkerStatus>,
}

/// What a worker is doing, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerStatus {
    /// Who.
    pub worker: WorkerId,
    /// Its rank, if it is a member.
    pub rank: Option<usize>,
    /// Slots it computes of every step.
    pub slots: u32,
    /// One word: registered, spare, member, leaving, unfit.
    pub state: &'static str,
    /// Steps behind its state, as of its newest beat.
    pub step: Step,
    /// What it does, as of its newest beat.
    pub phase: &'static str,
}

#[cfg(test)]
mod tests;
