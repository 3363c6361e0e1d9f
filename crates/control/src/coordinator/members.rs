//! Workers: coming, living, going.

use lacuna_types::{Generation, Incarnation, Step, Timestamp, WorkerId, exit};

use super::conduct::Strike;
use super::forming::Stage;
use super::{Cause, Command, Coordinator, Ending, Hello};
use crate::journal::Record;
use crate::message::{Beat, FaultKind, StepMark, ToWorker};
use crate::plan::Member;

/// Highest generation that a worker is believed to be in: numbers above it leave no room.
const GENERATION_MAX: Generation = Generation(1 << 62);

/// Outages of its store that a member may report while its peers have data, before it is unfit.
const OUTAGES_MAX: u32 = 3;
/// Generations in a row that end because a store did not answer some of their members, before they
/// count as any others in vain: with `data.deadline_seconds` of 50, the better part of an hour.
pub(super) const PARTIAL_OUTAGES_MAX: u32 = 60;

/// What the coordinator knows of a worker.
#[derive(Clone, Debug)]
pub(super) struct Worker {
    pub incarnation: Incarnation,
    pub endpoint: String,
    pub last_seen: Timestamp,
    pub stream_lost: Option<Timestamp>,
    /// Since when its device is known to work.
    pub warm: Option<Timestamp>,
    pub state: Option<Step>,
    pub member: bool,
    pub leaving: Option<String>,
    pub unfit: Option<String>,
    /// Whether it is unfit by its device: its process ends, and the next one may do.
    pub ends: bool,
    pub beat: Option<Beat>,
    /// Time of a slot, in microseconds, as it last said; 0 if it never did.
    pub slot_us: u64,
}

impl Worker {
    /// Tells whether the worker may be a member of the next group.
    pub(super) fn usable(&self) -> bool {
        self.leaving.is_none() && self.would_be_usable()
    }

    /// Tells whether it could be a member if it did not want to go.
    pub(super) fn would_be_usable(&self) -> bool {
        let is_well = self.unfit.is_none() && !self.ends;
        self.warm.is_some() && self.stream_lost.is_none() && is_well
    }

    /// Tells whether it is known to have a state in memory.
    pub(super) fn holds_a_state(&self) -> bool {
        self.state.is_some() || self.beat.as_ref().is_some_and(|beat| beat.step > Step(0))
    }

    /// Returns the state's word for people.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Worker { unfit: Some(_), .. } => "unfit",
            Worker { leaving: Some(_), .. } => "leaving",
            Worker { stream_lost: Some(_), .. } => "suspect",
            Worker { member: true, .. } => "member",
            Worker { warm: Some(_), .. } => "spare",
            _ => "registered",
        }
    }
}

impl Coordinator {
    pub(super) fn on_hello(&mut self, now: Timestamp, hello: Hello) {
        let Hello { worker, incarnation, endpoint, state, generation, up } = hello;
        if let Some(ending) = &self.saved.ending {
            let (code, why) = match ending {
                Ending::Finished { .. } => (exit::OK, "the run is finished".to_string()),
                Ending::Failed { why, code } => (*code, why.clone()),
                Ending::Stopped { why, .. } | Ending::Cancelled { why } => (exit::OK, why.clone()),
                Ending::Paused { why } => (exit::OK, format!("the run is paused: {why}")),
            };
            self.send_to(&worker, incarnation, ToWorker::Exit { code, why });
            return;
        }
        if self.shot.contains(&(worker.clone(), incarnation)) {
            // Its end was not seen: what was said to it may be lost.
            self.shoot(&worker, incarnation, "it was given up and is still there");
            return;
        }
        if generation > GENERATION_MAX {
            self.note("refused", true, format!("{worker} says it is in generation {generation}"));
            return;
        }
        if generation > self.saved.generation {
            // This journal is older than the group: never name a generation twice.
            self.record(Record::Floor(generation));
            let why = format!("{worker} knows of generation {generation}");
            self.disturb(now, Cause::Returned, &why);
        }
        self.awaited.0.remove(&worker);
        let known = self.workers.get_mut(&worker);
        if let Some(known) = known.filter(|w| w.incarnation == incarnation) {
            known.last_seen = now;
            known.stream_lost = None;
            known.endpoint = endpoint;
            known.state = state;
            if known.ends {
                // It was told to, and may not have heard.
                self.have_it_try_again(&worker);
            }
            self.welcome_back(now, &worker, generation, up);
            return;
        }
        self.shot.retain(|(id, _)| *id != worker);
        self.replace_namesake(now, &worker, incarnation);
        let group = self.group.as_ref();
        let record = Worker {
            incarnation,
            endpoint,
            last_seen: now,
            stream_lost: None,
            warm: None,
            state,
            member: group.is_some_and(|g| g.ranks.get(&worker, incarnation).is_some()),
            leaving: self.saved.draining.get(&worker).cloned(),
            unfit: None,
            ends: false,
            beat: None,
            slot_us: 0,
        };
        self.workers.insert(worker.clone(), record);
        self.welcome_back(now, &worker, generation, up);
    }

