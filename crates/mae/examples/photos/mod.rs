//! A data set of small pictures, cut out of a folder of photographs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use image::RgbImage;
use image::imageops::{FilterType, crop_imm, resize};
use lacuna_data::Dataset;
use lacuna_data::pack::{Existing, PackConfig, PackSource, SHARD_BYTES_DEFAULT, pack};
use lacuna_recipe::philox::{Draws, Tag};

/// Pictures cut out.
const N_PIECES: u64 = 4096;
/// Their side: crops of pre-training, a fifth of the area and more, are near 64 pixels.
const SIDE: u32 = 96;
/// Shorter sides of the photographs that pieces are cut from: from near, and nearly the whole. All
/// are far smaller than the originals, so that these's own JPEG artefacts go.
const SCALES: [u32; 3] = [128, 224, 400];
/// Least [`detail`] of a piece: a smooth sky is no task.
const DETAIL_MIN: f64 = 7.0;
/// Pieces tried; of usual photographs every second one will do.
const CANDIDATES_MAX: u64 = 20 * N_PIECES;

/// Opens the data set in `work`; cuts and packs it first, from the JPEG files of `photos`.
pub fn open(photos: &Path, work: &Path) -> anyhow::Result<Dataset> {
    let (pieces, packed) = (work.join("pieces"), work.join("packed"));
    if !pieces.exists() {
        let part = work.join("pieces.part");
        fs::create_dir_all(&part).context("make a folder for the pieces")?;
        cut(photos, &part)?;
        fs::rename(&part, &pieces).context("keep the pieces")?;
    }
    let config = PackConfig {
        name: "photos".into(),
        shard_bytes: SHARD_BYTES_DEFAULT,
        existing: Existing::Replace,
    };
    pack(&PackSource::Folder(pieces), &packed, &config, &mut |_| ()).context("pack the pieces")?;
    Dataset::open(&packed).context("open the packed pieces")
}

fn cut(photos: &Path, out: &Path) -> anyhow::Result<()> {
    let entries = fs::read_dir(photos).with_context(|| format!("list `{}`", photos.display()))?;
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in entries {
        files.push(entry?.path());
    }
    files.retain(|file| file.extension().is_some_and(|end| end == "jpg"));
    files.sort();
    let mut sources: Vec<RgbImage> = Vec::new();
    for file in &files {
        let photo = image::open(file).with_context(|| format!("read `{}`", file.display()))?;
        let photo = photo.into_rgb8();
        for shorter in SCALES {
            let scaled = |side: u32| side * shorter / photo.width().min(photo.height());
            let (width, height) = (scaled(photo.width()), scaled(photo.height()));
            sources.push(resize(&photo, width, height, FilterType::Lanczos3));
        }
    }
    if sources.is_empty() {
        bail!("`{}` has no JPEG files", photos.display());
    }
    let mut n_kept: u64 = 0;
    for candidate in 0..CANDIDATES_MAX {
        if n_kept == N_PIECES {
            return Ok(());
        }
        let draws = Draws::new(0, Tag::User, 0, candidate);
        let source = &sources[draws.below(0, sources.len() as u32) as usize];
        let left = draws.below(1, source.width() - SIDE + 1);
        let top = draws.below(2, source.height() - SIDE + 1);
        let picture = crop_imm(source, left, top, SIDE, SIDE).to_image();
        if detail(&picture) >= DETAIL_MIN {
            picture.save(out.join(format!("{n_kept:04}.png"))).context("write a piece")?;
            n_kept += 1;
        }
    }
    bail!("the photographs of `{}` are too smooth", photos.display())
}

/// Mean difference of a value and its neighbour to the right.
fn detail(picture: &RgbImage) -> f64 {
    let row_bytes = 3 * picture.width() as usize;
    let rows = picture.as_raw().chunks_exact(row_bytes);
    let pairs = rows.flat_map(|row| row.iter().zip(&row[3..]));
    let (n, sum) =
        pairs.fold((0u64, 0u64), |(n, sum), (&a, &b)| (n + 1, sum + u64::from(a.abs_diff(b))));
    sum as f64 / n as f64
}
