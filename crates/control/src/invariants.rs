//! The protocol's invariants, named once, with one observer that checks them.
//!
//! Whoever sees a run from outside (the simulator, a test of processes) tells the [`Observer`] what
//! happened, in order; it answers with a [`Violation`] as soon as what it was told contradicts an
//! invariant. It knows no machine and no driver.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use lacuna_types::{CoordEpoch, Generation, Incarnation, Step, Timestamp, WorkerId};

use crate::plan::Plan;

/// What always holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    /// One plan per generation; generations only grow, and none is named before it is durable.
    OnePlan,
    /// No two generations apply one step with different digests.
    OneDigest,
    /// Inside a generation, members are at most one step apart.
    InStep,
    /// The slots of an applied step are all slots, each once.
    EachSlotOnce,
    /// The newest checkpoint never goes back, unless it is damaged; all its parts exist and match.
    NewestNeverBack,
    /// Only members of the plan, through the newest coordinator, commit.
    MembersCommit,
    /// Once faults stop and enough workers live, the run goes on within a bound.
    Liveness,
    /// The state after replaying the journal is the state before the crash.
    Replay,
    /// No message of a lower coordinator start or generation changes anything.
    NothingStale,
}

impl Invariant {
    /// All, in the order of their numbers.
    pub const ALL: [Invariant; 9] = [
        Invariant::OnePlan,
        Invariant::OneDigest,
        Invariant::InStep,
        Invariant::EachSlotOnce,
        Invariant::NewestNeverBack,
        Invariant::MembersCommit,
        Invariant::Liveness,
        Invariant::Replay,
        Invariant::NothingStale,
    ];

    /// Returns the short name, `I1` to `I9`.
    pub fn name(self) -> &'static str {
        ["I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8", "I9"][self as usize]
    }
}

impl fmt::Display for Invariant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An invariant that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub invariant: Invariant,
    /// When, on the observer's clock.
    pub at: Timestamp,
    /// What was seen that cannot be.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation { invariant, at, what } = self;
        write!(f, "{invariant} violated at {:.3} s: {what}", at.0 as f64 / 1e9)
    }
}

/// What can be seen of a run from outside.
#[derive(Clone, Debug)]
pub enum Observation<'a> {
    /// A coordinator start made a generation's number durable.
    Durable {
        /// Which start.
        epoch: CoordEpoch,
        /// The number.
        generation: Generation,
    },
    /// A message carried a plan.
    Said {
        /// The plan.
        plan: &'a Plan,
    },
    /// A member applied a step.
    Applied {
        /// In which generation.
        generation: Generation,
        /// Who.
        worker: &'a WorkerId,
        /// Steps behind its state afterwards.
        step: Step,
        /// Digest of its state afterwards.
        digest: u64,
        /// The slots whose sum was applied, ascending, repeated where counted repeatedly.
        slots: &'a [u32],
    },
    /// A coordinator begins to commit a checkpoint.
    Committing {
        /// Which start of it.
        epoch: CoordEpoch,
        /// Newest generation that this start knows.
        current: Generation,
        /// Generation of the attempt.
        generation: Generation,
        /// Who wrote the parts, by rank.
        writers: &'a [(WorkerId, Incarnation)],
    },
    /// A manifest exists from here on.
    Committed {
        /// Start of the coordinator that made it.
        epoch: CoordEpoch,
        /// The newest start that took over the run.
        newest_epoch: CoordEpoch,
        /// Generation of the attempt.
        generation: Generation,
        /// Step of the saved state.
        step: Step,
        /// Digest of the saved state.
        digest: u64,
        /// Parts that exist and match.
        parts: usize,
    },
    /// A coordinator holds this for the newest checkpoint.
    Newest {
        /// Step of its state.
        step: Step,
    },
    /// The newest checkpoint turned out to be damaged: an older one may be the newest.
    SetAside,
    /// A coordinator started from its journal.
    Replayed {
        /// What its state was, in any one notation.
        before: &'a str,
        /// What it is.
        after: &'a str,
    },
    /// A message changed its receiver's state.
    Changed {
        /// Start and generation that the message belongs to.
        message: (CoordEpoch, Generation),
        /// Start and generation that the receiver was in.
        receiver: (CoordEpoch, Generation),
    },
    /// Faults stopped, and enough workers live: the bound counts from here, and from each step.
    Calm {
        /// Longest time between two steps.
        bound: Duration,
    },
    /// Faults may happen, or the run rests: nothing is expected to go on.
    Unrest,
    /// Time passed.
    Passed,
}

