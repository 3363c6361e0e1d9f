//! What the pages say: runs, and one run with its past.

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use askama::Template;
use lacuna_spec::units::{grouped, size};
use lacuna_track::Figures;
use lacuna_types::{BuildId, RunId};

use super::actions::{Deed, deeds_in};
use super::chart::{self, Curve};
use super::checkpoint_cache::Seen;
use crate::clock::rfc3339;
use crate::grpc::messages::{run_message, run_of_view};
use crate::registry::Shared;
use crate::store::{PicturePlace, SqliteStore, StoreError, Update};
use crate::times::{Share, Times};
use lacuna_api::v1;

/// Points of a curve at most.
const POINTS_MAX: u64 = 600;
/// Longest time that a run may have to go for it to be shown, seconds.
const ETA_MAX: u64 = 1_000_000_000;
/// Events that a page shows.
const EVENTS_MAX: u64 = 200;
/// Other runs that a page offers to compare with.
const OTHERS_MAX: usize = 12;
/// Checkpoints that a page shows.
const CHECKPOINTS_MAX: usize = 50;
/// Events of groups that a page shows.
const GROUPS_MAX: u64 = 100;
/// Kinds of events that tell of groups.
const GROUPS: &[&str] =
    &["forming", "formed", "lost", "leaving", "recovered", "set-aside", "distrusted", "stuck"];

/// A run in a list.
struct Row {
    id: String,
    state: String,
    tone: &'static str,
    step: String,
    total: String,
    loss: String,
    speed: String,
    workers: usize,
    eta: String,
}

impl Row {
    fn of(run: &v1::Run) -> Self {
        let figures = run.figures.as_ref();
        let dash = || "–".to_string();
        Row {
            id: run.run_id.clone(),
            state: run.state.clone(),
            tone: tone_of(&run.state),
            step: grouped(run.step),
            total: grouped(run.total_steps),
            loss: figures.map_or_else(dash, |f| format!("{:.4}", f.loss)),
            speed: figures.map_or_else(dash, |f| grouped(f.images_per_second as u64)),
            workers: run.workers.iter().filter(|w| w.rank.is_some()).count(),
            eta: eta(run).unwrap_or_else(dash),
        }
    }
}

fn tone_of(state: &str) -> &'static str {
    match state {
        "running" | "finished" => "good",
        "opening" | "recovering" | "forming" | "syncing" | "held" | "disputed" => "warn",
        "failed" => "bad",
        _ => "idle",
    }
}

/// Tells how long a run that trains has to go at its newest rate.
fn eta(run: &v1::Run) -> Option<String> {
    let figures = run.figures.as_ref().filter(|_| run.state == "running")?;
    let spec: serde_json::Value = serde_json::from_str(&run.spec).ok()?;
    let batch = spec.get("train")?.get("batch")?.as_f64()?;
    let seconds = run.total_steps.checked_sub(run.step)? as f64 * batch / figures.images_per_second;
    // What workers say of their rate may be anything.
    Duration::try_from_secs_f64(seconds).ok().filter(|left| left.as_secs() < ETA_MAX).map(span)
}

/// Writes a span of time in its two largest units.
fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {:02} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

#[derive(Template)]
#[template(path = "runs.html")]
struct RunsPage {
    rows: Vec<Row>,
    build: String,
}

/// Renders the list of runs, the newest first.
pub(super) fn runs(shared: &Shared) -> Result<String, askama::Error> {
    let mut all: Vec<(usize, Row)> = {
        let runs = shared.runs();
        runs.iter().map(|(id, h)| (h.order, Row::of(&run_message(id, h)))).collect()
    };
    let unopened = shared.opening.all();
    all.extend(unopened.iter().map(|(id, run)| (run.order, Row::of(&run.message(id)))));
    all.sort_by_key(|(order, _)| std::cmp::Reverse(*order));
    let rows = all.into_iter().map(|(_, row)| row).collect();
    RunsPage { rows, build: BuildId::this().to_string() }.render()
}

/// A run as it is now.
pub(super) struct Now {
    id: RunId,
    run: v1::Run,
    times: Times,
    /// Steps that were computed again, as the metrics have it.
    again: u64,
    /// Other runs, the newest first.
    others: Vec<String>,
}

impl Now {
    /// Returns the run's name.
    pub fn id(&self) -> &RunId {
        &self.id
    }
}

