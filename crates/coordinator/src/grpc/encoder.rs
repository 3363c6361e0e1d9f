//! Which checkpoint, or which weights, a task's encoder is: a run that trains on has another newest
//! checkpoint tomorrow, files are written anew, and a task must mean the same as long as it lives.

use std::path::Path;
use std::time::Duration;

use lacuna_api::error::{Reason, invalid_spec, status};
use lacuna_checkpoint::import::Weights;
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::retain::{self, Hold};
use lacuna_checkpoint::{catalog, chain};
use lacuna_spec::{EncoderPin, RunSpec, encoder_at};
use lacuna_types::{RunId, Step};
use tonic::Status;
use tracing::warn;

/// How long a run's checkpoints may take to be listed, or weights to be read.
const LIST_DEADLINE: Duration = Duration::from_secs(30);

/// Writes into `spec` which encoder is meant: `RUN@STEP` where it names a run and no step, and
/// `PATH@blake3:HEX` where it names weights. That is what `known` has, the same run's specification
/// as it was created with, or the newest checkpoint and the weights as they are now.
pub(super) async fn pin(spec: &mut RunSpec, known: Option<&RunSpec>) -> Result<(), Status> {
    let Some(place) = spec.task.as_ref().and_then(|task| task.encoder.clone()) else {
        return Ok(());
    };
    let run = spec.run_id();
    if encoder_at(&place).1.is_some() {
        return hold(place, run).await;
    }
    let before = known.and_then(|known| known.task.as_ref()?.encoder.clone());
    let pinned = match before {
        Some(before) if encoder_at(&before).0 == place => Some(before),
        _ => found_now(&place).await?,
    };
    if let (Some(pinned), Some(task)) = (pinned, &mut spec.task) {
        task.encoder = Some(pinned.clone());
        hold(pinned, run).await?;
    }
    Ok(())
}

/// Pins the checkpoint that a run reads its encoder from, so that nothing removes it: workers that
/// join read it again, and so does whoever judges the run.
async fn hold(place: String, run: RunId) -> Result<(), Status> {
    let shown = place.clone();
    let work = tokio::task::spawn_blocking(move || {
        let (dir, Some(EncoderPin::Step(step))) = encoder_at(&place) else { return Ok(()) };
        let Some(dir) = RunDir::find(dir).map_err(|err| chain(&err))? else { return Ok(()) };
        let hold = Hold {
            name: format!("encoder-of-{run}"),
            step: Step(step),
            why: format!("the run {run} reads its encoder from it"),
            until: None,
        };
        // One of before stays: the run is the same, and so is its encoder.
        retain::hold(&dir, &hold).map(drop).map_err(|err| chain(&err))
    });
    let held = tokio::time::timeout(LIST_DEADLINE, work).await;
    let held = held.unwrap_or(Ok(Err("no answer in time".to_string())));
    // Somebody else's folder may be read and not written: the run can train all the same.
    if let Err(error) = held.map_err(|err| status(Reason::Internal, err.to_string()))? {
        warn!(encoder = shown, error, "the encoder's checkpoint is not pinned");
    }
    Ok(())
}

/// Names a run's newest checkpoint, or the content of weights; nothing where this machine sees
/// neither.
async fn found_now(place: &str) -> Result<Option<String>, Status> {
    let asked = place.to_string();
    let look = tokio::task::spawn_blocking(move || {
        let Some(dir) = RunDir::find(&asked).map_err(|err| chain(&err))? else {
            return content(&asked);
        };
        let entries = catalog::list(&dir).map_err(|err| chain(&err))?;
        let newest = catalog::newest_good(&entries).ok_or("the run has no usable checkpoint")?;
        Ok(Some(format!("{asked}@{}", newest.step)))
    });
    let found = tokio::time::timeout(LIST_DEADLINE, look).await.map_err(|_| {
        let seconds = LIST_DEADLINE.as_secs();
        let text = format!("encoder `{place}` was not found within {seconds} s");
        status(Reason::TimedOut, text)
    })?;
    let found = found.map_err(|err| status(Reason::Internal, err.to_string()))?;
    found.map_err(|why| {
        let text = format!("`task.encoder` = `{place}`: {why}");
        invalid_spec(text.clone(), vec![("task.encoder".to_string(), text)])
    })
}

/// Names the content of weights.
fn content(place: &str) -> Result<Option<String>, String> {
    if !Path::new(place).exists() {
        // Only workers may see the file; they agree on what it holds as long as they are a group.
        warn!(encoder = place, "the encoder's weights are not here, and not pinned");
        return Ok(None);
    }
    let weights = Weights::open(Path::new(place)).map_err(|err| chain(&err))?;
    let digest = weights.digest().map_err(|err| chain(&err))?;
    Ok(Some(format!("{place}@blake3:{}", digest.to_hex())))
}
