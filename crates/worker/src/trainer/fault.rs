//! What went wrong in the step loop, and what the coordinator does about each of it.

use lacuna_collective::CollectiveError;
use lacuna_control::message::FaultKind;
use lacuna_data::loader::LoadError;

use super::sync::SyncError;
use crate::engine::EngineError;
use crate::step_math::MathError;

/// Why a step did not come to its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum StepError {
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Data(#[from] LoadError),
    #[error("data came too late, {1} times in a row")]
    Late(#[source] LoadError, u32),
    #[error(transparent)]
    Reduce(#[from] lacuna_recipe::reduce::ReduceError),
    #[error("{n} steps in a row were not finite, up to step {step} ({detail})")]
    NonFinite { n: u32, step: u64, detail: String },
}

/// Times in a row that a slot may not be there in time before the worker is taken for unfit.
const LATE_MAX: u32 = 5;

impl From<MathError> for StepError {
    fn from(err: MathError) -> Self {
        match err {
            MathError::Collective(err) => StepError::Collective(err),
            MathError::Engine(err) => StepError::Engine(err),
            MathError::Reduce(err) => StepError::Reduce(err),
        }
    }
}

impl StepError {
    /// Sorts it by what the coordinator does about it.
    pub(super) fn kind(&self) -> FaultKind {
        match self {
            StepError::Collective(err) => communicator_fault(err),
            StepError::Engine(_) | StepError::Reduce(_) => FaultKind::Local,
            // The group forms again, and the state stays: the store may answer by then.
            StepError::Data(err) if err.is_passing() => FaultKind::Outage,
            // A slow store gives some of it each time; a mount that hangs may come back.
            StepError::Late(_, n) if *n <= LATE_MAX => FaultKind::Outage,
            StepError::Late(..) => FaultKind::Storage,
            // Whoever takes the slot next would fail as this one did.
            StepError::Data(err) if err.is_of_the_data() => FaultKind::Data,
            StepError::Data(_) => FaultKind::Storage,
            StepError::NonFinite { .. } => FaultKind::Run,
        }
    }
}

/// A communicator that failed can be formed again, unless this process has lost its device.
pub(super) fn communicator_fault(err: &CollectiveError) -> FaultKind {
    match err {
        CollectiveError::SharedDevice { .. } => FaultKind::Unfit,
        err if err.ends_process() => FaultKind::Local,
        _ => FaultKind::Communicator,
    }
}

/// Lists the ranks that an error speaks of. A transparent error has its inner one's causes, and not
/// that one itself among them: it is looked into by kind.
pub(super) fn suspects_of(err: &(dyn std::error::Error + 'static)) -> Vec<usize> {
    let of = |err: &(dyn std::error::Error + 'static)| -> Option<Vec<usize>> {
        let here = err.downcast_ref::<CollectiveError>();
        let step = err.downcast_ref::<StepError>().and_then(|err| match err {
            StepError::Collective(inner) => Some(inner),
            _ => None,
        });
        let sync = err.downcast_ref::<SyncError>().and_then(|err| match err {
            SyncError::Collective(inner) => Some(inner),
            _ => None,
        });
        here.or(step).or(sync).map(CollectiveError::suspects)
    };
    std::iter::successors(Some(err), |err| err.source()).find_map(of).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It may be a store's way of being slow; in the end it is this worker's.
    #[test]
    fn a_slot_may_be_late_some_times() {
        let late = |n| {
            let slot = lacuna_types::Slot { step: lacuna_types::Step(3), index: 1 };
            let waited = std::time::Duration::from_secs(120);
            StepError::Late(LoadError::Deadline { slot, waited }, n)
        };
        assert_eq!(late(LATE_MAX).kind(), FaultKind::Outage);
        assert_eq!(late(LATE_MAX + 1).kind(), FaultKind::Storage);
        let text = lacuna_checkpoint::chain(&late(2));
        let want =
            "data came too late, 2 times in a row: slot 1 of step 3 was not ready after 120s";
        assert_eq!(text, want);
    }

    #[test]
    fn who_is_missing_is_told_whatever_the_operation() {
        let lost = || CollectiveError::Timeout { op_seq: 7, waiting_for: vec![2] };
        assert_eq!(suspects_of(&lost()), [2]);
        assert_eq!(suspects_of(&StepError::from(lost())), [2]);
        assert_eq!(suspects_of(&SyncError::from(lost())), [2]);
        let other = StepError::NonFinite { n: 1, step: 2, detail: String::new() };
        assert!(suspects_of(&other).is_empty());
    }
}
