use std::collections::BTreeMap;

use expect_test::{ExpectFile, expect_file};
use lacuna_recipe::augment::Augment;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::order::OrderParams;

use super::*;
use crate::presets::PRESETS;
use crate::run_spec::AutoOr;

/// Loads `run.toml` of a folder that exists only here.
fn load_files(files: &[(&str, &str)], overrides: &[&str]) -> Result<Loaded, SpecError> {
    let files: BTreeMap<&str, &str> = files.iter().copied().collect();
    let read = |path: &Path| {
        let text = files.get(path.to_str().unwrap());
        let missing = || io::Error::new(io::ErrorKind::NotFound, "no such file");
        text.map(ToString::to_string).ok_or_else(missing)
    };
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    parse_file(Path::new("conf/run.toml"), &overrides, &read)
}

fn check(files: &[(&str, &str)], overrides: &[&str], want: ExpectFile) {
    let text = match load_files(files, overrides) {
        Ok(loaded) => loaded.effective_toml(),
        Err(error) => error.to_string(),
    };
    want.assert_eq(&format!("{}\n", text.trim_end()));
}

const DEMO: &str = "schema = 1\nname = \"a\"\nbase = \"preset:demo\"\ndata.shards = \"images\"\n";

#[test]
fn effective_spec_of_three_layers() {
    let common = "base = \"preset:demo\"\n[data]\nshards = \"images\"\n[train]\nseed = 7\n";
    let top = "schema = 1\nname = \"trial\"\nbase = \"../common.toml\"\n\n[train]\nbatch = 512\n";
    let files = [("conf/run.toml", top), ("conf/../common.toml", common)];
    let want = expect_file!["../../transcripts/effective.toml"];
    check(&files, &["elastic.workers=2:4", "optim.betas = [0.9, 0.99]"], want);
}

#[test]
fn paths_start_from_the_file_that_wrote_them() {
    let top = "schema = 1\nname = \"a\"\nbase = \"sub/b.toml\"\ncheckpoint.to = \"/abs\"";
    let base = "base = \"preset:demo\"\ndata.shards = \"../images\"";
    let files = [("conf/run.toml", top), ("conf/sub/b.toml", base)];
    let mut spec = load_files(&files, &[]).unwrap().spec;
    assert_eq!(spec.data.shards, "conf/sub/../images");
    assert_eq!(spec.checkpoint.to, "/abs");
    spec.resolve_paths(Path::new("/home/me"));
    assert_eq!(spec.data.shards, "/home/me/conf/sub/../images");
    assert_eq!(spec.checkpoint.to, "/abs");
}

#[test]
fn cycles_are_named() {
    let files = [
        ("conf/run.toml", "base = \"./a.toml\""),
        ("conf/./a.toml", "base = \"../conf/b.toml\""),
        ("conf/../conf/b.toml", "base = \"a.toml\"\n[trian]\n"),
    ];
    check(&files, &[], expect_file!["../../transcripts/cycle.txt"]);
    let files = [("conf/run.toml", "base = \"run.toml\"")];
    check(&files, &[], expect_file!["../../transcripts/cycle_of_one.txt"]);
}

#[test]
fn long_chains_are_refused() {
    let read = |path: &Path| {
        let n: usize = path.to_str().unwrap().parse().unwrap();
        Ok(format!("base = \"{}\"", n + 1))
    };
    let error = parse_file(Path::new("0"), &[], &read).unwrap_err();
    assert_eq!(
        error.to_string(),
        "15:1:8: `base` is nested more than 16 deep, join some of these files"
    );
}

#[test]
fn bad_bases() {
    let mut out = String::new();
    let bases =
        ["\"other.toml\"", "\"tiny\"", "\"preset:tinny\"", "\"preset:\"", "3", "[\"preset:tiny\"]"];
    for base in bases {
        let text = format!("schema = 1\nname = \"a\"\nbase = {base}\n[train]\nbatch = -1");
        let error = load_files(&[("conf/run.toml", &text)], &[]).unwrap_err();
        out += &format!("> base = {base}\n{error}\n\n");
    }
    let error = parse_text("text", "base = \"tiny\"", &[]).unwrap_err();
    out += &format!("> base = \"tiny\" in a text that is not a file\n{error}\n");
    expect_file!["../../transcripts/bases.txt"].assert_eq(&out);
}

