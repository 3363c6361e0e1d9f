use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::ExtendedColorType;
use lacuna_pixels::ImageShape;
use lacuna_recipe::augment::{Augment, Size};
use lacuna_types::SampleId;
use tempfile::TempDir;

use super::*;
use crate::fixtures::{SmallDisk, jpeg, noise, pack_quietly, png};
use crate::pack::PackSource;
use crate::reader::SampleReader;

const SHAPE: ImageShape = ImageShape { height: 16, width: 16, channels: 3 };
const N_CROPS: u32 = 6;

struct Fixture {
    dir: TempDir,
    dataset: Arc<Dataset>,
}

/// JPEG of several sizes, one of them grey, one too small to keep, and a PNG.
fn fixture() -> Fixture {
    let dir = TempDir::new().unwrap();
    let images = dir.path().join("images");
    fs::create_dir(&images).unwrap();
    for (i, (width, height)) in
        [(70u32, 90u32), (33, 65), (120, 31), (16, 16), (9, 40), (64, 64)].into_iter().enumerate()
    {
        let n = (width * height) as usize;
        let (pixels, color) = match i {
            1 => (noise(n, 3), ExtendedColorType::L8),
            _ => (noise(3 * n, i as u32), ExtendedColorType::Rgb8),
        };
        let bytes = jpeg(&pixels, width, height, color);
        fs::write(images.join(format!("{i}.jpg")), bytes).unwrap();
    }
    let pixels = noise(3 * 40 * 40, 9);
    fs::write(images.join("7.png"), png(&pixels, 40, 40, ExtendedColorType::Rgb8)).unwrap();
    let packed = dir.path().join("packed");
    pack_quietly(&PackSource::Folder(images), &packed, 1 << 20);
    let dataset = Arc::new(Dataset::open(&packed).unwrap());
    assert_eq!(dataset.n_samples(), 7);
    Fixture { dir, dataset }
}

impl Fixture {
    fn cache(&self, bytes_max: u64) -> PlaneCache {
        let dir = self.dir.path().join("cache");
        PlaneCache::open(&dir, bytes_max, self.dataset.clone(), Fill::Always).unwrap()
    }

    /// Renders every sample a few times and compares with what no cache gives.
    fn check(&self, cache: &PlaneCache) {
        let (mut with, mut without) = (SampleReader::new(), SampleReader::new());
        for id in (0..self.dataset.n_samples()).map(SampleId) {
            for epoch in 0..N_CROPS {
                let choose = |size: Size| Augment::PRETRAIN.draw(1, epoch, id.0, size);
                let (mut got, mut want) = (vec![0; SHAPE.bytes()], vec![0; SHAPE.bytes()]);
                with.render_cached(cache, &self.dataset, id, choose, SHAPE, &mut got).unwrap();
                without.render(&self.dataset, id, choose, SHAPE, &mut want).unwrap();
                assert!(got == want, "sample {id}, epoch {epoch}");
            }
        }
    }

    fn file(&self) -> PathBuf {
        let mut found = Vec::new();
        collect(&self.dir.path().join("cache"), &mut found);
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }
}

fn collect(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { collect(&path, into) } else { into.push(path) }
    }
}

/// Samples of the fixture whose planes are kept.
const KEPT: u64 = 5;

#[test]
fn planes_give_the_pixels_of_the_jpeg() {
    let fixture = fixture();
    let cache = fixture.cache(u64::MAX);
    fixture.check(&cache);
    let stats = cache.stats();
    assert_eq!((stats.misses, stats.hits), (KEPT, KEPT * u64::from(N_CROPS - 1)));
    assert_eq!((stats.damaged, stats.full), (0, false));
    // Another process finds them.
    let again = fixture.cache(u64::MAX);
    fixture.check(&again);
    assert_eq!((again.stats().misses, again.stats().hits), (0, KEPT * u64::from(N_CROPS)));
    assert!(again.stats().bytes > 0);
}

/// Several trainers of a machine fill one cache; together they stay within its size.
#[test]
fn sharers_stay_within_the_size_together() {
    let (alone, shared) = (fixture(), fixture());
    let cache = alone.cache(u64::MAX);
    alone.check(&cache);
    let room = taken(alone.file().parent().unwrap()).unwrap() / 5 * 3;
    let (first, second) = (shared.cache(room), shared.cache(room));
    // They begin at different ends, so that neither finds what the other made.
    let mut reader = SampleReader::new();
    let mut add = |cache: &PlaneCache, id: u64| {
        let choose = |size: Size| Augment::PRETRAIN.draw(1, 0, id, size);
        let mut out = vec![0; SHAPE.bytes()];
        let (data, id) = (&shared.dataset, SampleId(id));
        reader.render_cached(cache, data, id, choose, SHAPE, &mut out).unwrap();
    };
    let n = shared.dataset.n_samples();
    for id in 0..n {
        add(&first, id);
        add(&second, n - 1 - id);
    }
    let found = taken(shared.file().parent().unwrap()).unwrap();
    assert!(0 < found && found <= room, "{found} of {room}");
    assert!(first.stats().full || second.stats().full, "{room} is not all of it");
}

#[test]
fn two_processes_share_a_chunk() {
    let fixture = fixture();
    let (first, second) = (fixture.cache(u64::MAX), fixture.cache(u64::MAX));
    // Both have the file open before anything is there.
    assert_eq!(second.read_any(&fixture), None);
    fixture.check(&first);
    fixture.check(&second);
    assert_eq!(second.stats().misses, 1);
}

