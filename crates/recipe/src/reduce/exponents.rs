//! The ways to sum gradients, and how their exponents follow the gradients.

use serde::{Deserialize, Serialize};

use super::{fixed32, fixed64};
use crate::state::{Counters, Layout};

/// How the slots' gradients are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reduction {
    /// As 64-bit integers, with one exponent a tensor.
    Exact,
    /// As 32-bit integers, with one exponent every [`CHUNK_32`](super::CHUNK_32) elements of a
    /// tensor: half the bytes. A slot's largest elements take 25 bits less log2 V, those of an f32
    /// for V = 2.
    Exact32,
    /// As f32: the bits depend on who computed what.
    Fast,
}

/// Bounds of an exponent.
const RANGE: (i32, i32) = (-60, 90);

impl Reduction {
    /// Returns the number of exponents of a state. Floats have none; their states keep the start.
    pub fn n_exponents(self, layout: &Layout) -> usize {
        match self {
            Reduction::Exact | Reduction::Fast => layout.n_blocks(),
            Reduction::Exact32 => fixed32::n_chunks(layout),
        }
    }

    /// Returns every exponent before the first step.
    pub fn exponent_start(self) -> i32 {
        match self {
            Reduction::Exact | Reduction::Fast => fixed64::START,
            Reduction::Exact32 => fixed32::START,
        }
    }

    /// Returns the index of the first exponent of a tensor.
    pub(super) fn first_exponent(self, layout: &Layout, block: usize) -> usize {
        match self {
            Reduction::Exact | Reduction::Fast => block,
            Reduction::Exact32 => fixed32::first_chunk(layout, block),
        }
    }

    /// Returns the counters of a fresh run.
    pub fn fresh(self, layout: &Layout, batch: u32) -> Counters {
        let mut counters = Counters::fresh(layout.n_blocks(), batch);
        self.fit(layout, &mut counters);
        counters
    }

    /// Gives counters of a start that knows no reduction, such as imported weights, exponents to
    /// start from; others are left as they are.
    pub fn fit(self, layout: &Layout, counters: &mut Counters) {
        if counters.updates == 0 && counters.step == 0 {
            counters.exponents = vec![self.exponent_start(); self.n_exponents(layout)];
            counters.exponent_version = 0;
        }
    }

    /// Tells whether a step with these counters only measures: its magnitudes set the exponents,
    /// and it is computed again.
    pub fn measures_first(self, counters: &Counters) -> bool {
        self == Reduction::Exact32 && counters.exponent_version == 0
    }

    /// Sets the exponents for the step after one whose magnitudes were `max_abs`, or for the same
    /// step if it only measured.
    pub fn advance(self, counters: &mut Counters, max_abs: &[f32], n_slots: u32) {
        if self == Reduction::Fast {
            return;
        }
        assert_eq!(counters.exponents.len(), max_abs.len(), "one magnitude per exponent");
        let measured = self.measures_first(counters);
        let slot_bits = ceil_log2(n_slots);
        let target = match self {
            Reduction::Exact32 => (fixed32::TARGET_BITS - slot_bits).min(fixed32::FLOAT_BITS),
            Reduction::Exact | Reduction::Fast => fixed64::TARGET_BITS - slot_bits,
        };
        let rise = i32::from(counters.step.is_multiple_of(fixed32::RISE_EVERY));
        let mut changed = measured;
        for (exponent, &max) in counters.exponents.iter_mut().zip(max_abs) {
            let next = match self {
                _ if max > 0.0 => target - exponent_of(max),
                // So small that even the peak was zero: it is looked at more closely.
                Reduction::Exact32 => (*exponent).max(fixed32::UNSEEN_MAX),
                Reduction::Exact | Reduction::Fast => *exponent,
            };
            // Down at once, up slowly: noisy slots exceed an average now and then, and a chunk in
            // which few slots have a gradient would overflow in every step.
            let next = match self {
                Reduction::Exact32 if !measured => next.min(*exponent + rise),
                _ => next,
            };
            let next = next.clamp(RANGE.0, RANGE.1);
            changed |= next != *exponent;
            *exponent = next;
        }
        counters.exponent_version += u64::from(changed);
    }

    /// Tells whether an exponent cannot fall any more: an overflow there is a gradient that is not
    /// finite by any measure.
    pub fn at_floor(self, counters: &Counters, overflows: &[usize]) -> bool {
        let is_low = |exponent: &i32| *exponent == RANGE.0;
        if overflows.is_empty() {
            return counters.exponents.iter().all(is_low);
        }
        overflows.iter().any(|idx| is_low(&counters.exponents[*idx]))
    }

    /// Lowers the exponents at which a step [overflowed](super::Reducer::overflows), all where none
    /// is listed. The step is then computed again.
    pub fn back_off(self, counters: &mut Counters, overflows: &[usize]) {
        let by = match self {
            Reduction::Exact32 => fixed32::BACK_OFF,
            Reduction::Exact | Reduction::Fast => fixed64::BACK_OFF,
        };
        let all = overflows.is_empty();
        for (idx, exponent) in counters.exponents.iter_mut().enumerate() {
            if all || overflows.binary_search(&idx).is_ok() {
                *exponent = (*exponent - by).max(RANGE.0);
            }
        }
        // A step that measures goes on measuring.
        if !self.measures_first(counters) {
            counters.exponent_version += 1;
        }
    }
}

/// Unbiased binary exponent: floor(log2 x) of a positive finite x.
pub(super) fn exponent_of(x: f32) -> i32 {
    let bits = f64::from(x).to_bits();
    ((bits >> 52) & 0x7FF) as i32 - 1023
}

fn ceil_log2(n: u32) -> i32 {
    n.next_power_of_two().trailing_zeros() as i32
}
