use super::*;
use crate::load::{Expected, load_step};
use crate::manifest::Loss;
use crate::testing::{NOW, attempt, manifest, part_path, run_dir, tiny, tree};
use crate::write::write_part;

fn with_run_file(root: &std::path::Path) -> RunDir {
    let dir = run_dir(root);
    let context = tiny(10).context(attempt(1), 1);
    let facts =
        crate::manifest::RunFacts { epoch: 0, samples: 0, loss: Loss::default(), ..context.facts };
    let file = RunFile::new(&dir, NOW.to_string(), context.spec, facts, 32, 4);
    assert_eq!(file.write(&dir).unwrap(), Published::Created);
    assert_eq!(file.write(&dir).unwrap(), Published::Exists);
    assert_eq!(RunFile::read(&dir).unwrap(), Some(file));
    dir
}

/// All that a manifest says comes back, but for the time and the losses.
#[test]
fn a_lost_manifest_is_made_again() {
    for world in 1..=4 {
        let root = tempfile::tempdir().unwrap();
        let dir = with_run_file(root.path());
        let state = tiny(13);
        state.save(&dir, world);
        let lost = manifest(&dir, 13);
        std::fs::remove_file(dir.manifest(Step(13))).unwrap();
        let made = rebuild(&dir, Step(13), NOW.to_string()).unwrap();
        let mut want = lost.clone();
        want.created = NOW.to_string();
        want.state.facts = RunFile::read(&dir).unwrap().unwrap().facts_at(Step(13));
        want.seal.clone_from(&made.seal);
        assert_eq!(made, want);
        assert_eq!((made.state.facts.epoch, made.state.facts.samples), (3, 13 * 32));
        assert_eq!(restore(&dir, &made).unwrap(), Published::Created);
        state.assert_loaded(&load_step(&dir, Step(13), &Expected::tensors(&state.layout)).unwrap());
        let again = rebuild(&dir, Step(13), NOW.to_string()).unwrap_err();
        assert_eq!(again.to_string(), "checkpoint step 13 has a sound manifest");
    }
}

#[test]
fn a_damaged_manifest_is_kept_beside() {
    let root = tempfile::tempdir().unwrap();
    let dir = with_run_file(root.path());
    tiny(5).save(&dir, 2);
    let before = manifest(&dir, 5);
    tiny(10).save(&dir, 2);
    std::fs::write(dir.manifest(Step(10)), "{").unwrap();
    let made = rebuild(&dir, Step(10), NOW.to_string()).unwrap();
    assert_eq!(made.parent, Some(Parent { step: 5, manifest: before.seal }));
    restore(&dir, &made).unwrap();
    assert_eq!(std::fs::read(dir.damaged_manifest(Step(10))).unwrap(), b"{");
    assert_eq!(manifest(&dir, 10), made);
}

/// Parts that were changed, with their receipts or without, make no manifest.
#[test]
fn changed_parts_are_refused() {
    for with_receipts in [true, false] {
        let root = tempfile::tempdir().unwrap();
        let dir = with_run_file(root.path());
        tiny(10).save(&dir, 2);
        std::fs::remove_file(dir.manifest(Step(10))).unwrap();
        if !with_receipts {
            for rank in 0..2 {
                let part = PartId { rank, world: 2 };
                let place = dir.attempt(Step(10), attempt(1));
                std::fs::remove_file(place.join(part.receipt_name())).unwrap();
            }
        }
        let path = part_path(&dir, 10, 1, 2);
        let sound = std::fs::read(&path).unwrap();
        for at in (0..sound.len()).step_by(97) {
            let mut bytes = sound.clone();
            bytes[at] ^= 4;
            std::fs::write(&path, bytes).unwrap();
            let made = rebuild(&dir, Step(10), NOW.to_string());
            assert!(made.is_err(), "byte {at}, receipts {with_receipts}");
        }
        for cut in [0, 7, 8, 100, 4096, sound.len() - 1] {
            std::fs::write(&path, &sound[..cut]).unwrap();
            assert!(rebuild(&dir, Step(10), NOW.to_string()).is_err(), "cut at {cut}");
        }
        std::fs::write(&path, &sound).unwrap();
        rebuild(&dir, Step(10), NOW.to_string()).unwrap();
    }
}

#[test]
fn what_is_missing_is_said() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let error = rebuild(&dir, Step(10), NOW.to_string()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the run has no run.json, which says what a manifest does beside its parts"
    );
    let root = tempfile::tempdir().unwrap();
    let dir = with_run_file(root.path());
    let error = rebuild(&dir, Step(10), NOW.to_string()).unwrap_err();
    assert_eq!(error.to_string(), "checkpoint step 10: there is no attempt at it");
    let state = tiny(10);
    let partition = crate::partition::Partition::new(&state.layout, 2);
    let info = state.info(attempt(1), PartId { rank: 1, world: 2 });
    write_part(&dir, &info, &state.view().part(&partition, 1)).unwrap();
    let error = rebuild(&dir, Step(10), NOW.to_string()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "checkpoint step 10: no attempt has all its parts: 00000012.0001 has 1 of 2"
    );
    assert_eq!(tree(&dir.step(Step(10))).len(), 2, "nothing was written");
}
