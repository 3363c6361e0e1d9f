//! A group that beats and gets no further: who holds it up.
//!
//! Every beat says which collective operation its worker is in, or was last. Members that wait in
//! an operation which others have not entered are not to blame; those others are. Where all have
//! entered it, the network between them is.

use lacuna_types::{Generation, Incarnation, Timestamp, WorkerId};

use super::conduct::Strike;
use super::forming::{Group, Stage};
use super::{Cause, Coordinator};
use crate::message::{Beat, Phase};

/// A group gets this many times its longest step before it counts as stuck.
const PATIENCE: u32 = 5;
/// And this many times the usual limit for its first steps, which warm caches up: as many, and as
/// much longer, as members wait for each other.
const WARM_UP: (u64, u32) = (5, 10);
/// How long a member may wait for data before it holds the group up: a little longer than it waits
/// by itself.
const DATA_PATIENCE_MS: u64 = 240_000;

/// Verdicts in a row that nobody waits before whoever computes is taken for hung: five minutes with
/// the usual limit, and fifty of the longest step.
const SLOW_VERDICTS_MAX: u32 = 10;

/// Groups in a row that could not connect before the member that is missed most is left out.
const UNCONNECTED_MAX: u32 = 2;

/// What holds a group up.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// Nobody waits: all compute, or none does, with one line for each.
    Slow(Vec<(WorkerId, Incarnation, String)>),
    /// These did not enter an operation in which others wait, with one line for each.
    Culprits(Vec<(WorkerId, Incarnation, String)>),
    /// Those who did not enter it wait for data, and may yet get it.
    Patience,
    /// All are in one operation.
    Network(String),
}

impl Coordinator {
    /// When a running group counts as stuck.
    pub(super) fn stall_at(&self, group: &Group) -> Timestamp {
        let (steps, longer) = WARM_UP;
        let warming_up = self.saved.started.is_some_and(|at| self.progress.0 < at.0 + steps);
        let limit = self.timing.stall.max(PATIENCE * group.longest);
        group.moved + if warming_up { longer * limit } else { limit }
    }

    /// Notes that a member has entered an operation: the group got further.
    pub(super) fn entered(&mut self, now: Timestamp, generation: Generation, op_seq: u64) {
        let group = self.group.as_mut().filter(|g| g.plan.generation == generation);
        if let Some(group) = group.filter(|g| op_seq > g.op_seq) {
            group.longest = group.longest.max(now.since(group.moved));
            group.op_seq = op_seq;
            group.moved = now;
            if group.stage == Stage::Syncing {
                // A state on its way: its size is nobody's fault.
                group.deadline = group.deadline.max(now + self.timing.forming);
            }
            self.slow_verdicts = 0;
        }
    }

    /// Notes whom a member suspects; if the group was stuck, finds out whether it is right.
    pub(super) fn suspect(&mut self, now: Timestamp, suspects: &[usize]) {
        let Some(group) = &self.group else { return };
        for member in suspects.iter().filter_map(|rank| group.plan.members.get(*rank)) {
            *self.suspicions.entry(member.worker.clone()).or_default() += 1;
        }
        // A peer that died breaks its connections at once: then there is nothing to find out.
        let stuck = now.since(group.moved) >= self.timing.stall;
        let (stage, world) = (group.stage, group.plan.world());
        if stage == Stage::Running && stuck {
            self.judge_stall(now);
        } else if stage == Stage::Syncing
            && self.fruitless >= UNCONNECTED_MAX
            && world > self.config.workers_min.max(1)
        {
            let n = self.fruitless;
            self.leave_most_missed_out(now, &format!("{n} groups in a row could not connect"));
        }
    }

    pub(super) fn expire_stall(&mut self, now: Timestamp) {
        let group = self.group.as_ref().filter(|g| g.stage == Stage::Running);
        if group.is_some_and(|group| self.stall_at(group) <= now) {
            self.judge_stall(now);
        }
    }

    fn judge_stall(&mut self, now: Timestamp) {
        let Some(group) = &self.group else { return };
        match self.verdict(now, group) {
            Verdict::Slow(members) => {
                // Nobody waits for anybody, so nobody is to blame: look again later, not for ever.
                self.slow_verdicts += 1;
                self.group.as_mut().expect("just seen").moved = now;
                if self.slow_verdicts >= SLOW_VERDICTS_MAX {
                    self.slow_verdicts = 0;
                    self.end_hung(now, members);
                }
            }
            Verdict::Culprits(culprits) => self.end_hung(now, culprits),
            Verdict::Patience => self.group.as_mut().expect("just seen").moved = now,
            Verdict::Network(line) => self.blame_network(now, &line),
        }
    }

