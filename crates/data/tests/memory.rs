//! Files whose headers claim more than there is take no memory for it.
//!
//! One test, so that the most memory that this process ever had is that of the files it reads.

use std::fs;
use std::path::Path;

use lacuna_data::index::{Index, ReadIndexError};
use lacuna_data::pack::{Existing, PackConfig, PackSource, pack};
use lacuna_data::wds::{build_index, scan_shard};
use lacuna_data::{Dataset, SampleReader, idx};
use lacuna_types::SampleId;
use rustix::process::{Resource, Rlimit, setrlimit};

/// What reading small files may take, buffers included.
const GROWTH_MAX: u64 = 48 << 20;

/// Most address space: far more than any limit of the formats, far less than what the files claim.
const SPACE_MAX: u64 = 16 << 30;

/// Bytes of memory that this process has had at most.
fn most_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    1024 * line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
}

struct Watch {
    before: u64,
}

impl Watch {
    fn look(&self, what: &str) {
        let grown = most_memory() - self.before;
        assert!(grown < GROWTH_MAX, "{what}: {} MiB more", grown >> 20);
    }
}

fn header(name: &str, size: u64, kind: u8) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_path(name).unwrap();
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_size(size);
    header.set_mode(0o644);
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn index_json(bytes: u64, samples: u64, zip: bool) -> String {
    let zip_data = match zip {
        true => r#"{"basename": "a.mds.zstd", "bytes": 17}"#,
        false => "null",
    };
    format!(
        r#"{{"version": 2, "shards": [{{"version": 2, "format": "mds", "samples": {samples},
            "column_names": ["image"], "column_encodings": ["png"], "column_sizes": [null],
            "compression": {}, "zip_data": {zip_data},
            "raw_data": {{"basename": "a.mds", "bytes": {bytes}}}}}]}}"#,
        if zip { r#""zstd""# } else { "null" }
    )
}

fn pack_fails(source: &PackSource, out: &Path) {
    let config =
        PackConfig { name: "x".to_string(), shard_bytes: 1 << 20, existing: Existing::Replace };
    assert!(pack(source, out, &config, &mut |_| {}).is_err(), "{source:?}");
}

/// Tar members, their long names and attributes.
fn tars(folder: &Path, watch: &Watch) {
    let path = folder.join("x.tar");
    for kind in [b'0', b'L', b'K', b'x', b'g', b'S', b'5'] {
        for size in [1u64 << 60, 1 << 40, 1 << 33, (1 << 31) - 1] {
            for name in ["0.png", "0.cls", "0.json"] {
                let bytes = [header(name, size, kind), vec![b'1'; 2048]].concat();
                fs::write(&path, bytes).unwrap();
                let scanned = scan_shard(&path, "x.tar");
                assert!(scanned.map_or(true, |(shard, _)| shard.records.is_empty()));
                watch.look(&format!("a member of kind {} and {size} bytes", kind as char));
            }
        }
    }
    fs::remove_file(path).unwrap();
}

fn mds(folder: &Path, watch: &Watch) {
    let out = folder.join("out");
    let word = |n: u32| n.to_le_bytes();
    // As many samples as a table of 16 GiB has, and an image of 4 GiB.
    let shards = [
        [word(u32::MAX - 1), word(12), word(16), word(0)].concat(),
        [word(1), word(12), word(20), word(u32::MAX - 28), word(0)].concat(),
    ];
    for shard in &shards {
        let n = u64::from(u32::from_le_bytes(shard[..4].try_into().unwrap()));
        fs::write(folder.join("a.mds"), shard).unwrap();
        for bytes in [shard.len() as u64, u64::from(u32::MAX), u64::MAX] {
            for zip in [false, true] {
                fs::write(folder.join("index.json"), index_json(bytes, n, zip)).unwrap();
                assert!(build_index(folder, 1, &mut |_| {}).is_err());
                pack_fails(&PackSource::Mds(folder.to_path_buf()), &out);
                watch.look("an MDS shard");
            }
        }
    }
    fs::remove_file(folder.join("a.mds")).unwrap();
    // A frame of zstd that says it unpacks to 4 GiB and asks for as large a window.
    let frame = [0x28, 0xB5, 0x2F, 0xFD, 0xC0, 0xB0, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0, 1, 0, 0];
    fs::write(folder.join("a.mds.zstd"), frame).unwrap();
    fs::write(folder.join("index.json"), index_json(u64::from(u32::MAX), 1, true)).unwrap();
    pack_fails(&PackSource::Mds(folder.to_path_buf()), &out);
    watch.look("a frame of zstd");
    fs::remove_file(folder.join("index.json")).unwrap();
}

