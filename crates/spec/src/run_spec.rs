//! A validated run: every field is present, and every combination can be run.

use std::fmt;
use std::path::Path;

use lacuna_recipe::adamw::AdamW;
use lacuna_recipe::augment::Augment;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::order::{OrderMode, OrderParams, default_block, default_mode};
use lacuna_recipe::reduce::Reduction;
use lacuna_recipe::schedule::Schedule;
use lacuna_recipe::step::{Geometry, GeometryError};
use lacuna_types::RunId;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::load;
use crate::problem::{Problems, SpecError};
use crate::units::{Bytes, Cadence, EPOCHS_MAX, Length, STEPS_MAX};

macro_rules! word {
    ($(#[$doc:meta])* $name:ident {
        $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)+
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)+
        }

        impl $name {
            /// Every value with its word in a spec.
            pub const ALL: &[(&str, $name)] = &[$(($text, $name::$variant)),+];

            /// Every word.
            pub const WORDS: &[&str] = &[$($text),+];

            /// Returns the word that a spec uses.
            pub fn as_str(self) -> &'static str {
                match self {
                    $($name::$variant => $text,)+
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
    };
}

mod task;

pub use task::{EncoderPin, Optimizer, Pool, TaskKind, TaskSpec, encoder_at};

word! {
    /// How an epoch orders its samples.
    Order {
        /// `global` below 10^8 samples, `block` from there; replaced when the run is created.
        Auto = "auto",
        /// One permutation of all samples.
        Global = "global",
        /// Chunks are permuted, then samples inside blocks: few chunks are open at a time.
        Block = "block",
        /// The order of the shards.
        Sequential = "sequential",
    }
}

/// Share of an epoch's samples that may be bad where a spec does not say: scattered damage of real
/// sets is rarer by far, and a broken disk damages more.
pub const BAD_SAMPLES_SHARE: f64 = 0.001;

/// Bad samples of an epoch that never fail a run: of a few thousand samples or fewer the share
/// alone would allow none.
pub const BAD_SAMPLES_FREE: u64 = 9;

word! {
    /// What happens to a sample that cannot be decoded.
    BadSamples {
        /// The run fails and names the sample.
        Fail = "fail",
        /// Another sample of the same chunk, chosen by the seed, takes its place.
        Substitute = "substitute",
    }
}

/// Seconds that a read from a store is tried where a spec does not say: well below the two minutes
/// that a step waits for its data.
pub const DEADLINE_SECONDS: u32 = 50;

/// Images of `track.reconstructions` where the spec does not say how many.
pub const RECONSTRUCTIONS: u32 = 8;
/// Most images of `track.reconstructions`.
pub const RECONSTRUCTIONS_MAX: u32 = 32;

/// Schemes of the URLs that data may lie behind.
pub const DATA_SCHEMES: [&str; 6] = ["s3", "gs", "az", "abfs", "http", "https"];

/// Schemes of the URLs that checkpoints may go to: those of stores that create on a condition.
pub const CHECKPOINT_SCHEMES: [&str; 4] = ["s3", "gs", "az", "abfs"];

word! {
    /// What a cache on a local disk keeps.
    CacheMode {
        /// Chunks of remote shards, and decoded planes once steps wait for data.
        Auto = "auto",
        /// Chunks of remote shards, as they are.
        Jpeg = "jpeg",
        /// Chunks of remote shards, and decoded planes from the first epoch on.
        Planes = "planes",
    }
}

word! {
    /// Type of the arithmetic of a forward and backward pass.
    Precision {
        /// 32-bit IEEE floats.
        F32 = "f32",
        /// 32-bit floats, whose matrix products round their inputs to 10 bits of mantissa: CUDA
        /// devices only.
        Tf32 = "tf32",
        /// Matrix products and attention in bfloat16; parameters, sums, norms, the residual stream
        /// and the loss in f32.
        Bf16 = "bf16",
    }
}

word! {
    /// How the slots' gradients are summed.
    Reduce {
        /// As 64-bit integers: the sum does not depend on who computed what.
        Exact = "exact",
        /// As 32-bit integers: so too, with half the bytes and a little less precision.
        Exact32 = "exact32",
        /// As floats: the sum depends on who computed what.
        Fast = "fast",
    }
}