impl PlaneCache {
    fn read_any(&self, fixture: &Fixture) -> Option<(PlaneLayout, u32)> {
        let record = fixture.dataset.index().record(SampleId(0));
        let crop = CropBox { top: 0, left: 0, height: 4, width: 4 };
        self.read(SampleId(0), &record, crop, &mut PlaneBuffers::default())
    }
}

#[test]
fn a_damaged_byte_gives_no_wrong_pixel() {
    let fixture = fixture();
    fixture.check(&fixture.cache(u64::MAX));
    let (path, sound) = (fixture.file(), fs::read(fixture.file()).unwrap());
    let mut noticed = 0;
    let written = (0..sound.len()).filter(|at| sound[*at] != 0);
    for at in written.step_by(97).chain(0..7) {
        for flip in [0x01, 0xFF] {
            let mut bytes = sound.clone();
            bytes[at] ^= flip;
            fs::write(&path, bytes).unwrap();
            let cache = fixture.cache(u64::MAX);
            fixture.check(&cache);
            noticed += cache.stats().damaged;
        }
    }
    assert!(noticed > 100, "{noticed}");
    // What was thrown away was decoded again and put back.
    let cache = fixture.cache(u64::MAX);
    fixture.check(&cache);
    assert_eq!(cache.stats().damaged, 0);
}

/// A crash leaves any part of the writes: here all bytes up to one place, and the whole table.
#[test]
fn a_crash_at_any_write_gives_no_wrong_pixel() {
    let fixture = fixture();
    fixture.check(&fixture.cache(u64::MAX));
    let (path, sound) = (fixture.file(), fs::read(fixture.file()).unwrap());
    for part in 0..60 {
        let cut = sound.len() * part / 60;
        let mut zeroed = sound.clone();
        zeroed[cut.max(7)..].fill(0);
        for bytes in [&sound[..cut], &zeroed] {
            fs::write(&path, bytes).unwrap();
            fixture.check(&fixture.cache(u64::MAX));
        }
    }
}

#[test]
fn planes_of_another_sample_are_not_taken() {
    let fixture = fixture();
    let cache = fixture.cache(u64::MAX);
    fixture.check(&cache);
    let chunk = cache.chunk_file(SampleId(0)).unwrap();
    // Sample 5 is as large as sample 0's first bands; copy them there.
    let mut bands = vec![0; 4096];
    chunk.file.read_exact_at(&mut bands, chunk.places[0]).unwrap();
    chunk.file.write_all_at(&bands, chunk.places[5]).unwrap();
    fixture.check(&cache);
    assert_eq!(cache.stats().damaged, 1);
}

#[test]
fn a_folder_that_goes_away_costs_no_pixel() {
    let fixture = fixture();
    let cache = fixture.cache(u64::MAX);
    fixture.check(&cache);
    fs::remove_dir_all(fixture.dir.path().join("cache")).unwrap();
    fixture.check(&cache);
    // One that opens its files only now makes the folder again.
    let cache = fixture.cache(u64::MAX);
    fs::remove_dir_all(fixture.dir.path().join("cache")).unwrap();
    fixture.check(&cache);
    assert!(fixture.file().exists());
}

#[test]
fn a_full_cache_is_read_and_no_longer_written() {
    let fixture = fixture();
    let cache = fixture.cache(30_000);
    fixture.check(&cache);
    let stats = cache.stats();
    assert!(
        stats.full && stats.bytes <= 30_000 && stats.hits > 0 && stats.misses > KEPT,
        "{stats:?}"
    );
}

#[test]
fn a_chunk_that_cannot_be_opened_costs_no_pixel() {
    let fixture = fixture();
    let cache = fixture.cache(u64::MAX);
    fs::create_dir(cache.folder.join("00000000.planes")).unwrap();
    fixture.check(&cache);
    assert_eq!(cache.stats().hits, 0);
    let file = fixture.dir.path().join("a-file");
    fs::write(&file, b"").unwrap();
    let error = PlaneCache::open(&file, 1, fixture.dataset.clone(), Fill::Always).unwrap_err();
    assert!(error.to_string().contains("a-file"), "{error}");
}

/// A file system of 40 KiB under the cache, whose limit is far above that.
#[test]
fn a_full_disk_costs_decoding_only() {
    let fixture = fixture();
    let dir = fixture.dir.path().join("cache");
    let Some(_disk) = SmallDisk::mount(&dir, 40) else { return };
    let cache = fixture.cache(u64::MAX);
    fixture.check(&cache);
    let stats = cache.stats();
    assert!(stats.full && stats.hits > 0, "what fits is kept: {stats:?}");
    drop(cache);
    fixture.check(&fixture.cache(u64::MAX));
}

/// Nothing is written before steps wait for data; what is there is read all the same.
#[test]
fn waiting_fills_the_cache() {
    let fixture = fixture();
    let dir = fixture.dir.path().join("cache");
    let open =
        || PlaneCache::open(&dir, u64::MAX, fixture.dataset.clone(), Fill::WhenWaiting).unwrap();
    let cache = open();
    fixture.check(&cache);
    assert_eq!((cache.stats().hits, cache.stats().bytes), (0, 0));
    assert!(!cache.stats().filling);
    cache.waited(std::time::Duration::from_secs(1), std::time::Duration::from_secs(20));
    assert!(cache.stats().filling);
    // How much is added depends on how long it takes; in the end all of it is.
    let mut rounds = 0;
    while cache.stats().hits == 0 && rounds < 200 {
        fixture.check(&cache);
        rounds += 1;
    }
    assert!(cache.stats().hits > 0, "{:?}", cache.stats());
    let again = open();
    fixture.check(&again);
    assert!(again.stats().hits > 0);
}
