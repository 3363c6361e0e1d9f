//! `lacuna data …`: make data sets, check them, look at them.

mod bench;
mod classes;
mod index;
mod inspect;
mod simulate;
mod subset;
pub(crate) mod talk;
mod verify;

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::thread;

use clap::{Args, Subcommand, ValueEnum};
use lacuna_data::mds::MDS_INDEX_NAME;
use lacuna_data::pack::{
    Existing, PackConfig, PackError, PackOutcome, PackReport, PackSource, SHARD_BYTES_DEFAULT, pack,
};
use lacuna_data::synthetic::SyntheticSpec;
use lacuna_data::{Dataset, ImageShape, SkipList};
use lacuna_spec::units::parse_bytes;
use lacuna_types::exit;
use serde_json::json;

use self::bench::BenchArgs;
use self::index::IndexArgs;
use self::inspect::{OrderArgs, StatsArgs};
use self::simulate::SimulateArgs;
use self::subset::SubsetArgs;
use self::talk::{Meter, count, io, put, put_json, rows, size, usage};
use self::verify::VerifyArgs;
use crate::client::Output;
use crate::verbosity::talk;

/// `lacuna data`.
#[derive(Args, Debug)]
pub struct DataArgs {
    #[command(subcommand)]
    command: DataCommand,
}

/// What to do with data.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Pack a folder of images, or IDX, MDS or Parquet files, into shards with an index.
    Pack(PackArgs),
    /// Generate images and pack them: data for machines without any.
    Synthetic(SyntheticArgs),
    /// Pack a labelled part of a data set that has every class.
    Subset(SubsetArgs),
    /// Write the index of a folder of shards, or of shards behind a URL.
    Index(IndexArgs),
    /// Show what the machines of a run will download, and the room that this needs.
    Simulate(SimulateArgs),
    /// Check every shard and decode every sample once; take bad samples out with `--exclude`.
    Verify(VerifyArgs),
    /// Show sizes, channel statistics and, with a patch size, the losses to beat.
    Stats(StatsArgs),
    /// Show which samples the slots of a step hold.
    ShowOrder(OrderArgs),
    /// Measure how many images a second this machine decodes.
    Bench(BenchArgs),
}

/// `lacuna data pack`.
#[derive(Args, Debug)]
pub struct PackArgs {
    /// A folder of images, IDX files, MDS shards or Parquet files; a Parquet file; an IDX file of
    /// images, or one of images and its labels.
    ///
    /// Of a folder of images, the folders directly in it are classes, numbered from 0 by name, if
    /// there are two or more and no image lies beside them. Otherwise there are no labels.
    #[arg(required = true, num_args = 1.., value_name = "SRC")]
    sources: Vec<PathBuf>,
    /// Folder that gets shards and index.
    out: PathBuf,
    /// What SRC holds.
    #[arg(long, value_enum, default_value = "auto")]
    from: Kind,
    /// IDX file of labels; otherwise found by its name beside the images.
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Take the classes of a folder of images, and their numbers, from a packed data set (folder or
    /// URL) or from a text file with a name on each line.
    ///
    /// A folder of another name is an error. A class may have no images, so that a part of a data
    /// set (val, test) gets the numbers of the whole whatever it lacks.
    #[arg(long, value_name = "FROM")]
    classes: Option<PathBuf>,
    /// Which part of SRC: picks IDX or Parquet files called train… or t10k…/test…/val…, or such a
    /// folder.
    #[arg(long, value_enum)]
    split: Option<Split>,
    #[command(flatten)]
    shards: ShardArgs,
}

/// How shards are made.
#[derive(Args, Debug)]
struct ShardArgs {
    /// A shard is closed before it would grow beyond this [default: 256MiB].
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    shard_size: Option<u64>,
    /// Shards are called NAME-000000.tar and on [default: the name of OUT].
    #[arg(long)]
    name: Option<String>,
    /// Remove another data set that is in OUT.
    #[arg(long)]
    replace: bool,
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// Kinds of input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// IDX, MDS or Parquet files where there are some, else images.
    Auto,
    /// PNG, JPEG and WebP images, at any depth; sub-folders may be classes.
    Folder,
    /// IDX files, gzipped or not.
    Idx,
    /// MosaicML's MDS shards with their index.json.
    Mds,
    /// Parquet files as of Hugging Face (builds with the feature `parquet`).
    Parquet,
}

/// Parts of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Split {
    /// For training.
    Train,
    /// For evaluation.
    Test,
}

