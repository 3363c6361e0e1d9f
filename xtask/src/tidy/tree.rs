//! What the checks look at: the text files that git knows or would add, and cargo's metadata.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail};
use serde_json::Value;

/// The tree as the checks see it.
#[derive(Debug, Default)]
pub struct Tree {
    /// Every file that is valid UTF-8.
    pub files: Vec<File>,
    /// Paths of all files, those that are not text too.
    pub paths: BTreeSet<String>,
    /// Members of the workspace.
    pub packages: Vec<Package>,
}

/// A text file.
#[derive(Debug)]
pub struct File {
    /// Path from the root, with `/`.
    pub path: String,
    /// Its content.
    pub text: String,
}

/// A member of the workspace.
#[derive(Debug)]
pub struct Package {
    /// Name in its manifest.
    pub name: String,
    /// Folder from the root, with `/`.
    pub dir: String,
    /// Whether the manifest has a description.
    pub has_description: bool,
    /// Direct dependencies.
    pub dependencies: Vec<Dependency>,
}

/// A direct dependency.
#[derive(Debug)]
pub struct Dependency {
    /// Name of the package, whatever it is renamed to.
    pub name: String,
    /// What it is for.
    pub kind: DependencyKind,
}

/// What a dependency is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DependencyKind {
    /// For the crate itself.
    Normal,
    /// For its tests.
    Dev,
    /// For its build script.
    Build,
}

impl Tree {
    /// Reads the working tree at `root`.
    ///
    /// # Errors
    /// If `git` or `cargo metadata` fails, or a listed file cannot be read.
    pub fn read(root: &Path) -> anyhow::Result<Tree> {
        let list: String =
            output(root, "git", &["ls-files", "-z", "--cached", "--others", "--exclude-standard"])?;
        let mut tree = Tree::default();
        for path in list.split('\0').filter(|path| !path.is_empty()) {
            let file = root.join(path);
            // Deleted but still in the index, or a link, which has no text of its own.
            if !file.symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
                continue;
            }
            tree.paths.insert(path.to_owned());
            let bytes: Vec<u8> = std::fs::read(&file).with_context(|| format!("read `{path}`"))?;
            if let Ok(text) = String::from_utf8(bytes) {
                tree.files.push(File { path: path.to_owned(), text });
            }
        }
        tree.packages = packages(root)?;
        Ok(tree)
    }

    /// Returns the file at `path`.
    pub fn file(&self, path: &str) -> Option<&File> {
        self.files.iter().find(|file| file.path == path)
    }

    /// Tells whether a file or a folder of this path is in the tree.
    pub fn has(&self, path: &str) -> bool {
        let prefix = format!("{path}/");
        path.is_empty()
            || self.paths.contains(path)
            || self.paths.range(prefix.clone()..).next().is_some_and(|p| p.starts_with(&prefix))
    }
}

/// Asks cargo for the members of the workspace.
fn packages(root: &Path) -> anyhow::Result<Vec<Package>> {
    let cargo: String = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let text: String = output(root, &cargo, &["metadata", "--format-version", "1", "--no-deps"])?;
    let metadata: Value = serde_json::from_str(&text).context("parse cargo's metadata")?;
    let list: &Vec<Value> =
        metadata["packages"].as_array().context("find packages in cargo's metadata")?;
    list.iter().map(|value| package(root, value)).collect()
}

fn package(root: &Path, value: &Value) -> anyhow::Result<Package> {
    let text = |key: &str| {
        value[key].as_str().with_context(|| format!("find `{key}` in cargo's metadata"))
    };
    let manifest: &Path = Path::new(text("manifest_path")?);
    let dir: &Path = manifest.parent().unwrap_or(manifest);
    let dir: &Path = dir.strip_prefix(root).context("find a package in the workspace")?;
    let dependencies: Vec<Dependency> = value["dependencies"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|dependency| Dependency {
            name: dependency["name"].as_str().unwrap_or_default().to_owned(),
            kind: match dependency["kind"].as_str() {
                Some("dev") => DependencyKind::Dev,
                Some("build") => DependencyKind::Build,
                _ => DependencyKind::Normal,
            },
        })
        .collect();
    Ok(Package {
        name: text("name")?.to_owned(),
        dir: dir.to_string_lossy().replace('\\', "/"),
        has_description: value["description"].as_str().is_some_and(|text| !text.is_empty()),
        dependencies,
    })
}

/// Runs a program in `root` and returns its stdout.
fn output(root: &Path, program: &str, args: &[&str]) -> anyhow::Result<String> {
    let done = Command::new(program)
        .args(args)
        .current_dir(root)
        .output()
        .with_context(|| format!("run `{program}`"))?;
    if !done.status.success() {
        bail!("`{program} {}` failed: {}", args.join(" "), String::from_utf8_lossy(&done.stderr));
    }
    String::from_utf8(done.stdout).with_context(|| format!("read what `{program}` printed"))
}
