//! The files of the cache.
//!
//! One sparse file a chunk, `<dir>/<fingerprint>/<decoder>/<chunk>.planes`: a byte for each sample,
//! which says how its chroma lies (0: nothing is there), then a place for each sample. A sample's
//! planes are bands of 32 rows (luma, both chroma planes, CRC-32), so that a crop reads what it
//! needs in one call. The checksum covers which sample and which band it is: whatever a crash, a
//! full disk or another process leaves behind is either the right planes or no planes.

use std::fs::{self, File};
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lacuna_pixels::{Chroma, Codec, DECODER_ID, PlaneBuffers, PlaneLayout};
use lacuna_recipe::augment::{CropBox, Size};
use lacuna_types::SampleId;
use rustix::io::{preadv, pwritev};

use super::fill::Judge;
use super::{CacheStats, Fill, OpenCacheError};
use crate::dataset::Dataset;
use crate::index::SampleRecord;

/// Chunk files kept open at a time.
const FILES_OPEN_MAX: usize = 128;

/// A sample whose planes are not kept, as its own byte says.
const NEVER: u8 = 0xFF;

/// Bytes of a band's checksum.
const SEAL: usize = 4;

/// Places begin at pages, so that a file's holes stay holes.
const PAGE: u64 = 4096;

/// How often it is looked what is there while a process fills all of it.
const LOOKS: u64 = 64;

/// Pieces that the kernel takes in one call.
const SLICES_MAX: usize = 1024;

/// The cache of one data set.
#[derive(Debug)]
pub struct PlaneCache {
    folder: PathBuf,
    dataset: Arc<Dataset>,
    bytes_max: u64,
    files: Vec<Mutex<Option<Arc<ChunkFile>>>>,
    hits: AtomicU64,
    misses: AtomicU64,
    damaged: AtomicU64,
    bytes: AtomicU64,
    /// Bytes added since it was looked how many are there.
    unseen: AtomicU64,
    full: AtomicBool,
    told: AtomicBool,
    judge: Judge,
}

/// An open chunk.
#[derive(Debug)]
struct ChunkFile {
    chunk: usize,
    first: u64,
    file: File,
    states: Vec<AtomicU8>,
    /// Where each sample's planes begin.
    places: Vec<u64>,
}

/// Returns the bytes that a folder's files take on the disk.
fn taken(folder: &Path) -> io::Result<u64> {
    let mut bytes: u64 = 0;
    for entry in fs::read_dir(folder)? {
        // Another process may just have removed it.
        bytes += entry.and_then(|e| e.metadata()).map_or(0, |meta| 512 * meta.blocks());
    }
    Ok(bytes)
}

