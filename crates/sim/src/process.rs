//! A trainer's process: the real session machine, its driver, and the modelled step loop.

use std::time::Duration;

use lacuna_control::coordinator::Hello;
use lacuna_control::message::{Beat, FaultKind, Phase, ToCoordinator, ToWorker};
use lacuna_control::worker::{Command, Event, Patience, Report, Session};
use lacuna_types::{Generation, Incarnation, Step, WorkerId, exit};

use crate::catalogue::Disk;
use crate::coverage;
use crate::setup::MS;
use crate::steps::{Order, StepLoop};
use crate::world::{Clock, Ev, Pid, World};

/// First and longest pause between attempts to reach the coordinator.
const RETRY: (u64, u64) = (100 * MS, 2_000 * MS);

/// One life of a worker.
#[derive(Debug)]
pub struct Process {
    /// Which worker.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: Incarnation,
    /// Where it runs.
    pub node: usize,
    /// Whether it lives.
    pub alive: bool,
    /// Whether it is stopped by a signal.
    pub stopped: bool,
    /// What it missed while stopped.
    pub waiting: Vec<Ev>,
    /// The real machine.
    pub session: Session,
    /// The modelled step loop.
    pub step_loop: StepLoop,
    /// Its clock.
    pub clock: Clock,
    /// Its stream.
    pub conn: Option<usize>,
    /// Whether a stream is being opened.
    pub connecting: bool,
    /// The stream that is being opened.
    pub pending: usize,
    /// Attempts in a row to open a stream.
    pub tries: u64,
    /// Digest of its probe.
    pub probe: u64,
    /// Whether its device is ready.
    pub warm: bool,
    /// It was asked to leave.
    pub noticed: bool,
    /// Its agent does not watch it: another agent started it.
    pub unwatched: bool,
    /// How writing parts goes.
    pub disk: Disk,
    /// Where it was last, for coverage.
    pub place: usize,
}

impl Process {
    /// Says how the worker introduces itself.
    pub fn hello(&self) -> Hello {
        Hello {
            worker: self.worker.clone(),
            incarnation: self.incarnation,
            endpoint: format!("{}@{}", self.worker, self.incarnation),
            state: self.session.state(),
            generation: self.session.taking_part_in(),
            up: self.session.is_up(),
        }
    }
}

impl World {
    /// Starts a trainer on a node.
    pub(crate) fn start_process(&mut self, node: usize, worker: &WorkerId, probe: u64) -> Pid {
        let clock = Clock::draw(&mut self.rng, self.setup.skew_ppm);
        let patience = Patience {
            orphan: Duration::from_millis(self.setup.orphan_ms),
            give_up: Duration::from_millis(self.setup.give_up_ms),
        };
        let pid = self.procs.len();
        let session = Session::new(patience, clock.show(self.now));
        self.procs.push(Process {
            worker: worker.clone(),
            incarnation: Incarnation(1000 + self.procs.len() as u64),
            node,
            alive: true,
            stopped: false,
            waiting: Vec::new(),
            place: coverage::place(&session),
            session,
            step_loop: StepLoop::default(),
            clock,
            conn: None,
            connecting: false,
            pending: 0,
            tries: 0,
            probe,
            warm: false,
            noticed: false,
            unwatched: false,
            disk: Disk::Fine,
        });
        let start = 20 * MS + self.latency();
        self.later(start, Ev::Connect { pid, tries: 0 });
        let warm = start + self.rng.range(self.setup.warm_ms / 2, self.setup.warm_ms * 2) * MS;
        self.later(warm, Ev::Warm { pid });
        self.later(start, Ev::Beat { pid });
        pid
    }

