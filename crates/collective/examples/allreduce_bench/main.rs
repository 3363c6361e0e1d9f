//! Times all-reduces between processes on this machine; prints one line of JSON.
//!
//! ```text
//! cargo run --release -p lacuna-collective --example allreduce_bench -- 2 f32 100000000 20
//! ```
//!
//! Arguments: world, element type (`f32`, `i32` or `i64`), bytes, repetitions, and then, for a slow
//! network, megabits a second into each member. `exact32` is `i32` with what the exact sum of 32
//! bits sends beside it. `f32-sockets` and so on share no memory, which a slow network implies.

mod throttle;

use std::error::Error;
use std::io::{BufRead, BufReader, Write, stdin};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lacuna_collective::{
    AbortHandle, Collective, CollectiveError, Exposure, Group, TcpCollective, TrainerListener,
};
use lacuna_types::Generation;

const DEADLINE: Duration = Duration::from_secs(60);
/// Lanes of the control word.
const WORD: usize = 16;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let text = |idx: usize, default: &'static str| -> &str {
        args.get(idx).map_or(default, String::as_str)
    };
    let (world, kind) = (text(0, "2").parse()?, text(1, "f32"));
    let (n_bytes, repeats) = (text(2, "100000000").parse()?, text(3, "20").parse()?);
    let megabits: f64 = text(4, "0").parse()?;
    match args.get(5) {
        Some(rank) => member(rank.parse()?, kind, n_bytes, repeats),
        None => launch(world, kind, n_bytes, repeats, megabits),
    }
}

/// Starts one process per rank and tells each the addresses of all.
fn launch(
    world: usize,
    kind: &str,
    n_bytes: usize,
    repeats: usize,
    megabits: f64,
) -> Result<(), Box<dyn Error>> {
    let slow = megabits > 0.0;
    let kind =
        if slow { format!("{}-sockets", kind.trim_end_matches("-sockets")) } else { kind.into() };
    let mut children: Vec<Child> = Vec::new();
    for rank in 0..world {
        let numbers = [world, n_bytes, repeats, rank].map(|number| number.to_string());
        let child = Command::new(std::env::current_exe()?)
            .args([&numbers[0], &kind, &numbers[1], &numbers[2], "0", &numbers[3]])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        children.push(child);
    }
    let mut outputs: Vec<_> =
        children.iter_mut().filter_map(|child| child.stdout.take()).map(BufReader::new).collect();
    let mut members = String::new();
    for output in &mut outputs {
        let mut line = String::new();
        output.read_line(&mut line)?;
        if slow {
            let address = throttle::in_front_of(line.trim().parse()?, megabits * 1e6)?;
            line = format!("{address}\n");
        }
        members.push_str(&line);
    }
    for child in &mut children {
        let mut input = child.stdin.take().ok_or("a child has no input")?;
        input.write_all(members.as_bytes())?;
    }
    let mut result = String::new();
    outputs[0].read_line(&mut result)?;
    for child in &mut children {
        if !child.wait()?.success() {
            return Err("a rank failed".into());
        }
    }
    print!("{result}");
    Ok(())
}

/// Runs one rank: prints its address, reads all of them, reduces, prints the times on rank 0.
fn member(rank: usize, kind: &str, n_bytes: usize, repeats: usize) -> Result<(), Box<dyn Error>> {
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let (kind, sockets) = kind.strip_suffix("-sockets").map_or((kind, false), |kind| (kind, true));
    let listener =
        TrainerListener::bind(any_port, sockets.then_some(any_port), Exposure::Loopback)?;
    println!("{}", listener.advertised());
    let mut members: Vec<SocketAddr> = Vec::new();
    for line in stdin().lines() {
        members.push(line?.parse()?);
    }
    let world: usize = members.len();
    let generation = Generation(1);
    let group = Group { run: "bench".parse()?, generation, rank, members, key: [7; 32] };
    let abort = AbortHandle::new();
    let mut collective = TcpCollective::connect(&listener, &group, abort, DEADLINE)?;
    let mut times_ms: Vec<f64> = match kind {
        "f32" => {
            let mut buffer: Vec<f32> = vec![0.0; n_bytes / 4];
            time(&mut collective, repeats, |comm| comm.all_reduce_f32(&mut buffer, DEADLINE))?
        }
        "i32" => {
            let mut buffer: Vec<i32> = vec![0; n_bytes / 4];
            time(&mut collective, repeats, |comm| comm.all_reduce_i32(&mut buffer, DEADLINE))?
        }
        "fast" => {
            let mut buffer: Vec<f32> = vec![0.0; n_bytes / 4];
            let mut word: Vec<i64> = vec![0; WORD];
            time(&mut collective, repeats, |comm| {
                comm.all_reduce_f32(&mut buffer, DEADLINE)?;
                comm.all_reduce_i64(&mut word, DEADLINE)
            })?
        }
        "exact" => {
            let mut buffer: Vec<i64> = vec![0; n_bytes / 8];
            let mut word: Vec<i64> = vec![0; WORD];
            time(&mut collective, repeats, |comm| {
                comm.all_reduce_i64(&mut buffer, DEADLINE)?;
                comm.all_reduce_i64(&mut word, DEADLINE)
            })?
        }
        "exact32" => {
            let mut buffer: Vec<i32> = vec![0; n_bytes / 4];
            // The control word, and a magnitude every 2048 elements.
            let mut tail: Vec<i64> = vec![0; WORD + n_bytes / 4 / 2048];
            time(&mut collective, repeats, |comm| {
                comm.all_reduce_i32(&mut buffer, DEADLINE)?;
                comm.all_reduce_i64(&mut tail, DEADLINE)
            })?
        }
        "i64" => {
            let mut buffer: Vec<i64> = vec![0; n_bytes / 8];
            time(&mut collective, repeats, |comm| comm.all_reduce_i64(&mut buffer, DEADLINE))?
        }
        _ => return Err(format!("unknown element type `{kind}`").into()),
    };
    times_ms.sort_by(f64::total_cmp);
    if rank == 0 {
        let (min, median) = (times_ms[0], times_ms[repeats / 2]);
        let (max, rate) = (times_ms[repeats - 1], n_bytes as f64 / median / 1e6);
        println!(
            "{{\"world\": {world}, \"type\": \"{kind}\", \"bytes\": {n_bytes}, \
             \"repeats\": {repeats}, \"min_ms\": {min:.3}, \"median_ms\": {median:.3}, \
             \"max_ms\": {max:.3}, \"buffer_gb_per_s\": {rate:.3}}}"
        );
    }
    collective.barrier(DEADLINE)?;
    Ok(())
}

/// Times `repeats` calls, after three that fault pages in and grow the socket buffers.
/// Everybody begins at one time, as the peer's processes do.
fn time(
    comm: &mut TcpCollective,
    repeats: usize,
    mut call: impl FnMut(&mut TcpCollective) -> Result<(), CollectiveError>,
) -> Result<Vec<f64>, CollectiveError> {
    let mut times_ms: Vec<f64> = Vec::new();
    for idx in 0..repeats + 3 {
        comm.barrier(DEADLINE)?;
        let started = Instant::now();
        call(comm)?;
        if idx >= 3 {
            times_ms.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(times_ms)
}
