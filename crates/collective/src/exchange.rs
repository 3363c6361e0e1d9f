//! Moves the bytes of one operation over the mesh.
//!
//! One thread drives all connections with non-blocking sockets and `poll`. Writer threads with
//! queues would overlap as well, but where cores are as few as ranks they only add switches and
//! buffers, and a single wait is the one place that must honour the deadline and the abort.
//!
//! The buffer is cut into one segment per rank. In an all-reduce, rank r receives everybody's
//! part of segment r chunk by chunk, sums a chunk once all parts of it are there, and sends the
//! sum to everybody (reduce-scatter and all-gather, overlapped). In a broadcast, the root deals
//! one segment to each other rank, which passes it on while it comes in, so no link carries the
//! buffer twice. Both are the same engine with other routes. On each connection, in order:
//!
//! ```text
//! header (24 bytes: which operation)  |  bytes that are ready  |  bytes behind the gate
//! ```
//!
//! Nobody waits for a header before sending, so an operation costs no extra round trip, and every
//! rank learns of a mismatch from bytes that are already on their way.
//!
//! Why no deadlock: ready bytes depend on nothing, and every rank always takes what arrives unless
//! a slot is full. A slot is full only until the same chunk came from all other ranks, who send it
//! as ready bytes. Gated bytes come last on each connection, so they hold up nothing.
//!
//! Why receiving into the buffer in place is safe: a sum of a chunk exists only after its owner has
//! this rank's part of it, so this rank no longer needs the bytes that the sum overwrites.

use std::io::{self, ErrorKind, IoSlice};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::link::Link;
use crate::reduce::ReduceFn;
use crate::{AbortHandle, CollectiveError, OpDescription, OpKind};

/// Granularity of summing: a rank's receive slots at world 2 and the part of the buffer they are
/// added to stay in a core's second-level cache. A multiple of every element size.
pub(crate) const CHUNK_BYTES: usize = 256 << 10;

/// Longest sleep. Sockets that are shut down wake `poll` at once; this bounds the wait where the
/// abort's hook came before the connection was registered.
pub(crate) const TICK: Duration = Duration::from_millis(50);

/// How often a member that waits for others of its machine gives them the processor before it
/// sleeps: to be woken costs both sides more than the wait for a chunk.
const YIELDS: u32 = 100;

/// How long after a member closed its connection an operation that moves its bytes elsewhere may
/// still complete: a member that is done may leave at once, and others need a moment more.
pub(crate) const DEPARTED_GRACE: Duration = Duration::from_secs(1);

pub(crate) const HEADER_BYTES: usize = 24;
const HEADER_MAGIC: [u8; 4] = *b"lcOP";

/// What travels on one link during one operation.
#[derive(Debug, Default)]
pub(crate) struct Route {
    /// Part of the buffer that can be sent at once.
    pub send_ready: Range<usize>,
    /// Part of the buffer that can be sent up to the gate.
    pub send_gated: Range<usize>,
    /// How many bytes to add to this rank's segment.
    pub receive_parts: usize,
    /// Part of the buffer that arrives in its final form.
    pub receive_final: Range<usize>,
}

/// A route and how far its bytes got.
#[derive(Debug)]
pub(crate) struct Flow {
    route: Route,
    /// Bytes sent, header included.
    sent: usize,
    /// Bytes received, header included.
    received: usize,
    header: [u8; HEADER_BYTES],
    /// Directions in which the socket had nothing to move when it was last tried: in a large group
    /// a call for each of them would cost more than the bytes.
    stalled: PollFlags,
}

impl From<Route> for Flow {
    fn from(route: Route) -> Self {
        let (header, stalled) = ([0; HEADER_BYTES], PollFlags::empty());
        Self { route, sent: 0, received: 0, header, stalled }
    }
}

impl Default for Flow {
    fn default() -> Self {
        Self::from(Route::default())
    }
}

