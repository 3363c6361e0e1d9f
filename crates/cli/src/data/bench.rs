//! How many images a second the loader delivers on this machine.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use lacuna_data::loader::{BadSamplePolicy, THREADS_MAX, warn_of_bad_samples};
use lacuna_data::pack::{Existing, PackConfig, PackSource, SHARD_BYTES_DEFAULT, pack};
use lacuna_data::synthetic::SyntheticSpec;
use lacuna_data::{Dataset, ImageShape, Loader, LoaderConfig};
use lacuna_recipe::augment::Augment;
use lacuna_recipe::order::OrderParams;
use lacuna_recipe::step::Geometry;
use lacuna_types::{Step, exit};
use serde_json::json;

use super::talk::{io, put, put_json, usage};
use super::{open, pack_error, parse_size, shape};
use crate::client::Output;
use crate::progress::grouped;

/// Images of a slot, as in the presets for small images.
const SLOT_BATCH: u32 = 64;

/// Slots decoded ahead: enough for every thread of a common machine to have one under way.
const AHEAD_SLOTS: usize = 8;

/// Generated images where no data set is named: more than fit into the slots decoded ahead.
const N_GENERATED: u64 = 4096;

/// A slot that takes longer than this never comes.
const DEADLINE: Duration = Duration::from_secs(60);

/// `lacuna data bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Folder of a data set [default: generated images].
    dir: Option<PathBuf>,
    /// Height and width of the images that a model would take.
    #[arg(long, value_parser = parse_size, default_value = "28x28", value_name = "HxW")]
    size: [u32; 2],
    /// 1 (grey) or 3 (colour).
    #[arg(long, default_value_t = 1)]
    channels: u32,
    /// Threads that decode; several numbers are measured one after another.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    threads: Vec<usize>,
    /// How long each measurement takes.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// A folder that goes when it is dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: the system clears its folder of temporary files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Measures the loader.
pub(super) fn bench(args: &BenchArgs) -> anyhow::Result<u8> {
    let shape = shape(args.size, args.channels)?;
    if args.threads.is_empty() || !args.threads.iter().all(|n| (1..=THREADS_MAX).contains(n)) {
        return Err(usage(format!("`--threads` must be from 1 to {THREADS_MAX}")));
    }
    let mut scratch: Option<Scratch> = None;
    let folder: &Path = match &args.dir {
        Some(dir) => dir,
        None => {
            let name = format!("lacuna-bench-{}", std::process::id());
            let made = scratch.insert(Scratch(std::env::temp_dir().join(name)));
            generate(&made.0, shape)?;
            &made.0
        }
    };
    let dataset = Arc::new(open(folder)?);
    if dataset.n_samples() < u64::from(SLOT_BATCH) {
        return Err(usage(format!("the data has fewer than {SLOT_BATCH} images")));
    }
    let mut results: Vec<(&str, usize, f64)> = Vec::new();
    for (name, augment) in [("none", Augment::NONE), ("crop and flip", Augment::PRETRAIN)] {
        for &threads in &args.threads {
            let wanted = Duration::from_secs(args.seconds.max(1));
            results.push((name, threads, measure(&dataset, shape, augment, threads, wanted)?));
        }
    }
    match args.output {
        Output::Json => {
            let row = |(name, threads, rate): &(&str, usize, f64)| {
                let rate = *rate;
                json!({ "augment": name, "threads": threads, "images_per_second": rate })
            };
            put_json(&results.iter().map(row).collect())?;
        }
        Output::Table => {
            let mut text = format!("{:<14} {:>7} {:>12}\n", "AUGMENT", "THREADS", "IMAGES/S");
            for (name, threads, rate) in results {
                text += &format!("{name:<14} {threads:>7} {:>12}\n", grouped(rate as u64));
            }
            put(&text)?;
        }
    }
    Ok(exit::OK)
}

fn generate(out: &Path, shape: ImageShape) -> anyhow::Result<()> {
    let source = PackSource::Synthetic(SyntheticSpec { n_images: N_GENERATED, shape, seed: 0 });
    let config = PackConfig {
        name: "bench".to_string(),
        shard_bytes: SHARD_BYTES_DEFAULT,
        existing: Existing::Replace,
    };
    eprintln!("generating {} images", grouped(N_GENERATED));
    pack(&source, out, &config, &mut |_| {}).map_err(pack_error)?;
    Ok(())
}

/// Returns images a second of a stream that one consumer empties as fast as it can.
fn measure(
    dataset: &Arc<Dataset>,
    shape: ImageShape,
    augment: Augment,
    threads: usize,
    wanted: Duration,
) -> anyhow::Result<f64> {
    let n_samples = dataset.n_samples();
    let params = OrderParams::default_for(n_samples, dataset.index().n_chunks(), SLOT_BATCH);
    let config = LoaderConfig {
        order: dataset.order_spec(params, 0, SLOT_BATCH),
        dataset: dataset.clone(),
        augment,
        geometry: Geometry { n_samples, batch: SLOT_BATCH, slot_batch: SLOT_BATCH },
        shape,
        // Masks cost next to nothing; their size only has to be a common one.
        n_patches: 196,
        threads,
        ahead_slots: AHEAD_SLOTS,
        bad_samples: BadSamplePolicy::Substitute,
        on_bad_sample: warn_of_bad_samples(),
        planes: None,
    };
    let loader = Loader::new(config).map_err(|error| io(&error))?;
    let stream = loader.stream(Step(0), Step(u64::from(u32::MAX)), vec![0]);
    let mut stream = stream.map_err(|error| io(&error))?;
    // The first slot also pays for starting threads and opening files.
    stream.next(DEADLINE).map_err(|error| io(&error))?;
    let start = Instant::now();
    let mut n: u64 = 0;
    while start.elapsed() < wanted {
        n += stream.next(DEADLINE).map_err(|error| io(&error))?.samples.len() as u64;
    }
    Ok(n as f64 / start.elapsed().as_secs_f64())
}
