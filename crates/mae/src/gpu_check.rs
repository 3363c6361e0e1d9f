//! `lacuna-worker gpu-check`: is this device right, does it repeat itself, and how fast is it?
//!
//! Writes one JSON file. Every item in it has a name, what was seen and whether it passed; an item
//! that cannot run has failed, and the others run all the same.

pub mod device;
mod golden;
pub mod nccl;
mod slots;

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, anyhow, bail};
use clap::{Args, ValueEnum};
use lacuna_cuda::DeviceInfo;
use lacuna_mae::context::{self, EXACT, Kernels};
use lacuna_mae::cuda::{self, CudaLibrary};
use lacuna_mae::engine::DevicePlace;
use lacuna_mae::runtime;
use lacuna_recipe::model::ModelConfig;
use lacuna_spec::Precision;
use lacuna_types::{BuildId, exit};
use lacuna_worker::args::TransportArgs;
use lacuna_worker::entry::CodedError;
use serde_json::{Value, json};
use tch::{Device, Kind};

use self::golden::{Comparison, Golden};
use self::slots::Slots;

/// `lacuna-worker gpu-check`.
#[derive(Args, Debug)]
pub struct GpuCheckArgs {
    /// Folder with the golden values of the model.
    #[arg(long)]
    golden: PathBuf,
    /// Where the JSON goes.
    #[arg(long)]
    out: PathBuf,
    /// What to check; the first device where there are several.
    #[arg(long, value_enum, default_value_t = Target::Cuda)]
    device: Target,
    /// Preset whose slots are repeated and timed.
    #[arg(long, default_value = "base")]
    model: String,
    /// Images of the timed slots; the first number is that of the repeated ones too.
    #[arg(long, value_delimiter = ',', default_value = "64,128", value_parser = images())]
    images: Vec<u32>,
    /// How to reach NCCL and the driver; checked where there is a GPU or libraries are named.
    #[command(flatten)]
    transport: TransportArgs,
    /// Timed slots, after the ones that warm up.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    slots: u32,
}

/// Kinds of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    Cuda,
    Cpu,
}

/// Most images of a slot here: the index of a value of its images stays below 2^31.
const IMAGES_MAX: i64 = 4096;

fn images() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=IMAGES_MAX)
}

/// Images of the small slots that are repeated besides the model's.
const MICRO_IMAGES: u32 = 8;

/// One thing that was checked.
#[derive(Debug)]
struct Item {
    name: String,
    passed: bool,
    /// What was seen, as people read it.
    text: String,
    /// The same for programs: fields beside `name`, `passed` and `text`.
    detail: Value,
}

/// What was checked so far.
#[derive(Debug, Default)]
struct Report {
    items: Vec<Item>,
    throughput: Vec<Value>,
    /// Whether everything was tried: a process that is ended early has passed nothing.
    complete: bool,
}

/// Checks the device and writes the file.
pub fn run(args: &GpuCheckArgs) -> anyhow::Result<u8> {
    let model = ModelConfig::preset(&args.model)
        .with_context(|| format!("no preset is named `{}`", args.model))?;
    runtime::pin_threads();
    let opened = match args.device {
        Target::Cpu => Ok((Device::Cpu, Value::Null)),
        Target::Cuda => cuda::load().map(|library| (Device::Cuda(0), describe(&library))),
    };
    let (device, cuda) = match opened {
        Ok(opened) => opened,
        Err(err) => {
            write(args, &Report::default(), &Value::Null, Some(&err.to_string()))?;
            let coded = CodedError { code: exit::UNFIT, message: format!("gpu-check: {err}") };
            return Err(coded.into());
        }
    };
    let golden = Golden::open(&args.golden, device)?;
    context::set_kernels(EXACT)?;

    let mut report = Report::default();
    report.golden(&golden);
    let micro = ModelConfig::preset("micro").context("no preset is named `micro`")?;
    report.repeats("micro", &micro, MICRO_IMAGES, device);
    let repeated = args.images.first().context("`--images` names no number")?;
    report.repeats(&args.model, &model, *repeated, device);
    let keep = |report: &Report| write(args, report, &cuda, None);
    keep(&report)?;
    for &images in &args.images {
        report.throughput(args, &model, images, device, EXACT);
        report.throughput(args, &model, images, device, Kernels { deterministic: false, ..EXACT });
    }
    // Last, because a kernel's wild access ends all that a process can do with its device. Written
    // after each item: what hangs is ended from outside.
    keep(&report)?;
    report.device(args, device, &keep)?;
    report.complete = true;
    keep(&report)?;
    let failed = report.items.iter().filter(|item| !item.passed).count();
    println!(
        "gpu-check: {} of {} items passed, {}",
        report.items.len() - failed,
        report.items.len(),
        args.out.display()
    );
    Ok(if failed == 0 { exit::OK } else { exit::FAILED })
}

