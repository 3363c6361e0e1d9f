use expect_test::expect;

use super::*;
use crate::catalog::list;
use crate::chain;
use crate::layout::{PARTIAL, PartId};
use crate::load::{Expected, load_newest};
use crate::testing::{attempt, manifest, part_path, run_dir, tiny, tree};

#[test]
fn committing_again_finds_the_commit() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let state = tiny(3);
    let receipts = state.write(&dir, attempt(1), 2);
    let mut ctx = state.context(attempt(1), 2);
    let first = commit(&dir, &receipts, &ctx).unwrap();
    let before = tree(root.path());
    assert_eq!(commit(&dir, &receipts, &ctx).unwrap(), first);
    ctx.created = "2026-11-23T22:31:09Z".to_string();
    assert_eq!(commit(&dir, &receipts, &ctx).unwrap(), first, "a later try of the same commit");
    assert!(tree(root.path()) == before, "nothing changed");
    assert_eq!(first.state_digest, state.digest());
}

#[test]
fn a_step_is_committed_once() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let state = tiny(3);
    state.save(&dir, 1);
    let receipts = state.write(&dir, attempt(2), 2);
    let error = commit(&dir, &receipts, &state.context(attempt(2), 2)).unwrap_err();
    assert!(matches!(error, CommitError::Taken { same_state: true, .. }));
    expect!["checkpoint step 3 exists already: attempt 00000012.0001 of coordinator epoch 7"]
        .assert_eq(&chain(&error));
    assert_eq!(manifest(&dir, 3).attempt, attempt(1));
    assert!(tree(root.path()).iter().all(|(name, _)| !name.ends_with(PARTIAL)));
}

#[test]
fn every_writer_must_report() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let state = tiny(3);
    let mut receipts = state.write(&dir, attempt(1), 4);
    receipts.remove(2);
    receipts.swap(0, 2);
    receipts.push(receipts[0].clone());
    let error = commit(&dir, &receipts, &state.context(attempt(1), 4)).unwrap_err();
    expect!["checkpoint step 3: no receipt of ranks [2]"].assert_eq(&chain(&error));
    assert_eq!(list(&dir).unwrap(), []);
}

#[test]
fn receipts_of_other_checkpoints_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let state = tiny(3);
    let mut receipts = state.write(&dir, attempt(1), 2);
    receipts[1] = state.write(&dir, attempt(2), 2).remove(1);
    let error = commit(&dir, &receipts, &state.context(attempt(1), 2)).unwrap_err();
    expect!["checkpoint step 3: receipt of rank 1 has attempt 00000012.0002, not 00000012.0001"]
        .assert_eq(&chain(&error));
}

#[test]
fn replicas_that_differ_are_not_committed() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let (state, mut other) = (tiny(3), tiny(3));
    other.sections[0][1210] += 1.0;
    let mut receipts = state.write(&dir, attempt(1), 2);
    receipts[1] = other.write(&dir, attempt(2), 2).remove(1);
    receipts[1].attempt = attempt(1);
    let error = commit(&dir, &receipts, &state.context(attempt(1), 2)).unwrap_err();
    assert!(matches!(error, CommitError::Divergence { .. }), "{error}");
    // A writer that digests one state and writes another is found, too.
    receipts[1].state_digest = receipts[0].state_digest;
    let error = commit(&dir, &receipts, &state.context(attempt(1), 2)).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.starts_with("tensors and counters have state digest"), "{source}");
}

#[test]
fn parts_must_be_there() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let state = tiny(3);
    let receipts = state.write(&dir, attempt(1), 2);
    std::fs::remove_file(part_path(&dir, 3, 1, 2)).unwrap();
    let error = commit(&dir, &receipts, &state.context(attempt(1), 2)).unwrap_err();
    expect!["checkpoint step 3: part-00001-of-00002.safetensors is missing"]
        .assert_eq(&chain(&error));
}

#[test]
fn an_older_coordinator_is_fenced_off() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let state = tiny(3);
    let receipts = state.write(&dir, attempt(1), 1);
    claim(&dir, CoordEpoch(9)).unwrap();
    let error = commit(&dir, &receipts, &state.context(attempt(1), 1)).unwrap_err();
    expect!["checkpoint step 3: coordinator epoch 7 is fenced off by epoch 9"]
        .assert_eq(&chain(&error));
    for epoch in [8, 9] {
        let error = claim(&dir, CoordEpoch(epoch)).unwrap_err();
        assert!(matches!(error, ClaimError::Taken { .. }), "{error}");
    }
    let mut ctx = state.context(attempt(1), 1);
    ctx.coord_epoch = CoordEpoch(10);
    let error = commit(&dir, &receipts, &ctx).unwrap_err();
    expect!["checkpoint step 3: coordinator epoch 10 is not claimed"].assert_eq(&chain(&error));
    assert_eq!(list(&dir).unwrap(), []);
}

/// What a crash can leave at each point of a save; the checkpoint before stays, and the next works.
#[test]
fn leftovers_of_crashes_are_not_checkpoints() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let old = tiny(3);
    old.save(&dir, 2);
    let state = tiny(6);
    let place = dir.attempt(Step(6), attempt(1));
    let newest = || {
        let resumed = load_newest(&dir, &Expected::tensors(&state.layout)).unwrap().unwrap();
        assert_eq!(resumed.skipped, []);
        resumed.state
    };
    std::fs::create_dir_all(&place).unwrap();
    old.assert_loaded(&newest());
    let part = PartId { rank: 0, world: 2 }.file_name();
    std::fs::write(place.join(format!("{part}{PARTIAL}")), "half").unwrap();
    old.assert_loaded(&newest());
    std::fs::remove_dir_all(&place).unwrap();
    let receipts = state.write(&dir, attempt(1), 2);
    old.assert_loaded(&newest());
    // The commit died after writing its temporary file, and is made again.
    std::fs::write(place.join(format!("manifest.json{PARTIAL}")), "{\"half").unwrap();
    std::fs::write(root.path().join(format!("r-7f3a/latest.json{PARTIAL}")), "").unwrap();
    old.assert_loaded(&newest());
    commit(&dir, &receipts, &state.context(attempt(1), 2)).unwrap();
    state.assert_loaded(&newest());
    // The hint is not needed.
    std::fs::remove_file(dir.latest()).unwrap();
    state.assert_loaded(&newest());
}
