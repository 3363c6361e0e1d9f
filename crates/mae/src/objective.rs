//! What a run learns: which parameters there are, and what loss a slot has.
//!
//! Everything else (order of samples, exact sums, the optimizer, membership, checkpoints) works for
//! any objective that keeps the contract of [`SlotLoss`]. [`MaeObjective`] is the one of
//! `lacuna-worker`; docs/extending.md shows how to write another.

use std::fmt;

use lacuna_recipe::model::{ModelConfig, ParamSpec};
use lacuna_recipe::philox::Draws;
use lacuna_recipe::state::Layout;
use tch::{Device, Kind, Tensor};

use crate::mae::{Mae, Masks, PosTables, mask_sizes};
use crate::weights::Weights;

/// A way to learn from images.
pub trait Objective: fmt::Debug + Send + Sync {
    /// Lists the parameters for `model`, sorted by name. The encoder's should have the names of
    /// [`ModelConfig::params`], so that it can be exported.
    fn params(&self, model: &ModelConfig) -> Vec<ParamSpec>;

    /// Prepares slots of `model` on `device`: what does not change from slot to slot is made here.
    fn prepare(&self, model: &ModelConfig, device: Device) -> Box<dyn SlotLoss>;

    /// Tells whether [`augment`](Self::augment) does anything.
    fn augments(&self) -> bool {
        false
    }

    /// Changes the bytes of an image of `[height, width]` pixels, planes of channels one after
    /// another, before they are normalised; `draws` are those of the sample. It is a function of
    /// its arguments alone.
    fn augment(&self, _image: &mut [u8], _size: [usize; 2], _draws: &Draws) {}

    /// Returns the FLOPs of one image's forward and backward pass, a multiply-add counted as two;
    /// where it says nothing, no utilisation (MFU) is shown.
    fn train_flops(&self, _model: &ModelConfig) -> Option<f64> {
        None
    }

    /// Lists the tensors of `layout` in the order in which a backward pass finishes them; each
    /// once. It changes no bit: sums of tensors that come early leave early. Where it says nothing,
    /// a pass over two made-up samples shows the order.
    fn completion(&self, _model: &ModelConfig, _layout: &Layout) -> Option<Vec<usize>> {
        None
    }
}

/// The loss of slots of one shape.
pub trait SlotLoss: fmt::Debug + Send {
    /// Computes the loss of a slot, a scalar of f32 that backward passes can start from.
    ///
    /// It is a function of `weights` and `slot` alone: no state, no clock, no other random numbers
    /// than `slot.draws`. It is a mean over the samples of the slot, in which a sample of weight 0
    /// adds nothing and still counts in the divisor. Every parameter takes part in it.
    ///
    /// **Weights and images are views of memory that changes after the call**: no tensor that
    /// shares it may be kept (keep a copy), and none may be written to in place.
    fn loss(&self, weights: &Weights, slot: &Slot<'_>) -> Tensor;

    /// Predicts every patch of the images from those that `slot.ids_shuffle` keeps, for pictures:
    /// `[b, n_patches, patch values]` in raster order and in the units of the loss. The images are
    /// not as many as a slot's. Nothing where the objective predicts no pixels.
    fn predict(&self, _weights: &Weights, _slot: &Slot<'_>) -> Option<Tensor> {
        None
    }
}

/// The samples of a slot; tensors are on the device of the weights.
#[derive(Debug)]
pub struct Slot<'a> {
    /// Normalised images, `[b, c, h, w]`.
    pub images_bchw: Tensor,
    /// 1, or 0 for a bad sample, `[b]`.
    pub weights_b: Tensor,
    /// The same weights on the host.
    pub weights: &'a [f32],
    /// Patches of each sample in shuffled order, `[b, n_patches]`; MAE keeps the first ones.
    pub ids_shuffle: &'a [u32],
    /// Random numbers of each sample, `[b]`: a function of (seed, step, sample).
    pub draws: &'a [Draws],
    /// Class of each image, `[b]`, where the data has one.
    pub labels: &'a [Option<u32>],
}

impl Slot<'_> {
    /// Returns which patches of each sample are kept, of `model`'s number, as
    /// [`ids_shuffle`](Self::ids_shuffle) says.
    pub fn masks(&self, model: &ModelConfig) -> Masks {
        self.masks_of(model, self.ids_shuffle)
    }

    /// The same for other permutations `[b, n_patches]`.
    pub fn masks_of(&self, model: &ModelConfig, ids_shuffle: &[u32]) -> Masks {
        let (len_keep, n_patches) = mask_sizes(model);
        Masks::from_shuffle(ids_shuffle, n_patches, len_keep).to_device(self.images_bchw.device())
    }
}

/// The masked autoencoder of the paper.
#[derive(Clone, Copy, Debug)]
pub struct MaeObjective;

impl Objective for MaeObjective {
    fn params(&self, model: &ModelConfig) -> Vec<ParamSpec> {
        model.params()
    }

    fn prepare(&self, model: &ModelConfig, device: Device) -> Box<dyn SlotLoss> {
        let tables = PosTables::new(model, Kind::Float).to_device(device);
        Box::new(MaeLoss { model: model.clone(), tables })
    }

    fn completion(&self, model: &ModelConfig, layout: &Layout) -> Option<Vec<usize>> {
        Some(completion_order(model, layout))
    }

    fn train_flops(&self, model: &ModelConfig) -> Option<f64> {
        Some(model.train_flops())
    }
}

#[derive(Debug)]
struct MaeLoss {
    model: ModelConfig,
    tables: PosTables,
}

impl SlotLoss for MaeLoss {
    fn loss(&self, weights: &Weights, slot: &Slot<'_>) -> Tensor {
        let mae = Mae::new(&self.model, &self.tables, weights);
        mae.loss(&slot.images_bchw, &slot.masks(&self.model), &slot.weights_b)
    }

    fn predict(&self, weights: &Weights, slot: &Slot<'_>) -> Option<Tensor> {
        let mae = Mae::new(&self.model, &self.tables, weights);
        Some(mae.predict(&slot.images_bchw, &slot.masks(&self.model)).pred_blp)
    }
}

/// Lists the tensors in the order in which the backward pass finishes them: last used, first done.
fn completion_order(model: &ModelConfig, layout: &Layout) -> Vec<usize> {
    let mut names: Vec<String> = vec!["patch_embed.proj".into(), "cls_token".into()];
    let mut blocks = |prefix: &str, depth: u32, before: &[&str], after: &[&str]| {
        let parts = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"];
        names.extend(before.iter().map(ToString::to_string));
        for i in 0..depth {
            names.extend(parts.iter().map(|part| format!("{prefix}.{i}.{part}")));
        }
        names.extend(after.iter().map(ToString::to_string));
    };
    blocks("blocks", model.depth, &[], &["norm"]);
    let (before, after) = (["decoder_embed", "mask_token"], ["decoder_norm", "decoder_pred"]);
    blocks("decoder_blocks", model.decoder_depth, &before, &after);
    let find = |name: &String| {
        let whole = layout.find(name);
        let parts = ["bias", "weight"].map(|part| layout.find(&format!("{name}.{part}")));
        whole.into_iter().chain(parts.into_iter().flatten())
    };
    let order: Vec<usize> = names.iter().rev().flat_map(find).collect();
    assert_eq!(order.len(), layout.n_blocks(), "each tensor of the layout is listed once");
    order
}
