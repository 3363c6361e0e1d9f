//! What libjpeg-turbo gives.

use std::path::Path;
use std::process::Command;

use fast_image_resize::CpuExtensions;
use lacuna_recipe::augment::{CropBox, Size};
use lacuna_recipe::digest::Crc64;
use proptest::prelude::{ProptestConfig, TestCaseError, any};
use proptest::{collection, prop_assert, prop_assert_eq, proptest};

use super::{noise, shape};
use crate::turbo::{Encoding, encode};
use crate::{Decoder, PlaneBuffers, PlaneLayout, Planes};

/// A picture with edges, slopes and noise, so that a wrong neighbour shows.
fn picture(size: Size, channels: usize, seed: u32) -> Vec<u8> {
    let n = size.width as usize * size.height as usize;
    let noise = noise(n * channels, seed);
    let value = |at: usize| {
        let (pixel, channel) = (at / channels, at % channels);
        let (x, y) = (pixel % size.width as usize, pixel / size.width as usize);
        let edge = if (x / 7 + y / 5 + channel) % 3 == 0 { 90 } else { 0 };
        (edge + x * (channel + 1) + y * 2) as u8 / 2 + noise[at] / 4
    };
    (0..n * channels).map(value).collect()
}

fn pixels(bytes: &[u8], crop: CropBox, target: crate::ImageShape, cut: bool) -> Vec<u8> {
    let mut decoder = Decoder::new();
    let mut out = vec![0; target.bytes()];
    if cut {
        decoder.decode_and_render(bytes, |_| (crop, false), target, &mut out).unwrap();
    } else {
        decoder.decode(bytes).unwrap();
        decoder.render(crop, false, target, &mut out).unwrap();
    }
    out
}

/// What the bands that the crop needs give, and nothing else of the planes.
fn from_planes(bytes: &[u8], crop: CropBox, target: crate::ImageShape) -> Option<Vec<u8>> {
    let (mut decoder, mut all) = (Decoder::new(), PlaneBuffers::default());
    let layout = decoder.planes(bytes, &mut all).unwrap()?;
    let bands = layout.bands_of(crop);
    let (luma, chroma) = layout.bytes_of(&(0..bands.start));
    let mut rows = PlaneBuffers::default();
    rows.resize(&layout, &bands);
    let (n_luma, n_chroma) = layout.bytes_of(&bands);
    rows.luma.copy_from_slice(&all.luma[luma..luma + n_luma]);
    for (to, from) in rows.chroma.iter_mut().zip(&all.chroma) {
        to.copy_from_slice(&from[chroma..chroma + n_chroma]);
    }
    let planes = Planes { layout, first_band: bands.start, rows: &rows };
    let mut out = vec![0; target.bytes()];
    decoder.render_planes(planes, crop, false, target, &mut out).unwrap();
    Some(out)
}

/// Digest of the golden photographs, decoded and resized with these extensions of the resizer.
fn digest(extensions: CpuExtensions) -> Crc64 {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut all = Crc64::default();
    for name in ["photo-420", "photo-422", "photo-444", "progressive", "grey", "cmyk"] {
        let bytes = std::fs::read(folder.join(format!("{name}.jpg"))).unwrap();
        let mut decoder = Decoder::new();
        if extensions.is_supported() {
            decoder.set_cpu_extensions(extensions);
        }
        let size = decoder.decode(&bytes).unwrap();
        all = all.then(Crc64::of(decoder.whole(3)));
        let crop = CropBox { top: 0, left: 0, height: size.height - 1, width: size.width - 3 };
        for target in [shape(40, 48, 3), shape(160, 171, 3), shape(33, 200, 1)] {
            let mut out = vec![0; target.bytes()];
            decoder.render(crop, true, target, &mut out).unwrap();
            all = all.then(Crc64::of(&out));
        }
    }
    all
}

const PRINT_DIGEST: &str = "LACUNA_TEST_PRINT_DIGEST";

/// Prints the digest for the process of the next test, where that asks for it.
#[test]
fn digest_of_this_process() {
    if std::env::var_os(PRINT_DIGEST).is_some() {
        println!("digest {:016x}", digest(CpuExtensions::default()).value);
    }
}

