//! Images in Parquet files, as Hugging Face's `datasets` writes them, read to be packed.
//!
//! Which columns are meant is described in `docs/formats.md`. Reading needs the feature `parquet`;
//! without it this module only says so.

use std::error::Error;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

#[cfg_attr(not(feature = "parquet"), path = "parquet/absent.rs")]
mod rows;

pub(crate) use self::rows::Rows;

/// Parquet files that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadParquetError {
    /// The file could not be opened.
    #[error("failed to read `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// This build reads no Parquet.
    #[error(
        "`{}` is a Parquet file, which this build cannot read: build it with \
         `cargo build --release -p lacuna-cli --features parquet`",
        path.display()
    )]
    NotBuilt {
        /// The file.
        path: PathBuf,
    },
    /// Something in the file is not as it should be.
    #[error("failed to read {place} of `{}`", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Which part of it.
        place: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// No column is the image.
    #[error(
        "`{}` has no column `image` or `img` of binary data, or of a struct with such a field \
         `bytes`; its columns: {columns}",
        path.display()
    )]
    NoImages {
        /// The file.
        path: PathBuf,
        /// Names of the columns there are.
        columns: String,
    },
    /// A row that cannot be used.
    #[error("row {row} of `{}` cannot be used: {what}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Number of the row in its file, from 0.
        row: u64,
        /// What is wrong with it.
        what: String,
    },
}

/// Tells whether a file's name is that of a Parquet file.
pub(crate) fn is_parquet(path: &Path) -> bool {
    path.extension().is_some_and(|suffix| suffix.eq_ignore_ascii_case("parquet"))
}

/// Lists the Parquet files of a folder by name, those of folders in it left out.
pub(crate) fn list(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if is_parquet(&path) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(all(test, feature = "parquet"))]
pub(crate) mod tests;
