//! Whole sessions of the commands on files, word for word: `tests/sessions/*.txt`.
//!
//! `UPDATE_EXPECT=1 cargo test -p lacuna-cli --test sessions` writes what is said; read it as the
//! person who typed the commands would.

mod desk;

use std::fmt::Write as _;

use desk::{Desk, save};

/// Runs commands one after another and writes down what a person would see, `[..]` for what no
/// machine says twice.
fn session(desk: &Desk, commands: &[&str]) -> String {
    let mut out = String::new();
    for line in commands {
        let words: Vec<&str> = line.split(' ').collect();
        let done = desk.output(&words);
        writeln!(out, "$ lacuna {line}").unwrap();
        if done.status.code() != Some(0) {
            writeln!(out, "? {}", done.status.code().unwrap()).unwrap();
        }
        for said in [&done.stderr, &done.stdout] {
            out += &String::from_utf8(said.clone()).unwrap();
        }
        out.push('\n');
    }
    let here = std::fs::canonicalize(desk.path(".")).unwrap();
    let out = out.replace(&here.display().to_string(), "[CWD]");
    out.lines().map(|line| varying(line.trim_end()) + "\n").collect()
}

/// Takes out of a line what depends on the machine: speeds, what is drawn at random, and digests of
/// what holds the folder's path.
fn varying(line: &str) -> String {
    if line.starts_with("digest  ") && line.len() > 70 {
        return "digest       [..]".to_string();
    }
    let mut words: Vec<String> = line.split(' ').map(ToString::to_string).collect();
    for i in 1..words.len() {
        let rate = words[i].trim_end_matches([',', ';', ')']).ends_with("/s");
        if rate {
            words[i - 1] = "[..]".to_string();
        }
    }
    for word in &mut words {
        for drawn in ["lacuna_", "view:", "blake3:"] {
            if word.len() > 40 && word.starts_with(drawn) {
                *word = format!("{drawn}[..]");
            }
        }
    }
    words.join(" ")
}

fn expect(name: &str, said: &str) {
    let path = format!("{}/tests/sessions/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    expect_test::expect_file![path].assert_eq(said);
}

#[test]
fn from_nothing_to_a_plan() {
    let desk = Desk::new();
    let said = session(
        &desk,
        &[
            "init --preset micro --name first --data d",
            "init --preset micro",
            "init --preset mikro --out other.toml",
            "data synthetic d --n 40 --size 8x8 --channels 1 --seed 3 --shard-size 20KiB",
            "data synthetic d --n 40 --size 8x8",
            "data stats d --patch-size 2",
            "data verify d",
            "data show-order run.toml --step 0",
            "plan run.toml",
            "data subset d part --label-fraction 0.5",
            "data pack nowhere out",
        ],
    );
    expect("data", &said);
}

#[test]
fn checkpoints() {
    let desk = Desk::new();
    desk.spec();
    for step in [5, 10, 15] {
        save(&desk, step, 2, step as f32);
    }
    let said = session(
        &desk,
        &[
            "ckpt ls run.toml",
            "ckpt show run.toml",
            "ckpt verify run.toml --all",
            "ckpt diff runs/tiny@5 runs/tiny@5",
            "ckpt hold run.toml@5 --name paper",
            "ckpt hold run.toml",
            "ckpt gc run.toml --dry-run",
            "ckpt export run.toml --layout mae --encoder-only --to out",
            "ckpt export run.toml --layout mae --to out",
            "ckpt show run.toml --step 6",
        ],
    );
    expect("checkpoints", &said);
}

#[test]
fn tokens_and_certificates() {
    let desk = Desk::new();
    let said = session(
        &desk,
        &[
            "token new --role submit --add-to tokens --out my.token",
            "token new --role submit --add-to tokens --out my.token",
            "token new --role king",
            "token new --role view",
            "tls init tls --host localhost",
            "coordinator --listen 0.0.0.0:0 --state state",
        ],
    );
    expect("secrets", &said);
}
