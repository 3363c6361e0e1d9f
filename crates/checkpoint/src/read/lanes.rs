//! Blocks read by several threads and handed over in order: a device is busy while digests of
//! earlier blocks are computed and bytes are put in their places.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Mutex, PoisonError};

use super::{BlockReader, ReadError};
use crate::layout::RunDir;
use crate::manifest::Manifest;

/// Less than this is read by the caller's thread.
const SMALL_BYTES: u64 = 32 << 20;

/// A block of a part: index of the file, index of the block.
pub(super) type BlockId = (u32, u64);

/// A block that was read or not, with its place in the list and its memory.
type Done = (usize, Vec<u8>, Result<(), ReadError>);

/// Tells the caller that a thread died, whose block it would wait for.
struct Died<'a>(&'a Sender<Done>);

impl Drop for Died<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Nobody listens where the caller has given up.
            let _ = self.0.send((usize::MAX, Vec::new(), Ok(())));
        }
    }
}

/// Reads `blocks` and hands each to `take` in their order, until it returns an error.
///
/// Memory is two blocks more than there are threads.
pub(super) fn for_each(
    dir: &RunDir,
    manifest: &Manifest,
    blocks: &[BlockId],
    mut take: impl FnMut(BlockId, Result<&[u8], ReadError>) -> Result<(), ReadError>,
) -> Result<(), ReadError> {
    let bytes: u64 = blocks.iter().map(|id| bytes_of(manifest, *id)).sum();
    if bytes < SMALL_BYTES {
        let mut lane = Lane { dir, manifest, open: None };
        let mut buffer: Vec<u8> = Vec::new();
        return blocks.iter().try_for_each(|id| {
            let read = lane.read(*id, &mut buffer);
            take(*id, read.map(|()| &buffer[..]))
        });
    }
    let n_lanes = dir.storage().readers();
    let (free, empty) = sync_channel::<Vec<u8>>(n_lanes + 2);
    let next = Mutex::new((empty, 0));
    std::thread::scope(|scope| {
        // Dropped at the end of this closure, whereupon threads that wait for memory end.
        let free = free;
        let (done_tx, done) = channel::<Done>();
        for _ in 0..n_lanes {
            let (next, done_tx) = (&next, done_tx.clone());
            scope.spawn(move || Lane { dir, manifest, open: None }.work(blocks, next, &done_tx));
        }
        (0..n_lanes + 2).for_each(|_| free.send(Vec::new()).expect("there is room for all"));
        let mut early: BTreeMap<usize, Done> = BTreeMap::new();
        for (i, id) in blocks.iter().enumerate() {
            let (_, buffer, read) = loop {
                if let Some(done) = early.remove(&i) {
                    break done;
                }
                let one = done.recv().expect("whoever took a block on hands it over");
                assert!(one.0 != usize::MAX, "a reading thread died");
                early.insert(one.0, one);
            };
            take(*id, read.map(|()| &buffer[..]))?;
            // Refused where all blocks are taken on and the threads have ended.
            let _ = free.send(buffer);
        }
        Ok(())
    })
}

fn bytes_of(manifest: &Manifest, (file, block): BlockId) -> u64 {
    let range = manifest.files[file as usize].block_range(block);
    range.end - range.start
}

/// What one thread has open.
struct Lane<'a> {
    dir: &'a RunDir,
    manifest: &'a Manifest,
    open: Option<BlockReader<'a>>,
}

impl Lane<'_> {
    fn read(&mut self, (file, block): BlockId, buffer: &mut Vec<u8>) -> Result<(), ReadError> {
        let reader = match self.open.take().filter(|reader| reader.idx == file) {
            Some(reader) => reader,
            None => BlockReader::open(self.dir, self.manifest, file)?,
        };
        self.open.insert(reader).read(block, buffer)
    }

    /// Takes blocks on, in order and each with memory for it, so that the one that is wanted next
    /// never lacks any.
    fn work(
        mut self,
        blocks: &[BlockId],
        next: &Mutex<(Receiver<Vec<u8>>, usize)>,
        done: &Sender<Done>,
    ) {
        let _died = Died(done);
        loop {
            let (i, mut buffer) = {
                let mut next = next.lock().unwrap_or_else(PoisonError::into_inner);
                let Ok(buffer) = next.0.recv() else { return };
                next.1 += 1;
                (next.1 - 1, buffer)
            };
            let Some(id) = blocks.get(i) else { return };
            let read = self.read(*id, &mut buffer);
            if done.send((i, buffer, read)).is_err() {
                return;
            }
        }
    }
}
