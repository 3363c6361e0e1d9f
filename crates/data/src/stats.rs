//! Numbers about a data set: channel statistics, and the losses of predictors that learn nothing.

use lacuna_types::SampleId;

use crate::dataset::Dataset;
use crate::files::chain;
use crate::reader::{SampleError, SampleReader};
use crate::{OnProgress, Progress, SkipList};
use lacuna_pixels::ImageShape;

/// Added to a patch's variance before its root is taken, as in the objective.
const VARIANCE_EPS: f64 = 1e-6;

/// Samples between two calls of the progress function.
const PROGRESS_EVERY: u64 = 64;

/// Numbers that cannot be computed.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// Reading failed.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// None of the images could be used.
    #[error("none of the {n} images looked at can be decoded; the first: {first}")]
    NoImages {
        /// Images looked at.
        n: u64,
        /// What is wrong with the first of them.
        first: String,
    },
    /// The patch does not tile the image.
    #[error("`patch_size` = {patch_size} must divide {height}x{width} and be at least 2 values")]
    PatchSize {
        /// Side of a patch.
        patch_size: u32,
        /// Rows of an image.
        height: u32,
        /// Columns of an image.
        width: u32,
    },
}

/// Mean and deviation of each channel over all pixels, in units of full brightness.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelStats {
    /// Means.
    pub mean: Vec<f64>,
    /// Standard deviations.
    pub std: Vec<f64>,
    /// Images looked at.
    pub n_images: u64,
    /// Images that could not be decoded.
    pub skipped: SkipList,
}

/// Runs `each` for up to `n_max` evenly spaced samples; bad ones are listed.
fn for_each_sampled(
    dataset: &Dataset,
    n_max: u64,
    progress: OnProgress<'_>,
    mut each: impl FnMut(&mut SampleReader, SampleId) -> Result<(), SampleError>,
) -> Result<(u64, SkipList), StatsError> {
    let total = dataset.n_samples().min(n_max.max(1));
    let mut reader = SampleReader::new();
    let mut skipped = SkipList::default();
    for i in 0..total {
        let id = (u128::from(i) * u128::from(dataset.n_samples()) / u128::from(total)) as u64;
        match each(&mut reader, SampleId(id)) {
            Err(error) if error.is_bad_sample() => {
                skipped.push(error.place().to_string(), chain(&error));
            }
            result => result?,
        }
        if (i + 1) % PROGRESS_EVERY == 0 || i + 1 == total {
            progress(Progress { done: i + 1, total });
        }
    }
    if skipped.n == total {
        let first = skipped.first.swap_remove(0).reason;
        return Err(StatsError::NoImages { n: total, first });
    }
    Ok((total - skipped.n, skipped))
}

/// Computes channel statistics over up to `n_max` evenly spaced images in their own size.
///
/// Sums are whole numbers, so the result is the same on every machine.
pub fn channel_stats(
    dataset: &Dataset,
    channels: u32,
    n_max: u64,
    progress: OnProgress<'_>,
) -> Result<ChannelStats, StatsError> {
    let n = channels as usize;
    let (mut sums, mut squares): (Vec<u64>, Vec<u64>) = (vec![0; n], vec![0; n]);
    let mut n_pixels: u64 = 0;
    let sampled = for_each_sampled(dataset, n_max, progress, |reader, id| {
        for pixel in reader.whole(dataset, id, channels)?.chunks_exact(n) {
            for ((sum, square), &byte) in sums.iter_mut().zip(&mut squares).zip(pixel) {
                *sum += u64::from(byte);
                *square += u64::from(byte) * u64::from(byte);
            }
            n_pixels += 1;
        }
        Ok(())
    });
    let (n_images, skipped) = sampled?;
    let count = n_pixels as f64;
    let mean: Vec<f64> = sums.iter().map(|&sum| sum as f64 / count / 255.0).collect();
    let deviation = |(&square, mean): (&u64, &f64)| {
        let variance = square as f64 / count / (255.0 * 255.0) - mean * mean;
        variance.max(0.0).sqrt()
    };
    let std = squares.iter().zip(&mean).map(deviation).collect();
    Ok(ChannelStats { mean, std, n_images, skipped })
}

/// What predictors that learn nothing lose under patch normalisation: mean squared error per value.
#[derive(Clone, Debug, PartialEq)]
pub struct Baselines {
    /// Predicting 0 everywhere.
    pub zero: f64,
    /// Predicting the mean normalised patch everywhere.
    pub mean_patch: f64,
    /// Predicting, at each place of the image, the mean normalised patch of that place.
    pub mean_patch_by_place: f64,
    /// Images looked at.
    pub n_images: u64,
}

