//! The `lacuna` command: client, coordinator, one-machine training, data and checkpoint tools.
//!
//! No libtorch here. Results go to stdout, talk and progress to stderr; exit codes are those of
//! [`lacuna_types::exit`]. Start reading at [`main`].
#![forbid(unsafe_code)]

mod ckpt;
mod client;
mod connect;
mod data;
mod data_check;
mod doctor;
mod inspect;
mod journal;
mod logs;
mod plan;
mod progress;
mod run_commands;
mod screen;
mod secrets;
mod serve;
mod spec;
mod train;
mod verbosity;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lacuna_types::{BuildId, exit};

/// What stands below the commands: those that compute are the other program's.
const WORKER_HELP: &str = "\
`lacuna-worker` has what computes: joining a coordinator as a worker, `features`, `eval knn`,
`eval classify`, `predict` and `reconstruct`; see `lacuna-worker --help`.";

/// Commands that are `lacuna-worker`'s.
const OF_WORKER: [&str; 4] = ["eval", "features", "predict", "reconstruct"];

/// Elastic, exact pre-training of masked autoencoders.
#[derive(Debug, Parser)]
#[command(name = "lacuna", disable_version_flag = true, after_help = WORKER_HELP)]
struct Args {
    /// Print the version.
    #[arg(long, short = 'V')]
    version: bool,
    #[command(flatten, next_help_heading = "Coordinator")]
    connect: connect::Connect,
    #[command(flatten)]
    voice: verbosity::Voice,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write a commented run.toml.
    Init(plan::InitArgs),
    /// Pack, index, verify and look at images.
    Data(data::DataArgs),
    /// Show what a run will do, without a GPU or a coordinator.
    Plan(plan::PlanArgs),
    /// Train on this machine: coordinator and workers in one command.
    Train(train::TrainArgs),
    /// Run the coordinator service.
    Coordinator(serve::CoordinatorArgs),
    /// Submit a run to a coordinator.
    Submit(client::SubmitArgs),
    /// List runs.
    Runs(client::RunsArgs),
    /// Show one run.
    Status(client::StatusArgs),
    /// Follow a run; quitting does not stop it.
    Watch(client::WatchArgs),
    /// Wait until a run has ended.
    Wait(client::WaitArgs),
    /// Show what happened to a run.
    Events(inspect::EventsArgs),
    /// Show what a run's workers log.
    Logs(logs::LogsArgs),
    /// Stop a run at its next boundary, with a checkpoint; `lacuna resume` continues it.
    #[command(visible_alias = "pause")]
    Stop(run_commands::StopArgs),
    /// End a run now, without a checkpoint; `lacuna resume` continues from its newest one.
    Cancel(run_commands::CancelArgs),
    /// Continue a stopped, cancelled, paused or failed run.
    Resume(run_commands::ResumeArgs),
    /// Change how many workers train a run, from its next boundary on.
    Scale(run_commands::ScaleArgs),
    /// Compare two specifications, of files or of runs.
    Diff(inspect::DiffArgs),
    /// Checkpoint a run at its next boundary.
    Checkpoint(run_commands::CheckpointArgs),
    /// List workers: those of runs, and those that wait for one.
    Workers(client::WorkersArgs),
    /// Take a worker out at the next boundary.
    Drain(run_commands::WorkerArgs),
    /// Let a quarantined worker back in.
    Release(run_commands::WorkerArgs),
    /// Keep a machine out of every run for some time.
    Ban(run_commands::BanArgs),
    /// Give up silent members of a run, so that others can begin without them.
    Force(run_commands::ForceArgs),
    /// Show a coordinator's journal of its runs, also while it is running.
    Journal(journal::JournalArgs),
    /// List, check and export checkpoints.
    Ckpt(ckpt::CkptArgs),
    /// Check whether this machine can train.
    Doctor(doctor::DoctorArgs),
    /// Create tokens, which authenticate users and workers.
    Token(secrets::TokenArgs),
    /// Create certificates for mutual TLS.
    Tls(secrets::TlsArgs),
    /// Print a script that completes the command line.
    Completions(inspect::CompletionsArgs),
    /// Write manual pages.
    #[command(hide = true)]
    Man(inspect::ManArgs),
}

/// An error that has its own exit code.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Coded {
    /// Exit code.
    pub code: u8,
    /// Message for people.
    pub message: String,
}

impl Coded {
    /// Makes an error that ends the process with `code`.
    pub fn error(code: u8, message: impl Into<String>) -> anyhow::Error {
        Coded { code, message: message.into() }.into()
    }
}

/// Runs the command line and returns the exit code.
pub fn main() -> ExitCode {
    end_quietly_without_reader();
    let args = Args::try_parse().unwrap_or_else(|err| refuse(&err));
    args.voice.set();
    args.connect.stand_before();
    if args.version {
        println!("{}", BuildId::this());
        return ExitCode::SUCCESS;
    }
    let Some(command) = args.command else {
        eprintln!("error: no command; see `lacuna --help`");
        return ExitCode::from(exit::USAGE);
    };
    if verbosity::is_verbose() {
        init_logs("warn");
    }
    match run(command) {
        Ok(code) => ExitCode::from(code),
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::from(exit_code(&err))
        }
    }
}

