//! The sections of a spec, and what must hold between keys.

use std::ops::RangeInclusive;

use lacuna_recipe::model::{ModelConfig, ModelError};
use lacuna_recipe::order::{LANES_MAX, default_lanes};
use lacuna_types::RunId;

use super::Reader;
use crate::node::{Value, find};
use crate::problem::echo;
use crate::run_spec::{
    AutoOr, BAD_SAMPLES_SHARE, BadSamples, CHECKPOINT_SCHEMES, CacheMode, CacheSpec,
    CheckpointSpec, DATA_SCHEMES, DEADLINE_SECONDS, DataSpec, ElasticSpec, KeepSpec, OptimSpec,
    Order, Precision, Reduce, Resume, RunSpec, SLOTS_MAX, TrackSpec, TrainSpec, WhenBusy, Workers,
};
use crate::units::{Cadence, Length};

/// Version of the layout that this build reads.
const SCHEMA: u64 = 1;
/// Largest batch: counts of samples stay exact in f32 up to here.
const BATCH_MAX: u32 = 1 << 24;
/// Most patches of an image: a sample's random draws are counted in 24 bits.
const PATCHES_MAX: u64 = 1 << 24;
/// Most workers of a run: the control plane is built and tested for thousands, not more.
const WORKERS_MAX: u32 = 4096;
/// Largest block of the order: more samples than any data set has.
const BLOCK_MAX: u64 = 1 << 48;
/// Most threads of a loader: beyond any machine's cores.
const THREADS_MAX: u32 = 1024;
/// Highest limit of a rate: a terabyte a second.
const MBPS_MAX: u32 = 1_000_000;
/// Most attempts that may fail in a row.
const FAILURES_MAX: u32 = 1_000_000;
/// Most checkpoints kept by number.
const KEEP_LAST_MAX: u32 = 10_000;
/// Most rules of when to save: one for each unit and some to spare.
const EVERY_MAX: usize = 8;
/// Longest gap between digests, and most non-finite steps in a row.
const INTERVAL_MAX: u32 = 1_000_000;
/// Largest seed: TOML's integers end here.
const SEED_MAX: u64 = i64::MAX as u64;

fn positive(x: f64) -> bool {
    // The optimizer rounds to f32, where smaller numbers would be zero.
    x >= f64::from(f32::MIN_POSITIVE)
}

fn share(x: f64) -> bool {
    (0.0..=1.0).contains(&x)
}

