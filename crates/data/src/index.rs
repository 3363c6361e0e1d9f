//! The index of a data set: which sample lies where, in one file beside the shards.
//!
//! The bytes are described in `docs/formats.md`. An index is checked completely when it is opened,
//! so everything later may rely on it; bytes from disk never panic.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use lacuna_pixels::Codec;
use lacuna_types::SampleId;

use crate::files::write_atomic;

/// Name of the index in a data set's folder.
pub const INDEX_NAME: &str = "index.lacuna";

/// Version of the format that this build reads and writes.
pub const INDEX_VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"LACUNAIX";
const HEADER_BYTES: usize = 48;
const RECORD_BYTES: usize = 24;
const DIGEST_BYTES: usize = 32;
const SHARD_FIXED_BYTES: usize = 50;
const NO_LABEL: u32 = 0xFF_FFFF;

/// Largest class label: 24 bits, of which the last value means none.
pub const LABEL_MAX: u32 = NO_LABEL - 1;

/// Makes a label of a number from a column of labels, where -1 is a common word for none.
pub(crate) fn label_of(value: i128) -> Result<Option<u32>, String> {
    match u32::try_from(value) {
        Ok(label) if label <= LABEL_MAX => Ok(Some(label)),
        _ if value == -1 => Ok(None),
        _ => Err(format!("its label {value} is not a number up to {LABEL_MAX}")),
    }
}

/// A chunk is closed once it spans this much of a shard: large enough that reading it whole is
/// cheaper than seeking, small enough that a lane's few chunks stay in memory.
pub const CHUNK_BYTES: u64 = 16 << 20;

/// Most bytes of an index: 24 GiB hold 10^9 samples.
pub(crate) const INDEX_BYTES_MAX: u64 = 32 << 30;

/// Identity of a data set's content: the BLAKE3 digest that its index ends with.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 32]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// One shard, as the index knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardEntry {
    /// File name, relative to the index.
    pub name: String,
    /// Size of the file.
    pub bytes: u64,
    /// BLAKE3 of the file.
    pub digest: [u8; 32],
}

/// One sample, as the index knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleRecord {
    /// First byte of the image in its shard.
    pub offset: u64,
    /// Bytes of the image.
    pub bytes: u32,
    /// CRC-32 (ISO-HDLC) of the image's bytes.
    pub crc: u32,
    /// Columns of the image.
    pub width: u16,
    /// Rows of the image.
    pub height: u16,
    /// Format of the image.
    pub codec: Codec,
    /// Class, up to [`LABEL_MAX`].
    pub label: Option<u32>,
}

/// A shard together with its samples in file order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardRecords {
    /// The shard.
    pub entry: ShardEntry,
    /// Its samples.
    pub records: Vec<SampleRecord>,
}

/// An index file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadIndexError {
    /// The file could not be read.
    #[error("failed to read index `{}`", path.display())]
    Io {
        /// The index.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Some other file.
    #[error("`{}` is not an index: it does not start with LACUNAIX", path.display())]
    NotAnIndex {
        /// The file.
        path: PathBuf,
    },
    /// Written by another version.
    #[error(
        "index `{}` has version {found}, this build reads {INDEX_VERSION}: \
         write it again with `lacuna data index`",
        path.display()
    )]
    Version {
        /// The index.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// Shorter or longer than it says.
    #[error("index `{}` has {found} bytes where its header says {expected}", path.display())]
    Length {
        /// The index.
        path: PathBuf,
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        expected: u64,
    },
    /// Changed after it was written.
    #[error("index `{}` is damaged: its digest does not match its content", path.display())]
    Digest {
        /// The index.
        path: PathBuf,
    },
    /// Content that makes no sense.
    #[error("index `{}` is wrong at byte {offset}: {what}", path.display())]
    Content {
        /// The index.
        path: PathBuf,
        /// Where.
        offset: usize,
        /// What is wrong there.
        what: String,
    },
}

/// A checked index.
#[derive(Clone, Debug)]
pub struct Index {
    bytes: Vec<u8>,
    shards: Vec<ShardEntry>,
    /// First sample of each shard, and last the number of samples.
    shard_starts: Vec<u64>,
    chunk_bounds: Arc<[u64]>,
    records_at: usize,
    fingerprint: Fingerprint,
}

impl Index {
    /// Builds the index of `shards`; chunks are cut here.
    ///
    /// # Panics
    /// If the records contradict their shards: they come from this crate's own code.
    pub fn build(shards: &[ShardRecords]) -> Self {
        let bytes = encode(shards);
        Index::parse(bytes, Path::new("(being built)")).expect("a built index is valid")
    }

