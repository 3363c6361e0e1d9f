//! `lacuna-worker eval knn`: weighted nearest neighbours on frozen features, beside baselines.
//!
//! Features of the validation set are held; those of the training set pass by once, so the size of
//! the training set does not matter to memory.

use std::path::PathBuf;

use anyhow::ensure;
use clap::{Args, ValueEnum};
use lacuna_data::Dataset;
use lacuna_mae::frozen::{FrozenMae, Pool};
use lacuna_mae::runtime;
use lacuna_recipe::eval::knn::{Nearest, Neighbor, normalize, vote};
use lacuna_recipe::eval::metrics::Tally;
use lacuna_recipe::eval::subset::stratified;
use lacuna_recipe::model::ModelConfig;
use lacuna_spec::units::grouped;
use lacuna_types::{SampleId, exit};
use tch::{Kind, Tensor};

use super::batches::{self, ComputeArgs, Images, ViewArgs};
use super::feature_file::Partial;
use super::page::{Neighbours, Page, Pictures};
use super::report::{self, KnnReport, Row, Side};
use super::source::{Need, SizeArgs, SourceArgs, shape_of};
use super::{random_params, usage};

/// `lacuna-worker eval knn`.
#[derive(Args, Debug)]
pub struct KnnArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Packed and labelled images that vote.
    #[arg(long, value_name = "DIR")]
    train: PathBuf,
    /// Packed and labelled images that are classified.
    #[arg(long, value_name = "DIR")]
    val: PathBuf,
    /// Numbers of neighbours; each gives a result.
    #[arg(long, value_delimiter = ',', default_value = "10,20,100,200", value_name = "K,…")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=K_MAX))]
    k: Vec<u32>,
    /// A neighbour's vote weighs exp(cosine / temperature).
    #[arg(long, default_value_t = 0.07, value_name = "T")]
    temperature: f64,
    /// What of an image is its feature [default: cls, or mean where the last norm is `fc_norm`].
    #[arg(long, value_enum)]
    pool: Option<PoolArg>,
    /// Share of each class's training images that vote, above 0 and up to 1.
    #[arg(long, default_value_t = 1.0, value_name = "F")]
    label_fraction: f64,
    /// Chooses that share, and the weights of the random encoder.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// What stands beside the encoder.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "raw,random",
        value_name = "B,…"
    )]
    baseline: Vec<Baseline>,
    #[command(flatten)]
    size: SizeArgs,
    #[command(flatten)]
    view: ViewArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Where the report goes, JSON.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Folder for a file of TensorBoard with `eval_knn/FEATURES_kK` at the checkpoint's step.
    #[arg(long, value_name = "DIR")]
    tensorboard: Option<PathBuf>,
    /// A page to look at: confusion matrix, and images with their nearest neighbours.
    #[arg(long, value_name = "FILE.html")]
    page: Option<PathBuf>,
}

/// Images that a page shows with their neighbours, and neighbours of each.
const ON_PAGE: (usize, usize) = (16, 7);

/// Most neighbours: with 50,000 images this many take 400 MB for each kind of features.
const K_MAX: i64 = 1000;

/// Sides of raw images beyond this are averaged down: raw pixels are a baseline, not a method, and
/// those of larger images would fill the memory.
const RAW_SIDE_MAX: i64 = 32;

/// Rows of similarities that are computed at a time.
const SIMILARITY_ROWS: usize = 8192;

/// What of an image is its feature, after the final norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PoolArg {
    /// The class token.
    Cls,
    /// The mean of the patch tokens.
    Mean,
}

/// Features to compare with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Baseline {
    /// The pixels themselves, averaged down to 32 a side.
    Raw,
    /// The encoder with random weights.
    Random,
    /// Nothing.
    None,
}

/// Computes all kinds of features of a batch, each row of length 1.
struct Extractor {
    encoder: FrozenMae,
    random: Option<FrozenMae>,
    raw: bool,
    pool: Pool,
}

