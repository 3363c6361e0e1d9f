//! What the screen says: kept apart from the terminal, so that it can be looked at in tests.

use std::collections::VecDeque;

use lacuna_api::v1;
use lacuna_api::v1::watch_run_response::Update;
use lacuna_spec::units::grouped;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, Gauge, GraphType, Paragraph, Row, Table};

use crate::progress::eta;

/// Points of the curve at most; where there are more, every other one goes.
const POINTS_MAX: usize = 2000;
/// Events that are kept: more than any screen shows.
const EVENTS_MAX: usize = 200;
/// Lines above the curve.
const HEAD_LINES: u16 = 4;
/// Columns from which on the curve gets more room than the workers.
const WIDE: u16 = 120;
/// What the last line says.
const HELP: &str = " q leaves; the run goes on ";

/// What is known of a run.
#[derive(Debug, Default)]
pub(super) struct Dashboard {
    run: v1::Run,
    figures: Option<v1::Figures>,
    loss: Vec<(f64, f64)>,
    events: VecDeque<v1::RunEvent>,
}

impl Dashboard {
    /// Takes an update.
    pub fn take(&mut self, response: v1::WatchRunResponse) {
        match response.update {
            Some(Update::Snapshot(run)) => {
                if run.figures.is_some() {
                    self.figures = run.figures;
                }
                self.run = run;
            }
            Some(Update::Figures(figures)) => self.take_figures(figures),
            Some(Update::Event(event)) => {
                if self.events.len() == EVENTS_MAX {
                    self.events.pop_front();
                }
                self.events.push_back(event);
            }
            Some(Update::Picture(_)) | None => {}
        }
    }

    fn take_figures(&mut self, figures: v1::Figures) {
        let step = figures.step as f64;
        // Where a run went back, what it computes again counts.
        let known = self.loss.partition_point(|(at, _)| *at < step);
        self.loss.truncate(known);
        if figures.loss.is_finite() {
            self.loss.push((step, figures.loss));
        }
        if self.loss.len() > POINTS_MAX {
            let last = self.loss.len() - 1;
            let mut i = 0;
            self.loss.retain(|_| {
                i += 1;
                (i - 1) % 2 == 0 || i - 1 == last
            });
        }
        self.figures = Some(figures);
    }

    /// Draws everything.
    pub fn draw(&self, frame: &mut Frame<'_>) {
        let area = frame.area();
        let events = (area.height / 3).clamp(3, 12);
        let [head, middle, below, help] = Layout::vertical([
            Constraint::Length(HEAD_LINES),
            Constraint::Min(3),
            Constraint::Length(events),
            Constraint::Length(1),
        ])
        .areas(area);
        self.draw_head(frame, head);
        // Names of workers are long: they get half of a narrow screen.
        let share = if area.width < WIDE { 1 } else { 2 };
        let [curve, workers] =
            Layout::horizontal([Constraint::Fill(share), Constraint::Fill(1)]).areas(middle);
        self.draw_curve(frame, curve);
        self.draw_workers(frame, workers);
        self.draw_events(frame, below);
        frame.render_widget(Paragraph::new(HELP).style(Modifier::DIM), help);
    }

    fn draw_head(&self, frame: &mut Frame<'_>, area: Rect) {
        let [title, bar, first, second] = Layout::vertical([Constraint::Length(1); 4]).areas(area);
        let run = &self.run;
        let mut words = vec![
            Span::from(format!(" {} ", run.run_id)).style(Modifier::BOLD),
            Span::from(run.state.clone()).style(tone(&run.state)),
        ];
        if !run.why.is_empty() {
            words.push(Span::from(format!("  {}", run.why)));
        }
        frame.render_widget(Line::from(words), title);
        let step = self.figures.as_ref().map_or(run.step, |f| f.step.max(run.step));
        let total = run.total_steps.max(1);
        let share = (step as f64 / total as f64).clamp(0.0, 1.0);
        let label = format!("{} / {} steps", grouped(step), grouped(run.total_steps));
        let gauge = Gauge::default().ratio(share).label(label).gauge_style(Color::Blue);
        frame.render_widget(gauge, bar);
        frame.render_widget(self.facts(step), first);
        frame.render_widget(self.more_facts(), second);
    }

