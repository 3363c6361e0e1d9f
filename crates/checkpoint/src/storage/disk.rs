//! Checkpoints on a file system: write under another name, sync, rename, sync the folder.

use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::pages::{ALIGN, Pages, is_aligned};
use super::posix::{Fs, FsFile, Posix};
use super::stage::write_past_cache;
use super::{FsError, Published, ReadAt, Sink, Source, Storage};
use crate::layout::PARTIAL;

/// Threads that fill a large file: a device is busy with one piece while others are made.
const WRITERS: usize = 3;

/// How often a folder's parent is made: whoever removes empty folders may do so in between, once
/// for each attempt that is over.
const CREATE_TRIES: usize = 3;

/// A file system as a place for checkpoints.
#[derive(Clone, Debug)]
pub struct Disk {
    fs: Arc<dyn Fs>,
    writers: usize,
    /// Whether large files are read past the page cache.
    reads_direct: bool,
}

impl Disk {
    /// Uses the file system of this machine; large files are read past the page cache, so that
    /// what is compared is what the device has.
    pub fn new() -> Self {
        Disk { fs: Arc::new(Posix), writers: WRITERS, reads_direct: true }
    }

    /// The same for one of `n` processes of this machine that read the same files: with others,
    /// they are read through the page cache, and by the device once.
    pub fn shared_by(n: usize) -> Self {
        Disk { reads_direct: n <= 1, ..Disk::new() }
    }

    /// Uses another file system, and no thread but the caller's.
    #[cfg(test)]
    pub(crate) fn over(fs: Arc<dyn Fs>) -> Self {
        Disk { fs, writers: 1, reads_direct: false }
    }

    fn create_dir_all(&self, path: &Path) -> Result<(), FsError> {
        let failed = |e: io::Error| FsError::new("create directory", path, e);
        let mut n_tries = 0;
        loop {
            match self.fs.create_dir(path) {
                // Perhaps another writer was faster.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => return Ok(()),
                Err(e) if e.kind() == ErrorKind::NotFound && n_tries < CREATE_TRIES => {
                    n_tries += 1;
                    let parent = path.parent().ok_or_else(|| failed(e))?;
                    self.create_dir_all(parent)?;
                }
                done => return done.map_err(failed),
            }
        }
    }

    pub(crate) fn sync_dir(&self, path: &Path) -> Result<(), FsError> {
        // A relative path of one component has the empty path as its parent.
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        self.fs.sync_dir(path).map_err(|e| FsError::new("sync directory", path, e))
    }

    fn sync_parent(&self, path: &Path) -> Result<(), FsError> {
        path.parent().map_or(Ok(()), |parent| self.sync_dir(parent))
    }

    /// Writes a small file under another name; it is not durable yet.
    fn small(&self, via: &Path, text: &str) -> Result<Partial, FsError> {
        self.remove_file(&partial_of(via))?;
        let partial = Partial::create_on(self, via)?;
        let written = partial.file.write_all_at(text.as_bytes(), 0);
        written.map_err(|e| partial.error("write", e))?;
        Ok(partial)
    }
}

impl Default for Disk {
    fn default() -> Self {
        Disk::new()
    }
}

fn partial_of(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_os_string();
    name.push(PARTIAL);
    PathBuf::from(name)
}

impl Storage for Disk {
    fn prepare(&self, base: &Path, folder: &Path) -> Result<(), FsError> {
        let base_is_new = self.fs.list(base).is_err();
        self.create_dir_all(folder)?;
        if base_is_new {
            // Best effort above the folder that was named: it may belong to others.
            base.ancestors().skip(1).for_each(|above| drop(self.sync_dir(above)));
        }
        // Another writer may have created one and died before its sync, so sync all of them.
        let mut at = folder;
        while at != base {
            let Some(parent) = at.parent() else { break };
            self.sync_dir(parent)?;
            at = parent;
        }
        Ok(())
    }

    fn names(&self, folder: &Path) -> Result<Vec<String>, FsError> {
        let mut out: Vec<String> = match self.fs.list(folder) {
            Ok(list) => list.into_iter().map(|(name, _)| name).collect(),
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(FsError::new("list", folder, e)),
        };
        out.sort();
        Ok(out)
    }

