//! Without libjpeg-turbo there is no cache.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lacuna_types::SampleId;

use super::{CacheStats, Fill, OpenCacheError};
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
        _fill: Fill,
    ) -> Result<Self, OpenCacheError> {
        Err(OpenCacheError::NoTurbo)
    }

    /// Takes note that of `passed`, a stream's consumer waited so long for slots.
    pub fn waited(&self, _waited: Duration, _passed: Duration) {
        match self.0 {}
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
