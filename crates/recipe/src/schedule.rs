//! Learning rate: linear warm-up, then half a cosine, set before every update.

use serde::{Deserialize, Serialize};

/// Shape of the learning rate over a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Peak, `base_lr · batch / 256`.
    pub peak: f64,
    /// Value at the end.
    pub min_lr: f64,
    /// Warm-up, in steps (may be fractional: epochs need not be whole).
    pub warmup_steps: f64,
    /// Length of the whole schedule, in steps.
    pub total_steps: f64,
}

/// Learning rate at a fractional `place` of a schedule of length `total`, both in one unit.
///
/// `place < warmup`: `peak · place / warmup`; else
/// `min + (peak − min) · (1 + cos(π (place − warmup) / (total − warmup))) / 2`.
pub fn lr_at(place: f64, peak: f64, warmup: f64, total: f64, min_lr: f64) -> f64 {
    if place < warmup {
        return peak * place / warmup;
    }
    let rest = total - warmup;
    let along = if rest > 0.0 { ((place - warmup) / rest).min(1.0) } else { 1.0 };
    min_lr + (peak - min_lr) * 0.5 * (1.0 + libm::cos(std::f64::consts::PI * along))
}

impl Schedule {
    /// Returns the learning rate of the update that step `step` makes; the first is exactly 0.
    pub fn lr(&self, step: u64) -> f64 {
        lr_at(step as f64, self.peak, self.warmup_steps, self.total_steps, self.min_lr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// T11: every row of the two golden schedules.
    #[test]
    fn golden_schedules() {
        let text = include_str!("../../../tests/golden/golden.json");
        let golden: serde_json::Value = serde_json::from_str(text).unwrap();
        for (key, epochs) in [("lr_800", 800.0), ("lr_1600", 1600.0)] {
            for (label, want) in golden[key].as_object().unwrap() {
                let numbers: Vec<f64> =
                    label.split([',', '=']).filter_map(|part| part.parse().ok()).collect();
                let place = numbers[0] + numbers[1] / 312.0;
                let got = lr_at(place, 2.4e-3, 40.0, epochs, 0.0);
                let want = want.as_f64().unwrap();
                assert!((got - want).abs() <= 1e-15 + 1e-12 * want, "{key} {label}: {got} {want}");
            }
        }
    }

    #[test]
    fn steps_and_epochs_agree() {
        let schedule = Schedule {
            peak: 2.4e-3,
            min_lr: 0.0,
            warmup_steps: 40.0 * 312.0,
            total_steps: 800.0 * 312.0,
        };
        assert_eq!(schedule.lr(0), 0.0);
        let by_epoch = lr_at(420.0, 2.4e-3, 40.0, 800.0, 0.0);
        assert!((schedule.lr(420 * 312) - by_epoch).abs() < 1e-15);
        assert_eq!(
            schedule.lr(800 * 312),
            schedule.lr(900 * 312),
            "past the end it stays at the end"
        );
    }

    #[test]
    fn no_warmup_and_nothing_but_warmup() {
        assert_eq!(lr_at(0.0, 1.0, 0.0, 10.0, 0.1), 1.0);
        assert_eq!(lr_at(10.0, 1.0, 10.0, 10.0, 0.1), 0.1);
    }
}
