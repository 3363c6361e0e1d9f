//! Runs under faults, and what recovering from them costs.
#![forbid(unsafe_code)]

use std::io::BufRead as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::{Args, Parser, Subcommand};
use lacuna_tests::Binaries;
use lacuna_tests::bench::{goodput, overhead, plot, recovery};
use lacuna_tests::chaos::Row;
use lacuna_tests::chaos::matrix::{self, Matrix};
use lacuna_tests::processes::end_children_on_signals;
use lacuna_tests::proxy::{Network, Order};
use lacuna_tests::rig::Bench;

/// Faults for whole runs on this machine: seeded, bounded in time, on loopback.
#[derive(Debug, Parser)]
#[command(name = "lacuna-chaos")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compare runs under faults with an undisturbed one, bit by bit.
    Run(RunArgs),
    /// Time recoveries: kills, silent deaths, joins, a coordinator's absence.
    Recovery(RecoveryArgs),
    /// Measure progress under Poisson kills, against restarts from the newest checkpoint.
    Goodput(GoodputArgs),
    /// Measure what beats, marks, ledger and digests cost an undisturbed run.
    Overhead(OverheadArgs),
    /// Forward connections, badly: takes orders on standard input.
    Proxy(ProxyArgs),
}

/// The binaries under test.
#[derive(Args, Debug)]
struct Under {
    /// The worker, for example one with libtorch; by default the one with the fake engine.
    #[arg(long)]
    worker: Option<PathBuf>,

    /// The command line.
    #[arg(long)]
    lacuna: Option<PathBuf>,
}

impl Under {
    /// Looks for what was not given beside this program.
    fn binaries(self) -> anyhow::Result<Binaries> {
        let here = std::env::current_exe().context("find this program")?;
        let beside = |given: Option<PathBuf>, name: &str| {
            let path = given.unwrap_or_else(|| here.with_file_name(name));
            std::path::absolute(&path).with_context(|| format!("find {}", path.display()))
        };
        let lacuna = beside(self.lacuna, "lacuna-under-test")?;
        let worker = beside(self.worker, "lacuna-fake-worker")?;
        for path in [&lacuna, &worker] {
            ensure!(path.is_file(), "{} is missing: cargo build --bins", path.display());
        }
        Ok(Binaries { lacuna, worker })
    }
}

#[derive(Args, Debug)]
struct RunArgs {
    #[command(flatten)]
    under: Under,

    /// Draws the faults; printed, so that a failure can be run again.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Start no new cell after so many minutes; 0 runs every cell once.
    #[arg(long, default_value_t = 0)]
    minutes: u64,

    /// Kinds of faults.
    #[arg(long, value_delimiter = ',', default_values_t = Row::ALL)]
    rows: Vec<Row>,

    /// Numbers of workers.
    #[arg(long, value_delimiter = ',', default_value = "1,2,3,5")]
    worlds: Vec<usize>,

    /// Steps of a run.
    #[arg(long, default_value_t = 600)]
    steps: u64,

    /// Most faults of a run.
    #[arg(long, default_value_t = 6)]
    faults: usize,

    /// Print faults and events of runs that passed too.
    #[arg(long)]
    verbose: bool,
}

#[derive(Args, Debug)]
struct RecoveryArgs {
    #[command(flatten)]
    under: Under,

    /// Members of the group.
    #[arg(long, default_value_t = 3)]
    world: usize,

    /// Slots of a step.
    #[arg(long, default_value_t = 9)]
    slots: u64,

    /// Milliseconds of a slot.
    #[arg(long, default_value_t = 35)]
    slot_ms: u64,

    /// SIGKILLs, with and without a warm spare each.
    #[arg(long, default_value_t = 50)]
    kills: usize,

    /// Silent deaths of each kind, and joins.
    #[arg(long, default_value_t = 10)]
    others: usize,

    /// Seconds that the coordinator is away.
    #[arg(long, default_value_t = 60)]
    outage: u64,

    /// Write the raw numbers there.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct GoodputArgs {
    #[command(flatten)]
    under: Under,

    /// Members of the group.
    #[arg(long, default_value_t = 8)]
    world: usize,

    /// Processes that wait warm, for the elastic group.
    #[arg(long, default_value_t = 0)]
    spares: usize,

    /// Slots of a step.
    #[arg(long, default_value_t = 56)]
    slots: u64,

    /// Milliseconds of a slot.
    #[arg(long, default_value_t = 20)]
    slot_ms: u64,

    /// Mean seconds between two kills, a cell each.
    #[arg(long, value_delimiter = ',', default_value = "15,60")]
    means: Vec<u64>,

