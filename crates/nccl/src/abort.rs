//! Freeing a communicator: at any time, from any thread, under a deadline.

use std::ffi::c_void;
use std::fmt;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use crate::api::{Api, RawComm, RawResult};
use crate::keeper::{Armed, Clock};
use crate::library::{IN_PROGRESS, Library, SUCCESS};
use crate::{NcclError, Progress};

/// How long an abort waits for the owner's call in progress to return before it goes ahead.
///
/// Calls of a non-blocking communicator return within microseconds; one that does not is stuck, and
/// an abort is what frees it.
const COURTESY: Duration = Duration::from_millis(500);
/// How often a lock that is held is tried again.
const RETRY: Duration = Duration::from_millis(1);

/// What owner and aborters share.
pub(crate) struct Shared {
    pub library: Library,
    /// The communicator, locked while the owner makes calls; none once it is being freed.
    raw: Mutex<Option<Owned>>,
    /// The same, for an abort while the owner is stuck in a call.
    pointer: AtomicPtr<c_void>,
    /// Counts the owner's entries and returns: odd inside a call, [`TAKEN`] once an abort has taken
    /// the communicator from under it.
    inside: AtomicU64,
    /// 0, or how freeing began: from then on the owner must not touch the communicator.
    ending: AtomicU8,
    /// Longest time of a call of the owner.
    pub call_limit: Duration,
    pub clock: Clock,
    ended: Mutex<Option<End>>,
    changed: Condvar,
}

/// The communicator is no longer the owner's, who is between calls or inside one.
const TAKEN: u64 = u64::MAX;

/// The owner's hold on the communicator: calls that belong together.
pub(crate) struct Held<'s> {
    shared: &'s Shared,
    raw: RawComm,
    _lock: MutexGuard<'s, Option<Owned>>,
    _armed: Armed,
}

/// An abort has taken the communicator from under its owner, who was stuck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// The call was not made.
    Before,
    /// The call was made, and has returned.
    During,
}

impl Held<'_> {
    /// Makes one call, unless an abort has taken the communicator.
    pub fn make(&self, call: impl FnOnce(&Api, RawComm) -> RawResult) -> Result<RawResult, Taken> {
        let inside = &self.shared.inside;
        let step = |from: u64| {
            inside.compare_exchange(from, from + 1, Ordering::AcqRel, Ordering::Acquire)
        };
        let n: u64 = inside.load(Ordering::Acquire);
        if n == TAKEN || step(n).is_err() {
            return Err(Taken::Before);
        }
        let result: RawResult = call(self.shared.library.api(), self.raw);
        step(n + 1).map(|_| result).map_err(|_| Taken::During)
    }

    /// Turns the last call's result into what its caller gets.
    pub fn conclude(&self, name: &'static str, result: RawResult) -> Result<Progress, NcclError> {
        if self.shared.is_ending() {
            return Err(NcclError::Aborted);
        }
        match result {
            SUCCESS => Ok(Progress::Done),
            IN_PROGRESS => Ok(Progress::Going),
            error => Err(self.shared.library.error(name, error, self.raw)),
        }
    }
}

/// A live `ncclComm_t`.
struct Owned(RawComm);

// SAFETY: NCCL lets any thread use a communicator, one at a time; the lock around this sees to it.
unsafe impl Send for Owned {}

/// How freeing went.
type End = Result<(), NcclError>;

/// Which call frees the communicator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Free {
    Abort = 1,
    Destroy = 2,
}

impl Free {
    fn name(self) -> &'static str {
        match self {
            Self::Abort => "ncclCommAbort",
            Self::Destroy => "ncclCommDestroy",
        }
    }
}

impl Shared {
    pub fn new(library: Library, raw: RawComm, call_limit: Duration) -> Self {
        Self {
            library,
            raw: Mutex::new(Some(Owned(raw))),
            pointer: AtomicPtr::new(raw),
            inside: AtomicU64::new(0),
            ending: AtomicU8::new(0),
            call_limit,
            clock: Clock::default(),
            ended: Mutex::new(None),
            changed: Condvar::new(),
        }
    }

    /// Makes one call.
    ///
    /// # Errors
    /// [`NcclError::Call`]; [`NcclError::Aborted`] also where an abort began meanwhile.
    pub fn call(
        self: &Arc<Self>,
        name: &'static str,
        call: impl FnOnce(&Api, RawComm) -> RawResult,
    ) -> Result<Progress, NcclError> {
        let held = self.hold()?;
        let result = held.make(call).map_err(|_| NcclError::Aborted)?;
        held.conclude(name, result)
    }

