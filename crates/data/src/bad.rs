//! Which samples of an index are known to be bad: a bitmap in a file beside the index.
//!
//! The bytes are described in `docs/formats.md`. `lacuna data verify` writes the file; nothing that
//! trains reads it: samples are taken out of the index itself, see [`exclude`](crate::exclude).

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use lacuna_types::SampleId;

use crate::dataset::Dataset;
use crate::files::write_atomic;
use crate::index::{Fingerprint, INDEX_NAME};

/// Ending that takes the place of the index's own: `index.bad` lies beside `index.lacuna`.
pub const BAD_EXTENSION: &str = "bad";

/// Version of the format that this build reads and writes.
pub const BAD_VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"LACUNABD";
const HEADER_BYTES: usize = 64;
const DIGEST_BYTES: usize = 32;

/// A file of bad samples that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadBadError {
    /// The file could not be read.
    #[error("failed to read `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another kind of file.
    #[error("`{}` lists no bad samples: it does not start with LACUNABD", path.display())]
    NotAList {
        /// The file.
        path: PathBuf,
    },
    /// A format that this build does not know.
    #[error("`{}` has version {found}, this build reads {BAD_VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// It was written for another index.
    #[error(
        "`{}` lists bad samples of data {found}, the index is {expected}: `lacuna data verify` \
         writes it again",
        path.display()
    )]
    OtherData {
        /// The file.
        path: PathBuf,
        /// Fingerprint in the file.
        found: Fingerprint,
        /// Fingerprint of the index.
        expected: Fingerprint,
    },
    /// Changed after it was written, or cut off.
    #[error("`{}` is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// Samples of one index, one bit for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSamples {
    fingerprint: Fingerprint,
    n_samples: u64,
    n_bad: u64,
    /// Sample i is bit i % 8 of byte i / 8.
    bits: Vec<u8>,
}

impl BadSamples {
    /// Builds the bitmap of a data set of which no bad sample is known.
    pub fn none_of(dataset: &Dataset) -> Self {
        let n_samples = dataset.n_samples();
        // An index in memory holds 24 bytes a sample, so an eighth of one is affordable.
        let bits = vec![0; n_samples.div_ceil(8) as usize];
        BadSamples { fingerprint: dataset.fingerprint(), n_samples, n_bad: 0, bits }
    }

    /// Remembers that a sample is bad.
    ///
    /// # Panics
    /// If the data set has no such sample.
    pub fn mark(&mut self, id: SampleId) {
        assert!(id.0 < self.n_samples, "sample {id} is in the index");
        let (byte, bit) = ((id.0 / 8) as usize, 1 << (id.0 % 8));
        self.n_bad += u64::from(self.bits[byte] & bit == 0);
        self.bits[byte] |= bit;
    }

    /// Tells whether a sample is bad; one that the index does not have is not.
    pub fn contains(&self, id: SampleId) -> bool {
        self.bits.get((id.0 / 8) as usize).is_some_and(|byte| byte >> (id.0 % 8) & 1 == 1)
    }

    /// Returns the number of bad samples.
    pub fn n_bad(&self) -> u64 {
        self.n_bad
    }

    /// Returns the number of samples, bad or not.
    pub fn n_samples(&self) -> u64 {
        self.n_samples
    }

    /// Returns the identity of the data set that this is about.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Returns the bad samples in order.
    pub fn ids(&self) -> impl Iterator<Item = SampleId> {
        (0..self.n_samples).map(SampleId).filter(|id| self.contains(*id))
    }

    /// Writes the bitmap beside the index, whole or not at all; one without a bad sample leaves no
    /// file there.
    ///
    /// Returns the path of the file, if there is one now.
    pub fn write(&self, index_path: &Path) -> io::Result<Option<PathBuf>> {
        let path = bad_path(index_path);
        if self.n_bad > 0 {
            write_atomic(&path, &self.encode())?;
            return Ok(Some(path));
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(None),
        }
    }

    /// Reads the bitmap that lies beside the index of `dataset`.
    pub fn read(index_path: &Path, dataset: &Dataset) -> Result<Self, ReadBadError> {
        let path = bad_path(index_path);
        let io = |source| ReadBadError::Io { path: path.clone(), source };
        let mut bytes: Vec<u8> = Vec::new();
        // One byte more than there should be, to see whether the file ends.
        let most = (HEADER_BYTES + DIGEST_BYTES) as u64 + dataset.n_samples().div_ceil(8) + 1;
        File::open(&path).and_then(|f| f.take(most).read_to_end(&mut bytes)).map_err(io)?;
        BadSamples::parse(&bytes, &path, dataset)
    }

    /// Checks the bytes of a bitmap of `dataset`; `path` is named in errors.
    pub fn parse(bytes: &[u8], path: &Path, dataset: &Dataset) -> Result<Self, ReadBadError> {
        let path = || path.to_path_buf();
        let damaged = |what| ReadBadError::Damaged { path: path(), what };
        if bytes.get(..8) != Some(&MAGIC[..]) {
            return Err(ReadBadError::NotAList { path: path() });
        }
        let too_short = || damaged("it ends inside its header");
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(too_short());
        };
        let word = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
        // The version, in the lower half, and a field that is 0, in the upper one.
        let version = word(8);
        if version as u32 != BAD_VERSION {
            return Err(ReadBadError::Version { path: path(), found: version as u32 });
        }
        let found = Fingerprint(header[16..48].try_into().expect("32 bytes"));
        let expected = dataset.fingerprint();
        if found != expected {
            return Err(ReadBadError::OtherData { path: path(), found, expected });
        }
        let (bits, digest) = rest.split_last_chunk::<DIGEST_BYTES>().ok_or_else(too_short)?;
        if blake3::hash(&bytes[..HEADER_BYTES + bits.len()]) != *digest {
            return Err(damaged("its digest does not match its content"));
        }
        let (n_samples, n_bad) = (word(48), word(56));
        let is_sized = n_samples == dataset.n_samples()
            && bits.len() as u64 == n_samples.div_ceil(8)
            && version >> 32 == 0;
        let n_set: u64 = bits.iter().map(|byte| u64::from(byte.count_ones())).sum();
        let bad = BadSamples { fingerprint: found, n_samples, n_bad, bits: bits.to_vec() };
        if !is_sized || n_set != n_bad || bad.ids().count() as u64 != n_bad {
            return Err(damaged("its counts do not match its content"));
        }
        Ok(bad)
    }

    fn encode(&self) -> Vec<u8> {
        let mut out: Vec<u8> = Vec::with_capacity(HEADER_BYTES + self.bits.len() + DIGEST_BYTES);
        out.extend(MAGIC);
        out.extend(BAD_VERSION.to_le_bytes());
        out.extend(0u32.to_le_bytes());
        out.extend(self.fingerprint.0);
        out.extend(self.n_samples.to_le_bytes());
        out.extend(self.n_bad.to_le_bytes());
        out.extend(&self.bits);
        let digest = blake3::hash(&out);
        out.extend(digest.as_bytes());
        out
    }
}

/// Returns the path of the index of the data set that [`Dataset::open`] opens at `path`.
pub fn index_path(path: &Path) -> PathBuf {
    if path.is_dir() { path.join(INDEX_NAME) } else { path.to_path_buf() }
}

/// Returns where the bitmap of an index lies.
pub fn bad_path(index_path: &Path) -> PathBuf {
    index_path.with_extension(BAD_EXTENSION)
}

#[cfg(test)]
mod tests;
