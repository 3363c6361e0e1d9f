use super::{Source, has_word};

fn code(text: &str) -> Vec<String> {
    Source::parse("crates/x/src/lib.rs", text)
        .code
        .iter()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

#[test]
fn comments_and_strings_are_blank() {
    assert_eq!(code("a; // HashMap\nb; /* x /* y */ z */ c;"), ["a;", "b; c;"]);
    assert_eq!(code("let s = \"a\\\" // b\"; d;"), ["let s = \" \"; d;"]);
    assert_eq!(code("let s = r#\"todo!() \" \"#; d;"), ["let s = r#\" \"#; d;"]);
    assert_eq!(code("let s = br\"x\"; d;"), ["let s = br\" \"; d;"]);
}

#[test]
fn quotes_of_characters_open_no_string() {
    assert_eq!(code("let c = '\"'; d;"), ["let c = ; d;"]);
    assert_eq!(code("let c = '\\''; d;"), ["let c = ; d;"]);
    assert_eq!(code("let c = '\\u{10ffff}'; d;"), ["let c = ; d;"]);
    assert_eq!(code("fn f<'a>(x: &'a str) { \"s\" }"), ["fn f<'a>(x: &'a str) { \" \" }"]);
}

#[test]
fn lines_are_kept_through_long_strings() {
    assert_eq!(code("a(\"one\ntwo\");\nb;"), ["a(\"", "\");", "b;"]);
}

#[test]
fn tests_are_told_from_code() {
    let n_tests = |path: &str, text: &str| {
        Source::parse(path, text).lines().filter(|(_, _, is_test)| *is_test).count()
    };
    assert_eq!(n_tests("crates/x/src/a/tests.rs", "a\nb\n"), 2);
    assert_eq!(n_tests("tests/src/lib.rs", "a\n"), 1);
    assert_eq!(n_tests("crates/x/src/a.rs", "a\n#[cfg(test)]\nmod tests;\nb\n"), 0);
    assert_eq!(n_tests("crates/x/src/a.rs", "a\n#[cfg(test)]\nmod tests {\nb\n}\n"), 3);
}

#[test]
fn words_end_where_identifiers_end() {
    assert!(has_word("use std::fs::File;", "std::fs"));
    assert!(!has_word("use std::fsync;", "std::fs"));
    assert!(!has_word("InstantLike", "Instant"));
}
