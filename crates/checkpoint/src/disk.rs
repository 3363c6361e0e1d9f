//! Files on this machine that are no checkpoints: exports.

use std::path::Path;

use crate::layout::PARTIAL;
use crate::storage::{Disk, Storage};
pub(crate) use crate::storage::{FsError, Partial};

/// Creates the directories from `base` down to `path` and makes their names durable.
pub(crate) fn create_dirs(base: &Path, path: &Path) -> Result<(), FsError> {
    Disk::new().prepare(base, path)
}

/// Writes a small file over whatever has the name.
pub(crate) fn replace_small(target: &Path, text: &str) -> Result<(), FsError> {
    Disk::new().replace_small(target, text)
}

/// Removes the `.partial` of a file that only one process writes, left by an earlier life of it.
pub(crate) fn remove_stale_partial(target: &Path) -> Result<(), FsError> {
    let mut name = target.as_os_str().to_os_string();
    name.push(PARTIAL);
    Disk::new().remove_file(Path::new(&name))
}
