//! `lacuna-worker gpu-bench`: how long whole training steps take on a device.
//!
//! A step here is a trainer's: images go to the device as bytes, slots are computed and summed, the
//! sums of one rank are read back, and the update is applied. Images are made up and in memory, so
//! that the step alone is timed. A case that cannot run says why, and the others run all the same.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use lacuna_collective::{AbortHandle, Exposure, Group, TcpCollective, TrainerListener};
use lacuna_mae::context::{self, Kernels};
use lacuna_mae::engine::DevicePlace;
use lacuna_mae::runtime;
use lacuna_mae::worker::TorchBackend;
use lacuna_recipe::adamw::AdamW;
use lacuna_recipe::digest::hex;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::reduce::{Reduction, Verdict};
use lacuna_recipe::state::{Counters, state_digest};
use lacuna_recipe::step::SlotBatch;
use lacuna_spec::{Precision, Reduce};
use lacuna_types::{Generation, exit};
use lacuna_worker::engine::{Backend, Engine, EngineSpec, UpdateScalars};
use lacuna_worker::entry::CodedError;
use lacuna_worker::fake::probe_batch;
use lacuna_worker::step_math::StepMath;
use serde_json::{Value, json};
use tch::Device;

use crate::gpu_check::device::OnDevice;

/// `lacuna-worker gpu-bench`.
#[derive(Args, Debug)]
pub struct GpuBenchArgs {
    /// Steps of one kind: MODEL:IMAGES:SLOTS:PRECISION:REDUCE, as base:128:4:bf16:exact, with :free
    /// behind it where libtorch may choose kernels that do not repeat themselves. Several times for
    /// several kinds.
    #[arg(long = "case", required = true)]
    cases: Vec<Case>,
    /// Device to compute on, cuda0 or cpu0.
    #[arg(long, default_value = "cuda0")]
    device: String,
    /// Timed steps of a case in a round, after those that warm up.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    steps: u32,
    /// Steps before the timed ones.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    warmup: u32,
    /// Times that every case is run from its start; all of them must give the same bits.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// A driver that stands for a device's on the CPU, for tests.
    #[arg(long, hide = true)]
    cuda_library: Option<PathBuf>,
}

/// Steps of one kind.
#[derive(Clone, Debug)]
struct Case {
    text: String,
    model: ModelConfig,
    slot_batch: u32,
    n_slots: u32,
    precision: Precision,
    reduction: Reduction,
    /// Whether only kernels run that give the same bits each time.
    is_exact: bool,
}

/// Most images of a slot, and slots of a step.
const PARTS_MAX: u32 = 4096;

impl FromStr for Case {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (parts, is_exact) = match text.strip_suffix(":free") {
            Some(parts) => (parts, false),
            None => (text, true),
        };
        let parts: Vec<&str> = parts.split(':').collect();
        let [model, images, slots, precision, reduce] = parts[..] else {
            bail!("a case is MODEL:IMAGES:SLOTS:PRECISION:REDUCE, as base:128:4:bf16:exact");
        };
        let number = |word: &str| -> anyhow::Result<u32> {
            let n = word.parse().ok().filter(|n| (1..=PARTS_MAX).contains(n));
            n.with_context(|| format!("`{word}` must be a number from 1 to {PARTS_MAX}"))
        };
        let word = |words: &[(&str, usize)], given: &str, what: &str| -> anyhow::Result<usize> {
            let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            let found = words.iter().find(|(word, _)| *word == given);
            found
                .map(|(_, i)| *i)
                .with_context(|| format!("no {what} is called `{given}`: {}", known.join(", ")))
        };
        let numbered = |words: Vec<&'static str>| -> Vec<(&'static str, usize)> {
            words.into_iter().enumerate().map(|(i, word)| (word, i)).collect()
        };
        let precisions = numbered(Precision::ALL.iter().map(|(word, _)| *word).collect());
        let sums = numbered(Reduce::ALL.iter().map(|(word, _)| *word).collect());
        Ok(Case {
            text: text.to_string(),
            model: ModelConfig::preset(model)
                .with_context(|| format!("no preset is named `{model}`"))?,
            slot_batch: number(images)?,
            n_slots: number(slots)?,
            precision: Precision::ALL[word(&precisions, precision, "precision")?].1,
            is_exact,
            reduction: Reduce::ALL[word(&sums, reduce, "sum")?].1.reduction(),
        })
    }
}

