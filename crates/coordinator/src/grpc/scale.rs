//! Changing how many workers train a run that is on.

use lacuna_api::error::{Reason, status};
use lacuna_spec::{SpecError, Workers};
use lacuna_types::RunId;
use tokio::sync::oneshot;
use tonic::Status;

use super::{ASK_DEADLINE, going_down, not_found};
use crate::registry::Shared;
use crate::run::Input;

/// Gives a run other numbers of workers, durably; they count from the next boundary on.
pub(super) async fn scale(shared: &Shared, id: &RunId, min: u32, max: u32) -> Result<(), Status> {
    let found = {
        let runs = shared.runs();
        runs.get(id).map(|handle| (handle.spec.clone(), handle.ends.input.clone()))
    };
    let (mut spec, input) = found.ok_or_else(|| not_found(id))?;
    spec.elastic.workers = Workers { min, max };
    spec.check().map_err(|err| {
        let text = match &err {
            SpecError::Invalid(problems) => problems.to_string(),
            other => other.to_string(),
        };
        status(Reason::InvalidSpec, text)
    })?;
    let (done, told) = oneshot::channel();
    let workers = Workers { min, max };
    input.send(Input::Scale { workers, done }).await.map_err(|_| going_down())?;
    match tokio::time::timeout(ASK_DEADLINE, told).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(going_down()),
        Err(_) => Err(Status::deadline_exceeded("the run did not take the wish in time")),
    }
}
