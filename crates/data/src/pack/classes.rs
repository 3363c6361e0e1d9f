//! Which classes the images of a folder have, and lists of classes that others have.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lacuna_store::{Limits, Stop, Store, StoreError, is_url};

use super::{PACK_NAME, PackError, PackRecord, at};

/// Most classes of a list: as many as a task may have.
const CLASSES_MAX: usize = 1 << 20;

/// Most bytes of a list: 64 for each class.
const LIST_BYTES_MAX: u64 = 64 << 20;

/// A store that says nothing for so long has a wrong address: whoever waits is a person.
const FETCH_DEADLINE: Duration = Duration::from_secs(20);

/// Folders that a message names.
const FOLDERS_SHOWN: usize = 5;

/// Why a data set has no labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoLabels {
    /// The images lie in no folders.
    Flat,
    /// All images lie in one folder.
    OneFolder {
        /// Its name.
        folder: String,
    },
    /// Some images lie beside the folders of the others.
    Beside {
        /// The first of them, as seen from the folder that is packed.
        image: String,
        /// How many there are.
        n_images: u64,
    },
    /// It is no folder of images, and says no class of any.
    Input,
}

impl fmt::Display for NoLabels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoLabels::Flat => write!(f, "no image lies in a class folder"),
            NoLabels::OneFolder { folder } => {
                write!(f, "there is one folder only, `{}`", folder.escape_debug())
            }
            NoLabels::Beside { image, n_images } => {
                let image = image.escape_debug();
                match *n_images {
                    1 => write!(f, "`{image}` lies beside the class folders"),
                    n => write!(f, "`{image}` and {} more lie beside the class folders", n - 1),
                }
            }
            NoLabels::Input => write!(f, "the input has none"),
        }
    }
}

/// Where the images of a folder lie.
#[derive(Default)]
struct Places<'a> {
    /// Names of the folders directly in it that have some, at any depth.
    folders: BTreeSet<String>,
    /// First of those that lie in none, and their number.
    beside: Option<(&'a Path, u64)>,
}

impl<'a> Places<'a> {
    fn of(root: &Path, files: &'a [PathBuf]) -> Self {
        let mut out = Places::default();
        for file in files {
            match first_folder(root, file) {
                Some(folder) => {
                    out.folders.insert(folder);
                }
                None => out.beside.get_or_insert((file.as_path(), 0)).1 += 1,
            }
        }
        out
    }

    /// Tells what lies beside the folders.
    fn beside(&self, root: &Path) -> Option<NoLabels> {
        let (image, n_images) = self.beside?;
        let image = image.strip_prefix(root).unwrap_or(image).display().to_string();
        Some(NoLabels::Beside { image, n_images })
    }

    /// Tells why the folders are no classes; nothing if they are.
    fn no_labels(&self, root: &Path) -> Option<NoLabels> {
        match (self.beside(root), self.folders.len()) {
            (Some(_), 0) => Some(NoLabels::Flat),
            (Some(beside), _) => Some(beside),
            (None, 0 | 1) => {
                let folder = self.folders.first().cloned().unwrap_or_default();
                Some(NoLabels::OneFolder { folder })
            }
            (None, _) => None,
        }
    }
}

/// The class folders of a folder of images.
#[derive(Debug, Default)]
pub(super) struct ClassFolders {
    /// Names by number; empty without labels.
    pub(super) names: Vec<String>,
    numbers: BTreeMap<String, u32>,
    /// Why there are none.
    pub(super) no_labels: Option<NoLabels>,
}

impl ClassFolders {
    /// Takes the folders in `root` as classes, numbered by name, if there are two or more and no
    /// image lies beside them.
    pub(super) fn find(root: &Path, files: &[PathBuf]) -> Self {
        let places = Places::of(root, files);
        match places.no_labels(root) {
            None => ClassFolders::numbered(places.folders.into_iter().collect()),
            no_labels => ClassFolders { no_labels, ..ClassFolders::default() },
        }
    }

    /// Takes the folders in `root` as those classes of a list that have images.
    pub(super) fn listed(
        root: &Path,
        files: &[PathBuf],
        names: &[String],
    ) -> Result<Self, PackError> {
        let wrong = |what: String| PackError::NotInClasses { path: root.to_path_buf(), what };
        let out = ClassFolders::numbered(names.to_vec());
        let places = Places::of(root, files);
        if let Some(beside) = places.beside(root) {
            return Err(wrong(beside.to_string()));
        }
        let unknown: Vec<String> = places
            .folders
            .iter()
            .filter(|name| !out.numbers.contains_key(*name))
            .map(|name| format!("`{}`", name.escape_debug()))
            .collect();
        let n_more = unknown.len().saturating_sub(FOLDERS_SHOWN);
        let shown = unknown[..unknown.len() - n_more].join(", ");
        match (unknown.len(), n_more) {
            (0, _) => Ok(out),
            (1, _) => Err(wrong(format!("its folder {shown} is not in it"))),
            (_, 0) => Err(wrong(format!("its folders {shown} are not in it"))),
            (_, n) => Err(wrong(format!("its folders {shown} and {n} more are not in it"))),
        }
    }

