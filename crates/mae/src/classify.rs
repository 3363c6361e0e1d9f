//! Learning to name the class of an image, from an encoder that was trained before: fine-tuning
//! and linear probes, on the machinery of every other run.
//!
//! Source of the recipes: main_finetune.py and main_linprobe.py of facebookresearch/mae. What joins
//! samples (mixed images, batch statistics) stays inside a slot, so the bits do not depend on who
//! computes what.
//!
//! Legend of the shape suffixes: b batch, c channels, h w pixels, n tokens (the class token comes
//! first), d encoder width, k classes.

mod head;

use std::sync::Arc;

use lacuna_recipe::classify::{
    Mix, Mixing, drop_rates, drop_scale, erase, layer_scale, own_shares, soft_targets,
};
use lacuna_recipe::model::{ModelConfig, ParamSpec};
use lacuna_recipe::philox::{Draws, Tag};
use lacuna_recipe::randaugment;
pub use lacuna_spec::classifier::{
    averaged, classifier_params, feature_width, own_name, state_params,
};
use lacuna_spec::{Pool, TaskKind, TaskSpec};
use tch::{Device, Kind, Tensor};

pub use head::{EncoderWeights, Head};

use crate::objective::{Objective, Slot, SlotLoss};
use crate::patches::{patchify, size3};
use crate::vit::{Block, LayerNorm, Linear, run, run_dropped};
use crate::weights::Weights;

/// Added to the variance of the probe's batch norm.
const BATCH_NORM_EPS: f64 = 1e-6;

/// Classes, learned with the whole encoder or behind it.
#[derive(Clone, Debug)]
pub struct Classification {
    task: TaskSpec,
    encoder: Arc<EncoderWeights>,
}

impl Classification {
    /// Learns what `task` says, from `encoder`.
    pub fn new(task: TaskSpec, encoder: Arc<EncoderWeights>) -> Self {
        Classification { task, encoder }
    }

    /// Returns what the learning rate of a tensor is multiplied by.
    pub fn scale_of(&self, name: &str, model: &ModelConfig) -> f64 {
        match self.task.kind {
            TaskKind::Finetune => layer_scale(name, model.depth, self.task.layer_decay),
            TaskKind::Linear => 1.0,
        }
    }
}

impl Objective for Classification {
    fn params(&self, model: &ModelConfig) -> Vec<ParamSpec> {
        classifier_params(&self.task, model)
    }

    fn augments(&self) -> bool {
        self.task.rand_augment > 0.0
    }

    fn augment(&self, image: &mut [u8], size: [usize; 2], draws: &Draws) {
        randaugment::augment(image, size, self.task.rand_augment, &draws.tagged(Tag::Augment));
    }

    fn prepare(&self, model: &ModelConfig, device: Device) -> Box<dyn SlotLoss> {
        match self.task.kind {
            TaskKind::Finetune => {
                Box::new(FinetuneLoss { model: model.clone(), task: self.task.clone() })
            }
            TaskKind::Linear => {
                // A worker's probe also computes a small model, which the encoder is none of.
                let own = match self.encoder.fits(model) {
                    true => self.encoder.clone(),
                    false => Arc::new(EncoderWeights::fresh(model, 0)),
                };
                let frozen = own.weights().to_device(device);
                let encoder = Encoder::new(model, &frozen, own.table(model).to_device(device));
                Box::new(LinearLoss { task: self.task.clone(), encoder })
            }
        }
    }
}

/// An encoder that sees whole images.
#[derive(Debug)]
struct Encoder {
    model: ModelConfig,
    weights: Weights,
    patch_size: i64,
    patch_embed: Linear,
    cls_token_11d: Tensor,
    pos_embed_1nd: Tensor,
    blocks: Vec<Block>,
    /// The last norm, where it comes before the head reads.
    norm: Option<LayerNorm>,
}

impl Encoder {
    /// Returns the same again for another thread; the parameters are shared.
    fn share(&self) -> Self {
        Encoder::new(&self.model, &self.weights, self.pos_embed_1nd.shallow_clone())
    }

    fn new(model: &ModelConfig, weights: &Weights, pos_embed_1nd: Tensor) -> Self {
        let block = |i| Block::new(weights, &format!("blocks.{i}"), i64::from(model.heads));
        let has_norm = weights.layout().find("norm.weight").is_some();
        Encoder {
            model: model.clone(),
            weights: weights.share(),
            patch_size: i64::from(model.patch_size),
            patch_embed: Linear::new(weights, "patch_embed.proj"),
            cls_token_11d: weights.get("cls_token"),
            pos_embed_1nd,
            blocks: (0..model.depth).map(block).collect(),
            norm: has_norm.then(|| LayerNorm::new(weights, "norm")),
        }
    }

