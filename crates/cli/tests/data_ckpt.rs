//! The commands on files, run as a person runs them: data sets, plans, checkpoints.

mod desk;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use desk::{Desk, save};
use lacuna_data::Dataset;
use lacuna_data::bad::BadSamples;
use lacuna_data::pack::class_names;
use lacuna_types::SampleId;
use serde_json::Value;

/// Inverts one byte of a file.
fn damage(path: &Path, offset: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[offset] ^= 0xFF;
    fs::write(path, bytes).unwrap();
}

#[test]
fn data_from_nothing_to_damage() {
    let desk = Desk::new();
    desk.synthetic("40");
    let stats = desk.json(&["data", "stats", "d", "--patch-size", "2"]);
    assert_eq!((stats["n_samples"].as_u64(), stats["channels"].as_u64()), (Some(40), Some(3)));
    assert_eq!(stats["size"]["height"], 8);
    assert!(stats["n_shards"].as_u64().unwrap() > 1, "{stats}");
    let loss = |key: &str| stats["baselines"][key].as_f64().unwrap();
    assert!(loss("mean_patch") <= loss("zero") && loss("zero") < 1.0, "{stats}");
    let (out, _) = desk.run(0, &["data", "stats", "d", "--patch-size", "2"]);
    assert!(out.contains("predict the mean patch") && out.contains("8x8, png"), "{out}");
    desk.run(2, &["data", "stats", "d", "--patch-size", "3"]);

    let (out, _) = desk.run(0, &["data", "verify", "d"]);
    assert!(out.starts_with("sound: 0 bad samples of 40 samples"), "{out}");
    let dataset = Dataset::open(&desk.path("d")).unwrap();
    let place = dataset.place(SampleId(7));
    damage(&place.shard, place.offset as usize + 20);
    let (out, _) = desk.run(74, &["data", "verify", "d"]);
    let shard = place.shard.file_name().unwrap().to_str().unwrap();
    assert!(out.contains("sample 7 (") && out.contains(shard), "{out}");
    assert!(out.contains("damaged: 1 bad sample of 40 samples, 1 bad shard"), "{out}");
    desk.run(74, &["data", "verify", "nowhere"]);
}

#[test]
fn bad_samples_are_written_down_and_taken_out() {
    let desk = Desk::new();
    desk.synthetic("40");
    let (bitmap, kept) = (desk.path("d/index.bad"), desk.path("d/index.lacuna.before-exclude"));
    let (out, _) = desk.run(0, &["data", "verify", "d", "--exclude"]);
    assert!(out.starts_with("sound: ") && !bitmap.exists() && !kept.exists(), "{out}");
    let dataset = Dataset::open(&desk.path("d")).unwrap();
    let place = dataset.place(SampleId(7));
    damage(&place.shard, place.offset as usize + 20);

    let (out, _) = desk.run(74, &["data", "verify", "d"]);
    assert!(out.contains("listed in `d/index.bad`; `--exclude` takes them out"), "{out}");
    let bad = BadSamples::read(&desk.path("d/index.lacuna"), &dataset).unwrap();
    assert_eq!(bad.ids().collect::<Vec<_>>(), [SampleId(7)]);
    let (out, _) = desk.run(0, &["data", "verify", "d", "--exclude"]);
    let after = Dataset::open(&desk.path("d")).unwrap();
    let (old, new) = (dataset.fingerprint(), after.fingerprint());
    assert!(out.contains("taken out: 1 sample; 39 samples left"), "{out}");
    assert!(out.contains(&format!("old fingerprint  {old}\nnew fingerprint  {new}\n")), "{out}");
    assert!(out.contains("cannot go on with the new one. To go back:"), "{out}");
    assert!(!bitmap.exists() && kept.exists());
    let again = desk.json(&["data", "verify", "d"]);
    assert_eq!((again["clean"].as_bool(), again["n_samples"].as_u64()), (Some(true), Some(39)));
    assert_eq!(again["fingerprint"], new.to_string());

    fs::rename(&kept, desk.path("d/index.lacuna")).unwrap();
    let back = desk.output(&["data", "verify", "d", "--exclude", "-o", "json"]);
    let back: Value = serde_json::from_slice(&back.stdout).unwrap();
    assert_eq!(back["excluded"]["fingerprint"], new.to_string());
    assert_eq!((back["n_bad"].as_u64(), &back["bitmap"]), (Some(1), &Value::Null));

    for id in 0..39 {
        let place = after.place(SampleId(id));
        damage(&place.shard, place.offset as usize + 20);
    }
    let (out, err) = desk.run(74, &["data", "verify", "d/index.lacuna", "--exclude"]);
    assert!(err.contains("all 39 samples of `d/index.lacuna` are bad"), "{err}");
    assert!(out.contains("damaged: 39 bad samples of 39 samples"), "{out}");
    assert_eq!(Dataset::open(&desk.path("d")).unwrap().fingerprint(), new);
    let other = ["data", "synthetic", "d", "--n", "21", "--size", "8", "--replace"];
    desk.run(0, &other);
    assert!(!bitmap.exists() && !kept.exists(), "what was said of the old index");
}

