//! The modelled folder of checkpoints: claims, parts and manifests, all created once.

use std::collections::BTreeMap;

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

/// The folder.
#[derive(Clone, Debug, Default)]
pub struct Catalogue {
    /// Highest claim.
    pub claim: CoordEpoch,
    /// Parts by receipt.
    pub parts: BTreeMap<String, Part>,
    /// Manifests by step.
    pub manifests: BTreeMap<u64, (String, State)>,
    /// How creating manifests goes.
    pub disk: Disk,
}

impl Catalogue {
    /// Returns the newest checkpoint.
    pub fn newest(&self) -> Option<CheckpointRef> {
        let (step, (manifest, _)) = self.manifests.last_key_value()?;
        Some(CheckpointRef { step: Step(*step), manifest: manifest.clone() })
    }

    /// Returns the oldest checkpoint; only a planted bug asks.
    pub fn oldest(&self) -> Option<CheckpointRef> {
        let (step, (manifest, _)) = self.manifests.first_key_value()?;
        Some(CheckpointRef { step: Step(*step), manifest: manifest.clone() })
    }

    /// Loads a checkpoint by the digest of its manifest.
    pub fn load(&self, step: u64, manifest: &str) -> Option<State> {
        let (found, state) = self.manifests.get(&step)?;
        (found == manifest).then_some(*state)
    }
}
