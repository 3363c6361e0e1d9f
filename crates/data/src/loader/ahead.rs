//! Chunks fetched before their samples are wanted.
//!
//! Fetching goes slot by slot in the order of delivery, as far ahead as the cache has room: what is
//! fetched and not yet used may take three quarters of it, so that nothing goes that is still to be
//! read.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use lacuna_store::Stop;
use lacuna_types::SampleId;

use super::Inner;
use super::stream::{IDLE_WAIT, Shared};
use crate::chunks::{ChunkCache, Schedule};

/// Threads that fetch: they wait for the network and need no core.
pub(super) const THREADS: usize = 8;

/// Slots looked ahead at most: enough for any latency, and looking is not free.
const AHEAD_MAX: u64 = 4096;

/// What fetching has reached.
#[derive(Debug)]
pub(super) struct Ahead {
    chunks: Arc<ChunkCache>,
    schedule: Arc<Schedule>,
    state: Mutex<State>,
    room: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Slots whose chunks are all claimed.
    slot: u64,
    /// Chunks of the slot behind them, not claimed yet.
    wanted: Vec<usize>,
    /// Claimed chunks, and the last slot known to need each.
    claimed: BTreeMap<usize, u64>,
    /// Bytes of those.
    bytes: u64,
}

impl Ahead {
    /// Prepares for a stream that begins at `first_step`; nothing for data that has no cache.
    pub fn new(inner: &Inner, first_step: u64) -> Option<Self> {
        let chunks = inner.config.dataset.chunks()?.clone();
        let schedule = Arc::new(Schedule::new(inner.config.order.clone()));
        schedule.set_now(first_step);
        chunks.set_schedule(schedule.clone());
        Some(Ahead { chunks, schedule, state: Mutex::default(), room: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note that the slots before `delivered`, the first of `step`, are used up.
    pub fn advance(&self, step: u64, delivered: u64) {
        self.schedule.set_now(step);
        let mut state = self.lock();
        let State { claimed, bytes, .. } = &mut *state;
        claimed.retain(|&chunk, last| {
            let stays = *last >= delivered;
            if !stays {
                *bytes -= self.chunks.chunk_bytes(chunk);
            }
            stays
        });
        self.room.notify_all();
    }

    /// Wakes the threads, which look whether they should end.
    pub fn wake(&self) {
        self.room.notify_all();
    }

    /// Fetches until the stream ends.
    pub fn work(&self, shared: &Shared, stop: &Stop) {
        while let Some(chunk) = self.claim(shared, stop) {
            if let Err(error) = self.chunks.prefetch(chunk, stop)
                && !stop.is_raised()
            {
                // Whoever needs a sample of it tries again, and tells if that fails too.
                tracing::debug!(chunk, %error, "fetching a chunk ahead failed");
            }
        }
    }

    /// Waits for a chunk to fetch; `None` when there will be none.
    fn claim(&self, shared: &Shared, stop: &Stop) -> Option<usize> {
        let budget = self.chunks.bytes_max() / 4 * 3;
        let mut state = self.lock();
        loop {
            if stop.is_raised() || state.slot >= shared.total && state.wanted.is_empty() {
                return None;
            }
            if let Some(&chunk) = state.wanted.last() {
                let bytes = self.chunks.chunk_bytes(chunk);
                if state.bytes + bytes <= budget || state.claimed.is_empty() {
                    state.wanted.pop();
                    let last = state.slot - 1;
                    state.bytes += bytes;
                    state.claimed.insert(chunk, last);
                    return Some(chunk);
                }
            } else if state.slot < shared.delivered() + AHEAD_MAX {
                self.look(&mut state, shared);
                continue;
            }
            let waited = self.room.wait_timeout(state, IDLE_WAIT);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Finds the chunks of the next slot.
    fn look(&self, state: &mut State, shared: &Shared) {
        let number = state.slot;
        state.slot += 1;
        let config = &shared.inner.config;
        for id in shared.inner.samples(shared.slot(number)) {
            if config.planes.as_ref().is_some_and(|planes| planes.holds(id)) {
                continue;
            }
            let chunk = self.chunks.chunk_of(id);
            match state.claimed.get_mut(&chunk) {
                Some(last) => *last = number,
                None if state.wanted.contains(&chunk) => {}
                None => state.wanted.push(chunk),
            }
        }
    }
}

impl Inner {
    /// Returns the samples of a slot.
    pub(super) fn samples(&self, slot: lacuna_types::Slot) -> Vec<SampleId> {
        let geometry = &self.config.geometry;
        let (epoch, _) = geometry.place(slot.step);
        self.order(epoch).samples(geometry.positions(slot))
    }
}