#[test]
fn the_bench_names_what_holds_the_loader_back() {
    let desk = Desk::new();
    desk.synthetic("80");
    let quick = ["data", "bench", "d", "--seconds", "0.05", "--size", "8", "--threads", "1,2"];
    let (out, _) = desk.run(0, &[&quick[..], &["--model-rate", "54000"]].concat());
    for wanted in ["read, checksum", "decode for the crop", "2 threads", "\nbottleneck: "] {
        assert!(out.contains(wanted), "{wanted}: {out}");
    }
    assert!(out.contains("model: 54,000 images/s: "), "{out}");
    let found = desk.json(&[&quick[..], &["--model-rate", "1", "--augment", "none"]].concat());
    let shares = ["read", "decode", "resize"].map(|key| found["stages"][key]["share"].as_f64());
    let sum: f64 = shares.map(Option::unwrap).iter().sum();
    assert!((sum - 1.0).abs() < 1e-9, "{found}");
    assert_eq!(found["loader"].as_array().unwrap().len(), 2);
    let words = ["reading", "decoding", "resizing", "pipeline"];
    assert!(words.contains(&found["bottleneck"].as_str().unwrap()), "{found}");
    assert_eq!(
        (&found["model"]["threads"], &found["model"]["enough_cores"]),
        (&1.into(), &true.into())
    );
    let cache = [&quick[..], &["--cache", "c", "--cache-size", "1GB"]].concat();
    if lacuna_data::planes::HAS_PLANES {
        // Generated images are PNG, which the cache does not take.
        let found = desk.json(&cache);
        assert_eq!(found["stages"]["planes"]["images"], 0, "{found}");
    } else {
        desk.run(74, &cache);
    }
    desk.run(2, &[&quick[..], &["--cache", "c"]].concat());
    desk.run(2, &["data", "bench", "d", "--seconds", "0"]);
    desk.run(2, &["data", "bench", "d", "--model-rate", "none"]);
}

#[test]
fn packing_again_and_over() {
    let desk = Desk::new();
    desk.synthetic("20");
    let before = desk.json(&["data", "index", "d"]);
    let (_, err) = desk.run(
        0,
        &[
            "data",
            "synthetic",
            "d",
            "--n",
            "20",
            "--shard-size",
            "20KiB",
            "--size",
            "8",
            "--channels",
            "3",
            "--seed",
            "3",
        ],
    );
    assert!(err.contains("nothing was done"), "{err}");
    let other = ["data", "synthetic", "d", "--n", "21", "--size", "8"];
    let (_, err) = desk.run(2, &other);
    assert!(err.contains("another data set"), "{err}");
    let after = desk.json(&[&other[..], &["--replace"]].concat());
    assert_eq!(after["n_samples"], 21);
    assert_ne!(after["fingerprint"], before["fingerprint"]);
    desk.run(2, &["data", "synthetic", "e", "--n", "1", "--channels", "2"]);
    desk.run(2, &["data", "synthetic", "e", "--shard-size", "256"]);
}

/// Makes folders of classes with an image each.
fn class_folders(desk: &Desk, root: &str, classes: &[&str]) {
    let dataset = Dataset::open(&desk.path("d")).unwrap();
    for (id, class) in (0..).zip(classes) {
        let folder = desk.path(root).join(class);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("a.png"), dataset.sample(SampleId(id)).unwrap()).unwrap();
    }
}

