//! Loading a whole state on any number of workers, and falling back from damage.

use lacuna_recipe::model::ParamSpec;
use lacuna_recipe::state::{Counters, Layout, Section, TensorDigests, state_digest};
use lacuna_types::Step;

use crate::catalog::{self, Entry, Status};
use crate::json::Hex64;
use crate::layout::RunDir;
use crate::manifest::Manifest;
use crate::read::{self, PlanError, ReadError, Wanted};
use crate::state::Dtype;
use crate::storage::{FsError, chain};

/// A state as it was saved.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadedState {
    /// The checkpoint that it came from.
    pub manifest: Manifest,
    /// Flat buffers in [`Section::ALL`] order.
    pub sections: [Vec<f32>; 3],
    /// The counters.
    pub counters: Counters,
}

/// What the loading run expects of a checkpoint; absent fields are not compared.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// The tensors of the model.
    pub layout: &'a Layout,
    /// Digest of the maths fields of the specification.
    pub spec_digest: Option<&'a str>,
    /// Fingerprint of the data set.
    pub data_fingerprint: Option<&'a str>,
    /// Seed of the run.
    pub seed: Option<u64>,
}

impl<'a> Expected<'a> {
    /// Expects the tensors of `layout` and nothing else.
    pub fn tensors(layout: &'a Layout) -> Self {
        Expected { layout, spec_digest: None, data_fingerprint: None, seed: None }
    }
}

/// A checkpoint that was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No checkpoint was committed at this step.
    #[error("there is no checkpoint at step {step}")]
    NotFound {
        /// The step asked for.
        step: Step,
    },
    /// The checkpoint is damaged.
    #[error(
        "{reason}. Next good checkpoint: {}. Run 'lacuna ckpt verify --step {step}' for a full \
         report.",
        next_good.map_or("none".to_string(), |step| format!("step {step}"))
    )]
    Damaged {
        /// Which checkpoint.
        step: Step,
        /// Where and how.
        reason: String,
        /// The newest older checkpoint that looks sound.
        next_good: Option<Step>,
    },
    /// The checkpoint is sound, but of another model or run.
    #[error("checkpoint step {step} does not fit:\n  {}", differences.join("\n  "))]
    Mismatch {
        /// Which checkpoint.
        step: Step,
        /// Every difference.
        differences: Vec<String>,
    },
    /// There are checkpoints, and not one can be loaded.
    #[error("no checkpoint can be loaded:\n  {}", skipped_lines(skipped))]
    NoneGood {
        /// Why not, the highest step first.
        skipped: Vec<Skipped>,
    },
    /// The store could not be listed.
    #[error("checkpoints cannot be listed")]
    List(#[source] FsError),
}

impl LoadError {
    /// Tells whether the store did not answer in time: nothing is known of the checkpoint then.
    pub fn is_outage(&self) -> bool {
        let LoadError::List(error) = self else { return false };
        error.source.kind() == std::io::ErrorKind::TimedOut
    }
}

fn skipped_lines(skipped: &[Skipped]) -> String {
    skipped.iter().map(|s| s.reason.as_str()).collect::<Vec<&str>>().join("\n  ")
}

/// A checkpoint that was passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Its step.
    pub step: Step,
    /// Why it was not used.
    pub reason: String,
}

/// A state found by falling back from damage.
#[derive(Clone, Debug, PartialEq)]
pub struct Resumed {
    /// The newest state that could be loaded.
    pub state: LoadedState,
    /// The checkpoints that could not, the highest step first; a caller makes noise about each.
    pub skipped: Vec<Skipped>,
}

/// Lists every way in which a checkpoint is not what is expected.
pub fn differences(manifest: &Manifest, expected: &Expected<'_>) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let facts = &manifest.state.facts;
    let texts = [
        ("spec digest", facts.spec_digest.clone(), expected.spec_digest.map(str::to_string)),
        (
            "data fingerprint",
            facts.data_fingerprint.clone(),
            expected.data_fingerprint.map(str::to_string),
        ),
        ("seed", facts.seed.to_string(), expected.seed.map(|seed| seed.to_string())),
    ];
    for (what, found, want) in texts {
        if let Some(want) = want.filter(|want| *want != found) {
            out.push(format!("{what} is {found}, this run's is {want}"));
        }
    }
    for section in Section::ALL {
        for param in expected.layout.params() {
            out.extend(difference(manifest, section, param));
        }
        let prefix = format!("{}/", section.prefix());
        let known = |name: &str| expected.layout.find(name).is_some();
        let named = manifest.tensors.iter().filter_map(|(name, tensor)| {
            name.strip_prefix(&prefix).filter(|own| !known(own)).map(|_| (name, tensor))
        });
        out.extend(
            named.map(|(name, tensor)| format!("{name} {:?} is not in this model", tensor.shape)),
        );
    }
    out
}

