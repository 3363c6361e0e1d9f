//! What a store gives when its server misbehaves.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::testing::{Fault, Plan, Server, mixed};
use crate::{Limits, Stop, Store, StoreError, is_url};

/// A name with everything that URLs and stores write in another way.
const ODD: &str = "tr\u{e4}in ~#%41[0]{1}+a&b=c.tar";

/// Limits for a server on loopback.
fn limits() -> Limits {
    Limits {
        deadline: Duration::from_secs(20),
        stall: Duration::from_millis(400),
        attempt: Duration::from_millis(900),
        backoff_first: Duration::from_millis(5),
        backoff_max: Duration::from_millis(50),
        in_flight: 8,
    }
}

fn content() -> Vec<u8> {
    (0..300_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

struct Desk {
    folder: TempDir,
    server: Server,
}

fn desk(latency: Duration, plan: Box<Plan>) -> Desk {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("bucket/set")).unwrap();
    std::fs::write(folder.path().join("bucket/set/a.tar"), content()).unwrap();
    std::fs::write(folder.path().join("bucket/set/b 1.tar"), b"second").unwrap();
    std::fs::write(folder.path().join(format!("bucket/set/{ODD}")), b"odd").unwrap();
    let server = Server::start(folder.path(), latency, plan).unwrap();
    Desk { folder, server }
}

impl Desk {
    fn http(&self, limits: Limits) -> Store {
        Store::open(&format!("{}/bucket/set", self.server.url()), limits).unwrap()
    }

    fn s3(&self, limits: Limits) -> Store {
        let options = self.server.s3_options();
        let options: Vec<(&str, &str)> = options.iter().map(|(k, v)| (&**k, &**v)).collect();
        Store::open_with("s3://bucket/set/", &options, limits).unwrap()
    }
}

fn faultless() -> Box<Plan> {
    Box::new(|_, _| Fault::None)
}

#[test]
fn ranges_sizes_and_listings_over_http_and_s3() {
    let desk = desk(Duration::ZERO, faultless());
    let stop = Stop::default();
    for store in [desk.http(limits()), desk.s3(limits())] {
        assert_eq!(store.read("a.tar", 7..100_007, &stop).unwrap(), content()[7..100_007]);
        assert_eq!(store.read("a.tar", 5..5, &stop).unwrap(), b"");
        assert_eq!(store.get("b 1.tar", 100, &stop).unwrap(), b"second");
        assert_eq!(store.get(ODD, 100, &stop).unwrap(), b"odd");
        assert_eq!(store.size("a.tar", Duration::from_secs(5), &stop).unwrap(), 300_000);
        let text = store.get("b 1.tar", 5, &stop).unwrap_err().to_string();
        assert!(text.contains("b 1.tar") && text.contains("6 bytes"), "{text}");
    }
    let store = desk.s3(limits());
    let names: Vec<(String, u64)> =
        store.list(&stop).unwrap().into_iter().map(|info| (info.name, info.bytes)).collect();
    let want = [("a.tar".to_string(), 300_000), ("b 1.tar".to_string(), 6), (ODD.to_string(), 3)];
    assert_eq!(names, want);
    store.put("new.bin", b"new".to_vec(), &stop).unwrap();
    assert_eq!(std::fs::read(desk.folder.path().join("bucket/set/new.bin")).unwrap(), b"new");
    let stats = store.stats();
    assert_eq!((stats.requests, stats.retries), (0, 0));
}

#[test]
fn an_object_is_read_from_beginning_to_end() {
    let desk = desk(Duration::ZERO, faultless());
    let store = Arc::new(desk.http(limits()));
    let mut reader = store.reader("a.tar", &Stop::default()).unwrap();
    let mut all = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut all).unwrap();
    assert_eq!(all, content());
}

/// Resets, cut answers, refusals, drips and silence, mixed by seeds: the bytes are right each time.
#[test]
fn faults_cost_time_and_no_byte() {
    let shares = [
        (10, Fault::Reset),
        (15, Fault::Cut(60)),
        (5, Fault::Cut(0)),
        (10, Fault::Status(500)),
        (10, Fault::Status(503)),
        (5, Fault::Status(429)),
        (5, Fault::Drip { bytes: 40_000, pause: Duration::from_millis(30) }),
        (3, Fault::Hang(Duration::from_secs(2))),
    ];
    let mut retries = 0;
    for seed in 0..3 {
        let desk = desk(Duration::from_millis(2), mixed(seed, &shares));
        for store in [desk.http(limits()), desk.s3(limits())] {
            for i in 0..12u64 {
                let range = i * 20_000..300_000 - i * 3_000;
                let want = &content()[range.start as usize..range.end as usize];
                assert_eq!(store.read("a.tar", range, &Stop::default()).unwrap(), want);
            }
            retries += store.stats().retries;
        }
    }
    assert!(retries > 20, "the faults were met: {retries} retries");
}

