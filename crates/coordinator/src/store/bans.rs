//! Machines that are kept out, as they stand in the file.

use rusqlite::params;

use super::StoreError;
use super::sqlite::{SqliteStore, query, signed, unsigned};

/// A machine that is kept out of every run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ban {
    /// The machine.
    pub node: String,
    /// Until when, milliseconds since the Unix epoch.
    pub until_ms: u64,
    /// Why, for people.
    pub why: String,
}

pub(super) fn put(store: &SqliteStore, ban: &Ban) -> Result<(), StoreError> {
    let sql = "INSERT INTO bans (node, until_ms, why) VALUES (?1, ?2, ?3)
               ON CONFLICT (node) DO UPDATE SET until_ms = ?2, why = ?3";
    let values = params![ban.node, signed(ban.until_ms), ban.why];
    store.db.execute(sql, values).map_err(query("keep a machine out"))?;
    Ok(())
}

pub(super) fn list(store: &SqliteStore) -> Result<Vec<Ban>, StoreError> {
    let failed = query("list machines that are kept out");
    let sql = "SELECT node, until_ms, why FROM bans ORDER BY node";
    let mut statement = store.db.prepare(sql).map_err(&failed)?;
    let read = |row: &rusqlite::Row<'_>| {
        Ok(Ban { node: row.get(0)?, until_ms: unsigned(row.get(1)?), why: row.get(2)? })
    };
    let rows = statement.query_map([], read).map_err(&failed)?;
    rows.map(|row| row.map_err(&failed)).collect()
}
