//! From texts to a spec: inheritance, overrides, and the order in which layers are merged.

use std::collections::BTreeMap;
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::fields::{Mark, fields};
use crate::node::{self, At, Node, Source, Sources, Table, Value, find, merge};
use crate::presets;
use crate::problem::{Place, Problem, Problems, SpecError, echo};
use crate::run_spec::RunSpec;
use crate::syntax::{SyntaxError, SyntaxKind};
use crate::validate::{Reader, closest};

/// Largest accepted file: a spec has under a hundred keys, and a wrong path may name a data file.
pub const SPEC_BYTES_MAX: usize = 1 << 20;
/// Longest chain of `base`: deeper ones cannot be followed by a reader either.
pub const INHERITANCE_DEPTH_MAX: usize = 16;
/// Most `--set` overrides: more than one for every key means that a script went wrong.
pub const OVERRIDES_MAX: usize = 256;
/// Deepest key of an override; the deepest one known has three parts.
const KEY_PARTS_MAX: usize = 8;

/// Reads a text file; the caller's, since this crate does no I/O.
pub type ReadText<'a> = &'a dyn Fn(&Path) -> io::Result<String>;

/// A spec with the origin of each value.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The spec.
    pub spec: RunSpec,
    /// By key path: `file:line:column`, `preset:…`, `defaults` or `--set …`. Keys that follow
    /// from others are absent.
    pub origins: BTreeMap<&'static str, String>,
}

/// Reads the spec at `path`, and the files that it is based on, through `read`.
///
/// Relative paths in a file (`data.shards`, `data.cache.dir`, `checkpoint.to`, `track.tensorboard`,
/// `base`) start from
/// that file's folder; the result is relative to whatever `path` is.
/// [`RunSpec::resolve_paths`] deals with the others.
/// `overrides` are `key=value`, laid over everything; a value that is not TOML is a string.
///
/// # Errors
/// [`SpecError::Read`] if `path` cannot be read, else [`SpecError::Invalid`] with every problem.
pub fn parse_file(
    path: &Path,
    overrides: &[String],
    read: ReadText<'_>,
) -> Result<Loaded, SpecError> {
    let text = read(path).map_err(|source| SpecError::Read { path: path.to_path_buf(), source })?;
    let top = Document { name: path.display().to_string(), text, path: Some(path.to_path_buf()) };
    load(top, overrides, Some(read)).map_err(SpecError::Invalid)
}

/// Reads a spec from a text that is no file: `name` stands in messages, and `base` can only name a
/// preset.
///
/// # Errors
/// [`SpecError::Invalid`] with every problem.
pub fn parse_text(name: &str, text: &str, overrides: &[String]) -> Result<Loaded, SpecError> {
    let top = Document { name: name.to_string(), text: text.to_string(), path: None };
    load(top, overrides, None).map_err(SpecError::Invalid)
}

/// Validates a spec in the layout of [`RunSpec::to_json`]. It is whole, but for keys that are newer
/// than the build that wrote it: those that change no bit are filled in from the defaults.
pub fn from_json(value: &serde_json::Value) -> Result<RunSpec, Problems> {
    let mut sources = Sources::default();
    let source = sources.add(Source {
        name: "spec".to_string(),
        text: String::new(),
        has_lines: false,
        builtin: false,
        rank: 1,
    });
    let mut root = match node::from_json(value, source).value {
        Value::Table(root) => root,
        other => {
            let mut problems = Problems::default();
            problems.push(Problem {
                place: sources.place(At { source, offset: 0 }),
                key: String::new(),
                message: format!("a spec must be a table, not {}", other.describe()),
                fix: None,
            });
            return Err(problems);
        }
    };
    let text = presets::DEFAULTS.to_string();
    let name = "defaults".to_string();
    let source = sources.add(Source { name, text, has_lines: true, builtin: true, rank: 0 });
    let (defaults, _) = node::parse_toml(presets::DEFAULTS, source);
    for field in fields().iter().filter(|field| field.mark != Mark::Maths) {
        if let Some(default) = find(&defaults, field.path) {
            node::fill(&mut root, field.path, default);
        }
    }
    Reader::new(&root, &sources, Problems::default(), false, Vec::new()).stored().run_spec()
}

