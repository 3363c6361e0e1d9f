//! The coordinator's commits: fenced by claims, created once.

use lacuna_control::coordinator::{CommitOrder, Event, Examination};
use lacuna_control::invariants::Observation;
use lacuna_control::journal::Record;
use lacuna_control::plan::CheckpointRef;
use lacuna_types::{CoordEpoch, Incarnation, WorkerId};

use crate::bugs::Bug;
use crate::catalogue::Disk;
use crate::setup::MS;
use crate::world::{Ev, World};

impl World {
    pub(crate) fn begin_commit(&mut self, order: CommitOrder) {
        let parts = order.receipts.iter().filter_map(|r| self.store.parts.get(r));
        let writers: Vec<(WorkerId, Incarnation)> = parts.map(|p| p.writer.clone()).collect();
        let seen = Observation::Committing {
            epoch: self.host.epoch,
            current: self.host.generation,
            generation: order.generation,
            writers: &writers,
        };
        self.observe(&seen);
        let slow = match self.store.disk {
            Disk::Slow(ms) => ms * MS,
            _ => 0,
        };
        let after = self.setup.commit_ms * MS * self.rng.range(50, 300) / 100 + slow;
        let (life, epoch) = (self.host.life, self.host.epoch);
        self.later(after, Ev::Commit { life, epoch, order: Box::new(order) });
    }

    pub(crate) fn on_commit(&mut self, life: u64, epoch: CoordEpoch, order: CommitOrder) {
        let lives = self.host.is_up() && self.host.life == life;
        if !lives && self.host.zombie != Some(life) {
            return;
        }
        let (generation, attempt) = (order.generation, order.attempt);
        let event = match self.try_commit(epoch, &order) {
            Ok(checkpoint) => Event::CheckpointDone { generation, attempt, checkpoint },
            Err(why) => Event::CheckpointFailed { generation, attempt, why },
        };
        let after = self.rng.range(100_000, 5 * MS);
        self.later(after, Ev::HostAnswer { life, event: Box::new(event) });
    }

    /// What the folder of checkpoints knows better than the journal.
    pub(crate) fn add_news(&mut self) {
        let newest = match self.setup.plant {
            Bug::CheckpointGoesBack => self.store.oldest(),
            _ => self.store.newest(),
        };
        let known = self.host.saved.checkpoint.clone();
        let is_lost = |known: &CheckpointRef| {
            let (aside, removed) = (&self.store.aside, &self.store.removed);
            aside.contains(&known.manifest) || removed.contains(&known.manifest)
        };
        if known.as_ref().is_some_and(is_lost) {
            self.observe(&Observation::SetAside);
        }
        match newest {
            Some(newest) if known.as_ref() != Some(&newest) => {
                self.durable(&Record::Checkpoint(newest));
            }
            // Where there are damaged ones alone, the run is left to an operator.
            None if known.is_some() && self.store.aside.is_empty() => {
                self.durable(&Record::NoCheckpoint);
            }
            _ => {}
        }
    }

    pub(crate) fn begin_examination(&mut self, checkpoint: CheckpointRef) {
        let after = self.setup.commit_ms * MS * self.rng.range(50, 300) / 100;
        self.later(after, Ev::Examine { life: self.host.life, checkpoint });
    }

    /// Reads a checkpoint whole for the machine.
    pub(crate) fn on_examine(&mut self, life: u64, checkpoint: CheckpointRef) {
        if !self.host.is_up() || self.host.life != life {
            return;
        }
        let found = match self.setup.plant {
            Bug::ExamineNothing => Examination::Sound,
            _ => self.store.examine(&checkpoint),
        };
        let after = self.rng.range(100_000, 5 * MS);
        let event = Event::Examined { checkpoint, found };
        self.later(after, Ev::HostAnswer { life, event: Box::new(event) });
    }

    fn try_commit(
        &mut self,
        epoch: CoordEpoch,
        order: &CommitOrder,
    ) -> Result<CheckpointRef, String> {
        if self.store.disk == Disk::Full {
            return Err("no space left on device".to_string());
        }
        if epoch < self.store.claim && self.setup.plant != Bug::CommitFromOld {
            self.counts.fenced += 1;
            return Err(format!("start {epoch} is fenced off by {}", self.store.claim));
        }
        let mut receipts: Vec<&String> = order.receipts.iter().collect();
        if self.setup.plant == Bug::CommitWithoutPart && receipts.len() > 1 {
            receipts.pop();
        }
        let parts = receipts.iter().filter_map(|r| self.store.parts.get(*r));
        let states: Vec<_> = parts.map(|part| part.state).collect();
        let first = *states.first().ok_or("no part exists")?;
        if states.iter().any(|s| s.digest != first.digest) || first.digest != order.digest {
            return Err("replicas differ".to_string());
        }
        let step = order.step;
        let known = self.store.manifests.get(&step.0);
        // One that was found to be damaged makes room.
        let known = known.filter(|(manifest, _)| !self.store.aside.contains(manifest));
        if let Some((manifest, known)) = known {
            if known.digest != first.digest {
                return Err(format!("checkpoint step {step} exists already"));
            }
            return Ok(CheckpointRef { step, manifest: manifest.clone() });
        }
        let manifest = format!("m{step}.{}.{}", order.generation, order.attempt);
        self.store.manifests.insert(step.0, (manifest.clone(), first));
        self.counts.commits += 1;
        if !first.tainted {
            let seen = Observation::Committed {
                epoch,
                newest_epoch: self.store.claim,
                generation: order.generation,
                step,
                digest: first.digest,
                parts: states.len(),
            };
            self.observe(&seen);
        }
        Ok(CheckpointRef { step, manifest })
    }
}
