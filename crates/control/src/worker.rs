//! The worker's side: what a trainer's control session does about messages, reports and signals.
//!
//! The step loop is elsewhere and knows no protocol: it gets [`Command`]s as orders and gives
//! [`Report`]s. A worker that loses its coordinator trains on; what it had to say of its generation
//! it says again when it is back, since nobody can know which of it arrived.

mod answers;
mod types;

use std::sync::Arc;
use std::time::Duration;

use lacuna_types::{AttemptSeq, Generation, Step, Timestamp, exit};

use crate::message::{FaultKind, ToCoordinator, ToWorker};
use crate::plan::{Communicator, Plan};
use answers::Answers;
pub use types::{Command, Event, Report};

/// Where the step loop is, as far as the session knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loop {
    /// In no communicator.
    Down,
    /// Told to leave; has not answered.
    Leaving,
    /// Connecting or synchronised, and not told to train.
    Up,
    /// Told to train.
    Training,
    /// Stands at a boundary.
    Held,
    /// Told to go on in the communicator it is in, by the newest plan; has not answered.
    Adopting,
}

/// How long a worker tries without its coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// After this time it stands still at the next boundary.
    pub orphan: Duration,
    /// After this time it ends.
    pub give_up: Duration,
}

/// How long a worker that is to leave waits for a coordinator that is away: it may come back and
/// lead the group to a boundary, and a notice rarely gives more than twice this.
pub const DRAIN_ALONE: Duration = Duration::from_secs(15);

/// Number of the change that workers without a coordinator stop for: above any that one gives, and
/// small enough that its square can be summed.
pub const ORPHAN_CHANGE: u64 = 1 << 23;

/// The machine. One for each trainer process.
#[derive(Debug)]
pub struct Session {
    patience: Patience,
    generation: Generation,
    plan: Option<Arc<Plan>>,
    step_loop: Loop,
    state: Option<Step>,
    /// Newest generation in which that state was trained.
    trained: Generation,
    probe: Option<u64>,
    answers: Answers,
    /// Newest attempt of this generation that the step loop was told of.
    attempt: AttemptSeq,
    connected: bool,
    /// Whether the coordinator listens on this stream.
    welcomed: bool,
    alone_since: Timestamp,
    orphaned: bool,
    draining: Option<String>,
    /// With which code and why it ends once the coordinator knows: its device was never ready.
    never_warm: Option<(u8, String)>,
    out: Vec<Command>,
}

impl Session {
    /// Creates the machine at `now`.
    pub fn new(patience: Patience, now: Timestamp) -> Self {
        Session {
            patience,
            generation: Generation(0),
            plan: None,
            step_loop: Loop::Down,
            state: None,
            trained: Generation(0),
            probe: None,
            answers: Answers::default(),
            attempt: AttemptSeq(0),
            connected: false,
            welcomed: false,
            alone_since: now,
            orphaned: false,
            draining: None,
            never_warm: None,
            out: Vec::new(),
        }
    }

    /// Changes how long to try without a coordinator, as the newest welcome says.
    pub fn set_patience(&mut self, patience: Patience) {
        self.patience = patience;
    }

    /// Returns the step of the state in memory, for the next hello.
    pub fn state(&self) -> Option<Step> {
        self.state
    }

    /// Returns the newest generation seen.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Returns the generation that this worker takes part in, for the next hello; 0 for none.
    pub fn taking_part_in(&self) -> Generation {
        self.plan.as_ref().map_or(Generation(0), |plan| plan.generation)
    }

    /// Tells, for the next hello, whether it is connected to that generation's members, or
    /// connecting.
    pub fn is_up(&self) -> bool {
        !matches!(self.step_loop, Loop::Down | Loop::Leaving)
    }

