//! Blocks read by several threads and handed over in order: a device is busy while digests of
//! earlier blocks are computed and bytes are put in their places.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Mutex, PoisonError};

use lacuna_recipe::digest::Crc64;

use super::{BlockReader, ReadError};
use crate::layout::RunDir;
use crate::manifest::Manifest;
use crate::storage::Pages;

/// Less than this is read by the caller's thread.
const SMALL_BYTES: u64 = 32 << 20;

/// A block of a part that is wanted.
pub(super) struct Task {
    /// Index of the file.
    pub file: u32,
    /// Index of the block.
    pub block: u64,
    /// Bytes of the block whose digests are wanted.
    pub pieces: Vec<Range<usize>>,
}

/// A block that was read and compared.
pub(super) struct Block<'a> {
    pub bytes: &'a [u8],
    /// Digests of the pieces that were wanted.
    pub digests: Vec<Crc64>,
}

/// A block that was read or not, with its place in the list and its memory.
type Done = (usize, Pages, Result<Vec<Crc64>, ReadError>);

/// Tells the caller that a thread died, whose block it would wait for.
struct Died<'a>(&'a Sender<Done>);

impl Drop for Died<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Nobody listens where the caller has given up.
            let _ = self.0.send((usize::MAX, Pages::default(), Ok(Vec::new())));
        }
    }
}

/// Reads the blocks of `tasks` and hands each to `take` in their order, until it returns an error.
///
/// Memory is two blocks more than there are threads.
pub(super) fn for_each<'a>(
    dir: &RunDir,
    manifest: &Manifest,
    tasks: &'a [Task],
    mut take: impl FnMut(&'a Task, Result<Block<'_>, ReadError>) -> Result<(), ReadError>,
) -> Result<(), ReadError> {
    let bytes: u64 = tasks.iter().map(|task| bytes_of(manifest, task)).sum();
    if bytes < SMALL_BYTES {
        let mut lane = Lane { dir, manifest, open: None };
        let mut buffer = Pages::default();
        return tasks.iter().try_for_each(|task| {
            let read = lane.read(task, &mut buffer);
            take(task, read.map(|digests| Block { bytes: buffer.bytes(), digests }))
        });
    }
    let n_lanes = dir.storage().readers();
    let (free, empty) = sync_channel::<Pages>(n_lanes + 2);
    let next = Mutex::new((empty, 0));
    std::thread::scope(|scope| {
        // Dropped at the end of this closure, whereupon threads that wait for memory end.
        let free = free;
        let (done_tx, done) = channel::<Done>();
        for _ in 0..n_lanes {
            let (next, done_tx) = (&next, done_tx.clone());
            scope.spawn(move || Lane { dir, manifest, open: None }.work(tasks, next, &done_tx));
        }
        (0..n_lanes + 2).for_each(|_| free.send(Pages::default()).expect("there is room for all"));
        let mut early: BTreeMap<usize, Done> = BTreeMap::new();
        for (i, task) in tasks.iter().enumerate() {
            let (_, buffer, read) = loop {
                if let Some(done) = early.remove(&i) {
                    break done;
                }
                let one = done.recv().expect("whoever took a block on hands it over");
                assert!(one.0 != usize::MAX, "a reading thread died");
                early.insert(one.0, one);
            };
            take(task, read.map(|digests| Block { bytes: buffer.bytes(), digests }))?;
            // Refused where all blocks are taken on and the threads have ended.
            let _ = free.send(buffer);
        }
        Ok(())
    })
}

fn bytes_of(manifest: &Manifest, task: &Task) -> u64 {
    let range = manifest.files[task.file as usize].block_range(task.block);
    range.end - range.start
}

/// What one thread has open.
struct Lane<'a> {
    dir: &'a RunDir,
    manifest: &'a Manifest,
    open: Option<BlockReader<'a>>,
}

impl Lane<'_> {
    /// Reads a block into `buffer`; returns the digests of its pieces.
    fn read(&mut self, task: &Task, buffer: &mut Pages) -> Result<Vec<Crc64>, ReadError> {
        let reader = match self.open.take().filter(|reader| reader.idx == task.file) {
            Some(reader) => reader,
            None => BlockReader::open(self.dir, self.manifest, task.file)?,
        };
        self.open.insert(reader).read(task.block, buffer, &task.pieces)
    }

    /// Takes blocks on, in order and each with memory for it, so that the one that is wanted next
    /// never lacks any.
    fn work(mut self, tasks: &[Task], next: &Mutex<(Receiver<Pages>, usize)>, done: &Sender<Done>) {
        let _died = Died(done);
        loop {
            let (i, mut buffer) = {
                let mut next = next.lock().unwrap_or_else(PoisonError::into_inner);
                let Ok(buffer) = next.0.recv() else { return };
                next.1 += 1;
                (next.1 - 1, buffer)
            };
            let Some(task) = tasks.get(i) else { return };
            let read = self.read(task, &mut buffer);
            if done.send((i, buffer, read)).is_err() {
                return;
            }
        }
    }
}
