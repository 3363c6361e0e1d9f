//! Data sets behind a URL, with and without a cache, while everything goes wrong.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lacuna_pixels::ImageShape;
use lacuna_recipe::augment::Augment;
use lacuna_recipe::order::{OrderMode, OrderParams};
use lacuna_recipe::step::{Geometry, SlotBatch};
use lacuna_store::Limits;
use lacuna_store::testing::{Fault, Plan, Server, mixed};
use lacuna_types::{Slot, Step};
use tempfile::TempDir;

use super::*;
use crate::dataset::{Access, Dataset, OpenError, ReadSampleError};
use crate::fixtures::{SmallDisk, damage, grey_png, pack_quietly, synthetic};
use crate::loader::{BadSamplePolicy, LoadError, Loader, LoaderConfig};
use crate::pack::PackSource;

const DEADLINE: Duration = Duration::from_secs(60);
const N: u64 = 240;

fn limits() -> Limits {
    Limits {
        deadline: Duration::from_secs(20),
        stall: Duration::from_millis(500),
        attempt: Duration::from_secs(1),
        backoff_first: Duration::from_millis(2),
        backoff_max: Duration::from_millis(20),
        in_flight: 16,
    }
}

/// A data set of about fifteen chunks, and a server of it.
struct Desk {
    folder: TempDir,
    local: Arc<Dataset>,
    server: Server,
}

fn desk(latency: Duration, plan: Box<Plan>) -> Desk {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    fs::create_dir(&images).unwrap();
    for i in 0..N as u32 {
        fs::write(images.join(format!("{i:03}.png")), grey_png(20 + i % 9, i)).unwrap();
    }
    let packed = folder.path().join("bucket/packed");
    pack_quietly(&PackSource::Folder(images), &packed, 30_000);
    let local = Arc::new(Dataset::open(&packed).unwrap());
    let server = Server::start(folder.path(), latency, plan).unwrap();
    Desk { folder, local, server }
}

fn faultless() -> Box<Plan> {
    Box::new(|_, _| Fault::None)
}

impl Desk {
    fn access(&self, bytes_max: Option<u64>) -> Access {
        let chunks = bytes_max.map(|bytes_max| ChunkCacheConfig {
            dir: self.folder.path().join("cache"),
            bytes_max,
            sharers: 1,
        });
        Access { limits: limits(), options: Vec::new(), chunks }
    }

    fn try_open(&self, access: &Access) -> Result<Dataset, OpenError> {
        let url = format!("{}/bucket/packed", self.server.url());
        Dataset::open_with(Path::new(&url), access)
    }

    fn open(&self, bytes_max: Option<u64>) -> Arc<Dataset> {
        Arc::new(self.try_open(&self.access(bytes_max)).unwrap())
    }

    /// Requests of the index and of shards so far.
    fn n_requests(&self) -> usize {
        self.server.seen().len()
    }

    /// The files of the cache.
    fn files(&self, ending: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.folder.path().join("cache")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|found| found == ending) {
                    found.push(path);
                }
            }
        }
        found.sort();
        found
    }
}

fn config(dataset: Arc<Dataset>, mode: OrderMode) -> LoaderConfig {
    let geometry = Geometry { n_samples: dataset.n_samples(), batch: 24, slot_batch: 6 };
    let params = OrderParams { mode, lanes: 4, block: 20 };
    LoaderConfig {
        order: dataset.order_spec(params, 99, geometry.batch),
        dataset,
        augment: Augment::PRETRAIN,
        geometry,
        shape: ImageShape { height: 16, width: 16, channels: 1 },
        n_patches: 16,
        threads: 3,
        ahead_slots: 3,
        bad_samples: BadSamplePolicy::Substitute,
        on_bad_sample: Arc::new(|_| {}),
        planes: None,
    }
}

/// All slots of two epochs and a bit.
fn batches(dataset: &Arc<Dataset>, mode: OrderMode) -> Vec<SlotBatch> {
    let loader = Loader::new(config(dataset.clone(), mode)).unwrap();
    let mut stream = loader.stream(Step(0), Step(23), vec![0, 1, 2, 3]).unwrap();
    (0..23 * 4).map(|_| stream.next(DEADLINE).unwrap()).collect()
}

