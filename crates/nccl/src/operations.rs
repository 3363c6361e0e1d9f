//! Operations on device memory.

use std::cell::Cell;
use std::ffi::{c_int, c_void};

use crate::abort::{Held, Taken};
use crate::api::{Api, RawComm, RawResult};
use crate::library::{IN_PROGRESS, SUCCESS};
use crate::{Communicator, NcclError, Progress};

/// A `cudaStream_t` or `CUstream`.
pub type RawStream = *mut c_void;

/// Type of an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum DataType {
    /// Bytes.
    U8 = 1,
    /// 32-bit integers.
    I32 = 2,
    /// 64-bit integers.
    I64 = 4,
    /// IEEE single precision.
    F32 = 7,
    /// The upper half of an F32.
    BF16 = 9,
}

impl DataType {
    /// Returns the size of an element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::BF16 => 2,
            Self::I32 | Self::F32 => 4,
            Self::I64 => 8,
        }
    }
}

/// What a reduction does with the ranks' elements.
///
/// Sums of integers do not depend on their order and are the same for every grouping. Sums of
/// floats are the same on all ranks of one call, and may differ for another world, size or
/// topology.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum ReduceOp {
    /// The sum; integers wrap.
    Sum = 0,
    /// The largest.
    Max = 2,
    /// The smallest.
    Min = 3,
}

/// One operation, as this rank takes part in it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operation {
    AllReduce { source: Source, count: usize, op: ReduceOp },
    ReduceScatter { source: Source, count: usize, op: ReduceOp },
    AllGather { source: Source, count: usize },
    Broadcast { source: Source, count: usize, root: usize },
    Send { from: *const c_void, data: DataType, count: usize, peer: usize },
    Recv { to: *mut c_void, data: DataType, count: usize, peer: usize },
}

/// Where an operation reads and writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source {
    from: *const c_void,
    to: *mut c_void,
    data: DataType,
}

impl Operation {
    fn name(&self) -> &'static str {
        match self {
            Self::AllReduce { .. } => "ncclAllReduce",
            Self::ReduceScatter { .. } => "ncclReduceScatter",
            Self::AllGather { .. } => "ncclAllGather",
            Self::Broadcast { .. } => "ncclBroadcast",
            Self::Send { .. } => "ncclSend",
            Self::Recv { .. } => "ncclRecv",
        }
    }

    /// # Safety
    /// See [`Communicator::all_reduce`].
    unsafe fn issue(&self, api: &Api, comm: RawComm, stream: RawStream) -> RawResult {
        let rank = |n: usize| c_int::try_from(n).unwrap_or(c_int::MAX);
        // SAFETY: the caller answers for the buffers; the communicator is live and locked.
        unsafe {
            match *self {
                Self::AllReduce { source: Source { from, to, data }, count, op } => {
                    (api.all_reduce)(from, to, count, data as c_int, op as c_int, comm, stream)
                }
                Self::ReduceScatter { source: Source { from, to, data }, count, op } => {
                    (api.reduce_scatter)(from, to, count, data as c_int, op as c_int, comm, stream)
                }
                Self::AllGather { source: Source { from, to, data }, count } => {
                    (api.all_gather)(from, to, count, data as c_int, comm, stream)
                }
                Self::Broadcast { source: Source { from, to, data }, count, root } => {
                    (api.broadcast)(from, to, count, data as c_int, rank(root), comm, stream)
                }
                Self::Send { from, data, count, peer } => {
                    (api.send)(from, count, data as c_int, rank(peer), comm, stream)
                }
                Self::Recv { to, data, count, peer } => {
                    (api.recv)(to, count, data as c_int, rank(peer), comm, stream)
                }
            }
        }
    }
}

/// Operations that start together: how sends and receives that wait for each other are written, and
/// how many small operations cost one launch. All ranks give the same collective ones, in the same
/// order.
#[derive(Debug, Default)]
pub struct Batch {
    operations: Vec<Operation>,
}