impl Report {
    /// Adds an item and prints it.
    fn add(&mut self, name: String, result: anyhow::Result<(bool, String, Value)>) {
        let (passed, text, detail) = result.unwrap_or_else(|err| {
            (false, format!("did not run: {err:#}"), json!({ "error": format!("{err:#}") }))
        });
        println!("{}  {name}  {text}", if passed { "passed" } else { "FAILED" });
        self.items.push(Item { name, passed, text, detail });
    }

    /// The model against the golden values, and in lower precision near them.
    fn golden(&mut self, golden: &Golden) {
        for (word, precision) in [("bf16", Precision::Bf16), ("tf32", Precision::Tf32)] {
            let prefix = format!("golden.mid.{word}");
            self.compared(&prefix, attempt(|| golden.compare_lower(precision)));
        }
        for tag in golden::TAGS {
            for kind in [Kind::Float, Kind::Double] {
                let prefix = format!("golden.{tag}.{}", golden::kind_name(kind));
                self.compared(&prefix, attempt(|| golden.compare(tag, kind)));
            }
        }
    }

    /// Adds an item for each quantity.
    fn compared(&mut self, prefix: &str, seen: anyhow::Result<Vec<Comparison>>) {
        let comparisons = match seen {
            Ok(comparisons) => comparisons,
            Err(err) => return self.add(prefix.to_string(), Err(err)),
        };
        for seen in comparisons {
            let (off, most) = (seen.off, seen.tolerance);
            // A NaN is not below the tolerance.
            let passed = off < most;
            let text = format!("off by {off:.1e}, less than {most:.0e} is right");
            let detail = json!({ "off": off, "tolerance": most });
            self.add(format!("{prefix}.{}", seen.what), Ok((passed, text, detail)));
        }
    }

    /// The same slots again and in another order must give the same bits.
    fn repeats(&mut self, name: &str, model: &ModelConfig, images: u32, device: Device) {
        let slots = match attempt(|| Ok(Slots::new(model, images, device))) {
            Ok(slots) => slots,
            Err(err) => return self.add(format!("repeat.{name}.{images}"), Err(err)),
        };
        self.add(format!("repeat.{name}.{images}"), attempt(|| slots.repeat()));
        self.add(format!("order.{name}.{images}"), attempt(|| slots.orders()));
    }

    /// The arithmetic, the engine and NCCL on the device.
    fn device(
        &mut self,
        args: &GpuCheckArgs,
        device: Device,
        keep: &dyn Fn(&Report) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let library = &args.transport.cuda_library;
        if device == Device::Cpu && library.is_none() {
            return Ok(());
        }
        let compiler = if device == Device::Cpu { library.clone() } else { cuda::nvrtc() };
        let (driver, n_slots) = (library.clone(), 4);
        let place = DevicePlace { device, ordinal: 0, driver, compiler, n_slots };
        self.add("device.arithmetic".to_string(), attempt(|| device::arithmetic(&place)));
        keep(self)?;
        for &(word, precision) in Precision::ALL {
            // A CPU has no such products, and its engine refuses them.
            if device == Device::Cpu && precision == Precision::Tf32 {
                continue;
            }
            let name = format!("device.engine.{word}");
            self.add(name, attempt(|| device::contract(&place, precision)));
            let name = format!("device.task.{word}");
            self.add(name, attempt(|| device::task(&place, precision)));
            keep(self)?;
        }
        if let Err(err) = context::set_kernels(EXACT) {
            self.add("device.kernels".to_string(), Err(err.into()));
        }
        self.add("nccl.single".to_string(), attempt(|| nccl::single(&args.transport)));
        keep(self)?;
        self.add("nccl.pair".to_string(), attempt(|| nccl::pair(&args.transport)));
        Ok(())
    }