impl Extractor {
    fn share(&self) -> Self {
        let random = self.random.as_ref().map(FrozenMae::share);
        Extractor { encoder: self.encoder.share(), random, ..*self }
    }

    /// Names what [`extract`](Self::extract) returns, with the values of a row.
    fn kinds(&self) -> Vec<(&'static str, usize)> {
        let width = self.encoder.model().width as usize;
        let mut out = vec![("encoder", width)];
        out.extend(self.raw.then(|| ("raw pixels", raw_values(self.encoder.model()))));
        out.extend(self.random.as_ref().map(|_| ("random encoder", width)));
        out
    }

    fn extract(&self, pixels: &[u8]) -> Vec<Vec<f32>> {
        let mut out = vec![self.encoder.pooled(pixels, self.pool)];
        out.extend(self.raw.then(|| raw(self.encoder.model(), pixels)));
        out.extend(self.random.as_ref().map(|random| random.pooled(pixels, self.pool)));
        for (rows, (_, dim)) in out.iter_mut().zip(self.kinds()) {
            normalize(rows, dim);
        }
        out
    }
}

/// Cosine above which two images have the same features.
const TWINS: f32 = 1.0 - 1e-6;

/// Tells whoever has the same images on both sides: each of them votes for itself.
fn note_twins(neighbors: &[Vec<Neighbor>]) {
    let has_twin = |of_one: &&Vec<Neighbor>| of_one.first().is_some_and(|n| n.similarity >= TWINS);
    let n = neighbors.iter().filter(has_twin).count();
    // Some images of large collections are there twice.
    if n * 100 > neighbors.len() {
        eprintln!(
            "note: {n} of {} validation images have the very features of a training image: are \
             they on both sides?",
            neighbors.len()
        );
    }
}

