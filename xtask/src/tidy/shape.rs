//! What every crate and file looks like: sizes, first lines, manifests.

use super::{File, Finding, Tree};

const LINES_MAX: usize = 600;
const COLUMNS_MAX: usize = 100;
const SIZED: &[&str] = &[".rs", ".py", ".sh"];

/// Crates that call C or C++ and say why each call is sound.
const UNSAFE_CRATES: &[&str] = &[
    "lacuna-pixels",
    "lacuna-cuda",
    "lacuna-device",
    "lacuna-nccl",
    "lacuna-collective",
    "lacuna-mae",
    "lacuna-nccl-standin",
    "lacuna-worker",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    Lines,
    Columns,
}

struct Exception {
    path: &'static str,
    limit: Limit,
    #[expect(dead_code, reason = "for the reader: an exception without a reason is a fault")]
    reason: &'static str,
}

/// Files that go over a limit. An entry that is not needed is reported.
const EXCEPTIONS: &[Exception] = &[
    wide("crates/control/src/coordinator/tests/inquiries.rs"),
    wide("crates/control/src/coordinator/tests/transcripts.rs"),
    wide("crates/data/src/index/tests.rs"),
    wide("crates/data/src/mds/tests.rs"),
    wide("crates/data/src/pack/tests.rs"),
    wide("crates/data/src/parquet/tests.rs"),
    wide("crates/data/src/wds/tests.rs"),
    wide("crates/recipe/src/prp/tests.rs"),
];

const fn wide(path: &'static str) -> Exception {
    let reason = "the expected text of a test stands as it is printed";
    Exception { path, limit: Limit::Columns, reason }
}

/// Checks sizes of files, first lines of crates, and manifests.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings: Vec<Finding> = sizes(tree, EXCEPTIONS);
    findings.extend(crates(tree));
    findings
}

fn is_generated(file: &File) -> bool {
    file.path.split('/').any(|part| part == "generated" || part == "gen")
        || file.text.lines().take(5).any(|line| line.contains("@generated"))
}

/// Checks the number of lines and of columns.
fn sizes(tree: &Tree, exceptions: &[Exception]) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    let mut used: Vec<bool> = vec![false; exceptions.len()];
    let mut excused = |path: &str, limit: Limit| {
        let found = exceptions.iter().position(|e| e.path == path && e.limit == limit);
        if let Some(idx) = found {
            used[idx] = true;
        }
        found.is_some()
    };
    let sized = |file: &&File| SIZED.iter().any(|end| file.path.ends_with(end));
    for file in tree.files.iter().filter(sized).filter(|file| !is_generated(file)) {
        let n_lines: usize = file.text.lines().count();
        if n_lines > LINES_MAX && !excused(&file.path, Limit::Lines) {
            let message = format!("{n_lines} lines: at most {LINES_MAX}");
            findings.push(Finding::new(&file.path, LINES_MAX + 1, message));
        }
        for (idx, line) in file.text.lines().enumerate() {
            let n_columns: usize = line.chars().count();
            if n_columns > COLUMNS_MAX && !excused(&file.path, Limit::Columns) {
                let message = format!("{n_columns} columns: at most {COLUMNS_MAX}");
                findings.push(Finding::new(&file.path, idx + 1, message));
            }
        }
    }
    let stale = exceptions.iter().zip(&used).filter(|(_, used)| !**used);
    let there = |e: &Exception| tree.files.iter().any(|file| file.path == e.path);
    for (exception, _) in stale.filter(|(exception, _)| there(exception)) {
        let message = format!("exception from {:?} is not needed", exception.limit);
        findings.push(Finding::new(exception.path, 1, message));
    }
    findings
}

/// Checks the manifest and the root of every crate.
fn crates(tree: &Tree) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    for package in &tree.packages {
        let manifest = format!("{}/Cargo.toml", package.dir);
        if !package.has_description {
            findings.push(Finding::new(&manifest, 1, "no `description`"));
        }
        if !tree.file(&manifest).is_some_and(|file| inherits_lints(&file.text)) {
            findings.push(Finding::new(&manifest, 1, "no `[lints] workspace = true`"));
        }
        let Some(root) = tree.file(&format!("{}/src/lib.rs", package.dir)) else {
            continue;
        };
        if !root.text.starts_with("//!") {
            let message = "does not open with `//!`: what it is, what it does not do";
            findings.push(Finding::new(&root.path, 1, message));
        }
        let forbids: bool = root.text.lines().any(|line| line == "#![forbid(unsafe_code)]");
        if !forbids && !UNSAFE_CRATES.contains(&package.name.as_str()) {
            findings.push(Finding::new(&root.path, 1, "no `#![forbid(unsafe_code)]`"));
        }
    }
    findings
}

fn inherits_lints(manifest: &str) -> bool {
    let mut in_lints: bool = false;
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            in_lints = line == "[lints]";
        }
        let line: String = line.split_whitespace().collect();
        if line == "lints.workspace=true" || (in_lints && line == "workspace=true") {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests;
