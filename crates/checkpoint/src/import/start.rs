//! The first checkpoint of a run, made of parameters and not of training.

use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::state::{Counters, Layout};
use lacuna_types::{AttemptSeq, CoordEpoch, Generation, Step};

use crate::catalog;
use crate::commit::{ClaimError, CommitError, Committed, Context, claim, commit, highest_claim};
use crate::disk::FsError;
use crate::layout::{Attempt, PartId, RunDir};
use crate::manifest::RunFacts;
use crate::partition::Partition;
use crate::state::{StateView, digest_state};
use crate::write::{BLOCK_BYTES, PartInfo, WritePartError, write_part};

/// What a checkpoint at step 0 is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Start<'a> {
    /// The model.
    pub config: &'a ModelConfig,
    /// Its parameters, laid out as [`Layout`] does.
    pub params: &'a [f32],
    /// Global batch of the run.
    pub batch: u32,
    /// What identifies the run's arithmetic.
    pub facts: RunFacts,
    /// The effective run specification, TOML.
    pub spec: String,
    /// Time of the commit, RFC 3339.
    pub created: String,
}

/// A first checkpoint that was not made.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The run has checkpoints already.
    #[error("run `{run}` has a checkpoint at step {step}: {}", HINT)]
    Begun {
        /// Which run.
        run: String,
        /// The highest step.
        step: Step,
    },
    /// The run has none, but a coordinator has begun it and may be training.
    #[error("run `{run}` was begun by coordinator epoch {epoch}: {}", HINT)]
    Claimed {
        /// Which run.
        run: String,
        /// The highest claim.
        epoch: CoordEpoch,
    },
    /// The part was not written.
    #[error(transparent)]
    Write(#[from] WritePartError),
    /// The run was taken meanwhile.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The checkpoint was not committed.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The file system refused.
    #[error("the checkpoint was not written")]
    Fs(#[from] FsError),
}

const HINT: &str = "weights are imported into new runs only; give the spec another name, or remove \
                    the run's folder";

/// Checks that a run has neither a checkpoint nor a coordinator.
pub fn check_fresh(dir: &RunDir) -> Result<(), StartError> {
    let run = dir.run().to_string();
    // Damaged ones count: somebody may want to mend them.
    if let Some(step) = catalog::list(dir)?.iter().map(|entry| entry.step).max() {
        return Err(StartError::Begun { run, step });
    }
    match highest_claim(dir)? {
        Some(epoch) => Err(StartError::Claimed { run, epoch }),
        None => Ok(()),
    }
}

/// Commits parameters as the checkpoint of a new run at step 0: one part, moments zero, counters
/// fresh.
///
/// The run is claimed only when the part is durable, so an import that dies can be done again.
pub fn commit_start(dir: &RunDir, start: &Start<'_>) -> Result<Committed, StartError> {
    check_fresh(dir)?;
    let layout = Layout::new(start.config.params());
    let counters = Counters::fresh(layout.n_blocks(), start.batch);
    // The kernel gives zeros, and memory only where somebody writes.
    let zeros: Vec<f32> = vec![0.0; layout.numel()];
    let sections: [&[f32]; 3] = [start.params, &zeros, &zeros];
    let state = StateView::new(&layout, sections, &counters).with_tables(start.config);
    let step = Step(counters.step);
    let attempt = Attempt::new(unused_generation(dir, step)?, AttemptSeq(1));
    let info = PartInfo {
        run: dir.run().clone(),
        step,
        attempt,
        part: PartId { rank: 0, world: 1 },
        state_digest: digest_state(&layout, sections, &counters),
        counters: counters.clone(),
        block_bytes: BLOCK_BYTES,
    };
    let receipt = write_part(dir, &info, &state.part(&Partition::new(&layout, 1), 0))?;
    let coord_epoch = CoordEpoch(0).next();
    claim(dir, coord_epoch)?;
    let context = Context {
        step,
        attempt,
        coord_epoch,
        world_size: 1,
        created: start.created.clone(),
        parent: None,
        facts: start.facts.clone(),
        spec: start.spec.clone(),
    };
    Ok(commit(dir, &[receipt], &context)?)
}

/// Returns the first generation that no attempt at `step` names; an import that died left one.
fn unused_generation(dir: &RunDir, step: Step) -> Result<Generation, FsError> {
    let names = dir.storage().names(&dir.step(step))?;
    let attempts = names.iter().filter_map(|name| RunDir::parse_attempt(name));
    Ok(attempts.map(|attempt| attempt.generation).max().unwrap_or_default().next())
}
