//! The computation of one slot shape: loss and gradients, on whatever device the weights are.

use std::sync::Arc;

use lacuna_recipe::digest::Crc64;
use lacuna_recipe::init;
use lacuna_recipe::mask::MaskOrder;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::state::Layout;
use lacuna_recipe::step::SlotBatch;
use lacuna_spec::Precision;
use lacuna_worker::engine::EngineError;
use tch::{Device, Kind, Tensor};

use crate::mae::{Mae, Masks, PosTables, mask_sizes};
use crate::runtime;
use crate::weights::{Weights, values, view};

/// Samples of the probe's small slot.
pub(super) const PROBE_BATCH: usize = 4;
/// Seed of the probe's weights, masks and images; part of what a probe class means.
const PROBE_SEED: u64 = 0x1AC0_17A5;

/// The computation of one slot shape.
#[derive(Debug)]
pub(super) struct SlotProgram {
    model: ModelConfig,
    batch: usize,
    device: Device,
    precision: Precision,
    pub layout: Arc<Layout>,
    tables: PosTables,
    /// Tensors in the order in which the backward pass finishes them.
    completion: Vec<usize>,
}

/// One slot's data, of the slot's shape.
pub(super) struct SlotInput<'a> {
    pub images_bchw: Tensor,
    pub ids_shuffle: &'a [u32],
    pub weights: &'a [f32],
}

impl SlotProgram {
    pub fn new(model: &ModelConfig, batch: usize, device: Device, precision: Precision) -> Self {
        let layout = Layout::new(model.params());
        SlotProgram {
            completion: completion_order(model, &layout),
            tables: PosTables::new(model, Kind::Float).to_device(device),
            layout,
            model: model.clone(),
            batch,
            device,
            precision,
        }
    }

    /// Returns the number of values of a slot's images.
    pub fn n_pixels(&self) -> usize {
        let [height, width] = self.model.img_size;
        self.batch * (self.model.channels * height * width) as usize
    }

    /// Refuses a batch that is not of the slot's shape.
    pub fn check(&self, batch: &SlotBatch) -> Result<(), EngineError> {
        let refuse = |what: String| {
            Err(EngineError::Batch { step: batch.slot.step.0, index: batch.slot.index, what })
        };
        let n_patches = self.model.n_patches();
        let lengths = [
            ("samples", batch.samples.len(), self.batch),
            ("weights", batch.weights.len(), self.batch),
            ("pixel values", batch.pixels.len(), self.n_pixels()),
            ("patch ids", batch.ids_shuffle.len(), self.batch * n_patches),
        ];
        for (what, got, want) in lengths {
            if got != want {
                return refuse(format!("{got} {what}, not {want}"));
            }
        }
        for (sample, ids) in batch.ids_shuffle.chunks_exact(n_patches).enumerate() {
            let mut seen: Vec<bool> = vec![false; n_patches];
            for &id in ids {
                match seen.get_mut(id as usize) {
                    Some(place) if !*place => *place = true,
                    _ => return refuse(format!("sample {sample} does not name each patch once")),
                }
            }
        }
        Ok(())
    }

    /// Computes the loss and the gradient of every tensor, in completion order. All of `input`, the
    /// weights and what comes back is on the program's device; gradients are f32.
    pub fn differentiate(
        &self,
        weights: &Weights,
        input: &SlotInput<'_>,
    ) -> (Tensor, Vec<(usize, Tensor)>) {
        runtime::pin_threads();
        let (len_keep, n_patches) = mask_sizes(&self.model);
        let masks =
            Masks::from_shuffle(input.ids_shuffle, n_patches, len_keep).to_device(self.device);
        let mae = Mae::new(&self.model, &self.tables, weights);
        let weights_b = Tensor::from_slice(input.weights).to_device(self.device);
        let loss = mae.loss(&input.images_bchw, &masks, &weights_b);
        let leaves: Vec<&Tensor> =
            self.completion.iter().map(|&block| &weights.tensors()[block]).collect();
        let grads = Tensor::run_backward(&[&loss], &leaves, false, false);
        let grads = grads.into_iter().map(|grad| grad.to_kind(Kind::Float).contiguous());
        (loss.detach(), self.completion.iter().copied().zip(grads).collect())
    }

    /// Makes leaves of f32 weights: what gradients are taken of, in the slot's precision.
    pub fn leaves(&self, weights: Weights) -> Weights {
        match self.precision {
            Precision::F32 | Precision::Tf32 => weights.trainable(),
            Precision::Bf16 => weights.half_products().trainable(),
        }
    }

    /// Returns the shape of a slot's images, `[b, c, h, w]`.
    pub fn image_shape(&self) -> [i64; 4] {
        let [height, width] = self.model.img_size.map(i64::from);
        [self.batch as i64, i64::from(self.model.channels), height, width]
    }

    /// Computes a slot of fixed weights, images and masks and digests loss and gradients.
    pub fn probe(&self) -> Crc64 {
        let mut param: Vec<f32> = vec![0.0; self.layout.numel()];
        for (block, spec) in self.layout.params().iter().enumerate() {
            init::fill(spec, PROBE_SEED, &mut param[self.layout.range(block)]);
        }
        let mut word = PROBE_SEED;
        let mut pixel = || {
            // An additive generator: its high bits fill the range evenly.
            word = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
            ((word >> 40) as f32 / (1u32 << 22) as f32) - 2.0
        };
        let images: Vec<f32> = (0..self.n_pixels()).map(|_| pixel()).collect();
        let n_patches = self.model.n_patches();
        let order = |i: usize| MaskOrder::draw(PROBE_SEED, 0, i as u64, n_patches).ids_shuffle;
        let ids_shuffle: Vec<u32> = (0..self.batch).flat_map(order).collect();
        let weights: Vec<f32> = vec![1.0; self.batch];
        // SAFETY: `images` lives until this function returns, and the graph does not.
        let images_bchw = unsafe { view(&images, &self.image_shape()) }.to_device(self.device);
        let input = SlotInput { images_bchw, ids_shuffle: &ids_shuffle, weights: &weights };
        let copy = self.leaves(Weights::copy_of(&self.layout, &param).to_device(self.device));
        let (loss, grads) = self.differentiate(&copy, &input);
        let digest = |sum: Crc64, grad: &(usize, Tensor)| {
            sum.then(Crc64::of_f32(values(&grad.1.to_device(Device::Cpu))))
        };
        grads.iter().fold(Crc64::of_f32(&[loss.double_value(&[]) as f32]), digest)
    }
}

/// Lists the tensors in the order in which the backward pass finishes them: last used, first done.
pub(super) fn completion_order(model: &ModelConfig, layout: &Layout) -> Vec<usize> {
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
