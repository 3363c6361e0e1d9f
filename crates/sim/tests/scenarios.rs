//! Every scenario of `tests/scenarios` gives the transcript that stands under its commands.
//!
//! `UPDATE_EXPECT=1` writes what is instead.

use std::path::{Path, PathBuf};

use lacuna_sim::history::play;
use lacuna_sim::script::Script;
use lacuna_sim::world::Detail;

/// Stands between the commands and the transcript.
const RULE: &str = "----\n";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/scenarios")
}

/// Plays one file; returns what is wrong.
fn check(path: &Path, update: bool) -> Result<(), String> {
    let text = std::fs::read_to_string(path).map_err(|err| err.to_string())?;
    let (commands, expected) = text.split_once(RULE).unwrap_or((text.as_str(), ""));
    let script: Script = commands.parse()?;
    let outcome = play(&script, Detail::Notes);
    let found: String = outcome.transcript.iter().map(|line| format!("{line}\n")).collect();
    if update {
        let commands = commands.trim_end();
        std::fs::write(path, format!("{commands}\n{RULE}{found}")).map_err(|e| e.to_string())?;
    }
    if let Some(violation) = outcome.violation {
        return Err(format!("{violation}\n{found}"));
    }
    let known = expected == found || update;
    known.then_some(()).ok_or(format!("another transcript (UPDATE_EXPECT=1 takes it):\n{found}"))
}

#[test]
fn scenarios() {
    let update = std::env::var_os("UPDATE_EXPECT").is_some();
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder())
        .expect("the scenarios are there")
        .map(|entry| entry.expect("readable").path())
        .collect();
    files.sort();
    assert!(files.len() >= 23, "each failure case has its file");
    let mut failed: Vec<String> = Vec::new();
    for path in &files {
        if let Err(why) = check(path, update) {
            failed.push(format!("{}: {why}", path.display()));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}