/// Classifies the validation set and writes the report.
pub fn knn(args: &KnnArgs) -> anyhow::Result<u8> {
    check(args)?;
    let loaded = args.source.load(Need::Encoder, args.size.hints())?;
    let (encoder, table) = loaded.build(&args.size)?;
    let device = args.compute.device()?;
    let (train, val) = (batches::open(&args.train)?, batches::open(&args.val)?);
    if train.fingerprint() == val.fingerprint() {
        return Err(usage(format!(
            "`{}` and `{}` are the same images, and each would find itself: hold some out with \
             `lacuna data subset DIR OUT --label-fraction F`, and the others with --rest",
            args.train.display(),
            args.val.display()
        )));
    }
    batches::same_classes(&args.train, &args.val)?;
    let train_ids = chosen(&train, args.label_fraction, args.seed, "--train", &args.train)?;
    let val_ids = chosen(&val, 1.0, args.seed, "--val", &args.val)?;
    let ks = neighbors_asked(args, train_ids.len())?;
    let with = |baseline| args.baseline.contains(&baseline);
    let random = with(Baseline::Random).then(|| {
        let model = encoder.model();
        let params = random_params(model, args.seed);
        let random = FrozenMae::new(model, &loaded.mean, &loaded.std, &params);
        random.norm_after_mean(loaded.norm_after_mean).on(device)
    });
    let encoder = encoder.on(device);
    let asked = args.pool.map(|pool| if pool == PoolArg::Cls { Pool::Cls } else { Pool::Mean });
    let pool = loaded.pool(asked)?;
    let extractor = Extractor { encoder, random, raw: with(Baseline::Raw), pool };
    // Whoever cannot write is told before an hour of computing.
    let file = Partial::create(&args.out)?;
    let page = args.page.as_deref().map(Partial::create).transpose()?;
    if let Some(folder) = &args.tensorboard {
        report::check_scalars(folder)?;
    }
    let found = search(&extractor, args, (&train, &train_ids), (&val, &val_ids), &ks)?;
    note_twins(&found[0]);
    let kinds = extractor.kinds();
    let label = |dataset: &Dataset, id: u64| {
        dataset.label(SampleId(id)).expect("samples without a label were left out")
    };
    let rows = kinds.iter().zip(&found).map(|(&(features, dim), neighbors)| {
        let class_of = |sample: u32| label(&train, train_ids[sample as usize]);
        let tally = |k: u32| -> Tally {
            let mut tally = Tally::default();
            for (&id, neighbors) in val_ids.iter().zip(neighbors) {
                let ranked = vote(neighbors, k as usize, class_of, args.temperature);
                tally.add(label(&val, id), &ranked);
            }
            tally
        };
        Row { features, dim, results: ks.iter().map(|&k| (k, tally(k))).collect() }
    });
    let report = KnnReport {
        origin: &loaded.origin,
        model: extractor.encoder.model(),
        pool: if pool == Pool::Cls { "cls" } else { "mean" },
        position_table: &table,
        temperature: args.temperature,
        label_fraction: args.label_fraction,
        crop_pct: args.view.crop_pct,
        seed: args.seed,
        train: Side::of(&train, &args.train, train_ids.len()),
        val: Side::of(&val, &args.val, val_ids.len()),
        rows: rows.collect(),
    };
    report.write(file)?;
    if let Some(file) = page {
        let class_of = |sample: u32| label(&train, train_ids[sample as usize]);
        let shown = shown_neighbours(
            &found[0],
            &val_ids,
            |id| label(&val, id),
            |sample| (train_ids[sample as usize], class_of(sample)),
        );
        let mut tally = Tally::default();
        for (&id, neighbors) in val_ids.iter().zip(&found[0]) {
            tally
                .add(label(&val, id), &vote(neighbors, ks[0] as usize, class_of, args.temperature));
        }
        let title = format!("Nearest neighbours by {}", loaded.origin.source);
        let facts = format!("k = {}, images of {}", ks[0], args.val.display());
        let shape = shape_of(extractor.encoder.model());
        let mut page = Page::new(&title, &facts, &args.val);
        page.scores(&tally);
        page.neighbours(
            &shown,
            &mut Pictures::new(&val, shape, args.view),
            &mut Pictures::new(&train, shape, args.view),
        )?;
        page.confusion(&tally, train.index().n_classes().max(val.index().n_classes()));
        println!("{}: the page", page.write(file)?.display());
    }
    if let Some(folder) = &args.tensorboard {
        let step = loaded.origin.step.unwrap_or(0);
        let value = |row: &Row, (k, tally): &(u32, Tally)| {
            let name = format!("eval_knn/{}_k{k}", row.features.replace(' ', "_"));
            (step, name, tally.top1())
        };
        let of_row = |row: &Row| row.results.iter().map(|of| value(row, of)).collect::<Vec<_>>();
        let scalars: Vec<_> = report.rows.iter().flat_map(of_row).collect();
        report::write_scalars(folder, &scalars)?;
    }
    print!("{}", report.table());
    println!("{}: the report, with classes and confusion matrices", args.out.display());
    Ok(exit::OK)
}

/// Chooses images evenly among those that were classified, with their nearest neighbours.
fn shown_neighbours(
    neighbors: &[Vec<Neighbor>],
    ids: &[u64],
    class: impl Fn(u64) -> u32,
    sample: impl Fn(u32) -> (u64, u32),
) -> Vec<Neighbours> {
    let (n, k) = ON_PAGE;
    let near = |neighbor: &Neighbor| {
        let (id, class) = sample(neighbor.sample);
        (id, class, neighbor.similarity)
    };
    let every = ids.len().div_ceil(n).max(1);
    let chosen = ids.iter().zip(neighbors).step_by(every);
    let row = |(id, all): (&u64, &Vec<Neighbor>)| Neighbours {
        id: *id,
        class: class(*id),
        near: all.iter().take(k).map(near).collect(),
    };
    chosen.map(row).collect()
}

fn check(args: &KnnArgs) -> anyhow::Result<()> {
    let KnnArgs { temperature, label_fraction, baseline, .. } = args;
    if !(temperature.is_finite() && *temperature > 0.0) {
        return Err(usage(format!("--temperature must be above 0, not {temperature}")));
    }
    if !(*label_fraction > 0.0 && *label_fraction <= 1.0) {
        return Err(usage(format!("--label-fraction must be in (0, 1], not {label_fraction}")));
    }
    if baseline.contains(&Baseline::None) && baseline.len() > 1 {
        return Err(usage("--baseline none stands alone"));
    }
    Ok(())
}

