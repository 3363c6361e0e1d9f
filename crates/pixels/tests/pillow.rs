//! Images as Pillow sees them: `scripts/golden/pillow.py` wrote the files.

use std::fs;
use std::path::PathBuf;

use lacuna_pixels::{Decoder, ImageShape};
use lacuna_recipe::augment::CropBox;
use serde_json::Value;

const TARGET: ImageShape = ImageShape { height: 40, width: 48, channels: 3 };

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn goldens() -> Vec<(String, Value)> {
    let text = fs::read_to_string(folder().join("golden.json")).unwrap();
    let all: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
    all.into_iter().collect()
}

fn number(golden: &Value, field: &str) -> u32 {
    u32::try_from(golden[field].as_u64().unwrap()).unwrap()
}

/// Formats whose decoder is another library than Pillow's.
fn is_other_decoder(name: &str) -> bool {
    let jpeg = name.ends_with(".jpg") && name != "png-inside.jpg";
    jpeg && !cfg!(feature = "turbo")
}

#[test]
fn decoded_images_are_pillows_bit_for_bit() {
    for (name, golden) in goldens() {
        if is_other_decoder(&name) {
            println!("{name}: skipped, the feature `turbo` decodes it as Pillow does");
            continue;
        }
        let bytes = fs::read(folder().join(&name)).unwrap();
        let mut decoder = Decoder::new();
        let size = decoder.decode(&bytes).unwrap();
        assert_eq!(
            (size.height, size.width),
            (number(&golden, "height"), number(&golden, "width")),
            "{name}"
        );
        let crc = crc32(decoder.whole(3));
        assert_eq!(crc, number(&golden, "crc"), "{name}");
    }
}

/// The bounds are those that two resizers of 8-bit images with other fixed-point steps keep.
#[test]
fn resized_boxes_agree_with_pillow() {
    for (name, golden) in goldens() {
        let bytes = fs::read(folder().join(&name)).unwrap();
        let want = fs::read(folder().join(format!("{name}.rgb"))).unwrap();
        let crop = CropBox {
            top: number(&golden, "top"),
            left: number(&golden, "left"),
            height: number(&golden, "crop_height"),
            width: number(&golden, "crop_width"),
        };
        let mut out = vec![0; TARGET.bytes()];
        let choose = |_| (crop, false);
        Decoder::new().decode_and_render(&bytes, choose, TARGET, &mut out).unwrap();
        let differences: Vec<u8> = out.iter().zip(&want).map(|(a, b)| a.abs_diff(*b)).collect();
        let mean = differences.iter().map(|d| f64::from(*d)).sum::<f64>() / out.len() as f64;
        let beyond = differences.iter().filter(|d| **d > 1).count() as f64 / out.len() as f64;
        let most = differences.iter().max().unwrap();
        println!("{name}: mean {mean:.3}, beyond 1 {:.3} %, most {most}", 100.0 * beyond);
        if is_other_decoder(&name) {
            assert!(mean < 2.0, "{name}: mean {mean}");
        } else {
            assert!(mean <= 0.15 && beyond <= 0.001 && *most <= 16, "{name}");
        }
    }
}

/// CRC-32 as zlib computes it.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
        }
    }
    !crc
}
