use std::fmt::Write as _;
use std::io::Write as _;

use expect_test::expect;
use image::ExtendedColorType;
use lacuna_types::SampleId;
use serde_json::{Value, json};

use super::layout::Int;
use super::*;
use crate::dataset::Dataset;
use crate::files::chain;
use crate::fixtures::{config, grey_png, jpeg, noise, pack_quietly};
use crate::pack::{PackSource, pack};
use crate::verify::verify;
use crate::wds;

/// Columns of the shards below: name, encoding and size.
type Column<'a> = (&'a str, &'a str, Option<u32>);

const COLUMNS: [Column<'static>; 4] = [
    ("box", "ndarray:int32:2", Some(8)),
    ("image", "jpeg", None),
    ("label", "int", Some(8)),
    ("meta", "pkl", None),
];

/// Writes samples, each a value a column, as a writer of MDS does.
fn shard(columns: &[Column<'_>], samples: &[Vec<Vec<u8>>]) -> Vec<u8> {
    let encode = |values: &Vec<Vec<u8>>| -> Vec<u8> {
        let mut out: Vec<u8> = Vec::new();
        for (value, column) in values.iter().zip(columns) {
            match column.2 {
                None => out.extend((value.len() as u32).to_le_bytes()),
                Some(size) => assert_eq!(value.len(), size as usize),
            }
        }
        out.extend(values.concat());
        out
    };
    let settings = br#"{"compression": null}"#;
    let samples: Vec<Vec<u8>> = samples.iter().map(encode).collect();
    let mut out: Vec<u8> = (samples.len() as u32).to_le_bytes().to_vec();
    let mut offset = 4 + 4 * (samples.len() + 1) + settings.len();
    out.extend((offset as u32).to_le_bytes());
    for sample in &samples {
        offset += sample.len();
        out.extend((offset as u32).to_le_bytes());
    }
    out.extend(settings);
    out.extend(samples.concat());
    out
}

/// Describes a plain shard as the list does.
fn entry(columns: &[Column<'_>], name: &str, bytes: &[u8]) -> Value {
    let names: Vec<&str> = columns.iter().map(|column| column.0).collect();
    let encodings: Vec<&str> = columns.iter().map(|column| column.1).collect();
    let sizes: Vec<Option<u32>> = columns.iter().map(|column| column.2).collect();
    json!({
        "column_encodings": encodings, "column_names": names, "column_sizes": sizes,
        "compression": null, "format": "mds", "hashes": [],
        "raw_data": { "basename": name, "bytes": bytes.len(), "hashes": {} },
        "samples": u32::from_le_bytes(bytes[..4].try_into().unwrap()), "size_limit": 67108864,
        "version": 2, "zip_data": null,
    })
}

fn write_list(folder: &Path, shards: &[Value]) {
    let list = json!({ "shards": shards, "version": 2 });
    fs::write(folder.join(MDS_INDEX_NAME), list.to_string()).unwrap();
}

fn image(i: u32) -> Vec<u8> {
    if i.is_multiple_of(3) {
        return grey_png(8 + i, i);
    }
    jpeg(&noise(12 * 9 * 3, i), 12, 9, ExtendedColorType::Rgb8)
}

fn sample(i: u32) -> Vec<Vec<u8>> {
    let meta = vec![i as u8; i as usize % 5];
    vec![vec![7; 8], image(i), i64::from(i % 4).to_le_bytes().to_vec(), meta]
}

/// Two shards of 5 and 4 samples; the second has a broken image and one without a label.
pub(crate) fn plain(folder: &Path) -> Vec<Value> {
    let mut samples: Vec<Vec<Vec<u8>>> = (0..9).map(sample).collect();
    samples[6][1] = b"no image".to_vec();
    samples[7][2] = (-1i64).to_le_bytes().to_vec();
    fs::create_dir_all(folder.join("sub")).unwrap();
    let parts = [("shard.00000.mds", &samples[..5]), ("sub/shard.00000.mds", &samples[5..])];
    let mut shards: Vec<Value> = Vec::new();
    for (name, part) in parts {
        let bytes = shard(&COLUMNS, part);
        fs::write(folder.join(name), &bytes).unwrap();
        shards.push(entry(&COLUMNS, name, &bytes));
    }
    write_list(folder, &shards);
    shards
}

/// Compresses the shards of [`plain`] in place: the first by zstd, the second by gzip.
pub(crate) fn compress(folder: &Path, shards: &mut [Value]) {
    for (i, shard) in shards.iter_mut().enumerate() {
        let name = shard["raw_data"]["basename"].as_str().unwrap().to_string();
        let bytes = fs::read(folder.join(&name)).unwrap();
        fs::remove_file(folder.join(&name)).unwrap();
        let (algorithm, suffix, packed) = match i {
            0 => ("zstd:9", "zstd", zstd::encode_all(&bytes[..], 9).unwrap()),
            _ => {
                let level = flate2::Compression::fast();
                let mut gz = flate2::write::GzEncoder::new(Vec::new(), level);
                gz.write_all(&bytes).unwrap();
                ("gz", "gz", gz.finish().unwrap())
            }
        };
        let name = format!("{name}.{suffix}");
        fs::write(folder.join(&name), &packed).unwrap();
        shard["compression"] = json!(algorithm);
        shard["zip_data"] = json!({ "basename": name, "bytes": packed.len(), "hashes": {} });
    }
    write_list(folder, shards);
}

fn index(folder: &Path) -> Result<IndexReport, BuildIndexError> {
    wds::build_index(folder, 2, &mut |_| {})
}

/// Images and labels of the samples that [`plain`] writes and that can be used.
fn wanted() -> Vec<(Vec<u8>, Option<u32>)> {
    let ids = (0..9).filter(|i| *i != 6);
    ids.map(|i| (image(i), (i != 7).then_some(i % 4))).collect()
}

fn samples_of(dataset: &Dataset) -> Vec<(Vec<u8>, Option<u32>)> {
    let ids = (0..dataset.n_samples()).map(SampleId);
    ids.map(|id| (dataset.sample(id).unwrap(), dataset.label(id))).collect()
}

#[test]
fn plain_shards_are_used_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    plain(root);
    let report = index(root).unwrap();
    assert_eq!(report.skipped.n, 1);
    let place = &report.skipped.first[0].place;
    assert!(place.ends_with("/sub/shard.00000.mds: sample 1"), "{place}");
    let dataset = Dataset::open(root).unwrap();
    assert_eq!(samples_of(&dataset), wanted());
    assert!(verify(&dataset, 2, &mut |_| {}).is_clean());
    // What lies in front of an image here is no tar header.
    let text = dataset.place(SampleId(4)).to_string().replace(&root.display().to_string(), "DIR");
    let offset = dataset.index().record(SampleId(4)).offset;
    assert_eq!(text, format!("sample 4 (byte {offset} of shard `DIR/shard.00000.mds`)"));
    assert_eq!(dataset.place(SampleId(4)).member, None);
}

#[test]
fn shards_are_repacked_compressed_or_not() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("in");
    let mut shards = plain(&root);
    let source = PackSource::detect(&root).unwrap();
    assert_eq!(source, PackSource::Mds(root.clone()));
    let report = pack_quietly(&source, &folder.path().join("plain"), 8192);
    assert_eq!((report.n_samples, report.skipped.n), (8, 1));
    let packed = Dataset::open(&folder.path().join("plain")).unwrap();
    assert_eq!(samples_of(&packed), wanted());
    assert_eq!(packed.place(SampleId(3)).member.as_deref(), Some("000000003.png"));

    compress(&root, &mut shards);
    let again = pack_quietly(&source, &folder.path().join("zip"), 8192);
    assert_eq!(again.fingerprint, report.fingerprint);
    let message = chain(&index(&root).unwrap_err());
    assert!(message.contains("shard.00000.mds.zstd` is compressed"), "{message}");
    assert!(message.contains("`lacuna data pack`"), "{message}");

    // Where both are there, as in the cache of a reader, the plain shard is read.
    for (i, shard) in shards.iter().enumerate() {
        let zip = root.join(shard["zip_data"]["basename"].as_str().unwrap());
        let bytes = fs::read(&zip).unwrap();
        let plain = match i {
            0 => zstd::decode_all(&bytes[..]).unwrap(),
            _ => {
                let mut out: Vec<u8> = Vec::new();
                MultiGzDecoder::new(&bytes[..]).read_to_end(&mut out).unwrap();
                out
            }
        };
        fs::write(root.join(shard["raw_data"]["basename"].as_str().unwrap()), plain).unwrap();
        fs::write(&zip, b"not looked at").unwrap();
    }
    index(&root).unwrap();
    assert_eq!(samples_of(&Dataset::open(&root).unwrap()), wanted());
}

