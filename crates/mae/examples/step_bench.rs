//! Times full exact training steps on one CPU thread: normalise, forward, backward, quantise,
//! reduce (one slot, one rank), AdamW. Synthetic images, so that the step alone is timed.
//!
//! ```text
//! cargo run --release -p lacuna-mae --example step_bench -- --model tiny --batch 16 --steps 20
//! ```
//!
//! Several processes on this machine train together, one slot of `--batch` images each, with
//! `--world 2 --rank 0 --rendezvous FOLDER` (and `--rank 1`): through a folder, empty or not there
//! yet, they learn each other's addresses. `--reduce` takes the words of `train.reduce`.
//!
//! Prints one JSON line. `step_ms` is wall time, `cpu_ms` CPU time of the process, which a busy
//! machine disturbs less; `images_per_s` is from the wall time, over all processes.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use lacuna_collective::{AbortHandle, Collective, Exposure, Group, TcpCollective, TrainerListener};
use lacuna_mae::engine::{EngineSetup, TorchEngine};
use lacuna_mae::runtime::library_version;
use lacuna_recipe::adamw::AdamW;
use lacuna_recipe::mask::MaskOrder;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::philox::{Draws, Tag};
use lacuna_recipe::reduce::{Reduction, Verdict};
use lacuna_recipe::state::Counters;
use lacuna_recipe::step::SlotBatch;
use lacuna_spec::Reduce;
use lacuna_types::{Generation, SampleId, Slot, Step};
use lacuna_worker::engine::{Engine, UpdateScalars};
use lacuna_worker::host_math::HostMath;
use serde_json::{Value, json};

/// Longer than the slowest step here, and than a process takes to start.
const DEADLINE: Duration = Duration::from_secs(300);
/// How often the folder is looked at for the addresses of the others.
const LOOK_EVERY: Duration = Duration::from_millis(10);

struct Args {
    model: String,
    batch: u32,
    steps: usize,
    warmup: usize,
    pin: bool,
    world: u32,
    rank: u32,
    reduction: Reduction,
    rendezvous: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let args = parse(std::env::args().skip(1))?;
    if args.pin {
        lacuna_mae::runtime::start_again_pinned()?;
    }
    let model = ModelConfig::preset(&args.model)
        .with_context(|| format!("find preset `{}`", args.model))?;
    let group = match &args.rendezvous {
        Some(folder) => Some(join(folder, args.world, args.rank)?),
        None => None,
    };
    let start_gib = peak_gib()?;
    let mut bench = Bench::new(model, &args, group)?;
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
    if let Some(group) = &mut bench.group {
        group.barrier(DEADLINE)?;
    }
    let (step_ms, cpu_ms) = (summary(wall), summary(cpu));
    let median = step_ms["median"].as_f64().context("read the median")?;
    let images = f64::from(args.world * args.batch);
    let line = json!({
        "peer": "lacuna", "torch": library_version(), "model": args.model,
        "world": args.world, "rank": args.rank, "batch_per_process": args.batch,
        "precision": "fp32", "compile": false, "threads": 1, "pinned": args.pin,
        "images_per_s": images / median * 1e3, "step_ms": step_ms, "cpu_ms": cpu_ms,
        "peak_gib": peak_gib()?, "start_gib": start_gib, "first_losses": losses,
    });
    println!("{line}");
    Ok(())
}

fn parse(words: impl Iterator<Item = String>) -> anyhow::Result<Args> {
    let mut args = Args {
        model: "tiny".into(),
        batch: 16,
        steps: 10,
        warmup: 2,
        pin: true,
        world: 1,
        rank: 0,
        reduction: Reduction::Exact,
        rendezvous: None,
    };
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
            "--world" => args.world = value.parse().context("read --world")?,
            "--reduce" => args.reduction = reduction(&value)?,
            "--rank" => args.rank = value.parse().context("read --rank")?,
            "--rendezvous" => args.rendezvous = Some(value.into()),
            _ => bail!(
                "unknown flag `{flag}`: --model --batch --steps --warmup --no-pins --world --rank \
                 --rendezvous --reduce"
            ),
        }
    }
    if args.rank >= args.world || (args.world > 1) != args.rendezvous.is_some() {
        bail!("--rank must be below --world, and a --world above 1 needs --rendezvous");
    }
    Ok(args)
}

fn reduction(word: &str) -> anyhow::Result<Reduction> {
    let found = Reduce::ALL.iter().find(|(name, _)| *name == word);
    Ok(found.with_context(|| format!("find the sum `{word}`"))?.1.reduction())
}

