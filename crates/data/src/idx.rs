//! IDX files, the format of MNIST and its kin: grey images or labels in one array, gzipped or not.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

/// Most bytes of an array: the largest of these sets has 0.6 GB, and the array is held in memory.
const ARRAY_BYTES_MAX: u64 = 4 << 30;

const MAGIC_LABELS: u32 = 0x0801;
const MAGIC_IMAGES: u32 = 0x0803;

/// Grey images of one size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdxImages {
    /// Rows of an image.
    pub height: u32,
    /// Columns of an image.
    pub width: u32,
    /// Images one after another.
    pub pixels: Vec<u8>,
}

impl IdxImages {
    /// Returns the number of images.
    pub fn n(&self) -> u64 {
        self.pixels.len() as u64 / (u64::from(self.height) * u64::from(self.width))
    }

    /// Returns the pixels of image number `i`.
    pub fn image(&self, i: u64) -> &[u8] {
        let bytes = self.height as usize * self.width as usize;
        &self.pixels[i as usize * bytes..][..bytes]
    }
}

/// An IDX file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadIdxError {
    /// Reading failed, or the file ends early.
    #[error("failed to read idx file `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another kind of file.
    #[error(
        "`{}` is not an idx file of {what}: it starts with {found:08x}, not {expected:08x}",
        path.display()
    )]
    Magic {
        /// The file.
        path: PathBuf,
        /// What was to be read.
        what: &'static str,
        /// First four bytes there are.
        found: u32,
        /// First four bytes there should be.
        expected: u32,
    },
    /// Sizes that make no sense.
    #[error("idx file `{}` has sizes {dims:?}", path.display())]
    Dims {
        /// The file.
        path: PathBuf,
        /// Sizes by the header.
        dims: Vec<u32>,
    },
    /// More data than the sizes say.
    #[error("idx file `{}` goes on after its {expected} values", path.display())]
    Trailing {
        /// The file.
        path: PathBuf,
        /// Values by the header.
        expected: u64,
    },
}

/// Reads a file of images (magic 0x803: unsigned bytes, three dimensions).
pub fn read_images(path: &Path) -> Result<IdxImages, ReadIdxError> {
    let (dims, pixels) = read_array::<3>(path, "images", MAGIC_IMAGES)?;
    let [_, height, width] = dims;
    if height == 0 || width == 0 || height > 65_535 || width > 65_535 {
        return Err(ReadIdxError::Dims { path: path.to_path_buf(), dims: dims.to_vec() });
    }
    Ok(IdxImages { height, width, pixels })
}

/// Reads a file of labels (magic 0x801: unsigned bytes, one dimension).
pub fn read_labels(path: &Path) -> Result<Vec<u8>, ReadIdxError> {
    let (_, labels) = read_array::<1>(path, "labels", MAGIC_LABELS)?;
    Ok(labels)
}

fn read_array<const D: usize>(
    path: &Path,
    what: &'static str,
    expected: u32,
) -> Result<([u32; D], Vec<u8>), ReadIdxError> {
    let io = |source| ReadIdxError::Io { path: path.to_path_buf(), source };
    let mut reader = open(path).map_err(io)?;
    let mut word = || -> io::Result<u32> {
        let mut raw: [u8; 4] = [0; 4];
        reader.read_exact(&mut raw)?;
        Ok(u32::from_be_bytes(raw))
    };
    let found = word().map_err(io)?;
    if found != expected {
        return Err(ReadIdxError::Magic { path: path.to_path_buf(), what, found, expected });
    }
    let mut dims: [u32; D] = [0; D];
    for dim in &mut dims {
        *dim = word().map_err(io)?;
    }
    let product = dims.iter().try_fold(1u64, |n, &dim| n.checked_mul(u64::from(dim)));
    let Some(n) = product.filter(|n| (1..=ARRAY_BYTES_MAX).contains(n)) else {
        return Err(ReadIdxError::Dims { path: path.to_path_buf(), dims: dims.to_vec() });
    };
    let mut values: Vec<u8> = Vec::new();
    // One more than there should be, to see whether the file ends.
    reader.take(n + 1).read_to_end(&mut values).map_err(io)?;
    if values.len() as u64 > n {
        let path = path.to_path_buf();
        return Err(ReadIdxError::Trailing { path, expected: n });
    }
    if (values.len() as u64) < n {
        let text = format!("{} of {n} values", values.len());
        return Err(io(io::Error::new(io::ErrorKind::UnexpectedEof, text)));
    }
    Ok((dims, values))
}

/// Opens a file that may be gzipped, which its first two bytes tell.
fn open(path: &Path) -> io::Result<Box<dyn Read>> {
    let mut head: Vec<u8> = Vec::new();
    File::open(path)?.take(2).read_to_end(&mut head)?;
    let file = BufReader::new(File::open(path)?);
    Ok(if head == [0x1F, 0x8B] { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) })
}

#[cfg(test)]
mod tests;
