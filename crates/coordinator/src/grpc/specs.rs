//! Calls about specifications: reading one, comparing two, changing that of a run.

use lacuna_api::error::{Reason, invalid_spec, status};
use lacuna_api::v1;
use lacuna_spec::{FieldDiff, Problem, Problems, RunSpec, SPEC_BYTES_MAX, SpecError, diff, fields};
use lacuna_types::RunId;
use tonic::Status;

use super::scale::{changed_since, scale};
use super::{Grpc, not_found, parse_run};

/// How a specification is called that has no file.
const NAME: &str = "spec";
/// Most bytes of problems in a refusal: clients take some kilobytes of headers.
const REFUSAL_BYTES_MAX: usize = 1500;
/// What of a run that is on may be changed.
const CHANGEABLE: &str = "elastic.workers";

/// Reads a specification that a client sent as JSON.
pub(super) fn read(json: &str) -> Result<RunSpec, Status> {
    let malformed = |err: serde_json::Error| status(Reason::InvalidSpec, err.to_string());
    let value: serde_json::Value = serde_json::from_str(json).map_err(malformed)?;
    lacuna_spec::from_json(&value).map_err(|problems| refusal(&problems))
}

/// Says what is wrong, key by key.
fn refusal(problems: &Problems) -> Status {
    let violation = |problem: &Problem| {
        let Problem { place, key, .. } = problem;
        let key = if key.is_empty() { place.to_string() } else { key.clone() };
        (key, problem.to_string())
    };
    let mut violations: Vec<(String, String)> = Vec::new();
    // They travel in headers, which are bounded; three times over.
    let mut n_bytes = 0;
    for problem in problems.as_slice() {
        let (key, text) = violation(problem);
        n_bytes += key.len() + text.len();
        if n_bytes > REFUSAL_BYTES_MAX {
            break;
        }
        violations.push((key, text));
    }
    let n = problems.count();
    let shown: Vec<&str> = violations.iter().map(|(_, text)| text.as_str()).collect();
    let more = n - violations.len();
    let rest = if more > 0 { format!("\nand {more} more") } else { String::new() };
    invalid_spec(format!("{}{rest}", shown.join("\n")), violations)
}

/// Reads a specification in TOML, and says everything that is wrong with it.
pub(super) fn validate(
    request: &v1::ValidateRunRequest,
) -> Result<v1::ValidateRunResponse, Status> {
    let v1::ValidateRunRequest { spec, overrides } = request;
    if spec.len() > SPEC_BYTES_MAX {
        let text = format!("a specification has {SPEC_BYTES_MAX} bytes at most");
        return Err(status(Reason::Malformed, text));
    }
    match lacuna_spec::parse_text(NAME, spec, overrides) {
        Ok(loaded) => {
            let effective = loaded.spec.to_json().to_string();
            Ok(v1::ValidateRunResponse { effective, problems: Vec::new() })
        }
        Err(SpecError::Invalid(problems)) => Ok(v1::ValidateRunResponse {
            effective: String::new(),
            problems: problem_messages(&problems),
        }),
        Err(err) => Err(status(Reason::InvalidSpec, err.to_string())),
    }
}

fn problem_messages(problems: &Problems) -> Vec<v1::SpecProblem> {
    let message = |problem: &Problem| v1::SpecProblem {
        key: problem.key.clone(),
        file: problem.place.file.clone(),
        line: problem.place.line as u32,
        column: problem.place.column as u32,
        message: problem.message.clone(),
        fix: problem.fix.clone().unwrap_or_default(),
    };
    problems.as_slice().iter().map(message).collect()
}

impl Grpc {
    pub(super) fn spec_of(&self, id: &RunId) -> Result<RunSpec, Status> {
        if let Some(run) = self.0.opening.get(id) {
            return Ok(run.spec);
        }
        self.0.runs().get(id).map(|handle| handle.spec.clone()).ok_or_else(|| not_found(id))
    }

    /// Compares the specifications of two runs.
    pub(crate) fn compare(
        &self,
        request: &v1::DiffRunsRequest,
    ) -> Result<v1::DiffRunsResponse, Status> {
        let old = self.spec_of(&parse_run(&request.old_run_id)?)?;
        let new = self.spec_of(&parse_run(&request.new_run_id)?)?;
        let message = |difference: FieldDiff| v1::SpecDifference {
            key: difference.path.to_string(),
            old_value: difference.old,
            new_value: difference.new,
            mark: difference.mark.to_string(),
        };
        let differences = diff(&old, &new).into_iter().map(message).collect();
        Ok(v1::DiffRunsResponse { differences })
    }

    /// Changes what the mask names of a run that is on.
    pub(super) async fn update(&self, request: v1::UpdateRunRequest) -> Result<RunId, Status> {
        let v1::UpdateRunRequest { run_id, update_mask, spec, etag } = request;
        let id = self.open_run(&run_id).await?;
        let known = self.spec_of(&id)?;
        if !etag.is_empty() && etag != etag_of(&known) {
            return Err(changed_since(&id));
        }
        let paths = update_mask.map(|mask| mask.paths).unwrap_or_default();
        if let Some(problem) = paths.iter().find_map(|path| problem_of(path)) {
            return Err(status(Reason::InvalidSpec, problem));
        }
        if paths.is_empty() {
            let text = format!("`update_mask` names nothing; it may name `{CHANGEABLE}`");
            return Err(status(Reason::Malformed, text));
        }
        let wanted: serde_json::Value = serde_json::from_str(&spec)
            .map_err(|err| status(Reason::InvalidSpec, err.to_string()))?;
        let workers = wanted["elastic"]["workers"].as_str().and_then(parse_workers);
        let (min, max) = workers.ok_or_else(|| {
            let text = "`elastic.workers` must be MIN:MAX, like \"2:8\"";
            status(Reason::InvalidSpec, text)
        })?;
        let was = (!etag.is_empty()).then_some(known.elastic.workers);
        scale(&self.0, &id, (min, max), was).await?;
        Ok(id)
    }
}

/// Says why a field of a run that is on cannot be changed.
fn problem_of(path: &str) -> Option<String> {
    let field = fields().iter().find(|field| field.path == path);
    match field {
        _ if path == CHANGEABLE => None,
        None => Some(format!("`{path}` is not a key of a specification")),
        Some(field) => Some(format!(
            "`{path}` ({}) cannot change while a run is on: stop it, and submit it again",
            field.mark
        )),
    }
}

fn parse_workers(text: &str) -> Option<(u32, u32)> {
    let (min, max) = text.split_once(':').unwrap_or((text, text));
    Some((min.parse().ok()?, max.parse().ok()?))
}

/// Returns what tells one specification from another.
pub(crate) fn etag_of(spec: &RunSpec) -> String {
    spec.digest().to_hex()[..16].to_string()
}
