//! The files of the cache of chunks.

use std::cmp::Reverse;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use lacuna_store::Stop;
use lacuna_types::SampleId;
use rustix::fs::{FlockOperation, flock};

use super::{ChunkCache, ChunkError, Downloaded, download, stopped};

/// How often a process looks whether another one is done with a chunk.
const LOCK_LOOK: Duration = Duration::from_millis(20);

/// A process that holds a chunk for longer may be frozen: the chunk's samples are then read by
/// themselves.
const LOCK_WAIT: Duration = Duration::from_secs(3);

/// Of the limit, this part is freed at a time, so that looking for what may go is rare.
const FREED_PART: u64 = 32;

/// Ending of a chunk's file.
const CHUNK: &str = "chunk";

/// Ending of a file that is to become one.
const PART: &str = "part";

/// Unit in which file systems give room.
const PAGE: u64 = 4096;

/// What was found where a chunk is to be.
pub(super) enum Begun {
    /// Another process has just brought it.
    There,
    /// This process brings it: its file, locked.
    Ours(File),
    /// Another process has been at it for too long.
    Busy,
    /// The disk does not take it.
    NoDisk(io::Error),
}

impl ChunkCache {
    /// Returns the path of a chunk's file.
    pub(super) fn path(&self, chunk: usize) -> PathBuf {
        self.folder.join(format!("{chunk:08}.{CHUNK}"))
    }

    fn part(&self, chunk: usize) -> PathBuf {
        self.folder.join(format!("{chunk:08}.{PART}"))
    }

    /// Locks the file that a chunk is written to; waits while another process downloads it.
    pub(super) fn begin(&self, chunk: usize, stop: &Stop) -> Result<Begun, ChunkError> {
        let start = Instant::now();
        loop {
            let part = match self.create(chunk) {
                Ok(part) => part,
                Err(error) => return Ok(Begun::NoDisk(error)),
            };
            while let Err(error) = flock(&part, FlockOperation::NonBlockingLockExclusive) {
                if error != rustix::io::Errno::WOULDBLOCK {
                    return Ok(Begun::NoDisk(error.into()));
                }
                if stop.is_raised() {
                    return Err(stopped());
                }
                if start.elapsed() > LOCK_WAIT {
                    return Ok(Begun::Busy);
                }
                thread::sleep(LOCK_LOOK);
            }
            // The file that was locked may have become the chunk, and the chunk evicted since.
            let same = fs::metadata(self.part(chunk)).ok().zip(part.metadata().ok());
            let is_part = same.is_some_and(|(named, locked)| named.ino() == locked.ino());
            if self.path(chunk).exists() {
                if is_part {
                    let _ = self.drop_part(chunk);
                }
                return Ok(Begun::There);
            }
            if is_part {
                return Ok(Begun::Ours(part));
            }
        }
    }

