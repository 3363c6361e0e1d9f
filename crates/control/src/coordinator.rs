//! The coordinator's side of one run.
//!
//! [`Coordinator::handle`] takes one event and the time and returns what to do, in order. After
//! every event [`Coordinator::settle`] looks at the whole state and starts whatever is due, so no
//! event needs to know what else is going on.
//!
//! ```text
//! no group ── enough warm workers ──▶ Preparing ─ all prepared ─▶ Syncing ─ all synced ─▶ Running
//!    ▲                                    ▲                                   ▲  │
//!    │ fewer than min                     │ next generation        all back   │  │ all agreed to
//!    │                                    │                     Recovering ───┘  │ stop
//!    └────────────────── failure ◀────────┴───────────────── Held ◀──────────────┘
//! ```
//!
//! A machine made from a journal whose group was running starts in Recovering.

mod bad_samples;
mod conduct;
mod dispute;
mod forming;
mod hang;
mod inquiry;
mod members;
mod note_texts;
mod overdue;
mod returning;
mod running;
mod saving;
mod status;
mod types;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lacuna_types::{Incarnation, Step, Timestamp, WorkerId, exit};

use crate::journal::{Record, Saved};
use crate::message::{ToCoordinator, ToWorker};
use crate::timing::Timing;
use conduct::{Conduct, Deaths};
use dispute::Dispute;
use forming::{Group, Stage};
use inquiry::Inquiry;
use members::Worker;
use returning::LastStarted;
pub use types::{
    Cause, Command, CommitOrder, Ending, Event, Examination, Hello, Note, RunConfig, Status,
    WhenBusy, WorkerStatus,
};

/// The machine. One for each run.
#[derive(Debug)]
pub struct Coordinator {
    config: RunConfig,
    timing: Timing,
    /// Everything that a crash must not lose; changed by [`Coordinator::record`] alone.
    saved: Saved,
    checkpoint_base: (Step, Timestamp),
    workers: BTreeMap<WorkerId, Worker>,
    conduct: BTreeMap<WorkerId, Conduct>,
    group: Option<Group>,
    /// Rank order of the newest group: survivors keep it.
    order: Vec<WorkerId>,
    /// When to form the next generation, and why.
    reform: Option<(Timestamp, Cause, String)>,
    /// When the newest group ended, or this machine was created.
    no_group_since: Timestamp,
    /// When a group that trained was broken off, until the next one starts.
    broken_at: Option<Timestamp>,
    /// Groups formed since the machine was created.
    formed: BTreeMap<Cause, u64>,
    /// After a restart: members that have not come back, and until when to wait for them.
    awaited: (BTreeSet<WorkerId>, Timestamp),
    last_started: Option<LastStarted>,
    dispute: Option<Dispute>,
    inquiry: Option<Inquiry>,
    last_change: Option<Timestamp>,
    /// Lives that were to be killed and whose end was not seen.
    shot: BTreeSet<(WorkerId, Incarnation)>,
    /// How often members were missed since the last step.
    suspicions: BTreeMap<WorkerId, u32>,
    /// How often a member's store was away while its peers had data, since the last step.
    outages: BTreeMap<WorkerId, u32>,
    /// Generations in a row that ended because a store did not answer some of their members.
    partial_outages: u32,
    /// Verdicts in a row that nobody waits for anybody.
    slow_verdicts: u32,
    /// Steps known to be applied.
    progress: Step,
    fruitless: u32,
    /// Checkpoint attempts in a row that failed, and those of them at a boundary.
    failed_attempts: (u32, u32),
    /// Attempts given up for members that left, since the newest checkpoint.
    closed_for_leaves: u32,
    /// Times in a row that the group was stuck and no member was to blame.
    network_hangs: u32,
    deaths: Deaths,
    last_waiting: String,
    /// When something may be due next; never later than it is.
    due: Option<(Timestamp, &'static str)>,
    out: Vec<Command>,
}

impl Coordinator {
    /// Creates the machine of a run, new or from its journal, at `now`.
    ///
    /// One whose group was forming says the same plan again; one whose group was training waits
    /// for its members, and goes on with them if all come back. One that came to rest answers, and
    /// does nothing.
    pub fn new(config: RunConfig, timing: Timing, saved: Saved, now: Timestamp) -> Self {
        let base = saved.checkpoint.as_ref().map_or(Step(0), |c| c.step);
        let progress = match &saved.ending {
            Some(Ending::Finished { step, .. } | Ending::Stopped { step, .. }) => *step,
            _ => base.max(saved.started.unwrap_or_default()),
        };
        let until = now + 2 * timing.lease;
        let group = saved.plan.clone().map(|plan| Group::recovered(plan, &saved, &timing, now));
        let order: Vec<WorkerId> =
            group.iter().flat_map(|g| &g.plan.members).map(|m| m.worker.clone()).collect();
        let last_started =
            group.as_ref().zip(saved.started).map(|(g, step)| LastStarted::of(g, step, now));
        let last_started = last_started.map(|last| last.over_if(saved.over));
        Coordinator {
            config,
            timing,
            checkpoint_base: (base, now),
            workers: BTreeMap::new(),
            conduct: BTreeMap::new(),
            group,
            awaited: (order.iter().cloned().collect(), until),
            order,
            reform: None,
            no_group_since: now,
            broken_at: None,
            formed: BTreeMap::new(),
            last_started,
            dispute: None,
            inquiry: None,
            last_change: None,
            shot: BTreeSet::new(),
            suspicions: BTreeMap::new(),
            outages: BTreeMap::new(),
            partial_outages: 0,
            slow_verdicts: 0,
            progress,
            fruitless: 0,
            failed_attempts: (0, 0),
            closed_for_leaves: 0,
            network_hangs: 0,
            deaths: Deaths::default(),
            last_waiting: String::new(),
            due: Some((now, "start")),
            out: Vec::new(),
            saved,
        }
    }

