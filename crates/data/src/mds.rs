//! MosaicML's shards (MDS, version 2), read: their `index.json`, and the samples in them.
//!
//! The bytes are described in `docs/formats.md`. Of a sample only its image and its label are
//! read; other columns are stepped over, pickled ones too, and nothing is ever unpickled.

mod layout;

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use lacuna_pixels::IMAGE_BYTES_MAX;
use serde::Deserialize;

use self::layout::Layout;
use crate::index::{SampleRecord, ShardEntry, ShardRecords, is_plain_relative, label_of};
use crate::wds::{BuildIndexError, IndexReport, Scanned, finish, image_record, scan_all};
use crate::{OnProgress, SkipList};

/// Name of the file that lists the shards of a folder.
pub const MDS_INDEX_NAME: &str = "index.json";

/// The version that is read, of the list and of the shards.
const VERSION: u32 = 2;

/// Most bytes of the list: a shard takes about 1 KiB of it.
const INDEX_JSON_BYTES_MAX: u64 = 256 << 20;

/// Most bytes of a shard, compressed ones unpacked: offsets in it have 32 bits.
const SHARD_BYTES_MAX: u64 = u32::MAX as u64;

/// MDS shards that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadMdsError {
    /// A file could not be read.
    #[error("failed to read `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The list of shards is unusable.
    #[error("`{}` cannot be used: {what}", path.display())]
    List {
        /// The list.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// An index cannot be made over compressed bytes.
    #[error(
        "shard `{}` is compressed, so it cannot be indexed as it is: make shards that can be with \
         `lacuna data pack`",
        path.display()
    )]
    Compressed {
        /// The shard.
        path: PathBuf,
    },
    /// A shard was changed or copied in part.
    #[error(
        "shard `{}` has {found} bytes where {MDS_INDEX_NAME} says {expected}: copy it again",
        path.display()
    )]
    ShardSize {
        /// The shard; where it is compressed, its bytes are those that were unpacked.
        path: PathBuf,
        /// Bytes there are.
        found: u64,
        /// Bytes the list knows.
        expected: u64,
    },
    /// A shard that contradicts itself or the list.
    #[error("shard `{}` is wrong at byte {offset}: {what}", path.display())]
    Shard {
        /// The shard.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// A sample that cannot be used.
    #[error("sample {sample} of shard `{}` cannot be used: {what}", path.display())]
    Sample {
        /// The shard.
        path: PathBuf,
        /// Number of the sample in its shard, from 0.
        sample: usize,
        /// What is wrong with it.
        what: String,
    },
}

fn at(path: &Path) -> impl Fn(io::Error) -> ReadMdsError {
    let path = path.to_path_buf();
    move |source| ReadMdsError::Io { path: path.clone(), source }
}

/// Tells whether a folder has an `index.json` that lists shards, of whatever version.
pub(crate) fn is_mds(folder: &Path) -> bool {
    let needle = b"\"shards\"";
    read_list(&folder.join(MDS_INDEX_NAME))
        .is_ok_and(|text| text.windows(needle.len()).any(|window| window == needle))
}

fn read_list(path: &Path) -> Result<Vec<u8>, ReadMdsError> {
    let mut text: Vec<u8> = Vec::new();
    let limit = INDEX_JSON_BYTES_MAX + 1;
    File::open(path).and_then(|f| f.take(limit).read_to_end(&mut text)).map_err(at(path))?;
    if text.len() as u64 > INDEX_JSON_BYTES_MAX {
        let what = format!("it has more than {INDEX_JSON_BYTES_MAX} bytes");
        return Err(ReadMdsError::List { path: path.to_path_buf(), what });
    }
    Ok(text)
}

#[derive(Deserialize)]
struct ListJson {
    version: u32,
    shards: Vec<ShardJson>,
}

/// One shard in the list. Its hashes are not among what is read: only sizes are checked.
#[derive(Deserialize)]
struct ShardJson {
    version: u32,
    format: String,
    #[serde(default)]
    column_names: Vec<String>,
    #[serde(default)]
    column_encodings: Vec<String>,
    #[serde(default)]
    column_sizes: Vec<Option<u32>>,
    #[serde(default)]
    compression: Option<String>,
    raw_data: FileJson,
    #[serde(default)]
    zip_data: Option<FileJson>,
    samples: u32,
}

#[derive(Deserialize)]
struct FileJson {
    basename: String,
    bytes: u64,
}

/// The list of a folder, checked, and its files, which are there in the right sizes.
#[derive(Debug)]
pub(crate) struct MdsFolder {
    root: PathBuf,
    shards: Vec<MdsShard>,
    /// First sample of each shard, and last the number of samples.
    starts: Vec<u64>,
}

