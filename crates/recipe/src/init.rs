//! Initial weights, drawn by name and element and never by a stateful generator.
//!
//! Source of the rules: `initialize_weights` in facebookresearch/mae models_mae.py (efb2a80).

use crate::model::{Init, ParamSpec};
use crate::philox::{Draws, Tag, unit53};

/// Computes FNV-1a with 64 bits.
pub fn fnv1a64(text: &str) -> u64 {
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, mix)
}

/// Writes the initial values of `param` into `out`, which has one place per element.
///
/// Element e of a tensor reads block e / 2 of the draws keyed by seed and name, so any range can be
/// computed alone.
pub fn fill(param: &ParamSpec, seed: u64, out: &mut [f32]) {
    assert_eq!(out.len(), param.numel(), "buffer of `{}`", param.name);
    match param.init {
        Init::Zeros => out.fill(0.0),
        Init::Ones => out.fill(1.0),
        Init::Normal02 => each_unit_pair(&param.name, seed, out, |a, b| 0.02 * normal(a, b)),
        Init::Normal { deviation } => {
            each_unit_pair(&param.name, seed, out, |a, b| deviation * normal(a, b));
        }
        Init::XavierUniform { fan_in, fan_out } => {
            let bound = (6.0 / (f64::from(fan_in) + f64::from(fan_out))).sqrt();
            each_unit_pair(&param.name, seed, out, |a, _| (2.0 * a - 1.0) * bound);
        }
        Init::ConvBias { fan_in } => {
            let bound = 1.0 / f64::from(fan_in).sqrt();
            each_unit_pair(&param.name, seed, out, |a, _| (2.0 * a - 1.0) * bound);
        }
    }
}

/// Calls `f` with two uniform numbers per element.
fn each_unit_pair(name: &str, seed: u64, out: &mut [f32], f: impl Fn(f64, f64) -> f64) {
    // The name's hash takes the sample's 48 bits and the epoch's 16; element / 2^24 the other 16
    // bits of the epoch word, so tensors of up to 2^40 elements have distinct addresses.
    let hash = fnv1a64(name);
    for (chunk_idx, chunk) in out.chunks_mut(1 << 24).enumerate() {
        let epoch = ((hash >> 48) as u32) << 16 | chunk_idx as u32;
        let draws = Draws::new(seed, Tag::Init, epoch, hash & ((1 << 48) - 1));
        for (element, value) in chunk.iter_mut().enumerate() {
            let w = draws.block(element as u32);
            *value = f(unit53(w[0], w[1]), unit53(w[2], w[3])) as f32;
        }
    }
}

/// Makes two standard normal numbers of a block of draws.
pub fn normal_pair(words: [u32; 4]) -> [f64; 2] {
    let (a, b) = (unit53(words[0], words[1]), unit53(words[2], words[3]));
    let radius = (-2.0 * libm::log(1.0 - a)).sqrt();
    let angle = 2.0 * std::f64::consts::PI * b;
    [radius * libm::cos(angle), radius * libm::sin(angle)]
}

/// Box-Muller: a standard normal number from two uniform ones.
fn normal(a: f64, b: f64) -> f64 {
    let radius = (-2.0 * libm::log(1.0 - a)).sqrt();
    radius * libm::cos(2.0 * std::f64::consts::PI * b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelConfig;

    fn values(config: &ModelConfig, name: &str) -> Vec<f32> {
        let list = config.params();
        let param = list.iter().find(|p| p.name == name).unwrap();
        let mut out = vec![f32::NAN; param.numel()];
        fill(param, 7, &mut out);
        out
    }

    /// T19 on ViT-B: bounds are reached within 1 %, variances fit, tokens have deviation 0.02.
    #[test]
    fn statistics_of_the_reference() {
        let base = ModelConfig::preset("base").unwrap();
        let rows = [
            ("patch_embed.proj.weight", 0.0625),
            ("patch_embed.proj.bias", 0.03608),
            ("blocks.0.attn.qkv.weight", 0.04419),
            ("blocks.3.attn.proj.weight", 0.0625),
            ("blocks.0.mlp.fc1.weight", 0.03953),
            ("blocks.11.mlp.fc2.weight", 0.03953),
            ("decoder_embed.weight", 0.06847),
            ("decoder_blocks.0.attn.qkv.weight", 0.05413),
            ("decoder_pred.weight", 0.06847),
        ];
        for (name, bound) in rows {
            let v = values(&base, name);
            let max = v.iter().fold(0f32, |m, x| m.max(x.abs()));
            assert!((f64::from(max) / bound - 1.0).abs() < 0.01, "{name}: {max} against {bound}");
            let var = v.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / v.len() as f64;
            let want = bound * bound / 3.0;
            let slack = if v.len() < 10_000 { 0.1 } else { 0.01 };
            assert!((var / want - 1.0).abs() < slack, "{name}: variance {var} against {want}");
        }
        for (name, want) in [("norm.weight", 1.0), ("norm.bias", 0.0), ("decoder_pred.bias", 0.0)] {
            assert!(values(&base, name).iter().all(|&x| x == want), "{name}");
        }
    }

    #[test]
    fn tokens_are_normal() {
        // One token has too few elements for a tight bound, so a wide one is made up.
        let wide =
            ParamSpec { name: "cls_token".into(), shape: vec![1, 1, 65536], init: Init::Normal02 };
        let mut v = vec![0.0; wide.numel()];
        fill(&wide, 3, &mut v);
        let n = v.len() as f64;
        let mean = v.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let std = (v.iter().map(|&x| (f64::from(x) - mean) * (f64::from(x) - mean)).sum::<f64>()
            / n)
            .sqrt();
        assert!(
            mean.abs() < 5e-4 && (std / 0.02 - 1.0).abs() < 0.05,
            "mean {mean}, deviation {std}"
        );
    }

    #[test]
    fn names_and_seeds_separate_tensors() {
        let micro = ModelConfig::preset("micro").unwrap();
        let a = values(&micro, "blocks.0.attn.proj.weight");
        let b = values(&micro, "blocks.1.attn.proj.weight");
        assert_ne!(a, b);
        assert_eq!(fnv1a64("a"), 0xaf63_dc4c_8601_ec8c);
    }
}