    /// Takes one event and returns what to do, in order. Remote input never makes it fail.
    pub fn handle(&mut self, now: Timestamp, event: Event) -> Vec<Command> {
        let quiet = self.is_quiet(&event);
        let stage = self.group.as_ref().map(|group| group.stage);
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
            Event::CommId { generation, comm_id } => self.on_comm_id(now, generation, comm_id),
            Event::CheckpointDone { generation, attempt, checkpoint } => {
                self.on_checkpoint_done(now, generation, attempt, checkpoint);
            }
            Event::CheckpointFailed { generation, attempt, why } => {
                if self.attempt_is(generation, attempt) {
                    self.attempt_failed(&why);
                }
            }
            Event::Examined { checkpoint, found } => self.on_examined(&checkpoint, found),
            Event::Release { worker } => self.on_release(&worker),
            Event::Resize { min, max } => self.on_resize(min, max),
            // One that may go on is told that it shall not.
            Event::Cancel { why } if self.may_go_on() => self.end(Ending::Cancelled { why }),
            // What follows asks something of a run; one that rests has nothing to give.
            _ if self.saved.ending.is_some() => {}
            Event::Drain { worker, why } => self.on_drain(worker, why),
            Event::Stop { why } => self.record(Record::Stopping { why }),
            Event::Cancel { .. } => {}
            Event::Checkpoint => self.record(Record::CheckpointAsked),
            Event::Force => self.on_force(),
            Event::Superseded { why } => self.end(Ending::Paused { why }),
        }
        let moved = self.group.as_ref().map(|group| group.stage) != stage;
        let caused = self.out.iter().any(|command| !matches!(command, Command::Mark(_)));
        let early = self.due.is_some_and(|(at, _)| now < at);
        if !(quiet && early) || moved || caused {
            self.settle(now);
            self.due = self.compute_due(now);
        }
        std::mem::take(&mut self.out)
    }

