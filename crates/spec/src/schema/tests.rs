use std::sync::LazyLock;

use expect_test::expect_file;
use serde_json::{Value, json};

use super::*;
use crate::load::parse_text;
use crate::node;

#[test]
fn the_file_is_current() {
    expect_file!["../../../../docs/run-spec.schema.json"].assert_eq(&json());
}

/// Tells why `value` is not what `schema` wants; knows the words that this crate's schema uses.
fn refusal(schema: &Value, value: &Value, at: &str) -> Option<String> {
    let rules = schema.as_object().unwrap().iter();
    { rules }.find_map(|(rule, want)| {
        let holds = match rule.as_str() {
            "properties" => return properties(want, value, at),
            "items" => return items(want, value, at),
            "anyOf" => {
                want.as_array().unwrap().iter().any(|inner| refusal(inner, value, at).is_none())
            }
            "not" => refusal(want, value, at).is_some(),
            "additionalProperties" => {
                let known = &schema["properties"];
                value.as_object().is_none_or(|map| map.keys().all(|k| known.get(k).is_some()))
            }
            "type" => is_type(want.as_str().unwrap(), value),
            "enum" => want.as_array().unwrap().contains(value),
            "const" => want == value,
            "minimum" => value.as_f64().is_none_or(|x| x >= want.as_f64().unwrap()),
            "maximum" => value.as_f64().is_none_or(|x| x <= want.as_f64().unwrap()),
            "exclusiveMinimum" => value.as_f64().is_none_or(|x| x > want.as_f64().unwrap()),
            "exclusiveMaximum" => value.as_f64().is_none_or(|x| x < want.as_f64().unwrap()),
            "minLength" => value.as_str().is_none_or(|s| s.len() as u64 >= want.as_u64().unwrap()),
            "minItems" => length(value).is_none_or(|n| n >= want.as_u64().unwrap()),
            "maxItems" => length(value).is_none_or(|n| n <= want.as_u64().unwrap()),
            "pattern" => value.as_str().is_none_or(|s| pattern::is_in(want.as_str().unwrap(), s)),
            "$schema" | "title" | "description" | "default" => true,
            other => panic!("unknown rule {other}"),
        };
        (!holds).then(|| format!("{at}: {value} breaks {rule} {want}"))
    })
}

fn length(value: &Value) -> Option<u64> {
    value.as_array().map(|list| list.len() as u64)
}

fn is_type(name: &str, value: &Value) -> bool {
    match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        other => panic!("unknown type {other}"),
    }
}

fn properties(known: &Value, value: &Value, at: &str) -> Option<String> {
    let mut entries = value.as_object()?.iter();
    entries.find_map(|(key, value)| {
        known.get(key).and_then(|schema| refusal(schema, value, &format!("{at}.{key}")))
    })
}

fn items(schema: &Value, value: &Value, at: &str) -> Option<String> {
    value.as_array()?.iter().find_map(|item| refusal(schema, item, &format!("{at}[]")))
}

/// As much of regular expressions as the schema uses: words, classes, groups, `*` and `{a,b}`.
mod pattern {
    pub fn is_in(pattern: &str, text: &str) -> bool {
        let start = pattern.strip_prefix('^');
        let (body, anchored) = (start.unwrap_or(pattern), start.is_some());
        let (body, to_end) = match body.strip_suffix('$') {
            Some(body) => (body, true),
            None => (body, false),
        };
        let ends = |rest: &str| !to_end || rest.is_empty();
        { 0..=text.len() }
            .filter(|at| text.is_char_boundary(*at) && (!anchored || *at == 0))
            .any(|at| alternatives(body, &text[at..], &ends))
    }

    /// Matches one of `a|b`, then `rest` must hold for what is left of the text.
    fn alternatives(pattern: &str, text: &str, rest: &dyn Fn(&str) -> bool) -> bool {
        let mut depth = 0;
        let mut start = 0;
        for (at, c) in pattern.char_indices() {
            match c {
                '(' => depth += 1,
                ')' => depth -= 1,
                '|' if depth == 0 => {
                    if sequence(&pattern[start..at], text, rest) {
                        return true;
                    }
                    start = at + 1;
                }
                _ => {}
            }
        }
        sequence(&pattern[start..], text, rest)
    }