    fn read_small(&self, path: &Path, max: u64) -> Result<Vec<u8>, FsError> {
        let (bytes, _) = self.fs.inspect(path).map_err(|e| FsError::new("open", path, e))?;
        if bytes > max {
            let error = io::Error::other(format!("larger than {max} bytes"));
            return Err(FsError::new("read", path, error));
        }
        let file = self.fs.open(path).map_err(|e| FsError::new("open", path, e))?;
        let mut out: Vec<u8> = vec![0; bytes as usize];
        file.read_exact_at(&mut out, 0).map_err(|e| FsError::new("read", path, e))?;
        Ok(out)
    }

    fn size(&self, path: &Path) -> Result<u64, FsError> {
        let found = self.fs.inspect(path).map_err(|e| FsError::new("inspect", path, e))?;
        Ok(found.0)
    }

    fn open(&self, path: &Path) -> Result<Box<dyn ReadAt>, FsError> {
        let file = self.fs.open(path).map_err(|e| FsError::new("open", path, e))?;
        // Refused by tmpfs and some network file systems: then the cache it is.
        let direct = if self.reads_direct { self.fs.open(path).ok() } else { None };
        let direct = direct.filter(|file| file.set_direct(true).is_ok());
        Ok(Box::new(OnDisk { file, direct }))
    }

    fn create_small(&self, via: &Path, path: &Path, text: &str) -> Result<Published, FsError> {
        let mut partial = self.small(via, text)?;
        partial.target = path.to_path_buf();
        let published = partial.publish()?;
        // Whoever has the name may have died before this.
        self.sync_parent(path)?;
        Ok(published)
    }

    fn replace_small(&self, path: &Path, text: &str) -> Result<(), FsError> {
        self.small(path, text)?.replace()
    }

    fn begin(&self, path: &Path, bytes: u64) -> Result<Box<dyn Sink>, FsError> {
        let partial = Partial::create_on(self, path)?;
        partial.reserve(bytes)?;
        Ok(Box::new(PartFile { partial, writers: self.writers }))
    }

    fn hide(&self, path: &Path, hidden: &Path) -> Result<(), FsError> {
        self.fs.rename(path, hidden).map_err(|e| FsError::new("rename", path, e))?;
        self.sync_parent(path)
    }

    fn remove_file(&self, path: &Path) -> Result<(), FsError> {
        match self.fs.remove_file(path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(FsError::new("remove", path, e)),
            _ => Ok(()),
        }
    }

    fn remove_folder(&self, path: &Path) -> Result<(), FsError> {
        let mut list = match self.fs.list(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            list => list.map_err(|e| FsError::new("list", path, e))?,
        };
        // Parts come before receipts.
        list.sort();
        for (name, is_dir) in list {
            let path = path.join(name);
            if is_dir { self.remove_folder(&path)? } else { self.remove_file(&path)? }
        }
        match self.fs.remove_dir(path) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                Err(FsError::new("remove directory", path, e))
            }
            _ => Ok(()),
        }
    }

    fn free_bytes(&self, folder: &Path) -> Option<u64> {
        self.fs.free_bytes(folder).ok()
    }

    fn writes_direct(&self, folder: &Path) -> Option<bool> {
        let partial = Partial::create_on(self, &folder.join("direct")).ok()?;
        let page = Pages::new(ALIGN);
        let set = partial.file.set_direct(true);
        let written = set.and_then(|()| partial.file.write_all_at(page.bytes(), 0));
        Some(written.is_ok())
    }

    fn remove_empty_folder(&self, path: &Path) {
        let _ = self.fs.remove_dir(path);
    }
}

struct OnDisk {
    file: Box<dyn FsFile>,
    /// The same past the page cache: whole pages only, into memory that starts one.
    direct: Option<Box<dyn FsFile>>,
}

impl ReadAt for OnDisk {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let direct = self.direct.as_ref().filter(|_| is_aligned(buffer, offset));
        let Some(direct) = direct else { return self.file.read_exact_at(buffer, offset) };
        let (pages, rest) = buffer.split_at_mut(buffer.len() / ALIGN * ALIGN);
        match direct.read_exact_at(pages, offset) {
            // Some file systems take the flag and refuse the read, and some devices want more.
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                self.file.read_exact_at(pages, offset)?;
            }
            read => read?,
        }
        self.file.read_exact_at(rest, offset + pages.len() as u64)
    }
}

