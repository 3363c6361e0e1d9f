use expect_test::{expect, expect_file};
use proptest::prelude::*;

use super::*;
use crate::load::parse_text;

fn spec(overrides: &[&str]) -> RunSpec {
    let text = "base = \"preset:demo\"\nschema = 1\nname = \"a\"\ndata.shards = \"d\"";
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    parse_text("run.toml", text, &overrides).unwrap().spec
}

/// Every leaf of an effective spec is in the table, and every field is a leaf where it is set.
#[test]
fn the_table_and_the_structs_agree() {
    fn leaves(out: &mut Vec<String>, path: &str, value: &Value) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    leaves(out, format!("{path}.{key}").trim_start_matches('.'), value);
                }
            }
            _ => out.push(path.to_string()),
        }
    }
    let mut found: Vec<String> = Vec::new();
    let optional = [
        "checkpoint.keep.every=5ep",
        "data.cache.dir=/nvme",
        "data.cache.size=500GB",
        "track.tensorboard=tb",
        "track.reconstructions.every=1ep",
        "task.kind=finetune",
        "task.encoder=runs/mine",
        "task.ema=0.9999",
        "task.classes=10",
    ];
    leaves(&mut found, "", &spec(&optional).to_json());
    found.sort();
    let mut table: Vec<&str> = FIELDS.iter().map(|field| field.path).collect();
    table.sort();
    assert_eq!(found, table);
}

#[test]
fn a_share_of_the_samples_may_be_bad_and_a_few_in_any_case() {
    let most = |overrides: &[&str], n| spec(overrides).bad_samples_max(n);
    assert_eq!(most(&[], 1_281_167), 1281);
    assert_eq!(most(&[], 500), crate::BAD_SAMPLES_FREE);
    assert_eq!(most(&["data.bad_samples_max=0.05"], 256), 12);
    assert_eq!(most(&["data.bad_samples_max=1.0"], 256), 256);
}

#[test]
fn a_spec_of_an_older_build_allows_the_usual_share() {
    let mut json = spec(&[]).to_json();
    json["data"].as_object_mut().unwrap().remove("bad_samples_max");
    let read: RunSpec = serde_json::from_value(json).unwrap();
    assert_eq!(read, spec(&[]));
}

#[test]
fn examples_are_accepted() {
    for field in FIELDS {
        // Some keys bind others: the example must at least have the right type.
        let set = format!("{}={}", field.path, field.example);
        let text = "base = \"preset:base\"\nschema = 1\nname = \"a\"\ndata.shards = \"d\"\n\
                    data.cache = { dir = \"c\", size = \"1GB\" }\n\
                    track.reconstructions = { every = \"1ep\" }\n\
                    task = { kind = \"finetune\", classes = 10 }";
        parse_text("run.toml", text, &[set]).unwrap();
    }
}

