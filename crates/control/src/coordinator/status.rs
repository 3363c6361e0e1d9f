//! What people see of a run.

use lacuna_types::{Step, WorkerId};

use super::forming::Stage;
use super::members::Worker;
use super::{Coordinator, Ending, Status, WorkerStatus};

impl Coordinator {
    /// Returns what the run is doing, for people.
    pub fn status(&self) -> Status {
        Status {
            state: self.state_word(),
            why: self.why(),
            generation: self.saved.generation,
            step: self.progress,
            checkpoint: self.saved.checkpoint.clone(),
            workers: self.workers.iter().map(|(id, w)| self.worker_status(id, w)).collect(),
            formed: self.formed.clone(),
        }
    }

    /// Returns what the run waits for, where it does; empty elsewhere.
    fn why(&self) -> String {
        match self.state_word() {
            "waiting" if self.last_waiting.is_empty() => {
                format!("waiting for workers: {} needed", self.config.workers_min)
            }
            "waiting" | "recovering" => self.last_waiting.clone(),
            "disputed" => "workers' states differ, and are being compared".to_string(),
            _ => String::new(),
        }
    }

    /// Returns the run's state in one word.
    pub fn state_word(&self) -> &'static str {
        match (&self.saved.ending, self.group.as_ref().map(|g| g.stage)) {
            (Some(Ending::Finished { .. }), _) => "finished",
            (Some(Ending::Failed { .. }), _) => "failed",
            (Some(Ending::Stopped { .. }), _) => "stopped",
            (Some(Ending::Cancelled { .. }), _) => "cancelled",
            (Some(Ending::Paused { .. }), _) => "paused",
            (None, None) if self.dispute.is_some() => "disputed",
            (None, None) => "waiting",
            (None, Some(Stage::Recovering)) => "recovering",
            (None, Some(Stage::Preparing)) => "forming",
            (None, Some(Stage::Syncing)) => "syncing",
            (None, Some(Stage::Running)) => "running",
            (None, Some(Stage::Held)) => "held",
        }
    }

    fn worker_status(&self, id: &WorkerId, worker: &Worker) -> WorkerStatus {
        let group = self.group.as_ref().filter(|_| worker.member);
        let rank = group.and_then(|g| g.ranks.get(id, worker.incarnation));
        let slots = group.zip(rank).map_or(0, |(g, rank)| g.plan.members[rank].slots.len() as u32);
        let word = worker.word();
        let kept_out = word == "spare" && !self.is_free(id);
        WorkerStatus {
            worker: id.clone(),
            rank,
            slots,
            state: if kept_out { "quarantined" } else { word },
            step: worker.beat.as_ref().map_or(Step(0), |b| b.step),
            phase: worker.beat.as_ref().map_or("idle", |b| b.phase.word()),
            last_seen: worker.last_seen,
            slot_us: worker.slot_us,
            data_us: worker.beat.as_ref().map_or(0, |b| b.data_us),
            memory_bytes: worker.beat.as_ref().map_or(0, |b| b.memory_bytes),
        }
    }
}
