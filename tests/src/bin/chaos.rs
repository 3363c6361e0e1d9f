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
}

#[derive(Args, Debug)]
struct ProxyArgs {
    /// Where to forward to; loopback.
    #[arg(long)]
    target: SocketAddr,
}

fn main() -> ExitCode {
    let done = end_children_on_signals().context("handle signals").and_then(|()| {
        match Cli::parse().command {
            Command::Run(args) => run(args),
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
    };
    let failed = matrix::run(&bench, &matrix)?;
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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
                println!("{order:?}: {} connections, {:?} bytes", proxy.connections(), proxy.bytes());
            }
            Err(err) => eprintln!("{err}"),
        }
    }
    Ok(ExitCode::SUCCESS)
}
