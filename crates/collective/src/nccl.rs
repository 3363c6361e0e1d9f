//! A collective over NCCL: the bytes travel between devices, and everything else over TCP.
//!
//! NCCL does not say who is late, who died or who called something else; it hangs or gives garbage.
//! So the group has the same proven connections as [`TcpCollective`], and every operation begins
//! with the exchange of its description over them: an operation starts on the devices only once
//! all ranks have entered the same one. That costs one message one way, keeps kernels from spinning
//! for ranks that are late, and makes the errors those of TCP. While the devices work, the
//! connections tell who went.
//!
//! # Rules
//! - One thread calls NCCL: the one that owns the value. What makes a communicator, with the
//!   buffers beside it, and aborts run on threads of their own.
//! - Communicators are non-blocking. Every wait asks the event, NCCL's asynchronous error, the
//!   abort handle, the connections and the clock; none is a bare synchronisation.
//! - A call of NCCL that does not return by its deadline is ended by an abort
//!   ([`Communicator::until`]). Before there is a communicator there is nothing to abort: then the
//!   call is given up, and stays on its thread ([`CollectiveError::Blocked`]). One that not even an
//!   abort frees keeps the owner's thread: then somebody else must kill the process.
//! - After any fault the communicator is aborted, never finalised. What an aborted operation wrote
//!   is garbage, although its stream looks fine: results are read only if no abort came before.
//! - An abort that does not return ([`CollectiveError::Stuck`]) costs the process: buffers that a
//!   device may still write are leaked, not freed.

mod setup;
mod staging;

use std::ffi::c_void;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use lacuna_cuda::{CudaError, DeviceBuffer, Stream};
use lacuna_nccl::{
    Aborter, CommConfig, Communicator, DataType, NcclError, Progress, ReduceOp, ResultCode, Seat,
    StartError, UniqueId,
};

pub use setup::{NcclSetup, SetupError};
use staging::Staging;

use crate::exchange::DEPARTED_GRACE;
use crate::traits::{Collective, DeviceCollective, OpLedger};
use crate::{AbortHandle, CollectiveError, Group, OpKind, TcpCollective, TrainerListener};

/// How long an abort may take: NCCL 2.28 takes half a second where nothing is wrong.
const ABORT_LIMIT: Duration = Duration::from_secs(5);
/// How long after NCCL failed the connections are watched for the member that caused it.
const BLAME_TIME: Duration = Duration::from_millis(300);
/// How often the connections are looked at.
const WATCH_EVERY: Duration = Duration::from_millis(2);
/// Pauses between two looks at the device: short operations are seen at once, long ones cost no
/// core.
const PAUSE_MIN: Duration = Duration::from_micros(5);
const PAUSE_MAX: Duration = Duration::from_micros(200);

/// A member of a group whose devices are joined by NCCL.
pub struct NcclCollective {
    /// Agrees on operations, knows who is there, and keeps the first fault.
    mesh: TcpCollective,
    comm: Communicator,
    aborter: Aborter,
    abort: AbortHandle,
    /// None once it was leaked: an abort did not return.
    staging: Option<Staging>,
}

impl NcclCollective {
    /// Forms the group and returns this rank's member.
    ///
    /// # Errors
    /// Those of [`TcpCollective::connect`], and [`CollectiveError::Nccl`],
    /// [`CollectiveError::Blocked`], [`CollectiveError::Device`] and
    /// [`CollectiveError::SharedDevice`].
    pub fn connect(
        listener: &TrainerListener,
        group: &Group,
        setup: &NcclSetup,
        abort: AbortHandle,
        deadline: Duration,
    ) -> Result<Self, CollectiveError> {
        let end: Instant = Instant::now() + deadline;
        let left = || end.saturating_duration_since(Instant::now());
        let mut mesh = TcpCollective::connect(listener, group, abort.clone(), deadline)?;
        let device = |source| CollectiveError::Device { op_seq: 0, source };
        setup.device.make_current().map_err(device)?;
        refuse_shared_device(&mut mesh, &setup.place, left())?;
        let id: UniqueId = share_id(&mut mesh, setup, &abort, end)?;
        let seat = Seat { id, world: group.members.len(), rank: group.rank };
        let there = setup.device.clone();
        // Not by this thread: where another call of NCCL is stuck, the driver may not answer.
        let enter = move || there.make_current().and_then(|()| Staging::new(&there));
        let config = CommConfig::default();
        let stop = || abort.check().is_err();
        let started = Communicator::start(&setup.nccl, seat, config, enter, end, stop);
        let (comm, staging) = started.map_err(|fault| not_started(fault, &abort))?;
        let aborter: Aborter = comm.aborter();
        let hook: Aborter = comm.aborter();
        abort.on_abort(move || hook.begin());
        let staging = Some(staging);
        let mut collective = Self { mesh, comm, aborter, abort, staging };
        let formed = collective.wait_formed(end);
        // Members whose NCCL does not get ready are named by those whose does.
        let formed = formed.and_then(|()| collective.mesh.barrier(left()));
        if let Err(fault) = formed {
            return Err(collective.give_up(fault));
        }
        collective.mesh.count_from_here();
        Ok(collective)
    }

