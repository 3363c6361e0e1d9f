//! WebDataset tar shards: how members form samples, and the index of shards that are already there.
//!
//! A member's key is its path up to the first dot of the file name; the rest, in lower case, is its
//! suffix. Consecutive members with one key are one sample; grouping never crosses a shard. Members
//! that are not regular files, and names that start with two underscores, are passed over.

mod remote;
mod resume;

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use lacuna_pixels::{IMAGE_BYTES_MAX, probe};
use lacuna_store::StoreError;

pub use self::remote::{build_index_of_store, expand};
use self::resume::Parts;
use crate::index::{Index, LABEL_MAX, SampleRecord, ShardEntry, ShardRecords, crc32};
use crate::mds::{self, MDS_INDEX_NAME, ReadMdsError};
use crate::{OnProgress, Progress, SkipList};

/// Buffer between a shard and the tar reader: few system calls, small beside an image.
const READ_BUFFER_BYTES: usize = 1 << 20;

/// Longest text of a `.cls` member that is read: a number has at most 10 digits.
const CLS_BYTES_MAX: u64 = 64;

/// Shards that cannot be indexed.
#[derive(Debug, thiserror::Error)]
pub enum BuildIndexError {
    /// A file or folder could not be read or written.
    #[error("failed to access `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The folder holds no shards.
    #[error("`{}` holds no .tar files, and no {MDS_INDEX_NAME} that lists shards", path.display())]
    NoShards {
        /// The folder.
        path: PathBuf,
    },
    /// No shard holds an image.
    #[error("the shards in `{}` hold no png, jpeg or webp images", path.display())]
    NoSamples {
        /// The folder.
        path: PathBuf,
    },
    /// A member occurs twice in one sample.
    #[error("sample `{key}` of shard `{}` has two members `.{suffix}`", shard.display())]
    Duplicate {
        /// The shard.
        shard: PathBuf,
        /// Key of the sample.
        key: String,
        /// Suffix that occurs twice.
        suffix: String,
    },
    /// A sample has several images and none is *the* image.
    #[error(
        "sample `{key}` of shard `{}` has images .{} and .{}",
        shard.display(), suffixes.0, suffixes.1
    )]
    TwoImages {
        /// The shard.
        shard: PathBuf,
        /// Key of the sample.
        key: String,
        /// Suffixes of two of the images.
        suffixes: (String, String),
    },
    /// A `.cls` member that holds no usable label.
    #[error(
        "sample `{key}` of shard `{}` has label `{text}`, not a number up to {LABEL_MAX}",
        shard.display()
    )]
    Label {
        /// The shard.
        shard: PathBuf,
        /// Key of the sample.
        key: String,
        /// What the member holds.
        text: String,
    },
    /// The shard ends inside a member.
    #[error("shard `{}` is cut off inside `{member}` at byte {offset}", shard.display())]
    Truncated {
        /// The shard.
        shard: PathBuf,
        /// Name of the member.
        member: String,
        /// First byte of the member's data.
        offset: u64,
    },
    /// The store does not give the shards, or does not take the index.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A pattern of names that means nothing.
    #[error("`{pattern}` is not a pattern of shards such as train-{{000000..000099}}.tar: {why}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong.
        why: &'static str,
    },
    /// MDS shards that cannot be used.
    #[error(transparent)]
    Mds(#[from] ReadMdsError),
}

/// Splits a member's path into key and lower-case suffix; `None` if it belongs to no sample.
pub fn split_name(path: &str) -> Option<(&str, String)> {
    let base_at = path.rfind('/').map_or(0, |slash| slash + 1);
    let base = &path[base_at..];
    if path.split('/').any(|part| part.starts_with("__")) {
        return None;
    }
    match base.find('.') {
        None | Some(0) => None,
        Some(dot) => Some((&path[..base_at + dot], base[dot + 1..].to_ascii_lowercase())),
    }
}

/// What indexing found.
#[derive(Clone, Debug)]
pub struct IndexReport {
    /// The index, as written.
    pub index: Index,
    /// Members that were to be samples and are none, and samples without an image.
    pub skipped: SkipList,
}

/// Indexes all `*.tar` files of `folder`, by name, with `threads` threads, and writes the index.
/// A folder without any may have MDS shards instead, which its `index.json` lists.
///
/// Progress counts shards. After an interruption, shards of tar that were read are not read again.
pub fn build_index(
    folder: &Path,
    threads: usize,
    progress: OnProgress<'_>,
) -> Result<IndexReport, BuildIndexError> {
    let at = |path: &Path| {
        let path = path.to_path_buf();
        move |source| BuildIndexError::Io { path, source }
    };
    let mut names: Vec<String> = Vec::new();
    for entry in fs::read_dir(folder).map_err(at(folder))? {
        let name = entry.map_err(at(folder))?.file_name();
        match name.to_str() {
            Some(name) if name.ends_with(".tar") => names.push(name.to_string()),
            _ => {}
        }
    }
    names.sort();
    if names.is_empty() && mds::is_mds(folder) {
        return mds::build_index(folder, threads, progress);
    }
    if names.is_empty() {
        let path = folder.to_path_buf();
        return Err(BuildIndexError::NoShards { path });
    }
    let parts = Parts::of(folder);
    let scan = |i: usize| {
        let (path, name) = (folder.join(&names[i]), &names[i]);
        parts.through(&path, name, || scan_shard(&path, name))
    };
    let report = finish(folder, scan_all(names.len(), threads, &scan, progress)?)?;
    parts.remove();
    Ok(report)
}

