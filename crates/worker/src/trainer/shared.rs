//! What the threads of a trainer tell each other without waiting.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lacuna_collective::{AbortHandle, OpLedger};
use lacuna_control::message::{Beat, Phase};
use lacuna_control::plan::{Plan, Sync};
use lacuna_types::{AttemptSeq, Generation, Step};

use super::bad_samples::BadSampleQueue;
use super::reconstructions::PictureQueue;

/// What the session orders the step loop to do.
#[derive(Debug)]
pub enum Order {
    /// Drop the communicator and report down.
    Leave,
    /// Connect to the plan's members and synchronise the state.
    Connect {
        /// The plan.
        plan: Arc<Plan>,
        /// Key of the generation.
        comm_id: Vec<u8>,
        /// Where the state comes from.
        sync: Sync,
        /// Kills the communicator.
        abort: AbortHandle,
    },
    /// Go on in the communicator it is in, with this plan.
    Adopt {
        /// The plan.
        plan: Arc<Plan>,
    },
    /// Compute the probe again.
    Audit {
        /// The generation whose states differ.
        generation: Generation,
    },
    /// Train until a boundary or a fault.
    Start {
        /// The generation.
        generation: Generation,
    },
    /// Save the state now; everybody stands at one boundary.
    Save {
        /// The generation.
        generation: Generation,
        /// The attempt.
        attempt: AttemptSeq,
    },
}

/// Requests to raise lanes, and what the loop is doing; shared by session and step loop.
#[derive(Debug)]
pub struct Shared {
    /// Change id to raise the stop lane with, 0 for none.
    pub stop: AtomicU64,
    /// Attempt to raise the checkpoint lane with, 0 for none.
    pub save: AtomicU64,
    /// Bad samples that the coordinator has not heard of.
    pub bad_samples: BadSampleQueue,
    /// Pictures that the coordinator has not got.
    pub pictures: PictureQueue,
    /// Newest attempt of the generation that was given up, and what gives up the part that is being
    /// written.
    saving: Mutex<(AttemptSeq, Arc<AtomicBool>)>,
    progress: Mutex<Progress>,
}

#[derive(Debug)]
struct Progress {
    generation: Generation,
    step: Step,
    phase: Phase,
    since: Instant,
    ledger: OpLedger,
    /// Time of a slot of late; zero before the first.
    slot: Duration,
    /// Time that was waited for data.
    data: Duration,
    memory_bytes: u64,
}

impl Default for Shared {
    fn default() -> Self {
        let progress = Progress {
            generation: Generation(0),
            step: Step(0),
            phase: Phase::Idle,
            since: Instant::now(),
            ledger: OpLedger::default(),
            slot: Duration::ZERO,
            data: Duration::ZERO,
            memory_bytes: 0,
        };
        Shared {
            stop: AtomicU64::new(0),
            save: AtomicU64::new(0),
            bad_samples: BadSampleQueue::default(),
            pictures: PictureQueue::default(),
            saving: Mutex::default(),
            progress: Mutex::new(progress),
        }
    }
}

impl Shared {
    fn progress(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets requests: they belong to a generation that is over.
    pub fn clear_requests(&self) {
        self.stop.store(0, Ordering::Relaxed);
        self.save.store(0, Ordering::Relaxed);
        // Attempts of the next generation are counted anew.
        self.give_up_saving(AttemptSeq(0));
        self.saving.lock().unwrap_or_else(PoisonError::into_inner).0 = AttemptSeq(0);
    }

    /// Begins the part of an attempt; what is returned is set when nobody wants it any more.
    pub fn begin_saving(&self, attempt: AttemptSeq) -> Arc<AtomicBool> {
        let mut saving = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        saving.1.store(true, Ordering::Release);
        // It may have been given up while the state was copied.
        saving.1 = Arc::new(AtomicBool::new(attempt <= saving.0));
        saving.1.clone()
    }

    /// Nobody wants parts of this attempt any more, or of those before.
    pub fn give_up_saving(&self, attempt: AttemptSeq) {
        let mut saving = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        saving.0 = saving.0.max(attempt);
        saving.1.store(true, Ordering::Release);
    }

    /// Notes that a generation begins.
    pub fn enter_generation(&self, generation: Generation, ledger: OpLedger) {
        let mut progress = self.progress();
        progress.generation = generation;
        progress.ledger = ledger;
    }

    /// Notes how long a slot took to compute: a mean over some twenty.
    pub fn slot_took(&self, time: Duration) {
        let mut progress = self.progress();
        progress.slot = match progress.slot {
            Duration::ZERO => time,
            before => (before * 19 + time) / 20,
        };
    }

    /// Notes that data were waited for.
    pub fn waited_for_data(&self, time: Duration) {
        self.progress().data += time;
    }

    /// Notes the memory in use.
    pub fn uses_memory(&self, bytes: u64) {
        self.progress().memory_bytes = bytes;
    }

    /// Notes what the loop does from here on.
    pub fn enter(&self, step: u64, phase: Phase) {
        let mut progress = self.progress();
        progress.step = Step(step);
        progress.phase = phase;
        progress.since = Instant::now();
    }

    /// Makes a sign of life.
    pub fn beat(&self) -> Beat {
        let progress = self.progress();
        let op = progress.ledger.read();
        Beat {
            generation: progress.generation,
            step: progress.step,
            phase: progress.phase,
            phase_ms: progress.since.elapsed().as_millis() as u64,
            op_seq: op.op_seq,
            in_op: op.in_progress,
            slot_us: progress.slot.as_micros() as u64,
            data_us: progress.data.as_micros() as u64,
            memory_bytes: progress.memory_bytes,
        }
    }
}

/// A handle to the shared state.
pub type SharedHandle = Arc<Shared>;
