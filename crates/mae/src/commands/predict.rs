//! `lacuna-worker predict`: what a run that learned classes says of every image.

use std::path::PathBuf;

use clap::Args;
use lacuna_data::pack::class_names;
use lacuna_recipe::eval::metrics::Tally;
use lacuna_spec::units::grouped;
use lacuna_types::{SampleId, exit};

use super::batches;
use super::classify::{ModelArgs, each_image, load, manifest_of, ranked, run_of, task_of};
use super::feature_file::{Content, FeatureFile, Format};

/// `lacuna-worker predict`.
#[derive(Args, Debug)]
pub struct PredictArgs {
    /// Folder or URL of the run's checkpoints, `<checkpoint.to>/<name>`; a run with a `[task]`.
    run: PathBuf,
    /// Packed images, with labels or without.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Where the logits go, a row for each image in the order of the index.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Format of the file [default: by its ending].
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Write over a file that is there.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// Writes the logits of every image.
pub fn predict(args: &PredictArgs) -> anyhow::Result<u8> {
    let format = Format::of(&args.out, args.format)?;
    format.refuse_existing(&args.out, args.force)?;
    let dir = run_of(&args.run)?;
    let manifest = manifest_of(&dir, &args.run, args.model.step)?;
    let (spec, task) = task_of(&manifest)?;
    // Logits need no labels: data of other folders is fine, and its labels count for nothing.
    let comparable = batches::same_classes(args.model.train_of(&spec), &args.data);
    if let Err(why) = &comparable {
        eprintln!("note: {why}; which of the predictions are right is not counted");
    }
    let head = load(&dir, &manifest, (&spec, &task), &args.model, &mut None)?;
    let dataset = batches::open(&args.data)?;
    let ids: Vec<u64> = (0..dataset.n_samples()).collect();
    let label = |id: u64| dataset.label(SampleId(id));
    let classes = class_names(args.model.train_of(&spec));
    let content = Content {
        labels: ids.iter().map(|id| label(*id)).collect(),
        shape: vec![head.n_classes()],
        metadata: vec![
            ("lacuna.classes", serde_json::to_string(&classes)?),
            ("lacuna.crop_pct", args.model.view.crop_pct.to_string()),
            ("lacuna.data", dataset.fingerprint().to_string()),
            ("lacuna.source", format!("{}@{}", args.run.display(), manifest.step)),
        ],
    };
    let mut file = FeatureFile::create(&args.out, format, content)?;
    let mut tally = Tally::default();
    each_image(&head, &spec, (&dataset, &ids), &args.model, "predict", |at, row| {
        if let Some(truth) = label(ids[at]).filter(|_| comparable.is_ok()) {
            tally.add(truth, &ranked(row));
        }
        file.push(row)
    })?;
    let files = file.finish()?;
    let names: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
    println!(
        "{}: logits of {} images, {} classes, by {} at step {}",
        names.join(" and "),
        grouped(dataset.n_samples()),
        head.n_classes(),
        args.run.display(),
        manifest.step
    );
    if tally.n() > 0 {
        let share = 100.0 * tally.top1();
        println!("{share:.2} % of the {} labelled ones are right", grouped(tally.n()));
    }
    Ok(exit::OK)
}
