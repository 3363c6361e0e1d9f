//! `lacuna data verify`: what is wrong with a data set, written down, and taken out if wanted.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Args;
use lacuna_data::Dataset;
use lacuna_data::bad::index_path;
use lacuna_data::exclude::{Excluded, exclude};
use lacuna_data::verify::{BadEntry, VerifyReport, verify};
use lacuna_types::exit;
use serde_json::{Value, json};

use super::talk::{Meter, count, io, put, put_json, usage};
use super::{open, threads};
use crate::client::Output;

/// `lacuna data verify`.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// Folder or URL of the data set, or its index file.
    dir: PathBuf,
    /// Rewrite the index without the samples that do not decode; the old index is kept beside it.
    /// Runs that have begun with the old one cannot go on with the new one.
    #[arg(long)]
    exclude: bool,
    /// Threads [default: one per core].
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// Verifies a data set.
pub(super) fn run(args: &VerifyArgs) -> anyhow::Result<u8> {
    let dataset = open(&args.dir)?;
    let index = index_path(&args.dir);
    if dataset.is_remote() && args.exclude {
        return Err(usage(format!(
            "`{}` is behind a URL: --exclude rewrites an index in a folder, which is then uploaded",
            args.dir.display()
        )));
    }
    let mut meter = Meter::new("verified");
    let report = verify(&dataset, threads(args.threads), &mut |p| meter.update(p));
    drop(meter);
    let excluded = match args.exclude {
        true => exclude(&dataset, &index, &report),
        false => Ok(None),
    };
    let bitmap = match &excluded {
        // The new index has no bad sample.
        Ok(Some(_)) => remove_bitmap(&dataset, &index),
        _ if dataset.is_remote() => None,
        _ => write_bitmap(&report, &index),
    };
    let done = excluded.as_ref().ok().and_then(Option::as_ref);
    let findings = Findings { report: &report, dataset: &dataset, bitmap: bitmap.as_deref() };
    match args.output {
        Output::Json => put_json(&findings.json(done))?,
        Output::Table => {
            let excluded = done.map_or(String::new(), |done| told(done, &index));
            put(&(findings.text() + &excluded))?;
        }
    }
    let is_sound = report.is_clean() || excluded.map_err(|error| io(&error))?.is_some();
    Ok(if is_sound { exit::OK } else { exit::IO })
}

/// Writes the bitmap of bad samples, where that says something; returns its path.
fn write_bitmap(report: &VerifyReport, index: &Path) -> Option<PathBuf> {
    if report.n_bad() == 0 && report.n_unread > 0 {
        // What an earlier look found may still be true.
        return None;
    }
    written(report.found.write(index))
}

fn remove_bitmap(dataset: &Dataset, index: &Path) -> Option<PathBuf> {
    written(lacuna_data::bad::BadSamples::none_of(dataset).write(index))
}

/// Data may lie where nothing can be written, and can be verified there all the same.
fn written(result: std::io::Result<Option<PathBuf>>) -> Option<PathBuf> {
    result.unwrap_or_else(|error| {
        eprintln!("the bitmap of bad samples cannot be written: {error}");
        None
    })
}

struct Findings<'a> {
    report: &'a VerifyReport,
    dataset: &'a Dataset,
    bitmap: Option<&'a Path>,
}

impl Findings<'_> {
    fn n_shards(&self) -> u64 {
        self.dataset.index().shards().len() as u64
    }

    fn json(&self, excluded: Option<&Excluded>) -> Value {
        let report = self.report;
        let entry = |bad: &BadEntry| {
            json!({
                "sample": bad.place.sample.0, "shard": bad.place.shard,
                "offset": bad.place.offset, "member": bad.place.member, "error": bad.error,
            })
        };
        let shards = report.bad_shards.iter().map(
            |shard| json!({ "shard": shard.path, "error": shard.error, "unread": shard.is_unread }),
        );
        json!({
            "clean": report.is_clean(), "n_samples": report.n_samples,
            "n_shards": self.n_shards(), "fingerprint": self.dataset.fingerprint().to_string(),
            "n_bad": report.n_bad(), "bad": report.bad.iter().map(entry).collect::<Vec<_>>(),
            "n_unread": report.n_unread,
            "unread": report.unread.iter().map(entry).collect::<Vec<_>>(),
            "bad_shards": shards.collect::<Vec<_>>(), "bitmap": self.bitmap,
            "excluded": excluded.map(|done| json!({
                "old_fingerprint": done.old.to_string(), "fingerprint": done.new.to_string(),
                "old_index": done.kept, "n_excluded": done.n_excluded, "n_samples": done.n_left,
                "n_shards_dropped": done.n_shards_dropped,
            })),
        })
    }

    fn text(&self) -> String {
        let report = self.report;
        let mut text: String = report.bad_shards.iter().map(|shard| format!("{shard}\n")).collect();
        let lists =
            [(&report.bad, report.n_bad(), "bad"), (&report.unread, report.n_unread, "unread")];
        for (listed, n, what) in lists {
            text.extend(listed.iter().map(|entry| format!("{}\n", entry.error)));
            let unlisted = n - listed.len() as u64;
            if unlisted > 0 {
                text += &format!("and {} more\n", count(unlisted, &format!("{what} sample")));
            }
        }
        text += &format!(
            "{}: {} of {}, {} of {}",
            if report.is_clean() { "sound" } else { "damaged" },
            count(report.n_bad(), "bad sample"),
            count(report.n_samples, "sample"),
            count(report.bad_shards.len() as u64, "bad shard"),
            count(self.n_shards(), "shard"),
        );
        if report.n_unread > 0 {
            text += &format!(
                "; {} could not be read, which says nothing about them",
                count(report.n_unread, "sample")
            );
        }
        text.push('\n');
        if let Some(bitmap) = self.bitmap {
            text += &format!(
                "the bad samples are listed in `{}`; `--exclude` takes them out of the index\n",
                bitmap.display()
            );
        }
        text
    }
}

/// Says what excluding did, what follows from it, and how to undo it.
fn told(done: &Excluded, index: &Path) -> String {
    let Excluded { old, new, kept, n_excluded, n_left, n_shards_dropped } = done;
    let dropped = match n_shards_dropped {
        0 => String::new(),
        n => format!(", {} without a good one", count(*n, "shard")),
    };
    format!(
        "taken out: {}{dropped}; {} left\n\
         old fingerprint  {old}\n\
         new fingerprint  {new}\n\
         Runs that have begun with the old index cannot go on with the new one. To go back:\n  \
         mv '{}' '{}'\n",
        count(*n_excluded, "sample"),
        count(*n_left, "sample"),
        kept.display(),
        index.display(),
    )
}
