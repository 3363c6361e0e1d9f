//! The engine that trains with libtorch, on a CPU or a CUDA device.

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use lacuna_recipe::digest::Crc64;
use lacuna_recipe::init;
use lacuna_recipe::mask::MaskOrder;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::reduce::SlotGrad;
use lacuna_recipe::state::{Layout, Section, TensorDigests};
use lacuna_recipe::step::{Normalize, SlotBatch};
use lacuna_worker::cpu_state::CpuState;
use lacuna_worker::engine::{Engine, EngineError, UpdateScalars};
use tch::{Device, Kind, Tensor};

use crate::mae::{Mae, Masks, PosTables, mask_sizes};
use crate::runtime;
use crate::weights::{Weights, values, view};

/// What an engine is built from.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineSetup {
    /// Sizes of the model, without problems.
    pub model: ModelConfig,
    /// Seed of the run; decides the initial weights.
    pub seed: u64,
    /// Mean of each channel, in units of full brightness.
    pub mean: Vec<f64>,
    /// Standard deviation of each channel, in units of full brightness.
    pub std: Vec<f64>,
    /// Samples of a slot.
    pub slot_batch: u32,
}

/// A setup that no engine can be built from.
#[derive(Debug, thiserror::Error)]
pub enum BuildEngineError {
    /// The model's sizes do not fit together.
    #[error("the model cannot be built: {problems}")]
    Model {
        /// All problems, separated by semicolons.
        problems: String,
    },
    /// The normalisation does not name every channel once.
    #[error("`mean` has {mean} values and `std` {std}; both need one per channel, {channels}")]
    Channels {
        /// Values of `mean`.
        mean: usize,
        /// Values of `std`.
        std: usize,
        /// Channels of the model.
        channels: u32,
    },
    /// The slot is empty.
    #[error("`slot_batch` must be positive")]
    EmptySlot,
}

/// MAE on libtorch, in f32, on one CPU thread or one device.
///
/// Parameters and moments are plain memory of Rust that the optimizer updates in place. On a CPU
/// libtorch reads the parameters through views and owns only what a slot needs. A device gets a
/// copy of them after each update, and gradients come back slot by slot: so the sums and the update
/// are the same code, and the same bits, wherever gradients come from.
#[derive(Debug)]
pub struct TorchEngine {
    setup: EngineSetup,
    state: CpuState,
    slot: SlotProgram,
    /// The parameters on the device while they are those of `state`; never on a CPU.
    resident: Option<Weights>,
    normalize: Normalize,
    /// Normalised images of the slot, `[b, c, h, w]`.
    images: Vec<f32>,
    /// The probe's digest once it is known: it depends on the shapes and not on the state.
    probe: Option<u64>,
}

impl TorchEngine {
    /// Builds an engine on the CPU, with the initial state of the setup's seed.
    pub fn new(setup: EngineSetup) -> Result<Self, BuildEngineError> {
        let missing = runtime::missing_pins();
        if !missing.is_empty() {
            tracing::warn!(?missing, "process started without the pins that fix a CPU's bits");
        }
        Self::build(setup, Place::Host)
    }

    /// Builds an engine that computes on `device`, which must be ready
    /// ([`load`](crate::cuda::load), [`set_kernels`](crate::context::set_kernels)).
    pub fn on_device(setup: EngineSetup, device: Device) -> Result<Self, BuildEngineError> {
        Self::build(setup, Place::Device(device))
    }

    fn build(setup: EngineSetup, place: Place) -> Result<Self, BuildEngineError> {
        check_setup(&setup)?;
        runtime::pin_threads();
        let slot = SlotProgram::new(&setup.model, setup.slot_batch as usize, place);
        Ok(TorchEngine {
            resident: None,
            state: CpuState::fresh(slot.layout.clone(), setup.seed),
            normalize: Normalize::new(&setup.mean, &setup.std),
            images: vec![0.0; slot.n_pixels()],
            probe: None,
            slot,
            setup,
        })
    }

    /// Returns the sizes of the model.
    pub fn model(&self) -> &ModelConfig {
        &self.setup.model
    }

