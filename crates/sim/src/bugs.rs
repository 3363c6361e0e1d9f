//! Bugs to plant, so that it is known that the simulator would find them.
//!
//! None of them is in the machines: each is a fault of the driver around one, or of the modelled
//! step loop, as somebody might write it.

use std::fmt;
use std::str::FromStr;

/// A planted bug.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bug {
    /// None.
    #[default]
    None,
    /// The driver does not write what the machine wants durable.
    SkipPersist,
    /// The driver carries on while a write is under way.
    SayBeforeDurable,
    /// Messages of an older generation count for the present one.
    DropFence,
    /// One slot of a member is added to the sum twice.
    CountSlotTwice,
    /// A member's last slot is left out of the sum.
    LoseSlot,
    /// A restarted coordinator begins one generation too low.
    ReuseGeneration,
    /// A member stops where it raised the lane itself, without waiting for all.
    HalfControlWord,
    /// A member saves where it raised the lane itself, without waiting for all.
    SaveAlone,
    /// A coordinator commits without looking at claims.
    CommitFromOld,
    /// The driver commits an attempt without all its receipts.
    CommitWithoutPart,
    /// A state that is being overwritten counts as whole.
    HalfHeal,
    /// A step whose reduction failed is applied with what had come.
    ApplyTorn,
    /// A member that computes a step again applies it on top of itself.
    ApplyTwice,
    /// What a member gave to a communicator that is over counts in the next one.
    StaleGift,
    /// A member computes the slots of another rank.
    RankMixup,
    /// The driver does not write that the run came to rest.
    SkipEnding,
    /// The driver does not write that a generation trains.
    SkipStarted,
    /// The record of the newest checkpoint goes back when an older one comes late.
    CheckpointGoesBack,
    /// A worker takes what a checkpoint's files hold without comparing digests.
    LoadUnverified,
    /// The driver says that every checkpoint is sound.
    ExamineNothing,
}

/// Every bug with its word.
pub const ALL: &[(Bug, &str)] = &[
    (Bug::None, "none"),
    (Bug::SkipPersist, "skip-persist"),
    (Bug::SayBeforeDurable, "say-before-durable"),
    (Bug::DropFence, "drop-fence"),
    (Bug::CountSlotTwice, "count-slot-twice"),
    (Bug::LoseSlot, "lose-slot"),
    (Bug::ReuseGeneration, "reuse-generation"),
    (Bug::HalfControlWord, "half-control-word"),
    (Bug::SaveAlone, "save-alone"),
    (Bug::CommitFromOld, "commit-from-old"),
    (Bug::CommitWithoutPart, "commit-without-part"),
    (Bug::HalfHeal, "half-heal"),
    (Bug::ApplyTorn, "apply-torn"),
    (Bug::ApplyTwice, "apply-twice"),
    (Bug::StaleGift, "stale-gift"),
    (Bug::RankMixup, "rank-mixup"),
    (Bug::SkipEnding, "skip-ending"),
    (Bug::SkipStarted, "skip-started"),
    (Bug::CheckpointGoesBack, "checkpoint-goes-back"),
    (Bug::LoadUnverified, "load-unverified"),
    (Bug::ExamineNothing, "examine-nothing"),
];

impl fmt::Display for Bug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = ALL.iter().find(|(bug, _)| bug == self).map_or("none", |(_, word)| word);
        f.write_str(word)
    }
}

impl FromStr for Bug {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = ALL.iter().find(|(_, word)| *word == text);
        found.map(|(bug, _)| *bug).ok_or_else(|| format!("`{text}` is not a bug to plant"))
    }
}
