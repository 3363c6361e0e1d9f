//! Trains a small masked autoencoder on photographs, and hands a peer what it needs to train the
//! same: both then have equal weights at the start, and equal pixels, masks and learning rates at
//! every step.
//!
//! ```text
//! parity --photos FOLDER --work FOLDER --curve FILE [--seed 1] [--steps 2000] [--reduce exact]
//!        [--stream]
//! ```
//!
//! `--photos` is a folder of JPEG files; a data set of pieces of them is kept in `--work`. The
//! loss of every step goes to `--curve`, as a JSON array. `scripts/bench/parity.py` runs this
//! program and its peer.
//!
//! With `--stream` stdout carries, all numbers little-endian:
//!
//! - one line of JSON: `model` (sizes), `batch`, `steps`, `n_patches`, `mean` and `std` (one value
//!   a channel, in units of full brightness), `adamw` (its constants; `cls_token` and `mask_token`
//!   are decayed as matrices are), `tensors` (a list of `{name, shape}`);
//! - the initial weights, f32, tensor after tensor in that order;
//! - for each step: the learning rate, f64; the pixels, u8 `[batch, height, width, channel]`; the
//!   patches in shuffled order, u32 `[batch, n_patches]`, of which the first `len_keep` are kept.

mod photos;

use std::fs;
use std::io::{BufWriter, Write, stdout};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use lacuna_data::loader::{BadSamplePolicy, warn_of_bad_samples};
use lacuna_data::{Dataset, ImageShape, Loader, LoaderConfig};
use lacuna_mae::engine::{EngineSetup, TorchEngine};
use lacuna_recipe::adamw::AdamW;
use lacuna_recipe::augment::Augment;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::order::OrderParams;
use lacuna_recipe::reduce::{Reduction, Verdict};
use lacuna_recipe::schedule::Schedule;
use lacuna_recipe::state::Counters;
use lacuna_recipe::step::{Geometry, SlotBatch};
use lacuna_spec::Reduce;
use lacuna_types::Step;
use lacuna_worker::engine::{Engine, UpdateScalars};
use lacuna_worker::host_math::HostMath;
use serde_json::{Value, json};

const BATCH: u32 = 32;
const SLOT_BATCH: u32 = 8;
const N_SLOTS: u32 = BATCH / SLOT_BATCH;
const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.05 };
/// Learning rate after the warm-up, and the part of the run that this takes.
const PEAK_LR: f64 = 1e-3;
const WARMUP_SHARE: f64 = 0.1;
/// Usual values of photographs, one a channel.
const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const STD: [f64; 3] = [0.229, 0.224, 0.225];
/// Slots decoded ahead: four steps.
const AHEAD_SLOTS: usize = 16;
/// A slot is 8 small pictures; longer than this means that the machine stands still.
const DEADLINE: Duration = Duration::from_secs(60);

struct Args {
    photos: PathBuf,
    work: PathBuf,
    curve: PathBuf,
    seed: u64,
    steps: u64,
    reduction: Reduction,
    stream: bool,
}

fn main() -> anyhow::Result<()> {
    let args = parse(std::env::args().skip(1))?;
    lacuna_mae::runtime::start_again_pinned()?;
    let model = model();
    let dataset = Arc::new(photos::open(&args.photos, &args.work)?);
    let loader = loader(&dataset, &model, args.seed)?;
    let mut slots = loader.stream(Step(0), Step(args.steps), (0..N_SLOTS).collect())?;
    let mut trainer = Trainer::new(model, args.seed, args.reduction)?;
    let mut peer = if args.stream { Some(BufWriter::new(stdout().lock())) } else { None };
    if let Some(peer) = &mut peer {
        trainer.introduce(args.steps, peer)?;
    }
    let schedule = Schedule {
        peak: PEAK_LR,
        min_lr: 0.0,
        warmup_steps: args.steps as f64 * WARMUP_SHARE,
        total_steps: args.steps as f64,
    };
    let mut losses: Vec<f64> = Vec::new();
    for step in 0..args.steps {
        let mut batches: Vec<SlotBatch> = Vec::new();
        for _ in 0..N_SLOTS {
            batches.push(slots.next(DEADLINE)?);
        }
        let lr = schedule.lr(step);
        if let Some(peer) = &mut peer {
            hand_over(lr, &batches, peer).context("hand a step to the peer")?;
        }
        losses.push(trainer.step(step, lr, &batches)?);
        if (step + 1) % 100 == 0 {
            eprintln!(
                "parity: step {} of {}, loss {:.4}",
                step + 1,
                args.steps,
                losses[losses.len() - 1]
            );
        }
        batches.into_iter().for_each(|batch| loader.recycle(batch));
    }
    let redone = &trainer.redone;
    eprintln!("parity: {} steps computed again after an overflow: {redone:?}", redone.len());
    fs::write(&args.curve, json!(losses).to_string()).context("write the curve")
}

