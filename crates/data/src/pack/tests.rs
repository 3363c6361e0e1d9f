use std::io::Write;

use expect_test::expect;
use image::ExtendedColorType;
use lacuna_store::testing::Server;
use lacuna_types::SampleId;

use super::*;
use crate::files::chain;
use crate::fixtures::{config, grey_png, jpeg, noise, pack_quietly, png};
use crate::synthetic::SyntheticSpec;
use crate::{ImageShape, SampleReader};

fn try_pack(source: &PackSource, out: &Path, existing: Existing) -> Result<PackReport, PackError> {
    let config = PackConfig { existing, ..config(SHARD_BYTES_DEFAULT) };
    pack(source, out, &config, &mut |_| {})
}

fn write(folder: &Path, name: &str, bytes: &[u8]) {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn folder_to_shards_to_pixels() {
    let root = tempfile::tempdir().unwrap();
    let (input, out) = (root.path().join("in"), root.path().join("out"));
    let grey = noise(64, 1);
    let rgb = noise(6 * 4 * 3, 2);
    write(&input, "dogs/b.v2.png", &png(&grey, 8, 8, ExtendedColorType::L8));
    write(&input, "cats/wide one.PNG", &png(&rgb, 6, 4, ExtendedColorType::Rgb8));
    // A JPEG that calls itself PNG keeps its bytes and gets its right suffix.
    write(&input, "dogs/deep/a.png", &jpeg(&grey, 8, 8, ExtendedColorType::L8));
    write(&input, "dogs/broken.jpg", b"<html>404</html>");
    write(&input, "dogs/README.txt", b"text");
    write(&input, "dogs/._b.png", b"resource fork");
    let source = PackSource::detect(&input).unwrap();
    assert_eq!(source, PackSource::Folder(input.clone()));
    let report = pack_quietly(&source, &out, SHARD_BYTES_DEFAULT);
    assert_eq!((report.outcome, report.n_samples, report.n_shards), (PackOutcome::Written, 3, 1));
    assert_eq!(report.classes, ["cats", "dogs"]);
    assert_eq!(report.skipped.n, 1);
    assert!(report.skipped.first[0].place.ends_with("dogs/broken.jpg"));
    assert_eq!(names(&out), ["demo-000000.tar", "index.lacuna", "pack.json"]);

    let dataset = Dataset::open(&out).unwrap();
    let members: Vec<String> =
        (0..3).map(|id| dataset.place(SampleId(id)).member.unwrap()).collect();
    expect!["000000000-wide-one.png 000000001-b-v2.png 000000002-a.jpg"]
        .assert_eq(&members.join(" "));
    let labels: Vec<Option<u32>> = (0..3).map(|id| dataset.label(SampleId(id))).collect();
    assert_eq!(labels, [Some(0), Some(1), Some(1)]);
    let mut reader = SampleReader::new();
    assert_eq!(reader.whole(&dataset, SampleId(0), 3).unwrap(), rgb);
    assert_eq!(reader.whole(&dataset, SampleId(1), 1).unwrap(), grey);
    let original = fs::read(input.join("dogs/deep/a.png")).unwrap();
    assert_eq!(dataset.sample(SampleId(2)).unwrap(), original);
}

#[test]
fn flat_folders_have_no_labels_and_bytes_repeat() {
    let root = tempfile::tempdir().unwrap();
    let input = root.path().join("in");
    for i in 0..30 {
        write(&input, &format!("{i:02}.png"), &grey_png(16, i));
    }
    let source = PackSource::Folder(input);
    let (one, two) = (root.path().join("one"), root.path().join("two"));
    let report = pack_quietly(&source, &one, 8192);
    assert!(report.n_shards > 2 && report.classes.is_empty());
    assert_eq!(pack_quietly(&source, &two, 8192).fingerprint, report.fingerprint);
    for name in names(&one) {
        assert_eq!(
            fs::read(one.join(&name)).unwrap(),
            fs::read(two.join(&name)).unwrap(),
            "{name}"
        );
        assert!(!name.ends_with(".tar") || fs::metadata(one.join(&name)).unwrap().len() <= 8192);
    }
    assert_eq!(Dataset::open(&one).unwrap().label(SampleId(0)), None);
}

#[test]
fn why_a_folder_has_no_labels_is_said() {
    let root = tempfile::tempdir().unwrap();
    let input = root.path().join("in");
    let said = |out: &str| {
        let source = PackSource::Folder(input.clone());
        let report = pack_quietly(&source, &root.path().join(out), SHARD_BYTES_DEFAULT);
        assert_eq!(report.classes.is_empty(), report.no_labels.is_some());
        report.no_labels.map_or(report.classes.join(" "), |why| why.to_string())
    };
    write(&input, "a.png", &grey_png(8, 1));
    assert_eq!(said("flat"), "no image lies in a class folder");
    assert_eq!(said("flat"), "no image lies in a class folder", "nothing was done");
    fs::remove_file(input.join("a.png")).unwrap();
    write(&input, "cats/a.png", &grey_png(8, 1));
    assert_eq!(said("one"), "there is one folder only, `cats`");
    write(&input, "dogs/deep/a.png", &grey_png(8, 2));
    assert_eq!(said("two"), "cats dogs");
    write(&input, "stray.png", &grey_png(8, 3));
    write(&input, "notes.txt", b"text");
    assert_eq!(said("stray"), "`stray.png` lies beside the class folders");
    write(&input, "z.png", &grey_png(8, 4));
    assert_eq!(said("strays"), "`stray.png` and 1 more lie beside the class folders");
}

/// A part of a data set that lacks classes, or has one only, has the numbers of the whole.
#[test]
fn classes_are_numbered_as_elsewhere() {
    let root = tempfile::tempdir().unwrap();
    let [train, val, packed, out] = ["train", "val", "p", "o"].map(|name| root.path().join(name));
    for (seed, class) in (0..).zip(["cats", "dogs", "emus"]) {
        write(&train, &format!("{class}/a.png"), &grey_png(8, seed));
    }
    write(&val, "emus/b.png", &grey_png(8, 7));
    pack_quietly(&PackSource::Folder(train), &packed, SHARD_BYTES_DEFAULT);
    let classes = class_list(&packed).unwrap();
    assert_eq!(classes, ["cats", "dogs", "emus"]);
    for file in [INDEX_NAME, PACK_NAME] {
        assert_eq!(class_list(&packed.join(file)).unwrap(), classes);
    }
    let like = |classes: &[String]| {
        let source = PackSource::Classed { root: val.clone(), classes: classes.to_vec() };
        try_pack(&source, &out, Existing::Refuse)
    };
    let report = like(&classes).unwrap();
    assert_eq!((&report.classes, report.no_labels), (&classes, None));
    assert_eq!(class_names(&out), class_names(&packed));
    assert_eq!(Dataset::open(&out).unwrap().label(SampleId(0)), Some(2));
    assert_eq!(like(&classes).unwrap().outcome, PackOutcome::AlreadyThere);
    // A list of other names is another data set.
    let error = like(&["emus".to_string()]).unwrap_err();
    assert!(matches!(error, PackError::OutputExists { .. }), "{error}");

    let message = |classes: &[String]| {
        let error = like(classes).unwrap_err();
        chain(&error).replace(&root.path().display().to_string(), "DIR")
    };
    let start = "`DIR/val` does not go with the list of classes:";
    assert_eq!(message(&classes[..1]), format!("{start} its folder `emus` is not in it"));
    for class in ["a", "b", "c", "d", "e", "f"] {
        write(&val, &format!("{class}/b.png"), &grey_png(8, 8));
    }
    let folders = "its folders `a`, `b`, `c`, `d`, `e` and 1 more are not in it";
    assert_eq!(message(&classes), format!("{start} {folders}"));
    write(&val, "stray.png", &grey_png(8, 9));
    assert_eq!(message(&classes), format!("{start} `stray.png` lies beside the class folders"));
}

/// A part of a data set whose classes have other names now takes them, and packs nothing anew.
#[test]
fn parts_have_the_names_of_the_whole() {
    let root = tempfile::tempdir().unwrap();
    let [input, whole, part] = ["in", "whole", "part"].map(|name| root.path().join(name));
    write(&input, "cats/a.png", &grey_png(8, 1));
    let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<String>>();
    let source = PackSource::Part { dataset: whole.clone(), ids: vec![0] };
    let pack_both = |classes: &[&str]| {
        let input = PackSource::Classed { root: input.clone(), classes: names(classes) };
        try_pack(&input, &whole, Existing::Replace).unwrap();
        try_pack(&source, &part, Existing::Replace).unwrap().outcome
    };
    assert_eq!(pack_both(&["cats", "dogs"]), PackOutcome::Written);
    assert_eq!(pack_both(&["cats", "dogs"]), PackOutcome::AlreadyThere);
    assert_eq!(pack_both(&["cats", "emus"]), PackOutcome::AlreadyThere);
    assert_eq!(class_names(&part), ["cats", "emus"]);
    // It keeps them where the whole has none any more.
    std::fs::remove_file(whole.join(PACK_NAME)).unwrap();
    let outcome = try_pack(&source, &part, Existing::Replace).unwrap().outcome;
    assert_eq!(outcome, PackOutcome::AlreadyThere);
    assert_eq!(class_names(&part), ["cats", "emus"]);
}

#[test]
fn lists_of_classes() {
    let root = tempfile::tempdir().unwrap();
    let list = root.path().join("names.txt");
    let listed = |bytes: &[u8]| {
        fs::write(&list, bytes).unwrap();
        class_list(&list).map_err(|error| {
            let text = chain(&error).replace(&root.path().display().to_string(), "DIR");
            text.replace("`DIR/names.txt` gives no list of classes: ", "")
        })
    };
    let names = listed("\u{feff}tabby cat\r\n\n  dogs \n".as_bytes()).unwrap();
    assert_eq!(names, ["tabby cat", "dogs"]);
    assert_eq!(listed(b"b\na\nc\na\n").unwrap_err(), "it has `a` twice");
    assert_eq!(listed(b"\n \n").unwrap_err(), "it has no names");
    assert_eq!(listed(&[0xFF, 0xFE]).unwrap_err(), "it is no text in UTF-8");
    let refused = |path: &Path| {
        let text = chain(&class_list(path).unwrap_err());
        text.replace(&root.path().display().to_string(), "DIR")
    };
    expect!["failed to access `DIR/none.txt`: No such file or directory (os error 2)"]
        .assert_eq(&refused(&root.path().join("none.txt")));
    expect![
        "`DIR` gives no list of classes: there is no pack.json, which has the names of its classes"
    ]
    .assert_eq(&refused(root.path()));
    let made = root.path().join("made");
    try_pack(&generated(4, 1), &made, Existing::Refuse).unwrap();
    expect!["`DIR/made` gives no list of classes: its classes have no names, as it was not packed from class folders"]
        .assert_eq(&refused(&made));
}

#[test]
fn classes_of_a_data_set_behind_a_url() {
    let root = tempfile::tempdir().unwrap();
    for class in ["cats", "dogs"] {
        write(&root.path().join("in"), &format!("{class}/a.png"), &grey_png(8, 1));
    }
    let input = PackSource::Folder(root.path().join("in"));
    pack_quietly(&input, &root.path().join("bucket/set"), SHARD_BYTES_DEFAULT);
    let server = Server::plain(root.path()).unwrap();
    let url = |path: &str| PathBuf::from(format!("{}/bucket/{path}", server.url()));
    for path in ["set", "set/", "set/index.lacuna"] {
        assert_eq!(class_list(&url(path)).unwrap(), ["cats", "dogs"], "{path}");
    }
    let error = class_list(&url("other")).unwrap_err();
    assert!(chain(&error).contains("there is no pack.json"), "{error}");
}

fn idx_folder(root: &Path, n: u32) -> PathBuf {
    let input = root.join("idx");
    let mut images: Vec<u8> =
        [0x0803, n, 4, 4].iter().flat_map(|v: &u32| v.to_be_bytes()).collect();
    images.extend(noise(n as usize * 16, 3));
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(&images).unwrap();
    write(&input, "train-images-idx3-ubyte.gz", &gz.finish().unwrap());
    let mut labels: Vec<u8> = [0x0801, n].iter().flat_map(|v: &u32| v.to_be_bytes()).collect();
    labels.extend((0..n).map(|i| (i % 10) as u8));
    write(&input, "train-labels-idx1-ubyte.gz", &labels);
    write(&input, "t10k-images-idx3-ubyte.gz", b"not looked at");
    input
}

#[test]
fn idx_to_shards_to_pixels() {
    let root = tempfile::tempdir().unwrap();
    let input = idx_folder(root.path(), 25);
    let source = PackSource::detect(&input).unwrap();
    let PackSource::Idx { images, labels } = &source else { panic!("{source:?}") };
    assert!(images.ends_with("train-images-idx3-ubyte.gz"));
    assert!(labels.as_ref().unwrap().ends_with("train-labels-idx1-ubyte.gz"));
    let out = root.path().join("out");
    pack_quietly(&source, &out, SHARD_BYTES_DEFAULT);
    let dataset = Dataset::open(&out).unwrap();
    let pixels = noise(25 * 16, 3);
    let mut reader = SampleReader::new();
    for (id, image) in pixels.chunks(16).enumerate() {
        let id = SampleId(id as u64);
        assert_eq!(reader.whole(&dataset, id, 1).unwrap(), image);
        assert_eq!(dataset.label(id), Some(id.0 as u32 % 10));
    }
    let bare = PackSource::Idx { images: images.clone(), labels: None };
    let report = pack_quietly(&bare, &root.path().join("bare"), SHARD_BYTES_DEFAULT);
    assert_eq!(report.no_labels, Some(NoLabels::Input));
    write(&input, "train-labels-idx1-ubyte.gz", &[0, 0, 8, 1, 0, 0, 0, 1, 5]);
    let error = try_pack(&source, &out, Existing::Replace).unwrap_err();
    assert!(matches!(error, PackError::LabelCount { n_labels: 1, n_images: 25, .. }));
}

fn generated(n_images: u64, seed: u64) -> PackSource {
    let shape = ImageShape { height: 8, width: 8, channels: 3 };
    PackSource::Synthetic(SyntheticSpec { n_images, shape, seed })
}

#[test]
fn existing_output() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path();
    let first = try_pack(&generated(20, 1), out, Existing::Refuse).unwrap();
    let again = try_pack(&generated(20, 1), out, Existing::Refuse).unwrap();
    assert_eq!(again.outcome, PackOutcome::AlreadyThere);
    assert_eq!(again.fingerprint, first.fingerprint);
    let error = try_pack(&generated(20, 2), out, Existing::Refuse).unwrap_err();
    assert!(chain(&error).contains("holds another data set"), "{error}");
    assert_eq!(Dataset::open(out).unwrap().fingerprint(), first.fingerprint);
    let other = try_pack(&generated(20, 2), out, Existing::Replace).unwrap();
    assert_eq!(other.outcome, PackOutcome::Written);
    assert_ne!(other.fingerprint, first.fingerprint);
}

