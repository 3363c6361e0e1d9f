//! Exports: a checkpoint's parameters as files that other libraries load.
//!
//! Tensors are streamed one at a time out of verified blocks. Position tables are computed, never
//! copied. Files appear under their name when they are whole.

use std::borrow::Cow;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use lacuna_recipe::keymap::{self, HfNames};
use lacuna_recipe::model::{LAYER_NORM_EPS, ModelConfig};
use lacuna_recipe::pos_embed::sincos_2d;
use lacuna_recipe::state::{Layout, Section};

use crate::disk::{self, FsError, Partial};
use crate::header::{self, HeaderTensor};
use crate::layout::RunDir;
use crate::load::{Expected, differences};
use crate::manifest::Manifest;
use crate::read::{self, PlanError, ReadError, Reader, Wanted};

/// Bytes gathered before a write.
const WRITE_BUFFER_BYTES: usize = 1 << 20;

/// Which library a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportLayout {
    /// One file with every tensor under the reference's names, both position tables included.
    Mae,
    /// One file with the encoder alone, as timm's `vit_*.mae` models load it.
    Timm,
    /// A directory that `ViTMAEForPreTraining.from_pretrained` loads.
    Hf,
}

/// Element type of the exported tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportDtype {
    /// As trained.
    F32,
    /// Rounded to nearest, ties to even.
    Bf16,
}

/// How to export.
#[derive(Clone, Debug, PartialEq)]
pub struct ExportOptions {
    /// For which library.
    pub layout: ExportLayout,
    /// Element type.
    pub dtype: ExportDtype,
    /// Mean of each channel in training, for the image processor.
    pub image_mean: Vec<f64>,
    /// Deviation of each channel in training, for the image processor.
    pub image_std: Vec<f64>,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// The files.
    pub files: Vec<PathBuf>,
    /// Tensors in the weights file.
    pub n_tensors: usize,
    /// BLAKE3 of the weights file.
    pub digest: String,
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

enum Source {
    Checkpoint,
    Table(Vec<f32>),
}

/// Exports the parameters of a checkpoint to `out`: a file, or a directory for Hugging Face.
pub fn export(
    dir: &RunDir,
    manifest: &Manifest,
    config: &ModelConfig,
    options: &ExportOptions,
    out: &Path,
) -> Result<Exported, ExportError> {
    let [height, width] = config.img_size;
    if options.layout == ExportLayout::Hf && height != width {
        return Err(ExportError::NotSquare { height, width });
    }
    let layout = Layout::new(config.params());
    let differences = differences(manifest, &Expected::tensors(&layout));
    if !differences.is_empty() {
        return Err(ExportError::Mismatch { step: manifest.step, differences });
    }
    let items = plan_items(config, options.layout);
    let n_tensors = items.len();
    let weights = |path: &Path| write_weights(dir, manifest, &items, options.dtype, path);
    if options.layout != ExportLayout::Hf {
        let parent = out.parent().unwrap_or(Path::new(""));
        if !parent.as_os_str().is_empty() {
            disk::create_dirs(parent, parent)?;
        }
        let digest = weights(out)?;
        return Ok(Exported { files: vec![out.to_path_buf()], n_tensors, digest });
    }
    disk::create_dirs(out, out)?;
    let files = ["config.json", "preprocessor_config.json", "model.safetensors"];
    let files: Vec<PathBuf> = files.iter().map(|name| out.join(name)).collect();
    let documents = [hf_config(config, options.dtype), hf_preprocessor(config, options)];
    for (path, document) in files.iter().zip(documents) {
        disk::remove_stale_partial(path)?;
        disk::replace_small(path, &format!("{document:#}\n"))?;
    }
    // The weights come last: a directory that has them is whole.
    let digest = weights(&files[2])?;
    Ok(Exported { files, n_tensors, digest })
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
    }
}

