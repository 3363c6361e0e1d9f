use std::sync::Arc;

use super::*;
use crate::plan::{Communicator, Member};

const EPOCH: CoordEpoch = CoordEpoch(1);

fn plan(generation: u64, names: &[&str]) -> Arc<Plan> {
    let member = |(at, name): (usize, &&str)| Member {
        worker: name.parse().unwrap(),
        incarnation: Incarnation(at as u64),
        endpoint: "127.0.0.1:1".into(),
        slots: vec![at as u32],
    };
    Arc::new(Plan {
        generation: Generation(generation),
        members: names.iter().enumerate().map(member).collect(),
        communicator: Communicator::New,
        why: "test".into(),
    })
}

/// An observer of two slots, with generation 1 of two members durable and said.
fn observer() -> Observer {
    let mut observer = Observer::new(2);
    let durable = Observation::Durable { epoch: EPOCH, generation: Generation(1) };
    see(&mut observer, &durable).unwrap();
    see(&mut observer, &Observation::Said { plan: &plan(1, &["a:0", "b:0"]) }).unwrap();
    observer
}

fn see(observer: &mut Observer, seen: &Observation<'_>) -> Result<(), Invariant> {
    observer.observe(Timestamp(0), seen).map_err(|violation| violation.invariant)
}

fn apply(observer: &mut Observer, who: &str, step: u64, digest: u64) -> Result<(), Invariant> {
    let worker: WorkerId = who.parse().unwrap();
    let seen = Observation::Applied {
        generation: Generation(1),
        worker: &worker,
        step: Step(step),
        digest,
        slots: &[0, 1],
    };
    see(observer, &seen)
}

#[test]
fn a_generation_has_one_plan_that_is_durable_first() {
    let mut observer = observer();
    let again = plan(1, &["a:0", "b:0"]);
    assert_eq!(see(&mut observer, &Observation::Said { plan: &again }), Ok(()));
    let other = plan(1, &["a:0"]);
    assert_eq!(see(&mut observer, &Observation::Said { plan: &other }), Err(Invariant::OnePlan));
    let next = plan(2, &["a:0"]);
    assert_eq!(see(&mut observer, &Observation::Said { plan: &next }), Err(Invariant::OnePlan));
    let reused = Observation::Durable { epoch: CoordEpoch(2), generation: Generation(1) };
    assert_eq!(see(&mut observer, &reused), Err(Invariant::OnePlan));
}

#[test]
fn members_are_in_step_and_agree() {
    let mut observer = observer();
    assert_eq!(apply(&mut observer, "a:0", 8, 80), Ok(()));
    assert_eq!(apply(&mut observer, "b:0", 8, 81), Err(Invariant::OneDigest));
    assert_eq!(apply(&mut observer, "a:0", 9, 90), Ok(()));
    assert_eq!(apply(&mut observer, "a:0", 10, 100), Err(Invariant::InStep), "b:0 is at 8");
    assert_eq!(apply(&mut observer, "c:0", 9, 90), Err(Invariant::InStep), "no member");
}

#[test]
fn every_slot_counts_once() {
    let mut observer = observer();
    let worker: WorkerId = "a:0".parse().unwrap();
    for slots in [&[0][..], &[0, 0], &[0, 1, 1], &[1, 2]] {
        let seen = Observation::Applied {
            generation: Generation(1),
            worker: &worker,
            step: Step(1),
            digest: 1,
            slots,
        };
        assert_eq!(see(&mut observer, &seen), Err(Invariant::EachSlotOnce), "{slots:?}");
    }
}

#[test]
fn commits_are_fenced_whole_and_never_go_back() {
    let mut observer = observer();
    let commit = |epoch: u64, parts: usize| Observation::Committed {
        epoch: CoordEpoch(epoch),
        newest_epoch: CoordEpoch(2),
        generation: Generation(1),
        step: Step(4),
        digest: 40,
        parts,
    };
    assert_eq!(see(&mut observer, &commit(2, 2)), Ok(()));
    assert_eq!(see(&mut observer, &commit(1, 2)), Err(Invariant::MembersCommit));
    assert_eq!(see(&mut observer, &commit(2, 1)), Err(Invariant::NewestNeverBack));
    assert_eq!(see(&mut observer, &Observation::Newest { step: Step(4) }), Ok(()));
    let back = see(&mut observer, &Observation::Newest { step: Step(3) });
    assert_eq!(back, Err(Invariant::NewestNeverBack));
}

#[test]
fn calm_ends_with_a_step_or_a_violation() {
    let mut observer = observer();
    let bound = Duration::from_secs(5);
    let at = Timestamp::from_millis;
    observer.observe(at(0), &Observation::Calm { bound }).unwrap();
    observer.observe(at(5_000), &Observation::Passed).unwrap();
    let late = observer.observe(at(5_001), &Observation::Passed).unwrap_err();
    assert_eq!(
        late.to_string(),
        "I7 violated at 5.001 s: no step for 5.0 s of calm, 5.0 s are allowed"
    );
    observer.observe(at(6_000), &Observation::Unrest).unwrap();
    observer.observe(at(99_000), &Observation::Passed).unwrap();
}

#[test]
fn what_is_stale_changes_nothing() {
    let mut observer = observer();
    let changed = |epoch: u64, generation: u64| Observation::Changed {
        message: (CoordEpoch(epoch), Generation(generation)),
        receiver: (CoordEpoch(2), Generation(7)),
    };
    assert_eq!(see(&mut observer, &changed(2, 7)), Ok(()));
    assert_eq!(see(&mut observer, &changed(2, 6)), Err(Invariant::NothingStale));
    assert_eq!(see(&mut observer, &changed(1, 9)), Err(Invariant::NothingStale));
    let replayed = Observation::Replayed { before: "a", after: "b" };
    assert_eq!(see(&mut observer, &replayed), Err(Invariant::Replay));
}
