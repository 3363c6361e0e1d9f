use std::fmt::Write as _;

use expect_test::{ExpectFile, expect_file};
use proptest::prelude::*;

use crate::load::parse_text;
use crate::presets::{self, PRESETS};

const START: &str = "schema = 1\nname = \"a\"\nbase = \"preset:demo\"\ndata.shards = \"d\"\n";

/// Writes down what is said about each text after `start`; a blank line separates the cases.
fn check(start: &str, cases: &[&str], want: ExpectFile) {
    let mut out = String::new();
    for case in cases {
        for line in case.lines() {
            writeln!(out, "> {line}").unwrap();
        }
        let error = parse_text("run.toml", &format!("{start}{case}"), &[]);
        writeln!(out, "{}\n", error.expect_err(case)).unwrap();
    }
    want.assert_eq(&out);
}

#[test]
fn misspelt_keys() {
    let cases = [
        "data.shrads = \"d\"",
        "[trian]\nbatch = 256",
        "[train]\nbtach = 256\nslotbatch = 3",
        "[train]\nbase_lr = 1e-3",
        "[train]\nepochs = 5\nbatch_size = 64\n[optim]\nlr = 1",
        "[checkpoint]\nkeep.lst = 3",
        "[train]\nflux_capacitor = 5\n\"a b\\n\" = 1",
        "bse = \"preset:tiny\"",
        "[train]\nbase = \"preset:tiny\"",
    ];
    check(START, &cases, expect_file!["../../transcripts/misspelt.txt"]);
}

#[test]
fn what_this_build_lacks() {
    let cases = [
        "[track]\ntensorboard = \"https://b/tb\"\nreconstructions = { every = \"1ep\" }",
        "data.cache = { dir = \"/nvme\", size = \"500 gigs\" }",
        "data.cache = { size = \"500GB\" }",
        "data.cache = \"/nvme\"",
        "train.precision = \"bf-16\"\ntrain.reduce = \"exact16\"",
        "data.bad_samples = \"zero-weight\"\ndata.order = \"random\"",
        "checkpoint.to = \"https://host/run\"",
        "data.cache = { dir = \"/nvme\", size = \"500GB\", mode = \"plane\" }",
    ];
    check(START, &cases, expect_file!["../../transcripts/lacking.txt"]);
}

#[test]
fn wrong_types() {
    let cases = [
        "train.batch = \"256\"",
        "train.batch = 256.0",
        "train.seed = true\nmodel.norm_pix_loss = 1",
        "train = 5",
        "model = 5",
        "[train.batch]\nx = 1",
        "data.mean = 0.5\ndata.std = [\"a\", {}]",
        "model.img_size = [28]\nmodel.width = 1979-05-27",
        "[[train]]\nbatch = 3",
        "data.threads = \"all\"",
        "checkpoint.keep = 3",
    ];
    check(START, &cases, expect_file!["../../transcripts/types.txt"]);
}

#[test]
fn units() {
    let cases = [
        "train.duration = 800",
        "train.duration = \"800\"",
        "train.duration = \"800epochs\"",
        "train.duration = \"2h\"",
        "optim.warmup = \"1.5ep\"",
        "checkpoint.every = [\"15m\", \"0step\", 3]",
        "checkpoint.every = []",
        "checkpoint.every = [\"60s\", \"1min\"]",
        "track.every = \"often\"",
    ];
    check(START, &cases, expect_file!["../../transcripts/units.txt"]);
}

#[test]
fn sizes() {
    let cases = [
        "[train]\nbatch = 4096\nslot_batch = 129",
        "[train]\nbatch = 100",
        "train.batch = 2147483649",
        "train.batch = 99999999999999999999999999999999999999999999",
        "train.batch = -1\ntrain.slot_batch = 0",
        "[train]\nbatch = 16777216\nslot_batch = 1",
        "train.seed = 9223372036854775808",
        "data.lanes = 7",
        "data.block = 0",
        "model.mask_ratio = 0",
        "model.mask_ratio = 1",
        "model.mask_ratio = 0.99",
        "model.mask_ratio = nan",
        "model.img_size = 30\nmodel.heads = 5\nmodel.decoder_width = 97",
        "model.depth = 100000\nmodel.patch_size = 0",
        "model.depth = 100000",
        "model.img_size = 8192\nmodel.patch_size = 1",
        "model.channels = 3",
    ];
    check(START, &cases, expect_file!["../../transcripts/sizes.txt"]);
}

#[test]
fn ranges() {
    let cases = [
        "data.crop_scale = [1.0, 0.5]",
        "data.crop_scale = [0, 2]\ndata.crop_ratio = [1, 2, 3]",
        "data.flip = 1.5\ndata.std = [0]",
        "optim.base_lr = 0\noptim.eps = 1e-50\noptim.betas = [0.9, 1.0]",
        "optim.base_lr = 1e400",
        "optim.betas = [0.9, 0.99999999999]",
        "optim.min_lr = 0.1",
        "optim.warmup = \"701step\"",
        "checkpoint.keep.last = 0",
    ];
    check(START, &cases, expect_file!["../../transcripts/ranges.txt"]);
}

