//! Whom the machine waits for, and how long.

use std::time::Duration;

use super::super::members::PARTIAL_OUTAGES_MAX;
use super::transcripts::Told;
use super::*;
use crate::message::{FaultKind, Phase};
use crate::plan::CheckpointRef;

const GENERATION: Generation = Generation(1);

fn fault(told: &mut Told, name: &str, kind: FaultKind) {
    let generation = told.machine.saved().generation;
    let (suspects, detail) = (Vec::new(), "no answer for 50 s".to_string());
    told.say(name, ToCoordinator::Fault { generation, kind, suspects, detail });
}

/// Brings `a` and `b` to where each loads the state.
fn loading() -> Told {
    let mut told = Told::new(Saved::default());
    for name in ["a", "b"] {
        told.hello(name, None, 0, false);
        told.say(name, ToCoordinator::Warm { probe: 7 });
    }
    told.wait(500);
    for name in ["a", "b"] {
        let (state, trained) = (None, Generation(0));
        let generation = GENERATION;
        told.say(name, ToCoordinator::Prepared { generation, state, trained, kept: false });
    }
    told.tell("the id is drawn", Event::CommId { generation: GENERATION, comm_id: vec![1; 32] });
    told
}

/// One node reads a large checkpoint more slowly than the other.
#[test]
fn who_loads_longer_than_others_is_waited_for() {
    let mut told = loading();
    let synced = ToCoordinator::Synced { generation: GENERATION, step: Step(0), digest: 5 };
    told.say("a", synced.clone());
    let forming = Timing::one_machine().forming;
    let end = told.ms + 3 * forming.as_millis() as u64;
    while told.ms < end {
        told.wait(900);
        told.beat("a", 0, 0, false, Phase::Idle);
        told.beat("b", 0, 0, false, Phase::Sync);
    }
    assert!(!told.text.contains("kill") && !told.text.contains("revoke"), "{}", told.text);
    told.say("b", synced);
    assert!(told.text.contains("to b:0: start 1 at step 0"), "{}", told.text);
}

/// One that waits for a peer's bytes while that peer is done does hang.
#[test]
fn who_hangs_in_an_operation_that_others_completed_is_not_waited_for() {
    let mut told = loading();
    told.say("a", ToCoordinator::Synced { generation: GENERATION, step: Step(0), digest: 5 });
    let end = told.ms + 2 * Timing::one_machine().forming.as_millis() as u64;
    while told.ms < end {
        told.wait(900);
        told.beat("a", 0, 3, false, Phase::Idle);
        told.beat("b", 0, 3, true, Phase::Sync);
    }
    assert!(told.text.contains("kill b:0"), "{}", told.text);
}

/// However long a store is away: the group forms again and again, and waits.
#[test]
fn an_outage_for_all_ends_and_excludes_nobody() {
    let mut told = Told::train(&["a", "b"]);
    for generation in 2..30 {
        fault(&mut told, "a", FaultKind::Outage);
        told.wait(300);
        told.form(generation, &["a", "b"], Some(0), 0);
    }
    assert!(told.machine.saved().ending.is_none(), "{}", told.text);
    assert_eq!(told.machine.saved().generation, Generation(29));
    assert!(!told.text.contains("unfit"), "{}", told.text);
}

#[test]
fn whose_store_is_away_while_others_have_data_is_unfit_after_three_times() {
    let mut told = Told::train(&["a", "b", "c"]);
    for generation in 2..5 {
        assert!(!told.text.contains("unfit"), "{}", told.text);
        told.beat("b", 0, 1, true, Phase::Reduce);
        told.beat("c", 0, 1, true, Phase::Reduce);
        fault(&mut told, "a", FaultKind::Outage);
        told.wait(300);
        let members: &[&str] = if generation < 4 { &["a", "b", "c"] } else { &["b", "c"] };
        told.form(generation, members, Some(0), 0);
    }
    assert!(told.text.contains("unfit"), "{}", told.text);
    assert!(told.text.contains("others have what they need"), "{}", told.text);
    assert!(told.machine.saved().ending.is_none());
}

