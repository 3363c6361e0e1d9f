//! Slots, ready for an engine: read, decoded, cropped, resized, mirrored and masked.
//!
//! What a slot holds depends on the configuration and the slot, never on threads, streams or what
//! was loaded before. [`Loader::load`] computes one slot in the calling thread;
//! [`Loader::stream`] computes slots ahead of their use in threads of its own.

mod ahead;
mod metrics;
mod stream;

use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lacuna_recipe::augment::{Augment, AugmentError};
use lacuna_recipe::mask::MaskOrder;
use lacuna_recipe::order::{EpochOrder, OrderError, OrderSpec, substitute};
use lacuna_recipe::step::{Geometry, GeometryError, SlotBatch};
use lacuna_store::{Stop, StoreError};
use lacuna_types::{LOADER_THREADS_MAX, SampleId, Slot, Step};

use self::metrics::Meters;
pub use self::metrics::{LoaderStats, LoaderWatch, SAMPLE_BOUNDS_US};
pub use self::stream::SlotStream;
use crate::dataset::{Dataset, ReadSampleError, SamplePlace};
use crate::files::chain;
use crate::planes::PlaneCache;
use crate::reader::{SampleError, SampleReader};
use lacuna_pixels::ImageShape;

/// Bad samples in a row that fail a slot: scattered damage is repaired, a broken disk is not.
pub const BAD_IN_ROW_MAX: u32 = 100;

/// Most threads of a stream.
pub const THREADS_MAX: usize = LOADER_THREADS_MAX as usize;

/// Most slots computed ahead: enough for any device, and a bound on memory.
pub const AHEAD_SLOTS_MAX: usize = 4096;

/// Most bytes of pixels computed ahead, where a step has many slots: 110 slots of 64 images of 224
/// by 224.
pub const AHEAD_BYTES_MAX: usize = 1 << 30;

/// Orders kept: the current epoch's, and the next one's while prefetching crosses the border.
const ORDERS_KEPT: usize = 2;

/// What to do with a sample that cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadSamplePolicy {
    /// The slot fails.
    Fail,
    /// Another sample of its chunk takes its place, the same one on every worker.
    Substitute,
}

/// A bad sample and what took its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSample {
    /// The slot that wanted it.
    pub slot: Slot,
    /// The sample that the order put there.
    pub ordered: SampleId,
    /// The bad one: the ordered sample, or a stand-in that is bad too.
    pub place: SamplePlace,
    /// Why it is bad.
    pub error: String,
    /// What is tried next.
    pub stand_in: SampleId,
}

/// Told about every bad sample, from the thread that met it.
pub type OnBadSample = Arc<dyn Fn(&BadSample) + Send + Sync>;

/// Logs bad samples as warnings; a function for [`LoaderConfig::on_bad_sample`].
pub fn warn_of_bad_samples() -> OnBadSample {
    Arc::new(|bad: &BadSample| {
        tracing::warn!(
            step = %bad.slot.step,
            slot = bad.slot.index,
            place = %bad.place,
            stand_in = %bad.stand_in,
            error = %bad.error,
            "bad sample replaced"
        );
    })
}

/// What a loader loads, and with what.
#[derive(Clone)]
pub struct LoaderConfig {
    /// Where the images are.
    pub dataset: Arc<Dataset>,
    /// Which sample stands where; its seed also keys crops, flips and masks.
    pub order: OrderSpec,
    /// How images are varied.
    pub augment: Augment,
    /// How steps cut the data.
    pub geometry: Geometry,
    /// Shape of the images that the model takes.
    pub shape: ImageShape,
    /// Patches of an image.
    pub n_patches: usize,
    /// Threads of a stream, 1 to [`THREADS_MAX`].
    pub threads: usize,
    /// Slots that a stream computes ahead, 1 to [`AHEAD_SLOTS_MAX`]; a step's, where those are
    /// more, as far as [`AHEAD_BYTES_MAX`] goes.
    pub ahead_slots: usize,
    /// What to do with bad samples.
    pub bad_samples: BadSamplePolicy,
    /// Told about bad samples that were replaced.
    pub on_bad_sample: OnBadSample,
    /// Decoded planes of this data set; changes no pixel.
    pub planes: Option<Arc<PlaneCache>>,
}

