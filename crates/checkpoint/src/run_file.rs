//! `run.json`: what a run is, written once before its first checkpoint.
//!
//! Loading needs none of it. It is what a manifest says beside its parts, kept apart from any
//! manifest, so that a lost one can be made again.

use lacuna_types::Step;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::json::{SealError, canonical, open_sealed, seal_of, to_value};
use crate::layout::RunDir;
use crate::manifest::RunFacts;
use crate::storage::{FsError, Published};

/// Schema of the document.
const SCHEMA: &str = "lacuna-run/1";

/// Longest accepted document: it holds one specification.
const BYTES_MAX: u64 = 16 << 20;

/// What a run is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunFile {
    /// Format of this document.
    pub schema: String,
    /// The run.
    pub run: String,
    /// When it began, RFC 3339; for people.
    pub created: String,
    /// The effective run specification, TOML.
    pub spec: String,
    /// What its arithmetic is, at step 0.
    pub facts: RunFacts,
    /// Samples of a step.
    pub batch: u64,
    /// Steps of an epoch.
    pub steps_per_epoch: u64,
    /// Digest of this document without this field.
    #[serde(rename = "self")]
    pub seal: String,
}

/// A document that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunFileError {
    /// The storage refused.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// It is damaged or of another format.
    #[error("run.json")]
    Seal(#[from] SealError),
}

impl RunFile {
    /// Describes a run.
    pub fn new(
        dir: &RunDir,
        created: String,
        spec: String,
        facts: RunFacts,
        batch: u64,
        steps_per_epoch: u64,
    ) -> Self {
        let (schema, run) = (SCHEMA.to_string(), dir.run().to_string());
        let seal = String::new();
        let mut out = RunFile { schema, run, created, spec, facts, batch, steps_per_epoch, seal };
        out.seal = seal_of(&to_value(&out));
        out
    }

    /// Writes the document where there is none yet.
    pub fn write(&self, dir: &RunDir) -> Result<Published, FsError> {
        dir.storage().prepare(dir.root(), &dir.path())?;
        let path = dir.run_file();
        dir.storage().create_small(&path, &path, &render(&to_value(self)))
    }

    /// Reads the document; `None` where a run of an earlier version has none.
    pub fn read(dir: &RunDir) -> Result<Option<Self>, RunFileError> {
        match dir.storage().read_small(&dir.run_file(), BYTES_MAX) {
            Ok(text) => Ok(Some(open_sealed(&text, SCHEMA, render)?)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the facts of a checkpoint at `step`, whose losses are not known.
    pub fn facts_at(&self, step: Step) -> RunFacts {
        RunFacts {
            epoch: step.0 / self.steps_per_epoch.max(1),
            samples: step.0 * self.batch,
            ..self.facts.clone()
        }
    }
}

fn render(value: &Value) -> String {
    canonical(value) + "\n"
}
