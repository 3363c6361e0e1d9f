//! The header of a safetensors file that anybody may have written: no size in it is believed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::ImportError;
use crate::disk::FsError;
use crate::json::parse_strict;

/// Longest accepted header: that of the largest preset has 100 KB.
pub(super) const HEADER_BYTES_MAX: u64 = 8 << 20;

/// Starts of archives and streams that hold pickles.
const PICKLE_STARTS: [&[u8]; 2] = [b"PK\x03\x04", b"\x80\x02"];

/// A tensor inside a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tensor {
    /// Element type, as the file spells it.
    pub dtype: String,
    /// Shape.
    pub shape: Vec<u64>,
    /// First byte in the file, and the one after the last.
    pub bytes: Range<u64>,
}

/// An open file whose header was checked.
#[derive(Debug)]
pub(super) struct TensorFile {
    path: PathBuf,
    file: File,
    /// The tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// What the file says of itself.
    pub metadata: BTreeMap<String, String>,
}

impl TensorFile {
    /// Opens a file and reads its header.
    pub fn open(path: &Path) -> Result<Self, ImportError> {
        let fs = |op: &'static str| move |e| ImportError::Fs(FsError::new(op, path, e));
        // A pipe would wait for somebody to write.
        if !std::fs::metadata(path).map_err(fs("inspect"))?.is_file() {
            return Err(unsound(path, "it is not a regular file"));
        }
        let mut file = File::open(path).map_err(fs("open"))?;
        let size = file.metadata().map_err(fs("inspect"))?.len();
        let mut start = [0; 8];
        if size < 8 {
            return Err(unsound(path, &format!("it has {size} bytes")));
        }
        file.read_exact(&mut start).map_err(fs("read"))?;
        if PICKLE_STARTS.iter().any(|pickle| start.starts_with(pickle)) {
            return Err(ImportError::Pickle { path: path.to_path_buf() });
        }
        let length = u64::from_le_bytes(start);
        if length > HEADER_BYTES_MAX || length > size - 8 {
            let text = format!("its header would have {length} bytes, and it has {size}");
            return Err(unsound(path, &text));
        }
        let mut text = vec![0; length as usize];
        file.read_exact(&mut text).map_err(fs("read"))?;
        let value = parse_strict(&text)
            .map_err(|source| ImportError::Json { path: path.to_path_buf(), source })?;
        let (tensors, metadata) =
            parse(value, 8 + length, size).map_err(|text| unsound(path, &text))?;
        Ok(TensorFile { path: path.to_path_buf(), file, tensors, metadata })
    }

    /// Returns where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fills `out` with bytes from `at` on.
    pub fn read(&self, at: u64, out: &mut [u8]) -> Result<(), ImportError> {
        let read = self.file.read_exact_at(out, at);
        read.map_err(|e| ImportError::Fs(FsError::new("read", &self.path, e)))
    }
}

fn unsound(path: &Path, problem: &str) -> ImportError {
    ImportError::Unsound { path: path.to_path_buf(), problem: problem.to_string() }
}

type Parsed = (BTreeMap<String, Tensor>, BTreeMap<String, String>);

/// Reads tensors and metadata out of a header; the data is `start..end` of the file.
fn parse(value: Value, start: u64, end: u64) -> Result<Parsed, String> {
    let Value::Object(map) = value else { return Err("its header is not an object".to_string()) };
    let (mut tensors, mut metadata) = (BTreeMap::new(), BTreeMap::new());
    for (name, value) in map {
        let Value::Object(fields) = value else {
            return Err(format!("`{}` is not an object", name.escape_debug()));
        };
        if name == "__metadata__" {
            for (key, value) in fields {
                let Value::String(text) = value else {
                    return Err(format!("metadata `{}` is not a string", key.escape_debug()));
                };
                metadata.insert(key, text);
            }
            continue;
        }
        let tensor = tensor(&fields, start, end)
            .map_err(|problem| format!("`{}` {problem}", name.escape_debug()))?;
        tensors.insert(name, tensor);
    }
    check_cover(&tensors, start, end)?;
    Ok((tensors, metadata))
}

fn tensor(fields: &Map<String, Value>, start: u64, end: u64) -> Result<Tensor, String> {
    let dtype = fields.get("dtype").and_then(Value::as_str).ok_or("has no dtype")?.to_string();
    let numbers = |key: &str| -> Option<Vec<u64>> {
        fields.get(key)?.as_array()?.iter().map(Value::as_u64).collect()
    };
    let shape = numbers("shape").ok_or("has no shape")?;
    let offsets = numbers("data_offsets").filter(|offsets| offsets.len() == 2);
    let offsets = offsets.ok_or("has no pair of offsets")?;
    let (first, last) = (offsets[0], offsets[1]);
    if first > last || last > end - start {
        return Err(format!("lies at {first}..{last} of {} bytes", end - start));
    }
    let bytes = start + first..start + last;
    if let Some(width) = width(&dtype) {
        let want = shape.iter().try_fold(width, |n, side| n.checked_mul(*side));
        if want != Some(last - first) {
            return Err(format!("is {dtype} {shape:?} in {} bytes", last - first));
        }
    }
    Ok(Tensor { dtype, shape, bytes })
}

/// Returns the bytes of an element, where that is a whole number that is known.
pub(super) fn width(dtype: &str) -> Option<u64> {
    match dtype {
        "F64" | "I64" | "U64" => Some(8),
        "F32" | "I32" | "U32" => Some(4),
        "F16" | "BF16" | "I16" | "U16" => Some(2),
        "BOOL" | "U8" | "I8" => Some(1),
        _ => None,
    }
}

/// Checks that the tensors cover the data without holes and overlaps, as the format demands.
fn check_cover(tensors: &BTreeMap<String, Tensor>, start: u64, end: u64) -> Result<(), String> {
    let mut places: Vec<(&Range<u64>, &String)> =
        tensors.iter().map(|(name, tensor)| (&tensor.bytes, name)).collect();
    places.sort_by_key(|(bytes, _)| (bytes.start, bytes.end));
    let mut at = start;
    for (bytes, name) in places {
        if bytes.start != at {
            let what = if bytes.start < at { "overlaps another tensor" } else { "follows a hole" };
            return Err(format!("`{}` {what}", name.escape_debug()));
        }
        at = bytes.end;
    }
    if at != end {
        return Err(format!("its tensors end {} bytes before the file", end - at));
    }
    Ok(())
}
