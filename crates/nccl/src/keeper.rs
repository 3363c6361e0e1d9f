//! Deadlines of calls: the thread beside the one that owns a communicator.
//!
//! Nothing can end a call of NCCL before there is a communicator, so the calls that make one run on
//! threads of their own, and the caller gives them up at its deadline. The thread that made the
//! communicator then keeps the time of the owner's calls: where one has not returned in time, it
//! starts the abort, which frees the call.
//!
//! It lives as long as the communicator. Up to NCCL 2.26, what a call starts in the background
//! works in memory of the thread that made the call.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SendError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::abort::{Free, Shared};
use crate::{Library, NcclError};

/// How often a wait for a call asks whether it shall stop.
const TICK: Duration = Duration::from_millis(20);
/// How much longer than the wait that it belongs to a call may take.
const GRACE: Duration = Duration::from_millis(100);
/// How often a communicator that nobody waited for is looked at until it is freed.
const LET_GO_EVERY: Duration = Duration::from_secs(5);

/// Rings where a call takes too long.
#[derive(Default)]
pub(crate) struct Clock {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// When the communicator is aborted, by number of the value that says so: the earliest counts.
    limits: Vec<(u64, Instant)>,
    /// Number of the newest of them.
    last: u64,
    /// Until when the thread sleeps; none where it waits to be woken.
    sleeps_until: Option<Instant>,
    has_rung: bool,
    is_over: bool,
}

/// Limits the owner's calls as long as this value lives; see
/// [`Communicator::until`](crate::Communicator::until).
#[must_use]
pub struct Armed {
    shared: Arc<Shared>,
    /// 0 where it limits nothing.
    number: u64,
}

impl Clock {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rings at `end`; returns the number to take that back with. Deadlines are alike, so the
    /// thread mostly wakes early enough by itself.
    fn add(&self, state: &mut State, end: Instant) -> u64 {
        state.last += 1;
        state.limits.push((state.last, end));
        if state.sleeps_until.is_none_or(|until| until > end) {
            self.changed.notify_one();
        }
        state.last
    }

    /// Tells whether a call took too long.
    pub fn has_rung(&self) -> bool {
        self.state().has_rung
    }

    /// Lets the thread go.
    pub fn end(&self) {
        self.state().is_over = true;
        self.changed.notify_one();
    }
}

impl Shared {
    /// Limits calls up to `end`.
    pub(crate) fn until(self: &Arc<Self>, end: Instant) -> Armed {
        let number: u64 = self.clock.add(&mut self.clock.state(), end);
        Armed { shared: Arc::clone(self), number }
    }

    /// Limits one call of a wait that ends at `deadline`: a little later, since the wait itself
    /// notices when it is over.
    pub(crate) fn until_after(self: &Arc<Self>, deadline: Instant) -> Armed {
        self.until(deadline.max(Instant::now()) + GRACE)
    }

    /// Limits one call, unless something does already.
    pub(crate) fn arm(self: &Arc<Self>) -> Armed {
        let mut state = self.clock.state();
        let end = Instant::now().checked_add(self.call_limit).filter(|_| state.limits.is_empty());
        let number: u64 = end.map_or(0, |end| self.clock.add(&mut state, end));
        Armed { shared: Arc::clone(self), number }
    }

    /// Aborts the communicator where a call takes too long, until it is freed.
    fn keep_time(self: &Arc<Self>) {
        let mut state = self.clock.state();
        while !state.is_over {
            let earliest = state.limits.iter().map(|(_, end)| *end).min();
            let rings_at = earliest.filter(|_| !state.has_rung);
            let left = rings_at.map(|at| at.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                state.has_rung = true;
                drop(state);
                self.begin(Free::Abort);
                state = self.clock.state();
                continue;
            }
            state.sleeps_until = rings_at;
            let changed = &self.clock.changed;
            state = match left {
                Some(left) => {
                    let woken = changed.wait_timeout(state, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                None => changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        self.shared.clock.state().limits.retain(|(number, _)| *number != self.number);
    }
}

/// Takes the answer of a call that was made on a thread of its own.
pub(crate) struct Answer<T> {
    channel: SyncSender<T>,
}

impl<T> Answer<T> {
    /// Gives the answer; gets it back where nobody waits for it any more.
    pub fn give(self, answer: T) -> Option<T> {
        self.channel.send(answer).err().map(|SendError(answer)| answer)
    }
}

/// Gives a communicator, with what was made beside it, to whoever waits for it, and keeps its time.
///
/// Where nobody waits any more it is aborted. If that does not return neither does this: the
/// thread's memory may still be in use, and the call counts as stuck.
pub(crate) fn hand_over<T>(
    answer: Answer<T>,
    started: T,
    shared_of: impl Fn(&T) -> Option<Arc<Shared>>,
) {
    let shared = shared_of(&started);
    let left = answer.give(started);
    let Some(shared) = shared else { return };
    if left.is_none() {
        return shared.keep_time();
    }
    shared.begin(Free::Abort);
    while matches!(shared.wait(LET_GO_EVERY), Err(NcclError::AbortHangs { .. })) {}
    // What was made beside it is freed behind it.
    drop(left);
}

/// Makes a call of NCCL on a thread of its own, which `work` is all of, and waits for the answer.
///
/// Where the wait ends first, the thread learns that nobody takes its answer. Calls that were given
/// up for a long time are not joined by others, which would block as well.
///
/// # Errors
/// [`NcclError::Timeout`] where no time is left, [`NcclError::Blocked`], [`NcclError::Stopped`],
/// [`NcclError::Thread`].
pub(crate) fn ask<T: Send + 'static>(
    call: &'static str,
    library: &Library,
    deadline: Instant,
    stop: impl Fn() -> bool,
    work: impl FnOnce(Answer<T>) + Send + 'static,
) -> Result<T, NcclError> {
    if stop() {
        return Err(NcclError::Stopped { what: call });
    }
    let asked = Instant::now();
    let left = || deadline.saturating_duration_since(Instant::now());
    if left().is_zero() {
        return Err(NcclError::Timeout { what: call, waited: Duration::ZERO });
    }
    if let Some(waited) = library.stuck_for().filter(|waited| *waited >= Library::STUCK_FOR_GOOD) {
        return Err(NcclError::Blocked { call, waited });
    }
    // Without room for an answer: it is either taken or stays with the thread.
    let (channel, answers) = sync_channel(0);
    static LAST: AtomicU64 = AtomicU64::new(0);
    let number: u64 = LAST.fetch_add(1, Ordering::Relaxed);
    let returned = Returned { library: library.clone(), number };
    let spawned = thread::Builder::new().name("nccl-keeper".to_string()).spawn(move || {
        let _returned = returned;
        work(Answer { channel });
    });
    spawned.map_err(|err| NcclError::Thread { reason: err.to_string() })?;
    let fault = loop {
        match answers.recv_timeout(left().min(TICK)) {
            Ok(answer) => return Ok(answer),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(NcclError::Thread { reason: format!("it panicked around `{call}`") });
            }
        }
        if stop() {
            break NcclError::Stopped { what: call };
        }
        if left().is_zero() {
            break NcclError::Blocked { call, waited: asked.elapsed() };
        }
    };
    // Before the thread can learn that nobody waits: it is what takes the call out again.
    library.stuck().push((number, asked));
    drop(answers);
    Err(fault)
}

/// Takes a call out of those that have not returned, however its thread ends.
struct Returned {
    library: Library,
    number: u64,
}

impl Drop for Returned {
    fn drop(&mut self) {
        self.library.stuck().retain(|(number, _)| *number != self.number);
    }
}
