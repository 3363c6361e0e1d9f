//! Histories that a cluster must live through.

use std::time::Duration;

use lacuna_types::{Incarnation, Step, WorkerId};

use super::Cluster;
use crate::coordinator::{self, Coordinator, Ending, Hello, RunConfig};
use crate::message::ToCoordinator;
use crate::worker;

fn config(total_steps: u64, workers: std::ops::RangeInclusive<usize>) -> RunConfig {
    RunConfig {
        n_slots: 8,
        total_steps,
        workers_min: *workers.start(),
        workers_max: *workers.end(),
        checkpoint_steps: Some(50),
        checkpoint_interval: None,
    }
}

const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn a_quiet_run_finishes_in_one_generation() {
    let mut cluster = Cluster::new(config(120, 2..=2), 1);
    cluster.torn_one_in = 0;
    cluster.spawn("a:0");
    cluster.spawn("b:0");
    assert!(cluster.run(LIMIT, Cluster::finished), "{}", cluster.transcript());
    expect_test::expect![[r#"
        waiting: waiting for workers: 0 ready, 2 needed
        waiting: waiting for workers: 1 ready, 2 needed
        forming: forming generation 1: 2 workers (workers are ready)
        formed: generation 1: 2 workers at step 0, from the seed; slots: a:0 4, b:0 4
        saved: checkpoint of step 51 committed (manifest-51)
        saved: checkpoint of step 120 committed (manifest-120)
        finished: finished at step 120"#]]
    .assert_eq(&cluster.notes.join("\n"));
    assert!(cluster.run(LIMIT, |c| c.processes.is_empty()));
    assert!(cluster.exits.iter().all(|(_, code)| *code == 0), "{:?}", cluster.exits);
}

#[test]
fn a_run_waits_for_its_minimum_and_survives_any_kill() {
    let mut cluster = Cluster::new(config(300, 2..=4), 5);
    cluster.spawn("a:0");
    assert!(!cluster.run(Duration::from_secs(5), |c| c.coordinator.status().state == "running"));
    cluster.spawn("b:0");
    cluster.spawn("c:0");
    assert!(cluster.run(LIMIT, |c| c.coordinator.status().step >= Step(60)));
    cluster.kill("a:0");
    assert!(cluster.run(LIMIT, |c| c.coordinator.status().step >= Step(100)));
    cluster.kill("b:0");
    cluster.spawn("b:0");
    assert!(cluster.run(LIMIT, Cluster::finished), "{}", cluster.transcript());
}

#[test]
fn a_silent_worker_is_evicted_and_comes_back_as_a_spare() {
    let mut cluster = Cluster::new(config(600, 1..=2), 9);
    cluster.spawn("a:0");
    cluster.spawn("b:0");
    assert!(cluster.run(LIMIT, |c| c.coordinator.status().step >= Step(20)));
    let b: WorkerId = "b:0".parse().unwrap();
    cluster.processes.get_mut(&b).unwrap().stopped = true;
    let alone = |c: &Cluster| c.coordinator.status().workers.len() == 1;
    assert!(cluster.run(Duration::from_secs(10), alone), "{}", cluster.transcript());
    let here = cluster.coordinator.status().step;
    assert!(cluster.run(LIMIT, |c| c.coordinator.status().step.0 >= here.0 + 20));
    cluster.processes.get_mut(&b).unwrap().stopped = false;
    let both = |c: &Cluster| c.coordinator.status().workers.iter().all(|w| w.rank.is_some());
    let two = move |c: &Cluster| c.coordinator.status().workers.len() == 2 && both(c);
    assert!(cluster.run(LIMIT, two), "{}", cluster.transcript());
    assert!(cluster.run(LIMIT, Cluster::finished), "{}", cluster.transcript());
}

#[test]
fn stop_saves_and_the_run_goes_on_later() {
    let mut cluster = Cluster::new(config(400, 1..=3), 11);
    for name in ["a:0", "b:0", "c:0"] {
        cluster.spawn(name);
    }
    assert!(cluster.run(LIMIT, |c| c.coordinator.status().step >= Step(70)));
    cluster.feed_coordinator(coordinator::Event::Stop { why: "Ctrl-C".into() });
    let stopped = |c: &Cluster| matches!(c.coordinator.ended(), Some(Ending::Stopped { .. }));
    assert!(cluster.run(LIMIT, stopped), "{}", cluster.transcript());
    let at = cluster.saved.checkpoint.clone().unwrap().step;
    assert!(at >= Step(70) && at < Step(400));
    assert!(cluster.run(LIMIT, |c| c.processes.is_empty()));
    assert!(cluster.exits.iter().all(|(_, code)| *code == 0), "{:?}", cluster.exits);

    let (config, mut saved) = (cluster.config.clone(), cluster.saved.clone());
    saved.apply(&crate::journal::Record::Resumed);
    cluster.coordinator = Coordinator::new(config, cluster.timing.clone(), saved, cluster.now);
    cluster.spawn("d:0");
    assert!(cluster.run(LIMIT, Cluster::finished), "{}", cluster.transcript());
    assert!(cluster.transcript().contains("from the newest checkpoint"));
}

#[test]
fn a_leaver_goes_at_a_boundary_and_nothing_is_redone() {
    let mut cluster = Cluster::new(config(200, 1..=2), 4);
    cluster.spawn("a:0");
    cluster.spawn("b:0");
    assert!(cluster.run(LIMIT, |c| c.coordinator.status().step >= Step(30)));
    let b: WorkerId = "b:0".parse().unwrap();
    let incarnation = cluster.processes[&b].incarnation;
    cluster.feed_worker(&b, incarnation, worker::Event::Drain { why: "SIGTERM".into() });
    assert!(cluster.run(LIMIT, |c| !c.processes.contains_key(&b)), "{}", cluster.transcript());
    assert!(cluster.exits.contains(&(b, 75)));
    assert!(cluster.run(LIMIT, Cluster::finished), "{}", cluster.transcript());
}

#[test]
fn another_probe_class_is_refused() {
    let mut cluster = Cluster::new(config(100, 1..=2), 2);
    cluster.spawn("a:0");
    assert!(cluster.run(LIMIT, |c| c.saved.probe == Some(7)));
    let worker: WorkerId = "z:0".parse().unwrap();
    let incarnation = Incarnation(999);
    let hello = Hello {
        worker: worker.clone(),
        incarnation,
        endpoint: "x:1".into(),
        state: None,
        generation: lacuna_types::Generation(0),
        up: false,
    };
    cluster.feed_coordinator(coordinator::Event::Hello(hello));
    let message = ToCoordinator::Warm { probe: 8 };
    cluster.feed_coordinator(coordinator::Event::Message { worker, incarnation, message });
    assert!(cluster.transcript().contains("computes other bits"), "{}", cluster.transcript());
}

/// Random kills, stalls and restarts; the run must end all the same. The seed of a failure replays
/// it.
#[test]
fn any_history_of_faults_ends_at_the_same_state() {
    for seed in 0..150 {
        let mut cluster = Cluster::new(config(400, 1..=3), seed);
        let names = ["a:0", "b:0", "c:0", "d:0"];
        for name in &names[..3] {
            cluster.spawn(name);
        }
        for _ in 0..6 {
            let pause = Duration::from_millis(200 + cluster.random(4000));
            cluster.run(pause, Cluster::finished);
            let name = names[cluster.random(4) as usize];
            let id: WorkerId = name.parse().unwrap();
            match cluster.random(4) {
                0 => cluster.kill(name),
                1 if cluster.processes.contains_key(&id) => {
                    let p = cluster.processes.get_mut(&id).unwrap();
                    p.stopped = !p.stopped;
                }
                2 => cluster.feed_coordinator(coordinator::Event::Drain {
                    worker: id,
                    why: "operator".into(),
                }),
                _ => {
                    cluster.kill(name);
                    cluster.spawn(name);
                }
            }
        }
        for p in cluster.processes.values_mut() {
            p.stopped = false;
        }
        let idle = cluster.coordinator.ended().is_none();
        if idle && cluster.processes.is_empty() {
            cluster.spawn("e:0");
        }
        let done = cluster.run(LIMIT, |c| c.coordinator.ended().is_some());
        assert!(done && cluster.finished(), "seed {seed}: {}", cluster.transcript());
    }
}
