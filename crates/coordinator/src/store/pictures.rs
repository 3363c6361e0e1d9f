//! Pictures of runs: the first step's and those of the newest steps stay.

use lacuna_types::RunId;
use rusqlite::{Connection, OptionalExtension as _, params};
use serde::{Deserialize, Serialize};

use super::StoreError;
use super::sqlite::{SqliteStore, query, signed, unsigned};

/// Steps whose pictures stay beside the first one's. Files of TensorBoard have all.
const STEPS_KEPT: u32 = 15;

/// Which picture of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PicturePlace {
    /// Steps behind the state that it shows.
    pub step: u64,
    /// Place in the gallery.
    pub index: u32,
    /// The image's place in the data set.
    pub sample: u64,
}

/// Writes a picture, and forgets those of steps that are no longer kept; `false` if it was there.
pub(super) fn insert(
    db: &Connection,
    run: &RunId,
    place: PicturePlace,
    png: &[u8],
) -> rusqlite::Result<bool> {
    let PicturePlace { step, index, sample } = place;
    let run = run.as_str();
    let sql = "INSERT INTO pictures (run_id, step, place, sample, png) VALUES (?1, ?2, ?3, ?4, ?5)
               ON CONFLICT DO NOTHING";
    let values = params![run, signed(step), index, signed(sample), png];
    let is_new = db.prepare_cached(sql)?.execute(values)? > 0;
    let sql = "DELETE FROM pictures WHERE run_id = ?1
               AND step > (SELECT min(step) FROM pictures WHERE run_id = ?1)
               AND step NOT IN (SELECT DISTINCT step FROM pictures WHERE run_id = ?1
                                ORDER BY step DESC LIMIT ?2)";
    db.prepare_cached(sql)?.execute(params![run, STEPS_KEPT])?;
    Ok(is_new)
}

impl SqliteStore {
    /// Writes a picture that was kept elsewhere.
    pub(super) fn restore_picture(
        &self,
        run: &RunId,
        place: PicturePlace,
        png: &[u8],
    ) -> Result<(), StoreError> {
        insert(&self.db, run, place, png).map(|_| ()).map_err(query("restore a picture"))
    }

    /// Lists a run's pictures by step and place.
    pub fn pictures(&self, run: &RunId) -> Result<Vec<PicturePlace>, StoreError> {
        let failed = query("list pictures");
        let sql = "SELECT step, place, sample FROM pictures WHERE run_id = ?1 ORDER BY step, place";
        let mut statement = self.db.prepare_cached(sql).map_err(&failed)?;
        let read = |row: &rusqlite::Row<'_>| {
            Ok(PicturePlace {
                step: unsigned(row.get(0)?),
                index: row.get(1)?,
                sample: unsigned(row.get(2)?),
            })
        };
        let rows = statement.query_map([run.as_str()], read).map_err(&failed)?;
        rows.map(|row| row.map_err(&failed)).collect()
    }

    /// Returns a picture as PNG; `None` if it was never there or is no longer kept.
    pub fn picture(
        &self,
        run: &RunId,
        step: u64,
        index: u32,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let sql = "SELECT png FROM pictures WHERE run_id = ?1 AND step = ?2 AND place = ?3";
        self.db
            .query_row(sql, params![run.as_str(), signed(step), index], |row| row.get(0))
            .optional()
            .map_err(query("read a picture"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Batch, Entry, Store as _, Update};
    use super::*;

    #[test]
    fn the_first_and_the_newest_stay() {
        let mut store = SqliteStore::in_memory().unwrap();
        let run: RunId = "a".parse().unwrap();
        let steps = u64::from(STEPS_KEPT) + 5;
        for step in 0..steps {
            for index in 0..2 {
                let place = PicturePlace { step: 10 * step, index, sample: 7 };
                let png = vec![step as u8, index as u8];
                let entry = Entry::Picture(Update::Picture { place, at_ms: 1 }, png);
                let batch = Batch { run: run.clone(), entries: vec![entry] };
                assert_eq!(store.write(&[batch]).unwrap(), [vec![2 * step + u64::from(index) + 1]]);
            }
        }
        let kept: Vec<u64> = store.pictures(&run).unwrap().iter().map(|p| p.step / 10).collect();
        let mut wanted: Vec<u64> = vec![0, 0];
        wanted.extend((steps - u64::from(STEPS_KEPT)..steps).flat_map(|step| [step, step]));
        assert_eq!(kept, wanted);
        assert_eq!(store.picture(&run, 0, 1).unwrap(), Some(vec![0, 1]));
        assert_eq!(store.picture(&run, 10, 1).unwrap(), None);
        assert!(store.last_events(&run, 10).unwrap().is_empty(), "pictures are no events");
        assert_eq!(store.newest_figures(&run).unwrap(), None, "and no figures");
    }
}
