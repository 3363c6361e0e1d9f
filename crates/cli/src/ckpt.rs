//! `lacuna ckpt …`: list, show, check, compare, keep, mend, export and import the checkpoints of a
//! run.

mod export;
mod import;
mod keep;
mod repair;

pub(crate) use repair::try_place;

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use lacuna_checkpoint::catalog::{self, Entry, Status};
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::manifest::{FileEntry, Manifest, TensorEntry};
use lacuna_checkpoint::read::{self, Verified};
use lacuna_checkpoint::retain::{self, Hold};
use lacuna_spec::RunSpec;
use lacuna_types::{RunId, Step, exit};
use serde_json::{Value, json};

use self::export::ExportArgs;
use self::import::ImportArgs;
use self::keep::{GcArgs, HoldArgs};
use self::repair::{DoctorArgs, RebuildArgs};
use crate::Coded;
use crate::client::Output;
use crate::data::talk::{count, io, put, put_json, rows, size, usage};
use crate::verbosity::talk;
use lacuna_spec::units::grouped;

/// `lacuna ckpt`.
#[derive(Args, Debug)]
pub struct CkptArgs {
    #[command(subcommand)]
    command: CkptCommand,
}

/// What to do with checkpoints.
#[derive(Debug, Subcommand)]
pub enum CkptCommand {
    /// List a run's checkpoints, the newest last.
    Ls(LsArgs),
    /// Show one checkpoint.
    Show(ShowArgs),
    /// Read checkpoints back and compare every byte with its digest.
    Verify(VerifyArgs),
    /// Compare two checkpoints tensor by tensor, by their digests.
    Diff(DiffArgs),
    /// Write the parameters for another library.
    Export(ExportArgs),
    /// Make weights of another library the first checkpoint of a new run.
    Import(ImportArgs),
    /// Remove what no rule keeps, and what crashes left.
    Gc(GcArgs),
    /// Pin a checkpoint so that it stays, release it, or list the pins.
    Hold(HoldArgs),
    /// Try whether a place keeps what checkpoints are built on.
    Doctor(DoctorArgs),
    /// Make a lost or damaged manifest again from the parts.
    RebuildManifest(RebuildArgs),
}

