//! Files that mean harm: whatever their bytes, every parser ends in an error that names the file,
//! or in samples that are there. Indexes have such tests of their own, images in `lacuna-pixels`,
//! and memory in `tests/memory.rs`.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::{ProptestConfig, Strategy, any, prop_oneof};
use proptest::test_runner::TestCaseError;
use proptest::{collection, prop_assert, prop_assert_eq, proptest, sample};

use crate::dataset::Dataset;
use crate::files::chain;
use crate::fixtures::{config, grey_png, synthetic, write_tar};
use crate::idx::{read_images, read_labels};
use crate::index::crc32;
use crate::mds::tests::{compress, plain};
use crate::pack::{PackSource, pack};
#[cfg(feature = "parquet")]
use crate::parquet::Rows;
#[cfg(feature = "parquet")]
use crate::parquet::tests::{images, write_hf};
use crate::wds::{build_index, scan_shard};

/// What is done to the bytes of a sound file.
#[derive(Clone, Debug)]
enum Harm {
    /// Other bytes altogether.
    Noise(Vec<u8>),
    /// Some bytes are others.
    Edits(Vec<(sample::Index, Vec<u8>)>),
    /// The end is missing.
    Cut(sample::Index),
}

impl Harm {
    fn to(&self, sound: &[u8]) -> Vec<u8> {
        let mut bytes = sound.to_vec();
        match self {
            Harm::Noise(noise) => bytes = noise.clone(),
            Harm::Cut(at) => bytes.truncate(at.index(sound.len())),
            Harm::Edits(edits) => {
                for (at, with) in edits {
                    let at = at.index(sound.len());
                    let end = sound.len().min(at + with.len());
                    bytes[at..end].copy_from_slice(&with[..end - at]);
                }
            }
        }
        bytes
    }
}

/// Noise, 1 to 8 edits (among them numbers that lie), or a cut.
fn harm() -> impl Strategy<Value = Harm> {
    let lie = sample::select(vec![0u32, 1, 0x7FFF_FFFF, 0x8000_0000, u32::MAX]);
    let with = prop_oneof![
        any::<u8>().prop_map(|byte| vec![byte]),
        lie.clone().prop_map(|word| word.to_le_bytes().to_vec()),
        lie.prop_map(|word| word.to_be_bytes().to_vec()),
        sample::select(b"0123456789{}[],:\".\0".to_vec()).prop_map(|byte| vec![byte]),
    ];
    let edits = collection::vec((any::<sample::Index>(), with), 1..8);
    prop_oneof![
        1 => collection::vec(any::<u8>(), 0..2000).prop_map(Harm::Noise),
        6 => edits.prop_map(Harm::Edits),
        2 => any::<sample::Index>().prop_map(Harm::Cut),
    ]
}

/// Checks that an error names a file.
fn names(error: &dyn std::error::Error, path: &Path) -> Result<(), TestCaseError> {
    let (text, path) = (chain(error), path.display().to_string());
    prop_assert!(text.contains(&path), "{text}");
    Ok(())
}

