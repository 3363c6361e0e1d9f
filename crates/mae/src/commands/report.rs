//! Reports of evaluations: a table for people, JSON for programs.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use lacuna_checkpoint::layout::RunDir;
use lacuna_data::pack::class_names;
use lacuna_data::{DECODER_ID, Dataset};
use lacuna_recipe::eval::metrics::{ClassTally, Tally};
use lacuna_recipe::model::ModelConfig;
use serde_json::{Value, json};

use super::feature_file::Partial;
use super::source::Origin;
use super::{io, usage};

/// Refuses a folder that numbers for TensorBoard are not for.
pub fn check_scalars(folder: &Path) -> anyhow::Result<()> {
    let shown = folder.display();
    // A reader leaves a run's file for a newer one for good.
    let is_tracks = folder.join(lacuna_track::METRICS_FILE).exists();
    let place = folder.to_string_lossy();
    if is_tracks || RunDir::find(&place).is_ok_and(|found| found.is_some()) {
        return Err(usage(format!("--tensorboard `{shown}` is a run's own folder: give another")));
    }
    Ok(())
}

/// Writes numbers for TensorBoard: steps, names and values, by step.
pub fn write_scalars(folder: &Path, scalars: &[(u64, String, f64)]) -> anyhow::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis());
    let written = lacuna_track::write_scalars(folder, now as u64, scalars);
    let file = written.map_err(|err| io(lacuna_checkpoint::chain(&err)))?;
    println!("{}: for TensorBoard", file.display());
    Ok(())
}

/// Format of the reports.
const SCHEMA: &str = "lacuna-eval-knn/1";

/// Up to so many classes the confusion matrix is written whole; of more, the cells that are not 0.
const DENSE_CLASSES_MAX: u32 = 1000;

/// One of the two data sets.
#[derive(Clone, Debug)]
pub struct Side {
    path: String,
    fingerprint: String,
    n_samples: u64,
    n_used: usize,
    n_classes: u32,
}

impl Side {
    /// Describes a data set of which `n_used` samples took part.
    pub fn of(dataset: &Dataset, path: &Path, n_used: usize) -> Self {
        Side {
            path: path.display().to_string(),
            fingerprint: dataset.fingerprint().to_string(),
            n_samples: dataset.n_samples(),
            n_used,
            n_classes: dataset.index().n_classes(),
        }
    }

    /// Writes it as reports have it.
    pub fn json(&self) -> Value {
        let mut out = json!({
            "path": self.path,
            "fingerprint": self.fingerprint,
            "samples": self.n_samples,
            "samples_used": self.n_used,
        });
        // Class c is the c-th of them.
        let names = class_names(Path::new(&self.path));
        if !names.is_empty() {
            out["classes"] = json!(names);
        }
        out
    }
}

/// Results of one kind of features.
#[derive(Clone, Debug)]
pub struct Row {
    /// What they are.
    pub features: &'static str,
    /// Values of one.
    pub dim: usize,
    /// Numbers of neighbours, ascending, with what came of them.
    pub results: Vec<(u32, Tally)>,
}

/// What `eval knn` found.
#[derive(Debug)]
pub struct KnnReport<'a> {
    /// Where the model comes from.
    pub origin: &'a Origin,
    /// Its sizes, at the image size used.
    pub model: &'a ModelConfig,
    /// `cls` or `mean`.
    pub pool: &'static str,
    /// What the position table is.
    pub position_table: &'a str,
    /// Temperature of the votes.
    pub temperature: f64,
    /// Share of each class that voted.
    pub label_fraction: f64,
    /// Chose that share and the random encoder.
    pub seed: u64,
    /// Sides of the box that was cut out, as a part of the largest one's.
    pub crop_pct: f64,
    /// Who voted.
    pub train: Side,
    /// Who was classified.
    pub val: Side,
    /// The encoder, then the baselines.
    pub rows: Vec<Row>,
}

impl KnnReport<'_> {
    /// Writes the report as JSON.
    pub fn write(&self, mut file: Partial) -> anyhow::Result<()> {
        file.write(format!("{}\n", self.json()).as_bytes())?;
        file.publish()?;
        Ok(())
    }

    fn json(&self) -> Value {
        let n_classes = self.train.n_classes.max(self.val.n_classes);
        let row = |row: &Row| {
            let results = row.results.iter().map(|(k, tally)| result(*k, tally, n_classes));
            json!({
                "features": row.features,
                "dim": row.dim,
                "results": results.collect::<Vec<Value>>(),
            })
        };
        json!({
            "schema": SCHEMA,
            "source": self.origin.source,
            "step": self.origin.step,
            "names": self.origin.form.map(|form| form.to_string()),
            "model": self.model,
            "pool": self.pool,
            "position_table": self.position_table,
            "image_decoder": DECODER_ID,
            "crop_pct": self.crop_pct,
            "temperature": self.temperature,
            "label_fraction": self.label_fraction,
            "seed": self.seed,
            "train": self.train.json(),
            "val": self.val.json(),
            "classes": n_classes,
            "rows": self.rows.iter().map(row).collect::<Vec<Value>>(),
        })
    }

    /// Lays the results out for people.
    pub fn table(&self) -> String {
        let (train, val) = (&self.train, &self.val);
        let mut out = format!(
            "k-NN of {} images by {} ({}, temperature {}, position table: {})\n{:<16} {:>5} {:>8} \
             {:>8} {:>10}\n",
            val.n_used,
            train.n_used,
            self.pool,
            self.temperature,
            self.position_table,
            "features",
            "k",
            "top-1",
            "top-5",
            "per class"
        );
        for Row { features, results, .. } in &self.rows {
            for (k, tally) in results {
                let percent = |share: f64| format!("{:.2}%", 100.0 * share);
                out.push_str(&format!(
                    "{features:<16} {k:>5} {:>8} {:>8} {:>10}\n",
                    percent(tally.top1()),
                    percent(tally.top5()),
                    percent(tally.mean_per_class())
                ));
            }
        }
        out
    }
}

fn result(k: u32, tally: &Tally, n_classes: u32) -> Value {
    let mut out = result_json(tally, n_classes);
    out["k"] = json!(k);
    out
}

/// Describes right and wrong predictions, by class and as a confusion matrix.
pub fn result_json(tally: &Tally, n_classes: u32) -> Value {
    let class = |of: &ClassTally| {
        json!({
            "class": of.class,
            "samples": of.n,
            "top1": of.right as f64 / of.n as f64,
        })
    };
    let mut out = json!({
        "top1": tally.top1(),
        "top5": tally.top5(),
        "mean_per_class": tally.mean_per_class(),
        "per_class": tally.classes().iter().map(class).collect::<Vec<Value>>(),
    });
    if n_classes <= DENSE_CLASSES_MAX {
        out["confusion"] = json!(tally.confusion(n_classes));
    } else {
        out["confusion_cells"] = json!(tally.confusion_cells());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_classes_are_written_as_cells() {
        let mut tally = Tally::default();
        tally.add(1, &[1]);
        tally.add(1, &[0, 1]);
        let few = result(10, &tally, 2);
        assert_eq!(few["confusion"], json!([[0, 0], [1, 1]]));
        assert_eq!(few["per_class"], json!([{ "class": 1, "samples": 2, "top1": 0.5 }]));
        assert_eq!((&few["top1"], &few["top5"]), (&json!(0.5), &json!(1.0)));
        let many = result(10, &tally, DENSE_CLASSES_MAX + 1);
        assert_eq!(many["confusion_cells"], json!([[1, 0, 1], [1, 1, 1]]));
        assert_eq!(many.get("confusion"), None);
    }
}
