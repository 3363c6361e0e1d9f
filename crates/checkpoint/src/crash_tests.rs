//! Crashes at every call of a history of saves, over the modelled file system: whatever a machine
//! that lost its power may find, a committed checkpoint loads, no mix does, and saving goes on.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::ErrorKind;
use std::num::NonZeroUsize;
use std::sync::Arc;

use lacuna_types::{AttemptSeq, CoordEpoch, Generation, Step};

use crate::catalog::{self, Status};
use crate::chain;
use crate::commit::{claim, commit, highest_claim};
use crate::layout::{Attempt, PartId, RunDir};
use crate::load::{Expected, load_newest, load_step};
use crate::partition::Partition;
use crate::retain;
use crate::storage::Disk;
use crate::storage::model::{Broken, ModelFs, Moment, World};
use crate::testing::{NOW, Sample, tiny};
use crate::write::{Receipt, write_part};

/// Parts of a checkpoint; the last one is empty.
const WORLD: u32 = 3;

/// After one in so many crashes it is seen too whether another coordinator can go on.
const GO_ON_EVERY: usize = 7;

/// Orders of the workers' calls that are played.
const ORDERS: u64 = 4;

/// What holds from some call on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fact {
    Claimed(CoordEpoch),
    Committed(Step),
    Verified(Step),
    /// Its deletion has begun.
    Deleting(Step),
}

/// A history and what was promised on the way: each fact with the calls before it.
struct History {
    moments: Vec<Moment>,
    facts: Vec<(usize, Fact)>,
}

struct Player {
    fs: ModelFs,
    /// Draws the order of the workers' calls.
    seed: u64,
    dir: RunDir,
    facts: Vec<(usize, Fact)>,
}

type Done = Result<(), String>;

fn text(error: impl std::error::Error + 'static) -> String {
    chain(&error)
}

fn run_dir(fs: &ModelFs) -> RunDir {
    let disk = Disk::over(Arc::new(fs.clone()));
    RunDir::on(Arc::new(disk), "/store", "r-7f3a".parse().unwrap())
}

fn attempt(generation: u64) -> Attempt {
    Attempt::new(Generation(generation), AttemptSeq(1))
}

fn write_rank(
    dir: &RunDir,
    state: &Sample,
    attempt: Attempt,
    rank: u32,
) -> Result<Receipt, String> {
    let partition = Partition::new(&state.layout, WORLD);
    let info = state.info(attempt, PartId { rank, world: WORLD });
    write_part(dir, &info, &state.view().part(&partition, rank)).map_err(text)
}

/// Saves in one thread.
fn save(dir: &RunDir, step: u64, generation: u64, epoch: CoordEpoch) -> Done {
    let (state, attempt) = (tiny(step), attempt(generation));
    let receipts = (0..WORLD).map(|rank| write_rank(dir, &state, attempt, rank));
    let receipts: Vec<Receipt> = receipts.collect::<Result<_, _>>()?;
    let mut context = state.context(attempt, WORLD);
    context.coord_epoch = epoch;
    commit(dir, &receipts, &context).map_err(text)?;
    Ok(())
}

impl Player {
    fn new(fs: ModelFs, seed: u64) -> Self {
        Player { dir: run_dir(&fs), fs, seed, facts: Vec::new() }
    }

    fn now(&mut self, fact: Fact) {
        self.facts.push((self.fs.trace().len(), fact));
    }

    fn claim(&mut self, epoch: CoordEpoch) -> Done {
        claim(&self.dir, epoch).map_err(text)?;
        self.now(Fact::Claimed(epoch));
        Ok(())
    }

