//! The table of fields: what each key means and whether it changes a run's result; digests and
//! differences are made from it.

mod kind;
mod table;

use std::fmt;

use serde_json::Value;

use crate::node::{self, find};
use crate::presets;
use crate::run_spec::{DEADLINE_SECONDS, RECONSTRUCTIONS, RunSpec};
use crate::validate::task::usual_of_finetuning;

pub use kind::{CADENCES_MAX, Interval, Kind};
use table::FIELDS;
pub(crate) use table::{SCHEMA, WORKERS_MAX};

/// What changing a field does to a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// The result changes: a resume must name the field to be allowed to change it.
    Maths,
    /// Only where, when and how fast the work is done changes.
    Placement,
    /// Only what people see changes.
    Display,
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mark::Maths => "maths",
            Mark::Placement => "placement",
            Mark::Display => "display",
        })
    }
}

/// One key of a spec.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Dotted path, `train.batch`.
    pub path: &'static str,
    /// What changing it does.
    pub mark: Mark,
    /// What values it takes.
    pub kind: Kind,
    /// Meaning, unit and range: a fragment.
    pub doc: &'static str,
    /// A value that is accepted, as TOML.
    pub example: &'static str,
}

/// What holds where neither a spec nor its base says anything.
#[derive(Clone, Debug, PartialEq)]
pub enum DefaultValue {
    /// Nothing: the key must be written.
    Required,
    /// What the key is about is not done.
    Unset,
    /// That value.
    Value(Value),
    /// A value that follows from another key, in words.
    Follows(String),
}

impl Field {
    /// Returns the section, empty for `schema` and `name`.
    pub fn section(&self) -> &'static str {
        self.path.split_once('.').map_or("", |(section, _)| section)
    }

    /// Returns the key inside its section, `keep.last`.
    pub fn key(&self) -> &'static str {
        self.path.split_once('.').map_or(self.path, |(_, key)| key)
    }

    /// Returns the value that the key has where it is not written.
    pub fn default(&self) -> DefaultValue {
        match self.path {
            "data.lanes" => DefaultValue::Follows(
                "the largest power of two up to 256 that divides `train.batch`".to_string(),
            ),
            "task.pool" => DefaultValue::Follows("`avg` to fine-tune, `cls` to probe".to_string()),
            "task.optimizer" => {
                DefaultValue::Follows("`adamw` to fine-tune, `lars` to probe".to_string())
            }
            "data.deadline_seconds" => DefaultValue::Value(DEADLINE_SECONDS.into()),
            "data.cache.mode" => DefaultValue::Value("auto".into()),
            "data.cache.dir"
            | "data.cache.size"
            | "checkpoint.keep.every"
            | "track.tensorboard"
            | "track.reconstructions.every"
            | "task.kind"
            | "task.encoder"
            | "task.ema"
            | "task.classes" => DefaultValue::Unset,
            "track.reconstructions.images" => DefaultValue::Value(RECONSTRUCTIONS.into()),
            path if path.starts_with("task.") => {
                let usual = usual_of_finetuning(path).expect("all others are above");
                DefaultValue::Follows(format!("`{usual:?}` to fine-tune"))
            }
            path => {
                let (defaults, _) = node::parse_toml(presets::DEFAULTS, 0);
                let value = find(&defaults, path).and_then(|node| node.value.to_json());
                value.map_or(DefaultValue::Required, DefaultValue::Value)
            }
        }
    }
}

/// Returns every key, section by section, in the order in which specs are printed.
pub fn fields() -> &'static [Field] {
    FIELDS
}

/// Returns the entry of a key that this crate itself names.
pub(crate) fn field(path: &str) -> &'static Field {
    FIELDS.iter().find(|field| field.path == path).expect("the table has every key")
}

/// A key whose values differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldDiff {
    /// Dotted path.
    pub path: &'static str,
    /// The first spec's value as TOML; `unset` where there is none.
    pub old: String,
    /// The second spec's value.
    pub new: String,
    /// What the difference does to a run.
    pub mark: Mark,
}

impl fmt::Display for FieldDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FieldDiff { path, old, new, mark } = self;
        write!(f, "{path}: {old} -> {new} [{mark}]")
    }
}

/// Lists the fields in which two specs differ, in the order of [`fields`].
pub fn diff(old: &RunSpec, new: &RunSpec) -> Vec<FieldDiff> {
    let (old, new) = (old.to_json(), new.to_json());
    let differs = |field: &Field| {
        let text = |spec| lookup(spec, field.path).map_or("unset".to_string(), to_toml);
        let (old, new) = (text(&old), text(&new));
        let (path, mark) = (field.path, field.mark);
        (old != new).then_some(FieldDiff { path, old, new, mark })
    };
    FIELDS.iter().filter_map(differs).collect()
}

impl RunSpec {
    /// Returns the BLAKE3 of every field's canonical JSON: two specs are one when these agree.
    pub fn digest(&self) -> blake3::Hash {
        blake3::hash(self.canonical_json().as_bytes())
    }

    /// Returns the BLAKE3 of the canonical JSON of the fields marked [`Mark::Maths`]: on the same
    /// data, runs whose digests agree have the same result.
    pub fn maths_digest(&self) -> blake3::Hash {
        let json = self.to_json();
        let mut text = String::from("{");
        let mut paths: Vec<&Field> = FIELDS.iter().filter(|f| f.mark == Mark::Maths).collect();
        paths.sort_by_key(|field| field.path);
        for field in paths {
            if let Some(value) = lookup(&json, field.path) {
                push_member(&mut text, field.path, value);
            }
        }
        text.push('}');
        blake3::hash(text.as_bytes())
    }

    /// Returns the spec as JSON without spaces and with sorted keys: one text for one spec.
    pub fn canonical_json(&self) -> String {
        let mut text = String::new();
        push_canonical(&mut text, &self.to_json());
        text
    }
}

/// Returns the value at a dotted path of the effective spec.
pub(crate) fn lookup<'a>(spec: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(spec, |value, key| value.get(key))
}

/// Prints a value of the effective spec as TOML: JSON's text is also TOML's, but for spaces.
pub(crate) fn to_toml(value: &Value) -> String {
    match value {
        Value::Array(list) => {
            let items: Vec<String> = list.iter().map(to_toml).collect();
            format!("[{}]", items.join(", "))
        }
        Value::String(text) => toml_string(text),
        _ => value.to_string(),
    }
}

/// JSON's escapes are TOML's too, except that TOML also forbids a bare DEL.
fn toml_string(text: &str) -> String {
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// Sorts by itself: the order of `serde_json`'s own maps depends on how the whole program is built.
fn push_canonical(out: &mut String, value: &Value) {
    match value {
        Value::Object(map) => {
            let mut keys: Vec<&String> = map.keys().collect();
            keys.sort();
            out.push('{');
            for key in keys {
                push_member(out, key, &map[key]);
            }
            out.push('}');
        }
        Value::Array(list) => {
            out.push('[');
            for (i, item) in list.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                push_canonical(out, item);
            }
            out.push(']');
        }
        _ => out.push_str(&value.to_string()),
    }
}

fn push_member(out: &mut String, key: &str, value: &Value) {
    if !out.ends_with('{') {
        out.push(',');
    }
    out.push_str(&Value::from(key).to_string());
    out.push(':');
    push_canonical(out, value);
}

#[cfg(test)]
mod tests;
