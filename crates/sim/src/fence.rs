//! Which messages belong to which generation.

use lacuna_control::coordinator::Event;
use lacuna_control::message::{FaultKind, ToCoordinator};
use lacuna_types::Generation;

/// Returns the generation that a message belongs to, where it is bound to one.
fn generation_of(message: &mut ToCoordinator) -> Option<&mut Generation> {
    match message {
        ToCoordinator::Beat(beat) => Some(&mut beat.generation),
        ToCoordinator::StepMark(mark) => Some(&mut mark.generation),
        ToCoordinator::Fault { kind: FaultKind::Communicator, generation, .. }
        | ToCoordinator::Prepared { generation, .. }
        | ToCoordinator::Synced { generation, .. }
        | ToCoordinator::Held { generation, .. }
        | ToCoordinator::Snapshotted { generation, .. }
        | ToCoordinator::Audited { generation, .. }
        | ToCoordinator::PartDone { generation, .. }
        | ToCoordinator::PartFailed { generation, .. } => Some(generation),
        // What is wrong with a process is wrong in every generation.
        ToCoordinator::Fault { .. }
        | ToCoordinator::Warm { .. }
        | ToCoordinator::BadSamples(_)
        | ToCoordinator::Leaving { .. } => None,
    }
}

/// Returns the generation of a message that is older than `current`, where it is bound to one.
pub(crate) fn stale_for(event: &Event, current: Generation) -> Option<Generation> {
    let Event::Message { message, .. } = event else { return None };
    if matches!(message, ToCoordinator::Beat(_)) {
        // It tells how its process is, which may be stuck in what is over.
        return None;
    }
    let generation = generation_of(&mut message.clone()).copied()?;
    (generation < current && generation.0 > 0).then_some(generation)
}

/// The planted bug: the message counts for the present generation.
pub(crate) fn restamp(event: &mut Event, current: Generation) {
    if let Event::Message { message, .. } = event
        && let Some(generation) = generation_of(message)
    {
        *generation = current.max(*generation);
    }
}
