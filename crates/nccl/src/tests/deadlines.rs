//! Calls that do not return, and what ends the wait for them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use lacuna_nccl_standin::{hanging, id_fault, inject};

use super::{PATIENT, Rank, device, draw, library, on_each, sum, until};
use crate::{
    Batch, CommConfig, Communicator, DataType, Library, NcclError, ReduceOp, Seat, StartError,
};

/// Deadline of waits that must end by it.
const BRIEF: Duration = Duration::from_millis(200);
/// How late a call may return after its deadline: far above what it takes, far below [`PATIENT`].
const BOUND: Duration = Duration::from_secs(10);

/// A library of its own, whose ids fail with a code or never come.
fn without_ids(name: &str, code: Option<i32>) -> (PathBuf, Library) {
    let copy = std::env::temp_dir().join(format!("lacuna-{name}-{}.so", std::process::id()));
    std::fs::copy(lacuna_nccl_standin::path(), &copy).expect("there is room");
    id_fault(&copy, code);
    let library = Library::open(&copy).expect("the copy loads");
    (copy, library)
}

#[test]
fn an_id_that_does_not_come_is_given_up() {
    let (file, library) = without_ids("no-id", None);
    let started = Instant::now();
    let error = library.unique_id(started + BRIEF, || false).expect_err("it blocks");
    assert!(started.elapsed() < BRIEF + BOUND);
    let blocked = matches!(error, NcclError::Blocked { call: "ncclGetUniqueId", .. });
    assert!(blocked, "{error:?}");
    assert!(library.stuck_for().is_some(), "it is remembered");
    let error = library.unique_id(Instant::now() + PATIENT, || true).expect_err("told to stop");
    assert_eq!(error, NcclError::Stopped { what: "ncclGetUniqueId" });
    let error = library.unique_id(Instant::now(), || false).expect_err("no time");
    assert!(matches!(error, NcclError::Timeout { .. }), "{error:?}");
    let _ = std::fs::remove_file(file);
}

#[test]
fn an_id_that_fails_says_why() {
    let (file, library) = without_ids("failing-id", Some(2));
    let error = library.unique_id(Instant::now() + PATIENT, || false).expect_err("it fails");
    let text = "`ncclGetUniqueId` failed: unhandled system error: injected: no id";
    assert_eq!(error.to_string(), text);
    assert_eq!(library.stuck_for(), None);
    let _ = std::fs::remove_file(file);
}

#[test]
fn a_start_that_does_not_return_is_given_up_and_others_go_on() {
    let library = library();
    let id = draw(&library);
    inject("init-blocks");
    let there = device(0);
    let started = Instant::now();
    let (seat, config) = (Seat { id, world: 1, rank: 0 }, CommConfig::default());
    let enter = move || there.make_current();
    let error = Communicator::start(&library, seat, config, enter, started + BRIEF, || false);
    assert!(started.elapsed() < BRIEF + BOUND);
    let StartError::Nccl(error) = error.expect_err("it blocks") else { panic!() };
    assert!(matches!(error, NcclError::Blocked { .. }), "{error:?}");
    let id = draw(&library);
    let me = Rank::start(&library, &id, 1, 0).expect("another starts").ready();
    sum(&me.expect("it forms")).expect("it works");
}

