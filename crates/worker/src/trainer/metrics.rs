//! Numbers about loading and saving, written to a file that a monitoring agent collects.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use lacuna_data::loader::LoaderWatch;
use tracing::warn;

use super::save_meter::SaveMeter;

/// How often the file is written: as often as such files are usually read.
const EVERY: Duration = Duration::from_secs(10);

/// Writes the file now and then, and once more when it is dropped.
#[derive(Debug)]
pub struct MetricsFile {
    writer: Arc<Writer>,
    end: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Writer {
    path: PathBuf,
    labels: [(&'static str, String); 2],
    watch: LoaderWatch,
    saving: SaveMeter,
    /// Whether it was said that writing fails; locked while writing.
    told: Mutex<bool>,
}

impl Writer {
    fn write(&self) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let labels = self.labels.each_ref().map(|(name, value)| (*name, value.as_str()));
        let text = self.watch.stats().prometheus(&labels) + &self.saving.prometheus(&labels);
        if let Err(error) = replace(&self.path, &text)
            && !std::mem::replace(&mut *told, true)
        {
            warn!(path = %self.path.display(), %error, "metrics cannot be written");
        }
    }
}

impl MetricsFile {
    /// Starts to write `<dir>/lacuna-data-<worker>.prom`; what goes wrong is said once and keeps
    /// nobody from training.
    pub fn start(
        dir: &Path,
        (run, worker): (&str, &str),
        watch: LoaderWatch,
        saving: SaveMeter,
    ) -> Self {
        let name: String =
            worker.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let writer = Arc::new(Writer {
            path: dir.join(format!("lacuna-data-{name}.prom")),
            labels: [("run", run.to_string()), ("worker", worker.to_string())],
            watch,
            saving,
            told: Mutex::new(false),
        });
        let (end, ended) = sync_channel::<()>(1);
        let of_thread = writer.clone();
        let work = move || {
            while ended.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                of_thread.write();
            }
        };
        let thread = thread::Builder::new().name("lacuna-metrics".to_string()).spawn(work);
        if let Err(error) = &thread {
            warn!(%error, "metrics are written at the end only: no thread");
        }
        MetricsFile { writer, end: Some(end), thread: thread.ok() }
    }

    /// Writes the file now.
    pub fn write(&self) {
        self.writer.write();
    }
}

/// Replaces the file, so that a reader finds the old numbers or the new ones.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    path.parent().map(fs::create_dir_all).transpose()?;
    let partial = path.with_extension("prom.partial");
    fs::write(&partial, text)?;
    fs::rename(partial, path)
}

impl Drop for MetricsFile {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // One that panicked has printed its message.
            let _ = thread.join();
        }
        self.write();
    }
}
