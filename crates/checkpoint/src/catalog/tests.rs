use super::*;
use crate::commit::{claim, commit};
use crate::testing::{attempt, manifest, part_path, run_dir, tiny};

fn steps(entries: &[Entry]) -> Vec<u64> {
    entries.iter().map(|entry| entry.step.0).collect()
}

#[test]
fn a_later_coordinator_wins_over_a_later_step() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    tiny(9).save(&dir, 1);
    claim(&dir, CoordEpoch(8)).unwrap();
    let state = tiny(6);
    let receipts = state.write(&dir, attempt(1), 1);
    let mut ctx = state.context(attempt(1), 1);
    ctx.coord_epoch = CoordEpoch(8);
    commit(&dir, &receipts, &ctx).unwrap();
    let entries = list(&dir).unwrap();
    assert_eq!(steps(&entries), [9, 6]);
    let newest = newest_good(&entries).unwrap();
    assert_eq!(newest.step, 6);
    assert_eq!(next_good(&entries, newest).unwrap().step, 9);
}

#[test]
fn damaged_entries_are_listed_with_a_reason() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    for step in [3, 6, 9] {
        tiny(step).save(&dir, 1);
    }
    std::fs::remove_file(part_path(&dir, 6, 0, 1)).unwrap();
    std::fs::copy(dir.manifest(Step(3)), dir.manifest(Step(9))).unwrap();
    std::fs::create_dir(dir.checkpoints().join("notes")).unwrap();
    let entries = list(&dir).unwrap();
    assert_eq!(steps(&entries), [6, 9, 3]);
    let reasons: Vec<&str> = entries
        .iter()
        .filter_map(|entry| match &entry.status {
            Status::Damaged { reason } => Some(reason.as_str()),
            Status::Good(_) => None,
        })
        .collect();
    assert!(reasons[0].starts_with(
        "checkpoint step 6: part-00000-of-00001.safetensors is missing (affects adamw.exp_avg/a."
    ));
    assert_eq!(reasons[1], "checkpoint step 9: manifest.json is that of run r-7f3a step 3");
    assert_eq!(reasons.len(), 2);
}

#[test]
fn verification_marks_the_checkpoint_it_read() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    tiny(3).save(&dir, 2);
    let manifest = manifest(&dir, 3);
    assert!(!is_verified(&dir, &manifest).unwrap());
    let verified = verify_and_mark(&dir, &manifest).unwrap();
    assert_eq!(verified.bytes, manifest.files.iter().map(|f| f.bytes).sum::<u64>());
    assert!(is_verified(&dir, &manifest).unwrap());
    let other = Manifest { seal: "blake3:00".to_string(), ..manifest };
    assert!(!is_verified(&dir, &other).unwrap());
}
