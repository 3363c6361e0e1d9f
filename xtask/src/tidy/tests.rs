use super::{Dependency, DependencyKind, File, Package, Tree, check};

const LIB: &str = "//! A crate.\n#![forbid(unsafe_code)]\n";
const MANIFEST: &str = "[lints]\nworkspace = true\n\n[dependencies]\n";

/// A tree in which nothing is wrong: two crates, each with a manifest and a root.
struct Made(Tree);

impl Made {
    fn new() -> Made {
        let mut made = Made(Tree::default());
        made.package("lacuna-control", "crates/control");
        made.package("lacuna-data", "crates/data");
        made
    }

    fn package(&mut self, name: &str, dir: &str) -> &mut Package {
        self.file(&format!("{dir}/Cargo.toml"), MANIFEST);
        self.file(&format!("{dir}/src/lib.rs"), LIB);
        self.0.packages.push(Package {
            name: name.to_owned(),
            dir: dir.to_owned(),
            has_description: true,
            dependencies: Vec::new(),
        });
        self.0.packages.last_mut().unwrap()
    }

    fn file(&mut self, path: &str, text: &str) {
        self.0.files.retain(|file| file.path != path);
        self.0.paths.insert(path.to_owned());
        self.0.files.push(File { path: path.to_owned(), text: text.to_owned() });
    }

    fn depends(&mut self, from: &str, to: &str, kind: DependencyKind) {
        let package = self.0.packages.iter_mut().find(|package| package.name == from).unwrap();
        package.dependencies.push(Dependency { name: to.to_owned(), kind });
    }

    fn messages(&self) -> Vec<String> {
        check(&self.0).iter().map(ToString::to_string).collect()
    }
}

/// Adds one file to a right tree and returns what is found.
fn with_file(path: &str, text: &str) -> Vec<String> {
    let mut made = Made::new();
    made.file(path, text);
    made.messages()
}

/// Adds one dependency to a right tree and returns what is found.
fn with_edge(from: &str, to: &str, kind: DependencyKind) -> Vec<String> {
    let mut made = Made::new();
    if !made.0.packages.iter().any(|package| package.name == from) {
        made.package(from, "crates/from");
    }
    made.depends(from, to, kind);
    made.messages()
}

#[test]
fn a_right_tree_has_no_findings() {
    assert_eq!(Made::new().messages(), [""; 0]);
}

#[test]
fn edges_point_down_or_are_in_the_table() {
    let normal = DependencyKind::Normal;
    for (from, to) in [
        ("lacuna-control", "lacuna-types"),
        ("lacuna-spec", "lacuna-recipe"),
        ("lacuna-cli", "lacuna-coordinator"),
        ("lacuna-mae", "lacuna-worker"),
        ("lacuna-mae", "tch"),
        ("lacuna-worker", "tokio"),
    ] {
        assert_eq!(with_edge(from, to, normal), [""; 0], "{from} -> {to}");
    }
    for (from, to) in [
        ("lacuna-control", "lacuna-api"),
        ("lacuna-control", "lacuna-spec"),
        ("lacuna-data", "lacuna-checkpoint"),
        ("lacuna-worker", "lacuna-mae"),
        ("lacuna-coordinator", "lacuna-worker"),
        ("lacuna-worker", "tch"),
        ("lacuna-spec", "rand"),
    ] {
        assert_eq!(with_edge(from, to, normal).len(), 1, "{from} -> {to}");
    }
}

#[test]
fn tests_may_depend_on_more() {
    assert_eq!(with_edge("lacuna-mae", "lacuna-tests", DependencyKind::Dev), [""; 0]);
    assert_eq!(with_edge("lacuna-mae", "lacuna-tests", DependencyKind::Normal).len(), 1);
    assert_eq!(with_edge("lacuna-recipe", "rand", DependencyKind::Dev), [""; 0]);
}

#[test]
fn an_edge_is_found_on_its_line() {
    let mut made = Made::new();
    made.file("crates/data/Cargo.toml", &format!("{MANIFEST}lacuna-api.workspace = true\n"));
    made.depends("lacuna-data", "lacuna-api", DependencyKind::Normal);
    assert!(made.messages()[0].starts_with("crates/data/Cargo.toml:5: `lacuna-data` (layer 2)"));
}

#[test]
fn a_crate_without_a_layer_is_found() {
    let mut made = Made::new();
    made.package("lacuna-new", "crates/new");
    assert!(made.messages()[0].starts_with("crates/new/Cargo.toml:1: crate `lacuna-new` is in no"));
}

