//! The store in one SQLite file.

use std::collections::BTreeMap;
use std::path::Path;

use lacuna_control::journal::{Record, Saved};
use lacuna_track::Figures;
use lacuna_types::{CoordEpoch, RunId};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::{
    Ban, Batch, Entry, JournalLine, PicturePlace, Store, StoreError, StoredRun, Update, bans,
    now_ms, parse_update, pictures, text,
};

/// The store in one SQLite file.
#[derive(Debug)]
pub struct SqliteStore {
    pub(super) db: Connection,
    pub(super) epoch: CoordEpoch,
    /// Whether a commit is synced at once.
    synced: bool,
    /// Whether the file is a copy of what is kept elsewhere.
    is_copy: bool,
}

/// Layout of the file; a file of another one is refused.
const LAYOUT: i64 = 3;
/// The layout before, which lacks pictures: opening the file adds their table.
const LAYOUT_BEFORE: i64 = 2;

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
        fingerprint TEXT NOT NULL
    );
    CREATE TABLE IF NOT EXISTS journal (
        run_id TEXT NOT NULL,
        seq INTEGER NOT NULL,
        at_ms INTEGER NOT NULL,
        epoch INTEGER NOT NULL,
        body TEXT NOT NULL,
        PRIMARY KEY (run_id, seq)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS updates (
        run_id TEXT NOT NULL,
        seq INTEGER NOT NULL,
        figures INTEGER NOT NULL,
        body TEXT NOT NULL,
        PRIMARY KEY (run_id, seq)
    ) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS updates_events ON updates (run_id, seq) WHERE NOT figures;
    CREATE TABLE IF NOT EXISTS bans (
        node TEXT PRIMARY KEY,
        until_ms INTEGER NOT NULL,
        why TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS pictures (
        run_id TEXT NOT NULL,
        step INTEGER NOT NULL,
        place INTEGER NOT NULL,
        sample INTEGER NOT NULL,
        png BLOB NOT NULL,
        PRIMARY KEY (run_id, step, place)
    );
";

/// SQLite keeps signed numbers; digests and probes use all 64 bits.
pub(super) fn signed(value: u64) -> i64 {
    i64::from_ne_bytes(value.to_ne_bytes())
}

pub(super) fn unsigned(value: i64) -> u64 {
    u64::from_ne_bytes(value.to_ne_bytes())
}

pub(super) fn query(action: &'static str) -> impl Fn(rusqlite::Error) -> StoreError {
    move |source| StoreError::Query { action, source }
}

impl SqliteStore {
    /// Opens or creates the file at `path`.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Open { path: path.display().to_string(), source };
        let db = Connection::open(path).map_err(failed)?;
        db.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
        db.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
        check_layout(&db, path)?;
        db.execute_batch(SCHEMA).map_err(failed)?;
        db.pragma_update(None, "user_version", LAYOUT).map_err(failed)?;
        Ok(SqliteStore { db, epoch: CoordEpoch(0), synced: true, is_copy: false })
    }

    /// Opens the file at `path` to look at it, also while a coordinator has it.
    pub fn open_to_read(path: &Path) -> Result<Self, StoreError> {
        use rusqlite::OpenFlags;
        let failed = |source| StoreError::Open { path: path.display().to_string(), source };
        let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY);
        let db = db.map_err(failed)?;
        check_layout(&db, path)?;
        Ok(SqliteStore { db, epoch: CoordEpoch(0), synced: true, is_copy: false })
    }

    /// Creates a store that lives as long as the value; for tests.
    pub fn in_memory() -> Result<Self, StoreError> {
        let failed = |source| StoreError::Open { path: ":memory:".to_string(), source };
        let db = Connection::open_in_memory().map_err(failed)?;
        db.execute_batch(SCHEMA).map_err(failed)?;
        Ok(SqliteStore { db, epoch: CoordEpoch(0), synced: true, is_copy: false })
    }
}

