use std::fs;

use image::ExtendedColorType;

use super::*;
use crate::fixtures::{noise, pack_quietly, png, synthetic};
use crate::pack::PackSource;

fn dataset_of(images: &[Vec<u8>]) -> (tempfile::TempDir, Dataset) {
    let root = tempfile::tempdir().unwrap();
    let input = root.path().join("in");
    fs::create_dir_all(&input).unwrap();
    for (i, bytes) in images.iter().enumerate() {
        fs::write(input.join(format!("{i:03}.png")), bytes).unwrap();
    }
    pack_quietly(&PackSource::Folder(input), &root.path().join("out"), 1 << 20);
    let dataset = Dataset::open(&root.path().join("out")).unwrap();
    (root, dataset)
}

#[test]
fn channel_statistics() {
    let rgb = [0, 100, 255, 200, 100, 255];
    let (_root, dataset) = dataset_of(&[png(&rgb, 2, 1, ExtendedColorType::Rgb8)]);
    let stats = channel_stats(&dataset, 3, 10, &mut |_| {}).unwrap();
    let near =
        |got: &[f64], want: [f64; 3]| got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-12);
    assert!(near(&stats.mean, [100.0 / 255.0, 100.0 / 255.0, 1.0]), "{stats:?}");
    assert!(near(&stats.std, [100.0 / 255.0, 0.0, 0.0]), "{stats:?}");
    assert_eq!(stats.n_images, 1);
}

#[test]
fn bad_images_are_listed() {
    let good = png(&noise(64, 1), 8, 8, ExtendedColorType::L8);
    let cut = good[..50].to_vec();
    let (_root, dataset) = dataset_of(&[good, cut.clone()]);
    let stats = channel_stats(&dataset, 1, 10, &mut |_| {}).unwrap();
    assert_eq!((stats.n_images, stats.skipped.n), (1, 1));
    let (_root, dataset) = dataset_of(&[cut]);
    let error = channel_stats(&dataset, 1, 10, &mut |_| {}).unwrap_err();
    assert!(matches!(error, StatsError::NoImages { n: 1, .. }));
}

fn config(patch_size: u32, side: u32) -> BaselineConfig {
    BaselineConfig {
        shape: ImageShape { height: side, width: side, channels: 1 },
        patch_size,
        mean: vec![0.5],
        std: vec![0.25],
    }
}

/// A patch of n values has Σz² = n − 1 once it is normalised (up to ε), a flat one has 0.
#[test]
fn baselines_of_known_images() {
    let mut pixels = noise(64, 1);
    for row in pixels.chunks_mut(8).take(4) {
        row[..4].fill(7);
    }
    let (_root, dataset) = dataset_of(&[png(&pixels, 8, 8, ExtendedColorType::L8)]);
    let got = baselines(&dataset, &config(4, 8), 10, &mut |_| {}).unwrap();
    let want = 0.75 * 15.0 / 16.0;
    assert!((got.zero - want).abs() < 1e-6, "{got:?}");
    assert!(got.mean_patch < got.zero, "{got:?}");
    assert!(got.mean_patch_by_place.abs() < 1e-9, "one image is its own mean: {got:?}");
}

#[test]
fn baselines_of_many_images() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = synthetic(folder.path(), 60, 16, 1);
    let got = baselines(&dataset, &config(4, 16), 40, &mut |_| {}).unwrap();
    assert_eq!(got.n_images, 40);
    assert!(got.zero <= 15.0 / 16.0 && got.zero > 0.9, "{got:?}");
    assert!(got.mean_patch <= got.zero && got.mean_patch_by_place <= got.mean_patch, "{got:?}");
    let error = baselines(&dataset, &config(5, 16), 40, &mut |_| {}).unwrap_err();
    assert!(matches!(error, StatsError::PatchSize { .. }));
}
