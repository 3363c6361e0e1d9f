//! Writing past the page cache: threads fill aligned memory piece by piece and write it, so that
//! the next pieces are made while the device is busy with one.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Builder, scope};

use super::Source;
use super::pages::{ALIGN, Pages};
use super::posix::FsFile;

/// Bytes of a piece at most: enough for a disk's full rate, little next to a snapshot.
pub(super) const PIECE_BYTES: usize = 2 << 20;

/// Bytes of a file that one thread fills: it takes no longer than starting others.
const ALONE_BYTES: u64 = 8 << 20;

/// Writes all of `source` to `file` with up to so many threads, the caller's being one of them, and
/// gives the file its exact size.
///
/// It does not go through the page cache, which a training process needs for its data; where the
/// file system refuses that, it does. Memory is a piece for each thread.
pub(super) fn write_past_cache(
    file: &dyn FsFile,
    source: &dyn Source,
    threads: usize,
) -> io::Result<()> {
    // Refused by tmpfs and some network file systems: then the cache it is.
    let _ = file.set_direct(true);
    let lanes = Lanes { file, source, next: AtomicU64::new(0), failed: AtomicBool::new(false) };
    let others = if source.bytes() > ALONE_BYTES { threads.saturating_sub(1) } else { 0 };
    scope(|scope| {
        let spawned: Vec<_> = (0..others)
            .map_while(|i| {
                let named = Builder::new().name(format!("ckpt-write-{i}"));
                // With fewer threads it takes longer.
                named.spawn_scoped(scope, || lanes.work()).ok()
            })
            .collect();
        let mut first = lanes.work();
        for thread in spawned {
            let panicked = |_| Err(io::Error::other("a writing thread panicked"));
            first = first.and(thread.join().unwrap_or_else(panicked));
        }
        first
    })?;
    file.set_len(source.bytes())
}

/// What the threads of one file share.
struct Lanes<'a> {
    file: &'a dyn FsFile,
    source: &'a dyn Source,
    /// First byte that nobody writes yet.
    next: AtomicU64,
    failed: AtomicBool,
}

impl Lanes<'_> {
    /// Writes pieces until there are no more, or one could not be written.
    fn work(&self) -> io::Result<()> {
        let piece_bytes = self.source.bytes().min(PIECE_BYTES as u64) as usize;
        let mut memory = Pages::default();
        while !self.failed.load(Ordering::Relaxed) {
            let offset = self.next.fetch_add(PIECE_BYTES as u64, Ordering::Relaxed);
            let left = self.source.bytes().saturating_sub(offset);
            if left == 0 {
                break;
            }
            memory.resize(piece_bytes.next_multiple_of(ALIGN));
            let n = left.min(PIECE_BYTES as u64) as usize;
            let done = self.write(&mut memory.bytes_mut()[..n.next_multiple_of(ALIGN)], n, offset);
            if done.is_err() {
                self.failed.store(true, Ordering::Relaxed);
                return done;
            }
        }
        Ok(())
    }

    /// Writes `n` bytes, padded with zeros to whole pages; the file is cut to its size later.
    fn write(&self, pages: &mut [u8], n: usize, offset: u64) -> io::Result<()> {
        self.source.read(offset, &mut pages[..n])?;
        pages[n..].fill(0);
        match self.file.write_all_at(pages, offset) {
            // Some file systems take the flag and refuse the write.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                self.file.set_direct(false)?;
                self.file.write_all_at(pages, offset)
            }
            other => other,
        }
    }
}
