//! `lacuna ckpt doctor` and `rebuild-manifest`: is a place fit for checkpoints, and what if a
//! manifest is lost.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::Args;
use lacuna_checkpoint::doctor::{self, Examined};
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::rebuild::{rebuild, restore};
use lacuna_checkpoint::storage::Published;
use lacuna_coordinator::clock::rfc3339;
use lacuna_data::is_url;
use lacuna_recipe::state::Layout;
use lacuna_types::{RunId, Step, exit};

use super::run_dir;
use crate::Coded;
use crate::data::talk::{io, put, size, usage};
use crate::verbosity::talk;

/// `lacuna ckpt doctor`.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// A run's spec file, or a folder or URL for checkpoints (checkpoint.to).
    place: PathBuf,
}

/// `lacuna ckpt rebuild-manifest`.
#[derive(Args, Debug)]
pub struct RebuildArgs {
    /// The run: its spec file, or its folder (checkpoint.to/NAME).
    run: PathBuf,
    /// Step of the checkpoint whose manifest is lost or damaged.
    #[arg(long)]
    step: u64,
    /// Check that it can be done; write nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Tries whether a place keeps its promises.
pub(super) fn doctor(args: &DoctorArgs) -> anyhow::Result<u8> {
    let (dir, wants) = place(&args.place)?;
    let examined = doctor::examine(dir.storage(), dir.root(), doctor::THOROUGH_BYTES);
    let Examined { findings, free_bytes, writes_direct } = &examined;
    let mut text = String::new();
    for finding in findings {
        let how = finding.problem.as_deref().unwrap_or("yes");
        text += &format!("{:<32} {how}\n", finding.what);
    }
    let direct = match writes_direct {
        Some(true) => "yes",
        Some(false) => "no, through the page cache",
        None => "not known",
    };
    text += &format!("{:<32} {direct}\n", "writes past the page cache");
    let wants = wants.map(doctor::room_for);
    if let Some(free) = free_bytes {
        let need = wants.map_or(String::new(), |n| format!(", the run wants {}", size(n)));
        text += &format!("{:<32} {}{need}\n", "free", size(*free));
    }
    put(&text)?;
    if examined.is_sound() && !wants.is_some_and(|wants| examined.lacks(wants)) {
        return Ok(exit::OK);
    }
    let shown = dir.root().display();
    Err(Coded::error(exit::IO, format!("`{shown}` is not fit for checkpoints as it is")))
}

/// Tries a place for checkpoints as quickly as a run does before it starts.
pub(crate) fn try_place(text: &str) -> anyhow::Result<()> {
    let (dir, _) = place(Path::new(text))?;
    let examined = doctor::examine(dir.storage(), dir.root(), doctor::BRIEF_BYTES);
    match examined.problem() {
        None => Ok(()),
        Some(problem) => Err(Coded::error(exit::IO, problem)),
    }
}

/// Returns where checkpoints go, and the bytes of one if the run is known.
fn place(path: &Path) -> anyhow::Result<(RunDir, Option<u64>)> {
    if path.is_file() {
        let spec = crate::spec::read(path, &[])?;
        let n_params = Layout::new(spec.params()).numel() as u64;
        // Parameters and both moments, f32.
        return Ok((run_dir(path)?, Some(n_params * 12)));
    }
    if let Some(url) = path.to_str().filter(|text| is_url(text)) {
        return Ok((RunDir::open(url, none()).map_err(|error| io(&error))?, None));
    }
    if !path.is_dir() {
        let shown = path.display();
        return Err(usage(format!("`{shown}` is neither a spec file nor a folder")));
    }
    Ok((RunDir::new(path, none()), None))
}

/// A name for a place that is looked at without a run.
fn none() -> RunId {
    "doctor".parse().expect("a name")
}

/// Makes a lost manifest again.
pub(super) fn rebuild_manifest(args: &RebuildArgs) -> anyhow::Result<u8> {
    let dir = run_dir(&args.run)?;
    let step = Step(args.step);
    talk!("reading the parts of step {step}");
    let manifest = rebuild(&dir, step, rfc3339(SystemTime::now())).map_err(|error| io(&error))?;
    if args.dry_run {
        put(&format!("step {step} can be put together again: {}\n", manifest.seal))?;
        return Ok(exit::OK);
    }
    match restore(&dir, &manifest).map_err(|error| io(&error))? {
        Published::Created => put(&format!("step {step} is there again: {}\n", manifest.seal))?,
        Published::Exists => {
            let text = format!("step {step} has got a manifest meanwhile");
            return Err(Coded::error(exit::IO, text));
        }
    }
    Ok(exit::OK)
}
