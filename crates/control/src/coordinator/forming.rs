//! Generations: forming, running, stopping at a boundary.

use std::collections::BTreeMap;

use lacuna_types::{Generation, Incarnation, Step, Timestamp, WorkerId, exit};

use super::saving::Attempt;
use super::{Command, Coordinator, Ending, Record};
use crate::message::ToWorker;
use crate::plan::{Member, Plan, Sync, choose_sync, group_size, slot_map};

/// The generation that exists.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub plan: Plan,
    pub stage: Stage,
    /// By when it must have started.
    pub deadline: Timestamp,
    /// Answers by rank: `Some(None)` has no state.
    pub prepared: Vec<Option<Option<Step>>>,
    pub comm_id: Option<Vec<u8>>,
    pub sync: Option<Sync>,
    pub synced: BTreeMap<usize, (Step, u64)>,
    pub held: BTreeMap<usize, (Step, u64)>,
    /// The change that members were asked to stop for.
    pub change: Option<String>,
    pub attempt: Option<Attempt>,
    pub attempts: u64,
    /// Newest step with a digest: step, who said it first, digest.
    pub marked: Option<(Step, WorkerId, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Members leave their old communicators.
    Preparing,
    /// Members connect and synchronise their state.
    Syncing,
    /// Members train.
    Running,
    /// Members stand at one boundary.
    Held,
}

impl Coordinator {
    /// Ends the generation because of a failure; the next one is formed after a short gathering
    /// time.
    pub(super) fn disturb(&mut self, now: Timestamp, why: &str) {
        let Some(group) = self.group.take() else {
            return;
        };
        let generation = group.plan.generation;
        self.broadcast(&group, &ToWorker::Revoke { generation, why: why.to_string() });
        for worker in self.workers.values_mut() {
            worker.member = false;
        }
        if self.reform.is_none() {
            self.reform = Some((now + self.timing.failure_window, why.to_string()));
        }
    }

    /// Names that could be members, survivors of the newest group first and in its order.
    fn candidates(&self) -> Vec<WorkerId> {
        let usable = |id: &&WorkerId| self.workers.get(*id).is_some_and(|w| w.usable());
        let survivors: Vec<WorkerId> = self.order.iter().filter(usable).cloned().collect();
        let others = self.workers.keys().filter(usable).filter(|id| !survivors.contains(id));
        let others: Vec<WorkerId> = others.cloned().collect();
        survivors.into_iter().chain(others).collect()
    }

    fn wanted_size(&self, available: usize) -> usize {
        let config = &self.config;
        group_size(config.n_slots, available, config.workers_min, config.workers_max)
    }

    /// With no group: forms one once there are enough workers and no more are about to come.
    pub(super) fn consider_first_group(&mut self, now: Timestamp) {
        if let Some(why) = self.stopping.take() {
            self.end(Ending::Stopped { step: self.progress, why });
            return;
        }
        let candidates = self.candidates();
        if candidates.len() < self.config.workers_min.max(1) {
            self.say_waiting(candidates.len());
            return;
        }
        let newest = candidates.iter().filter_map(|id| self.workers[id].warm).max();
        let full = candidates.len() >= self.config.workers_max;
        let settled = newest.expect("candidates are warm") + self.timing.join_window;
        self.reform = Some((if full { now } else { settled }, "workers are ready".to_string()));
    }

    fn say_waiting(&mut self, have: usize) {
        let unfit: Vec<String> = self
            .workers
            .iter()
            .filter_map(|(id, w)| w.unfit.as_ref().map(|why| format!("{id}: {why}")))
            .collect();
        let enough = unfit.len() >= self.config.workers_min.max(1);
        if enough && self.workers.len() == unfit.len() {
            let why = format!("no worker can go on ({})", unfit.join("; "));
            self.end(Ending::Failed { why, code: exit::IO });
            return;
        }
        let text = format!("waiting for workers: {have} ready, {} needed", self.config.workers_min);
        if text != self.last_waiting {
            self.last_waiting.clone_from(&text);
            self.note("waiting", false, text);
        }
    }

