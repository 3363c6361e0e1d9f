//! Which checkpoints a run has: manifests that exist, sound or with the reason why not.

use lacuna_types::{CoordEpoch, Generation, Step};

use crate::aside;
use crate::json::canonical;
use crate::layout::RunDir;
use crate::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::read::{self, Verified};
use crate::storage::{FsError, chain};

/// A committed checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its step, by the name of its directory.
    pub step: Step,
    /// Whether it can be used.
    pub status: Status,
}

/// Whether a committed checkpoint can be used, as far as sizes and the manifest tell.
#[derive(Clone, Debug, PartialEq)]
pub enum Status {
    /// The manifest is sound and every part is there with its size.
    Good(Box<Manifest>),
    /// It cannot be used.
    Damaged {
        /// Why not.
        reason: String,
    },
}

impl Entry {
    /// Returns the manifest of a usable checkpoint.
    pub fn good(&self) -> Option<&Manifest> {
        match &self.status {
            Status::Good(manifest) => Some(manifest),
            Status::Damaged { .. } => None,
        }
    }

    /// Orders by (coordinator start, step); damaged entries, whose start is unknown, come first.
    fn order(&self) -> (Option<CoordEpoch>, Step) {
        (self.good().map(|manifest| manifest.order().0), self.step)
    }
}

/// Lists the committed checkpoints of a run, the newest last.
///
/// Attempts without a manifest are not checkpoints and are not listed.
pub fn list(dir: &RunDir) -> Result<Vec<Entry>, FsError> {
    let mut out: Vec<Entry> = Vec::new();
    for name in dir.storage().names(&dir.checkpoints())? {
        let Some(step) = RunDir::parse_step(&name) else { continue };
        out.extend(find(dir, step)?);
    }
    out.sort_by_key(Entry::order);
    Ok(out)
}

/// Looks at the checkpoint of one step; one that was set aside counts as damaged.
pub fn find(dir: &RunDir, step: Step) -> Result<Option<Entry>, FsError> {
    let Some(mut entry) = look(dir, step)? else { return Ok(None) };
    let why = entry.good().map(|manifest| aside::reason(dir, manifest)).transpose()?.flatten();
    if let Some(why) = why {
        entry.status = Status::Damaged { reason: format!("set aside: {why}") };
    }
    Ok(Some(entry))
}

/// Looks at the checkpoint of one step, whether or not it was set aside.
pub fn look(dir: &RunDir, step: Step) -> Result<Option<Entry>, FsError> {
    let text = match dir.storage().read_small(&dir.manifest(step), MANIFEST_BYTES_MAX) {
        Ok(text) => text,
        Err(error) if error.is_not_found() => return Ok(None),
        // To take it for damage would be to go on from an older state, or from none.
        Err(error) if error.is_passing() => return Err(error),
        Err(error) => {
            let reason = chain(&error);
            return Ok(Some(Entry { step, status: Status::Damaged { reason } }));
        }
    };
    let status = match check(dir, step, &text)? {
        Ok(manifest) => Status::Good(Box::new(manifest)),
        Err(reason) => Status::Damaged { reason },
    };
    Ok(Some(Entry { step, status }))
}

/// Checks a manifest against its place and the sizes of its parts; says what is wrong, if anything.
fn check(dir: &RunDir, step: Step, text: &[u8]) -> Result<Result<Manifest, String>, FsError> {
    let manifest = match Manifest::parse(text) {
        Ok(manifest) => manifest,
        Err(error) => {
            let why = chain(&error);
            return Ok(Err(format!("checkpoint step {step}: manifest.json: {why}")));
        }
    };
    if manifest.step() != step || manifest.run != dir.run().as_str() {
        return Ok(Err(format!(
            "checkpoint step {step}: manifest.json is that of run {} step {}",
            manifest.run, manifest.step
        )));
    }
    let Some((idx, problem)) = read::first_missing(dir, &manifest)? else {
        return Ok(Ok(manifest));
    };
    let file = &manifest.files[idx as usize];
    let affects = read::affected(&manifest, idx, &(0..file.bytes));
    Ok(Err(format!("checkpoint step {step}: {} {problem} ({affects})", file.name)))
}

/// Returns the newest usable entry of a list.
pub fn newest_good(entries: &[Entry]) -> Option<&Manifest> {
    entries.iter().rev().find_map(Entry::good)
}

/// Returns the newest usable entry that is older than `manifest`.
pub fn next_good<'a>(entries: &'a [Entry], manifest: &Manifest) -> Option<&'a Manifest> {
    entries.iter().rev().filter_map(Entry::good).find(|good| good.order() < manifest.order())
}

/// Finds the highest generation that any attempt names, committed or not: names are never reused.
pub fn highest_generation(dir: &RunDir) -> Result<Generation, FsError> {
    let mut highest = Generation(0);
    for name in dir.storage().names(&dir.checkpoints())? {
        let Some(step) = RunDir::parse_step(&name) else { continue };
        let names = dir.storage().names(&dir.step(step))?;
        let attempts = names.iter().filter_map(|name| RunDir::parse_attempt(name));
        highest = attempts.fold(highest, |highest, attempt| highest.max(attempt.generation));
    }
    Ok(highest)
}

/// Reads a checkpoint back whole and, where it is sound, marks it as verified, also if it was set
/// aside before.
pub fn verify_and_mark(dir: &RunDir, manifest: &Manifest) -> Result<Verified, FsError> {
    let verified = read::verify(dir, manifest);
    if verified.problems.is_empty() {
        let path = dir.verified(manifest.step());
        let mark = serde_json::json!({ "manifest": manifest.seal, "bytes": verified.bytes });
        dir.storage().replace_small(&path, &(canonical(&mark) + "\n"))?;
        aside::unmark(dir, manifest.step())?;
    }
    Ok(verified)
}

/// Tells whether this very checkpoint was once read back whole.
///
/// # Errors
/// The mark may be there and cannot be read.
pub fn is_verified(dir: &RunDir, manifest: &Manifest) -> Result<bool, FsError> {
    /// A mark has one digest and one number.
    const MARK_BYTES_MAX: u64 = 4096;
    let mark = match dir.storage().read_small(&dir.verified(manifest.step()), MARK_BYTES_MAX) {
        Ok(text) => crate::json::parse_strict(&text).ok(),
        Err(error) if error.is_not_found() => None,
        Err(error) => return Err(error),
    };
    Ok(mark.is_some_and(|mark| mark["manifest"].as_str() == Some(manifest.seal.as_str())))
}

#[cfg(test)]
mod tests;
