//! The commands that use a trained model, run as people run them, on the golden set `mid`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use lacuna_checkpoint::catalog;
use lacuna_checkpoint::export::{
    ExportDtype, ExportLayout, ExportOptions, MAX_SHARD_BYTES, export,
};
use lacuna_checkpoint::import::{Start, Weights, commit_start, import};
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::manifest::{Loss, RunFacts};
use lacuna_data::pack::{Existing, PackConfig, PackSource, SHARD_BYTES_DEFAULT, pack};
use lacuna_data::synthetic::SyntheticSpec;
use lacuna_data::{Dataset, ImageShape, SampleReader};
use lacuna_mae::frozen::FrozenMae;
use lacuna_recipe::keymap::import::Wanted;
use lacuna_spec::{RunSpec, parse_text};
use lacuna_types::SampleId;
use serde_json::Value;

const SHAPE: ImageShape = ImageShape { height: 32, width: 32, channels: 3 };
const N_TRAIN: u64 = 60;
const N_VAL: u64 = 23;
/// What the weights file does not say, and what the spec of the run says.
const HEADS: [&str; 6] = ["--heads", "4", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"];
const SPEC: &str = r#"
schema = 1
name = "mid"
base = "preset:micro"
[model]
img_size = [32, 32]
patch_size = 4
width = 64
depth = 3
heads = 4
decoder_width = 32
decoder_depth = 2
decoder_heads = 4
[data]
shards = "val"
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
[checkpoint]
to = "runs"
"#;

/// A folder with two data sets.
struct Desk {
    dir: tempfile::TempDir,
}

impl Desk {
    fn new() -> Self {
        let desk = Desk { dir: tempfile::tempdir().unwrap() };
        desk.pack("train", N_TRAIN, 1);
        desk.pack("val", N_VAL, 2);
        desk
    }

    /// Packs made-up images; the first of a seed are always the same.
    fn pack(&self, name: &str, n_images: u64, seed: u64) {
        let spec = SyntheticSpec { n_images, shape: SHAPE, seed };
        let config = PackConfig {
            name: name.to_string(),
            shard_bytes: SHARD_BYTES_DEFAULT,
            existing: Existing::Refuse,
        };
        pack(&PackSource::Synthetic(spec), &self.path(name), &config, &mut |_| {}).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `lacuna-worker` in the folder; returns stdout and stderr.
    fn run(&self, code: i32, words: &[&str]) -> (String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_lacuna-worker"))
            .args(words)
            .current_dir(self.dir.path())
            .env_remove("RUST_LOG")
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{words:?}: {out}{err}");
        (out, err)
    }

    /// Writes features of the validation set; returns the values.
    fn features(&self, source: &str, out: &str, more: &[&str]) -> Vec<f32> {
        let fixed = ["features", source, "--data", "val", "--out", out, "--threads", "2"];
        self.run(0, &[&fixed, more].concat());
        npy(&self.path(out))
    }

    /// Makes a run whose first checkpoint has the golden parameters.
    fn run_folder(&self) -> (RunDir, RunSpec) {
        let spec = parse_text("run.toml", SPEC, &[]).unwrap().spec;
        let weights = Weights::open(&golden()).unwrap();
        let imported = import(&weights, &spec.model, 0, Wanted::Any).unwrap();
        let dir = RunDir::new(self.path("runs"), spec.run_id());
        let facts = RunFacts {
            spec_digest: "blake3:00".to_string(),
            data_fingerprint: "11".to_string(),
            seed: 0,
            rng: "philox/1".to_string(),
            build: "lacuna 0.1.0".to_string(),
            probe_class: String::new(),
            epoch: 0,
            samples: 0,
            loss: Loss::default(),
        };
        let start = Start {
            config: &spec.model,
            params: &imported.params,
            batch: spec.train.batch,
            facts,
            spec: spec.effective_toml(),
            created: "2026-01-02T03:04:05Z".to_string(),
        };
        commit_start(&dir, &start).unwrap();
        (dir, spec)
    }
}

fn golden() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    folder.join("mid.weights.f32.safetensors").canonicalize().unwrap()
}

fn golden_text() -> String {
    golden().display().to_string()
}

/// Reads the values of an npy file of floats.
fn npy(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    let length = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let head = String::from_utf8_lossy(&bytes[10..10 + length]);
    assert!(head.starts_with("{'descr': '<f4', 'fortran_order': False"), "{head}");
    let values = bytes[10 + length..].chunks_exact(4);
    values.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn pixels(dataset: &Dataset) -> Vec<u8> {
    let mut reader = SampleReader::new();
    let mut out = vec![0; dataset.n_samples() as usize * SHAPE.bytes()];
    for (id, out) in (0..).zip(out.chunks_exact_mut(SHAPE.bytes())) {
        reader.plain(dataset, SampleId(id), SHAPE, out).unwrap();
    }
    out
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (a, b)| m.max((a - b).abs()))
}

#[test]
fn features_are_those_of_the_model() {
    let desk = Desk::new();
    let spec = parse_text("run.toml", SPEC, &[]).unwrap().spec;
    let weights = Weights::open(&golden()).unwrap();
    let params = import(&weights, &spec.model, 0, Wanted::Any).unwrap().params;
    let model = FrozenMae::new(&spec.model, &[0.5; 3], &[0.25; 3], &params);
    let dataset = Dataset::open(&desk.path("val")).unwrap();
    let want = model.features(&pixels(&dataset));
    let source = golden_text();
    for (pool, want) in [("cls", &want.cls), ("mean", &want.mean_patch), ("tokens", &want.tokens)] {
        // The model is given as a weights file without heads and normalisation.
        let out = format!("{pool}.npy");
        let flags = [&HEADS[..], &["--pool", pool]].concat();
        let got = desk.features(&source, &out, &flags);
        assert!(furthest(&got, want) < 1e-5, "{pool}: {}", furthest(&got, want));
    }
    let labels = std::fs::read(desk.path("cls.labels.npy")).unwrap();
    let labels = labels[labels.len() - N_VAL as usize * 8..].chunks_exact(8);
    for (id, label) in (0..).zip(labels) {
        let label = i64::from_le_bytes(label.try_into().unwrap());
        assert_eq!(dataset.label(SampleId(id)).map(i64::from), Some(label));
    }
}

#[test]
fn any_source_and_any_number_of_threads_give_the_same_bits() {
    let desk = Desk::new();
    let (dir, spec) = desk.run_folder();
    let want = desk.features("runs/mid", "run.npy", &[]);
    let manifest = catalog::newest_good(&catalog::list(&dir).unwrap()).unwrap().clone();
    let exports = [
        (ExportLayout::Mae, "mae.safetensors"),
        (ExportLayout::Timm, "timm.safetensors"),
        (ExportLayout::Hf, "hf"),
        (ExportLayout::HfEncoder, "hf-encoder"),
    ];
    for (layout, name) in exports {
        let options = ExportOptions {
            layout,
            dtype: ExportDtype::F32,
            max_shard_bytes: MAX_SHARD_BYTES,
            image_mean: spec.data.mean.clone(),
            image_std: spec.data.std.clone(),
            classes: Vec::new(),
        };
        export(&dir, &manifest, &spec.model, &options, &desk.path(name)).unwrap();
        // An export says its heads and its normalisation itself.
        let got = desk.features(name, &format!("{name}.npy"), &[]);
        assert_eq!(got, want, "{name}");
    }
    for threads in ["1", "5"] {
        let out = format!("threads-{threads}.safetensors");
        desk.run(
            0,
            &["features", "runs/mid", "--data", "val", "--out", &out, "--threads", threads],
        );
        let read = tch::Tensor::read_safetensors(desk.path(&out)).unwrap();
        let (_, features) = read.iter().find(|(name, _)| name == "features").unwrap();
        assert_eq!(Vec::<f32>::try_from(features.view(-1)).unwrap(), want);
    }
    assert!(
        std::fs::read_dir(desk.dir.path())
            .unwrap()
            .flatten()
            .all(|entry| { !entry.file_name().to_string_lossy().ends_with(".partial") })
    );
}

#[test]
fn other_image_sizes_get_their_own_position_table() {
    let desk = Desk::new();
    let source = golden_text();
    let features = |out: &str, more: &[&str]| {
        let words = ["features", &source, "--data", "val", "--out", out, "--img-size", "48x32"];
        let (said, _) = desk.run(0, &[&words, &HEADS[..], more].concat());
        (npy(&desk.path(out)), said)
    };
    let (auto, said) = features("auto.npy", &[]);
    assert_eq!(auto.len(), N_VAL as usize * 64);
    assert!(said.contains("position table: sine-cosine, computed for 12 x 8 patches"), "{said}");
    let (timm, said) = features("timm.npy", &["--pos-resize", "timm"]);
    let how = "sine-cosine, resized from 8 x 8 to 12 x 8 patches (bicubic with antialiasing";
    assert!(said.contains(how), "{said}");
    let (mae, said) = features("mae.npy", &["--pos-resize", "mae"]);
    assert!(said.contains("(bicubic without antialiasing, as mae and transformers do)"), "{said}");
    assert!(furthest(&auto, &timm) > 1e-3 && furthest(&auto, &mae) > 1e-3);
    // Widening has no pixels to average: the two differ in the coefficient only.
    assert!(furthest(&mae, &timm) > 1e-6);
}

/// Classifies by hand from written features: the nearest `k`, the lower number first among equals.
fn hits_by_hand(desk: &Desk, k: usize) -> f64 {
    let read = |data: &str| -> (Vec<Vec<f64>>, Vec<u32>) {
        let out = format!("{data}-hand.npy");
        let source = golden_text();
        let words = ["features", &source, "--data", data, "--out", &out, "--force"];
        desk.run(0, &[&words, &HEADS[..]].concat());
        let values = npy(&desk.path(&out));
        let rows = values.chunks(64).map(|row| {
            let length = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            row.iter().map(|x| f64::from(*x) / length).collect()
        });
        let dataset = Dataset::open(&desk.path(data)).unwrap();
        let labels = (0..dataset.n_samples()).map(|id| dataset.label(SampleId(id)).unwrap());
        (rows.collect(), labels.collect())
    };
    let ((train, train_labels), (val, val_labels)) = (read("train"), read("val"));
    let mut hits = 0;
    for (query, truth) in val.iter().zip(&val_labels) {
        let cosine = |key: &Vec<f64>| query.iter().zip(key).map(|(a, b)| a * b).sum::<f64>();
        let mut near: Vec<(f64, usize)> =
            train.iter().map(cosine).zip(0..).map(|(s, i)| (-s, i)).collect();
        near.sort_by(|a, b| a.partial_cmp(b).unwrap());
        let mut votes: BTreeMap<u32, f64> = BTreeMap::new();
        for (similarity, i) in near.iter().take(k) {
            *votes.entry(train_labels[*i]).or_default() += (-similarity / 0.07).exp();
        }
        let best = votes.iter().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
        hits += u64::from(best.0 == truth);
    }
    hits as f64 / val.len() as f64
}

#[test]
fn neighbours_vote() {
    let desk = Desk::new();
    let source = golden_text();
    let knn = |out: &str, more: &[&str]| -> (Value, String, String) {
        let words = ["eval", "knn", &source, "--train", "train", "--val", "val", "--out", out];
        let (said, noted) = desk.run(0, &[&words, &HEADS[..], more].concat());
        let text = std::fs::read_to_string(desk.path(out)).unwrap();
        (serde_json::from_str(&text).unwrap(), said, noted)
    };
    let flags = ["--threads", "1", "--batch", "7", "--page", "a.html"];
    let (report, said, noted) = knn("a.json", &flags);
    let page = std::fs::read_to_string(desk.path("a.html")).unwrap();
    assert!(page.contains("Nearest neighbours</h2>") && page.contains("image/png"), "{page}");
    assert!(noted.contains("no result for k = [100, 200]: there are 60 training"), "{noted}");
    let names: Vec<&str> = report["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["features"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["encoder", "raw pixels", "random encoder"]);
    let dims: Vec<u64> =
        report["rows"].as_array().unwrap().iter().map(|r| r["dim"].as_u64().unwrap()).collect();
    assert_eq!(dims, [64, 3072, 64]);
    for (i, k) in [10, 20].into_iter().enumerate() {
        let result = &report["rows"][0]["results"][i];
        assert_eq!(result["k"], k);
        assert_eq!(result["top1"].as_f64().unwrap(), hits_by_hand(&desk, k as usize));
        let confusion = result["confusion"].as_array().unwrap();
        let total: u64 = confusion
            .iter()
            .flat_map(|row| row.as_array().unwrap())
            .map(|n| n.as_u64().unwrap())
            .sum();
        assert_eq!((confusion.len(), total), (4, N_VAL));
    }
    assert!(said.lines().any(|line| line.starts_with("encoder ")), "{said}");
    // Threads do not matter.
    let (again, _, _) = knn("b.json", &["--threads", "3", "--batch", "7"]);
    assert_eq!(report, again);
    assert!(!noted.contains("on both sides"), "{noted}");
    // Of what is there twice each finds itself.
    desk.pack("half", N_TRAIN / 2, 1);
    let words = ["eval", "knn", &source, "--train", "train", "--val", "half", "--out", "h.json"];
    let (_, noted) = desk.run(0, &[&words, &HEADS[..]].concat());
    assert!(noted.contains("30 of 30 validation images have the very features"), "{noted}");
    // A tenth of four classes, 60 images in all; and no baselines.
    let few = ["--label-fraction", "0.1", "--k", "3,1", "--baseline", "none"];
    let (report, _, _) = knn("c.json", &few);
    let used = report["train"]["samples_used"].as_u64().unwrap();
    assert!((4..=8).contains(&used), "{used}");
    assert_eq!(report["rows"].as_array().unwrap().len(), 1);
    assert_eq!(report["rows"][0]["results"][0]["k"], 1);
}

#[test]
fn pictures_of_any_image_say_whose_statistics_they_show() {
    let desk = Desk::new();
    desk.run_folder();
    let grey = image::GrayImage::from_fn(50, 40, |x, y| image::Luma([(x * 5 + y) as u8]));
    grey.save(desk.path("one.png")).unwrap();
    let source = golden_text();
    let whole = [&["reconstruct", &source][..], &HEADS, &["--decoder-heads", "4"]].concat();
    let with = |more: &[&str]| {
        let (said, noted) = desk.run(0, &[&whole, more, &["--out", "p.png"]].concat());
        let png = std::fs::read(desk.path("p.png")).unwrap();
        let at = png.windows(11).position(|w| w == b"Description").unwrap();
        let text = String::from_utf8_lossy(&png[at + 16..]).into_owned();
        let picture = image::open(desk.path("p.png")).unwrap().to_rgb8();
        (said, noted, text, picture)
    };
    let (said, noted, text, visible) = with(&["--image", "one.png", "--image", "one.png"]);
    assert!(said.contains("2 rows of original") && said.contains("never with their own"), "{said}");
    assert!(text.contains("2 rows of original") && text.contains("never with their own"), "{text}");
    assert!(noted.contains("norm_pix_loss) is not in the file: taken as true"), "{noted}");
    let truth = ["--image", "one.png", "--image", "one.png", "--statistics", "truth"];
    let (said, _, text, told) = with(&truth);
    assert!(said.contains("the ground truth's own brightness"), "{said}");
    assert!(text.contains("the ground truth's own brightness"), "{text}");
    assert_ne!(visible, told);
    let (said, ..) = with(&["--image", "one.png", "--data", "val", "--images", "2"]);
    assert!(said.contains("3 rows of original"), "{said}");
    let (said, ..) = with(&["--norm-pix-loss", "false", "--data", "val", "--images", "1"]);
    assert!(said.contains("1 row of") && said.contains("as the model predicts them"), "{said}");
    let (said, ..) = with(&["--mask-ratio", "0.5", "--data", "val", "--images", "1"]);
    assert!(said.contains("32 of 64 patches are removed"), "{said}");
    // A run's own data, as its spec names it: seen from the folder where it trains.
    let (said, _) = desk.run(0, &["reconstruct", "runs/mid", "--images", "2"]);
    assert!(said.contains("`runs/mid` at step 0") && said.contains("2 rows"), "{said}");
}

/// Who looks for the trained protocols among the evaluations is told where they are.
#[test]
fn trained_protocols_are_runs() {
    let desk = Desk::new();
    for kind in ["linear", "finetune"] {
        let (_, err) = desk.run(2, &["eval", kind, "runs/mid", "--train", "train", "--lars"]);
        let preset = format!("demo-{kind}");
        assert!(err.contains(&format!("lacuna init --preset {preset}")), "{err}");
        assert!(lacuna_spec::presets::find(&preset).is_some(), "{preset}");
    }
    let (help, _) = desk.run(0, &["eval", "--help"]);
    assert!(help.contains("A linear probe and fine-tuning are runs"), "{help}");
}

#[test]
fn bad_input_is_named() {
    let desk = Desk::new();
    let (dir, spec) = desk.run_folder();
    let manifest = catalog::newest_good(&catalog::list(&dir).unwrap()).unwrap().clone();
    let options = ExportOptions {
        layout: ExportLayout::Timm,
        dtype: ExportDtype::Bf16,
        max_shard_bytes: MAX_SHARD_BYTES,
        image_mean: spec.data.mean.clone(),
        image_std: spec.data.std.clone(),
        classes: Vec::new(),
    };
    export(&dir, &manifest, &spec.model, &options, &desk.path("timm.safetensors")).unwrap();
    for (name, bytes) in [("a.pth", &b"PK\x03\x04"[..]), ("b.safetensors", b"PK\x03\x04 rest")] {
        std::fs::write(desk.path(name), bytes).unwrap();
    }
    std::fs::write(desk.path("text.png"), "no image").unwrap();
    std::fs::create_dir(desk.path("empty")).unwrap();
    let source = golden_text();
    let features = |source: &str, more: &[&str]| -> Vec<String> {
        let words = ["features", source, "--data", "val", "--out", "f.npy"];
        [&words, more].concat().into_iter().map(str::to_string).collect()
    };
    let knn = |more: &[&str]| -> Vec<String> {
        let words =
            ["eval", "knn", "runs/mid", "--train", "train", "--val", "val", "--out", "k.json"];
        [&words, more].concat().into_iter().map(str::to_string).collect()
    };
    let knn_of = |train: &str, val: &str| -> Vec<String> {
        let words = ["eval", "knn", "runs/mid", "--train", train, "--val", val, "--out", "k.json"];
        words.into_iter().map(str::to_string).collect()
    };
    let draw = |source: &str, more: &[&str]| -> Vec<String> {
        [&["reconstruct", source], more].concat().into_iter().map(str::to_string).collect()
    };
    let cases: &[(Vec<String>, i32, &str)] = &[
        (features("nothing", &[]), 74, "failed to open `nothing`"),
        (features("empty", &[]), 2, "neither the folder of a run's checkpoints nor one with"),
        (features("a.pth", &[]), 2, "`a.pth` is a pickle, which is not read"),
        (features("b.safetensors", &[]), 2, "python3 -c"),
        (features(&source, &[]), 2, "no preset is 64 wide and 3 deep: give --heads"),
        (features(&source, &["--heads", "5"]), 2, "must be a multiple of 5 (`heads`)"),
        (features(&source, &["--heads", "4", "--mean", "1"]), 2, "--mean has 1 values for 3"),
        (features(&source, &["--heads", "4", "--std", "0,1,1"]), 2, "--std must be positive"),
        (features(&source, &["--heads", "4", "--step", "3"]), 2, "--step is for runs"),
        (features(&source, &["--heads", "4", "--ema"]), 2, "--ema is for runs"),
        (features("runs/mid", &["--ema"]), 2, "keeps no average of its weights (`task.ema`)"),
        (features("runs/mid", &["--heads", "4"]), 2, "--heads is for weights files"),
        (features("runs/mid", &["--step", "7"]), 74, "there is no checkpoint at step 7"),
        (features("runs/mid", &["--img-size", "30"]), 2, "must be a multiple of 4 (`patch_size`)"),
        (features("runs/mid", &["--img-size", "abc"]), 2, "not a size"),
        (features("runs/mid", &["--batch", "0"]), 2, "--batch"),
        (features("runs/mid", &["--out", "f.txt"]), 2, "cannot be used multiple times"),
        (features("runs/mid", &["--pool", "max"]), 2, "--pool"),
        (knn(&["--k", "0"]), 2, "--k"),
        (knn_of("train", "train"), 2, "are the same images, and each would find itself"),
        (knn(&["--k", "500"]), 2, "--k 500 needs more than 60 training samples"),
        (knn(&["--temperature", "0"]), 2, "--temperature must be above 0"),
        (knn(&["--label-fraction", "1.5"]), 2, "--label-fraction must be in (0, 1]"),
        (knn(&["--baseline", "none,raw"]), 2, "--baseline none stands alone"),
        (draw("timm.safetensors", &["--image", "text.png"]), 2, "holds an encoder alone"),
        (draw("runs/mid", &["--image", "text.png"]), 2, "`text.png` is not a usable image"),
        (draw("runs/mid", &["--image", "none.png"]), 74, "failed to read --image `none.png`"),
        (draw("runs/mid", &["--mask-ratio", "1"]), 2, "--mask-ratio does not fit: "),
        (draw("runs/mid", &["--images", "0"]), 2, "`--images` must be between 1 and 256"),
        (draw(&source, &[]), 2, "--heads"),
    ];
    for (words, code, want) in cases {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let (_, err) = desk.run(*code, &words);
        assert!(err.contains(want), "{words:?}: {err}");
    }
    let words = ["features", "runs/mid", "--data", "val", "--out", "f.txt"];
    let (_, err) = desk.run(2, &words);
    assert!(err.contains("ends neither in .npy nor in .safetensors"), "{err}");
    let words = ["features", "runs/mid", "--data", "missing", "--out", "f.npy"];
    let (_, err) = desk.run(74, &words);
    assert!(err.contains("failed to open data `missing`"), "{err}");
    // What is there is not written over unasked.
    let words = ["features", "runs/mid", "--data", "val", "--out", "f.npy"];
    desk.run(0, &words);
    let (_, err) = desk.run(2, &words);
    assert!(err.contains("`f.npy` is there: write over it with --force"), "{err}");
    desk.run(0, &[&words[..], &["--force"]].concat());
    // A damaged sample is named, and no file stays.
    let shard = std::fs::read_dir(desk.path("val"))
        .unwrap()
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().ends_with(".tar"));
    let shard = shard.unwrap().path();
    let mut bytes = std::fs::read(&shard).unwrap();
    let at = Dataset::open(&desk.path("val")).unwrap().index().record(SampleId(9)).offset;
    bytes[at as usize + 20] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let words = ["features", "runs/mid", "--data", "val", "--out", "g.npy"];
    let (_, err) = desk.run(74, &words);
    assert!(err.contains("sample 9 (") && err.contains("is corrupt"), "{err}");
    assert!(!desk.path("g.npy").exists() && !desk.path("g.npy.partial").exists());
    let (_, err) = desk.run(0, &[&words[..], &["--nan-for-bad"]].concat());
    assert!(err.contains("1 image could not be read, its row is NaN: 9"), "{err}");
    let (whole, holed) = (npy(&desk.path("f.npy")), npy(&desk.path("g.npy")));
    let width = whole.len() / N_VAL as usize;
    for (i, (got, want)) in holed.iter().zip(&whole).enumerate() {
        assert!(if i / width == 9 { got.is_nan() } else { got == want }, "value {i}");
    }
}
