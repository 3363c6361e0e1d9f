//! Forms a large group on this machine and sums over it; prints one line of JSON.
//!
//! ```text
//! cargo run --release -p lacuna-collective --example mesh -- 256 100000000 3
//! ```
//!
//! Arguments: world, bytes of the sum (i64), repetitions. Members are threads, in as many processes
//! as their sockets need; they share no memory, as members on as many machines would not. All of
//! them share this machine's processors, so look at the processor time of a member, not at the
//! clock.

use std::error::Error;
use std::io::{BufRead, BufReader, Write, stdin};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use lacuna_collective::{AbortHandle, Collective, Exposure, Group, TcpCollective, TrainerListener};
use lacuna_types::Generation;
use rustix::process::{Resource, getrlimit, setrlimit};

const DEADLINE: Duration = Duration::from_secs(600);
/// Open files of a process that are not sockets of members.
const OTHER_FILES: u64 = 100;
/// Processor time in `/proc/self/stat`, in seconds.
const TICK: f64 = 0.01;

/// What is measured: forming, barriers, sums.
const PHASES: usize = 3;
/// Seconds by the clock, and of processor time.
type Times = [(f64, f64); PHASES];

fn main() -> Result<(), Box<dyn Error>> {
    let numbers: Vec<usize> =
        std::env::args().skip(1).map(|arg| arg.parse()).collect::<Result<_, _>>()?;
    let number = |idx: usize, default: usize| numbers.get(idx).copied().unwrap_or(default);
    let (world, n_bytes, repeats) = (number(0, 64), number(1, 1_000_000), number(2, 5));
    match numbers[3.min(numbers.len())..] {
        [first, count] => host(n_bytes / size_of::<i64>(), repeats, first..first + count),
        _ => launch(world, n_bytes, repeats),
    }
}

/// Starts the processes, tells each the addresses of all, and adds up what they measured.
fn launch(world: usize, n_bytes: usize, repeats: usize) -> Result<(), Box<dyn Error>> {
    let limit = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    // One listener and a socket for each other member.
    let per_process = ((limit - OTHER_FILES) as usize / world).clamp(1, world);
    let mut children: Vec<Child> = Vec::new();
    for first in (0..world).step_by(per_process) {
        let count = per_process.min(world - first);
        let args = [world, n_bytes, repeats, first, count].map(|number| number.to_string());
        let mut command = Command::new(std::env::current_exe()?);
        children.push(command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
    }
    let mut outputs: Vec<_> =
        children.iter_mut().filter_map(|child| child.stdout.take()).map(BufReader::new).collect();
    let mut line = String::new();
    let mut members = String::new();
    for output in &mut outputs {
        line.clear();
        output.read_line(&mut line)?;
        members.push_str(&line);
    }
    for child in &mut children {
        let mut input = child.stdin.take().ok_or("a child has no input")?;
        writeln!(input, "{}", members.replace('\n', " ").trim())?;
    }
    let mut total: Times = Default::default();
    for (output, child) in outputs.iter_mut().zip(&mut children) {
        line.clear();
        output.read_line(&mut line)?;
        let numbers: Vec<f64> =
            line.split_whitespace().map(|word| word.parse()).collect::<Result<_, _>>()?;
        for (phase, times) in total.iter_mut().zip(numbers.chunks_exact(2)) {
            *phase = (phase.0.max(times[0]), phase.1 + times[1]);
        }
        if !child.wait()?.success() {
            return Err("a member failed".into());
        }
    }
    let [form, barrier, sum] = total;
    let of_member = |cpu: f64, n: usize| cpu / (world * n) as f64 * 1e3;
    println!(
        "{{\"world\":{world},\"processes\":{},\"bytes\":{n_bytes},\"form_s\":{:.2},\
         \"form_cpu_ms_per_member\":{:.1},\"barrier_cpu_ms_per_member\":{:.2},\"sum_s\":{:.3},\
         \"sum_cpu_ms_per_member\":{:.2}}}",
        children.len(),
        form.0,
        of_member(form.1, 1),
        of_member(barrier.1, repeats),
        sum.0 / repeats as f64,
        of_member(sum.1, repeats),
    );
    Ok(())
}

/// Is the members `ranks` of the group.
fn host(n: usize, repeats: usize, ranks: std::ops::Range<usize>) -> Result<(), Box<dyn Error>> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    // Members that are reached elsewhere share no memory.
    let bind = |_| TrainerListener::bind(any_port, Some(any_port), Exposure::Loopback);
    let listeners: Vec<TrainerListener> = ranks.clone().map(bind).collect::<Result<_, _>>()?;
    let words: Vec<String> = listeners.iter().map(|one| one.advertised().to_string()).collect();
    println!("{}", words.join(" "));
    let mut line = String::new();
    stdin().read_line(&mut line)?;
    let members: Vec<SocketAddr> =
        line.split_whitespace().map(|word| word.parse()).collect::<Result<_, _>>()?;
    let run = "mesh".parse().map_err(|_| "a name of a run")?;
    let group = Group { run, generation: Generation(1), rank: 0, members, key: [7; 32] };
    let together = Barrier::new(listeners.len());
    let times: Vec<Times> = thread::scope(|scope| {
        let start = |(listener, rank): (_, usize)| {
            let (group, together) = (Group { rank, ..group.clone() }, &together);
            scope.spawn(move || member(listener, &group, n, repeats, together))
        };
        let threads: Vec<_> = listeners.iter().zip(ranks).map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("a member failed")).collect()
    });
    assert_eq!(times.len(), listeners.len());
    let words = times[0].iter().map(|(clock, cpu)| format!("{clock} {cpu}")).collect::<Vec<_>>();
    println!("{}", words.join(" "));
    Ok(())
}

/// Forms the group, waits in `repeats` barriers, and sums as often; times are those of the process.
fn member(
    listener: &TrainerListener,
    group: &Group,
    n: usize,
    repeats: usize,
    together: &Barrier,
) -> Times {
    let world = group.members.len();
    let mut times = Times::default();
    let mut timed = |phase: usize, work: &mut dyn FnMut()| {
        together.wait();
        let (clock, cpu) = (Instant::now(), cpu_seconds());
        together.wait();
        work();
        together.wait();
        times[phase] = (clock.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    };
    let mut formed: Option<TcpCollective> = None;
    timed(0, &mut || {
        let made = TcpCollective::connect(listener, group, AbortHandle::new(), DEADLINE);
        formed = Some(made.expect("the group forms"));
    });
    let mut comm = formed.expect("it was formed");
    timed(1, &mut || {
        for _ in 0..repeats {
            comm.barrier(DEADLINE).expect("all members come");
        }
    });
    let mut buffer: Vec<i64> = vec![1; n];
    timed(2, &mut || {
        for _ in 0..repeats {
            buffer.fill(1);
            comm.all_reduce_i64(&mut buffer, DEADLINE).expect("all members sum");
        }
    });
    assert!(buffer.iter().all(|sum| *sum == world as i64), "each counts once");
    times
}

/// Processor time of this process.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("procfs is there");
    // Fields 14 and 15; the name before them, in brackets, may have blanks.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() * TICK
}
