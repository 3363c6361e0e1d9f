//! A run as a trainer needs it: made from the coordinator's welcome.

use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lacuna_api::v1;
use lacuna_checkpoint::layout::RunDir;
use lacuna_data::chunks::ChunkCacheConfig;
use lacuna_data::dataset::{Access, Dataset};
use lacuna_data::loader::{
    BadSamplePolicy, Loader, LoaderConfig, OnBadSample, warn_of_bad_samples,
};
use lacuna_data::planes::{Fill, PlaneCache};
use lacuna_data::{ImageShape, Limits};
use lacuna_recipe::reduce::Reduction;
use lacuna_spec::units::Cadence;
use lacuna_spec::{AutoOr, BadSamples, CacheMode, CacheSpec, RunSpec};
use lacuna_types::RunId;

use super::bad_samples::describe;
use super::shared::SharedHandle;
use crate::engine::{EngineSpec, UpdateScalars};

/// Slots computed ahead of their use: enough to hide a slow read, little enough to fit anywhere.
const AHEAD_SLOTS: usize = 8;

/// A run, validated and resolved.
#[derive(Clone, Debug)]
pub struct Job {
    /// The run.
    pub run: RunId,
    /// Its spec.
    pub spec: RunSpec,
    /// Steps, schedule, geometry.
    pub resolved: lacuna_spec::Resolved,
    /// Fingerprint that the data set must have.
    pub fingerprint: String,
    /// Where its checkpoints stand.
    pub dir: RunDir,
    /// When figures of a step are reported.
    pub track: Track,
}

/// A run that this worker cannot take part in.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The welcome means nothing to this build.
    #[error("the run's spec cannot be read: {0}")]
    Spec(String),
    /// The place for checkpoints cannot be used.
    #[error("the run's checkpoints cannot be reached")]
    Checkpoints {
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The data cannot be opened.
    #[error("failed to open data set `{path}`")]
    Data {
        /// Where.
        path: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The data is not what the run was created with.
    #[error(
        "data set `{path}` has fingerprint {found}, the run was created with {want}: it was \
         changed or is another one"
    )]
    OtherData {
        /// Where.
        path: String,
        /// Fingerprint found.
        found: String,
        /// Fingerprint of the run.
        want: String,
    },
}

/// When figures of a step are reported: after so many steps, or after so long, whichever is first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Track {
    every: Option<u64>,
    at_most: Duration,
}

/// A run says at least this often how it is.
const SILENCE_MAX: Duration = Duration::from_secs(60);

impl Track {
    fn steps(every: u64) -> Self {
        Track { every: Some(every.max(1)), at_most: SILENCE_MAX }
    }

    fn time(every: Duration) -> Self {
        Track { every: None, at_most: every }
    }

    /// Tells whether step `step` is reported, `since` the last report.
    pub fn is_due(&self, step: u64, since: Duration) -> bool {
        self.every.is_some_and(|every| step.is_multiple_of(every)) || since >= self.at_most
    }
}

impl Job {
    /// Reads the run from a welcome; `local_world` trainers of this machine load checkpoints.
    pub fn from_welcome(welcome: &v1::Welcome, local_world: usize) -> Result<Self, JobError> {
        let bad = |text: String| JobError::Spec(text);
        let run =
            welcome.run_id.parse().map_err(|err: lacuna_types::NameError| bad(err.to_string()))?;
        let spec: RunSpec =
            serde_json::from_str(&welcome.spec).map_err(|err| bad(err.to_string()))?;
        let resolved = spec.resolve(welcome.n_samples).map_err(|err| bad(err.to_string()))?;
        let dir = RunDir::open_shared(&spec.checkpoint.to, spec.run_id(), local_world);
        let dir = dir.map_err(|err| JobError::Checkpoints { source: Box::new(err) })?;
        let per_epoch = resolved.geometry.steps_per_epoch();
        let track = match &spec.track.every {
            Cadence::Length(length) => Track::steps(length.steps(per_epoch).unwrap_or(1)),
            Cadence::Seconds(seconds) => Track::time(Duration::from_secs(*seconds)),
        };
        let fingerprint = welcome.fingerprint.clone();
        Ok(Job { run, spec, resolved, fingerprint, dir, track })
    }

    /// Describes the engine that the run needs on `device`.
    pub fn engine_spec(&self, device: &str) -> EngineSpec {
        EngineSpec {
            model: self.spec.model.clone(),
            seed: self.spec.train.seed,
            mean: self.spec.data.mean.clone(),
            std: self.spec.data.std.clone(),
            slot_batch: self.spec.train.slot_batch,
            n_slots: self.spec.n_slots(),
            precision: self.spec.train.precision,
            device: device.to_string(),
            task: self.spec.task.clone(),
        }
    }

