//! What follows from a run's spec: the machine's settings, and the samples of a step.

use std::time::Duration;

use lacuna_control::coordinator::{Note, RunConfig, WhenBusy};
use lacuna_recipe::order::{EpochOrder, OrderMode, OrderSpec};
use lacuna_spec::RunSpec;
use lacuna_spec::units::Cadence;
use lacuna_types::{SampleId, Step};

use super::RunTask;
use crate::catalogue::cadence_steps;

/// Derives what the machine needs from a spec.
pub(crate) fn run_config(spec: &RunSpec, n_samples: u64) -> Result<RunConfig, String> {
    let resolved = spec.resolve(n_samples).map_err(|err| err.to_string())?;
    let per_epoch = resolved.geometry.steps_per_epoch();
    let every = &spec.checkpoint.every;
    let epoch_samples = per_epoch * u64::from(spec.train.batch);
    Ok(RunConfig {
        n_slots: spec.n_slots(),
        total_steps: resolved.total_steps,
        workers_min: spec.elastic.workers.min as usize,
        workers_max: spec.elastic.workers.max as usize,
        checkpoint_steps: every.iter().filter_map(|c| cadence_steps(c, per_epoch)).min(),
        checkpoint_interval: every.iter().filter_map(cadence_time).min(),
        when_busy: match spec.checkpoint.when_busy {
            lacuna_spec::WhenBusy::Skip => WhenBusy::Skip,
            lacuna_spec::WhenBusy::Wait => WhenBusy::Wait,
            lacuna_spec::WhenBusy::Cancel => WhenBusy::Cancel,
        },
        max_failures: spec.checkpoint.max_failures,
        epoch_steps: per_epoch,
        epoch_samples,
        bad_samples_max: spec.bad_samples_max(epoch_samples),
    })
}

fn cadence_time(cadence: &Cadence) -> Option<Duration> {
    match cadence {
        Cadence::Seconds(seconds) => Some(Duration::from_secs(*seconds)),
        Cadence::Length(_) => None,
    }
}

impl RunTask {
    /// Says which samples a step holds, where the order is one permutation of all of them.
    pub(super) fn name_samples(&self, step: Step) -> Note {
        let text = match self.samples_of(step) {
            Some(samples) => {
                let samples: Vec<String> = samples.iter().map(ToString::to_string).collect();
                format!("step {step} holds samples {}", samples.join(" "))
            }
            None => format!("`lacuna data show-order` lists the samples of step {step}"),
        };
        Note { kind: "samples", warning: true, text }
    }

    fn samples_of(&self, step: Step) -> Option<Vec<SampleId>> {
        let spec: RunSpec = serde_json::from_str(&self.stored.spec).ok()?;
        let n_samples = self.stored.n_samples;
        let params = spec.order(n_samples, 1);
        if params.mode == OrderMode::Block {
            // Needs the chunks of the data, which only workers see.
            return None;
        }
        let (seed, batch) = (spec.train.seed, spec.train.batch);
        let order = OrderSpec { params, seed, batch, chunk_bounds: [0, n_samples].into() };
        let (epoch, t) = spec.resolve(n_samples).ok()?.geometry.place(step);
        let first = t * u64::from(batch);
        Some(EpochOrder::new(&order, epoch).samples(first..first + u64::from(batch)))
    }
}