    /// Reads and checks the index at `path`.
    pub fn read(path: &Path) -> Result<Self, ReadIndexError> {
        let io = |source| ReadIndexError::Io { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(io)?;
        let found = file.metadata().map_err(io)?.len();
        if found > INDEX_BYTES_MAX {
            let path = path.to_path_buf();
            let expected = INDEX_BYTES_MAX;
            return Err(ReadIndexError::Length { path, found, expected });
        }
        let mut bytes: Vec<u8> = Vec::with_capacity(found as usize);
        file.take(INDEX_BYTES_MAX).read_to_end(&mut bytes).map_err(io)?;
        Index::parse(bytes, path)
    }

    /// Writes the index into `folder`, whole or not at all.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        write_atomic(&folder.join(INDEX_NAME), &self.bytes)
    }

    /// Returns the bytes of the file.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Checks the bytes of an index; `path` is named in errors.
    pub fn parse(bytes: Vec<u8>, path: &Path) -> Result<Self, ReadIndexError> {
        let owned = || path.to_path_buf();
        if bytes.get(..8) != Some(&MAGIC[..]) {
            return Err(ReadIndexError::NotAnIndex { path: owned() });
        }
        let mut reader = Reader { bytes: &bytes, at: 8, path };
        let found = reader.u32("version")?;
        if found != INDEX_VERSION {
            let path = owned();
            return Err(ReadIndexError::Version { path, found });
        }
        let reserved = reader.u32("reserved field")?;
        let expected = reader.u64("length")?;
        if bytes.len() as u64 != expected || bytes.len() < HEADER_BYTES + DIGEST_BYTES {
            return Err(ReadIndexError::Length {
                path: owned(),
                found: bytes.len() as u64,
                expected,
            });
        }
        let content = bytes.len() - DIGEST_BYTES;
        let digest: [u8; 32] = *blake3::hash(&bytes[..content]).as_bytes();
        if digest != bytes[content..] {
            return Err(ReadIndexError::Digest { path: owned() });
        }
        reader.bytes = &bytes[..content];
        let counts = Counts {
            shards: reader.u32("number of shards")?,
            chunks: reader.u32("number of chunks")?,
            samples: reader.u64("number of samples")?,
        };
        let zero = reader.u64("reserved field")?;
        if (reserved, zero) != (0, 0) {
            return Err(reader.wrong(12, "a reserved field is not 0"));
        }
        let parts = parse_parts(&mut reader, counts)?;
        let (shards, shard_starts, chunk_bounds, records_at) = parts;
        Ok(Index {
            shards,
            shard_starts,
            chunk_bounds: chunk_bounds.into(),
            records_at,
            fingerprint: Fingerprint(digest),
            bytes,
        })
    }

    /// Returns the identity of the content.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Returns the number of samples, at least 1.
    pub fn n_samples(&self) -> u64 {
        self.shard_starts[self.shards.len()]
    }

    /// Returns the shards.
    pub fn shards(&self) -> &[ShardEntry] {
        &self.shards
    }

    /// Returns the samples of shard number `shard`.
    pub fn shard_samples(&self, shard: usize) -> Range<u64> {
        self.shard_starts[shard]..self.shard_starts[shard + 1]
    }

    /// Returns the first sample of each chunk, and last the number of samples.
    pub fn chunk_bounds(&self) -> &Arc<[u64]> {
        &self.chunk_bounds
    }

    /// Returns the number of chunks.
    pub fn n_chunks(&self) -> u64 {
        self.chunk_bounds.len() as u64 - 1
    }

    /// Returns the number of the chunk that holds `id`.
    pub fn chunk_of(&self, id: SampleId) -> usize {
        assert!(id.0 < self.n_samples(), "sample {id} is in the index");
        self.chunk_bounds.partition_point(|&start| start <= id.0) - 1
    }

    /// Returns the number of the shard that holds `id`.
    pub fn shard_of(&self, id: SampleId) -> usize {
        assert!(id.0 < self.n_samples(), "sample {id} is in the index");
        self.shard_starts.partition_point(|&start| start <= id.0) - 1
    }

    /// Returns the record of `id`, which must be below the number of samples.
    pub fn record(&self, id: SampleId) -> SampleRecord {
        assert!(id.0 < self.n_samples(), "sample {id} is in the index");
        let at = self.records_at + id.0 as usize * RECORD_BYTES;
        decode_record(&self.bytes[at..at + RECORD_BYTES]).expect("checked when opened")
    }

    /// Counts the samples without a label.
    pub fn n_unlabelled(&self) -> u64 {
        let is_without = |id: &u64| self.record(SampleId(*id)).label.is_none();
        (0..self.n_samples()).filter(is_without).count() as u64
    }