    fn wait_formed(&mut self, end: Instant) -> Result<(), CollectiveError> {
        let armed = self.comm.until(end);
        let mut watch = Watch::new();
        loop {
            self.abort.check()?;
            match self.comm.poll() {
                Ok(Progress::Done) => break,
                // Aborted because the time is over, which is what is said then.
                Err(NcclError::Aborted) if self.comm.has_rung() => {}
                Ok(Progress::Going) => {}
                Err(error) => return Err(self.blame(error)),
            }
            if Instant::now() >= end {
                let source = NcclError::Timeout { what: "the communicator", waited: watch.age() };
                return Err(CollectiveError::Nccl { op_seq: 0, source });
            }
            self.look_for_departed(&mut watch)?;
            watch.pause();
        }
        drop(armed);
        if self.comm.has_rung() {
            // In the last moment.
            return Err(self.timed_out());
        }
        Ok(())
    }

    /// Runs an operation in pieces of what the staging holds.
    fn operate(
        &mut self,
        op: Op,
        buffer: &mut [u8],
        deadline: Duration,
        launch: &Launch<'_>,
    ) -> Result<(), CollectiveError> {
        let end: Instant = Instant::now() + deadline;
        let Op { kind, root } = op;
        self.mesh.agree(kind, root, buffer.len() as u64, end).map_err(|f| self.give_up(f))?;
        let armed = self.comm.until(end);
        for piece in buffer.chunks_mut(Staging::BYTES) {
            let done = self.piece(piece, end, launch);
            done.map_err(|fault| self.give_up(fault))?;
        }
        drop(armed);
        if self.comm.has_rung() {
            // In the last moment: this operation is late, and no other may begin.
            let late = self.timed_out();
            return Err(self.give_up(late));
        }
        self.mesh.complete();
        Ok(())
    }

    fn piece(
        &mut self,
        piece: &mut [u8],
        end: Instant,
        launch: &Launch<'_>,
    ) -> Result<(), CollectiveError> {
        let op_seq: u64 = self.mesh.op_seq();
        let device = |source| CollectiveError::Device { op_seq, source };
        let Some(staging) = &mut self.staging else {
            return Err(CollectiveError::Stuck { source: NcclError::Aborted });
        };
        staging.load(piece).map_err(device)?;
        let (address, stream) = (staging.address(), staging.raw_stream());
        if let Err(error) = launch(&self.comm, address, piece.len(), stream) {
            return Err(self.blame(error));
        }
        // Until NCCL has put everything on the stream, a copy behind it could overtake.
        self.wait(end, |this| Ok(this.comm.poll() == Ok(Progress::Done)))?;
        if let Some(staging) = &mut self.staging {
            staging.store(piece.len()).map_err(device)?;
        }
        let is_done = |this: &Self| this.staging.as_ref().map_or(Ok(true), Staging::is_done);
        self.wait(end, |this| is_done(this).map_err(device))?;
        // An aborted sum looks like a finished one.
        self.abort.check()?;
        match &self.staging {
            Some(staging) if !self.aborter.is_aborted() => staging.take(piece),
            _ => return Err(self.blame(NcclError::Aborted)),
        }
        Ok(())
    }

