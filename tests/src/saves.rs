//! Saves by processes that do nothing else: the calls of a coordinator and of workers, in an order
//! that does not change, on states that everybody can compute.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use lacuna_checkpoint::catalog;
use lacuna_checkpoint::layout::{Attempt, PartId, RunDir};
use lacuna_checkpoint::load::{Expected, LoadedState, load_newest, load_step};
use lacuna_checkpoint::partition::Partition;
use lacuna_checkpoint::state::{StateView, digest_state};
use lacuna_checkpoint::write::{BLOCK_BYTES, PartInfo, write_part};
use lacuna_control::coordinator::CommitOrder;
use lacuna_coordinator::catalogue::Catalogue;
use lacuna_recipe::model::{Init, ParamSpec};
use lacuna_recipe::state::{Counters, Layout};
use lacuna_spec::{RunSpec, parse_text};
use lacuna_types::{AttemptSeq, CoordEpoch, Generation, Step};

/// Parts of a checkpoint.
pub const WORLD: u32 = 2;

/// Samples that the run is said to have.
const N_SAMPLES: u64 = 256;

/// The run.
pub const RUN: &str = "saved";

/// A state that its step determines.
pub struct State {
    layout: Arc<Layout>,
    sections: [Vec<f32>; 3],
    counters: Counters,
}

impl State {
    /// Computes the state of a step; every value differs from that of other steps.
    pub fn at(step: u64) -> Self {
        let param = |name: &str, shape: &[usize]| ParamSpec {
            name: name.to_string(),
            shape: shape.to_vec(),
            init: Init::Zeros,
        };
        // More than one unit of the partition, so that both ranks have something to write.
        let params = [param("a.weight", &[40, 30]), param("b.bias", &[7]), param("c", &[2, 2])];
        let layout = Layout::new(params.to_vec());
        let value = |i: usize, salt: u64| ((i as f32 + 0.5) * 0.37).sin() + (salt + step) as f32;
        let section = |salt: u64| (0..layout.numel()).map(|i| value(i, salt)).collect();
        let counters = Counters { step, updates: step, ..Counters::fresh(layout.n_blocks(), 32) };
        State { sections: [section(1), section(2), section(3)], layout, counters }
    }

    fn views(&self) -> [&[f32]; 3] {
        [&self.sections[0], &self.sections[1], &self.sections[2]]
    }

    fn digest(&self) -> u64 {
        digest_state(&self.layout, self.views(), &self.counters)
    }

    /// Tells whether what was loaded has the same bits.
    fn is(&self, loaded: &LoadedState) -> bool {
        let bits = |s: &[f32]| s.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
        let same = |(a, b): (&Vec<f32>, &Vec<f32>)| bits(a) == bits(b);
        self.sections.iter().zip(&loaded.sections).all(same) && self.counters == loaded.counters
    }
}

/// Returns the folder of the run below `root`.
pub fn run_dir(root: &Path) -> RunDir {
    RunDir::new(root, RUN.parse().expect("a run's name"))
}

/// Does what the workers do: writes all parts of a step's checkpoint; returns the receipts.
pub fn write_parts(root: &Path, step: u64, generation: u64) -> anyhow::Result<Vec<String>> {
    let (dir, state) = (run_dir(root), State::at(step));
    let partition = Partition::new(&state.layout, WORLD);
    let view = StateView::new(&state.layout, state.views(), &state.counters);
    let mut receipts: Vec<String> = Vec::new();
    for rank in 0..WORLD {
        let info = PartInfo {
            run: dir.run().clone(),
            step: Step(step),
            attempt: Attempt::new(Generation(generation), AttemptSeq(1)),
            part: PartId { rank, world: WORLD },
            state_digest: state.digest(),
            counters: state.counters.clone(),
            block_bytes: BLOCK_BYTES,
        };
        receipts.push(write_part(&dir, &info, &view.part(&partition, rank))?.render());
    }
    Ok(receipts)
}

fn spec(root: &Path) -> anyhow::Result<RunSpec> {
    let text = format!(
        "schema = 1\nname = \"{RUN}\"\nbase = \"preset:micro\"\ndata.shards = \"/data\"\n\
         data.mean = [0.5, 0.5, 0.5]\ndata.std = [0.25, 0.25, 0.25]\n\
         train.duration = \"100step\"\ntrain.batch = 32\ntrain.slot_batch = 4\n\
         optim.base_lr = 0.01\noptim.warmup = \"10step\"\ncheckpoint.every = [\"10step\"]\n\
         checkpoint.keep = {{ last = 1 }}\ncheckpoint.to = \"{}\"\n",
        root.display()
    );
    let mut spec = parse_text(RUN, &text, &[])?.spec;
    spec.pin(N_SAMPLES, 1);
    Ok(spec)
}

/// A coordinator that has taken the run.
pub struct Coordinator {
    root: PathBuf,
    catalogue: Catalogue,
    /// The generation that it begins.
    pub generation: u64,
}

