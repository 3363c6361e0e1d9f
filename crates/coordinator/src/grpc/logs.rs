//! What trainers log: the newest lines of all, in memory, and a stream of those to come.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use lacuna_api::v1;
use lacuna_types::{RunId, WorkerId};
use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::bounded;
use crate::registry::lock;

/// Lines that are kept, of all workers together.
const LINES_MAX: usize = 50_000;
/// Bytes of their text that are kept.
const BYTES_MAX: usize = 16 << 20;
/// Lines that a reader looks at before others get their turn.
const PAGE: u64 = 2048;
/// Workers whose run is remembered.
const WORKERS_MAX: usize = 16_384;

/// The newest lines of all trainers.
pub(crate) struct Logs {
    kept: Mutex<Kept>,
    /// Number of the next line.
    next: watch::Sender<u64>,
}

#[derive(Default)]
struct Kept {
    lines: VecDeque<Line>,
    /// Number of the first line that is kept.
    first: u64,
    n_bytes: usize,
    /// The run that each worker was last given to.
    runs: BTreeMap<String, RunId>,
}

#[derive(Clone)]
struct Line {
    /// The run that its worker was with.
    run: Option<RunId>,
    said: Arc<v1::StreamLogsResponse>,
}

impl Default for Logs {
    fn default() -> Self {
        Logs { kept: Mutex::default(), next: watch::Sender::new(0) }
    }
}

/// Which lines a reader wants.
struct Wanted<'a> {
    run: &'a str,
    worker: &'a str,
}

impl Wanted<'_> {
    fn takes(&self, line: &Line) -> bool {
        let of_run = line.run.as_ref().is_some_and(|run| run.as_str() == self.run);
        of_run && (self.worker.is_empty() || line.said.worker_id == self.worker)
    }
}

impl Logs {
    /// Keeps a line.
    pub fn push(&self, worker: &WorkerId, text: String, missed: u64) {
        let at_ms =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
        let (worker_id, text) = (worker.to_string(), bounded(text));
        let mut kept = lock(&self.kept);
        let run = kept.runs.get(&worker_id).cloned();
        kept.n_bytes += text.len();
        let said = Arc::new(v1::StreamLogsResponse { worker_id, text, at_ms, missed });
        kept.lines.push_back(Line { run, said });
        while kept.lines.len() > LINES_MAX || kept.n_bytes > BYTES_MAX {
            let oldest = kept.lines.pop_front().expect("there are lines");
            kept.n_bytes -= oldest.said.text.len();
            kept.first += 1;
        }
        self.next.send_replace(kept.first + kept.lines.len() as u64);
    }

    /// Says which run a worker is with from now on, and was with since its last line of another:
    /// what it said while it started is about this one.
    pub fn attach(&self, worker: &WorkerId, run: &RunId) {
        let mut kept = lock(&self.kept);
        if kept.runs.len() >= WORKERS_MAX {
            kept.runs.clear();
        }
        kept.runs.insert(worker.to_string(), run.clone());
        let of_worker = |line: &&mut Line| line.said.worker_id == worker.as_str();
        let unknown = kept.lines.iter_mut().rev().take(PAGE as usize).filter(of_worker);
        unknown.take_while(|line| line.run.is_none()).for_each(|line| line.run = Some(run.clone()));
    }

    /// Finds the number from which on there are `tail` lines that are wanted; 0: all.
    fn start(&self, tail: u32, wanted: &Wanted<'_>) -> u64 {
        let kept = lock(&self.kept);
        if tail == 0 {
            return kept.first;
        }
        let mut found = kept.lines.iter().enumerate().rev().filter(|(_, line)| wanted.takes(line));
        let at = found.nth(tail as usize - 1).map_or(0, |(at, _)| at);
        kept.first + at as u64
    }

    /// Returns wanted lines of those from `from` on, how many were forgotten before them, and the
    /// number to go on with.
    fn page(&self, from: u64, wanted: &Wanted<'_>) -> (Vec<Line>, u64, u64) {
        let kept = lock(&self.kept);
        let begin = from.max(kept.first);
        let end = (begin + PAGE).min(kept.first + kept.lines.len() as u64);
        let range =
            (begin - kept.first) as usize..(end - kept.first).max(begin - kept.first) as usize;
        let lines = kept.lines.range(range).filter(|line| wanted.takes(line)).cloned().collect();
        (lines, begin - from, end.max(begin))
    }

