//! A group that trains: wanted changes, stopping at a boundary, and going on from there.

use lacuna_types::{Generation, Step, Timestamp, WorkerId};

use super::forming::{Change, Group, Stage, clearly_shorter};
use super::{Cause, Coordinator, Ending};
use crate::journal::Record;
use crate::message::ToWorker;
use crate::plan::{balanced_shares, busiest_us};

impl Coordinator {
    /// While training: asks everybody to stop at a boundary when somebody comes or goes, or when
    /// other shares would make steps shorter.
    pub(super) fn consider_running(&mut self, now: Timestamp) {
        self.watch_balance(now);
        let due = self.checkpoint_due(now);
        let change = self.wanted_change(now);
        let Some(group) = self.group.as_mut() else {
            return;
        };
        if group.change.is_some() {
            return;
        }
        if let Some(change) = change {
            self.hold(change);
        } else if due && group.attempt.is_none() {
            self.propose(now, false);
        } else if due && !self.saved.checkpoint_asked {
            self.due_while_busy(now);
        }
    }

    /// Asks everybody to stop at a boundary.
    pub(super) fn hold(&mut self, change: Change) {
        let Some(group) = self.group.as_mut() else { return };
        let why = change.why.clone();
        group.change = Some(change);
        let group = group.clone();
        let generation = group.plan.generation;
        self.record(Record::Change(self.saved.changes + 1));
        let change = self.saved.changes;
        self.broadcast(&group, &ToWorker::Hold { generation, change, why });
    }

    pub(super) fn wanted_change(&self, now: Timestamp) -> Option<Change> {
        let because = |cause, why: String| Some(Change { cause, why, shares: None });
        if let Some(why) = &self.saved.stopping {
            return because(Cause::Left, why.clone());
        }
        let group = self.group.as_ref()?;
        for member in &group.plan.members {
            if let Some(why) = self.workers.get(&member.worker).and_then(|w| w.leaving.as_ref()) {
                return because(Cause::Left, format!("{} leaves: {why}", member.worker));
            }
        }
        if group.attempt.is_some() {
            // Standing still until a checkpoint is written would cost more than these changes gain.
            return None;
        }
        let (world, most) = (group.plan.world(), self.config.workers_max);
        if world > most {
            let why = format!("the run takes at most {most} of its {world} workers now");
            return because(Cause::Resized, why);
        }
        if self.join_time().is_some_and(|at| at <= now) {
            return because(Cause::Joined, "more workers are ready".to_string());
        }
        self.reslot_time(group).filter(|at| *at <= now)?;
        let (shares, why) = self.better_shares(group)?;
        Some(Change { cause: Cause::Shares, why, shares: Some(shares) })
    }

    /// When the group should be asked to take more workers in; `None` if no worker would help.
    pub(super) fn join_time(&self) -> Option<Timestamp> {
        let group = self.group.as_ref().filter(|group| group.attempt.is_none())?;
        if self.workers.len() <= group.plan.world() {
            return None;
        }
        let candidates = self.candidates();
        if self.wanted_size(candidates.len()) <= group.plan.world() {
            return None;
        }
        let joiners = candidates.iter().map(|id| &self.workers[id]).filter(|w| !w.member);
        let newest = joiners.filter_map(|w| w.warm).max()?;
        let gap = self.last_change.map_or(newest, |at| at + self.timing.voluntary_gap);
        Some(gap.max(newest + self.timing.join_window))
    }

    /// Notes since when other shares would be clearly better.
    fn watch_balance(&mut self, now: Timestamp) {
        let better = self.group.as_ref().is_some_and(|group| self.better_shares(group).is_some());
        if let Some(group) = &mut self.group {
            group.uneven_since = better.then(|| group.uneven_since.unwrap_or(now));
        }
    }

    /// When slots should be shared out anew among the same members.
    pub(super) fn reslot_time(&self, group: &Group) -> Option<Timestamp> {
        if group.attempt.is_some() {
            return None;
        }
        let watched = group.uneven_since? + self.timing.straggler_window;
        let gap = self.last_change.map_or(watched, |at| at + self.timing.voluntary_gap);
        Some(watched.max(gap))
    }

    /// Finds shares that make steps clearly shorter, given what members say a slot takes them.
    fn better_shares(&self, group: &Group) -> Option<(Vec<u32>, String)> {
        let generation = group.plan.generation;
        let time = |m: &crate::plan::Member| {
            let beat = self.workers.get(&m.worker)?.beat.as_ref()?;
            (beat.generation == generation && beat.slot_us > 0).then_some(beat.slot_us)
        };
        let times: Vec<u64> = group.plan.members.iter().map(time).collect::<Option<_>>()?;
        let shares: Vec<u32> = group.plan.members.iter().map(|m| m.slots.len() as u32).collect();
        let fair = balanced_shares(self.config.n_slots, &times);
        let (now_us, then_us) = (busiest_us(&shares, &times), busiest_us(&fair, &times));
        if !clearly_shorter(then_us, now_us) {
            return None;
        }
        let slowest = (0..times.len()).max_by_key(|rank| times[*rank])?;
        let why = format!(
            "{} takes {:.1} ms a slot, the fastest {:.1} ms: sharing slots out as {fair:?} \
             instead of {shares:?}",
            group.plan.members[slowest].worker,
            times[slowest] as f64 / 1e3,
            *times.iter().min()? as f64 / 1e3,
        );
        Some((fair, why))
    }

