//! The shape of a masked autoencoder: sizes, parameter tensors, presets. No tensor is made here.
//!
//! Names are those of the reference's state dict (`blocks.0.attn.qkv.weight`), so that published
//! checkpoints and ours map one to one.

use serde::{Deserialize, Serialize};

use crate::augment::SIDE_MAX;

/// Sizes of a masked autoencoder. All lengths are in pixels or elements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Image height and width, multiples of `patch_size`.
    pub img_size: [u32; 2],
    /// Side of a square patch.
    pub patch_size: u32,
    /// Image channels.
    pub channels: u32,
    /// Encoder width, a multiple of 4 and of `heads`.
    pub width: u32,
    /// Encoder blocks.
    pub depth: u32,
    /// Encoder attention heads.
    pub heads: u32,
    /// Decoder width, a multiple of 4 and of `decoder_heads`.
    pub decoder_width: u32,
    /// Decoder blocks.
    pub decoder_depth: u32,
    /// Decoder attention heads.
    pub decoder_heads: u32,
    /// Hidden width of an MLP as a multiple of the block's width.
    pub mlp_ratio: u32,
    /// Share of patches that the encoder does not see, in `(0, 1)`.
    pub mask_ratio: f64,
    /// Whether the target is normalised per patch.
    pub norm_pix_loss: bool,
}

/// Epsilon of every LayerNorm.
pub const LAYER_NORM_EPS: f64 = 1e-6;
/// Added to the patch variance of the normalised target.
pub const NORM_PIX_EPS: f64 = 1e-6;

/// A model configuration that cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// A size is zero, or above what any index here can hold.
    #[error("`{field}` must be between 1 and {max}, not {value}")]
    Range {
        /// Name of the field.
        field: &'static str,
        /// What it holds.
        value: u32,
        /// Largest accepted value.
        max: u32,
    },
    /// A size does not divide another.
    #[error("`{field}` = {value} must be a multiple of {divisor} (`{by}`)")]
    NotDivisible {
        /// Name of the field.
        field: &'static str,
        /// What it holds.
        value: u32,
        /// What must divide it.
        divisor: u32,
        /// Where the divisor comes from.
        by: &'static str,
    },
    /// The mask ratio leaves the encoder or the loss without patches.
    #[error(
        "`mask_ratio` = {ratio} keeps {kept} of {patches} patches; at least one must be kept and \
         one removed"
    )]
    MaskRatio {
        /// The ratio, printed.
        ratio: String,
        /// Patches kept.
        kept: usize,
        /// Patches in all.
        patches: usize,
    },
}

/// How a parameter tensor is initialised (see [`crate::init`]).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Uniform in ±sqrt(6 / (fan_in + fan_out)).
    XavierUniform {
        /// Inputs of the matrix.
        fan_in: u32,
        /// Outputs of the matrix.
        fan_out: u32,
    },
    /// Uniform in ±1 / sqrt(fan_in): PyTorch's default for a convolution's bias.
    ConvBias {
        /// Inputs of the convolution.
        fan_in: u32,
    },
    /// Normal with mean 0 and deviation 0.02.
    Normal02,
    /// Normal with mean 0.
    Normal {
        /// Its deviation.
        deviation: f64,
    },
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
}

/// One trainable parameter tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Name in the state dict.
    pub name: String,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// Initial values.
    pub init: Init,
}

impl ParamSpec {
    /// Returns the number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Tells whether AdamW decays this tensor: matrices, convolutions and tokens, not vectors.
    ///
    /// `decay_tokens` false leaves `cls_token` and `mask_token` undecayed, as some later code bases
    /// do.
    pub fn decays(&self, decay_tokens: bool) -> bool {
        if self.name == "pos_embed" {
            return false;
        }
        let token = matches!(self.name.as_str(), "cls_token" | "mask_token");
        self.shape.len() > 1 && !self.name.ends_with(".bias") && (decay_tokens || !token)
    }
}

