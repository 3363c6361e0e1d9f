//! Charts as SVG, drawn here: no script and no library, and they print.

use std::fmt::Write as _;

/// Width of a chart in its own units.
const WIDTH: f64 = 460.0;
/// Height of a chart in its own units.
const HEIGHT: f64 = 160.0;
/// Room for labels: left, and below.
const LABELS: (f64, f64) = (54.0, 18.0);
/// Height of the bar of shares.
const BAR: f64 = 14.0;

/// A curve: its points, by growing x.
pub(super) struct Curve<'a> {
    pub title: &'a str,
    pub points: Vec<(f64, f64)>,
    /// How a value is written.
    pub show: fn(f64) -> String,
}

/// Draws a curve with its least and largest values; `None` for less than one finite point.
pub(super) fn curve(curve: &Curve<'_>) -> Option<String> {
    let finite = |p: &&(f64, f64)| p.0.is_finite() && p.1.is_finite();
    let points: Vec<(f64, f64)> = curve.points.iter().filter(finite).copied().collect();
    let (first, last) = (points.first()?, points.last()?);
    let low = points.iter().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let high = points.iter().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
    let (x_span, y_span) = ((last.0 - first.0).max(1e-9), (high - low).max(high.abs() * 1e-6));
    let (left, below) = LABELS;
    let (width, height) = (WIDTH - left - 6.0, HEIGHT - below - 8.0);
    let x = |value: f64| left + width * (value - first.0) / x_span;
    let y =
        |value: f64| 8.0 + height * (1.0 - if y_span > 0.0 { (value - low) / y_span } else { 0.5 });
    let mut path = String::new();
    for (i, point) in points.iter().enumerate() {
        let command = if i == 0 { 'M' } else { 'L' };
        put(&mut path, format_args!("{command}{:.1} {:.1}", x(point.0), y(point.1)));
    }
    if points.len() == 1 {
        put(&mut path, format_args!("h1"));
    }
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{} from {} to {}\">",
        curve.title,
        (curve.show)(first.1),
        (curve.show)(last.1)
    );
    for value in [low, high] {
        let at = y(value);
        put(
            &mut svg,
            format_args!(
                "<line class=\"grid\" x1=\"{left}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                left + width,
                left - 6.0,
                at + 4.0,
                (curve.show)(value)
            ),
        );
        if y_span <= 0.0 {
            break;
        }
    }
    let base = HEIGHT - 4.0;
    put(
        &mut svg,
        format_args!(
            "<text x=\"{left}\" y=\"{base}\">step {}</text>\
             <text x=\"{:.1}\" y=\"{base}\" text-anchor=\"end\">{}</text>\
             <path class=\"curve\" d=\"{path}\"/></svg>",
            first.0,
            left + width,
            last.0
        ),
    );
    Some(svg)
}

/// Draws shares of a whole as one bar; each is a class and an amount.
pub(super) fn bar(parts: &[(&str, f64)]) -> String {
    let total: f64 = parts.iter().map(|part| part.1).sum();
    let mut svg = format!(
        "<svg viewBox=\"0 0 1000 {BAR}\" preserveAspectRatio=\"none\" width=\"100%\" \
         height=\"{BAR}\" aria-hidden=\"true\">"
    );
    let mut at = 0.0;
    for (class, amount) in parts.iter().filter(|part| part.1 > 0.0 && total > 0.0) {
        let width = 1000.0 * amount / total;
        put(
            &mut svg,
            format_args!(
                "<rect class=\"{class}\" x=\"{at:.2}\" y=\"0\" width=\"{width:.2}\" \
                 height=\"{BAR}\"/>"
            ),
        );
        at += width;
    }
    svg.push_str("</svg>");
    svg
}

fn put(text: &mut String, args: std::fmt::Arguments<'_>) {
    text.write_fmt(args).expect("a string takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(points: &[(f64, f64)]) -> Option<String> {
        curve(&Curve { title: "loss", points: points.to_vec(), show: |v| format!("{v:.2}") })
    }

    #[test]
    fn curves_have_their_extremes_and_nothing_that_is_not_a_number() {
        let svg = drawn(&[(1.0, 2.0), (2.0, f64::NAN), (3.0, 1.0)]).unwrap();
        assert!(svg.contains(">2.00</text>") && svg.contains(">1.00</text>"), "{svg}");
        assert!(svg.contains("M54.0 8.0L454.0 142.0"), "{svg}");
        for points in [&[(5.0, 0.0)][..], &[(5.0, 0.0), (6.0, 0.0)], &[(1.0, 7.0), (1.0, 7.0)]] {
            let svg = drawn(points).unwrap();
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
        assert_eq!(drawn(&[]), None);
        assert_eq!(drawn(&[(1.0, f64::INFINITY)]), None);
    }

    #[test]
    fn shares_fill_the_bar() {
        let svg = bar(&[("productive", 3.0), ("reform", 0.0), ("paused", 1.0)]);
        assert!(svg.contains("class=\"productive\" x=\"0.00\" y=\"0\" width=\"750.00\""), "{svg}");
        assert!(svg.contains("class=\"paused\" x=\"750.00\" y=\"0\" width=\"250.00\""), "{svg}");
        assert!(!svg.contains("reform"));
        assert!(!bar(&[("paused", 0.0)]).contains("rect"));
    }
}