    fn sequence(pattern: &str, text: &str, rest: &dyn Fn(&str) -> bool) -> bool {
        let Some(first) = pattern.chars().next() else { return rest(text) };
        let end = match first {
            '[' => pattern.find(']').unwrap() + 1,
            '(' => pattern.find(')').unwrap() + 1,
            _ => first.len_utf8(),
        };
        let (item, behind) = pattern.split_at(end);
        let (times, behind) = times(behind);
        repeat(item, times, text, &|text| sequence(behind, text, rest))
    }

    fn times(behind: &str) -> ((usize, usize), &str) {
        if let Some(behind) = behind.strip_prefix('*') {
            return ((0, usize::MAX), behind);
        }
        let Some(inner) = behind.strip_prefix('{') else { return ((1, 1), behind) };
        let (inner, behind) = inner.split_once('}').unwrap();
        let (min, max) = inner.split_once(',').unwrap();
        ((min.parse().unwrap(), max.parse().unwrap()), behind)
    }

    fn repeat(
        item: &str,
        (min, max): (usize, usize),
        text: &str,
        rest: &dyn Fn(&str) -> bool,
    ) -> bool {
        let next = (min.saturating_sub(1), max.saturating_sub(1));
        let more = max > 0
            && once(item, text, &|left| left.len() < text.len() && repeat(item, next, left, rest));
        more || (min == 0 && rest(text))
    }

    fn once(item: &str, text: &str, rest: &dyn Fn(&str) -> bool) -> bool {
        if let Some(inner) = item.strip_prefix('(') {
            return alternatives(inner.strip_suffix(')').unwrap(), text, rest);
        }
        let Some(c) = text.chars().next() else { return false };
        let fits = match item.strip_prefix('[') {
            Some(class) => in_class(class.strip_suffix(']').unwrap(), c),
            None => item.starts_with(c),
        };
        fits && rest(&text[c.len_utf8()..])
    }

    fn in_class(class: &str, c: char) -> bool {
        let chars: Vec<char> = class.chars().collect();
        let range = |w: &[char]| w[1] == '-' && (w[0]..=w[2]).contains(&c);
        chars.windows(3).any(range) || chars.contains(&c)
    }
}

#[test]
fn patterns_are_understood() {
    assert!(pattern::is_in("^0*[1-9][0-9]*(ep|step)$", "0800step"));
    assert!(!pattern::is_in("^0*[1-9][0-9]*(ep|step)$", "0ep"));
    assert!(!pattern::is_in("^0*[1-9][0-9]*(ep|step)$", "5epochs"));
    assert!(pattern::is_in("^[a-c_-]{0,3}$", "a-b") && !pattern::is_in("^[a-c]{0,3}$", "aaaa"));
    assert!(pattern::is_in("://", "s3://b") && !pattern::is_in("^(s3|gs)://", "http://s3://"));
}

/// Reads TOML as an editor would hand it to the schema.
fn shape(text: &str) -> Value {
    let (table, errors) = node::parse_toml(text, 0);
    assert!(errors.is_empty(), "{errors:?}");
    fn to_json(value: &node::Value) -> Value {
        match value {
            node::Value::Table(table) => {
                table.iter().map(|(key, node)| (key.clone(), to_json(&node.value))).collect()
            }
            other => other.to_json().unwrap_or_else(|| json!({ "huge": other.describe() })),
        }
    }
    to_json(&node::Value::Table(table))
}

fn refused(text: &str) -> Option<String> {
    static SCHEMA: LazyLock<Value> = LazyLock::new(schema);
    refusal(&SCHEMA, &shape(text), "spec")
}