    /// A new life of a worker: the one before is over.
    fn replace_namesake(&mut self, now: Timestamp, worker: &WorkerId, incarnation: Incarnation) {
        let why = "a new process took its name";
        if let Some(old) = self.workers.get(worker) {
            let old = old.incarnation;
            self.out.push(Command::Disconnect { worker: worker.clone(), incarnation: old });
            self.lose_for_certain(now, worker, old, why);
            return;
        }
        let before = self.group.as_ref().and_then(|g| {
            g.plan.members.iter().find(|m| m.worker == *worker).map(|m| m.incarnation)
        });
        if let Some(before) = before.filter(|before| *before != incarnation) {
            self.lose_for_certain(now, worker, before, why);
        }
        self.took_a_silent_name(worker, incarnation);
    }

    pub(super) fn on_warm(&mut self, now: Timestamp, worker: &WorkerId, probe: u64) {
        self.forget_never_warm(worker);
        match self.saved.probe {
            None => {
                self.record(Record::Probe(probe));
            }
            Some(class) if class != probe => {
                let why = format!(
                    "the probe of {worker} gives {probe:016x} and the run's is {class:016x}: this \
                     hardware or libtorch build computes other bits; use the same kind as the \
                     run's first worker"
                );
                self.refuse(now, worker, exit::UNFIT, why);
                return;
            }
            Some(_) => {}
        }
        if let Some(record) = self.workers.get_mut(worker) {
            record.warm.get_or_insert(now);
        }
    }

    pub(super) fn refuse(&mut self, now: Timestamp, worker: &WorkerId, code: u8, why: String) {
        self.note("refused", true, why.clone());
        if let Some(record) = self.workers.get(worker) {
            let incarnation = record.incarnation;
            self.send_to(worker, incarnation, ToWorker::Exit { code, why });
        }
        self.lose(now, worker, "refused");
    }

    pub(super) fn on_beat(&mut self, now: Timestamp, worker: &WorkerId, beat: Beat) {
        self.progressed(now, beat.generation, beat.step);
        self.entered(now, beat.generation, beat.op_seq);
        if let Some(record) = self.workers.get_mut(worker) {
            if beat.slot_us > 0 {
                record.slot_us = beat.slot_us;
            }
            record.beat = Some(beat);
        }
    }

    pub(super) fn on_mark(&mut self, now: Timestamp, worker: &WorkerId, mark: StepMark) {
        self.progressed(now, mark.generation, mark.step);
        let Some((_, rank)) = self.member_of(worker, mark.generation) else { return };
        if let Some(digest) = mark.digest {
            self.vote(now, rank, mark.step, digest);
        }
        if rank == 0 {
            self.out.push(Command::Mark(mark));
        }
    }

