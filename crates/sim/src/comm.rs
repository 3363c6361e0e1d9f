//! The modelled collective: an operation needs a gift of every rank, and may be torn at its end.

use std::rc::Rc;

use crate::bugs::Bug;
use crate::digest::State;
use crate::steps::Doing;
use crate::world::{Pid, World};

/// What one rank brings to an operation.
#[derive(Clone, Debug, Default)]
pub struct Gift {
    /// Its state, where the operation is about states.
    pub state: Option<State>,
    /// Sum over its slots.
    pub sum: u64,
    /// Its slots.
    pub slots: Vec<u32>,
    /// Id in the stop lane, 0 for none.
    pub stop: u64,
    /// Id in the checkpoint lane, 0 for none.
    pub save: u64,
    /// Whether its numbers come from a corrupted state.
    pub tainted: bool,
}

/// The kind of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Everybody connects to everybody.
    Connect,
    /// A state is sent to those who are healed.
    Heal {
        /// Rank that sends.
        source: usize,
    },
    /// The sum of a step.
    Reduce,
}

/// What every rank reads from an operation.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The mesh stands.
    Connected,
    /// The state of the source.
    Healed(Option<State>),
    /// The sum with its control word.
    Sum(Rc<Sum>),
}

/// The sum of a step.
#[derive(Clone, Debug)]
pub struct Sum {
    /// Sum over all slots.
    pub sum: u64,
    /// The slots in it, ascending.
    pub slots: Vec<u32>,
    /// Whether all asked to stop with one id.
    pub stop: bool,
    /// Whether all asked to save with one id.
    pub save: bool,
    /// Whether a corrupted state went into it.
    pub tainted: bool,
}

/// A communicator of one generation.
#[derive(Debug)]
pub struct Comm {
    /// Its generation.
    pub generation: u64,
    members: Vec<Option<Pid>>,
    gone: Vec<Gone>,
    gifts: Vec<Option<Gift>>,
    /// What the communicator before it still held; only a planted bug looks.
    leftovers: Vec<Option<Gift>>,
    kind: Kind,
    /// Ranks that wait for what a cut holds back.
    stalled: Vec<(usize, Outcome)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gone {
    No,
    /// Its connections were closed.
    Closed,
    /// Nothing is heard of it.
    Silent,
}

impl Comm {
    fn new(generation: u64, world: usize) -> Self {
        Comm {
            generation,
            members: vec![None; world],
            gone: vec![Gone::No; world],
            gifts: vec![None; world],
            leftovers: Vec::new(),
            kind: Kind::Connect,
            stalled: Vec::new(),
        }
    }
}

/// Tells whether all raised a lane with one id: n equal numbers x have sums n·x and n·x².
fn agreed(ids: impl Iterator<Item = u64> + Clone, world: usize) -> bool {
    let count = ids.clone().filter(|id| *id > 0).count();
    let sum: u128 = ids.clone().map(u128::from).sum();
    let squares: u128 = ids.map(|id| u128::from(id) * u128::from(id)).sum();
    count == world && squares * world as u128 == sum * sum
}

fn add_up(gifts: &[Option<Gift>]) -> Sum {
    let all = || gifts.iter().flatten();
    let mut slots: Vec<u32> = all().flat_map(|gift| gift.slots.iter().copied()).collect();
    slots.sort_unstable();
    Sum {
        sum: all().fold(0, |sum, gift| sum.wrapping_add(gift.sum)),
        slots,
        stop: agreed(all().map(|gift| gift.stop), gifts.len()),
        save: agreed(all().map(|gift| gift.save), gifts.len()),
        tainted: all().any(|gift| gift.tainted),
    }
}

impl World {
    /// Takes a member into the communicator of its generation.
    pub(crate) fn join_comm(&mut self, pid: Pid, generation: u64, rank: usize, world: usize) {
        let known = self.comms.iter().rposition(|comm| comm.generation == generation);
        let at = known.unwrap_or_else(|| {
            let mut comm = Comm::new(generation, world);
            if let Some(last) = self.comms.last().filter(|last| last.kind == Kind::Reduce) {
                comm.leftovers.clone_from(&last.gifts);
            }
            self.comms.push(comm);
            self.comms.len() - 1
        });
        self.comms[at].members[rank] = Some(pid);
        self.procs[pid].step_loop.comm = Some((at, rank));
    }