/// What came before an answer broke off is kept: each attempt goes on behind it.
#[test]
fn attempts_go_on_where_the_one_before_ended() {
    let desk = desk(Duration::ZERO, Box::new(|_, _| Fault::Cut(50)));
    let store = desk.http(Limits { deadline: Duration::from_secs(1), ..limits() });
    // Halves of 64, 32, … bytes; the last byte never comes by halves.
    let error = store.read("a.tar", 0..64, &Stop::default()).unwrap_err();
    assert!(matches!(error, StoreError::Deadline { received: 63, .. }), "{error}");
    let seen = desk.server.seen();
    let starts: Vec<u64> = seen.iter().filter_map(|s| s.range).map(|(from, _)| from).collect();
    assert_eq!(&starts[..7], [0, 32, 48, 56, 60, 62, 63]);
}

/// A server that never answers well costs the deadline and no more, and the error says what was
/// tried.
#[test]
fn the_deadline_ends_every_kind_of_waiting() {
    let deadline = Duration::from_millis(700);
    let faults = [
        (Fault::Status(503), "503"),
        (Fault::Reset, ""),
        (Fault::Hang(Duration::from_secs(5)), "no byte came in"),
        (Fault::Drip { bytes: 10, pause: Duration::from_millis(50) }, "bytes came in"),
    ];
    let plan: Box<Plan> = Box::new(|_, _| Fault::Status(503));
    let dead = desk(Duration::ZERO, plan);
    let size = dead.http(limits()).size("a.tar", deadline, &Stop::default()).unwrap_err();
    assert!(matches!(size, StoreError::NoAnswer { .. }), "{size}");
    assert!(size.to_string().contains("/bucket/set/a.tar`: no answer in"), "{size}");
    for (fault, said) in faults {
        let desk = desk(Duration::ZERO, Box::new(move |_, _| fault));
        let store = desk.http(Limits { deadline, ..limits() });
        let start = Instant::now();
        let error = store.read("a.tar", 0..300_000, &Stop::default()).unwrap_err();
        let took = start.elapsed();
        assert!(took < deadline + Duration::from_secs(3), "{fault:?} took {took:?}");
        let text = error.to_string();
        assert!(text.contains("/bucket/set/a.tar`, bytes 0 to 300000"), "{text}");
        assert!(text.contains(said) && text.contains("attempts"), "{fault:?}: {text}");
    }
}

#[test]
fn what_asking_again_cannot_change_is_said_at_once() {
    let stop = Stop::default();
    let plain = desk(Duration::ZERO, faultless());
    for store in [plain.http(limits()), plain.s3(limits())] {
        let text = store.read("none.tar", 0..9, &stop).unwrap_err().to_string();
        assert!(text.ends_with("/none.tar` is not there"), "{text}");
        let error = store.read("a.tar", 299_990..300_010, &stop).unwrap_err();
        assert!(matches!(error, StoreError::Size { found: 300_000, expected: 300_010, .. }));
        let behind = store.read("a.tar", 300_001..300_010, &stop).unwrap_err();
        assert!(matches!(behind, StoreError::Refused { .. }), "{behind}");
    }
    for (status, store) in [(403, true), (401, false), (400, true), (400, false), (416, true)] {
        let desk = desk(Duration::ZERO, Box::new(move |_, _| Fault::Status(status)));
        let store = if store { desk.s3(limits()) } else { desk.http(limits()) };
        let error = store.read("a.tar", 0..9, &stop).unwrap_err();
        assert!(matches!(error, StoreError::Refused { .. }), "{status}: {error}");
        assert_eq!(desk.server.seen().len(), 1);
    }
    let desk = desk(Duration::ZERO, Box::new(|_, _| Fault::Whole));
    let error = desk.http(limits()).read("a.tar", 3..9, &stop).unwrap_err();
    assert!(error.to_string().contains("gives no ranges"), "{error}");
}

#[test]
fn a_raised_stop_ends_a_read() {
    let desk = desk(Duration::ZERO, Box::new(|_, _| Fault::Hang(Duration::from_secs(5))));
    let store = desk.http(Limits { stall: Duration::from_secs(9), ..limits() });
    let stop = Stop::default();
    let start = Instant::now();
    std::thread::scope(|scope| {
        let read = scope.spawn(|| store.read("a.tar", 0..9, &stop));
        while desk.server.seen().is_empty() {
            std::thread::yield_now();
        }
        stop.raise();
        let error = read.join().unwrap().unwrap_err();
        assert!(matches!(error, StoreError::Stopped { .. }), "{error}");
    });
    assert!(start.elapsed() < Duration::from_secs(4));
}

/// Opening, reading and dropping on a thread of an async runtime must not panic.
#[test]
fn a_store_lives_on_a_runtimes_thread() {
    let desk = desk(Duration::ZERO, faultless());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let store = desk.http(limits());
        assert_eq!(store.read("b 1.tar", 0..3, &Stop::default()).unwrap(), b"sec");
    });
}

#[test]
fn addresses() {
    for (text, is) in [
        ("s3://b/c", true),
        ("https://h/c", true),
        ("/data/x", false),
        ("data", false),
        ("://x", false),
        ("a b://x", false),
    ] {
        assert_eq!(is_url(text), is, "{text}");
    }
    for url in ["ftp://h/x", "s3://", "http://", "gs://", "http://h/x?sig=1", "https://u:p@h/x"] {
        let error = Store::open(url, limits()).unwrap_err().to_string();
        assert!(error.contains(url), "{error}");
    }
    // Never asked: they only have to be known.
    for url in ["gs://bucket/x", "https://account.blob.core.windows.net/container/x"] {
        Store::open(url, limits()).unwrap();
    }
}
