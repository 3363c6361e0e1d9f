//! Chunks of remote shards, kept on a local disk.
//!
//! One file a chunk, `<dir>/<fingerprint>/chunks/<chunk>.chunk`, which holds the bytes of its shard
//! from the chunk's first sample to its last, with holes where no sample lies. A file is written
//! under another name, synced, and renamed; whoever writes holds a lock on it, which goes with its
//! process. So what a killed process leaves is a whole chunk or a file that is written over, and
//! the workers of a machine download a chunk once. Bytes are checked against the index when they
//! come and each time they are read: a damaged file is thrown away, its chunk downloaded again.
//!
//! When the limit is reached, the chunk goes that the order needs last ([`Schedule`]).

mod disk;
mod download;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lacuna_recipe::order::{ChunkSteps, OrderMode, OrderSpec};
use lacuna_store::{Stop, Store};
use lacuna_types::SampleId;

use self::download::Downloaded;
pub(crate) use self::download::sample as read_sample;
use crate::index::{Index, SampleRecord, crc32};

/// Chunk files kept open at a time.
const FILES_OPEN_MAX: usize = 32;

/// How often a waiting thread looks whether it should stop.
const LOOK: Duration = Duration::from_millis(50);

/// A larger chunk, of another program's index, is not kept: its samples are read by themselves.
const CHUNK_KEPT_MAX: u64 = 256 << 20;

/// After the disk failed, or another process held a chunk, it is left alone for so long.
const DISK_PAUSE: Duration = Duration::from_secs(10);

/// Where chunks are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkCacheConfig {
    /// Folder of the cache; data sets have folders of their own in it.
    pub dir: PathBuf,
    /// Most bytes that the chunks of this data set may take.
    pub bytes_max: u64,
    /// Processes of this machine that share them, at least 1.
    pub sharers: usize,
}

/// What a cache of chunks has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkStats {
    /// Samples read from the disk.
    pub hits: u64,
    /// Samples whose chunk was not there.
    pub misses: u64,
    /// Chunks downloaded.
    pub downloads: u64,
    /// Chunks removed for others.
    pub evictions: u64,
    /// Files that held other bytes than they should.
    pub damaged: u64,
}

/// When chunks are needed, as the order of a run says.
pub struct Schedule {
    order: OrderSpec,
    steps_per_epoch: u64,
    now: AtomicU64,
    epochs: Mutex<Vec<Arc<ChunkSteps>>>,
}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Schedule({})", self.now.load(Ordering::Relaxed))
    }
}

impl Schedule {
    /// Builds the schedule of a run that stands at step 0.
    pub fn new(order: OrderSpec) -> Self {
        let steps_per_epoch = order.steps_per_epoch().max(1);
        Schedule { order, steps_per_epoch, now: AtomicU64::new(0), epochs: Mutex::new(Vec::new()) }
    }

    /// Says where the run stands.
    pub fn set_now(&self, step: u64) {
        self.now.store(step, Ordering::Relaxed);
    }

    fn steps(&self, epoch: u64) -> Arc<ChunkSteps> {
        let epoch = u32::try_from(epoch).unwrap_or(u32::MAX);
        let mut epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(steps) = epochs.iter().find(|steps| steps.epoch() == epoch) {
            return steps.clone();
        }
        if epochs.len() == 2 {
            epochs.remove(0);
        }
        let steps = Arc::new(ChunkSteps::new(&self.order, epoch));
        epochs.push(steps.clone());
        steps
    }

    /// Returns a function that tells the next step that may read a chunk, of this epoch or the next
    /// one, or the last number if neither does.
    pub fn next_use(&self) -> impl Fn(usize) -> u64 {
        let now = self.now.load(Ordering::Relaxed);
        let (epoch, step) = (now / self.steps_per_epoch, now % self.steps_per_epoch);
        let (this, then) = (self.steps(epoch), self.steps(epoch + 1));
        let start = epoch * self.steps_per_epoch;
        let next_start = start + self.steps_per_epoch;
        move |chunk| {
            let in_this = this.next(chunk, step).map(|step| start + step);
            in_this
                .or_else(|| then.next(chunk, 0).map(|step| next_start + step))
                .unwrap_or(u64::MAX)
        }
    }

    /// Tells whether a chunk's samples are needed near each other, so that it is worth waiting for
    /// all of it.
    fn keeps_chunks_together(&self) -> bool {
        self.order.params.mode != OrderMode::Global
    }
}

/// A chunk that cannot be had.
pub(crate) type ChunkError = io::Error;

