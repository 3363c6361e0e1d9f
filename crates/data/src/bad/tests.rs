use expect_test::expect;

use super::*;
use crate::fixtures::synthetic;

fn example(dataset: &Dataset) -> BadSamples {
    let mut bad = BadSamples::none_of(dataset);
    for id in [3, 64, 64, 99] {
        bad.mark(SampleId(id));
    }
    bad
}

#[test]
fn what_was_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = synthetic(folder.path(), 100, 8, 1);
    let index = index_path(folder.path());
    let bad = example(&dataset);
    let path = bad.write(&index).unwrap().unwrap();
    assert_eq!(path, folder.path().join("index.bad"));
    let back = BadSamples::read(&index, &dataset).unwrap();
    assert_eq!(back, bad);
    assert_eq!(back.ids().collect::<Vec<_>>(), [3, 64, 99].map(SampleId));
    assert!(!back.contains(SampleId(4)) && !back.contains(SampleId(u64::MAX)));
    assert_eq!(BadSamples::none_of(&dataset).write(&index).unwrap(), None);
    assert!(!path.exists());
    BadSamples::none_of(&dataset).write(&index).unwrap();
    assert!(matches!(BadSamples::read(&index, &dataset), Err(ReadBadError::Io { .. })));
}

/// The bytes themselves, so that a change of the format is seen.
#[test]
fn golden_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = synthetic(folder.path(), 100, 8, 1);
    let bytes = example(&dataset).encode();
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    assert_eq!(bytes[16..48], dataset.fingerprint().0);
    expect!["4c4143554e4142440100000000000000"].assert_eq(&hex(&bytes[..16]));
    expect!["640000000000000003000000000000000800000000000000010000000800"].assert_eq(&hex(&[
        &bytes[48..64],
        &bytes[64..77],
        &[0],
    ]
    .concat()));
    assert_eq!(bytes.len(), 64 + 13 + 32);
}

#[test]
fn no_other_byte_and_no_cut_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = synthetic(folder.path(), 100, 8, 1);
    let good = example(&dataset).encode();
    let parse = |bytes: &[u8]| BadSamples::parse(bytes, Path::new("x/index.bad"), &dataset);
    assert!(parse(&good).is_ok());
    for at in 0..good.len() {
        for flip in [0x01, 0x80, 0xFF] {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            assert!(parse(&bytes).is_err(), "byte {at}");
        }
        assert!(parse(&good[..at]).is_err(), "cut at {at}");
    }
    assert!(parse(&[&good[..], &[0]].concat()).is_err());
    // A digest that fits does not make up for content that does not.
    for (at, byte) in [(12, 1), (48, 101), (56, 2), (76, 0x18)] {
        let mut bytes = good.clone();
        bytes[at] = byte;
        let end = bytes.len() - DIGEST_BYTES;
        let digest = blake3::hash(&bytes[..end]);
        bytes[end..].copy_from_slice(digest.as_bytes());
        expect!["`x/index.bad` is damaged: its counts do not match its content"]
            .assert_eq(&parse(&bytes).unwrap_err().to_string());
    }
}

#[test]
fn a_bitmap_of_other_data_is_refused() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let first = synthetic(folders[0].path(), 100, 8, 1);
    let second = synthetic(folders[1].path(), 101, 8, 1);
    example(&first).write(&index_path(folders[1].path())).unwrap();
    let error = BadSamples::read(&index_path(folders[1].path()), &second).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, ReadBadError::OtherData { .. }), "{text}");
    for fingerprint in [first.fingerprint(), second.fingerprint()] {
        assert!(text.contains(&fingerprint.to_string()), "{text}");
    }
}
