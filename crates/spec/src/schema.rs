//! A JSON Schema of run specs, for editors; made from the table of fields.
//!
//! It knows types, ranges and words. What holds between keys only the reader knows, and a file that
//! the schema accepts may still be refused. Nothing is required: a file may be a base, or get its
//! keys from one.

use serde_json::{Map, Value, json};

use crate::fields::{CADENCES_MAX, DefaultValue, Field, Interval, Kind, fields};
use crate::presets;

/// Returns the schema as JSON text, the same for the same build.
pub fn json() -> String {
    let mut out = String::new();
    push(&mut out, &schema(), 0);
    out.push('\n');
    out
}

fn schema() -> Value {
    let mut root = object();
    for field in fields() {
        insert(&mut root, field.path, of_field(field));
    }
    insert(&mut root, "base", of_base());
    root["$schema"] = "http://json-schema.org/draft-07/schema#".into();
    root["title"] = "run spec of Lacuna".into();
    root
}

/// Returns the schema of a table without keys yet.
fn object() -> Value {
    json!({ "type": "object", "additionalProperties": false, "properties": {} })
}

/// Puts a key's schema at a dotted path.
fn insert(table: &mut Value, path: &str, schema: Value) {
    let properties = &mut table["properties"];
    match path.split_once('.') {
        None => properties[path] = schema,
        Some((first, rest)) => {
            if properties.get(first).is_none() {
                properties[first] = object();
            }
            insert(&mut properties[first], rest, schema);
        }
    }
}

fn of_field(field: &Field) -> Value {
    let mut schema = of_kind(field.kind);
    schema["description"] = format!("{} [{}]", field.doc, field.mark).into();
    if let DefaultValue::Value(value) = field.default() {
        schema["default"] = value;
    }
    schema
}

fn of_base() -> Value {
    let names: Vec<String> = presets::names().map(|name| format!("preset:{name}")).collect();
    json!({
        "description": "what the spec starts from: a preset, or the path of another spec",
        "anyOf": [
            { "enum": names },
            { "type": "string", "minLength": 1, "not": { "pattern": "^preset:" } },
        ],
    })
}

/// Returns the schema of the values of a kind.
fn of_kind(kind: Kind) -> Value {
    const COUNT: &str = "0*[1-9][0-9]*";
    let text = |pattern: String| json!({ "type": "string", "pattern": pattern });
    match kind {
        Kind::Name => {
            let rest = lacuna_types::NAME_BYTES_MAX - 1;
            text(format!("^[A-Za-z0-9_:-][A-Za-z0-9._:-]{{0,{rest}}}$"))
        }
        Kind::Place(schemes) => of_place(schemes),
        Kind::Word(words) => json!({ "enum": words }),
        Kind::Bool => json!({ "type": "boolean" }),
        Kind::Integer { min, max } if min == max => json!({ "const": min }),
        Kind::Integer { min, max } => whole(min, max),
        Kind::AutoOr { min, max } => json!({ "anyOf": [{ "const": "auto" }, whole(min, max)] }),
        Kind::Number(interval) => number(interval),
        Kind::Pair(interval) | Kind::Range(interval) => list(number(interval), 2, 2),
        Kind::PerChannel(interval) => list(number(interval), 1, 1024),
        Kind::Sides { max } => {
            json!({ "anyOf": [whole(1, max), list(whole(1, max), 2, 2)] })
        }
        Kind::Length => text(format!("^{COUNT}(ep|step)$")),
        Kind::LengthOrNone => {
            json!({ "anyOf": [{ "const": "none" }, of_kind(Kind::Length)] })
        }
        Kind::Cadence => text(format!("^{COUNT}(ep|step|s|min|h)$")),
        Kind::Cadences => {
            let one = of_kind(Kind::Cadence);
            json!({ "anyOf": [one.clone(), list(one, 1, CADENCES_MAX)] })
        }
        Kind::Bytes => text(format!("^{COUNT}(B|KiB|MiB|GiB|TiB|kB|MB|GB|TB)$")),
        Kind::Workers => text(format!("^{COUNT}:{COUNT}$")),
    }
}

fn of_place(schemes: &[&str]) -> Value {
    let path = json!({ "not": { "pattern": "://" } });
    let places = match schemes {
        [] => json!([path]),
        _ => json!([path, { "pattern": format!("^({})://", schemes.join("|")) }]),
    };
    json!({ "type": "string", "minLength": 1, "anyOf": places })
}

fn whole(min: u64, max: u64) -> Value {
    json!({ "type": "integer", "minimum": min, "maximum": max })
}

fn number(interval: Interval) -> Value {
    let mut schema = json!({ "type": "number" });
    let min = if interval.min_excluded { "exclusiveMinimum" } else { "minimum" };
    let max = if interval.max_excluded { "exclusiveMaximum" } else { "maximum" };
    schema[min] = interval.min.into();
    schema[max] = interval.max.into();
    schema
}

fn list(items: Value, min: usize, max: usize) -> Value {
    json!({ "type": "array", "items": items, "minItems": min, "maxItems": max })
}

/// Prints JSON with sorted keys: the order of `serde_json`'s own maps depends on how the whole
/// program is built.
fn push(out: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Object(map) if !map.is_empty() => push_object(out, map, depth),
        Value::Array(list) if list.iter().any(Value::is_object) => {
            out.push_str("[\n");
            for (i, item) in list.iter().enumerate() {
                out.push_str(&"  ".repeat(depth + 1));
                push(out, item, depth + 1);
                out.push_str(if i + 1 < list.len() { ",\n" } else { "\n" });
            }
            out.push_str(&"  ".repeat(depth));
            out.push(']');
        }
        _ => out.push_str(&value.to_string()),
    }
}

fn push_object(out: &mut String, map: &Map<String, Value>, depth: usize) {
    let mut keys: Vec<&String> = map.keys().collect();
    keys.sort();
    out.push_str("{\n");
    for (i, key) in keys.iter().enumerate() {
        out.push_str(&"  ".repeat(depth + 1));
        out.push_str(&format!("{}: ", Value::from(key.as_str())));
        push(out, &map[*key], depth + 1);
        out.push_str(if i + 1 < keys.len() { ",\n" } else { "\n" });
    }
    out.push_str(&"  ".repeat(depth));
    out.push('}');
}

#[cfg(test)]
mod tests;
