//! What is measured of a coordinator from outside.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use lacuna_api::client::Client;
use lacuna_api::v1;

/// Ticks a second of the times in `/proc`; the same on every Linux that Rust runs on.
const TICKS: f64 = 100.0;

/// A process by its number.
#[derive(Clone, Copy, Debug)]
pub struct Subject(pub u32);

impl Subject {
    /// Returns the processor time that it has used.
    pub fn cpu(self) -> anyhow::Result<Duration> {
        let stat =
            std::fs::read_to_string(format!("/proc/{}/stat", self.0)).context("read stat")?;
        let (_, rest) = stat.rsplit_once(')').context("read stat")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        ensure!(fields.len() > 12, "stat is short");
        // utime and stime, 14 and 15 of proc(5); the first here is 3.
        let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
        Ok(Duration::from_secs_f64(ticks / TICKS))
    }

    /// Returns a size of its memory in MiB: `VmRSS`, or `VmHWM` for the most it ever was.
    pub fn memory(self, what: &str) -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0));
        let status = status.context("read status")?;
        let line = status.lines().find_map(|l| l.strip_prefix(what)?.strip_prefix(':'));
        let kib = line.and_then(|l| l.split_whitespace().next()).context("read status")?;
        Ok(kib.parse::<f64>()? / 1024.0)
    }

    /// Returns the share of one processor that it uses over `time`, in percent.
    pub async fn cpu_share(self, time: Duration) -> anyhow::Result<f64> {
        let (before, started) = (self.cpu()?, Instant::now());
        tokio::time::sleep(time).await;
        let used = self.cpu()? - before;
        Ok(100.0 * used.as_secs_f64() / started.elapsed().as_secs_f64())
    }
}

/// A call to a coordinator.
#[derive(Clone, Copy, Debug)]
pub enum Call<'a> {
    /// The least there is.
    Info,
    /// One run.
    Get(&'a str),
    /// All runs.
    List,
    /// All workers.
    Workers,
    /// A run that is there already.
    Create(&'a v1::CreateRunRequest),
}

impl Call<'_> {
    async fn once(self, client: &mut Client) -> anyhow::Result<()> {
        match self {
            Call::Info => client.info().await.map(|_| ())?,
            Call::Get(run) => client.get_run(run).await.map(|_| ())?,
            Call::List => client.list_runs().await.map(|_| ())?,
            Call::Workers => client.list_workers().await.map(|_| ())?,
            Call::Create(request) => client.create_run(request.clone()).await.map(|_| ())?,
        }
        Ok(())
    }
}

/// Times `n` calls, `pause` apart; in milliseconds, ascending.
pub async fn latencies(
    client: &mut Client,
    call: Call<'_>,
    n: usize,
    pause: Duration,
) -> anyhow::Result<Vec<f64>> {
    let mut times: Vec<f64> = Vec::new();
    for _ in 0..n {
        let started = Instant::now();
        call.once(client).await?;
        times.push(started.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(pause).await;
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

/// Times the least call again and again until dropped; returns the longest, in milliseconds.
pub async fn longest(client: &mut Client, stop: tokio::sync::oneshot::Receiver<()>) -> f64 {
    let mut longest: f64 = 0.0;
    let mut stop = std::pin::pin!(stop);
    loop {
        let started = Instant::now();
        // A coordinator that is gone is noticed by everything else.
        let _ = Call::Info.once(client).await;
        longest = longest.max(started.elapsed().as_secs_f64() * 1e3);
        tokio::select! {
            _ = &mut stop => return longest,
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
    }
}

/// Returns the value that a share of all is not above.
pub fn quantile(ascending: &[f64], share: f64) -> f64 {
    let last = ascending.len().saturating_sub(1);
    ascending.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
}