#[derive(Debug)]
struct MdsShard {
    /// Path of the plain shard below the folder.
    name: String,
    /// Bytes of the plain shard.
    bytes: u64,
    n_samples: u32,
    layout: Layout,
    /// The file that is read.
    path: PathBuf,
    /// How that file is compressed; `None` where it is the plain shard.
    compression: Option<Compression>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    Zstd,
    Gz,
}

impl MdsFolder {
    /// Reads and checks `index.json` in `root`; of the shards, presence and size.
    pub(crate) fn open(root: &Path) -> Result<Self, ReadMdsError> {
        let path = root.join(MDS_INDEX_NAME);
        let wrong = |what: String| ReadMdsError::List { path: path.clone(), what };
        let text = read_list(&path)?;
        let list: ListJson = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
        if list.version != VERSION {
            return Err(wrong(format!("it has version {}, not {VERSION}", list.version)));
        }
        let mut shards: Vec<MdsShard> = Vec::with_capacity(list.shards.len());
        let mut starts: Vec<u64> = vec![0];
        for shard in &list.shards {
            let name = shard.raw_data.basename.escape_debug().to_string();
            let shard = check_shard(root, shard)
                .map_err(|what| wrong(format!("its shard `{name}` {what}")))?;
            starts.push(starts[starts.len() - 1] + u64::from(shard.n_samples));
            shards.push(shard);
        }
        for (shard, json) in shards.iter_mut().zip(&list.shards) {
            find_file(root, shard, json)?;
        }
        Ok(MdsFolder { root: root.to_path_buf(), shards, starts })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the number of samples, usable or not.
    pub(crate) fn n(&self) -> u64 {
        self.starts[self.shards.len()]
    }

    /// Returns all files that are read, the list among them.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let list = self.root.join(MDS_INDEX_NAME);
        std::iter::once(list).chain(self.shards.iter().map(|shard| shard.path.clone())).collect()
    }
}

/// Checks what the list says of a shard; the error goes on after the shard's name.
fn check_shard(root: &Path, json: &ShardJson) -> Result<MdsShard, String> {
    if json.format != "mds" || json.version != VERSION {
        let (format, version) = (json.format.escape_debug(), json.version);
        return Err(format!("is of format `{format}` {version}; only mds {VERSION} is read"));
    }
    let basenames = std::iter::once(&json.raw_data).chain(&json.zip_data);
    if basenames.into_iter().any(|file| !is_plain_relative(&file.basename)) {
        return Err("has a name that leaves the folder".to_string());
    }
    if json.raw_data.bytes > SHARD_BYTES_MAX {
        return Err(format!("has more than {SHARD_BYTES_MAX} bytes"));
    }
    let compression = match (&json.zip_data, json.compression.as_deref()) {
        (None, None) => None,
        (None, Some(_)) => return Err("is compressed, and has no `zip_data`".to_string()),
        (Some(_), algorithm) => match algorithm.map(|text| text.split(':').next().unwrap_or("")) {
            Some("zstd") => Some(Compression::Zstd),
            Some("gz") => Some(Compression::Gz),
            other => {
                let other = other.unwrap_or("nothing").escape_debug();
                return Err(format!(
                    "is compressed by `{other}`; zstd and gz are read: write it again with one of \
                     them, or without"
                ));
            }
        },
    };
    Ok(MdsShard {
        name: json.raw_data.basename.clone(),
        bytes: json.raw_data.bytes,
        n_samples: json.samples,
        layout: Layout::of(&json.column_names, &json.column_encodings, &json.column_sizes)?,
        path: root.join(&json.raw_data.basename),
        compression,
    })
}

/// Chooses the file to read: the plain shard where there is one, else the compressed one.
fn find_file(root: &Path, shard: &mut MdsShard, json: &ShardJson) -> Result<(), ReadMdsError> {
    let mut expected = shard.bytes;
    match &json.zip_data {
        Some(zip) if !shard.path.exists() => {
            shard.path = root.join(&zip.basename);
            expected = zip.bytes;
        }
        _ => shard.compression = None,
    }
    let found = fs::metadata(&shard.path).map_err(at(&shard.path))?.len();
    if found != expected {
        return Err(ReadMdsError::ShardSize { path: shard.path.clone(), found, expected });
    }
    Ok(())
}

/// An opened shard; its offsets were checked.
#[derive(Debug)]
struct OpenShard {
    path: PathBuf,
    data: Data,
    layout: Layout,
    /// Where each sample starts, and last where the shard ends.
    offsets: Vec<u32>,
}

