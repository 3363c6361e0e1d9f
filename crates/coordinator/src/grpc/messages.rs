//! Runs and updates as they stand on the wire.

use std::collections::BTreeMap;

use lacuna_api::v1;
use lacuna_control::coordinator::{Ending, WorkerStatus};
use lacuna_track::Figures;
use lacuna_types::{RunId, WorkerId, exit};

use crate::registry::RunHandle;
use crate::run::View;
use crate::store::{PicturePlace, Update};

/// Describes a run.
pub(crate) fn run_message(id: &RunId, handle: &RunHandle) -> v1::Run {
    run_of_view(id, handle, handle.ends.view.borrow().clone())
}

/// Describes a run as a view shows it.
pub(crate) fn run_of_view(id: &RunId, handle: &RunHandle, view: View) -> v1::Run {
    let View { status, ending, figures, devices, last_seq, account: _ } = view;
    let resolved = handle.spec.resolve(handle.n_samples).ok();
    let (why, exit_code, final_digest) = match &ending {
        None => (status.why.clone(), None, None),
        Some(Ending::Finished { digest, .. }) => (String::new(), Some(exit::OK), Some(*digest)),
        Some(Ending::Failed { why, code }) => (why.clone(), Some(*code), None),
        Some(Ending::Stopped { why, .. }) => (why.clone(), Some(exit::DRAINED), None),
        Some(Ending::Cancelled { why }) => (why.clone(), Some(exit::WAIT_CANCELLED), None),
        Some(Ending::Paused { why }) => (why.clone(), Some(exit::FAILED), None),
    };
    let worker = |w| worker_message(w, &devices);
    v1::Run {
        run_id: id.to_string(),
        state: status.state.to_string(),
        why,
        generation: status.generation.0,
        step: status.step.0,
        total_steps: resolved.as_ref().map_or(0, |r| r.total_steps),
        steps_per_epoch: resolved.as_ref().map_or(0, |r| r.geometry.steps_per_epoch()),
        n_slots: handle.spec.n_slots(),
        checkpoint_step: status.checkpoint.map(|c| c.step.0),
        final_digest,
        // Who was with a run that is over is with others by now.
        workers: match ending {
            None => status.workers.into_iter().map(worker).collect(),
            Some(_) => Vec::new(),
        },
        figures: figures.map(figures_message),
        spec: handle.spec_json.clone(),
        exit_code: exit_code.map(u32::from),
        last_seq,
        n_samples: handle.n_samples,
        fingerprint: handle.fingerprint.clone(),
        etag: handle.etag.clone(),
    }
}

/// Describes the workers of a run that is on.
pub(super) fn workers_of(handle: &RunHandle) -> Vec<v1::RunWorker> {
    let view = handle.ends.view.borrow();
    if view.ending.is_some() {
        return Vec::new();
    }
    view.status.workers.iter().map(|w| worker_message(w.clone(), &view.devices)).collect()
}

fn worker_message(w: WorkerStatus, devices: &BTreeMap<WorkerId, String>) -> v1::RunWorker {
    v1::RunWorker {
        device: devices.get(&w.worker).cloned().unwrap_or_default(),
        worker_id: w.worker.to_string(),
        rank: w.rank.map(|rank| rank as u32),
        slots: w.slots,
        state: w.state.to_string(),
        step: w.step.0,
        phase: w.phase.to_string(),
        memory_bytes: w.memory_bytes,
    }
}

/// Describes the figures of a step.
pub(super) fn figures_message(figures: Figures) -> v1::Figures {
    let Figures {
        step,
        generation,
        loss,
        lr,
        grad_norm,
        images_per_second,
        data_wait,
        skipped,
        redone,
        digest,
        memory_bytes,
        mfu,
    } = figures;
    v1::Figures {
        step,
        loss,
        lr,
        grad_norm,
        images_per_second,
        data_wait,
        skipped,
        redone,
        generation,
        digest,
        memory_bytes,
        mfu,
    }
}

/// Describes something that happened.
pub(super) fn update_message(seq: u64, update: Update) -> v1::WatchRunResponse {
    use v1::watch_run_response::Update as U;
    let update = match update {
        Update::Event { kind, warning, text, at_ms } => {
            Some(U::Event(v1::RunEvent { kind, warning, text, at_ms }))
        }
        Update::Picture { place: PicturePlace { step, index, sample }, at_ms } => {
            Some(U::Picture(v1::RunPicture { step, index, sample, at_ms }))
        }
        Update::Figures { figures, at_ms: _ } => Some(U::Figures(figures_message(figures))),
    };
    v1::WatchRunResponse { update, seq }
}
