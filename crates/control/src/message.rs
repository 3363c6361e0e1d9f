//! What coordinator and workers say to each other, free of any wire format.
//!
//! Every message belongs to a generation, and a receiver drops what belongs to a lower one; but
//! what is said of a process or of the data belongs to none.

use std::sync::Arc;

use lacuna_types::{AttemptSeq, Generation, Step};

pub use crate::bad_samples::{BadSample, BadSamples};
use crate::plan::{Plan, Sync};

/// Coordinator to worker.
#[derive(Clone, Debug, PartialEq)]
pub enum ToWorker {
    /// Leave the old communicator and get ready for this plan.
    Prepare(Arc<Plan>),
    /// Everybody is prepared: connect with these bytes and synchronise the state so.
    Connect {
        /// Generation of the plan.
        generation: Generation,
        /// Key or unique id of the communicator.
        comm_id: Vec<u8>,
        /// Where the state comes from.
        sync: Sync,
    },
    /// Everybody holds the same state: train.
    Start {
        /// Generation of the plan.
        generation: Generation,
        /// First step to compute.
        resume_step: Step,
    },
    /// The generation is over; whatever it still computes is garbage.
    Revoke {
        /// The generation that is over.
        generation: Generation,
        /// Why, for people.
        why: String,
    },
    /// Raise the stop lane with this change id, until the boundary.
    Hold {
        /// Generation of the plan.
        generation: Generation,
        /// Number of the change.
        change: u64,
        /// Why, for people.
        why: String,
    },
    /// Take part in a checkpoint.
    Propose {
        /// Generation of the plan.
        generation: Generation,
        /// Number of the attempt in its generation.
        attempt: AttemptSeq,
        /// Whether everybody stands at one boundary already, so that no lane is needed.
        held: bool,
    },
    /// Give the attempt up.
    AbortAttempt {
        /// Generation of the plan.
        generation: Generation,
        /// Number of the attempt.
        attempt: AttemptSeq,
        /// Why, for people.
        why: String,
    },
    /// The checkpoint is durable.
    Committed {
        /// Step of the saved state.
        step: Step,
        /// Digest of the manifest.
        manifest: String,
    },
    /// End the process.
    Exit {
        /// Exit code.
        code: u8,
        /// Why, for people.
        why: String,
    },
    /// Compute the probe again: states differ, and it must be known who computes other bits.
    Audit {
        /// The generation whose states differ.
        generation: Generation,
    },
    /// A message came from a generation that is over, or from a worker that was given up.
    Stale {
        /// The generation that counts.
        current: Generation,
    },
}

/// Worker to coordinator.
#[derive(Clone, Debug, PartialEq)]
pub enum ToCoordinator {
    /// Alive, and what it is doing.
    Beat(Beat),
    /// The device works and the probe has run.
    Warm {
        /// Digest of the probe (the probe class).
        probe: u64,
    },
    /// Out of every older communicator.
    Prepared {
        /// Generation being formed.
        generation: Generation,
        /// Step of the state in memory, if there is one.
        state: Option<Step>,
        /// Newest generation in which that state was trained, 0 for none: a state that was only
        /// received or read is nothing that others could not have too.
        trained: Generation,
        /// Whether the communicator of the generation before is still up, with that state.
        kept: bool,
    },
    /// Communicator up and state synchronised.
    Synced {
        /// Generation being formed.
        generation: Generation,
        /// Step of the state.
        step: Step,
        /// Digest of the state.
        digest: u64,
    },
    /// Something went wrong here.
    Fault {
        /// Generation in which it happened.
        generation: Generation,
        /// What kind of trouble.
        kind: FaultKind,
        /// Ranks that the error speaks of; empty where none is to blame.
        suspects: Vec<usize>,
        /// The error with its causes.
        detail: String,
    },
    /// The probe, computed again.
    Audited {
        /// The generation whose states differ.
        generation: Generation,
        /// Digest of the probe.
        probe: u64,
    },
    /// A step was applied; sent every few steps.
    StepMark(StepMark),
    /// Standing at a boundary: a change was agreed on, or the last step is done.
    Held {
        /// Generation of the plan.
        generation: Generation,
        /// Step of the state.
        step: Step,
        /// Digest of the state.
        digest: u64,
    },
    /// The state of the attempt is copied aside; training goes on.
    Snapshotted {
        /// Generation of the plan.
        generation: Generation,
        /// Number of the attempt.
        attempt: AttemptSeq,
        /// Step of the copied state.
        step: Step,
        /// Digest of the whole state.
        digest: u64,
    },
    /// This worker's part is durable.
    PartDone {
        /// Generation of the plan.
        generation: Generation,
        /// Number of the attempt.
        attempt: AttemptSeq,
        /// The part's receipt, JSON.
        receipt: String,
    },
    /// This worker's part could not be written.
    PartFailed {
        /// Generation of the plan.
        generation: Generation,
        /// Number of the attempt.
        attempt: AttemptSeq,
        /// The error with its causes.
        detail: String,
    },
    /// Wants to go at the next boundary.
    Leaving {
        /// Why, for people.
        why: String,
    },
    /// Samples that could not be decoded and were replaced; may be said again.
    BadSamples(BadSamples),
}

