//! Runs that are remembered and not open yet.
//!
//! A coordinator that starts serves at once and opens its runs meanwhile, each by itself: one whose
//! checkpoints do not answer keeps nobody from another one. It is tried again until it opens, and
//! whoever asks for it is told why it does not.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lacuna_api::error::{Reason, status};
use lacuna_api::v1;
use lacuna_control::coordinator::Ending;
use lacuna_spec::RunSpec;
use lacuna_types::RunId;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tonic::Status;
use tracing::{info, warn};

use crate::catalogue::{Catalogue, CatalogueError, Found};
use crate::grpc::specs::etag_of;
use crate::registry::{Shared, lock};
use crate::store::StoredRun;

/// Runs that are opened at a time.
const OPENING_MAX: usize = 64;
/// How long opening one may take.
const OPENING: Duration = Duration::from_secs(120);
/// How long until one that did not open is tried again.
const AGAIN: Duration = Duration::from_secs(30);

/// The reading of a run's checkpoints, on a thread of its own.
type OpenTask = JoinHandle<Result<(Catalogue, Found), CatalogueError>>;

/// A run that is not open.
#[derive(Clone, Debug)]
pub(crate) struct Unopened {
    stored: StoredRun,
    pub spec: RunSpec,
    /// Why it is not open yet.
    pub why: String,
    /// Place in order of creation.
    pub order: usize,
    /// Whether its task is about to start: nobody may give it up any more.
    starts: bool,
}

/// All that are not open.
#[derive(Default)]
pub(crate) struct Opening {
    runs: Mutex<BTreeMap<RunId, Unopened>>,
    /// Whether each was tried once.
    settled: AtomicBool,
}

impl Opening {
    /// Returns a run that is not open.
    pub fn get(&self, id: &RunId) -> Option<Unopened> {
        lock(&self.runs).get(id).cloned()
    }

    /// Returns all that are not open.
    pub fn all(&self) -> Vec<(RunId, Unopened)> {
        lock(&self.runs).iter().map(|(id, run)| (id.clone(), run.clone())).collect()
    }

    /// Forgets a run that is open.
    pub fn forget(&self, id: &RunId) {
        lock(&self.runs).remove(id);
    }

    /// Gives a run up for another one that takes its name; tells whether that could still be done.
    pub fn give_up(&self, id: &RunId) -> bool {
        let mut runs = lock(&self.runs);
        if runs.get(id).is_some_and(|run| run.starts) {
            return false;
        }
        runs.remove(id);
        true
    }

    /// Begins to start the task of a run that was opened; tells whether it is wanted still.
    fn begin(&self, id: &RunId, order: usize) -> bool {
        match lock(&self.runs).get_mut(id).filter(|run| run.order == order) {
            Some(run) => {
                run.starts = true;
                true
            }
            None => false,
        }
    }

    /// Tells whether new workers may be given to runs: before each was tried, those that wanted
    /// them first may not be there.
    pub fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire)
    }

    fn say(&self, id: &RunId, why: String) -> bool {
        let mut runs = lock(&self.runs);
        let Some(run) = runs.get_mut(id) else { return false };
        let is_new = run.why != why;
        (run.why, run.starts) = (why, false);
        is_new
    }
}

impl Unopened {
    /// Describes the run as far as it is known.
    pub fn message(&self, id: &RunId) -> v1::Run {
        let StoredRun { n_samples, fingerprint, saved, spec, .. } = &self.stored;
        let resolved = self.spec.resolve(*n_samples).ok();
        let saved_step = saved.checkpoint.as_ref().map(|checkpoint| checkpoint.step.0);
        v1::Run {
            run_id: id.to_string(),
            state: "opening".to_string(),
            why: self.why.clone(),
            generation: saved.generation.0,
            step: saved_step.unwrap_or_default(),
            total_steps: resolved.as_ref().map_or(0, |r| r.total_steps),
            steps_per_epoch: resolved.as_ref().map_or(0, |r| r.geometry.steps_per_epoch()),
            n_slots: self.spec.n_slots(),
            checkpoint_step: saved_step,
            spec: spec.clone(),
            n_samples: *n_samples,
            fingerprint: fingerprint.clone(),
            etag: etag_of(&self.spec),
            ..Default::default()
        }
    }
}

impl Shared {
    /// Remembers runs that are to be opened.
    pub(crate) fn expect(&self, stored: Vec<(StoredRun, RunSpec)>) {
        let mut runs = lock(&self.opening.runs);
        for (stored, spec) in stored {
            let why = "its checkpoints were not looked at yet".to_string();
            let order = self.next_order();
            let id = stored.run_id.clone();
            runs.insert(id, Unopened { stored, spec, why, order, starts: false });
        }
    }

    /// Waits until a run is open, if it is one that is not.
    ///
    /// # Errors
    /// `STARTING` where it is not open after `patience`, with the reason.
    pub(crate) async fn wait_open(&self, id: &RunId, patience: Duration) -> Result<(), Status> {
        let mut changes = self.changes();
        let open = async {
            loop {
                changes.mark_unchanged();
                if self.opening.get(id).is_none() || changes.changed().await.is_err() {
                    return;
                }
            }
        };
        if tokio::time::timeout(patience, open).await.is_ok() {
            return Ok(());
        }
        match self.opening.get(id) {
            None => Ok(()),
            Some(run) => {
                let text = format!("run `{id}` is not open yet: {}", run.why);
                Err(status(Reason::Starting, text))
            }
        }
    }

    /// Waits until each run was tried once, for at most `patience`.
    pub(crate) async fn wait_settled(&self, patience: Duration) {
        let mut changes = self.changes();
        let settled =
            async { while !self.opening.is_settled() && changes.changed().await.is_ok() {} };
        // Otherwise those that are not open are shown as that.
        let _ = tokio::time::timeout(patience, settled).await;
    }