    /// Gives the machine an event and does what it says.
    pub(crate) fn feed(&mut self, pid: Pid, event: Event) {
        let process = &mut self.procs[pid];
        if !process.alive {
            return;
        }
        self.coverage.worker(process.place, &event);
        let stale = stale_for(&process.session, &event);
        let before =
            stale.is_some().then(|| (process.session.generation(), process.session.state()));
        let now = process.clock.show(self.now);
        let commands = process.session.handle(now, event);
        let process = &mut self.procs[pid];
        process.place = coverage::place(&process.session);
        if let Some(generation) = stale {
            let after = (process.session.generation(), process.session.state());
            let inert = |c: &Command| matches!(c, Command::Note(_) | Command::Exit { .. });
            if before != Some(after) || !commands.iter().all(inert) {
                let epoch = self.host.epoch;
                self.changed((epoch, generation), (epoch, after.0));
            }
        }
        for command in commands {
            if !self.procs[pid].alive {
                return;
            }
            self.obey(pid, command);
        }
    }

    fn obey(&mut self, pid: Pid, command: Command) {
        match command {
            Command::Send(message) => self.send_up(pid, message),
            Command::Reconnect => {
                self.close_up(pid, false);
                self.feed(pid, Event::Disconnected);
                self.reconnect(pid);
            }
            Command::Leave { .. } => self.abort(pid),
            Command::Adopt { plan } => self.order(pid, Order::Adopt { plan }),
            Command::Audit { generation } => self.order(pid, Order::Audit { generation }),
            Command::Connect { plan, sync, .. } => self.order(pid, Order::Connect { plan, sync }),
            Command::Start { generation } => self.order(pid, Order::Start { generation }),
            Command::RaiseStop { change, .. } => self.procs[pid].step_loop.stop = change,
            Command::Save { attempt, held: false, .. } => {
                self.procs[pid].step_loop.save = attempt.0;
            }
            Command::Save { generation, attempt, held: true } => {
                self.order(pid, Order::Save { generation, attempt });
            }
            Command::AbortAttempt { attempt, .. } => {
                let lane = &mut self.procs[pid].step_loop.save;
                if *lane == attempt.0 {
                    *lane = 0;
                }
            }
            Command::Note(_) => {}
            Command::Exit { code, why } => {
                let worker = self.procs[pid].worker.clone();
                self.say(|| format!("{worker} exits with {code}: {why}"));
                // Whoever was asked to leave does not wait for a stream that broke.
                let alone = self.procs[pid].conn.is_none();
                self.rough |= code == exit::UNREACHABLE || (code == exit::DRAINED && alone);
                self.end_process(pid, Some(code), false);
            }
        }
    }

    /// A process is gone; its agent sees it, its peers and the coordinator by and by.
    pub(crate) fn end_process(&mut self, pid: Pid, code: Option<u8>, silently: bool) {
        if !self.procs[pid].alive {
            return;
        }
        self.close_up(pid, silently);
        self.leave_comm(pid, silently);
        let process = &mut self.procs[pid];
        process.alive = false;
        process.stopped = false;
        process.waiting.clear();
        process.step_loop = StepLoop::default();
        if !silently && !process.unwatched {
            self.agent_saw_exit(pid, code);
        }
    }

    pub(crate) fn on_opened(&mut self, conn: usize) {
        let pid = self.conns[conn].pid;
        let current = self.procs[pid].connecting && self.procs[pid].pending == conn;
        if !current || self.conns[conn].closed {
            return;
        }
        let process = &mut self.procs[pid];
        process.connecting = false;
        process.tries = 0;
        process.conn = Some(conn);
        self.conns[conn].worker_open = true;
        self.feed(pid, Event::Connected);
        self.feed(pid, Event::Welcomed);
    }

    pub(crate) fn on_refused(&mut self, conn: usize) {
        let pid = self.conns[conn].pid;
        self.conns[conn].closed = true;
        let process = &mut self.procs[pid];
        if process.connecting && process.pending == conn {
            process.connecting = false;
            self.feed(pid, Event::Disconnected);
            self.reconnect(pid);
        }
    }

