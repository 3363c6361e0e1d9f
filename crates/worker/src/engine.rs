//! The interface between the training loop and whatever computes gradients.

use std::ops::Range;
use std::sync::Arc;

use lacuna_device::{DeviceError, DeviceState, Updating};
use lacuna_recipe::adamw::AdamW;
use lacuna_recipe::digest::Crc64;
use lacuna_recipe::init;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::reduce::SlotGrad;
use lacuna_recipe::state::{Layout, Section, TensorDigests};
use lacuna_recipe::step::SlotBatch;
use lacuna_spec::{Precision, TaskSpec};

/// A failure of an engine; the trainer process ends with it.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The batch does not fit the model.
    #[error("slot {index} of step {step} does not fit the model: {what}")]
    Batch {
        /// Step of the slot.
        step: u64,
        /// Index of the slot.
        index: u32,
        /// What does not fit.
        what: String,
    },
    /// The library or device below failed.
    #[error("{context}")]
    Device {
        /// What was being done.
        context: String,
        /// What the library said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Scalars of one optimizer update.
#[derive(Clone, Debug, PartialEq)]
pub struct UpdateScalars {
    /// Learning rate, in f64; rounded once by the update.
    pub lr: f64,
    /// Number of the update, from 1.
    pub t: u64,
    /// Constants of AdamW.
    pub adamw: AdamW,
    /// Whether `cls_token` and `mask_token` are decayed.
    pub decay_tokens: bool,
}

/// Computes gradients of slots and applies updates; holds parameters and both moments.
///
/// Guarantees every implementation gives (the conformance suite checks them):
/// - **Purity**: a slot's loss and gradient are a function of the parameters and the batch alone:
///   not of earlier calls, other slots, or the process.
/// - [`slot`](Engine::slot) changes no state. [`apply`](Engine::apply) is elementwise and total.
/// - A fresh engine holds the initial weights of the run's seed and zero moments.
/// - What [`write`](Engine::write) stored, [`read`](Engine::read) returns bit for bit.
pub trait Engine: Send {
    /// Returns the tensors of the state in canonical order.
    fn layout(&self) -> &Arc<Layout>;

    /// Lists the tensors in the order in which a slot's gradients complete: the order in which they
    /// are summed over a group. It is the same in every process, and no more than a hint for
    /// [`slot`](Engine::slot).
    fn completion(&self) -> Vec<usize> {
        (0..self.layout().n_blocks()).collect()
    }

    /// Computes one slot: calls `sink` once per tensor, in the order in which gradients complete,
    /// and returns the slot's mean loss.
    ///
    /// The gradient is the mean over the slot's samples; a sample of weight 0 adds nothing and
    /// still counts in the divisor.
    fn slot(
        &mut self,
        batch: &SlotBatch,
        sink: &mut dyn FnMut(SlotGrad<'_>),
    ) -> Result<f32, EngineError>;

    /// Applies one AdamW update with the mean gradient, flat in [`Layout`] order. All or nothing.
    fn apply(&mut self, mean: &[f32], update: &UpdateScalars) -> Result<(), EngineError>;

    /// Copies `range` of a flat section to `out`.
    fn read(
        &self,
        section: Section,
        range: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), EngineError>;

    /// Overwrites a flat section from element `at` on.
    fn write(&mut self, section: Section, at: usize, values: &[f32]) -> Result<(), EngineError>;

    /// Fills `out` with the parameters that block `block` has before the first step of a run of
    /// `seed`: a function of these, the layout and what the engine was built from.
    fn initial(&self, block: usize, seed: u64, out: &mut [f32]) {
        init::fill(&self.layout().params()[block], seed, out);
    }

    /// Computes the digests of every tensor's sections, in canonical order.
    fn tensor_digests(&self) -> Result<Vec<TensorDigests>, EngineError>;

    /// Computes a digest that is equal on machines whose engines give equal bits: the loss and
    /// gradients of fixed slots, of a small model and of the run's own shapes.
    fn probe(&mut self) -> Result<u64, EngineError>;

    /// Draws images as people see how far a model is: one picture per image,
    /// `original | masked | filled in`. Nothing where the engine learns no pixels.
    ///
    /// `pixels` is `[b, h, w, c]` and `ids_shuffle` `[b, n_patches]`, in which the first patches
    /// are those that stay. Changes no state.
    fn draw(
        &mut self,
        _pixels: &[u8],
        _ids_shuffle: &[u32],
    ) -> Result<Option<Vec<Picture>>, EngineError> {
        Ok(None)
    }

    /// Returns the engine's half on a device, where sums, updates and state live there.
    ///
    /// Where there is one, a step uses it and not [`slot`](Engine::slot) and
    /// [`apply`](Engine::apply), which give the same bits through the host.
    fn on_device(&mut self) -> Option<&mut dyn DeviceEngine> {
        None
    }

    /// Measures what the device reaches in large matrix products of the run's precision, beside
    /// what an image costs: the two sides of MFU. Nothing where nobody knows what an image costs.
    ///
    /// A worker asks once, before it is warm; it takes some tenths of a second.
    fn yardstick(&mut self) -> Result<Option<Yardstick>, EngineError> {
        Ok(None)
    }

    /// Returns the memory in use on the device, of all processes, in bytes; nothing where the
    /// device is the host, whose processes the kernel counts.
    fn device_memory(&self) -> Option<u64> {
        None
    }

    /// Describes device and library for people: `cpu (libtorch 2.11.0, avx2, 1 thread)`.
    fn describe(&self) -> String;
}

/// What model FLOPs utilisation (MFU) is measured by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yardstick {
    /// FLOPs of one image's forward and backward pass, nothing left out for work that is skipped.
    pub flops_per_image: f64,
    /// FLOPs a second of large matrix products on this worker's device.
    pub peak: f64,
}

/// A picture for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Red, green and blue of each pixel, row by row.
    pub rgb: Vec<u8>,
}

