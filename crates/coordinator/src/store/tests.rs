use std::sync::Arc;

use lacuna_control::coordinator::Ending;
use lacuna_control::plan::{CheckpointRef, Communicator, Member, Plan};
use lacuna_types::{AttemptSeq, Generation, Incarnation, SampleId, Step, WorkerId};

use super::*;

fn run(name: &str) -> StoredRun {
    StoredRun {
        run_id: name.parse().unwrap(),
        spec: "{}".into(),
        n_samples: 60_000,
        fingerprint: "f".into(),
        saved: Saved::default(),
    }
}

fn event(text: &str) -> Update {
    Update::Event { kind: "k".into(), warning: false, text: text.into(), at_ms: 1 }
}

fn append(store: &mut SqliteStore, run: &RunId, text: &str) -> u64 {
    let entries = vec![Entry::Update(event(text))];
    store.write(&[Batch { run: run.clone(), entries }]).unwrap()[0][0]
}

#[test]
fn many_runs_write_at_once() {
    let mut store = SqliteStore::in_memory().unwrap();
    let (a, b): (RunId, RunId) = ("a".parse().unwrap(), "b".parse().unwrap());
    let [one, two] = ["one", "two"].map(|text| Entry::Update(event(text)));
    let fact = Entry::Fact(Record::Probe(7));
    let batches = [
        Batch { run: a.clone(), entries: vec![fact.clone(), one.clone(), fact.clone(), two] },
        Batch { run: b.clone(), entries: vec![one] },
        Batch { run: b.clone(), entries: vec![fact] },
    ];
    assert_eq!(store.write(&batches).unwrap(), [vec![1, 2], vec![1], vec![]]);
    assert_eq!(store.journal(&a).unwrap().len(), 2);
    assert_eq!(store.journal(&b).unwrap().len(), 1);
}

#[test]
fn events_of_some_kinds_are_found_behind_many_others() {
    let mut store = SqliteStore::in_memory().unwrap();
    let id: RunId = "long".parse().unwrap();
    let formed = Update::Event {
        kind: "formed".into(),
        warning: false,
        text: "generation 1".into(),
        at_ms: 1,
    };
    let entries = vec![Entry::Update(formed.clone())];
    store.write(&[Batch { run: id.clone(), entries }]).unwrap();
    for _ in 0..300 {
        append(&mut store, &id, "saved");
    }
    assert!(!store.last_events(&id, 200).unwrap().contains(&formed));
    assert_eq!(store.last_events_of(&id, &["lost", "formed"], 10).unwrap(), [formed]);
    assert_eq!(store.last_events_of(&id, &["lost"], 10).unwrap(), []);
}

#[test]
fn what_was_said_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.sqlite");
    let id: RunId = "b".parse().unwrap();
    {
        let mut store = SqliteStore::open(&path).unwrap();
        assert_eq!(store.next_epoch().unwrap(), CoordEpoch(1));
        store.put_run(&run("b")).unwrap();
        store.put_run(&run("a")).unwrap();
        store.record(&id, &facts()).unwrap();
    }
    let mut store = SqliteStore::open(&path).unwrap();
    assert_eq!(store.next_epoch().unwrap(), CoordEpoch(2));
    let runs = store.runs().unwrap();
    assert_eq!(runs.iter().map(|r| r.run_id.as_str()).collect::<Vec<_>>(), ["b", "a"]);
    assert_eq!(runs[0].saved, Saved::replay(&facts()));
    assert_eq!(runs[1].saved, Saved::default());
    let journal = store.journal(&id).unwrap();
    let records: Vec<Record> = journal.iter().map(|line| line.record.clone()).collect();
    assert_eq!(records, facts(), "every kind of record survives the file");
    assert!(journal.iter().all(|line| line.epoch == CoordEpoch(1)));
}