#[test]
fn labels_are_told_and_numbered_as_elsewhere() {
    let desk = Desk::new();
    desk.synthetic("40");
    class_folders(&desk, "train", &["cats", "dogs", "emus"]);
    class_folders(&desk, "val", &["dogs"]);
    class_folders(&desk, "many", &["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"]);
    class_folders(&desk, "all", &["train", "val"]);
    let told = |args: &[&str]| desk.run(0, &[&["data", "pack"][..], args].concat()).0;
    let out = told(&["train", "t"]);
    assert!(out.contains("\nlabels       3 classes: cats, dogs, emus\n"), "{out}");
    let out = told(&["many", "m"]);
    assert!(out.contains("\nlabels       11 classes: a, b, c, d, e, f, g, h, i, j, …\n"), "{out}");
    let out = told(&["val", "bare"]);
    assert!(out.contains("\nlabels       none: there is one folder only, `dogs`; "), "{out}");
    let bare = desk.json(&["data", "pack", "val", "bare"]);
    assert_eq!(bare["no_labels"], "there is one folder only, `dogs`");

    told(&["val", "v", "--classes", "t"]);
    assert_eq!(class_names(&desk.path("v")), class_names(&desk.path("t")));
    assert_eq!(Dataset::open(&desk.path("v")).unwrap().label(SampleId(0)), Some(1));
    fs::write(desk.path("names.txt"), "dogs\ncats\n").unwrap();
    let list = ["data", "pack", "train", "x", "--classes", "names.txt"];
    let (_, err) = desk.run(2, &list);
    assert!(err.contains("its folder `emus` is not in it"), "{err}");
    fs::write(desk.path("names.txt"), "emus\ndogs\ncats\n").unwrap();
    let packed = desk.json(&list);
    assert_eq!((&packed["classes"][0], &packed["no_labels"]), (&"emus".into(), &Value::Null));

    told(&["many", "m"]);
    let spec = "schema = 1\nname = \"t\"\nbase = \"preset:demo-finetune\"\ndata.shards = \"m\"\n\
                task.classes = 12\ntrain.batch = 8\ntrain.slot_batch = 4\n";
    fs::write(desk.path("task.toml"), spec).unwrap();
    let (out, _) = desk.run(0, &["plan", "task.toml"]);
    assert!(out.contains("`task.classes` = 12, and the data has 11"), "{out}");

    let (_, err) = desk.run(0, &["data", "pack", "all", "a"]);
    let warning = "parts of a data set and no classes: train, val; give one of these folders, such \
                   as `all/train`";
    assert!(err.starts_with("warning: ") && err.contains(warning), "{err}");
    fs::copy(desk.path("train/cats/a.png"), desk.path("train/stray.png")).unwrap();
    let out = told(&["train", "s"]);
    let why = "\nlabels       none: `stray.png` lies beside the class folders\n";
    assert!(out.contains(why), "{out}");
}

#[test]
fn idx_files_by_split() {
    let desk = Desk::new();
    fs::create_dir(desk.path("idx")).unwrap();
    for (split, n) in [("train", 6u8), ("t10k", 3)] {
        let mut images: Vec<u8> = vec![0, 0, 8, 3, 0, 0, 0, n, 0, 0, 0, 4, 0, 0, 0, 4];
        images.extend((0..16 * n).map(|i| i.wrapping_mul(37)));
        let mut labels: Vec<u8> = vec![0, 0, 8, 1, 0, 0, 0, n];
        labels.extend(0..n);
        fs::write(desk.path(&format!("idx/{split}-images-idx3-ubyte")), images).unwrap();
        fs::write(desk.path(&format!("idx/{split}-labels-idx1-ubyte")), labels).unwrap();
    }
    let pack = |split: &str| desk.json(&["data", "pack", "idx", split, "--split", split]);
    assert_eq!(pack("train")["n_samples"], 6);
    assert_eq!(pack("test")["n_samples"], 3);
    let stats = desk.json(&["data", "stats", "test"]);
    assert_eq!((stats["channels"].as_u64(), stats["n_classes"].as_u64()), (Some(1), Some(3)));
    let images = "idx/train-images-idx3-ubyte";
    let wrong = ["data", "pack", images, "x", "--labels", "idx/t10k-labels-idx1-ubyte"];
    let (_, err) = desk.run(74, &wrong);
    assert!(err.contains("has 3 labels for 6 images"), "{err}");
    desk.run(0, &["data", "pack", images, "idx/train-labels-idx1-ubyte", "pair"]);
}

