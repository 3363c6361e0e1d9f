//! A cache of decoded JPEG on a local disk: planes, from which a crop takes half the time or less.
//!
//! Nothing here can fail a step: what is not there, or is damaged, is decoded from its JPEG again,
//! and the pixels are the same. The cache needs libjpeg-turbo, the feature `turbo`.

use std::io;
use std::path::PathBuf;

#[cfg(not(feature = "turbo"))]
mod absent;
#[cfg(feature = "turbo")]
mod fill;
#[cfg(feature = "turbo")]
mod store;

#[cfg(not(feature = "turbo"))]
pub use absent::PlaneCache;
#[cfg(feature = "turbo")]
pub use store::PlaneCache;

/// Whether this build can have a cache.
pub const HAS_PLANES: bool = cfg!(feature = "turbo");

/// When planes are added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Whenever they are not there.
    Always,
    /// Once steps have waited for data more than a hundredth of their time, and then only as many
    /// as cost a tenth of the time that decoding takes.
    WhenWaiting,
}

/// A cache that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenCacheError {
    /// The folder cannot be made or read.
    #[error("the cache folder `{}` cannot be used", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// This build decodes JPEG in Rust.
    #[error("a cache of planes needs libjpeg-turbo, which this build lacks (`make setup`)")]
    NoTurbo,
}

/// What a cache has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Crops that were rendered from planes.
    pub hits: u64,
    /// Crops whose planes were not there.
    pub misses: u64,
    /// Planes that were thrown away because their checksum was wrong.
    pub damaged: u64,
    /// Bytes on the disk, as far as this process knows.
    pub bytes: u64,
    /// Whether planes are no longer added, because the disk or the limit is full.
    pub full: bool,
    /// Whether planes are added at all by now.
    pub filling: bool,
}
