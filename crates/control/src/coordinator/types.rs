//! What goes into the machine and what comes out.

use std::collections::BTreeMap;
use std::time::Duration;

use lacuna_types::{AttemptSeq, Generation, Incarnation, Step, Timestamp, WorkerId};

use crate::journal::Record;
use crate::message::{StepMark, ToCoordinator, ToWorker};
use crate::plan::CheckpointRef;

/// What the machine has to know of a run. Fixed when the run is created, but for the numbers of
/// workers ([`Event::Resize`]).
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
    /// What happens when a checkpoint is due while one is being written.
    pub when_busy: WhenBusy,
    /// Attempts in a row that may fail while the group trains, 0 for any number.
    pub max_failures: u32,
    /// Steps of an epoch.
    pub epoch_steps: u64,
    /// Samples of an epoch.
    pub epoch_samples: u64,
    /// Most bad samples of an epoch; one more fails the run.
    pub bad_samples_max: u64,
}

/// What happens when a checkpoint is due while one is being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenBusy {
    /// None is made.
    Skip,
    /// Training stands still until the one is written.
    Wait,
    /// The one is given up for the new one.
    Cancel,
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
    /// Another coordinator has claimed the run's checkpoints: none of this one's counts any more.
    Superseded {
        /// Who, for people.
        why: String,
    },
    /// The driver has read a checkpoint whole, as far as it could; answers [`Command::Examine`].
    Examined {
        /// The checkpoint.
        checkpoint: CheckpointRef,
        /// What it found.
        found: Examination,
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
    /// End the run now, without a checkpoint: what was computed since the newest one is given up.
    Cancel {
        /// Why, for people.
        why: String,
    },
    /// Checkpoint at the next boundary.
    Checkpoint,
    /// An operator changes how many workers train, from the next boundary on.
    Resize {
        /// Fewest.
        min: usize,
        /// Most.
        max: usize,
    },
    /// Let a worker back in that was kept out.
    Release {
        /// Who.
        worker: WorkerId,
    },
    /// Form a group although members of the one before may train on unseen.
    Force,
}

/// What came of reading a checkpoint whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Examination {
    /// Every byte is what the manifest says.
    Sound,
    /// It is not what was committed; it is set aside.
    Damaged {
        /// What is wrong with it.
        why: String,
        /// The newest one before it that can be used, as far as manifests and sizes tell.
        next: Option<CheckpointRef>,
    },
    /// It is not there any more: somebody removed it.
    Gone {
        /// The newest one that can be used.
        next: Option<CheckpointRef>,
    },
    /// It could not be read, which says nothing of it.
    Unknown {
        /// Why not.
        why: String,
    },
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
    /// The generation it is in, 0 for none.
    pub generation: Generation,
    /// Whether it is connected to that generation's members, or connecting.
    pub up: bool,
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
    /// Kill the process of one life of a worker, through its agent.
    Kill {
        /// Whose.
        worker: WorkerId,
        /// Which life.
        incarnation: Incarnation,
        /// Why, for people.
        why: String,
    },
    /// Draw the communicator's id and answer with [`Event::CommId`].
    DrawCommId(Generation),
    /// Commit the checkpoint and answer with [`Event::CheckpointDone`] or
    /// [`Event::CheckpointFailed`].
    Commit(CommitOrder),
    /// Read this checkpoint whole, set it aside if it is damaged, and answer with
    /// [`Event::Examined`].
    Examine(CheckpointRef),
    /// Tell people.
    Note(Note),
    /// Record the figures of a step.
    Mark(StepMark),
    /// Tell people which samples a step holds: computing it ends processes.
    NameSamples(Step),
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
    /// Ended on request at once; can go on from its newest checkpoint.
    Cancelled {
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

/// What a run is doing, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// One word.
    pub state: &'static str,
    /// What the run waits for, where it does.
    pub why: String,
    /// Newest generation.
    pub generation: Generation,
    /// Steps known to be applied.
    pub step: Step,
    /// Newest committed checkpoint.
    pub checkpoint: Option<CheckpointRef>,
    /// Workers of the run, by name.
    pub workers: Vec<WorkerStatus>,
    /// Groups formed since the machine was created, by what made them necessary.
    pub formed: BTreeMap<Cause, u64>,
}

/// What makes a new group necessary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// There was none, and there are workers.
    Ready,
    /// More workers are ready.
    Joined,
    /// A member is to go.
    Left,
    /// An operator changed the numbers of workers.
    Resized,
    /// The same members share the slots out better.
    Shares,
    /// Members stood still for a checkpoint.
    Checkpoint,
    /// A member is gone.
    Lost,
    /// A member reported a fault.
    Fault,
    /// States differed that must be equal.
    Disputed,
    /// A member came back to another group than it had left.
    Returned,
    /// The group came no further.
    Stuck,
}

impl Cause {
    /// Returns the word in metrics.
    pub fn word(self) -> &'static str {
        match self {
            Cause::Ready => "ready",
            Cause::Joined => "joined",
            Cause::Left => "left",
            Cause::Resized => "resized",
            Cause::Shares => "shares",
            Cause::Checkpoint => "checkpoint",
            Cause::Lost => "lost",
            Cause::Fault => "fault",
            Cause::Disputed => "disputed",
            Cause::Returned => "returned",
            Cause::Stuck => "stuck",
        }
    }
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
    /// One word: registered, spare, member, leaving, suspect, quarantined, unfit.
    pub state: &'static str,
    /// Steps behind its state, as of its newest beat.
    pub step: Step,
    /// What it does, as of its newest beat.
    pub phase: &'static str,
    /// When it was last heard of.
    pub last_seen: Timestamp,
    /// Time of a slot of late, in microseconds; 0 where it is not known.
    pub slot_us: u64,
    /// Time that it has waited for data since it started, in microseconds.
    pub data_us: u64,
    /// Memory in use on its device, in bytes; 0 where that is not known.
    pub memory_bytes: u64,
}
