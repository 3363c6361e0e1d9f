use expect_test::expect_file;

use super::*;
use crate::load::parse_text;

#[test]
fn the_page_is_current() {
    expect_file!["../../../../docs/run-spec.md"].assert_eq(&page());
}

#[test]
fn rows_are_cells() {
    for line in page().lines().filter(|line| line.starts_with('|')) {
        assert_eq!(line.matches('|').count(), 6, "{line}");
    }
}

/// What the page calls required is missed where it is not written, and nothing else is.
#[test]
fn required_keys_are_missed() {
    let error = parse_text("run.toml", "model.width = 8", &[]).unwrap_err().to_string();
    for field in fields() {
        let missed = error.contains(&format!("missing key `{}`", field.path));
        let required = field.default() == DefaultValue::Required && field.path != "model.width";
        assert_eq!(missed, required, "{}: {error}", field.path);
    }
}

/// A default that the page names is what a spec has without the key.
#[test]
fn defaults_hold() {
    let text = "schema = 1\nname = \"a\"\ndata.shards = \"d\"\nbase = \"preset:base\"\n\
                data.cache = { dir = \"c\", size = \"1GB\" }\n\
                    track.reconstructions = { every = \"1ep\" }";
    let spec = parse_text("run.toml", text, &[]).unwrap().spec.to_json();
    for field in fields() {
        if let DefaultValue::Value(value) = field.default() {
            assert_eq!(crate::fields::lookup(&spec, field.path), Some(&value), "{}", field.path);
        }
    }
}