fn parse(mut words: impl Iterator<Item = String>) -> anyhow::Result<Args> {
    let mut args = Args {
        photos: PathBuf::new(),
        work: PathBuf::new(),
        curve: PathBuf::new(),
        seed: 1,
        steps: 2000,
        reduction: Reduction::Exact,
        stream: false,
    };
    while let Some(flag) = words.next() {
        if flag == "--stream" {
            args.stream = true;
            continue;
        }
        let value = words.next().with_context(|| format!("read the value of `{flag}`"))?;
        match flag.as_str() {
            "--photos" => args.photos = value.into(),
            "--work" => args.work = value.into(),
            "--curve" => args.curve = value.into(),
            "--seed" => args.seed = value.parse().context("read --seed")?,
            "--steps" => args.steps = value.parse().context("read --steps")?,
            "--reduce" => {
                let word = Reduce::ALL.iter().find(|(word, _)| *word == value);
                let (_, reduce) = word.with_context(|| format!("find the sum `{value}`"))?;
                args.reduction = reduce.reduction();
            }
            _ => bail!("unknown flag `{flag}`"),
        }
    }
    if [&args.photos, &args.work, &args.curve].iter().any(|path| path.as_os_str().is_empty()) {
        bail!("--photos, --work and --curve are needed");
    }
    Ok(args)
}

/// Small enough for thousands of steps on one core in minutes.
fn model() -> ModelConfig {
    ModelConfig {
        img_size: [64, 64],
        patch_size: 8,
        channels: 3,
        width: 96,
        depth: 4,
        heads: 4,
        decoder_width: 64,
        decoder_depth: 2,
        decoder_heads: 4,
        mlp_ratio: 4,
        mask_ratio: 0.75,
        norm_pix_loss: true,
    }
}

fn loader(dataset: &Arc<Dataset>, model: &ModelConfig, seed: u64) -> anyhow::Result<Loader> {
    let n_samples = dataset.n_samples();
    let params = OrderParams::default_for(n_samples, dataset.index().n_chunks(), BATCH);
    let [height, width] = model.img_size;
    Ok(Loader::new(LoaderConfig {
        order: dataset.order_spec(params, seed, BATCH),
        dataset: dataset.clone(),
        augment: Augment::PRETRAIN,
        geometry: Geometry { n_samples, batch: BATCH, slot_batch: SLOT_BATCH },
        shape: ImageShape { height, width, channels: model.channels },
        n_patches: model.n_patches(),
        threads: 1,
        ahead_slots: AHEAD_SLOTS,
        bad_samples: BadSamplePolicy::Fail,
        on_bad_sample: warn_of_bad_samples(),
        planes: None,
    })?)
}

/// Writes one step of the stream.
fn hand_over(lr: f64, batches: &[SlotBatch], peer: &mut impl Write) -> std::io::Result<()> {
    peer.write_all(&lr.to_le_bytes())?;
    for batch in batches {
        peer.write_all(&batch.pixels)?;
    }
    for id in batches.iter().flat_map(|batch| &batch.ids_shuffle) {
        peer.write_all(&id.to_le_bytes())?;
    }
    peer.flush()
}

struct Trainer {
    engine: TorchEngine,
    math: HostMath,
    reduction: Reduction,
    counters: Counters,
    /// Steps that were computed again after an overflow.
    redone: Vec<u64>,
}

impl Trainer {
    fn new(model: ModelConfig, seed: u64, reduction: Reduction) -> anyhow::Result<Self> {
        let engine = TorchEngine::new(EngineSetup {
            model,
            seed,
            mean: MEAN.to_vec(),
            std: STD.to_vec(),
            slot_batch: SLOT_BATCH,
            precision: lacuna_spec::Precision::F32,
        })?;
        let math = HostMath::new(&engine, reduction, N_SLOTS);
        let counters = reduction.fresh(engine.layout(), BATCH);
        Ok(Trainer { engine, math, reduction, counters, redone: Vec::new() })
    }

    /// Writes the head of the stream and the weights.
    fn introduce(&self, steps: u64, peer: &mut impl Write) -> anyhow::Result<()> {
        let tensor =
            |p: &lacuna_recipe::model::ParamSpec| json!({"name": p.name, "shape": p.shape});
        let tensors: Vec<Value> = self.engine.layout().params().iter().map(tensor).collect();
        let model = self.engine.model();
        let head = json!({
            "model": model, "batch": BATCH, "steps": steps, "n_patches": model.n_patches(),
            "mean": MEAN, "std": STD, "adamw": ADAMW, "tensors": tensors,
        });
        writeln!(peer, "{head}")?;
        for value in self.engine.params() {
            peer.write_all(&value.to_le_bytes())?;
        }
        Ok(())
    }

    /// Computes and applies one step; returns its loss.
    fn step(&mut self, step: u64, lr: f64, batches: &[SlotBatch]) -> anyhow::Result<f64> {
        loop {
            match self.mean_gradient(batches)? {
                Verdict::Redo => {
                    self.reduction.back_off(&mut self.counters, &self.math.overflows());
                    self.redone.push(step);
                }
                Verdict::Skip(_) => bail!("step {step} is not finite"),
                Verdict::Apply(summary) => {
                    let measured = self.reduction.measures_first(&self.counters);
                    self.reduction.advance(&mut self.counters, &summary.max_abs, N_SLOTS);
                    if measured {
                        continue;
                    }
                    let (adamw, t) = (ADAMW, step + 1);
                    let update = UpdateScalars { lr, t, adamw, decay_tokens: true };
                    self.engine.apply(self.math.mean(), &update)?;
                    return Ok(summary.loss);
                }
            }
        }
    }

    /// Computes the mean gradient of all slots.
    fn mean_gradient(&mut self, batches: &[SlotBatch]) -> anyhow::Result<Verdict> {
        self.math.begin(&self.counters.exponents);
        for batch in batches {
            self.math.slot(&mut self.engine, batch)?;
        }
        Ok(self.math.finish(1)?)
    }
}