fn idx_files(folder: &Path, watch: &Watch) {
    let path = folder.join("x-images-idx3-ubyte");
    let lies = [[u32::MAX; 3], [1 << 22, 28, 28], [65_536, 256, 256], [1 << 31, 1 << 31, 4]];
    for dims in lies {
        let words = [0x0803, dims[0], dims[1], dims[2]];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word: &u32| word.to_be_bytes()).collect();
        bytes.extend([7; 100]);
        fs::write(&path, bytes).unwrap();
        let error = idx::read_images(&path).unwrap_err().to_string();
        assert!(error.contains("x-images-idx3-ubyte"), "{error}");
        watch.look("an IDX file");
    }
    let labels = [&[0, 0, 8, 1][..], &u32::MAX.to_be_bytes(), &[1; 9]].concat();
    fs::write(&path, labels).unwrap();
    assert!(idx::read_labels(&path).is_err());
    watch.look("labels of IDX");
}

fn indexes(watch: &Watch) {
    let mut bytes = b"LACUNAIX".to_vec();
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend((48u64 + 32).to_le_bytes());
    bytes.extend([0xFF; 16]);
    bytes.extend(0u64.to_le_bytes());
    let digest = blake3::hash(&bytes);
    bytes.extend(digest.as_bytes());
    let error = Index::parse(bytes, Path::new("x/index.lacuna")).unwrap_err();
    assert!(matches!(error, ReadIndexError::Content { offset: 24, .. }), "{error}");
    watch.look("an index");
}

/// An image just below the limit on pixels, whose bytes are some lines at most.
fn images(folder: &Path, watch: &Watch) {
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x20\0\0\0\x20\0\x10\x06\0\0\0".to_vec();
    let mut crc = flate2::Crc::new();
    crc.update(&png[12..]);
    png.extend(crc.sum().to_be_bytes());
    png.extend(*b"\0\0\0\x08IDATx\x9c\0\0\0\0\0\0\0\0\0\0");
    let jpeg = [
        &[0xFF, 0xD8, 0xFF, 0xC0, 0, 17, 8, 0x20, 0, 0x20, 0, 3][..],
        &[1, 0x22, 0, 2, 0x11, 0, 3, 0x11, 0],
        &[0xFF, 0xDA, 0, 12, 3, 1, 0, 2, 0, 3, 0, 0, 63, 0, 1, 2, 3, 0xFF, 0xD9],
    ]
    .concat();
    let mut builder = tar::Builder::new(fs::File::create(folder.join("x.tar")).unwrap());
    for (name, bytes) in [("0.png", &png), ("1.jpg", &jpeg)] {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, bytes.as_slice()).unwrap();
    }
    builder.into_inner().unwrap();
    let indexed = build_index(folder, 1, &mut |_| {}).unwrap();
    assert_eq!(indexed.index.n_samples(), 2, "{:?}", indexed.skipped);
    let dataset = Dataset::open(folder).unwrap();
    let mut reader = SampleReader::new();
    for id in 0..2 {
        let error = reader.decode(&dataset, SampleId(id)).unwrap_err();
        assert!(error.is_bad_sample() && error.to_string().contains("x.tar"), "{error}");
        watch.look(&format!("image {id}"));
    }
}

#[test]
fn what_is_only_claimed_takes_no_memory() {
    let limit = Rlimit { current: Some(SPACE_MAX), maximum: None };
    setrlimit(Resource::As, limit).unwrap();
    let watch = Watch { before: most_memory() };
    for read in [tars, mds, idx_files, images] {
        let folder = tempfile::tempdir().unwrap();
        read(folder.path(), &watch);
    }
    indexes(&watch);
}
