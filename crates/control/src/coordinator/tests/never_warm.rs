//! Workers whose device cannot be made ready: their processes end, and agents start others.

use super::transcripts::Told;
use super::*;
use crate::message::FaultKind;

const WHY: &str = "failed to build the engine: out of memory";

/// One life that ends before it is warm, and that is seen to end if `seen`.
fn fails(told: &mut Told, name: &str, seen: bool) {
    told.hello(name, None, 0, false);
    breaks(told, name, Generation(0), WHY);
    if seen {
        exits(told, name);
    }
}

fn breaks(told: &mut Told, name: &str, generation: Generation, detail: &str) {
    let (kind, suspects, detail) = (FaultKind::Local, Vec::new(), detail.to_string());
    told.say(name, ToCoordinator::Fault { generation, kind, suspects, detail });
}

fn exits(told: &mut Told, name: &str) {
    let (worker, how) = (format!("{name}:0").parse().unwrap(), "exit code 74".to_string());
    told.tell("its process ends", Event::TrainerExited { worker, incarnation: None, how });
}

fn states(told: &Told) -> Vec<(String, &'static str)> {
    let status = told.machine.status();
    status.workers.iter().map(|w| (w.worker.to_string(), w.state)).collect()
}

fn state(told: &Told, name: &str) -> Option<&'static str> {
    let name = format!("{name}:0");
    states(told).into_iter().find(|(id, _)| *id == name).map(|(_, state)| state)
}

#[test]
fn one_that_tries_again_is_told_of_once_and_taken_in_when_it_is_warm() {
    let mut told = Told::train(&["a"]);
    for life in 0..3 {
        fails(&mut told, "b", false);
        assert_eq!(state(&told, "b"), Some("unfit"), "in life {life}");
        exits(&mut told, "b");
        assert_eq!(state(&told, "b"), None, "after life {life}");
    }
    assert_eq!(told.text.matches("note").count(), 1, "{}", told.text);
    assert!(told.text.contains(&format!("note unfit: worker b:0 is unfit: {WHY}")));
    assert!(!told.text.contains("kept out") && !told.text.contains("revoke"), "{}", told.text);
    told.hello("b", None, 0, false);
    told.say("b", ToCoordinator::Warm { probe: 7 });
    assert_eq!(state(&told, "b"), Some("spare"));
    for _ in 0..6 {
        told.wait(1_000);
        told.beat("a", 1, 1, false, crate::message::Phase::Compute);
        told.beat("b", 0, 0, false, crate::message::Phase::Idle);
    }
    assert!(told.text.contains("more workers are ready"), "it is taken in: {}", told.text);
}

#[test]
fn a_run_for_which_no_device_can_be_made_ready_fails_at_once() {
    let mut told = Told::new(Saved::default());
    told.tell("two are needed", Event::Resize { min: 2, max: 2 });
    fails(&mut told, "a", true);
    assert_eq!(told.machine.ended(), None, "another may come: {}", told.text);
    // Its next process has begun when the other one fails.
    told.hello("a", None, 0, false);
    fails(&mut told, "b", false);
    let Some(Ending::Failed { why, code }) = told.machine.ended() else { panic!("{}", told.text) };
    assert_eq!(*code, exit::IO);
    assert_eq!(*why, format!("no worker can go on (a:0: {WHY}; b:0: {WHY})"));
}

#[test]
fn who_trained_before_is_waited_for_however_many_are_unfit() {
    let mut told = Told::train(&["a", "b"]);
    fails(&mut told, "c", true);
    exits(&mut told, "a");
    exits(&mut told, "b");
    told.wait(500);
    assert_eq!(told.machine.ended(), None, "{}", told.text);
    let waits = format!("waiting for workers: 0 ready, 1 needed; unfit: c:0: {WHY}");
    assert!(told.text.contains(&waits), "{}", told.text);
}

/// A process that holds a device may take long to end.
#[test]
fn one_whose_device_breaks_in_training_is_waited_for_until_its_next_process_is_there() {
    let mut told = Told::train(&["a"]);
    breaks(&mut told, "a", Generation(1), "device lost");
    told.wait(2_900);
    assert_eq!(told.machine.ended(), None, "{}", told.text);
    exits(&mut told, "a");
    told.wait(8_000);
    assert!(told.text.contains("note quarantined: a:0 is kept out for 10s"), "{}", told.text);
    assert_eq!(told.machine.ended(), None, "{}", told.text);
    fails(&mut told, "a", true);
    assert!(matches!(told.machine.ended(), Some(Ending::Failed { .. })), "{}", told.text);
}

/// Its process ends with a code after which it comes again, whatever it is told.
#[test]
fn one_that_is_drained_while_it_ends_goes_with_its_next_process() {
    let mut told = Told::train(&["a"]);
    fails(&mut told, "b", false);
    let (worker, why) = ("b:0".parse().unwrap(), "too small".to_string());
    told.tell("an operator drains it", Event::Drain { worker, why });
    assert!(!told.text.contains("Exit"), "{}", told.text);
    exits(&mut told, "b");
    told.hello("b", None, 0, false);
    assert!(told.text.contains("to b:0: Exit { code: 75, why: \"too small\" }"), "{}", told.text);
    assert_eq!(told.machine.never_warm().count(), 0);
}

