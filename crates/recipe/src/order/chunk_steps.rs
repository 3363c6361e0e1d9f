//! When the chunks of an epoch are read: the order, looked at from the data's side.

use std::iter;
use std::ops::Range;

use super::{EpochOrder, Kind, Lanes, OrderSpec, PLACES_STRIDE, cut, cut_of};

/// The steps of one epoch that may read each chunk; what a cache evicts and fetches by.
#[derive(Clone, Debug)]
pub struct ChunkSteps {
    order: EpochOrder,
    batch: u64,
    n_steps: u64,
    bounds: std::sync::Arc<[u64]>,
    /// In block mode, the place of each chunk among the shuffled ones.
    nth: Vec<u32>,
}

impl ChunkSteps {
    /// Computes the order of `epoch`, from its data's side.
    ///
    /// # Panics
    /// Where [`OrderSpec::check`] fails.
    pub fn new(spec: &OrderSpec, epoch: u32) -> Self {
        let order = EpochOrder::new(spec, epoch);
        let mut nth: Vec<u32> = Vec::new();
        if let Kind::Block(lanes) = &order.kind {
            nth.resize(lanes.chunks.len(), 0);
            for (place, &chunk) in (0u32..).zip(&lanes.chunks) {
                nth[chunk as usize] = place;
            }
        }
        ChunkSteps {
            order,
            batch: spec.batch.into(),
            n_steps: spec.steps_per_epoch(),
            bounds: spec.chunk_bounds.clone(),
            nth,
        }
    }

    /// Returns the epoch.
    pub fn epoch(&self) -> u32 {
        self.order.epoch
    }

    /// Returns the steps within the epoch that may read chunk number `chunk`: no other step does,
    /// and the first and the last of each range belong to a block that the chunk is part of.
    ///
    /// There is a range for each lane that holds some of the chunk; empty ones, of samples that the
    /// epoch drops, are left out.
    pub fn steps(&self, chunk: usize) -> Vec<Range<u64>> {
        let samples = self.bounds[chunk]..self.bounds[chunk + 1];
        let ranges: Vec<Range<u64>> = match &self.order.kind {
            Kind::Global(_) => iter::once(0..self.n_steps).collect(),
            Kind::Sequential => {
                iter::once(samples.start / self.batch..samples.end.div_ceil(self.batch)).collect()
            }
            Kind::Block(lanes) => {
                let start = lanes.place_of(self.nth[chunk] as usize);
                let places = start..start + (samples.end - samples.start);
                lanes.steps_of(places, self.order.n_samples)
            }
        };
        let whole = |range: Range<u64>| range.start..range.end.min(self.n_steps);
        ranges.into_iter().map(whole).filter(|range| !range.is_empty()).collect()
    }

    /// Returns the first step within the epoch, from `now` on, that may read a chunk.
    pub fn next(&self, chunk: usize, now: u64) -> Option<u64> {
        let ahead = self.steps(chunk).into_iter().filter(|range| range.end > now);
        ahead.map(|range| range.start.max(now)).min()
    }
}

impl Lanes {
    /// Returns the place of the first sample of the `nth` of the shuffled chunks.
    fn place_of(&self, nth: usize) -> u64 {
        let known = nth / PLACES_STRIDE;
        let size = |&chunk: &u32| self.bounds[chunk as usize + 1] - self.bounds[chunk as usize];
        let between = &self.chunks[known * PLACES_STRIDE..nth];
        self.places[known] + between.iter().map(size).sum::<u64>()
    }

    /// Returns the steps of the blocks that places of the shuffled data belong to, lane by lane.
    fn steps_of(&self, places: Range<u64>, n_samples: u64) -> Vec<Range<u64>> {
        let first = cut_of(places.start, n_samples, self.lanes);
        let last = cut_of(places.end - 1, n_samples, self.lanes);
        let lane = |lane: u64| {
            let (start, end) = (self.start(lane, n_samples), self.start(lane + 1, n_samples));
            let length = end - start;
            let n_blocks = (length / self.block).max(1);
            let from = cut_of(places.start.max(start) - start, length, n_blocks);
            let to = cut_of(places.end.min(end) - 1 - start, length, n_blocks);
            let (from, to) = (cut(length, from, n_blocks), cut(length, to + 1, n_blocks));
            from / self.per_step..to.div_ceil(self.per_step)
        };
        (first..=last)
            .filter(|&l| self.start(l, n_samples) < self.start(l + 1, n_samples))
            .map(lane)
            .collect()
    }
}
