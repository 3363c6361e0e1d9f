//! System calls on checkpoint files, broken in a real coordinator and in a real worker: the run
//! goes on, or started again goes on, to the digest of an undisturbed one.
//!
//! A run is stopped at a boundary and resumed by a coordinator without memory, so that its last
//! save has names that are known before. A few points are tried unless `LACUNA_STRACE=all` asks for
//! each with each fault (`make strace`).

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use lacuna_checkpoint::layout::RunDir;
use lacuna_tests::processes::wait_for_end;
use lacuna_tests::strace::{self, Fault, Point};
use lacuna_tests::{Cluster, DEADLINE, Fixture, Seen, Under, is_alive, said, saves, trainer_pid};
use lacuna_types::Step;

use crate::faults::finished_with;
use crate::fixture;
use crate::syscalls::{all_is_asked_for, cannot_trace, copy};

/// Where the run is stopped, at the earliest; and its end.
const STEPS: [u64; 2] = [10, 30];

/// Points that are tried where not all are asked for.
const SAMPLE: usize = 7;

/// Longest wait for a finished run's coordinator to remove what is old.
const TIDY: Duration = Duration::from_secs(2);

/// A coordinator that does not wait long for those who are gone.
const HASTY: [&str; 3] = ["beat=300ms", "lease=1s", "stream_grace=500ms"];

const FAULTS: [Fault; 3] = [Fault::Kill, Fault::Error("EIO"), Fault::Error("ENOSPC")];

/// Whose calls are broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Coordinator,
    Worker,
}

/// A run that was stopped in the middle, and what its end must be.
struct Stopped {
    fixture: Fixture,
    spec: std::path::PathBuf,
    want: u64,
    stopped_at: u64,
}

/// How a run that was resumed with a broken process went.
struct Went {
    seen: Seen,
    submit: (i32, String),
    log: String,
}

impl Stopped {
    fn make() -> Self {
        let mut fixture = fixture();
        fixture.env = vec![("LACUNA_FAKE_SLOT_MS".to_string(), "1".to_string())];
        let want = crate::faults::undisturbed(&fixture, STEPS[1]);
        let keys = [
            ("checkpoint.every", "[\"1000step\"]"),
            ("checkpoint.keep", "{ last = 1 }"),
            ("elastic.workers", "\"1:1\""),
        ];
        let spec = fixture.spec("broken", STEPS[1], &keys);
        let mut cluster = Cluster::start(&fixture);
        let run = cluster.submit(&spec);
        cluster.add("a", 1);
        cluster.wait(&run, "some steps", |seen| seen.step() >= STEPS[0]);
        let stop = fixture.run(&["stop", &run, "--coordinator", &cluster.url]);
        assert_eq!(said(&stop).0, 0, "{stop:?}");
        let seen = cluster.wait_end(&run);
        assert_eq!(seen.run.state, "stopped", "{}", seen.text());
        drop(cluster);
        copy(&fixture.path("ckpt/broken"), &fixture.path("stopped"));
        let stopped_at = seen.run.checkpoint_step.expect("it was saved where it stopped");
        Stopped { fixture, spec, want, stopped_at }
    }

    fn dir(&self) -> RunDir {
        RunDir::new(self.fixture.path("ckpt"), "broken".parse().unwrap())
    }

    /// Lays the stopped run out again, without a coordinator's memory.
    fn lay_out(&self) {
        for folder in ["ckpt/broken", "state"] {
            // There is none before the first.
            let _ = std::fs::remove_dir_all(self.fixture.path(folder));
        }
        copy(&self.fixture.path("stopped"), &self.fixture.path("ckpt/broken"));
    }

    /// Lets the run go on with one process behind `words`, until it ends, or that process does, or
    /// a fault is told.
    fn go_on(&mut self, role: Role, words: Vec<String>) -> Went {
        let none = Vec::new();
        self.fixture.under = match role {
            Role::Coordinator => Under { coordinator: words, worker: none },
            Role::Worker => Under { coordinator: none, worker: words },
        };
        let mut cluster = Cluster::start(&self.fixture);
        let submit = cluster.try_submit(&self.spec);
        let mut seen = Seen::default();
        let pid = cluster.coordinator_pid();
        if submit.0 == 0 {
            cluster.add("a", 1);
            let told = |seen: &Seen| seen.run.exit_code.is_some() || seen.count("lost") > 0;
            seen = cluster.wait_unless("broken", "an end or a loss", told, || !is_alive(pid));
        }
        if seen.run.exit_code == Some(0) {
            // What is old goes after the end.
            let deadline = Instant::now() + TIDY;
            while self.dir().step(Step(self.stopped_at)).exists() && Instant::now() < deadline {
                if wait_for_end(pid, TIDY / 100) {
                    break;
                }
            }
        }
        let trainer = trainer_pid("a:cpu0", &cluster.url);
        drop(cluster);
        // It ends by itself once its agent is gone.
        let ended = trainer.is_none_or(|pid| wait_for_end(pid, DEADLINE));
        assert!(ended, "no orphan stays");
        self.fixture.under = Under::default();
        let log = std::fs::read_to_string(self.fixture.path("strace.log")).unwrap_or_default();
        Went { seen, submit, log }
    }

