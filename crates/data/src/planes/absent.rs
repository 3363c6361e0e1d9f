//! Without libjpeg-turbo there is no cache.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;

use lacuna_types::SampleId;

use super::{CacheStats, OpenCacheError};
use crate::dataset::Dataset;

/// A cache that nobody can have.
#[derive(Debug)]
pub struct PlaneCache(Infallible);

impl PlaneCache {
    /// Says that this build has none.
    pub fn open(
        _dir: &Path,
        _bytes_max: u64,
        _dataset: Arc<Dataset>,
    ) -> Result<Self, OpenCacheError> {
        Err(OpenCacheError::NoTurbo)
    }

    /// Tells whether a sample's planes are there.
    pub fn holds(&self, _id: SampleId) -> bool {
        match self.0 {}
    }

    /// Returns what it has done so far.
    pub fn stats(&self) -> CacheStats {
        match self.0 {}
    }
}