/// Builds and writes the index of scanned shards.
pub(crate) fn finish(folder: &Path, scanned: Vec<Scanned>) -> Result<IndexReport, BuildIndexError> {
    let report = join(folder, scanned)?;
    let path = folder.to_path_buf();
    report.index.write(folder).map_err(|source| BuildIndexError::Io { path, source })?;
    Ok(report)
}

/// Builds the index of scanned shards, which lie in `folder`.
fn join(folder: &Path, scanned: Vec<Scanned>) -> Result<IndexReport, BuildIndexError> {
    let mut shards: Vec<ShardRecords> = Vec::new();
    let mut skipped = SkipList::default();
    for (shard, skips) in scanned {
        skipped.extend(skips);
        if shard.records.is_empty() {
            skipped.push(shard.entry.name, "the shard holds no images");
        } else {
            shards.push(shard);
        }
    }
    if shards.is_empty() {
        let path = folder.to_path_buf();
        return Err(BuildIndexError::NoSamples { path });
    }
    Ok(IndexReport { index: Index::build(&shards), skipped })
}

/// A shard with its samples, and what was left out of it.
pub(crate) type Scanned = (ShardRecords, SkipList);

/// Calls `scan` for every shard number below `total`; returns what it found, in order.
pub(crate) fn scan_all(
    total: usize,
    threads: usize,
    scan: &(dyn Fn(usize) -> Result<Scanned, BuildIndexError> + Sync),
    progress: OnProgress<'_>,
) -> Result<Vec<Scanned>, BuildIndexError> {
    if total == 0 {
        return Ok(Vec::new());
    }
    let next = AtomicUsize::new(0);
    let mut scanned: Vec<Option<Scanned>> = (0..total).map(|_| None).collect();
    // One message a shard, so the bound is the number of shards: nobody ever waits.
    let (sender, receiver) = mpsc::sync_channel(total);
    thread::scope(|scope| {
        for _ in 0..threads.clamp(1, total) {
            let (next, sender) = (&next, sender.clone());
            scope.spawn(move || {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= total {
                        break;
                    }
                    let result = scan(i);
                    if result.is_err() {
                        next.store(total, Ordering::Relaxed);
                    }
                    if sender.send((i, result)).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        let mut first_error: Option<(usize, BuildIndexError)> = None;
        for (done, (i, result)) in (1u64..).zip(receiver) {
            match result {
                Ok(found) => scanned[i] = Some(found),
                Err(error) if first_error.as_ref().is_none_or(|(at, _)| i < *at) => {
                    first_error = Some((i, error));
                }
                Err(_) => {}
            }
            let total = total as u64;
            progress(Progress { done, total });
        }
        match first_error {
            Some((_, error)) => Err(error),
            None => Ok(scanned.into_iter().flatten().collect()),
        }
    })
}

/// Reads one shard and returns its samples in file order.
pub fn scan_shard(path: &Path, name: &str) -> Result<Scanned, BuildIndexError> {
    let io = |source| BuildIndexError::Io { path: path.to_path_buf(), source };
    let file = File::open(path).map_err(io)?;
    let bytes = file.metadata().map_err(io)?.len();
    scan(path, name, bytes, BufReader::with_capacity(READ_BUFFER_BYTES, file))
}

/// Reads one shard, of `bytes` bytes; `path` is named in errors.
fn scan(path: &Path, name: &str, bytes: u64, shard: impl Read) -> Result<Scanned, BuildIndexError> {
    let io = |source| BuildIndexError::Io { path: path.to_path_buf(), source };
    let hashing = Hashing { inner: shard, hasher: blake3::Hasher::new() };
    let mut archive = tar::Archive::new(hashing);
    let mut scan =
        Scan { shard: path, group: None, records: Vec::new(), skipped: SkipList::default() };
    for entry in archive.entries().map_err(io)? {
        scan.member(entry.map_err(io)?)?;
    }
    scan.close_group()?;
    let (records, skipped) = (scan.records, scan.skipped);
    let mut rest = archive.into_inner();
    io::copy(&mut rest, &mut io::sink()).map_err(io)?;
    let entry =
        ShardEntry { name: name.to_string(), bytes, digest: *rest.hasher.finalize().as_bytes() };
    Ok((ShardRecords { entry, records }, skipped))
}

struct Hashing<R> {
    inner: R,
    hasher: blake3::Hasher,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(out)?;
        self.hasher.update(&out[..n]);
        Ok(n)
    }
}

/// The members of the sample being read.
struct Group {
    key: String,
    suffixes: Vec<String>,
    /// Suffix and record of the image, `None` where the image is unusable (and already listed).
    image: Option<(String, Option<SampleRecord>)>,
    label: Option<u32>,
}

struct Scan<'a> {
    shard: &'a Path,
    group: Option<Group>,
    records: Vec<SampleRecord>,
    skipped: SkipList,
}

impl Scan<'_> {
    fn member(&mut self, mut entry: tar::Entry<'_, impl Read>) -> Result<(), BuildIndexError> {
        if !entry.header().entry_type().is_file() {
            return Ok(());
        }
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let Some((key, suffix)) = split_name(&path) else {
            return Ok(());
        };
        if self.group.as_ref().is_none_or(|group| group.key != key) {
            self.close_group()?;
        }
        let group = self.group.get_or_insert_with(|| Group {
            key: key.to_string(),
            suffixes: Vec::new(),
            image: None,
            label: None,
        });
        if group.suffixes.contains(&suffix) {
            return Err(BuildIndexError::Duplicate {
                shard: self.shard.to_path_buf(),
                key: key.to_string(),
                suffix,
            });
        }
        group.suffixes.push(suffix.clone());
        let offset = entry.raw_file_position();
        let size = entry.size();
        if suffix == "cls" {
            let bytes =
                read_member(self.shard, &path, &mut entry, offset, size.min(CLS_BYTES_MAX))?;
            group.label = Some(parse_label(self.shard, key, &bytes)?);
        } else if is_image_suffix(&suffix) && takes_image(self.shard, group, &suffix)? {
            let limit = size.min(IMAGE_BYTES_MAX + 1);
            let bytes = read_member(self.shard, &path, &mut entry, offset, limit)?;
            let record = image_record(&bytes, offset);
            if let Err(reason) = &record {
                let place = format!("{}: {path}", self.shard.display());
                self.skipped.push(place, reason.as_str());
            }
            group.image = Some((suffix, record.ok()));
        }
        Ok(())
    }

    fn close_group(&mut self) -> Result<(), BuildIndexError> {
        let Some(group) = self.group.take() else {
            return Ok(());
        };
        match group.image {
            Some((_, Some(record))) => {
                self.records.push(SampleRecord { label: group.label, ..record })
            }
            Some((_, None)) => {}
            None => {
                let place = format!("{}: {}", self.shard.display(), group.key);
                self.skipped.push(place, "the sample has no png, jpeg or webp image");
            }
        }
        Ok(())
    }
}

