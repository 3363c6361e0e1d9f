//! What holds the loader back, from how long its parts take.

use serde_json::{Value, json};

use lacuna_spec::units::grouped;

/// A loader that gives less than this share of what its threads could is held back by itself: noise
/// between two short measurements on a quiet machine is a few per cent.
const PIPELINE_SHARE: f64 = 0.9;

/// What was measured. Times are seconds that one core takes for an image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Figures {
    /// Reading and checksum.
    pub read: f64,
    /// Decoding as far as the crop needs it.
    pub decode: f64,
    /// Cutting, resizing, mirroring.
    pub resize: f64,
    /// All of it from planes that are in the cache.
    pub planes: f64,
    /// Share of the loader's images that came from planes, 0 to 1.
    pub planes_share: f64,
    /// Threads of the loader.
    pub threads: usize,
    /// Cores of this machine.
    pub cores: usize,
    /// Images a second that the loader gave.
    pub loader: f64,
    /// Whether a cache of planes would take these images and none was used.
    pub may_cache: bool,
}

/// What takes the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bottleneck {
    /// Bytes come slowly.
    Reading,
    /// Entropy decoding and what follows it.
    Decoding,
    /// Cutting, resizing, mirroring.
    Resizing,
    /// Reading planes, smoothing, colours and resizing.
    Planes,
    /// Threads wait for something else than their own work.
    Pipeline,
}

impl Bottleneck {
    /// The word of the JSON output.
    pub(super) fn word(self) -> &'static str {
        match self {
            Bottleneck::Reading => "reading",
            Bottleneck::Decoding => "decoding",
            Bottleneck::Resizing => "resizing",
            Bottleneck::Planes => "planes",
            Bottleneck::Pipeline => "pipeline",
        }
    }
}

impl Figures {
    /// Returns the seconds of an image in reading, decoding, resizing and planes, as the loader had
    /// them.
    pub(super) fn parts(&self) -> [(Bottleneck, f64); 4] {
        let decoded = 1.0 - self.planes_share;
        [
            (Bottleneck::Reading, decoded * self.read),
            (Bottleneck::Decoding, decoded * self.decode),
            (Bottleneck::Resizing, decoded * self.resize),
            (Bottleneck::Planes, self.planes_share * self.planes),
        ]
    }

    /// Returns the seconds of an image on one core.
    pub(super) fn image_seconds(&self) -> f64 {
        self.parts().iter().map(|(_, seconds)| seconds).sum::<f64>().max(f64::MIN_POSITIVE)
    }

    /// Returns a part's share of the time of an image.
    pub(super) fn share(&self, part: Bottleneck) -> f64 {
        let parts = self.parts();
        let found = parts.iter().find(|(other, _)| *other == part);
        found.map_or(0.0, |(_, seconds)| seconds / self.image_seconds())
    }

    /// Returns the images a second that the parts allow.
    pub(super) fn ceiling(&self) -> f64 {
        self.threads.min(self.cores) as f64 / self.image_seconds()
    }

    /// Returns the loader's share of what its parts allow.
    pub(super) fn efficiency(&self) -> f64 {
        self.loader / self.ceiling()
    }

    /// Names what holds the loader back.
    pub(super) fn bottleneck(&self) -> Bottleneck {
        if self.efficiency() < PIPELINE_SHARE {
            return Bottleneck::Pipeline;
        }
        let longest = self.parts().into_iter().max_by(|a, b| a.1.total_cmp(&b.1));
        longest.map_or(Bottleneck::Decoding, |(part, _)| part)
    }

    /// Says what holds the loader back, and what to do about it.
    pub(super) fn sentence(&self) -> String {
        let part = self.bottleneck();
        let share = 100.0 * self.share(part);
        match part {
            Bottleneck::Reading => format!(
                "reading ({share:.0} % of the time): a faster disk, or a copy of the data on a \
                 local one{}",
                self.more_threads(", or")
            ),
            Bottleneck::Decoding => {
                let cache = match self.may_cache {
                    true => ", `data.cache` on a local disk, which keeps what is decoded",
                    false => "",
                };
                format!("decoding ({share:.0} % of the time){}{cache}", self.more_threads(":"))
            }
            Bottleneck::Resizing => format!(
                "resizing ({share:.0} % of the time){}, images stored smaller",
                self.more_threads(":")
            ),
            Bottleneck::Planes => format!(
                "crops from planes ({share:.0} % of the time), nearly all of it resizing{}",
                self.more_threads(":")
            ),
            Bottleneck::Pipeline => format!(
                "the pipeline itself: {} {} {:.0} % of what the parts allow. Other programs \
                 take the cores, or the disk does not serve as many readers at once",
                plural(self.threads, "thread"),
                if self.threads == 1 { "gives" } else { "give" },
                100.0 * self.efficiency()
            ),
        }
    }

