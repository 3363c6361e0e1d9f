use expect_test::expect;
use image::ExtendedColorType as Color;
use std::error::Error;

use image::ImageEncoder;
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use lacuna_recipe::augment::{CropBox, Size};

use super::*;
use crate::convert::luma;

mod hostile;
#[cfg(feature = "turbo")]
mod turbo;

fn png(pixels: &[u8], width: u32, height: u32, color: Color) -> Vec<u8> {
    let mut out: Vec<u8> = Vec::new();
    PngEncoder::new(&mut out).write_image(pixels, width, height, color).unwrap();
    out
}

fn jpeg(pixels: &[u8], width: u32, height: u32, color: Color) -> Vec<u8> {
    let mut out: Vec<u8> = Vec::new();
    JpegEncoder::new_with_quality(&mut out, 95).write_image(pixels, width, height, color).unwrap();
    out
}

/// Bytes that differ from place to place and look like noise.
fn noise(n: usize, seed: u32) -> Vec<u8> {
    let mut x: u32 = seed.wrapping_mul(2_654_435_761) | 1;
    let next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        (x >> 24) as u8
    };
    std::iter::repeat_with(next).take(n).collect()
}

/// The error with all that caused it.
fn chain(error: &dyn Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

fn shape(height: u32, width: u32, channels: u32) -> ImageShape {
    ImageShape { height, width, channels }
}

fn decoded(bytes: &[u8], channels: u32) -> Vec<u8> {
    let mut decoder = Decoder::new();
    decoder.decode(bytes).unwrap();
    decoder.whole(channels).to_vec()
}

#[test]
fn grey_and_colour_png_are_exact() {
    let pixels = noise(5 * 3 * 3, 1);
    let bytes = png(&pixels, 5, 3, Color::Rgb8);
    assert_eq!(
        probe(&bytes).unwrap(),
        ImageInfo { codec: Codec::Png, size: Size { height: 3, width: 5 } }
    );
    assert_eq!(decoded(&bytes, 3), pixels);
    let grey = noise(15, 2);
    let bytes = png(&grey, 5, 3, Color::L8);
    assert_eq!(decoded(&bytes, 1), grey);
    let tripled: Vec<u8> = grey.iter().flat_map(|&v| [v; 3]).collect();
    assert_eq!(decoded(&bytes, 3), tripled);
}

/// Values by Pillow's formula, computed by hand.
#[test]
fn one_channel_from_colour_is_luma() {
    let pixels = [255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 255, 10, 20, 30];
    assert_eq!(decoded(&png(&pixels, 5, 1, Color::Rgb8), 1), [76, 150, 29, 255, 18]);
}

#[test]
fn alpha_is_dropped_and_not_blended() {
    let rgba = [200, 100, 50, 0, 1, 2, 3, 128];
    assert_eq!(decoded(&png(&rgba, 2, 1, Color::Rgba8), 3), [200, 100, 50, 1, 2, 3]);
    assert_eq!(decoded(&png(&[7, 0, 9, 255], 2, 1, Color::La8), 1), [7, 9]);
}

#[test]
fn sixteen_bits_keep_the_high_byte() {
    let wide =
        |values: &[u16]| -> Vec<u8> { values.iter().flat_map(|v| v.to_ne_bytes()).collect() };
    let grey = png(&wide(&[0x12FF, 0xFF00, 0x00FF]), 3, 1, Color::L16);
    assert_eq!(decoded(&grey, 1), [0x12, 0xFF, 0]);
    assert_eq!(decoded(&grey, 3), [0x12, 0x12, 0x12, 0xFF, 0xFF, 0xFF, 0, 0, 0]);
    let rgb = png(&wide(&[0x1234, 0x5678, 0x9ABC]), 1, 1, Color::Rgb16);
    assert_eq!(decoded(&rgb, 3), [0x12, 0x56, 0x9A]);
    assert_eq!(decoded(&rgb, 1), [luma(0x12, 0x56, 0x9A)]);
    let rgba = png(&wide(&[0x1234, 0x5678, 0x9ABC, 0]), 1, 1, Color::Rgba16);
    assert_eq!(decoded(&rgba, 3), [0x12, 0x56, 0x9A]);
}

#[test]
fn jpeg_grey_and_colour() {
    let ramp: Vec<u8> = (0..64u32).map(|i| (i % 8 * 30) as u8).collect();
    let bytes = jpeg(&ramp, 8, 8, Color::L8);
    let info = probe(&bytes).unwrap();
    assert_eq!((info.codec, info.size.height, info.size.width), (Codec::Jpeg, 8, 8));
    let grey = decoded(&bytes, 1);
    assert!(grey.iter().zip(&ramp).all(|(a, b)| a.abs_diff(*b) <= 4), "{grey:?}");
    let colour = decoded(&bytes, 3);
    assert!(colour.chunks(3).zip(&grey).all(|(p, g)| p == [*g; 3]));
    let red: Vec<u8> = [200, 30, 60].repeat(256);
    let back = decoded(&jpeg(&red, 16, 16, Color::Rgb8), 3);
    assert!(back.iter().zip(&red).all(|(a, b)| a.abs_diff(*b) <= 4));
}

#[test]
fn crop_of_the_wanted_size_is_a_copy() {
    let pixels = noise(20 * 10 * 3, 3);
    let mut decoder = Decoder::new();
    decoder.decode(&png(&pixels, 20, 10, Color::Rgb8)).unwrap();
    let crop = CropBox { top: 2, left: 5, height: 4, width: 6 };
    let mut out: Vec<u8> = vec![0; 4 * 6 * 3];
    decoder.render(crop, false, shape(4, 6, 3), &mut out).unwrap();
    let want: Vec<u8> = (2..6)
        .flat_map(|row: usize| pixels[(row * 20 + 5) * 3..(row * 20 + 11) * 3].to_vec())
        .collect();
    assert_eq!(out, want);
    let mut mirrored = out.clone();
    decoder.render(crop, true, shape(4, 6, 3), &mut mirrored).unwrap();
    for (row, other) in want.chunks(18).zip(mirrored.chunks(18)) {
        let reversed: Vec<u8> = row.chunks(3).rev().flatten().copied().collect();
        assert_eq!(other, reversed);
    }
}

#[test]
fn mirroring_twice_is_nothing_and_once_reverses_pixels() {
    for width in 1..40 {
        for channels in [1, 3] {
            let shape = shape(2, width, channels);
            let before = noise(shape.bytes(), width);
            let mut image = before.clone();
            crate::convert::mirror(&mut image, shape);
            let row = (width * channels) as usize;
            for (got, from) in image.chunks(row).zip(before.chunks(row)) {
                let pixels = from.chunks(channels as usize).rev();
                assert_eq!(got, pixels.flatten().copied().collect::<Vec<u8>>());
            }
            crate::convert::mirror(&mut image, shape);
            assert_eq!(image, before);
        }
    }
}

/// A build that makes other pixels must say so by its id.
#[test]
fn the_probe_has_the_pixels_that_its_id_stands_for() {
    let want = if cfg!(feature = "turbo") { 8081961084167795445 } else { 3610362894475883281 };
    assert_eq!(probe_pixels().value, want, "{DECODER_ID}");
}

/// The antialiased bicubic filter with a = −0.5, one axis, straight from its definition.
fn reference_row(from: &[u8], to: usize) -> Vec<f64> {
    let filter = |x: f64| -> f64 {
        let (x, a) = (x.abs(), -0.5);
        if x < 1.0 {
            ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
        } else if x < 2.0 {
            (((x - 5.0) * x + 8.0) * x - 4.0) * a
        } else {
            0.0
        }
    };
    let scale = from.len() as f64 / to as f64;
    let stretch = scale.max(1.0);
    (0..to)
        .map(|i| {
            let center = (i as f64 + 0.5) * scale;
            let weight = |j: usize| filter((j as f64 + 0.5 - center) / stretch);
            let total: f64 = (0..from.len()).map(weight).sum();
            let sum: f64 = (0..from.len()).map(|j| weight(j) * f64::from(from[j])).sum();
            (sum / total).clamp(0.0, 255.0)
        })
        .collect()
}

#[test]
fn resizing_is_antialiased_bicubic() {
    for (from, to) in [(64, 16), (40, 17), (12, 30)] {
        let row = noise(from, 9);
        let pixels = row.repeat(from);
        let mut decoder = Decoder::new();
        let side = from as u32;
        decoder.decode(&png(&pixels, side, side, Color::L8)).unwrap();
        let crop = CropBox { top: 0, left: 0, height: side, width: side };
        let mut out: Vec<u8> = vec![0; to * to];
        let target = shape(to as u32, to as u32, 1);
        decoder.render(crop, false, target, &mut out).unwrap();
        let want = reference_row(&row, to);
        for got in out.chunks(to) {
            for (a, b) in got.iter().zip(&want) {
                assert!((f64::from(*a) - b).abs() <= 1.0, "{from} to {to}: {a} {b}");
            }
        }
    }
}

/// Values by Pillow 13.0: `noise` as 20x16 RGB, cropped to 14x14 at (1, 3), resized with BICUBIC.
#[test]
fn resizing_agrees_with_pillow() {
    let golden = "978e79a16f879e9f76799b767f869e686d908f878e7d7f89a18f837c5b6f73c5af7e9f95608b595e\
                  807f9485858a597164997598794994ba89726e8dbc686fa08371616e73877d997b8c989e6c848d8d\
                  6b85a1958f88a3a17d84";
    let mut decoder = Decoder::new();
    decoder.decode(&png(&noise(960, 77), 20, 16, Color::Rgb8)).unwrap();
    let crop = CropBox { top: 1, left: 3, height: 14, width: 14 };
    let mut out: Vec<u8> = vec![0; 5 * 6 * 3];
    decoder.render(crop, false, shape(5, 6, 3), &mut out).unwrap();
    for (i, got) in out.iter().enumerate() {
        let want = u8::from_str_radix(&golden[2 * i..2 * i + 2], 16).unwrap();
        // Both round to fixed point between the passes, with different numbers of bits.
        assert!(got.abs_diff(want) <= 1, "value {i}: {got} {want}");
    }
}

#[test]
fn bad_bytes_are_named() {
    let message = |bytes: &[u8]| {
        let error = Decoder::new().decode(bytes).unwrap_err();
        chain(&error)
    };
    let good = png(&noise(64, 1), 8, 8, Color::L8);
    expect!["not a png, jpeg or webp image: it starts with [47, 49, 46, 38]"]
        .assert_eq(&message(b"GIF8"));
    expect!["the Png header is damaged at byte 8"].assert_eq(&message(&good[..20]));
    assert!(message(&good[..good.len() / 2]).starts_with("the Png data does not decode: "));
    let mut bomb = good.clone();
    bomb[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
    expect!["65536x65536 pixels, accepted are 1 to 67108864"].assert_eq(&message(&bomb));
    let jpg = jpeg(&noise(32 * 32, 1), 32, 32, Color::L8);
    expect!["the Jpeg data is cut off"].assert_eq(&message(&jpg[..jpg.len() - 40]));
    expect!["the Jpeg header is damaged at byte 4"].assert_eq(&message(&jpg[..5]));
}
