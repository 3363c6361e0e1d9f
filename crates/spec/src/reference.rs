//! The reference page of run specs, `docs/run-spec.md`; made from the table of fields.

use crate::fields::{DefaultValue, Field, fields, to_toml};
use crate::presets;

/// What stands above the tables.
const HEAD: &str = "\
# Run specs

<!-- @generated from the table of fields in crates/spec; a test keeps it current. -->

A run spec is a TOML file. `lacuna init` writes one, `lacuna plan FILE` says what it comes to and
reports every problem with its place, `lacuna plan FILE --effective` prints it with everything
filled in. [run-spec.schema.json](run-spec.schema.json) is a JSON Schema of it, for editors.

A key that is not written comes from `base`, which is a preset (`base = \"preset:demo\"`) or another
spec (`base = \"common.toml\"`), and then from the defaults below. A key marked **required** has no
default; presets hold all of these but `schema`, `name` and `data.shards`.

Each key is marked by what changing it does:

- *maths* changes the result of a run;
- *placement* changes only where, when and how fast the work is done;
- *display* changes only what people see.

Lengths are in steps or epochs (`\"500step\"`, `\"800ep\"`), times in seconds, minutes or hours
(`\"30s\"`, `\"15min\"`, `\"2h\"`), sizes in bytes (`\"500GB\"`, `\"256MiB\"`); a bare number is
none of them. Relative paths start from the folder of the file that holds them. Secrets never stand
in a spec: credentials of stores come from the environment. `cache.dir` and `cache.size` go
together: without them there is no cache.
";

/// Returns the page as Markdown.
pub fn page() -> String {
    let mut out = HEAD.to_string();
    out += "\nPresets: ";
    let names: Vec<String> = presets::names().map(|name| format!("`{name}`")).collect();
    out += &format!("{}.\n", names.join(", "));
    let mut section = None;
    for field in fields() {
        if section != Some(field.section()) {
            section = Some(field.section());
            let title = match field.section() {
                "" => "Top".to_string(),
                name => format!("`[{name}]`"),
            };
            out += &format!("\n## {title}\n\n| key | type | default | mark | what |\n");
            out += "|---|---|---|---|---|\n";
            if field.section().is_empty() {
                out += "| `base` | string: `preset:NAME`, or a path | none | | what the spec \
                        starts from |\n";
            }
        }
        out += &row(field);
    }
    out
}

fn row(field: &Field) -> String {
    let default = match field.default() {
        DefaultValue::Required => "**required**".to_string(),
        DefaultValue::Unset => "not set".to_string(),
        DefaultValue::Value(value) => format!("`{}`", to_toml(&value)),
        DefaultValue::Follows(words) => words,
    };
    let (key, kind, mark, doc) = (field.key(), field.kind, field.mark, field.doc);
    format!("| `{key}` | {kind} | {default} | {mark} | {doc} |\n")
}

#[cfg(test)]
mod tests;
