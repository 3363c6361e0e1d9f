//! What goes into a worker's session and what comes out of it.

use std::sync::Arc;

use lacuna_types::{AttemptSeq, Generation, Step};

use crate::message::{FaultKind, StepMark, ToCoordinator, ToWorker};
use crate::plan::{Plan, Sync};

/// What the step loop reports.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// The device works; the probe gave this digest.
    Warm {
        /// Digest of the probe.
        probe: u64,
    },
    /// Out of every communicator; answers [`Command::Leave`].
    Down {
        /// Step of the state in memory, if there is one.
        state: Option<Step>,
    },
    /// Goes on in the communicator it is in; answers [`Command::Adopt`].
    Adopted {
        /// The generation it is in from here on.
        generation: Generation,
        /// Step of the state.
        state: Step,
    },
    /// The probe, computed again; answers [`Command::Audit`].
    Audited {
        /// The generation whose states differ.
        generation: Generation,
        /// Digest of the probe.
        probe: u64,
    },
    /// Connected and synchronised.
    Synced {
        /// Generation being formed.
        generation: Generation,
        /// Step of the state.
        step: Step,
        /// Digest of the state.
        digest: u64,
    },
    /// A step was applied and is due to be reported.
    Mark(StepMark),
    /// Standing at a boundary.
    Held {
        /// Generation.
        generation: Generation,
        /// Step of the state.
        step: Step,
        /// Digest of the state.
        digest: u64,
    },
    /// The state is copied aside.
    Snapshotted {
        /// Generation.
        generation: Generation,
        /// The attempt.
        attempt: AttemptSeq,
        /// Step of the copied state.
        step: Step,
        /// Digest of the whole state.
        digest: u64,
    },
    /// The part is durable.
    PartDone {
        /// Generation.
        generation: Generation,
        /// The attempt.
        attempt: AttemptSeq,
        /// The part's receipt, JSON.
        receipt: String,
    },
    /// The part could not be written.
    PartFailed {
        /// Generation.
        generation: Generation,
        /// The attempt.
        attempt: AttemptSeq,
        /// The error with its causes.
        detail: String,
    },
    /// Something went wrong.
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
}

/// What happens to a session.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The stream is up.
    Connected,
    /// The coordinator has said welcome: it listens.
    Welcomed,
    /// The stream broke or could not be opened.
    Disconnected,
    /// The coordinator said something.
    Received(ToWorker),
    /// The step loop reports.
    Report(Report),
    /// Somebody wants this worker to go: a signal, or its agent.
    Drain {
        /// Why, for people.
        why: String,
    },
    /// Time passed.
    Tick,
}

/// What the driver must do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Send to the coordinator; dropped without a stream.
    Send(ToCoordinator),
    /// Close the stream and open it again.
    Reconnect,
    /// Abort the communicator of `up_to` and all before; answer with [`Report::Down`].
    Leave {
        /// Newest generation to leave.
        up_to: Generation,
    },
    /// Go on in the communicator of the generation before, with this plan; answer with
    /// [`Report::Adopted`].
    Adopt {
        /// The plan.
        plan: Arc<Plan>,
    },
    /// Compute the probe again; answer with [`Report::Audited`].
    Audit {
        /// The generation whose states differ.
        generation: Generation,
    },
    /// Connect to the plan's members and synchronise.
    Connect {
        /// The plan.
        plan: Arc<Plan>,
        /// Key or unique id.
        comm_id: Vec<u8>,
        /// Where the state comes from.
        sync: Sync,
    },
    /// Train.
    Start {
        /// The generation.
        generation: Generation,
    },
    /// Raise the stop lane from the next step on.
    RaiseStop {
        /// The generation.
        generation: Generation,
        /// Number of the change.
        change: u64,
    },
    /// Raise the checkpoint lane from the next step on, or save at once if `held`.
    Save {
        /// The generation.
        generation: Generation,
        /// The attempt.
        attempt: AttemptSeq,
        /// Whether everybody stands at one boundary already.
        held: bool,
    },
    /// Give an attempt up.
    AbortAttempt {
        /// The generation.
        generation: Generation,
        /// The attempt.
        attempt: AttemptSeq,
    },
    /// Tell people.
    Note(String),
    /// End the process.
    Exit {
        /// Exit code.
        code: u8,
        /// Why, for people.
        why: String,
    },
}
