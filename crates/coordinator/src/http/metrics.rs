//! Metrics in Prometheus' text format.

use std::fmt;
use std::sync::atomic::AtomicU64;

use lacuna_control::coordinator::WorkerStatus;
use lacuna_types::{BuildId, RunId, Timestamp};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::account::{Account, DURATIONS, Durations};
use crate::grpc::messages::run_of_view;
use crate::registry::{RunHandle, Shared};
use crate::times::Share;

/// The content type of [`render`].
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

type Float = Gauge<f64, AtomicU64>;
type Seconds = Counter<f64, AtomicU64>;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct BuildLabel {
    version: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RunLabel {
    run: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StateLabel {
    run: String,
    state: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct KindLabel {
    run: String,
    kind: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CauseLabel {
    run: String,
    cause: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct WorkerLabel {
    run: String,
    worker: String,
}

/// How long each run's checkpoints took.
#[derive(Debug, Default)]
struct Saves(Vec<(RunLabel, Durations)>);

impl Collector for Saves {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let (name, kind) = ("lacuna_checkpoint_duration_seconds", MetricType::Histogram);
        let help = "From the proposal of a checkpoint to its commit";
        let mut family = encoder.encode_descriptor(name, help, None, kind)?;
        for (label, saves) in &self.0 {
            let bounds = DURATIONS.into_iter().chain([f64::MAX]);
            let buckets: Vec<(f64, u64)> = bounds.zip(saves.n).collect();
            let n = saves.n.iter().sum();
            family
                .encode_family(label)?
                .encode_histogram::<NoLabelSet>(saves.sum, n, &buckets, None)?;
        }
        Ok(())
    }
}

/// One family a metric.
#[derive(Default)]
struct Families {
    step: Family<RunLabel, Gauge>,
    steps: Family<RunLabel, Gauge>,
    generation: Family<RunLabel, Gauge>,
    loss: Family<RunLabel, Float>,
    lr: Family<RunLabel, Float>,
    grad_norm: Family<RunLabel, Float>,
    images_per_second: Family<RunLabel, Float>,
    data_wait: Family<RunLabel, Float>,
    mfu: Family<RunLabel, Float>,
    checkpoint_step: Family<RunLabel, Gauge>,
    skipped: Family<RunLabel, Counter>,
    redone: Family<RunLabel, Counter>,
    images: Family<RunLabel, Counter>,
    repeated: Family<RunLabel, Counter>,
    generations: Family<CauseLabel, Counter>,
    worker_step: Family<WorkerLabel, Float>,
    worker_data: Family<WorkerLabel, Seconds>,
    worker_beat: Family<WorkerLabel, Float>,
    worker_memory: Family<WorkerLabel, Gauge>,
    state: Family<StateLabel, Gauge>,
    workers: Family<StateLabel, Gauge>,
    time: Family<StateLabel, Seconds>,
    events: Family<KindLabel, Counter>,
}

impl Families {
    fn register(&self, registry: &mut Registry) {
        let mut gauge = |name: &str, help: &str, of: &Family<RunLabel, Gauge>| {
            registry.register(name, help, of.clone());
        };
        gauge("lacuna_run_step", "Steps behind the run's state", &self.step);
        gauge("lacuna_run_steps", "Steps that the run is to have", &self.steps);
        gauge("lacuna_run_generation", "Number of the run's newest group", &self.generation);
        gauge(
            "lacuna_run_checkpoint_step",
            "Step of the run's newest checkpoint",
            &self.checkpoint_step,
        );
        let mut float = |name: &str, help: &str, of: &Family<RunLabel, Float>| {
            registry.register(name, help, of.clone());
        };
        float("lacuna_run_loss", "Mean loss of the newest step", &self.loss);
        float("lacuna_run_learning_rate", "Learning rate of the newest step", &self.lr);
        float("lacuna_run_gradient_norm", "Norm of the newest mean gradient", &self.grad_norm);
        float(
            "lacuna_run_images_per_second",
            "Images a second of the group",
            &self.images_per_second,
        );
        float(
            "lacuna_run_data_wait_ratio",
            "Share of a step that the group waits for data",
            &self.data_wait,
        );
        float(
            "lacuna_run_mfu_ratio",
            "Model FLOPs a second over what the devices reach in large matrix products",
            &self.mfu,
        );
        registry.register(
            "lacuna_run_skipped_steps",
            "Steps without an update",
            self.skipped.clone(),
        );
        let mut counter = |name: &str, help: &str, of: &Family<RunLabel, Counter>| {
            registry.register(name, help, of.clone());
        };
        counter("lacuna_run_images", "Images behind the newest state", &self.images);
        counter(
            "lacuna_run_redone_steps",
            "Finished steps that were computed again since the coordinator started",
            &self.redone,
        );
        counter(
            "lacuna_samples_repeated",
            "Images of steps that were computed again since the coordinator started",
            &self.repeated,
        );
        registry.register(
            "lacuna_run_generations",
            "Groups formed since the coordinator started, by what made them necessary",
            self.generations.clone(),
        );
        registry.register(
            "lacuna_worker_step_seconds",
            "Time that the worker's share of a step takes it to compute",
            self.worker_step.clone(),
        );
        registry.register(
            "lacuna_worker_data_wait_seconds",
            "Time that the worker has waited for data since it started",
            self.worker_data.clone(),
        );
        registry.register(
            "lacuna_worker_heartbeat_age_seconds",
            "Time since the worker was last heard of",
            self.worker_beat.clone(),
        );
        registry.register(
            "lacuna_worker_memory_bytes",
            "Memory in use on the worker's device, or by its process where that is the host",
            self.worker_memory.clone(),
        );
        registry.register(
            "lacuna_run_state",
            "1 for the state that the run is in",
            self.state.clone(),
        );
        registry.register(
            "lacuna_run_workers",
            "Workers of the run by state",
            self.workers.clone(),
        );
        registry.register(
            "lacuna_run_time_seconds",
            "Where the run's time went since the coordinator started",
            self.time.clone(),
        );
        registry.register(
            "lacuna_run_events",
            "Events of the run since the coordinator started",
            self.events.clone(),
        );
    }

    /// Adds a run as it is at `now`.
    fn add_run(&self, id: &RunId, handle: &RunHandle, now: Timestamp, saves: &mut Saves) {
        let view = handle.ends.view.borrow().clone();
        let run = run_of_view(id, handle, view.clone());
        let label = RunLabel { run: id.to_string() };
        self.step.get_or_create(&label).set(signed(run.step));
        self.steps.get_or_create(&label).set(signed(run.total_steps));
        self.generation.get_or_create(&label).set(signed(run.generation));
        if let Some(step) = run.checkpoint_step {
            self.checkpoint_step.get_or_create(&label).set(signed(step));
        }
        if let Some(figures) = &run.figures {
            self.loss.get_or_create(&label).set(figures.loss);
            self.lr.get_or_create(&label).set(figures.lr);
            self.grad_norm.get_or_create(&label).set(figures.grad_norm);
            self.images_per_second.get_or_create(&label).set(figures.images_per_second);
            self.data_wait.get_or_create(&label).set(figures.data_wait);
            if let Some(mfu) = figures.mfu {
                self.mfu.get_or_create(&label).set(mfu);
            }
            self.skipped.get_or_create(&label).inc_by(figures.skipped);
        }
        let of_state = |state: &str| StateLabel { run: id.to_string(), state: state.to_string() };
        self.state.get_or_create(&of_state(&run.state)).set(1);
        for worker in &run.workers {
            self.workers.get_or_create(&of_state(&worker.state)).inc();
        }
        self.add_account(&label, u64::from(handle.spec.train.batch), &view.account);
        saves.0.push((label, view.account.saves));
        for (cause, n) in view.status.formed {
            let label = CauseLabel { run: id.to_string(), cause: cause.word().to_string() };
            self.generations.get_or_create(&label).inc_by(n);
        }
        for worker in &view.status.workers {
            self.add_worker(id, worker, now);
        }
    }

    fn add_account(&self, label: &RunLabel, batch: u64, account: &Account) {
        self.images.get_or_create(label).inc_by(account.marked.0 * batch);
        self.redone.get_or_create(label).inc_by(account.again);
        self.repeated.get_or_create(label).inc_by(account.again * batch);
        for share in Share::ALL {
            let label = StateLabel { run: label.run.clone(), state: share.word().to_string() };
            self.time.get_or_create(&label).inc_by(account.times.seconds(share));
        }
        for (kind, n) in &account.events {
            let label = KindLabel { run: label.run.clone(), kind: kind.clone() };
            self.events.get_or_create(&label).inc_by(*n);
        }
    }

    fn add_worker(&self, run: &RunId, worker: &WorkerStatus, now: Timestamp) {
        let label = WorkerLabel { run: run.to_string(), worker: worker.worker.to_string() };
        let seconds = |us: u64| us as f64 / 1e6;
        if worker.slots > 0 && worker.slot_us > 0 {
            let step = seconds(u64::from(worker.slots) * worker.slot_us);
            self.worker_step.get_or_create(&label).set(step);
        }
        self.worker_data.get_or_create(&label).inc_by(seconds(worker.data_us));
        if worker.memory_bytes > 0 {
            self.worker_memory.get_or_create(&label).set(signed(worker.memory_bytes));
        }
        self.worker_beat.get_or_create(&label).set(now.since(worker.last_seen).as_secs_f64());
    }
}

/// Renders everything as it is now.
pub(crate) fn render(shared: &Shared) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    let families = Families::default();
    families.register(&mut registry);
    let build: Family<BuildLabel, Gauge> = Family::default();
    build.get_or_create(&BuildLabel { version: BuildId::this().to_string() }).set(1);
    registry.register("lacuna_build_info", "What answers", build);
    let sessions: Gauge = Gauge::default();
    sessions.set(shared.n_sessions() as i64);
    registry.register("lacuna_sessions", "Workers that are connected", sessions);
    let mut saves = Saves::default();
    for (id, handle) in shared.runs().iter() {
        families.add_run(id, handle, shared.now(), &mut saves);
    }
    for (id, _) in shared.opening.all() {
        let label = StateLabel { run: id.to_string(), state: "opening".to_string() };
        families.state.get_or_create(&label).set(1);
    }
    registry.register_collector(Box::new(saves));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(classic(&text))
}

/// Turns the text of OpenMetrics into the older one, which every version of Prometheus and its
/// tools reads: there a counter is described by the name that its samples have.
fn classic(text: &str) -> String {
    let counters: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    let mut out = String::with_capacity(text.len());
    for line in text.lines().filter(|line| *line != "# EOF") {
        let mut words = line.splitn(4, ' ');
        let [mark, word, name] = [(); 3].map(|()| words.next().unwrap_or_default());
        if mark == "#" && counters.contains(&name) {
            let rest = words.next().unwrap_or_default();
            out.push_str(&format!("# {word} {name}_total {rest}"));
        } else {
            out.push_str(line);
        }
        out.push('\n');
    }
    out
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_described_by_the_names_of_their_samples() {
        let text = "# HELP a Of a.\n# TYPE a counter\na_total{x=\"1\"} 2\n# HELP b B.\n\
                    # TYPE b gauge\nb 1\n# EOF\n";
        let expected = "# HELP a_total Of a.\n# TYPE a_total counter\na_total{x=\"1\"} 2\n\
                        # HELP b B.\n# TYPE b gauge\nb 1\n";
        assert_eq!(classic(text), expected);
    }
}
