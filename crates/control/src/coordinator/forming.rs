//! Generations: from the first candidates to the start.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lacuna_types::{Generation, Incarnation, Step, Timestamp, WorkerId, exit};

use super::conduct::NEVER_WARM_MEMORY;
use super::members::Worker;
use super::returning::LastStarted;
use super::saving::Attempt;
use super::{Cause, Command, Coordinator, Ending, note_texts};
use crate::journal::{Record, Saved};
use crate::message::ToWorker;
use crate::plan::{
    Communicator, Member, Origin, Plan, Ranks, Sync, balanced_shares, busiest_us, choose_sync,
    efficiency, even_shares, group_size, slot_map,
};
use crate::timing::Timing;

/// Below this share of useful time a group's size deserves a remark.
const EFFICIENCY_MIN: f64 = 0.85;

/// Why a group is formed where there was none.
const READY: &str = "workers are ready";

/// The generation that exists.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub plan: Arc<Plan>,
    pub ranks: Ranks,
    pub stage: Stage,
    /// Since when it exists.
    pub formed: Timestamp,
    /// By when it must have started.
    pub deadline: Timestamp,
    /// Answers by rank: `Some(None)` has no state.
    pub prepared: Vec<Option<Option<Step>>>,
    pub comm_id: CommId,
    pub sync: Option<Sync>,
    pub synced: BTreeMap<usize, (Step, u64)>,
    /// Ranks that came back to a coordinator that was started again.
    pub back: BTreeSet<usize>,
    pub held: BTreeMap<usize, (Step, u64)>,
    /// The change that members were asked to stop for.
    pub change: Option<Change>,
    pub attempt: Option<Attempt>,
    /// Whether its state could not be saved where it stands, because some of it leave.
    pub cannot_save: bool,
    /// Digests of states by step and rank, until all ranks have said theirs.
    pub votes: BTreeMap<Step, BTreeMap<usize, u64>>,
    /// Newest operation that a member is known to have entered.
    pub op_seq: u64,
    /// When the group last got further.
    pub moved: Timestamp,
    /// Longest time it took to get further.
    pub longest: std::time::Duration,
    /// Since when other shares would make steps clearly shorter.
    pub uneven_since: Option<Timestamp>,
}

/// Why members were asked to stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub cause: Cause,
    pub why: String,
    /// Slots by rank that the same members are to compute from then on.
    pub shares: Option<Vec<u32>>,
}

/// The communicator's id on its way from the driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum CommId {
    Wanted,
    Asked,
    Here(Vec<u8>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// This process was started again: members that train on come back to it.
    Recovering,
    /// Members leave their old communicators.
    Preparing,
    /// Members connect and synchronise their state.
    Syncing,
    /// Members train.
    Running,
    /// Members stand at one boundary.
    Held,
}

impl Group {
    pub(super) fn new(plan: Arc<Plan>, now: Timestamp, deadline: Timestamp) -> Self {
        Group {
            stage: Stage::Preparing,
            formed: now,
            deadline,
            prepared: vec![None; plan.world()],
            comm_id: CommId::Wanted,
            sync: None,
            synced: BTreeMap::new(),
            back: BTreeSet::new(),
            held: BTreeMap::new(),
            change: None,
            attempt: None,
            cannot_save: false,
            votes: BTreeMap::new(),
            op_seq: 0,
            moved: now,
            longest: std::time::Duration::ZERO,
            uneven_since: None,
            ranks: Ranks::of(&plan),
            plan,
        }
    }

    /// The group of a journal's newest plan, as a machine that starts finds it.
    pub(super) fn recovered(
        plan: Arc<Plan>,
        saved: &Saved,
        timing: &Timing,
        now: Timestamp,
    ) -> Self {
        let mut group = Group::new(plan, now, now + timing.forming);
        if saved.started.is_some() {
            group.deadline = now + 2 * timing.lease;
            group.stage = Stage::Recovering;
            if saved.attempt_open {
                let attempt = Attempt::new(saved.attempts, now + timing.attempt);
                group.attempt = Some(Attempt { recovered: true, ..attempt });
            }
        }
        group
    }
}