    /// Returns the number of classes: one more than the largest label, 0 without labels.
    pub fn n_classes(&self) -> u32 {
        (0..self.n_samples())
            .filter_map(|id| self.record(SampleId(id)).label)
            .max()
            .map_or(0, |label| label + 1)
    }
}

#[derive(Clone, Copy)]
struct Counts {
    shards: u32,
    chunks: u32,
    samples: u64,
}

type Parts = (Vec<ShardEntry>, Vec<u64>, Vec<u64>, usize);

fn parse_parts(reader: &mut Reader<'_>, counts: Counts) -> Result<Parts, ReadIndexError> {
    let room = reader.bytes.len() - reader.at;
    let least = u128::from(counts.shards) * SHARD_FIXED_BYTES as u128
        + (u128::from(counts.chunks) + 1) * 8
        + u128::from(counts.samples) * RECORD_BYTES as u128;
    if least > room as u128 {
        return Err(reader.wrong(24, "the counts do not fit the file"));
    }
    if counts.samples == 0 {
        return Err(reader.wrong(32, "there are no samples"));
    }
    let mut shards: Vec<ShardEntry> = Vec::with_capacity(counts.shards as usize);
    let mut starts: Vec<u64> = vec![0];
    for _ in 0..counts.shards {
        let (entry, n_samples) = parse_shard(reader)?;
        let last = starts[starts.len() - 1];
        let next = last.checked_add(n_samples);
        starts.push(next.ok_or_else(|| reader.wrong(reader.at, "too many samples"))?);
        shards.push(entry);
    }
    if starts.last() != Some(&counts.samples) {
        return Err(reader.wrong(32, "the shards' samples do not add up"));
    }
    let bounds = parse_bounds(reader, counts, &starts)?;
    let records_at = reader.at;
    let records = &reader.bytes[records_at..];
    if records.len() as u128 != u128::from(counts.samples) * RECORD_BYTES as u128 {
        return Err(reader.wrong(records_at, "the records do not end where the file does"));
    }
    let mut records = records.chunks_exact(RECORD_BYTES);
    let mut at = records_at;
    for (shard, pair) in shards.iter().zip(starts.windows(2)) {
        for raw in records.by_ref().take((pair[1] - pair[0]) as usize) {
            if let Err(what) = check_record(raw, shard) {
                return Err(reader.wrong(at, what));
            }
            at += RECORD_BYTES;
        }
    }
    Ok((shards, starts, bounds, records_at))
}

fn parse_shard(reader: &mut Reader<'_>) -> Result<(ShardEntry, u64), ReadIndexError> {
    let bytes = reader.u64("size of a shard")?;
    let n_samples = reader.u64("samples of a shard")?;
    let digest: [u8; 32] = reader.array("digest of a shard")?;
    let [low, high] = reader.array("name of a shard")?;
    let at = reader.at;
    let name = reader.take(usize::from(u16::from_le_bytes([low, high])), "name of a shard")?;
    let name = std::str::from_utf8(name)
        .map_err(|_| reader.wrong(at, "a shard's name is not UTF-8"))?
        .to_string();
    if !is_plain_relative(&name) {
        let what = format!("a shard's name leaves the folder: `{}`", name.escape_debug());
        return Err(reader.wrong(at, what));
    }
    let entry = ShardEntry { name, bytes, digest };
    Ok((entry, n_samples))
}

fn parse_bounds(
    reader: &mut Reader<'_>,
    counts: Counts,
    shard_starts: &[u64],
) -> Result<Vec<u64>, ReadIndexError> {
    let at = reader.at;
    let mut bounds: Vec<u64> = Vec::with_capacity(counts.chunks as usize + 1);
    for _ in 0..=counts.chunks {
        bounds.push(reader.u64("chunk bound")?);
    }
    let ascending = bounds.windows(2).all(|pair| pair[0] < pair[1]);
    if bounds.first() != Some(&0) || bounds.last() != Some(&counts.samples) || !ascending {
        return Err(reader.wrong(at, "chunk bounds must rise from 0 to the number of samples"));
    }
    if let Some(start) = shard_starts.iter().find(|start| bounds.binary_search(start).is_err()) {
        let what = format!("a chunk spans two shards at sample {start}");
        return Err(reader.wrong(at, what));
    }
    Ok(bounds)
}