/// What was given up is taken back when it comes after all.
#[test]
fn a_start_that_comes_too_late_is_aborted_and_forgotten() {
    struct Made(Arc<AtomicBool>);
    impl Drop for Made {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    let library = library();
    let seat = Seat { id: draw(&library), world: 1, rank: 0 };
    let (go_on, wait) = channel::<()>();
    let (there, dropped) = (device(0), Arc::<AtomicBool>::default());
    let made = Made(Arc::clone(&dropped));
    let enter = move || {
        let _ = wait.recv_timeout(PATIENT);
        there.make_current().map(|()| made)
    };
    let config = CommConfig::default();
    let end = Instant::now() + BRIEF;
    let error = Communicator::start(&library, seat, config, enter, end, || false);
    let blocked = matches!(error, Err(StartError::Nccl(NcclError::Blocked { .. })));
    assert!(blocked && library.stuck_for().is_some());
    go_on.send(()).expect("it waits");
    until("the communicator and what was made are gone", || dropped.load(Ordering::Acquire));
    until("it is forgotten", || library.stuck_for().is_none());
}

#[test]
fn a_thread_that_panics_blocks_nobody() {
    let library = library();
    let seat = Seat { id: draw(&library), world: 1, rank: 0 };
    let enter = || -> Result<(), std::io::Error> { panic!("on purpose") };
    let end = Instant::now() + PATIENT;
    let error = Communicator::start(&library, seat, CommConfig::default(), enter, end, || false);
    let failed = matches!(error, Err(StartError::Nccl(NcclError::Thread { .. })));
    assert!(failed && library.stuck_for().is_none());
}

#[test]
fn nobody_joins_a_call_that_has_been_stuck_for_long() {
    let library = library();
    library.stuck().push((u64::MAX, Instant::now() - Library::STUCK_FOR_GOOD));
    let started = Instant::now();
    let error = library.unique_id(started + PATIENT, || false).expect_err("it would block too");
    let NcclError::Blocked { waited, .. } = error else { panic!("{error:?}") };
    assert!(waited >= Library::STUCK_FOR_GOOD && started.elapsed() < BOUND);
}

#[test]
fn of_several_limits_the_earliest_counts_and_each_ends_by_itself() {
    on_each(1, |library, id, rank| {
        let me = Rank::start(library, id, 1, rank).unwrap().ready().unwrap();
        let outer = me.comm.until(Instant::now() + PATIENT);
        drop(me.comm.until(Instant::now() + PATIENT));
        let inner = me.comm.until(Instant::now() + BRIEF);
        drop(outer);
        until("the inner one rings", || me.comm.has_rung());
        drop(inner);
        assert_eq!(sum(&me).expect_err("it is aborted"), NcclError::Aborted);
    });
}

/// What a caller needs beside the communicator is made on the thread that may be given up.
#[test]
fn what_was_made_beside_a_communicator_comes_with_it() {
    let library = library();
    let seat = |id| Seat { id, world: 1, rank: 0 };
    let end = || Instant::now() + PATIENT;
    let there = device(0);
    let enter = move || there.make_current().map(|()| thread::current().id());
    let config = CommConfig::default();
    let started =
        Communicator::start(&library, seat(draw(&library)), config, enter, end(), || false);
    let (_, made_by) = started.expect("it starts");
    assert_ne!(made_by, thread::current().id());
    let failing = || Err::<(), _>(std::io::Error::other("no room"));
    let failed =
        Communicator::start(&library, seat(draw(&library)), config, failing, end(), || false);
    let error = failed.expect_err("it cannot get ready");
    assert!(matches!(&error, StartError::Enter(why) if why.to_string() == "no room"), "{error:?}");
}

#[test]
fn a_call_that_does_not_return_is_ended_at_its_deadline() {
    on_each(1, |library, id, rank| {
        inject("op-blocks@1");
        let me = Rank::start(library, id, 1, rank).unwrap().ready().unwrap();
        let started = Instant::now();
        let armed = me.comm.until(started + BRIEF);
        assert_eq!(sum(&me).expect_err("it blocks"), NcclError::Aborted);
        assert!(started.elapsed() < BRIEF + BOUND);
        assert!(me.comm.has_rung(), "which tells a deadline from an abort");
        drop(armed);
    });
}

#[test]
fn a_call_that_nothing_limits_has_a_limit_too() {
    on_each(1, |library, id, rank| {
        inject("op-blocks@1");
        let config = CommConfig { call_limit: BRIEF, ..CommConfig::default() };
        let seat = Seat { id: *id, world: 1, rank };
        let me = Rank::start_with(library, seat, config).unwrap().ready().unwrap();
        let started = Instant::now();
        assert_eq!(sum(&me).expect_err("it blocks"), NcclError::Aborted);
        assert!(started.elapsed() < BRIEF + BOUND);
    });
}

#[test]
fn an_abort_inside_a_group_of_calls_spoils_the_thread_and_says_so() {
    let batch = |me: &Rank| {
        let mut batch = Batch::new();
        for n in 0..3 {
            batch.all_reduce(me.at(8 * n), me.at(8 * n), 1, DataType::I64, ReduceOp::Sum);
        }
        batch
    };
    on_each(1, |library, id, rank| {
        inject("group-blocks@2");
        let seat = Seat { id: *id, world: 1, rank };
        let me = Rank::start_on(30, library, seat, CommConfig::default()).unwrap();
        let me = me.ready().unwrap();
        let aborter = me.comm.aborter();
        thread::scope(|scope| {
            scope.spawn(move || {
                until("the call is stuck", || hanging(30) > 0);
                aborter.begin();
            });
            // SAFETY: the buffers hold three elements and live until the abort has returned.
            let error = unsafe { me.comm.exchange(&batch(&me), me.raw()) };
            assert_eq!(error.expect_err("it blocks"), NcclError::Aborted);
        });
        me.comm.aborter().abort(PATIENT).expect("the abort returns");
        let other = Rank::start(library, &draw(library), 1, rank).unwrap().ready().unwrap();
        assert_eq!(sum(&other).expect_err("not on this thread"), NcclError::GroupOpen);
        assert_eq!(other.comm.revoke().expect_err("nor this"), NcclError::GroupOpen);
        thread::scope(|scope| {
            let there = scope.spawn(move || {
                device(rank).make_current().unwrap();
                sum(&other)
            });
            there.join().expect("it does not panic").expect("on another it works");
        });
    });
}

/// NCCL ends the group itself.
#[test]
fn an_abort_of_the_end_of_a_group_of_calls_spoils_nothing() {
    on_each(1, |library, id, rank| {
        inject("op-blocks@1");
        let me = Rank::start(library, id, 1, rank).unwrap().ready().unwrap();
        let mut batch = Batch::new();
        batch.all_reduce(me.at(0), me.at(0), 1, DataType::I64, ReduceOp::Sum);
        batch.all_reduce(me.at(8), me.at(8), 1, DataType::I64, ReduceOp::Sum);
        let armed = me.comm.until(Instant::now() + BRIEF);
        // SAFETY: as above.
        let error = unsafe { me.comm.exchange(&batch, me.raw()) };
        assert_eq!(error.expect_err("it blocks"), NcclError::Aborted);
        drop(armed);
        let other = Rank::start(library, &draw(library), 1, rank).unwrap().ready().unwrap();
        sum(&other).expect("this thread goes on");
    });
}

#[test]
fn closing_has_a_deadline_in_each_of_its_stages() {
    let close = |faults: &str, limit: Duration| {
        let errors = on_each(1, |library, id, rank| {
            inject(faults);
            let me = Rank::start(library, id, 1, rank).unwrap().ready().unwrap();
            let Rank { comm, .. } = me;
            let started = Instant::now();
            let error = comm.close(started + limit, || false).err();
            assert!(started.elapsed() < limit + BOUND);
            error
        });
        errors.into_iter().next().flatten()
    };
    assert_eq!(close("", PATIENT), None);
    assert_eq!(close("finalize-blocks", BRIEF), Some(NcclError::Aborted));
    assert!(matches!(close("finalize-hangs", BRIEF), Some(NcclError::Timeout { .. })));
    let hangs = close("destroy-hangs", BRIEF);
    let named = matches!(hangs, Some(NcclError::AbortHangs { call: "ncclCommDestroy", .. }));
    assert!(named, "{hangs:?}");
}

/// The first operation makes connections: NCCL is still at it when the abort comes.
#[test]
fn an_abort_while_an_operation_is_being_started() {
    on_each(2, |library, id, rank| {
        let me = Rank::start(library, id, 2, rank).unwrap().ready().unwrap();
        assert_eq!(sum(&me), Ok(crate::Progress::Going));
        me.comm.aborter().abort(BOUND).expect("the abort returns");
        assert_eq!(me.comm.poll(), Err(NcclError::Aborted));
        until("the stream is empty", || me.stream.is_idle().expect("the device works"));
    });
}
