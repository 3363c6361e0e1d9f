//! Imports: the parameters of another library's file as the first checkpoint of a run.
//!
//! Files are safetensors, one or several with an index; nothing in them is believed. Which tensor
//! goes where is decided by [`lacuna_recipe::keymap::import`]. The result is a checkpoint at step 0
//! like any other, and training starts from it.

mod model;
mod source;
mod start;
mod tensor_file;
mod widen;

use std::path::PathBuf;

use lacuna_recipe::init;
use lacuna_recipe::keymap::import::{Foreign, Form, MapError, Plan, Table, Wanted, plan};
use lacuna_recipe::model::{LAYER_NORM_EPS, ModelConfig};
use lacuna_recipe::pos_embed::sincos_2d;
use lacuna_recipe::state::Layout;
use serde_json::Value;

use crate::disk::FsError;

pub(crate) use model::{ABOUT_KEY, About};
pub use model::{DescribeError, Described, Given, ModelWeights, describe, read_model};
pub use source::Weights;
pub use start::{Start, StartError, check_fresh, commit_start};

/// Bytes of a file in memory at a time.
const PIECE_BYTES: usize = 1 << 20;

/// How far an entry of a position table may be from the computed one: libraries compute it in f32
/// or f64, with sines of their own.
const TABLE_TOLERANCE: f32 = 1e-5;
/// The same for tables in half precision, whose entries lie in -1..1.
const HALF_TABLE_TOLERANCE: f32 = 1.0 / 256.0;

/// What a file gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Imported {
    /// All parameters, laid out as [`Layout`] does.
    pub params: Vec<f32>,
    /// What the file was recognised as.
    pub form: Form,
    /// Tensors of the file whose elements were taken.
    pub n_taken: usize,
    /// What a person should know: what was left out, computed or drawn instead.
    pub notices: Vec<String>,
}