    /// Returns the class token and the patches' tokens before the last norm, `[b, n, d]`;
    /// `drops` scales the branches of each block, `[b, 1, 1]`.
    fn tokens(&self, images_bchw: &Tensor, drops: Option<&[[Tensor; 2]]>) -> Tensor {
        let patches_bnd = self.patch_embed.forward(&patchify(images_bchw, self.patch_size));
        let (b, l, _) = size3(&patches_bnd);
        let patches_bnd = patches_bnd + self.pos_embed_1nd.narrow(1, 1, l);
        let cls_11d = &self.cls_token_11d + self.pos_embed_1nd.narrow(1, 0, 1);
        let cls_b1d = cls_11d.expand([b, 1, -1], false);
        let tokens_bnd = Tensor::cat(&[cls_b1d, patches_bnd], 1);
        match drops {
            Some(drops) => run_dropped(&self.blocks, tokens_bnd, drops),
            None => run(&self.blocks, tokens_bnd),
        }
    }

    /// Returns what a head reads, `[b, d]`.
    fn pooled(&self, tokens_bnd: &Tensor, pool: Pool) -> Tensor {
        let normed =
            |x: &Tensor| self.norm.as_ref().map_or(x.shallow_clone(), |norm| norm.forward(x));
        match pool {
            Pool::Cls => normed(tokens_bnd).select(1, 0),
            Pool::Pixels => unreachable!("pixels go past the encoder"),
            Pool::Avg => {
                let n_patches = tokens_bnd.size()[1] - 1;
                let patches = |x: &Tensor| x.narrow(1, 1, n_patches);
                patches(&normed(tokens_bnd)).mean_dim(1, false, None::<Kind>)
            }
        }
    }
}

#[derive(Debug)]
struct FinetuneLoss {
    model: ModelConfig,
    task: TaskSpec,
}

impl SlotLoss for FinetuneLoss {
    fn loss(&self, weights: &Weights, slot: &Slot<'_>) -> Tensor {
        let TaskSpec { mixup, cutmix, label_smoothing, classes, .. } = self.task;
        // The slot's own draws are those of its first sample: one slot, one mix.
        let of_slot = slot.draws[0].tagged(Tag::Mix);
        let mix = Mixing { mixup, cutmix }.draw(&of_slot, self.model.img_size);
        let images_bchw = mixed(&self.erased(slot), mix, &slot.weights_b);
        let own = own_shares(mix, slot.weights);
        let drops = self.drops(slot);
        let logits_bk =
            finetuned_logits(&self.task, &self.model, weights, &images_bchw, drops.as_deref());
        let targets = soft_targets(slot.labels, classes as usize, label_smoothing, &own);
        cross_entropy(&logits_bk, &targets, &slot.weights_b)
    }
}

impl FinetuneLoss {
    /// Fills a box of some images with noise.
    fn erased(&self, slot: &Slot<'_>) -> Tensor {
        let images_bchw = slot.images_bchw.shallow_clone();
        let [height, width] = self.model.img_size;
        let boxes: Vec<Option<[u32; 4]>> = slot
            .draws
            .iter()
            .map(|draws| {
                erase(&draws.tagged(Tag::Erase), self.task.random_erasing, [height, width])
            })
            .collect();
        if boxes.iter().all(Option::is_none) {
            return images_bchw;
        }
        let images_bchw = images_bchw.copy();
        for (i, (draws, erased)) in slot.draws.iter().zip(&boxes).enumerate() {
            let Some([top, left, h, w]) = *erased else { continue };
            let noise = noise(&draws.tagged(Tag::Noise), (self.model.channels * h * w) as usize);
            let noise_chw = Tensor::from_slice(&noise)
                .view([i64::from(self.model.channels), i64::from(h), i64::from(w)])
                .to_device(images_bchw.device());
            let (top, left) = (i64::from(top), i64::from(left));
            let mut target = images_bchw.select(0, i as i64).narrow(1, top, i64::from(h)).narrow(
                2,
                left,
                i64::from(w),
            );
            target.copy_(&noise_chw);
        }
        images_bchw
    }

    /// Draws what is left of each block's branches, `[b, 1, 1]` each.
    fn drops(&self, slot: &Slot<'_>) -> Option<Vec<[Tensor; 2]>> {
        if self.task.drop_path == 0.0 {
            return None;
        }
        let rates = drop_rates(self.model.depth, self.task.drop_path);
        let draws: Vec<Draws> = slot.draws.iter().map(|d| d.tagged(Tag::DropPath)).collect();
        let scale = |block: usize, branch: u32| {
            let of = |d: &Draws| drop_scale(d, block as u32, branch, rates[block]);
            let scales: Vec<f32> = draws.iter().map(of).collect();
            Tensor::from_slice(&scales).view([-1, 1, 1]).to_device(slot.images_bchw.device())
        };
        Some((0..rates.len()).map(|block| [scale(block, 0), scale(block, 1)]).collect())
    }
}