#[test]
fn the_order_has_every_sample_once() {
    let desk = Desk::new();
    desk.synthetic("40");
    desk.spec();
    let mut seen: Vec<u64> = Vec::new();
    for step in ["2", "3"] {
        let order = desk.json(&["data", "show-order", "run.toml", "--step", step]);
        assert_eq!(order["epoch"], 1);
        let slots = order["slots"].as_array().unwrap();
        assert_eq!(slots.len(), 8);
        seen.extend(slots.iter().flat_map(|s| s.as_array().unwrap()).map(|i| i.as_u64().unwrap()));
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 32);
    let place = ["data", "show-order", "run.toml", "--epoch", "1", "--step", "1"];
    let (a, _) = desk.run(0, &place);
    let (b, _) = desk.run(0, &["data", "show-order", "run.toml", "--step", "3"]);
    assert_eq!(a, b);
    desk.run(2, &["data", "show-order", "run.toml", "--epoch", "1", "--step", "2"]);
}

#[test]
fn plans_with_and_without_data() {
    let desk = Desk::new();
    let (out, _) = desk.run(0, &["init", "--preset", "micro", "--data", "d"]);
    assert_eq!(out, "run.toml\n");
    let (_, err) = desk.run(2, &["init"]);
    assert!(err.contains("`run.toml` exists"), "{err}");
    let (out, err) = desk.run(0, &["plan", "run.toml", "--workers", "1..3"]);
    assert!(err.contains("does not exist yet") && out.contains("steps        20"), "{out}{err}");
    assert_eq!(out.lines().skip_while(|line| !line.starts_with("workers")).count(), 4, "{out}");
    desk.synthetic("40");
    let (out, err) = desk.run(0, &["plan", "run.toml"]);
    assert!(out.contains("40 samples in global order, 2 steps an epoch"), "{out}");
    assert_eq!(err, "");
    desk.run(2, &["plan", "run.toml", "--set", "train.batch=64"]);
    let (out, _) = desk.run(0, &["plan", "run.toml", "--effective"]);
    assert!(out.contains("shards = \"d\"") && out.contains("run.toml:"), "{out}");
    let bad = "schema = 1\nname = \"a\"\nbase = \"preset:micro\"\n[data]\nshard = \"d\"\n\
               [train]\nbatch = \"many\"\n";
    fs::write(desk.path("bad.toml"), bad).unwrap();
    let (out, err) = desk.run(2, &["plan", "bad.toml"]);
    assert_eq!(out, "");
    assert!(err.contains("bad.toml:5:1: ") && err.contains("bad.toml:7:"), "{err}");
    desk.run(2, &["plan", "nowhere.toml"]);
}

fn part(desk: &Desk, step: u64) -> PathBuf {
    let name = format!("runs/tiny/ckpt/step-{step:09}/attempt-00000001.{step:04}");
    desk.path(&name).join("part-00000-of-00002.safetensors")
}

#[test]
fn checkpoints_are_listed_and_verified() {
    let desk = Desk::new();
    desk.spec();
    let (out, err) = desk.run(0, &["ckpt", "ls", "run.toml"]);
    assert!(out.lines().count() == 1 && err.contains("has no checkpoints"), "{out}{err}");
    desk.run(74, &["ckpt", "verify", "run.toml"]);
    save(&desk, 10, 2, 0.0);
    save(&desk, 20, 2, 1.0);
    let by_spec = desk.json(&["ckpt", "ls", "run.toml"]);
    assert_eq!(by_spec, desk.json(&["ckpt", "ls", "runs/tiny"]));
    assert_eq!((by_spec[0]["step"].as_u64(), by_spec[1]["step"].as_u64()), (Some(10), Some(20)));
    let (out, _) = desk.run(0, &["ckpt", "show", "runs/tiny", "--step", "10", "--tensors"]);
    assert!(out.contains("epoch 2, 160 samples") && out.contains("param/cls_token"), "{out}");
    let (out, _) = desk.run(0, &["ckpt", "show", "runs/tiny", "--spec"]);
    assert!(out.contains("name = \"tiny\""), "{out}");
    let (_, err) = desk.run(2, &["ckpt", "show", "run.toml", "--step", "11"]);
    assert!(err.contains("it has 10, 20"), "{err}");

    let (out, _) = desk.run(0, &["ckpt", "verify", "run.toml"]);
    assert!(out.starts_with("step 20: verified"), "{out}");
    damage(&part(&desk, 10), 5000);
    let (out, _) = desk.run(74, &["ckpt", "verify", "run.toml", "--all"]);
    assert!(out.contains("step 20: verified"), "{out}");
    let named = "part-00000-of-00002.safetensors is damaged: bytes 4096..8192";
    assert!(out.contains("step 10: damaged, 1 problem") && out.contains(named), "{out}");
    desk.run(0, &["ckpt", "verify", "run.toml", "--step", "20"]);

    fs::remove_file(part(&desk, 20)).unwrap();
    let (out, _) = desk.run(0, &["ckpt", "ls", "run.toml"]);
    assert!(out.contains("20  damaged: ") && out.contains("is missing"), "{out}");
    let (out, _) = desk.run(74, &["ckpt", "verify", "run.toml"]);
    assert!(out.contains("step 20: damaged"), "{out}");
}

