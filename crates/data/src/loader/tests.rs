use std::collections::BTreeMap;
use std::path::Path;

use lacuna_recipe::order::{OrderMode, OrderParams};
use proptest::prelude::{ProptestConfig, any};
use proptest::{collection, prop_assert_eq, proptest};

use super::*;
use crate::fixtures::{damage, grey_png, jpeg, noise, pack_quietly, synthetic};
use crate::pack::PackSource;
use crate::planes::Fill;
use lacuna_pixels::Decoder;

const DEADLINE: Duration = Duration::from_secs(30);

fn config(dataset: Arc<Dataset>, threads: usize) -> LoaderConfig {
    let geometry = Geometry { n_samples: dataset.n_samples(), batch: 24, slot_batch: 6 };
    let params = OrderParams { mode: OrderMode::Block, lanes: 4, block: 20 };
    LoaderConfig {
        order: dataset.order_spec(params, 99, geometry.batch),
        dataset,
        augment: Augment::PRETRAIN,
        geometry,
        shape: ImageShape { height: 16, width: 16, channels: 3 },
        n_patches: 16,
        threads,
        ahead_slots: 3,
        bad_samples: BadSamplePolicy::Substitute,
        on_bad_sample: Arc::new(|_| {}),
        planes: None,
    }
}

fn slot(step: u64, index: u32) -> Slot {
    Slot { step: Step(step), index }
}

/// Worlds of one to four workers, any threads, streams or single calls: the same batches.
#[test]
fn batches_depend_on_the_slot_alone() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = synthetic(folder.path(), 110, 20, 3);
    let reference = Loader::new(config(dataset.clone(), 1)).unwrap();
    // Steps 2 to 6 cross the border of two epochs of four steps.
    let want: Vec<SlotBatch> = (2..6)
        .flat_map(|step| (0..4).map(move |index| slot(step, index)))
        .map(|slot| reference.load(slot).unwrap())
        .collect();
    let mut seen: Vec<SampleId> = want[..8].iter().flat_map(|b| b.samples.clone()).collect();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 48, "each sample once");
    for world in 1..=4u32 {
        for rank in 0..world {
            let loader = Loader::new(config(dataset.clone(), world as usize)).unwrap();
            let slots: Vec<u32> = (0..4).filter(|index| index % world == rank).collect();
            let mut stream = loader.stream(Step(2), Step(6), slots.clone()).unwrap();
            for step in 2..6 {
                for &index in &slots {
                    let got = stream.next(DEADLINE).unwrap();
                    assert_eq!(got, want[((step - 2) * 4 + u64::from(index)) as usize]);
                    assert_eq!(got.slot, slot(step, index));
                }
            }
            assert!(matches!(stream.next(DEADLINE), Err(LoadError::Ended)));
        }
    }
}

/// Memory that held other pixels, of any length, leaves no trace.
#[test]
fn recycled_batches_leave_no_trace() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = synthetic(folder.path(), 110, 20, 3);
    let reference = Loader::new(config(dataset.clone(), 1)).unwrap();
    let loader = Loader::new(config(dataset, 1)).unwrap();
    loader.stream(Step(0), Step(1), vec![0, 1, 2]).unwrap();
    for (index, length) in [(0, 0), (1, 1 << 20), (2, 100), (3, 6 * 16 * 16 * 3)] {
        let mut old = reference.load(slot(0, 0)).unwrap();
        old.pixels = vec![0xaa; length];
        loader.recycle(old);
        assert_eq!(loader.load(slot(1, index)).unwrap(), reference.load(slot(1, index)).unwrap());
        assert_eq!(loader.inner.lock_spare_pixels().len(), 0, "it was used");
    }
    for _ in 0..10 {
        loader.recycle(reference.load(slot(0, 0)).unwrap());
    }
    assert_eq!(loader.inner.lock_spare_pixels().len(), 3, "no more than a stream holds");
}

