//! Where the time of a training step goes on one CPU thread, beside what the machine can do.
//!
//! ```text
//! cargo run --release -p lacuna-mae --example step_profile -- tiny 16
//! ```
//!
//! Prints Markdown tables: the parts of a step, medians of the repetitions; the rates of a large
//! product and of a copy, which are this machine's limits; and what each kind of operation takes by
//! itself, forward and backward, beside what its FLOPs or bytes take at those rates.

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

    let (products, others) = alone(&model, batch as i64);
    let of_products: f64 = products.iter().map(Product::flops).sum();
    let ms_of_products: f64 = products.iter().map(|p| f64::from(p.times) * time_of(p)).sum();
    let large = Product { m: EDGE, k: EDGE, n: EDGE, times: 1 };
    let peak = large.flops() / time_of(&large) / 1e6;
    let copy = copy_rate();
    let executed = of_products + others.iter().map(|other| other.flops).sum::<f64>();
    println!("\n| limit of this machine, one thread | |");
    println!("|---|---:|");
    println!("| a product of {EDGE} × {EDGE} × {EDGE} | {peak:.1} GFLOP/s |");
    println!("| a copy of {} MB | {copy:.1} GB/s read and written |", COPY * 4 / 1_000_000);
    println!(
        "| the step, by the operations that it does | {:.1} GFLOP/s, {:.0} % |",
        executed / step / 1e6,
        100.0 * executed / step / 1e6 / peak
    );

    println!("\n| forward and backward, each alone | ms | its limit, ms | by |");
    println!("|---|---:|---:|---|");
    let limit = of_products / peak / 1e6;
    let rate = of_products / ms_of_products / 1e6;
    println!("| linear layers ({rate:.1} GFLOP/s) | {ms_of_products:.1} | {limit:.1} | FLOPs |");
    let mut known = ms_of_products;
    for Other { name, ms, bytes, flops } in &others {
        let (by_bytes, by_flops) = (bytes / copy / 1e6, flops / peak / 1e6);
        let by = if by_flops > by_bytes { "FLOPs" } else { "bytes" };
        println!("| {name} | {ms:.1} | {:.1} | {by} |", by_bytes.max(by_flops));
        known += ms;
    }
    let both: f64 = parts[1].1 + parts[2].1;
    println!("| all else in forward and backward | {:.1} | | |", both - known);
    let n = model.n_params() as f64;
    let moved = n * BYTES_A_PARAMETER;
    let ms: f64 = parts[3..].iter().map(|(_, ms)| ms).sum();
    println!("| rounding, mean, AdamW | {ms:.1} | {:.1} | bytes |", moved / copy / 1e6);
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

/// What is no linear layer: forward and backward of one kind in the whole step.
struct Other {
    name: &'static str,
    ms: f64,
    /// Read and written at least.
    bytes: f64,
    flops: f64,
}

/// Blocks of one width.
struct Stack {
    tokens: i64,
    width: i64,
    blocks: u32,
    heads: i64,
    /// Tokens that the last block computes, where it leaves others out.
    picked: Option<i64>,
}

/// Lists the products of linear layers, forward and for both gradients, and times everything else
/// by itself, once of each kind and shape.
fn alone(model: &ModelConfig, b: i64) -> (Vec<Product>, Vec<Other>) {
    let mut all: Vec<Product> = Vec::new();
    let mut linear = |m: i64, k: i64, n: i64, times: u32, input_has_gradient: bool| {
        // x·Wᵀ; dyᵀ·x, and dy·W.
        all.push(Product { m, k, n, times });
        all.push(Product { m: n, k: m, n: k, times });
        if input_has_gradient {
            all.push(Product { m, k: n, n: k, times });
        }
    };
    let mlp = i64::from(model.mlp_ratio);
    let (keep, patches) = (model.len_keep() as i64, model.n_patches() as i64);
    let (d, e) = (i64::from(model.width), i64::from(model.decoder_width));
    let stacks = [
        Stack {
            tokens: 1 + keep,
            width: d,
            blocks: model.depth,
            heads: i64::from(model.heads),
            picked: None,
        },
        Stack {
            tokens: 1 + patches,
            width: e,
            blocks: model.decoder_depth,
            heads: i64::from(model.decoder_heads),
            picked: Some(patches - keep),
        },
    ];
    let p = model.patch_values() as i64;
    linear(b * keep, p, d, 1, false);
    linear(b * (1 + keep), d, e, 1, true);
    linear(b * (patches - keep), e, p, 1, true);
    for Stack { tokens, width, blocks, picked, .. } in &stacks {
        let (m, w, whole) = (b * tokens, *width, blocks - u32::from(picked.is_some()));
        for (k, n) in [(w, 3 * w), (w, w), (w, mlp * w), (mlp * w, w)] {
            linear(m, k, n, whole, true);
        }
        if let Some(few) = picked.map(|few| b * few) {
            linear(few, w, w, 1, true);
            linear(m, w, 2 * w, 1, true);
            for (k, n) in [(w, w), (w, mlp * w), (mlp * w, w)] {
                linear(few, k, n, 1, true);
            }
        }
    }
    let kinds: [fn(&Stack, i64, i64) -> Other; 4] = [attention, norms, gelu, sums];
    let others = kinds.into_iter().map(|kind| {
        let [a, c] = &stacks;
        let (one, two) = (kind(a, b, mlp), kind(c, b, mlp));
        Other {
            name: one.name,
            ms: one.ms + two.ms,
            bytes: one.bytes + two.bytes,
            flops: one.flops + two.flops,
        }
    });
    (all, others.collect())
}

