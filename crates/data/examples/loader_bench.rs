//! Measures how many images a second the loader delivers on this machine.
//!
//! ```text
//! cargo run --release -p lacuna-data --example loader_bench              # 28x28, generated
//! cargo run --release -p lacuna-data --example loader_bench -- DIR 224 3 # a packed data set
//! ```

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lacuna_data::loader::{BadSamplePolicy, warn_of_bad_samples};
use lacuna_data::pack::{Existing, PackConfig, PackSource, SHARD_BYTES_DEFAULT, pack};
use lacuna_data::synthetic::SyntheticSpec;
use lacuna_data::{Dataset, ImageShape, Loader, LoaderConfig};
use lacuna_recipe::augment::Augment;
use lacuna_recipe::order::OrderParams;
use lacuna_recipe::step::Geometry;
use lacuna_types::Step;

const SLOT_BATCH: u32 = 64;
const DEADLINE: Duration = Duration::from_secs(60);
const MEASURE: Duration = Duration::from_secs(3);

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let side: u32 = args.get(1).map_or(Ok(28), |text| text.parse())?;
    let channels: u32 = args.get(2).map_or(Ok(1), |text| text.parse())?;
    let shape = ImageShape { height: side, width: side, channels };
    let scratch: PathBuf =
        std::env::temp_dir().join(format!("lacuna-loader-bench-{}", std::process::id()));
    let folder = match args.first() {
        Some(folder) => PathBuf::from(folder),
        None => {
            generate(&scratch, shape)?;
            scratch.clone()
        }
    };
    let dataset = Arc::new(Dataset::open(&folder)?);
    println!("{} images, {shape:?}", dataset.n_samples());
    let none = Augment::NONE;
    for (name, augment) in [("no augmentation", none), ("crop and flip", Augment::PRETRAIN)] {
        for threads in [1, 2] {
            let rate = measure(&dataset, shape, augment, threads)?;
            println!("{name:>16}, {threads} threads: {rate:9.0} images/s");
        }
    }
    if args.is_empty() {
        std::fs::remove_dir_all(&scratch)?;
    }
    Ok(())
}

fn generate(out: &Path, shape: ImageShape) -> Result<(), Box<dyn Error>> {
    let source = PackSource::Synthetic(SyntheticSpec { n_images: 8192, shape, seed: 0 });
    let config = PackConfig {
        name: "bench".to_string(),
        shard_bytes: SHARD_BYTES_DEFAULT,
        existing: Existing::Replace,
    };
    pack(&source, out, &config, &mut |_| {})?;
    Ok(())
}

fn measure(
    dataset: &Arc<Dataset>,
    shape: ImageShape,
    augment: Augment,
    threads: usize,
) -> Result<f64, Box<dyn Error>> {
    let n_samples = dataset.n_samples();
    let geometry = Geometry { n_samples, batch: SLOT_BATCH, slot_batch: SLOT_BATCH };
    let params = OrderParams::default_for(n_samples, dataset.index().n_chunks(), SLOT_BATCH);
    let loader = Loader::new(LoaderConfig {
        order: dataset.order_spec(params, 0, SLOT_BATCH),
        dataset: dataset.clone(),
        augment,
        geometry,
        shape,
        n_patches: 49,
        threads,
        ahead_slots: 8,
        bad_samples: BadSamplePolicy::Substitute,
        on_bad_sample: warn_of_bad_samples(),
    })?;
    let mut stream = loader.stream(Step(0), Step(u64::from(u32::MAX)), vec![0])?;
    stream.next(DEADLINE)?;
    let start = Instant::now();
    let mut n: u64 = 0;
    while start.elapsed() < MEASURE {
        n += stream.next(DEADLINE)?.samples.len() as u64;
    }
    Ok(n as f64 / start.elapsed().as_secs_f64())
}