impl SqliteStore {
    /// Returns up to about `n` figures of a run, evenly over its updates, and the newest; by step:
    /// where the run went back, what it computed again.
    pub fn some_figures(&self, run: &RunId, n: u64) -> Result<BTreeMap<u64, Figures>, StoreError> {
        let last = self.last_seq(run)?;
        let stride = signed(last.div_ceil(n.max(1)).max(1));
        let sql = "SELECT body FROM updates WHERE run_id = ?1 AND figures = 1 AND seq % ?2 = 0
                   ORDER BY seq";
        let found = self.bodies(sql, params![run.as_str(), stride])?;
        let some = found.into_iter().filter_map(figures_of);
        let mut out = BTreeMap::new();
        for figures in some.chain(self.newest_figures(run)?) {
            drop(out.split_off(&figures.step));
            out.insert(figures.step, figures);
        }
        Ok(out)
    }

    /// Returns up to `n` events of a run, the newest first.
    pub fn last_events(&self, run: &RunId, n: u64) -> Result<Vec<Update>, StoreError> {
        let sql = "SELECT body FROM updates WHERE run_id = ?1 AND NOT figures
                   ORDER BY seq DESC LIMIT ?2";
        self.bodies(sql, params![run.as_str(), signed(n)])
    }

    /// The newest `n` events of some kinds, the newest first.
    pub fn last_events_of(
        &self,
        run: &RunId,
        kinds: &[&str],
        n: u64,
    ) -> Result<Vec<Update>, StoreError> {
        // Kinds are words of ours, and stand in the query as they are.
        let list: Vec<String> = kinds.iter().map(|kind| format!("'{kind}'")).collect();
        let sql = format!(
            "SELECT body FROM updates WHERE run_id = ?1 AND NOT figures
             AND json_extract(body, '$.event.kind') IN ({}) ORDER BY seq DESC LIMIT ?2",
            list.join(", ")
        );
        self.bodies(&sql, params![run.as_str(), signed(n)])
    }

    fn bodies(
        &self,
        sql: &str,
        values: &[&dyn rusqlite::ToSql],
    ) -> Result<Vec<Update>, StoreError> {
        let failed = query("read updates");
        let mut statement = self.db.prepare_cached(sql).map_err(&failed)?;
        let rows = statement.query_map(values, |row| row.get::<_, String>(0)).map_err(&failed)?;
        rows.map(|body| parse_update(&body.map_err(&failed)?)).collect()
    }

    /// Has nothing synced: the file is a copy of what is kept elsewhere.
    pub(super) fn is_a_copy(&mut self) -> Result<(), StoreError> {
        self.db.pragma_update(None, "synchronous", "OFF").map_err(query("set up a copy"))?;
        self.is_copy = true;
        Ok(())
    }

    /// Writes updates under the numbers that they had.
    pub(super) fn restore_updates(
        &mut self,
        run: &RunId,
        first: u64,
        updates: &[Update],
    ) -> Result<(), StoreError> {
        let failed = query("restore updates");
        let all = self.db.transaction().map_err(&failed)?;
        for (seq, update) in (first..).zip(updates) {
            insert_update_as(&all, run, Some(seq), update).map_err(&failed)?;
        }
        all.commit().map_err(&failed)
    }

    /// Writes as [`Store::write`] does, with the time and the start that journal lines say.
    pub(super) fn write_at(
        &mut self,
        batches: &[Batch],
        at_ms: u64,
        epoch: CoordEpoch,
    ) -> Result<Vec<Vec<u64>>, StoreError> {
        let failed = query("write what happened to a run");
        let mut entries = batches.iter().flat_map(|batch| &batch.entries);
        self.sync_commits(entries.any(|entry| matches!(entry, Entry::Fact(_))))?;
        let (at_ms, epoch) = (signed(at_ms), signed(epoch.0));
        let all = self.db.transaction().map_err(&failed)?;
        let mut written: Vec<Vec<u64>> = Vec::new();
        for Batch { run, entries } in batches {
            let mut numbers: Vec<u64> = Vec::new();
            for entry in entries {
                match entry {
                    Entry::Fact(record) => {
                        insert_fact(&all, run, record, at_ms, epoch).map_err(&failed)?;
                    }
                    Entry::Update(update) => {
                        numbers.push(insert_update(&all, run, update).map_err(&failed)?);
                    }
                    Entry::Picture(update, png) => {
                        let Update::Picture { place, .. } = update else { continue };
                        // Two may have been under way at a time: the first one counts.
                        if pictures::insert(&all, run, *place, png).map_err(&failed)? {
                            numbers.push(insert_update(&all, run, update).map_err(&failed)?);
                        }
                    }
                }
            }
            written.push(numbers);
        }
        all.commit().map_err(&failed)?;
        Ok(written)
    }