    /// Tells whether an event is a sign of life, or one of the answers that a group gathers from
    /// all its members: such can start nothing before the next deadline, unless a group goes to
    /// another stage by it, or it causes a command.
    ///
    /// With a thousand workers almost every event is one.
    fn is_quiet(&self, event: &Event) -> bool {
        let Event::Message { message, .. } = event else {
            return false;
        };
        match message {
            ToCoordinator::Beat(beat) => !self.saves_at(beat.step),
            ToCoordinator::StepMark(mark) => !self.saves_at(mark.step),
            ToCoordinator::Held { step, .. } | ToCoordinator::Snapshotted { step, .. } => {
                self.group.is_some() && !self.saves_at(*step)
            }
            ToCoordinator::Prepared { .. }
            | ToCoordinator::Synced { .. }
            | ToCoordinator::PartDone { .. } => self.group.is_some(),
            _ => false,
        }
    }

    /// Forgives workers a time in which this process could not listen.
    pub fn excuse(&mut self, paused: Duration) {
        for worker in self.workers.values_mut() {
            worker.last_seen = worker.last_seen + paused;
            worker.stream_lost = worker.stream_lost.map(|at| at + paused);
        }
        if let Some(group) = &mut self.group {
            group.deadline = group.deadline + paused;
            group.moved = group.moved + paused;
        }
        self.awaited.1 = self.awaited.1 + paused;
        self.no_group_since = self.no_group_since + paused;
        if let Some(dispute) = &mut self.dispute {
            dispute.deadline = dispute.deadline + paused;
        }
        if let Some(inquiry) = &mut self.inquiry {
            inquiry.deadline = inquiry.deadline + paused;
        }
    }

    /// Returns when [`Event::Tick`] is due at the latest, and for what.
    pub fn next_deadline(&self) -> Option<(Timestamp, &'static str)> {
        self.due
    }

    /// Returns how the run came to rest, if it did.
    pub fn ended(&self) -> Option<&Ending> {
        self.saved.ending.as_ref()
    }

    /// Tells whether the run is on, or rests and waits to go on.
    fn may_go_on(&self) -> bool {
        matches!(&self.saved.ending, None | Some(Ending::Stopped { .. } | Ending::Paused { .. }))
    }

    /// Returns what a crash must not lose: what the records so far add up to.
    pub fn saved(&self) -> &Saved {
        &self.saved
    }

    /// Makes a fact part of the state, and has it made durable before what follows is carried out.
    fn record(&mut self, record: Record) {
        self.saved.apply(&record);
        self.out.push(Command::Persist(record));
    }

    /// Starts everything that is due.
    fn settle(&mut self, now: Timestamp) {
        let ended = |c: &Coordinator| c.saved.ending.is_some();
        let expiries: [fn(&mut Coordinator, Timestamp); 6] = [
            Self::expire_workers,
            Self::expire_forming,
            Self::expire_attempt,
            Self::expire_dispute,
            Self::expire_inquiry,
            Self::expire_stall,
        ];
        for expire in expiries {
            if ended(self) {
                return;
            }
            expire(self, now);
        }
        if ended(self) {
            return;
        }
        let nothing_begun = self.reform.is_none() && self.dispute.is_none();
        if self.group.is_none() && nothing_begun {
            self.consider_first_group(now);
        } else if self.group.is_none() {
            self.hurry_if_full(now);
        }
        match self.group.as_ref().map(|g| g.stage) {
            Some(Stage::Preparing) => self.consider_preparing(),
            Some(Stage::Running) => self.consider_running(now),
            Some(Stage::Held) => self.consider_held(now),
            _ => {}
        }
        if !ended(self) && self.reform_is_due(now) {
            let (_, cause, why) = self.reform.take().expect("just seen");
            self.form(now, cause, &why);
            if self.group.is_none() && self.reform.is_none() && !ended(self) {
                self.consider_first_group(now);
            }
        }
        self.dismiss_leavers();
        self.note_that_it_is_over();
    }

    fn reform_is_due(&self, now: Timestamp) -> bool {
        let waits = !self.awaited.0.is_empty() && now < self.awaited.1;
        let due = self.reform.as_ref().is_some_and(|(at, ..)| *at <= now);
        due && self.is_settled() && !waits
    }

    /// Tells whether nothing is being looked into that the next group depends on.
    fn is_settled(&self) -> bool {
        self.dispute.is_none() && self.inquiry.is_none()
    }

