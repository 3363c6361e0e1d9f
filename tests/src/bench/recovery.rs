//! Times of single faults, on a group that trains on.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::stats::{Samples, millis};
use crate::history::{Heard, History};
use crate::proxy::{Order, Way};
use crate::rig::{Bench, Rig, RunSpec};

/// Longest wait for anything here: well past the lease, respawning and joining together.
const WAIT: Duration = Duration::from_secs(60);
/// Steps between two faults, so that each finds a group that trains.
const CALM_STEPS: u64 = 5;
/// Name of the runs.
const RUN: &str = "recovery";
/// More steps than any measurement sees.
const ENDLESS: u64 = 100_000_000;

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Members of the group.
    pub world: usize,
    /// Slots of a step; so many that one worker more would not make it shorter.
    pub slots: u64,
    /// Least time of a slot.
    pub slot: Duration,
    /// SIGKILLs with and without a spare, each.
    pub kills: usize,
    /// Silent deaths of each kind, joins.
    pub others: usize,
    /// How long the coordinator is away.
    pub outage: Duration,
}

impl Config {
    /// Time that a step's slots take.
    pub fn step(&self) -> Duration {
        self.slot * u32::try_from(self.slots).unwrap_or(u32::MAX) / self.world as u32
    }
}

/// Times of one kind of fault.
#[derive(Debug, Default)]
pub struct Recovery {
    /// Fault to the coordinator's word that the worker is lost.
    pub detect: Samples,
    /// From there to the start of the next generation.
    pub form: Samples,
    /// From there to the end of its first step: that step is computed again.
    pub redo: Samples,
    /// Fault to the end of the first step that is newer than any before.
    pub next_step: Samples,
    /// Fault to a group of full strength again.
    pub full: Samples,
}

impl Recovery {
    fn rows(&self, name: &str) -> String {
        let rows = [
            ("to the next applied step", &self.next_step),
            ("… until it is noticed", &self.detect),
            ("… until the group has formed", &self.form),
            ("… the step done again", &self.redo),
            ("to full strength", &self.full),
        ];
        let row = |(what, samples): &(&str, &Samples)| {
            format!("| {name} | {what} | {}\n", samples.cells())
        };
        rows.iter().filter(|(_, samples)| !samples.is_empty()).map(row).collect()
    }

    fn to_json(&self) -> Value {
        json!({
            "next_step_ms": self.next_step.to_json(), "detect_ms": self.detect.to_json(),
            "form_ms": self.form.to_json(), "redo_ms": self.redo.to_json(),
            "full_ms": self.full.to_json(),
        })
    }
}

/// A run on a rig, and the names given to nodes so far.
struct Field<'b> {
    rig: Rig<'b>,
    history: History,
    world: usize,
    named: usize,
}

impl<'b> Field<'b> {
    /// Starts a group of full strength with `spares` more.
    fn start(bench: &'b Bench, config: &Config, spares: usize) -> anyhow::Result<Self> {
        let mut rig = Rig::start(bench, config.slot)?;
        let spec = RunSpec {
            name: RUN.into(),
            steps: ENDLESS,
            slots: config.slots,
            // Spares are workers that would not make a step shorter: see `Config::slots`.
            workers: (1, config.world + spares),
            checkpoint_steps: 500,
            digest_every: 100,
            track_every: 1,
        };
        let history = rig.submit(&spec)?;
        for k in 0..config.world + spares {
            rig.add(&format!("n{k}"))?;
        }
        let field = Field { rig, history, world: config.world, named: config.world + spares };
        field.await_full(spares)?;
        Ok(field)
    }

    /// Waits for full strength, spares, and some steps of the group.
    fn await_full(&self, spares: usize) -> anyhow::Result<()> {
        let world = self.world;
        let calm = move |heard: &Heard| {
            let spare = heard.run.workers.iter().filter(|w| w.state == "spare").count();
            let here = heard.applied.iter().rev().take(CALM_STEPS as usize);
            let calm = here.filter(|it| it.figures.generation == heard.formed.0).count() as u64;
            (heard.full(world) && spare >= spares && calm == CALM_STEPS).then_some(())
        };
        self.history.wait("full strength", WAIT, calm)
    }

    fn add(&mut self) -> anyhow::Result<String> {
        let name = format!("n{}", self.named);
        self.named += 1;
        self.rig.add(&name)?;
        Ok(name)
    }

    /// Replaces a node, since an agent waits ever longer before it restarts a trainer that keeps
    /// dying.
    fn replace(&mut self, name: &str, spares: usize) -> anyhow::Result<()> {
        let mut node = self.rig.take(name).context("the node is there")?;
        node.agent.signal(Signal::TERM);
        ensure!(node.agent.wait(WAIT)?.is_some(), "{name} does not leave");
        self.add()?;
        self.await_full(spares)
    }

