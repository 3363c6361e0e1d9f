//! Fixed point of 64 bits with one exponent a tensor.

use super::{MAGIC, Quantised, exp2, max_abs};

/// Exponent before the first step.
pub(super) const START: i32 = 30;
/// How far exponents fall after an overflow.
pub(super) const BACK_OFF: i32 = 12;
/// Bits that the mean gradient's largest element takes, before the slots' share.
pub(super) const TARGET_BITS: i32 = 50;
/// Elements handled at once: fits the first-level cache with its sums.
const CHUNK: usize = 1024;
/// Below this magnitude, adding [`MAGIC`] rounds.
const MAGIC_REACH: f64 = (1u64 << 51) as f64;

/// Adds `round_ties_even(f64(g) · 2^exponent)` of each gradient to its sum.
pub(super) fn add(grad: &[f32], exponent: i32, limit: f64, sums: &mut [i64]) -> Quantised {
    assert_eq!(grad.len(), sums.len(), "one sum per element");
    let scale = exp2(exponent);
    let mut worst = Quantised::Fine;
    for (grad, sums) in grad.chunks(CHUNK).zip(sums.chunks_mut(CHUNK)) {
        let max = max_abs(grad);
        if !max.is_finite() {
            return Quantised::NonFinite;
        }
        let reach = f64::from(max) * scale;
        if reach.round_ties_even() > limit {
            worst = Quantised::Overflow;
        } else if reach < MAGIC_REACH {
            add_by_magic(grad, scale, sums);
        } else {
            for (sum, g) in sums.iter_mut().zip(grad) {
                *sum += (f64::from(*g) * scale).round_ties_even() as i64;
            }
        }
    }
    worst
}

/// The quick path. Vectorises without SSE4.
fn add_by_magic(grad: &[f32], scale: f64, sums: &mut [i64]) {
    for (sum, g) in sums.iter_mut().zip(grad) {
        let shifted = f64::from(*g) * scale + MAGIC;
        *sum += (shifted.to_bits() as i64).wrapping_sub(MAGIC.to_bits() as i64);
    }
}
