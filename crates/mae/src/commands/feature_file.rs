//! Files of features: NumPy's format, or safetensors. Rows are streamed; a file has its name when
//! it is whole.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde_json::{Map, Value, json};

use super::{io, usage};

/// Formats of feature files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// `FILE.npy` with float32 rows, and `FILE.labels.npy` with int64 classes, -1 for none.
    Npy,
    /// One file with the tensors `features`, `labels` and `ids`.
    Safetensors,
}

impl Format {
    /// Returns the format asked for, or that of the name's ending.
    pub fn of(out: &Path, asked: Option<Format>) -> anyhow::Result<Format> {
        match (asked, out.extension().and_then(|ending| ending.to_str())) {
            (Some(format), _) => Ok(format),
            (None, Some("npy")) => Ok(Format::Npy),
            (None, Some("safetensors")) => Ok(Format::Safetensors),
            (None, _) => Err(usage(format!(
                "--out `{}` ends neither in .npy nor in .safetensors: give --format",
                out.display()
            ))),
        }
    }

    /// Hours of work are not written over by accident.
    pub fn refuse_existing(self, out: &Path, force: bool) -> anyhow::Result<()> {
        let labels = labels_path(out);
        let mut files: Vec<&Path> = vec![out];
        if self == Format::Npy {
            files.push(&labels);
        }
        match files.iter().find(|file| file.exists()) {
            Some(file) if !force => {
                Err(usage(format!("`{}` is there: write over it with --force", file.display())))
            }
            _ => Ok(()),
        }
    }
}

/// Multiple at which the data of an npy file starts.
const NPY_ALIGN: usize = 64;
/// The same for safetensors.
const SAFETENSORS_ALIGN: usize = 8;
/// What stands for no label.
const NO_LABEL: i64 = -1;

/// What a file is of.
#[derive(Clone, Debug)]
pub struct Content {
    /// Class of each sample, by its number.
    pub labels: Vec<Option<u32>>,
    /// Shape of one sample's feature.
    pub shape: Vec<usize>,
    /// What a safetensors file says of itself.
    pub metadata: Vec<(&'static str, String)>,
}

impl Content {
    fn row_values(&self) -> usize {
        self.shape.iter().product()
    }

    fn labels_le(&self) -> Vec<u8> {
        let label = |label: &Option<u32>| label.map_or(NO_LABEL, i64::from).to_le_bytes();
        self.labels.iter().flat_map(label).collect()
    }
}

/// A file of features under construction; dropped before [`finish`](FeatureFile::finish), nothing
/// is left.
#[derive(Debug)]
pub struct FeatureFile {
    features: Partial,
    /// The file of labels that NumPy's format has beside it.
    labels: Option<Partial>,
    content: Content,
    values: usize,
}

impl FeatureFile {
    /// Creates the files and writes what stands before the features.
    pub fn create(path: &Path, format: Format, content: Content) -> anyhow::Result<Self> {
        let mut features = Partial::create(path)?;
        let n = content.labels.len();
        let shape: Vec<usize> = [&[n], content.shape.as_slice()].concat();
        let labels = match format {
            Format::Npy => {
                features.write(&npy_header("<f4", &shape))?;
                let mut labels = Partial::create(&labels_path(path))?;
                labels.write(&npy_header("<i8", &[n]))?;
                labels.write(&content.labels_le())?;
                Some(labels)
            }
            Format::Safetensors => {
                features.write(&safetensors_header(&shape, &content.metadata))?;
                None
            }
        };
        Ok(FeatureFile { features, labels, content, values: 0 })
    }

    /// Appends features of the next samples.
    pub fn push(&mut self, rows: &[f32]) -> anyhow::Result<()> {
        self.values += rows.len();
        self.features.write(bytemuck::cast_slice(rows))
    }

    /// Completes the files and gives them their names, that of the features last; returns them.
    ///
    /// # Panics
    /// If not all samples were pushed.
    pub fn finish(mut self) -> anyhow::Result<Vec<PathBuf>> {
        let n = self.content.labels.len();
        assert_eq!(self.values, n * self.content.row_values(), "a feature for each sample");
        let mut out: Vec<PathBuf> = Vec::new();
        match self.labels {
            Some(labels) => out.push(labels.publish()?),
            None => {
                self.features.write(&self.content.labels_le())?;
                let ids: Vec<u8> = (0..n as i64).flat_map(i64::to_le_bytes).collect();
                self.features.write(&ids)?;
            }
        }
        out.insert(0, self.features.publish()?);
        Ok(out)
    }
}

/// Returns the file of labels beside a file of features: `a.labels.npy` beside `a.npy`.
pub fn labels_path(path: &Path) -> PathBuf {
    let stem = if path.extension().is_some_and(|end| end == "npy") {
        path.with_extension("")
    } else {
        path.to_path_buf()
    };
    let mut name = stem.into_os_string();
    name.push(".labels.npy");
    PathBuf::from(name)
}

/// Renders the header of version 1.0 of NumPy's format.
fn npy_header(dtype: &str, shape: &[usize]) -> Vec<u8> {
    let sides: Vec<String> = shape.iter().map(|side| format!("{side},")).collect();
    let text =
        format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({}), }}", sides.join(" "));
    // Magic, version and length take ten bytes; a line feed ends it.
    let total = (10 + text.len() + 1).next_multiple_of(NPY_ALIGN);
    let mut out: Vec<u8> = b"\x93NUMPY\x01\x00".to_vec();
    out.extend(((total - 10) as u16).to_le_bytes());
    out.extend(text.as_bytes());
    out.resize(total - 1, b' ');
    out.push(b'\n');
    out
}

