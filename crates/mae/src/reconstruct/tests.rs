use super::*;
use crate::weights::Weights;
use lacuna_recipe::init;
use lacuna_recipe::mask::MaskOrder;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::state::Layout;

fn frozen(seed: u64) -> FrozenMae {
    let model = ModelConfig::preset("micro").unwrap();
    let layout = Layout::new(model.params());
    let mut params = vec![0.0; layout.numel()];
    for (block, spec) in layout.params().iter().enumerate() {
        init::fill(spec, seed, &mut params[layout.range(block)]);
    }
    assert_eq!(Weights::copy_of(&layout, &params).tensors().len(), layout.n_blocks());
    FrozenMae::new(&model, &[0.4, 0.5, 0.6], &[0.2, 0.25, 0.3], &params)
}

fn images(n: usize) -> Vec<u8> {
    (0..n * 8 * 8 * 3).map(|i| (i * 37 % 251) as u8).collect()
}

#[test]
fn rows_show_the_original_and_keep_visible_patches() {
    let (model, random) = (frozen(1), frozen(2));
    let ids: Vec<u32> = (0..2).flat_map(|i| MaskOrder::draw(5, 0, i, 16).ids_shuffle).collect();
    let pixels = images(2);
    let sheet = draw_rows(&model, &random, &pixels, &ids, Statistics::Visible);
    // Four pictures of 8 × 4 pixels with five gaps across; two rows and three gaps down.
    assert_eq!(sheet.dimensions(), (4 * 32 + 5 * 2, 2 * 32 + 3 * 2));
    let at = |column: u32, row: u32, y: usize, x: usize| {
        let (left, top) = (2 + column * 34, 2 + row * 34);
        sheet.get_pixel(left + 4 * x as u32 + 1, top + 4 * y as u32 + 3).0
    };
    for row in 0..2 {
        let kept = &ids[row * 16..][..4];
        for (y, x) in (0..64).map(|i| (i / 8, i % 8)) {
            let from = row * 192 + (y * 8 + x) * 3;
            let original: [u8; 3] = pixels[from..from + 3].try_into().unwrap();
            assert_eq!(at(0, row as u32, y, x), original);
            let visible = kept.contains(&(((y / 2) * 4 + x / 2) as u32));
            for column in 1..4 {
                assert!(!visible || at(column, row as u32, y, x) == original);
            }
            assert!(visible || at(1, row as u32, y, x) == [128; 3]);
        }
    }
}

/// What a removed patch holds must not reach the picture, or the picture would show the answer.
#[test]
fn removed_patches_do_not_leak() {
    let model = frozen(1);
    let ids = MaskOrder::draw(9, 0, 0, 16).ids_shuffle;
    let pixels = images(1);
    let (mean, std) = model.normalization();
    let scale = Scale { model: model.model(), mean, std };
    let geometry = Geometry::of(scale.model);
    let mut other = pixels.clone();
    for pixel in 0..64 {
        let (patch, _) = geometry.place(pixel / 8, pixel % 8);
        if !ids[..4].contains(&(patch as u32)) {
            other[pixel * 3..pixel * 3 + 3].fill(255);
        }
    }
    let filled = |pixels: &[u8], statistics| {
        let pred = model.predict(pixels, &ids);
        fill_in(scale, &geometry, &geometry.patches(pixels), &pred, ids.split_at(4), statistics)
    };
    let visible = filled(&pixels, Statistics::Visible);
    assert_eq!(visible, filled(&other, Statistics::Visible));
    // With its own statistics, normalising a removed patch gives the prediction back.
    let told = filled(&pixels, Statistics::Truth);
    assert_ne!(told, filled(&other, Statistics::Truth));
    let (pred, patches) = (model.predict(&pixels, &ids), geometry.patches(&pixels));
    let (kept, removed) = ids.split_at(4);
    let (mean, std) = model.normalization();
    for id in removed.iter().map(|&id| id as usize) {
        let stats = Stats::of(&patches[id], mean, std);
        for (i, x) in told[id].iter().enumerate() {
            let normal = ((x - mean[i % 3]) / std[i % 3] - stats.mean) / stats.deviation;
            let want = f64::from(pred[id * geometry.patch_values + i]);
            assert!((normal - want).abs() < 1e-9, "patch {id}: {normal} and {want}");
        }
    }
    assert!(kept.iter().all(|&id| told[id as usize] == visible[id as usize]));
}

#[test]
fn statistics_come_from_near_visible_patches() {
    let geometry = Geometry::of(frozen(1).model());
    let stats = |mean: f64| Stats { mean, deviation: 2.0 * mean };
    // Patch 5 lies at row 1, column 1: distances² to 4, 1, 7, 13 and 15 are 1, 1, 4, 4 and 8.
    let visible =
        [(4, stats(1.0)), (1, stats(3.0)), (7, stats(8.0)), (13, stats(4.0)), (15, stats(99.0))];
    let got = interpolate(&geometry, &visible, 5);
    let want = (1.0 + 3.0 + 8.0 / 4.0 + 4.0 / 4.0) / 2.5;
    assert!((got.mean - want).abs() < 1e-12 && (got.deviation - 2.0 * want).abs() < 1e-12);
}

#[test]
fn pictures_are_written_as_png() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.png");
    let picture = RgbImage::from_pixel(3, 2, Rgb([1, 2, 3]));
    write_png(&picture, "said of it", &path).unwrap();
    // The reader checks the CRC of every chunk.
    assert_eq!(image::open(&path).unwrap().to_rgb8(), picture);
    let png = std::fs::read(&path).unwrap();
    let chunk = b"\0\0\0\x1aiTXtDescription\0\0\0\0\0said of it";
    assert!(png.windows(chunk.len()).any(|bytes| bytes == chunk));
    // Of the specification: every PNG ends with this.
    assert_eq!(crc32(b"IEND"), 0xae42_6082);
    let error = write_png(&picture, "", &folder.path().join("missing/rows.png")).unwrap_err();
    assert!(error.to_string().contains("missing/rows.png"), "{error}");
}

#[test]
fn single_rows_are_those_of_the_sheet() {
    let (model, random) = (frozen(1), frozen(2));
    let (pixels, n) = (images(2), 2);
    let ids: Vec<u32> = (0..n).flat_map(|i| MaskOrder::draw(9, 0, i, 16).ids_shuffle).collect();
    let sheet = draw_rows(&model, &random, &pixels, &ids, Statistics::Visible);
    let (mean, std) = model.normalization();
    let scale = Scale { model: model.model(), mean, std };
    let rows = draw_each(scale, &pixels, &ids, &model.predict(&pixels, &ids));
    assert_eq!(rows.len(), 2);
    for (i, row) in rows.iter().enumerate() {
        let step = row.height() - GAP;
        for (x, y, pixel) in row.enumerate_pixels() {
            assert_eq!(pixel, sheet.get_pixel(x, i as u32 * step + y), "row {i} at {x}, {y}");
        }
    }
}
