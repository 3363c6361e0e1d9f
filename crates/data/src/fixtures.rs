//! Images and data sets for this crate's tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};
use lacuna_pixels::ImageShape;

use crate::dataset::Dataset;
use crate::pack::{Existing, PackConfig, PackReport, PackSource, pack};
use crate::synthetic::SyntheticSpec;

pub(crate) fn png(pixels: &[u8], width: u32, height: u32, color: ExtendedColorType) -> Vec<u8> {
    let mut out: Vec<u8> = Vec::new();
    PngEncoder::new(&mut out).write_image(pixels, width, height, color).unwrap();
    out
}

pub(crate) fn jpeg(pixels: &[u8], width: u32, height: u32, color: ExtendedColorType) -> Vec<u8> {
    let mut out: Vec<u8> = Vec::new();
    JpegEncoder::new_with_quality(&mut out, 95).write_image(pixels, width, height, color).unwrap();
    out
}

/// Bytes that differ from place to place and look like noise.
pub(crate) fn noise(n: usize, seed: u32) -> Vec<u8> {
    let mut x: u32 = seed.wrapping_mul(2_654_435_761) | 1;
    let next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        (x >> 24) as u8
    };
    std::iter::repeat_with(next).take(n).collect()
}

/// A grey image that is different for each `seed`.
pub(crate) fn grey_png(side: u32, seed: u32) -> Vec<u8> {
    let pixels = noise((side * side) as usize, seed);
    png(&pixels, side, side, ExtendedColorType::L8)
}

pub(crate) fn config(shard_bytes: u64) -> PackConfig {
    PackConfig { name: "demo".to_string(), shard_bytes, existing: Existing::Refuse }
}

pub(crate) fn pack_quietly(source: &PackSource, out: &Path, shard_bytes: u64) -> PackReport {
    pack(source, out, &config(shard_bytes), &mut |_| {}).unwrap()
}

/// Packs generated images, a few shards of them.
pub(crate) fn synthetic(folder: &Path, n_images: u64, side: u32, channels: u32) -> Arc<Dataset> {
    let spec = SyntheticSpec {
        n_images,
        shape: ImageShape { height: side, width: side, channels },
        seed: 5,
    };
    pack_quietly(&PackSource::Synthetic(spec), folder, 100_000);
    Arc::new(Dataset::open(folder).unwrap())
}

/// Inverts one byte of a file.
pub(crate) fn damage(path: &Path, offset: u64) {
    let mut bytes = fs::read(path).unwrap();
    bytes[offset as usize] ^= 0xFF;
    fs::write(path, bytes).unwrap();
}

/// Writes an archive with the given members.
pub(crate) fn write_tar(path: &Path, members: &[(&str, &[u8])]) {
    let mut builder = tar::Builder::new(fs::File::create(path).unwrap());
    for (name, data) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *data).unwrap();
    }
    builder.finish().unwrap();
}

/// A file system in memory, which goes when it is dropped.
pub(crate) struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one of so many KiB on `dir`; none, and a line that says so, without the privilege.
    pub fn mount(dir: &Path, kib: u32) -> Option<Self> {
        fs::create_dir_all(dir).unwrap();
        let options = format!("size={kib}k,nr_inodes=200");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir);
        if mount.output().is_ok_and(|out| out.status.success()) {
            return Some(SmallDisk(dir.to_path_buf()));
        }
        println!("a full disk: skipped, mounting a small file system needs privileges");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily, as a test that failed may have files open.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
