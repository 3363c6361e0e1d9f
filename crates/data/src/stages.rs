//! How long one thread takes for each part of turning a sample into pixels.
//!
//! The parts are those of [`SampleReader`]: reading with its checksum, decoding as far as the crop
//! needs it, and cutting, resizing and mirroring. They are measured on one data set's samples in
//! the order in which a loader takes them.

use std::time::{Duration, Instant};

use lacuna_pixels::{Codec, DecodeError, Decoder, ImageShape, probe};
use lacuna_recipe::augment::{Augment, CropBox, Size};
use lacuna_recipe::order::{EpochOrder, OrderSpec};
use lacuna_types::SampleId;

use crate::dataset::Dataset;
use crate::planes::PlaneCache;
use crate::reader::{SampleError, SampleReader};

/// Samples that are read through planes, at most: a second time each, so they are remembered.
const FROM_PLANES_MAX: usize = 1 << 16;

/// Which work is measured.
#[derive(Clone, Debug)]
pub struct StageConfig<'a> {
    /// The data.
    pub dataset: &'a Dataset,
    /// The order in which its samples are taken, and the seed of their crops.
    pub order: &'a OrderSpec,
    /// How crops are drawn.
    pub augment: Augment,
    /// What is made of each sample.
    pub shape: ImageShape,
    /// A cache of this data's planes, to be measured too.
    pub planes: Option<&'a PlaneCache>,
    /// About how long each of the two or three measurements takes, at least one sample each.
    pub time: Duration,
}

/// Work on some samples, and the time it took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stage {
    /// Samples.
    pub n: u64,
    /// Bytes of their encoded images.
    pub bytes: u64,
    /// Seconds.
    pub seconds: f64,
}

impl Stage {
    fn add(&mut self, bytes: u64, took: Duration) {
        self.n += 1;
        self.bytes += bytes;
        self.seconds += took.as_secs_f64();
    }

    /// Returns the seconds of a sample; 0 where none was measured.
    pub fn seconds_each(&self) -> f64 {
        if self.n == 0 { 0.0 } else { self.seconds / self.n as f64 }
    }

    /// Returns samples a second.
    pub fn rate(&self) -> f64 {
        self.n as f64 / self.seconds.max(f64::MIN_POSITIVE)
    }

    /// Returns bytes a second, of encoded images.
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.seconds.max(f64::MIN_POSITIVE)
    }
}

/// What one thread takes for each part.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stages {
    /// Bytes from the disk, or from what the system keeps of it in memory, and their checksum.
    pub read: Stage,
    /// Decoding whole images, which training does not do.
    pub decode_whole: Stage,
    /// Decoding as far as the crop needs it.
    pub decode: Stage,
    /// Cutting, resizing and mirroring what was decoded.
    pub resize: Stage,
    /// All of it from planes that are in the cache, reading them included; empty without a cache,
    /// or where it takes none of the images.
    pub planes: Stage,
    /// How many of the decoded images were JPEG.
    pub n_jpeg: u64,
    /// Samples that were left out because they are bad.
    pub n_bad: u64,
}

/// Measures the parts on the first samples of the order, beginning again at its end.
///
/// Fails where samples cannot be read, or none of those looked at is good.
pub fn measure(config: &StageConfig<'_>) -> Result<Stages, SampleError> {
    let order = EpochOrder::new(config.order, 0);
    let n_samples = config.dataset.n_samples();
    let id_at = |i: u64| order.sample_at(i % n_samples);
    // First of all, while nothing else has brought the bytes into memory.
    let mut stages = Stages { read: reading(config, &id_at)?, ..Stages::default() };
    let mut out = vec![0u8; config.shape.bytes()];
    decoding(config, &id_at, &mut out, &mut stages)?;
    if let Some(cache) = config.planes {
        stages.planes = from_planes(config, cache, &id_at, &mut out)?;
    }
    Ok(stages)
}

