//! Errors of TOML's syntax in the words of a spec, and what to write instead.

use crate::fields::{Field, Kind, fields};
use crate::problem::echo;
use crate::units;

/// Parts of a dotted key that the parser takes.
const KEY_PARTS_MAX: usize = 80;

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

impl SyntaxError {
    /// Takes what the parser says about `offset`, which is in the line that starts at `line_start`.
    pub(crate) fn new(message: &str, text: &str, offset: usize, line_start: usize) -> Self {
        let line = text.get(line_start..).and_then(|rest| rest.lines().next()).unwrap_or_default();
        let kind = match line.trim_start().starts_with('[') {
            true => SyntaxKind::Header,
            false => SyntaxKind::Line,
        };
        let message = message.trim().replace('\n', ", ");
        if message == "duplicate key" {
            let is_key = |c: &char| c.is_alphanumeric() || matches!(c, '_' | '-');
            let rest = text.get(offset..).unwrap_or_default();
            let key: String = rest.chars().take_while(is_key).collect();
            let message = format!("duplicate key `{}`", echo(&key));
            let fix = match kind {
                SyntaxKind::Header => "join both places in one table",
                _ => "write it once",
            };
            let fix = Some(fix.to_string());
            return SyntaxError { offset, message, fix, kind: SyntaxKind::Duplicate };
        }
        if ["<<<<<<<", "=======", ">>>>>>>"].iter().any(|mark| line.starts_with(mark)) {
            let message = "the line is left from a merge".to_string();
            let fix = Some("choose a side and remove the mark".to_string());
            return SyntaxError { offset, message, fix, kind };
        }
        if let Some((key, value)) = line.split_once('=') {
            let (key, value) = (key.trim(), value.split('#').next().unwrap_or_default().trim());
            if value.is_empty() {
                let message = format!("`{}` has no value", echo(key));
                let fix = how_to_write(key);
                return SyntaxError { offset, message, fix, kind };
            }
            if is_about_value(&message)
                && let Some(fix) = value_fix(key, value)
            {
                let message = format!("`{}` = {} is not a TOML value", echo(key), echo(value));
                return SyntaxError { offset, message, fix: Some(fix), kind };
            }
        }
        let (message, fix) = in_other_words(&message, line);
        SyntaxError { offset, message, fix, kind }
    }
}

/// Returns where the first key stands that is nested too deep: the parser does not say.
pub(crate) fn deepest_key(text: &str) -> usize {
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        let key = line.split('=').next().unwrap_or(line);
        if key.matches('.').count() + 1 >= KEY_PARTS_MAX {
            return start;
        }
        start += line.len();
    }
    text.len()
}

/// Recognizes a list or an inline table that runs on into the next section.
pub(crate) fn unclosed(message: &str, text: &str, line_start: usize) -> Option<SyntaxError> {
    let in_value = ["array element", "inline table", "key-value pairs"];
    let is_header = text.get(line_start..)?.starts_with('[');
    if !is_header || !in_value.iter().any(|words| message.contains(words)) {
        return None;
    }
    let above = text.get(..line_start)?;
    let last = above.rfind('=')?;
    let start = above[..last].rfind('\n').map_or(0, |end| end + 1);
    let (key, value) = above[start..].split_once('=')?;
    let sign = if value.trim_start().starts_with('[') { ']' } else { '}' };
    let blanks = value.len() - value.trim_start().len();
    Some(SyntaxError {
        offset: start + key.len() + 1 + blanks,
        message: format!("the value of `{}` is not closed", echo(key.trim())),
        fix: Some(format!("close it with `{sign}`")),
        kind: SyntaxKind::Header,
    })
}

/// Tells whether the parser means the value of a line, not how strings and tables are put together.
fn is_about_value(message: &str) -> bool {
    let starts = [
        "string values must be quoted",
        "invalid float",
        "invalid boolean",
        "invalid exponent",
        "invalid integer",
        "invalid date",
        "unexpected key or value",
        "unexpected leading zero",
        "extra comma",
    ];
    starts.iter().any(|start| message.starts_with(start))
}

/// Finds the field that a line's key most likely is: its section is not known.
fn field_of(key: &str) -> Option<&'static Field> {
    let is = |field: &&Field| field.path == key || field.key() == key;
    fields().iter().find(is)
}

