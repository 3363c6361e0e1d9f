//! Decodes a whole data set once and says what is wrong with it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;

use lacuna_types::SampleId;

use crate::dataset::{Dataset, SamplePlace};
use crate::files::chain;
use crate::reader::SampleReader;
use crate::{OnProgress, Progress};

/// Samples that a thread takes on at a time: few enough to share the end fairly, many enough that
/// messages cost nothing.
const BATCH: u64 = 64;

/// Messages that may wait; the receiver only counts, so it is never far behind.
const MESSAGES_MAX: usize = 64;

/// Bad samples that are listed; the others are only counted.
pub const BAD_LISTED_MAX: usize = 1000;

/// A sample that does not decode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadEntry {
    /// Where it lies.
    pub place: SamplePlace,
    /// What is wrong.
    pub error: String,
}

/// What [`verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Samples looked at: all.
    pub n_samples: u64,
    /// Samples that do not decode.
    pub n_bad: u64,
    /// The first [`BAD_LISTED_MAX`] of them, by id.
    pub bad: Vec<BadEntry>,
    /// Shards whose bytes are not those that were indexed, and what is wrong with them.
    pub bad_shards: Vec<(PathBuf, String)>,
}

impl VerifyReport {
    /// Tells whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.n_bad == 0 && self.bad_shards.is_empty()
    }
}

/// Checks the digest of every shard and decodes every sample, with `threads` threads.
///
/// Progress counts samples. A shard that cannot be read is reported, not an error.
pub fn verify(dataset: &Dataset, threads: usize, progress: OnProgress<'_>) -> VerifyReport {
    let total = dataset.n_samples();
    let next_sample = AtomicU64::new(0);
    let next_shard = AtomicU64::new(0);
    let (sender, receiver) = mpsc::sync_channel::<Found>(MESSAGES_MAX);
    let mut report = VerifyReport { n_samples: total, ..VerifyReport::default() };
    let mut bad: Vec<(SampleId, String)> = Vec::new();
    thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            let (samples, shards) = (&next_sample, &next_shard);
            let sender = sender.clone();
            scope.spawn(move || {
                check_samples(dataset, samples, &sender);
                check_shards(dataset, shards, &sender);
            });
        }
        drop(sender);
        let mut done: u64 = 0;
        for found in receiver {
            match found {
                Found::Samples { n, bad: more } => {
                    done += n;
                    bad.extend(more);
                    progress(Progress { done, total });
                }
                Found::Shard { path, error } => report.bad_shards.push((path, error)),
            }
        }
    });
    bad.sort();
    report.bad_shards.sort();
    report.n_bad = bad.len() as u64;
    let entry = |(id, error)| BadEntry { place: dataset.place(id), error };
    report.bad = bad.into_iter().take(BAD_LISTED_MAX).map(entry).collect();
    report
}

enum Found {
    Samples { n: u64, bad: Vec<(SampleId, String)> },
    Shard { path: PathBuf, error: String },
}

fn check_samples(dataset: &Dataset, next: &AtomicU64, found: &mpsc::SyncSender<Found>) {
    let total = dataset.n_samples();
    let mut reader = SampleReader::new();
    loop {
        let start = next.fetch_add(BATCH, Ordering::Relaxed);
        if start >= total {
            return;
        }
        let end = total.min(start + BATCH);
        let mut bad: Vec<(SampleId, String)> = Vec::new();
        for id in (start..end).map(SampleId) {
            if let Err(error) = reader.decode(dataset, id) {
                bad.push((id, chain(&error)));
            }
        }
        let n = end - start;
        // The receiver outlives the threads; if it is gone, so is the interest in the result.
        if found.send(Found::Samples { n, bad }).is_err() {
            return;
        }
    }
}

fn check_shards(dataset: &Dataset, next: &AtomicU64, found: &mpsc::SyncSender<Found>) {
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed) as usize;
        let Some(shard) = dataset.index().shards().get(number) else {
            return;
        };
        let path = dataset.folder().join(&shard.name);
        let error = match digest(&path) {
            Ok(digest) if digest == shard.digest => continue,
            Ok(_) => "its digest is not the indexed one".to_string(),
            Err(error) => error.to_string(),
        };
        if found.send(Found::Shard { path, error }).is_err() {
            return;
        }
    }
}

fn digest(path: &Path) -> io::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests;