/// Photographs small enough for many cases.
fn jpegs(folder: &Path, n: u32) -> Arc<Dataset> {
    let images = folder.join("images");
    std::fs::create_dir(&images).unwrap();
    for i in 0..n {
        let (width, height) = (18 + i % 5, 17 + i % 3);
        let pixels = noise((3 * width * height) as usize, i);
        let bytes = jpeg(&pixels, width, height, image::ExtendedColorType::Rgb8);
        std::fs::write(images.join(format!("{i:03}.jpg")), bytes).unwrap();
    }
    pack_quietly(&PackSource::Folder(images), &folder.join("packed"), 20_000);
    Arc::new(Dataset::open(&folder.join("packed")).unwrap())
}

/// Planes for every other worker, where this build has them.
fn some_planes(folder: &Path, dataset: &Arc<Dataset>, rank: u32) -> Option<Arc<PlaneCache>> {
    let dir = folder.join("cache");
    match PlaneCache::open(&dir, u64::MAX, dataset.clone(), Fill::Always) {
        Ok(cache) if rank % 2 == 1 => Some(Arc::new(cache)),
        _ => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Any number of workers, changing at any step, with steps that are done again by other workers
    /// after a loss: every slot has the same samples and the same pixels, and an epoch each sample
    /// at most once.
    #[test]
    fn any_history_of_worlds_delivers_the_same(
        changes in collection::vec((1u32..=17, 1u64..4, any::<bool>()), 3..7),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let dataset = jpegs(folder.path(), 61);
        let config = || {
            let mut config = config(dataset.clone(), 1);
            config.geometry.batch = 17;
            config.geometry.slot_batch = 1;
            config.order = dataset.order_spec(
                OrderParams { mode: OrderMode::Block, lanes: 1, block: 20 }, 99, 17);
            config
        };
        let reference = Loader::new(config()).unwrap();
        let mut step = 0;
        let mut epochs: BTreeMap<u64, Vec<SampleId>> = BTreeMap::new();
        for (world, steps, lost) in changes {
            // After a loss the last step is computed again.
            let first = if lost { u64::saturating_sub(step, 1) } else { step };
            for rank in 0..world {
                let slots: Vec<u32> = (17 * rank / world..17 * (rank + 1) / world).collect();
                let planes = some_planes(folder.path(), &dataset, rank);
                let loader = Loader::new(LoaderConfig { planes, ..config() }).unwrap();
                let mut stream =
                    loader.stream(Step(first), Step(step + steps), slots.clone()).unwrap();
                for at in first..step + steps {
                    for &index in &slots {
                        let got = stream.next(DEADLINE).unwrap();
                        prop_assert_eq!(&got, &reference.load(slot(at, index)).unwrap());
                        if at >= step {
                            epochs.entry(at / 3).or_default().extend(&got.samples);
                        }
                    }
                }
            }
            step += steps;
        }
        for (epoch, mut samples) in epochs {
            let n = samples.len() as u64;
            samples.sort();
            samples.dedup();
            prop_assert_eq!(samples.len() as u64, n, "epoch {}", epoch);
            prop_assert_eq!(n, 17 * (step - 3 * epoch).min(3));
        }
    }
}

#[test]
fn a_batch_holds_what_the_recipe_says() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = synthetic(folder.path(), 110, 20, 3);
    let config = config(dataset.clone(), 1);
    let batch = Loader::new(config.clone()).unwrap().load(slot(5, 1)).unwrap();
    let order = EpochOrder::new(&config.order, 1);
    assert_eq!(batch.samples, order.samples(30..36));
    assert_eq!(batch.weights, [1.0; 6]);
    let mut decoder = Decoder::new();
    for (i, id) in batch.samples.iter().enumerate() {
        let size = decoder.decode(&dataset.sample(*id).unwrap()).unwrap();
        let (crop, flip) = config.augment.draw(99, 1, id.0, size);
        let mut pixels: Vec<u8> = vec![0; 16 * 16 * 3];
        decoder.render(crop, flip, config.shape, &mut pixels).unwrap();
        assert_eq!(batch.pixels[i * pixels.len()..][..pixels.len()], pixels);
        let mask = MaskOrder::draw(99, 1, id.0, 16);
        assert_eq!(batch.ids_shuffle[i * 16..][..16], mask.ids_shuffle);
    }
}