impl fmt::Debug for LoaderConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoaderConfig")
            .field("folder", &self.dataset.folder())
            .field("order", &self.order.params)
            .field("augment", &self.augment)
            .field("geometry", &self.geometry)
            .field("shape", &self.shape)
            .field("threads", &self.threads)
            .field("ahead_slots", &self.ahead_slots)
            .finish_non_exhaustive()
    }
}

/// A configuration that loads nothing.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum LoaderConfigError {
    /// The order is impossible.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// The steps are impossible.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The augmentation is impossible.
    #[error(transparent)]
    Augment(#[from] AugmentError),
    /// Order, geometry and data set do not belong together.
    #[error("{what}: {left} and {right} must be equal")]
    Mismatch {
        /// Which two numbers.
        what: &'static str,
        /// The first.
        left: u64,
        /// The second.
        right: u64,
    },
    /// The order was made for other chunks.
    #[error("the order's chunk bounds are not those of the data set")]
    Chunks,
    /// A number outside its range.
    #[error("`{field}` = {value} is not supported")]
    Value {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: String,
    },
}

/// A slot that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Reading failed, or a sample is bad and may not be replaced.
    #[error("failed to load slot {} of step {}", slot.index, slot.step)]
    Sample {
        /// The slot.
        slot: Slot,
        /// Why.
        #[source]
        source: Box<SampleError>,
    },
    /// Too many bad samples one after another.
    #[error("slot {} of step {} met {n} bad samples in a row", slot.index, slot.step)]
    TooManyBad {
        /// The slot.
        slot: Slot,
        /// How many.
        n: u32,
        /// The last of them.
        #[source]
        source: Box<SampleError>,
    },
    /// All samples are bad.
    #[error("slot {} of step {} finds no good sample among {n}", slot.index, slot.step)]
    NoStandIn {
        /// The slot.
        slot: Slot,
        /// Samples of the data set.
        n: u64,
        /// The last of them.
        #[source]
        source: Box<SampleError>,
    },
    /// The slot was not ready in time; asking again may succeed.
    #[error("slot {} of step {} was not ready after {waited:?}", slot.index, slot.step)]
    Deadline {
        /// The slot.
        slot: Slot,
        /// How long was waited.
        waited: Duration,
    },
    /// The stream has delivered all its slots.
    #[error("the stream of slots has ended")]
    Ended,
    /// The stream's threads are gone.
    #[error("the loader's threads died")]
    Died,
    /// The stream was dropped while the slot was being loaded.
    #[error("loading was stopped")]
    Stopped,
    /// A thread could not be started.
    #[error("failed to start a loader thread")]
    Spawn(#[source] std::io::Error),
}

/// Loads slots.
#[derive(Debug)]
pub struct Loader {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: LoaderConfig,
    orders: Mutex<Vec<Arc<EpochOrder>>>,
    /// Readers that no call is using.
    readers: Mutex<Vec<SampleReader>>,
    /// Memory of batches that were given back, at most as many as a stream holds.
    spare_pixels: Mutex<Vec<Vec<u8>>>,
    /// Most slots that a stream was to hold so far.
    held_most: AtomicUsize,
    n_bad: AtomicU64,
    meters: Meters,
}

impl LoadError {
    /// Tells whether a store did not answer in time: nothing is known of this worker or its data.
    pub fn is_passing(&self) -> bool {
        let LoadError::Sample { source, .. } = self else { return false };
        let SampleError::Read(ReadSampleError::Io { source, .. }) = &**source else { return false };
        let of_store = source.get_ref().and_then(|error| error.downcast_ref::<StoreError>());
        matches!(of_store, Some(StoreError::Deadline { .. }))
    }

    /// Tells whether every worker would fail alike, because the data itself cannot be trained on as
    /// the run wants it.
    pub fn is_of_the_data(&self) -> bool {
        match self {
            LoadError::Sample { source, .. } => source.is_same_everywhere(),
            LoadError::TooManyBad { .. } | LoadError::NoStandIn { .. } => true,
            _ => false,
        }
    }
}

impl Loader {
    /// Checks a configuration; nothing is read and no thread starts.
    pub fn new(config: LoaderConfig) -> Result<Self, LoaderConfigError> {
        check(&config)?;
        Ok(Loader {
            inner: Arc::new(Inner {
                config,
                orders: Mutex::new(Vec::new()),
                readers: Mutex::new(Vec::new()),
                spare_pixels: Mutex::new(Vec::new()),
                held_most: AtomicUsize::new(0),
                n_bad: AtomicU64::new(0),
                meters: Meters::default(),
            }),
        })
    }

