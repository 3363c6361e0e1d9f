//! What can be wrong with a spec, and where.

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;

/// Most problems that one report lists; more would hide the first ones, and a hostile file could
/// otherwise make a report larger than itself.
pub const PROBLEMS_MAX: usize = 100;

/// Longest piece of a user's text that a message repeats, in characters.
const ECHO_CHARS_MAX: usize = 60;

/// A position in a text: lines and columns are 1-based, columns count characters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// File as the caller named it, `preset:…`, or `--set …`.
    pub file: String,
    /// Line; 0 where the source has no lines (an override, JSON).
    pub line: usize,
    /// Column; 0 where `line` is.
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { file, line, column } = self;
        match line {
            0 => write!(f, "{file}"),
            _ => write!(f, "{file}:{line}:{column}"),
        }
    }
}

/// One thing that is wrong with a spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where it was written; for a missing key, the section that should hold it.
    pub place: Place,
    /// Key path, `train.batch`; empty for an error of syntax.
    pub key: String,
    /// What is wrong: a lowercase fragment that names the key.
    pub message: String,
    /// What to do about it, where that is known.
    pub fix: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)?;
        match &self.fix {
            Some(fix) => write!(f, ", {fix}"),
            None => Ok(()),
        }
    }
}

/// Every problem of a spec, in the order of the text; never empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems {
    list: Vec<Problem>,
    n_left_out: usize,
}

impl Problems {
    /// Returns the problems that are listed.
    pub fn as_slice(&self) -> &[Problem] {
        &self.list
    }

    /// Returns the number of problems, with those beyond [`PROBLEMS_MAX`].
    pub fn count(&self) -> usize {
        self.list.len() + self.n_left_out
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(crate) fn push(&mut self, problem: Problem) {
        if self.list.contains(&problem) {
            return;
        }
        if self.list.len() == PROBLEMS_MAX {
            self.n_left_out += 1;
        } else {
            self.list.push(problem);
        }
    }

    /// Sorts by place inside each file and keeps the order in which files were first named.
    pub(crate) fn sorted(mut self) -> Self {
        let mut files: Vec<String> = Vec::new();
        for problem in &self.list {
            if !files.contains(&problem.place.file) {
                files.push(problem.place.file.clone());
            }
        }
        self.list.sort_by_key(|problem| {
            let file = files.iter().position(|file| *file == problem.place.file);
            (file, problem.place.line, problem.place.column)
        });
        self
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.list.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{problem}")?;
        }
        match self.n_left_out {
            0 => Ok(()),
            n => write!(f, "\nand {n} more"),
        }
    }
}

/// A spec that cannot be used. No run was created and nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The spec file could not be read; a base that cannot be read is a [`Problem`] instead.
    #[error("failed to read spec `{path}`")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The text was read and something in it is wrong.
    #[error("{0}")]
    Invalid(Problems),
}

/// Returns a user's text, shortened, without control characters and passwords, for a message.
pub(crate) fn echo(text: &str) -> String {
    let text: &str = &without_user(text);
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == ECHO_CHARS_MAX {
            out.push_str("...");
            break;
        }
        match c.is_control() {
            true => out.extend(c.escape_debug()),
            false => out.push(c),
        }
    }
    out
}

/// Replaces what stands between `://` and `@`.
fn without_user(text: &str) -> Cow<'_, str> {
    let Some((scheme, rest)) = text.split_once("://") else { return text.into() };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    match authority.rsplit_once('@') {
        Some((user, _)) => format!("{scheme}://...{}", &rest[user.len()..]).into(),
        None => text.into(),
    }
}
