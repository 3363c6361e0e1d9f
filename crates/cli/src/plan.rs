//! `lacuna plan` and `lacuna init`: what a spec comes to, and a spec to start from.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use lacuna_data::Dataset;
use lacuna_data::dataset::OpenError;
use lacuna_spec::{Loaded, RunSpec, SpecError, parse_file, parse_text, presets};
use lacuna_types::{RunId, exit};

use crate::client::Output;
use crate::data::talk::{io as io_error, put, usage};
use crate::data_check;
use crate::verbosity::talk;

/// `lacuna plan`.
#[derive(Args, Debug)]
pub struct PlanArgs {
    /// The run's spec.
    file: PathBuf,
    /// Lay key=value over the spec.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Numbers of workers to show instead of the spec's: 4 or 1..8.
    #[arg(long, value_name = "MIN..MAX")]
    workers: Option<String>,
    /// Print the spec with everything filled in, and where each value comes from.
    #[arg(long)]
    effective: bool,
    /// How the plan is printed.
    #[arg(long, short, value_enum, default_value = "table", conflicts_with = "effective")]
    output: Output,
}

/// `lacuna init`.
#[derive(Args, Debug)]
pub struct InitArgs {
    /// Spec that the new one is based on.
    #[arg(long, default_value = "demo")]
    preset: String,
    /// File to write; it must not exist.
    #[arg(long, default_value = "run.toml", value_name = "FILE")]
    out: PathBuf,
    /// Name of the run [default: the preset's].
    #[arg(long)]
    name: Option<String>,
    /// Folder of the packed data, as seen from the file.
    #[arg(long, default_value = "data/train", value_name = "DIR")]
    data: String,
}

/// Keys that a new spec writes; the others stand there as comments.
const WRITTEN: &[&str] = &[
    "schema",
    "name",
    "data.shards",
    "train.duration",
    "train.seed",
    "elastic.workers",
    "checkpoint.to",
    "checkpoint.every",
    "task.classes",
];

/// Runs `lacuna plan`.
pub fn plan(args: PlanArgs) -> anyhow::Result<u8> {
    let mut overrides = args.set;
    if let Some(workers) = &args.workers {
        overrides.push(format!("elastic.workers=\"{}\"", range_of(workers)?));
    }
    let read = |path: &Path| std::fs::read_to_string(path);
    let loaded = match parse_file(&args.file, &overrides, &read) {
        Ok(loaded) => loaded,
        Err(SpecError::Invalid(problems)) => {
            eprintln!("{problems}");
            return Ok(exit::USAGE);
        }
        Err(error) => return Err(usage(lacuna_checkpoint::chain(&error))),
    };
    if args.effective {
        put(&loaded.effective_toml())?;
        return Ok(exit::OK);
    }
    let Loaded { mut spec, .. } = loaded;
    spec.resolve_paths(&std::env::current_dir().context("find the current folder")?);
    let (n_samples, code, misfits) = match Dataset::open(Path::new(&spec.data.shards)) {
        Ok(dataset) => (Some(dataset.n_samples()), exit::OK, data_check::misfits(&dataset, &spec)),
        Err(error) => {
            let code = tell_no_data(&spec, error);
            (None, code, Vec::new())
        }
    };
    let mut report = lacuna_spec::plan(&spec, n_samples);
    report.warnings.extend(misfits);
    match args.output {
        Output::Table => put(&report.to_string())?,
        Output::Json => put(&format!("{}\n", report.to_json()))?,
    }
    match report.data {
        Some(Err(_)) => Ok(exit::USAGE),
        _ => Ok(code),
    }
}

/// Reads the numbers of `--workers`, `8`, `2..8` or `2:8`, as a specification has them.
fn range_of(workers: &str) -> anyhow::Result<String> {
    let text = workers.replace("..", ":");
    let (min, max) = text.split_once(':').unwrap_or((&text, &text));
    match (min.parse::<u32>(), max.parse::<u32>()) {
        (Ok(min @ 1..), Ok(max)) if min <= max => Ok(format!("{min}:{max}")),
        _ => {
            Err(usage(format!("--workers `{workers}` is not a number of workers, like 8 or 2..8")))
        }
    }
}

/// Says why the data's size is not known; returns the exit code that follows from it.
fn tell_no_data(spec: &RunSpec, error: OpenError) -> u8 {
    let shards = &spec.data.shards;
    match &error {
        OpenError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
            talk!("data set `{shards}` does not exist yet: planned without it");
            exit::OK
        }
        _ => {
            let why = lacuna_checkpoint::chain(&error);
            eprintln!("error: data set `{shards}` cannot be used: {why}; planned without it");
            exit::IO
        }
    }
}

/// Runs `lacuna init`.
pub fn init(args: InitArgs) -> anyhow::Result<u8> {
    let Some(preset) = presets::find(&args.preset) else {
        let known: Vec<&str> = presets::names().collect();
        let (name, known) = (args.preset.escape_debug(), known.join(", "));
        return Err(usage(format!("there is no preset `{name}`; there are {known}")));
    };
    let name = args.name.as_deref().unwrap_or(preset.name);
    let name: RunId = name.parse().map_err(|e: lacuna_types::NameError| usage(e.to_string()))?;
    let text = new_spec(preset.name, &name, &args.data)?;
    let shown = args.out.display();
    let mut file = match OpenOptions::new().write(true).create_new(true).open(&args.out) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(usage(format!("`{shown}` exists; choose another name with --out")));
        }
        Err(error) => return Err(io_error(&error).context(format!("create `{shown}`"))),
    };
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    written.map_err(|error| io_error(&error).context(format!("write `{shown}`")))?;
    put(&format!("{shown}\n"))?;
    talk!("next: lacuna plan {shown}; lacuna train {shown}");
    Ok(exit::OK)
}

/// Writes a spec based on a preset: a few keys, and every other one as a comment with its value.
fn new_spec(preset: &str, name: &RunId, shards: &str) -> anyhow::Result<String> {
    let toml = |text: &str| toml_string(text);
    let least = format!(
        "schema = 1\nname = {}\nbase = \"preset:{preset}\"\n[data]\nshards = {}\n",
        toml(name.as_str()),
        toml(shards)
    );
    let loaded = parse_text("new spec", &least, &[]).map_err(|error| {
        usage(format!("the preset `{preset}` alone is not a run, choose another one: {error}"))
    })?;
    let mut out = format!(
        "# A run of Lacuna, based on the preset `{preset}`.\n\
         # Lines that start with # show what holds if nothing is written: remove the # and change \
         them.\n\
         # maths: changes the result; placement: only where and how fast; display: only what is \
         shown.\n\n"
    );
    let mut section = String::new();
    for line in loaded.spec.effective_toml().lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = format!("{name}.");
        }
        let is_key = !line.is_empty() && !line.starts_with(['[', '#']);
        let key = line.split(" = ").next().unwrap_or_default();
        let is_comment = is_key && !WRITTEN.contains(&format!("{section}{key}").as_str());
        // Two spaces less keep the remarks in their column.
        let line =
            if is_comment { format!("# {}", line.replacen("  # ", "# ", 1)) } else { line.into() };
        out += line.trim_end();
        out += "\n";
        if section.is_empty() && key == "name" {
            out += &format!("base = \"preset:{preset}\"\n");
        }
    }
    Ok(out)
}

/// JSON's escapes are TOML's too, except that TOML also forbids a bare DEL.
fn toml_string(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

#[cfg(test)]
mod tests;