/// Latency, resets, cut answers, refusals, drips, silence and wrong bytes: the same batches as from
/// files, with a large cache, one that must evict, and none.
#[test]
fn a_store_full_of_faults_gives_the_same_batches() {
    let shares = [
        (6, Fault::Reset),
        (8, Fault::Cut(50)),
        (6, Fault::Status(500)),
        (6, Fault::Status(503)),
        (4, Fault::Drip { bytes: 4000, pause: Duration::from_millis(20) }),
        (1, Fault::Hang(Duration::from_secs(1))),
        (6, Fault::Garble),
    ];
    let want = desk(Duration::ZERO, faultless());
    for mode in [OrderMode::Block, OrderMode::Global] {
        let want = batches(&want.local, mode);
        for (seed, bytes_max) in [(1, Some(1 << 30)), (2, Some(260_000)), (3, None)] {
            let desk = desk(Duration::from_millis(3), index_first(mixed(seed, &shares)));
            let dataset = desk.open(bytes_max);
            assert_eq!(dataset.fingerprint(), desk.local.fingerprint());
            assert!(batches(&dataset, mode) == want, "{mode:?}, {bytes_max:?}");
            assert!(dataset.store_stats().retries > 0, "the faults were met");
            if let (Some(bytes_max), Some(chunks)) = (bytes_max, dataset.chunks()) {
                let kept: u64 = chunks.scan().iter().map(|(_, bytes)| bytes).sum();
                assert!(kept <= bytes_max, "{kept} bytes are kept");
                // In global order, chunks are fetched only where there is room for all.
                let evicts = bytes_max < 1 << 30 && mode == OrderMode::Block;
                assert_eq!(chunks.stats().evictions > 0, evicts);
            }
        }
    }
}

/// Spares the index: it has no second answer to compare with.
fn index_first(plan: Box<Plan>) -> Box<Plan> {
    Box::new(move |n, path| match (plan(n, path), path.ends_with(".lacuna")) {
        (Fault::Garble, true) => Fault::None,
        (fault, _) => fault,
    })
}

/// Once everything is there, nothing is asked for: neither in the next epoch nor by the next
/// process.
#[test]
fn what_is_kept_is_not_downloaded_again() {
    let desk = desk(Duration::ZERO, faultless());
    let want = batches(&desk.local, OrderMode::Block);
    let dataset = desk.open(Some(1 << 30));
    assert!(batches(&dataset, OrderMode::Block) == want);
    let n_chunks = desk.local.index().n_chunks() as usize;
    assert_eq!(dataset.chunks().unwrap().stats().downloads as usize, n_chunks);
    assert_eq!(desk.files("chunk").len(), n_chunks);
    let again = desk.open(Some(1 << 30));
    let before = desk.n_requests();
    assert!(batches(&again, OrderMode::Block) == want);
    assert_eq!(desk.n_requests(), before);
}

/// The order says what goes: with a cache of two thirds, fewer downloads than a cache that forgets
/// the oldest would need, which in a fixed cycle finds nothing at all.
#[test]
fn what_is_needed_last_is_evicted_first() {
    let desk = desk(Duration::ZERO, faultless());
    let mut all: Vec<u64> = (0..desk.local.index().n_chunks() as usize)
        .map(|chunk| desk.open(Some(1)).chunks().unwrap().chunk_bytes(chunk))
        .collect();
    all.sort();
    let total: u64 = all.iter().map(|bytes| bytes.next_multiple_of(4096) + 4096).sum();
    let dataset = desk.open(Some(total * 2 / 3));
    let mut config = config(dataset.clone(), OrderMode::Sequential);
    config.order.params.lanes = 1;
    let loader = Loader::new(config).unwrap();
    let n_epochs = 4;
    let steps = n_epochs * loader.config().geometry.steps_per_epoch();
    let mut stream = loader.stream(Step(0), Step(steps), vec![0, 1, 2, 3]).unwrap();
    (0..steps * 4).for_each(|_| drop(stream.next(DEADLINE).unwrap()));
    let stats = dataset.chunks().unwrap().stats();
    let n_chunks = all.len() as u64;
    assert!(stats.downloads < n_chunks * n_epochs * 3 / 4, "{stats:?} of {n_chunks} chunks");
}

/// The workers of a machine share one folder: each chunk is downloaded once.
#[test]
fn two_workers_download_a_chunk_once() {
    let desk = desk(Duration::from_millis(5), faultless());
    let want = batches(&desk.local, OrderMode::Block);
    let (first, second) = (desk.open(Some(1 << 30)), desk.open(Some(1 << 30)));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| batches(&second, OrderMode::Block));
        assert!(batches(&first, OrderMode::Block) == want);
        assert!(other.join().unwrap() == want);
    });
    let downloads = [&first, &second].map(|d| d.chunks().unwrap().stats().downloads);
    assert_eq!(downloads[0] + downloads[1], desk.local.index().n_chunks(), "{downloads:?}");
}

