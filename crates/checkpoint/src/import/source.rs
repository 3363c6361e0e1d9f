//! Which files hold the weights: one, or several with an index as transformers writes them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::ImportError;
use super::tensor_file::{Tensor, TensorFile};
use crate::disk::{self, FsError};
use crate::export::{HF_INDEX, HF_SINGLE};
use crate::json::parse_strict;

/// Longest accepted index and configuration: an index has 100 bytes a tensor.
const DOCUMENT_BYTES_MAX: u64 = 8 << 20;

/// Bytes that are read at once.
const PIECE_BYTES: usize = 1 << 20;

/// Suffixes of files that hold pickles.
const PICKLES: [&str; 5] = ["pth", "pt", "bin", "ckpt", "pkl"];

/// The tensors of an import, found and not read yet.
#[derive(Debug)]
pub struct Weights {
    files: Vec<TensorFile>,
    /// File and place of each tensor.
    tensors: BTreeMap<String, (usize, Tensor)>,
    /// `config.json` beside the files, if there is one.
    pub(super) config: Option<(PathBuf, Value)>,
    /// `preprocessor_config.json` beside them, likewise.
    pub(super) processor: Option<Value>,
}

impl Weights {
    /// Opens a safetensors file, an index of several, or a directory that has one of these.
    pub fn open(path: &Path) -> Result<Self, ImportError> {
        let fs = |e| ImportError::Fs(FsError::new("inspect", path, e));
        let found = if std::fs::metadata(path).map_err(fs)?.is_dir() {
            choose(path)?
        } else {
            path.to_path_buf()
        };
        if is_pickle(&found) {
            return Err(ImportError::Pickle { path: found });
        }
        let folder = found.parent().unwrap_or(Path::new(""));
        let name = found.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let weights = if name.ends_with(".json") {
            Weights::of_index(folder, &found)?
        } else {
            Weights::of_files(vec![TensorFile::open(&found)?])
        };
        // Beside a file of any name lies whatever belongs to another model.
        let named = name == HF_SINGLE || name.ends_with(".json") || found != path;
        if !named {
            return Ok(weights);
        }
        let config = read_document(&folder.join("config.json"))?;
        let processor = read_document(&folder.join("preprocessor_config.json"))?;
        let config = config.map(|value| (folder.join("config.json"), value));
        Ok(Weights { config, processor, ..weights })
    }

    /// Collects the tensors of files that have none in common.
    fn of_files(files: Vec<TensorFile>) -> Self {
        let of_file = |(i, file): (usize, &TensorFile)| {
            let named = |(name, tensor): (&String, &Tensor)| (name.clone(), (i, tensor.clone()));
            file.tensors.iter().map(named).collect::<Vec<_>>()
        };
        let tensors = files.iter().enumerate().flat_map(of_file).collect();
        Weights { files, tensors, config: None, processor: None }
    }

    /// Opens the files that an index names; they must hold just what it says.
    fn of_index(folder: &Path, path: &Path) -> Result<Self, ImportError> {
        let wrong = |problem: String| ImportError::Index { path: path.to_path_buf(), problem };
        let document = read_json(path)?;
        let Some(map) = document.get("weight_map").and_then(Value::as_object) else {
            return Err(wrong("it has no weight_map".to_string()));
        };
        let mut wanted: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (tensor, file) in map {
            let file = file.as_str().filter(|name| is_plain(name)).ok_or_else(|| {
                let file = file.to_string();
                wrong(format!("{} is not a name of a file beside it", file.escape_debug()))
            })?;
            wanted.entry(file).or_default().insert(tensor);
        }
        let mut files: Vec<TensorFile> = Vec::new();
        for (name, tensors) in &wanted {
            let file = TensorFile::open(&folder.join(name))?;
            let missing = tensors.iter().find(|tensor| !file.tensors.contains_key(**tensor));
            if let Some(tensor) = missing {
                let tensor = tensor.escape_debug();
                return Err(wrong(format!("`{name}` does not have `{tensor}`")));
            }
            let more = file.tensors.keys().find(|tensor| !tensors.contains(tensor.as_str()));
            if let Some(tensor) = more {
                let tensor = tensor.escape_debug();
                return Err(wrong(format!("`{name}` has `{tensor}`, which it does not say")));
            }
            files.push(file);
        }
        let sources: BTreeSet<Option<&String>> =
            files.iter().map(|file| file.metadata.get("lacuna.manifest")).collect();
        if sources.len() > 1 {
            let text = "its files were exported from different checkpoints";
            return Err(wrong(text.to_string()));
        }
        // Each has what the index says, which names one file for a tensor.
        Ok(Weights::of_files(files))
    }

