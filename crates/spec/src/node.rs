//! Values that remember where they were written: what all layers of a spec become before merging.

use std::collections::BTreeMap;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::problem::{Place, echo};
use crate::syntax::{self, SyntaxError};

/// A place in one of the sources.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    pub(crate) source: usize,
    pub(crate) offset: usize,
}

/// A text that values came from.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) text: String,
    /// False where positions mean nothing to a user (an override, JSON).
    pub(crate) has_lines: bool,
    /// Whether the text is part of this program.
    pub(crate) builtin: bool,
    /// Layers of higher rank lie above: the user's own words are blamed before a preset's.
    pub(crate) rank: usize,
}

/// All texts of one spec.
#[derive(Debug, Default)]
pub(crate) struct Sources(Vec<Source>);

impl Sources {
    pub(crate) fn add(&mut self, source: Source) -> usize {
        self.0.push(source);
        self.0.len() - 1
    }

    pub(crate) fn get(&self, at: At) -> &Source {
        &self.0[at.source]
    }

    /// Returns the start of the user's own text.
    pub(crate) fn top(&self) -> At {
        At { source: 0, offset: 0 }
    }

    pub(crate) fn place(&self, at: At) -> Place {
        let source = self.get(at);
        let bytes = source.text.as_bytes();
        let file = source.name.clone();
        if !source.has_lines {
            return Place { file, line: 0, column: 0 };
        }
        let before = &bytes[..at.offset.min(bytes.len())];
        let line_start = before.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
        // Bytes 0b10xx_xxxx continue a character.
        let is_start = |b: &&u8| **b & 0xc0 != 0x80;
        Place {
            file,
            line: before.iter().filter(|b| **b == b'\n').count() + 1,
            column: before[line_start..].iter().filter(is_start).count() + 1,
        }
    }
}

/// A table of a spec, by key.
pub(crate) type Table = BTreeMap<String, Node>;

/// A value with its place.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) value: Value,
    /// Where the value starts.
    pub(crate) at: At,
    /// Where its key starts.
    pub(crate) key_at: At,
}

/// What TOML and JSON have in common, and TOML's dates, which no key takes.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    Text(String),
    Integer(i128),
    Float(f64),
    /// Digits of a number that no type here holds.
    Huge(String),
    Bool(bool),
    Date(String),
    Null,
    Array(Vec<Node>),
    Table(Table),
}

impl Value {
    /// Names the type, with its article, and shows the value where it is short.
    pub(crate) fn describe(&self) -> String {
        match self {
            Value::Text(text) => format!("the string \"{}\"", echo(text)),
            Value::Integer(n) => format!("the integer {n}"),
            Value::Float(x) => format!("the float {x:?}"),
            Value::Huge(digits) => format!("the number {}", echo(digits)),
            Value::Bool(b) => format!("the boolean {b}"),
            Value::Date(date) => format!("the date {}", echo(date)),
            Value::Null => "null".to_string(),
            Value::Array(list) => format!("an array of {}", list.len()),
            Value::Table(_) => "a table".to_string(),
        }
    }

    /// Returns a value that no key of a table is inside; `None` for others.
    pub(crate) fn to_json(&self) -> Option<serde_json::Value> {
        Some(match self {
            Value::Text(text) => text.as_str().into(),
            Value::Integer(n) => i64::try_from(*n).ok()?.into(),
            Value::Float(x) => (*x).into(),
            Value::Bool(b) => (*b).into(),
            Value::Array(list) => {
                let items = list.iter().map(|item| item.value.to_json());
                items.collect::<Option<Vec<serde_json::Value>>>()?.into()
            }
            Value::Huge(_) | Value::Date(_) | Value::Null | Value::Table(_) => return None,
        })
    }
}

/// Parses TOML text; returns what could be understood, and the first error of each line.
pub(crate) fn parse_toml(text: &str, source: usize) -> (Table, Vec<SyntaxError>) {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut out: Vec<SyntaxError> = Vec::new();
    let mut lines: Vec<usize> = Vec::new();
    for error in errors {
        let offset = error.span().map_or_else(|| syntax::deepest_key(text), |span| span.start);
        let offset = offset.min(text.len());
        let before = &text.as_bytes()[..offset];
        let line_start = before.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
        if let Some(error) = syntax::unclosed(error.message(), text, line_start) {
            // What follows was read as if it belonged to the value.
            out.push(error);
            break;
        }
        if !lines.contains(&line_start) {
            lines.push(line_start);
            out.push(SyntaxError::new(error.message(), text, offset, line_start));
        }
    }
    (convert_table(table.get_ref(), source), out)
}

