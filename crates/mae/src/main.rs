//! Binary `lacuna-worker`: agent and trainer on libtorch, and what else needs the model.

mod commands;
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
    /// Draw what the model of a checkpoint makes of masked images.
    Reconstruct(commands::ReconstructArgs),
    /// Check a device: golden values, equal bits, first numbers.
    #[command(hide = true)]
    GpuCheck(gpu_check::GpuCheckArgs),
    /// One of two ranks that `gpu-check` starts.
    #[command(hide = true)]
    GpuCheckRank(gpu_check::nccl::RankArgs),
}

fn main() -> ExitCode {
    let Args { version, command, agent } = Args::parse();
    match command {
        Some(Command::Reconstruct(args)) => {
            init_logs();
            finish(commands::reconstruct(&args))
        }
        Some(Command::GpuCheck(args)) => {
            init_logs();
            finish(gpu_check::run(&args))
        }
        Some(Command::GpuCheckRank(args)) => {
            init_logs();
            // NCCL's symbols come with libtorch's CUDA half, unless a file is named.
            finish(gpu_check::nccl::prepare(&args).and_then(|()| gpu_check::nccl::rank(&args)))
        }
        Some(Command::Conformance) => {
            init_logs();
            finish(Ok(commands::conformance()))
        }
        Some(Command::Worker(command)) => {
            dispatch(WorkerArgs { version, command: Some(command), agent }, TorchBackend::default())
        }
        None => dispatch(WorkerArgs { version, command: None, agent }, TorchBackend::default()),
    }
}