fn reading(
    config: &StageConfig<'_>,
    id_at: &dyn Fn(u64) -> SampleId,
) -> Result<Stage, SampleError> {
    let mut stage = Stage::default();
    let mut bytes: Vec<u8> = Vec::new();
    let start = Instant::now();
    for i in 0.. {
        let begun = Instant::now();
        let read = config.dataset.read(id_at(i), &mut bytes).map_err(SampleError::from);
        // Corrupt bytes were read like any others.
        if let Err(error) = read
            && !error.is_bad_sample()
        {
            return Err(error);
        }
        stage.add(bytes.len() as u64, begun.elapsed());
        if start.elapsed() >= config.time {
            break;
        }
    }
    Ok(stage)
}

fn decoding(
    config: &StageConfig<'_>,
    id_at: &dyn Fn(u64) -> SampleId,
    out: &mut [u8],
    stages: &mut Stages,
) -> Result<(), SampleError> {
    let (mut decoder, mut bytes) = (Decoder::new(), Vec::new());
    let mut first_bad: Option<SampleError> = None;
    let start = Instant::now();
    for i in 0.. {
        match decode_one(config, id_at(i), &mut decoder, &mut bytes, out, stages) {
            Ok(()) => {}
            Err(error) if error.is_bad_sample() => {
                stages.n_bad += 1;
                first_bad.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
        if start.elapsed() >= config.time {
            break;
        }
    }
    match first_bad {
        Some(error) if stages.decode.n == 0 => Err(error),
        _ => Ok(()),
    }
}

fn decode_one(
    config: &StageConfig<'_>,
    id: SampleId,
    decoder: &mut Decoder,
    bytes: &mut Vec<u8>,
    out: &mut [u8],
    stages: &mut Stages,
) -> Result<(), SampleError> {
    config.dataset.read(id, bytes)?;
    let failed = |source: DecodeError| SampleError::Decode {
        place: Box::new(config.dataset.place(id)),
        source,
    };
    let begun = Instant::now();
    decoder.decode(bytes).map_err(failed)?;
    let whole = begun.elapsed();
    let begun = Instant::now();
    let info = probe(bytes).map_err(failed)?;
    let (crop, flip) = config.augment.draw(config.order.seed, 0, id.0, info.size);
    decoder.decode_box(bytes, crop).map_err(failed)?;
    let decoded = begun.elapsed();
    let begun = Instant::now();
    decoder.render(crop, flip, config.shape, out).map_err(failed)?;
    let resized = begun.elapsed();
    let n = bytes.len() as u64;
    stages.decode_whole.add(n, whole);
    stages.decode.add(n, decoded);
    stages.resize.add(n, resized);
    stages.n_jpeg += u64::from(info.codec == Codec::Jpeg);
    Ok(())
}

/// Fills the cache with some samples' planes, and measures crops of another epoch from them.
fn from_planes(
    config: &StageConfig<'_>,
    cache: &PlaneCache,
    id_at: &dyn Fn(u64) -> SampleId,
    out: &mut [u8],
) -> Result<Stage, SampleError> {
    let mut reader = SampleReader::new();
    let mut render = |id: SampleId, epoch: u32| {
        let choose = |size: Size| -> (CropBox, bool) {
            config.augment.draw(config.order.seed, epoch, id.0, size)
        };
        reader.render_cached(cache, config.dataset, id, choose, config.shape, out)
    };
    let mut filled: Vec<SampleId> = Vec::new();
    let start = Instant::now();
    for i in 0..config.dataset.n_samples() {
        match render(id_at(i), 0) {
            Ok(()) => filled.push(id_at(i)),
            Err(error) if error.is_bad_sample() => {}
            Err(error) => return Err(error),
        }
        if filled.len() == FROM_PLANES_MAX || start.elapsed() >= config.time {
            break;
        }
    }
    let mut stage = Stage::default();
    let start = Instant::now();
    for &id in filled.iter().cycle() {
        let before = cache.stats().hits;
        let begun = Instant::now();
        render(id, 1)?;
        let took = begun.elapsed();
        if cache.stats().hits > before {
            stage.add(config.dataset.index().record(id).bytes.into(), took);
        }
        if start.elapsed() >= config.time {
            break;
        }
    }
    Ok(stage)
}

#[cfg(test)]
mod tests;
