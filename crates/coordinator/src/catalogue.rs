//! Checkpoints of a run as the coordinator sees them: claim, commit, newest, retention.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use crate::clock::rfc3339;
use lacuna_checkpoint::aside::{self, Examined};
use lacuna_checkpoint::catalog::{self, Entry, Status};
use lacuna_checkpoint::commit::{self, CommitError, Context};
use lacuna_checkpoint::doctor;
use lacuna_checkpoint::layout::{Attempt, RunDir};
use lacuna_checkpoint::manifest::{Loss, Manifest, Parent, RunFacts};
use lacuna_checkpoint::retain;
use lacuna_checkpoint::run_file::RunFile;
use lacuna_checkpoint::write::Receipt;
use lacuna_control::coordinator::{CommitOrder, Examination};
use lacuna_control::journal::{Record, Saved};
use lacuna_control::plan::CheckpointRef;
use lacuna_recipe::state::Layout;
use lacuna_spec::RunSpec;
use lacuna_spec::units::Cadence;
use lacuna_types::{BuildId, CoordEpoch, Generation, Step};
use tracing::warn;

/// Where a run's checkpoints stand, and what identifies its arithmetic.
#[derive(Clone, Debug)]
pub struct Catalogue {
    dir: RunDir,
    spec: RunSpec,
    n_samples: u64,
    fingerprint: String,
    epoch: CoordEpoch,
    /// Whether a checkpoint is being read back.
    is_reading: Arc<AtomicBool>,
}

/// What was found of a run's checkpoints when it (re)starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Newest checkpoint that can be loaded.
    pub newest: Option<CheckpointRef>,
    /// Highest generation that any attempt names.
    pub generation: Generation,
    /// Probe class of the machines that made the newest checkpoint.
    pub probe: Option<u64>,
    /// Manifests that cannot be used, with the reason.
    pub damaged: Vec<String>,
}

impl Found {
    /// Lists the facts that a run's journal does not know yet.
    pub fn news(&self, saved: &Saved) -> Vec<Record> {
        let mut news: Vec<Record> = Vec::new();
        if self.generation > saved.generation {
            news.push(Record::Floor(self.generation));
        }
        if let Some(probe) = self.probe.filter(|_| saved.probe.is_none()) {
            news.push(Record::Probe(probe));
        }
        match &self.newest {
            Some(newest) if saved.checkpoint.as_ref() != Some(newest) => {
                news.push(Record::Checkpoint(newest.clone()));
            }
            None if saved.checkpoint.is_some() => news.push(Record::NoCheckpoint),
            _ => {}
        }
        news
    }
}

/// A catalogue operation that failed, with its causes in the text.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct CatalogueError(String);

fn failed(error: impl std::error::Error + 'static) -> CatalogueError {
    CatalogueError(lacuna_checkpoint::chain(&error))
}

/// Tries whether the place of a new run keeps what checkpoints are built on: better now than when
/// the first one is due.
fn examine_place(dir: &RunDir, spec: &RunSpec) -> Result<(), CatalogueError> {
    // The run's own folder where somebody made it: the one above may be another user's.
    let own = dir.path();
    let base = if own.is_dir() { own.as_path() } else { dir.root() };
    let found = doctor::examine(dir.storage(), base, doctor::BRIEF_BYTES);
    if let Some(problem) = found.problem() {
        return Err(CatalogueError(format!(
            "it was tried and does not keep what checkpoints are built on: {problem}"
        )));
    }
    // Parameters and both moments, f32, of the built-in objective; others may have more or less.
    let bytes = 12 * Layout::new(spec.params()).numel() as u64;
    let wanted = doctor::room_for(bytes);
    if found.lacks(wanted) {
        let (to, free) = (&spec.checkpoint.to, found.free_bytes.unwrap_or_default());
        warn!("`{to}` has {free} bytes free; checkpoints of this run want {wanted}");
    }
    Ok(())
}