    /// Has commits synced, or not: a crash may take the last updates, which are for people, and
    /// nothing is decided by them.
    fn sync_commits(&mut self, synced: bool) -> Result<(), StoreError> {
        if self.synced != synced && !self.is_copy {
            let mode = if synced { "FULL" } else { "NORMAL" };
            self.db
                .pragma_update(None, "synchronous", mode)
                .map_err(query("set how commits are synced"))?;
            self.synced = synced;
        }
        Ok(())
    }
}

fn insert_fact(
    db: &Connection,
    run: &RunId,
    record: &Record,
    at_ms: i64,
    epoch: i64,
) -> rusqlite::Result<()> {
    let sql = "INSERT INTO journal (run_id, seq, at_ms, epoch, body) VALUES (?1,
               (SELECT coalesce(max(seq), 0) + 1 FROM journal WHERE run_id = ?1), ?2, ?3, ?4)";
    let values = params![run.as_str(), at_ms, epoch, text::render(record)];
    db.prepare_cached(sql)?.execute(values).map(|_| ())
}

fn insert_update(db: &Connection, run: &RunId, update: &Update) -> rusqlite::Result<u64> {
    insert_update_as(db, run, None, update)
}

/// Inserts an update under a number, or under the next one.
fn insert_update_as(
    db: &Connection,
    run: &RunId,
    seq: Option<u64>,
    update: &Update,
) -> rusqlite::Result<u64> {
    let sql = "INSERT INTO updates (run_id, seq, figures, body) VALUES (?1, coalesce(?4,
               (SELECT coalesce(max(seq), 0) + 1 FROM updates WHERE run_id = ?1)), ?2, ?3)
               RETURNING seq";
    let figures = match update {
        Update::Event { .. } => 0,
        Update::Figures { .. } => 1,
        Update::Picture { .. } => 2,
    };
    let body = serde_json::to_string(update).expect("plain structs are JSON");
    let values = params![run.as_str(), figures, body, seq.map(signed)];
    db.prepare_cached(sql)?.query_row(values, |row| row.get(0)).map(unsigned)
}

/// Refuses a file that another version of this crate wrote; 0 is a file without any.
fn check_layout(db: &Connection, path: &Path) -> Result<(), StoreError> {
    let failed = |source| StoreError::Open { path: path.display().to_string(), source };
    let layout: i64 =
        db.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(failed)?;
    let runs = "SELECT count(*) FROM sqlite_master WHERE name = 'runs'";
    let in_use = db.query_row(runs, [], |row| row.get::<_, i64>(0)).map_err(failed)? > 0;
    if [LAYOUT, LAYOUT_BEFORE].contains(&layout) || (layout == 0 && !in_use) {
        return Ok(());
    }
    Err(StoreError::Content {
        what: "a layout",
        detail: format!(
            "`{}` has layout {layout}, this build reads {LAYOUT}: take another state folder and \
             submit the runs again; they go on from their checkpoints",
            path.display()
        ),
    })
}

impl Store for SqliteStore {
    fn next_epoch(&mut self) -> Result<CoordEpoch, StoreError> {
        self.sync_commits(true)?;
        let sql = "INSERT INTO coordinator (id, epoch) VALUES (1, 1)
                   ON CONFLICT (id) DO UPDATE SET epoch = epoch + 1 RETURNING epoch";
        let epoch: i64 =
            self.db.query_row(sql, [], |row| row.get(0)).map_err(query("count the start"))?;
        self.epoch = CoordEpoch(unsigned(epoch));
        Ok(self.epoch)
    }