/// An import that was not made.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The file is a pickle, and reading one runs its code.
    #[error(
        "`{}` is a pickle, which is not read because that would run what is in it. This line of \
         Python converts it:\n  {}",
        path.display(), convert_line(path)
    )]
    Pickle {
        /// Which file.
        path: PathBuf,
    },
    /// A directory has nothing to import.
    #[error("`{}` has no .safetensors file", path.display())]
    Nothing {
        /// Which directory.
        path: PathBuf,
    },
    /// A directory has more than one file to start from.
    #[error("`{}` has {}: name the file to import", path.display(), names.join(" and "))]
    Several {
        /// Which directory.
        path: PathBuf,
        /// The files.
        names: Vec<String>,
    },
    /// The file is not what its name says.
    #[error("`{}` is not a sound safetensors file: {problem}", path.display())]
    Unsound {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A document is not JSON, or has a key twice.
    #[error("`{}` cannot be understood", path.display())]
    Json {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// The index and its files do not belong together.
    #[error("the index `{}` is not sound: {problem}", path.display())]
    Index {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The tensors are not those of the model.
    #[error("the file does not fit the model of the spec:\n  {}", differences.join("\n  "))]
    Mismatch {
        /// Every difference.
        differences: Vec<String>,
    },
    /// The keys are not understood, or not of the layout asked for.
    #[error("the file cannot be imported")]
    Map(#[source] MapError),
    /// A model cannot be trained from such numbers.
    #[error("these tensors have numbers that are not finite: {}", tensors.join(", "))]
    NotFinite {
        /// Keys in the file.
        tensors: Vec<String>,
    },
    /// A file could not be read.
    #[error("the file cannot be imported")]
    Fs(#[from] FsError),
}

/// Returns the line that converts a pickle, checkpoints of the reference with their settings too.
fn convert_line(path: &std::path::Path) -> String {
    let from = path.display().to_string();
    let to = path.with_extension("safetensors").display().to_string();
    format!(
        "python3 -c 'import argparse, torch, safetensors.torch as s; \
         torch.serialization.add_safe_globals([argparse.Namespace]); \
         d = torch.load({from:?}, map_location=\"cpu\", weights_only=True); \
         d = d.get(\"model\", d); \
         s.save_file({{k: v.contiguous().clone() for k, v in d.items()}}, {to:?}, \
         metadata={{\"format\": \"pt\"}})'"
    )
}

/// Reads the parameters of `config` out of `weights`; a decoder that is not there is drawn from
/// `seed`, as a run would.
///
/// Holds the parameters and one piece of a file in memory.
pub fn import(
    weights: &Weights,
    config: &ModelConfig,
    seed: u64,
    wanted: Wanted,
) -> Result<Imported, ImportError> {
    let plan = fit(weights, config, wanted)?;
    let layout = Layout::new(config.params());
    let mut params = take(weights, &plan, &layout)?;
    for &block in &plan.seeded {
        init::fill(&layout.params()[block], seed, &mut params[layout.range(block)]);
    }
    let notices = notices(weights, config, seed, &plan)?;
    Ok(Imported { params, form: plan.form, n_taken: plan.takes.len(), notices })
}

/// Reads what the plan takes; parameters that it does not take are zero.
fn take(weights: &Weights, plan: &Plan, layout: &Layout) -> Result<Vec<f32>, ImportError> {
    let mut params: Vec<f32> = vec![0.0; layout.numel()];
    let mut odd: Vec<String> = Vec::new();
    for take in &plan.takes {
        let start = layout.range(take.block).start;
        let out = &mut params[start + take.elements.start..start + take.elements.end];
        read(weights, &take.source, out)?;
        if !out.iter().all(|x| x.is_finite()) {
            odd.push(format!("`{}`", take.source.escape_debug()));
        }
    }
    if !odd.is_empty() {
        return Err(ImportError::NotFinite { tensors: odd });
    }
    Ok(params)
}

/// Finds every tensor's place, and compares what `config.json` says that tensors do not show.
fn fit(weights: &Weights, config: &ModelConfig, wanted: Wanted) -> Result<Plan, ImportError> {
    let tensors: Vec<Foreign<'_>> = weights
        .tensors()
        .map(|(name, t)| Foreign { name, dtype: &t.dtype, shape: &t.shape })
        .collect();
    let planned = plan(config, &tensors, wanted);
    let mut differences = match &planned {
        Err(MapError::Differences { differences }) => differences.clone(),
        _ => Vec::new(),
    };
    let has_decoder = planned.as_ref().map_or(true, |plan| plan.seeded.is_empty());
    differences.extend(config_differences(weights, config, has_decoder));
    match planned {
        Ok(plan) if differences.is_empty() => Ok(plan),
        Ok(_) | Err(MapError::Differences { .. }) => Err(ImportError::Mismatch { differences }),
        Err(error) => Err(ImportError::Map(error)),
    }
}

/// Returns `config.json` if it is one of the models whose names are understood.
fn model_config(weights: &Weights) -> Option<&Value> {
    let (_, config) = weights.config.as_ref()?;
    config.get("model_type").is_some().then_some(config)
}

fn config_differences(weights: &Weights, ours: &ModelConfig, has_decoder: bool) -> Vec<String> {
    let Some(theirs) = model_config(weights) else { return Vec::new() };
    let decoder_heads = has_decoder.then(|| ours.decoder_heads.into());
    let rows: [(&str, Option<Value>); 4] = [
        ("num_attention_heads", Some(ours.heads.into())),
        ("decoder_num_attention_heads", decoder_heads),
        ("hidden_act", Some("gelu".into())),
        ("qkv_bias", Some(true.into())),
    ];
    let compare = |(key, want): (&str, Option<Value>)| {
        let (found, want) = (theirs.get(key)?, want?);
        (*found != want).then(|| format!("config.json has {key} {found}, this model {want}"))
    };
    rows.into_iter().filter_map(compare).collect()
}

/// Reads a tensor and widens its elements.
fn read(weights: &Weights, name: &str, out: &mut [f32]) -> Result<(), ImportError> {
    let (file, tensor) = weights.place(name);
    let width = tensor_file::width(&tensor.dtype).expect("the plan takes known types only");
    let mut buffer: Vec<u8> = vec![0; PIECE_BYTES.min(out.len() * width as usize)];
    let mut at = tensor.bytes.start;
    for piece in out.chunks_mut(PIECE_BYTES / width as usize) {
        let bytes = &mut buffer[..piece.len() * width as usize];
        file.read(at, bytes)?;
        widen::widen(&tensor.dtype, bytes, piece);
        at += bytes.len() as u64;
    }
    Ok(())
}

fn notices(
    weights: &Weights,
    config: &ModelConfig,
    seed: u64,
    plan: &Plan,
) -> Result<Vec<String>, ImportError> {
    let mut out: Vec<String> = Vec::new();
    if let (Some(run), Some(step)) = (weights.about("lacuna.run"), weights.about("lacuna.step")) {
        let (run, step) = (run.escape_debug(), step.escape_debug());
        out.push(format!("the file was exported from run {run} at step {step}"));
    }
    if !plan.ignored.is_empty() {
        let names: Vec<String> =
            plan.ignored.iter().map(|name| format!("`{}`", name.escape_debug())).collect();
        out.push(format!("left out, no part of this model: {}", names.join(", ")));
    }
    if !plan.seeded.is_empty() {
        let n = plan.seeded.len();
        out.push(format!(
            "the file has no decoder: its {n} tensors are drawn from seed {seed}, as in a fresh run"
        ));
    }
    if weights.has_pooled_norm() {
        out.push(
            "`fc_norm` is taken as the encoder's last norm: it has learned to read the mean of the \
             patches, and comes before single tokens here"
                .to_string(),
        );
    }
    for table in &plan.tables {
        out.extend(table_notice(weights, config, table)?);
    }
    match model_config(weights) {
        Some(theirs) => out.extend(config_notices(theirs, config)),
        None => out.push(format!(
            "numbers of attention heads are not in the file: {} and {} of the spec are taken",
            config.heads, config.decoder_heads
        )),
    }
    Ok(out)
}

/// Compares a position table of the file with ours, which is what the run computes with.
fn table_notice(
    weights: &Weights,
    config: &ModelConfig,
    table: &Table,
) -> Result<Option<String>, ImportError> {
    let (key, ours) = (table.source.escape_debug(), table.ours);
    let [rows, columns] = config.grid();
    if !table.fits {
        let found = table.rows.saturating_sub(1);
        return Ok(Some(format!(
            "`{key}` is for {found} patches, this model has {rows} x {columns}: `{ours}` is \
             computed for them and not imported"
        )));
    }
    let (_, most, tolerance) = table_values(weights, config, table)?;
    Ok((most > tolerance).then(|| {
        format!(
            "`{key}` differs by up to {most:.3} from the sine-cosine table for {rows} x {columns} \
             patches: `{ours}` is computed and not imported, so the model gives other features"
        )
    }))
}

/// Reads a position table that fits; says how far an entry is from the sine-cosine table at most,
/// and how far it may be.
fn table_values(
    weights: &Weights,
    config: &ModelConfig,
    table: &Table,
) -> Result<(Vec<f32>, f32, f32), ImportError> {
    let want = sincos_2d(table.width, config.grid());
    let mut found: Vec<f32> = vec![0.0; want.len()];
    read(weights, &table.source, &mut found)?;
    // A NaN is as far away as can be.
    let far = |(a, b): (&f32, &f32)| if a.is_nan() { f32::INFINITY } else { (a - b).abs() };
    let most = found.iter().zip(&want).map(far).fold(0.0, f32::max);
    let is_whole = weights.place(&table.source).1.dtype == "F32";
    let tolerance = if is_whole { TABLE_TOLERANCE } else { HALF_TABLE_TOLERANCE };
    Ok((found, most, tolerance))
}

fn config_notices(theirs: &Value, ours: &ModelConfig) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let eps = theirs.get("layer_norm_eps").and_then(Value::as_f64);
    if let Some(eps) = eps.filter(|eps| *eps != LAYER_NORM_EPS) {
        out.push(format!(
            "config.json has layer_norm_eps {eps:e}, this model {LAYER_NORM_EPS:e}: features \
             differ a little"
        ));
    }
    let norm = theirs.get("norm_pix_loss").and_then(Value::as_bool);
    if let Some(norm) = norm.filter(|norm| *norm != ours.norm_pix_loss) {
        out.push(format!(
            "config.json has norm_pix_loss {norm}, this model {}: the decoder was trained for \
             another target",
            ours.norm_pix_loss
        ));
    }
    out
}

#[cfg(test)]
mod tests;
