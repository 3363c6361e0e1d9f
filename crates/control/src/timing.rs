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
            fruitless_generations: 5,
            failed_attempts: 3,
        }
    }

    /// The defaults for one machine, where processes start within a second and changes are cheap.
    pub fn one_machine() -> Self {
        Timing {
            join_window: Duration::from_millis(500),
            voluntary_gap: Duration::from_secs(1),
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
        out
    }
}

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
}
