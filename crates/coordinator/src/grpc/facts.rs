//! What a run's data is, where the client that creates the run did not look.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lacuna_api::error::{Reason, invalid_spec, status};
use lacuna_data::Dataset;
use lacuna_spec::{RunSpec, TaskSpec};
use tokio::sync::Semaphore;
use tonic::Status;

/// How long opening a data set may take: behind a URL its index is fetched.
const OPEN_DEADLINE: Duration = Duration::from_secs(30);

/// Size and fingerprint of a data set.
#[derive(Debug)]
pub(super) struct Facts {
    pub n_samples: u64,
    pub fingerprint: String,
}

/// Opens the data of `spec`, pins what depends on it, and returns what a run keeps of it.
pub(super) async fn look(spec: &mut RunSpec, turn: &Arc<Semaphore>) -> Result<Facts, Status> {
    // Taken along: data that does not open keeps its turn, so that they cannot pile up.
    let Ok(turn) = turn.clone().try_acquire_owned() else {
        let text = "the coordinator opens enough data sets already; try again";
        return Err(status(Reason::RateLimited, text));
    };
    let path = PathBuf::from(&spec.data.shards);
    let shown = path.display().to_string();
    let open = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        Dataset::open(&path)
    });
    let opened = tokio::time::timeout(OPEN_DEADLINE, open).await.map_err(|_| {
        let seconds = OPEN_DEADLINE.as_secs();
        let text = format!("data set `{shown}` did not open within {seconds} s");
        status(Reason::TimedOut, text)
    })?;
    let opened = opened.map_err(|err| status(Reason::Internal, err.to_string()))?;
    let dataset = opened.map_err(|err| {
        let why = lacuna_checkpoint::chain(&err);
        let text = format!("the coordinator failed to open data set `{shown}`: {why}");
        invalid_spec(text.clone(), vec![("data.shards".to_string(), text)])
    })?;
    let index = dataset.index();
    let problem = |task: &TaskSpec| task.labels_problem(index.n_classes(), index.n_unlabelled());
    if let Some(text) = spec.task.as_ref().and_then(problem) {
        return Err(invalid_spec(text.clone(), vec![("task.classes".to_string(), text)]));
    }
    let n_samples = dataset.n_samples();
    spec.pin(n_samples, dataset.index().n_chunks());
    Ok(Facts { n_samples, fingerprint: dataset.fingerprint().to_string() })
}