    /// Saves; the workers' calls are mixed.
    fn save(&mut self, step: u64, generation: u64, epoch: CoordEpoch) -> Done {
        let (dir, state) = (&self.dir, tiny(step));
        let state = &state;
        let one = |rank| move || write_rank(dir, state, attempt(generation), rank);
        let receipts = self.fs.in_turns(self.seed + step, (0..WORLD).map(one).collect());
        let receipts: Vec<Receipt> = receipts.into_iter().collect::<Result<_, _>>()?;
        let mut context = state.context(attempt(generation), WORLD);
        context.coord_epoch = epoch;
        commit(dir, &receipts, &context).map_err(text)?;
        self.now(Fact::Committed(Step(step)));
        Ok(())
    }

    fn verify(&mut self, step: u64) -> Done {
        let entry = catalog::find(&self.dir, Step(step)).map_err(text)?;
        let manifest = entry.as_ref().and_then(|entry| entry.good()).ok_or("it is not good")?;
        catalog::verify_and_mark(&self.dir, manifest).map_err(text)?;
        self.now(Fact::Verified(Step(step)));
        Ok(())
    }

    /// Two saves; the first one goes once the second was verified; a third is left by its workers;
    /// a coordinator comes after another one and cleans up.
    fn play(&mut self) -> Done {
        self.claim(CoordEpoch(7))?;
        self.save(10, 12, CoordEpoch(7))?;
        self.verify(10)?;
        self.save(20, 12, CoordEpoch(7))?;
        self.verify(20)?;
        self.now(Fact::Deleting(Step(10)));
        retain::retain(&self.dir, NonZeroUsize::MIN, &[], NOW).map_err(text)?;
        for rank in 0..2 {
            write_rank(&self.dir, &tiny(30), attempt(12), rank)?;
        }
        self.claim(CoordEpoch(8))?;
        retain::collect_garbage(&self.dir, Generation(13), &[]).map_err(text)?;
        self.save(30, 13, CoordEpoch(8))
    }
}

/// Records the whole history.
fn record(fs: ModelFs, seed: u64) -> Result<History, String> {
    let mut player = Player::new(fs, seed);
    player.play()?;
    Ok(History { moments: player.fs.trace(), facts: player.facts })
}

/// Draws numbers; any fixed sequence will do.
fn dice(seed: u64) -> impl FnMut(usize) -> usize {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |n| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 33) as usize % n
    }
}

/// Contents that a file may have under its final name: what an undisturbed process saw there.
type Allowed = BTreeMap<String, HashSet<Arc<Vec<u8>>>>;

fn allowed(history: &History) -> Allowed {
    let mut out = Allowed::new();
    for moment in &history.moments {
        for (path, content) in moment.world.files() {
            out.entry(path).or_default().insert(content);
        }
    }
    out
}

fn ensure(holds: bool, problem: impl FnOnce() -> String) -> Done {
    if holds { Ok(()) } else { Err(problem()) }
}

/// Everything that must hold in what a crash left; returns the step that was promised last.
fn check(world: &World, facts: &[Fact], allowed: &Allowed) -> Result<Step, String> {
    for (path, content) in world.files().iter().filter(|(path, _)| !path.ends_with(".partial")) {
        let known = allowed.get(path).is_some_and(|all| all.contains(content));
        ensure(known, || format!("`{path}` has other bytes than were written"))?;
    }
    let fs = ModelFs::from(world.clone());
    let dir = run_dir(&fs);
    for entry in catalog::list(&dir).map_err(text)? {
        if let Status::Damaged { reason } = entry.status {
            return Err(format!("a listed checkpoint is damaged: {reason}"));
        }
    }
    let deleting = |step: Step| facts.contains(&Fact::Deleting(step));
    let mut least = Step(0);
    for fact in facts {
        match *fact {
            Fact::Claimed(epoch) => {
                let found = highest_claim(&dir).map_err(text)?;
                ensure(found >= Some(epoch), || format!("claim {epoch} is lost: {found:?}"))?;
            }
            Fact::Committed(step) => {
                least = least.max(step);
                if !deleting(step) {
                    let state = tiny(step.0);
                    let loaded = load_step(&dir, step, &Expected::tensors(&state.layout));
                    state.assert_loaded(&loaded.map_err(text)?);
                    check_attempt(&dir, step)?;
                }
            }
            Fact::Verified(step) => {
                let entry = catalog::find(&dir, step).map_err(text)?;
                let verified = |m| catalog::is_verified(&dir, m).unwrap_or(false);
                let holds =
                    deleting(step) || entry.as_ref().and_then(|e| e.good()).is_some_and(verified);
                ensure(holds, || format!("the mark of step {step} is lost"))?;
            }
            Fact::Deleting(_) => {}
        }
    }
    check_newest(&dir, least)?;
    Ok(least)
}