/// Chooses labelled samples of a data set.
fn chosen(
    dataset: &Dataset,
    fraction: f64,
    seed: u64,
    flag: &str,
    path: &std::path::Path,
) -> anyhow::Result<Vec<u64>> {
    let n = dataset.n_samples();
    let labels = || (0..n).map(|id| dataset.label(SampleId(id)));
    let n_labelled = labels().flatten().count() as u64;
    if n_labelled == 0 {
        return Err(usage(format!("{flag} `{}` has no labels", path.display())));
    }
    if n_labelled < n {
        let rest = grouped(n - n_labelled);
        eprintln!("note: {rest} samples of `{}` have no label and are left out", path.display());
    }
    let ids = stratified(labels(), fraction, seed);
    if u32::try_from(ids.len()).is_err() {
        return Err(usage(format!("{flag} `{}` has too many samples", path.display())));
    }
    Ok(ids)
}

/// Returns the numbers of neighbours that there are enough samples for.
fn neighbors_asked(args: &KnnArgs, n_train: usize) -> anyhow::Result<Vec<u32>> {
    let mut ks = args.k.clone();
    ks.sort_unstable();
    ks.dedup();
    let (few, many): (Vec<u32>, Vec<u32>) = ks.iter().partition(|&&k| k as usize <= n_train);
    if few.is_empty() {
        return Err(usage(format!("--k {} needs more than {n_train} training samples", many[0])));
    }
    if !many.is_empty() {
        eprintln!("note: no result for k = {many:?}: there are {n_train} training samples");
    }
    Ok(few)
}

/// A data set and which of its samples take part.
type Chosen<'a> = (&'a Dataset, &'a [u64]);

/// Finds the nearest training samples of each validation sample, for each kind of features. They
/// are numbered by their place in the list of chosen ones.
fn search(
    extractor: &Extractor,
    args: &KnnArgs,
    train: Chosen<'_>,
    val: Chosen<'_>,
    ks: &[u32],
) -> anyhow::Result<Vec<Vec<Vec<Neighbor>>>> {
    runtime::pin_threads();
    let kinds = extractor.kinds();
    let shape = shape_of(extractor.encoder.model());
    let run = |(dataset, ids): Chosen<'_>,
               what: &str,
               take: &mut dyn FnMut(usize, Vec<Vec<f32>>) -> anyhow::Result<()>| {
        let (view, batch) = (args.view, args.compute.batch());
        let images = Images { dataset, shape, view, ids, batch, unread: None };
        let n_threads = args.compute.threads().min(ids.len().div_ceil(images.batch));
        let workers: Vec<Extractor> = (0..n_threads).map(|_| extractor.share()).collect();
        let work = |extractor: &mut Extractor, pixels: &[u8]| extractor.extract(pixels);
        images.for_each(what, workers, work, |at, batch| {
            let finite = batch.iter().flatten().all(|x| x.is_finite());
            ensure!(finite, "features are not finite near sample {} of --{what}", ids[at]);
            take(at, batch)
        })
    };
    let mut queries: Vec<Vec<f32>> = vec![Vec::new(); kinds.len()];
    run(val, "val", &mut |_, batch| {
        queries.iter_mut().zip(batch).for_each(|(all, rows)| all.extend(rows));
        Ok(())
    })?;
    let queries: Vec<Tensor> = queries
        .iter()
        .zip(&kinds)
        .map(|(rows, (_, dim))| Tensor::from_slice(rows).view([-1, *dim as i64]))
        .collect();
    let k_max = ks.iter().max().map_or(1, |&k| k as usize);
    let mut nearest: Vec<Vec<Nearest>> =
        kinds.iter().map(|_| vec![Nearest::new(k_max); val.1.len()]).collect();
    run(train, "train", &mut |at, batch| {
        for ((queries, rows), nearest) in queries.iter().zip(batch).zip(&mut nearest) {
            let keys_bd = Tensor::from_slice(&rows).view([-1, queries.size()[1]]);
            offer_all(queries, &keys_bd, at as u32, nearest);
        }
        Ok(())
    })?;
    let sorted = |nearest: Vec<Nearest>| nearest.into_iter().map(Nearest::sorted).collect();
    Ok(nearest.into_iter().map(sorted).collect())
}

