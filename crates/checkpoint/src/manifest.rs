//! The manifest: what a committed checkpoint consists of, and the checks that make it trustworthy.
//!
//! Its text is readable, has sorted keys and one line per slice, and exists in one form only: a
//! document that parses but is written differently is refused, like one with a wrong digest.

use std::collections::BTreeMap;

use lacuna_recipe::state::Counters;
use lacuna_types::{CoordEpoch, Step};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::json::{
    Hex64, SealError, canonical, open_sealed, parse_strict, quoted, seal_of, sorted, to_value,
};
use crate::layout::Attempt;
use crate::state::Dtype;

mod check;

pub(crate) use check::BLOCK_BYTES_MAX;
pub use check::InvalidManifest;

/// Schema of manifests.
pub const SCHEMA: &str = "lacuna-ckpt/1";

/// Longest accepted manifest: a terabyte of state needs 3 MB.
pub const MANIFEST_BYTES_MAX: u64 = 256 << 20;

/// A committed checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Format of this document, [`SCHEMA`].
    pub schema: String,
    /// The run.
    pub run: String,
    /// Steps behind the state.
    pub step: u64,
    /// Start of the coordinator that committed; later starts win.
    pub coord_epoch: u64,
    /// The try that succeeded.
    pub attempt: Attempt,
    /// Generation of the group that saved.
    pub generation: u64,
    /// The checkpoint that this state grew from, if any.
    pub parent: Option<Parent>,
    /// Number of parts.
    pub world_size: u32,
    /// Rule by which the state was cut.
    pub partition: String,
    /// Time of the commit, RFC 3339; for people.
    pub created: String,
    /// Digest of the state, the same at every world size.
    pub state_digest: Hex64,
    /// Everything that is not a tensor.
    pub state: State,
    /// The effective run specification, TOML.
    pub spec: String,
    /// The part files, by rank.
    pub files: Vec<FileEntry>,
    /// The logical tensors by name.
    pub tensors: BTreeMap<String, TensorEntry>,
    /// Digest of this document without this field.
    #[serde(rename = "self")]
    pub seal: String,
}

/// Lineage of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// Steps behind the parent.
    pub step: u64,
    /// The parent's `self`.
    pub manifest: String,
}

/// The part of a state that is not tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Step, updates, exponents, segments.
    pub counters: Counters,
    /// Whether every float of the state is finite.
    pub finite: bool,
    /// What the run computes with and on.
    pub facts: RunFacts,
}

/// What identifies a run's arithmetic, stored with every checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunFacts {
    /// Digest of the maths fields of the specification.
    pub spec_digest: String,
    /// Fingerprint of the data set.
    pub data_fingerprint: String,
    /// Seed of the run.
    pub seed: u64,
    /// Scheme of the draws that the seed keys.
    pub rng: String,
    /// Build that saved.
    pub build: String,
    /// Class of machines whose bits agree.
    pub probe_class: String,
    /// Epoch of the next step.
    pub epoch: u64,
    /// Samples consumed.
    pub samples: u64,
    /// Losses around the step.
    pub loss: Loss,
}

/// Losses at a checkpoint; absent where unknown or not finite.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Loss {
    /// Loss of the last step.
    pub last: Option<f64>,
    /// Mean of the last 100 steps.
    pub mean100: Option<f64>,
}

impl Loss {
    /// Keeps what is finite: JSON has no other numbers.
    pub fn new(last: f64, mean100: f64) -> Self {
        let keep = |x: f64| x.is_finite().then_some(x);
        Loss { last: keep(last), mean100: keep(mean100) }
    }
}

/// A part file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Name inside the attempt's directory.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// Digest of the file.
    pub crc64: Hex64,
    /// Bytes of a digest block; the last one may be shorter.
    pub block: u64,
    /// Digest of each block.
    pub blocks: Vec<Hex64>,
}