impl Catalogue {
    /// Claims the run for this coordinator, with `epoch` or the first free one above it, and looks
    /// at what is there. What is left of attempts goes, but for those of the generation `trains`,
    /// whose members may come back and complete them.
    pub fn open(
        spec: RunSpec,
        n_samples: u64,
        fingerprint: String,
        epoch: CoordEpoch,
        trains: Option<Generation>,
    ) -> Result<(Self, Found), CatalogueError> {
        let mut catalogue = Catalogue::unclaimed(spec, n_samples, fingerprint)?;
        catalogue.claim(epoch)?;
        let found = catalogue.look()?;
        let current = trains.unwrap_or(found.generation.next());
        retain::collect_garbage(&catalogue.dir, current, &[]).map_err(failed)?;
        catalogue.describe()?;
        Ok((catalogue, found))
    }

    /// Looks at what is there and changes nothing: another coordinator may have the claim of a run
    /// that rests. Nothing can be committed.
    pub fn open_at_rest(
        spec: RunSpec,
        n_samples: u64,
        fingerprint: String,
    ) -> Result<(Self, Found), CatalogueError> {
        let catalogue = Catalogue::unclaimed(spec, n_samples, fingerprint)?;
        let found = catalogue.look()?;
        Ok((catalogue, found))
    }

    fn unclaimed(spec: RunSpec, n_samples: u64, print: String) -> Result<Self, CatalogueError> {
        let dir = RunDir::open(&spec.checkpoint.to, spec.run_id()).map_err(failed)?;
        let (epoch, is_reading) = (CoordEpoch::default(), Arc::default());
        Ok(Catalogue { dir, spec, n_samples, fingerprint: print, epoch, is_reading })
    }

    fn claim(&mut self, epoch: CoordEpoch) -> Result<(), CatalogueError> {
        let claimed = commit::highest_claim(&self.dir).map_err(failed)?;
        if claimed.is_none() {
            examine_place(&self.dir, &self.spec)?;
        }
        self.epoch = epoch.max(claimed.unwrap_or_default().next());
        commit::claim(&self.dir, self.epoch).map_err(failed)
    }

    fn look(&self) -> Result<Found, CatalogueError> {
        let entries = catalog::list(&self.dir).map_err(failed)?;
        let newest = catalog::newest_good(&entries).map(reference);
        let probe = catalog::newest_good(&entries)
            .and_then(|manifest| u64::from_str_radix(&manifest.state.facts.probe_class, 16).ok());
        let reason = |entry: &Entry| match &entry.status {
            Status::Damaged { reason } => Some(reason.clone()),
            Status::Good(_) => None,
        };
        let damaged: Vec<String> = entries.iter().filter_map(reason).collect();
        if newest.is_none() && !damaged.is_empty() {
            // Training from the seed, it would outdate what a person may yet repair.
            let all = damaged.join("; ");
            return Err(CatalogueError(format!(
                "no checkpoint can be loaded: {all}; remove their folders to begin again"
            )));
        }
        let generation = catalog::highest_generation(&self.dir).map_err(failed)?;
        Ok(Found { newest, generation, probe, damaged })
    }

    /// Writes down what the run is, once.
    fn describe(&self) -> Result<(), CatalogueError> {
        let batch = u64::from(self.spec.train.batch);
        let per_epoch = (self.n_samples / batch).max(1);
        let facts = self.facts(Step(0), None, None);
        let (created, spec) = (rfc3339(SystemTime::now()), self.spec.effective_toml());
        let file = RunFile::new(&self.dir, created, spec, facts, batch, per_epoch);
        file.write(&self.dir).map_err(failed)?;
        Ok(())
    }

    /// Takes a spec that differs in placement or display only.
    pub fn set_spec(&mut self, spec: RunSpec) {
        self.spec = spec;
    }

    /// Commits a complete attempt.
    pub fn commit(
        &self,
        order: &CommitOrder,
        parent: Option<&CheckpointRef>,
        probe: Option<u64>,
        loss: Option<f64>,
    ) -> Result<CheckpointRef, CatalogueError> {
        let mut receipts: Vec<Receipt> = Vec::new();
        for text in &order.receipts {
            receipts.push(Receipt::parse(text.as_bytes()).map_err(failed)?);
        }
        let context = Context {
            step: order.step,
            attempt: Attempt::new(order.generation, order.attempt),
            coord_epoch: self.epoch,
            world_size: receipts.len() as u32,
            created: rfc3339(SystemTime::now()),
            parent: parent.map(|p| Parent { step: p.step.0, manifest: p.manifest.clone() }),
            facts: self.facts(order.step, probe, loss),
            spec: self.spec.effective_toml(),
        };
        let committed = match commit::commit(&self.dir, &receipts, &context) {
            Ok(committed) => committed,
            // After any other error the manifest may be there and not last.
            Err(err @ CommitError::Taken { same_state: true, .. }) => {
                return self.same_state(order).ok_or_else(|| failed(err));
            }
            Err(err) => return Err(failed(err)),
        };
        if committed.state_digest != order.digest {
            return Err(CatalogueError(format!(
                "the parts make a state with digest {:016x}, the members said {:016x}",
                committed.state_digest, order.digest
            )));
        }
        Ok(CheckpointRef { step: committed.step, manifest: committed.manifest })
    }

