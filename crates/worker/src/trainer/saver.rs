//! Writes this worker's part of a checkpoint while training goes on.

use std::cell::RefCell;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use lacuna_checkpoint::chain;
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::pace::Pace;
use lacuna_checkpoint::state::{PartSlice, Snapshot};
use lacuna_checkpoint::write::{PartInfo, write_part_at};
use lacuna_control::worker::Report;
use lacuna_device::{Aside, DeviceError};
use lacuna_types::{AttemptSeq, Generation};
use tokio::sync::mpsc;

use super::save_meter::SaveMeter;

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
    /// What of it is still on the device: a copy, and the slices that its parts belong to.
    pub aside: Option<(Aside, Vec<usize>)>,
    /// Whether training stands still for it: then it is written as fast as it can be.
    pub held: bool,
    /// Set when nobody wants the part any more.
    pub given_up: Arc<AtomicBool>,
}

impl SaveJob {
    /// Brings what is still on the device to the host.
    fn fetch(&mut self) -> Result<(), DeviceError> {
        let Some((mut aside, slices)) = self.aside.take() else { return Ok(()) };
        for (part, slice) in slices.into_iter().enumerate() {
            aside.read(part, self.snapshot.bytes_mut(slice))?;
        }
        Ok(())
    }
}

/// The thread that writes, and the buffers it gives back.
#[derive(Debug)]
pub struct Saver {
    jobs: Option<SyncSender<SaveJob>>,
    spare: Receiver<Snapshot>,
    thread: Option<JoinHandle<()>>,
    /// Counts what is saved.
    pub meter: SaveMeter,
    /// Memory that was made ready.
    ready: RefCell<Option<Snapshot>>,
}

impl Saver {
    /// Starts the thread, which writes at most at this rate; results go to `reports`.
    pub fn start(
        dir: RunDir,
        bytes_per_second: Option<NonZeroU64>,
        reports: mpsc::Sender<Report>,
        meter: SaveMeter,
    ) -> std::io::Result<Self> {
        // An attempt ends before the next is proposed, but its part may still be on its way out.
        let (jobs, inbox) = sync_channel::<SaveJob>(1);
        let (give_back, spare) = sync_channel::<Snapshot>(2);
        let of_thread = meter.clone();
        let work = move || {
            for mut job in inbox {
                let (generation, attempt) = (job.generation, job.attempt);
                let limit = bytes_per_second.filter(|_| !job.held);
                let pace = Pace::new(limit, job.given_up.clone());
                let began = Instant::now();
                let written = job.fetch().map_err(|err| chain(&err)).and_then(|()| {
                    let part = write_part_at(&dir, &job.info, &job.snapshot.slices(), &pace);
                    part.map_err(|err| chain(&err))
                });
                let report = match written {
                    Ok(receipt) => {
                        of_thread.wrote(receipt.file.bytes, began.elapsed());
                        let receipt = receipt.render();
                        Report::PartDone { generation, attempt, receipt }
                    }
                    Err(detail) => {
                        of_thread.failed();
                        Report::PartFailed { generation, attempt, detail }
                    }
                };
                // The buffer is dropped where nobody wants it back.
                let _ = give_back.try_send(job.snapshot);
                if reports.blocking_send(report).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("saver".to_string()).spawn(work)?;
        let (jobs, thread, ready) = (Some(jobs), Some(thread), RefCell::default());
        Ok(Saver { jobs, spare, thread, meter, ready })
    }

    /// Returns a buffer to copy the state into, used before if possible.
    pub fn buffer(&self) -> Snapshot {
        self.spare.try_recv().ok().or_else(|| self.ready.take()).unwrap_or_default()
    }

    /// Makes memory for `slices` ready, so that the first copy need not wait for it.
    pub fn reserve(&self, slices: Vec<PartSlice>) {
        let mut buffer = self.buffer();
        buffer.prepare(slices);
        self.ready.replace(Some(buffer));
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
