use super::{Exception, Limit, sizes};
use crate::tidy::{File, Tree};

fn tree(path: &str, text: String) -> Tree {
    Tree { files: vec![File { path: path.to_owned(), text }], ..Tree::default() }
}

fn messages(tree: &Tree, exceptions: &[Exception]) -> Vec<String> {
    sizes(tree, exceptions).iter().map(ToString::to_string).collect()
}

#[test]
fn long_files_and_wide_lines_are_found() {
    let long: Tree = tree("crates/x/src/a.rs", "x\n".repeat(601));
    assert_eq!(messages(&long, &[]), ["crates/x/src/a.rs:601: 601 lines: at most 600"]);
    let wide: Tree = tree("scripts/a.py", format!("\n{}\n", "é".repeat(101)));
    assert_eq!(messages(&wide, &[]), ["scripts/a.py:2: 101 columns: at most 100"]);
    let right: Tree = tree("scripts/a.py", format!("{}\n", "é".repeat(100)));
    assert_eq!(messages(&right, &[]), [""; 0]);
}

#[test]
fn generated_code_has_any_size() {
    let text: String = "x\n".repeat(601);
    assert_eq!(messages(&tree("crates/api/src/generated/a.rs", text.clone()), &[]), [""; 0]);
    assert_eq!(messages(&tree("a.rs", format!("// @generated\n{text}")), &[]), [""; 0]);
    assert_eq!(messages(&tree("a.json", text), &[]), [""; 0]);
}

#[test]
fn an_exception_excuses_one_limit_and_must_be_needed() {
    let lines = [Exception { path: "a.rs", limit: Limit::Lines, reason: "a table" }];
    let columns = [Exception { path: "a.rs", limit: Limit::Columns, reason: "a table" }];
    let long: Tree = tree("a.rs", "x\n".repeat(601));
    assert_eq!(messages(&long, &lines), [""; 0]);
    assert_eq!(messages(&long, &columns).len(), 2);
    let short: Tree = tree("a.rs", "x\n".to_owned());
    assert_eq!(messages(&short, &lines), ["a.rs:1: exception from Lines is not needed"]);
}
