//! What code must not name: clocks and I/O in pure crates, libtorch outside its crate, shortcuts.

use super::source::{Source, has_word};
use super::{File, Finding, Tree, layers};

/// What pure code does not name, each with what to do about it. Tests may.
const IMPURE: &[(&str, &str)] = &[
    ("Instant", "time is an argument: use Timestamp"),
    ("SystemTime", "time is an argument: use Timestamp"),
    ("std::fs", "bytes are arguments: read them in a driver"),
    ("std::net", "pure code knows no network"),
    ("std::thread", "pure code has no threads"),
    ("std::process", "pure code starts and ends no process"),
    ("rand", "draws are keyed by the seed: use the recipe's"),
    ("tokio", "pure code is not async"),
    ("async", "pure code is not async"),
    ("HashMap", "its order differs from run to run: use BTreeMap"),
    ("HashSet", "its order differs from run to run: use BTreeSet"),
];
/// Modules of `std` that pure code does not name in a grouped `use std::{…}` either.
const IMPURE_MODULES: &[&str] = &["fs", "net", "thread", "process"];

/// Crates whose code has no tensors, so that they build and are tested without libtorch.
const NO_TENSORS: &[&str] = &["crates/data/", "crates/checkpoint/"];
const CONTROL: &str = "crates/control/";

/// Checks the code of every Rust file.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let pure_dirs: Vec<String> = tree
        .packages
        .iter()
        .filter(|package| layers::is_pure(&package.name))
        .map(|package| format!("{}/src/", package.dir))
        .collect();
    let mut findings: Vec<Finding> = Vec::new();
    for file in tree.files.iter().filter(|file| file.path.ends_with(".rs")) {
        let source = Source::parse(&file.path, &file.text);
        let is_pure: bool = pure_dirs.iter().any(|dir| file.path.starts_with(dir.as_str()));
        let mut in_group: bool = false;
        for (line, code, is_test) in source.lines() {
            let mut report = |message: String| {
                findings.push(Finding::new(&file.path, line, message));
            };
            if is_pure && !is_test {
                impure(code, &mut in_group, &mut report);
            }
            foreign(file, code, &mut report);
            shortcuts(code, is_test, &mut report);
        }
    }
    findings
}

/// Reports what pure code names; `in_group` carries an open `use std::{` from line to line.
fn impure(code: &str, in_group: &mut bool, report: &mut impl FnMut(String)) {
    for (word, instead) in IMPURE {
        if has_word(code, word) {
            report(format!("pure code names `{word}`: {instead}"));
        }
    }
    if code.contains("use std::{") {
        *in_group = true;
    }
    if *in_group {
        for module in IMPURE_MODULES.iter().filter(|module| has_word(code, module)) {
            report(format!("pure code names `std::{module}`"));
        }
        *in_group = !code.contains(';');
    }
}

/// Reports the types of other crates where a crate must not see them.
fn foreign(file: &File, code: &str, report: &mut impl FnMut(String)) {
    if NO_TENSORS.iter().any(|dir| file.path.starts_with(dir)) && has_word(code, "tch") {
        report("names `tch`: this crate passes plain buffers, not tensors".to_owned());
    }
    if file.path.starts_with(CONTROL) && has_word(code, "lacuna_api") {
        report("names `lacuna_api`: wire types stop at the drivers".to_owned());
    }
}

/// Reports what looks finished and is not.
fn shortcuts(code: &str, is_test: bool, report: &mut impl FnMut(String)) {
    if code.contains("#[ignore") {
        report("ignored test: assert what happens today, with a FIXME".to_owned());
    }
    if code.contains("todo!(") {
        report("`todo!`: write it, or return an error that says so".to_owned());
    }
    if is_test && code.contains("thread::sleep") {
        report("a test sleeps: wait for the condition with a deadline".to_owned());
    }
}