/// Tells in which way a tensor of a checkpoint is not what is expected.
pub(crate) fn difference(
    manifest: &Manifest,
    section: Section,
    param: &ParamSpec,
) -> Option<String> {
    let name = format!("{}/{}", section.prefix(), param.name);
    let shape: Vec<u64> = param.shape.iter().map(|&n| n as u64).collect();
    let Some(found) = manifest.tensors.get(&name) else {
        return Some(format!("{name} {shape:?} is missing"));
    };
    let is_same = found.shape == shape && found.dtype == Dtype::F32;
    let dtype = found.dtype.name();
    (!is_same).then(|| format!("{name} is {dtype} {:?}, not F32 {shape:?}", found.shape))
}

/// Loads the state of a checkpoint, comparing every block and the state's digest.
pub fn load(
    dir: &RunDir,
    manifest: &Manifest,
    expected: &Expected<'_>,
) -> Result<LoadedState, LoadError> {
    let numel = expected.layout.numel();
    let mut sections: [Vec<f32>; 3] = std::array::from_fn(|_| vec![0.0; numel]);
    let counters = load_into(dir, manifest, expected, &mut |section, at, values: &[f32]| {
        sections[section as usize][at..at + values.len()].copy_from_slice(values);
    })?;
    Ok(LoadedState { manifest: manifest.clone(), sections, counters })
}

/// Loads the state of a checkpoint piece by piece, so that memory for it is needed once; returns
/// its counters.
///
/// `put` gets `values` for the elements `at..` of a section, by place in the files, each after its
/// block was compared. What it got is a state only if this succeeds.
pub fn load_into(
    dir: &RunDir,
    manifest: &Manifest,
    expected: &Expected<'_>,
    put: &mut dyn FnMut(Section, usize, &[f32]),
) -> Result<Counters, LoadError> {
    let step = manifest.step();
    let differences = differences(manifest, expected);
    if !differences.is_empty() {
        return Err(LoadError::Mismatch { step, differences });
    }
    let read = read_state(dir, manifest, expected.layout, put);
    read.map_err(|reason| damaged(dir, manifest, reason))
}

/// Reads the three sections; returns what is damaged.
fn read_state(
    dir: &RunDir,
    manifest: &Manifest,
    layout: &Layout,
    put: &mut dyn FnMut(Section, usize, &[f32]),
) -> Result<Counters, String> {
    let n = layout.n_blocks();
    let want = |section: Section, block: usize| Wanted {
        tensor: format!("{}/{}", section.prefix(), layout.params()[block].name),
        range: 0..layout.range(block).len() as u64,
    };
    let of_section = |section: Section| (0..n).map(move |block| want(section, block));
    let wanted: Vec<Wanted> = Section::ALL.into_iter().flat_map(of_section).collect();
    let ops = read::plan(manifest, &wanted).map_err(|e: PlanError| chain(&e))?;
    let read = read::read_all(dir, manifest, &ops, wanted.len(), |wanted, dst, bytes| {
        let (section, block) = (Section::ALL[wanted / n], wanted % n);
        let at = layout.range(block).start + dst / size_of::<f32>();
        match bytemuck::try_cast_slice(bytes) {
            Ok(values) => put(section, at, values),
            Err(_) => {
                let values = bytes.chunks_exact(size_of::<f32>()).map(bytemuck::pod_read_unaligned);
                put(section, at, &values.collect::<Vec<f32>>());
            }
        }
    });
    let digests = read.map_err(|e: ReadError| chain(&e))?;
    let counters = manifest.state.counters.clone();
    let of_tensor = |block: usize| std::array::from_fn(|section| digests[section * n + block]);
    let tensors: Vec<TensorDigests> = (0..n).map(of_tensor).collect();
    let found = Hex64(state_digest(&tensors, &counters));
    if found != manifest.state_digest {
        return Err(format!(
            "checkpoint step {}: the state read has digest {found}, manifest says {}",
            manifest.step, manifest.state_digest
        ));
    }
    Ok(counters)
}