#[test]
fn tars_and_other_lists_are_left_to_others() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let message = |root: &Path| chain(&index(root).unwrap_err());
    fs::write(root.join(MDS_INDEX_NAME), r#"{"a.png": 1}"#).unwrap();
    assert!(message(root).ends_with("holds no .tar files, and no index.json that lists shards"));
    assert_eq!(PackSource::detect(root).unwrap(), PackSource::Folder(root.to_path_buf()));
    plain(root);
    let png = grey_png(8, 1);
    crate::fixtures::write_tar(&root.join("a.tar"), &[("1.png", &png)]);
    assert_eq!(index(root).unwrap().index.n_samples(), 1);
    write_list(root, &[]);
    fs::remove_file(root.join("a.tar")).unwrap();
    assert!(message(root).ends_with("hold no png, jpeg or webp images"));
    let source = PackSource::Mds(root.to_path_buf());
    let error = pack(&source, &root.join("out"), &config(1), &mut |_| {}).unwrap_err();
    assert!(chain(&error).ends_with("holds no png, jpeg or webp images"), "{error}");
}

/// What a change of the list or of the first shard's bytes leads to.
fn refusal(change: impl FnOnce(&mut Value, &mut Vec<u8>)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let shards = plain(root);
    let mut list = json!({ "shards": shards, "version": 2 });
    let path = root.join("shard.00000.mds");
    let mut bytes = fs::read(&path).unwrap();
    change(&mut list, &mut bytes);
    fs::write(root.join(MDS_INDEX_NAME), list.to_string()).unwrap();
    fs::write(&path, bytes).unwrap();
    let text = chain(&index(root).unwrap_err());
    text.replace(&root.display().to_string(), "DIR")
}

