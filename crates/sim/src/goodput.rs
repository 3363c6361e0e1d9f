//! Goodput under random kills: the real machines over the simulated world for hours of its time, as
//! a group that goes on without its dead, and as one that starts again from its checkpoint.

use std::fmt;

use crate::action::Action;
use crate::rng::Rng;
use crate::setup::{MS, Setup};
use crate::world::{Detail, World};

/// Longest time that a group may take to its first step.
const FORMING: u64 = 600_000 * MS;
/// Steps over which the undisturbed step is timed.
const UNDISTURBED: u64 = 100;

/// What is played; speeds are to be taken from a measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// Workers of the full group.
    pub workers: usize,
    /// V, the slots of a step.
    pub slots: u32,
    /// Time of a slot in milliseconds.
    pub slot_ms: u64,
    /// Mean seconds between two kills in the whole group.
    pub mean: f64,
    /// Longest delay of a message in milliseconds.
    pub latency_ms: u64,
    /// From the start of a process to its warm report, in milliseconds (mean).
    pub warm_ms: u64,
    /// Reading a checkpoint, in milliseconds.
    pub load_ms: u64,
    /// Sending the state to a joiner, in milliseconds.
    pub heal_ms: u64,
    /// Steps between two checkpoints.
    pub checkpoint: u64,
    /// Seconds to play after the first step.
    pub seconds: u64,
    /// Seed of the kills and of delays.
    pub seed: u64,
}

impl Default for Cell {
    fn default() -> Self {
        Cell {
            workers: 8,
            slots: 56,
            slot_ms: 20,
            mean: 600.0,
            latency_ms: 2,
            warm_ms: 250,
            load_ms: 0,
            heal_ms: 5,
            checkpoint: 50,
            seconds: 36_000,
            seed: 1,
        }
    }
}

impl Cell {
    /// Sets a field by its flag; says what is wrong with it.
    pub fn set(&mut self, flag: &str, text: &str) -> Result<(), String> {
        let whole = || match text.parse::<u64>() {
            Ok(n) if n > 0 || matches!(flag, "--load-ms" | "--heal-ms" | "--seed") => Ok(n),
            _ => Err(format!("`{text}` of `{flag}` is not a positive whole number")),
        };
        match flag {
            "--workers" => self.workers = whole()? as usize,
            "--slots" => self.slots = whole()?.min(64) as u32,
            "--slot-ms" => self.slot_ms = whole()?,
            "--mean" => {
                let mean = text.parse::<f64>().ok().filter(|mean| *mean > 0.0);
                self.mean = mean.ok_or_else(|| format!("`{text}` of `{flag}` is not a time"))?;
            }
            "--latency-ms" => self.latency_ms = whole()?,
            "--warm-ms" => self.warm_ms = whole()?,
            "--load-ms" => self.load_ms = whole()?,
            "--heal-ms" => self.heal_ms = whole()?,
            "--checkpoint" => self.checkpoint = whole()?,
            "--seconds" => self.seconds = whole()?,
            "--seed" => self.seed = whole()?,
            _ => return Err(format!("`{flag}` is not a flag of goodput")),
        }
        if self.workers > self.slots as usize {
            return Err(format!("{} workers share {} slots", self.workers, self.slots));
        }
        Ok(())
    }

    /// When which worker is killed, in nanoseconds after the first step: the same for both groups.
    fn kills(&self) -> Vec<(u64, usize)> {
        let mut rng = Rng::new(self.seed);
        let mut kills = Vec::new();
        let mut at = rng.exponential(self.mean);
        while at < self.seconds as f64 {
            kills.push(((at * 1e9) as u64, rng.below(self.workers as u64) as usize));
            at += rng.exponential(self.mean);
        }
        kills
    }

    fn setup(&self, min: usize) -> Setup {
        let step_ms = u64::from(self.slots) * self.slot_ms;
        // More than can be done in the time.
        let steps = (self.seconds * 1000 + FORMING / MS) * self.workers as u64 / step_ms.max(1);
        Setup {
            seed: self.seed,
            slots: self.slots,
            steps,
            min,
            max: self.workers,
            checkpoint: self.checkpoint,
            step_ms,
            mark_every: 1,
            latency_ms: self.latency_ms,
            part_ms: 5,
            commit_ms: 5,
            heal_ms: self.heal_ms,
            // The simulated start takes between a half and twice this.
            warm_ms: (self.warm_ms * 4 / 5).max(2),
            load_ms: self.load_ms,
            ..Setup::default()
        }
    }
}

/// What a group made of its time.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Kills of a living worker.
    pub kills: u64,
    /// Steps that count.
    pub steps: u64,
    /// Steps that were computed again.
    pub redone: u64,
    /// Undisturbed steps' share of the time.
    pub goodput: f64,
    /// Seconds from a kill to the next step that is new, for each kill that was followed by one
    /// before the next kill.
    pub next_step: Vec<f64>,
    /// Seconds from a kill to the first sum of the full group.
    pub full: Vec<f64>,
}

/// Both groups under the same kills.
#[derive(Clone, Debug, PartialEq)]
pub struct Goodput {
    /// Seconds of an undisturbed step.
    pub step: f64,
    /// Survivors go on, and the killed one joins again.
    pub elastic: Group,
    /// All start again, at once, from the newest checkpoint.
    pub restart: Group,
}

const HEADER: &str = "| group | kills | useful steps | redone | goodput | next step (p50) | \
                      full strength (p50) |";

fn median(sorted: &[f64]) -> f64 {
    let mut all = sorted.to_vec();
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}

