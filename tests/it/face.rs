//! What people get of a run beside its figures: pictures, logs, and calls that look and act.

use std::collections::BTreeSet;
use std::time::Instant;

use lacuna_api::client::ClientError;
use lacuna_api::error::{Reason, reason};
use lacuna_checkpoint::catalog;
use lacuna_checkpoint::layout::RunDir;
use lacuna_tests::{Cluster, Seen, said, send_signal};
use lacuna_types::exit;
use rustix::process::Signal;

use crate::fixture;

const STEPS: u64 = 120;
/// The digest of every run of [`STEPS`] steps, disturbed or not.
const DIGEST: &str = "71dfbee5180d1b53";

fn digest(seen: &Seen) -> String {
    seen.run.final_digest.map_or_else(|| seen.text(), |digest| format!("{digest:016x}"))
}

fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Option<Reason> {
    match result {
        Err(ClientError::Refused(status)) => reason(&status),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn pictures_come_once_over_a_lost_worker_and_a_lost_coordinator_and_change_no_bit() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let extra = [
        ("track.tensorboard", "\"tb\""),
        ("track.reconstructions.every", "\"20step\""),
        ("track.reconstructions.images", "3"),
        ("elastic.workers", "\"1:2\""),
    ];
    let run = cluster.submit(&fixture.spec("drawn", STEPS, &extra));
    cluster.add("a", 2);
    let rank_0 = |seen: &Seen| {
        let first = seen.run.workers.iter().find(|worker| worker.rank == Some(0));
        first.map(|worker| worker.worker_id.clone())
    };
    let seen = cluster.wait(&run, "some steps", |seen| seen.step() >= 45 && rank_0(seen).is_some());
    send_signal(cluster.pid(&rank_0(&seen).unwrap()), Signal::KILL);
    cluster.wait(&run, "a group without it", |seen| seen.count("formed") >= 2 && seen.step() >= 65);
    cluster.kill_coordinator();
    cluster.start_coordinator();
    let seen = cluster.wait_end(&run);
    assert_eq!(digest(&seen), DIGEST, "{}", seen.text());
    let seen = cluster.wait(&run, "the last pictures", |seen| {
        seen.pictures.iter().filter(|picture| picture.step == STEPS).count() == 3
    });
    let places: Vec<(u64, u32)> = seen.pictures.iter().map(|p| (p.step, p.index)).collect();
    let once: BTreeSet<(u64, u32)> = places.iter().copied().collect();
    assert_eq!(once.len(), places.len(), "each once: {places:?}");
    assert!(once.iter().all(|(step, index)| step % 20 == 0 && *index < 3), "{places:?}");
    let steps: BTreeSet<u64> = once.iter().map(|(step, _)| *step).collect();
    assert!(steps.contains(&0) && steps.contains(&40), "before the kill: {steps:?}");
    let samples: BTreeSet<u64> = seen.pictures.iter().map(|picture| picture.sample).collect();
    assert_eq!(samples, BTreeSet::from([0, 85, 170]), "the same images each time");

    let (code, png) = cluster.get("/runs/drawn/pictures/120/2");
    assert_eq!((code, &png[1..4]), (200, &b"PNG"[..]));
    let (code, page) = cluster.get("/runs/drawn");
    let page = String::from_utf8(page).unwrap();
    assert!(code == 200 && page.contains("src=\"/runs/drawn/pictures/120/0?of="), "{page}");
    assert_eq!(cluster.get("/runs/drawn/pictures/120/9").0, 404);
    assert_eq!(cluster.get("/runs/nobody/pictures/120/0").0, 404);
    // What TensorBoard reads, once the coordinator has gone in order.
    cluster.end_coordinator();
    let lines = std::fs::read_to_string(fixture.path("tb/drawn/events.jsonl")).unwrap();
    let drawn = lines.lines().filter(|line| line.contains("reconstruction/02_sample_170"));
    assert!(drawn.count() >= 3, "{lines}");
}

#[test]
fn a_cancelled_run_frees_its_workers_at_once_and_can_go_on() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let url = cluster.url.clone();
    let lacuna = |args: &[&str]| {
        let mut all = args.to_vec();
        all.extend(["--coordinator", &url]);
        said(&fixture.run(&all))
    };
    let keys = [("checkpoint.every", "[\"40step\"]")];
    let run = cluster.submit(&fixture.spec("unwanted", STEPS, &keys));
    // The next checkpoint is more than a second away when the run is cancelled.
    cluster.add_with("a", 2, &[], &[("LACUNA_FAKE_SLOT_MS", "10")]);
    let before = cluster.wait(&run, "a checkpoint", |seen| {
        seen.run.checkpoint_step.is_some_and(|saved| seen.step() >= saved + 3)
    });
    let (code, out, err) = lacuna(&["cancel", "unwanted", "--why", "a typo"]);
    assert_eq!(code, 0, "{out}{err}");
    let seen = cluster.wait_end(&run);
    let saved = seen.run.checkpoint_step.unwrap();
    assert!(
        out.contains("lacuna resume unwanted") && out.contains(&format!("step {saved}")),
        "{out}"
    );
    assert_eq!((seen.run.state.as_str(), seen.run.why.as_str()), ("cancelled", "a typo"));
    assert!(seen.text().contains("a typo"), "{}", seen.text());
    assert_eq!(Some(saved), before.run.checkpoint_step, "nothing was saved for it");
    assert_eq!(seen.count("saved"), 1, "{}", seen.text());
    let (code, ..) = lacuna(&["wait", "unwanted"]);
    assert_eq!(code, i32::from(exit::WAIT_CANCELLED));
    let (code, out, _) = lacuna(&["cancel", "unwanted"]);
    assert!(code == 0 && out.contains("is cancelled already"), "{out}");
    // Programs get the run; where a coordinator is may be said before the command, too.
    let told = |args: &[&str]| -> serde_json::Value {
        let (_, out, err) = said(&fixture.run(&[&["-c", &url, "--timeout", "9s"], args].concat()));
        serde_json::from_str(&out).unwrap_or_else(|_| panic!("{args:?}: {out}{err}"))
    };
    for args in [&["cancel", "unwanted", "-y"], &["wait", "unwanted", "-q"]] {
        let run = told(&[&args[..], &["-o", "json"]].concat());
        assert_eq!((&run["run"], &run["state"]), (&"unwanted".into(), &"cancelled".into()));
    }
    let away = told(&["ban", "elsewhere", "--for", "1h", "-o", "json"]);
    assert_eq!((&away["seconds"], &away["leaving"]), (&3600.into(), &serde_json::json!([])));
    let time = String::from_utf8(cluster.get("/metrics").1).unwrap();
    assert!(time.contains("lacuna_run_time_seconds_total"), "{time}");
    // Its workers take the next run, and then it again.
    let other = cluster.submit(&fixture.spec("wanted", 20, &[]));
    let seen = cluster.wait_end(&other);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    let (code, out, err) = lacuna(&["resume", "unwanted"]);
    assert_eq!(code, 0, "{out}{err}");
    // One that was stopped can be cancelled, too.
    let stopped = told(&["stop", "unwanted", "--progress", "off", "-o", "json"]);
    assert_eq!(stopped["state"], "stopped", "{stopped}");
    let (code, out, _) = lacuna(&["cancel", "unwanted"]);
    assert!(code == 0 && out.contains("was cancelled at step"), "{out}");
    assert_eq!(lacuna(&["wait", "unwanted"]).0, i32::from(exit::WAIT_CANCELLED));
    let (code, out, err) = lacuna(&["resume", "unwanted"]);
    assert_eq!(code, 0, "{out}{err}");
    let seen = cluster.wait_end(&run);
    assert_eq!(digest(&seen), DIGEST, "{}", seen.text());
}

