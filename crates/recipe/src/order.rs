//! The global order of an epoch: which sample stands at which position. A pure function.
//!
//! A *position* is a place of the epoch's order; [`Geometry::positions`](crate::step::Geometry)
//! says which positions a slot has. Three modes:
//!
//! - `global`: one permutation of all samples. Truly uniform; reads are random.
//! - `block`: chunks (runs of consecutive samples of one shard) are shuffled, the result is cut
//!   into K lanes, and inside a lane blocks of about S samples are permuted. Reads stay near each
//!   other; K · S samples are mixed at a time. Sample s of a batch belongs to lane s / (batch / K),
//!   so a worker's neighbouring slots read few lanes.
//! - `sequential`: the order of the index, for tests and evaluation.
//!
//! Every mode maps the positions `0..N` one to one onto the samples. An epoch uses the positions
//! below `floor(N / batch) · batch`; in block mode every lane is long enough for that, because
//! `floor(N / batch) · batch / K` is a whole number that is at most `N / K`, hence at most
//! `floor(N / K)`, the length of the shortest lane.

mod chunk_steps;

use std::ops::Range;
use std::sync::Arc;

use lacuna_types::SampleId;
use serde::{Deserialize, Serialize};

pub use self::chunk_steps::ChunkSteps;
use crate::philox::{Draws, Tag};
use crate::prp::{N_MAX, Prp, shuffle};

/// Version of the order; raised when the same parameters would give another one.
pub const ORDER_VERSION: u32 = 1;

/// Data sets of this many samples or more get block mode by default: a permutation of all of them
/// means one random read a sample, which only local memory or flash serves.
pub const GLOBAL_SAMPLES_MAX: u64 = 100_000_000;

/// Largest default number of lanes.
pub const LANES_DEFAULT_MAX: u32 = 256;

/// Largest number of lanes: the address of a block's permutation has 16 bits for its lane.
pub const LANES_MAX: u32 = 1 << 16;

/// Samples that block mode mixes at a time, over all lanes: 29 GB of 110 KB files over the cluster.
const MIXED_SAMPLES: u64 = 1 << 18;

/// Most chunks: a shuffle has 2^26 words.
const CHUNKS_MAX: usize = 1 << 26;

/// How samples are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OrderMode {
    /// Chunks shuffled, lanes, blocks permuted.
    Block,
    /// One permutation of all samples.
    Global,
    /// The order of the index.
    Sequential,
}

/// What decides an order besides seed and data: fixed when a run is created, stored with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OrderParams {
    /// How samples are ordered.
    pub mode: OrderMode,
    /// K, the lanes of block mode; divides the batch.
    pub lanes: u32,
    /// S, the samples of a block of block mode; blocks of one lane differ by at most one.
    pub block: u64,
}

impl OrderParams {
    /// Returns the parameters a run gets where its spec says nothing.
    pub fn default_for(n_samples: u64, n_chunks: u64, batch: u32) -> Self {
        let lanes = default_lanes(batch);
        OrderParams {
            mode: default_mode(n_samples),
            lanes,
            block: default_block(n_samples, n_chunks, lanes),
        }
    }
}

/// Returns the default mode: `global` below [`GLOBAL_SAMPLES_MAX`] samples, `block` from there on.
pub fn default_mode(n_samples: u64) -> OrderMode {
    if n_samples < GLOBAL_SAMPLES_MAX { OrderMode::Global } else { OrderMode::Block }
}

/// Returns the default K: the largest power of two up to 256 that divides `batch`.
pub fn default_lanes(batch: u32) -> u32 {
    assert!(batch > 0, "a batch has samples");
    (1 << batch.trailing_zeros()).min(LANES_DEFAULT_MAX)
}

/// Returns the default S: four chunks of mean size, or 2^18 / K samples where that is more.
pub fn default_block(n_samples: u64, n_chunks: u64, lanes: u32) -> u64 {
    let chunk: u64 = n_samples.div_ceil(n_chunks.max(1));
    chunk.saturating_mul(4).max(MIXED_SAMPLES / u64::from(lanes.max(1)))
}

