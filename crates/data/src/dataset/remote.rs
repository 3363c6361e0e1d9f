//! Shards behind a URL.

use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lacuna_store::{Pending, Stop, Store, StoreError, StoreStats};
use lacuna_types::SampleId;

use super::{Access, OpenError};
use crate::chunks::{self, ChunkCache};
use crate::index::{INDEX_BYTES_MAX, INDEX_NAME, Index};

/// A store that says nothing for so long when a data set is opened has a wrong address: whoever
/// waits is a person.
const OPEN_DEADLINE: Duration = Duration::from_secs(20);

/// How long a message waits for the name of a sample.
const NAME_DEADLINE: Duration = Duration::from_secs(3);

/// The shards of one store.
#[derive(Debug)]
pub(super) struct RemoteShards {
    store: Arc<Store>,
    chunks: Option<Arc<ChunkCache>>,
}

/// Opens the data set behind a URL, of its folder or of its index.
pub(super) fn open(
    url: &str,
    access: &Access,
) -> Result<(String, Arc<Index>, RemoteShards), OpenError> {
    let (folder, name) = match url.rsplit_once('/') {
        Some((folder, name)) if name.ends_with(".lacuna") => (folder, name),
        _ => (url.trim_end_matches('/'), INDEX_NAME),
    };
    let failed =
        |source: StoreError| OpenError::Store { url: folder.to_string(), source: Box::new(source) };
    let options: Vec<(&str, &str)> =
        access.options.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let store = Arc::new(Store::open_with(folder, &options, access.limits).map_err(failed)?);
    let stop = Stop::default();
    let bytes = match store.size(name, access.limits.within(OPEN_DEADLINE).deadline, &stop) {
        Ok(bytes) if bytes <= INDEX_BYTES_MAX => store.read_long(name, &stop),
        Ok(bytes) => Err(StoreError::Unsupported {
            object: store.url_of(name),
            why: format!("an index of {bytes} bytes is too long"),
        }),
        Err(StoreError::NotFound { .. }) => {
            return Err(OpenError::NoIndex { path: folder.into() });
        }
        Err(error) => Err(error),
    };
    let index = Index::parse(bytes.map_err(failed)?, Path::new(&store.url_of(name)))?;
    let index = Arc::new(index);
    let chunks = access.chunks.as_ref().map(|config| {
        let opened = ChunkCache::open(config, store.clone(), index.clone());
        opened.map(Arc::new).map_err(|source| OpenError::Cache { dir: config.dir.clone(), source })
    });
    let chunks = chunks.transpose()?;
    Ok((folder.to_string(), index, RemoteShards { store, chunks }))
}

impl RemoteShards {
    /// Reads a sample: those bytes that were indexed, or those that the store gives each time.
    pub fn read(
        &self,
        index: &Index,
        id: SampleId,
        out: &mut Vec<u8>,
        stop: &Stop,
    ) -> io::Result<()> {
        match &self.chunks {
            Some(cache) => cache.read(id, &index.record(id), out, stop),
            None => chunks::read_sample(&self.store, index, id, out, stop),
        }
    }

    /// Starts to fetch a sample, if it is to be read by itself.
    pub fn begin(&self, index: &Index, id: SampleId) -> Option<Pending<Vec<u8>>> {
        if self.chunks.as_ref().is_some_and(|chunks| !chunks.wants_alone(id)) {
            return None;
        }
        let record = index.record(id);
        let name = &index.shards()[index.shard_of(id)].name;
        let end = record.offset + u64::from(record.bytes);
        Some(self.store.start_read(name, record.offset..end))
    }

    /// Reads a few bytes of a shard for a message, which is not worth much waiting.
    pub fn bytes(&self, name: &str, range: Range<u64>) -> Option<Vec<u8>> {
        self.store.read_within(name, range, NAME_DEADLINE, &Stop::default()).ok()
    }

    pub fn reader(&self, name: &str) -> io::Result<Box<dyn Read + Send>> {
        let reader = self.store.reader(name, &Stop::default()).map_err(io::Error::other)?;
        Ok(Box::new(reader))
    }

    pub fn chunks(&self) -> Option<&Arc<ChunkCache>> {
        self.chunks.as_ref()
    }

    pub fn stats(&self) -> StoreStats {
        self.store.stats()
    }
}
