//! The modelled step loop: it computes slots, sums with its peers, and applies all or nothing.

use std::collections::VecDeque;

use lacuna_control::invariants::{Invariant, Observation, Violation};
use lacuna_control::message::{FaultKind, Phase};
use std::sync::Arc;

use lacuna_control::plan::{Origin, Plan, Sync};
use lacuna_control::worker::Report;
use lacuna_types::{AttemptSeq, Generation, Step, Timestamp, exit};

use crate::bugs::Bug;
use crate::catalogue::Loaded;
use crate::comm::{Gift, Kind, Outcome, Sum};
use crate::digest::{State, slot_sum};
use crate::process::IDLE;
use crate::saving::mark;
use crate::setup::MS;
use crate::world::{Ev, Pid, World};

/// What the session orders.
#[derive(Clone, Debug)]
pub enum Order {
    /// Drop the communicator and report.
    Leave,
    /// Connect and synchronise.
    Connect {
        /// With whom.
        plan: Arc<Plan>,
        /// From where the state comes.
        sync: Sync,
    },
    /// Go on in the communicator with this plan.
    Adopt {
        /// The plan.
        plan: Arc<Plan>,
    },
    /// Compute the probe again.
    Audit {
        /// For which generation.
        generation: Generation,
    },
    /// Train.
    Start {
        /// In which generation.
        generation: Generation,
    },
    /// Save the state now.
    Save {
        /// In which generation.
        generation: Generation,
        /// For which attempt.
        attempt: AttemptSeq,
    },
}

/// What the loop does.
#[derive(Clone, Debug, Default)]
pub enum Doing {
    /// Waits for orders.
    #[default]
    Idle,
    /// Drops its communicator.
    Leaving,
    /// Takes another plan.
    Adopting,
    /// Computes the probe again.
    Auditing(Generation),
    /// Reads a checkpoint, or computes the seed's state.
    Loading,
    /// Computes its slots.
    Computing,
    /// Waits for the other ranks.
    Waiting,
    /// Gets the outcome at the time `at`, and then works on it.
    Completing {
        /// When it has all of it.
        at: u64,
        /// What it is.
        outcome: Outcome,
    },
    /// Sees its communicator fail.
    Failing,
}

