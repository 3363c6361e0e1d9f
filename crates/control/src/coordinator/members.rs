//! Workers: coming, living, going.

use lacuna_types::{Generation, Incarnation, Step, Timestamp, WorkerId, exit};

use super::{Command, Coordinator, Ending, Hello, Record};
use crate::message::{Beat, FaultKind, StepMark, ToWorker};

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
    pub beat: Option<Beat>,
}

impl Worker {
    /// Tells whether the worker may be a member of the next group.
    pub(super) fn usable(&self) -> bool {
        let here = self.warm.is_some() && self.stream_lost.is_none();
        here && self.leaving.is_none() && self.unfit.is_none()
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
        let Hello { worker, incarnation, endpoint, state } = hello;
        if let Some(ending) = &self.ended {
            let (code, why) = match ending {
                Ending::Finished { .. } => (exit::OK, "the run is finished".to_string()),
                Ending::Failed { why, code } => (*code, why.clone()),
                Ending::Stopped { why, .. } => (exit::OK, why.clone()),
                Ending::Paused { why } => (exit::OK, format!("the run is paused: {why}")),
            };
            self.send_to(&worker, incarnation, ToWorker::Exit { code, why });
            return;
        }
        let known = self.workers.get_mut(&worker);
        if let Some(known) = known.filter(|w| w.incarnation == incarnation) {
            known.last_seen = now;
            known.stream_lost = None;
            known.endpoint = endpoint;
            known.state = state;
            if known.member {
                // Messages of either side may be lost with the old stream: agree anew.
                self.disturb(now, &format!("{worker} came back on a new stream"));
            }
            return;
        }
        if let Some(old) = self.workers.get(&worker) {
            let old = old.incarnation;
            self.out.push(Command::Disconnect { worker: worker.clone(), incarnation: old });
            self.lose(now, &worker, "a new process took its name");
        }
        let record = Worker {
            incarnation,
            endpoint,
            last_seen: now,
            stream_lost: None,
            warm: None,
            state,
            member: false,
            leaving: None,
            unfit: None,
            beat: None,
        };
        self.workers.insert(worker, record);
    }

    pub(super) fn on_warm(&mut self, now: Timestamp, worker: &WorkerId, probe: u64) {
        match self.probe {
            None => {
                self.probe = Some(probe);
                self.out.push(Command::Persist(Record::Probe(probe)));
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

    fn refuse(&mut self, now: Timestamp, worker: &WorkerId, code: u8, why: String) {
        self.note("refused", true, why.clone());
        if let Some(record) = self.workers.get(worker) {
            let incarnation = record.incarnation;
            self.send_to(worker, incarnation, ToWorker::Exit { code, why });
        }
        self.lose(now, worker, "refused");
    }

    pub(super) fn on_beat(&mut self, worker: &WorkerId, beat: Beat) {
        self.progressed(beat.generation, beat.step);
        if let Some(record) = self.workers.get_mut(worker) {
            record.beat = Some(beat);
        }
    }

    pub(super) fn on_mark(&mut self, worker: &WorkerId, mark: StepMark) {
        self.progressed(mark.generation, mark.step);
        let Some(group) = self.group.as_mut().filter(|g| g.plan.generation == mark.generation)
        else {
            return;
        };
        if let Some(digest) = mark.digest {
            let (step, ref first, seen) =
                *group.marked.get_or_insert((mark.step, worker.clone(), digest));
            if step == mark.step && seen != digest {
                let why = format!(
                    "state digests differ after step {step}: {first} has {seen:016x}, {worker} has \
                     {digest:016x}"
                );
                self.end(Ending::Paused { why });
                return;
            }
            if mark.step > step {
                group.marked = Some((mark.step, worker.clone(), digest));
            }
        }
        let Some(group) = &self.group else { return };
        if group.plan.members.first().is_some_and(|first| first.worker == *worker) {
            self.out.push(Command::Mark(mark));
        }
    }

    /// Notes that steps were applied; a generation that applied one was not fruitless.
    pub(super) fn progressed(&mut self, generation: Generation, step: Step) {
        let Some(group) = &self.group else { return };
        if generation == group.plan.generation && step > self.progress {
            self.progress = step;
            self.fruitless = 0;
        }
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
        let known = self.workers.get(worker);
        if known.is_some_and(|w| incarnation.is_none_or(|i| i == w.incarnation)) {
            self.lose(now, worker, how);
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
        detail: &str,
    ) {
        match kind {
            FaultKind::Run => {
                let why = format!("{worker}: {detail}");
                self.end(Ending::Failed { why, code: exit::FAILED });
                return;
            }
            FaultKind::Storage | FaultKind::Local => {
                if let Some(record) = self.workers.get_mut(worker) {
                    record.unfit = Some(detail.to_string());
                }
                self.note("unfit", true, format!("worker {worker} is unfit: {detail}"));
            }
            FaultKind::Communicator => {}
        }
        let current = self.group.as_ref().is_some_and(|g| g.plan.generation == generation);
        if current {
            self.disturb(now, &format!("{worker} reports: {detail}"));
        }
    }

    /// Strikes a worker off and, if it was a member, ends the generation.
    pub(super) fn lose(&mut self, now: Timestamp, worker: &WorkerId, how: &str) {
        let Some(record) = self.workers.remove(worker) else { return };
        let was_member = match &self.group {
            Some(group) => group.plan.rank(worker, record.incarnation).is_some(),
            // A peer's report came first: the group is gone, and this is the reason for it.
            None => self.reform.is_some() && self.order.contains(worker),
        };
        if !was_member {
            return;
        }
        let phase = record.beat.as_ref().map_or("idle", |beat| beat.phase.word());
        let text =
            format!("worker {worker} lost at step {} ({how}; last phase {phase})", self.progress);
        self.note("lost", true, text.clone());
        match &mut self.reform {
            Some((_, why)) if self.group.is_none() => *why = text,
            _ => self.disturb(now, &text),
        }
    }

    pub(super) fn expire_workers(&mut self, now: Timestamp) {
        let timing = &self.timing;
        let silent = |w: &Worker| now.since(w.last_seen) > timing.lease;
        let broken =
            |w: &Worker| w.stream_lost.is_some_and(|at| now.since(at) >= timing.stream_grace);
        let gone: Vec<(WorkerId, Incarnation, String)> = self
            .workers
            .iter()
            .filter(|(_, w)| silent(w) || broken(w))
            .map(|(id, w)| {
                let seconds = now.since(w.last_seen).as_secs_f64();
                let how = match broken(w) {
                    true => "its connection broke".to_string(),
                    false => format!("no beat for {seconds:.1} s"),
                };
                (id.clone(), w.incarnation, how)
            })
            .collect();
        for (worker, incarnation, how) in gone {
            self.out.push(Command::Disconnect { worker: worker.clone(), incarnation });
            self.lose(now, &worker, &how);
        }
    }

    /// Lets workers go that want to and are in no group.
    pub(super) fn dismiss_leavers(&mut self) {
        let going: Vec<(WorkerId, Incarnation, String)> = self
            .workers
            .iter()
            .filter(|(_, w)| !w.member)
            .filter_map(|(id, w)| Some((id.clone(), w.incarnation, w.leaving.clone()?)))
            .collect();
        for (worker, incarnation, why) in going {
            self.workers.remove(&worker);
            self.send_to(&worker, incarnation, ToWorker::Exit { code: exit::DRAINED, why });
        }
    }
}
