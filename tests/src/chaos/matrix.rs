//! The whole matrix, round after round until the time is over.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Row;
use super::cell::{self, Cell, Outcome};
use crate::rig::Bench;

/// What to run.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Kinds of faults.
    pub rows: Vec<Row>,
    /// Numbers of workers.
    pub worlds: Vec<usize>,
    /// Seed of the first round; the next has the next.
    pub seed: u64,
    /// No cell starts once this has passed, and none of a second round if it is zero.
    pub time: Duration,
    /// Steps of a run.
    pub steps: u64,
    /// Most faults of a run.
    pub faults: usize,
    /// Whether faults and events of cells that passed are printed too.
    pub verbose: bool,
}

/// What was seen of one cell over all rounds.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    passed: usize,
    failed: usize,
    faults: usize,
    generations: usize,
    redone: u64,
}

/// Runs the matrix, says how it goes on stderr and prints a table; returns the number of failures.
pub fn run(bench: &Bench, matrix: &Matrix) -> anyhow::Result<usize> {
    let started = Instant::now();
    let want = cell::reference(bench, matrix.steps)?;
    eprintln!("undisturbed digest after {} steps: {want:016x}", matrix.steps);
    let mut entries: BTreeMap<(Row, usize), Entry> = BTreeMap::new();
    let in_time = |started: Instant| started.elapsed() < matrix.time;
    'rounds: for round in 0.. {
        for &row in &matrix.rows {
            for &world in &matrix.worlds {
                if round > 0 && !in_time(started) {
                    break 'rounds;
                }
                let seed = matrix.seed + round;
                let Matrix { steps, faults, .. } = *matrix;
                let cell = Cell { row, world, seed, steps, faults };
                let outcome = cell::run(bench, &cell, want);
                report(&cell, &outcome, matrix.verbose);
                add(entries.entry((row, world)).or_default(), &outcome);
            }
        }
    }
    print!("{}", table(matrix, &entries));
    let failed: usize = entries.values().map(|entry| entry.failed).sum();
    let took = started.elapsed().as_secs();
    println!("\n{failed} failed, first seed {}, {took} s", matrix.seed);
    Ok(failed)
}

fn add(entry: &mut Entry, outcome: &Outcome) {
    if outcome.problems.is_empty() {
        entry.passed += 1
    } else {
        entry.failed += 1
    }
    entry.faults += outcome.faults.len();
    entry.generations += outcome.tally.generations;
    entry.redone += outcome.tally.redone;
}

fn report(cell: &Cell, outcome: &Outcome, verbose: bool) {
    let word = if outcome.problems.is_empty() { "ok" } else { "FAILED" };
    eprintln!(
        "{word}: {} with {} workers, seed {}: {} faults, {} generations, {} steps redone, {} not \
         heard of, {:.1} s",
        cell.row,
        cell.world,
        cell.seed,
        outcome.faults.len(),
        outcome.tally.generations,
        outcome.tally.redone,
        outcome.tally.unheard,
        outcome.took.as_secs_f64()
    );
    let failed = !outcome.problems.is_empty();
    if verbose || failed {
        eprintln!("faults:\n  {}", outcome.faults.join("\n  "));
        eprintln!("{}", outcome.events);
    }
    if failed {
        eprintln!("problems:\n  {}", outcome.problems.join("\n  "));
        eprintln!("{}", outcome.tail);
        eprintln!(
            "again: lacuna-chaos run --seed {} --rows {} --worlds {} --steps {} --faults {}",
            cell.seed, cell.row, cell.world, cell.steps, cell.faults
        );
    }
}

/// A table in Markdown: passed of run, faults, generations.
fn table(matrix: &Matrix, entries: &BTreeMap<(Row, usize), Entry>) -> String {
    let mut out = String::from("| |");
    for world in &matrix.worlds {
        out += &format!(" {world} workers |");
    }
    out += &format!("\n|---|{}\n", "---|".repeat(matrix.worlds.len()));
    for &row in &matrix.rows {
        out += &format!("| {} |", row.title());
        for &world in &matrix.worlds {
            let Entry { passed, failed, faults, generations, redone } =
                entries.get(&(row, world)).copied().unwrap_or_default();
            let n = passed + failed;
            out += &format!(
                " {passed} of {n} equal; {faults} faults, {generations} generations, {redone} \
                 steps redone |"
            );
        }
        out += "\n";
    }
    out
}