/// Everything that decides the orders of all epochs of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrderSpec {
    /// Mode, lanes and block size.
    pub params: OrderParams,
    /// Seed of the run.
    pub seed: u64,
    /// Samples of a step; decides which lane a position of block mode belongs to.
    pub batch: u32,
    /// First sample of each chunk, and last the number of samples.
    pub chunk_bounds: Arc<[u64]>,
}

/// Parameters that give no order.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// The lanes do not divide the batch.
    #[error("`lanes` = {lanes} must divide `batch` = {batch} and be 1 to {LANES_MAX}")]
    Lanes {
        /// Lanes asked for.
        lanes: u32,
        /// Samples of a step.
        batch: u32,
    },
    /// A block without samples, or so small that its number does not fit.
    #[error("`block` = {block} gives no block or more than 2^32 blocks in a lane")]
    Block {
        /// Block size asked for.
        block: u64,
    },
    /// The bounds are not `0 < … < N`.
    #[error("chunk bound {at} is {value}: bounds must start at 0 and rise to at most 2^48")]
    Bounds {
        /// Index of the offending bound.
        at: usize,
        /// Its value.
        value: u64,
    },
    /// Too few or too many chunks.
    #[error("{n_chunks} chunks: the data needs 1 to {CHUNKS_MAX}")]
    Chunks {
        /// Chunks given.
        n_chunks: usize,
    },
}

impl OrderSpec {
    /// Returns the number of samples.
    pub fn n_samples(&self) -> u64 {
        self.chunk_bounds.last().copied().unwrap_or(0)
    }

    /// Checks that every epoch has an order.
    pub fn check(&self) -> Result<(), OrderError> {
        let OrderParams { lanes, block, .. } = self.params;
        let batch = self.batch;
        if !(1..=LANES_MAX).contains(&lanes) || batch == 0 || !batch.is_multiple_of(lanes) {
            return Err(OrderError::Lanes { lanes, batch });
        }
        let bounds = &self.chunk_bounds;
        if !(2..=CHUNKS_MAX + 1).contains(&bounds.len()) {
            let n_chunks = bounds.len().saturating_sub(1);
            return Err(OrderError::Chunks { n_chunks });
        }
        let wrong = (0..bounds.len()).find(|&at| match at {
            0 => bounds[0] != 0,
            _ => bounds[at] <= bounds[at - 1] || bounds[at] > N_MAX,
        });
        if let Some(at) = wrong {
            let value = bounds[at];
            return Err(OrderError::Bounds { at, value });
        }
        if block == 0 || self.n_samples() / block >= u64::from(u32::MAX) {
            return Err(OrderError::Block { block });
        }
        Ok(())
    }

    /// Returns the steps of an epoch, `floor(N / batch)` in every mode.
    pub fn steps_per_epoch(&self) -> u64 {
        self.n_samples() / u64::from(self.batch)
    }

    /// Returns the samples of the chunk that holds `sample`.
    pub fn chunk_of(&self, sample: SampleId) -> Range<u64> {
        assert!(sample.0 < self.n_samples(), "sample {sample} is in the data");
        let after = self.chunk_bounds.partition_point(|&bound| bound <= sample.0);
        self.chunk_bounds[after - 1]..self.chunk_bounds[after]
    }
}

/// What an address under [`Tag::Order`] is for; stored in the counter's occurrence field.
#[derive(Clone, Copy)]
#[repr(u16)]
enum Purpose {
    Global = 0,
    Chunks = 1,
    Block = 2,
    Substitute = 3,
    Beyond = 4,
}

fn draws(seed: u64, epoch: u32, purpose: Purpose, address: u64) -> Draws {
    Draws::new(seed, Tag::Order, epoch, address).occurrence(purpose as u16)
}

