//! Copying the state aside for a checkpoint, while training stands still.

use std::ops::Range;

use lacuna_checkpoint::layout::{Attempt, PartId};
use lacuna_checkpoint::partition::Partition;
use lacuna_checkpoint::state::{LeftoverSpec, Origin, StateView, plan_part};
use lacuna_checkpoint::write::{BLOCK_BYTES, PartInfo};
use lacuna_control::plan::Plan;
use lacuna_recipe::state::Section;
use lacuna_types::{AttemptSeq, Step};

use super::saver::SaveJob;
use super::step_loop::StepLoop;
use crate::engine::{Engine, EngineError};

impl StepLoop {
    /// Makes memory for the part of `rank` ready.
    pub(super) fn reserve(&self, plan: &Plan, rank: usize) {
        let counters = self.counters.as_ref().expect("there is a state");
        let view = StateView::leftovers_of(self.engine.layout(), counters);
        let view = view.with_tables(&self.job.spec.model);
        let partition = Partition::new(self.engine.layout(), plan.world() as u32);
        let leftovers = view.leftovers();
        self.saver.reserve(plan_part(self.engine.layout(), &partition, leftovers, rank as u32));
    }

    /// Copies the part of `rank` aside; returns the digest of the whole state, and what to write.
    pub(super) fn snapshot(
        &self,
        plan: &Plan,
        rank: usize,
        (attempt, held): (AttemptSeq, bool),
    ) -> Result<(u64, SaveJob), EngineError> {
        let layout = self.engine.layout().clone();
        let counters = self.counters.clone().expect("there is a state");
        let digest = self.digest()?;
        let view = StateView::leftovers_of(&layout, &counters).with_tables(&self.job.spec.model);
        let leftovers: Vec<LeftoverSpec> = view.leftovers().to_vec();
        let world = plan.world() as u32;
        let partition = Partition::new(&layout, world);
        let specs = plan_part(&layout, &partition, &leftovers, rank as u32);
        let mut snapshot = self.saver.buffer();
        snapshot.prepare(specs.clone());
        for (i, spec) in specs.iter().enumerate() {
            let bytes = snapshot.bytes_mut(i);
            match spec.origin {
                Origin::Flat(section, block) => {
                    let at = layout.range(block).start;
                    let range = at + spec.range.start as usize..at + spec.range.end as usize;
                    read_bytes(self.engine.as_ref(), section, range, bytes)?;
                }
                Origin::Leftover(place) => bytes.copy_from_slice(view.leftover_bytes(place)),
            }
        }
        let info = PartInfo {
            run: self.job.run.clone(),
            step: Step(counters.step),
            attempt: Attempt::new(plan.generation, attempt),
            part: PartId { rank: rank as u32, world },
            state_digest: digest,
            counters,
            block_bytes: BLOCK_BYTES,
        };
        let (generation, given_up) = (plan.generation, self.shared.begin_saving(attempt));
        Ok((digest, SaveJob { generation, attempt, info, snapshot, held, given_up }))
    }
}

/// Reads elements into memory that need not be aligned, but mostly is: then nothing is copied
/// twice.
fn read_bytes(
    engine: &dyn Engine,
    section: Section,
    range: Range<usize>,
    bytes: &mut [u8],
) -> Result<(), EngineError> {
    if let Ok(values) = bytemuck::try_cast_slice_mut(bytes) {
        return engine.read(section, range, values);
    }
    let mut values = vec![0f32; range.len()];
    engine.read(section, range, &mut values)?;
    bytes.copy_from_slice(bytemuck::cast_slice(&values));
    Ok(())
}
