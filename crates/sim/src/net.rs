//! Streams between workers and the coordinator, and which way between which nodes is cut.
//!
//! A stream keeps order while it lives. When it breaks, what is under way is lost or late: a
//! message of an old stream may arrive after the hello of the next one.

use lacuna_control::coordinator::Hello;
use lacuna_control::message::{ToCoordinator, ToWorker};

use crate::setup::MS;
use crate::world::{Ev, Pid, World};

/// The coordinator's place among nodes.
pub const COORDINATOR: usize = 0;
/// A stream through which nothing comes for so long is given up by both ends.
pub const KEEP_ALIVE: u64 = 8_000 * MS;
/// Slowest that a message passes on a slow stream: beats still come within a lease.
const SLOWEST: u64 = 1_200 * MS;
/// Latest that an end notices a reset: the other still waits for it.
const LATEST: u64 = 600 * MS;
/// Longest time to open a stream.
const CONNECT: u64 = 5_000 * MS;

/// Ways that are cut, from node to node.
#[derive(Clone, Debug, Default)]
pub struct Net {
    cuts: Vec<(usize, usize)>,
    /// Counts cuts, so that a timer knows whether its cut is the same.
    pub serial: u64,
}

impl Net {
    /// Tells whether nothing passes from one node to another.
    pub fn is_cut(&self, from: usize, to: usize) -> bool {
        !self.cuts.is_empty() && self.cuts.contains(&(from, to))
    }

    fn is_cut_any(&self, one: usize, other: usize) -> bool {
        self.is_cut(one, other) || self.is_cut(other, one)
    }
}

/// A stream of one trainer, over its whole life.
#[derive(Debug)]
pub struct Conn {
    /// Whose.
    pub pid: Pid,
    /// What the worker says first.
    pub hello: Hello,
    /// Whether the worker gave the stream up.
    pub closed: bool,
    /// Whether the worker's end is open.
    pub worker_open: bool,
    /// Whether the coordinator's end is open.
    pub host_open: bool,
    /// When the last message up arrives: later ones are not earlier.
    up_last: u64,
    down_last: u64,
    /// Slowness of this stream, in nanoseconds a message.
    delay: u64,
    held_up: Vec<ToCoordinator>,
    held_down: Vec<ToWorker>,
}

impl World {
    /// Draws the delay of one message.
    pub(crate) fn latency(&mut self) -> u64 {
        let usual = self.setup.latency_ms.max(1) * MS;
        let slow = if self.rng.one_in(40) { 10 * usual } else { 0 };
        100_000 + self.rng.below(usual) + slow
    }

    pub(crate) fn node_of(&self, pid: Pid) -> usize {
        self.procs[pid].node
    }

    /// A worker opens a stream, unless it has one.
    pub(crate) fn on_connect(&mut self, pid: Pid, tries: u64) {
        let node = self.node_of(pid);
        let process = &self.procs[pid];
        if process.conn.is_some() || process.connecting {
            return;
        }
        let slow = self.rng.one_in(8);
        let delay = if slow { (self.latency() * 20).min(SLOWEST) } else { 0 };
        let conn = self.conns.len();
        self.conns.push(Conn {
            pid,
            hello: self.procs[pid].hello(),
            closed: false,
            worker_open: false,
            host_open: false,
            up_last: 0,
            down_last: 0,
            delay,
            held_up: Vec::new(),
            held_down: Vec::new(),
        });
        self.procs[pid].connecting = true;
        self.procs[pid].tries = tries;
        self.procs[pid].pending = conn;
        if self.net.is_cut_any(node, COORDINATOR) {
            self.later(CONNECT, Ev::Refused { conn });
            return;
        }
        let after = self.latency();
        if self.host.is_up() {
            self.later(after, Ev::Opening { conn });
        } else {
            self.later(after, Ev::Refused { conn });
        }
    }

    /// The hello arrives: the coordinator lets the worker in, or not.
    pub(crate) fn on_opening(&mut self, conn: usize) {
        let pid = self.conns[conn].pid;
        let node = self.node_of(pid);
        let after = self.latency();
        let gone = self.conns[conn].closed || self.net.is_cut(COORDINATOR, node);
        if !self.host.is_up() || gone || !self.host_admits(conn) {
            let after = if gone { CONNECT } else { after };
            self.later(after, Ev::Refused { conn });
            return;
        }
        self.conns[conn].host_open = true;
        let last = self.now + after;
        self.conns[conn].down_last = last;
        self.later(after, Ev::Opened { conn });
        self.attach(conn);
    }

    /// Sends on a worker's stream.
    pub(crate) fn send_up(&mut self, pid: Pid, message: ToCoordinator) {
        let Some(conn) = self.procs[pid].conn else { return };
        let node = self.node_of(pid);
        if self.net.is_cut_any(node, COORDINATOR) {
            self.conns[conn].held_up.push(message);
            return;
        }
        if self.setup.duplicate_in > 0 && self.rng.one_in(self.setup.duplicate_in) {
            let after = 40 * self.latency();
            self.later(after, Ev::Echo { pid, message: Box::new(message.clone()) });
        }
        let after = self.latency() + self.conns[conn].delay;
        let at = (self.now + after).max(self.conns[conn].up_last);
        self.conns[conn].up_last = at;
        self.at(at, Ev::Up { conn, message: Box::new(message) });
    }