/// A frozen process that holds a chunk costs its neighbours one short wait, not one a sample.
#[test]
fn a_frozen_neighbour_is_passed_by() {
    let desk = desk(Duration::ZERO, faultless());
    let dataset = desk.open(Some(1 << 30));
    let chunks = dataset.chunks().unwrap();
    let part = File::create(chunks.folder().join("00000000.part")).unwrap();
    rustix::fs::flock(&part, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let start = Instant::now();
    let n = desk.local.index().chunk_bounds()[1];
    for id in 0..n {
        assert_eq!(dataset.sample(SampleId(id)).unwrap(), desk.local.sample(SampleId(id)).unwrap());
    }
    assert!(n > 9 && start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(chunks.stats().downloads, 0);
    assert!(dataset.sample(SampleId(n)).is_ok());
    assert_eq!(chunks.stats().downloads, 1, "other chunks are kept");
}

/// Whatever a killed process or a bad disk leaves: the right bytes, or a download.
#[test]
fn damaged_files_never_give_a_wrong_byte() {
    let desk = desk(Duration::ZERO, faultless());
    let read = |dataset: &Dataset| {
        (0..N).map(|id| dataset.sample(SampleId(id)).unwrap()).collect::<Vec<_>>()
    };
    let want = read(&desk.local);
    assert!(read(&desk.open(Some(1 << 30))) == want);
    let files = desk.files("chunk");
    for (i, path) in files.iter().enumerate() {
        let bytes = fs::read(path).unwrap();
        match i % 5 {
            // Killed while writing: only the other name is there.
            0 => fs::rename(path, path.with_extension("part")).unwrap(),
            1 => fs::write(path, &bytes[..bytes.len() * i / files.len()]).unwrap(),
            2 => damage(path, bytes.len() as u64 / 2),
            3 => fs::write(path, b"").unwrap(),
            _ => fs::write(path, vec![0; bytes.len()]).unwrap(),
        }
    }
    let dataset = desk.open(Some(1 << 30));
    assert!(read(&dataset) == want);
    assert!(dataset.chunks().unwrap().stats().damaged > 0);
    let again = desk.open(Some(1 << 30));
    assert!(read(&again) == want);
    assert_eq!(again.chunks().unwrap().stats().downloads, 0, "it was mended");
}

/// The cache is removed again and again while two epochs are read.
#[test]
fn a_cache_deleted_under_way_costs_downloads_only() {
    let desk = desk(Duration::ZERO, faultless());
    let want = batches(&desk.local, OrderMode::Block);
    let dataset = desk.open(Some(1 << 30));
    let done = std::sync::atomic::AtomicBool::new(false);
    let cache = desk.folder.path().join("cache");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let _ = fs::remove_dir_all(&cache);
                std::thread::yield_now();
            }
        });
        let got = batches(&dataset, OrderMode::Block);
        done.store(true, Ordering::Relaxed);
        assert!(got == want);
    });
}

/// A file system of 160 KiB under the cache, whose limit is far above that.
#[test]
fn a_full_disk_costs_requests_only() {
    let desk = desk(Duration::ZERO, faultless());
    let dir = desk.folder.path().join("cache");
    let Some(_disk) = SmallDisk::mount(&dir, 160) else { return };
    let want = batches(&desk.local, OrderMode::Block);
    let dataset = desk.open(Some(1 << 30));
    assert!(batches(&dataset, OrderMode::Block) == want);
    assert!(!desk.files("chunk").is_empty(), "what fits is kept");
}

