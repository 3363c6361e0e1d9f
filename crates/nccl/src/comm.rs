//! Communicators: made, asked, waited for, closed.

use std::cell::Cell;
use std::ffi::c_int;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::abort::{Free, Shared};
use crate::api::{Api, RawComm, RawConfig, RawResult};
use crate::library::{IN_PROGRESS, SUCCESS};
use crate::{Aborter, Library, NcclError, UniqueId};

/// First pause between two looks at a communicator; doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_micros(20);
/// Longest pause: short beside forming a group, long enough to cost no core.
const PAUSE_MAX: Duration = Duration::from_millis(1);

/// What a call that did not fail says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing is left to start. Operations may still be running on their streams.
    Done,
    /// NCCL works on it in the background; no other call may be made until [`Progress::Done`].
    Going,
}

/// Settings of a communicator that a caller may choose; the rest is the library's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommConfig {
    /// Most thread blocks that an operation uses on the device: fewer leave more to computation.
    pub max_ctas: Option<u32>,
}

impl CommConfig {
    fn to_raw(self) -> RawConfig {
        let mut raw = RawConfig::new();
        raw.blocking = 0;
        let number = |n: u32| c_int::try_from(n).unwrap_or(c_int::MAX);
        if let Some(n) = self.max_ctas {
            raw.max_ctas = number(n);
        }
        raw
    }
}

/// One rank's end of a group of devices.
///
/// Dropping it starts an abort and does not wait: whoever owns buffers that operations use calls
/// [`Aborter::abort`] or [`close`](Self::close) before.
pub struct Communicator {
    shared: Arc<Shared>,
    world: usize,
    rank: usize,
    /// One thread at a time.
    _not_sync: PhantomData<Cell<()>>,
}

impl Communicator {
    /// Starts to connect this rank to the others and returns at once; [`wait`](Self::wait) or
    /// [`poll`](Self::poll) say when the communicator can be used.
    ///
    /// The device must be current on this thread. All ranks pass the same `id` and `world`. NCCL's
    /// call mostly returns within milliseconds; where it does not, nothing can end it, and this
    /// thread lives at least until the communicator can be used or is freed (see the crate's page).
    ///
    /// # Errors
    /// [`NcclError::Call`].
    ///
    /// # Panics
    /// If `rank` is not below `world`, or `world` is beyond the range of a C int.
    pub fn start(
        library: &Library,
        id: &UniqueId,
        world: usize,
        rank: usize,
        config: &CommConfig,
    ) -> Result<Self, NcclError> {
        assert!(rank < world, "rank {rank} in a world of {world}");
        let number = |n: usize| c_int::try_from(n).expect("a world fits a C int");
        let mut raw_config: RawConfig = config.to_raw();
        let mut raw: RawComm = std::ptr::null_mut();
        // SAFETY: both pointers point to live values; the id came from NCCL or is noise that NCCL
        // checks; NCCL copies the configuration before it returns.
        let result: RawResult = unsafe {
            let config = &raw mut raw_config;
            let init = library.api().comm_init;
            init(&raw mut raw, number(world), id.to_raw(), number(rank), config)
        };
        if raw.is_null() || !matches!(result, SUCCESS | IN_PROGRESS) {
            let failed: NcclError = library.error("ncclCommInitRankConfig", result, raw);
            if !raw.is_null() {
                Arc::new(Shared::new(library.clone(), raw)).begin(Free::Abort);
            }
            return Err(failed);
        }
        Ok(Self::from_raw(library, raw, world, rank))
    }

    fn from_raw(library: &Library, raw: RawComm, world: usize, rank: usize) -> Self {
        let shared = Arc::new(Shared::new(library.clone(), raw));
        Self { shared, world, rank, _not_sync: PhantomData }
    }

    /// Returns this rank's place in the group, 0-based.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Returns the number of ranks.
    pub fn world(&self) -> usize {
        self.world
    }

    /// Returns what aborts this communicator from any thread.
    pub fn aborter(&self) -> Aborter {
        Aborter { shared: Arc::clone(&self.shared) }
    }

    /// Asks how the communicator is, without waiting.
    ///
    /// # Errors
    /// [`NcclError::Call`] if it failed in the background, for example because a peer died;
    /// [`NcclError::Aborted`].
    pub fn poll(&self) -> Result<Progress, NcclError> {
        const NAME: &str = "ncclCommGetAsyncError";
        self.call(NAME, |api, raw| {
            let mut state: RawResult = SUCCESS;
            // SAFETY: the communicator is live and locked; the second argument is a live int.
            match unsafe { (api.comm_async_error)(raw, &raw mut state) } {
                SUCCESS => state,
                error => error,
            }
        })
    }

    /// Waits until nothing is left to start: the communicator is connected, or the operations
    /// enqueued last are on their streams.
    ///
    /// # Errors
    /// [`NcclError::Timeout`] at the deadline, [`NcclError::Stopped`] once `stop` says so, and what
    /// [`poll`](Self::poll) says. The communicator should then be aborted.
    pub fn wait(&self, deadline: Instant, stop: impl Fn() -> bool) -> Result<(), NcclError> {
        const WHAT: &str = "the communicator";
        let started = Instant::now();
        let mut pause: Duration = PAUSE_MIN;
        while self.poll()? == Progress::Going {
            if stop() {
                return Err(NcclError::Stopped { what: WHAT });
            }
            if Instant::now() >= deadline {
                return Err(NcclError::Timeout { what: WHAT, waited: started.elapsed() });
            }
            thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
        Ok(())
    }

    /// Closes the communicator in agreement with all other ranks, which must do the same:
    /// operations complete first. After a fault use [`Aborter::abort`] instead.
    ///
    /// # Errors
    /// Those of [`wait`](Self::wait), and [`NcclError::AbortHangs`] if freeing takes until
    /// `deadline`; the communicator is aborted then.
    pub fn close(self, deadline: Instant, stop: impl Fn() -> bool) -> Result<(), NcclError> {
        // SAFETY: the communicator is live and locked.
        self.call("ncclCommFinalize", |api, raw| unsafe { (api.comm_finalize)(raw) })?;
        self.wait(deadline, stop)?;
        self.shared.begin(Free::Destroy);
        self.shared.wait(deadline.saturating_duration_since(Instant::now()))
    }

    /// Stops all operations of this communicator, on all ranks. What is left to do with it is to
    /// free it.
    ///
    /// # Errors
    /// [`NcclError::Unsupported`] before NCCL 2.28.7, and [`NcclError::Call`].
    pub fn revoke(&self) -> Result<Progress, NcclError> {
        let revoke = self.shared.library.api().comm_revoke;
        let revoke = revoke.ok_or_else(|| self.unsupported("ncclCommRevoke"))?;
        // SAFETY: the communicator is live and locked; 0 is the only flag there is.
        self.call("ncclCommRevoke", |_, raw| unsafe { revoke(raw, 0) })
    }

    fn unsupported(&self, symbol: &'static str) -> NcclError {
        NcclError::Unsupported { symbol, found: self.shared.library.version() }
    }

    pub(crate) fn call(
        &self,
        name: &'static str,
        call: impl FnOnce(&Api, RawComm) -> RawResult,
    ) -> Result<Progress, NcclError> {
        self.shared.call(name, call)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.shared.begin(Free::Abort);
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator")
            .field("rank", &self.rank)
            .field("world", &self.world)
            .field("is_aborted", &self.shared.is_ending())
            .finish_non_exhaustive()
    }
}
