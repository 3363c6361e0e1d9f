//! Making a lost manifest again from the parts, which say what they are.
//!
//! Nothing is believed that is not checked: the digest of the whole state, which every part names,
//! must be that of the tensors found and the counters; receipts that are there must agree.

use std::collections::BTreeMap;

use lacuna_recipe::digest::Crc64;
use lacuna_recipe::state::Counters;
use lacuna_types::{CoordEpoch, Step};
use serde::Deserialize;

use crate::aside;
use crate::catalog::{self, Entry};
use crate::commit::{CommitError, Context, assemble, highest_claim};
use crate::json::{Hex64, parse_strict};
use crate::layout::{Attempt, PartId, RunDir};
use crate::manifest::{BLOCK_BYTES_MAX, Manifest, Parent};
use crate::partition::PARTITION;
use crate::read;
use crate::run_file::{RunFile, RunFileError};
use crate::state::{Dtype, Origin, PartSlice};
use crate::storage::{FsError, Published, ReadAt};
use crate::write::{
    BLOCK_BYTES, Blocks, PART_METADATA, PART_SCHEMA, PartInfo, Receipt, ReceiptSlice,
    is_finite_f32, render_header, seal_receipt,
};

/// Longest accepted header of a part.
const HEADER_BYTES_MAX: u64 = 256 << 20;

/// Longest accepted receipt.
const RECEIPT_BYTES_MAX: u64 = 64 << 20;

/// Bytes read at once; a multiple of any element's size.
const PIECE_BYTES: u64 = 4 << 20;

