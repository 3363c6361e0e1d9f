//! Pictures of what a model fills in.
//!
//! A model trained on per-patch normalised pixels predicts a patch's texture without its
//! brightness and contrast. Showing it with the mean and deviation of the patch itself leaks the
//! answer, so that both come from **visible patches only** unless asked otherwise: each statistic
//! of a removed patch is the mean of those of the [`NEIGHBORS`] nearest visible patches, weighted
//! by the inverse square of the distance between patch centres. Visible patches are pasted as they
//! are.

use std::io::Cursor;
use std::path::Path;

use image::{Rgb, RgbImage};
use lacuna_recipe::model::{ModelConfig, NORM_PIX_EPS};

use crate::frozen::FrozenMae;
use crate::mae::mask_sizes;

/// Visible patches that the statistics of a removed patch are taken from: enough to surround it,
/// few enough to stay local.
pub const NEIGHBORS: usize = 4;
/// Images with sides below this are shown enlarged by [`ENLARGE`].
const SMALL_SIDE: u32 = 64;
const ENLARGE: u32 = 4;
/// Pixels between pictures of a row and between rows.
const GAP: u32 = 2;
/// Brightness of a removed patch in the masked picture.
const REMOVED_GRAY: f64 = 0.5;

/// Whose mean and deviation removed patches are shown with, if the model predicts normalised ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statistics {
    /// Those of visible patches near by.
    Visible,
    /// The removed patch's own, which the model does not know.
    Truth,
}

/// A picture that could not be stored.
#[derive(Debug, thiserror::Error)]
#[error("failed to write picture `{path}`")]
pub struct WritePictureError {
    path: String,
    #[source]
    source: image::ImageError,
}

/// Draws one row per image: `original | masked | by the model | by random weights`.
///
/// `pixels` is `[b, h, w, c]` and `ids_shuffle` `[b, l]`; both models have the same sizes. Images
/// of one channel are drawn grey, of three in color, of other numbers by their first channel.
///
/// # Panics
/// If the models differ in size or the slices do not hold whole images and permutations.
pub fn draw_rows(
    model: &FrozenMae,
    random: &FrozenMae,
    pixels: &[u8],
    ids_shuffle: &[u32],
    statistics: Statistics,
) -> RgbImage {
    assert_eq!(model.model(), random.model(), "models of one size");
    let (len_keep, n_patches) = mask_sizes(model.model());
    let n_images = pixels.len() / model.image_bytes();
    assert_eq!(ids_shuffle.len(), n_images * n_patches, "one permutation per image");
    let preds = [model.predict(pixels, ids_shuffle), random.predict(pixels, ids_shuffle)];
    let (mean, std) = model.normalization();
    let scale = Scale { model: model.model(), mean, std };
    let geometry = Geometry::of(scale.model);
    let mut sheet = Sheet::new(&geometry, 4, n_images as u32);
    for i in 0..n_images {
        let image = &pixels[i * model.image_bytes()..][..model.image_bytes()];
        let patches = geometry.patches(image);
        let (kept, removed) = ids_shuffle[i * n_patches..][..n_patches].split_at(len_keep);
        let masked = without(&patches, removed);
        let filled = preds.each_ref().map(|pred| {
            let pred = &pred[i * n_patches * geometry.patch_values..];
            fill_in(scale, &geometry, &patches, pred, (kept, removed), statistics)
        });
        let [by_model, by_random] = filled;
        for (column, patches) in [patches, masked, by_model, by_random].iter().enumerate() {
            sheet.paste(&geometry, patches, column as u32, i as u32);
        }
    }
    sheet.canvas
}

/// Writes a picture as PNG; `text` becomes its description.
pub fn write_png(picture: &RgbImage, text: &str, path: &Path) -> Result<(), WritePictureError> {
    let failed = |source| WritePictureError { path: path.display().to_string(), source };
    let mut png: Vec<u8> = Vec::new();
    let written = picture.write_to(&mut Cursor::new(&mut png), image::ImageFormat::Png);
    written.map_err(failed)?;
    // Text may follow the signature and the header, whose sizes are fixed.
    let chunk = text_chunk("Description", text);
    png.splice(PNG_HEAD_BYTES..PNG_HEAD_BYTES, chunk);
    std::fs::write(path, png).map_err(|error| failed(error.into()))
}

/// Signature and header of a PNG.
const PNG_HEAD_BYTES: usize = 8 + 25;

