//! Repository tasks: `cargo xtask tidy` checks the rules of the architecture that are executable;
//! `cargo xtask proto` (feature `codegen`) generates the gRPC code.
//!
//! Nothing here is part of the product. Start reading at [`tidy::check`].
#![forbid(unsafe_code)]

#[cfg(feature = "codegen")]
mod proto;
mod tidy;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;

const USAGE: &str = "usage: cargo xtask tidy | proto [--check] (needs the feature `codegen`)";

fn main() -> anyhow::Result<ExitCode> {
    let root: &Path =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("find the root of the workspace")?;
    let command: Option<String> = std::env::args().nth(1);
    match command.as_deref() {
        Some("tidy") => tidy::run(root),
        #[cfg(feature = "codegen")]
        Some("proto") => proto::run(root, std::env::args().any(|arg| arg == "--check")),
        _ => {
            eprintln!("{USAGE}");
            Ok(ExitCode::from(2))
        }
    }
}