    /// Seconds of a cell.
    #[arg(long, default_value_t = 600)]
    seconds: u64,

    /// Steps between two checkpoints, of both groups.
    #[arg(long, default_value_t = 50)]
    checkpoint_steps: u64,

    /// Draws the kills.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Write the raw numbers there.
    #[arg(long)]
    json: Option<PathBuf>,

    /// Write the plot there.
    #[arg(long)]
    svg: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct OverheadArgs {
    #[command(flatten)]
    under: Under,

    /// Runs of each variant, in turn.
    #[arg(long, default_value_t = 5)]
    rounds: usize,

    /// Seconds of a run.
    #[arg(long, default_value_t = 10)]
    seconds: u64,

    /// Write the raw numbers there.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct ProxyArgs {
    /// Where to forward to; loopback.
    #[arg(long)]
    target: SocketAddr,
}

fn main() -> ExitCode {
    let done =
        end_children_on_signals().context("handle signals").and_then(|()| {
            match Cli::parse().command {
                Command::Run(args) => run(args),
                Command::Recovery(args) => recovery(args),
                Command::Goodput(args) => goodput(args),
                Command::Overhead(args) => overhead(args),
                Command::Proxy(args) => proxy(&args),
            }
        });
    match done {
        Ok(code) => code,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    ensure!(!args.worlds.contains(&0), "a run needs a worker");
    let bench = Bench::new(args.under.binaries()?);
    let matrix = Matrix {
        rows: args.rows,
        worlds: args.worlds,
        seed: args.seed,
        time: Duration::from_secs(60 * args.minutes),
        steps: args.steps,
        faults: args.faults,
        verbose: args.verbose,
    };
    let failed = matrix::run(&bench, &matrix)?;
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints a page and writes the raw numbers.
fn publish(page: &str, raw: &serde_json::Value, to: Option<&PathBuf>) -> anyhow::Result<ExitCode> {
    print!("{page}");
    if let Some(path) = to {
        let text = serde_json::to_string(raw).context("write JSON")? + "\n";
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn recovery(args: RecoveryArgs) -> anyhow::Result<ExitCode> {
    ensure!(args.world >= 2, "somebody has to survive: --world 2 or more");
    let bench = Bench::new(args.under.binaries()?);
    let config = recovery::Config {
        world: args.world,
        slots: args.slots,
        slot: Duration::from_millis(args.slot_ms),
        kills: args.kills,
        others: args.others,
        outage: Duration::from_secs(args.outage),
    };
    let (page, raw) = recovery::run(&bench, &config)?;
    publish(&page, &raw, args.json.as_ref())
}

fn goodput(args: GoodputArgs) -> anyhow::Result<ExitCode> {
    let bench = Bench::new(args.under.binaries()?);
    let config = goodput::Config {
        world: args.world,
        spares: args.spares,
        slots: args.slots,
        slot: Duration::from_millis(args.slot_ms),
        means: args.means.into_iter().map(Duration::from_secs).collect(),
        time: Duration::from_secs(args.seconds),
        checkpoint_steps: args.checkpoint_steps,
        seed: args.seed,
    };
    let (step, cells) = goodput::run(&bench, &config)?;
    if let Some(path) = &args.svg {
        std::fs::write(path, plot::progress(&cells, step))
            .with_context(|| format!("write {}", path.display()))?;
    }
    let raw = goodput::to_json(&config, step, &cells);
    publish(&goodput::table(&cells), &raw, args.json.as_ref())
}

fn overhead(args: OverheadArgs) -> anyhow::Result<ExitCode> {
    let bench = Bench::new(args.under.binaries()?);
    let time = Duration::from_secs(args.seconds);
    let (page, raw) = overhead::run(&bench, &overhead::Config { rounds: args.rounds, time })?;
    publish(&page, &raw, args.json.as_ref())
}

/// Serves until standard input ends.
fn proxy(args: &ProxyArgs) -> anyhow::Result<ExitCode> {
    let network = Network::new().context("start the proxy's thread")?;
    let proxy = network.open(args.target).context("open the proxy")?;
    println!("listening on {}", proxy.addr());
    for line in std::io::stdin().lock().lines() {
        match line.context("read an order")?.parse::<Order>() {
            Ok(order) => {
                proxy.obey(order);
                println!(
                    "{order:?}: {} connections, {:?} bytes",
                    proxy.connections(),
                    proxy.bytes()
                );
            }
            Err(err) => eprintln!("{err}"),
        }
    }
    Ok(ExitCode::SUCCESS)
}
