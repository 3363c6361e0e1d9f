//! `lacuna ckpt import`: weights of another library as the first checkpoint of a new run.

use std::path::PathBuf;
use std::time::SystemTime;

use clap::{Args, ValueEnum};
use lacuna_checkpoint::import::{
    ImportError, Imported, Start, StartError, Weights, check_fresh, commit_start, import,
};
use lacuna_checkpoint::layout::RunDir;
use lacuna_coordinator::catalogue::facts;
use lacuna_coordinator::clock::rfc3339;
use lacuna_recipe::keymap::import::{MapError, Wanted};
use lacuna_types::{Step, exit};

use crate::data::talk::{count, io, put, usage};
use crate::spec;
use crate::verbosity::talk;

/// `lacuna ckpt import`.
#[derive(Args, Debug)]
pub struct ImportArgs {
    /// A .safetensors file, or a folder of transformers (one file, or several with an index).
    file: PathBuf,
    /// The spec of the run that is to start from it; the run must have no checkpoint yet.
    #[arg(long, value_name = "SPEC")]
    run: PathBuf,
    /// Set a key of the spec, `train.seed=3`; `lacuna train` needs the same.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Whose names the file has.
    #[arg(long, value_enum, default_value = "auto")]
    layout: Layout,
}

/// Layouts of imported files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Layout {
    /// Whichever the keys show.
    Auto,
    /// The reference's names, with or without a decoder.
    Mae,
    /// timm's names, the encoder alone; a classifier is left out.
    Timm,
    /// The names of transformers, whole, `ViTMAEModel` or `ViTModel`.
    Hf,
}

impl Layout {
    fn wanted(self) -> Wanted {
        match self {
            Layout::Auto => Wanted::Any,
            Layout::Mae => Wanted::Mae,
            Layout::Timm => Wanted::Timm,
            Layout::Hf => Wanted::Hf,
        }
    }
}

/// Imports weights.
pub(super) fn run(args: &ImportArgs) -> anyhow::Result<u8> {
    let mut spec = spec::read(&args.run, &args.overrides)?;
    if spec.task.is_some() {
        return Err(usage(format!(
            "`{}` has a [task], whose run begins with the encoder that it names: set \
             `task.encoder = \"{}\"` instead of importing",
            args.run.display(),
            args.file.display()
        )));
    }
    let dir = RunDir::open(&spec.checkpoint.to, spec.run_id());
    let dir = dir.map_err(|error| usage(lacuna_checkpoint::chain(&error)))?;
    // Before files are read that may be large, and again before anything is written.
    check_fresh(&dir).map_err(refused)?;
    let request = spec::request(&mut spec, false)?;
    let weights = Weights::open(&args.file).map_err(unreadable)?;
    let imported = import(&weights, &spec.model, spec.train.seed, args.layout.wanted());
    let Imported { params, form, n_taken, notices } = imported.map_err(unreadable)?;
    for notice in &notices {
        talk!("note: {notice}");
    }
    let start = Start {
        config: &spec.model,
        params: &params,
        batch: spec.train.batch,
        facts: facts(&spec, request.n_samples, &request.fingerprint, Step(0)),
        spec: spec.effective_toml(),
        created: rfc3339(SystemTime::now()),
    };
    let committed = commit_start(&dir, &start).map_err(refused)?;
    let (file, tensors) = (args.file.display(), count(n_taken as u64, "tensor"));
    let sets: String = args.overrides.iter().map(|set| format!(" --set {set:?}")).collect();
    put(&format!(
        "{}\n{tensors} of `{file}`: {form}\nrun {} step 0: state {:016x}, {}\n\n\
         to train from it:\n  lacuna train {}{sets}\n",
        dir.manifest(committed.step).display(),
        dir.run(),
        committed.state_digest,
        committed.manifest,
        args.run.display(),
    ))?;
    Ok(exit::OK)
}

/// Tells files that do not fit from disks that do not read.
fn unreadable(error: ImportError) -> anyhow::Error {
    match error {
        ImportError::Fs(_) | ImportError::Unsound { .. } => io(&error),
        ImportError::Map(MapError::OtherLayout { found }) => {
            usage(format!("the file has {found}: leave --layout out, or name that one"))
        }
        _ => usage(lacuna_checkpoint::chain(&error)),
    }
}

fn refused(error: StartError) -> anyhow::Error {
    match error {
        StartError::Begun { .. } | StartError::Claimed { .. } => usage(error.to_string()),
        _ => io(&error),
    }
}
