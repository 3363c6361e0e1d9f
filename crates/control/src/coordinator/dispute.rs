//! States that differ although they must not: who computes wrong, and what can still be trusted.
//!
//! All members hold the whole state and apply the same sums, so more than half of them agreeing
//! outvotes the others. Without a majority every member computes the probe again, a slot whose
//! result the run's first worker has fixed, and those who get another one are wrong.
//!
//! A member whose state was wrong has computed gradients from it, and its peers have applied them.
//! So after a difference nothing in memory is trusted that is newer than the newest checkpoint,
//! whose state all members of its time agreed on. Only where a state was just handed over, and no
//! step was computed since, is the sender's still good.

use std::collections::BTreeMap;

use lacuna_types::{Generation, Incarnation, Step, Timestamp, WorkerId, exit};

use super::conduct::Strike;
use super::forming::{Group, differ};
use super::{Cause, Coordinator, Ending};
use crate::journal::Record;
use crate::message::ToWorker;
use crate::plan::Origin;

/// Members whose states differ, computing the probe again.
#[derive(Clone, Debug)]
pub(super) struct Dispute {
    generation: Generation,
    /// Who takes part, by rank.
    members: Vec<(WorkerId, Incarnation)>,
    probes: BTreeMap<WorkerId, u64>,
    /// What differs, for people.
    what: String,
    pub deadline: Timestamp,
}

impl Coordinator {
    /// Counts a member's digest of a step; compares once all have said theirs.
    pub(super) fn vote(&mut self, now: Timestamp, rank: usize, step: Step, digest: u64) {
        let Some(group) = &mut self.group else { return };
        group.votes.entry(step).or_default().insert(rank, digest);
        if group.votes[&step].len() < group.plan.world() {
            return;
        }
        // Later votes are cast; earlier ones that are not complete never will be.
        let votes = group.votes.remove(&step).expect("just seen");
        group.votes.retain(|other, said| *other > step || differ(said));
        if differ(&votes) {
            let said = votes.into_iter().map(|(rank, digest)| (rank, (step, digest))).collect();
            self.dispute(now, &said);
        }
    }

    /// States differ after a synchronisation. If those who had the state agree, the transfer to
    /// the others failed and is done again.
    pub(super) fn dispute_synced(&mut self, now: Timestamp) {
        let Some(group) = &self.group else { return };
        let said = group.synced.clone();
        let sync = group.sync.clone().expect("set before syncing");
        let Origin::Memory { source, healed } = &sync.origin else {
            return self.dispute(now, &said);
        };
        let truth = said[source];
        let kept_agree = said.iter().all(|(rank, s)| healed.contains(rank) || *s == truth);
        if !kept_agree || truth.0 != sync.resume_step {
            return self.dispute(now, &said);
        }
        let group = group.clone();
        let wrong: Vec<usize> =
            said.iter().filter(|(_, s)| **s != truth).map(|(rank, _)| *rank).collect();
        let what = format!("states differ after a transfer: {}", described(&group, &said));
        self.note("differs", true, what.clone());
        self.disturb(now, Cause::Disputed, &what);
        self.blame(now, &group, &wrong, "its state was not the one it was sent");
    }

    /// States differ that must be equal.
    pub(super) fn dispute(&mut self, now: Timestamp, said: &BTreeMap<usize, (Step, u64)>) {
        let Some(group) = self.group.clone() else { return };
        let what = format!("states differ: {}", described(&group, said));
        self.note("differs", true, what.clone());
        self.distrust(&what);
        self.disturb(now, Cause::Disputed, &what);
        let world = group.plan.world();
        let holders = |value: &(Step, u64)| said.values().filter(|other| *other == value).count();
        let majority = said.values().find(|value| 2 * holders(value) > world);
        if let Some(truth) = majority {
            let wrong: Vec<usize> =
                said.iter().filter(|(_, s)| *s != truth).map(|(rank, _)| *rank).collect();
            return self.blame(now, &group, &wrong, "its state differed from most others'");
        }
        self.audit(now, &group, what);
    }

    /// Nothing in memory is trusted from here to the next start.
    pub(super) fn distrust(&mut self, why: &str) {
        if self.saved.untrusted < self.saved.generation {
            self.record(Record::Distrusted);
            let back = match &self.saved.checkpoint {
                Some(checkpoint) => format!("the checkpoint of step {}", checkpoint.step),
                None => "the seed".to_string(),
            };
            self.note("distrusted", true, format!("going back to {back}: {why}"));
        }
    }

