use expect_test::expect;

use super::*;
use crate::fixtures::{damage, synthetic};

fn message(error: impl fmt::Display, folder: &Path) -> String {
    error.to_string().replace(&folder.display().to_string(), "DIR")
}

#[test]
fn opens_by_folder_and_by_index() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = synthetic(folder.path(), 10, 16, 1);
    let other = Dataset::open(&folder.path().join(INDEX_NAME)).unwrap();
    for id in (0..10).map(SampleId) {
        assert_eq!(dataset.sample(id).unwrap(), other.sample(id).unwrap());
        assert!(other.label(id).is_some());
    }
    let place = other.place(SampleId(3));
    assert_eq!(place.member.as_deref(), Some("000000003.png"));
}

#[test]
fn a_damaged_byte_is_placed() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = synthetic(folder.path(), 10, 16, 1);
    let offset = dataset.index().record(SampleId(4)).offset;
    damage(&dataset.place(SampleId(4)).shard, offset + 30);
    let text = message(dataset.sample(SampleId(4)).unwrap_err(), folder.path());
    let text = text.split(" is corrupt: crc ").next().unwrap();
    expect!["sample 4 (`000000004.png` at byte 8704 of shard `DIR/demo-000000.tar`)"]
        .assert_eq(text);
    assert!(dataset.sample(SampleId(5)).is_ok());
}

#[test]
fn what_is_missing_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let open = |path: &Path| message(Dataset::open(path).unwrap_err(), folder.path());
    expect!["`DIR` holds no index.lacuna: make one with `lacuna data pack` or `lacuna data index`"]
        .assert_eq(&open(folder.path()));
    expect!["failed to open data set `DIR/nothing`"]
        .assert_eq(&open(&folder.path().join("nothing")));
    synthetic(folder.path(), 200, 16, 1);
    let shard = folder.path().join("demo-000001.tar");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    let text = open(folder.path());
    assert!(text.starts_with("shard `DIR/demo-000001.tar` has "), "{text}");
    fs::remove_file(&shard).unwrap();
    expect!["shard `DIR/demo-000001.tar` is missing"].assert_eq(&open(folder.path()));
}
