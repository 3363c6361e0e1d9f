//! How many images a second the loader delivers on this machine, and what holds it back.

mod bottleneck;
mod report;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use lacuna_data::loader::{BadSamplePolicy, THREADS_MAX, warn_of_bad_samples};
use lacuna_data::pack::{Existing, PackConfig, PackSource, SHARD_BYTES_DEFAULT, pack};
use lacuna_data::planes::{Fill, HAS_PLANES, PlaneCache};
use lacuna_data::stages::{self, StageConfig, Stages};
use lacuna_data::synthetic::SyntheticSpec;
use lacuna_data::{Dataset, ImageShape, Loader, LoaderConfig, is_url};
use lacuna_recipe::augment::Augment;
use lacuna_recipe::order::{OrderParams, OrderSpec};
use lacuna_recipe::step::Geometry;
use lacuna_spec::units::parse_bytes;
use lacuna_types::{Step, exit};

use self::bottleneck::Figures;
use self::report::Results;
use super::talk::{io, put, put_json, usage};
use super::{open, pack_error, parse_size, shape, threads};
use crate::client::Output;
use crate::verbosity::talk;
use lacuna_spec::units::grouped;

/// Images of a slot, as in the presets for small images.
const SLOT_BATCH: u32 = 64;

/// Patches of a common image: 14 by 14.
const N_PATCHES: usize = 196;

/// Slots decoded ahead: enough for every thread of a common machine to have one under way.
const AHEAD_SLOTS: usize = 8;

/// Generated images where no data set is named: more than fit into the slots decoded ahead.
const N_GENERATED: u64 = 4096;

/// A slot that takes longer than this never comes.
const DEADLINE: Duration = Duration::from_secs(60);

/// Part of a measurement's time that each of the loader's parts is measured for: there are up to
/// four of them, and they are steadier than the loader.
const STAGE_PART: f64 = 1.0 / 3.0;

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
    /// How images are cut.
    #[arg(long, value_enum, default_value = "crop-and-flip")]
    augment: Cut,
    /// Threads that decode; several numbers are measured one after another.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    threads: Vec<usize>,
    /// How long the loader is measured with each number of threads; parts of it take a third.
    #[arg(long, value_parser = parse_seconds, default_value = "3")]
    seconds: f64,
    /// Folder for decoded planes of JPEG, as `data.cache.dir`; they stay there.
    #[arg(long, value_name = "DIR", requires = "cache_size")]
    cache: Option<PathBuf>,
    /// Most that the cache of this data may take, as `data.cache.size`.
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE", requires = "cache")]
    cache_size: Option<u64>,
    /// Images a second that a model takes: says how many threads and cores that needs.
    #[arg(long, value_parser = parse_rate, value_name = "N")]
    model_rate: Option<f64>,
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// How images are cut before they are resized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Cut {
    /// A random box, mirrored by chance: what pre-training does.
    CropAndFlip,
    /// The whole image.
    None,
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.01..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("is not a number of seconds from 0.01 to 3600".to_string()),
    }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if (1.0..=1e12).contains(&rate) => Ok(rate),
        _ => Err("is not a number of images a second, from 1 on".to_string()),
    }
}

/// A folder that goes when it is dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: the system clears its folder of temporary files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Measures the loader and its parts.
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
    if folder.to_str().is_some_and(is_url) {
        return Err(usage("`data bench` measures this machine: give a folder, not a URL"));
    }
    let bench = Bench::new(args, Arc::new(open(folder)?), shape)?;
    // The parts first: what they read is not in memory yet, unless somebody else has read it.
    let stages = bench.stages()?;
    let mut runs: Vec<LoaderRun> = Vec::new();
    for &threads in &args.threads {
        runs.push(bench.loader(threads)?);
    }
    let result = Results { args, figures: bench.figures(&stages, &runs), stages, runs };
    match args.output {
        Output::Json => put_json(&result.json())?,
        Output::Table => put(&result.text())?,
    }
    Ok(exit::OK)
}

/// What is measured.
struct Bench<'a> {
    args: &'a BenchArgs,
    dataset: Arc<Dataset>,
    order: OrderSpec,
    shape: ImageShape,
    augment: Augment,
    planes: Option<Arc<PlaneCache>>,
}

/// What the loader gave with a number of threads.
#[derive(Clone, Copy, Debug)]
struct LoaderRun {
    threads: usize,
    /// Images a second.
    rate: f64,
    /// Share of them that came from planes.
    planes_share: f64,
}

