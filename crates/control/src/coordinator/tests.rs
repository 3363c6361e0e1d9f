mod any_events;
mod bad_samples;
mod cadence;
mod inquiries;
mod never_warm;
mod patience;
mod transcripts;

use super::*;
use crate::message::FaultKind;
use crate::plan::CheckpointRef;
use lacuna_types::{AttemptSeq, Generation};

const CONFIG: RunConfig = RunConfig {
    n_slots: 4,
    total_steps: 10,
    workers_min: 1,
    workers_max: 1,
    checkpoint_steps: None,
    checkpoint_interval: None,
    when_busy: WhenBusy::Skip,
    max_failures: 0,
    epoch_steps: 4,
    epoch_samples: 1000,
    bad_samples_max: 150,
};

fn coordinator() -> Coordinator {
    Coordinator::new(CONFIG, Timing::one_machine(), Saved::default(), Timestamp(0))
}

fn a() -> (WorkerId, Incarnation) {
    ("a:0".parse().unwrap(), Incarnation(1))
}

fn say(c: &mut Coordinator, ms: u64, message: ToCoordinator) -> Vec<Command> {
    let (worker, incarnation) = a();
    c.handle(Timestamp::from_millis(ms), Event::Message { worker, incarnation, message })
}

/// Brings one worker to Running at step 0 in generation 1.
fn running() -> Coordinator {
    let mut c = coordinator();
    let (worker, incarnation) = a();
    let hello = Hello {
        worker,
        incarnation,
        endpoint: "h:1".into(),
        state: None,
        generation: Generation(0),
        up: false,
    };
    c.handle(Timestamp::from_millis(1), Event::Hello(hello));
    say(&mut c, 2, ToCoordinator::Warm { probe: 1 });
    let generation = Generation(1);
    say(
        &mut c,
        3,
        ToCoordinator::Prepared { generation, state: None, trained: Generation(0), kept: false },
    );
    c.handle(Timestamp::from_millis(3), Event::CommId { generation, comm_id: vec![0; 32] });
    let out = say(&mut c, 4, ToCoordinator::Synced { generation, step: Step(0), digest: 5 });
    assert!(out.iter().any(|command| matches!(
        command,
        Command::Send { message: ToWorker::Start { resume_step: Step(0), .. }, .. }
    )));
    c
}

#[test]
fn a_generation_is_durable_before_it_is_said() {
    let mut c = coordinator();
    let (worker, incarnation) = a();
    let hello = Hello {
        worker,
        incarnation,
        endpoint: "h:1".into(),
        state: None,
        generation: Generation(0),
        up: false,
    };
    c.handle(Timestamp::from_millis(1), Event::Hello(hello));
    let out = say(&mut c, 2, ToCoordinator::Warm { probe: 1 });
    let at = |wanted: &dyn Fn(&Command) -> bool| out.iter().position(wanted).unwrap();
    let persisted = at(&|c| matches!(c, Command::Persist(Record::Planned(_))));
    let said = at(&|c| matches!(c, Command::Send { message: ToWorker::Prepare(_), .. }));
    assert!(persisted < said);
}

#[test]
fn unknown_workers_and_lives_are_told_that_they_are_stale() {
    let mut c = running();
    let stranger = Event::Message {
        worker: a().0,
        incarnation: Incarnation(77),
        message: ToCoordinator::Leaving { why: "x".into() },
    };
    let out = c.handle(Timestamp::from_millis(5), stranger);
    let [Command::Send { incarnation: Incarnation(77), message, .. }] = &out[..] else {
        panic!("{out:?}")
    };
    assert_eq!(*message, ToWorker::Stale { current: Generation(1) });
}

#[test]
fn a_lease_runs_out_and_the_state_is_gone_with_the_last_worker() {
    let mut c = running();
    let (at, why) = c.next_deadline().unwrap();
    assert_eq!((at, why), (Timestamp::from_millis(3004), "lease"));
    c.handle(Timestamp::from_millis(3003), Event::Tick);
    assert_eq!(c.status().state, "running");
    let out = c.handle(Timestamp::from_millis(3004), Event::Tick);
    let text = format!("{out:?}");
    assert!(text.contains("no beat for 3.0 s"), "{text}");
    assert_eq!(c.status().workers.len(), 0);
}

