use std::fs;

use expect_test::expect;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof};
use proptest::{collection, prop_assert, prop_assert_eq, proptest};

use super::*;

fn record(offset: u64, bytes: u32, label: Option<u32>) -> SampleRecord {
    SampleRecord {
        offset,
        bytes,
        crc: 0x1234_5678,
        width: 28,
        height: 27,
        codec: Codec::Png,
        label,
    }
}

fn shard(name: &str, bytes: u64, records: Vec<SampleRecord>) -> ShardRecords {
    let entry = ShardEntry { name: name.to_string(), bytes, digest: [7; 32] };
    ShardRecords { entry, records }
}

fn example() -> Vec<ShardRecords> {
    let large = 10 << 20;
    let third: u64 = 2 * (1024 + u64::from(large));
    vec![
        shard("a-0.tar", 4096, vec![record(512, 100, Some(3)), record(1536, 7, None)]),
        shard(
            "a-1.tar",
            64 << 20,
            vec![
                record(512, large, Some(LABEL_MAX)),
                record(512 + third / 2, large, Some(0)),
                record(512 + third, large, None),
            ],
        ),
    ]
}

fn parse(bytes: &[u8]) -> Result<Index, ReadIndexError> {
    Index::parse(bytes.to_vec(), Path::new("x/index.lacuna"))
}

/// Gives changed bytes a fitting digest and length.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.len() - DIGEST_BYTES;
    let digest = blake3::hash(&bytes[..end]);
    bytes[end..].copy_from_slice(digest.as_bytes());
    bytes
}

#[test]
fn what_was_written_is_read() {
    let index = Index::build(&example());
    let folder = tempfile::tempdir().unwrap();
    index.write(folder.path()).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no partial file stays");
    let back = Index::read(&folder.path().join(INDEX_NAME)).unwrap();
    assert_eq!(back.fingerprint(), index.fingerprint());
    assert_eq!((back.n_samples(), back.n_chunks()), (5, 3));
    // The second shard's first two samples span over 16 MiB and make a chunk.
    assert_eq!(**back.chunk_bounds(), [0, 2, 4, 5]);
    assert_eq!(back.shard_samples(1), 2..5);
    let records: Vec<SampleRecord> = example().into_iter().flat_map(|s| s.records).collect();
    for (id, record) in records.iter().enumerate() {
        assert_eq!(back.record(SampleId(id as u64)), *record);
        assert_eq!(back.shard_of(SampleId(id as u64)), usize::from(id >= 2));
    }
    assert_eq!(back.n_classes(), LABEL_MAX + 1);
    assert_eq!(back.shards()[0].name, "a-0.tar");
}

/// The bytes themselves, so that a change of the format is seen.
#[test]
fn golden_bytes() {
    let index = Index::build(&example()[..1]);
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let rows: Vec<String> = index.bytes[..HEADER_BYTES].chunks(16).map(hex).collect();
    expect![[r#"
        4c4143554e4149580100000000000000
        c9000000000000000100000001000000
        02000000000000000000000000000000"#]]
    .assert_eq(&rows.join("\n"));
    let tail = &index.bytes[index.records_at..index.bytes.len() - DIGEST_BYTES];
    let rows: Vec<String> = tail.chunks(RECORD_BYTES).map(hex).collect();
    expect![[r#"
        000200000000000064000000785634121c001b0003000001
        000600000000000007000000785634121c001b00ffffff01"#]]
    .assert_eq(&rows.join("\n"));
}

#[test]
fn wrong_files_are_named() {
    let good = Index::build(&example()).bytes;
    let message = |bytes: &[u8]| parse(bytes).unwrap_err().to_string();
    let changed = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    expect!["`x/index.lacuna` is not an index: it does not start with LACUNAIX"]
        .assert_eq(&message(b"LACUNA"));
    expect!["index `x/index.lacuna` has version 2, this build reads 1: write it again with `lacuna data index`"]
        .assert_eq(&message(&changed(8, 2)));
    expect!["index `x/index.lacuna` has 100 bytes where its header says 346"]
        .assert_eq(&message(&good[..100]));
    expect!["index `x/index.lacuna` is wrong at byte 16: the file ends inside the length"]
        .assert_eq(&message(&good[..20]));
    expect!["index `x/index.lacuna` is damaged: its digest does not match its content"]
        .assert_eq(&message(&changed(120, 9)));
    let shards = 24;
    expect!["index `x/index.lacuna` is wrong at byte 24: the counts do not fit the file"]
        .assert_eq(&message(&sealed(changed(shards + 3, 200))));
    let samples = 32;
    expect!["index `x/index.lacuna` is wrong at byte 24: the counts do not fit the file"]
        .assert_eq(&message(&sealed(changed(samples, 6))));
    let name = HEADER_BYTES + SHARD_FIXED_BYTES;
    expect![
        "index `x/index.lacuna` is wrong at byte 98: a shard's name leaves the folder: `/-0.tar`"
    ]
    .assert_eq(&message(&sealed(changed(name, b'/'))));
    let bound = name + 7 + SHARD_FIXED_BYTES + 7 + 8;
    expect!["index `x/index.lacuna` is wrong at byte 162: a chunk spans two shards at sample 2"]
        .assert_eq(&message(&sealed(changed(bound, 3))));
    let records = Index::build(&example()).records_at;
    expect!["index `x/index.lacuna` is wrong at byte 194: codec 9 is unknown"]
        .assert_eq(&message(&sealed(changed(records + 23, 9))));
    expect!["index `x/index.lacuna` is wrong at byte 194: a sample at byte 4294967808 of 100 bytes lies outside shard `a-0.tar`"].assert_eq(&message(&sealed(changed(records + 4, 1))));
    let missing = Index::read(Path::new("/nonexistent/index.lacuna")).unwrap_err();
    assert!(matches!(missing, ReadIndexError::Io { .. }));
}

fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let good = Index::build(&example()).bytes;
    let length = good.len();
    let edits = collection::vec((8..length, any::<u8>()), 1..6);
    let edited = edits.prop_map(move |edits| {
        let mut bytes = good.clone();
        edits.into_iter().for_each(|(at, byte)| bytes[at] = byte);
        sealed(bytes)
    });
    let noise = collection::vec(any::<u8>(), 0..300).prop_map(|tail| {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(INDEX_VERSION.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(((tail.len() + 24 + DIGEST_BYTES) as u64).to_le_bytes());
        bytes.extend(tail);
        bytes.extend([0; DIGEST_BYTES]);
        sealed(bytes)
    });
    prop_oneof![edited, noise, collection::vec(any::<u8>(), 0..200), Just(Vec::new())]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever the bytes, parsing ends in an error or in an index whose every record can be read.
    #[test]
    fn hostile_bytes_never_panic(bytes in hostile()) {
        let Ok(index) = parse(&bytes) else { return Ok(()) };
        prop_assert!(index.n_samples() > 0);
        for id in (0..index.n_samples()).map(SampleId) {
            let record = index.record(id);
            let shard = &index.shards()[index.shard_of(id)];
            prop_assert!(record.offset + u64::from(record.bytes) <= shard.bytes);
        }
        let last = index.chunk_bounds().last().copied();
        prop_assert_eq!(last, Some(index.n_samples()));
    }

    #[test]
    fn every_cut_is_an_error(cut in 0usize..346) {
        let good = Index::build(&example()).bytes;
        prop_assert!(parse(&good[..cut]).is_err());
    }
}