/// What kind of trouble a worker reports, by what the coordinator does about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The communicator failed: a peer is gone, or the network is.
    Communicator,
    /// This worker cannot read data.
    Storage,
    /// The store of the data, or of the checkpoint to start from, did not answer in time.
    Outage,
    /// The checkpoint to start from cannot be loaded here, by its fault or this worker's.
    Checkpoint,
    /// The run itself cannot go on (not a worker's fault).
    Run,
    /// Nor can it with this data, which every worker finds the same.
    Data,
    /// This process or device is broken.
    Local,
    /// Nor would another process of this worker do: it is started wrongly.
    Unfit,
}

/// What a worker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No work.
    Idle,
    /// Connecting and synchronising.
    Sync,
    /// Waiting for a batch.
    Data,
    /// Forward and backward.
    Compute,
    /// In the reduction.
    Reduce,
    /// Applying the update.
    Optimizer,
    /// Copying the state aside.
    Checkpoint,
}

impl Phase {
    /// Returns the word for people.
    pub fn word(self) -> &'static str {
        match self {
            Phase::Idle => "idle",
            Phase::Sync => "sync",
            Phase::Data => "data",
            Phase::Compute => "compute",
            Phase::Reduce => "reduce",
            Phase::Optimizer => "optimizer",
            Phase::Checkpoint => "checkpoint",
        }
    }
}

/// A sign of life.
#[derive(Clone, Debug, PartialEq)]
pub struct Beat {
    /// Generation the worker is in; 0 for none.
    pub generation: Generation,
    /// Steps behind its state.
    pub step: Step,
    /// What it is doing.
    pub phase: Phase,
    /// Since when, in milliseconds before the beat was sent.
    pub phase_ms: u64,
    /// Number of its newest collective operation.
    pub op_seq: u64,
    /// Whether that operation is in progress.
    pub in_op: bool,
    /// Time that one slot takes it to compute, in microseconds, of late; 0 before the first.
    pub slot_us: u64,
    /// Time that it has waited for data since it started, in microseconds.
    pub data_us: u64,
    /// Memory in use on the device it computes on, in bytes; 0 where that is not known.
    pub memory_bytes: u64,
}

/// Figures of one applied step; everything but the rates is equal on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct StepMark {
    /// Generation in which it was applied.
    pub generation: Generation,
    /// Steps behind the state after it.
    pub step: Step,
    /// Mean loss of the step.
    pub loss: f64,
    /// Learning rate of its update.
    pub lr: f64,
    /// Norm of the mean gradient.
    pub grad_norm: f64,
    /// Samples a second of the whole group, over the steps since the last mark.
    pub images_per_second: f64,
    /// Share of this worker's time spent waiting for data since the last mark.
    pub data_wait: f64,
    /// Digest of the state, every `digest_every` steps.
    pub digest: Option<u64>,
    /// Steps skipped so far because a gradient was not finite.
    pub skipped: u64,
    /// Steps computed again so far because a gradient overflowed.
    pub redone: u64,
    /// Memory in use on the device of the worker that reports, in bytes; 0 where not known.
    pub memory_bytes: u64,
    /// Model FLOPs a second over what the group's devices reach in large matrix products.
    pub mfu: Option<f64>,
}
