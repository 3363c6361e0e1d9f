//! Who did harm: time-outs for workers, and steps that end processes.

use std::collections::BTreeSet;
use std::time::Duration;

use lacuna_types::{Step, Timestamp, WorkerId, exit};

use super::{Command, Coordinator, Ending};
use crate::journal::Record;
use crate::message::ToWorker;
use crate::timing::{QUARANTINE_MAX, STRIKE_MEMORY, STRIKES_MAX};

/// Lives in a row that ended without a step before they count as harm: one may be bad luck.
const USELESS_LIVES: u32 = 2;
/// Generations in a row that end at one step before the step itself is blamed.
const DEADLY_GENERATIONS: u32 = 3;

/// How long a worker whose device could not be made ready is remembered while it is away: several
/// times what its agent waits at most, and its start takes.
pub(super) const NEVER_WARM_MEMORY: Duration = Duration::from_secs(10 * 60);

/// What the coordinator remembers of a worker beyond its lives.
#[derive(Clone, Debug, Default)]
pub(super) struct Conduct {
    /// When it did harm, oldest first.
    pub strikes: Vec<Timestamp>,
    /// Kept out until then.
    pub until: Option<Timestamp>,
    /// Lives in a row that ended while it was a member and had applied no step.
    pub useless: u32,
    /// When its device last could not be made ready, and why it first could not; `None` once it is.
    pub never_warm: Option<(Timestamp, String)>,
}

impl Conduct {
    /// Tells whether there is nothing that a release could forgive.
    fn is_clean(&self) -> bool {
        self.strikes.is_empty() && self.never_warm.is_none()
    }
}

/// Generations that ended at one step.
#[derive(Clone, Debug, Default)]
pub(super) struct Deaths {
    generations: u32,
    workers: BTreeSet<WorkerId>,
    /// Members that died since the newest group began.
    pub unjudged: Vec<WorkerId>,
}

/// How a strike is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Strike {
    /// Counts, and keeps the worker out from the first time on.
    Out,
    /// Counts; keeps the worker out from the second time on.
    SecondTimeOut,
}

impl Coordinator {
    /// Tells whether a worker is not kept out. Time-outs that are over are struck off in time by
    /// [`Coordinator::expire_workers`].
    pub(super) fn is_free(&self, worker: &WorkerId) -> bool {
        !self.saved.banned.contains_key(worker)
            && self.conduct.get(worker).is_none_or(|conduct| conduct.until.is_none())
    }

    pub(super) fn end_quarantines(&mut self, now: Timestamp) {
        let over = |c: &&mut Conduct| c.until.is_some_and(|at| at <= now);
        self.conduct.values_mut().filter(over).for_each(|conduct| conduct.until = None);
        self.forget_the_absent(now);
    }

    /// The device of a worker could not be made ready, and its process ends: one that comes back
    /// says so again, or is warm. Returns whether that is news; the first reason is kept.
    pub(super) fn note_never_warm(&mut self, now: Timestamp, worker: &WorkerId, why: &str) -> bool {
        let never_warm = &mut self.conduct.entry(worker.clone()).or_default().never_warm;
        let is_news = never_warm.is_none();
        never_warm.get_or_insert_with(|| (now, why.to_string())).0 = now;
        is_news
    }

    pub(super) fn forget_never_warm(&mut self, worker: &WorkerId) {
        if let Some(conduct) = self.conduct.get_mut(worker) {
            conduct.never_warm = None;
        }
    }

    /// Lists the workers whose devices could not be made ready, with the reason.
    pub(super) fn never_warm(&self) -> impl Iterator<Item = (&WorkerId, &str)> {
        self.conduct.iter().filter_map(|(id, conduct)| {
            conduct.never_warm.as_ref().map(|(_, why)| (id, why.as_str()))
        })
    }

    /// Agents start workers whose device was not ready again within a minute: who is not here, and
    /// did not fail for long, is gone.
    fn forget_the_absent(&mut self, now: Timestamp) {
        self.conduct.retain(|id, conduct| {
            let here = self.workers.contains_key(id);
            match &conduct.never_warm {
                Some((at, _)) if !here && now.since(*at) >= NEVER_WARM_MEMORY => {
                    conduct.never_warm = None;
                    !conduct.is_clean() || conduct.useless > 0
                }
                _ => true,
            }
        });
    }