    /// Advises to use the cores that are left, or to get more.
    fn more_threads(&self, before: &str) -> String {
        match self.cores.checked_sub(self.threads) {
            Some(1..) => format!("{before} more threads (this machine has {} cores)", self.cores),
            _ => format!("{before} more cores (all {} are used)", self.cores),
        }
    }

    /// Returns the threads, on as many cores, that give `rate` images a second.
    pub(super) fn threads_for(&self, rate: f64) -> u64 {
        let each = self.efficiency().min(1.0) / self.image_seconds();
        (rate / each).ceil().max(1.0) as u64
    }

    /// Says what a model needs that takes `rate` images a second.
    pub(super) fn need(&self, rate: f64) -> String {
        let threads = self.threads_for(rate);
        let has = match threads <= self.cores as u64 {
            true => format!("this machine has {}", self.cores),
            false => format!("this machine has only {}", self.cores),
        };
        let noun = if threads == 1 { "thread" } else { "threads" };
        let (rate, threads) = (grouped(rate as u64), grouped(threads));
        format!("{rate} images/s: {threads} {noun} on as many cores; {has}")
    }

    /// The same for programs.
    pub(super) fn need_json(&self, rate: f64) -> Value {
        let threads = self.threads_for(rate);
        json!({
            "images_per_second": rate, "threads": threads, "cores": threads,
            "enough_cores": threads <= self.cores as u64,
        })
    }
}

fn plural(n: usize, noun: &str) -> String {
    let s = if n == 1 { "" } else { "s" };
    format!("{n} {noun}{s}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A core that does 100 images a second, of whose time decoding is 70 %.
    const DECODES: Figures = Figures {
        read: 0.001,
        decode: 0.007,
        resize: 0.002,
        planes: 0.0,
        planes_share: 0.0,
        threads: 2,
        cores: 8,
        loader: 196.0,
        may_cache: true,
    };

    #[test]
    fn the_longest_part_is_named_with_what_helps() {
        let reads = Figures { read: 0.02, loader: 69.0, ..DECODES };
        let resizes = Figures { resize: 0.03, threads: 8, loader: 210.0, ..DECODES };
        let planes = Figures { planes: 0.004, planes_share: 1.0, loader: 480.0, ..DECODES };
        let full = Figures { threads: 9, loader: 790.0, may_cache: false, ..DECODES };
        let found = [DECODES, reads, resizes, planes, full].map(|figures| figures.sentence());
        let cores = "more threads (this machine has 8 cores)";
        let wanted = [
            format!(
                "decoding (70 % of the time): {cores}, `data.cache` on a local disk, which keeps \
                 what is decoded"
            ),
            format!(
                "reading (69 % of the time): a faster disk, or a copy of the data on a local one, \
                 or {cores}"
            ),
            "resizing (79 % of the time): more cores (all 8 are used), images stored smaller"
                .to_string(),
            format!("crops from planes (100 % of the time), nearly all of it resizing: {cores}"),
            "decoding (70 % of the time): more cores (all 8 are used)".to_string(),
        ];
        assert_eq!(found, wanted);
    }

    #[test]
    fn a_loader_below_its_parts_is_its_own_bottleneck() {
        let at = |loader| Figures { loader, ..DECODES }.bottleneck();
        assert_eq!([at(179.0), at(181.0)], [Bottleneck::Pipeline, Bottleneck::Decoding]);
        // Threads beyond the cores promise nothing.
        let crowded = Figures { threads: 16, cores: 2, ..DECODES };
        assert_eq!((crowded.ceiling(), crowded.bottleneck()), (200.0, Bottleneck::Decoding));
        let slow = Figures { threads: 1, loader: 20.0, ..DECODES };
        assert_eq!(
            slow.sentence(),
            "the pipeline itself: 1 thread gives 20 % of what the parts allow. Other programs take \
             the cores, or the disk does not serve as many readers at once"
        );
    }

    #[test]
    fn planes_count_by_how_many_came_from_them() {
        let half = Figures { planes: 0.004, planes_share: 0.5, ..DECODES };
        assert!((half.image_seconds() - 0.007).abs() < 1e-12);
        assert!((half.share(Bottleneck::Decoding) - 0.5).abs() < 1e-12);
        let shares: f64 = half.parts().iter().map(|(part, _)| half.share(*part)).sum();
        assert!((shares - 1.0).abs() < 1e-12);
    }

    #[test]
    fn what_a_model_needs() {
        let exact = Figures { loader: 200.0, ..DECODES };
        let needs = [54_000.0, 90.0].map(|rate| exact.need(rate));
        let wanted = [
            "54,000 images/s: 540 threads on as many cores; this machine has only 8",
            "90 images/s: 1 thread on as many cores; this machine has 8",
        ];
        assert_eq!(needs, wanted);
        let half = Figures { loader: 100.0, ..DECODES };
        assert_eq!((half.threads_for(400.0), exact.threads_for(401.0)), (8, 5));
        assert_eq!(half.need_json(401.0)["enough_cores"], false);
    }
}