/// The cache of one data set.
pub struct ChunkCache {
    folder: PathBuf,
    bytes_max: u64,
    sharers: u64,
    store: Arc<Store>,
    index: Arc<Index>,
    state: Mutex<State>,
    changed: Condvar,
    schedule: Mutex<Option<Arc<Schedule>>>,
    hits: AtomicU64,
    misses: AtomicU64,
    downloads: AtomicU64,
    evictions: AtomicU64,
    damaged: AtomicU64,
    told: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Open files, and when each was last asked for.
    open: BTreeMap<usize, (Arc<File>, u64)>,
    asked: u64,
    /// Chunks that a thread of this process downloads.
    coming: BTreeSet<usize>,
    /// Bytes that the chunks took when the folder was last looked at.
    scanned: u64,
    /// Bytes that this process has added since then.
    added: u64,
    /// Bytes of chunks that it is writing.
    writing: u64,
    /// Chunks that another process has held for too long, and until when they are left to it.
    held: BTreeMap<usize, Instant>,
    /// Until when the disk is left alone.
    closed_until: Option<Instant>,
}

impl fmt::Debug for ChunkCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkCache({})", self.folder.display())
    }
}

/// Takes a chunk off the list of those that come, whatever became of it.
struct Coming<'a>(&'a ChunkCache, usize);

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        self.0.lock().coming.remove(&self.1);
        self.0.changed.notify_all();
    }
}

impl ChunkCache {
    /// Opens the cache of a data set; its folder is made if it is not there.
    pub(crate) fn open(
        config: &ChunkCacheConfig,
        store: Arc<Store>,
        index: Arc<Index>,
    ) -> io::Result<Self> {
        let folder = config.dir.join(index.fingerprint().to_string()).join("chunks");
        std::fs::create_dir_all(&folder)?;
        let cache = ChunkCache {
            folder,
            bytes_max: config.bytes_max,
            sharers: config.sharers.max(1) as u64,
            store,
            index,
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            schedule: Mutex::new(None),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            downloads: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
            told: AtomicBool::new(false),
        };
        cache.remove_abandoned();
        cache.lock().scanned = cache.scan().iter().map(|(_, bytes)| bytes).sum();
        Ok(cache)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the folder of the chunks.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns how many bytes of chunks this process may have fetched and not used up, and how
    /// many of those before their first use: its part of three quarters and an eighth of all.
    pub(crate) fn ahead_bytes(&self) -> (u64, u64) {
        (self.bytes_max / 4 * 3 / self.sharers, self.bytes_max / 8 / self.sharers)
    }

    /// Tells whether chunks are worth fetching ahead: not where any sample may be next, unless
    /// there is room for all of them.
    pub(crate) fn fetches_ahead(&self) -> bool {
        let all = || self.index.shards().iter().map(|shard| shard.bytes).sum::<u64>();
        !self.reads_alone() || all() <= self.bytes_max / 4 * 3
    }

    /// Tells whether a sample is read by itself where its chunk is not there.
    fn reads_alone(&self) -> bool {
        self.schedule().is_some_and(|schedule| !schedule.keeps_chunks_together())
    }

    /// Tells whether a chunk is too large to be kept.
    fn is_too_large(&self, chunk: usize) -> bool {
        self.chunk_bytes(chunk) > self.bytes_max.min(CHUNK_KEPT_MAX)
    }

    /// Tells whether a sample is to be asked for by itself.
    pub(crate) fn wants_alone(&self, id: SampleId) -> bool {
        let chunk = self.index.chunk_of(id);
        let alone = self.reads_alone() || self.is_closed() || self.is_too_large(chunk);
        (alone || self.is_held(chunk)) && !self.has(chunk)
    }

    /// Returns what was done so far.
    pub fn stats(&self) -> ChunkStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ChunkStats {
            hits: get(&self.hits),
            misses: get(&self.misses),
            downloads: get(&self.downloads),
            evictions: get(&self.evictions),
            damaged: get(&self.damaged),
        }
    }

    /// Says by which order chunks are needed.
    pub fn set_schedule(&self, schedule: Arc<Schedule>) {
        *self.schedule.lock().unwrap_or_else(PoisonError::into_inner) = Some(schedule);
    }

    fn schedule(&self) -> Option<Arc<Schedule>> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the number of the chunk that holds a sample.
    pub fn chunk_of(&self, id: SampleId) -> usize {
        self.index.chunk_of(id)
    }

    /// Returns the bytes that a chunk spans in its shard.
    pub fn chunk_bytes(&self, chunk: usize) -> u64 {
        let (start, end) = download::span(&self.index, chunk);
        end - start
    }

