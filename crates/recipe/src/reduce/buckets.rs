//! Where a step's sums lie: in buckets that are summed over the ranks one after another, in the
//! order in which backward passes complete them.

use std::ops::Range;

use super::Reduction;
use crate::state::Layout;

/// The places of the tensors in buckets. Every rank of a group has the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buckets {
    /// Of each tensor.
    places: Vec<(usize, Range<usize>)>,
    /// Elements of each bucket.
    lengths: Vec<usize>,
    /// Tensors of each bucket.
    n_tensors: Vec<usize>,
}

impl Buckets {
    /// Fills buckets with the tensors of `layout`, in the given order. A bucket is closed before it
    /// holds more than `elements_max`; a larger tensor has one of its own.
    ///
    /// # Panics
    /// If `order` does not list each tensor once.
    pub fn new(layout: &Layout, order: &[usize], elements_max: usize) -> Self {
        let mut places: Vec<Option<(usize, Range<usize>)>> = vec![None; layout.n_blocks()];
        let (mut lengths, mut n_tensors) = (Vec::new(), Vec::new());
        for &block in order {
            let n = layout.range(block).len();
            if lengths.last().is_none_or(|length: &usize| length.saturating_add(n) > elements_max) {
                lengths.push(0);
                n_tensors.push(0);
            }
            let bucket = lengths.len() - 1;
            let start = lengths[bucket];
            let before = places[block].replace((bucket, start..start + n));
            assert!(before.is_none(), "tensor {block} is listed twice");
            lengths[bucket] += n;
            n_tensors[bucket] += 1;
        }
        let places = places.into_iter().map(|place| place.expect("each tensor is listed"));
        Buckets { places: places.collect(), lengths, n_tensors }
    }

    /// Returns the bucket of tensor `block`, and its elements there.
    pub fn place(&self, block: usize) -> (usize, Range<usize>) {
        self.places[block].clone()
    }

    /// Copies bucket `bucket` out of sums in the layout's order.
    pub fn gather(&self, layout: &Layout, bucket: usize, sums: &[i64]) -> Vec<i64> {
        let mut part: Vec<i64> = vec![0; self.lengths[bucket]];
        for (block, (of, to)) in self.places.iter().enumerate() {
            if *of == bucket {
                part[to.clone()].copy_from_slice(&sums[layout.range(block)]);
            }
        }
        part
    }

    /// Copies bucket `bucket` to its places among sums in the layout's order.
    pub fn scatter(&self, layout: &Layout, bucket: usize, part: &[i64], sums: &mut [i64]) {
        for (block, (of, from)) in self.places.iter().enumerate() {
            if *of == bucket {
                sums[layout.range(block)].copy_from_slice(&part[from.clone()]);
            }
        }
    }

    /// Returns the elements of each bucket.
    pub fn lengths(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.lengths.iter().copied()
    }

    /// Returns the number of tensors of each bucket.
    pub fn n_tensors(&self) -> &[usize] {
        &self.n_tensors
    }
}

/// Numbers that are summed over the ranks in one operation.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// Of [`Reduction::Exact`], and the control word.
    I64(Vec<i64>),
    /// Of [`Reduction::Exact32`].
    I32(Vec<i32>),
    /// Of [`Reduction::Fast`].
    F32(Vec<f32>),
}

impl Default for Part {
    /// The empty part, which stands where one was taken.
    fn default() -> Self {
        Part::I64(Vec::new())
    }
}

impl Part {
    pub(super) fn zeros(reduction: Reduction, n: usize) -> Self {
        match reduction {
            Reduction::Exact => Part::I64(vec![0; n]),
            Reduction::Exact32 => Part::I32(vec![0; n]),
            Reduction::Fast => Part::F32(vec![0.0; n]),
        }
    }

    /// Makes `n` zeros of it, in the memory that it has where that is of the kind.
    pub(super) fn reset(&mut self, reduction: Reduction, n: usize) {
        match (&mut *self, reduction) {
            (Part::I64(sums), Reduction::Exact) if sums.len() == n => sums.fill(0),
            (Part::I32(sums), Reduction::Exact32) if sums.len() == n => sums.fill(0),
            (Part::F32(sums), Reduction::Fast) if sums.len() == n => sums.fill(0.0),
            _ => *self = Part::zeros(reduction, n),
        }
    }

    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        match self {
            Part::I64(sums) => sums.len(),
            Part::I32(sums) => sums.len(),
            Part::F32(sums) => sums.len(),
        }
    }

    /// Tells whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
