//! The sections of a spec, and what must hold between keys.

use lacuna_recipe::model::{ModelConfig, ModelError};
use lacuna_recipe::order::default_lanes;
use lacuna_types::{NAME_BYTES_MAX, RunId};

use super::Reader;
use crate::fields::{CADENCES_MAX, SCHEMA, WORKERS_MAX};
use crate::node::{Value, find};
use crate::problem::echo;
use crate::run_spec::{
    AutoOr, BAD_SAMPLES_SHARE, BadSamples, CacheMode, CacheSpec, CheckpointSpec, DEADLINE_SECONDS,
    DataSpec, ElasticSpec, KeepSpec, OptimSpec, Order, Precision, Reduce, Resume, RunSpec,
    SLOTS_MAX, TrainSpec, WhenBusy, Workers, peak_lr,
};
use crate::units::{Cadence, Length};

/// Longest name that a message suggests.
const NAME_SHOWN_MAX: usize = 40;
/// Most patches of an image: a sample's random draws are counted in 24 bits.
const PATCHES_MAX: u64 = 1 << 24;

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
        let task = self.task();
        self.across_sections(train.as_ref(), optim.as_ref(), elastic.as_ref());
        Some(RunSpec {
            schema: schema?,
            name: name?,
            model: model?,
            data: data?,
            train: train?,
            optim: optim?,
            elastic: elastic?,
            checkpoint: checkpoint?,
            track: track?,
            task: task?,
        })
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
            Ok(_) if name.starts_with('-') && !self.stored => {
                let message =
                    format!("`name` = \"{}\" looks like an option of a command", echo(name));
                self.problem_among(&["name"], message, usable_name(name));
                None
            }
            Ok(id) => Some(id.as_str().to_string()),
            Err(_) => {
                let message = format!(
                    "`name` = \"{}\" must be 1 to {NAME_BYTES_MAX} of the characters \
                     a-z A-Z 0-9 . _ : - and not start with a dot",
                    echo(name)
                );
                self.problem_among(&["name"], message, usable_name(name));
                None
            }
        }
    }

    fn model(&mut self) -> Option<ModelConfig> {
        if self.has_no_model() {
            return None;
        }
        let mut size = |path: &str| self.count(path);
        let patch_size = size("model.patch_size");
        let channels = size("model.channels");
        let width = size("model.width");
        let depth = size("model.depth");
        let heads = size("model.heads");
        let decoder_width = size("model.decoder_width");
        let decoder_depth = size("model.decoder_depth");
        let decoder_heads = size("model.decoder_heads");
        let mlp_ratio = size("model.mlp_ratio");
        let channels = channels.filter(|channels| self.has_pixels(*channels));
        let img_size = self.sides("model.img_size");
        let mask_ratio = self.float("model.mask_ratio");
        let norm_pix_loss = self.boolean("model.norm_pix_loss");
        let is_whole = mlp_ratio.is_some() && mask_ratio.is_some() && norm_pix_loss.is_some();
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
            // The sizes can be compared without these, and any value will do.
            mlp_ratio: mlp_ratio.unwrap_or(1),
            mask_ratio: mask_ratio.unwrap_or(f64::NAN),
            norm_pix_loss: norm_pix_loss.unwrap_or(false),
        };
        let fits = self.model_fits(&model);
        (fits && is_whole).then_some(model)
    }

    /// Reports channels that no image can be decoded to.
    fn has_pixels(&mut self, channels: u32) -> bool {
        let known = matches!(channels, 1 | 3);
        if !known {
            let message = format!("`model.channels` = {channels} must be 1 or 3");
            let fix = "for grey images or for red, green and blue".to_string();
            self.problem_among(&["model.channels"], message, Some(fix));
        }
        known
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

    /// Reports what the model says about its sizes.
    fn model_fits(&mut self, model: &ModelConfig) -> bool {
        let problems = model.problems();
        for problem in &problems {
            match problem {
                ModelError::Range { field, value, max } => {
                    let path = model_path(field);
                    let message = format!("`{path}` must be from 1 to {max}, not {value}");
                    self.problem_among(&[&path], message, Some(format!("use {max}")));
                }
                ModelError::NotDivisible { field, value, divisor, by } => {
                    let path = model_path(field);
                    let message =
                        format!("`{path}` = {value} must be a multiple of {divisor} ({by})");
                    let step = self.multiple_of(model, field, *divisor);
                    let below = value - value % step;
                    let above = below.saturating_add(step);
                    let fix = match below {
                        0 => format!("use `{path}` = {above}"),
                        _ => format!("use `{path}` = {below} or {above}"),
                    };
                    let fix = match *by {
                        "position table" => fix,
                        _ => format!("{fix}, or another `model.{by}`"),
                    };
                    self.problem_among(&[&path, &format!("model.{by}")], message, Some(fix));
                }
                ModelError::MaskRatio { ratio, kept, patches }
                    if *patches > 0 && model.mask_ratio.is_finite() =>
                {
                    let message = format!(
                        "`model.mask_ratio` = {ratio} keeps {kept} of {patches} patches: at least \
                         one must be kept and one removed"
                    );
                    let paths = ["model.mask_ratio", "model.patch_size", "model.img_size"];
                    self.problem_among(&paths, message, Some(mask_ratio_fix(*patches)));
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
            let fix = "use larger patches or smaller images".to_string();
            self.problem_among(&["model.patch_size", "model.img_size"], message, Some(fix));
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
        let batch = self.count("train.batch");
        let slot_batch = self.count("train.slot_batch");
        let duration = self.quantity("train.duration");
        let precision = self.word("train.precision", Precision::ALL);
        let reduce = self.word("train.reduce", Reduce::ALL);
        let seed = self.integer("train.seed");
        let max_nonfinite_steps = self.count("train.max_nonfinite_steps");
        let digest_every = self.count("train.digest_every");
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
            let fix = format!("use `train.slot_batch` = {}", near.join(" or "));
            self.problem_among(&paths, message, Some(fix));
        } else if batch / slot_batch > SLOTS_MAX {
            let n_slots = batch / slot_batch;
            let message = format!(
                "`train.slot_batch` = {slot_batch} makes {n_slots} slots a step, \
                 more than {SLOTS_MAX}"
            );
            let least = (1..=batch).find(divides);
            let fix = least.map(|n| format!("use `train.slot_batch` = {n} or more"));
            self.problem_among(&paths, message, fix);
        }
    }

    fn data(&mut self, channels: Option<u32>, batch: Option<u32>) -> Option<DataSpec> {
        let shards = self.place("data.shards");
        let order = self.word("data.order", Order::ALL);
        let lanes = self.lanes(batch);
        let block = match find(self.root, "data.block") {
            Some(_) => self.auto_or("data.block"),
            None => Some(AutoOr::Auto),
        };
        let mean = self.floats("data.mean");
        let std = self.floats("data.std");
        if let Some(channels) = channels {
            self.per_channel("data.mean", mean.as_deref(), channels);
            self.per_channel("data.std", std.as_deref(), channels);
        }
        let crop_scale = self.range("data.crop_scale");
        let crop_ratio = self.range("data.crop_ratio");
        let flip = self.float("data.flip");
        let bad_samples = self.word("data.bad_samples", BadSamples::ALL);
        let bad_samples_max = match find(self.root, "data.bad_samples_max") {
            Some(_) => self.float("data.bad_samples_max"),
            None => Some(BAD_SAMPLES_SHARE),
        };
        let threads = self.threads();
        let deadline_seconds = match find(self.root, "data.deadline_seconds") {
            Some(_) => self.count("data.deadline_seconds"),
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
        let (dir, size) = (self.place("data.cache.dir"), self.quantity("data.cache.size"));
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
        let lanes = self.count("data.lanes")?;
        if let Some(batch) = batch
            && !batch.is_multiple_of(lanes)
        {
            let message = format!("`data.lanes` = {lanes} must divide `train.batch` = {batch}");
            let fix = format!("use `data.lanes` = {}, or remove it", default_lanes(batch));
            self.problem_among(&["data.lanes", "train.batch"], message, Some(fix));
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

    fn threads(&mut self) -> Option<AutoOr<u32>> {
        let threads = self.auto_or("data.threads")?;
        Some(match threads {
            AutoOr::Auto => AutoOr::Auto,
            AutoOr::Is(n) => AutoOr::Is(u32::try_from(n).expect("the range is one of u32")),
        })
    }

    fn optim(&mut self) -> Option<OptimSpec> {
        let base_lr = self.float("optim.base_lr");
        let min_lr = self.float("optim.min_lr");
        let warmup = match find(self.root, "optim.warmup").map(|node| &node.value) {
            Some(Value::Text(text)) if text == "none" => Some(None),
            _ => self.quantity::<Length>("optim.warmup").map(Some),
        };
        let weight_decay = self.float("optim.weight_decay");
        let betas = self.pair("optim.betas");
        let eps = self.float("optim.eps");
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
        let spares = self.count("elastic.spares");
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
                None => ("must be \"min:max\"", workers_fix(text)),
            },
        };
        let message = format!("`{PATH}` = \"{}\" {message}", echo(text));
        self.problem(node.at, PATH, message, Some(fix));
        None
    }

    fn checkpoint(&mut self) -> Option<CheckpointSpec> {
        let to = self.place("checkpoint.to");
        let every = self.checkpoint_every();
        let last = self.count("checkpoint.keep.last");
        let keep_every = match find(self.root, "checkpoint.keep.every") {
            Some(node) => self.quantity_in(node, "checkpoint.keep.every").map(Some),
            None => Some(None),
        };
        let resume = self.word("checkpoint.resume", Resume::ALL);
        let when_busy = self.word("checkpoint.when_busy", WhenBusy::ALL);
        let max_write_mbps = self.count("checkpoint.max_write_mbps");
        let max_failures = self.count("checkpoint.max_failures");
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
            Value::Array(list) if (1..=CADENCES_MAX).contains(&list.len()) => list.as_slice(),
            Value::Array(list) => {
                let n = list.len();
                let message = format!("`{PATH}` must list 1 to {CADENCES_MAX} cadences, not {n}");
                let fix = "for example [\"15min\", \"1ep\"]".to_string();
                self.problem(node.at, PATH, message, Some(fix));
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
                self.problem(list[i].at, PATH, message, Some("remove one of them".to_string()));
            }
        }
        read.into_iter().collect()
    }

    /// Compares sections with each other, as far as they could be read.
    fn across_sections(
        &mut self,
        train: Option<&TrainSpec>,
        optim: Option<&OptimSpec>,
        elastic: Option<&ElasticSpec>,
    ) {
        let Some(train) = train else { return };
        if let Some(optim) = optim {
            self.rates(train, optim);
            self.warmup(train.duration, optim.warmup);
        }
        // Slots that do not tile the batch were reported.
        if let Some(elastic) = elastic
            && train.batch.is_multiple_of(train.slot_batch)
        {
            self.workers_for(train.batch / train.slot_batch, elastic.workers);
        }
    }

    fn rates(&mut self, train: &TrainSpec, optim: &OptimSpec) {
        let (min_lr, peak) = (optim.min_lr, peak_lr(optim.base_lr, train.batch));
        if min_lr > peak {
            let message = format!(
                "`optim.min_lr` = {min_lr:?} is above the peak {peak:?}, which \
                 is base_lr * batch / 256"
            );
            let paths = ["optim.min_lr", "optim.base_lr", "train.batch"];
            let fix = format!("use at most {peak:?} or raise `optim.base_lr`");
            self.problem_among(&paths, message, Some(fix));
        }
    }

    fn warmup(&mut self, duration: Length, warmup: Option<Length>) {
        let longer = match (warmup, duration) {
            (Some(Length::Epochs(warmup)), Length::Epochs(duration)) => warmup > duration,
            (Some(Length::Steps(warmup)), Length::Steps(duration)) => warmup > duration,
            _ => false,
        };
        if let Some(warmup) = warmup.filter(|_| longer) {
            let message =
                format!("`optim.warmup` = {warmup} is longer than `train.duration` = {duration}");
            let fix = format!("use `optim.warmup` = \"{duration}\" or less");
            self.problem_among(&["optim.warmup", "train.duration"], message, Some(fix));
        }
    }

    fn workers_for(&mut self, n_slots: u32, workers: Workers) {
        let min = workers.min;
        if min > n_slots {
            let message = format!(
                "`elastic.workers` = \"{workers}\" wants at least {min} workers, and a \
                 step has {n_slots} slots"
            );
            let fix = "lower `train.slot_batch` or the workers".to_string();
            let paths = ["elastic.workers", "train.slot_batch", "train.batch"];
            self.problem_among(&paths, message, Some(fix));
        }
    }
}

/// Returns the nearest ratios that keep one patch and remove one.
fn mask_ratio_fix(patches: usize) -> String {
    if patches < 2 {
        return "use smaller patches: there must be at least 2".to_string();
    }
    // Decimals enough that rounding moves neither limit by a patch.
    let scale = [1e3, 1e6, 1e9].into_iter().find(|scale| *scale > 10.0 * patches as f64);
    let scale = scale.unwrap_or(1e12);
    let share = 1.0 / patches as f64;
    let least = (share * scale).ceil() / scale;
    let most = ((1.0 - share) * scale).floor() / scale;
    format!("use a ratio from {least} to {most}")
}

/// Guesses two numbers of workers with something else between them.
fn workers_fix(text: &str) -> String {
    let is_digit = |c: char| c.is_ascii_digit();
    let parts = text.split(|c| !is_digit(c)).filter(|part| !part.is_empty());
    match parts.collect::<Vec<&str>>().as_slice() {
        [min, max] if text.starts_with(is_digit) => format!("did you mean \"{min}:{max}\"?"),
        _ => "such as \"2:8\"".to_string(),
    }
}

/// Returns a name like `name` that can be used, where something is left of it.
fn usable_name(name: &str) -> Option<String> {
    let usable = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '-');
    let plain: String = name.chars().map(|c| if usable(c) { c } else { '-' }).collect();
    let plain = plain.trim_matches(|c| matches!(c, '.' | '-'));
    let plain = &plain[..plain.len().min(NAME_BYTES_MAX)];
    let guess = plain.parse::<RunId>().ok();
    Some(match guess {
        Some(_) if plain.len() <= NAME_SHOWN_MAX => format!("for example \"{plain}\""),
        Some(_) => "shorten it".to_string(),
        None => "for example \"my-run\"".to_string(),
    })
}

/// Returns the key of a model's field: `img_size[0]` is part of `model.img_size`.
fn model_path(field: &str) -> String {
    let name = field.split('[').next().unwrap_or(field);
    format!("model.{name}")
}
