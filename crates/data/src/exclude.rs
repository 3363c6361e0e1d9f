//! Taking known bad samples out of an index.
//!
//! The shards stay as they are; the new index leaves their bad samples out, so that they never
//! enter the order of a run. Why it is not a mask over the order: `docs/adr/0013`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use lacuna_types::SampleId;

use crate::bad::BadSamples;
use crate::dataset::Dataset;
use crate::files::write_atomic;
use crate::index::{Fingerprint, Index, ReadIndexError, ShardEntry, ShardRecords};
use crate::verify::VerifyReport;

/// Ending of the name under which the old index is kept.
pub(crate) const BEFORE_EXCLUDE: &str = ".before-exclude";

/// Most old indexes that are kept beside each other: whoever excludes that often should pack again.
const KEPT_MAX: u32 = 1000;

/// Samples that cannot be taken out.
#[derive(Debug, thiserror::Error)]
pub enum ExcludeError {
    /// Reading failed, so that it is not known which samples are bad.
    #[error(
        "{n} samples or shards could not be read, which says nothing about them: nothing was taken \
         out; the first: {first}"
    )]
    Unread {
        /// How many.
        n: u64,
        /// What went wrong with the first.
        first: String,
    },
    /// Nothing would be left.
    #[error("all {n} samples of `{}` are bad: nothing was taken out", index.display())]
    AllBad {
        /// The index.
        index: PathBuf,
        /// Samples of the index.
        n: u64,
    },
    /// The index was written anew since it was verified, or the report is about another one.
    #[error("index `{}` is {found} now, {expected} was verified: verify it again", index.display())]
    OtherIndex {
        /// The index.
        index: PathBuf,
        /// Fingerprint of the file.
        found: Fingerprint,
        /// Fingerprint of what was verified.
        expected: Fingerprint,
    },
    /// The index cannot be read again.
    #[error(transparent)]
    Index(#[from] ReadIndexError),
    /// A file could not be written.
    #[error("failed to write `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What [`exclude`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excluded {
    /// Fingerprint before.
    pub old: Fingerprint,
    /// Fingerprint now.
    pub new: Fingerprint,
    /// Where the old index is kept.
    pub kept: PathBuf,
    /// Samples that were taken out.
    pub n_excluded: u64,
    /// Samples that are left.
    pub n_left: u64,
    /// Shards without a sample, which the index no longer names.
    pub n_shards_dropped: u64,
}

/// Rewrites the index at `index_path` without the bad samples that verifying `dataset` found.
///
/// The old index is kept beside it. Shards whose bytes are not those that were indexed get their
/// present digest: every sample that stays was read and has the bytes it was indexed with. Without
/// a bad sample nothing is done.
pub fn exclude(
    dataset: &Dataset,
    index_path: &Path,
    report: &VerifyReport,
) -> Result<Option<Excluded>, ExcludeError> {
    check(dataset, index_path, report)?;
    let bad = &report.found;
    if bad.n_bad() == 0 {
        return Ok(None);
    }
    let shards = without(dataset.index(), bad, &report.shard_digests);
    let n_shards_dropped = (dataset.index().shards().len() - shards.len()) as u64;
    let index = Index::build(&shards);
    let old_bytes = dataset.index().bytes();
    let kept = kept_path(index_path, old_bytes);
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |source| ExcludeError::Io { path, source }
    };
    write_atomic(&kept, old_bytes).map_err(failed(&kept))?;
    write_atomic(index_path, index.bytes()).map_err(failed(index_path))?;
    Ok(Some(Excluded {
        old: dataset.fingerprint(),
        new: index.fingerprint(),
        kept,
        n_excluded: bad.n_bad(),
        n_left: index.n_samples(),
        n_shards_dropped,
    }))
}

/// Refuses to exclude by a report that is incomplete or about something else.
fn check(dataset: &Dataset, index_path: &Path, report: &VerifyReport) -> Result<(), ExcludeError> {
    let unread_shards = report.bad_shards.iter().filter(|shard| shard.is_unread);
    let n_unread = report.n_unread + unread_shards.clone().count() as u64;
    if n_unread > 0 {
        let sample = report.unread.first().map(|entry| entry.error.clone());
        let shard = unread_shards.map(|shard| shard.to_string()).next();
        return Err(ExcludeError::Unread {
            n: n_unread,
            first: sample.or(shard).unwrap_or_default(),
        });
    }
    let on_disk = Index::read(index_path)?;
    let expected = report.found.fingerprint();
    for found in [on_disk.fingerprint(), dataset.fingerprint()] {
        if found != expected {
            let index = index_path.to_path_buf();
            return Err(ExcludeError::OtherIndex { index, found, expected });
        }
    }
    if report.found.n_bad() == dataset.n_samples() {
        let index = index_path.to_path_buf();
        return Err(ExcludeError::AllBad { index, n: dataset.n_samples() });
    }
    Ok(())
}

/// Returns the shards of an index with their good samples; shards without one are left out.
fn without(index: &Index, bad: &BadSamples, digests: &[Option<[u8; 32]>]) -> Vec<ShardRecords> {
    let mut shards: Vec<ShardRecords> = Vec::new();
    for (number, (shard, now)) in index.shards().iter().zip(digests).enumerate() {
        let ids = index.shard_samples(number).map(SampleId);
        let records: Vec<_> =
            ids.filter(|id| !bad.contains(*id)).map(|id| index.record(id)).collect();
        if !records.is_empty() {
            let entry = ShardEntry { digest: now.unwrap_or(shard.digest), ..shard.clone() };
            shards.push(ShardRecords { entry, records });
        }
    }
    shards
}

/// Chooses where the old index is kept: an older one is never lost, and none is kept twice.
fn kept_path(index_path: &Path, old_bytes: &[u8]) -> PathBuf {
    let name = |number: u32| {
        let mut name = index_path.as_os_str().to_owned();
        name.push(BEFORE_EXCLUDE);
        if number > 1 {
            name.push(format!(".{number}"));
        }
        PathBuf::from(name)
    };
    let is_free = |path: &PathBuf| match fs::read(path) {
        // A crash between the two writes left it.
        Ok(bytes) => bytes == old_bytes,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    (1..KEPT_MAX).map(name).find(is_free).unwrap_or_else(|| name(KEPT_MAX))
}

#[cfg(test)]
mod tests;
