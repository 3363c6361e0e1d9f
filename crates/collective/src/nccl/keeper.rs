//! The thread beside the one that owns a communicator.
//!
//! Nothing can end a call of NCCL before there is a communicator, so the calls that make one run on
//! threads of their own, and the owner gives them up at its deadline. The thread that made the
//! communicator then keeps the time of the owner's calls: where one has not returned by its
//! deadline, it starts the abort, which frees the call.
//!
//! It lives as long as the communicator. Up to NCCL 2.26, what a call starts in the background
//! works in memory of the thread that made the call.

use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use lacuna_nccl::{Aborter, CommConfig, Communicator, NcclError, UniqueId};

use super::{ABORT_LIMIT, NcclSetup};
use crate::error::BLOCKED_FOR_GOOD;
use crate::exchange::TICK;
use crate::{AbortHandle, CollectiveError};

/// How long a call is waited for.
#[derive(Clone, Copy)]
pub(super) struct Limit<'l> {
    pub end: Instant,
    pub abort: &'l AbortHandle,
}

/// A rank's place in a communicator.
#[derive(Clone, Copy)]
pub(super) struct Seat {
    pub id: UniqueId,
    pub world: usize,
    pub rank: usize,
}

/// Keeps the time of calls into one communicator.
pub(super) struct Keeper {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// When the communicator is aborted; none while the owner makes no call.
    rings_at: Option<Instant>,
    /// Until when the thread sleeps; none where it waits to be woken.
    sleeps_until: Option<Instant>,
    has_rung: bool,
    is_over: bool,
}

/// Limits the owner's calls as long as this value lives.
pub(super) struct Armed {
    shared: Arc<Shared>,
}

/// What comes of starting a communicator.
type Started = Result<Communicator, CollectiveError>;

/// Draws the id of a communicator.
pub(super) fn draw_id(setup: &NcclSetup, limit: Limit<'_>) -> Result<UniqueId, CollectiveError> {
    let nccl = setup.nccl.clone();
    let work = move |answer: SyncSender<Result<UniqueId, NcclError>>| {
        // Whoever gave it up does not need it.
        let _ = answer.send(nccl.unique_id());
    };
    let drawn = ask("ncclGetUniqueId", setup, limit, work)?;
    drawn.map_err(|source| CollectiveError::Nccl { op_seq: 0, source })
}

impl Keeper {
    /// Starts a communicator, on a thread that then keeps the time.
    pub fn start(
        setup: &NcclSetup,
        seat: Seat,
        limit: Limit<'_>,
    ) -> Result<(Self, Communicator), CollectiveError> {
        let (there, shared) = (setup.clone(), Arc::<Shared>::default());
        let keeper = Self { shared: Arc::clone(&shared) };
        let work = move |answer: SyncSender<Started>| {
            let started: Started = sit_down(&there, seat);
            let aborter = started.as_ref().ok().map(Communicator::aborter);
            let taken: bool = answer.send(started).is_ok();
            match aborter {
                Some(aborter) if taken => shared.keep_time(&aborter),
                Some(aborter) => let_go(&aborter),
                None => {}
            }
        };
        let comm: Communicator = ask("ncclCommInitRankConfig", setup, limit, work)??;
        Ok((keeper, comm))
    }

    /// Limits the owner's calls: those that have not returned at `end` are ended by an abort.
    pub fn until(&self, end: Instant) -> Armed {
        let mut state = self.shared.state();
        state.rings_at = Some(end);
        // Deadlines are alike, so the thread mostly wakes early enough by itself.
        if state.sleeps_until.is_none_or(|until| until > end) {
            self.shared.changed.notify_one();
        }
        Armed { shared: Arc::clone(&self.shared) }
    }

    /// Tells whether a call took too long: then the communicator is aborted.
    pub fn has_rung(&self) -> bool {
        self.shared.state().has_rung
    }

    /// Lets the thread go, once the communicator is freed.
    pub fn end(&self) {
        self.shared.state().is_over = true;
        self.shared.changed.notify_one();
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        self.shared.state().rings_at = None;
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep_time(&self, aborter: &Aborter) {
        let mut state = self.state();
        while !state.is_over {
            let rings_at = state.rings_at.filter(|_| !state.has_rung);
            let left = rings_at.map(|at| at.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                state.has_rung = true;
                aborter.begin();
                continue;
            }
            state.sleeps_until = rings_at;
            state = match left {
                Some(left) => {
                    let woken = self.changed.wait_timeout(state, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// Starts this rank's end of a communicator.
fn sit_down(setup: &NcclSetup, seat: Seat) -> Started {
    let Seat { id, world, rank } = seat;
    let current = setup.device.make_current();
    current.map_err(|source| CollectiveError::Device { op_seq: 0, source })?;
    let started = Communicator::start(&setup.nccl, &id, world, rank, &CommConfig::default());
    started.map_err(|source| CollectiveError::Nccl { op_seq: 0, source })
}

/// Frees a communicator that came when nobody waited for it any more. Where that does not return
/// neither does this: the thread's memory may still be in use, and the call counts as stuck.
fn let_go(aborter: &Aborter) {
    while let Err(error) = aborter.abort(ABORT_LIMIT) {
        tracing::error!(%error, "a communicator that came too late was not let go");
        if !matches!(error, NcclError::AbortHangs { .. }) {
            return;
        }
        thread::park_timeout(ABORT_LIMIT);
    }
}

/// Makes a call of NCCL on a thread of its own, which `work` is all of, and waits for the answer.
///
/// Where the wait ends first, the thread learns that nobody takes its answer. Calls that were given
/// up for a long time are not joined by others, which would block as well.
fn ask<T: Send + 'static>(
    call: &'static str,
    setup: &NcclSetup,
    limit: Limit<'_>,
    work: impl FnOnce(SyncSender<T>) + Send + 'static,
) -> Result<T, CollectiveError> {
    let asked = Instant::now();
    if limit.left().is_zero() {
        // Members took all the time to come.
        return Err(CollectiveError::Timeout { op_seq: 0, waiting_for: Vec::new() });
    }
    let stuck = Arc::clone(&setup.stuck);
    let oldest = in_it(&stuck).iter().min().map(Instant::elapsed);
    if let Some(waited) = oldest.filter(|waited| *waited >= BLOCKED_FOR_GOOD) {
        return Err(CollectiveError::Blocked { call, waited });
    }
    // Without room for an answer: it is either taken or stays with the thread.
    let (answer, answers) = sync_channel(0);
    let thread = thread::Builder::new().name("nccl-keeper".to_string());
    let given_up = Arc::clone(&stuck);
    let spawned = thread.spawn(move || {
        work(answer);
        in_it(&given_up).retain(|since| *since != asked);
    });
    spawned.map_err(|err| {
        let source = Arc::new(err);
        CollectiveError::Local { action: "start a thread for NCCL", source }
    })?;
    let fault = loop {
        match answers.recv_timeout(limit.left().min(TICK)) {
            Ok(answer) => return Ok(answer),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => unreachable!("the thread answers or panics"),
        }
        if let Err(aborted) = limit.abort.check() {
            break aborted;
        }
        if limit.left().is_zero() {
            break CollectiveError::Blocked { call, waited: asked.elapsed() };
        }
    };
    // Before the thread can learn that nobody waits: it is what takes the call out again.
    in_it(&stuck).push(asked);
    drop(answers);
    Err(fault)
}

fn in_it(stuck: &Mutex<Vec<Instant>>) -> MutexGuard<'_, Vec<Instant>> {
    stuck.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Limit<'_> {
    pub fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }
}