    /// Notes that steps were applied; a generation that applied one was not fruitless.
    pub(super) fn progressed(&mut self, now: Timestamp, generation: Generation, step: Step) {
        let Some(group) = &mut self.group else { return };
        if generation != group.plan.generation || step <= self.progress {
            return;
        }
        group.longest = group.longest.max(now.since(group.moved));
        group.moved = now;
        self.progress = step;
        self.network_hangs = 0;
        self.slow_verdicts = 0;
        self.suspicions.clear();
        self.outages.clear();
        self.partial_outages = 0;
        self.fruitless = 0;
        self.tell_unlisted(false);
    }

    pub(super) fn on_stream_lost(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        incarnation: Incarnation,
    ) {
        if let Some(record) = self.workers.get_mut(worker)
            && record.incarnation == incarnation
        {
            record.stream_lost.get_or_insert(now);
        }
    }

    pub(super) fn on_exited(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        incarnation: Option<Incarnation>,
        how: &str,
    ) {
        let known = self.workers.get(worker).map(|w| w.incarnation).or_else(|| {
            let members = &self.group.as_ref()?.plan.members;
            members.iter().find(|m| m.worker == *worker).map(|m| m.incarnation)
        });
        let Some(ended) = incarnation.or(known) else { return };
        self.shot.remove(&(worker.clone(), ended));
        self.ended_for_certain(worker, ended);
        if known == Some(ended) {
            self.lose_for_certain(now, worker, ended, how);
        }
    }

    /// Takes other numbers of workers; whoever has to go or may come does so at a boundary.
    pub(super) fn on_resize(&mut self, min: usize, max: usize) {
        if (self.config.workers_min, self.config.workers_max) == (min, max) {
            return;
        }
        (self.config.workers_min, self.config.workers_max) = (min, max);
        self.last_waiting.clear();
        self.note("resized", false, format!("an operator wants {min} to {max} workers"));
    }

    /// An operator takes a worker out.
    pub(super) fn on_drain(&mut self, worker: WorkerId, why: String) {
        if self.workers.contains_key(&worker) {
            self.on_leaving(&worker, &why);
            self.record(Record::Draining { worker, why });
        }
    }

    pub(super) fn on_leaving(&mut self, worker: &WorkerId, why: &str) {
        if let Some(record) = self.workers.get_mut(worker)
            && record.leaving.is_none()
        {
            record.leaving = Some(why.to_string());
            self.note("leaving", false, format!("worker {worker} leaves: {why}"));
        }
    }

    pub(super) fn on_fault(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        generation: Generation,
        kind: FaultKind,
        suspects: &[usize],
        detail: &str,
    ) {
        if matches!(kind, FaultKind::Local | FaultKind::Unfit) {
            self.will_end(worker);
        }
        if generation > Generation(0) && self.member_of(worker, generation).is_none() {
            return;
        }
        match kind {
            FaultKind::Run | FaultKind::Data => {
                let code = if kind == FaultKind::Data { exit::IO } else { exit::FAILED };
                self.end(Ending::Failed { why: format!("{worker}: {detail}"), code });
                return;
            }
            FaultKind::Storage => {
                self.is_unfit(worker, detail);
            }
            FaultKind::Local | FaultKind::Unfit if generation == Generation(0) => {
                self.on_never_warm(now, worker, detail);
            }
            FaultKind::Local | FaultKind::Unfit => {
                let is_news = self.is_unfit(worker, detail);
                if is_news && kind == FaultKind::Local {
                    self.strike(now, worker, Strike::Out, detail);
                }
            }
            // One that is looked into is nobody's fault yet.
            FaultKind::Checkpoint if self.inquire(now, worker, detail) => {}
            FaultKind::Checkpoint => {
                self.is_unfit(worker, detail);
            }
            FaultKind::Outage => self.on_outage(worker, generation, detail),
            FaultKind::Communicator => {}
        }
        if self.member_of(worker, generation).is_some() {
            let names = self.names_of(suspects);
            self.left_older(worker, generation.next());
            if kind == FaultKind::Communicator {
                self.suspect(now, suspects);
            }
            self.disturb(now, Cause::Fault, &format!("{worker} reports: {detail}{names}"));
        }
    }

