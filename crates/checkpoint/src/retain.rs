//! Which checkpoints may go, and removing them so that a reader never sees half of one.
//!
//! Only committed checkpoints count. Damaged ones stay until a person looks at them.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use lacuna_types::{Generation, Step};

use crate::aside;
use crate::catalog::{self, Entry};
use crate::json::{canonical, parse_strict};
use crate::layout::{Attempt, PARTIAL, RunDir};
use crate::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::storage::{FsError, Published};

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
/// Pins that have ended at `now` hold nothing.
pub fn plan_retention(
    dir: &RunDir,
    last: NonZeroUsize,
    in_use: &[Step],
    now: &str,
) -> Result<Retention, RetainError> {
    let entries = catalog::list(dir)?;
    let mut holds = holds(dir)?;
    holds.retain(|hold| !hold.is_over(now));
    let good: Vec<&Manifest> = entries.iter().rev().filter_map(Entry::good).collect();
    let mut verified: Option<Step> = None;
    for manifest in good.iter().filter(|manifest| manifest.state.finite) {
        if catalog::is_verified(dir, manifest)? {
            verified = Some(manifest.step());
            break;
        }
    }
    let mut out = Retention::default();
    let mut n_finite: usize = 0;
    for manifest in good {
        let step = manifest.step();
        let rank = n_finite;
        n_finite += usize::from(manifest.state.finite);
        let hold = holds.iter().find(|hold| hold.step == step);
        let reason = if manifest.state.finite && rank < last.get() {
            format!("one of the last {last}")
        } else if rank == 0 {
            "newer than every finite one".to_string()
        } else if let Some(hold) = hold {
            format!("held by {}", hold.name)
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

/// Chooses what a cadence of `every` steps keeps for good: of the checkpoints in `entries` the
/// first at or after each multiple.
///
/// A checkpoint is saved some steps after it is due, so that few lie on a multiple. What was chosen
/// once stays chosen, whatever else is removed.
///
/// # Panics
/// If `every` is zero.
pub fn chosen(entries: &[Entry], every: u64) -> Vec<Step> {
    let mut steps: Vec<Step> = entries.iter().filter_map(Entry::good).map(Manifest::step).collect();
    steps.sort_unstable();
    let mut last = None;
    let mut is_first = |step: &Step| {
        let multiple = step.0 / every;
        last.replace(multiple) != Some(multiple) && (multiple > 0 || step.0 == 0)
    };
    steps.retain(|step| is_first(step));
    steps
}

/// Plans and removes; call it after a commit only.
pub fn retain(
    dir: &RunDir,
    last: NonZeroUsize,
    in_use: &[Step],
    now: &str,
) -> Result<Retention, RetainError> {
    let plan = plan_retention(dir, last, in_use, now)?;
    for step in &plan.delete {
        // Removing takes its time, and somebody may have pinned this one meanwhile.
        if !holds(dir)?.iter().any(|hold| hold.step == *step && !hold.is_over(now)) {
            delete(dir, *step)?;
        }
    }
    Ok(plan)
}

/// A pin: a checkpoint that must not go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Its name, by which it is released.
    pub name: String,
    /// The checkpoint.
    pub step: Step,
    /// Why; for people.
    pub why: String,
    /// When it ends, RFC 3339 in UTC with whole seconds; never, if absent.
    pub until: Option<String>,
}

impl Hold {
    /// Tells whether the pin has ended at `now`, written in the same way.
    pub fn is_over(&self, now: &str) -> bool {
        self.until.as_deref().is_some_and(|until| until <= now)
    }
}

/// Pins a checkpoint; a pin that has this name already stays as it is.
///
/// # Panics
/// If the name is not one of a file.
pub fn hold(dir: &RunDir, hold: &Hold) -> Result<Published, FsError> {
    assert!(!hold.name.is_empty() && !hold.name.contains(['/', '\0']), "`{}`", hold.name);
    dir.storage().prepare(dir.root(), &dir.holds())?;
    let path = dir.hold(&hold.name);
    let text = serde_json::json!({ "step": hold.step.0, "why": hold.why, "until": hold.until });
    dir.storage().create_small(&path, &path, &(canonical(&text) + "\n"))
}

/// Lists the pins, those that have ended too.
pub fn holds(dir: &RunDir) -> Result<Vec<Hold>, RetainError> {
    let mut out: Vec<Hold> = Vec::new();
    let names = dir.storage().names(&dir.holds())?;
    for name in names.iter().filter(|name| !name.ends_with(PARTIAL)) {
        let path = dir.holds().join(name);
        let text = dir.storage().read_small(&path, HOLD_BYTES_MAX)?;
        let hold = parse_strict(&text).ok();
        let step = hold.as_ref().and_then(|hold| hold["step"].as_u64());
        let (Some(hold), Some(step)) = (hold, step) else {
            return Err(RetainError::Hold { path });
        };
        out.push(Hold {
            name: name.strip_suffix(".json").unwrap_or(name).to_string(),
            step: Step(step),
            why: hold["why"].as_str().unwrap_or_default().to_string(),
            until: hold["until"].as_str().map(str::to_string),
        });
    }
    Ok(out)
}

/// Removes a pin.
pub fn release(dir: &RunDir, name: &str) -> Result<(), FsError> {
    dir.storage().remove_file(&dir.hold(name))
}

/// Removes a checkpoint: one step makes it invisible, then its files go.
///
/// One that somebody else is removing or has removed counts as removed.
pub fn delete(dir: &RunDir, step: Step) -> Result<(), RetainError> {
    let text = dir.storage().read_small(&dir.manifest(step), MANIFEST_BYTES_MAX);
    let hidden = text.and_then(|text| {
        dir.storage().hide(&dir.manifest(step), &dir.deleted_manifest(step)).map(|()| text)
    });
    match hidden {
        Ok(text) => remove_hidden(dir, step, &text),
        Err(error) if error.is_not_found() => finish_delete(dir, step),
        Err(error) => Err(error.into()),
    }
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

/// Removes the files that a hidden manifest names, and the manifest last.
fn remove_hidden(dir: &RunDir, step: Step, text: &[u8]) -> Result<(), RetainError> {
    remove_marks(dir, step)?;
    // An attempt whose manifest cannot be read is garbage like any other.
    if let Ok(manifest) = Manifest::parse(text) {
        dir.storage().remove_folder(&dir.attempt(step, manifest.attempt))?;
    }
    // What an earlier checkpoint that was damaged left goes with the one that took its place.
    dir.storage().remove_file(&dir.damaged_manifest(step))?;
    dir.storage().remove_file(&dir.deleted_manifest(step))?;
    // Another attempt at this step may be under way: then the directory stays.
    dir.storage().remove_empty_folder(&dir.step(step));
    Ok(())
}

/// Removes the mark of a checkpoint that is gone, and what is left of making it.
fn remove_marks(dir: &RunDir, step: Step) -> Result<(), FsError> {
    dir.storage().remove_file(&dir.verified(step))?;
    aside::unmark(dir, step)?;
    dir.storage().remove_file(&partial(&dir.damage(step)))?;
    dir.storage().remove_file(&partial(&dir.damaged_manifest(step)))?;
    dir.storage().remove_file(&partial(&dir.verified(step)))
}

fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(PARTIAL);
    PathBuf::from(name)
}

/// Lists attempts that never became a checkpoint and cannot any more.
///
/// Those are attempts of generations before `current` and those in `aborted`. A step whose manifest
/// cannot be read, or was damaged and is being made again, is left alone.
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
        if committed.is_none() {
            match dir.storage().size(&dir.damaged_manifest(step)) {
                Err(error) if error.is_not_found() => {}
                // It is there, or that cannot be known.
                _ => continue,
            }
        }
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
    let steps = dir.storage().names(&dir.checkpoints())?;
    let steps: Vec<Step> = steps.iter().filter_map(|name| RunDir::parse_step(name)).collect();
    for step in &steps {
        finish_delete(dir, *step)?;
    }
    let garbage = plan_garbage(dir, current, aborted)?;
    for path in &garbage {
        dir.storage().remove_folder(path)?;
    }
    for step in steps {
        sweep(dir, step, current)?;
    }
    sweep_claims(dir)?;
    // One that is being written just now is missed until the next commit: it is a hint.
    dir.storage().remove_file(&partial(&dir.latest()))?;
    Ok(garbage)
}

/// Removes what crashes left beside a checkpoint or in the place of one.
fn sweep(dir: &RunDir, step: Step, current: Generation) -> Result<(), RetainError> {
    let text = match dir.storage().read_small(&dir.manifest(step), MANIFEST_BYTES_MAX) {
        Ok(text) => text,
        Err(error) if error.is_not_found() => {
            remove_marks(dir, step)?;
            // It stays where an attempt is under way.
            dir.storage().remove_empty_folder(&dir.step(step));
            return Ok(());
        }
        // Damage is for a person to look at.
        Err(_) => return Ok(()),
    };
    let Ok(manifest) = Manifest::parse(&text) else { return Ok(()) };
    if manifest.attempt.generation < current {
        let attempt = dir.attempt(step, manifest.attempt);
        for name in dir.storage().names(&attempt)?.iter().filter(|name| name.ends_with(PARTIAL)) {
            dir.storage().remove_file(&attempt.join(name))?;
        }
    }
    Ok(())
}

/// Removes unfinished claims that cannot be made any more; later ones may be under way.
fn sweep_claims(dir: &RunDir) -> Result<(), RetainError> {
    let names = dir.storage().names(&dir.claims())?;
    let epoch = |name: &String| RunDir::parse_claim(name.strip_suffix(PARTIAL).unwrap_or(name));
    let highest = names.iter().filter(|name| !name.ends_with(PARTIAL)).filter_map(epoch).max();
    for name in names.iter().filter(|name| name.ends_with(PARTIAL) && epoch(name) <= highest) {
        dir.storage().remove_file(&dir.claims().join(name))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