    /// Waits until the group recovers from a fault that was done at `at`, in a generation whose
    /// figures went up to `last`.
    fn measure(&self, at: Instant, before: (u64, u64), to: &mut Recovery) -> anyhow::Result<()> {
        let (generation, last) = before;
        let newer = move |heard: &Heard| {
            let later = |it: &&crate::history::Applied| it.figures.generation > generation;
            let first = heard.applied.iter().filter(later).find(|it| it.figures.step > last);
            first.map(|it| (it.at, it.figures.generation))
        };
        let (step_at, _) = self.history.wait("the next step", WAIT, newer)?;
        let event_at = |kind: &'static str| {
            self.history.look(|h| h.kind(kind).find(|told| told.at > at).map(|told| told.at))
        };
        to.next_step.add(step_at - at);
        let lost =
            event_at("lost").or_else(|| event_at("forming")).context("nothing was noticed")?;
        let formed = event_at("formed").context("nothing formed")?;
        to.detect.add(lost - at);
        to.form.add(formed.saturating_duration_since(lost));
        to.redo.add(step_at.saturating_duration_since(formed));
        Ok(())
    }

    /// Returns when a generation of full strength started, after `at`.
    fn full_since(&self, at: Instant) -> anyhow::Result<Instant> {
        let world = self.world;
        let formed = move |heard: &Heard| {
            let full = |text: &str| crate::history::parse_formed(text).map(|it| it.world);
            let mut later = heard.kind("formed").filter(|told| told.at > at);
            later.find(|told| full(&told.event.text) == Some(world)).map(|told| told.at)
        };
        self.history.wait("full strength", WAIT, formed)
    }

    /// Generation and newest step.
    fn before(&self) -> (u64, u64) {
        self.history.look(|heard| (heard.formed.0, heard.step()))
    }

    fn member(&self, rank: usize) -> anyhow::Result<String> {
        let members = self.history.look(Heard::members);
        let worker = members.get(rank % members.len().max(1)).context("there is a member")?;
        Ok(worker.split(':').next().unwrap_or(worker).to_string())
    }
}

/// SIGKILL of a member, each rank in turn.
fn kills(bench: &Bench, config: &Config, spares: usize) -> anyhow::Result<Recovery> {
    let mut field = Field::start(bench, config, spares)?;
    let mut out = Recovery::default();
    for i in 0..config.kills {
        let name = field.member(i)?;
        let before = field.before();
        let at = Instant::now();
        ensure!(field.rig.signal_trainer(&name, Signal::KILL), "{name} has no trainer");
        field.measure(at, before, &mut out)?;
        out.full.add(field.full_since(at)? - at);
        field.await_full(spares)?;
        field.replace(&name, spares)?;
        progress("kill", i, config.kills);
    }
    Ok(out)
}

/// A member falls silent: its process stops, or its cable is pulled.
fn silence(bench: &Bench, config: &Config, cable: bool) -> anyhow::Result<Recovery> {
    let mut field = Field::start(bench, config, 0)?;
    let mut out = Recovery::default();
    for i in 0..config.others {
        // All others dial rank 0, so that its proxies carry everything it sends or hears.
        let name = field.member(if cable { 0 } else { i })?;
        let before = field.before();
        let at = Instant::now();
        if cable {
            let node = field.rig.node(&name).context("the node is there")?;
            node.control.obey(Order::Cut(Way::Both));
            node.mesh.obey(Order::Cut(Way::Both));
        } else {
            ensure!(field.rig.signal_trainer(&name, Signal::STOP), "{name} has no trainer");
        }
        field.measure(at, before, &mut out)?;
        field.rig.mend()?;
        field.await_full(0)?;
        progress(if cable { "cut" } else { "SIGSTOP" }, i, config.others);
    }
    Ok(out)
}

/// The coordinator's absence.
#[derive(Debug)]
pub struct Outage {
    away: Duration,
    steps: u64,
    expected: f64,
    new_generations: u64,
    redone: u64,
    stall: Duration,
}