impl Communicator {
    /// Enqueues: every element of `to` becomes the reduction of that element of all ranks' `from`.
    /// Both hold `count` elements; they may be the same buffer.
    ///
    /// # Safety
    /// Until `stream` has passed the operation, or the communicator is aborted and the abort has
    /// returned: the buffers lie on the communicator's device (or are visible to it), hold that
    /// many elements, stay allocated, and nothing else writes them or reads what is written.
    /// `stream` belongs to the same device and lives. Results are valid only if the communicator
    /// was not aborted.
    ///
    /// # Errors
    /// [`NcclError::Call`]; [`NcclError::Aborted`], also where the call did not return in time;
    /// [`NcclError::GroupOpen`].
    pub unsafe fn all_reduce(
        &self,
        from: *const c_void,
        to: *mut c_void,
        count: usize,
        data: DataType,
        op: ReduceOp,
        stream: RawStream,
    ) -> Result<Progress, NcclError> {
        let source = Source { from, to, data };
        // SAFETY: by the caller.
        unsafe { self.enqueue(Operation::AllReduce { source, count, op }, stream) }
    }

    /// Enqueues: `to` becomes this rank's part of the reduction. `from` holds `world * count`
    /// elements, `to` holds `count`; in place where `to` is this rank's part of `from`.
    ///
    /// # Safety
    /// See [`all_reduce`](Self::all_reduce).
    ///
    /// # Errors
    /// See [`all_reduce`](Self::all_reduce).
    pub unsafe fn reduce_scatter(
        &self,
        from: *const c_void,
        to: *mut c_void,
        count: usize,
        data: DataType,
        op: ReduceOp,
        stream: RawStream,
    ) -> Result<Progress, NcclError> {
        let source = Source { from, to, data };
        // SAFETY: by the caller.
        unsafe { self.enqueue(Operation::ReduceScatter { source, count, op }, stream) }
    }

    /// Enqueues: `to` becomes all ranks' `from` in rank order. `from` holds `count` elements, `to`
    /// holds `world * count`; in place where `from` is this rank's part of `to`.
    ///
    /// # Safety
    /// See [`all_reduce`](Self::all_reduce).
    ///
    /// # Errors
    /// See [`all_reduce`](Self::all_reduce).
    pub unsafe fn all_gather(
        &self,
        from: *const c_void,
        to: *mut c_void,
        count: usize,
        data: DataType,
        stream: RawStream,
    ) -> Result<Progress, NcclError> {
        let source = Source { from, to, data };
        // SAFETY: by the caller.
        unsafe { self.enqueue(Operation::AllGather { source, count }, stream) }
    }

    /// Enqueues: `to` becomes the `from` of rank `root`; other ranks' `from` is not read. Both hold
    /// `count` elements; they may be the same buffer.
    ///
    /// # Safety
    /// See [`all_reduce`](Self::all_reduce).
    ///
    /// # Errors
    /// See [`all_reduce`](Self::all_reduce).
    pub unsafe fn broadcast(
        &self,
        from: *const c_void,
        to: *mut c_void,
        count: usize,
        data: DataType,
        root: usize,
        stream: RawStream,
    ) -> Result<Progress, NcclError> {
        let source = Source { from, to, data };
        // SAFETY: by the caller.
        unsafe { self.enqueue(Operation::Broadcast { source, count, root }, stream) }
    }

