//! Worker binaries: agent and trainer on libtorch, for any objective.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser as _;
use lacuna_cuda::Driver;
use lacuna_spec::{Precision, TaskSpec};
use lacuna_worker::args::WorkerArgs;
use lacuna_worker::engine::{Backend, Engine, EngineError, EngineSpec};
use lacuna_worker::entry::dispatch;
use tch::Device;

use crate::classify::EncoderWeights;
use crate::context::{self, EXACT, Kernels};
use crate::cuda;
use crate::engine::{
    DevicePlace, DeviceTorchEngine, EngineSetup, Place, TaskEngine, TorchEngine, guarded,
};
use crate::objective::{MaeObjective, Objective};
use crate::runtime::{CPU_ENV, CUDA_ENV, FOREIGN_ENV, library_version};

/// Is a worker whose runs learn `objective`: the whole `main` of a worker binary.
///
/// It has the command line of `lacuna-worker` and joins the same coordinators. Workers of one run
/// all need the same objective; one with another is found out by its probe and refused.
pub fn main(objective: impl Objective + 'static) -> ExitCode {
    dispatch(WorkerArgs::parse(), TorchBackend::new(objective))
}

/// Builds torch engines.
#[derive(Clone, Debug)]
pub struct TorchBackend {
    objective: Arc<dyn Objective>,
}

impl TorchBackend {
    /// Builds engines that learn `objective`.
    pub fn new(objective: impl Objective + 'static) -> Self {
        TorchBackend { objective: Arc::new(objective) }
    }
}

impl Default for TorchBackend {
    fn default() -> Self {
        TorchBackend::new(MaeObjective)
    }
}

impl Backend for TorchBackend {
    fn library(&self) -> String {
        format!("libtorch {}", library_version())
    }

    fn trainer_env(&self, device: &str) -> Vec<(String, String)> {
        let owned = |pins: &[(&str, &str)]| -> Vec<(String, String)> {
            pins.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
        };
        let Some(number) = cuda_number(device) else { return owned(CPU_ENV) };
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        let mut env = owned(CUDA_ENV);
        env.push(("CUDA_VISIBLE_DEVICES".into(), visible_device(visible.as_deref(), number)));
        env
    }

    fn prepare(&self, device: &str) -> Result<(), EngineError> {
        if cuda_number(device).is_none() {
            return Ok(());
        }
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| {
            let context = format!("{device} cannot be used");
            EngineError::Device { context, source }
        };
        let library = cuda::load().map_err(|err| failed(err.into()))?;
        context::set_kernels(EXACT).map_err(|err| failed(err.into()))?;
        let card = &library.devices[0];
        tracing::info!(
            device,
            card = card.name,
            memory_gib = card.memory_bytes >> 30,
            capability = card.capability_text(),
            cuda = library.runtime,
            driver = library.driver.driver,
            "CUDA ready"
        );
        Ok(())
    }

    fn end(&self, code: u8) -> ! {
        context::end_process(code)
    }

    fn trainer_env_removed(&self) -> &'static [&'static str] {
        FOREIGN_ENV
    }

    fn engine(&self, spec: &EngineSpec) -> Result<Box<dyn Engine>, EngineError> {
        // A device is used for the first time here.
        guarded("build the engine", || self.build(spec))?
    }
}