impl Coordinator {
    /// Ends the generation because of a failure; the next one is formed after a short gathering
    /// time.
    pub(super) fn disturb(&mut self, now: Timestamp, cause: Cause, why: &str) {
        let Some(group) = self.group.take() else {
            return;
        };
        if group.stage == Stage::Running {
            self.broken_at = Some(now);
        }
        self.no_group_since = now;
        let generation = group.plan.generation;
        self.broadcast(&group, &ToWorker::Revoke { generation, why: why.to_string() });
        for worker in self.workers.values_mut() {
            worker.member = false;
        }
        if group.attempt.is_some() {
            // The next group saves at its first boundary.
            self.record(Record::CheckpointAsked);
        }
        if self.reform.is_none() {
            self.reform = Some((now + self.timing.failure_window, cause, why.to_string()));
        }
        if group.votes.values().any(differ) {
            let why = "it ended while digests of its states differed";
            self.distrust(&format!("generation {generation}: {why}"));
        }
    }

    /// Names that could be members, survivors of the newest group first and in its order.
    pub(super) fn candidates(&self) -> Vec<WorkerId> {
        let usable =
            |id: &&WorkerId| self.workers.get(*id).is_some_and(Worker::usable) && self.is_free(id);
        let survivors: Vec<WorkerId> = self.order.iter().filter(usable).cloned().collect();
        let known: BTreeSet<&WorkerId> = survivors.iter().collect();
        let others = self.workers.keys().filter(usable).filter(|id| !known.contains(id));
        let others: Vec<WorkerId> = others.cloned().collect();
        let leavers = self.needed_leavers();
        leavers.into_iter().chain(survivors).chain(others).collect()
    }

    /// Workers that want to go, and without whom those who stay would have to go back: they hand
    /// their state over first.
    pub(super) fn needed_leavers(&self) -> Vec<WorkerId> {
        if self.group.is_some() {
            return Vec::new();
        }
        let usable = |(id, w): &(&WorkerId, &Worker)| w.usable() && self.is_free(id);
        let staying: Vec<&Worker> =
            self.workers.iter().filter(usable).map(|(_, worker)| worker).collect();
        let has_it = staying.iter().any(|worker| worker.holds_a_state());
        if staying.is_empty() || has_it {
            return Vec::new();
        }
        let gives = |(id, w): &(&WorkerId, &Worker)| {
            w.leaving.is_some() && w.would_be_usable() && w.holds_a_state() && self.is_free(id)
        };
        let mut leavers: Vec<WorkerId> =
            self.workers.iter().filter(gives).map(|(id, _)| id.clone()).collect();
        // They are not kept from going for a group that cannot be formed.
        let enough = staying.len() + leavers.len() >= self.config.workers_min;
        // Whoever stays must have a place beside them, or nobody takes their state.
        let size = self.wanted_size(staying.len() + leavers.len());
        leavers.truncate(size.saturating_sub(1));
        if enough { leavers } else { Vec::new() }
    }

    pub(super) fn wanted_size(&self, available: usize) -> usize {
        let config = &self.config;
        group_size(config.n_slots, available, config.workers_min, config.workers_max)
    }

    /// With no group: forms one once there are enough workers and no more are about to come.
    pub(super) fn consider_first_group(&mut self, now: Timestamp) {
        if let Some(mut why) = self.saved.stopping.clone() {
            // Nobody trains, so what is saved is what there is to go on from.
            let step = self.saved.checkpoint.as_ref().map_or(Step(0), |saved| saved.step);
            if self.progress > step {
                why += &format!("; steps after {step}, up to {}, were not saved", self.progress);
            }
            self.end(Ending::Stopped { step, why });
            return;
        }
        let usable = |(id, w): &(&WorkerId, &Worker)| w.usable() && self.is_free(id);
        let ready = self.workers.iter().filter(usable).count();
        if ready < self.config.workers_min.max(1) {
            self.say_waiting(now, ready);
            return;
        }
        let candidates = self.candidates();
        if let Some(why) = self.zombie_in_the_way(now, &candidates) {
            self.say_once(why);
            return;
        }
        let newest = candidates.iter().filter_map(|id| self.workers[id].warm).max();
        let settled = newest.expect("candidates are warm") + self.timing.join_window;
        self.reform = Some((settled, Cause::Ready, READY.to_string()));
        self.hurry_if_full(now);
    }

    /// The first group waits for more workers, but not once it has the most it can take.
    pub(super) fn hurry_if_full(&mut self, now: Timestamp) {
        let first =
            self.reform.as_ref().is_some_and(|(at, cause, _)| *cause == Cause::Ready && *at > now);
        if first && self.candidates().len() >= self.config.workers_max {
            self.reform = Some((now, Cause::Ready, READY.to_string()));
        }
    }

