//! What an interrupted indexing has read already: a file for each shard, beside the shards.
//!
//! A shard counts as read if its size and the time of its last change are as they were.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use lacuna_types::SampleId;
use serde::{Deserialize, Serialize};

use super::Scanned;
use crate::files::write_atomic;
use crate::index::{Index, ShardRecords};
use crate::{SkipList, Skipped};

/// Name of the folder that holds the files; gone once the index is written.
const PARTS: &str = ".index-parts";

/// First line of a file; the rest is an index of the one shard.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Head {
    bytes: u64,
    changed_ns: u128,
    n_skipped: u64,
    skipped: Vec<(String, String)>,
}

fn changed_ns(path: &Path) -> io::Result<(u64, u128)> {
    let meta = fs::metadata(path)?;
    let changed = meta.modified()?.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    Ok((meta.len(), changed))
}

/// The files of one folder. Without them indexing works, and starts from the beginning each time.
pub(super) struct Parts {
    folder: PathBuf,
}

impl Parts {
    pub(super) fn of(shards: &Path) -> Self {
        Parts { folder: shards.join(PARTS) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.part"))
    }

    /// Returns what was found in a shard before, if it has not changed since.
    pub(super) fn find(&self, shard: &Path, name: &str) -> Option<Scanned> {
        let bytes = fs::read(self.path(name)).ok()?;
        let end = bytes.iter().position(|byte| *byte == b'\n')?;
        let head: Head = serde_json::from_slice(&bytes[..end]).ok()?;
        if (head.bytes, head.changed_ns) != changed_ns(shard).ok()? {
            return None;
        }
        // A member takes a header of 512 bytes, so these are all that a shard can have left out.
        let n_listed = head.skipped.len() as u64;
        if head.n_skipped < n_listed || head.n_skipped > head.bytes / 512 {
            return None;
        }
        let index = Index::parse(bytes[end + 1..].to_vec(), &self.path(name)).ok()?;
        let [entry] = index.shards() else { return None };
        if entry.name != name || entry.bytes != head.bytes {
            return None;
        }
        let records = (0..index.n_samples()).map(|id| index.record(SampleId(id))).collect();
        let first = head.skipped.into_iter();
        let first = first.map(|(place, reason)| Skipped { place, reason }).collect();
        let skips = SkipList { n: head.n_skipped, first };
        Some((ShardRecords { entry: entry.clone(), records }, skips))
    }

    /// Keeps what was found in a shard; `before` is its state when reading began.
    pub(super) fn keep(&self, before: io::Result<(u64, u128)>, found: &Scanned) {
        let (shard, skips) = found;
        let Ok((bytes, changed_ns)) = before else { return };
        if shard.records.is_empty() || bytes != shard.entry.bytes {
            return;
        }
        let skipped = skips.first.iter().map(|s| (s.place.clone(), s.reason.clone())).collect();
        let head = Head { bytes, changed_ns, n_skipped: skips.n, skipped };
        let mut text = serde_json::to_vec(&head).expect("plain data serialises");
        text.push(b'\n');
        text.extend(Index::build(std::slice::from_ref(shard)).bytes());
        // Best effort: a part that is not there is read again.
        let _ = fs::create_dir_all(&self.folder)
            .and_then(|()| write_atomic(&self.path(&shard.entry.name), &text));
    }

    /// Reads a shard through `scan`, unless it was read before.
    pub(super) fn through<E>(
        &self,
        shard: &Path,
        name: &str,
        scan: impl FnOnce() -> Result<Scanned, E>,
    ) -> Result<Scanned, E> {
        if let Some(found) = self.find(shard, name) {
            return Ok(found);
        }
        let before = changed_ns(shard);
        let found = scan()?;
        self.keep(before, &found);
        Ok(found)
    }

    /// Removes the files, after the index was written.
    pub(super) fn remove(&self) {
        // What stays behind is found to be old, or right, the next time.
        let _ = fs::remove_dir_all(&self.folder);
    }
}
