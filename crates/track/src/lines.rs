//! `metrics.jsonl` and `events.jsonl`: one object a line.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{TrackError, at};

/// Longest line that is read back: above the longest that is written, two texts at their longest
/// (`TEXT_BYTES_MAX`) of which each byte was escaped with six.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Bytes of one read while looking backward.
const BLOCK_BYTES: u64 = 64 << 10;

/// What every line says first.
#[derive(Serialize)]
struct Numbered<'a, T> {
    seq: u64,
    /// The record before, where it is not the number before.
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<u64>,
    at_ms: u64,
    #[serde(flatten)]
    line: &'a T,
}

/// What is read back of a line.
#[derive(Deserialize)]
struct Stored {
    seq: u64,
    after: Option<u64>,
    tag: Option<serde::de::IgnoredAny>,
}

/// A line as far as its place among others goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Its record.
    pub seq: u64,
    /// The record that it followed on.
    pub after: u64,
    /// Whether it names a picture, which is TensorBoard's too.
    pub is_image: bool,
}

/// The place of a line among others.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// Its record.
    pub seq: u64,
    /// The record that it follows on.
    pub after: u64,
    /// When it was.
    pub at_ms: u64,
}

/// One file of lines, and what is to be appended to it.
pub(crate) struct Lines {
    path: PathBuf,
    file: File,
    buffer: Vec<u8>,
    /// Record of its last line, 0 before the first.
    pub last: u64,
}

impl Lines {
    /// Opens a file, or creates it, and cuts off a last line that is not whole.
    pub fn open(path: &Path) -> Result<Self, TrackError> {
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create(true).open(path);
        let file = file.map_err(at("open", path))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(TrackError::Taken { path: path.to_path_buf() });
            }
            // Some file systems have no locks; the lock is against mistakes alone.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        let mut lines = Lines { path: path.to_path_buf(), file, buffer: Vec::new(), last: 0 };
        lines.cut_torn()?;
        if let Some(line) = lines.backward()?.next_line()? {
            let Some(mark) = parse(&line) else {
                return Err(lines.content("its last line is not a numbered object".to_string()));
            };
            lines.last = mark.seq;
        }
        Ok(lines)
    }

    /// Takes a line, unless the file has it.
    pub fn push<T: Serialize>(&mut self, place: Place, line: &T) -> Result<(), TrackError> {
        let Place { seq, after, at_ms } = place;
        if seq <= self.last {
            return Ok(());
        }
        let after = (after + 1 != seq).then_some(after);
        serde_json::to_writer(&mut self.buffer, &Numbered { seq, after, at_ms, line })
            .map_err(|error| at("write", &self.path)(error.into()))?;
        self.buffer.push(b'\n');
        self.last = seq;
        Ok(())
    }

    /// Returns how many bytes wait.
    pub fn waiting(&self) -> usize {
        self.buffer.len()
    }

    /// Hands to the system what waits.
    pub fn write(&mut self) -> Result<(), TrackError> {
        self.file.write_all(&self.buffer).map_err(at("write", &self.path))?;
        self.buffer.clear();
        Ok(())
    }

    /// Returns a walk over the lines from the last to the first; of lines that cannot be read
    /// there is nothing to say.
    pub fn marks_backward(&self) -> Result<Marks<'_>, TrackError> {
        Ok(Marks(self.backward()?))
    }

    fn cut_torn(&mut self) -> Result<(), TrackError> {
        let bytes = self.file.metadata().map_err(at("read", &self.path))?.len();
        let mut walk = self.backward()?;
        // What is after the last line end, which may be nothing.
        let torn = walk.next_piece()?.len() as u64;
        if torn > 0 {
            self.file.set_len(bytes - torn).map_err(at("cut", &self.path))?;
        }
        Ok(())
    }

    fn backward(&self) -> Result<Backward<'_>, TrackError> {
        let before = self.file.metadata().map_err(at("read", &self.path))?.len();
        Ok(Backward { lines: self, before, held: Vec::new() })
    }

    fn content(&self, detail: String) -> TrackError {
        TrackError::Content { path: self.path.clone(), detail }
    }
}

fn parse(line: &[u8]) -> Option<Mark> {
    let Stored { seq, after, tag } = serde_json::from_slice(line).ok()?;
    Some(Mark { seq, after: after.unwrap_or(seq.saturating_sub(1)), is_image: tag.is_some() })
}

/// Reads a file from its end, a block at a time.
struct Backward<'a> {
    lines: &'a Lines,
    /// Bytes that were not read yet.
    before: u64,
    /// What was read and not returned yet; ends where a line does.
    held: Vec<u8>,
}

impl Backward<'_> {
    /// Returns the line before, or nothing at the beginning of the file.
    fn next_line(&mut self) -> Result<Option<Vec<u8>>, TrackError> {
        if self.held.is_empty() && self.before > 0 {
            self.read_block()?;
        }
        // The line's own end; the piece that follows keeps that of the line before.
        let Some(end) = self.held.pop() else { return Ok(None) };
        assert_eq!(end, b'\n', "a last line that was not whole is cut off");
        self.next_piece().map(Some)
    }

    /// Returns what is behind the line end before, which it keeps.
    fn next_piece(&mut self) -> Result<Vec<u8>, TrackError> {
        loop {
            if let Some(end) = self.held.iter().rposition(|byte| *byte == b'\n') {
                return Ok(self.held.split_off(end + 1));
            }
            if self.before == 0 {
                return Ok(std::mem::take(&mut self.held));
            }
            if self.held.len() > LINE_BYTES_MAX {
                let detail = format!("there is no line end in its last {} bytes", self.held.len());
                return Err(self.lines.content(detail));
            }
            self.read_block()?;
        }
    }

    fn read_block(&mut self) -> Result<(), TrackError> {
        let n = self.before.min(BLOCK_BYTES);
        let mut block = vec![0; n as usize];
        let mut file = &self.lines.file;
        file.seek(SeekFrom::Start(self.before - n))
            .and_then(|_| file.read_exact(&mut block))
            .map_err(at("read", &self.lines.path))?;
        block.append(&mut self.held);
        self.held = block;
        self.before -= n;
        Ok(())
    }
}

/// Walks over lines from the last to the first.
pub(crate) struct Marks<'a>(Backward<'a>);

impl Marks<'_> {
    /// Returns the line before.
    pub fn next_mark(&mut self) -> Result<Option<Mark>, TrackError> {
        while let Some(line) = self.0.next_line()? {
            if let Some(mark) = parse(&line) {
                return Ok(Some(mark));
            }
        }
        Ok(None)
    }
}
