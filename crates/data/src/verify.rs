//! Decodes a whole data set once and says what is wrong with it.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;

use lacuna_types::SampleId;

use crate::bad::BadSamples;
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

/// A sample with which something is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadEntry {
    /// Where it lies.
    pub place: SamplePlace,
    /// What is wrong.
    pub error: String,
}

/// A shard with which something is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BadShard {
    /// The shard.
    pub path: PathBuf,
    /// What is wrong.
    pub error: String,
    /// Whether it could not be read, which says nothing about its bytes.
    pub is_unread: bool,
}

impl fmt::Display for BadShard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shard `{}`: {}", self.path.display(), self.error)
    }
}

/// What [`verify`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyReport {
    /// Samples looked at: all.
    pub n_samples: u64,
    /// Samples that do not decode.
    pub found: BadSamples,
    /// The first [`BAD_LISTED_MAX`] of them, by id.
    pub bad: Vec<BadEntry>,
    /// Samples whose bytes could not be read: another try may find them good.
    pub n_unread: u64,
    /// The first [`BAD_LISTED_MAX`] of them, by id.
    pub unread: Vec<BadEntry>,
    /// Shards whose bytes are not those that were indexed, or could not be read.
    pub bad_shards: Vec<BadShard>,
    /// Digest of each shard's bytes as they are; `None` where they could not be read.
    pub shard_digests: Vec<Option<[u8; 32]>>,
}

impl VerifyReport {
    /// Tells whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.n_bad() == 0 && self.n_unread == 0 && self.bad_shards.is_empty()
    }

    /// Returns the number of samples that do not decode.
    pub fn n_bad(&self) -> u64 {
        self.found.n_bad()
    }
}

/// The first few errors by sample.
#[derive(Debug, Default)]
struct Listed(BTreeMap<SampleId, String>);

impl Listed {
    fn add(&mut self, id: SampleId, error: String) {
        self.0.insert(id, error);
        if self.0.len() > BAD_LISTED_MAX {
            self.0.pop_last();
        }
    }

    fn entries(self, dataset: &Dataset) -> Vec<BadEntry> {
        let entry = |(id, error)| BadEntry { place: dataset.place(id), error };
        self.0.into_iter().map(entry).collect()
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
    let n_shards = dataset.index().shards().len();
    let mut report = VerifyReport {
        n_samples: total,
        found: BadSamples::none_of(dataset),
        bad: Vec::new(),
        n_unread: 0,
        unread: Vec::new(),
        bad_shards: Vec::new(),
        shard_digests: vec![None; n_shards],
    };
    let (mut bad, mut unread) = (Listed::default(), Listed::default());
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
                Found::Samples { n, wrong } => {
                    done += n;
                    for Wrong { id, error, is_bad } in wrong {
                        if is_bad {
                            report.found.mark(id);
                            bad.add(id, error);
                        } else {
                            report.n_unread += 1;
                            unread.add(id, error);
                        }
                    }
                    progress(Progress { done, total });
                }
                Found::Shard { number, digest } => add_shard(dataset, number, digest, &mut report),
            }
        }
    });
    report.bad_shards.sort();
    report.bad = bad.entries(dataset);
    report.unread = unread.entries(dataset);
    report
}

enum Found {
    Samples { n: u64, wrong: Vec<Wrong> },
    Shard { number: usize, digest: io::Result<[u8; 32]> },
}

struct Wrong {
    id: SampleId,
    error: String,
    /// Whether the sample is bad; else it could not be read.
    is_bad: bool,
}

fn add_shard(
    dataset: &Dataset,
    number: usize,
    digest: io::Result<[u8; 32]>,
    report: &mut VerifyReport,
) {
    let shard = &dataset.index().shards()[number];
    let (error, is_unread) = match digest {
        Ok(digest) => {
            report.shard_digests[number] = Some(digest);
            if digest == shard.digest {
                return;
            }
            ("its digest is not the indexed one".to_string(), false)
        }
        Err(error) => (error.to_string(), true),
    };
    let path = dataset.folder().join(&shard.name);
    report.bad_shards.push(BadShard { path, error, is_unread });
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
        let mut wrong: Vec<Wrong> = Vec::new();
        for id in (start..end).map(SampleId) {
            if let Err(error) = reader.decode(dataset, id) {
                let is_bad = error.is_bad_sample();
                wrong.push(Wrong { id, error: chain(&error), is_bad });
            }
        }
        let n = end - start;
        // The receiver outlives the threads; if it is gone, so is the interest in the result.
        if found.send(Found::Samples { n, wrong }).is_err() {
            return;
        }
    }
}

fn check_shards(dataset: &Dataset, next: &AtomicU64, found: &mpsc::SyncSender<Found>) {
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed) as usize;
        if number >= dataset.index().shards().len() {
            return;
        }
        let digest = dataset.shard_reader(number).and_then(digest);
        if found.send(Found::Shard { number, digest }).is_err() {
            return;
        }
    }
}

fn digest(shard: impl Read) -> io::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(shard)?;
    Ok(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests;
