//! What a coordinator must remember of a run: durable facts, and the state they add up to.
//!
//! The machine changes [`Saved`] only by [`Saved::apply`], with the very records that it asks its
//! driver to make durable. So the state after replaying a journal is the state before the crash,
//! by construction (invariant I8).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use lacuna_types::{AttemptSeq, Generation, SampleId, Step, WorkerId};

use crate::coordinator::Ending;
use crate::plan::{CheckpointRef, Plan};

/// A durable fact of a run. Carried out before anything that depends on it is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A generation is being formed by this plan. No message names a generation before.
    Planned(Arc<Plan>),
    /// Somebody knows of a higher generation than the journal: the next one is above it.
    Floor(Generation),
    /// The newest plan's members hold one state and train from this step.
    Started {
        /// The plan's generation.
        generation: Generation,
        /// First step they compute.
        resume_step: Step,
    },
    /// Members are asked to stop at a boundary, under this number.
    Change(u64),
    /// A checkpoint attempt of the newest generation is proposed.
    Attempt(AttemptSeq),
    /// That attempt is given up.
    AttemptClosed(AttemptSeq),
    /// States differ: what is in memory from the newest generation and before is not trusted.
    Distrusted,
    /// The newest plan's group can never complete another sum: a member is gone for certain.
    Over,
    /// The run's probe class.
    Probe(u64),
    /// The newest committed checkpoint.
    Checkpoint(CheckpointRef),
    /// There is no checkpoint any more: somebody deleted it.
    NoCheckpoint,
    /// The newest checkpoint is damaged and counts no more.
    SetAside {
        /// The damaged one.
        lost: CheckpointRef,
        /// The newest one from here on.
        next: CheckpointRef,
    },
    /// Somebody asked for a checkpoint.
    CheckpointAsked,
    /// Somebody asked the run to stop.
    Stopping {
        /// Why, for people.
        why: String,
    },
    /// An operator takes a worker out.
    Draining {
        /// Who.
        worker: WorkerId,
        /// Why, for people.
        why: String,
    },
    /// A worker that was to leave is gone.
    Gone(WorkerId),
    /// A worker did harm too often: it stays out until an operator lets it back in.
    Banned {
        /// Who.
        worker: WorkerId,
        /// What it did last, for people.
        why: String,
    },
    /// An operator lets a worker back in.
    Released(WorkerId),
    /// Bad samples of an epoch that were not known before.
    BadSamples {
        /// The epoch.
        epoch: u32,
        /// The samples.
        samples: Vec<SampleId>,
        /// How many more workers met than they could keep to report.
        dropped: u64,
    },
    /// People were told how many bad samples of an epoch are not listed.
    BadSamplesTold {
        /// The epoch.
        epoch: u32,
        /// How many.
        unlisted: u64,
    },
    /// The run is over, or rests.
    Ended(Ending),
    /// A run that rested goes on.
    Resumed,
}

/// Epochs whose bad samples are remembered: the one that trains, the next, into which loaders reach
/// ahead, and some that a return to a checkpoint may train again.
pub const BAD_EPOCHS_KEPT: usize = 4;

/// Bad samples of one epoch, as far as they were reported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BadEpoch {
    /// The samples.
    pub samples: BTreeSet<SampleId>,
    /// How many more workers met than they could keep to report.
    pub dropped: u64,
    /// How many people were told are not listed.
    pub told: u64,
}

/// What is known of a run from before: all empty for a new one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Highest generation that was ever named.
    pub generation: Generation,
    /// The newest generation's plan; `None` while the run rests.
    pub plan: Option<Arc<Plan>>,
    /// Step that plan's members began to train from; `None` while they form.
    pub started: Option<Step>,
    /// Number of the newest change that members were asked to stop for.
    pub changes: u64,
    /// Number of the newest attempt of the newest generation.
    pub attempts: AttemptSeq,
    /// Whether that attempt is under way.
    pub attempt_open: bool,
    /// States that were last trained in this generation or before must not be gone on from.
    pub untrusted: Generation,
    /// Whether the newest plan's group can never complete another sum.
    pub over: bool,
    /// Probe class of the run, once a worker has set it.
    pub probe: Option<u64>,
    /// Newest committed checkpoint.
    pub checkpoint: Option<CheckpointRef>,
    /// Whether a checkpoint was asked for and is not proposed yet.
    pub checkpoint_asked: bool,
    /// Why the run is to stop, if it is.
    pub stopping: Option<String>,
    /// Workers that an operator takes out, and why.
    pub draining: BTreeMap<WorkerId, String>,
    /// Workers that stay out until an operator lets them back in, and why.
    pub banned: BTreeMap<WorkerId, String>,
    /// Bad samples by epoch, of at most [`BAD_EPOCHS_KEPT`] epochs.
    pub bad_samples: BTreeMap<u32, BadEpoch>,
    /// How the run came to rest, if it did.
    pub ending: Option<Ending>,
}