#[test]
fn pure_code_names_no_clock() {
    let code = "fn f() { let t = Instant::now(); }\n";
    assert_eq!(
        with_file("crates/control/src/a.rs", code),
        [concat!(
            "crates/control/src/a.rs:1: pure code names `Instant`: ",
            "time is an argument: use Timestamp"
        )]
    );
    assert_eq!(with_file("crates/data/src/a.rs", code), [""; 0]);
    assert_eq!(with_file("crates/control/src/a/tests.rs", code), [""; 0]);
    assert_eq!(with_file("crates/control/src/a.rs", "// Instant\n"), [""; 0]);
}

#[test]
fn pure_code_names_no_io() {
    for code in [
        "use std::fs::File;",
        "use std::{fmt, fs};",
        "use std::{\n    fmt,\n    thread,\n};",
        "pub async fn f() {}",
        "type M = HashMap<u8, u8>;",
    ] {
        assert_eq!(with_file("crates/control/src/a.rs", code).len(), 1, "{code}");
    }
    for code in ["use std::{fmt, ops};\nfn fs() {}", "use std::time::Duration;"] {
        assert_eq!(with_file("crates/control/src/a.rs", code), [""; 0], "{code}");
    }
}

#[test]
fn crates_name_only_what_they_may_see() {
    assert_eq!(with_file("crates/data/src/a.rs", "fn f(x: &tch::Tensor) {}").len(), 1);
    assert_eq!(with_file("crates/control/src/a.rs", "use lacuna_api::Hello;").len(), 1);
    assert_eq!(with_file("crates/data/src/a.rs", "use lacuna_api::Hello;"), [""; 0]);
}

#[test]
fn shortcuts_are_found() {
    assert_eq!(with_file("crates/data/src/a.rs", "fn f() { todo!() }").len(), 1);
    assert_eq!(with_file("crates/data/src/a/tests.rs", "#[ignore = \"slow\"]").len(), 1);
    let sleep = "std::thread::sleep(d);";
    assert_eq!(with_file("crates/data/src/a/tests.rs", sleep).len(), 1);
    assert_eq!(with_file("crates/data/src/a.rs", sleep), [""; 0]);
}

#[test]
fn every_crate_opens_alike() {
    let mut made = Made::new();
    made.file("crates/data/src/lib.rs", "mod a;\n");
    made.file("crates/data/Cargo.toml", "[package]\nworkspace = true\n");
    made.0.packages[1].has_description = false;
    assert_eq!(
        made.messages(),
        [
            "crates/data/Cargo.toml:1: no `[lints] workspace = true`",
            "crates/data/Cargo.toml:1: no `description`",
            "crates/data/src/lib.rs:1: does not open with `//!`: what it is, what it does not do",
            "crates/data/src/lib.rs:1: no `#![forbid(unsafe_code)]`",
        ]
    );
}

#[test]
fn crates_that_call_c_may_be_unsafe() {
    let mut made = Made::new();
    made.package("lacuna-nccl", "crates/nccl");
    made.file("crates/nccl/src/lib.rs", "//! A binding.\n");
    assert_eq!(made.messages(), [""; 0]);
}

#[test]
fn links_of_pages_lead_somewhere() {
    let page = |text: &str| with_file("docs/adr/0001.md", text);
    assert_eq!(page("[a](../../crates/data) [b](https://example.org/x) [c](#here)"), [""; 0]);
    assert_eq!(page("[a](../../crates/data/src/lib.rs#L1)"), [""; 0]);
    assert_eq!(page("`[a](nowhere.md)`\n```\n[b](nowhere.md)\n```\n"), [""; 0]);
    assert_eq!(
        page("\n[a](nowhere.md)"),
        ["docs/adr/0001.md:2: link to `nowhere.md` leads nowhere"]
    );
    assert_eq!(page("[a](../../../outside.md)").len(), 1);
}

#[test]
fn text_names_no_place_outside_the_repository() {
    assert_eq!(with_file("a.toml", concat!("path = \"/wo", "rk/main\"")).len(), 1);
    assert_eq!(with_file("a.toml", "path = \"/network/x\" # a shared/exclusive lock"), [""; 0]);
    assert_eq!(with_file("a.toml", concat!("# spec/", "numerics.md §1")).len(), 1);
    let mut made = Made::new();
    made.file("docs/spec/order.md", "order\n");
    made.file("a.toml", concat!("# spec/", "order.md.\n"));
    assert_eq!(made.messages(), [""; 0]);
}
