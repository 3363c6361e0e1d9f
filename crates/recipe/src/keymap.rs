//! Names of our tensors in timm and in Hugging Face's `ViTMAEForPreTraining`, and back.
//!
//! Our names are the reference's. The encoder part is the timm layout; Hugging Face splits the
//! fused `attn.qkv` into three tensors, which are the thirds of its rows. What a whole foreign file
//! gives is planned in [`import`].

use std::ops::Range;

pub mod import;

/// What the names of tensors begin with that hold an average of others over the updates: those
/// without it. They come behind all others by name.
pub const AVERAGE: &str = "weights_ema.";

/// Which rows of our tensor a foreign tensor holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// All of them.
    Whole,
    /// The first third of a fused `qkv`.
    Query,
    /// The second third.
    Key,
    /// The last third.
    Value,
}

impl Part {
    const QKV: [Part; 3] = [Part::Query, Part::Key, Part::Value];

    /// Returns the part's rows of a tensor of `n_rows` rows, which three divides where it is split.
    pub fn rows(self, n_rows: usize) -> Range<usize> {
        let third = n_rows / 3;
        let place = match self {
            Part::Whole => return 0..n_rows,
            Part::Query => 0,
            Part::Key => 1,
            Part::Value => 2,
        };
        assert_eq!(third * 3, n_rows, "a fused tensor has three equal parts");
        place * third..(place + 1) * third
    }
}

/// A tensor's name on one side of the map, with the rows of **our** tensor that it stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mapped {
    /// Name in the target's state dict.
    pub name: String,
    /// Rows of our tensor.
    pub part: Part,
}

/// Generation of Hugging Face names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HfNames {
    /// Names of transformers 4.x, which 5.x converts when it loads. Exports use these.
    V4,
    /// Names that transformers 5.x holds in memory.
    V5,
}

