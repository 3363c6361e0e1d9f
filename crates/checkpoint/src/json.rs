//! Canonical JSON: one text per value, sealed with its own digest; and a parser that refuses what
//! readers could understand in two ways.

use std::fmt;

use lacuna_recipe::digest::hex;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize as DeriveDeserialize, Serialize};
use serde_json::{Map, Value};

/// A CRC-64 in JSON: a string of 16 lowercase hexadecimal digits.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, DeriveDeserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct Hex64(pub u64);

impl fmt::Display for Hex64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(self.0))
    }
}

impl fmt::Debug for Hex64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(self.0))
    }
}

impl From<Hex64> for String {
    fn from(value: Hex64) -> String {
        hex(value.0)
    }
}

impl TryFrom<String> for Hex64 {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let value = u64::from_str_radix(&text, 16).ok().filter(|value| hex(*value) == text);
        value.map(Hex64).ok_or_else(|| format!("`{}` is not a CRC-64", text.escape_debug()))
    }
}

/// Writes `value` with sorted keys and no white space.
pub fn canonical(value: &Value) -> String {
    let mut out = String::new();
    write_canonical(value, &mut out);
    out
}

fn write_canonical(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            out.push('{');
            for (i, (key, value)) in sorted(map).into_iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                out.push_str(&quoted(key));
                out.push(':');
                write_canonical(value, out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write_canonical(item, out);
            }
            out.push(']');
        }
        Value::String(text) => out.push_str(&quoted(text)),
        // The shortest decimal that reads back, in the standard library's spelling: digests must
        // not depend on the version of another library.
        Value::Number(x) if x.is_f64() => match x.as_f64() {
            Some(x) => out.push_str(&format!("{x:?}")),
            None => out.push_str(&x.to_string()),
        },
        plain => out.push_str(&plain.to_string()),
    }
}

/// Returns the entries of `map` by key, whatever order the map keeps.
pub(crate) fn sorted(map: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let mut entries: Vec<(&String, &Value)> = map.iter().collect();
    entries.sort_by(|a, b| a.0.cmp(b.0));
    entries
}

/// Writes `text` as a JSON string.
pub(crate) fn quoted(text: &str) -> String {
    Value::String(text.to_string()).to_string()
}

/// Converts a plain struct of this crate.
pub(crate) fn to_value<T: Serialize>(value: &T) -> Value {
    serde_json::to_value(value).expect("plain structs with string keys have a JSON form")
}

/// Computes the seal of an object: the BLAKE3 of its canonical text without the key `self`.
pub(crate) fn seal_of(value: &Value) -> String {
    let mut unsealed = value.clone();
    if let Value::Object(map) = &mut unsealed {
        map.remove("self");
    }
    format!("blake3:{}", blake3::hash(canonical(&unsealed).as_bytes()).to_hex())
}

/// A sealed document that cannot be accepted.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// Not JSON, or JSON with a key twice, or not of the expected shape.
    #[error("not a valid document")]
    Json(#[source] serde_json::Error),
    /// Another format, perhaps of a later version.
    #[error("schema is `{}`, this build reads `{want}`", found.escape_debug())]
    Schema {
        /// What the document says.
        found: String,
        /// What this build reads.
        want: &'static str,
    },
    /// The content is not what was sealed.
    #[error("content is {computed}, `self` says {found}")]
    Digest {
        /// Digest of the content.
        computed: String,
        /// Digest that the document carries.
        found: String,
    },
    /// The content is as sealed, the text is not as written.
    #[error("text is not in the form in which it was written")]
    Form,
}

/// Parses and checks a sealed document; `render` writes the text that such a document must have.
pub(crate) fn open_sealed<T: for<'de> serde::Deserialize<'de>>(
    text: &[u8],
    schema: &'static str,
    render: impl Fn(&Value) -> String,
) -> Result<T, SealError> {
    let value = parse_strict(text).map_err(SealError::Json)?;
    let field = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or("").to_string();
    if field("schema") != schema {
        return Err(SealError::Schema { found: field("schema"), want: schema });
    }
    let (computed, found) = (seal_of(&value), field("self"));
    if computed != found {
        return Err(SealError::Digest { computed, found });
    }
    if render(&value).as_bytes() != text {
        return Err(SealError::Form);
    }
    serde_json::from_value(value).map_err(SealError::Json)
}

/// Parses JSON and refuses objects that have a key twice.
pub fn parse_strict(text: &[u8]) -> Result<Value, serde_json::Error> {
    serde_json::from_slice(text).map(|Strict(value)| value)
}

struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items: Vec<Value> = Vec::new();
        while let Some(Strict(item)) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut out: Map<String, Value> = Map::new();
        while let Some((key, Strict(value))) = map.next_entry::<String, Strict>()? {
            if out.contains_key(&key) {
                return Err(A::Error::custom(format_args!("key {} appears twice", quoted(&key))));
            }
            out.insert(key, value);
        }
        Ok(Value::Object(out))
    }
}

#[cfg(test)]
mod tests;
