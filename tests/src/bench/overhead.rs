//! What being able to recover costs while nothing happens: beats, marks, the ledger, digests.
//!
//! The time of a step tells little on a busy machine: what is looked for is below a thousandth of
//! it. So the threads of trainers are read instead: how long each computed, says the kernel.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use lacuna_collective::OpLedger;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::state::{Counters, Layout, state_digest};
use lacuna_worker::cpu_state::CpuState;
use serde_json::{Value, json};

use super::stats::{Samples, millis};
use crate::history::Heard;
use crate::processes::thread_times;
use crate::rig::{Bench, Rig, RunSpec};

const WAIT: Duration = Duration::from_secs(60);
const RUN: &str = "overhead";
const ENDLESS: u64 = 100_000_000;
/// Never, for something that happens every so many steps.
const NEVER: u64 = 1_000_000;
/// Name of the thread that computes; all others talk, load or write.
const STEP_LOOP: &str = "step-loop";
/// Operations that the ledger's cost is averaged over.
const LEDGER_OPS: u64 = 10_000_000;

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Runs of each variant, in turn.
    pub rounds: usize,
    /// Length of a run.
    pub time: Duration,
}

/// A variant of the run.
#[derive(Clone, Copy, Debug)]
struct Variant {
    slot: Duration,
    track_every: u64,
    digest_every: u64,
}

/// CPU time of one trainer, per step and per second.
#[derive(Clone, Copy, Debug)]
struct Cost {
    loop_per_step: Duration,
    session_per_second: Duration,
    steps_per_second: f64,
}

fn measure(bench: &Bench, variant: Variant, time: Duration) -> anyhow::Result<Cost> {
    let mut rig = Rig::start(bench, variant.slot)?;
    let spec = RunSpec {
        name: RUN.into(),
        steps: ENDLESS,
        slots: 8,
        workers: (2, 2),
        checkpoint_steps: NEVER,
        digest_every: variant.digest_every,
        track_every: variant.track_every,
    };
    let history = rig.submit(&spec)?;
    ["n0", "n1"].into_iter().try_for_each(|node| rig.add(node))?;
    history.wait("two workers", WAIT, |h| (h.full(2)).then_some(()))?;
    let pid = rig.trainer("n0").context("there is a trainer")?;
    // Where figures come, times are taken as they do, so that whole steps are counted.
    let next_figures = |after: usize| {
        let come = |heard: &Heard| (heard.applied.len() > after).then_some(());
        history.wait("figures", WAIT, come)
    };
    let read = || -> anyhow::Result<(Instant, u64, [Duration; 2])> {
        if variant.track_every < NEVER {
            next_figures(history.look(|heard| heard.applied.len()))?;
        }
        Ok((Instant::now(), history.look(Heard::step), split(&thread_times(pid))))
    };
    let (at, step, before) = read()?;
    let _ = history.until(time, |_| None::<()>);
    let (end, last, after) = read()?;
    let seconds = (end - at).as_secs_f64();
    let steps = u32::try_from(last - step).unwrap_or(u32::MAX).max(1);
    Ok(Cost {
        loop_per_step: (after[0].saturating_sub(before[0])) / steps,
        session_per_second: (after[1].saturating_sub(before[1])).div_f64(seconds),
        steps_per_second: f64::from(steps) / seconds,
    })
}

/// Time of the step loop, and of the session: the main thread and its runtime's.
fn split(times: &[(String, u64)]) -> [Duration; 2] {
    let sum = |wanted: fn(&str) -> bool| {
        let of = times.iter().filter(|(name, _)| wanted(name)).map(|(_, ns)| ns);
        Duration::from_nanos(of.sum())
    };
    let session = |name: &str| name == "main" || name.starts_with("tokio");
    [sum(|name| name == STEP_LOOP), sum(session)]
}