fn is_image_suffix(suffix: &str) -> bool {
    let last = suffix.rsplit('.').next().unwrap_or(suffix);
    matches!(last, "png" | "jpg" | "jpeg" | "webp")
}

/// Decides whether a further image member is the sample's image: a plain suffix (`jpg`) wins over a
/// compound one (`seg.png`); two of one kind are an error.
fn takes_image(shard: &Path, group: &Group, suffix: &str) -> Result<bool, BuildIndexError> {
    let Some((have, _)) = &group.image else {
        return Ok(true);
    };
    match (have.contains('.'), suffix.contains('.')) {
        (true, false) => Ok(true),
        (false, true) => Ok(false),
        _ => Err(BuildIndexError::TwoImages {
            shard: shard.to_path_buf(),
            key: group.key.clone(),
            suffixes: (have.clone(), suffix.to_string()),
        }),
    }
}

fn read_member(
    shard: &Path,
    member: &str,
    entry: &mut impl Read,
    offset: u64,
    size: u64,
) -> Result<Vec<u8>, BuildIndexError> {
    let mut bytes: Vec<u8> = Vec::new();
    let read = entry.take(size).read_to_end(&mut bytes);
    match read {
        Ok(n) if n as u64 == size => Ok(bytes),
        Err(source) if source.kind() != io::ErrorKind::UnexpectedEof => {
            Err(BuildIndexError::Io { path: shard.to_path_buf(), source })
        }
        _ => Err(BuildIndexError::Truncated {
            shard: shard.to_path_buf(),
            member: member.to_string(),
            offset,
        }),
    }
}

fn parse_label(shard: &Path, key: &str, bytes: &[u8]) -> Result<u32, BuildIndexError> {
    let text = String::from_utf8_lossy(bytes);
    match text.trim().parse::<u32>() {
        Ok(label) if label <= LABEL_MAX => Ok(label),
        _ => Err(BuildIndexError::Label {
            shard: shard.to_path_buf(),
            key: key.to_string(),
            text: text.escape_debug().to_string(),
        }),
    }
}

/// Builds the record of an image, without its label, or says why it is no sample.
pub(crate) fn image_record(bytes: &[u8], offset: u64) -> Result<SampleRecord, String> {
    if bytes.len() as u64 > IMAGE_BYTES_MAX {
        return Err(format!("the image has more than {IMAGE_BYTES_MAX} bytes"));
    }
    let info = probe(bytes).map_err(|error| error.to_string())?;
    let side =
        |pixels: u32| u16::try_from(pixels).map_err(|_| format!("a side of {pixels} pixels"));
    Ok(SampleRecord {
        offset,
        bytes: bytes.len() as u32,
        crc: crc32(bytes),
        width: side(info.size.width)?,
        height: side(info.size.height)?,
        codec: info.codec,
        label: None,
    })
}

#[cfg(test)]
mod tests;
