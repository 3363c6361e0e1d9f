//! Which checkpoints may go, and removing them so that a reader never sees half of one.
//!
//! Only committed checkpoints count. Damaged ones stay until a person looks at them.

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use lacuna_types::{Generation, Step};

use crate::catalog::{self, Entry};
use crate::disk::{self, FsError};
use crate::json::parse_strict;
use crate::layout::{Attempt, RunDir};
use crate::manifest::{MANIFEST_BYTES_MAX, Manifest};

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
    for name in disk::names(&dir.holds())? {
        let path = dir.holds().join(&name);
        let text = disk::read_small(&path, HOLD_BYTES_MAX)?;
        let step = parse_strict(&text).ok().and_then(|hold| hold["step"].as_u64());
        let step = step.ok_or(RetainError::Hold { path })?;
        out.push((Step(step), name.trim_end_matches(".json").to_string()));
    }
    Ok(out)
}

/// Removes a checkpoint: one rename makes it invisible, then its files go.
pub fn delete(dir: &RunDir, step: Step) -> Result<(), RetainError> {
    let (from, to) = (dir.manifest(step), dir.deleted_manifest(step));
    fs::rename(&from, &to).map_err(|e| FsError::new("rename", &from, e))?;
    disk::sync_dir(&dir.step(step))?;
    finish_delete(dir, step)
}

/// Removes the files of a checkpoint whose manifest is gone, if there is such a one.
pub fn finish_delete(dir: &RunDir, step: Step) -> Result<(), RetainError> {
    let path = dir.deleted_manifest(step);
    let text = match disk::read_small(&path, MANIFEST_BYTES_MAX) {
        Ok(text) => text,
        Err(error) if error.is_not_found() => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    disk::remove_file(&dir.verified(step))?;
    // An attempt whose manifest cannot be read is garbage like any other.
    if let Ok(manifest) = Manifest::parse(&text) {
        remove_attempt(&dir.attempt(step, manifest.attempt))?;
    }
    disk::remove_file(&path)?;
    // Another attempt at this step may be under way: then the directory stays.
    let _ = fs::remove_dir(dir.step(step));
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
    for name in disk::names(&dir.checkpoints())? {
        let Some(step) = RunDir::parse_step(&name) else { continue };
        let committed = match disk::read_small(&dir.manifest(step), MANIFEST_BYTES_MAX) {
            Ok(text) => match Manifest::parse(&text) {
                Ok(manifest) => Some(manifest.attempt),
                Err(_) => continue,
            },
            Err(error) if error.is_not_found() => None,
            Err(_) => continue,
        };
        for name in disk::names(&dir.step(step))? {
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
    for name in disk::names(&dir.checkpoints())? {
        if let Some(step) = RunDir::parse_step(&name) {
            finish_delete(dir, step)?;
        }
    }
    let garbage = plan_garbage(dir, current, aborted)?;
    for path in &garbage {
        remove_attempt(path)?;
        if let Some(step) = path.parent() {
            // Fails where the step has a checkpoint or another attempt, which is right.
            let _ = fs::remove_dir(step);
        }
    }
    Ok(garbage)
}

/// Removes an attempt: parts, then receipts and whatever else, then the directory.
fn remove_attempt(path: &Path) -> Result<(), FsError> {
    let names = disk::names(path)?;
    for name in names.iter().filter(|name| name.starts_with("part-")) {
        disk::remove_file(&path.join(name))?;
    }
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(FsError::new("remove directory", path, e))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