#[test]
fn what_workers_log_is_there_for_who_asks() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let run = cluster.submit(&fixture.spec("talking", 20, &[("elastic.workers", "\"2:2\"")]));
    cluster.add("a", 2);
    cluster.wait_end(&run);
    let logs = |args: &[&str]| {
        let mut all = vec!["logs", "talking", "--coordinator", &cluster.url];
        all.extend(args);
        let (code, out, err) = said(&fixture.run(&all));
        assert_eq!(code, 0, "{err}");
        out
    };
    let joined = logs(&[]);
    assert!(
        joined.contains("[a:cpu0, a:cpu1] ") || joined.contains("[a:cpu1, a:cpu0] "),
        "{joined}"
    );
    let of_one = logs(&["--worker", "a:cpu1", "--all"]);
    assert!(of_one.contains("engine ready"), "{of_one}");
    assert!(of_one.lines().all(|line| line.starts_with("[a:cpu1] ")), "{of_one}");
    let last = logs(&["--tail", "1", "--output", "json"]);
    let line: serde_json::Value = serde_json::from_str(last.trim()).unwrap();
    assert!(line["worker"].as_str().is_some_and(|worker| worker.starts_with("a:cpu")), "{line}");
    let (code, _, err) = said(&fixture.run(&["logs", "nobody", "--coordinator", &cluster.url]));
    assert!(code != 0 && err.contains("nobody"), "{err}");
}

