//! Good specs with random damage: an answer, never a panic; and what is accepted can be planned.

use lacuna_spec::{SpecError, parse_text, plan, presets};
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// Values in the place of good ones.
const ODD_VALUES: &[&str] = &[
    "",
    "0",
    "1",
    "-1",
    "2",
    "3",
    "64",
    "1024",
    "65536",
    "16777216",
    "4294967295",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "9223372036854775808",
    "170141183460469231731687303715884105728",
    "99999999999999999999999999999999999999999999",
    "0x10",
    "1_000",
    "0.0",
    "-0.0",
    "0.5",
    "0.999999999999",
    "1e-46",
    "1e-38",
    "1e38",
    "1e308",
    "1e400",
    "inf",
    "-inf",
    "nan",
    "true",
    "false",
    "2024-01-01",
    "[]",
    "[1]",
    "[1, 1]",
    "[16384, 16384]",
    "[0.0, 1e-45]",
    "[[]]",
    "{}",
    "{ last = 1 }",
    "{ dir = \"c\", size = \"1B\" }",
    "\"\"",
    "\"auto\"",
    "\"none\"",
    "\"1ep\"",
    "\"1step\"",
    "\"4294967295ep\"",
    "\"9007199254740992step\"",
    "\"18446744073709551616step\"",
    "\"1h\"",
    "\"87600h\"",
    "\"1:1\"",
    "\"1:4096\"",
    "\"4096:4096\"",
    "\"block\"",
    "\"exact32\"",
    "\"preset:huge\"",
    "\"preset:\"",
    "\"s3://a:b@c/d\"",
    "\"é\\u0000\"",
    "'''",
    "\"\"\"",
];

/// Sizes of data from a batch of one to more than there can be.
const N_SAMPLES: &[u64] = &[0, 1, 255, 60_000, 1_281_167, 100_000_000, 1 << 40, u64::MAX];

/// More samples than any set of images has; an order is only made for one.
const N_SAMPLES_REAL: u64 = 1 << 40;

