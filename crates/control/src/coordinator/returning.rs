//! Members that come back: on a new stream, to a coordinator that was started again, or not at all
//! while they may train on unseen.

use std::collections::BTreeSet;

use lacuna_types::{Generation, Incarnation, Step, Timestamp, WorkerId};

use super::forming::{CommId, Group, Stage};
use super::{Cause, Coordinator};
use crate::journal::Record;
use crate::message::ToWorker;
use crate::plan::{Communicator, Ranks};

/// The newest group that trained. Until one of its members is known to have left it, its members
/// may train on without this coordinator.
#[derive(Clone, Debug)]
pub(super) struct LastStarted {
    generation: Generation,
    members: Vec<(WorkerId, Incarnation)>,
    ranks: Ranks,
    /// First step that it computed.
    pub resume_step: Step,
    /// A member is gone, or has left: the group can never complete another sum.
    over: bool,
    /// When a member was last heard of.
    seen: Timestamp,
    /// Members whose connections closed and were not opened again, and when the last one was given
    /// up: most likely they have ended.
    closed: (BTreeSet<WorkerId>, Timestamp),
}

impl LastStarted {
    pub(super) fn of(group: &Group, resume_step: Step, now: Timestamp) -> Self {
        let members = &group.plan.members;
        LastStarted {
            generation: group.plan.generation,
            members: members.iter().map(|m| (m.worker.clone(), m.incarnation)).collect(),
            ranks: group.ranks.clone(),
            resume_step,
            over: false,
            seen: now,
            closed: (BTreeSet::new(), now),
        }
    }

    pub(super) fn over_if(self, over: bool) -> Self {
        LastStarted { over: self.over || over, ..self }
    }

    fn has(&self, worker: &WorkerId, incarnation: Incarnation) -> bool {
        self.ranks.get(worker, incarnation).is_some()
    }
}

impl Coordinator {
    /// A worker has left every generation below `generation`.
    pub(super) fn left_older(&mut self, worker: &WorkerId, generation: Generation) {
        let Some(incarnation) = self.workers.get(worker).map(|w| w.incarnation) else { return };
        if let Some(last) = &mut self.last_started
            && last.has(worker, incarnation)
            && last.generation < generation
        {
            last.over = true;
        }
    }

    /// Without a group, it must not be forgotten that the newest one can train no more.
    pub(super) fn note_that_it_is_over(&mut self) {
        let over = self.last_started.as_ref().is_some_and(|last| last.over);
        let forgettable = self.group.is_none() && self.saved.started.is_some() && !self.saved.over;
        if over && forgettable {
            self.record(Record::Over);
        }
    }

    /// All members of the newest group stand at a boundary: none trains on unseen.
    pub(super) fn stands(&mut self) {
        if let Some(last) = &mut self.last_started {
            last.over = true;
        }
    }

    /// A process has ended for certain.
    pub(super) fn ended_for_certain(&mut self, worker: &WorkerId, incarnation: Incarnation) {
        if let Some(last) = self.last_started.as_mut().filter(|l| l.has(worker, incarnation)) {
            last.over = true;
        }
    }

    /// A worker was given up because its connection closed and it did not open another. Silence
    /// may be a network's; this is most likely a process that ended.
    pub(super) fn closed_its_stream(
        &mut self,
        worker: &WorkerId,
        incarnation: Incarnation,
        now: Timestamp,
    ) {
        if let Some(last) = self.last_started.as_mut().filter(|l| l.has(worker, incarnation)) {
            last.closed.0.insert(worker.clone());
            last.closed.1 = now;
        }
    }

    /// A worker was given up because nothing was heard of it since `seen`.
    pub(super) fn fell_silent(
        &mut self,
        worker: &WorkerId,
        incarnation: Incarnation,
        seen: Timestamp,
    ) {
        if let Some(last) = self.last_started.as_mut().filter(|l| l.has(worker, incarnation)) {
            last.seen = last.seen.max(seen);
        }
    }

    /// A new process has the name of a member that fell silent: that one has ended, whatever was
    /// heard of it.
    pub(super) fn took_a_silent_name(&mut self, worker: &WorkerId, incarnation: Incarnation) {
        let is_namesake = |(id, old): &(WorkerId, Incarnation)| id == worker && *old != incarnation;
        if let Some(last) = &mut self.last_started
            && last.members.iter().any(is_namesake)
        {
            last.over = true;
        }
    }

    /// Until when the newest group may be training unseen.
    pub(super) fn zombie_until(&self) -> Option<Timestamp> {
        let last = self.last_started.as_ref().filter(|last| !last.over)?;
        self.group.is_none().then(|| self.wait_for(last))
    }

    /// How long to wait for members that may be training on unseen: shorter where the connections
    /// of all of them closed.
    fn wait_for(&self, last: &LastStarted) -> Timestamp {
        let (closed, at) = &last.closed;
        let silence = last.seen + self.timing.disjoint;
        match closed.len() == last.members.len() {
            true => silence.min(*at + 2 * self.timing.lease),
            false => silence,
        }
    }