fn outage(bench: &Bench, config: &Config) -> anyhow::Result<Outage> {
    let mut field = Field::start(bench, config, 0)?;
    let (generation, last) = field.before();
    let at = Instant::now();
    field.rig.kill_coordinator();
    let _ = field.history.until(config.outage, |_| None::<()>);
    field.rig.start_coordinator()?;
    let newer = |heard: &Heard| {
        let applied = heard.applied.last().filter(|it| it.at > at + config.outage)?;
        Some((applied.at, applied.figures.step, applied.figures.generation))
    };
    let (back, step, now) = field.history.wait("steps after the outage", WAIT, newer)?;
    // Past two leases and forming, so that a generation that forms late is seen.
    let _ = field.history.until(Duration::from_secs(10), |_| None::<()>);
    let heard = field.history.heard();
    let (_, tally) = crate::chaos::verdict::judge(&heard, crate::chaos::verdict::Marks::Sparse);
    let gaps = heard.applied.windows(2).filter(|pair| pair[0].at > at + config.outage);
    Ok(Outage {
        away: back - at,
        steps: step - last,
        expected: (back - at).as_secs_f64() / config.step().as_secs_f64(),
        new_generations: heard.formed.0.max(now) - generation,
        redone: tally.redone,
        stall: gaps.map(|pair| pair[1].at - pair[0].at).max().unwrap_or_default(),
    })
}

/// A worker joins and leaves again: the longest time between two steps around each.
fn joins(bench: &Bench, config: &Config) -> anyhow::Result<[Samples; 2]> {
    let mut field = Field::start(bench, config, 0)?;
    let mut stalls = [Samples::default(), Samples::default()];
    for i in 0..config.others {
        let name = field.member(i)?;
        let at = Instant::now();
        let mut node = field.rig.take(&name).context("the node is there")?;
        node.agent.signal(Signal::TERM);
        ensure!(node.agent.wait(WAIT)?.is_some(), "{name} does not leave");
        stalls[1].add(field.stall_after(at, config.world - 1, config)?);
        let at = Instant::now();
        field.add()?;
        stalls[0].add(field.stall_after(at, config.world, config)?);
        field.await_full(0)?;
        progress("join and drain", i, config.others);
    }
    Ok(stalls)
}

impl Field<'_> {
    /// Waits for a group of `world` after `at` and its first steps; returns the longest gap between
    /// two steps since, without a usual step of the larger group.
    fn stall_after(&self, at: Instant, world: usize, config: &Config) -> anyhow::Result<Duration> {
        let settled = move |heard: &Heard| {
            let formed = heard.kind("formed").any(|told| told.at > at);
            let there = heard.applied.iter().rev().take(CALM_STEPS as usize);
            let calm = there.filter(|it| it.figures.generation == heard.formed.0).count() as u64;
            (formed && heard.formed.1 == world && calm == CALM_STEPS).then_some(())
        };
        self.history.wait("the changed group", WAIT, settled)?;
        let gaps = self.history.look(|heard| {
            let since = heard.applied.windows(2).filter(|pair| pair[1].at > at);
            since.map(|pair| pair[1].at - pair[0].at).max()
        });
        let gap = gaps.context("there are steps")?;
        Ok(gap.saturating_sub(config.step()))
    }
}

fn progress(what: &str, i: usize, n: usize) {
    if (i + 1).is_multiple_of(10) || i + 1 == n {
        eprintln!("{what}: {} of {n}", i + 1);
    }
}

/// Measures everything; returns a page of tables and the raw numbers.
pub fn run(bench: &Bench, config: &Config) -> anyhow::Result<(String, Value)> {
    let killed = kills(bench, config, 0)?;
    let spared = kills(bench, config, 1)?;
    let stopped = silence(bench, config, false)?;
    let cut = silence(bench, config, true)?;
    let stalls = joins(bench, config)?;
    let outage = outage(bench, config)?;
    let mut page = format!("| fault | time | {}|---|---|---|---|---|---|---|\n", Samples::HEAD);
    page += &killed.rows("SIGKILL");
    page += &spared.rows("SIGKILL, a warm spare");
    page += &stopped.rows("SIGSTOP");
    page += &cut.rows("cable pulled");
    page += &format!("| join | stall beyond a usual step | {}\n", stalls[0].cells());
    page += &format!("| drain | stall beyond a usual step | {}\n", stalls[1].cells());
    page += &format!(
        "\nCoordinator killed, first figures again after {:.1} s: {} steps meanwhile (a step each \
         {:?} makes {:.0}), {} redone, {} new generations, longest gap between steps after its \
         return {:.3} s.\n",
        outage.away.as_secs_f64(),
        outage.steps,
        config.step(),
        outage.expected,
        outage.redone,
        outage.new_generations,
        outage.stall.as_secs_f64()
    );
    let raw = json!({
        "world": config.world, "step_ms": millis(config.step()),
        "sigkill": killed.to_json(), "sigkill_spare": spared.to_json(),
        "sigstop": stopped.to_json(), "cable": cut.to_json(),
        "join_stall_ms": stalls[0].to_json(), "drain_stall_ms": stalls[1].to_json(),
        "outage": {
            "away_ms": millis(outage.away), "steps": outage.steps, "redone": outage.redone,
            "new_generations": outage.new_generations, "stall_ms": millis(outage.stall),
        },
    });
    Ok((page, raw))
}