/// Renders a chunk of international text, which is UTF-8: length, type, keyword and empty fields,
/// text, CRC.
fn text_chunk(keyword: &str, text: &str) -> Vec<u8> {
    // Not compressed, no language, no translated keyword.
    let body = [b"iTXt", keyword.as_bytes(), &[0; 5], text.as_bytes()].concat();
    let mut out = (body.len() as u32 - 4).to_be_bytes().to_vec();
    out.extend(&body);
    out.extend(crc32(&body).to_be_bytes());
    out
}

/// Computes the CRC of a PNG's chunk, bit by bit: texts are short.
fn crc32(bytes: &[u8]) -> u32 {
    let shift = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc: u32, &byte| (0..8).fold(crc ^ u32::from(byte), shift))
}

/// Values of one patch in units of full brightness, in row, column, channel order.
type Patch = Vec<f64>;

/// Draws one picture per image, `original | masked | filled in`, from predictions `pred_blp`
/// `[b, l, p]` in raster order and in the units of the loss.
///
/// # Panics
/// If the slices do not hold whole images, permutations and predictions of as many images.
pub fn draw_each(
    scale: Scale<'_>,
    pixels: &[u8],
    ids_shuffle: &[u32],
    pred_blp: &[f32],
) -> Vec<RgbImage> {
    let (len_keep, n_patches) = mask_sizes(scale.model);
    let geometry = Geometry::of(scale.model);
    let image_bytes = geometry.height * geometry.width * geometry.channels;
    let n_images = pixels.len() / image_bytes;
    assert_eq!(ids_shuffle.len(), n_images * n_patches, "one permutation per image");
    assert_eq!(pred_blp.len(), n_images * n_patches * geometry.patch_values, "whole predictions");
    let draw = |i: usize| {
        let patches = geometry.patches(&pixels[i * image_bytes..][..image_bytes]);
        let (kept, removed) = ids_shuffle[i * n_patches..][..n_patches].split_at(len_keep);
        let pred = &pred_blp[i * n_patches * geometry.patch_values..];
        let seen = (kept, removed);
        let filled = fill_in(scale, &geometry, &patches, pred, seen, Statistics::Visible);
        let masked = without(&patches, removed);
        let mut sheet = Sheet::new(&geometry, 3, 1);
        for (column, patches) in [patches, masked, filled].iter().enumerate() {
            sheet.paste(&geometry, patches, column as u32, 0);
        }
        sheet.canvas
    };
    (0..n_images).map(draw).collect()
}

/// Returns an image without its removed patches.
fn without(patches: &[Patch], removed: &[u32]) -> Vec<Patch> {
    let mut masked = patches.to_vec();
    for &id in removed {
        masked[id as usize].fill(REMOVED_GRAY);
    }
    masked
}

/// What predictions mean.
#[derive(Clone, Copy, Debug)]
pub struct Scale<'a> {
    /// Sizes of the model, and whether it predicts normalised patches.
    pub model: &'a ModelConfig,
    /// Mean of each channel, in units of full brightness.
    pub mean: &'a [f64],
    /// Deviation of each channel, in units of full brightness.
    pub std: &'a [f64],
}

/// Replaces the removed patches by the predicted ones.
fn fill_in(
    scale: Scale<'_>,
    geometry: &Geometry,
    patches: &[Patch],
    pred: &[f32],
    (kept, removed): (&[u32], &[u32]),
    statistics: Statistics,
) -> Vec<Patch> {
    let Scale { model, mean, std } = scale;
    let visible: Vec<(usize, Stats)> =
        kept.iter().map(|&id| (id as usize, Stats::of(&patches[id as usize], mean, std))).collect();
    let mut out: Vec<Patch> = patches.to_vec();
    for &id in removed {
        let id = id as usize;
        let pred = &pred[id * geometry.patch_values..][..geometry.patch_values];
        let stats = match (model.norm_pix_loss, statistics) {
            (true, Statistics::Visible) => interpolate(geometry, &visible, id),
            (true, Statistics::Truth) => Stats::of(&patches[id], mean, std),
            (false, _) => Stats { mean: 0.0, deviation: 1.0 },
        };
        let Stats { mean: level, deviation } = stats;
        for (i, (to, &x)) in out[id].iter_mut().zip(pred).enumerate() {
            let channel = i % mean.len();
            *to = (f64::from(x) * deviation + level) * std[channel] + mean[channel];
        }
    }
    out
}

/// Mean and deviation of a patch's normalised values, channels together.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stats {
    mean: f64,
    deviation: f64,
}