/// Workers with older processors make the same pixels.
#[test]
fn every_instruction_set_gives_the_same_pixels() {
    let want = digest(CpuExtensions::default());
    for extensions in [CpuExtensions::None, CpuExtensions::Sse4_1, CpuExtensions::Avx2] {
        assert_eq!(digest(extensions), want, "resizing with {extensions:?}");
    }
    // libjpeg-turbo looks at these once in a process.
    for force in ["JSIMD_FORCENONE", "JSIMD_FORCESSE2", "JSIMD_FORCEAVX2"] {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tests::turbo::digest_of_this_process", "--nocapture"])
            .env(force, "1")
            .env(PRINT_DIGEST, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&child.stdout);
        let line = format!("digest {:016x}", want.value);
        assert!(text.contains(&line), "{force}: {text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Decoding a part gives the bytes that decoding the whole image gives.
    #[test]
    fn a_part_is_a_part_of_the_whole(
        (height, width) in (1u32..150, 1u32..150),
        corners in [any::<u32>(), any::<u32>(), any::<u32>(), any::<u32>()],
        subsampling in 0i32..7,
        quality in 30i32..100,
        progressive in any::<bool>(),
        copied in any::<bool>(),
        seed in any::<u32>(),
    ) {
        let size = Size { height, width };
        let how = Encoding { subsampling, quality, progressive, channels: 3 };
        let bytes = encode(&picture(size, 3, seed), size, how);
        let (a, b) = (corners[0] % height, corners[1] % height);
        let (c, d) = (corners[2] % width, corners[3] % width);
        let crop = CropBox {
            top: a.min(b),
            left: c.min(d),
            height: a.abs_diff(b) + 1,
            width: c.abs_diff(d) + 1,
        };
        let target = if copied { shape(crop.height, crop.width, 3) } else { shape(32, 32, 3) };
        let whole = pixels(&bytes, crop, target, false);
        prop_assert_eq!(&pixels(&bytes, crop, target, true), &whole);
        if let Some(kept) = from_planes(&bytes, crop, target) {
            prop_assert_eq!(kept, whole);
        } else {
            prop_assert!(subsampling > 4 || !PlaneLayout::is_worth(size));
        }
    }

    /// Damage gives the same pixels on every way, or an error: what a worker computes does not
    /// depend on whether it keeps planes.
    #[test]
    fn damaged_images_are_the_same_on_every_way(
        subsampling in 0i32..5,
        progressive in any::<bool>(),
        edits in collection::vec((any::<u32>(), any::<u8>()), 1..6),
        corner in (0u32..40, 0u32..40),
    ) {
        let mut bytes = encode(&picture(DAMAGED, 3, 5), DAMAGED, Encoding {
            subsampling,
            quality: 75,
            progressive,
            channels: 3,
        });
        for (at, byte) in edits {
            let at = at as usize % bytes.len();
            bytes[at.max(2)] = byte;
        }
        same_on_every_way(&bytes, corner)?;
    }

    /// A progressive image that lacks its last scans, or whose scan ends early, is legal or nearly
    /// so, and the decoder fills in what lacks from the blocks around.
    #[test]
    fn unfinished_scans_are_the_same_on_every_way(
        subsampling in 0i32..5,
        quality in 10i32..95,
        lacks in any::<u32>(),
        whole_scans in any::<bool>(),
        corner in (0u32..40, 0u32..40),
    ) {
        let how = Encoding { subsampling, quality, progressive: true, channels: 3 };
        let mut bytes = encode(&picture(DAMAGED, 3, 5), DAMAGED, how);
        let scans: Vec<usize> =
            (0..bytes.len() - 1).filter(|&at| bytes[at..at + 2] == [0xff, 0xda]).collect();
        let end = match whole_scans {
            true => scans[1 + lacks as usize % (scans.len() - 1)],
            false => scans[0] + lacks as usize % (bytes.len() - scans[0]),
        };
        bytes.truncate(end);
        bytes.extend([0xff, 0xd9]);
        same_on_every_way(&bytes, corner)?;
    }
}

const DAMAGED: Size = Size { height: 75, width: 83 };

/// Decodes whole, in part, and by planes.
fn same_on_every_way(bytes: &[u8], (top, left): (u32, u32)) -> Result<(), TestCaseError> {
    let crop = CropBox { top, left, height: 33, width: 41 };
    let target = shape(16, 16, 3);
    let (mut whole, mut part) = (vec![0; target.bytes()], vec![0; target.bytes()]);
    let mut decoder = Decoder::new();
    if decoder.decode(bytes).ok() != Some(DAMAGED) {
        return Ok(());
    }
    decoder.render(crop, false, target, &mut whole).unwrap();
    let cut = Decoder::new().decode_and_render(bytes, |_| (crop, false), target, &mut part);
    prop_assert!(cut.is_ok(), "{cut:?}");
    prop_assert_eq!(&part, &whole);
    let mut rows = PlaneBuffers::default();
    if let Ok(Some(layout)) = decoder.planes(bytes, &mut rows) {
        let planes = Planes { layout, first_band: 0, rows: &rows };
        decoder.render_planes(planes, crop, false, target, &mut part).unwrap();
        prop_assert_eq!(&part, &whole);
    }
    Ok(())
}

/// A byte of a scan's header changed, which ends the scan before it: only the columns at a part's
/// left edge tell.
#[test]
fn a_scan_lost_to_damage_is_smoothed_over_alike() {
    let how = Encoding { subsampling: 3, quality: 75, progressive: true, channels: 3 };
    let mut bytes = encode(&picture(DAMAGED, 3, 5), DAMAGED, how);
    let at = 1_115_753_307 % bytes.len();
    bytes[at] = 217;
    same_on_every_way(&bytes, (0, 12)).unwrap();
}