/// Computes a worker's probe: what pixels this machine makes of a picture, and what its engine
/// computes. Workers with different probes may not share a run.
pub fn whole_probe(engine: &mut dyn Engine) -> Result<u64, EngineError> {
    let computed = Crc64::of(&engine.probe()?.to_le_bytes());
    Ok(lacuna_data::probe_pixels().then(computed).value)
}

/// An engine whose gradients need not leave the device.
pub trait DeviceEngine {
    /// Returns the state and the sums of the step.
    fn state(&mut self) -> &mut DeviceState;

    /// Computes one slot, adds its gradients to the step's sums, and returns its mean loss.
    fn slot_there(&mut self, batch: &SlotBatch) -> Result<f32, EngineError>;

    /// Applies one update with the mean gradient that the state holds.
    fn apply_there(&mut self, update: &UpdateScalars) -> Result<(), EngineError> {
        Ok(self.state().apply(&update.on_device())?)
    }
}

impl UpdateScalars {
    /// Returns the same for a state on a device.
    pub fn on_device(&self) -> Updating<'_> {
        let UpdateScalars { lr, t, ref adamw, decay_tokens } = *self;
        Updating { adamw, lr, t, decay_tokens }
    }
}

impl From<DeviceError> for EngineError {
    fn from(err: DeviceError) -> Self {
        EngineError::Device { context: "the device failed".to_string(), source: Box::new(err) }
    }
}

/// What an engine is built for.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineSpec {
    /// Sizes of the model.
    pub model: ModelConfig,
    /// Seed of the run.
    pub seed: u64,
    /// Mean of each channel, in units of full brightness.
    pub mean: Vec<f64>,
    /// Deviation of each channel, in units of full brightness.
    pub std: Vec<f64>,
    /// Samples of a slot.
    pub slot_batch: u32,
    /// Slots of a step.
    pub n_slots: u32,
    /// Arithmetic of the model.
    pub precision: Precision,
    /// Device, `cpu0` or `cuda0`.
    pub device: String,
    /// What is learned beside filling in patches.
    pub task: Option<TaskSpec>,
}

/// What a worker binary brings: a kind of engine.
pub trait Backend: Send + Sync + 'static {
    /// Describes the library for `--version`: `libtorch 2.11.0`.
    fn library(&self) -> String;

    /// Returns the environment that the trainer process of `device` needs from its start.
    fn trainer_env(&self, device: &str) -> Vec<(String, String)>;

    /// Returns variables that a trainer must not inherit: they would change what its libraries
    /// compute, or let them wait for ever.
    fn trainer_env_removed(&self) -> &'static [&'static str] {
        &[]
    }

    /// Opens what `device` needs, in a trainer process and before anything else does.
    ///
    /// # Errors
    /// [`EngineError`]: this machine cannot compute on the device, and trying again cannot help.
    fn prepare(&self, device: &str) -> Result<(), EngineError>;

    /// Builds an engine in a trainer process.
    fn engine(&self, spec: &EngineSpec) -> Result<Box<dyn Engine>, EngineError>;

    /// Ends a trainer's process, while a thread of it may still compute.
    fn end(&self, code: u8) -> ! {
        std::process::exit(code.into())
    }
}
