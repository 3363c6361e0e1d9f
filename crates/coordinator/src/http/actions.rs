//! What may be done on a page: few things, none of which loses anything.

use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use lacuna_api::v1;
use lacuna_api::v1::run_service_server::RunService as _;
use lacuna_types::RunId;
use tonic::{Request, Status};

use super::{Problem, Web};
use crate::auth::Viewer;
use crate::grpc::Grpc;
use crate::registry::Shared;

/// Something that can be asked of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Deed {
    /// Last part of its path.
    pub word: &'static str,
    /// What stands on the button.
    pub label: &'static str,
    /// What it does.
    pub help: &'static str,
}

const CHECKPOINT: Deed = Deed {
    word: "checkpoint",
    label: "Save a checkpoint",
    help: "At the next boundary; training goes on",
};
const STOP: Deed = Deed {
    word: "stop",
    label: "Stop",
    help: "At the next boundary, with a checkpoint; it can be resumed",
};
const RESUME: Deed =
    Deed { word: "resume", label: "Resume", help: "Goes on from the newest checkpoint" };

/// Returns what can be asked of a run in a state.
pub(super) fn deeds_in(state: &str) -> &'static [Deed] {
    match state {
        "finished" => &[],
        "stopped" | "cancelled" | "paused" | "failed" => &[RESUME],
        _ => &[CHECKPOINT, STOP],
    }
}

/// Does what a button stands for, and leads back to the run's page.
pub(super) async fn act(
    State(web): State<Web>,
    viewer: Viewer,
    Path((run, word)): Path<(String, String)>,
) -> Result<Response, Problem> {
    let no_run = || Problem::NoRun(run.clone());
    let id: RunId = run.parse().map_err(|_| no_run())?;
    let deed = [CHECKPOINT, STOP, RESUME].into_iter().find(|deed| deed.word == word);
    let deed = deed.ok_or_else(|| Problem::NoDeed(word.clone()))?;
    carry_out(&web.shared, &id, deed, &viewer).await.map_err(Problem::Refused)?;
    let back = HeaderValue::from_str(&format!("/runs/{id}")).map_err(|_| no_run())?;
    Ok((StatusCode::SEE_OTHER, [(header::LOCATION, back)]).into_response())
}

async fn carry_out(
    shared: &std::sync::Arc<Shared>,
    id: &RunId,
    deed: Deed,
    viewer: &Viewer,
) -> Result<(), Status> {
    let (grpc, run_id) = (Grpc(shared.clone()), id.to_string());
    if deed == CHECKPOINT {
        let request = v1::RequestCheckpointRequest { run_id };
        grpc.request_checkpoint(Request::new(request)).await?;
    } else if deed == STOP {
        let why = match viewer.name() {
            "" => "asked for on the page".to_string(),
            name => format!("{name} asked for it on the page"),
        };
        grpc.stop_run(Request::new(v1::StopRunRequest { run_id, why })).await?;
    } else {
        let request = {
            let runs = shared.runs();
            let handle = runs.get(id).ok_or_else(|| crate::grpc::not_found(id))?;
            v1::CreateRunRequest {
                spec: handle.spec_json.clone(),
                resume: true,
                n_samples: handle.n_samples,
                fingerprint: handle.fingerprint.clone(),
                request_id: String::new(),
            }
        };
        grpc.create_run(Request::new(request)).await?;
    }
    Ok(())
}
