use super::*;
use crate::plan::{Member, Origin, Sync};
use lacuna_types::Incarnation;

fn plan(generation: u64) -> Arc<Plan> {
    let member = Member {
        worker: "a:0".parse().unwrap(),
        incarnation: Incarnation(1),
        endpoint: "127.0.0.1:1".into(),
        slots: vec![0],
    };
    Arc::new(Plan {
        generation: Generation(generation),
        members: vec![member],
        communicator: Communicator::New,
        why: "test".into(),
    })
}

fn session() -> Session {
    let mut session = Session::new(
        Patience { orphan: Duration::from_secs(5), give_up: Duration::from_secs(10) },
        Timestamp(0),
    );
    let none = session.handle(Timestamp(0), Event::Connected);
    assert_eq!(none, vec![]);
    session
}

fn feed(session: &mut Session, event: Event) -> Vec<Command> {
    session.handle(Timestamp(0), event)
}

fn connect(session: &mut Session, generation: u64) -> Vec<Command> {
    feed(session, Event::Received(ToWorker::Prepare(plan(generation))));
    let sync = Sync { resume_step: Step(0), origin: Origin::Seed };
    let generation = Generation(generation);
    feed(session, Event::Received(ToWorker::Connect { generation, comm_id: vec![], sync }))
}

#[test]
fn a_new_plan_waits_until_the_old_communicator_is_left() {
    let mut session = session();
    assert!(matches!(connect(&mut session, 1)[..], [Command::Connect { .. }]));
    let left = feed(&mut session, Event::Received(ToWorker::Prepare(plan(2))));
    assert_eq!(left, vec![Command::Leave { up_to: Generation(2) }]);
    let said = feed(&mut session, Event::Report(Report::Down { state: Some(Step(4)) }));
    let prepared = ToCoordinator::Prepared {
        generation: Generation(2),
        state: Some(Step(4)),
        trained: Generation(0),
        kept: false,
    };
    assert_eq!(said, vec![Command::Send(prepared)]);
}

#[test]
fn what_belongs_to_a_lower_generation_changes_nothing() {
    let mut session = session();
    connect(&mut session, 5);
    let generation = Generation(4);
    let attempt = AttemptSeq(1);
    for stale in [
        ToWorker::Prepare(plan(4)),
        ToWorker::Prepare(plan(5)),
        ToWorker::Start { generation, resume_step: Step(0) },
        ToWorker::Revoke { generation, why: String::new() },
        ToWorker::Hold { generation, change: 1, why: String::new() },
        ToWorker::Propose { generation, attempt, held: false },
        ToWorker::AbortAttempt { generation, attempt, why: String::new() },
    ] {
        assert_eq!(feed(&mut session, Event::Received(stale.clone())), vec![], "{stale:?}");
    }
    let held = Report::Held { generation, step: Step(3), digest: 1 };
    assert_eq!(feed(&mut session, Event::Report(held)), vec![], "an old report is not sent");
}

#[test]
fn a_worker_without_a_coordinator_trains_on_until_it_gives_up() {
    let mut session = session();
    connect(&mut session, 1);
    assert_eq!(session.handle(Timestamp::from_millis(1000), Event::Disconnected), vec![]);
    assert_eq!(session.next_deadline(), Some(Timestamp::from_millis(6_000)));
    assert_eq!(session.handle(Timestamp::from_millis(10_999), Event::Tick), vec![]);
    let gone = session.handle(Timestamp::from_millis(11_000), Event::Tick);
    assert!(matches!(gone[..], [Command::Exit { code: exit::UNREACHABLE, .. }]), "{gone:?}");
}

#[test]
fn a_drain_is_said_once_and_a_second_one_ends_the_process() {
    let mut session = session();
    let why = || "SIGTERM".to_string();
    let said = feed(&mut session, Event::Drain { why: why() });
    assert_eq!(said, vec![Command::Send(ToCoordinator::Leaving { why: why() })]);
    let again = feed(&mut session, Event::Drain { why: why() });
    assert!(matches!(again[..], [Command::Exit { code: exit::INTERRUPTED, .. }]));
}

#[test]
fn given_up_by_the_coordinator_it_joins_again_with_its_state() {
    let mut session = session();
    connect(&mut session, 1);
    let out = feed(&mut session, Event::Received(ToWorker::Stale { current: Generation(3) }));
    assert!(out.contains(&Command::Leave { up_to: Generation(1) }), "{out:?}");
    assert!(out.contains(&Command::Reconnect));
    feed(&mut session, Event::Report(Report::Warm { probe: 9 }));
    feed(&mut session, Event::Report(Report::Down { state: Some(Step(8)) }));
    assert_eq!(session.state(), Some(Step(8)));
    assert_eq!(feed(&mut session, Event::Connected), vec![]);
    let hello = feed(&mut session, Event::Welcomed);
    assert_eq!(hello, vec![Command::Send(ToCoordinator::Warm { probe: 9 })]);
}

/// Brings a session to training in generation 1.
fn training() -> Session {
    let mut session = session();
    connect(&mut session, 1);
    let generation = Generation(1);
    let synced = Report::Synced { generation, step: Step(0), digest: 7 };
    feed(&mut session, Event::Report(synced));
    let start = Event::Received(ToWorker::Start { generation, resume_step: Step(0) });
    assert_eq!(feed(&mut session, start.clone()), vec![Command::Start { generation }]);
    assert_eq!(feed(&mut session, start), vec![], "said again, it changes nothing");
    session
}