    /// Times slots; passes where they ran and gave finite losses.
    fn throughput(
        &mut self,
        args: &GpuCheckArgs,
        model: &ModelConfig,
        images: u32,
        device: Device,
        kernels: Kernels,
    ) {
        let word = if kernels.deterministic { "exact" } else { "free" };
        let name = format!("throughput.{}.{images}.{word}", args.model);
        let timed = with_kernels(kernels, || Slots::new(model, images, device).time(args.slots));
        let result = timed.map(|timed| {
            let rate = f64::from(images) / timed.median_seconds;
            let flops = rate * model.train_flops();
            let detail = json!({
                "model": args.model, "images": images, "precision": "f32", "kernels": word,
                "slots": args.slots, "loss": timed.loss,
                "seconds": {
                    "min": timed.min_seconds,
                    "median": timed.median_seconds,
                    "max": timed.max_seconds,
                },
                "images_per_second": rate, "flops_per_second": flops,
            });
            self.throughput.push(detail.clone());
            let text = format!(
                "{rate:.1} images/s, {:.1} ms a slot, {:.2} TFLOP/s",
                timed.median_seconds * 1e3,
                flops / 1e12
            );
            (timed.loss.is_finite(), text, detail)
        });
        self.add(name, result);
    }
}

/// Runs one item with other kernels, and takes the exact ones again whatever became of it.
fn with_kernels<T>(kernels: Kernels, f: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let found = attempt(|| {
        context::set_kernels(kernels)?;
        f()
    });
    context::set_kernels(EXACT)?;
    found
}

/// Runs one item; what libtorch refuses, which tch reports by panicking, is an error.
fn attempt<T>(f: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    std::panic::catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|payload| {
        Err(match (payload.downcast_ref::<String>(), payload.downcast_ref::<&str>()) {
            (Some(text), _) => anyhow!("{text}"),
            (None, Some(text)) => anyhow!("{text}"),
            (None, None) => anyhow!("a panic without a message"),
        })
    })
}

fn describe(library: &CudaLibrary) -> Value {
    let device = |device: &DeviceInfo| {
        json!({
            "name": device.name, "memory_bytes": device.memory_bytes,
            "capability": device.capability_text(), "multiprocessors": device.multiprocessors,
        })
    };
    for found in &library.devices {
        println!(
            "device  {}, {:.1} GiB, capability {}",
            found.name,
            found.memory_bytes as f64 / f64::from(1 << 30),
            found.capability_text()
        );
    }
    let driver = library.driver.driver.as_deref().unwrap_or("of unknown version");
    println!(
        "cuda    runtime {}, driver {driver} for CUDA {}",
        library.runtime, library.driver.cuda
    );
    json!({
        "library": library.path.display().to_string(),
        "runtime": library.runtime,
        "config": library.config,
        "driver": { "version": library.driver.driver, "cuda": library.driver.cuda },
        "devices": library.devices.iter().map(device).collect::<Vec<Value>>(),
    })
}

/// Variables that change the bits or the speed of libtorch.
const ENVIRONMENT: &[&str] = &[
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
];

/// Writes the file; `error` says why nothing could be checked.
fn write(
    args: &GpuCheckArgs,
    report: &Report,
    cuda: &Value,
    error: Option<&str>,
) -> anyhow::Result<()> {
    let items: Vec<Value> = report
        .items
        .iter()
        .map(|item| {
            let Item { name, passed, text, detail } = item;
            json!({ "name": name, "passed": passed, "text": text, "detail": detail })
        })
        .collect();
    let environment: serde_json::Map<String, Value> =
        ENVIRONMENT.iter().map(|&key| (key.to_string(), json!(std::env::var(key).ok()))).collect();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("read the clock")?;
    let file = json!({
        "format": "lacuna-gpu-check/1",
        "unix_seconds": now.as_secs(),
        "build": BuildId::this().to_string(),
        "libtorch": runtime::library_version(),
        "device": match args.device { Target::Cuda => "cuda", Target::Cpu => "cpu" },
        "cuda": cuda,
        "environment": environment,
        "complete": report.complete,
        "passed": report.complete && report.items.iter().all(|item| item.passed),
        "error": error,
        "items": items,
        "throughput": report.throughput,
    });
    if error.is_none() && report.items.is_empty() {
        bail!("nothing was checked");
    }
    let text = serde_json::to_string_pretty(&file).context("write the report as JSON")?;
    std::fs::write(&args.out, text + "\n")
        .with_context(|| format!("write `{}`", args.out.display()))
}
