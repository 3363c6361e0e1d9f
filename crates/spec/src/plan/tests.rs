use expect_test::{ExpectFile, expect_file};

use super::*;
use crate::load::parse_text;

fn check(preset: &str, overrides: &[&str], n_samples: Option<u64>, want: ExpectFile) {
    let text = format!("base = \"preset:{preset}\"\nschema = 1\nname = \"a\"\ndata.shards = \"d\"");
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    let spec = parse_text("run.toml", &text, &overrides).unwrap().spec;
    want.assert_eq(&plan(&spec, n_samples).to_string());
}

#[test]
fn the_paper() {
    let want = expect_file!["../../transcripts/plan_paper.txt"];
    check("base", &["elastic.workers=1:9"], Some(1_281_167), want);
}

#[test]
fn the_demo_before_its_data() {
    let want = expect_file!["../../transcripts/plan_demo.txt"];
    check("demo", &["elastic.workers=6:10", "train.slot_batch=8"], None, want);
}

#[test]
fn epochs_need_the_data() {
    let want = expect_file!["../../transcripts/plan_no_data.txt"];
    check("huge", &["elastic.workers=8:8"], None, want);
}

#[test]
fn too_little_data() {
    let want = expect_file!["../../transcripts/plan_little_data.txt"];
    check("demo", &["elastic.workers=1:1"], Some(255), want);
}

#[test]
fn many_workers_are_printed_briefly() {
    let want = expect_file!["../../transcripts/plan_many_workers.txt"];
    check("base", &["elastic.workers=60:300", "train.slot_batch=16"], None, want);
}

#[test]
fn what_is_allowed_and_not_wanted() {
    let want = expect_file!["../../transcripts/plan_warnings.txt"];
    let cases: &[&[&str]] = &[
        &[],
        &["optim.base_lr=1.0", "train.batch=4096", "optim.weight_decay=0.1"],
        &["optim.betas=[0.95, 0.9]", "data.mean=[5.0]"],
        &["optim.warmup=700step"],
        &["checkpoint.every=800step", "track.every=1000step"],
        &["checkpoint.every=[\"5min\", \"1h\", \"100step\", \"1ep\"]"],
        &["checkpoint.keep.every=600step"],
        &["checkpoint.keep.every=500step"],
        &["checkpoint.keep.every=5ep"],
        &["checkpoint.keep.every=5ep", "checkpoint.every=15min"],
        &["checkpoint.to=d", "data.cache.dir=d", "data.cache.size=5MB"],
        &["task.kind=\"finetune\"", "task.classes=10", "task.ema=0.9999"],
        &["task.kind=\"linear\"", "task.classes=10", "task.encoder=\"runs/a\""],
    ];
    let mut out = String::new();
    for overrides in cases {
        let text = "base = \"preset:demo\"\nschema = 1\nname = \"a\"\ndata.shards = \"d\"";
        let set: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        let spec = parse_text("run.toml", text, &set).unwrap().spec;
        // A task's warnings are those of a run that begins, whose data is known.
        let n_samples = spec.task.is_some().then_some(60_000);
        let warnings = plan(&spec, n_samples).warnings;
        out += &format!("> {}\n{}\n\n", overrides.join(" "), warnings.join("\n"));
    }
    want.assert_eq(&out);
}
