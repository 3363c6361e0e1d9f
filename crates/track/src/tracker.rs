//! One run's files.

use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use crate::board::{Board, Picture};
use crate::error::{TrackError, at};
use crate::lines::{Lines, Mark, Place};
use crate::record::{Body, Figures, Record, shortened};

/// Figures, one object a line.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// Events and the names of pictures, one object a line.
pub const EVENTS_FILE: &str = "events.jsonl";

/// A tracker writes when it holds more than this: enough that a write costs little beside what it
/// writes, and little memory where there are many runs.
const WAITING_BYTES_MAX: usize = 256 << 10;

/// Writes the files of one run.
///
/// Whatever way the process ends, opening the folder again and feeding all records after
/// [`Tracker::last_seq`] leaves every record in its files once. Feeding more than that does no
/// harm. What was taken and not flushed is not in the files; dropping a tracker does not flush.
///
/// Holds at most 256 KiB and one record. After an error nothing more is taken: open the folder
/// again.
pub struct Tracker {
    folder: PathBuf,
    board: Board,
    metrics: Lines,
    events: Lines,
    last: u64,
    broken: bool,
}

impl std::fmt::Debug for Tracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tracker({}, seq {})", self.folder.display(), self.last)
    }
}

impl Tracker {
    /// Opens a run's folder, which it creates, and finds out how far its files got.
    ///
    /// `now_ms` is the time in milliseconds since the Unix epoch, for a file's name.
    ///
    /// # Errors
    /// [`TrackError`], with [`TrackError::Taken`] where another tracker has it open.
    pub fn open(folder: &Path, now_ms: u64) -> Result<Self, TrackError> {
        std::fs::create_dir_all(folder).map_err(at("create", folder))?;
        // The lock of lines comes first: what it protects are all files.
        let events = Lines::open(&folder.join(EVENTS_FILE))?;
        let metrics = Lines::open(&folder.join(METRICS_FILE))?;
        let board = Board::open(folder, now_ms)?;
        let last = complete_to(&board, &metrics, &events)?;
        let folder = folder.to_path_buf();
        Ok(Tracker { folder, board, metrics, events, last, broken: false })
    }

    /// Has TensorBoard show the run's spec, as text, beside the first record that is taken.
    #[must_use]
    pub fn with_spec(mut self, spec: &str) -> Self {
        self.board.set_spec(spec);
        self
    }

    /// Returns the highest number up to which no record is missing, 0 before the first. What was
    /// taken counts, flushed or not.
    pub fn last_seq(&self) -> u64 {
        self.last
    }

    /// Takes records in the order of their numbers; those up to [`Tracker::last_seq`] are ignored.
    ///
    /// # Errors
    /// [`TrackError`] if files had to be written and could not be.
    pub fn take(&mut self, records: &[Record]) -> Result<(), TrackError> {
        self.guarded(|tracker| records.iter().try_for_each(|record| tracker.take_one(record)))
    }

    /// Hands everything that was taken to the system: it survives the end of this process.
    ///
    /// # Errors
    /// [`TrackError`] if a file cannot be written.
    pub fn flush(&mut self) -> Result<(), TrackError> {
        self.guarded(Tracker::write)
    }

    fn guarded(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<(), TrackError>,
    ) -> Result<(), TrackError> {
        if self.broken {
            return Err(TrackError::Broken { folder: self.folder.clone() });
        }
        let done = work(self);
        self.broken = done.is_err();
        done
    }

