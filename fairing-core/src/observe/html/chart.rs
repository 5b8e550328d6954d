//! One chart as SVG. poloto draws lines and axes; what it looks like is the page's style sheet's.

use poloto::build::{PlotIterator, plot};
use poloto::ticks::from_iter;

use super::series::Point;
use crate::observe::words;

/// How large a chart is drawn. An SVG scales its letters with it, so that one size does not do for all widths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    /// For a column of the page and for a telephone: with the labels 480 units wide.
    Column,
    /// For the whole width of the page: 1000 units.
    Page,
}

impl Size {
    /// Width and height of the plotted area.
    fn area(self) -> (f64, f64) {
        match self {
            Size::Column => (386.0, 190.0),
            Size::Page => (906.0, 250.0),
        }
    }

    /// Points that a trend should have.
    pub(super) fn stretches(self) -> usize {
        match self {
            Size::Column => 90,
            Size::Page => 180,
        }
    }

    fn class(self) -> &'static str {
        match self {
            Size::Column => "column",
            Size::Page => "page",
        }
    }
}

/// What poloto leaves free left and right, and above and below. It cannot be changed, so the view is cut out.
const PADDING: (f64, f64) = (150.0, 100.0);

/// Room for labels in the view.
const LEFT: f64 = 78.0;
const RIGHT: f64 = 16.0;
const ABOVE: f64 = 10.0;
const BELOW: f64 = 40.0;

/// Positive values of which the greatest is this many times the least are drawn by their logarithms.
const LOGARITHMIC: f64 = 1e3;

/// A line in a chart.
pub(super) struct Line {
    /// Classes of the style sheet.
    pub(super) class: String,
    pub(super) points: Vec<Point>,
}

/// What a chart shows.
pub(super) struct Chart {
    /// Drawn in this order, the last on top.
    pub(super) lines: Vec<Line>,
    /// Where an epoch begins.
    pub(super) epochs: Vec<f64>,
}

/// A drawn chart.
pub(super) struct Drawn {
    pub(super) svg: String,
    pub(super) logarithmic: bool,
}

impl Chart {
    /// Draws it, unless there are not two points in it to connect. `label`, already escaped, is what is read out.
    pub(super) fn draw(mut self, size: Size, label: &str) -> Option<Drawn> {
        let area = size.area();
        let logarithmic = {
            let (least, greatest) = bounds(self.values())?;
            least > 0.0 && greatest / least >= LOGARITHMIC
        };
        if logarithmic {
            self.lines.iter_mut().flat_map(|line| &mut line.points).for_each(|point| point.1 = point.1.log10());
        }
        let (first, last) = bounds(self.lines.iter().flat_map(|line| &line.points).map(|point| point.0))?;
        if first == last {
            return None;
        }
        let (least, greatest) = bounds(self.values())?;
        let (least, greatest) = apart(least, greatest);
        let x_step = step(last - first).max(1.0);
        let y_step = if logarithmic { step(greatest - least).max(1.0) } else { step(greatest - least) };
        // Whole steps, so that the top and the bottom line have labels.
        let (bottom, top) = ((least / y_step).floor() * y_step, (greatest / y_step).ceil() * y_step);
        let x_ticks = ticks(first, last, x_step);
        let y_ticks = ticks(bottom, top, y_step);

        let (width, height) = (area.0 + 2.0 * PADDING.0, area.1 + 2.0 * PADDING.1);
        let frame = poloto::frame()
            .with_viewbox([width, height])
            .with_tick_lines([false, true])
            .with_precision(1)
            .num_css_class(None)
            .build();
        let classes: Vec<String> = self.lines.iter().map(|line| line.class.clone()).collect();
        let lines: Vec<_> = self.lines.into_iter().map(|line| plot("").line(line.points)).collect();
        let range = poloto::build::markers([first, last], [bottom, top]);
        let drawn = frame
            .data(lines.chain(range))
            .map_xticks(|_| from_iter(x_ticks).with_tick_fmt(|x| round(*x)))
            .map_yticks(|_| {
                from_iter(y_ticks).with_tick_fmt(move |y| if logarithmic { power(*y) } else { value(*y, y_step) })
            })
            .build_and_label(("", "", ""))
            .headless()
            .render_string()
            .expect("a string can be written");

        let (x, y) = (PADDING.0 - LEFT, PADDING.1 - ABOVE);
        let (view_width, view_height) = (LEFT + area.0 + RIGHT, ABOVE + area.1 + BELOW);
        let class = size.class();
        let mut svg = format!(
            "<svg class=\"{class}\" role=\"img\" aria-label=\"{label}\" viewBox=\"{x} {y} {view_width} {view_height}\">\n"
        );
        for epoch in self.epochs.iter().filter(|epoch| **epoch > first && **epoch < last) {
            let x = PADDING.0 + (epoch - first) / (last - first) * area.0;
            let (top, bottom) = (PADDING.1, PADDING.1 + area.1);
            svg += &format!("<path class=\"epoch-begin\" d=\"M{x:.2} {top}V{bottom}\"/>\n");
        }
        svg += &restyle(&drawn, &classes);
        svg += "</svg>\n";
        Some(Drawn { svg, logarithmic })
    }