    fn facts(&self, step: u64) -> Line<'static> {
        let mut out = String::new();
        if self.run.steps_per_epoch > 0 {
            let epochs = |steps: u64| steps as f64 / self.run.steps_per_epoch as f64;
            let total = epochs(self.run.total_steps);
            let digits = if total < 10.0 { 2 } else { 0 };
            out += &format!(" epoch {:.2}/{total:.digits$} ", epochs(step));
        }
        if let Some(figures) = &self.figures {
            let v1::Figures { loss, lr, grad_norm, images_per_second, .. } = *figures;
            let speed = grouped(images_per_second as u64);
            out += &format!(" loss {loss:.4}  lr {lr:.1e}  gnorm {grad_norm:.2}  img/s {speed} ");
        }
        Line::from(out)
    }

    fn more_facts(&self) -> Line<'static> {
        let run = &self.run;
        let saved = run.checkpoint_step.map_or("none".to_string(), grouped);
        let mut out = format!(" generation {}  checkpoint {saved} ", run.generation);
        if let Some(figures) = &self.figures {
            out += &format!(" data wait {:.1}% ", 100.0 * figures.data_wait);
            if figures.skipped > 0 {
                out += &format!(" skipped {} ", figures.skipped);
            }
            if figures.redone > 0 {
                out += &format!(" redone {} ", figures.redone);
            }
            if run.exit_code.is_none()
                && let Some(left) = eta(run, figures)
            {
                out += &format!(" to go {left} ");
            }
        }
        Line::from(out)
    }

    fn draw_curve(&self, frame: &mut Frame<'_>, area: Rect) {
        let block = Block::bordered().title(" loss ");
        let (Some(first), Some(last)) = (self.loss.first(), self.loss.last()) else {
            let text = Paragraph::new(" no step has been reported yet").block(block);
            return frame.render_widget(text, area);
        };
        let values = || self.loss.iter().map(|point| point.1);
        let (low, high) = (values().fold(f64::MAX, f64::min), values().fold(f64::MIN, f64::max));
        let (low, high) = if low < high { (low, high) } else { (low - 0.5, high + 0.5) };
        let data = Dataset::default()
            .marker(Marker::Braille)
            .graph_type(GraphType::Line)
            .style(Color::Cyan)
            .data(&self.loss);
        let steps = [grouped(first.0 as u64), grouped(last.0 as u64)];
        let losses = [format!("{low:.3}"), format!("{high:.3}")];
        let chart = Chart::new(vec![data])
            .block(block)
            .x_axis(Axis::default().bounds([first.0, last.0.max(first.0 + 1.0)]).labels(steps))
            .y_axis(Axis::default().bounds([low, high]).labels(losses));
        frame.render_widget(chart, area);
    }

    fn draw_workers(&self, frame: &mut Frame<'_>, area: Rect) {
        let members = self.run.workers.iter().filter(|worker| worker.rank.is_some()).count();
        let row = |worker: &v1::RunWorker| {
            let rank = worker.rank.map_or("–".to_string(), |rank| rank.to_string());
            let state = Span::from(worker.state.clone()).style(tone(&worker.state));
            let cells = [Span::from(rank), Span::from(worker.worker_id.clone()), state];
            Row::new(cells.into_iter().chain([Span::from(worker.phase.clone())]))
        };
        let widths = [
            Constraint::Length(4),
            Constraint::Fill(2),
            Constraint::Length(9),
            Constraint::Length(8),
        ];
        let title = format!(" {members} worker{} ", if members == 1 { "" } else { "s" });
        let table = Table::new(self.run.workers.iter().map(row), widths)
            .header(Row::new(["rank", "worker", "state", "phase"]).style(Modifier::DIM))
            .block(Block::bordered().title(title));
        frame.render_widget(table, area);
    }

    fn draw_events(&self, frame: &mut Frame<'_>, area: Rect) {
        let lines = usize::from(area.height.saturating_sub(2));
        let skipped = self.events.len().saturating_sub(lines);
        let line = |event: &v1::RunEvent| {
            let style = if event.warning { Style::new().fg(Color::Yellow) } else { Style::new() };
            Line::from(vec![
                Span::from(format!(" {} ", clock(event.at_ms))).style(Modifier::DIM),
                Span::from(event.text.clone()).style(style),
            ])
        };
        let text: Vec<Line<'_>> = self.events.iter().skip(skipped).map(line).collect();
        let block = Block::bordered().title(" events ");
        frame.render_widget(Paragraph::new(text).block(block), area);
    }
}

fn tone(state: &str) -> Style {
    Style::new().fg(match state {
        "running" | "finished" | "training" | "member" => Color::Green,
        "failed" | "unfit" | "lost" => Color::Red,
        "recovering" | "forming" | "syncing" | "held" | "disputed" => Color::Yellow,
        _ => return Style::new(),
    })
}

