use super::*;

/// Sizes around the stage and the alignment, written in uneven pieces.
#[test]
fn direct_writes_give_the_exact_bytes() {
    let root = tempfile::tempdir().unwrap();
    for (i, total) in [0, 1, 4095, 4096, 4097, STAGE_BYTES, STAGE_BYTES + 1, 2 * STAGE_BYTES + 5000]
        .into_iter()
        .enumerate()
    {
        let target = root.path().join(i.to_string());
        let bytes: Vec<u8> = (0..total).map(|i| ((i * 31) >> 3) as u8).collect();
        let partial = Partial::create(&target).unwrap();
        partial.reserve(total.max(1) as u64).unwrap();
        let mut writer = DirectWriter::new(&partial.file);
        bytes.chunks(100_003).for_each(|piece| writer.write_all(piece).unwrap());
        writer.finish().unwrap();
        assert_eq!(partial.publish().unwrap(), Published::Created);
        assert!(fs::read(&target).unwrap() == bytes, "{total} bytes");
    }
}

#[test]
fn a_taken_name_is_not_replaced() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("x");
    assert_eq!(create_small(&target, "first").unwrap(), Published::Created);
    assert_eq!(create_small(&target, "second").unwrap(), Published::Exists);
    let partial = Partial::create(&target).unwrap();
    assert_eq!(partial.link_new().unwrap(), Published::Exists, "on file systems without the flag");
    drop(partial);
    assert_eq!(fs::read(&target).unwrap(), b"first");
    assert_eq!(names(root.path()).unwrap(), ["x"]);
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
    assert_eq!(read_small(&path, 5).unwrap(), b"12345");
    assert!(chain(&read_small(&path, 4).unwrap_err()).ends_with("larger than 4 bytes"));
}