/// What came of a case.
#[derive(Debug, Default)]
struct Found {
    step_ms: Vec<f64>,
    digests: Vec<String>,
    losses: Vec<f64>,
    peak_flops: Option<f64>,
    device_memory: Option<u64>,
    engine: String,
    error: Option<String>,
}

/// Times every case, and prints a line of JSON for each.
pub fn run(args: &GpuBenchArgs) -> anyhow::Result<u8> {
    runtime::pin_threads();
    let backend = backend(args)?;
    let mut code = exit::OK;
    for (idx, case) in args.cases.iter().enumerate() {
        let mut found = Found::default();
        for round in 0..args.rounds {
            if found.error.is_some() {
                break;
            }
            // What libtorch refuses, it says by a panic.
            let tried = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                // Later ones find memory that libtorch keeps of those before.
                let is_first = idx == 0 && round == 0;
                time(case, args, backend.as_ref(), is_first, &mut found)
            }));
            match tried {
                Ok(Ok(())) => {}
                Ok(Err(error)) => found.error = Some(format!("{error:#}")),
                Err(_) => found.error = Some("libtorch refused it, see above".to_string()),
            }
        }
        // Float sums of one rank have one order too.
        let same = |first: &String| found.digests.iter().all(|digest| digest == first);
        let repeats = found.digests.first().map(same);
        if found.error.is_some() || (case.is_exact && repeats == Some(false)) {
            code = exit::FAILED;
        }
        // At once: whoever ends this early has what was measured until then.
        println!("{}", line(case, args, &found, repeats));
    }
    Ok(code)
}

fn backend(args: &GpuBenchArgs) -> anyhow::Result<Box<dyn Backend>> {
    if let Some(library) = &args.cuda_library {
        let (driver, compiler) = (Some(library.clone()), Some(library.clone()));
        let place = DevicePlace { device: Device::Cpu, ordinal: 0, driver, compiler, n_slots: 1 };
        return Ok(Box::new(OnDevice { place }));
    }
    let backend = TorchBackend::default();
    backend.prepare(&args.device).map_err(|err| CodedError {
        code: exit::UNFIT,
        message: format!("gpu-bench: {}", lacuna_checkpoint::chain(&err)),
    })?;
    Ok(Box::new(backend))
}

/// Trains a case from its first step on, and adds what that took.
fn time(
    case: &Case,
    args: &GpuBenchArgs,
    backend: &dyn Backend,
    is_first: bool,
    found: &mut Found,
) -> anyhow::Result<()> {
    let channels = case.model.channels as usize;
    let mut engine = backend.engine(&EngineSpec {
        model: case.model.clone(),
        seed: 0,
        mean: vec![0.45; channels],
        std: vec![0.25; channels],
        slot_batch: case.slot_batch,
        n_slots: case.n_slots,
        precision: case.precision,
        device: args.device.clone(),
        task: None,
    })?;
    if found.engine.is_empty() {
        found.engine = engine.describe();
        found.peak_flops = engine.yardstick()?.map(|yardstick| yardstick.peak);
    }
    let tf32 = case.precision == Precision::Tf32;
    context::set_kernels(Kernels { deterministic: case.is_exact, tf32 })?;
    let mut training = Training::new(case, engine.as_mut())?;
    for step in 0..args.warmup + args.steps {
        let began = Instant::now();
        let loss = training.step(engine.as_mut(), u64::from(step))?;
        if step >= args.warmup {
            found.step_ms.push(began.elapsed().as_secs_f64() * 1e3);
        }
        if found.digests.is_empty() && step < 3 {
            found.losses.push(loss);
        }
    }
    if is_first {
        found.device_memory = engine.device_memory();
    }
    let digest = state_digest(&engine.tensor_digests()?, &training.counters);
    found.digests.push(hex(digest));
    Ok(())
}

/// Longer than any step.
const DEADLINE: Duration = Duration::from_secs(300);