    /// Returns the current parameters, flat in [`Layout`] order.
    pub fn params(&self) -> &[f32] {
        self.state.section(Section::Param)
    }
}

impl Engine for TorchEngine {
    fn layout(&self) -> &Arc<Layout> {
        self.state.layout()
    }

    fn slot(
        &mut self,
        batch: &SlotBatch,
        sink: &mut dyn FnMut(SlotGrad<'_>),
    ) -> Result<f32, EngineError> {
        self.slot.check(batch)?;
        let [height, width] = self.setup.model.img_size;
        self.normalize.apply(&batch.pixels, (height * width) as usize, &mut self.images);
        let input = SlotInput {
            images: &self.images,
            ids_shuffle: &batch.ids_shuffle,
            weights: &batch.weights,
        };
        let param = self.state.section(Section::Param);
        let (slot, resident) = (&self.slot, &mut self.resident);
        let (loss, grads) = guarded("compute a slot", || slot.run(param, resident, &input))?;
        for (block, grad) in grads {
            sink(SlotGrad { block, values: values(&grad) });
        }
        Ok(loss)
    }

    fn apply(&mut self, mean: &[f32], update: &UpdateScalars) -> Result<(), EngineError> {
        self.resident = None;
        self.state.apply(mean, update);
        Ok(())
    }

    fn read(
        &self,
        section: Section,
        range: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), EngineError> {
        out.copy_from_slice(&self.state.section(section)[range]);
        Ok(())
    }

    fn write(&mut self, section: Section, at: usize, values: &[f32]) -> Result<(), EngineError> {
        self.resident = None;
        self.state.section_mut(section)[at..at + values.len()].copy_from_slice(values);
        Ok(())
    }

    fn tensor_digests(&self) -> Result<Vec<TensorDigests>, EngineError> {
        Ok(self.state.tensor_digests())
    }

    fn probe(&mut self) -> Result<u64, EngineError> {
        if let Some(digest) = self.probe {
            return Ok(digest);
        }
        let micro = ModelConfig::preset("micro").expect("`micro` is a preset");
        let digest = guarded("compute the probe", || {
            let small = SlotProgram::new(&micro, PROBE_BATCH, self.slot.place).probe();
            small.then(self.slot.probe())
        })?;
        self.probe = Some(digest.value);
        Ok(digest.value)
    }

    fn describe(&self) -> String {
        match self.slot.place {
            Place::Host => runtime::describe_cpu(),
            Place::Device(device) => {
                format!("{device:?} (libtorch {}, f32)", runtime::library_version())
            }
        }
    }
}

/// Where slots are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// On the CPU, from the host's memory.
    Host,
    /// On a device, from copies.
    Device(Device),
}

impl Place {
    fn device(self) -> Device {
        match self {
            Self::Host => Device::Cpu,
            Self::Device(device) => device,
        }
    }
}

/// Samples of the probe's small slot.
const PROBE_BATCH: usize = 4;
/// Seed of the probe's weights, masks and images; part of what a probe class means.
const PROBE_SEED: u64 = 0x1AC0_17A5;

/// The computation of one slot shape.
#[derive(Debug)]
struct SlotProgram {
    model: ModelConfig,
    batch: usize,
    place: Place,
    layout: Arc<Layout>,
    tables: PosTables,
    /// Tensors in the order in which the backward pass finishes them.
    completion: Vec<usize>,
}

/// One slot's data; every slice has the slot's shape.
struct SlotInput<'a> {
    images: &'a [f32],
    ids_shuffle: &'a [u32],
    weights: &'a [f32],
}

impl SlotProgram {
    fn new(model: &ModelConfig, batch: usize, place: Place) -> Self {
        let layout = Layout::new(model.params());
        SlotProgram {
            completion: completion_order(model, &layout),
            tables: PosTables::new(model, Kind::Float).to_device(place.device()),
            layout,
            model: model.clone(),
            batch,
            place,
        }
    }

    fn n_pixels(&self) -> usize {
        let [height, width] = self.model.img_size;
        self.batch * (self.model.channels * height * width) as usize
    }

