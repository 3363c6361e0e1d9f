//! What a person sees of a run: a bar on a terminal, plain lines elsewhere.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use lacuna_api::v1;
use lacuna_api::v1::watch_run_response::Update;
use lacuna_spec::units::grouped;

use crate::screen::Screen;
use crate::verbosity::{is_quiet, talk};

/// Lines of what happened before that are shown to who begins to look.
const LINES_BEFORE: u64 = 40;

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ProgressMode {
    /// A bar on a terminal (`lacuna watch`: a screen), lines elsewhere.
    Auto,
    /// A screen with curve, workers and events; `q` leaves it.
    Screen,
    /// A bar.
    Bar,
    /// A line per report.
    Line,
    /// A JSON object per update, on stdout.
    Json,
    /// Nothing.
    Off,
}

/// Shows updates of one run.
pub struct Progress {
    mode: ProgressMode,
    bar: Option<ProgressBar>,
    screen: Option<Screen>,
    run: v1::Run,
    /// Whether nothing is shown of what happened before.
    is_from_now: bool,
}

impl Progress {
    /// Prepares to show a run that somebody wants to look at, and nothing else.
    pub fn to_watch(mode: ProgressMode) -> Self {
        let terminal = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        Progress::new(match mode {
            ProgressMode::Auto if terminal => ProgressMode::Screen,
            other => other,
        })
    }

    /// Shows nothing of what happened before.
    #[must_use]
    pub fn without_past(self) -> Self {
        Progress { is_from_now: true, ..self }
    }

