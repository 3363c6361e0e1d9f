//! The computation of one slot shape: loss and gradients, on whatever device the weights are.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::sync::Arc;

use lacuna_recipe::digest::Crc64;
use lacuna_recipe::init;
use lacuna_recipe::mask::MaskOrder;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::philox::{Draws, Tag};
use lacuna_recipe::state::Layout;
use lacuna_recipe::step::SlotBatch;
use lacuna_spec::Precision;
use lacuna_types::SampleId;
use lacuna_worker::engine::{EngineError, Yardstick};
use tch::{Device, Kind, Tensor};

use super::{guarded, yardstick};
use crate::autograd::{self, Pieces, Recorded};
use crate::objective::{Objective, Slot, SlotLoss};
use crate::runtime;
use crate::weights::{Weights, values};

/// Samples of the probe's small slot.
const PROBE_BATCH: usize = 4;
/// Samples that show the order of gradients.
const OBSERVED_BATCH: usize = 2;
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
    objective: Arc<dyn Objective>,
    loss: Box<dyn SlotLoss>,
    /// Tensors in the order in which the backward pass finishes them.
    completion: Vec<usize>,
    /// How backward passes are cut, once a slot has shown it; `None` where they are not.
    pieces: OnceCell<Option<Pieces>>,
}

/// One slot's data, of the slot's shape.
pub(super) struct SlotInput<'a> {
    pub images_bchw: Tensor,
    pub ids_shuffle: &'a [u32],
    pub weights: &'a [f32],
    pub draws: Vec<Draws>,
    pub labels: &'a [Option<u32>],
}

/// Returns the random numbers of a slot's samples.
pub(super) fn draws_of(seed: u64, batch: &SlotBatch) -> Vec<Draws> {
    // A sample is in a step once. Runs end before 2^32 steps.
    let draws = |sample: &SampleId| Draws::new(seed, Tag::User, batch.slot.step.0 as u32, sample.0);
    batch.samples.iter().map(draws).collect()
}

/// Takes an image `[h, w, c]` apart into planes `[c, h, w]`.
fn to_planes(image: &[u8], channels: usize, planes: &mut [u8]) {
    for (c, plane) in planes.chunks_exact_mut(image.len() / channels).enumerate() {
        for (to, pixel) in plane.iter_mut().zip(image.chunks_exact(channels)) {
            *to = pixel[c];
        }
    }
}

/// Puts planes together again.
fn from_planes(planes: &[u8], channels: usize, image: &mut [u8]) {
    for (c, plane) in planes.chunks_exact(image.len() / channels).enumerate() {
        for (pixel, from) in image.chunks_exact_mut(channels).zip(plane) {
            pixel[c] = *from;
        }
    }
}

