//! What a spec allows and its author most likely did not want.

use super::{EFFICIENCY_WARNING, WorkerRow, row};
use crate::run_spec::{Optimizer, Pool, Reduce, RunSpec, SLOTS_MAX, TaskKind, TaskSpec, Workers};
use crate::units::{Cadence, Length, grouped};

/// Slots above which sums of 32 bits are warned about, and the bits that this many leave a slot's
/// largest elements.
const EXACT32_SLOTS_MAX: u32 = 1024;
const EXACT32_BITS: u32 = 15;
/// What pre-training takes.
const PRETRAINING_BETAS: [f64; 2] = [0.9, 0.95];
/// Batch below which LARS is warned about.
const LARS_BATCH_MIN: u32 = 4096;
/// Least room for chunks of remote shards that is of use: four, of 16 MiB each.
const CACHE_BYTES_MIN: u64 = 64 << 20;
/// Most numbers of workers that are named as good ones.
const GOOD_MAX: usize = 6;
/// Most numbers of workers that a warning names.
const NAMED_MAX: usize = 12;
/// Highest peak that passes without a word: AdamW's steps have the size of the rate, and weights
/// are smaller than this.
const PEAK_MAX: f64 = 0.1;

/// Samples of a slot below which a probe's batch norm is warned about: their mean and deviation are
/// all that it sees in training.
const NORM_SAMPLES_MIN: u32 = 32;

/// Parameters above which a model is probably a slip of the hand: every worker holds all of them.
const PARAMS_MAX: u64 = 100_000_000_000;
/// Share of the wanted slot below which a smaller one is not advised: small slots waste a device.
const SLOT_SHARE_MIN: u32 = 4;

/// Lists what is probably not wanted; `per_epoch` are the steps of an epoch, where they are known.
pub(super) fn warnings(
    spec: &RunSpec,
    n_params: u64,
    workers: &[WorkerRow],
    per_epoch: Option<u64>,
) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    if n_params > PARAMS_MAX {
        out.push(format!(
            "{} parameters: every worker holds all of them, with their moments; is `model` right?",
            grouped(n_params)
        ));
    }
    out.extend(task_warnings(spec, per_epoch));
    shares(&mut out, spec, workers, spec.n_slots());
    arithmetic(&mut out, spec, per_epoch);
    checkpoints(&mut out, spec, per_epoch);
    folders(&mut out, spec);
    out
}

/// Lists what of a `[task]` is probably not wanted, worth saying whenever its run begins;
/// `per_epoch` as in a plan.
pub fn task_warnings(spec: &RunSpec, per_epoch: Option<u64>) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let Some(task) = &spec.task else { return out };
    if let TaskSpec { encoder: None, pool: Pool::Avg | Pool::Cls, .. } = task {
        out.push(
            "`task.encoder` is not set, so that the encoder begins from the seed: it should name \
             a run, like \"runs/mine\", or a file of weights"
                .to_string(),
        );
    }
    recipes(&mut out, spec, task);
    let steps = per_epoch.and_then(|per_epoch| spec.train.duration.steps(per_epoch));
    // After 3 / (1 - ema) updates a twentieth of the average is still what the run began with.
    if let Some((ema, steps)) = task.ema.zip(steps)
        && (steps as f64) < 3.0 / (1.0 - ema)
    {
        out.push(format!(
            "`task.ema` = {ema:?} averages over more than this run's {steps} steps: the average \
             stays near the weights that it began with"
        ));
    }
    out
}

/// What of a task's settings is another recipe's.
fn recipes(out: &mut Vec<String>, spec: &RunSpec, task: &TaskSpec) {
    let batch = spec.train.batch;
    if task.kind == TaskKind::Finetune && spec.optim.betas == PRETRAINING_BETAS {
        out.push(
            "`optim` is that of pre-training: fine-tuning has `betas` = [0.9, 0.999], \
             `decay_tokens` = false and a larger `base_lr` (presets `demo-finetune`, \
             `base-finetune`)"
                .to_string(),
        );
    }
    if task.optimizer == Optimizer::Lars && batch < LARS_BATCH_MIN {
        out.push(format!(
            "`task.optimizer` = \"lars\" with a batch of {batch}: it learns next to nothing with \
             fewer than {LARS_BATCH_MIN}; take \"sgd\" with `optim.base_lr` = 0.1"
        ));
    }
    if task.kind == TaskKind::Linear && spec.optim.weight_decay > 0.0 {
        out.push(
            "`optim.weight_decay` is that of pre-training: a linear probe has 0, and a \
             `base_lr` of 0.1 (presets `demo-linear`, `base-linear`)"
                .to_string(),
        );
    }
    let slot_batch = spec.train.slot_batch;
    if task.kind == TaskKind::Linear && slot_batch < NORM_SAMPLES_MIN {
        out.push(format!(
            "`train.slot_batch` = {slot_batch}: a probe's batch norm learns with the statistics of \
             one slot, and is judged with those of all data; take {NORM_SAMPLES_MIN} or more"
        ));
    }
    if spec.train.slot_batch == 1 && (task.mixup > 0.0 || task.cutmix > 0.0) {
        out.push(
            "`train.slot_batch` = 1: `mixup` and `cutmix` have nobody to mix with".to_string(),
        );
    }
}