/// `lacuna data synthetic`.
#[derive(Args, Debug)]
pub struct SyntheticArgs {
    /// Folder that gets shards and index.
    out: PathBuf,
    /// Number of images.
    #[arg(long, default_value_t = 4096)]
    n: u64,
    /// Height and width of an image.
    #[arg(long, value_parser = parse_size, default_value = "28x28", value_name = "HxW")]
    size: [u32; 2],
    /// 1 (grey) or 3 (colour).
    #[arg(long, default_value_t = 1)]
    channels: u32,
    /// Selects the images.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    shards: ShardArgs,
}

/// Runs `lacuna data`.
pub fn data(args: DataArgs) -> anyhow::Result<u8> {
    match args.command {
        DataCommand::Pack(args) => {
            let source = classes::numbered(choose_source(&args)?, args.classes.as_deref())?;
            if let Some(parts) = classes::parts(&source) {
                talk!("warning: {parts}");
            }
            run_pack(&source, &args.out, &args.shards)
        }
        DataCommand::Synthetic(args) => run_synthetic(&args),
        DataCommand::Subset(args) => subset::subset(&args),
        DataCommand::Index(args) => index::run(&args),
        DataCommand::Simulate(args) => simulate::run(&args),
        DataCommand::Verify(args) => verify::run(&args),
        DataCommand::Stats(args) => inspect::stats(&args),
        DataCommand::ShowOrder(args) => inspect::show_order(&args),
        DataCommand::Bench(args) => bench::bench(&args),
    }
}

/// Parses `28x28`, or `224` for a square.
fn parse_size(text: &str) -> Result<[u32; 2], String> {
    let (height, width) = text.split_once('x').unwrap_or((text, text));
    match (height.parse(), width.parse()) {
        (Ok(height), Ok(width)) => Ok([height, width]),
        _ => Err("is not a size, such as 28x28".to_string()),
    }
}

/// Makes the shape of images that this build can handle.
fn shape(size: [u32; 2], channels: u32) -> anyhow::Result<ImageShape> {
    let [height, width] = size;
    let shape = ImageShape { height, width, channels };
    if !shape.is_supported() {
        return Err(usage(format!(
            "images of {height}x{width} with {channels} channels: sides must be 1 to {}, \
             channels 1 or 3",
            lacuna_data::SHAPE_SIDE_MAX
        )));
    }
    Ok(shape)
}

fn open(path: &Path) -> anyhow::Result<Dataset> {
    Dataset::open(path).map_err(|error| io(&error))
}

fn threads(wanted: Option<NonZeroUsize>) -> usize {
    let cores = || thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    wanted.unwrap_or_else(cores).get()
}

/// Finds out what the arguments of `pack` name.
fn choose_source(args: &PackArgs) -> anyhow::Result<PackSource> {
    let path = match args.sources.as_slice() {
        [path] => path,
        [images, labels] if images.is_file() && labels.is_file() && args.labels.is_none() => {
            let (images, labels) = (images.clone(), Some(labels.clone()));
            return Ok(PackSource::Idx { images, labels });
        }
        _ => {
            return Err(usage(
                "several sources can only be an IDX file of images and its labels; to pack several \
                 folders as one, put links to them into a folder and pack that",
            ));
        }
    };
    let source = match args.split {
        Some(split) => find_split(path, split, args.from)?,
        None => detect(path, args.from)?,
    };
    let wrong = |what: &str| Err(usage(format!("`{}` {what}", path.display())));
    match (source, &args.labels) {
        (PackSource::Idx { images, .. }, Some(labels)) => {
            Ok(PackSource::Idx { images, labels: Some(labels.clone()) })
        }
        (PackSource::Folder(_), Some(_)) => wrong(
            "is a folder of images, whose labels are its sub-folders: --labels goes with IDX files",
        ),
        (_, Some(_)) => wrong("has labels of its own: --labels goes with IDX files"),
        (source, None) => Ok(source),
    }
}

/// Tells what a path is, which must be of the kind that is wanted.
fn detect(path: &Path, from: Kind) -> anyhow::Result<PackSource> {
    if from == Kind::Folder {
        return Ok(PackSource::Folder(path.to_path_buf()));
    }
    let source = PackSource::detect(path).map_err(pack_error)?;
    let (is_wanted, wanted) = match from {
        Kind::Auto | Kind::Folder => (true, String::new()),
        Kind::Idx => (
            matches!(source, PackSource::Idx { .. }),
            format!("IDX file of images (…{IMAGES_PART}, gzipped or not)"),
        ),
        Kind::Mds => {
            (matches!(source, PackSource::Mds(_)), format!("{MDS_INDEX_NAME} of MDS shards"))
        }
        Kind::Parquet => (matches!(source, PackSource::Parquet(_)), "Parquet file".to_string()),
    };
    if is_wanted {
        return Ok(source);
    }
    Err(usage(format!("`{}` holds no {wanted}", path.display())))
}

/// Part of the name of an IDX file of images.
const IMAGES_PART: &str = "images-idx3-ubyte";

