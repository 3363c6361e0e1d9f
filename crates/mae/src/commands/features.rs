//! `lacuna-worker features`: what the encoder says about every image of a data set.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use clap::{Args, ValueEnum};
use lacuna_data::{DECODER_ID, SampleError};
use lacuna_mae::frozen::{FrozenMae, Pool};
use lacuna_spec::units::grouped;
use lacuna_types::{SampleId, exit};

use super::batches::{self, ComputeArgs, Images, Unread, ViewArgs};
use super::feature_file::{Content, FeatureFile, Format};
use super::source::{Need, SizeArgs, SourceArgs, shape_of};

/// `lacuna-worker features`.
#[derive(Args, Debug)]
pub struct FeaturesArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Packed images, a folder or URL; labels are taken from its index.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// What of an image is its feature [default: cls, or mean where the last norm is `fc_norm`].
    #[arg(long, value_enum)]
    pool: Option<PoolArg>,
    #[command(flatten)]
    size: SizeArgs,
    #[command(flatten)]
    view: ViewArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Format of the file [default: by the ending of its name].
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Where the features go.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Write rows of NaN for images that cannot be read, and list them; without it the first one
    /// ends the command.
    #[arg(long)]
    nan_for_bad: bool,
    /// Write over an earlier file.
    #[arg(long)]
    force: bool,
}

/// What of an image is its feature; all after the final norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PoolArg {
    /// The class token.
    Cls,
    /// The mean of the patch tokens.
    Mean,
    /// Class token and all patch tokens.
    Tokens,
}

impl PoolArg {
    fn pool(self) -> Pool {
        match self {
            PoolArg::Cls => Pool::Cls,
            PoolArg::Mean => Pool::Mean,
            PoolArg::Tokens => Pool::Tokens,
        }
    }
}

/// Returns the word that chooses it.
fn name_of(pool: Pool) -> &'static str {
    match pool {
        Pool::Cls => "cls",
        Pool::Mean => "mean",
        Pool::Tokens => "tokens",
    }
}

/// Writes the features of every sample, in the order of the index.
pub fn features(args: &FeaturesArgs) -> anyhow::Result<u8> {
    let format = Format::of(&args.out, args.format)?;
    format.refuse_existing(&args.out, args.force)?;
    let loaded = args.source.load(Need::Encoder, args.size.hints())?;
    let (model, table) = loaded.build(&args.size)?;
    let model = model.on(args.compute.device()?);
    let dataset = batches::open(&args.data)?;
    let (pool, n) = (loaded.pool(args.pool.map(PoolArg::pool))?, dataset.n_samples());
    let [height, width] = model.model().img_size;
    let content = Content {
        labels: (0..n).map(|id| dataset.label(SampleId(id))).collect(),
        shape: model.feature_shape(pool),
        metadata: vec![
            ("lacuna.crop_pct", args.view.crop_pct.to_string()),
            ("lacuna.data", dataset.fingerprint().to_string()),
            ("lacuna.decoder", DECODER_ID.to_string()),
            ("lacuna.img_size", format!("{height}x{width}")),
            ("lacuna.pool", name_of(pool).to_string()),
            ("lacuna.position_table", table.clone()),
            ("lacuna.source", loaded.origin.to_string()),
        ],
    };
    let shape = content.shape.clone();
    let n_labelled = content.labels.iter().flatten().count();
    let mut file = FeatureFile::create(&args.out, format, content)?;
    let ids: Vec<u64> = (0..n).collect();
    let batch = args.compute.batch();
    let (shape_in, view) = (shape_of(model.model()), args.view);
    let unread: Mutex<BTreeSet<u64>> = Mutex::default();
    let passes = SampleError::is_bad_sample;
    let images = Images {
        dataset: &dataset,
        shape: shape_in,
        view,
        ids: &ids,
        batch,
        unread: args.nan_for_bad.then_some(Unread { ids: &unread, passes }),
    };
    let n_threads = args.compute.threads().min(ids.len().div_ceil(batch));
    let workers: Vec<FrozenMae> = (0..n_threads).map(|_| model.share()).collect();
    let work = |model: &mut FrozenMae, pixels: &[u8]| model.pooled(pixels, pool);
    let row_values: usize = shape.iter().product();
    images.for_each("features", workers, work, |at, mut rows| {
        let bad = unread.lock().unwrap_or_else(PoisonError::into_inner);
        for (row, id) in rows.chunks_exact_mut(row_values).zip(&ids[at..]) {
            if bad.contains(id) {
                row.fill(f32::NAN);
            }
        }
        drop(bad);
        file.push(&rows)
    })?;
    let bad: Vec<String> = unread
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .iter()
        .map(u64::to_string)
        .collect();
    if !bad.is_empty() {
        let (n, ids) = (bad.len(), bad.join(", "));
        let (images, rows) =
            if n == 1 { ("image", "its row is") } else { ("images", "their rows are") };
        eprintln!("{n} {images} could not be read, {rows} NaN: {ids}");
    }
    let files = file.finish()?;
    let names: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
    let sides: Vec<String> = shape.iter().map(usize::to_string).collect();
    println!(
        "{}: {} x {} features ({}, {height}x{width} pixels) of `{}` by {}, {} of them labelled\n\
         position table: {table}",
        names.join(" and "),
        grouped(n),
        sides.join(" x "),
        name_of(pool),
        args.data.display(),
        loaded.origin,
        grouped(n_labelled as u64),
    );
    Ok(exit::OK)
}