/// Looks at a run; `None` if there is none of this name.
pub(super) fn look(shared: &Shared, id: &RunId) -> Option<Now> {
    let runs = shared.runs();
    let handle = runs.get(id)?;
    let view = handle.ends.view.borrow().clone();
    let (times, again) = (view.account.times.clone(), view.account.again);
    let mut others: Vec<(usize, String)> =
        runs.iter().filter(|(k, _)| *k != id).map(|(k, h)| (h.order, k.to_string())).collect();
    others.sort_by_key(|(order, _)| std::cmp::Reverse(*order));
    let others = others.into_iter().map(|(_, id)| id).take(OTHERS_MAX).collect();
    Some(Now { id: id.clone(), run: run_of_view(id, handle, view), times, again, others })
}

/// What is written down of a run.
pub(super) struct Past {
    figures: BTreeMap<u64, Figures>,
    events: Vec<Update>,
    groups: Vec<Update>,
    pictures: Vec<PicturePlace>,
}

impl Past {
    /// Reads as much as a page shows.
    pub fn read(store: &SqliteStore, id: &RunId) -> Result<Self, StoreError> {
        Ok(Past {
            figures: store.some_figures(id, POINTS_MAX)?,
            events: store.last_events(id, EVENTS_MAX)?,
            groups: store.last_events_of(id, GROUPS, GROUPS_MAX)?,
            pictures: store.pictures(id)?,
        })
    }
}

struct Fact {
    name: &'static str,
    value: String,
}

struct Chart {
    title: &'static str,
    last: String,
    svg: String,
}

struct WorkerRow {
    id: String,
    rank: String,
    slots: u32,
    state: String,
    phase: String,
    step: String,
    memory: String,
    device: String,
}

struct CheckpointRow {
    step: String,
    created: String,
    size: String,
    parts: u32,
    loss: String,
    digest: String,
    tone: &'static str,
    /// What is known of its bytes.
    word: String,
    pinned: bool,
}

struct EventRow {
    when: String,
    kind: String,
    tone: &'static str,
    text: String,
}

/// Pictures of one step.
struct PictureRow {
    step: u64,
    shown: String,
    images: Vec<PicturePlace>,
}

struct TimeRow {
    word: &'static str,
    name: &'static str,
    share: String,
    time: String,
}

#[derive(Template)]
#[template(path = "run.html")]
struct RunPage<'a> {
    row: Row,
    why: String,
    steps_max: u64,
    steps_done: u64,
    facts: Vec<Fact>,
    charts: Vec<Chart>,
    time_bar: String,
    times: Vec<TimeRow>,
    workers: Vec<WorkerRow>,
    checkpoints: Vec<CheckpointRow>,
    /// Checkpoints beyond those shown.
    n_more: usize,
    checkpoints_note: String,
    deeds: &'static [Deed],
    others: &'a [String],
    groups: Vec<EventRow>,
    events: Vec<EventRow>,
    pictures: Vec<PictureRow>,
    /// What pictures are a function of besides their step, so that a browser that keeps them shows
    /// none of another run of this name.
    maths: String,
    /// Whether removed patches are shown with what their neighbours look like.
    norm_pix: bool,
    spec: String,
    build: String,
}

/// Renders the page of a run.
pub(super) fn run(
    now: &Now,
    past: &Past,
    saved: &Seen,
    may_act: bool,
) -> Result<String, askama::Error> {
    let Now { id: _, run, times, again, others } = now;
    let spec: serde_json::Value = serde_json::from_str(&run.spec).unwrap_or_default();
    let shares: Vec<(&str, f64)> =
        Share::ALL.iter().map(|share| (share.word(), times.seconds(*share))).collect();
    RunPage {
        row: Row::of(run),
        why: run.why.clone(),
        steps_max: run.total_steps.max(1),
        steps_done: run.step,
        facts: facts(run, *again),
        charts: charts(past),
        time_bar: chart::bar(&shares),
        times: time_rows(times),
        workers: run.workers.iter().map(worker_row).collect(),
        checkpoints: checkpoint_rows(saved),
        n_more: saved.checkpoints.as_ref().map_or(0, |c| c.len().saturating_sub(CHECKPOINTS_MAX)),
        checkpoints_note: checkpoints_note(saved),
        deeds: if may_act { deeds_in(&run.state) } else { &[] },
        others,
        groups: event_rows(&past.groups, true),
        events: event_rows(&past.events, false),
        pictures: picture_rows(&past.pictures),
        maths: format!("{}-{:.16}", run.etag, run.fingerprint),
        norm_pix: spec["model"]["norm_pix_loss"].as_bool().unwrap_or(false),
        spec: serde_json::to_string_pretty(&spec).unwrap_or_default(),
        build: BuildId::this().to_string(),
    }
    .render()
}

