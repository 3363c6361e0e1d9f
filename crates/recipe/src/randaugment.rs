//! RandAugment: two random changes of an image's colours or geometry, drawn by address.
//!
//! Source: Cubuk et al. 2019, in the form of timm's `rand-m9-mstd0.5-inc1` (what changes colours
//! grows stronger with the magnitude in both directions), whose operations are Pillow's. Each is
//! done with probability one half. What differs: geometry is always bilinear, where timm draws one
//! of two filters, and what comes in from outside is [`FILL`] in every channel.

use crate::init::normal_pair;
use crate::philox::Draws;

/// Changes an image is given, each with probability one half.
pub const N_OPS: u32 = 2;
/// Strongest magnitude.
pub const MAGNITUDE_MAX: f64 = 10.0;
/// Deviation of the magnitude of one change.
const MAGNITUDE_STD: f64 = 0.5;
/// What comes in from outside of the image.
pub const FILL: u8 = 128;
/// Draws of one change: words, of which a few are used.
const WORDS_AN_OP: u32 = 16;

/// A change of an image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    /// Stretches each channel over all values.
    AutoContrast,
    /// Makes all values of each channel about as frequent.
    Equalize,
    /// Turns values around.
    Invert,
    /// Turns by so many degrees against the clock.
    Rotate(f64),
    /// Keeps so many bits of each value.
    Posterize(u32),
    /// Turns values around that are not below this one.
    Solarize(u32),
    /// Adds this to values below 128.
    SolarizeAdd(u32),
    /// Colours: 0 is grey, 1 the image, above that stronger.
    Color(f64),
    /// Distance from the mean grey.
    Contrast(f64),
    /// Distance from black.
    Brightness(f64),
    /// Distance from the smoothed image.
    Sharpness(f64),
    /// Moves each row by its number times this.
    ShearX(f64),
    /// Moves each column by its number times this.
    ShearY(f64),
    /// Moves by this share of the width.
    TranslateX(f64),
    /// Moves by this share of the height.
    TranslateY(f64),
}

impl Op {
    /// Draws a change of a magnitude near `magnitude` (0 to [`MAGNITUDE_MAX`]); `at` is its first
    /// word. Nothing in half of the cases.
    fn draw(draws: &Draws, at: u32, magnitude: f64) -> Option<Op> {
        let kind = draws.below(at, 15);
        if draws.unit_f64(at / 2 + 1) >= 0.5 {
            return None;
        }
        let jitter = normal_pair(draws.block(at / 4 + 1))[0];
        let level = (magnitude + MAGNITUDE_STD * jitter).clamp(0.0, MAGNITUDE_MAX);
        let sign = if draws.below(at + 8, 2) == 0 { 1.0 } else { -1.0 };
        Some(Op::of(kind, level / MAGNITUDE_MAX, sign))
    }

    /// Returns change number `kind` of `share` of the largest magnitude, as timm's increasing ones.
    fn of(kind: u32, share: f64, sign: f64) -> Op {
        let enhance = (1.0 + sign * share * 0.9).max(0.1);
        match kind {
            0 => Op::AutoContrast,
            1 => Op::Equalize,
            2 => Op::Invert,
            3 => Op::Rotate(sign * share * 30.0),
            4 => Op::Posterize(4 - (share * 4.0) as u32),
            5 => Op::Solarize(256 - (share * 256.0) as u32),
            6 => Op::SolarizeAdd((share * 110.0) as u32),
            7 => Op::Color(enhance),
            8 => Op::Contrast(enhance),
            9 => Op::Brightness(enhance),
            10 => Op::Sharpness(enhance),
            11 => Op::ShearX(sign * share * 0.3),
            12 => Op::ShearY(sign * share * 0.3),
            13 => Op::TranslateX(sign * share * 0.45),
            _ => Op::TranslateY(sign * share * 0.45),
        }
    }
}

/// Changes an image of `[height, width]` pixels, planes of channels one after another, by up to
/// [`N_OPS`] changes of a magnitude near `magnitude`.
pub fn augment(image: &mut [u8], size: [usize; 2], magnitude: f64, draws: &Draws) {
    for i in 0..N_OPS {
        if let Some(op) = Op::draw(draws, i * WORDS_AN_OP, magnitude) {
            apply(op, image, size);
        }
    }
}

/// Makes one change.
pub fn apply(op: Op, image: &mut [u8], [height, width]: [usize; 2]) {
    let n = height * width;
    assert!(n > 0 && image.len().is_multiple_of(n), "whole planes");
    let size = [height, width];
    let (h, w) = (height as f64, width as f64);
    match op {
        Op::AutoContrast => image.chunks_exact_mut(n).for_each(auto_contrast),
        Op::Equalize => image.chunks_exact_mut(n).for_each(equalize),
        Op::Invert => look_up(image, |v| 255 - v),
        Op::Posterize(bits) if bits >= 8 => {}
        Op::Posterize(bits) => look_up(image, |v| v & !(0xFFu8 >> bits)),
        Op::Solarize(from) => look_up(image, |v| if u32::from(v) < from { v } else { 255 - v }),
        Op::SolarizeAdd(more) => {
            look_up(image, |v| if v < 128 { (u32::from(v) + more).min(255) as u8 } else { v })
        }
        Op::Color(factor) => {
            let grey = greys(image, n);
            image.chunks_exact_mut(n).for_each(|plane| blend(plane, |i| grey[i], factor));
        }
        Op::Contrast(factor) => {
            let sum: u64 = greys(image, n).into_iter().map(u64::from).sum();
            let mean = (sum as f64 / n as f64 + 0.5) as u8;
            blend(image, |_| mean, factor);
        }
        Op::Brightness(factor) => blend(image, |_| 0, factor),
        Op::Sharpness(factor) => image.chunks_exact_mut(n).for_each(|plane| {
            let smooth = smoothed(plane, size);
            blend(plane, |i| smooth[i], factor);
        }),
        Op::Rotate(degrees) => {
            let angle = -degrees.to_radians();
            let (cos, sin) = (libm::cos(angle), libm::sin(angle));
            let (x, y) = (w / 2.0, h / 2.0);
            let shift = [x - cos * x - sin * y, y + sin * x - cos * y];
            warp(image, size, [[cos, sin, shift[0]], [-sin, cos, shift[1]]]);
        }
        Op::ShearX(by) => warp(image, size, [[1.0, by, 0.0], [0.0, 1.0, 0.0]]),
        Op::ShearY(by) => warp(image, size, [[1.0, 0.0, 0.0], [by, 1.0, 0.0]]),
        Op::TranslateX(by) => warp(image, size, [[1.0, 0.0, by * w], [0.0, 1.0, 0.0]]),
        Op::TranslateY(by) => warp(image, size, [[1.0, 0.0, 0.0], [0.0, 1.0, by * h]]),
    }
}

