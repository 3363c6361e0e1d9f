//! `lacuna logs`: what a run's workers log, with equal lines of many workers as one.

use std::collections::VecDeque;
use std::io::Write as _;
use std::time::Duration;

use clap::Args;
use lacuna_api::client::ClientError;
use lacuna_api::v1;
use lacuna_types::exit;
use tokio::time::Instant;

use crate::client::Output;
use crate::connect::Connect;
use crate::inspect::is_final;
use crate::runtime;

/// How long a line waits for its like from other workers.
const GATHER: Duration = Duration::from_millis(300);
/// How long to wait before a broken stream is opened again.
const AGAIN: Duration = Duration::from_secs(1);
/// Lines that may wait.
const WAITING_MAX: usize = 1000;

/// `lacuna logs`.
#[derive(Args, Debug)]
pub struct LogsArgs {
    /// Name of the run.
    run: String,
    /// Go on with lines to come.
    #[arg(long, short)]
    follow: bool,
    /// One worker, `node:device`.
    #[arg(long, default_value = "")]
    worker: String,
    /// Lines of before at most, 0 for all that are kept.
    #[arg(long, default_value_t = 1000)]
    tail: u32,
    /// Show every line of every worker, also where many say the same.
    #[arg(long)]
    all: bool,
    /// How lines are printed; JSON is one object a line.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
    #[command(flatten)]
    connect: Connect,
}

/// Prints what a run's workers log.
pub fn logs(args: LogsArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(async {
        let mut shown = Shown { gathered: Gathered::default(), due: None };
        let interrupt = tokio::signal::ctrl_c();
        tokio::pin!(interrupt);
        let mut tail = args.tail;
        loop {
            let result = tokio::select! {
                result = print(&args, tail, &mut shown) => result,
                _ = &mut interrupt => {
                    shown.flush();
                    return Ok(exit::OK);
                }
            };
            shown.flush();
            match result {
                Ok(()) if !args.follow => return Ok(exit::OK),
                Err(err) if !args.follow || is_final(&err) => return Err(err.into()),
                // The stream broke, and a coordinator that starts again has forgotten the rest.
                _ => tail = 0,
            }
            tokio::select! {
                () = tokio::time::sleep(AGAIN) => {}
                _ = &mut interrupt => return Ok(exit::OK),
            }
        }
    })
}

async fn print(args: &LogsArgs, tail: u32, shown: &mut Shown) -> Result<(), ClientError> {
    let mut client = args.connect.client().await?;
    let request = v1::StreamLogsRequest {
        run_id: args.run.clone(),
        worker_id: args.worker.clone(),
        tail,
        follow: args.follow,
    };
    let mut lines = client.stream_logs(request).await?;
    loop {
        let due = async {
            match shown.due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            line = lines.message() => match line? {
                Some(line) if args.output == Output::Json => put(&json(&line).to_string()),
                Some(line) if args.all => put(&text_of(&line)),
                Some(line) => shown.take(line),
                None => return Ok(()),
            },
            () = due => shown.flush(),
        }
    }
}

/// Prints a line; who reads no more is left.
fn put(line: &str) {
    if writeln!(std::io::stdout(), "{line}").is_err() {
        std::process::exit(exit::OK.into());
    }
}

/// Lines that are gathered, and until when.
struct Shown {
    gathered: Gathered,
    due: Option<Instant>,
}

impl Shown {
    fn take(&mut self, line: v1::StreamLogsResponse) {
        self.gathered.take(line).iter().for_each(|line| put(line));
        self.due = self.due.or_else(|| Some(Instant::now() + GATHER));
    }

    fn flush(&mut self) {
        self.due = None;
        self.gathered.flush().iter().for_each(|line| put(line));
    }
}

fn json(line: &v1::StreamLogsResponse) -> serde_json::Value {
    let v1::StreamLogsResponse { worker_id, text, at_ms, missed } = line;
    serde_json::json!({ "worker": worker_id, "text": text, "at_ms": at_ms, "missed": missed })
}

fn text_of(line: &v1::StreamLogsResponse) -> String {
    let v1::StreamLogsResponse { worker_id, text, missed, .. } = line;
    match missed {
        0 => format!("[{worker_id}] {text}"),
        n => format!("[{worker_id}] … {n} lines missed\n[{worker_id}] {text}"),
    }
}

