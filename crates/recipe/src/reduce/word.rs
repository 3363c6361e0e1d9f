//! The control word: what a step's sum says beside its gradients.

use super::{LOSS_SCALE, ReduceError, SUM_LIMIT};

/// i64 numbers of the control word.
pub const CONTROL_LANES: usize = 16;

/// Lanes of the control word. A lane is a sum over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Lane {
    /// Ranks with a slot gradient too large for its exponent.
    Overflow = 0,
    /// Ranks with a gradient or loss that is not finite.
    NonFinite = 1,
    /// Sum of slot losses in units of 2^-40.
    Loss = 2,
    /// Slots in the sum; must be V.
    Slots = 3,
    /// Sum of a 40-bit mix of the slot indices: with [`Lane::Slots`], each slot was there once.
    SlotMix = 4,
    /// Ranks that ask to stop at this step's end, with the sum and the sum of squares of their
    /// change ids.
    Stop = 5,
    /// See [`Lane::Stop`].
    StopId = 6,
    /// See [`Lane::Stop`].
    StopIdSquared = 7,
    /// Ranks that ask to checkpoint this step's state, with sums of their attempt ids.
    Checkpoint = 8,
    /// See [`Lane::Checkpoint`].
    CheckpointId = 9,
    /// See [`Lane::Checkpoint`].
    CheckpointIdSquared = 10,
    /// Ranks in the sum; must be the world size.
    Ranks = 11,
}

/// A request that takes effect at the first step whose control word carries it from every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Stop at the step's end.
    Stop,
    /// Checkpoint the state at the step's end.
    Checkpoint,
}

impl Request {
    fn lanes(self) -> [Lane; 3] {
        match self {
            Request::Stop => [Lane::Stop, Lane::StopId, Lane::StopIdSquared],
            Request::Checkpoint => {
                [Lane::Checkpoint, Lane::CheckpointId, Lane::CheckpointIdSquared]
            }
        }
    }
}

/// Largest id of a [`Request`]: its square times 2^16 ranks fits an i64.
pub const REQUEST_ID_MAX: u64 = 1 << 23;

/// The control word of one step: first as one rank builds it, then as the sum that all read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlWord {
    n_slots: u32,
    lanes: [i64; CONTROL_LANES],
}

/// What a summed control word says, equal on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// Whether a slot gradient was too large for its exponent: nobody applies the step.
    pub overflow: bool,
    /// Whether a gradient or loss was not finite: the step is skipped.
    pub non_finite: bool,
    /// Mean of the slot losses.
    pub loss: f64,
    /// Whether all ranks asked to stop here with one change id.
    pub stop: bool,
    /// Whether all ranks asked to checkpoint here with one attempt id.
    pub checkpoint: bool,
}

impl ControlWord {
    /// Begins the word of a rank that has computed no slot yet, of steps of `n_slots` slots.
    pub fn new(n_slots: u32) -> Self {
        let mut word = ControlWord { n_slots, lanes: [0; CONTROL_LANES] };
        *word.lane(Lane::Ranks) = 1;
        word
    }

    /// Takes a word that was summed over ranks.
    pub fn of_sum(n_slots: u32, lanes: [i64; CONTROL_LANES]) -> Self {
        ControlWord { n_slots, lanes }
    }

    /// Returns the numbers to be summed.
    pub fn lanes(&self) -> &[i64; CONTROL_LANES] {
        &self.lanes
    }

    /// Notes what became of this rank's slot gradients.
    pub fn flag(&mut self, overflow: bool, non_finite: bool) {
        *self.lane(Lane::Overflow) |= i64::from(overflow);
        *self.lane(Lane::NonFinite) |= i64::from(non_finite);
    }

    /// Closes slot `index` of this rank, whose mean loss is `loss`.
    pub fn end_slot(&mut self, index: u32, loss: f32) {
        if loss.is_finite()
            && f64::from(loss.abs()) < SUM_LIMIT / LOSS_SCALE / f64::from(self.n_slots)
        {
            *self.lane(Lane::Loss) += (f64::from(loss) * LOSS_SCALE).round_ties_even() as i64;
        } else {
            self.flag(false, true);
        }
        *self.lane(Lane::Slots) += 1;
        *self.lane(Lane::SlotMix) += mix(index);
    }

    /// Asks, for this rank, that `request` number `id` takes effect at this step.
    pub fn raise(&mut self, request: Request, id: u64) {
        assert!(id <= REQUEST_ID_MAX, "request id {id}");
        let id = id as i64;
        for (lane, value) in request.lanes().into_iter().zip([1, id, id * id]) {
            *self.lane(lane) += value;
        }
    }

    /// Reads the word summed over all `world` ranks, once it is certain that each of them and each
    /// slot is in the sum once.
    pub fn read(&self, world: usize) -> Result<Reading, ReduceError> {
        let at = |lane: Lane| self.lanes[lane as usize];
        let ranks = at(Lane::Ranks);
        if ranks != world as i64 {
            return Err(ReduceError::Ranks { got: ranks, want: world });
        }
        let (got, slot_mix) = (at(Lane::Slots), at(Lane::SlotMix));
        let want_mix = (0..self.n_slots).map(mix).sum::<i64>();
        if got != i64::from(self.n_slots) || slot_mix != want_mix {
            return Err(ReduceError::Slots { got, want: self.n_slots, mix: slot_mix });
        }
        Ok(Reading {
            overflow: at(Lane::Overflow) > 0,
            non_finite: at(Lane::NonFinite) > 0,
            loss: at(Lane::Loss) as f64 / LOSS_SCALE / f64::from(self.n_slots),
            stop: self.agreed(Request::Stop, world),
            checkpoint: self.agreed(Request::Checkpoint, world),
        })
    }

    /// Tells whether every rank raised `request` with one id: n equal numbers x have sums n·x and
    /// n·x².
    pub(super) fn agreed(&self, request: Request, world: usize) -> bool {
        let at = |lane: Lane| i128::from(self.lanes[lane as usize]);
        let [count, sum, squares] = request.lanes().map(at);
        let n = world as i128;
        count == n && squares * n == sum * sum
    }

    fn lane(&mut self, lane: Lane) -> &mut i64 {
        &mut self.lanes[lane as usize]
    }
}

/// The top 40 bits of SplitMix64's finaliser: wrong sets of slots do not cancel, and 2^22 of them
/// cannot overflow an i64.
pub(super) fn mix(index: u32) -> i64 {
    let mut z = (u64::from(index) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 24) as i64
}
