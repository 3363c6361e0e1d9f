//! Where the files of a run's checkpoints lie, and back from a name to what it names.
//!
//! The only module that knows paths. They are the same on a disk and in an object store.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use lacuna_types::{AttemptSeq, CoordEpoch, Generation, RunId, Step};
use serde::{Deserialize, Serialize};

use crate::storage::{Disk, FsError, Objects, Storage};

/// Suffix of a file that is being written.
pub const PARTIAL: &str = ".partial";

/// One try at saving a checkpoint: `generation.sequence`, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Attempt {
    /// Generation of the group that saves.
    pub generation: Generation,
    /// Number of the try inside the generation.
    pub sequence: AttemptSeq,
}

impl Attempt {
    /// Makes the attempt `sequence` of `generation`.
    pub fn new(generation: Generation, sequence: AttemptSeq) -> Self {
        Attempt { generation, sequence }
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08}.{:04}", self.generation.0, self.sequence.0)
    }
}

/// A name that is not one of this layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not {what}", text.escape_debug())]
pub struct NameError {
    text: String,
    what: &'static str,
}

impl FromStr for Attempt {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let parsed = text.split_once('.').and_then(|(generation, sequence)| {
            let generation = Generation(padded(generation, 8)?);
            Some(Attempt::new(generation, AttemptSeq(padded(sequence, 4)?)))
        });
        let what = "an attempt (00000007.0001)";
        parsed.ok_or_else(|| NameError { text: text.to_string(), what })
    }
}

impl TryFrom<String> for Attempt {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Attempt> for String {
    fn from(attempt: Attempt) -> String {
        attempt.to_string()
    }
}

/// A part's place: `rank` of `world`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PartId {
    /// Writer, `0..world`.
    pub rank: u32,
    /// Writers of the checkpoint.
    pub world: u32,
}

impl PartId {
    /// Returns the name of the part's file.
    pub fn file_name(self) -> String {
        format!("part-{:05}-of-{:05}.safetensors", self.rank, self.world)
    }

    /// Returns the name of the part's receipt.
    pub fn receipt_name(self) -> String {
        format!("receipt-{:05}-of-{:05}.json", self.rank, self.world)
    }

    /// Parses the name of a part's file.
    pub fn parse(name: &str) -> Option<Self> {
        let numbers = name.strip_prefix("part-")?.strip_suffix(".safetensors")?;
        let (rank, world) = numbers.split_once("-of-")?;
        let rank = u32::try_from(padded(rank, 5)?).ok()?;
        let world = u32::try_from(padded(world, 5)?).ok()?;
        (rank < world).then_some(PartId { rank, world })
    }
}

/// The directory of one run's checkpoints, on a disk or in an object store.
#[derive(Clone, Debug)]
pub struct RunDir {
    storage: Arc<dyn Storage>,
    root: PathBuf,
    run: RunId,
}

impl RunDir {
    /// Names the directory of `run` under `root` on this machine; nothing is created.
    pub fn new(root: impl Into<PathBuf>, run: RunId) -> Self {
        RunDir::on(Arc::new(Disk::new()), root, run)
    }

    /// Names the directory of `run` under `root` of `storage`; nothing is created.
    pub fn on(storage: Arc<dyn Storage>, root: impl Into<PathBuf>, run: RunId) -> Self {
        RunDir { storage, root: root.into(), run }
    }

    /// Names the directory of `run` under `to`, a folder or the URL of an object store, as
    /// `checkpoint.to` says; nothing is created, and nothing is asked of a store.
    pub fn open(to: &str, run: RunId) -> Result<Self, FsError> {
        RunDir::open_shared(to, run, 1)
    }

    /// The same for one of `n_readers` processes of this machine that load the same checkpoints.
    pub fn open_shared(to: &str, run: RunId, n_readers: usize) -> Result<Self, FsError> {
        if !lacuna_store::is_url(to) {
            return Ok(RunDir::on(Arc::new(Disk::shared_by(n_readers)), to, run));
        }
        let storage = Objects::open(to)?;
        let root = storage.root();
        Ok(RunDir::on(Arc::new(storage), root, run))
    }

    /// Finds the run whose folder or URL `place` is; `None` for what is something else.
    ///
    /// # Errors
    /// A place that is not there, or a URL that names no run.
    pub fn find(place: &str) -> Result<Option<Self>, FsError> {
        if let Some(dir) = RunDir::open_url(place) {
            return dir.map(Some);
        }
        let path = Path::new(place);
        let full =
            std::fs::canonicalize(path).map_err(|source| FsError::new("open", path, source))?;
        let name = full.file_name().and_then(|name| name.to_str()?.parse().ok());
        let (Some(name), Some(root)) = (name, full.parent()) else { return Ok(None) };
        let dir = RunDir::new(root, name);
        Ok((dir.checkpoints().is_dir() || dir.run_file().is_file()).then_some(dir))
    }

