//! The simulated world: time, the queue of what comes next, and everything that lives in it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use lacuna_control::coordinator;
use lacuna_control::invariants::{Observation, Observer, Violation};
use lacuna_control::message::{ToCoordinator, ToWorker};
use lacuna_control::plan::CheckpointRef;
use lacuna_types::{CoordEpoch, Incarnation, Timestamp, WorkerId};

use crate::agent::Agent;
use crate::catalogue::Catalogue;
use crate::comm::Comm;
use crate::coverage::Coverage;
use crate::digest::Reference;
use crate::host::Host;
use crate::net::{Conn, Net};
use crate::process::Process;
use crate::rng::Rng;
use crate::saving::PartJob;
use crate::setup::{MS, Setup};

/// A process of a trainer, over the whole history.
pub type Pid = usize;

/// Something that is going to happen.
#[derive(Debug)]
#[allow(missing_docs, reason = "fields are named for what they are")]
pub enum Ev {
    /// A hello arrives at the coordinator.
    Opening { conn: usize },
    /// A welcome arrives at the worker.
    Opened { conn: usize },
    /// Opening a stream failed, as the worker sees it.
    Refused { conn: usize },
    /// A message arrives at the coordinator.
    Up { conn: usize, message: Box<ToCoordinator> },
    /// A message of an old stream arrives once more.
    Echo { pid: Pid, message: Box<ToCoordinator> },
    /// A message arrives at a worker.
    Down { conn: usize, message: Box<ToWorker> },
    /// The coordinator notices that a stream is gone.
    UpBroken { conn: usize },
    /// The worker notices that a stream is gone.
    DownBroken { conn: usize },
    /// Nothing came through for so long that both ends give the stream up.
    KeepAlive { conn: usize, cut: u64 },
    /// A worker opens a stream.
    Connect { pid: Pid, tries: u64 },
    /// A worker's beat is due.
    Beat { pid: Pid },
    /// A trainer's device is ready.
    Warm { pid: Pid },
    /// Something of a step loop is done; counts only for the present `job`.
    Loop { pid: Pid, job: u64 },
    /// A part is written, or is not.
    Part { pid: Pid, job: Box<PartJob> },
    /// An agent's report arrives.
    Exited { node: usize, worker: WorkerId, incarnation: Incarnation, how: &'static str },
    /// An order to kill a trainer arrives at its agent.
    Kill { worker: WorkerId, incarnation: Incarnation },
    /// An agent starts a trainer again.
    Respawn { node: usize, life: u64, worker: WorkerId },
    /// The coordinator's clock is due.
    HostTick { life: u64, tick: u64 },
    /// A durable write of the coordinator is done.
    HostSynced { life: u64 },
    /// An answer to the coordinator's machine.
    HostAnswer { life: u64, event: Box<coordinator::Event> },
    /// A manifest is about to be created.
    Commit { life: u64, epoch: CoordEpoch, order: Box<coordinator::CommitOrder> },
    /// The coordinator has read a checkpoint whole.
    Examine { life: u64, checkpoint: CheckpointRef },
    /// The coordinator goes on after a stall.
    HostAwake { life: u64 },
    /// The coordinator starts.
    HostStart,
    /// An operator looks after the run.
    Tend,
}

struct Entry {
    at: u64,
    order: u64,
    ev: Ev,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// A process's clock: it starts anywhere, runs a little fast or slow, and may jump forward.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// What it showed at the true time 0.
    offset: u64,
    /// Its seconds per million true seconds.
    rate: u64,
}

impl Clock {
    /// Draws a clock.
    pub fn draw(rng: &mut Rng, skew_ppm: u64) -> Self {
        let rate = 1_000_000 - skew_ppm + rng.below(2 * skew_ppm + 1);
        Clock { offset: 3_600_000 * MS + rng.below(1000) * MS, rate }
    }

    /// What it shows at a true time.
    pub fn show(&self, now: u64) -> Timestamp {
        Timestamp(self.offset + (u128::from(now) * u128::from(self.rate) / 1_000_000) as u64)
    }

