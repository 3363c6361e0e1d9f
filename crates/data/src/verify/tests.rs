use super::*;
use crate::fixtures::{damage, synthetic};

#[test]
fn sound_data_is_clean() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = synthetic(folder.path(), 150, 16, 1);
    let mut last = 0;
    let report = verify(&dataset, 2, &mut |p| last = p.done);
    assert!(report.is_clean());
    assert_eq!((report.n_samples, last), (150, 150));
}

#[test]
fn damage_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = synthetic(folder.path(), 150, 16, 1);
    let place = dataset.place(SampleId(70));
    damage(&place.shard, place.offset + 20);
    // Padding belongs to no sample: only the digest of the shard sees it.
    let last = dataset.index().shards().len() - 1;
    let shard = &dataset.index().shards()[last];
    damage(&folder.path().join(&shard.name), shard.bytes - 1);
    let report = verify(&dataset, 3, &mut |_| {});
    assert_eq!(report.n_bad, 1);
    assert_eq!(report.bad[0].place.sample, SampleId(70));
    assert!(report.bad[0].error.contains("is corrupt"));
    assert_eq!(report.bad_shards.len(), 2);
    assert!(!report.is_clean());
}