    /// Tells whether the newest communicator has so many members and has come to its sums.
    pub fn is_reducing(&self, world: usize) -> bool {
        let newest = self.comms.last();
        newest.is_some_and(|comm| comm.members.len() == world && comm.kind == Kind::Reduce)
    }

    /// Returns the generation of the newest communicator, 0 before the first.
    pub fn newest_generation(&self) -> u64 {
        self.comms.last().map_or(0, |comm| comm.generation)
    }

    /// A member brings its gift; the last one completes the operation.
    pub(crate) fn contribute(&mut self, pid: Pid, kind: Kind, gift: Gift) {
        let (at, rank) = self.procs[pid].step_loop.comm.expect("a member is in a communicator");
        self.enter(pid, Doing::Waiting);
        self.procs[pid].step_loop.ledger.1 += 1;
        let ended = self.hears_of_an_end(at, rank);
        let comm = &mut self.comms[at];
        comm.kind = kind;
        comm.gifts[rank] = Some(gift);
        if self.setup.plant == Bug::StaleGift && kind == Kind::Reduce {
            for (gift, old) in comm.gifts.iter_mut().zip(std::mem::take(&mut comm.leftovers)) {
                *gift = gift.take().or(old);
            }
        }
        let all = comm.gifts.iter().all(Option::is_some);
        // What a member gave before it left may have come through, or not.
        if ended && !(all && self.rng.one_in(2)) {
            self.fail_soon(pid);
        } else if all {
            self.complete(at);
        }
    }

    /// Tells whether a rank sees a closed connection of another.
    fn hears_of_an_end(&self, at: usize, rank: usize) -> bool {
        let comm = &self.comms[at];
        (0..comm.gone.len()).any(|r| comm.gone[r] == Gone::Closed && self.reaches(at, r, rank))
    }

    fn reaches(&self, at: usize, from: usize, to: usize) -> bool {
        let comm = &self.comms[at];
        let (Some(from), Some(to)) = (comm.members[from], comm.members[to]) else { return true };
        !self.net.is_cut(self.node_of(from), self.node_of(to))
    }

    /// Returns the ranks that a failed member misses.
    pub(crate) fn suspects(&self, pid: Pid) -> Vec<usize> {
        let Some((at, own)) = self.procs[pid].step_loop.comm else { return Vec::new() };
        let comm = &self.comms[at];
        let late = comm.gifts[own].is_some();
        let missed = |rank: &usize| {
            let silent = late && comm.gifts[*rank].is_none();
            comm.gone[*rank] != Gone::No || silent || !self.reaches(at, *rank, own)
        };
        (0..comm.members.len()).filter(|rank| *rank != own).filter(missed).collect()
    }

    fn complete(&mut self, at: usize) {
        let comm = &mut self.comms[at];
        let world = comm.gifts.len();
        let gifts = std::mem::replace(&mut comm.gifts, vec![None; world]);
        let outcome = match comm.kind {
            Kind::Connect => Outcome::Connected,
            Kind::Heal { source } => {
                Outcome::Healed(gifts[source].as_ref().and_then(|gift| gift.state))
            }
            Kind::Reduce => Outcome::Sum(Rc::new(add_up(&gifts))),
        };
        for rank in 0..world {
            self.grant(at, rank, outcome.clone());
        }
    }

