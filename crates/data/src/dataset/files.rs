//! Shards that are files.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::OpenError;
use crate::index::Index;

/// Shards kept open at a time: a common limit of open files is 1024, and a process has other uses.
const FILES_OPEN_MAX: usize = 256;

/// The shards of a folder; few are open at a time.
#[derive(Debug)]
pub(super) struct ShardFiles {
    paths: Vec<PathBuf>,
    open: Vec<Mutex<Option<OpenShard>>>,
}

#[derive(Clone, Debug)]
struct OpenShard {
    shard: usize,
    file: Arc<File>,
}

impl ShardFiles {
    /// Checks that each shard is there, with its size.
    pub fn open(folder: &Path, index: &Index) -> Result<Self, OpenError> {
        let mut paths: Vec<PathBuf> = Vec::with_capacity(index.shards().len());
        for shard in index.shards() {
            let path = folder.join(&shard.name);
            let found = match fs::metadata(&path) {
                Ok(meta) => meta.len(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(OpenError::MissingShard { path });
                }
                Err(source) => return Err(OpenError::Io { path, source }),
            };
            if found != shard.bytes {
                return Err(OpenError::ShardSize { path, found, expected: shard.bytes });
            }
            paths.push(path);
        }
        let n_open = paths.len().min(FILES_OPEN_MAX);
        Ok(ShardFiles { paths, open: (0..n_open).map(|_| Mutex::new(None)).collect() })
    }

    /// Fills `out` from a place of a shard.
    pub fn read(&self, shard: usize, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file(shard)?.read_exact_at(out, offset)
    }

    /// Returns the open file of a shard; shards share places, so few are open at a time.
    fn file(&self, shard: usize) -> io::Result<Arc<File>> {
        let mut place =
            self.open[shard % self.open.len()].lock().unwrap_or_else(PoisonError::into_inner);
        match &*place {
            Some(open) if open.shard == shard => Ok(open.file.clone()),
            _ => {
                let file = Arc::new(File::open(&self.paths[shard])?);
                *place = Some(OpenShard { shard, file: file.clone() });
                Ok(file)
            }
        }
    }
}
