//! Generations that take too long to form, and members that do not leave the one before.

use lacuna_types::Timestamp;

use super::conduct::Strike;
use super::forming::{Group, Stage};
use super::{Cause, Coordinator};
use crate::message::Phase;
use crate::plan::{Member, Origin};

/// How many times the limit of forming members may take that all say that they load a state.
const LOADS_MAX: u32 = 20;

impl Coordinator {
    /// Gives a forming generation up whose time is over, without those who did not answer, and
    /// kills processes whose abort hangs.
    pub(super) fn expire_forming(&mut self, now: Timestamp) {
        self.kill_hung_aborts(now);
        let Some(group) = &self.group else { return };
        if group.deadline > now || matches!(group.stage, Stage::Running | Stage::Held) {
            return;
        }
        let answered = |rank: usize| match group.stage {
            Stage::Recovering => group.back.contains(&rank),
            Stage::Preparing => group.prepared[rank].is_some(),
            _ => group.synced.contains_key(&rank),
        };
        let silent = (0..group.plan.world()).filter(|&rank| !answered(rank));
        let silent: Vec<Member> = silent.map(|rank| group.plan.members[rank].clone()).collect();
        let nobody_did = silent.len() == group.plan.world();
        if group.stage == Stage::Syncing && self.all_load(group, &silent, now) {
            let group = self.group.as_mut().expect("just seen");
            group.deadline = now + self.timing.forming;
            return;
        }
        let recovering = group.stage == Stage::Recovering;
        self.awaited.0.clear();
        for member in silent.iter().filter(|_| recovering || !nobody_did) {
            self.give_up_silent(now, member, recovering);
        }
        self.disturb(now, Cause::Stuck, "forming took too long");
    }

    /// Tells whether all who have not answered say that they are at it: a large state takes its
    /// time to load, and one member longer than another. Where some are done already, the others
    /// must be loading by themselves: nobody of them can wait for a peer's bytes any more.
    fn all_load(&self, group: &Group, silent: &[Member], now: Timestamp) -> bool {
        let alone = silent.len() < group.plan.world();
        let origin = group.sync.as_ref().map(|sync| &sync.origin);
        if alone && matches!(origin, Some(Origin::Memory { .. })) {
            // Nothing is loaded: a state on its way has extended the limit already.
            return false;
        }
        let busy = |m: &Member| {
            let beat = self.workers.get(&m.worker).and_then(|w| w.beat.as_ref());
            beat.is_some_and(|beat| beat.phase == Phase::Sync && !(alone && beat.in_op))
        };
        let patience = LOADS_MAX * self.timing.forming;
        now.since(group.formed) < patience && silent.iter().all(busy)
    }

    /// A member did not answer where others did: whoever beats and does not answer hangs.
    fn give_up_silent(&mut self, now: Timestamp, member: &Member, recovering: bool) {
        let Member { worker, incarnation, .. } = member;
        if recovering {
            self.lose(now, worker, "it did not come back to the restarted coordinator");
            return;
        }
        let why = "it did not answer while the group was forming";
        if self.workers.contains_key(worker) {
            self.shoot(worker, *incarnation, why);
            self.strike(now, worker, Strike::Out, why);
        }
        self.lose(now, worker, why);
    }

    /// A member that stays inside its communicator after it was told to leave cannot be waited
    /// for; one that computes will look up by itself.
    fn kill_hung_aborts(&mut self, now: Timestamp) {
        let Some(group) = self.group.as_ref().filter(|g| g.stage == Stage::Preparing) else {
            return;
        };
        if now.since(group.formed) < self.timing.revoke {
            return;
        }
        let hung = |(rank, member): (usize, &Member)| {
            let beat = self.workers.get(&member.worker)?.beat.as_ref()?;
            let inside = matches!(beat.phase, Phase::Reduce | Phase::Sync) && beat.in_op;
            let hangs = inside && beat.phase_ms >= self.timing.revoke.as_millis() as u64;
            let phase = beat.phase.word();
            (group.prepared[rank].is_none() && hangs)
                .then(|| (member.clone(), format!("its abort hangs in {phase}")))
        };
        let hung: Vec<(Member, String)> =
            group.plan.members.iter().enumerate().filter_map(hung).collect();
        for (member, why) in hung {
            self.shoot(&member.worker, member.incarnation, &why);
            self.lose(now, &member.worker, &why);
        }
    }
}
