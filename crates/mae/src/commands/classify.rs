//! `lacuna-worker eval classify`: how often a fine-tuned model or a probe names the right class.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use lacuna_checkpoint::catalog::{self, Entry};
use lacuna_checkpoint::chain;
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::load::{find_step, load_params};
use lacuna_checkpoint::manifest::Manifest;
use lacuna_checkpoint::retain::{self, Hold};
use lacuna_checkpoint::run_file::RunFile;
use lacuna_checkpoint::storage::Published;
use lacuna_data::{DECODER_ID, Dataset, ImageShape};
use lacuna_mae::classify::{EncoderWeights, Head, averaged, classifier_params};
use lacuna_recipe::eval::metrics::Tally;
use lacuna_recipe::state::Layout;
use lacuna_spec::units::parse_duration;
use lacuna_spec::{RunSpec, TaskKind, TaskSpec, parse_text};
use lacuna_types::{SampleId, Step, exit};
use serde_json::{Value, json};

use super::batches::{self, ComputeArgs, Images, ViewArgs};
use super::feature_file::Partial;
use super::page::{Mistake, Page, Pictures};
use super::report::{self, Side, result_json};
use super::source::{run_dir, shape_of};
use super::statistics::{Statistics, statistics_of};
use super::{io, usage};

/// Which classifier of a run, and how it sees and computes.
#[derive(Args, Debug)]
pub struct ModelArgs {
    /// Step of the checkpoint [default: the newest].
    #[arg(long)]
    pub step: Option<u64>,
    /// Classify with the average of the weights that the run keeps (`task.ema`).
    #[arg(long)]
    pub ema: bool,
    /// The data that the run learned from, where it lies elsewhere than then (`data.shards`): a
    /// probe's batch norm divides by its statistics.
    #[arg(long, value_name = "DIR")]
    pub train: Option<PathBuf>,
    #[command(flatten)]
    pub view: ViewArgs,
    #[command(flatten)]
    pub compute: ComputeArgs,
}

impl ModelArgs {
    /// Returns where the data of a run is.
    pub fn train_of<'a>(&'a self, spec: &'a RunSpec) -> &'a Path {
        self.train.as_deref().unwrap_or(Path::new(&spec.data.shards))
    }
}

/// `lacuna-worker eval classify`.
#[derive(Args, Debug)]
pub struct ClassifyArgs {
    /// Folder or URL of the run's checkpoints, `<checkpoint.to>/<name>`; a run with a `[task]`.
    run: PathBuf,
    /// Packed and labelled images that are classified.
    #[arg(long, value_name = "DIR")]
    val: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    /// Classify with every checkpoint, and say which is best.
    #[arg(long, conflicts_with = "step")]
    all: bool,
    /// Validate while the run trains: classify with every checkpoint as it is committed, up to the
    /// run's last step. Figures for TensorBoard come with each, the report at the end.
    #[arg(long, conflicts_with_all = ["step", "all"])]
    follow: bool,
    /// With --follow: end where there was no new checkpoint for so long.
    #[arg(long, value_name = "TIME", default_value = "6h", value_parser = parse_duration)]
    #[arg(requires = "follow")]
    patience: Duration,
    /// Where the report goes, JSON.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Folder for a file of TensorBoard with `eval/top1`, `eval/top5` and `eval/top1_per_class` by
    /// step; another than the run's own.
    #[arg(long, value_name = "DIR")]
    tensorboard: Option<PathBuf>,
    /// Pin the best checkpoint under the name `best` (`best-ema` with --ema), and release the one
    /// that had the name before.
    #[arg(long)]
    hold_best: bool,
    /// A page to look at: confusion matrix, and the mistakes that the best checkpoint was surest
    /// of.
    #[arg(long, value_name = "FILE.html")]
    page: Option<PathBuf>,
}

/// Time between two looks for a new checkpoint.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Mistakes that a page shows.
const MISTAKES_MAX: usize = 40;

