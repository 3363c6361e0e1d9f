//! Makes shards: from a folder of images, from IDX, MDS or Parquet files, or from nothing.
//!
//! The bytes of a shard depend on the input alone (no times, no owners). A shard appears under its
//! name when it is complete and synced; the index is written after all shards, and `pack.json`,
//! which says what was packed, last. A folder in which packing was interrupted is cleaned and
//! packed anew.

mod classes;
mod shard;
mod source;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::classes::{NoLabels, class_list};
use self::shard::ShardWriter;
pub use self::source::PackSource;
use self::source::{Item, Source};
use crate::bad::BAD_EXTENSION;
use crate::dataset::Dataset;
use crate::exclude::BEFORE_EXCLUDE;
use crate::files::{PARTIAL, partial_path, write_atomic};
use crate::idx::ReadIdxError;
use crate::index::{Fingerprint, INDEX_NAME, Index};
use crate::mds::ReadMdsError;
use crate::parquet::ReadParquetError;
use crate::wds::image_record;
use crate::{OnProgress, Progress, SkipList};

/// Name of the file that says what was packed.
pub const PACK_NAME: &str = "pack.json";

/// Default size of a shard: a few hundred for a million photographs, each readable in a second.
pub const SHARD_BYTES_DEFAULT: u64 = 256 << 20;

/// Version of `pack.json` and of the bytes that packing writes.
const PACK_VERSION: u32 = 1;

/// Samples between two calls of the progress function.
const PROGRESS_EVERY: u64 = 256;

/// What to do with a folder that holds another data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Leave it and fail.
    Refuse,
    /// Remove its index and shards.
    Replace,
}

/// How to pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackConfig {
    /// Shards are called `<name>-000000.tar` and on; letters, digits, `-` and `_`.
    pub name: String,
    /// A shard is closed before it would grow beyond this; one sample always fits.
    pub shard_bytes: u64,
    /// What to do with another data set in the folder.
    pub existing: Existing,
}

/// How a call of [`pack`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackOutcome {
    /// Shards and index were written.
    Written,
    /// The same input was packed there before; nothing was done.
    AlreadyThere,
}

/// What was packed.
#[derive(Clone, Debug)]
pub struct PackReport {
    /// Whether anything was written.
    pub outcome: PackOutcome,
    /// Identity of the data set.
    pub fingerprint: Fingerprint,
    /// Samples in the shards.
    pub n_samples: u64,
    /// Shards.
    pub n_shards: usize,
    /// Size of the shards.
    pub bytes: u64,
    /// Names of the classes, by label; empty without labels or names.
    pub classes: Vec<String>,
    /// Why there are no labels; nothing if there are some.
    pub no_labels: Option<NoLabels>,
    /// Images that could not be used; empty if nothing was written.
    pub skipped: SkipList,
}

