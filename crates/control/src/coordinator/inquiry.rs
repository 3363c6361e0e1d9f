//! A checkpoint that a worker cannot load: whether it or the worker is at fault.
//!
//! The driver reads it whole. One that is damaged is set aside, and the run goes back to the newest
//! sound one before it; where it is sound, the worker has no way to it and is unfit. Until it is
//! known, no group is formed: it would load the same bytes.

use lacuna_types::{Incarnation, Timestamp, WorkerId, exit};

use super::{Command, Coordinator, Ending, Examination};
use crate::journal::Record;
use crate::plan::{CheckpointRef, Origin};

/// A checkpoint that is being read by the driver.
#[derive(Clone, Debug)]
pub(super) struct Inquiry {
    checkpoint: CheckpointRef,
    /// Who could not load it.
    by: (WorkerId, Incarnation),
    /// Its error with its causes.
    detail: String,
    /// How long the answer is waited for.
    pub deadline: Timestamp,
}

impl Coordinator {
    /// A member could not load the checkpoint that its group starts from: looks into it. Returns
    /// whether there is one, so that the member is not to blame yet.
    pub(super) fn inquire(&mut self, now: Timestamp, worker: &WorkerId, detail: &str) -> bool {
        let sync = self.group.as_ref().and_then(|group| group.sync.as_ref());
        let Some(Origin::Checkpoint { manifest }) = sync.map(|sync| &sync.origin) else {
            return false;
        };
        let named = |c: &&CheckpointRef| c.manifest == *manifest;
        let Some(checkpoint) = self.saved.checkpoint.as_ref().filter(named).cloned() else {
            // A newer one was committed meanwhile, which the next group loads.
            return true;
        };
        let Some(record) = self.workers.get(worker) else { return false };
        let by = (worker.clone(), record.incarnation);
        let step = checkpoint.step;
        self.note(
            "unreadable",
            true,
            format!(
                "{worker} cannot load the checkpoint of step {step}, looking into it: {detail}"
            ),
        );
        self.out.push(Command::Examine(checkpoint.clone()));
        let deadline = now + self.timing.attempt;
        self.inquiry = Some(Inquiry { checkpoint, by, detail: detail.to_string(), deadline });
        true
    }

    /// The driver has read a checkpoint, or tried to.
    pub(super) fn on_examined(&mut self, checkpoint: &CheckpointRef, found: Examination) {
        let Some(inquiry) = self.inquiry.take_if(|inquiry| inquiry.checkpoint == *checkpoint)
        else {
            return;
        };
        match found {
            Examination::Sound => self.has_no_way_to_it(inquiry),
            Examination::Damaged { why, next } => self.set_aside(inquiry.checkpoint, &why, next),
            Examination::Gone { next } => self.go_on_without(inquiry.checkpoint, next),
            Examination::Unknown { why } => {
                let step = checkpoint.step;
                let text = format!("the checkpoint of step {step} could not be examined: {why}");
                self.note("unexamined", true, text);
            }
        }
    }

    /// The checkpoint is sound, so the worker that could not load it is at fault.
    fn has_no_way_to_it(&mut self, inquiry: Inquiry) {
        let (worker, incarnation) = inquiry.by;
        if self.workers.get(&worker).is_some_and(|w| w.incarnation == incarnation) {
            let step = inquiry.checkpoint.step;
            let why = format!("the checkpoint of step {step} is sound, but: {}", inquiry.detail);
            self.is_unfit(&worker, &why);
        }
    }

    fn set_aside(&mut self, lost: CheckpointRef, why: &str, next: Option<CheckpointRef>) {
        if self.saved.checkpoint.as_ref() != Some(&lost) {
            // A commit came late, and there is a newer one.
            return;
        }
        let text = format!("the checkpoint of step {} is damaged and set aside: {why}", lost.step);
        match next {
            Some(next) => self.go_back(lost, next, &text),
            None => {
                let why = format!(
                    "{text}; there is no other to go back to: repair it, or remove its folder to \
                     begin again from the seed"
                );
                self.end(Ending::Failed { why, code: exit::IO });
            }
        }
    }

    /// Somebody removed the checkpoint, who knows what comes of that.
    fn go_on_without(&mut self, lost: CheckpointRef, next: Option<CheckpointRef>) {
        if self.saved.checkpoint.as_ref() != Some(&lost) {
            return;
        }
        let text = format!("the checkpoint of step {} was removed", lost.step);
        match next {
            Some(next) => self.go_back(lost, next, &text),
            None => {
                self.record(Record::NoCheckpoint);
                self.note("set-aside", true, format!("{text}; beginning again from the seed"));
            }
        }
    }

    fn go_back(&mut self, lost: CheckpointRef, next: CheckpointRef, text: &str) {
        // There are only so many to go back to.
        self.fruitless = 0;
        let step = next.step;
        self.record(Record::SetAside { lost, next });
        self.note("set-aside", true, format!("{text}; going back to that of step {step}"));
    }

    pub(super) fn expire_inquiry(&mut self, now: Timestamp) {
        if let Some(inquiry) = self.inquiry.take_if(|inquiry| inquiry.deadline <= now) {
            let (step, limit) = (inquiry.checkpoint.step, self.timing.attempt);
            let text = format!("reading the checkpoint of step {step} took longer than {limit:?}");
            self.note("unexamined", true, text);
        }
    }
}
