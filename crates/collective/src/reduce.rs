//! Sums of received chunks, in rank order.

use bytemuck::Pod;

/// An element that can be summed.
pub(crate) trait Lane: Pod {
    fn plus(self, other: Self) -> Self;
}

impl Lane for i64 {
    // Wrapping: values come from other machines and must not panic here. The caller's bound on
    // each contribution keeps sums inside the range.
    fn plus(self, other: Self) -> Self {
        self.wrapping_add(other)
    }
}

impl Lane for i32 {
    fn plus(self, other: Self) -> Self {
        self.wrapping_add(other)
    }
}

impl Lane for f32 {
    fn plus(self, other: Self) -> Self {
        self + other
    }
}

/// A [`sum_in_rank_order`] with its element type erased.
pub(crate) type ReduceFn = fn(own: &mut [u8], slots: &mut [u8], stride: usize, n_before: usize);

/// Replaces `own` by the sum of all ranks' chunks, added in the order of the ranks.
///
/// `slots` holds the other ranks' chunks in rank order, one every `stride` bytes; the first
/// `n_before` of them belong to ranks below this one. The first slot is used as the accumulator.
///
/// # Panics
/// If a length, offset or address is no multiple of the element: the engine cuts on elements.
pub(crate) fn sum_in_rank_order<T: Lane>(
    own: &mut [u8],
    slots: &mut [u8],
    stride: usize,
    n_before: usize,
) {
    let n_bytes: usize = own.len();
    let own: &mut [T] = bytemuck::cast_slice_mut(own);
    let (before, after) = slots.split_at_mut(stride * n_before);
    if !before.is_empty() {
        let (first, rest) = before.split_at_mut(stride);
        let first: &mut [T] = bytemuck::cast_slice_mut(&mut first[..n_bytes]);
        for slot in rest.chunks_exact(stride) {
            add(first, bytemuck::cast_slice(&slot[..n_bytes]));
        }
        // IEEE addition commutes, so `own + first` is `first + own`.
        add(own, first);
    }
    for slot in after.chunks_exact(stride) {
        add(own, bytemuck::cast_slice(&slot[..n_bytes]));
    }
}

fn add<T: Lane>(sum: &mut [T], addend: &[T]) {
    for (left, right) in sum.iter_mut().zip(addend) {
        *left = left.plus(*right);
    }
}

#[cfg(test)]
mod tests;