    fn create(&self, chunk: usize) -> io::Result<File> {
        let mut options = File::options();
        options.write(true).create(true).truncate(false);
        match options.open(self.part(chunk)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // The folder was removed under way.
                fs::create_dir_all(&self.folder)?;
                options.open(self.part(chunk))
            }
            opened => opened,
        }
    }

    /// Writes a chunk and gives it its name; the lock goes with the file.
    pub(super) fn keep(&self, chunk: usize, part: File, downloaded: &Downloaded) -> io::Result<()> {
        // As a file system counts them, with the checksums behind them.
        let takes = |(_, piece): &(u64, Vec<u8>)| (piece.len() as u64).next_multiple_of(PAGE);
        let bytes = downloaded.pieces.iter().map(takes).sum::<u64>() + PAGE;
        let _writing = Writing::begin(self, bytes);
        if !self.make_room(chunk) {
            return self.drop_part(chunk);
        }
        let mut written = self.write(chunk, &part, downloaded);
        if matches!(&written, Err(error) if error.kind() == io::ErrorKind::StorageFull) {
            // Others use the disk too: what was planned to fit may not.
            self.evict(None, bytes);
            written = self.write(chunk, &part, downloaded);
        }
        match written {
            Ok(()) => {
                self.lock().added += bytes;
                Ok(())
            }
            // The folder was removed under way: that is no failure of the disk.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => {
                let _ = self.drop_part(chunk);
                Err(error)
            }
        }
    }

    fn write(&self, chunk: usize, part: &File, downloaded: &Downloaded) -> io::Result<()> {
        let (start, end) = download::span(&self.index, chunk);
        part.set_len(0)?;
        for (at, piece) in &downloaded.pieces {
            part.write_all_at(piece, at - start)?;
        }
        let crcs: Vec<u8> = downloaded.crcs.iter().flat_map(|crc| crc.to_le_bytes()).collect();
        part.write_all_at(&crcs, end - start)?;
        part.sync_data()?;
        fs::rename(self.part(chunk), self.path(chunk))
    }

    /// Tells whether a sample's bytes, which are not as indexed, are what the store has.
    pub(super) fn is_so_at_source(
        &self,
        chunk: usize,
        file: &File,
        id: SampleId,
        crc: u32,
    ) -> bool {
        let (start, end) = download::span(&self.index, chunk);
        let nth = id.0 - self.index.chunk_bounds()[chunk];
        let mut came = [0; 4];
        let read = file.read_exact_at(&mut came, end - start + 4 * nth);
        read.is_ok() && u32::from_le_bytes(came) == crc
    }

    pub(super) fn drop_part(&self, chunk: usize) -> io::Result<()> {
        fs::remove_file(self.part(chunk))
    }

    /// Removes the files of writers that are gone.
    pub(super) fn remove_abandoned(&self) {
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|ending| ending == PART)
                && let Ok(file) = File::open(&path)
                && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
            {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// Returns the chunks that are there, and the bytes that each takes.
    pub(super) fn scan(&self) -> Vec<(usize, u64)> {
        let Ok(entries) = fs::read_dir(&self.folder) else { return Vec::new() };
        // Another process may just have removed one.
        let chunk = |entry: fs::DirEntry| {
            let name = entry.file_name();
            let number = name.to_str()?.strip_suffix(CHUNK)?.strip_suffix('.')?.parse().ok()?;
            Some((number, 512 * entry.metadata().ok()?.blocks()))
        };
        entries.filter_map(|entry| chunk(entry.ok()?)).collect()
    }

    /// Tells whether a chunk would be kept: whether it fits once everything is gone that is needed
    /// after it.
    pub(super) fn would_keep(&self, chunk: usize) -> bool {
        let bytes = self.chunk_bytes(chunk).next_multiple_of(PAGE) + PAGE;
        let writing = {
            let state = self.lock();
            if state.scanned + state.added + state.writing + bytes <= self.bytes_max {
                return true;
            }
            state.writing
        };
        let Some(schedule) = self.schedule() else { return true };
        let next_use = schedule.next_use();
        let first = next_use(chunk);
        let stays = |(other, bytes): (usize, u64)| if next_use(other) < first { bytes } else { 0 };
        self.scan().into_iter().map(stays).sum::<u64>() + writing + bytes <= self.bytes_max
    }

    /// Removes chunks until what is being written fits below the limit too; tells whether it does.
    ///
    /// The folder is looked at again after each part of the limit that this process has added, as
    /// others add to it as well.
    fn make_room(&self, incoming: usize) -> bool {
        let part = self.bytes_max / FREED_PART;
        let is_due = {
            let state = self.lock();
            let all = state.scanned + state.added + state.writing;
            all > self.bytes_max || state.added > part / self.sharers
        };
        if !is_due {
            return true;
        }
        let there: u64 = self.scan().iter().map(|(_, bytes)| bytes).sum();
        let over = {
            let mut state = self.lock();
            (state.scanned, state.added) = (there, 0);
            (there + state.writing).saturating_sub(self.bytes_max)
        };
        over == 0 || self.evict(Some(incoming), over.max(part)) >= over
    }

    /// Removes chunks of so many bytes, those that are needed last; returns the bytes that became
    /// free. Nothing goes that is needed before `incoming`.
    fn evict(&self, incoming: Option<usize>, bytes: u64) -> u64 {
        let mut there: Vec<(u64, usize, u64)> = match self.schedule() {
            Some(schedule) => {
                let next_use = schedule.next_use();
                let first = incoming.map_or(0, &next_use);
                let ranked = self.scan().into_iter().map(|(c, bytes)| (next_use(c), c, bytes));
                ranked.filter(|(next, _, _)| incoming.is_none() || *next >= first).collect()
            }
            // Nobody has said what is needed when: any is as good as another.
            None => self.scan().into_iter().map(|(chunk, bytes)| (0, chunk, bytes)).collect(),
        };
        there.sort_by_key(|(next, chunk, _)| Reverse((*next, *chunk)));
        let mut freed: u64 = 0;
        for (_, chunk, takes) in there {
            if freed >= bytes {
                break;
            }
            if Some(chunk) != incoming && self.remove(chunk) {
                freed += takes;
                self.evictions.fetch_add(1, Ordering::Relaxed);
            }
        }
        let mut state = self.lock();
        state.scanned = state.scanned.saturating_sub(freed);
        freed
    }

    /// Removes a chunk; whoever has it open reads on.
    pub(super) fn remove(&self, chunk: usize) -> bool {
        self.lock().open.remove(&chunk);
        fs::remove_file(self.path(chunk)).is_ok()
    }
}

/// Counts bytes as being written, as long as it lives.
struct Writing<'a>(&'a ChunkCache, u64);

impl<'a> Writing<'a> {
    fn begin(cache: &'a ChunkCache, bytes: u64) -> Self {
        cache.lock().writing += bytes;
        Writing(cache, bytes)
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.lock().writing -= self.1;
    }
}
