//! The calls of a POSIX file system that durability hangs on, and the kernel's own.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{CWD, FallocateFlags, OFlags, RenameFlags};
use rustix::io::Errno;

/// A file system, call by call: nothing is durable before it is synced.
pub(crate) trait Fs: fmt::Debug + Send + Sync {
    /// Creates a file that must not exist.
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn FsFile>>;
    /// Opens a file to read it.
    fn open(&self, path: &Path) -> io::Result<Box<dyn FsFile>>;
    /// Renames, over whatever has the name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Renames to a free name; `Unsupported` where the file system cannot refuse to replace.
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Gives a file another name, which must be free.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Returns a file's size and the number of its names.
    fn inspect(&self, path: &Path) -> io::Result<(u64, u64)>;
    /// Removes a name of a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Creates a folder inside one that exists.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty folder.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes the names in a folder durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Lists a folder: names, and whether each is a folder itself.
    fn list(&self, path: &Path) -> io::Result<Vec<(String, bool)>>;
    /// Returns the bytes that are free for this user.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
}

/// An open file.
pub(crate) trait FsFile: Send + Sync {
    /// Writes at a place.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Reads at a place.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Cuts or extends.
    fn set_len(&self, bytes: u64) -> io::Result<()>;
    /// Reserves space on the device; `Unsupported` where that cannot be done.
    fn reserve(&self, bytes: u64) -> io::Result<()>;
    /// Makes the content durable.
    fn sync(&self) -> io::Result<()>;
    /// Switches writing past the page cache on or off.
    fn set_direct(&self, direct: bool) -> io::Result<()>;
}

/// The file system of this machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Posix;

fn unsupported(errno: Errno) -> io::Error {
    match errno {
        Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP => io::ErrorKind::Unsupported.into(),
        errno => errno.into(),
    }
}

impl Fs for Posix {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn FsFile>> {
        Ok(Box::new(OpenOptions::new().write(true).create_new(true).open(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn FsFile>> {
        Ok(Box::new(File::open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).map_err(unsupported)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    fn inspect(&self, path: &Path) -> io::Result<(u64, u64)> {
        let found = fs::metadata(path)?;
        Ok((found.len(), found.nlink()))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn list(&self, path: &Path) -> io::Result<Vec<(String, bool)>> {
        let mut out: Vec<(String, bool)> = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            // Names that are not UTF-8 are not ours.
            if let Ok(name) = entry.file_name().into_string() {
                out.push((name, entry.file_type()?.is_dir()));
            }
        }
        Ok(out)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let found = rustix::fs::statvfs(path)?;
        if found.f_blocks == 0 {
            // Some file systems of other machines do not say.
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }
}

impl FsFile for File {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, offset)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        File::set_len(self, bytes)
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        rustix::fs::fallocate(self, FallocateFlags::empty(), 0, bytes).map_err(unsupported)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }

    fn set_direct(&self, direct: bool) -> io::Result<()> {
        let mut flags = rustix::fs::fcntl_getfl(self)?;
        flags.set(OFlags::DIRECT, direct);
        Ok(rustix::fs::fcntl_setfl(self, flags)?)
    }
}
