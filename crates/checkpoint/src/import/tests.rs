use std::path::Path;
use std::sync::Arc;

use lacuna_recipe::keymap::{self, HfNames, Mapped, Part};
use lacuna_types::{CoordEpoch, Step};
use serde_json::json;

use super::*;
use crate::chain;
use crate::commit::claim;
use crate::export::{ExportDtype, ExportLayout, ExportOptions, MAX_SHARD_BYTES, export};
use crate::header::{HeaderTensor, render};
use crate::layout::RunDir;
use crate::load::{Expected, load_newest};
use crate::testing::{Sample, attempt, manifest, micro, run_dir, sample, tree};

mod files;
mod models;
mod starts;

const SEED: u64 = 7;

fn model() -> ModelConfig {
    ModelConfig::preset("micro").unwrap()
}

/// A tensor of a file to be written.
#[derive(Clone)]
struct Wire {
    name: String,
    dtype: &'static str,
    shape: Vec<u64>,
    bytes: Vec<u8>,
}

impl Wire {
    fn f32(name: &str, shape: &[u64], values: &[f32]) -> Self {
        let bytes = bytemuck::cast_slice(values).to_vec();
        Wire { name: name.to_string(), dtype: "F32", shape: shape.to_vec(), bytes }
    }

    fn zeros(name: &str, shape: &[u64]) -> Self {
        let n = shape.iter().product::<u64>() as usize;
        Wire::f32(name, shape, &vec![0.0; n])
    }
}

fn write(path: &Path, tensors: &[Wire]) {
    let head = |t: &Wire| HeaderTensor {
        name: t.name.clone(),
        dtype: t.dtype,
        shape: t.shape.clone(),
        bytes: t.bytes.len() as u64,
    };
    let heads: Vec<HeaderTensor> = tensors.iter().map(head).collect();
    let mut bytes = render(&[("format", "pt")], &heads);
    tensors.iter().for_each(|t| bytes.extend(&t.bytes));
    std::fs::write(path, bytes).unwrap();
}

/// A state with values like those of a model, all of them different.
fn state() -> Sample {
    let mut state = micro(4);
    let n = state.sections[0].len();
    state.sections[0] = (0..n).map(|i| (i as f32 * 0.613).sin() * 0.3).collect();
    state
}

/// The parameters of `state` and both tables under the names that `rename` gives them.
fn renamed(state: &Sample, rename: impl Fn(&str) -> Vec<Mapped>) -> Vec<Wire> {
    let config = state.config.as_ref().unwrap();
    let mut out: Vec<Wire> = Vec::new();
    let mut add = |ours: &str, shape: &[u64], values: &[f32]| {
        let row = values.len() / shape[0] as usize;
        for target in rename(ours) {
            let rows = target.part.rows(shape[0] as usize);
            let shape: Vec<u64> = [&[rows.len() as u64], &shape[1..]].concat();
            out.push(Wire::f32(&target.name, &shape, &values[rows.start * row..rows.end * row]));
        }
    };
    for (block, param) in state.layout.params().iter().enumerate() {
        let shape: Vec<u64> = param.shape.iter().map(|&n| n as u64).collect();
        add(&param.name, &shape, &state.sections[0][state.layout.range(block)]);
    }
    for (name, width) in [("pos_embed", config.width), ("decoder_pos_embed", config.decoder_width)]
    {
        let table = sincos_2d(width as usize, config.grid());
        add(name, &[1, config.n_patches() as u64 + 1, u64::from(width)], &table);
    }
    out
}

fn whole(name: &str) -> Vec<Mapped> {
    vec![Mapped { name: name.to_string(), part: Part::Whole }]
}

fn encoder(name: &str) -> Vec<Mapped> {
    keymap::timm(name).map_or(Vec::new(), |name| whole(&name))
}

fn v4(name: &str) -> Vec<Mapped> {
    keymap::hf(name, HfNames::V4).unwrap()
}

