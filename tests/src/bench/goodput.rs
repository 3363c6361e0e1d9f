//! Useful progress under Poisson kills: a group that goes on, against one that starts again from
//! its newest checkpoint.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::stats::{Samples, millis};
use crate::dice::Dice;
use crate::history::{Heard, History, parse_formed};
use crate::rig::{Bench, Rig, RunSpec};

/// Longest wait for a group of full strength at the start.
const START: Duration = Duration::from_secs(60);
/// Steps between the start of a group and the first measured one.
const CALM_STEPS: u64 = 5;
/// Steps of an undisturbed group that give the step's time.
const REFERENCE_STEPS: u64 = 100;
/// Least time between two points of a curve, unless it goes back.
const POINT_MS: f64 = 500.0;
/// Name of the runs.
const RUN: &str = "goodput";
/// More steps than any cell sees.
const ENDLESS: u64 = 100_000_000;

/// What a group does when a member dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The others go on from memory, the dead one comes back as a new process.
    Elastic,
    /// All are ended and started again at once, from the newest checkpoint.
    Restart,
}

impl Policy {
    /// Returns its word.
    pub fn word(self) -> &'static str {
        match self {
            Policy::Elastic => "elastic",
            Policy::Restart => "restart",
        }
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Config {
    /// Members at full strength.
    pub world: usize,
    /// More processes that wait warm; for the elastic group only.
    pub spares: usize,
    /// Slots of a step; with spares so many that they would not make it shorter.
    pub slots: u64,
    /// Least time of a slot.
    pub slot: Duration,
    /// Mean times between two kills.
    pub means: Vec<Duration>,
    /// Length of a cell.
    pub time: Duration,
    /// Steps between two checkpoints, of both policies.
    pub checkpoint_steps: u64,
    /// Draws the kills: the same times and victims for both policies.
    pub seed: u64,
}

/// What came of a cell.
#[derive(Debug)]
pub struct Cell {
    /// What the group does.
    pub policy: Policy,
    /// Mean time between two kills.
    pub mean: Duration,
    /// Kills that found a process.
    pub kills: usize,
    /// Kills whose victim was dead already.
    pub void: usize,
    /// Length.
    pub time: Duration,
    /// Useful steps.
    pub steps: u64,
    /// Steps that were computed and lost.
    pub lost: u64,
    /// Share of an undisturbed group's progress.
    pub goodput: f64,
    /// Kill to the coordinator's word for it.
    pub detect: Samples,
    /// From there to the next generation that trains.
    pub form: Samples,
    /// Kill to full strength.
    pub full: Samples,
    /// Steps of groups at full strength: far from the undisturbed one, the machine was busier.
    pub step: Samples,
    /// Progress.
    pub curve: Vec<Point>,
}

/// Measures the undisturbed step and every cell; returns the step's time and the cells.
pub fn run(bench: &Bench, config: &Config) -> anyhow::Result<(Duration, Vec<Cell>)> {
    let step = reference(bench, config)?;
    eprintln!("undisturbed step: {:.1} ms", millis(step));
    let mut cells = Vec::new();
    for &mean in &config.means {
        for policy in [Policy::Elastic, Policy::Restart] {
            let cell = run_cell(bench, config, policy, mean, step)?;
            eprintln!(
                "{}, a kill each {mean:?}: goodput {:.1} % ({} kills)",
                policy.word(),
                100.0 * cell.goodput,
                cell.kills
            );
            cells.push(cell);
        }
    }
    Ok((step, cells))
}

fn start<'b>(
    bench: &'b Bench,
    config: &Config,
    policy: Policy,
) -> anyhow::Result<(Rig<'b>, History)> {
    let mut rig = Rig::start(bench, config.slot)?;
    let spares = if policy == Policy::Elastic { config.spares } else { 0 };
    let least = if policy == Policy::Restart { config.world } else { 1 };
    let spec = RunSpec {
        name: RUN.into(),
        steps: ENDLESS,
        slots: config.slots,
        workers: (least, config.world + spares),
        checkpoint_steps: config.checkpoint_steps,
        digest_every: 100,
        track_every: 1,
    };
    let history = rig.submit(&spec)?;
    for k in 0..config.world + spares {
        rig.add(&format!("n{k}"))?;
    }
    let world = config.world;
    let calm = move |heard: &Heard| {
        let here = |it: &&crate::history::Applied| it.figures.generation == heard.formed.0;
        let calm = heard.applied.iter().filter(here).count() as u64 >= CALM_STEPS;
        (heard.full(world) && calm).then_some(())
    };
    history.wait("full strength", START, calm)?;
    Ok((rig, history))
}

