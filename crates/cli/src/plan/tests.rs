use super::*;

#[test]
fn a_new_spec_says_what_its_preset_says() {
    for preset in ["demo", "micro", "base"] {
        let name: RunId = "first".parse().unwrap();
        let text = new_spec(preset, &name, "some where/data").unwrap();
        let least = format!(
            "schema = 1\nname = \"first\"\nbase = \"preset:{preset}\"\n\
             [data]\nshards = \"some where/data\""
        );
        let want = parse_text("a", &least, &[]).unwrap().spec;
        let got = parse_text("b", &text, &[]).unwrap().spec;
        assert_eq!(got, want, "{text}");
        // Every commented line can be made a real one.
        let all: String = text.lines().map(uncomment).collect();
        assert_eq!(parse_text("c", &all, &[]).unwrap().spec, want, "{all}");
    }
}

fn uncomment(line: &str) -> String {
    let bare =
        line.strip_prefix("# ").filter(|rest| rest.split('#').next().unwrap().contains(" = "));
    format!("{}\n", bare.unwrap_or(line))
}

#[test]
fn presets_that_are_no_run_are_refused() {
    let name: RunId = "first".parse().unwrap();
    let error = new_spec("in1k-recipe", &name, "data").unwrap_err().to_string();
    assert!(error.contains("choose another one") && error.contains("model"), "{error}");
}
