//! `lacuna logs`: what a run's workers log, with equal lines of many workers as one.

use std::collections::VecDeque;
use std::time::Duration;

use clap::Args;
use lacuna_api::v1;
use lacuna_types::exit;

use crate::client::Output;
use crate::connect::Connect;
use crate::runtime;

/// How long a line waits for its like from other workers.
const GATHER: Duration = Duration::from_millis(300);
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
        tokio::select! {
            printed = print(&args) => printed,
            _ = tokio::signal::ctrl_c() => Ok(exit::OK),
        }
    })
}

async fn print(args: &LogsArgs) -> anyhow::Result<u8> {
    let mut client = args.connect.client().await?;
    let request = v1::StreamLogsRequest {
        run_id: args.run.clone(),
        worker_id: args.worker.clone(),
        tail: args.tail,
        follow: args.follow,
    };
    let mut lines = client.stream_logs(request).await?;
    let mut gathered = Gathered::default();
    loop {
        let next = if gathered.is_empty() {
            Ok(lines.message().await)
        } else {
            tokio::time::timeout(GATHER, lines.message()).await
        };
        match next {
            Ok(line) => match line? {
                Some(line) if args.output == Output::Json => println!("{}", json(&line)),
                Some(line) if args.all => println!("{}", text_of(&line)),
                Some(line) => gathered.take(line).iter().for_each(|line| println!("{line}")),
                None => break,
            },
            Err(_) => gathered.flush().iter().for_each(|line| println!("{line}")),
        }
    }
    gathered.flush().iter().for_each(|line| println!("{line}"));
    Ok(exit::OK)
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
    fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

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
    match others {
        [] => text_of(line),
        [one] => format!("[{}, {one}] {}", line.worker_id, line.text),
        more => format!("[{} and {} more] {}", line.worker_id, more.len(), line.text),
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
        assert!(gathered.is_empty());
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
