//! The file-system calls that durability hangs on, each with the path in its error.

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FallocateFlags, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::layout::PARTIAL;

/// A file-system call that failed.
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

/// A file under construction, removed when dropped before it is published.
pub(crate) struct Partial {
    pub file: File,
    path: PathBuf,
    target: PathBuf,
    published: bool,
}

/// What publishing a file found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Published {
    /// The name was free and now names our file.
    Created,
    /// The name was taken; nothing changed.
    Exists,
}

impl Partial {
    /// Creates `<target>.partial`, which must not exist.
    pub fn create(target: &Path) -> Result<Self, FsError> {
        let mut name = target.as_os_str().to_os_string();
        name.push(PARTIAL);
        let path = PathBuf::from(name);
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = file.map_err(|e| FsError::new("create", &path, e))?;
        Ok(Partial { file, path, target: target.to_path_buf(), published: false })
    }

    /// Reserves `bytes` on the device, so that a full disk shows before anything is written.
    pub fn reserve(&self, bytes: u64) -> Result<(), FsError> {
        match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, bytes) {
            // Some network file systems cannot reserve; the writes then find the disk full.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(e) => Err(self.error("reserve space for", e)),
        }
    }

    /// Makes the content durable and gives the file its name, if that name is free.
    ///
    /// A failed sync is final: the kernel may have dropped the pages, so the file is removed.
    pub fn publish(mut self) -> Result<Published, FsError> {
        self.file.sync_all().map_err(|e| self.error("sync", e))?;
        let published = self.rename_new()?;
        if published == Published::Created {
            self.published = true;
            sync_parent(&self.target)?;
        }
        Ok(published)
    }

    /// Makes the content durable and replaces whatever has the name.
    pub fn replace(mut self) -> Result<(), FsError> {
        self.file.sync_all().map_err(|e| self.error("sync", e))?;
        fs::rename(&self.path, &self.target).map_err(|e| self.error("rename", e))?;
        self.published = true;
        sync_parent(&self.target)
    }

    pub fn error(&self, op: &'static str, source: impl Into<io::Error>) -> FsError {
        FsError::new(op, &self.path, source)
    }

    fn rename_new(&self) -> Result<Published, FsError> {
        let flags = RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(CWD, &self.path, CWD, &self.target, flags) {
            Ok(()) => Ok(Published::Created),
            Err(Errno::EXIST) => Ok(Published::Exists),
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.link_new(),
            Err(e) => Err(self.error("rename", e)),
        }
    }

    /// The same by a hard link, for file systems whose rename cannot refuse to replace.
    fn link_new(&self) -> Result<Published, FsError> {
        match fs::hard_link(&self.path, &self.target) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                // Over a network the reply may have been lost: two links mean that it is ours.
                let links = fs::metadata(&self.path).map_err(|e| self.error("inspect", e))?.nlink();
                if links != 2 {
                    return Ok(Published::Exists);
                }
            }
            Err(e) => return Err(self.error("link", e)),
        }
        fs::remove_file(&self.path).map_err(|e| self.error("remove", e))?;
        Ok(Published::Created)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.published {
            // Best effort: a file that stays is ignored by readers and removed with its attempt.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Bytes gathered before a write: enough for a disk's full rate, little next to a snapshot.
const STAGE_BYTES: usize = 4 << 20;

/// Alignment of memory, places and sizes that direct writes need on common devices.
const DIRECT_ALIGN: usize = 4096;

/// Appends to a file past the page cache, which a training process needs for its data.
///
/// Where the file system refuses, it writes through the cache.
pub(crate) struct DirectWriter<'a> {
    file: &'a File,
    memory: Vec<u8>,
    start: usize,
    filled: usize,
    written: u64,
    direct: bool,
}

impl<'a> DirectWriter<'a> {
    /// Writes `file` from its beginning.
    pub fn new(file: &'a File) -> Self {
        let memory: Vec<u8> = vec![0; STAGE_BYTES + DIRECT_ALIGN];
        let start = memory.as_ptr().align_offset(DIRECT_ALIGN);
        let start = if start <= DIRECT_ALIGN { start } else { 0 };
        let direct = set_direct(file, true).is_ok();
        DirectWriter { file, memory, start, filled: 0, written: 0, direct }
    }

