//! Image shards: pack, index, decode, augment, prefetch.
//!
//! Turns files of images into plain batches of bytes. Which sample stands where, how it is cropped
//! and masked is decided by `lacuna-recipe`; this crate reads, decodes and resizes. There are no
//! tensors here, no child processes, no shared memory and no state outside the values below.
//!
//! Start reading at [`loader`] (what training uses), then [`dataset`] and [`index`] (what is on
//! disk) and [`pack`] (how a data set comes to be). Of other programs' shards, [`wds`] and [`mds`]
//! are used as they are, and [`mds`] and [`parquet`] repacked. Bytes become pixels in
//! `lacuna-pixels`.
#![forbid(unsafe_code)]

pub mod bad;
pub mod chunks;
pub mod dataset;
pub mod exclude;
mod files;
pub mod idx;
pub mod index;
pub mod loader;
pub mod mds;
pub mod pack;
pub mod parquet;
pub mod planes;
pub mod reader;
pub mod simulate;
pub mod stages;
pub mod stats;
pub mod synthetic;
pub mod verify;
pub mod wds;

pub use dataset::{Access, Dataset};
pub use lacuna_pixels::{DECODER_ID, ImageShape, SHAPE_SIDE_MAX, probe_pixels};
pub use lacuna_store::{Limits, Stop, Store, is_url};
pub use loader::{Loader, LoaderConfig, SlotStream};
pub use reader::{SampleError, SampleReader};

/// How far a long operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Units (samples, or shards where the function says so) behind it.
    pub done: u64,
    /// Units in all.
    pub total: u64,
}

/// Told about progress now and then; called from the thread that called the operation.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress);

/// A file or member that was left out, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Path of the file, or shard and member.
    pub place: String,
    /// Why it is no sample.
    pub reason: String,
}

/// Left-out files that are listed; the others are only counted.
pub const SKIPPED_LISTED_MAX: usize = 100;

/// What an operation left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SkipList {
    /// How many were left out.
    pub n: u64,
    /// The first [`SKIPPED_LISTED_MAX`] of them.
    pub first: Vec<Skipped>,
}

impl SkipList {
    pub(crate) fn push(&mut self, place: impl Into<String>, reason: impl Into<String>) {
        self.n += 1;
        if self.first.len() < SKIPPED_LISTED_MAX {
            self.first.push(Skipped { place: place.into(), reason: reason.into() });
        }
    }

    pub(crate) fn extend(&mut self, other: SkipList) {
        self.n += other.n;
        let room = SKIPPED_LISTED_MAX - self.first.len();
        self.first.extend(other.first.into_iter().take(room));
    }
}

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod hostile;
