use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::conformance::{self, Members, on_each, wait_until};
use crate::tests::{any_port, bind, plan};
use crate::{
    AbortHandle, BindError, Collective, CollectiveError, Exposure, Group, Refusal, TcpCollective,
    TrainerListener,
};

const PATIENT: Duration = Duration::from_secs(60);
const BRIEF: Duration = Duration::from_millis(300);

fn connect(
    listener: &TrainerListener,
    group: &Group,
    deadline: Duration,
) -> Result<TcpCollective, CollectiveError> {
    TcpCollective::connect(listener, group, AbortHandle::new(), deadline)
}

/// Connects all ranks of `group`, each as changed by `change`.
fn connect_all(
    listeners: &[TrainerListener],
    group: &Group,
    deadline: Duration,
    change: impl Fn(&mut Group) + Sync,
) -> Vec<Result<TcpCollective, CollectiveError>> {
    thread::scope(|scope| {
        let start = |(rank, listener)| {
            let mut group = Group { rank, ..group.clone() };
            change(&mut group);
            scope.spawn(move || connect(listener, &group, deadline))
        };
        let threads: Vec<_> = listeners.iter().enumerate().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn boxed(member: Result<TcpCollective, CollectiveError>) -> Box<dyn Collective> {
    Box::new(member.unwrap())
}

fn form(listeners: &[TrainerListener], generation: u64) -> Members {
    let group = plan(listeners, generation);
    connect_all(listeners, &group, PATIENT, |_| ()).into_iter().map(boxed).collect()
}

fn make_group(world: usize) -> Members {
    form(&bind(world), 1)
}

fn check_sum(members: &mut Members) {
    let world = members.len() as i64;
    let sums = on_each(members, |member| {
        let mut buffer = [member.rank() as i64, 1];
        member.all_reduce_i64(&mut buffer, PATIENT).unwrap();
        buffer
    });
    assert!(sums.iter().all(|sum| *sum == [world * (world - 1) / 2, world]));
}

/// Members that share no memory although they could.
fn make_group_of_sockets(world: usize) -> Members {
    let one = |_| TrainerListener::bind(any_port(), Some(any_port()), Exposure::Loopback).unwrap();
    let listeners: Vec<TrainerListener> = (0..world).map(one).collect();
    form(&listeners, 1)
}

/// Every other member shares memory, so that each has links of both kinds.
fn make_mixed_group(world: usize) -> Members {
    let elsewhere = |rank: usize| (rank % 2 == 1).then(any_port);
    let one = |rank| TrainerListener::bind(any_port(), elsewhere(rank), Exposure::Loopback);
    let listeners: Vec<TrainerListener> = (0..world).map(|rank| one(rank).unwrap()).collect();
    form(&listeners, 1)
}

#[test]
fn conforms_in_worlds_up_to_five() {
    conformance::run(make_group, &[1, 2, 3, 4, 5]);
}

#[test]
fn conforms_through_sockets() {
    conformance::run(make_group_of_sockets, &[2, 3, 5]);
}

#[test]
fn conforms_through_both() {
    conformance::run(make_mixed_group, &[3, 4]);
    conformance::sums_and_copies(&make_mixed_group, 5, &[0, 5, 1_009, 200_000]);
}

/// What a machine's members have in common is used, unless one of them is reached elsewhere.
#[test]
fn memory_is_shared_where_both_ends_want_it() {
    let shared = |elsewhere: [bool; 2]| -> [bool; 2] {
        let one = |elsewhere: bool| {
            TrainerListener::bind(any_port(), elsewhere.then(any_port), Exposure::Loopback).unwrap()
        };
        let listeners = elsewhere.map(one);
        let members = connect_all(&listeners, &plan(&listeners, 1), PATIENT, |_| ());
        let shares: Vec<bool> = members.into_iter().map(|m| m.unwrap().shares_memory()).collect();
        [shares[0], shares[1]]
    };
    if crate::rings::tests::pair().is_some() {
        assert_eq!(shared([false, false]), [true, true]);
    }
    for elsewhere in [[true, false], [false, true], [true, true]] {
        assert_eq!(shared(elsewhere), [false, false], "{elsewhere:?}");
    }
}

/// Segments of i64 are longer than a chunk in all of them.
#[test]
fn conforms_in_worlds_of_six_to_eight() {
    for world in [6, 7, 8] {
        conformance::sums_and_copies(&make_group, world, &[0, 5, 1_009, 400_000]);
        conformance::failures(&make_group, world);
    }
}

#[test]
fn operations_follow_each_other_without_rest() {
    let mut members = make_group(3);
    on_each(&mut members, |member| {
        for n in 0..300_usize {
            let mut buffer = vec![1_i64; n * n % 1_000];
            member.all_reduce_i64(&mut buffer, PATIENT).unwrap();
            assert!(buffer.iter().all(|sum| *sum == 3));
            member.broadcast(n % 3, &mut [0; 40], PATIENT).unwrap();
        }
    });
}

#[test]
fn twenty_generations_over_the_same_listeners() {
    let listeners = bind(3);
    for generation in 1..=20 {
        // Survivors change places, and each third generation is smaller.
        let n = if generation % 3 == 0 { 2 } else { 3 };
        let mut members = form(&listeners[..n], generation);
        check_sum(&mut members);
        if generation % 2 == 0 {
            members[0].abort_handle().abort("revoked");
        }
    }
}

#[test]
fn members_of_the_old_generation_do_not_disturb_the_new_one() {
    let listeners = bind(3);
    let (old, new) = (plan(&listeners, 4), plan(&listeners, 5));
    let abort = AbortHandle::new();
    thread::scope(|scope| {
        let stuck = scope.spawn(|| {
            let group = Group { rank: 2, ..old };
            TcpCollective::connect(&listeners[2], &group, abort.clone(), PATIENT)
        });
        let ahead: Vec<_> = (0..2)
            .map(|rank| {
                let group = Group { rank, ..new.clone() };
                let listener = &listeners[rank];
                scope.spawn(move || connect(listener, &group, PATIENT))
            })
            .collect();
        abort.abort("generation 4 was revoked");
        let error = stuck.join().unwrap().unwrap_err();
        assert!(matches!(error, CollectiveError::Aborted { .. }), "{error}");
        let group = Group { rank: 2, ..new.clone() };
        let last = connect(&listeners[2], &group, PATIENT);
        let mut members: Members =
            ahead.into_iter().map(|thread| boxed(thread.join().unwrap())).collect();
        members.push(boxed(last));
        check_sum(&mut members);
    });
}

#[test]
fn strangers_do_not_disturb_a_forming_group() {
    let listeners = bind(2);
    let addr = listeners[0].advertised();
    let dial = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(addr).unwrap();
        stream.write_all(bytes).unwrap();
        stream.set_read_timeout(Some(PATIENT)).unwrap();
        stream
    };
    let silent = dial(b"");
    let mut garbage = dial(&[b'x'; 500]);
    let partial = dial(b"lacunaC\x01 and no more");
    let gone = dial(b"lacuna");
    drop(gone);
    let (intruder, old) = (plan(&listeners, 1), plan(&listeners, 0));
    let intruder_listener = bind(1).remove(0);
    thread::scope(|scope| {
        let wrong_key = scope.spawn(|| {
            let group = Group { rank: 1, key: [0; 32], ..intruder };
            connect(&intruder_listener, &group, PATIENT)
        });
        let abort = AbortHandle::new();
        let wrong_generation = scope.spawn({
            let (abort, listener) = (abort.clone(), bind(1).remove(0));
            let group = Group { rank: 1, ..old };
            move || TcpCollective::connect(&listener, &group, abort, PATIENT)
        });
        let started = Instant::now();
        let rank_0 = scope.spawn(|| connect(&listeners[0], &plan(&listeners, 1), PATIENT));
        let error = wrong_key.join().unwrap().unwrap_err();
        let reason = Refusal::WrongKey;
        assert!(
            matches!(&error, CollectiveError::Handshake { rank: 0, reason: r, .. } if *r == reason),
            "{error}"
        );
        let group = Group { rank: 1, ..plan(&listeners, 1) };
        let rank_1 = connect(&listeners[1], &group, PATIENT);
        let mut members: Members = vec![boxed(rank_0.join().unwrap()), boxed(rank_1)];
        // Well below the deadline of one silent handshake, which nobody had to wait for.
        assert!(started.elapsed() < Duration::from_secs(4), "strangers delayed the group");
        check_sum(&mut members);
        abort.abort("the test is over");
        let error = wrong_generation.join().unwrap().unwrap_err();
        assert!(matches!(error, CollectiveError::Aborted { .. }), "{error}");
    });
    let end = garbage.read(&mut [0; 8]);
    let is_closed = match &end {
        Ok(n) => *n == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    };
    assert!(is_closed, "garbage was not answered by closing: {end:?}");
    drop((silent, partial));
}

#[test]
fn a_crowd_of_silent_strangers_is_bounded() {
    let listeners = bind(2);
    let addr = listeners[0].advertised();
    thread::scope(|scope| {
        let rank_0 = scope.spawn(|| connect(&listeners[0], &plan(&listeners, 1), PATIENT));
        let crowd: Vec<TcpStream> = (0..200).map(|_| TcpStream::connect(addr).unwrap()).collect();
        let group = Group { rank: 1, ..plan(&listeners, 1) };
        let rank_1 = connect(&listeners[1], &group, PATIENT);
        let mut members: Members = vec![boxed(rank_0.join().unwrap()), boxed(rank_1)];
        check_sum(&mut members);
        drop(crowd);
    });
}

#[test]
fn a_wrong_key_names_the_rank() {
    let listeners = bind(2);
    let group = plan(&listeners, 1);
    let mut results =
        connect_all(&listeners, &group, BRIEF, |group| group.key[0] = group.rank as u8);
    let error = results.pop().unwrap().unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("handshake with rank 0 at {} failed: the generation keys differ", group.members[0])
    );
    let error = results.pop().unwrap().unwrap_err();
    assert!(matches!(error, CollectiveError::NotFormed { .. }), "{error}");
    assert_eq!(error.suspects(), [1]);
}

#[test]
fn missing_members_are_named_with_the_last_thing_that_happened() {
    let listeners = bind(4);
    let mut group = Group { rank: 2, ..plan(&listeners, 1) };
    let mut others = listeners.into_iter();
    let (_mute, closed, own) = (others.next(), others.next(), others.next().unwrap());
    drop(closed);
    let error = connect(&own, &group, BRIEF).unwrap_err();
    let members = &group.members;
    assert_eq!(
        error.to_string(),
        format!(
            "group did not form in time: rank 0 at {}: connected, but it does not accept; \
             rank 1 at {}: Connection refused (os error 111); rank 3 at {}: it did not connect",
            members[0], members[1], members[3]
        )
    );
    assert_eq!(error.suspects(), [0, 1, 3]);

    group.members.truncate(2);
    let error = connect(&own, &group, BRIEF).unwrap_err();
    assert_eq!(error.to_string(), "cannot form group: rank 2 in a world of 2");
    group.members = vec![group.members[0]; 3];
    let error = connect(&own, &group, BRIEF).unwrap_err();
    assert!(error.to_string().starts_with("cannot form group: two members at 127.0.0.1:"));
}

#[test]
fn forming_can_be_aborted() {
    let listeners = bind(2);
    let abort = AbortHandle::new();
    let entered = || listeners[0].forming.try_lock().is_err();
    thread::scope(|scope| {
        scope.spawn(|| {
            wait_until("the group is forming", entered);
            abort.abort("revoked while forming");
        });
        let group = plan(&listeners, 1);
        let error = TcpCollective::connect(&listeners[0], &group, abort.clone(), PATIENT);
        assert_eq!(error.unwrap_err().to_string(), "collective aborted: revoked while forming");
    });
    let error = TcpCollective::connect(&listeners[0], &plan(&listeners, 2), abort, PATIENT);
    assert!(matches!(error, Err(CollectiveError::Aborted { .. })));
}

#[test]
fn a_peer_cut_off_between_bytes_is_lost() {
    // A real member of rank 1 sends part of its contribution, then its process "dies".
    let mut members = make_group(2);
    let dying = members.pop().unwrap();
    let (abort, ledger) = (dying.abort_handle(), members[0].ledger());
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut dying = dying;
            let mut buffer = vec![1_i64; 8_000_000];
            assert!(dying.all_reduce_i64(&mut buffer, PATIENT).is_err());
        });
        scope.spawn(move || {
            wait_until("rank 0 is in its call", || ledger.read().in_progress);
            abort.abort("killed by the test");
        });
        let mut buffer = vec![1_i64; 8_000_000];
        let error = members[0].all_reduce_i64(&mut buffer, PATIENT).unwrap_err();
        assert!(matches!(error, CollectiveError::PeerLost { rank: 1, .. }), "{error}");
    });
}

