//! Writing one rank's part: file, digests, receipt. Names are new or the write fails.

use lacuna_recipe::digest::Crc64;
use lacuna_recipe::state::Counters;
use lacuna_types::{RunId, Step};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::header::{self, HeaderTensor};
use crate::json::{Hex64, SealError, canonical, open_sealed, seal_of, to_value};
use crate::layout::{Attempt, PartId, RunDir};
use crate::manifest::FileEntry;
use crate::pace::Pace;
use crate::partition::PARTITION;
use crate::state::{Dtype, NamedSlice, PartSlice};
use crate::storage::{FsError, Published, Sink, Source};
pub(crate) use content::Blocks;
use content::{Content, Digested};

/// Bytes of a digest block: a ranged read reads at most two too many, and ViT-H has 939 of them.
pub const BLOCK_BYTES: u64 = 8 << 20;

/// Name of the one metadata entry of a part.
pub const PART_METADATA: &str = "lacuna.part";

/// Schema of what a part says of itself.
pub(crate) const PART_SCHEMA: &str = "lacuna-part/1";

/// Schema of receipts.
const RECEIPT_SCHEMA: &str = "lacuna-receipt/1";

/// What a part belongs to.
#[derive(Clone, Debug, PartialEq)]
pub struct PartInfo {
    /// The run.
    pub run: RunId,
    /// Steps behind the state.
    pub step: Step,
    /// The try at saving it.
    pub attempt: Attempt,
    /// Which part.
    pub part: PartId,
    /// Digest of the writer's **whole** state, not of its part.
    pub state_digest: u64,
    /// The counters of that state.
    pub counters: Counters,
    /// Bytes of a digest block: [`BLOCK_BYTES`] but in tests.
    pub block_bytes: u64,
}

/// One slice of a part, as written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptSlice {
    /// Name of the logical tensor.
    pub tensor: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape of the whole tensor.
    pub shape: Vec<u64>,
    /// First element, and the one after the last.
    pub range: [u64; 2],
    /// First byte in the file, and the one after the last.
    pub at: [u64; 2],
    /// Digest of the bytes.
    pub crc64: Hex64,
}

/// What a writer reports of its part; all receipts together make a manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// Format of this document.
    pub schema: String,
    /// The run.
    pub run: String,
    /// Steps behind the state.
    pub step: u64,
    /// The try at saving it.
    pub attempt: Attempt,
    /// The writer.
    pub rank: u32,
    /// Writers of the checkpoint.
    pub world_size: u32,
    /// Rule by which the state was cut.
    pub partition: String,
    /// Digest of the writer's whole state.
    pub state_digest: Hex64,
    /// The counters of that state.
    pub counters: Counters,
    /// Whether every float of the part is finite.
    pub finite: bool,
    /// The file.
    pub file: FileEntry,
    /// The slices, in file order.
    pub slices: Vec<ReceiptSlice>,
    /// Digest of this document without this field.
    #[serde(rename = "self")]
    pub seal: String,
}

impl Receipt {
    /// Returns the text of the receipt.
    pub fn render(&self) -> String {
        render_receipt(&to_value(self))
    }

    /// Parses and checks a receipt.
    pub fn parse(text: &[u8]) -> Result<Self, SealError> {
        open_sealed(text, RECEIPT_SCHEMA, render_receipt)
    }
}

fn render_receipt(value: &Value) -> String {
    canonical(value) + "\n"
}

/// A part that was not written. Nothing of it stays visible.
#[derive(Debug, thiserror::Error)]
pub enum WritePartError {
    /// The file system refused.
    #[error("part {} of {} of checkpoint step {step} was not written", part.rank, part.world)]
    Fs {
        /// Which checkpoint.
        step: Step,
        /// Which part.
        part: PartId,
        /// The call that failed.
        #[source]
        source: FsError,
    },
    /// The attempt already has this part: somebody writes under our name.
    #[error("part {} of {} of step {step} attempt {attempt} exists already", part.rank, part.world)]
    Exists {
        /// Which checkpoint.
        step: Step,
        /// Which part.
        part: PartId,
        /// Which try.
        attempt: Attempt,
    },
}