/// A committed checkpoint has its receipts, and the hint names no older one.
fn check_attempt(dir: &RunDir, step: Step) -> Done {
    let entry = catalog::find(dir, step).map_err(text)?.ok_or("it is gone")?;
    let manifest = entry.good().ok_or("it is damaged")?;
    let names = dir.storage().names(&dir.attempt(step, manifest.attempt)).map_err(text)?;
    for rank in 0..WORLD {
        let receipt = PartId { rank, world: WORLD }.receipt_name();
        ensure(names.contains(&receipt), || format!("{receipt} of step {step} is lost"))?;
    }
    let hint = dir.storage().read_small(&dir.latest(), 4096).map_err(text)?;
    let hint: serde_json::Value = serde_json::from_slice(&hint).map_err(text)?;
    ensure(hint["step"].as_u64() >= Some(step.0), || format!("latest.json says {hint}"))
}

/// The newest checkpoint is a whole one, and not older than the last that was promised.
fn check_newest(dir: &RunDir, least: Step) -> Done {
    let layout = tiny(0).layout;
    let found = load_newest(dir, &Expected::tensors(&layout)).map_err(text)?;
    let step = found.as_ref().map(|resumed| resumed.state.manifest.step());
    ensure(step.unwrap_or_default() >= least, || format!("{step:?} loads, not step {least}"))?;
    if let Some(resumed) = found {
        ensure(resumed.skipped.is_empty(), || format!("{:?}", resumed.skipped))?;
        tiny(resumed.state.manifest.step).assert_loaded(&resumed.state);
    }
    Ok(())
}

/// Another coordinator starts, cleans up and saves; afterwards nothing is there but what counts.
fn go_on(dir: &RunDir, least: Step) -> Done {
    let epoch = highest_claim(dir).map_err(text)?.unwrap_or_default().next().max(CoordEpoch(9));
    claim(dir, epoch).map_err(text)?;
    let generation = catalog::highest_generation(dir).map_err(text)?.next();
    retain::collect_garbage(dir, generation, &[]).map_err(text)?;
    let step = least.0 + 35;
    save(dir, step, generation.0, epoch)?;
    check_newest(dir, Step(step))?;
    retain::retain(dir, NonZeroUsize::new(2).unwrap(), &[], NOW).map_err(text)?;
    let mut known: BTreeSet<String> = BTreeSet::from(["/store/r-7f3a/latest.json".to_string()]);
    for entry in catalog::list(dir).map_err(text)? {
        let manifest = entry.good().ok_or("a listed checkpoint is damaged")?;
        let step = manifest.step();
        let part = |rank| PartId { rank, world: WORLD };
        let attempt = dir.attempt(step, manifest.attempt);
        known.extend((0..WORLD).map(|r| attempt.join(part(r).file_name()).display().to_string()));
        known
            .extend((0..WORLD).map(|r| attempt.join(part(r).receipt_name()).display().to_string()));
        known.extend([dir.manifest(step), dir.verified(step)].map(|p| p.display().to_string()));
        // Somebody may be reading the checkpoint back; the next mark takes its place.
        known.insert(format!("{}.partial", dir.verified(step).display()));
    }
    known.extend((0..=epoch.0).map(|n| dir.claim(CoordEpoch(n)).display().to_string()));
    for path in all_paths(dir, "/store")? {
        ensure(known.contains(&path), || format!("garbage stays: `{path}`"))?;
    }
    Ok(())
}