#[test]
fn a_node_that_is_banned_leaves_and_stays_out() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let extra = [("elastic.workers", "\"1:2\"")];
    let run = cluster.submit(&fixture.spec("banned", STEPS, &extra));
    cluster.add("a", 1);
    cluster.add("b", 1);
    cluster.wait(&run, "both", |seen| {
        seen.step() >= 10 && seen.run.workers.iter().filter(|w| w.rank.is_some()).count() == 2
    });
    let ban = |cluster: &Cluster<'_>, args: &[&str]| {
        let mut all = vec!["ban", "a", "--coordinator", &cluster.url];
        all.extend(args);
        said(&fixture.run(&all))
    };
    let (code, out, err) = ban(&cluster, &["--for", "1h", "--why", "a loud fan"]);
    assert!(code == 0 && out.contains("worker a:cpu0 leaves"), "{out}{err}");
    let (code, out, err) = said(&fixture.run(&["ban", "-c", &cluster.url]));
    let row = out.lines().nth(1).unwrap_or_default();
    assert!(code == 0 && row.starts_with("a ") && row.ends_with("Z a loud fan"), "{out}{err}");
    cluster.wait(&run, "a group without it", |seen| {
        seen.run.state == "running" && !seen.run.workers.iter().any(|w| w.worker_id == "a:cpu0")
    });
    // It holds for a new agent, and after a restart of the coordinator.
    cluster.kill_coordinator();
    cluster.start_coordinator();
    let gone = cluster.take("a");
    assert_eq!(gone.wait().code(), Some(i32::from(exit::DRAINED)));
    cluster.add("a", 1);
    let seen = cluster.wait_end(&run);
    assert_eq!(digest(&seen), DIGEST, "{}", seen.text());
    // Another machine may serve, says the code of who is refused.
    assert_eq!(cluster.take("a").wait().code(), Some(i32::from(exit::UNFIT)));
    let log = std::fs::read_to_string(fixture.path("a.log")).unwrap();
    assert!(log.contains("is kept out until") && log.contains("a loud fan"), "{log}");
    let (code, out, err) = ban(&cluster, &["--lift"]);
    assert!(code == 0 && out.contains("may join again"), "{out}{err}");
    let (code, out, err) = said(&fixture.run(&["ban", "-c", &cluster.url]));
    assert_eq!((code, out.as_str(), err.trim()), (0, "", "no machine is kept out"));
    cluster.add("a", 1);
    let both = fixture.spec("both", 20, &[("elastic.workers", "\"2:2\"")]);
    let submit = ["submit", both.to_str().unwrap(), "--wait", "--quiet", "-c", &cluster.url];
    let (code, out, err) = said(&fixture.run(&submit));
    assert!(code == 0 && out.contains("state       finished"), "{out}{err}");
    assert_eq!(err, "", "it is quiet");
    // Who waits for a run is sent away, too.
    assert_eq!(ban(&cluster, &[]).0, 0);
    assert_eq!(cluster.take("a").wait().code(), Some(i32::from(exit::UNFIT)));
    let (code, _, err) = ban(&cluster, &["--for", "soon"]);
    assert!(code == 2 && err.contains("90s, 15min, 24h or 7d"), "{err}");
}

