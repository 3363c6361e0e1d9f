//! Lives and crashes of trackers, with what people's tools then see.

use std::fs;
use std::path::{Path, PathBuf};

use expect_test::{Expect, expect};
use serde_json::Value as Json;
use tempfile::TempDir;

use super::*;
use crate::frame::{masked_crc, push_event};
use crate::record::TEXT_BYTES_MAX;

mod crash;

/// Some time, in milliseconds.
const NOW: u64 = 1_700_000_000_500;

/// An encoded picture; to a tracker it is just bytes.
const PNG: &[u8] = b"\x89PNG";

fn figures(seq: u64, step: u64, generation: u64) -> Record {
    let figures = Figures {
        step,
        generation,
        loss: 0.5,
        lr: 0.25,
        grad_norm: 2.0,
        images_per_second: 100.0,
        data_wait: 0.125,
        skipped: 0,
        redone: 0,
        digest: None,
        memory_bytes: 3 << 30,
        mfu: Some(0.5),
    };
    Record { seq, at_ms: NOW + seq, body: Body::Figures(figures) }
}

fn event(seq: u64, kind: &str) -> Record {
    let (kind, text) = (kind.to_string(), format!("{kind} \"so\"\n"));
    Record { seq, at_ms: NOW + seq, body: Body::Event { kind, warning: false, text } }
}

fn image(seq: u64, step: u64) -> Record {
    let (tag, png) = ("reconstruction/0".to_string(), PNG.to_vec());
    let body = Body::Image { tag, step, png, width: 4, height: 2, channels: 3 };
    Record { seq, at_ms: NOW + seq, body }
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn open(folder: &Path) -> Tracker {
    Tracker::open(folder, NOW).unwrap()
}

/// One life: takes all that is new, flushes and ends.
fn live(folder: &Path, records: &[Record]) {
    let mut tracker = open(folder);
    tracker.take(records).unwrap();
    tracker.flush().unwrap();
}

fn text_of(folder: &Path, name: &str) -> String {
    fs::read_to_string(folder.join(name)).unwrap()
}

fn seqs(folder: &Path, name: &str) -> Vec<u64> {
    let number = |line: &str| serde_json::from_str::<Json>(line).unwrap()["seq"].as_u64().unwrap();
    text_of(folder, name).lines().map(number).collect()
}

/// Event files in the order in which TensorBoard reads them.
fn event_files(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let is_event_file = |path: &PathBuf| path.to_str().unwrap().contains("tfevents");
    let mut paths: Vec<PathBuf> = paths.filter(is_event_file).collect();
    paths.sort();
    paths
}

/// Says what is in the event files, a line for each event and an empty one between files.
fn transcript(folder: &Path) -> String {
    let mut out: Vec<String> = Vec::new();
    for path in event_files(folder) {
        let lines = read_events(&path).unwrap().iter().map(describe).collect::<Vec<String>>();
        out.push(lines.concat());
    }
    out.join("\n")
}

fn describe(event: &Event) -> String {
    let mut line = format!("step {}", event.step);
    if let Some(version) = &event.file_version {
        line += &format!(" version {version}");
    }
    if let Some(log) = &event.session_log {
        line += &format!(" status {}", log.status);
    }
    if event.seq > 0 {
        line += &format!(" record {}", event.seq);
    }
    for value in event.summary.iter().flat_map(|summary| &summary.value) {
        line += &format!(" {}", value.tag);
        if let Some(scalar) = value.simple_value {
            line += &format!("={scalar}");
            // The others of the six would make long lines.
            if value.tag == "loss/train" {
                break;
            }
        }
        if let Some(image) = &value.image {
            let (w, h, c) = (image.width, image.height, image.colorspace);
            line += &format!("={w}x{h}x{c} {} bytes", image.encoded_image_string.len());
        }
        if let Some(tensor) = &value.tensor {
            line += &format!("={:?}", String::from_utf8_lossy(&tensor.string_val[0]));
        }
    }
    line + "\n"
}

fn check(found: &str, expected: Expect) {
    expected.assert_eq(found);
}

#[test]
fn frames_are_those_of_tfrecord() {
    // The check value of CRC-32C is 0xE3069283.
    assert_eq!(masked_crc(b"123456789"), 0xC78A_B0E5);
    let version = Some("brain.Event:2".to_string());
    let event = Event { wall_time: 1.0, file_version: version, ..Event::default() };
    let mut bytes = Vec::new();
    push_event(&mut bytes, &event);
    // The first bytes of every event file that TensorFlow writes.
    assert_eq!(bytes[..12], *b"\x18\0\0\0\0\0\0\0\xa3\x7f\x4b\x22");
    assert_eq!(bytes[12..36], *b"\x09\0\0\0\0\0\0\xf0\x3f\x1a\x0dbrain.Event:2");
    assert_eq!(bytes[36..], masked_crc(&bytes[12..36]).to_le_bytes());
}

#[test]
fn reading_stops_at_damage() {
    let folder = folder();
    let path = folder.path().join("events");
    let mut whole = Vec::new();
    for seq in 1..=3 {
        push_event(&mut whole, &Event { seq, ..Event::default() });
    }
    let frame = whole.len() / 3;
    for byte in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[byte] ^= 0x80;
        fs::write(&path, &damaged).unwrap();
        assert_eq!(read_events(&path).unwrap().len(), byte / frame, "byte {byte}");
        fs::write(&path, &whole[..byte]).unwrap();
        assert_eq!(read_events(&path).unwrap().len(), byte / frame, "cut at {byte}");
    }
}

