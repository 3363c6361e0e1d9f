//! Samples of a duration and what tables say of them.

use std::time::Duration;

use serde_json::{Value, json};

/// Measured times.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples(Vec<Duration>);

impl Samples {
    /// Adds one.
    pub fn add(&mut self, sample: Duration) {
        self.0.push(sample);
    }

    /// Returns how many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Tells whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the smallest sample that at least this share of all do not exceed.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let mut sorted = self.0.clone();
        sorted.sort();
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.max(1) - 1).copied()
    }

    /// Returns the mean.
    pub fn mean(&self) -> Option<Duration> {
        let n = u32::try_from(self.0.len()).ok().filter(|&n| n > 0)?;
        Some(self.0.iter().sum::<Duration>() / n)
    }

    /// Head of the columns of [`Samples::cells`].
    pub const HEAD: &'static str = "n | min | p50 | p99 | max |\n";

    /// Returns count, smallest, median, 99th percentile and largest, as cells of a table.
    pub fn cells(&self) -> String {
        let cell = |share: f64| {
            self.quantile(share).map_or("–".into(), |time| format!("{:.3} s", time.as_secs_f64()))
        };
        format!("{} | {} | {} | {} | {} |", self.len(), cell(0.0), cell(0.5), cell(0.99), cell(1.0))
    }

    /// Returns all samples in milliseconds.
    pub fn to_json(&self) -> Value {
        json!(self.0.iter().map(|time| millis(*time)).collect::<Vec<f64>>())
    }
}

/// Returns milliseconds with three decimals.
pub fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles() {
        let mut samples = Samples::default();
        assert_eq!(samples.quantile(0.5), None);
        for ms in (1..=100).rev() {
            samples.add(Duration::from_millis(ms));
        }
        let ms = |share: f64| samples.quantile(share).map(|time| time.as_millis());
        assert_eq!([ms(0.0), ms(0.5), ms(0.99), ms(1.0)], [Some(1), Some(50), Some(99), Some(100)]);
        assert_eq!(samples.mean(), Some(Duration::from_micros(50_500)));
        assert_eq!(samples.cells(), "100 | 0.001 s | 0.050 s | 0.099 s | 0.100 s |");
    }
}
