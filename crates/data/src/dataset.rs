//! An opened data set: the index and the shards beside it, in a folder or behind a URL.

mod files;
mod remote;

use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lacuna_recipe::order::{OrderParams, OrderSpec};
use lacuna_store::{Limits, Pending, Stop, StoreError, StoreStats, is_url};
use lacuna_types::SampleId;

use self::files::ShardFiles;
use self::remote::RemoteShards;
use crate::chunks::{ChunkCache, ChunkCacheConfig};
use crate::index::{Fingerprint, INDEX_NAME, Index, ReadIndexError, crc32};

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
    /// The store does not give it.
    #[error("failed to open data set `{url}`")]
    Store {
        /// The data set's URL.
        url: String,
        /// Why.
        #[source]
        source: Box<StoreError>,
    },
    /// The folder of a cache of chunks cannot be used.
    #[error("failed to use `{}` as a cache of chunks", dir.display())]
    Cache {
        /// The folder.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
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

/// How a data set behind a URL is reached; one in a folder takes no notice of it.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// How long is tried.
    pub limits: Limits,
    /// Options of the store, which win over the environment.
    pub options: Vec<(String, String)>,
    /// Where chunks are kept; without it each sample is a request.
    pub chunks: Option<ChunkCacheConfig>,
}

/// An opened data set.
#[derive(Debug)]
pub struct Dataset {
    folder: PathBuf,
    index: Arc<Index>,
    shards: Shards,
    file_bytes: AtomicU64,
}

#[derive(Debug)]
enum Shards {
    Files(ShardFiles),
    Remote(Box<RemoteShards>),
}

impl Dataset {
    /// Opens the data set in a folder or behind a URL, or the one whose index file is given.
    ///
    /// The index is checked completely; of the shards in a folder, presence and size.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Dataset::open_with(path, &Access::default())
    }

    /// Opens a data set; behind a URL as `access` says.
    pub fn open_with(path: &Path, access: &Access) -> Result<Self, OpenError> {
        if let Some(url) = path.to_str().filter(|text| is_url(text)) {
            let (folder, index, remote) = remote::open(url, access)?;
            let shards = Shards::Remote(Box::new(remote));
            let folder = PathBuf::from(folder);
            return Ok(Dataset { folder, index, shards, file_bytes: AtomicU64::new(0) });
        }
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
        let shards = Shards::Files(ShardFiles::open(&folder, &index)?);
        Ok(Dataset { folder, index: Arc::new(index), shards, file_bytes: AtomicU64::new(0) })
    }

    /// Returns the folder of index and shards, or its URL.
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
        self.read_unless(&Stop::default(), id, out)
    }

    /// Reads as [`Dataset::read`] does, and gives up when `stop` is raised while bytes come from
    /// afar.
    pub fn read_unless(
        &self,
        stop: &Stop,
        id: SampleId,
        out: &mut Vec<u8>,
    ) -> Result<(), ReadSampleError> {
        let record = self.index.record(id);
        let read = match &self.shards {
            Shards::Files(files) => {
                out.resize(record.bytes as usize, 0);
                self.file_bytes.fetch_add(record.bytes.into(), Ordering::Relaxed);
                files.read(self.index.shard_of(id), record.offset, out)
            }
            Shards::Remote(remote) => remote.read(&self.index, id, out, stop),
        };
        read.map_err(|source| {
            // What does not answer is not asked for a name.
            let place = if self.is_remote() { self.bare_place(id) } else { self.place(id) };
            ReadSampleError::Io { place: Box::new(place), source }
        })?;
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

    /// Starts to fetch a sample that is read by itself from a store; nothing where it is not.
    pub(crate) fn begin(&self, id: SampleId) -> Option<Pending<Vec<u8>>> {
        match &self.shards {
            Shards::Files(_) => None,
            Shards::Remote(remote) => remote.begin(&self.index, id),
        }
    }

    /// Reads a shard from its beginning to its end.
    pub fn shard_reader(&self, shard: usize) -> io::Result<Box<dyn Read + Send>> {
        let name = &self.index.shards()[shard].name;
        match &self.shards {
            Shards::Files(_) => Ok(Box::new(fs::File::open(self.folder.join(name))?)),
            Shards::Remote(remote) => remote.reader(name),
        }
    }

    /// Returns the cache of chunks, which a data set behind a URL may have.
    pub fn chunks(&self) -> Option<&Arc<ChunkCache>> {
        match &self.shards {
            Shards::Files(_) => None,
            Shards::Remote(remote) => remote.chunks(),
        }
    }

    /// Returns how many bytes of samples were read from files so far.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes.load(Ordering::Relaxed)
    }

    /// Tells whether the shards lie behind a URL.
    pub fn is_remote(&self) -> bool {
        matches!(self.shards, Shards::Remote(_))
    }

    /// Returns what its store has done so far; nothing for a folder.
    pub fn store_stats(&self) -> StoreStats {
        match &self.shards {
            Shards::Files(_) => StoreStats::default(),
            Shards::Remote(remote) => remote.stats(),
        }
    }

    /// Returns where a sample lies, for messages.
    pub fn place(&self, id: SampleId) -> SamplePlace {
        let place = self.bare_place(id);
        SamplePlace { member: self.member_name(self.index.shard_of(id), place.offset), ..place }
    }

    /// Returns where a sample lies, without a look at its shard.
    fn bare_place(&self, id: SampleId) -> SamplePlace {
        let shard = self.folder.join(&self.index.shards()[self.index.shard_of(id)].name);
        let offset = self.index.record(id).offset;
        SamplePlace { sample: id, shard, offset, member: None }
    }

    /// Reads the member's name from the tar header in front of its data.
    fn member_name(&self, shard: usize, offset: u64) -> Option<String> {
        // Other shards, MDS ones, have no headers, and their samples no names.
        let name = &self.index.shards()[shard].name;
        if !name.ends_with(".tar") {
            return None;
        }
        let mut header = tar::Header::new_old();
        let at = offset.checked_sub(TAR_BLOCK)?;
        match &self.shards {
            Shards::Files(files) => files.read(shard, at, header.as_mut_bytes()).ok()?,
            Shards::Remote(remote) => {
                header.as_mut_bytes().copy_from_slice(&remote.bytes(name, at..offset)?);
            }
        }
        Some(String::from_utf8_lossy(&header.path_bytes()).into_owned())
    }
}

#[cfg(test)]
mod tests;
