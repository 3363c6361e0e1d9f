//! What a coordinator remembers across its own restarts.
//!
//! One SQLite file in WAL mode with full sync: a call that returned is durable. Figures of steps
//! and events are kept too, so that a watcher that reconnects misses nothing.

use std::path::Path;

use lacuna_control::coordinator::{Ending, Record, Saved};
use lacuna_control::plan::CheckpointRef;
use lacuna_types::{CoordEpoch, Generation, RunId, Step};
use rusqlite::{Connection, OptionalExtension as _, params};
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
    /// What its machine needs.
    pub saved: Saved,
    /// How it came to rest, if it did.
    pub ending: Option<Ending>,
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
        /// Generation that applied it.
        generation: u64,
        /// Steps behind the state after it.
        step: u64,
        /// Mean loss.
        loss: f64,
        /// Learning rate.
        lr: f64,
        /// Norm of the mean gradient.
        grad_norm: f64,
        /// Samples a second of the group.
        images_per_second: f64,
        /// Share of time spent waiting for data.
        data_wait: f64,
        /// Digest of the state, where it was computed.
        digest: Option<u64>,
        /// Steps skipped so far.
        skipped: u64,
        /// Steps computed again so far.
        redone: u64,
    },
}

/// Durable memory of a coordinator. A call that returned `Ok` survives a crash.
pub trait Store: Send {
    /// Counts a coordinator start and returns its number, 1 for the first.
    fn next_epoch(&mut self) -> Result<CoordEpoch, StoreError>;

    /// Returns all runs, oldest first.
    fn runs(&self) -> Result<Vec<StoredRun>, StoreError>;

    /// Creates a run, or replaces spec, saved facts and ending of the one with its name.
    fn put_run(&mut self, run: &StoredRun) -> Result<(), StoreError>;

    /// Remembers a fact of a run.
    fn record(&mut self, run: &RunId, record: &Record) -> Result<(), StoreError>;

    /// Appends what happened and returns its sequence number, 1 for a run's first.
    fn append(&mut self, run: &RunId, update: &Update) -> Result<u64, StoreError>;

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
    fn newest_figures(&self, run: &RunId) -> Result<Option<Update>, StoreError>;
}

/// The store in one SQLite file.
#[derive(Debug)]
pub struct SqliteStore {
    db: Connection,
}

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS coordinator (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        epoch INTEGER NOT NULL
    );
    CREATE TABLE IF NOT EXISTS runs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        run_id TEXT NOT NULL UNIQUE,
        spec TEXT NOT NULL,
        n_samples INTEGER NOT NULL,
        fingerprint TEXT NOT NULL,
        generation INTEGER NOT NULL,
        probe INTEGER,
        checkpoint_step INTEGER,
        checkpoint_manifest TEXT,
        ending TEXT
    );
    CREATE TABLE IF NOT EXISTS updates (
        run_id TEXT NOT NULL,
        seq INTEGER NOT NULL,
        figures INTEGER NOT NULL,
        body TEXT NOT NULL,
        PRIMARY KEY (run_id, seq)
    ) WITHOUT ROWID;
";

/// SQLite keeps signed numbers; digests and probes use all 64 bits.
fn signed(value: u64) -> i64 {
    i64::from_ne_bytes(value.to_ne_bytes())
}

fn unsigned(value: i64) -> u64 {
    u64::from_ne_bytes(value.to_ne_bytes())
}

fn query(action: &'static str) -> impl Fn(rusqlite::Error) -> StoreError {
    move |source| StoreError::Query { action, source }
}

impl SqliteStore {
    /// Opens or creates the file at `path`.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Open { path: path.display().to_string(), source };
        let db = Connection::open(path).map_err(failed)?;
        db.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
        db.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
        db.execute_batch(SCHEMA).map_err(failed)?;
        Ok(SqliteStore { db })
    }

    /// Creates a store that lives as long as the value; for tests.
    pub fn in_memory() -> Result<Self, StoreError> {
        let failed = |source| StoreError::Open { path: ":memory:".to_string(), source };
        let db = Connection::open_in_memory().map_err(failed)?;
        db.execute_batch(SCHEMA).map_err(failed)?;
        Ok(SqliteStore { db })
    }
}