    /// Forms the next generation of everybody who can.
    pub(super) fn form(&mut self, now: Timestamp, why: &str) {
        let candidates = self.candidates();
        if candidates.len() < self.config.workers_min.max(1) {
            self.group = None;
            return;
        }
        if self.fruitless >= self.timing.fruitless_generations {
            let n = self.fruitless;
            let why =
                format!("{n} generations in a row applied no step; the last began because: {why}");
            self.end(Ending::Paused { why });
            return;
        }
        let size = self.wanted_size(candidates.len());
        let (members, spares) = candidates.split_at(size);
        self.generation = self.generation.next();
        self.fruitless += 1;
        self.order = members.to_vec();
        self.last_waiting.clear();
        let plan = self.make_plan(members, why);
        self.out.push(Command::Persist(Record::Generation(self.generation)));
        let mut text = format!("forming generation {}: {size} workers ({why})", self.generation);
        if !spares.is_empty() {
            text += &format!(
                "; {} spare: {size} already make steps of {} slots as fast as {}",
                spares.len(),
                self.config.n_slots,
                candidates.len()
            );
        }
        self.note("forming", false, text);
        let group = Group {
            stage: Stage::Preparing,
            deadline: now + self.timing.forming,
            prepared: vec![None; size],
            comm_id: None,
            sync: None,
            synced: BTreeMap::new(),
            held: BTreeMap::new(),
            change: None,
            attempt: None,
            attempts: 0,
            marked: None,
            plan: plan.clone(),
        };
        for (id, worker) in &mut self.workers {
            worker.member = plan.rank(id, worker.incarnation).is_some();
        }
        self.broadcast(&group, &ToWorker::Prepare(plan));
        self.out.push(Command::DrawCommId(self.generation));
        self.group = Some(group);
    }

    fn make_plan(&self, members: &[WorkerId], why: &str) -> Plan {
        let slots = slot_map(self.config.n_slots, members.len());
        let member = |(id, slots): (&WorkerId, Vec<u32>)| {
            let worker = &self.workers[id];
            Member {
                worker: id.clone(),
                incarnation: worker.incarnation,
                endpoint: worker.endpoint.clone(),
                slots,
            }
        };
        let members = members.iter().zip(slots).map(member).collect();
        Plan { generation: self.generation, members, why: why.to_string() }
    }

    /// Returns the group and the worker's rank in it, if `generation` is the group's.
    pub(super) fn member_of(
        &mut self,
        worker: &WorkerId,
        generation: Generation,
    ) -> Option<(&mut Group, usize)> {
        let incarnation: Incarnation = self.workers.get(worker)?.incarnation;
        let group = self.group.as_mut().filter(|g| g.plan.generation == generation)?;
        let rank = group.plan.rank(worker, incarnation)?;
        Some((group, rank))
    }

    pub(super) fn on_prepared(
        &mut self,
        worker: &WorkerId,
        generation: Generation,
        state: Option<Step>,
    ) {
        if let Some(record) = self.workers.get_mut(worker) {
            record.state = state;
        }
        if let Some((group, rank)) = self.member_of(worker, generation)
            && group.stage == Stage::Preparing
        {
            group.prepared[rank] = Some(state);
            self.connect_if_ready();
        }
    }

    pub(super) fn on_comm_id(&mut self, generation: Generation, comm_id: Vec<u8>) {
        let group = self.group.as_mut().filter(|g| g.plan.generation == generation);
        if let Some(group) = group {
            group.comm_id.get_or_insert(comm_id);
            self.connect_if_ready();
        }
    }