fn how_to_write(key: &str) -> Option<String> {
    Some(match field_of(key) {
        Some(field) => format!("write it behind the `=`, such as `{key} = {}`", field.example),
        None => "write it behind the `=`, or remove the line".to_string(),
    })
}

/// Says how to write a value that is no TOML.
fn value_fix(key: &str, value: &str) -> Option<String> {
    if value.contains('=') {
        return Some("write one key on a line".to_string());
    }
    if value.contains(['\u{201c}', '\u{201d}', '\u{2018}', '\u{2019}']) {
        return Some("use straight quotes".to_string());
    }
    let field = field_of(key);
    let kind = field.map(|field| field.kind);
    match value.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" if kind.is_none_or(|kind| kind == Kind::Bool) => {
            return Some("write true".to_string());
        }
        "false" | "no" | "off" if kind.is_none_or(|kind| kind == Kind::Bool) => {
            return Some("write false".to_string());
        }
        "none" if kind == Some(Kind::LengthOrNone) => return Some("write \"none\"".to_string()),
        "none" | "null" | "nil" => return Some("remove the line for the default".to_string()),
        _ => {}
    }
    match (kind, field) {
        (Some(kind @ (Kind::Integer { .. } | Kind::Number(_))), Some(field)) => {
            let number = match kind {
                Kind::Integer { .. } => {
                    let plain = units::without_grouping(value).parse::<u64>();
                    plain.ok().map(|n| n.to_string())
                }
                _ => Some(value.replacen(',', ".", 1)).filter(|text| text.parse::<f64>().is_ok()),
            };
            return Some(match number {
                Some(number) => format!("write {number}"),
                None => format!("write a number such as {}", field.example),
            });
        }
        (Some(Kind::Pair(_) | Kind::Range(_) | Kind::PerChannel(_)), Some(field)) => {
            return Some(format!("write a list such as {}", field.example));
        }
        _ => {}
    }
    let quotes = ['"', '\'', '[', ']', '{', '}'];
    if value.chars().any(char::is_alphabetic) && !value.contains(quotes) {
        return Some(format!("quote the value: \"{}\"", echo(value)));
    }
    field.map(|field| format!("for example `{key} = {}`", field.example))
}

/// Says what the parser says in the words of a spec, and what to do.
fn in_other_words(message: &str, line: &str) -> (String, Option<String>) {
    let said = |message: &str, fix: &str| (message.to_string(), Some(fix.to_string()));
    let is_string = message.starts_with("invalid basic string")
        || message.starts_with("invalid literal string");
    if is_string && (message.ends_with("`\"`") || message.ends_with("`'`")) {
        return said("the string is not closed", "close it with a quote on the same line");
    }
    if message.contains("escape") {
        let fix = "write \\\\ for it, or single quotes around the string";
        return said("a backslash in a string is a mark of its own", fix);
    }
    if message.starts_with("key with no value") || message.starts_with("invalid unquoted key") {
        match line.trim_end().split_once(':') {
            Some((key, "")) => {
                let fix = format!("write [{}] on a line of its own", echo(key.trim()));
                return (message.to_string(), Some(fix));
            }
            Some(_) if !line.contains('=') => return said(message, "write `=` for the `:`"),
            _ => {}
        }
    }
    let fixes = [
        ("extra `=`", "remove it"),
        ("invalid key-value pair", "write `key = value`: a spec is TOML"),
        ("key with no value", "write `key = value`; remarks start with #"),
        ("missing comma", "write a comma between them"),
        ("extra comma", "remove it"),
        ("recurs", "no key lies that deep: remove the brackets or dots"),
        ("cannot extend", "remove one: a key is a value or a table"),
        ("unexpected key or value", "write one key on a line"),
        ("invalid unquoted key", "write a word of these; remarks start with #"),
        ("invalid comment", "remove the control character"),
        ("may only go between digits", "remove the `_`"),
    ];
    let fix = fixes.iter().find(|(part, _)| message.contains(part)).map(|(_, fix)| fix.to_string());
    (message.trim_end_matches(", expected nothing").to_string(), fix)
}