    fn take_one(&mut self, record: &Record) -> Result<(), TrackError> {
        let Record { seq, at_ms, ref body } = *record;
        if seq <= self.last {
            return Ok(());
        }
        let place = Place { seq, after: self.last, at_ms };
        match body {
            Body::Figures(figures) => {
                self.board.push_figures(seq, at_ms, figures);
                self.metrics.push(place, &FiguresLine::from(figures))?;
            }
            Body::Event { kind, warning, text } => {
                let (kind, text) = (&*shortened(kind), &*shortened(text));
                self.events.push(place, &EventLine { kind, warning: *warning, text })?;
            }
            Body::Image { tag, step, png, width, height, channels } => {
                let (step, shape) = (*step, [*width, *height, *channels]);
                self.board.push_picture(seq, at_ms, Picture { tag, step, png, shape });
                let tag = &*shortened(tag);
                self.events.push(place, &ImageLine { kind: "image", tag, step })?;
            }
        }
        self.last = seq;
        let waiting = self.board.waiting() + self.metrics.waiting() + self.events.waiting();
        if waiting > WAITING_BYTES_MAX { self.write() } else { Ok(()) }
    }

    /// TensorBoard's files come first: a record that has its line is shown, too.
    fn write(&mut self) -> Result<(), TrackError> {
        self.board.write(WAITING_BYTES_MAX)?;
        self.metrics.write()?;
        self.events.write()
    }
}

/// Returns the highest number up to which no file lacks a record, if all that files lost is at
/// their ends.
fn complete_to(board: &Board, metrics: &Lines, events: &Lines) -> Result<u64, TrackError> {
    let (behind, ahead) =
        if metrics.last < events.last { (metrics, events) } else { (events, metrics) };
    let lines = unbroken_to(behind.last, ahead)?;
    let pictures = last_picture_after(board.last, events)?;
    let shown = metrics.last.max(pictures.unwrap_or(0));
    // Events are not shown, so TensorBoard's files may end earlier and lack nothing.
    Ok(if shown > board.last { lines.min(board.last) } else { lines })
}

/// Returns up to where the lines of a file follow on each other and on `floor`, where the other
/// file ends: what does not follow is behind a record that the other file lost.
fn unbroken_to(floor: u64, ahead: &Lines) -> Result<u64, TrackError> {
    let mut unbroken = ahead.last.max(floor);
    let mut marks = ahead.marks_backward()?;
    let mut behind: Option<Mark> = None;
    loop {
        let mark = marks.next_mark()?.filter(|mark| mark.seq > floor);
        let seq = mark.map_or(floor, |mark| mark.seq);
        if behind.is_some_and(|behind| behind.after != seq) {
            unbroken = seq;
        }
        if mark.is_none() {
            return Ok(unbroken);
        }
        behind = mark;
    }
}

fn last_picture_after(floor: u64, events: &Lines) -> Result<Option<u64>, TrackError> {
    let mut marks = events.marks_backward()?;
    while let Some(mark) = marks.next_mark()?.filter(|mark| mark.seq > floor) {
        if mark.is_image {
            return Ok(Some(mark.seq));
        }
    }
    Ok(None)
}

/// A line of `metrics.jsonl`. What is not finite is null, as JSON has no such numbers.
#[derive(Serialize)]
struct FiguresLine {
    step: u64,
    generation: u64,
    loss: f64,
    lr: f64,
    grad_norm: f64,
    images_per_second: f64,
    data_wait: f64,
    skipped: u64,
    redone: u64,
    memory_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    mfu: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<Hex>,
}

impl From<&Figures> for FiguresLine {
    fn from(figures: &Figures) -> Self {
        FiguresLine {
            step: figures.step,
            generation: figures.generation,
            loss: figures.loss,
            lr: figures.lr,
            grad_norm: figures.grad_norm,
            images_per_second: figures.images_per_second,
            data_wait: figures.data_wait,
            skipped: figures.skipped,
            redone: figures.redone,
            memory_bytes: figures.memory_bytes,
            mfu: figures.mfu,
            digest: figures.digest.map(Hex),
        }
    }
}

/// 16 hexadecimal digits.
struct Hex(u64);

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:016x}", self.0))
    }
}

/// A line of `events.jsonl` for an event.
#[derive(Serialize)]
struct EventLine<'a> {
    kind: &'a str,
    warning: bool,
    text: &'a str,
}

/// A line of `events.jsonl` for a picture.
#[derive(Serialize)]
struct ImageLine<'a> {
    kind: &'a str,
    tag: &'a str,
    step: u64,
}