impl<'a> Bench<'a> {
    fn new(args: &'a BenchArgs, dataset: Arc<Dataset>, shape: ImageShape) -> anyhow::Result<Self> {
        let n_samples = dataset.n_samples();
        if n_samples < u64::from(SLOT_BATCH) {
            return Err(usage(format!("the data has fewer than {SLOT_BATCH} images")));
        }
        let params = OrderParams::default_for(n_samples, dataset.index().n_chunks(), SLOT_BATCH);
        let order = dataset.order_spec(params, 0, SLOT_BATCH);
        let augment = match args.augment {
            Cut::CropAndFlip => Augment::PRETRAIN,
            Cut::None => Augment::NONE,
        };
        let planes = match (&args.cache, args.cache_size) {
            (Some(dir), Some(bytes)) => {
                let cache = PlaneCache::open(dir, bytes, dataset.clone(), Fill::Always);
                Some(Arc::new(cache.map_err(|error| io(&error))?))
            }
            _ => None,
        };
        Ok(Bench { args, dataset, order, shape, augment, planes })
    }

    fn stages(&self) -> anyhow::Result<Stages> {
        let config = StageConfig {
            dataset: &self.dataset,
            order: &self.order,
            augment: self.augment,
            shape: self.shape,
            planes: self.planes.as_deref(),
            time: Duration::from_secs_f64(self.args.seconds * STAGE_PART),
        };
        stages::measure(&config).map_err(|error| io(&error))
    }

    /// Measures a stream that one consumer empties as fast as it can.
    fn loader(&self, threads: usize) -> anyhow::Result<LoaderRun> {
        let n_samples = self.dataset.n_samples();
        let config = LoaderConfig {
            order: self.order.clone(),
            dataset: self.dataset.clone(),
            augment: self.augment,
            geometry: Geometry { n_samples, batch: SLOT_BATCH, slot_batch: SLOT_BATCH },
            shape: self.shape,
            // Masks cost next to nothing; their size only has to be a common one, and possible.
            n_patches: N_PATCHES.min((self.shape.height * self.shape.width) as usize),
            threads,
            ahead_slots: AHEAD_SLOTS,
            bad_samples: BadSamplePolicy::Substitute,
            on_bad_sample: warn_of_bad_samples(),
            planes: self.planes.clone(),
        };
        let loader = Loader::new(config).map_err(|error| io(&error))?;
        let stream = loader.stream(Step(0), Step(u64::from(u32::MAX)), vec![0]);
        let mut stream = stream.map_err(|error| io(&error))?;
        // The first slot also pays for starting threads and opening files.
        stream.next(DEADLINE).map_err(|error| io(&error))?;
        let crops = || {
            let stats = self.planes.as_ref().map(|cache| cache.stats()).unwrap_or_default();
            (stats.hits, stats.hits + stats.misses)
        };
        let (hits_before, crops_before) = crops();
        let wanted = Duration::from_secs_f64(self.args.seconds);
        let start = Instant::now();
        let mut n: u64 = 0;
        while start.elapsed() < wanted {
            n += stream.next(DEADLINE).map_err(|error| io(&error))?.samples.len() as u64;
        }
        let rate = n as f64 / start.elapsed().as_secs_f64();
        let (hits, crops) = crops();
        let crops = (crops - crops_before).max(1) as f64;
        Ok(LoaderRun { threads, rate, planes_share: (hits - hits_before) as f64 / crops })
    }

    /// Puts together what the naming looks at: the run with the most threads.
    fn figures(&self, stages: &Stages, runs: &[LoaderRun]) -> Figures {
        let most = runs.iter().max_by_key(|run| run.threads).expect("a number of threads");
        Figures {
            read: stages.read.seconds_each(),
            decode: stages.decode.seconds_each(),
            resize: stages.resize.seconds_each(),
            planes: stages.planes.seconds_each(),
            planes_share: if stages.planes.n > 0 { most.planes_share } else { 0.0 },
            threads: most.threads,
            cores: threads(None),
            loader: most.rate,
            may_cache: self.planes.is_none() && HAS_PLANES && 2 * stages.n_jpeg > stages.decode.n,
        }
    }
}

fn generate(out: &Path, shape: ImageShape) -> anyhow::Result<()> {
    let source = PackSource::Synthetic(SyntheticSpec { n_images: N_GENERATED, shape, seed: 0 });
    let config = PackConfig {
        name: "bench".to_string(),
        shard_bytes: SHARD_BYTES_DEFAULT,
        existing: Existing::Replace,
    };
    talk!("generating {} images", grouped(N_GENERATED));
    pack(&source, out, &config, &mut |_| {}).map_err(pack_error)?;
    Ok(())
}