/// Joins the other processes: leaves an address in `folder` and waits for theirs.
fn join(folder: &Path, world: u32, rank: u32) -> anyhow::Result<TcpCollective> {
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let listener = TrainerListener::bind(any_port, None, Exposure::Loopback)?;
    std::fs::create_dir_all(folder).context("make the rendezvous folder")?;
    let file = |rank: u32| folder.join(format!("rank-{rank}"));
    let part = folder.join(format!("rank-{rank}.part"));
    std::fs::write(&part, listener.advertised().to_string()).context("write an address")?;
    std::fs::rename(&part, file(rank)).context("leave an address")?;
    let started = Instant::now();
    let mut members: Vec<SocketAddr> = Vec::new();
    for other in 0..world {
        while !file(other).exists() {
            if started.elapsed() > DEADLINE {
                bail!("rank {other} did not come");
            }
            std::thread::sleep(LOOK_EVERY);
        }
        members.push(std::fs::read_to_string(file(other))?.parse().context("read an address")?);
    }
    let (run, rank, generation) = ("bench".parse()?, rank as usize, Generation(1));
    let group = Group { run, generation, rank, members, key: [7; 32] };
    Ok(TcpCollective::connect(&listener, &group, AbortHandle::new(), DEADLINE)?)
}

struct Bench {
    engine: TorchEngine,
    math: HostMath,
    reduction: Reduction,
    counters: Counters,
    batch: SlotBatch,
    n_slots: u32,
    /// The processes that train together, where there are several.
    group: Option<TcpCollective>,
}

impl Bench {
    fn new(model: ModelConfig, args: &Args, group: Option<TcpCollective>) -> anyhow::Result<Self> {
        let (slot_batch, n_slots) = (args.batch, args.world);
        let channels = model.channels as usize;
        let (mean, std) = (vec![0.45; channels], vec![0.25; channels]);
        let batch = synthetic(&model, slot_batch, args.rank);
        let engine = TorchEngine::new(EngineSetup {
            model,
            seed: 0,
            mean,
            std,
            slot_batch,
            precision: lacuna_spec::Precision::F32,
        })?;
        Ok(Bench {
            counters: args.reduction.fresh(engine.layout(), slot_batch * n_slots),
            math: HostMath::new(&engine, args.reduction, n_slots),
            reduction: args.reduction,
            engine,
            batch,
            n_slots,
            group,
        })
    }

    /// Computes and applies one step; returns its loss.
    fn step(&mut self, step: u64) -> anyhow::Result<f64> {
        loop {
            match self.mean_gradient()? {
                Verdict::Redo => {
                    self.reduction.back_off(&mut self.counters, &self.math.overflows())
                }
                Verdict::Skip(_) => bail!("step {step} is not finite"),
                Verdict::Apply(summary) => {
                    let measured = self.reduction.measures_first(&self.counters);
                    self.reduction.advance(&mut self.counters, &summary.max_abs, self.n_slots);
                    if measured {
                        continue;
                    }
                    let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.05 };
                    let update = UpdateScalars { lr: 1e-4, t: step + 1, adamw, decay_tokens: true };
                    self.engine.apply(self.math.mean(), &update)?;
                    return Ok(summary.loss);
                }
            }
        }
    }

    /// Computes this process's slot and the mean gradient over all of them, as a trainer does.
    fn mean_gradient(&mut self) -> anyhow::Result<Verdict> {
        let Bench { engine, math, batch, group, .. } = self;
        math.begin(&self.counters.exponents);
        match group {
            Some(group) => {
                math.last_slot(engine, batch, group, DEADLINE)?;
                math.reduce(group, DEADLINE)?;
            }
            None => drop(math.slot(engine, batch)?),
        }
        Ok(math.finish(self.n_slots as usize)?)
    }
}

/// Makes slot `index` of noise, whose patches are far from constant.
fn synthetic(model: &ModelConfig, slot_batch: u32, index: u32) -> SlotBatch {
    let [height, width] = model.img_size;
    let n_bytes = model.channels * height * width;
    let image = |sample: u64| {
        let draws = Draws::new(0, Tag::User, 0, sample);
        (0..n_bytes.div_ceil(16)).flat_map(move |i| draws.block(i)).flat_map(u32::to_le_bytes)
    };
    let ids = |sample: u64| MaskOrder::draw(0, 0, sample, model.n_patches()).ids_shuffle;
    let first = u64::from(index) * u64::from(slot_batch);
    let samples = first..first + u64::from(slot_batch);
    SlotBatch {
        slot: Slot { step: Step(0), index },
        samples: samples.clone().map(SampleId).collect(),
        labels: vec![None; slot_batch as usize],
        weights: vec![1.0; slot_batch as usize],
        pixels: samples.clone().flat_map(|s| image(s).take(n_bytes as usize)).collect(),
        ids_shuffle: samples.flat_map(ids).collect(),
    }
}

fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Returns the most memory that this process has held.
fn peak_gib() -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status").context("read the status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).context("find VmHWM")?;
    Ok(kib.parse::<f64>().context("read VmHWM")? / f64::from(1 << 20))
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