#[test]
fn differences_are_listed_with_their_marks() {
    let new = spec(&[
        "train.batch=512",
        "data.shards=elsewhere",
        "checkpoint.keep.every=1ep",
        "optim.betas=[0.9, 0.99]",
        "track.every=1min",
        "train.duration=10ep",
    ]);
    let lines: Vec<String> = diff(&spec(&[]), &new).iter().map(ToString::to_string).collect();
    expect![[r#"
        data.shards: "d" -> "elsewhere" [placement]
        data.lanes: 64 -> 256 [maths]
        train.duration: "700step" -> "10ep" [maths]
        train.batch: 64 -> 512 [maths]
        optim.betas: [0.9, 0.95] -> [0.9, 0.99] [maths]
        checkpoint.keep.every: unset -> "1ep" [placement]
        track.every: "20step" -> "1min" [display]"#]]
    .assert_eq(&lines.join("\n"));
    assert_eq!(diff(&new, &new), []);
}

#[test]
fn digests_follow_the_marks() {
    let plain = spec(&[]);
    let moved =
        spec(&["checkpoint.to=elsewhere", "elastic.workers=2:3", "name=b", "data.threads=3"]);
    assert_ne!(plain.digest(), moved.digest());
    assert_eq!(plain.maths_digest(), moved.maths_digest());
    for change in ["train.seed=1", "data.flip=0.25", "model.depth=7", "optim.warmup=none"] {
        assert_ne!(plain.maths_digest(), spec(&[change]).maths_digest(), "{change}");
    }
}

/// The bytes behind stored digests, so that a change cannot go unseen.
#[test]
fn canonical_json_is_pinned() {
    let spec = spec(&[]);
    let text = format!("{}\n{}\n", spec.canonical_json(), spec.maths_digest().to_hex());
    expect_file!["../../transcripts/canonical.txt"].assert_eq(&text);
}

#[test]
fn json_and_toml_hold_the_whole_spec() {
    let spec = spec(&[
        "checkpoint.keep.every=20ep",
        "data.shards=é \"quoted\"",
        "data.cache={ dir = \"/nvme\", size = \"64GiB\" }",
    ]);
    let again: RunSpec = serde_json::from_str(&spec.canonical_json()).unwrap();
    assert_eq!(again, spec);
    let again = parse_text("effective.toml", &spec.effective_toml(), &[]).unwrap().spec;
    assert_eq!(again, spec);
    spec.check().unwrap();
}

#[test]
fn stored_specs_are_validated() {
    let mut json = spec(&[]).to_json();
    json["train"]["batch"] = 100.into();
    json["train"]["extra"] = 1.into();
    json["optim"].as_object_mut().unwrap().remove("eps");
    let error = serde_json::from_value::<RunSpec>(json).unwrap_err();
    expect_file!["../../transcripts/stored.txt"].assert_eq(&format!("{error}\n"));
    assert!(serde_json::from_str::<RunSpec>("[1]").is_err());
}

proptest! {
    #[test]
    fn any_numbers_round_trip(
        base_lr in 1e-9f64..10.0,
        eps in 1e-12f64..1e-3,
        beta in 0.0f64..0.9999,
        flip in 0.0f64..=1.0,
        mask_ratio in 0.1f64..0.9,
        seed in 0..=i64::MAX,
    ) {
        let mut spec = spec(&[]);
        spec.optim.base_lr = base_lr;
        spec.optim.eps = eps;
        spec.optim.betas[1] = beta;
        spec.data.flip = flip;
        spec.model.mask_ratio = mask_ratio;
        spec.train.seed = seed as u64;
        spec.check().unwrap();
        let again: RunSpec = serde_json::from_str(&spec.canonical_json()).unwrap();
        prop_assert_eq!(&again, &spec);
        let again = parse_text("effective.toml", &spec.effective_toml(), &[]).unwrap().spec;
        prop_assert_eq!(&again, &spec);
        prop_assert_eq!(again.digest(), spec.digest());
    }
}

/// The limits of the model's sizes stand in the table and in `recipe`.
#[test]
fn the_table_and_the_model_have_the_same_limits() {
    for field in FIELDS.iter().filter(|field| field.section() == "model") {
        let max = match field.kind {
            Kind::Integer { max, .. } | Kind::Sides { max } => max,
            _ => continue,
        };
        let mut json = spec(&[]).to_json()["model"].clone();
        let value = match field.kind {
            Kind::Sides { .. } => serde_json::json!([max + 1, max + 1]),
            _ => (max + 1).into(),
        };
        json[field.key()] = value;
        let model: lacuna_recipe::model::ModelConfig = serde_json::from_value(json).unwrap();
        let too_large = format!("must be between 1 and {max}, not {}", max + 1);
        let problems = model.problems();
        assert!(problems.iter().any(|p| p.to_string().ends_with(&too_large)), "{problems:?}");
    }
}

#[test]
fn intervals_round_as_the_arithmetic_does() {
    let below_one = Interval::below(0.0, 1.0);
    assert!(below_one.contains(0.0) && below_one.contains(0.999) && !below_one.contains(1.0));
    assert!(!below_one.contains(0.999_999_999_99), "it is 1 in f32");
    let positive = Interval::above(0.0, 1.0);
    assert!(positive.contains(1.0) && positive.contains(1e-37) && !positive.contains(0.0));
    assert!(!positive.contains(1e-46), "it is 0 in f32");
    assert!(!Interval::from(0.0, 1.0).contains(f64::NAN));
}
