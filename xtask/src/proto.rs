//! `cargo xtask proto`: compiles `proto/` to the committed Rust code of `crates/api`.
//!
//! The compiler (protox, no protoc) is behind the feature `codegen`: it takes minutes to build, and
//! whoever does not touch the protos needs none of it.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use prost::Message as _;

/// Files compiled, relative to `proto/`.
const FILES: &[&str] = &["lacuna/v1/common.proto", "lacuna/v1/run.proto", "lacuna/v1/worker.proto"];
/// Where the code stands, relative to the root.
const OUT: &str = "crates/api/src/generated";
/// The code.
const CODE: &str = "lacuna.v1.rs";
/// The protos in the form that reflection answers with.
const DESCRIPTORS: &str = "lacuna.v1.bin";

/// Writes the code, or with `check` compares it with what is there.
pub fn run(root: &Path, check: bool) -> Result<ExitCode> {
    let fresh = tempdir(root)?;
    let proto = root.join("proto");
    let files = FILES.iter().map(|file| proto.join(file));
    let descriptors = protox::compile(files, [&proto]).context("compile the protos")?;
    let known = descriptors.encode_to_vec();
    tonic_prost_build::configure()
        .out_dir(&fresh)
        .bytes(".lacuna.v1.Prepare.plan")
        .compile_fds(descriptors)
        .context("generate the code")?;
    let code = std::fs::read(fresh.join(CODE)).context("read the generated code")?;
    std::fs::remove_dir_all(&fresh).context("remove the temporary folder")?;
    let out = root.join(OUT);
    for (name, content) in [(CODE, code), (DESCRIPTORS, known)] {
        let target = out.join(name);
        if !check {
            std::fs::create_dir_all(&out).context("make the folder")?;
            std::fs::write(&target, content).context("write the generated code")?;
        } else if std::fs::read(&target).context("read what is committed")? != content {
            eprintln!("{} is not what proto/ gives: run `make proto`", target.display());
            return Ok(ExitCode::FAILURE);
        }
    }
    if check {
        println!("generated code is current");
    }
    Ok(ExitCode::SUCCESS)
}

fn tempdir(root: &Path) -> Result<std::path::PathBuf> {
    let dir = root.join("target").join(format!("proto-{}", std::process::id()));
    std::fs::create_dir_all(&dir).context("make a temporary folder")?;
    Ok(dir)
}
