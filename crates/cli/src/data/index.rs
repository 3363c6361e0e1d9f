//! `lacuna data index`: the index of shards that are already there, in a folder or behind a URL.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use lacuna_data::wds::{IndexReport, build_index, build_index_of_store, expand};
use lacuna_data::{Limits, Store, is_url};
use lacuna_types::exit;
use serde_json::json;

use super::talk::{Meter, count, io, put, put_json, rows, usage};
use super::{tell_skipped, threads};
use crate::client::Output;

/// `lacuna data index`.
#[derive(Args, Debug)]
pub struct IndexArgs {
    /// Folder of .tar shards, or of uncompressed MDS shards with their index.json; or the URL of a
    /// folder of .tar shards (s3://bucket/folder, https://host/folder).
    dir: PathBuf,
    /// Behind a URL: which shards, as train-{000000..000099}.tar [default: all that are listed,
    /// which plain HTTP cannot do].
    #[arg(long, value_name = "PATTERN")]
    shards: Option<String>,
    /// Behind a URL: write the index into this folder instead of beside the shards.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Threads [default: one per core].
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// Indexes shards.
pub(super) fn run(args: &IndexArgs) -> anyhow::Result<u8> {
    let url = args.dir.to_str().filter(|text| is_url(text));
    let report = match url {
        Some(url) => of_store(url, args)?,
        None if args.shards.is_some() || args.out.is_some() => {
            return Err(usage("--shards and --out go with a URL"));
        }
        None => {
            let mut meter = Meter::new("indexed");
            let report = build_index(&args.dir, threads(args.threads), &mut |p| meter.update(p));
            report.map_err(|error| io(&error))?
        }
    };
    tell_skipped(&report.skipped);
    let index = &report.index;
    let (n_samples, n_shards) = (index.n_samples(), index.shards().len() as u64);
    match args.output {
        Output::Json => put_json(&json!({
            "folder": args.dir, "n_samples": n_samples, "n_shards": n_shards,
            "fingerprint": index.fingerprint().to_string(), "n_skipped": report.skipped.n,
        }))?,
        Output::Table => put(&rows(&[
            ("folder", args.dir.display().to_string()),
            ("indexed", format!("{} in {}", count(n_samples, "sample"), count(n_shards, "shard"))),
            ("fingerprint", index.fingerprint().to_string()),
        ]))?,
    }
    Ok(exit::OK)
}

fn of_store(url: &str, args: &IndexArgs) -> anyhow::Result<IndexReport> {
    let names = args.shards.as_deref().map(expand).transpose();
    let names = names.map_err(|error| usage(error.to_string()))?;
    let store = Arc::new(Store::open(url, Limits::default()).map_err(|error| io(&error))?);
    let mut meter = Meter::new("indexed");
    let threads = threads(args.threads);
    let report = build_index_of_store(&store, names, threads, &mut |p| meter.update(p));
    drop(meter);
    let report = report.map_err(|error| io(&error))?;
    let written = match &args.out {
        Some(folder) => report.write(folder),
        None => report.upload(&store),
    };
    written.map_err(|error| io(&error))?;
    Ok(report)
}
