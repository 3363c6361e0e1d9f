//! NCCL on this machine: forms, sums, aborts, survives a peer's death, and forms again.
//!
//! Ranks are processes of this program. Two are on one device, with a host name each
//! (`NCCL_HOSTID`): NCCL takes them for two machines then, and they talk over sockets. So one card
//! is enough; should NCCL refuse even so, what one rank alone does is still known.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use lacuna_collective::{
    AbortHandle, Collective as _, CollectiveError, DeviceCollective as _, Exposure, Group,
    NcclCollective, NcclSetup, TrainerListener,
};
use lacuna_cuda::{DeviceBuffer, PinnedBuffer, Stream};
use lacuna_types::Generation;
use lacuna_worker::args::TransportArgs;
use serde_json::{Value, json};

/// Longest time of one operation, forming included.
const PATIENT: Duration = Duration::from_secs(60);
/// Longest time of the whole check.
const DEADLINE: Duration = Duration::from_secs(180);
/// Numbers of a sum: the gradients of a small model.
const N: usize = 3 << 20;

/// `lacuna-worker gpu-check-rank`: one of them.
#[derive(Args, Debug)]
pub struct RankArgs {
    /// Place in the group.
    #[arg(long)]
    rank: usize,
    /// How to reach NCCL and the driver.
    #[command(flatten)]
    transport: TransportArgs,
}

/// What a rank says: `aborted` alone, and `summing` and `lost` with a peer.
const STEPS: [&str; 8] =
    ["listening", "formed", "summed", "aborted", "summing", "lost", "left", "reformed"];

/// Runs one rank: forms, sums, aborts, forms again.
pub fn single(transport: &TransportArgs) -> anyhow::Result<(bool, String, Value)> {
    let started = Instant::now();
    let mut rank = Rank::start(0, transport)?;
    let address = rank.hear("listening")?;
    rank.tell(&address)?;
    let mut heard: Vec<Value> = Vec::new();
    for step in ["formed", "summed", "aborted", "left", "reformed"] {
        heard.push(json!({ "rank": 0, "step": step, "ms": rank.hear(step)? }));
    }
    Ok(outcome(heard, started))
}

/// Runs two ranks, of which one is killed while both sum; the result holds what each said and when.
pub fn pair(transport: &TransportArgs) -> anyhow::Result<(bool, String, Value)> {
    let started = Instant::now();
    let mut ranks: Vec<Rank> =
        (0..2).map(|rank| Rank::start(rank, transport)).collect::<Result<_, _>>()?;
    let addresses: Vec<String> =
        ranks.iter_mut().map(|rank| rank.hear("listening")).collect::<Result<_, _>>()?;
    for rank in &mut ranks {
        rank.tell(&addresses.join(" "))?;
    }
    let mut heard: Vec<Value> = Vec::new();
    for rank in &mut ranks {
        for step in ["formed", "summed"] {
            let took = rank.hear(step)?;
            heard.push(json!({ "rank": rank.rank, "step": step, "ms": took }));
        }
    }
    for rank in &mut ranks {
        rank.hear("summing")?;
    }
    // Both sum without a pause, so it mostly dies inside a sum.
    ranks[1].child.kill().context("kill rank 1")?;
    for step in ["lost", "left", "reformed"] {
        heard.push(json!({ "rank": 0, "step": step, "ms": ranks[0].hear(step)? }));
    }
    Ok(outcome(heard, started))
}

/// Puts what was heard into a line for people and the detail of an item.
fn outcome(heard: Vec<Value>, started: Instant) -> (bool, String, Value) {
    let text: Vec<String> = heard
        .iter()
        .filter(|entry| entry["rank"] == 0)
        .map(|entry| format!("{} {} ms", entry["step"], entry["ms"]).replace('"', ""))
        .collect();
    let detail = json!({ "heard": heard, "seconds": started.elapsed().as_secs_f64() });
    (true, text.join(", "), detail)
}

/// A rank's process, seen from the check.
struct Rank {
    rank: usize,
    child: Child,
    lines: Receiver<String>,
    end: Instant,
}

