//! What a loader has done, in numbers that a monitoring system reads.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lacuna_store::StoreStats;

use super::{Inner, Loader};
use crate::chunks::ChunkStats;
use crate::planes::CacheStats;

/// Upper bounds of the histogram of times that a sample takes, in microseconds.
pub const SAMPLE_BOUNDS_US: [u64; 11] =
    [125, 250, 500, 1000, 2000, 4000, 8000, 16_000, 64_000, 256_000, 1_024_000];

/// Counters that loading threads and the consumer share.
#[derive(Debug, Default)]
pub(super) struct Meters {
    samples: AtomicU64,
    sample_us: AtomicU64,
    /// One more than there are bounds.
    histogram: [AtomicU64; SAMPLE_BOUNDS_US.len() + 1],
    slots: AtomicU64,
    waited_us: AtomicU64,
    ready: AtomicU64,
    step: AtomicU64,
}

impl Meters {
    /// Takes note of a sample that was read and rendered.
    pub fn sample(&self, took: Duration) {
        let us = took.as_micros() as u64;
        let place = SAMPLE_BOUNDS_US.partition_point(|&bound| bound < us);
        self.samples.fetch_add(1, Ordering::Relaxed);
        self.sample_us.fetch_add(us, Ordering::Relaxed);
        self.histogram[place].fetch_add(1, Ordering::Relaxed);
    }

    /// Takes note of a delivered slot: of which step, how long it was waited for, and how many more
    /// were ready.
    pub fn delivered(&self, step: u64, waited: Duration, ready: usize) {
        self.slots.fetch_add(1, Ordering::Relaxed);
        self.waited_us.fetch_add(waited.as_micros() as u64, Ordering::Relaxed);
        self.ready.store(ready as u64, Ordering::Relaxed);
        self.step.store(step, Ordering::Relaxed);
    }
}

/// What a loader has done so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoaderStats {
    /// Samples read and rendered, those of slots that were thrown away too.
    pub samples: u64,
    /// Time that they took, in microseconds over all threads.
    pub sample_us: u64,
    /// How many took up to each of [`SAMPLE_BOUNDS_US`], each bound by itself, and last how many
    /// took longer.
    pub histogram: Vec<u64>,
    /// Slots delivered.
    pub slots: u64,
    /// Time that the consumer waited for them, in microseconds.
    pub waited_us: u64,
    /// Slots that were ready when the last one was taken.
    pub ready: u64,
    /// Epochs behind the last delivered step, with a fraction.
    pub epochs: f64,
    /// Bad samples that were met.
    pub bad: u64,
    /// Bytes of samples read from files of the data set.
    pub file_bytes: u64,
    /// What its store has done.
    pub store: StoreStats,
    /// What its cache of chunks has done.
    pub chunks: Option<ChunkStats>,
    /// What its cache of planes has done.
    pub planes: Option<CacheStats>,
}

/// Looks at a loader from another thread, as long as that lives.
#[derive(Clone, Debug)]
pub struct LoaderWatch(Arc<Inner>);

impl Loader {
    /// Returns what was done so far.
    pub fn stats(&self) -> LoaderStats {
        self.watch().stats()
    }

    /// Returns something to look at it from another thread.
    pub fn watch(&self) -> LoaderWatch {
        LoaderWatch(self.inner.clone())
    }
}

impl LoaderWatch {
    /// Returns what was done so far.
    pub fn stats(&self) -> LoaderStats {
        let Inner { config, meters, n_bad, .. } = &*self.0;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let per_epoch = config.geometry.steps_per_epoch().max(1);
        LoaderStats {
            samples: get(&meters.samples),
            sample_us: get(&meters.sample_us),
            histogram: meters.histogram.iter().map(get).collect(),
            slots: get(&meters.slots),
            waited_us: get(&meters.waited_us),
            ready: get(&meters.ready),
            epochs: get(&meters.step) as f64 / per_epoch as f64,
            bad: get(n_bad),
            file_bytes: config.dataset.file_bytes(),
            store: config.dataset.store_stats(),
            chunks: config.dataset.chunks().map(|chunks| chunks.stats()),
            planes: config.planes.as_ref().map(|planes| planes.stats()),
        }
    }
}