/// Tensors outside the blocks: ours, Hugging Face's. Entries with a dot at the end are prefixes of
/// `weight` and `bias`.
const OUTER: &[(&str, &str)] = &[
    ("cls_token", "vit.embeddings.cls_token"),
    ("pos_embed", "vit.embeddings.position_embeddings"),
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.decoder_pos_embed"),
    ("patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
    ("norm.", "vit.layernorm."),
    ("decoder_embed.", "decoder.decoder_embed."),
    ("decoder_norm.", "decoder.decoder_norm."),
    ("decoder_pred.", "decoder.decoder_pred."),
];

/// Prefixes of block lists: ours, then V4, then V5.
const STACKS: &[[&str; 3]] = &[
    ["blocks.", "vit.encoder.layer.", "vit.layers."],
    ["decoder_blocks.", "decoder.decoder_layers.", "decoder.decoder_layers."],
];

/// What transformers 5.23 writes for decoder blocks when it saves; accepted when reading.
const RESAVED_DECODER: &str = "decoder.decoder_encoder.layer.";

/// What every tensor of the encoder starts with inside `ViTMAEForPreTraining`. A `ViTMAEModel` that
/// is saved alone has names without it.
const ENCODER_PREFIX: &str = "vit.";

/// How names of a `ViTMAEModel` that is saved alone start.
const BARE_ENCODER: [&str; 4] = ["embeddings.", "encoder.layer.", "layers.", "layernorm."];

/// Layers of a block: ours, then V4, then V5. `attn.qkv` is apart.
const LAYERS: &[[&str; 3]] = &[
    ["norm1", "layernorm_before", "layernorm_before"],
    ["attn.proj", "attention.output.dense", "attention.o_proj"],
    ["norm2", "layernorm_after", "layernorm_after"],
    ["mlp.fc1", "intermediate.dense", "mlp.fc1"],
    ["mlp.fc2", "output.dense", "mlp.fc2"],
];

/// Layers that hold the thirds of `attn.qkv`, in [`Part::QKV`] order.
const QKV_V4: [&str; 3] =
    ["attention.attention.query", "attention.attention.key", "attention.attention.value"];
const QKV_V5: [&str; 3] = ["attention.q_proj", "attention.k_proj", "attention.v_proj"];

/// Maps one of our names to timm's, where the encoder has that tensor.
///
/// A timm file must hold nothing else: decoder tensors fail its strict load, and `mask_token` makes
/// it take the file for another model.
pub fn timm(name: &str) -> Option<String> {
    let decoder = name.starts_with("decoder_") || name == "mask_token";
    (!decoder && hf(name, HfNames::V4).is_some()).then(|| name.to_string())
}

/// Maps one of our names to Hugging Face's: one tensor, or three for a fused `qkv`.
pub fn hf(name: &str, names: HfNames) -> Option<Vec<Mapped>> {
    let column = match names {
        HfNames::V4 => 1,
        HfNames::V5 => 2,
    };
    if let Some(name) = map_outer(name, |pair| (pair.0, pair.1)) {
        return Some(vec![Mapped { name, part: Part::Whole }]);
    }
    let (stack, block, layer, leaf) = STACKS
        .iter()
        .find_map(|stack| split_block(name, stack[0]).map(|(b, l, w)| (stack[column], b, l, w)))?;
    let full =
        |layer: &str, part: Part| Mapped { name: format!("{stack}{block}.{layer}.{leaf}"), part };
    if layer == "attn.qkv" {
        let layers = if column == 1 { QKV_V4 } else { QKV_V5 };
        return Some(layers.iter().zip(Part::QKV).map(|(l, part)| full(l, part)).collect());
    }
    let row = LAYERS.iter().find(|row| row[0] == layer)?;
    Some(vec![full(row[column], Part::Whole)])
}

/// Maps one of our names to those of a `ViTMAEModel` that is saved alone, if the encoder has that
/// tensor.
pub fn hf_encoder(name: &str) -> Option<Vec<Mapped>> {
    let strip = |target: Mapped| {
        let name = target.name.strip_prefix(ENCODER_PREFIX)?.to_string();
        Some(Mapped { name, ..target })
    };
    hf(name, HfNames::V4)?.into_iter().map(strip).collect()
}

/// Maps a foreign name to ours: both Hugging Face generations, with and without the prefix of the
/// encoder, what 5.23 re-saves, timm and ours.
pub fn ours(name: &str) -> Option<Mapped> {
    if hf(name, HfNames::V4).is_some() {
        return Some(Mapped { name: name.to_string(), part: Part::Whole });
    }
    if BARE_ENCODER.iter().any(|start| name.starts_with(start)) {
        return ours_of_hf(&format!("{ENCODER_PREFIX}{name}"));
    }
    ours_of_hf(name)
}

fn ours_of_hf(name: &str) -> Option<Mapped> {
    if let Some(name) = map_outer(name, |pair| (pair.1, pair.0)) {
        return Some(Mapped { name, part: Part::Whole });
    }
    let prefixes = STACKS
        .iter()
        .flat_map(|row| [(row[1], row[0]), (row[2], row[0])])
        .chain([(RESAVED_DECODER, STACKS[1][0])]);
    let (stack, block, layer, leaf) = prefixes
        .into_iter()
        .find_map(|(from, to)| split_block(name, from).map(|(b, l, w)| (to, b, l, w)))?;
    let full =
        |layer: &str, part: Part| Mapped { name: format!("{stack}{block}.{layer}.{leaf}"), part };
    for layers in [QKV_V4, QKV_V5] {
        if let Some(place) = layers.iter().position(|known| *known == layer) {
            return Some(full("attn.qkv", Part::QKV[place]));
        }
    }
    let row = LAYERS.iter().find(|row| row[1..].contains(&layer))?;
    Some(full(row[0], Part::Whole))
}

/// Looks `name` up in [`OUTER`]; `sides` picks where to look and what to return.
fn map_outer(
    name: &str,
    sides: impl Fn(&'static (&'static str, &'static str)) -> (&'static str, &'static str),
) -> Option<String> {
    OUTER.iter().map(sides).find_map(|(from, to)| {
        if !from.ends_with('.') {
            return (name == from).then(|| to.to_string());
        }
        let leaf = name.strip_prefix(from)?;
        is_leaf(leaf).then(|| format!("{to}{leaf}"))
    })
}

/// Splits `{prefix}{block}.{layer}.{leaf}` into block, layer and leaf.
fn split_block<'a>(name: &'a str, prefix: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let (block, rest) = name.strip_prefix(prefix)?.split_once('.')?;
    let (layer, leaf) = rest.rsplit_once('.')?;
    let number = !block.is_empty() && block.bytes().all(|b| b.is_ascii_digit());
    (number && is_leaf(leaf)).then_some((block, layer, leaf))
}

fn is_leaf(leaf: &str) -> bool {
    matches!(leaf, "weight" | "bias")
}

#[cfg(test)]
mod tests;