#[test]
fn checkpoints_are_pinned_and_removed() {
    let desk = Desk::new();
    desk.spec();
    [10, 20, 30, 40, 50].iter().for_each(|&step| save(&desk, step, 2, step as f32));
    let pin = ["ckpt", "hold", "run.toml@10", "--name", "paper"];
    let (out, _) =
        desk.run(0, &[&pin[..], &["--why", "table 1", "--until", "2999-01-01"]].concat());
    assert_eq!(out, "step 10 is held by paper until 2999-01-01T00:00:00Z: table 1\n");
    assert_eq!(desk.run(0, &["ckpt", "hold", "run.toml"]).0, out);
    let (_, err) = desk.run(2, &pin);
    assert!(err.contains("there is a pin `paper` already"), "{err}");
    desk.run(2, &["ckpt", "hold", "run.toml@11", "--name", "none"]);
    desk.run(2, &["ckpt", "hold", "run.toml@10", "--name", "../x"]);
    desk.run(2, &["ckpt", "hold", "run.toml@10", "--name", "x", "--until", "tomorrow"]);
    desk.run(2, &["ckpt", "hold", "run.toml", "--name", "none", "--release"]);

    let gc = ["ckpt", "gc", "run.toml", "--keep-last", "2"];
    let (out, _) = desk.run(0, &[&gc[..], &["--dry-run"]].concat());
    assert!(out.contains("step 10 stays: held by paper\n"), "{out}");
    assert!(out.contains("step 20 would be removed\n"), "{out}");
    let steps = || -> Vec<u64> {
        let list = desk.json(&["ckpt", "ls", "run.toml"]);
        list.as_array().unwrap().iter().map(|entry| entry["step"].as_u64().unwrap()).collect()
    };
    assert_eq!(steps(), [10, 20, 30, 40, 50], "a dry run removes nothing");
    let (out, _) = desk.run(0, &gc);
    assert!(out.ends_with("2 folders removed\n"), "{out}");
    assert_eq!(steps(), [10, 40, 50]);
    desk.run(0, &["ckpt", "hold", "run.toml", "--name", "paper", "--release"]);
    desk.run(0, &gc);
    assert_eq!(steps(), [40, 50]);
}

#[test]
fn places_are_tried_and_manifests_made_again() {
    let desk = Desk::new();
    desk.spec();
    fs::create_dir(desk.path("runs")).unwrap();
    let (out, _) = desk.run(0, &["ckpt", "doctor", "run.toml"]);
    assert!(out.contains("a name is taken once             yes\n"), "{out}");
    assert!(out.contains("the run wants"), "{out}");
    assert_eq!(fs::read_dir(desk.path("runs")).unwrap().count(), 0, "nothing stays");
    desk.run(0, &["ckpt", "doctor", "runs"]);
    desk.run(2, &["ckpt", "doctor", "nowhere"]);

    save(&desk, 10, 2, 0.0);
    let rebuild = ["ckpt", "rebuild-manifest", "run.toml", "--step", "10"];
    let (_, err) = desk.run(74, &rebuild);
    assert!(err.contains("step 10 has a sound manifest"), "{err}");
    damage(&desk.path("runs/tiny/ckpt/step-000000010/manifest.json"), 100);
    let (_, err) = desk.run(74, &rebuild);
    assert!(err.contains("the run has no run.json"), "{err}");
}

