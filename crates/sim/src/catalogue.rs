//! The modelled folder of checkpoints: claims, parts and manifests, all created once.

use std::collections::{BTreeMap, BTreeSet};

use lacuna_control::coordinator::Examination;
use lacuna_control::plan::CheckpointRef;
use lacuna_types::{CoordEpoch, Incarnation, Step, WorkerId};

use crate::digest::State;

/// How writes of one kind go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Disk {
    /// As they should.
    #[default]
    Fine,
    /// They fail.
    Full,
    /// They take so many milliseconds.
    Slow(u64),
}

/// One part as its writer reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Who wrote it.
    pub writer: (WorkerId, Incarnation),
    /// The state that it is a part of.
    pub state: State,
    /// Rank of the writer.
    pub rank: usize,
    /// Writers altogether.
    pub world: usize,
}

/// What reading a checkpoint gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// The state.
    State(State),
    /// Bytes that were not committed.
    Damaged,
}

/// The folder.
#[derive(Clone, Debug, Default)]
pub struct Catalogue {
    /// Highest claim.
    pub claim: CoordEpoch,
    /// Parts by receipt.
    pub parts: BTreeMap<String, Part>,
    /// Manifests by step.
    pub manifests: BTreeMap<u64, (String, State)>,
    /// Manifests whose parts are damaged.
    pub spoiled: BTreeSet<String>,
    /// Manifests that were found to be damaged.
    pub aside: BTreeSet<String>,
    /// Manifests that an operator removed.
    pub removed: BTreeSet<String>,
    /// How creating manifests goes.
    pub disk: Disk,
}

impl Catalogue {
    /// Returns the newest checkpoint.
    pub fn newest(&self) -> Option<CheckpointRef> {
        let counts = |(_, (manifest, _)): &(&u64, &(String, State))| !self.aside.contains(manifest);
        let (step, (manifest, _)) = self.manifests.iter().rev().find(counts)?;
        Some(CheckpointRef { step: Step(*step), manifest: manifest.clone() })
    }

    /// An operator removes what is damaged.
    pub fn remove_damaged(&mut self) {
        let aside = std::mem::take(&mut self.aside);
        self.manifests.retain(|_, (manifest, _)| !aside.contains(manifest));
        self.removed.extend(aside);
    }

    /// Changes bytes of the newest checkpoint.
    pub fn spoil_newest(&mut self) {
        self.spoiled.extend(self.newest().map(|newest| newest.manifest));
    }

    /// Returns the oldest checkpoint; only a planted bug asks.
    pub fn oldest(&self) -> Option<CheckpointRef> {
        let (step, (manifest, _)) = self.manifests.first_key_value()?;
        Some(CheckpointRef { step: Step(*step), manifest: manifest.clone() })
    }

    /// Loads a checkpoint by the digest of its manifest; `None` if there is none, or another.
    pub fn load(&self, step: u64, manifest: &str) -> Option<Loaded> {
        if self.removed.contains(manifest) {
            return Some(Loaded::Damaged);
        }
        let (_, state) = self.manifests.get(&step).filter(|(found, _)| found == manifest)?;
        let spoiled = self.spoiled.contains(manifest);
        Some(if spoiled { Loaded::Damaged } else { Loaded::State(*state) })
    }

    /// Reads a checkpoint whole, and sets it aside if it is damaged.
    pub fn examine(&mut self, checkpoint: &CheckpointRef) -> Examination {
        if self.removed.contains(&checkpoint.manifest) {
            return Examination::Gone { next: self.newest() };
        }
        if !self.spoiled.contains(&checkpoint.manifest) {
            return Examination::Sound;
        }
        self.aside.insert(checkpoint.manifest.clone());
        Examination::Damaged { why: "other bytes".to_string(), next: self.newest() }
    }
}
