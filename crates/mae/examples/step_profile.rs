//! Where the time of a training step goes on one CPU thread, beside what the machine can do.
//!
//! ```text
//! cargo run --release -p lacuna-mae --example step_profile -- tiny 16
//! ```
//!
//! Prints a Markdown table: the parts of a step, medians of the repetitions; what the step's matrix
//! products take by themselves, one after another with nothing between them; and the rates of a
//! large product and of a copy, which are this machine's limits.

use std::time::Instant;

use anyhow::Context;
use lacuna_mae::mae::{Mae, Masks, PosTables, mask_sizes};
use lacuna_mae::runtime::pin_threads;
use lacuna_mae::weights::Weights;
use lacuna_recipe::adamw::{self, AdamW};
use lacuna_recipe::init;
use lacuna_recipe::mask::MaskOrder;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::reduce::{Reducer, SlotGrad};
use lacuna_recipe::state::Layout;
use lacuna_recipe::step::Normalize;
use tch::{Device, Kind, Tensor};

const REPEATS: usize = 7;
/// Edge of the large product.
const EDGE: i64 = 1536;
/// Values of a copy: far beyond the caches.
const COPY: i64 = 64 << 20;

/// A product of `[m, k]` and `[k, n]`, so many times a step.
struct Product {
    m: i64,
    k: i64,
    n: i64,
    times: u32,
}

fn main() -> anyhow::Result<()> {
    lacuna_mae::runtime::start_again_pinned()?;
    pin_threads();
    let mut words = std::env::args().skip(1);
    let (name, batch) =
        (words.next().unwrap_or("tiny".into()), words.next().unwrap_or("16".into()));
    let model = ModelConfig::preset(&name).with_context(|| format!("find preset `{name}`"))?;
    let batch: usize = batch.parse().context("read the batch")?;

    let parts = parts_of_a_step(&model, batch);
    let step: f64 = parts.iter().map(|(_, ms)| ms).sum();
    println!("| part of a step of `{name}`, batch {batch} | ms | share |");
    println!("|---|---:|---:|");
    for (part, ms) in &parts {
        println!("| {part} | {ms:.1} | {:.1} % |", 100.0 * ms / step);
    }
    println!("| sum | {step:.1} | 100 % |");

    let products = products(&model, batch as i64);
    let alone: f64 = products.iter().map(|p| f64::from(p.times) * time_of(p)).sum();
    let of_products: f64 = products.iter().map(Product::flops).sum();
    let large = Product { m: EDGE, k: EDGE, n: EDGE, times: 1 };
    let peak = large.flops() / time_of(&large) / 1e6;
    let rate = model.train_flops() * batch as f64 / step / 1e6;
    println!("\n| limit of this machine, one thread | |");
    println!("|---|---:|");
    println!("| a product of {EDGE} × {EDGE} × {EDGE} | {peak:.1} GFLOP/s |");
    println!(
        "| the step, by the model's FLOPs | {rate:.1} GFLOP/s, {:.0} % |",
        100.0 * rate / peak
    );
    println!(
        "| the step's linear layers alone, forward and backward | {alone:.1} ms, {:.1} GFLOP/s |",
        of_products / alone / 1e6
    );
    println!("| the same at the rate of the large product | {:.1} ms |", of_products / peak / 1e6);
    println!("| all else in the step | {:.1} ms |", step - alone);
    println!(
        "| a copy of {} MB | {:.1} GB/s read and written |",
        COPY * 4 / 1_000_000,
        copy_rate()
    );
    let n = model.n_params() as f64;
    println!(
        "| bytes that rounding, the mean and AdamW move | {:.0} MB |",
        n * BYTES_A_PARAMETER / 1e6
    );
    Ok(())
}

/// Rounding reads a gradient (4) and changes a sum (16); the mean reads it (8) and writes (4);
/// AdamW reads that (4) and changes a parameter and two moments (24).
const BYTES_A_PARAMETER: f64 = (4 + 16 + 8 + 4 + 4 + 24) as f64;

