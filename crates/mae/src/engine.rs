//! The engines that train with libtorch: [`TorchEngine`] on a CPU, [`DeviceTorchEngine`] on a
//! device.

mod device;
mod picture;
mod slot;
mod task;
mod yardstick;

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use lacuna_cuda::Device as CudaDevice;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::reduce::SlotGrad;
use lacuna_recipe::state::{Layout, Section, TensorDigests};
use lacuna_recipe::step::{Normalize, SlotBatch};
use lacuna_spec::Precision;
use lacuna_worker::cpu_state::CpuState;
use lacuna_worker::engine::{Engine, EngineError, Picture, UpdateScalars, Yardstick};
use tch::Device;

pub use device::{DevicePlace, DeviceTorchEngine};
use slot::{SlotInput, SlotProgram, draws_of};
pub use task::TaskEngine;

use crate::objective::{MaeObjective, Objective};
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
    /// Arithmetic of forward and backward passes.
    pub precision: Precision,
}

/// Where a [`TorchEngine`] computes slots.
#[derive(Debug)]
pub enum Place {
    /// On the parameters themselves.
    Here,
    /// On this device, on copies of them; with the card, where it is one of CUDA's.
    There(Device, Option<CudaDevice>),
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
    /// The precision is one of CUDA devices.
    #[error("`train.precision` = \"tf32\" needs a CUDA device; a CPU has f32 and bf16")]
    NoTf32,
    /// The slot is empty.
    #[error("`slot_batch` must be positive")]
    EmptySlot,
}

/// An objective on libtorch whose state and updates are on the host, on one CPU thread.
///
/// Parameters and moments are plain memory of Rust that the optimizer updates in place; libtorch
/// reads the parameters through views and owns only what a slot needs. Where [`Place::There`] says
/// so, slots are computed on a device, on copies of the parameters.
#[derive(Debug)]
pub struct TorchEngine {
    setup: EngineSetup,
    /// Its first tensors are the objective's; a task may keep more behind them.
    state: CpuState,
    slot: SlotProgram,
    normalize: Normalize,
    /// Normalised images of the slot, `[b, c, h, w]`.
    images: Vec<f32>,
    /// Copies of the parameters where slots are computed elsewhere than on them; none before the
    /// first slot after a change.
    there: Option<Option<Weights>>,
    /// The card, where one computes.
    card: Option<CudaDevice>,
}

impl TorchEngine {
    /// Builds an engine that trains the masked autoencoder, with the initial state of the setup's
    /// seed.
    pub fn new(setup: EngineSetup) -> Result<Self, BuildEngineError> {
        let mae: Arc<dyn Objective> = Arc::new(MaeObjective);
        TorchEngine::with_objective(setup, &mae)
    }

    /// The same for another objective.
    pub fn with_objective(
        setup: EngineSetup,
        objective: &Arc<dyn Objective>,
    ) -> Result<Self, BuildEngineError> {
        TorchEngine::at(setup, objective, Place::Here)
    }

    /// The same with slots computed at a place.
    pub fn at(
        setup: EngineSetup,
        objective: &Arc<dyn Objective>,
        place: Place,
    ) -> Result<Self, BuildEngineError> {
        let (device, there, card) = match place {
            Place::Here => (Device::Cpu, None, None),
            Place::There(device, card) => (device, Some(None), card),
        };
        let missing = runtime::missing_pins();
        if there.is_none() && !missing.is_empty() {
            tracing::warn!(?missing, "process started without the pins that fix a CPU's bits");
        }
        check_setup(&setup)?;
        runtime::pin_threads();
        if setup.precision == Precision::Tf32 && device == Device::Cpu {
            return Err(BuildEngineError::NoTf32);
        }
        let (batch, precision) = (setup.slot_batch as usize, setup.precision);
        let slot = SlotProgram::new(objective, &setup.model, batch, device, precision);
        Ok(TorchEngine {
            state: CpuState::fresh(slot.layout.clone(), setup.seed),
            normalize: Normalize::new(&setup.mean, &setup.std),
            images: vec![0.0; slot.n_pixels()],
            there,
            card,
            slot,
            setup,
        })
    }

