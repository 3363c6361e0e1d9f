//! The worker's side: what a trainer's control session does about messages, reports and signals.
//!
//! The step loop is elsewhere and knows no protocol: it gets [`Command`]s as orders and gives
//! [`Report`]s. A worker that loses its coordinator trains on.

use lacuna_types::{AttemptSeq, Generation, Step, Timestamp, exit};

use crate::message::{FaultKind, StepMark, ToCoordinator, ToWorker};
use crate::plan::{Plan, Sync};
use std::time::Duration;

/// What the step loop reports.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// The device works; the probe gave this digest.
    Warm {
        /// Digest of the probe.
        probe: u64,
    },
    /// Out of every communicator; answers [`Command::Leave`].
    Down {
        /// Step of the state in memory, if there is one.
        state: Option<Step>,
    },
    /// Connected and synchronised.
    Synced {
        /// Generation being formed.
        generation: Generation,
        /// Step of the state.
        step: Step,
        /// Digest of the state.
        digest: u64,
    },
    /// A step was applied and is due to be reported.
    Mark(StepMark),
    /// Standing at a boundary.
    Held {
        /// Generation.
        generation: Generation,
        /// Step of the state.
        step: Step,
        /// Digest of the state.
        digest: u64,
    },
    /// The state is copied aside.
    Snapshotted {
        /// Generation.
        generation: Generation,
        /// The attempt.
        attempt: AttemptSeq,
        /// Step of the copied state.
        step: Step,
        /// Digest of the whole state.
        digest: u64,
    },
    /// The part is durable.
    PartDone {
        /// Generation.
        generation: Generation,
        /// The attempt.
        attempt: AttemptSeq,
        /// The part's receipt, JSON.
        receipt: String,
    },
    /// The part could not be written.
    PartFailed {
        /// Generation.
        generation: Generation,
        /// The attempt.
        attempt: AttemptSeq,
        /// The error with its causes.
        detail: String,
    },
    /// Something went wrong.
    Fault {
        /// Generation in which it happened.
        generation: Generation,
        /// What kind of trouble.
        kind: FaultKind,
        /// The error with its causes.
        detail: String,
    },
}

/// What happens to a session.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The stream is up and the coordinator has said welcome.
    Connected,
    /// The stream broke or could not be opened.
    Disconnected,
    /// The coordinator said something.
    Received(ToWorker),
    /// The step loop reports.
    Report(Report),
    /// Somebody wants this worker to go: a signal, or its agent.
    Drain {
        /// Why, for people.
        why: String,
    },
    /// Time passed.
    Tick,
}

/// What the driver must do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Send to the coordinator; dropped without a stream.
    Send(ToCoordinator),
    /// Close the stream and open it again.
    Reconnect,
    /// Abort the communicator of `up_to` and all before; answer with [`Report::Down`].
    Leave {
        /// Newest generation to leave.
        up_to: Generation,
    },
    /// Connect to the plan's members and synchronise.
    Connect {
        /// The plan.
        plan: Plan,
        /// Key or unique id.
        comm_id: Vec<u8>,
        /// Where the state comes from.
        sync: Sync,
    },
    /// Train.
    Start {
        /// The generation.
        generation: Generation,
    },
    /// Raise the stop lane from the next step on.
    RaiseStop {
        /// The generation.
        generation: Generation,
        /// Number of the change.
        change: u64,
    },
    /// Raise the checkpoint lane from the next step on, or save at once if `held`.
    Save {
        /// The generation.
        generation: Generation,
        /// The attempt.
        attempt: AttemptSeq,
        /// Whether everybody stands at one boundary already.
        held: bool,
    },
    /// Give an attempt up.
    AbortAttempt {
        /// The generation.
        generation: Generation,
        /// The attempt.
        attempt: AttemptSeq,
    },
    /// Tell people.
    Note(String),
    /// End the process.
    Exit {
        /// Exit code.
        code: u8,
        /// Why, for people.
        why: String,
    },
}

/// Where the step loop is, as far as the session knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loop {
    /// In no communicator.
    Down,
    /// Told to leave; has not answered.
    Leaving,
    /// Connecting, training or standing.
    Up,
}

/// The machine. One for each trainer process.
#[derive(Debug)]
pub struct Session {
    give_up: Duration,
    generation: Generation,
    plan: Option<Plan>,
    step_loop: Loop,
    state: Option<Step>,
    probe: Option<u64>,
    connected: bool,
    alone_since: Timestamp,
    draining: Option<String>,
    out: Vec<Command>,
}

impl Session {
    /// Creates the machine at `now`; without a coordinator for `give_up` it ends the process.
    pub fn new(give_up: Duration, now: Timestamp) -> Self {
        Session {
            give_up,
            generation: Generation(0),
            plan: None,
            step_loop: Loop::Down,
            state: None,
            probe: None,
            connected: false,
            alone_since: now,
            draining: None,
            out: Vec::new(),
        }
    }

    /// Returns the step of the state in memory, for the next hello.
    pub fn state(&self) -> Option<Step> {
        self.state
    }