    /// The device could not be made ready: its worker's own affair, said once until it is.
    fn on_never_warm(&mut self, now: Timestamp, worker: &WorkerId, detail: &str) {
        if self.note_never_warm(now, worker, detail) {
            self.is_unfit(worker, detail);
        } else if let Some(record) = self.workers.get_mut(worker) {
            record.unfit = Some(detail.to_string());
        }
    }

    fn will_end(&mut self, worker: &WorkerId) {
        if let Some(record) = self.workers.get_mut(worker) {
            record.ends = true;
        }
    }

    /// A store did not answer a member in time. Where nobody has what it lacks, the store is away:
    /// the next group waits again, as long as it takes. Where all others have it, it is this
    /// member's way there that is broken, and after some times it is unfit. In between, as where
    /// some have on their disks what the store does not give, it waits too, but not for ever.
    fn on_outage(&mut self, worker: &WorkerId, generation: Generation, detail: &str) {
        let Some((group, _)) = self.member_of(worker, generation) else { return };
        let group = group.clone();
        let syncing = group.stage == Stage::Syncing;
        let has_it = |(rank, member): &(usize, &Member)| {
            let beat = self.workers.get(&member.worker).and_then(|w| w.beat.as_ref());
            let sums = beat.is_some_and(|beat| beat.generation == generation && beat.in_op);
            if syncing { group.synced.contains_key(rank) } else { sums }
        };
        let others = || group.plan.members.iter().enumerate().filter(|(_, m)| m.worker != *worker);
        match others().filter(has_it).count() {
            0 => self.fruitless = self.fruitless.saturating_sub(1),
            n if n == others().count() => {
                let times = self.outages.entry(worker.clone()).or_default();
                *times += 1;
                if *times >= OUTAGES_MAX {
                    self.is_unfit(worker, &format!("others have what they need, but: {detail}"));
                }
            }
            _ if self.partial_outages < PARTIAL_OUTAGES_MAX => {
                self.partial_outages += 1;
                self.fruitless = self.fruitless.saturating_sub(1);
            }
            _ => {}
        }
    }

    /// Says who the ranks are that a member speaks of.
    fn names_of(&self, ranks: &[usize]) -> String {
        let Some(group) = &self.group else { return String::new() };
        let named = ranks.iter().filter_map(|rank| Some((rank, group.plan.members.get(*rank)?)));
        named.map(|(rank, member)| format!("; rank {rank} is {}", member.worker)).collect()
    }

    /// Takes a worker for unfit, and tells people once; returns whether it is news.
    pub(super) fn is_unfit(&mut self, worker: &WorkerId, why: &str) -> bool {
        let Some(record) = self.workers.get_mut(worker) else { return false };
        let is_news = record.unfit.replace(why.to_string()).is_none();
        if is_news {
            self.note("unfit", true, format!("worker {worker} is unfit: {why}"));
        }
        is_news
    }

    /// Strikes a worker off whose process has ended.
    pub(super) fn lose_for_certain(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        incarnation: Incarnation,
        how: &str,
    ) {
        self.ended_for_certain(worker, incarnation);
        self.lose(now, worker, how);
    }

    /// Strikes a worker off and, if it was a member, ends the generation.
    pub(super) fn lose(&mut self, now: Timestamp, worker: &WorkerId, how: &str) {
        self.awaited.0.remove(worker);
        let record = self.workers.remove(worker);
        let was_member = match (&self.group, &record) {
            (Some(group), Some(record)) => group.ranks.get(worker, record.incarnation).is_some(),
            (Some(group), None) => group.plan.members.iter().any(|m| m.worker == *worker),
            // A peer's report came first: the group is gone, and this is the reason for it.
            (None, Some(record)) => {
                let trained = record.warm.is_some() && self.order.contains(worker);
                self.reform.is_some() && trained
            }
            (None, None) => false,
        };
        if let Some(record) = &record {
            self.fell_silent(worker, record.incarnation, record.last_seen);
        }
        if !was_member {
            return;
        }
        let phase =
            record.as_ref().and_then(|r| r.beat.as_ref()).map_or("idle", |b| b.phase.word());
        let text =
            format!("worker {worker} lost at step {} ({how}; last phase {phase})", self.progress);
        self.note("lost", true, text.clone());
        match &mut self.reform {
            Some((_, cause, why)) if self.group.is_none() => (*cause, *why) = (Cause::Lost, text),
            _ => self.disturb(now, Cause::Lost, &text),
        }
        self.deaths.unjudged.push(worker.clone());
    }