/// Joins a path that is relative and no address to `base`.
pub(crate) fn join(base: &Path, path: &str) -> String {
    if path.contains("://") || path.is_empty() {
        return path.to_string();
    }
    base.join(path).to_string_lossy().into_owned()
}

/// A text that may name its base.
struct Document {
    name: String,
    text: String,
    /// `None` for presets and texts that are no file.
    path: Option<PathBuf>,
}

struct Loader<'a> {
    sources: Sources,
    problems: Problems,
    /// Whether a part of the spec could not be read, so that missing keys mean nothing.
    partial: bool,
    /// Whether a header could not be read, so that keys may belong anywhere.
    opaque: bool,
    /// Errors of syntax: values on their lines are guesses.
    broken: Vec<Place>,
    read: Option<ReadText<'a>>,
}

fn load(
    top: Document,
    overrides: &[String],
    read: Option<ReadText<'_>>,
) -> Result<Loaded, Problems> {
    let mut loader = Loader {
        sources: Sources::default(),
        problems: Problems::default(),
        partial: false,
        opaque: false,
        broken: Vec::new(),
        read,
    };
    let mut layers = loader.chain(top);
    layers.push(loader.layer(
        Document { name: "defaults".to_string(), text: presets::DEFAULTS.to_string(), path: None },
        0,
    ));
    let mut root = Table::new();
    for layer in layers.into_iter().rev() {
        merge(&mut root, layer);
    }
    for layer in loader.overrides(overrides) {
        merge(&mut root, layer);
    }
    let Loader { sources, problems, partial, opaque, broken, .. } = loader;
    if opaque {
        return Err(problems.sorted());
    }
    let spec = Reader::new(&root, &sources, problems, partial, broken).run_spec()?;
    let origin = |path: &'static str| Some((path, origin(&sources, find(&root, path)?)));
    let origins = fields().iter().filter_map(|f| origin(f.path)).collect();
    Ok(Loaded { spec, origins })
}

/// Positions in built-in texts tell a user nothing, so those are only named.
fn origin(sources: &Sources, node: &Node) -> String {
    let source = sources.get(node.at);
    let text = match source.builtin {
        true => source.name.clone(),
        false => sources.place(node.key_at).to_string(),
    };
    text.replace(|c: char| c.is_control(), "?")
}