/// Writes a part and its receipt durably; `slices` are sorted by name.
///
/// Equal state and equal [`PartInfo`] give equal bytes.
pub fn write_part(
    dir: &RunDir,
    info: &PartInfo,
    slices: &[NamedSlice<'_>],
) -> Result<Receipt, WritePartError> {
    write_part_at(dir, info, slices, &Pace::free())
}

/// The same at a limited rate, until it is given up.
pub fn write_part_at(
    dir: &RunDir,
    info: &PartInfo,
    slices: &[NamedSlice<'_>],
    pace: &Pace,
) -> Result<Receipt, WritePartError> {
    let sorted = slices.windows(2).all(|pair| pair[0].spec.tensor < pair[1].spec.tensor);
    assert!(sorted, "slices are sorted by name and one per tensor");
    let (step, part, attempt) = (info.step, info.part, info.attempt);
    let failed = |source: FsError| WritePartError::Fs { step, part, source };
    let place = dir.attempt(step, attempt);
    dir.storage().prepare(dir.root(), &place).map_err(failed)?;
    let (file, receipt) = write_file(dir, info, slices, pace).map_err(failed)?;
    if file.publish().map_err(failed)? == Published::Exists {
        return Err(WritePartError::Exists { step, part, attempt });
    }
    let path = place.join(part.receipt_name());
    // From here on the part's name lasts too.
    match dir.storage().create_small(&path, &path, &receipt.render()).map_err(failed)? {
        Published::Created => Ok(receipt),
        Published::Exists => Err(WritePartError::Exists { step, part, attempt }),
    }
}

/// Writes the bytes of the part under a temporary name and describes them.
fn write_file(
    dir: &RunDir,
    info: &PartInfo,
    slices: &[NamedSlice<'_>],
    pace: &Pace,
) -> Result<(Box<dyn Sink>, Receipt), FsError> {
    let name = info.part.file_name();
    let specs: Vec<&PartSlice> = slices.iter().map(|slice| &slice.spec).collect();
    let head = render_header(info, &specs);
    let path = dir.attempt(info.step, info.attempt).join(&name);
    let content = Content::new(&head, slices, info.block_bytes, pace);
    let mut file = dir.storage().begin(&path, content.bytes())?;
    file.fill(&content)?;
    let Digested { blocks, slices: digests, finite } = content.digested();
    let entry = |(spec, (start, crc)): (PartSlice, (u64, Crc64))| ReceiptSlice {
        tensor: spec.tensor,
        dtype: spec.dtype,
        shape: spec.shape,
        range: [spec.range.start, spec.range.end],
        at: [start, start + crc.bytes],
        crc64: Hex64(crc.value),
    };
    let entries = slices.iter().map(|slice| slice.spec.clone()).zip(digests).map(entry).collect();
    let receipt = seal_receipt(info, blocks.describe(name), entries, finite);
    Ok((file, receipt))
}

/// Completes the description of a part.
pub(crate) fn seal_receipt(
    info: &PartInfo,
    file: FileEntry,
    slices: Vec<ReceiptSlice>,
    finite: bool,
) -> Receipt {
    let mut receipt = Receipt {
        schema: RECEIPT_SCHEMA.to_string(),
        run: info.run.to_string(),
        step: info.step.0,
        attempt: info.attempt,
        rank: info.part.rank,
        world_size: info.part.world,
        partition: PARTITION.to_string(),
        state_digest: Hex64(info.state_digest),
        counters: info.counters.clone(),
        finite,
        file,
        slices,
        seal: String::new(),
    };
    receipt.seal = seal_of(&to_value(&receipt));
    receipt
}

/// Renders the safetensors header; its one metadata entry says all that a lost manifest said.
pub(crate) fn render_header(info: &PartInfo, slices: &[&PartSlice]) -> Vec<u8> {
    let mut places: Map<String, Value> = Map::new();
    for spec in slices {
        let place = serde_json::json!({
            "range": [spec.range.start, spec.range.end],
            "shape": spec.shape,
        });
        places.insert(spec.tensor.clone(), place);
    }
    let about = serde_json::json!({
        "schema": PART_SCHEMA,
        "run": info.run.as_str(),
        "step": info.step.0,
        "attempt": info.attempt.to_string(),
        "rank": info.part.rank,
        "world_size": info.part.world,
        "partition": PARTITION,
        "state_digest": Hex64(info.state_digest).to_string(),
        "counters": to_value(&info.counters),
        "slices": places,
    });
    let tensor = |spec: &&PartSlice| HeaderTensor {
        name: spec.tensor.clone(),
        dtype: spec.dtype.name(),
        shape: vec![spec.range.end - spec.range.start],
        bytes: spec.bytes(),
    };
    let tensors: Vec<HeaderTensor> = slices.iter().map(tensor).collect();
    header::render(&[(PART_METADATA, &canonical(&about))], &tensors)
}

/// Tells whether all of the little-endian floats are finite.
pub(crate) fn is_finite_f32(bytes: &[u8]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    let odd = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) & EXPONENT == EXPONENT;
    // Whole runs, without a branch for each: several at once, as wide as the machine is.
    let all_of = |run: &[u8]| !run.chunks_exact(4).fold(false, |any, b| any | odd(b));
    bytes.chunks(4096).all(all_of)
}

mod content;
#[cfg(test)]
mod tests;
