//! The engine whose state, sums and updates are on a CUDA device.
//!
//! libtorch computes loss and gradients; everything else is `lacuna-device`. Both work on the same
//! memory: the weights that libtorch reads are views of the state's parameters, and gradients are
//! summed where libtorch wrote them. All of it runs on the legacy default stream, in order.

use std::cell::RefCell;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use lacuna_cuda::{Compiler, Device as CudaDevice, Driver};
use lacuna_device::{DeviceState, Kernels, Pixels, Shape};
use lacuna_recipe::init;
use lacuna_recipe::reduce::SlotGrad;
use lacuna_recipe::state::{Layout, Section, TensorDigests};
use lacuna_recipe::step::{Normalize, SlotBatch};
use lacuna_spec::Precision;
use lacuna_worker::engine::{DeviceEngine, Engine, EngineError, Picture, UpdateScalars, Yardstick};
use tch::{Device, Tensor};

use super::slot::{SlotInput, SlotProgram, draws_of};
use super::{BuildEngineError, EngineSetup, check_setup, guarded, picture};
use crate::objective::{MaeObjective, Objective};
use crate::runtime;
use crate::weights::{Weights, values, view_at};

/// Where a [`DeviceTorchEngine`] computes.
#[derive(Clone, Debug)]
pub struct DevicePlace {
    /// The device as libtorch names it.
    pub device: Device,
    /// The same device among those that the driver shows this process.
    pub ordinal: u32,
    /// The driver's library, where it is not `libcuda.so.1`.
    pub driver: Option<PathBuf>,
    /// NVRTC, where the loader does not find it.
    pub compiler: Option<PathBuf>,
    /// Slots of a step.
    pub n_slots: u32,
}

/// An objective on libtorch, on one device.
#[derive(Debug)]
pub struct DeviceTorchEngine {
    setup: EngineSetup,
    place: DevicePlace,
    slot: SlotProgram,
    /// Views of the state's parameters.
    views: Weights,
    /// What gradients are taken of: the views, or copies in the slot's precision, which are made
    /// anew after the parameters have changed.
    leaves: Option<Weights>,
    /// In a cell because reading it moves bytes through a buffer of its own.
    state: RefCell<DeviceState>,
    pixels: Pixels,
    device: CudaDevice,
    card: String,
}

