//! Where images come from, as a numbered list of encoded images.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};

use lacuna_pixels::{IMAGE_BYTES_MAX, ImageShape};
use lacuna_types::SampleId;

use super::classes::{ClassFolders, NoLabels, class_list};
use super::{PackError, at};
use crate::dataset::Dataset;
use crate::idx::{self, IdxImages};
use crate::mds::{self, MdsFolder, MdsReader};
use crate::parquet::{self, Rows};
use crate::synthetic::{self, SyntheticSpec};

/// Deepest folder below the given one; deeper ones are links in a circle.
const DEPTH_MAX: usize = 32;

/// Longest part of a file's name that goes into a key: a tar header has room for 100 bytes in all.
const STEM_BYTES_MAX: usize = 60;

const IMAGES_PART: &str = "images-idx3-ubyte";
const LABELS_PART: &str = "labels-idx1-ubyte";

/// What is packed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PackSource {
    /// A folder of images, searched recursively. If all images lie in two or more sub-folders and
    /// none beside them, the sub-folders are classes, numbered by name.
    Folder(PathBuf),
    /// A folder of images whose sub-folders are classes of a list and have their numbers there; a
    /// class may have no sub-folder.
    Classed {
        /// The folder.
        root: PathBuf,
        /// Names of the classes by number, no name twice.
        classes: Vec<String>,
    },
    /// IDX files, gzipped or not.
    Idx {
        /// Images (`…-images-idx3-ubyte`).
        images: PathBuf,
        /// Their labels (`…-labels-idx1-ubyte`).
        labels: Option<PathBuf>,
    },
    /// A folder with the `index.json` of MDS shards.
    Mds(PathBuf),
    /// Parquet files, in this order.
    Parquet(Vec<PathBuf>),
    /// Generated images.
    Synthetic(SyntheticSpec),
    /// Some samples of a data set, in this order.
    Part {
        /// Its folder or URL.
        dataset: PathBuf,
        /// Numbers of the samples.
        ids: Vec<u64>,
    },
}

impl PackSource {
    /// Tells what a path is: a Parquet file, an IDX file of images, or a folder: with one of these
    /// (of several, what is called `train…`), with the list of MDS shards, or with images. Labels
    /// of IDX images are found by their name beside them.
    pub fn detect(path: &Path) -> Result<Self, PackError> {
        if !fs::metadata(path).map_err(at(path))?.is_dir() {
            return Ok(match parquet::is_parquet(path) {
                true => PackSource::Parquet(vec![path.to_path_buf()]),
                false => PackSource::idx(path),
            });
        }
        let mut candidates: Vec<PathBuf> = Vec::new();
        for entry in fs::read_dir(path).map_err(at(path))? {
            let file = entry.map_err(at(path))?.path();
            if file.is_file() && file_name(&file).contains(IMAGES_PART) {
                candidates.push(file);
            }
        }
        candidates.sort();
        let train = candidates.iter().find(|file| file_name(file).starts_with("train"));
        if let Some(images) = train.or(candidates.first()) {
            return Ok(PackSource::idx(images));
        }
        if mds::is_mds(path) {
            return Ok(PackSource::Mds(path.to_path_buf()));
        }
        let files = parquet::list(path).map_err(at(path))?;
        let train = of_split(&files, &["train"]);
        Ok(match (train.is_empty(), files.is_empty()) {
            (false, _) => PackSource::Parquet(train),
            (true, false) => PackSource::Parquet(files),
            (true, true) => PackSource::Folder(path.to_path_buf()),
        })
    }

    /// Finds the Parquet files in `folder` whose names start with one of `prefixes`; of several
    /// prefixes the first that has files counts.
    pub fn parquet_split(folder: &Path, prefixes: &[&str]) -> Result<Option<Self>, PackError> {
        let files = of_split(&parquet::list(folder).map_err(at(folder))?, prefixes);
        Ok((!files.is_empty()).then_some(PackSource::Parquet(files)))
    }

