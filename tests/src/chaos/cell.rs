//! One run of the matrix, from the first process to the last.

use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::Row;
use super::inject::{Injector, node_name};
use super::verdict::{Marks, Tally, judge};
use crate::dice::Dice;
use crate::history::Heard;
use crate::rig::{Bench, Rig, RunSpec};

/// Slots of a step: all worlds of the matrix share them out evenly.
const SLOTS: u64 = 30;
/// A step's time in every world, so that the same number of steps is under fire as long.
const STEP_MS: u64 = 30;
/// Name of every run.
const RUN: &str = "chaos";
/// Longest time for a cell without its faults: forming may take two minutes until it is given up.
const LIMIT: Duration = Duration::from_secs(240);
/// Events in a report.
const EVENTS: usize = 60;

/// A cell.
#[derive(Clone, Debug)]
pub struct Cell {
    /// Kind of faults.
    pub row: Row,
    /// Workers.
    pub world: usize,
    /// Draws the faults.
    pub seed: u64,
    /// Steps of the run.
    pub steps: u64,
    /// Most faults.
    pub faults: usize,
}

/// What came of a cell.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Faults that were done.
    pub faults: Vec<String>,
    /// What is wrong; empty if nothing.
    pub problems: Vec<String>,
    /// Counts of its history.
    pub tally: Tally,
    /// Time it took.
    pub took: Duration,
    /// The last events.
    pub events: String,
    /// Ends of logs, if something is wrong.
    pub tail: String,
}

/// Returns the digest that every run of `steps` steps must end with: that of an undisturbed worker.
pub fn reference(bench: &Bench, steps: u64) -> anyhow::Result<u64> {
    let mut rig = Rig::start(bench, Duration::ZERO)?;
    let history = rig.submit(&spec(steps, 1))?;
    rig.add(&node_name(0))?;
    let run = rig.wait_end(&history, RUN, LIMIT)?;
    run.final_digest.with_context(|| format!("no digest: {}", history.look(|h| h.text(EVENTS))))
}

fn spec(steps: u64, most: usize) -> RunSpec {
    RunSpec {
        name: RUN.into(),
        steps,
        slots: SLOTS,
        workers: (1, most),
        checkpoint_steps: 25,
        digest_every: 5,
        track_every: 1,
    }
}

/// Runs a cell and compares its end with the `want`ed digest.
pub fn run(bench: &Bench, cell: &Cell, want: u64) -> Outcome {
    let started = Instant::now();
    let mut outcome = Outcome::default();
    if let Err(err) = run_inner(bench, cell, want, &mut outcome) {
        outcome.problems.push(format!("{err:#}"));
    }
    outcome.took = started.elapsed();
    outcome
}

fn run_inner(bench: &Bench, cell: &Cell, want: u64, outcome: &mut Outcome) -> anyhow::Result<()> {
    let slot = Duration::from_millis(STEP_MS * cell.world as u64 / SLOTS);
    let mut rig = Rig::start(bench, slot)?;
    let history = rig.submit(&spec(cell.steps, cell.world + 1))?;
    for k in 0..cell.world {
        rig.add(&node_name(k))?;
    }
    let mut injector = Injector {
        rig: &mut rig,
        history: &history,
        run: RUN.into(),
        dice: Dice::named(cell.seed, &format!("{}/{}", cell.row, cell.world)),
        world: cell.world,
        done: Vec::new(),
        problems: Vec::new(),
        joined: 0,
    };
    // The last faults come early enough to see the run recover from them.
    let injected = injector.run(cell.row, cell.faults, cell.steps * 9 / 10);
    outcome.faults = std::mem::take(&mut injector.done);
    outcome.problems.append(&mut injector.problems);
    let ended = injected
        .and_then(|()| rig.mend())
        .and_then(|()| rig.wait_end(&history, RUN, LIMIT))
        .map(|run| check_end(&run, cell, want, outcome));
    if let Err(err) = ended {
        outcome.problems.push(format!("{err:#}"));
    }
    check_history(&history.heard(), cell, outcome);
    check_checkpoints(&rig, outcome)?;
    let left = rig.end_nodes();
    if !left.is_empty() {
        outcome.problems.push(format!("processes {left:?} outlived their agents"));
    }
    check_logs(&rig, outcome);
    outcome.events = history.look(|heard| heard.text(EVENTS));
    if !outcome.problems.is_empty() {
        outcome.tail = rig.tails();
    }
    Ok(())
}

fn check_end(run: &lacuna_api::v1::Run, cell: &Cell, want: u64, outcome: &mut Outcome) {
    if run.state != "finished" || run.step != cell.steps {
        let text = format!("the run is {} at step {}: {}", run.state, run.step, run.why);
        outcome.problems.push(text);
    } else if run.final_digest != Some(want) {
        let got = run.final_digest.unwrap_or(0);
        outcome.problems.push(format!("final digest {got:016x}, undisturbed {want:016x}"));
    }
}

fn check_history(heard: &Heard, cell: &Cell, outcome: &mut Outcome) {
    let marks = match cell.row {
        Row::Quiet | Row::Kills | Row::JoinDrain => Marks::Complete,
        Row::Coordinator | Row::Stops | Row::Partitions | Row::Hangs | Row::Mixed => Marks::Sparse,
    };
    let (problems, tally) = judge(heard, marks);
    outcome.problems.extend(problems);
    outcome.tally = tally;
}

fn check_checkpoints(rig: &Rig<'_>, outcome: &mut Outcome) -> anyhow::Result<()> {
    let output = rig.lacuna(&["ckpt", "verify", &format!("ckpt/{RUN}"), "--all"])?;
    let (code, out, err) = crate::said(&output);
    if code != 0 {
        outcome.problems.push(format!("checkpoints: exit code {code}: {out}{err}"));
    }
    Ok(())
}

fn check_logs(rig: &Rig<'_>, outcome: &mut Outcome) {
    for (name, text) in rig.logs() {
        if let Some(line) = text.lines().find(|line| line.contains("panicked at")) {
            outcome.problems.push(format!("{name}: {line}"));
        }
    }
}
