//! What a spec comes to, worked out without a machine: sizes, work, steps, and the share of each
//! number of workers.

mod memory;
mod warnings;

pub use warnings::task_warnings;

use std::fmt;

use lacuna_recipe::order::{OrderMode, default_mode};
use lacuna_recipe::state::Layout;

use crate::run_spec::{Order, ResolveError, Resolved, RunSpec, Workers};
use crate::units::Length;
use crate::units::{grouped, size};

pub use memory::Memory;

/// Efficiency below which a number of workers is warned about: one in seven would be idle.
pub const EFFICIENCY_WARNING: f64 = 0.85;
/// Rows of the printed table; beyond, only numbers of workers that shorten a step are of interest.
const ROWS_MAX: usize = 64;
/// Optimizer state of a parameter: itself and two moments, in f32.
const STATE_BYTES: u64 = 12;
/// Exponent of a tensor's reduction.
const EXPONENT_BYTES: u64 = 4;

/// How a step is shared by a number of workers.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerRow {
    /// Workers.
    pub n_workers: u32,
    /// Slots that the busiest worker computes, one after the other: `ceil(V / N)`.
    pub rounds: u32,
    /// Share of the workers' time that computes slots, `V / (N · ceil(V / N))`.
    pub efficiency: f64,
}

/// What `lacuna plan` prints.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanReport {
    /// The spec.
    pub spec: RunSpec,
    /// Trainable parameters.
    pub n_params: u64,
    /// Tensors that hold them.
    pub n_tensors: usize,
    /// FLOPs of one image, forward and backward.
    pub flops_per_image: f64,
    /// Peak of the learning rate.
    pub peak_lr: f64,
    /// V, the slots of a step.
    pub n_slots: u32,
    /// Bytes of parameters, moments and exponents: one checkpoint, but for its manifest.
    pub checkpoint_bytes: u64,
    /// What a worker holds in memory.
    pub memory: Memory,
    /// One row for every number of workers that the spec allows.
    pub workers: Vec<WorkerRow>,
    /// Steps and schedule, where the size of the data is known.
    pub data: Option<Result<Resolved, ResolveError>>,
    /// What is allowed and probably not wanted.
    pub warnings: Vec<String>,
}

/// Works out what `spec` means for `n_samples` of data, or for data that is not known yet.
pub fn plan(spec: &RunSpec, n_samples: Option<u64>) -> PlanReport {
    let layout = Layout::new(spec.params());
    let (n_params, n_tensors) = (layout.numel() as u64, layout.n_blocks());
    let n_exponents = spec.train.reduce.reduction().n_exponents(&layout) as u64;
    let n_slots = spec.n_slots();
    let workers = worker_rows(n_slots, spec.elastic.workers);
    let data = n_samples.map(|n_samples| spec.resolve(n_samples));
    let resolved = data.as_ref().and_then(|data| data.as_ref().ok());
    let per_epoch = resolved.map(|resolved| resolved.geometry.steps_per_epoch());
    PlanReport {
        n_params,
        n_tensors,
        flops_per_image: spec.train_flops(),
        peak_lr: spec.peak_lr(),
        n_slots,
        checkpoint_bytes: n_params * STATE_BYTES + n_exponents * EXPONENT_BYTES,
        memory: Memory::of(spec, n_params),
        warnings: warnings::warnings(spec, n_params, &workers, per_epoch),
        workers,
        data,
        spec: spec.clone(),
    }
}

/// Returns how `n_slots` are shared out by each number of workers.
pub fn worker_rows(n_slots: u32, workers: Workers) -> Vec<WorkerRow> {
    (workers.min..=workers.max).map(|n| row(n_slots, n)).collect()
}

fn row(n_slots: u32, n_workers: u32) -> WorkerRow {
    let rounds = n_slots.div_ceil(n_workers);
    let capacity = f64::from(n_workers) * f64::from(rounds);
    WorkerRow { n_workers, rounds, efficiency: f64::from(n_slots) / capacity }
}

impl fmt::Display for PlanReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fmt_model(f)?;
        self.fmt_steps(f)?;
        self.fmt_workers(f)?;
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        Ok(())
    }
}

impl PlanReport {
    /// Returns the figures for programs: bytes, FLOPs, steps; `steps` is null where the data's size
    /// is not known and the duration is in epochs.
    pub fn to_json(&self) -> serde_json::Value {
        let resolved = self.data.as_ref().and_then(|data| data.as_ref().ok());
        let steps = match (resolved, self.spec.train.duration) {
            (Some(resolved), _) => Some(resolved.total_steps),
            (None, Length::Steps(n)) => Some(n),
            (None, Length::Epochs(_)) => None,
        };
        let row = |row: &WorkerRow| {
            serde_json::json!({
                "workers": row.n_workers, "rounds": row.rounds, "efficiency": row.efficiency,
            })
        };
        serde_json::json!({
            "run": self.spec.name, "maths": self.spec.maths_digest().to_hex().to_string(),
            "parameters": self.n_params, "tensors": self.n_tensors,
            "flops_per_image": self.flops_per_image, "peak_lr": self.peak_lr,
            "slots": self.n_slots, "slot_batch": self.spec.train.slot_batch,
            "checkpoint_bytes": self.checkpoint_bytes,
            "memory_bytes": {
                "total": self.memory.total(), "state": self.memory.state,
                "slot": self.memory.slot, "libraries": self.memory.libraries,
            },
            "steps": steps,
            "problem": match &self.data {
                Some(Err(problem)) => Some(problem.to_string()),
                _ => None,
            },
            "steps_per_epoch": resolved.map(|resolved| resolved.geometry.steps_per_epoch()),
            "workers": self.workers.iter().map(row).collect::<Vec<_>>(),
            "warnings": self.warnings,
        })
    }

