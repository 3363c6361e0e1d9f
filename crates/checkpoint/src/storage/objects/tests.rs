//! Checkpoints in S3 over HTTP that fails in every way are those on a disk, byte by byte.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Barrier;
use std::time::Instant;

use lacuna_store::testing::{Fault, Kind, KindPlan, Server, mixed};
use lacuna_types::{CoordEpoch, Generation, Step};
use tempfile::TempDir;

use super::*;
use crate::catalog::{self, verify_and_mark};
use crate::chain;
use crate::commit::{ClaimError, CommitError, claim, commit};
use crate::doctor;
use crate::layout::{Attempt, PartId, RunDir};
use crate::load::{Expected, load_newest};
use crate::manifest::Manifest;
use crate::partition::Partition;
use crate::retain::{collect_garbage, retain};
use crate::testing::{NOW, Sample, attempt, run_dir, tiny, tree};
use crate::write::{Receipt, WritePartError, write_part};

/// Bytes of a part of an object: a part of the tiny state is cut in two or three.
const PART: u64 = 4096;

const WORLD: u32 = 3;

const KINDS: [Kind; 9] = [
    Kind::Get,
    Kind::Head,
    Kind::List,
    Kind::Put,
    Kind::Begin,
    Kind::Part,
    Kind::Complete,
    Kind::Abort,
    Kind::Delete,
];

/// A store on loopback.
struct Desk {
    folder: TempDir,
    server: Server,
}

fn desk(plan: Box<KindPlan>) -> Desk {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("bucket")).unwrap();
    let server = Server::start_by_kind(folder.path(), Duration::ZERO, plan).unwrap();
    Desk { folder, server }
}

impl Desk {
    fn objects(&self, deadline: Duration) -> Objects {
        let limits = Limits {
            deadline,
            stall: Duration::from_millis(200),
            attempt: Duration::from_millis(250),
            backoff_first: Duration::from_millis(2),
            backoff_max: Duration::from_millis(10),
            in_flight: 8,
        };
        let options = self.server.s3_options();
        let options: Vec<(&str, &str)> = options.iter().map(|(k, v)| (&**k, &**v)).collect();
        let objects = Objects::open_with("s3://bucket/ckpts/", &options, limits).unwrap();
        objects.hurried(PART, deadline)
    }

    /// A run directory on a client of its own.
    fn dir_within(&self, deadline: Duration) -> RunDir {
        let objects = self.objects(deadline);
        let root = objects.root();
        RunDir::on(Arc::new(objects), root, "r-7f3a".parse().unwrap())
    }

    fn dir(&self) -> RunDir {
        self.dir_within(Duration::from_secs(30))
    }

    /// What the store holds of the run.
    fn tree(&self) -> Vec<(String, Vec<u8>)> {
        tree(&self.folder.path().join("bucket"))
            .into_iter()
            .map(|(name, bytes)| (name.trim_start_matches("ckpts/").to_string(), bytes))
            .collect()
    }
}

fn faultless() -> Box<KindPlan> {
    Box::new(|_| Fault::None)
}

/// Strikes every other request of these kinds, object by object.
fn every_other(kinds: &'static [Kind], fault: Fault) -> Box<KindPlan> {
    let counts: Mutex<BTreeMap<(Kind, String), u64>> = Mutex::default();
    Box::new(move |asked| {
        if !kinds.contains(&asked.kind) {
            return Fault::None;
        }
        let mut counts = counts.lock().unwrap();
        let count = counts.entry((asked.kind, asked.path.to_string())).or_default();
        *count += 1;
        if *count % 2 == 1 { fault } else { Fault::None }
    })
}

fn write(dir: &RunDir, state: &Sample, attempt: Attempt, rank: u32) -> Result<Receipt, String> {
    let partition = Partition::new(&state.layout, WORLD);
    let info = state.info(attempt, PartId { rank, world: WORLD });
    let view = state.view();
    write_part(dir, &info, &view.part(&partition, rank)).map_err(|error| chain(&error))
}