/// `lacuna ckpt ls`.
#[derive(Args, Debug)]
pub struct LsArgs {
    /// The run: its spec file, or its folder or URL (checkpoint.to/NAME).
    run: PathBuf,
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// `lacuna ckpt show`.
#[derive(Args, Debug)]
pub struct ShowArgs {
    /// The run: its spec file, or its folder or URL (checkpoint.to/NAME).
    run: PathBuf,
    /// Step of the checkpoint [default: the newest usable one].
    #[arg(long)]
    step: Option<u64>,
    /// Print the run's effective spec instead, TOML.
    #[arg(long)]
    spec: bool,
    /// List the tensors too.
    #[arg(long)]
    tensors: bool,
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// `lacuna ckpt verify`.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// The run: its spec file, or its folder or URL (checkpoint.to/NAME).
    run: PathBuf,
    /// Step of the checkpoint [default: the newest].
    #[arg(long, conflicts_with = "all")]
    step: Option<u64>,
    /// Every checkpoint of the run.
    #[arg(long)]
    all: bool,
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// `lacuna ckpt diff`.
#[derive(Args, Debug)]
pub struct DiffArgs {
    /// A run's spec file, folder or URL, and @STEP for another checkpoint than the newest.
    #[arg(value_name = "RUN[@STEP]")]
    a: String,
    /// The same.
    #[arg(value_name = "RUN[@STEP]")]
    b: String,
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// Runs `lacuna ckpt`.
pub fn ckpt(args: CkptArgs) -> anyhow::Result<u8> {
    match args.command {
        CkptCommand::Ls(args) => ls(&args),
        CkptCommand::Show(args) => show(&args),
        CkptCommand::Verify(args) => verify(&args),
        CkptCommand::Diff(args) => diff(&args),
        CkptCommand::Export(args) => export::run(&args),
        CkptCommand::Import(args) => import::run(&args),
        CkptCommand::Gc(args) => keep::gc(&args),
        CkptCommand::Hold(args) => keep::hold(&args),
        CkptCommand::Doctor(args) => repair::doctor(&args),
        CkptCommand::RebuildManifest(args) => repair::rebuild_manifest(&args),
    }
}

/// Finds the checkpoints that a spec file, a folder or a URL names.
fn run_dir(path: &Path) -> anyhow::Result<RunDir> {
    if let Some(dir) = path.to_str().and_then(RunDir::open_url) {
        return dir.map_err(|error| usage(lacuna_checkpoint::chain(&error)));
    }
    if path.is_file() {
        let spec = crate::spec::read(path, &[])?;
        let dir = RunDir::open(&spec.checkpoint.to, spec.run_id());
        return dir.map_err(|error| usage(lacuna_checkpoint::chain(&error)));
    }
    if !path.is_dir() {
        let shown = path.display();
        return Err(usage(format!("`{shown}` is neither a spec file nor the folder of a run")));
    }
    let full = std::path::absolute(path)?;
    let run: Option<RunId> = full.file_name().and_then(|n| n.to_str()?.parse().ok());
    let dir = run.zip(full.parent()).map(|(run, root)| RunDir::new(root, run));
    if let Some(dir) = dir.filter(|dir| dir.checkpoints().is_dir()) {
        return Ok(dir);
    }
    let inside = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut runs: Vec<String> = inside
        .filter(|path| path.join("ckpt").is_dir())
        .map(|path| format!("`{}`", path.display()))
        .collect();
    runs.sort();
    let hint = match runs.as_slice() {
        [] => String::new(),
        runs => format!("; runs in it: {}", runs.join(", ")),
    };
    Err(usage(format!("`{}` is not the folder of a run with checkpoints{hint}", path.display())))
}

fn list(dir: &RunDir) -> anyhow::Result<Vec<Entry>> {
    catalog::list(dir).map_err(|error| io(&error))
}

/// Returns the usable checkpoint at `step`, or the newest one.
fn pick(dir: &RunDir, step: Option<u64>) -> anyhow::Result<Manifest> {
    let entries = list(dir)?;
    let Some(step) = step else {
        return match catalog::newest_good(&entries) {
            Some(manifest) => Ok(manifest.clone()),
            None => Err(none_usable(dir, &entries)),
        };
    };
    match find(dir, entries, step)?.status {
        Status::Good(manifest) => Ok(*manifest),
        Status::Damaged { reason } => Err(Coded::error(exit::IO, reason)),
    }
}

fn none_usable(dir: &RunDir, entries: &[Entry]) -> anyhow::Error {
    let reasons: String = entries
        .iter()
        .filter_map(|entry| match &entry.status {
            Status::Damaged { reason } => Some(format!("\n  {reason}")),
            Status::Good(_) => None,
        })
        .collect();
    let text = format!("`{}` has no usable checkpoint{reasons}", dir.path().display());
    Coded::error(exit::IO, text)
}

/// Takes the entry of `step` out of a list.
fn find(dir: &RunDir, entries: Vec<Entry>, step: u64) -> anyhow::Result<Entry> {
    let steps: Vec<String> = entries.iter().map(|entry| entry.step.to_string()).collect();
    entries.into_iter().find(|entry| entry.step == Step(step)).ok_or_else(|| {
        let has = if steps.is_empty() { "none".to_string() } else { steps.join(", ") };
        usage(format!("`{}` has no checkpoint at step {step}; it has {has}", dir.path().display()))
    })
}

fn bytes(manifest: &Manifest) -> u64 {
    manifest.files.iter().map(|file| file.bytes).sum()
}

fn loss(loss: Option<f64>) -> String {
    loss.map_or("-".to_string(), |loss| format!("{loss:.4}"))
}

/// Tells whether a checkpoint is known to have been read back; a mark that cannot be read says
/// nothing.
fn is_verified(dir: &RunDir, manifest: &Manifest) -> bool {
    catalog::is_verified(dir, manifest).unwrap_or(false)
}

/// Says in words what is known of a usable checkpoint.
fn state(dir: &RunDir, manifest: &Manifest, holds: &[Hold]) -> String {
    let mut out = vec![if is_verified(dir, manifest) { "verified" } else { "good" }.to_string()];
    if !manifest.state.finite {
        out.push("not finite".to_string());
    }
    let held = holds.iter().filter(|hold| hold.step == manifest.step());
    out.extend(held.map(|hold| format!("held by {}", hold.name)));
    out.join(", ")
}

fn ls(args: &LsArgs) -> anyhow::Result<u8> {
    let dir = run_dir(&args.run)?;
    let entries = list(&dir)?;
    let holds = retain::holds(&dir).map_err(|error| io(&error))?;
    if entries.is_empty() {
        talk!("`{}` has no checkpoints", dir.path().display());
    }
    if args.output == Output::Json {
        let entry = |entry: &Entry| match &entry.status {
            Status::Good(manifest) => summary(&dir, manifest),
            Status::Damaged { reason } => {
                json!({ "step": entry.step.0, "status": "damaged", "reason": reason })
            }
        };
        put_json(&entries.iter().map(entry).collect())?;
        return Ok(exit::OK);
    }
    let mut text = format!(
        "{:>9}  {:>5}  {:<20}  {:>5}  {:>9}  {:>7}  {}\n",
        "STEP", "EPOCH", "CREATED", "PARTS", "SIZE", "LOSS", "STATE"
    );
    for entry in &entries {
        match &entry.status {
            Status::Good(manifest) => {
                let facts = &manifest.state.facts;
                text += &format!(
                    "{:>9}  {:>5}  {:<20}  {:>5}  {:>9}  {:>7}  {}\n",
                    grouped(manifest.step),
                    facts.epoch,
                    manifest.created,
                    manifest.world_size,
                    size(bytes(manifest)),
                    loss(facts.loss.last),
                    state(&dir, manifest, &holds)
                );
            }
            Status::Damaged { reason } => {
                text += &format!("{:>9}  damaged: {reason}\n", grouped(entry.step.0));
            }
        }
    }
    put(&text)?;
    Ok(exit::OK)
}

/// Describes a usable checkpoint as JSON.
fn summary(dir: &RunDir, manifest: &Manifest) -> Value {
    let facts = &manifest.state.facts;
    let file = |file: &FileEntry| {
        let crc64 = file.crc64.to_string();
        json!({ "name": file.name, "bytes": file.bytes, "crc64": crc64 })
    };
    json!({
        "run": manifest.run, "step": manifest.step, "status": "good",
        "verified": is_verified(dir, manifest), "finite": manifest.state.finite,
        "created": manifest.created, "generation": manifest.generation,
        "attempt": manifest.attempt.to_string(), "coord_epoch": manifest.coord_epoch,
        "manifest": manifest.seal, "parent": manifest.parent,
        "state_digest": manifest.state_digest.to_string(), "bytes": bytes(manifest),
        "world_size": manifest.world_size, "n_tensors": manifest.tensors.len(),
        "facts": facts, "updates": manifest.state.counters.updates,
        "folder": dir.attempt(manifest.step(), manifest.attempt),
        "files": manifest.files.iter().map(file).collect::<Vec<Value>>(),
    })
}

fn show(args: &ShowArgs) -> anyhow::Result<u8> {
    let dir = run_dir(&args.run)?;
    let manifest = pick(&dir, args.step)?;
    if args.spec {
        put(&manifest.spec)?;
        return Ok(exit::OK);
    }
    let tensors = manifest.tensors.iter();
    if args.output == Output::Json {
        let mut value = summary(&dir, &manifest);
        if args.tensors {
            let tensor = |(name, t): (&String, &TensorEntry)| {
                let (dtype, crc64) = (t.dtype.name(), t.crc64.to_string());
                json!({ "name": name, "dtype": dtype, "shape": t.shape, "crc64": crc64 })
            };
            value["tensors"] = tensors.map(tensor).collect();
        }
        put_json(&value)?;
        return Ok(exit::OK);
    }
    let holds = retain::holds(&dir).map_err(|error| io(&error))?;
    let mut text = rows(&describe(&dir, &manifest, &holds));
    if args.tensors {
        text += "\n";
        for (name, tensor) in tensors {
            let shape = format!("{:?}", tensor.shape);
            text += &format!("{}  {:<4} {shape:<18} {name}\n", tensor.crc64, tensor.dtype.name());
        }
    }
    put(&text)?;
    Ok(exit::OK)
}

fn describe(dir: &RunDir, manifest: &Manifest, holds: &[Hold]) -> Vec<(&'static str, String)> {
    let facts = &manifest.state.facts;
    let counters = &manifest.state.counters;
    let parent = match &manifest.parent {
        Some(parent) => format!("step {} ({})", parent.step, parent.manifest),
        None => "none".to_string(),
    };
    let skipped = match counters.non_finite {
        0 => String::new(),
        n => format!(", {} skipped as not finite", count(n, "step")),
    };
    let steps = grouped(manifest.step);
    let parts = count(manifest.files.len() as u64, "part");
    vec![
        ("run", manifest.run.clone()),
        ("step", format!("{steps}, {}{skipped}", count(counters.updates, "update"))),
        ("data", format!("epoch {}, {}", facts.epoch, count(facts.samples, "sample"))),
        ("state", state(dir, manifest, holds)),
        (
            "loss",
            format!("{}, mean of 100 steps {}", loss(facts.loss.last), loss(facts.loss.mean100)),
        ),
        ("created", manifest.created.clone()),
        ("digest", manifest.state_digest.to_string()),
        ("manifest", manifest.seal.clone()),
        ("parent", parent),
        ("saved by", format!("generation {}, {}", manifest.generation, facts.build)),
        ("machines", facts.probe_class.clone()),
        ("seed", facts.seed.to_string()),
        ("maths", facts.spec_digest.clone()),
        ("data set", facts.data_fingerprint.clone()),
        ("tensors", grouped(manifest.tensors.len() as u64)),
        ("size", format!("{} in {parts}", size(bytes(manifest)))),
        ("folder", dir.attempt(manifest.step(), manifest.attempt).display().to_string()),
    ]
}

/// A checkpoint that was looked at whole.
struct Checked {
    step: Step,
    bytes: u64,
    problems: Vec<String>,
}

fn verify(args: &VerifyArgs) -> anyhow::Result<u8> {
    let dir = run_dir(&args.run)?;
    let mut entries = list(&dir)?;
    if entries.is_empty() {
        return Err(none_usable(&dir, &entries));
    }
    match args.step {
        Some(step) => entries = vec![find(&dir, entries, step)?],
        None if args.all => entries.sort_by_key(|entry| entry.step),
        None => {
            // Damaged ones that are newer are what a resume would stumble over first.
            let newest = catalog::newest_good(&entries).map(Manifest::step);
            entries.retain(|entry| newest.is_none_or(|newest| entry.step >= newest));
            entries.retain(|e| Some(e.step) == newest || e.good().is_none());
            entries.sort_by_key(|entry| entry.step);
        }
    }
    let checked: Vec<Checked> = entries.iter().filter_map(|entry| check(&dir, entry)).collect();
    let is_clean = checked.iter().all(|checked| checked.problems.is_empty());
    match args.output {
        Output::Json => {
            let one = |c: &Checked| {
                let verified = c.problems.is_empty();
                let Checked { step, bytes, problems } = c;
                json!({
                    "step": step.0, "verified": verified, "bytes": bytes, "problems": problems,
                })
            };
            put_json(&checked.iter().map(one).collect())?;
        }
        Output::Table => put(&checked.iter().map(verify_line).collect::<String>())?,
    }
    Ok(if is_clean { exit::OK } else { exit::IO })
}

/// Checks one checkpoint; `None` if retention deleted it meanwhile.
fn check(dir: &RunDir, entry: &Entry) -> Option<Checked> {
    let step = entry.step;
    // One that was set aside is read again: the medium may have been at fault.
    let aside = match &entry.status {
        Status::Damaged { .. } => catalog::look(dir, step).ok().flatten(),
        Status::Good(_) => None,
    };
    let (bytes, problems) = match &aside.as_ref().unwrap_or(entry).status {
        Status::Damaged { reason } => (0, vec![reason.clone()]),
        Status::Good(manifest) => {
            talk!("reading step {step}: {}", size(bytes(manifest)));
            let Verified { bytes, problems, .. } = read_back(dir, manifest);
            (bytes, problems)
        }
    };
    // Deleting starts with the manifest, so that what has none is no checkpoint any more.
    if !problems.is_empty() && matches!(catalog::find(dir, step), Ok(None)) {
        talk!("step {step} was deleted meanwhile");
        return None;
    }
    Some(Checked { step, bytes, problems })
}

fn verify_line(checked: &Checked) -> String {
    if checked.problems.is_empty() {
        return format!("step {}: verified, {}\n", checked.step, size(checked.bytes));
    }
    let n = count(checked.problems.len() as u64, "problem");
    let problems: String = checked.problems.iter().map(|p| format!("  {p}\n")).collect();
    format!("step {}: damaged, {n}\n{problems}", checked.step)
}

/// Reads a checkpoint whole and notes beside it that it is sound.
fn read_back(dir: &RunDir, manifest: &Manifest) -> Verified {
    match catalog::verify_and_mark(dir, manifest) {
        Ok(verified) => verified,
        Err(error) => {
            let why = lacuna_checkpoint::chain(&error);
            eprintln!("warning: the result cannot be noted beside the checkpoint: {why}");
            read::verify(dir, manifest)
        }
    }
}

/// Parses the spec that a checkpoint carries.
fn stored_spec(manifest: &Manifest) -> anyhow::Result<RunSpec> {
    let name = format!("spec of checkpoint step {}", manifest.step);
    let loaded = lacuna_spec::parse_text(&name, &manifest.spec, &[]);
    Ok(loaded.map_err(|error| io(&error))?.spec)
}

/// Splits `RUN@STEP`; a name may hold an `@` of its own.
fn split_step(text: &str) -> (&Path, Option<u64>) {
    match text.rsplit_once('@').and_then(|(run, step)| Some((run, step.parse().ok()?))) {
        Some((run, step)) => (Path::new(run), Some(step)),
        None => (Path::new(text), None),
    }
}

/// How the tensors of two checkpoints compare.
#[derive(Debug, Default)]
struct TensorDiff {
    n_same: u64,
    differ: Vec<String>,
    only_a: Vec<String>,
    only_b: Vec<String>,
}

impl TensorDiff {
    fn of(a: &Manifest, b: &Manifest) -> Self {
        let mut out = TensorDiff::default();
        for (name, tensor) in &a.tensors {
            match b.tensors.get(name) {
                None => out.only_a.push(name.clone()),
                Some(other) => {
                    let same = tensor.crc64 == other.crc64
                        && tensor.shape == other.shape
                        && tensor.dtype == other.dtype;
                    match same {
                        true => out.n_same += 1,
                        false => out.differ.push(name.clone()),
                    }
                }
            }
        }
        let only_b = b.tensors.keys().filter(|name| !a.tensors.contains_key(*name));
        out.only_b = only_b.cloned().collect();
        out
    }
}

/// Compares two checkpoints; ends with 1 where their states differ, as `diff` does.
fn diff(args: &DiffArgs) -> anyhow::Result<u8> {
    let load = |text: &str| {
        let (path, step) = split_step(text);
        pick(&run_dir(path)?, step)
    };
    let (a, b) = (load(&args.a)?, load(&args.b)?);
    let same = a.state_digest == b.state_digest;
    let tensors = TensorDiff::of(&a, &b);
    let fields = lacuna_spec::diff(&stored_spec(&a)?, &stored_spec(&b)?);
    match args.output {
        Output::Json => {
            let side = |m: &Manifest| {
                let digest = m.state_digest.to_string();
                json!({ "run": m.run, "step": m.step, "state_digest": digest })
            };
            let fields: Vec<String> = fields.iter().map(ToString::to_string).collect();
            put_json(&json!({
                "same_state": same, "a": side(&a), "b": side(&b), "n_same": tensors.n_same,
                "differ": tensors.differ, "only_a": tensors.only_a, "only_b": tensors.only_b,
                "spec": fields,
            }))?;
        }
        Output::Table => {
            let mut text = String::new();
            for (name, m) in [("a", &a), ("b", &b)] {
                text += &format!("{name}  {} step {}  state {}\n", m.run, m.step, m.state_digest);
            }
            let words = if same { "the same state" } else { "different states" };
            let n_differ = tensors.differ.len() as u64;
            let n_same = count(tensors.n_same, "equal tensor");
            text += &format!("{words}: {n_same}, {} that differ\n", grouped(n_differ));
            let lists = [("!=", &tensors.differ), ("< ", &tensors.only_a), ("> ", &tensors.only_b)];
            for (mark, names) in lists {
                text += &names.iter().map(|name| format!("{mark} {name}\n")).collect::<String>();
            }
            for field in &fields {
                text += &format!("spec {field}\n");
            }
            put(&text)?;
        }
    }
    Ok(if same { exit::OK } else { exit::FAILED })
}

#[cfg(test)]
mod tests;