#[test]
fn checkpoints_are_compared() {
    let desk = Desk::new();
    desk.spec();
    save(&desk, 10, 2, 0.0);
    fs::rename(desk.path("runs"), desk.path("old")).unwrap();
    save(&desk, 10, 3, 0.0);
    save(&desk, 20, 1, 1.0);
    let (out, _) = desk.run(0, &["ckpt", "diff", "old/tiny", "run.toml@10"]);
    assert!(out.contains("the same state"), "{out}");
    let (out, _) = desk.run(1, &["ckpt", "diff", "old/tiny@10", "run.toml"]);
    assert!(out.contains("different states") && out.contains("!= param/cls_token"), "{out}");
    assert!(!out.contains("!= buffer/pos_embed"), "{out}");
}

#[test]
fn checkpoints_are_exported() {
    let desk = Desk::new();
    desk.spec();
    save(&desk, 10, 2, 0.0);
    let export = |code: i32, layout: &str, more: &[&str]| {
        let place = ["ckpt", "export", "run.toml", "--to", "out", "--layout", layout];
        desk.run(code, &[&place[..], more].concat())
    };
    let (out, _) = export(0, "mae", &[]);
    assert!(out.contains("out/mae.safetensors") && out.contains("decoder_depth=1"), "{out}");
    let (_, err) = export(2, "mae", &[]);
    assert!(err.contains("--force"), "{err}");
    export(0, "mae", &["--force"]);
    let (out, _) = export(0, "timm", &[]);
    assert!(out.contains("VisionTransformer(img_size=(8, 8), patch_size=2"), "{out}");
    export(0, "mae", &["--encoder-only"]);
    let bytes = |name: &str| fs::read(desk.path("out").join(name)).unwrap();
    assert_eq!(bytes("timm.safetensors"), bytes("mae-encoder.safetensors"));
    assert!(bytes("timm.safetensors").len() < bytes("mae.safetensors").len());
    let (out, _) = export(0, "hf", &["--dtype", "bf16"]);
    assert!(out.contains("from_pretrained(\"out\")"), "{out}");
    let config: Value = serde_json::from_slice(&bytes("config.json")).unwrap();
    assert_eq!(config["hidden_size"], 8);
    export(2, "hf", &["--encoder-only"]);
    let (out, _) = export(0, "hf", &["--force", "--max-shard-bytes", "4000"]);
    let index = "out/model.safetensors.index.json";
    assert!(out.contains(index) && out.contains("\n  blake3:"), "{out}");
    assert!(!desk.path("out/model.safetensors").exists());
    export(2, "hf", &[]);
    export(2, "hf", &["--force", "--max-shard-bytes", "0"]);
    let (out, _) = export(0, "hf", &["--encoder-only", "--force"]);
    assert!(out.contains("ViTMAEModel.from_pretrained(\"out\")"), "{out}");
    assert!(!desk.path(index).exists());
    let bytes_of_part = fs::metadata(part(&desk, 10)).unwrap().len();
    fs::write(part(&desk, 10), vec![0; bytes_of_part as usize]).unwrap();
    let (_, err) = export(74, "mae", &["--force"]);
    assert!(err.contains("is damaged"), "{err}");
}

/// Digests of the parameters of a run's newest checkpoint, by name.
fn params(desk: &Desk, run: &str) -> Vec<(String, String)> {
    let shown = desk.json(&["ckpt", "show", run, "--tensors"]);
    let text = |value: &Value| value.as_str().unwrap().to_string();
    let named = |t: &Value| (text(&t["name"]), text(&t["crc64"]));
    let all = shown["tensors"].as_array().unwrap().iter().map(named);
    all.filter(|(name, _)| name.starts_with("param/")).collect()
}