/// What came of one checkpoint.
struct Judged {
    step: u64,
    /// Digest of the run's state at this step.
    state: String,
    /// Fingerprint of the data that it learned from.
    data: String,
    tally: Tally,
    /// The surest first.
    mistakes: Vec<Mistake>,
    shape: ImageShape,
}

/// Format of the report.
const SCHEMA: &str = "lacuna-eval-classify/2";

/// Classifies the validation set and writes the report.
pub fn classify(args: &ClassifyArgs) -> anyhow::Result<u8> {
    if args.hold_best && !args.all && !args.follow {
        return Err(usage("--hold-best chooses among several: give --all or --follow"));
    }
    let dir = run_of(&args.run)?;
    let val = batches::open(&args.val)?;
    let ids: Vec<u64> =
        (0..val.n_samples()).filter(|id| val.label(SampleId(*id)).is_some()).collect();
    if ids.is_empty() {
        return Err(usage(format!("--val `{}` has no labels", args.val.display())));
    }
    // Whoever cannot write is told before an hour of computing.
    let mut file = Partial::create(&args.out)?;
    let page = args.page.as_deref().map(Partial::create).transpose()?;
    if let Some(folder) = &args.tensorboard {
        report::check_scalars(folder)?;
    }
    let mut judging = Judging {
        args,
        dir: &dir,
        val: &val,
        ids: &ids,
        results: Vec::new(),
        passed: BTreeSet::new(),
        n_classes: 0,
        last_step: None,
        statistics: None,
    };
    judging.judge_all()?;
    let Judging { results, n_classes, .. } = judging;
    if results.is_empty() {
        return Err(no_checkpoint(&args.run));
    }
    // Of equal ones the earlier: what came after did not help.
    let better = |a: &&Judged, b: &&Judged| {
        a.tally.top1().total_cmp(&b.tally.top1()).then(b.step.cmp(&a.step))
    };
    let best = results.iter().max_by(better).expect("there is a checkpoint");
    if results.len() > 1 {
        println!("best: step {}", best.step);
    }
    let side = Side::of(&val, &args.val, ids.len());
    let report = report(args, &results, best.step, (n_classes, &side));
    file.write(format!("{report}\n").as_bytes())?;
    let file = file.publish()?;
    println!("{}: the report, with classes and confusion matrices", file.display());
    if let Some(file) = page {
        write_page(file, args, best, n_classes, &val)?;
    }
    if args.hold_best {
        hold(&dir, args, best)?;
    }
    Ok(exit::OK)
}

/// The judging of a run's checkpoints, one after another.
struct Judging<'a> {
    args: &'a ClassifyArgs,
    dir: &'a RunDir,
    val: &'a Dataset,
    ids: &'a [u64],
    results: Vec<Judged>,
    /// Steps of checkpoints that were removed before they were judged.
    passed: BTreeSet<u64>,
    n_classes: u32,
    /// The run's last step, known with the first checkpoint.
    last_step: Option<u64>,
    statistics: Option<Statistics>,
}

