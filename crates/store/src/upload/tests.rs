//! Objects in parts, and what a folder of them shows.

use std::time::Instant;

use tempfile::TempDir;

use super::*;
use crate::Limits;
use crate::testing::{Fault, Kind, KindPlan, Seen, Server};

const DEADLINE: Duration = Duration::from_secs(20);

struct Desk {
    folder: TempDir,
    server: Server,
    store: Arc<Store>,
}

fn desk(plan: Box<KindPlan>) -> Desk {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("bucket")).unwrap();
    let server = Server::start_by_kind(folder.path(), Duration::ZERO, plan).unwrap();
    let options = server.s3_options();
    let options: Vec<(&str, &str)> = options.iter().map(|(k, v)| (&**k, &**v)).collect();
    let limits = Limits {
        deadline: DEADLINE,
        stall: Duration::from_millis(500),
        attempt: Duration::from_secs(2),
        backoff_first: Duration::from_millis(5),
        backoff_max: Duration::from_millis(50),
        in_flight: 8,
    };
    let store = Arc::new(Store::open_with("s3://bucket/set", &options, limits).unwrap());
    Desk { folder, server, store }
}

impl Desk {
    fn seen(&self, kind: Kind) -> Vec<Seen> {
        self.server.seen().into_iter().filter(|seen| seen.kind == kind).collect()
    }

    fn content(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.folder.path().join("bucket/set").join(name)).unwrap()
    }
}

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// Parts of 16 MiB, sent while others are written, each with a checksum that the server compares;
/// the last one is cut off once.
#[test]
fn a_large_object_goes_in_parts() {
    let cut = std::sync::atomic::AtomicBool::new(false);
    let desk = desk(Box::new(move |asked| {
        let first =
            asked.kind == Kind::Part && !cut.swap(true, std::sync::atomic::Ordering::Relaxed);
        if first { Fault::CutBody(60) } else { Fault::None }
    }));
    let whole = content(40 << 20);
    let mut upload = desk.store.upload("a/large", whole.len() as u64, DEADLINE).unwrap();
    for piece in whole.chunks(3_000_000) {
        upload.write_all(piece, &Stop::default()).unwrap();
    }
    assert_eq!(desk.server.n_uploads(), 1);
    assert_eq!(upload.finish(&Stop::default()).unwrap(), Creation::Created);
    assert!(desk.content("a/large") == whole);
    assert_eq!((desk.server.n_uploads(), desk.seen(Kind::Part).len()), (0, 4));
}

#[test]
fn what_fits_into_a_part_is_one_request() {
    let desk = desk(Box::new(|_| Fault::None));
    for (name, bytes) in [("none", 0), ("one", 1), ("full", 1000)] {
        let mut upload = desk.store.upload_in_parts(name, 10, 1000, DEADLINE).unwrap();
        upload.write_all(&content(bytes), &Stop::default()).unwrap();
        assert_eq!(upload.finish(&Stop::default()).unwrap(), Creation::Created);
        assert_eq!(desk.content(name), content(bytes));
    }
    assert_eq!((desk.seen(Kind::Put).len(), desk.seen(Kind::Begin).len()), (3, 0));
}

#[test]
fn a_dropped_upload_never_was() {
    let desk = desk(Box::new(|_| Fault::None));
    let mut upload = desk.store.upload_in_parts("x", 10, 1000, DEADLINE).unwrap();
    upload.write_all(&content(5500), &Stop::default()).unwrap();
    assert_eq!(desk.server.n_uploads(), 1);
    drop(upload);
    assert_eq!(desk.server.n_uploads(), 0);
    assert_eq!(desk.store.names("", DEADLINE, &Stop::default()).unwrap(), [""; 0]);
}

/// The upload was thrown away by somebody else: another attempt cannot help.
#[test]
fn an_upload_that_is_gone_is_an_error_at_once() {
    let desk = desk(Box::new(|asked| match asked.kind {
        Kind::Complete => Fault::Status(404),
        _ => Fault::None,
    }));
    let mut upload = desk.store.upload_in_parts("x", 10, 1000, DEADLINE).unwrap();
    upload.write_all(&content(5500), &Stop::default()).unwrap();
    let start = Instant::now();
    let error = upload.finish(&Stop::default()).unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("s3://bucket/set/x"), "{error}");
    assert!(start.elapsed() < DEADLINE / 2);
}

/// A bucket that is not there and a store without the request are said at once, not waited for.
#[test]
fn what_cannot_be_written_is_said_at_once() {
    let desk = desk(Box::new(|asked| match asked.path {
        "/bucket/set/new" => Fault::Status(501),
        "/bucket/set/secret" => Fault::Status(403),
        _ => Fault::None,
    }));
    let create = |name: &str| desk.store.create(name, vec![1], DEADLINE, &Stop::default());
    let error = create("new").unwrap_err();
    assert!(matches!(error, StoreError::Unsupported { .. }), "{error}");
    let error = create("secret").unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    std::fs::remove_dir_all(desk.folder.path().join("bucket")).unwrap();
    let error = create("x").unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("NoSuchBucket"), "{error}");
    assert_eq!(desk.server.seen().len(), 3);
}

/// Objects that a browser of buckets made for folders are no names of their own.
#[test]
fn a_folder_shows_what_is_right_in_it() {
    let desk = desk(Box::new(|_| Fault::None));
    let stop = Stop::default();
    for name in ["d/b", "d/a/1", "d/a/2", "d/c/x/y", "dd/no", "e"] {
        assert_eq!(
            desk.store.create(name, vec![1], DEADLINE, &stop).unwrap(),
            Creation::Created,
            "{name}"
        );
    }
    for page in [1, 2, 1000] {
        desk.server.set_page(page);
        assert_eq!(desk.store.names("d", DEADLINE, &stop).unwrap(), ["a", "b", "c"]);
        assert_eq!(desk.store.names("", DEADLINE, &stop).unwrap(), ["d", "dd", "e"]);
        assert_eq!(desk.store.names("none", DEADLINE, &stop).unwrap(), [""; 0]);
    }
    desk.server.set_page(1);
    desk.store.delete_folder("d", DEADLINE, &stop).unwrap();
    desk.store.delete("e", DEADLINE, &stop).unwrap();
    desk.store.delete("e", DEADLINE, &stop).unwrap();
    assert_eq!(desk.store.names("", DEADLINE, &stop).unwrap(), ["dd"]);
}

#[test]
fn parts_grow_with_the_object() {
    let desk = desk(Box::new(|_| Fault::None));
    let part = |bytes: u64| desk.store.upload("x", bytes, DEADLINE).unwrap().part_bytes as u64;
    assert_eq!(part(0), PART_BYTES_MIN);
    assert_eq!(part(9000 * PART_BYTES_MIN), PART_BYTES_MIN);
    assert_eq!(part(9000 * PART_BYTES_MIN + 1), PART_BYTES_MIN + 1);
}
