//! Entry point of worker binaries.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser as _;
use lacuna_types::{BuildId, exit};

use crate::agent;
use crate::args::{Command, WorkerArgs};
use crate::engine::Backend;
use crate::trainer;

/// Parses the command line and runs the process: an agent, or one of its trainers.
pub fn run(backend: impl Backend) -> ExitCode {
    dispatch(WorkerArgs::parse(), backend)
}

/// Runs what `args` say; for binaries whose command line has more to it.
pub fn dispatch(args: WorkerArgs, backend: impl Backend) -> ExitCode {
    init_logs();
    if args.version {
        println!("{}, {}", BuildId::this(), backend.library());
        return ExitCode::SUCCESS;
    }
    let backend: Arc<dyn Backend> = Arc::new(backend);
    match args.command {
        Some(Command::Trainer(args)) => {
            let code = told(trainer::run(args, backend.clone()));
            let _ = std::io::stdout().flush();
            backend.end(code)
        }
        None => {
            if let Err(why) = lacuna_api::raise_open_files() {
                tracing::info!("{why}");
            }
            finish(agent::run(args.agent, backend))
        }
    }
}

/// Turns the end of a command into the process's: prints an error once, with its causes.
pub fn finish(result: anyhow::Result<u8>) -> ExitCode {
    ExitCode::from(told(result))
}

/// Prints an error once, with its causes; returns the exit code.
fn told(result: anyhow::Result<u8>) -> u8 {
    result.unwrap_or_else(|err| {
        eprintln!("error: {err:#}");
        exit_code(&err)
    })
}

/// Logs go to stderr; `RUST_LOG` chooses, `info` is the default.
pub fn init_logs() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // Fails only where a test set one up already.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .try_init();
}

/// An error that has its own exit code.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct CodedError {
    /// Exit code.
    pub code: u8,
    /// Message for people.
    pub message: String,
}

fn exit_code(err: &anyhow::Error) -> u8 {
    err.chain().find_map(|e| e.downcast_ref::<CodedError>()).map_or(exit::FAILED, |e| e.code)
}
