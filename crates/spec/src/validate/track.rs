//! Section `[track]`.

use super::Reader;
use crate::node::find;
use crate::run_spec::{RECONSTRUCTIONS, ReconstructionsSpec, TrackSpec};

impl Reader<'_> {
    pub(super) fn track(&mut self) -> Option<TrackSpec> {
        let every = self.quantity("track.every");
        let tensorboard = match find(self.root, "track.tensorboard") {
            Some(_) => Some(self.place("track.tensorboard")?),
            None => None,
        };
        let reconstructions = self.reconstructions();
        Some(TrackSpec { every: every?, tensorboard, reconstructions: reconstructions? })
    }

    fn reconstructions(&mut self) -> Option<Option<ReconstructionsSpec>> {
        if find(self.root, "track.reconstructions").is_none() {
            return Some(None);
        }
        let every = self.quantity("track.reconstructions.every");
        let images = match find(self.root, "track.reconstructions.images") {
            Some(_) => self.count("track.reconstructions.images"),
            None => Some(RECONSTRUCTIONS),
        };
        Some(Some(ReconstructionsSpec { every: every?, images: images? }))
    }
}