impl Reduce {
    /// Returns the arithmetic that the word stands for.
    pub fn reduction(self) -> Reduction {
        match self {
            Reduce::Exact => Reduction::Exact,
            Reduce::Exact32 => Reduction::Exact32,
            Reduce::Fast => Reduction::Fast,
        }
    }
}

word! {
    /// Whether a run continues from its own checkpoints.
    Resume {
        /// From the newest committed checkpoint, from the start where there is none.
        Auto = "auto",
        /// From the start; a run that has checkpoints is refused.
        Never = "never",
    }
}

word! {
    /// What happens when a checkpoint is due while one is being written.
    WhenBusy {
        /// None is made.
        Skip = "skip",
        /// Training stands still until the one is written.
        Wait = "wait",
        /// The one is given up for the new one.
        Cancel = "cancel",
    }
}

/// A number that may be left to the machine or the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoOr<T> {
    /// `"auto"`.
    Auto,
    /// That number, at least 1.
    Is(T),
}

impl<T: Serialize> Serialize for AutoOr<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            AutoOr::Auto => serializer.serialize_str("auto"),
            AutoOr::Is(n) => n.serialize(serializer),
        }
    }
}

/// How many workers a run wants, `min ≤ max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workers {
    /// Fewer than this and the run waits.
    pub min: u32,
    /// More than this stay idle.
    pub max: u32,
}

impl fmt::Display for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.min, self.max)
    }
}

impl Serialize for Workers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A run, as [`crate::parse_file`] makes it.
///
/// Serializes to the layout of the TOML file with everything filled in; deserializing validates, so
/// a value of this type has always been checked. Whoever changes a field calls [`RunSpec::check`].
/// What the fields mean stands in [`crate::fields`].
#[derive(Clone, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the table of fields documents each key once")]
pub struct RunSpec {
    pub schema: u32,
    pub name: String,
    pub model: ModelConfig,
    pub data: DataSpec,
    pub train: TrainSpec,
    pub optim: OptimSpec,
    pub elastic: ElasticSpec,
    pub checkpoint: CheckpointSpec,
    pub track: TrackSpec,
    /// What the run learns; absent, it fills in masked patches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskSpec>,
}

/// Section `[data]`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the table of fields documents each key once")]
pub struct DataSpec {
    pub shards: String,
    pub order: Order,
    pub lanes: u32,
    pub block: AutoOr<u64>,
    pub mean: Vec<f64>,
    pub std: Vec<f64>,
    pub crop_scale: [f64; 2],
    pub crop_ratio: [f64; 2],
    pub flip: f64,
    pub bad_samples: BadSamples,
    pub bad_samples_max: f64,
    pub threads: AutoOr<u32>,
    pub deadline_seconds: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheSpec>,
}

/// Key `data.cache`: chunks of remote shards and decoded planes of JPEG, on a local disk.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the table of fields documents each key once")]
pub struct CacheSpec {
    pub dir: String,
    pub size: Bytes,
    pub mode: CacheMode,
}

impl CacheSpec {
    /// Returns how many bytes chunks of remote shards may take: where decoded planes are kept too,
    /// each has half of the room.
    pub fn chunk_bytes(&self) -> u64 {
        if self.mode == CacheMode::Jpeg { self.size.0 } else { self.size.0 / 2 }
    }
}

/// Section `[train]`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the table of fields documents each key once")]
pub struct TrainSpec {
    pub duration: Length,
    pub batch: u32,
    pub slot_batch: u32,
    pub precision: Precision,
    pub reduce: Reduce,
    pub seed: u64,
    pub max_nonfinite_steps: u32,
    pub digest_every: u64,
}

/// Section `[optim]`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the table of fields documents each key once")]
pub struct OptimSpec {
    pub base_lr: f64,
    pub min_lr: f64,
    #[serde(serialize_with = "warmup")]
    pub warmup: Option<Length>,
    pub weight_decay: f64,
    pub betas: [f64; 2],
    pub eps: f64,
    pub decay_tokens: bool,
}

/// Section `[elastic]`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the table of fields documents each key once")]
pub struct ElasticSpec {
    pub workers: Workers,
    pub spares: u32,
}

