//! Which checkpoints may go, and removing them so that a reader never sees half of one.
//!
//! Only committed checkpoints count. Damaged ones stay until a person looks at them.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use lacuna_types::{Generation, Step};

use crate::catalog::{self, Entry};
use crate::json::parse_strict;
use crate::layout::{Attempt, RunDir};
use crate::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::storage::FsError;

/// Longest accepted pin: a step and two lines of text.
const HOLD_BYTES_MAX: u64 = 64 << 10;

/// A checkpoint that was not removed, or a plan that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RetainError {
    /// The file system refused.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// A pin cannot be understood, so nothing is safe to remove.
    #[error("hold `{}` cannot be understood", path.display())]
    Hold {
        /// The pin.
        path: PathBuf,
    },
}

/// What stays, with the reason, and what goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// Checkpoints that stay.
    pub keep: Vec<(Step, String)>,
    /// Checkpoints that go.
    pub delete: Vec<Step>,
}

/// Plans what to keep: the newest `last`, and whatever must not go.
///
/// Never goes: a checkpoint in `in_use`, a held one, the newest verified one, the newest finite one
/// and what is newer than it. Checkpoints that are not finite do not count as one of the `last`.
pub fn plan_retention(
    dir: &RunDir,
    last: NonZeroUsize,
    in_use: &[Step],
) -> Result<Retention, RetainError> {
    let entries = catalog::list(dir)?;
    let holds = holds(dir)?;
    let good: Vec<&Manifest> = entries.iter().rev().filter_map(Entry::good).collect();
    let verified = good.iter().find(|m| m.state.finite && catalog::is_verified(dir, m));
    let verified: Option<Step> = verified.map(|m| m.step());
    let mut out = Retention::default();
    let mut n_finite: usize = 0;
    for manifest in good {
        let step = manifest.step();
        let rank = n_finite;
        n_finite += usize::from(manifest.state.finite);
        let hold = holds.iter().find(|(held, _)| *held == step);
        let reason = if manifest.state.finite && rank < last.get() {
            format!("one of the last {last}")
        } else if rank == 0 {
            "newer than every finite one".to_string()
        } else if let Some((_, name)) = hold {
            format!("held by {name}")
        } else if in_use.contains(&step) {
            "in use".to_string()
        } else if verified == Some(step) {
            "the newest that was verified".to_string()
        } else {
            out.delete.push(step);
            continue;
        };
        out.keep.push((step, reason));
    }
    Ok(out)
}

/// Plans and removes; call it after a commit only.
pub fn retain(dir: &RunDir, last: NonZeroUsize, in_use: &[Step]) -> Result<Retention, RetainError> {
    let plan = plan_retention(dir, last, in_use)?;
    for step in &plan.delete {
        delete(dir, *step)?;
    }
    Ok(plan)
}

/// Lists the pinned steps with the names of their pins.
pub fn holds(dir: &RunDir) -> Result<Vec<(Step, String)>, RetainError> {
    let mut out: Vec<(Step, String)> = Vec::new();
    for name in dir.storage().names(&dir.holds())? {
        let path = dir.holds().join(&name);
        let text = dir.storage().read_small(&path, HOLD_BYTES_MAX)?;
        let step = parse_strict(&text).ok().and_then(|hold| hold["step"].as_u64());
        let step = step.ok_or(RetainError::Hold { path })?;
        out.push((Step(step), name.trim_end_matches(".json").to_string()));
    }
    Ok(out)
}

/// Removes a checkpoint: one step makes it invisible, then its files go.
pub fn delete(dir: &RunDir, step: Step) -> Result<(), RetainError> {
    let text = dir.storage().read_small(&dir.manifest(step), MANIFEST_BYTES_MAX)?;
    dir.storage().hide(&dir.manifest(step), &dir.deleted_manifest(step))?;
    remove_hidden(dir, step, &text)
}

/// Removes the files of a checkpoint whose manifest is gone, if there is such a one.
pub fn finish_delete(dir: &RunDir, step: Step) -> Result<(), RetainError> {
    let path = dir.deleted_manifest(step);
    let text = match dir.storage().read_small(&path, MANIFEST_BYTES_MAX) {
        Ok(text) => text,
        Err(error) if error.is_not_found() => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    remove_hidden(dir, step, &text)
}

/// Removes the mark of a checkpoint that is gone: where hiding is deleting, a crash leaves it.
fn remove_stray_mark(dir: &RunDir, step: Step) -> Result<(), FsError> {
    let names = dir.storage().names(&dir.step(step))?;
    let has = |path: PathBuf| names.iter().any(|name| path.ends_with(name));
    if has(dir.verified(step)) && !has(dir.manifest(step)) {
        dir.storage().remove_file(&dir.verified(step))?;
    }
    Ok(())
}

/// Removes the files that a hidden manifest names, and the manifest last.
fn remove_hidden(dir: &RunDir, step: Step, text: &[u8]) -> Result<(), RetainError> {
    dir.storage().remove_file(&dir.verified(step))?;
    // An attempt whose manifest cannot be read is garbage like any other.
    if let Ok(manifest) = Manifest::parse(text) {
        dir.storage().remove_folder(&dir.attempt(step, manifest.attempt))?;
    }
    dir.storage().remove_file(&dir.deleted_manifest(step))?;
    // Another attempt at this step may be under way: then the directory stays.
    dir.storage().remove_empty_folder(&dir.step(step));
    Ok(())
}

/// Lists attempts that never became a checkpoint and cannot any more.
///
/// Those are attempts of generations before `current` and those in `aborted`. A step whose manifest
/// cannot be read is left alone.
pub fn plan_garbage(
    dir: &RunDir,
    current: Generation,
    aborted: &[Attempt],
) -> Result<Vec<PathBuf>, RetainError> {
    let mut out: Vec<PathBuf> = Vec::new();
    for name in dir.storage().names(&dir.checkpoints())? {
        let Some(step) = RunDir::parse_step(&name) else { continue };
        let committed = match dir.storage().read_small(&dir.manifest(step), MANIFEST_BYTES_MAX) {
            Ok(text) => match Manifest::parse(&text) {
                Ok(manifest) => Some(manifest.attempt),
                Err(_) => continue,
            },
            Err(error) if error.is_not_found() => None,
            Err(_) => continue,
        };
        for name in dir.storage().names(&dir.step(step))? {
            let Some(attempt) = RunDir::parse_attempt(&name) else { continue };
            let over = attempt.generation < current || aborted.contains(&attempt);
            if over && committed != Some(attempt) {
                out.push(dir.attempt(step, attempt));
            }
        }
    }
    Ok(out)
}

/// Removes garbage and finishes deletions that were cut short; returns the attempts removed.
pub fn collect_garbage(
    dir: &RunDir,
    current: Generation,
    aborted: &[Attempt],
) -> Result<Vec<PathBuf>, RetainError> {
    for name in dir.storage().names(&dir.checkpoints())? {
        if let Some(step) = RunDir::parse_step(&name) {
            finish_delete(dir, step)?;
            remove_stray_mark(dir, step)?;
        }
    }
    let garbage = plan_garbage(dir, current, aborted)?;
    for path in &garbage {
        dir.storage().remove_folder(path)?;
        if let Some(step) = path.parent() {
            // It stays where the step has a checkpoint or another attempt.
            dir.storage().remove_empty_folder(step);
        }
    }
    Ok(garbage)
}

#[cfg(test)]
mod tests;