impl Reader<'_> {
    /// Reads every section; `None` if any problem was reported on the way.
    pub(super) fn build(&mut self) -> Option<RunSpec> {
        let schema = self.schema();
        let name = self.name();
        let model = self.model();
        let train = self.train();
        let channels = model.as_ref().map(|model| model.channels);
        let data = self.data(channels, train.as_ref().map(|train| train.batch));
        let optim = self.optim();
        let elastic = self.elastic();
        let checkpoint = self.checkpoint();
        let track = self.track();
        let spec = RunSpec {
            schema: schema?,
            name: name?,
            model: model?,
            data: data?,
            train: train?,
            optim: optim?,
            elastic: elastic?,
            checkpoint: checkpoint?,
            track: track?,
        };
        self.across_sections(&spec);
        Some(spec)
    }

    fn schema(&mut self) -> Option<u32> {
        let node = self.required("schema")?;
        match node.value {
            Value::Integer(n) if n == i128::from(SCHEMA) => Some(SCHEMA as u32),
            Value::Integer(n) => {
                let message = format!("`schema` = {n} is not what this build reads");
                self.problem(node.at, "schema", message, Some(format!("use {SCHEMA}")));
                None
            }
            _ => self.wrong(node, "schema", "a whole number"),
        }
    }

    fn name(&mut self) -> Option<String> {
        let name = self.text("name")?;
        match name.parse::<RunId>() {
            Ok(id) => Some(id.as_str().to_string()),
            Err(_) => {
                let message = format!(
                    "`name` = \"{}\" must be 1 to {} of the characters a-z A-Z 0-9 . _ : - \
                     and not start with a dot",
                    echo(name),
                    lacuna_types::NAME_BYTES_MAX
                );
                self.problem_among(&["name"], message, None);
                None
            }
        }
    }

    fn model(&mut self) -> Option<ModelConfig> {
        if self.has_no_model() {
            return None;
        }
        let mut size = |path: &str| self.count(path, 1..=u32::MAX);
        let patch_size = size("model.patch_size");
        let channels = size("model.channels");
        let width = size("model.width");
        let depth = size("model.depth");
        let heads = size("model.heads");
        let decoder_width = size("model.decoder_width");
        let decoder_depth = size("model.decoder_depth");
        let decoder_heads = size("model.decoder_heads");
        let mlp_ratio = size("model.mlp_ratio");
        let img_size = self.img_size();
        let between = |x: f64| 0.0 < x && x < 1.0;
        let mask_ratio = self.float("model.mask_ratio", between, "between 0 and 1, both excluded");
        let norm_pix_loss = self.boolean("model.norm_pix_loss");
        let model = ModelConfig {
            img_size: img_size?,
            patch_size: patch_size?,
            channels: channels?,
            width: width?,
            depth: depth?,
            heads: heads?,
            decoder_width: decoder_width?,
            decoder_depth: decoder_depth?,
            decoder_heads: decoder_heads?,
            mlp_ratio: mlp_ratio?,
            mask_ratio: mask_ratio?,
            norm_pix_loss: norm_pix_loss?,
        };
        self.model_fits(&model).then_some(model)
    }

    /// Reports a spec without any size of a model as one problem: most likely it lacks its base.
    fn has_no_model(&mut self) -> bool {
        let names = ["img_size", "patch_size", "channels", "width", "depth", "heads"];
        let has = |name: &str| find(self.root, &format!("model.{name}")).is_some();
        let fills = find(self.root, "model").is_none_or(|n| matches!(n.value, Value::Table(_)));
        let none = fills && !names.iter().any(|name| has(name)) && !self.partial;
        if none {
            let message = format!("the spec has no model: no `{}`", names.join("`, `"));
            let fix = "add `base = \"preset:demo\"` or another preset at the top".to_string();
            self.problem(self.sources.top(), "model", message, Some(fix));
        }
        none
    }

    fn img_size(&mut self) -> Option<[u32; 2]> {
        const PATH: &str = "model.img_size";
        let node = self.required(PATH)?;
        let max = u64::from(u32::MAX);
        let mut side = |node: &_| {
            let side = self.integer_in(node, PATH, 1..=max)?;
            u32::try_from(side).ok()
        };
        match &node.value {
            Value::Array(list) => match list.as_slice() {
                [height, width] => {
                    let (height, width) = (side(height), side(width));
                    Some([height?, width?])
                }
                _ => self.wrong(node, PATH, "one number or [height, width]"),
            },
            Value::Integer(_) | Value::Huge(_) => side(node).map(|side| [side, side]),
            _ => self.wrong(node, PATH, "one number or [height, width]"),
        }
    }

    /// Reports what the model says about its sizes.
    fn model_fits(&mut self, model: &ModelConfig) -> bool {
        let problems = model.problems();
        for problem in &problems {
            match problem {
                ModelError::Range { field, value, max } => {
                    let path = model_path(field);
                    let message = format!("`{path}` must be from 1 to {max}, not {value}");
                    self.problem_among(&[&path], message, None);
                }
                ModelError::NotDivisible { field, value, divisor, by } => {
                    let path = model_path(field);
                    let message =
                        format!("`{path}` = {value} must be a multiple of {divisor} ({by})");
                    let step = self.multiple_of(model, field, *divisor);
                    let below = value - value % step;
                    let above = below.saturating_add(step);
                    let fix = match below {
                        0 => format!("use {above}"),
                        _ => format!("use {below} or {above}"),
                    };
                    self.problem_among(&[&path, &format!("model.{by}")], message, Some(fix));
                }
                ModelError::MaskRatio { ratio, kept, patches } if *patches > 0 => {
                    let message = format!(
                        "`model.mask_ratio` = {ratio} keeps {kept} of {patches} patches: at least \
                         one must be kept and one removed"
                    );
                    let paths = ["model.mask_ratio", "model.patch_size", "model.img_size"];
                    self.problem_among(&paths, message, None);
                }
                ModelError::MaskRatio { .. } => {}
            }
        }
        if !problems.is_empty() {
            return false;
        }
        let patches = model.n_patches() as u64;
        if patches > PATCHES_MAX {
            let message = format!(
                "`model.patch_size` = {} cuts an image into {patches} patches, \
                 more than {PATCHES_MAX}",
                model.patch_size
            );
            self.problem_among(&["model.patch_size", "model.img_size"], message, None);
        }
        patches <= PATCHES_MAX
    }

    /// Returns what a field must be a multiple of when all its rules hold.
    fn multiple_of(&self, model: &ModelConfig, field: &str, divisor: u32) -> u32 {
        let heads = match field {
            "width" => model.heads,
            "decoder_width" => model.decoder_heads,
            _ => return divisor,
        };
        // The position table wants a multiple of 4.
        match heads % 4 {
            0 => heads,
            2 => heads * 2,
            _ => heads * 4,
        }
    }

    fn train(&mut self) -> Option<TrainSpec> {
        let batch = self.count("train.batch", 1..=BATCH_MAX);
        let slot_batch = self.count("train.slot_batch", 1..=BATCH_MAX);
        let duration = self.quantity("train.duration");
        let precision = self.word("train.precision", Precision::ALL);
        let reduce = self.word("train.reduce", Reduce::ALL);
        let seed = self.integer("train.seed", 0..=SEED_MAX);
        let max_nonfinite_steps = self.count("train.max_nonfinite_steps", 1..=INTERVAL_MAX);
        let digest_every = self.count("train.digest_every", 1..=INTERVAL_MAX);
        if let (Some(batch), Some(slot_batch)) = (batch, slot_batch) {
            self.slots(batch, slot_batch);
        }
        Some(TrainSpec {
            duration: duration?,
            batch: batch?,
            slot_batch: slot_batch?,
            precision: precision?,
            reduce: reduce?,
            seed: seed?,
            max_nonfinite_steps: max_nonfinite_steps?,
            digest_every: u64::from(digest_every?),
        })
    }

    fn slots(&mut self, batch: u32, slot_batch: u32) {
        let paths = ["train.slot_batch", "train.batch"];
        let divides = |n: &u32| batch.is_multiple_of(*n) && batch / n <= SLOTS_MAX;
        if !batch.is_multiple_of(slot_batch) {
            let message =
                format!("`train.slot_batch` = {slot_batch} must divide `train.batch` = {batch}");
            let below = (1..=slot_batch.min(batch)).rev().find(divides);
            let above = (slot_batch..=batch).find(divides);
            let near: Vec<String> =
                [below, above].into_iter().flatten().map(|n| n.to_string()).collect();
            let fix = format!("use {}", near.join(" or "));
            self.problem_among(&paths, message, Some(fix));
        } else if batch / slot_batch > SLOTS_MAX {
            let n_slots = batch / slot_batch;
            let message = format!(
                "`train.slot_batch` = {slot_batch} makes {n_slots} slots a step, \
                 more than {SLOTS_MAX}"
            );
            self.problem_among(&paths, message, None);
        }
    }

    fn data(&mut self, channels: Option<u32>, batch: Option<u32>) -> Option<DataSpec> {
        let shards = self.place("data.shards", &DATA_SCHEMES);
        let order = self.word("data.order", Order::ALL);
        let lanes = self.lanes(batch);
        let block = match find(self.root, "data.block") {
            Some(_) => self.auto_or("data.block", 1..=BLOCK_MAX),
            None => Some(AutoOr::Auto),
        };
        let mean = self.floats("data.mean", |x| x.abs() <= 16.0, "from -16 to 16");
        let std = self.floats("data.std", |x| (1e-3..=16.0).contains(&x), "from 0.001 to 16");
        if let Some(channels) = channels {
            self.per_channel("data.mean", mean.as_deref(), channels);
            self.per_channel("data.std", std.as_deref(), channels);
        }
        let area = |x: f64| positive(x) && x <= 1.0;
        let crop_scale = self.range("data.crop_scale", area, "above 0 and up to 1");
        let ratio = |x: f64| (0.01..=100.0).contains(&x);
        let crop_ratio = self.range("data.crop_ratio", ratio, "from 0.01 to 100");
        let flip = self.float("data.flip", share, "from 0 to 1");
        let bad_samples = self.word("data.bad_samples", BadSamples::ALL);
        let bad_samples_max = match find(self.root, "data.bad_samples_max") {
            Some(_) => self.float("data.bad_samples_max", share, "from 0 to 1"),
            None => Some(BAD_SAMPLES_SHARE),
        };
        let threads = self.threads();
        let deadline_seconds = match find(self.root, "data.deadline_seconds") {
            Some(_) => self.count("data.deadline_seconds", 1..=100),
            None => Some(DEADLINE_SECONDS),
        };
        let cache = self.cache();
        Some(DataSpec {
            shards: shards?,
            order: order?,
            lanes: lanes?,
            block: block?,
            mean: mean?,
            std: std?,
            crop_scale: crop_scale?,
            crop_ratio: crop_ratio?,
            flip: flip?,
            bad_samples: bad_samples?,
            bad_samples_max: bad_samples_max?,
            threads: threads?,
            deadline_seconds: deadline_seconds?,
            cache: cache?,
        })
    }

    /// Reads the cache, which is none where its table is not there.
    fn cache(&mut self) -> Option<Option<CacheSpec>> {
        if find(self.root, "data.cache").is_none() {
            return Some(None);
        }
        let (dir, size) = (self.path("data.cache.dir"), self.quantity("data.cache.size"));
        let mode = match find(self.root, "data.cache.mode") {
            Some(_) => self.word("data.cache.mode", CacheMode::ALL),
            None => Some(CacheMode::Auto),
        };
        Some(Some(CacheSpec { dir: dir?, size: size?, mode: mode? }))
    }

    /// Reads the lanes, which by default follow from the batch.
    fn lanes(&mut self, batch: Option<u32>) -> Option<u32> {
        if find(self.root, "data.lanes").is_none() {
            return batch.map(default_lanes);
        }
        let lanes = self.count("data.lanes", 1..=LANES_MAX)?;
        if let Some(batch) = batch
            && !batch.is_multiple_of(lanes)
        {
            let message = format!("`data.lanes` = {lanes} must divide `train.batch` = {batch}");
            self.problem_among(&["data.lanes", "train.batch"], message, None);
        }
        Some(lanes)
    }

    fn per_channel(&mut self, path: &str, values: Option<&[f64]>, channels: u32) {
        if let Some(values) = values
            && values.len() != channels as usize
        {
            let n = values.len();
            let message = format!(
                "`{path}` must have {channels} values, one for each of `model.channels`, not {n}"
            );
            self.problem_among(&[path, "model.channels"], message, None);
        }
    }

    fn auto_or(&mut self, path: &str, range: RangeInclusive<u64>) -> Option<AutoOr<u64>> {
        let node = self.required(path)?;
        match &node.value {
            Value::Text(text) if text == "auto" => Some(AutoOr::Auto),
            Value::Integer(_) => self.integer_in(node, path, range).map(AutoOr::Is),
            _ => self.wrong(node, path, "a whole number or \"auto\""),
        }
    }

    fn threads(&mut self) -> Option<AutoOr<u32>> {
        let threads = self.auto_or("data.threads", 1..=u64::from(THREADS_MAX))?;
        Some(match threads {
            AutoOr::Auto => AutoOr::Auto,
            AutoOr::Is(n) => AutoOr::Is(u32::try_from(n).expect("the range is one of u32")),
        })
    }

    fn optim(&mut self) -> Option<OptimSpec> {
        let rate = |x: f64| positive(x) && x <= 100.0;
        let base_lr = self.float("optim.base_lr", rate, "above 0 and up to 100");
        let floor = |x: f64| (0.0..=100.0).contains(&x);
        let min_lr = self.float("optim.min_lr", floor, "from 0 to 100");
        let warmup = match find(self.root, "optim.warmup").map(|node| &node.value) {
            Some(Value::Text(text)) if text == "none" => Some(None),
            _ => self.quantity::<Length>("optim.warmup").map(Some),
        };
        let weight_decay = self.float("optim.weight_decay", floor, "from 0 to 100");
        let below_one = |x: f64| (0.0..1.0).contains(&(x as f32)) && x >= 0.0;
        let betas = self.pair("optim.betas", below_one, "from 0 to below 1");
        let small = |x: f64| positive(x) && x <= 1.0;
        let eps = self.float("optim.eps", small, "above 0 and up to 1");
        let decay_tokens = self.boolean("optim.decay_tokens");
        Some(OptimSpec {
            base_lr: base_lr?,
            min_lr: min_lr?,
            warmup: warmup?,
            weight_decay: weight_decay?,
            betas: betas?,
            eps: eps?,
            decay_tokens: decay_tokens?,
        })
    }

    fn elastic(&mut self) -> Option<ElasticSpec> {
        let workers = self.workers();
        let spares = self.count("elastic.spares", 0..=WORKERS_MAX);
        Some(ElasticSpec { workers: workers?, spares: spares? })
    }

    fn workers(&mut self) -> Option<Workers> {
        const PATH: &str = "elastic.workers";
        let node = self.required(PATH)?;
        let Value::Text(text) = &node.value else {
            return self.wrong(node, PATH, "a string \"min:max\" such as \"2:8\"");
        };
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| text.parse::<u32>().unwrap_or(u32::MAX))
        };
        let ends = text.split_once(':').map(|(min, max)| (number(min), number(max)));
        let (message, fix) = match ends {
            Some((Some(min), Some(max))) if min > max => {
                ("has its larger number first", format!("use \"{max}:{min}\""))
            }
            Some((Some(0), Some(max))) => {
                ("must want at least 1 worker", format!("use \"1:{max}\""))
            }
            Some((Some(_), Some(max))) if max > WORKERS_MAX => {
                ("wants too many workers", format!("use at most {WORKERS_MAX}"))
            }
            Some((Some(min), Some(max))) => {
                return Some(Workers { min, max });
            }
            _ => match number(text) {
                Some(n) => ("must be \"min:max\"", format!("use \"{n}:{n}\"")),
                None => ("must be \"min:max\"", "such as \"2:8\"".to_string()),
            },
        };
        let message = format!("`{PATH}` = \"{}\" {message}", echo(text));
        self.problem(node.at, PATH, message, Some(fix));
        None
    }

    fn checkpoint(&mut self) -> Option<CheckpointSpec> {
        let to = self.place("checkpoint.to", &CHECKPOINT_SCHEMES);
        let every = self.checkpoint_every();
        let last = self.count("checkpoint.keep.last", 1..=KEEP_LAST_MAX);
        let keep_every = match find(self.root, "checkpoint.keep.every") {
            Some(node) => self.quantity_in(node, "checkpoint.keep.every").map(Some),
            None => Some(None),
        };
        let resume = self.word("checkpoint.resume", Resume::ALL);
        let when_busy = self.word("checkpoint.when_busy", WhenBusy::ALL);
        let max_write_mbps = self.count("checkpoint.max_write_mbps", 0..=MBPS_MAX);
        let max_failures = self.count("checkpoint.max_failures", 0..=FAILURES_MAX);
        let read_back = self.boolean("checkpoint.read_back");
        Some(CheckpointSpec {
            to: to?,
            every: every?,
            keep: KeepSpec { last: last?, every: keep_every? },
            resume: resume?,
            when_busy: when_busy?,
            max_write_mbps: max_write_mbps?,
            max_failures: max_failures?,
            read_back: read_back?,
        })
    }

    /// Reads one cadence or a list of them.
    fn checkpoint_every(&mut self) -> Option<Vec<Cadence>> {
        const PATH: &str = "checkpoint.every";
        let node = self.required(PATH)?;
        let list = match &node.value {
            Value::Array(list) if (1..=EVERY_MAX).contains(&list.len()) => list.as_slice(),
            Value::Array(list) => {
                let n = list.len();
                let message = format!("`{PATH}` must list 1 to {EVERY_MAX} cadences, not {n}");
                self.problem(node.at, PATH, message, None);
                return None;
            }
            Value::Text(_) => std::slice::from_ref(node),
            _ => return self.wrong(node, PATH, "a list such as [\"15min\", \"1ep\"]"),
        };
        let read: Vec<Option<Cadence>> = list.iter().map(|n| self.quantity_in(n, PATH)).collect();
        for (i, cadence) in read.iter().enumerate() {
            if let Some(cadence) = cadence
                && read[..i].contains(&Some(*cadence))
            {
                let message = format!("`{PATH}` lists \"{cadence}\" twice");
                self.problem(list[i].at, PATH, message, None);
            }
        }
        read.into_iter().collect()
    }

    fn track(&mut self) -> Option<TrackSpec> {
        let every = self.quantity("track.every")?;
        Some(TrackSpec { every })
    }

    fn across_sections(&mut self, spec: &RunSpec) {
        let (min_lr, peak) = (spec.optim.min_lr, spec.peak_lr());
        if min_lr > peak {
            let message = format!(
                "`optim.min_lr` = {min_lr:?} is above the peak {peak:?}, which \
                 is base_lr * batch / 256"
            );
            let paths = ["optim.min_lr", "optim.base_lr", "train.batch"];
            self.problem_among(&paths, message, None);
        }
        let duration = spec.train.duration;
        let longer = match (spec.optim.warmup, duration) {
            (Some(Length::Epochs(warmup)), Length::Epochs(duration)) => warmup > duration,
            (Some(Length::Steps(warmup)), Length::Steps(duration)) => warmup > duration,
            _ => false,
        };
        if let Some(warmup) = spec.optim.warmup.filter(|_| longer) {
            let message =
                format!("`optim.warmup` = {warmup} is longer than `train.duration` = {duration}");
            self.problem_among(&["optim.warmup", "train.duration"], message, None);
        }
        let (min, n_slots) = (spec.elastic.workers.min, spec.train.batch / spec.train.slot_batch);
        if min > n_slots {
            let message = format!(
                "`elastic.workers` = \"{}\" wants at least {min} workers, and a \
                 step has {n_slots} slots",
                spec.elastic.workers
            );
            let fix = "lower `train.slot_batch` or the workers".to_string();
            let paths = ["elastic.workers", "train.slot_batch", "train.batch"];
            self.problem_among(&paths, message, Some(fix));
        }
    }
}

/// Returns the key of a model's field: `img_size[0]` is part of `model.img_size`.
fn model_path(field: &str) -> String {
    let name = field.split('[').next().unwrap_or(field);
    format!("model.{name}")
}
