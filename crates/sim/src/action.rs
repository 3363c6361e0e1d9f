//! What may be done to a cluster, as words: the commands of scenarios and the faults of histories.

use std::fmt;
use std::str::FromStr;

use crate::catalogue::Disk;
use crate::host::{Trap, Write};

/// Something done to the cluster.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Start a worker, and its agent if need be.
    Spawn(String),
    /// Start another process of the same name under another agent.
    Twin(String),
    /// Kill a trainer; its agent sees it.
    Kill(String),
    /// A trainer ends by itself with an error.
    Fail(String),
    /// Kill an agent; its trainers end when they notice.
    KillAgent(String),
    /// A node loses power: nothing is heard of it any more.
    Lose(String),
    /// The agent of a node stops or begins to start trainers again.
    Respawn(String, bool),
    /// The trainers that a node starts from here on give this probe.
    Probe(String, u64),
    /// A node's devices break, training or not, or work again: processes that start meanwhile are
    /// never ready.
    Device(String, bool),
    /// SIGSTOP.
    Stop(String),
    /// SIGCONT.
    Continue(String),
    /// The step loop never comes back from its next step, while beats go on.
    Hang(String),
    /// The step loop never comes back from an abort, while beats go on.
    Stick(String),
    /// Hangs and stuck aborts come back.
    Unhang(String),
    /// Steps take so many tenths longer.
    Slow(String, u64),
    /// The state in memory changes.
    Corrupt(String),
    /// Its device computes other bits from here on.
    Rot(String),
    /// The newest checkpoint's bytes change.
    Spoil,
    /// Data cannot be read, or can again.
    Unfit(String, bool),
    /// A signal or a preemption notice asks the trainer to leave.
    Notice(String),
    /// An operator drains a worker.
    Drain(String),
    /// How writing parts goes on a worker, manifests, or the coordinator's journal.
    Disk(String, Disk),
    /// Nothing passes from one node to another.
    Cut(String, String),
    /// The way is open again.
    Uncut(String, String),
    /// A stream to the coordinator is reset.
    Break(String),
    /// A clock jumps forward by so many milliseconds.
    Jump(String, u64),
    /// The coordinator ends at once, with commits that are still carried out if it is a zombie.
    Crash {
        /// Whether its commits are still carried out.
        zombie: bool,
    },
    /// A crash is set; the coordinator is back after so many milliseconds.
    At(Trap, u64),
    /// The coordinator starts again.
    Restart,
    /// The coordinator does nothing for so many milliseconds.
    Stall(u64),
    /// The run stops at the next boundary.
    Rest,
    /// The run ends at once, without a checkpoint.
    Cancel,
    /// A run that rests goes on.
    Resume,
    /// Checkpoint at the next boundary.
    Checkpoint,
    /// An operator lets a worker back in.
    Release(String),
    /// An operator gives silent members up.
    Force,
    /// An operator wants other numbers of workers: fewest and most.
    Scale(usize, usize),
    /// All faults end: ways open, processes go on, disks work, enough workers are started.
    Repair,
}

impl Action {
    /// Tells whether no worker loses its state or its peers by it: no step may be lost.
    pub fn is_gentle(&self) -> bool {
        use Action as A;
        let coordinator = matches!(self, A::Crash { .. } | A::At(..) | A::Restart | A::Stall(_));
        self.is_harmless() || coordinator || matches!(self, A::Break(_) | A::Jump(..))
    }

    /// Tells whether it does no harm: nothing may fail because of it.
    pub fn is_harmless(&self) -> bool {
        use Action as A;
        matches!(
            self,
            A::Spawn(_)
                | A::Notice(_)
                | A::Drain(_)
                | A::Rest
                | A::Resume
                | A::Checkpoint
                | A::Release(_)
                | A::Force
                | A::Scale(..)
                | A::Slow(..)
                | A::Repair
        )
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Action as A;
        let switch = |on: &bool| if *on { "on" } else { "off" };
        match self {
            A::Spawn(w) => write!(f, "spawn {w}"),
            A::Twin(w) => write!(f, "twin {w}"),
            A::Kill(w) => write!(f, "kill {w}"),
            A::Fail(w) => write!(f, "fail {w}"),
            A::KillAgent(n) => write!(f, "kill-agent {n}"),
            A::Lose(n) => write!(f, "lose {n}"),
            A::Respawn(n, on) => write!(f, "respawn {n} {}", switch(on)),
            A::Probe(n, probe) => write!(f, "probe {n} {probe}"),
            A::Device(n, true) => write!(f, "device {n} works"),
            A::Device(n, false) => write!(f, "device {n} broken"),
            A::Stop(w) => write!(f, "stop {w}"),
            A::Continue(w) => write!(f, "continue {w}"),
            A::Hang(w) => write!(f, "hang {w}"),
            A::Stick(w) => write!(f, "stick {w}"),
            A::Unhang(w) => write!(f, "unhang {w}"),
            A::Slow(w, tenths) => write!(f, "slow {w} {tenths}"),
            A::Corrupt(w) => write!(f, "corrupt {w}"),
            A::Rot(w) => write!(f, "rot {w}"),
            A::Spoil => write!(f, "spoil checkpoint"),
            A::Unfit(w, on) => write!(f, "unfit {w} {}", switch(on)),
            A::Notice(w) => write!(f, "notice {w}"),
            A::Drain(w) => write!(f, "drain {w}"),
            A::Disk(w, Disk::Fine) => write!(f, "disk {w} fine"),
            A::Disk(w, Disk::Full) => write!(f, "disk {w} full"),
            A::Disk(w, Disk::Slow(ms)) => write!(f, "disk {w} slow {ms}ms"),
            A::Cut(from, to) => write!(f, "cut {from} -> {to}"),
            A::Uncut(from, to) => write!(f, "uncut {from} -> {to}"),
            A::Break(w) => write!(f, "break {w}"),
            A::Jump(w, ms) => write!(f, "jump {w} {ms}ms"),
            A::Crash { zombie: false } => write!(f, "crash coordinator"),
            A::Crash { zombie: true } => write!(f, "crash coordinator zombie"),
            A::At(Trap::Command(n), ms) => write!(f, "at command {n} crash coordinator {ms}ms"),
            A::At(Trap::Persist(n, Write::Lost), ms) => {
                write!(f, "at persist {n} crash coordinator {ms}ms lost")
            }
            A::At(Trap::Persist(n, Write::Kept), ms) => {
                write!(f, "at persist {n} crash coordinator {ms}ms kept")
            }
            A::Restart => write!(f, "restart coordinator"),
            A::Stall(ms) => write!(f, "stall coordinator {ms}ms"),
            A::Rest => write!(f, "rest"),
            A::Cancel => write!(f, "cancel"),
            A::Resume => write!(f, "resume"),
            A::Checkpoint => write!(f, "checkpoint"),
            A::Release(w) => write!(f, "release {w}"),
            A::Force => write!(f, "force"),
            A::Scale(min, max) => write!(f, "scale {min} {max}"),
            A::Repair => write!(f, "repair"),
        }
    }
}

