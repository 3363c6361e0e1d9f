//! `lacuna data simulate`: what a run will read from its store, machine by machine.

use std::path::{Path, PathBuf};

use clap::Args;
use lacuna_data::simulate::{NodeReport, SimulateConfig, simulate};
use lacuna_spec::units::parse_bytes;
use lacuna_types::exit;
use serde_json::json;

use super::open;
use super::talk::{Meter, put, put_json, size, usage};
use crate::client::Output;

/// `lacuna data simulate`.
#[derive(Args, Debug)]
pub struct SimulateArgs {
    /// The run's spec.
    spec: PathBuf,
    /// Machines, each with a cache of its own.
    #[arg(long, default_value_t = 1)]
    nodes: u32,
    /// Workers of a machine.
    #[arg(long, default_value_t = 8)]
    workers: u32,
    /// Epochs to play.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
    epochs: u32,
    /// Most bytes of chunks that a machine keeps [default: as `data.cache` says, else no limit].
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    cache_size: Option<u64>,
    /// Lay key=value over the spec.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// Plays a run over the index of its data.
pub(super) fn run(args: &SimulateArgs) -> anyhow::Result<u8> {
    let spec = crate::spec::read(&args.spec, &args.set)?;
    let dataset = open(Path::new(&spec.data.shards))?;
    let resolved = spec.resolve(dataset.n_samples()).map_err(|e| usage(e.to_string()))?;
    let geometry = resolved.geometry;
    let (world, n_slots) = (u64::from(args.nodes) * u64::from(args.workers), geometry.n_slots());
    if world == 0 || world > n_slots.into() {
        return Err(usage(format!(
            "{} machines of {} workers are {world} workers: a step has {n_slots} slots, and each \
             worker needs one",
            args.nodes, args.workers
        )));
    }
    let index = dataset.index();
    let params = spec.order(dataset.n_samples(), index.n_chunks());
    let order = dataset.order_spec(params, spec.train.seed, spec.train.batch);
    order.check().map_err(|error| usage(error.to_string()))?;
    let of_spec = spec.data.cache.as_ref().map(|cache| cache.chunk_bytes());
    let config = SimulateConfig {
        nodes: args.nodes,
        workers_per_node: args.workers,
        epochs: args.epochs,
        cache_bytes: args.cache_size.or(of_spec).unwrap_or(u64::MAX),
    };
    let mut meter = Meter::new("played");
    let reports = simulate(index, &order, geometry, config, &mut |p| meter.update(p));
    drop(meter);
    match args.output {
        Output::Json => {
            let node = |report: &NodeReport| {
                json!({
                    "downloaded_bytes": report.downloaded, "downloads": report.downloads,
                    "evictions": report.evictions, "in_use_bytes_max": report.in_use_max,
                    "kept_bytes_max": report.kept_max,
                })
            };
            let cache = args.cache_size.or(of_spec);
            put_json(&json!({
                "cache_bytes": cache, "nodes": reports.iter().map(node).collect::<Vec<_>>(),
            }))?;
        }
        Output::Table => put(&text(&reports, config.cache_bytes))?,
    }
    Ok(exit::OK)
}

fn text(reports: &[NodeReport], cache_bytes: u64) -> String {
    let epochs = reports.first().map_or(0, |report| report.downloaded.len());
    let mut text = format!("{:<6}", "NODE");
    (0..epochs).for_each(|epoch| text += &format!(" {:>12}", format!("EPOCH {epoch}")));
    text += &format!(" {:>12} {:>12} {:>9}\n", "IN USE", "KEPT", "EVICTED");
    for (node, report) in reports.iter().enumerate() {
        text += &format!("{node:<6}");
        report.downloaded.iter().for_each(|bytes| text += &format!(" {:>12}", size(*bytes)));
        let (in_use, kept) = (size(report.in_use_max), size(report.kept_max));
        text += &format!(" {in_use:>12} {kept:>12} {:>9}\n", report.evictions);
    }
    let in_use = reports.iter().map(|report| report.in_use_max).max().unwrap_or(0);
    text += &match cache_bytes {
        u64::MAX => format!("a cache of {} a machine holds what is in use\n", size(in_use)),
        cache if cache < in_use => format!(
            "a cache of {} is too small: {} are in use at a time, and chunks are downloaded again \
             within an epoch\n",
            size(cache),
            size(in_use)
        ),
        cache => format!("a cache of {} holds what is in use\n", size(cache)),
    };
    text
}