/// Returns the bytes that are free on a folder's disk.
fn room(folder: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(folder)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

fn size_of(record: &SampleRecord) -> Size {
    Size { height: record.height.into(), width: record.width.into() }
}

/// Where a band begins in a sample's place.
fn band_start(layout: &PlaneLayout, band: u32) -> u64 {
    let (luma, chroma) = layout.bytes_of(&(0..band));
    (luma + 2 * chroma + SEAL * band as usize) as u64
}

impl PlaneCache {
    /// Opens the cache of a data set below `dir`, which is made if it is not there.
    ///
    /// `bytes_max` bounds what all chunks of this data set take on the disk, whoever writes them;
    /// once it is reached, planes are read and no longer added.
    pub fn open(
        dir: &Path,
        bytes_max: u64,
        dataset: Arc<Dataset>,
        fill: Fill,
    ) -> Result<Self, OpenCacheError> {
        let folder = dir.join(dataset.fingerprint().to_string()).join(DECODER_ID.replace('/', "-"));
        let failed = |source| OpenCacheError::Io { path: dir.to_path_buf(), source };
        fs::create_dir_all(&folder).map_err(failed)?;
        let bytes = taken(&folder).map_err(failed)?;
        let n_files = (dataset.index().n_chunks() as usize).min(FILES_OPEN_MAX);
        let bytes_max = match fill {
            Fill::Always => bytes_max,
            // What nobody asked for by name leaves the disk some room.
            Fill::WhenWaiting => bytes_max.min(bytes + room(&folder).map_err(failed)? / 10 * 9),
        };
        Ok(PlaneCache {
            folder,
            dataset,
            bytes_max,
            files: (0..n_files).map(|_| Mutex::new(None)).collect(),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
            bytes: AtomicU64::new(bytes),
            unseen: AtomicU64::new(0),
            full: AtomicBool::new(false),
            told: AtomicBool::new(false),
            judge: Judge::new(fill),
        })
    }

    /// Returns what it has done so far.
    pub fn stats(&self) -> CacheStats {
        CacheStats {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            damaged: self.damaged.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            full: self.full.load(Ordering::Relaxed),
            filling: self.judge.is_on(),
        }
    }

    /// Tells whether planes of this sample are kept, by its record alone.
    pub(crate) fn takes(&self, record: &SampleRecord) -> bool {
        record.codec == Codec::Jpeg && PlaneLayout::is_worth(size_of(record))
    }

    /// Reads the bands that a crop depends on; returns their layout and the first of them.
    pub(crate) fn read(
        &self,
        id: SampleId,
        record: &SampleRecord,
        crop: CropBox,
        out: &mut PlaneBuffers,
    ) -> Option<(PlaneLayout, u32)> {
        let found = self.try_read(id, record, crop, out);
        let counter = if found.is_some() { &self.hits } else { &self.misses };
        counter.fetch_add(1, Ordering::Relaxed);
        found
    }

    fn try_read(
        &self,
        id: SampleId,
        record: &SampleRecord,
        crop: CropBox,
        out: &mut PlaneBuffers,
    ) -> Option<(PlaneLayout, u32)> {
        let chunk = self.chunk_file(id).ok()?;
        let place = chunk.place_of(id);
        let chroma = chunk.chroma_of(id)?;
        let layout = PlaneLayout { size: size_of(record), chroma };
        let bands = layout.bands_of(crop);
        out.resize(&layout, &bands);
        if 4 * bands.len() > SLICES_MAX {
            return None;
        }
        let mut seals = vec![[0u8; SEAL]; bands.len()];
        let at = place + band_start(&layout, bands.start);
        let read = read_bands(&chunk.file, at, &layout, &bands, out, &mut seals);
        let whole = matches!(read, Ok(true));
        if whole && check(id, record, &layout, &bands, out, &seals) {
            return Some((layout, bands.start));
        }
        chunk.forget(id);
        self.damaged.fetch_add(1, Ordering::Relaxed);
        self.tell(&format!("planes of sample {id} in `{}` are damaged", self.folder.display()));
        None
    }

    /// Tells whether a sample's planes are there, as far as its chunk's table says.
    pub fn holds(&self, id: SampleId) -> bool {
        self.chunk_file(id).is_ok_and(|chunk| chunk.chroma_of(id).is_some())
    }

    /// Remembers that a sample has no planes to keep.
    pub(crate) fn refuse(&self, id: SampleId) {
        if let Ok(chunk) = self.chunk_file(id) {
            chunk.states[(id.0 - chunk.first) as usize].store(NEVER, Ordering::Relaxed);
        }
    }

    /// Tells whether it is known that a sample has no planes to keep, or no room is left for them.
    pub(crate) fn is_closed_to(&self, id: SampleId) -> bool {
        let state = |chunk: Arc<ChunkFile>| {
            chunk.states[(id.0 - chunk.first) as usize].load(Ordering::Relaxed)
        };
        self.full.load(Ordering::Relaxed)
            || !self.judge.allows()
            || self.chunk_file(id).map_or(NEVER, state) == NEVER
    }

    /// Tells whether it is of use to [`PlaneCache::took`] how long images take.
    pub(crate) fn measures(&self) -> bool {
        self.judge.measures()
    }

    /// Takes note of how long an image took that was decoded from its JPEG.
    pub(crate) fn took(&self, filled: bool, time: Duration) {
        self.judge.took(filled, time);
    }

    /// Takes note that of `passed`, a stream's consumer waited so long for slots.
    pub fn waited(&self, waited: Duration, passed: Duration) {
        self.judge.waited(waited, passed);
    }

    /// Adds whole planes; what goes wrong is said once and closes the cache to more.
    pub(crate) fn write(
        &self,
        id: SampleId,
        record: &SampleRecord,
        layout: &PlaneLayout,
        planes: &PlaneBuffers,
    ) {
        if self.full.load(Ordering::Relaxed) || layout.size != size_of(record) {
            return;
        }
        let bytes = band_start(layout, layout.n_bands()).next_multiple_of(PAGE);
        self.look_again(bytes);
        if self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > self.bytes_max {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.full.store(true, Ordering::Relaxed);
            return;
        }
        let written = self.chunk_file(id).and_then(|chunk| {
            write_bands(&chunk.file, chunk.place_of(id), id, record, layout, planes)?;
            chunk.remember(id, layout.chroma)
        });
        if let Err(error) = written {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.full.store(true, Ordering::Relaxed);
            self.tell(&format!("no more planes go to `{}`: {error}", self.folder.display()));
        }
    }

    /// Looks now and then how much is there, before `bytes` are added: other trainers of this
    /// machine add to it as well.
    fn look_again(&self, bytes: u64) {
        let every = (self.bytes_max / LOOKS).max(PAGE);
        if self.unseen.fetch_add(bytes, Ordering::Relaxed) + bytes >= every {
            self.unseen.store(0, Ordering::Relaxed);
            if let Ok(found) = taken(&self.folder) {
                self.bytes.store(found, Ordering::Relaxed);
            }
        }
    }

    /// Says one thing, once.
    fn tell(&self, text: &str) {
        if !self.told.swap(true, Ordering::Relaxed) {
            tracing::warn!("plane cache: {text}; images are decoded from their JPEG instead");
        }
    }

    /// Returns the open file of a sample's chunk.
    fn chunk_file(&self, id: SampleId) -> io::Result<Arc<ChunkFile>> {
        let bounds = self.dataset.index().chunk_bounds();
        let chunk = self.dataset.index().chunk_of(id);
        let place = &self.files[chunk % self.files.len()];
        let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
        match &*place {
            Some(open) if open.chunk == chunk => Ok(open.clone()),
            _ => {
                let opened = Arc::new(self.open_chunk(chunk, bounds[chunk]..bounds[chunk + 1])?);
                *place = Some(opened.clone());
                Ok(opened)
            }
        }
    }

    fn open_chunk(&self, chunk: usize, samples: Range<u64>) -> io::Result<ChunkFile> {
        let path = self.folder.join(format!("{chunk:08}.planes"));
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = match options.open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // The folder was removed under way.
                fs::create_dir_all(&self.folder)?;
                options.open(&path)?
            }
            opened => opened?,
        };
        let n = (samples.end - samples.start) as usize;
        let mut table = vec![0u8; n];
        let mut filled = 0;
        while filled < n {
            match file.read_at(&mut table[filled..], filled as u64)? {
                0 => break,
                more => filled += more,
            }
        }
        let mut places = Vec::with_capacity(n);
        let mut at = (n as u64).next_multiple_of(PAGE);
        for id in samples.clone() {
            places.push(at);
            let size = size_of(&self.dataset.index().record(SampleId(id)));
            let most = PlaneLayout { size, chroma: Chroma::Full };
            at += band_start(&most, most.n_bands()).next_multiple_of(PAGE);
        }
        let states = table.into_iter().map(AtomicU8::new).collect();
        Ok(ChunkFile { chunk, first: samples.start, file, states, places })
    }
}

