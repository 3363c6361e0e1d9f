//! TensorBoard's files.
//!
//! TensorBoard reads the event files of a folder in the order of their names and does not go back
//! to one that it left, so each life begins a file of its own. An event that says START makes it
//! forget everything from its step on: one is written where a life begins and where steps go back.
//! The very first START of a folder counts for nothing there, so the first life has one, too.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{TrackError, at};
use crate::frame::{EventReader, push_event};
use crate::message::{
    CLASS_TENSOR, Event, Image, PluginData, SESSION_START, SessionLog, Summary, SummaryMetadata,
    TYPE_STRING, Tensor, TensorDim, TensorShape, Value,
};
use crate::record::{Figures, shortened};

/// What the names of event files begin with.
const PREFIX: &str = "events.out.tfevents.";

/// A file with more than this is followed by another: what copies files copies whole ones.
const FILE_BYTES: u64 = 4 << 20;

/// The version of the format, by which TensorBoard decides that START counts.
const FILE_VERSION: &str = "brain.Event:2";

/// What earlier lives left.
#[derive(Default)]
struct Found {
    /// Event files.
    n_files: usize,
    /// Highest number in their names.
    newest_seconds: Option<u64>,
    /// Highest record that they hold, 0 for none.
    seq: u64,
    /// Step of the last figures.
    figures_step: Option<u64>,
    /// Highest step of anything.
    step_max: Option<u64>,
}

/// Event files of one folder, and what is to be appended to the newest.
pub(crate) struct Board {
    /// Of the file of this life, which is created when there is something to write.
    path: PathBuf,
    file: Option<File>,
    /// Bytes of that file, and the numbers in its name that order it.
    bytes: u64,
    numbers: (u64, usize),
    /// Whether the file's first events were taken.
    begun: bool,
    /// Whether the file follows on a full one of this life.
    follows: bool,
    buffer: Vec<u8>,
    found: Found,
    spec: Option<String>,
    /// Step beside which this file says it.
    spec_step: Option<u64>,
    /// Record of the last event, 0 before the first.
    pub last: u64,
}

/// A picture to show.
#[derive(Clone, Copy)]
pub(crate) struct Picture<'a> {
    /// Name of its row.
    pub tag: &'a str,
    /// Its step.
    pub step: u64,
    /// PNG.
    pub png: &'a [u8],
    /// Width, height, channels.
    pub shape: [u32; 3],
}

/// Where an event stands.
#[derive(Clone, Copy)]
struct Stamp {
    seq: u64,
    at_ms: u64,
    step: u64,
}

impl Board {
    /// Looks at the files of earlier lives.
    pub fn open(folder: &Path, now_ms: u64) -> Result<Self, TrackError> {
        let found = look(folder)?;
        let after_newest = found.newest_seconds.map_or(0, |seconds| seconds.saturating_add(1));
        let seconds = after_newest.max(now_ms / 1000);
        let numbers = (seconds, found.n_files);
        let last = found.seq;
        Ok(Board {
            path: folder.join(file_name(numbers)),
            file: None,
            bytes: 0,
            numbers,
            begun: false,
            follows: false,
            buffer: Vec::new(),
            found,
            spec: None,
            spec_step: None,
            last,
        })
    }

    /// Has the file say the spec too.
    pub fn set_spec(&mut self, spec: &str) {
        self.spec = Some(shortened(spec).into_owned());
    }

    /// Takes figures, unless the files have them.
    pub fn push_figures(&mut self, seq: u64, at_ms: u64, figures: &Figures) {
        if seq <= self.last {
            return;
        }
        let stamp = Stamp { seq, at_ms, step: figures.step };
        let goes_back = self.found.figures_step.is_some_and(|before| figures.step <= before);
        if !self.begun {
            let forgets = goes_back || !self.follows;
            self.begin(if forgets { stamp } else { self.behind_all(stamp) });
        } else if goes_back {
            self.start(stamp);
        }
        self.found.figures_step = Some(figures.step);
        self.push_summary(stamp, scalars(figures));
    }