#[derive(Debug)]
enum Data {
    File(File),
    Memory(Vec<u8>),
}

/// Image and label of a sample, in a shard.
struct Located {
    image: Range<u64>,
    label: Option<u32>,
}

impl OpenShard {
    fn open(shard: &MdsShard) -> Result<Self, ReadMdsError> {
        let path = shard.path.clone();
        let data = match shard.compression {
            None => Data::File(File::open(&path).map_err(at(&path))?),
            Some(compression) => Data::Memory(unpack(shard, compression)?),
        };
        let mut open = OpenShard { path, data, layout: shard.layout.clone(), offsets: Vec::new() };
        let mut n_raw: [u8; 4] = [0; 4];
        open.read(0, &mut n_raw)?;
        let n = u32::from_le_bytes(n_raw);
        if n != shard.n_samples {
            let what =
                format!("it has {n} samples where {MDS_INDEX_NAME} says {}", shard.n_samples);
            return Err(open.wrong(0, what));
        }
        let table_bytes = (u64::from(n) + 1) * 4;
        if 4 + table_bytes > shard.bytes {
            return Err(open.wrong(4, format!("it is too short for the offsets of {n} samples")));
        }
        let mut table: Vec<u8> = vec![0; table_bytes as usize];
        open.read(4, &mut table)?;
        let (words, _) = table.as_chunks::<4>();
        open.offsets = words.iter().map(|&word| u32::from_le_bytes(word)).collect();
        let (first, last) = (open.offsets[0], open.offsets[n as usize]);
        let is_rising = open.offsets.windows(2).all(|pair| pair[0] <= pair[1]);
        if !is_rising || u64::from(first) < 4 + table_bytes || u64::from(last) != shard.bytes {
            let what = "the offsets of its samples must rise from behind them to its end";
            return Err(open.wrong(4, what));
        }
        Ok(open)
    }

    fn wrong(&self, offset: u64, what: impl Into<String>) -> ReadMdsError {
        ReadMdsError::Shard { path: self.path.clone(), offset, what: what.into() }
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ReadMdsError> {
        match &self.data {
            Data::File(file) => file.read_exact_at(out, offset).map_err(at(&self.path)),
            Data::Memory(bytes) => {
                let range = offset as usize..offset as usize + out.len();
                let Some(part) = bytes.get(range) else {
                    return Err(self.wrong(offset, "it ends there"));
                };
                out.copy_from_slice(part);
                Ok(())
            }
        }
    }

    /// Finds image and label of sample number `sample` of the shard.
    fn locate(&self, sample: usize) -> Result<Located, ReadMdsError> {
        let wrong = |what| ReadMdsError::Sample { path: self.path.clone(), sample, what };
        let Layout { sizes, image, label } = &self.layout;
        let (start, end) = (u64::from(self.offsets[sample]), u64::from(self.offsets[sample + 1]));
        let n_open = sizes.iter().filter(|size| size.is_none()).count();
        let mut at = start + n_open as u64 * 4;
        if at > end {
            return Err(wrong(format!("its {} bytes end inside its sizes", end - start)));
        }
        let mut head: Vec<u8> = vec![0; n_open * 4];
        self.read(start, &mut head)?;
        let (words, _) = head.as_chunks::<4>();
        let mut open_sizes = words.iter().map(|&word| u32::from_le_bytes(word));
        let mut columns: Vec<Range<u64>> = Vec::with_capacity(sizes.len());
        for size in sizes {
            let size = size.or_else(|| open_sizes.next()).expect("a size for each open one");
            columns.push(at..at + u64::from(size));
            at += u64::from(size);
        }
        if at != end {
            return Err(wrong(format!(
                "its columns have {} bytes, it has {}",
                at - start,
                end - start
            )));
        }
        let label = match label {
            None => None,
            Some((column, int)) => {
                let mut raw: [u8; 8] = [0; 8];
                self.read(columns[*column].start, &mut raw[..int.bytes])?;
                label_of(int.value(raw)).map_err(wrong)?
            }
        };
        Ok(Located { image: columns[*image].clone(), label })
    }

    /// Reads the image into `out`, replacing what it holds.
    fn image(&self, located: &Located, out: &mut Vec<u8>) -> Result<(), ReadMdsError> {
        let bytes = located.image.end - located.image.start;
        // One byte more than allowed is enough to see that an image is too large.
        out.resize(bytes.min(IMAGE_BYTES_MAX + 1) as usize, 0);
        self.read(located.image.start, out)
    }
}

/// Unpacks a whole compressed shard into memory.
fn unpack(shard: &MdsShard, compression: Compression) -> Result<Vec<u8>, ReadMdsError> {
    let io = at(&shard.path);
    let file = BufReader::new(File::open(&shard.path).map_err(&io)?);
    let mut bytes: Vec<u8> = Vec::new();
    // One more than there should be, to see whether the data ends.
    let limit = shard.bytes + 1;
    match compression {
        Compression::Zstd => zstd::stream::read::Decoder::with_buffer(file)
            .and_then(|unpacked| unpacked.take(limit).read_to_end(&mut bytes)),
        Compression::Gz => MultiGzDecoder::new(file).take(limit).read_to_end(&mut bytes),
    }
    .map_err(io)?;
    let found = bytes.len() as u64;
    if found != shard.bytes {
        let (path, expected) = (shard.path.clone(), shard.bytes);
        return Err(ReadMdsError::ShardSize { path, found, expected });
    }
    Ok(bytes)
}

/// Reads the samples of a folder one after another; one shard is open at a time.
#[derive(Debug)]
pub(crate) struct MdsReader {
    folder: MdsFolder,
    open: Option<(usize, OpenShard)>,
}

impl MdsReader {
    pub(crate) fn new(folder: MdsFolder) -> Self {
        MdsReader { folder, open: None }
    }

