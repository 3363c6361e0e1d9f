//! Statistics of what a probe's head reads, over its whole training set: what its batch norm
//! divides by where it is judged.
//!
//! They are computed once and kept in the run's folder, so that whoever predicts needs the training
//! set neither for an hour nor at all.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;
use lacuna_checkpoint::chain;
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::manifest::Manifest;
use lacuna_data::{DECODER_ID, Dataset, SampleError};
use lacuna_mae::classify::Head;
use lacuna_spec::{RunSpec, TaskSpec};
use serde::{Deserialize, Serialize};

use super::batches::{self, Images, Unread};
use super::classify::{ModelArgs, threads};
use super::io;
use super::source::shape_of;

/// Format of the file.
const SCHEMA: &str = "lacuna-probe-statistics/1";
/// Its name in the run's folder.
const NAME: &str = "probe-statistics.json";
/// Largest file: two numbers for each value of the widest head.
const BYTES_MAX: u64 = 64 << 20;

/// Sums over images of what a head reads, and of its squares, `[d]` each; the same for all
/// checkpoints of a probe.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    /// Images.
    pub n: u64,
    /// Sums.
    pub sums: Vec<f64>,
    /// Sums of squares.
    pub squares: Vec<f64>,
}

/// The file. Numbers are the bits of f64, in hexadecimal: they come back as they were.
#[derive(Debug, Deserialize, Serialize)]
struct Kept {
    format: String,
    of: Of,
    n: u64,
    sums: String,
    squares: String,
}

/// What statistics depend on.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
struct Of {
    /// The encoder, as the run is pinned to it.
    encoder: Option<String>,
    pool: String,
    seed: u64,
    /// Fingerprint of the training set.
    data: String,
    crop_pct: f64,
    image_decoder: String,
}

/// Reads a probe's statistics from its run's folder, or computes them and keeps them there.
pub fn statistics_of(
    head: &Head,
    dir: &RunDir,
    manifest: &Manifest,
    (spec, task): (&RunSpec, &TaskSpec),
    args: &ModelArgs,
) -> anyhow::Result<Statistics> {
    let of = Of {
        encoder: task.encoder.clone(),
        pool: format!("{:?}", task.pool),
        seed: spec.train.seed,
        data: manifest.state.facts.data_fingerprint.clone(),
        crop_pct: args.view.crop_pct,
        image_decoder: DECODER_ID.to_string(),
    };
    let path = dir.path().join(NAME);
    if let Some(kept) = read(dir, &path, &of, head.feature_width())? {
        return Ok(kept);
    }
    let train = training_data(manifest, spec, args)?;
    let found = compute(head, spec, &train, args)?;
    let kept = Kept {
        format: SCHEMA.to_string(),
        of,
        n: found.n,
        sums: to_hex(&found.sums),
        squares: to_hex(&found.squares),
    };
    let text = serde_json::to_string_pretty(&kept).expect("plain structs are JSON");
    if let Err(error) = dir.storage().replace_small(&path, &text) {
        // They are computed again next time.
        eprintln!("note: {NAME} is not kept: {}", chain(&error));
    }
    Ok(found)
}

/// Reads what is kept, if it is what is wanted.
fn read(dir: &RunDir, path: &Path, of: &Of, width: usize) -> anyhow::Result<Option<Statistics>> {
    let text = match dir.storage().read_small(path, BYTES_MAX) {
        Ok(text) => text,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(io(chain(&error))),
    };
    let Ok(kept) = serde_json::from_slice::<Kept>(&text) else { return Ok(None) };
    if kept.format != SCHEMA || kept.of != *of || kept.n == 0 {
        return Ok(None);
    }
    let sums = from_hex(&kept.sums).zip(from_hex(&kept.squares));
    let whole = sums.filter(|(sums, squares)| sums.len() == width && squares.len() == width);
    Ok(whole.map(|(sums, squares)| Statistics { n: kept.n, sums, squares }))
}

fn to_hex(values: &[f64]) -> String {
    values.iter().map(|value| format!("{:016x}", value.to_bits())).collect()
}

fn from_hex(text: &str) -> Option<Vec<f64>> {
    let words = text.as_bytes().chunks(16);
    let value = |word: &[u8]| {
        let bits = u64::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        (word.len() == 16).then(|| f64::from_bits(bits))
    };
    words.map(value).collect()
}

/// Opens the data that a checkpoint's run learned from.
fn training_data(manifest: &Manifest, spec: &RunSpec, args: &ModelArgs) -> anyhow::Result<Dataset> {
    let path = args.train_of(spec);
    let train = batches::open(path).context(
        "open the training data: a probe's batch norm divides by its statistics (--train says \
         where it lies now)",
    )?;
    let (found, learned) =
        (train.fingerprint().to_string(), &manifest.state.facts.data_fingerprint);
    if found != *learned {
        return Err(io(format!(
            "`{}` has fingerprint {found}, and the run learned from {learned}: a probe's batch \
             norm divides by the statistics of what it learned from (--train says where that is)",
            path.display()
        )));
    }
    Ok(train)
}

/// Computes what a probe's batch norm divides by over the whole training set, so that it does not
/// depend on batches.
fn compute(
    head: &Head,
    spec: &RunSpec,
    train: &Dataset,
    args: &ModelArgs,
) -> anyhow::Result<Statistics> {
    let ids: Vec<u64> = (0..train.n_samples()).collect();
    let (mut sums, mut squares): (Vec<f64>, Vec<f64>) = (Vec::new(), Vec::new());
    // Training passed over the same ones; what only this machine cannot read is no part of them.
    let unread: Mutex<BTreeSet<u64>> = Mutex::default();
    let passes = SampleError::is_same_everywhere;
    let images = Images {
        dataset: train,
        shape: shape_of(&spec.model),
        view: args.view,
        ids: &ids,
        batch: args.compute.batch(),
        unread: Some(Unread { ids: &unread, passes }),
    };
    let workers: Vec<Head> = threads(args, &ids).map(|_| head.share()).collect();
    let work = |head: &mut Head, pixels: &[u8]| head.features(pixels);
    images.for_each("train", workers, work, |at, features| {
        let width = head.feature_width();
        sums.resize(width, 0.0);
        squares.resize(width, 0.0);
        for (row, id) in features.chunks_exact(width).zip(&ids[at..]) {
            if unread.lock().unwrap_or_else(PoisonError::into_inner).contains(id) {
                continue;
            }
            for ((sum, square), x) in sums.iter_mut().zip(&mut squares).zip(row) {
                *sum += f64::from(*x);
                *square += f64::from(*x) * f64::from(*x);
            }
        }
        Ok(())
    })?;
    let n_unread = unread.into_inner().unwrap_or_else(PoisonError::into_inner).len();
    if n_unread > 0 {
        eprintln!("train: {n_unread} images do not decode and are left out of its statistics");
    }
    let n = (ids.len() - n_unread) as u64;
    if n == 0 {
        return Err(io("no image of the training data decodes".to_string()));
    }
    Ok(Statistics { n, sums, squares })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_as_they_were() {
        let values = [0.0, -0.0, 0.1, f64::MIN_POSITIVE / 3.0, 1e300];
        let bits = |values: &[f64]| values.iter().map(|x| x.to_bits()).collect::<Vec<u64>>();
        assert_eq!(bits(&from_hex(&to_hex(&values)).unwrap()), bits(&values));
        assert!(from_hex("12").is_none() && from_hex("x").is_none());
    }
}