/// Lists files, and folders that have nothing in them.
fn all_paths(dir: &RunDir, at: &str) -> Result<Vec<String>, String> {
    let names = dir.storage().names(at.as_ref()).map_err(text)?;
    let mut out: Vec<String> = Vec::new();
    for name in &names {
        let path = format!("{at}/{name}");
        let is_file = dir.storage().size(path.as_ref()).is_ok();
        out.extend(if is_file { vec![path] } else { all_paths(dir, &path)? });
    }
    if names.is_empty() {
        out.push(format!("{at}/"));
    }
    Ok(out)
}

/// Crashes after every call, `most` times each; returns how many different states were checked.
fn crash_everywhere(history: &History, most: usize) -> Result<usize, String> {
    let allowed = allowed(history);
    let mut seen: HashSet<([u8; 32], usize)> = HashSet::new();
    for (i, moment) in history.moments.iter().enumerate() {
        let facts = history.facts.iter().filter(|(calls, _)| *calls <= i + 1);
        let facts: Vec<Fact> = facts.map(|(_, fact)| *fact).collect();
        for world in moment.world.crashes(most, &mut dice(i as u64 + 1)) {
            if seen.insert((world.digest(), facts.len())) {
                let failed =
                    |problem| format!("a crash after call {i}, `{}`: {problem}", moment.call);
                let least = check(&world, &facts, &allowed).map_err(failed)?;
                if seen.len().is_multiple_of(GO_ON_EVERY) {
                    go_on(&run_dir(&ModelFs::from(world)), least).map_err(failed)?;
                }
            }
        }
    }
    Ok(seen.len())
}

#[test]
fn no_crash_loses_or_mixes_a_checkpoint() {
    let one = |seed| {
        let history = record(ModelFs::new("/store"), seed).unwrap();
        crash_everywhere(&history, 200).unwrap()
    };
    let n_states: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ORDERS).map(|seed| scope.spawn(move || one(seed))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no state is wrong")).sum()
    });
    println!("{n_states} different states after a crash");
    assert!(n_states >= 10_000, "{n_states} states");
}

/// Renaming by a link and the loss of the old name, as on some network file systems.
#[test]
fn no_crash_does_where_names_are_linked() {
    let fs = ModelFs::new("/store");
    fs.without_rename_new();
    let n_states = crash_everywhere(&record(fs, 1).unwrap(), 60).unwrap();
    assert!(n_states >= 1000, "{n_states} states");
}

