//! Metrics in Prometheus' text format.

use std::fmt;
use std::sync::atomic::AtomicU64;

use lacuna_types::BuildId;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::grpc::messages::{events_of, run_message, times_of};
use crate::registry::Shared;
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
    checkpoint_step: Family<RunLabel, Gauge>,
    skipped: Family<RunLabel, Counter>,
    redone: Family<RunLabel, Counter>,
    images: Family<RunLabel, Gauge>,
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
        gauge("lacuna_run_images", "Images behind the run's state", &self.images);
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
        registry.register(
            "lacuna_run_skipped_steps",
            "Steps without an update",
            self.skipped.clone(),
        );
        registry.register("lacuna_run_redone_steps", "Steps computed again", self.redone.clone());
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
}

/// Renders everything as it is now.
pub(super) fn render(shared: &Shared) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    let families = Families::default();
    families.register(&mut registry);
    let build: Family<BuildLabel, Gauge> = Family::default();
    build.get_or_create(&BuildLabel { version: BuildId::this().to_string() }).set(1);
    registry.register("lacuna_build_info", "What answers", build);
    let sessions: Gauge = Gauge::default();
    sessions.set(shared.n_sessions() as i64);
    registry.register("lacuna_sessions", "Workers that are connected", sessions);
    for (id, handle) in shared.runs().iter() {
        let run = run_message(id, handle);
        let label = RunLabel { run: id.to_string() };
        families.step.get_or_create(&label).set(signed(run.step));
        families.steps.get_or_create(&label).set(signed(run.total_steps));
        families.generation.get_or_create(&label).set(signed(run.generation));
        let images = run.step.saturating_mul(u64::from(handle.spec.train.batch));
        families.images.get_or_create(&label).set(signed(images));
        if let Some(step) = run.checkpoint_step {
            families.checkpoint_step.get_or_create(&label).set(signed(step));
        }
        if let Some(figures) = &run.figures {
            families.loss.get_or_create(&label).set(figures.loss);
            families.lr.get_or_create(&label).set(figures.lr);
            families.grad_norm.get_or_create(&label).set(figures.grad_norm);
            families.images_per_second.get_or_create(&label).set(figures.images_per_second);
            families.data_wait.get_or_create(&label).set(figures.data_wait);
            families.skipped.get_or_create(&label).inc_by(figures.skipped);
            families.redone.get_or_create(&label).inc_by(figures.redone);
        }
        let of_state = |state: &str| StateLabel { run: id.to_string(), state: state.to_string() };
        families.state.get_or_create(&of_state(&run.state)).set(1);
        for worker in &run.workers {
            families.workers.get_or_create(&of_state(&worker.state)).inc();
        }
        let times = times_of(handle);
        for share in Share::ALL {
            families.time.get_or_create(&of_state(share.word())).inc_by(times.seconds(share));
        }
        for (kind, n) in events_of(handle) {
            let label = KindLabel { run: id.to_string(), kind };
            families.events.get_or_create(&label).inc_by(n);
        }
    }
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
