//! The model learns: 900 steps on synthetic images. Slow (two CPU minutes), so it runs only with
//! `LACUNA_SLOW_TESTS=1`.
//!
//! Predicting zero gives (n − 1) / n = 0.979 for patches of 48 values. The known mistake, visible
//! tokens in raster order put back by the indices of the shuffled order, learns too, but less; so
//! a loss that merely falls proves little, and both are trained on the same data.

use std::collections::VecDeque;
use std::f32::consts::TAU;

use lacuna_mae::engine::{EngineSetup, TorchEngine};
use lacuna_mae::mae::{Mae, Masks, PosTables};
use lacuna_mae::runtime;
use lacuna_mae::weights::Weights;
use lacuna_recipe::adamw::AdamW;
use lacuna_recipe::mask::MaskOrder;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::philox::{Draws, Tag};
use lacuna_recipe::schedule::Schedule;
use lacuna_recipe::state::{Layout, Section};
use lacuna_recipe::step::{Normalize, SlotBatch};
use lacuna_types::{SampleId, Slot, Step};
use lacuna_worker::cpu_state::CpuState;
use lacuna_worker::engine::{Engine, UpdateScalars};
use tch::{Kind, Tensor};

const SIDE: usize = 32;
const STEPS: u64 = 900;
const BATCH: u64 = 32;
const N_IMAGES: u64 = 4096;
/// Steps whose mean loss is the result.
const LAST: usize = 50;
/// Between the loss of this model, 0.607, and that of the known mistake, 0.699.
const LOSS_MAX: f64 = 0.65;

#[test]
fn nine_hundred_steps() {
    if std::env::var("LACUNA_SLOW_TESTS").as_deref() != Ok("1") {
        println!("skipped: set LACUNA_SLOW_TESTS=1 to train for 900 steps");
        return;
    }
    let model = model();
    let n_params = model.n_params();
    let loss = train(&mut Correct::new(&model));
    let mistaken = train(&mut Mistaken::new(&model));
    println!("{n_params} parameters: loss {loss:.4}, with mixed orders {mistaken:.4}");
    assert!(loss < LOSS_MAX, "{loss}");
    assert!(mistaken > LOSS_MAX, "the bound tells the mistake apart: {mistaken}");
}

/// The size of the golden set `mid`.
fn model() -> ModelConfig {
    ModelConfig {
        img_size: [SIDE as u32; 2],
        patch_size: 4,
        channels: 3,
        width: 64,
        depth: 3,
        heads: 4,
        decoder_width: 32,
        decoder_depth: 2,
        decoder_heads: 4,
        mlp_ratio: 4,
        mask_ratio: 0.75,
        norm_pix_loss: true,
    }
}

trait Learner {
    fn gradient(&mut self, batch: &SlotBatch, flat: &mut [f32]) -> f32;
    fn update(&mut self, mean: &[f32], update: &UpdateScalars);
    fn numel(&self) -> usize;
}

/// Trains and returns the mean loss of the last steps.
fn train(learner: &mut dyn Learner) -> f64 {
    let schedule =
        Schedule { peak: 2e-3, min_lr: 0.0, warmup_steps: 60.0, total_steps: STEPS as f64 };
    let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.05 };
    let mut flat: Vec<f32> = vec![0.0; learner.numel()];
    let mut last: VecDeque<f64> = VecDeque::new();
    for step in 0..STEPS {
        let loss = learner.gradient(&batch(step), &mut flat);
        let update = UpdateScalars {
            lr: schedule.lr(step),
            t: step + 1,
            adamw: adamw.clone(),
            decay_tokens: true,
        };
        learner.update(&flat, &update);
        last.push_back(f64::from(loss));
        if last.len() > LAST {
            last.pop_front();
        }
        if step % 100 == 0 {
            println!("step {step}: {loss:.4}");
        }
    }
    last.iter().sum::<f64>() / last.len() as f64
}

/// The engine as it trains.
struct Correct(TorchEngine);

impl Correct {
    fn new(model: &ModelConfig) -> Self {
        let (mean, std) = (vec![0.5; 3], vec![0.25; 3]);
        let setup = EngineSetup {
            model: model.clone(),
            seed: 1,
            mean,
            std,
            slot_batch: BATCH as u32,
            precision: lacuna_spec::Precision::F32,
        };
        Correct(TorchEngine::new(setup).unwrap())
    }
}

impl Learner for Correct {
    fn gradient(&mut self, batch: &SlotBatch, flat: &mut [f32]) -> f32 {
        let layout = self.0.layout().clone();
        self.0
            .slot(batch, &mut |grad| flat[layout.range(grad.block)].copy_from_slice(grad.values))
            .unwrap()
    }