/// A manifest that was not made.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// No attempt at this step has all its parts.
    #[error("checkpoint step {step}: {problem}")]
    Incomplete {
        /// Which checkpoint.
        step: Step,
        /// What was found.
        problem: String,
    },
    /// A part is not as it was written.
    #[error("checkpoint step {step}: {file}: {problem}")]
    Part {
        /// Which checkpoint.
        step: Step,
        /// Which file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// The parts do not make a state.
    #[error("checkpoint step {step} cannot be put together")]
    Commit {
        /// Which checkpoint.
        step: Step,
        /// Why not.
        #[source]
        source: Box<CommitError>,
    },
    /// There is a manifest, and nothing is wrong with it.
    #[error("checkpoint step {step} has a sound manifest")]
    Sound {
        /// Which checkpoint.
        step: Step,
    },
    /// What the run is cannot be read.
    #[error(transparent)]
    Run(#[from] RunFileError),
    /// The run is of a version that wrote no description of it.
    #[error("the run has no run.json, which says what a manifest does beside its parts")]
    NoRunFile,
    /// The storage refused.
    #[error(transparent)]
    Fs(#[from] FsError),
}

/// What a part says of itself.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct About {
    schema: String,
    run: String,
    step: u64,
    attempt: Attempt,
    rank: u32,
    world_size: u32,
    partition: String,
    state_digest: Hex64,
    counters: Counters,
    slices: BTreeMap<String, Place>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Place {
    range: [u64; 2],
    shape: Vec<u64>,
}

/// Makes the manifest of `step` again, without writing it.
pub fn rebuild(dir: &RunDir, step: Step, created: String) -> Result<Manifest, RebuildError> {
    let entries = catalog::list(dir)?;
    if entries.iter().any(|entry| entry.step == step && entry.good().is_some()) {
        return Err(RebuildError::Sound { step });
    }
    let run = RunFile::read(dir)?.ok_or(RebuildError::NoRunFile)?;
    let (attempt, world) = find_attempt(dir, step)?;
    let receipts = (0..world).map(|rank| read_part(dir, step, attempt, PartId { rank, world }));
    let receipts: Vec<Receipt> = receipts.collect::<Result<_, _>>()?;
    let context = Context {
        step,
        attempt,
        coord_epoch: epoch_of(dir, attempt, &entries)?,
        world_size: world,
        created,
        parent: parent_of(step, attempt, &entries),
        facts: run.facts_at(step),
        spec: run.spec.clone(),
    };
    assemble(dir, &receipts, &context)
        .map_err(|source| RebuildError::Commit { step, source: Box::new(source) })
}

/// Puts a manifest that was made again in the place of the lost one; a damaged one is kept beside.
///
/// While there is a copy of a damaged one and no manifest, nobody removes the parts.
pub fn restore(dir: &RunDir, manifest: &Manifest) -> Result<Published, RebuildError> {
    let (step, path) = (manifest.step(), dir.manifest(manifest.step()));
    if !aside::make_room(dir, step)? {
        return Err(RebuildError::Sound { step });
    }
    let via = dir.attempt(step, manifest.attempt).join("manifest.json");
    let published = dir.storage().create_small(&via, &path, &manifest.render())?;
    match read::first_missing(dir, manifest)? {
        None => Ok(published),
        Some((idx, problem)) => {
            let file = manifest.files[idx as usize].name.clone();
            Err(RebuildError::Part { step, file, problem })
        }
    }
}

/// Finds the newest attempt that has all its parts.
fn find_attempt(dir: &RunDir, step: Step) -> Result<(Attempt, u32), RebuildError> {
    let names = dir.storage().names(&dir.step(step))?;
    let mut attempts: Vec<Attempt> =
        names.iter().filter_map(|name| RunDir::parse_attempt(name)).collect();
    attempts.sort();
    let mut problems: Vec<String> = Vec::new();
    for attempt in attempts.into_iter().rev() {
        let names = dir.storage().names(&dir.attempt(step, attempt))?;
        let parts: Vec<PartId> = names.iter().filter_map(|name| PartId::parse(name)).collect();
        match parts.first().map(|part| part.world) {
            Some(world) if parts.len() == world as usize && parts[0].rank == 0 => {
                return Ok((attempt, world));
            }
            Some(world) => problems.push(format!("{attempt} has {} of {world}", parts.len())),
            None => problems.push(format!("{attempt} has none")),
        }
    }
    let problem = match problems.as_slice() {
        [] => "there is no attempt at it".to_string(),
        problems => format!("no attempt has all its parts: {}", problems.join(", ")),
    };
    Err(RebuildError::Incomplete { step, problem })
}

/// Returns the coordinator's start under which an attempt was saved, as its neighbours tell:
/// generations only grow, on every branch.
fn epoch_of(dir: &RunDir, attempt: Attempt, entries: &[Entry]) -> Result<CoordEpoch, FsError> {
    let good = || entries.iter().filter_map(Entry::good);
    let is_older = |m: &&Manifest| m.attempt.generation <= attempt.generation;
    let before = good().filter(is_older).map(|m| m.order().0).max();
    let after = good().filter(|m| !is_older(m)).map(|m| m.order().0).min();
    match before.or(after) {
        Some(epoch) => Ok(epoch),
        None => Ok(highest_claim(dir)?.unwrap_or_default()),
    }
}

fn parent_of(step: Step, attempt: Attempt, entries: &[Entry]) -> Option<Parent> {
    let is_older = |m: &&Manifest| m.attempt.generation <= attempt.generation && m.step() < step;
    let parent = entries.iter().filter_map(Entry::good).filter(is_older);
    let parent = parent.max_by_key(|m| m.order())?;
    Some(Parent { step: parent.step, manifest: parent.seal.clone() })
}

/// Reads a part whole and describes it as its writer did.
fn read_part(
    dir: &RunDir,
    step: Step,
    attempt: Attempt,
    part: PartId,
) -> Result<Receipt, RebuildError> {
    let name = part.file_name();
    let path = dir.attempt(step, attempt).join(&name);
    let wrong = |problem: String| RebuildError::Part { step, file: name.clone(), problem };
    let receipt = old_receipt(dir, step, attempt, part)?;
    let file = dir.storage().open(&path)?;
    let bytes = dir.storage().size(&path)?;
    let head = Head::read(file.as_ref(), bytes).map_err(&wrong)?;
    let about = &head.about;
    let same = about.schema == PART_SCHEMA
        && about.run == dir.run().as_str()
        && (about.step, about.attempt) == (step.0, attempt)
        && (about.rank, about.world_size) == (part.rank, part.world)
        && about.partition == PARTITION;
    if !same {
        return Err(wrong("is a part of something else".to_string()));
    }
    let info = PartInfo {
        run: dir.run().clone(),
        step,
        attempt,
        part,
        state_digest: about.state_digest.0,
        counters: about.counters.clone(),
        block_bytes: receipt.as_ref().map_or(BLOCK_BYTES, |receipt| receipt.file.block),
    };
    if !head.is_as_written(&info) {
        return Err(wrong("its header is not as it was written".to_string()));
    }
    let found = digest_part(file.as_ref(), &head, &info).map_err(&wrong)?;
    let is_whole = found.file.bytes == bytes && receipt.is_none_or(|receipt| receipt == found);
    if is_whole { Ok(found) } else { Err(wrong("is not as it was written".to_string())) }
}

/// Computes the digests of a part's blocks and slices.
fn digest_part(file: &dyn ReadAt, head: &Head, info: &PartInfo) -> Result<Receipt, String> {
    let mut blocks = Blocks::new(info.block_bytes);
    blocks.digest(&head.bytes);
    let mut finite = true;
    let mut slices: Vec<ReceiptSlice> = Vec::new();
    let mut buffer: Vec<u8> = Vec::new();
    for (tensor, place) in &head.about.slices {
        let dtype = *head.dtypes.get(tensor).ok_or_else(|| format!("`{tensor}` is lost"))?;
        let start = blocks.bytes();
        let elements = place.range[1].saturating_sub(place.range[0]);
        let end = start.saturating_add(elements.saturating_mul(dtype.bytes()));
        let mut sum = Crc64::default();
        let mut at = start;
        while at < end {
            buffer.resize((end - at).min(PIECE_BYTES) as usize, 0);
            file.read_exact_at(&mut buffer, at).map_err(|error| error.to_string())?;
            finite &= dtype != Dtype::F32 || is_finite_f32(&buffer);
            sum = sum.then(blocks.digest(&buffer));
            at += buffer.len() as u64;
        }
        slices.push(ReceiptSlice {
            tensor: tensor.clone(),
            dtype,
            shape: place.shape.clone(),
            range: place.range,
            at: [start, end],
            crc64: Hex64(sum.value),
        });
    }
    let entry = blocks.describe(info.part.file_name());
    Ok(seal_receipt(info, entry, slices, finite))
}

/// Reads the receipt of a part, if there is one that can be read.
fn old_receipt(
    dir: &RunDir,
    step: Step,
    attempt: Attempt,
    part: PartId,
) -> Result<Option<Receipt>, FsError> {
    let path = dir.attempt(step, attempt).join(part.receipt_name());
    match dir.storage().read_small(&path, RECEIPT_BYTES_MAX) {
        // A receipt that is damaged, or of blocks that nobody writes, says nothing of the part.
        Ok(text) => {
            let receipt = Receipt::parse(&text).ok();
            Ok(receipt.filter(|receipt| (1..=BLOCK_BYTES_MAX).contains(&receipt.file.block)))
        }
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The header of a part.
struct Head {
    /// Length and JSON as they are in the file.
    bytes: Vec<u8>,
    about: About,
    dtypes: BTreeMap<String, Dtype>,
    /// Size of the whole file.
    file_bytes: u64,
}

impl Head {
    /// Reads the header of a file of `bytes` bytes.
    fn read(file: &dyn ReadAt, bytes: u64) -> Result<Self, String> {
        let failed = |error: std::io::Error| error.to_string();
        let mut length = [0u8; 8];
        file.read_exact_at(&mut length, 0).map_err(failed)?;
        let total = u64::from_le_bytes(length).checked_add(8);
        let total = total.filter(|n| *n <= bytes.min(HEADER_BYTES_MAX));
        let total = total.ok_or_else(|| "has no header".to_string())?;
        let mut head: Vec<u8> = vec![0; total as usize];
        file.read_exact_at(&mut head, 0).map_err(failed)?;
        Head::parse(head, bytes)
    }

    /// Writes the header anew from what it says and compares.
    fn is_as_written(&self, info: &PartInfo) -> bool {
        let slice = |(tensor, place): (&String, &Place)| PartSlice {
            tensor: tensor.clone(),
            dtype: self.dtypes[tensor],
            shape: place.shape.clone(),
            range: place.range[0]..place.range[1].max(place.range[0]),
            origin: Origin::Leftover(0),
        };
        let slices: Vec<PartSlice> = self.about.slices.iter().map(slice).collect();
        let bytes = |slice: &PartSlice| {
            (slice.range.end - slice.range.start).checked_mul(slice.dtype.bytes())
        };
        let all = slices.iter().try_fold(0u64, |sum, slice| sum.checked_add(bytes(slice)?));
        all.is_some_and(|all| all <= self.file_bytes)
            && render_header(info, &slices.iter().collect::<Vec<&PartSlice>>()) == self.bytes
    }

    fn parse(bytes: Vec<u8>, file_bytes: u64) -> Result<Self, String> {
        let failed = |error: serde_json::Error| format!("header: {error}");
        let header = parse_strict(&bytes[8..]).map_err(failed)?;
        let about = header["__metadata__"][PART_METADATA].as_str();
        let about = about.ok_or("its header says nothing of a checkpoint")?;
        let about = parse_strict(about.as_bytes()).map_err(failed)?;
        let about: About = serde_json::from_value(about).map_err(failed)?;
        let mut dtypes: BTreeMap<String, Dtype> = BTreeMap::new();
        for tensor in about.slices.keys() {
            let dtype = header[tensor.as_str()]["dtype"].clone();
            dtypes.insert(tensor.clone(), serde_json::from_value(dtype).map_err(failed)?);
        }
        Ok(Head { bytes, about, dtypes, file_bytes })
    }
}

#[cfg(test)]
mod tests;