#[test]
fn unreadable_spec() {
    let error = load_files(&[], &[]).unwrap_err();
    assert!(matches!(error, SpecError::Read { .. }));
    assert_eq!(error.to_string(), "failed to read spec `conf/run.toml`");
}

#[test]
fn too_large_a_file() {
    let text = "#".repeat(SPEC_BYTES_MAX + 1);
    let error = load_files(&[("conf/run.toml", &text)], &[]).unwrap_err().to_string();
    let want = "the file has 1048577 bytes, more than 1048576, name a run spec";
    assert_eq!(error, format!("conf/run.toml:1:1: {want}"));
}

#[test]
fn overrides_are_toml_or_words() {
    let set = ["train.duration=5ep", "train.seed = 9", "data.shards=x#y", "optim.base_lr=1e-2"];
    let spec = load_files(&[("conf/run.toml", DEMO)], &set).unwrap().spec;
    assert_eq!(spec.train.duration.to_string(), "5ep");
    assert_eq!((spec.train.seed, spec.optim.base_lr), (9, 1e-2));
    assert_eq!(spec.data.shards, "x#y", "what a shell typed starts from where it was typed");
}

#[test]
fn bad_overrides() {
    let set = [
        "train.batch",
        "=3",
        "train..batch=3",
        "base=preset:tiny",
        "train.bach=3",
        "train.batch=many",
        "data.shards=a\nb=c",
        "elastic.workers=\"3:1\"",
        "optim.base_lr=1e-2, 3",
    ];
    check(&[("conf/run.toml", DEMO)], &set, expect_file!["../../transcripts/overrides.txt"]);
    let many = vec!["train.seed=1"; OVERRIDES_MAX + 5];
    let error = load_files(&[("conf/run.toml", DEMO)], &many).unwrap_err().to_string();
    assert_eq!(error, "--set train.seed: there are more than 256 overrides");
}

#[test]
fn every_preset_is_a_whole_spec_but_for_name_and_data() {
    for name in presets::names() {
        let text =
            format!("schema = 1\nname = \"a\"\nbase = \"preset:{name}\"\ndata.shards = \"d\"");
        if name == "in1k-recipe" {
            assert!(parse_text("t", &text, &[]).is_err(), "it has no model");
            continue;
        }
        let spec = parse_text("t", &text, &[]).unwrap().spec;
        let task = spec.task.as_ref().map(|task| task.kind.to_string());
        let kind = ["linear", "finetune"].into_iter().find(|kind| name.ends_with(kind));
        assert_eq!(task.as_deref(), kind, "{name}");
        let size = name.trim_start_matches("mae-vit-").split('-').next().unwrap();
        assert_eq!(Some(spec.model), ModelConfig::preset(size), "{name}");
    }
    for preset in PRESETS {
        let lines = preset.text.lines().chain(presets::DEFAULTS.lines());
        assert!({ lines }.all(|line| line.chars().count() <= 100));
    }
}

#[test]
fn the_recipes_of_tasks() {
    let peak = |name: &str| {
        let text =
            format!("schema = 1\nname = \"a\"\nbase = \"preset:{name}\"\ndata.shards = \"d\"");
        let spec = parse_text("t", &text, &[]).unwrap().spec;
        let task = spec.task.as_ref().unwrap();
        let resolved = spec.resolve(1_281_167).unwrap();
        (resolved.schedule.peak, task.layer_decay, task.drop_path, spec.n_slots())
    };
    // FINETUNE.md of facebookresearch/mae.
    assert_eq!(peak("base-finetune"), (2e-3, 0.65, 0.1, 32));
    assert_eq!(peak("large-finetune"), (4e-3, 0.75, 0.2, 32));
    assert_eq!(peak("huge-finetune"), (4e-3, 0.75, 0.3, 32));
    for name in ["base-linear", "large-linear", "huge-linear"] {
        let (peak, _, drop_path, n_slots) = peak(name);
        assert!((peak - 6.4).abs() < 1e-12 && drop_path == 0.0 && n_slots == 32, "{name}: {peak}");
    }
}

