//! When checkpoints are due.

use std::time::Duration;

use super::*;

/// One worker trains a long run with these cadences.
fn saving(steps: u64, interval: Option<Duration>) -> Coordinator {
    let mut c = running();
    let (checkpoint_steps, total_steps) = (Some(steps), 10_000);
    c.config = RunConfig { checkpoint_steps, checkpoint_interval: interval, total_steps, ..CONFIG };
    // What is due is found out anew.
    c.handle(Timestamp::from_millis(5), Event::Tick);
    c
}

fn proposes(out: &[Command]) -> bool {
    sends(out, |message| matches!(message, ToWorker::Propose { .. }))
}

/// The proposed checkpoint is committed as that of `step`.
fn saved(c: &mut Coordinator, ms: u64, seq: u64, step: u64) -> Vec<Command> {
    let checkpoint = CheckpointRef { step: Step(step), manifest: format!("m{step}") };
    let (generation, attempt) = (Generation(1), AttemptSeq(seq));
    let done = Event::CheckpointDone { generation, attempt, checkpoint };
    c.handle(Timestamp::from_millis(ms), done)
}

/// Each lies some steps behind the multiple that it is due at, and the next one no further.
#[test]
fn saves_do_not_drift_away_from_multiples() {
    let mut c = saving(100, None);
    for (seq, multiple) in (1..=5).map(|i| (i, 100 * i)) {
        let at = 10 * multiple;
        assert!(!proposes(&beat(&mut c, at, multiple - 1)), "not before step {multiple}");
        assert!(proposes(&beat(&mut c, at + 1, multiple + 3)), "at step {multiple}");
        assert!(!proposes(&saved(&mut c, at + 2, seq, multiple + 6)), "once");
    }
}

/// A save by time moves no save by steps.
#[test]
fn cadences_do_not_push_each_other_away() {
    let mut c = saving(100, Some(Duration::from_secs(2)));
    assert!(!proposes(&beat(&mut c, 1_000, 50)));
    assert!(proposes(&beat(&mut c, 2_100, 90)), "two seconds are over");
    saved(&mut c, 2_150, 1, 92);
    assert!(!proposes(&beat(&mut c, 2_200, 99)));
    assert!(proposes(&beat(&mut c, 2_300, 100)), "and step 100 is due as ever");
    saved(&mut c, 2_400, 2, 101);
    assert!(!proposes(&beat(&mut c, 3_400, 199)), "two seconds are not over since");
    assert!(proposes(&beat(&mut c, 4_450, 199)));
}