    /// Says what is waited for, or ends a run for which nobody is fit who could be waited for.
    fn say_waiting(&mut self, now: Timestamp, have: usize) {
        let unfit = self.unfit();
        // Those of the newest group mostly come back soon.
        let hoped_for: &[WorkerId] = if now < self.hope_until() { &self.order } else { &[] };
        let mut known = self.workers.keys().chain(hoped_for);
        let nobody_else = known.all(|id| unfit.contains_key(id));
        if nobody_else && unfit.len() >= self.config.workers_min.max(1) {
            let why = format!("no worker can go on ({})", note_texts::reasons(&unfit));
            self.end(Ending::Failed { why, code: exit::IO });
            return;
        }
        let needed = self.config.workers_min;
        let mut text = format!("waiting for workers: {have} ready, {needed} needed");
        if !unfit.is_empty() {
            text += &format!("; unfit: {}", note_texts::reasons(&unfit));
        }
        // Whoever tries again and again is listed in between too, or the text changed each time.
        let known: BTreeSet<&WorkerId> = self.workers.keys().chain(unfit.keys()).collect();
        let out: Vec<&str> =
            known.into_iter().filter(|id| !self.is_free(id)).map(WorkerId::as_str).collect();
        if !out.is_empty() {
            text += &format!("; kept out: {} (`lacuna release` lets them in)", out.join(", "));
        }
        self.say_once(text);
    }

    /// Until when members of the newest group that are gone are waited for though all others are
    /// unfit.
    pub(super) fn hope_until(&self) -> Timestamp {
        self.no_group_since + NEVER_WARM_MEMORY
    }

    /// Lists those who are unfit until something is mended, with the reason: who is here and cannot
    /// go on, and whose device was not ready when last tried.
    fn unfit(&self) -> BTreeMap<WorkerId, String> {
        let stays = |(id, w): (&WorkerId, &Worker)| {
            let why = w.unfit.as_ref().filter(|_| !w.ends)?;
            Some((id.clone(), why.clone()))
        };
        let tried = self.never_warm().map(|(id, why)| (id.clone(), why.to_string()));
        // What is the matter now counts more than what was.
        tried.chain(self.workers.iter().filter_map(stays)).collect()
    }

    fn say_once(&mut self, text: String) {
        if text != self.last_waiting {
            self.last_waiting.clone_from(&text);
            self.note("waiting", false, text);
        }
    }

