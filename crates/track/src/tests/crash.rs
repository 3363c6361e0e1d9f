//! Ends that are torn off, at every byte.

use std::fs::{self, OpenOptions};
use std::path::Path;

use super::*;

/// What TensorBoard shows of a folder: (record, step) of figures and pictures.
#[derive(Debug, Default, PartialEq)]
pub(super) struct View {
    pub figures: Vec<(u64, i64)>,
    pub pictures: Vec<(u64, i64)>,
    pub is_started: bool,
}

impl View {
    /// Reads event files as TensorBoard does: in order, and forgetting at each START.
    pub fn of(folder: &Path) -> Self {
        let mut view = View::default();
        for path in event_files(folder) {
            for event in read_events(&path).unwrap() {
                view.add(&event);
            }
        }
        view
    }

    fn add(&mut self, event: &Event) {
        // The very first does nothing.
        if event.session_log.is_some() && std::mem::replace(&mut self.is_started, true) {
            self.figures.retain(|(_, step)| *step < event.step);
            self.pictures.retain(|(_, step)| *step < event.step);
        }
        if event.seq > 0 {
            let is_picture = event.summary.as_ref().unwrap().value[0].image.is_some();
            let list = if is_picture { &mut self.pictures } else { &mut self.figures };
            list.push((event.seq, event.step));
        }
    }
}

/// A run that falls back twice, and leaves out some numbers.
fn history() -> Vec<Record> {
    vec![
        event(1, "created"),
        figures(2, 1, 1),
        figures(3, 2, 1),
        image(4, 2),
        event(5, "lost"),
        figures(9, 2, 2),
        figures(10, 3, 2),
        event(11, "lost"),
        event(12, "formed"),
        figures(13, 4, 3),
        image(14, 3),
        figures(20, 5, 3),
        image(21, 5),
        event(22, "fell back"),
        figures(23, 4, 4),
        figures(24, 5, 4),
        event(25, "ended"),
    ]
}

fn expected() -> View {
    // The fall back to step 4 takes the picture of step 5 along.
    let figures = vec![(2, 1), (9, 2), (10, 3), (23, 4), (24, 5)];
    View { figures, pictures: vec![(14, 3)], is_started: true }
}

fn assert_whole(folder: &Path, context: &str) {
    let all = history();
    let in_metrics = |record: &&Record| matches!(record.body, Body::Figures(_));
    let wanted: Vec<u64> = all.iter().filter(in_metrics).map(|record| record.seq).collect();
    assert_eq!(seqs(folder, METRICS_FILE), wanted, "{context}");
    let others = all.iter().filter(|record| !in_metrics(record)).map(|record| record.seq);
    assert_eq!(seqs(folder, EVENTS_FILE), others.collect::<Vec<u64>>(), "{context}");
    assert_eq!(View::of(folder), expected(), "{context}");
}

/// Opens a damaged folder and feeds what it asks for; returns what it had.
fn mend(folder: &Path) -> u64 {
    let mut tracker = open(folder);
    let last = tracker.last_seq();
    let asked = history().into_iter().filter(|record| record.seq > last);
    tracker.take(&asked.collect::<Vec<Record>>()).unwrap();
    tracker.flush().unwrap();
    last
}

/// The files of a whole history, written in the given lives.
fn files_of(lives: &[usize]) -> Vec<(String, Vec<u8>)> {
    let folder = folder();
    for n in lives {
        live(folder.path(), &history()[..*n]);
    }
    assert_eq!(lives.last(), Some(&history().len()));
    assert_whole(folder.path(), "undisturbed");
    let paths = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_string();
    let mut files: Vec<(String, Vec<u8>)> =
        paths.map(|path| (name(&path), fs::read(&path).unwrap())).collect();
    files.sort();
    files
}

fn put(folder: &Path, files: &[(String, Vec<u8>)]) {
    for entry in fs::read_dir(folder).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    for (name, bytes) in files {
        fs::write(folder.join(name), bytes).unwrap();
    }
}

fn cut(folder: &Path, name: &str, bytes: usize) {
    let file = OpenOptions::new().write(true).open(folder.join(name)).unwrap();
    file.set_len(bytes as u64).unwrap();
}

#[test]
fn any_file_may_lose_any_end() {
    let work = folder();
    // Of several lives' event files only the newest has an end that a crash can tear off.
    for lives in [vec![17], vec![6, 12, 17]] {
        let files = files_of(&lives);
        let newest = files.iter().rposition(|(name, _)| name.contains("tfevents")).unwrap();
        for (idx, (name, bytes)) in files.iter().enumerate() {
            if name.contains("tfevents") && idx != newest {
                continue;
            }
            for kept in 0..bytes.len() {
                put(work.path(), &files);
                cut(work.path(), name, kept);
                mend(work.path());
                assert_whole(work.path(), &format!("{name} cut at {kept}"));
            }
        }
    }
}

#[test]
fn all_files_may_lose_their_ends_together_and_again() {
    let work = folder();
    let files = files_of(&[17]);
    let mut state = 1_u64;
    let mut draw = |below: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for round in 0..400 {
        put(work.path(), &files);
        for crash in 0..3 {
            let newest = event_files(work.path()).pop().unwrap();
            let newest = newest.file_name().unwrap().to_str().unwrap();
            for name in [METRICS_FILE, EVENTS_FILE, newest] {
                let bytes = fs::metadata(work.path().join(name)).unwrap().len() as usize;
                cut(work.path(), name, draw(bytes + 1));
            }
            mend(work.path());
            assert_whole(work.path(), &format!("round {round}, crash {crash}"));
        }
    }
}

#[test]
fn a_process_may_end_at_any_record() {
    let all = history();
    for flushed in 0..all.len() {
        for taken in flushed..all.len() {
            let work = folder();
            let mut tracker = open(work.path());
            tracker.take(&all[..flushed]).unwrap();
            tracker.flush().unwrap();
            tracker.take(&all[flushed..taken]).unwrap();
            drop(tracker);
            let last = mend(work.path());
            let wanted = flushed.checked_sub(1).map_or(0, |idx| all[idx].seq);
            assert_eq!(last, wanted, "flushed {flushed}, taken {taken}");
            assert_whole(work.path(), &format!("flushed {flushed}, taken {taken}"));
        }
    }
}

#[test]
fn a_file_that_was_deleted_is_written_again() {
    let work = folder();
    let files = files_of(&[17]);
    for (name, _) in &files {
        put(work.path(), &files);
        fs::remove_file(work.path().join(name)).unwrap();
        mend(work.path());
        assert_whole(work.path(), name);
    }
}

#[test]
fn what_is_whole_is_asked_for_no_more() {
    let work = folder();
    // Where one file is far behind the other, and where the last record is in either.
    for n in 0..=history().len() {
        put(work.path(), &[]);
        live(work.path(), &history()[..n]);
        let wanted = n.checked_sub(1).map_or(0, |idx| history()[idx].seq);
        assert_eq!(open(work.path()).last_seq(), wanted, "{n}");
    }
}