#[test]
fn workers() {
    let cases = [
        "elastic.workers = \"3:1\"",
        "elastic.workers = \"0:1\"",
        "elastic.workers = \"4\"",
        "elastic.workers = 4",
        "elastic.workers = \"a:b\"",
        "elastic.workers = \"1:99999999999\"",
        "elastic.workers = \"9:9\"",
        "elastic.workers = \"-1:+2\"",
    ];
    check(START, &cases, expect_file!["../../transcripts/workers.txt"]);
}

#[test]
fn whole_texts() {
    let long = format!("name = \"{}\"\nbase = \"preset:demo\"", "x".repeat(129));
    let cases = [
        "",
        "schema = 1\nname = \"a\"\n[model]\nwidth = 8\n[data]\n[optim]\nwarmup = \"none\"",
        "schema = 2\nname = \"\"\nbase = \"preset:demo\"\ndata.shards = \"\"",
        "schema = \"1\"\nname = \"a/b\"\nbase = \"preset:demo\"\ndata.shards = \"a\\u0000\"",
        "schema = 1\nname = \"a\"\nbase = \"preset:demo\"\ndata.shards = \"ftp://host/data\"",
        &long,
    ];
    check("", &cases, expect_file!["../../transcripts/whole.txt"]);
}

#[test]
fn syntax() {
    let cases = [
        "[train]\nbatch = 256\nbatch = 512\nseed = -3",
        "[train]\nbatch = \n[optim]\nlr = = 3\nepz = 1e-8",
        "[train\nbatch = 256",
        "train.duration = 5ep\ntrain.batch = 0",
        "checkpoint.to = runs/a # a comment",
        "checkpoint.to = \"unclosed",
        "[data]\n[data]",
        "é = 1\n# é\n\"é\".x = 1",
        "just words",
    ];
    check(START, &cases, expect_file!["../../transcripts/syntax.txt"]);
}

#[test]
fn many_problems_are_cut() {
    let text: String = (0..150).map(|i| format!("key_{i} = {i}\n")).collect();
    let error = parse_text("run.toml", &text, &[]).unwrap_err().to_string();
    assert!(error.ends_with("more") && error.lines().count() == 101, "{error}");
}

/// A text to mutate: a preset, the defaults, or a whole spec.
fn seed_text(i: usize) -> String {
    let preset = PRESETS[i % PRESETS.len()];
    let start = "schema = 1\nname = \"a\"\ndata.shards = \"d\"\n";
    match i % 3 {
        0 => format!("{start}{}", preset.text),
        1 => format!("schema = 1\nname = \"a\"\n{}", presets::DEFAULTS),
        _ => {
            let text = format!("{start}base = \"preset:small\"");
            parse_text("t", &text, &[]).unwrap().spec.effective_toml()
        }
    }
}

/// Cuts, repeats, inserts or overwrites something.
fn mutate(bytes: &mut Vec<u8>, at: prop::sample::Index, kind: u8, byte: u8) {
    const SIGNS: &[u8] = b"[]{}=.\"'\n#,-9eE_\\";
    let at = at.index(bytes.len() + 1);
    let end = (at + usize::from(byte) % 16).min(bytes.len());
    let (range, new): (_, Vec<u8>) = match kind {
        0 => (at..end, Vec::new()),
        1 => (end..end, bytes[at..end].to_vec()),
        2 => (at..at, vec![SIGNS[usize::from(byte) % SIGNS.len()]]),
        3 => (at..at, b"99999999999999999999".to_vec()),
        4 => (at..end, vec![byte]),
        _ => (at..at, "\"é\"".into()),
    };
    bytes.splice(range, new);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever is done to a text: an answer, never a panic; and what is accepted is kept whole.
    #[test]
    fn mutated_specs_do_not_panic(
        seed in 0usize..24,
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0u8..6, any::<u8>()), 1..6),
    ) {
        let mut bytes = seed_text(seed).into_bytes();
        for (at, kind, byte) in edits {
            mutate(&mut bytes, at, kind, byte);
        }
        let text = String::from_utf8_lossy(&bytes);
        match parse_text("t", &text, &[]) {
            Ok(loaded) => {
                let again = parse_text("t", &loaded.effective_toml(), &[]).unwrap();
                prop_assert_eq!(again.spec, loaded.spec);
            }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }

    #[test]
    fn any_text_and_override_has_an_answer(text in ".{0,200}", set in "[a-z.]{0,12}=.{0,20}") {
        let _ = parse_text("t", &text, std::slice::from_ref(&set));
        let _ = parse_text("t", "base = \"preset:demo\"", &[set, text]);
    }
}