#[test]
fn a_process_that_ends_is_not_let_in_by_a_release() {
    let mut told = Told::train(&["a"]);
    breaks(&mut told, "a", Generation(1), "device lost");
    told.tell("an operator lets it in", Event::Release { worker: "a:0".parse().unwrap() });
    told.wait(2_000);
    assert!(!told.text.contains("forming"), "{}", told.text);
}

/// Only what was a member of the newest group ends as one.
#[test]
fn one_that_trained_before_and_is_never_ready_again_does_no_harm() {
    let mut told = Told::train(&["a", "b"]);
    exits(&mut told, "b");
    exits(&mut told, "a");
    for _ in 0..3 {
        fails(&mut told, "b", true);
    }
    for name in ["a", "c"] {
        told.hello(name, Some(0), 0, false);
        told.say(name, ToCoordinator::Warm { probe: 7 });
    }
    told.wait(600);
    told.form(2, &["a", "c"], Some(0), 0);
    assert!(told.text.contains("note formed: generation 2"), "{}", told.text);
    assert_eq!(told.text.matches("note lost: worker b:0").count(), 1, "{}", told.text);
    assert!(!told.text.contains("quarantined"), "{}", told.text);
}

/// Those who left, or whose machines are gone, are hoped for, but not for ever.
#[test]
fn a_run_whose_sound_workers_stay_away_fails_with_its_unfit_ones_in_the_end() {
    let mut told = Told::train(&["a"]);
    exits(&mut told, "a");
    for minute in 0..10 {
        assert_eq!(told.machine.ended(), None, "after {minute} minutes: {}", told.text);
        fails(&mut told, "b", true);
        told.wait(60_000);
    }
    assert!(matches!(told.machine.ended(), Some(Ending::Failed { .. })), "{}", told.text);
}

#[test]
fn the_end_of_hope_is_a_deadline_that_pauses_of_this_process_move() {
    let mut told = Told::train(&["a"]);
    exits(&mut told, "a");
    let began = told.ms;
    fails(&mut told, "b", true);
    told.wait(1_000);
    let end = Timestamp::from_millis(began + 600_000);
    assert_eq!(told.machine.next_deadline(), Some((end, "hope")));
    let paused = std::time::Duration::from_secs(5);
    told.machine.excuse(paused);
    told.wait(1);
    assert_eq!(told.machine.next_deadline(), Some((end + paused, "hope")));
}

#[test]
fn what_is_waited_for_is_said_once_while_an_unfit_one_that_is_kept_out_tries_again() {
    let mut told = Told::train(&["a", "b"]);
    breaks(&mut told, "b", Generation(1), "device lost");
    exits(&mut told, "b");
    exits(&mut told, "a");
    told.wait(1_000);
    fails(&mut told, "b", true);
    let all = format!("unfit: b:0: {WHY}; kept out: b:0 (`lacuna release` lets them in)");
    assert!(told.text.contains(&all), "{}", told.text);
    told.text.clear();
    for _ in 0..3 {
        told.wait(100);
        fails(&mut told, "b", true);
    }
    assert!(!told.text.contains("note"), "{}", told.text);
}

#[test]
fn one_that_could_not_begin_begins_anew_when_it_is_released() {
    let mut told = Told::train(&["a"]);
    told.hello("b", None, 0, false);
    let (generation, kind, suspects) = (Generation(0), FaultKind::Storage, Vec::new());
    let detail = "failed to open shard `x.tar`".to_string();
    told.say("b", ToCoordinator::Fault { generation, kind, suspects, detail });
    assert_eq!(state(&told, "b"), Some("unfit"));
    told.tell("an operator lets it in", Event::Release { worker: "b:0".parse().unwrap() });
    let exit = "to b:0: Exit { code: 74, why: \"an operator lets it try again\" }";
    assert!(told.text.contains(exit), "{}", told.text);
    told.hello("b", None, 0, false);
    assert_eq!(told.text.matches(exit).count(), 2, "it may not have heard: {}", told.text);
}

#[test]
fn one_that_is_released_or_stays_away_is_forgotten() {
    let mut told = Told::train(&["a"]);
    fails(&mut told, "b", true);
    assert_eq!(told.machine.never_warm().count(), 1);
    told.tell("an operator lets it in", Event::Release { worker: "b:0".parse().unwrap() });
    assert!(told.text.contains("note released: an operator lets b:0 back in"), "{}", told.text);
    assert_eq!(told.machine.never_warm().count(), 0);
    fails(&mut told, "b", true);
    for second in 0..601 {
        assert_eq!(told.machine.never_warm().count(), usize::from(second < 600), "{second}");
        told.beat("a", 0, 0, false, crate::message::Phase::Compute);
        told.wait(1_000);
    }
    assert_eq!(told.machine.never_warm().count(), 0);
}

#[test]
fn of_many_reasons_some_are_named() {
    let mut told = Told::new(Saved::default());
    told.tell("ten are needed", Event::Resize { min: 10, max: 10 });
    for name in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"] {
        fails(&mut told, name, true);
    }
    let Some(Ending::Failed { why, .. }) = told.machine.ended() else { panic!("{}", told.text) };
    assert!(why.ends_with(&format!("; h:0: {WHY}; and 2 more)")), "{why}");
}