impl LoaderStats {
    /// Writes the numbers in Prometheus' text format, each with these labels.
    pub fn prometheus(&self, labels: &[(&str, &str)]) -> String {
        let escaped =
            |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let labels: Vec<String> =
            labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let mut page = Page { labels: labels.join(","), text: String::new() };
        let seconds = |us: u64| us as f64 / 1e6;
        page.counter("wait_seconds_total", "time that steps waited", seconds(self.waited_us));
        page.counter("slots_total", "slots delivered", self.slots as f64);
        page.gauge("slots_ready", "slots ready when the last was taken", self.ready as f64);
        page.gauge("epochs", "epochs behind the last delivered step", self.epochs);
        page.counter("bad_samples_total", "bad samples met", self.bad as f64);
        page.histogram(self);
        let files = ("source=\"files\"", self.file_bytes as f64);
        let store = ("source=\"store\"", self.store.bytes as f64);
        page.series("read_bytes_total", "counter", "bytes read, by source", &[files, store]);
        page.counter("store_requests_total", "requests of ranges", self.store.requests as f64);
        page.counter("store_retries_total", "requests made again", self.store.retries as f64);
        if let Some(chunks) = &self.chunks {
            let hits = ("cache=\"chunks\",found=\"yes\"", chunks.hits as f64);
            let misses = ("cache=\"chunks\",found=\"no\"", chunks.misses as f64);
            page.series("cache_reads_total", "counter", "look-ups of caches", &[hits, misses]);
            page.counter("chunk_downloads_total", "chunks downloaded", chunks.downloads as f64);
            page.counter("chunk_evictions_total", "chunks removed", chunks.evictions as f64);
            page.counter("chunk_damaged_total", "damaged chunk files", chunks.damaged as f64);
        }
        if let Some(planes) = &self.planes {
            let hits = ("found=\"yes\"", planes.hits as f64);
            let misses = ("found=\"no\"", planes.misses as f64);
            page.series("plane_reads_total", "counter", "look-ups of planes", &[hits, misses]);
            page.gauge("plane_bytes", "bytes of planes on the disk", planes.bytes as f64);
            page.counter("plane_damaged_total", "damaged planes", planes.damaged as f64);
        }
        page.text
    }
}

/// A page of Prometheus' text format.
struct Page {
    labels: String,
    text: String,
}

impl Page {
    fn counter(&mut self, name: &str, help: &str, value: f64) {
        self.series(name, "counter", help, &[("", value)]);
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.series(name, "gauge", help, &[("", value)]);
    }

    fn series(&mut self, name: &str, kind: &str, help: &str, values: &[(&str, f64)]) {
        self.head(name, kind, help);
        values.iter().for_each(|(labels, value)| self.line(name, labels, *value));
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let text = &mut self.text;
        let _ =
            write!(text, "# HELP lacuna_data_{name} {help}\n# TYPE lacuna_data_{name} {kind}\n");
    }

    fn line(&mut self, name: &str, more: &str, value: f64) {
        let both = [self.labels.as_str(), more];
        let both: Vec<&str> = both.into_iter().filter(|labels| !labels.is_empty()).collect();
        let labels = match both.join(",") {
            none if none.is_empty() => none,
            some => format!("{{{some}}}"),
        };
        let _ = writeln!(self.text, "lacuna_data_{name}{labels} {value}");
    }