    pub(super) fn expire_workers(&mut self, now: Timestamp) {
        self.end_quarantines(now);
        if now >= self.awaited.1 {
            self.give_up_awaited(now);
        }
        let timing = &self.timing;
        let silent = |w: &Worker| now.since(w.last_seen) >= timing.lease;
        let broken =
            |w: &Worker| w.stream_lost.is_some_and(|at| now.since(at) >= timing.stream_grace);
        let gone: Vec<(WorkerId, Incarnation, bool, String)> = self
            .workers
            .iter()
            .filter(|(_, w)| silent(w) || broken(w))
            .map(|(id, w)| {
                let seconds = now.since(w.last_seen).as_secs_f64();
                let how = match broken(w) {
                    true => "its connection broke".to_string(),
                    false => format!("no beat for {seconds:.1} s"),
                };
                (id.clone(), w.incarnation, broken(w), how)
            })
            .collect();
        for (worker, incarnation, broken, how) in gone {
            self.out.push(Command::Disconnect { worker: worker.clone(), incarnation });
            if broken {
                self.closed_its_stream(&worker, incarnation, now);
            }
            self.lose(now, &worker, &how);
        }
    }

    /// Members of a plan that was being formed did not come back to the restarted coordinator.
    fn give_up_awaited(&mut self, now: Timestamp) {
        let missing = std::mem::take(&mut self.awaited.0);
        let forming = self.group.as_ref().is_some_and(|g| g.stage == Stage::Preparing);
        for worker in missing.iter().filter(|_| forming) {
            self.lose(now, worker, "it did not come back to the restarted coordinator");
        }
    }

    /// Ends one life of a worker that does harm: by telling it, which helps where only its step
    /// loop hangs, and through its agent.
    pub(super) fn shoot(&mut self, worker: &WorkerId, incarnation: Incarnation, why: &str) {
        self.shot.insert((worker.clone(), incarnation));
        let exit = ToWorker::Exit { code: exit::FAILED, why: why.to_string() };
        self.send_to(worker, incarnation, exit);
        let (worker, why) = (worker.clone(), why.to_string());
        self.out.push(Command::Kill { worker: worker.clone(), incarnation, why });
        self.out.push(Command::Disconnect { worker, incarnation });
    }

    /// Lets workers go that want to and are in no group.
    pub(super) fn dismiss_leavers(&mut self) {
        if !self.awaited.0.is_empty() {
            // Whoever is still to come back may need what a leaver holds.
            return;
        }
        let needed = self.needed_leavers();
        let going: Vec<(WorkerId, Incarnation, String)> = self
            .workers
            .iter()
            // What ends by itself hears nothing more; if it comes again, that process goes.
            .filter(|(_, w)| !w.member && w.stream_lost.is_none() && !w.ends)
            .filter(|(id, _)| !needed.contains(id))
            .filter_map(|(id, w)| Some((id.clone(), w.incarnation, w.leaving.clone()?)))
            .collect();
        for (worker, incarnation, why) in going {
            self.workers.remove(&worker);
            self.forget_never_warm(&worker);
            if self.saved.draining.contains_key(&worker) {
                self.record(Record::Gone(worker.clone()));
            }
            self.send_to(&worker, incarnation, ToWorker::Exit { code: exit::DRAINED, why });
        }
    }
}
