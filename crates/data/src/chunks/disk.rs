//! The files of the cache of chunks.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use lacuna_store::Stop;
use lacuna_types::SampleId;
use rustix::fs::{FlockOperation, flock};

use super::{ChunkCache, ChunkError, Downloaded, download, stopped};

/// How often a process looks whether another one is done with a chunk.
const LOCK_LOOK: Duration = Duration::from_millis(20);

/// A process that holds a chunk for longer hangs; the chunk is then downloaded beside it.
const LOCK_WAIT: Duration = Duration::from_secs(30);

/// Of the limit, this part is freed at a time, so that looking for what may go is rare.
const FREED_PART: u64 = 32;

/// Ending of a chunk's file.
const CHUNK: &str = "chunk";

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
        self.folder.join(format!("{chunk:08}.part"))
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
            if self.path(chunk).exists() {
                return Ok(Begun::There);
            }
            // The file that was locked may have become the chunk, and the chunk evicted since.
            let same = fs::metadata(self.part(chunk)).ok().zip(part.metadata().ok());
            if same.is_some_and(|(named, locked)| named.ino() == locked.ino()) {
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
        let bytes: u64 = downloaded.pieces.iter().map(|(_, piece)| piece.len() as u64).sum();
        if bytes > self.bytes_max {
            return self.drop_part(chunk);
        }
        self.make_room(chunk, bytes);
        let mut written = self.write(chunk, &part, downloaded);
        if matches!(&written, Err(error) if error.kind() == io::ErrorKind::StorageFull) {
            // Others use the disk too: what was planned to fit may not.
            self.evict(chunk, bytes);
            written = self.write(chunk, &part, downloaded);
        }
        match written {
            Ok(()) => {
                self.lock().bytes += bytes;
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

    fn drop_part(&self, chunk: usize) -> io::Result<()> {
        fs::remove_file(self.part(chunk))
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

    /// Removes chunks until `bytes` more fit below the limit.
    fn make_room(&self, incoming: usize, bytes: u64) {
        if self.lock().bytes + bytes > self.bytes_max {
            let there: u64 = self.scan().iter().map(|(_, bytes)| bytes).sum();
            self.lock().bytes = there;
            if there + bytes > self.bytes_max {
                let over = there + bytes - self.bytes_max;
                self.evict(incoming, over.max(self.bytes_max / FREED_PART));
            }
        }
    }

    /// Removes chunks of so many bytes: those that are needed last.
    fn evict(&self, incoming: usize, bytes: u64) {
        let mut there = self.scan();
        match self.schedule() {
            Some(schedule) => {
                let next_use = schedule.next_use();
                there.sort_by_cached_key(|(chunk, _)| std::cmp::Reverse(next_use(*chunk)));
            }
            // Nobody has said what is needed when: any is as good as another.
            None => there.sort(),
        }
        let mut freed: u64 = 0;
        for (chunk, takes) in there {
            if freed >= bytes {
                break;
            }
            if chunk != incoming && self.remove(chunk) {
                freed += takes;
                self.evictions.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
        let mut state = self.lock();
        state.bytes = state.bytes.saturating_sub(freed);
    }

    /// Removes a chunk; whoever has it open reads on.
    pub(super) fn remove(&self, chunk: usize) -> bool {
        self.lock().open.remove(&chunk);
        fs::remove_file(self.path(chunk)).is_ok()
    }
}