#[test]
fn other_numbers_of_workers_count_at_once_and_are_said_once() {
    let mut c = running();
    let resize = |max| Event::Resize { min: 1, max };
    let out = c.handle(Timestamp::from_millis(5), resize(3));
    assert_eq!(c.config.workers_max, 3);
    let text = format!("{out:?}");
    assert!(text.contains("an operator wants 1 to 3 workers"), "{text}");
    assert!(!text.contains("Hold"), "nobody has to go: {text}");
    assert_eq!(c.handle(Timestamp::from_millis(6), resize(3)), []);
}

#[test]
fn a_fault_of_the_run_or_its_data_fails_the_run_with_its_reason() {
    let cases = [
        (FaultKind::Run, "3 steps in a row were not finite", exit::FAILED),
        (FaultKind::Data, "slot 0 of step 0 met 101 bad samples in a row", exit::IO),
    ];
    for (kind, detail, wanted) in cases {
        let mut c = running();
        let (generation, suspects) = (Generation(1), vec![]);
        let detail = detail.to_string();
        let fault = ToCoordinator::Fault { generation, kind, suspects, detail: detail.clone() };
        say(&mut c, 9, fault);
        let Some(Ending::Failed { why, code }) = c.ended() else { panic!("{:?}", c.ended()) };
        assert_eq!((why.as_str(), *code), (format!("a:0: {detail}").as_str(), wanted));
    }
}

#[test]
fn a_run_that_another_coordinator_claimed_rests_at_once() {
    let mut c = running();
    let why = "start 9 has claimed its checkpoints".to_string();
    let out = c.handle(Timestamp::from_millis(9), Event::Superseded { why: why.clone() });
    let told =
        |c: &Command| matches!(c, Command::Send { message: ToWorker::Exit { code: 0, .. }, .. });
    assert!(out.iter().any(told), "its worker is free for others: {out:?}");
    assert_eq!(c.ended(), Some(&Ending::Paused { why: why.clone() }));
    let again = c.handle(Timestamp::from_millis(10), Event::Superseded { why });
    assert_eq!(again, [], "it is said once");
}

#[test]
fn no_worker_that_can_read_the_data_fails_the_run() {
    let mut c = running();
    let (generation, kind) = (Generation(1), FaultKind::Storage);
    let detail = "failed to open shard `x.tar`".to_string();
    say(&mut c, 9, ToCoordinator::Fault { generation, kind, suspects: vec![], detail });
    c.handle(Timestamp::from_millis(300), Event::Tick);
    let Some(Ending::Failed { why, code }) = c.ended() else { panic!("{:?}", c.ended()) };
    assert!(why.contains("a:0: failed to open shard `x.tar`"), "{why}");
    assert_eq!(*code, exit::IO);
}

#[test]
fn a_failed_attempt_is_tried_again_and_three_end_a_run_that_needs_it() {
    let mut c = running();
    let generation = Generation(1);
    let mut out = say(&mut c, 9, ToCoordinator::Held { generation, step: Step(10), digest: 8 });
    for seq in 1..=3 {
        let attempt = AttemptSeq(seq);
        let proposed = ToWorker::Propose { generation, attempt, held: true };
        let sent = |c: &Command| matches!(c, Command::Send { message, .. } if *message == proposed);
        assert!(out.iter().any(sent), "attempt {seq}: {out:?}");
        let detail = "no space left".to_string();
        out = say(&mut c, 9 + seq, ToCoordinator::PartFailed { generation, attempt, detail });
    }
    assert!(matches!(c.ended(), Some(Ending::Failed { code: exit::IO, .. })), "{:?}", c.ended());
}

#[test]
fn a_commit_that_comes_late_still_counts() {
    let mut c = running();
    let checkpoint = CheckpointRef { step: Step(4), manifest: "m".into() };
    let late = Event::CheckpointDone {
        generation: Generation(0),
        attempt: AttemptSeq(3),
        checkpoint: checkpoint.clone(),
    };
    let out = c.handle(Timestamp::from_millis(9), late);
    assert!(out.contains(&Command::Persist(Record::Checkpoint(checkpoint))));
}

