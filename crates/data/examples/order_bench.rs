//! Times the order of an epoch on a very large data set: set-up, memory, and one look-up.
//!
//! ```text
//! cargo run --release -p lacuna-data --example order_bench [-- SAMPLES CHUNKS]   # 10^9, 4·10^6
//! ```

use std::error::Error;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use lacuna_recipe::order::{EpochOrder, OrderMode, OrderParams, OrderSpec};

const LOOK_UPS: u64 = 4_000_000;
const BATCH: u32 = 4096;

/// Resident memory in MB.
fn resident() -> Result<f64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).ok_or("no VmRSS")?;
    let kib: f64 = line.split_whitespace().nth(1).ok_or("no number")?.parse()?;
    Ok(kib * 1024.0 / 1e6)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let n: u64 = args.next().map_or(Ok(1_000_000_000), |text| text.parse())?;
    let chunks: u64 = args.next().map_or(Ok(4_000_000), |text| text.parse())?;
    println!("{n} samples in {chunks} chunks, batch {BATCH}");
    println!("| order | set-up, ms | memory, MB | look-up in a row, ns | look-up anywhere, ns |");
    println!("|---|---:|---:|---:|---:|");
    for mode in [OrderMode::Block, OrderMode::Global, OrderMode::Sequential] {
        let before = resident()?;
        // Chunks of nearly equal size.
        let bounds: Arc<[u64]> = (0..=chunks)
            .map(|c| (u128::from(n) * u128::from(c) / u128::from(chunks)) as u64)
            .collect();
        let block = (1 << 18) / 256;
        let params = OrderParams { mode, lanes: 256, block };
        let spec = OrderSpec { params, seed: 1, batch: BATCH, chunk_bounds: bounds };
        let start = Instant::now();
        let order = EpochOrder::new(&spec, 3);
        let setup = start.elapsed().as_secs_f64() * 1e3;
        let memory = resident()? - before;
        let start = Instant::now();
        for slot in 0..LOOK_UPS / 128 {
            black_box(order.samples(slot * 128..(slot + 1) * 128));
        }
        let in_a_row = start.elapsed().as_nanos() as f64 / (LOOK_UPS / 128 * 128) as f64;
        let start = Instant::now();
        let mut at: u64 = 12_345;
        for _ in 0..LOOK_UPS / 8 {
            at = (at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_041)) % n;
            black_box(order.sample_at(at));
        }
        let anywhere = start.elapsed().as_nanos() as f64 / (LOOK_UPS / 8) as f64;
        println!("| {mode:?} | {setup:.0} | {memory:.0} | {in_a_row:.0} | {anywhere:.0} |");
    }
    Ok(())
}
