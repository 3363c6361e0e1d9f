//! When planes are added to their cache.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::Fill;

/// Waiting is judged over spans of this length: long enough for a few steps of any model.
const SPAN: Duration = Duration::from_secs(10);

/// Share of the time that steps may wait for data before planes are worth their place.
const WAIT_SHARE: f64 = 0.01;

/// Share of the time that adding planes may cost.
const COST_SHARE: f64 = 0.10;

/// Images that are timed without planes before the first are added.
const TIMED_FIRST: u32 = 16;

/// Judges by what was measured; it has no clock of its own.
#[derive(Debug)]
pub(crate) struct Judge {
    fill: Fill,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    is_on: bool,
    waited: Duration,
    passed: Duration,
    /// Number of images and the time they took, without and with adding planes.
    plain: (u32, Duration),
    filled: (u32, Duration),
}

impl State {
    fn mean(of: (u32, Duration)) -> f64 {
        of.1.as_secs_f64() / f64::from(of.0.max(1))
    }

    /// Tells whether one more image with its planes stays within the share that they may cost.
    fn affords_one(&self) -> bool {
        if self.plain.0 < TIMED_FIRST {
            return false;
        }
        let plain = State::mean(self.plain);
        // Before the first, twice the time is a guess on the safe side.
        let fill = if self.filled.0 == 0 { 2.0 * plain } else { State::mean(self.filled) };
        let extra = (fill - plain).max(0.0) * f64::from(self.filled.0 + 1);
        let all = (self.plain.1 + self.filled.1).as_secs_f64() + fill;
        extra <= COST_SHARE * all
    }
}

impl Judge {
    pub fn new(fill: Fill) -> Self {
        Judge { fill, state: Mutex::default() }
    }

    /// Tells whether times are of use to it.
    pub fn measures(&self) -> bool {
        self.fill != Fill::Always
    }

    /// Tells whether the next image may add its planes.
    pub fn allows(&self) -> bool {
        let state = || self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.fill == Fill::Always || {
            let state = state();
            state.is_on && state.affords_one()
        }
    }

    /// Tells whether waiting has switched it on.
    pub fn is_on(&self) -> bool {
        self.fill == Fill::Always || self.state.lock().unwrap_or_else(PoisonError::into_inner).is_on
    }

    /// Takes note of how long an image took that was decoded from its JPEG.
    pub fn took(&self, filled: bool, time: Duration) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let of = if filled { &mut state.filled } else { &mut state.plain };
        of.0 = of.0.saturating_add(1);
        of.1 += time;
    }

    /// Takes note that of `passed`, the consumer of a stream spent `waited` waiting for a slot.
    pub fn waited(&self, waited: Duration, passed: Duration) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waited += waited;
        state.passed += passed;
        if state.passed >= SPAN {
            let share = state.waited.as_secs_f64() / state.passed.as_secs_f64();
            if share > WAIT_SHARE && !state.is_on && self.measures() {
                state.is_on = true;
                let percent = format!("{:.1}", 100.0 * share);
                tracing::info!(percent, "steps wait for data: decoded planes are kept from now on");
            }
            (state.waited, state.passed) = (Duration::ZERO, Duration::ZERO);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn waiting_switches_it_on_for_good() {
        let judge = Judge::new(Fill::WhenWaiting);
        (0..20).for_each(|_| judge.took(false, MS));
        (0..300).for_each(|_| judge.waited(MS / 2, 100 * MS));
        assert!(!judge.allows(), "half a percent");
        (0..100).for_each(|_| judge.waited(2 * MS, 100 * MS));
        assert!(judge.is_on() && judge.allows());
        (0..1000).for_each(|_| judge.waited(Duration::ZERO, 100 * MS));
        assert!(judge.is_on());
        // What is always on needs no measure.
        assert!(Judge::new(Fill::Always).allows() && Judge::new(Fill::Always).is_on());
    }

    /// Adding costs half as much again: of a long epoch a fifth is added, for a tenth of the time.
    #[test]
    fn adding_costs_a_tenth_at_most() {
        let judge = Judge::new(Fill::WhenWaiting);
        judge.waited(SPAN, SPAN);
        assert!(!judge.allows(), "nothing was timed yet");
        let (mut filled, mut plain) = (0u32, 0u32);
        for _ in 0..10_000 {
            let fills = judge.allows();
            judge.took(fills, if fills { 1500 * MS / 1000 } else { MS });
            if fills { filled += 1 } else { plain += 1 }
        }
        let extra = f64::from(filled) * 0.5 / (f64::from(plain) + 1.5 * f64::from(filled));
        assert!((0.095..=0.1).contains(&extra), "{filled} added, {extra} of the time");
    }

    /// Where adding costs nothing, everything is added.
    #[test]
    fn what_costs_nothing_is_not_held_back() {
        let judge = Judge::new(Fill::WhenWaiting);
        judge.waited(SPAN, SPAN);
        (0..u64::from(TIMED_FIRST)).for_each(|_| judge.took(false, MS));
        for _ in 0..100 {
            judge.took(judge.allows(), MS);
        }
        assert!(judge.allows());
    }
}
