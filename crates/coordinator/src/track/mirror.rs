//! Copies of a run's files in an object store.
//!
//! The files themselves are written to a folder of the coordinator's state, as for any run; what
//! has grown is put whole into the store now and then. TensorBoard's files stay small enough for
//! that: a new one is begun when one is full.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lacuna_store::{Limits, Stop, Store, StoreError};

/// Shortest time between two rounds of copies while a run is on.
const COPY_EVERY: Duration = Duration::from_secs(30);
/// Bytes a second that are copied at most, on average: a round of many bytes makes the next one
/// wait longer.
const BYTES_A_SECOND: u64 = 1 << 20;
/// How long a copy is tried before the follower says that it fails.
const DEADLINE: Duration = Duration::from_secs(20);

/// Why files are not copied.
#[derive(Debug, thiserror::Error)]
pub(super) enum MirrorError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The files here.
    #[error("failed to read `{}`", path.display())]
    Read {
        /// File or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The files here.
    #[error("failed to write `{}`", path.display())]
    Write {
        /// File or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Somebody else's files are there.
    #[error(
        "`{url}` has `{name}`, which this coordinator did not write: another run wrote there, or \
         the state folder was lost; give `track.tensorboard` another folder"
    )]
    Taken {
        /// The folder in the store.
        url: String,
        /// A file there.
        name: String,
    },
}

/// A folder whose files are copied.
#[derive(Debug)]
pub(super) struct Mirror {
    store: Store,
    folder: PathBuf,
    /// Bytes of each file that the store has.
    sent: BTreeMap<String, u64>,
    due: Instant,
}

impl Mirror {
    /// Looks what the store's folder has already.
    ///
    /// # Errors
    /// A store that does not answer, and [`MirrorError::Taken`] where it has other files or longer
    /// ones.
    pub fn open(url: &str, folder: &Path) -> Result<Self, MirrorError> {
        Mirror::of(Store::open(url, Limits::default().within(DEADLINE))?, folder)
    }

    /// Fetches the files where this machine has none: another coordinator wrote them.
    ///
    /// # Errors
    /// A store that does not answer, a folder that cannot be written.
    pub fn restore(url: &str, folder: &Path) -> Result<(), MirrorError> {
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |source| MirrorError::Write { path, source }
        };
        std::fs::create_dir_all(folder).map_err(failed(folder))?;
        if !sizes(folder)?.is_empty() {
            return Ok(());
        }
        let store = Arc::new(Store::open(url, Limits::default().within(DEADLINE))?);
        let stop = Stop::default();
        // All or none of them: half of a run's files would be taken for all.
        let mut all = Vec::new();
        for object in store.list(&stop)? {
            all.push((folder.join(&object.name), store.read_long(&object.name, &stop)?));
        }
        for (path, content) in all {
            std::fs::write(&path, content).map_err(failed(&path))?;
        }
        Ok(())
    }

    fn of(store: Store, folder: &Path) -> Result<Self, MirrorError> {
        let here = sizes(folder)?;
        let mut sent = BTreeMap::new();
        for object in store.list(&Stop::default())? {
            if here.get(&object.name).is_none_or(|bytes| *bytes < object.bytes) {
                let url = store.url().to_string();
                return Err(MirrorError::Taken { url, name: object.name });
            }
            sent.insert(object.name, object.bytes);
        }
        Ok(Mirror { store, folder: folder.to_path_buf(), sent, due: Instant::now() })
    }

    /// Copies what has grown, if that is due or `now`.
    pub fn copy(&mut self, now: bool) -> Result<(), MirrorError> {
        if !now && Instant::now() < self.due {
            return Ok(());
        }
        let mut copied = 0;
        for (name, bytes) in sizes(&self.folder)? {
            if self.sent.get(&name) == Some(&bytes) {
                continue;
            }
            let path = self.folder.join(&name);
            let content =
                std::fs::read(&path).map_err(|source| MirrorError::Read { path, source })?;
            let bytes = content.len() as u64;
            self.store.put(&name, content, &Stop::default())?;
            self.sent.insert(name, bytes);
            copied += bytes;
        }
        let pause = Duration::from_secs(copied / BYTES_A_SECOND);
        self.due = Instant::now() + COPY_EVERY.max(pause);
        Ok(())
    }
}

/// Returns the files of a folder by name, with their bytes.
fn sizes(folder: &Path) -> Result<BTreeMap<String, u64>, MirrorError> {
    let failed = |source| MirrorError::Read { path: folder.to_path_buf(), source };
    let mut out = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let about = entry.metadata().map_err(failed)?;
        if about.is_file()
            && let Ok(name) = entry.file_name().into_string()
        {
            out.insert(name, about.len());
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use lacuna_store::testing::{Kind, Server};

    use super::*;

    #[test]
    fn what_has_grown_is_copied_and_others_files_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, bucket) = (dir.path().join("tb"), dir.path().join("bucket"));
        std::fs::create_dir(&folder).unwrap();
        std::fs::create_dir(&bucket).unwrap();
        let server = Server::plain(dir.path()).unwrap();
        let options = server.s3_options();
        let options: Vec<(&str, &str)> =
            options.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let open = || {
            let store = Store::open_with("s3://bucket/run", &options, Limits::default()).unwrap();
            Mirror::of(store, &folder)
        };
        let there = |name: &str| std::fs::read(bucket.join("run").join(name)).unwrap_or_default();
        std::fs::write(folder.join("a"), b"one").unwrap();
        std::fs::write(folder.join("b"), b"two").unwrap();
        let mut mirror = open().unwrap();
        mirror.copy(false).unwrap();
        assert_eq!((there("a"), there("b")), (b"one".to_vec(), b"two".to_vec()));
        std::fs::write(folder.join("a"), b"one more").unwrap();
        mirror.copy(false).unwrap();
        assert_eq!(there("a"), b"one", "not due yet");
        let puts = || server.seen().iter().filter(|seen| seen.kind == Kind::Put).count();
        let before = puts();
        mirror.copy(true).unwrap();
        assert_eq!((there("a"), puts() - before), (b"one more".to_vec(), 1));
        // Another life knows what is there.
        open().unwrap().copy(true).unwrap();
        assert_eq!(puts() - before, 1);
        std::fs::remove_file(folder.join("b")).unwrap();
        assert!(matches!(open(), Err(MirrorError::Taken { name, .. }) if name == "b"));
    }
}
