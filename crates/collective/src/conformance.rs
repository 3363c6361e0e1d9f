//! The contract of [`Collective`] as tests, for every implementation.
//!
//! `make_group(world)` returns the members of a fresh group, in rank order; every check makes its
//! own. Ranks are threads. A violated guarantee panics with what was expected.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use crate::{AbortHandle, Collective, CollectiveError, OpLedger};

/// The members of a group, in rank order.
pub type Members = Vec<Box<dyn Collective>>;

/// Deadline of operations that must succeed: long, because test machines are busy.
const PATIENT: Duration = Duration::from_secs(60);
/// Deadline of operations that must time out.
/// Ranks enter within it of each other, also on a busy machine.
const BRIEF: Duration = Duration::from_millis(500);
/// How late a call may return after its deadline or an abort: on a busy machine far above what it
/// takes, and far below [`PATIENT`].
const SLACK: Duration = Duration::from_secs(10);
/// Nothing, fewer elements than ranks, primes around the cuts, and several chunks.
const LENGTHS: [usize; 6] = [0, 1, 2, 7, 1_009, 1_000_000];

/// Runs every check in each of `worlds`, and those of unusual buffers in worlds of 2 and 3.
pub fn run(make_group: impl Fn(usize) -> Members, worlds: &[usize]) {
    for &world in worlds {
        sums_and_copies(&make_group, world, &LENGTHS);
        failures(&make_group, world);
    }
    // What a call does with no bytes, or with more than are on their way at once, does not depend
    // on how many ranks there are.
    for n in [0, 1_000_000] {
        a_late_rank_is_named(&make_group, 3, n);
    }
    for n in [1, 1_000_000] {
        an_abort_wakes_a_blocked_call(&make_group, 2, n);
    }
    for lengths in [[0, 1, 1], [100_000, 400_000, 400_000]] {
        different_lengths_are_detected(&make_group, &lengths);
    }
    a_thread_may_take_over(&make_group);
}

/// Checks everything that ends a group of `world` members; alone, what needs no peer.
pub fn failures(make_group: &impl Fn(usize) -> Members, world: usize) {
    an_abort_before_the_call_fails_it(make_group, world);
    the_ledger_follows(make_group, world);
    if world == 1 {
        return;
    }
    a_late_rank_is_named(make_group, world, 3);
    an_abort_wakes_a_blocked_call(make_group, world, 500_000);
    an_abort_of_an_idle_rank_is_noticed(make_group, world);
    a_departed_peer_is_named(make_group, world);
    let mut lengths: Vec<usize> = vec![5; world];
    lengths[world - 1] = 6;
    different_lengths_are_detected(make_group, &lengths);
    different_kinds_are_detected(make_group, world);
}

/// Checks all operations that succeed, over one group, with buffers of `lengths` elements.
pub fn sums_and_copies(make_group: &impl Fn(usize) -> Members, world: usize, lengths: &[usize]) {
    let mut members: Members = make_group(world);
    for (rank, member) in members.iter().enumerate() {
        assert_eq!((member.rank(), member.world()), (rank, world));
    }
    let results = on_each(&mut members, |member| {
        for &n in lengths {
            check_i64_sum(member, n)?;
            check_i32_sum(member, n)?;
            check_broadcasts(member, n)?;
        }
        member.barrier(PATIENT)?;
        lengths.iter().map(|&n| f32_sum(member, n)).collect::<Result<Vec<_>, _>>()
    });
    let sums: Vec<Vec<Vec<f32>>> =
        results.into_iter().map(|result| result.expect("no fault was injected")).collect();
    let to_bits = |sum: &Vec<f32>| sum.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
    for (idx, &n) in lengths.iter().enumerate() {
        for sum in &sums[1..] {
            let same = to_bits(&sum[idx]) == to_bits(&sums[0][idx]);
            assert!(same, "f32 sums of {n} elements differ between ranks of world {world}");
        }
        check_f32_values(&sums[0][idx], world);
    }
}