    fn numbered(names: Vec<String>) -> Self {
        let numbers: BTreeMap<String, u32> = names.iter().cloned().zip(0..).collect();
        ClassFolders { names, numbers, no_labels: None }
    }

    /// Returns the class of an image below `root`.
    pub(super) fn label(&self, root: &Path, file: &Path) -> Option<u32> {
        let folder = first_folder(root, file)?;
        self.numbers.get(&folder).copied()
    }
}

fn first_folder(root: &Path, file: &Path) -> Option<String> {
    let relative = file.strip_prefix(root).ok()?;
    let mut parts = relative.components();
    let first = parts.next()?;
    parts.next()?;
    Some(first.as_os_str().to_string_lossy().into_owned())
}

/// Reads the names of classes, by number: of a packed data set (its folder or URL, its index or its
/// `pack.json`), or of a text file with a name on each line.
///
/// # Errors
/// Where there are no names, or one of them twice.
pub fn class_list(from: &Path) -> Result<Vec<String>, PackError> {
    let names = match (from.to_str().filter(|text| is_url(text)), record_of(from)) {
        (Some(url), _) => fetch(url)?.map_or_else(no_record, |bytes| names_of_record(&bytes)),
        (None, Some(path)) => match read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => no_record(),
            found => names_of_record(&found.map_err(at(&path))?),
        },
        (None, None) => names_of_text(&read(from).map_err(at(from))?),
    };
    let wrong = |what: String| PackError::ClassList { from: from.to_path_buf(), what };
    names.and_then(checked).map_err(wrong)
}

/// Tells where the record of a data set is; nothing for other files.
fn record_of(from: &Path) -> Option<PathBuf> {
    if from.is_dir() {
        return Some(from.join(PACK_NAME));
    }
    let name = from.file_name()?.to_str()?;
    is_of_dataset(name).then(|| from.with_file_name(PACK_NAME))
}

/// Tells whether a file of this name lies beside the shards of a data set.
fn is_of_dataset(name: &str) -> bool {
    name.ends_with(".lacuna") || name == PACK_NAME
}

fn no_record() -> Result<Vec<String>, String> {
    Err(format!("there is no {PACK_NAME}, which has the names of its classes"))
}

/// Fetches the record of a data set behind a URL, if there is one.
fn fetch(url: &str) -> Result<Option<Vec<u8>>, PackError> {
    let folder = match url.rsplit_once('/') {
        Some((folder, name)) if is_of_dataset(name) => folder,
        _ => url.trim_end_matches('/'),
    };
    let failed = |source: StoreError| PackError::Dataset {
        path: PathBuf::from(folder),
        source: Box::new(source),
    };
    let limits = Limits::default().within(FETCH_DEADLINE);
    let store = Store::open(folder, limits).map_err(failed)?;
    match store.get(PACK_NAME, LIST_BYTES_MAX, &Stop::default()) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes: Vec<u8> = Vec::new();
    File::open(path)?.take(LIST_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LIST_BYTES_MAX {
        return Err(io::Error::other(format!("it has more than {LIST_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

fn names_of_record(bytes: &[u8]) -> Result<Vec<String>, String> {
    let record: PackRecord = serde_json::from_slice(bytes)
        .map_err(|error| format!("its {PACK_NAME} cannot be understood: {error}"))?;
    if record.classes.is_empty() {
        return Err("its classes have no names, as it was not packed from class folders".into());
    }
    Ok(record.classes)
}

fn names_of_text(bytes: &[u8]) -> Result<Vec<String>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is no text in UTF-8".to_string())?;
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim);
    Ok(lines.filter(|line| !line.is_empty()).map(str::to_string).collect())
}

fn checked(names: Vec<String>) -> Result<Vec<String>, String> {
    if names.is_empty() {
        return Err("it has no names".to_string());
    }
    if names.len() > CLASSES_MAX {
        return Err(format!("it has {} names, more than {CLASSES_MAX}", names.len()));
    }
    let mut sorted: Vec<&String> = names.iter().collect();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("it has `{}` twice", pair[0].escape_debug())),
        None => Ok(names),
    }
}