    /// All members are prepared and the id is there: decide where the state comes from, and
    /// connect.
    fn connect_if_ready(&mut self) {
        let Some(group) = self.group.as_mut().filter(|g| g.stage == Stage::Preparing) else {
            return;
        };
        let states: Option<Vec<Option<Step>>> = group.prepared.iter().copied().collect();
        let (Some(states), Some(comm_id)) = (states, group.comm_id.clone()) else {
            return;
        };
        let sync = choose_sync(&states, self.checkpoint.as_ref());
        group.sync = Some(sync.clone());
        group.stage = Stage::Syncing;
        let group = group.clone();
        let generation = group.plan.generation;
        self.broadcast(&group, &ToWorker::Connect { generation, comm_id, sync });
    }

    pub(super) fn on_synced(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        generation: Generation,
        step: Step,
        digest: u64,
    ) {
        let Some((group, rank)) = self.member_of(worker, generation) else {
            return;
        };
        if group.stage != Stage::Syncing {
            return;
        }
        group.synced.insert(rank, (step, digest));
        if group.synced.len() < group.plan.world() {
            return;
        }
        let group = group.clone();
        if let Some(why) = disagreement(&group, &group.synced) {
            self.end(Ending::Paused { why: format!("states differ after synchronising: {why}") });
            return;
        }
        let resume_step = group.sync.as_ref().expect("set before syncing").resume_step;
        // May go back: when everybody who had a newer state is gone, its steps are done again.
        self.progress = resume_step;
        self.checkpoint_base.0 = self.checkpoint_base.0.min(resume_step);
        self.broadcast(&group, &ToWorker::Start { generation, resume_step });
        let text = started(&group);
        self.note("formed", false, text);
        self.last_change = Some(now);
        if let Some(group) = &mut self.group {
            group.stage = Stage::Running;
        }
    }

    /// While training: asks everybody to stop at a boundary when somebody comes or goes.
    pub(super) fn consider_running(&mut self, now: Timestamp) {
        let due = self.checkpoint_due(now);
        let change = self.wanted_change(now);
        let Some(group) = self.group.as_mut() else {
            return;
        };
        if group.change.is_some() {
            return;
        }
        if let Some(why) = change {
            self.changes += 1;
            group.change = Some(why.clone());
            let group = group.clone();
            let (generation, change) = (group.plan.generation, self.changes);
            self.broadcast(&group, &ToWorker::Hold { generation, change, why });
        } else if due && group.attempt.is_none() {
            self.propose(now, false);
        }
    }

    fn wanted_change(&self, now: Timestamp) -> Option<String> {
        if let Some(why) = &self.stopping {
            return Some(why.clone());
        }
        let group = self.group.as_ref()?;
        for member in &group.plan.members {
            let worker = self.workers.get(&member.worker)?;
            if let Some(why) = &worker.leaving {
                return Some(format!("{} leaves: {why}", member.worker));
            }
        }
        let at = self.join_time()?;
        (at <= now).then(|| "more workers are ready".to_string())
    }

    /// When the group should be asked to take more workers in; `None` if no worker would help.
    pub(super) fn join_time(&self) -> Option<Timestamp> {
        let group = self.group.as_ref()?;
        let candidates = self.candidates();
        if self.wanted_size(candidates.len()) <= group.plan.world() {
            return None;
        }
        let joiners = candidates.iter().map(|id| &self.workers[id]).filter(|w| !w.member);
        let newest = joiners.filter_map(|w| w.warm).max()?;
        let gap = self.last_change.map_or(newest, |at| at + self.timing.voluntary_gap);
        Some(gap.max(newest + self.timing.join_window))
    }

    pub(super) fn on_held(
        &mut self,
        worker: &WorkerId,
        generation: Generation,
        step: Step,
        digest: u64,
    ) {
        self.progressed(generation, step);
        let Some((group, rank)) = self.member_of(worker, generation) else {
            return;
        };
        if group.stage != Stage::Running {
            return;
        }
        group.held.insert(rank, (step, digest));
        if group.held.len() == group.plan.world() {
            let group = group.clone();
            match disagreement(&group, &group.held) {
                Some(why) => self.end(Ending::Paused { why: format!("states differ: {why}") }),
                None => {
                    self.group.as_mut().expect("just seen").stage = Stage::Held;
                    self.withdraw_unstarted_attempt();
                }
            }
        }
    }