    /// Sums a buffer where it is.
    fn sum_there(
        &mut self,
        buffer: &mut DeviceBuffer,
        count: usize,
        after: &Stream,
        end: Instant,
    ) -> Result<(), CollectiveError> {
        let op_seq: u64 = self.mesh.op_seq();
        let device = |source| CollectiveError::Device { op_seq, source };
        let Some(staging) = &self.staging else {
            return Err(CollectiveError::Stuck { source: NcclError::Aborted });
        };
        let armed = self.comm.until(end);
        staging.follow(after).map_err(device)?;
        let stream = staging.raw_stream();
        let at = buffer.as_ptr();
        // SAFETY: the buffer is borrowed until the sum is there; after a fault until the abort has
        // returned, or the error says that it must not be freed.
        let launched =
            unsafe { self.comm.all_reduce(at, at, count, DataType::I64, ReduceOp::Sum, stream) };
        if let Err(error) = launched {
            return Err(self.blame(error));
        }
        self.wait(end, |this| Ok(this.comm.poll() == Ok(Progress::Done)))?;
        if let Some(staging) = &self.staging {
            staging.mark().map_err(device)?;
        }
        let is_done = |this: &Self| this.staging.as_ref().map_or(Ok(true), Staging::is_done);
        self.wait(end, |this| is_done(this).map_err(device))?;
        drop(armed);
        // An aborted sum looks like a finished one.
        self.abort.check()?;
        if self.comm.has_rung() || self.aborter.is_aborted() {
            return Err(self.blame(NcclError::Aborted));
        }
        Ok(())
    }

    /// Waits until `done` says so, looking at everything that can go wrong meanwhile.
    fn wait(
        &self,
        end: Instant,
        done: impl Fn(&Self) -> Result<bool, CollectiveError>,
    ) -> Result<(), CollectiveError> {
        let mut watch = Watch::new();
        loop {
            self.abort.check()?;
            if done(self)? {
                return Ok(());
            }
            if let Err(error) = self.comm.poll() {
                return Err(self.blame(error));
            }
            if Instant::now() >= end {
                return Err(self.timed_out());
            }
            self.look_for_departed(&mut watch)?;
            watch.pause();
        }
    }

    /// Names a member that has gone.
    fn went(&self) -> Option<CollectiveError> {
        let (rank, addr) = self.mesh.departed().ok().flatten()?;
        let source = Arc::new(io::Error::from(io::ErrorKind::UnexpectedEof));
        Some(CollectiveError::PeerLost { rank, addr, op_seq: self.mesh.op_seq(), source })
    }

    /// All have entered: whose bytes are missing is known to the devices only.
    fn timed_out(&self) -> CollectiveError {
        CollectiveError::Timeout { op_seq: self.mesh.op_seq(), waiting_for: Vec::new() }
    }

    /// Fails once a member has been gone for longer than an operation may take to end without it.
    fn look_for_departed(&self, watch: &mut Watch) -> Result<(), CollectiveError> {
        if !watch.is_due() {
            return Ok(());
        }
        if watch.departed.is_none() {
            // The first one counts: others may go because of it.
            watch.departed = self.mesh.departed()?.map(|peer| (peer, Instant::now()));
        }
        let Some(((rank, addr), since)) = watch.departed else { return Ok(()) };
        if since.elapsed() < DEPARTED_GRACE {
            return Ok(());
        }
        let source = Arc::new(io::Error::from(io::ErrorKind::UnexpectedEof));
        Err(CollectiveError::PeerLost { rank, addr, op_seq: self.mesh.op_seq(), source })
    }

    /// Finds out what a failure of NCCL means: an abort, a deadline, a member that went, or NCCL
    /// itself.
    fn blame(&self, error: NcclError) -> CollectiveError {
        if error == NcclError::Aborted && self.comm.has_rung() {
            let aborted = self.abort.check().err();
            // Whoever went while a call was stuck is why.
            return aborted.or_else(|| self.went()).unwrap_or_else(|| self.timed_out());
        }
        let op_seq: u64 = self.mesh.op_seq();
        let own_fault = error.code() == Some(ResultCode::UnhandledCudaError);
        let until: Instant = Instant::now() + BLAME_TIME;
        while !own_fault && Instant::now() < until {
            if let Err(aborted) = self.abort.check() {
                return aborted;
            }
            match self.mesh.departed() {
                Ok(Some((rank, addr))) => {
                    let source = Arc::new(io::Error::other(error));
                    return CollectiveError::PeerLost { rank, addr, op_seq, source };
                }
                Ok(None) => thread::sleep(WATCH_EVERY),
                Err(local) => return local,
            }
        }
        CollectiveError::Nccl { op_seq, source: error }
    }