/// Lines that wait for their like.
#[derive(Default)]
struct Gathered {
    waiting: VecDeque<(v1::StreamLogsResponse, Vec<String>)>,
}

impl Gathered {
    /// Takes a line; returns what need not wait any longer.
    fn take(&mut self, line: v1::StreamLogsResponse) -> Vec<String> {
        let of_worker = |(first, others): &(v1::StreamLogsResponse, Vec<String>)| {
            first.worker_id == line.worker_id || others.contains(&line.worker_id)
        };
        // Lines of one worker keep their order: only those behind its newest may be joined.
        let from = self.waiting.iter().rposition(of_worker).map_or(0, |at| at + 1);
        let like = |(first, _): &&mut (v1::StreamLogsResponse, Vec<String>)| {
            said(&first.text) == said(&line.text) && line.missed == 0
        };
        if let Some((_, others)) = self.waiting.iter_mut().skip(from).find(like) {
            others.push(line.worker_id);
            return Vec::new();
        }
        self.waiting.push_back((line, Vec::new()));
        let n_over = self.waiting.len().saturating_sub(WAITING_MAX);
        self.waiting.drain(..n_over).map(|(line, others)| joined(&line, &others)).collect()
    }

    fn flush(&mut self) -> Vec<String> {
        self.waiting.drain(..).map(|(line, others)| joined(&line, &others)).collect()
    }
}

/// Returns what a line says, without the time in front of it.
fn said(text: &str) -> &str {
    let is_time = |word: &str| {
        word.len() > 19 && word.starts_with(|c: char| c.is_ascii_digit()) && word.ends_with('Z')
    };
    match text.split_once(' ') {
        Some((first, rest)) if is_time(first) => rest.trim_start(),
        _ => text,
    }
}

fn joined(line: &v1::StreamLogsResponse, others: &[String]) -> String {
    let who = match others {
        [] => return text_of(line),
        [one] => format!("{}, {one}", line.worker_id),
        more => format!("{} and {} more", line.worker_id, more.len()),
    };
    match line.missed {
        0 => format!("[{who}] {}", line.text),
        n => format!("[{}] … {n} lines missed\n[{who}] {}", line.worker_id, line.text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(worker: &str, text: &str) -> v1::StreamLogsResponse {
        let (worker_id, text) = (worker.to_string(), text.to_string());
        v1::StreamLogsResponse { worker_id, text, ..Default::default() }
    }

    #[test]
    fn equal_lines_become_one_and_a_workers_lines_keep_their_order() {
        let mut gathered = Gathered::default();
        let mut take = |worker, text| assert!(gathered.take(line(worker, text)).is_empty());
        take("a:cpu0", "2026-11-29T06:00:00.000001Z  INFO engine ready");
        take("b:cpu0", "2026-11-29T06:00:00.000009Z  INFO engine ready");
        take("c:cpu0", "2026-11-29T06:00:00.000010Z  INFO engine ready");
        take("a:cpu0", "leaving");
        take("a:cpu0", "2026-11-29T06:00:02.000001Z  INFO engine ready");
        take("b:cpu0", "leaving");
        assert_eq!(
            gathered.flush(),
            [
                "[a:cpu0 and 2 more] 2026-11-29T06:00:00.000001Z  INFO engine ready",
                "[a:cpu0, b:cpu0] leaving",
                "[a:cpu0] 2026-11-29T06:00:02.000001Z  INFO engine ready",
            ]
        );
        assert!(gathered.flush().is_empty());
    }

    #[test]
    fn what_was_missed_is_said() {
        let mut missed = line("a:cpu0", "on");
        missed.missed = 7;
        assert_eq!(text_of(&missed), "[a:cpu0] … 7 lines missed\n[a:cpu0] on");
    }

    #[test]
    fn lines_do_not_wait_for_ever() {
        let mut gathered = Gathered::default();
        let out: Vec<String> = (0..WAITING_MAX + 5)
            .flat_map(|i| gathered.take(line("a:cpu0", &i.to_string())))
            .collect();
        assert_eq!(out.len(), 5);
        assert_eq!(out[0], "[a:cpu0] 0");
    }
}
