//! What runs and sessions share: the store, the runs, and which run a free worker goes to.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lacuna_api::error::{Reason, not_leader, status};
use lacuna_api::v1;
use lacuna_spec::{Mark, RunSpec};
use lacuna_track::Figures;
use lacuna_types::{CoordEpoch, Incarnation, RunId, Timestamp, WorkerId};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tonic::Status;
use tracing::warn;

use crate::bans::Bans;
use crate::catalogue::Catalogue;
use crate::etcd::EtcdError;
use crate::grpc::create::Naming;
use crate::grpc::idempotency::Once;
use crate::grpc::logs::Logs;
use crate::grpc::node_of;
use crate::grpc::specs::etag_of;
use crate::opening::Opening;
use crate::run::{Input, RunEnds, RunTask, SessionSender};
use crate::service::Options;
use crate::state_writer::Scribe;
use crate::store::{Store, StoreError, StoredRun};
use crate::track::Follower;

/// Name of the state file in its folder.
pub(crate) const STATE_FILE: &str = "coordinator.sqlite";
/// Data sets that are opened for callers at a time.
const LOOKING_MAX: usize = 4;
/// Runs whose files are copied to stores at a time.
const COPYING_MAX: usize = 16;
/// Files for TensorBoard of runs that want copies of them in a store.
pub(crate) const FILES_FOLDER: &str = "track";

/// Folders for people's tools that are written at once.
const TRACKING_MAX: usize = 8;
/// Callers that read files at once.
const READING_MAX: usize = 4;
/// Streams of logs at once.
const LOG_READERS_MAX: usize = 64;
/// Checkpoints that are read at once for callers.
const VERIFYING_MAX: usize = 2;
/// Pictures that are written at once.
const DRAWING_MAX: usize = 64;

/// A run and the ways to reach its task.
pub(crate) struct RunHandle {
    pub ends: RunEnds,
    pub spec: RunSpec,
    /// The same as JSON, and what tells it from another: asked for by every session and call.
    pub spec_json: String,
    pub etag: String,
    pub n_samples: u64,
    pub fingerprint: String,
    /// Place in order of creation: older runs get workers first.
    pub order: usize,
    /// Sessions that were given to the run and are alive.
    pub attached: usize,
}

impl RunHandle {
    /// Takes another specification.
    pub fn set_spec(&mut self, spec: RunSpec) {
        (self.spec_json, self.etag) = spoken(&spec);
        self.spec = spec;
    }
}

/// Returns a specification as JSON, and its etag.
fn spoken(spec: &RunSpec) -> (String, String) {
    (spec.to_json().to_string(), etag_of(spec))
}

/// Ends a run's follower, and waits for it.
type Following = (watch::Sender<bool>, JoinHandle<()>);

/// State that every call and session sees. Locks are never held across an await.
pub(crate) struct Shared {
    pub options: Options,
    pub epoch: CoordEpoch,
    pub tasks: AtomicUsize,
    store: Arc<Mutex<Box<dyn Store>>>,
    pub scribe: Scribe,
    runs: Mutex<BTreeMap<RunId, RunHandle>>,
    live: Mutex<BTreeMap<WorkerId, Live>>,
    /// Streams of agents by node.
    agents: Mutex<BTreeMap<String, AgentSender>>,
    sessions: AtomicU64,
    changed: watch::Sender<u64>,
    fatal: mpsc::Sender<StoreError>,
    /// Those who write files for people's tools.
    followers: Mutex<BTreeMap<RunId, Following>>,
    /// Threads that they may keep from others: a folder that does not answer holds one each.
    pub tracking: Arc<Semaphore>,
    /// Pictures that may be on their way to the store.
    pub drawing: Arc<Semaphore>,
    /// Checkpoints that callers may have read at a time.
    pub verifying: Arc<Semaphore>,
    /// Data sets that may be opened for callers at a time.
    pub looking: Arc<Semaphore>,
    /// Runs whose files may be copied to a store at a time.
    pub copying: Arc<Semaphore>,
    /// Callers that may read files at a time, beside pages.
    pub reading: Arc<Semaphore>,
    /// Readers of logs.
    pub log_readers: Arc<Semaphore>,
    /// What trainers log.
    pub logs: Arc<Logs>,
    /// Machines that are kept out.
    pub bans: Bans,
    /// Requests that may come again.
    pub once: Once,
    /// Names of runs that are being created.
    pub naming: Naming,
    /// Runs that are remembered and not open yet.
    pub opening: Opening,
    /// Runs that have a place in the order of creation.
    orders: AtomicUsize,
    started: Instant,
}