    /// Returns the state's word, for coverage reports.
    pub fn state_word(&self) -> &'static str {
        match self.step_loop {
            Loop::Down if self.probe.is_none() => "warming",
            Loop::Down if self.plan.is_some() => "prepared",
            Loop::Down => "spare",
            Loop::Leaving => "leaving",
            Loop::Up => "syncing",
            Loop::Training => "training",
            Loop::Held => "held",
            Loop::Adopting => "adopting",
        }
    }

    /// Returns when [`Event::Tick`] is due at the latest.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        let wait = match (&self.draining, self.orphaned) {
            (Some(_), _) => DRAIN_ALONE.min(self.patience.give_up),
            (None, true) => self.patience.give_up,
            (None, false) => self.patience.orphan.min(self.patience.give_up),
        };
        (!self.connected).then(|| self.alone_since + wait)
    }

    /// Takes one event and returns what to do, in order.
    pub fn handle(&mut self, now: Timestamp, event: Event) -> Vec<Command> {
        match event {
            Event::Connected => {
                self.connected = true;
                self.orphaned = false;
            }
            Event::Welcomed => self.on_welcomed(),
            Event::Disconnected => self.on_disconnected(now),
            Event::Received(message) => self.on_received(now, message),
            Event::Report(report) => self.on_report(report),
            Event::Drain { why } => self.on_drain(why),
            Event::Tick => {}
        }
        if !self.connected {
            self.wait_alone(now.since(self.alone_since));
        }
        std::mem::take(&mut self.out)
    }

    /// A coordinator that listens is told everything that it may have missed.
    fn on_welcomed(&mut self) {
        self.welcomed = true;
        if let Some(probe) = self.probe {
            self.say(ToCoordinator::Warm { probe });
        }
        let answers = self.answers.clone();
        answers.in_order().for_each(|answer| self.say(answer.clone()));
        if let Some(why) = self.draining.clone() {
            self.say(ToCoordinator::Leaving { why });
        }
        self.end_if_never_warm();
    }

    fn on_disconnected(&mut self, now: Timestamp) {
        if self.connected {
            self.alone_since = now;
        }
        (self.connected, self.welcomed) = (false, false);
        if let Some(why) = self.draining.clone().filter(|_| self.step_loop != Loop::Training) {
            // Nothing is under way that somebody could wait for.
            self.exit(exit::DRAINED, why);
        }
    }

    fn wait_alone(&mut self, alone: Duration) {
        if let Some(why) = self.draining.clone().filter(|_| alone >= DRAIN_ALONE) {
            self.exit(exit::DRAINED, why);
        } else if alone >= self.patience.give_up {
            self.exit(exit::UNREACHABLE, "the coordinator could not be reached".to_string());
        } else if alone >= self.patience.orphan && !self.orphaned {
            self.orphaned = true;
            if self.step_loop == Loop::Training {
                let text = "no coordinator for long: standing still at the next boundary";
                self.out.push(Command::Note(text.to_string()));
                let generation = self.generation;
                self.out.push(Command::RaiseStop { generation, change: ORPHAN_CHANGE });
            }
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

    fn on_received(&mut self, now: Timestamp, message: ToWorker) {
        match message {
            ToWorker::Prepare(plan) => self.on_prepare(plan),
            ToWorker::Connect { generation, comm_id, sync } if generation == self.generation => {
                if let Some(plan) = self.plan.clone().filter(|_| self.step_loop == Loop::Down) {
                    self.step_loop = Loop::Up;
                    self.out.push(Command::Connect { plan, comm_id, sync });
                }
            }
            ToWorker::Start { generation, .. } if self.is_at(generation, Loop::Up) => {
                self.step_loop = Loop::Training;
                self.trained = generation;
                self.answers = Answers::default();
                self.out.push(Command::Start { generation });
            }
            ToWorker::Revoke { generation, why } if generation == self.generation => {
                if self.plan.is_some() {
                    let text = format!("generation {generation} is over: {why}");
                    self.out.push(Command::Note(text));
                }
                self.drop_out();
            }
            ToWorker::Hold { generation, change, .. } if self.is_at(generation, Loop::Training) => {
                self.out.push(Command::RaiseStop { generation, change });
            }
            ToWorker::Propose { generation, attempt, held }
                if self.is_in(generation) && attempt > self.attempt =>
            {
                self.attempt = attempt;
                self.answers.snapshotted = None;
                self.answers.part = None;
                self.out.push(Command::Save { generation, attempt, held });
            }
            ToWorker::AbortAttempt { generation, attempt, why } if self.is_in(generation) => {
                let text = format!("checkpoint attempt {attempt} given up: {why}");
                self.out.push(Command::Note(text));
                self.out.push(Command::AbortAttempt { generation, attempt });
            }
            ToWorker::Audit { generation } if generation == self.generation => {
                self.out.push(Command::Audit { generation });
            }
            ToWorker::Exit { code, why } => self.exit(code, why),
            ToWorker::Stale { current } => {
                self.out.push(Command::Note(format!(
                    "given up by the coordinator, which is at generation {current}; joining again"
                )));
                self.drop_out();
                (self.connected, self.welcomed) = (false, false);
                self.alone_since = now;
                self.out.push(Command::Reconnect);
            }
            // Committed needs nothing; everything else is of a generation that is over.
            _ => {}
        }
    }

    /// A plan: new, or said again because the stream broke.
    fn on_prepare(&mut self, plan: Arc<Plan>) {
        if plan.generation < self.generation {
            return;
        }
        if plan.generation == self.generation {
            // Whoever is past preparing has answered, and says so again on each stream.
            return self.prepared_if_down();
        }
        let keeps = plan.communicator == Communicator::Keep && self.step_loop == Loop::Held;
        self.generation = plan.generation;
        self.answers = Answers::default();
        self.attempt = AttemptSeq(0);
        self.plan = Some(plan.clone());
        if keeps {
            self.step_loop = Loop::Adopting;
            self.out.push(Command::Adopt { plan });
        } else {
            self.leave();
            self.prepared_if_down();
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
            Report::Adopted { generation, state } => {
                if generation == self.generation && self.step_loop == Loop::Adopting {
                    self.state = Some(state);
                    self.step_loop = Loop::Up;
                    let state = Some(state);
                    let (trained, kept) = (self.trained, true);
                    let prepared = ToCoordinator::Prepared { generation, state, trained, kept };
                    self.answer(generation, prepared);
                }
            }
            Report::Audited { generation, probe } => {
                self.answer(generation, ToCoordinator::Audited { generation, probe });
            }
            Report::Synced { generation, step, digest } => {
                self.state = Some(step);
                self.answer(generation, ToCoordinator::Synced { generation, step, digest });
            }
            Report::Mark(mark) => {
                self.state = Some(mark.step);
                if mark.generation == self.generation {
                    self.say(ToCoordinator::StepMark(mark));
                }
            }
            Report::Held { generation, step, digest } => {
                self.state = Some(step);
                if generation == self.generation && self.step_loop == Loop::Training {
                    self.step_loop = Loop::Held;
                }
                self.answer(generation, ToCoordinator::Held { generation, step, digest });
            }
            Report::Snapshotted { generation, attempt, step, digest } => self.answer(
                generation,
                ToCoordinator::Snapshotted { generation, attempt, step, digest },
            ),
            Report::PartDone { generation, attempt, receipt } => {
                self.answer(generation, ToCoordinator::PartDone { generation, attempt, receipt })
            }
            Report::PartFailed { generation, attempt, detail } => {
                self.answer(generation, ToCoordinator::PartFailed { generation, attempt, detail })
            }
            Report::Fault { generation, kind, suspects, detail } => {
                self.out.push(Command::Note(detail.clone()));
                let fault =
                    ToCoordinator::Fault { generation, kind, suspects, detail: detail.clone() };
                match generation {
                    Generation(0) => self.on_fault_before_warm(kind, fault, detail),
                    _ => self.on_fault(generation, kind, fault, detail),
                }
            }
        }
    }

    fn on_fault(
        &mut self,
        generation: Generation,
        kind: FaultKind,
        fault: ToCoordinator,
        detail: String,
    ) {
        self.answer(generation, fault);
        if let Some(code) = last_code(kind) {
            self.exit(code, detail);
        }
    }

    /// It never became warm: there is no generation to answer for. Whose device failed ends once
    /// the coordinator knows, so that a run all of whose workers end so fails; whose data is
    /// broken stays until an operator lets it try again.
    fn on_fault_before_warm(&mut self, kind: FaultKind, fault: ToCoordinator, detail: String) {
        self.answers.fault = Some(fault.clone());
        self.say(fault);
        self.never_warm = last_code(kind).map(|code| (code, detail));
        if self.welcomed {
            self.end_if_never_warm();
        }
    }

    fn end_if_never_warm(&mut self) {
        if let Some((code, why)) = self.never_warm.clone() {
            // An agent would start again what ends with the code of a broken device.
            self.exit(if self.draining.is_some() { exit::DRAINED } else { code }, why);
        }
    }

    fn is_in(&self, generation: Generation) -> bool {
        generation == self.generation && self.is_up()
    }

    fn is_at(&self, generation: Generation, place: Loop) -> bool {
        generation == self.generation && self.step_loop == place
    }

    /// Takes part in nothing any more.
    fn drop_out(&mut self) {
        self.plan = None;
        self.answers = Answers::default();
        self.leave();
    }

    fn leave(&mut self) {
        if self.is_up() {
            self.step_loop = Loop::Leaving;
            self.out.push(Command::Leave { up_to: self.generation });
        }
    }

    fn prepared_if_down(&mut self) {
        if self.step_loop == Loop::Down && self.plan.is_some() {
            let (generation, state, trained) = (self.generation, self.state, self.trained);
            let prepared = ToCoordinator::Prepared { generation, state, trained, kept: false };
            self.answer(generation, prepared);
        }
    }

    /// Says what belongs to `generation`, now and on every new stream, unless that is over.
    fn answer(&mut self, generation: Generation, message: ToCoordinator) {
        if generation == self.generation {
            self.answers.keep(&message);
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

/// Returns the code with which a fault ends the process, if it does. A broken device stays broken
/// in this process: the next one may be lucky.
fn last_code(kind: FaultKind) -> Option<u8> {
    match kind {
        FaultKind::Local => Some(exit::IO),
        FaultKind::Unfit => Some(exit::UNFIT),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