/// A large file under construction.
struct PartFile {
    partial: Partial,
    writers: usize,
}

impl Sink for PartFile {
    fn fill(&mut self, source: &dyn Source) -> Result<(), FsError> {
        let filled = write_past_cache(self.partial.file.as_ref(), source, self.writers);
        filled.map_err(|e| self.partial.error("write", e))
    }

    fn publish(mut self: Box<Self>) -> Result<Published, FsError> {
        self.partial.publish()
    }
}

/// A file under construction, removed when dropped before it is published.
pub(crate) struct Partial {
    disk: Disk,
    file: Arc<dyn FsFile>,
    path: PathBuf,
    target: PathBuf,
    published: bool,
}

impl Partial {
    /// Creates `<target>.partial`, which must not exist, on this machine.
    pub fn create(target: &Path) -> Result<Self, FsError> {
        Partial::create_on(&Disk::new(), target)
    }

    fn create_on(disk: &Disk, target: &Path) -> Result<Self, FsError> {
        let path = partial_of(target);
        let file = disk.fs.create_new(&path).map_err(|e| FsError::new("create", &path, e))?;
        let (disk, target) = (disk.clone(), target.to_path_buf());
        Ok(Partial { disk, file: file.into(), path, target, published: false })
    }

    /// Reserves `bytes` on the device, so that a full disk shows before anything is written.
    pub fn reserve(&self, bytes: u64) -> Result<(), FsError> {
        match self.file.reserve(bytes) {
            // Some network file systems cannot reserve; the writes then find the disk full.
            Err(e) if e.kind() != ErrorKind::Unsupported => Err(self.error("reserve space for", e)),
            _ => Ok(()),
        }
    }

    /// Returns what appends to the file from its beginning.
    pub fn writer(&self) -> PartialWriter<'_> {
        PartialWriter { file: self.file.as_ref(), at: 0 }
    }

    /// Makes the content durable and gives the file its name, if that name is free.
    ///
    /// A failed sync is final: the kernel may have dropped the pages, so the file is removed. The
    /// name lasts when its folder is synced.
    fn publish(&mut self) -> Result<Published, FsError> {
        self.sync()?;
        let published = self.rename_new()?;
        self.published = published == Published::Created;
        Ok(published)
    }

    /// Makes the content durable.
    pub fn sync(&self) -> Result<(), FsError> {
        self.file.sync().map_err(|e| self.error("sync", e))
    }

    /// Makes the content durable and replaces whatever has the name.
    pub fn replace(mut self) -> Result<(), FsError> {
        self.sync()?;
        let renamed = self.disk.fs.rename(&self.path, &self.target);
        renamed.map_err(|e| self.error("rename", e))?;
        self.published = true;
        self.disk.sync_parent(&self.target)
    }

    pub fn error(&self, op: &'static str, source: impl Into<io::Error>) -> FsError {
        FsError::new(op, &self.path, source)
    }

    fn rename_new(&self) -> Result<Published, FsError> {
        match self.disk.fs.rename_new(&self.path, &self.target) {
            Ok(()) => Ok(Published::Created),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(Published::Exists),
            Err(e) if e.kind() == ErrorKind::Unsupported => self.link_new(),
            Err(e) => Err(self.error("rename", e)),
        }
    }

    /// The same by a hard link, for file systems whose rename cannot refuse to replace.
    fn link_new(&self) -> Result<Published, FsError> {
        let fs = &self.disk.fs;
        match fs.link(&self.path, &self.target) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                // Over a network the reply may have been lost: two links mean that it is ours.
                let links = fs.inspect(&self.path).map_err(|e| self.error("inspect", e))?.1;
                if links != 2 {
                    return Ok(Published::Exists);
                }
            }
            Err(e) => return Err(self.error("link", e)),
        }
        fs.remove_file(&self.path).map_err(|e| self.error("remove", e))?;
        Ok(Published::Created)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.published {
            // Best effort: a file that stays is ignored by readers and removed with its attempt.
            let _ = self.disk.fs.remove_file(&self.path);
        }
    }
}

/// Appends to a file under construction.
pub(crate) struct PartialWriter<'a> {
    file: &'a dyn FsFile,
    at: u64,
}

impl Write for PartialWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_all_at(bytes, self.at)?;
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