/// How images become the values that patches are cut from.
#[derive(Clone, Debug, PartialEq)]
pub struct BaselineConfig {
    /// Shape of the images.
    pub shape: ImageShape,
    /// Side of a patch.
    pub patch_size: u32,
    /// Means subtracted, one per channel, in units of full brightness.
    pub mean: Vec<f64>,
    /// Deviations divided by, one per channel.
    pub std: Vec<f64>,
}

/// Computes the baselines over up to `n_max` evenly spaced images, neither cropped at random nor
/// mirrored.
///
/// Targets are as in the objective: each patch minus its mean, divided by the root of its unbiased
/// variance plus 1e-6. Computed in f64.
pub fn baselines(
    dataset: &Dataset,
    config: &BaselineConfig,
    n_max: u64,
    progress: OnProgress<'_>,
) -> Result<Baselines, StatsError> {
    let BaselineConfig { shape, patch_size, .. } = config;
    let (p, c) = (*patch_size as usize, shape.channels as usize);
    let tiles = |side: u32| *patch_size > 0 && side.is_multiple_of(*patch_size);
    if !tiles(shape.height) || !tiles(shape.width) || p * p * c < 2 {
        return Err(StatsError::PatchSize {
            patch_size: *patch_size,
            height: shape.height,
            width: shape.width,
        });
    }
    assert!(
        config.mean.len() == c && config.std.len() == c,
        "one mean and one deviation per channel"
    );
    let values = p * p * c;
    let n_patches = (shape.height as usize / p) * (shape.width as usize / p);
    let mut sums: Vec<f64> = vec![0.0; n_patches * values];
    let mut squares: f64 = 0.0;
    let mut image: Vec<u8> = vec![0; shape.bytes()];
    let mut patch: Vec<f64> = vec![0.0; values];
    let sampled = for_each_sampled(dataset, n_max, progress, |reader, id| {
        reader.plain(dataset, id, *shape, &mut image)?;
        for (place, sums) in sums.chunks_exact_mut(values).enumerate() {
            cut_patch(&image, config, place, &mut patch);
            normalise(&mut patch);
            squares += patch.iter().map(|z| z * z).sum::<f64>();
            sums.iter_mut().zip(&patch).for_each(|(sum, z)| *sum += z);
        }
        Ok(())
    });
    let (n_images, _) = sampled?;
    let n = n_images as f64;
    let zero = squares / (n * (n_patches * values) as f64);
    // E(z − m)² = E z² − m² where m is the mean of the z it is compared with.
    let by_place = sums.iter().map(|sum| (sum / n) * (sum / n)).sum::<f64>();
    let everywhere = (0..values).map(|j| {
        let total: f64 = sums.iter().skip(j).step_by(values).sum();
        let mean = total / (n * n_patches as f64);
        mean * mean
    });
    Ok(Baselines {
        zero,
        mean_patch: zero - everywhere.sum::<f64>() / values as f64,
        mean_patch_by_place: zero - by_place / (n_patches * values) as f64,
        n_images,
    })
}

/// Copies patch number `place` (raster order) as normalised values: row, column, channel.
fn cut_patch(image: &[u8], config: &BaselineConfig, place: usize, patch: &mut [f64]) {
    let (p, c) = (config.patch_size as usize, config.shape.channels as usize);
    let width = config.shape.width as usize;
    let (top, left) = (place / (width / p) * p, place % (width / p) * p);
    for (row, out) in patch.chunks_exact_mut(p * c).enumerate() {
        let start = ((top + row) * width + left) * c;
        for (i, (&byte, to)) in image[start..].iter().zip(out).enumerate() {
            let channel = i % c;
            *to = (f64::from(byte) / 255.0 - config.mean[channel]) / config.std[channel];
        }
    }
}

fn normalise(patch: &mut [f64]) {
    let n = patch.len() as f64;
    let mean = patch.iter().sum::<f64>() / n;
    let squares: f64 = patch.iter().map(|x| (x - mean) * (x - mean)).sum();
    let deviation = (squares / (n - 1.0) + VARIANCE_EPS).sqrt();
    patch.iter_mut().for_each(|x| *x = (*x - mean) / deviation);
}

#[cfg(test)]
mod tests;
