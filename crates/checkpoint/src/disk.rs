//! Files on this machine that are no checkpoints: exports and imports.

use std::path::Path;

use crate::layout::PARTIAL;
use crate::storage::{Disk, Storage};
pub(crate) use crate::storage::{FsError, Partial};

/// Creates the directories from `base` down to `path` and makes their names durable.
pub(crate) fn create_dirs(base: &Path, path: &Path) -> Result<(), FsError> {
    Disk::new().prepare(base, path)
}

/// Lists the names in a directory, sorted; a directory that is not there is empty.
pub(crate) fn names(path: &Path) -> Result<Vec<String>, FsError> {
    Disk::new().names(path)
}

/// Reads a document of at most `max` bytes.
pub(crate) fn read_small(path: &Path, max: u64) -> Result<Vec<u8>, FsError> {
    Disk::new().read_small(path, max)
}

/// Removes a file; one that is not there counts as removed.
pub(crate) fn remove_file(path: &Path) -> Result<(), FsError> {
    Disk::new().remove_file(path)
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> Result<(), FsError> {
    Disk::new().sync_dir(path)
}

/// Removes the `.partial` of a file that only one process writes, left by an earlier life of it.
pub(crate) fn remove_stale_partial(target: &Path) -> Result<(), FsError> {
    let mut name = target.as_os_str().to_os_string();
    name.push(PARTIAL);
    Disk::new().remove_file(Path::new(&name))
}