/// Three writers save at the same time, each with a client of its own.
fn write_all(desk: &Desk, state: &Sample, attempt: Attempt) -> Vec<Receipt> {
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WORLD)
            .map(|rank| scope.spawn(move || write(&desk.dir(), state, attempt, rank).unwrap()))
            .collect();
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    })
}

fn good(dir: &RunDir, step: u64) -> Manifest {
    let entry = catalog::find(dir, Step(step)).unwrap().expect("it was committed");
    entry.good().expect("it is sound").clone()
}

/// Saves, verifies, retains and collects on a disk and in a store; after each, both hold the same.
fn same_as_on_disk(plan: Box<KindPlan>, what: &str) -> Desk {
    let desk = desk(plan);
    let root = tempfile::tempdir().unwrap();
    let (disk, dir) = (run_dir(root.path()), desk.dir());
    claim(&dir, CoordEpoch(7)).unwrap();
    for step in [1, 2, 3] {
        let state = tiny(step);
        let receipts = write_all(&desk, &state, attempt(1));
        let made = commit(&dir, &receipts, &state.context(attempt(1), WORLD)).unwrap();
        assert_eq!(made, state.save(&disk, WORLD), "{what}");
        assert!(desk.tree() == tree(root.path()), "{what}: step {step}");
        let found = load_newest(&dir, &Expected::tensors(&state.layout)).unwrap().unwrap();
        assert_eq!(found.skipped, [], "{what}");
        state.assert_loaded(&found.state);
    }
    // An attempt that was never committed.
    let lost = tiny(4);
    write_all(&desk, &lost, attempt(1));
    lost.write(&disk, attempt(1), WORLD);
    for dir in [&dir, &disk] {
        let verified = verify_and_mark(dir, &good(dir, 1)).unwrap();
        assert_eq!(verified.problems, [""; 0], "{what}");
        let plan = retain(dir, NonZeroUsize::MIN, &[], NOW).unwrap();
        assert_eq!(plan.delete, [Step(2)], "{what}");
        let gone = collect_garbage(dir, Generation(13), &[]).unwrap();
        assert_eq!(gone, [dir.attempt(Step(4), attempt(1))], "{what}");
    }
    assert!(desk.tree() == tree(root.path()), "{what}: after retention");
    assert_eq!(catalog::list(&dir).unwrap(), catalog::list(&disk).unwrap(), "{what}");
    desk
}

#[test]
fn a_store_holds_what_a_disk_holds() {
    let desk = same_as_on_disk(faultless(), "no fault");
    let asked = |kind: Kind| desk.server.seen().iter().filter(|seen| seen.kind == kind).count();
    assert!(asked(Kind::Part) > asked(Kind::Complete), "parts were sent in parts");
    assert!(asked(Kind::Complete) >= 4, "{}", asked(Kind::Complete));
    assert_eq!(desk.server.n_uploads(), 0);
}

/// The request was carried out, and nobody heard of it.
#[test]
fn every_lost_answer_is_known_as_ones_own() {
    for kinds in KINDS.chunks(1) {
        let desk = same_as_on_disk(every_other(kinds, Fault::Lost), &format!("{kinds:?} lost"));
        let met = desk.server.seen().iter().filter(|seen| seen.fault == Fault::Lost).count();
        assert_eq!(met > 0, kinds != [Kind::Abort], "{kinds:?}");
        // An upload that nobody was told of stays: the bucket's rule removes it.
        assert_eq!(desk.server.n_uploads() > 0, kinds == [Kind::Begin], "{kinds:?}");
    }
}

#[test]
fn refusals_resets_and_cuts_cost_time_and_no_byte() {
    for fault in [
        Fault::Status(500),
        Fault::Status(503),
        Fault::Reset,
        Fault::CutBody(50),
        Fault::Cut(30),
        Fault::Drip { bytes: 1500, pause: Duration::from_millis(5) },
    ] {
        same_as_on_disk(every_other(&KINDS, fault), &format!("{fault:?}"));
    }
    let hang = Fault::Hang(Duration::from_millis(350));
    same_as_on_disk(every_other(&[Kind::Put, Kind::Part, Kind::Complete], hang), "silence");
}