/// The mean time of an undisturbed step at full strength.
fn reference(bench: &Bench, config: &Config) -> anyhow::Result<Duration> {
    let (_rig, history) = start(bench, config, Policy::Restart)?;
    let from = history.look(Heard::step);
    let reached = |heard: &Heard| (heard.step() >= from + REFERENCE_STEPS).then_some(());
    history.wait("undisturbed steps", START * 2, reached)?;
    history.look(|heard| {
        let inside = |it: &&crate::history::Applied| {
            (from..=from + REFERENCE_STEPS).contains(&it.figures.step)
        };
        let times: Vec<Instant> = heard.applied.iter().filter(inside).map(|it| it.at).collect();
        let (first, last) = times.first().zip(times.last()).context("there are steps")?;
        Ok((*last - *first) / REFERENCE_STEPS as u32)
    })
}

fn run_cell(
    bench: &Bench,
    config: &Config,
    policy: Policy,
    mean: Duration,
    step: Duration,
) -> anyhow::Result<Cell> {
    let (mut rig, history) = start(bench, config, policy)?;
    let mut dice = Dice::named(config.seed, &format!("{mean:?}"));
    let (started, first) = (Instant::now(), history.look(Heard::step));
    let (mut kills, mut void): (Vec<Instant>, usize) = (Vec::new(), 0);
    let mut due = started + dice.exponential(mean);
    while due < started + config.time {
        // Nothing is waited for but the time; a run that rests ends it early, and is seen below.
        let _ = history.until(due.saturating_duration_since(Instant::now()), |_| None::<()>);
        let rest = history.look(|heard| heard.run.exit_code.map(|_| heard.text(12)));
        ensure!(rest.is_none(), "the run came to rest: {}", rest.unwrap_or_default());
        let victim = format!("n{}", dice.below(rig.node_names().len()));
        let at = Instant::now();
        if rig.signal_trainer(&victim, Signal::KILL) {
            kills.push(at);
            if policy == Policy::Restart {
                restart_all(&mut rig)?;
            }
        } else {
            void += 1;
        }
        due += dice.exponential(mean);
    }
    let left = (started + config.time).saturating_duration_since(Instant::now());
    let _ = history.until(left, |_| None::<()>);
    let heard = history.heard();
    let mut cell = tally(&heard, config, (started, first), &kills);
    (cell.policy, cell.mean, cell.void) = (policy, mean, void);
    cell.goodput = cell.steps as f64 * step.as_secs_f64() / cell.time.as_secs_f64();
    Ok(cell)
}

/// What the agents of a static group do: end everybody and start everybody again, at once.
fn restart_all(rig: &mut Rig<'_>) -> anyhow::Result<()> {
    let names = rig.node_names();
    for name in &names {
        rig.signal_trainer(name, Signal::KILL);
        drop(rig.take(name));
    }
    names.iter().try_for_each(|name| rig.add(name))
}

fn tally(heard: &Heard, config: &Config, from: (Instant, u64), kills: &[Instant]) -> Cell {
    let (started, first) = from;
    let end = Instant::now();
    let time = |kind: &'static str, after: Instant| {
        heard.kind(kind).map(|told| told.at).find(|&at| at > after)
    };
    let (mut detect, mut form, mut full) =
        (Samples::default(), Samples::default(), Samples::default());
    for (i, &kill) in kills.iter().enumerate() {
        let next = kills.get(i + 1).copied().unwrap_or(end);
        let Some(lost) = time("lost", kill).filter(|&at| at < next) else { continue };
        detect.add(lost - kill);
        let Some(formed) = time("formed", lost).filter(|&at| at < next) else { continue };
        form.add(formed - lost);
        let is_full = |text: &str| parse_formed(text).is_some_and(|it| it.world == config.world);
        let strong = heard.kind("formed").find(|t| t.at > kill && is_full(&t.event.text));
        if let Some(strong) = strong.filter(|told| told.at < next) {
            full.add(strong.at - kill);
        }
    }
    let (curve, steps, lost) = progress(heard, started, first);
    Cell {
        policy: Policy::Elastic,
        mean: Duration::ZERO,
        kills: kills.len(),
        void: 0,
        time: end - started,
        steps,
        lost,
        goodput: 0.0,
        detect,
        form,
        full,
        step: full_steps(heard, config.world, started),
        curve,
    }
}