fn leaf(shape: &[i64]) -> Tensor {
    Tensor::rand(shape, (Kind::Float, Device::Cpu)).set_requires_grad(true)
}

/// Times an operation and its pass back, which a sum starts.
fn there_and_back(leaves: &[&Tensor], of: impl Fn() -> Tensor) -> f64 {
    let sum = || of().sum(Kind::Float);
    best_of(|| drop(Tensor::run_backward(&[&sum()], leaves, false, false)))
}

fn attention(stack: &Stack, b: i64, _mlp: i64) -> Other {
    let Stack { tokens, width, blocks, heads, picked } = *stack;
    let one = |queries: i64| {
        let of = |n: i64| leaf(&[b, heads, n, width / heads]);
        let (q, k, v) = (of(queries), of(tokens), of(tokens));
        let ms = there_and_back(&[&q, &k, &v], || {
            Tensor::scaled_dot_product_attention(
                &q,
                &k,
                &v,
                None::<Tensor>,
                0.0,
                false,
                None,
                false,
            )
        });
        // Two products forward; five back, one of them again.
        (ms, 7.0 * 2.0 * (b * queries * tokens * width) as f64)
    };
    let whole = f64::from(blocks - u32::from(picked.is_some()));
    let (ms, flops) = one(tokens);
    let (last_ms, last_flops) = picked.map_or((0.0, 0.0), one);
    let name = "attention, without its linear layers";
    Other { name, ms: whole * ms + last_ms, bytes: 0.0, flops: whole * flops + last_flops }
}

fn norms(stack: &Stack, b: i64, _mlp: i64) -> Other {
    let Stack { tokens, width, blocks, .. } = *stack;
    let (x, weight, bias) = (leaf(&[b, tokens, width]), leaf(&[width]), leaf(&[width]));
    let ms = there_and_back(&[&x, &weight, &bias], || {
        x.layer_norm([width], Some(&weight), Some(&bias), 1e-6, true)
    });
    let times = f64::from(2 * blocks + 1);
    // Forward reads and writes; back reads two and writes one.
    let bytes = 5.0 * 4.0 * (b * tokens * width) as f64;
    Other { name: "layer norms", ms: times * ms, bytes: times * bytes, flops: 0.0 }
}

fn gelu(stack: &Stack, b: i64, mlp: i64) -> Other {
    let Stack { tokens, width, blocks, picked, .. } = *stack;
    let x = leaf(&[b, tokens, mlp * width]);
    let ms = there_and_back(&[&x], || x.gelu("none"));
    let last = picked.map_or(0.0, |few| few as f64 / tokens as f64 - 1.0);
    let times = f64::from(blocks) + last;
    let bytes = 5.0 * 4.0 * (b * tokens * mlp * width) as f64;
    Other { name: "GELU", ms: times * ms, bytes: times * bytes, flops: 0.0 }
}

/// Residual sums and those of their gradients, and joining the gradients of q, k and v.
fn sums(stack: &Stack, b: i64, _mlp: i64) -> Other {
    let Stack { tokens, width, blocks, .. } = *stack;
    let [x, y, z] = [(); 3].map(|()| leaf(&[b, tokens, width]).detach());
    let add = best_of(|| drop(&x + &y));
    let join = best_of(|| drop(Tensor::cat(&[&x, &y, &z], -1)));
    let times = f64::from(blocks);
    let n = 4.0 * (b * tokens * width) as f64;
    Other {
        name: "residual sums, joined gradients of q, k, v",
        ms: times * (4.0 * add + join),
        bytes: times * (4.0 * 3.0 + 6.0) * n,
        flops: 0.0,
    }
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