impl ChunkFile {
    fn place_of(&self, id: SampleId) -> u64 {
        self.places[(id.0 - self.first) as usize]
    }

    /// Returns how a sample's chroma lies, if its planes are there; another process may have added
    /// them.
    fn chroma_of(&self, id: SampleId) -> Option<Chroma> {
        let i = (id.0 - self.first) as usize;
        let mut state = self.states[i].load(Ordering::Relaxed);
        if state == 0 {
            let mut byte = [0];
            if self.file.read_at(&mut byte, i as u64).ok()? == 1 {
                state = byte[0];
                self.states[i].store(state, Ordering::Relaxed);
            }
        }
        Chroma::from_byte(state)
    }

    fn remember(&self, id: SampleId, chroma: Chroma) -> io::Result<()> {
        let i = (id.0 - self.first) as usize;
        self.file.write_all_at(&[chroma as u8], i as u64)?;
        self.states[i].store(chroma as u8, Ordering::Relaxed);
        Ok(())
    }

    fn forget(&self, id: SampleId) {
        let i = (id.0 - self.first) as usize;
        self.states[i].store(0, Ordering::Relaxed);
        // If this fails, the next reader finds the same damage.
        let _ = self.file.write_all_at(&[0], i as u64);
    }
}

/// Splits planes into the parts of their bands: luma, both of chroma.
fn parts<'a>(
    layout: &PlaneLayout,
    bands: &Range<u32>,
    planes: &'a PlaneBuffers,
) -> impl Iterator<Item = [&'a [u8]; 3]> {
    let first = bands.start;
    let layout = *layout;
    bands.clone().map(move |band| {
        let (luma, chroma) = layout.bytes_of(&(first..band));
        let (n_luma, n_chroma) = layout.bytes_of(&(band..band + 1));
        let [a, b] = &planes.chroma;
        let chroma = chroma..chroma + n_chroma;
        [&planes.luma[luma..luma + n_luma], &a[chroma.clone()], &b[chroma]]
    })
}

