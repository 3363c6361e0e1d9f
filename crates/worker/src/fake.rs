//! A real model without libtorch: a linear map from the mean visible patch to the mean removed one.
//!
//! It runs over the same loader, masks, quantiser and AdamW as the torch engine, so that tests of
//! processes, faults and checkpoints exercise everything but the tensor library.

mod device;
mod draw;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use device::FakeDeviceEngine;

use lacuna_recipe::digest::Crc64;
use lacuna_recipe::model::{Init, ModelConfig, ParamSpec};
use lacuna_recipe::reduce::SlotGrad;
use lacuna_recipe::state::{Layout, Section, TensorDigests};
use lacuna_recipe::step::{Normalize, SlotBatch};
use lacuna_types::{SampleId, Slot, Step};

use crate::cpu_state::CpuState;
use crate::engine::{Backend, Engine, EngineError, EngineSpec, Picture, UpdateScalars};

/// Faults of a device, each at the first slot of a step that this process computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// The slot never returns.
    pub hang_at: Option<u64>,
    /// A bit of a parameter flips, once in the life of the process.
    pub corrupt_at: Option<u64>,
    /// The process dies, if it computes the step's first slot.
    pub die_at: Option<u64>,
    /// The engine fails.
    pub fail_at: Option<u64>,
    /// From here on slots give other bits than on a sound device, and the probe too.
    pub drift_at: Option<u64>,
}

/// The fake engine.
#[derive(Debug)]
pub struct FakeEngine {
    spec: EngineSpec,
    state: CpuState,
    normalize: Normalize,
    slot_time: Duration,
    faults: Faults,
    drifts: bool,
}

/// Values of a patch: inputs and outputs of the map.
fn layout(model: &ModelConfig) -> Arc<Layout> {
    let n = model.patch_values();
    let fan = n as u32;
    let param = |name: &str, shape: Vec<usize>, init| ParamSpec { name: name.into(), shape, init };
    Layout::new(vec![
        param("bias", vec![n], Init::Zeros),
        param("gain", vec![1, 1, n], Init::Normal02),
        param("weight", vec![n, n], Init::XavierUniform { fan_in: fan, fan_out: fan }),
    ])
}

impl FakeEngine {
    /// Builds the engine; a slot takes at least `slot_time`, so that there is a time to be killed
    /// in.
    pub fn new(spec: EngineSpec, slot_time: Duration) -> Self {
        let state = CpuState::fresh(layout(&spec.model), spec.seed);
        let normalize = Normalize::new(&spec.mean, &spec.std);
        FakeEngine { spec, state, normalize, slot_time, faults: Faults::default(), drifts: false }
    }

    /// Makes the device break as `faults` say.
    pub fn with_faults(mut self, faults: Faults) -> Self {
        self.faults = faults;
        self
    }

    fn break_at(&mut self, slot: Slot) -> Result<(), EngineError> {
        let Slot { step, index } = slot;
        let due = |at: Option<u64>| at == Some(step.0);
        if due(self.faults.die_at) && index == 0 {
            std::process::abort();
        }
        while due(self.faults.hang_at) {
            std::thread::park();
        }
        if due(self.faults.fail_at) {
            let context = format!("slot {index} of step {step} on a broken device");
            let source = "made to fail".into();
            return Err(EngineError::Device { context, source });
        }
        if due(self.faults.corrupt_at) {
            self.faults.corrupt_at = None;
            let value = &mut self.state.section_mut(Section::Param)[0];
            *value = f32::from_bits(value.to_bits() ^ 1);
        }
        if due(self.faults.drift_at) {
            self.drifts = true;
            // The update goes wrong as well, or nobody would notice.
            let value = &mut self.state.section_mut(Section::Param)[0];
            *value = f32::from_bits(value.to_bits() ^ 1);
            self.faults.drift_at = None;
        }
        Ok(())
    }

