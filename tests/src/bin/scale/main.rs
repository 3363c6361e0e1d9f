//! Measures one coordinator with as many workers as it should carry.
//!
//! The coordinator is the real binary; workers are the real session machines on real streams, with
//! the step loop replaced by a clock ([`stub`]). Prints tables for docs/benchmarks/scale.md.

mod fleet;
mod measure;
mod report;
mod stub;

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Parser;
use lacuna_api::client::Client;
use lacuna_api::v1;
use lacuna_tests::{Binaries, Fixture, Process, said};

use self::fleet::Fleet;
use self::measure::{Call, Subject, latencies, longest, quantile};
use self::report::Table;
use self::stub::{End, MARK_EVERY};

/// How long another coordinator may take to lead.
const TAKEOVER: Duration = Duration::from_secs(120);
/// How a client waits for the coordinator.
const PATIENCE: Duration = Duration::from_secs(30);
/// Calls whose latency is measured, of each kind.
const CALLS: usize = 200;
/// Samples of the data set: what the largest batch needs.
const SAMPLES: u64 = 4096;

/// Measures one coordinator with many stub workers.
#[derive(Parser, Debug)]
struct Args {
    /// What to measure, as runs x workers of each.
    #[arg(long, value_delimiter = ',', default_value = "1x1024,100x10")]
    shapes: Vec<Shape>,
    /// How often to measure each.
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// Length of a step, in milliseconds.
    #[arg(long, default_value_t = 500)]
    step_ms: u64,
    /// Seconds over which processor time is measured.
    #[arg(long, default_value_t = 20)]
    steady: u64,
    /// Folder for the coordinator's log, kept; none without it.
    #[arg(long)]
    logs: Option<PathBuf>,
    /// Keep the state in this etcd, an address or several with commas, under a prefix of its own;
    /// then another coordinator takes over at the end, which is measured too.
    #[arg(long, value_name = "URLS")]
    etcd: Option<String>,
}

/// Runs, and workers of each.
#[derive(Clone, Copy, Debug)]
struct Shape {
    runs: usize,
    workers: usize,
}

impl std::str::FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('x').and_then(|(runs, workers)| {
            Some(Shape { runs: runs.parse().ok()?, workers: workers.parse().ok()? })
        });
        parsed.filter(|s| s.runs > 0 && s.workers > 0).ok_or(format!("`{text}` is not like 100x10"))
    }
}

impl Shape {
    fn all(self) -> usize {
        self.runs * self.workers
    }

    /// One percent of all workers, at least one.
    fn some(self) -> usize {
        (self.all() / 100).max(1)
    }

    /// Fewest workers of a run: those who are left when some have gone twice.
    fn min(self) -> usize {
        self.workers.saturating_sub(2 * self.some().div_ceil(self.runs)).max(1)
    }