/// Contribution of `rank` at element `idx`: distinct, signed, and large enough to need 64 bits.
fn i64_value(rank: usize, idx: usize) -> i64 {
    let mixed = (idx as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (rank as u64) << 17;
    (mixed.wrapping_mul(0xd6e8_feb8_6659_fd93) as i64) >> 8
}

/// Contribution of `rank` at element `idx`, of many magnitudes, so that order shows in the bits.
fn f32_value(rank: usize, idx: usize) -> f32 {
    let mantissa = (i64_value(rank, idx) % 1_000_003) as f32;
    mantissa * ((idx % 40) as f32 - 20.0).exp2()
}

fn check_i64_sum(member: &mut dyn Collective, n: usize) -> Result<(), CollectiveError> {
    let (rank, world) = (member.rank(), member.world());
    let mut buffer: Vec<i64> = (0..n).map(|idx| i64_value(rank, idx)).collect();
    member.all_reduce_i64(&mut buffer, PATIENT)?;
    for (idx, sum) in buffer.iter().enumerate() {
        let expected: i64 = (0..world).map(|rank| i64_value(rank, idx)).sum();
        assert_eq!(*sum, expected, "i64 sum, element {idx} of {n}, rank {rank} of {world}");
    }
    Ok(())
}

fn check_i32_sum(member: &mut dyn Collective, n: usize) -> Result<(), CollectiveError> {
    let (rank, world) = (member.rank(), member.world());
    let value = |rank: usize, idx: usize| i64_value(rank, idx) as i32;
    let mut buffer: Vec<i32> = (0..n).map(|idx| value(rank, idx)).collect();
    member.all_reduce_i32(&mut buffer, PATIENT)?;
    for (idx, sum) in buffer.iter().enumerate() {
        let expected = (0..world).map(|rank| value(rank, idx)).fold(0, i32::wrapping_add);
        assert_eq!(*sum, expected, "i32 sum, element {idx} of {n}, rank {rank} of {world}");
    }
    Ok(())
}

fn f32_sum(member: &mut dyn Collective, n: usize) -> Result<Vec<f32>, CollectiveError> {
    let rank: usize = member.rank();
    let mut buffer: Vec<f32> = (0..n).map(|idx| f32_value(rank, idx)).collect();
    member.all_reduce_f32(&mut buffer, PATIENT)?;
    Ok(buffer)
}

fn check_f32_values(sums: &[f32], world: usize) {
    for (idx, sum) in sums.iter().enumerate() {
        let values = || (0..world).map(|rank| f64::from(f32_value(rank, idx)));
        let (exact, scale) = (values().sum::<f64>(), values().map(f64::abs).sum::<f64>());
        // Any order of additions: half a unit in the last place of the scale for each.
        let tolerance: f64 = world as f64 * scale * f64::from(f32::EPSILON);
        let error: f64 = (f64::from(*sum) - exact).abs();
        assert!(error <= tolerance, "f32 sum, element {idx}, world {world}: {sum} for {exact}");
    }
}

fn check_broadcasts(member: &mut dyn Collective, n: usize) -> Result<(), CollectiveError> {
    let value = |rank: usize, idx: usize| (i64_value(rank, idx) >> 20) as u8;
    for root in 0..member.world() {
        let rank: usize = member.rank();
        let mut bytes: Vec<u8> = (0..n).map(|idx| value(rank, idx)).collect();
        member.broadcast(root, &mut bytes, PATIENT)?;
        let is_copy = bytes.iter().enumerate().all(|(idx, byte)| *byte == value(root, idx));
        assert!(is_copy, "broadcast of {n} bytes from rank {root}, seen by rank {rank}");
    }
    Ok(())
}

/// When one rank does not join an operation, the others name it at their deadline.
pub fn a_late_rank_is_named(make_group: &impl Fn(usize) -> Members, world: usize, n: usize) {
    let mut members: Members = make_group(world);
    let late: usize = world - 1;
    // Their deadlines begin together, however long the machine takes to start their threads.
    let together = Barrier::new(late);
    let errors = on_each(&mut members[..late], |member| {
        let mut buffer: Vec<i64> = vec![1; n];
        together.wait();
        let started = Instant::now();
        let result = member.all_reduce_i64(&mut buffer, BRIEF);
        let took: Duration = started.elapsed();
        let error = result.expect_err("the last rank never joins");
        assert!(took >= BRIEF, "a deadline was cut short: {took:?}, {error}");
        assert!(took < BRIEF + SLACK, "a deadline was missed: {took:?}, {error}");
        error
    });
    for error in &errors {
        assert!(
            matches!(
                error,
                CollectiveError::Timeout { op_seq: 1, waiting_for } if *waiting_for == [late]
            ),
            "expected a timeout that names rank {late}, got: {error}"
        );
    }
    check_comes_too_late(&mut *members[late], n);
    check_over(&mut members);
}

/// An abort from another thread ends a blocked call within [`SLACK`], and the others, blocked in
/// the same operation, name the rank that it cut off.
pub fn an_abort_wakes_a_blocked_call(
    make_group: &impl Fn(usize) -> Members,
    world: usize,
    n: usize,
) {
    // The last rank never joins, so nobody can complete; the one before is cut off in the middle.
    let mut members: Members = make_group(world);
    let (late, cut_off) = (world - 1, world - 2);
    let abort: AbortHandle = members[cut_off].abort_handle();
    let mut errors = interrupted(
        &mut members[..late],
        |member| member.all_reduce_i64(&mut vec![1; n], PATIENT),
        move || {
            abort.abort("generation revoked");
            abort.abort("a second reason");
        },
    );
    check_aborted(Err(errors.pop().expect("one rank at least ran")), "generation revoked");
    check_lost(&errors, cut_off);
    check_comes_too_late(&mut *members[late], n);
    check_over(&mut members);
}

/// An aborted communicator does nothing any more, even alone.
pub fn an_abort_before_the_call_fails_it(make_group: &impl Fn(usize) -> Members, world: usize) {
    let mut members: Members = make_group(world);
    on_each(&mut members, |member| {
        member.abort_handle().abort("drained");
        check_aborted(member.barrier(PATIENT), "drained");
    });
    check_over(&mut members);
}

/// After an abort between two operations the rank says so in its next one, and the others name it.
pub fn an_abort_of_an_idle_rank_is_noticed(make_group: &impl Fn(usize) -> Members, world: usize) {
    let mut members: Members = make_group(world);
    on_each(&mut members, |member| member.barrier(PATIENT).expect("no fault was injected"));
    members[0].abort_handle().abort("drained");
    let started = Instant::now();
    let errors = on_each(&mut members, |member| {
        member.all_reduce_i64(&mut [1; 1_000], PATIENT).expect_err("rank 0 was aborted")
    });
    let took: Duration = started.elapsed();
    assert!(took < SLACK, "an abort was noticed after {took:?}");
    check_aborted(Err(errors[0].clone()), "drained");
    check_lost(&errors[1..], 0);
    check_over(&mut members);
}

/// When a peer leaves while others wait in an operation, they name it.
pub fn a_departed_peer_is_named(make_group: &impl Fn(usize) -> Members, world: usize) {
    let mut members: Members = make_group(world);
    let leaver = members.pop().expect("the group has members");
    let errors = interrupted(
        &mut members,
        |member| member.all_reduce_f32(&mut vec![1.0; 500_000], PATIENT),
        move || drop(leaver),
    );
    check_lost(&errors, world - 1);
    check_over(&mut members);
}

/// Buffers of different lengths, one for each rank, fail on every rank, with both sizes.
pub fn different_lengths_are_detected(make_group: &impl Fn(usize) -> Members, lengths: &[usize]) {
    let mut members: Members = make_group(lengths.len());
    let errors = on_each(&mut members, |member| {
        let n: usize = lengths[member.rank()];
        member.all_reduce_i64(&mut vec![1; n], PATIENT).expect_err("the lengths differ")
    });
    for (rank, error) in errors.iter().enumerate() {
        let CollectiveError::Mismatch { rank: other, ours, theirs } = error else {
            panic!("expected a mismatch, got: {error}");
        };
        assert_eq!(ours.bytes, 8 * lengths[rank] as u64);
        assert_eq!(theirs.bytes, 8 * lengths[*other] as u64);
    }
    check_over(&mut members);
}

/// Different operations, and broadcasts from different roots, fail on every rank.
pub fn different_kinds_are_detected(make_group: &impl Fn(usize) -> Members, world: usize) {
    let mut members: Members = make_group(world);
    let errors = on_each(&mut members, |member| match member.rank() {
        0 => member.all_reduce_i64(&mut [1, 2], PATIENT).expect_err("the kinds differ"),
        _ => member.all_reduce_f32(&mut [1.0; 4], PATIENT).expect_err("the kinds differ"),
    });
    check_mismatch(&errors);
    check_over(&mut members);
    let mut members: Members = make_group(world);
    let errors = on_each(&mut members, |member| {
        let root: usize = member.rank();
        member.broadcast(root, &mut [0; 9], PATIENT).expect_err("the roots differ")
    });
    check_mismatch(&errors);
    check_over(&mut members);
}

/// The ledger counts operations from 1 and keeps a failed one in progress.
pub fn the_ledger_follows(make_group: &impl Fn(usize) -> Members, world: usize) {
    let mut members: Members = make_group(world);
    let read = |ledger: &OpLedger| (ledger.read().op_seq, ledger.read().in_progress);
    let results = on_each(&mut members, |member| {
        let ledger: OpLedger = member.ledger();
        assert_eq!(read(&ledger), (0, false));
        member.barrier(PATIENT)?;
        assert_eq!(read(&ledger), (1, false));
        member.all_reduce_i64(&mut [1], PATIENT)?;
        assert_eq!(read(&ledger), (2, false));
        Ok::<(), CollectiveError>(())
    });
    results.into_iter().for_each(|result| result.expect("no fault was injected"));
    // Only once all are through: an abort may cut off a peer that is still in the operation.
    on_each(&mut members, |member| {
        member.abort_handle().abort("the test is over");
        check_aborted(member.barrier(PATIENT), "the test is over");
        assert_eq!(read(&member.ledger()), (3, true));
    });
    check_over(&mut members);
}

/// Where the implementation says so, calls come from one thread and then from another.
pub fn a_thread_may_take_over(make_group: &impl Fn(usize) -> Members) {
    let mut members: Members = make_group(2);
    let results = on_each(&mut members, |member| {
        if !member.may_change_threads() {
            return Ok([2, 4]);
        }
        let mut sums = [1, 2];
        member.all_reduce_i64(&mut sums[..1], PATIENT)?;
        let (there, later) = (&mut *member, &mut sums[1..]);
        let done = thread::scope(|scope| {
            scope.spawn(move || there.all_reduce_i64(later, PATIENT)).join().expect("no panic")
        });
        done?;
        member.barrier(PATIENT)?;
        Ok::<[i64; 2], CollectiveError>(sums)
    });
    for sums in results {
        assert_eq!(sums.expect("no fault was injected"), [2, 4]);
    }
}

/// Runs `work` on every member, each in its own thread; returns the results in order.
///
/// Members outlive the work of all, so that a rank's fault is its own and not a neighbour's exit.
pub fn on_each<T: Send>(
    members: &mut [Box<dyn Collective>],
    work: impl Fn(&mut dyn Collective) -> T + Sync,
) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let start = |member: &'_ mut Box<dyn Collective>| work(&mut **member);
        let threads: Vec<_> =
            members.iter_mut().map(|member| scope.spawn(move || start(member))).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, T>| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        threads.into_iter().map(join).collect()
    })
}