/// S3 answers 409 where two writers meet, and both may have failed; 412 says that the name is
/// taken, which another may have freed.
#[test]
fn conflicts_are_looked_into() {
    for status in [409, 412] {
        let plan = every_other(&[Kind::Put, Kind::Complete], Fault::Status(status));
        // What is replaced knows no conflict.
        let plan: Box<KindPlan> = Box::new(move |asked| match asked.path {
            path if path.ends_with("latest.json") || path.ends_with("verified.json") => Fault::None,
            _ => plan(asked),
        });
        same_as_on_disk(plan, &format!("{status}"));
    }
}

#[test]
fn faults_of_all_kinds_at_once() {
    for seed in 0..3 {
        let shares = [
            (8, Fault::Lost),
            (4, Fault::Reset),
            (4, Fault::CutBody(70)),
            (4, Fault::Status(500)),
            (4, Fault::Status(503)),
            (2, Fault::Hang(Duration::from_millis(350))),
        ];
        let plan = mixed(seed, &shares);
        same_as_on_disk(Box::new(move |asked| plan(asked.n, asked.path)), &format!("seed {seed}"));
    }
}

/// Pages of two names.
#[test]
fn long_listings_come_in_pages() {
    let desk = desk(faultless());
    desk.server.set_page(2);
    let dir = desk.dir();
    claim(&dir, CoordEpoch(7)).unwrap();
    for step in 1..=5 {
        tiny(step).save(&dir, 2);
    }
    let steps: Vec<u64> = catalog::list(&dir).unwrap().iter().map(|entry| entry.step.0).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5]);
    assert_eq!(dir.storage().names(&dir.step(Step(2))).unwrap().len(), 2);
    assert_eq!(dir.storage().names(&dir.attempt(Step(2), attempt(1))).unwrap().len(), 4);
    dir.storage().remove_folder(&dir.checkpoints()).unwrap();
    assert_eq!(catalog::list(&dir).unwrap(), []);
}

/// Two coordinators that both believe in themselves: one wins, whatever answers are lost.
#[test]
fn of_two_that_commit_one_wins() {
    for seed in 0..12 {
        let plan = mixed(seed, &[(30, Fault::Lost), (10, Fault::Status(503)), (5, Fault::Reset)]);
        let desk = desk(Box::new(move |asked| plan(asked.n, asked.path)));
        claim(&desk.dir(), CoordEpoch(7)).unwrap();
        let state = tiny(3);
        let receipts = [1, 2].map(|n| write_all(&desk, &state, attempt(n)));
        let (barrier, receipts, state) = (&Barrier::new(2), &receipts, &state);
        let results = std::thread::scope(|scope| {
            let rivals = [0usize, 1].map(|i| {
                let dir = desk.dir();
                scope.spawn(move || {
                    let context = state.context(attempt(i as u64 + 1), WORLD);
                    barrier.wait();
                    (commit(&dir, &receipts[i], &context), claim(&dir, CoordEpoch(8)))
                })
            });
            rivals.map(|rival| rival.join().unwrap())
        });
        let won: Vec<usize> = (0..2).filter(|&i| results[i].0.is_ok()).collect();
        // A claim of the next number fences off a rival that had not committed yet.
        let beaten = |error: &CommitError| {
            matches!(error, CommitError::Taken { same_state: true, .. })
                || matches!(error, CommitError::Fenced { .. })
        };
        let lost = results.iter().filter_map(|(commit, _)| commit.as_ref().err());
        assert!(lost.into_iter().all(beaten), "{seed}: {results:?}");
        assert_eq!(won.len(), 1, "{seed}: {results:?}");
        assert_eq!(good(&desk.dir(), 3).attempt, attempt(won[0] as u64 + 1));
        let claimed = results.iter().filter(|(_, claim)| claim.is_ok()).count();
        assert_eq!(claimed, 1, "{seed}: {results:?}");
        let refused = results.iter().filter_map(|(_, claim)| claim.as_ref().err());
        assert!(refused.into_iter().all(|error| matches!(error, ClaimError::Taken { .. })));
    }
}

