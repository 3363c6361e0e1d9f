//! Command line of a worker binary.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use lacuna_api::tls::{Credentials, TlsError};

/// Joins a coordinator and computes for whatever run needs workers.
#[derive(Debug, Parser)]
#[command(name = "lacuna-worker", disable_version_flag = true)]
pub struct WorkerArgs {
    /// Print version and library, then exit.
    #[arg(long, short = 'V')]
    pub version: bool,

    /// What to run; without one, an agent.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// The agent's own settings.
    #[command(flatten)]
    pub agent: AgentArgs,
}

/// Other things a worker binary does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// One trainer process; started by an agent.
    #[command(hide = true)]
    Trainer(TrainerArgs),
}

/// What an agent does when its trainers have left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnDrain {
    /// Ends with 75, which tells who started it that it may be started again.
    Exit,
    /// Puts its Slurm job back into the queue first.
    SlurmRequeue,
}

/// Settings of an agent.
#[derive(Args, Clone, Debug)]
pub struct AgentArgs {
    /// Address of the coordinator, like http://127.0.0.1:7070; of several that share their state,
    /// all of them with commas.
    #[arg(long, short, env = "LACUNA_COORDINATOR", default_value = "http://127.0.0.1:7070")]
    pub coordinator: String,

    /// Devices to use, each by a trainer of its own: `cpu`, or `cpu:N` for N trainers on the CPU;
    /// `cuda` for all GPUs that CUDA_VISIBLE_DEVICES leaves, or `cuda:0,2` for some of them; `all`
    /// for all GPUs where there are some, and the CPU elsewhere.
    #[arg(long, default_value = "cpu:1")]
    pub devices: String,

    /// Name of this node, unique on the coordinator; by default the host name.
    #[arg(long)]
    pub node_name: Option<String>,

    /// Address the trainers listen on for their peers.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub bind_addr: SocketAddr,

    /// Address that peers connect to, where it differs from the bound one; port 0 means the bound
    /// port.
    #[arg(long)]
    pub advertise_addr: Option<SocketAddr>,

    /// Seconds without a coordinator after which to give up; by default a day.
    #[arg(long, alias = "give-up", default_value_t = 86_400)]
    pub give_up_seconds: u64,

    /// Seconds from now at which this machine is taken away: trainers are asked to leave
    /// `--drain-margin` before. Under Slurm, the job's end is taken by itself.
    #[arg(long)]
    pub walltime: Option<u64>,

    /// Seconds before the machine's end at which trainers are asked to leave.
    #[arg(long, default_value_t = 120)]
    pub drain_margin: u64,

    /// What is done once all trainers have left because this machine's time is over, or a signal
    /// said so. `slurm-requeue` puts the Slurm job back into the queue (`scontrol requeue`), so
    /// that the machine comes back when it is free again.
    #[arg(long, value_enum, default_value = "exit")]
    pub on_drain: OnDrain,

    /// The Slurm job, and the element of an array of jobs, that this agent is.
    #[arg(long, env = "SLURM_JOB_ID", hide = true)]
    pub slurm_job: Option<String>,

    /// End of a Slurm job, in seconds since the Unix epoch.
    #[arg(long, env = "SLURM_JOB_END_TIME", hide = true)]
    pub end_time: Option<u64>,

    /// End when the run that the trainers worked for has ended, instead of waiting for another.
    #[arg(long)]
    pub once: bool,

    /// End when standard input closes: for a parent that starts the agent with a pipe.
    #[arg(long, hide = true)]
    pub with_parent: bool,

    /// Folder for files of metrics in Prometheus' text format, one for each trainer, which the
    /// textfile collector of a node exporter reads.
    #[arg(long, env = "LACUNA_METRICS_DIR", value_name = "FOLDER")]
    pub metrics_dir: Option<PathBuf>,

    /// How to prove who this is.
    #[command(flatten)]
    pub credentials: CredentialArgs,

    /// How the trainers reach their peers.
    #[command(flatten)]
    pub transport: TransportArgs,
}

/// How a worker proves to the coordinator who it is. Secrets stand in files, never in arguments.
#[derive(Args, Clone, Debug, Default)]
pub struct CredentialArgs {
    /// File with a token of the role `worker` (`lacuna token new`).
    #[arg(long, env = "LACUNA_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// Folder with `ca.pem`, and `cert.pem` and `key.pem` of the role `worker` (`lacuna tls init`).
    #[arg(long, env = "LACUNA_TLS_DIR", value_name = "FOLDER")]
    pub tls_dir: Option<PathBuf>,
}

