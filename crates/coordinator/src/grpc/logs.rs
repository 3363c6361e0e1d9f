//! What trainers log: the newest lines of all, in memory, and a stream of those to come.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use lacuna_api::v1;
use lacuna_types::WorkerId;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::mpsc;
use tonic::Status;

use super::bounded;
use crate::registry::lock;

/// Lines that are kept, of all workers together.
const LINES_MAX: usize = 50_000;
/// Bytes of their text that are kept.
const BYTES_MAX: usize = 16 << 20;
/// Lines that a reader may lag behind.
const LAG_MAX: usize = 4096;

/// The newest lines of all trainers.
pub(crate) struct Logs {
    kept: Mutex<Kept>,
    live: broadcast::Sender<v1::StreamLogsResponse>,
}

#[derive(Default)]
struct Kept {
    lines: VecDeque<v1::StreamLogsResponse>,
    n_bytes: usize,
}

impl Default for Logs {
    fn default() -> Self {
        let (live, _) = broadcast::channel(LAG_MAX);
        Logs { kept: Mutex::default(), live }
    }
}

impl Logs {
    /// Keeps a line.
    pub fn push(&self, worker: &WorkerId, text: String, missed: u64) {
        let at_ms =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
        let (worker_id, text) = (worker.to_string(), bounded(text));
        let line = v1::StreamLogsResponse { worker_id, text, at_ms, missed };
        let mut kept = lock(&self.kept);
        kept.n_bytes += line.text.len();
        kept.lines.push_back(line.clone());
        while kept.lines.len() > LINES_MAX || kept.n_bytes > BYTES_MAX {
            let oldest = kept.lines.pop_front().expect("there are lines");
            kept.n_bytes -= oldest.text.len();
        }
        // Under the lock: a reader that subscribes sees a line either here or there. Without
        // readers there is nobody to send to.
        let _ = self.live.send(line);
    }

    /// Returns the newest `tail` lines that `wanted` wants, 0 for all, and those to come.
    fn read(
        &self,
        tail: u32,
        wanted: impl Fn(&str) -> bool,
    ) -> (Vec<v1::StreamLogsResponse>, broadcast::Receiver<v1::StreamLogsResponse>) {
        let kept = lock(&self.kept);
        let most = if tail == 0 { usize::MAX } else { tail as usize };
        let newest = kept.lines.iter().rev().filter(|line| wanted(&line.worker_id)).take(most);
        let mut lines: Vec<v1::StreamLogsResponse> = newest.cloned().collect();
        lines.reverse();
        (lines, self.live.subscribe())
    }

    /// Sends lines to a reader until it goes, or what is there was sent.
    pub async fn feed(
        &self,
        request: v1::StreamLogsRequest,
        wanted: impl Fn(&str) -> bool,
        out: mpsc::Sender<Result<v1::StreamLogsResponse, Status>>,
    ) {
        let (lines, mut live) = self.read(request.tail, &wanted);
        for line in lines {
            if out.send(Ok(line)).await.is_err() {
                return;
            }
        }
        if !request.follow {
            return;
        }
        let mut missed = 0;
        loop {
            let next = tokio::select! {
                next = live.recv() => next,
                () = out.closed() => return,
            };
            match next {
                Ok(line) if wanted(&line.worker_id) => {
                    let missed = std::mem::take(&mut missed) + line.missed;
                    if out.send(Ok(v1::StreamLogsResponse { missed, ..line })).await.is_err() {
                        return;
                    }
                }
                Ok(_) => {}
                Err(RecvError::Lagged(n)) => missed += n,
                Err(RecvError::Closed) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(name: &str) -> WorkerId {
        name.parse().unwrap()
    }

    #[test]
    fn the_newest_lines_stay() {
        let logs = Logs::default();
        let n = LINES_MAX + 10;
        (0..n).for_each(|i| logs.push(&worker("a:cpu0"), format!("line {i}"), 0));
        let (lines, _) = logs.read(0, |_| true);
        assert_eq!(lines.len(), LINES_MAX);
        assert_eq!(lines[0].text, "line 10");
        logs.push(&worker("b:cpu0"), "x".repeat(10_000), 0);
        let (lines, _) = logs.read(3, |id| id == "b:cpu0");
        assert_eq!(lines.len(), 1);
        assert!(lines[0].text.len() < 2_000, "a line is bounded");
        let (lines, _) = logs.read(2, |id| id == "a:cpu0");
        assert_eq!(lines[1].text, format!("line {}", n - 1));
        for i in 0..40_000 {
            logs.push(&worker("a:cpu0"), format!("{i}{}", "y".repeat(900)), 0);
        }
        let (lines, _) = logs.read(0, |_| true);
        assert!(lines.iter().map(|line| line.text.len()).sum::<usize>() <= BYTES_MAX);
    }

    #[tokio::test]
    async fn a_reader_gets_what_was_and_what_comes() {
        let logs = std::sync::Arc::new(Logs::default());
        logs.push(&worker("a:cpu0"), "one".into(), 0);
        let (out, mut lines) = mpsc::channel(8);
        let request = v1::StreamLogsRequest { follow: true, ..Default::default() };
        let feeding = logs.clone();
        tokio::spawn(async move { feeding.feed(request, |id| id == "a:cpu0", out).await });
        assert_eq!(lines.recv().await.unwrap().unwrap().text, "one");
        logs.push(&worker("b:cpu0"), "of another".into(), 0);
        logs.push(&worker("a:cpu0"), "two".into(), 3);
        let two = lines.recv().await.unwrap().unwrap();
        assert_eq!((two.text.as_str(), two.missed), ("two", 3));
    }
}