/// Chooses a stand-in for a bad `sample`: for attempts 0, 1, … each other sample of its chunk once,
/// and then each of the other chunks. `chunk` comes with the number of all samples.
///
/// Returns `None` when there is no further sample.
///
/// # Panics
/// If the chunk does not hold the sample, or is no part of the data set.
pub fn substitute(
    seed: u64,
    epoch: u32,
    sample: SampleId,
    (chunk, n_samples): (Range<u64>, u64),
    attempt: u64,
) -> Option<SampleId> {
    assert!(chunk.contains(&sample.0), "the chunk holds the sample");
    assert!(chunk.end <= n_samples, "the chunk is a part of the data set");
    let n_others: u64 = chunk.end - chunk.start - 1;
    if let Some(beyond) = attempt.checked_sub(n_others) {
        // A chunk may hold one sample alone: a shard's last one, or a large image.
        let n_beyond = n_samples - (chunk.end - chunk.start);
        if beyond >= n_beyond {
            return None;
        }
        let prp = Prp::new(&draws(seed, epoch, Purpose::Beyond, sample.0), n_beyond);
        let other = prp.at(beyond);
        return Some(SampleId(if other < chunk.start { other } else { other + n_others + 1 }));
    }
    let prp = Prp::new(&draws(seed, epoch, Purpose::Substitute, sample.0), n_others);
    let other = chunk.start + prp.at(attempt);
    Some(SampleId(other + u64::from(other >= sample.0)))
}

/// The order of one epoch.
#[derive(Clone, Debug)]
pub struct EpochOrder {
    seed: u64,
    epoch: u32,
    n_samples: u64,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Sequential,
    Global(Prp),
    Block(Lanes),
}

/// Block mode's shuffled chunks, cut into lanes.
#[derive(Clone, Debug)]
struct Lanes {
    lanes: u64,
    block: u64,
    /// Samples of a lane in one step.
    per_step: u64,
    /// Positions of an epoch's whole steps.
    used: u64,
    /// The chunks in the shuffled order.
    chunks: Vec<u32>,
    /// Place of the first sample of every [`PLACES_STRIDE`]th of them; ascending.
    places: Vec<u64>,
    /// First sample of each chunk, by its number, and last the number of samples.
    bounds: Arc<[u64]>,
}

/// Of so many chunks one has its place stored: half the memory for at most one more step.
const PLACES_STRIDE: usize = 2;

/// A block's samples in the shuffled data, and their permutation.
struct Block {
    lane: u64,
    index: u64,
    start: u64,
    prp: Prp,
}

impl EpochOrder {
    /// Computes the order of `epoch`; takes time in proportion to the chunks, not to the samples.
    ///
    /// # Panics
    /// Where [`OrderSpec::check`] fails.
    pub fn new(spec: &OrderSpec, epoch: u32) -> Self {
        if let Err(error) = spec.check() {
            panic!("an order was asked for unchecked parameters: {error}");
        }
        let n_samples = spec.n_samples();
        let kind = match spec.params.mode {
            OrderMode::Sequential => Kind::Sequential,
            OrderMode::Global => {
                Kind::Global(Prp::new(&draws(spec.seed, epoch, Purpose::Global, 0), n_samples))
            }
            OrderMode::Block => Kind::Block(Lanes::new(spec, epoch)),
        };
        EpochOrder { seed: spec.seed, epoch, n_samples, kind }
    }

    /// Returns the epoch.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Returns the sample at `position` (below the number of samples).
    pub fn sample_at(&self, position: u64) -> SampleId {
        self.sample(position, &mut None)
    }

    /// Returns the samples at `positions`; faster than one by one in block mode.
    pub fn samples(&self, positions: Range<u64>) -> Vec<SampleId> {
        let mut block: Option<Block> = None;
        positions.map(|p| self.sample(p, &mut block)).collect()
    }

    fn sample(&self, position: u64, block: &mut Option<Block>) -> SampleId {
        assert!(
            position < self.n_samples,
            "position {position} lies outside an epoch of {} samples",
            self.n_samples
        );
        match &self.kind {
            Kind::Sequential => SampleId(position),
            Kind::Global(prp) => SampleId(prp.at(position)),
            Kind::Block(lanes) => {
                let (lane, i) = lanes.locate(position, self.n_samples);
                let place = self.place(lanes, lane, i, block);
                SampleId(lanes.sample_of(place))
            }
        }
    }

