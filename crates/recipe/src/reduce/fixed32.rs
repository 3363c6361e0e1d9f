//! Fixed point of 32 bits with one exponent every [`CHUNK`] elements of a tensor.
//!
//! An exponent follows the average over slots of the largest magnitude that a slot had in the
//! chunk, and not that of their sum: noisy slots cancel. Those magnitudes are integers too and are
//! summed beside the gradients, so everybody agrees on them without an
//! operation of another kind.

use super::{MAGIC, Quantised, exp2, max_abs};
use crate::state::Layout;

/// Elements that share an exponent: few enough to be of one magnitude, and so many that the
/// exponents of a billion parameters fit in a message.
pub const CHUNK: usize = 2048;
/// Exponent before the first step, which only measures.
pub(super) const START: i32 = 20;
/// How far exponents fall after an overflow: as much again as the room that they have had.
pub(super) const BACK_OFF: i32 = HEADROOM_BITS;
/// Bits of a slot's average largest magnitude, before the slots' share. The sum has 31, and a slot
/// may be [`HEADROOM_BITS`] above the average before it overflows.
/// No more than [`FLOAT_BITS`], which are all that a gradient has.
pub(super) const TARGET_BITS: i32 = 31 - 1 - HEADROOM_BITS;
/// An exponent rises by a bit at most, in one step of so many: it remembers how noisy a chunk is.
pub(super) const RISE_EVERY: u64 = 64;
/// What a slot that overflows adds to the peak of its chunk. All peaks together stay below.
const OVERFLOW: i64 = 1 << 48;
/// Where the exponent of a chunk without any gradient rises to: gradients of 2^-15 that come all at
/// once cost few steps that are computed again.
pub(super) const UNSEEN_MAX: i32 = 44;
/// Bits by which peaks are finer than sums: a chunk whose gradients all round to zero is measured
/// still, and its exponent follows.
pub(super) const PEAK_BITS: i32 = 16;
/// Bits of an f32's mantissa.
pub(super) const FLOAT_BITS: i32 = 24;
/// Growth from one step to the next, in bits, that fits in any case.
const HEADROOM_BITS: i32 = 5;
/// Largest magnitude that the sum over all slots may reach, and one more.
const SUM_END: u32 = 1 << 31;

/// Returns the number of exponents of a layout.
pub(super) fn n_chunks(layout: &Layout) -> usize {
    first_chunk(layout, layout.n_blocks())
}

/// Returns the number of exponents of the tensors before `block`.
pub(super) fn first_chunk(layout: &Layout, block: usize) -> usize {
    layout.first_chunk(block)
}

/// Largest magnitude of one element of one slot, in units of its exponent: the sum over all slots
/// stays below 2^31.
pub(super) fn slot_limit(n_slots: u32) -> i32 {
    ((SUM_END - 1) / n_slots) as i32
}

/// Adds `round_ties_even(f64(g) · 2^exponent)` of each gradient to its sum, and the largest of each
/// chunk, in units 2^[`PEAK_BITS`] finer, to its peak. `exponents` and `peaks` start with those of
/// the tensor.
pub(super) fn add(
    grad: &[f32],
    exponents: &[i32],
    limit: i32,
    sums: &mut [i32],
    peaks: &mut [i64],
) -> Quantised {
    assert_eq!(grad.len(), sums.len(), "one sum per element");
    let mut worst = Quantised::Fine;
    let chunks = grad.chunks(CHUNK).zip(sums.chunks_mut(CHUNK));
    for ((grad, sums), (exponent, peak)) in chunks.zip(exponents.iter().zip(peaks)) {
        let max = max_abs(grad);
        if !max.is_finite() {
            return Quantised::NonFinite;
        }
        let scale = exp2(*exponent);
        let reach = f64::from(max) * scale;
        if reach.round_ties_even() > f64::from(limit) {
            worst = Quantised::Overflow;
            *peak = peak.wrapping_add(OVERFLOW);
            continue;
        }
        *peak += (reach * exp2(PEAK_BITS)).round_ties_even() as i64;
        for (sum, g) in sums.iter_mut().zip(grad) {
            // The low half of MAGIC's bits is zero, so that of the sum is the integer.
            *sum = sum.wrapping_add((f64::from(*g) * scale + MAGIC).to_bits() as i32);
        }
    }
    worst
}

/// Returns the sum of the slots' peaks, without marks of overflow.
pub(super) fn magnitude(peak: i64) -> f64 {
    (peak & (OVERFLOW - 1)) as f64
}

/// Tells whether a slot has overflowed.
pub(super) fn is_marked(peak: i64) -> bool {
    peak & !(OVERFLOW - 1) != 0
}

/// Writes the mean gradient of a tensor; returns its sum of squares.
pub(super) fn mean_of(sums: &[i32], exponents: &[i32], n_slots: u32, mean: &mut [f32]) -> f64 {
    let chunks = sums.chunks(CHUNK).zip(mean.chunks_mut(CHUNK));
    let squares = |((sums, mean), exponent): ((&[i32], &mut [f32]), &i32)| {
        super::mean_of(sums, *exponent, n_slots, mean).1
    };
    chunks.zip(exponents).map(squares).sum()
}
