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
    assert_eq!(report.n_bad(), 1);
    assert_eq!(report.bad[0].place.sample, SampleId(70));
    assert!(report.bad[0].error.contains("is corrupt"));
    assert_eq!(report.bad_shards.len(), 2);
    assert!(!report.is_clean());
}

/// What cannot be read is not called bad: another try may find it good.
#[test]
fn unreadable_is_not_bad() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = synthetic(folder.path(), 150, 16, 1);
    let shards = dataset.index().shards();
    std::fs::remove_file(folder.path().join(&shards[1].name)).unwrap();
    let place = dataset.place(SampleId(0));
    damage(&place.shard, place.offset + 20);
    let report = verify(&dataset, 2, &mut |_| {});
    let lost = dataset.index().shard_samples(1);
    assert_eq!((report.n_bad(), report.n_unread), (1, lost.end - lost.start));
    assert_eq!(report.found.ids().collect::<Vec<_>>(), [SampleId(0)]);
    let unread: Vec<u64> = report.unread.iter().map(|entry| entry.place.sample.0).collect();
    assert_eq!(unread, lost.collect::<Vec<_>>());
    assert_eq!(report.bad_shards.iter().map(|s| s.is_unread).collect::<Vec<_>>(), [false, true]);
    assert!(report.shard_digests[1].is_none() && report.shard_digests[0].is_some());
}