impl Rank {
    fn start(rank: usize, transport: &TransportArgs) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe().context("find this program")?)
            .arg("gpu-check-rank")
            .args(["--rank", &rank.to_string()])
            .args(transport.to_args())
            .env("NCCL_HOSTID", format!("lacuna-gpu-check-{rank}"))
            .env("NCCL_SOCKET_IFNAME", "lo")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a rank")?;
        let stdout = child.stdout.take().expect("stdout is a pipe");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            // Ends with the process, or when nobody listens any more.
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { rank, child, lines, end: Instant::now() + DEADLINE })
    }

    /// Waits for the line of a step and returns what it says.
    fn hear(&mut self, step: &str) -> anyhow::Result<String> {
        let line = loop {
            let left = self.end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                // NCCL says things there too.
                Ok(line) if !STEPS.iter().any(|step| line.starts_with(step)) => {}
                Ok(line) => break line,
                Err(RecvTimeoutError::Timeout) => bail!("rank {} did not say `{step}`", self.rank),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("rank {} ended before it said `{step}`", self.rank)
                }
            }
        };
        let said = line.strip_prefix(step).map(|rest| rest.trim().to_string());
        said.with_context(|| format!("rank {} said `{line}`, not `{step}`", self.rank))
    }

    fn tell(&mut self, line: &str) -> anyhow::Result<()> {
        let stdin = self.child.stdin.as_mut().expect("stdin is a pipe");
        writeln!(stdin, "{line}").with_context(|| format!("write to rank {}", self.rank))
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // Fails only where it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Brings NCCL into this process, where no file is named.
pub fn prepare(args: &RankArgs) -> anyhow::Result<()> {
    if args.transport.nccl_library.is_none() {
        lacuna_mae::cuda::load()?;
    }
    Ok(())
}

/// Is one of the ranks.
pub fn rank(args: &RankArgs) -> anyhow::Result<u8> {
    let transport = &args.transport;
    let setup =
        NcclSetup::open(0, transport.nccl_library.as_deref(), transport.cuda_library.as_deref())?;
    let listener =
        TrainerListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)), None, Exposure::Loopback)?;
    say("listening", listener.advertised());
    let members: Result<Vec<SocketAddr>, _> = heard()?.split(' ').map(str::parse).collect();
    let members = members.context("read the members")?;
    let group = |generation: u64, rank: usize, members: Vec<SocketAddr>| Group {
        run: "gpu-check".parse().expect("a name"),
        generation: Generation(generation),
        rank,
        members,
        key: [7; 32],
    };
    let form = |group: &Group| {
        NcclCollective::connect(&listener, group, &setup, AbortHandle::new(), PATIENT)
    };
    let mut comm = timed("formed", || Ok(form(&group(1, args.rank, members.clone()))?))?;
    timed("summed", || sum(&setup, &mut comm))?;
    match members.len() {
        1 => timed("aborted", || {
            comm.abort_handle().abort("to see whether it can be");
            let aborted = comm.barrier(PATIENT);
            ensure!(matches!(aborted, Err(CollectiveError::Aborted { .. })), "{aborted:?}");
            Ok(())
        })?,
        _ => lose_the_peer(&mut comm)?,
    }
    timed("left", || Ok(comm.leave()?))?;
    let mut alone = timed("reformed", || Ok(form(&group(2, 0, vec![members[0]]))?))?;
    sum(&setup, &mut alone)?;
    Ok(0)
}

/// Sums without a pause until rank 1 is gone.
fn lose_the_peer(comm: &mut NcclCollective) -> anyhow::Result<()> {
    let mut values: Vec<i64> = vec![1; N];
    say("summing", 0);
    let end = Instant::now() + PATIENT;
    let lost = timed("lost", || {
        loop {
            if let Err(error) = comm.all_reduce_i64(&mut values, PATIENT) {
                return Ok(error);
            }
            ensure!(Instant::now() < end, "nobody killed rank 1");
        }
    })?;
    let is_named = matches!(lost, CollectiveError::PeerLost { rank: 1, .. });
    ensure!(is_named, "rank 1 was killed, and rank 0 saw: {lost:?}");
    Ok(())
}

/// Sums on the device and over the host, and compares every number.
fn sum(setup: &NcclSetup, comm: &mut NcclCollective) -> anyhow::Result<()> {
    let (rank, world) = (comm.rank() as i64, comm.world() as i64);
    let value = |rank: i64, idx: usize| (idx as i64 - 1_000_000).wrapping_mul(rank + 1) << 20;
    let expected = |idx: usize| (0..world).map(|rank| value(rank, idx)).sum::<i64>();
    let values: Vec<i64> = (0..N).map(|idx| value(rank, idx)).collect();
    let mut there = values.clone();
    comm.all_reduce_i64(&mut there, PATIENT)?;
    let wrong = there.iter().enumerate().find(|(idx, sum)| **sum != expected(*idx));
    ensure!(wrong.is_none(), "the sum over the host is wrong: {wrong:?}");

    let device = setup.device();
    let stream = Stream::legacy(device);
    let mut host = PinnedBuffer::new(device, N * 8)?;
    let mut buffer = DeviceBuffer::new(device, N * 8)?;
    host.bytes_mut().copy_from_slice(bytemuck::cast_slice(&values));
    // SAFETY: the sum follows the copy on the device, and both buffers outlive it.
    unsafe { buffer.load(&host, N * 8, &stream) }?;
    comm.all_reduce_i64_there(&mut buffer, N, &stream, PATIENT)?;
    // SAFETY: nothing else uses the buffers until the wait below is over.
    unsafe { buffer.store(&mut host, N * 8, &stream) }?;
    let end = Instant::now() + PATIENT;
    while !stream.is_idle()? {
        ensure!(Instant::now() < end, "the device does not come to an end");
        std::thread::yield_now();
    }
    let sums: &[i64] = bytemuck::cast_slice(host.bytes());
    let wrong = sums.iter().enumerate().find(|(idx, sum)| **sum != expected(*idx));
    ensure!(wrong.is_none(), "the sum on the device is wrong: {wrong:?}");

    let mut floats = vec![0.5f32; 1000];
    comm.all_reduce_f32(&mut floats, PATIENT)?;
    ensure!(floats.iter().all(|sum| *sum == 0.5 * world as f32), "the sum of floats is wrong");
    Ok(())
}

/// Does something and says how long it took.
fn timed<T>(step: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let started = Instant::now();
    let done = work().with_context(|| format!("not {step}"))?;
    say(step, started.elapsed().as_millis());
    Ok(done)
}

fn say(step: &str, what: impl std::fmt::Display) {
    println!("{step} {what}");
}

fn heard() -> anyhow::Result<String> {
    let mut line = String::new();
    let n = std::io::stdin().lock().read_line(&mut line).context("read a line")?;
    ensure!(n > 0, "the check is gone");
    Ok(line.trim().to_string())
}
