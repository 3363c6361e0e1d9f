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
use crate::keeper::{Answer, Armed, ask, hand_over};
use crate::library::{IN_PROGRESS, SUCCESS};
use crate::operations::refuse_open_group;
use crate::{Aborter, Library, NcclError, StartError, UniqueId};

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommConfig {
    /// Most thread blocks that an operation uses on the device: fewer leave more to computation.
    pub max_ctas: Option<u32>,
    /// Longest time of a call that nothing else limits; see [`Communicator::until`].
    pub call_limit: Duration,
}

impl Default for CommConfig {
    /// The library's own number of blocks, and a minute for a call.
    fn default() -> Self {
        Self { max_ctas: None, call_limit: Duration::from_secs(60) }
    }
}

/// A rank's place in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Names the group; the same for all ranks.
    pub id: UniqueId,
    /// Number of ranks.
    pub world: usize,
    /// This one, 0-based.
    pub rank: usize,
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
    pub(crate) shared: Arc<Shared>,
    world: usize,
    rank: usize,
    /// One thread at a time.
    _not_sync: PhantomData<Cell<()>>,
}

impl Communicator {
    /// Starts to connect this rank to the others; [`wait`](Self::wait) or [`poll`](Self::poll) say
    /// when the communicator can be used.
    ///
    /// NCCL's call mostly returns within milliseconds; where it does not, nothing can end it. So it
    /// runs on a thread of its own, which is left to itself at `deadline` or once `stop` says so.
    /// The thread runs `enter` first: it makes the device current there, and makes whatever must
    /// not be made by a caller that cannot wait, since a call of NCCL that is stuck may hold the
    /// driver. What `enter` made comes with the communicator, or is dropped there, behind it. The
    /// time that it takes counts, and is said to be the call's.
    ///
    /// # Errors
    /// [`StartError::Enter`], or as [`StartError::Nccl`]: [`NcclError::Call`],
    /// [`NcclError::Timeout`] where no time is left, [`NcclError::Blocked`],
    /// [`NcclError::Stopped`], [`NcclError::Blocking`], [`NcclError::Thread`].
    ///
    /// # Panics
    /// If the rank is not below the world, or the world is beyond the range of a C int.
    pub fn start<T: Send + 'static, E: std::error::Error + Send + 'static>(
        library: &Library,
        seat: Seat,
        config: CommConfig,
        enter: impl FnOnce() -> Result<T, E> + Send + 'static,
        deadline: Instant,
        stop: impl Fn() -> bool,
    ) -> Result<(Self, T), StartError<E>> {
        let Seat { world, rank, .. } = seat;
        assert!(rank < world, "rank {rank} in a world of {world}");
        assert!(c_int::try_from(world).is_ok(), "a world of {world} fits no C int");
        if std::env::var_os("NCCL_COMM_BLOCKING").is_some_and(|value| value == "1") {
            return Err(NcclError::Blocking.into());
        }
        let there: Library = library.clone();
        let work = move |answer: Answer<Result<(Self, T), StartError<E>>>| {
            let started = enter().map_err(StartError::Enter).and_then(|made| {
                let comm = Self::sit_down(&there, seat, config).map_err(StartError::Nccl)?;
                Ok((comm, made))
            });
            hand_over(answer, started, |started| {
                started.as_ref().ok().map(|(comm, _)| Arc::clone(&comm.shared))
            });
        };
        ask("ncclCommInitRankConfig", library, deadline, stop, work)?
    }

    /// Makes the call.
    fn sit_down(library: &Library, seat: Seat, config: CommConfig) -> Result<Self, NcclError> {
        let Seat { id, world, rank } = seat;
        let number = |n: usize| c_int::try_from(n).expect("seen before");
        let mut raw_config: RawConfig = config.to_raw();
        let mut raw: RawComm = std::ptr::null_mut();
        // SAFETY: both pointers point to live values; the id came from NCCL or is noise that NCCL
        // checks; NCCL copies the configuration before it returns.
        let result: RawResult = unsafe {
            let config = &raw mut raw_config;
            let init = library.api().comm_init;
            init(&raw mut raw, number(world), id.to_raw(), number(rank), config)
        };
        let shared = || Arc::new(Shared::new(library.clone(), raw, config.call_limit));
        if raw.is_null() || !matches!(result, SUCCESS | IN_PROGRESS) {
            let failed: NcclError = library.error("ncclCommInitRankConfig", result, raw);
            if !raw.is_null() {
                shared().begin(Free::Abort);
            }
            return Err(failed);
        }
        Ok(Self { shared: shared(), world, rank, _not_sync: PhantomData })
    }

    /// Limits the calls made while the value that is returned lives: at `end` an abort begins, and
    /// ends a call that has not returned, which fails with [`NcclError::Aborted`]. Of several such
    /// values the earliest end counts. Calls outside may take [`CommConfig::call_limit`] each.
    pub fn until(&self, end: Instant) -> Armed {
        self.shared.until(end)
    }

    /// Tells whether such an end came, or that of a call: then the communicator is aborted.
    pub fn has_rung(&self) -> bool {
        self.shared.clock.has_rung()
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
        let poll = || {
            let _armed = self.shared.until_after(deadline);
            self.poll()
        };
        while poll()? == Progress::Going {
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
    /// Those of [`wait`](Self::wait), with which the communicator is aborted, and
    /// [`NcclError::AbortHangs`] if freeing takes until `deadline`: nothing can end that.
    /// [`NcclError::GroupOpen`].
    pub fn close(self, deadline: Instant, stop: impl Fn() -> bool) -> Result<(), NcclError> {
        refuse_open_group()?;
        let _armed = self.shared.until_after(deadline);
        // SAFETY: the communicator is live and locked.
        self.call("ncclCommFinalize", |api, raw| unsafe { (api.comm_finalize)(raw) })?;
        self.wait(deadline, stop)?;
        self.shared.begin(Free::Destroy);
        self.shared.wait(deadline.saturating_duration_since(Instant::now()))
    }

    /// Stops the operations of this rank's end, and keeps what it holds. It goes on in the
    /// background; [`poll`](Self::poll) says when it is done. Operations that are enqueued then
    /// fail with [`ResultCode::InvalidUsage`](crate::ResultCode::InvalidUsage), and so may
    /// [`close`](Self::close): what is left to do is to abort. Other ranks notice nothing but that
    /// this one does not go on.
    ///
    /// # Errors
    /// [`NcclError::Unsupported`] before NCCL 2.28.7, [`NcclError::Call`],
    /// [`NcclError::GroupOpen`].
    pub fn revoke(&self) -> Result<Progress, NcclError> {
        refuse_open_group()?;
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