    fn values(&self) -> impl Iterator<Item = f64> {
        self.lines.iter().flat_map(|line| &line.points).map(|point| point.1)
    }
}

/// Puts the axes below the lines, gives lines their classes instead of numbers, and takes away what cannot be in a page twice or is not wanted.
fn restyle(drawn: &str, classes: &[String]) -> String {
    let mut svg = String::with_capacity(drawn.len());
    let title = drawn.find("<text class=\"poloto_text poloto_name").unwrap_or(0);
    let (plots, axes) = drawn.split_at(title);
    for line in axes
        .lines()
        .chain(plots.lines())
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.contains("poloto_background"))
    {
        svg += line;
        svg.push('\n');
    }
    for (number, class) in classes.iter().enumerate().rev() {
        svg = svg.replace(&format!("id=\"poloto_plot{number}\""), "");
        let generated = format!("poloto_plot poloto_imgs poloto_line poloto{number} poloto_stroke");
        svg = svg.replace(&generated, &format!("line {class}"));
    }
    svg.replace(" stroke=\"black\"", "").replace(" fill=\"none\"", "")
}

/// The least and the greatest number; `None` if there is none.
fn bounds(numbers: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let numbers = numbers.filter(|number| !number.is_nan());
    numbers.fold(None, |bounds, number| match bounds {
        None => Some((number, number)),
        Some((least, greatest)) => Some((number.min(least), number.max(greatest))),
    })
}

/// A range that has some extent, also for a value that never changes.
fn apart(least: f64, greatest: f64) -> (f64, f64) {
    let smallest = (1e-9 * least.abs().max(greatest.abs())).max(1e-30);
    if greatest - least > smallest {
        return (least, greatest);
    }
    let margin = if least == 0.0 { 1.0 } else { 0.5 * least.abs() };
    (least - margin, greatest + margin)
}

/// The distance of labels: 1, 2 or 5 times a power of ten, for about four of them.
fn step(extent: f64) -> f64 {
    let raw = extent / 4.0;
    let power = 10_f64.powf(raw.log10().floor());
    let digit = raw / power;
    power
        * if digit < 1.5 {
            1.0
        } else if digit < 3.5 {
            2.0
        } else if digit < 7.5 {
            5.0
        } else {
            10.0
        }
}

/// Multiples of `step` from `from` to `to`, or the two ends where there are not two of them: poloto needs two.
fn ticks(from: f64, to: f64, step: f64) -> Vec<f64> {
    let (begin, end) = ((from / step - 1e-9).ceil() as i64, (to / step + 1e-9).floor() as i64);
    if end - begin < 1 {
        return vec![from, to];
    }
    (begin..=end).map(|i| (i as f64 * step).clamp(from, to)).collect()
}

/// A round as a label.
fn round(round: f64) -> String {
    if round < 1e6 { words::thousands(round as u64) } else { words::short(round) }
}