impl SlotProgram {
    pub fn new(
        objective: &Arc<dyn Objective>,
        model: &ModelConfig,
        batch: usize,
        device: Device,
        precision: Precision,
    ) -> Self {
        let layout = Layout::new(objective.params(model));
        let all: Vec<usize> = (0..layout.n_blocks()).collect();
        let known = objective.completion(model, &layout);
        let mut program = SlotProgram {
            pieces: OnceCell::new(),
            completion: known.clone().unwrap_or_else(|| all.clone()),
            loss: objective.prepare(model, device),
            objective: objective.clone(),
            layout,
            model: model.clone(),
            batch,
            device,
            precision,
        };
        if known.is_none() {
            program.completion = program.observed_completion();
        }
        let mut sorted = program.completion.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, all, "`completion` of an objective lists each tensor once");
        program
    }

    /// Finds the order in which a backward pass finishes the tensors, in one over made-up samples;
    /// the reverse of the layout's where passes cannot be cut. It is the same on every worker: it
    /// depends on which operations there are, and not on values.
    fn observed_completion(&self) -> Vec<usize> {
        let made_up = MadeUp::new(self, self.batch.min(OBSERVED_BATCH));
        let weights = self.leaves(made_up.weights(self));
        let leaves: Vec<&Tensor> = weights.tensors().iter().collect();
        let input = made_up.input(self);
        let slot = self.slot(&input);
        let recorded = autograd::record(|| self.loss.loss(&weights, &slot));
        let found = Pieces::find(&recorded, &leaves).unwrap_or_else(|error| {
            tracing::debug!(%error, "the order of gradients was not found");
            None
        });
        match found {
            Some(pieces) => pieces.order(),
            None => (0..self.layout.n_blocks()).rev().collect(),
        }
    }

    /// Measures what images a second are compared with, where an image's FLOPs are known.
    pub fn yardstick(&self) -> Result<Option<Yardstick>, EngineError> {
        let Some(flops_per_image) = self.objective.train_flops(&self.model) else {
            return Ok(None);
        };
        let peak = guarded("multiply large matrices", || {
            yardstick::products_per_second(self.device, self.precision)
        })?;
        Ok(Some(Yardstick { flops_per_image, peak }))
    }

    /// Leaves the backward pass whole.
    #[cfg(test)]
    pub fn uncut(mut self) -> Self {
        self.pieces = OnceCell::from(None);
        self
    }

    /// Tells into how many pieces backward passes are cut, once a slot was computed.
    #[cfg(test)]
    pub fn n_pieces(&self) -> usize {
        self.pieces.get().and_then(Option::as_ref).map_or(1, Pieces::len)
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
            ("labels", batch.labels.len(), self.batch),
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

    /// Returns the slot's bytes as the objective wants to see them.
    pub fn augmented<'a>(&self, batch: &'a SlotBatch, draws: &[Draws]) -> Cow<'a, [u8]> {
        if !self.objective.augments() {
            return Cow::Borrowed(&batch.pixels);
        }
        let mut pixels = batch.pixels.clone();
        let [height, width] = self.model.img_size.map(|side| side as usize);
        let channels = self.model.channels as usize;
        let mut planes = vec![0; self.n_pixels() / self.batch];
        for (image, draws) in pixels.chunks_exact_mut(planes.len()).zip(draws) {
            to_planes(image, channels, &mut planes);
            self.objective.augment(&mut planes, [height, width], draws);
            from_planes(&planes, channels, image);
        }
        Cow::Owned(pixels)
    }

    /// Returns the tensors in the order in which the backward pass finishes them.
    pub fn completion(&self) -> &[usize] {
        &self.completion
    }

    /// Computes the loss, and calls `sink` with each tensor and its gradient as the backward pass
    /// finishes it. All of `input`, the weights and what comes back is on the program's device;
    /// gradients are f32.
    pub fn differentiate(
        &self,
        weights: &Weights,
        input: &SlotInput<'_>,
        sink: &mut dyn FnMut(usize, Tensor),
    ) -> Tensor {
        runtime::pin_threads();
        let slot = self.slot(input);
        let leaves: Vec<&Tensor> =
            self.completion.iter().map(|&block| &weights.tensors()[block]).collect();
        let compute = || self.loss.loss(weights, &slot);
        let mut hand_over = |leaf: usize, grad: Tensor| {
            sink(self.completion[leaf], grad.to_kind(Kind::Float).contiguous());
        };
        let pieces = self.pieces.get_or_init(|| find_pieces(compute, &leaves)).as_ref();
        let recorded = pieces.map(|pieces| (pieces, autograd::record(compute)));
        // A loss that goes another way this time has a pass of its own, in one piece.
        let fits = |cut: &(&Pieces, Recorded)| cut.0.fit(&cut.1);
        if let Some((pieces, recorded)) = recorded.filter(fits) {
            let loss = recorded.loss.detach();
            let done = pieces.backward(recorded, &leaves, &mut hand_over);
            done.unwrap_or_else(|err| panic!("{err}"));
            return loss;
        }
        let loss = compute();
        let grads = Tensor::run_backward(&[&loss], &leaves, false, false);
        grads.into_iter().enumerate().for_each(|(leaf, grad)| hand_over(leaf, grad));
        loss.detach()
    }

    /// Puts a slot's data where the weights are.
    fn slot<'a>(&self, input: &'a SlotInput<'_>) -> Slot<'a> {
        Slot {
            images_bchw: input.images_bchw.shallow_clone(),
            weights_b: Tensor::from_slice(input.weights).to_device(self.device),
            weights: input.weights,
            ids_shuffle: input.ids_shuffle,
            draws: &input.draws,
            labels: input.labels,
        }
    }

    /// Predicts the patches of any number of images, on the host; nothing where the objective
    /// predicts no pixels.
    pub fn predict(&self, weights: &Weights, input: &SlotInput<'_>) -> Option<Vec<f32>> {
        runtime::pin_threads();
        let slot = self.slot(input);
        let pred_blp = tch::no_grad(|| self.loss.predict(weights, &slot))?;
        let pred_blp = pred_blp.to_kind(Kind::Float).to_device(Device::Cpu).contiguous();
        Some(values::<f32>(&pred_blp).to_vec())
    }

    /// Makes leaves of f32 weights: what gradients are taken of, in the slot's precision.
    pub fn leaves(&self, weights: Weights) -> Weights {
        match self.precision {
            Precision::F32 | Precision::Tf32 => weights.trainable(),
            Precision::Bf16 => weights.half_products().trainable(),
        }
    }

    /// Returns the device that slots are computed on.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Returns the shape of a slot's images, `[b, c, h, w]`.
    pub fn image_shape(&self) -> [i64; 4] {
        let [height, width] = self.model.img_size.map(i64::from);
        [self.batch as i64, i64::from(self.model.channels), height, width]
    }

    /// Computes slots of fixed weights, images and masks, one of a small model and one of these
    /// shapes, and digests losses and gradients.
    pub fn probe(&self) -> Crc64 {
        let micro = ModelConfig::preset("micro").expect("`micro` is a preset");
        let (device, precision) = (self.device, self.precision);
        let small = SlotProgram::new(&self.objective, &micro, PROBE_BATCH, device, precision);
        small.probe_slot().then(self.probe_slot())
    }

    /// Computes a slot of fixed weights, images and masks and digests loss and gradients.
    pub fn probe_slot(&self) -> Crc64 {
        let made_up = MadeUp::new(self, self.batch);
        let copy = self.leaves(made_up.weights(self));
        let mut digests: Vec<Crc64> = vec![Crc64::default(); self.layout.n_blocks()];
        let loss = self.differentiate(&copy, &made_up.input(self), &mut |block, grad| {
            digests[block] = Crc64::of_f32(values(&grad.to_device(Device::Cpu)));
        });
        let loss = Crc64::of_f32(&[loss.double_value(&[]) as f32]);
        self.completion.iter().fold(loss, |sum, &block| sum.then(digests[block]))
    }
}