    /// Kills and leaves out members that hold the group up.
    fn end_hung(&mut self, now: Timestamp, culprits: Vec<(WorkerId, Incarnation, String)>) {
        for (worker, incarnation, line) in culprits {
            self.note("stuck", true, line.clone());
            self.shoot(&worker, incarnation, &line);
            let why = "it holds the group up".to_string();
            self.lose(now, &worker, &why);
            self.strike(now, &worker, Strike::Out, &why);
        }
    }

    fn verdict(&self, now: Timestamp, group: &Group) -> Verdict {
        let generation = group.plan.generation;
        let beat = |worker: &WorkerId| {
            let record = self.workers.get(worker)?;
            let beat = record.beat.as_ref().filter(|b| b.generation == generation)?;
            Some((beat, now.since(record.last_seen).as_millis() as u64))
        };
        let members = &group.plan.members;
        let waits = |b: &Beat| b.in_op.then_some(b.op_seq);
        let newest = members.iter().filter_map(|m| waits(beat(&m.worker)?.0)).max();
        let step = self.progress;
        let Some(newest) = newest else {
            let busy = |m: &crate::plan::Member| {
                let phase = beat(&m.worker).map_or("idle", |(b, _)| b.phase.word());
                let seconds = now.since(group.formed).as_secs();
                let line = format!(
                    "{} holds step {step} up: in {phase}, and nobody waits; the \
                     group is {seconds} s old",
                    m.worker
                );
                (m.worker.clone(), m.incarnation, line)
            };
            return Verdict::Slow(members.iter().map(busy).collect());
        };
        // Who still waits in an operation before it lacks what others sent: no culprit.
        let waits_too = |worker: &WorkerId| beat(worker).is_some_and(|(b, _)| b.in_op);
        let is_in = |worker: &WorkerId| beat(worker).is_some_and(|(b, _)| b.op_seq >= newest);
        let waiting: Vec<&str> =
            members.iter().map(|m| &m.worker).filter(|w| is_in(w)).map(WorkerId::as_str).collect();
        let waiting = waiting.join(", ");
        let line = |worker: &WorkerId| match beat(worker) {
            None => format!("{worker} holds step {step} up: it has not begun to train"),
            Some((beat, age)) => format!(
                "{worker} holds step {step} up: in {} since {:.1} s, while {waiting} wait in \
                 operation {newest}",
                beat.phase.word(),
                (beat.phase_ms + age) as f64 / 1e3
            ),
        };
        let culprits: Vec<(WorkerId, Incarnation, String)> = members
            .iter()
            .filter(|m| !is_in(&m.worker) && !waits_too(&m.worker))
            .map(|m| (m.worker.clone(), m.incarnation, line(&m.worker)))
            .collect();
        let lacks_data = |(worker, ..): &(WorkerId, Incarnation, String)| {
            let lacks = |(b, age): (&Beat, u64)| {
                b.phase == Phase::Data && b.phase_ms + age < DATA_PATIENCE_MS
            };
            beat(worker).is_some_and(lacks)
        };
        if !culprits.is_empty() && culprits.iter().all(lacks_data) {
            return Verdict::Patience;
        }
        if !culprits.is_empty() {
            return Verdict::Culprits(culprits);
        }
        Verdict::Network(format!(
            "nobody holds step {step} up: all {} workers wait in operation {newest} or the one \
             before, for {:.1} s, so the network between them does not deliver",
            members.len(),
            now.since(group.moved).as_secs_f64()
        ))
    }

    /// The first time the same members try again; then without the one that most often was missed.
    fn blame_network(&mut self, now: Timestamp, line: &str) {
        self.network_hangs += 1;
        self.note("stuck", true, line.to_string());
        let Some(group) = &self.group else { return };
        let world = group.plan.world();
        if self.network_hangs > 1 && world > self.config.workers_min.max(1) {
            let n = self.network_hangs;
            self.leave_most_missed_out(now, &format!("the network failed {n} times in a row"));
        }
        self.disturb(now, Cause::Stuck, line);
    }

    /// Leaves out whoever peers miss most; of two who miss each other, the later by name.
    fn leave_most_missed_out(&mut self, now: Timestamp, what: &str) {
        let missed = self.suspicions.values().max().copied().unwrap_or(0);
        let most: Vec<&WorkerId> =
            self.suspicions.iter().filter(|(_, n)| **n == missed).map(|(id, _)| id).collect();
        if missed == 0 || most.len() > 2 {
            return;
        }
        let worker = most[most.len() - 1].clone();
        self.strike(now, &worker, Strike::Out, &format!("{what}, and it was missed most"));
    }
}