/// Runs an operation that cannot complete on all `members`, and `event` once all are in it.
///
/// Returns their errors, which have to come within [`SLACK`] of the event.
fn interrupted(
    members: &mut [Box<dyn Collective>],
    operation: impl Fn(&mut dyn Collective) -> Result<(), CollectiveError> + Sync,
    event: impl FnOnce() + Send,
) -> Vec<CollectiveError> {
    let ledgers: Vec<OpLedger> = members.iter().map(|member| member.ledger()).collect();
    thread::scope(|scope| {
        let happens = scope.spawn(move || {
            let all_entered = || ledgers.iter().all(|ledger| ledger.read().in_progress);
            wait_until("all ranks are in their call", all_entered);
            event();
            Instant::now()
        });
        let errors = on_each(members, |member| {
            operation(member).expect_err("the operation cannot complete")
        });
        let returned = Instant::now();
        let happened: Instant = happens.join().expect("the event does not panic");
        let late: Duration = returned.saturating_duration_since(happened);
        assert!(late < SLACK, "a call returned {late:?} after what ended it");
        errors
    })
}

/// Waits for a condition; panics with `what` if it does not come true.
pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENT;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        thread::yield_now();
    }
}

fn check_aborted(result: Result<(), CollectiveError>, expected: &str) {
    match result {
        Err(CollectiveError::Aborted { reason }) => assert_eq!(reason, expected),
        Err(error) => panic!("expected an abort, got: {error}"),
        Ok(()) => panic!("expected an abort, but the call succeeded"),
    }
}