#[test]
fn listeners_stay_on_loopback_unless_trusted() {
    let wildcard = SocketAddr::from(([0, 0, 0, 0], 0));
    let error = TrainerListener::bind(wildcard, None, Exposure::Loopback).unwrap_err();
    assert!(matches!(error, BindError::NotLoopback { .. }));
    assert_eq!(
        error.to_string(),
        "refused to bind trainer listener to 0.0.0.0:0: only loopback addresses are allowed \
         while workers have no tokens"
    );
    let error = TrainerListener::bind(wildcard, None, Exposure::Trusted).unwrap_err();
    assert!(matches!(error, BindError::NothingToAdvertise { .. }));

    let elsewhere = SocketAddr::from(([10, 1, 2, 3], 0));
    let listener = TrainerListener::bind(any_port(), Some(elsewhere), Exposure::Loopback).unwrap();
    assert_eq!(listener.advertised().ip(), elsewhere.ip());
    assert_ne!(listener.advertised().port(), 0);

    let taken = bind(1).remove(0);
    let again = TrainerListener::bind(taken.advertised(), None, Exposure::Loopback);
    assert!(matches!(again, Err(BindError::Bind { .. })));
}

/// As many members as a group of eight machines with twelve devices each has: 9,120 sockets.
#[test]
fn conforms_in_a_large_world() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
    let mut world = 96;
    if limit.maximum.is_some_and(|files| files < 10_000) {
        println!("a world of 24 only: this system allows {:?} open files", limit.maximum);
        world = 24;
    }
    conformance::sums_and_copies(&make_group_of_sockets, world, &[5, 1_009]);
}
