//! What the loader adds to decoding: the same images in bare loops and through a stream.
//!
//! ```text
//! loader_bench DATA_SET [--threads 2] [--rounds 3] [--seconds 3] [--planes FOLDER]
//! ```
//!
//! Each round runs both, and the next one runs them the other way round. Prints one JSON line:
//! median images a second of both, by wall time and by CPU time of the process, at 224x224 with the
//! crops of pre-training, and of each round the overhead: the CPU time that an image costs through
//! a stream beyond what it costs in a bare loop, as a share of the latter. With `--planes` both
//! read from a cache of planes, which is filled first.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lacuna_data::loader::{BadSamplePolicy, warn_of_bad_samples};
use lacuna_data::planes::{Fill, PlaneCache};
use lacuna_data::{Dataset, ImageShape, Loader, LoaderConfig, SampleReader};
use lacuna_recipe::augment::{Augment, Size};
use lacuna_recipe::order::OrderParams;
use lacuna_recipe::step::Geometry;
use lacuna_types::{SampleId, Step};
use rustix::time::{ClockId, clock_gettime};

const SLOT_BATCH: u32 = 32;
const DEADLINE: Duration = Duration::from_secs(60);
const SHAPE: ImageShape = ImageShape { height: 224, width: 224, channels: 3 };

struct Args {
    folder: PathBuf,
    threads: usize,
    rounds: usize,
    seconds: f64,
    planes: Option<PathBuf>,
}

fn parse() -> Result<Args, Box<dyn Error>> {
    let mut words = std::env::args().skip(1);
    let folder = PathBuf::from(words.next().ok_or("usage: loader_bench DATA_SET")?);
    let mut args = Args { folder, threads: 2, rounds: 3, seconds: 3.0, planes: None };
    while let Some(flag) = words.next() {
        let value = words.next().ok_or_else(|| format!("`{flag}` needs a value"))?;
        match flag.as_str() {
            "--threads" => args.threads = value.parse()?,
            "--rounds" => args.rounds = value.parse()?,
            "--seconds" => args.seconds = value.parse()?,
            "--planes" => args.planes = Some(PathBuf::from(value)),
            _ => return Err(format!("`{flag}` is not known").into()),
        }
    }
    Ok(args)
}

/// Images a second, by wall time and by CPU time.
type Rate = (f64, f64);

fn main() -> Result<(), Box<dyn Error>> {
    let args = parse()?;
    let dataset = Arc::new(Dataset::open(&args.folder)?);
    let planes = match &args.planes {
        Some(folder) => {
            let cache =
                Arc::new(PlaneCache::open(folder, u64::MAX, dataset.clone(), Fill::Always)?);
            bare(&dataset, Some(&cache), 1, f64::INFINITY)?;
            Some(cache)
        }
        None => None,
    };
    let (mut bares, mut streams): (Vec<Rate>, Vec<Rate>) = (Vec::new(), Vec::new());
    for round in 0..args.rounds {
        for is_bare in [round % 2 == 0, round % 2 == 1] {
            if is_bare {
                bares.push(bare(&dataset, planes.as_deref(), args.threads, args.seconds)?);
            } else {
                streams.push(stream(&dataset, planes.clone(), args.threads, args.seconds)?);
            }
        }
    }
    let pairs = bares.iter().zip(&streams);
    let overheads: Vec<String> =
        pairs.map(|(bare, stream)| format!("{:.4}", bare.1 / stream.1 - 1.0)).collect();
    let first_ms = first(&dataset)?;
    let [bare_wall, stream_wall] = [&bares, &streams].map(|all| median(all.iter().map(|r| r.0)));
    let [bare_cpu, stream_cpu] = [&bares, &streams].map(|all| median(all.iter().map(|r| r.1)));
    println!(
        "{{\"threads\": {}, \"bare_per_s\": {bare_wall:.1}, \"stream_per_s\": {stream_wall:.1}, \
         \"bare_per_cpu_s\": {bare_cpu:.1}, \"stream_per_cpu_s\": {stream_cpu:.1}, \
         \"overheads\": [{}], \"resume_to_first_ms\": {first_ms:.1}}}",
        args.threads,
        overheads.join(", ")
    );
    Ok(())
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut all: Vec<f64> = values.collect();
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// CPU time of this process.
fn cpu() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Threads that read, decode and crop one sample after another, and nothing else; with an infinite
/// time, each sample once.
fn bare(
    dataset: &Dataset,
    planes: Option<&PlaneCache>,
    threads: usize,
    seconds: f64,
) -> Result<Rate, Box<dyn Error>> {
    let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let (start, before) = (Instant::now(), cpu());
    let n = dataset.n_samples();
    let work = || -> Result<(), String> {
        let mut reader = SampleReader::new();
        let mut out = vec![0; SHAPE.bytes()];
        while !stop.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if seconds.is_infinite() && at >= n {
                break;
            }
            let (epoch, id) = ((at / n) as u32, SampleId(at * 7919 % n));
            let choose = |size: Size| Augment::PRETRAIN.draw(0, epoch, id.0, size);
            let done = match planes {
                Some(cache) => reader.render_cached(cache, dataset, id, choose, SHAPE, &mut out),
                None => reader.render(dataset, id, choose, SHAPE, &mut out),
            };
            done.map_err(|error| error.to_string())?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        if seconds.is_finite() {
            std::thread::sleep(Duration::from_secs_f64(seconds));
            stop.store(true, Ordering::Relaxed);
        }
        all.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
    })?;
    let done = next.load(Ordering::Relaxed) as f64;
    Ok((done / start.elapsed().as_secs_f64(), done / (cpu() - before)))
}

