//! What a history starts from: the run, the cluster's speeds, the protocol's waits.

use std::fmt;
use std::time::Duration;

use lacuna_control::coordinator::{RunConfig, WhenBusy};
use lacuna_control::timing::Timing;

use crate::bugs::Bug;

/// Nanoseconds of a millisecond.
pub const MS: u64 = 1_000_000;

const WHEN_BUSY: [(WhenBusy, &str); 3] =
    [(WhenBusy::Skip, "skip"), (WhenBusy::Wait, "wait"), (WhenBusy::Cancel, "cancel")];

/// Everything about a history but its faults. Times are milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Seed of delays and other chance.
    pub seed: u64,
    /// V, the slots of a step.
    pub slots: u32,
    /// Steps of the run.
    pub steps: u64,
    /// Fewest workers that train.
    pub min: usize,
    /// Most workers that train.
    pub max: usize,
    /// Checkpoint every so many steps, 0 for only at the end.
    pub checkpoint: u64,
    /// What happens when a checkpoint is due while one is being written.
    pub when_busy: WhenBusy,
    /// Time of a step that one worker computes alone, divided over the slots.
    pub step_ms: u64,
    /// Marks every so many steps.
    pub mark_every: u64,
    /// Marks carry the digest every so many steps.
    pub digest_every: u64,
    /// Longest usual delay of a message.
    pub latency_ms: u64,
    /// One message in this many of an old stream comes twice and late, 0 for none.
    pub duplicate_in: u64,
    /// A durable write of the coordinator.
    pub sync_ms: u64,
    /// Writing a part.
    pub part_ms: u64,
    /// Creating a manifest.
    pub commit_ms: u64,
    /// Sending a state to healed members.
    pub heal_ms: u64,
    /// What reading a checkpoint takes beyond the usual few milliseconds.
    pub load_ms: u64,
    /// From the start of a trainer to its warm report.
    pub warm_ms: u64,
    /// Clocks run fast or slow by up to this many millionths.
    pub skew_ppm: u64,
    /// A reduction that takes longer is a fault.
    pub deadline_ms: u64,
    /// A worker ends that was without a coordinator for so long.
    pub give_up_ms: u64,
    /// A worker stands still that was without a coordinator for so long.
    pub orphan_ms: u64,
    /// Whoever computes the first slot of this step dies of it, 0 for none.
    pub poison: u64,
    /// The bug that is planted, if any.
    pub plant: Bug,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            seed: 1,
            slots: 8,
            steps: 60,
            min: 1,
            max: 3,
            checkpoint: 20,
            when_busy: WhenBusy::Skip,
            step_ms: 200,
            mark_every: 5,
            digest_every: 10,
            latency_ms: 4,
            duplicate_in: 0,
            sync_ms: 1,
            part_ms: 40,
            commit_ms: 20,
            heal_ms: 60,
            load_ms: 0,
            warm_ms: 200,
            skew_ppm: 0,
            deadline_ms: 6_000,
            give_up_ms: 600_000,
            orphan_ms: 20_000,
            poison: 0,
            plant: Bug::None,
        }
    }
}

impl Setup {
    /// Returns the run as the machine sees it.
    pub fn config(&self) -> RunConfig {
        RunConfig {
            n_slots: self.slots,
            total_steps: self.steps,
            workers_min: self.min,
            workers_max: self.max,
            checkpoint_steps: (self.checkpoint > 0).then_some(self.checkpoint),
            checkpoint_interval: None,
            when_busy: self.when_busy,
            max_failures: 0,
            epoch_steps: self.steps,
            epoch_samples: self.steps,
            bad_samples_max: 0,
        }
    }

    /// Returns the protocol's waits: those of one machine, with short patience.
    pub fn timing(&self) -> Timing {
        Timing {
            forming: Duration::from_secs(8),
            attempt: Duration::from_secs(10),
            revoke: Duration::from_secs(2),
            stall: Duration::from_secs(6),
            straggler_window: Duration::from_secs(2),
            audit: Duration::from_secs(4),
            orphan: Duration::from_millis(self.orphan_ms),
            disjoint: Duration::from_millis(self.orphan_ms + 4_000),
            quarantine: Duration::from_secs(4),
            ..Timing::one_machine()
        }
    }

    fn fields(&mut self) -> [(&'static str, &mut u64); 19] {
        [
            ("seed", &mut self.seed),
            ("steps", &mut self.steps),
            ("checkpoint", &mut self.checkpoint),
            ("step_ms", &mut self.step_ms),
            ("mark_every", &mut self.mark_every),
            ("digest_every", &mut self.digest_every),
            ("latency_ms", &mut self.latency_ms),
            ("duplicate_in", &mut self.duplicate_in),
            ("sync_ms", &mut self.sync_ms),
            ("part_ms", &mut self.part_ms),
            ("commit_ms", &mut self.commit_ms),
            ("heal_ms", &mut self.heal_ms),
            ("load_ms", &mut self.load_ms),
            ("warm_ms", &mut self.warm_ms),
            ("skew_ppm", &mut self.skew_ppm),
            ("deadline_ms", &mut self.deadline_ms),
            ("give_up_ms", &mut self.give_up_ms),
            ("orphan_ms", &mut self.orphan_ms),
            ("poison", &mut self.poison),
        ]
    }

    /// Sets one field from its text; says what is wrong with it.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let number = |text: &str| {
            text.parse::<u64>().map_err(|_| format!("`{text}` of `{key}` is not a number"))
        };
        match key {
            "slots" => {
                let n = number(value)?;
                if !(1..=64).contains(&n) {
                    return Err(format!("{n} slots: 1 to 64 can be simulated"));
                }
                self.slots = n as u32;
            }
            "workers" => {
                let (low, high) = value.split_once("..").ok_or("workers are `min..max`")?;
                (self.min, self.max) = (number(low)? as usize, number(high)? as usize);
            }
            "when_busy" => {
                let found = WHEN_BUSY.iter().find(|(_, word)| *word == value);
                self.when_busy = found.ok_or("when_busy is skip, wait or cancel")?.0;
            }
            "plant" => self.plant = value.parse()?,
            _ => {
                let n = number(value)?;
                let mut fields = self.fields();
                let field = fields.iter_mut().find(|(name, _)| *name == key);
                *field.ok_or_else(|| format!("`set {key}` is not known"))?.1 = n;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Setup {
    /// Writes the `set` lines of what differs from the default.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut own, mut default) = (self.clone(), Setup::default());
        if self.slots != default.slots {
            writeln!(f, "set slots {}", self.slots)?;
        }
        if (self.min, self.max) != (default.min, default.max) {
            writeln!(f, "set workers {}..{}", self.min, self.max)?;
        }
        for ((name, value), (_, usual)) in own.fields().into_iter().zip(default.fields()) {
            if value != usual {
                writeln!(f, "set {name} {value}")?;
            }
        }
        for (when_busy, word) in WHEN_BUSY {
            if self.when_busy == when_busy && when_busy != default.when_busy {
                writeln!(f, "set when_busy {word}")?;
            }
        }
        if self.plant != Bug::None {
            writeln!(f, "set plant {}", self.plant)?;
        }
        Ok(())
    }
}