    /// Takes hold of the communicator, for calls that together may take no longer than one.
    pub fn hold(self: &Arc<Self>) -> Result<Held<'_>, NcclError> {
        let armed: Armed = self.arm();
        let lock = self.raw.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(raw) = lock.as_ref().filter(|_| !self.is_ending()).map(|Owned(raw)| *raw) else {
            return Err(NcclError::Aborted);
        };
        Ok(Held { shared: self, raw, _lock: lock, _armed: armed })
    }

    /// Tells whether freeing has begun.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire) != 0
    }

    /// Starts to free the communicator on a thread of its own, unless that has begun already.
    pub fn begin(self: &Arc<Self>, how: Free) {
        let begun = self.ending.compare_exchange(0, how as u8, Ordering::AcqRel, Ordering::Acquire);
        if begun.is_err() {
            return;
        }
        let shared = Arc::clone(self);
        let work = move || {
            let end: End = shared.free(how);
            shared.end(end);
        };
        if let Err(err) = thread::Builder::new().name("nccl-end".to_string()).spawn(work) {
            self.end(Err(NcclError::Thread { reason: err.to_string() }));
        }
    }

    fn end(&self, end: End) {
        *self.ended() = Some(end);
        self.changed.notify_all();
        self.clock.end();
    }

    fn ended(&self) -> MutexGuard<'_, Option<End>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free(&self, how: Free) -> End {
        let raw: RawComm = self.take();
        let api: &Api = self.library.api();
        let result: RawResult = match how {
            // SAFETY: the communicator is live: only this thread frees it, and only once. An abort
            // may meet a call of the owner that is stuck; that is what NCCL made it for.
            Free::Abort => unsafe { (api.comm_abort)(raw) },
            // SAFETY: as above; the owner is not inside a call, because it asked for this.
            Free::Destroy => unsafe { (api.comm_destroy)(raw) },
        };
        match result {
            SUCCESS | IN_PROGRESS => Ok(()),
            error => Err(self.library.error(how.name(), error, std::ptr::null_mut())),
        }
    }

    /// Takes the communicator once the owner is out of its calls, or is stuck in one.
    fn take(&self) -> RawComm {
        let mut seen: (u64, Instant) = (self.inside.load(Ordering::Acquire), Instant::now());
        loop {
            let held = match self.raw.try_lock() {
                Ok(held) => Some(held),
                Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            };
            if let Some(Owned(raw)) = held.and_then(|mut held| held.take()) {
                return raw;
            }
            let n: u64 = self.inside.load(Ordering::Acquire);
            if n != seen.0 {
                seen = (n, Instant::now());
            }
            // Between two calls the owner is not stuck, and must not find it freed in the next.
            let is_stuck = n % 2 == 1 && seen.1.elapsed() >= COURTESY;
            let taken = |n| {
                self.inside.compare_exchange(n, TAKEN, Ordering::AcqRel, Ordering::Acquire).is_ok()
            };
            if is_stuck && taken(n) {
                return self.pointer.load(Ordering::Acquire);
            }
            thread::sleep(RETRY);
        }
    }

    /// Waits until the communicator is freed.
    pub fn wait(&self, limit: Duration) -> End {
        let unfinished = |ended: &mut Option<End>| ended.is_none();
        let (ended, _) = self
            .changed
            .wait_timeout_while(self.ended(), limit, unfinished)
            .unwrap_or_else(PoisonError::into_inner);
        let destroys = self.ending.load(Ordering::Acquire) == Free::Destroy as u8;
        let call = if destroys { Free::Destroy } else { Free::Abort }.name();
        ended.clone().unwrap_or(Err(NcclError::AbortHangs { call, waited: limit }))
    }
}

/// Aborts one communicator, from any thread and at any time of its life.
#[derive(Clone)]
pub struct Aborter {
    pub(crate) shared: Arc<Shared>,
}

impl Aborter {
    /// Starts the abort and returns at once. Work on the device stops, and the owner's calls fail
    /// with [`NcclError::Aborted`]. A second abort, and one after closing, changes nothing.
    pub fn begin(&self) {
        self.shared.begin(Free::Abort);
    }

    /// Starts the abort, if nobody did, and waits until it is done: the communicator holds neither
    /// buffers nor streams any more. NCCL 2.28.9 takes half a second.
    ///
    /// # Errors
    /// [`NcclError::AbortHangs`] after `limit`; [`NcclError::Call`] where NCCL failed to clean up.
    pub fn abort(&self, limit: Duration) -> Result<(), NcclError> {
        self.begin();
        self.shared.wait(limit)
    }

    /// Tells whether the communicator is aborted or closed, or is being so.
    pub fn is_aborted(&self) -> bool {
        self.shared.is_ending()
    }
}

impl fmt::Debug for Aborter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aborter").field("is_aborted", &self.is_aborted()).finish_non_exhaustive()
    }
}
