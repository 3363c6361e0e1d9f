use expect_test::expect;

use super::*;
use crate::catalog::{list, verify_and_mark};
use crate::chain;
use crate::testing::{NOW, attempt, manifest, run_dir, tiny, tree};

const ONE: NonZeroUsize = NonZeroUsize::MIN;

fn steps(dir: &RunDir) -> Vec<u64> {
    list(dir).unwrap().iter().map(|entry| entry.step.0).collect()
}

#[test]
fn what_must_stay_stays() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    for step in [1, 2, 3, 4, 5, 6, 7] {
        let mut state = tiny(step);
        if step == 7 {
            state.sections[0][0] = f32::INFINITY;
        }
        state.save(&dir, 2);
    }
    verify_and_mark(&dir, &manifest(&dir, 3)).unwrap();
    verify_and_mark(&dir, &manifest(&dir, 1)).unwrap();
    std::fs::create_dir(dir.holds()).unwrap();
    std::fs::write(dir.holds().join("paper.json"), "{\"step\": 2, \"why\": \"table 1\"}").unwrap();
    let two = NonZeroUsize::new(2).unwrap();
    let plan = plan_retention(&dir, two, &[Step(4)], NOW).unwrap();
    let keep: Vec<String> =
        plan.keep.iter().map(|(step, why)| format!("{step}: {why}\n")).collect();
    expect![[r#"
        7: newer than every finite one
        6: one of the last 2
        5: one of the last 2
        4: in use
        3: the newest that was verified
        2: held by paper
    "#]]
    .assert_eq(&keep.concat());
    assert_eq!(steps(&dir), [1, 2, 3, 4, 5, 6, 7], "a plan removes nothing");
    assert_eq!(retain(&dir, two, &[Step(4)], NOW).unwrap(), plan);
    assert_eq!(steps(&dir), [2, 3, 4, 5, 6, 7]);
    assert!(!dir.step(Step(1)).exists());
}

#[test]
fn a_cadence_keeps_the_first_at_or_after_each_multiple() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    for step in [3, 11, 14, 19, 42, 50, 61] {
        tiny(step).save(&dir, 1);
    }
    let chosen = |dir: &RunDir| chosen(&list(dir).unwrap(), 10).iter().map(|s| s.0).collect();
    let first: Vec<u64> = chosen(&dir);
    assert_eq!(first, [11, 42, 50, 61]);
    let kept: Vec<Step> = first.iter().map(|&step| Step(step)).collect();
    retain(&dir, ONE, &kept, NOW).unwrap();
    assert_eq!(steps(&dir), first);
    let again: Vec<u64> = chosen(&dir);
    assert_eq!(again, first, "what is gone changes nothing");
}

#[test]
fn a_pin_that_cannot_be_read_stops_everything() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    tiny(1).save(&dir, 1);
    std::fs::create_dir(dir.holds()).unwrap();
    std::fs::write(dir.holds().join("x.json"), "{\"stop\": 2}").unwrap();
    let error = retain(&dir, ONE, &[], NOW).unwrap_err();
    assert!(chain(&error).starts_with("hold `"), "{error}");
}

#[test]
fn damaged_checkpoints_are_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    tiny(1).save(&dir, 1);
    tiny(2).save(&dir, 1);
    std::fs::write(dir.manifest(Step(1)), "{").unwrap();
    let before = tree(&dir.step(Step(1)));
    assert_eq!(retain(&dir, ONE, &[], NOW).unwrap().delete, []);
    assert!(collect_garbage(&dir, Generation(99), &[]).unwrap().is_empty());
    assert_eq!(tree(&dir.step(Step(1))), before);
}

#[test]
fn deletions_are_finished_and_garbage_goes() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    for step in [1, 2, 3] {
        tiny(step).save(&dir, 2);
    }
    // A deletion died after its first operation; the step was then saved again, not yet committed.
    std::fs::rename(dir.manifest(Step(1)), dir.deleted_manifest(Step(1))).unwrap();
    let again = Attempt::new(Generation(13), lacuna_types::AttemptSeq(1));
    tiny(1).write(&dir, again, 1);
    // An attempt of the same generation as a commit died.
    tiny(2).write(&dir, attempt(2), 2);
    tiny(4).write(&dir, attempt(3), 2);
    assert_eq!(steps(&dir), [2, 3]);
    assert!(plan_garbage(&dir, Generation(12), &[]).unwrap().is_empty());
    let aborted = [attempt(3)];
    let gone = collect_garbage(&dir, Generation(12), &aborted).unwrap();
    assert_eq!(gone, [dir.attempt(Step(4), attempt(3))]);
    assert!(!dir.step(Step(4)).exists());
    assert!(!dir.attempt(Step(1), attempt(1)).exists(), "the deletion was finished");
    assert!(dir.attempt(Step(1), again).exists(), "the new attempt was not touched");
    let gone = collect_garbage(&dir, Generation(13), &[]).unwrap();
    assert_eq!(gone, [dir.attempt(Step(2), attempt(2))]);
    assert_eq!(steps(&dir), [2, 3]);
}

#[test]
fn pins_are_made_listed_and_released() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    (1..=3).for_each(|step| drop(tiny(step).save(&dir, 1)));
    let pin = |name: &str, step, until: Option<&str>| Hold {
        name: name.to_string(),
        step: Step(step),
        why: "table 1".to_string(),
        until: until.map(str::to_string),
    };
    let forever = pin("paper", 1, None);
    let over = pin("review", 2, Some("2026-11-28T09:59:59Z"));
    assert_eq!(hold(&dir, &forever).unwrap(), Published::Created);
    assert_eq!(hold(&dir, &over).unwrap(), Published::Created);
    assert_eq!(hold(&dir, &pin("paper", 3, None)).unwrap(), Published::Exists);
    assert_eq!(holds(&dir).unwrap(), [forever, over]);
    let plan = plan_retention(&dir, ONE, &[], NOW).unwrap();
    assert_eq!(plan.delete, [Step(2)], "one pin is over");
    assert!(plan.keep.contains(&(Step(1), "held by paper".to_string())), "{plan:?}");
    release(&dir, "paper").unwrap();
    assert_eq!(plan_retention(&dir, ONE, &[], NOW).unwrap().delete, [Step(2), Step(1)]);
}