    /// Ends the communicator with its first fault, without waiting for the end.
    fn give_up(&mut self, fault: CollectiveError) -> CollectiveError {
        self.aborter.begin();
        self.mesh.fail(fault)
    }
}

/// Starts an operation on a piece: gets its address on the device, its size in bytes, the stream.
type Launch<'l> =
    dyn Fn(&Communicator, *mut c_void, usize, *mut c_void) -> Result<Progress, NcclError> + 'l;

/// What all ranks must agree on beside the size.
#[derive(Clone, Copy, Debug)]
struct Op {
    kind: OpKind,
    root: usize,
}

/// Pauses of one wait, and when to look at the connections.
struct Watch {
    started: Instant,
    pause: Duration,
    looked: Instant,
    departed: Option<((usize, SocketAddr), Instant)>,
}

impl Watch {
    fn new() -> Self {
        let now = Instant::now();
        Self { started: now, pause: PAUSE_MIN, looked: now, departed: None }
    }

    fn age(&self) -> Duration {
        self.started.elapsed()
    }

    fn is_due(&mut self) -> bool {
        let due: bool = self.looked.elapsed() >= WATCH_EVERY;
        if due {
            self.looked = Instant::now();
        }
        due
    }

    fn pause(&mut self) {
        thread::sleep(self.pause);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }
}

/// Fails where a lower rank computes on this rank's device.
fn refuse_shared_device(
    mesh: &mut TcpCollective,
    place: &str,
    deadline: Duration,
) -> Result<(), CollectiveError> {
    let hash = blake3::hash(place.as_bytes());
    let (number, _) = hash.as_bytes().split_first_chunk::<8>().expect("a hash has 32 bytes");
    let mut all: Vec<i64> = vec![0; mesh.world()];
    // Each rank says its own number and nothing of the others.
    all[mesh.rank()] = i64::from_le_bytes(*number);
    mesh.all_reduce_i64(&mut all, deadline)?;
    match all[..mesh.rank()].iter().position(|other| *other == all[mesh.rank()]) {
        Some(rank) => Err(CollectiveError::SharedDevice { rank, device: place.to_string() }),
        None => Ok(()),
    }
}

/// Rank 0 draws the id of the communicator; the others get it over the proven connections.
fn share_id(
    mesh: &mut TcpCollective,
    setup: &NcclSetup,
    abort: &AbortHandle,
    end: Instant,
) -> Result<UniqueId, CollectiveError> {
    let mut bytes = [0; UniqueId::BYTES];
    if mesh.rank() == 0 {
        let drawn = setup.nccl.unique_id(end, || abort.check().is_err());
        bytes = *drawn.map_err(|error| not_begun(error, abort))?.as_bytes();
    }
    mesh.broadcast(0, &mut bytes, end.saturating_duration_since(Instant::now()))?;
    Ok(UniqueId::from_bytes(bytes))
}

fn not_started(fault: StartError<CudaError>, abort: &AbortHandle) -> CollectiveError {
    match fault {
        StartError::Enter(source) => CollectiveError::Device { op_seq: 0, source },
        StartError::Nccl(error) => not_begun(error, abort),
    }
}

/// Says what a call before there is a communicator failed by.
fn not_begun(error: NcclError, abort: &AbortHandle) -> CollectiveError {
    match error {
        NcclError::Blocked { call, waited } => CollectiveError::Blocked { call, waited },
        // Members took all the time to come.
        NcclError::Timeout { .. } => {
            CollectiveError::Timeout { op_seq: 0, waiting_for: Vec::new() }
        }
        NcclError::Thread { reason } => {
            let source = Arc::new(io::Error::other(reason));
            CollectiveError::Local { action: "start a thread for NCCL", source }
        }
        error => {
            let nccl = || CollectiveError::Nccl { op_seq: 0, source: error };
            abort.check().err().unwrap_or_else(nccl)
        }
    }
}