/// Times between two steps of one generation of full strength.
fn full_steps(heard: &Heard, world: usize, started: Instant) -> Samples {
    let mut full: BTreeSet<u64> = BTreeSet::new();
    for told in heard.kind("formed") {
        let formed = parse_formed(&told.event.text).filter(|it| it.world == world);
        full.extend(formed.map(|it| it.generation));
    }
    let mut steps = Samples::default();
    for pair in heard.applied.windows(2).filter(|pair| pair[0].at >= started) {
        let [before, after] = [&pair[0].figures, &pair[1].figures];
        if before.generation == after.generation && full.contains(&after.generation) {
            steps.add(pair[1].at - pair[0].at);
        }
    }
    steps
}

/// Milliseconds, generation, step.
pub type Point = (f64, u64, u64);

/// Progress since `started` at step `first`: its curve, the steps that count in the end, and those
/// that were lost.
fn progress(heard: &Heard, started: Instant, first: u64) -> (Vec<Point>, u64, u64) {
    let mut curve: Vec<Point> = Vec::new();
    let (mut before, mut lost): (Point, u64) = ((0.0, 0, 0), 0);
    for applied in heard.applied.iter().filter(|it| it.at >= started) {
        let step = applied.figures.step.saturating_sub(first);
        let point = (millis(applied.at - started), applied.figures.generation, step);
        let back = (before.2 + 1).saturating_sub(step);
        lost += if curve.is_empty() { 0 } else { back };
        let old = curve.last().is_none_or(|last| point.0 - last.0 >= POINT_MS);
        if back > 0 && !curve.is_empty() {
            curve.push(before);
        }
        if back > 0 || old {
            curve.push(point);
        }
        before = point;
    }
    curve.push(before);
    (curve, before.2, lost)
}

/// Returns the table of the cells, Markdown.
pub fn table(cells: &[Cell]) -> String {
    let mut out = String::from(
        "| a kill each | group | kills | useful steps | lost steps | goodput | noticed (p50) | \
         formed (p50) | full strength (p50) | step at full strength (p50) |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for cell in cells {
        let p50 = |samples: &Samples| {
            samples.quantile(0.5).map_or("–".into(), |t| format!("{:.2} s", t.as_secs_f64()))
        };
        out += &format!(
            "| {} s | {} | {} | {} | {} | {:.1} % | {} | {} | {} | {:.1} ms |\n",
            cell.mean.as_secs(),
            cell.policy.word(),
            cell.kills,
            cell.steps,
            cell.lost,
            100.0 * cell.goodput,
            p50(&cell.detect),
            p50(&cell.form),
            p50(&cell.full),
            millis(cell.step.quantile(0.5).unwrap_or_default())
        );
    }
    out
}

/// Returns everything that was measured.
pub fn to_json(config: &Config, step: Duration, cells: &[Cell]) -> Value {
    let cell = |cell: &Cell| {
        json!({
            "policy": cell.policy.word(), "mean_ms": millis(cell.mean), "kills": cell.kills,
            "void": cell.void, "time_ms": millis(cell.time), "steps": cell.steps,
            "lost": cell.lost, "goodput": cell.goodput, "detect_ms": cell.detect.to_json(),
            "form_ms": cell.form.to_json(), "full_ms": cell.full.to_json(),
            "full_step_p50_ms": cell.step.quantile(0.5).map(millis), "curve": cell.curve,
        })
    };
    json!({
        "world": config.world, "spares": config.spares, "slots": config.slots,
        "slot_ms": millis(config.slot), "step_ms": millis(step), "seed": config.seed,
        "checkpoint_steps": config.checkpoint_steps,
        "cells": cells.iter().map(cell).collect::<Vec<Value>>(),
    })
}