#[derive(Clone, Debug)]
enum Edit {
    Delete(Index),
    Repeat(Index, Index),
    SwapLines(Index, Index),
    SwapBytes(Index, Index),
    Replace(Index, &'static str),
    /// Two lines get one value: keys that must agree often do.
    ReplaceTwo(Index, Index, &'static str),
    CutShort(Index),
}

fn edit() -> impl Strategy<Value = Edit> {
    let at = any::<Index>;
    prop_oneof![
        1 => at().prop_map(Edit::Delete),
        1 => (at(), at()).prop_map(|(from, to)| Edit::Repeat(from, to)),
        1 => (at(), at()).prop_map(|(a, b)| Edit::SwapLines(a, b)),
        1 => (at(), at()).prop_map(|(a, b)| Edit::SwapBytes(a, b)),
        6 => (at(), select(ODD_VALUES)).prop_map(|(line, value)| Edit::Replace(line, value)),
        2 => (at(), at(), select(ODD_VALUES)).prop_map(|(a, b, v)| Edit::ReplaceTwo(a, b, v)),
        1 => at().prop_map(Edit::CutShort),
    ]
}

fn replace(line: &mut String, value: &str) {
    if let Some((key, _)) = line.split_once('=') {
        *line = format!("{key}= {value}");
    }
}

fn apply(text: &str, edit: &Edit) -> String {
    let mut lines: Vec<String> = text.lines().map(str::to_string).collect();
    if lines.is_empty() {
        return String::new();
    }
    let n = lines.len();
    match edit {
        Edit::Delete(at) => {
            lines.remove(at.index(n));
        }
        Edit::Repeat(from, to) => {
            let line = lines[from.index(n)].clone();
            lines.insert(to.index(n), line);
        }
        Edit::SwapLines(a, b) => lines.swap(a.index(n), b.index(n)),
        Edit::SwapBytes(a, b) => {
            let mut bytes = text.as_bytes().to_vec();
            let n = bytes.len();
            bytes.swap(a.index(n), b.index(n));
            return String::from_utf8_lossy(&bytes).into_owned();
        }
        Edit::Replace(at, value) => replace(&mut lines[at.index(n)], value),
        Edit::ReplaceTwo(a, b, value) => {
            replace(&mut lines[a.index(n)], value);
            replace(&mut lines[b.index(n)], value);
        }
        Edit::CutShort(at) => {
            let end = (0..=at.index(text.len())).rev().find(|end| text.is_char_boundary(*end));
            return text[..end.unwrap_or(0)].to_string();
        }
    }
    lines.join("\n") + "\n"
}

/// Returns a good spec: based on a preset, or with every key written.
fn good(preset: usize, whole: bool) -> String {
    let models: Vec<&str> = presets::names().filter(|name| *name != "in1k-recipe").collect();
    let preset = models[preset % models.len()];
    let text = format!(
        "schema = 1\nname = \"a\"\nbase = \"preset:{preset}\"\n[data]\nshards = \"d\"\n\
         cache = {{ dir = \"c\", size = \"1GB\" }}\n[checkpoint]\nkeep.every = \"50ep\"\n"
    );
    let spec = parse_text("good", &text, &[]).unwrap().spec;
    match whole {
        true => spec.effective_toml(),
        false => text,
    }
}

fn check(text: &str) -> Result<(), TestCaseError> {
    let loaded = match parse_text("t", text, &[]) {
        Ok(loaded) => loaded,
        Err(SpecError::Invalid(problems)) => {
            prop_assert!(problems.count() > 0);
            for problem in problems.as_slice() {
                prop_assert!(problem.place.line > 0 && problem.place.column > 0, "{problem}");
                prop_assert!(problem.place.line <= text.lines().count() + 1, "{problem}");
            }
            return Ok(());
        }
        Err(error) => return Err(TestCaseError::fail(error.to_string())),
    };
    let again = parse_text("t", &loaded.effective_toml(), &[]).unwrap();
    prop_assert_eq!(&again.spec, &loaded.spec);
    let spec = loaded.spec;
    spec.check().unwrap();
    for n_samples in N_SAMPLES.iter().copied().chain([u64::from(spec.train.batch)]) {
        let report = plan(&spec, Some(n_samples));
        prop_assert!(!report.to_string().is_empty());
        prop_assert!(report.peak_lr.is_finite() && report.flops_per_image.is_finite());
        if let Ok(resolved) = spec.resolve(n_samples) {
            prop_assert!(resolved.total_steps > 0 && resolved.total_steps <= 1 << 53);
            let last = resolved.geometry.place(lacuna_types::Step(resolved.total_steps));
            prop_assert!(last.1 < resolved.geometry.steps_per_epoch());
            for step in [0, 1, resolved.total_steps / 2, resolved.total_steps - 1] {
                prop_assert!(resolved.schedule.lr(step).is_finite());
            }
            if n_samples <= N_SAMPLES_REAL {
                let mut pinned = spec.clone();
                pinned.pin(n_samples, 1000);
                pinned.check().unwrap();
            }
        }
        spec.bad_samples_max(n_samples);
    }
    prop_assert!(!plan(&spec, None).to_string().is_empty());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn damaged_specs_have_an_answer(
        preset in 0usize..16,
        whole in any::<bool>(),
        edits in prop::collection::vec(edit(), 1..5),
    ) {
        let text = { edits.iter() }.fold(good(preset, whole), |text, edit| apply(&text, edit));
        check(&text)?;
    }
}

/// Every key of a whole spec with every odd value: few enough to try them all.
#[test]
fn every_key_with_every_odd_value() {
    let text = good(0, true);
    let lines: Vec<&str> = text.lines().collect();
    for (i, line) in lines.iter().enumerate() {
        for value in ODD_VALUES {
            let mut lines: Vec<String> = lines.iter().map(ToString::to_string).collect();
            replace(&mut lines[i], value);
            check(&lines.join("\n")).unwrap_or_else(|error| panic!("{line} <- {value}: {error}"));
        }
    }
}
