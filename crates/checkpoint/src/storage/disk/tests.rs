use std::fs;

use super::*;
use crate::storage::chain;
use crate::storage::stage::PIECE_BYTES;

/// Sizes around a piece and the alignment, written by any number of threads.
#[test]
fn direct_writes_give_the_exact_bytes() {
    let root = tempfile::tempdir().unwrap();
    let around = [PIECE_BYTES, PIECE_BYTES + 1, 5 * PIECE_BYTES + 5000];
    for writers in 1..=4 {
        let disk = Disk { writers, ..Disk::new() };
        for total in [0, 1, 4095, 4096, 4097].into_iter().chain(around) {
            let target = root.path().join(format!("{writers}-{total}"));
            let bytes: Vec<u8> = (0..total).map(|i| ((i * 31) >> 3) as u8).collect();
            let mut sink = disk.begin(&target, total.max(1) as u64).unwrap();
            sink.fill(&bytes).unwrap();
            assert_eq!(sink.publish().unwrap(), Published::Created);
            assert!(fs::read(&target).unwrap() == bytes, "{total} bytes");
        }
    }
}

#[test]
fn a_taken_name_is_not_replaced() {
    let root = tempfile::tempdir().unwrap();
    let disk = Disk::new();
    let target = root.path().join("x");
    assert_eq!(disk.create_small(&target, &target, "first").unwrap(), Published::Created);
    assert_eq!(disk.create_small(&target, &target, "second").unwrap(), Published::Exists);
    let partial = Partial::create(&target).unwrap();
    assert_eq!(partial.link_new().unwrap(), Published::Exists, "on file systems without the flag");
    drop(partial);
    assert_eq!(fs::read(&target).unwrap(), b"first");
    assert_eq!(disk.names(root.path()).unwrap(), ["x"]);
}

#[test]
fn a_lost_answer_of_a_link_is_recognised() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("x");
    let partial = Partial::create(&target).unwrap();
    fs::hard_link(&partial.path, &target).unwrap();
    assert_eq!(partial.link_new().unwrap(), Published::Created);
}

#[test]
fn large_documents_are_not_read() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("x");
    fs::write(&path, "12345").unwrap();
    assert_eq!(Disk::new().read_small(&path, 5).unwrap(), b"12345");
    let error = Disk::new().read_small(&path, 4).unwrap_err();
    assert!(chain(&error).ends_with("larger than 4 bytes"));
}

/// What a device refuses, in whatever thread, is an error of the writer, and nothing stays.
#[test]
fn a_full_device_is_an_error() {
    let full = Path::new("/dev/full");
    if !full.exists() {
        println!("a_full_device_is_an_error: skipped: there is no /dev/full");
        return;
    }
    let device = fs::OpenOptions::new().write(true).open(full).unwrap();
    for threads in 1..=3 {
        let bytes: Vec<u8> = vec![1; 5 * PIECE_BYTES];
        let written = write_past_cache(&device, &bytes, threads);
        assert_eq!(written.unwrap_err().kind(), ErrorKind::StorageFull);
    }
}