impl CredentialArgs {
    /// Reads the files.
    ///
    /// # Errors
    /// A file cannot be read or is none of its kind.
    pub fn read(&self) -> Result<Credentials, TlsError> {
        Credentials::read(self.token_file.as_deref(), self.tls_dir.as_deref())
    }

    /// Returns the arguments that say the same to another process.
    pub fn to_args(&self) -> Vec<OsString> {
        let files = [("--token-file", &self.token_file), ("--tls-dir", &self.tls_dir)];
        let given = files.into_iter().filter_map(|(name, path)| Some((name, path.as_ref()?)));
        given.flat_map(|(name, path)| [name.into(), path.into()]).collect()
    }
}

/// How a trainer's groups sum: the same for all workers of a run.
#[derive(Args, Clone, Debug)]
pub struct TransportArgs {
    /// What carries sums between workers: `nccl` between CUDA devices and `tcp` otherwise, or one
    /// of them always.
    #[arg(long, env = "LACUNA_COLLECTIVE", value_enum, default_value_t = CollectiveKind::Auto)]
    pub collective: CollectiveKind,

    /// NCCL's library, used whatever else there is; by default the one that libtorch brings along,
    /// or else the loader's `libnccl.so.2`.
    #[arg(long, env = "LACUNA_NCCL_LIBRARY")]
    pub nccl_library: Option<PathBuf>,

    /// The CUDA driver's library, where it is not `libcuda.so.1`.
    #[arg(long, env = "LACUNA_CUDA_LIBRARY", hide = true)]
    pub cuda_library: Option<PathBuf>,
}

/// Kinds of collectives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CollectiveKind {
    /// By the device.
    Auto,
    /// TCP between host memories.
    Tcp,
    /// NCCL between devices.
    Nccl,
}

impl TransportArgs {
    /// Returns the arguments that say the same to another process.
    pub fn to_args(&self) -> Vec<OsString> {
        let kind = self.collective.to_possible_value().expect("no kind is skipped");
        let mut args: Vec<OsString> = vec!["--collective".into(), kind.get_name().into()];
        for (name, path) in
            [("--nccl-library", &self.nccl_library), ("--cuda-library", &self.cuda_library)]
        {
            if let Some(path) = path {
                args.extend([name.into(), path.into()]);
            }
        }
        args
    }
}

impl AgentArgs {
    /// Returns the Slurm job that goes back into the queue once the trainers have left.
    pub fn job_to_requeue(&self) -> Option<&str> {
        self.slurm_job.as_deref().filter(|_| self.on_drain == OnDrain::SlurmRequeue)
    }

    /// Returns how long trainers may work before they are asked to leave, if that is bounded.
    pub fn drain_after(&self) -> Option<Duration> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = now.map_or(0, |d| d.as_secs());
        let by_end = self.end_time.map(|end| end.saturating_sub(now));
        let left = self.walltime.into_iter().chain(by_end).min()?;
        Some(Duration::from_secs(left.saturating_sub(self.drain_margin)))
    }
}

/// Settings of a trainer.
#[derive(Args, Clone, Debug)]
pub struct TrainerArgs {
    /// Address of the coordinator.
    #[arg(long)]
    pub coordinator: String,

    /// Stable name, `node:device`.
    #[arg(long)]
    pub worker_id: String,

    /// Random number of this life.
    #[arg(long)]
    pub incarnation: u64,

    /// Device, `cpu0`.
    #[arg(long)]
    pub device: String,

    /// Trainers on this node, which share its cores.
    #[arg(long)]
    pub local_world: usize,

    /// Address to listen on for peers.
    #[arg(long)]
    pub bind_addr: SocketAddr,

    /// Address that peers connect to, where it differs.
    #[arg(long)]
    pub advertise_addr: Option<SocketAddr>,

    /// Seconds without a coordinator after which to give up.
    #[arg(long)]
    pub give_up_seconds: u64,

    /// Folder for files of metrics.
    #[arg(long)]
    pub metrics_dir: Option<PathBuf>,

    /// How to prove who this is.
    #[command(flatten)]
    pub credentials: CredentialArgs,

    /// How to reach peers.
    #[command(flatten)]
    pub transport: TransportArgs,
}

impl TrainerArgs {
    /// Returns how long to try without a coordinator.
    pub fn give_up(&self) -> Duration {
        Duration::from_secs(self.give_up_seconds)
    }
}
