//! What a trainer measures of itself from one mark to the next.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::engine::{Engine, Yardstick};

/// Shortest step deadline.
const STEP_DEADLINE_MIN: Duration = Duration::from_secs(30);
/// First steps of a generation, which may warm caches up and get ten times as long.
const WARM_STEPS: u64 = 5;
/// Steps whose slowest sets the deadline.
const DEADLINE_WINDOW: usize = 100;

/// Sums since the last mark.
pub(super) struct Meter {
    pub since: Instant,
    pub steps: u64,
    pub data_wait: Duration,
    slowest: VecDeque<Duration>,
    pub redone: u64,
}

impl Meter {
    pub fn new(redone: u64) -> Self {
        let slowest = VecDeque::with_capacity(DEADLINE_WINDOW);
        Meter { since: Instant::now(), steps: 0, data_wait: Duration::ZERO, slowest, redone }
    }

    pub fn step_done(&mut self, took: Duration) {
        self.steps += 1;
        if self.slowest.len() == DEADLINE_WINDOW {
            self.slowest.pop_front();
        }
        self.slowest.push_back(took);
    }

    /// Five times the slowest of the last steps, and ten times that while warming up.
    pub fn deadline(&self, steps_here: u64) -> Duration {
        let slowest = self.slowest.iter().max().copied().unwrap_or_default();
        let deadline = STEP_DEADLINE_MIN.max(5 * slowest);
        if steps_here < WARM_STEPS { 10 * deadline } else { deadline }
    }
}

/// Returns the model FLOPs utilisation of a group of `world` workers like this one.
pub(super) fn mfu(yardstick: &Yardstick, images_per_second: f64, world: usize) -> f64 {
    images_per_second * yardstick.flops_per_image / (yardstick.peak * world as f64)
}

/// Returns the memory that a worker has in use, in bytes: of its device, or where that is the host
/// of this process. 0 where the kernel does not say.
pub(super) fn memory_in_use(engine: &dyn Engine) -> u64 {
    engine.device_memory().or_else(resident).unwrap_or(0)
}

/// Returns what the kernel counts as this process's own, in bytes: not files, such as libraries and
/// shards, which it can drop.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let of = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    Some((of("RssAnon:")? + of("RssShmem:")?) << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn utilisation_is_of_all_devices() {
        let yardstick = Yardstick { flops_per_image: 2e9, peak: 100e9 };
        assert_eq!(mfu(&yardstick, 30.0, 1), 0.6);
        assert_eq!(mfu(&yardstick, 30.0, 3), 0.2);
    }

    #[test]
    fn a_process_has_memory_in_use() {
        let before = resident().unwrap();
        let more = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(resident().unwrap() >= before + (more.len() as u64) / 2, "from {before}");
    }
}