fn facts(run: &v1::Run, again: u64) -> Vec<Fact> {
    let fact = |name, value| Fact { name, value };
    let mut out = vec![
        fact("step", format!("{} of {}", grouped(run.step), grouped(run.total_steps))),
        fact("generation", run.generation.to_string()),
    ];
    if run.steps_per_epoch > 0 {
        let epochs = |steps: u64| steps as f64 / run.steps_per_epoch as f64;
        let total = epochs(run.total_steps);
        let digits = if total < 10.0 { 2 } else { 0 };
        let text = format!("{:.2} of {total:.digits$}", epochs(run.step));
        out.insert(1, fact("epoch", text));
    }
    if let Some(figures) = &run.figures {
        out.push(fact("images/s", grouped(figures.images_per_second as u64)));
        if let Some(mfu) = figures.mfu {
            out.push(fact("of the measured peak (MFU)", format!("{:.0} %", 100.0 * mfu)));
        }
        out.push(fact("waiting for data", format!("{:.1} %", 100.0 * figures.data_wait)));
        out.push(fact("steps skipped", grouped(figures.skipped)));
        out.push(fact("finished steps computed again", grouped(again)));
    }
    out.extend(eta(run).map(|left| fact("to go", left)));
    let saved =
        run.checkpoint_step.map_or("none".to_string(), |step| format!("step {}", grouped(step)));
    out.push(fact("newest checkpoint", saved));
    out.extend(run.final_digest.map(|digest| fact("state digest", format!("{digest:016x}"))));
    out
}