    /// The true time, in whole nanoseconds, by which it shows `shown`.
    pub fn when(&self, shown: Timestamp) -> u64 {
        let ticks = shown.0.saturating_sub(self.offset);
        (u128::from(ticks) * 1_000_000).div_ceil(u128::from(self.rate)) as u64
    }

    /// Jumps forward.
    pub fn jump(&mut self, by: u64) {
        self.offset += by;
    }
}

/// The world.
pub struct World {
    /// The true time in nanoseconds.
    pub now: u64,
    pub(crate) setup: Setup,
    pub(crate) rng: Rng,
    pub(crate) host: Host,
    pub(crate) procs: Vec<Process>,
    pub(crate) agents: Vec<Agent>,
    pub(crate) comms: Vec<Comm>,
    pub(crate) conns: Vec<Conn>,
    pub(crate) net: Net,
    pub(crate) store: Catalogue,
    pub(crate) reference: Reference,
    pub(crate) observer: Observer,
    /// Some state was corrupted: other digests and pauses are to be expected.
    pub(crate) tainted: bool,
    /// Something was done to the cluster that excuses a fault.
    pub(crate) harmed: bool,
    /// A worker may have lost its state or its peers.
    pub(crate) rough: bool,
    /// What went wrong first.
    pub violation: Option<Violation>,
    /// What happened, line by line, where somebody wants to read it.
    pub(crate) transcript: Option<Vec<String>>,
    /// Whether the transcript holds messages too.
    pub(crate) verbose: bool,
    /// Where the machines were.
    pub coverage: Coverage,
    /// What is counted for expectations.
    pub(crate) counts: Counts,
    queue: BinaryHeap<Reverse<Entry>>,
    order: u64,
}

/// What a transcript holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// There is none.
    None,
    /// What people would be told, and what was done to the cluster.
    Notes,
    /// What machines say to each other, too; beats excepted.
    Messages,
}

/// Figures of a history.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Steps that a member applied which its run had applied before.
    pub redone: u64,
    /// Highest step that any member applied.
    pub highest: u64,
    /// Events handled.
    pub events: u64,
    /// Starts of the coordinator.
    pub starts: u64,
    /// Generations that were formed.
    pub generations: u64,
    /// Checkpoints committed.
    pub commits: u64,
    /// Parts that members began to write.
    pub parts: u64,
    /// Commits that a claim refused.
    pub fenced: u64,
    /// Messages answered with Stale.
    pub stale: u64,
}

impl World {
    /// Creates the world of a setup, with a coordinator that starts at once and nothing else.
    pub fn new(setup: &Setup, detail: Detail) -> Self {
        let mut rng = Rng::new(setup.seed);
        let host = Host::new(&mut rng, setup);
        let mut world = World {
            now: 0,
            setup: setup.clone(),
            rng,
            host,
            procs: Vec::new(),
            agents: Vec::new(),
            comms: Vec::new(),
            conns: Vec::new(),
            net: Net::default(),
            store: Catalogue::default(),
            reference: Reference::new(setup.slots, setup.steps),
            observer: Observer::new(setup.slots),
            tainted: false,
            harmed: false,
            rough: false,
            violation: None,
            transcript: (detail != Detail::None).then(Vec::new),
            verbose: detail == Detail::Messages,
            coverage: Coverage::default(),
            counts: Counts::default(),
            queue: BinaryHeap::new(),
            order: 0,
        };
        world.start_host();
        world
    }

    /// Schedules what happens `after` nanoseconds from now.
    pub(crate) fn later(&mut self, after: u64, ev: Ev) {
        self.order += 1;
        self.queue.push(Reverse(Entry { at: self.now + after, order: self.order, ev }));
    }

    /// Schedules what happens at a true time, or now if that is past.
    pub(crate) fn at(&mut self, at: u64, ev: Ev) {
        self.later(at.saturating_sub(self.now), ev);
    }

    /// Lets everything happen that is due up to `until`, while `go` says so.
    pub fn run_until(&mut self, until: u64, mut go: impl FnMut(&World) -> bool) -> bool {
        while self.violation.is_none() {
            if !go(self) {
                return true;
            }
            let due = self.queue.peek().is_some_and(|Reverse(entry)| entry.at <= until);
            if !due {
                self.now = until.max(self.now);
                return false;
            }
            let Reverse(entry) = self.queue.pop().expect("just seen");
            self.now = entry.at;
            self.counts.events += 1;
            self.happen(entry.ev);
            self.observe(&Observation::Passed);
        }
        false
    }