fn look_up(values: &mut [u8], of: impl Fn(u8) -> u8) {
    let table: [u8; 256] = std::array::from_fn(|v| of(v as u8));
    values.iter_mut().for_each(|v| *v = table[usize::from(*v)]);
}

fn histogram(plane: &[u8]) -> [u32; 256] {
    let mut counts = [0u32; 256];
    plane.iter().for_each(|v| counts[usize::from(*v)] += 1);
    counts
}

fn auto_contrast(plane: &mut [u8]) {
    let counts = histogram(plane);
    let low = counts.iter().position(|n| *n > 0).unwrap_or(0);
    let high = counts.iter().rposition(|n| *n > 0).unwrap_or(0);
    if high <= low {
        return;
    }
    let scale = 255.0 / (high - low) as f64;
    let offset = -(low as f64) * scale;
    look_up(plane, |v| (f64::from(v) * scale + offset).clamp(0.0, 255.0) as u8);
}

fn equalize(plane: &mut [u8]) {
    let counts = histogram(plane);
    let last = counts.iter().rev().find(|n| **n > 0).copied().unwrap_or(0);
    let step = (plane.len() as u32 - last) / 255;
    if step == 0 {
        return;
    }
    let mut n = step / 2;
    let table: [u8; 256] = std::array::from_fn(|v| {
        let to = (n / step).min(255) as u8;
        n += counts[v];
        to
    });
    look_up(plane, |v| table[usize::from(v)]);
}

/// Returns the grey of each pixel: ITU-R 601 of three channels, else the first.
fn greys(image: &[u8], n: usize) -> Vec<u8> {
    if image.len() != 3 * n {
        return image[..n].to_vec();
    }
    let grey = |i: usize| {
        let [r, g, b] = [0, n, 2 * n].map(|at| u32::from(image[at + i]));
        ((r * 19_595 + g * 38_470 + b * 7_471 + 0x8000) >> 16) as u8
    };
    (0..n).map(grey).collect()
}

/// Goes from another image (0) to this one (1), and beyond.
fn blend(values: &mut [u8], other: impl Fn(usize) -> u8, factor: f64) {
    let factor = factor as f32;
    for (i, v) in values.iter_mut().enumerate() {
        let from = f32::from(other(i));
        *v = (from + factor * (f32::from(*v) - from)).clamp(0.0, 255.0) as u8;
    }
}

/// Smooths a plane by 3 x 3 pixels, of which the middle counts five times; edges stay.
fn smoothed(plane: &[u8], [height, width]: [usize; 2]) -> Vec<u8> {
    let mut out = plane.to_vec();
    for y in 1..height.saturating_sub(1) {
        for x in 1..width.saturating_sub(1) {
            let at = y * width + x;
            let row = |from: usize| (from - 1..=from + 1).map(|i| f32::from(plane[i])).sum::<f32>();
            let all = row(at - width) + row(at) + row(at + width) + 4.0 * f32::from(plane[at]);
            out[at] = (all / 13.0 + 0.5).clamp(0.0, 255.0) as u8;
        }
    }
    out
}

/// Reads every pixel at another place, bilinearly: `map` leads from a place in the result to one
/// in the image, both in pixels from the upper left corner.
fn warp(image: &mut [u8], [height, width]: [usize; 2], map: [[f64; 3]; 2]) {
    let from = image.to_vec();
    let n = height * width;
    for (plane, from) in image.chunks_exact_mut(n).zip(from.chunks_exact(n)) {
        for (i, v) in plane.iter_mut().enumerate() {
            let (x, y) = ((i % width) as f64 + 0.5, (i / width) as f64 + 0.5);
            let [at_x, at_y] = map.map(|[a, b, c]| a * x + b * y + c);
            *v = bilinear(from, [height, width], at_x, at_y).unwrap_or(FILL);
        }
    }
}

fn bilinear(plane: &[u8], [height, width]: [usize; 2], x: f64, y: f64) -> Option<u8> {
    if !(0.0..width as f64).contains(&x) || !(0.0..height as f64).contains(&y) {
        return None;
    }
    let (x, y) = (x - 0.5, y - 0.5);
    let (left, top) = (x.floor(), y.floor());
    let (dx, dy) = (x - left, y - top);
    let clip = |at: f64, n: usize| at.clamp(0.0, (n - 1) as f64) as usize;
    let row = |y: f64| {
        let row = clip(y, height) * width;
        let [a, b] = [left, left + 1.0].map(|x| f64::from(plane[row + clip(x, width)]));
        a + (b - a) * dx
    };
    let (a, b) = (row(top), row(top + 1.0));
    Some((a + (b - a) * dy) as u8)
}

#[cfg(test)]
mod tests;