    /// Takes a picture, unless the files have it.
    ///
    /// Pictures may come late, so one from before the last figures does not mean that steps go
    /// back.
    pub fn push_picture(&mut self, seq: u64, at_ms: u64, picture: Picture<'_>) {
        if seq <= self.last {
            return;
        }
        let stamp = Stamp { seq, at_ms, step: picture.step };
        if !self.begun {
            self.begin(self.behind_all(stamp));
        }
        let [width, height, channels] = picture.shape.map(|n| i32::try_from(n).unwrap_or(i32::MAX));
        let image = Image {
            height,
            width,
            colorspace: channels,
            encoded_image_string: picture.png.to_vec(),
        };
        let tag = shortened(picture.tag).into_owned();
        self.push_summary(stamp, vec![Value { tag, image: Some(image), ..Value::default() }]);
    }

    /// Returns how many bytes wait.
    pub fn waiting(&self) -> usize {
        self.buffer.len()
    }

    /// Hands to the system what waits, and gives back what memory a large picture took.
    pub fn write(&mut self, keep_bytes: usize) -> Result<(), TrackError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let new = OpenOptions::new().write(true).create_new(true).open(&self.path);
                none.insert(new.map_err(at("create", &self.path))?)
            }
        };
        file.write_all(&self.buffer).map_err(at("write", &self.path))?;
        self.bytes += self.buffer.len() as u64;
        self.buffer.clear();
        self.buffer.shrink_to(keep_bytes);
        if self.bytes > FILE_BYTES {
            self.go_on_in_another();
        }
        Ok(())
    }

    /// Has the next events begin a file of their own.
    fn go_on_in_another(&mut self) {
        self.numbers = (self.numbers.0 + 1, self.numbers.1 + 1);
        self.path.set_file_name(file_name(self.numbers));
        (self.file, self.bytes) = (None, 0);
        (self.begun, self.follows) = (false, true);
    }

    /// Returns a stamp behind everything: what is there stays when readers forget from there on, as
    /// nothing of it will be fed again.
    fn behind_all(&self, stamp: Stamp) -> Stamp {
        let step = self.found.step_max.map_or(stamp.step, |step| step.saturating_add(1));
        Stamp { step, ..stamp }
    }

    /// Takes the first events of a file; figures or a picture follow.
    fn begin(&mut self, stamp: Stamp) {
        self.begun = true;
        let file_version = Some(FILE_VERSION.to_string());
        let first = Stamp { step: 0, ..stamp };
        self.push(first, Event { file_version, ..Event::default() });
        self.start(stamp);
    }

    /// Has readers forget everything from a step on, and says the spec again if that goes, too.
    fn start(&mut self, stamp: Stamp) {
        let session_log = Some(SessionLog { status: SESSION_START });
        self.push(stamp, Event { session_log, ..Event::default() });
        let is_shown = self.spec_step.is_some_and(|step| step < stamp.step);
        if let Some(spec) = self.spec.as_ref().filter(|_| !is_shown) {
            let summary = Some(Summary { value: vec![text("run/spec", spec)] });
            self.push(stamp, Event { summary, ..Event::default() });
            self.spec_step = Some(stamp.step);
        }
    }

    fn push_summary(&mut self, stamp: Stamp, value: Vec<Value>) {
        let Stamp { seq, step, .. } = stamp;
        self.push(stamp, Event { seq, summary: Some(Summary { value }), ..Event::default() });
        self.found.step_max = self.found.step_max.max(Some(step));
        self.last = seq;
    }

    fn push(&mut self, stamp: Stamp, event: Event) {
        let wall_time = stamp.at_ms as f64 / 1000.0;
        let step = i64::try_from(stamp.step).unwrap_or(i64::MAX);
        push_event(&mut self.buffer, &Event { wall_time, step, ..event });
    }
}

/// Writes numbers as a file of their own that TensorBoard reads after those that are there:
/// `scalars` are steps, names and values, ascending by step. Earlier files keep what they say.
/// `now_ms` is the time in milliseconds since the Unix epoch. Returns the file.
///
/// # Errors
/// [`TrackError`] where the folder or the file cannot be written.
pub fn write_scalars(
    folder: &Path,
    now_ms: u64,
    scalars: &[(u64, String, f64)],
) -> Result<PathBuf, TrackError> {
    std::fs::create_dir_all(folder).map_err(at("create", folder))?;
    let mut board = Board::open(folder, now_ms)?;
    for (step, tag, value) in scalars {
        let stamp = Stamp { seq: 0, at_ms: now_ms, step: *step };
        if !board.begun {
            board.begun = true;
            let file_version = Some(FILE_VERSION.to_string());
            board.push(Stamp { step: 0, ..stamp }, Event { file_version, ..Event::default() });
        }
        let simple_value = Some(*value as f32);
        let value = Value { tag: tag.clone(), simple_value, ..Value::default() };
        let summary = Some(Summary { value: vec![value] });
        board.push(stamp, Event { summary, ..Event::default() });
    }
    board.write(0)?;
    Ok(board.path)
}