/// Renders the header of a file with features, then labels, then ids.
fn safetensors_header(shape: &[usize], metadata: &[(&'static str, String)]) -> Vec<u8> {
    let n = shape[0];
    let mut about: Map<String, Value> = Map::new();
    about.insert("format".to_string(), json!("pt"));
    about.extend(metadata.iter().map(|(key, text)| (key.to_string(), json!(text))));
    let mut header: Map<String, Value> = Map::new();
    header.insert("__metadata__".to_string(), Value::Object(about));
    let mut at = 0;
    let tensors =
        [("features", "F32", 4, shape), ("labels", "I64", 8, &[n]), ("ids", "I64", 8, &[n])];
    for (name, dtype, width, shape) in tensors {
        let end = at + shape.iter().product::<usize>() * width;
        let tensor = json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, end] });
        header.insert(name.to_string(), tensor);
        at = end;
    }
    let text = Value::Object(header).to_string();
    let length = text.len().next_multiple_of(SAFETENSORS_ALIGN);
    let mut out: Vec<u8> = (length as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out.resize(8 + length, b' ');
    out
}

/// A file that is written under another name until it is whole; removed when dropped before.
#[derive(Debug)]
pub struct Partial {
    file: BufWriter<File>,
    path: PathBuf,
    target: PathBuf,
    published: bool,
}

impl Partial {
    /// Begins `<target>.partial`; what an earlier try left there is written over.
    pub fn create(target: &Path) -> anyhow::Result<Self> {
        let mut name = target.as_os_str().to_owned();
        name.push(".partial");
        let path = PathBuf::from(name);
        let file = File::create(&path)
            .map_err(|error| io(format!("failed to create `{}`: {error}", path.display())))?;
        let (file, target) = (BufWriter::with_capacity(1 << 20, file), target.to_path_buf());
        Ok(Partial { file, path, target, published: false })
    }

    /// Appends bytes.
    pub fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let written = self.file.write_all(bytes);
        written.map_err(|error| io(format!("failed to write `{}`: {error}", self.path.display())))
    }

    /// Makes the content durable and gives the file its name.
    pub fn publish(mut self) -> anyhow::Result<PathBuf> {
        let synced = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        let renamed = synced.and_then(|()| fs::rename(&self.path, &self.target));
        renamed
            .map_err(|error| io(format!("failed to write `{}`: {error}", self.target.display())))?;
        self.published = true;
        Ok(self.target.clone())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.published {
            // Best effort: the failure that led here is what counts.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> Content {
        Content {
            labels: vec![Some(3), None],
            shape: vec![3],
            metadata: vec![("lacuna.pool", "cls".to_string())],
        }
    }

    const ROWS: [f32; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, -6.5];

    #[test]
    fn npy_files_are_those_of_numpy() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npy");
        let mut file = FeatureFile::create(&path, Format::Npy, content()).unwrap();
        ROWS.chunks(3).for_each(|row| file.push(row).unwrap());
        assert!(!path.exists(), "it has no name before it is whole");
        let labels = folder.path().join("a.labels.npy");
        assert_eq!(file.finish().unwrap(), [path.clone(), labels.clone()]);
        // What `numpy.save` writes for such an array.
        let mut want = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
        want.extend(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3,), }");
        want.resize(127, b' ');
        want.push(b'\n');
        want.extend(ROWS.iter().flat_map(|x| x.to_le_bytes()));
        assert_eq!(fs::read(&path).unwrap(), want);
        let labels = fs::read(&labels).unwrap();
        assert_eq!(labels[128..], [3i64.to_le_bytes(), (-1i64).to_le_bytes()].concat());
        assert!(labels.starts_with(b"\x93NUMPY") && labels[10..].starts_with(b"{'descr': '<i8'"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn safetensors_hold_features_labels_and_ids() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let mut file = FeatureFile::create(&path, Format::Safetensors, content()).unwrap();
        file.push(&ROWS).unwrap();
        file.finish().unwrap();
        let read = tch::Tensor::read_safetensors(&path).unwrap();
        let find = |name: &str| read.iter().find(|(known, _)| known == name).unwrap().1.copy();
        assert_eq!(find("features").size(), [2, 3]);
        assert_eq!(Vec::<f32>::try_from(find("features").view(-1)).unwrap(), ROWS);
        assert_eq!(Vec::<i64>::try_from(find("labels")).unwrap(), [3, -1]);
        assert_eq!(Vec::<i64>::try_from(find("ids")).unwrap(), [0, 1]);
        let bytes = fs::read(&path).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains(r#""lacuna.pool":"cls""#), "the file says what it is");
    }

    #[test]
    fn an_unfinished_file_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npy");
        drop(FeatureFile::create(&path, Format::Npy, content()).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let missing = folder.path().join("missing/a.npy");
        let error = FeatureFile::create(&missing, Format::Npy, content()).unwrap_err();
        assert!(error.to_string().contains("missing/a.npy.partial"), "{error}");
    }

    #[test]
    fn labels_lie_beside_their_features() {
        assert_eq!(labels_path(Path::new("x/a.npy")), Path::new("x/a.labels.npy"));
        assert_eq!(labels_path(Path::new("x/a.b")), Path::new("x/a.b.labels.npy"));
    }
}
