//! Copying the state aside for a checkpoint: on the host while training stands still, on a device
//! in the order of its work.

use std::ops::Range;

use lacuna_checkpoint::layout::{Attempt, PartId};
use lacuna_checkpoint::partition::Partition;
use lacuna_checkpoint::state::{LeftoverSpec, Origin, PartSlice, StateView, plan_part};
use lacuna_checkpoint::write::{BLOCK_BYTES, PartInfo};
use lacuna_control::plan::Plan;
use lacuna_device::Aside;
use lacuna_recipe::state::Section;
use lacuna_types::{AttemptSeq, Step};
use tracing::warn;

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
        &mut self,
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
        let flat = |spec: &PartSlice| match spec.origin {
            Origin::Flat(section, block) => {
                let at = layout.range(block).start;
                Some((section, at + spec.range.start as usize..at + spec.range.end as usize))
            }
            Origin::Leftover(_) => None,
        };
        let ranges: Vec<(Section, Range<usize>)> = specs.iter().filter_map(flat).collect();
        let aside = set_aside(self.engine.as_mut(), &ranges)?;
        let mut later: Vec<usize> = Vec::new();
        for (i, spec) in specs.iter().enumerate() {
            let bytes = snapshot.bytes_mut(i);
            match spec.origin {
                Origin::Flat(..) if aside.is_some() => later.push(i),
                Origin::Flat(section, _) => {
                    let (_, range) = flat(spec).expect("it is one");
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
        let aside = aside.map(|aside| (aside, later));
        Ok((digest, SaveJob { generation, attempt, info, snapshot, aside, held, given_up }))
    }
}

/// Copies ranges aside where the state is on a device; nothing where it is not, or the device has
/// no room for a copy.
fn set_aside(
    engine: &mut dyn Engine,
    ranges: &[(Section, Range<usize>)],
) -> Result<Option<Aside>, EngineError> {
    let Some(there) = engine.on_device() else { return Ok(None) };
    match there.state().set_aside(ranges) {
        Ok(aside) => Ok(Some(aside)),
        Err(error) if error.is_out_of_memory() => {
            warn!("no memory on the device for a copy of the state: a step waits for the bus");
            Ok(None)
        }
        Err(error) => Err(error.into()),
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