    /// Appends `bytes`.
    pub fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(STAGE_BYTES - self.filled));
            let at = self.start + self.filled;
            self.memory[at..at + now.len()].copy_from_slice(now);
            self.filled += now.len();
            if self.filled == STAGE_BYTES {
                self.flush(STAGE_BYTES)?;
            }
            bytes = later;
        }
        Ok(())
    }

    /// Writes what is left and gives the file its exact size.
    pub fn finish(mut self) -> io::Result<()> {
        let total = self.written + self.filled as u64;
        if self.filled > 0 {
            let padded = self.filled.next_multiple_of(DIRECT_ALIGN);
            let end = self.start + padded;
            self.memory[self.start + self.filled..end].fill(0);
            self.flush(padded)?;
        }
        self.file.set_len(total)
    }

    fn flush(&mut self, bytes: usize) -> io::Result<()> {
        let staged = &self.memory[self.start..self.start + bytes];
        let result = self.file.write_all_at(staged, self.written);
        let refused = |e: &io::Error| e.kind() == io::ErrorKind::InvalidInput;
        if self.direct && result.as_ref().is_err_and(refused) {
            self.direct = false;
            set_direct(self.file, false)?;
            self.file.write_all_at(staged, self.written)?;
        } else {
            result?;
        }
        self.written += bytes as u64;
        self.filled = 0;
        Ok(())
    }
}

fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    let mut flags = rustix::fs::fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, direct);
    Ok(rustix::fs::fcntl_setfl(file, flags)?)
}

/// Writes a small file that must not exist yet.
pub(crate) fn create_small(target: &Path, text: &str) -> Result<Published, FsError> {
    small(target, text)?.publish()
}

/// Writes a small file that must not exist yet, under construction beside another name.
pub(crate) fn create_small_at(
    partial: &Path,
    target: &Path,
    text: &str,
) -> Result<Published, FsError> {
    let mut partial = small(partial, text)?;
    partial.target = target.to_path_buf();
    partial.publish()
}

/// Writes a small file over whatever has the name.
pub(crate) fn replace_small(target: &Path, text: &str) -> Result<(), FsError> {
    small(target, text)?.replace()
}

fn small(target: &Path, text: &str) -> Result<Partial, FsError> {
    let mut partial = Partial::create(target)?;
    partial.file.write_all(text.as_bytes()).map_err(|e| partial.error("write", e))?;
    Ok(partial)
}

/// Removes the `.partial` of a file that only one process writes, left by an earlier life of it.
pub(crate) fn remove_stale_partial(target: &Path) -> Result<(), FsError> {
    let mut name = target.as_os_str().to_os_string();
    name.push(PARTIAL);
    remove_file(Path::new(&name))
}

/// Removes a file; one that is not there counts as removed.
pub(crate) fn remove_file(path: &Path) -> Result<(), FsError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(FsError::new("remove", path, e)),
        _ => Ok(()),
    }
}

/// Creates the directories from `base` down to `path` and makes their names durable.
pub(crate) fn create_dirs(base: &Path, path: &Path) -> Result<(), FsError> {
    fs::create_dir_all(path).map_err(|e| FsError::new("create directory", path, e))?;
    // Another writer may have created a directory and died before its sync, so sync all of them.
    let mut at = path;
    while at != base {
        let Some(parent) = at.parent() else { break };
        sync_dir(parent)?;
        at = parent;
    }
    Ok(())
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> Result<(), FsError> {
    // A relative path of one component has the empty path as its parent.
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let dir = File::open(path).map_err(|e| FsError::new("open directory", path, e))?;
    dir.sync_all().map_err(|e| FsError::new("sync directory", path, e))
}

fn sync_parent(path: &Path) -> Result<(), FsError> {
    path.parent().map_or(Ok(()), sync_dir)
}

/// Lists the names in a directory, sorted; a directory that is not there is empty.
pub(crate) fn names(path: &Path) -> Result<Vec<String>, FsError> {
    let list = match fs::read_dir(path) {
        Ok(list) => list,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(FsError::new("list", path, e)),
    };
    let mut out: Vec<String> = Vec::new();
    for entry in list {
        let entry = entry.map_err(|e| FsError::new("list", path, e))?;
        // Names that are not UTF-8 are not ours.
        out.extend(entry.file_name().into_string().ok());
    }
    out.sort();
    Ok(out)
}

/// Reads a document of at most `max` bytes.
pub(crate) fn read_small(path: &Path, max: u64) -> Result<Vec<u8>, FsError> {
    let file = File::open(path).map_err(|e| FsError::new("open", path, e))?;
    let mut bytes: Vec<u8> = Vec::new();
    let read = file.take(max + 1).read_to_end(&mut bytes);
    read.map_err(|e| FsError::new("read", path, e))?;
    if bytes.len() as u64 > max {
        let error = io::Error::other(format!("larger than {max} bytes"));
        return Err(FsError::new("read", path, error));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
