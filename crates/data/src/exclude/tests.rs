use std::sync::Arc;

use image::ExtendedColorType;
use lacuna_recipe::order::{EpochOrder, OrderParams};

use super::*;
use crate::bad::{bad_path, index_path};
use crate::fixtures::{damage, grey_png, jpeg, noise, synthetic, write_tar};
use crate::verify::verify;
use crate::wds::build_index;

fn check(dataset: &Dataset) -> VerifyReport {
    verify(dataset, 2, &mut |_| {})
}

fn run(dataset: &Dataset, folder: &Path) -> Result<Option<Excluded>, ExcludeError> {
    exclude(dataset, &index_path(folder), &check(dataset))
}

/// Shards of images that look sound to an indexer and of which some do not decode.
fn mixed(folder: &Path) -> Dataset {
    let good: Vec<Vec<u8>> = (0..6).map(|i| grey_png(12, i)).collect();
    let photo = jpeg(&noise(24 * 24 * 3, 7), 24, 24, ExtendedColorType::Rgb8);
    let cut_png = &good[0][..good[0].len() / 2];
    let cut_jpeg = &photo[..photo.len() - 60];
    let random = [&good[1][..33], &noise(200, 9)].concat();
    write_tar(
        &folder.join("a.tar"),
        &[("0.png", &good[0]), ("1.png", cut_png), ("2.jpg", &photo), ("3.png", &good[2])],
    );
    write_tar(&folder.join("b.tar"), &[("4.jpg", cut_jpeg), ("5.png", &random)]);
    write_tar(&folder.join("c.tar"), &[("6.png", &good[3]), ("7.png", &random)]);
    build_index(folder, 1, &mut |_| {}).unwrap();
    Dataset::open(folder).unwrap()
}

#[test]
fn bad_images_leave_the_index_and_the_order() {
    let folder = tempfile::tempdir().unwrap();
    let before = mixed(folder.path());
    assert_eq!(before.n_samples(), 8);
    let report = check(&before);
    assert_eq!(report.found.ids().map(|id| id.0).collect::<Vec<_>>(), [1, 4, 5, 7]);
    let done = exclude(&before, &index_path(folder.path()), &report).unwrap().unwrap();
    assert_eq!((done.n_excluded, done.n_left, done.n_shards_dropped), (4, 4, 1));
    assert_eq!(fs::read(&done.kept).unwrap(), before.index().bytes());
    assert_eq!(done.kept, folder.path().join("index.lacuna.before-exclude"));
    let after = Dataset::open(folder.path()).unwrap();
    assert_eq!((done.old, done.new), (before.fingerprint(), after.fingerprint()));
    assert!(check(&after).is_clean());
    let names: Vec<&str> = after.index().shards().iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["a.tar", "c.tar"]);
    let params = OrderParams::default_for(after.n_samples(), after.index().n_chunks(), 1);
    let order = EpochOrder::new(&after.order_spec(params, 3, 1), 0);
    let mut seen: Vec<u64> = order.samples(0..4).iter().map(|id| id.0).collect();
    seen.sort();
    assert_eq!(seen, [0, 1, 2, 3]);
    for (now, then) in [(0, 0), (1, 2), (2, 3), (3, 6)] {
        let (now, then) = (SampleId(now), SampleId(then));
        assert_eq!(after.sample(now).unwrap(), before.sample(then).unwrap());
    }
    assert_eq!(run(&after, folder.path()).unwrap(), None, "nothing is left to take out");
}

/// Damage after indexing changes a shard's digest, which the new index has as it is now.
#[test]
fn damage_since_indexing_is_left_out_and_the_rest_is_sound() {
    let folder = tempfile::tempdir().unwrap();
    let mut dataset = synthetic(folder.path(), 150, 16, 1);
    let first = dataset.fingerprint();
    for (round, name) in [(1, "index.lacuna.before-exclude"), (2, "index.lacuna.before-exclude.2")]
    {
        let place = dataset.place(SampleId(70));
        damage(&place.shard, place.offset + 20);
        let report = check(&dataset);
        assert_eq!((report.n_bad(), report.bad_shards.len()), (1, 1));
        let done = exclude(&dataset, &index_path(folder.path()), &report).unwrap().unwrap();
        assert_eq!(done.kept, folder.path().join(name));
        dataset = Arc::new(Dataset::open(folder.path()).unwrap());
        assert_eq!(dataset.n_samples(), 150 - round);
        assert!(check(&dataset).is_clean());
    }
    let kept = Index::read(&folder.path().join("index.lacuna.before-exclude")).unwrap();
    assert_eq!(kept.fingerprint(), first, "the first index is never lost");
}

#[test]
fn without_a_good_sample_nothing_is_rewritten() {
    let folder = tempfile::tempdir().unwrap();
    let random = [&grey_png(9, 1)[..33], &noise(90, 2)].concat();
    write_tar(&folder.path().join("a.tar"), &[("0.png", &random), ("1.png", &random)]);
    build_index(folder.path(), 1, &mut |_| {}).unwrap();
    let dataset = Dataset::open(folder.path()).unwrap();
    let error = run(&dataset, folder.path()).unwrap_err();
    assert!(error.to_string().contains("all 2 samples of"), "{error}");
    assert_eq!(
        Index::read(&index_path(folder.path())).unwrap().fingerprint(),
        dataset.fingerprint()
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn what_could_not_be_read_stops_it() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = mixed(folder.path());
    let b = folder.path().join("b.tar");
    fs::remove_file(&b).unwrap();
    let error = run(&dataset, folder.path()).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, ExcludeError::Unread { n: 3, .. }), "{text}");
    assert!(text.contains("b.tar"), "{text}");
    assert_eq!(
        Index::read(&index_path(folder.path())).unwrap().fingerprint(),
        dataset.fingerprint()
    );
}

#[test]
fn an_index_written_since_then_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = mixed(folder.path());
    let report = check(&dataset);
    write_tar(&folder.path().join("d.tar"), &[("8.png", &grey_png(5, 1))]);
    let now = build_index(folder.path(), 1, &mut |_| {}).unwrap().index.fingerprint();
    let error = exclude(&dataset, &index_path(folder.path()), &report).unwrap_err();
    assert!(matches!(error, ExcludeError::OtherIndex { found, .. } if found == now), "{error}");
    report.found.write(&index_path(folder.path())).unwrap();
    let dataset = Dataset::open(folder.path()).unwrap();
    let read = BadSamples::read(&index_path(folder.path()), &dataset);
    assert!(read.unwrap_err().to_string().contains("lists bad samples of data"));
    assert!(bad_path(&index_path(folder.path())).exists());
}
