//! What was measured, as a table of medians.

use std::time::Instant;

use crate::processes::{Used, load};

/// Rows in the order in which they were first recorded, those of one case together: what a figure's name says before its
/// colon.
pub(crate) struct Table {
    title: &'static str,
    rows: Vec<Row>,
}

/// What a row measures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Figure {
    /// With its unit.
    pub(crate) name: &'static str,
    /// What it must reach and should reach, as text; empty for others' figures.
    pub(crate) goal: &'static str,
}

struct Row {
    figure: Figure,
    values: Vec<f64>,
    /// Share of the cores, in percent, that processes of others had.
    others: Vec<f64>,
    failure: Option<String>,
}

/// A figure of somebody else, or a fact without a goal.
pub(crate) const fn fact(name: &'static str) -> Figure {
    Figure { name, goal: "" }
}

/// A figure with a goal: what it must and should reach.
pub(crate) const fn goal(name: &'static str, goal: &'static str) -> Figure {
    Figure { name, goal }
}

/// What happened while something was measured.
pub(crate) struct Measured<T> {
    /// What came out.
    pub(crate) value: T,
    /// How long it took.
    pub(crate) ms: f64,
    /// Share of the cores, in percent, that processes of others had meanwhile.
    pub(crate) others: f64,
}

/// Runs `work` and looks at the clock and at what else ran.
pub(crate) fn measure<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<Measured<T>> {
    let before = Used::now();
    let began = Instant::now();
    let value = work()?;
    let ms = began.elapsed().as_secs_f64() * 1_000.0;
    Ok(Measured { value, ms, others: Used::now().others_since(&before) })
}

impl Table {
    pub(crate) fn new(title: &'static str) -> Self {
        Self { title, rows: Vec::new() }
    }

    /// Adds one repetition's value to a figure's row.
    pub(crate) fn record(&mut self, figure: Figure, value: f64, others: f64) {
        let row = self.row(figure);
        row.values.push(value);
        row.others.push(others);
    }

    /// Notes that a figure cannot be measured; its row says why.
    pub(crate) fn fail(&mut self, figure: Figure, error: &anyhow::Error) {
        let reason = format!("{error:#}").lines().collect::<Vec<_>>().join(" ");
        self.row(figure).failure = Some(reason.chars().take(200).collect());
    }

    /// Adds the time of `work`, or why it failed.
    pub(crate) fn time(&mut self, figure: Figure, work: impl FnOnce() -> anyhow::Result<()>) {
        match measure(work) {
            Ok(Measured { ms, others, .. }) => self.record(figure, ms, others),
            Err(error) => self.fail(figure, &error),
        }
    }

    fn row(&mut self, figure: Figure) -> &mut Row {
        let known = self.rows.iter().position(|row| row.figure == figure);
        let index = known.unwrap_or_else(|| {
            let case = |figure: Figure| figure.name.split_once(": ").map(|(case, _)| case);
            let beside = self.rows.iter().rposition(|row| case(row.figure) == case(figure));
            let index = beside.map_or(self.rows.len(), |last| last + 1);
            self.rows.insert(index, Row { figure, values: Vec::new(), others: Vec::new(), failure: None });
            index
        });
        &mut self.rows[index]
    }

    pub(crate) fn print(&self) {
        println!("\n{} (load {})", self.title, load());
        println!("{:<66}{:>9}{:>20}{:>9}{:>4}   must / aim", "", "median", "min to max", "other %", "n");
        for Row { figure: Figure { name, goal }, values, others, failure } in &self.rows {
            if let Some(reason) = failure {
                println!("{name:<66}  failed: {reason}");
                continue;
            }
            let (low, high) =
                values.iter().fold((f64::MAX, f64::MIN), |(low, high), &value| (low.min(value), high.max(value)));
            let range = format!("{low:.1} to {high:.1}");
            let (middle, others, count) = (median(values.clone()), median(others.clone()), values.len());
            println!("{name:<66}{middle:>9.1}{range:>20}{others:>9.0}{count:>4}   {goal}");
        }
    }
}

/// The middle value, or the mean of the two in the middle.
///
/// # Panics
///
/// Without any value.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2])
}
