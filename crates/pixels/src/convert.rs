//! Channels and sides: what lies between a decoder's rows and those of an image.

use lacuna_recipe::augment::{CropBox, Size};

use crate::format::ImageShape;

/// How decoded samples lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// 1 grey, 2 grey and alpha, 3 colour, 4 colour and alpha.
    pub channels: usize,
    /// Bytes of a channel: 1 or 2, the latter in the machine's byte order.
    pub depth: usize,
}

/// Makes a buffer `n` bytes long, whatever they are. New memory is left to the system, which gives
/// it page by page to whoever writes there: a header may promise more than its data keeps.
pub(crate) fn make_room(buffer: &mut Vec<u8>, n: usize) {
    if buffer.capacity() < n {
        *buffer = vec![0; n];
    } else {
        buffer.resize(n, 0);
    }
}

/// Copies a box of `raw` into `out` with 1 or 3 channels.
pub(crate) fn cut(
    raw: &[u8],
    size: Size,
    layout: Layout,
    crop: CropBox,
    channels: usize,
    out: &mut [u8],
) {
    let Layout { channels: from, depth } = layout;
    let pixel = from * depth;
    let row_bytes = size.width as usize * pixel;
    let start = crop.left as usize * pixel;
    let end = start + crop.width as usize * pixel;
    let high = if cfg!(target_endian = "little") { depth - 1 } else { 0 };
    let rows = raw.chunks_exact(row_bytes).skip(crop.top as usize).map(|row| &row[start..end]);
    for (row, out) in rows.zip(out.chunks_exact_mut(crop.width as usize * channels)) {
        let pixels = row.chunks_exact(pixel).map(|p| &p[high..]);
        match (from >= 3, channels) {
            _ if depth == 1 && from == channels => out.copy_from_slice(row),
            (false, 1) => pixels.zip(out).for_each(|(p, to)| *to = p[0]),
            (false, _) => pixels.zip(out.chunks_exact_mut(3)).for_each(|(p, to)| to.fill(p[0])),
            (true, 1) => {
                pixels.zip(out).for_each(|(p, to)| *to = luma(p[0], p[depth], p[2 * depth]))
            }
            (true, _) => pixels
                .zip(out.chunks_exact_mut(3))
                .for_each(|(p, to)| to.copy_from_slice(&[p[0], p[depth], p[2 * depth]])),
        }
    }
}

pub(crate) fn luma(r: u8, g: u8, b: u8) -> u8 {
    let sum = u32::from(r) * 19595 + u32::from(g) * 38470 + u32::from(b) * 7471 + 0x8000;
    (sum >> 16) as u8
}

/// Turns CMYK in Adobe's way (255 is no ink) into colour, in place, and drops the rest.
#[cfg(feature = "turbo")]
pub(crate) fn cmyk_to_rgb(raw: &mut Vec<u8>) {
    // a·b / 255 as Pillow rounds it.
    let times = |a: u8, b: u8| {
        let product = u32::from(a) * u32::from(b) + 128;
        (((product >> 8) + product) >> 8) as u8
    };
    let n = raw.len() / 4;
    for i in 0..n {
        let [c, m, y, k] = [raw[4 * i], raw[4 * i + 1], raw[4 * i + 2], raw[4 * i + 3]];
        for (to, ink) in [c, m, y].into_iter().enumerate() {
            raw[3 * i + to] = k - times(255 - ink, k);
        }
    }
    raw.truncate(3 * n);
}

/// Mirrors an image from left to right.
pub(crate) fn mirror(image: &mut [u8], shape: ImageShape) {
    let channels = shape.channels as usize;
    for row in image.chunks_exact_mut(shape.width as usize * channels) {
        if channels == 1 {
            row.reverse();
            continue;
        }
        reverse_pixels(row);
    }
}

/// Reverses the order of three-byte pixels, four at a time from both ends.
fn reverse_pixels(row: &mut [u8]) {
    const FOUR: usize = 12;
    let (mut low, mut high) = (0, row.len());
    while high - low >= 2 * FOUR {
        let left = reversed_four(&row[low..low + FOUR]);
        let right = reversed_four(&row[high - FOUR..high]);
        row[low..low + FOUR].copy_from_slice(&right);
        row[high - FOUR..high].copy_from_slice(&left);
        low += FOUR;
        high -= FOUR;
    }
    let (mut low, mut high) = (low, high);
    while high - low >= 6 {
        for channel in 0..3 {
            row.swap(low + channel, high - 3 + channel);
        }
        low += 3;
        high -= 3;
    }
}

fn reversed_four(pixels: &[u8]) -> [u8; 12] {
    let mut four = [0; 16];
    four[..12].copy_from_slice(pixels);
    let four = u128::from_le_bytes(four);
    let pixel = |n: u32| four >> (24 * n) & 0xFF_FFFF;
    let turned = pixel(0) << 72 | pixel(1) << 48 | pixel(2) << 24 | pixel(3);
    let mut out = [0; 12];
    out.copy_from_slice(&turned.to_le_bytes()[..12]);
    out
}