impl Loader<'_> {
    /// Parses a document and everything that it is based on, topmost first.
    fn chain(&mut self, top: Document) -> Vec<Table> {
        let mut seen: Vec<(PathBuf, String)> = Vec::new();
        let mut layers: Vec<Table> = Vec::new();
        let mut next = Some(top);
        while let Some(document) = next.take() {
            let path = document.path.clone();
            let identity = normalize(path.as_deref().unwrap_or(Path::new(&document.name)));
            seen.push((identity, document.name.clone()));
            let mut layer = self.layer(document, INHERITANCE_DEPTH_MAX + 1 - layers.len());
            if let Some(base) = layer.remove("base") {
                next = self.base(&base, path.as_deref(), &seen);
                self.partial |= next.is_none();
            }
            layers.push(layer);
        }
        layers
    }

    /// Parses one document.
    fn layer(&mut self, document: Document, rank: usize) -> Table {
        let Document { name, text, path } = document;
        let n_bytes = text.len();
        let too_large = n_bytes > SPEC_BYTES_MAX;
        let folder = path.map(|path| path.parent().map(Path::to_path_buf).unwrap_or_default());
        let text = if too_large { String::new() } else { text };
        let builtin = rank == 0 || (folder.is_none() && name.starts_with("preset:"));
        let source =
            self.sources.add(Source { name, text: text.clone(), has_lines: true, builtin, rank });
        if too_large {
            let message = format!("the file has {n_bytes} bytes, more than {SPEC_BYTES_MAX}");
            let fix = "name a run spec".to_string();
            self.problem(At { source, offset: 0 }, "", message, Some(fix));
            self.partial = true;
        }
        let (mut table, errors) = node::parse_toml(&text, source);
        for SyntaxError { offset, message, fix, kind } in errors {
            let at = At { source, offset };
            match kind {
                SyntaxKind::Duplicate => {}
                SyntaxKind::Line => {
                    self.partial = true;
                    self.broken.push(self.sources.place(at));
                }
                SyntaxKind::Header => self.opaque = true,
            }
            self.problem(at, "", message, fix);
        }
        if let Some(folder) = folder {
            root_path(&mut table, &["data", "shards"], &folder);
            root_path(&mut table, &["data", "cache", "dir"], &folder);
            root_path(&mut table, &["track", "tensorboard"], &folder);
            root_path(&mut table, &["task", "encoder"], &folder);
            root_path(&mut table, &["checkpoint", "to"], &folder);
        }
        table
    }

    /// Finds what a `base` names; `None` after reporting why not.
    fn base(
        &mut self,
        base: &Node,
        path: Option<&Path>,
        seen: &[(PathBuf, String)],
    ) -> Option<Document> {
        let Value::Text(name) = &base.value else {
            let message = format!("`base` must be a string, not {}", base.value.describe());
            let fix = "for example \"preset:demo\" or \"common.toml\"".to_string();
            return self.bad_base(base, message, Some(fix));
        };
        if let Some((message, fix)) = base_fault(name) {
            return self.bad_base(base, message, Some(fix));
        }
        let document = match name.strip_prefix("preset:") {
            Some(preset) => self.preset(base, preset)?,
            None => self.file(base, name, path, seen)?,
        };
        if seen.len() == INHERITANCE_DEPTH_MAX {
            let message = format!("`base` is nested more than {INHERITANCE_DEPTH_MAX} deep");
            let fix = "join some of these files".to_string();
            return self.bad_base(base, message, Some(fix));
        }
        Some(document)
    }

    fn preset(&mut self, base: &Node, name: &str) -> Option<Document> {
        let Some(preset) = presets::find(name) else {
            let message = format!("`base` names the unknown preset `{}`", echo(name));
            let fix = match closest(name, presets::names()) {
                Some(known) => meant_preset(known),
                None => {
                    let names: Vec<&str> = presets::names().collect();
                    format!("use one of {}", names.join(", "))
                }
            };
            return self.bad_base(base, message, Some(fix));
        };
        Some(Document {
            name: format!("preset:{}", preset.name),
            text: preset.text.to_string(),
            path: None,
        })
    }

    fn file(
        &mut self,
        base: &Node,
        name: &str,
        path: Option<&Path>,
        seen: &[(PathBuf, String)],
    ) -> Option<Document> {
        let preset = presets::find(name).map(|_| meant_preset(name));
        let (Some(path), Some(read)) = (path, self.read) else {
            let message =
                format!("`base` = `{}` is a path, and this text is not a file", echo(name));
            let fix = preset.unwrap_or("use `preset:NAME`".to_string());
            return self.bad_base(base, message, Some(fix));
        };
        let file = path.parent().unwrap_or(Path::new("")).join(name);
        let identity = normalize(&file);
        if let Some(first) = seen.iter().position(|(other, _)| *other == identity) {
            let names = seen[first..].iter().chain([&seen[first]]);
            let names: Vec<&str> = names.map(|(_, name)| name.as_str()).collect();
            let message = format!("`base` forms a cycle: {}", names.join(" -> "));
            let fix = "remove one of these `base` keys".to_string();
            return self.bad_base(base, message, Some(fix));
        }
        match read(&file) {
            Ok(text) => Some(Document { name: file.display().to_string(), text, path: Some(file) }),
            Err(error) => {
                let file = echo(&file.display().to_string());
                let message = format!("failed to read base `{file}`: {error}");
                let fix = preset.or_else(|| preset_file(name)).unwrap_or_else(|| {
                    let fix = match error.kind() {
                        io::ErrorKind::InvalidData => "save it as UTF-8",
                        io::ErrorKind::IsADirectory => "name a file in it",
                        io::ErrorKind::PermissionDenied => "make it readable",
                        _ => "give a path that starts from the folder of this file",
                    };
                    fix.to_string()
                });
                self.bad_base(base, message, Some(fix))
            }
        }
    }

    fn bad_base<T>(&mut self, base: &Node, message: String, fix: Option<String>) -> Option<T> {
        self.problem(base.at, "base", message, fix);
        None
    }

    fn problem(&mut self, at: At, key: &str, message: String, fix: Option<String>) {
        self.problems.push(Problem {
            place: self.sources.place(at),
            key: key.to_string(),
            message,
            fix,
        });
    }

    fn overrides(&mut self, overrides: &[String]) -> Vec<Table> {
        let mut layers: Vec<Table> = Vec::new();
        for (i, text) in overrides.iter().enumerate() {
            let key = text.split('=').next().unwrap_or_default().trim();
            let source = self.sources.add(Source {
                name: format!("--set {}", echo(key)),
                text: String::new(),
                has_lines: false,
                builtin: false,
                rank: INHERITANCE_DEPTH_MAX + 2 + i,
            });
            match parse_override(text, source) {
                _ if i == OVERRIDES_MAX => {
                    let message = format!("there are more than {OVERRIDES_MAX} overrides");
                    self.problem(At { source, offset: 0 }, key, message, None);
                    break;
                }
                Ok(layer) => layers.push(layer),
                Err(message) => {
                    self.problem(At { source, offset: 0 }, key, message.to_string(), None);
                }
            }
        }
        layers
    }
}