    fn blame(&mut self, now: Timestamp, group: &Group, wrong: &[usize], why: &str) {
        for rank in wrong {
            let worker = group.plan.members[*rank].worker.clone();
            self.note("doubted", true, format!("{worker}: {why}"));
            self.strike(now, &worker, Strike::SecondTimeOut, why);
        }
    }

    /// Has everybody compute the probe again.
    fn audit(&mut self, now: Timestamp, group: &Group, what: String) {
        let generation = group.plan.generation;
        let here = |m: &&crate::plan::Member| {
            self.workers.get(&m.worker).is_some_and(|w| w.incarnation == m.incarnation)
        };
        let present = group.plan.members.iter().filter(here);
        let members: Vec<(WorkerId, Incarnation)> =
            present.map(|m| (m.worker.clone(), m.incarnation)).collect();
        for (worker, incarnation) in &members {
            self.send_to(worker, *incarnation, ToWorker::Audit { generation });
        }
        let deadline = now + self.timing.audit;
        let probes = BTreeMap::new();
        self.dispute = Some(Dispute { generation, members, probes, what, deadline });
    }

    /// A worker is back on a new stream and still owes its answer.
    pub(super) fn audit_again(&mut self, worker: &WorkerId, incarnation: Incarnation) {
        let Some(dispute) = &self.dispute else { return };
        let asked = dispute.members.iter().any(|(id, i)| id == worker && *i == incarnation);
        if asked && !dispute.probes.contains_key(worker) {
            let generation = dispute.generation;
            self.send_to(worker, incarnation, ToWorker::Audit { generation });
        }
    }

    pub(super) fn on_audited(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        generation: Generation,
        probe: u64,
    ) {
        let Some(dispute) = self.dispute.as_mut().filter(|d| d.generation == generation) else {
            return;
        };
        dispute.probes.insert(worker.clone(), probe);
        self.settle_dispute(now);
    }

    pub(super) fn expire_dispute(&mut self, now: Timestamp) {
        self.settle_dispute(now);
    }

    /// Once all who are left have answered, or the time is over: those with another result lose.
    fn settle_dispute(&mut self, now: Timestamp) {
        let Some(dispute) = &self.dispute else { return };
        let is_here = |(worker, incarnation): &&(WorkerId, Incarnation)| {
            self.workers.get(worker).is_some_and(|w| w.incarnation == *incarnation)
        };
        let here: Vec<WorkerId> =
            dispute.members.iter().filter(is_here).map(|(id, _)| id.clone()).collect();
        let all_said = here.iter().all(|id| dispute.probes.contains_key(id));
        if !all_said && now < dispute.deadline {
            return;
        }
        let dispute = self.dispute.take().expect("just seen");
        let wrong = |id: &&WorkerId| {
            dispute.probes.get(*id).is_some_and(|probe| Some(*probe) != self.saved.probe)
        };
        let losers: Vec<WorkerId> = here.iter().filter(wrong).cloned().collect();
        let silent: Vec<&WorkerId> =
            here.iter().filter(|id| !dispute.probes.contains_key(*id)).collect();
        if losers.is_empty() || losers.len() + silent.len() == here.len() {
            let why = match silent.is_empty() {
                true => {
                    let members = dispute.members.iter().map(|(id, _)| id);
                    let names = listed(members);
                    format!("a slot computed again tells {names} not apart, so a person must")
                }
                false => {
                    let (names, wrong) = (listed(silent), listed(&losers));
                    let said = if losers.is_empty() { "nothing".to_string() } else { wrong };
                    format!("{names} computed no slot again in time, and wrong was {said}")
                }
            };
            let why = format!("{}; {why}", dispute.what);
            self.end(Ending::Paused { why });
            return;
        }
        for worker in losers {
            let why = format!(
                "{worker} computes other bits than when it began (its probe is not the run's): \
                 its memory or device is broken"
            );
            self.refuse(now, &worker, exit::UNFIT, why.clone());
            self.strike(now, &worker, Strike::Out, &why);
        }
    }
}

fn listed<'a>(workers: impl IntoIterator<Item = &'a WorkerId>) -> String {
    workers.into_iter().map(WorkerId::as_str).collect::<Vec<&str>>().join(" and ")
}

fn described(group: &Group, said: &BTreeMap<usize, (Step, u64)>) -> String {
    let one = |(rank, (step, digest)): (&usize, &(Step, u64))| {
        format!("{} has {digest:016x} at step {step}", group.plan.members[*rank].worker)
    };
    said.iter().map(one).collect::<Vec<String>>().join(", ")
}