    /// Prepares to show a run.
    pub fn new(mode: ProgressMode) -> Self {
        let mut mode = match mode {
            ProgressMode::Auto if is_quiet() => ProgressMode::Off,
            ProgressMode::Auto if std::io::stderr().is_terminal() => ProgressMode::Bar,
            ProgressMode::Auto => ProgressMode::Line,
            other => other,
        };
        let mut screen = None;
        if mode == ProgressMode::Screen {
            match Screen::open() {
                Ok(opened) => screen = Some(opened),
                Err(err) => {
                    talk!("no screen here ({err}); lines instead");
                    mode = ProgressMode::Line;
                }
            }
        }
        let bar = (mode == ProgressMode::Bar).then(|| {
            let style = ProgressStyle::with_template("{bar:24} {msg}");
            let bar = ProgressBar::new(1);
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Progress { mode, bar, screen, run: v1::Run::default(), is_from_now: false }
    }

    /// Returns how many of the updates before now are worth showing.
    pub fn past(&self) -> u64 {
        match self.mode {
            _ if self.is_from_now => 0,
            ProgressMode::Off => 0,
            ProgressMode::Line | ProgressMode::Bar | ProgressMode::Auto => LINES_BEFORE,
            _ => u64::MAX,
        }
    }

    /// Returns the newest snapshot.
    pub fn run(&self) -> &v1::Run {
        &self.run
    }

    /// Shows one update.
    pub fn show(&mut self, response: v1::WatchRunResponse) {
        if self.mode == ProgressMode::Json
            && let Some(line) = json_line(&response)
        {
            // A reader that went away must not end the run.
            let _ = writeln!(std::io::stdout(), "{line}");
        }
        if let Some(screen) = &self.screen {
            screen.show(response.clone());
        }
        match response.update {
            Some(Update::Snapshot(run)) => self.run = run,
            Some(Update::Figures(figures)) => self.figures(&figures),
            Some(Update::Event(event)) => self.line(&event_line(&event)),
            Some(Update::Picture(_)) | None => {}
        }
    }

    fn figures(&mut self, figures: &v1::Figures) {
        let text = figures_line(&self.run, figures);
        match &self.bar {
            Some(bar) => {
                bar.set_length(self.run.total_steps.max(1));
                bar.set_position(figures.step);
                bar.set_message(text);
            }
            None => self.line(&text),
        }
    }

    /// Prints a line of talk.
    pub fn line(&self, text: &str) {
        match (&self.bar, self.mode) {
            (Some(bar), _) => bar.println(text),
            (None, ProgressMode::Line) => talk!("{text}"),
            _ => {}
        }
    }

    /// Returns what completes when somebody leaves the screen; without one, never.
    pub fn left(&self) -> impl Future<Output = ()> + use<> {
        let quit = self.screen.as_ref().map(Screen::quit);
        async {
            match quit {
                // Fails when the screen is gone, which is the same.
                Some(mut quit) => drop(quit.wait_for(|quit| *quit).await),
                None => std::future::pending().await,
            }
        }
    }

    /// Takes bar or screen away.
    pub fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.screen = None;
    }
}

fn event_line(event: &v1::RunEvent) -> String {
    let mark = if event.warning { "! " } else { "  " };
    format!("{mark}{}", event.text)
}

/// Formats a step's figures: the console line.
pub fn figures_line(run: &v1::Run, figures: &v1::Figures) -> String {
    let v1::Figures { step, loss, lr, grad_norm, images_per_second, data_wait, .. } = *figures;
    let mut text = format!("step {}/{}", grouped(step), grouped(run.total_steps));
    if run.steps_per_epoch > 0 {
        let epochs = |steps: u64| steps as f64 / run.steps_per_epoch as f64;
        let total = epochs(run.total_steps);
        let digits = if total < 10.0 { 2 } else { 0 };
        write_all(&mut text, format_args!(" ep {:.2}/{total:.digits$}", epochs(step)));
    }
    write_all(
        &mut text,
        format_args!(
            " loss {loss:.4} lr {lr:.1e} gnorm {grad_norm:.2} img/s {} data {:.1}%",
            grouped(images_per_second as u64),
            100.0 * data_wait
        ),
    );
    if figures.memory_bytes > 0 {
        write_all(&mut text, format_args!(" mem {}", short_bytes(figures.memory_bytes)));
    }
    if let Some(mfu) = figures.mfu {
        write_all(&mut text, format_args!(" mfu {:.0}%", 100.0 * mfu));
    }
    if let Some(left) = eta(run, figures) {
        write_all(&mut text, format_args!(" eta {left}"));
    }
    if figures.skipped > 0 {
        write_all(&mut text, format_args!(" skipped {}", figures.skipped));
    }
    if figures.redone > 0 {
        write_all(&mut text, format_args!(" redone {}", figures.redone));
    }
    text
}

fn write_all(text: &mut String, args: std::fmt::Arguments<'_>) {
    std::fmt::Write::write_fmt(text, args).expect("a string takes everything");
}

/// Tells how long a run has to go at its newest rate.
pub(crate) fn eta(run: &v1::Run, figures: &v1::Figures) -> Option<String> {
    let spec: serde_json::Value = serde_json::from_str(&run.spec).ok()?;
    let batch = spec["train"]["batch"].as_f64()?;
    let left = run.total_steps.saturating_sub(figures.step) as f64 * batch;
    let seconds = left / figures.images_per_second;
    seconds.is_finite().then(|| short_duration(Duration::from_secs_f64(seconds.min(1e9))))
}

/// Writes a number of bytes as top does: `12.4G`, in units of 1024.
pub(crate) fn short_bytes(bytes: u64) -> String {
    match bytes as f64 / (1u64 << 20) as f64 {
        mib if mib < 999.5 => format!("{mib:.0}M"),
        mib => format!("{:.1}G", mib / 1024.0),
    }
}

/// Writes a span of time in two units at most.
pub(crate) fn short_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

fn json_line(response: &v1::WatchRunResponse) -> Option<String> {
    let value = match response.update.as_ref()? {
        Update::Snapshot(run) => run_json(run),
        Update::Figures(f) => serde_json::json!({
            "seq": response.seq, "step": f.step, "loss": f.loss, "lr": f.lr,
            "grad_norm": f.grad_norm, "images_per_second": f.images_per_second,
            "data_wait": f.data_wait, "generation": f.generation, "skipped": f.skipped,
            "redone": f.redone, "memory_bytes": f.memory_bytes, "mfu": f.mfu,
            "digest": f.digest.map(|d| format!("{d:016x}")),
        }),
        Update::Event(e) => serde_json::json!({
            "seq": response.seq, "event": e.kind, "warning": e.warning, "text": e.text,
            "at_ms": e.at_ms,
        }),
        Update::Picture(p) => serde_json::json!({
            "seq": response.seq, "picture": p.index, "step": p.step, "sample": p.sample,
            "at_ms": p.at_ms,
        }),
    };
    Some(value.to_string())
}

/// Lists what `lacuna plan` calls efficiency, for each number of workers that a run may have.
fn efficiency(run: &v1::Run) -> serde_json::Value {
    let Ok(spec) = serde_json::from_str::<lacuna_spec::RunSpec>(&run.spec) else {
        return serde_json::Value::Null;
    };
    let rows = lacuna_spec::plan::worker_rows(run.n_slots, spec.elastic.workers);
    let row = |row: lacuna_spec::WorkerRow| {
        let (workers, efficiency) = (row.n_workers, row.efficiency);
        serde_json::json!({ "workers": workers, "efficiency": efficiency })
    };
    rows.into_iter().map(row).collect()
}

/// Describes a run as JSON: what `-o json` prints.
pub fn run_json(run: &v1::Run) -> serde_json::Value {
    let workers: Vec<serde_json::Value> = run
        .workers
        .iter()
        .map(|w| {
            serde_json::json!({
                "worker": w.worker_id, "rank": w.rank, "slots": w.slots, "state": w.state,
                "step": w.step, "phase": w.phase, "device": w.device,
                "memory_bytes": w.memory_bytes,
            })
        })
        .collect();
    serde_json::json!({
        "run": run.run_id, "state": run.state, "why": run.why, "generation": run.generation,
        "step": run.step, "total_steps": run.total_steps, "checkpoint_step": run.checkpoint_step,
        "final_digest": run.final_digest.map(|d| format!("{d:016x}")),
        "exit_code": run.exit_code, "workers": workers, "efficiency": efficiency(run),
        "figures": run.figures.as_ref().map(|f| serde_json::json!({
            "step": f.step, "loss": f.loss, "lr": f.lr, "grad_norm": f.grad_norm,
            "images_per_second": f.images_per_second, "data_wait": f.data_wait,
            "memory_bytes": f.memory_bytes, "mfu": f.mfu,
        })),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_line() {
        let run = v1::Run {
            total_steps: 249_600,
            steps_per_epoch: 312,
            spec: r#"{"train":{"batch":4096}}"#.into(),
            ..Default::default()
        };
        let figures = v1::Figures {
            step: 1240,
            loss: 0.92134,
            lr: 2.4e-4,
            grad_norm: 0.41,
            images_per_second: 24_310.2,
            data_wait: 0.012,
            memory_bytes: 13_314_398_618,
            mfu: Some(0.384),
            ..Default::default()
        };
        assert_eq!(
            figures_line(&run, &figures),
            "step 1,240/249,600 ep 3.97/800 loss 0.9213 lr 2.4e-4 gnorm 0.41 img/s 24,310 \
             data 1.2% mem 12.4G mfu 38% eta 11h37m"
        );
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(["0", "999", "1,000", "1,234,567"], [0, 999, 1000, 1_234_567].map(grouped));
        assert_eq!(short_duration(Duration::from_secs(3725)), "1h02m");
        assert_eq!(short_duration(Duration::from_secs(65)), "1m05s");
        assert_eq!([0, 700 << 20, 1 << 30].map(short_bytes), ["0M", "700M", "1.0G"]);
    }
}
