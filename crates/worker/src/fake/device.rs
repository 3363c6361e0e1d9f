//! The fake engine with its state on a device: gradients are computed on the host and summed there.

use std::cell::RefCell;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use lacuna_cuda::{Compiler, CudaError, Device, DeviceBuffer, Driver, PinnedBuffer, Stream};
use lacuna_device::{DeviceState, Kernels};
use lacuna_recipe::reduce::SlotGrad;
use lacuna_recipe::state::{Layout, Section, TensorDigests};
use lacuna_recipe::step::SlotBatch;

use super::FakeEngine;
use crate::engine::{DeviceEngine, Engine, EngineError, UpdateScalars};

/// A [`FakeEngine`] whose state, sums and updates are on a device.
#[derive(Debug)]
pub struct FakeDeviceEngine {
    /// Computes gradients, from a copy of the parameters.
    host: FakeEngine,
    /// In a cell because reading it moves bytes through a buffer of its own.
    state: RefCell<DeviceState>,
    /// Whether the copy is older than the state.
    stale: bool,
    /// A slot's gradient on both sides, flat.
    gradient: DeviceBuffer,
    pinned: PinnedBuffer,
}

fn failed(context: &str, err: impl std::error::Error + Send + Sync + 'static) -> EngineError {
    EngineError::Device { context: context.to_string(), source: Box::new(err) }
}

impl FakeDeviceEngine {
    /// Puts the state of `host` on the device of its name's number; `library` has the symbols of
    /// the driver and of NVRTC.
    pub fn new(host: FakeEngine, library: &Path) -> Result<Self, EngineError> {
        let number = host.spec.device.trim_start_matches(|c: char| !c.is_ascii_digit());
        let number: u32 = number.parse().unwrap_or(0);
        let driver = Driver::load(Some(library)).map_err(|err| failed("no driver", err))?;
        let device = driver.device(number).map_err(|err| failed("no device", err))?;
        let compiler = Compiler::load(Some(library)).map_err(|err| failed("no compiler", err))?;
        let kernels =
            Kernels::compile(&device, &compiler).map_err(|err| failed("no kernels", err))?;
        let layout = host.layout().clone();
        let mut state = DeviceState::new(&kernels, layout.clone(), host.spec.n_slots)?;
        for section in Section::ALL {
            state.write(section, 0, host.state.section(section))?;
        }
        let buffers = Self::buffers(&device, layout.numel());
        let (gradient, pinned) = buffers.map_err(|err| failed("no memory", err))?;
        Ok(Self { host, state: RefCell::new(state), stale: false, gradient, pinned })
    }

    fn buffers(device: &Device, n: usize) -> Result<(DeviceBuffer, PinnedBuffer), CudaError> {
        let n_bytes = n * size_of::<f32>();
        Ok((DeviceBuffer::new(device, n_bytes)?, PinnedBuffer::new(device, n_bytes)?))
    }

    /// Brings the host's copy of the parameters up to date.
    fn refresh(&mut self) -> Result<(), EngineError> {
        if self.stale {
            let param = self.host.state.section_mut(Section::Param);
            self.state.get_mut().read(Section::Param, 0..param.len(), param)?;
            self.stale = false;
        }
        Ok(())
    }
}

impl Engine for FakeDeviceEngine {
    fn layout(&self) -> &Arc<Layout> {
        self.host.layout()
    }

    fn slot(
        &mut self,
        batch: &SlotBatch,
        sink: &mut dyn FnMut(SlotGrad<'_>),
    ) -> Result<f32, EngineError> {
        self.refresh()?;
        self.host.slot(batch, sink)
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
        self.stale = true;
        Ok(self.state.get_mut().write(section, at, values)?)
    }

    fn tensor_digests(&self) -> Result<Vec<TensorDigests>, EngineError> {
        Ok(self.state.borrow_mut().tensor_digests()?)
    }

    fn probe(&mut self) -> Result<u64, EngineError> {
        self.host.probe()
    }

    fn on_device(&mut self) -> Option<&mut dyn DeviceEngine> {
        Some(self)
    }

    fn describe(&self) -> String {
        "device (fake engine)".to_string()
    }
}

impl DeviceEngine for FakeDeviceEngine {
    fn state(&mut self) -> &mut DeviceState {
        self.state.get_mut()
    }

    fn slot_there(&mut self, batch: &SlotBatch) -> Result<f32, EngineError> {
        self.refresh()?;
        let (host, pinned) = (&mut self.host, &mut self.pinned);
        let layout = host.layout().clone();
        let bytes_of = |block: usize| {
            let Range { start, end } = layout.range(block);
            start * size_of::<f32>()..end * size_of::<f32>()
        };
        let loss = host.slot(batch, &mut |grad| {
            let target = &mut pinned.bytes_mut()[bytes_of(grad.block)];
            target.copy_from_slice(bytemuck::cast_slice(grad.values));
        })?;
        let state = self.state.get_mut();
        let stream = Stream::legacy(state.device());
        let n_bytes = layout.numel() * size_of::<f32>();
        // SAFETY: `finish` waits for the copy and for what reads it.
        let loaded = unsafe { self.gradient.load(&self.pinned, n_bytes, &stream) };
        loaded.map_err(|err| failed("failed to copy a gradient", err))?;
        for block in 0..layout.n_blocks() {
            let address = self.gradient.as_ptr() as u64 + bytes_of(block).start as u64;
            // SAFETY: the tensor's gradient lies there until `finish` has returned.
            unsafe { state.add(block, address) }?;
        }
        state.finish()?;
        Ok(loss)
    }

    fn apply_there(&mut self, update: &UpdateScalars) -> Result<(), EngineError> {
        self.stale = true;
        Ok(self.state.get_mut().apply(&update.on_device())?)
    }
}
