//! How the tools on files speak: results, progress, errors with their exit codes.

use std::error::Error;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use lacuna_data::Progress;
use lacuna_types::exit;

use crate::Coded;
use crate::verbosity::talk;
use lacuna_spec::units::grouped;
pub(crate) use lacuna_spec::units::size;

/// Time between two lines of progress where there is no terminal: a log stays readable.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Makes the error of bad arguments or a bad spec.
pub(crate) fn usage(message: impl Into<String>) -> anyhow::Error {
    Coded::error(exit::USAGE, message)
}

/// Makes the error of data or checkpoints that could not be read or written.
pub(crate) fn io(error: &dyn Error) -> anyhow::Error {
    Coded::error(exit::IO, lacuna_checkpoint::chain(error))
}

/// Writes a result to stdout; a reader that has gone away is no error.
pub(crate) fn put(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Writes a JSON document to stdout.
pub(crate) fn put_json(value: &serde_json::Value) -> anyhow::Result<()> {
    put(&format!("{value:#}\n"))
}

/// Lays names and values out in two columns.
pub(crate) fn rows(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let line = |(name, value): &(&str, String)| format!("{name:<width$}  {value}\n");
    rows.iter().map(line).collect()
}

/// Formats a number of things: `1 shard`, `1,000 shards`.
pub(crate) fn count(n: u64, noun: &str) -> String {
    let plural = if n == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", grouped(n))
}

/// Shows on stderr how far a long operation is: a bar on a terminal, else a line now and then.
pub(crate) struct Meter {
    what: &'static str,
    /// `None` where stderr is no terminal.
    bar: Option<ProgressBar>,
    told: Instant,
}

impl Meter {
    /// Starts to show the progress of `what` ("packed").
    pub(crate) fn new(what: &'static str) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{msg} {bar:30} {human_pos}/{human_len}");
            let bar = ProgressBar::new(0).with_message(what);
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Meter { what, bar, told: Instant::now() }
    }

    /// Shows that `progress.done` of `progress.total` are done.
    pub(crate) fn update(&mut self, progress: Progress) {
        let Progress { done, total } = progress;
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        } else if self.told.elapsed() >= LINE_EVERY {
            self.told = Instant::now();
            talk!("{} {} of {}", self.what, grouped(done), grouped(total));
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_for_people() {
        assert_eq!([1, 2000].map(|n| count(n, "shard")), ["1 shard", "2,000 shards"]);
        assert_eq!(rows(&[("a", "1".into()), ("bcd", "2".into())]), "a    1\nbcd  2\n");
    }
}
