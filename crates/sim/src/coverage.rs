//! Which events met which stages of the two machines.

use lacuna_control::coordinator::{Coordinator, Event};
use lacuna_control::message::{ToCoordinator, ToWorker};
use lacuna_control::worker::{self, Report, Session};

/// Stages of the coordinator.
pub const STAGES: [&str; 12] = [
    "waiting",
    "recovering",
    "disputed",
    "forming",
    "syncing",
    "running",
    "held",
    "finished",
    "failed",
    "stopped",
    "cancelled",
    "paused",
];
/// Events of the coordinator.
pub const EVENTS: [&str; 28] = [
    "Tick",
    "Hello",
    "StreamLost",
    "TrainerExited",
    "CommId",
    "CheckpointDone",
    "CheckpointFailed",
    "Drain",
    "Stop",
    "Checkpoint",
    "Release",
    "Force",
    "Beat",
    "Warm",
    "Prepared",
    "Synced",
    "Fault",
    "StepMark",
    "Held",
    "Snapshotted",
    "PartDone",
    "PartFailed",
    "Leaving",
    "Audited",
    "BadSamples",
    "Examined",
    "Resize",
    "Cancel",
];
/// Stages of a worker's session.
pub const PLACES: [&str; 8] =
    ["warming", "spare", "prepared", "leaving", "syncing", "training", "held", "adopting"];
/// Events of a worker's session.
pub const WORKER_EVENTS: [&str; 27] = [
    "Connected",
    "Welcomed",
    "Disconnected",
    "Drain",
    "Tick",
    "Prepare",
    "Connect",
    "Start",
    "Revoke",
    "Hold",
    "Propose",
    "AbortAttempt",
    "Committed",
    "Exit",
    "Audit",
    "Stale",
    "Warm",
    "Down",
    "Adopted",
    "Audited",
    "Synced",
    "Mark",
    "Held",
    "Snapshotted",
    "PartDone",
    "PartFailed",
    "Fault",
];

/// Pairs that cannot be met, or need not be, each with its reason.
const EXPLAINED: &str = include_str!("coverage.txt");

/// Counts of pairs.
#[derive(Clone, Debug)]
pub struct Coverage {
    coordinator: [[u64; EVENTS.len()]; STAGES.len()],
    worker: [[u64; WORKER_EVENTS.len()]; PLACES.len()],
}

impl Default for Coverage {
    fn default() -> Self {
        Coverage {
            coordinator: [[0; EVENTS.len()]; STAGES.len()],
            worker: [[0; WORKER_EVENTS.len()]; PLACES.len()],
        }
    }
}

/// Returns the row of a session.
pub fn place(session: &Session) -> usize {
    let word = session.state_word();
    PLACES.iter().position(|place| *place == word).expect("every stage has a row")
}

fn stage(machine: &Coordinator) -> usize {
    let word = machine.state_word();
    STAGES.iter().position(|stage| *stage == word).expect("every stage has a row")
}

fn event(event: &Event) -> usize {
    match event {
        Event::Tick => 0,
        Event::Hello(_) => 1,
        Event::StreamLost { .. } => 2,
        Event::TrainerExited { .. } => 3,
        Event::CommId { .. } => 4,
        Event::CheckpointDone { .. } => 5,
        Event::CheckpointFailed { .. } | Event::Superseded { .. } => 6,
        Event::Drain { .. } => 7,
        Event::Stop { .. } => 8,
        Event::Checkpoint => 9,
        Event::Release { .. } => 10,
        Event::Force => 11,
        Event::Examined { .. } => 25,
        Event::Resize { .. } => 26,
        Event::Cancel { .. } => 27,
        Event::Message { message, .. } => match message {
            ToCoordinator::Beat(_) => 12,
            ToCoordinator::Warm { .. } => 13,
            ToCoordinator::Prepared { .. } => 14,
            ToCoordinator::Synced { .. } => 15,
            ToCoordinator::Fault { .. } => 16,
            ToCoordinator::StepMark(_) => 17,
            ToCoordinator::Held { .. } => 18,
            ToCoordinator::Snapshotted { .. } => 19,
            ToCoordinator::PartDone { .. } => 20,
            ToCoordinator::PartFailed { .. } => 21,
            ToCoordinator::Leaving { .. } => 22,
            ToCoordinator::Audited { .. } => 23,
            ToCoordinator::BadSamples(_) => 24,
        },
    }
}