    fn runs(&self) -> Result<Vec<StoredRun>, StoreError> {
        let failed = query("list runs");
        let sql = "SELECT run_id, spec, n_samples, fingerprint FROM runs ORDER BY seq";
        let mut statement = self.db.prepare(sql).map_err(&failed)?;
        let rows = statement.query_map([], RunRow::read).map_err(&failed)?;
        let mut out: Vec<StoredRun> = Vec::new();
        for row in rows {
            let row = row.map_err(&failed)?;
            let run_id: RunId = row.run_id.parse().map_err(|err: lacuna_types::NameError| {
                StoreError::Content { what: "a run's name", detail: err.to_string() }
            })?;
            let journal = self.journal(&run_id)?;
            out.push(StoredRun {
                run_id,
                spec: row.spec,
                n_samples: unsigned(row.n_samples),
                fingerprint: row.fingerprint,
                saved: Saved::replay(journal.iter().map(|line| &line.record)),
            });
        }
        Ok(out)
    }

    fn put_run(&mut self, run: &StoredRun) -> Result<(), StoreError> {
        self.sync_commits(true)?;
        let sql = "INSERT INTO runs (run_id, spec, n_samples, fingerprint) VALUES (?1, ?2, ?3, ?4)
                   ON CONFLICT (run_id) DO UPDATE SET spec = ?2, n_samples = ?3, fingerprint = ?4";
        let values = params![run.run_id.as_str(), run.spec, signed(run.n_samples), run.fingerprint];
        self.db.execute(sql, values).map_err(query("create a run"))?;
        Ok(())
    }

    fn write(&mut self, batches: &[Batch]) -> Result<Vec<Vec<u64>>, StoreError> {
        self.write_at(batches, now_ms(), self.epoch)
    }

    fn journal(&self, run: &RunId) -> Result<Vec<JournalLine>, StoreError> {
        let failed = query("read a journal");
        let sql = "SELECT seq, at_ms, epoch, body FROM journal WHERE run_id = ?1 ORDER BY seq";
        let mut statement = self.db.prepare_cached(sql).map_err(&failed)?;
        let read = |row: &rusqlite::Row<'_>| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get::<_, String>(3)?))
        };
        let rows = statement.query_map([run.as_str()], read).map_err(&failed)?;
        let mut out: Vec<JournalLine> = Vec::new();
        for row in rows {
            let (seq, at_ms, epoch, body): (i64, i64, i64, String) = row.map_err(&failed)?;
            let record = text::parse(&body)
                .map_err(|detail| StoreError::Content { what: "a journal's record", detail })?;
            out.push(JournalLine {
                seq: unsigned(seq),
                at_ms: unsigned(at_ms),
                epoch: CoordEpoch(unsigned(epoch)),
                record,
            });
        }
        Ok(out)
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

    fn newest_figures(&self, run: &RunId) -> Result<Option<Figures>, StoreError> {
        let sql =
            "SELECT body FROM updates WHERE run_id = ?1 AND figures = 1 ORDER BY seq DESC LIMIT 1";
        let body: Option<String> = self
            .db
            .query_row(sql, [run.as_str()], |row| row.get(0))
            .optional()
            .map_err(query("read figures"))?;
        Ok(body.as_deref().map(parse_update).transpose()?.and_then(figures_of))
    }

    fn put_ban(&mut self, ban: &Ban) -> Result<(), StoreError> {
        self.sync_commits(true)?;
        bans::put(self, ban)
    }

    fn bans(&self) -> Result<Vec<Ban>, StoreError> {
        bans::list(self)
    }

    fn has_picture(&self, run: &RunId, place: PicturePlace) -> Result<bool, StoreError> {
        let sql = "SELECT 1 FROM pictures WHERE run_id = ?1 AND step = ?2 AND place = ?3";
        let found: Option<i64> = self
            .db
            .query_row(sql, params![run.as_str(), signed(place.step), place.index], |row| {
                row.get(0)
            })
            .optional()
            .map_err(query("look for a picture"))?;
        Ok(found.is_some())
    }
}

fn figures_of(update: Update) -> Option<Figures> {
    match update {
        Update::Figures { figures, .. } => Some(figures),
        _ => None,
    }
}

struct RunRow {
    run_id: String,
    spec: String,
    n_samples: i64,
    fingerprint: String,
}

impl RunRow {
    fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Self> {
        Ok(RunRow {
            run_id: row.get(0)?,
            spec: row.get(1)?,
            n_samples: row.get(2)?,
            fingerprint: row.get(3)?,
        })
    }
}