    /// Opens what is to be opened, until all of it is.
    pub(crate) async fn open_runs(self: Arc<Self>) {
        let turns = Arc::new(Semaphore::new(OPENING_MAX));
        let mut first = JoinSet::new();
        for (id, _) in self.opening.all() {
            let (shared, turns) = (self.clone(), turns.clone());
            first.spawn(async move {
                let mut opening = None;
                (!shared.try_open(&id, &turns, &mut opening).await).then_some((id, opening))
            });
        }
        let mut rest: Vec<(RunId, Option<OpenTask>)> = Vec::new();
        while let Some(tried) = first.join_next().await {
            // A panic in one was printed.
            rest.extend(tried.ok().flatten());
        }
        self.opening.settled.store(true, Ordering::Release);
        self.runs_changed();
        let mut again = JoinSet::new();
        for (id, mut opening) in rest {
            let (shared, turns) = (self.clone(), turns.clone());
            again.spawn(async move {
                while shared.opening.get(&id).is_some() {
                    if opening.is_none() {
                        tokio::time::sleep(AGAIN).await;
                    }
                    shared.try_open(&id, &turns, &mut opening).await;
                }
            });
        }
        while again.join_next().await.is_some() {}
    }

    /// Tries to open a run; tells whether there is nothing left to do. What takes longer than
    /// [`OPENING`] is left in `opening`, for the next call to wait for: a second reader beside it
    /// would be no faster, and would fence off whoever comes first.
    async fn try_open(
        self: &Arc<Self>,
        id: &RunId,
        turns: &Semaphore,
        opening: &mut Option<OpenTask>,
    ) -> bool {
        // Never closed.
        let _turn = turns.acquire().await;
        let Some(Unopened { stored, spec, order, .. }) = self.opening.get(id) else { return true };
        let (wanted, n_samples, print) =
            (spec.clone(), stored.n_samples, stored.fingerprint.clone());
        // One that rests is claimed when it goes on: another coordinator may train it meanwhile. Of
        // one that is finished nobody does, and what a crash left of it goes now.
        let rests = |ending: &Ending| !matches!(ending, Ending::Finished { .. });
        let (rests, epoch) = (stored.saved.ending.as_ref().is_some_and(rests), self.epoch);
        let trains = stored.saved.plan.as_ref().map(|plan| plan.generation);
        let open = move || match rests {
            true => Catalogue::open_at_rest(wanted, n_samples, print),
            false => Catalogue::open(wanted, n_samples, print, epoch, trains),
        };
        let task = opening.get_or_insert_with(|| tokio::task::spawn_blocking(open));
        let opened = match tokio::time::timeout(OPENING, &mut *task).await {
            Ok(answer) => {
                *opening = None;
                let opened = answer.map_err(|err| err.to_string());
                opened.and_then(|opened| opened.map_err(|err| err.to_string()))
            }
            Err(_) => Err(format!("no answer for {OPENING:?}")),
        };
        if opened.is_ok() && !self.opening.begin(id, order) {
            info!(run_id = %id, "open, and given up meanwhile");
            return true;
        }
        let opened = opened.and_then(|opened| self.put_to_work(stored, spec, opened, order));
        match opened {
            Ok(()) => {
                info!(run_id = %id, "open");
                true
            }
            Err(error) => {
                let why = format!("its checkpoints cannot be used: {error}");
                if self.opening.say(id, why) {
                    warn!(run_id = %id, error, "checkpoints cannot be used; trying again");
                }
                self.runs_changed();
                false
            }
        }
    }

    /// Starts an opened run's task.
    fn put_to_work(
        self: &Arc<Self>,
        mut stored: StoredRun,
        spec: RunSpec,
        (catalogue, found): (Catalogue, Found),
        order: usize,
    ) -> Result<(), String> {
        let id = stored.run_id.clone();
        let news = found.news(&stored.saved);
        news.iter().for_each(|record| stored.saved.apply(record));
        let recorded = self.store().record(&id, &news);
        if let Err(err) = recorded {
            let text = err.to_string();
            self.fail(err);
            return Err(text);
        }
        found.damaged.iter().for_each(|damaged| warn!(run_id = %id, "{damaged}"));
        self.start_run(stored, spec, catalogue, order)
    }
}

#[cfg(test)]
mod tests {
    use lacuna_spec::parse_text;

    use super::*;

    /// Whoever takes a name over and whoever opened the run under it cannot both go on.
    #[test]
    fn a_run_is_given_up_or_starts() {
        let text = "schema = 1\nname = \"x\"\nbase = \"preset:micro\"\ndata.shards = \"d\"";
        let spec = parse_text("x.toml", text, &[]).unwrap().spec;
        let id = spec.run_id();
        let opening = Opening::default();
        let expect = |order| {
            let stored = StoredRun {
                run_id: id.clone(),
                spec: String::new(),
                n_samples: 1,
                fingerprint: String::new(),
                saved: Default::default(),
            };
            let (spec, why) = (spec.clone(), String::new());
            let run = Unopened { stored, spec, why, order, starts: false };
            lock(&opening.runs).insert(id.clone(), run);
        };
        expect(1);
        assert!(opening.give_up(&id));
        assert!(!opening.begin(&id, 1), "it was given up");
        expect(2);
        assert!(!opening.begin(&id, 1), "it is another one");
        assert!(opening.begin(&id, 2));
        assert!(!opening.give_up(&id), "it is too late");
        opening.say(&id, "no room".to_string());
        assert!(opening.give_up(&id), "it did not start");
    }
}