    /// Returns the configuration.
    pub fn config(&self) -> &LoaderConfig {
        &self.inner.config
    }

    /// Returns how many bad samples were met so far, discarded slots included.
    pub fn n_bad(&self) -> u64 {
        self.inner.n_bad.load(Ordering::Relaxed)
    }

    /// Loads one slot in the calling thread.
    pub fn load(&self, slot: Slot) -> Result<SlotBatch, LoadError> {
        self.inner.load_pooled(slot, &Stop::default())
    }

    /// Takes back a batch that is used up; its memory serves for another.
    ///
    /// Fresh memory is zeroed and mapped page by page, which takes a few hundredths of the time of
    /// a decoded sample.
    pub fn recycle(&self, batch: SlotBatch) {
        let mut spare = self.inner.lock_spare_pixels();
        if spare.len() < self.inner.held_most.load(Ordering::Relaxed) {
            spare.push(batch.pixels);
        }
    }

    /// Starts to load `slots` of the steps from `first_step` up to `end_step`, step by step.
    ///
    /// Within a step, slots come in the order given.
    ///
    /// # Panics
    /// If a slot is not below the number of slots.
    pub fn stream(
        &self,
        first_step: Step,
        end_step: Step,
        slots: Vec<u32>,
    ) -> Result<SlotStream, LoadError> {
        SlotStream::start(self.inner.clone(), first_step, end_step, slots)
    }
}

fn check(config: &LoaderConfig) -> Result<(), LoaderConfigError> {
    let LoaderConfig { dataset, order, geometry, shape, .. } = config;
    geometry.check()?;
    order.check()?;
    config.augment.check()?;
    let equal = |what, left: u64, right: u64| {
        if left == right { Ok(()) } else { Err(LoaderConfigError::Mismatch { what, left, right }) }
    };
    let n_samples = dataset.n_samples();
    equal("samples of geometry and data set", geometry.n_samples, n_samples)?;
    equal("batch of geometry and order", geometry.batch.into(), order.batch.into())?;
    if order.chunk_bounds != *dataset.index().chunk_bounds() {
        return Err(LoaderConfigError::Chunks);
    }
    let value = |field, value: String| Err(LoaderConfigError::Value { field, value });
    if !shape.is_supported() {
        return value("shape", format!("{shape:?}"));
    }
    // A mask draws one number a patch, and an image has no more patches than pixels.
    let pixels = shape.height as usize * shape.width as usize;
    if !(1..=pixels).contains(&config.n_patches) {
        return value("n_patches", config.n_patches.to_string());
    }
    if !(1..=THREADS_MAX).contains(&config.threads) {
        return value("threads", config.threads.to_string());
    }
    if !(1..=AHEAD_SLOTS_MAX).contains(&config.ahead_slots) {
        return value("ahead_slots", config.ahead_slots.to_string());
    }
    Ok(())
}

impl Inner {
    /// Returns how many slots a stream computes ahead that has `n_slots` in each step: what loads
    /// while a step is computed is the whole next one.
    fn ahead_slots(&self, n_slots: usize) -> usize {
        let LoaderConfig { ahead_slots, geometry, shape, .. } = &self.config;
        let fit = AHEAD_BYTES_MAX / (geometry.slot_batch as usize * shape.bytes());
        (*ahead_slots).max(n_slots.min(fit))
    }