/// Streams the tensors into a safetensors file; returns its digest.
fn write_weights(
    dir: &RunDir,
    manifest: &Manifest,
    items: &[Item],
    dtype: ExportDtype,
    path: &Path,
) -> Result<String, ExportError> {
    let (name, width) = match dtype {
        ExportDtype::F32 => ("F32", 4),
        ExportDtype::Bf16 => ("BF16", 2),
    };
    let tensor = |item: &Item| HeaderTensor {
        name: item.name.clone(),
        dtype: name,
        shape: item.shape.clone(),
        bytes: (item.elements.end - item.elements.start) * width,
    };
    let tensors: Vec<HeaderTensor> = items.iter().map(tensor).collect();
    let step = manifest.step.to_string();
    let metadata = [
        // Readers of PyTorch models refuse files without it.
        ("format", "pt"),
        ("lacuna.manifest", manifest.seal.as_str()),
        ("lacuna.run", manifest.run.as_str()),
        ("lacuna.step", step.as_str()),
    ];
    let head = header::render(&metadata, &tensors);
    disk::remove_stale_partial(path)?;
    let partial = Partial::create(path)?;
    partial.reserve(head.len() as u64 + tensors.iter().map(|t| t.bytes).sum::<u64>())?;
    let failed = |e: std::io::Error| partial.error("write", e);
    let mut hasher = blake3::Hasher::new();
    let mut file = BufWriter::with_capacity(WRITE_BUFFER_BYTES, partial.writer());
    let mut reader = Reader::new(dir, manifest);
    let mut put = |bytes: &[u8]| {
        hasher.update(bytes);
        file.write_all(bytes).map_err(failed)
    };
    put(&head)?;
    for item in items {
        let values = read_item(manifest, &mut reader, item)?;
        match dtype {
            ExportDtype::F32 => put(bytemuck::cast_slice(&values))?,
            ExportDtype::Bf16 => {
                let rounded: Vec<u16> = values.iter().map(|x| bf16(*x)).collect();
                put(bytemuck::cast_slice(&rounded))?;
            }
        }
    }
    file.flush().map_err(failed)?;
    drop(file);
    partial.replace()?;
    Ok(format!("blake3:{}", hasher.finalize().to_hex()))
}

fn read_item<'a>(
    manifest: &Manifest,
    reader: &mut Reader<'_>,
    item: &'a Item,
) -> Result<Cow<'a, [f32]>, ExportError> {
    if let Source::Table(table) = &item.source {
        return Ok(Cow::Borrowed(table));
    }
    let tensor = format!("{}/{}", Section::Param.prefix(), item.ours);
    let ops = read::plan(manifest, &[Wanted { tensor, range: item.elements.clone() }])?;
    let mut values: Vec<f32> = vec![0.0; (item.elements.end - item.elements.start) as usize];
    reader.read_into(&ops, &mut [bytemuck::cast_slice_mut(&mut values)])?;
    Ok(Cow::Owned(values))
}

/// Rounds to bfloat16, ties to even; a NaN stays one.
fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    let tie = (bits >> 16) & 1;
    // Values beyond the largest bfloat16 become infinite; the sum cannot leave 32 bits.
    ((bits + 0x7fff + tie) >> 16) as u16
}

fn hf_config(config: &ModelConfig, dtype: ExportDtype) -> serde_json::Value {
    let torch_dtype = match dtype {
        ExportDtype::F32 => "float32",
        ExportDtype::Bf16 => "bfloat16",
    };
    serde_json::json!({
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "image_size": config.img_size[0],
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.width * config.mlp_ratio,
        "decoder_hidden_size": config.decoder_width,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_heads,
        "decoder_intermediate_size": config.decoder_width * config.mlp_ratio,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        // The library's defaults for these three differ from how the model was trained.
        "layer_norm_eps": LAYER_NORM_EPS,
        "mask_ratio": config.mask_ratio,
        "norm_pix_loss": config.norm_pix_loss,
        "qkv_bias": true,
        "torch_dtype": torch_dtype,
    })
}

fn hf_preprocessor(config: &ModelConfig, options: &ExportOptions) -> serde_json::Value {
    /// Number of bicubic interpolation in the imaging library that processors use.
    const BICUBIC: u32 = 3;
    let [height, width] = config.img_size;
    serde_json::json!({
        "image_processor_type": "ViTImageProcessor",
        "do_resize": true,
        "size": { "height": height, "width": width },
        "resample": BICUBIC,
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": options.image_mean,
        "image_std": options.image_std,
    })
}

#[cfg(test)]
mod tests;