/// Reads `40ms` or `2s` as milliseconds.
pub fn millis(text: &str) -> Result<u64, String> {
    let bad = |_| format!("`{text}` is not a time like 40ms or 2s");
    match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => number.parse().map_err(bad),
        (None, Some(number)) => number.parse::<u64>().map(|s| s * 1000).map_err(bad),
        _ => Err(format!("`{text}` is not a time like 40ms or 2s")),
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("`{text}` is not a number"))
}

impl FromStr for Action {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        use Action as A;
        let words: Vec<&str> = text.split_whitespace().collect();
        let one = |w: &str| w.to_string();
        Ok(match words[..] {
            ["spawn", w] => A::Spawn(one(w)),
            ["twin", w] => A::Twin(one(w)),
            ["kill", w] => A::Kill(one(w)),
            ["fail", w] => A::Fail(one(w)),
            ["kill-agent", n] => A::KillAgent(one(n)),
            ["lose", n] => A::Lose(one(n)),
            ["respawn", n, on @ ("on" | "off")] => A::Respawn(one(n), on == "on"),
            ["probe", n, probe] => A::Probe(one(n), number(probe)?),
            ["device", n, how @ ("works" | "broken")] => A::Device(one(n), how == "works"),
            ["stop", w] => A::Stop(one(w)),
            ["continue", w] => A::Continue(one(w)),
            ["hang", w] => A::Hang(one(w)),
            ["stick", w] => A::Stick(one(w)),
            ["unhang", w] => A::Unhang(one(w)),
            ["slow", w, tenths] => A::Slow(one(w), number(tenths)?),
            ["corrupt", w] => A::Corrupt(one(w)),
            ["rot", w] => A::Rot(one(w)),
            ["spoil", "checkpoint"] => A::Spoil,
            ["unfit", w, on @ ("on" | "off")] => A::Unfit(one(w), on == "on"),
            ["notice", w] => A::Notice(one(w)),
            ["drain", w] => A::Drain(one(w)),
            ["disk", w, "fine"] => A::Disk(one(w), Disk::Fine),
            ["disk", w, "full"] => A::Disk(one(w), Disk::Full),
            ["disk", w, "slow", ms] => A::Disk(one(w), Disk::Slow(millis(ms)?)),
            ["cut", from, "->", to] => A::Cut(one(from), one(to)),
            ["uncut", from, "->", to] => A::Uncut(one(from), one(to)),
            ["break", w] => A::Break(one(w)),
            ["jump", w, ms] => A::Jump(one(w), millis(ms)?),
            ["crash", "coordinator"] => A::Crash { zombie: false },
            ["crash", "coordinator", "zombie"] => A::Crash { zombie: true },
            ["at", "command", n, "crash", "coordinator", ms] => {
                A::At(Trap::Command(number(n)?), millis(ms)?)
            }
            ["at", "persist", n, "crash", "coordinator", ms, how @ ("lost" | "kept")] => {
                let write = if how == "lost" { Write::Lost } else { Write::Kept };
                A::At(Trap::Persist(number(n)?, write), millis(ms)?)
            }
            ["restart", "coordinator"] => A::Restart,
            ["stall", "coordinator", ms] => A::Stall(millis(ms)?),
            ["rest"] => A::Rest,
            ["cancel"] => A::Cancel,
            ["resume"] => A::Resume,
            ["checkpoint"] => A::Checkpoint,
            ["release", w] => A::Release(one(w)),
            ["force"] => A::Force,
            ["scale", min, max] => A::Scale(number(min)? as usize, number(max)? as usize),
            ["repair"] => A::Repair,
            _ => return Err(format!("`{text}` is not a command")),
        })
    }
}