impl Judging<'_> {
    /// Judges what is asked for; with --follow also what is committed meanwhile.
    fn judge_all(&mut self) -> anyhow::Result<()> {
        let mut newest = Instant::now();
        loop {
            let n_before = self.results.len();
            for manifest in manifests(self.dir, self.args)? {
                let is_judged = self.results.iter().any(|judged| judged.step == manifest.step);
                if !is_judged && !self.passed.contains(&manifest.step) {
                    self.judge(&manifest)?;
                }
            }
            if self.results.len() > n_before {
                newest = Instant::now();
                self.tell_tensorboard(n_before)?;
            }
            let is_last = |judged: &Judged| self.last_step.is_some_and(|last| judged.step >= last);
            if !self.args.follow || self.results.iter().any(is_last) {
                return Ok(());
            }
            let patience = self.args.patience;
            if newest.elapsed() > patience {
                eprintln!(
                    "note: no new checkpoint for {patience:?}, the end of the run is not seen"
                );
                return Ok(());
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Judges one checkpoint, and says what came of it.
    fn judge(&mut self, manifest: &Manifest) -> anyhow::Result<()> {
        let (spec, task) = task_of(manifest)?;
        batches::same_classes(self.args.model.train_of(&spec), &self.args.val)?;
        self.note_known_images(manifest);
        self.n_classes = task.classes.max(self.val.index().n_classes());
        self.last_step = last_step(self.dir, &spec)?;
        let model = &self.args.model;
        let loaded = load(self.dir, manifest, (&spec, &task), model, &mut self.statistics);
        let head = match loaded {
            Err(_) if self.args.follow && find_step(self.dir, Step(manifest.step)).is_err() => {
                eprintln!("step {} was removed before it was judged", manifest.step);
                self.passed.insert(manifest.step);
                return Ok(());
            }
            loaded => loaded?,
        };
        let (tally, mistakes) = judge(&head, &spec, (self.val, self.ids), model)?;
        println!(
            "step {:>8}  top-1 {:6.2}%  top-5 {:6.2}%  per class {:6.2}%",
            manifest.step,
            100.0 * tally.top1(),
            100.0 * tally.top5(),
            100.0 * tally.mean_per_class()
        );
        self.results.push(Judged {
            step: manifest.step,
            state: manifest.state_digest.to_string(),
            data: manifest.state.facts.data_fingerprint.clone(),
            tally,
            mistakes,
            shape: shape_of(&spec.model),
        });
        Ok(())
    }

    /// Tells whoever judges a run by the very images that it learned from.
    fn note_known_images(&self, manifest: &Manifest) {
        let learned_from = &manifest.state.facts.data_fingerprint;
        if self.results.is_empty() && *learned_from == self.val.fingerprint().to_string() {
            eprintln!(
                "note: the run learned from `{}`, image by image: this tells how well it remembers \
                 them, not what it makes of others (`lacuna data subset … --rest` holds some out)",
                self.args.val.display()
            );
        }
    }

    /// Writes what came of all but the first `n` for TensorBoard, if that is wanted.
    fn tell_tensorboard(&self, n: usize) -> anyhow::Result<()> {
        let Some(folder) = &self.args.tensorboard else { return Ok(()) };
        let values = |one: &Judged| {
            let Judged { step, tally, .. } = one;
            let value = |name: &str, value: f64| (*step, format!("eval/{name}"), value);
            [
                value("top1", tally.top1()),
                value("top5", tally.top5()),
                value("top1_per_class", tally.mean_per_class()),
            ]
        };
        let scalars: Vec<_> = self.results[n..].iter().flat_map(values).collect();
        report::write_scalars(folder, &scalars)
    }
}

/// Returns the last step of a run, where its length in steps is known.
fn last_step(dir: &RunDir, spec: &RunSpec) -> anyhow::Result<Option<u64>> {
    let run = RunFile::read(dir).map_err(|err| io(chain(&err)))?;
    Ok(run.and_then(|run| spec.train.duration.steps(run.steps_per_epoch)))
}

/// Pins the best checkpoint, so that nothing removes it.
fn hold(dir: &RunDir, args: &ClassifyArgs, best: &Judged) -> anyhow::Result<()> {
    let name = if args.model.ema { "best-ema" } else { "best" }.to_string();
    let failed = |err: &dyn std::error::Error| io(chain(err));
    let why = format!("top-1 {:.2}% of {}", 100.0 * best.tally.top1(), args.val.display());
    let pin = |name: &str| {
        let (name, step, why) = (name.to_string(), Step(best.step), why.clone());
        retain::hold(dir, &Hold { name, step, why, until: None }).map_err(|err| failed(&err))
    };
    let release = |name: &str| retain::release(dir, name).map_err(|err| failed(&err));
    let held = retain::holds(dir).map_err(|err| failed(&err))?;
    let has = |name: &str| held.iter().any(|hold| hold.name == name);
    // Held by another name while this one is given anew, so that it is held all the time.
    let meanwhile = format!("{name}-next");
    if has(&meanwhile) {
        release(&meanwhile)?;
    }
    pin(&meanwhile)?;
    if has(&name) {
        release(&name)?;
    }
    if pin(&name)? == Published::Exists {
        return Err(usage(format!("somebody else makes the pin `{name}`")));
    }
    release(&meanwhile)?;
    println!("step {} is held by {name}", best.step);
    Ok(())
}

fn write_page(
    file: Partial,
    args: &ClassifyArgs,
    best: &Judged,
    n_classes: u32,
    val: &Dataset,
) -> anyhow::Result<()> {
    let title = format!("{} at step {}", args.run.display(), best.step);
    let mut page = Page::new(&title, &format!("images of {}", args.val.display()), &args.val);
    page.scores(&best.tally);
    page.confusion(&best.tally, n_classes);
    page.mistakes(&best.mistakes, &mut Pictures::new(val, best.shape, args.model.view))?;
    println!("{}: the page", page.write(file)?.display());
    Ok(())
}

fn report(
    args: &ClassifyArgs,
    results: &[Judged],
    best: u64,
    (n_classes, val): (u32, &Side),
) -> Value {
    let one = |Judged { step, state, data, tally, .. }: &Judged| {
        let mut out = result_json(tally, n_classes);
        out["step"] = json!(step);
        out["state_digest"] = json!(state);
        out["train_fingerprint"] = json!(data);
        out
    };
    json!({
        "schema": SCHEMA,
        "run": args.run,
        "val": val.json(),
        "image_decoder": DECODER_ID,
        "crop_pct": args.model.view.crop_pct,
        "weights": if args.model.ema { "ema" } else { "last" },
        "classes": n_classes,
        "best_step": best,
        "results": results.iter().map(one).collect::<Vec<Value>>(),
    })
}

/// Lists the checkpoints that are asked for.
fn manifests(dir: &RunDir, args: &ClassifyArgs) -> anyhow::Result<Vec<Manifest>> {
    if !args.all && !args.follow {
        return Ok(vec![manifest_of(dir, &args.run, args.model.step)?]);
    }
    let entries = catalog::list(dir).map_err(|err| io(chain(&err)))?;
    let mut all: Vec<Manifest> = entries.iter().filter_map(Entry::good).cloned().collect();
    all.sort_by_key(|manifest| manifest.step);
    Ok(all)
}

/// Finds the run in a folder or behind a URL.
pub fn run_of(run: &Path) -> anyhow::Result<RunDir> {
    run_dir(run)?.ok_or_else(|| usage(format!("`{}` is not a run's folder", run.display())))
}

/// Finds a run's checkpoint of a step, or its newest one.
pub fn manifest_of(dir: &RunDir, run: &Path, step: Option<u64>) -> anyhow::Result<Manifest> {
    if let Some(step) = step {
        return find_step(dir, Step(step)).map_err(|err| io(chain(&err)));
    }
    let entries = catalog::list(dir).map_err(|err| io(chain(&err)))?;
    catalog::newest_good(&entries).cloned().ok_or_else(|| no_checkpoint(run))
}

fn no_checkpoint(run: &Path) -> anyhow::Error {
    io(format!("the run `{}` has no usable checkpoint", run.display()))
}

/// Returns the spec of a checkpoint and its task.
pub fn task_of(manifest: &Manifest) -> anyhow::Result<(RunSpec, TaskSpec)> {
    let spec = parse_text("the checkpoint's spec", &manifest.spec, &[])
        .context("read the spec stored in the checkpoint")?
        .spec;
    let task = spec.task.clone().ok_or_else(|| {
        usage("the run has no `[task]`: it fills in patches, and `eval knn` judges its features")
    })?;
    Ok((spec, task))
}

/// Reads a checkpoint's classifier; a probe's statistics are those of its training set, the same
/// for all checkpoints.
pub fn load(
    dir: &RunDir,
    manifest: &Manifest,
    (spec, task): (&RunSpec, &TaskSpec),
    args: &ModelArgs,
    statistics: &mut Option<Statistics>,
) -> anyhow::Result<Head> {
    if args.ema && task.ema.is_none() {
        return Err(usage("--ema: the run keeps no average of its weights (`task.ema`)"));
    }
    let mut wanted = classifier_params(task, &spec.model);
    if args.ema {
        wanted.iter_mut().for_each(|param| param.name = averaged(&param.name));
    }
    let layout = Layout::new(wanted);
    let params = load_params(dir, manifest, &layout, |_| true).map_err(|err| io(chain(&err)))?;
    let scale = (&spec.data.mean[..], &spec.data.std[..]);
    // What was fine-tuned stands for itself; only a probe reads the encoder that it began with.
    let encoder = (task.kind == TaskKind::Linear)
        .then(|| EncoderWeights::of_task(task, &spec.model, spec.train.seed, scale))
        .transpose()
        .map_err(|err| io(chain(&err)))?;
    let head = Head::new(task, &spec.model, scale, encoder.as_ref(), &params);
    let mut head = head.on(args.compute.device()?);
    if head.wants_statistics() {
        let known = match statistics {
            Some(known) => known,
            none => none.insert(statistics_of(&head, dir, manifest, (spec, task), args)?),
        };
        head.set_statistics(known.n, &known.sums, &known.squares);
    }
    Ok(head)
}

/// One for each thread that computes on images `ids`.
pub fn threads(args: &ModelArgs, ids: &[u64]) -> std::ops::Range<usize> {
    0..args.compute.threads().min(ids.len().div_ceil(args.compute.batch()))
}

/// Computes the logits of images, and hands over those of each with its place among `ids`.
pub fn each_image(
    head: &Head,
    spec: &RunSpec,
    (dataset, ids): (&Dataset, &[u64]),
    args: &ModelArgs,
    what: &str,
    mut take: impl FnMut(usize, &[f32]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (shape, batch) = (shape_of(&spec.model), args.compute.batch());
    let images = Images { dataset, shape, view: args.view, ids, batch, unread: None };
    let workers: Vec<Head> = threads(args, ids).map(|_| head.share()).collect();
    let work = |head: &mut Head, pixels: &[u8]| head.logits(pixels);
    images.for_each(what, workers, work, |at, logits| {
        for (i, row) in logits.chunks_exact(head.n_classes()).enumerate() {
            let id = ids[at + i];
            ensure!(row.iter().all(|x| x.is_finite()), "image {id}: a logit is not finite");
            take(at + i, row)?;
        }
        Ok(())
    })
}

/// Lists the classes, the likeliest first; of equal logits the smaller class.
pub fn ranked(row: &[f32]) -> Vec<u32> {
    let mut all: Vec<u32> = (0..row.len() as u32).collect();
    all.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
    all
}

/// Counts right and wrong predictions.
fn judge(
    head: &Head,
    spec: &RunSpec,
    (val, ids): (&Dataset, &[u64]),
    args: &ModelArgs,
) -> anyhow::Result<(Tally, Vec<Mistake>)> {
    let mut tally = Tally::default();
    let mut mistakes: Vec<Mistake> = Vec::new();
    let surest_first = |mistakes: &mut Vec<Mistake>| {
        mistakes.sort_by(|a, b| b.share.total_cmp(&a.share).then(a.id.cmp(&b.id)));
        mistakes.truncate(MISTAKES_MAX);
    };
    each_image(head, spec, (val, ids), args, "val", |at, row| {
        let ranked = ranked(row);
        let id = ids[at];
        let truth = val.label(SampleId(id)).expect("it has one");
        tally.add(truth, &ranked);
        if ranked[0] != truth {
            let said = ranked[0];
            mistakes.push(Mistake { id, truth, said, share: share_of(row, said) });
        }
        // The surest ones are enough, however many there are.
        if mistakes.len() == 2 * MISTAKES_MAX {
            surest_first(&mut mistakes);
        }
        Ok(())
    })?;
    surest_first(&mut mistakes);
    Ok((tally, mistakes))
}

/// Returns the share that a model gives a class: the softmax of its logits.
fn share_of(logits: &[f32], class: u32) -> f64 {
    let most = logits.iter().fold(f32::NEG_INFINITY, |most, x| most.max(*x));
    let weight = |x: f32| f64::from(x - most).exp();
    weight(logits[class as usize]) / logits.iter().map(|x| weight(*x)).sum::<f64>()
}
