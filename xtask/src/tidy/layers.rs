//! Which crate may depend on which.
//!
//! A crate sees the layers under its own; inside a layer only the edges of the table.

use super::{Dependency, DependencyKind, Finding, Package, Tree};

struct Crate {
    name: &'static str,
    layer: u8,
    /// Crates of the same or a higher layer that it may depend on.
    sideways: &'static [&'static str],
    /// The same, for its tests only.
    sideways_dev: &'static [&'static str],
}

const fn row(name: &'static str, layer: u8, sideways: &'static [&'static str]) -> Crate {
    Crate { name, layer, sideways, sideways_dev: &[] }
}

/// What takes a GPU's place in tests.
const STAND_IN: &[&str] = &["lacuna-nccl-standin"];

/// The layers: 0 words, 1 pure, 2 I/O, 3 libtorch, 4 tools. The same table as in ARCHITECTURE.md.
const CRATES: &[Crate] = &[
    row("lacuna-types", 0, &[]),
    row("lacuna-recipe", 1, &[]),
    row("lacuna-spec", 1, &["lacuna-recipe"]),
    row("lacuna-control", 1, &[]),
    row("lacuna-api", 2, &[]),
    row("lacuna-pixels", 2, &[]),
    row("lacuna-store", 2, &[]),
    row("lacuna-data", 2, &["lacuna-pixels", "lacuna-store"]),
    row("lacuna-checkpoint", 2, &["lacuna-store"]),
    Crate { name: "lacuna-cuda", layer: 2, sideways: &[], sideways_dev: STAND_IN },
    Crate { name: "lacuna-device", layer: 2, sideways: &["lacuna-cuda"], sideways_dev: STAND_IN },
    Crate {
        name: "lacuna-nccl",
        layer: 2,
        sideways: &[],
        sideways_dev: &["lacuna-cuda", "lacuna-nccl-standin"],
    },
    Crate {
        name: "lacuna-collective",
        layer: 2,
        sideways: &["lacuna-cuda", "lacuna-nccl"],
        sideways_dev: STAND_IN,
    },
    row("lacuna-telemetry", 2, &[]),
    row("lacuna-track", 2, &[]),
    row(
        "lacuna-coordinator",
        2,
        &[
            "lacuna-api",
            "lacuna-checkpoint",
            "lacuna-data",
            "lacuna-store",
            "lacuna-telemetry",
            "lacuna-track",
        ],
    ),
    Crate {
        name: "lacuna-worker",
        layer: 2,
        sideways: &[
            "lacuna-api",
            "lacuna-checkpoint",
            "lacuna-collective",
            "lacuna-cuda",
            "lacuna-data",
            "lacuna-device",
            "lacuna-nccl",
            "lacuna-telemetry",
        ],
        sideways_dev: STAND_IN,
    },
    row(
        "lacuna-cli",
        2,
        &[
            "lacuna-api",
            "lacuna-checkpoint",
            "lacuna-coordinator",
            "lacuna-cuda",
            "lacuna-data",
            "lacuna-nccl",
            "lacuna-telemetry",
        ],
    ),
    Crate {
        name: "lacuna-mae",
        layer: 3,
        sideways: &[],
        sideways_dev: &["lacuna-tests", "lacuna-nccl-standin"],
    },
    row("lacuna-sim", 4, &[]),
    row("lacuna-nccl-standin", 4, &[]),
    row("lacuna-tests", 4, &["lacuna-sim", "lacuna-nccl-standin"]),
    row("xtask", 4, &[]),
];

/// The one crate that links libtorch, so that all others build without it.
const TORCH_CRATE: &str = "lacuna-mae";
const TORCH_PACKAGES: &[&str] = &["tch", "torch-sys"];

/// What a pure crate must not get by a dependency either.
const IMPURE_PACKAGES: &[&str] =
    &["rand", "getrandom", "tokio", "tonic", "rayon", "chrono", "time", "rustix", "libc"];

/// Tells whether a crate is pure: no clock, no randomness, no threads, no I/O.
pub fn is_pure(package: &str) -> bool {
    find(package).is_some_and(|row| row.layer <= 1)
}

/// Checks every edge between members, and the dependencies that only some may have.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    for package in &tree.packages {
        let manifest = format!("{}/Cargo.toml", package.dir);
        if find(&package.name).is_none() {
            let message = format!(
                "crate `{}` is in no layer: add it to the table of xtask/src/tidy/layers.rs and \
                 to ARCHITECTURE.md",
                package.name
            );
            findings.push(Finding::new(&manifest, 1, message));
            continue;
        }
        for dependency in &package.dependencies {
            if let Some(message) = fault(package, dependency) {
                let line: usize = line_of(tree, &manifest, &dependency.name);
                findings.push(Finding::new(&manifest, line, message));
            }
        }
    }
    findings
}

fn find(name: &str) -> Option<&'static Crate> {
    CRATES.iter().find(|row| row.name == name)
}

/// Returns what is wrong with a dependency.
fn fault(package: &Package, dependency: &Dependency) -> Option<String> {
    let from: &Crate = find(&package.name)?;
    let name: &str = &dependency.name;
    if TORCH_PACKAGES.contains(&name) && from.name != TORCH_CRATE {
        return Some(format!("only `{TORCH_CRATE}` depends on `{name}`"));
    }
    if from.layer <= 1
        && dependency.kind == DependencyKind::Normal
        && IMPURE_PACKAGES.contains(&name)
    {
        return Some(format!("pure crate `{}` depends on `{name}`", from.name));
    }
    let to: &Crate = find(name)?;
    let allowed: bool = to.layer < from.layer
        || from.sideways.contains(&name)
        || (dependency.kind == DependencyKind::Dev && from.sideways_dev.contains(&name));
    (!allowed).then(|| {
        format!(
            "`{}` (layer {}) may not depend on `{name}` (layer {}): no such edge in the table of \
             xtask/src/tidy/layers.rs",
            from.name, from.layer, to.layer
        )
    })
}

/// Finds the line of a manifest that names a dependency.
fn line_of(tree: &Tree, manifest: &str, name: &str) -> usize {
    let starts = |line: &str| {
        line.trim_start().strip_prefix(name).is_some_and(|rest| rest.starts_with(['.', ' ', '=']))
    };
    tree.file(manifest).and_then(|file| file.text.lines().position(starts)).map_or(1, |idx| idx + 1)
}