#[test]
fn a_stream_stays_within_its_ring() {
    let folder = tempfile::tempdir().unwrap();
    let loader = Loader::new(config(synthetic(folder.path(), 110, 20, 3), 2)).unwrap();
    let mut stream = loader.stream(Step(0), Step(1000), vec![0, 1, 2, 3]).unwrap();
    let first = stream.next(DEADLINE).unwrap();
    assert_eq!(first.slot, slot(0, 0));
    assert!(matches!(
        loader.stream(Step(0), Step(1), vec![]).unwrap().next(DEADLINE),
        Err(LoadError::Ended)
    ));
    // No slot is ready at once in a stream that was just started, and asking again works.
    let mut other = loader.stream(Step(0), Step(2), vec![3]).unwrap();
    match other.next(Duration::ZERO) {
        Err(LoadError::Deadline { .. }) => {
            assert_eq!(other.next(DEADLINE).unwrap().slot, slot(0, 3));
        }
        got => assert_eq!(got.unwrap().slot, slot(0, 3)),
    }
    assert!(stream.n_ready() <= 4);
    let ahead = |n_slots| loader.inner.ahead_slots(n_slots);
    assert_eq!([ahead(1), ahead(3), ahead(4)], [3, 3, 4], "a step at least");
    let fit = AHEAD_BYTES_MAX / (6 * loader.config().shape.bytes());
    assert_eq!(ahead(usize::MAX), fit, "and not more than fits");
    let start = std::time::Instant::now();
    drop(stream);
    assert!(start.elapsed() < Duration::from_secs(1), "threads are joined quickly");
}

/// Packs grey images of which some are cut off: they have the right checksum and do not decode.
fn with_bad_samples(root: &Path, n: u32, bad: &[u32]) -> Arc<Dataset> {
    let input = root.join("in");
    std::fs::create_dir_all(&input).unwrap();
    for i in 0..n {
        let mut bytes = grey_png(16, i);
        if bad.contains(&i) {
            bytes.truncate(60);
        }
        std::fs::write(input.join(format!("{i:04}.png")), bytes).unwrap();
    }
    pack_quietly(&PackSource::Folder(input), &root.join("out"), 1 << 20);
    Arc::new(Dataset::open(&root.join("out")).unwrap())
}

#[test]
fn bad_samples_are_replaced_the_same_way_everywhere() {
    let root = tempfile::tempdir().unwrap();
    let dataset = with_bad_samples(root.path(), 48, &[3, 17, 18]);
    let events: Arc<Mutex<Vec<BadSample>>> = Arc::default();
    let mut batches: Vec<Vec<SlotBatch>> = Vec::new();
    for threads in [1, 4] {
        let sink = events.clone();
        let config = LoaderConfig {
            on_bad_sample: Arc::new(move |bad| sink.lock().unwrap().push(bad.clone())),
            ..config(dataset.clone(), threads)
        };
        let loader = Loader::new(config).unwrap();
        let mut stream = loader.stream(Step(0), Step(2), vec![0, 1, 2, 3]).unwrap();
        batches.push((0..8).map(|_| stream.next(DEADLINE).unwrap()).collect());
        assert!(loader.n_bad() >= 3);
    }
    assert_eq!(batches[0], batches[1]);
    let ids: Vec<SampleId> = batches[0].iter().flat_map(|b| b.samples.clone()).collect();
    assert_eq!(ids.len(), 48);
    let mut events = events.lock().unwrap().clone();
    events.sort_by_key(|bad| (bad.ordered, bad.place.sample, bad.stand_in));
    assert!(events.len().is_multiple_of(2), "both loaders met the same");
    let cut = events.iter().find(|bad| bad.place.sample == SampleId(3)).unwrap();
    assert!(cut.error.contains("the Png data does not decode"), "{}", cut.error);
}