    fn compute_due(&self, now: Timestamp) -> Option<(Timestamp, &'static str)> {
        if self.saved.ending.is_some() {
            return None;
        }
        let mut all: Vec<(Timestamp, &'static str)> = Vec::new();
        for worker in self.workers.values() {
            all.push((worker.last_seen + self.timing.lease, "lease"));
            if let Some(lost) = worker.stream_lost {
                all.push((lost + self.timing.stream_grace, "stream grace"));
            }
        }
        if let Some((at, ..)) = self.reform.as_ref().filter(|_| self.is_settled()) {
            let waits = !self.awaited.0.is_empty() && now < self.awaited.1;
            all.push((if waits { self.awaited.1 } else { *at }, "form"));
        }
        all.extend(self.dispute.as_ref().map(|d| (d.deadline, "audit")));
        all.extend(self.inquiry.as_ref().map(|i| (i.deadline, "examination")));
        let quarantines = self.conduct.values().filter_map(|c| c.until);
        all.extend(quarantines.filter(|at| *at > now).map(|at| (at, "quarantine")));
        all.extend(self.zombie_until().filter(|at| *at > now).map(|at| (at, "disjoint")));
        match &self.group {
            Some(group) => self.group_due(group, now, &mut all),
            None => {
                all.extend(Some(self.hope_until()).filter(|at| *at > now).map(|at| (at, "hope")))
            }
        }
        all.into_iter().min()
    }

    fn on_message(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        incarnation: Incarnation,
        message: ToCoordinator,
    ) {
        if self.saved.ending.is_some() {
            return;
        }
        let Some(record) = self.workers.get_mut(worker).filter(|w| w.incarnation == incarnation)
        else {
            let message = ToWorker::Stale { current: self.saved.generation };
            self.send_to(worker, incarnation, message);
            return;
        };
        record.last_seen = now;
        match message {
            ToCoordinator::Beat(beat) => self.on_beat(now, worker, beat),
            ToCoordinator::Warm { probe } => self.on_warm(now, worker, probe),
            ToCoordinator::Prepared { generation, state, trained, kept } => {
                self.on_prepared(now, worker, generation, state, trained, kept);
            }
            ToCoordinator::Synced { generation, step, digest } => {
                self.on_synced(now, worker, generation, step, digest);
            }
            ToCoordinator::Fault { generation, kind, suspects, detail } => {
                self.on_fault(now, worker, generation, kind, &suspects, &detail);
            }
            ToCoordinator::Audited { generation, probe } => {
                self.on_audited(now, worker, generation, probe);
            }
            ToCoordinator::StepMark(mark) => self.on_mark(now, worker, mark),
            ToCoordinator::Held { generation, step, digest } => {
                self.on_held(now, worker, generation, step, digest);
            }
            ToCoordinator::Snapshotted { generation, attempt, step, digest } => {
                self.on_snapshotted(now, worker, generation, attempt, step, digest);
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
            ToCoordinator::BadSamples(report) => self.on_bad_samples(report),
        }
    }

    /// Comes to rest: tells everybody, and says so durably first.
    fn end(&mut self, ending: Ending) {
        let (code, why) = match &ending {
            Ending::Finished { step, .. } => (exit::OK, format!("finished at step {step}")),
            Ending::Failed { why, code } => (*code, why.clone()),
            // The workers did nothing wrong and may serve another run.
            Ending::Stopped { why, .. } | Ending::Cancelled { why } => (exit::OK, why.clone()),
            // What is in memory may be what differs: the next group starts from a checkpoint.
            Ending::Paused { why } => (exit::OK, why.clone()),
        };
        let (kind, warning) = match &ending {
            Ending::Finished { .. } => ("finished", false),
            Ending::Failed { .. } => ("failed", true),
            Ending::Stopped { .. } => ("stopped", false),
            Ending::Cancelled { .. } => ("cancelled", false),
            Ending::Paused { .. } => ("paused", true),
        };
        self.tell_unlisted(true);
        self.record(Record::Ended(ending));
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
        self.dispute = None;
        self.inquiry = None;
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

#[cfg(test)]
mod tests;