impl Coordinator {
    /// Claims the run, looks at what is there, and removes what nobody needs.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        let fingerprint = "blake3:0011".to_string();
        let opened = Catalogue::open(spec(root)?, N_SAMPLES, fingerprint, CoordEpoch(1), None);
        let (catalogue, found) = opened.context("take the run")?;
        found.damaged.iter().for_each(|damaged| eprintln!("warning: {damaged}"));
        let generation = found.generation.next().0;
        Ok(Coordinator { root: root.to_path_buf(), catalogue, generation })
    }

    /// Commits the checkpoint of a step.
    pub fn commit(&self, step: u64, receipts: Vec<String>) -> anyhow::Result<()> {
        let order = CommitOrder {
            generation: Generation(self.generation),
            attempt: AttemptSeq(1),
            step: Step(step),
            digest: State::at(step).digest(),
            receipts,
        };
        self.catalogue.commit(&order, None, None, None)?;
        Ok(())
    }

    /// Reads the checkpoint of a step back and marks it.
    pub fn verify(&self, step: u64) -> anyhow::Result<()> {
        let dir = run_dir(&self.root);
        let entry = catalog::find(&dir, Step(step))?.context("it is gone")?;
        let manifest = match entry.status {
            catalog::Status::Good(manifest) => manifest,
            catalog::Status::Damaged { reason } => bail!(reason),
        };
        let verified = catalog::verify_and_mark(&dir, &manifest)?;
        if let Some(problem) = verified.problems.into_iter().next() {
            bail!("{problem}");
        }
        Ok(())
    }

    /// Removes checkpoints that no rule keeps.
    pub fn retain(&self) -> anyhow::Result<()> {
        self.catalogue.retain(Generation(self.generation), &[])?;
        Ok(())
    }

    /// Saves a step, undisturbed.
    pub fn save(&self, step: u64) -> anyhow::Result<()> {
        let receipts = write_parts(&self.root, step, self.generation)?;
        self.commit(step, receipts)?;
        self.retain()
    }
}

/// Returns the step of the newest checkpoint, after loading it and comparing every bit.
///
/// # Errors
/// A checkpoint that is damaged, cannot be loaded or is not the state of its step.
pub fn newest(root: &Path) -> anyhow::Result<u64> {
    let dir = run_dir(root);
    for entry in catalog::list(&dir)? {
        let step = entry.step;
        if let catalog::Status::Damaged { reason } = &entry.status {
            bail!("a listed checkpoint is damaged: {reason}");
        }
        let state = State::at(step.0);
        let loaded = load_step(&dir, step, &Expected::tensors(&state.layout))?;
        if !state.is(&loaded) {
            bail!("checkpoint step {step} has other bits");
        }
    }
    let layout = State::at(0).layout;
    let found = load_newest(&dir, &Expected::tensors(&layout))?.context("nothing loads")?;
    if !found.skipped.is_empty() {
        bail!("passed over: {:?}", found.skipped);
    }
    Ok(found.state.manifest.step)
}

/// Lists what is there beside checkpoints, claims and the files of the run.
pub fn garbage(root: &Path) -> anyhow::Result<Vec<String>> {
    garbage_of(&run_dir(root))
}

/// The same of any run.
pub fn garbage_of(dir: &RunDir) -> anyhow::Result<Vec<String>> {
    let mut known: Vec<PathBuf> = vec![dir.latest(), dir.run_file()];
    for entry in catalog::list(dir)? {
        let manifest = entry.good().context("a listed checkpoint is damaged")?;
        let step = manifest.step();
        let attempt = dir.attempt(step, manifest.attempt);
        for rank in 0..manifest.world_size {
            let part = PartId { rank, world: manifest.world_size };
            known.extend([attempt.join(part.file_name()), attempt.join(part.receipt_name())]);
        }
        known.extend([dir.manifest(step), dir.verified(step)]);
        // Somebody may be reading the checkpoint back; the next mark takes its place.
        known.push(PathBuf::from(format!("{}.partial", dir.verified(step).display())));
    }
    let claims = dir.claims();
    let is_known = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        known.contains(path)
            || (path.parent() == Some(&claims) && RunDir::parse_claim(&name).is_some())
    };
    let mut out: Vec<String> = Vec::new();
    for at in [dir.checkpoints(), claims.clone()] {
        let found = paths(&at)?;
        out.extend(found.iter().filter(|p| !is_known(p)).map(|p| p.display().to_string()));
    }
    for entry in std::fs::read_dir(dir.path())? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "partial") {
            out.push(path.display().to_string());
        }
    }
    Ok(out)
}

/// Lists files, and folders that have nothing in them.
fn paths(at: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut out: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(at)? {
        let path = entry?.path();
        let found = if path.is_dir() { paths(&path)? } else { vec![path.clone()] };
        out.extend(if found.is_empty() { vec![path] } else { found });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Training from the seed would outdate what can perhaps be repaired.
    #[test]
    fn a_run_whose_checkpoints_are_all_damaged_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        Coordinator::open(root).unwrap().save(10).unwrap();
        let attempt = Attempt::new(Generation(1), AttemptSeq(1));
        let part = PartId { rank: 1, world: WORLD }.file_name();
        let part = run_dir(root).attempt(Step(10), attempt).join(part);
        std::fs::rename(&part, root.join("aside")).unwrap();
        let error = Coordinator::open(root).err().expect("nothing can be loaded");
        let text = format!("{error:#}");
        let named = text.contains("no checkpoint can be loaded: checkpoint step 10: part-00001-of");
        assert!(named, "{text}");
        std::fs::rename(root.join("aside"), part).unwrap();
        assert_eq!(newest(root).unwrap(), 10);
        Coordinator::open(root).unwrap().save(20).unwrap();
    }
}