/// What is known of one generation.
#[derive(Clone, Debug)]
struct Seen {
    plan: Plan,
    /// Step from which it trains; known once a step was applied.
    start: Option<Step>,
    /// Last step by rank.
    last: Vec<Option<Step>>,
}

/// Checks what it is told against the invariants.
#[derive(Clone, Debug)]
pub struct Observer {
    n_slots: u32,
    durable: Generation,
    epoch: CoordEpoch,
    generations: BTreeMap<Generation, Seen>,
    digests: BTreeMap<Step, (u64, Generation)>,
    newest: Option<Step>,
    calm: Option<(Duration, Timestamp)>,
}

impl Observer {
    /// Creates the observer of a run whose steps have `n_slots` slots.
    pub fn new(n_slots: u32) -> Self {
        Observer {
            n_slots,
            durable: Generation(0),
            epoch: CoordEpoch(0),
            generations: BTreeMap::new(),
            digests: BTreeMap::new(),
            newest: None,
            calm: None,
        }
    }

    /// Takes what happened at `now`.
    ///
    /// # Errors
    /// The [`Violation`] that it makes.
    pub fn observe(&mut self, now: Timestamp, seen: &Observation<'_>) -> Result<(), Violation> {
        use Observation as O;
        let found = match seen {
            O::Durable { epoch, generation } => self.durable(*epoch, *generation),
            O::Said { plan } => self.said(plan),
            O::Applied { generation, worker, step, digest, slots } => {
                if let Some((_, since)) = &mut self.calm {
                    *since = now;
                }
                self.applied(*generation, worker, *step, *digest, slots)
            }
            O::Committing { epoch, current, generation, writers } => {
                self.committing(*epoch, *current, *generation, writers)
            }
            O::Committed { epoch, newest_epoch, generation, step, digest, parts } => {
                let fenced = (epoch < newest_epoch).then(|| {
                    let text = format!(
                        "coordinator start {epoch} committed step {step} after start \
                         {newest_epoch} had taken over"
                    );
                    (Invariant::MembersCommit, text)
                });
                fenced.or_else(|| self.committed(*generation, *step, *digest, *parts))
            }
            O::Newest { step } => self.newest(*step),
            O::SetAside => {
                self.newest = None;
                None
            }
            O::Replayed { before, after } => (before != after).then(|| {
                let text = format!("the journal gives {after}, the state was {before}");
                (Invariant::Replay, text)
            }),
            O::Changed { message, receiver } => (message < receiver).then(|| {
                let text = format!(
                    "a message of start {} and generation {} changed a receiver at start {} and \
                     generation {}",
                    message.0, message.1, receiver.0, receiver.1
                );
                (Invariant::NothingStale, text)
            }),
            O::Calm { bound } => {
                self.calm = Some((*bound, now));
                None
            }
            O::Unrest => {
                self.calm = None;
                None
            }
            O::Passed => self.late(now),
        };
        match found {
            Some((invariant, what)) => Err(Violation { invariant, at: now, what }),
            None => Ok(()),
        }
    }

    fn durable(&mut self, epoch: CoordEpoch, generation: Generation) -> Option<Found> {
        if generation <= self.durable {
            let text = format!(
                "start {epoch} makes generation {generation} after generation {} of start {}",
                self.durable, self.epoch
            );
            return Some((Invariant::OnePlan, text));
        }
        (self.durable, self.epoch) = (generation, epoch);
        None
    }

    fn said(&mut self, plan: &Plan) -> Option<Found> {
        let generation = plan.generation;
        if generation > self.durable {
            let text = format!("generation {generation} was named before it was durable");
            return Some((Invariant::OnePlan, text));
        }
        let Some(known) = self.generations.get(&generation) else {
            let last = vec![None; plan.world()];
            let fresh = Seen { plan: plan.clone(), start: None, last };
            self.generations.insert(generation, fresh);
            return None;
        };
        (known.plan != *plan).then(|| {
            let text = format!("generation {generation} has two plans");
            (Invariant::OnePlan, text)
        })
    }