/// Loads the parameters `wanted` of a checkpoint and nothing else, comparing every block that is
/// read; the elements of others are zero. Laid out as `layout` is.
///
/// The checkpoint may have tensors that `layout` does not know: an objective of somebody else's has
/// its own behind the same encoder.
pub fn load_params(
    dir: &RunDir,
    manifest: &Manifest,
    layout: &Layout,
    wanted: impl Fn(&ParamSpec) -> bool,
) -> Result<Vec<f32>, LoadError> {
    let step = manifest.step();
    let blocks: Vec<usize> =
        (0..layout.n_blocks()).filter(|&block| wanted(&layout.params()[block])).collect();
    let of_block = |&block: &usize| difference(manifest, Section::Param, &layout.params()[block]);
    let differences: Vec<String> = blocks.iter().filter_map(of_block).collect();
    if !differences.is_empty() {
        return Err(LoadError::Mismatch { step, differences });
    }
    read_params(dir, manifest, layout, &blocks).map_err(|reason| damaged(dir, manifest, reason))
}

/// Reads parameters by their places in `layout`; returns what is damaged.
fn read_params(
    dir: &RunDir,
    manifest: &Manifest,
    layout: &Layout,
    blocks: &[usize],
) -> Result<Vec<f32>, String> {
    let want = |&block: &usize| Wanted {
        tensor: format!("{}/{}", Section::Param.prefix(), layout.params()[block].name),
        range: 0..layout.range(block).len() as u64,
    };
    let wanted: Vec<Wanted> = blocks.iter().map(want).collect();
    let ops = read::plan(manifest, &wanted).map_err(|e| chain(&e))?;
    let mut params: Vec<f32> = vec![0.0; layout.numel()];
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut params);
    let read = read::read_all(dir, manifest, &ops, wanted.len(), |wanted, dst, piece| {
        let at = layout.range(blocks[wanted]).start * size_of::<f32>() + dst;
        bytes[at..at + piece.len()].copy_from_slice(piece);
    });
    read.map(|_| params).map_err(|e| chain(&e))
}

/// Makes the error of damage, with the next good checkpoint.
fn damaged(dir: &RunDir, manifest: &Manifest, reason: String) -> LoadError {
    // Best effort: the damage matters more than a store that cannot be listed.
    let entries = catalog::list(dir).unwrap_or_default();
    let next_good = catalog::next_good(&entries, manifest).map(Manifest::step);
    LoadError::Damaged { step: manifest.step(), reason, next_good }
}

/// Finds the checkpoint of one step, or fails: an explicit choice is not replaced by another.
pub fn find_step(dir: &RunDir, step: Step) -> Result<Manifest, LoadError> {
    let entries = catalog::list(dir).map_err(LoadError::List)?;
    let entry = entries.iter().find(|entry| entry.step == step);
    match &entry.ok_or(LoadError::NotFound { step })?.status {
        Status::Good(manifest) => Ok(manifest.as_ref().clone()),
        Status::Damaged { reason } => {
            let older = entries.iter().filter(|entry| entry.step < step);
            let next_good = older.filter_map(Entry::good).max_by_key(|good| good.order());
            let next_good = next_good.map(Manifest::step);
            Err(LoadError::Damaged { step, reason: reason.clone(), next_good })
        }
    }
}

/// Loads the checkpoint of one step, or fails.
pub fn load_step(
    dir: &RunDir,
    step: Step,
    expected: &Expected<'_>,
) -> Result<LoadedState, LoadError> {
    load(dir, &find_step(dir, step)?, expected)
}

/// Loads the newest checkpoint that is sound; `None` where none was ever committed.
///
/// Damage leads to the next older one. A checkpoint of another model does not: it is an error.
pub fn load_newest(dir: &RunDir, expected: &Expected<'_>) -> Result<Option<Resumed>, LoadError> {
    let entries = catalog::list(dir).map_err(LoadError::List)?;
    let mut skipped: Vec<Skipped> = Vec::new();
    for entry in entries.iter().rev() {
        if let Status::Damaged { reason } = &entry.status {
            skipped.push(Skipped { step: entry.step, reason: reason.clone() });
        }
    }
    for manifest in entries.iter().rev().filter_map(Entry::good) {
        match load(dir, manifest, expected) {
            Ok(state) => {
                skipped.sort_by_key(|s| std::cmp::Reverse(s.step));
                return Ok(Some(Resumed { state, skipped }));
            }
            Err(LoadError::Damaged { step, reason, .. }) => skipped.push(Skipped { step, reason }),
            Err(error) => return Err(error),
        }
    }
    skipped.sort_by_key(|s| std::cmp::Reverse(s.step));
    if skipped.is_empty() { Ok(None) } else { Err(LoadError::NoneGood { skipped }) }
}

#[cfg(test)]
mod tests;