#[test]
fn weights_are_imported() {
    let desk = Desk::new();
    desk.synthetic("40");
    desk.spec();
    save(&desk, 10, 2, 0.0);
    let spec = fs::read_to_string(desk.path("run.toml")).unwrap();
    let before = params(&desk, "runs/tiny");
    for (i, (layout, more)) in
        [("mae", vec![]), ("hf", vec!["--max-shard-bytes", "4000"])].into_iter().enumerate()
    {
        let (name, out) = (format!("from{i}"), format!("out{i}"));
        let export = ["ckpt", "export", "run.toml", "--to", &out, "--layout", layout];
        desk.run(0, &[&export[..], &more].concat());
        fs::write(desk.path("new.toml"), spec.replace("\"tiny\"", &format!("{name:?}"))).unwrap();
        let (said, notes) = desk.run(0, &["ckpt", "import", &out, "--run", "new.toml"]);
        assert!(said.contains("to train from it:\n  lacuna train new.toml"), "{said}");
        assert!(notes.contains("note: the file was exported from run tiny at step 10"), "{notes}");
        assert_eq!(params(&desk, &format!("runs/{name}")), before);
        let shown = desk.json(&["ckpt", "show", "new.toml"]);
        assert_eq!((shown["step"].as_u64(), shown["updates"].as_u64()), (Some(0), Some(0)));
        assert_eq!(shown["facts"]["samples"], 0);
        let dataset = Dataset::open(&desk.path("d")).unwrap();
        assert_eq!(shown["facts"]["data_fingerprint"], dataset.fingerprint().to_string());
        desk.run(0, &["ckpt", "verify", "new.toml"]);
        let (_, err) = desk.run(2, &["ckpt", "import", &out, "--run", "new.toml"]);
        assert!(err.contains("has a checkpoint at step 0: weights are imported into new"), "{err}");
    }
    let again = ["ckpt", "import", "out0", "--run", "other.toml"];
    let other = spec.replace("\"tiny\"", "\"other\"");
    fs::write(desk.path("other.toml"), &other).unwrap();
    let (_, err) = desk.run(2, &[&again[..], &["--layout", "hf"]].concat());
    let wrong = "the file has the reference's names, with a decoder: leave --layout out";
    assert!(err.contains(wrong), "{err}");
    let (_, err) = desk.run(2, &[&again[..], &["--set", "model.depth=3"]].concat());
    assert!(err.contains("`blocks.2.attn.qkv.weight` is missing"), "{err}");
    fs::write(desk.path("mae.pth"), b"PK").unwrap();
    let (_, err) = desk.run(2, &["ckpt", "import", "mae.pth", "--run", "other.toml"]);
    assert!(err.contains("is a pickle") && err.contains("weights_only=True"), "{err}");
    desk.run(74, &["ckpt", "import", "nowhere", "--run", "other.toml"]);
    // A task begins with the encoder that it names, and takes up no name here.
    let task = ["--set", "task.kind=linear", "--set", "task.classes=4"];
    let (_, err) =
        desk.run(2, &[&["ckpt", "import", "out0", "--run", "other.toml"], &task[..]].concat());
    assert!(err.contains("set `task.encoder = \"out0\"` instead"), "{err}");
    assert!(!desk.path("runs/other").exists(), "nothing was written");
}

/// A person at a terminal is asked before checkpoints go for good; nobody else is.
#[test]
fn a_person_at_a_terminal_is_asked() {
    if Command::new("script").arg("--version").output().is_err() {
        println!("skipped: `script` of util-linux makes the terminal, and it is not there");
        return;
    }
    let desk = Desk::new();
    desk.spec();
    for step in [5, 10] {
        save(&desk, step, 1, step as f32);
    }
    let steps = || -> Vec<u64> {
        let list = desk.json(&["ckpt", "ls", "run.toml"]);
        list.as_array().unwrap().iter().map(|entry| entry["step"].as_u64().unwrap()).collect()
    };
    let at_terminal = |answer: &str, more: &str| {
        let gc = format!("{} ckpt gc run.toml --keep-last 1 {more}", env!("CARGO_BIN_EXE_lacuna"));
        let mut child = Command::new("script")
            .args(["-qec", &gc, "/dev/null"])
            .current_dir(desk.path("."))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(answer.as_bytes()).unwrap();
        let done = child.wait_with_output().unwrap();
        (done.status.code(), String::from_utf8_lossy(&done.stdout).into_owned())
    };
    let question = "remove 1 checkpoint of run.toml for good (steps 5)? [y/N]";
    let (code, said) = at_terminal("n\n", "");
    assert!(code == Some(1) && said.contains(question), "{code:?} {said}");
    assert_eq!(steps(), [5, 10], "no is no");
    let (code, said) = at_terminal("y\n", "");
    assert!(code == Some(0) && said.contains(question), "{code:?} {said}");
    assert_eq!(steps(), [10]);
    save(&desk, 15, 1, 15.0);
    let (code, said) = at_terminal("", "--yes");
    assert!(code == Some(0) && !said.contains("[y/N]"), "{code:?} {said}");
    assert_eq!(steps(), [15]);
    save(&desk, 20, 1, 20.0);
    desk.run(0, &["ckpt", "gc", "run.toml", "--keep-last", "1"]);
    assert_eq!(steps(), [20], "a script is not asked");
}
