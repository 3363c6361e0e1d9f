//! A plot of progress over time as SVG: one line a cell, and the undisturbed one.

use std::time::Duration;

use super::goodput::Cell;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
/// Left, top, right, bottom.
const MARGIN: (f64, f64, f64, f64) = (64.0, 24.0, 200.0, 44.0);
/// Colour-blind safe (Okabe and Ito).
const COLORS: [&str; 6] = ["#0072b2", "#d55e00", "#56b4e9", "#e69f00", "#009e73", "#cc79a7"];
/// Points of a line: more cannot be told apart at this width.
const POINTS_MAX: usize = 700;
/// Lines of the grid in each direction.
const TICKS: u32 = 5;

/// Draws useful steps over time for every cell; `step` is the undisturbed step's time.
pub fn progress(cells: &[Cell], step: Duration) -> String {
    let seconds = cells.iter().map(|cell| cell.time.as_secs_f64()).fold(1.0, f64::max);
    let steps = seconds / step.as_secs_f64();
    let scale = Scale { seconds, steps };
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>\n"
    );
    out += &scale.grid();
    out += &scale.line(&[(0.0, 0.0), (seconds, steps)], "#777777", "5 4");
    out += &scale.label(0, "#777777", "undisturbed");
    for (i, cell) in cells.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        let every = cell.curve.len().div_ceil(POINTS_MAX).max(1);
        let mut points: Vec<(f64, f64)> = vec![(0.0, 0.0)];
        let mut before = 0;
        for (k, &(ms, _, step)) in cell.curve.iter().enumerate() {
            // A step back is what a restart costs: never left out.
            if k % every == 0 || step < before {
                points.push((ms / 1e3, step as f64));
            }
            before = step;
        }
        out += &scale.line(&points, color, "none");
        let text = format!(
            "{}, a kill each {} s: {:.0} %",
            cell.policy.word(),
            cell.mean.as_secs(),
            100.0 * cell.goodput
        );
        out += &scale.label(i + 1, color, &text);
    }
    out + "</svg>\n"
}

struct Scale {
    seconds: f64,
    steps: f64,
}

impl Scale {
    fn x(&self, seconds: f64) -> f64 {
        MARGIN.0 + seconds / self.seconds * (WIDTH - MARGIN.0 - MARGIN.2)
    }

    fn y(&self, steps: f64) -> f64 {
        HEIGHT - MARGIN.3 - steps / self.steps * (HEIGHT - MARGIN.1 - MARGIN.3)
    }

    fn grid(&self) -> String {
        let mut out = String::new();
        let (right, bottom) = (self.x(self.seconds), self.y(0.0));
        for i in 0..=TICKS {
            let share = f64::from(i) / f64::from(TICKS);
            let (seconds, steps) = (share * self.seconds, share * self.steps);
            let (x, y) = (self.x(seconds), self.y(steps));
            out += &format!(
                "<path d=\"M{x:.1} {:.1}V{bottom:.1}M{:.1} {y:.1}H{right:.1}\" stroke=\"#e3e3e3\"/>\
                 \n\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{seconds:.0}</text>\n\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{steps:.0}</text>\n",
                MARGIN.1,
                MARGIN.0,
                bottom + 16.0,
                MARGIN.0 - 6.0,
                y + 4.0
            );
        }
        let (x, y) = (self.x(self.seconds / 2.0), HEIGHT - 10.0);
        out += &format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">seconds</text>\n");
        out + "<text x=\"10\" y=\"16\">useful steps</text>\n"
    }

    fn line(&self, points: &[(f64, f64)], color: &str, dash: &str) -> String {
        let mut path = String::new();
        for (i, &(seconds, steps)) in points.iter().enumerate() {
            let word = if i == 0 { 'M' } else { 'L' };
            path += &format!("{word}{:.1} {:.1}", self.x(seconds), self.y(steps));
        }
        format!(
            "<path d=\"{path}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.6\" \
             stroke-dasharray=\"{dash}\"/>\n"
        )
    }

    fn label(&self, place: usize, color: &str, text: &str) -> String {
        let (x, y) = (WIDTH - MARGIN.2 + 8.0, MARGIN.1 + 16.0 * (place as f64 + 1.0));
        format!("<text x=\"{x:.1}\" y=\"{y:.1}\" fill=\"{color}\">{text}</text>\n")
    }
}
