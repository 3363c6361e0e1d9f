//! The torch engine as a worker's backend.

use lacuna_mae::engine::{EngineSetup, TorchEngine};
use lacuna_mae::runtime::{CPU_ENV, library_version};
use lacuna_worker::engine::{Backend, Engine, EngineError, EngineSpec};

/// Builds torch engines.
#[derive(Clone, Copy, Debug)]
pub struct TorchBackend;

impl Backend for TorchBackend {
    fn library(&self) -> String {
        format!("libtorch {}", library_version())
    }

    fn trainer_env(&self) -> Vec<(String, String)> {
        CPU_ENV.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
    }

    fn engine(&self, spec: &EngineSpec) -> Result<Box<dyn Engine>, EngineError> {
        let setup = EngineSetup {
            model: spec.model.clone(),
            seed: spec.seed,
            mean: spec.mean.clone(),
            std: spec.std.clone(),
            slot_batch: spec.slot_batch,
        };
        let failed = |source| EngineError::Device {
            context: format!("failed to build the engine on {}", spec.device),
            source: Box::new(source),
        };
        Ok(Box::new(TorchEngine::new(setup).map_err(failed)?))
    }
}