/// Section `[checkpoint]`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the table of fields documents each key once")]
pub struct CheckpointSpec {
    pub to: String,
    pub every: Vec<Cadence>,
    pub keep: KeepSpec,
    pub resume: Resume,
    pub when_busy: WhenBusy,
    pub max_write_mbps: u32,
    pub max_failures: u32,
    pub read_back: bool,
}

/// Key `checkpoint.keep`: a checkpoint stays if any rule keeps it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the table of fields documents each key once")]
pub struct KeepSpec {
    pub last: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<Length>,
}

/// Section `[track]`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the table of fields documents each key once")]
pub struct TrackSpec {
    pub every: Cadence,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensorboard: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reconstructions: Option<ReconstructionsSpec>,
}

/// Key `track.reconstructions`: pictures of what the model fills in, of the same images each time.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the table of fields documents each key once")]
pub struct ReconstructionsSpec {
    pub every: Length,
    pub images: u32,
}

fn warmup<S: Serializer>(warmup: &Option<Length>, serializer: S) -> Result<S::Ok, S::Error> {
    match warmup {
        Some(length) => length.serialize(serializer),
        None => serializer.serialize_str("none"),
    }
}

impl<'de> Deserialize<'de> for RunSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        load::from_json(&value).map_err(serde::de::Error::custom)
    }
}

/// Most slots of a step: the exact sum then leaves each slot's gradient 45 bits.
pub const SLOTS_MAX: u32 = 1 << 16;

/// What a spec means for a data set of known size.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    /// How steps cut the data.
    pub geometry: Geometry,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Learning rate of every step.
    pub schedule: Schedule,
}

/// A spec that does not fit its data.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// An epoch has no step.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The run is longer than what steps or epochs can count.
    #[error(
        "`train.duration` = {duration} is longer than {STEPS_MAX} steps or {EPOCHS_MAX} epochs \
         at {steps_per_epoch} steps an epoch"
    )]
    TooLong {
        /// The duration.
        duration: Length,
        /// Steps of an epoch.
        steps_per_epoch: u64,
    },
    /// The warm-up is longer than the run.
    #[error(
        "`optim.warmup` = {warmup} is {warmup_steps} steps, more than the {total_steps} of \
         `train.duration` = {duration}"
    )]
    Warmup {
        /// The warm-up.
        warmup: Length,
        /// Its steps.
        warmup_steps: u64,
        /// The duration.
        duration: Length,
        /// Its steps.
        total_steps: u64,
    },
}

/// Returns the peak of a learning rate that is given for a batch of 256.
pub(crate) fn peak_lr(base_lr: f64, batch: u32) -> f64 {
    base_lr * f64::from(batch) / 256.0
}

impl RunSpec {
    /// Returns the run's name as an id.
    pub fn run_id(&self) -> RunId {
        self.name.parse().expect("validation checked the name")
    }

    /// Returns V, the slots of a step.
    pub fn n_slots(&self) -> u32 {
        self.train.batch / self.train.slot_batch
    }

    /// Returns how many samples of an epoch of `epoch_samples` may be bad; one more fails the run.
    pub fn bad_samples_max(&self, epoch_samples: u64) -> u64 {
        let share = (self.data.bad_samples_max * epoch_samples as f64).floor() as u64;
        share.max(BAD_SAMPLES_FREE)
    }

    /// Returns the peak of the learning rate, `base_lr · batch / 256`.
    pub fn peak_lr(&self) -> f64 {
        peak_lr(self.optim.base_lr, self.train.batch)
    }

    /// Returns the constants of the optimizer.
    pub fn adamw(&self) -> AdamW {
        let [beta1, beta2] = self.optim.betas;
        AdamW { beta1, beta2, eps: self.optim.eps, weight_decay: self.optim.weight_decay }
    }