/// Writes the time of day, UTC.
fn clock(at_ms: u64) -> String {
    let seconds = at_ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}Z", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    fn figures(step: u64, loss: f64) -> v1::WatchRunResponse {
        let figures = v1::Figures {
            step,
            loss,
            lr: 2.4e-4,
            grad_norm: 0.41,
            images_per_second: 24_310.2,
            data_wait: 0.012,
            ..Default::default()
        };
        v1::WatchRunResponse { update: Some(Update::Figures(figures)), seq: step }
    }

    fn worker(name: &str, rank: Option<u32>, state: &str) -> v1::RunWorker {
        v1::RunWorker {
            worker_id: name.into(),
            rank,
            state: state.into(),
            phase: "compute".into(),
            ..Default::default()
        }
    }

    fn dashboard() -> Dashboard {
        let mut dashboard = Dashboard::default();
        let run = v1::Run {
            run_id: "mae-vitb".into(),
            state: "running".into(),
            step: 1240,
            total_steps: 249_600,
            steps_per_epoch: 312,
            generation: 8,
            checkpoint_step: Some(1200),
            spec: r#"{"train":{"batch":4096}}"#.into(),
            workers: vec![worker("gpu-05:0", Some(0), "member"), worker("gpu-06:0", None, "spare")],
            ..Default::default()
        };
        let update = Some(Update::Snapshot(run));
        dashboard.take(v1::WatchRunResponse { update, seq: 0 });
        for step in 1..=60 {
            dashboard.take(figures(step * 20, 0.6 + 1.0 / step as f64));
        }
        let event = v1::RunEvent {
            kind: "lost".into(),
            warning: true,
            text: "worker gpu-07:0 lost at step 1,200 (no beat for 3.0 s)".into(),
            at_ms: 41_025_000,
        };
        dashboard.take(v1::WatchRunResponse { update: Some(Update::Event(event)), seq: 61 });
        dashboard
    }

    fn screen(dashboard: &Dashboard, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("in memory");
        terminal.draw(|frame| dashboard.draw(frame)).expect("in memory");
        terminal.backend().to_string().replace('"', "")
    }

    #[test]
    fn a_screen_of_a_run() {
        expect![[r#"
             mae-vitb running                                                               
                                         1,240 / 249,600 steps                              
             epoch 3.97/800  loss 0.6167  lr 2.4e-4  gnorm 0.41  img/s 24,310               
             generation 8  checkpoint 1,200  data wait 1.2%  to go 11h37m                   
            ┌ loss ────────────────────────────────┐┌ 1 worker ────────────────────────────┐
            │1.600│⡇                               ││rank worker         state     phase   │
            │     │⡇                               ││0    gpu-05:0       member    compute │
            │     │⢸                               ││–    gpu-06:0       spare     compute │
            │     │⢸                               ││                                      │
            │     │⠈⡆                              ││                                      │
            │     │ ⠘⢄                             ││                                      │
            │0.617│   ⠉⠉⠒⠒⠢⠤⠤⠤⠤⠤⠤⠤⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀││                                      │
            │     └────────────────────────────────││                                      │
            │    20                           1,200││                                      │
            └──────────────────────────────────────┘└──────────────────────────────────────┘
            ┌ events ──────────────────────────────────────────────────────────────────────┐
            │ 11:23:45Z worker gpu-07:0 lost at step 1,200 (no beat for 3.0 s)             │
            │                                                                              │
            │                                                                              │
            │                                                                              │
            │                                                                              │
            │                                                                              │
            └──────────────────────────────────────────────────────────────────────────────┘
             q leaves; the run goes on                                                      
        "#]]
        .assert_eq(&screen(&dashboard(), 80, 24));
    }

    #[test]
    fn any_terminal_is_large_enough_not_to_panic() {
        for (width, height) in [(1, 1), (3, 2), (20, 5), (300, 100)] {
            screen(&dashboard(), width, height);
            screen(&Dashboard::default(), width, height);
        }
    }

    #[test]
    fn a_run_that_went_back_has_each_step_once_and_points_are_bounded() {
        let mut dashboard = Dashboard::default();
        (1..=10).for_each(|step| dashboard.take(figures(step, 1.0)));
        dashboard.take(figures(6, 0.5));
        assert_eq!(dashboard.loss.len(), 6);
        assert_eq!(dashboard.loss.last(), Some(&(6.0, 0.5)));
        (7..100_000).for_each(|step| dashboard.take(figures(step, 1.0)));
        assert!(dashboard.loss.len() <= POINTS_MAX);
        assert_eq!(dashboard.loss.last(), Some(&(99_999.0, 1.0)));
        dashboard.take(figures(100_000, f64::NAN));
        assert_eq!(dashboard.loss.last(), Some(&(99_999.0, 1.0)), "no point for what is none");
    }
}