    /// Slots of a step: so many that each worker more makes steps shorter, up to a limit that
    /// keeps plans small.
    fn slots(self) -> usize {
        (self.workers * self.workers).min(SAMPLES as usize)
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let here = std::env::current_exe().context("find this program")?;
    let beside = |name: &str| here.with_file_name(name);
    let binaries =
        Binaries { lacuna: beside("lacuna-under-test"), worker: beside("lacuna-fake-worker") };
    ensure!(binaries.lacuna.exists(), "build it first: cargo build --release -p lacuna-tests");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?;
    println!("{}", report::machine());
    for shape in &args.shapes {
        let mut table = Table::default();
        for i in 0..args.repeat {
            eprintln!("{} x {}: {} of {}", shape.runs, shape.workers, i + 1, args.repeat);
            runtime.block_on(measure_once(&args, *shape, &binaries, &mut table))?;
        }
        println!("\n{} runs of {} workers:\n\n{table}", shape.runs, shape.workers);
    }
    Ok(())
}

/// One coordinator from its start to its end.
async fn measure_once(
    args: &Args,
    shape: Shape,
    binaries: &Binaries,
    table: &mut Table,
) -> anyhow::Result<()> {
    let fixture = Fixture::new(binaries.clone(), SAMPLES, 8);
    let (coordinator, url) = start(args, &fixture, "state")?;
    let subject = Subject(coordinator.pid());
    let mut client = Client::connect(&url, PATIENCE).await?;
    wait_for_runs(&mut client, 0).await?;
    let idle_mib = subject.memory("VmRSS")?;
    let request = request(&fixture, shape)?;
    let created = submit_all(&mut client, &request, shape).await?;
    table.add("CreateRun, new: p50, ms", quantile(&created, 0.5));
    table.add("CreateRun, new: p99, ms", quantile(&created, 0.99));

    let started = Instant::now();
    let mut fleet = Fleet::connect(&url, shape.all(), Duration::from_millis(args.step_ms)).await?;
    table.add("connect all, s", started.elapsed().as_secs_f64());

    // Beats run for a while before anybody is warm, as while devices start.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (stop, lag) = watch_lag(&url).await?;
    let cpu = subject.cpu()?;
    let warm = fleet.warm_up();
    let formed = fleet.wait_started(shape.runs).await.context("form")?;
    table.add("form: last Warm to last Start, s", (formed - warm).as_secs_f64());
    table.add("form: coordinator CPU, s", (subject.cpu()? - cpu).as_secs_f64());
    stop.send(()).ok();
    table.add("form: longest unary call, ms", lag.await?);

    // The first marks and the caches they warm are not steady.
    tokio::time::sleep(Duration::from_millis(args.step_ms * MARK_EVERY * 2)).await;
    table.add("steady: CPU, % of one core", subject.cpu_share(seconds(args.steady)).await?);
    table.add("steady: RSS, MiB", subject.memory("VmRSS")?);
    table.add("steady: RSS over idle, KiB a worker", {
        (subject.memory("VmRSS")? - idle_mib) * 1024.0 / shape.all() as f64
    });
    let pause = Duration::from_millis(20);
    let again = named(&request, 0)?;
    for (name, call) in [
        ("GetInfo", Call::Info),
        ("GetRun", Call::Get("scale-000")),
        ("ListRuns", Call::List),
        ("ListWorkers", Call::Workers),
        ("CreateRun, again", Call::Create(&again)),
    ] {
        let times = latencies(&mut client, call, CALLS, pause).await?;
        table.add(&format!("{name}: p50, ms"), quantile(&times, 0.5));
        table.add(&format!("{name}: p99, ms"), quantile(&times, 0.99));
    }

    if shape.workers == 1 {
        // A group of one has nobody to go on.
        table.add("peak RSS, MiB", subject.memory("VmHWM")?);
        return take_over(args, shape, &fixture, coordinator, table).await;
    }
    let hit = shape.some().min(shape.runs);
    for (how, what) in [(End::Die, "killed"), (End::Silence, "silent")] {
        let (stop, lag) = watch_lag(&url).await?;
        let cpu = subject.cpu()?;
        let at = fleet.end(shape.some(), how).await?;
        let formed = fleet.wait_started(hit).await.context("form again")?;
        table.add(&format!("1 % {what}: to last Start, s"), (formed - at).as_secs_f64());
        table.add(&format!("1 % {what}: CPU, s"), (subject.cpu()? - cpu).as_secs_f64());
        stop.send(()).ok();
        table.add(&format!("1 % {what}: longest unary call, ms"), lag.await?);
        let members: usize = fleet.started.values().map(|(_, world)| world).sum();
        table.add(&format!("1 % {what}: members, of them"), members as f64);
        table.add(&format!("1 % {what}: alive"), fleet.alive() as f64);
    }
    table.add("peak RSS, MiB", subject.memory("VmHWM")?);
    take_over(args, shape, &fixture, coordinator, table).await
}

/// Kills the coordinator beside another one that follows, and times how long that takes until it
/// leads, with every run.
async fn take_over(
    args: &Args,
    shape: Shape,
    fixture: &Fixture,
    coordinator: Process,
    table: &mut Table,
) -> anyhow::Result<()> {
    if args.etcd.is_none() {
        return Ok(());
    }
    let (second, url) = start(args, fixture, "state-of-the-second")?;
    let mut client = Client::connect(&url, PATIENCE).await?;
    drop(coordinator);
    let killed = Instant::now();
    wait_for_runs(&mut client, shape.runs).await?;
    table.add("takeover: killed to every run led, s", killed.elapsed().as_secs_f64());
    let subject = Subject(second.pid());
    table.add("takeover: CPU of the second until then, s", subject.cpu()?.as_secs_f64());
    Ok(())
}

/// Waits until the coordinator lists so many runs.
async fn wait_for_runs(client: &mut Client, n: usize) -> anyhow::Result<()> {
    let until = Instant::now() + TAKEOVER;
    loop {
        match client.list_runs().await {
            Ok(runs) if runs.len() == n => return Ok(()),
            answer => ensure!(Instant::now() < until, "it does not lead {n} runs: {answer:?}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// Starts to time calls, until the sender sends; the task returns the longest.
async fn watch_lag(
    url: &str,
) -> anyhow::Result<(tokio::sync::oneshot::Sender<()>, tokio::task::JoinHandle<f64>)> {
    let mut client = Client::connect(url, PATIENCE).await?;
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let lag = tokio::spawn(async move { longest(&mut client, stopped).await });
    Ok((stop, lag))
}

fn start(args: &Args, fixture: &Fixture, state: &str) -> anyhow::Result<(Process, String)> {
    let mut command = fixture.lacuna(&["coordinator", "--local", "--listen", "127.0.0.1:0"]);
    let log = match &args.logs {
        None => Stdio::null(),
        Some(folder) => {
            std::fs::create_dir_all(folder)?;
            let path = folder.join("coordinator.log");
            std::fs::File::options().create(true).append(true).open(path)?.into()
        }
    };
    if let Some(etcd) = &args.etcd {
        // The folder has a random name.
        let prefix = format!("/scale{}", fixture.dir.path().display());
        command.args(["--etcd", etcd, "--etcd-lease", "5s", "--etcd-prefix", &prefix]);
    }
    command.arg("--state").arg(fixture.path(state)).stdout(Stdio::piped()).stderr(log);
    let mut process = Process::start(&mut command);
    let stdout = process.take_stdout().context("stdout is a pipe")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).context("read the coordinator's address")?;
    let url =
        line.trim().strip_prefix("listening on ").context("read the coordinator's address")?;
    Ok((process, url.to_string()))
}

/// Makes the request that creates a run of this shape.
fn request(fixture: &Fixture, shape: Shape) -> anyhow::Result<v1::CreateRunRequest> {
    let (min, max) = (shape.min(), shape.workers);
    let workers = format!("\"{min}:{max}\"");
    let batch = shape.slots().to_string();
    let every = MARK_EVERY.to_string();
    let track = format!("\"{MARK_EVERY}step\"");
    let extra = [
        ("train.batch", batch.as_str()),
        ("train.slot_batch", "1"),
        ("train.digest_every", every.as_str()),
        ("track.every", track.as_str()),
        ("elastic.workers", workers.as_str()),
        ("checkpoint.every", "[\"1h\"]"),
    ];
    let spec = fixture.spec("scale", 1_000_000, &extra);
    let path = spec.to_str().context("a path in UTF-8")?;
    let (code, out, err) = said(&fixture.run(&["submit", path, "--dry-run"]));
    ensure!(code == 0, "submit: {out}{err}");
    let request: serde_json::Value = serde_json::from_str(&out)?;
    Ok(v1::CreateRunRequest {
        spec: request["spec"].to_string(),
        resume: true,
        n_samples: request["n_samples"].as_u64().context("a number of samples")?,
        fingerprint: request["fingerprint"].as_str().context("a fingerprint")?.to_string(),
        request_id: String::new(),
    })
}

/// The same for the run of another name.
fn named(request: &v1::CreateRunRequest, run: usize) -> anyhow::Result<v1::CreateRunRequest> {
    let mut spec: serde_json::Value = serde_json::from_str(&request.spec)?;
    spec["name"] = format!("scale-{run:03}").into();
    Ok(v1::CreateRunRequest { spec: spec.to_string(), ..request.clone() })
}

/// Creates every run; returns how long each took, in milliseconds, ascending.
async fn submit_all(
    client: &mut Client,
    request: &v1::CreateRunRequest,
    shape: Shape,
) -> anyhow::Result<Vec<f64>> {
    let mut times: Vec<f64> = Vec::new();
    for run in 0..shape.runs {
        let request = named(request, run)?;
        let started = Instant::now();
        let (_, created) = client.create_run(request).await?;
        times.push(started.elapsed().as_secs_f64() * 1e3);
        ensure!(created, "run {run} was there");
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}
