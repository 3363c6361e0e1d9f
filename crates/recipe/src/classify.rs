//! What classification adds to the recipe, drawn by address: mixed images, soft targets, erased
//! boxes, dropped branches, and learning rates by layer.
//!
//! Everything that joins samples stays inside a slot, so it does not depend on who computes what.
//! Recipe: main_finetune.py of facebookresearch/mae, whose mixing and erasing are timm's.

use crate::philox::Draws;

/// How two images of a slot become one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mixing {
    /// Both parameters of the Beta distribution of a mixup's share; 0 turns mixup off.
    pub mixup: f64,
    /// The same for the area that a cutmix leaves; 0 turns cutmix off.
    pub cutmix: f64,
}

/// A slot's draw: sample i is joined with sample b - 1 - i.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mix {
    /// Share of the sample itself in image and target; the rest is its partner's.
    pub own: f64,
    /// The box that comes from the partner, `[top, left, height, width]`; a mixup has none.
    pub cut: Option<[u32; 4]>,
}

/// Tries of a Beta draw; for parameters up to 2 more than 64 happen once in 10^5 draws.
const BETA_TRIES: u32 = 64;

impl Mixing {
    /// Draws how a slot is mixed whose images have `[height, width]` pixels; nothing where both
    /// kinds are off. `draws` are those of the slot.
    pub fn draw(&self, draws: &Draws, [height, width]: [u32; 2]) -> Option<Mix> {
        let cuts = match (self.mixup > 0.0, self.cutmix > 0.0) {
            (false, false) => return None,
            (true, true) => draws.unit_f64(0) < 0.5,
            (_, cutmix) => cutmix,
        };
        let own = beta(draws, if cuts { self.cutmix } else { self.mixup });
        if !cuts {
            return Some(Mix { own, cut: None });
        }
        let ratio = (1.0 - own).sqrt();
        let [h, w] = [height, width].map(|side| (f64::from(side) * ratio) as u32);
        // The box is centred anywhere, and cut off at the image's edges.
        let span = |at: u32, side: u32, length: u32| {
            let centre = draws.below(4 + at, side);
            let end = (centre + length / 2).min(side);
            let begin = centre.saturating_sub(length / 2);
            (begin, end - begin)
        };
        let ((top, h), (left, w)) = (span(0, height, h), span(1, width, w));
        let own = 1.0 - f64::from(h * w) / f64::from(height * width);
        Some(Mix { own, cut: Some([top, left, h, w]) })
    }
}

/// Draws from Beta(a, a), by Jöhnk's method.
fn beta(draws: &Draws, a: f64) -> f64 {
    for try_ in 0..BETA_TRIES {
        let [u, v] = [4 + 2 * try_, 5 + 2 * try_].map(|at| libm::pow(draws.unit_f64(at), 1.0 / a));
        if u + v > 0.0 && u + v <= 1.0 {
            return u / (u + v);
        }
    }
    0.5
}

/// Returns the share of each sample in what it becomes: a partner of weight 0 adds nothing.
pub fn own_shares(mix: Option<Mix>, weights: &[f32]) -> Vec<f64> {
    let own = mix.map_or(1.0, |mix| mix.own);
    weights.iter().rev().map(|partner| if *partner > 0.0 { own } else { 1.0 }).collect()
}

/// Writes soft targets `[b, n_classes]` of the labels of a slot: smoothed, then mixed by the shares
/// `own` of the samples. A sample without a label has zeros as its share of a row.
pub fn soft_targets(
    labels: &[Option<u32>],
    n_classes: usize,
    smoothing: f64,
    own: &[f64],
) -> Vec<f32> {
    assert_eq!(labels.len(), own.len(), "one share per label");
    let off = smoothing / n_classes as f64;
    let mut out = vec![0f32; labels.len() * n_classes];
    for (i, row) in out.chunks_exact_mut(n_classes).enumerate() {
        let (partner, own) = (labels[labels.len() - 1 - i], own[i]);
        for (class, to) in row.iter_mut().enumerate() {
            let of = |label: Option<u32>| match label {
                Some(label) if label as usize == class => 1.0 - smoothing + off,
                Some(_) => off,
                None => 0.0,
            };
            *to = (own * of(labels[i]) + (1.0 - own) * of(partner)) as f32;
        }
    }
    out
}

/// Share of an image's area that is erased, at least and at most.
const ERASE_AREA: [f64; 2] = [0.02, 1.0 / 3.0];
/// Height by width of an erased box, at least; at most is its inverse.
const ERASE_ASPECT: f64 = 0.3;
/// Tries until a box fits into the image.
const ERASE_TRIES: u32 = 10;

/// Draws the box of a sample that is filled with noise, `[top, left, height, width]`; nothing for
/// `1 - probability` of the samples.
pub fn erase(draws: &Draws, probability: f64, [height, width]: [u32; 2]) -> Option<[u32; 4]> {
    if draws.unit_f64(0) >= probability {
        return None;
    }
    let area = f64::from(height) * f64::from(width);
    for try_ in 0..ERASE_TRIES {
        let at = 4 * try_;
        let share = ERASE_AREA[0] + draws.unit_f64(2 + at) * (ERASE_AREA[1] - ERASE_AREA[0]);
        let log = libm::log(ERASE_ASPECT);
        let aspect = libm::exp(log - 2.0 * log * draws.unit_f64(3 + at));
        let [h, w] =
            [share * area * aspect, share * area / aspect].map(|x| x.sqrt().round() as u32);
        if (1..height).contains(&h) && (1..width).contains(&w) {
            let top = draws.below(2 * (4 + at), height - h + 1);
            let left = draws.below(2 * (5 + at), width - w + 1);
            return Some([top, left, h, w]);
        }
    }
    None
}

/// Returns the rate at which branches of each block are dropped: from 0 in the first to `most` in
/// the last.
pub fn drop_rates(depth: u32, most: f64) -> Vec<f64> {
    let last = f64::from(depth.saturating_sub(1).max(1));
    (0..depth).map(|block| most * f64::from(block) / last).collect()
}

/// Returns what a sample's branch is multiplied by: 0 where it is dropped, else the inverse of the
/// share that stays. Each block has two branches, 0 and 1.
pub fn drop_scale(draws: &Draws, block: u32, branch: u32, rate: f64) -> f32 {
    let kept = draws.unit_f64(2 * block + branch) >= rate;
    if kept { (1.0 / (1.0 - rate)) as f32 } else { 0.0 }
}

/// Returns what the learning rate of a tensor is multiplied by where each layer's is `decay` of the
/// next one's: tokens, positions and patches come before block 0, and what follows the blocks has
/// 1.
pub fn layer_scale(name: &str, depth: u32, decay: f64) -> f64 {
    let layer = match name.strip_prefix("blocks.").and_then(|rest| rest.split('.').next()) {
        Some(block) => block.parse().map_or(depth + 1, |block: u32| block + 1),
        None if ["cls_token", "pos_embed"].contains(&name) || name.starts_with("patch_embed") => 0,
        None => depth + 1,
    };
    (layer..depth + 1).fold(1.0, |scale, _| scale * decay)
}

#[cfg(test)]
mod tests;