/// Names a file by what orders it: a time in seconds, and how many there were before.
fn file_name((seconds, n_before): (u64, usize)) -> String {
    let (host, pid) = (host_name(), std::process::id());
    format!("{PREFIX}{seconds:010}.{host}.{pid}.{n_before}")
}

fn scalars(figures: &Figures) -> Vec<Value> {
    let values = [
        ("loss/train", figures.loss),
        ("optim/lr", figures.lr),
        ("optim/grad_norm", figures.grad_norm),
        ("speed/images_per_second", figures.images_per_second),
        ("speed/data_wait", figures.data_wait),
        ("run/generation", figures.generation as f64),
    ];
    let scalar = |(tag, value): (&str, f64)| Value {
        tag: tag.to_string(),
        simple_value: Some(value as f32),
        ..Value::default()
    };
    let memory =
        (figures.memory_bytes > 0).then_some(figures.memory_bytes as f64 / (1 << 30) as f64);
    let known = [("speed/memory_gib", memory), ("speed/mfu", figures.mfu)];
    let known = known.into_iter().filter_map(|(tag, value)| Some((tag, value?)));
    values.into_iter().chain(known).map(scalar).collect()
}

/// Returns a text for TensorBoard's page of texts, which is Markdown: indented, it is shown as is.
fn text(tag: &str, text: &str) -> Value {
    let shown: String = text.lines().map(|line| format!("    {line}\n")).collect();
    let plugin_data = PluginData { plugin_name: "text".to_string(), content: Vec::new() };
    let metadata = SummaryMetadata { plugin_data: Some(plugin_data), data_class: CLASS_TENSOR };
    let tensor = Tensor {
        dtype: TYPE_STRING,
        tensor_shape: Some(TensorShape { dim: vec![TensorDim { size: 1 }] }),
        string_val: vec![shown.into_bytes()],
    };
    Value {
        tag: tag.to_string(),
        tensor: Some(tensor),
        metadata: Some(metadata),
        ..Value::default()
    }
}

/// Returns the machine's name as far as a file's name can carry it.
fn host_name() -> String {
    let uname = rustix::system::uname();
    let kept = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' };
    let name: String = uname.nodename().to_string_lossy().chars().map(kept).collect();
    if name.is_empty() { "lacuna".to_string() } else { name }
}

/// Looks at the event files of a folder, from the newest back to one that holds figures.
fn look(folder: &Path) -> Result<Found, TrackError> {
    let names = event_files(folder)?;
    let newest_seconds = names.iter().filter_map(|name| seconds_of(name)).max();
    let mut found = Found { n_files: names.len(), newest_seconds, ..Found::default() };
    for name in names.iter().rev() {
        let older = read_back(&folder.join(name))?;
        found.seq = found.seq.max(older.seq);
        found.step_max = found.step_max.max(older.step_max);
        found.figures_step = older.figures_step;
        if found.figures_step.is_some() {
            break;
        }
    }
    Ok(found)
}

/// Returns what one file holds.
fn read_back(path: &Path) -> Result<Found, TrackError> {
    let mut reader = EventReader::open(path)?;
    let mut found = Found::default();
    while let Some(event) = reader.next_event()? {
        let step = u64::try_from(event.step).unwrap_or(0);
        let Some(summary) = event.summary.filter(|_| event.seq > 0) else { continue };
        found.seq = found.seq.max(event.seq);
        found.step_max = found.step_max.max(Some(step));
        if summary.value.iter().any(|value| value.simple_value.is_some()) {
            found.figures_step = Some(step);
        }
    }
    Ok(found)
}

/// Returns the names of a folder's event files in the order in which TensorBoard reads them.
fn event_files(folder: &Path) -> Result<Vec<String>, TrackError> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(at("list", folder))? {
        let name = entry.map_err(at("list", folder))?.file_name();
        if let Ok(name) = name.into_string()
            && name.starts_with(PREFIX)
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn seconds_of(name: &str) -> Option<u64> {
    name.strip_prefix(PREFIX)?.split('.').next()?.parse().ok()
}