/// Gives the header of a tar member a checksum that fits.
fn seal_header(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// An archive with members of every kind that is looked at, and where its headers are.
fn archive(folder: &Path) -> (Vec<u8>, Vec<usize>) {
    let path = folder.join("sound.tar");
    let long = format!("{}/3.png", "folder/".repeat(20));
    let images: Vec<Vec<u8>> = (0..4).map(|i| grey_png(9 + i, i)).collect();
    write_tar(
        &path,
        &[
            ("0.png", &images[0]),
            ("0.cls", b"7"),
            ("__meta/x.png", b"ignored"),
            ("1.seg.png", &images[1]),
            ("1.jpg", b"no image"),
            (&long, &images[2]),
            ("4.json", b"{}"),
            ("4.png", &images[3]),
        ],
    );
    let bytes = fs::read(&path).unwrap();
    let is_header = |at: &usize| bytes[*at + 257..*at + 262] == *b"ustar";
    let headers = (0..bytes.len()).step_by(512).filter(is_header).collect();
    (bytes, headers)
}

fn scan_tar(path: &Path, bytes: &[u8]) -> Result<(), TestCaseError> {
    fs::write(path, bytes).unwrap();
    let (shard, _) = match scan_shard(path, "x.tar") {
        Ok(found) => found,
        Err(error) => return names(&error, path),
    };
    prop_assert_eq!(shard.entry.bytes, bytes.len() as u64);
    for record in shard.records {
        let image = &bytes[record.offset as usize..][..record.bytes as usize];
        prop_assert_eq!(crc32(image), record.crc);
    }
    Ok(())
}

/// Indexes and repacks a folder of MDS shards.
fn read_mds(folder: &Path, out: &Path) -> Result<(), TestCaseError> {
    match build_index(folder, 1, &mut |_| {}) {
        Ok(_) => prop_assert!(Dataset::open(folder).is_ok()),
        Err(error) => names(&error, folder)?,
    }
    let source = PackSource::Mds(folder.to_path_buf());
    if let Err(error) = pack(&source, &out.join("packed"), &config(1 << 20), &mut |_| {}) {
        names(&error, folder)?;
    }
    Ok(())
}

fn zipped(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn tar(harm in harm(), resealed in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let (sound, headers) = archive(folder.path());
        let mut bytes = harm.to(&sound);
        if resealed {
            // Else the checksum of the header would speak for every field.
            let n = bytes.len();
            for at in headers.into_iter().filter(|at| at + 512 <= n) {
                seal_header(&mut bytes[at..at + 512]);
            }
        }
        scan_tar(&folder.path().join("x.tar"), &bytes)?;
    }

    #[test]
    fn idx(harm in harm(), packed in any::<bool>(), before in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let words = [0x0803u32, 5, 6, 7];
        let mut sound: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        sound.extend((0..5 * 6 * 7).map(|i| i as u8));
        let bytes = match (packed, before) {
            (false, _) => harm.to(&sound),
            (true, true) => zipped(&harm.to(&sound)),
            (true, false) => harm.to(&zipped(&sound)),
        };
        fs::write(&path, &bytes).unwrap();
        match read_images(&path) {
            Ok(images) => {
                let each = images.height as usize * images.width as usize;
                prop_assert_eq!(images.pixels.len(), each * images.n() as usize);
                prop_assert_eq!(images.image(images.n() - 1).len(), each);
            }
            Err(error) => names(&error, &path)?,
        }
        if let Err(error) = read_labels(&path) {
            names(&error, &path)?;
        }
    }

    #[test]
    fn parts_of_an_interrupted_indexing(harm in harm()) {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        write_tar(&at("a.tar"), &[("0.png", &grey_png(8, 1)), ("1.png", b"no image")]);
        fs::write(at("b.tar"), [7; 600]).unwrap();
        let index = || build_index(folder.path(), 1, &mut |_| {});
        prop_assert!(index().is_err());
        let part = at(".index-parts/a.tar.part");
        let sound = fs::read(&part).unwrap();
        fs::write(&part, harm.to(&sound)).unwrap();
        write_tar(&at("b.tar"), &[("2.png", &grey_png(8, 2))]);
        let resumed = index().unwrap();
        let fresh = index().unwrap();
        prop_assert_eq!(resumed.index.fingerprint(), fresh.index.fingerprint());
        prop_assert!(resumed.skipped.n >= resumed.skipped.first.len() as u64);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn mds_list(harm in harm(), compressed in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("in");
        let mut shards = plain(&root);
        if compressed {
            compress(&root, &mut shards);
        }
        let list = root.join("index.json");
        let sound = fs::read(&list).unwrap();
        fs::write(&list, harm.to(&sound)).unwrap();
        read_mds(&root, folder.path())?;
    }

    #[test]
    fn mds_shards(harm in harm(), compressed in any::<bool>(), in_head in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("in");
        let mut shards = plain(&root);
        if compressed {
            compress(&root, &mut shards);
        }
        let key = if compressed { "zip_data" } else { "raw_data" };
        let path = root.join(shards[0][key]["basename"].as_str().unwrap());
        let sound = fs::read(&path).unwrap();
        // Offsets and sizes are in the first bytes.
        let head = if in_head { 80 } else { sound.len() };
        let harmed = [&harm.to(&sound[..head]), &sound[head..]].concat();
        // As long as before, else the length alone would be looked at.
        let mut harmed = harmed;
        harmed.resize(sound.len(), 0);
        fs::write(&path, harmed).unwrap();
        read_mds(&root, folder.path())?;
    }

    #[cfg(feature = "parquet")]
    #[test]
    fn parquet(harm in harm(), which in 0usize..4, in_footer in any::<bool>()) {
        use ::parquet::basic::{Compression, GzipLevel, ZstdLevel};

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.parquet");
        let compression = [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::GZIP(GzipLevel::default()),
            Compression::ZSTD(ZstdLevel::default()),
        ][which];
        write_hf(&path, compression, &images(0, 6), &[Some(1); 6]);
        let sound = fs::read(&path).unwrap();
        let start = if in_footer { footer_start(&sound) } else { 0 };
        fs::write(&path, [&sound[..start], &harm.to(&sound[start..])].concat()).unwrap();
        read_parquet(&path)?;
    }
}

#[cfg(feature = "parquet")]
fn read_parquet(path: &Path) -> Result<(), TestCaseError> {
    let files = [path.to_path_buf()];
    let mut rows = match Rows::open(&files) {
        Ok(rows) => rows,
        Err(error) => return names(&error, path),
    };
    let mut bytes: Vec<u8> = Vec::new();
    // A wrong count of rows ends where the rows do.
    match (0..rows.n().min(20)).try_for_each(|i| rows.read(i, &mut bytes).map(drop)) {
        Ok(()) => Ok(()),
        Err(error) => names(&error, path),
    }
}

/// The lowest bit of a number in the footer is its sign: the reader panics at some negative ones.
#[cfg(feature = "parquet")]
#[test]
fn no_number_of_a_parquet_footer_is_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    write_hf(&path, ::parquet::basic::Compression::SNAPPY, &images(0, 6), &[Some(1); 6]);
    let sound = fs::read(&path).unwrap();
    for at in footer_start(&sound)..sound.len() {
        let mut bytes = sound.clone();
        bytes[at] ^= 1;
        fs::write(&path, bytes).unwrap();
        read_parquet(&path).unwrap();
    }
}

#[cfg(feature = "parquet")]
fn footer_start(file: &[u8]) -> usize {
    let (rest, _) = file.split_last_chunk::<4>().unwrap();
    let (rest, length) = rest.split_last_chunk::<4>().unwrap();
    rest.len() - u32::from_le_bytes(*length) as usize
}

/// A size that no file has, in each way that tar can say it.
#[test]
fn members_of_impossible_size_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.tar");
    let (sound, headers) = archive(folder.path());
    let mut n_refused = 0;
    for &at in &headers {
        for size in [1u64 << 60, u64::MAX, i64::MAX as u64, 1 << 33, u64::MAX - 511] {
            let mut bytes = sound.clone();
            let header = &mut bytes[at..at + 512];
            header[124..136].fill(0);
            header[124] = 0x80;
            header[128..136].copy_from_slice(&size.to_be_bytes());
            seal_header(header);
            scan_tar(&path, &bytes).unwrap();
            n_refused += usize::from(scan_shard(&path, "x.tar").is_err());
        }
    }
    assert!(n_refused > 3 * headers.len(), "{n_refused} for {} headers", headers.len());
    // The same as a record in front of the member.
    for size in ["1152921504606846976", "18446744073709551615", "99999999999999999999999", "-1"] {
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_pax_extensions([("size", size.as_bytes())]).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_size(10);
        builder.append_data(&mut header, "0.png", &[1u8; 10][..]).unwrap();
        scan_tar(&path, &builder.into_inner().unwrap()).unwrap();
    }
}