impl Flow {
    fn to_send(&self) -> usize {
        HEADER_BYTES + self.route.send_ready.len() + self.route.send_gated.len()
    }

    fn to_receive(&self) -> usize {
        HEADER_BYTES + self.route.receive_parts + self.route.receive_final.len()
    }

    fn is_done(&self) -> bool {
        self.sent == self.to_send() && self.received == self.to_receive()
    }

    /// Bytes of `receive_parts` that arrived.
    fn parts_received(&self) -> usize {
        self.received.saturating_sub(HEADER_BYTES).min(self.route.receive_parts)
    }

    /// Bytes of `receive_final` that arrived.
    fn final_received(&self) -> usize {
        self.received.saturating_sub(HEADER_BYTES + self.route.receive_parts)
    }
}

/// What lets gated bytes go.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Gate {
    /// Bytes of this rank's segment that are summed.
    Summed(ReduceFn),
    /// Final bytes received on the link with this index.
    ReceivedOn(usize),
    /// Nothing is gated.
    Open,
}

/// One operation on its way.
pub(crate) struct Exchange<'a> {
    pub rank: usize,
    pub ours: OpDescription,
    /// Links to all other ranks, in rank order.
    pub links: &'a [Link],
    /// One flow per link.
    pub flows: &'a mut [Flow],
    pub buffer: &'a mut [u8],
    /// This rank's segment of the buffer: what `Gate::Summed` sums.
    pub segment: Range<usize>,
    /// One receive slot per link, `stride` bytes each.
    pub slots: &'a mut [u8],
    pub stride: usize,
    pub gate: Gate,
    pub abort: &'a AbortHandle,
    pub deadline: Instant,
    /// Bytes of the segment that are summed.
    pub summed: usize,
    /// Whether the end of a link matters after its bytes are through, because the operation is not
    /// over with them.
    pub outlasts_links: bool,
    /// The first link that ended so, and when.
    pub departed: Option<(usize, Instant)>,
}

/// Whether a step of work moved any byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moved {
    Something,
    Nothing,
}

impl<'a> Exchange<'a> {
    /// Runs the operation to its end.
    pub fn run(mut self) -> Result<(), CollectiveError> {
        // A shutdown by `abort` looks like a lost peer; the abort is the reason.
        self.drive().map_err(|error| self.abort.check().err().unwrap_or(error))
    }

