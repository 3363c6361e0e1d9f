//! Slots computed ahead of their use, delivered in order.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use lacuna_recipe::step::SlotBatch;
use lacuna_store::Stop;
use lacuna_types::{Slot, Step};

use super::ahead::{self, Ahead};
use super::{Inner, LoadError};

/// How long a thread sleeps at most before it looks whether it is still wanted.
pub(super) const IDLE_WAIT: Duration = Duration::from_millis(500);

/// How long dropping a stream waits for its threads; one that hangs in a read is left behind.
const JOIN_WAIT: Duration = Duration::from_secs(1);

/// Delivers slots in order; loading happens in threads of its own, a bounded number of slots ahead.
///
/// Dropping it stops and joins the threads.
#[derive(Debug)]
pub struct SlotStream {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// When the slot before was delivered.
    last: Option<Instant>,
    /// Since when the slot that comes next is waited for, over calls that gave up.
    asked: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub inner: Arc<Inner>,
    first_step: Step,
    slots: Vec<u32>,
    /// Slots that may be loaded and not delivered.
    ahead_slots: u64,
    /// Slots of the whole stream.
    pub total: u64,
    state: Mutex<State>,
    /// A thread may find work.
    room: Condvar,
    /// The consumer may find a slot, or a thread has ended.
    ready: Condvar,
    stop: Stop,
    /// What is fetched from a store meanwhile.
    ahead: Option<Ahead>,
}

/// Slots are numbered from 0 in delivery order.
#[derive(Debug)]
struct State {
    /// Slots that threads have taken on.
    claimed: u64,
    /// Slots delivered.
    delivered: u64,
    /// Loaded and not delivered; at most `ahead_slots`.
    loaded: BTreeMap<u64, Result<SlotBatch, LoadError>>,
    /// Threads that run.
    live: usize,
    /// Those of them that load slots.
    loading: usize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how many slots were delivered.
    pub fn delivered(&self) -> u64 {
        self.lock().delivered
    }

    /// Returns a slot by its number.
    pub fn slot(&self, number: u64) -> Slot {
        let per_step = self.slots.len() as u64;
        Slot {
            step: Step(self.first_step.0 + number / per_step),
            index: self.slots[(number % per_step) as usize],
        }
    }

    /// Waits for a slot to load; `None` when there will be none.
    fn claim(&self) -> Option<u64> {
        let mut state = self.lock();
        loop {
            if self.stop.is_raised() || state.claimed == self.total {
                return None;
            }
            if state.claimed < state.delivered + self.ahead_slots {
                state.claimed += 1;
                return Some(state.claimed - 1);
            }
            let waited = self.room.wait_timeout(state, IDLE_WAIT);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn work(&self) {
        let _alive = Alive { shared: self, loads: true };
        while let Some(number) = self.claim() {
            let result = self.inner.load_pooled(self.slot(number), &self.stop);
            self.lock().loaded.insert(number, result);
            self.ready.notify_all();
        }
    }

    fn fetch(&self) {
        let _alive = Alive { shared: self, loads: false };
        if let Some(ahead) = &self.ahead {
            ahead.work(self, &self.stop);
        }
    }
}

/// Counts a thread as live until it ends, by a panic too.
struct Alive<'a> {
    shared: &'a Shared,
    loads: bool,
}

impl Drop for Alive<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.live -= 1;
        state.loading -= usize::from(self.loads);
        drop(state);
        self.shared.ready.notify_all();
    }
}