    /// Notes harm that a worker did, and keeps it out for longer each time.
    pub(super) fn strike(&mut self, now: Timestamp, worker: &WorkerId, how: Strike, why: &str) {
        let conduct = self.conduct.entry(worker.clone()).or_default();
        conduct.strikes.retain(|at| now.since(*at) < STRIKE_MEMORY);
        conduct.strikes.push(now);
        let n = conduct.strikes.len();
        if n >= STRIKES_MAX {
            self.record(Record::Banned { worker: worker.clone(), why: why.to_string() });
            let text = format!(
                "{worker} is kept out until an operator releases it, after {n} times within an \
                 hour: {why}"
            );
            self.note("quarantined", true, text);
        } else if n > 1 || how == Strike::Out {
            let time = self.timing.quarantine * (1 << (n - 1));
            let time: Duration = time.min(QUARANTINE_MAX);
            self.conduct.entry(worker.clone()).or_default().until = Some(now + time);
            self.note("quarantined", true, format!("{worker} is kept out for {time:?}: {why}"));
        }
    }

    /// Members died since the newest group began, and the next one begins at `step`.
    ///
    /// Beats lag behind; where the survivors stand tells what the dead had done. Where no survivor
    /// held the state nothing is known, and nobody is blamed.
    pub(super) fn judge_deaths(&mut self, now: Timestamp, step: Step, from_memory: bool) {
        let dead = std::mem::take(&mut self.deaths.unjudged);
        let before = self.last_started.as_ref().map(|last| last.resume_step);
        let known = from_memory && !dead.is_empty();
        if !known || before != Some(step) {
            dead.iter().for_each(|worker| self.forget_useless_lives(worker));
            let generations = u32::from(known);
            let workers = dead.into_iter().collect();
            self.deaths = Deaths { generations, workers, unjudged: Vec::new() };
            return;
        }
        for worker in &dead {
            self.judge_life(now, worker);
        }
        self.deaths.generations += 1;
        self.deaths.workers.extend(dead);
        self.judge_step(step);
    }

    fn forget_useless_lives(&mut self, worker: &WorkerId) {
        if let Some(conduct) = self.conduct.get_mut(worker) {
            conduct.useless = 0;
            if conduct.is_clean() {
                self.conduct.remove(worker);
            }
        }
    }

    /// A member's life ended without a step: several in a row are harm.
    fn judge_life(&mut self, now: Timestamp, worker: &WorkerId) {
        let conduct = self.conduct.entry(worker.clone()).or_default();
        conduct.useless += 1;
        let n = conduct.useless;
        if n >= USELESS_LIVES {
            let why = format!("{n} lives in a row ended before a step was applied");
            self.strike(now, worker, Strike::Out, &why);
        }
    }

    /// Generations end at one step again and again: it is to blame.
    fn judge_step(&mut self, step: Step) {
        let deaths = &self.deaths;
        if deaths.generations < DEADLY_GENERATIONS || deaths.workers.len() < 2 {
            return;
        }
        let (n, workers) = (deaths.generations, list(&deaths.workers));
        let why = format!(
            "step {step} ended {n} generations in a row, in the processes {workers}: its samples \
             or the memory it takes may be the reason"
        );
        self.out.push(Command::NameSamples(step));
        self.end(Ending::Paused { why });
    }

    pub(super) fn on_release(&mut self, worker: &WorkerId) {
        let struck = self.conduct.remove(worker).is_some_and(|c| !c.is_clean());
        // What was broken may be mended: its data is back, or its disk has room.
        let unfit = self.workers.get_mut(worker).is_some_and(|w| w.unfit.take().is_some());
        if unfit {
            self.have_it_try_again(worker);
        }
        let known = struck || unfit;
        if self.saved.banned.contains_key(worker) {
            self.record(Record::Released(worker.clone()));
        } else if !known {
            return;
        }
        self.note("released", false, format!("an operator lets {worker} back in"));
    }

    /// A process that could not begin will not begin any more. It ends, and its agent starts
    /// another, unless that was told to start one only.
    pub(super) fn have_it_try_again(&mut self, worker: &WorkerId) {
        if let Some(record) = self.workers.get_mut(worker).filter(|w| w.warm.is_none()) {
            record.ends = true;
            let (code, why) = (exit::IO, "an operator lets it try again".to_string());
            let incarnation = record.incarnation;
            self.send_to(worker, incarnation, ToWorker::Exit { code, why });
        }
    }
}

fn list(names: &BTreeSet<WorkerId>) -> String {
    names.iter().map(WorkerId::as_str).collect::<Vec<&str>>().join(", ")
}
