//! The exact reduction: why the gradient does not depend on who computed which slot.
//!
//! Every slot's gradient is rounded to fixed point with exponents that all workers share, and
//! fixed-point numbers are summed as integers. Integer addition is associative and commutative, so
//! any map of slots to ranks, any order of arrival and any grouping give the same bytes. The
//! control word is summed last: everybody reads it after the same step.
//!
//! [`Reduction`] names the ways to sum: 64-bit integers with an exponent a tensor, 32-bit integers
//! with an exponent every [`CHUNK_32`] elements, and floats, which promise nothing.

mod buckets;
mod exponents;
mod fixed32;
mod fixed64;
mod word;

use std::sync::Arc;

pub use buckets::{Buckets, Part};
pub use exponents::Reduction;
pub use fixed32::CHUNK as CHUNK_32;
pub use word::{CONTROL_LANES, ControlWord, Lane, REQUEST_ID_MAX, Reading, Request};

use crate::state::Layout;

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
/// tensor and [`end_slot`](Reducer::end_slot), then sum every part ([`take_rest`]) over the ranks
/// and [`put`](Reducer::put) it back, then [`finish`](Reducer::finish). Parts that the last slot
/// has completed can be taken while it still computes ([`begin_last_slot`], [`take_ready`]).
///
/// [`take_rest`]: Reducer::take_rest
/// [`begin_last_slot`]: Reducer::begin_last_slot
/// [`take_ready`]: Reducer::take_ready
#[derive(Clone, Debug)]
pub struct Reducer {
    reduction: Reduction,
    layout: Arc<Layout>,
    buckets: Arc<Buckets>,
    n_slots: u32,
    exponents: Vec<i32>,
    /// Sums of each bucket; empty while a part is taken.
    sums: Vec<Part>,
    /// Per exponent of 32 bits, the sum over slots of the largest magnitude of a slot.
    peaks: Vec<i64>,
    word: ControlWord,
    /// Tensors that the slot in progress has not given yet, per bucket.
    pending: Vec<usize>,
    /// First part that was not taken, once this rank's last slot has begun.
    next: Option<usize>,
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
    /// Magnitudes that the next exponents follow, one an exponent; empty for a skipped step. Of
    /// the mean gradient's largest element, and with 32 bits of the slots' largest ones, averaged.
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
    /// Creates a reducer of 64-bit sums for steps of `n_slots` slots.
    pub fn new(layout: Arc<Layout>, n_slots: u32) -> Self {
        let order: Vec<usize> = (0..layout.n_blocks()).collect();
        let buckets = Buckets::new(&layout, &order, usize::MAX);
        Reducer::of(Reduction::Exact, layout, Arc::new(buckets), n_slots)
    }

    /// Creates a reducer for steps of `n_slots` slots whose sums lie in `buckets`.
    pub fn of(
        reduction: Reduction,
        layout: Arc<Layout>,
        buckets: Arc<Buckets>,
        n_slots: u32,
    ) -> Self {
        let exponents = vec![reduction.exponent_start(); reduction.n_exponents(&layout)];
        let sums = buckets.lengths().map(|n| Part::zeros(reduction, n)).collect();
        let n_peaks = if reduction == Reduction::Exact32 { exponents.len() } else { 0 };
        Reducer {
            pending: buckets.n_tensors().to_vec(),
            peaks: vec![0; n_peaks],
            word: ControlWord::new(n_slots),
            next: None,
            reduction,
            layout,
            buckets,
            n_slots,
            exponents,
            sums,
        }
    }

    /// Returns how gradients are summed.
    pub fn reduction(&self) -> Reduction {
        self.reduction
    }

    /// Starts a step whose exponents are `exponents`.
    pub fn begin(&mut self, exponents: &[i32]) {
        self.exponents.copy_from_slice(exponents);
        for (sums, n) in self.sums.iter_mut().zip(self.buckets.lengths()) {
            sums.reset(self.reduction, n);
        }
        self.peaks.fill(0);
        self.pending.copy_from_slice(self.buckets.n_tensors());
        self.word = ControlWord::new(self.n_slots);
        self.next = None;
    }

    /// Notes that what is added from here on belongs to this rank's last slot.
    pub fn begin_last_slot(&mut self) {
        self.next = Some(0);
    }