/// A slot of fixed weights, images and masks.
struct MadeUp {
    images: Vec<f32>,
    shape: [i64; 4],
    ids_shuffle: Vec<u32>,
    weights: Vec<f32>,
    labels: Vec<Option<u32>>,
}

impl MadeUp {
    fn new(program: &SlotProgram, batch: usize) -> Self {
        let mut word = PROBE_SEED;
        let mut pixel = || {
            // An additive generator: its high bits fill the range evenly.
            word = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
            ((word >> 40) as f32 / (1u32 << 22) as f32) - 2.0
        };
        let n_pixels = program.n_pixels() / program.batch * batch;
        let n_patches = program.model.n_patches();
        let order = |i: usize| MaskOrder::draw(PROBE_SEED, 0, i as u64, n_patches).ids_shuffle;
        let [_, channels, height, width] = program.image_shape();
        MadeUp {
            images: (0..n_pixels).map(|_| pixel()).collect(),
            shape: [batch as i64, channels, height, width],
            ids_shuffle: (0..batch).flat_map(order).collect(),
            weights: vec![1.0; batch],
            labels: (0..batch as u32).map(|i| Some(i % 2)).collect(),
        }
    }

    /// Returns the parameters that a run of this seed begins with, on the program's device.
    fn weights(&self, program: &SlotProgram) -> Weights {
        let layout = &program.layout;
        let mut param: Vec<f32> = vec![0.0; layout.numel()];
        for (block, spec) in layout.params().iter().enumerate() {
            init::fill(spec, PROBE_SEED, &mut param[layout.range(block)]);
        }
        Weights::copy_of(layout, &param).to_device(program.device)
    }

    /// Returns what `program` computes from.
    fn input(&self, program: &SlotProgram) -> SlotInput<'_> {
        let draws = |i: usize| Draws::new(PROBE_SEED, Tag::User, 0, i as u64);
        SlotInput {
            images_bchw: Tensor::from_slice(&self.images)
                .view(self.shape)
                .to_device(program.device),
            ids_shuffle: &self.ids_shuffle,
            weights: &self.weights,
            draws: (0..self.weights.len()).map(draws).collect(),
            labels: &self.labels,
        }
    }
}

/// Finds how the passes of a computation are cut, on two of them that nobody needs. Where cutting
/// does not work, whatever the reason, passes stay whole.
fn find_pieces(compute: impl Fn() -> Tensor, leaves: &[&Tensor]) -> Option<Pieces> {
    let find = || {
        let Some(pieces) = Pieces::find(&autograd::record(&compute), leaves)? else {
            return Ok(None);
        };
        pieces.backward(autograd::record(&compute), leaves, &mut |_, _| {})?;
        Ok::<_, autograd::AutogradError>(Some(pieces))
    };
    let found = find();
    if let Err(error) = &found {
        tracing::debug!(%error, "backward passes stay whole");
    }
    found.ok().flatten()
}