fn parts_of_a_step(model: &ModelConfig, batch: usize) -> Vec<(&'static str, f64)> {
    let layout = Layout::new(model.params());
    let mut param: Vec<f32> = vec![0.0; layout.numel()];
    for (block, spec) in layout.params().iter().enumerate() {
        init::fill(spec, 0, &mut param[layout.range(block)]);
    }
    let [height, width] = model.img_size.map(|n| n as usize);
    let channels = model.channels as usize;
    let pixels: Vec<u8> =
        (0..batch * channels * height * width).map(|i| (i * 31 % 251) as u8).collect();
    let mut images: Vec<f32> = vec![0.0; pixels.len()];
    let normalize = Normalize::new(&vec![0.45; channels], &vec![0.25; channels]);
    let (len_keep, n_patches) = mask_sizes(model);
    let order = |i: usize| MaskOrder::draw(0, 0, i as u64, n_patches).ids_shuffle;
    let ids: Vec<u32> = (0..batch).flat_map(order).collect();
    let tables = PosTables::new(model, Kind::Float);
    let ones_b = Tensor::ones([batch as i64], (Kind::Float, Device::Cpu));
    let mut reducer = Reducer::new(layout.clone(), 1);
    let mut mean: Vec<f32> = vec![0.0; layout.numel()];
    let mut moments = [mean.clone(), mean.clone()];
    let update = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.05 };
    let update = update.update_f32(1e-4, 1, true);

    let mut times: Vec<[f64; 6]> = Vec::new();
    for _ in 0..REPEATS {
        let mut ms = [0.0; 6];
        let mut lap = Instant::now();
        let mut part = |idx: usize| {
            ms[idx] = lap.elapsed().as_secs_f64() * 1e3;
            lap = Instant::now();
        };
        normalize.apply(&pixels, height * width, &mut images);
        part(0);
        let shape = [batch as i64, channels as i64, height as i64, width as i64];
        let weights = Weights::copy_of(&layout, &param).trainable();
        let images_bchw = Tensor::from_slice(&images).view(shape);
        let masks = Masks::from_shuffle(&ids, n_patches, len_keep);
        let loss = Mae::new(model, &tables, &weights).loss(&images_bchw, &masks, &ones_b);
        part(1);
        let grads = Tensor::run_backward(&[&loss], weights.tensors(), false, false);
        part(2);
        reducer.begin(&vec![30; layout.n_blocks()]);
        for (block, grad) in grads.iter().enumerate() {
            let grad: Vec<f32> = Vec::try_from(grad.reshape(-1)).expect("gradients are f32");
            reducer.add(SlotGrad { block, values: &grad });
        }
        reducer.end_slot(0, loss.double_value(&[]) as f32);
        part(3);
        reducer.finish(1, &mut mean).expect("one rank and one slot");
        part(4);
        let [exp_avg, exp_avg_sq] = &mut moments;
        adamw::apply_f32(&update, &mut param, exp_avg, exp_avg_sq, &mean);
        part(5);
        times.push(ms);
    }
    let names = ["normalise", "forward", "backward", "round to fixed point", "mean", "AdamW"];
    let median = |idx: usize| {
        let mut column: Vec<f64> = times[1..].iter().map(|ms| ms[idx]).collect();
        column.sort_by(f64::total_cmp);
        column[column.len() / 2]
    };
    names.into_iter().enumerate().map(|(idx, name)| (name, median(idx))).collect()
}

impl Product {
    fn flops(&self) -> f64 {
        f64::from(self.times) * 2.0 * (self.m * self.k * self.n) as f64
    }
}

/// Lists the products of linear layers: forward, and for both gradients.
fn products(model: &ModelConfig, b: i64) -> Vec<Product> {
    let mut all: Vec<Product> = Vec::new();
    let mut linear = |m: i64, k: i64, n: i64, times: u32| {
        // x·Wᵀ; dy·W, and dyᵀ·x.
        all.push(Product { m, k, n, times });
        all.push(Product { m, k: n, n: k, times });
        all.push(Product { m: n, k: m, n: k, times });
    };
    let mlp = i64::from(model.mlp_ratio);
    let mut blocks = |tokens: i64, d: i64, depth: u32| {
        for (k, n) in [(d, 3 * d), (d, d), (d, mlp * d), (mlp * d, d)] {
            linear(b * tokens, k, n, depth);
        }
    };
    let (keep, patches) = (model.len_keep() as i64, model.n_patches() as i64);
    let (d, e) = (i64::from(model.width), i64::from(model.decoder_width));
    blocks(1 + keep, d, model.depth);
    blocks(1 + patches, e, model.decoder_depth);
    let p = model.patch_values() as i64;
    linear(b * keep, p, d, 1);
    linear(b * (1 + keep), d, e, 1);
    linear(b * (patches - keep), e, p, 1);
    all
}

/// Returns the milliseconds of a product.
fn time_of(product: &Product) -> f64 {
    let random = |m: i64, n: i64| Tensor::rand([m, n], (Kind::Float, Device::Cpu));
    let (a, b) = (random(product.m, product.k), random(product.k, product.n));
    let out = random(product.m, product.n);
    best_of(|| drop(a.f_matmul_out(&out, &b)))
}

fn copy_rate() -> f64 {
    let from = Tensor::rand([COPY], (Kind::Float, Device::Cpu));
    let mut to = Tensor::zeros([COPY], (Kind::Float, Device::Cpu));
    let ms = best_of(|| to.copy_(&from));
    2.0 * COPY as f64 * 4.0 / ms / 1e6
}

fn best_of(mut act: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        let started = Instant::now();
        act();
        best = best.min(started.elapsed().as_secs_f64() * 1e3);
    }
    best
}