    /// Lists the points of a role.
    fn points(&mut self, role: Role) -> Vec<Point> {
        self.lay_out();
        let went = self.go_on(role, strace::watch(&self.fixture.path("strace.log"), true));
        finished_with(&went.seen, self.want);
        let points = strace::points(&went.log, &self.fixture.path("ckpt/broken"));
        // The same call of another thread of the process is the same point.
        let unique: BTreeSet<Point> = points.into_iter().collect();
        unique.into_iter().collect()
    }

    /// Breaks one call, and then starts everything again; says whether the point was met.
    fn survives(&mut self, role: Role, point: &Point, fault: Fault) -> bool {
        let case = format!("{fault} in {role:?} at {point}");
        self.lay_out();
        let (log, root) = (self.fixture.path("strace.log"), self.fixture.path("ckpt/broken"));
        let words = strace::inject(&log, true, &root, point, fault);
        let went = self.go_on(role, words);
        let ended = went.seen.run.exit_code;
        let step = self.newest(&case);
        assert!(step == self.stopped_at || step == STEPS[1], "{case}: {step}");
        if ended == Some(0) {
            finished_with(&went.seen, self.want);
            assert_eq!(step, STEPS[1], "{case}");
        } else if ended.is_some() {
            // It could not be saved, three times in a row, and that is said.
            assert_eq!(ended, Some(74), "{case}: {}", went.seen.text());
        }
        self.is_named(&case, point, fault, &went);
        self.ends(&case);
        let met = strace::was_met(&went.log);
        if !met {
            println!("not met: {case}");
        }
        met
    }

    /// A failed call that ended anything is named with its file.
    fn is_named(&self, case: &str, point: &Point, fault: Fault, went: &Went) {
        let Some(words) = fault.words() else { return };
        let text = format!("{}{}", went.submit.1, went.seen.text());
        let trouble = went.submit.0 != 0 || went.seen.count("not-saved") > 0;
        if trouble {
            let file = Path::new(&point.path).file_name().unwrap_or_default().to_string_lossy();
            assert!(text.contains(words) && text.contains(&*file), "{case}: {text}");
        }
    }

    /// Returns the step of the newest checkpoint after reading all of them back.
    fn newest(&self, case: &str) -> u64 {
        let output = self.fixture.run(&["ckpt", "verify", "--all", "ckpt/broken"]);
        let (code, out, err) = said(&output);
        assert_eq!(code, 0, "{case}: {out}{err}");
        let entries = lacuna_checkpoint::catalog::list(&self.dir()).unwrap();
        entries.iter().map(|entry| entry.step.0).max().expect("there is a checkpoint")
    }

    /// Starts everything again: the run ends as if nothing had happened, and nothing is left.
    fn ends(&self, case: &str) {
        let mut cluster = Cluster::start_with(&self.fixture, &HASTY);
        let run = cluster.submit(&self.spec);
        cluster.add("b", 1);
        let seen = cluster.wait(&run, case, |seen| seen.run.state == "finished");
        finished_with(&seen, self.want);
        cluster.kill_coordinator();
        cluster.start_coordinator();
        // It is open again, and what was left is removed.
        finished_with(&cluster.wait_end(&run), self.want);
        drop(cluster);
        assert_eq!(self.newest(case), STEPS[1], "{case}");
        let garbage = saves::garbage_of(&self.dir()).unwrap();
        assert!(garbage.is_empty(), "{case}: {garbage:?}");
    }
}

fn break_each(role: Role) {
    if cannot_trace() {
        return;
    }
    let mut stopped = Stopped::make();
    let points = stopped.points(role);
    let mut cases: Vec<(&Point, Fault)> = Vec::new();
    for point in &points {
        cases.extend(FAULTS.map(|fault| (point, fault)));
    }
    let n_all = cases.len();
    if !all_is_asked_for() {
        cases.retain(|(point, fault)| *fault != Fault::Error("ENOSPC") && point.changes());
        // An odd number of cases on, so that kills and errors take turns.
        let nth = cases.len().div_ceil(SAMPLE) | 1;
        cases = cases.into_iter().step_by(nth).collect();
    }
    let mut missed = 0;
    for (point, fault) in &cases {
        missed += usize::from(!stopped.survives(role, point, *fault));
    }
    let n = cases.len();
    println!("{role:?}: {n} of {n_all} faults at {} calls, {missed} not met", points.len());
    assert!(missed * 10 <= n, "most points are met: {missed} of {n} are not");
}

#[test]
fn a_coordinator_with_a_broken_call_does_no_harm() {
    break_each(Role::Coordinator);
}

#[test]
fn a_worker_with_a_broken_call_does_no_harm() {
    break_each(Role::Worker);
}