impl SlotStream {
    pub(super) fn start(
        inner: Arc<Inner>,
        first_step: Step,
        end_step: Step,
        slots: Vec<u32>,
    ) -> Result<Self, LoadError> {
        let n_slots = inner.config.geometry.n_slots();
        assert!(slots.iter().all(|&slot| slot < n_slots), "slots {slots:?} are below {n_slots}");
        let total = end_step.0.saturating_sub(first_step.0) * slots.len() as u64;
        let n_threads = (inner.config.threads as u64).min(total) as usize;
        let ahead = Ahead::new(&inner, first_step.0);
        let n_ahead = if ahead.is_some() { ahead::THREADS } else { 0 };
        let ahead_slots = inner.ahead_slots(slots.len());
        inner.held_most.fetch_max(ahead_slots, Ordering::Relaxed);
        let shared = Arc::new(Shared {
            inner,
            first_step,
            slots,
            ahead_slots: ahead_slots as u64,
            total,
            state: Mutex::new(State {
                claimed: 0,
                delivered: 0,
                loaded: BTreeMap::new(),
                live: n_threads + n_ahead,
                loading: n_threads,
            }),
            room: Condvar::new(),
            ready: Condvar::new(),
            stop: Stop::default(),
            ahead,
        });
        let n_all = n_threads + n_ahead;
        let mut stream =
            SlotStream { shared, threads: Vec::with_capacity(n_all), last: None, asked: None };
        for i in 0..n_all {
            let shared = stream.shared.clone();
            let (name, work): (&str, fn(&Shared)) =
                if i < n_threads { ("load", Shared::work) } else { ("fetch", Shared::fetch) };
            let named = Builder::new().name(format!("lacuna-{name}-{i}"));
            match named.spawn(move || work(&shared)) {
                Ok(thread) => stream.threads.push(thread),
                Err(source) => {
                    // The threads that did start are joined by dropping the stream.
                    stream.shared.lock().live -= n_all - i;
                    return Err(LoadError::Spawn(source));
                }
            }
        }
        Ok(stream)
    }

    /// Returns the next slot, waiting for it up to `deadline`.
    ///
    /// # Errors
    /// After [`LoadError::Deadline`] the same slot can be asked for again; any other error takes
    /// the slot's place, and the next call goes on behind it.
    pub fn next(&mut self, deadline: Duration) -> Result<SlotBatch, LoadError> {
        let called = Instant::now();
        let start = *self.asked.get_or_insert(called);
        let shared = &self.shared;
        let mut state = shared.lock();
        loop {
            let number = state.delivered;
            if number == shared.total {
                return Err(LoadError::Ended);
            }
            if let Some(result) = state.loaded.remove(&number) {
                state.delivered += 1;
                self.asked = None;
                let ready = state.loaded.len();
                drop(state);
                shared.room.notify_one();
                let step = shared.slot(number).step.0;
                shared.inner.meters.delivered(step, start.elapsed(), ready);
                if let Some(planes) = &shared.inner.config.planes {
                    let passed = self.last.map_or(Duration::ZERO, |last| last.elapsed());
                    planes.waited(start.elapsed().min(passed), passed);
                    self.last = Some(Instant::now());
                }
                if let Some(ahead) = &shared.ahead {
                    ahead.advance(step, number + 1);
                }
                return result;
            }
            if state.loading == 0 {
                return Err(LoadError::Died);
            }
            let left = deadline.saturating_sub(called.elapsed());
            if left.is_zero() {
                let slot = shared.slot(number);
                let waited = start.elapsed();
                return Err(LoadError::Deadline { slot, waited });
            }
            let waited = shared.ready.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Returns how many slots are loaded and wait to be taken.
    pub fn n_ready(&self) -> usize {
        self.shared.lock().loaded.len()
    }
}

impl Drop for SlotStream {
    fn drop(&mut self) {
        self.shared.stop.raise();
        self.shared.room.notify_all();
        self.shared.ahead.iter().for_each(Ahead::wake);
        let start = Instant::now();
        let mut state = self.shared.lock();
        while state.live > 0 {
            let left = JOIN_WAIT.saturating_sub(start.elapsed());
            if left.is_zero() {
                tracing::warn!(n_threads = state.live, "loader threads left behind");
                return;
            }
            let waited = self.shared.ready.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        for thread in self.threads.drain(..) {
            // A thread that panicked has printed its message; the consumer was told `Died`.
            let _ = thread.join();
        }
    }
}
