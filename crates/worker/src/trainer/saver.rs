//! Writes this worker's part of a checkpoint while training goes on.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use lacuna_checkpoint::chain;
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::state::Snapshot;
use lacuna_checkpoint::write::{PartInfo, write_part};
use lacuna_control::worker::Report;
use lacuna_types::{AttemptSeq, Generation};
use tokio::sync::mpsc;

/// A part to write.
#[derive(Debug)]
pub struct SaveJob {
    /// Generation of the attempt.
    pub generation: Generation,
    /// The attempt.
    pub attempt: AttemptSeq,
    /// What the part belongs to.
    pub info: PartInfo,
    /// The copied state.
    pub snapshot: Snapshot,
}

/// The thread that writes, and the buffers it gives back.
#[derive(Debug)]
pub struct Saver {
    jobs: Option<SyncSender<SaveJob>>,
    spare: Receiver<Snapshot>,
    thread: Option<JoinHandle<()>>,
}

impl Saver {
    /// Starts the thread; results go to `reports`.
    pub fn start(dir: RunDir, reports: mpsc::Sender<Report>) -> std::io::Result<Self> {
        // One job under way at a time: an attempt ends before the next is proposed.
        let (jobs, inbox) = sync_channel::<SaveJob>(1);
        let (give_back, spare) = sync_channel::<Snapshot>(2);
        let work = move || {
            for job in inbox {
                let (generation, attempt) = (job.generation, job.attempt);
                let report = match write_part(&dir, &job.info, &job.snapshot.slices()) {
                    Ok(receipt) => {
                        let receipt = receipt.render();
                        Report::PartDone { generation, attempt, receipt }
                    }
                    Err(err) => Report::PartFailed { generation, attempt, detail: chain(&err) },
                };
                // The buffer is dropped where nobody wants it back.
                let _ = give_back.try_send(job.snapshot);
                if reports.blocking_send(report).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("saver".to_string()).spawn(work)?;
        Ok(Saver { jobs: Some(jobs), spare, thread: Some(thread) })
    }

    /// Returns a buffer to copy the state into, used before if possible.
    pub fn buffer(&self) -> Snapshot {
        self.spare.try_recv().unwrap_or_default()
    }

    /// Hands a job over; refused while two earlier ones are not done.
    pub fn save(&self, job: SaveJob) -> Result<(), &'static str> {
        let jobs = self.jobs.as_ref().expect("the queue lives until drop");
        jobs.try_send(job).map_err(|err| match err {
            TrySendError::Full(_) => "two earlier parts are still being written",
            TrySendError::Disconnected(_) => "the writing thread is gone",
        })
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was printed by the thread itself.
            let _ = thread.join();
        }
    }
}