impl Stats {
    fn of(patch: &[f64], mean: &[f64], std: &[f64]) -> Stats {
        let normal = |(i, x): (usize, &f64)| (x - mean[i % mean.len()]) / std[i % std.len()];
        let values: Vec<f64> = patch.iter().enumerate().map(normal).collect();
        let level = values.iter().sum::<f64>() / values.len() as f64;
        let squares: f64 = values.iter().map(|x| (x - level) * (x - level)).sum();
        let degrees = (values.len() - 1).max(1) as f64;
        Stats { mean: level, deviation: (squares / degrees + NORM_PIX_EPS).sqrt() }
    }
}

/// Estimates the statistics of removed patch `id` from the visible patches around it.
fn interpolate(geometry: &Geometry, visible: &[(usize, Stats)], id: usize) -> Stats {
    let mut near: Vec<(u64, usize, Stats)> = visible
        .iter()
        .map(|&(other, stats)| (geometry.square_distance(id, other), other, stats))
        .collect();
    // Ties go to the patch that comes first, so a picture does not depend on the shuffle.
    near.sort_by_key(|&(distance, other, _)| (distance, other));
    near.truncate(NEIGHBORS);
    let weights = near.iter().map(|(distance, ..)| 1.0 / *distance as f64);
    let total: f64 = weights.clone().sum();
    let mean = |value: fn(&Stats) -> f64| {
        weights.clone().zip(&near).map(|(w, (.., stats))| w * value(stats)).sum::<f64>() / total
    };
    Stats { mean: mean(|s| s.mean), deviation: mean(|s| s.deviation) }
}

/// How an image is cut into patches.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    height: usize,
    width: usize,
    channels: usize,
    patch_size: usize,
    columns: usize,
    patch_values: usize,
}

impl Geometry {
    fn of(config: &ModelConfig) -> Self {
        let [height, width] = config.img_size.map(|side| side as usize);
        Geometry {
            height,
            width,
            channels: config.channels as usize,
            patch_size: config.patch_size as usize,
            columns: config.grid()[1],
            patch_values: config.patch_values(),
        }
    }

    /// Returns the patch of a pixel and the pixel's first value in it.
    fn place(&self, y: usize, x: usize) -> (usize, usize) {
        let s = self.patch_size;
        let patch = (y / s) * self.columns + x / s;
        (patch, ((y % s) * s + x % s) * self.channels)
    }

    fn patches(&self, image: &[u8]) -> Vec<Patch> {
        let n_patches = (self.height / self.patch_size) * self.columns;
        let mut out: Vec<Patch> = vec![vec![0.0; self.patch_values]; n_patches];
        for (pixel, values) in image.chunks_exact(self.channels).enumerate() {
            let (patch, at) = self.place(pixel / self.width, pixel % self.width);
            for (to, &byte) in out[patch][at..].iter_mut().zip(values) {
                *to = f64::from(byte) / 255.0;
            }
        }
        out
    }

    fn square_distance(&self, a: usize, b: usize) -> u64 {
        let rows = (a / self.columns).abs_diff(b / self.columns) as u64;
        let columns = (a % self.columns).abs_diff(b % self.columns) as u64;
        rows * rows + columns * columns
    }
}

/// A sheet of pictures of one size in rows and columns.
struct Sheet {
    canvas: RgbImage,
    scale: u32,
}

impl Sheet {
    fn new(geometry: &Geometry, columns: u32, rows: u32) -> Self {
        let [height, width] = [geometry.height as u32, geometry.width as u32];
        let scale = if height.max(width) < SMALL_SIDE { ENLARGE } else { 1 };
        let side = |n: u32, length: u32| n * (length * scale + GAP) + GAP;
        let (across, down) = (side(columns, width), side(rows, height));
        Sheet { canvas: RgbImage::from_pixel(across, down, Rgb([255; 3])), scale }
    }

    fn paste(&mut self, geometry: &Geometry, patches: &[Patch], column: u32, row: u32) {
        let [height, width] =
            [geometry.height as u32, geometry.width as u32].map(|n| n * self.scale);
        let (left, top) = (GAP + column * (width + GAP), GAP + row * (height + GAP));
        for y in 0..height {
            for x in 0..width {
                let (patch, at) =
                    geometry.place((y / self.scale) as usize, (x / self.scale) as usize);
                let values = &patches[patch][at..];
                let color = |c: usize| {
                    let channel = if geometry.channels == 3 { c } else { 0 };
                    (values[channel].clamp(0.0, 1.0) * 255.0).round() as u8
                };
                self.canvas.put_pixel(left + x, top + y, Rgb([color(0), color(1), color(2)]));
            }
        }
    }
}

#[cfg(test)]
mod tests;