/// Returns the time of a whole digest of the state of a preset, and the state's bytes.
fn digest_time(preset: &str, rounds: usize) -> anyhow::Result<(Samples, usize)> {
    let model = ModelConfig::preset(preset).context("a preset")?;
    let layout = Layout::new(model.params());
    let state = CpuState::fresh(layout.clone(), 1);
    let counters = Counters::fresh(layout.n_blocks(), 16);
    let mut samples = Samples::default();
    for _ in 0..rounds {
        let started = Instant::now();
        black_box(state_digest(&state.tensor_digests(), &counters));
        samples.add(started.elapsed());
    }
    Ok((samples, layout.numel() * 3 * size_of::<f32>()))
}

fn ledger_time() -> Duration {
    let ledger = OpLedger::default();
    let started = Instant::now();
    for op in 1..=LEDGER_OPS {
        black_box(&ledger).enter(op);
        black_box(&ledger).complete(op);
    }
    started.elapsed() / LEDGER_OPS as u32
}

/// Measures everything; returns tables and the raw numbers.
pub fn run(bench: &Bench, config: &Config) -> anyhow::Result<(String, Value)> {
    let fast = Duration::ZERO;
    let usual = Duration::from_millis(25);
    let variant = |slot, track_every, digest_every| Variant { slot, track_every, digest_every };
    let variants = [
        ("beats", variant(usual, NEVER, NEVER)),
        ("beats and marks", variant(usual, 1, NEVER)),
        ("a digest each step", variant(fast, 100, 1)),
        ("no digest", variant(fast, 100, NEVER)),
    ];
    let mut costs: Vec<Vec<Cost>> = vec![Vec::new(); variants.len()];
    for round in 0..config.rounds {
        for (of, (name, variant)) in costs.iter_mut().zip(variants) {
            let cost = measure(bench, variant, config.time)?;
            eprintln!("round {round}, {name}: {cost:?}");
            of.push(cost);
        }
    }
    let column = |of: usize, get: fn(&Cost) -> Duration| {
        let mut samples = Samples::default();
        costs[of].iter().for_each(|cost| samples.add(get(cost)));
        samples
    };
    let beats = column(0, |cost| cost.session_per_second);
    let marks = column(1, |cost| cost.session_per_second);
    let with = column(2, |cost| cost.loop_per_step);
    let without = column(3, |cost| cost.loop_per_step);
    let (digest, bytes) = digest_time("tiny", 3 * config.rounds.max(1))?;
    let ledger = ledger_time();
    let micros = |samples: &Samples| {
        let at = |share: f64| samples.quantile(share).unwrap_or_default().as_secs_f64() * 1e6;
        format!("{:.1} µs ({:.1}–{:.1})", at(0.5), at(0.0), at(1.0))
    };
    let rate = costs[1].iter().map(|cost| cost.steps_per_second).fold(0.0, f64::max);
    let page = format!(
        "| what | CPU time, median (range) |\n|---|---|\n\
         | session of a trainer, a second: 2 beats | {} |\n\
         | session of a trainer, a second: 2 beats, {rate:.1} marks | {} |\n\
         | step loop, a step of the fake engine: digest and mark each step | {} |\n\
         | step loop, a step of the fake engine: neither | {} |\n\
         | digest of the state of `tiny` ({} MB) | {} |\n\
         | ledger, an operation | {} ns |\n",
        micros(&beats),
        micros(&marks),
        micros(&with),
        micros(&without),
        bytes / 1_000_000,
        micros(&digest),
        ledger.as_nanos()
    );
    let raw = json!({
        "session_beats_ms": beats.to_json(), "session_marks_ms": marks.to_json(),
        "loop_with_digest_ms": with.to_json(), "loop_without_ms": without.to_json(),
        "digest_tiny_ms": digest.to_json(),
        "digest_tiny_bytes": bytes, "ledger_ns": ledger.as_nanos() as u64,
        "marks_per_second": rate, "time_ms": millis(config.time),
    });
    Ok((page, raw))
}