/// Computes the checksum of a band: of what it is, and of its bytes.
fn seal(
    id: SampleId,
    record: &SampleRecord,
    layout: &PlaneLayout,
    band: u32,
    parts: [&[u8]; 3],
) -> [u8; SEAL] {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32IsoHdlc);
    digest.update(&id.0.to_le_bytes());
    digest.update(&record.crc.to_le_bytes());
    digest.update(&(band << 8 | u32::from(layout.chroma as u8)).to_le_bytes());
    parts.iter().for_each(|part| digest.update(part));
    (digest.finalize() as u32).to_le_bytes()
}

fn check(
    id: SampleId,
    record: &SampleRecord,
    layout: &PlaneLayout,
    bands: &Range<u32>,
    planes: &PlaneBuffers,
    seals: &[[u8; SEAL]],
) -> bool {
    let all = bands.clone().zip(parts(layout, bands, planes)).zip(seals);
    all.into_iter().all(|((band, parts), want)| seal(id, record, layout, band, parts) == *want)
}

/// Reads bands in one call; false if the file ends before them.
fn read_bands(
    file: &File,
    at: u64,
    layout: &PlaneLayout,
    bands: &Range<u32>,
    out: &mut PlaneBuffers,
    seals: &mut [[u8; SEAL]],
) -> io::Result<bool> {
    let mut slices: Vec<IoSliceMut<'_>> = Vec::with_capacity(4 * bands.len());
    let (mut luma, [first, second]) = (out.luma.as_mut_slice(), &mut out.chroma);
    let (mut first, mut second) = (first.as_mut_slice(), second.as_mut_slice());
    let mut total = 0;
    for (band, seal) in bands.clone().zip(seals) {
        let (n_luma, n_chroma) = layout.bytes_of(&(band..band + 1));
        for (plane, n) in [(&mut luma, n_luma), (&mut first, n_chroma), (&mut second, n_chroma)] {
            let (part, rest) = std::mem::take(plane).split_at_mut(n);
            slices.push(IoSliceMut::new(part));
            *plane = rest;
        }
        slices.push(IoSliceMut::new(seal));
        total += n_luma + 2 * n_chroma + SEAL;
    }
    // A short read is one at the end of the file, or a strange file system: no planes either way.
    Ok(preadv(file, &mut slices, at)? == total)
}

fn write_bands(
    file: &File,
    at: u64,
    id: SampleId,
    record: &SampleRecord,
    layout: &PlaneLayout,
    planes: &PlaneBuffers,
) -> io::Result<()> {
    let bands = 0..layout.n_bands();
    let all: Vec<[&[u8]; 3]> = parts(layout, &bands, planes).collect();
    let seals: Vec<[u8; SEAL]> =
        bands.zip(&all).map(|(band, parts)| seal(id, record, layout, band, *parts)).collect();
    let (mut at, mut slices) = (at, Vec::with_capacity(4 * all.len()));
    for (parts, seal) in all.iter().zip(&seals) {
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        slices.push(IoSlice::new(seal));
    }
    for some in slices.chunks(SLICES_MAX) {
        let wanted: usize = some.iter().map(|slice| slice.len()).sum();
        if pwritev(file, some, at)? != wanted {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "a write was cut short"));
        }
        at += wanted as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