    pub(crate) fn on_down_broken(&mut self, conn: usize) {
        let pid = self.conns[conn].pid;
        let process = &self.procs[pid];
        let opening = process.connecting && process.pending == conn;
        if process.conn != Some(conn) && !opening {
            return;
        }
        self.close_up(pid, false);
        self.feed(pid, Event::Disconnected);
        self.reconnect(pid);
    }

    pub(crate) fn reconnect(&mut self, pid: Pid) {
        if self.procs[pid].alive {
            let tries = self.procs[pid].tries;
            let pause = (RETRY.0 << tries.min(6)).min(RETRY.1);
            self.later(pause, Ev::Connect { pid, tries: tries + 1 });
        }
    }

    pub(crate) fn on_down(&mut self, conn: usize, message: ToWorker) {
        let pid = self.conns[conn].pid;
        if self.procs[pid].conn == Some(conn) {
            self.feed(pid, Event::Received(message));
        }
    }

    pub(crate) fn on_warm(&mut self, pid: Pid) {
        if !self.has_a_device(pid) {
            let (generation, kind, suspects) = (Generation(0), FaultKind::Local, Vec::new());
            let detail = "out of memory".to_string();
            return self.report(pid, Report::Fault { generation, kind, suspects, detail });
        }
        self.procs[pid].warm = true;
        let probe = self.procs[pid].probe;
        self.feed(pid, Event::Report(Report::Warm { probe }));
    }

    /// Tells whether the devices of a process's node work.
    pub(crate) fn has_a_device(&self, pid: Pid) -> bool {
        self.agents[self.procs[pid].node - 1].works
    }

    pub(crate) fn on_beat(&mut self, pid: Pid) {
        let beat = self.setup.timing().beat.as_nanos() as u64;
        self.later(beat, Ev::Beat { pid });
        if self.procs[pid].warm {
            self.check_deadline(pid);
            let beat = self.beat_of(pid);
            self.send_up(pid, ToCoordinator::Beat(beat));
        }
        self.feed(pid, Event::Tick);
    }

    fn beat_of(&self, pid: Pid) -> Beat {
        let step_loop = &self.procs[pid].step_loop;
        Beat {
            generation: Generation(step_loop.ledger.0),
            step: Step(step_loop.state.map_or(0, |s| s.step)),
            phase: step_loop.phase(),
            phase_ms: (self.now - step_loop.since) / MS,
            op_seq: step_loop.ledger.1,
            in_op: step_loop.is_in_op(self.now),
            slot_us: step_loop.slot_us,
            data_us: 0,
            memory_bytes: 0,
        }
    }

    /// Reports to the session, as the step loop does.
    pub(crate) fn report(&mut self, pid: Pid, report: Report) {
        self.feed(pid, Event::Report(report));
    }
}

/// Returns the generation of a message that is older than the session's.
fn stale_for(session: &Session, event: &Event) -> Option<Generation> {
    let Event::Received(message) = event else { return None };
    let generation = match message {
        ToWorker::Prepare(plan) => plan.generation,
        ToWorker::Connect { generation, .. }
        | ToWorker::Start { generation, .. }
        | ToWorker::Revoke { generation, .. }
        | ToWorker::Hold { generation, .. }
        | ToWorker::Propose { generation, .. }
        | ToWorker::Audit { generation }
        | ToWorker::AbortAttempt { generation, .. } => *generation,
        _ => return None,
    };
    (generation < session.generation()).then_some(generation)
}

/// What an agent does about an exit code: `true` starts the trainer again.
pub(crate) fn starts_again(code: Option<u8>) -> bool {
    !matches!(
        code,
        Some(
            exit::USAGE
                | exit::VERSION
                | exit::UNAUTHORISED
                | exit::UNFIT
                | exit::UNREACHABLE
                | exit::INTERRUPTED
                | exit::DRAINED
        )
    )
}

/// Used by [`Phase`] of an idle loop.
pub(crate) const IDLE: Phase = Phase::Idle;