fn check_lost(errors: &[CollectiveError], expected: usize) {
    for error in errors {
        assert!(
            matches!(error, CollectiveError::PeerLost { rank, .. } if *rank == expected),
            "expected the loss of rank {expected}, got: {error}"
        );
        assert_eq!(error.suspects(), [expected]);
    }
}

fn check_mismatch(errors: &[CollectiveError]) {
    for error in errors {
        let is_mismatch = matches!(error, CollectiveError::Mismatch { .. });
        assert!(is_mismatch, "expected a mismatch, got: {error}");
    }
}

/// Checks that a rank which joins after the others gave up fails within its own deadline.
fn check_comes_too_late(member: &mut dyn Collective, n: usize) {
    let started = Instant::now();
    // It may complete the operation that failed for them, for want of bytes, but not the next.
    let joined = member.all_reduce_i64(&mut vec![1; n], BRIEF);
    joined.and_then(|()| member.barrier(BRIEF)).expect_err("the others gave up");
    let took: Duration = started.elapsed();
    assert!(took < 2 * BRIEF + SLACK, "a rank that came too late waited for {took:?}");
}

/// Checks that all members are dead, and that each can be left and stays dead.
fn check_over(members: &mut [Box<dyn Collective>]) {
    on_each(members, |member| {
        check_dead(member);
        let started = Instant::now();
        member.leave().expect("a dead communicator lets go");
        assert!(started.elapsed() < SLACK, "leaving blocked");
        check_dead(member);
    });
}

/// Checks that every call of a failed communicator repeats the first fault at once.
fn check_dead(member: &mut dyn Collective) {
    let started = Instant::now();
    let first: String = member.barrier(PATIENT).expect_err("the communicator is dead").to_string();
    let later = [
        member.all_reduce_i64(&mut [1], PATIENT),
        member.all_reduce_f32(&mut [1.0], PATIENT),
        member.broadcast(0, &mut [1], PATIENT),
        member.barrier(PATIENT),
    ];
    for result in later {
        let error = result.expect_err("the communicator is dead");
        assert_eq!(error.to_string(), first);
    }
    assert!(started.elapsed() < SLACK, "a dead communicator blocked");
}
