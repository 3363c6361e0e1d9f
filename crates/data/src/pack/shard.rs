//! Writes tar shards with bytes that depend on their members alone.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::{PackError, at};
use crate::files::{partial_path, publish};
use crate::index::{SampleRecord, ShardEntry, ShardRecords};

const BLOCK: u64 = 512;

/// Two empty blocks end an archive.
const END_BYTES: u64 = 2 * BLOCK;

/// Buffer before a shard's file: few system calls.
const WRITE_BUFFER_BYTES: usize = 1 << 20;

/// Writes samples into one shard after another.
pub(super) struct ShardWriter<'a> {
    folder: &'a Path,
    name: &'a str,
    shard_bytes: u64,
    open: Option<OpenShard>,
    done: Vec<ShardRecords>,
}

struct OpenShard {
    name: String,
    path: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    bytes: u64,
    records: Vec<SampleRecord>,
}

fn padded(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK)
}

impl<'a> ShardWriter<'a> {
    pub(super) fn new(folder: &'a Path, name: &'a str, shard_bytes: u64) -> Self {
        ShardWriter { folder, name, shard_bytes, open: None, done: Vec::new() }
    }

    /// Appends a sample: its image, and its label where it has one.
    pub(super) fn add(
        &mut self,
        key: &str,
        image: &[u8],
        record: SampleRecord,
        label: Option<u32>,
    ) -> Result<(), PackError> {
        let label_text = label.map(|label| label.to_string());
        let needs = BLOCK
            + padded(image.len() as u64)
            + label_text.as_ref().map_or(0, |_| BLOCK + BLOCK)
            + END_BYTES;
        if self.open.as_ref().is_some_and(|open| open.bytes + needs > self.shard_bytes) {
            self.close()?;
        }
        if self.open.is_none() {
            self.open = Some(self.start()?);
        }
        let open = self.open.as_mut().expect("opened above");
        let path = open.path.clone();
        let image_name = format!("{key}.{}", record.codec.extension());
        let offset = open.member(&image_name, image).map_err(at(&path))?;
        if let Some(text) = label_text {
            let name = format!("{key}.cls");
            open.member(&name, text.as_bytes()).map_err(at(&path))?;
        }
        open.records.push(SampleRecord { offset, label, ..record });
        Ok(())
    }

    /// Closes the last shard and returns all of them.
    pub(super) fn finish(mut self) -> Result<Vec<ShardRecords>, PackError> {
        self.close()?;
        Ok(self.done)
    }

    fn start(&self) -> Result<OpenShard, PackError> {
        let name = format!("{}-{:06}.tar", self.name, self.done.len());
        let path = self.folder.join(&name);
        let file = File::create(partial_path(&path)).map_err(at(&path))?;
        Ok(OpenShard {
            name,
            path,
            file: BufWriter::with_capacity(WRITE_BUFFER_BYTES, file),
            hasher: blake3::Hasher::new(),
            bytes: 0,
            records: Vec::new(),
        })
    }

    fn close(&mut self) -> Result<(), PackError> {
        let Some(mut open) = self.open.take() else {
            return Ok(());
        };
        let path = open.path.clone();
        let finish = || -> io::Result<ShardRecords> {
            open.put(&[0; END_BYTES as usize])?;
            let file = open.file.into_inner().map_err(|error| error.into_error())?;
            file.sync_all()?;
            publish(&open.path)?;
            let entry = ShardEntry {
                name: open.name,
                bytes: open.bytes,
                digest: *open.hasher.finalize().as_bytes(),
            };
            let records = open.records;
            Ok(ShardRecords { entry, records })
        };
        self.done.push(finish().map_err(at(&path))?);
        Ok(())
    }
}

impl OpenShard {
    /// Writes one member and returns where its data starts.
    fn member(&mut self, name: &str, data: &[u8]) -> io::Result<u64> {
        let mut header = tar::Header::new_ustar();
        header.set_path(name)?;
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.put(header.as_bytes())?;
        let offset = self.bytes;
        self.put(data)?;
        let padding = padded(self.bytes) - self.bytes;
        self.put(&[0; BLOCK as usize][..padding as usize])?;
        Ok(offset)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}
