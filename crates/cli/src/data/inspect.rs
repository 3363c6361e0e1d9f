//! What is in a data set, and in which order a run reads it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use lacuna_data::stats::{
    BaselineConfig, Baselines, ChannelStats, StatsError, baselines, channel_stats,
};
use lacuna_data::{Dataset, SampleReader};
use lacuna_recipe::order::EpochOrder;
use lacuna_types::{SampleId, Slot, Step, exit};
use serde_json::json;

use super::talk::{Meter, count, io, put, put_json, rows, size, usage};
use super::{open, parse_size, shape};
use crate::client::Output;
use lacuna_spec::units::grouped;

/// Images, evenly spaced, that are looked at to tell grey from colour: so many grey ones in a row
/// do not happen by chance in a set in colour.
const PEEKED: u64 = 32;

/// Smallest deviation that values are divided by; images of one colour have none.
const STD_MIN: f64 = 1e-6;

/// `lacuna data stats`.
#[derive(Args, Debug)]
pub struct StatsArgs {
    /// Folder of the data set, or its index file.
    dir: PathBuf,
    /// Also compute what predictors that learn nothing lose on patches of this side.
    #[arg(long, value_name = "P")]
    patch_size: Option<u32>,
    /// Images are resized to this before patches are cut [default: their own size].
    #[arg(long, value_parser = parse_size, value_name = "HxW")]
    size: Option<[u32; 2]>,
    /// 1 or 3 [default: as found].
    #[arg(long)]
    channels: Option<u32>,
    /// Most images to decode, evenly spaced.
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    images: u64,
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// `lacuna data show-order`.
#[derive(Args, Debug)]
pub struct OrderArgs {
    /// The run's spec.
    spec: PathBuf,
    /// Epoch, from 0; --step then counts inside it.
    #[arg(long)]
    epoch: Option<u32>,
    /// Step, from 0.
    #[arg(long, default_value_t = 0)]
    step: u64,
    /// Lay key=value over the spec.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// What the index says of the images.
struct Sizes {
    /// Images by height and width.
    by_size: BTreeMap<[u32; 2], u64>,
    /// Images by format.
    by_codec: BTreeMap<&'static str, u64>,
}

impl Sizes {
    fn of(dataset: &Dataset) -> Self {
        let mut out = Sizes { by_size: BTreeMap::new(), by_codec: BTreeMap::new() };
        for id in (0..dataset.n_samples()).map(SampleId) {
            let record = dataset.index().record(id);
            let size = [u32::from(record.height), u32::from(record.width)];
            *out.by_size.entry(size).or_default() += 1;
            *out.by_codec.entry(record.codec.extension()).or_default() += 1;
        }
        out
    }

    /// Returns the size that all images have.
    fn single(&self) -> Option<[u32; 2]> {
        let mut sizes = self.by_size.keys();
        sizes.next().copied().filter(|_| sizes.next().is_none())
    }

