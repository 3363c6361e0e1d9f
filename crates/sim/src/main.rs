//! `lacuna-sim`: histories by the thousand, and one at a time.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use lacuna_sim::bugs::Bug;
use lacuna_sim::coverage::Coverage;
use lacuna_sim::goodput::{self, Cell};
use lacuna_sim::history::{draw, play};
use lacuna_sim::script::Script;
use lacuna_sim::shrink::shrink;
use lacuna_sim::world::Detail;

const USAGE: &str = "\
usage:
  lacuna-sim run --seeds A..B [--plant BUG] [--keep-going] [--coverage]
  lacuna-sim replay SEED [--plant BUG] [--shrink] [--messages]
  lacuna-sim play FILE [--messages]
  lacuna-sim goodput [--workers N] [--slots V] [--slot-ms N] [--mean S] [--latency-ms N]
      [--warm-ms N] [--load-ms N] [--heal-ms N] [--checkpoint STEPS] [--seconds S] [--seed N]
";

/// Lines of a long transcript that are shown of its beginning, and of its end.
const SHOWN: usize = 150;
/// So many histories must meet every pair that has no reason not to be met; fewer need not.
const COVERING: u64 = 100_000;
/// Seeds that a thread takes at once.
const CHUNK: u64 = 64;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match args.first().map(String::as_str) {
        Some("run") => run(&args[1..]),
        Some("replay") => replay(&args[1..]),
        Some("goodput") => play_goodput(&args[1..]),
        Some("play") => play_file(&args[1..]),
        _ => Err(USAGE.to_string()),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(why) => {
            eprintln!("{why}");
            ExitCode::from(2)
        }
    }
}

/// Returns the value of a flag.
fn value<'a>(args: &'a [String], flag: &str) -> Option<&'a str> {
    let at = args.iter().position(|arg| arg == flag)?;
    args.get(at + 1).map(String::as_str)
}

fn has(args: &[String], flag: &str) -> bool {
    args.iter().any(|arg| arg == flag)
}

fn detail(args: &[String]) -> Detail {
    if has(args, "--messages") { Detail::Messages } else { Detail::Notes }
}

fn planted(args: &[String]) -> Result<Bug, String> {
    value(args, "--plant").map_or(Ok(Bug::None), str::parse)
}

/// What threads found.
#[derive(Default)]
struct Found {
    coverage: Coverage,
    failed: Vec<(u64, String)>,
    events: u64,
    generations: u64,
    commits: u64,
}

fn run(args: &[String]) -> Result<bool, String> {
    let bad = || "`--seeds` takes A..B".to_string();
    let (from, to) =
        value(args, "--seeds").unwrap_or("0..1000").split_once("..").ok_or_else(bad)?;
    let (from, to): (u64, u64) = (from.parse().map_err(|_| bad())?, to.parse().map_err(|_| bad())?);
    let plant = planted(args)?;
    let keep_going = has(args, "--keep-going");
    let started = Instant::now();
    let next = AtomicU64::new(from);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut all = Found::default();
    std::thread::scope(|scope| {
        let work = || search(&next, to, plant, keep_going);
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for handle in handles {
            let found = handle.join().expect("a history does not panic");
            all.coverage.add(&found.coverage);
            all.failed.extend(found.failed);
            all.events += found.events;
            all.generations += found.generations;
            all.commits += found.commits;
        }
    });
    let played = next.load(Ordering::Relaxed).min(to) - from;
    let seconds = started.elapsed().as_secs_f64();
    all.failed.sort();
    for (seed, why) in &all.failed {
        println!("seed {seed}: {why}");
    }
    let mut gaps = if has(args, "--coverage") && all.failed.is_empty() { report(&all) } else { 0 };
    if played < COVERING {
        gaps = 0;
    }
    println!(
        "{played} histories in {seconds:.1} s ({:.0}/s): {} events, {} generations, {} \
         checkpoints; {} failed",
        played as f64 / seconds,
        all.events,
        all.generations,
        all.commits,
        all.failed.len()
    );
    if let Some((seed, _)) = all.failed.first().filter(|_| !keep_going) {
        show_shrunk(&draw(*seed, plant), detail(args));
    }
    Ok(all.failed.is_empty() && gaps == 0)
}

/// Prints where the machines were; returns how many pairs need a reason.
fn report(all: &Found) -> usize {
    print!("{}", all.coverage.tables());
    let gaps = all.coverage.problems();
    for gap in &gaps {
        println!("coverage: {gap}");
    }
    gaps.len()
}

fn search(next: &AtomicU64, to: u64, plant: Bug, keep_going: bool) -> Found {
    let mut found = Found::default();
    loop {
        let from = next.fetch_add(CHUNK, Ordering::Relaxed);
        for seed in from..(from + CHUNK).min(to) {
            let outcome = play(&draw(seed, plant), Detail::None);
            found.coverage.add(&outcome.coverage);
            found.events += outcome.counts.events;
            found.generations += outcome.counts.generations;
            found.commits += outcome.counts.commits;
            if let Some(violation) = outcome.violation {
                found.failed.push((seed, violation.to_string()));
                if !keep_going {
                    next.store(to, Ordering::Relaxed);
                    return found;
                }
            }
        }
        if from + CHUNK >= to {
            return found;
        }
    }
}

fn replay(args: &[String]) -> Result<bool, String> {
    let seed = args.first().and_then(|text| text.parse().ok()).ok_or("`replay` takes a seed")?;
    let script = draw(seed, planted(args)?);
    if has(args, "--shrink") {
        show_shrunk(&script, detail(args));
        return Ok(false);
    }
    Ok(show(&script, detail(args)))
}

fn play_file(args: &[String]) -> Result<bool, String> {
    let path = args.first().ok_or("`play` takes a file")?;
    let text = std::fs::read_to_string(path).map_err(|err| format!("{path}: {err}"))?;
    let commands = text.split("\n----").next().unwrap_or_default();
    let script = commands.parse().map_err(|why| format!("{path}: {why}"))?;
    Ok(show(&script, detail(args)))
}

fn play_goodput(args: &[String]) -> Result<bool, String> {
    let mut cell = Cell::default();
    for pair in args.chunks(2) {
        let [flag, value] = pair else { return Err(USAGE.to_string()) };
        cell.set(flag, value)?;
    }
    print!("{}", goodput::play(&cell)?);
    Ok(true)
}

/// Prints a script with what happens; tells whether all invariants held.
fn show(script: &Script, detail: Detail) -> bool {
    print!("{script}");
    println!("----");
    let outcome = play(script, detail);
    let hidden = outcome.transcript.len().saturating_sub(2 * SHOWN);
    for (at, line) in outcome.transcript.iter().enumerate() {
        if hidden == 0 || at < SHOWN || at >= SHOWN + hidden {
            println!("{line}");
        } else if at == SHOWN {
            println!("         … {hidden} lines …");
        }
    }
    outcome.violation.is_none()
}

fn show_shrunk(script: &Script, detail: Detail) {
    match play(script, Detail::None).violation {
        Some(violation) => {
            println!("\nshortest history found that violates {}:\n", violation.invariant);
            show(&shrink(script, violation.invariant), detail);
        }
        None => println!("this history violates nothing"),
    }
}
