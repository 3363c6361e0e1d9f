//! How near the mean gradient of each way of summing is to the mean of the slots' gradients.
//!
//! ```text
//! cargo run --release -p lacuna-mae --example sum_accuracy
//! ```
//!
//! Trains `demo` on made-up images for a few steps with 4, 32 and 128 slots of 8 images. At every
//! step each way sums the same gradients, with exponents of its own history; the mean in f64 is the
//! truth. Prints a Markdown table of root-mean-square errors, relative to the root-mean-square of
//! the gradient, median over the steps, and how often a step overflowed.

use anyhow::bail;
use lacuna_mae::engine::{EngineSetup, TorchEngine};
use lacuna_recipe::adamw::AdamW;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::philox::{Draws, Tag};
use lacuna_recipe::reduce::{Buckets, Reducer, Reduction, SlotGrad, Verdict};
use lacuna_recipe::state::Counters;
use lacuna_recipe::step::SlotBatch;
use lacuna_types::{SampleId, Slot, Step};
use lacuna_worker::engine::{Engine, UpdateScalars};
use lacuna_worker::fake::probe_batch;

const SLOT_BATCH: u32 = 8;
const STEPS: u64 = 12;
/// Steps that are not counted: exponents and gradients settle.
const WARM_UP: usize = 4;
const WAYS: [(&str, Reduction); 3] =
    [("exact", Reduction::Exact), ("exact32", Reduction::Exact32), ("fast", Reduction::Fast)];

/// One way of summing, with its history.
struct Way {
    name: &'static str,
    reduction: Reduction,
    counters: Counters,
    errors: Vec<f64>,
    n_redone: u32,
}

fn main() -> anyhow::Result<()> {
    lacuna_mae::runtime::start_again_pinned()?;
    println!("| slots | exact | exact32 | fast | steps computed again, exact32 |");
    println!("|---:|---:|---:|---:|---:|");
    for n_slots in [4, 32, 128] {
        let ways = measure(n_slots)?;
        let error = |way: &Way| {
            let mut errors = way.errors[WARM_UP..].to_vec();
            errors.sort_by(f64::total_cmp);
            format!("{:.1e}", errors[errors.len() / 2])
        };
        let cells: Vec<String> = ways.iter().map(error).collect();
        let redone = ways.iter().find(|way| way.name == "exact32").map_or(0, |way| way.n_redone);
        println!("| {n_slots} | {} | {redone} of {STEPS} |", cells.join(" | "));
    }
    Ok(())
}

fn measure(n_slots: u32) -> anyhow::Result<Vec<Way>> {
    let model = ModelConfig::preset("demo").expect("a preset");
    let channels = model.channels as usize;
    let mut engine = TorchEngine::new(EngineSetup {
        model: model.clone(),
        seed: 1,
        mean: vec![0.5; channels],
        std: vec![0.25; channels],
        slot_batch: SLOT_BATCH,
        precision: lacuna_spec::Precision::F32,
    })?;
    let layout = engine.layout().clone();
    let batch = n_slots * SLOT_BATCH;
    let mut ways = WAYS.map(|(name, reduction)| {
        let counters = reduction.fresh(&layout, batch);
        Way { name, reduction, counters, errors: Vec::new(), n_redone: 0 }
    });
    for step in 0..STEPS {
        let mut truth: Vec<f64> = vec![0.0; layout.numel()];
        let mut slots: Vec<(f32, Vec<f32>)> = Vec::new();
        for index in 0..n_slots {
            let mut grad = vec![0f32; layout.numel()];
            let loss = engine.slot(&images(&model, step, index), &mut |part: SlotGrad<'_>| {
                grad[layout.range(part.block)].copy_from_slice(part.values);
            })?;
            truth.iter_mut().zip(&grad).for_each(|(t, g)| *t += f64::from(*g));
            slots.push((loss, grad));
        }
        truth.iter_mut().for_each(|t| *t /= f64::from(n_slots));
        let mut exact: Vec<f32> = Vec::new();
        for way in &mut ways {
            let mean = way.mean(&engine, &slots)?;
            way.errors.push(distance(&mean, &truth));
            if way.reduction == Reduction::Exact {
                exact = mean;
            }
        }
        let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.05 };
        let update = UpdateScalars { lr: 1e-3, t: step + 1, adamw, decay_tokens: true };
        engine.apply(&exact, &update)?;
    }
    Ok(ways.into())
}

impl Way {
    /// Sums slots as a step does, again after an overflow and where it only measured.
    fn mean(
        &mut self,
        engine: &TorchEngine,
        slots: &[(f32, Vec<f32>)],
    ) -> anyhow::Result<Vec<f32>> {
        let (layout, n_slots) = (engine.layout(), slots.len() as u32);
        let buckets = Buckets::new(layout, &engine.completion(), usize::MAX);
        let mut reducer = Reducer::of(self.reduction, layout.clone(), buckets.into(), n_slots);
        let mut mean: Vec<f32> = vec![0.0; layout.numel()];
        loop {
            reducer.begin(&self.counters.exponents);
            for (index, (loss, grad)) in slots.iter().enumerate() {
                for block in 0..layout.n_blocks() {
                    reducer.add(SlotGrad { block, values: &grad[layout.range(block)] });
                }
                reducer.end_slot(index as u32, *loss);
            }
            match reducer.finish(1, &mut mean)? {
                Verdict::Redo => {
                    self.reduction.back_off(&mut self.counters, &reducer.overflows());
                    self.n_redone += 1;
                }
                Verdict::Skip(_) => bail!("a gradient is not finite"),
                Verdict::Apply(summary) => {
                    let measured = self.reduction.measures_first(&self.counters);
                    self.reduction.advance(&mut self.counters, &summary.max_abs, n_slots);
                    if !measured {
                        return Ok(mean);
                    }
                }
            }
        }
    }
}

/// Slopes with grain: neighbours are alike, as in pictures.
fn images(model: &ModelConfig, step: u64, index: u32) -> SlotBatch {
    let mut batch = probe_batch(model, SLOT_BATCH);
    batch.slot = Slot { step: Step(step), index };
    let [height, width] = model.img_size.map(|side| side as usize);
    let n = height * width * model.channels as usize;
    for (i, image) in batch.pixels.chunks_exact_mut(n).enumerate() {
        let sample = (step << 20) + u64::from(index * SLOT_BATCH) + i as u64;
        batch.samples[i] = SampleId(sample);
        let draws = Draws::new(9, Tag::User, 0, sample);
        let [a, b, c] = [0, 1, 2].map(|at| draws.unit_f64(at) * 2.0 - 1.0);
        for (at, pixel) in image.iter_mut().enumerate() {
            let (x, y) = ((at % width) as f64, (at / width % height) as f64);
            let grain = f64::from(draws.unit_f32(16 + at as u32));
            *pixel =
                (128.0 + 6.0 * (a * x + b * y) + 40.0 * c + 30.0 * grain).clamp(0.0, 255.0) as u8;
        }
    }
    batch
}

/// The root-mean-square distance, relative to the size of the truth.
fn distance(mean: &[f32], truth: &[f64]) -> f64 {
    let of = |m: &f32, t: &f64| (f64::from(*m) - t).powi(2);
    let off: f64 = mean.iter().zip(truth).map(|(m, t)| of(m, t)).sum();
    let all: f64 = truth.iter().map(|t| t * t).sum();
    (off / all).sqrt()
}
