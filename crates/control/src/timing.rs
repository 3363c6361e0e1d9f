//! Waits and limits of the protocol.

use std::time::Duration;

/// Every duration the two machines use. Checked against each other by [`Timing::problems`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timing {
    /// How often a worker says that it lives.
    pub beat: Duration,
    /// A worker silent for longer than this is dead.
    pub lease: Duration,
    /// How long a worker whose stream broke may take to come back.
    pub stream_grace: Duration,
    /// How long to gather failures before forming again.
    pub failure_window: Duration,
    /// How long to gather joining workers before asking members to stop for them.
    pub join_window: Duration,
    /// Shortest time between two voluntary changes of the group.
    pub voluntary_gap: Duration,
    /// Longest time from Prepare to Start.
    pub forming: Duration,
    /// Longest time for a checkpoint attempt, from its proposal to its commit.
    pub attempt: Duration,
    /// How long a member may take to leave its old communicator before its process is killed. Time
    /// in which it computes does not count.
    pub revoke: Duration,
    /// A running group that gets no further for this long, or for five times its longest step, is
    /// stuck: whoever holds it up is found and left out.
    pub stall: Duration,
    /// How long to watch uneven members before slots are shared out anew.
    pub straggler_window: Duration,
    /// How long workers may take to compute the probe again when their states differ.
    pub audit: Duration,
    /// A worker without its coordinator for this long stands still at the next boundary.
    pub orphan: Duration,
    /// How long members that fell silent all at once may train on unseen: before it is over, no
    /// group is formed without any of them, unless an operator says so.
    pub disjoint: Duration,
    /// First time-out of a worker that did harm; it doubles each time, up to [`QUARANTINE_MAX`].
    pub quarantine: Duration,
    /// Generations in a row without an applied step before the run pauses.
    pub fruitless_generations: u32,
    /// Checkpoint attempts in a row that may fail before a run that needs one gives up.
    pub failed_attempts: u32,
}

impl Timing {
    /// The defaults for clusters.
    pub fn cluster() -> Self {
        Timing {
            beat: Duration::from_millis(500),
            lease: Duration::from_secs(3),
            stream_grace: Duration::from_secs(1),
            failure_window: Duration::from_millis(200),
            join_window: Duration::from_secs(5),
            voluntary_gap: Duration::from_secs(60),
            forming: Duration::from_secs(120),
            attempt: Duration::from_secs(600),
            revoke: Duration::from_secs(5),
            stall: Duration::from_secs(30),
            straggler_window: Duration::from_secs(10),
            audit: Duration::from_secs(600),
            orphan: Duration::from_secs(15 * 60),
            disjoint: Duration::from_secs(16 * 60),
            quarantine: Duration::from_secs(10),
            fruitless_generations: 5,
            failed_attempts: 3,
        }
    }

    /// The defaults for one machine, where processes start within a second and changes are cheap.
    pub fn one_machine() -> Self {
        Timing {
            join_window: Duration::from_millis(500),
            voluntary_gap: Duration::from_secs(1),
            // Nothing can fall silent here and train on: there is no network to lose.
            disjoint: Duration::from_secs(10),
            ..Timing::cluster()
        }
    }

    /// Lists combinations that cannot work.
    pub fn problems(&self) -> Vec<String> {
        let mut out: Vec<String> = Vec::new();
        if self.lease < 3 * self.beat {
            out.push(format!(
                "lease {:?} is shorter than three beats of {:?}",
                self.lease, self.beat
            ));
        }
        if self.forming < 2 * self.lease {
            out.push(format!(
                "forming {:?} is shorter than two leases of {:?}",
                self.forming, self.lease
            ));
        }
        if self.stream_grace > self.lease {
            out.push(format!(
                "stream grace {:?} outlasts the lease {:?}",
                self.stream_grace, self.lease
            ));
        }
        if self.stall < 2 * self.lease {
            out.push(format!(
                "stall {:?} is shorter than two leases of {:?}",
                self.stall, self.lease
            ));
        }
        if self.disjoint < 2 * self.lease {
            out.push(format!(
                "disjoint {:?} is shorter than two leases of {:?}",
                self.disjoint, self.lease
            ));
        }
        out
    }

    /// Returns the beat and the lease for a coordinator with `n` workers: it takes some 5,000 beats
    /// a second.
    pub fn at_scale(&self, n: usize) -> (Duration, Duration) {
        let beat = self.beat.max(Duration::from_micros(200) * n as u32);
        (beat, self.lease.max(6 * beat))
    }

    /// Changes one duration by its name.
    ///
    /// # Errors
    /// The names there are, if `name` is none of them.
    pub fn set(&mut self, name: &str, value: Duration) -> Result<(), String> {
        let Some((_, cell)) = self.durations().into_iter().find(|(known, _)| *known == name) else {
            let names: Vec<&str> = self.durations().into_iter().map(|(name, _)| name).collect();
            return Err(format!("`{name}` is none of {}", names.join(", ")));
        };
        *cell = value;
        Ok(())
    }

    fn durations(&mut self) -> Vec<(&'static str, &mut Duration)> {
        vec![
            ("beat", &mut self.beat),
            ("lease", &mut self.lease),
            ("stream_grace", &mut self.stream_grace),
            ("failure_window", &mut self.failure_window),
            ("join_window", &mut self.join_window),
            ("voluntary_gap", &mut self.voluntary_gap),
            ("forming", &mut self.forming),
            ("attempt", &mut self.attempt),
            ("revoke", &mut self.revoke),
            ("stall", &mut self.stall),
            ("straggler_window", &mut self.straggler_window),
            ("audit", &mut self.audit),
            ("orphan", &mut self.orphan),
            ("disjoint", &mut self.disjoint),
            ("quarantine", &mut self.quarantine),
        ]
    }
}

/// Longest time-out of a worker.
pub const QUARANTINE_MAX: Duration = Duration::from_secs(30 * 60);
/// Strikes count for this long.
pub const STRIKE_MEMORY: Duration = Duration::from_secs(60 * 60);
/// So many strikes within [`STRIKE_MEMORY`] keep a worker out until an operator releases it.
pub const STRIKES_MAX: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_agree_with_each_other() {
        assert_eq!(Timing::cluster().problems(), Vec::<String>::new());
        assert_eq!(Timing::one_machine().problems(), Vec::<String>::new());
        let hasty = Timing { lease: Duration::from_secs(1), ..Timing::cluster() };
        assert_eq!(hasty.problems(), ["lease 1s is shorter than three beats of 500ms"]);
    }

    #[test]
    fn durations_are_set_by_name() {
        let mut timing = Timing::cluster();
        timing.set("lease", Duration::from_secs(9)).unwrap();
        assert_eq!(timing.lease, Duration::from_secs(9));
        let err = timing.set("leese", Duration::from_secs(9)).unwrap_err();
        assert!(err.contains("`leese`") && err.contains("lease"), "{err}");
    }

    #[test]
    fn many_workers_beat_less_often() {
        let second = Duration::from_secs(1);
        assert_eq!(Timing::cluster().at_scale(1000), (second / 2, 3 * second));
        assert_eq!(Timing::cluster().at_scale(5000), (second, 6 * second));
    }
}
