//! Images and labels, row by row.
//!
//! Of a row group the two columns are read side by side, a page of each at a time, so memory holds
//! a page of images, whatever the sizes of row group and file.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use ::parquet::basic::{ConvertedType, LogicalType, Type};
use ::parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use ::parquet::data_type::{ByteArray, ByteArrayType, DataType};
use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::schema::types::{ColumnDescriptor, SchemaDescriptor};

use super::ReadParquetError;
use crate::index::label_of;

/// Names of the column of images, best first.
const IMAGE_NAMES: [&str; 2] = ["image", "img"];

/// Names of a column of integers that holds the class, best first.
const LABEL_NAMES: [&str; 3] = ["label", "labels", "fine_label"];

/// The rows of several files, read one after another; one file is open at a time.
pub(crate) struct Rows {
    files: Vec<PathBuf>,
    /// First row of each file, and last the number of rows.
    starts: Vec<u64>,
    /// The row that is read next.
    next: u64,
    open: Option<OpenFile>,
}

struct OpenFile {
    number: usize,
    reader: SerializedFileReader<File>,
    columns: Columns,
    /// Row groups that were opened.
    n_groups: usize,
    group: Option<OpenGroup>,
}

struct OpenGroup {
    /// Rows that were not read.
    n_left: u64,
    image: ColumnReaderImpl<ByteArrayType>,
    label: Option<ColumnReader>,
}

/// Numbers of the columns that are read, among the leaves of the schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Columns {
    pub(super) image: usize,
    pub(super) label: Option<usize>,
}

fn content(path: &Path, place: impl Into<String>, source: ParquetError) -> ReadParquetError {
    let source = Box::new(source);
    ReadParquetError::Content { path: path.to_path_buf(), place: place.into(), source }
}

impl Rows {
    /// Reads the footers of `files` and finds the columns in each.
    pub(crate) fn open(files: &[PathBuf]) -> Result<Self, ReadParquetError> {
        let mut starts: Vec<u64> = vec![0];
        for (number, path) in files.iter().enumerate() {
            let file = guarded(path, || "the footer".to_string(), || OpenFile::open(path, number))?;
            let metadata = file.reader.metadata();
            let rows = metadata.row_groups().iter().map(|group| u64::try_from(group.num_rows()));
            let rows: Option<u64> =
                rows.map(Result::ok).try_fold(0u64, |sum, n| sum.checked_add(n?));
            let next = rows.and_then(|n| starts[number].checked_add(n));
            starts.push(next.ok_or_else(|| {
                let general = ParquetError::General("its row counts make no sense".to_string());
                content(path, "the footer", general)
            })?);
        }
        Ok(Rows { files: files.to_vec(), starts, next: 0, open: None })
    }

    /// Returns the number of rows, usable or not.
    pub(crate) fn n(&self) -> u64 {
        self.starts[self.files.len()]
    }

    fn find(&self, i: u64) -> (usize, u64) {
        assert!(i < self.n(), "row {i} is in the files");
        let file = self.starts.partition_point(|&start| start <= i) - 1;
        (file, i - self.starts[file])
    }

    /// Names row number `i` for messages.
    pub(crate) fn place(&self, i: u64) -> String {
        let (file, row) = self.find(i);
        format!("{}: row {row}", self.files[file].display())
    }

    /// Reads the image of row number `i` into `out`, which stays empty where the row has none, and
    /// returns its label.
    ///
    /// # Panics
    /// If rows are not read in order.
    pub(crate) fn read(
        &mut self,
        i: u64,
        out: &mut Vec<u8>,
    ) -> Result<Option<u32>, ReadParquetError> {
        assert_eq!(i, self.next, "rows are read in order");
        self.next += 1;
        let (number, row) = self.find(i);
        let path = &self.files[number];
        let mut open = match self.open.take() {
            Some(open) if open.number == number => open,
            _ => guarded(path, || "the footer".to_string(), || OpenFile::open(path, number))?,
        };
        // After a panic the file is opened anew, whatever state its reader was left in.
        let label = guarded(path, || format!("row {row}"), || open.read(path, row, out))?;
        self.open = Some(open);
        Ok(label)
    }
}

/// Calls other people's code that reads other people's bytes: a panic in it is a bad file.
fn guarded<T>(
    path: &Path,
    place: impl FnOnce() -> String,
    read: impl FnOnce() -> Result<T, ReadParquetError>,
) -> Result<T, ReadParquetError> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| {
        let general = ParquetError::General("the reader of Parquet panicked".to_string());
        Err(content(path, place(), general))
    })
}

