//! Checkpoints: proposed here, written by the members, committed by the driver.

use std::collections::BTreeMap;

use lacuna_types::{AttemptSeq, Generation, Step, Timestamp, WorkerId, exit};

use super::forming::Change;
use super::{Cause, Command, CommitOrder, Coordinator, Ending, RunConfig, WhenBusy};
use crate::journal::Record;
use crate::message::ToWorker;
use crate::plan::CheckpointRef;

/// A checkpoint on its way.
#[derive(Clone, Debug)]
pub(super) struct Attempt {
    pub seq: AttemptSeq,
    pub deadline: Timestamp,
    pub snapshots: BTreeMap<usize, (Step, u64)>,
    pub receipts: BTreeMap<usize, String>,
    pub committing: bool,
    /// Whether everybody stood at one boundary when it was proposed.
    pub held: bool,
    /// Whether an earlier start of this process proposed it, nobody knows at which step.
    pub recovered: bool,
}

impl Attempt {
    pub(super) fn new(seq: AttemptSeq, deadline: Timestamp) -> Self {
        Attempt {
            seq,
            deadline,
            snapshots: BTreeMap::new(),
            receipts: BTreeMap::new(),
            committing: false,
            held: false,
            recovered: false,
        }
    }
}

impl Coordinator {
    /// When the next checkpoint is due by time.
    pub(super) fn checkpoint_time(&self) -> Option<Timestamp> {
        Some(self.checkpoint_base.1 + self.config.checkpoint_interval?)
    }

    pub(super) fn checkpoint_due(&self, now: Timestamp) -> bool {
        self.saved.checkpoint_asked
            || self.saves_at(self.progress)
            || self.checkpoint_time().is_some_and(|at| at <= now)
    }

    /// Tells whether a checkpoint is due by steps where the run is at `step`: a multiple of the
    /// cadence lies between the last one and there.
    ///
    /// Multiples, and not so many steps since the last one: that is saved some steps after it was
    /// due, so that checkpoints would drift away from the steps that people ask for. The one of the
    /// last step is made at the boundary there.
    pub(super) fn saves_at(&self, step: Step) -> bool {
        let RunConfig { checkpoint_steps, total_steps, .. } = self.config;
        let (last, _) = self.checkpoint_base;
        step.0 < total_steps && checkpoint_steps.is_some_and(|n| step.0 / n > last.0 / n)
    }

    /// Starts an attempt. `held`: everybody stands at one boundary already.
    pub(super) fn propose(&mut self, now: Timestamp, held: bool) {
        if self.group.is_none() {
            return;
        }
        let seq = self.saved.attempts.next();
        self.record(Record::Attempt(seq));
        self.checkpoint_base = (self.progress, now);
        let group = self.group.as_mut().expect("just seen");
        group.attempt = Some(Attempt { held, ..Attempt::new(seq, now + self.timing.attempt) });
        let group = group.clone();
        let generation = group.plan.generation;
        self.broadcast(&group, &ToWorker::Propose { generation, attempt: seq, held });
    }

    /// A checkpoint is due by cadence while one is being written.
    pub(super) fn due_while_busy(&mut self, now: Timestamp) {
        let Some(attempt) = self.group.as_ref().and_then(|g| g.attempt.as_ref()) else { return };
        let step = self.progress;
        if attempt.recovered || step.0 >= self.config.total_steps {
            // It is the one that was due; or the last one, which is made at the boundary.
            self.checkpoint_base = (step, now);
            return;
        }
        let commits = attempt.committing;
        match self.config.when_busy {
            // Nothing is left to write, and the manifest may be there already.
            WhenBusy::Cancel if commits => {}
            WhenBusy::Cancel => {
                let why = format!("the next one is due at step {step}");
                self.close_attempt(&why);
                self.note("not-saved", true, format!("checkpoint given up: {why}"));
                // What waits for a checkpoint's end must not wait for ever.
                match self.wanted_change(now) {
                    Some(change) => self.hold(change),
                    None => self.propose(now, false),
                }
            }
            WhenBusy::Wait => {
                let why = format!("a checkpoint is due at step {step} and one is being written");
                self.hold(Change { cause: Cause::Checkpoint, why, shares: None });
            }
            WhenBusy::Skip => {
                self.checkpoint_base = (step, now);
                let text = format!("no checkpoint at step {step}: one is still being written");
                self.note("skipped", true, text);
            }
        }
    }

    pub(super) fn attempt_is(&self, generation: Generation, seq: AttemptSeq) -> bool {
        self.group.as_ref().is_some_and(|group| {
            group.plan.generation == generation
                && group.attempt.as_ref().is_some_and(|attempt| attempt.seq == seq)
        })
    }

    pub(super) fn on_snapshotted(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        generation: Generation,
        seq: AttemptSeq,
        step: Step,
        digest: u64,
    ) {
        self.progressed(now, generation, step);
        if !self.attempt_is(generation, seq) {
            return;
        }
        let Some((group, rank)) = self.member_of(worker, generation) else {
            return;
        };
        let attempt = group.attempt.as_mut().expect("just seen");
        attempt.snapshots.insert(rank, (step, digest));
        if attempt.snapshots.len() < group.plan.world() {
            return;
        }
        let said = attempt.snapshots.clone();
        let first = (step, digest);
        if said.values().any(|other| *other != first) {
            self.dispute(now, &said);
            return;
        }
        self.commit_if_ready();
    }