/// Tells whether a name stays below the folder it is joined to.
pub(crate) fn is_plain_relative(name: &str) -> bool {
    !name.is_empty()
        && !name.contains('\0')
        && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

fn check_record(raw: &[u8], shard: &ShardEntry) -> Result<(), String> {
    let Some(record) = decode_record(raw) else {
        return Err(format!("codec {} is unknown", raw[23]));
    };
    if record.bytes == 0 || record.width == 0 || record.height == 0 {
        return Err("a sample is empty".to_string());
    }
    match record.offset.checked_add(u64::from(record.bytes)) {
        Some(end) if end <= shard.bytes => Ok(()),
        _ => Err(format!(
            "a sample at byte {} of {} bytes lies outside shard `{}`",
            record.offset, record.bytes, shard.name
        )),
    }
}

fn decode_record(raw: &[u8]) -> Option<SampleRecord> {
    let four = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
    let two = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
    let label = four(20) & NO_LABEL;
    Some(SampleRecord {
        offset: u64::from(four(0)) | u64::from(four(4)) << 32,
        bytes: four(8),
        crc: four(12),
        width: two(16),
        height: two(18),
        codec: Codec::from_byte(raw[23])?,
        label: (label != NO_LABEL).then_some(label),
    })
}

fn encode_record(record: &SampleRecord, out: &mut Vec<u8>) {
    let label = record.label.unwrap_or(NO_LABEL);
    assert!(label <= NO_LABEL, "labels have 24 bits");
    out.extend(record.offset.to_le_bytes());
    out.extend(record.bytes.to_le_bytes());
    out.extend(record.crc.to_le_bytes());
    out.extend(record.width.to_le_bytes());
    out.extend(record.height.to_le_bytes());
    out.extend((label | u32::from(record.codec as u8) << 24).to_le_bytes());
}

fn encode(shards: &[ShardRecords]) -> Vec<u8> {
    let mut table: Vec<u8> = Vec::new();
    let mut records: Vec<u8> = Vec::new();
    let mut bounds: Vec<u64> = vec![0];
    let mut n_samples: u64 = 0;
    for shard in shards {
        let entry = &shard.entry;
        let name_bytes = u16::try_from(entry.name.len()).expect("file names are short");
        table.extend(entry.bytes.to_le_bytes());
        table.extend((shard.records.len() as u64).to_le_bytes());
        table.extend(entry.digest);
        table.extend(name_bytes.to_le_bytes());
        table.extend(entry.name.as_bytes());
        let mut chunk_start: u64 = shard.records.first().map_or(0, |record| record.offset);
        for (record, next) in shard.records.iter().zip(1usize..) {
            encode_record(record, &mut records);
            n_samples += 1;
            let end = record.offset + u64::from(record.bytes);
            let is_last = next == shard.records.len();
            if is_last || end.saturating_sub(chunk_start) >= CHUNK_BYTES {
                bounds.push(n_samples);
                chunk_start = end;
            }
        }
    }
    let bounds_bytes: Vec<u8> = bounds.iter().flat_map(|bound| bound.to_le_bytes()).collect();
    let body = table.len() + bounds_bytes.len() + records.len();
    let total = (HEADER_BYTES + body + DIGEST_BYTES) as u64;
    let n_shards = u32::try_from(shards.len()).expect("fewer than 2^32 shards");
    let n_chunks = u32::try_from(bounds.len() - 1).expect("fewer than 2^32 chunks");
    let mut out: Vec<u8> = Vec::with_capacity(total as usize);
    out.extend(MAGIC);
    out.extend(INDEX_VERSION.to_le_bytes());
    out.extend(0u32.to_le_bytes());
    out.extend(total.to_le_bytes());
    out.extend(n_shards.to_le_bytes());
    out.extend(n_chunks.to_le_bytes());
    out.extend(n_samples.to_le_bytes());
    out.extend(0u64.to_le_bytes());
    out.extend(table);
    out.extend(bounds_bytes);
    out.extend(records);
    let digest = blake3::hash(&out);
    out.extend(digest.as_bytes());
    out
}

/// Reads fields in order; every error names file and byte.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    path: &'a Path,
}

impl<'a> Reader<'a> {
    fn wrong(&self, offset: usize, what: impl Into<String>) -> ReadIndexError {
        ReadIndexError::Content { path: self.path.to_path_buf(), offset, what: what.into() }
    }

    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], ReadIndexError> {
        let end = self.at.checked_add(n);
        let Some(field) = end.and_then(|end| self.bytes.get(self.at..end)) else {
            return Err(self.wrong(self.at, format!("the file ends inside the {what}")));
        };
        self.at += n;
        Ok(field)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ReadIndexError> {
        let field = self.take(N, what)?;
        Ok(field.try_into().expect("N bytes were taken"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, ReadIndexError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, ReadIndexError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }
}

/// Computes the checksum that records hold.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32IsoHdlc, bytes) as u32
}

#[cfg(test)]
mod tests;
