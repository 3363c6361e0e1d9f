//! Times full exact training steps on one CPU thread: normalise, forward, backward, quantise,
//! reduce (one slot, one rank), AdamW. Synthetic images, so that the step alone is timed.
//!
//! ```text
//! cargo run --release -p lacuna-mae --example step_bench -- --model tiny --batch 16 --steps 20
//! ```
//!
//! Prints one JSON line. `step_ms` is wall time, `cpu_ms` CPU time of the process, which a busy
//! machine disturbs less; `images_per_s` is from the wall time.

use std::time::Instant;

use anyhow::{Context, bail};
use lacuna_mae::engine::{EngineSetup, TorchEngine};
use lacuna_mae::runtime::{CPU_ENV, library_version, missing_pins};
use lacuna_recipe::adamw::AdamW;
use lacuna_recipe::mask::MaskOrder;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::philox::{Draws, Tag};
use lacuna_recipe::reduce::{Reducer, Verdict, advance_exponents, back_off_exponents};
use lacuna_recipe::state::Counters;
use lacuna_recipe::step::SlotBatch;
use lacuna_types::{SampleId, Slot, Step};
use lacuna_worker::engine::{Engine, UpdateScalars};
use serde_json::{Value, json};

struct Args {
    model: String,
    batch: u32,
    steps: usize,
    warmup: usize,
    pin: bool,
}

fn main() -> anyhow::Result<()> {
    let args = parse(std::env::args().skip(1))?;
    if args.pin && !missing_pins().is_empty() {
        return start_again_pinned();
    }
    let model = ModelConfig::preset(&args.model)
        .with_context(|| format!("find preset `{}`", args.model))?;
    let mut bench = Bench::new(model, args.batch)?;
    let (mut wall, mut cpu, mut losses): (Vec<f64>, Vec<f64>, Vec<f64>) = Default::default();
    for step in 0..args.warmup + args.steps {
        let (start, start_cpu) = (Instant::now(), cpu_seconds());
        let loss = bench.step(step as u64)?;
        if step < 3 {
            losses.push(loss);
        }
        if step >= args.warmup {
            wall.push(start.elapsed().as_secs_f64() * 1e3);
            cpu.push((cpu_seconds() - start_cpu) * 1e3);
        }
    }
    let (step_ms, cpu_ms) = (summary(wall), summary(cpu));
    let median = step_ms["median"].as_f64().context("read the median")?;
    let line = json!({
        "peer": "lacuna", "torch": library_version(), "model": args.model, "world": 1,
        "batch_per_process": args.batch, "precision": "fp32", "compile": false, "threads": 1,
        "pinned": args.pin, "images_per_s": f64::from(args.batch) / median * 1e3,
        "step_ms": step_ms, "cpu_ms": cpu_ms, "peak_gib": null, "first_losses": losses,
    });
    println!("{line}");
    Ok(())
}

fn parse(words: impl Iterator<Item = String>) -> anyhow::Result<Args> {
    let mut args = Args { model: "tiny".into(), batch: 16, steps: 10, warmup: 2, pin: true };
    let mut words = words;
    while let Some(flag) = words.next() {
        if flag == "--no-pins" {
            args.pin = false;
            continue;
        }
        let value = words.next().with_context(|| format!("read the value of `{flag}`"))?;
        match flag.as_str() {
            "--model" => args.model = value,
            "--batch" => args.batch = value.parse().context("read --batch")?,
            "--steps" => args.steps = value.parse().context("read --steps")?,
            "--warmup" => args.warmup = value.parse().context("read --warmup")?,
            _ => bail!("unknown flag `{flag}`: --model --batch --steps --warmup --no-pins"),
        }
    }
    Ok(args)
}

/// Runs this program again with the environment of a trainer, which libraries read as they load.
fn start_again_pinned() -> anyhow::Result<()> {
    let mut command = std::process::Command::new(std::env::current_exe()?);
    let status = command
        .args(std::env::args_os().skip(1))
        .envs(CPU_ENV.iter().copied())
        .status()
        .context("start the pinned process")?;
    std::process::exit(status.code().unwrap_or(1));
}

struct Bench {
    engine: TorchEngine,
    reducer: Reducer,
    counters: Counters,
    mean: Vec<f32>,
    batch: SlotBatch,
}

impl Bench {
    fn new(model: ModelConfig, slot_batch: u32) -> anyhow::Result<Self> {
        let channels = model.channels as usize;
        let (mean, std) = (vec![0.45; channels], vec![0.25; channels]);
        let batch = synthetic(&model, slot_batch);
        let engine = TorchEngine::new(EngineSetup {
            model,
            seed: 0,
            mean,
            std,
            slot_batch,
            precision: lacuna_spec::Precision::F32,
        })?;
        let layout = engine.layout().clone();
        Ok(Bench {
            counters: Counters::fresh(layout.n_blocks(), slot_batch),
            mean: vec![0.0; layout.numel()],
            reducer: Reducer::new(layout, 1),
            engine,
            batch,
        })
    }

    /// Computes and applies one step; returns its loss.
    fn step(&mut self, step: u64) -> anyhow::Result<f64> {
        loop {
            let Bench { engine, reducer, counters, mean, batch } = self;
            reducer.begin(&counters.exponents);
            let loss = engine.slot(batch, &mut |grad| reducer.add(grad))?;
            reducer.end_slot(0, loss);
            reducer.buffer();
            match reducer.finish(1, mean)? {
                Verdict::Redo => back_off_exponents(counters),
                Verdict::Skip(_) => bail!("step {step} is not finite"),
                Verdict::Apply(summary) => {
                    advance_exponents(counters, &summary.max_abs, 1);
                    let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.05 };
                    let t = step + 1;
                    engine
                        .apply(mean, &UpdateScalars { lr: 1e-4, t, adamw, decay_tokens: true })?;
                    return Ok(summary.loss);
                }
            }
        }
    }
}

/// Makes a slot of noise, whose patches are far from constant.
fn synthetic(model: &ModelConfig, slot_batch: u32) -> SlotBatch {
    let [height, width] = model.img_size;
    let n_bytes = model.channels * height * width;
    let image = |sample: u64| {
        let draws = Draws::new(0, Tag::User, 0, sample);
        (0..n_bytes.div_ceil(16)).flat_map(move |i| draws.block(i)).flat_map(u32::to_le_bytes)
    };
    let ids = |sample: u64| MaskOrder::draw(0, 0, sample, model.n_patches()).ids_shuffle;
    let samples = 0..u64::from(slot_batch);
    SlotBatch {
        slot: Slot { step: Step(0), index: 0 },
        samples: samples.clone().map(SampleId).collect(),
        weights: vec![1.0; slot_batch as usize],
        pixels: samples.clone().flat_map(|s| image(s).take(n_bytes as usize)).collect(),
        ids_shuffle: samples.flat_map(ids).collect(),
    }
}

fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

fn summary(mut ms: Vec<f64>) -> Value {
    if ms.is_empty() {
        return json!({ "median": null, "p10": null, "p90": null });
    }
    ms.sort_by(f64::total_cmp);
    let tenth = ms.len() / 10;
    let (low, high) = (ms[(ms.len() - 1) / 2], ms[ms.len() / 2]);
    json!({ "median": (low + high) / 2.0, "p10": ms[tenth], "p90": ms[ms.len() - 1 - tenth] })
}
