//! Who computes what: members in rank order, their slots, and where the state comes from.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::fmt;
use std::sync::Arc;

use lacuna_types::{Generation, Incarnation, Step, WORLD_MAX, WorkerId};

/// A member of a generation; its rank is its place in the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Who.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: Incarnation,
    /// Where its peers reach its collective, `host:port`.
    pub endpoint: String,
    /// The slots of every step that it computes.
    pub slots: Vec<u32>,
}

/// Whether a generation's members connect anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Communicator {
    /// The members are those of the generation before, standing at one boundary: they keep their
    /// communicator and their states.
    Keep,
    /// Members leave whatever they are in, connect and synchronise.
    New,
}

/// One generation of a run. Every change of a group is one: who comes, goes, or computes other
/// slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Number of the generation.
    pub generation: Generation,
    /// Members in rank order.
    pub members: Vec<Member>,
    /// Whether they connect anew.
    pub communicator: Communicator,
    /// Why this generation was formed.
    pub why: String,
}

impl Plan {
    /// Returns the rank of one life of a worker.
    pub fn rank(&self, worker: &WorkerId, incarnation: Incarnation) -> Option<usize> {
        self.members.iter().position(|m| m.worker == *worker && m.incarnation == incarnation)
    }

    /// Returns the number of members.
    pub fn world(&self) -> usize {
        self.members.len()
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { generation, members, communicator, why } = self;
        let slots: Vec<String> =
            members.iter().map(|m| format!("{} {}", m.worker, m.slots.len())).collect();
        let how = match communicator {
            Communicator::Keep => "kept communicator",
            Communicator::New => "new communicator",
        };
        write!(f, "generation {generation}: slots {} ({how}; {why})", slots.join(", "))
    }
}

/// The ranks of a plan's members by name: asked for with every message of every member.
#[derive(Clone, Debug)]
pub struct Ranks(Arc<BTreeMap<WorkerId, (Incarnation, usize)>>);

impl Ranks {
    /// Indexes a plan.
    pub fn of(plan: &Plan) -> Self {
        let by_name = |(rank, m): (usize, &Member)| (m.worker.clone(), (m.incarnation, rank));
        Ranks(Arc::new(plan.members.iter().enumerate().map(by_name).collect()))
    }

    /// Returns the rank of one life of a worker, as [`Plan::rank`] does.
    pub fn get(&self, worker: &WorkerId, incarnation: Incarnation) -> Option<usize> {
        let (life, rank) = self.0.get(worker)?;
        (*life == incarnation).then_some(*rank)
    }
}

/// Where the members' state comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From the run's seed; everybody computes it.
    Seed,
    /// From a committed checkpoint; everybody reads it.
    Checkpoint {
        /// Digest of its manifest.
        manifest: String,
    },
    /// From the memory of a member; the healed ones receive it.
    Memory {
        /// Rank that sends.
        source: usize,
        /// Ranks whose state is overwritten, ascending.
        healed: Vec<usize>,
    },
}

/// How a generation gets its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sync {
    /// Step of the state, and first step to compute.
    pub resume_step: Step,
    /// Where it comes from.
    pub origin: Origin,
}

/// A committed checkpoint, as far as planning is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointRef {
    /// Step of its state.
    pub step: Step,
    /// Digest of its manifest.
    pub manifest: String,
}

/// Chooses how many of `available` workers to use for steps of `n_slots` slots.
///
/// A step takes as long as its busiest member has slots, `ceil(V / N)`: of the sizes up to `max`
/// that make it shortest, the smallest is taken (not below `min`), and the others stay warm spares.
pub fn group_size(n_slots: u32, available: usize, min: usize, max: usize) -> usize {
    let most = available.min(max).min(n_slots as usize).min(WORLD_MAX as usize);
    if most == 0 {
        return 0;
    }
    let fastest = (n_slots as usize).div_ceil(most);
    (n_slots as usize).div_ceil(fastest).max(min.min(most))
}

/// Cuts slots `0..n_slots` among `world` ranks, in numbers that differ by at most one.
pub fn even_shares(n_slots: u32, world: usize) -> Vec<u32> {
    let bound = |rank: usize| (u64::from(n_slots) * rank as u64 / world as u64) as u32;
    (0..world).map(|rank| bound(rank + 1) - bound(rank)).collect()
}

/// Shares slots out so that the busiest rank is done soonest, given each rank's time for one slot.
///
/// Every rank gets at least one slot: a member without work would still hold the sum up.
///
/// # Panics
/// If there are fewer slots than ranks.
pub fn balanced_shares(n_slots: u32, slot_us: &[u64]) -> Vec<u32> {
    assert!(slot_us.len() <= n_slots as usize, "at least one slot a rank");
    let mut shares: Vec<u32> = vec![1; slot_us.len()];
    // When each rank would be done with one slot more, soonest first, the lowest of equal ranks
    // before the others.
    let mut next: BinaryHeap<Reverse<(u64, usize)>> =
        slot_us.iter().enumerate().map(|(rank, us)| Reverse((2 * us, rank))).collect();
    for _ in slot_us.len() as u32..n_slots {
        let Reverse((_, rank)) = next.pop().expect("a group has members");
        shares[rank] += 1;
        next.push(Reverse((u64::from(shares[rank] + 1) * slot_us[rank], rank)));
    }
    shares
}