    /// Reads a checkpoint whole; one that is damaged is set aside for the newest one that is left.
    pub fn examine(&self, checkpoint: &CheckpointRef) -> Examination {
        let (step, seal) = (checkpoint.step, checkpoint.manifest.as_str());
        let examined = aside::examine(&self.dir, step, seal);
        match &examined {
            Examined::Sound => return Examination::Sound,
            Examined::Unknown(why) => return Examination::Unknown { why: why.clone() },
            Examined::Mended => {
                let why = "it was set aside and reads well again".to_string();
                return Examination::Unknown { why };
            }
            Examined::Damaged(_) | Examined::Gone => {}
        }
        // A place that went away, or that another coordinator took, says nothing of what was there.
        if commit::highest_claim(&self.dir).ok().flatten() != Some(self.epoch) {
            let why = format!("`{}` has no claim of this start", self.dir.path().display());
            return Examination::Unknown { why };
        }
        let entries = match catalog::list(&self.dir) {
            Ok(entries) => entries,
            Err(error) => {
                return Examination::Unknown { why: lacuna_checkpoint::chain(&error) };
            }
        };
        let others = entries.iter().rev().filter_map(Entry::good).map(reference);
        let next = others.into_iter().find(|other| other != checkpoint);
        match examined {
            // While others are there and damaged, the run is not begun again unasked.
            Examined::Gone if next.is_some() || entries.is_empty() => Examination::Gone { next },
            Examined::Damaged(why) => Examination::Damaged { why, next },
            _ => Examination::Damaged { why: "it was removed".to_string(), next },
        }
    }

    /// Reads a checkpoint that was just committed back, where the run wants that: a sound one is
    /// marked as verified, a damaged one set aside. Returns what is to be said, and
    /// whether it is a warning.
    ///
    /// One at a time: while one is being read, later ones are not.
    pub fn read_back(&self, checkpoint: &CheckpointRef) -> Option<(bool, String)> {
        if !self.spec.checkpoint.read_back || self.is_reading.swap(true, Ordering::AcqRel) {
            return None;
        }
        let examined = aside::examine(&self.dir, checkpoint.step, &checkpoint.manifest);
        self.is_reading.store(false, Ordering::Release);
        let step = checkpoint.step;
        match examined {
            Examined::Sound | Examined::Mended => {
                Some((false, format!("checkpoint step {step} was read back and is sound")))
            }
            Examined::Damaged(why) => {
                Some((true, format!("checkpoint step {step} was read back and is damaged: {why}")))
            }
            Examined::Unknown(why) => {
                Some((true, format!("checkpoint step {step} could not be read back: {why}")))
            }
            // Retention was faster.
            Examined::Gone => None,
        }
    }

    /// Finds a checkpoint of the same step and state, from before a restart: it is as good as ours.
    fn same_state(&self, order: &CommitOrder) -> Option<CheckpointRef> {
        let entry = catalog::find(&self.dir, order.step).ok()??;
        let manifest = entry.good()?;
        (manifest.state_digest.0 == order.digest).then(|| reference(manifest))
    }

    /// Says which other coordinator has claimed the run's checkpoints since, if one has.
    pub fn superseded(&self) -> Result<Option<String>, CatalogueError> {
        let highest = commit::highest_claim(&self.dir).map_err(failed)?;
        Ok(highest.filter(|theirs| *theirs > self.epoch).map(|theirs| {
            format!(
                "another coordinator, start {theirs}, has claimed the checkpoints in `{}` since: \
                 nothing that this one (start {}) lets the run compute can be kept",
                self.spec.checkpoint.to, self.epoch
            )
        }))
    }

