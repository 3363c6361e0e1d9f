//! Aborts in every state of a communicator's life, and failures that NCCL reports late.

use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use lacuna_nccl_standin::{hanging, inject};

use super::{PATIENT, Rank, library, on_each, sum, until};
use crate::{CommConfig, Communicator, NcclError, ResultCode, Seat};

/// How long an abort may take here.
const PROMPT: Duration = Duration::from_secs(2);
/// Deadline of waits that must end by it.
const BRIEF: Duration = Duration::from_millis(100);

/// Aborts, in time, and checks that nothing works afterwards.
fn abort(me: &Rank) {
    let started = Instant::now();
    me.comm.aborter().abort(PROMPT).expect("the abort returns");
    assert!(started.elapsed() < PROMPT);
    assert_eq!(sum(me).expect_err("it is aborted"), NcclError::Aborted);
    assert_eq!(me.comm.poll().expect_err("it is aborted"), NcclError::Aborted);
    // The stream passes what was aborted as if it had been done.
    until("the stream is empty", || me.stream.is_idle().expect("the device works"));
}

#[test]
fn abort_while_forming_with_a_rank_that_never_comes() {
    let library = library();
    let id = super::draw(&library);
    let me = Rank::start(&library, &id, 2, 0).unwrap();
    let error = me.comm.wait(Instant::now() + BRIEF, || false).expect_err("rank 1 never comes");
    assert!(matches!(error, NcclError::Timeout { .. }), "{error:?}");
    let error = me.comm.wait(Instant::now() + PATIENT, || true).expect_err("told to stop");
    assert_eq!(error, NcclError::Stopped { what: "the communicator" });
    abort(&me);
}

#[test]
fn abort_of_an_idle_communicator() {
    on_each(2, |library, id, rank| {
        let me = Rank::start(library, id, 2, rank).unwrap().ready().unwrap();
        abort(&me);
    });
}

#[test]
fn abort_inside_an_operation_that_a_rank_never_joins() {
    let (late, wait) = channel::<()>();
    let late = std::sync::Mutex::new(Some(late));
    let wait = std::sync::Mutex::new(wait);
    on_each(2, |library, id, rank| {
        let me = Rank::start(library, id, 2, rank).unwrap().ready().unwrap();
        if rank == 1 {
            // Stays, and does not join, until rank 0 is done.
            let _ = wait.lock().unwrap().recv_timeout(PATIENT);
            return;
        }
        sum(&me).unwrap();
        me.comm.wait(Instant::now() + PATIENT, || false).unwrap();
        assert!(!me.stream.is_idle().unwrap(), "the sum waits for rank 1");
        abort(&me);
        drop(late.lock().unwrap().take());
    });
}

#[test]
fn abort_of_a_call_that_does_not_return() {
    on_each(1, |library, id, rank| {
        inject("op-blocks@1");
        let seat = Seat { id: *id, world: 1, rank };
        let me = Rank::start_on(31, library, seat, CommConfig::default()).unwrap();
        let me = me.ready().unwrap();
        let aborter = me.comm.aborter();
        let other = thread::spawn(move || {
            until("the call is stuck", || hanging(31) > 0);
            aborter.abort(PATIENT)
        });
        assert_eq!(sum(&me).expect_err("the abort ends it"), NcclError::Aborted);
        other.join().unwrap().expect("the abort returns");
        abort(&me);
    });
}

#[test]
fn abort_of_an_operation_that_hangs_on_the_device() {
    on_each(1, |library, id, rank| {
        inject("op-hangs@1");
        let mut me = Rank::start(library, id, 1, rank).unwrap().ready().unwrap();
        me.put(&7i64.to_le_bytes());
        sum(&me).unwrap();
        me.comm.wait(Instant::now() + PATIENT, || false).unwrap();
        assert!(!me.stream.is_idle().unwrap());
        abort(&me);
        // It looks done, and is not: that is why nobody reads after an abort.
        // SAFETY: the abort has returned; only the copy uses the buffers, and `pass` waits.
        unsafe { me.device.store(&mut me.host, 8, &me.stream) }.unwrap();
        me.pass();
        assert_ne!(me.host.bytes()[..8], 7i64.to_le_bytes());
    });
}

#[test]
fn an_abort_that_hangs_is_reported_in_time_and_stays_hung() {
    on_each(1, |library, id, rank| {
        inject("abort-hangs");
        let me = Rank::start(library, id, 1, rank).unwrap().ready().unwrap();
        let started = Instant::now();
        let error = me.comm.aborter().abort(BRIEF).expect_err("it hangs");
        assert_eq!(error, NcclError::AbortHangs { call: "ncclCommAbort", waited: BRIEF });
        assert!(started.elapsed() < PROMPT);
        assert!(me.comm.aborter().abort(BRIEF).is_err(), "a second one waits for the first");
    });
}