    fn idx(images: &Path) -> Self {
        let name = file_name(images).replace(IMAGES_PART, LABELS_PART);
        let labels = images.with_file_name(name);
        PackSource::Idx {
            images: images.to_path_buf(),
            labels: (labels != images && labels.is_file()).then_some(labels),
        }
    }
}

fn of_split(files: &[PathBuf], prefixes: &[&str]) -> Vec<PathBuf> {
    let of = |prefix: &&str| -> Vec<PathBuf> {
        files.iter().filter(|file| file_name(file).starts_with(prefix)).cloned().collect()
    };
    prefixes.iter().map(of).find(|found| !found.is_empty()).unwrap_or_default()
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// One encoded image; reused from image to image.
#[derive(Default)]
pub(super) struct Item {
    pub(super) bytes: Vec<u8>,
    pub(super) label: Option<u32>,
    /// Readable part of the key; may be empty.
    pub(super) stem: String,
    /// Names the image in reports.
    pub(super) place: String,
    /// Why there are no bytes, where that is known.
    pub(super) lacks: Option<&'static str>,
}

/// An opened source.
pub(super) enum Source {
    Folder(Folder),
    Idx { path: PathBuf, images: IdxImages, labels: Option<Vec<u8>> },
    Mds { reader: MdsReader, identity: String },
    Parquet { root: PathBuf, rows: Box<Rows>, identity: String },
    Synthetic(SyntheticSpec),
    Part { path: PathBuf, dataset: Box<Dataset>, ids: Vec<u64>, classes: Vec<String> },
}

pub(super) struct Folder {
    root: PathBuf,
    files: Vec<PathBuf>,
    classes: ClassFolders,
    identity: String,
}

impl Source {
    pub(super) fn open(source: &PackSource) -> Result<Self, PackError> {
        match source {
            PackSource::Folder(root) => Ok(Source::Folder(Folder::list(root, None)?)),
            PackSource::Classed { root, classes } => {
                Ok(Source::Folder(Folder::list(root, Some(classes.as_slice()))?))
            }
            PackSource::Idx { images, labels } => {
                let path = images.clone();
                let images = idx::read_images(images)?;
                let n_images = images.n();
                let labels = match labels {
                    None => None,
                    Some(file) => {
                        let labels = idx::read_labels(file)?;
                        let n_labels = labels.len() as u64;
                        if n_labels != n_images {
                            let labels = file.clone();
                            return Err(PackError::LabelCount { labels, n_labels, n_images });
                        }
                        Some(labels)
                    }
                };
                Ok(Source::Idx { path, images, labels })
            }
            PackSource::Mds(root) => {
                let folder = MdsFolder::open(root)?;
                let identity = identity_of("mds", root, &folder.files())?;
                Ok(Source::Mds { reader: MdsReader::new(folder), identity })
            }
            PackSource::Parquet(files) => {
                let root = files.first().and_then(|file| file.parent()).unwrap_or(Path::new(""));
                let rows = Box::new(Rows::open(files)?);
                let identity = identity_of("parquet", root, files)?;
                Ok(Source::Parquet { root: root.to_path_buf(), rows, identity })
            }
            PackSource::Synthetic(spec) => {
                if spec.n_images == 0 || !spec.shape.is_supported() {
                    let text =
                        format!("{} images of {:?} cannot be made", spec.n_images, spec.shape);
                    return Err(PackError::Config(text));
                }
                Ok(Source::Synthetic(*spec))
            }
            PackSource::Part { dataset: path, ids } => Source::open_part(path, ids),
        }
    }

    /// Returns the number of images, usable or not.
    pub(super) fn n(&self) -> u64 {
        match self {
            Source::Folder(folder) => folder.files.len() as u64,
            Source::Idx { images, .. } => images.n(),
            Source::Mds { reader, .. } => reader.folder().n(),
            Source::Parquet { rows, .. } => rows.n(),
            Source::Synthetic(spec) => spec.n_images,
            Source::Part { ids, .. } => ids.len() as u64,
        }
    }

    /// Opens some samples of a data set.
    fn open_part(path: &Path, ids: &[u64]) -> Result<Self, PackError> {
        let source = |source| PackError::Dataset { path: path.to_path_buf(), source };
        let dataset = Dataset::open(path).map_err(|err| source(Box::new(err)))?;
        let n = dataset.n_samples();
        if let Some(id) = ids.iter().find(|id| **id >= n) {
            return Err(PackError::Config(format!("sample {id} is none of the {n} there are")));
        }
        let classes = match class_list(path) {
            Ok(names) => names,
            Err(PackError::ClassList { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        let (path, dataset) = (path.to_path_buf(), Box::new(dataset));
        Ok(Source::Part { path, dataset, ids: ids.to_vec(), classes })
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            Source::Folder(folder) => &folder.root,
            Source::Idx { path, .. } => path,
            Source::Mds { reader, .. } => reader.folder().root(),
            Source::Parquet { root, .. } => root,
            Source::Synthetic(_) => Path::new("(generated)"),
            Source::Part { path, .. } => path,
        }
    }

    pub(super) fn classes(&self) -> &[String] {
        match self {
            Source::Folder(folder) => &folder.classes.names,
            Source::Part { classes, .. } => classes,
            _ => &[],
        }
    }

    /// Tells why a folder of images has no labels; nothing of other sources.
    pub(super) fn no_labels(&self) -> Option<&NoLabels> {
        match self {
            Source::Folder(folder) => folder.classes.no_labels.as_ref(),
            _ => None,
        }
    }

    /// Returns a text that changes when the input does.
    ///
    /// For folders, MDS and Parquet these are names, sizes and times of the files; their content is
    /// not read.
    pub(super) fn identity(&self) -> String {
        match self {
            Source::Folder(folder) => folder.identity.clone(),
            Source::Mds { identity, .. } | Source::Parquet { identity, .. } => identity.clone(),
            Source::Idx { images, labels, .. } => {
                let pixels = blake3::hash(&images.pixels).to_hex();
                let labels = labels.as_deref().map(|labels| blake3::hash(labels).to_hex());
                format!("idx\n{}x{}\n{pixels}\n{labels:?}", images.height, images.width)
            }
            Source::Synthetic(spec) => format!("synthetic\n{spec:?}"),
            Source::Part { dataset, ids, .. } => {
                let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
                format!("part\n{}\n{}", dataset.fingerprint(), blake3::hash(&ids).to_hex())
            }
        }
    }

    /// Reads image number `i`; numbers must rise by one from call to call.
    pub(super) fn read(&mut self, i: u64, item: &mut Item) -> Result<(), PackError> {
        item.bytes.clear();
        item.stem.clear();
        item.label = None;
        item.lacks = None;
        match self {
            Source::Folder(folder) => folder.read(i, item),
            Source::Idx { images, labels, .. } => {
                let shape = ImageShape { height: images.height, width: images.width, channels: 1 };
                item.label = labels.as_ref().map(|labels| u32::from(labels[i as usize]));
                item.place = format!("image {i}");
                encode_png(i, images.image(i), shape, &mut item.bytes)
            }
            Source::Mds { reader, .. } => {
                item.label = reader.read(i, &mut item.bytes)?;
                item.place = reader.place(i);
                Ok(())
            }
            Source::Parquet { rows, .. } => {
                item.label = rows.read(i, &mut item.bytes)?;
                item.place = rows.place(i);
                item.lacks = item.bytes.is_empty().then_some("the row holds no bytes of an image");
                Ok(())
            }
            Source::Synthetic(spec) => {
                let image = synthetic::image(spec, i);
                item.label = Some(image.label);
                item.place = format!("image {i}");
                encode_png(i, &image.pixels, spec.shape, &mut item.bytes)
            }
            Source::Part { path, dataset, ids, .. } => {
                let id = SampleId(ids[i as usize]);
                item.place = format!("sample {id}");
                item.label = dataset.index().record(id).label;
                dataset
                    .read(id, &mut item.bytes)
                    .map_err(|err| PackError::Dataset { path: path.clone(), source: Box::new(err) })
            }
        }
    }
}

fn encode_png(
    index: u64,
    pixels: &[u8],
    shape: ImageShape,
    out: &mut Vec<u8>,
) -> Result<(), PackError> {
    let color = match shape.channels {
        1 => ExtendedColorType::L8,
        _ => ExtendedColorType::Rgb8,
    };
    // The fast level decodes fastest too; small images fill whole tar blocks either way.
    PngEncoder::new_with_quality(out, CompressionType::Fast, FilterType::Adaptive)
        .write_image(pixels, shape.width, shape.height, color)
        .map_err(|source| PackError::Encode { index, source })
}

/// Describes files by their names below `root`, sizes and times.
fn identity_of(kind: &str, root: &Path, files: &[PathBuf]) -> Result<String, PackError> {
    let mut identity = format!("{kind}\n");
    for file in files {
        let meta = fs::metadata(file).map_err(at(file))?;
        let time = meta
            .modified()
            .ok()
            .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
            .map_or(0, |age| age.as_nanos());
        let relative = file.strip_prefix(root).unwrap_or(file);
        identity.push_str(&format!("{relative:?} {} {time}\n", meta.len()));
    }
    Ok(identity)
}

impl Folder {
    /// Lists the images below `root`; their classes are numbered as in a list, if there is one.
    fn list(root: &Path, listed: Option<&[String]>) -> Result<Self, PackError> {
        let mut files: Vec<PathBuf> = Vec::new();
        let mut seen: BTreeSet<PathBuf> = BTreeSet::new();
        walk(root, 0, &mut seen, &mut files)?;
        files.sort();
        if files.is_empty() {
            let path = root.to_path_buf();
            return Err(PackError::NoImages { path });
        }
        let mut identity = identity_of("folder", root, &files)?;
        let classes = match listed {
            None => ClassFolders::find(root, &files),
            Some(names) => {
                identity.push_str(&format!("classes {names:?}\n"));
                ClassFolders::listed(root, &files, names)?
            }
        };
        Ok(Folder { root: root.to_path_buf(), files, classes, identity })
    }

    fn read(&self, i: u64, item: &mut Item) -> Result<(), PackError> {
        let file = &self.files[i as usize];
        item.place = file.display().to_string();
        // One byte more than allowed is enough to see that an image is too large.
        File::open(file)
            .and_then(|open| open.take(IMAGE_BYTES_MAX + 1).read_to_end(&mut item.bytes))
            .map_err(at(file))?;
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' };
        item.stem = stem.chars().take(STEM_BYTES_MAX).map(plain).collect();
        item.label = self.classes.label(&self.root, file);
        Ok(())
    }
}

/// Collects the image files below `folder`, following links but no folder twice.
fn walk(
    folder: &Path,
    depth: usize,
    seen: &mut BTreeSet<PathBuf>,
    files: &mut Vec<PathBuf>,
) -> Result<(), PackError> {
    if depth > DEPTH_MAX {
        let path = folder.to_path_buf();
        let max = DEPTH_MAX;
        return Err(PackError::TooDeep { path, max });
    }
    let real = fs::canonicalize(folder).map_err(at(folder))?;
    if !seen.insert(real) {
        return Ok(());
    }
    let mut entries: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(folder).map_err(at(folder))? {
        entries.push(entry.map_err(at(folder))?.path());
    }
    // Sorted, so that of two ways to one folder the same is taken on every machine.
    entries.sort();
    for path in entries {
        if file_name(&path).starts_with('.') {
            continue;
        }
        if path.is_dir() {
            walk(&path, depth + 1, seen, files)?;
        } else if has_image_suffix(&path) {
            files.push(path);
        }
    }
    Ok(())
}

fn has_image_suffix(path: &Path) -> bool {
    let suffix = path.extension().unwrap_or_default().to_ascii_lowercase();
    ["png", "jpg", "jpeg", "webp"].iter().any(|known| suffix == *known)
}
