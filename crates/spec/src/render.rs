//! The effective spec as text: every key with its value, mark, origin and meaning.

use crate::fields::{Field, fields, lookup, to_toml};
use crate::load::Loaded;
use crate::run_spec::RunSpec;

/// Column at which comments start; longer lines push theirs to the right.
const COMMENT_COLUMN: usize = 44;

impl RunSpec {
    /// Prints the spec as TOML with everything filled in; parses back to the same spec.
    pub fn effective_toml(&self) -> String {
        render(self, &|_| None)
    }
}

impl Loaded {
    /// Prints the spec as TOML with everything filled in and the origin of every value.
    pub fn effective_toml(&self) -> String {
        render(&self.spec, &|path| self.origins.get(path).map(ToString::to_string))
    }
}

fn render(spec: &RunSpec, origin: &dyn Fn(&str) -> Option<String>) -> String {
    let json = spec.to_json();
    let mut out = String::new();
    let mut section = "";
    for field in fields() {
        if field.section() != section {
            section = field.section();
            // A header of a section that nothing is set in would be the section.
            let in_section = |f: &&Field| f.section() == section;
            let is_set = |f: &Field| lookup(&json, f.path).is_some();
            let mark = if fields().iter().filter(in_section).any(is_set) { "" } else { "# " };
            out += &format!("\n{mark}[{section}]\n");
        }
        let key = field.path.strip_prefix(section).unwrap_or(field.path);
        let key = key.trim_start_matches('.');
        let line = match lookup(&json, field.path) {
            Some(value) => format!("{key} = {}", to_toml(value)),
            None => format!("# {key} is not set"),
        };
        let origin = origin(field.path).map_or(String::new(), |origin| format!(" ({origin})"));
        let (mark, doc) = (field.mark, field.doc);
        out += &format!("{line:<COMMENT_COLUMN$}# {mark}{origin}: {doc}\n");
    }
    out
}
