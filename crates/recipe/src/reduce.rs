//! The exact reduction: why the gradient does not depend on who computed which slot.
//!
//! Every slot's gradient is rounded to fixed point with an exponent per tensor that all workers
//! share, and fixed-point numbers are summed as i64. Integer addition is associative and
//! commutative, so any map of slots to ranks, any order of arrival and any grouping give the same
//! bytes. The last [`CONTROL_LANES`] numbers of the buffer are the control word, which everybody
//! reads after the same step.

mod word;

use std::sync::Arc;

pub use word::{CONTROL_LANES, ControlWord, Lane, REQUEST_ID_MAX, Reading, Request};

use crate::state::{Counters, Layout};

/// Exponent of every tensor before the first step.
pub const EXPONENT_START: i32 = 30;
/// Bounds of an exponent.
pub const EXPONENT_RANGE: (i32, i32) = (-60, 90);
/// How far exponents fall after an overflow.
pub const EXPONENT_BACK_OFF: i32 = 12;
/// Bits that the mean gradient's largest element takes, before the slots' share.
const TARGET_BITS: i32 = 50;
/// Largest magnitude that the sum over all slots may reach.
const SUM_LIMIT: f64 = (1u64 << 61) as f64;
/// Scale of the loss lane.
const LOSS_SCALE: f64 = (1u64 << 40) as f64;

/// One slot's gradient of one tensor.
#[derive(Clone, Copy, Debug)]
pub struct SlotGrad<'a> {
    /// Index of the tensor in the [`Layout`].
    pub block: usize,
    /// The gradient, one value per element.
    pub values: &'a [f32],
}

/// Sums the gradients of a step's slots.
///
/// Use: [`begin`](Reducer::begin), then for each slot of this rank [`add`](Reducer::add) each
/// tensor and [`end_slot`](Reducer::end_slot), then sum [`buffer`](Reducer::buffer) over the ranks,
/// then [`finish`](Reducer::finish).
#[derive(Clone, Debug)]
pub struct Reducer {
    layout: Arc<Layout>,
    n_slots: u32,
    exponents: Vec<i32>,
    sums: Vec<i64>,
    word: ControlWord,
}

/// What everybody does with a reduced step.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Apply the mean gradient.
    Apply(Summary),
    /// Skip: order, step and schedule advance, the state does not.
    Skip(Summary),
    /// Nobody applies; lower the exponents and compute the step again.
    Redo,
}

/// Numbers of a reduced step, equal on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Mean of the slot losses.
    pub loss: f64,
    /// Euclidean norm of the mean gradient, 0 for a skipped step.
    pub grad_norm: f64,
    /// Largest magnitude of the mean gradient, per tensor; empty for a skipped step.
    pub max_abs: Vec<f32>,
    /// Whether all ranks asked to stop here with one change id.
    pub stop: bool,
    /// Whether all ranks asked to checkpoint here with one attempt id.
    pub checkpoint: bool,
}

/// A reduced step that cannot be: a bug, or a peer that computes something else.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReduceError {
    /// The slots in the sum are not each slot once.
    #[error("the reduced step holds {got} slots (mix {mix:x}), not each of its {want} slots once")]
    Slots {
        /// Slots counted.
        got: i64,
        /// V.
        want: u32,
        /// Their mix.
        mix: i64,
    },
    /// The ranks in the sum are not the members.
    #[error("the reduced step holds {got} ranks, not {want}")]
    Ranks {
        /// Ranks counted.
        got: i64,
        /// World size.
        want: usize,
    },
}

impl Reducer {
    /// Creates a reducer for steps of `n_slots` slots.
    pub fn new(layout: Arc<Layout>, n_slots: u32) -> Self {
        let exponents = vec![EXPONENT_START; layout.n_blocks()];
        let sums = vec![0; layout.numel() + CONTROL_LANES];
        Reducer { layout, n_slots, exponents, sums, word: ControlWord::new(n_slots) }
    }

    /// Starts a step whose exponents are `exponents`.
    pub fn begin(&mut self, exponents: &[i32]) {
        self.exponents.copy_from_slice(exponents);
        self.sums.fill(0);
        self.word = ControlWord::new(self.n_slots);
    }

    /// Adds one slot's gradient of one tensor.
    pub fn add(&mut self, grad: SlotGrad<'_>) {
        let range = self.layout.range(grad.block);
        let sums = &mut self.sums[range];
        let limit = slot_limit(self.n_slots);
        let quantised = quantise_into(grad.values, self.exponents[grad.block], limit, sums);
        self.word.flag(quantised == Quantised::Overflow, quantised == Quantised::NonFinite);
    }

    /// Closes slot `index` of this rank, whose mean loss is `loss`.
    pub fn end_slot(&mut self, index: u32, loss: f32) {
        self.word.end_slot(index, loss);
    }

    /// Asks, for this rank, that `request` number `id` takes effect at this step.
    pub fn raise(&mut self, request: Request, id: u64) {
        self.word.raise(request, id);
    }

    /// Returns this rank's sums with the control word at the end, to be added over the ranks in
    /// place.
    pub fn buffer(&mut self) -> &mut [i64] {
        let n = self.layout.numel();
        self.sums[n..].copy_from_slice(self.word.lanes());
        &mut self.sums
    }