/// Finds the IDX images, the sub-folder or the Parquet files of a split.
fn find_split(path: &Path, split: Split, from: Kind) -> anyhow::Result<PackSource> {
    let names: &[&str] = match split {
        Split::Train => &["train"],
        Split::Test => &["t10k", "test", "val"],
    };
    let entries = fs::read_dir(path)
        .map_err(|source| pack_error(PackError::Io { path: path.to_path_buf(), source }))?;
    let mut entries: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
    entries.sort();
    let is_idx = |entry: &&PathBuf, prefix: &str| {
        let name = entry.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(prefix) && name.contains(IMAGES_PART) && entry.is_file()
    };
    let idx = names.iter().find_map(|prefix| entries.iter().find(|entry| is_idx(entry, prefix)));
    let folder = names.iter().map(|name| path.join(name)).find(|folder| folder.is_dir());
    if let Some(found) = idx.cloned().or(folder) {
        return detect(&found, from);
    }
    if matches!(from, Kind::Auto | Kind::Parquet)
        && let Some(source) = PackSource::parquet_split(path, names).map_err(pack_error)?
    {
        return Ok(source);
    }
    Err(usage(format!(
        "`{}` has no split like that: neither an IDX or Parquet file nor a folder whose name \
         starts with {}",
        path.display(),
        names.join(" or ")
    )))
}

/// Gives an error of packing its exit code: what other arguments would cure is bad usage.
fn pack_error(error: PackError) -> anyhow::Error {
    match error {
        PackError::Config(_)
        | PackError::OutputExists { .. }
        | PackError::ClassList { .. }
        | PackError::NotInClasses { .. } => usage(lacuna_checkpoint::chain(&error)),
        _ => io(&error),
    }
}

/// Names shards after their folder, where its name will do.
fn default_name(out: &Path) -> String {
    let full = std::path::absolute(out).unwrap_or_else(|_| out.to_path_buf());
    let name = full.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    let fits = (1..=64).contains(&name.len()) && name.bytes().all(allowed);
    if fits { name } else { "data".to_string() }
}

fn run_synthetic(args: &SyntheticArgs) -> anyhow::Result<u8> {
    let shape = shape(args.size, args.channels)?;
    let spec = SyntheticSpec { n_images: args.n, shape, seed: args.seed };
    run_pack(&PackSource::Synthetic(spec), &args.out, &args.shards)
}

fn run_pack(source: &PackSource, out: &Path, args: &ShardArgs) -> anyhow::Result<u8> {
    let config = PackConfig {
        name: args.name.clone().unwrap_or_else(|| default_name(out)),
        shard_bytes: args.shard_size.unwrap_or(SHARD_BYTES_DEFAULT),
        existing: if args.replace { Existing::Replace } else { Existing::Refuse },
    };
    let mut meter = Meter::new("packed");
    let report = pack(source, out, &config, &mut |p| meter.update(p)).map_err(pack_error)?;
    drop(meter);
    if report.outcome == PackOutcome::AlreadyThere {
        talk!("the same images are packed there already; nothing was done");
    }
    tell_skipped(&report.skipped);
    match args.output {
        Output::Json => put_json(&pack_json(&report, out))?,
        Output::Table => put(&rows(&pack_rows(&report, source, out)))?,
    }
    Ok(exit::OK)
}

fn pack_rows(report: &PackReport, source: &PackSource, out: &Path) -> Vec<(&'static str, String)> {
    let samples = count(report.n_samples, "sample");
    let shards = count(report.n_shards as u64, "shard");
    let mut out = vec![
        ("folder", out.display().to_string()),
        ("packed", format!("{samples} in {shards}, {}", size(report.bytes))),
        ("fingerprint", report.fingerprint.to_string()),
    ];
    out.extend(classes::told(report, source).map(|text| ("labels", text)));
    if report.skipped.n > 0 {
        out.push(("left out", count(report.skipped.n, "image")));
    }
    out
}

fn pack_json(report: &PackReport, out: &Path) -> serde_json::Value {
    json!({
        "folder": out, "n_samples": report.n_samples, "n_shards": report.n_shards,
        "bytes": report.bytes, "fingerprint": report.fingerprint.to_string(),
        "classes": report.classes, "no_labels": report.no_labels.as_ref().map(ToString::to_string),
        "n_skipped": report.skipped.n,
        "already_there": report.outcome == PackOutcome::AlreadyThere,
    })
}

/// Lists what was left out, on stderr.
fn tell_skipped(skipped: &SkipList) {
    for item in &skipped.first {
        talk!("left out: {}: {}", item.place, item.reason);
    }
    let more = skipped.n - skipped.first.len() as u64;
    if more > 0 {
        talk!("left out: and {more} more");
    }
}

#[cfg(test)]
mod tests;