    /// Sends lines to a reader until it goes, or what is there was sent.
    pub async fn feed(
        &self,
        request: &v1::StreamLogsRequest,
        out: mpsc::Sender<Result<v1::StreamLogsResponse, Status>>,
    ) {
        let wanted = Wanted { run: &request.run_id, worker: &request.worker_id };
        let mut next = self.next.subscribe();
        let mut from = self.start(request.tail, &wanted);
        let mut forgotten = 0;
        loop {
            let end = *next.borrow_and_update();
            while from < end {
                let (lines, missed, to) = self.page(from, &wanted);
                (from, forgotten) = (to, forgotten + missed);
                for line in lines {
                    let mut said = (*line.said).clone();
                    said.missed += std::mem::take(&mut forgotten);
                    if out.send(Ok(said)).await.is_err() {
                        return;
                    }
                }
            }
            if !request.follow {
                return;
            }
            tokio::select! {
                changed = next.changed() => if changed.is_err() { return },
                () = out.closed() => return,
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

    fn run(name: &str) -> RunId {
        name.parse().unwrap()
    }

    async fn read(logs: &Logs, run_id: &str, worker_id: &str, tail: u32) -> Vec<String> {
        let (out, mut lines) = mpsc::channel::<Result<v1::StreamLogsResponse, Status>>(1);
        let (run_id, worker_id) = (run_id.to_string(), worker_id.to_string());
        let request = v1::StreamLogsRequest { run_id, worker_id, tail, follow: false };
        let gather = async {
            let mut all = Vec::new();
            while let Some(Ok(line)) = lines.recv().await {
                all.push(line.text);
            }
            all
        };
        tokio::join!(logs.feed(&request, out), gather).1
    }

    #[tokio::test]
    async fn the_newest_lines_stay() {
        let logs = Logs::default();
        logs.attach(&worker("a:cpu0"), &run("r"));
        let n = LINES_MAX + 10;
        (0..n).for_each(|i| logs.push(&worker("a:cpu0"), format!("line {i}"), 0));
        let lines = read(&logs, "r", "", 0).await;
        assert_eq!((lines.len(), lines[0].as_str()), (LINES_MAX, "line 10"));
        let newest = read(&logs, "r", "a:cpu0", 2).await;
        assert_eq!(newest, [format!("line {}", n - 2), format!("line {}", n - 1)]);
        for i in 0..40_000 {
            logs.push(&worker("a:cpu0"), format!("{i}{}", "y".repeat(900)), 0);
        }
        let bytes: usize = read(&logs, "r", "", 0).await.iter().map(String::len).sum();
        assert!(bytes <= BYTES_MAX, "{bytes}");
    }

    #[tokio::test]
    async fn a_line_belongs_to_the_run_that_its_worker_was_with() {
        let logs = Logs::default();
        logs.push(&worker("a:cpu0"), "starting".into(), 0);
        logs.attach(&worker("a:cpu0"), &run("first"));
        logs.push(&worker("a:cpu0"), "at work".into(), 0);
        logs.attach(&worker("a:cpu0"), &run("second"));
        logs.push(&worker("a:cpu0"), "at other work".into(), 0);
        assert_eq!(read(&logs, "first", "", 0).await, ["starting", "at work"]);
        assert_eq!(read(&logs, "second", "", 0).await, ["at other work"]);
        assert!(read(&logs, "second", "b:cpu0", 0).await.is_empty());
    }

    #[tokio::test]
    async fn a_reader_gets_what_was_and_what_comes() {
        let logs = Arc::new(Logs::default());
        logs.attach(&worker("a:cpu0"), &run("r"));
        logs.push(&worker("a:cpu0"), "one\u{1b}[2J".into(), 0);
        let (out, mut lines) = mpsc::channel(8);
        let request =
            v1::StreamLogsRequest { run_id: "r".into(), follow: true, ..Default::default() };
        let feeding = logs.clone();
        tokio::spawn(async move { feeding.feed(&request, out).await });
        let one = lines.recv().await.unwrap().unwrap();
        assert_eq!(one.text, "one\u{fffd}[2J", "nothing that steers a terminal");
        logs.push(&worker("b:cpu0"), "of another".into(), 0);
        logs.push(&worker("a:cpu0"), "two".into(), 3);
        let two = lines.recv().await.unwrap().unwrap();
        assert_eq!((two.text.as_str(), two.missed), ("two", 3));
    }
}