fn shares(out: &mut Vec<String>, spec: &RunSpec, workers: &[WorkerRow], n_slots: u32) {
    let max = spec.elastic.workers.max;
    if max > n_slots {
        out.push(format!(
            "a step has {n_slots} slots: of {max} workers, {} are spares that only step in",
            max - n_slots
        ));
    }
    let is_low = |row: &&WorkerRow| row.efficiency < EFFICIENCY_WARNING && row.n_workers <= n_slots;
    let low: Vec<String> = workers.iter().filter(is_low).map(|r| r.n_workers.to_string()).collect();
    if !low.is_empty() {
        let mut named = low[..low.len().min(NAMED_MAX)].join(", ");
        if low.len() > NAMED_MAX {
            named += &format!(" and {} more", low.len() - NAMED_MAX);
        }
        let mut text = format!("under {EFFICIENCY_WARNING} efficiency with {named} workers");
        match (better_slot_batch(spec), better_workers(spec, n_slots)) {
            (Some(slot_batch), _) => {
                text += &format!(
                    "; `train.slot_batch` = {slot_batch} avoids it, but changes the results: give \
                     the run another name"
                );
            }
            (None, advice) => text += &advice,
        }
        out.push(text);
    }
    if spec.train.reduce == Reduce::Exact32 && n_slots > EXACT32_SLOTS_MAX {
        out.push(format!(
            "sums of 32 bits over {n_slots} slots leave a slot's gradient fewer than \
             {EXACT32_BITS} bits; `train.reduce` = \"exact\" has no such limit"
        ));
    }
}

/// Finds the largest slot that serves every allowed number of workers well.
fn better_slot_batch(spec: &RunSpec) -> Option<u32> {
    let (batch, workers) = (spec.train.batch, spec.elastic.workers);
    // A probe's batch norm sees one slot: a smaller one is worse.
    if spec.task.as_ref().is_some_and(|task| task.kind == TaskKind::Linear) {
        return None;
    }
    let serves = |slot_batch: &u32| {
        let n_slots = batch / slot_batch;
        let fine = |n| row(n_slots, n).efficiency >= EFFICIENCY_WARNING;
        batch.is_multiple_of(*slot_batch)
            && n_slots <= SLOTS_MAX
            && (workers.min..=workers.max).all(fine)
    };
    let least = spec.train.slot_batch.div_ceil(SLOT_SHARE_MIN);
    (least..spec.train.slot_batch).rev().find(serves)
}

/// Names the largest number of workers that is served well, and what to do with the others.
fn better_workers(spec: &RunSpec, n_slots: u32) -> String {
    let Workers { min, max } = spec.elastic.workers;
    let fine = |n: &u32| row(n_slots, *n).efficiency >= EFFICIENCY_WARNING;
    // One worker always is.
    let best = (1..=max.min(n_slots)).rev().find(fine).unwrap_or(1);
    if best < max {
        let (least, rest) = (best.min(min), max - best);
        return format!(
            "; `elastic.workers` = \"{least}:{best}\" with `elastic.spares` = {rest} keeps the \
             others warm instead"
        );
    }
    let good: Vec<String> =
        (min..=max).rev().filter(fine).take(GOOD_MAX).map(|n| n.to_string()).collect();
    format!("; their steps are no shorter than those of fewer: {} serve well", good.join(", "))
}