/// A save that fails leaves no checkpoint, no part and no upload, and says where it failed.
#[test]
fn a_failed_attempt_leaves_nothing_to_see() {
    for kind in [Kind::Part, Kind::Complete] {
        let abort = every_other(&[Kind::Abort], Fault::Lost);
        let desk = desk(Box::new(move |asked| match asked.kind {
            found if found == kind => Fault::Status(500),
            _ => abort(asked),
        }));
        let dir = desk.dir_within(Duration::from_secs(2));
        claim(&dir, CoordEpoch(7)).unwrap();
        let error = write(&dir, &tiny(3), attempt(1), 0).unwrap_err();
        let url = "s3://bucket/ckpts/r-7f3a/ckpt/step-000000003/attempt-00000012.0001/part-00000";
        assert!(error.contains(url) && error.contains("500"), "{error}");
        assert_eq!(desk.server.n_uploads(), 0, "{kind:?}");
        assert_eq!(catalog::list(&dir).unwrap(), []);
        assert_eq!(dir.storage().names(&dir.checkpoints()).unwrap(), [""; 0]);
    }
}

/// A name that is taken stays as it is, whether it is written in one piece or in many.
#[test]
fn nobody_writes_over_a_part() {
    let desk = desk(faultless());
    let dir = desk.dir();
    let state = tiny(3);
    for rank in [0, 2] {
        write(&dir, &state, attempt(1), rank).unwrap();
        let before = desk.tree();
        let partition = Partition::new(&state.layout, WORLD);
        let info = state.info(attempt(1), PartId { rank, world: WORLD });
        let error = write_part(&dir, &info, &state.view().part(&partition, rank)).unwrap_err();
        assert!(matches!(error, WritePartError::Exists { .. }), "{error}");
        assert!(desk.tree() == before);
        assert_eq!(desk.server.n_uploads(), 0);
    }
}

/// The last look is the store's: another may have taken the name after ours.
#[test]
fn completing_is_on_condition() {
    let desk = desk(faultless());
    let dir = desk.dir();
    let path = dir.attempt(Step(3), attempt(1)).join("part");
    let mut sink = dir.storage().begin(&path, 3 * PART).unwrap();
    sink.fill(&vec![7; 2 * PART as usize + 1]).unwrap();
    assert_eq!(dir.storage().create_small(&path, &path, "theirs").unwrap(), Published::Created);
    assert_eq!(sink.publish().unwrap(), Published::Exists);
    assert_eq!(dir.storage().read_small(&path, 100).unwrap(), b"theirs");
    assert_eq!(desk.server.n_uploads(), 0);
}

