//! Putting the files of a directory in the place of an earlier export's.
//!
//! A loader starts from one of two names, [`SINGLE`] or [`INDEX`]. Both go before anything else
//! changes and one of them comes last, so that a directory that can be loaded is whole, and all of
//! one export, after a crash at any moment.

use std::path::{Path, PathBuf};

use super::hf::{INDEX, SINGLE, is_shard};
use crate::disk::{self, FsError, Partial};
use crate::layout::PARTIAL;

/// Files of a directory that are whole and do not have their names yet.
pub(super) struct Staged {
    out: PathBuf,
    files: Vec<(String, Partial)>,
}

/// One change of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Change {
    /// Removes a name.
    Remove(String),
    /// Makes what was done before durable.
    Sync,
    /// Gives the new file its name, and makes that durable.
    Put(String),
}

impl Staged {
    /// Starts to collect files for `out`, and removes what a crashed export has left of its own.
    pub fn new(out: &Path) -> Result<Self, FsError> {
        for name in disk::names(out)? {
            let target = name.strip_suffix(PARTIAL);
            if target.is_some_and(is_ours) {
                disk::remove_file(&out.join(&name))?;
            }
        }
        Ok(Staged { out: out.to_path_buf(), files: Vec::new() })
    }

    /// Takes a file that is whole. The one that a loader starts from comes last.
    pub fn add(&mut self, name: &str, partial: Partial) -> Result<(), FsError> {
        // Here, so that a full disk shows while an earlier export is still there.
        partial.sync()?;
        self.files.push((name.to_string(), partial));
        Ok(())
    }

    /// Takes a document.
    pub fn add_text(&mut self, name: &str, text: &str) -> Result<(), FsError> {
        let path = self.out.join(name);
        disk::remove_stale_partial(&path)?;
        let partial = Partial::create(&path)?;
        let written = std::io::Write::write_all(&mut partial.writer(), text.as_bytes());
        written.map_err(|e| partial.error("write", e))?;
        self.add(name, partial)
    }

    /// Returns the names of the files.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|(name, _)| name.as_str())
    }

    /// Gives all files their names and removes what an earlier export had beside them.
    pub fn publish(self) -> Result<(), FsError> {
        let names: Vec<String> = self.names().map(str::to_string).collect();
        let mut files = self.files.into_iter();
        for change in changes(&disk::names(&self.out)?, &names) {
            match change {
                Change::Remove(name) => disk::remove_file(&self.out.join(name))?,
                Change::Sync => disk::sync_dir(&self.out)?,
                Change::Put(name) => {
                    let (next, partial) = files.next().expect("one change puts each file");
                    assert_eq!(next, name, "files are put in their order");
                    partial.replace()?;
                }
            }
        }
        Ok(())
    }
}

fn is_ours(name: &str) -> bool {
    let documents = ["config.json", "preprocessor_config.json", SINGLE, INDEX];
    documents.contains(&name) || is_shard(name)
}

/// Lists the changes from a directory of `existing` names to one with the files `new`.
fn changes(existing: &[String], new: &[String]) -> Vec<Change> {
    let is_entry = |name: &&String| *name == SINGLE || *name == INDEX;
    let remove = |name: &String| Change::Remove(name.clone());
    let mut out: Vec<Change> = existing.iter().filter(is_entry).map(remove).collect();
    out.push(Change::Sync);
    out.extend(existing.iter().filter(|name| is_shard(name)).map(remove));
    out.push(Change::Sync);
    assert!(new.last().as_ref().is_some_and(is_entry), "what a loader starts from comes last");
    out.extend(new.iter().cloned().map(Change::Put));
    out
}

#[cfg(test)]
mod tests;