    /// Names the directory of a run by its own URL, `<root>/<run>`; `None` for what is no URL.
    pub fn open_url(url: &str) -> Option<Result<Self, FsError>> {
        if !lacuna_store::is_url(url) {
            return None;
        }
        let failed = |why: String| FsError::new("open", Path::new(url), io::Error::other(why));
        let (root, name) = url.trim_end_matches('/').rsplit_once('/').unwrap_or((url, ""));
        if !lacuna_store::is_url(root) {
            return Some(Err(failed("it names no run behind the store".to_string())));
        }
        Some(match name.parse::<RunId>() {
            Ok(run) => RunDir::open(root, run),
            Err(error) => Err(failed(format!("its last part is not a name of a run: {error}"))),
        })
    }

    /// Returns what holds the files.
    pub fn storage(&self) -> &dyn Storage {
        self.storage.as_ref()
    }

    /// Returns the directory that holds all runs.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the run.
    pub fn run(&self) -> &RunId {
        &self.run
    }

    /// Returns `<root>/<run>`.
    pub fn path(&self) -> PathBuf {
        self.root.join(self.run.as_str())
    }

    /// Returns the description of the run.
    pub fn run_file(&self) -> PathBuf {
        self.path().join("run.json")
    }

    /// Returns the directory of fencing claims.
    pub fn claims(&self) -> PathBuf {
        self.path().join("claims")
    }

    /// Returns the claim of one coordinator epoch.
    pub fn claim(&self, epoch: CoordEpoch) -> PathBuf {
        self.claims().join(format!("{:08}.json", epoch.0))
    }

    /// Parses the name of a claim.
    pub fn parse_claim(name: &str) -> Option<CoordEpoch> {
        padded(name.strip_suffix(".json")?, 8).map(CoordEpoch)
    }

    /// Returns the directory of the run's checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.path().join("ckpt")
    }

    /// Returns the directory of the checkpoint at `step`.
    pub fn step(&self, step: Step) -> PathBuf {
        self.checkpoints().join(format!("step-{:09}", step.0))
    }

    /// Parses the name of a step's directory.
    pub fn parse_step(name: &str) -> Option<Step> {
        padded(name.strip_prefix("step-")?, 9).map(Step)
    }

    /// Returns the directory of one attempt.
    pub fn attempt(&self, step: Step, attempt: Attempt) -> PathBuf {
        self.step(step).join(format!("attempt-{attempt}"))
    }

    /// Parses the name of an attempt's directory.
    pub fn parse_attempt(name: &str) -> Option<Attempt> {
        name.strip_prefix("attempt-")?.parse().ok()
    }

    /// Returns the manifest of the checkpoint at `step`: its existence is the commit.
    pub fn manifest(&self, step: Step) -> PathBuf {
        self.step(step).join("manifest.json")
    }

    /// Returns the manifest of a checkpoint whose deletion has begun.
    pub fn deleted_manifest(&self, step: Step) -> PathBuf {
        self.step(step).join("manifest.deleted.json")
    }

    /// Returns the copy of a damaged manifest that gave way to another one.
    pub fn damaged_manifest(&self, step: Step) -> PathBuf {
        self.step(step).join("manifest.damaged.json")
    }

    /// Returns the mark of a checkpoint that was read back whole.
    pub fn verified(&self, step: Step) -> PathBuf {
        self.step(step).join("verified.json")
    }

    /// Returns the mark of a checkpoint that was found to be damaged.
    pub fn damage(&self, step: Step) -> PathBuf {
        self.step(step).join("damaged.json")
    }

    /// Returns the hint at the newest checkpoint; nothing relies on it.
    pub fn latest(&self) -> PathBuf {
        self.path().join("latest.json")
    }

    /// Returns the directory of pins.
    pub fn holds(&self) -> PathBuf {
        self.path().join("holds")
    }

    /// Returns the pin of a name.
    pub fn hold(&self, name: &str) -> PathBuf {
        self.holds().join(format!("{name}.json"))
    }
}

/// Parses a decimal number as `{:0width$}` prints it, and no other spelling of it.
fn padded(text: &str, width: usize) -> Option<u64> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    let shape = text.len() == width || (text.len() > width && !text.starts_with('0'));
    if digits && shape { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests;