    /// Returns the place in the shuffled data of the `i`-th sample that `lane` delivers.
    fn place(&self, lanes: &Lanes, lane: u64, i: u64, cached: &mut Option<Block>) -> u64 {
        let lane_start = lanes.start(lane, self.n_samples);
        let length = lanes.start(lane + 1, self.n_samples) - lane_start;
        // Blocks of nearly equal size: a short last one would hardly be mixed.
        let n_blocks = (length / lanes.block).max(1);
        let index = cut_of(i, length, n_blocks);
        if !matches!(cached, Some(block) if (block.lane, block.index) == (lane, index)) {
            let start = cut(length, index, n_blocks);
            let n = cut(length, index + 1, n_blocks) - start;
            let address = draws(self.seed, self.epoch, Purpose::Block, lane << 32 | index);
            let prp = Prp::new(&address, n);
            let start = lane_start + start;
            *cached = Some(Block { lane, index, start, prp });
        }
        let block = cached.as_ref().expect("filled above");
        block.start + block.prp.at(lane_start + i - block.start)
    }
}

impl Lanes {
    fn new(spec: &OrderSpec, epoch: u32) -> Self {
        let bounds = &spec.chunk_bounds;
        let n_chunks = u32::try_from(bounds.len() - 1).expect("checked: chunks fit");
        let chunks = shuffle(&draws(spec.seed, epoch, Purpose::Chunks, 0), n_chunks);
        let mut places: Vec<u64> = Vec::with_capacity(chunks.len().div_ceil(PLACES_STRIDE));
        let mut place: u64 = 0;
        for (nth, &chunk) in chunks.iter().enumerate() {
            if nth % PLACES_STRIDE == 0 {
                places.push(place);
            }
            place += bounds[chunk as usize + 1] - bounds[chunk as usize];
        }
        let lanes = u64::from(spec.params.lanes);
        Lanes {
            lanes,
            block: spec.params.block,
            per_step: u64::from(spec.batch) / lanes,
            used: spec.steps_per_epoch() * u64::from(spec.batch),
            chunks,
            places,
            bounds: bounds.clone(),
        }
    }

    /// Returns the first place of `lane` in the shuffled data.
    fn start(&self, lane: u64, n_samples: u64) -> u64 {
        cut(n_samples, lane, self.lanes)
    }

    /// Returns the lane of a position and how many samples the lane delivers before it.
    fn locate(&self, position: u64, n_samples: u64) -> (u64, u64) {
        if position < self.used {
            let batch = self.per_step * self.lanes;
            let (step, place) = (position / batch, position % batch);
            return (place / self.per_step, step * self.per_step + place % self.per_step);
        }
        // The tail that fills no step: what the lanes have left, lane after lane.
        let delivered = self.used / self.lanes;
        let left_before = |lane: u64| self.start(lane, n_samples) - lane * delivered;
        let tail = position - self.used;
        let mut low = 0;
        let mut high = self.lanes;
        while high - low > 1 {
            let middle = (low + high) / 2;
            if left_before(middle) <= tail {
                low = middle;
            } else {
                high = middle;
            }
        }
        (low, delivered + tail - left_before(low))
    }

    /// Returns the sample at a place of the shuffled data.
    fn sample_of(&self, place: u64) -> u64 {
        let known = self.places.partition_point(|&start| start <= place) - 1;
        let mut offset = place - self.places[known];
        let mut nth = known * PLACES_STRIDE;
        loop {
            let chunk = self.chunks[nth] as usize;
            let (first, end) = (self.bounds[chunk], self.bounds[chunk + 1]);
            if offset < end - first {
                return first + offset;
            }
            offset -= end - first;
            nth += 1;
        }
    }
}

/// Returns where piece `index` starts when `length` is cut into `pieces` nearly equal pieces.
fn cut(length: u64, index: u64, pieces: u64) -> u64 {
    (u128::from(length) * u128::from(index) / u128::from(pieces)) as u64
}

/// Returns the piece that holds `i`: the last one that starts at or before it.
fn cut_of(i: u64, length: u64, pieces: u64) -> u64 {
    (((u128::from(i) + 1) * u128::from(pieces) - 1) / u128::from(length)) as u64
}

#[cfg(test)]
mod tests;