/// A hostile part says that more was left out than a shard holds, or less than it lists.
#[test]
fn parts_with_wrong_counts_are_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let index = || build_index(folder.path(), 1, &mut |_| {});
    for count in ["0", "18446744073709551615"] {
        write_tar(&at("a.tar"), &[("0.png", &grey_png(8, 1)), ("1.png", b"no image")]);
        fs::write(at("b.tar"), [7; 600]).unwrap();
        assert!(index().is_err());
        let part = at(".index-parts/a.tar.part");
        let sound = fs::read(&part).unwrap();
        let end = sound.iter().position(|byte| *byte == b'\n').unwrap();
        let head = String::from_utf8(sound[..end].to_vec()).unwrap();
        let changed = head.replace("\"n_skipped\":1", &format!("\"n_skipped\":{count}"));
        assert_ne!(changed, head);
        fs::write(&part, [changed.as_bytes(), &sound[end..]].concat()).unwrap();
        write_tar(&at("b.tar"), &[("2.png", b"no image"), ("3.png", &grey_png(8, 2))]);
        assert_eq!(index().unwrap().skipped.n, 2);
    }
}

/// Every cut of an index, and of the bitmap beside it, is refused when the data set is opened.
#[test]
fn a_cut_index_does_not_open() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = synthetic(folder.path(), 10, 8, 1);
    let path = folder.path().join("index.lacuna");
    let sound = dataset.index().bytes();
    for end in 0..sound.len() {
        fs::write(&path, &sound[..end]).unwrap();
        let error = Dataset::open(folder.path()).unwrap_err();
        names(&error, &path).unwrap();
    }
}