fn meant_preset(name: &str) -> String {
    format!("did you mean `preset:{name}`?")
}

/// Finds the preset that a file name such as `demo.toml` is meant to name.
fn preset_file(name: &str) -> Option<String> {
    let stem = Path::new(name).file_stem()?.to_str()?;
    presets::find(stem).map(|_| meant_preset(stem))
}

/// Says what is wrong with a base that is neither a preset nor a path.
fn base_fault(name: &str) -> Option<(String, String)> {
    let shown = echo(name);
    if name.trim().is_empty() {
        let fix = "name a preset or a file, or remove it".to_string();
        return Some(("`base` is empty".to_string(), fix));
    }
    if name.contains("://") {
        let fix = "copy it to a file and give its path".to_string();
        return Some((format!("`base` = `{shown}` is a URL, and only files are read"), fix));
    }
    let (prefix, preset) = name.split_once(':')?;
    if prefix == "preset" || closest(prefix.trim(), ["preset"].into_iter()).is_none() {
        return None;
    }
    let preset = presets::find(preset.trim()).map_or("demo", |preset| preset.name);
    Some((format!("`base` = `{shown}` names no preset"), meant_preset(preset)))
}

/// Parses `key=value`; the value is TOML, or else a string as it stands.
fn parse_override(text: &str, source: usize) -> Result<Table, &'static str> {
    let Some((key, value)) = text.split_once('=') else {
        return Err("an override must be key=value");
    };
    let (key, value) = (key.trim(), value.trim());
    let is_part = |part: &str| {
        let is_key = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
        !part.is_empty() && part.bytes().all(is_key)
    };
    if !key.split('.').all(is_part) || key.split('.').count() > KEY_PARTS_MAX {
        return Err("an override's key must be a path such as train.batch");
    }
    if key.split('.').next() == Some("base") {
        return Err("`base` cannot be overridden: it must stand in the file");
    }
    let (table, errors) = node::parse_toml(&format!("{key} = {value}"), source);
    if errors.is_empty() && !value.contains('\n') {
        return Ok(table);
    }
    let at = At { source, offset: 0 };
    let mut value = Value::Text(value.to_string());
    let mut parts: Vec<&str> = key.split('.').collect();
    let first = parts.remove(0);
    for part in parts.into_iter().rev() {
        value = Value::Table(Table::from([(part.to_string(), located(value, at))]));
    }
    Ok(Table::from([(first.to_string(), located(value, at))]))
}

fn located(value: Value, at: At) -> Node {
    let key_at = at;
    Node { value, at, key_at }
}

/// Makes a relative path that a file wrote start from the file's folder.
fn root_path(table: &mut Table, keys: &[&str], folder: &Path) {
    let [key, rest @ ..] = keys else { return };
    match table.get_mut(*key).map(|node| &mut node.value) {
        Some(Value::Table(inner)) => root_path(inner, rest, folder),
        Some(Value::Text(path)) if rest.is_empty() => *path = join(folder, path),
        _ => {}
    }
}

/// Resolves `.` and `..` by the text alone, so that one file has one name.
fn normalize(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir if out.file_name().is_some() => {
                out.pop();
            }
            _ => out.push(part),
        }
    }
    out
}

#[cfg(test)]
mod tests;