    pub(super) fn on_part_done(
        &mut self,
        worker: &WorkerId,
        generation: Generation,
        seq: AttemptSeq,
        receipt: String,
    ) {
        if !self.attempt_is(generation, seq) {
            return;
        }
        let Some((group, rank)) = self.member_of(worker, generation) else {
            return;
        };
        let attempt = group.attempt.as_mut().expect("just seen");
        attempt.receipts.insert(rank, receipt);
        self.commit_if_ready();
    }

    fn commit_if_ready(&mut self) {
        let Some(group) = self.group.as_mut() else {
            return;
        };
        let world = group.plan.world();
        let Some(attempt) = group.attempt.as_mut() else {
            return;
        };
        let complete = attempt.receipts.len() == world && attempt.snapshots.len() == world;
        if !complete || attempt.committing {
            return;
        }
        attempt.committing = true;
        let &(step, digest) = attempt.snapshots.values().next().expect("complete");
        let order = CommitOrder {
            generation: group.plan.generation,
            attempt: attempt.seq,
            step,
            digest,
            receipts: attempt.receipts.values().cloned().collect(),
        };
        self.out.push(Command::Commit(order));
    }

    /// A manifest is durable. It counts even if its generation is over by now.
    pub(super) fn on_checkpoint_done(
        &mut self,
        now: Timestamp,
        generation: Generation,
        seq: AttemptSeq,
        checkpoint: CheckpointRef,
    ) {
        let mine = self.attempt_is(generation, seq);
        if self.saved.checkpoint.as_ref().is_none_or(|c| c.step <= checkpoint.step) {
            self.record(Record::Checkpoint(checkpoint.clone()));
        }
        self.checkpoint_base = (self.checkpoint_base.0.max(checkpoint.step), now);
        self.failed_attempts = (0, 0);
        self.closed_for_leaves = 0;
        let CheckpointRef { step, manifest } = checkpoint;
        self.note("saved", false, format!("checkpoint of step {step} committed ({manifest})"));
        let Some(group) = self.group.as_mut().filter(|_| mine) else {
            return;
        };
        group.attempt = None;
        let group = group.clone();
        self.record(Record::AttemptClosed(seq));
        self.broadcast(&group, &ToWorker::Committed { step, manifest });
    }

    /// Gives the attempt up. Training goes on; an end that needs a checkpoint tries again. Where
    /// members only leave, those who stay keep the state in memory instead.
    pub(super) fn attempt_failed(&mut self, why: &str) {
        let Some(attempt) = self.close_attempt(why) else { return };
        self.failed_attempts.0 += 1;
        let (n, most) = if attempt.held {
            self.failed_attempts.1 += 1;
            let n = self.failed_attempts.1;
            self.note("not-saved", true, format!("checkpoint attempt {n} in a row failed: {why}"));
            if n >= self.timing.failed_attempts && !self.stands_at_an_end() {
                self.failed_attempts.1 = 0;
                self.group.as_mut().expect("it had an attempt").cannot_save = true;
                return;
            }
            (n, self.timing.failed_attempts)
        } else {
            self.note("not-saved", true, format!("checkpoint given up, training goes on: {why}"));
            (self.failed_attempts.0, self.config.max_failures)
        };
        if most > 0 && n >= most {
            let why = format!("{n} checkpoint attempts in a row failed, the last because: {why}");
            self.end(Ending::Failed { why, code: exit::IO });
        }
    }

    /// Tells whether the run is over where its members stand.
    fn stands_at_an_end(&self) -> bool {
        let last = Step(self.config.total_steps);
        let stands = self.group.as_ref().and_then(|group| group.held.values().next());
        self.saved.stopping.is_some() || stands.is_some_and(|(step, _)| *step >= last)
    }

    /// Tells everybody that nobody waits for the attempt any more; returns it.
    pub(super) fn close_attempt(&mut self, why: &str) -> Option<Attempt> {
        let group = self.group.as_mut()?;
        let attempt = group.attempt.take()?;
        let group = group.clone();
        self.record(Record::AttemptClosed(attempt.seq));
        let generation = group.plan.generation;
        let message =
            ToWorker::AbortAttempt { generation, attempt: attempt.seq, why: why.to_string() };
        self.broadcast(&group, &message);
        Some(attempt)
    }

    /// Everybody stands still before any step carried the attempt's lane from all: it can never
    /// start.
    ///
    /// (A member reports its snapshot before it reports that it stands, so none is on its way.)
    pub(super) fn withdraw_unstarted_attempt(&mut self) {
        let Some(group) = self.group.as_mut() else {
            return;
        };
        let world = group.plan.world();
        let Some(attempt) = group.attempt.take_if(|a| a.snapshots.len() < world) else {
            return;
        };
        let group = group.clone();
        self.record(Record::AttemptClosed(attempt.seq));
        self.record(Record::CheckpointAsked);
        let generation = group.plan.generation;
        let why = "the members stopped before it could start".to_string();
        self.broadcast(&group, &ToWorker::AbortAttempt { generation, attempt: attempt.seq, why });
    }

    pub(super) fn expire_attempt(&mut self, now: Timestamp) {
        let attempt = self.group.as_ref().and_then(|g| g.attempt.as_ref());
        if attempt.is_some_and(|a| a.deadline <= now) {
            let held = attempt.is_some_and(|attempt| attempt.held);
            let what = if held { "at the boundary" } else { "while training" };
            self.attempt_failed(&format!("it took longer than {:?} {what}", self.timing.attempt));
        }
    }
}
