//! Checks of the whole tree, each a function from a [`Tree`] to findings.

mod documents;
mod layers;
mod purity;
mod shape;
mod source;
mod tree;

#[cfg(test)]
mod tests;

use std::fmt;
use std::path::Path;
use std::process::ExitCode;

pub use tree::{Dependency, DependencyKind, File, Package, Tree};

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Path from the root of the workspace.
    pub path: String,
    /// 1-based.
    pub line: usize,
    /// What is wrong and what to do, a lowercase fragment.
    pub message: String,
}

impl Finding {
    /// Builds a finding.
    pub fn new(path: &str, line: usize, message: impl Into<String>) -> Self {
        Finding { path: path.to_owned(), line, message: message.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.message)
    }
}

/// Runs every check and returns what they found, in the order of paths and lines.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings: Vec<Finding> = layers::check(tree);
    findings.extend(purity::check(tree));
    findings.extend(shape::check(tree));
    findings.extend(documents::check(tree));
    findings.sort();
    findings.dedup();
    findings
}

/// Checks the working tree at `root` and prints the findings on stdout.
///
/// # Errors
/// If `git` or `cargo metadata` fails, or a file cannot be read.
pub fn run(root: &Path) -> anyhow::Result<ExitCode> {
    let tree: Tree = Tree::read(root)?;
    let findings: Vec<Finding> = check(&tree);
    for finding in &findings {
        println!("{finding}");
    }
    let n_files: usize = tree.files.len();
    let n_packages: usize = tree.packages.len();
    println!("tidy: {} findings in {n_files} files, {n_packages} packages", findings.len());
    Ok(if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
