//! Writes a short run into a folder, for `scripts/track_test.py`: `track_sample FOLDER RECORDS`.
//!
//! The run has 20 steps, loses its worker, falls back to step 15 and goes on to step 32. One call
//! feeds the first RECORDS records; what the folder has is left as it is. Prints `last_seq` before
//! and after.

use std::path::Path;
use std::process::ExitCode;

use lacuna_track::{Body, Figures, Record, TrackError, Tracker};

/// One gray pixel.
const PNG: &[u8] = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\0\0\0\0\x3a\x7e\x9b\x55\
    \0\0\0\nIDAT\x78\x9c\x63\x68\0\0\0\x82\0\x81\x77\xcd\x72\xb6\0\0\0\0IEND\xae\x42\x60\x82";

/// When the run began, in milliseconds since the Unix epoch.
const BEGAN_MS: u64 = 1_700_000_000_000;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, n_records] = arguments.as_slice() else {
        eprintln!("usage: track_sample FOLDER RECORDS");
        return ExitCode::from(64);
    };
    let Ok(n_records) = n_records.parse::<usize>() else {
        eprintln!("`{n_records}` is not a number of records");
        return ExitCode::from(64);
    };
    match write(Path::new(folder), n_records) {
        Ok((before, after)) => println!("{before} {after}"),
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn write(folder: &Path, n_records: usize) -> Result<(u64, u64), TrackError> {
    let mut history = history();
    history.truncate(n_records);
    let mut tracker = Tracker::open(folder, BEGAN_MS)?.with_spec("name = \"sample\"\n");
    let before = tracker.last_seq();
    tracker.take(&history)?;
    tracker.flush()?;
    Ok((before, tracker.last_seq()))
}

/// Records 1 to 43, of which 1 to 24 are the first generation's.
fn history() -> Vec<Record> {
    let mut bodies: Vec<Body> = vec![event("formed", false, "generation 1")];
    for (generation, steps) in [(1, 1..=20), (2, 16..=32)] {
        for step in steps {
            bodies.push(Body::Figures(figures(step, generation)));
            if step.is_multiple_of(10) {
                bodies.push(picture(step));
            }
        }
        if generation == 1 {
            bodies.push(event("fell_back", true, "the state of step 15 is the newest"));
        }
    }
    let record = |(seq, body)| Record { seq, at_ms: BEGAN_MS + 1000 * seq, body };
    (1..).zip(bodies).map(record).collect()
}

fn event(kind: &str, warning: bool, text: &str) -> Body {
    Body::Event { kind: kind.to_string(), warning, text: text.to_string() }
}

fn figures(step: u64, generation: u64) -> Figures {
    Figures {
        step,
        generation,
        loss: 1.0 / step as f64,
        lr: 1e-4,
        grad_norm: 2.0,
        images_per_second: 100.0,
        data_wait: 0.25,
        skipped: 0,
        redone: 0,
        digest: step.is_multiple_of(10).then_some(step),
        memory_bytes: 1 << 30,
        mfu: None,
    }
}

fn picture(step: u64) -> Body {
    let (tag, png) = ("reconstruction/0".to_string(), PNG.to_vec());
    Body::Image { tag, step, png, width: 1, height: 1, channels: 1 }
}
