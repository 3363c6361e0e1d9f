//! Freeing a communicator: at any time, from any thread, under a deadline.

use std::ffi::c_void;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use crate::api::{Api, RawComm, RawResult};
use crate::library::{IN_PROGRESS, Library, SUCCESS};
use crate::{NcclError, Progress};

/// How long an abort waits for the owner's call in progress to return before it goes ahead.
///
/// Calls of a non-blocking communicator return within microseconds; one that does not is stuck, and
/// an abort is what frees it. Until then the owner may be about to enter its call, which must not
/// find the communicator freed: half a second is far beyond any delay of a running thread.
const COURTESY: Duration = Duration::from_millis(500);
/// How often a lock that is held is tried again.
const RETRY: Duration = Duration::from_millis(1);

/// What owner and aborters share.
pub(crate) struct Shared {
    pub library: Library,
    /// The communicator, locked while the owner is inside a call; none once it is being freed.
    raw: Mutex<Option<Owned>>,
    /// The same, for an abort while the owner is stuck in a call.
    pointer: AtomicPtr<c_void>,
    /// Whether freeing has begun: from then on the owner must not touch the communicator.
    ending: AtomicBool,
    ended: Mutex<Option<End>>,
    changed: Condvar,
}

/// A live `ncclComm_t`.
struct Owned(RawComm);

// SAFETY: NCCL lets any thread use a communicator, one at a time; the lock around this sees to it.
unsafe impl Send for Owned {}

/// How freeing went.
type End = Result<(), NcclError>;

/// Which call frees the communicator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Free {
    Abort,
    Destroy,
}

impl Shared {
    pub fn new(library: Library, raw: RawComm) -> Self {
        Self {
            library,
            raw: Mutex::new(Some(Owned(raw))),
            pointer: AtomicPtr::new(raw),
            ending: AtomicBool::new(false),
            ended: Mutex::new(None),
            changed: Condvar::new(),
        }
    }

    /// Makes calls with the communicator locked.
    ///
    /// `call` gets the communicator, and nothing may touch it after an abort has begun meanwhile:
    /// its result is then [`NcclError::Aborted`].
    pub fn call(
        &self,
        name: &'static str,
        call: impl FnOnce(&Api, RawComm) -> RawResult,
    ) -> Result<Progress, NcclError> {
        let held = self.raw.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Owned(raw)) = held.as_ref().filter(|_| !self.is_ending()) else {
            return Err(NcclError::Aborted);
        };
        let result: RawResult = call(self.library.api(), *raw);
        if self.is_ending() {
            return Err(NcclError::Aborted);
        }
        match result {
            SUCCESS => Ok(Progress::Done),
            IN_PROGRESS => Ok(Progress::Going),
            error => Err(self.library.error(name, error, *raw)),
        }
    }

    /// Tells whether freeing has begun.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// Starts to free the communicator on a thread of its own, unless that has begun already.
    pub fn begin(self: &Arc<Self>, how: Free) {
        if self.ending.swap(true, Ordering::AcqRel) {
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
    }

    fn ended(&self) -> MutexGuard<'_, Option<End>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free(&self, how: Free) -> End {
        let raw: RawComm = self.take();
        let api: &Api = self.library.api();
        let (name, result) = match how {
            // SAFETY: the communicator is live: only this thread frees it, and only once. An abort
            // may meet a call of the owner that is stuck; that is what NCCL made it for.
            Free::Abort => ("ncclCommAbort", unsafe { (api.comm_abort)(raw) }),
            // SAFETY: as above; the owner is not inside a call, because it asked for this.
            Free::Destroy => ("ncclCommDestroy", unsafe { (api.comm_destroy)(raw) }),
        };
        match result {
            SUCCESS | IN_PROGRESS => Ok(()),
            error => Err(self.library.error(name, error, std::ptr::null_mut())),
        }
    }

    /// Takes the communicator once the owner is out of its call, or is stuck in it.
    fn take(&self) -> RawComm {
        let deadline: Instant = Instant::now() + COURTESY;
        loop {
            let mut held = match self.raw.try_lock() {
                Ok(held) => held,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    thread::sleep(RETRY);
                    continue;
                }
                Err(TryLockError::WouldBlock) => return self.pointer.load(Ordering::Acquire),
            };
            if let Some(Owned(raw)) = held.take() {
                return raw;
            }
        }
    }

    /// Waits until the communicator is freed.
    pub fn wait(&self, limit: Duration) -> End {
        let unfinished = |ended: &mut Option<End>| ended.is_none();
        let (ended, _) = self
            .changed
            .wait_timeout_while(self.ended(), limit, unfinished)
            .unwrap_or_else(PoisonError::into_inner);
        ended.clone().unwrap_or(Err(NcclError::AbortHangs { waited: limit }))
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