impl PartialEq for Doing {
    fn eq(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

/// The loop of one trainer.
#[derive(Debug, Default)]
pub struct StepLoop {
    /// The state in memory.
    pub state: Option<State>,
    /// Its communicator, and its rank there.
    pub comm: Option<(usize, usize)>,
    /// What it does.
    pub doing: Doing,
    /// Since when.
    pub since: u64,
    /// Counts what it did, so that what was planned for something else is known.
    pub job: u64,
    /// Generation and operations of its newest communicator.
    pub ledger: (u64, u64),
    /// Change id to raise the stop lane with, 0 for none.
    pub stop: u64,
    /// Attempt to raise the checkpoint lane with, 0 for none.
    pub save: u64,
    /// Never comes back from what it computes next.
    pub hung: bool,
    /// Never comes back from an abort.
    pub stuck: bool,
    /// So many times slower than others, in tenths above 1.
    pub slow: u64,
    /// Cannot read data.
    pub unfit: bool,
    /// Its device computes other bits.
    pub rotten: bool,
    /// Time of a slot of late, in microseconds.
    pub slot_us: u64,
    orders: VecDeque<Order>,
    aborting: bool,
    pub(crate) plan: Option<(Arc<Plan>, Sync)>,
}

impl StepLoop {
    /// Tells whether its newest operation is in progress.
    pub fn is_in_op(&self, now: u64) -> bool {
        match self.doing {
            Doing::Waiting => true,
            Doing::Completing { at, .. } => now < at,
            _ => false,
        }
    }

    /// Returns the phase that a beat names.
    pub fn phase(&self) -> Phase {
        match &self.doing {
            Doing::Idle | Doing::Leaving | Doing::Adopting => IDLE,
            Doing::Loading => Phase::Sync,
            Doing::Auditing(_) | Doing::Computing => Phase::Compute,
            Doing::Waiting if self.ledger.1 < 2 => Phase::Sync,
            Doing::Waiting | Doing::Failing => Phase::Reduce,
            Doing::Completing { outcome: Outcome::Sum(_), .. } => Phase::Optimizer,
            Doing::Completing { .. } => Phase::Sync,
        }
    }
}

impl World {
    /// Begins something else.
    pub(crate) fn enter(&mut self, pid: Pid, doing: Doing) {
        let now = self.now;
        let step_loop = &mut self.procs[pid].step_loop;
        step_loop.job += 1;
        step_loop.doing = doing;
        step_loop.since = now;
    }

    /// Begins something that takes `after` nanoseconds.
    fn work(&mut self, pid: Pid, doing: Doing, after: u64) {
        self.enter(pid, doing);
        let job = self.procs[pid].step_loop.job;
        self.later(after, Ev::Loop { pid, job });
    }

    pub(crate) fn order(&mut self, pid: Pid, order: Order) {
        self.procs[pid].step_loop.orders.push_back(order);
        self.pump(pid);
    }

    /// Wakes a loop that waits in its communicator, and orders it to leave.
    pub(crate) fn abort(&mut self, pid: Pid) {
        let now = self.now;
        let step_loop = &mut self.procs[pid].step_loop;
        step_loop.aborting = true;
        step_loop.orders.push_back(Order::Leave);
        let busy = match &step_loop.doing {
            Doing::Idle | Doing::Leaving => false,
            Doing::Computing if step_loop.hung => true,
            Doing::Waiting if step_loop.stuck => true,
            // An update that has begun is finished.
            Doing::Completing { at, outcome: Outcome::Sum(_) } => *at <= now,
            _ => false,
        };
        if !busy && step_loop.doing != Doing::Leaving {
            self.enter(pid, Doing::Idle);
            self.pump(pid);
        }
    }

    /// Takes orders while there is nothing else to do.
    fn pump(&mut self, pid: Pid) {
        while self.procs[pid].alive && self.procs[pid].step_loop.doing == Doing::Idle {
            let step_loop = &mut self.procs[pid].step_loop;
            let Some(order) = step_loop.orders.pop_front() else { return };
            let plan = step_loop.plan.as_ref().filter(|_| step_loop.comm.is_some());
            let comm = plan.map(|(plan, _)| plan.generation.0);
            match order {
                Order::Leave => {
                    self.leave_comm(pid, false);
                    let after = self.rng.range(1, 8) * MS / 2;
                    self.work(pid, Doing::Leaving, after);
                }
                Order::Connect { plan, sync } => self.connect(pid, plan, sync),
                Order::Adopt { plan } => self.adopt(pid, plan),
                Order::Audit { generation } => {
                    self.work(pid, Doing::Auditing(generation), 100 * MS);
                }
                Order::Start { generation } if comm == Some(generation.0) => self.compute(pid),
                Order::Save { generation, attempt } if comm == Some(generation.0) => {
                    self.save(pid, attempt);
                }
                _ => {}
            }
        }
    }

    /// Takes another plan for the communicator it stands in.
    fn adopt(&mut self, pid: Pid, plan: Arc<Plan>) {
        let step_loop = &mut self.procs[pid].step_loop;
        let (Some(state), Some(_)) = (step_loop.state, step_loop.comm) else { return };
        (step_loop.stop, step_loop.save) = (0, 0);
        let generation = plan.generation;
        let state = Step(state.step);
        let origin = Origin::Memory { source: 0, healed: Vec::new() };
        step_loop.ledger.0 = generation.0;
        step_loop.plan = Some((plan, Sync { resume_step: state, origin }));
        let after = self.rng.range(1, 8) * MS;
        self.work(pid, Doing::Adopting, after);
    }

    fn adopted(&mut self, pid: Pid) {
        if let Some(state) = self.procs[pid].step_loop.state {
            let (generation, state) = (self.generation_of(pid), Step(state.step));
            self.report(pid, Report::Adopted { generation, state });
        }
    }

    fn connect(&mut self, pid: Pid, plan: Arc<Plan>, sync: Sync) {
        let process = &mut self.procs[pid];
        (process.step_loop.stop, process.step_loop.save) = (0, 0);
        let Some(rank) = plan.rank(&process.worker, process.incarnation) else { return };
        let (generation, world) = (plan.generation.0, plan.world());
        self.procs[pid].step_loop.plan = Some((plan, sync));
        self.join_comm(pid, generation, rank, world);
        self.contribute(pid, Kind::Connect, Gift::default());
    }

    /// Computes its slots of the next step, or stands at the end.
    fn compute(&mut self, pid: Pid) {
        let Some(state) = self.procs[pid].step_loop.state else {
            return self.impossible(pid, "trains without a state");
        };
        if state.step >= self.setup.steps {
            return self.stand(pid);
        }
        let step_loop = &self.procs[pid].step_loop;
        if step_loop.unfit {
            return self.fault(pid, FaultKind::Storage, "failed to open a shard");
        }
        if !self.has_a_device(pid) {
            return self.fault(pid, FaultKind::Local, "device lost");
        }
        let step_loop = &self.procs[pid].step_loop;
        let (plan, _) = step_loop.plan.as_ref().expect("a member has a plan");
        let (_, rank) = step_loop.comm.expect("a member is in a communicator");
        let slots = &plan.members[rank].slots;
        let n = slots.len() as u64;
        if self.setup.poison > 0 && state.step == self.setup.poison && slots.contains(&0) {
            return self.end_process(pid, None, false);
        }
        let slot = self.setup.step_ms * MS / u64::from(self.setup.slots);
        let time = n * slot * (10 + step_loop.slow) / 10 * self.rng.range(90, 110) / 100;
        self.procs[pid].step_loop.slot_us = time / n.max(1) / 1000;
        if self.procs[pid].step_loop.hung {
            self.enter(pid, Doing::Computing);
        } else {
            self.work(pid, Doing::Computing, time);
        }
    }

    /// What was under way is done.
    pub(crate) fn on_loop(&mut self, pid: Pid, job: u64) {
        if self.procs[pid].step_loop.job != job {
            return;
        }
        match std::mem::take(&mut self.procs[pid].step_loop.doing) {
            Doing::Leaving => {
                self.procs[pid].step_loop.aborting = false;
                let state = self.procs[pid].step_loop.state.map(|s| Step(s.step));
                self.report(pid, Report::Down { state });
            }
            Doing::Loading => self.load(pid),
            Doing::Computing => {
                let gift = self.gift(pid);
                self.contribute(pid, Kind::Reduce, gift);
            }
            Doing::Completing { outcome, .. } => self.take(pid, outcome),
            Doing::Failing => self.fault(pid, FaultKind::Communicator, "a peer is gone"),
            Doing::Adopting => self.adopted(pid),
            Doing::Auditing(generation) => {
                let process = &self.procs[pid];
                let probe = process.probe ^ u64::from(process.step_loop.rotten);
                self.report(pid, Report::Audited { generation, probe });
            }
            Doing::Idle | Doing::Waiting => {}
        }
        self.pump(pid);
    }

    fn gift(&mut self, pid: Pid) -> Gift {
        let plant = self.setup.plant;
        let odd = plant == Bug::CountSlotTwice || plant == Bug::LoseSlot;
        let strange = odd && self.rng.one_in(50);
        let step_loop = &self.procs[pid].step_loop;
        let (plan, _) = step_loop.plan.as_ref().expect("a member has a plan");
        let (_, rank) = step_loop.comm.expect("a member is in a communicator");
        let state = step_loop.state.expect("it computes");
        let at = if plant == Bug::RankMixup && plan.world() > 3 { rank.max(1) } else { rank };
        let mut slots = plan.members[at].slots.clone();
        if strange && plant == Bug::CountSlotTwice {
            slots.extend(slots.last().copied());
        } else if strange {
            slots.pop();
        }
        Gift {
            state: None,
            sum: slots.iter().fold(0, |sum, slot| sum.wrapping_add(slot_sum(&state, *slot))),
            slots,
            stop: step_loop.stop,
            save: step_loop.save,
            tainted: state.tainted || step_loop.rotten,
        }
    }

    /// An operation is complete: the outcome arrives a little later at each rank.
    pub(crate) fn granted(&mut self, pid: Pid, outcome: Outcome) {
        let jitter = self.rng.range(100_000, 3 * MS);
        let (wait, then) = match &outcome {
            Outcome::Connected => (jitter, 0),
            Outcome::Healed(_) => (self.setup.heal_ms * MS + jitter, 0),
            Outcome::Sum(_) => (jitter, self.rng.range(MS / 2, 3 * MS)),
        };
        let at = self.now + wait;
        self.work(pid, Doing::Completing { at, outcome }, wait + then);
    }

    fn take(&mut self, pid: Pid, outcome: Outcome) {
        match outcome {
            Outcome::Connected => self.synchronise(pid),
            Outcome::Healed(state) => {
                if self.is_healed(pid) {
                    self.procs[pid].step_loop.state = state;
                }
                self.synced(pid);
            }
            Outcome::Sum(sum) => self.apply(pid, &sum),
        }
    }

    fn is_healed(&self, pid: Pid) -> bool {
        let step_loop = &self.procs[pid].step_loop;
        let (_, sync) = step_loop.plan.as_ref().expect("a member has a plan");
        let (_, rank) = step_loop.comm.expect("a member is in a communicator");
        match &sync.origin {
            Origin::Memory { healed, .. } => healed.contains(&rank),
            _ => true,
        }
    }

    fn synchronise(&mut self, pid: Pid) {
        let step_loop = &self.procs[pid].step_loop;
        let (plan, sync) = step_loop.plan.as_ref().expect("a member has a plan");
        let (generation, origin) = (plan.generation.0, sync.origin.clone());
        let healed = self.is_healed(pid);
        let plant = self.setup.plant;
        let step_loop = &mut self.procs[pid].step_loop;
        step_loop.ledger = (generation, 1);
        // A state that is overwritten is none until it is whole.
        let before = step_loop.state;
        if healed && plant == Bug::HalfHeal {
            let half = |s: State| State { digest: s.digest ^ 0x4A1F, ..s };
            step_loop.state = before.map(half).or(Some(half(State::seed())));
        } else if healed {
            step_loop.state = None;
        }
        match origin {
            Origin::Seed => self.work(pid, Doing::Loading, 5 * MS),
            Origin::Checkpoint { .. } => {
                let after = self.rng.range(10, 60) * MS + self.setup.load_ms * MS;
                self.work(pid, Doing::Loading, after);
            }
            Origin::Memory { healed, .. } if healed.is_empty() => self.synced(pid),
            Origin::Memory { source, .. } => {
                let gift =
                    Gift { state: before.filter(|_| !self.is_healed(pid)), ..Gift::default() };
                self.contribute(pid, Kind::Heal { source }, gift);
            }
        }
    }

    fn load(&mut self, pid: Pid) {
        let (_, sync) = self.procs[pid].step_loop.plan.as_ref().expect("a member has a plan");
        let state = match &sync.origin {
            Origin::Checkpoint { manifest } => self.store.load(sync.resume_step.0, manifest),
            _ => Some(Loaded::State(State::seed())),
        };
        match state {
            Some(Loaded::Damaged) if self.setup.plant != Bug::LoadUnverified => {
                self.procs[pid].step_loop.state = None;
                self.fault(pid, FaultKind::Checkpoint, "a block has another digest");
            }
            Some(Loaded::Damaged) => {
                let step = sync.resume_step.0;
                self.procs[pid].step_loop.state = Some(State { step, ..State::seed() });
                self.synced(pid);
            }
            Some(Loaded::State(state)) => {
                self.procs[pid].step_loop.state = Some(state);
                self.synced(pid);
            }
            None => {
                self.breach(Invariant::NewestNeverBack, "a plan names a checkpoint that is not");
            }
        }
    }

    fn synced(&mut self, pid: Pid) {
        let Some(state) = self.procs[pid].step_loop.state else {
            return self.impossible(pid, "is told to keep its state and has none");
        };
        let generation = self.generation_of(pid);
        self.enter(pid, Doing::Idle);
        let (step, digest) = (Step(state.step), state.digest);
        self.report(pid, Report::Synced { generation, step, digest });
    }

    pub(crate) fn generation_of(&self, pid: Pid) -> Generation {
        let (plan, _) = self.procs[pid].step_loop.plan.as_ref().expect("a member has a plan");
        plan.generation
    }

    fn apply(&mut self, pid: Pid, sum: &Sum) {
        let Some(before) = self.procs[pid].step_loop.state else {
            return self.impossible(pid, "applies without a state");
        };
        let mut state = before.after(sum.sum, sum.tainted);
        if self.setup.plant == Bug::ApplyTwice && state.step <= self.counts.highest.min(9) {
            state.digest ^= 1;
        }
        if self.procs[pid].step_loop.rotten {
            state.digest ^= 1;
            state.tainted = true;
        }
        self.procs[pid].step_loop.state = Some(state);
        let redone = state.step < self.counts.highest;
        self.counts.redone += u64::from(redone);
        if redone && !self.rough && !self.tainted {
            let text = format!("step {} is computed again, and nothing was lost", state.step);
            self.breach(Invariant::Liveness, &text);
        }
        self.counts.highest = self.counts.highest.max(state.step);
        let generation = self.generation_of(pid);
        if !state.tainted {
            let worker = self.procs[pid].worker.clone();
            let seen = Observation::Applied {
                generation,
                worker: &worker,
                step: Step(state.step),
                digest: state.digest,
                slots: &sum.slots,
            };
            self.observe(&seen);
            self.check_reference(&state, worker.as_str());
        }
        self.after_step(pid, sum, state);
    }

    fn check_reference(&mut self, state: &State, worker: &str) {
        if self.reference.at(state.step) != Some(state.digest) {
            let step = state.step;
            let text = format!("{worker} has a state at step {step} that no worker alone has");
            self.breach(Invariant::OneDigest, &text);
        }
    }

    fn after_step(&mut self, pid: Pid, sum: &Sum, state: State) {
        let plant = self.setup.plant;
        let step_loop = &mut self.procs[pid].step_loop;
        let own_save = plant == Bug::SaveAlone && step_loop.save > 0;
        if sum.save || own_save {
            let attempt = AttemptSeq(std::mem::take(&mut step_loop.save));
            self.save(pid, attempt);
        }
        let own_stop = plant == Bug::HalfControlWord && self.procs[pid].step_loop.stop > 0;
        let stop = sum.stop || own_stop;
        let last = stop || state.step == self.setup.steps;
        let due = state.step.is_multiple_of(self.setup.digest_every);
        if due || last || state.step.is_multiple_of(self.setup.mark_every) {
            let generation = self.generation_of(pid);
            self.report(pid, Report::Mark(mark(generation, &state, due)));
        }
        if !self.procs[pid].alive || self.procs[pid].step_loop.aborting {
            return;
        }
        if last {
            self.stand(pid);
        } else {
            self.compute(pid);
        }
    }

    /// Reports that it stands at a boundary.
    fn stand(&mut self, pid: Pid) {
        let state = self.procs[pid].step_loop.state.expect("it stood up");
        let generation = self.generation_of(pid);
        self.enter(pid, Doing::Idle);
        let (step, digest) = (Step(state.step), state.digest);
        self.report(pid, Report::Held { generation, step, digest });
    }

    /// A member sees that its communicator failed, after a moment.
    pub(crate) fn fail_soon(&mut self, pid: Pid) {
        let after = self.latency();
        self.work(pid, Doing::Failing, after);
    }

    fn fault(&mut self, pid: Pid, kind: FaultKind, detail: &str) {
        let generation = self.generation_of(pid);
        if !self.harmed {
            let text = format!("{} failed without any cause: {detail}", self.procs[pid].worker);
            self.breach(Invariant::Liveness, &text);
        }
        let suspects = match kind {
            FaultKind::Communicator => self.suspects(pid),
            _ => Vec::new(),
        };
        self.enter(pid, Doing::Idle);
        let detail = detail.to_string();
        self.report(pid, Report::Fault { generation, kind, suspects, detail });
    }

    /// An operation that takes too long is a fault.
    pub(crate) fn check_deadline(&mut self, pid: Pid) {
        let step_loop = &self.procs[pid].step_loop;
        let late = self.now - step_loop.since > self.setup.deadline_ms * MS;
        if step_loop.doing == Doing::Waiting && late && !step_loop.stuck {
            self.fault(pid, FaultKind::Communicator, "an operation took too long");
            self.pump(pid);
        }
    }

    /// What the code asserts is not so: the process ends, and the history with it.
    fn impossible(&mut self, pid: Pid, what: &str) {
        let text = format!("{} {what}", self.procs[pid].worker);
        self.end_process(pid, Some(exit::INTERNAL), false);
        self.breach(Invariant::OneDigest, &text);
    }

    /// Notes a violation that the world sees itself.
    pub(crate) fn breach(&mut self, invariant: Invariant, what: &str) {
        if self.violation.is_none() {
            let violation =
                Violation { invariant, at: Timestamp(self.now), what: what.to_string() };
            self.say(|| format!("VIOLATION {violation}"));
            self.violation = Some(violation);
        }
    }

    /// Lets a loop not come back from its slots.
    pub(crate) fn hang(&mut self, pid: Pid) {
        let step_loop = &mut self.procs[pid].step_loop;
        step_loop.hung = true;
        if step_loop.doing == Doing::Computing {
            step_loop.job += 1;
        }
    }

    /// Lets a loop that hung go on.
    pub(crate) fn unhang(&mut self, pid: Pid) {
        let step_loop = &mut self.procs[pid].step_loop;
        let (hung, stuck) = (step_loop.hung, step_loop.stuck);
        (step_loop.hung, step_loop.stuck) = (false, false);
        if !hung && !stuck {
            return;
        }
        if step_loop.orders.is_empty() && step_loop.doing == Doing::Computing {
            self.compute(pid);
        } else if !step_loop.orders.is_empty() && step_loop.doing != Doing::Leaving {
            self.enter(pid, Doing::Idle);
            self.pump(pid);
        }
    }
}