/// What rotted in a store is replaced by nothing, cached or not: who has it cached from before
/// trains on the right bytes. What differs each time is no answer at all.
#[test]
fn bytes_that_rotted_in_a_store_are_not_replaced() {
    let desk = desk(Duration::ZERO, faultless());
    let before = desk.open(Some(1 << 30));
    let want = batches(&before, OrderMode::Block);
    for id in [3, 77, 78] {
        let place = desk.local.place(SampleId(id));
        damage(&place.shard, place.offset + 9);
    }
    assert!(batches(&before, OrderMode::Block) == want, "its cache was filled before");
    drop(before);
    fs::remove_dir_all(desk.folder.path().join("cache")).unwrap();
    for bytes_max in [None, Some(1 << 30)] {
        for _ in 0..2 {
            let dataset = desk.open(bytes_max);
            let loader = Loader::new(config(dataset.clone(), OrderMode::Block)).unwrap();
            let slots = (0..23).flat_map(|step| (0..4).map(move |index| (step, index)));
            let slots = slots.map(|(step, index)| Slot { step: Step(step), index });
            let failed: Vec<LoadError> = slots.filter_map(|slot| loader.load(slot).err()).collect();
            assert!(failed.len() >= 3, "{bytes_max:?}: each sample in each epoch: {failed:?}");
            assert!(failed.iter().all(|error| !error.is_of_the_data()), "{failed:?}");
            assert_eq!(loader.n_bad(), 0);
            let error = dataset.sample(SampleId(3)).unwrap_err();
            let ReadSampleError::Corrupt { place, .. } = &error else { panic!("{error}") };
            assert!(place.member.as_deref().is_some_and(|name| name.ends_with(".png")), "{error}");
            assert!(error.to_string().contains("/bucket/packed/"), "{error}");
        }
    }
    for id in [3, 77, 78] {
        let place = desk.local.place(SampleId(id));
        damage(&place.shard, place.offset + 9);
    }
    let repaired = batches(&desk.open(Some(1 << 30)), OrderMode::Block);
    assert!(repaired == want, "no cache keeps what was wrong");
    let flip = std::sync::atomic::AtomicU64::new(0);
    let plan: Box<Plan> = Box::new(move |_, path| match path.ends_with(".tar") {
        // Another part of the bytes each time.
        true if flip.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) => Fault::Garble,
        _ => Fault::None,
    });
    let other = self::desk(Duration::ZERO, plan);
    assert!(other.open(None).sample(SampleId(3)).is_ok(), "the second answer was right");
}

/// A store that dies under way is an error of reading, not of samples, after the deadline.
#[test]
fn a_store_that_dies_is_said_in_time() {
    let alive = Arc::new(AtomicBool::new(true));
    let of_plan = alive.clone();
    let plan: Box<Plan> = Box::new(move |_, _| match of_plan.load(Ordering::Relaxed) {
        true => Fault::None,
        false => Fault::Status(503),
    });
    let desk = desk(Duration::ZERO, plan);
    let access = desk.access(Some(1 << 30));
    let limits = Limits { deadline: Duration::from_millis(600), ..limits() };
    let dataset = Arc::new(desk.try_open(&Access { limits, ..access }).unwrap());
    alive.store(false, Ordering::Relaxed);
    let loader = Loader::new(config(dataset, OrderMode::Block)).unwrap();
    let start = Instant::now();
    let error = loader.load(lacuna_types::Slot { step: Step(0), index: 0 }).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(9));
    let LoadError::Sample { source, .. } = &error else { panic!("{error}") };
    assert!(!source.is_bad_sample());
    let text = crate::files::chain(&error);
    for part in ["slot 0 of step 0", "/bucket/packed/demo-0000", "attempts in", "503"] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn dropping_a_stream_does_not_wait_for_a_silent_store() {
    let silent = Fault::Hang(Duration::from_secs(8));
    let plan: Box<Plan> =
        Box::new(move |_, path| if path.ends_with(".tar") { silent } else { Fault::None });
    let desk = desk(Duration::ZERO, plan);
    let access = desk.access(Some(1 << 30));
    let limits = Limits { stall: Duration::from_secs(30), ..limits() };
    let dataset = Arc::new(desk.try_open(&Access { limits, ..access }).unwrap());
    let loader = Loader::new(config(dataset, OrderMode::Block)).unwrap();
    let stream = loader.stream(Step(0), Step(9), vec![0, 1]).unwrap();
    while !desk.server.seen().iter().any(|seen| seen.path.ends_with(".tar")) {
        std::thread::yield_now();
    }
    let start = Instant::now();
    drop(stream);
    // A join waits for a second at most; the server would be silent for eight.
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn opening_says_what_is_wrong() {
    let desk = desk(Duration::ZERO, faultless());
    let open = |url: &str| {
        let error = Dataset::open_with(Path::new(url), &desk.access(None)).unwrap_err();
        crate::files::chain(&error)
    };
    let url = desk.server.url();
    assert!(open(&format!("{url}/bucket")).contains("lacuna data"));
    let text = open(&format!("{url}/bucket/packed/demo-000000.lacuna"));
    assert!(text.contains("holds no"), "{text}");
    fs::write(desk.folder.path().join("bucket/index.lacuna"), b"no index").unwrap();
    let text = open(&format!("{url}/bucket"));
    assert!(text.contains(&format!("{url}/bucket/index.lacuna")), "{text}");
    let text = open("gopher://host/x");
    assert!(text.contains("gopher"), "{text}");
    let by_index = format!("{url}/bucket/packed/index.lacuna");
    let dataset = Dataset::open_with(Path::new(&by_index), &desk.access(None)).unwrap();
    assert_eq!(dataset.fingerprint(), desk.local.fingerprint());
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(synthetic(folder.path(), 9, 8, 1).chunks().map(|_| ()), None);
}
