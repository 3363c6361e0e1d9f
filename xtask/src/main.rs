//! Repository tasks: `cargo xtask tidy` checks the rules of the architecture that are executable.
//!
//! Nothing here is part of the product. Start reading at [`tidy::check`].
#![forbid(unsafe_code)]

mod tidy;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;

const USAGE: &str = "usage: cargo xtask tidy";

fn main() -> anyhow::Result<ExitCode> {
    let root: &Path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("find the root of the workspace")?;
    let command: Option<String> = std::env::args().nth(1);
    match command.as_deref() {
        Some("tidy") => tidy::run(root),
        _ => {
            eprintln!("{USAGE}");
            Ok(ExitCode::from(2))
        }
    }
}