/// Another machine's copy of the shard may be sound, and what is trained on must not depend on
/// whose slot it is.
#[test]
fn bytes_that_rotted_in_a_file_are_not_replaced() {
    let root = tempfile::tempdir().unwrap();
    let dataset = with_bad_samples(root.path(), 24, &[]);
    let shard = dataset.place(SampleId(13)).shard;
    damage(&shard, dataset.index().record(SampleId(13)).offset + 50);
    let loader = Loader::new(config(dataset, 1)).unwrap();
    let failed: Vec<LoadError> =
        (0..4).filter_map(|index| loader.load(slot(0, index)).err()).collect();
    let [error] = &failed[..] else { panic!("one slot has the sample: {failed:?}") };
    assert!(!error.is_passing() && !error.is_of_the_data());
    let text = chain(error);
    assert!(text.contains("is corrupt: crc"), "{text}");
    assert!(text.contains("000000013-0013.png"), "{text}");
    assert_eq!(loader.n_bad(), 0);
}

#[test]
fn bad_samples_can_fail_the_slot() {
    let root = tempfile::tempdir().unwrap();
    let dataset = with_bad_samples(root.path(), 24, &[3]);
    let config = LoaderConfig { bad_samples: BadSamplePolicy::Fail, ..config(dataset, 1) };
    let loader = Loader::new(config).unwrap();
    let errors: Vec<String> = (0..4)
        .filter_map(|index| loader.load(slot(0, index)).err())
        .map(|error| chain(&error))
        .collect();
    assert_eq!(errors.len(), 1);
    assert!(errors[0].contains("sample 3 (`000000003-0003.png` at byte "), "{}", errors[0]);
}

#[test]
fn too_many_bad_samples_fail_the_slot() {
    let root = tempfile::tempdir().unwrap();
    let all_but_one: Vec<u32> = (1..130).collect();
    let dataset = with_bad_samples(root.path(), 130, &all_but_one);
    let loader = Loader::new(config(dataset, 1)).unwrap();
    let failed = (0..4).filter(|&index| {
        matches!(loader.load(slot(0, index)), Err(LoadError::TooManyBad { n: 101, .. }))
    });
    assert!(failed.count() >= 1);
    let error = (0..4).find_map(|index| loader.load(slot(0, index)).err()).unwrap();
    assert!(error.is_of_the_data(), "{error}");
    let few = with_bad_samples(&root.path().join("few"), 30, &(0..30).collect::<Vec<u32>>());
    let loader = Loader::new(config(few, 1)).unwrap();
    let error = loader.load(slot(0, 0)).unwrap_err();
    assert!(matches!(error, LoadError::NoStandIn { n: 30, .. }), "{error}");
    assert!(error.is_of_the_data(), "{error}");
}

/// A read error says nothing about the sample, so nothing replaces it.
#[test]
fn read_errors_are_never_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = synthetic(folder.path(), 110, 20, 3);
    for shard in dataset.index().shards() {
        std::fs::write(folder.path().join(&shard.name), b"").unwrap();
    }
    let loader = Loader::new(config(dataset, 1)).unwrap();
    let error = loader.load(slot(0, 0)).unwrap_err();
    assert!(matches!(error, LoadError::Sample { .. }), "{error}");
    assert_eq!(loader.n_bad(), 0);
}

#[test]
fn configurations_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let base = config(synthetic(folder.path(), 110, 20, 3), 1);
    let message = |config: LoaderConfig| Loader::new(config).unwrap_err().to_string();
    let mut wrong = base.clone();
    wrong.order.batch = 12;
    assert_eq!(message(wrong), "batch of geometry and order: 24 and 12 must be equal");
    let mut wrong = base.clone();
    wrong.order.chunk_bounds = vec![0, 110].into();
    assert_eq!(message(wrong), "the order's chunk bounds are not those of the data set");
    let mut wrong = base.clone();
    wrong.threads = 0;
    assert_eq!(message(wrong), "`threads` = 0 is not supported");
    let mut wrong = base;
    wrong.shape.channels = 2;
    assert!(message(wrong).contains("channels: 2"));
}
