use super::*;

#[test]
fn every_message_to_a_worker_survives_the_wire() {
    let generation = Generation(7);
    let member = Member {
        worker: "n:cpu0".parse().unwrap(),
        incarnation: Incarnation(u64::MAX),
        endpoint: "127.0.0.1:4000".into(),
        slots: vec![0, 3],
    };
    let plan = Plan {
        generation,
        members: vec![member],
        communicator: Communicator::Keep,
        why: "w".into(),
    };
    let sync = |origin| Sync { resume_step: Step(4), origin };
    let comm_id = vec![1; 32];
    let connect =
        |origin| ToWorker::Connect { generation, comm_id: comm_id.clone(), sync: sync(origin) };
    let all = [
        ToWorker::Prepare(Arc::new(plan)),
        ToWorker::Audit { generation },
        connect(Origin::Seed),
        connect(Origin::Checkpoint { manifest: "m".into() }),
        connect(Origin::Memory { source: 1, healed: vec![0, 2] }),
        ToWorker::Start { generation, resume_step: Step(9) },
        ToWorker::Revoke { generation, why: "w".into() },
        ToWorker::Hold { generation, change: 3, why: "w".into() },
        ToWorker::Propose { generation, attempt: AttemptSeq(2), held: true },
        ToWorker::AbortAttempt { generation, attempt: AttemptSeq(2), why: "w".into() },
        ToWorker::Committed { step: Step(5), manifest: "m".into() },
        ToWorker::Exit { code: 75, why: "w".into() },
        ToWorker::Stale { current: generation },
    ];
    for message in all {
        assert_eq!(from_coordinator(to_worker(message.clone())), Ok(message));
    }
}

fn bad_sample(key: Option<&str>) -> BadSample {
    BadSample {
        step: Step(3),
        sample: SampleId(u64::MAX),
        key: key.map(ToString::to_string),
        shard: "s.tar".into(),
        offset: 512,
        error: "e".into(),
        stand_in: SampleId(4),
    }
}

#[test]
fn every_message_to_the_coordinator_survives_the_wire() {
    let generation = Generation(7);
    let attempt = AttemptSeq(2);
    let mark = StepMark {
        generation,
        step: Step(3),
        loss: 0.5,
        lr: 1e-3,
        grad_norm: 2.0,
        images_per_second: 100.0,
        data_wait: 0.01,
        digest: Some(9),
        skipped: 1,
        redone: 2,
        memory_bytes: 71,
        mfu: Some(0.25),
    };
    let beat = Beat {
        generation,
        step: Step(3),
        phase: Phase::Reduce,
        phase_ms: 12,
        op_seq: 99,
        in_op: true,
        slot_us: 41,
        data_us: 43,
        memory_bytes: 47,
    };
    let all = [
        ToCoordinator::Beat(beat),
        ToCoordinator::Warm { probe: u64::MAX },
        ToCoordinator::Prepared { generation, state: None, trained: Generation(0), kept: false },
        ToCoordinator::Prepared {
            generation,
            state: Some(Step(0)),
            trained: generation,
            kept: true,
        },
        ToCoordinator::Synced { generation, step: Step(1), digest: 5 },
        ToCoordinator::Fault {
            generation,
            kind: FaultKind::Storage,
            suspects: vec![0, 3],
            detail: "d".into(),
        },
        ToCoordinator::Fault {
            generation,
            kind: FaultKind::Checkpoint,
            suspects: vec![],
            detail: "d".into(),
        },
        ToCoordinator::Audited { generation, probe: 8 },
        ToCoordinator::StepMark(mark),
        ToCoordinator::Held { generation, step: Step(1), digest: 5 },
        ToCoordinator::Snapshotted { generation, attempt, step: Step(1), digest: 5 },
        ToCoordinator::PartDone { generation, attempt, receipt: "{}".into() },
        ToCoordinator::PartFailed { generation, attempt, detail: "d".into() },
        ToCoordinator::Leaving { why: "w".into() },
        ToCoordinator::BadSamples(BadSamples {
            epoch: 2,
            samples: vec![bad_sample(Some("a.jpg")), bad_sample(None)],
            dropped: u64::MAX,
        }),
    ];
    for message in all {
        assert_eq!(from_worker(to_coordinator(message.clone())), Ok(message));
    }
}

#[test]
fn what_means_nothing_is_refused_with_its_field() {
    let empty = from_worker(v1::SessionRequest { message: None }).unwrap_err();
    assert_eq!(empty.to_string(), "message without `message`");
    let beat = v1::Beat { phase: 99, ..Default::default() };
    let request = v1::SessionRequest { message: Some(v1::session_request::Message::Beat(beat)) };
    assert_eq!(from_worker(request).unwrap_err().to_string(), "`phase` has the unknown value 99");
    let bad = v1::Hello { worker_id: "../x".into(), ..Default::default() };
    assert!(hello(&bad).unwrap_err().to_string().contains("worker id"));
}
