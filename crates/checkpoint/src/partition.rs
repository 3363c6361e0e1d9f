//! Who writes what: the flat state cut into one contiguous range per rank.
//!
//! The state is replicated; the partition is for writing only. Every rank writes at most one slice
//! of any tensor, and 1/N of the bytes.

use std::ops::Range;

use lacuna_recipe::state::Layout;

/// Name of this rule in manifests.
pub const PARTITION: &str = "flat/1024";

/// Elements that a boundary between ranks is a multiple of: one page of f32.
const GRAIN: usize = 1024;

/// Elements of one tensor of a section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceSpec {
    /// Tensor, by its place in the layout.
    pub block: usize,
    /// Elements of the tensor.
    pub range: Range<usize>,
}

/// The flat buffer of a layout cut for a number of writers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    bounds: Vec<usize>,
    slices: Vec<Vec<SliceSpec>>,
}

impl Partition {
    /// Cuts `layout` for `world` writers, of which the last ones may get nothing.
    pub fn new(layout: &Layout, world: u32) -> Self {
        assert!(world > 0, "a checkpoint has a writer");
        let total = layout.numel();
        let bound = |rank: u32| {
            let even = (total as u128 * u128::from(rank) / u128::from(world)) as usize;
            even.next_multiple_of(GRAIN).min(total)
        };
        let bounds: Vec<usize> = (0..=world).map(bound).collect();
        let mut slices: Vec<Vec<SliceSpec>> =
            bounds.windows(2).map(|pair| slices_of(layout, pair[0]..pair[1])).collect();
        // Tensors without elements lie in no range; the first rank names them.
        let empty = (0..layout.n_blocks()).filter(|block| layout.range(*block).is_empty());
        slices[0].extend(empty.map(|block| SliceSpec { block, range: 0..0 }));
        slices[0].sort_by_key(|slice| slice.block);
        Partition { bounds, slices }
    }

    /// Returns the number of writers.
    pub fn world(&self) -> u32 {
        self.slices.len() as u32
    }

    /// Returns the elements of the flat buffer that `rank` writes.
    pub fn range(&self, rank: u32) -> Range<usize> {
        self.bounds[rank as usize]..self.bounds[rank as usize + 1]
    }

    /// Returns the same, tensor by tensor; it holds for each of the three sections.
    pub fn rank_slices(&self, rank: u32) -> &[SliceSpec] {
        &self.slices[rank as usize]
    }
}

fn slices_of(layout: &Layout, range: Range<usize>) -> Vec<SliceSpec> {
    let cut = |block: usize| {
        let tensor = layout.range(block);
        let (start, end) = (tensor.start.max(range.start), tensor.end.min(range.end));
        (start < end).then(|| SliceSpec { block, range: start - tensor.start..end - tensor.start })
    };
    (0..layout.n_blocks()).filter_map(cut).collect()
}

/// Assigns tensors that are written whole: the largest first, each to the least loaded rank.
///
/// Returns the rank of each entry of `bytes`. Among equal ranks the lowest wins.
pub fn assign_leftovers(bytes: &[u64], world: u32) -> Vec<u32> {
    let mut order: Vec<usize> = (0..bytes.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(bytes[i]), i));
    let mut loads: Vec<u64> = vec![0; world as usize];
    let mut out: Vec<u32> = vec![0; bytes.len()];
    for i in order {
        let rank = (0..loads.len()).min_by_key(|&rank| loads[rank]).expect("at least one rank");
        loads[rank] += bytes[i];
        out[i] = rank as u32;
    }
    out
}

#[cfg(test)]
mod tests;
