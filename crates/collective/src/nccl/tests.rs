//! The conformance suite over the stand-in library, and faults that only NCCL has.

mod hangs;

use std::thread;
use std::time::{Duration, Instant};

use lacuna_cuda::{DeviceBuffer, PinnedBuffer, Stream};
use lacuna_nccl::NcclError;
use lacuna_nccl_standin::inject;

use super::{NcclCollective, NcclSetup};
use crate::conformance::{self, Members, on_each, wait_until};
use crate::tests::{bind, plan};
use crate::{AbortHandle, Collective, CollectiveError, Group, TrainerListener};

const PATIENT: Duration = Duration::from_secs(60);
const BRIEF: Duration = Duration::from_millis(300);
/// How long an abort may take here.
const PROMPT: Duration = Duration::from_secs(2);

fn setup(rank: usize) -> NcclSetup {
    let path = lacuna_nccl_standin::path();
    NcclSetup::open(rank as u32, Some(&path), Some(&path)).expect("the stand-in loads")
}

/// Connects all ranks of a new generation; `faults` gives each its faults.
fn connect_all(
    listeners: &[TrainerListener],
    generation: u64,
    deadline: Duration,
    faults: impl Fn(usize) -> &'static str,
) -> Vec<Result<NcclCollective, CollectiveError>> {
    connect_on(0, listeners, generation, deadline, faults)
}