    /// Everybody stands at one boundary: save first if this is an end, else go on with who is
    /// there.
    pub(super) fn consider_held(&mut self, now: Timestamp) {
        let Some(group) = &self.group else { return };
        if group.attempt.is_some() {
            return;
        }
        let &(step, digest) = group.held.values().next().expect("members stand here");
        // A later one may come from a generation that is over and whose commit came late.
        let saved = self.checkpoint.as_ref().is_some_and(|c| c.step >= step);
        let finished = step.0 >= self.config.total_steps;
        let remaining = self.candidates().len();
        let too_few = remaining < self.config.workers_min.max(1);
        if (finished || self.stopping.is_some() || too_few) && !saved {
            self.propose(now, true);
        } else if finished {
            self.end(Ending::Finished { step, digest });
        } else if let Some(why) = self.stopping.take() {
            self.end(Ending::Stopped { step, why });
        } else {
            let why = group.change.clone().unwrap_or_else(|| "held".to_string());
            self.fruitless = 0;
            if too_few {
                self.disturb(now, &why);
            } else {
                self.reform = None;
                self.form(now, &why);
            }
        }
    }

    /// Gives a forming generation up whose time is over, without those who did not answer.
    pub(super) fn expire_forming(&mut self, now: Timestamp) {
        let Some(group) = &self.group else { return };
        if group.deadline > now || matches!(group.stage, Stage::Running | Stage::Held) {
            return;
        }
        let answered = |rank: usize| match group.stage {
            Stage::Preparing => group.prepared[rank].is_some(),
            _ => group.synced.contains_key(&rank),
        };
        let silent = (0..group.plan.world()).filter(|&rank| !answered(rank));
        let silent: Vec<(WorkerId, Incarnation)> = silent
            .map(|rank| &group.plan.members[rank])
            .map(|member| (member.worker.clone(), member.incarnation))
            .collect();
        for (worker, incarnation) in silent {
            self.out.push(Command::Disconnect { worker: worker.clone(), incarnation });
            self.lose(now, &worker, "it did not answer while the group was forming");
        }
        self.disturb(now, "forming took too long");
    }
}

/// Returns who disagrees with rank 0 about step or digest.
fn disagreement(group: &Group, said: &BTreeMap<usize, (Step, u64)>) -> Option<String> {
    let first = said.get(&0)?;
    let name = |rank: usize| &group.plan.members[rank].worker;
    let (rank, other) = said.iter().find(|(_, other)| *other != first)?;
    Some(format!(
        "{} is at step {} with {:016x}, {} at step {} with {:016x}",
        name(0),
        first.0,
        first.1,
        name(*rank),
        other.0,
        other.1
    ))
}

/// Describes a started generation for people.
fn started(group: &Group) -> String {
    use crate::plan::Origin;
    let sync = group.sync.as_ref().expect("a started group is synchronised");
    let from = match &sync.origin {
        Origin::Seed => "from the seed".to_string(),
        Origin::Checkpoint { .. } => "from the newest checkpoint".to_string(),
        Origin::Memory { healed, .. } if healed.is_empty() => "state in memory".to_string(),
        Origin::Memory { source, healed } => {
            let names: Vec<&str> =
                healed.iter().map(|&rank| group.plan.members[rank].worker.as_str()).collect();
            format!("{} healed from {}", names.join(", "), group.plan.members[*source].worker)
        }
    };
    let slots: Vec<String> =
        group.plan.members.iter().map(|m| format!("{} {}", m.worker, m.slots.len())).collect();
    format!(
        "generation {}: {} workers at step {}, {from}; slots: {}",
        group.plan.generation,
        group.plan.world(),
        sync.resume_step,
        slots.join(", ")
    )
}
