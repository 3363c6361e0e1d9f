//! `lacuna data subset`: a labelled part of a data set that has every class.

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::Args;
use lacuna_data::Dataset;
use lacuna_data::pack::PackSource;
use lacuna_recipe::eval::subset::stratified;
use lacuna_types::SampleId;

use super::talk::{count, io, usage};
use super::{ShardArgs, run_pack};
use crate::verbosity::talk;

/// `lacuna data subset`.
#[derive(Args, Debug)]
pub struct SubsetArgs {
    /// Packed and labelled images.
    data: PathBuf,
    /// Folder that gets shards and index.
    out: PathBuf,
    /// Share of each class's images, above 0 and up to 1; at least one of each. A larger share has
    /// all images of a smaller one.
    #[arg(long, value_name = "F")]
    label_fraction: f64,
    /// Chooses them.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Take the labelled images that the same fraction and seed leave out: what is judged by must
    /// not have been learned from.
    #[arg(long)]
    rest: bool,
    #[command(flatten)]
    shards: ShardArgs,
}

/// Packs some samples of each class.
pub(super) fn subset(args: &SubsetArgs) -> anyhow::Result<u8> {
    let fraction = args.label_fraction;
    if !(fraction > 0.0 && fraction <= 1.0) {
        return Err(usage(format!("--label-fraction must be above 0 and up to 1, not {fraction}")));
    }
    let dataset = Dataset::open(&args.data).map_err(|error| io(&error))?;
    let labels = (0..dataset.n_samples()).map(|id| dataset.index().record(SampleId(id)).label);
    let mut ids = stratified(labels, fraction, args.seed);
    if ids.is_empty() {
        return Err(usage(format!("`{}` has no labels", args.data.display())));
    }
    if args.rest {
        let chosen: BTreeSet<u64> = ids.into_iter().collect();
        let is_labelled = |id: &u64| dataset.index().record(SampleId(*id)).label.is_some();
        let others = (0..dataset.n_samples()).filter(|id| !chosen.contains(id));
        ids = others.filter(is_labelled).collect();
        if ids.is_empty() {
            let (all, n) = (args.data.display(), chosen.len());
            return Err(usage(format!("`{all}` has {n} labelled images, and no rest is left")));
        }
    }
    talk!("{} of {}", count(ids.len() as u64, "sample"), args.data.display());
    run_pack(&PackSource::Part { dataset: args.data.clone(), ids }, &args.out, &args.shards)
}
