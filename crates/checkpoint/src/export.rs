//! Exports: a checkpoint's parameters as files that other libraries load.
//!
//! Tensors are streamed in pieces out of verified blocks. Position tables are computed, never
//! copied. Files appear under their name when they are whole, and those of a folder in an order in
//! which no moment shows a mixture of two exports.

mod hf;
mod swap;
mod weights;

use std::ops::Range;
use std::path::{Path, PathBuf};

use lacuna_recipe::keymap::{self, AVERAGE, HfNames};
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::pos_embed::sincos_2d;
use lacuna_recipe::state::{Layout, Section};

use self::swap::Staged;
use self::weights::Writer;
use crate::disk::{self, FsError};
use crate::import::About;
use crate::layout::RunDir;
use crate::load::{Expected, difference, differences};
use crate::manifest::{Manifest, TensorEntry};
use crate::read::{PlanError, ReadError};

pub use hf::MAX_SHARD_BYTES;
pub(crate) use hf::{INDEX as HF_INDEX, SINGLE as HF_SINGLE};

/// Which library a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportLayout {
    /// One file with every tensor under the reference's names, both position tables included.
    Mae,
    /// One file with the encoder alone, as timm's `vit_*.mae` models load it.
    Timm,
    /// A directory that `ViTMAEForPreTraining.from_pretrained` loads.
    Hf,
    /// A directory that `ViTMAEModel.from_pretrained` loads: the encoder alone.
    HfEncoder,
    /// One file with every parameter of a fine-tuned model, whose names are timm's: the encoder,
    /// its position table, the norm behind the mean (`fc_norm`) and the head.
    Classifier,
    /// The same of the average of its weights that the run keeps, under the same names.
    ClassifierAverage,
}

impl ExportLayout {
    fn is_hf(self) -> bool {
        matches!(self, ExportLayout::Hf | ExportLayout::HfEncoder)
    }
}

/// Element type of the exported tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportDtype {
    /// As trained.
    F32,
    /// Rounded to nearest, ties to even.
    Bf16,
}

impl ExportDtype {
    fn name(self) -> &'static str {
        match self {
            ExportDtype::F32 => "F32",
            ExportDtype::Bf16 => "BF16",
        }
    }

    fn bytes(self) -> u64 {
        match self {
            ExportDtype::F32 => 4,
            ExportDtype::Bf16 => 2,
        }
    }
}

/// How to export.
#[derive(Clone, Debug, PartialEq)]
pub struct ExportOptions {
    /// For which library.
    pub layout: ExportLayout,
    /// Element type.
    pub dtype: ExportDtype,
    /// Most bytes of tensors in a file of a Hugging Face directory; a larger tensor has a file of
    /// its own. [`MAX_SHARD_BYTES`] but where asked for.
    pub max_shard_bytes: u64,
    /// Mean of each channel in training, for the image processor.
    pub image_mean: Vec<f64>,
    /// Deviation of each channel in training, for the image processor.
    pub image_std: Vec<f64>,
    /// Names of a classifier's classes, in the order of its outputs; none where they are unknown.
    pub classes: Vec<String>,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// The files.
    pub files: Vec<PathBuf>,
    /// Tensors in the weights files.
    pub n_tensors: usize,
    /// The weights files, each with its BLAKE3.
    pub weights: Vec<(PathBuf, String)>,
}