    fn drive(&mut self) -> Result<(), CollectiveError> {
        let header: [u8; HEADER_BYTES] = encode_header(&self.ours);
        let mut fds: Vec<PollFd<'a>> = Vec::with_capacity(self.links.len());
        let shares_memory = self.links.iter().any(|link| link.rings.is_some());
        let mut turns_left = YIELDS;
        loop {
            let moved: Moved = self.advance(&header)?;
            if self.flows.iter().all(Flow::is_done) {
                return Ok(());
            }
            self.abort.check()?;
            if let Some((idx, since)) = self.departed
                && since.elapsed() >= DEPARTED_GRACE
            {
                return Err(self.lost(idx, ErrorKind::UnexpectedEof.into()));
            }
            let left: Duration = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let waiting_for = self.waiting_for();
                return Err(CollectiveError::Timeout { op_seq: self.ours.op_seq, waiting_for });
            }
            if moved == Moved::Something {
                turns_left = YIELDS;
            } else if shares_memory && turns_left > 0 {
                turns_left -= 1;
                std::thread::yield_now();
                self.look(&mut fds)?;
            } else {
                self.wait(&mut fds, left.min(TICK))?;
            }
        }
    }

    /// Sends and receives on every link what can be moved without waiting.
    fn advance(&mut self, header: &[u8; HEADER_BYTES]) -> Result<Moved, CollectiveError> {
        let mut moved = Moved::Nothing;
        // All sends come first: a rank that stops at a mismatch has told everybody its own side.
        for idx in 0..self.links.len() {
            let sent = self.send(idx, header);
            self.note(idx, sent, &mut moved)?;
        }
        for idx in 0..self.links.len() {
            let received = self.receive(idx);
            self.note(idx, received, &mut moved)?;
            self.check_header(idx)?;
        }
        if let Gate::Summed(sum) = self.gate
            && self.sum_full_chunk(sum) == Moved::Something
        {
            moved = Moved::Something;
        }
        Ok(moved)
    }

    /// Sorts the outcome of one system call on a link.
    fn note(
        &self,
        idx: usize,
        result: io::Result<usize>,
        moved: &mut Moved,
    ) -> Result<(), CollectiveError> {
        match result {
            Ok(0) => Ok(()),
            Ok(_) => {
                *moved = Moved::Something;
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {
                *moved = Moved::Something;
                Ok(())
            }
            Err(source) => Err(self.lost(idx, source)),
        }
    }

    /// Bytes that may be sent on a link by now, header included.
    fn sendable(&self, idx: usize) -> usize {
        let flow = &self.flows[idx];
        let open: usize = match self.gate {
            Gate::Summed(_) => self.summed,
            Gate::ReceivedOn(source) => self.flows[source].final_received(),
            Gate::Open => usize::MAX,
        };
        HEADER_BYTES + flow.route.send_ready.len() + flow.route.send_gated.len().min(open)
    }

    /// Bytes that may be received on a link by now, header included.
    fn receivable(&self, idx: usize) -> usize {
        let flow = &self.flows[idx];
        let room: usize = flow.route.receive_parts.min(self.summed + self.stride);
        let parts_end: usize = HEADER_BYTES + room;
        if room < flow.route.receive_parts { parts_end } else { flow.to_receive() }
    }

    fn send(&mut self, idx: usize, header: &[u8; HEADER_BYTES]) -> io::Result<usize> {
        let sendable: usize = self.sendable(idx);
        let flow = &mut self.flows[idx];
        if flow.sent >= sendable || flow.stalled.contains(PollFlags::OUT) {
            return Ok(0);
        }
        let link: &Link = &self.links[idx];
        let ready_end: usize = HEADER_BYTES + flow.route.send_ready.len();
        let result = if flow.sent < HEADER_BYTES {
            let parts =
                [&header[flow.sent..], piece(self.buffer, &flow.route.send_ready, 0, usize::MAX)];
            link.write(&parts.map(IoSlice::new))
        } else if flow.sent < ready_end {
            let from = flow.sent - HEADER_BYTES;
            let ready = piece(self.buffer, &flow.route.send_ready, from, usize::MAX);
            link.write(&[IoSlice::new(ready)])
        } else {
            let (from, to) = (flow.sent - ready_end, sendable - ready_end);
            link.write(&[IoSlice::new(piece(self.buffer, &flow.route.send_gated, from, to))])
        };
        let n: usize = moved_bytes(result, ErrorKind::WriteZero)?;
        flow.stalled.set(PollFlags::OUT, n == 0 && link.rings.is_none());
        flow.sent += n;
        Ok(n)
    }

    fn receive(&mut self, idx: usize) -> io::Result<usize> {
        let receivable: usize = self.receivable(idx);
        let flow = &mut self.flows[idx];
        if flow.received >= receivable || flow.stalled.contains(PollFlags::IN) {
            return Ok(0);
        }
        let parts_end: usize = HEADER_BYTES + flow.route.receive_parts;
        let target: &mut [u8] = if flow.received < HEADER_BYTES {
            &mut flow.header[flow.received..]
        } else if flow.received < parts_end {
            let from = flow.received - HEADER_BYTES - self.summed;
            let to = receivable.min(parts_end) - HEADER_BYTES - self.summed;
            &mut self.slots[idx * self.stride..][from..to]
        } else {
            let start = flow.route.receive_final.start + (flow.received - parts_end);
            let end = flow.route.receive_final.end.min(start + CHUNK_BYTES);
            &mut self.buffer[start..end]
        };
        let link: &Link = &self.links[idx];
        let n: usize = moved_bytes(link.read(target), ErrorKind::UnexpectedEof)?;
        flow.stalled.set(PollFlags::IN, n == 0 && link.rings.is_none());
        flow.received += n;
        Ok(n)
    }

    /// Compares a header that is complete; cheap enough to do after every read.
    fn check_header(&self, idx: usize) -> Result<(), CollectiveError> {
        let flow = &self.flows[idx];
        if flow.received < HEADER_BYTES {
            return Ok(());
        }
        let Some(theirs) = decode_header(&flow.header) else {
            let source = io::Error::new(ErrorKind::InvalidData, "no operation header");
            return Err(self.lost(idx, source));
        };
        if theirs == self.ours {
            return Ok(());
        }
        Err(CollectiveError::Mismatch { rank: self.links[idx].rank, ours: self.ours, theirs })
    }

    fn sum_full_chunk(&mut self, sum: ReduceFn) -> Moved {
        let end: usize = self.segment.len().min(self.summed + self.stride);
        let is_full = |flow: &Flow| flow.parts_received() == end;
        if self.summed == end || !self.flows.iter().all(is_full) {
            return Moved::Nothing;
        }
        let own = self.segment.start + self.summed..self.segment.start + end;
        let slots = &mut self.slots[..self.links.len() * self.stride];
        sum(&mut self.buffer[own], slots, self.stride, self.rank);
        self.summed = end;
        Moved::Something
    }

    /// Sleeps until a link that has something to do can do it.
    ///
    /// A link that waits for other links is watched for its end only: bytes still owed to it prove
    /// that the peer cannot have completed. A link that is done is left out, since a peer that
    /// completed the operation may close its end.
    fn wait(
        &mut self,
        fds: &mut Vec<PollFd<'a>>,
        timeout: Duration,
    ) -> Result<(), CollectiveError> {
        fds.clear();
        let links: &'a [Link] = self.links;
        let watches_all: bool = self.outlasts_links && self.departed.is_none();
        let undone: Vec<usize> =
            (0..links.len()).filter(|idx| watches_all || !self.flows[*idx].is_done()).collect();
        for &idx in &undone {
            let interest: PollFlags = self.interest(idx);
            let mut events = PollFlags::RDHUP;
            if !interest.is_empty() {
                match links[idx].prepare_sleep(interest) {
                    Ok(Some(wanted)) => events = wanted,
                    Ok(None) => return Ok(()),
                    Err(source) => return Err(self.lost(idx, source)),
                }
            }
            fds.push(PollFd::new(&links[idx].stream, events));
        }
        sleep_on(fds, timeout)?;
        for (idx, fd) in undone.into_iter().zip(fds.iter()) {
            if fd.revents().is_empty() {
                continue;
            }
            if !self.interest(idx).is_empty() {
                links[idx].woken();
                self.flows[idx].stalled = PollFlags::empty();
                continue;
            }
            if !self.flows[idx].is_done() {
                return Err(self.lost(idx, ErrorKind::UnexpectedEof.into()));
            }
            self.departed.get_or_insert((idx, Instant::now()));
        }
        Ok(())
    }

    /// Notices, without sleeping, which sockets can move something again.
    fn look(&mut self, fds: &mut Vec<PollFd<'a>>) -> Result<(), CollectiveError> {
        fds.clear();
        let links: &'a [Link] = self.links;
        let wanted = |idx: &usize| self.flows[*idx].stalled.intersects(self.interest(*idx));
        let stalled: Vec<usize> = (0..links.len()).filter(wanted).collect();
        if stalled.is_empty() {
            return Ok(());
        }
        fds.extend(stalled.iter().map(|&idx| PollFd::new(&links[idx].stream, self.interest(idx))));
        sleep_on(fds, Duration::ZERO)?;
        for (idx, _) in stalled.into_iter().zip(&*fds).filter(|(_, fd)| !fd.revents().is_empty()) {
            self.flows[idx].stalled = PollFlags::empty();
        }
        Ok(())
    }

    /// What a link could do by now if its socket let it.
    fn interest(&self, idx: usize) -> PollFlags {
        let flow = &self.flows[idx];
        let mut events = PollFlags::empty();
        events.set(PollFlags::OUT, flow.sent < self.sendable(idx));
        events.set(PollFlags::IN, flow.received < self.receivable(idx));
        events
    }

    /// Ranks that did not enter the operation; if all did, those whose bytes are missing.
    fn waiting_for(&self) -> Vec<usize> {
        let ranks_where = |is_behind: fn(&Flow) -> bool| -> Vec<usize> {
            let pairs = self.links.iter().zip(self.flows.iter());
            pairs.filter(|(_, flow)| is_behind(flow)).map(|(link, _)| link.rank).collect()
        };
        let stages: [fn(&Flow) -> bool; 3] = [
            |flow| flow.received < HEADER_BYTES,
            |flow| flow.parts_received() < flow.route.receive_parts,
            |flow| !flow.is_done(),
        ];
        stages.into_iter().map(ranks_where).find(|ranks| !ranks.is_empty()).unwrap_or_default()
    }

    fn lost(&self, idx: usize, source: io::Error) -> CollectiveError {
        let Link { rank, addr, .. } = self.links[idx];
        let op_seq = self.ours.op_seq;
        CollectiveError::PeerLost { rank, addr, op_seq, source: Arc::new(source) }
    }
}