#[test]
fn the_paper_recipe() {
    let text = "schema = 1\nname = \"a\"\nbase = \"preset:mae-vit-base-in1k\"\ndata.shards = \"d\"";
    let spec = parse_text("t", text, &[]).unwrap().spec;
    let resolved = spec.resolve(1_281_167).unwrap();
    assert_eq!(resolved.total_steps, 249_600);
    assert_eq!(resolved.schedule.warmup_steps, 40.0 * 312.0);
    assert!((resolved.schedule.peak - 2.4e-3).abs() < 1e-18);
    assert_eq!((spec.n_slots(), spec.data.lanes), (32, 256));
    assert_eq!(spec.augment(), Augment::PRETRAIN);
    let adamw = spec.adamw();
    assert_eq!((adamw.beta1, adamw.beta2, adamw.weight_decay), (0.9, 0.95, 0.05));
}

#[test]
fn lengths_that_do_not_fit_the_data() {
    let case = |set: &str, n_samples: u64| {
        let set = [set.to_string()];
        let spec = parse_text("t", DEMO, &set).unwrap().spec;
        spec.resolve(n_samples).unwrap_err().to_string()
    };
    let cases = [
        case("train.duration=5ep", 255),
        case("optim.warmup=3ep", 60_000),
        case("train.duration=9007199254740992step", 60_000),
        case("train.duration=4294967295ep", u64::MAX),
    ];
    expect_file!["../../transcripts/resolve.txt"].assert_eq(&(cases.join("\n") + "\n"));
}

#[test]
fn order_is_pinned_once() {
    let mut spec = parse_text("t", DEMO, &[]).unwrap().spec;
    spec.pin(99_999_999, 1000);
    assert_eq!(spec.data.order.as_str(), "global");
    assert_eq!(spec.data.block, AutoOr::Is(400_000));
    let pinned = spec.clone();
    spec.pin(100_000_000, 10);
    assert_eq!(spec, pinned);
    spec.check().unwrap();
    let spec = parse_text("t", DEMO, &[]).unwrap().spec;
    assert_eq!(
        spec.order(100_000_000, 1_000_000),
        OrderParams::default_for(100_000_000, 1_000_000, 64)
    );
}

/// A coordinator reads what an older build of it wrote down: keys that change no bit may be newer
/// than the text, those that do may not.
#[test]
fn what_an_older_build_wrote_lacks_newer_keys() {
    let spec =
        load_files(&[("conf/run.toml", DEMO)], &["checkpoint.read_back=false"]).unwrap().spec;
    let mut json = spec.to_json();
    let table = |json: &mut serde_json::Value, key: &str, inner: &str| {
        json[key].as_object_mut().unwrap().remove(inner).unwrap();
    };
    table(&mut json, "checkpoint", "read_back");
    table(&mut json, "checkpoint", "when_busy");
    table(&mut json, "track", "every");
    let again = from_json(&json).unwrap();
    assert_eq!(again, spec);
    assert_eq!(again.digest(), spec.digest());
    table(&mut json, "train", "batch");
    let problems = SpecError::Invalid(from_json(&json).unwrap_err()).to_string();
    assert!(problems.contains("missing key `train.batch`"), "{problems}");
}

/// A path that a shell would have changed is refused where it is written, not where it was stored.
#[test]
fn stored_paths_may_hold_anything() {
    assert!(load_files(&[("conf/run.toml", DEMO)], &["checkpoint.to=~/runs"]).is_err());
    let mut spec = load_files(&[("conf/run.toml", DEMO)], &[]).unwrap().spec;
    spec.resolve_paths(Path::new("/home/$me/~"));
    spec.check().unwrap();
}