impl FileEntry {
    /// Returns the bytes that block `idx` covers.
    pub fn block_range(&self, idx: u64) -> std::ops::Range<u64> {
        let start = idx * self.block;
        start..(start + self.block).min(self.bytes)
    }
}

/// A logical tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<u64>,
    /// Digest of the whole tensor, the same at every world size.
    pub crc64: Hex64,
    /// Its pieces by range.
    pub slices: Vec<SliceEntry>,
}

/// A piece of a tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SliceEntry {
    /// First element, and the one after the last.
    pub range: [u64; 2],
    /// Index in `files`.
    pub file: u32,
    /// First byte in the file, and the one after the last.
    pub at: [u64; 2],
    /// Digest of the bytes.
    pub crc64: Hex64,
}

/// A manifest that cannot be accepted.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The document is damaged, edited or of another format.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The document is as written, and what it says cannot be.
    #[error("contradicts itself")]
    Invalid(#[source] InvalidManifest),
}

impl Manifest {
    /// Returns the step.
    pub fn step(&self) -> Step {
        Step(self.step)
    }

    /// Returns the order of checkpoints: a later coordinator start wins over a later step.
    pub fn order(&self) -> (CoordEpoch, Step) {
        (CoordEpoch(self.coord_epoch), self.step())
    }

    /// Computes the seal of the content and stores it.
    pub(crate) fn seal(&mut self) {
        self.seal = seal_of(&to_value(self));
    }

    /// Returns the text of the manifest.
    pub fn render(&self) -> String {
        render(&to_value(self))
    }

    /// Parses a manifest and checks its digest, its form and that its tensors are covered exactly.
    pub fn parse(text: &[u8]) -> Result<Self, ManifestError> {
        let manifest: Manifest = open_sealed(text, SCHEMA, render)?;
        manifest.check().map_err(ManifestError::Invalid)?;
        Ok(manifest)
    }

    /// Checks what a manifest claims against itself.
    pub fn check(&self) -> Result<(), InvalidManifest> {
        check::check(self)
    }
}

/// Reads the seal of a document that may be one of ours, without trusting anything else in it.
pub(crate) fn peek_seal(text: &[u8]) -> Option<String> {
    let value = parse_strict(text).ok()?;
    Some(value.get("self")?.as_str()?.to_string())
}

/// Writes a manifest: one line per key, per file and per slice.
fn render(value: &Value) -> String {
    let Value::Object(map) = value else { return canonical(value) };
    let line = |(key, value): (&String, &Value)| match (key.as_str(), value) {
        ("files", Value::Array(files)) => {
            let lines: Vec<String> =
                files.iter().map(|file| format!("  {}", canonical(file))).collect();
            format!(" \"files\":[\n{}\n ]", lines.join(",\n"))
        }
        ("tensors", Value::Object(tensors)) => {
            let lines: Vec<String> = sorted(tensors).into_iter().map(render_tensor).collect();
            format!(" \"tensors\":{{\n{}\n }}", lines.join(",\n"))
        }
        _ => format!(" {}:{}", quoted(key), canonical(value)),
    };
    let lines: Vec<String> = sorted(map).into_iter().map(line).collect();
    format!("{{\n{}\n}}\n", lines.join(",\n"))
}

fn render_tensor((name, tensor): (&String, &Value)) -> String {
    let Value::Object(map) = tensor else {
        return format!("  {}:{}", quoted(name), canonical(tensor));
    };
    let field = |(key, value): (&String, &Value)| match (key.as_str(), value) {
        ("slices", Value::Array(slices)) => {
            let lines: Vec<String> =
                slices.iter().map(|slice| format!("\n   {}", canonical(slice))).collect();
            format!("\"slices\":[{}]", lines.join(","))
        }
        _ => format!("{}:{}", quoted(key), canonical(value)),
    };
    let fields: Vec<String> = sorted(map).into_iter().map(field).collect();
    format!("  {}:{{{}}}", quoted(name), fields.join(","))
}

#[cfg(test)]
mod tests;