/// Every sync and every rename is needed: without it the check above fails.
#[test]
fn every_sync_and_rename_is_missed() {
    let broken: [(&str, Broken); 19] = [
        ("the content of a part", |call, _| call.starts_with("sync part-")),
        ("the content of a receipt", |call, _| call.starts_with("sync receipt-")),
        ("the content of a manifest", |call, _| call.starts_with("sync manifest")),
        ("the content of a claim", |call, _| call.starts_with("sync 0")),
        ("the content of the hint", |call, _| call.starts_with("sync latest")),
        ("the content of a mark", |call, _| call.starts_with("sync verified")),
        ("the names of parts and receipts", |call, _| call.starts_with("sync_dir attempt-")),
        ("the name of a manifest", |call, before| {
            call.starts_with("sync_dir step-") && before == "rename manifest.json"
        }),
        ("the name of a hidden manifest", |call, before| {
            call.starts_with("sync_dir step-") && before == "rename manifest.deleted.json"
        }),
        ("the name of a mark", |call, before| {
            call.starts_with("sync_dir step-") && before == "rename verified.json"
        }),
        ("the name of a claim", |call, _| call.starts_with("sync_dir claims")),
        ("the name of the hint", |call, before| {
            call.starts_with("sync_dir") && before == "rename latest.json"
        }),
        ("the names of folders", |call, before| {
            call.starts_with("sync_dir") && !before.starts_with("rename")
        }),
        ("a part's rename", |call, _| call.starts_with("rename part-")),
        ("a receipt's rename", |call, _| call.starts_with("rename receipt-")),
        ("a manifest's rename", |call, _| call == "rename manifest.json"),
        ("a claim's rename", |call, _| call.starts_with("rename 0")),
        ("the hint's rename", |call, _| call.starts_with("rename latest")),
        ("hiding", |call, _| call.starts_with("rename manifest.deleted")),
    ];
    let mut unnoticed: Vec<&str> = Vec::new();
    for (what, broken) in broken {
        let fs = ModelFs::new("/store");
        fs.break_calls(broken);
        let found = record(fs, 1).and_then(|history| crash_everywhere(&history, 40));
        match found {
            Ok(_) => unnoticed.push(what),
            Err(problem) => println!("without {what}: {problem}"),
        }
    }
    assert!(unnoticed.is_empty(), "nothing notices the lack of {unnoticed:?}");
}

/// A process that dies between a manifest's name and the sync of it: whoever finds the checkpoint
/// and reports it makes it last.
#[test]
fn a_checkpoint_that_was_found_lasts() {
    let fs = ModelFs::new("/store");
    let dir = run_dir(&fs);
    claim(&dir, CoordEpoch(7)).unwrap();
    save(&dir, 10, 12, CoordEpoch(7)).unwrap();
    let named = |moment: &Moment| moment.call == "rename manifest.json";
    let world = fs.trace().into_iter().find(named).unwrap().world;
    let state = tiny(10);
    let lost = |world: &World| {
        let crashed = run_dir(&ModelFs::from(world.clone()));
        load_step(&crashed, Step(10), &Expected::tensors(&state.layout)).is_err()
    };
    assert!(world.crashes(400, &mut dice(1)).iter().any(lost), "the name may be lost");
    // The process is gone, the machine is not: the file system is as it was.
    let fs = ModelFs::from(world);
    let dir = run_dir(&fs);
    let mut receipts = Vec::new();
    for rank in 0..WORLD {
        let path =
            dir.attempt(Step(10), attempt(12)).join(PartId { rank, world: WORLD }.receipt_name());
        let text = dir.storage().read_small(&path, 1 << 20).unwrap();
        receipts.push(Receipt::parse(&text).unwrap());
    }
    commit(&dir, &receipts, &state.context(attempt(12), WORLD)).unwrap();
    assert!(!fs.world().crashes(400, &mut dice(1)).iter().any(lost), "it was promised");
}

/// Any one call that fails, once, is an error or does not matter; what was committed stays, and the
/// next try succeeds.
#[test]
fn any_call_may_fail() {
    let n_calls = {
        let fs = ModelFs::new("/store");
        let before = fs.calls();
        Player::new(fs.clone(), 1).play().unwrap();
        fs.calls() - before
    };
    for kind in [ErrorKind::StorageFull, ErrorKind::Other] {
        for call in 0..n_calls {
            let fs = ModelFs::new("/store");
            let mut player = Player::new(fs.clone(), 1);
            fs.fail(call, kind);
            let done = player.play();
            let facts: Vec<Fact> = player.facts.iter().map(|(_, fact)| *fact).collect();
            let newest = |fact: &Fact| match fact {
                Fact::Committed(step) => Some(*step),
                _ => None,
            };
            let least = facts.iter().filter_map(newest).max().unwrap_or_default();
            let problem = |problem| format!("call {call} failed ({kind}), {done:?}: {problem}");
            check_newest(&player.dir, least).map_err(problem).unwrap();
            go_on(&player.dir, least).map_err(problem).unwrap();
        }
    }
}