/// The same of a checkpoint: who loaded it is in no operation, but has synchronised.
#[test]
fn who_alone_cannot_reach_the_checkpoint_is_unfit_after_three_times() {
    let mut told = Told::train(&["a", "b"]);
    fault(&mut told, "a", FaultKind::Communicator);
    for generation in (2..5).map(Generation) {
        assert!(!told.text.contains("unfit"), "{}", told.text);
        told.wait(300);
        for name in ["a", "b"] {
            let (state, trained) = (None, Generation(0));
            told.say(name, ToCoordinator::Prepared { generation, state, trained, kept: false });
        }
        told.tell("the id is drawn", Event::CommId { generation, comm_id: vec![1; 32] });
        told.say("b", ToCoordinator::Synced { generation, step: Step(0), digest: 5 });
        fault(&mut told, "a", FaultKind::Outage);
    }
    assert!(told.text.contains("unfit"), "{}", told.text);
}

/// Some have their data and some have not: nobody is to blame alone, and the store has long to come
/// back, but not for ever.
#[test]
fn an_outage_for_some_is_waited_for_and_ends_some_time() {
    let mut told = Told::train(&["a", "b", "c"]);
    let enough = u64::from(PARTIAL_OUTAGES_MAX);
    for generation in 2..2 + 2 * enough {
        if told.machine.saved().ending.is_some() {
            assert!(generation > enough, "in generation {generation}: {}", told.text);
            break;
        }
        told.beat("b", 0, 1, false, Phase::Data);
        told.beat("c", 0, 1, true, Phase::Reduce);
        fault(&mut told, "a", FaultKind::Outage);
        told.wait(300);
        told.form(generation, &["a", "b", "c"], Some(0), 0);
    }
    let ending = told.machine.saved().ending.clone();
    assert!(matches!(ending, Some(Ending::Paused { .. })), "{ending:?} {}", told.text);
    assert!(!told.text.contains("unfit"), "{}", told.text);
}

/// Brings two members to a boundary because one leaves, below the fewest that may train.
fn leaving_too_few() -> Told {
    let mut told = Told::train(&["a", "b"]);
    told.tell("two at least", Event::Resize { min: 2, max: 3 });
    told.say("b", ToCoordinator::Leaving { why: "a notice".to_string() });
    for name in ["a", "b"] {
        let step = Step(8);
        told.say(name, ToCoordinator::Held { generation: GENERATION, step, digest: 5 });
    }
    told
}

/// A full disk takes nothing away that a killed worker would not have taken.
#[test]
fn who_stays_keeps_a_state_that_cannot_be_saved() {
    let mut told = leaving_too_few();
    for attempt in 1..=u64::from(Timing::one_machine().failed_attempts) {
        let detail = "no space left on device".to_string();
        let (generation, attempt) = (GENERATION, AttemptSeq(attempt));
        told.say("b", ToCoordinator::PartFailed { generation, attempt, detail });
    }
    assert!(told.machine.saved().ending.is_none(), "{}", told.text);
    assert!(!told.text.contains("to a:0: Exit"), "{}", told.text);
    told.tell("b ended", {
        let (worker, how) = ("b:0".parse().unwrap(), "exited with 75".to_string());
        Event::TrainerExited { worker, incarnation: None, how }
    });
    told.text.clear();
    told.hello("c", None, 0, false);
    told.say("c", ToCoordinator::Warm { probe: 7 });
    told.wait(1000);
    let now = Generation(2);
    for (name, state) in [("a", Some(Step(8))), ("c", None)] {
        let trained = if state.is_some() { GENERATION } else { Generation(0) };
        told.say(name, ToCoordinator::Prepared { generation: now, state, trained, kept: false });
    }
    told.tell("the id is drawn", Event::CommId { generation: now, comm_id: vec![1; 32] });
    assert!(told.text.contains("connect, Memory"), "from step 8, in a's memory: {}", told.text);
}

/// Whoever has been told to go does not stand about until a large part is written.
#[test]
fn a_leave_gives_a_slow_checkpoint_up() {
    let mut told = Told::train(&["a", "b", "c"]);
    told.tell("an operator wants a checkpoint", Event::Checkpoint);
    let (generation, attempt) = (GENERATION, AttemptSeq(1));
    for name in ["a", "b", "c"] {
        let step = Step(6);
        told.say(name, ToCoordinator::Snapshotted { generation, attempt, step, digest: 5 });
    }
    told.say("c", ToCoordinator::Leaving { why: "a notice".to_string() });
    told.text.clear();
    for name in ["a", "b", "c"] {
        told.say(name, ToCoordinator::Held { generation, step: Step(8), digest: 5 });
    }
    assert!(told.text.contains("AbortAttempt"), "{}", told.text);
    assert!(told.text.contains("note forming: forming generation 2: 2 workers"), "{}", told.text);
    assert!(told.machine.saved().checkpoint_asked, "the next group makes one");
}