/// A worker that is connected.
struct Live {
    incarnation: Incarnation,
    /// What it computes on, for people.
    device: String,
    out: SessionSender,
}

/// The sender of an agent's stream.
pub(crate) type AgentSender = mpsc::Sender<Result<v1::AgentResponse, Status>>;

/// Locks a mutex; a poisoned one is as good, nothing here leaves data half-changed.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(
        options: Options,
        store: Box<dyn Store>,
        epoch: CoordEpoch,
    ) -> std::io::Result<(Arc<Self>, mpsc::Receiver<StoreError>)> {
        let (fatal, failures) = mpsc::channel(1);
        let bans = Bans::of(store.bans().map_err(std::io::Error::other)?);
        let store = Arc::new(Mutex::new(store));
        let scribe = Scribe::start(store.clone(), fatal.clone())?;
        let shared = Shared {
            options,
            epoch,
            tasks: AtomicUsize::new(0),
            store,
            scribe,
            runs: Mutex::new(BTreeMap::new()),
            live: Mutex::new(BTreeMap::new()),
            agents: Mutex::new(BTreeMap::new()),
            sessions: AtomicU64::new(0),
            changed: watch::Sender::new(0),
            fatal,
            followers: Mutex::default(),
            tracking: Arc::new(Semaphore::new(TRACKING_MAX)),
            drawing: Arc::new(Semaphore::new(DRAWING_MAX)),
            verifying: Arc::new(Semaphore::new(VERIFYING_MAX)),
            looking: Arc::new(Semaphore::new(LOOKING_MAX)),
            copying: Arc::new(Semaphore::new(COPYING_MAX)),
            reading: Arc::new(Semaphore::new(READING_MAX)),
            log_readers: Arc::new(Semaphore::new(LOG_READERS_MAX)),
            logs: Arc::default(),
            bans,
            once: Once::default(),
            naming: Naming::default(),
            opening: Opening::default(),
            orders: AtomicUsize::new(0),
            started: Instant::now(),
        };
        Ok((Arc::new(shared), failures))
    }

    pub(crate) fn now(&self) -> Timestamp {
        // The machine's clock starts at one hour, so that subtracting a lease cannot go below zero.
        Timestamp(0) + Duration::from_secs(3600) + self.started.elapsed()
    }

    pub(crate) fn instant(&self, at: Timestamp) -> Instant {
        let start = Timestamp(0) + Duration::from_secs(3600);
        self.started + at.since(start) + Duration::from_millis(1)
    }

    pub(crate) fn store(&self) -> MutexGuard<'_, Box<dyn Store>> {
        lock(&self.store)
    }

    /// Returns where the state file lies.
    pub(crate) fn state_file(&self) -> PathBuf {
        self.options.state.join(STATE_FILE)
    }

    /// Returns how many workers are connected.
    pub(crate) fn n_sessions(&self) -> usize {
        lock(&self.live).len()
    }

    pub(crate) fn runs(&self) -> MutexGuard<'_, BTreeMap<RunId, RunHandle>> {
        lock(&self.runs)
    }

    pub(crate) fn newest_figures(&self, run: &RunId) -> Result<Option<Figures>, StoreError> {
        self.store().newest_figures(run)
    }

    /// Stops the service: without its store it must not say anything more. Returns what a caller
    /// is told.
    pub(crate) fn fail(&self, error: StoreError) -> Status {
        let told = match &error {
            StoreError::Etcd(EtcdError::NotLeader) => not_leader(""),
            error => status(Reason::Internal, lacuna_checkpoint::chain(error)),
        };
        // A second failure has nothing to add.
        let _ = self.fatal.try_send(error);
        told
    }

    pub(crate) fn runs_changed(&self) {
        self.changed.send_modify(|n| *n += 1);
    }

    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(crate) fn next_session(&self) -> u64 {
        self.sessions.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Returns the next place in the order of creation.
    pub(crate) fn next_order(&self) -> usize {
        self.orders.fetch_add(1, Ordering::Relaxed)
    }

    /// Puts a run's task to work.
    pub(crate) fn start_run(
        self: &Arc<Self>,
        stored: StoredRun,
        spec: RunSpec,
        catalogue: Catalogue,
        order: usize,
    ) -> Result<(), String> {
        let (n_samples, fingerprint) = (stored.n_samples, stored.fingerprint.clone());
        let id = stored.run_id.clone();
        let (task, ends, inputs) = RunTask::create(self, stored, spec.clone(), catalogue)?;
        self.tasks.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(task.run(inputs));
        self.follow(&id, &spec, &ends);
        let (spec_json, etag) = spoken(&spec);
        let handle =
            RunHandle { ends, spec, spec_json, etag, n_samples, fingerprint, order, attached: 0 };
        self.runs().insert(id.clone(), handle);
        self.opening.forget(&id);
        self.runs_changed();
        Ok(())
    }

    /// Takes the specification that a run has from now on; those who wait for a run may be wanted.
    pub(crate) fn set_spec(self: &Arc<Self>, id: &RunId, spec: &RunSpec) {
        if let Some(handle) = self.runs().get_mut(id) {
            if handle.spec.track.tensorboard != spec.track.tensorboard {
                self.follow(id, spec, &handle.ends);
            }
            handle.set_spec(spec.clone());
        }
        self.runs_changed();
    }

    /// Begins to write the files that the spec asks for, and no longer those of the spec before.
    pub(crate) fn follow(self: &Arc<Self>, id: &RunId, spec: &RunSpec, ends: &RunEnds) {
        let mut followers = lock(&self.followers);
        if let Some((close, _)) = followers.remove(id) {
            // It ends by itself with what is left; `close` waits for those that are current.
            close.send_replace(true);
        }
        let Some(to) = &spec.track.tensorboard else { return };
        let (folder, copies) = if lacuna_store::is_url(to) {
            let url = format!("{}/{id}", to.trim_end_matches('/'));
            (self.options.state.join(FILES_FOLDER).join(id.as_str()), Some(url))
        } else {
            (Path::new(to).join(id.as_str()), None)
        };
        let follower = Follower {
            shared: self.clone(),
            run: id.clone(),
            folder,
            copies,
            spec: serde_json::to_string_pretty(&spec.to_json()).unwrap_or_default(),
            remarks: ends.input.clone(),
        };
        let close = watch::Sender::new(false);
        let work = tokio::spawn(follower.run(ends.view.clone(), close.subscribe()));
        followers.insert(id.clone(), (close, work));
    }

    /// Has every follower write what is left, for at most `patience`.
    pub(crate) async fn close(&self, patience: Duration) {
        let followers = std::mem::take(&mut *lock(&self.followers));
        let all = async {
            for (close, _) in followers.values() {
                close.send_replace(true);
            }
            for (_, (_close, work)) in followers {
                // A panic there was printed.
                let _ = work.await;
            }
        };
        if tokio::time::timeout(patience, all).await.is_err() {
            warn!("files of `track.tensorboard` are not complete; the next start completes them");
        }
    }

    /// Gives a free worker to the oldest run that wants one.
    pub(crate) fn assign(&self) -> Option<RunId> {
        if !self.opening.is_settled() {
            return None;
        }
        let mut runs = self.runs();
        let wants = |h: &RunHandle| {
            let limit = (h.spec.elastic.workers.max + h.spec.elastic.spares) as usize;
            h.ends.view.borrow().ending.is_none() && h.attached < limit
        };
        let oldest = runs.iter().filter(|(_, h)| wants(h)).min_by_key(|(_, h)| h.order);
        let id = oldest.map(|(id, _)| id.clone())?;
        runs.get_mut(&id).expect("just seen").attached += 1;
        Some(id)
    }

    /// Gives a worker back to the run it belonged to.
    pub(crate) fn reattach(&self, run: &RunId) -> bool {
        let mut runs = self.runs();
        runs.get_mut(run).map(|handle| handle.attached += 1).is_some()
    }

    pub(crate) fn release(&self, run: &RunId) {
        if let Some(handle) = self.runs().get_mut(run) {
            handle.attached = handle.attached.saturating_sub(1);
        }
        self.runs_changed();
    }

    /// Registers a live session; a live namesake with another incarnation is in the way.
    pub(crate) fn enter(
        &self,
        worker: &WorkerId,
        incarnation: Incarnation,
        device: &str,
        out: &SessionSender,
    ) -> Result<(), Status> {
        if let Some(why) = self.bans.of_node(node_of(worker)) {
            return Err(status(Reason::NodeBanned, why));
        }
        let mut live = lock(&self.live);
        let other = |known: &&Live| known.incarnation != incarnation && !known.out.is_closed();
        let namesake = live.get(worker).filter(other);
        if namesake.is_some() {
            let text = format!(
                "a live worker is called {worker} already: give each node its own `--node-name`"
            );
            return Err(status(Reason::WorkerExists, text));
        }
        let (device, out) = (device.to_string(), out.clone());
        live.insert(worker.clone(), Live { incarnation, device, out });
        Ok(())
    }

    /// Returns the workers that are connected, and what they compute on.
    pub(crate) fn devices(&self) -> Vec<(WorkerId, String)> {
        lock(&self.live).iter().map(|(id, live)| (id.clone(), live.device.clone())).collect()
    }

    /// Forgets a session whose stream has ended; a newer one of the same process stays.
    pub(crate) fn leave(&self, worker: &WorkerId, out: &SessionSender) {
        let mut live = lock(&self.live);
        if live.get(worker).is_some_and(|known| known.out.same_channel(out)) {
            live.remove(worker);
        }
    }

    /// Forgets one life of a worker, whose process has ended.
    pub(crate) fn bury(&self, worker: &WorkerId, incarnation: Incarnation) {
        let mut live = lock(&self.live);
        if live.get(worker).is_some_and(|known| known.incarnation == incarnation) {
            live.remove(worker);
        }
    }

    /// Registers an agent's stream; a newer one of the same node takes its place.
    pub(crate) fn enter_agent(&self, node: &str, out: &AgentSender) {
        lock(&self.agents).insert(node.to_string(), out.clone());
    }

    pub(crate) fn leave_agent(&self, node: &str, out: &AgentSender) {
        let mut agents = lock(&self.agents);
        if agents.get(node).is_some_and(|known| known.same_channel(out)) {
            agents.remove(node);
        }
    }

    /// Has one life of a worker killed by its agent, if that can be reached.
    pub(crate) fn kill(&self, worker: &WorkerId, incarnation: Incarnation, why: &str) {
        let node = node_of(worker);
        let kill = v1::NodeKill {
            worker_id: worker.to_string(),
            incarnation: incarnation.0,
            why: why.to_string(),
        };
        let message = Some(v1::agent_response::Message::Kill(kill));
        let sent = lock(&self.agents)
            .get(node)
            .is_some_and(|out| out.try_send(Ok(v1::AgentResponse { message })).is_ok());
        if !sent {
            warn!(worker_id = %worker, "no agent to kill it through; it is left out all the same");
        }
    }

    /// Returns the time between beats and the lease for as many workers as there are.
    pub(crate) fn beat_and_lease(&self) -> (Duration, Duration) {
        self.options.timing.at_scale(lock(&self.live).len())
    }

    pub(crate) fn input_of(&self, run: &RunId) -> Option<mpsc::Sender<Input>> {
        self.runs().get(run).map(|handle| handle.ends.input.clone())
    }

    /// Finds the maths fields in which `spec` differs from the run of the same name.
    pub(crate) fn differences(&self, run: &RunId, spec: &RunSpec) -> Vec<String> {
        let runs = self.runs();
        let Some(handle) = runs.get(run) else { return Vec::new() };
        lacuna_spec::diff(&handle.spec, spec)
            .into_iter()
            .filter(|d| d.mark == Mark::Maths)
            .map(|d| d.to_string())
            .collect()
    }
}