    /// Reads the sums over all `world` ranks and writes the mean gradient to `mean`.
    ///
    /// `mean` is meaningful after [`Verdict::Apply`] only.
    pub fn finish(&mut self, world: usize, mean: &mut [f32]) -> Result<Verdict, ReduceError> {
        let n = self.layout.numel();
        let lanes = self.sums[n..].try_into().expect("the buffer ends with the word");
        let reading = ControlWord::of_sum(self.n_slots, lanes).read(world)?;
        let early = reading.verdict();
        if let Some(verdict) = early {
            return Ok(verdict);
        }
        let mut max_abs: Vec<f32> = Vec::with_capacity(self.layout.n_blocks());
        let mut square_sum = 0.0f64;
        for block in 0..self.layout.n_blocks() {
            let range = self.layout.range(block);
            let (exponent, n_slots) = (self.exponents[block], self.n_slots);
            let (max, squares) =
                mean_of(&self.sums[range.clone()], exponent, n_slots, &mut mean[range]);
            max_abs.push(max);
            square_sum += squares;
        }
        Ok(Verdict::Apply(reading.summary(square_sum.sqrt(), max_abs)))
    }
}

impl Reading {
    /// Returns what everybody does where the mean gradient does not matter, else `None`.
    pub fn verdict(&self) -> Option<Verdict> {
        match self {
            Reading { overflow: true, .. } => Some(Verdict::Redo),
            Reading { non_finite: true, .. } => Some(Verdict::Skip(self.summary(0.0, Vec::new()))),
            _ => None,
        }
    }

    /// Adds what the mean gradient says: its norm, and the largest magnitude of each tensor.
    pub fn summary(&self, grad_norm: f64, max_abs: Vec<f32>) -> Summary {
        let Reading { loss, stop, checkpoint, .. } = *self;
        Summary { loss, grad_norm, max_abs, stop, checkpoint }
    }
}

/// Largest magnitude of one element of one slot's gradient, in units of its exponent.
pub fn slot_limit(n_slots: u32) -> f64 {
    SUM_LIMIT / f64::from(n_slots)
}

/// Sets the exponents for the step after one whose mean gradient had magnitudes `max_abs`.
pub fn advance_exponents(counters: &mut Counters, max_abs: &[f32], n_slots: u32) {
    assert_eq!(counters.exponents.len(), max_abs.len(), "one magnitude per tensor");
    let before = counters.exponents.clone();
    let slot_bits = ceil_log2(n_slots);
    for (exponent, &max) in counters.exponents.iter_mut().zip(max_abs) {
        if max > 0.0 {
            let target = TARGET_BITS - slot_bits - exponent_of(max);
            *exponent = target.clamp(EXPONENT_RANGE.0, EXPONENT_RANGE.1);
        }
    }
    counters.exponent_version += u64::from(before != counters.exponents);
}

/// Lowers all exponents after an overflow. The step is then computed again.
pub fn back_off_exponents(counters: &mut Counters) {
    for exponent in &mut counters.exponents {
        *exponent = (*exponent - EXPONENT_BACK_OFF).max(EXPONENT_RANGE.0);
    }
    counters.exponent_version += 1;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quantised {
    Fine,
    Overflow,
    NonFinite,
}

/// Elements handled at once: fits the first-level cache with its sums.
const CHUNK: usize = 1024;

/// Adds `round_ties_even(f64(g) · 2^exponent)` of each gradient to its sum.
fn quantise_into(grad: &[f32], exponent: i32, limit: f64, sums: &mut [i64]) -> Quantised {
    assert_eq!(grad.len(), sums.len(), "one sum per element");
    let scale = exp2(exponent);
    let mut worst = Quantised::Fine;
    for (grad, sums) in grad.chunks(CHUNK).zip(sums.chunks_mut(CHUNK)) {
        let max_bits = grad.iter().fold(0i32, |m, g| m.max((g.to_bits() & 0x7FFF_FFFF) as i32));
        let max = f32::from_bits(max_bits as u32);
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

/// Below this magnitude, adding [`MAGIC`] rounds an f64 to the nearest integer, ties to even.
const MAGIC_REACH: f64 = (1u64 << 51) as f64;
/// 1.5 · 2^52: its unit in the last place is 1, and it stays in its binade for |x| < 2^51.
const MAGIC: f64 = (3u64 << 51) as f64;

/// The quick path: the integer stands in the low bits of `x + MAGIC`. Vectorises without SSE4.
fn add_by_magic(grad: &[f32], scale: f64, sums: &mut [i64]) {
    for (sum, g) in sums.iter_mut().zip(grad) {
        let shifted = f64::from(*g) * scale + MAGIC;
        *sum += (shifted.to_bits() as i64).wrapping_sub(MAGIC.to_bits() as i64);
    }
}

/// Writes `f32(f64(sum) · 2^-exponent / n_slots)`; returns its largest magnitude and sum of
/// squares.
fn mean_of(sums: &[i64], exponent: i32, n_slots: u32, mean: &mut [f32]) -> (f32, f64) {
    let scale = exp2(-exponent);
    let n = f64::from(n_slots);
    let mut max = 0f32;
    // Four running sums in a fixed pattern: quick, and the same on every machine.
    let mut squares = [0f64; 4];
    for (i, (to, &sum)) in mean.iter_mut().zip(sums).enumerate() {
        let value = (sum as f64 * scale / n) as f32;
        *to = value;
        max = max.max(value.abs());
        squares[i % 4] += f64::from(value) * f64::from(value);
    }
    (max, (squares[0] + squares[1]) + (squares[2] + squares[3]))
}

/// 2^e for |e| ≤ 1022: what a gradient is multiplied by, and with -e what a sum is.
pub fn exp2(e: i32) -> f64 {
    f64::from_bits(((1023 + e) as u64) << 52)
}

/// Unbiased binary exponent: floor(log2 x) of a positive finite x.
fn exponent_of(x: f32) -> i32 {
    let bits = f64::from(x).to_bits();
    ((bits >> 52) & 0x7FF) as i32 - 1023
}

fn ceil_log2(n: u32) -> i32 {
    n.next_power_of_two().trailing_zeros() as i32
}

#[cfg(test)]
mod tests;
