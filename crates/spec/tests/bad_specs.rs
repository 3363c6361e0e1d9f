//! Bad run specs, one a file of `tests/bad`, with what is said of each beside it: `NNN-name.err`.
//!
//! `UPDATE_EXPECT=1 cargo test -p lacuna-spec --test bad_specs` writes what is said; read it as the
//! person who made the mistake would.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::io;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use expect_test::expect_file;
use lacuna_spec::{Problem, SpecError, parse_file};

/// What the corpus uses as passwords: no message may repeat one.
const SECRETS: [&str; 2] = ["hunter2", "AKIAEXAMPLE"];

/// Words that tell what to do where no fix is given.
const ADVICE: [&str; 3] = [" must ", " a unit, such as ", "expected `"];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bad")
}

/// Lists the entries of the corpus with an extension, sorted.
fn entries(extension: &str) -> Vec<String> {
    let entries = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().file_name());
    let names = entries.map(|name| name.into_string().unwrap());
    let suffix = format!(".{extension}");
    let mut names: Vec<String> =
        names.filter_map(|name| name.strip_suffix(&suffix).map(str::to_string)).collect();
    names.sort();
    names
}

/// Reads what `name` says, as a command started in the folder of the corpus would.
fn read(name: &Path) -> io::Result<String> {
    fs::read_to_string(folder().join(name))
}

/// Prints an error with its causes.
fn chain(error: &dyn Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

/// Returns what is said about a spec; adds what is bad about that to `complaints`.
fn verdict(name: &str, complaints: &mut Vec<String>) -> String {
    let file = format!("{name}.toml");
    let parsed = catch_unwind(|| parse_file(Path::new(&file), &[], &read));
    let error = match parsed {
        Ok(Err(error)) => error,
        Ok(Ok(_)) => return "accepted".to_string(),
        Err(_) => return "panic".to_string(),
    };
    if let SpecError::Invalid(problems) = &error {
        let complaint = |problem| Some(format!("{}: {problem}", complaint(problem)?));
        complaints.extend(problems.as_slice().iter().filter_map(complaint));
    }
    let text = chain(&error);
    if SECRETS.iter().any(|secret| text.contains(secret)) {
        complaints.push(format!("repeats a secret: {file}"));
    }
    if text.lines().any(|line| line.contains(char::is_control)) {
        complaints.push(format!("holds control characters: {file}"));
    }
    text
}

/// Says what is bad about a message.
fn complaint(problem: &Problem) -> Option<&'static str> {
    let Problem { place, key, message, fix } = problem;
    let start = format!("{}:{}:{}: ", place.file, place.line, place.column);
    let last = key.rsplit('.').next().unwrap_or(key);
    if place.line == 0 || place.column == 0 || !problem.to_string().starts_with(&start) {
        return Some("has no place");
    }
    if lossless(last).is_some_and(|key| !message.contains(key)) {
        return Some("does not name the key");
    }
    let advises = fix.is_some() || ADVICE.iter().any(|advice| message.contains(advice));
    (!advises).then_some("does not say what to do")
}

/// Returns a key that messages show as it is.
fn lossless(key: &str) -> Option<&str> {
    key.chars().all(|c| c.is_ascii_graphic()).then_some(key)
}

#[test]
fn every_bad_spec_is_refused_with_advice() {
    let names = entries("toml");
    assert!(names.len() >= 100, "{} specs", names.len());
    let mut complaints: Vec<String> = Vec::new();
    for (i, name) in names.iter().enumerate() {
        assert!(name.starts_with(&format!("{:03}-", i + 1)), "{name} is out of order");
        let want = folder().join(format!("{name}.err"));
        let said = verdict(name, &mut complaints);
        if matches!(said.as_str(), "accepted" | "panic") {
            complaints.push(format!("{said}: {name}"));
        }
        expect_file![want].assert_eq(&format!("{said}\n"));
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn every_verdict_has_its_spec() {
    let specs: BTreeSet<String> = entries("toml").into_iter().collect();
    assert_eq!(entries("err").into_iter().find(|name| !specs.contains(name)), None);
}