/// Waits for events on `fds`; an early return without any is harmless to the callers.
pub(crate) fn sleep_on(fds: &mut [PollFd<'_>], timeout: Duration) -> Result<(), CollectiveError> {
    let timeout = Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    match poll(fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => {
            let source = Arc::new(io::Error::from(error));
            Err(CollectiveError::Local { action: "poll the group's sockets", source })
        }
    }
}

/// The bytes `from..to` of a part of the buffer, `to` cut to its end.
fn piece<'b>(buffer: &'b [u8], part: &Range<usize>, from: usize, to: usize) -> &'b [u8] {
    &buffer[part.start + from..part.start + to.min(part.len())]
}

/// Turns "would block" into zero bytes, and zero bytes into the error `at_zero`.
fn moved_bytes(result: io::Result<usize>, at_zero: ErrorKind) -> io::Result<usize> {
    match result {
        Ok(0) => Err(at_zero.into()),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        result => result,
    }
}

fn encode_header(op: &OpDescription) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[..4].copy_from_slice(&HEADER_MAGIC);
    out[4] = match op.kind {
        OpKind::AllReduceI64 => 1,
        OpKind::AllReduceF32 => 2,
        OpKind::Broadcast => 3,
        OpKind::Barrier => 4,
        OpKind::AllReduceI32 => 5,
        OpKind::AllReduceI64There => 6,
    };
    out[6..8].copy_from_slice(&op.root.to_le_bytes());
    out[8..16].copy_from_slice(&op.op_seq.to_le_bytes());
    out[16..].copy_from_slice(&op.bytes.to_le_bytes());
    out
}

fn decode_header(bytes: &[u8; HEADER_BYTES]) -> Option<OpDescription> {
    if bytes[..4] != HEADER_MAGIC {
        return None;
    }
    let kind = match bytes[4] {
        1 => OpKind::AllReduceI64,
        2 => OpKind::AllReduceF32,
        3 => OpKind::Broadcast,
        4 => OpKind::Barrier,
        5 => OpKind::AllReduceI32,
        6 => OpKind::AllReduceI64There,
        _ => return None,
    };
    let u64_at = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    };
    let root = u16::from_le_bytes([bytes[6], bytes[7]]);
    Some(OpDescription { op_seq: u64_at(8), kind, root, bytes: u64_at(16) })
}

#[cfg(test)]
mod tests;