#[test]
fn a_stalled_store_is_named_by_the_deadline() {
    let desk = desk(Box::new(|_| Fault::Hang(Duration::from_secs(20))));
    let deadline = Duration::from_millis(700);
    let dir = desk.dir_within(deadline);
    let (storage, path) = (dir.storage(), dir.manifest(Step(3)));
    type Call<'a> = (&'static str, Box<dyn Fn() -> Result<(), FsError> + 'a>);
    let calls: [Call<'_>; 9] = [
        ("names", Box::new(|| storage.names(&path).map(drop))),
        ("read", Box::new(|| storage.read_small(&path, 100).map(drop))),
        ("size", Box::new(|| storage.size(&path).map(drop))),
        ("open", Box::new(|| storage.open(&path).map(drop))),
        ("create", Box::new(|| storage.create_small(&path, &path, "x").map(drop))),
        ("replace", Box::new(|| storage.replace_small(&path, "x"))),
        ("hide", Box::new(|| storage.hide(&path, &path))),
        ("remove", Box::new(|| storage.remove_folder(&path))),
        (
            "upload",
            Box::new(|| {
                let mut sink = storage.begin(&path, 9 * PART)?;
                sink.fill(&vec![0; 9 * PART as usize])?;
                sink.publish().map(drop)
            }),
        ),
    ];
    for (what, call) in calls {
        let start = Instant::now();
        let error = call().unwrap_err();
        let took = start.elapsed();
        assert!(took < 3 * deadline + Duration::from_secs(2), "{what} took {took:?}");
        let text = chain(&error);
        assert_eq!(error.source.kind(), io::ErrorKind::TimedOut, "{what}: {text}");
        let url = "s3://bucket/ckpts/r-7f3a/ckpt/step-000000003/manifest.json";
        assert!(text.contains(url) && text.contains("no answer"), "{what}: {text}");
    }
}

/// Where hiding is deleting, a crash behind it leaves an attempt and perhaps a mark: garbage.
#[test]
fn a_deletion_that_was_cut_short_is_finished() {
    let desk = desk(faultless());
    let dir = desk.dir();
    claim(&dir, CoordEpoch(7)).unwrap();
    tiny(1).save(&dir, 2);
    tiny(2).save(&dir, 2);
    verify_and_mark(&dir, &good(&dir, 1)).unwrap();
    dir.storage().hide(&dir.manifest(Step(1)), &dir.deleted_manifest(Step(1))).unwrap();
    assert_eq!(catalog::list(&dir).unwrap().len(), 1);
    let again = Attempt::new(Generation(13), lacuna_types::AttemptSeq(1));
    tiny(1).write(&dir, again, 1);
    assert_eq!(
        collect_garbage(&dir, Generation(13), &[]).unwrap(),
        [dir.attempt(Step(1), attempt(1))]
    );
    let names = |step: u64| dir.storage().names(&dir.step(Step(step))).unwrap();
    assert_eq!(names(1), ["attempt-00000013.0001"]);
    assert_eq!(names(2), ["attempt-00000012.0001", "manifest.json"]);
    collect_garbage(&dir, Generation(14), &[]).unwrap();
    assert_eq!(dir.storage().names(&dir.checkpoints()).unwrap(), ["step-000000002"]);
}

#[test]
fn a_store_that_overwrites_is_found_out() {
    let desk = desk(every_other(&[Kind::Put, Kind::Delete], Fault::Lost));
    let objects = desk.objects(Duration::from_secs(20));
    let examined = || doctor::examine(&objects, &objects.root(), 3 * PART as usize).problem();
    assert_eq!(examined(), None);
    desk.server.ignore_conditions();
    assert_eq!(examined().unwrap(), "`a name is taken once`: it is not so");
    assert_eq!(desk.tree(), []);
}

/// Reads in order are asked for ahead; others are not, and all give the right bytes.
#[test]
fn reading_ahead_changes_no_byte() {
    let desk = desk(faultless());
    let dir = desk.dir();
    let path = dir.path().join("object");
    let content: Vec<u8> = (0..10_000u32).map(|i| (i * 7 % 251) as u8).collect();
    let mut sink = dir.storage().begin(&path, 10_000).unwrap();
    sink.fill(&content).unwrap();
    assert_eq!(sink.publish().unwrap(), Published::Created);
    let object = dir.storage().open(&path).unwrap();
    for (offset, len) in
        [(0, 1000), (1000, 1000), (2000, 1000), (3000, 500), (9000, 1000), (0, 10_000), (5, 0)]
    {
        let mut buffer = vec![0; len];
        object.read_exact_at(&mut buffer, offset as u64).unwrap();
        assert!(buffer == content[offset..offset + len], "{offset}");
    }
    let error = object.read_exact_at(&mut [0; 10], 9_995).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{error}");
}