/// An export that was not made.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// Hugging Face's model cannot be built for these images.
    #[error(
        "images of {height}x{width} cannot be exported for Hugging Face: its ViTMAE accepts square \
         images only; use the layout `mae` or `timm`"
    )]
    NotSquare {
        /// Rows of pixels.
        height: u32,
        /// Columns of pixels.
        width: u32,
    },
    /// The checkpoint is of another model.
    #[error("checkpoint step {step} is not of this model:\n  {}", differences.join("\n  "))]
    Mismatch {
        /// Which checkpoint.
        step: u64,
        /// Every difference.
        differences: Vec<String>,
    },
    /// The checkpoint lacks a tensor.
    #[error("checkpoint cannot be exported")]
    Plan(#[from] PlanError),
    /// The checkpoint is damaged.
    #[error("checkpoint cannot be exported")]
    Read(#[from] ReadError),
    /// The files could not be written.
    #[error("export was not written")]
    Fs(#[from] FsError),
}

/// One tensor of the export: which rows of which of our tensors.
struct Item {
    name: String,
    ours: String,
    shape: Vec<u64>,
    elements: Range<u64>,
    source: Source,
}

impl Item {
    fn numel(&self) -> u64 {
        self.elements.end - self.elements.start
    }
}

enum Source {
    Checkpoint,
    Table(Vec<f32>),
}

/// Lists what is missing of the tensors that `items` take. There may be others: an objective of
/// somebody else's has its own behind the same encoder.
fn encoder_differences(manifest: &Manifest, config: &ModelConfig, items: &[Item]) -> Vec<String> {
    let params = config.params();
    let taken = params.iter().filter(|param| items.iter().any(|item| item.ours == param.name));
    taken.filter_map(|param| difference(manifest, Section::Param, param)).collect()
}

/// Exports the parameters of a checkpoint to `out`: a file, or a directory for Hugging Face.
///
/// Whatever fails before the new files are whole leaves an earlier export as it was.
pub fn export(
    dir: &RunDir,
    manifest: &Manifest,
    config: &ModelConfig,
    options: &ExportOptions,
    out: &Path,
) -> Result<Exported, ExportError> {
    let [height, width] = config.img_size;
    if options.layout.is_hf() && height != width {
        return Err(ExportError::NotSquare { height, width });
    }
    let items = match options.layout {
        ExportLayout::Classifier => every_parameter(manifest, false),
        ExportLayout::ClassifierAverage => every_parameter(manifest, true),
        layout => plan_items(config, layout),
    };
    let differences = match options.layout {
        ExportLayout::Classifier | ExportLayout::ClassifierAverage => Vec::new(),
        ExportLayout::Timm | ExportLayout::HfEncoder => {
            encoder_differences(manifest, config, &items)
        }
        _ => differences(manifest, &Expected::tensors(&Layout::new(config.params()))),
    };
    if !differences.is_empty() {
        return Err(ExportError::Mismatch { step: manifest.step, differences });
    }
    let n_tensors = items.len();
    let about = About {
        model: config.clone(),
        mean: options.image_mean.clone(),
        std: options.image_std.clone(),
    };
    let mut writer = Writer::new(dir, manifest, options, &about);
    if !options.layout.is_hf() {
        let parent = out.parent().unwrap_or(Path::new(""));
        if !parent.as_os_str().is_empty() {
            disk::create_dirs(parent, parent)?;
        }
        let (partial, digest) = writer.write(&items, out)?;
        partial.replace()?;
        let files = vec![out.to_path_buf()];
        return Ok(Exported { files, n_tensors, weights: vec![(out.to_path_buf(), digest)] });
    }
    disk::create_dirs(out, out)?;
    let mut staged = Staged::new(out)?;
    for (name, text) in hf::documents(config, options) {
        staged.add_text(name, &text)?;
    }
    let shards = hf::shards(&items, options.dtype, options.max_shard_bytes);
    let mut weights: Vec<(PathBuf, String)> = Vec::new();
    for (name, range) in &shards {
        let path = out.join(name);
        let (partial, digest) = writer.write(&items[range.clone()], &path)?;
        staged.add(name, partial)?;
        weights.push((path, digest));
    }
    if shards.len() > 1 {
        let index = hf::index(manifest, &items, options.dtype, &shards, &weights);
        staged.add_text(hf::INDEX, &index)?;
    }
    let files = staged.names().map(|name| out.join(name)).collect();
    staged.publish()?;
    Ok(Exported { files, n_tensors, weights })
}

/// Lists every parameter of a checkpoint under its own name.
/// Lists the parameters, or averages of them in their place.
fn every_parameter(manifest: &Manifest, averages: bool) -> Vec<Item> {
    let prefix = format!("{}/", Section::Param.prefix());
    let item = |(name, entry): (&String, &TensorEntry)| {
        let ours = name.strip_prefix(&prefix)?.to_string();
        let name = match (ours.strip_prefix(AVERAGE), averages) {
            (Some(name), true) => name.to_string(),
            (None, false) => ours.clone(),
            _ => return None,
        };
        let (shape, n) = (entry.shape.clone(), entry.shape.iter().product());
        Some(Item { ours, name, shape, elements: 0..n, source: Source::Checkpoint })
    };
    manifest.tensors.iter().filter_map(item).collect()
}

/// Lists the tensors of an export in the order of our names, so that blocks are read once.
fn plan_items(config: &ModelConfig, layout: ExportLayout) -> Vec<Item> {
    let mut items: Vec<Item> = Vec::new();
    let mut add = |ours: &str, shape: &[u64], table: Option<&[f32]>| {
        for (name, part) in targets(ours, layout) {
            let rows = part.rows(shape[0] as usize);
            let row_elements: u64 = shape[1..].iter().product();
            let mut shape = shape.to_vec();
            shape[0] = rows.len() as u64;
            items.push(Item {
                name,
                ours: ours.to_string(),
                shape,
                elements: rows.start as u64 * row_elements..rows.end as u64 * row_elements,
                source: table.map_or(Source::Checkpoint, |t| Source::Table(t.to_vec())),
            });
        }
    };
    for param in config.params() {
        let shape: Vec<u64> = param.shape.iter().map(|&n| n as u64).collect();
        add(&param.name, &shape, None);
    }
    for (name, width) in [("pos_embed", config.width), ("decoder_pos_embed", config.decoder_width)]
    {
        let table = sincos_2d(width as usize, config.grid());
        let shape = [1, config.n_patches() as u64 + 1, u64::from(width)];
        add(name, &shape, Some(&table));
    }
    items
}

fn targets(ours: &str, layout: ExportLayout) -> Vec<(String, keymap::Part)> {
    let whole = |name: String| vec![(name, keymap::Part::Whole)];
    match layout {
        ExportLayout::Mae => whole(ours.to_string()),
        ExportLayout::Timm => keymap::timm(ours).map_or(Vec::new(), whole),
        ExportLayout::Hf => {
            let mapped = keymap::hf(ours, HfNames::V4);
            let mapped = mapped.expect("every parameter of the model has a Hugging Face name");
            mapped.into_iter().map(|target| (target.name, target.part)).collect()
        }
        ExportLayout::HfEncoder => {
            let mapped = keymap::hf_encoder(ours).unwrap_or_default();
            mapped.into_iter().map(|target| (target.name, target.part)).collect()
        }
        ExportLayout::Classifier | ExportLayout::ClassifierAverage => {
            unreachable!("a classifier's tensors keep their names")
        }
    }
}

#[cfg(test)]
mod tests;