    /// Says why no group of `candidates` may be formed: all members of the newest one fell silent,
    /// none of them is among the candidates, and they may be training on unseen.
    pub(super) fn zombie_in_the_way(
        &self,
        now: Timestamp,
        candidates: &[WorkerId],
    ) -> Option<String> {
        let last = self.last_started.as_ref().filter(|last| !last.over)?;
        let back = |id: &WorkerId| last.has(id, self.workers[id].incarnation);
        let until = self.wait_for(last);
        if until <= now || candidates.iter().any(back) {
            return None;
        }
        let names: Vec<&str> = last.members.iter().map(|(id, _)| id.as_str()).collect();
        Some(format!(
            "waiting for the members of generation {} ({}), which fell silent and may be training \
             on: others begin {:?} after that, or when an operator forces it",
            last.generation,
            names.join(", "),
            until.since(last.seen)
        ))
    }

    /// An operator knows that silent members are gone.
    pub(super) fn on_force(&mut self) {
        let silent = self.group.is_none();
        if let Some(last) = self.last_started.as_mut().filter(|last| silent && !last.over) {
            last.over = true;
            self.note("forced", true, "an operator gave silent members up".to_string());
        }
    }

    /// A member opened a new stream: messages of both sides may be lost with the old one, so this
    /// side says again what the stage needs; the worker repeats its answers by itself.
    pub(super) fn welcome_back(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        theirs: Generation,
        up: bool,
    ) {
        let Some(incarnation) = self.workers.get(worker).map(|w| w.incarnation) else { return };
        let group = self.group.clone();
        let rank = group.as_ref().and_then(|g| g.ranks.get(worker, incarnation));
        let (Some(group), Some(rank)) = (group, rank) else {
            self.revoke_old(worker, incarnation, theirs, up);
            self.audit_again(worker, incarnation);
            return;
        };
        let ours = group.plan.generation;
        let not_told_yet = group.stage == Stage::Preparing && theirs < ours;
        if theirs != ours && !not_told_yet {
            self.left_older(worker, ours.next());
            let why = format!("{worker} came back outside of generation {ours}");
            self.disturb(now, Cause::Returned, &why);
            self.revoke_old(worker, incarnation, theirs, up);
            return;
        }
        let stays_up = match group.stage {
            Stage::Recovering | Stage::Running | Stage::Held => up,
            Stage::Preparing => {
                not_told_yet || !up || group.plan.communicator == Communicator::Keep
            }
            Stage::Syncing => true,
        };
        if !stays_up {
            let why = format!("{worker} came back and its part in generation {ours} is lost");
            self.disturb(now, Cause::Returned, &why);
            return;
        }
        if group.stage == Stage::Recovering {
            let back = &mut self.group.as_mut().expect("just seen").back;
            back.insert(rank);
            if back.len() == group.plan.world() {
                self.go_on_as_before(now);
            }
        } else {
            self.say_again(worker, incarnation, &group);
        }
    }

    /// Tells a worker that what it is in is over.
    fn revoke_old(
        &mut self,
        worker: &WorkerId,
        incarnation: Incarnation,
        theirs: Generation,
        up: bool,
    ) {
        if up {
            let why = "it ended while this worker was away".to_string();
            self.send_to(worker, incarnation, ToWorker::Revoke { generation: theirs, why });
        }
    }

    /// Repeats what the group's stage has told its members so far.
    fn say_again(&mut self, worker: &WorkerId, incarnation: Incarnation, group: &Group) {
        let generation = group.plan.generation;
        match (group.stage, &group.sync, &group.comm_id) {
            (Stage::Recovering, _, _) => {}
            (Stage::Preparing, _, _) => {
                self.send_to(worker, incarnation, ToWorker::Prepare(group.plan.clone()));
            }
            (Stage::Syncing, Some(sync), CommId::Here(comm_id)) => {
                let (comm_id, sync) = (comm_id.clone(), sync.clone());
                let message = ToWorker::Connect { generation, comm_id, sync };
                self.send_to(worker, incarnation, message);
            }
            (Stage::Syncing, _, _) => {}
            (Stage::Running | Stage::Held, _, _) => {
                let resume_step = self.saved.started.unwrap_or_default();
                let start = ToWorker::Start { generation, resume_step };
                self.send_to(worker, incarnation, start);
                if let Some(change) = group.change.clone().filter(|_| group.stage == Stage::Running)
                {
                    let (change, why) = (self.saved.changes, change.why);
                    self.send_to(worker, incarnation, ToWorker::Hold { generation, change, why });
                }
                if let Some(attempt) = &group.attempt {
                    let (attempt, held) = (attempt.seq, attempt.held);
                    let message = ToWorker::Propose { generation, attempt, held };
                    self.send_to(worker, incarnation, message);
                }
            }
        }
    }

    /// All members of the group that trained when this process ended are back in it.
    fn go_on_as_before(&mut self, now: Timestamp) {
        let Some(group) = &mut self.group else { return };
        group.stage = Stage::Running;
        group.moved = now;
        let group = group.clone();
        let generation = group.plan.generation;
        for member in &group.plan.members {
            self.say_again(&member.worker, member.incarnation, &group);
        }
        self.last_change = Some(now);
        let n = group.plan.world();
        let back = match n {
            1 => "its worker is back".to_string(),
            n => format!("all {n} workers are back"),
        };
        let text = format!("generation {generation} goes on as it was: {back}");
        self.note("recovered", false, text);
        self.held_if_all_stand(now);
    }
}