    /// Has the parameters copied again before the next slot: they have changed.
    fn changed(&mut self) {
        if let Some(copies) = &mut self.there {
            *copies = None;
        }
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

    fn completion(&self) -> Vec<usize> {
        self.slot.completion().to_vec()
    }

    fn slot(
        &mut self,
        batch: &SlotBatch,
        sink: &mut dyn FnMut(SlotGrad<'_>),
    ) -> Result<f32, EngineError> {
        self.slot.check(batch)?;
        let [height, width] = self.setup.model.img_size;
        let draws = draws_of(self.setup.seed, batch);
        let pixels = self.slot.augmented(batch, &draws);
        self.normalize.apply(&pixels, (height * width) as usize, &mut self.images);
        let layout = &self.slot.layout;
        let param = &self.state.section(Section::Param)[..layout.numel()];
        let (slot, device, there) = (&self.slot, self.slot.device(), &mut self.there);
        guarded("compute a slot", || {
            // SAFETY: state and images are borrowed until this closure returns, and the graph is
            // gone by then.
            let here = || unsafe { slot.leaves(Weights::view_of(layout, param)) };
            let copied = || slot.leaves(Weights::copy_of(layout, param).to_device(device));
            let weights = match there {
                None => here(),
                Some(copies) => copies.get_or_insert_with(copied).share(),
            };
            // SAFETY: as above.
            let images_bchw = unsafe { view(&self.images, &slot.image_shape()) };
            let images_bchw = images_bchw.to_device(device);
            let (ids_shuffle, weights_b) = (&batch.ids_shuffle[..], &batch.weights[..]);
            let labels = &batch.labels[..];
            let input = SlotInput { images_bchw, ids_shuffle, weights: weights_b, draws, labels };
            let loss = slot.differentiate(&weights, &input, &mut |block, grad| {
                sink(SlotGrad { block, values: values(&grad.to_device(Device::Cpu)) });
            });
            loss.double_value(&[]) as f32
        })
    }

    fn apply(&mut self, mean: &[f32], update: &UpdateScalars) -> Result<(), EngineError> {
        self.changed();
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
        self.changed();
        self.state.section_mut(section)[at..at + values.len()].copy_from_slice(values);
        Ok(())
    }

    fn tensor_digests(&self) -> Result<Vec<TensorDigests>, EngineError> {
        Ok(self.state.tensor_digests())
    }

    fn probe(&mut self) -> Result<u64, EngineError> {
        Ok(guarded("compute the probe", || self.slot.probe())?.value)
    }

    /// Draws nothing of what is learned on a device: such objectives predict no pixels.
    fn draw(
        &mut self,
        pixels: &[u8],
        ids_shuffle: &[u32],
    ) -> Result<Option<Vec<Picture>>, EngineError> {
        if self.there.is_some() {
            return Ok(None);
        }
        let param = &self.state.section(Section::Param)[..self.slot.layout.numel()];
        guarded("draw pictures", || {
            // SAFETY: the state is borrowed until this closure returns, and nothing of the
            // prediction is left by then.
            let weights = unsafe { Weights::view_of(&self.slot.layout, param) };
            picture::draw(&self.slot, &self.setup, &weights, pixels, ids_shuffle)
        })
    }

    fn yardstick(&mut self) -> Result<Option<Yardstick>, EngineError> {
        self.slot.yardstick()
    }

    fn device_memory(&self) -> Option<u64> {
        let (free, total) = self.card.as_ref()?.memory().ok()?;
        Some((total - free) as u64)
    }

    fn describe(&self) -> String {
        let card = self.card.as_ref().and_then(|card| card.info().ok());
        match card {
            Some(card) => {
                let (name, version) = (card.name, runtime::library_version());
                format!("{name} (libtorch {version}, {})", self.setup.precision)
            }
            None => runtime::describe_cpu(),
        }
    }
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
pub(crate) fn guarded<T>(context: &str, f: impl FnOnce() -> T) -> Result<T, EngineError> {
    std::panic::catch_unwind(AssertUnwindSafe(f)).map_err(|payload| {
        let text = match (payload.downcast_ref::<String>(), payload.downcast_ref::<&str>()) {
            (Some(text), _) => text.clone(),
            (None, Some(text)) => (*text).to_string(),
            (None, None) => "a panic without a message".to_string(),
        };
        let text = without_stack(&text).to_string();
        EngineError::Device { context: format!("failed to {context}"), source: text.into() }
    })
}

/// Cuts off the stack of C++ that libtorch adds to its messages, quoted or not.
fn without_stack(text: &str) -> &str {
    let stack = ["\\nException raised from", "\nException raised from"];
    let end = stack.iter().filter_map(|mark| text.find(mark)).min();
    text[..end.unwrap_or(text.len())].trim_end()
}

#[cfg(test)]
mod tests;
