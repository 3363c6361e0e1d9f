//! Checkpoints that turned out to be damaged: a mark beside the manifest takes one out of the list
//! of those that can be used, and its files stay for a person to look at.
//!
//! The mark names the manifest that it is about, so it says nothing of another one that takes the
//! place. Reading the checkpoint back whole takes the mark away again.

use lacuna_types::Step;

use crate::catalog::{self, Status};
use crate::json::{canonical, parse_strict};
use crate::layout::RunDir;
use crate::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::storage::{FsError, chain};

/// Longest accepted mark: a digest and a few lines of text.
const MARK_BYTES_MAX: u64 = 1 << 20;
/// Problems that a mark names.
const PROBLEMS_MAX: usize = 3;

/// What came of reading a checkpoint whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Examined {
    /// Every byte is what the manifest says.
    Sound,
    /// Every byte is, although it was set aside; it is no more.
    Mended,
    /// It cannot be used, for this reason; it is marked, where there is a manifest to name.
    Damaged(String),
    /// It is not there any more.
    Gone,
    /// It could not be read now, for this reason, which says nothing of it.
    Unknown(String),
}

/// Reads the checkpoint at `step` whole and, if it is damaged, sets it aside; `seal` is the
/// manifest's digest that it should have.
pub fn examine(dir: &RunDir, step: Step, seal: &str) -> Examined {
    let manifest = match catalog::look(dir, step) {
        Err(error) => return Examined::Unknown(chain(&error)),
        Ok(None) => return Examined::Gone,
        Ok(Some(entry)) => match entry.status {
            Status::Damaged { reason } => return Examined::Damaged(reason),
            Status::Good(manifest) => manifest,
        },
    };
    if manifest.seal != seal {
        let found = &manifest.seal;
        return Examined::Damaged(format!("another manifest has its place: {found}, not {seal}"));
    }
    let was_aside = matches!(reason(dir, &manifest), Ok(Some(_)));
    let verify = || catalog::verify_and_mark(dir, &manifest);
    let verified = match verify() {
        // What could not be read is tried once more before it counts.
        Ok(verified) if verified.n_unread > 0 => verify(),
        done => done,
    };
    let verified = match verified {
        Ok(verified) => verified,
        // The bytes were read and are good; only the note beside them could not be written.
        Err(_) => return Examined::Sound,
    };
    if verified.problems.is_empty() {
        return if was_aside { Examined::Mended } else { Examined::Sound };
    }
    // Retention may have been faster than the reader.
    if let Ok(None) = catalog::look(dir, step) {
        return Examined::Gone;
    }
    let why = shortly(&verified.problems);
    if verified.n_passing > 0 {
        return Examined::Unknown(why);
    }
    match mark(dir, &manifest, &why) {
        Ok(()) => Examined::Damaged(why),
        Err(error) => Examined::Damaged(format!("{why} (not marked: {})", chain(&error))),
    }
}

fn shortly(problems: &[String]) -> String {
    let mut out = problems[..problems.len().min(PROBLEMS_MAX)].join("; ");
    if problems.len() > PROBLEMS_MAX {
        out += &format!("; and {} more", problems.len() - PROBLEMS_MAX);
    }
    out
}

/// Marks a checkpoint as damaged.
pub fn mark(dir: &RunDir, manifest: &Manifest, why: &str) -> Result<(), FsError> {
    let mark = serde_json::json!({ "manifest": manifest.seal, "why": why });
    dir.storage().replace_small(&dir.damage(manifest.step()), &(canonical(&mark) + "\n"))
}

/// Takes the mark of a checkpoint away, if there is one.
pub fn unmark(dir: &RunDir, step: Step) -> Result<(), FsError> {
    dir.storage().remove_file(&dir.damage(step))
}

/// Returns why this very checkpoint was set aside, if it was.
pub fn reason(dir: &RunDir, manifest: &Manifest) -> Result<Option<String>, FsError> {
    let text = match dir.storage().read_small(&dir.damage(manifest.step()), MARK_BYTES_MAX) {
        Ok(text) => text,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error),
    };
    // A mark that cannot be read marks nothing: the next reader finds the damage again.
    let Ok(mark) = parse_strict(&text) else { return Ok(None) };
    let is_its = mark["manifest"].as_str() == Some(&manifest.seal);
    Ok(mark["why"].as_str().filter(|_| is_its).map(str::to_string))
}

/// Frees the place of the checkpoint at `step` for another attempt, if what is there cannot be
/// used; returns whether the place is free.
///
/// A copy of the damaged manifest is kept beside it; while there is that and no manifest, nobody
/// removes the parts.
pub(crate) fn make_room(dir: &RunDir, step: Step) -> Result<bool, FsError> {
    let path = dir.manifest(step);
    let text = match dir.storage().read_small(&path, MANIFEST_BYTES_MAX) {
        Ok(text) => text,
        Err(error) if error.is_not_found() => return Ok(true),
        Err(error) => return Err(error),
    };
    if catalog::find(dir, step)?.is_some_and(|entry| entry.good().is_some()) {
        return Ok(false);
    }
    let copy = dir.damaged_manifest(step);
    dir.storage().replace_small(&copy, &String::from_utf8_lossy(&text))?;
    dir.storage().remove_file(&path)?;
    dir.storage().remove_file(&dir.verified(step))?;
    unmark(dir, step)?;
    Ok(true)
}

#[cfg(test)]
mod tests;
