//! What a monitoring system reads of a run that lost a worker.

use std::collections::BTreeMap;

use lacuna_tests::{Cluster, send_signal};
use rustix::process::Signal;

use crate::fixture;

const STEPS: u64 = 400;

/// The samples of a page of metrics: `name{labels}` and value.
fn scrape(cluster: &Cluster<'_>) -> BTreeMap<String, f64> {
    let (code, text) = cluster.get("/metrics");
    let text = String::from_utf8(text).unwrap();
    assert_eq!(code, 200, "{text}");
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_string(), value.parse().ok()?))
    };
    text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect()
}

#[test]
fn metrics_tell_what_groups_workers_and_checkpoints_did() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let keys = [
        ("checkpoint.every", "[\"13step\"]"),
        // Steps are faster than some disks; none of the saves is left out.
        ("checkpoint.when_busy", "\"wait\""),
        ("elastic.workers", "\"1:2\""),
    ];
    let run = cluster.submit(&fixture.spec("counted", STEPS, &keys));
    cluster.add("a", 1);
    cluster.add("b", 1);
    let seen = cluster.wait(&run, "beats of two who compute", |seen| {
        let metrics = scrape(&cluster);
        let timed = metrics.keys().filter(|key| key.starts_with("lacuna_worker_step_seconds{"));
        seen.step() >= 30 && timed.count() == 2
    });
    let metrics = scrape(&cluster);
    for worker in &seen.run.workers {
        let of = |name: &str| {
            let key = format!("{name}{{run=\"counted\",worker=\"{}\"}}", worker.worker_id);
            *metrics.get(&key).unwrap_or_else(|| panic!("no {key} in {metrics:?}"))
        };
        assert!(of("lacuna_worker_step_seconds") > 0.0);
        assert!(of("lacuna_worker_data_wait_seconds_total") >= 0.0);
        assert!((0.0..60.0).contains(&of("lacuna_worker_heartbeat_age_seconds")));
    }
    let last = seen.run.workers.iter().max_by_key(|worker| worker.rank).unwrap();
    send_signal(cluster.pid(&last.worker_id), Signal::KILL);
    let seen = cluster.wait_end(&run);
    let metrics = scrape(&cluster);
    let of = |name: &str| metrics.get(&format!("{name}{{run=\"counted\"}}")).copied();
    let prefix = "lacuna_run_generations_total{run=\"counted\",cause=\"";
    let formed = |cause: &str| metrics.get(&format!("{prefix}{cause}\"}}")).copied().unwrap_or(0.0);
    // The agent's word that it ended comes first, or else its peer's, who misses it.
    assert!(formed("lost") + formed("fault") >= 1.0, "{metrics:?}");
    assert!(formed("ready") >= 1.0 && formed("disputed") == 0.0, "{metrics:?}");
    let of_all = metrics.iter().filter(|(key, _)| key.starts_with(prefix));
    let all: f64 = of_all.map(|(_, n)| n).sum();
    assert_eq!(all, seen.run.generation as f64, "{metrics:?}");

    let batch = 32.0;
    assert_eq!(of("lacuna_run_images_total"), Some(STEPS as f64 * batch));
    let again = of("lacuna_run_redone_steps_total").unwrap();
    assert_eq!(of("lacuna_samples_repeated_total"), Some(again * batch));
    assert!(again < 10.0, "a survivor goes on where it stood: {again}");
    let spent = |state: &str| {
        let key = format!("lacuna_run_time_seconds_total{{run=\"counted\",state=\"{state}\"}}");
        metrics[&key]
    };
    assert!(spent("repeat") < 0.2 * spent("productive"), "{metrics:?}");

    let commits = seen.count("saved") as f64;
    assert!(commits >= 25.0, "{}", seen.text());
    assert_eq!(of("lacuna_checkpoint_duration_seconds_count"), Some(commits), "{metrics:?}");
    let infinite = "lacuna_checkpoint_duration_seconds_bucket{le=\"+Inf\",run=\"counted\"}";
    assert_eq!(metrics.get(infinite), Some(&commits), "{metrics:?}");
}