    fn update(&mut self, mean: &[f32], update: &UpdateScalars) {
        self.0.apply(mean, update).unwrap();
    }

    fn numel(&self) -> usize {
        self.0.layout().numel()
    }
}

/// The same model with visible tokens in raster order and the places of the shuffled order.
struct Mistaken {
    model: ModelConfig,
    tables: PosTables,
    state: CpuState,
}

impl Mistaken {
    fn new(model: &ModelConfig) -> Self {
        runtime::pin_threads();
        Mistaken {
            tables: PosTables::new(model, Kind::Float),
            state: CpuState::fresh(Layout::new(model.params()), 1),
            model: model.clone(),
        }
    }
}

impl Learner for Mistaken {
    fn gradient(&mut self, batch: &SlotBatch, flat: &mut [f32]) -> f32 {
        let layout = self.state.layout().clone();
        let weights = Weights::copy_of(&layout, self.state.section(Section::Param)).trainable();
        let (n_patches, len_keep) = (self.model.n_patches(), self.model.len_keep());
        let masks = Masks::from_shuffle(&batch.ids_shuffle, n_patches, len_keep);
        let mixed = Masks { ids_keep_bk: masks.ids_keep_bk.sort(1, false).0, ..masks };
        let mut images: Vec<f32> = vec![0.0; batch.pixels.len()];
        Normalize::new(&[0.5; 3], &[0.25; 3]).apply(&batch.pixels, SIDE * SIDE, &mut images);
        let images = Tensor::from_slice(&images).view([-1, 3, SIDE as i64, SIDE as i64]);
        let mae = Mae::new(&self.model, &self.tables, &weights);
        let loss = mae.loss(&images, &mixed, &Tensor::from_slice(&batch.weights));
        let grads = Tensor::run_backward(&[&loss], weights.tensors(), false, false);
        for (block, grad) in grads.iter().enumerate() {
            let range = layout.range(block);
            grad.contiguous().view(-1).copy_data(&mut flat[range.clone()], range.len());
        }
        loss.double_value(&[]) as f32
    }

    fn update(&mut self, mean: &[f32], update: &UpdateScalars) {
        self.state.apply(mean, update);
    }

    fn numel(&self) -> usize {
        self.state.layout().numel()
    }
}

fn batch(step: u64) -> SlotBatch {
    let samples: Vec<u64> = (0..BATCH).map(|i| (step * BATCH + i) % N_IMAGES).collect();
    let epoch = (step * BATCH / N_IMAGES) as u32;
    let ids = |&s: &u64| MaskOrder::draw(1, epoch, s, (SIDE / 4) * (SIDE / 4)).ids_shuffle;
    SlotBatch {
        slot: Slot { step: Step(step), index: 0 },
        labels: vec![None; samples.len()],
        weights: vec![1.0; samples.len()],
        pixels: samples.iter().flat_map(|&s| image(s)).collect(),
        ids_shuffle: samples.iter().flat_map(ids).collect(),
        samples: samples.into_iter().map(SampleId).collect(),
    }
}

/// Draws a scene: two waves of color that cross the image, a disc that hides them, and some grain.
fn image(sample: u64) -> Vec<u8> {
    let draws = Draws::new(77, Tag::User, 0, sample);
    let u = |i: u32| draws.unit_f32(i);
    let between = |i: u32, low: f32, high: f32| low + (high - low) * u(i);
    let mut out: Vec<u8> = Vec::with_capacity(SIDE * SIDE * 3);
    for y in 0..SIDE {
        for x in 0..SIDE {
            let (fx, fy) = (x as f32 / SIDE as f32, y as f32 / SIDE as f32);
            let wave = |at: u32| {
                let (angle, cycles) = (between(at, 0.0, TAU), between(at + 1, 1.0, 4.0));
                let along = fx * angle.cos() + fy * angle.sin();
                (TAU * (cycles * along + u(at + 2))).sin()
            };
            let (a, b) = (wave(0), wave(3));
            let (dx, dy) = (fx - u(6), fy - u(7));
            let inside = (dx * dx + dy * dy).sqrt() < between(8, 0.1, 0.35);
            for c in 0..3 {
                let base = between(10 + c, 0.2, 0.8);
                let color = if inside { 1.0 - base } else { base };
                let depth = if inside { 0.05 } else { 0.2 };
                let place = (y * SIDE + x) as u32 * 3 + c;
                let grain = (u(100 + place) - 0.5) * 0.15;
                let value = color
                    + depth * (a * between(20 + c, -1.0, 1.0) + b * between(24 + c, -1.0, 1.0))
                    + grain;
                out.push((value.clamp(0.0, 1.0) * 255.0) as u8);
            }
        }
    }
    out
}
