//! What a worker says again after its stream broke.

use crate::message::ToCoordinator;

/// What this worker has said of the newest generation and must say again on a new stream.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Answers {
    pub prepared: Option<ToCoordinator>,
    pub synced: Option<ToCoordinator>,
    pub snapshotted: Option<ToCoordinator>,
    pub part: Option<ToCoordinator>,
    pub held: Option<ToCoordinator>,
    pub audited: Option<ToCoordinator>,
    pub fault: Option<ToCoordinator>,
}

impl Answers {
    /// Returns them in the order in which they were first said.
    pub(super) fn in_order(&self) -> impl Iterator<Item = &ToCoordinator> {
        let Answers { prepared, synced, snapshotted, part, held, audited, fault } = self;
        [prepared, synced, snapshotted, part, held, audited, fault].into_iter().flatten()
    }

    /// Keeps a message that answers the coordinator; others need no repetition.
    pub(super) fn keep(&mut self, message: &ToCoordinator) {
        use ToCoordinator as M;
        let place = match message {
            M::Prepared { .. } => &mut self.prepared,
            M::Synced { .. } => &mut self.synced,
            M::Snapshotted { .. } => &mut self.snapshotted,
            M::PartDone { .. } | M::PartFailed { .. } => &mut self.part,
            M::Held { .. } => &mut self.held,
            M::Audited { .. } => &mut self.audited,
            M::Fault { .. } => &mut self.fault,
            M::Beat(_) | M::Warm { .. } | M::StepMark(_) | M::Leaving { .. } | M::BadSamples(_) => {
                return;
            }
        };
        *place = Some(message.clone());
    }
}
