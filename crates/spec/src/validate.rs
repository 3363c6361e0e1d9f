//! Merged layers to a [`RunSpec`]: typed reading of keys, unknown keys, and what to write instead.

mod build;

use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::fields::{Field, fields};
use crate::node::{At, Node, Sources, Table, Value, find};
use crate::problem::{Place, Problem, Problems, echo};
use crate::run_spec::RunSpec;
use crate::units::UnitError;

/// Longest accepted path, in bytes: PATH_MAX of Linux.
const PATH_BYTES_MAX: usize = 4096;

/// Keys that are planned: refused until they do something, because ignoring them would mislead.
const NOT_YET: &[&str] = &["checkpoint.keep.best", "track.reconstructions", "track.tensorboard"];

/// Words of planned values, refused like [`NOT_YET`].
const NOT_YET_WORDS: &[&str] = &["zero-weight"];

/// What other training programs call our keys.
const FOREIGN_NAMES: &[(&str, &str)] = &[
    ("accum_iter", "train.slot_batch"),
    ("batch_size", "train.batch"),
    ("blr", "optim.base_lr"),
    ("data_path", "data.shards"),
    ("decoder_embed_dim", "model.decoder_width"),
    ("decoder_num_heads", "model.decoder_heads"),
    ("embed_dim", "model.width"),
    ("epochs", "train.duration"),
    ("global_batch_size", "train.batch"),
    ("image_size", "model.img_size"),
    ("in_chans", "model.channels"),
    ("input_size", "model.img_size"),
    ("learning_rate", "optim.base_lr"),
    ("lr", "optim.base_lr"),
    ("max_steps", "train.duration"),
    ("micro_batch", "train.slot_batch"),
    ("num_heads", "model.heads"),
    ("num_workers", "data.threads"),
    ("output_dir", "checkpoint.to"),
    ("steps", "train.duration"),
    ("warmup_epochs", "optim.warmup"),
    ("warmup_steps", "optim.warmup"),
    ("world_size", "elastic.workers"),
];

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
        Reader { root, sources, problems, partial, broken }
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
                        self.problem(node.at, &path, message, None);
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
            let fix = suggest(parent, key).map(|known| format!("did you mean `{known}`?"));
            self.problem(node.key_at, &path, format!("unknown key `{shown}`"), fix);
        }
    }

    /// Looks a key up; reports one that is missing.
    fn required(&mut self, path: &str) -> Option<&'a Node> {
        let node = find(self.root, path);
        if node.is_none() && !self.partial {
            let section = path.split('.').next().unwrap_or(path);
            let header = self.root.get(section).map(|node| node.key_at);
            let user = |at: &At| !self.sources.get(*at).builtin;
            let at = header.filter(user).unwrap_or(self.sources.top());
            // A table of the wrong type was reported as such.
            let is_table = |node: &Node| matches!(node.value, Value::Table(_));
            let above = path.match_indices('.').map(|(end, _)| &path[..end]);
            if { above }.all(|table| find(self.root, table).is_none_or(is_table)) {
                let example = fields().iter().find(|field| field.path == path);
                let fix = example.map(how_to_add);
                self.problem(at, path, format!("missing key `{path}`"), fix);
            }
        }
        node
    }

    fn wrong<T>(&mut self, node: &Node, path: &str, wanted: &str) -> Option<T> {
        let message = format!("`{path}` must be {wanted}, not {}", node.value.describe());
        self.problem(node.at, path, message, None);
        None
    }

    fn integer_in(&mut self, node: &Node, path: &str, range: RangeInclusive<u64>) -> Option<u64> {
        let (min, max) = (*range.start(), *range.end());
        let wanted = match &node.value {
            Value::Integer(n) => match u64::try_from(*n) {
                Ok(n) if range.contains(&n) => return Some(n),
                _ if *n < i128::from(min) => format!("at least {min}"),
                _ => format!("at most {max}"),
            },
            Value::Huge(_) => format!("at most {max}"),
            _ => "a whole number".to_string(),
        };
        self.wrong(node, path, &wanted)
    }

    fn integer(&mut self, path: &str, range: RangeInclusive<u64>) -> Option<u64> {
        let node = self.required(path)?;
        self.integer_in(node, path, range)
    }

    fn count(&mut self, path: &str, range: RangeInclusive<u32>) -> Option<u32> {
        let range = u64::from(*range.start())..=u64::from(*range.end());
        let n = self.integer(path, range)?;
        Some(u32::try_from(n).expect("the range is one of u32"))
    }

    fn float_in(
        &mut self,
        node: &Node,
        path: &str,
        accepts: fn(f64) -> bool,
        wanted: &str,
    ) -> Option<f64> {
        let x = match &node.value {
            // Beyond 2^53 an integer is no exact float; no key takes such a number.
            Value::Integer(n) => *n as f64,
            Value::Float(x) => *x,
            _ => f64::NAN,
        };
        if x.is_finite() && accepts(x) {
            // Adding zero turns -0.0 into 0.0: the two are one value with two texts.
            return Some(x + 0.0);
        }
        self.wrong(node, path, &format!("a number {wanted}"))
    }

    fn float(&mut self, path: &str, accepts: fn(f64) -> bool, wanted: &str) -> Option<f64> {
        let node = self.required(path)?;
        self.float_in(node, path, accepts, wanted)
    }

    fn floats(&mut self, path: &str, accepts: fn(f64) -> bool, wanted: &str) -> Option<Vec<f64>> {
        let node = self.required(path)?;
        let Value::Array(list) = &node.value else {
            return self.wrong(node, path, &format!("an array of numbers {wanted}"));
        };
        let read = list.iter().map(|item| self.float_in(item, path, accepts, wanted));
        let read: Vec<Option<f64>> = read.collect();
        read.into_iter().collect()
    }

    /// Reads two numbers, a lower and an upper end.
    fn range(&mut self, path: &str, accepts: fn(f64) -> bool, wanted: &str) -> Option<[f64; 2]> {
        let pair = self.pair(path, accepts, wanted)?;
        if pair[0] <= pair[1] {
            return Some(pair);
        }
        let message = format!("`{path}` = [{:?}, {:?}] is empty", pair[0], pair[1]);
        let fix = "write the smaller number first".to_string();
        self.problem_among(&[path], message, Some(fix));
        None
    }

    fn pair(&mut self, path: &str, accepts: fn(f64) -> bool, wanted: &str) -> Option<[f64; 2]> {
        let list = self.floats(path, accepts, wanted)?;
        match <[f64; 2]>::try_from(list) {
            Ok(pair) => Some(pair),
            Err(list) => {
                let message = format!("`{path}` must have 2 numbers, not {}", list.len());
                self.problem_among(&[path], message, None);
                None
            }
        }
    }

    fn boolean(&mut self, path: &str) -> Option<bool> {
        let node = self.required(path)?;
        match node.value {
            Value::Bool(b) => Some(b),
            _ => self.wrong(node, path, "true or false"),
        }
    }

    fn text(&mut self, path: &str) -> Option<&'a str> {
        let node = self.required(path)?;
        match &node.value {
            Value::Text(text) => Some(text),
            _ => self.wrong(node, path, "a string"),
        }
    }

    /// Reads a path of a local file or folder.
    fn path(&mut self, path: &str) -> Option<String> {
        self.place(path, &[])
    }

    /// Reads a folder, or a URL of one of these schemes.
    fn place(&mut self, path: &str, schemes: &[&str]) -> Option<String> {
        let text = self.text(path)?;
        let message = if text.trim().is_empty() {
            format!("`{path}` is empty")
        } else if text.len() > PATH_BYTES_MAX {
            format!("`{path}` has {} bytes, more than {PATH_BYTES_MAX}", text.len())
        } else if text.chars().any(char::is_control) {
            format!("`{path}` = `{}` holds control characters", echo(text))
        } else if let Some((scheme, _)) = text.split_once("://")
            && !schemes.contains(&scheme)
        {
            format!("`{path}`: storage `{}://` {UNAVAILABLE}", echo(scheme))
        } else {
            return Some(text.to_string());
        };
        let fix = match schemes {
            [] => "give a folder".to_string(),
            _ => format!("give a folder, or a URL of {}", quoted(schemes)),
        };
        self.problem_among(&[path], message, Some(fix));
        None
    }

    /// Reads one of a closed set of words.
    fn word<T: Copy>(&mut self, path: &str, all: &[(&'static str, T)]) -> Option<T> {
        let text = self.text(path)?;
        if let Some((_, value)) = all.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        let words: Vec<&str> = all.iter().map(|(word, _)| *word).collect();
        let (message, fix) = if NOT_YET_WORDS.contains(&text) {
            let message = format!("`{path}` = \"{text}\" {UNAVAILABLE}");
            (message, format!("use {}", quoted(&words)))
        } else {
            let message = format!("`{path}` = \"{}\" is unknown", echo(text));
            match closest(text, words.iter().copied()) {
                Some(word) => (message, format!("did you mean \"{word}\"?")),
                None => (message, format!("use {}", quoted(&words))),
            }
        };
        self.problem_among(&[path], message, Some(fix));
        None
    }

    fn quantity<T: FromStr<Err = UnitError>>(&mut self, path: &str) -> Option<T> {
        let node = self.required(path)?;
        self.quantity_in(node, path)
    }

    fn quantity_in<T: FromStr<Err = UnitError>>(&mut self, node: &Node, path: &str) -> Option<T> {
        let example = || {
            let field = fields().iter().find(|field| field.path == path);
            field.map_or("a string with a unit", |field| field.example)
        };
        let Value::Text(text) = &node.value else {
            let wanted = format!("a string with a unit such as {}", example());
            return self.wrong(node, path, &wanted);
        };
        match text.parse() {
            Ok(quantity) => Some(quantity),
            Err(error) => {
                let error: UnitError = error;
                let message = format!("`{path}` = \"{}\" {error}", echo(text));
                let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
                let fix = error.suggestion();
                let fix = fix.map(|unit| format!("did you mean \"{}{unit}\"?", echo(digits)));
                self.problem(node.at, path, message, fix);
                None
            }
        }
    }
}

fn is_table(path: &str) -> bool {
    let inside = |field: &Field| {
        let rest = field.path.strip_prefix(path);
        rest.is_some_and(|rest| rest.starts_with('.'))
    };
    fields().iter().any(inside)
}

fn how_to_add(field: &Field) -> String {
    let (section, example) = (field.section(), field.example);
    let key = field.path.split_once('.').map_or(field.path, |(_, key)| key);
    match section {
        "" => format!("add `{key} = {example}` at the top"),
        _ => format!("add `{key} = {example}` to [{section}]"),
    }
}

fn quoted(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
    words.join(" or ")
}

/// Slips that a suggestion bridges: one in a short word, a third of the letters in a long one.
fn slips_max(word: &str) -> usize {
    (word.chars().count() / 3).max(1)
}

/// Returns the closest of the `known` words, if one is close.
pub(crate) fn closest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // Distances cost length squared; nothing that long resembles a key.
    if word.len() > 64 {
        return None;
    }
    let distance = |known: &&str| strsim::damerau_levenshtein(word, known);
    let best = known.min_by_key(distance)?;
    (distance(&best) <= slips_max(word)).then_some(best)
}

/// Finds the key that was meant: in the same table first, then in others.
fn suggest(parent: &str, key: &str) -> Option<&'static str> {
    let last = |path: &'static str| path.rsplit('.').next().unwrap_or(path);
    let paths = || fields().iter().map(|field| field.path);
    let sections = || fields().iter().map(Field::section).filter(|name| !name.is_empty());
    let siblings = paths().filter(|path| path.rsplit_once('.').map_or("", |(p, _)| p) == parent);
    let find = |word: &str, paths: &mut dyn Iterator<Item = &'static str>| {
        let paths: Vec<&'static str> = paths.collect();
        let best = closest(word, paths.iter().map(|path| last(path)))?;
        paths.into_iter().find(|path| last(path) == best)
    };
    if let Some(path) = find(key, &mut { siblings }) {
        return Some(path);
    }
    if parent.is_empty()
        && let Some(section) = closest(key, sections().chain(["base"]))
    {
        return Some(section);
    }
    let foreign = FOREIGN_NAMES.iter().find(|(name, _)| *name == key);
    if let Some((_, path)) = foreign {
        return Some(path);
    }
    find(key, &mut paths().chain(["base"]))
}

#[cfg(test)]
mod tests;
