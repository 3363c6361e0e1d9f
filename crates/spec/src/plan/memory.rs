//! What a worker holds in memory, as far as it follows from the spec.

use lacuna_recipe::model::ModelConfig;

use crate::run_spec::{Pool, Precision, Reduce, RunSpec, TaskKind, TaskSpec};

/// Parameter and two moments, in f32.
const STATE: u64 = 12;
/// The mean gradient, a tensor's gradient before it is added to the sums, and what the allocator
/// keeps of freed ones.
const GRADIENTS: u64 = 16;
/// What a trainer on a CPU was seen to hold before it had a model; program and libraries themselves
/// are files, which the system can drop.
const LIBRARIES: u64 = 80 << 20;

/// Bytes that a worker holds, which the system cannot take back: what `lacuna status` shows. On a
/// CPU measured ones were within a tenth for `demo`, `tiny` and `base` in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Parameters, moments, sums and gradients; on a GPU these lie on the device.
    pub state: u64,
    /// What the pass back needs of a slot; on the device, too.
    pub slot: u64,
    /// What a process has before it has a model, on the host.
    pub libraries: u64,
}

impl Memory {
    /// Works out what a worker needs for `n_params` parameters.
    pub(super) fn of(spec: &RunSpec, n_params: u64) -> Self {
        let sums = match spec.train.reduce {
            Reduce::Exact => 8,
            Reduce::Exact32 | Reduce::Fast => 4,
        };
        let (value, copies) = match spec.train.precision {
            Precision::F32 | Precision::Tf32 => (4, 0),
            // Products read and write bf16, and so do the parameters that they use.
            Precision::Bf16 => (2, 2),
        };
        let images = u64::from(spec.train.slot_batch);
        // A task reads its encoder from memory of its own: a probe computes with it, fine-tuning
        // begins with it.
        let encoder = match &spec.task {
            Some(TaskSpec { kind: TaskKind::Linear, pool: Pool::Avg | Pool::Cls, .. }) => 8,
            Some(TaskSpec { kind: TaskKind::Finetune, .. }) => 4,
            _ => 0,
        };
        let encoder = encoder_params(&spec.model).saturating_mul(encoder);
        Memory {
            state: encoder
                .saturating_add(n_params.saturating_mul(STATE + GRADIENTS + sums + copies)),
            slot: match &spec.task {
                None => activations(&spec.model),
                Some(task) => of_task(task, &spec.model),
            }
            .saturating_mul(images * value)
            // What operations need for a while.
            .saturating_mul(6)
                / 5,
            libraries: LIBRARIES,
        }
    }

    /// Returns all of it.
    pub fn total(&self) -> u64 {
        self.state.saturating_add(self.slot).saturating_add(self.libraries)
    }
}

/// Counts the parameters of the encoder.
fn encoder_params(model: &ModelConfig) -> u64 {
    let is_encoder = |name: &str| !name.starts_with("decoder_") && name != "mask_token";
    let params = model.params();
    params.iter().filter(|param| is_encoder(&param.name)).map(|param| param.numel() as u64).sum()
}

/// The same for a task: a pass over all patches, of which a probe keeps one block at a time.
fn of_task(task: &TaskSpec, model: &ModelConfig) -> u64 {
    let tokens = 1 + model.n_patches() as u64;
    let block = tokens.saturating_mul(u64::from(model.width) * u64::from(8 + 2 * model.mlp_ratio));
    let depth = match (task.kind, task.pool) {
        (TaskKind::Finetune, _) => u64::from(model.depth),
        (TaskKind::Linear, Pool::Pixels) => 0,
        (TaskKind::Linear, _) => 1,
    };
    let pixels = 2 * (model.n_patches() as u64).saturating_mul(model.patch_values() as u64);
    block.saturating_mul(depth).saturating_add(pixels)
}

/// Counts the values of one image that a forward pass keeps for the pass back. A block keeps, for
/// each token, its input, queries, keys and values, what attention gives, the sum after it, two
/// normed copies, and the hidden layer before and after GELU.
fn activations(model: &ModelConfig) -> u64 {
    let block = |tokens: u64, width: u32| {
        tokens.saturating_mul(u64::from(width) * u64::from(8 + 2 * model.mlp_ratio))
    };
    let (patches, kept) = (model.n_patches() as u64, model.len_keep() as u64);
    let encoder = block(1 + kept, model.width).saturating_mul(u64::from(model.depth));
    let decoder =
        block(1 + patches, model.decoder_width).saturating_mul(u64::from(model.decoder_depth));
    // Images, targets, and predictions of the removed patches.
    let pixels = 3 * patches.saturating_mul(model.patch_values() as u64);
    encoder.saturating_add(decoder).saturating_add(pixels)
}