    /// Returns the mean visible and the mean removed patch of one sample, channel-first values.
    fn patch_means(&self, image: &[f32], ids_shuffle: &[u32]) -> [Vec<f32>; 2] {
        let model = &self.spec.model;
        let (p, c) = (model.patch_size as usize, model.channels as usize);
        let [height, width] = model.img_size.map(|side| side as usize);
        let keep = model.len_keep();
        let mut means = [vec![0f32; p * p * c], vec![0f32; p * p * c]];
        let counts = [keep as f32, (ids_shuffle.len() - keep) as f32];
        for (place, &patch) in ids_shuffle.iter().enumerate() {
            let side = usize::from(place >= keep);
            let (row, column) = (patch as usize / (width / p), patch as usize % (width / p));
            for channel in 0..c {
                for y in 0..p {
                    let at = (channel * height + row * p + y) * width + column * p;
                    for x in 0..p {
                        let value = image[at + x] / counts[side];
                        means[side][(channel * p + y) * p + x] += value;
                    }
                }
            }
        }
        means
    }
}

impl Engine for FakeEngine {
    fn layout(&self) -> &Arc<Layout> {
        self.state.layout()
    }

    fn slot(
        &mut self,
        batch: &SlotBatch,
        sink: &mut dyn FnMut(SlotGrad<'_>),
    ) -> Result<f32, EngineError> {
        let started = std::time::Instant::now();
        self.break_at(batch.slot)?;
        let model = &self.spec.model;
        let plane = (model.img_size[0] * model.img_size[1]) as usize;
        let values = plane * model.channels as usize;
        let (b, n) = (batch.samples.len(), model.patch_values());
        if batch.pixels.len() != b * values || batch.ids_shuffle.len() != b * model.n_patches() {
            let Slot { step, index } = batch.slot;
            let what = format!("{} pixels for {b} images", batch.pixels.len());
            return Err(EngineError::Batch { step: step.0, index, what });
        }
        let mut images = vec![0f32; batch.pixels.len()];
        self.normalize.apply(&batch.pixels, plane, &mut images);
        let param = self.state.section(Section::Param);
        let part = |block: usize| &param[self.state.layout().range(block)];
        let (bias, gain, weight) = (part(0), part(1), part(2));
        let mut grads = [vec![0f32; n], vec![0f32; n], vec![0f32; n * n]];
        let mut loss = 0f32;
        let scale = 1.0 / (b * n) as f32;
        for i in 0..b {
            let ids = &batch.ids_shuffle[i * model.n_patches()..(i + 1) * model.n_patches()];
            let [seen, hidden] = self.patch_means(&images[i * values..(i + 1) * values], ids);
            let weighted = scale * batch.weights[i];
            for o in 0..n {
                let row = &weight[o * n..(o + 1) * n];
                let sum: f32 = row.iter().zip(&seen).map(|(w, x)| w * x).sum();
                let error = sum + seen[o] * gain[o] + bias[o] - hidden[o];
                loss += weighted * error * error;
                let slope = 2.0 * weighted * error;
                grads[0][o] += slope;
                grads[1][o] += slope * seen[o];
                for (g, x) in grads[2][o * n..(o + 1) * n].iter_mut().zip(&seen) {
                    *g += slope * x;
                }
            }
        }
        for (block, values) in grads.iter().enumerate().rev() {
            sink(SlotGrad { block, values });
        }
        std::thread::sleep(self.slot_time.saturating_sub(started.elapsed()));
        Ok(loss)
    }

    fn apply(&mut self, mean: &[f32], update: &UpdateScalars) -> Result<(), EngineError> {
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
        self.state.section_mut(section)[at..at + values.len()].copy_from_slice(values);
        Ok(())
    }

    fn tensor_digests(&self) -> Result<Vec<TensorDigests>, EngineError> {
        Ok(self.state.tensor_digests())
    }

    fn draw(
        &mut self,
        pixels: &[u8],
        ids_shuffle: &[u32],
    ) -> Result<Option<Vec<Picture>>, EngineError> {
        Ok(Some(draw::draw(&self.spec.model, pixels, ids_shuffle)))
    }

    fn probe(&mut self) -> Result<u64, EngineError> {
        let mut fresh = FakeEngine::new(self.spec.clone(), Duration::ZERO);
        let mut digest = Crc64::default();
        let loss =
            fresh.slot(&probe_batch(&self.spec.model, self.spec.slot_batch), &mut |grad| {
                digest = digest.then(Crc64::of_f32(grad.values));
            })?;
        let digest = digest.then(Crc64::of_f32(&[loss])).value;
        Ok(if self.drifts { !digest } else { digest })
    }

    fn describe(&self) -> String {
        "cpu (fake engine)".to_string()
    }
}

/// A slot of made-up samples, the same everywhere: what probes compute.
pub fn probe_batch(model: &ModelConfig, slot_batch: u32) -> SlotBatch {
    let b = slot_batch as usize;
    let n_patches = model.n_patches();
    let values = (model.img_size[0] * model.img_size[1] * model.channels) as usize;
    let ids = (0..b as u64).flat_map(|sample| {
        lacuna_recipe::mask::MaskOrder::draw(0, 0, sample, n_patches).ids_shuffle
    });
    let draws = lacuna_recipe::philox::Draws::new(0, lacuna_recipe::philox::Tag::User, 0, 0);
    SlotBatch {
        slot: Slot { step: Step(0), index: 0 },
        samples: (0..b as u64).map(SampleId).collect(),
        labels: (0..b as u32).map(Some).collect(),
        weights: vec![1.0; b],
        pixels: (0..(b * values) as u32).map(|i| draws.word(i % (1 << 20)) as u8).collect(),
        ids_shuffle: ids.collect(),
    }
}

/// The backend of [`FakeEngine`].
#[derive(Clone, Debug, Default)]
pub struct FakeBackend {
    /// Least time of a slot.
    pub slot_time: Duration,
    /// What breaks, and when.
    pub faults: Faults,
    /// The library of a CUDA driver and of NVRTC: with one, state and sums are on a device.
    pub device_library: Option<PathBuf>,
}

impl Backend for FakeBackend {
    fn library(&self) -> String {
        "fake engine".to_string()
    }