#[test]
fn an_abort_that_fails_says_so() {
    on_each(1, |library, id, rank| {
        inject("abort-error=1");
        let me = Rank::start(library, id, 1, rank).unwrap().ready().unwrap();
        let error = me.comm.aborter().abort(PROMPT).expect_err("it fails");
        assert_eq!(error.code(), Some(ResultCode::UnhandledCudaError));
    });
}

#[test]
fn dropping_a_communicator_aborts_it() {
    on_each(2, |library, id, rank| {
        let me = Rank::start(library, id, 2, rank).unwrap().ready().unwrap();
        let Rank { comm, .. } = me;
        let aborter = comm.aborter();
        drop(comm);
        assert!(aborter.is_aborted());
        aborter.abort(PROMPT).expect("the abort returns");
    });
}

#[test]
fn many_threads_may_abort_at_once() {
    on_each(2, |library, id, rank| {
        let me = Rank::start(library, id, 2, rank).unwrap().ready().unwrap();
        thread::scope(|scope| {
            for _ in 0..8 {
                let aborter = me.comm.aborter();
                scope.spawn(move || aborter.abort(PROMPT).expect("the abort returns"));
            }
        });
        abort(&me);
    });
}

#[test]
fn failures_while_forming_carry_the_librarys_words() {
    let library = library();
    let id = super::draw(&library);
    inject("init-error=2");
    let error = Rank::start(&library, &id, 1, 0).err().expect("it fails at once");
    let text = "`ncclCommInitRankConfig` failed: unhandled system error: injected: init error";
    assert_eq!(error.to_string(), text);
    inject("init-fails=3");
    let error = Rank::start(&library, &id, 1, 0).unwrap().ready().err().expect("it fails late");
    let text = "`ncclCommGetAsyncError` failed: internal error: injected: init fails";
    assert_eq!(error.to_string(), text);
    inject("init-hangs");
    let me = Rank::start(&library, &id, 1, 0).unwrap();
    let error = me.comm.wait(Instant::now() + BRIEF, || false).expect_err("it hangs");
    assert!(matches!(error, NcclError::Timeout { .. }), "{error:?}");
    abort(&me);
}

#[test]
fn failures_of_operations_carry_the_librarys_words() {
    on_each(1, |library, id, rank| {
        inject("op-error@1=3,op-fails@2=2");
        let me = Rank::start(library, id, 1, rank).unwrap().ready().unwrap();
        let error = sum(&me).expect_err("the call fails");
        let text = "`ncclAllReduce` failed: internal error: injected: call of operation 1";
        assert_eq!(error.to_string(), text);
        sum(&me).expect("the call is taken");
        let failed = || me.comm.poll().err();
        until("the failure shows", || failed().is_some());
        let error = failed().expect("just seen");
        assert_eq!(error.code(), Some(ResultCode::SystemError));
        assert!(error.to_string().ends_with("injected: operation 2 fails"), "{error}");
        abort(&me);
    });
}

#[test]
fn a_peer_that_goes_is_a_remote_error_and_the_stream_stays_busy() {
    on_each(2, |library, id, rank| {
        let me = Rank::start(library, id, 2, rank).unwrap().ready().unwrap();
        if rank == 1 {
            return;
        }
        sum(&me).unwrap();
        until("the loss shows", || me.comm.poll().is_err());
        let error = me.comm.poll().expect_err("just seen");
        assert_eq!(error.code(), Some(ResultCode::RemoteError));
        assert!(!me.stream.is_idle().unwrap(), "only an abort frees the stream");
        abort(&me);
    });
}

#[test]
fn two_ranks_on_one_device_are_refused() {
    let errors = on_each(2, |library, id, rank| {
        // Both take device 0.
        let first = super::device(0);
        let (seat, config) = (Seat { id: *id, world: 2, rank }, CommConfig::default());
        let enter = move || first.make_current();
        let end = Instant::now() + PATIENT;
        let started = Communicator::start(library, seat, config, enter, end, || false);
        let (comm, ()) = started.unwrap();
        comm.wait(Instant::now() + PATIENT, || false).expect_err("one device").to_string()
    });
    let expected = "`ncclCommGetAsyncError` failed: invalid usage: Duplicate GPU detected : rank 0 \
                    and rank 1 both on CUDA device 0";
    assert_eq!(errors, [expected, expected]);
}
