//! Whether a place keeps what checkpoints are built on: tried, not believed.

use std::path::Path;

use crate::storage::{FsError, Published, Storage, chain};

/// Bytes of the file that is written on trial.
const TRIAL_BYTES: usize = 1 << 20;

/// What was tried and how it went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What must hold.
    pub what: &'static str,
    /// Why it does not, if so.
    pub problem: Option<String>,
}

/// What trying a place has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Examined {
    /// What must hold, in the order in which it was tried.
    pub findings: Vec<Finding>,
    /// Bytes that are free, where that can be known.
    pub free_bytes: Option<u64>,
    /// Whether large files are written past the cache, where that can be told apart.
    pub writes_direct: Option<bool>,
}

impl Examined {
    /// Tells whether checkpoints can be trusted to this place.
    pub fn is_sound(&self) -> bool {
        self.findings.iter().all(|finding| finding.problem.is_none())
    }
}

/// Tells whether something holds.
type Trial<'a> = dyn Fn() -> Result<bool, FsError> + 'a;

/// Tries everything in a folder of the name `trial` in `base`, which is removed afterwards.
///
/// Nothing else may use that name.
pub fn examine(storage: &dyn Storage, base: &Path, trial: &str) -> Examined {
    let folder = base.join(trial);
    let file = folder.join("file");
    let trials: [(&'static str, &Trial<'_>); 7] = [
        ("folders can be made", &|| storage.prepare(base, &folder).map(|()| true)),
        ("a name is taken once", &|| {
            let first = storage.create_small(&file, &file, "1")?;
            let second = storage.create_small(&file, &file, "2")?;
            Ok((first, second) == (Published::Created, Published::Exists))
        }),
        ("what was written is read", &|| Ok(storage.read_small(&file, 16)? == b"1")),
        ("a file can be replaced", &|| {
            storage.replace_small(&file, "3")?;
            Ok(storage.read_small(&file, 16)? == b"3")
        }),
        ("a large file appears whole", &|| large(storage, &folder.join("large"))),
        ("a file can be hidden", &|| {
            storage.hide(&file, &folder.join("hidden"))?;
            Ok(storage.size(&file).is_err_and(|error| error.is_not_found()))
        }),
        ("files can be listed and removed", &|| {
            let listed = storage.names(&folder)?.contains(&"large".to_string());
            storage.remove_file(&folder.join("large"))?;
            Ok(listed && !storage.names(&folder)?.contains(&"large".to_string()))
        }),
    ];
    let mut findings: Vec<Finding> = Vec::new();
    for (what, tried) in trials {
        let problem = match tried() {
            Ok(true) => None,
            Ok(false) => Some("it is not so".to_string()),
            Err(error) => Some(chain(&error)),
        };
        findings.push(Finding { what, problem });
    }
    let (free_bytes, writes_direct) = (storage.free_bytes(base), storage.writes_direct(&folder));
    let problem = storage.remove_folder(&folder).err().map(|error| chain(&error));
    findings.push(Finding { what: "folders can be removed", problem });
    Examined { findings, free_bytes, writes_direct }
}

/// A large file is not there before it is published, and then has its bytes and its name alone.
fn large(storage: &dyn Storage, path: &Path) -> Result<bool, FsError> {
    let bytes: Vec<u8> = (0..TRIAL_BYTES).map(|i| (i % 251) as u8).collect();
    let mut sink = storage.begin(path, bytes.len() as u64)?;
    sink.write_all(&bytes)?;
    let early = storage.size(path).is_ok();
    let first = sink.publish()?;
    let mut found: Vec<u8> = vec![0; bytes.len()];
    let read = storage.open(path)?.read_exact_at(&mut found, 0);
    read.map_err(|source| FsError::new("read", path, source))?;
    let mut again = storage.begin(path, 1)?;
    again.write_all(b"x")?;
    let second = again.publish()?;
    Ok(!early && (first, second) == (Published::Created, Published::Exists) && found == bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Disk;

    #[test]
    fn this_machine_is_sound() {
        let root = tempfile::tempdir().unwrap();
        let found = examine(&Disk::new(), root.path(), "trial");
        assert!(found.is_sound(), "{found:?}");
        assert!(found.free_bytes.unwrap() > 0 && found.writes_direct.is_some());
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0, "nothing stays");
    }

    /// A place that cannot be written to is found out, and says why.
    #[test]
    fn a_place_that_refuses_is_not() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("file");
        std::fs::write(&base, "").unwrap();
        let found = examine(&Disk::new(), &base, "trial");
        assert!(!found.is_sound());
        let problem = found.findings[0].problem.as_deref().unwrap();
        assert!(problem.starts_with("failed to create directory"), "{problem}");
    }
}
