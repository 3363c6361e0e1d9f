//! Seeded random numbers for tools: a seed replays.

use std::time::Duration;

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Starts from a seed.
    pub fn new(seed: u64) -> Self {
        Dice(seed)
    }

    /// Starts a sequence of its own from this seed and a name.
    pub fn named(seed: u64, name: &str) -> Self {
        let mut dice = Dice(seed);
        for byte in name.bytes() {
            dice.0 = dice.draw() ^ u64::from(byte);
        }
        dice
    }

    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number from 0 to `n - 1`.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "no number is below 0");
        (self.draw() % n as u64) as usize
    }

    /// Returns a number from 0 up to 1.
    pub fn unit(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Tells whether something of this probability happens.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// Returns one of the items.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        if items.is_empty() { None } else { items.get(self.below(items.len())) }
    }

    /// Returns a time between two numbers of milliseconds.
    pub fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below((to - from + 1) as usize) as u64)
    }

    /// Returns a time to the next event of a Poisson process.
    pub fn exponential(&mut self, mean: Duration) -> Duration {
        mean.mul_f64(-(1.0 - self.unit()).ln())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_replays_and_names_differ() {
        let draws = |mut dice: Dice| [dice.below(1000), dice.below(1000), dice.below(1000)];
        assert_eq!(draws(Dice::named(7, "a")), draws(Dice::named(7, "a")));
        assert_ne!(draws(Dice::named(7, "a")), draws(Dice::named(7, "b")));
        assert_ne!(draws(Dice::named(7, "a")), draws(Dice::named(8, "a")));
    }

    #[test]
    fn times_between_events_have_their_mean() {
        let mut dice = Dice::new(1);
        let sum: f64 =
            (0..20_000).map(|_| dice.exponential(Duration::from_secs(15)).as_secs_f64()).sum();
        // The standard error of the mean is 15 s / sqrt(20,000) = 0.11 s.
        assert!((sum / 20_000.0 - 15.0).abs() < 0.5, "{}", sum / 20_000.0);
    }
}