/// Milliseconds from nothing to the first slot of a step deep in a late epoch.
fn first(dataset: &Arc<Dataset>) -> Result<f64, Box<dyn Error>> {
    let start = Instant::now();
    let opened = Arc::new(Dataset::open(dataset.folder())?);
    let per_epoch = opened.n_samples() / u64::from(SLOT_BATCH);
    let at = Step(per_epoch * 700 + per_epoch / 2);
    let mut stream = loader(&opened, None, 1)?.stream(at, Step(at.0 + 1), vec![0])?;
    stream.next(DEADLINE)?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

fn loader(
    dataset: &Arc<Dataset>,
    planes: Option<Arc<PlaneCache>>,
    threads: usize,
) -> Result<Loader, Box<dyn Error>> {
    let n_samples = dataset.n_samples();
    let geometry = Geometry { n_samples, batch: SLOT_BATCH, slot_batch: SLOT_BATCH };
    let params = OrderParams::default_for(n_samples, dataset.index().n_chunks(), SLOT_BATCH);
    Ok(Loader::new(LoaderConfig {
        order: dataset.order_spec(params, 0, SLOT_BATCH),
        dataset: dataset.clone(),
        augment: Augment::PRETRAIN,
        geometry,
        shape: SHAPE,
        n_patches: 196,
        threads,
        ahead_slots: 8,
        bad_samples: BadSamplePolicy::Substitute,
        on_bad_sample: warn_of_bad_samples(),
        planes,
    })?)
}

/// The loader, emptied as fast as it can.
fn stream(
    dataset: &Arc<Dataset>,
    planes: Option<Arc<PlaneCache>>,
    threads: usize,
    seconds: f64,
) -> Result<Rate, Box<dyn Error>> {
    let loader = loader(dataset, planes, threads)?;
    let mut stream = loader.stream(Step(0), Step(u64::from(u32::MAX)), vec![0])?;
    loader.recycle(stream.next(DEADLINE)?);
    let (start, before) = (Instant::now(), cpu());
    let mut n: u64 = 0;
    while start.elapsed().as_secs_f64() < seconds {
        let batch = stream.next(DEADLINE)?;
        n += batch.samples.len() as u64;
        loader.recycle(batch);
    }
    Ok((n as f64 / start.elapsed().as_secs_f64(), n as f64 / (cpu() - before)))
}