/// The same on the devices from `first` on.
fn connect_on(
    first: usize,
    listeners: &[TrainerListener],
    generation: u64,
    deadline: Duration,
    faults: impl Fn(usize) -> &'static str,
) -> Vec<Result<NcclCollective, CollectiveError>> {
    let group = plan(listeners, generation);
    thread::scope(|scope| {
        let start = |(rank, listener)| {
            let (group, faults) = (Group { rank, ..group.clone() }, faults(rank));
            scope.spawn(move || {
                inject(faults);
                let (setup, abort) = (setup(first + rank), AbortHandle::new());
                NcclCollective::connect(listener, &group, &setup, abort, deadline)
            })
        };
        let threads: Vec<_> = listeners.iter().enumerate().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn group_with(world: usize, faults: impl Fn(usize) -> &'static str) -> Members {
    let members = connect_all(&bind(world), 1, PATIENT, faults);
    members.into_iter().map(|member| Box::new(member.unwrap()) as Box<dyn Collective>).collect()
}

fn group(world: usize) -> Members {
    group_with(world, |_| "")
}

#[test]
fn it_conforms() {
    conformance::run(group, &[1, 2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn the_survivors_form_the_next_generation_over_the_same_listeners() {
    let listeners = bind(3);
    let mut members = connect_all(&listeners, 1, PATIENT, |_| "");
    drop(members.pop());
    for member in &mut members {
        let member = member.as_mut().unwrap();
        member.barrier(PATIENT).expect_err("rank 2 left");
        member.leave().expect("NCCL lets go");
    }
    let mut members: Members = connect_all(&listeners[..2], 2, PATIENT, |_| "")
        .into_iter()
        .map(|member| Box::new(member.unwrap()) as Box<dyn Collective>)
        .collect();
    on_each(&mut members, |member| {
        let mut buffer = [member.rank() as i64 + 1; 3];
        member.all_reduce_i64(&mut buffer, PATIENT).unwrap();
        assert_eq!(buffer, [3; 3]);
    });
}

#[test]
fn a_rank_whose_nccl_does_not_get_ready_fails_and_so_do_the_others() {
    let members = connect_all(&bind(2), 1, BRIEF, |rank| if rank == 1 { "init-hangs" } else { "" });
    for (rank, member) in members.into_iter().enumerate() {
        let error = member.expect_err("rank 1 hangs");
        assert!(
            matches!(
                &error,
                CollectiveError::Nccl { op_seq: 0, source: NcclError::Timeout { .. } }
            ) || error.suspects() == [1 - rank],
            "{error:?}"
        );
    }
}

#[test]
fn a_rank_that_cannot_start_is_named_by_the_others() {
    let members =
        connect_all(&bind(3), 1, PATIENT, |rank| if rank == 1 { "init-error=2" } else { "" });
    for (rank, member) in members.into_iter().enumerate() {
        let error = member.expect_err("rank 1 fails");
        if rank == 1 {
            let CollectiveError::Nccl { op_seq: 0, source } = error else { panic!("{error:?}") };
            let text = "`ncclCommInitRankConfig` failed: unhandled system error: injected: init \
                        error";
            assert_eq!(source.to_string(), text);
        } else {
            assert_eq!(error.suspects(), [1], "rank {rank}: {error:?}");
        }
    }
}

#[test]
fn the_higher_rank_of_two_on_one_device_is_refused() {
    let listeners = bind(2);
    let group = plan(&listeners, 1);
    let connect = |rank: usize| {
        let (group, abort) = (Group { rank, ..group.clone() }, AbortHandle::new());
        let connected =
            NcclCollective::connect(&listeners[rank], &group, &setup(5), abort, PATIENT);
        connected.expect_err("they share a device")
    };
    let (first, second) = thread::scope(|scope| {
        let second = scope.spawn(|| connect(1));
        (connect(0), second.join().unwrap())
    });
    assert_eq!(first.suspects(), [1], "{first:?}");
    let text = second.to_string();
    assert!(text.starts_with("device 0000:05:00.0 of host "), "{text}");
    assert!(text.ends_with(" is used by rank 0 already"), "{text}");
}

#[test]
fn an_operation_that_hangs_on_a_device_times_out_and_is_abortable() {
    let mut members = group_with(2, |rank| if rank == 1 { "op-hangs@1" } else { "" });
    let started = Instant::now();
    let errors = on_each(&mut members, |member| {
        member.all_reduce_i64(&mut [1; 1000], BRIEF).expect_err("rank 1's device hangs")
    });
    assert!(started.elapsed() < BRIEF + PROMPT);
    let timed_out =
        |error: &CollectiveError| matches!(error, CollectiveError::Timeout { op_seq: 1, .. });
    assert!(errors.iter().any(timed_out), "{errors:?}");
    for error in errors {
        // Whoever is out of time first hangs up, which the other may hear before it is so itself.
        let heard = matches!(error, CollectiveError::Nccl { op_seq: 1, .. });
        assert!(timed_out(&error) || heard, "{error:?}");
        // All have entered: nobody is to be named.
        assert!(error.suspects().is_empty());
    }
    members.iter_mut().for_each(|member| member.leave().expect("NCCL lets go"));
}

#[test]
fn a_call_that_does_not_return_is_ended_by_an_abort() {
    let mut members = group_with(1, |_| "op-blocks@1");
    let member = &mut members[0];
    let (abort, ledger) = (member.abort_handle(), member.ledger());
    let error = thread::scope(|scope| {
        scope.spawn(move || {
            wait_until("the call is made", || ledger.read().in_progress);
            abort.abort("generation revoked");
        });
        member.all_reduce_i64(&mut [1], PATIENT).expect_err("aborted")
    });
    assert_eq!(error.to_string(), "collective aborted: generation revoked");
    member.leave().expect("NCCL lets go");
}

#[test]
fn a_failure_in_the_background_carries_nccls_words_and_names_nobody() {
    let mut members = group_with(2, |rank| if rank == 0 { "op-fails@2=3" } else { "" });
    let errors = on_each(&mut members, |member| {
        member.all_reduce_i64(&mut [1; 8], PATIENT).expect("the first operation is well");
        let failed = member.all_reduce_i64(&mut [1; 8], BRIEF);
        (member.rank() == 0).then(|| failed.expect_err("injected"))
    });
    let error = errors[0].as_ref().expect("rank 0 failed");
    let CollectiveError::Nccl { op_seq: 2, source } = error else { panic!("{error:?}") };
    assert!(source.to_string().ends_with("injected: operation 2 fails"), "{source}");
    assert!(!error.ends_process(), "another communicator may work");
}

#[test]
fn a_call_that_fails_carries_nccls_words() {
    let mut members = group_with(1, |_| "op-error@1=1");
    let error = members[0].all_reduce_f32(&mut [1.0], PATIENT).expect_err("injected");
    assert!(error.ends_process(), "CUDA failed inside NCCL: {error:?}");
    let CollectiveError::Nccl { op_seq: 1, source } = error else { panic!("{error:?}") };
    let text = "`ncclAllReduce` failed: unhandled cuda error: injected: call of operation 1";
    assert_eq!(source.to_string(), text);
}

#[test]
fn an_abort_that_hangs_costs_the_process() {
    let mut members = group_with(1, |_| "abort-hangs");
    members[0].all_reduce_i64(&mut [1], PATIENT).unwrap();
    let error = members[0].leave().expect_err("it hangs");
    assert!(error.ends_process() && matches!(error, CollectiveError::Stuck { .. }), "{error:?}");
    let later = members[0].barrier(PATIENT).expect_err("it is left");
    assert!(matches!(later, CollectiveError::Stuck { .. }), "{later:?}");
}

#[test]
fn setups_say_what_is_missing() {
    use std::path::Path;
    let path = lacuna_nccl_standin::path();
    let nowhere = Path::new("/nowhere.so");
    let no_driver = NcclSetup::open(0, Some(&path), Some(nowhere)).expect_err("no driver");
    assert_eq!(no_driver.to_string(), "device cuda0 cannot be used");
    let no_device = NcclSetup::open(99, Some(&path), Some(&path)).expect_err("no device 99");
    assert_eq!(no_device.to_string(), "device cuda99 cannot be used");
    let no_nccl = NcclSetup::open(0, Some(nowhere), Some(&path)).expect_err("no NCCL");
    assert_eq!(no_nccl.to_string(), "NCCL cannot be used");
    let there = NcclSetup::open(1, Some(&path), Some(&path)).unwrap().describe();
    assert_eq!(there, format!("NCCL 2.28.9 (`{}`), cuda1", path.display()));
}

/// NCCL would wait for ever: the one sum comes in pieces, and the other in one.
#[test]
fn a_sum_on_devices_and_one_of_hosts_do_not_meet() {
    let mut members = group(2);
    let errors = on_each(&mut members, |member| {
        let device = setup(member.rank()).device;
        let stream = Stream::new(&device).unwrap();
        let mut buffer = DeviceBuffer::new(&device, 800).unwrap();
        let done = match member.rank() {
            0 => member.all_reduce_i64(&mut [0; 100], PATIENT),
            _ => {
                let there = member.on_device().expect("NCCL sums on devices");
                there.all_reduce_i64_there(&mut buffer, 100, &stream, PATIENT)
            }
        };
        done.expect_err("they are different operations")
    });
    for error in errors {
        assert!(matches!(error, CollectiveError::Mismatch { .. }), "{error}");
    }
}

#[test]
fn buffers_of_a_device_are_summed_where_they_are() {
    let mut members = group(3);
    on_each(&mut members, |member| {
        let rank = member.rank();
        let device = setup(rank).device;
        let (stream, n) = (Stream::new(&device).unwrap(), 1_000);
        let mut host = PinnedBuffer::new(&device, n * 8).unwrap();
        let mut buffer = DeviceBuffer::new(&device, n * 8).unwrap();
        let values: Vec<i64> = (0..n as i64).map(|idx| (rank as i64 + 1) * (idx - 500)).collect();
        host.bytes_mut().copy_from_slice(bytemuck::cast_slice(&values));
        // SAFETY: the sum follows the copy, and the buffers outlive both.
        unsafe { buffer.load(&host, n * 8, &stream) }.unwrap();
        let there = member.on_device().expect("NCCL sums on devices");
        there.all_reduce_i64_there(&mut buffer, n, &stream, PATIENT).unwrap();
        // SAFETY: nothing else uses the buffers; the loop below waits.
        unsafe { buffer.store(&mut host, n * 8, &stream) }.unwrap();
        wait_until("the copy is back", || stream.is_idle().unwrap());
        let sums: &[i64] = bytemuck::cast_slice(host.bytes());
        assert!(sums.iter().enumerate().all(|(idx, sum)| *sum == 6 * (idx as i64 - 500)));
        assert_eq!(member.ledger().read().op_seq, 1);
        // The host's entry goes on in the same count.
        member.all_reduce_i64(&mut [1], PATIENT).unwrap();
        assert_eq!(member.ledger().read().op_seq, 2);
    });
}

#[test]
fn a_fault_lets_go_of_a_devices_buffer() {
    let mut members = group_with(2, |rank| if rank == 1 { "op-hangs@1" } else { "" });
    let errors = on_each(&mut members, |member| {
        let device = setup(member.rank()).device;
        let stream = Stream::new(&device).unwrap();
        let mut buffer = DeviceBuffer::new(&device, 800).unwrap();
        let there = member.on_device().expect("NCCL sums on devices");
        let error = there.all_reduce_i64_there(&mut buffer, 100, &stream, BRIEF);
        // Freeing it would not return if the device held it.
        drop(buffer);
        error.expect_err("rank 1's device hangs")
    });
    // Both have one deadline. Whoever is second to see it may see first that the other has left.
    let timed_out = |e: &CollectiveError| matches!(e, CollectiveError::Timeout { op_seq: 1, .. });
    let left = |e: &CollectiveError| matches!(e, CollectiveError::Nccl { op_seq: 1, .. });
    assert!(errors.iter().any(timed_out), "{errors:?}");
    assert!(errors.iter().all(|error| timed_out(error) || left(error)), "{errors:?}");
}