impl ModelConfig {
    /// Checks the sizes, reporting every problem.
    pub fn problems(&self) -> Vec<ModelError> {
        let mut out: Vec<ModelError> = Vec::new();
        let ranges = [
            ("img_size[0]", self.img_size[0], SIDE_MAX),
            ("img_size[1]", self.img_size[1], SIDE_MAX),
            ("patch_size", self.patch_size, 1024),
            ("channels", self.channels, 1024),
            ("width", self.width, 65536),
            ("depth", self.depth, 1024),
            ("heads", self.heads, 1024),
            ("decoder_width", self.decoder_width, 65536),
            ("decoder_depth", self.decoder_depth, 1024),
            ("decoder_heads", self.decoder_heads, 1024),
            ("mlp_ratio", self.mlp_ratio, 64),
        ];
        for (field, value, max) in ranges {
            if value == 0 || value > max {
                out.push(ModelError::Range { field, value, max });
            }
        }
        if !out.is_empty() {
            return out;
        }
        let divisors = [
            ("img_size[0]", self.img_size[0], self.patch_size, "patch_size"),
            ("img_size[1]", self.img_size[1], self.patch_size, "patch_size"),
            ("width", self.width, 4, "position table"),
            ("width", self.width, self.heads, "heads"),
            ("decoder_width", self.decoder_width, 4, "position table"),
            ("decoder_width", self.decoder_width, self.decoder_heads, "decoder_heads"),
        ];
        for (field, value, divisor, by) in divisors {
            if value % divisor != 0 {
                out.push(ModelError::NotDivisible { field, value, divisor, by });
            }
        }
        let (kept, patches) = (self.len_keep(), self.n_patches());
        if !self.mask_ratio.is_finite() || kept == 0 || kept >= patches {
            let ratio = self.mask_ratio.to_string();
            out.push(ModelError::MaskRatio { ratio, kept, patches });
        }
        out
    }

    /// Returns the patch grid, rows then columns.
    pub fn grid(&self) -> [usize; 2] {
        self.img_size.map(|side| (side / self.patch_size) as usize)
    }

    /// Returns the number of patches of an image.
    pub fn n_patches(&self) -> usize {
        let [rows, columns] = self.grid();
        rows * columns
    }

    /// Returns the number of patches that the encoder sees.
    pub fn len_keep(&self) -> usize {
        crate::mask::len_keep(self.n_patches(), self.mask_ratio)
    }

    /// Returns the values of one patch, `patch_size² · channels`.
    pub fn patch_values(&self) -> usize {
        (self.patch_size * self.patch_size * self.channels) as usize
    }

    /// Lists the trainable parameter tensors in canonical order, which is sorted by name.
    pub fn params(&self) -> Vec<ParamSpec> {
        let (d, dd, p, c) = (self.width, self.decoder_width, self.patch_size, self.channels);
        let patch = p * p * c;
        let mut out: Vec<ParamSpec> = vec![
            param("cls_token", &[1, 1, d], Init::Normal02),
            param("mask_token", &[1, 1, dd], Init::Normal02),
            param(
                "patch_embed.proj.weight",
                &[d, c, p, p],
                Init::XavierUniform { fan_in: patch, fan_out: d },
            ),
            param("patch_embed.proj.bias", &[d], Init::ConvBias { fan_in: patch }),
        ];
        for i in 0..self.depth {
            block(&mut out, &format!("blocks.{i}"), d, self.mlp_ratio);
        }
        for i in 0..self.decoder_depth {
            block(&mut out, &format!("decoder_blocks.{i}"), dd, self.mlp_ratio);
        }
        norm(&mut out, "norm", d);
        norm(&mut out, "decoder_norm", dd);
        linear(&mut out, "decoder_embed", dd, d);
        linear(&mut out, "decoder_pred", patch, dd);
        out.sort_by(|a, b| a.name.cmp(&b.name));
        out
    }

    /// Returns the number of trainable parameters.
    pub fn n_params(&self) -> usize {
        self.params().iter().map(ParamSpec::numel).sum()
    }