fn arithmetic(out: &mut Vec<String>, spec: &RunSpec, per_epoch: Option<u64>) {
    let (peak, decay) = (spec.peak_lr(), spec.optim.weight_decay);
    // LARS fits a step to each tensor's size, and a probe's SGD has one layer.
    let by_adamw = spec.task.as_ref().is_none_or(|task| task.optimizer == Optimizer::AdamW);
    if by_adamw && peak > PEAK_MAX {
        out.push(format!(
            "the learning rate peaks at {peak:?}: `optim.base_lr` = {:?} counts for a batch of \
             256 and is raised with the batch",
            spec.optim.base_lr
        ));
    }
    if peak * decay >= 1.0 {
        out.push(format!(
            "`optim.weight_decay` = {decay:?} takes all of a weight in one step at the \
             peak {peak:?}"
        ));
    }
    let [first, second] = spec.optim.betas;
    if first > second {
        out.push(format!(
            "`optim.betas` = [{first:?}, {second:?}] forgets gradients later than their squares: \
             is the order right?"
        ));
    }
    let (mean, std) = (&spec.data.mean, &spec.data.std);
    if mean.iter().any(|x| !(0.0..=1.0).contains(x)) || std.iter().any(|x| *x > 1.0) {
        out.push("`data.mean` or `data.std` lie outside 0 to 1: full brightness is 1".to_string());
    }
    let duration = spec.train.duration;
    if let Some(warmup) = spec.optim.warmup
        && compare(warmup, duration, per_epoch).is_some_and(|(warmup, all)| warmup == all)
    {
        out.push(format!("`optim.warmup` = {warmup} is the whole run: the rate never falls"));
    }
}

fn checkpoints(out: &mut Vec<String>, spec: &RunSpec, per_epoch: Option<u64>) {
    let (every, duration) = (&spec.checkpoint.every, spec.train.duration);
    let longer = |cadence: &Cadence| match cadence {
        Cadence::Length(length) => {
            compare(*length, duration, per_epoch).is_some_and(|(length, all)| length > all)
        }
        Cadence::Seconds(_) => false,
    };
    if every.iter().all(longer) {
        out.push(format!(
            "`checkpoint.every` is longer than the run of {duration}: nothing is saved on the way"
        ));
    }
    let n_times = every.iter().filter(|c| matches!(c, Cadence::Seconds(_))).count();
    if n_times > 1 {
        out.push("of the times in `checkpoint.every` only the shortest counts".to_string());
    }
    if every.len() - n_times > 1 {
        out.push("of the steps and epochs in `checkpoint.every` only the shortest counts".into());
    }
    if let Some(keep) = spec.checkpoint.keep.every {
        kept(out, every, keep, per_epoch);
    }
    if longer(&spec.track.every) {
        let every = spec.track.every;
        out.push(format!("`track.every` = {every} is longer than the run: nothing is recorded"));
    }
}

fn folders(out: &mut Vec<String>, spec: &RunSpec) {
    let (shards, to) = (&spec.data.shards, &spec.checkpoint.to);
    if shards == to {
        out.push("`data.shards` and `checkpoint.to` are one folder".to_string());
    }
    let Some(cache) = &spec.data.cache else { return };
    if [shards, to].contains(&&cache.dir) {
        out.push("`data.cache.dir` is also the folder of the data or of checkpoints".to_string());
    }
    if cache.chunk_bytes() < CACHE_BYTES_MIN {
        let size = cache.size;
        out.push(format!(
            "`data.cache.size` = {size} holds next to nothing: shards are read in chunks"
        ));
    }
}

/// Compares what is kept for good with what is saved.
fn kept(out: &mut Vec<String>, every: &[Cadence], keep: Length, per_epoch: Option<u64>) {
    let meets = |cadence: &Cadence| match cadence {
        // An epoch's steps are not known before its data: then it may.
        Cadence::Length(length) => compare(keep, *length, per_epoch)
            .is_none_or(|(keep, length)| keep.is_multiple_of(length)),
        Cadence::Seconds(_) => false,
    };
    if !every.iter().any(meets) {
        out.push(format!(
            "`checkpoint.keep.every` = {keep} keeps checkpoints of those steps, and \
             `checkpoint.every` makes none there but by chance: add \"{keep}\" to it"
        ));
    }
}

/// Returns two lengths in one unit, where there is one.
fn compare(a: Length, b: Length, per_epoch: Option<u64>) -> Option<(u64, u64)> {
    match (a, b) {
        (Length::Steps(a), Length::Steps(b)) => Some((a, b)),
        (Length::Epochs(a), Length::Epochs(b)) => Some((a.into(), b.into())),
        _ => Some((a.steps(per_epoch?)?, b.steps(per_epoch?)?)),
    }
}