/// Input that cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// A file or folder could not be read or written.
    #[error("failed to access `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The configuration makes no sense.
    #[error("{0}")]
    Config(String),
    /// The folder holds no images.
    #[error("`{}` holds no png, jpeg or webp images", path.display())]
    NoImages {
        /// The folder.
        path: PathBuf,
    },
    /// Images there were, but none of them could be used.
    #[error("none of the {} images in `{}` can be used; the first: `{}`: {}",
        skipped.n, path.display(), skipped.first[0].place, skipped.first[0].reason)]
    NoneUsable {
        /// The folder.
        path: PathBuf,
        /// Why, image by image.
        skipped: SkipList,
    },
    /// Folders lie too deep in each other.
    #[error("folders are nested more than {max} deep at `{}`", path.display())]
    TooDeep {
        /// Where.
        path: PathBuf,
        /// Deepest allowed.
        max: usize,
    },
    /// An IDX file is unusable.
    #[error(transparent)]
    Idx(#[from] ReadIdxError),
    /// MDS shards are unusable.
    #[error(transparent)]
    Mds(#[from] ReadMdsError),
    /// Parquet files are unusable.
    #[error(transparent)]
    Parquet(#[from] ReadParquetError),
    /// The data set that a part is taken of is unusable.
    #[error("failed to read data set `{}`", path.display())]
    Dataset {
        /// Its folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Images and labels do not belong together.
    #[error("`{}` has {n_labels} labels for {n_images} images", labels.display())]
    LabelCount {
        /// File of labels.
        labels: PathBuf,
        /// Labels there are.
        n_labels: u64,
        /// Images there are.
        n_images: u64,
    },
    /// Something gives no list of classes.
    #[error("`{}` gives no list of classes: {what}", from.display())]
    ClassList {
        /// Where the list was looked for.
        from: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A folder of images has others than the classes of a list.
    #[error("`{}` does not go with the list of classes: {what}", path.display())]
    NotInClasses {
        /// The folder.
        path: PathBuf,
        /// What is not in the list.
        what: String,
    },
    /// The output folder is in use.
    #[error(
        "`{}` holds another data set (`{found}`): choose another folder or replace it",
        path.display()
    )]
    OutputExists {
        /// The folder.
        path: PathBuf,
        /// A file found there.
        found: String,
    },
    /// An image could not be encoded.
    #[error("failed to encode image {index}")]
    Encode {
        /// Number of the image.
        index: u64,
        /// Why.
        #[source]
        source: image::ImageError,
    },
}

pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> PackError {
    let path = path.to_path_buf();
    move |source| PackError::Io { path, source }
}

/// Content of `pack.json`.
#[derive(Debug, Serialize, Deserialize)]
struct PackRecord {
    version: u32,
    name: String,
    /// Digest of what was packed and how.
    input: String,
    n_samples: u64,
    classes: Vec<String>,
}

/// Packs `source` into the folder `out`; progress counts images of the source.
pub fn pack(
    source: &PackSource,
    out: &Path,
    config: &PackConfig,
    progress: OnProgress<'_>,
) -> Result<PackReport, PackError> {
    check_config(config)?;
    let mut source = Source::open(source)?;
    if source.n() == 0 {
        let path = source.path().to_path_buf();
        return Err(PackError::NoImages { path });
    }
    let identity =
        format!("{PACK_VERSION}\n{}\n{}\n{}", config.name, config.shard_bytes, source.identity());
    let input = blake3::hash(identity.as_bytes()).to_hex().to_string();
    fs::create_dir_all(out).map_err(at(out))?;
    if let Some(report) = recognise(out, &input, &source) {
        return Ok(report);
    }
    clear(out, config)?;
    let marker = partial_path(&out.join(PACK_NAME));
    fs::write(&marker, b"packing\n").map_err(at(&marker))?;
    let (index, skipped) = write_shards(&mut source, out, config, progress)?;
    index.write(out).map_err(at(&out.join(INDEX_NAME)))?;
    let record = PackRecord {
        version: PACK_VERSION,
        name: config.name.clone(),
        input,
        n_samples: index.n_samples(),
        classes: source.classes().to_vec(),
    };
    write_record(out, &record)?;
    Ok(report(PackOutcome::Written, &index, &source, skipped))
}

fn report(outcome: PackOutcome, index: &Index, source: &Source, skipped: SkipList) -> PackReport {
    let of_input = || (index.n_classes() == 0).then_some(NoLabels::Input);
    PackReport {
        outcome,
        fingerprint: index.fingerprint(),
        n_samples: index.n_samples(),
        n_shards: index.shards().len(),
        bytes: index.shards().iter().map(|shard| shard.bytes).sum(),
        classes: source.classes().to_vec(),
        no_labels: source.no_labels().cloned().or_else(of_input),
        skipped,
    }
}

fn check_config(config: &PackConfig) -> Result<(), PackError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    let name = &config.name;
    if name.is_empty() || name.len() > 64 || !name.bytes().all(allowed) {
        return Err(PackError::Config(format!(
            "the shards' name `{}` must be 1 to 64 of the characters a-z A-Z 0-9 - _",
            name.escape_debug()
        )));
    }
    if config.shard_bytes == 0 {
        return Err(PackError::Config("`shard_bytes` must be positive".into()));
    }
    Ok(())
}

fn write_shards(
    source: &mut Source,
    out: &Path,
    config: &PackConfig,
    progress: OnProgress<'_>,
) -> Result<(Index, SkipList), PackError> {
    let mut writer = ShardWriter::new(out, &config.name, config.shard_bytes);
    let mut skipped = SkipList::default();
    let mut item = Item::default();
    let total = source.n();
    let mut n_written: u64 = 0;
    for i in 0..total {
        source.read(i, &mut item)?;
        let record = match item.lacks {
            Some(reason) => Err(reason.to_string()),
            None => image_record(&item.bytes, 0),
        };
        match record {
            Ok(record) => {
                let mut key = format!("{n_written:09}");
                if !item.stem.is_empty() {
                    key = format!("{key}-{}", item.stem);
                }
                writer.add(&key, &item.bytes, record, item.label)?;
                n_written += 1;
            }
            Err(reason) => skipped.push(item.place.clone(), reason),
        }
        if (i + 1) % PROGRESS_EVERY == 0 || i + 1 == total {
            progress(Progress { done: i + 1, total });
        }
    }
    if n_written == 0 {
        let path = source.path().to_path_buf();
        return Err(PackError::NoneUsable { path, skipped });
    }
    Ok((Index::build(&writer.finish()?), skipped))
}

/// Returns the report of an earlier, complete call with the same input.
fn recognise(out: &Path, input: &str, source: &Source) -> Option<PackReport> {
    let mut record = read_record(out)?;
    if record.input != input {
        return None;
    }
    let dataset = Dataset::open(out).ok()?;
    // A part has the names of the data set that it is of, which its input does not say; they are
    // not in the shards.
    if !source.classes().is_empty() && record.classes != source.classes() {
        record.classes = source.classes().to_vec();
        write_record(out, &record).ok()?;
    }
    let skipped = SkipList::default();
    let mut report = report(PackOutcome::AlreadyThere, dataset.index(), source, skipped);
    report.classes = record.classes;
    Some(report)
}

/// Returns the names of a packed data set's classes, by label, of its folder or URL; none where it
/// has no names, was not packed here, or its record cannot be read.
pub fn class_names(data: &Path) -> Vec<String> {
    class_list(data).unwrap_or_default()
}

fn write_record(out: &Path, record: &PackRecord) -> Result<(), PackError> {
    let mut text = serde_json::to_vec_pretty(record).expect("plain data serialises");
    text.push(b'\n');
    let path = out.join(PACK_NAME);
    write_atomic(&path, &text).map_err(at(&path))
}

fn read_record(out: &Path) -> Option<PackRecord> {
    let text = fs::read(out.join(PACK_NAME)).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Removes what an interrupted call left, or another data set if that is wanted.
fn clear(out: &Path, config: &PackConfig) -> Result<(), PackError> {
    let interrupted = partial_path(&out.join(PACK_NAME)).exists();
    let mut names: Vec<String> = vec![config.name.clone()];
    names.extend(read_record(out).map(|record| record.name));
    let mut remove: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(out).map_err(at(out))? {
        let entry = entry.map_err(at(out))?;
        let file = entry.file_name();
        let Some(file) = file.to_str() else { continue };
        let whole = file.strip_suffix(PARTIAL).unwrap_or(file);
        let is_index = whole == INDEX_NAME || whole == PACK_NAME;
        let is_shard = names.iter().any(|name| is_shard_of(whole, name));
        if is_about_index(whole) {
            remove.push(entry.path());
            continue;
        }
        if !is_index && !is_shard {
            continue;
        }
        let is_partial = whole != file;
        if !interrupted && !is_partial && config.existing == Existing::Refuse {
            return Err(PackError::OutputExists {
                path: out.to_path_buf(),
                found: file.to_string(),
            });
        }
        remove.push(entry.path());
    }
    // The marker goes last: without it the shards would look like somebody's data set.
    remove.sort_by_key(|path| path.ends_with(format!("{PACK_NAME}{PARTIAL}")));
    for path in remove {
        fs::remove_file(&path).map_err(at(&path))?;
    }
    Ok(())
}

/// Tells whether a file only says something about the index that is replaced.
fn is_about_index(file: &str) -> bool {
    Path::new(INDEX_NAME).with_extension(BAD_EXTENSION) == Path::new(file)
        || file.strip_prefix(INDEX_NAME).is_some_and(|rest| rest.starts_with(BEFORE_EXCLUDE))
}

fn is_shard_of(file: &str, name: &str) -> bool {
    file.strip_prefix(name)
        .and_then(|rest| rest.strip_prefix('-'))
        .and_then(|rest| rest.strip_suffix(".tar"))
        .is_some_and(|number| number.len() >= 6 && number.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests;