impl Store for SqliteStore {
    fn next_epoch(&mut self) -> Result<CoordEpoch, StoreError> {
        let sql = "INSERT INTO coordinator (id, epoch) VALUES (1, 1)
                   ON CONFLICT (id) DO UPDATE SET epoch = epoch + 1 RETURNING epoch";
        let epoch: i64 =
            self.db.query_row(sql, [], |row| row.get(0)).map_err(query("count the start"))?;
        Ok(CoordEpoch(unsigned(epoch)))
    }

    fn runs(&self) -> Result<Vec<StoredRun>, StoreError> {
        let failed = query("list runs");
        let sql = "SELECT run_id, spec, n_samples, fingerprint, generation, probe, checkpoint_step,
                   checkpoint_manifest, ending FROM runs ORDER BY seq";
        let mut statement = self.db.prepare(sql).map_err(&failed)?;
        let rows = statement.query_map([], RunRow::read).map_err(&failed)?;
        let mut out: Vec<StoredRun> = Vec::new();
        for row in rows {
            out.push(row.map_err(&failed)?.validate()?);
        }
        Ok(out)
    }

    fn put_run(&mut self, run: &StoredRun) -> Result<(), StoreError> {
        let sql = "INSERT INTO runs (run_id, spec, n_samples, fingerprint, generation, probe,
                   checkpoint_step, checkpoint_manifest, ending)
                   VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
                   ON CONFLICT (run_id) DO UPDATE SET spec = ?2, n_samples = ?3, fingerprint = ?4,
                   generation = ?5, probe = ?6, checkpoint_step = ?7, checkpoint_manifest = ?8,
                   ending = ?9";
        let checkpoint = run.saved.checkpoint.as_ref();
        let values = params![
            run.run_id.as_str(),
            run.spec,
            signed(run.n_samples),
            run.fingerprint,
            signed(run.saved.generation.0),
            run.saved.probe.map(signed),
            checkpoint.map(|c| signed(c.step.0)),
            checkpoint.map(|c| c.manifest.clone()),
            run.ending.as_ref().map(ending_to_text),
        ];
        self.db.execute(sql, values).map_err(query("create a run"))?;
        Ok(())
    }

    fn record(&mut self, run: &RunId, record: &Record) -> Result<(), StoreError> {
        let failed = query("record a fact of a run");
        let id = run.as_str();
        let changed = match record {
            Record::Generation(g) => self.db.execute(
                "UPDATE runs SET generation = ?2 WHERE run_id = ?1",
                params![id, signed(g.0)],
            ),
            Record::Probe(p) => self
                .db
                .execute("UPDATE runs SET probe = ?2 WHERE run_id = ?1", params![id, signed(*p)]),
            Record::Checkpoint(c) => self.db.execute(
                "UPDATE runs SET checkpoint_step = ?2, checkpoint_manifest = ?3 WHERE run_id = ?1",
                params![id, signed(c.step.0), c.manifest],
            ),
            Record::Ended(e) => self.db.execute(
                "UPDATE runs SET ending = ?2 WHERE run_id = ?1",
                params![id, ending_to_text(e)],
            ),
        };
        let changed = changed.map_err(failed)?;
        assert_eq!(changed, 1, "facts are recorded of runs that exist");
        Ok(())
    }

    fn append(&mut self, run: &RunId, update: &Update) -> Result<u64, StoreError> {
        let sql = "INSERT INTO updates (run_id, seq, figures, body) VALUES (?1,
                   (SELECT coalesce(max(seq), 0) + 1 FROM updates WHERE run_id = ?1), ?2, ?3)
                   RETURNING seq";
        let figures = matches!(update, Update::Figures { .. });
        let body = serde_json::to_string(update).expect("plain structs are JSON");
        let seq: i64 = self
            .db
            .query_row(sql, params![run.as_str(), figures, body], |row| row.get(0))
            .map_err(query("append an update"))?;
        Ok(unsigned(seq))
    }

    fn updates(
        &self,
        run: &RunId,
        after: u64,
        limit: u64,
    ) -> Result<Vec<(u64, Update)>, StoreError> {
        let failed = query("read updates");
        let sql =
            "SELECT seq, body FROM updates WHERE run_id = ?1 AND seq > ?2 ORDER BY seq LIMIT ?3";
        let mut statement = self.db.prepare_cached(sql).map_err(&failed)?;
        let read = |row: &rusqlite::Row<'_>| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?));
        let rows = statement
            .query_map(params![run.as_str(), signed(after), signed(limit)], read)
            .map_err(&failed)?;
        let mut out: Vec<(u64, Update)> = Vec::new();
        for row in rows {
            let (seq, body) = row.map_err(&failed)?;
            out.push((unsigned(seq), parse_update(&body)?));
        }
        Ok(out)
    }

    fn last_seq(&self, run: &RunId) -> Result<u64, StoreError> {
        let sql = "SELECT coalesce(max(seq), 0) FROM updates WHERE run_id = ?1";
        let seq: i64 = self
            .db
            .query_row(sql, [run.as_str()], |row| row.get(0))
            .map_err(query("read the newest sequence number"))?;
        Ok(unsigned(seq))
    }

    fn newest_figures(&self, run: &RunId) -> Result<Option<Update>, StoreError> {
        let sql =
            "SELECT body FROM updates WHERE run_id = ?1 AND figures ORDER BY seq DESC LIMIT 1";
        let body: Option<String> = self
            .db
            .query_row(sql, [run.as_str()], |row| row.get(0))
            .optional()
            .map_err(query("read figures"))?;
        body.as_deref().map(parse_update).transpose()
    }
}