/// Says what is wrong with a command line, and where a command is that this program has not.
fn refuse(err: &clap::Error) -> ! {
    use clap::error::{ContextKind, ContextValue};
    if let Some(ContextValue::String(word)) = err.get(ContextKind::InvalidSubcommand)
        && OF_WORKER.contains(&word.as_str())
    {
        eprintln!(
            "error: `{word}` is a command of `lacuna-worker`; see `lacuna-worker {word} --help`"
        );
        std::process::exit(i32::from(exit::USAGE));
    }
    err.exit()
}

/// Lets `lacuna status | head` end as other commands do, where printing would panic otherwise.
fn end_quietly_without_reader() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let why = info.payload_as_str().unwrap_or_default();
        if why.starts_with("failed printing to") && why.contains("Broken pipe") {
            std::process::exit(i32::from(exit::NO_READER));
        }
        before(info);
    }));
}

fn run(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Init(args) => plan::init(args),
        Command::Data(args) => data::data(args),
        Command::Plan(args) => plan::plan(args),
        Command::Train(args) => train::train(args),
        Command::Coordinator(args) => serve::coordinator(args),
        Command::Submit(args) => client::submit(args),
        Command::Runs(args) => client::runs(args),
        Command::Status(args) => client::status(args),
        Command::Watch(args) => client::watch(args),
        Command::Wait(args) => client::wait(args),
        Command::Events(args) => inspect::events(args),
        Command::Cancel(args) => run_commands::cancel(args),
        Command::Logs(args) => logs::logs(args),
        Command::Ban(args) => run_commands::ban(args),
        Command::Resume(args) => run_commands::resume(args),
        Command::Scale(args) => run_commands::scale(args),
        Command::Diff(args) => inspect::diff(args),
        Command::Doctor(args) => doctor::doctor(args),
        Command::Completions(args) => inspect::completions(args),
        Command::Man(args) => inspect::man(args),
        Command::Stop(args) => run_commands::stop(args),
        Command::Checkpoint(args) => run_commands::checkpoint(args),
        Command::Workers(args) => client::workers(args),
        Command::Drain(args) => run_commands::drain(args),
        Command::Release(args) => run_commands::release(args),
        Command::Force(args) => run_commands::force(args),
        Command::Journal(args) => journal::journal(args),
        Command::Ckpt(args) => ckpt::ckpt(args),
        Command::Token(args) => secrets::token(args),
        Command::Tls(args) => secrets::tls(args),
    }
}

fn exit_code(err: &anyhow::Error) -> u8 {
    use lacuna_api::client::ClientError;
    for cause in err.chain() {
        if let Some(coded) = cause.downcast_ref::<Coded>() {
            return coded.code;
        }
        if let Some(client) = cause.downcast_ref::<ClientError>() {
            return client_code(client);
        }
    }
    exit::FAILED
}

fn client_code(err: &lacuna_api::client::ClientError) -> u8 {
    use lacuna_api::client::ClientError;
    use lacuna_api::error::{Reason, reason};
    use lacuna_api::tls::TlsError;
    match err {
        ClientError::Credentials(TlsError::OutOfDate { .. }) | ClientError::Certificate { .. } => {
            exit::UNAUTHORISED
        }
        ClientError::Address { .. }
        | ClientError::Tls { .. }
        | ClientError::Scheme { .. }
        | ClientError::Settings { .. }
        | ClientError::Credentials(_) => exit::USAGE,
        ClientError::Unreachable { .. } | ClientError::NoLeader { .. } | ClientError::Late => {
            exit::UNREACHABLE
        }
        ClientError::Refused(status) => match reason(status) {
            Some(Reason::InvalidSpec | Reason::RunExists) => exit::USAGE,
            Some(Reason::Malformed | Reason::TooLarge) => exit::USAGE,
            Some(Reason::VersionSkew | Reason::UnknownMethod) => exit::VERSION,
            Some(Reason::Unauthenticated | Reason::RoleMissing) => exit::UNAUTHORISED,
            Some(Reason::Storage | Reason::CheckpointCorrupt) => exit::IO,
            Some(Reason::ShuttingDown | Reason::NotLeader | Reason::Starting) => exit::UNREACHABLE,
            // Not the coordinator's words: what is between did not let the call through.
            None if is_of_transport(status.code()) => exit::UNREACHABLE,
            _ => exit::FAILED,
        },
    }
}

/// Tells whether a status without a reason comes from the way, and not from a coordinator.
fn is_of_transport(code: tonic::Code) -> bool {
    use tonic::Code;
    matches!(code, Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal)
}

/// Starts the runtime of a command.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    use anyhow::Context as _;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start threads")
}

/// Sends the crates' logs to stderr; `RUST_LOG` chooses, else `--verbose`, else `usual`.
fn init_logs(usual: &'static str) {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new(verbosity::log_filter(usual)));
    // Fails only where one was set up already.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .try_init();
}
