use super::*;

fn run(name: &str) -> StoredRun {
    StoredRun {
        run_id: name.parse().unwrap(),
        spec: "{}".into(),
        n_samples: 60_000,
        fingerprint: "f".into(),
        saved: Saved::default(),
        ending: None,
    }
}

fn event(text: &str) -> Update {
    Update::Event { kind: "k".into(), warning: false, text: text.into(), at_ms: 1 }
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
        let saved = CheckpointRef { step: Step(9), manifest: "blake3:x".into() };
        store.record(&id, &Record::Generation(Generation(4))).unwrap();
        store.record(&id, &Record::Probe(u64::MAX)).unwrap();
        store.record(&id, &Record::Checkpoint(saved)).unwrap();
        let ending = Ending::Finished { step: Step(9), digest: u64::MAX - 1 };
        store.record(&id, &Record::Ended(ending)).unwrap();
    }
    let mut store = SqliteStore::open(&path).unwrap();
    assert_eq!(store.next_epoch().unwrap(), CoordEpoch(2));
    let runs = store.runs().unwrap();
    assert_eq!(runs.iter().map(|r| r.run_id.as_str()).collect::<Vec<_>>(), ["b", "a"]);
    assert_eq!(runs[0].saved.generation, Generation(4));
    assert_eq!(runs[0].saved.probe, Some(u64::MAX));
    assert_eq!(runs[0].saved.checkpoint.as_ref().unwrap().step, Step(9));
    let ending = Ending::Finished { step: Step(9), digest: u64::MAX - 1 };
    assert_eq!(runs[0].ending, Some(ending));
    assert_eq!(runs[1].ending, None);
}

#[test]
fn updates_are_numbered_by_run_and_read_from_anywhere() {
    let mut store = SqliteStore::in_memory().unwrap();
    let (a, b): (RunId, RunId) = ("a".parse().unwrap(), "b".parse().unwrap());
    assert_eq!(store.append(&a, &event("one")).unwrap(), 1);
    assert_eq!(store.append(&b, &event("other")).unwrap(), 1);
    assert_eq!(store.append(&a, &event("two")).unwrap(), 2);
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
