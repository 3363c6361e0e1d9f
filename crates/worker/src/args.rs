//! Command line of a worker binary.

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

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

/// Settings of an agent.
#[derive(Args, Clone, Debug)]
pub struct AgentArgs {
    /// Address of the coordinator, like http://127.0.0.1:7070.
    #[arg(long, short, env = "LACUNA_COORDINATOR", default_value = "http://127.0.0.1:7070")]
    pub coordinator: String,

    /// Devices to use: `cpu`, or `cpu:N` for N trainers on the CPU.
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
    #[arg(long, default_value_t = 86_400)]
    pub give_up_seconds: u64,

    /// Seconds from now at which this machine is taken away: trainers are asked to leave
    /// `--drain-margin` before. Under Slurm, the job's end is taken by itself.
    #[arg(long)]
    pub walltime: Option<u64>,

    /// Seconds before the machine's end at which trainers are asked to leave.
    #[arg(long, default_value_t = 120)]
    pub drain_margin: u64,

    /// End of a Slurm job, in seconds since the Unix epoch.
    #[arg(long, env = "SLURM_JOB_END_TIME", hide = true)]
    pub end_time: Option<u64>,

    /// End when the run that the trainers worked for has ended, instead of waiting for another.
    #[arg(long)]
    pub once: bool,

    /// End when standard input closes: for a parent that starts the agent with a pipe.
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

impl AgentArgs {
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
}

impl TrainerArgs {
    /// Returns how long to try without a coordinator.
    pub fn give_up(&self) -> Duration {
        Duration::from_secs(self.give_up_seconds)
    }
}

/// Most trainers of one agent: more than any node has devices.
pub const DEVICES_MAX: usize = 64;

/// Parses `--devices`.
pub fn parse_devices(text: &str) -> Result<Vec<String>, String> {
    let bad =
        || format!("`--devices {text}`: expected `cpu` or `cpu:N` with N from 1 to {DEVICES_MAX}");
    let count = match text.split_once(':') {
        None if text == "cpu" => 1,
        Some(("cpu", n)) => n.parse::<usize>().map_err(|_| bad())?,
        _ => return Err(bad()),
    };
    if !(1..=DEVICES_MAX).contains(&count) {
        return Err(bad());
    }
    Ok((0..count).map(|i| format!("cpu{i}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices() {
        assert_eq!(parse_devices("cpu").unwrap(), ["cpu0"]);
        assert_eq!(parse_devices("cpu:2").unwrap(), ["cpu0", "cpu1"]);
        for bad in ["", "gpu", "cpu:0", "cpu:65", "cpu:x", "cuda:0"] {
            assert!(parse_devices(bad).unwrap_err().contains("--devices"), "{bad}");
        }
    }
}