fn parse_update(body: &str) -> Result<Update, StoreError> {
    let failed =
        |err: serde_json::Error| StoreError::Content { what: "an update", detail: err.to_string() };
    serde_json::from_str(body).map_err(failed)
}

struct RunRow {
    run_id: String,
    spec: String,
    n_samples: i64,
    fingerprint: String,
    generation: i64,
    probe: Option<i64>,
    checkpoint_step: Option<i64>,
    checkpoint_manifest: Option<String>,
    ending: Option<String>,
}

impl RunRow {
    fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Self> {
        Ok(RunRow {
            run_id: row.get(0)?,
            spec: row.get(1)?,
            n_samples: row.get(2)?,
            fingerprint: row.get(3)?,
            generation: row.get(4)?,
            probe: row.get(5)?,
            checkpoint_step: row.get(6)?,
            checkpoint_manifest: row.get(7)?,
            ending: row.get(8)?,
        })
    }

    fn validate(self) -> Result<StoredRun, StoreError> {
        let run_id = self.run_id.parse().map_err(|err: lacuna_types::NameError| {
            StoreError::Content { what: "a run's name", detail: err.to_string() }
        })?;
        let checkpoint = self.checkpoint_step.zip(self.checkpoint_manifest);
        let saved = Saved {
            generation: Generation(unsigned(self.generation)),
            probe: self.probe.map(unsigned),
            checkpoint: checkpoint
                .map(|(step, manifest)| CheckpointRef { step: Step(unsigned(step)), manifest }),
        };
        Ok(StoredRun {
            run_id,
            spec: self.spec,
            n_samples: unsigned(self.n_samples),
            fingerprint: self.fingerprint,
            saved,
            ending: self.ending.as_deref().map(ending_from_text).transpose()?,
        })
    }
}

/// An ending as it stands in the file.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum EndingText {
    Finished { step: u64, digest: u64 },
    Failed { why: String, code: u8 },
    Stopped { step: u64, why: String },
    Paused { why: String },
}

fn ending_to_text(ending: &Ending) -> String {
    let text = match ending.clone() {
        Ending::Finished { step, digest } => EndingText::Finished { step: step.0, digest },
        Ending::Failed { why, code } => EndingText::Failed { why, code },
        Ending::Stopped { step, why } => EndingText::Stopped { step: step.0, why },
        Ending::Paused { why } => EndingText::Paused { why },
    };
    serde_json::to_string(&text).expect("plain structs are JSON")
}

fn ending_from_text(text: &str) -> Result<Ending, StoreError> {
    let failed =
        |err: serde_json::Error| StoreError::Content { what: "an ending", detail: err.to_string() };
    Ok(match serde_json::from_str(text).map_err(failed)? {
        EndingText::Finished { step, digest } => Ending::Finished { step: Step(step), digest },
        EndingText::Failed { why, code } => Ending::Failed { why, code },
        EndingText::Stopped { step, why } => Ending::Stopped { step: Step(step), why },
        EndingText::Paused { why } => Ending::Paused { why },
    })
}

#[cfg(test)]
mod tests;