    /// Tells whether the members that stand have no time to wait for the checkpoint under way. One
    /// is given up so between two that are written: where many leave, some must come to an end.
    fn hurries(&self, group: &Group) -> bool {
        let leaves = |m: &crate::plan::Member| {
            self.workers.get(&m.worker).is_some_and(|w| w.leaving.is_some())
        };
        let of_this_state = |attempt: &super::saving::Attempt| {
            let snapshots = &attempt.snapshots;
            snapshots.len() == group.plan.world()
                && snapshots.values().zip(group.held.values()).all(|(a, b)| a.0 == b.0)
        };
        let stops = self.saved.stopping.is_some();
        // A run that stops needs a checkpoint of this very state, which it may be.
        let is_wanted = stops && group.attempt.as_ref().is_some_and(of_this_state);
        (stops || group.plan.members.iter().any(leaves))
            && !is_wanted
            && self.closed_for_leaves == 0
    }

    pub(super) fn on_held(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        generation: Generation,
        step: Step,
        digest: u64,
    ) {
        self.progressed(now, generation, step);
        let Some((group, rank)) = self.member_of(worker, generation) else {
            return;
        };
        if matches!(group.stage, Stage::Running | Stage::Recovering) {
            group.held.insert(rank, (step, digest));
            self.held_if_all_stand(now);
        }
    }

    /// Everybody has said that it stands: at one step and with one state, or they differ.
    pub(super) fn held_if_all_stand(&mut self, now: Timestamp) {
        let Some(group) = self.group.as_mut().filter(|g| g.stage == Stage::Running) else {
            return;
        };
        if group.held.len() < group.plan.world() {
            return;
        }
        let first = group.held[&0];
        if group.held.values().all(|said| *said == first) {
            group.stage = Stage::Held;
            self.stands();
            self.withdraw_unstarted_attempt();
        } else {
            let said = group.held.clone();
            self.dispute(now, &said);
        }
    }

    /// Everybody stands at one boundary: save first if this is an end, else go on with who is
    /// there.
    pub(super) fn consider_held(&mut self, now: Timestamp) {
        let Some(group) = &self.group else { return };
        let away = |m: &crate::plan::Member| {
            let record = self.workers.get(&m.worker);
            record.is_some_and(|w| w.stream_lost.is_some() && w.leaving.is_none())
        };
        let is_last_word = group.attempt.as_ref().is_some_and(|a| a.held || a.committing);
        if is_last_word || group.plan.members.iter().any(away) {
            // A broken stream may come back within its grace.
            return;
        }
        if group.attempt.is_some() {
            if !self.hurries(group) {
                return;
            }
            // Who leaves has no time for what training would have hidden.
            let why = "its members stand still, and one of them leaves";
            self.close_attempt(why);
            self.note("not-saved", true, format!("checkpoint given up: {why}"));
            self.closed_for_leaves += 1;
            self.record(Record::CheckpointAsked);
        }
        let Some(group) = &self.group else { return };
        let &(step, digest) = group.held.values().next().expect("members stand here");
        // A later one may come from a generation that is over and whose commit came late.
        let saved = self.saved.checkpoint.as_ref().is_some_and(|c| c.step >= step);
        let finished = step.0 >= self.config.total_steps;
        let remaining = self.candidates();
        let too_few = remaining.len() < self.config.workers_min.max(1);
        let keeps = |m: &crate::plan::Member| remaining.contains(&m.worker);
        // Those who take over have nothing in memory.
        let all_leave = !group.plan.members.iter().any(keeps);
        let ends = finished || self.saved.stopping.is_some();
        if (ends || ((too_few || all_leave) && !group.cannot_save)) && !saved {
            self.propose(now, true);
        } else if finished {
            self.end(Ending::Finished { step, digest });
        } else if let Some(why) = self.saved.stopping.clone() {
            self.end(Ending::Stopped { step, why });
        } else {
            let change = group.change.as_ref().map(|change| (change.cause, change.why.clone()));
            let stood = || (Cause::Checkpoint, "its members stood still".to_string());
            let (cause, why) = change.unwrap_or_else(stood);
            self.fruitless = 0;
            // Without a group, who leaves hands a state over that nobody else has.
            if too_few || (all_leave && !saved) {
                self.disturb(now, cause, &why);
            } else {
                self.reform = None;
                self.form(now, cause, &why);
            }
        }
    }
}