/// Returns how long the busiest rank computes, in the unit of `slot_us`.
pub fn busiest_us(shares: &[u32], slot_us: &[u64]) -> u64 {
    shares.iter().zip(slot_us).map(|(n, us)| u64::from(*n) * us).max().unwrap_or(0)
}

/// Turns shares into a slot map: contiguous runs in rank order.
pub fn slot_map(shares: &[u32]) -> Vec<Vec<u32>> {
    let mut first = 0;
    let mut run = |n: &u32| {
        let slots: Vec<u32> = (first..first + n).collect();
        first += n;
        slots
    };
    shares.iter().map(&mut run).collect()
}

/// Returns the share of the members' time that is not spent waiting for the busiest one, if all
/// are equally fast: `V / (N * ceil(V / N))`.
pub fn efficiency(n_slots: u32, world: usize) -> f64 {
    let busiest = (n_slots as usize).div_ceil(world);
    f64::from(n_slots) / (world * busiest) as f64
}

/// Decides where the state comes from, given each member's own (by rank) and the newest checkpoint.
pub fn choose_sync(states: &[Option<Step>], checkpoint: Option<&CheckpointRef>) -> Sync {
    let newest: Option<Step> = states.iter().flatten().max().copied();
    let saved: Option<Step> = checkpoint.map(|c| c.step);
    match (newest, checkpoint) {
        (Some(step), _) if Some(step) >= saved => {
            let at_newest = |rank: &usize| states[*rank] == newest;
            let source = (0..states.len()).find(at_newest).expect("the newest state has a holder");
            let healed = (0..states.len()).filter(|rank| !at_newest(rank)).collect();
            Sync { resume_step: step, origin: Origin::Memory { source, healed } }
        }
        (_, Some(saved)) => {
            let origin = Origin::Checkpoint { manifest: saved.manifest.clone() };
            Sync { resume_step: saved.step, origin }
        }
        _ => Sync { resume_step: Step(0), origin: Origin::Seed },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_covered_once() {
        for n_slots in 1..40u32 {
            for world in 1..=n_slots as usize {
                let map = slot_map(&even_shares(n_slots, world));
                let all: Vec<u32> = map.iter().flatten().copied().collect();
                assert_eq!(all, (0..n_slots).collect::<Vec<u32>>());
                let longest = map.iter().map(Vec::len).max().unwrap();
                assert_eq!(longest, (n_slots as usize).div_ceil(world));
                assert!(map.iter().all(|slots| longest - slots.len() <= 1));
            }
        }
    }

    #[test]
    fn a_slow_rank_gets_fewer_slots() {
        assert_eq!(balanced_shares(8, &[10, 10]), [4, 4]);
        assert_eq!(balanced_shares(8, &[10, 30]), [6, 2]);
        assert_eq!(balanced_shares(3, &[10, 1000, 10]), [1, 1, 1]);
        let (even, fair) = (even_shares(8, 2), balanced_shares(8, &[10, 30]));
        assert_eq!((busiest_us(&even, &[10, 30]), busiest_us(&fair, &[10, 30])), (120, 60));
        assert_eq!(slot_map(&fair), [vec![0, 1, 2, 3, 4, 5], vec![6, 7]]);
    }

    #[test]
    fn uneven_numbers_cost_what_the_formula_says() {
        assert!((efficiency(32, 31) - 0.516).abs() < 1e-3);
        assert!((efficiency(32, 16) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn no_more_members_than_help() {
        assert_eq!(group_size(8, 7, 1, 64), 4, "seven are no faster than four");
        assert_eq!(group_size(8, 8, 1, 64), 8);
        assert_eq!(group_size(8, 3, 1, 64), 3);
        assert_eq!(group_size(8, 7, 6, 64), 6, "the user's minimum is kept");
        assert_eq!(group_size(8, 20, 1, 5), 4);
        assert_eq!(group_size(2, 5, 1, 5), 2);
        assert_eq!(group_size(8, 0, 1, 5), 0);
        assert_eq!(group_size(4096, 3000, 1, 4000), 1024, "no more than a group may have");
    }

    #[test]
    fn the_newest_state_wins() {
        let saved = CheckpointRef { step: Step(10), manifest: "m".into() };
        let sync = choose_sync(&[Some(Step(7)), None], None);
        assert_eq!(sync.resume_step, Step(7));
        assert_eq!(sync.origin, Origin::Memory { source: 0, healed: vec![1] });
        let sync = choose_sync(&[Some(Step(11)), Some(Step(12))], Some(&saved));
        assert_eq!(sync.origin, Origin::Memory { source: 1, healed: vec![0] });
        let sync = choose_sync(&[Some(Step(9)), None], Some(&saved));
        assert_eq!(sync.resume_step, Step(10));
        assert_eq!(sync.origin, Origin::Checkpoint { manifest: "m".into() });
        assert_eq!(choose_sync(&[None], None).origin, Origin::Seed);
    }
}