/// All who hold the state leave, and it cannot be saved: one of them hands it to who stays.
#[test]
fn a_state_that_cannot_be_saved_is_handed_over() {
    let mut told = Told::train(&["a", "b"]);
    told.hello("c", None, 0, false);
    told.say("c", ToCoordinator::Warm { probe: 7 });
    for name in ["a", "b"] {
        told.beat(name, 8, 9, false, Phase::Compute);
        told.say(name, ToCoordinator::Leaving { why: "a notice".to_string() });
    }
    for name in ["a", "b"] {
        let step = Step(8);
        told.say(name, ToCoordinator::Held { generation: GENERATION, step, digest: 5 });
    }
    for attempt in 1..=u64::from(Timing::one_machine().failed_attempts) {
        let detail = "no space left on device".to_string();
        let (generation, attempt) = (GENERATION, AttemptSeq(attempt));
        told.say("b", ToCoordinator::PartFailed { generation, attempt, detail });
    }
    told.wait(1000);
    let plan = told.machine.saved().plan.clone().expect("a plan");
    let members: Vec<&str> = plan.members.iter().map(|m| m.worker.as_str()).collect();
    assert_eq!(plan.generation, Generation(2), "{}", told.text);
    assert!(members.contains(&"c:0"), "{members:?} {}", told.text);
    assert!(members.contains(&"a:0") || members.contains(&"b:0"), "{members:?} {}", told.text);
}

/// Where one leaves after the other, a checkpoint still comes to its end now and then.
#[test]
fn the_second_leave_waits_for_the_checkpoint() {
    let mut told = Told::train(&["a", "b", "c"]);
    told.machine.closed_for_leaves = 1;
    told.tell("an operator wants a checkpoint", Event::Checkpoint);
    let (generation, attempt) = (GENERATION, AttemptSeq(1));
    for name in ["a", "b", "c"] {
        let step = Step(6);
        told.say(name, ToCoordinator::Snapshotted { generation, attempt, step, digest: 5 });
    }
    told.say("c", ToCoordinator::Leaving { why: "a notice".to_string() });
    for name in ["a", "b", "c"] {
        told.say(name, ToCoordinator::Held { generation, step: Step(8), digest: 5 });
    }
    assert!(!told.text.contains("AbortAttempt"), "{}", told.text);
    let checkpoint = CheckpointRef { step: Step(6), manifest: "m".into() };
    told.tell("committed", Event::CheckpointDone { generation, attempt, checkpoint });
    assert!(told.text.contains("note forming: forming generation 2: 2 workers"), "{}", told.text);
}

/// Joining can wait until a checkpoint is written: standing still meanwhile costs everybody.
#[test]
fn a_join_waits_for_a_checkpoint_under_way() {
    let mut told = Told::train(&["a", "b"]);
    told.tell("an operator wants a checkpoint", Event::Checkpoint);
    told.hello("c", None, 0, false);
    told.say("c", ToCoordinator::Warm { probe: 7 });
    for _ in 0..5 {
        told.wait(1000);
        ["a", "b", "c"].iter().for_each(|name| told.beat(name, 8, 9, false, Phase::Compute));
    }
    assert!(!told.text.contains("Hold"), "{}", told.text);
    let (generation, attempt) = (GENERATION, AttemptSeq(1));
    let checkpoint = CheckpointRef { step: Step(6), manifest: "m".into() };
    told.tell("committed", Event::CheckpointDone { generation, attempt, checkpoint });
    told.wait(Duration::from_secs(1).as_millis() as u64);
    assert!(told.text.contains("Hold"), "{}", told.text);
}

/// What a run says it was stopped at is what it goes on from.
#[test]
fn a_stop_without_a_group_names_the_step_that_is_saved() {
    let mut told = Told::train(&["a"]);
    told.beat("a", 12, 3, false, Phase::Compute);
    let step = Step(8);
    told.say("a", ToCoordinator::Held { generation: GENERATION, step, digest: 5 });
    told.tell("a ended", {
        let (worker, how) = ("a:0".parse().unwrap(), "killed by signal 9".to_string());
        Event::TrainerExited { worker, incarnation: None, how }
    });
    told.tell("stop", Event::Stop { why: "asked to".to_string() });
    told.wait(1000);
    let ending = told.machine.saved().ending.clone();
    let Some(Ending::Stopped { step, why }) = ending else { panic!("{}", told.text) };
    assert_eq!(step, Step(0), "there is no checkpoint");
    assert!(why.contains("were not saved"), "{why}");
}
