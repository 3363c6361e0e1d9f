//! A state as a chain of digests: which slots were counted, over which states, in which order.

use crate::rng::mix;

/// A modelled training state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Steps behind it.
    pub step: u64,
    /// Digest of all that was added up for it.
    pub digest: u64,
    /// Whether a corruption went into it.
    pub tainted: bool,
}

impl State {
    /// Returns the state of the seed.
    pub fn seed() -> Self {
        State { step: 0, digest: mix(0x5EED), tainted: false }
    }

    /// Returns the state after one update with the sum `sum`.
    pub fn after(&self, sum: u64, tainted: bool) -> Self {
        State {
            step: self.step + 1,
            digest: mix(self.digest ^ sum.rotate_left(17)),
            tainted: self.tainted || tainted,
        }
    }
}

/// Returns what one slot of a step adds to the sum, computed on a state: additions commute.
pub fn slot_sum(state: &State, slot: u32) -> u64 {
    mix(state.digest ^ mix(state.step << 8 | u64::from(slot)))
}

/// The states of a run without faults on one worker.
#[derive(Clone, Debug)]
pub struct Reference(Vec<u64>);

impl Reference {
    /// Computes the chain.
    pub fn new(n_slots: u32, steps: u64) -> Self {
        let mut state = State::seed();
        let mut chain = vec![state.digest];
        for _ in 0..steps {
            let sum = (0..n_slots).fold(0u64, |sum, slot| sum.wrapping_add(slot_sum(&state, slot)));
            state = state.after(sum, false);
            chain.push(state.digest);
        }
        Reference(chain)
    }

    /// Returns the digest of the state at a step.
    pub fn at(&self, step: u64) -> Option<u64> {
        self.0.get(step as usize).copied()
    }
}