    /// Adds one slot's gradient of one tensor.
    pub fn add(&mut self, grad: SlotGrad<'_>) {
        let (bucket, range) = self.buckets.place(grad.block);
        let first = self.reduction.first_exponent(&self.layout, grad.block);
        let quantised = match &mut self.sums[bucket] {
            Part::I64(sums) => {
                let limit = slot_limit(self.n_slots);
                fixed64::add(grad.values, self.exponents[first], limit, &mut sums[range])
            }
            Part::I32(sums) => fixed32::add(
                grad.values,
                &self.exponents[first..],
                fixed32::slot_limit(self.n_slots),
                &mut sums[range],
                &mut self.peaks[first..],
            ),
            Part::F32(sums) => add_floats(grad.values, &mut sums[range]),
        };
        self.word.flag(quantised == Quantised::Overflow, quantised == Quantised::NonFinite);
        let left = self.pending[bucket].checked_sub(1);
        self.pending[bucket] = left.expect("a tensor has one gradient a slot");
    }

    /// Tells whether each tensor has had its gradient of the slot in progress.
    pub fn slot_is_complete(&self) -> bool {
        self.pending.iter().all(|n| *n == 0)
    }

    /// Closes slot `index` of this rank, whose mean loss is `loss`.
    pub fn end_slot(&mut self, index: u32, loss: f32) {
        self.word.end_slot(index, loss);
        if self.next.is_none() {
            self.pending.copy_from_slice(self.buckets.n_tensors());
        }
    }

    /// Asks, for this rank, that `request` number `id` takes effect at this step.
    pub fn raise(&mut self, request: Request, id: u64) {
        self.word.raise(request, id);
    }

    /// Takes the next part if this rank's last slot has completed it. Parts come in one order on
    /// every rank.
    pub fn take_ready(&mut self) -> Option<Part> {
        let next = self.next.as_mut()?;
        let ready = self.pending.get(*next) == Some(&0);
        ready.then(|| {
            *next += 1;
            std::mem::take(&mut self.sums[*next - 1])
        })
    }

    /// Takes the parts that are left, the control word last: nothing is added after this.
    pub fn take_rest(&mut self) -> Vec<Part> {
        let from = self.next.unwrap_or(0);
        self.next = Some(self.sums.len());
        let mut rest: Vec<Part> = self.sums[from..].iter_mut().map(std::mem::take).collect();
        rest.push(Part::I64([self.word.lanes().as_slice(), &self.peaks].concat()));
        rest
    }

    /// Puts all parts back, in the order in which they were taken, each summed over the ranks.
    ///
    /// # Panics
    /// If a part is missing or has another length.
    pub fn put(&mut self, mut parts: Vec<Part>) {
        let Some(Part::I64(tail)) = parts.pop() else {
            panic!("the control word is the last part")
        };
        let (lanes, peaks) = tail.split_at(CONTROL_LANES);
        self.word = ControlWord::of_sum(self.n_slots, lanes.try_into().expect("its length"));
        self.peaks.copy_from_slice(peaks);
        assert!(
            parts.iter().map(Part::len).eq(self.buckets.lengths()),
            "the parts taken come back"
        );
        self.sums = parts;
    }

    /// Lists the exponents at which a slot of a summed step overflowed, as far as the sums tell:
    /// all of them did where none is listed.
    pub fn overflows(&self) -> Vec<usize> {
        let marked = self.peaks.iter().enumerate().filter(|(_, peak)| fixed32::is_marked(**peak));
        marked.map(|(idx, _)| idx).collect()
    }

    /// Reads the sums over all `world` ranks and writes the mean gradient to `mean`.
    ///
    /// `mean` is meaningful after [`Verdict::Apply`] only.
    pub fn finish(&mut self, world: usize, mean: &mut [f32]) -> Result<Verdict, ReduceError> {
        let reading = self.word.read(world)?;
        let early = reading.verdict();
        if let Some(verdict) = early {
            return Ok(verdict);
        }
        let mut max_abs: Vec<f32> = Vec::with_capacity(self.exponents.len());
        let mut square_sum = 0.0f64;
        for block in 0..self.layout.n_blocks() {
            let mean = &mut mean[self.layout.range(block)];
            let (bucket, range) = self.buckets.place(block);
            let first = self.reduction.first_exponent(&self.layout, block);
            let (exponents, n_slots) = (&self.exponents[first..], self.n_slots);
            square_sum += match &self.sums[bucket] {
                Part::I64(sums) => {
                    let (max, squares) = mean_of(&sums[range], exponents[0], n_slots, mean);
                    max_abs.push(max);
                    squares
                }
                Part::I32(sums) => fixed32::mean_of(&sums[range], exponents, n_slots, mean),
                Part::F32(sums) => {
                    let (max, squares) = mean_of(&sums[range], 0, n_slots, mean);
                    max_abs.push(max);
                    squares
                }
            };
        }
        let peaks = self.peaks.iter().zip(&self.exponents);
        max_abs.extend(peaks.map(|(&peak, &e)| {
            let scale = exp2(-e - fixed32::PEAK_BITS);
            mean_value(fixed32::magnitude(peak), scale, self.n_slots)
        }));
        Ok(Verdict::Apply(reading.summary(square_sum.sqrt(), max_abs)))
    }
}