    /// Opens the data set and checks that it is the run's.
    ///
    /// `local_world` trainers share this machine's cache.
    pub fn open_data(&self, local_world: usize) -> Result<Arc<Dataset>, JobError> {
        let path = &self.spec.data.shards;
        let failed = |source| JobError::Data { path: path.clone(), source };
        let deadline = Duration::from_secs(self.spec.data.deadline_seconds.into());
        let limits = Limits::default();
        let limits = Limits {
            deadline,
            stall: limits.stall.min(deadline),
            attempt: limits.attempt.min(deadline),
            ..limits
        };
        let chunks = self.chunks(local_world);
        let access = Access { limits, chunks, ..Access::default() };
        let dataset = Dataset::open_with(Path::new(path), &access);
        let dataset = dataset.map_err(|err| failed(Box::new(err)))?;
        let found = dataset.fingerprint().to_string();
        if found != self.fingerprint {
            let (path, want) = (path.clone(), self.fingerprint.clone());
            return Err(JobError::OtherData { path, found, want });
        }
        Ok(Arc::new(dataset))
    }

    /// Builds the loader, which tells `shared` of bad samples; `local_world` trainers share this
    /// machine's cores.
    pub fn loader(
        &self,
        dataset: Arc<Dataset>,
        local_world: usize,
        shared: SharedHandle,
    ) -> Result<Loader, JobError> {
        let spec = &self.spec;
        let [height, width] = spec.model.img_size;
        let index = dataset.index();
        let params = spec.order(dataset.n_samples(), index.n_chunks());
        let config = LoaderConfig {
            order: dataset.order_spec(params, spec.train.seed, spec.train.batch),
            augment: spec.augment(),
            geometry: self.resolved.geometry,
            shape: ImageShape { height, width, channels: spec.model.channels },
            n_patches: spec.model.n_patches(),
            threads: threads(spec.data.threads, local_world),
            ahead_slots: AHEAD_SLOTS,
            bad_samples: match spec.data.bad_samples {
                BadSamples::Fail => BadSamplePolicy::Fail,
                BadSamples::Substitute => BadSamplePolicy::Substitute,
            },
            on_bad_sample: self.on_bad_sample(shared),
            planes: self.planes(&dataset),
            dataset,
        };
        let path = spec.data.shards.clone();
        Loader::new(config).map_err(|err| JobError::Data { path, source: Box::new(err) })
    }

    /// Logs bad samples, and queues them for the coordinator.
    fn on_bad_sample(&self, shared: SharedHandle) -> OnBadSample {
        let (warn, geometry) = (warn_of_bad_samples(), self.resolved.geometry);
        Arc::new(move |bad| {
            warn(bad);
            let (epoch, _) = geometry.place(bad.slot.step);
            shared.bad_samples.push(epoch, describe(bad));
        })
    }

    /// Says where chunks of remote shards are kept.
    fn chunks(&self, sharers: usize) -> Option<ChunkCacheConfig> {
        let cache = self.spec.data.cache.as_ref()?;
        Some(ChunkCacheConfig { dir: (&cache.dir).into(), bytes_max: cache.chunk_bytes(), sharers })
    }

    /// Opens the cache of planes that the spec names; one that cannot be used is left out, and that
    /// is said.
    fn planes(&self, dataset: &Arc<Dataset>) -> Option<Arc<PlaneCache>> {
        let CacheSpec { dir, size, mode } = self.spec.data.cache.as_ref()?;
        let fill = match mode {
            CacheMode::Jpeg => return None,
            CacheMode::Planes => Fill::Always,
            CacheMode::Auto => Fill::WhenWaiting,
        };
        let bytes_max = if dataset.is_remote() { size.0 - size.0 / 2 } else { size.0 };
        match PlaneCache::open(Path::new(dir), bytes_max, dataset.clone(), fill) {
            Ok(cache) => Some(Arc::new(cache)),
            Err(error) => {
                let why = anyhow::Error::from(error);
                tracing::warn!("data.cache.dir = {dir}: {why:#}; images are decoded each time");
                None
            }
        }
    }

    /// Returns the scalars of the update that step `step` makes, the `t`-th.
    pub fn update(&self, step: u64, t: u64) -> UpdateScalars {
        UpdateScalars {
            lr: self.resolved.schedule.lr(step),
            t,
            adamw: self.spec.adamw(),
            decay_tokens: self.spec.optim.decay_tokens,
        }
    }

    /// Returns how gradients are summed.
    pub fn reduction(&self) -> Reduction {
        self.spec.train.reduce.reduction()
    }

    /// Returns the bytes a second at which a part is written at most.
    pub fn write_rate(&self) -> Option<NonZeroU64> {
        NonZeroU64::new(u64::from(self.spec.checkpoint.max_write_mbps) * 1_000_000)
    }

    /// Returns the digest of the maths fields, as checkpoints carry it.
    pub fn spec_digest(&self) -> String {
        format!("blake3:{}", self.spec.maths_digest().to_hex())
    }
}

/// Loader threads of one trainer: its share of the cores without the one that computes, at least
/// one.
fn threads(wanted: AutoOr<u32>, local_world: usize) -> usize {
    match wanted {
        AutoOr::Is(n) => n as usize,
        AutoOr::Auto => {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            (cores / local_world.max(1)).saturating_sub(1).max(1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_come_every_so_many_steps_or_so_often() {
        let second = Duration::from_secs(1);
        let steps = Track::steps(20);
        assert!(steps.is_due(40, second) && !steps.is_due(41, second));
        assert!(steps.is_due(41, SILENCE_MAX), "a slow run is heard of, too");
        let time = Track::time(5 * second);
        assert!(!time.is_due(40, second) && time.is_due(41, 5 * second));
        assert!(Track::steps(0).is_due(1, second), "each step");
    }
}