#[test]
fn good_specs_have_the_shape() {
    assert_eq!(refused(presets::DEFAULTS), None);
    for preset in presets::PRESETS {
        assert_eq!(refused(preset.text), None, "{}", preset.name);
        let text = format!(
            "schema = 1\nname = \"a\"\nbase = \"preset:{}\"\ndata.shards = \"d\"\n\
             data.cache = {{ dir = \"c\", size = \"1GB\" }}\ncheckpoint.keep.every = \"50ep\"\n",
            preset.name
        );
        assert_eq!(refused(&text), None);
        // `lacuna init` writes lines of the effective spec, some of them as remarks.
        if let Ok(loaded) = parse_text("t", &text, &[]) {
            assert_eq!(refused(&loaded.effective_toml()), None);
        }
    }
}

/// Values of every type, good ones and bad ones.
const VALUES: &[&str] = &[
    "0",
    "1",
    "2",
    "-1",
    "16",
    "101",
    "1025",
    "65537",
    "16777217",
    "0.5",
    "1.0",
    "-0.5",
    "1e-3",
    "101.0",
    "nan",
    "true",
    "\"true\"",
    "\"\"",
    "\"a\"",
    "\"A b\"",
    "\"auto\"",
    "\"none\"",
    "\"f32\"",
    "\"exact\"",
    "\"global\"",
    "\"fail\"",
    "\"skip\"",
    "\"never\"",
    "\"jpeg\"",
    "\"5ep\"",
    "\"5step\"",
    "\"0ep\"",
    "\"5min\"",
    "\"5\"",
    "\"5epochs\"",
    "\"5GB\"",
    "\"5gb\"",
    "\"1:4\"",
    "\"0:4\"",
    "\"4\"",
    "\"s3://b/p\"",
    "\"ftp://b/p\"",
    "[]",
    "[1]",
    "[0.5]",
    "[8, 8]",
    "[0.5, 0.75]",
    "[0.5, 0.5, 0.5]",
    "[\"5ep\"]",
    "[\"5ep\", \"1h\"]",
    "[\"5ep\", 3]",
    "{ a = 1 }",
    "1979-05-27",
];

/// Tells whether a message is about one value alone.
fn is_of_type(message: &str) -> bool {
    message.contains(" must be a") && !message.contains("multiple") && !message.contains("patches")
}

/// The schema never refuses what the reader accepts, and notices every wrong type.
#[test]
fn schema_and_reader_agree_on_single_values() {
    let start = "schema = 1\nname = \"a\"\nbase = \"preset:micro\"\ndata.shards = \"d\"\n";
    let mut n_accepted = 0;
    for field in fields() {
        for value in VALUES.iter().chain([&field.example]) {
            // Files, not overrides: those turn what is no TOML into strings.
            let text = format!("{} = {value}\n", field.path);
            let own = ["schema", "name", "data.shards"].contains(&field.path);
            let key = format!("{} =", field.path);
            let base: String = { start.lines() }
                .filter(|line| !own || !line.starts_with(&key))
                .map(|line| format!("{line}\n"))
                .collect();
            let others = match field.path {
                "data.cache.dir" => "data.cache.size = \"1GB\"\n",
                "data.cache.size" => "data.cache.dir = \"c\"\n",
                "data.cache.mode" => "data.cache.dir = \"c\"\ndata.cache.size = \"1GB\"\n",
                _ => "",
            };
            let whole = format!("{base}{others}{text}");
            let refused = refused(&whole);
            match parse_text("t", &whole, &[]) {
                Ok(_) => {
                    n_accepted += 1;
                    assert_eq!(refused, None, "{text}");
                }
                Err(error) if is_of_type(&error.to_string()) => {
                    assert!(refused.is_some(), "{text}{error}");
                }
                Err(_) => {}
            }
        }
    }
    assert!(n_accepted > fields().len(), "{n_accepted}");
}

#[test]
fn misspelt_keys_are_noticed() {
    for text in ["[trian]", "train.btach = 3", "checkpoint.keep.lst = 3", "base = \"preset:dmeo\""]
    {
        assert!(refused(text).is_some(), "{text}");
    }
}