/// Draws standard normal numbers.
fn noise(draws: &Draws, n: usize) -> Vec<f32> {
    let pair = |block: u32| {
        let words = draws.block(block);
        lacuna_recipe::init::normal_pair(words).map(|x| x as f32)
    };
    (0..n.div_ceil(2) as u32).flat_map(pair).take(n).collect()
}

/// Joins sample i with sample b - 1 - i; a partner of weight 0 adds nothing.
fn mixed(images_bchw: &Tensor, mix: Option<Mix>, weights_b: &Tensor) -> Tensor {
    let Some(Mix { own, cut }) = mix else { return images_bchw.shallow_clone() };
    let partner_bchw = images_bchw.flip([0]);
    let there_b111 = weights_b.flip([0]).view([-1, 1, 1, 1]);
    let Some([top, left, h, w]) = cut.map(|cut| cut.map(i64::from)) else {
        let other_b111 = there_b111 * (1.0 - own);
        return images_bchw + (partner_bchw - images_bchw) * other_b111;
    };
    let out_bchw = images_bchw.copy();
    let part = |x: &Tensor| x.narrow(2, top, h).narrow(3, left, w);
    let cut_bchw = part(images_bchw) + (part(&partner_bchw) - part(images_bchw)) * there_b111;
    part(&out_bchw).copy_(&cut_bchw);
    out_bchw
}

/// Computes the logits `[b, k]` of a fine-tuned model.
fn finetuned_logits(
    task: &TaskSpec,
    model: &ModelConfig,
    weights: &Weights,
    images_bchw: &Tensor,
    drops: Option<&[[Tensor; 2]]>,
) -> Tensor {
    let encoder = Encoder::new(model, weights, weights.get("pos_embed"));
    let mut pooled_bd = encoder.pooled(&encoder.tokens(images_bchw, drops), task.pool);
    if task.pool == Pool::Avg {
        pooled_bd = LayerNorm::new(weights, "fc_norm").forward(&pooled_bd);
    }
    Linear::new(weights, "head").forward(&pooled_bd)
}

#[derive(Debug)]
struct LinearLoss {
    task: TaskSpec,
    encoder: Encoder,
}

impl SlotLoss for LinearLoss {
    fn loss(&self, weights: &Weights, slot: &Slot<'_>) -> Tensor {
        let pooled_bd = tch::no_grad(|| {
            let pooled_bd = match self.task.pool {
                Pool::Pixels => slot.images_bchw.flatten(1, -1),
                pool => self.encoder.pooled(&self.encoder.tokens(&slot.images_bchw, None), pool),
            };
            let pooled_bd = pooled_bd.to_kind(Kind::Float);
            batch_normed(&pooled_bd, &moments(&pooled_bd, &slot.weights_b))
        });
        let logits_bk = Linear::new(weights, "head").forward(&pooled_bd);
        let own = vec![1.0; slot.labels.len()];
        let targets = soft_targets(slot.labels, self.task.classes as usize, 0.0, &own);
        cross_entropy(&logits_bk, &targets, &slot.weights_b)
    }
}

/// Computes mean and biased variance of features over the samples of a slot that count.
fn moments(features_bd: &Tensor, weights_b: &Tensor) -> [Tensor; 2] {
    let weights_b1 = weights_b.unsqueeze(-1);
    let n = weights_b.sum(None::<Kind>).clamp_min(1.0);
    let mean_of = |x_bd: Tensor| (x_bd * &weights_b1).sum_dim_intlist(0, false, None::<Kind>) / &n;
    let mean_d = mean_of(features_bd.shallow_clone());
    let var_d = mean_of((features_bd - &mean_d).square());
    [mean_d, var_d]
}

/// Normalises features as a batch norm without scale and shift does.
fn batch_normed(features_bd: &Tensor, [mean_d, var_d]: &[Tensor; 2]) -> Tensor {
    (features_bd - mean_d) / (var_d + BATCH_NORM_EPS).sqrt()
}

/// Computes the mean over the slot of the cross entropies with soft targets `[b, k]`; a sample of
/// weight 0 adds nothing.
fn cross_entropy(logits_bk: &Tensor, targets: &[f32], weights_b: &Tensor) -> Tensor {
    let targets_bk = Tensor::from_slice(targets).view_as(logits_bk).to_device(logits_bk.device());
    let log_bk = logits_bk.to_kind(Kind::Float).log_softmax(-1, None::<Kind>);
    let entropy_b = -(targets_bk * log_bk).sum_dim_intlist(-1, false, None::<Kind>);
    (entropy_b * weights_b).mean(None::<Kind>)
}

#[cfg(test)]
mod tests;