impl Reading {
    /// Returns what everybody does where the mean gradient does not matter, else `None`.
    pub fn verdict(&self) -> Option<Verdict> {
        match self {
            // No other exponents make it finite.
            Reading { non_finite: true, .. } => Some(Verdict::Skip(self.summary(0.0, Vec::new()))),
            Reading { overflow: true, .. } => Some(Verdict::Redo),
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

/// What became of a slot's gradient of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quantised {
    Fine,
    Overflow,
    NonFinite,
}

/// Returns the largest magnitude; not finite where an element is not.
fn max_abs(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().fold(0, |m, &value| m.max(magnitude_bits(value))) as u32)
}

/// Returns bits that are ordered as the magnitudes of values are.
fn magnitude_bits(value: f32) -> i32 {
    (value.to_bits() & 0x7FFF_FFFF) as i32
}

/// 1.5 · 2^52: its unit in the last place is 1, and it stays in its binade for |x| < 2^51. Adding
/// it to such an x rounds x to the nearest integer, ties to even, and the integer stands in the
/// low bits.
const MAGIC: f64 = (3u64 << 51) as f64;

/// Adds without any promise about the order.
fn add_floats(grad: &[f32], sums: &mut [f32]) -> Quantised {
    assert_eq!(grad.len(), sums.len(), "one sum per element");
    for (sum, g) in sums.iter_mut().zip(grad) {
        *sum += g;
    }
    if max_abs(grad).is_finite() { Quantised::Fine } else { Quantised::NonFinite }
}

/// A sum that a mean is taken of.
trait Sum: Copy {
    fn wide(self) -> f64;
}

impl Sum for i64 {
    fn wide(self) -> f64 {
        self as f64
    }
}

impl Sum for i32 {
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Sum for f32 {
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

/// Returns `f32(sum · scale / n_slots)`.
fn mean_value(sum: f64, scale: f64, n_slots: u32) -> f32 {
    (sum * scale / f64::from(n_slots)) as f32
}

/// Values that are worked on side by side.
const LANES: usize = 4;

/// Writes `f32(f64(sum) · 2^-exponent / n_slots)`; returns its largest magnitude and sum of
/// squares.
fn mean_of<T: Sum>(sums: &[T], exponent: i32, n_slots: u32, mean: &mut [f32]) -> (f32, f64) {
    let (scale, n) = (exp2(-exponent), f64::from(n_slots));
    if n_slots.is_power_of_two() {
        // Exact, and a division less for each element.
        let scale = scale / n;
        return write_mean(sums, mean, |sum| sum * scale);
    }
    write_mean(sums, mean, |sum| sum * scale / n)
}

fn write_mean<T: Sum>(sums: &[T], mean: &mut [f32], value: impl Fn(f64) -> f64) -> (f32, f64) {
    // Four running values each in a fixed pattern: quick, and the same on every machine.
    let (mut max, mut squares) = ([0i32; LANES], [0f64; LANES]);
    let mut write = |to: &mut [f32], sums: &[T]| {
        for (lane, (to, sum)) in to.iter_mut().zip(sums).enumerate() {
            let value = value(sum.wide()) as f32;
            *to = value;
            max[lane] = max[lane].max(magnitude_bits(value));
            squares[lane] += f64::from(value) * f64::from(value);
        }
    };
    let (fours, rest) = mean.as_chunks_mut::<LANES>();
    let (fours_of_sums, rest_of_sums) = sums.as_chunks::<LANES>();
    for (to, sums) in fours.iter_mut().zip(fours_of_sums) {
        write(to, sums);
    }
    write(rest, rest_of_sums);
    let max = max.iter().fold(0, |m, &lane| m.max(lane));
    (f32::from_bits(max as u32), (squares[0] + squares[1]) + (squares[2] + squares[3]))
}

/// 2^e for |e| ≤ 1022: what a gradient is multiplied by, and with -e what a sum is.
pub fn exp2(e: i32) -> f64 {
    f64::from_bits(((1023 + e) as u64) << 52)
}

#[cfg(test)]
mod tests;