impl OpenFile {
    fn open(path: &Path, number: usize) -> Result<Self, ReadParquetError> {
        let file = File::open(path)
            .map_err(|source| ReadParquetError::Io { path: path.to_path_buf(), source })?;
        let reader = SerializedFileReader::new(file).map_err(|e| content(path, "the footer", e))?;
        let schema = reader.metadata().file_metadata().schema_descr();
        let columns = find_columns(schema).ok_or_else(|| ReadParquetError::NoImages {
            path: path.to_path_buf(),
            columns: names(schema),
        })?;
        Ok(OpenFile { number, reader, columns, n_groups: 0, group: None })
    }

    fn read(
        &mut self,
        path: &Path,
        row: u64,
        out: &mut Vec<u8>,
    ) -> Result<Option<u32>, ReadParquetError> {
        let wrong = |source| content(path, format!("row {row}"), source);
        let mut group = match self.group.take() {
            Some(group) if group.n_left > 0 => group,
            _ => self.next_group().map_err(wrong)?,
        };
        group.n_left -= 1;
        out.clear();
        if let Some(image) = read_one(&mut group.image).map_err(wrong)? {
            out.extend_from_slice(ByteArray::data(&image));
        }
        let label = match &mut group.label {
            None => None,
            Some(ColumnReader::Int32ColumnReader(column)) => {
                read_one(column).map_err(wrong)?.map(i128::from)
            }
            Some(ColumnReader::Int64ColumnReader(column)) => {
                read_one(column).map_err(wrong)?.map(i128::from)
            }
            Some(_) => unreachable!("the label's column holds integers"),
        };
        self.group = Some(group);
        match label.map(label_of) {
            None => Ok(None),
            Some(Ok(label)) => Ok(label),
            Some(Err(what)) => Err(ReadParquetError::Row { path: path.to_path_buf(), row, what }),
        }
    }

    /// Opens the next row group that has rows.
    fn next_group(&mut self) -> Result<OpenGroup, ParquetError> {
        loop {
            if self.n_groups == self.reader.num_row_groups() {
                return Err(ParquetError::EOF("there are no more row groups".to_string()));
            }
            let group = self.reader.get_row_group(self.n_groups)?;
            self.n_groups += 1;
            let n_left = u64::try_from(group.metadata().num_rows()).unwrap_or(0);
            if n_left == 0 {
                continue;
            }
            let ColumnReader::ByteArrayColumnReader(image) =
                group.get_column_reader(self.columns.image)?
            else {
                unreachable!("the image's column holds byte arrays");
            };
            let label = self.columns.label.map(|i| group.get_column_reader(i)).transpose()?;
            return Ok(OpenGroup { n_left, image, label });
        }
    }
}

/// Reads the next value of a column without repetition; `None` is a null.
fn read_one<T: DataType>(column: &mut ColumnReaderImpl<T>) -> Result<Option<T::T>, ParquetError> {
    let mut levels: Vec<i16> = Vec::with_capacity(1);
    let mut values: Vec<T::T> = Vec::with_capacity(1);
    let (n_records, ..) = column.read_records(1, Some(&mut levels), None, &mut values)?;
    if n_records != 1 {
        return Err(ParquetError::EOF("the column has fewer values than rows".to_string()));
    }
    Ok(values.pop())
}

/// Finds the columns of images and of labels.
pub(super) fn find_columns(schema: &SchemaDescriptor) -> Option<Columns> {
    let find = |is: &dyn Fn(&[String], &ColumnDescriptor) -> bool| {
        let is = |column: &ColumnDescriptor| {
            column.max_rep_level() == 0 && is(column.path().parts(), column)
        };
        schema.columns().iter().position(|column| is(column))
    };
    let image = IMAGE_NAMES.iter().find_map(|name| {
        find(&|path, column| {
            let is_named = match path {
                [column] => column.eq_ignore_ascii_case(name),
                [column, field] => column.eq_ignore_ascii_case(name) && field == "bytes",
                _ => false,
            };
            is_named && is_binary(column)
        })
    })?;
    let label = LABEL_NAMES.iter().find_map(|name| {
        find(&|path, column| {
            matches!(path, [column] if column.eq_ignore_ascii_case(name))
                && matches!(column.physical_type(), Type::INT32 | Type::INT64)
        })
    });
    Some(Columns { image, label })
}

/// Tells whether a column holds bytes that are not text.
fn is_binary(column: &ColumnDescriptor) -> bool {
    let is_text = column.converted_type() == ConvertedType::UTF8
        || matches!(column.logical_type_ref(), Some(LogicalType::String));
    column.physical_type() == Type::BYTE_ARRAY && !is_text
}

fn names(schema: &SchemaDescriptor) -> String {
    let names = schema.columns().iter().map(|column| column.path().string());
    names.map(|name| name.escape_debug().to_string()).collect::<Vec<String>>().join(", ")
}