#[test]
fn unusable_lists_are_named() {
    let mut text = String::new();
    let mut check = |change: fn(&mut Value)| {
        writeln!(text, "{}", refusal(|list, _| change(list))).unwrap();
    };
    check(|list| list["version"] = json!(1));
    check(|list| list["shards"][1]["format"] = json!("json"));
    check(|list| list["shards"][1]["raw_data"]["basename"] = json!("../x.mds"));
    check(|list| list["shards"][1]["raw_data"]["basename"] = json!("gone.mds"));
    check(|list| list["shards"][1]["raw_data"]["bytes"] = json!(1u64 << 40));
    check(|list| list["shards"][1]["column_sizes"] = json!([null]));
    check(|list| list["shards"][0]["column_sizes"][2] = json!(4));
    check(|list| list["shards"][0]["compression"] = json!("zstd"));
    check(|list| {
        list["shards"][0]["compression"] = json!("br:11");
        list["shards"][0]["zip_data"] = json!({ "basename": "x.mds.br", "bytes": 1 });
    });
    check(|list| list["shards"] = json!([{ "version": 2 }]));
    expect![[r#"
        `DIR/index.json` cannot be used: it has version 1, not 2
        `DIR/index.json` cannot be used: its shard `sub/shard.00000.mds` is of format `json` 2; only mds 2 is read
        `DIR/index.json` cannot be used: its shard `../x.mds` has a name that leaves the folder
        failed to read `DIR/gone.mds`: No such file or directory (os error 2)
        `DIR/index.json` cannot be used: its shard `sub/shard.00000.mds` has more than 4294967295 bytes
        `DIR/index.json` cannot be used: its shard `sub/shard.00000.mds` has 4 column names, 4 encodings and 1 sizes
        `DIR/index.json` cannot be used: its shard `shard.00000.mds` says that numbers in column `label` have 4 bytes, not 8
        `DIR/index.json` cannot be used: its shard `shard.00000.mds` is compressed, and has no `zip_data`
        `DIR/index.json` cannot be used: its shard `shard.00000.mds` is compressed by `br`; zstd and gz are read: write it again with one of them, or without
        `DIR/index.json` cannot be used: missing field `format` at line 1 column 24
    "#]]
    .assert_eq(&text);
}

#[test]
fn unusable_shards_are_named() {
    let mut text = String::new();
    let mut check = |change: fn(&mut Value, &mut Vec<u8>)| {
        writeln!(text, "{}", refusal(change)).unwrap();
    };
    // The first sample starts with the sizes of `image` and `meta`, behind 5 + 1 offsets.
    const FIRST: usize = 4 + 6 * 4 + 21;
    check(|_, bytes| bytes.truncate(100));
    check(|_, bytes| bytes[0] = 6);
    check(|list, bytes| {
        list["shards"][0]["samples"] = json!(u32::MAX);
        bytes[..4].fill(0xFF);
    });
    check(|_, bytes| bytes[8..12].fill(0xFF));
    check(|_, bytes| bytes[4..8].fill(0));
    check(|_, bytes| bytes[FIRST] ^= 1);
    check(|_, bytes| bytes[FIRST..FIRST + 8].fill(0xFF));
    check(|_, bytes| {
        let start = FIRST as u32;
        bytes[8..12].copy_from_slice(&(start + 7).to_le_bytes());
    });
    check(|_, bytes| {
        // The label lies behind the sizes, the box and the image.
        let image = u32::from_le_bytes(bytes[FIRST..FIRST + 4].try_into().unwrap()) as usize;
        bytes[FIRST + 8 + 8 + image + 3] = 1;
    });
    expect![[r#"
        shard `DIR/shard.00000.mds` has 100 bytes where index.json says 3567: copy it again
        shard `DIR/shard.00000.mds` is wrong at byte 0: it has 6 samples where index.json says 5
        shard `DIR/shard.00000.mds` is wrong at byte 4: it is too short for the offsets of 4294967295 samples
        shard `DIR/shard.00000.mds` is wrong at byte 4: the offsets of its samples must rise from behind them to its end
        shard `DIR/shard.00000.mds` is wrong at byte 4: the offsets of its samples must rise from behind them to its end
        sample 0 of shard `DIR/shard.00000.mds` cannot be used: its columns have 165 bytes, it has 164
        sample 0 of shard `DIR/shard.00000.mds` cannot be used: its columns have 8589934614 bytes, it has 164
        sample 0 of shard `DIR/shard.00000.mds` cannot be used: its 7 bytes end inside its sizes
        sample 0 of shard `DIR/shard.00000.mds` cannot be used: its label 16777216 is not a number up to 16777214
    "#]]
    .assert_eq(&text);
}

#[test]
fn a_damaged_archive_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("in");
    let mut shards = plain(&root);
    compress(&root, &mut shards);
    let check = |shards: &[Value], wanted: &str| {
        write_list(&root, shards);
        let source = PackSource::Mds(root.clone());
        let out = folder.path().join("out");
        let text = chain(&pack(&source, &out, &config(1 << 20), &mut |_| {}).unwrap_err());
        assert!(text.contains(wanted), "{text}");
    };
    for (i, name) in ["shard.00000.mds.zstd", "shard.00000.mds.gz"].into_iter().enumerate() {
        for bytes in [10u64, 1 << 30] {
            let mut changed = shards.clone();
            changed[i]["raw_data"]["bytes"] = json!(bytes);
            check(&changed, &format!("where index.json says {bytes}"));
            check(&changed, name);
        }
    }
    let path = root.join("shard.00000.mds.zstd");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[..4].fill(0);
    bytes[middle] ^= 0xFF;
    fs::write(&path, bytes).unwrap();
    check(&shards, "failed to read");
}

#[test]
fn no_byte_of_a_shard_is_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let samples: Vec<Vec<Vec<u8>>> = (0..3).map(sample).collect();
    let bytes = shard(&COLUMNS, &samples);
    let path = root.join("a.mds");
    let mut n_refused = 0;
    // Header, offsets and the sizes of the first sample.
    for i in 0..60 {
        for value in [0, 1, 0x7F, 0xFF] {
            let mut changed = bytes.clone();
            changed[i] = value;
            fs::write(&path, &changed).unwrap();
            let mut list = entry(&COLUMNS, "a.mds", &bytes);
            list["samples"] = json!(u32::from_le_bytes(changed[..4].try_into().unwrap()));
            write_list(root, &[list]);
            n_refused += u32::from(index(root).is_err());
        }
    }
    assert!(n_refused > 50, "{n_refused}");
    let list = fs::read(root.join(MDS_INDEX_NAME)).unwrap();
    for end in 0..list.len() {
        fs::write(root.join(MDS_INDEX_NAME), &list[..end]).unwrap();
        assert!(index(root).is_err());
    }
}

#[test]
fn columns_are_chosen_by_encoding_and_name() {
    let choose = |columns: &[(&str, &str)]| {
        let names: Vec<String> = columns.iter().map(|column| column.0.to_string()).collect();
        let encodings: Vec<String> = columns.iter().map(|column| column.1.to_string()).collect();
        let sizes: Vec<Option<u32>> =
            encodings.iter().map(|e| Int::of(e).map(|int| int.bytes as u32)).collect();
        Layout::of(&names, &encodings, &sizes).map(|layout| {
            let label = layout.label.map(|(column, _)| names[column].clone());
            (names[layout.image].clone(), label)
        })
    };
    let found = |columns| {
        let (image, label) = choose(columns).unwrap();
        format!("{image} {}", label.as_deref().unwrap_or("-"))
    };
    assert_eq!(found(&[("x", "jpeg:90"), ("y", "uint8")]), "x y");
    assert_eq!(found(&[("PNG", "png"), ("Target", "int32"), ("mask", "png")]), "PNG Target");
    assert_eq!(found(&[("image", "bytes"), ("jpg", "jpeg"), ("cls", "str")]), "image -");
    assert_eq!(found(&[("image", "str"), ("data", "jpeg"), ("label", "float32")]), "data -");
    assert_eq!(found(&[("cls", "int8"), ("img", "png"), ("label", "int16")]), "img label");
    assert_eq!(found(&[("image", "pkl"), ("jpg", "jpeg"), ("class", "uint64")]), "jpg class");
    let refused = [
        choose(&[("image", "pkl"), ("mask", "png")]).unwrap_err(),
        choose(&[("a", "png"), ("b", "bytes"), ("c", "int")]).unwrap_err(),
        choose(&[("a", "pil"), ("b", "str")]).unwrap_err(),
        choose(&[("image", "list[jpeg]")]).unwrap_err(),
    ];
    expect![[r#"
        has images in column `image: pkl`; jpeg, png and bytes are read: write it again with one of them
        has several columns that may be the image, `a: png, b: bytes`: call it `image`
        has no column of encoding jpeg, png or bytes, only `a: pil, b: str`
        has images in column `image: list[jpeg]`; jpeg, png and bytes are read: write it again with one of them"#]]
    .assert_eq(&refused.join("\n"));
}

#[test]
fn integers_of_every_width() {
    let value = |encoding: &str, raw: [u8; 8]| label_of(Int::of(encoding).unwrap().value(raw));
    let ones = [0xFF; 8];
    for signed in ["int", "int8", "int16", "int32", "int64"] {
        assert_eq!(value(signed, ones), Ok(None), "{signed}");
        assert_eq!(value(signed, [5, 0, 0, 0, 0, 0, 0, 0]), Ok(Some(5)));
    }
    assert_eq!(value("uint8", ones), Ok(Some(255)));
    assert_eq!(value("uint16", ones), Ok(Some(65_535)));
    assert!(value("uint32", ones).is_err() && value("uint64", ones).is_err());
    assert!(value("int16", [0, 0x80, 0, 0, 0, 0, 0, 0]).is_err());
    assert_eq!(Int::of("float32"), None);
}
