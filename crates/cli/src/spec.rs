//! Reading run specs from files, with the data they name.

use std::path::Path;

use anyhow::Context as _;
use lacuna_api::v1;
use lacuna_data::Dataset;
use lacuna_spec::{RunSpec, SpecError, TaskSpec, encoder_at, parse_file, task_warnings};
use lacuna_types::exit;

use crate::verbosity::talk;
use crate::{Coded, data_check};

/// Reads the spec at `path` with `overrides` laid over it; relative paths start from its folder.
pub fn read(path: &Path, overrides: &[String]) -> anyhow::Result<RunSpec> {
    let read = |path: &Path| std::fs::read_to_string(path);
    let loaded = match parse_file(path, overrides, &read) {
        Ok(loaded) => loaded,
        Err(SpecError::Invalid(problems)) => {
            let n = problems.count();
            let plural = if n == 1 { "problem" } else { "problems" };
            let text = format!("{n} {plural} in {}:\n{problems}", path.display());
            return Err(Coded::error(exit::USAGE, text));
        }
        Err(err) => {
            return Err(Coded::error(exit::USAGE, lacuna_checkpoint::chain(&err)));
        }
    };
    let mut spec = loaded.spec;
    let here = std::env::current_dir().context("find the current folder")?;
    spec.resolve_paths(&here);
    Ok(spec)
}

/// Refuses a task that its data or its encoder cannot serve: every worker would find that out.
fn check_task(task: &TaskSpec, dataset: &Dataset, has_checkpoints: bool) -> anyhow::Result<()> {
    let index = dataset.index();
    if let Some(text) = task.labels_problem(index.n_classes(), index.n_unlabelled()) {
        return Err(Coded::error(exit::USAGE, text));
    }
    let Some(place) = &task.encoder else { return Ok(()) };
    let (run, _) = encoder_at(place, |place| Path::new(place).exists());
    // A run that has checkpoints of its own has what it needs of it, or says what it lacks.
    if run.contains("://") || Path::new(run).exists() || has_checkpoints {
        return Ok(());
    }
    Err(Coded::error(exit::IO, format!("`task.encoder` = `{place}` does not exist")))
}

/// Opens the spec's data, pins what depends on it, and makes the request that creates the run.
pub fn request(spec: &mut RunSpec, resume: bool) -> anyhow::Result<v1::CreateRunRequest> {
    let path = Path::new(&spec.data.shards);
    let dataset = Dataset::open(path).map_err(|err| {
        let why = lacuna_checkpoint::chain(&err);
        Coded::error(exit::IO, why)
    })?;
    if let Some(task) = &spec.task {
        let own = Path::new(&spec.checkpoint.to).join(spec.run_id().as_str()).join("ckpt");
        check_task(task, &dataset, own.is_dir())?;
    }
    for misfit in data_check::misfits(&dataset, spec) {
        talk!("warning: {misfit}");
    }
    let n_samples = dataset.n_samples();
    spec.pin(n_samples, dataset.index().n_chunks());
    let resolved =
        spec.resolve(n_samples).map_err(|err| Coded::error(exit::USAGE, err.to_string()))?;
    for warning in task_warnings(spec, Some(resolved.geometry.steps_per_epoch())) {
        talk!("warning: {warning}");
    }
    let fingerprint = dataset.fingerprint().to_string();
    let (spec, request_id) = (spec.to_json().to_string(), lacuna_api::new_request_id());
    Ok(v1::CreateRunRequest { spec, resume, n_samples, fingerprint, request_id })
}