    /// Enqueues the operations of a batch together, so that none waits for another of them to
    /// start.
    ///
    /// # Safety
    /// See [`all_reduce`](Self::all_reduce), for every buffer of the batch.
    ///
    /// # Errors
    /// [`NcclError::Call`], [`NcclError::Aborted`], [`NcclError::GroupOpen`].
    pub unsafe fn exchange(&self, batch: &Batch, stream: RawStream) -> Result<Progress, NcclError> {
        refuse_open_group()?;
        let held: Held<'_> = self.shared.hold()?;
        // SAFETY: it takes nothing, and is ended below on the same thread.
        match held.make(|api, _| unsafe { (api.group_start)() }) {
            Ok(SUCCESS) => {}
            Ok(error) => return held.conclude("ncclGroupStart", error),
            Err(Taken::Before) => return Err(NcclError::Aborted),
            Err(Taken::During) => return Err(leave_group_open()),
        }
        let mut failed: Option<(&'static str, RawResult)> = None;
        for operation in &batch.operations {
            // SAFETY: by the caller.
            match held.make(|api, comm| unsafe { operation.issue(api, comm, stream) }) {
                Ok(SUCCESS | IN_PROGRESS) => {}
                Ok(error) => {
                    failed = Some((operation.name(), error));
                    break;
                }
                // The group holds on to what the abort frees, so it cannot be ended.
                Err(_) => return Err(leave_group_open()),
            }
        }
        // SAFETY: ends the group that was started above; the communicator is live.
        match held.make(|api, _| unsafe { (api.group_end)() }) {
            Ok(ended) => {
                let (name, result) = failed.unwrap_or(("ncclGroupEnd", ended));
                held.conclude(name, result)
            }
            Err(Taken::Before) => Err(leave_group_open()),
            Err(Taken::During) => Err(NcclError::Aborted),
        }
    }

    /// # Safety
    /// See [`all_reduce`](Self::all_reduce).
    unsafe fn enqueue(
        &self,
        operation: Operation,
        stream: RawStream,
    ) -> Result<Progress, NcclError> {
        refuse_open_group()?;
        // SAFETY: by the caller.
        self.call(operation.name(), |api, comm| unsafe { operation.issue(api, comm, stream) })
    }
}

thread_local! {
    /// Whether an abort left a group of calls open on this thread.
    static GROUP_OPEN: Cell<bool> = const { Cell::new(false) };
}

fn leave_group_open() -> NcclError {
    GROUP_OPEN.set(true);
    NcclError::Aborted
}

pub(crate) fn refuse_open_group() -> Result<(), NcclError> {
    if GROUP_OPEN.get() { Err(NcclError::GroupOpen) } else { Ok(()) }
}

impl Batch {
    /// Makes a batch without operations.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds what [`Communicator::all_reduce`] does.
    pub fn all_reduce(
        &mut self,
        from: *const c_void,
        to: *mut c_void,
        count: usize,
        data: DataType,
        op: ReduceOp,
    ) {
        let source = Source { from, to, data };
        self.operations.push(Operation::AllReduce { source, count, op });
    }

    /// Adds what [`Communicator::reduce_scatter`] does.
    pub fn reduce_scatter(
        &mut self,
        from: *const c_void,
        to: *mut c_void,
        count: usize,
        data: DataType,
        op: ReduceOp,
    ) {
        let source = Source { from, to, data };
        self.operations.push(Operation::ReduceScatter { source, count, op });
    }

    /// Adds what [`Communicator::all_gather`] does.
    pub fn all_gather(
        &mut self,
        from: *const c_void,
        to: *mut c_void,
        count: usize,
        data: DataType,
    ) {
        self.operations.push(Operation::AllGather { source: Source { from, to, data }, count });
    }

    /// Adds what [`Communicator::broadcast`] does.
    pub fn broadcast(
        &mut self,
        from: *const c_void,
        to: *mut c_void,
        count: usize,
        data: DataType,
        root: usize,
    ) {
        let source = Source { from, to, data };
        self.operations.push(Operation::Broadcast { source, count, root });
    }

    /// Adds: `count` elements of `from` go to rank `peer`, which receives as many.
    pub fn send(&mut self, from: *const c_void, count: usize, data: DataType, peer: usize) {
        self.operations.push(Operation::Send { from, data, count, peer });
    }

    /// Adds: `to` becomes the `count` elements that rank `peer` sends.
    pub fn recv(&mut self, to: *mut c_void, count: usize, data: DataType, peer: usize) {
        self.operations.push(Operation::Recv { to, data, count, peer });
    }
}
