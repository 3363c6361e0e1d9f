use expect_test::expect;
use image::ExtendedColorType;
use lacuna_types::SampleId;

use super::*;
use crate::dataset::Dataset;
use crate::files::chain;
use crate::fixtures::{damage, grey_png, jpeg, noise, write_tar};

fn index_quietly(folder: &Path) -> Result<IndexReport, BuildIndexError> {
    build_index(folder, 2, &mut |_| {})
}

#[test]
fn names_split_at_the_first_dot_of_the_file() {
    let split = |path| split_name(path).map(|(key, suffix)| format!("{key}|{suffix}"));
    assert_eq!(split("a/b.c/img.seg.PNG").as_deref(), Some("a/b.c/img|seg.png"));
    assert_eq!(split("0001.JPG").as_deref(), Some("0001|jpg"));
    for none in ["README", "dir/.hidden", "__meta__", "__index__.json", "x/__y/z.png"] {
        assert_eq!(split(none), None, "{none}");
    }
}

#[test]
fn members_form_samples() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b, c) = (grey_png(8, 1), grey_png(9, 2), grey_png(10, 3));
    let jpg = jpeg(&noise(16 * 12 * 3, 1), 16, 12, ExtendedColorType::Rgb8);
    write_tar(
        &folder.path().join("s-0.tar"),
        &[
            ("__meta__.json", b"{}"),
            ("x/1.png", &a),
            ("x/1.cls", b" 7\n"),
            ("x/1.json", b"{}"),
            ("x/2.seg.png", &c),
            // The suffix says one thing, the first bytes another: the bytes count.
            ("x/2.PNG", &jpg),
            ("note.txt", b"no image here"),
            ("x/3.jpg", b"not an image"),
        ],
    );
    write_tar(&folder.path().join("s-1.tar"), &[("x/3.jpeg", &b), ("x/4.cls", b"1")]);
    write_tar(&folder.path().join("s-2.tar"), &[("only.txt", b"text")]);
    let report = index_quietly(folder.path()).unwrap();
    let dataset = Dataset::open(folder.path()).unwrap();
    assert_eq!(dataset.fingerprint(), report.index.fingerprint());
    let samples: Vec<Vec<u8>> = (0..3).map(|id| dataset.sample(SampleId(id)).unwrap()).collect();
    assert_eq!(samples, [a, jpg, b]);
    let record = report.index.record(SampleId(1));
    assert_eq!((record.width, record.height, record.label), (16, 12, None));
    assert_eq!(dataset.label(SampleId(0)), Some(7));
    let skipped: Vec<String> = report
        .skipped
        .first
        .iter()
        .map(|skip| {
            let base = skip.place.rsplit("/s-").next().unwrap();
            format!("{base} -- {}", skip.reason)
        })
        .collect();
    expect![[r#"
        0.tar: note -- the sample has no png, jpeg or webp image
        0.tar: x/3.jpg -- not a png, jpeg or webp image: it starts with [6e, 6f, 74, 20, 61, 6e, 20, 69]
        1.tar: x/4 -- the sample has no png, jpeg or webp image
        2.tar: only -- the sample has no png, jpeg or webp image
        s-2.tar -- the shard holds no images"#]]
    .assert_eq(&skipped.join("\n"));
}

#[test]
fn unusable_shards_are_named() {
    let image = grey_png(8, 1);
    let message = |members: &[(&str, &[u8])]| {
        let folder = tempfile::tempdir().unwrap();
        write_tar(&folder.path().join("bad.tar"), members);
        let error = index_quietly(folder.path()).unwrap_err();
        let root = folder.path().display().to_string();
        chain(&error).replace(&root, "DIR")
    };
    expect!["sample `a` of shard `DIR/bad.tar` has two members `.png`"]
        .assert_eq(&message(&[("a.png", &image), ("a.PNG", &image)]));
    expect!["sample `a` of shard `DIR/bad.tar` has images .png and .jpg"]
        .assert_eq(&message(&[("a.png", &image), ("a.jpg", &image)]));
    expect!["sample `a` of shard `DIR/bad.tar` has label `cat`, not a number up to 16777214"]
        .assert_eq(&message(&[("a.png", &image), ("a.cls", b"cat")]));
    expect!["the shards in `DIR` hold no png, jpeg or webp images"]
        .assert_eq(&message(&[("a.txt", b"x")]));
    let empty = tempfile::tempdir().unwrap();
    let error = index_quietly(empty.path()).unwrap_err();
    assert!(matches!(error, BuildIndexError::NoShards { .. }));
}

#[test]
fn a_shard_that_is_cut_off_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.tar");
    write_tar(&path, &[("a.png", &grey_png(8, 1)), ("b.png", &grey_png(40, 2))]);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..2048]).unwrap();
    match index_quietly(folder.path()).unwrap_err() {
        BuildIndexError::Truncated { member, offset, .. } => {
            assert_eq!((member.as_str(), offset), ("b.png", 1536));
        }
        other => panic!("{other}"),
    }
}

/// Threads change nothing, and neither does indexing what packing already indexed.
#[test]
fn indexing_packed_shards_gives_the_packed_index() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = crate::fixtures::synthetic(folder.path(), 200, 16, 1);
    assert!(dataset.index().shards().len() > 3, "several shards");
    for threads in [1, 3] {
        let mut seen: Vec<u64> = Vec::new();
        let mut progress = |p: Progress| seen.push(p.done);
        let report = build_index(folder.path(), threads, &mut progress).unwrap();
        assert_eq!(report.index.fingerprint(), dataset.fingerprint());
        assert_eq!(seen.len(), dataset.index().shards().len());
    }
}

/// A shard is read again only if it has changed since an interrupted indexing read it.
#[test]
fn an_interrupted_indexing_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (i, name) in ["a.tar", "b.tar", "c.tar"].into_iter().enumerate() {
        let image = grey_png(8, i as u32);
        write_tar(&at(name), &[("0.png", &image), ("1.txt", b"no image")]);
    }
    let sound = fs::read(at("c.tar")).unwrap();
    fs::write(at("c.tar"), &sound[..600]).unwrap();
    let index = || build_index(folder.path(), 1, &mut |_| {});
    assert!(matches!(index().unwrap_err(), BuildIndexError::Truncated { .. }));
    fs::write(at("c.tar"), sound).unwrap();
    // A change that size and time do not show, so that reading it again would: its own digest.
    let digest = blake3::hash(&fs::read(at("a.tar")).unwrap());
    let changed = fs::metadata(at("a.tar")).unwrap().modified().unwrap();
    let last = fs::metadata(at("a.tar")).unwrap().len() - 1;
    damage(&at("a.tar"), last);
    File::options().write(true).open(at("a.tar")).unwrap().set_modified(changed).unwrap();
    // One that they do show.
    let before = fs::metadata(at("b.tar")).unwrap().modified().unwrap();
    damage(&at("b.tar"), last);
    let later = before + std::time::Duration::from_secs(5);
    File::options().write(true).open(at("b.tar")).unwrap().set_modified(later).unwrap();
    let report = index().unwrap();
    let shards = report.index.shards();
    assert_eq!(shards[0].digest, *digest.as_bytes(), "not read again");
    let now = blake3::hash(&fs::read(at("b.tar")).unwrap());
    assert_eq!(shards[1].digest, *now.as_bytes(), "read again");
    assert_eq!((report.index.n_samples(), report.skipped.n), (3, 3));
    assert!(!folder.path().join(".index-parts").exists());
}