    fn trainer_env(&self, _device: &str) -> Vec<(String, String)> {
        Vec::new()
    }

    fn prepare(&self, device: &str) -> Result<(), EngineError> {
        if device.starts_with("cpu") {
            return Ok(());
        }
        let context = format!("the fake engine has no device {device}");
        Err(EngineError::Device { context, source: "it computes on CPUs only".into() })
    }

    fn engine(&self, spec: &EngineSpec) -> Result<Box<dyn Engine>, EngineError> {
        let engine = FakeEngine::new(spec.clone(), self.slot_time).with_faults(self.faults);
        match &self.device_library {
            None => Ok(Box::new(engine)),
            Some(library) => Ok(Box::new(FakeDeviceEngine::new(engine, library)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> EngineSpec {
        EngineSpec {
            model: ModelConfig::preset("micro").expect("a preset"),
            seed: 5,
            mean: vec![0.5; 3],
            std: vec![0.25; 3],
            slot_batch: 4,
            n_slots: 4,
            precision: lacuna_spec::Precision::F32,
            device: "cpu0".into(),
            task: None,
        }
    }

    #[test]
    fn the_fake_engine_keeps_the_contract() {
        crate::conformance::run(&spec(), &FakeBackend::default());
    }

    #[test]
    fn the_fake_engine_keeps_the_contract_on_a_device() {
        let device_library = Some(lacuna_nccl_standin::path());
        crate::conformance::run(&spec(), &FakeBackend { device_library, ..FakeBackend::default() });
    }

    /// The gradient agrees with differences of the loss.
    #[test]
    fn the_gradient_is_that_of_the_loss() {
        let mut engine = FakeEngine::new(spec(), Duration::ZERO);
        let batch = probe_batch(&spec().model, 4);
        let mut grads: Vec<Vec<f32>> = vec![Vec::new(); 3];
        engine.slot(&batch, &mut |g| grads[g.block] = g.values.to_vec()).unwrap();
        for (block, element) in [(0, 1), (1, 3), (2, 17), (2, 140)] {
            let at = engine.layout().range(block).start + element;
            let mut value = [0f32];
            engine.read(Section::Param, at..at + 1, &mut value).unwrap();
            let mut loss = |delta: f32| {
                engine.write(Section::Param, at, &[value[0] + delta]).unwrap();
                f64::from(engine.slot(&batch, &mut |_| {}).unwrap())
            };
            let slope = (loss(0.05) - loss(-0.05)) / 0.1;
            loss(0.0);
            let got = f64::from(grads[block][element]);
            assert!(
                (slope - got).abs() < 1e-3 + 0.02 * got.abs(),
                "{block}/{element}: {slope} {got}"
            );
        }
    }
}