    /// Dispatches one event; what reaches a stopped process waits for it.
    pub(crate) fn happen(&mut self, ev: Ev) {
        let pid = match &ev {
            Ev::Opened { conn } | Ev::Refused { conn } | Ev::DownBroken { conn } => {
                Some(self.conns[*conn].pid)
            }
            Ev::Down { conn, .. } => Some(self.conns[*conn].pid),
            Ev::Connect { pid, .. } | Ev::Beat { pid } | Ev::Warm { pid } => Some(*pid),
            Ev::Loop { pid, .. } | Ev::Part { pid, .. } => Some(*pid),
            _ => None,
        };
        if let Some(pid) = pid {
            if !self.procs[pid].alive {
                return;
            }
            if self.procs[pid].stopped {
                self.procs[pid].waiting.push(ev);
                return;
            }
        }
        self.dispatch(ev);
    }

    fn dispatch(&mut self, ev: Ev) {
        match ev {
            Ev::Opening { conn } => self.on_opening(conn),
            Ev::Opened { conn } => self.on_opened(conn),
            Ev::Refused { conn } => self.on_refused(conn),
            Ev::Up { conn, message } => self.on_up(conn, *message),
            Ev::Echo { pid, message } => self.on_echo(pid, *message),
            Ev::Down { conn, message } => self.on_down(conn, *message),
            Ev::UpBroken { conn } => self.on_up_broken(conn),
            Ev::DownBroken { conn } => self.on_down_broken(conn),
            Ev::KeepAlive { conn, cut } => self.on_keep_alive(conn, cut),
            Ev::Connect { pid, tries } => self.on_connect(pid, tries),
            Ev::Beat { pid } => self.on_beat(pid),
            Ev::Warm { pid } => self.on_warm(pid),
            Ev::Loop { pid, job } => self.on_loop(pid, job),
            Ev::Part { pid, job } => self.on_part(pid, *job),
            Ev::Exited { node, worker, incarnation, how } => {
                self.on_exit_report(node, worker, incarnation, how);
            }
            Ev::Kill { worker, incarnation } => self.on_kill(&worker, incarnation),
            Ev::Respawn { node, life, worker } => self.on_respawn(node, life, worker),
            Ev::HostTick { life, tick } => self.on_host_tick(life, tick),
            Ev::HostSynced { life } => self.on_host_synced(life),
            Ev::HostAnswer { life, event } => self.on_host_answer(life, *event),
            Ev::Commit { life, epoch, order } => self.on_commit(life, epoch, *order),
            Ev::Examine { life, checkpoint } => self.on_examine(life, checkpoint),
            Ev::HostAwake { life } => self.on_host_awake(life),
            Ev::HostStart => self.start_host(),
            Ev::Tend => self.tend(),
        }
    }

    /// Tells the observer; the first violation is kept.
    pub(crate) fn observe(&mut self, seen: &Observation<'_>) {
        if self.violation.is_none()
            && let Err(violation) = self.observer.observe(Timestamp(self.now), seen)
        {
            self.say(|| format!("VIOLATION {violation}"));
            self.violation = Some(violation);
        }
    }

    /// Writes a line of the transcript, if anybody reads it.
    pub(crate) fn say(&mut self, text: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.transcript {
            let text = text();
            lines.push(format!("{:8.3} {text}", self.now as f64 / 1e9));
        }
    }

    /// Returns the living processes of a worker that its agent watches, oldest first.
    pub(crate) fn lives(&self, worker: &str) -> Vec<Pid> {
        let is =
            |(_, p): &(usize, &Process)| p.alive && !p.unwatched && p.worker.as_str() == worker;
        self.procs.iter().enumerate().filter(is).map(|(pid, _)| pid).collect()
    }

    /// Returns the lines of the transcript so far.
    pub fn lines(&self) -> &[String] {
        self.transcript.as_deref().unwrap_or_default()
    }

    /// Returns the figures so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }
}
