//! Changing how many workers train a run that is on.

use lacuna_api::error::{Reason, status};
use lacuna_control::coordinator::Ending;
use lacuna_spec::{SpecError, Workers};
use lacuna_types::RunId;
use tokio::sync::oneshot;
use tonic::Status;

use super::{ASK_DEADLINE, going_down, not_found};
use crate::registry::Shared;
use crate::run::Input;

/// Gives a run other numbers of workers, durably; they count from the next boundary on. Where `was`
/// says what they were when the caller looked, they must still be that.
pub(super) async fn scale(
    shared: &Shared,
    id: &RunId,
    (min, max): (u32, u32),
    was: Option<Workers>,
) -> Result<(), Status> {
    let found = {
        let runs = shared.runs();
        runs.get(id).map(|handle| {
            let ending = handle.ends.view.borrow().ending.clone();
            (handle.spec.clone(), handle.ends.input.clone(), ending)
        })
    };
    let (mut spec, input, ending) = found.ok_or_else(|| not_found(id))?;
    spec.elastic.workers = Workers { min, max };
    spec.check().map_err(|err| {
        let text = match &err {
            SpecError::Invalid(problems) => problems.to_string(),
            other => other.to_string(),
        };
        status(Reason::InvalidSpec, text)
    })?;
    if matches!(ending, Some(Ending::Finished { .. })) {
        let text = format!("run {id} is finished: no worker trains it any more");
        return Err(status(Reason::WrongState, text));
    }
    let (done, told) = oneshot::channel();
    let workers = Workers { min, max };
    input.send(Input::Scale { workers, was, done }).await.map_err(|_| going_down())?;
    match tokio::time::timeout(ASK_DEADLINE, told).await {
        Ok(Ok(true)) => Ok(()),
        Ok(Ok(false)) => Err(changed_since(id)),
        Ok(Err(_)) => Err(going_down()),
        Err(_) => Err(status(Reason::TimedOut, "the run did not take the wish in time")),
    }
}

/// Refuses a change by somebody who looked before another one.
pub(super) fn changed_since(id: &RunId) -> Status {
    let text = format!("run `{id}` was changed since: look at it again (its etag differs)");
    status(Reason::Conflict, text)
}