    fn fmt_model(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (spec, model) = (&self.spec, &self.spec.model);
        let [height, width] = model.img_size;
        writeln!(f, "run          {}", spec.name)?;
        writeln!(f, "digest       {}", spec.digest().to_hex())?;
        writeln!(f, "maths        {}", spec.maths_digest().to_hex())?;
        writeln!(
            f,
            "images       {height}x{width}x{} in patches of {}: {} patches, {}",
            model.channels,
            model.patch_size,
            grouped(model.n_patches() as u64),
            match &spec.task {
                None => format!("the encoder sees {}", grouped(model.len_keep() as u64)),
                Some(_) => "all of them are seen".to_string(),
            },
        )?;
        writeln!(f, "parameters   {} in {} tensors", grouped(self.n_params), self.n_tensors)?;
        let per_step = self.flops_per_image * f64::from(spec.train.batch);
        writeln!(
            f,
            "work         {}FLOP an image, {}FLOP a step",
            metric(self.flops_per_image),
            metric(per_step)
        )?;
        writeln!(f, "checkpoint   {}", size(self.checkpoint_bytes))?;
        let Memory { state, slot, libraries } = self.memory;
        writeln!(
            f,
            "memory       about {} a worker: {} for parameters, moments and sums, {} for a slot \
             of {}, {} for libraries",
            size(self.memory.total()),
            size(state),
            size(slot),
            spec.train.slot_batch,
            size(libraries),
        )
    }

    fn fmt_steps(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spec = &self.spec;
        writeln!(
            f,
            "batch        {} = {} slots of {}",
            spec.train.batch, self.n_slots, spec.train.slot_batch
        )?;
        let warmup = spec.optim.warmup.map_or("none".to_string(), |w| w.to_string());
        writeln!(
            f,
            "rate         peak {:e} = {:e} * {} / 256, warm-up {warmup}, end {}",
            self.peak_lr, spec.optim.base_lr, spec.train.batch, spec.optim.min_lr
        )?;
        let duration = spec.train.duration;
        let resolved = match (&self.data, duration) {
            (Some(Ok(resolved)), _) => resolved,
            (Some(Err(error)), _) => return writeln!(f, "steps        impossible: {error}"),
            (None, Length::Steps(n)) => {
                return writeln!(f, "steps        {}", grouped(n));
            }
            (None, Length::Epochs(_)) => {
                return writeln!(f, "steps        {duration}: known with the data");
            }
        };
        let geometry = resolved.geometry;
        let per_epoch = geometry.steps_per_epoch();
        let order = match (spec.data.order, default_mode(geometry.n_samples)) {
            (Order::Auto, OrderMode::Block) => Order::Block,
            (Order::Auto, _) => Order::Global,
            (order, _) => order,
        };
        let dropped = geometry.n_samples - per_epoch * u64::from(geometry.batch);
        writeln!(
            f,
            "data         {} samples in {} order, {} steps an epoch, {} samples left over",
            grouped(geometry.n_samples),
            order,
            grouped(per_epoch),
            grouped(dropped),
        )?;
        writeln!(
            f,
            "steps        {} = {:.2} epochs",
            grouped(resolved.total_steps),
            resolved.total_steps as f64 / per_epoch as f64
        )?;
        let total =
            self.flops_per_image * f64::from(spec.train.batch) * resolved.total_steps as f64;
        writeln!(f, "whole run    {}FLOP", metric(total))
    }

    fn fmt_workers(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "workers  rounds  efficiency")?;
        let mut fewest = u32::MAX;
        let mut n_hidden = 0;
        for (i, row) in self.workers.iter().enumerate() {
            let shortens = row.rounds < fewest;
            fewest = fewest.min(row.rounds);
            if i >= ROWS_MAX && !shortens {
                n_hidden += 1;
                continue;
            }
            let mark = match row.efficiency < EFFICIENCY_WARNING {
                true => "  low",
                false => "",
            };
            let WorkerRow { n_workers, rounds, efficiency } = row;
            writeln!(f, "{n_workers:>7}  {rounds:>6}  {efficiency:>10.3}{mark}")?;
        }
        match n_hidden {
            0 => Ok(()),
            n => writeln!(f, "and {n} numbers of workers that do not shorten a step"),
        }
    }
}

/// Prints a quantity with three digits after the point and a decimal prefix, `58.463 G`.
fn metric(x: f64) -> String {
    let prefixes = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"];
    let mut value = x;
    let mut i = 0;
    while value >= 1000.0 && i + 1 < prefixes.len() {
        value /= 1000.0;
        i += 1;
    }
    format!("{value:.3} {}", prefixes[i])
}

#[cfg(test)]
mod tests;