    /// Works out steps and schedule for a data set of `n_samples`.
    ///
    /// # Errors
    /// [`ResolveError`] if the data has fewer samples than a step needs, or lengths do not fit.
    pub fn resolve(&self, n_samples: u64) -> Result<Resolved, ResolveError> {
        let geometry =
            Geometry { n_samples, batch: self.train.batch, slot_batch: self.train.slot_batch };
        geometry.check()?;
        let steps_per_epoch = geometry.steps_per_epoch();
        let duration = self.train.duration;
        let total_steps = duration
            .steps(steps_per_epoch)
            .filter(|steps| steps.div_ceil(steps_per_epoch) <= EPOCHS_MAX)
            .ok_or(ResolveError::TooLong { duration, steps_per_epoch })?;
        let warmup_steps = match self.optim.warmup {
            None => 0,
            Some(warmup) => {
                let warmup_steps = warmup.steps(steps_per_epoch).unwrap_or(u64::MAX);
                if warmup_steps > total_steps {
                    return Err(ResolveError::Warmup {
                        warmup,
                        warmup_steps,
                        duration,
                        total_steps,
                    });
                }
                warmup_steps
            }
        };
        Ok(Resolved {
            geometry,
            total_steps,
            schedule: Schedule {
                peak: self.peak_lr(),
                min_lr: self.optim.min_lr,
                warmup_steps: warmup_steps as f64,
                total_steps: total_steps as f64,
            },
        })
    }

    /// Returns what decides the order of a data set of `n_samples` in `n_chunks`.
    pub fn order(&self, n_samples: u64, n_chunks: u64) -> OrderParams {
        let (lanes, block) = (self.data.lanes, self.data.block);
        OrderParams {
            mode: match self.data.order {
                Order::Auto => default_mode(n_samples),
                Order::Global => OrderMode::Global,
                Order::Block => OrderMode::Block,
                Order::Sequential => OrderMode::Sequential,
            },
            lanes,
            block: match block {
                AutoOr::Auto => default_block(n_samples, n_chunks, lanes),
                AutoOr::Is(block) => block,
            },
        }
    }

    /// Writes the order of [`RunSpec::order`] into the spec; done once, when a run is created.
    pub fn pin(&mut self, n_samples: u64, n_chunks: u64) {
        let OrderParams { mode, lanes, block } = self.order(n_samples, n_chunks);
        self.data.order = match mode {
            OrderMode::Global => Order::Global,
            OrderMode::Block => Order::Block,
            OrderMode::Sequential => Order::Sequential,
        };
        (self.data.lanes, self.data.block) = (lanes, AutoOr::Is(block));
    }

    /// Returns the ranges that crops and flips are drawn from.
    pub fn augment(&self) -> Augment {
        let DataSpec { crop_scale, crop_ratio, flip, .. } = &self.data;
        Augment { scale: (*crop_scale).into(), ratio: (*crop_ratio).into(), flip: *flip }
    }

    /// Makes the relative paths that are left start from `base`.
    ///
    /// Those that a file wrote start from that file's folder already; those of `--set` and of the
    /// defaults do not.
    pub fn resolve_paths(&mut self, base: &Path) {
        for (_, path) in self.places_mut() {
            *path = load::join(base, path);
        }
    }

    /// Returns the keys that name a place that is no URL and starts from no folder, and the place.
    pub fn relative_places(&self) -> Vec<(&'static str, String)> {
        let mut spec = self.clone();
        let is_relative =
            |place: &String| !place.contains("://") && !Path::new(place).is_absolute();
        let relative = spec.places_mut().into_iter().filter(|(_, place)| is_relative(place));
        relative.map(|(key, place)| (key, place.clone())).collect()
    }

    /// The keys that name a place, those that are set.
    fn places_mut(&mut self) -> Vec<(&'static str, &mut String)> {
        let cache = self.data.cache.as_mut().map(|cache| &mut cache.dir);
        let encoder = self.task.as_mut().and_then(|task| task.encoder.as_mut());
        let all = [
            ("data.shards", Some(&mut self.data.shards)),
            ("checkpoint.to", Some(&mut self.checkpoint.to)),
            ("data.cache.dir", cache),
            ("track.tensorboard", self.track.tensorboard.as_mut()),
            ("task.encoder", encoder),
        ];
        all.into_iter().filter_map(|(key, place)| Some((key, place?))).collect()
    }

    /// Validates again, after fields were changed by hand.
    ///
    /// # Errors
    /// [`SpecError::Invalid`] with every problem.
    pub fn check(&self) -> Result<(), SpecError> {
        let again: Result<RunSpec, Problems> = load::from_json(&self.to_json());
        again.map(|_| ()).map_err(SpecError::Invalid)
    }

    /// Returns the spec as JSON in the layout of the file, everything filled in.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).expect("plain structs with text keys are JSON")
    }
}