    /// Forms the next generation of everybody who can.
    pub(super) fn form(&mut self, now: Timestamp, cause: Cause, why: &str) {
        let candidates = self.candidates();
        if candidates.len() < self.config.workers_min.max(1)
            || self.zombie_in_the_way(now, &candidates).is_some()
        {
            self.disturb(now, cause, why);
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
        self.fruitless += 1;
        *self.formed.entry(cause).or_default() += 1;
        self.last_waiting.clear();
        let plan = Arc::new(self.make_plan(members, why));
        self.order = members.to_vec();
        self.record(Record::Planned(plan.clone()));
        self.note("forming", false, self.describe_forming(&plan, spares.len(), why));
        let group = Group::new(plan.clone(), now, now + self.timing.forming);
        for (id, worker) in &mut self.workers {
            worker.member = group.ranks.get(id, worker.incarnation).is_some();
        }
        self.broadcast(&group, &ToWorker::Prepare(plan));
        self.group = Some(group);
        self.consider_preparing();
    }

    fn describe_forming(&self, plan: &Plan, n_spares: usize, why: &str) -> String {
        let (size, n_slots) = (plan.world(), self.config.n_slots);
        let members = note_texts::workers(size);
        let mut text = format!("forming generation {}: {members} ({why})", plan.generation);
        if n_spares > 0 {
            let all = size + n_spares;
            text += &if size >= self.config.workers_max {
                format!("; {n_spares} spare: the run takes at most {size}")
            } else {
                format!(
                    "; {n_spares} spare: {size} already make steps of {n_slots} slots as fast as \
                     {all}"
                )
            };
        }
        let share = efficiency(n_slots, size);
        if share < EFFICIENCY_MIN {
            let percent = (share * 100.0) as u32;
            text += &format!("; efficiency {percent} %: {n_slots} slots do not divide evenly");
        }
        text
    }

    fn make_plan(&self, members: &[WorkerId], why: &str) -> Plan {
        let kept = self.group.as_ref().filter(|g| g.stage == Stage::Held && self.same(g, members));
        let wanted = kept.and_then(|g| g.change.as_ref()).and_then(|c| c.shares.clone());
        let shares = wanted.unwrap_or_else(|| self.shares(members));
        let member = |(id, slots): (&WorkerId, Vec<u32>)| {
            let worker = &self.workers[id];
            Member {
                worker: id.clone(),
                incarnation: worker.incarnation,
                endpoint: worker.endpoint.clone(),
                slots,
            }
        };
        Plan {
            generation: self.saved.generation.next(),
            members: members.iter().zip(slot_map(&shares)).map(member).collect(),
            communicator: if kept.is_some() { Communicator::Keep } else { Communicator::New },
            why: why.to_string(),
        }
    }

    fn same(&self, group: &Group, members: &[WorkerId]) -> bool {
        let lives = |(id, m): (&WorkerId, &Member)| {
            *id == m.worker && self.workers[id].incarnation == m.incarnation
        };
        members.len() == group.plan.world() && members.iter().zip(&group.plan.members).all(lives)
    }

    /// Shares slots out evenly, unless members are known to differ so much that it costs time.
    fn shares(&self, members: &[WorkerId]) -> Vec<u32> {
        let n_slots = self.config.n_slots;
        let even = even_shares(n_slots, members.len());
        let times: Vec<u64> = members.iter().map(|id| self.workers[id].slot_us).collect();
        if times.contains(&0) {
            return even;
        }
        let fair = balanced_shares(n_slots, &times);
        if clearly_shorter(busiest_us(&fair, &times), busiest_us(&even, &times)) {
            fair
        } else {
            even
        }
    }

    /// Returns the group and the worker's rank in it, if `generation` is the group's.
    pub(super) fn member_of(
        &mut self,
        worker: &WorkerId,
        generation: Generation,
    ) -> Option<(&mut Group, usize)> {
        let incarnation: Incarnation = self.workers.get(worker)?.incarnation;
        let group = self.group.as_mut().filter(|g| g.plan.generation == generation)?;
        let rank = group.ranks.get(worker, incarnation)?;
        Some((group, rank))
    }

    /// Asks for the communicator's id, once.
    pub(super) fn consider_preparing(&mut self) {
        let Some(group) = &mut self.group else { return };
        if group.plan.communicator == Communicator::New && group.comm_id == CommId::Wanted {
            group.comm_id = CommId::Asked;
            self.out.push(Command::DrawCommId(group.plan.generation));
        }
    }

    pub(super) fn on_prepared(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        generation: Generation,
        state: Option<Step>,
        trained: Generation,
        kept: bool,
    ) {
        self.left_older(worker, generation);
        if let Some(record) = self.workers.get_mut(worker) {
            record.state = state;
        }
        // A state that differed, and one that was never trained, is nothing to go on from.
        let state = state.filter(|_| trained > self.saved.untrusted);
        let Some((group, rank)) = self.member_of(worker, generation) else { return };
        if group.stage != Stage::Preparing {
            return;
        }
        group.prepared[rank] = Some(state);
        let cannot_keep = group.plan.communicator == Communicator::Keep && !kept;
        match cannot_keep {
            true => {
                let why = format!("{worker} could not keep its communicator");
                self.disturb(now, Cause::Stuck, &why);
            }
            false => self.connect_if_ready(now),
        }
    }

    pub(super) fn on_comm_id(&mut self, now: Timestamp, generation: Generation, id: Vec<u8>) {
        let group = self.group.as_mut().filter(|g| g.plan.generation == generation);
        if let Some(group) = group.filter(|g| g.comm_id == CommId::Asked) {
            group.comm_id = CommId::Here(id);
            self.connect_if_ready(now);
        }
    }

    /// All members are prepared: start if they kept all they need; else, with the id, decide where
    /// the state comes from, and connect.
    fn connect_if_ready(&mut self, now: Timestamp) {
        let Some(group) = self.group.as_ref().filter(|g| g.stage == Stage::Preparing) else {
            return;
        };
        let Some(states) = group.prepared.iter().copied().collect::<Option<Vec<_>>>() else {
            return;
        };
        if group.plan.communicator == Communicator::Keep {
            return self.start_kept(now, &states);
        }
        let CommId::Here(comm_id) = group.comm_id.clone() else { return };
        let sync = choose_sync(&states, self.saved.checkpoint.as_ref());
        let deadline = now + self.timing.forming;
        let group = self.group.as_mut().expect("just seen");
        group.sync = Some(sync.clone());
        group.stage = Stage::Syncing;
        group.deadline = group.deadline.max(deadline);
        let group = group.clone();
        let generation = group.plan.generation;
        self.broadcast(&group, &ToWorker::Connect { generation, comm_id, sync });
    }

    /// The members kept communicator and states, which they said when they stopped.
    fn start_kept(&mut self, now: Timestamp, states: &[Option<Step>]) {
        let first = states[0];
        let agreed = first.filter(|_| states.iter().all(|state| *state == first));
        match agreed {
            None => {
                let why = "members that kept their states are at different steps";
                self.disturb(now, Cause::Stuck, why);
            }
            Some(resume_step) => {
                let group = self.group.as_mut().expect("a group starts");
                group.sync = Some(Sync {
                    resume_step,
                    origin: Origin::Memory { source: 0, healed: Vec::new() },
                });
                self.start(now, resume_step);
            }
        }
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
        let resume_step = group.sync.as_ref().expect("set before syncing").resume_step;
        let first = group.synced[&0];
        if group.synced.values().all(|said| *said == first) && first.0 == resume_step {
            self.start(now, resume_step);
        } else {
            self.dispute_synced(now);
        }
    }

    /// All members hold one state: lets them train.
    fn start(&mut self, now: Timestamp, resume_step: Step) {
        let group = self.group.as_mut().expect("a group starts");
        group.stage = Stage::Running;
        group.moved = now;
        let group = group.clone();
        let sync = group.sync.as_ref().expect("set before a start");
        self.judge_deaths(now, resume_step, matches!(sync.origin, Origin::Memory { .. }));
        if self.saved.ending.is_some() {
            return;
        }
        let before = self.last_started.as_ref().map(|last| last.resume_step);
        if before.is_some_and(|before| before < resume_step) {
            // Steps were applied since, whether or not a beat said so.
            self.fruitless = 1;
        }
        let generation = group.plan.generation;
        self.record(Record::Started { generation, resume_step });
        let broken = self.broken_at.take().map(|at| (at, self.progress));
        // May go back: when everybody who had a newer state is gone, its steps are done again.
        self.progress = resume_step;
        self.checkpoint_base.0 = self.checkpoint_base.0.min(resume_step);
        self.last_started = Some(LastStarted::of(&group, resume_step, now));
        self.broadcast(&group, &ToWorker::Start { generation, resume_step });
        self.note("formed", false, note_texts::started(&group, broken, now));
        self.last_change = Some(now);
    }

    /// Adds what a group waits for.
    pub(super) fn group_due(
        &self,
        group: &Group,
        now: Timestamp,
        all: &mut Vec<(Timestamp, &'static str)>,
    ) {
        if matches!(group.stage, Stage::Recovering | Stage::Preparing | Stage::Syncing) {
            all.push((group.deadline, "forming"));
        }
        let revoke = group.formed + self.timing.revoke;
        if group.stage == Stage::Preparing && revoke > now {
            all.push((revoke, "revoke"));
        }
        if let Some(attempt) = &group.attempt {
            all.push((attempt.deadline, "attempt"));
        }
        if group.stage == Stage::Running {
            all.push((self.stall_at(group), "stall"));
            if group.change.is_none() {
                let saves = group.attempt.is_none();
                all.extend(self.checkpoint_time().filter(|_| saves).map(|at| (at, "checkpoint")));
                all.extend(self.join_time().map(|at| (at, "join")));
                all.extend(self.reslot_time(group).map(|at| (at, "reslot")));
            }
        }
    }
}

/// Tells whether a change is worth a stop: 15 % of a step's time.
pub(super) fn clearly_shorter(new_us: u64, old_us: u64) -> bool {
    new_us * 100 <= old_us * 85
}

/// Tells whether ranks said different things.
pub(super) fn differ(said: &BTreeMap<usize, u64>) -> bool {
    let mut all = said.values();
    let first = all.next();
    all.any(|other| Some(other) != first)
}
