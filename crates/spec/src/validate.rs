//! Merged layers to a [`RunSpec`]: typed reading of keys, unknown keys, and what to write instead.

mod build;
mod locations;
mod read;
mod suggest;
pub(crate) mod task;
mod track;

use crate::fields::{Field, fields};
use crate::node::{At, Node, Sources, Table, Value, find};
use crate::problem::{Place, Problem, Problems, echo};
use crate::run_spec::RunSpec;

pub(crate) use suggest::closest;

/// Keys that are planned: refused until they do something, because ignoring them would mislead.
const NOT_YET: &[&str] = &["checkpoint.keep.best"];

const UNAVAILABLE: &str = "is not available in this build yet";

/// Reads keys from merged layers and collects what is wrong.
pub(crate) struct Reader<'a> {
    root: &'a Table,
    sources: &'a Sources,
    problems: Problems,
    /// Whether a layer is missing, so that a missing key means nothing.
    partial: bool,
    /// Errors of syntax: values on their lines are guesses.
    broken: Vec<Place>,
    /// Whether a run has the spec already: paths were made whole, and may hold anything.
    stored: bool,
}

impl<'a> Reader<'a> {
    /// Takes the layers and what was found wrong while they were read; `broken` are the places of
    /// errors of syntax.
    pub(crate) fn new(
        root: &'a Table,
        sources: &'a Sources,
        problems: Problems,
        partial: bool,
        broken: Vec<Place>,
    ) -> Self {
        Reader { root, sources, problems, partial, broken, stored: false }
    }

    /// Says that what is read was written by this program.
    pub(crate) fn stored(self) -> Self {
        Reader { stored: true, ..self }
    }

    /// Reads everything; every problem of every key is reported.
    pub(crate) fn run_spec(mut self) -> Result<RunSpec, Problems> {
        self.unknown_keys(self.root, "");
        let spec = self.build();
        match spec {
            Some(spec) if self.problems.is_empty() => Ok(spec),
            _ => {
                assert!(!self.problems.is_empty(), "a missing value was reported");
                Err(self.problems.sorted())
            }
        }
    }

    fn problem(&mut self, at: At, key: &str, message: String, fix: Option<String>) {
        let place = self.sources.place(at);
        let same_line = |other: &Place| other.file == place.file && other.line == place.line;
        if self.broken.iter().any(same_line) {
            return;
        }
        self.problems.push(Problem { place, key: key.to_string(), message, fix });
    }

    /// Reports a problem that several keys share where the user wrote the last of them.
    fn problem_among(&mut self, paths: &[&str], message: String, fix: Option<String>) {
        let rank = |node: &&Node| (self.sources.get(node.at).rank, node.at.offset);
        let nodes = paths.iter().filter_map(|path| find(self.root, path));
        if let Some(node) = nodes.max_by_key(rank) {
            self.problem(node.at, paths[0], message, fix);
        }
    }

    fn unknown_keys(&mut self, table: &Table, parent: &str) {
        for (key, node) in table {
            let path = match parent {
                "" => key.clone(),
                _ => format!("{parent}.{key}"),
            };
            if fields().iter().any(|field| field.path == path) {
                continue;
            }
            if is_table(&path) {
                match &node.value {
                    Value::Table(table) => self.unknown_keys(table, &path),
                    other => {
                        let message = format!("`{path}` must be a table, not {}", other.describe());
                        let fix = suggest::how_to_nest(&path);
                        self.problem(node.at, &path, message, Some(fix));
                    }
                }
                continue;
            }
            let shown = echo(&path);
            if NOT_YET.contains(&path.as_str()) {
                let message = format!("`{shown}` {UNAVAILABLE}");
                self.problem(node.key_at, &path, message, Some("remove it".to_string()));
                continue;
            }
            let is_base = suggest::is_base(parent, key);
            // Without its base a spec lacks keys that it was not meant to write.
            self.partial |= is_base && find(self.root, "model.img_size").is_none();
            let fix = suggest::instead_of(parent, key);
            self.problem(node.key_at, &path, format!("unknown key `{shown}`"), Some(fix));
        }
    }

    /// Looks a key up; reports one that is missing.
    fn required(&mut self, path: &str) -> Option<&'a Node> {
        let node = find(self.root, path);
        if node.is_none() && !self.partial {
            let above = path.match_indices('.').map(|(end, _)| &path[..end]);
            let headers = above.clone().filter_map(|table| find(self.root, table));
            let user = |at: &At| !self.sources.get(*at).builtin;
            let at = headers.map(|node| node.key_at).rfind(user).unwrap_or(self.sources.top());
            // A table of the wrong type was reported as such.
            let is_table = |node: &Node| matches!(node.value, Value::Table(_));
            if { above }.all(|table| find(self.root, table).is_none_or(is_table)) {
                let example = fields().iter().find(|field| field.path == path);
                let fix = example.map(suggest::how_to_add);
                self.problem(at, path, format!("missing key `{path}`"), fix);
            }
        }
        node
    }
}

/// Tells whether keys of the table of fields lie below `path`.
fn is_table(path: &str) -> bool {
    let inside = |field: &Field| {
        let rest = field.path.strip_prefix(path);
        rest.is_some_and(|rest| rest.starts_with('.'))
    };
    fields().iter().any(inside)
}

#[cfg(test)]
mod tests;
