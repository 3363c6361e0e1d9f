//! A collective over TCP: a full mesh of connections between host memories. Between members on one
//! machine the bytes go through shared memory.

use std::fmt;
use std::net::{Shutdown, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::exchange::{CHUNK_BYTES, Exchange, Flow, Gate, Route, sleep_on};
use crate::form::form;
use crate::link::Link;
use crate::reduce::{Lane, sum_in_rank_order};
use crate::traits::{Collective, OpLedger};
use crate::{AbortHandle, CollectiveError, Group, OpDescription, OpKind, TrainerListener};

/// Bound on a member's receive slots: with more than 65 members they take less than a whole chunk
/// of each.
const SLOTS_BYTES_MAX: usize = 64 * CHUNK_BYTES;

/// A member of a group whose members are joined by TCP connections.
pub struct TcpCollective {
    rank: usize,
    world: usize,
    links: Arc<Vec<Link>>,
    flows: Vec<Flow>,
    /// Receive slots; i64 so that every element type is aligned. Grows to the largest need.
    slots: Vec<i64>,
    op_seq: u64,
    ledger: OpLedger,
    abort: AbortHandle,
    /// The first failure, which every later call repeats.
    fault: Option<CollectiveError>,
}

impl TcpCollective {
    /// Forms the group and returns this rank's member.
    ///
    /// Each rank connects to all lower ones and is connected to by all higher ones. Connections
    /// that do not belong to the group are closed and logged. Attempts that fail are repeated
    /// until the deadline, so members may start in any order. A world of 1 uses no socket.
    ///
    /// # Errors
    /// [`CollectiveError::Aborted`], [`CollectiveError::NotFormed`] naming the missing ranks,
    /// [`CollectiveError::Handshake`] where a member holds another key or another list of members,
    /// [`CollectiveError::InvalidGroup`] and [`CollectiveError::Local`].
    pub fn connect(
        listener: &TrainerListener,
        group: &Group,
        abort: AbortHandle,
        deadline: Duration,
    ) -> Result<Self, CollectiveError> {
        let started = Instant::now();
        let links: Vec<Link> = form(listener, group, &abort, started + deadline)?;
        let links: Arc<Vec<Link>> = Arc::new(links);
        let weak = Arc::downgrade(&links);
        abort.on_abort(move || {
            for link in weak.upgrade().iter().flat_map(|links| links.iter()) {
                // Fails only where the peer closed first: the effect is the same.
                let _ = link.stream.shutdown(Shutdown::Both);
            }
        });
        tracing::info!(
            run_id = %group.run,
            generation = %group.generation,
            rank = group.rank,
            world = group.members.len(),
            shared_memory = links.iter().filter(|link| link.rings.is_some()).count(),
            elapsed_ms = started.elapsed().as_millis(),
            "group formed"
        );
        Ok(Self {
            rank: group.rank,
            world: group.members.len(),
            flows: links.iter().map(|_| Flow::default()).collect(),
            links,
            slots: Vec::new(),
            op_seq: 0,
            ledger: OpLedger::default(),
            abort,
            fault: None,
        })
    }

    fn all_reduce<T: Lane>(
        &mut self,
        kind: OpKind,
        buffer: &mut [T],
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        let (rank, world, n) = (self.rank, self.world, buffer.len());
        let segment_of = |idx: usize| -> Range<usize> {
            let (start, end) = (cut(n, idx, world), cut(n, idx + 1, world));
            start * size_of::<T>()..end * size_of::<T>()
        };
        let segment: Range<usize> = segment_of(rank);
        for (flow, link) in self.flows.iter_mut().zip(self.links.iter()) {
            *flow = Flow::from(Route {
                send_ready: segment_of(link.rank),
                send_gated: segment.clone(),
                receive_parts: segment.len(),
                receive_final: segment_of(link.rank),
            });
        }
        let gate = Gate::Summed(sum_in_rank_order::<T>);
        self.operate(kind, 0, bytemuck::cast_slice_mut(buffer), segment, gate, deadline)
    }

    /// Runs the operation that `self.flows` describes, and keeps its fault.
    fn operate(
        &mut self,
        kind: OpKind,
        root: usize,
        buffer: &mut [u8],
        segment: Range<usize>,
        gate: Gate,
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        let (bytes, deadline) = (buffer.len() as u64, Instant::now() + deadline);
        self.enter(kind, root, bytes)
            .and_then(|ours| self.exchange(ours, buffer, segment, gate, deadline))?;
        self.complete();
        Ok(())
    }

    /// Numbers an operation and notes that this rank is in it.
    fn enter(
        &mut self,
        kind: OpKind,
        root: usize,
        bytes: u64,
    ) -> Result<OpDescription, CollectiveError> {
        if let Some(fault) = &self.fault {
            return Err(fault.clone());
        }
        self.op_seq += 1;
        self.ledger.enter(self.op_seq);
        let root = u16::try_from(root).expect("a rank is below WORLD_MAX");
        Ok(OpDescription { op_seq: self.op_seq, kind, root, bytes })
    }

    /// Moves the bytes of an operation that was entered.
    fn exchange(
        &mut self,
        ours: OpDescription,
        buffer: &mut [u8],
        segment: Range<usize>,
        gate: Gate,
        deadline: Instant,
    ) -> Result<(), CollectiveError> {
        let share: usize = SLOTS_BYTES_MAX / self.links.len().max(1);
        let stride: usize =
            segment.len().min(CHUNK_BYTES).min(share).next_multiple_of(size_of::<i64>());
        let n_slots: usize = if matches!(gate, Gate::Summed(_)) { self.links.len() } else { 0 };
        let slots_needed: usize = n_slots * stride / size_of::<i64>();
        if self.slots.len() < slots_needed {
            self.slots.resize(slots_needed, 0);
        }
        let exchange = Exchange {
            rank: self.rank,
            ours,
            outlasts_links: ours.bytes > buffer.len() as u64,
            departed: None,
            links: &self.links,
            flows: &mut self.flows,
            buffer,
            segment,
            slots: bytemuck::cast_slice_mut(&mut self.slots),
            stride,
            gate,
            abort: &self.abort,
            deadline,
            summed: 0,
        };
        let result = self.abort.check().and_then(|()| exchange.run());
        result.map_err(|fault| self.fail(fault))
    }
}

/// For collectives that move their bytes elsewhere and agree on operations over these connections.
impl TcpCollective {
    /// Enters an operation, and returns once all ranks have entered the same one.
    pub(crate) fn agree(
        &mut self,
        kind: OpKind,
        root: usize,
        bytes: u64,
        deadline: Instant,
    ) -> Result<(), CollectiveError> {
        self.flows.fill_with(Flow::default);
        self.enter(kind, root, bytes)
            .and_then(|ours| self.exchange(ours, &mut [], 0..0, Gate::Open, deadline))
    }

    /// Notes that the operation entered last is complete.
    pub(crate) fn complete(&self) {
        self.ledger.complete(self.op_seq);
    }

    /// Keeps the first fault, which every later call repeats.
    pub(crate) fn fail(&mut self, fault: CollectiveError) -> CollectiveError {
        self.fault.get_or_insert(fault).clone()
    }

    /// Number of the operation entered last.
    pub(crate) fn op_seq(&self) -> u64 {
        self.op_seq
    }

    /// Counts operations from 1 again: those so far were preparations.
    pub(crate) fn count_from_here(&mut self) {
        self.op_seq = 0;
        self.ledger = OpLedger::default();
    }

    /// Tells whether any link goes through shared memory.
    #[cfg(test)]
    pub(crate) fn shares_memory(&self) -> bool {
        self.links.iter().any(|link| link.rings.is_some())
    }

    /// Looks without waiting for a member that has closed its connection.
    pub(crate) fn departed(&self) -> Result<Option<(usize, SocketAddr)>, CollectiveError> {
        let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(self.links.len());
        fds.extend(self.links.iter().map(|link| PollFd::new(&link.stream, PollFlags::RDHUP)));
        sleep_on(&mut fds, Duration::ZERO)?;
        let gone = fds.iter().position(|fd| !fd.revents().is_empty());
        Ok(gone.map(|idx| (self.links[idx].rank, self.links[idx].addr)))
    }
}

/// Where part `idx` of `n` elements in `world` parts starts.
fn cut(n: usize, idx: usize, world: usize) -> usize {
    // Not n * idx / world, whose product could overflow.
    idx * (n / world) + idx.min(n % world)
}

impl Collective for TcpCollective {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn all_reduce_i64(
        &mut self,
        buffer: &mut [i64],
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        self.all_reduce(OpKind::AllReduceI64, buffer, deadline)
    }

    fn all_reduce_i32(
        &mut self,
        buffer: &mut [i32],
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        self.all_reduce(OpKind::AllReduceI32, buffer, deadline)
    }

    fn all_reduce_f32(
        &mut self,
        buffer: &mut [f32],
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        self.all_reduce(OpKind::AllReduceF32, buffer, deadline)
    }

    fn broadcast(
        &mut self,
        root: usize,
        bytes: &mut [u8],
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        assert!(root < self.world, "broadcast from rank {root} in a world of {}", self.world);
        let n: usize = bytes.len();
        let receivers: usize = (self.world - 1).max(1);
        // Receivers are numbered by rank with the root left out.
        let segment_of = |rank: usize| -> Range<usize> {
            let idx = if rank > root { rank - 1 } else { rank };
            cut(n, idx, receivers)..cut(n, idx + 1, receivers)
        };
        let is_root: bool = self.rank == root;
        for (flow, link) in self.flows.iter_mut().zip(self.links.iter()) {
            *flow = Flow::from(if is_root {
                Route { send_ready: segment_of(link.rank), ..Route::default() }
            } else if link.rank == root {
                Route { receive_final: segment_of(self.rank), ..Route::default() }
            } else {
                Route {
                    send_gated: segment_of(self.rank),
                    receive_final: segment_of(link.rank),
                    ..Route::default()
                }
            });
        }
        let source: Option<usize> = self.links.iter().position(|link| link.rank == root);
        let gate: Gate = source.map_or(Gate::Open, Gate::ReceivedOn);
        self.operate(OpKind::Broadcast, root, bytes, 0..0, gate, deadline)
    }

    fn barrier(&mut self, deadline: Duration) -> Result<(), CollectiveError> {
        // The exchange of headers is the barrier: it ends when all ranks' headers are in.
        self.flows.fill_with(Flow::default);
        self.operate(OpKind::Barrier, 0, &mut [], 0..0, Gate::Open, deadline)
    }

    fn may_change_threads(&self) -> bool {
        true
    }

    fn leave(&mut self) -> Result<(), CollectiveError> {
        self.fail(CollectiveError::left());
        Ok(())
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    fn ledger(&self) -> OpLedger {
        self.ledger.clone()
    }
}

impl fmt::Debug for TcpCollective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpCollective")
            .field("rank", &self.rank)
            .field("world", &self.world)
            .field("op_seq", &self.op_seq)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
