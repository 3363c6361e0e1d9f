//! Numbers about saving: how long steps stood still for it, and how parts got to the store.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counts what one worker saves; shared by the step loop, the thread that writes, and whoever
/// looks.
#[derive(Clone, Debug, Default)]
pub struct SaveMeter(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    snapshots: AtomicU64,
    stall_us: AtomicU64,
    parts: AtomicU64,
    write_us: AtomicU64,
    write_bytes: AtomicU64,
    failures: AtomicU64,
}

impl SaveMeter {
    /// The state was copied aside, for which training stood still so long.
    pub fn stalled(&self, time: Duration) {
        self.0.snapshots.fetch_add(1, Ordering::Relaxed);
        self.0.stall_us.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }

    /// A part became durable.
    pub fn wrote(&self, bytes: u64, time: Duration) {
        self.0.parts.fetch_add(1, Ordering::Relaxed);
        self.0.write_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.0.write_us.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }

    /// A part was not written.
    pub fn failed(&self) {
        self.0.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// Writes the numbers in Prometheus' text format, each with these labels, which need no
    /// escaping.
    pub fn prometheus(&self, labels: &[(&str, &str)]) -> String {
        let labels: Vec<String> = labels.iter().map(|(k, v)| format!("{k}=\"{v}\"")).collect();
        let labels = labels.join(",");
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let seconds = |counter: &AtomicU64| get(counter) as f64 / 1e6;
        let counts = &self.0;
        let all: [(&str, &str, f64); 6] = [
            ("snapshots_total", "states copied aside", get(&counts.snapshots) as f64),
            ("stall_seconds_total", "time that steps stood still", seconds(&counts.stall_us)),
            ("parts_total", "parts made durable", get(&counts.parts) as f64),
            ("write_seconds_total", "time to make parts durable", seconds(&counts.write_us)),
            ("write_bytes_total", "bytes of durable parts", get(&counts.write_bytes) as f64),
            ("failures_total", "parts that were not written", get(&counts.failures) as f64),
        ];
        let mut text = String::new();
        for (name, help, value) in all {
            let name = format!("lacuna_checkpoint_{name}");
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} counter\n");
            let _ = writeln!(text, "{name}{{{labels}}} {value}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn numbers_in_prometheus_text_format() {
        let meter = SaveMeter::default();
        meter.stalled(Duration::from_micros(2_500));
        meter.wrote(4096, Duration::from_secs(2));
        meter.failed();
        let text = meter.prometheus(&[("run", "a"), ("worker", "n:cpu0")]);
        let shown: String =
            text.lines().filter(|l| !l.starts_with('#')).map(|l| format!("{l}\n")).collect();
        expect![[r#"
            lacuna_checkpoint_snapshots_total{run="a",worker="n:cpu0"} 1
            lacuna_checkpoint_stall_seconds_total{run="a",worker="n:cpu0"} 0.0025
            lacuna_checkpoint_parts_total{run="a",worker="n:cpu0"} 1
            lacuna_checkpoint_write_seconds_total{run="a",worker="n:cpu0"} 2
            lacuna_checkpoint_write_bytes_total{run="a",worker="n:cpu0"} 4096
            lacuna_checkpoint_failures_total{run="a",worker="n:cpu0"} 1
        "#]]
        .assert_eq(&shown);
    }
}
