//! Where checkpoints lie: the few operations that they need of a file system or an object store.
//!
//! The promises that the rest of the crate builds on are made here, once: a file that was created
//! under a name is whole and durable, a name is taken once, and what is hidden is hidden at once.
//! [`Disk`] keeps them with the calls of a POSIX file system, [`Objects`] with those of an object
//! store that creates conditionally.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

mod disk;
mod objects;
mod pages;
mod posix;
mod stage;

#[cfg(test)]
pub(crate) mod model;

pub use disk::Disk;
pub(crate) use disk::Partial;
pub use objects::Objects;
pub(crate) use pages::Pages;

/// An operation on a file or object that failed.
#[derive(Debug, thiserror::Error)]
#[error("failed to {op} `{}`", path.display())]
pub struct FsError {
    /// What was tried.
    pub op: &'static str,
    /// On which path.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

impl FsError {
    pub(crate) fn new(op: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        FsError { op, path: path.to_path_buf(), source: source.into() }
    }

    /// Tells whether another time or another user may succeed: nothing is known of the file then.
    pub fn is_passing(&self) -> bool {
        use io::ErrorKind::*;
        use rustix::io::Errno;
        let errno = self.source.raw_os_error();
        // Too many open files, here or altogether, and servers that are down.
        let passing = [Errno::MFILE, Errno::NFILE, Errno::HOSTDOWN];
        if passing.iter().any(|passing| errno == Some(passing.raw_os_error())) {
            return true;
        }
        matches!(
            self.source.kind(),
            TimedOut
                | PermissionDenied
                | Interrupted
                | WouldBlock
                | OutOfMemory
                | NotConnected
                | ConnectionAborted
                | StaleNetworkFileHandle
                | NetworkDown
                | NetworkUnreachable
                | HostUnreachable
                | ConnectionRefused
                | ConnectionReset
        )
    }

    /// Tells whether the path does not exist.
    pub fn is_not_found(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

/// Prints an error and its causes in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut out = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        out.push_str(": ");
        out.push_str(&error.to_string());
        source = error.source();
    }
    out
}

/// What publishing a file found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// The name was free and now names our file.
    Created,
    /// The name was taken; nothing changed.
    Exists,
}

/// A place for checkpoints. Paths are those of [`RunDir`](crate::layout::RunDir).
pub trait Storage: fmt::Debug + Send + Sync {
    /// Makes `folder`, below `base`, ready for files whose names shall last.
    fn prepare(&self, base: &Path, folder: &Path) -> Result<(), FsError>;

    /// Lists the names right under a folder, sorted; a folder that is not there is empty.
    fn names(&self, folder: &Path) -> Result<Vec<String>, FsError>;

    /// Reads a document of at most `max` bytes.
    fn read_small(&self, path: &Path, max: u64) -> Result<Vec<u8>, FsError>;

    /// Returns the size of a file in bytes.
    fn size(&self, path: &Path) -> Result<u64, FsError>;

    /// Opens a file to read ranges of it.
    fn open(&self, path: &Path) -> Result<Box<dyn ReadAt>, FsError>;

    /// Returns how many threads read a large file best.
    fn readers(&self) -> usize {
        3
    }

    /// Writes a small file that must not exist yet; `Created` means that it is there to stay, and
    /// with it every file that was published in its folder before.
    ///
    /// Where that takes a temporary file, its name begins with `via`, which nobody else uses; what
    /// an earlier life left there is removed.
    fn create_small(&self, via: &Path, path: &Path, text: &str) -> Result<Published, FsError>;

    /// Writes a small file over whatever has the name.
    fn replace_small(&self, path: &Path, text: &str) -> Result<(), FsError>;

    /// Begins a file of `bytes` bytes that must not exist yet.
    fn begin(&self, path: &Path, bytes: u64) -> Result<Box<dyn Sink>, FsError>;

    /// Makes a file invisible under its name, in one step and for good; where renaming can do that,
    /// it is `hidden` from then on.
    fn hide(&self, path: &Path, hidden: &Path) -> Result<(), FsError>;

    /// Removes a file; one that is not there counts as removed.
    fn remove_file(&self, path: &Path) -> Result<(), FsError>;

    /// Removes a folder with everything in it; one that is not there counts as removed.
    fn remove_folder(&self, path: &Path) -> Result<(), FsError>;

    /// Returns the bytes that are free where `folder` is, if there is a limit that can be known.
    fn free_bytes(&self, _folder: &Path) -> Option<u64> {
        None
    }

    /// Tells whether large files are written past the cache, where that can be told apart.
    fn writes_direct(&self, _folder: &Path) -> Option<bool> {
        None
    }

    /// Removes a folder if nothing is in it; best effort, since another writer may be using it.
    fn remove_empty_folder(&self, path: &Path);
}

/// A file or object under construction; dropped before it is published, it vanishes.
pub trait Sink: Send {
    /// Writes all bytes of a source, from the first byte of the file on; called once.
    fn fill(&mut self, source: &dyn Source) -> Result<(), FsError>;

    /// Makes the content durable and gives it its name, if that is free.
    ///
    /// The **name** lasts once [`Storage::create_small`] has created another file in that folder.
    fn publish(self: Box<Self>) -> Result<Published, FsError>;
}

/// The content of a file or object, for whoever writes it: each byte is asked for once, in whatever
/// order and by however many threads suit the place it goes to.
pub trait Source: Sync {
    /// Returns how many bytes there are.
    fn bytes(&self) -> u64;

    /// Fills `into` from the byte `offset` on.
    ///
    /// # Errors
    /// The writing was given up.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
}

impl Source for Vec<u8> {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self[offset as usize..][..into.len()]);
        Ok(())
    }
}

/// A file or object that is read in ranges.
pub trait ReadAt: Send + Sync {
    /// Fills `buffer` from the byte `offset` on.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}
