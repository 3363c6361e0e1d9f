use expect_test::expect;

use super::*;
use crate::chain;
use crate::testing::{manifest, micro, run_dir, tiny};

fn saved() -> (tempfile::TempDir, Manifest) {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    tiny(3).save(&dir, 2);
    let manifest = manifest(&dir, 3);
    (root, manifest)
}

/// Parses the manifest after a change that its author sealed.
fn resealed(manifest: &Manifest, change: impl FnOnce(&mut Manifest)) -> String {
    let mut manifest = manifest.clone();
    change(&mut manifest);
    manifest.seal();
    chain(&Manifest::parse(manifest.render().as_bytes()).unwrap_err())
}

#[test]
fn text_is_readable_and_pinned() {
    let (_root, manifest) = saved();
    let text = manifest.render();
    let head: Vec<&str> = text.lines().take(4).collect();
    assert_eq!(
        head[1..],
        [
            " \"attempt\":\"00000012.0001\",",
            " \"coord_epoch\":7,",
            " \"created\":\"2026-11-23T22:31:04Z\",",
        ]
    );
    let slices = text.lines().filter(|line| line.starts_with("   {\"at\":[")).count();
    assert_eq!(slices, 3 * 4 + 1, "one line per slice");
    assert_eq!(Manifest::parse(text.as_bytes()).unwrap(), manifest);
}

#[test]
fn tensor_digests_do_not_depend_on_the_world() {
    let digests = |world: u32| {
        let root = tempfile::tempdir().unwrap();
        let dir = run_dir(root.path());
        micro(3).save(&dir, world);
        let manifest = manifest(&dir, 3);
        let tensors: Vec<(String, Hex64)> =
            manifest.tensors.iter().map(|(name, t)| (name.clone(), t.crc64)).collect();
        (tensors, manifest.state_digest)
    };
    assert_eq!(digests(1), digests(5));
}

/// Every bit of the text, one per byte in turn, and every length.
#[test]
fn damage_of_the_text_is_detected() {
    let (_root, manifest) = saved();
    let text = manifest.render().into_bytes();
    for at in 0..text.len() {
        let mut bad = text.clone();
        bad[at] ^= 1 << (at % 8);
        assert!(Manifest::parse(&bad).is_err(), "bit {} of byte {at}", at % 8);
    }
    for len in 0..text.len() {
        assert!(Manifest::parse(&text[..len]).is_err(), "cut to {len}");
    }
    let twice = String::from_utf8(text.clone()).unwrap().replacen("{\n", "{\n \"step\":3,\n", 1);
    assert!(chain(&Manifest::parse(twice.as_bytes()).unwrap_err()).contains("appears twice"));
    let mut longer = text;
    longer.push(b'\n');
    assert!(matches!(Manifest::parse(&longer), Err(ManifestError::Seal(SealError::Form))));
}

#[test]
fn other_schemas_are_named() {
    let (_root, manifest) = saved();
    expect!["schema is `lacuna-ckpt/2`, this build reads `lacuna-ckpt/1`"]
        .assert_eq(&resealed(&manifest, |m| m.schema = "lacuna-ckpt/2".to_string()));
}

#[test]
fn claims_that_cannot_hold_are_refused() {
    let (_root, manifest) = saved();
    fn weight(m: &mut Manifest) -> &mut TensorEntry {
        m.tensors.get_mut("param/a.weight").unwrap()
    }
    type Change = fn(&mut Manifest);
    let changes: [(&str, Change); 11] = [
        ("hole", |m| weight(m).slices[1].range[0] += 1),
        ("overlap", |m| weight(m).slices[1].range[0] -= 1),
        ("short", |m| _ = weight(m).slices.pop()),
        ("shape", |m| weight(m).shape = vec![40, 31]),
        ("huge shape", |m| weight(m).shape = vec![1 << 40, 1 << 40]),
        ("dtype", |m| weight(m).dtype = Dtype::I64),
        ("shared bytes", |m| {
            let at = m.tensors["adamw.exp_avg/a.weight"].slices[0].at;
            weight(m).slices[0].at = at;
        }),
        ("no such file", |m| weight(m).slices[1].file = 9),
        ("attempt", |m| m.generation = 11),
        ("swapped files", |m| m.files.swap(0, 1)),
        ("counters", |m| m.state.counters.updates += 1),
    ];
    let mut out = String::new();
    for (name, change) in changes {
        let text = resealed(&manifest, change);
        let text = text.strip_prefix("contradicts itself: ").unwrap().replace(": ", ":\n  ");
        let text = text.replace(" of `", "\n  of `").replace(", not `", ",\n  not `");
        out.push_str(&format!("{name}: {}\n", text.replace(", the", ",\n  the")));
    }
    expect![[r#"
        hole: tensor `param/a.weight`:
          no file has elements 1024..1025
        overlap: tensor `param/a.weight`:
          more than one file has elements 1023..1024
        short: tensor `param/a.weight`:
          no file has elements 1024..1200
        shape: tensor `param/a.weight`:
          no file has elements 1200..1240
        huge shape: tensor `param/a.weight`:
          shape [1099511627776, 1099511627776] is too large
        dtype: tensor `param/a.weight`:
          elements 0..1024 cannot be bytes 12288..16384
          of `part-00000-of-00002.safetensors`
        shared bytes: `adamw.exp_avg/a.weight` and `param/a.weight` share bytes 4096..8192 of file 0
        no such file: tensor `param/a.weight`:
          there is no file 9
        attempt: attempt 00000012.0001 is not of generation 11
        swapped files: file 0 is named `part-00001-of-00002.safetensors`,
          not `part-00000-of-00002.safetensors`
        counters: tensors and counters have state digest dd5f8b2bc8266581,
          the writers reported 20f8027eab626fb7
    "#]]
    .assert_eq(&out);
}
