use lacuna_types::{AttemptSeq, CoordEpoch, Generation};

use super::*;
use crate::catalog::Entry;
use crate::commit::{CommitError, commit};
use crate::layout::Attempt;
use crate::load::{Expected, LoadError, load_newest, load_step};
use crate::retain::{collect_garbage, delete};
use crate::testing::{manifest, part_path, run_dir, tiny, tree};

/// Two checkpoints, of steps 10 and 20.
fn two() -> (tempfile::TempDir, RunDir) {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    for step in [10, 20] {
        tiny(step).save(&dir, 2);
    }
    (root, dir)
}

/// Changes a bit in the middle of a part.
fn flip(dir: &RunDir, step: u64) {
    let path = part_path(dir, step, 1, 2);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
}

fn usable(dir: &RunDir) -> Vec<u64> {
    let entries = catalog::list(dir).unwrap();
    entries.iter().filter_map(Entry::good).map(|manifest| manifest.step).collect()
}

fn examined(dir: &RunDir, step: u64) -> Examined {
    let seal = manifest(dir, step).seal;
    examine(dir, Step(step), &seal)
}

#[test]
fn a_flipped_bit_sets_a_checkpoint_aside_for_the_one_before() {
    let (_root, dir) = two();
    assert_eq!(examined(&dir, 20), Examined::Sound);
    flip(&dir, 20);
    assert_eq!(usable(&dir), [10, 20], "sizes are right");
    let Examined::Damaged(why) = examined(&dir, 20) else { panic!() };
    assert!(why.starts_with("checkpoint step 20: part-00001-of-00002.safetensors is damaged"));
    assert!(why.contains("(affects "), "{why}");
    assert_eq!(usable(&dir), [10]);
    let state = tiny(10);
    let expected = Expected::tensors(&state.layout);
    let resumed = load_newest(&dir, &expected).unwrap().unwrap();
    state.assert_loaded(&resumed.state);
    assert_eq!(resumed.skipped.len(), 1);
    // Whoever asks for it by name is told, too.
    let Err(LoadError::Damaged { reason, next_good, .. }) = load_step(&dir, Step(20), &expected)
    else {
        panic!()
    };
    assert_eq!((reason, next_good), (format!("set aside: {why}"), Some(Step(10))));
}

#[test]
fn a_checkpoint_that_reads_well_again_counts_again() {
    let (_root, dir) = two();
    flip(&dir, 20);
    assert!(matches!(examined(&dir, 20), Examined::Damaged(_)));
    flip(&dir, 20);
    assert_eq!(usable(&dir), [10]);
    assert_eq!(examined(&dir, 20), Examined::Mended);
    assert_eq!(usable(&dir), [10, 20]);
    assert_eq!(examined(&dir, 20), Examined::Sound);
    mark(&dir, &manifest(&dir, 20), "by hand").unwrap();
    assert_eq!(usable(&dir), [10]);
    let verified = catalog::verify_and_mark(&dir, &manifest(&dir, 20)).unwrap();
    assert_eq!(verified.problems, Vec::<String>::new());
    assert_eq!(usable(&dir), [10, 20]);
}

#[test]
fn another_manifest_in_its_place_is_not_marked() {
    let (_root, dir) = two();
    let Examined::Damaged(why) = examine(&dir, Step(20), "blake3:00") else { panic!() };
    assert!(why.starts_with("another manifest has its place: blake3:"), "{why}");
    assert_eq!(usable(&dir), [10, 20]);
    assert_eq!(examine(&dir, Step(30), "blake3:00"), Examined::Gone);
}

/// A run that goes back trains the same steps again: the checkpoint that it makes there takes the
/// place of the damaged one, and what is left of that goes.
#[test]
fn a_damaged_checkpoint_gives_way_to_a_new_one() {
    let (_root, dir) = two();
    let state = tiny(20);
    let again = Attempt::new(Generation(13), AttemptSeq(1));
    let receipts = state.write(&dir, again, 3);
    let taken = commit(&dir, &receipts, &state.context(again, 3)).unwrap_err();
    assert!(matches!(taken, CommitError::Taken { same_state: true, .. }), "a sound one stays");

    flip(&dir, 20);
    examined(&dir, 20);
    let committed = commit(&dir, &receipts, &state.context(again, 3)).unwrap();
    assert_eq!(usable(&dir), [10, 20]);
    assert_eq!(manifest(&dir, 20).seal, committed.manifest);
    let repeated = commit(&dir, &receipts, &state.context(again, 3)).unwrap();
    assert_eq!(repeated, committed);
    let loaded = load_step(&dir, Step(20), &Expected::tensors(&state.layout)).unwrap();
    state.assert_loaded(&loaded);

    let gone = collect_garbage(&dir, Generation(13), &[]).unwrap();
    assert_eq!(gone, [dir.attempt(Step(20), Attempt::new(Generation(12), AttemptSeq(1)))]);
    let names = dir.storage().names(&dir.step(Step(20))).unwrap();
    assert_eq!(names, ["attempt-00000013.0001", "manifest.damaged.json", "manifest.json"]);
    delete(&dir, Step(20)).unwrap();
    assert!(!tree(&dir.path()).iter().any(|(name, _)| name.contains("step-000000020")));
}

/// A truncated part shows in the list without being read, and gives way as well.
#[test]
fn what_the_list_calls_damaged_gives_way_without_a_mark() {
    let (_root, dir) = two();
    std::fs::write(part_path(&dir, 20, 0, 2), b"short").unwrap();
    assert_eq!(usable(&dir), [10]);
    let state = tiny(20);
    let again = Attempt::new(Generation(13), AttemptSeq(1));
    let receipts = state.write(&dir, again, 1);
    commit(&dir, &receipts, &state.context(again, 1)).unwrap();
    assert_eq!(usable(&dir), [10, 20]);
}

/// The files of a checkpoint that was set aside stay for a person, whatever is tidied up.
#[test]
fn nobody_removes_what_was_set_aside() {
    let (_root, dir) = two();
    flip(&dir, 20);
    examined(&dir, 20);
    let before = tree(&dir.step(Step(20)));
    collect_garbage(&dir, Generation(99), &[]).unwrap();
    let last = std::num::NonZeroUsize::MIN;
    crate::retain::retain(&dir, last, &[], crate::testing::NOW).unwrap();
    assert_eq!(tree(&dir.step(Step(20))), before);
    assert_eq!(usable(&dir), [10]);
}

/// A coordinator whose time is over must not take a place either.
#[test]
fn who_is_fenced_off_makes_no_room() {
    let (_root, dir) = two();
    flip(&dir, 20);
    examined(&dir, 20);
    crate::commit::claim(&dir, CoordEpoch(8)).unwrap();
    let state = tiny(20);
    let again = Attempt::new(Generation(13), AttemptSeq(1));
    let receipts = state.write(&dir, again, 1);
    let error = commit(&dir, &receipts, &state.context(again, 1)).unwrap_err();
    assert!(matches!(error, CommitError::Fenced { .. }), "{error}");
    assert!(dir.manifest(Step(20)).exists());
}
