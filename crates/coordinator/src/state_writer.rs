//! The one writer of the state file: what many runs write at one time is made durable together.
//!
//! A sync takes milliseconds whatever it covers, and a hundred runs that form at once each need
//! several. So runs hand their entries to one thread and wait there, not on the threads that serve;
//! what has gathered while a sync was under way goes with the next one.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use lacuna_types::RunId;
use tokio::sync::{mpsc, oneshot};

use crate::registry::lock;
use crate::store::{Batch, Entry, Store, StoreError};

/// Bound of the queue: each run waits for what it wrote, so more is not under way.
const QUEUE: usize = 1024;

/// The store failed and the service goes down: nothing may be said any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Down;

struct Job {
    batch: Batch,
    done: oneshot::Sender<Vec<u64>>,
}

/// The way to the writing thread, which ends with it.
pub(crate) struct Scribe {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Scribe {
    /// Starts the thread; a store that fails is reported to `fatal`, and nothing is written after.
    pub(crate) fn start(
        store: Arc<Mutex<Box<dyn Store>>>,
        fatal: mpsc::Sender<StoreError>,
    ) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let work = move || write_all(&store, queue, &fatal);
        let thread = std::thread::Builder::new().name("scribe".to_string()).spawn(work)?;
        Ok(Scribe { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Writes entries of a run, and returns the sequence numbers of the updates among them once
    /// everything is as durable as [`Store::write`] says.
    pub(crate) async fn write(&self, run: &RunId, entries: Vec<Entry>) -> Result<Vec<u64>, Down> {
        let (done, written) = oneshot::channel();
        let job = Job { batch: Batch { run: run.clone(), entries }, done };
        let jobs = self.jobs.as_ref().expect("there until dropped");
        jobs.send(job).await.map_err(|_| Down)?;
        written.await.map_err(|_| Down)
    }
}

impl Drop for Scribe {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was printed, and whoever waited for it went down.
            let _ = thread.join();
        }
    }
}

/// Writes batches part by part.
fn write(
    store: &Mutex<Box<dyn Store>>,
    mut batches: &[Batch],
) -> Result<Vec<Vec<u64>>, StoreError> {
    let mut written = Vec::with_capacity(batches.len());
    while !batches.is_empty() {
        let part = lock(store).prepare(batches)?;
        // The store is not locked meanwhile.
        part.elsewhere.map_or(Ok(()), |keep| keep())?;
        let (now, later) = batches.split_at(part.n);
        written.extend(lock(store).finish(now, part.ticket)?);
        batches = later;
    }
    Ok(written)
}

fn write_all(
    store: &Mutex<Box<dyn Store>>,
    mut queue: mpsc::Receiver<Job>,
    fatal: &mpsc::Sender<StoreError>,
) {
    while let Some(first) = queue.blocking_recv() {
        let (mut batches, mut waiting) = (vec![first.batch], vec![first.done]);
        while let Ok(Job { batch, done }) = queue.try_recv() {
            batches.push(batch);
            waiting.push(done);
        }
        match write(store, &batches) {
            Ok(numbers) => {
                for (done, numbers) in waiting.into_iter().zip(numbers) {
                    // Nobody waits any more where the run's task is gone.
                    let _ = done.send(numbers);
                }
            }
            Err(error) => {
                // A second failure has nothing to add.
                let _ = fatal.try_send(error);
                return;
            }
        }
    }
}
