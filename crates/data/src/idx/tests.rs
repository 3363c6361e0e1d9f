use std::fs;
use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::*;

fn images_file(n: u32) -> Vec<u8> {
    let mut bytes: Vec<u8> = [0x0803, n, 2, 3].iter().flat_map(|v: &u32| v.to_be_bytes()).collect();
    bytes.extend((0..n * 6).map(|i| i as u8));
    bytes
}

#[test]
fn reads_plain_and_gzipped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x-idx3-ubyte");
    fs::write(&path, images_file(4)).unwrap();
    let plain = read_images(&path).unwrap();
    assert_eq!((plain.n(), plain.height, plain.width), (4, 2, 3));
    assert_eq!(plain.image(2), [12, 13, 14, 15, 16, 17]);
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&images_file(4)).unwrap();
    fs::write(&path, encoder.finish().unwrap()).unwrap();
    assert_eq!(read_images(&path).unwrap(), plain);
    fs::write(&path, [0, 0, 8, 1, 0, 0, 0, 2, 5, 9]).unwrap();
    assert_eq!(read_labels(&path).unwrap(), [5, 9]);
}

#[test]
fn wrong_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        read_images(&path).unwrap_err()
    };
    let good = images_file(2);
    assert!(matches!(read(b"hello"), ReadIdxError::Magic { .. }));
    assert!(matches!(read(&good[..10]), ReadIdxError::Io { .. }));
    assert!(matches!(read(&good[..20]), ReadIdxError::Io { .. }));
    assert!(matches!(read(&[&good[..], &[1]].concat()), ReadIdxError::Trailing { .. }));
    let huge: Vec<u8> =
        [0x0803, u32::MAX, u32::MAX, u32::MAX].iter().flat_map(|v: &u32| v.to_be_bytes()).collect();
    assert!(matches!(read(&huge), ReadIdxError::Dims { .. }));
    assert!(matches!(read_labels(&path).unwrap_err(), ReadIdxError::Magic { .. }));
}