fn charts(past: &Past) -> Vec<Chart> {
    type Shown = (&'static str, fn(f64) -> String, fn(&Figures) -> f64);
    let all: [Shown; 4] = [
        ("loss", |v| format!("{v:.4}"), |f| f.loss),
        ("learning rate", |v| format!("{v:.2e}"), |f| f.lr),
        ("gradient norm", |v| format!("{v:.3}"), |f| f.grad_norm),
        ("images/s", |v| format!("{v:.0}"), |f| f.images_per_second),
    ];
    let draw = |(title, show, of): Shown| {
        let points: Vec<(f64, f64)> =
            past.figures.values().map(|figures| (figures.step as f64, of(figures))).collect();
        let last = points.last().map(|point| show(point.1)).unwrap_or_default();
        let svg = chart::curve(&Curve { title, points, show })?;
        Some(Chart { title, last, svg })
    };
    all.into_iter().filter_map(draw).collect()
}

fn time_rows(times: &Times) -> Vec<TimeRow> {
    let total: f64 = Share::ALL.iter().map(|share| times.seconds(*share)).sum();
    let row = |share: &Share| {
        let seconds = times.seconds(*share);
        (seconds >= 0.05).then(|| TimeRow {
            word: share.word(),
            name: share.name(),
            share: format!("{:.1} %", 100.0 * seconds / total),
            time: span(Duration::from_secs_f64(seconds)),
        })
    };
    Share::ALL.iter().filter_map(row).collect()
}

/// Gathers pictures by step, the newest first.
fn picture_rows(pictures: &[PicturePlace]) -> Vec<PictureRow> {
    let row = |images: &[PicturePlace]| PictureRow {
        step: images[0].step,
        shown: grouped(images[0].step),
        images: images.to_vec(),
    };
    pictures.chunk_by(|a, b| a.step == b.step).rev().map(row).collect()
}

/// Describes the newest checkpoints, the newest first.
fn checkpoint_rows(saved: &Seen) -> Vec<CheckpointRow> {
    let mut all: Vec<&v1::Checkpoint> = saved.checkpoints.iter().flatten().collect();
    all.sort_by_key(|checkpoint| std::cmp::Reverse(checkpoint.step));
    all.into_iter().take(CHECKPOINTS_MAX).map(checkpoint_row).collect()
}

fn checkpoint_row(checkpoint: &v1::Checkpoint) -> CheckpointRow {
    let dash = || "–".to_string();
    let damaged = !checkpoint.damage.is_empty();
    let (tone, word) = match checkpoint.verified {
        _ if damaged => ("bad", format!("damaged: {}", checkpoint.damage)),
        true => ("good", "sound".to_string()),
        false => ("idle", "not read back".to_string()),
    };
    CheckpointRow {
        step: grouped(checkpoint.step),
        created: checkpoint.created.replace('T', " ").replace('Z', " UTC"),
        size: if damaged { dash() } else { size(checkpoint.bytes) },
        parts: checkpoint.parts,
        loss: checkpoint.loss.map_or_else(dash, |loss| format!("{loss:.4}")),
        digest: if damaged { dash() } else { format!("{:016x}", checkpoint.digest) },
        tone,
        word,
        pinned: checkpoint.pinned,
    }
}

/// Says what is to be said where a list is not what it should be.
fn checkpoints_note(saved: &Seen) -> String {
    match (&saved.checkpoints, &saved.problem) {
        (_, Some(problem)) => format!("They cannot be listed now: {problem}"),
        (None, None) => "They are being listed.".to_string(),
        (Some(list), None) if list.is_empty() => "There is none yet.".to_string(),
        (Some(_), None) => String::new(),
    }
}

/// A difference between two specifications.
struct DiffRow {
    key: String,
    old: String,
    new: String,
    mark: String,
}

#[derive(Template)]
#[template(path = "diff.html")]
struct DiffPage {
    old: String,
    new: String,
    rows: Vec<DiffRow>,
    /// Whether the two compute the same.
    same_maths: bool,
    build: String,
}

/// Renders the differences between two runs' specifications.
pub(super) fn diff(
    old: String,
    new: String,
    differences: Vec<v1::SpecDifference>,
) -> Result<String, askama::Error> {
    let row = |difference: v1::SpecDifference| DiffRow {
        key: difference.key,
        old: difference.old_value,
        new: difference.new_value,
        mark: difference.mark,
    };
    let rows: Vec<DiffRow> = differences.into_iter().map(row).collect();
    let same_maths = !rows.iter().any(|row| row.mark == "maths");
    DiffPage { old, new, rows, same_maths, build: BuildId::this().to_string() }.render()
}

fn worker_row(worker: &v1::RunWorker) -> WorkerRow {
    WorkerRow {
        id: worker.worker_id.clone(),
        rank: worker.rank.map_or("–".to_string(), |rank| rank.to_string()),
        slots: worker.slots,
        state: worker.state.clone(),
        phase: worker.phase.clone(),
        step: grouped(worker.step),
        memory: match worker.memory_bytes {
            0 => "–".to_string(),
            bytes => size(bytes),
        },
        device: worker.device.clone(),
    }
}

/// Describes events, the newest first: those of groups, or all others.
fn event_rows(events: &[Update], of_groups: bool) -> Vec<EventRow> {
    let row = |event: &Update| match event {
        Update::Event { kind, warning, text, at_ms }
            if GROUPS.contains(&kind.as_str()) == of_groups =>
        {
            let tone = if *warning { "warn" } else { "idle" };
            Some(EventRow { when: clock(*at_ms), kind: kind.clone(), tone, text: text.clone() })
        }
        _ => None,
    };
    events.iter().filter_map(row).collect()
}

/// Writes a date and its time of day, UTC.
fn clock(at_ms: u64) -> String {
    rfc3339(UNIX_EPOCH + Duration::from_millis(at_ms)).replace('T', " ").replace('Z', " UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_and_spans() {
        assert_eq!(clock(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(clock(951_782_399_000), "2000-02-28 23:59:59 UTC");
        assert_eq!(clock(951_782_400_000), "2000-02-29 00:00:00 UTC");
        assert_eq!(clock(1_764_402_000_123), "2025-11-29 07:40:00 UTC");
        assert_eq!(span(Duration::from_secs(3_725)), "1 h 02 min");
        assert_eq!(span(Duration::from_secs(90_061)), "1 d 01 h");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(12), "12");
    }

    #[test]
    fn a_rate_that_is_none_gives_no_time_to_go() {
        let left = |images_per_second: f64| {
            eta(&v1::Run {
                state: "running".to_string(),
                total_steps: 100,
                spec: "{\"train\":{\"batch\":10}}".to_string(),
                figures: Some(v1::Figures { images_per_second, ..Default::default() }),
                ..Default::default()
            })
        };
        assert_eq!(left(10.0).as_deref(), Some("1 min 40 s"));
        for rate in [-1.0, 0.0, f64::NAN, 1e-300] {
            assert_eq!(left(rate), None, "{rate}");
        }
        assert_eq!(left(f64::INFINITY).as_deref(), Some("0 s"));
    }
}
