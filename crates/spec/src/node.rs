//! Values that remember where they were written: what all layers of a spec become before merging.

use std::collections::BTreeMap;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::problem::{Place, echo};

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
}

/// An error of syntax.
#[derive(Debug)]
pub(crate) struct SyntaxError {
    pub(crate) offset: usize,
    pub(crate) message: String,
    pub(crate) fix: Option<String>,
    pub(crate) kind: SyntaxKind,
}

/// How much of the text around an error of syntax can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SyntaxKind {
    /// Everything: only a key stands twice.
    Duplicate,
    /// The other lines.
    Line,
    /// Nothing below: it is not known which table the keys belong to.
    Header,
}

/// Parses TOML text; returns what could be understood, and the first error of each line.
pub(crate) fn parse_toml(text: &str, source: usize) -> (Table, Vec<SyntaxError>) {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut out: Vec<SyntaxError> = Vec::new();
    let mut last_line = usize::MAX;
    for error in errors {
        let offset = error.span().map_or(text.len(), |span| span.start).min(text.len());
        let before = &text.as_bytes()[..offset];
        let line_start = before.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
        if last_line != line_start {
            last_line = line_start;
            out.push(syntax_error(error.message(), text, offset, line_start));
        }
    }
    (convert_table(table.get_ref(), source), out)
}

fn syntax_error(message: &str, text: &str, offset: usize, line_start: usize) -> SyntaxError {
    let line = text.get(line_start..).and_then(|rest| rest.lines().next()).unwrap_or_default();
    let mut message = message.trim().replace('\n', ", ");
    let mut fix = None;
    let mut kind = match line.trim_start().starts_with('[') {
        true => SyntaxKind::Header,
        false => SyntaxKind::Line,
    };
    if message == "duplicate key" {
        let is_key = |c: &char| c.is_alphanumeric() || matches!(c, '_' | '-');
        let rest = text.get(offset..).unwrap_or_default();
        let key: String = rest.chars().take_while(is_key).collect();
        message = format!("duplicate key `{}`", echo(&key));
        kind = SyntaxKind::Duplicate;
    } else if let Some((key, value)) = line.split_once('=') {
        let value = value.split('#').next().unwrap_or_default().trim();
        let plain = |c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | ':' | '/');
        if value.is_empty() {
            message = format!("`{}` has no value", echo(key.trim()));
        } else if value.chars().all(plain) && value.chars().any(char::is_alphabetic) {
            fix = Some(format!("quote the value: \"{}\"", echo(value)));
        }
    }
    SyntaxError { offset, message, fix, kind }
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
    let at = At { source, offset: value.span().start };
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
