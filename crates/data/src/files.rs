//! Files that appear whole or not at all.

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Ending of a file that is being written.
pub(crate) const PARTIAL: &str = ".partial";

/// Returns the name under which `path` is written until it is complete.
pub(crate) fn partial_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(PARTIAL);
    PathBuf::from(name)
}

/// Gives the complete, synced file its final name, and makes the name durable.
pub(crate) fn publish(path: &Path) -> io::Result<()> {
    fs::rename(partial_path(path), path)?;
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
        _ => Ok(()),
    }
}

/// Writes a file so that readers see the old content or the new one.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(partial_path(path))?;
    file.write_all(bytes)?;
    file.sync_all()?;
    publish(path)
}

/// Formats an error and its causes in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