#[test]
fn a_life_in_all_three_files() {
    let folder = folder();
    let mut third = figures(3, 10, 1);
    if let Body::Figures(figures) = &mut third.body {
        (figures.loss, figures.digest, figures.skipped) = (f64::NAN, Some(0xAB), 7);
    }
    let mut tracker = open(folder.path()).with_spec("name = \"a\"\n[model]\n");
    assert_eq!(tracker.last_seq(), 0);
    tracker.take(&[event(1, "created"), figures(2, 5, 1), third, image(4, 10)]).unwrap();
    // A number that is left out is said.
    tracker.take(&[figures(7, 15, 1)]).unwrap();
    tracker.flush().unwrap();
    assert_eq!(tracker.last_seq(), 7);
    check(
        &transcript(folder.path()),
        expect![[r#"
            step 0 version brain.Event:2
            step 5 status 1
            step 5 run/spec="    name = \"a\"\n    [model]\n"
            step 5 record 2 loss/train=0.5
            step 10 record 3 loss/train=NaN
            step 10 record 4 reconstruction/0=4x2x3 4 bytes
            step 15 record 7 loss/train=0.5
        "#]],
    );
    check(
        &text_of(folder.path(), METRICS_FILE)
            .replace(",\"loss", ",\n \"loss")
            .replace(",\"skipped", ",\n \"skipped"),
        expect![[r#"
            {"seq":2,"at_ms":1700000000502,"step":5,"generation":1,
             "loss":0.5,"lr":0.25,"grad_norm":2.0,"images_per_second":100.0,"data_wait":0.125,
             "skipped":0,"redone":0,"memory_bytes":3221225472,"mfu":0.5}
            {"seq":3,"at_ms":1700000000503,"step":10,"generation":1,
             "loss":null,"lr":0.25,"grad_norm":2.0,"images_per_second":100.0,"data_wait":0.125,
             "skipped":7,"redone":0,"memory_bytes":3221225472,"mfu":0.5,"digest":"00000000000000ab"}
            {"seq":7,"after":4,"at_ms":1700000000507,"step":15,"generation":1,
             "loss":0.5,"lr":0.25,"grad_norm":2.0,"images_per_second":100.0,"data_wait":0.125,
             "skipped":0,"redone":0,"memory_bytes":3221225472,"mfu":0.5}
        "#]],
    );
    check(
        &text_of(folder.path(), EVENTS_FILE),
        expect![[r#"
        {"seq":1,"at_ms":1700000000501,"kind":"created","warning":false,"text":"created \"so\"\n"}
        {"seq":4,"at_ms":1700000000504,"kind":"image","tag":"reconstruction/0","step":10}
    "#]],
    );
    let events = read_events(&event_files(folder.path())[0]).unwrap();
    let values = &events[2].summary.as_ref().unwrap().value;
    let tags = values.iter().map(|value| format!("{} {:?}\n", value.tag, value.simple_value));
    check(
        &tags.collect::<String>(),
        expect![[r#"
            run/spec None
        "#]],
    );
    assert_eq!(events[2].wall_time, (NOW + 2) as f64 / 1000.0);
}

#[test]
fn a_second_life_begins_a_file_with_a_start() {
    let folder = folder();
    live(folder.path(), &[figures(1, 1, 1), figures(2, 2, 1)]);
    live(folder.path(), &[figures(2, 2, 1)]);
    assert_eq!(event_files(folder.path()).len(), 1, "nothing new, no file");
    live(folder.path(), &[figures(3, 3, 2)]);
    check(
        &transcript(folder.path()),
        expect![[r#"
            step 0 version brain.Event:2
            step 1 status 1
            step 1 record 1 loss/train=0.5
            step 2 record 2 loss/train=0.5

            step 0 version brain.Event:2
            step 3 status 1
            step 3 record 3 loss/train=0.5
        "#]],
    );
}

#[test]
fn steps_that_go_back_are_a_start() {
    let folder = folder();
    let back = [figures(1, 1, 1), figures(2, 2, 1), figures(3, 2, 2), figures(4, 3, 2)];
    let mut tracker = open(folder.path()).with_spec("a = 1");
    tracker.take(&back).unwrap();
    // What is behind this START takes the spec along.
    tracker.take(&[figures(5, 1, 3)]).unwrap();
    tracker.flush().unwrap();
    check(
        &transcript(folder.path()),
        expect![[r#"
            step 0 version brain.Event:2
            step 1 status 1
            step 1 run/spec="    a = 1\n"
            step 1 record 1 loss/train=0.5
            step 2 record 2 loss/train=0.5
            step 2 status 1
            step 2 record 3 loss/train=0.5
            step 3 record 4 loss/train=0.5
            step 1 status 1
            step 1 run/spec="    a = 1\n"
            step 1 record 5 loss/train=0.5
        "#]],
    );
}

#[test]
fn a_late_picture_purges_nothing() {
    let folder = folder();
    live(folder.path(), &[figures(1, 8, 1), figures(2, 9, 1)]);
    live(folder.path(), &[image(3, 8), figures(4, 10, 1), image(5, 9)]);
    check(
        &transcript(folder.path()),
        expect![[r#"
            step 0 version brain.Event:2
            step 8 status 1
            step 8 record 1 loss/train=0.5
            step 9 record 2 loss/train=0.5

            step 0 version brain.Event:2
            step 10 status 1
            step 8 record 3 reconstruction/0=4x2x3 4 bytes
            step 10 record 4 loss/train=0.5
            step 9 record 5 reconstruction/0=4x2x3 4 bytes
        "#]],
    );
}

#[test]
fn event_files_sort_by_their_lives() {
    let folder = folder();
    let mut expected = Vec::new();
    // Twice in a second, and with a clock that was put back.
    for (seq, now_ms) in [(1, NOW), (2, NOW), (3, NOW - 5000), (4, NOW + 60_000)] {
        let mut tracker = Tracker::open(folder.path(), now_ms).unwrap();
        tracker.take(&[figures(seq, seq, 1)]).unwrap();
        tracker.flush().unwrap();
        let files = event_files(folder.path());
        assert_eq!(files.len() as u64, seq);
        assert_eq!(files[..files.len() - 1], expected);
        expected = files;
    }
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_string();
    let seconds = |path: &PathBuf| name(path).split('.').nth(3).unwrap().to_string();
    let found: Vec<String> = expected.iter().map(seconds).collect();
    assert_eq!(found, ["1700000000", "1700000001", "1700000002", "1700000060"]);
    assert!(name(&expected[3]).ends_with(&format!(".{}.3", std::process::id())));
}

/// Returns what TensorBoard shows: pictures and losses by step, without what it is to forget.
fn shown(folder: &Path) -> (Vec<i64>, Vec<i64>) {
    let (mut pictures, mut losses): (Vec<i64>, Vec<i64>) = (Vec::new(), Vec::new());
    let mut n_starts = 0;
    for event in event_files(folder).iter().flat_map(|path| read_events(path).unwrap()) {
        if event.session_log.is_some() {
            n_starts += 1;
            if n_starts > 1 {
                pictures.retain(|step| *step < event.step);
                losses.retain(|step| *step < event.step);
            }
        }
        for value in event.summary.iter().flat_map(|summary| &summary.value) {
            if value.image.is_some() {
                pictures.push(event.step);
            } else if value.tag == "loss/train" {
                losses.push(event.step);
            }
        }
    }
    (pictures, losses)
}

#[test]
fn a_full_file_is_followed_by_another_and_nothing_is_forgotten() {
    let dir = folder();
    let mut tracker = open(dir.path());
    let mut seq = 0;
    let mut next = || {
        seq += 1;
        seq
    };
    for step in 1..=12 {
        // The picture of a step comes before its figures, and half a mebibyte of it.
        let mut picture = image(next(), step);
        if let Body::Image { png, .. } = &mut picture.body {
            png.resize(512 << 10, 0);
        }
        tracker.take(&[picture, figures(next(), step, 1)]).unwrap();
        tracker.flush().unwrap();
    }
    assert_eq!(event_files(dir.path()).len(), 2);
    let all: Vec<i64> = (1..=12).collect();
    assert_eq!(shown(dir.path()), (all.clone(), all.clone()));
    // Steps that go back are forgotten, over files too.
    tracker.take(&[figures(next(), 6, 2)]).unwrap();
    tracker.flush().unwrap();
    let (_, losses) = shown(dir.path());
    assert_eq!(losses, [1, 2, 3, 4, 5, 6]);
    drop(tracker);
    assert_eq!(open(dir.path()).last_seq(), seq);
}

#[test]
fn numbers_of_an_evaluation_are_a_file_of_their_own() {
    let dir = folder();
    let scalar = |step: u64, value: f64| (step, "eval/top1".to_string(), value);
    write_scalars(dir.path(), NOW, &[scalar(10, 0.5), scalar(20, 0.625)]).unwrap();
    write_scalars(dir.path(), NOW, &[scalar(20, 0.75)]).unwrap();
    check(
        &transcript(dir.path()),
        expect![[r#"
            step 0 version brain.Event:2
            step 10 eval/top1=0.5
            step 20 eval/top1=0.625

            step 0 version brain.Event:2
            step 20 eval/top1=0.75
        "#]],
    );
}

#[test]
fn feeding_again_changes_nothing() {
    let folder = folder();
    let records = [event(1, "a"), figures(2, 1, 1), image(3, 1), figures(4, 2, 1)];
    let mut tracker = open(folder.path());
    tracker.take(&records).unwrap();
    tracker.take(&records[1..]).unwrap();
    tracker.flush().unwrap();
    let files = [METRICS_FILE, EVENTS_FILE].map(|name| text_of(folder.path(), name));
    let shown = transcript(folder.path());
    drop(tracker);
    live(folder.path(), &records);
    assert_eq!([METRICS_FILE, EVENTS_FILE].map(|name| text_of(folder.path(), name)), files);
    assert_eq!(transcript(folder.path()), shown);
}

#[test]
fn torn_lines_are_cut_and_foreign_files_left() {
    let folder = folder();
    live(folder.path(), &[figures(1, 1, 1), figures(2, 2, 1)]);
    let metrics = folder.path().join(METRICS_FILE);
    let whole = text_of(folder.path(), METRICS_FILE);
    fs::write(&metrics, format!("{whole}{{\"seq\":3,\"at_")).unwrap();
    assert_eq!(open(folder.path()).last_seq(), 2);
    assert_eq!(text_of(folder.path(), METRICS_FILE), whole);

    for foreign in ["loss,lr\n".to_string(), "x".repeat(3 << 20)] {
        fs::write(&metrics, &foreign).unwrap();
        let error = Tracker::open(folder.path(), NOW).unwrap_err();
        assert!(matches!(&error, TrackError::Content { path, .. } if *path == metrics), "{error}");
        assert!(text_of(folder.path(), METRICS_FILE) == foreign);
    }
}

#[test]
fn lines_longer_than_a_block_are_read_back() {
    let folder = folder();
    let mut long = event(1, "long");
    if let Body::Event { kind, text, .. } = &mut long.body {
        // Each byte is escaped with six.
        (*kind, *text) = ("\u{1}".repeat(TEXT_BYTES_MAX), "\u{1}".repeat(2 * TEXT_BYTES_MAX));
    }
    let longest = [long.clone(), Record { seq: 2, ..long }];
    live(folder.path(), &longest);
    assert!(text_of(folder.path(), EVENTS_FILE).contains("…\"}\n"), "the text was shortened");
    assert_eq!(open(folder.path()).last_seq(), 2);
}

#[test]
fn memory_is_bounded_without_a_flush() {
    let folder = folder();
    let mut tracker = open(folder.path());
    for seq in 1..=4000 {
        tracker.take(&[figures(seq, seq, 1)]).unwrap();
    }
    let written = fs::metadata(folder.path().join(METRICS_FILE)).unwrap().len();
    assert!(written > 400_000, "{written}");
    // What is there is there in all files.
    drop(tracker);
    let last = open(folder.path()).last_seq();
    assert!(last > 2000 && last < 4000, "{last}");
}

#[test]
fn a_folder_has_one_tracker() {
    let folder = folder();
    let tracker = open(folder.path());
    let error = Tracker::open(folder.path(), NOW).unwrap_err();
    assert!(matches!(error, TrackError::Taken { .. }), "{error}");
    drop(tracker);
    open(folder.path());
}

#[test]
fn errors_name_the_file_and_nothing_more_is_taken() {
    let folder = folder();
    let metrics = folder.path().join(METRICS_FILE);
    std::os::unix::fs::symlink("/dev/full", &metrics).unwrap();
    let mut tracker = open(folder.path());
    tracker.take(&[figures(1, 1, 1)]).unwrap();
    let error = tracker.flush().unwrap_err();
    assert_eq!(error.to_string(), format!("failed to write `{}`", metrics.display()));
    let error = tracker.take(&[figures(2, 2, 1)]).unwrap_err();
    assert!(matches!(error, TrackError::Broken { .. }), "{error}");
    drop(tracker);

    // The device has room again: the record comes into the lines, and is not shown twice.
    fs::remove_file(&metrics).unwrap();
    live(folder.path(), &[figures(1, 1, 1), figures(2, 2, 1)]);
    assert_eq!(seqs(folder.path(), METRICS_FILE), [1, 2]);
    assert_eq!(crash::View::of(folder.path()).figures, [(1, 1), (2, 2)]);

    let error = Tracker::open(&metrics, NOW).unwrap_err();
    assert_eq!(error.to_string(), format!("failed to create `{}`", metrics.display()));
}