#[test]
fn calls_that_look_and_compare() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let run = cluster.submit(&fixture.spec("first", 60, &[]));
    cluster.add("a", 1);
    cluster.wait_end(&run);
    cluster.submit(&fixture.spec(
        "second",
        60,
        &[("train.seed", "9"), ("track.every", "\"2step\"")],
    ));
    cluster.ask(async |mut client| {
        let found = client.validate_run("schema = 1\nname = \"a b\"\n[trian]", &[]).await.unwrap();
        assert!(found.effective.is_empty());
        let name = found.problems.iter().find(|problem| problem.key == "name").unwrap();
        assert_eq!((name.file.as_str(), name.line), ("spec", 2), "{name:?}");
        let text = "schema = 1\nname = \"a\"\nbase = \"preset:demo\"\ndata.shards = \"/d\"";
        let found = client.validate_run(text, &["train.seed=4".to_string()]).await.unwrap();
        assert!(found.effective.contains("\"seed\":4"), "{found:?}");

        let differ = client.diff_runs("first", "second").await.unwrap();
        let marks: Vec<(&str, &str)> =
            differ.iter().map(|d| (d.key.as_str(), d.mark.as_str())).collect();
        assert!(marks.contains(&("train.seed", "maths")), "{marks:?}");
        assert!(marks.contains(&("track.every", "display")), "{marks:?}");

        let metrics = client.get_metrics("first", 0).await.unwrap();
        assert_eq!(metrics.len(), 60);
        assert!(client.get_metrics("first", 10).await.unwrap().len() <= 12);

        let etag = client.get_run("second").await.unwrap().etag;
        let wanted = r#"{"elastic":{"workers":"1:1"}}"#;
        let paths = ["elastic.workers"];
        let old = client.update_run("second", &paths, wanted, "of before").await;
        assert_eq!(refused(old), Some(Reason::Conflict));
        let updated = client.update_run("second", &paths, wanted, &etag).await.unwrap();
        assert_ne!(updated.etag, etag);
        assert!(updated.spec.contains("\"1:1\""), "{}", updated.spec);
        let mut other = client.clone();
        let more = [r#"{"elastic":{"workers":"1:2"}}"#, r#"{"elastic":{"workers":"1:3"}}"#];
        let (one, another) = tokio::join!(
            client.update_run("second", &paths, more[0], &updated.etag),
            other.update_run("second", &paths, more[1], &updated.etag),
        );
        assert!(one.is_ok() != another.is_ok(), "one of two who saw the same: {one:?} {another:?}");
        let maths = client.update_run("second", &["train.seed"], wanted, "").await;
        assert_eq!(refused(maths), Some(Reason::InvalidSpec));
    });
}

