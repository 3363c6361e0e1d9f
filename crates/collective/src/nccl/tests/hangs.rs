//! Calls and operations that hang, and what ends them: a deadline, an abort, the death of a peer.
//!
//! Each test has devices of its own, so that [`hanging`] speaks of it alone.

use std::thread;
use std::time::{Duration, Instant};

use lacuna_cuda::{DeviceBuffer, Stream};
use lacuna_nccl_standin::{hanging, inject};

use super::{BRIEF, PATIENT, bind, connect_on, plan, setup};
use crate::conformance::wait_until;
use crate::nccl::NcclCollective;
use crate::{AbortHandle, Collective, CollectiveError, DeviceCollective};

/// How late a call may return after its deadline: far above what it takes, far below [`PATIENT`].
const BOUND: Duration = Duration::from_secs(10);

/// Forms a group of one on a device.
fn alone_on(
    device: usize,
    faults: &str,
    abort: AbortHandle,
    deadline: Duration,
) -> Result<NcclCollective, CollectiveError> {
    inject(faults);
    let listeners = bind(1);
    let setup = setup(device);
    NcclCollective::connect(&listeners[0], &plan(&listeners, 1), &setup, abort, deadline)
}

fn member_on(device: usize, faults: &str) -> NcclCollective {
    alone_on(device, faults, AbortHandle::new(), PATIENT).expect("it forms")
}

/// Aborts once something hangs on a device.
fn abort_in_time(device: usize, abort: AbortHandle) -> impl FnOnce() + Send {
    move || {
        wait_until("the device hangs", || hanging(device) > 0);
        abort.abort("generation revoked");
    }
}

fn check_timed_out(error: &CollectiveError, number: u64) {
    let timed_out = matches!(error, CollectiveError::Timeout { op_seq, .. } if *op_seq == number);
    assert!(timed_out, "{error:?}");
    assert!(error.suspects().is_empty(), "nobody is to blame: {error:?}");
}

#[test]
fn a_call_that_does_not_return_ends_at_its_deadline() {
    let mut member = member_on(10, "op-blocks@1");
    let (mut buffer, started) = ([7; 100], Instant::now());
    let error = member.all_reduce_i64(&mut buffer, BRIEF).expect_err("it blocks");
    assert!(started.elapsed() < BRIEF + BOUND);
    check_timed_out(&error, 1);
    assert_eq!(buffer, [7; 100]);
    member.leave().expect("NCCL lets go");
}

/// The time of the first operation must not be waited for.
#[test]
fn a_brief_deadline_after_a_long_one_ends_a_call_too() {
    let mut member = member_on(11, "op-blocks@2");
    member.all_reduce_i64(&mut [1], PATIENT).expect("the first is well");
    let started = Instant::now();
    let error = member.all_reduce_i64(&mut [1], BRIEF).expect_err("it blocks");
    assert!(started.elapsed() < BRIEF + BOUND);
    check_timed_out(&error, 2);
}

#[test]
fn a_call_on_a_devices_buffer_ends_at_its_deadline() {
    let mut member = member_on(12, "op-blocks@1");
    let device = setup(12).device;
    let stream = Stream::new(&device).unwrap();
    let mut buffer = DeviceBuffer::new(&device, 800).unwrap();
    let started = Instant::now();
    let error = member.all_reduce_i64_there(&mut buffer, 100, &stream, BRIEF);
    assert!(started.elapsed() < BRIEF + BOUND);
    check_timed_out(&error.expect_err("it blocks"), 1);
}

#[test]
fn a_start_that_does_not_return_is_given_up_at_the_deadline() {
    let deadline = Duration::from_secs(1);
    let started = Instant::now();
    let error = alone_on(13, "init-blocks", AbortHandle::new(), deadline).expect_err("it blocks");
    assert!(started.elapsed() < deadline + BOUND);
    let text = error.to_string();
    assert!(text.starts_with("`ncclCommInitRankConfig` did not return within "), "{text}");
    assert!(error.suspects().is_empty(), "nobody is to blame: {error:?}");
    assert!(!error.ends_process(), "it was not waited for long");
    let CollectiveError::Blocked { call, .. } = error else { panic!("{error:?}") };
    assert!(CollectiveError::Blocked { call, waited: PATIENT }.ends_process());
}

/// A call that is stuck in NCCL may keep the driver: who forms anew must not wait for it.
#[test]
fn forming_anew_while_a_stuck_call_holds_the_driver_is_given_up_too() {
    let deadline = Duration::from_secs(1);
    for faults in ["init-holds-driver", ""] {
        let started = Instant::now();
        let error = alone_on(23, faults, AbortHandle::new(), deadline).expect_err("it blocks");
        assert!(started.elapsed() < deadline + BOUND);
        assert!(matches!(error, CollectiveError::Blocked { .. }), "{error:?}");
    }
}

#[test]
fn an_abort_ends_forming_in_every_state() {
    for (device, faults) in [(14, "init-hangs"), (15, "init-blocks")] {
        let abort = AbortHandle::new();
        let error = thread::scope(|scope| {
            scope.spawn(abort_in_time(device, abort.clone()));
            alone_on(device, faults, abort, PATIENT).expect_err("aborted")
        });
        assert_eq!(error.to_string(), "collective aborted: generation revoked", "{faults}");
    }
}

#[test]
fn what_an_aborted_operation_left_is_not_read() {
    let mut member = member_on(16, "op-hangs@1");
    let (mut buffer, abort) = ([7; 1000], member.abort_handle());
    let error = thread::scope(|scope| {
        scope.spawn(abort_in_time(16, abort));
        member.all_reduce_i64(&mut buffer, PATIENT).expect_err("aborted")
    });
    assert_eq!(error.to_string(), "collective aborted: generation revoked");
    assert_eq!(buffer, [7; 1000]);
    member.leave().expect("NCCL lets go");
}

#[test]
fn an_abort_lets_go_of_a_devices_buffer() {
    let mut member = member_on(17, "op-hangs@1");
    let (device, abort) = (setup(17).device, member.abort_handle());
    let stream = Stream::new(&device).unwrap();
    let mut buffer = DeviceBuffer::new(&device, 800).unwrap();
    let error = thread::scope(|scope| {
        scope.spawn(abort_in_time(17, abort));
        member.all_reduce_i64_there(&mut buffer, 100, &stream, PATIENT).expect_err("aborted")
    });
    assert_eq!(error.to_string(), "collective aborted: generation revoked");
    // Freeing it would not return if the device held it.
    drop(buffer);
}

#[test]
fn a_peer_that_dies_while_devices_work_is_named() {
    // NCCL notices the one, and only the connections tell of the other.
    for (first, faults) in [(18, ["", "op-hangs@1"]), (20, ["op-hangs@1", "op-hangs@1"])] {
        let members = connect_on(first, &bind(2), 1, PATIENT, |rank| faults[rank]);
        let mut members = members.into_iter().map(|member| member.expect("it forms"));
        let (mut survivor, mut dying) = (members.next().unwrap(), members.next().unwrap());
        let abort = dying.abort_handle();
        let error = thread::scope(|scope| {
            scope.spawn(abort_in_time(first + 1, abort));
            scope.spawn(move || {
                dying.all_reduce_i64(&mut [1; 1000], PATIENT).expect_err("it is aborted");
                drop(dying);
            });
            survivor.all_reduce_i64(&mut [1; 1000], PATIENT).expect_err("rank 1 died")
        });
        let lost = matches!(error, CollectiveError::PeerLost { rank: 1, op_seq: 1, .. });
        assert!(lost, "{error:?}");
        survivor.leave().expect("NCCL lets go");
    }
}