    fn histogram(&mut self, stats: &LoaderStats) {
        let name = "sample_seconds";
        self.head(name, "histogram", "time to read and render a sample");
        let mut below = 0;
        for (bound, n) in SAMPLE_BOUNDS_US.iter().zip(&stats.histogram) {
            below += n;
            let le = format!("le=\"{}\"", *bound as f64 / 1e6);
            self.line("sample_seconds_bucket", &le, below as f64);
        }
        self.line("sample_seconds_bucket", "le=\"+Inf\"", stats.samples as f64);
        self.line("sample_seconds_sum", "", stats.sample_us as f64 / 1e6);
        self.line("sample_seconds_count", "", stats.samples as f64);
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn numbers_in_prometheus_text_format() {
        let meters = Meters::default();
        for us in [90, 250, 251, 2_000_000] {
            meters.sample(Duration::from_micros(us));
        }
        let stats = LoaderStats {
            samples: 4,
            sample_us: 2_000_591,
            histogram: meters.histogram.iter().map(|n| n.load(Ordering::Relaxed)).collect(),
            slots: 3,
            waited_us: 1_500_000,
            ready: 2,
            epochs: 1.25,
            bad: 1,
            file_bytes: 700,
            chunks: Some(ChunkStats { hits: 5, misses: 1, ..ChunkStats::default() }),
            ..LoaderStats::default()
        };
        let text = stats.prometheus(&[("run", "a\"b"), ("worker", "n:cpu0")]);
        let shown: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        expect![[r#"
            lacuna_data_wait_seconds_total{run="a\"b",worker="n:cpu0"} 1.5
            lacuna_data_slots_total{run="a\"b",worker="n:cpu0"} 3
            lacuna_data_slots_ready{run="a\"b",worker="n:cpu0"} 2
            lacuna_data_epochs{run="a\"b",worker="n:cpu0"} 1.25
            lacuna_data_bad_samples_total{run="a\"b",worker="n:cpu0"} 1
            lacuna_data_sample_seconds_bucket{run="a\"b",worker="n:cpu0",le="0.000125"} 1
            lacuna_data_sample_seconds_bucket{run="a\"b",worker="n:cpu0",le="0.00025"} 2
            lacuna_data_sample_seconds_bucket{run="a\"b",worker="n:cpu0",le="0.0005"} 3
            lacuna_data_sample_seconds_bucket{run="a\"b",worker="n:cpu0",le="0.001"} 3
            lacuna_data_sample_seconds_bucket{run="a\"b",worker="n:cpu0",le="0.002"} 3
            lacuna_data_sample_seconds_bucket{run="a\"b",worker="n:cpu0",le="0.004"} 3
            lacuna_data_sample_seconds_bucket{run="a\"b",worker="n:cpu0",le="0.008"} 3
            lacuna_data_sample_seconds_bucket{run="a\"b",worker="n:cpu0",le="0.016"} 3
            lacuna_data_sample_seconds_bucket{run="a\"b",worker="n:cpu0",le="0.064"} 3
            lacuna_data_sample_seconds_bucket{run="a\"b",worker="n:cpu0",le="0.256"} 3
            lacuna_data_sample_seconds_bucket{run="a\"b",worker="n:cpu0",le="1.024"} 3
            lacuna_data_sample_seconds_bucket{run="a\"b",worker="n:cpu0",le="+Inf"} 4
            lacuna_data_sample_seconds_sum{run="a\"b",worker="n:cpu0"} 2.000591
            lacuna_data_sample_seconds_count{run="a\"b",worker="n:cpu0"} 4
            lacuna_data_read_bytes_total{run="a\"b",worker="n:cpu0",source="files"} 700
            lacuna_data_read_bytes_total{run="a\"b",worker="n:cpu0",source="store"} 0
            lacuna_data_store_requests_total{run="a\"b",worker="n:cpu0"} 0
            lacuna_data_store_retries_total{run="a\"b",worker="n:cpu0"} 0
            lacuna_data_cache_reads_total{run="a\"b",worker="n:cpu0",cache="chunks",found="yes"} 5
            lacuna_data_cache_reads_total{run="a\"b",worker="n:cpu0",cache="chunks",found="no"} 1
            lacuna_data_chunk_downloads_total{run="a\"b",worker="n:cpu0"} 0
            lacuna_data_chunk_evictions_total{run="a\"b",worker="n:cpu0"} 0
            lacuna_data_chunk_damaged_total{run="a\"b",worker="n:cpu0"} 0
        "#]]
        .assert_eq(&(shown.join("\n") + "\n"));
        let helped = text.lines().filter(|line| line.starts_with("# HELP")).count();
        assert_eq!(helped, text.lines().filter(|line| line.starts_with("# TYPE")).count());
        assert_eq!(LoaderStats::default().prometheus(&[]).matches('{').count(), 3);
    }
}
