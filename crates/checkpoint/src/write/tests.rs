use std::borrow::Cow;

use super::*;
use crate::chain;
use crate::layout::PARTIAL;
use crate::partition::Partition;
use crate::state::{LeftoverSpec, Snapshot};
use crate::storage::{Disk, Storage};
use crate::testing::{attempt, micro, part_path, run_dir, tiny, tree};

#[test]
fn equal_states_give_equal_bytes() {
    let roots = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for root in &roots {
        micro(5).save(&run_dir(root.path()), 3);
    }
    let [a, b] = roots.each_ref().map(|root| tree(root.path()));
    assert_eq!(a.len(), 3 + 3 + 1 + 1 + 1, "parts, receipts, manifest, latest, claim");
    assert!(a == b, "the same bytes");
    assert!(a.iter().all(|(name, _)| !name.ends_with(PARTIAL)));
}

#[test]
fn parts_are_plain_safetensors() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let state = micro(5);
    state.save(&dir, 2);
    let mut elements = 0;
    for rank in 0..2 {
        let bytes = std::fs::read(part_path(&dir, 5, rank, 2)).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let keys: Vec<&String> = header.metadata().as_ref().unwrap().keys().collect();
        assert_eq!(keys, [PART_METADATA]);
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (name, tensor) in file.tensors() {
            assert_eq!(tensor.shape().len(), 1, "{name}");
            elements += if name.starts_with("param/") { tensor.shape()[0] } else { 0 };
        }
    }
    assert_eq!(elements, state.layout.numel());
}

#[test]
fn a_snapshot_writes_what_it_held() {
    let roots = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [a, b] = roots.each_ref().map(|root| run_dir(root.path()));
    let mut state = tiny(3);
    let partition = Partition::new(&state.layout, 1);
    let info = state.info(attempt(1), PartId { rank: 0, world: 1 });
    let direct = write_part(&a, &info, &state.view().part(&partition, 0)).unwrap();
    let mut snapshot = Snapshot::default();
    snapshot.take(&state.view().part(&partition, 0));
    // Training goes on while the part is written.
    state.sections.iter_mut().flatten().for_each(|x| *x += 1.0);
    assert_eq!(write_part(&b, &info, &snapshot.slices()).unwrap(), direct);
}

#[test]
fn receipts_survive_the_wire() {
    let root = tempfile::tempdir().unwrap();
    let receipt = tiny(3).write(&run_dir(root.path()), attempt(1), 1).remove(0);
    let text = receipt.render();
    assert_eq!(Receipt::parse(text.as_bytes()).unwrap(), receipt);
    let error = Receipt::parse(text.replace("\"step\":3", "\"step\":4").as_bytes()).unwrap_err();
    assert!(matches!(error, SealError::Digest { .. }), "{error}");
}

#[test]
fn values_that_are_not_finite_are_noticed() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let mut state = tiny(3);
    state.sections[2][1200] = f32::NAN;
    let finite: Vec<bool> =
        state.write(&dir, attempt(1), 2).iter().map(|receipt| receipt.finite).collect();
    assert_eq!(finite, [true, false]);
    state.save(&dir, 3);
}

#[test]
fn extra_tensors_go_along() {
    let root = tempfile::tempdir().unwrap();
    let state = tiny(3);
    let spec = LeftoverSpec { name: "user/x".to_string(), dtype: Dtype::U8, shape: vec![3] };
    let view = state.view().with_leftover(spec, Cow::Borrowed(b"abc"));
    let partition = Partition::new(&state.layout, 1);
    let info = state.info(attempt(1), PartId { rank: 0, world: 1 });
    let receipt = write_part(&run_dir(root.path()), &info, &view.part(&partition, 0)).unwrap();
    let last = receipt.slices.last().unwrap();
    assert_eq!((last.tensor.as_str(), last.crc64.0), ("user/x", Crc64::of(b"abc").value));
}

#[test]
fn a_part_is_written_once() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let state = tiny(12000);
    state.write(&dir, attempt(1), 1);
    let before = tree(root.path());
    let partition = Partition::new(&state.layout, 1);
    let info = state.info(attempt(1), PartId { rank: 0, world: 1 });
    let error = write_part(&dir, &info, &state.view().part(&partition, 0)).unwrap_err();
    expect_test::expect!["part 0 of 1 of step 12000 attempt 00000012.0001 exists already"]
        .assert_eq(&chain(&error));
    assert!(tree(root.path()) == before, "nothing changed and no partial file is left");
}

#[test]
fn failures_name_path_and_cause() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let state = tiny(3);
    std::fs::write(dir.checkpoints(), "in the way").unwrap();
    let partition = Partition::new(&state.layout, 1);
    let info = state.info(attempt(1), PartId { rank: 0, world: 1 });
    let error = write_part(&dir, &info, &state.view().part(&partition, 0)).unwrap_err();
    let text = chain(&error).replace(&root.path().display().to_string(), "ROOT");
    let text = text.replace(": ", ":\n") + "\n";
    expect_test::expect![[r#"
        part 0 of 1 of checkpoint step 3 was not written:
        failed to create directory `ROOT/r-7f3a/ckpt/step-000000003/attempt-00000012.0001`:
        Not a directory (os error 20)
    "#]]
    .assert_eq(&text);
}

/// A device that is full: the reservation fails before a byte is written.
#[test]
fn a_full_device_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("part");
    let error = Disk::new().begin(&target, 1 << 61).err().unwrap();
    assert!(error.to_string().starts_with("failed to reserve space for `"), "{error}");
    assert_eq!(tree(root.path()).len(), 0);
}
