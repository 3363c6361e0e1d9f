//! Who computes what: members in rank order, their slots, and where the state comes from.

use lacuna_types::{Generation, Incarnation, Step, WorkerId};

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

/// One generation of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Number of the generation.
    pub generation: Generation,
    /// Members in rank order.
    pub members: Vec<Member>,
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
    let most = available.min(max).min(n_slots as usize);
    if most == 0 {
        return 0;
    }
    let fastest = (n_slots as usize).div_ceil(most);
    (n_slots as usize).div_ceil(fastest).max(min.min(most))
}

/// Cuts slots `0..n_slots` into `world` contiguous runs whose lengths differ by at most one.
pub fn slot_map(n_slots: u32, world: usize) -> Vec<Vec<u32>> {
    let bound = |rank: usize| (u64::from(n_slots) * rank as u64 / world as u64) as u32;
    (0..world).map(|rank| (bound(rank)..bound(rank + 1)).collect()).collect()
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
                let map = slot_map(n_slots, world);
                let all: Vec<u32> = map.iter().flatten().copied().collect();
                assert_eq!(all, (0..n_slots).collect::<Vec<u32>>());
                let longest = map.iter().map(Vec::len).max().unwrap();
                assert_eq!(longest, (n_slots as usize).div_ceil(world));
                assert!(map.iter().all(|slots| longest - slots.len() <= 1));
            }
        }
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
