//! An estimate of goodput under random kills, for this system and for one that restarts from
//! checkpoints. Its times are measured elsewhere and given here.

use std::fmt;

use crate::rng::Rng;

/// What was measured, in seconds where nothing else is said.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Workers of the full group.
    pub workers: u64,
    /// V, the slots of a step.
    pub slots: u64,
    /// Mean time between two kills in the whole cluster.
    pub mtbf: f64,
    /// A step of the full group.
    pub step: f64,
    /// From a kill to its report.
    pub detect: f64,
    /// From the report to the first step of the next generation.
    pub reform: f64,
    /// Sending the state to a joiner.
    pub heal: f64,
    /// From a kill to a warm trainer in its place.
    pub respawn: f64,
    /// Time between two checkpoints.
    pub checkpoint: f64,
    /// How long a checkpoint stops training.
    pub pause: f64,
    /// The other system: from a kill to all processes running again.
    pub restart: f64,
    /// The other system: reading the checkpoint.
    pub load: f64,
    /// Time to play.
    pub wall: f64,
    /// Seed of the kills.
    pub seed: u64,
}

impl Default for Measured {
    fn default() -> Self {
        Measured {
            workers: 8,
            slots: 32,
            mtbf: 600.0,
            step: 1.0,
            detect: 0.1,
            reform: 0.5,
            heal: 1.0,
            respawn: 5.0,
            checkpoint: 300.0,
            pause: 0.0,
            restart: 20.0,
            load: 5.0,
            wall: 360_000.0,
            seed: 1,
        }
    }
}

impl Measured {
    /// Sets a field by its flag.
    pub fn set(&mut self, flag: &str, text: &str) -> Result<(), String> {
        let value: f64 = text.parse().map_err(|_| format!("`{text}` is not a number"))?;
        let field = match flag {
            "--workers" | "--slots" | "--seed" => {
                let whole = value as u64;
                match flag {
                    "--workers" => self.workers = whole.max(1),
                    "--slots" => self.slots = whole.max(1),
                    _ => self.seed = whole,
                }
                return Ok(());
            }
            "--mtbf" => &mut self.mtbf,
            "--step" => &mut self.step,
            "--detect" => &mut self.detect,
            "--reform" => &mut self.reform,
            "--heal" => &mut self.heal,
            "--respawn" => &mut self.respawn,
            "--checkpoint" => &mut self.checkpoint,
            "--pause" => &mut self.pause,
            "--restart" => &mut self.restart,
            "--load" => &mut self.load,
            "--wall" => &mut self.wall,
            _ => return Err(format!("`{flag}` is no flag of goodput")),
        };
        *field = value;
        Ok(())
    }

    /// Time of a step with so many workers: that of the busiest.
    fn step_of(&self, workers: u64) -> f64 {
        let busiest = |n: u64| self.slots.div_ceil(n.clamp(1, self.slots)) as f64;
        self.step * busiest(workers) / busiest(self.workers)
    }
}

/// Share of the time that went into steps which count, at the full group's speed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goodput {
    /// Survivors go on, and the killed one joins again.
    pub elastic: f64,
    /// All start again from the newest checkpoint.
    pub restarting: f64,
    /// Kills that were played.
    pub kills: u64,
}

impl fmt::Display for Goodput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "kills                  {:8}", self.kills)?;
        writeln!(f, "elastic goodput        {:8.2} %", 100.0 * self.elastic)?;
        writeln!(f, "restarting goodput     {:8.2} %", 100.0 * self.restarting)
    }
}

/// Plays both policies against the same kills.
pub fn estimate(of: &Measured) -> Goodput {
    let mut rng = Rng::new(of.seed);
    let mut kills: Vec<f64> = Vec::new();
    let mut at = rng.exponential(of.mtbf);
    while at < of.wall {
        kills.push(at);
        at += rng.exponential(of.mtbf);
    }
    Goodput {
        elastic: elastic(of, &kills) * of.step / of.wall,
        restarting: restarting(of, &kills) * of.step / of.wall,
        kills: kills.len() as u64,
    }
}

/// Steps done when survivors go on: a kill costs the step in flight and a new group, its end costs
/// another one.
fn elastic(of: &Measured, kills: &[f64]) -> f64 {
    let (mut now, mut steps, mut next_kill) = (0.0f64, 0.0f64, 0usize);
    // When killed workers are warm again, ascending.
    let mut back: Vec<f64> = Vec::new();
    let mut saved = 0.0f64;
    while now < of.wall {
        let alive = of.workers.saturating_sub(back.len() as u64);
        let kill = kills.get(next_kill).copied().unwrap_or(f64::INFINITY);
        let join = back.first().copied().unwrap_or(f64::INFINITY);
        let step = of.step_of(alive);
        if join <= now {
            back.remove(0);
            now += of.reform + of.heal;
        } else if kill <= now + step {
            next_kill += 1;
            back.push(kill.max(now) + of.respawn);
            now = kill.max(now) + of.detect + of.reform;
        } else if alive == 0 {
            now = join;
        } else {
            now += step;
            steps += 1.0;
            if now - saved >= of.checkpoint {
                now += of.pause;
                saved = now;
            }
        }
    }
    steps
}

/// Steps done when all start again from the newest checkpoint.
fn restarting(of: &Measured, kills: &[f64]) -> f64 {
    let (mut now, mut kept, mut since, mut saved) = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
    let mut next_kill = 0;
    while now < of.wall {
        let kill = kills.get(next_kill).copied().unwrap_or(f64::INFINITY);
        if kill <= now + of.step {
            next_kill += 1;
            since = 0.0;
            now = kill.max(now) + of.restart + of.load;
            saved = now;
        } else {
            now += of.step;
            since += 1.0;
            if now - saved >= of.checkpoint {
                now += of.pause;
                kept += since;
                (since, saved) = (0.0, now);
            }
        }
    }
    kept + since
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_kills_nothing_is_lost() {
        let of = Measured { mtbf: 1e12, wall: 1000.0, ..Measured::default() };
        let goodput = estimate(&of);
        assert!(goodput.elastic > 0.99 && goodput.restarting > 0.99, "{goodput}");
    }

    #[test]
    fn kills_cost_the_restarting_one_more() {
        let of = Measured { mtbf: 60.0, ..Measured::default() };
        let goodput = estimate(&of);
        assert!(goodput.elastic > goodput.restarting, "{goodput}");
        assert!(goodput.elastic > 0.8 && goodput.elastic < 1.0, "{goodput}");
    }
}
