//! A directory as transformers writes and reads it: documents, files of bounded size, an index.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use lacuna_recipe::model::{LAYER_NORM_EPS, ModelConfig};
use serde_json::{Value, json};

use super::{ExportDtype, ExportLayout, ExportOptions, Item};
use crate::manifest::Manifest;

/// Bytes of a file by default, as transformers 4 writes them.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Name of the weights where one file holds them.
pub(crate) const SINGLE: &str = "model.safetensors";
/// Name of the document that says which of several files holds which tensor.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Tells whether a name is that of one of several weights files.
pub(super) fn is_shard(name: &str) -> bool {
    let numbers = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    numbers.and_then(|n| n.split_once("-of-")).is_some_and(|(i, n)| digits(i) && digits(n))
}

/// Returns the documents beside the weights, by name.
pub(super) fn documents(
    config: &ModelConfig,
    options: &ExportOptions,
) -> [(&'static str, String); 2] {
    let text = |document: Value| format!("{document:#}\n");
    [
        ("config.json", text(model_document(config, options))),
        ("preprocessor_config.json", text(image_document(config, options))),
    ]
}

/// Cuts the tensors into files of at most `max_bytes` each, or of one tensor; returns names and
/// tensors.
pub(super) fn shards(
    items: &[Item],
    dtype: ExportDtype,
    max_bytes: u64,
) -> Vec<(String, Range<usize>)> {
    let mut starts: Vec<usize> = vec![0];
    let mut bytes: u64 = 0;
    for (i, item) in items.iter().enumerate() {
        let own = item.numel() * dtype.bytes();
        if bytes > 0 && bytes + own > max_bytes {
            starts.push(i);
            bytes = 0;
        }
        bytes += own;
    }
    let ends = starts[1..].iter().copied().chain([items.len()]);
    let ranges: Vec<Range<usize>> = starts.iter().zip(ends).map(|(&a, b)| a..b).collect();
    let n = ranges.len();
    if n == 1 {
        return vec![(SINGLE.to_string(), 0..items.len())];
    }
    let named = (1..).zip(ranges);
    named.map(|(i, range)| (format!("model-{i:05}-of-{n:05}.safetensors"), range)).collect()
}

/// Renders the index of several files. The digests are for people: transformers passes over them.
pub(super) fn index(
    manifest: &Manifest,
    items: &[Item],
    dtype: ExportDtype,
    shards: &[(String, Range<usize>)],
    weights: &[(PathBuf, String)],
) -> String {
    let elements: u64 = items.iter().map(Item::numel).sum();
    let in_file = |(file, range): &(String, Range<usize>)| {
        let file = file.clone();
        items[range.clone()].iter().map(move |item| (item.name.clone(), file.clone()))
    };
    let map: BTreeMap<String, String> = shards.iter().flat_map(in_file).collect();
    let digests: BTreeMap<&str, &str> =
        shards.iter().zip(weights).map(|(s, w)| (s.0.as_str(), w.1.as_str())).collect();
    let document = json!({
        "metadata": {
            "lacuna.digests": digests,
            "lacuna.manifest": manifest.seal,
            "total_parameters": elements,
            "total_size": elements * dtype.bytes(),
        },
        "weight_map": map,
    });
    format!("{document:#}\n")
}

fn model_document(config: &ModelConfig, options: &ExportOptions) -> Value {
    let torch_dtype = match options.dtype {
        ExportDtype::F32 => "float32",
        ExportDtype::Bf16 => "bfloat16",
    };
    let class = match options.layout {
        ExportLayout::HfEncoder => "ViTMAEModel",
        _ => "ViTMAEForPreTraining",
    };
    json!({
        "architectures": [class],
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

fn image_document(config: &ModelConfig, options: &ExportOptions) -> Value {
    /// Number of bicubic interpolation in the imaging library that processors use.
    const BICUBIC: u32 = 3;
    let [height, width] = config.img_size;
    json!({
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
