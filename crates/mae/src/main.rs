//! Binary `lacuna-worker`: agent and trainer on libtorch, and what else needs the model.

mod commands;
mod gpu_bench;
mod gpu_check;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lacuna_mae::worker::TorchBackend;
use lacuna_worker::args::{AgentArgs, Command as WorkerCommand, WorkerArgs};
use lacuna_worker::entry::{dispatch, finish, init_logs};

/// Joins a coordinator and computes for whatever run needs workers.
#[derive(Debug, Parser)]
#[command(name = "lacuna-worker", disable_version_flag = true)]
struct Args {
    /// Print version and library, then exit.
    #[arg(long, short = 'V')]
    version: bool,
    /// What to run; without one, an agent.
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    agent: AgentArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Worker(WorkerCommand),
    /// Check that the engine keeps the contract that exactness needs, on this machine.
    Conformance,
    /// Draw what a model makes of masked images.
    Reconstruct(commands::reconstruct::ReconstructArgs),
    /// Write what a model's encoder says about every image of a data set.
    Features(commands::features::FeaturesArgs),
    /// Write what a run that learned classes says of every image of a data set.
    Predict(commands::predict::PredictArgs),
    /// Tell how good a model's features are.
    #[command(subcommand)]
    Eval(commands::eval::EvalCommand),
    /// Check a device: golden values, equal bits, first numbers.
    #[command(hide = true)]
    GpuCheck(gpu_check::GpuCheckArgs),
    /// Time whole training steps on a device, a line of JSON for each case.
    #[command(hide = true)]
    GpuBench(gpu_bench::GpuBenchArgs),
    /// One of two ranks that `gpu-check` starts.
    #[command(hide = true)]
    GpuCheckRank(gpu_check::nccl::RankArgs),
}

fn main() -> ExitCode {
    let Args { version, command, agent } = Args::parse();
    match command {
        Some(Command::Reconstruct(args)) => {
            init_logs();
            finish(commands::reconstruct::reconstruct(&args))
        }
        Some(Command::Features(args)) => {
            init_logs();
            finish(commands::features::features(&args))
        }
        Some(Command::Predict(args)) => {
            init_logs();
            finish(commands::predict::predict(&args))
        }
        Some(Command::Eval(command)) => {
            init_logs();
            finish(commands::eval::eval(&command))
        }
        Some(Command::GpuCheck(args)) => {
            init_logs();
            finish(gpu_check::run(&args))
        }
        Some(Command::GpuBench(args)) => {
            init_logs();
            finish(gpu_bench::run(&args))
        }
        Some(Command::GpuCheckRank(args)) => {
            init_logs();
            // NCCL's symbols come with libtorch's CUDA half, unless a file is named.
            finish(gpu_check::nccl::prepare(&args).and_then(|()| gpu_check::nccl::rank(&args)))
        }
        Some(Command::Conformance) => {
            init_logs();
            finish(commands::conformance())
        }
        Some(Command::Worker(command)) => {
            dispatch(WorkerArgs { version, command: Some(command), agent }, TorchBackend::default())
        }
        None => dispatch(WorkerArgs { version, command: None, agent }, TorchBackend::default()),
    }
}