    /// Computes a digest of all that a model is read from: the tensors with their names and types,
    /// and what the files and the documents beside them say.
    ///
    /// # Errors
    ///
    /// Where a file cannot be read.
    pub fn digest(&self) -> Result<blake3::Hash, ImportError> {
        let mut hasher = blake3::Hasher::new();
        let about: Vec<_> = self.files.iter().map(|file| &file.metadata).collect();
        let config = self.config.as_ref().map(|(_, value)| value);
        let mut piece = vec![0; PIECE_BYTES];
        for (name, (file, tensor)) in &self.tensors {
            let Range { start: mut at, end } = tensor.bytes;
            // It says how many bytes follow, so that no two inputs look the same.
            let (dtype, shape, bytes) = (&tensor.dtype, &tensor.shape, end - at);
            hasher.update(format!("{name:?} {dtype:?} {shape:?} {bytes}\n").as_bytes());
            while at < end {
                let n = (end - at).min(PIECE_BYTES as u64) as usize;
                self.files[*file].read(at, &mut piece[..n])?;
                hasher.update(&piece[..n]);
                at += n as u64;
            }
        }
        hasher.update(format!("\n{}", json!([about, config, self.processor])).as_bytes());
        Ok(hasher.finalize())
    }

    /// Tells whether the last norm is timm's `fc_norm`, which comes behind the mean of the patches.
    pub fn has_pooled_norm(&self) -> bool {
        self.tensors().any(|(name, _)| name.starts_with("fc_norm."))
    }

    /// Returns the tensors by name.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.tensors.iter().map(|(name, (_, tensor))| (name, tensor))
    }

    /// Returns file and place of a tensor that is there.
    pub(super) fn place(&self, name: &str) -> (&TensorFile, &Tensor) {
        let (file, tensor) = &self.tensors[name];
        (&self.files[*file], tensor)
    }

    /// Returns the first of the files.
    pub(super) fn path(&self) -> &Path {
        self.files.first().map_or(Path::new(""), TensorFile::path)
    }

    /// Returns what the files say of themselves under `key`.
    pub(super) fn about(&self, key: &str) -> Option<&str> {
        self.files.first()?.metadata.get(key).map(String::as_str)
    }
}

/// Chooses the one file of a directory that leads to all weights.
fn choose(folder: &Path) -> Result<PathBuf, ImportError> {
    let names = disk::names(folder)?;
    let has = |name: &str| names.iter().any(|found| found == name);
    let path = folder.to_path_buf();
    match (has(HF_SINGLE), has(HF_INDEX)) {
        (true, true) => {
            let names = vec![HF_SINGLE.to_string(), HF_INDEX.to_string()];
            return Err(ImportError::Several { path, names });
        }
        (true, false) => return Ok(folder.join(HF_SINGLE)),
        (false, true) => return Ok(folder.join(HF_INDEX)),
        (false, false) => {}
    }
    let mut found: Vec<String> =
        names.iter().filter(|name| name.ends_with(".safetensors")).cloned().collect();
    match (found.pop(), found.is_empty()) {
        (Some(only), true) => Ok(folder.join(only)),
        (Some(last), false) => {
            found.push(last);
            Err(ImportError::Several { path, names: found })
        }
        (None, _) => match names.iter().find(|name| is_pickle(Path::new(name))) {
            Some(pickle) => Err(ImportError::Pickle { path: folder.join(pickle) }),
            None => Err(ImportError::Nothing { path }),
        },
    }
}

fn is_pickle(path: &Path) -> bool {
    let suffix = path.extension().and_then(|suffix| suffix.to_str());
    suffix.is_some_and(|suffix| PICKLES.contains(&suffix))
}

/// Tells whether a name leads to a file in the same directory and nowhere else.
fn is_plain(name: &str) -> bool {
    let plain = |c: char| c != '/' && c != '\\' && !c.is_control();
    !name.starts_with('.') && name.ends_with(".safetensors") && name.chars().all(plain)
}

fn read_json(path: &Path) -> Result<Value, ImportError> {
    // A pipe would wait for somebody to write.
    if !path.is_file() {
        let problem = "it is not a regular file".to_string();
        return Err(ImportError::Index { path: path.to_path_buf(), problem });
    }
    let text = disk::read_small(path, DOCUMENT_BYTES_MAX)?;
    parse_strict(&text).map_err(|source| ImportError::Json { path: path.to_path_buf(), source })
}

/// Reads a document that may be missing.
fn read_document(path: &Path) -> Result<Option<Value>, ImportError> {
    if path.is_file() { read_json(path).map(Some) } else { Ok(None) }
}