/// Offers training rows `keys_bd`, numbered from `first` on, to every query.
fn offer_all(queries_nd: &Tensor, keys_bd: &Tensor, first: u32, nearest: &mut [Nearest]) {
    let keys_db = keys_bd.tr();
    let n_keys = keys_bd.size()[0] as usize;
    for (i, nearest) in nearest.chunks_mut(SIMILARITY_ROWS).enumerate() {
        let from = (i * SIMILARITY_ROWS) as i64;
        let similarity_nb = queries_nd.narrow(0, from, nearest.len() as i64).matmul(&keys_db);
        let mut values: Vec<f32> = vec![0.0; nearest.len() * n_keys];
        similarity_nb.copy_data(&mut values, nearest.len() * n_keys);
        for (row, nearest) in values.chunks_exact(n_keys).zip(nearest) {
            for (sample, &similarity) in (first..).zip(row) {
                nearest.offer(similarity, sample);
            }
        }
    }
}

fn raw_sides(model: &ModelConfig) -> [i64; 2] {
    model.img_size.map(|side| i64::from(side).min(RAW_SIDE_MAX))
}

fn raw_values(model: &ModelConfig) -> usize {
    let [height, width] = raw_sides(model);
    height as usize * width as usize * model.channels as usize
}

/// Returns brightness 0 to 1 of images `[b, h, w, c]`, averaged down, channels first.
fn raw(model: &ModelConfig, pixels: &[u8]) -> Vec<f32> {
    runtime::pin_threads();
    let [height, width] = model.img_size.map(i64::from);
    let shape = [-1, height, width, i64::from(model.channels)];
    let bytes_bhwc = Tensor::from_slice(pixels).view(shape);
    let images_bchw = bytes_bhwc.permute([0, 3, 1, 2]).to_kind(Kind::Float) / 255.0;
    let small = match raw_sides(model) {
        sides if sides == [height, width] => images_bchw,
        sides => images_bchw.adaptive_avg_pool2d(sides),
    };
    Vec::<f32>::try_from(small.contiguous().view(-1)).expect("a flat tensor of floats")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_images_are_averaged_down() {
        let base = ModelConfig::preset("base").expect("a preset");
        let model = ModelConfig { img_size: [64, 16], channels: 1, ..base };
        assert_eq!(raw_values(&model), 32 * 16);
        let pixels: Vec<u8> = (0..64 * 16).map(|i| if i / 16 % 2 == 0 { 0 } else { 102 }).collect();
        let small = raw(&model, &pixels);
        assert_eq!(small.len(), 32 * 16);
        // Each of the 32 rows is the mean of a dark one and a brighter one.
        assert!(small.iter().all(|x| (x - 0.2).abs() < 1e-6), "{small:?}");
    }

    #[test]
    fn all_pairs_are_offered() {
        let queries = Tensor::from_slice(&[1.0f32, 0.0, 0.0, 1.0]).view([2, 2]);
        let keys = Tensor::from_slice(&[0.6f32, 0.8, 0.8, 0.6, -1.0, 0.0]).view([3, 2]);
        let mut nearest = vec![Nearest::new(2), Nearest::new(2)];
        offer_all(&queries, &keys, 7, &mut nearest);
        let found = |n: &Nearest| -> Vec<u32> {
            n.clone().sorted().iter().map(|neighbor| neighbor.sample).collect()
        };
        assert_eq!((found(&nearest[0]), found(&nearest[1])), (vec![8, 7], vec![7, 8]));
    }
}
