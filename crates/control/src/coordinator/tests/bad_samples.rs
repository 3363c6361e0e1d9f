//! Bad samples: told once an epoch, listed up to a bound, and a run with too many fails.

use lacuna_types::SampleId;

use super::*;
use crate::coordinator::bad_samples::LISTED_MAX;
use crate::journal::BAD_EPOCHS_KEPT;
use crate::message::{BadSample, BadSamples, StepMark};

fn bad(step: u64, sample: u64) -> BadSample {
    BadSample {
        step: Step(step),
        sample: SampleId(sample),
        key: Some(format!("{sample}.jpg")),
        shard: "d/s-000000.tar".into(),
        offset: 512 * sample,
        error: "failed to decode it: no end".into(),
        stand_in: SampleId(sample + 1),
    }
}

fn report(epoch: u32, samples: impl IntoIterator<Item = BadSample>) -> ToCoordinator {
    ToCoordinator::BadSamples(BadSamples {
        epoch,
        samples: samples.into_iter().collect(),
        dropped: 0,
    })
}

fn notes(out: &[Command], kind: &str) -> Vec<String> {
    let text = |command: &Command| match command {
        Command::Note(note) if note.kind == kind => Some(note.text.clone()),
        _ => None,
    };
    out.iter().filter_map(text).collect()
}

fn mark(step: u64) -> ToCoordinator {
    ToCoordinator::StepMark(StepMark {
        generation: Generation(1),
        step: Step(step),
        loss: 1.0,
        lr: 0.1,
        grad_norm: 1.0,
        images_per_second: 1.0,
        data_wait: 0.0,
        digest: None,
        memory_bytes: 0,
        mfu: None,
        skipped: 0,
        redone: 0,
    })
}

#[test]
fn a_bad_sample_is_told_once_an_epoch_with_its_place() {
    let mut c = running();
    let out = say(&mut c, 5, report(0, [bad(1, 7), bad(2, 7)]));
    assert_eq!(
        notes(&out, "bad_sample"),
        ["epoch 0, step 1: sample 7 (`7.jpg` at byte 3584 of shard `d/s-000000.tar`) replaced by \
          sample 8: failed to decode it: no end"]
    );
    assert!(matches!(out[0], Command::Persist(Record::BadSamples { .. })), "{out:?}");
    let again = say(&mut c, 6, report(0, [bad(1, 7), bad(3, 9)]));
    assert_eq!(notes(&again, "bad_sample").len(), 1, "a redone step, or another worker");
    let next = say(&mut c, 7, report(1, [bad(4, 7)]));
    assert_eq!(notes(&next, "bad_sample").len(), 1, "another epoch");
}

#[test]
fn a_coordinator_that_starts_again_does_not_repeat_itself() {
    let mut c = running();
    say(&mut c, 5, report(0, [bad(1, 7)]));
    let saved = c.saved().clone();
    let mut c = Coordinator::new(CONFIG, Timing::one_machine(), saved, Timestamp(0));
    let (worker, incarnation) = a();
    let (endpoint, generation) = ("h:1".into(), Generation(1));
    let hello = Hello { worker, incarnation, endpoint, state: None, generation, up: true };
    c.handle(Timestamp::from_millis(1), Event::Hello(hello));
    let out = say(&mut c, 2, report(0, [bad(1, 7), bad(1, 8)]));
    assert_eq!(notes(&out, "bad_sample").len(), 1, "{out:?}");
}

#[test]
fn only_so_many_are_listed_and_the_rest_is_counted_when_the_epoch_is_over() {
    let mut c = running();
    let n = LISTED_MAX as u64 + 20;
    let first = say(&mut c, 5, report(0, (0..n).map(|sample| bad(1, sample))));
    let listed = notes(&first, "bad_sample");
    assert_eq!(listed.len(), LISTED_MAX);
    assert!(listed.last().unwrap().ends_with("; more of this epoch are only counted"));
    let few = BadSamples { epoch: 0, samples: vec![bad(1, 500)], dropped: 3 };
    let out = say(&mut c, 6, ToCoordinator::BadSamples(few));
    assert_eq!(notes(&out, "bad_sample").len(), 0);
    assert_eq!(notes(&say(&mut c, 7, mark(3)), "bad_samples").len(), 0, "not over");
    let over = say(&mut c, 8, mark(4));
    assert_eq!(
        notes(&over, "bad_samples"),
        ["epoch 0 had 121 bad samples, 21 more than are listed; workers met 3 more than they \
          could keep to report"]
    );
    assert_eq!(notes(&say(&mut c, 9, mark(5)), "bad_samples").len(), 0, "once");
}

#[test]
fn too_many_in_an_epoch_fail_the_run_and_say_where_the_last_one_is() {
    let mut c = running();
    let most = CONFIG.bad_samples_max;
    say(&mut c, 5, report(0, (0..most).map(|sample| bad(1, sample))));
    say(&mut c, 6, report(1, (0..most).map(|sample| bad(5, sample))));
    assert_eq!(c.ended(), None, "as many as are allowed, in each of two epochs");
    say(&mut c, 7, report(0, [bad(2, 3)]));
    assert_eq!(c.ended(), None, "a known one");
    let out = say(&mut c, 8, report(0, [bad(2, 900)]));
    let Some(Ending::Failed { why, code }) = c.ended() else { panic!("{:?}", c.ended()) };
    assert_eq!(*code, exit::IO);
    assert_eq!(
        why,
        "151 bad samples in epoch 0, 15.100 % of its 1000 samples, and at most 150 are allowed \
         (`data.bad_samples_max`); the last is sample 900 (`900.jpg` at byte 460800 of shard \
         `d/s-000000.tar`): failed to decode it: no end"
    );
    assert_eq!(notes(&out, "bad_samples").len(), 2, "of each epoch how many are not listed");
    let mut saved = c.saved().clone();
    saved.apply(&Record::Resumed);
    assert!(saved.bad_samples.is_empty(), "whoever lets it go on has looked");
}

#[test]
fn what_means_nothing_changes_nothing() {
    let mut c = running();
    let before = c.saved().clone();
    say(&mut c, 5, report(1, [bad(1, 7), bad(u64::MAX, 7)]));
    say(&mut c, 6, report(u32::MAX, [bad(u64::MAX, 7)]));
    assert_eq!(*c.saved(), before, "steps of other epochs, and of none");
    for epoch in (0..3).chain([2, 0]) {
        say(&mut c, 7, report(epoch, [bad(u64::from(epoch) * 4, 7)]));
    }
    assert!(c.saved().bad_samples.len() <= BAD_EPOCHS_KEPT);
}

#[test]
fn few_epochs_are_remembered_and_the_farthest_is_forgotten() {
    let mut saved = Saved::default();
    let of = |epoch| Record::BadSamples { epoch, samples: vec![SampleId(1)], dropped: u64::MAX };
    (0..6).chain([0]).for_each(|epoch| saved.apply(&of(epoch)));
    assert_eq!(saved.bad_samples.keys().copied().collect::<Vec<u32>>(), [0, 2, 3, 4]);
    saved.apply(&of(4));
    assert_eq!(saved.bad_samples[&4].dropped, u64::MAX, "counts do not wrap");
}