    /// Reads a sample's bytes: those that were indexed, or those that the store gives each time.
    pub(crate) fn read(
        &self,
        id: SampleId,
        record: &SampleRecord,
        out: &mut Vec<u8>,
        stop: &Stop,
    ) -> Result<(), ChunkError> {
        let chunk = self.chunk_of(id);
        if self.read_kept(chunk, id, record, out) {
            self.hits.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        self.misses.fetch_add(1, Ordering::Relaxed);
        if self.wants_alone(id) {
            return download::sample(&self.store, &self.index, id, out, stop);
        }
        match self.fetch(chunk, stop)? {
            Some(downloaded) => {
                downloaded.copy(record, out);
                Ok(())
            }
            None if self.read_kept(chunk, id, record, out) => Ok(()),
            // Evicted in between.
            None => download::sample(&self.store, &self.index, id, out, stop),
        }
    }

    /// Makes sure that a chunk is on the disk; tells whether it is, or never will be.
    pub(crate) fn prefetch(&self, chunk: usize, stop: &Stop) -> Result<bool, ChunkError> {
        if self.has(chunk) || self.is_too_large(chunk) {
            return Ok(true);
        }
        if self.is_held(chunk) || self.is_closed() || !self.would_keep(chunk) {
            return Ok(false);
        }
        self.fetch(chunk, stop).map(|_| true)
    }

    /// Tells whether a chunk's file is there.
    pub fn has(&self, chunk: usize) -> bool {
        self.opened(chunk).is_some()
    }

    /// Tells whether another process has held a chunk for too long of late.
    fn is_held(&self, chunk: usize) -> bool {
        let mut state = self.lock();
        state.held.retain(|_, until| Instant::now() < *until);
        state.held.contains_key(&chunk)
    }

    fn is_closed(&self) -> bool {
        self.lock().closed_until.is_some_and(|until| Instant::now() < until)
    }

    /// Reads a sample from its chunk's file, if that is there and holds what came from the store.
    fn read_kept(
        &self,
        chunk: usize,
        id: SampleId,
        record: &SampleRecord,
        out: &mut Vec<u8>,
    ) -> bool {
        let Some(file) = self.opened(chunk) else { return false };
        let at = record.offset - download::span(&self.index, chunk).0;
        out.resize(record.bytes as usize, 0);
        if file.read_exact_at(out, at).is_ok() {
            let crc = crc32(out);
            if crc == record.crc || self.is_so_at_source(chunk, &file, id, crc) {
                return true;
            }
        }
        self.damaged.fetch_add(1, Ordering::Relaxed);
        self.remove(chunk);
        false
    }

    /// Returns the open file of a chunk.
    fn opened(&self, chunk: usize) -> Option<Arc<File>> {
        let mut state = self.lock();
        state.asked += 1;
        let asked = state.asked;
        if let Some((file, last)) = state.open.get_mut(&chunk) {
            *last = asked;
            return Some(file.clone());
        }
        let file = Arc::new(File::open(self.path(chunk)).ok()?);
        if state.open.len() >= FILES_OPEN_MAX {
            let oldest = state.open.iter().min_by_key(|(_, (_, last))| *last);
            let oldest = oldest.map(|(&chunk, _)| chunk);
            oldest.and_then(|chunk| state.open.remove(&chunk));
        }
        state.open.insert(chunk, (file.clone(), asked));
        Some(file)
    }

    /// Downloads a chunk, unless another thread or process does: then it is waited for. Returns the
    /// bytes, where it was this thread.
    fn fetch(&self, chunk: usize, stop: &Stop) -> Result<Option<Downloaded>, ChunkError> {
        let mut state = self.lock();
        while state.coming.contains(&chunk) {
            if stop.is_raised() {
                return Err(stopped());
            }
            let waited = self.changed.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if !state.coming.contains(&chunk) {
                return Ok(None);
            }
        }
        state.coming.insert(chunk);
        drop(state);
        let _coming = Coming(self, chunk);
        let mut part = match self.begin(chunk, stop)? {
            disk::Begun::There => return Ok(None),
            disk::Begun::Ours(part) => Some(part),
            disk::Begun::Busy => {
                self.lock().held.insert(chunk, Instant::now() + DISK_PAUSE);
                return Ok(None);
            }
            disk::Begun::NoDisk(error) => {
                self.close(&error);
                None
            }
        };
        let downloaded = download::chunk(&self.store, &self.index, chunk, stop);
        if downloaded.is_err() && part.is_some() {
            // Nobody else can have it while it is locked.
            let _ = self.drop_part(chunk);
        }
        let downloaded = downloaded?;
        self.downloads.fetch_add(1, Ordering::Relaxed);
        if part.is_some() && !downloaded.is_as_indexed(&self.index, chunk) {
            // The store may be repaired, and what lies here would be read all the same.
            let _ = self.drop_part(chunk);
        } else if let Some(part) = part.take()
            && let Err(error) = self.keep(chunk, part, &downloaded)
        {
            self.close(&error);
        }
        Ok(Some(downloaded))
    }

    /// Leaves the disk alone for a while, and says so once.
    fn close(&self, error: &io::Error) {
        self.lock().closed_until = Some(Instant::now() + DISK_PAUSE);
        if !self.told.swap(true, Ordering::Relaxed) {
            let folder = self.folder.display();
            tracing::warn!("cache `{folder}`: {error}; samples are read from the store meanwhile");
        }
    }
}

fn stopped() -> io::Error {
    io::Error::other("loading was stopped")
}

#[cfg(test)]
mod tests;