    /// Tells whether the newest claim is this coordinator's.
    pub fn has_claim(&self) -> Result<bool, CatalogueError> {
        let highest = commit::highest_claim(&self.dir).map_err(failed)?;
        Ok(highest == Some(self.epoch))
    }

    /// Only who holds the claim may remove anything: to others, parts of a checkpoint that is being
    /// made look like what is left of a failed one.
    fn is_ours(&self) -> Result<(), CatalogueError> {
        self.superseded()?.map_or(Ok(()), |why| Err(CatalogueError(why)))
    }

    /// Deletes checkpoints that no rule keeps, and what is left of attempts from before
    /// `generation` and of those that are `over`; returns the steps.
    pub fn retain(
        &self,
        generation: Generation,
        over: &[Attempt],
    ) -> Result<Vec<Step>, CatalogueError> {
        self.is_ours()?;
        let keep = &self.spec.checkpoint.keep;
        let Some(last) = NonZeroUsize::new(keep.last as usize) else { return Ok(Vec::new()) };
        let entries = catalog::list(&self.dir).map_err(failed)?;
        let every = self.keep_every_steps();
        let in_use = every.map_or_else(Vec::new, |every| retain::chosen(&entries, every));
        let now = rfc3339(SystemTime::now());
        let done = retain::retain(&self.dir, last, &in_use, &now).map_err(failed)?;
        self.collect(generation, over)?;
        Ok(done.delete)
    }

    /// The same after a commit; returns what is to be said, and whether it is a warning.
    pub fn clean_up(&self, generation: Generation, over: &[Attempt]) -> Option<(bool, String)> {
        match self.retain(generation, over) {
            Ok(deleted) if deleted.is_empty() => None,
            Ok(deleted) => {
                let steps: Vec<String> = deleted.iter().map(ToString::to_string).collect();
                Some((false, format!("retention deleted steps {}", steps.join(", "))))
            }
            Err(err) => Some((true, format!("retention failed: {err}"))),
        }
    }

    /// Removes what is left of attempts from before `generation` and of those that are `over`.
    pub fn collect(&self, generation: Generation, over: &[Attempt]) -> Result<(), CatalogueError> {
        self.is_ours()?;
        let removed = retain::collect_garbage(&self.dir, generation, over);
        removed.map(drop).map_err(failed)
    }

    fn keep_every_steps(&self) -> Option<u64> {
        let resolved = self.spec.resolve(self.n_samples).ok()?;
        self.spec.checkpoint.keep.every?.steps(resolved.geometry.steps_per_epoch())
    }

    fn facts(&self, step: Step, probe: Option<u64>, loss: Option<f64>) -> RunFacts {
        let loss = Loss { last: loss.filter(|x| x.is_finite()), mean100: None };
        let probe_class = probe.map_or_else(String::new, |p| format!("{p:016x}"));
        let facts = facts(&self.spec, self.n_samples, &self.fingerprint, step);
        RunFacts { probe_class, loss, ..facts }
    }
}

fn reference(manifest: &Manifest) -> CheckpointRef {
    CheckpointRef { step: manifest.step(), manifest: manifest.seal.clone() }
}

/// Returns what identifies the arithmetic of a run over `n_samples` samples at `step`, without loss
/// and probe class; `spec` is pinned to its data.
pub fn facts(spec: &RunSpec, n_samples: u64, fingerprint: &str, step: Step) -> RunFacts {
    let batch = u64::from(spec.train.batch);
    let per_epoch = (n_samples / batch).max(1);
    RunFacts {
        spec_digest: format!("blake3:{}", spec.maths_digest().to_hex()),
        data_fingerprint: fingerprint.to_string(),
        seed: spec.train.seed,
        rng: "philox4x32-10/1".to_string(),
        build: BuildId::this().to_string(),
        probe_class: String::new(),
        epoch: step.0 / per_epoch,
        samples: step.0 * batch,
        loss: Loss::default(),
    }
}

/// Converts a cadence in steps or epochs to steps; `None` for one in time.
pub fn cadence_steps(cadence: &Cadence, steps_per_epoch: u64) -> Option<u64> {
    match cadence {
        Cadence::Length(length) => length.steps(steps_per_epoch),
        Cadence::Seconds(_) => None,
    }
}