fn failed(context: &str, err: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> EngineError {
    EngineError::Device { context: format!("failed to {context}"), source: err.into() }
}

impl DeviceTorchEngine {
    /// Builds an engine that trains the masked autoencoder, with the initial state of the setup's
    /// seed. libtorch must be ready for the device ([`load`](crate::cuda::load),
    /// [`set_kernels`](crate::context::set_kernels)).
    pub fn new(setup: EngineSetup, place: DevicePlace) -> Result<Self, EngineError> {
        let mae: Arc<dyn Objective> = Arc::new(MaeObjective);
        DeviceTorchEngine::with_objective(setup, place, &mae)
    }

    /// The same for another objective.
    pub fn with_objective(
        setup: EngineSetup,
        place: DevicePlace,
        objective: &Arc<dyn Objective>,
    ) -> Result<Self, EngineError> {
        check_setup(&setup).map_err(|err| failed("build the engine", err))?;
        runtime::pin_threads();
        let driver =
            Driver::load(place.driver.as_deref()).map_err(|err| failed("open the driver", err))?;
        let device = driver.device(place.ordinal).map_err(|err| failed("open the device", err))?;
        let compiler = Compiler::load(place.compiler.as_deref());
        let compiler = compiler.map_err(|err| failed("open NVRTC", err))?;
        let kernels = Kernels::compile(&device, &compiler);
        let kernels = kernels.map_err(|err| failed("compile the kernels", err))?;
        let card = device.info().map_err(|err| failed("ask the device", err))?.name;
        if place.device == Device::Cpu && setup.precision == Precision::Tf32 {
            return Err(failed("build the engine", BuildEngineError::NoTf32));
        }
        let (batch, precision) = (setup.slot_batch as usize, setup.precision);
        let slot = SlotProgram::new(objective, &setup.model, batch, place.device, precision);
        let mut state = DeviceState::new(&kernels, slot.layout.clone(), place.n_slots)?;
        for (block, spec) in slot.layout.params().iter().enumerate() {
            let range = slot.layout.range(block);
            let mut param = vec![0f32; range.len()];
            init::fill(spec, setup.seed, &mut param);
            state.write(Section::Param, range.start, &param)?;
        }
        // SAFETY: the state never moves its memory, and `views` is dropped before it (the order
        // of the fields). It is written by updates only, which the legacy stream orders.
        let views =
            unsafe { Weights::view_at(&slot.layout, state.address(Section::Param), place.device) };
        let [height, width] = setup.model.img_size;
        let shape = Shape {
            images: setup.slot_batch as usize,
            plane: (height * width) as usize,
            channels: setup.model.channels as usize,
        };
        let normalize = Normalize::new(&setup.mean, &setup.std);
        let pixels = Pixels::new(&kernels, normalize.tables(), shape)?;
        let state = RefCell::new(state);
        let leaves = None;
        Ok(Self { setup, place, slot, views, leaves, state, pixels, device, card })
    }

    /// Computes a slot; loss and gradients stay on the device, and may be on their way.
    fn compute(
        &mut self,
        batch: &SlotBatch,
    ) -> Result<(Tensor, Vec<(usize, Tensor)>), EngineError> {
        self.slot.check(batch)?;
        let draws = draws_of(self.setup.seed, batch);
        self.pixels.load(&self.slot.augmented(batch, &draws))?;
        // In tests the CPU stands for the device, and does not wait for the stream by itself.
        if self.place.device == Device::Cpu {
            self.state.get_mut().finish()?;
        }
        let (slot, views, pixels) = (&self.slot, &self.views, &self.pixels);
        let leaves = &mut self.leaves;
        guarded("compute a slot", || {
            let weights = leaves.get_or_insert_with(|| slot.leaves(views.share()));
            // SAFETY: the values are written by the next slot only, behind this one's work on the
            // same stream, and the graph is gone when this returns.
            let images_bchw =
                unsafe { view_at(pixels.address(), &slot.image_shape(), self.place.device) };
            let (ids_shuffle, weights_b) = (&batch.ids_shuffle[..], &batch.weights[..]);
            let labels = &batch.labels[..];
            let input = SlotInput { images_bchw, ids_shuffle, weights: weights_b, draws, labels };
            // All are kept: the device may read them until it is waited for.
            let mut grads: Vec<(usize, Tensor)> = Vec::new();
            let loss = slot.differentiate(weights, &input, &mut |block, grad| {
                grads.push((block, grad));
            });
            (loss, grads)
        })
    }
}

impl Engine for DeviceTorchEngine {
    fn layout(&self) -> &Arc<Layout> {
        &self.slot.layout
    }

    fn completion(&self) -> Vec<usize> {
        self.slot.completion().to_vec()
    }

    fn slot(
        &mut self,
        batch: &SlotBatch,
        sink: &mut dyn FnMut(SlotGrad<'_>),
    ) -> Result<f32, EngineError> {
        let (loss, grads) = self.compute(batch)?;
        guarded("copy gradients to the host", || {
            for (block, grad) in &grads {
                sink(SlotGrad { block: *block, values: values(&grad.to_device(Device::Cpu)) });
            }
            loss.double_value(&[]) as f32
        })
    }

    fn apply(&mut self, mean: &[f32], update: &UpdateScalars) -> Result<(), EngineError> {
        self.state.get_mut().write_mean(mean)?;
        self.apply_there(update)
    }

    fn read(
        &self,
        section: Section,
        range: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), EngineError> {
        Ok(self.state.borrow_mut().read(section, range, out)?)
    }

    fn write(&mut self, section: Section, at: usize, values: &[f32]) -> Result<(), EngineError> {
        self.leaves = None;
        Ok(self.state.get_mut().write(section, at, values)?)
    }

    fn tensor_digests(&self) -> Result<Vec<TensorDigests>, EngineError> {
        Ok(self.state.borrow_mut().tensor_digests()?)
    }

    fn probe(&mut self) -> Result<u64, EngineError> {
        Ok(guarded("compute the probe", || self.slot.probe())?.value)
    }

    fn draw(
        &mut self,
        pixels: &[u8],
        ids_shuffle: &[u32],
    ) -> Result<Option<Vec<Picture>>, EngineError> {
        guarded("draw pictures", || {
            picture::draw(&self.slot, &self.setup, &self.views, pixels, ids_shuffle)
        })
    }

    fn on_device(&mut self) -> Option<&mut dyn DeviceEngine> {
        Some(self)
    }

    fn yardstick(&mut self) -> Result<Option<Yardstick>, EngineError> {
        self.slot.yardstick()
    }

    fn device_memory(&self) -> Option<u64> {
        let (free, total) = self.device.memory().ok()?;
        Some((total - free) as u64)
    }

    fn describe(&self) -> String {
        let (card, version) = (&self.card, runtime::library_version());
        format!("{card} (libtorch {version}, {})", self.setup.precision)
    }
}

impl DeviceEngine for DeviceTorchEngine {
    fn state(&mut self) -> &mut DeviceState {
        self.state.get_mut()
    }

    fn slot_there(&mut self, batch: &SlotBatch) -> Result<f32, EngineError> {
        let (loss, grads) = self.compute(batch)?;
        let state = self.state.get_mut();
        for (block, grad) in &grads {
            // SAFETY: the gradient is contiguous f32 of the tensor's shape, and lives until
            // `finish` has returned.
            unsafe { state.add(*block, grad.data_ptr() as u64) }?;
        }
        state.finish()?;
        guarded("read the loss", || loss.double_value(&[]) as f32)
    }

    fn apply_there(&mut self, update: &UpdateScalars) -> Result<(), EngineError> {
        self.leaves = None;
        let state = self.state.get_mut();
        state.apply(&update.on_device())?;
        // Before the next slot reads the parameters, wherever libtorch computes it.
        Ok(state.finish()?)
    }
}