    fn applied(
        &mut self,
        generation: Generation,
        worker: &WorkerId,
        step: Step,
        digest: u64,
        slots: &[u32],
    ) -> Option<Found> {
        let wanted = self.n_slots as usize;
        if slots.len() != wanted || !slots.iter().copied().eq(0..self.n_slots) {
            let text = format!("{worker} applied step {step} from slots {slots:?} of {wanted}");
            return Some((Invariant::EachSlotOnce, text));
        }
        if let Some(text) = self.out_of_step(generation, worker, step) {
            return Some((Invariant::InStep, text));
        }
        let (known, by) = *self.digests.entry(step).or_insert((digest, generation));
        (known != digest).then(|| {
            let text = format!(
                "{worker} has {digest:016x} after step {step} in generation {generation}, \
                 generation {by} had {known:016x}"
            );
            (Invariant::OneDigest, text)
        })
    }

    fn out_of_step(
        &mut self,
        generation: Generation,
        worker: &WorkerId,
        step: Step,
    ) -> Option<String> {
        let Some(seen) = self.generations.get_mut(&generation) else {
            return Some(format!("{worker} applied a step in generation {generation} of no plan"));
        };
        let Some(rank) = seen.plan.members.iter().position(|m| m.worker == *worker) else {
            return Some(format!("{worker} is not a member of generation {generation}"));
        };
        let start = *seen.start.get_or_insert(Step(step.0.saturating_sub(1)));
        let own = seen.last[rank].unwrap_or(start);
        if step != own.next() {
            return Some(format!("{worker} went from step {own} to {step} in {generation}"));
        }
        seen.last[rank] = Some(step);
        let behind = |last: &Option<Step>| last.unwrap_or(start).next() < step;
        let slow = seen.last.iter().position(behind)?;
        Some(format!(
            "{worker} is at step {step} of generation {generation}, {} at {}",
            seen.plan.members[slow].worker,
            seen.last[slow].unwrap_or(start)
        ))
    }

    fn committing(
        &self,
        epoch: CoordEpoch,
        current: Generation,
        generation: Generation,
        writers: &[(WorkerId, Incarnation)],
    ) -> Option<Found> {
        let text = match self.generations.get(&generation) {
            _ if generation != current => format!(
                "start {epoch} commits an attempt of generation {generation} while {current} is \
                 the newest"
            ),
            None => format!("an attempt of generation {generation}, which has no plan"),
            Some(seen) => {
                let members = seen.plan.members.iter().map(|m| (&m.worker, m.incarnation));
                if writers.iter().map(|(w, i)| (w, *i)).eq(members) {
                    return None;
                }
                format!("the writers of an attempt are not generation {generation}'s members")
            }
        };
        Some((Invariant::MembersCommit, text))
    }

    fn committed(
        &mut self,
        generation: Generation,
        step: Step,
        digest: u64,
        parts: usize,
    ) -> Option<Found> {
        let world = self.generations.get(&generation).map(|seen| seen.plan.world());
        if world != Some(parts) {
            let text = format!("the checkpoint of step {step} has {parts} parts of {world:?}");
            return Some((Invariant::NewestNeverBack, text));
        }
        let known = self.digests.get(&step).copied();
        known.filter(|(known, _)| *known != digest).map(|(known, by)| {
            let text = format!(
                "the checkpoint of step {step} holds {digest:016x}, generation {by} had \
                 {known:016x}"
            );
            (Invariant::OneDigest, text)
        })
    }

    fn newest(&mut self, step: Step) -> Option<Found> {
        if let Some(before) = self.newest.filter(|before| *before > step) {
            let text = format!("the newest checkpoint was of step {before} and is of {step}");
            return Some((Invariant::NewestNeverBack, text));
        }
        self.newest = Some(step);
        None
    }

    fn late(&mut self, now: Timestamp) -> Option<Found> {
        let (bound, since) = self.calm.filter(|(bound, since)| now.since(*since) > *bound)?;
        let text = format!(
            "no step for {:.1} s of calm, {:.1} s are allowed",
            now.since(since).as_secs_f64(),
            bound.as_secs_f64()
        );
        Some((Invariant::Liveness, text))
    }
}

/// What contradicts which invariant.
type Found = (Invariant, String);

#[cfg(test)]
mod tests;
