//! Makes a failing history short: fewer faults, then a smaller run, then rounder times.

use lacuna_control::invariants::Invariant;

use crate::action::Action;
use crate::history::play;
use crate::script::{Line, Script};
use crate::world::Detail;

/// Most plays that a shrink may take.
const PLAYS: usize = 3_000;

/// A search for a shorter script that fails alike.
struct Shrinker {
    invariant: Invariant,
    plays: usize,
    best: Script,
}

/// Returns a short script that violates the same invariant as `script`, which violates it.
pub fn shrink(script: &Script, invariant: Invariant) -> Script {
    let mut shrinker = Shrinker { invariant, plays: 0, best: script.clone() };
    loop {
        let before = shrinker.best.clone();
        shrinker.drop_lines();
        shrinker.shrink_setup();
        shrinker.round_times();
        if shrinker.best == before || shrinker.plays >= PLAYS {
            return shrinker.best;
        }
    }
}

impl Shrinker {
    /// Takes a candidate if it fails alike.
    fn try_out(&mut self, candidate: Script) -> bool {
        if self.plays >= PLAYS || candidate == self.best {
            return false;
        }
        self.plays += 1;
        let violation = play(&candidate, Detail::None).violation;
        let fails = violation.is_some_and(|v| v.invariant == self.invariant);
        if fails {
            self.best = candidate;
        }
        fails
    }

    /// Delta debugging: drops halves, quarters, … single lines.
    fn drop_lines(&mut self) {
        let mut size = self.best.lines.len().div_ceil(2);
        while size > 0 {
            let mut at = 0;
            while at < self.best.lines.len() {
                let mut candidate = self.best.clone();
                let end = (at + size).min(candidate.lines.len());
                let kept = candidate.lines.drain(at..end).filter(is_needed).collect::<Vec<Line>>();
                candidate.lines.splice(at..at, kept.iter().cloned());
                let dropped = candidate.lines.len() < self.best.lines.len();
                if !dropped || !self.try_out(candidate) {
                    at += size;
                }
            }
            size /= 2;
        }
    }

    fn shrink_setup(&mut self) {
        type Change = fn(&mut Script);
        let changes: [Change; 15] = [
            |s| s.setup.steps = s.setup.steps / 2 + 1,
            |s| s.setup.poison = 0,
            |s| s.setup.commit_ms = 20,
            |s| s.setup.heal_ms = 60,
            |s| s.setup.steps -= u64::from(s.setup.steps > 2),
            |s| s.setup.slots = (s.setup.slots / 2).max(2),
            |s| s.setup.max = (s.setup.max - 1).max(s.setup.min),
            |s| s.setup.min = 1,
            |s| s.setup.skew_ppm = 0,
            |s| s.setup.duplicate_in = 0,
            |s| s.setup.latency_ms = 4,
            |s| s.setup.sync_ms = 1,
            |s| s.setup.checkpoint = 0,
            |s| s.setup.give_up_ms = 600_000,
            |s| s.setup.step_ms = 200,
        ];
        for change in changes {
            loop {
                let mut candidate = self.best.clone();
                change(&mut candidate);
                if !self.try_out(candidate) {
                    break;
                }
            }
        }
    }

    fn round_times(&mut self) {
        for at in 0..self.best.lines.len() {
            for unit in [1000, 500, 100, 10] {
                let mut candidate = self.best.clone();
                let Line::At(ms, _) = &mut candidate.lines[at] else { break };
                *ms = ms.next_multiple_of(unit);
                let rounded = *ms;
                let later = candidate.lines[at + 1..].iter().find_map(|line| match line {
                    Line::At(ms, _) => Some(*ms),
                    _ => None,
                });
                if later.is_none_or(|ms| rounded <= ms) && self.try_out(candidate) {
                    break;
                }
            }
        }
    }
}

/// Without its end a history proves nothing.
fn is_needed(line: &Line) -> bool {
    matches!(line, Line::Until(..) | Line::At(_, Action::Repair))
}