#[test]
fn checkpoints_by_the_service() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let run = cluster.submit(&fixture.spec("kept", 60, &[("checkpoint.keep.last", "9")]));
    cluster.add("a", 1);
    cluster.wait_end(&run);
    cluster.ask(async |mut client| {
        let steps = async |client: &mut lacuna_api::client::Client| {
            let found = client.list_checkpoints("kept").await.unwrap();
            found.into_iter().map(|c| (c.step, c.verified, c.pinned)).collect::<Vec<_>>()
        };
        let found = steps(&mut client).await;
        assert!(found.len() >= 3 && found.iter().all(|(_, v, p)| !v && !p), "{found:?}");
        let (first, second) = (found[0].0, found[1].0);
        assert_eq!(client.verify_checkpoint("kept", second).await.unwrap(), Vec::<String>::new());
        client.pin_checkpoint("kept", first, true, "for a paper").await.unwrap();
        client.pin_checkpoint("kept", first, true, "again").await.unwrap();
        let found = steps(&mut client).await;
        assert_eq!(found[..2], [(first, false, true), (second, true, false)]);
        client.pin_checkpoint("kept", first, false, "").await.unwrap();
        assert_eq!(steps(&mut client).await[0], (first, false, false));
        let manifest = client.get_manifest("kept", second).await.unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        assert_eq!(manifest["step"], second);
        let none = client.get_manifest("kept", 61).await;
        assert_eq!(refused(none), Some(Reason::CheckpointNotFound));
        assert_eq!(refused(client.list_checkpoints("nobody").await), Some(Reason::RunNotFound));
    });
    // A flipped bit is found.
    let dir = RunDir::new(fixture.path("ckpt"), "kept".parse().unwrap());
    let entries = catalog::list(&dir).unwrap();
    let newest = catalog::newest_good(&entries).unwrap();
    let part = dir.attempt(newest.step(), newest.attempt).join(&newest.files[0].name);
    let mut bytes = std::fs::read(&part).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&part, bytes).unwrap();
    cluster.ask(async |mut client| {
        let problems = client.verify_checkpoint("kept", 60).await.unwrap();
        assert!(
            problems.iter().any(|problem| problem.contains("part-00000-of-00001")),
            "{problems:?}"
        );
    });
}

#[test]
fn the_page_shows_checkpoints_and_its_buttons_save_stop_and_resume() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let run = cluster.submit(&fixture.spec("pressed", STEPS, &[("checkpoint.read_back", "true")]));
    let other = cluster.submit(&fixture.spec("other", STEPS, &[("train.seed", "9")]));
    cluster.add("a", 2);
    cluster.wait(&run, "some steps", |seen| seen.step() >= 10);
    let page = |path: &str| {
        let (code, text) = cluster.get(path);
        (code, String::from_utf8(text).unwrap())
    };
    let (code, text) = page("/runs/pressed");
    assert!(code == 200 && text.contains("action=\"/runs/pressed/do/stop\""), "{text}");
    let url = cluster.url.clone();
    assert_eq!(cluster.press("/runs/pressed/do/checkpoint", "http://evil.example").0, 403);
    assert_eq!(cluster.press("/runs/pressed/do/burn", &url).0, 404);
    assert_eq!(cluster.press("/runs/nobody/do/stop", &url).0, 404);
    assert_eq!(cluster.get("/runs/pressed/do/stop").0, 405);

    assert_eq!(cluster.press("/runs/pressed/do/checkpoint", &url).0, 303);
    cluster.wait(&run, "a checkpoint", |seen| seen.count("saved") == 1);
    assert_eq!(cluster.press("/runs/pressed/do/stop", &url).0, 303);
    let seen = cluster.wait_end(&run);
    let state = (seen.run.state.as_str(), seen.run.why.as_str());
    assert_eq!(state, ("stopped", "asked for on the page"), "{}", seen.text());
    let (_, text) = page("/runs/pressed");
    assert!(text.contains("/do/resume") && !text.contains("/do/stop"), "{text}");
    assert_eq!(cluster.press("/runs/pressed/do/resume", &url).0, 303);
    let seen = cluster.wait_end(&run);
    assert_eq!(digest(&seen), DIGEST, "{}", seen.text());

    // The list of checkpoints may be some seconds old, and their bytes are read back meanwhile.
    let start = Instant::now();
    let text = loop {
        let (_, text) = page("/runs/pressed");
        if text.contains(&format!("<code>{DIGEST}</code>")) && text.contains(">sound<") {
            break text;
        }
        assert!(start.elapsed().as_secs() < 60, "the last checkpoint is not on the page: {text}");
        std::thread::yield_now();
    };
    assert!(!text.contains("/do/"), "a finished run has no buttons: {text}");
    assert!(text.contains("forming generation 1: 2 workers"), "why groups formed: {text}");
    assert!(text.contains("href=\"/runs/pressed/diff/other\""), "{text}");
    let (code, text) = page("/runs/pressed/diff/other");
    assert!(code == 200 && text.contains("train.seed") && text.contains("maths"), "{text}");
    assert_eq!(page("/runs/pressed/diff/nobody").0, 404);
    cluster.wait_end(&other);
}