impl Collective for NcclCollective {
    fn rank(&self) -> usize {
        self.mesh.rank()
    }

    fn world(&self) -> usize {
        self.mesh.world()
    }

    fn all_reduce_i64(
        &mut self,
        buffer: &mut [i64],
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        let op = Op { kind: OpKind::AllReduceI64, root: 0 };
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(buffer);
        self.operate(op, bytes, deadline, &|comm, at, n_bytes, stream| {
            // SAFETY: the staging holds `n_bytes` there, and nobody touches them until the stream
            // has passed the sum or the abort has returned.
            unsafe { comm.all_reduce(at, at, n_bytes / 8, DataType::I64, ReduceOp::Sum, stream) }
        })
    }

    fn all_reduce_i32(
        &mut self,
        buffer: &mut [i32],
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        let op = Op { kind: OpKind::AllReduceI32, root: 0 };
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(buffer);
        self.operate(op, bytes, deadline, &|comm, at, n_bytes, stream| {
            // SAFETY: as above.
            unsafe { comm.all_reduce(at, at, n_bytes / 4, DataType::I32, ReduceOp::Sum, stream) }
        })
    }

    fn all_reduce_f32(
        &mut self,
        buffer: &mut [f32],
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        let op = Op { kind: OpKind::AllReduceF32, root: 0 };
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(buffer);
        self.operate(op, bytes, deadline, &|comm, at, n_bytes, stream| {
            // SAFETY: as above.
            unsafe { comm.all_reduce(at, at, n_bytes / 4, DataType::F32, ReduceOp::Sum, stream) }
        })
    }

    fn broadcast(
        &mut self,
        root: usize,
        bytes: &mut [u8],
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        assert!(root < self.world(), "broadcast from rank {root} in a world of {}", self.world());
        let op = Op { kind: OpKind::Broadcast, root };
        self.operate(op, bytes, deadline, &|comm, at, n_bytes, stream| {
            // SAFETY: as above.
            unsafe { comm.broadcast(at, at, n_bytes, DataType::U8, root, stream) }
        })
    }

    fn barrier(&mut self, deadline: Duration) -> Result<(), CollectiveError> {
        let done = self.mesh.barrier(deadline);
        done.map_err(|fault| self.give_up(fault))
    }

    fn on_device(&mut self) -> Option<&mut dyn DeviceCollective> {
        Some(self)
    }

    fn leave(&mut self) -> Result<(), CollectiveError> {
        match self.aborter.abort(ABORT_LIMIT) {
            Err(source @ (NcclError::AbortHangs { .. } | NcclError::Thread { .. })) => {
                // The device may write it at any time.
                if let Some(staging) = self.staging.take() {
                    std::mem::forget(staging);
                }
                let stuck = CollectiveError::Stuck { source };
                self.mesh.fail(stuck.clone());
                Err(stuck)
            }
            // NCCL let go, and complained: the next communicator shows whether it matters.
            Ok(()) | Err(_) => self.mesh.leave(),
        }
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    fn ledger(&self) -> OpLedger {
        self.mesh.ledger()
    }
}

impl DeviceCollective for NcclCollective {
    fn all_reduce_i64_there(
        &mut self,
        buffer: &mut DeviceBuffer,
        count: usize,
        after: &Stream,
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        let (end, n_bytes) = (Instant::now() + deadline, count * size_of::<i64>());
        assert!(n_bytes <= buffer.n_bytes(), "{count} i64 in {} bytes", buffer.n_bytes());
        let agreed = self.mesh.agree(OpKind::AllReduceI64There, 0, n_bytes as u64, end);
        agreed.map_err(|fault| self.give_up(fault))?;
        if let Err(fault) = self.sum_there(buffer, count, after, end) {
            let fault = self.give_up(fault);
            // The device must let go before the caller may use its buffer again.
            return Err(self.leave().err().unwrap_or(fault));
        }
        self.mesh.complete();
        Ok(())
    }
}

impl Drop for NcclCollective {
    fn drop(&mut self) {
        // Whoever wants to know calls it before.
        if let Err(error) = self.leave() {
            tracing::error!(%error, "a communicator was not let go");
        }
    }
}

impl fmt::Debug for NcclCollective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NcclCollective")
            .field("mesh", &self.mesh)
            .field("comm", &self.comm)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