    /// Returns the FLOPs of one image's forward and backward pass (a multiply-add counts as two).
    ///
    /// The backward pass costs twice the forward pass, except the patch projection, whose input
    /// needs no gradient.
    pub fn train_flops(&self) -> f64 {
        let block_macs =
            |n: f64, d: f64| (4.0 + 2.0 * f64::from(self.mlp_ratio)) * n * d * d + 2.0 * n * n * d;
        let (d, dd) = (f64::from(self.width), f64::from(self.decoder_width));
        let (l, keep) = (self.n_patches() as f64, self.len_keep() as f64);
        let values = self.patch_values() as f64;
        let patch = l * values * d;
        let rest = f64::from(self.depth) * block_macs(keep + 1.0, d)
            + (keep + 1.0) * d * dd
            + f64::from(self.decoder_depth) * block_macs(l + 1.0, dd)
            + (l + 1.0) * dd * values;
        2.0 * (2.0 * patch + 3.0 * rest)
    }

    /// Returns the FLOPs of the encoder on one whole image: of a forward pass, and of the backward
    /// pass too where it `learns`.
    pub fn encoder_flops(&self, learns: bool) -> f64 {
        let (d, l) = (f64::from(self.width), self.n_patches() as f64);
        let n = l + 1.0;
        let block = (4.0 + 2.0 * f64::from(self.mlp_ratio)) * n * d * d + 2.0 * n * n * d;
        let (patch, blocks) = (l * self.patch_values() as f64 * d, f64::from(self.depth) * block);
        let passes = if learns { (2.0, 3.0) } else { (1.0, 1.0) };
        2.0 * (passes.0 * patch + passes.1 * blocks)
    }

    /// Looks a preset up by name; [`PRESETS`] lists them.
    pub fn preset(name: &str) -> Option<ModelConfig> {
        let (_, sizes) = PRESETS.iter().find(|(known, _)| *known == name)?;
        let &[side, patch_size, channels, width, depth, heads, dec_width, dec_depth, dec_heads] =
            sizes;
        Some(ModelConfig {
            img_size: [side, side],
            patch_size,
            channels,
            width,
            depth,
            heads,
            decoder_width: dec_width,
            decoder_depth: dec_depth,
            decoder_heads: dec_heads,
            mlp_ratio: 4,
            mask_ratio: 0.75,
            norm_pix_loss: true,
        })
    }
}

/// Presets: image side, patch, channels, width, depth, heads, decoder width, depth, heads.
///
/// `base`, `large` and `huge` are the reference's; `small` is CrossMAE's; `tiny`, `demo` and
/// `micro` are ours.
pub const PRESETS: &[(&str, [u32; 9])] = &[
    ("micro", [8, 2, 3, 8, 2, 2, 8, 1, 2]),
    ("demo", [28, 4, 1, 192, 6, 3, 96, 2, 3]),
    ("tiny", [224, 16, 3, 192, 12, 3, 192, 4, 6]),
    ("small", [224, 16, 3, 384, 12, 6, 256, 8, 8]),
    ("base", [224, 16, 3, 768, 12, 12, 512, 8, 16]),
    ("large", [224, 16, 3, 1024, 24, 16, 512, 8, 16]),
    ("huge", [224, 14, 3, 1280, 32, 16, 512, 8, 16]),
];

fn param(name: &str, shape: &[u32], init: Init) -> ParamSpec {
    let shape = shape.iter().map(|&n| n as usize).collect();
    ParamSpec { name: name.to_string(), shape, init }
}

fn linear(out: &mut Vec<ParamSpec>, name: &str, fan_out: u32, fan_in: u32) {
    let init = Init::XavierUniform { fan_in, fan_out };
    out.push(param(&format!("{name}.weight"), &[fan_out, fan_in], init));
    out.push(param(&format!("{name}.bias"), &[fan_out], Init::Zeros));
}

fn norm(out: &mut Vec<ParamSpec>, name: &str, width: u32) {
    out.push(param(&format!("{name}.weight"), &[width], Init::Ones));
    out.push(param(&format!("{name}.bias"), &[width], Init::Zeros));
}

fn block(out: &mut Vec<ParamSpec>, name: &str, width: u32, mlp_ratio: u32) {
    norm(out, &format!("{name}.norm1"), width);
    linear(out, &format!("{name}.attn.qkv"), 3 * width, width);
    linear(out, &format!("{name}.attn.proj"), width, width);
    norm(out, &format!("{name}.norm2"), width);
    linear(out, &format!("{name}.mlp.fc1"), mlp_ratio * width, width);
    linear(out, &format!("{name}.mlp.fc2"), width, mlp_ratio * width);
}

#[cfg(test)]
mod tests;