/// One worker trains with these rules, and an attempt is under way when the next is due.
fn busy(when_busy: WhenBusy, max_failures: u32) -> (Coordinator, Vec<Command>) {
    let mut c = running();
    c.config = RunConfig { when_busy, max_failures, checkpoint_steps: Some(2), ..CONFIG };
    beat(&mut c, 10, 2);
    let out = beat(&mut c, 20, 4);
    (c, out)
}

fn beat(c: &mut Coordinator, ms: u64, step: u64) -> Vec<Command> {
    let beat = crate::message::Beat {
        generation: Generation(1),
        step: Step(step),
        phase: crate::message::Phase::Compute,
        phase_ms: 0,
        op_seq: step,
        in_op: false,
        slot_us: 0,
        data_us: 0,
        memory_bytes: 0,
    };
    say(c, ms, ToCoordinator::Beat(beat))
}

fn sends(out: &[Command], wanted: impl Fn(&ToWorker) -> bool) -> bool {
    out.iter().any(|c| matches!(c, Command::Send { message, .. } if wanted(message)))
}

fn notes(out: &[Command], kind: &str) -> bool {
    out.iter().any(|c| matches!(c, Command::Note(note) if note.kind == kind))
}

#[test]
fn a_checkpoint_that_is_due_while_one_is_written_is_skipped() {
    let (mut c, out) = busy(WhenBusy::Skip, 0);
    assert!(notes(&out, "skipped"), "{out:?}");
    assert!(!sends(&out, |m| matches!(m, ToWorker::AbortAttempt { .. } | ToWorker::Hold { .. })));
    // It counts from there, and is said once.
    assert!(!notes(&beat(&mut c, 30, 5), "skipped"));
    assert!(notes(&beat(&mut c, 40, 6), "skipped"));
}

#[test]
fn or_training_stands_still_until_it_is_written() {
    let (_, out) = busy(WhenBusy::Wait, 0);
    assert!(sends(&out, |m| matches!(m, ToWorker::Hold { .. })), "{out:?}");
    assert!(!sends(&out, |m| matches!(m, ToWorker::AbortAttempt { .. })));
}

/// What is given up for the next one is no failure.
#[test]
fn or_it_is_given_up_for_the_next_one() {
    let (c, out) = busy(WhenBusy::Cancel, 1);
    let given_up = AttemptSeq(1);
    let is_it =
        |m: &ToWorker| matches!(m, ToWorker::AbortAttempt { attempt, .. } if *attempt == given_up);
    assert!(sends(&out, is_it), "{out:?}");
    let next = |m: &ToWorker| matches!(m, ToWorker::Propose { attempt: AttemptSeq(2), .. });
    assert!(sends(&out, next), "{out:?}");
    assert_eq!(c.ended(), None);
}

#[test]
fn so_many_failures_in_a_row_end_a_run_and_no_fewer() {
    let (mut c, _) = busy(WhenBusy::Skip, 2);
    let generation = Generation(1);
    let fails = |c: &mut Coordinator, ms: u64, seq: u64| {
        let (attempt, detail) = (AttemptSeq(seq), "no space left".to_string());
        say(c, ms, ToCoordinator::PartFailed { generation, attempt, detail })
    };
    fails(&mut c, 30, 1);
    assert_eq!(c.ended(), None);
    beat(&mut c, 40, 6);
    fails(&mut c, 50, 2);
    assert!(matches!(c.ended(), Some(Ending::Failed { code: exit::IO, .. })), "{:?}", c.ended());
}

/// Without a limit they may go on for ever, also where the group waits for the store.
#[test]
fn failures_of_a_store_that_is_waited_for_end_no_run() {
    let (mut c, _) = busy(WhenBusy::Wait, 0);
    let generation = Generation(1);
    say(&mut c, 30, ToCoordinator::Held { generation, step: Step(5), digest: 8 });
    for _ in 0..5 {
        let attempt = c.saved().attempts;
        let detail = "no space left".to_string();
        say(&mut c, 40, ToCoordinator::PartFailed { generation, attempt, detail });
    }
    assert_eq!(c.ended(), None);
}