    pub(crate) fn folder(&self) -> &MdsFolder {
        &self.folder
    }

    fn find(&self, i: u64) -> (usize, usize) {
        assert!(i < self.folder.n(), "sample {i} is in the list");
        let shard = self.folder.starts.partition_point(|&start| start <= i) - 1;
        (shard, (i - self.folder.starts[shard]) as usize)
    }

    /// Names sample number `i` for messages.
    pub(crate) fn place(&self, i: u64) -> String {
        let (shard, sample) = self.find(i);
        format!("{}: sample {sample}", self.folder.shards[shard].path.display())
    }

    /// Reads the image of sample number `i` into `out` and returns its label.
    pub(crate) fn read(&mut self, i: u64, out: &mut Vec<u8>) -> Result<Option<u32>, ReadMdsError> {
        let (shard, sample) = self.find(i);
        let open = match self.open.take() {
            Some((number, open)) if number == shard => open,
            // The old shard is gone before the next one is unpacked.
            other => {
                drop(other);
                OpenShard::open(&self.folder.shards[shard])?
            }
        };
        let located = open.locate(sample)?;
        open.image(&located, out)?;
        self.open = Some((shard, open));
        Ok(located.label)
    }
}

/// Indexes the uncompressed shards that `index.json` of `folder` lists, and writes the index.
///
/// Progress counts shards.
pub(crate) fn build_index(
    folder: &Path,
    threads: usize,
    progress: OnProgress<'_>,
) -> Result<IndexReport, BuildIndexError> {
    let mds = MdsFolder::open(folder)?;
    if let Some(shard) = mds.shards.iter().find(|shard| shard.compression.is_some()) {
        return Err(ReadMdsError::Compressed { path: shard.path.clone() }.into());
    }
    let scan = |i: usize| Ok(scan_shard(&mds.shards[i])?);
    finish(folder, scan_all(mds.shards.len(), threads, &scan, progress)?)
}

/// Reads one plain shard and returns its samples in file order.
fn scan_shard(shard: &MdsShard) -> Result<Scanned, ReadMdsError> {
    let open = OpenShard::open(shard)?;
    let mut hasher = blake3::Hasher::new();
    // A pass of its own: what it leaves in the page cache serves the small reads below.
    File::open(&shard.path)
        .and_then(|f| hasher.update_reader(f).map(drop))
        .map_err(at(&shard.path))?;
    let mut records: Vec<SampleRecord> = Vec::new();
    let mut skipped = SkipList::default();
    let mut bytes: Vec<u8> = Vec::new();
    for sample in 0..shard.n_samples as usize {
        let located = open.locate(sample)?;
        open.image(&located, &mut bytes)?;
        match image_record(&bytes, located.image.start) {
            Ok(record) => records.push(SampleRecord { label: located.label, ..record }),
            Err(reason) => {
                skipped.push(format!("{}: sample {sample}", shard.path.display()), reason);
            }
        }
    }
    let digest = *hasher.finalize().as_bytes();
    let entry = ShardEntry { name: shard.name.clone(), bytes: shard.bytes, digest };
    Ok((ShardRecords { entry, records }, skipped))
}

#[cfg(test)]
pub(crate) mod tests;