    /// Refuses a batch that is not of the slot's shape.
    fn check(&self, batch: &SlotBatch) -> Result<(), EngineError> {
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

    /// Computes the loss and the gradient of every tensor, in completion order, on the host.
    ///
    /// `resident` keeps the parameters on a device from slot to slot; where it is empty it gets
    /// `param`, which must be what it holds otherwise.
    fn run(
        &self,
        param: &[f32],
        resident: &mut Option<Weights>,
        input: &SlotInput<'_>,
    ) -> (f32, Vec<(usize, Tensor)>) {
        match self.place {
            Place::Host => {
                // SAFETY: `param` is borrowed until this function returns, and the graph is gone
                // by then; gradients have storage of their own.
                let weights = unsafe { Weights::view_of(&self.layout, param).trainable() };
                self.differentiate(&weights, input)
            }
            Place::Device(device) => {
                let copy = || Weights::copy_to(&self.layout, param, device).trainable();
                self.differentiate(resident.get_or_insert_with(copy), input)
            }
        }
    }

    fn differentiate(
        &self,
        weights: &Weights,
        input: &SlotInput<'_>,
    ) -> (f32, Vec<(usize, Tensor)>) {
        runtime::pin_threads();
        let device = self.place.device();
        let [height, width] = self.model.img_size.map(i64::from);
        let shape = [self.batch as i64, i64::from(self.model.channels), height, width];
        // SAFETY: `input` is borrowed until this function returns, which drops the graph;
        // gradients have storage of their own.
        let images_bchw = unsafe { view(input.images, &shape) }.to_device(device);
        let (len_keep, n_patches) = mask_sizes(&self.model);
        let masks = Masks::from_shuffle(input.ids_shuffle, n_patches, len_keep).to_device(device);
        let mae = Mae::new(&self.model, &self.tables, weights);
        let weights_b = Tensor::from_slice(input.weights).to_device(device);
        let loss = mae.loss(&images_bchw, &masks, &weights_b);
        let leaves: Vec<&Tensor> =
            self.completion.iter().map(|&block| &weights.tensors()[block]).collect();
        let grads = Tensor::run_backward(&[&loss], &leaves, false, false);
        let grads = grads.into_iter().map(|grad| grad.contiguous().to_device(Device::Cpu));
        let loss = loss.double_value(&[]) as f32;
        (loss, self.completion.iter().copied().zip(grads).collect())
    }

    /// Computes a slot of fixed weights, images and masks and digests loss and gradients.
    fn probe(&self) -> Crc64 {
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
        let input = SlotInput { images: &images, ids_shuffle: &ids_shuffle, weights: &weights };
        let (loss, grads) = self.run(&param, &mut None, &input);
        let digest = |sum: Crc64, grad: &(usize, Tensor)| sum.then(Crc64::of_f32(values(&grad.1)));
        grads.iter().fold(Crc64::of_f32(&[loss]), digest)
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

fn check_setup(setup: &EngineSetup) -> Result<(), BuildEngineError> {
    let problems = setup.model.problems();
    if !problems.is_empty() {
        let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
        return Err(BuildEngineError::Model { problems: problems.join("; ") });
    }
    let (mean, std, channels) = (setup.mean.len(), setup.std.len(), setup.model.channels);
    if mean != channels as usize || std != channels as usize {
        return Err(BuildEngineError::Channels { mean, std, channels });
    }
    if setup.slot_batch == 0 {
        return Err(BuildEngineError::EmptySlot);
    }
    Ok(())
}

/// Turns a failure inside libtorch, which tch reports by panicking, into an error.
fn guarded<T>(context: &str, f: impl FnOnce() -> T) -> Result<T, EngineError> {
    std::panic::catch_unwind(AssertUnwindSafe(f)).map_err(|payload| {
        let text = match (payload.downcast_ref::<String>(), payload.downcast_ref::<&str>()) {
            (Some(text), _) => text.clone(),
            (None, Some(text)) => (*text).to_string(),
            (None, None) => "a panic without a message".to_string(),
        };
        EngineError::Device { context: format!("failed to {context}"), source: text.into() }
    })
}

#[cfg(test)]
mod tests;