    fn order(&self, epoch: u32) -> Arc<EpochOrder> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(order) = orders.iter().find(|order| order.epoch() == epoch) {
            return order.clone();
        }
        let order = Arc::new(EpochOrder::new(&self.config.order, epoch));
        if orders.len() == ORDERS_KEPT {
            orders.remove(0);
        }
        orders.push(order.clone());
        order
    }

    fn lock_spare_pixels(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.spare_pixels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns so many bytes that hold anything.
    fn pixels(&self, n: usize) -> Vec<u8> {
        let mut pixels = self.lock_spare_pixels().pop().unwrap_or_default();
        pixels.resize(n, 0);
        pixels
    }

    /// Loads a slot with a reader of the pool; gives up between samples when `stop` is raised.
    fn load_pooled(&self, slot: Slot, stop: &Stop) -> Result<SlotBatch, LoadError> {
        let lock = || self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut reader = lock().pop().unwrap_or_default();
        reader.set_stop(stop.clone());
        let result = self.load(slot, &mut reader, stop);
        lock().push(reader);
        result
    }

    fn load(
        &self,
        slot: Slot,
        reader: &mut SampleReader,
        stop: &Stop,
    ) -> Result<SlotBatch, LoadError> {
        let LoaderConfig { dataset, geometry, shape, n_patches, order, planes, .. } = &self.config;
        assert!(
            slot.index < geometry.n_slots(),
            "slot {} is one of {}",
            slot.index,
            geometry.n_slots()
        );
        let (epoch, _) = geometry.place(slot.step);
        let samples = self.samples(slot);
        if dataset.is_remote() {
            let kept = |id: SampleId| planes.as_ref().is_some_and(|planes| planes.holds(id));
            reader.expect(dataset, samples.iter().copied().filter(|id| !kept(*id)));
        }
        // A rendered sample fills its part, and a slot with one that is not is not delivered.
        let mut pixels = self.pixels(samples.len() * shape.bytes());
        let mut ids_shuffle: Vec<u32> = Vec::with_capacity(samples.len() * n_patches);
        let mut labels: Vec<Option<u32>> = Vec::with_capacity(samples.len());
        let mut bad_in_row: u32 = 0;
        for (&id, out) in samples.iter().zip(pixels.chunks_exact_mut(shape.bytes())) {
            if stop.is_raised() {
                return Err(LoadError::Stopped);
            }
            let began = Instant::now();
            let shown = self.fill(slot, epoch, id, reader, &mut bad_in_row, out)?;
            labels.push(dataset.index().record(shown).label);
            self.meters.sample(began.elapsed());
            let mask = MaskOrder::draw(order.seed, epoch, id.0, *n_patches);
            ids_shuffle.extend(mask.ids_shuffle);
        }
        let weights = vec![1.0; samples.len()];
        Ok(SlotBatch { slot, samples, labels, weights, pixels, ids_shuffle })
    }

    /// Renders the sample that the order put at a place, or a stand-in, and returns which one.
    ///
    /// A stand-in is cropped and mirrored with the draws of the sample it stands for, so it differs
    /// from its own use elsewhere in the epoch.
    fn fill(
        &self,
        slot: Slot,
        epoch: u32,
        ordered: SampleId,
        reader: &mut SampleReader,
        bad_in_row: &mut u32,
        out: &mut [u8],
    ) -> Result<SampleId, LoadError> {
        let LoaderConfig { dataset, order, augment, shape, planes, .. } = &self.config;
        let mut candidate = ordered;
        for attempt in 0.. {
            let choose = |size| augment.draw(order.seed, epoch, ordered.0, size);
            let rendered = match planes {
                Some(cache) => reader.render_cached(cache, dataset, candidate, choose, *shape, out),
                None => reader.render(dataset, candidate, choose, *shape, out),
            };
            let error = match rendered {
                Ok(()) => {
                    *bad_in_row = 0;
                    return Ok(candidate);
                }
                Err(error) => error,
            };
            let place = error.place().clone();
            let text = chain(&error);
            let source = Box::new(error);
            // What replaces a sample that does not decode is the same everywhere. Bytes that are
            // not the indexed ones are another matter: another machine's copy, or a cache that was
            // filled before, has the right ones, and would train on them.
            let replaces = self.config.bad_samples == BadSamplePolicy::Substitute;
            if !replaces || !source.is_same_everywhere() {
                return Err(LoadError::Sample { slot, source });
            }
            self.n_bad.fetch_add(1, Ordering::Relaxed);
            *bad_in_row += 1;
            if *bad_in_row > BAD_IN_ROW_MAX {
                let n = *bad_in_row;
                return Err(LoadError::TooManyBad { slot, n, source });
            }
            let (chunk, n) = (order.chunk_of(ordered), dataset.n_samples());
            let Some(stand_in) = substitute(order.seed, epoch, ordered, (chunk, n), attempt) else {
                return Err(LoadError::NoStandIn { slot, n, source });
            };
            (self.config.on_bad_sample)(&BadSample { slot, ordered, place, error: text, stand_in });
            candidate = stand_in;
        }
        unreachable!("attempts end with the chunk")
    }
}

#[cfg(test)]
mod tests;
