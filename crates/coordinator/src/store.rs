//! What a coordinator remembers across its own restarts.
//!
//! One SQLite file in WAL mode with full sync: a call that returned is durable. A run's journal is
//! its truth: what its machine needs after a restart is what the journal's records add up to.
//! Figures of steps and events are kept too, so that a watcher that reconnects misses nothing.

mod bans;
mod etcd;
mod pictures;
mod sqlite;
mod text;

use std::time::{SystemTime, UNIX_EPOCH};

pub use bans::Ban;
pub use etcd::EtcdStore;
pub use pictures::PicturePlace;
pub use sqlite::SqliteStore;

use lacuna_control::journal::{Record, Saved};
use lacuna_track::Figures;
use lacuna_types::{CoordEpoch, RunId};
use serde::{Deserialize, Serialize};

/// A store that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened.
    #[error("failed to open state file `{path}`")]
    Open {
        /// The file.
        path: String,
        /// What SQLite said.
        #[source]
        source: rusqlite::Error,
    },
    /// A query failed.
    #[error("failed to {action} in the state file")]
    Query {
        /// What was tried.
        action: &'static str,
        /// What SQLite said.
        #[source]
        source: rusqlite::Error,
    },
    /// etcd, where several coordinators share their state.
    #[error(transparent)]
    Etcd(#[from] crate::etcd::EtcdError),
    /// A stored value means nothing; the file was changed by something else.
    #[error("the state file holds {what} that cannot be read: {detail}")]
    Content {
        /// What it is.
        what: &'static str,
        /// Why it cannot be read.
        detail: String,
    },
}

/// A run as it is remembered.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredRun {
    /// Its name.
    pub run_id: RunId,
    /// Its validated spec, JSON.
    pub spec: String,
    /// Samples of its data when it was created.
    pub n_samples: u64,
    /// Fingerprint of its data when it was created.
    pub fingerprint: String,
    /// What its machine needs: what its journal adds up to.
    pub saved: Saved,
}

/// One line of a run's journal.
#[derive(Clone, Debug, PartialEq)]
pub struct JournalLine {
    /// Number in the run's journal, from 1.
    pub seq: u64,
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The coordinator's start that wrote it.
    pub epoch: CoordEpoch,
    /// The fact.
    pub record: Record,
}

/// Something that happened in a run, as watchers see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Update {
    /// An event with a reason.
    Event {
        /// Short machine-readable word.
        kind: String,
        /// Whether a person should look.
        warning: bool,
        /// One sentence.
        text: String,
        /// Milliseconds since the Unix epoch.
        at_ms: u64,
    },
    /// Figures of a step.
    Figures {
        /// The figures.
        #[serde(flatten)]
        figures: Figures,
        /// Milliseconds since the Unix epoch; 0 where an older build wrote it.
        #[serde(default)]
        at_ms: u64,
    },
    /// A picture is there.
    Picture {
        /// Which one.
        #[serde(flatten)]
        place: PicturePlace,
        /// Milliseconds since the Unix epoch.
        at_ms: u64,
    },
}

/// Something to write of a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Entry {
    /// A line of its journal.
    Fact(Record),
    /// Something for people.
    Update(Update),
    /// A picture for people, and its [`Update::Picture`].
    Picture(Update, Vec<u8>),
}

/// Entries of one run, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// The run.
    pub run: RunId,
    /// The entries.
    pub entries: Vec<Entry>,
}

/// What has to be done before batches are written.
pub struct Part {
    /// How many batches, at least one: they are to be written together.
    pub n: usize,
    /// What keeps them elsewhere. Where it fails they are not written.
    pub elsewhere: Option<Elsewhere>,
    /// What [`Store::finish`] needs to know of them.
    pub ticket: Option<Ticket>,
}

/// Batches as they are kept elsewhere.
#[derive(Debug)]
pub struct Ticket {
    at_ms: u64,
    batches: Vec<Batch>,
}

/// Keeps something elsewhere, and waits until it is kept.
pub type Elsewhere = Box<dyn FnOnce() -> Result<(), StoreError> + Send>;

/// Durable memory of a coordinator. A call that returned `Ok` survives a crash of process and
/// machine; where updates alone were written, a crash of the machine may undo the last ones.
pub trait Store: Send {
    /// Counts a coordinator start and returns its number, 1 for the first.
    fn next_epoch(&mut self) -> Result<CoordEpoch, StoreError>;

    /// Returns all runs, oldest first.
    fn runs(&self) -> Result<Vec<StoredRun>, StoreError>;

    /// Creates a run, or replaces the spec of the one with its name.
    fn put_run(&mut self, run: &StoredRun) -> Result<(), StoreError>;

    /// Appends entries of any number of runs, all or none. Returns for each batch the sequence
    /// numbers of its updates, 1 for a run's first.
    fn write(&mut self, batches: &[Batch]) -> Result<Vec<Vec<u64>>, StoreError>;

    /// Prepares [`write`](Store::write) for the first of some batches: what may take long is done
    /// by what comes back, without holding anybody up who reads.
    fn prepare(&mut self, batches: &[Batch]) -> Result<Part, StoreError> {
        Ok(Part { n: batches.len(), elsewhere: None, ticket: None })
    }

    /// Writes batches that were prepared together, with the ticket that they got.
    fn finish(
        &mut self,
        batches: &[Batch],
        _ticket: Option<Ticket>,
    ) -> Result<Vec<Vec<u64>>, StoreError> {
        self.write(batches)
    }

    /// Appends facts to a run's journal, all or none.
    fn record(&mut self, run: &RunId, records: &[Record]) -> Result<(), StoreError> {
        let entries = records.iter().cloned().map(Entry::Fact).collect();
        self.write(&[Batch { run: run.clone(), entries }]).map(|_| ())
    }

    /// Returns a run's journal.
    fn journal(&self, run: &RunId) -> Result<Vec<JournalLine>, StoreError>;

    /// Returns up to `limit` updates of a run after sequence number `after`, in order.
    fn updates(
        &self,
        run: &RunId,
        after: u64,
        limit: u64,
    ) -> Result<Vec<(u64, Update)>, StoreError>;

    /// Returns the sequence number of a run's newest update, 0 before the first.
    fn last_seq(&self, run: &RunId) -> Result<u64, StoreError>;

    /// Returns the newest figures of a run.
    fn newest_figures(&self, run: &RunId) -> Result<Option<Figures>, StoreError>;

    /// Keeps a machine out, in the place of what was said of it before.
    fn put_ban(&mut self, ban: &Ban) -> Result<(), StoreError>;

    /// Returns the machines that were kept out, also those whose time is over.
    fn bans(&self) -> Result<Vec<Ban>, StoreError>;

    /// Tells whether a picture is there.
    fn has_picture(&self, run: &RunId, place: PicturePlace) -> Result<bool, StoreError>;
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

fn parse_update(body: &str) -> Result<Update, StoreError> {
    let failed =
        |err: serde_json::Error| StoreError::Content { what: "an update", detail: err.to_string() };
    serde_json::from_str(body).map_err(failed)
}

#[cfg(test)]
mod tests;