#[test]
fn answers_are_said_again_on_a_new_stream() {
    let mut session = session();
    connect(&mut session, 1);
    let generation = Generation(1);
    feed(&mut session, Event::Disconnected);
    let report = Report::Synced { generation, step: Step(0), digest: 7 };
    feed(&mut session, Event::Report(report));
    feed(&mut session, Event::Connected);
    let said = feed(&mut session, Event::Welcomed);
    let prepared =
        ToCoordinator::Prepared { generation, state: None, trained: Generation(0), kept: false };
    let synced = ToCoordinator::Synced { generation, step: Step(0), digest: 7 };
    assert_eq!(said, vec![Command::Send(prepared), Command::Send(synced)]);
    assert_eq!((session.taking_part_in(), session.is_up()), (generation, true));
}

#[test]
fn an_orphan_stands_still_at_a_boundary_and_says_so_when_it_is_found() {
    let mut session = training();
    session.handle(Timestamp(0), Event::Disconnected);
    let out = session.handle(Timestamp::from_millis(5_000), Event::Tick);
    let generation = Generation(1);
    assert!(out.contains(&Command::RaiseStop { generation, change: ORPHAN_CHANGE }), "{out:?}");
    let held = Report::Held { generation, step: Step(9), digest: 3 };
    session.handle(Timestamp::from_millis(5_100), Event::Report(held));
    session.handle(Timestamp::from_millis(7_000), Event::Connected);
    let said = session.handle(Timestamp::from_millis(7_000), Event::Welcomed);
    let held = ToCoordinator::Held { generation, step: Step(9), digest: 3 };
    assert_eq!(said, vec![Command::Send(held)]);
}

#[test]
fn a_kept_communicator_is_adopted_by_the_next_plan() {
    let mut session = training();
    let held = Report::Held { generation: Generation(1), step: Step(9), digest: 3 };
    feed(&mut session, Event::Report(held));
    let next = Arc::new(Plan { communicator: Communicator::Keep, ..(*plan(2)).clone() });
    let out = feed(&mut session, Event::Received(ToWorker::Prepare(next.clone())));
    assert_eq!(out, vec![Command::Adopt { plan: next }]);
    let generation = Generation(2);
    let out = feed(&mut session, Event::Report(Report::Adopted { generation, state: Step(9) }));
    let state = Some(Step(9));
    let prepared =
        ToCoordinator::Prepared { generation, state, trained: Generation(1), kept: true };
    assert_eq!(out, vec![Command::Send(prepared)]);
    let start = Event::Received(ToWorker::Start { generation, resume_step: Step(9) });
    assert_eq!(feed(&mut session, start), vec![Command::Start { generation }]);
}

#[test]
fn a_broken_device_ends_the_process_after_saying_so() {
    let mut session = training();
    let (generation, kind) = (Generation(1), FaultKind::Local);
    let detail = "device lost".to_string();
    let fault = Report::Fault { generation, kind, suspects: vec![], detail };
    let out = feed(&mut session, Event::Report(fault));
    let said = out.iter().position(|c| matches!(c, Command::Send(ToCoordinator::Fault { .. })));
    let left = out.iter().position(|c| matches!(c, Command::Exit { code: exit::IO, .. }));
    assert!(said.is_some() && said < left, "{out:?}");
}

/// Whether it was told matters: a run all of whose workers end so has failed.
#[test]
fn a_device_that_fails_before_it_is_warm_ends_its_process_once_the_coordinator_knows() {
    let (generation, kind) = (Generation(0), FaultKind::Local);
    let detail = || "out of memory".to_string();
    let fault =
        Event::Report(Report::Fault { generation, kind, suspects: vec![], detail: detail() });
    let said = || {
        let detail = detail();
        Command::Send(ToCoordinator::Fault { generation, kind, suspects: vec![], detail })
    };
    let note = || Command::Note(detail());
    let exit = || Command::Exit { code: exit::IO, why: detail() };

    let mut session = session();
    feed(&mut session, Event::Welcomed);
    assert_eq!(feed(&mut session, fault.clone()), vec![note(), said(), exit()]);

    // A stream on which nobody has said welcome may belong to nobody yet.
    let mut session = self::session();
    assert_eq!(feed(&mut session, fault), vec![note(), said()]);
    feed(&mut session, Event::Disconnected);
    feed(&mut session, Event::Connected);
    assert_eq!(feed(&mut session, Event::Welcomed), vec![said(), exit()]);
}

#[test]
fn a_worker_whose_data_is_broken_stays_and_says_so_again() {
    let mut session = session();
    feed(&mut session, Event::Welcomed);
    let (generation, kind) = (Generation(0), FaultKind::Storage);
    let detail = "failed to open shard `x.tar`".to_string();
    let fault = Report::Fault { generation, kind, suspects: vec![], detail: detail.clone() };
    let said = ToCoordinator::Fault { generation, kind, suspects: vec![], detail: detail.clone() };
    let out = feed(&mut session, Event::Report(fault));
    assert_eq!(out, vec![Command::Note(detail), Command::Send(said.clone())]);
    feed(&mut session, Event::Disconnected);
    feed(&mut session, Event::Connected);
    assert_eq!(feed(&mut session, Event::Welcomed), vec![Command::Send(said)]);
}

#[test]
fn a_worker_that_was_started_wrongly_is_not_started_again() {
    let mut session = training();
    let (generation, kind) = (Generation(1), FaultKind::Unfit);
    let detail = "the device is taken".to_string();
    let fault = Report::Fault { generation, kind, suspects: vec![], detail };
    let out = feed(&mut session, Event::Report(fault));
    let unfit = |c: &Command| matches!(c, Command::Exit { code: exit::UNFIT, .. });
    assert!(out.last().is_some_and(unfit), "{out:?}");
}
