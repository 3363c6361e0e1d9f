//! Chunks fetched before their samples are wanted.
//!
//! Fetching goes slot by slot in the order of delivery, as far ahead as the cache has room: chunks
//! in use may take three quarters of it, and those not in use yet an eighth, shared by the workers
//! of the machine. The rest is for what the next epoch needs again.

use std::collections::{BTreeMap, BTreeSet};
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

/// Chunks that may be fetched early however small the cache is.
const EARLY_MIN: usize = 2;

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
    /// Slots that were looked at.
    slot: u64,
    /// Chunks that they want and nobody has claimed, with the first slot known to need each.
    wanted: BTreeSet<(u64, usize)>,
    /// Claimed chunks, and the first and the last slot known to need each.
    claimed: BTreeMap<usize, (u64, u64)>,
    /// Bytes of those.
    bytes: u64,
    /// Slots delivered.
    delivered: u64,
}

impl Ahead {
    /// Prepares for a stream that begins at `first_step`; nothing for data that has no cache, or
    /// whose chunks are not worth it.
    pub fn new(inner: &Inner, first_step: u64) -> Option<Self> {
        let chunks = inner.config.dataset.chunks()?.clone();
        let schedule = Arc::new(Schedule::new(inner.config.order.clone()));
        schedule.set_now(first_step);
        chunks.set_schedule(schedule.clone());
        let state = Mutex::default();
        chunks.fetches_ahead().then(|| Ahead { chunks, schedule, state, room: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note that the slots before `delivered`, the first of `step`, are used up.
    pub fn advance(&self, step: u64, delivered: u64) {
        self.schedule.set_now(step);
        let mut state = self.lock();
        state.delivered = delivered;
        let State { claimed, bytes, .. } = &mut *state;
        claimed.retain(|&chunk, (_, last)| {
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
        while let Some((slot, chunk)) = self.claim(shared, stop) {
            match self.chunks.prefetch(chunk, stop) {
                Ok(true) => continue,
                Ok(false) => {}
                // Whoever needs a sample of it tries again, and tells if that fails too.
                Err(error) => tracing::debug!(chunk, %error, "fetching a chunk ahead failed"),
            }
            self.give_back(slot, chunk, stop);
        }
    }

    /// Puts a chunk back that could not be fetched, and lets some time pass.
    fn give_back(&self, slot: u64, chunk: usize, stop: &Stop) {
        let mut state = self.lock();
        if state.claimed.remove(&chunk).is_some() {
            state.bytes -= self.chunks.chunk_bytes(chunk);
        }
        state.wanted.insert((slot, chunk));
        if !stop.is_raised() {
            drop(self.room.wait_timeout(state, IDLE_WAIT));
        }
    }

    /// Waits for a chunk to fetch, and the slot that needs it; `None` when there will be none.
    fn claim(&self, shared: &Shared, stop: &Stop) -> Option<(u64, usize)> {
        let mut state = self.lock();
        loop {
            if stop.is_raised() || state.slot >= shared.total && state.wanted.is_empty() {
                return None;
            }
            if let Some(&(slot, chunk)) = state.wanted.first() {
                let bytes = self.chunks.chunk_bytes(chunk);
                if self.has_room(&state, bytes) {
                    state.wanted.pop_first();
                    state.bytes += bytes;
                    state.claimed.insert(chunk, (slot, slot));
                    return Some((slot, chunk));
                }
            } else if state.slot < shared.delivered() + AHEAD_MAX {
                let number = state.slot;
                state.slot += 1;
                // Whoever takes a step's slots must not wait for this.
                drop(state);
                let chunks = self.look(number, shared);
                state = self.lock();
                state.want(number, chunks);
                continue;
            }
            let waited = self.room.wait_timeout(state, IDLE_WAIT);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Tells whether a chunk of so many bytes may be fetched now.
    fn has_room(&self, state: &State, bytes: u64) -> bool {
        let (in_all, early) = self.chunks.ahead_bytes();
        let is_early = |(_, (first, _)): &(&usize, &(u64, u64))| *first >= state.delivered;
        let early_ones = || state.claimed.iter().filter(is_early).map(|(chunk, _)| *chunk);
        let fits = early_ones().map(|chunk| self.chunks.chunk_bytes(chunk)).sum::<u64>() + bytes;
        state.claimed.is_empty()
            || state.bytes + bytes <= in_all && (fits <= early || early_ones().count() < EARLY_MIN)
    }

    /// Finds the chunks of a slot whose planes are not there.
    fn look(&self, number: u64, shared: &Shared) -> BTreeSet<usize> {
        let planes = shared.inner.config.planes.as_ref();
        let samples = shared.inner.samples(shared.slot(number)).into_iter();
        let missing = samples.filter(|id| !planes.is_some_and(|planes| planes.holds(*id)));
        missing.map(|id| self.chunks.chunk_of(id)).collect()
    }
}

impl State {
    /// Adds the chunks of a slot.
    fn want(&mut self, number: u64, chunks: BTreeSet<usize>) {
        for chunk in chunks {
            match self.claimed.get_mut(&chunk) {
                Some((_, last)) => *last = number.max(*last),
                None if self.wanted.iter().any(|(_, wanted)| *wanted == chunk) => {}
                None => {
                    self.wanted.insert((number, chunk));
                }
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
