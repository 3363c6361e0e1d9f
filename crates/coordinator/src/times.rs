//! Where a run's time goes: what is spent on steps that count, and on what else.

/// What a run spends time on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// Steps that count.
    Productive,
    /// Steps computed again.
    Repeat,
    /// Forming groups and handing state over.
    Reform,
    /// A checkpoint that training waits for.
    Checkpoint,
    /// Too few workers.
    WaitWorkers,
    /// Stopped or paused.
    Paused,
}

impl Share {
    /// All of them, in the order of the page.
    pub const ALL: [Share; 6] = [
        Share::Productive,
        Share::Repeat,
        Share::Reform,
        Share::Checkpoint,
        Share::WaitWorkers,
        Share::Paused,
    ];

    /// Returns the word in metrics.
    pub fn word(self) -> &'static str {
        match self {
            Share::Productive => "productive",
            Share::Repeat => "repeat",
            Share::Reform => "reform",
            Share::Checkpoint => "checkpoint",
            Share::WaitWorkers => "wait_workers",
            Share::Paused => "paused",
        }
    }

    /// Returns the name for people.
    pub fn name(self) -> &'static str {
        match self {
            Share::Productive => "steps",
            Share::Repeat => "steps computed again",
            Share::Reform => "forming groups",
            Share::Checkpoint => "held for a checkpoint",
            Share::WaitWorkers => "waiting for workers",
            Share::Paused => "stopped",
        }
    }

    /// Returns what the time in a run's state is spent on; nothing where it is over.
    fn of_state(state: &str) -> Option<Self> {
        Some(match state {
            "finished" | "failed" | "cancelled" => return None,
            "running" => Share::Productive,
            "recovering" | "forming" | "syncing" | "disputed" => Share::Reform,
            "held" => Share::Checkpoint,
            "waiting" => Share::WaitWorkers,
            _ => Share::Paused,
        })
    }
}

/// Seconds spent on each; none ever falls.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Times {
    seconds: [f64; 6],
    /// Time of steps computed again that is not yet taken from the time that passes.
    owed: f64,
}

impl Times {
    /// Returns the seconds spent on one.
    pub fn seconds(&self, share: Share) -> f64 {
        self.seconds[share as usize]
    }

    /// Counts time that passed in a state.
    pub fn pass(&mut self, state: &str, seconds: f64) {
        let Some(share) = Share::of_state(state) else { return };
        let again = if share == Share::Productive { self.owed.min(seconds) } else { 0.0 };
        self.owed -= again;
        self.seconds[Share::Repeat as usize] += again;
        self.seconds[share as usize] += seconds - again;
    }

    /// Counts so much of the time of training to come as spent on steps that were computed before.
    pub fn repeat(&mut self, seconds: f64) {
        if seconds.is_finite() && seconds > 0.0 {
            self.owed += seconds;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_time_is_somewhere() {
        let mut times = Times::default();
        for (state, seconds) in [
            ("running", 10.0),
            ("forming", 2.0),
            ("stopped", 4.0),
            ("paused", 1.0),
            ("finished", 9.0),
        ] {
            times.pass(state, seconds);
        }
        times.repeat(3.0);
        times.repeat(f64::NAN);
        times.repeat(-1.0);
        let all = |times: &Times| Share::ALL.map(|share| times.seconds(share));
        assert_eq!(all(&times), [10.0, 0.0, 2.0, 0.0, 0.0, 5.0]);
        times.pass("running", 2.0);
        times.pass("running", 2.0);
        assert_eq!(all(&times), [11.0, 3.0, 2.0, 0.0, 0.0, 5.0], "nothing that was counted falls");
    }
}
