//! The arithmetic and the engine on the device.

use std::sync::Arc;

use anyhow::Context as _;
use lacuna_cuda::{Compiler, Driver};
use lacuna_device::{Kernels, conformance};
use lacuna_mae::classify::EncoderWeights;
use lacuna_mae::context::{self, EXACT};
use lacuna_mae::engine::{DevicePlace, DeviceTorchEngine, EngineSetup, Place, TaskEngine};
use lacuna_recipe::model::ModelConfig;
use lacuna_spec::Precision;
use lacuna_worker::engine::{Backend, Engine, EngineError, EngineSpec};
use serde_json::{Value, json};

/// Runs the kernels against the arithmetic of the host.
pub fn arithmetic(place: &DevicePlace) -> anyhow::Result<(bool, String, Value)> {
    let driver = Driver::load(place.driver.as_deref())?;
    let device = driver.device(place.ordinal)?;
    let compiler = Compiler::load(place.compiler.as_deref())?;
    let kernels = Kernels::compile(&device, &compiler)?;
    conformance::run(&kernels);
    let (major, minor) = compiler.version();
    let text =
        format!("sums, updates, digests and pixels have the host's bits (NVRTC {major}.{minor})");
    Ok((true, text, json!({ "nvrtc": format!("{major}.{minor}") })))
}

/// Runs the contract of engines on the device.
pub fn contract(
    place: &DevicePlace,
    precision: Precision,
) -> anyhow::Result<(bool, String, Value)> {
    let model = ModelConfig::preset("micro").context("no preset is named `micro`")?;
    let channels = model.channels as usize;
    let spec = EngineSpec {
        model,
        seed: 5,
        mean: vec![0.5; channels],
        std: vec![0.25; channels],
        slot_batch: 3,
        n_slots: 4,
        precision,
        device: format!("{:?}", place.device).to_lowercase(),
        task: None,
    };
    let backend = OnDevice { place: place.clone() };
    lacuna_worker::conformance::run(&spec, &backend);
    let engine = backend.engine(&spec)?.describe();
    let text = format!("slots are pure, updates are the recipe's: {engine}");
    Ok((true, text, json!({ "engine": engine })))
}

/// Runs the contract of engines for a task, whose slots alone are on the device.
pub fn task(place: &DevicePlace, precision: Precision) -> anyhow::Result<(bool, String, Value)> {
    let text = "schema = 1\nname = \"a\"\nbase = \"preset:micro\"\ndata.shards = \"d\"\n\
                [task]\nkind = \"finetune\"\nclasses = 5\nlayer_decay = 1.0\n";
    let run = lacuna_spec::parse_text("a task", text, &[])?.spec;
    let spec = EngineSpec {
        model: run.model,
        seed: 5,
        mean: run.data.mean,
        std: run.data.std,
        slot_batch: 4,
        n_slots: 4,
        precision,
        device: format!("{:?}", place.device).to_lowercase(),
        task: run.task,
    };
    let backend = OnDevice { place: place.clone() };
    lacuna_worker::conformance::run_from_elsewhere(&spec, &backend);
    let engine = backend.engine(&spec)?.describe();
    let text = format!("slots of a task are pure: {engine}");
    Ok((true, text, json!({ "engine": engine })))
}

/// Engines at one place, whatever their specs say.
pub struct OnDevice {
    /// The place.
    pub place: DevicePlace,
}

impl Backend for OnDevice {
    fn library(&self) -> String {
        format!("libtorch {}", lacuna_mae::runtime::library_version())
    }

    fn trainer_env(&self, _device: &str) -> Vec<(String, String)> {
        Vec::new()
    }

    fn prepare(&self, _device: &str) -> Result<(), EngineError> {
        Ok(())
    }

    fn engine(&self, spec: &EngineSpec) -> Result<Box<dyn Engine>, EngineError> {
        let kernels = context::Kernels { tf32: spec.precision == Precision::Tf32, ..EXACT };
        context::set_kernels(kernels).map_err(|err| EngineError::Device {
            context: "failed to choose kernels".to_string(),
            source: Box::new(err),
        })?;
        let setup = EngineSetup {
            model: spec.model.clone(),
            seed: spec.seed,
            mean: spec.mean.clone(),
            std: spec.std.clone(),
            slot_batch: spec.slot_batch,
            precision: spec.precision,
        };
        if let Some(task) = &spec.task {
            let failed = |source: Box<dyn std::error::Error + Send + Sync>| EngineError::Device {
                context: "failed to build the engine of a task".to_string(),
                source,
            };
            let encoder = Arc::new(EncoderWeights::fresh(&spec.model, spec.seed));
            let driver = Driver::load(self.place.driver.as_deref());
            let card = driver.and_then(|driver| driver.device(self.place.ordinal));
            let place = Place::There(self.place.device, Some(card.map_err(|e| failed(e.into()))?));
            let engine = TaskEngine::at(setup, task, encoder, place);
            return Ok(Box::new(engine.map_err(|err| failed(err.into()))?));
        }
        let place = DevicePlace { n_slots: spec.n_slots, ..self.place.clone() };
        Ok(Box::new(DeviceTorchEngine::new(setup, place)?))
    }
}