fn v5(name: &str) -> Vec<Mapped> {
    keymap::hf(name, HfNames::V5).unwrap()
}

/// Names as transformers 5.23 writes them when it saves.
fn resaved(name: &str) -> Vec<Mapped> {
    let rename = |target: Mapped| {
        let name = target.name.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer.");
        Mapped { name, ..target }
    };
    v4(name).into_iter().map(rename).collect()
}

fn read_all(path: &Path) -> Result<Imported, ImportError> {
    import(&Weights::open(path)?, &model(), SEED, Wanted::Any)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Values of the encoder as `state` has them, of the decoder as the seed draws them.
fn with_drawn_decoder(state: &Sample) -> Vec<f32> {
    let mut want = state.sections[0].clone();
    for (block, param) in state.layout.params().iter().enumerate() {
        if keymap::timm(&param.name).is_none() {
            init::fill(param, SEED, &mut want[state.layout.range(block)]);
        }
    }
    want
}

#[test]
fn every_form_gives_the_same_bits() {
    type Rename = fn(&str) -> Vec<Mapped>;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    let state = state();
    let forms: [(Rename, Form, usize); 4] = [
        (whole, Form::Mae, 48),
        (v4, Form::Hf4, 60),
        (v5, Form::Hf5, 60),
        (resaved, Form::HfResaved, 60),
    ];
    for (rename, form, n_taken) in forms {
        write(&path, &renamed(&state, rename));
        let found = read_all(&path).unwrap();
        assert_eq!((found.form, found.n_taken), (form, n_taken));
        assert_eq!(bits(&found.params), bits(&state.sections[0]), "{form:?}");
        assert_eq!(found.notices, [HEADS]);
    }
}

#[test]
fn a_missing_decoder_is_drawn_as_a_run_would() {
    type Rename = fn(&str) -> Vec<Mapped>;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    let state = state();
    let forms: [(Rename, Form); 2] = [
        (encoder, Form::Timm),
        (|name| keymap::hf_encoder(name).unwrap_or_default(), Form::HfEncoder),
    ];
    for (rename, form) in forms {
        write(&path, &renamed(&state, rename));
        let found = read_all(&path).unwrap();
        assert_eq!(found.form, form);
        assert_eq!(bits(&found.params), bits(&with_drawn_decoder(&state)), "{form:?}");
        assert_eq!(
            found.notices[0],
            "the file has no decoder: its 19 tensors are drawn from seed 7, as in a fresh run"
        );
    }
    // Trap 2: timm's name for the last norm of a model that averages, and its classifier.
    let mut tensors = renamed(&state, encoder);
    for tensor in &mut tensors {
        if let Some(leaf) = tensor.name.strip_prefix("norm.") {
            tensor.name = format!("fc_norm.{leaf}");
        }
    }
    tensors.push(Wire::zeros("head.weight", &[10, 8]));
    write(&path, &tensors);
    let found = read_all(&path).unwrap();
    assert_eq!(bits(&found.params), bits(&with_drawn_decoder(&state)));
    assert_eq!(found.notices[0], "left out, no part of this model: `head.weight`");
}

#[test]
fn half_precision_is_widened() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    let mut state = state();
    // Numbers that both half types have.
    state.sections[0].iter_mut().for_each(|x| *x = (*x * 64.0).round() / 64.0);
    let half = |x: f32| -> u16 {
        let bits = x.to_bits();
        let sign = (bits >> 16 & 0x8000) as u16;
        match bits >> 23 & 0xff {
            0 => sign,
            e => sign | ((e - 112) << 10) as u16 | (bits >> 13 & 0x3ff) as u16,
        }
    };
    for dtype in ["BF16", "F16"] {
        let mut tensors = renamed(&state, v4);
        for tensor in &mut tensors {
            let values: &[f32] = bytemuck::cast_slice(&tensor.bytes);
            let narrow = |x: &f32| match dtype {
                "BF16" => (x.to_bits() >> 16) as u16,
                // A table's smallest entries would be subnormal: near enough to zero.
                _ if x.abs() < 1e-4 => 0,
                _ => half(*x),
            };
            let halves: Vec<u16> = values.iter().map(narrow).collect();
            (tensor.dtype, tensor.bytes) = (dtype, bytemuck::cast_slice(&halves).to_vec());
        }
        write(&path, &tensors);
        let found = read_all(&path).unwrap();
        assert_eq!(found.params, state.sections[0], "{dtype}");
        assert_eq!(found.notices.len(), 1, "tables are compared less closely: {:?}", found.notices);
    }
}