/// A group of one, and what it trains on.
struct Training {
    math: StepMath,
    reduction: Reduction,
    counters: Counters,
    slots: Vec<SlotBatch>,
    alone: TcpCollective,
}

impl Training {
    fn new(case: &Case, engine: &mut dyn Engine) -> anyhow::Result<Self> {
        let any_port = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = TrainerListener::bind(any_port, None, Exposure::Loopback)?;
        let (run, members) = ("bench".parse()?, vec![listener.advertised()]);
        let group = Group { run, generation: Generation(1), rank: 0, members, key: [7; 32] };
        Ok(Training {
            math: StepMath::new(engine, case.reduction, case.n_slots),
            reduction: case.reduction,
            counters: case.reduction.fresh(engine.layout(), case.slot_batch * case.n_slots),
            slots: (0..case.n_slots).map(|index| made_up(case, index)).collect(),
            alone: TcpCollective::connect(&listener, &group, AbortHandle::new(), DEADLINE)?,
        })
    }

    /// Computes and applies one step; returns its loss.
    fn step(&mut self, engine: &mut dyn Engine, step: u64) -> anyhow::Result<f64> {
        loop {
            self.math.begin(engine, &self.counters.exponents)?;
            for slot in &self.slots {
                self.math.slot(engine, slot)?;
            }
            self.math.reduce(engine, &mut self.alone, DEADLINE)?;
            match self.math.finish(engine, 1)? {
                Verdict::Redo => {
                    self.reduction.back_off(&mut self.counters, &self.math.overflows())
                }
                Verdict::Skip(_) => bail!("step {step} is not finite"),
                Verdict::Apply(summary) => {
                    let measured = self.reduction.measures_first(&self.counters);
                    let n_slots = self.slots.len() as u32;
                    self.reduction.advance(&mut self.counters, &summary.max_abs, n_slots);
                    if measured {
                        continue;
                    }
                    let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.05 };
                    let update = UpdateScalars { lr: 1e-4, t: step + 1, adamw, decay_tokens: true };
                    self.math.apply(engine, &update)?;
                    ensure!(summary.loss.is_finite(), "the loss of step {step} is not finite");
                    return Ok(summary.loss);
                }
            }
        }
    }
}

/// Makes slot `index`; what it shows is no matter.
fn made_up(case: &Case, index: u32) -> SlotBatch {
    let mut batch = probe_batch(&case.model, case.slot_batch);
    batch.slot.index = index;
    batch
}

/// Writes what a case gave, as people compare it.
fn line(case: &Case, args: &GpuBenchArgs, found: &Found, repeats: Option<bool>) -> Value {
    let mut ms = found.step_ms.clone();
    ms.sort_by(f64::total_cmp);
    let tenth = ms.len() / 10;
    let median = (!ms.is_empty()).then(|| (ms[(ms.len() - 1) / 2] + ms[ms.len() / 2]) / 2.0);
    let images = f64::from(case.slot_batch * case.n_slots);
    let rate = median.map(|median| images / median * 1e3);
    let mfu = rate.zip(found.peak_flops).map(|(rate, peak)| rate * case.model.train_flops() / peak);
    let mut said = case.text.clone();
    if let (Some(median), Some(rate)) = (median, rate) {
        let _ = write!(said, "  {median:.2} ms a step, {rate:.1} images/s");
    }
    eprintln!("{said}{}", found.error.as_ref().map_or(String::new(), |why| format!("  {why}")));
    json!({
        "peer": "lacuna",
        "torch": runtime::library_version(),
        "engine": found.engine,
        "case": case.text,
        "images_a_step": images,
        "slots": case.n_slots,
        "steps": args.steps,
        "rounds": args.rounds,
        "step_ms": median.map(|median| json!({
            "median": median, "p10": ms[tenth], "p90": ms[ms.len() - 1 - tenth],
        })),
        "images_per_s": rate,
        "flops_per_image": case.model.train_flops(),
        "peak_flops": found.peak_flops,
        "mfu": mfu,
        "device_memory": found.device_memory,
        "digests": found.digests,
        "kernels": if case.is_exact { "exact" } else { "free" },
        "repeats": repeats,
        "first_losses": found.losses,
        "error": found.error,
    })
}