    fn describe(&self) -> String {
        let name = |[height, width]: &[u32; 2]| format!("{height}x{width}");
        let formats: Vec<&str> = self.by_codec.keys().copied().collect();
        let area = |size: &&[u32; 2]| u64::from(size[0]) * u64::from(size[1]);
        let smallest = self.by_size.keys().min_by_key(area).map(name).unwrap_or_default();
        let largest = self.by_size.keys().max_by_key(area).map(name).unwrap_or_default();
        let sizes = match self.by_size.iter().max_by_key(|(_, n)| **n) {
            Some((_, _)) if self.by_size.len() == 1 => smallest,
            Some((common, n)) => format!(
                "{} in {} sizes, {smallest} to {largest}, most often {} ({})",
                "height x width",
                grouped(self.by_size.len() as u64),
                name(common),
                grouped(*n)
            ),
            None => String::new(),
        };
        format!("{sizes}, {}", formats.join(" and "))
    }
}

/// Prints numbers about a data set.
pub(super) fn stats(args: &StatsArgs) -> anyhow::Result<u8> {
    let dataset = open(&args.dir)?;
    let sizes = Sizes::of(&dataset);
    let channels = match args.channels {
        Some(channels) => shape([1, 1], channels)?.channels,
        None => find_channels(&dataset),
    };
    let mut meter = Meter::new("decoded");
    let stats = channel_stats(&dataset, channels, args.images, &mut |p| meter.update(p));
    let stats = stats.map_err(stats_error)?;
    let baselines = match args.patch_size {
        Some(patch_size) => {
            let side = args.size.or(sizes.single()).ok_or_else(|| {
                usage("the images differ in size: choose one for the patches with --size HxW")
            })?;
            let config = BaselineConfig {
                shape: shape(side, channels)?,
                patch_size,
                mean: stats.mean.clone(),
                std: stats.std.iter().map(|std| std.max(STD_MIN)).collect(),
            };
            let found = baselines(&dataset, &config, args.images, &mut |p| meter.update(p));
            Some((config, found.map_err(stats_error)?))
        }
        None => None,
    };
    drop(meter);
    super::tell_skipped(&stats.skipped);
    match args.output {
        Output::Json => put_json(&stats_json(&dataset, &sizes, &stats, baselines.as_ref()))?,
        Output::Table => put(&stats_text(&dataset, &sizes, &stats, baselines.as_ref()))?,
    }
    Ok(exit::OK)
}

fn stats_error(error: StatsError) -> anyhow::Error {
    match error {
        StatsError::PatchSize { .. } => usage(error.to_string()),
        _ => io(&error),
    }
}

/// Tells whether the images are grey (1) or in colour (3); undecodable ones are passed over.
fn find_channels(dataset: &Dataset) -> u32 {
    let n = dataset.n_samples();
    let step = n.div_ceil(PEEKED).max(1);
    let mut reader = SampleReader::new();
    let mut is_grey = |id: u64| match reader.whole(dataset, SampleId(id), 3) {
        Ok(pixels) => pixels.chunks_exact(3).all(|p| p[0] == p[1] && p[1] == p[2]),
        Err(_) => true,
    };
    let all_grey = (0..n).step_by(step as usize).all(&mut is_grey);
    if all_grey { 1 } else { 3 }
}

fn list(values: &[f64]) -> String {
    let texts: Vec<String> = values.iter().map(|value| format!("{value:.4}")).collect();
    format!("[{}]", texts.join(", "))
}

fn stats_text(
    dataset: &Dataset,
    sizes: &Sizes,
    stats: &ChannelStats,
    baselines: Option<&(BaselineConfig, Baselines)>,
) -> String {
    let index = dataset.index();
    let bytes: u64 = index.shards().iter().map(|shard| shard.bytes).sum();
    let shards = count(index.shards().len() as u64, "shard");
    let mut out = vec![
        ("samples", format!("{} in {shards}, {}", grouped(dataset.n_samples()), size(bytes))),
        ("fingerprint", dataset.fingerprint().to_string()),
        ("images", sizes.describe()),
        ("channels", stats.mean.len().to_string()),
        ("mean", list(&stats.mean)),
        ("std", list(&stats.std)),
        ("looked at", count(stats.n_images, "image")),
    ];
    if index.n_classes() > 0 {
        out.insert(2, ("classes", grouped(u64::from(index.n_classes()))));
    }
    let mut text = rows(&out);
    if let Some((config, found)) = baselines {
        text += &format!(
            "\nloss of predictors that learn nothing (each patch of {} normalised, {}):\n",
            config.patch_size,
            count(found.n_images, "image")
        );
        text += &rows(&[
            ("predict zero", format!("{:.4}", found.zero)),
            ("predict the mean patch", format!("{:.4}", found.mean_patch)),
            ("predict the mean patch of each place", format!("{:.4}", found.mean_patch_by_place)),
        ]);
    }
    text
}

fn stats_json(
    dataset: &Dataset,
    sizes: &Sizes,
    stats: &ChannelStats,
    baselines: Option<&(BaselineConfig, Baselines)>,
) -> serde_json::Value {
    let index = dataset.index();
    let side = |size: &[u32; 2]| json!({ "height": size[0], "width": size[1] });
    let baselines = baselines.map(|(config, found)| {
        json!({
            "patch_size": config.patch_size, "n_images": found.n_images, "zero": found.zero,
            "mean_patch": found.mean_patch, "mean_patch_by_place": found.mean_patch_by_place,
        })
    });
    json!({
        "n_samples": dataset.n_samples(), "n_shards": index.shards().len(),
        "bytes": index.shards().iter().map(|shard| shard.bytes).sum::<u64>(),
        "fingerprint": dataset.fingerprint().to_string(), "n_classes": index.n_classes(),
        "n_sizes": sizes.by_size.len(), "size": sizes.single().as_ref().map(side),
        "formats": sizes.by_codec, "channels": stats.mean.len(), "mean": stats.mean,
        "std": stats.std, "n_images": stats.n_images, "n_skipped": stats.skipped.n,
        "baselines": baselines,
    })
}

/// Prints the samples of a step, slot by slot.
pub(super) fn show_order(args: &OrderArgs) -> anyhow::Result<u8> {
    let spec = crate::spec::read(&args.spec, &args.set)?;
    let dataset = open(Path::new(&spec.data.shards))?;
    let resolved = spec.resolve(dataset.n_samples()).map_err(|e| usage(e.to_string()))?;
    let geometry = resolved.geometry;
    let per_epoch = geometry.steps_per_epoch();
    let (epoch, place) = match args.epoch {
        Some(epoch) => (u64::from(epoch), args.step),
        None => (args.step / per_epoch, args.step % per_epoch),
    };
    let epoch = u32::try_from(epoch).ok().filter(|_| place < per_epoch).ok_or_else(|| {
        usage(format!("there is no step {}: an epoch has {}", args.step, count(per_epoch, "step")))
    })?;
    let params = spec.order(dataset.n_samples(), dataset.index().n_chunks());
    let order = dataset.order_spec(params, spec.train.seed, spec.train.batch);
    order.check().map_err(|error| usage(error.to_string()))?;
    let order = EpochOrder::new(&order, epoch);
    // Positions repeat from epoch to epoch, so those of the first serve for all.
    let slots = (0..geometry.n_slots()).map(|index| Slot { step: Step(place), index });
    let samples = |slot: Slot| -> Vec<u64> {
        order.samples(geometry.positions(slot)).iter().map(|id| id.0).collect()
    };
    let slots: Vec<Vec<u64>> = slots.map(samples).collect();
    match args.output {
        Output::Json => put_json(&json!({ "epoch": epoch, "step": place, "slots": slots }))?,
        Output::Table => {
            let mut text = format!("epoch {epoch} step {place} of {per_epoch}\n");
            for (index, samples) in slots.iter().enumerate() {
                let ids: Vec<String> = samples.iter().map(u64::to_string).collect();
                text += &format!("slot {index}: {}\n", ids.join(" "));
            }
            put(&text)?;
        }
    }
    Ok(exit::OK)
}