fn worker_event(event: &worker::Event) -> usize {
    use worker::Event as E;
    match event {
        E::Connected => 0,
        E::Welcomed => 1,
        E::Disconnected => 2,
        E::Drain { .. } => 3,
        E::Tick => 4,
        E::Received(message) => match message {
            ToWorker::Prepare(_) => 5,
            ToWorker::Connect { .. } => 6,
            ToWorker::Start { .. } => 7,
            ToWorker::Revoke { .. } => 8,
            ToWorker::Hold { .. } => 9,
            ToWorker::Propose { .. } => 10,
            ToWorker::AbortAttempt { .. } => 11,
            ToWorker::Committed { .. } => 12,
            ToWorker::Exit { .. } => 13,
            ToWorker::Audit { .. } => 14,
            ToWorker::Stale { .. } => 15,
        },
        E::Report(report) => match report {
            Report::Warm { .. } => 16,
            Report::Down { .. } => 17,
            Report::Adopted { .. } => 18,
            Report::Audited { .. } => 19,
            Report::Synced { .. } => 20,
            Report::Mark(_) => 21,
            Report::Held { .. } => 22,
            Report::Snapshotted { .. } => 23,
            Report::PartDone { .. } => 24,
            Report::PartFailed { .. } => 25,
            Report::Fault { .. } => 26,
        },
    }
}

impl Coverage {
    /// Counts an event that is about to reach the coordinator.
    pub fn coordinator(&mut self, machine: &Coordinator, what: &Event) {
        self.coordinator[stage(machine)][event(what)] += 1;
    }

    /// Counts an event that is about to reach a session.
    pub fn worker(&mut self, place: usize, what: &worker::Event) {
        self.worker[place][worker_event(what)] += 1;
    }

    /// Adds another history's counts.
    pub fn add(&mut self, other: &Coverage) {
        let rows = self.coordinator.iter_mut().flatten();
        rows.zip(other.coordinator.iter().flatten()).for_each(|(a, b)| *a += b);
        let rows = self.worker.iter_mut().flatten();
        rows.zip(other.worker.iter().flatten()).for_each(|(a, b)| *a += b);
    }

    /// Writes both tables.
    pub fn tables(&self) -> String {
        let mut out = String::from("coordinator");
        out += &table(&EVENTS, &STAGES, &|row, col| self.coordinator[row][col]);
        out += "\nworker";
        out += &table(&WORKER_EVENTS, &PLACES, &|row, col| self.worker[row][col]);
        out
    }

    /// Lists the pairs that were never met and have no reason, and the reasons that are wrong.
    pub fn problems(&self) -> Vec<String> {
        let explained = parse(EXPLAINED);
        let mut out: Vec<String> = Vec::new();
        let mut check = |machine: &str, stage: &str, event: &str, count: u64| {
            let covers = |e: &&Explained| {
                e.machine == machine
                    && (e.stage == "*" || e.stage == stage)
                    && (e.event == "*" || e.event == event)
            };
            let reason = explained.iter().find(covers);
            match (count, reason) {
                (0, None) => out.push(format!("never met: {machine} {stage} {event}")),
                (1.., Some(Explained { never: true, .. })) => {
                    out.push(format!(
                        "said to be impossible, met {count} times: {machine} {stage} {event}"
                    ));
                }
                _ => {}
            }
        };
        for (row, stage) in STAGES.iter().enumerate() {
            for (col, event) in EVENTS.iter().enumerate() {
                check("coordinator", stage, event, self.coordinator[row][col]);
            }
        }
        for (row, place) in PLACES.iter().enumerate() {
            for (col, event) in WORKER_EVENTS.iter().enumerate() {
                check("worker", place, event, self.worker[row][col]);
            }
        }
        out
    }
}

fn table(columns: &[&str], rows: &[&str], count: &dyn Fn(usize, usize) -> u64) -> String {
    let width = 10;
    let mut out = String::new();
    for row in rows {
        out += &format!("{row:>width$}");
    }
    out.push('\n');
    for (col, name) in columns.iter().enumerate() {
        out += &format!("{name:16}");
        for row in 0..rows.len() {
            let text = match count(row, col) {
                0 => "-".to_string(),
                n if n >= 10_000_000 => format!("{}M", n / 1_000_000),
                n => n.to_string(),
            };
            out += &format!("{text:>width$}");
        }
        out.push('\n');
    }
    out
}

/// One line of the list of reasons.
struct Explained {
    machine: &'static str,
    stage: &'static str,
    event: &'static str,
    /// Whether the pair cannot happen, and not only seldom does.
    never: bool,
}

/// Reads lines `machine stage event never|rare: reason`; `*` stands for any.
fn parse(text: &'static str) -> Vec<Explained> {
    let mut out = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (pair, reason) = line.split_once(':').expect("a reason follows a colon");
        assert!(!reason.trim().is_empty(), "a pair without a reason: {line}");
        let words: Vec<&'static str> = pair.split_whitespace().collect();
        let [machine, stage, event, how] = words[..] else { panic!("unreadable line: {line}") };
        assert!(how == "never" || how == "rare", "`never` or `rare`: {line}");
        out.push(Explained { machine, stage, event, never: how == "never" });
    }
    out
}
