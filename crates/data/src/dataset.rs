//! An opened data set: the index and the shards beside it.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use lacuna_recipe::order::{OrderParams, OrderSpec};
use lacuna_types::SampleId;

use crate::index::{Fingerprint, INDEX_NAME, Index, ReadIndexError, crc32};

/// Shards kept open at a time: a common limit of open files is 1024, and a process has other uses.
const FILES_OPEN_MAX: usize = 256;

/// Size of a tar header, which lies right before a member's data.
const TAR_BLOCK: u64 = 512;

/// A data set that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is nothing at the path, or it cannot be looked at.
    #[error("failed to open data set `{}`", path.display())]
    Io {
        /// Path asked for.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A folder without an index.
    #[error(
        "`{}` holds no {INDEX_NAME}: make one with `lacuna data pack` or `lacuna data index`",
        path.display()
    )]
    NoIndex {
        /// The folder.
        path: PathBuf,
    },
    /// The index is unusable.
    #[error(transparent)]
    Index(#[from] ReadIndexError),
    /// A shard is not there.
    #[error("shard `{}` is missing", path.display())]
    MissingShard {
        /// Where the index says it is.
        path: PathBuf,
    },
    /// A shard was changed or copied in part.
    #[error("shard `{}` has {found} bytes where the index says {expected}", path.display())]
    ShardSize {
        /// The shard.
        path: PathBuf,
        /// Bytes there are.
        found: u64,
        /// Bytes the index knows.
        expected: u64,
    },
}

/// Where a sample lies; what an error or a report names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SamplePlace {
    /// The sample.
    pub sample: SampleId,
    /// Its shard.
    pub shard: PathBuf,
    /// First byte of the image in the shard.
    pub offset: u64,
    /// Name of the image in the shard, where the shard gives names and they can be read.
    pub member: Option<String>,
}

impl fmt::Display for SamplePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sample, shard, offset, member } = self;
        write!(f, "sample {sample} (")?;
        if let Some(member) = member {
            write!(f, "`{}` at ", member.escape_debug())?;
        }
        write!(f, "byte {offset} of shard `{}`)", shard.display())
    }
}

/// A sample whose bytes cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ReadSampleError {
    /// Reading failed; another try may succeed.
    #[error("failed to read {place}")]
    Io {
        /// The sample.
        place: Box<SamplePlace>,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The bytes are not those that were indexed.
    #[error("{place} is corrupt: crc {found:08x}, indexed as {expected:08x}")]
    Corrupt {
        /// The sample.
        place: Box<SamplePlace>,
        /// Checksum of the bytes there are.
        found: u32,
        /// Checksum in the index.
        expected: u32,
    },
}

/// An opened data set.
#[derive(Debug)]
pub struct Dataset {
    folder: PathBuf,
    index: Index,
    files: Vec<Mutex<Option<OpenShard>>>,
}

#[derive(Clone, Debug)]
struct OpenShard {
    shard: usize,
    file: Arc<File>,
}

impl Dataset {
    /// Opens the data set in a folder, or the one whose index file is given.
    ///
    /// The index is checked completely; of the shards, presence and size.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: path.to_path_buf(), source };
        let meta = fs::metadata(path).map_err(io)?;
        let (folder, index_path) = if meta.is_dir() {
            (path.to_path_buf(), path.join(INDEX_NAME))
        } else {
            let folder = path.parent().unwrap_or(Path::new(""));
            (folder.to_path_buf(), path.to_path_buf())
        };
        if !index_path.exists() {
            return Err(OpenError::NoIndex { path: folder });
        }
        let index = Index::read(&index_path)?;
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
        }
        let n_files = index.shards().len().min(FILES_OPEN_MAX);
        let files = (0..n_files).map(|_| Mutex::new(None)).collect();
        Ok(Dataset { folder, index, files })
    }

    /// Returns the folder of index and shards.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the index.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Returns the number of samples, at least 1.
    pub fn n_samples(&self) -> u64 {
        self.index.n_samples()
    }

    /// Returns the identity of the content.
    pub fn fingerprint(&self) -> Fingerprint {
        self.index.fingerprint()
    }

    /// Returns the class of a sample, where it has one.
    pub fn label(&self, id: SampleId) -> Option<u32> {
        self.index.record(id).label
    }

    /// Returns the order of this data under `params`.
    pub fn order_spec(&self, params: OrderParams, seed: u64, batch: u32) -> OrderSpec {
        OrderSpec { params, seed, batch, chunk_bounds: self.index.chunk_bounds().clone() }
    }

    /// Reads a sample's encoded image.
    pub fn sample(&self, id: SampleId) -> Result<Vec<u8>, ReadSampleError> {
        let mut bytes: Vec<u8> = Vec::new();
        self.read(id, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads a sample's encoded image into `out`, replacing what it holds.
    pub fn read(&self, id: SampleId, out: &mut Vec<u8>) -> Result<(), ReadSampleError> {
        let record = self.index.record(id);
        let shard = self.index.shard_of(id);
        out.resize(record.bytes as usize, 0);
        self.file(shard)
            .and_then(|file| file.read_exact_at(out, record.offset))
            .map_err(|source| ReadSampleError::Io { place: Box::new(self.place(id)), source })?;
        let found = crc32(out);
        if found != record.crc {
            return Err(ReadSampleError::Corrupt {
                place: Box::new(self.place(id)),
                found,
                expected: record.crc,
            });
        }
        Ok(())
    }

    /// Returns where a sample lies, for messages.
    pub fn place(&self, id: SampleId) -> SamplePlace {
        let shard = self.index.shard_of(id);
        let offset = self.index.record(id).offset;
        SamplePlace {
            sample: id,
            shard: self.folder.join(&self.index.shards()[shard].name),
            offset,
            member: self.member_name(shard, offset),
        }
    }

    /// Reads the member's name from the tar header in front of its data.
    fn member_name(&self, shard: usize, offset: u64) -> Option<String> {
        // Other shards, MDS ones, have no headers, and their samples no names.
        if !self.index.shards()[shard].name.ends_with(".tar") {
            return None;
        }
        let mut header = tar::Header::new_old();
        let at = offset.checked_sub(TAR_BLOCK)?;
        self.file(shard).ok()?.read_exact_at(header.as_mut_bytes(), at).ok()?;
        Some(String::from_utf8_lossy(&header.path_bytes()).into_owned())
    }

    /// Returns the open file of a shard; shards share places, so few are open at a time.
    fn file(&self, shard: usize) -> io::Result<Arc<File>> {
        let mut place =
            self.files[shard % self.files.len()].lock().unwrap_or_else(PoisonError::into_inner);
        match &*place {
            Some(open) if open.shard == shard => Ok(open.file.clone()),
            _ => {
                let path = self.folder.join(&self.index.shards()[shard].name);
                let file = Arc::new(File::open(path)?);
                *place = Some(OpenShard { shard, file: file.clone() });
                Ok(file)
            }
        }
    }
}

#[cfg(test)]
mod tests;