/// A value as a label, with as many digits as tell it from its neighbours.
fn value(value: f64, step: f64) -> String {
    let size = value.abs().max(step);
    if !(1e-4..1e6).contains(&size) || (step < 1e-5 && value != 0.0) {
        let digits = if value == 0.0 { 0.0 } else { (value.abs() / step).log10().floor().clamp(0.0, 12.0) };
        return if value == 0.0 { "0".to_owned() } else { format!("{value:.0$e}", digits as usize) };
    }
    let decimals = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
    // Never `-0`: a sum of steps may miss 0 by the last bit.
    let text = format!("{value:.decimals$}");
    if text.trim_start_matches('-').chars().all(|c| c == '0' || c == '.') { "0".to_owned() } else { text }
}

/// A power of ten as a label.
fn power(exponent: f64) -> String {
    match exponent.round() as i32 {
        exponent @ 0..=3 => 10_i32.pow(exponent as u32).to_string(),
        exponent @ -3..0 => format!("{:.1$}", 10_f64.powi(exponent), exponent.unsigned_abs() as usize),
        exponent => {
            let raised = |c: char| match c {
                '-' => '⁻',
                '1' => '¹',
                '2' => '²',
                '3' => '³',
                digit => char::from_u32('⁰' as u32 + digit as u32 - '0' as u32).expect("digits follow one another"),
            };
            format!("10{}", exponent.to_string().chars().map(raised).collect::<String>())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn draw(values: &[f64]) -> Option<Drawn> {
        let points = (0..).map(f64::from).zip(values.iter().copied()).collect();
        Chart { lines: vec![Line { class: "mean".into(), points }], epochs: vec![1.0] }.draw(Size::Column, "loss")
    }

    #[test]
    fn labels_tell_neighbours_apart() {
        let labels = |least, greatest| {
            let step = step(greatest - least);
            ticks(least, greatest, step).into_iter().map(|tick| value(tick, step)).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(labels(0.0, 2.3), "0 0.5 1.0 1.5 2.0");
        assert_eq!(labels(-1.0, 1.0), "-1.0 -0.5 0 0.5 1.0");
        assert_eq!(labels(0.86, 0.88), "0.860 0.865 0.870 0.875 0.880");
        assert_eq!(labels(0.0, 4e7), "0 1e7 2e7 3e7 4e7");
        assert_eq!(labels(0.0, 2e-6), "0 5e-7 1e-6 2e-6 2e-6");
        assert_eq!([0.0, 2.0, -2.0, -7.0, 12.0].map(power), ["1", "100", "0.01", "10⁻⁷", "10¹²"]);
    }

    #[test]
    fn nothing_of_poloto_s_look_is_left() {
        let svg = draw(&[2.0, 1.0, 0.5]).unwrap().svg;
        assert!(svg.contains("class=\"line mean\""), "{svg}");
        for unwanted in ["id=", "black", "white", "poloto_background", "poloto_plot"] {
            assert!(!svg.contains(unwanted), "{unwanted} in {svg}");
        }
    }

    #[test]
    fn wide_positive_ranges_are_logarithmic() {
        assert!(draw(&[1.0, 1e-9]).unwrap().logarithmic);
        assert!(!draw(&[1.0, 0.0]).unwrap().logarithmic);
        assert!(!draw(&[1.0, 0.5]).unwrap().logarithmic);
    }

    #[test]
    fn what_has_no_two_points_is_no_chart() {
        assert!(draw(&[]).is_none());
        assert!(draw(&[1.0]).is_none());
        assert!(draw(&[f64::NAN; 9]).is_none());
    }

    proptest! {
        #[test]
        fn any_values_can_be_drawn(values in prop::collection::vec(prop_oneof![
            -1e150..1e150_f64, -1.0..1.0_f64, 1e-300..1e-290_f64, Just(0.0), Just(f64::NAN), Just(5.0), Just(5.000_000_001)
        ], 0..20)) {
            if let Some(drawn) = draw(&values) {
                let unwanted = ["NaN", "inf"].into_iter().find(|text| drawn.svg.contains(text));
                prop_assert_eq!(unwanted, None, "{}", drawn.svg);
            }
        }
    }
}
