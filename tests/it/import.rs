//! A run that begins with imported weights, on real processes.

use std::path::Path;

use lacuna_checkpoint::catalog;
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::manifest::Manifest;
use lacuna_recipe::init;
use lacuna_recipe::model::ModelConfig;
use lacuna_tests::{Fixture, said};

use crate::fixture;

const STEPS: u64 = 30;

/// Trains a run to its end, or imports into it.
fn lacuna(fixture: &Fixture, args: &[&str]) {
    let (code, out, err) = said(&fixture.run(args));
    assert_eq!(code, 0, "lacuna {args:?}\n{out}\n{err}");
}

/// The usable checkpoints of a run, the newest last.
fn checkpoints(fixture: &Fixture, run: &str) -> Vec<Manifest> {
    let dir = RunDir::new(fixture.path("ckpt"), run.parse().unwrap());
    let entries = catalog::list(&dir).unwrap();
    entries.iter().map(|entry| entry.good().unwrap().clone()).collect()
}

/// Writes the weights that a seed draws for the micro model, under our names.
fn write_drawn(path: &Path, seed: u64) {
    let mut json = String::from("{\"__metadata__\":{\"format\":\"pt\"}");
    let mut data: Vec<u8> = Vec::new();
    for param in ModelConfig::preset("micro").unwrap().params() {
        let mut values = vec![0.0; param.numel()];
        init::fill(&param, seed, &mut values);
        let start = data.len();
        data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        json += &format!(
            ",{:?}:{{\"dtype\":\"F32\",\"shape\":{:?},\"data_offsets\":[{start},{}]}}",
            param.name,
            param.shape,
            data.len()
        );
    }
    json.push('}');
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend(json.as_bytes());
    file.extend(data);
    std::fs::write(path, file).unwrap();
}

#[test]
fn imported_weights_are_what_a_run_starts_from() {
    let fixture = fixture();
    let spec = |name: &str| {
        let keep_all = [("checkpoint.keep.last", "9")];
        fixture.spec(name, STEPS, &keep_all).to_str().unwrap().to_string()
    };
    // Weights that the seed would have drawn: the run must be the one that began from its seed.
    lacuna(&fixture, &["train", &spec("seeded"), "--workers", "1"]);
    let seeded = checkpoints(&fixture, "seeded").pop().unwrap();
    write_drawn(&fixture.path("drawn.safetensors"), seeded.state.facts.seed);
    lacuna(&fixture, &["ckpt", "import", "drawn.safetensors", "--run", &spec("drawn")]);
    lacuna(&fixture, &["train", &spec("drawn"), "--workers", "2"]);
    let drawn = checkpoints(&fixture, "drawn");
    assert_eq!(drawn.last().unwrap().state_digest, seeded.state_digest);
    let parent = drawn[1].parent.as_ref().expect("it grew from the import");
    assert_eq!((parent.step, &parent.manifest), (0, &drawn[0].seal));

    // Trained weights: the start is theirs, and the end is another one.
    let out = ["--layout", "hf", "--to", "hf"];
    lacuna(&fixture, &[&["ckpt", "export", "ckpt/seeded"][..], &out].concat());
    lacuna(&fixture, &["ckpt", "import", "hf", "--run", &spec("further")]);
    lacuna(&fixture, &["train", &spec("further"), "--workers", "1"]);
    let further = checkpoints(&fixture, "further");
    for (name, tensor) in further[0].tensors.iter().filter(|(name, _)| name.starts_with("param/")) {
        assert_eq!(tensor.crc64, seeded.tensors[name].crc64, "{name}");
    }
    let end = further.last().unwrap();
    assert_eq!(end.step, STEPS);
    assert_ne!(end.state_digest, seeded.state_digest);
}