    /// Sends on the coordinator's end of a stream.
    pub(crate) fn send_down(&mut self, conn: usize, message: ToWorker) {
        let node = self.node_of(self.conns[conn].pid);
        if self.net.is_cut_any(node, COORDINATOR) {
            self.conns[conn].held_down.push(message);
            return;
        }
        let after = self.latency() + self.conns[conn].delay;
        let at = (self.now + after).max(self.conns[conn].down_last);
        self.conns[conn].down_last = at;
        self.at(at, Ev::Down { conn, message: Box::new(message) });
    }

    /// The worker closes its end, or its process is gone.
    pub(crate) fn close_up(&mut self, pid: Pid, silently: bool) {
        let pending = self.procs[pid].pending;
        if std::mem::take(&mut self.procs[pid].connecting) {
            self.procs[pid].conn.get_or_insert(pending);
        }
        let Some(conn) = self.procs[pid].conn.take() else { return };
        self.conns[conn].worker_open = false;
        self.conns[conn].closed = true;
        self.conns[conn].held_up.clear();
        if silently || self.net.is_cut(self.node_of(pid), COORDINATOR) {
            self.later(KEEP_ALIVE, Ev::UpBroken { conn });
            return;
        }
        // Some of what is under way arrives before the end does, and some never.
        let after = self.latency() * self.rng.range(1, 3);
        self.later(after, Ev::UpBroken { conn });
    }

    /// The coordinator closes its end, or its process is gone.
    pub(crate) fn close_down(&mut self, conn: usize) {
        if !std::mem::replace(&mut self.conns[conn].host_open, false) {
            return;
        }
        self.conns[conn].held_down.clear();
        let node = self.node_of(self.conns[conn].pid);
        let after = match self.net.is_cut(COORDINATOR, node) {
            true => KEEP_ALIVE,
            false => self.latency().max(self.conns[conn].down_last.saturating_sub(self.now)),
        };
        self.later(after, Ev::DownBroken { conn });
    }

    /// Both ends see a reset at their own time.
    pub(crate) fn break_stream(&mut self, pid: Pid) {
        let Some(conn) = self.procs[pid].conn else { return };
        let (one, other) = (self.latency() * 2, (self.latency() * 20).min(LATEST));
        let swapped = self.rng.one_in(2);
        self.later(if swapped { other } else { one }, Ev::UpBroken { conn });
        self.later(if swapped { one } else { other }, Ev::DownBroken { conn });
    }

    pub(crate) fn on_keep_alive(&mut self, conn: usize, cut: u64) {
        let pid = self.conns[conn].pid;
        if self.net.serial == cut && self.net.is_cut_any(self.node_of(pid), COORDINATOR) {
            let (one, other) = (self.latency(), self.latency() * 50);
            self.later(one, Ev::UpBroken { conn });
            self.later(other, Ev::DownBroken { conn });
        }
    }

    /// Cuts the way from one node to another.
    pub(crate) fn cut(&mut self, from: usize, to: usize) {
        if !self.net.is_cut(from, to) {
            self.net.cuts.push((from, to));
        }
        self.net.serial += 1;
        if from != COORDINATOR && to != COORDINATOR {
            self.hold_outcomes(from, to);
            return;
        }
        let node = from.max(to);
        let cut = self.net.serial;
        for conn in 0..self.conns.len() {
            let open = self.conns[conn].worker_open || self.conns[conn].host_open;
            if open && self.node_of(self.conns[conn].pid) == node {
                self.later(KEEP_ALIVE, Ev::KeepAlive { conn, cut });
            }
        }
    }

    /// Opens the way again; what was held goes on in order.
    pub(crate) fn uncut(&mut self, from: usize, to: usize) {
        self.net.cuts.retain(|cut| *cut != (from, to));
        self.flow_again();
    }

    /// Opens all ways.
    pub(crate) fn uncut_all(&mut self) {
        self.net.cuts.clear();
        self.flow_again();
    }

    fn flow_again(&mut self) {
        for conn in 0..self.conns.len() {
            let pid = self.conns[conn].pid;
            let held = self.conns[conn].held_up.len() + self.conns[conn].held_down.len();
            if held == 0 || self.net.is_cut_any(self.node_of(pid), COORDINATOR) {
                continue;
            }
            for message in std::mem::take(&mut self.conns[conn].held_up) {
                if self.procs[pid].conn == Some(conn) {
                    self.send_up(pid, message);
                }
            }
            for message in std::mem::take(&mut self.conns[conn].held_down) {
                self.send_down(conn, message);
            }
        }
        self.unstall();
    }
}