    /// Returns the newest generation seen.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Returns where the session stands in one word, for people and tests.
    pub fn stage_word(&self) -> &'static str {
        match (self.step_loop, &self.plan) {
            (Loop::Down, None) => "idle",
            (Loop::Down, Some(_)) => "prepared",
            (Loop::Leaving, _) => "leaving",
            (Loop::Up, _) => "up",
        }
    }

    /// Returns when [`Event::Tick`] is due at the latest.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        (!self.connected).then(|| self.alone_since + self.give_up)
    }

    /// Takes one event and returns what to do, in order.
    pub fn handle(&mut self, now: Timestamp, event: Event) -> Vec<Command> {
        match event {
            Event::Connected => self.on_connected(),
            Event::Disconnected => {
                if self.connected {
                    self.alone_since = now;
                }
                self.connected = false;
                if let Some(why) = self.draining.clone() {
                    self.exit(exit::DRAINED, why);
                }
            }
            Event::Received(message) => self.on_received(message),
            Event::Report(report) => self.on_report(report),
            Event::Drain { why } => self.on_drain(why),
            Event::Tick => {}
        }
        if !self.connected && now.since(self.alone_since) >= self.give_up {
            self.exit(exit::UNREACHABLE, "the coordinator could not be reached".to_string());
        }
        std::mem::take(&mut self.out)
    }

    fn on_connected(&mut self) {
        self.connected = true;
        if let Some(probe) = self.probe {
            self.say(ToCoordinator::Warm { probe });
        }
        if let Some(why) = self.draining.clone() {
            self.say(ToCoordinator::Leaving { why });
        }
    }

    fn on_drain(&mut self, why: String) {
        if self.draining.is_some() {
            self.exit(exit::INTERRUPTED, "asked to go twice".to_string());
        } else if self.connected {
            self.draining = Some(why.clone());
            self.say(ToCoordinator::Leaving { why });
        } else {
            self.exit(exit::DRAINED, why);
        }
    }

    fn on_received(&mut self, message: ToWorker) {
        match message {
            ToWorker::Prepare(plan) if plan.generation > self.generation => {
                self.generation = plan.generation;
                self.plan = Some(plan);
                self.leave();
                self.prepared_if_down();
            }
            ToWorker::Connect { generation, comm_id, sync } if generation == self.generation => {
                if let Some(plan) = self.plan.clone().filter(|_| self.step_loop == Loop::Down) {
                    self.step_loop = Loop::Up;
                    self.out.push(Command::Connect { plan, comm_id, sync });
                }
            }
            ToWorker::Start { generation, .. } if self.is_up(generation) => {
                self.out.push(Command::Start { generation });
            }
            ToWorker::Revoke { generation, why } if generation == self.generation => {
                self.out.push(Command::Note(format!("generation {generation} is over: {why}")));
                self.plan = None;
                self.leave();
            }
            ToWorker::Hold { generation, change, .. } if self.is_up(generation) => {
                self.out.push(Command::RaiseStop { generation, change });
            }
            ToWorker::Propose { generation, attempt, held } if self.is_up(generation) => {
                self.out.push(Command::Save { generation, attempt, held });
            }
            ToWorker::AbortAttempt { generation, attempt, why } if self.is_up(generation) => {
                self.out
                    .push(Command::Note(format!("checkpoint attempt {attempt} given up: {why}")));
                self.out.push(Command::AbortAttempt { generation, attempt });
            }
            ToWorker::Exit { code, why } => self.exit(code, why),
            ToWorker::Stale { current } => {
                self.out.push(Command::Note(format!(
                    "given up by the coordinator, which is at generation {current}; joining again"
                )));
                self.plan = None;
                self.leave();
                self.connected = false;
                self.out.push(Command::Reconnect);
            }
            // Committed needs nothing; everything else is of a generation that is over.
            _ => {}
        }
    }

    fn on_report(&mut self, report: Report) {
        match report {
            Report::Warm { probe } => {
                self.probe = Some(probe);
                if self.connected {
                    self.say(ToCoordinator::Warm { probe });
                }
            }
            Report::Down { state } => {
                self.state = state;
                self.step_loop = Loop::Down;
                self.prepared_if_down();
            }
            Report::Synced { generation, step, digest } => {
                self.state = Some(step);
                self.say_now(generation, ToCoordinator::Synced { generation, step, digest });
            }
            Report::Mark(mark) => {
                self.state = Some(mark.step);
                self.say_now(mark.generation, ToCoordinator::StepMark(mark));
            }
            Report::Held { generation, step, digest } => {
                self.state = Some(step);
                self.say_now(generation, ToCoordinator::Held { generation, step, digest });
            }
            Report::Snapshotted { generation, attempt, step, digest } => self.say_now(
                generation,
                ToCoordinator::Snapshotted { generation, attempt, step, digest },
            ),
            Report::PartDone { generation, attempt, receipt } => {
                self.say_now(generation, ToCoordinator::PartDone { generation, attempt, receipt })
            }
            Report::PartFailed { generation, attempt, detail } => {
                self.say_now(generation, ToCoordinator::PartFailed { generation, attempt, detail })
            }
            Report::Fault { generation, kind, detail } => {
                self.out.push(Command::Note(detail.clone()));
                self.say_now(generation, ToCoordinator::Fault { generation, kind, detail });
            }
        }
    }

    fn is_up(&self, generation: Generation) -> bool {
        generation == self.generation && self.step_loop == Loop::Up
    }

    fn leave(&mut self) {
        if self.step_loop == Loop::Up {
            self.step_loop = Loop::Leaving;
            self.out.push(Command::Leave { up_to: self.generation });
        }
    }

    fn prepared_if_down(&mut self) {
        if self.step_loop == Loop::Down && self.plan.is_some() {
            let (generation, state) = (self.generation, self.state);
            self.say(ToCoordinator::Prepared { generation, state });
        }
    }

    /// Sends what belongs to `generation`, unless that is over.
    fn say_now(&mut self, generation: Generation, message: ToCoordinator) {
        if generation == self.generation {
            self.say(message);
        }
    }

    fn say(&mut self, message: ToCoordinator) {
        self.out.push(Command::Send(message));
    }

    fn exit(&mut self, code: u8, why: String) {
        self.out.push(Command::Exit { code, why });
    }
}

#[cfg(test)]
mod tests;
