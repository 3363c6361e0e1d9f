//! What a run's state is, and its digest.
//!
//! State = parameters, both AdamW moments, exponents and a few counters. The data position is
//! derived from the step.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::digest::Crc64;
use crate::model::ParamSpec;
use crate::reduce::{CHUNK_32, Reduction};

/// The trainable tensors of a model in canonical (sorted by name) order, laid out in one flat
/// buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    params: Vec<ParamSpec>,
    starts: Vec<usize>,
    /// Chunks of [`CHUNK_32`] elements before each tensor.
    chunks: Vec<usize>,
}

impl Layout {
    /// Lays `params` out one after another; they must be sorted by name.
    pub fn new(params: Vec<ParamSpec>) -> Arc<Self> {
        assert!(params.windows(2).all(|pair| pair[0].name < pair[1].name), "sorted, unique names");
        let (mut starts, mut chunks) = (vec![0], vec![0]);
        for (block, param) in params.iter().enumerate() {
            starts.push(starts[block] + param.numel());
            chunks.push(chunks[block] + param.numel().div_ceil(CHUNK_32));
        }
        Arc::new(Layout { params, starts, chunks })
    }

    /// Returns the tensors in canonical order.
    pub fn params(&self) -> &[ParamSpec] {
        &self.params
    }

    /// Returns the number of tensors.
    pub fn n_blocks(&self) -> usize {
        self.params.len()
    }

    /// Returns the elements of all tensors together.
    pub fn numel(&self) -> usize {
        self.starts[self.params.len()]
    }

    /// Returns the place of tensor `block` in the flat buffer.
    pub fn range(&self, block: usize) -> Range<usize> {
        self.starts[block]..self.starts[block + 1]
    }

    /// Returns the number of chunks of [`CHUNK_32`] elements of the tensors before `block`; with
    /// [`n_blocks`](Self::n_blocks), of all. No chunk spans tensors.
    pub fn first_chunk(&self, block: usize) -> usize {
        self.chunks[block]
    }

    /// Returns the index of the tensor named `name`.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.params.binary_search_by(|param| param.name.as_str().cmp(name)).ok()
    }
}

/// One of the three flat f32 buffers of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    /// Parameters.
    Param,
    /// First moments.
    ExpAvg,
    /// Second moments.
    ExpAvgSq,
}

impl Section {
    /// The sections in digest order.
    pub const ALL: [Section; 3] = [Section::Param, Section::ExpAvg, Section::ExpAvgSq];

    /// Returns the prefix of the section's tensors in checkpoints.
    pub fn prefix(self) -> &'static str {
        match self {
            Section::Param => "param",
            Section::ExpAvg => "adamw.exp_avg",
            Section::ExpAvgSq => "adamw.exp_avg_sq",
        }
    }
}

/// The part of a state that is not flat f32 buffers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Steps behind this state: the next step to compute.
    pub step: u64,
    /// Updates applied, AdamW's t; smaller than `step` after a skipped step.
    pub updates: u64,
    /// Fixed-point exponents, as many as the run's [`Reduction`] has.
    pub exponents: Vec<i32>,
    /// Number of changes of the exponents.
    pub exponent_version: u64,
    /// Steps skipped in a row, up to this state, because a gradient was not finite.
    pub non_finite_in_row: u32,
    /// Steps skipped in all because a gradient was not finite.
    pub non_finite: u64,
    /// Global batch from a step on, ascending by step.
    pub segments: Vec<Segment>,
}

/// From `step` on the global batch is `batch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// First step of the segment.
    pub step: u64,
    /// Samples of a step.
    pub batch: u32,
}

impl Counters {
    /// Returns the counters of a fresh run that sums with [`Reduction::Exact`].
    pub fn fresh(n_blocks: usize, batch: u32) -> Self {
        Counters {
            step: 0,
            updates: 0,
            exponents: vec![Reduction::Exact.exponent_start(); n_blocks],
            exponent_version: 0,
            non_finite_in_row: 0,
            non_finite: 0,
            segments: vec![Segment { step: 0, batch }],
        }
    }

    /// Returns the digest of the counters that count: exponents, t, step, little-endian.
    fn digest(&self) -> Crc64 {
        let mut bytes: Vec<u8> = self.exponents.iter().flat_map(|e| e.to_le_bytes()).collect();
        bytes.extend(self.updates.to_le_bytes());
        bytes.extend(self.step.to_le_bytes());
        Crc64::of(&bytes)
    }
}

/// Digests of one tensor's three sections, in [`Section::ALL`] order.
pub type TensorDigests = [Crc64; 3];

/// Combines tensor digests (canonical order) and counters into the digest of the state.
///
/// CRC-64/NVME over, by sorted name, param ‖ exp_avg ‖ exp_avg_sq, then exponents, t and step.
pub fn state_digest(tensors: &[TensorDigests], counters: &Counters) -> u64 {
    let tensors = tensors.iter().flatten().fold(Crc64::default(), |sum, next| sum.then(*next));
    tensors.then(counters.digest()).value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelConfig;

    #[test]
    fn digest_is_that_of_the_concatenation() {
        let layout = Layout::new(ModelConfig::preset("micro").unwrap().params());
        let values = |salt: f32| (0..layout.numel()).map(move |i| i as f32 + salt).collect();
        let sections: [Vec<f32>; 3] = [values(0.1), values(0.2), values(0.3)];
        let counters = Counters { step: 5, updates: 4, ..Counters::fresh(layout.n_blocks(), 32) };
        let mut bytes: Vec<u8> = Vec::new();
        let mut digests: Vec<TensorDigests> = Vec::new();
        for block in 0..layout.n_blocks() {
            let slice = |s: &Vec<f32>| Crc64::of_f32(&s[layout.range(block)]);
            digests.push([slice(&sections[0]), slice(&sections[1]), slice(&sections[2])]);
            for section in &sections {
                bytes.extend(section[layout.range(block)].iter().flat_map(|x| x.to_le_bytes()));
            }
        }
        bytes.extend(counters.exponents.iter().flat_map(|e| e.to_le_bytes()));
        bytes.extend(4u64.to_le_bytes());
        bytes.extend(5u64.to_le_bytes());
        assert_eq!(state_digest(&digests, &counters), Crc64::of(&bytes).value);
    }

    #[test]
    fn tensors_are_found_by_name() {
        let layout = Layout::new(ModelConfig::preset("demo").unwrap().params());
        let at = layout.find("norm.weight").unwrap();
        assert_eq!(layout.params()[at].name, "norm.weight");
        assert_eq!(layout.range(at).len(), 192);
        assert_eq!(layout.find("pos_embed"), None);
    }
}