const HEADS: &str = "numbers of attention heads are not in the file: 2 and 2 of the spec are taken";

/// Trap 5: a position table is compared and never taken.
#[test]
fn tables_are_computed_whatever_the_file_has() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    let state = state();
    let check = |change: &dyn Fn(&mut Wire), want: &[&str]| {
        let mut tensors = renamed(&state, whole);
        tensors.iter_mut().filter(|t| t.name == "pos_embed").for_each(change);
        write(&path, &tensors);
        let found = read_all(&path).unwrap();
        assert_eq!(bits(&found.params), bits(&state.sections[0]));
        assert_eq!(found.notices, want);
    };
    check(
        &|table| *table = Wire::zeros("pos_embed", &[1, 26, 8]),
        &[
            "`pos_embed` is for 25 patches, this model has 4 x 4: `pos_embed` is computed for them \
             and not imported",
            HEADS,
        ],
    );
    check(
        &|table| *table = Wire::zeros("pos_embed", &[1, 17, 8]),
        &[
            "`pos_embed` differs by up to 1.000 from the sine-cosine table for 4 x 4 patches: \
             `pos_embed` is computed and not imported, so the model gives other features",
            HEADS,
        ],
    );
    check(
        &|table| {
            // A unit in the last place is another library's sine.
            let values: &mut [f32] = bytemuck::cast_slice_mut(&mut table.bytes);
            values.iter_mut().for_each(|x| *x = f32::from_bits(x.to_bits() + 1));
        },
        &[HEADS],
    );
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    let mut state = state();
    let block = state.layout.find("norm.bias").unwrap();
    let at = state.layout.range(block).start;
    state.sections[0][at] = f32::NAN;
    state.sections[0][0] = f32::INFINITY;
    write(&path, &renamed(&state, v4));
    assert_eq!(
        chain(&read_all(&path).unwrap_err()),
        "these tensors have numbers that are not finite: \
         `vit.encoder.layer.0.attention.output.dense.bias`, `vit.layernorm.bias`"
    );
}

#[test]
fn what_tensors_do_not_show_is_compared_with_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let state = state();
    write(&folder.path().join("model.safetensors"), &renamed(&state, v4));
    let with = |config: Value| {
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        read_all(folder.path())
    };
    let fine = json!({ "model_type": "vit_mae", "num_attention_heads": 2, "layer_norm_eps": 1e-6,
                       "decoder_num_attention_heads": 2, "hidden_act": "gelu" });
    assert_eq!(with(fine).unwrap().notices, Vec::<String>::new());
    let near = json!({ "model_type": "vit_mae", "layer_norm_eps": 1e-12, "norm_pix_loss": false });
    assert_eq!(
        with(near).unwrap().notices,
        [
            "config.json has layer_norm_eps 1e-12, this model 1e-6: features differ a little",
            "config.json has norm_pix_loss false, this model true: the decoder was trained for \
             another target",
        ]
    );
    let other = json!({ "model_type": "vit_mae", "num_attention_heads": 4, "hidden_act": "relu",
                        "decoder_num_attention_heads": 8, "qkv_bias": true });
    assert_eq!(
        chain(&with(other).unwrap_err()),
        "the file does not fit the model of the spec:\n  \
         config.json has num_attention_heads 4, this model 2\n  \
         config.json has decoder_num_attention_heads 8, this model 2\n  \
         config.json has hidden_act \"relu\", this model \"gelu\""
    );
}
