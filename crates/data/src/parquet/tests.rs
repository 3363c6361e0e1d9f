use std::fs::File;
use std::sync::Arc;

use ::parquet::basic::{Compression, GzipLevel, ZstdLevel};
use ::parquet::data_type::{ByteArray, ByteArrayType, DataType, Int32Type, Int64Type};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;
use ::parquet::schema::types::SchemaDescriptor;
use expect_test::expect;
use image::ExtendedColorType;
use lacuna_types::SampleId;

use super::rows::{Columns, find_columns};
use super::*;
use crate::dataset::Dataset;
use crate::files::chain;
use crate::fixtures::{config, damage, grey_png, jpeg, noise, pack_quietly};
use crate::pack::{PackSource, pack};

/// As `datasets` writes it: a struct of bytes and path, and a class.
const HF: &str = "message schema {
    optional int64 id;
    optional group image { optional binary bytes; optional binary path (UTF8); }
    optional int64 label;
}";

/// A column's values, `None` for a null. The innermost level is the schema's depth.
enum Values<'a> {
    Bytes(&'a [Option<Vec<u8>>]),
    Long(&'a [Option<i64>]),
    Int(&'a [Option<i32>]),
}

/// Writes row groups, each with the values of every column and the level of those present.
fn write(path: &Path, schema: &str, compression: Compression, groups: &[Vec<(i16, Values<'_>)>]) {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder()
        .set_compression(compression)
        .set_data_page_row_count_limit(3)
        .set_write_batch_size(1)
        .build();
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
    for columns in groups {
        let mut group = writer.next_row_group().unwrap();
        for (level, values) in columns {
            let mut column = group.next_column().unwrap().unwrap();
            match values {
                Values::Bytes(values) => {
                    let values: Vec<Option<ByteArray>> =
                        values.iter().map(|v| v.clone().map(ByteArray::from)).collect();
                    put::<ByteArrayType>(column.typed(), *level, &values);
                }
                Values::Long(values) => put::<Int64Type>(column.typed(), *level, values),
                Values::Int(values) => put::<Int32Type>(column.typed(), *level, values),
            }
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.close().unwrap();
}

fn put<T: DataType>(
    column: &mut ::parquet::column::writer::ColumnWriterImpl<'_, T>,
    level: i16,
    values: &[Option<T::T>],
) {
    let levels: Vec<i16> = values.iter().map(|v| if v.is_some() { level } else { 0 }).collect();
    let present: Vec<T::T> = values.iter().flatten().cloned().collect();
    column.write_batch(&present, (level > 0).then_some(&levels[..]), None).unwrap();
}

pub(crate) fn images(from: u32, n: u32) -> Vec<Option<Vec<u8>>> {
    let image = |i: u32| match i % 4 {
        0 => grey_png(40 + i, i),
        _ => jpeg(&noise(12 * 9 * 3, i), 12, 9, ExtendedColorType::Rgb8),
    };
    (from..from + n).map(|i| Some(image(i))).collect()
}

/// Writes `n` rows in the columns of [`HF`], four a row group.
pub(crate) fn write_hf(
    path: &Path,
    compression: Compression,
    images: &[Option<Vec<u8>>],
    labels: &[Option<i64>],
) {
    let ids: Vec<Option<i64>> = (0..images.len() as i64).map(Some).collect();
    let paths: Vec<Option<Vec<u8>>> = vec![None; images.len()];
    let groups = images.chunks(4).zip(labels.chunks(4)).zip(ids.chunks(4)).zip(paths.chunks(4));
    let groups: Vec<Vec<(i16, Values<'_>)>> = groups
        .map(|(((images, labels), ids), paths)| {
            vec![
                (1, Values::Long(ids)),
                (2, Values::Bytes(images)),
                (2, Values::Bytes(paths)),
                (1, Values::Long(labels)),
            ]
        })
        .collect();
    write(path, HF, compression, &groups);
}

fn samples_of(folder: &Path) -> Vec<(Vec<u8>, Option<u32>)> {
    let dataset = Dataset::open(folder).unwrap();
    let ids = (0..dataset.n_samples()).map(SampleId);
    ids.map(|id| (dataset.sample(id).unwrap(), dataset.label(id))).collect()
}

#[test]
fn files_of_hugging_face_are_packed_in_order() {
    let root = tempfile::tempdir().unwrap();
    let input = root.path().join("data");
    fs::create_dir(&input).unwrap();
    let zstd = Compression::ZSTD(ZstdLevel::default());
    let gzip = Compression::GZIP(GzipLevel::default());
    let kinds = [Compression::SNAPPY, zstd, gzip, Compression::UNCOMPRESSED];
    let mut wanted: Vec<(Vec<u8>, Option<u32>)> = Vec::new();
    for (number, kind) in (0u32..).zip(kinds) {
        let images = images(number * 11, 11);
        let labels: Vec<Option<i64>> = (0..11).map(|i| Some(i % 3)).collect();
        let name = format!("train-{number:05}-of-00004.parquet");
        write_hf(&input.join(name), kind, &images, &labels);
        let labels = labels.iter().map(|label| label.map(|label| label as u32));
        wanted.extend(images.into_iter().flatten().zip(labels));
    }
    write_hf(&input.join("test-00000-of-00001.parquet"), zstd, &images(90, 2), &[None, None]);
    let source = PackSource::detect(&input).unwrap();
    let PackSource::Parquet(files) = &source else { panic!("{source:?}") };
    assert_eq!(files.len(), 4);
    let out = root.path().join("out");
    let report = pack_quietly(&source, &out, 1 << 20);
    assert_eq!((report.n_samples, report.skipped.n), (44, 0));
    assert_eq!(samples_of(&out), wanted);

    let test = PackSource::parquet_split(&input, &["t10k", "test", "val"]).unwrap().unwrap();
    let single = PackSource::detect(&input.join("test-00000-of-00001.parquet")).unwrap();
    assert_eq!(test, single);
    assert_eq!(PackSource::parquet_split(&input, &["val"]).unwrap(), None);
    pack_quietly(&test, &root.path().join("test"), 1 << 20);
    assert_eq!(samples_of(&root.path().join("test")).len(), 2);
}

#[test]
fn plain_columns_nulls_and_absent_labels() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("x.parquet");
    let mut rows = images(0, 5);
    rows[1] = None;
    rows[3] = Some(b"text".to_vec());
    let labels = [Some(3), Some(1), Some(-1), Some(1), Some(9)];
    let schema = "message schema { optional binary img; required int32 fine_label; }";
    let columns = vec![(1, Values::Bytes(&rows)), (0, Values::Int(&labels))];
    write(&file, schema, Compression::SNAPPY, &[columns]);
    let out = root.path().join("out");
    let report = pack_quietly(&PackSource::Parquet(vec![file]), &out, 1 << 20);
    let wanted = [0, 2, 4].map(|i| rows[i].clone().unwrap());
    let wanted: Vec<_> = wanted.into_iter().zip([Some(3), None, Some(9)]).collect();
    assert_eq!(samples_of(&out), wanted);
    let skipped = report.skipped.first.iter().map(|skip| {
        let (_, place) = skip.place.rsplit_once('/').unwrap();
        format!("{place} -- {}", skip.reason)
    });
    expect![
        "x.parquet: row 1 -- the row holds no bytes of an image
x.parquet: row 3 -- not a png, jpeg or webp image: it starts with [74, 65, 78, 74]"
    ]
    .assert_eq(&skipped.collect::<Vec<_>>().join("\n"));

    let schema = "message schema { required binary image; }";
    let file = root.path().join("only.parquet");
    write(&file, schema, Compression::UNCOMPRESSED, &[vec![(0, Values::Bytes(&rows[4..]))]]);
    let out = root.path().join("only");
    pack_quietly(&PackSource::detect(&file).unwrap(), &out, 1 << 20);
    assert_eq!(samples_of(&out), [(rows[4].clone().unwrap(), None)]);
}

fn refusal(files: &[PathBuf], root: &Path) -> String {
    let source = PackSource::Parquet(files.to_vec());
    let error = pack(&source, &root.join("out"), &config(1 << 20), &mut |_| {}).unwrap_err();
    chain(&error).replace(&root.display().to_string(), "DIR")
}

#[test]
fn unusable_files_are_named() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let (file, other) = (root.join("a.parquet"), root.join("b.parquet"));
    let mut labels: Vec<Option<i64>> = vec![Some(1); 6];
    labels[5] = Some(1 << 24);
    let rows = images(0, 6);
    write_hf(&file, Compression::UNCOMPRESSED, &rows, &labels);
    expect![
        "row 5 of `DIR/a.parquet` cannot be used: its label 16777216 is not a number up to 16777214"
    ]
    .assert_eq(&refusal(std::slice::from_ref(&file), root));
    labels[5] = Some(1);
    write_hf(&file, Compression::UNCOMPRESSED, &rows, &labels);
    let text: Vec<Option<Vec<u8>>> = vec![Some(b"a.jpg".to_vec())];
    let schema = "message schema { required binary image (UTF8); required int32 label; }";
    let columns = vec![(0, Values::Bytes(&text)), (0, Values::Int(&[Some(1)]))];
    write(&other, schema, Compression::SNAPPY, &[columns]);
    expect!["`DIR/b.parquet` has no column `image` or `img` of binary data, or of a struct with such a field `bytes`; its columns: image, label"]
        .assert_eq(&refusal(&[file.clone(), other.clone()], root));
    fs::write(&other, b"PAR1 but not for long").unwrap();
    let message = refusal(&[file.clone(), other.clone()], root);
    assert!(message.starts_with("failed to read the footer of `DIR/b.parquet`: "), "{message}");
    expect!["failed to read `DIR/c.parquet`: No such file or directory (os error 2)"]
        .assert_eq(&refusal(&[root.join("c.parquet")], root));
    let schema = "message schema { required binary image; }";
    write(&other, schema, Compression::SNAPPY, &[]);
    expect!["`DIR` holds no png, jpeg or webp images"].assert_eq(&refusal(&[other], root));
}

#[test]
fn damaged_bytes_end_in_an_error_or_an_image_left_out() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("a.parquet");
    let rows = images(0, 6);
    for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY] {
        write_hf(&file, compression, &rows, &[Some(1); 6]);
        let n_bytes = fs::metadata(&file).unwrap().len();
        for i in (0..n_bytes).step_by(37) {
            damage(&file, i);
            if let Ok(mut found) = Rows::open(std::slice::from_ref(&file)) {
                let mut bytes: Vec<u8> = Vec::new();
                // A wrong count of rows ends where the rows do.
                let n = found.n().min(20);
                let _ = (0..n).try_for_each(|i| found.read(i, &mut bytes).map(drop));
            }
            damage(&file, i);
        }
        let mut found = Rows::open(std::slice::from_ref(&file)).unwrap();
        for (i, wanted) in (0..).zip(&rows) {
            let mut bytes: Vec<u8> = Vec::new();
            assert_eq!(found.read(i, &mut bytes).unwrap(), Some(1));
            assert_eq!(Some(&bytes), wanted.as_ref());
        }
    }
}

#[test]
fn columns_are_chosen_by_name_and_type() {
    let choose = |fields: &str| {
        let text = format!("message schema {{ {fields} }}");
        let schema = SchemaDescriptor::new(Arc::new(parse_message_type(&text).unwrap()));
        find_columns(&schema)
    };
    let columns = |image, label| Some(Columns { image, label });
    assert_eq!(choose("required binary img; required binary image;"), columns(1, None));
    assert_eq!(
        choose("required int32 fine_label; required int64 Label; required binary image;"),
        columns(2, Some(1))
    );
    assert_eq!(choose("required binary image; required binary label;"), columns(0, None));
    assert_eq!(choose("repeated binary image; required int64 label;"), None);
    assert_eq!(choose("required group image { required binary png; }"), None);
    assert_eq!(choose("required binary image (UTF8); required binary img;"), columns(1, None));
    assert_eq!(choose("required binary picture;"), None);
}
