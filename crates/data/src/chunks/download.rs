//! The bytes of chunks and samples from their store, checked against the index.

use std::io;
use std::ops::Range;
use std::time::Instant;

use lacuna_store::{Stop, Store};
use lacuna_types::SampleId;

use crate::index::{Index, SampleRecord, crc32};

/// Bytes between two samples that are downloaded along: a request costs more.
const GAP_MAX: u64 = 256 << 10;

/// How often bytes that do not match the index are asked for: what comes twice alike is what the
/// store has, and what differs each time is no answer.
const TRIES: usize = 4;

/// The samples of a chunk, in pieces as they were read.
pub(super) struct Downloaded {
    /// First byte in the shard, and the bytes.
    pub pieces: Vec<(u64, Vec<u8>)>,
    /// Checksum of each sample, as it came.
    pub crcs: Vec<u32>,
}

impl Downloaded {
    /// Returns a sample's bytes.
    fn sample(&self, record: &SampleRecord) -> &[u8] {
        let at = self.pieces.partition_point(|(start, _)| *start <= record.offset) - 1;
        let (start, bytes) = &self.pieces[at];
        let from = (record.offset - start) as usize;
        &bytes[from..from + record.bytes as usize]
    }

    /// Tells whether every sample has the bytes that were indexed.
    pub fn is_as_indexed(&self, index: &Index, chunk: usize) -> bool {
        records(index, chunk).map(|record| record.crc).eq(self.crcs.iter().copied())
    }

    /// Copies a sample's bytes.
    pub fn copy(&self, record: &SampleRecord, out: &mut Vec<u8>) {
        out.clear();
        out.extend_from_slice(self.sample(record));
    }
}

fn records(index: &Index, chunk: usize) -> impl Iterator<Item = SampleRecord> {
    let bounds = index.chunk_bounds();
    (bounds[chunk]..bounds[chunk + 1]).map(|id| index.record(SampleId(id)))
}

/// Returns where a chunk begins and ends in its shard.
pub(super) fn span(index: &Index, chunk: usize) -> (u64, u64) {
    let end = |record: &SampleRecord| record.offset + u64::from(record.bytes);
    records(index, chunk).fold((u64::MAX, 0), |(start, last), record| {
        (start.min(record.offset), last.max(end(&record)))
    })
}

/// Returns the ranges of a chunk's shard that hold its samples, with small gaps.
fn ranges(index: &Index, chunk: usize) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = records(index, chunk)
        .map(|record| record.offset..record.offset + u64::from(record.bytes))
        .collect();
    all.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in all {
        match joined.last_mut() {
            Some(last) if range.start <= last.end + GAP_MAX => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Downloads a chunk.
///
/// # Errors
/// When the store does not give it, or gives other bytes each time.
pub(super) fn chunk(
    store: &Store,
    index: &Index,
    chunk: usize,
    stop: &Stop,
) -> io::Result<Downloaded> {
    let first = index.chunk_bounds()[chunk];
    let name = &index.shards()[index.shard_of(SampleId(first))].name;
    let once = || {
        let read = |range: Range<u64>| {
            let start = range.start;
            store.read(name, range, stop).map(|bytes| (start, bytes)).map_err(io::Error::other)
        };
        let pieces = ranges(index, chunk).into_iter().map(read).collect::<io::Result<_>>()?;
        let mut downloaded = Downloaded { pieces, crcs: Vec::new() };
        let crcs = records(index, chunk).map(|record| crc32(downloaded.sample(&record))).collect();
        downloaded.crcs = crcs;
        Ok(downloaded)
    };
    let wanted: Vec<u32> = records(index, chunk).map(|record| record.crc).collect();
    agreed(store, name, &wanted, |downloaded| downloaded.crcs.clone(), once)
}

/// Reads one sample's bytes.
///
/// # Errors
/// As [`chunk`].
pub(crate) fn sample(
    store: &Store,
    index: &Index,
    id: SampleId,
    out: &mut Vec<u8>,
    stop: &Stop,
) -> io::Result<()> {
    let record = index.record(id);
    let name = &index.shards()[index.shard_of(id)].name;
    let range = record.offset..record.offset + u64::from(record.bytes);
    let once = || store.read(name, range.clone(), stop).map_err(io::Error::other);
    *out = agreed(store, name, &[record.crc], |bytes| vec![crc32(bytes)], once)?;
    Ok(())
}

/// Asks until an answer is as indexed, or comes twice alike.
///
/// Bytes that a proxy or a cable changed may not count as those of the sample. What comes twice
/// alike is handed on as it is, so that its reader says what is wrong with which sample.
fn agreed<T>(
    store: &Store,
    name: &str,
    wanted: &[u32],
    crcs: impl Fn(&T) -> Vec<u32>,
    mut once: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    let mut before: Vec<Vec<u32>> = Vec::new();
    let start = Instant::now();
    while before.len() < TRIES && start.elapsed() < store.limits().deadline {
        let answer = once()?;
        let found = crcs(&answer);
        if found == wanted || before.contains(&found) {
            return Ok(answer);
        }
        before.push(found);
    }
    let (object, n) = (store.url_of(name), before.len());
    let text = format!("`{object}` came with other bytes each of {n} times, none as indexed");
    Err(io::Error::new(io::ErrorKind::InvalidData, text))
}