/// One record of every kind.
fn facts() -> Vec<Record> {
    let worker: WorkerId = "n:cpu0".parse().unwrap();
    let member = Member {
        worker: worker.clone(),
        incarnation: Incarnation(u64::MAX),
        endpoint: "127.0.0.1:4000".into(),
        slots: vec![0, 3],
    };
    let generation = Generation(4);
    let plan = Plan {
        generation,
        members: vec![member],
        communicator: Communicator::Keep,
        why: "w".into(),
    };
    let why = || "w".to_string();
    vec![
        Record::Planned(Arc::new(plan)),
        Record::Floor(Generation(5)),
        Record::Started { generation, resume_step: Step(8) },
        Record::Change(2),
        Record::Attempt(AttemptSeq(3)),
        Record::AttemptClosed(AttemptSeq(3)),
        Record::Distrusted,
        Record::Over,
        Record::Probe(u64::MAX),
        Record::NoCheckpoint,
        Record::Checkpoint(CheckpointRef { step: Step(9), manifest: "blake3:x".into() }),
        Record::CheckpointAsked,
        Record::Stopping { why: why() },
        Record::Draining { worker: worker.clone(), why: why() },
        Record::Gone(worker.clone()),
        Record::Banned { worker: worker.clone(), why: why() },
        Record::Released(worker),
        Record::BadSamples { epoch: 3, samples: vec![SampleId(8), SampleId(9)], dropped: 2 },
        Record::BadSamplesTold { epoch: 3, unlisted: 2 },
        Record::Ended(Ending::Failed { why: why(), code: 74 }),
        Record::Ended(Ending::Stopped { step: Step(9), why: why() }),
        Record::Ended(Ending::Paused { why: why() }),
        Record::Resumed,
        Record::Ended(Ending::Finished { step: Step(9), digest: u64::MAX - 1 }),
    ]
}

#[test]
fn a_file_of_another_layout_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.sqlite");
    let db = rusqlite::Connection::open(&path).unwrap();
    db.execute_batch("CREATE TABLE runs (run_id TEXT)").unwrap();
    drop(db);
    let err = SqliteStore::open(&path).unwrap_err().to_string();
    assert!(err.contains("layout 0") && err.contains("another state folder"), "{err}");
}

#[test]
fn updates_are_numbered_by_run_and_read_from_anywhere() {
    let mut store = SqliteStore::in_memory().unwrap();
    let (a, b): (RunId, RunId) = ("a".parse().unwrap(), "b".parse().unwrap());
    assert_eq!(append(&mut store, &a, "one"), 1);
    assert_eq!(append(&mut store, &b, "other"), 1);
    assert_eq!(append(&mut store, &a, "two"), 2);
    let got = store.updates(&a, 1, 10).unwrap();
    assert_eq!(got, vec![(2, event("two"))]);
    assert_eq!(store.updates(&a, 0, 1).unwrap(), vec![(1, event("one"))]);
    assert_eq!(store.last_seq(&a).unwrap(), 2);
    assert_eq!(store.last_seq(&"c".parse().unwrap()).unwrap(), 0);
    assert_eq!(store.newest_figures(&a).unwrap(), None);
}

#[test]
fn a_file_that_is_no_database_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.sqlite");
    std::fs::write(&path, b"not a database, but long enough to look at".repeat(20)).unwrap();
    let err = SqliteStore::open(&path).unwrap_err();
    assert!(err.to_string().contains("state.sqlite"), "{err}");
}

fn figures(step: u64, loss: f64) -> Figures {
    Figures {
        step,
        generation: 1,
        loss,
        lr: 0.5,
        grad_norm: 2.0,
        images_per_second: 100.0,
        data_wait: 0.25,
        skipped: 0,
        redone: 3,
        digest: None,
        memory_bytes: 0,
        mfu: None,
    }
}

#[test]
fn a_run_that_went_back_has_each_step_once() {
    let mut store = SqliteStore::in_memory().unwrap();
    let run: RunId = "a".parse().unwrap();
    let entries: Vec<Entry> = [(1, 3.0), (2, 2.0), (3, 1.5), (2, 2.5), (3, 1.0)]
        .map(|(step, loss)| {
            Entry::Update(Update::Figures { figures: figures(step, loss), at_ms: 7 })
        })
        .to_vec();
    store.write(&[Batch { run: run.clone(), entries }]).unwrap();
    let found = store.some_figures(&run, 100).unwrap();
    let losses: Vec<(u64, f64)> = found.into_values().map(|f| (f.step, f.loss)).collect();
    assert_eq!(losses, [(1, 3.0), (2, 2.5), (3, 1.0)]);
    assert_eq!(store.newest_figures(&run).unwrap(), Some(figures(3, 1.0)));
}

#[test]
fn figures_in_files_of_older_builds_are_read() {
    let old = r#"{"figures":{"generation":1,"step":3,"loss":1.0,"lr":0.5,"grad_norm":2.0,
        "images_per_second":100.0,"data_wait":0.25,"digest":null,"skipped":0,"redone":3}}"#;
    let want = Update::Figures { figures: figures(3, 1.0), at_ms: 0 };
    assert_eq!(parse_update(old).unwrap(), want);
    assert_eq!(parse_update(&serde_json::to_string(&want).unwrap()).unwrap(), want);
}
