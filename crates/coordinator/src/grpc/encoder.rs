//! Which checkpoint, or which weights, a task's encoder is: a run that trains on has another newest
//! checkpoint tomorrow, files are written anew, and a task must mean the same as long as it lives.

use std::path::Path;
use std::time::Duration;

use lacuna_api::error::{Reason, invalid_spec, status};
use lacuna_checkpoint::catalog::Entry;
use lacuna_checkpoint::import::Weights;
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::retain::{self, Hold};
use lacuna_checkpoint::{catalog, chain};
use lacuna_spec::{EncoderPin, RunSpec, encoder_at, parse_text};
use lacuna_types::{RunId, Step};
use tonic::Status;
use tracing::warn;

/// How long a run's checkpoints may take to be listed.
const LIST_DEADLINE: Duration = Duration::from_secs(30);
/// How long weights may take to be read: gigabytes from a slow disk.
const READ_DEADLINE: Duration = Duration::from_secs(600);

/// Writes into `spec` which encoder is meant: `RUN@STEP` where it names a run and no step, and
/// `PATH@blake3:HEX` where it names weights. That is what the run was created with, as `known` or
/// its checkpoints tell, or else the newest checkpoint and the weights as they are now.
pub(super) async fn pin(spec: &mut RunSpec, known: Option<RunSpec>) -> Result<(), Status> {
    let Some(place) = spec.task.as_ref().and_then(|task| task.encoder.clone()) else {
        return Ok(());
    };
    let known = match known {
        Some(known) => Some(known),
        None => of_checkpoints(spec).await?,
    };
    let before = known.and_then(|known| known.task?.encoder);
    let is_it = |before: &String| *before == place || encoder_at(before, |_| false).0 == place;
    let pinned = match before.filter(is_it) {
        Some(before) => before,
        None => found_now(&place).await?.unwrap_or(place),
    };
    if let Some(task) = &mut spec.task {
        task.encoder = Some(pinned.clone());
    }
    hold(pinned, spec.run_id()).await
}

/// Returns the specification in the run's newest checkpoint, which a coordinator that never heard
/// of the run goes on from.
async fn of_checkpoints(spec: &RunSpec) -> Result<Option<RunSpec>, Status> {
    let (to, run) = (spec.checkpoint.to.clone(), spec.run_id());
    let shown = to.clone();
    let read = move || {
        let dir = RunDir::open(&to, run).map_err(|err| chain(&err))?;
        let entries = catalog::list(&dir).map_err(|err| chain(&err))?;
        let newest = catalog::newest_good(&entries);
        // One that cannot be read is no reason here: whoever opens the run says so.
        Ok(newest.and_then(|manifest| parse_text("it", &manifest.spec, &[]).ok()))
    };
    let found = in_time(&format!("checkpoints at `{shown}`"), LIST_DEADLINE, read).await?;
    let found =
        found.map_err(|why: String| status(Reason::Storage, format!("`{shown}`: {why}")))?;
    Ok(found.map(|loaded| loaded.spec))
}

/// Pins the checkpoint that a run reads its encoder from, so that nothing removes it: workers that
/// join read it again, and so does whoever judges the run.
async fn hold(place: String, run: RunId) -> Result<(), Status> {
    let shown = place.clone();
    let work = move || {
        let (dir, Some(EncoderPin::Step(step))) = encoder_at(&place, is_there) else {
            return Ok(());
        };
        let Some(dir) = RunDir::find(dir).map_err(|err| chain(&err))? else { return Ok(()) };
        let hold = Hold {
            name: format!("encoder-of-{run}"),
            step: Step(step),
            why: format!("the run {run} reads its encoder from it"),
            until: None,
        };
        // One of before stays: the run is the same, and so is its encoder.
        retain::hold(&dir, &hold).map(drop).map_err(|err| chain(&err))
    };
    let held = in_time(&format!("encoder `{shown}`"), LIST_DEADLINE, work).await;
    // Somebody else's folder may be read and not written: the run can train all the same.
    if let Err(error) = held.unwrap_or_else(|late| Err(late.message().to_string())) {
        warn!(encoder = shown, error, "the encoder's checkpoint is not pinned");
    }
    Ok(())
}

/// Names what a place means now: a run's newest checkpoint, the content of weights, or what it is
/// pinned to already, if that is there. Nothing where this machine sees none of it.
async fn found_now(place: &str) -> Result<Option<String>, Status> {
    let refused = |why: String| {
        let text = format!("`task.encoder` = `{place}`: {why}");
        invalid_spec(text.clone(), vec![("task.encoder".to_string(), text)])
    };
    let (what, asked) = (format!("encoder `{place}`"), place.to_string());
    let of_run = move || checkpoint(&asked);
    if let Some(found) = in_time(&what, LIST_DEADLINE, of_run).await?.map_err(refused)? {
        return Ok(Some(found));
    }
    let asked = place.to_string();
    in_time(&what, READ_DEADLINE, move || content(&asked)).await?.map_err(refused)
}

/// Names a checkpoint of a run; nothing where the place is no run's.
fn checkpoint(place: &str) -> Result<Option<String>, String> {
    let (path, pin) = encoder_at(place, is_there);
    let Some(dir) = RunDir::find(path).map_err(|err| chain(&err))? else { return Ok(None) };
    let entries = catalog::list(&dir).map_err(|err| chain(&err))?;
    let newest = catalog::newest_good(&entries).ok_or("the run has no usable checkpoint")?;
    match pin {
        None => Ok(Some(format!("{path}@{}", newest.step))),
        Some(EncoderPin::Step(step)) => {
            let good = entries.iter().filter_map(Entry::good);
            if good.clone().any(|manifest| manifest.step == step) {
                return Ok(Some(place.to_string()));
            }
            let steps: Vec<String> = good.map(|manifest| manifest.step.to_string()).collect();
            Err(format!("the run has no usable checkpoint of that step, but {}", steps.join(", ")))
        }
        Some(EncoderPin::Content(_)) => {
            Err("it is a run, whose checkpoints are named by their steps: RUN@STEP".to_string())
        }
    }
}

/// Names the content of weights.
fn content(place: &str) -> Result<Option<String>, String> {
    let (path, pin) = encoder_at(place, is_there);
    if !is_there(path) {
        // Only workers may see the file; they agree on what it holds as long as they are a group.
        warn!(encoder = place, "the encoder's weights are not here, and not pinned");
        return Ok(None);
    }
    let weights = Weights::open(Path::new(path)).map_err(|err| chain(&err))?;
    let found = weights.digest().map_err(|err| chain(&err))?.to_hex();
    match pin {
        Some(EncoderPin::Step(_)) => Err("it is weights, which have no steps".to_string()),
        Some(EncoderPin::Content(wanted)) if !wanted.eq_ignore_ascii_case(&found) => {
            Err(format!("its content is blake3:{found}: other weights lie in its place"))
        }
        _ => Ok(Some(format!("{path}@blake3:{found}"))),
    }
}

fn is_there(place: &str) -> bool {
    Path::new(place).exists()
}

/// Does what may wait for a disk or a store.
async fn in_time<T: Send + 'static>(
    what: &str,
    deadline: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::time::timeout(deadline, tokio::task::spawn_blocking(work)).await;
    let done = done.map_err(|_| {
        let text = format!("{what} was not read within {} s", deadline.as_secs());
        status(Reason::TimedOut, text)
    })?;
    done.map_err(|err| status(Reason::Internal, err.to_string()))
}
