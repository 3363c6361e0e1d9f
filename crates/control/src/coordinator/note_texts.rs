//! Sentences of more than one part that people read of a group.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use lacuna_types::{Step, Timestamp, WorkerId};

use super::forming::Group;
use crate::plan::Origin;

/// Writes `1 worker`, `2 workers`.
pub(super) fn workers(n: usize) -> String {
    format!("{n} worker{}", if n == 1 { "" } else { "s" })
}

/// Reasons that one text names; of more there is their number.
const REASONS_MAX: usize = 8;

/// Writes who cannot go on, and why.
pub(super) fn reasons(unfit: &BTreeMap<WorkerId, String>) -> String {
    let named = unfit.iter().take(REASONS_MAX).map(|(id, why)| format!("{id}: {why}"));
    let mut text = named.collect::<Vec<String>>().join("; ");
    if unfit.len() > REASONS_MAX {
        write!(text, "; and {} more", unfit.len() - REASONS_MAX).expect("a string takes all");
    }
    text
}

/// Describes a started generation. `broken` is when the one before it was broken off, and how many
/// steps were known to be applied by then.
pub(super) fn started(group: &Group, broken: Option<(Timestamp, Step)>, now: Timestamp) -> String {
    let sync = group.sync.as_ref().expect("a started group is synchronised");
    let from = match &sync.origin {
        Origin::Seed => "from the seed".to_string(),
        Origin::Checkpoint { .. } => "from the newest checkpoint".to_string(),
        Origin::Memory { healed, .. } if healed.is_empty() => "state in memory".to_string(),
        Origin::Memory { source, healed } => {
            let names: Vec<&str> =
                healed.iter().map(|&rank| group.plan.members[rank].worker.as_str()).collect();
            format!("{} healed from {}", names.join(", "), group.plan.members[*source].worker)
        }
    };
    let slots: Vec<String> =
        group.plan.members.iter().map(|m| format!("{} {}", m.worker, m.slots.len())).collect();
    let (generation, step) = (group.plan.generation, sync.resume_step);
    let mut text = format!(
        "generation {generation}: {} at step {step}, {from}; slots: {}",
        workers(group.plan.world()),
        slots.join(", ")
    );
    if let Some((at, progress)) = broken {
        let again = match progress.0.saturating_sub(step.0) {
            0 => format!("step {} computed anew", step.next()),
            // The one that was broken off too.
            _ => format!("steps {} to {} computed anew", step.next(), progress.next()),
        };
        let seconds = now.since(at).as_secs_f64();
        write!(text, "; {again}, 0 samples skipped, {seconds:.1} s").expect("a string takes all");
    }
    text
}