fn convert_table(table: &DeTable<'_>, source: usize) -> Table {
    let entry = |(key, value): (&Spanned<_>, &Spanned<DeValue<'_>>)| {
        let key_at = At { source, offset: key.span().start };
        let key: &std::borrow::Cow<'_, str> = key.get_ref();
        (key.to_string(), convert(value, key_at))
    };
    table.iter().map(entry).collect()
}

fn convert(value: &Spanned<DeValue<'_>>, key_at: At) -> Node {
    let source = key_at.source;
    // What stands for a value that could not be read has no place.
    let offset = if value.span() == (0..0) { key_at.offset } else { value.span().start };
    let at = At { source, offset };
    let value = match value.get_ref() {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(n) => match i128::from_str_radix(n.as_str(), n.radix()) {
            Ok(n) => Value::Integer(n),
            Err(_) => Value::Huge(n.as_str().to_string()),
        },
        DeValue::Float(x) => match x.as_str().parse::<f64>() {
            Ok(x) => Value::Float(x),
            Err(_) => Value::Huge(x.as_str().to_string()),
        },
        DeValue::Boolean(b) => Value::Bool(*b),
        DeValue::Datetime(date) => Value::Date(date.to_string()),
        DeValue::Array(list) => Value::Array(
            list.iter()
                .map(|item| {
                    let offset = item.span().start;
                    convert(item, At { source, offset })
                })
                .collect(),
        ),
        DeValue::Table(table) => Value::Table(convert_table(table, source)),
    };
    Node { value, at, key_at }
}

/// Converts JSON, which has no places: everything stands at the start of `source`.
pub(crate) fn from_json(value: &serde_json::Value, source: usize) -> Node {
    let at = At { source, offset: 0 };
    let value = match value {
        serde_json::Value::Null => Value::Null,
        serde_json::Value::Bool(b) => Value::Bool(*b),
        serde_json::Value::Number(n) => match (n.as_i128(), n.as_f64()) {
            (Some(n), _) => Value::Integer(n),
            (None, Some(x)) => Value::Float(x),
            (None, None) => Value::Huge(n.to_string()),
        },
        serde_json::Value::String(text) => Value::Text(text.clone()),
        serde_json::Value::Array(list) => {
            Value::Array(list.iter().map(|item| from_json(item, source)).collect())
        }
        serde_json::Value::Object(map) => {
            let entry = |(key, value): (&String, &_)| (key.clone(), from_json(value, source));
            Value::Table(map.iter().map(entry).collect())
        }
    };
    Node { value, at, key_at: at }
}

/// Lays `upper` over `lower`: tables are merged key by key, anything else is replaced whole.
pub(crate) fn merge(lower: &mut Table, upper: Table) {
    for (key, mut node) in upper {
        if let (Some(old), Value::Table(new)) = (lower.get_mut(&key), &mut node.value)
            && let Value::Table(old_table) = &mut old.value
        {
            merge(old_table, std::mem::take(new));
            (old.at, old.key_at) = (node.at, node.key_at);
            continue;
        }
        lower.insert(key, node);
    }
}

/// Puts a value at a dotted path where there is none, in a table that is there.
pub(crate) fn fill(root: &mut Table, path: &str, value: &Node) {
    match path.split_once('.') {
        None => {
            root.entry(path.to_string()).or_insert_with(|| value.clone());
        }
        Some((first, rest)) => {
            if let Some(Node { value: Value::Table(table), .. }) = root.get_mut(first) {
                fill(table, rest, value);
            }
        }
    }
}

/// Returns the value at a dotted path.
pub(crate) fn find<'a>(root: &'a Table, path: &str) -> Option<&'a Node> {
    let (first, rest) = match path.split_once('.') {
        Some((first, rest)) => (first, Some(rest)),
        None => (path, None),
    };
    let node = root.get(first)?;
    match (rest, &node.value) {
        (None, _) => Some(node),
        (Some(rest), Value::Table(table)) => find(table, rest),
        (Some(_), _) => None,
    }
}
