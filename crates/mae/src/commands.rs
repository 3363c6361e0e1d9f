//! Commands of `lacuna-worker` that use a trained model.

pub mod batches;
pub mod classify;
pub mod eval;
pub mod feature_file;
pub mod features;
pub mod knn;
pub mod page;
pub mod predict;
pub mod reconstruct;
pub mod report;
pub mod source;
pub mod statistics;

use anyhow::Context as _;
use lacuna_mae::runtime::start_again_pinned;
use lacuna_mae::worker::TorchBackend;
use lacuna_recipe::init;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::state::Layout;
use lacuna_types::exit;
use lacuna_worker::engine::EngineSpec;
use lacuna_worker::entry::CodedError;

/// Runs the engine's conformance suite; panics where the contract is broken.
pub fn conformance() -> anyhow::Result<u8> {
    start_again_pinned().context("start with the environment of a trainer")?;
    for (name, slot_batch) in [("micro", 3), ("demo", 2)] {
        let model = ModelConfig::preset(name).expect("a preset");
        let channels = model.channels as usize;
        let spec = EngineSpec {
            model,
            seed: 5,
            mean: vec![0.5; channels],
            std: vec![0.25; channels],
            slot_batch,
            n_slots: 4,
            precision: lacuna_spec::Precision::F32,
            device: "cpu0".to_string(),
            task: None,
        };
        lacuna_worker::conformance::run(&spec, &TorchBackend::default());
        println!("engine conformance: {name} with slots of {slot_batch}");
    }
    println!("engine conformance: passed");
    Ok(exit::OK)
}

/// Draws the parameters that a fresh run with this seed would have.
fn random_params(model: &ModelConfig, seed: u64) -> Vec<f32> {
    let layout = Layout::new(model.params());
    let mut params = vec![0f32; layout.numel()];
    for (block, spec) in layout.params().iter().enumerate() {
        init::fill(spec, seed, &mut params[layout.range(block)]);
    }
    params
}

/// Makes the error of bad arguments or of files that are something else.
fn usage(message: impl Into<String>) -> anyhow::Error {
    CodedError { code: exit::USAGE, message: message.into() }.into()
}

/// Makes the error of files that could not be read or written.
fn io(message: impl Into<String>) -> anyhow::Error {
    CodedError { code: exit::IO, message: message.into() }.into()
}