    /// A rank gets what an operation gives, unless a cut holds something back: every rank needs
    /// every other's sums, and those need everybody's parts.
    fn grant(&mut self, at: usize, rank: usize, outcome: Outcome) {
        let world = self.comms[at].members.len();
        let free = (0..world * world).all(|i| self.reaches(at, i / world, i % world));
        if !free {
            self.comms[at].stalled.push((rank, outcome));
        } else if let Some(pid) = self.waiting(at, rank) {
            self.granted(pid, outcome);
        }
    }

    /// A cut comes while outcomes are on their way: those behind it wait.
    pub(crate) fn hold_outcomes(&mut self, from: usize, to: usize) {
        for pid in 0..self.procs.len() {
            let process = &self.procs[pid];
            let Some((at, rank)) = process.step_loop.comm.filter(|_| process.node == to) else {
                continue;
            };
            let sends = |member: &Option<Pid>| member.is_some_and(|p| self.node_of(p) == from);
            let Doing::Completing { at: when, outcome } = &process.step_loop.doing else {
                continue;
            };
            if *when > self.now && self.comms[at].members.iter().any(sends) {
                let outcome = outcome.clone();
                self.enter(pid, Doing::Waiting);
                self.comms[at].stalled.push((rank, outcome));
            }
        }
    }

    /// Returns the process of a rank that waits in this communicator.
    fn waiting(&self, at: usize, rank: usize) -> Option<Pid> {
        let pid = self.comms[at].members[rank]?;
        let step_loop = &self.procs[pid].step_loop;
        let waits = step_loop.comm == Some((at, rank)) && step_loop.doing == Doing::Waiting;
        waits.then_some(pid)
    }

    /// What cuts held back comes through.
    pub(crate) fn unstall(&mut self) {
        for at in 0..self.comms.len() {
            for (rank, outcome) in std::mem::take(&mut self.comms[at].stalled) {
                let Some(pid) = self.waiting(at, rank) else { continue };
                let comm = &self.comms[at];
                if comm.gone.iter().all(|gone| *gone == Gone::No) {
                    self.grant(at, rank, outcome);
                } else if self.hears_of_an_end(at, rank) {
                    self.fail_soon(pid);
                }
            }
        }
    }

    /// A member closes its connections, or vanishes.
    pub(crate) fn leave_comm(&mut self, pid: Pid, silently: bool) {
        let Some((at, rank)) = self.procs[pid].step_loop.comm.take() else { return };
        let comm = &mut self.comms[at];
        comm.gone[rank] = if silently { Gone::Silent } else { Gone::Closed };
        comm.stalled.retain(|(stalled, _)| *stalled != rank);
        if silently {
            return;
        }
        for other in 0..comm.members.len() {
            let Some(peer) = self.comms[at].members[other] else { continue };
            if self.procs[peer].step_loop.comm == Some((at, other)) && self.reaches(at, rank, other)
            {
                self.peer_closed(peer);
            }
        }
    }

    /// A connection of a member's communicator was closed by the other end.
    fn peer_closed(&mut self, pid: Pid) {
        let now = self.now;
        if self.procs[pid].step_loop.stuck {
            return;
        }
        match self.procs[pid].step_loop.doing.clone() {
            Doing::Waiting => {
                if self.setup.plant == Bug::ApplyTorn && self.apply_torn(pid) {
                    return;
                }
                self.fail_soon(pid);
            }
            // Its own data may be complete, or not.
            Doing::Completing { at, .. } if now < at && self.rng.one_in(2) => self.fail_soon(pid),
            _ => {}
        }
    }

    /// The planted bug: takes the gifts that had come for the sum.
    fn apply_torn(&mut self, pid: Pid) -> bool {
        let (at, _) = self.procs[pid].step_loop.comm.expect("it waits in one");
        let comm = &self.comms[at];
        if comm.kind != Kind::Reduce || comm.gifts.iter().all(Option::is_none) {
            return false;
        }
        let sum = add_up(&comm.gifts);
        self.granted(pid, Outcome::Sum(Rc::new(sum)));
        true
    }
}