impl fmt::Display for Goodput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "an undisturbed step: {:.1} ms", 1000.0 * self.step)?;
        writeln!(f, "{HEADER}")?;
        writeln!(f, "|---|---|---|---|---|---|---|")?;
        for (name, of) in [("elastic", &self.elastic), ("restart", &self.restart)] {
            writeln!(
                f,
                "| {name} | {} | {} | {} | {:.2} % | {:.2} s | {:.2} s |",
                of.kills,
                of.steps,
                of.redone,
                100.0 * of.goodput,
                median(&of.next_step),
                median(&of.full)
            )?;
        }
        Ok(())
    }
}

/// Plays both groups; says which invariant broke, if one did.
pub fn play(cell: &Cell) -> Result<Goodput, String> {
    let step = undisturbed(cell)?;
    let elastic = group(cell, 1, step)?;
    let restart = group(cell, cell.workers, step)?;
    Ok(Goodput { step, elastic, restart })
}

fn worker(n: usize) -> String {
    format!("node{n}:0")
}

/// Starts the full group and waits until it has made its first step.
fn started(cell: &Cell, min: usize) -> Result<World, String> {
    let mut world = World::new(&cell.setup(min), Detail::None);
    (0..cell.workers).for_each(|n| world.perform(&Action::Spawn(worker(n))));
    let full = |world: &World| !(world.is_reducing(cell.workers) && world.counts().highest > 0);
    match world.run_until(FORMING, full) {
        true => Ok(world),
        false => Err(broken(&world, "the group did not form")),
    }
}

fn broken(world: &World, what: &str) -> String {
    world.violation.as_ref().map_or_else(|| what.to_string(), ToString::to_string)
}

/// Times the full group's step, in seconds.
fn undisturbed(cell: &Cell) -> Result<f64, String> {
    let mut world = started(cell, cell.workers)?;
    let (from, first) = (world.now, world.counts().highest);
    let enough = |world: &World| world.counts().highest < first + UNDISTURBED;
    match world.run_until(u64::MAX, enough) {
        true => Ok((world.now - from) as f64 / 1e9 / UNDISTURBED as f64),
        false => Err(broken(&world, "the group stands still")),
    }
}

/// Plays one group; `min` of all workers is one that cannot do without any.
fn group(cell: &Cell, min: usize, step: f64) -> Result<Group, String> {
    let mut world = started(cell, min)?;
    let (zero, first) = (world.now, world.counts().highest);
    let end = zero + cell.seconds * 1000 * MS;
    let mut out = Group {
        kills: 0,
        steps: 0,
        redone: 0,
        goodput: 0.0,
        next_step: Vec::new(),
        full: Vec::new(),
    };
    let kills = cell.kills();
    for (nth, (at, victim)) in kills.iter().enumerate() {
        world.run_until(zero + at, |_| true);
        let next = kills.get(nth + 1).map_or(end, |(at, _)| zero + at);
        if world.lives(&worker(*victim)).is_empty() {
            continue;
        }
        out.kills += 1;
        kill(&mut world, cell, min, *victim);
        let (killed, highest) = (world.now, world.counts().highest);
        let generation = world.newest_generation();
        let since = |world: &World| (world.now - killed) as f64 / 1e9;
        if world.run_until(next, |world| world.counts().highest <= highest) {
            out.next_step.push(since(&world));
        }
        let whole = |world: &World| {
            world.newest_generation() > generation && world.is_reducing(cell.workers)
        };
        if world.run_until(next, |world| !whole(world)) {
            out.full.push(since(&world));
        }
    }
    world.run_until(end, |_| true);
    if world.violation.is_some() {
        return Err(broken(&world, ""));
    }
    out.steps = world.counts().highest - first;
    out.redone = world.counts().redone;
    out.goodput = out.steps as f64 * step / cell.seconds as f64;
    Ok(out)
}

/// Kills one worker; where the group cannot do without it, all of them, and starts them at once.
fn kill(world: &mut World, cell: &Cell, min: usize, victim: usize) {
    if min < cell.workers {
        return world.perform(&Action::Kill(worker(victim)));
    }
    (0..cell.workers).for_each(|n| world.perform(&Action::Kill(worker(n))));
    (0..cell.workers).for_each(|n| world.perform(&Action::Spawn(worker(n))));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_kills_nothing_is_lost() {
        let cell = Cell { mean: 1e12, seconds: 60, ..Cell::default() };
        let goodput = play(&cell).expect("it forms");
        for group in [&goodput.elastic, &goodput.restart] {
            assert_eq!((group.kills, group.redone), (0, 0));
            assert!((0.98..=1.02).contains(&group.goodput), "{goodput}");
        }
    }

    #[test]
    fn kills_cost_the_restarting_one_more() {
        let cell = Cell { mean: 15.0, seconds: 300, ..Cell::default() };
        let goodput = play(&cell).expect("no invariant breaks");
        let (elastic, restart) = (&goodput.elastic, &goodput.restart);
        assert!(elastic.kills > 10 && restart.kills > 10, "{goodput}");
        // A kill may come before the group is whole again after the last.
        let (next, full) = (elastic.next_step.len(), elastic.full.len());
        assert!((elastic.kills as usize - 2..=elastic.kills as usize).contains(&next), "{goodput}");
        assert!(full <= next && full > next / 2, "{goodput}");
        assert!(elastic.redone < restart.redone, "{goodput}");
        assert!(elastic.goodput > restart.goodput, "{goodput}");
        assert!((0.8..1.0).contains(&elastic.goodput), "{goodput}");
    }

    #[test]
    fn a_wrong_flag_is_named() {
        let mut cell = Cell::default();
        assert!(cell.set("--mean", "-3").unwrap_err().contains("--mean"));
        assert!(cell.set("--workers", "0").unwrap_err().contains("--workers"));
        assert!(cell.set("--workers", "60").unwrap_err().contains("60 workers"));
        assert!(cell.set("--pace", "1").unwrap_err().contains("--pace"));
    }
}