#[test]
fn interrupted_packing_starts_anew() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path();
    write(out, "pack.json.partial", b"packing\n");
    write(out, "demo-000000.tar", b"complete, but of another input");
    write(out, "demo-000007.tar", b"complete, but of another input");
    write(out, "demo-000008.tar.partial", b"half");
    write(out, "notes.txt", b"not ours");
    write(out, "other-000000.tar", b"not ours");
    try_pack(&generated(5, 1), out, Existing::Refuse).unwrap();
    expect!["demo-000000.tar index.lacuna notes.txt other-000000.tar pack.json"]
        .assert_eq(&names(out).join(" "));
    assert_eq!(Dataset::open(out).unwrap().n_samples(), 5);
}

#[test]
fn unusable_input_is_named() {
    let root = tempfile::tempdir().unwrap();
    let (input, out) = (root.path().join("in"), root.path().join("out"));
    let message = |source: &PackSource| {
        let error = try_pack(source, &out, Existing::Refuse).unwrap_err();
        chain(&error).replace(&root.path().display().to_string(), "DIR")
    };
    let folder = PackSource::Folder(input.clone());
    expect!["failed to access `DIR/in`: No such file or directory (os error 2)"]
        .assert_eq(&message(&folder));
    write(&input, "readme.md", b"text");
    expect!["`DIR/in` holds no png, jpeg or webp images"].assert_eq(&message(&folder));
    write(&input, "a.png", b"text");
    expect!["none of the 1 images in `DIR/in` can be used; the first: `DIR/in/a.png`: not a png, jpeg or webp image: it starts with [74, 65, 78, 74]"]
        .assert_eq(&message(&folder));
    let config = PackConfig { name: "a/b".to_string(), ..config(1) };
    let error = pack(&generated(1, 1), &out, &config, &mut |_| {}).unwrap_err();
    assert!(matches!(error, PackError::Config(_)));
}

#[test]
fn webp_files_are_packed_and_indexed() {
    let root = tempfile::tempdir().unwrap();
    let (input, out) = (root.path().join("in"), root.path().join("out"));
    let rgb = noise(6 * 4 * 3, 2);
    let mut webp: Vec<u8> = Vec::new();
    let encoder = image::codecs::webp::WebPEncoder::new_lossless(&mut webp);
    encoder.encode(&rgb, 6, 4, ExtendedColorType::Rgb8).unwrap();
    write(&input, "a.WebP", &webp);
    let report = pack_quietly(&PackSource::Folder(input), &out, SHARD_BYTES_DEFAULT);
    let dataset = Dataset::open(&out).unwrap();
    assert_eq!(dataset.place(SampleId(0)).member.as_deref(), Some("000000000-a.webp"));
    assert_eq!(dataset.sample(SampleId(0)).unwrap(), webp);
    assert_eq!(SampleReader::new().whole(&dataset, SampleId(0), 3).unwrap(), rgb);
    let index = crate::wds::build_index(&out, 1, &mut |_| {}).unwrap().index;
    assert_eq!(index.fingerprint(), report.fingerprint);
}