impl TorchBackend {
    fn build(&self, spec: &EngineSpec) -> Result<Box<dyn Engine>, EngineError> {
        let setup = EngineSetup {
            model: spec.model.clone(),
            seed: spec.seed,
            mean: spec.mean.clone(),
            std: spec.std.clone(),
            slot_batch: spec.slot_batch,
            precision: spec.precision,
        };
        let failed = |source| EngineError::Device {
            context: format!("failed to build the engine on {}", spec.device),
            source: Box::new(source),
        };
        if cuda_number(&spec.device).is_some() {
            let kernels = Kernels { tf32: spec.precision == Precision::Tf32, ..EXACT };
            context::set_kernels(kernels).map_err(|err| EngineError::Device {
                context: "failed to choose kernels".to_string(),
                source: Box::new(err),
            })?;
        }
        if let Some(task) = &spec.task {
            return task_engine(setup, task, &spec.device);
        }
        if cuda_number(&spec.device).is_none() {
            return Ok(Box::new(
                TorchEngine::with_objective(setup, &self.objective).map_err(failed)?,
            ));
        }
        // Its agent hides all devices but one.
        let place = DevicePlace {
            device: Device::Cuda(0),
            ordinal: 0,
            driver: None,
            compiler: cuda::nvrtc(),
            n_slots: spec.n_slots,
        };
        Ok(Box::new(DeviceTorchEngine::with_objective(setup, place, &self.objective)?))
    }
}

/// Builds the engine of a task: on a device slots are computed there, and updates on the host.
fn task_engine(
    setup: EngineSetup,
    task: &TaskSpec,
    device: &str,
) -> Result<Box<dyn Engine>, EngineError> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| EngineError::Device {
        context: format!("failed to build the engine of `task.kind` = \"{}\"", task.kind),
        source,
    };
    let place = match cuda_number(device) {
        None => Place::Here,
        Some(_) => {
            // Its agent hides all devices but one.
            let card = Driver::load(None).and_then(|driver| driver.device(0));
            Place::There(Device::Cuda(0), Some(card.map_err(|err| failed(err.into()))?))
        }
    };
    let encoder =
        EncoderWeights::of_task(task, &setup.model, setup.seed, (&setup.mean, &setup.std));
    let encoder = Arc::new(encoder.map_err(|err| failed(err.into()))?);
    let engine = TaskEngine::at(setup, task, encoder, place).map_err(|err| failed(err.into()))?;
    Ok(Box::new(engine))
}

/// Returns the number of a CUDA device, 3 of `cuda3`; nothing for other devices.
fn cuda_number(device: &str) -> Option<usize> {
    device.strip_prefix("cuda")?.parse().ok()
}

/// Returns the value of CUDA_VISIBLE_DEVICES that leaves device `number` of those that `visible`,
/// its value now, leaves.
fn visible_device(visible: Option<&str>, number: usize) -> String {
    let listed = visible.and_then(|list| list.split(',').nth(number));
    listed.map_or_else(|| number.to_string(), |device| device.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trainer_sees_its_own_device_only() {
        assert_eq!(visible_device(None, 3), "3");
        assert_eq!(visible_device(Some("4,6"), 1), "6");
        assert_eq!(visible_device(Some("GPU-5f, GPU-77"), 1), "GPU-77");
        let env = TorchBackend::default().trainer_env("cuda2");
        let names: Vec<&str> = env.iter().map(|(name, _)| name.as_str()).collect();
        assert!(names.contains(&"CUDA_VISIBLE_DEVICES"), "{names:?}");
        assert!(names.contains(&"CUBLAS_WORKSPACE_CONFIG"), "{names:?}");
        assert!(
            TorchBackend::default()
                .trainer_env("cpu0")
                .iter()
                .all(|(name, _)| !name.contains("CU"))
        );
    }

    #[test]
    fn a_machine_without_cuda_is_told_what_is_missing() {
        if std::path::Path::new("/proc/driver/nvidia/version").exists() {
            return println!("skipped: this machine has an NVIDIA driver");
        }
        TorchBackend::default().prepare("cpu1").expect("a CPU needs nothing");
        let error = TorchBackend::default().prepare("cuda0").expect_err("there is no driver");
        assert_eq!(error.to_string(), "cuda0 cannot be used");
        let why = std::error::Error::source(&error).expect("there is a reason").to_string();
        assert!(why.starts_with("no CUDA library") || why.starts_with("no NVIDIA driver"), "{why}");
    }
}