impl Saved {
    /// Adds one fact.
    pub fn apply(&mut self, record: &Record) {
        match record.clone() {
            Record::Planned(plan) => {
                self.generation = self.generation.max(plan.generation);
                self.over = false;
                self.plan = Some(plan);
                self.started = None;
                self.attempts = AttemptSeq(0);
                self.attempt_open = false;
            }
            Record::Floor(generation) => self.generation = self.generation.max(generation),
            Record::Started { resume_step, .. } => {
                self.started = Some(resume_step);
            }
            Record::Change(number) => self.changes = number,
            Record::Attempt(seq) => {
                self.attempts = seq;
                self.attempt_open = true;
                self.checkpoint_asked = false;
            }
            Record::AttemptClosed(_) => self.attempt_open = false,
            Record::Distrusted => self.untrusted = self.generation,
            Record::Over => self.over = true,
            Record::Probe(probe) => self.probe = Some(probe),
            Record::Checkpoint(checkpoint) => self.checkpoint = Some(checkpoint),
            Record::NoCheckpoint => self.checkpoint = None,
            Record::SetAside { next, .. } => self.checkpoint = Some(next),
            Record::CheckpointAsked => self.checkpoint_asked = true,
            Record::Stopping { why } => self.stopping = Some(why),
            Record::Draining { worker, why } => {
                self.draining.insert(worker, why);
            }
            Record::Gone(worker) => {
                self.draining.remove(&worker);
            }
            Record::Banned { worker, why } => {
                self.banned.insert(worker, why);
            }
            Record::Released(worker) => {
                self.banned.remove(&worker);
            }
            Record::Ended(ending) => {
                self.plan = None;
                self.started = None;
                self.attempt_open = false;
                self.checkpoint_asked = false;
                self.stopping = None;
                self.draining.clear();
                self.ending = Some(ending);
            }
            Record::BadSamples { epoch, samples, dropped } => {
                let bad = self.bad_epoch(epoch);
                bad.samples.extend(samples);
                bad.dropped = bad.dropped.saturating_add(dropped);
            }
            Record::BadSamplesTold { epoch, unlisted } => self.bad_epoch(epoch).told = unlisted,
            Record::Resumed => {
                self.stopping = None;
                if let Some(Ending::Failed { .. }) = self.ending.take() {
                    // Whoever lets it go on has looked, and may have mended the data.
                    self.bad_samples.clear();
                }
            }
        }
    }

    /// Finds an epoch's bad samples; forgets those of the epoch that is farthest from it if there
    /// are too many.
    fn bad_epoch(&mut self, epoch: u32) -> &mut BadEpoch {
        if !self.bad_samples.contains_key(&epoch) && self.bad_samples.len() >= BAD_EPOCHS_KEPT {
            let farthest = self.bad_samples.keys().copied().max_by_key(|e| e.abs_diff(epoch));
            farthest.map(|epoch| self.bad_samples.remove(&epoch));
        }
        self.bad_samples.entry(epoch).or_default()
    }

    /// Adds up a journal.
    pub fn replay<'a>(records: impl IntoIterator<Item = &'a Record>) -> Self {
        let mut saved = Saved::default();
        records.into_iter().for_each(|record| saved.apply(record));
        saved
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Record::Planned(plan) => write!(f, "{plan}"),
            Record::Floor(generation) => write!(f, "generation {generation} is taken elsewhere"),
            Record::Started { generation, resume_step } => {
                write!(f, "generation {generation} trains from step {resume_step}")
            }
            Record::Change(number) => write!(f, "change {number}: members are to stop"),
            Record::Attempt(seq) => write!(f, "checkpoint attempt {seq}"),
            Record::AttemptClosed(seq) => write!(f, "checkpoint attempt {seq} is over"),
            Record::Distrusted => write!(f, "states in memory are not trusted"),
            Record::Over => write!(f, "a member is gone for certain: the group is over"),
            Record::Probe(probe) => write!(f, "probe class {probe:016x}"),
            Record::Checkpoint(c) => write!(f, "checkpoint of step {} ({})", c.step, c.manifest),
            Record::NoCheckpoint => write!(f, "no checkpoint is there any more"),
            Record::SetAside { lost, next } => {
                let (step, back) = (lost.step, next.step);
                write!(f, "checkpoint of step {step} ({}) is set aside ", lost.manifest)?;
                write!(f, "for that of step {back} ({})", next.manifest)
            }
            Record::CheckpointAsked => write!(f, "a checkpoint is asked for"),
            Record::Stopping { why } => write!(f, "the run is to stop: {why}"),
            Record::Draining { worker, why } => write!(f, "{worker} is to leave: {why}"),
            Record::Gone(worker) => write!(f, "{worker} has left"),
            Record::Banned { worker, why } => write!(f, "{worker} is kept out: {why}"),
            Record::Released(worker) => write!(f, "{worker} may join again"),
            Record::BadSamples { epoch, samples, dropped } => {
                let n = samples.len();
                write!(f, "epoch {epoch}: {n} bad samples, {dropped} without a report:")?;
                samples.iter().try_for_each(|sample| write!(f, " {sample}"))
            }
            Record::BadSamplesTold { epoch, unlisted } => {
                write!(f, "epoch {epoch}: {unlisted} bad samples are not listed")
            }
            Record::Ended(Ending::Finished { step, digest }) => {
                write!(f, "finished at step {step} with state {digest:016x}")
            }
            Record::Ended(Ending::Failed { why, code }) => write!(f, "failed ({code}): {why}"),
            Record::Ended(Ending::Stopped { step, why }) => {
                write!(f, "stopped at step {step}: {why}")
            }
            Record::Ended(Ending::Cancelled { why }) => write!(f, "cancelled: {why}"),
            Record::Ended(Ending::Paused { why }) => write!(f, "paused: {why}"),
            Record::Resumed => write!(f, "goes on"),
        }
    }
}
