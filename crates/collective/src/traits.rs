//! The contract of a collective.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lacuna_cuda::{DeviceBuffer, Stream};

use crate::{AbortHandle, CollectiveError};

/// The members of one generation, as one of them sees it.
///
/// All ranks make the same calls in the same order with the same sizes. A call returns `Ok` only
/// if every rank entered it, so a sum that arrived holds every rank's contribution.
///
/// # After a failure
/// - The contents of the buffers of the failed call are garbage.
/// - The communicator is dead for good: every later call fails at once with the same fault.
/// - Peers may have completed the call that failed here, but then not the next one.
/// - Connections stay open until the value is dropped or aborted, so that each rank reports what
///   it saw itself rather than a neighbour's reaction. An owner that reports a fault should keep
///   the value until membership tells it to leave the generation.
///
/// # Threads
/// One thread owns a communicator and makes all its calls, unless it says that it
/// [may change threads](Collective::may_change_threads). Other threads hold its [`AbortHandle`]
/// and its [`OpLedger`]. An implementation whose library needs an owner thread (a GPU's) can thus
/// live on the caller's.
///
/// # Deadlines
/// `deadline` bounds the whole call, from its start. Every call returns shortly after it at worst.
pub trait Collective: Send {
    /// Returns this member's place in the group, 0-based.
    fn rank(&self) -> usize;

    /// Returns the number of members.
    fn world(&self) -> usize;

    /// Replaces every element by its sum over all ranks.
    ///
    /// Integer sums do not depend on order, so the bytes are the same for every grouping. The
    /// caller keeps sums inside the range of i64; sums that leave it are unspecified, not checked.
    ///
    /// # Errors
    /// See [`CollectiveError`]; the communicator is dead afterwards.
    fn all_reduce_i64(
        &mut self,
        buffer: &mut [i64],
        deadline: Duration,
    ) -> Result<(), CollectiveError>;

    /// Replaces every element by its sum over all ranks, as [`all_reduce_i64`] does; sums that
    /// leave the range of i32 wrap.
    ///
    /// # Errors
    /// See [`CollectiveError`]; the communicator is dead afterwards.
    ///
    /// [`all_reduce_i64`]: Collective::all_reduce_i64
    fn all_reduce_i32(
        &mut self,
        buffer: &mut [i32],
        deadline: Duration,
    ) -> Result<(), CollectiveError>;

    /// Replaces every element by its f32 sum over all ranks.
    ///
    /// Every rank gets the same bytes. Nothing is claimed across different worlds.
    ///
    /// # Errors
    /// See [`CollectiveError`]; the communicator is dead afterwards.
    fn all_reduce_f32(
        &mut self,
        buffer: &mut [f32],
        deadline: Duration,
    ) -> Result<(), CollectiveError>;

    /// Copies the bytes of rank `root` to every other rank.
    ///
    /// # Errors
    /// See [`CollectiveError`]; the communicator is dead afterwards.
    ///
    /// # Panics
    /// If `root` is not a rank of the group.
    fn broadcast(
        &mut self,
        root: usize,
        bytes: &mut [u8],
        deadline: Duration,
    ) -> Result<(), CollectiveError>;

    /// Returns once every rank has entered.
    ///
    /// # Errors
    /// See [`CollectiveError`]; the communicator is dead afterwards.
    fn barrier(&mut self, deadline: Duration) -> Result<(), CollectiveError> {
        self.all_reduce_i64(&mut [0], deadline)
    }

    /// Tells whether calls may come from one thread now and from another later, never from two at
    /// once: then a step's sums can run while its owner computes.
    fn may_change_threads(&self) -> bool {
        false
    }

    /// Returns the entry for buffers on this rank's device, where the group is one of devices.
    fn on_device(&mut self) -> Option<&mut dyn DeviceCollective> {
        None
    }

    /// Leaves the group: frees what the communicator holds, which is dead afterwards.
    ///
    /// Dropping does the same and cannot say whether it went well.
    ///
    /// # Errors
    /// [`CollectiveError::Stuck`]: a device is not let go, and the process must end.
    fn leave(&mut self) -> Result<(), CollectiveError>;

    /// Returns the handle that wakes and kills this communicator from any thread.
    fn abort_handle(&self) -> AbortHandle;

    /// Returns the ledger that says from any thread which operation this rank is in.
    fn ledger(&self) -> OpLedger;
}

/// Operations on memory of a device.
///
/// They count and fail like those of [`Collective`]. After a failure the device has let go of the
/// buffer, unless the error is [`CollectiveError::Stuck`]: then it must not be freed.
pub trait DeviceCollective {
    /// Replaces the first `count` i64 of `buffer` by their sums over all ranks, once `after` has
    /// passed what it holds by now. Returns when the sums are there.
    ///
    /// # Errors
    /// See [`CollectiveError`]; the communicator is dead afterwards.
    ///
    /// # Panics
    /// If the buffer is smaller or lies on another device.
    fn all_reduce_i64_there(
        &mut self,
        buffer: &mut DeviceBuffer,
        count: usize,
        after: &Stream,
        deadline: Duration,
    ) -> Result<(), CollectiveError>;
}

/// Number of the operation a rank is in, readable while the owner thread is blocked in it.
///
/// Ranks that entered an operation and ranks that did not are how a stuck step finds its culprit.
#[derive(Clone, Debug, Default)]
pub struct OpLedger {
    // op_seq * 2, plus 1 while in progress: one word, so that a reader never sees half an update.
    packed: Arc<AtomicU64>,
}

/// One reading of an [`OpLedger`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpProgress {
    /// Number of the operation in progress or last done, 1-based; 0 before the first.
    pub op_seq: u64,
    /// Whether the operation is in progress. Stays true for an operation that failed.
    pub in_progress: bool,
}

impl OpLedger {
    /// Reads the ledger.
    pub fn read(&self) -> OpProgress {
        let packed: u64 = self.packed.load(Ordering::Acquire);
        OpProgress { op_seq: packed / 2, in_progress: packed % 2 == 1 }
    }

    /// Notes that the owner thread starts an operation; for implementations.
    pub fn enter(&self, op_seq: u64) {
        self.packed.store(op_seq * 2 + 1, Ordering::Release);
    }

    /// Notes that the operation completed; for implementations.
    pub fn complete(&self, op_seq: u64) {
        self.packed.store(op_seq * 2, Ordering::Release);
    }
}
