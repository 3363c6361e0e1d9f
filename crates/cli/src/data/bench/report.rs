//! The measurements as a table and as JSON.

use lacuna_data::stages::{Stage, Stages};
use serde_json::{Value, json};

use super::bottleneck::{Bottleneck, Figures};
use super::{BenchArgs, LoaderRun};
use lacuna_spec::units::grouped;

/// Bytes of a megabyte.
const MEGA: f64 = 1e6;

/// Everything that was measured.
pub(super) struct Results<'a> {
    pub(super) args: &'a BenchArgs,
    pub(super) stages: Stages,
    pub(super) runs: Vec<LoaderRun>,
    pub(super) figures: Figures,
}

/// A line of the table of parts.
struct Row {
    /// The key of the JSON output.
    key: &'static str,
    name: &'static str,
    stage: Stage,
    /// Share of the loader's time, where the loader does this.
    share: Option<f64>,
}

impl Results<'_> {
    fn rows(&self) -> Vec<Row> {
        let Stages { read, decode_whole, decode, resize, planes, .. } = self.stages;
        let share = |part| Some(self.figures.share(part));
        let render = Stage { seconds: decode.seconds + resize.seconds, ..decode };
        let row = |key, name, stage, share| Row { key, name, stage, share };
        let mut rows = vec![
            row("read", "read, checksum", read, share(Bottleneck::Reading)),
            row("decode", "decode for the crop", decode, share(Bottleneck::Decoding)),
            row("resize", "crop, resize, flip", resize, share(Bottleneck::Resizing)),
            row("render", "decode and resize", render, None),
            row("decode_whole", "decode whole images", decode_whole, None),
        ];
        if self.args.cache.is_some() {
            rows.push(row("planes", "all from planes", planes, share(Bottleneck::Planes)));
        }
        rows
    }

    /// Lays the measurements out for people.
    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "{:<20} {:>15} {:>9} {:>7}\n",
            "PART, ONE THREAD", "IMAGES/S A CORE", "MB/S", "SHARE"
        );
        for Row { name, stage, share, .. } in self.rows() {
            let share = share.map_or("-".to_string(), |share| format!("{:.0} %", 100.0 * share));
            let (rate, bytes) = match stage.n {
                0 => ("-".to_string(), "-".to_string()),
                _ => (
                    grouped(stage.rate() as u64),
                    format!("{:.1}", stage.bytes_per_second() / MEGA),
                ),
            };
            text += &format!("{name:<20} {rate:>15} {bytes:>9} {share:>7}\n");
        }
        text += &format!("\n{:<20} {:>15} {:>9}\n", "LOADER", "IMAGES/S", "PLANES");
        for run in &self.runs {
            let threads = match run.threads {
                1 => "1 thread".to_string(),
                n => format!("{n} threads"),
            };
            let planes = match self.args.cache {
                Some(_) => format!("{:.0} %", 100.0 * run.planes_share),
                None => "-".to_string(),
            };
            text += &format!("{threads:<20} {:>15} {planes:>9}\n", grouped(run.rate as u64));
        }
        text += &format!("\nbottleneck: {}\n", self.figures.sentence());
        if let Some(rate) = self.args.model_rate {
            text += &format!("model: {}\n", self.figures.need(rate));
        }
        text
    }

    /// The same for programs.
    pub(super) fn json(&self) -> Value {
        let stages: serde_json::Map<String, Value> = self
            .rows()
            .into_iter()
            .map(|Row { key, stage, share, .. }| {
                let measured = |value: f64| (stage.n > 0).then_some(value);
                let value = json!({
                    "images": stage.n, "images_per_second_per_core": measured(stage.rate()),
                    "bytes_per_second": measured(stage.bytes_per_second()), "share": share,
                });
                (key.to_string(), value)
            })
            .collect();
        let run = |run: &LoaderRun| {
            json!({
                "threads": run.threads, "images_per_second": run.rate,
                "planes_share": run.planes_share,
            })
        };
        let figures = &self.figures;
        json!({
            "cores": figures.cores, "stages": stages, "n_bad": self.stages.n_bad,
            "loader": self.runs.iter().map(run).collect::<Vec<_>>(),
            "ceiling": figures.ceiling(), "efficiency": figures.efficiency(),
            "bottleneck": figures.bottleneck().word(), "advice": figures.sentence(),
            "model": self.args.model_rate.map(|rate| figures.need_json(rate)),
        })
    }
}
