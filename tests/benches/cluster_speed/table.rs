//! What was measured, as a table of medians that can be pasted into `README.md`.

use crate::processes::load;

/// Rows in the order in which they were first recorded.
pub(crate) struct Table {
    title: &'static str,
    rows: Vec<Row>,
    /// Printed below the rows.
    notes: Vec<String>,
}

/// What a row measures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Figure {
    /// With its unit.
    pub(crate) name: &'static str,
    /// What it must and should reach, as text; empty for floors and parts.
    pub(crate) goal: [&'static str; 2],
}

struct Row {
    figure: Figure,
    values: Vec<f64>,
    failure: Option<String>,
}

/// A floor, or a part of a figure.
pub(crate) const fn fact(name: &'static str) -> Figure {
    Figure { name, goal: ["", ""] }
}

/// A figure with what it must and should reach.
pub(crate) const fn goal(name: &'static str, must: &'static str, aim: &'static str) -> Figure {
    Figure { name, goal: [must, aim] }
}

impl Table {
    pub(crate) fn new(title: &'static str) -> Self {
        Self { title, rows: Vec::new(), notes: Vec::new() }
    }

    /// Adds one repetition's value to a figure's row.
    pub(crate) fn record(&mut self, figure: Figure, value: f64) {
        self.row(figure).values.push(value);
    }

    /// Notes that a figure could not be measured in one repetition; its row says why.
    pub(crate) fn fail(&mut self, figure: Figure, error: &anyhow::Error) {
        self.row(figure).failure = Some(format!("{error:#}").lines().collect::<Vec<_>>().join(" "));
    }

    /// Adds a line below the rows.
    pub(crate) fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    fn row(&mut self, figure: Figure) -> &mut Row {
        let known = self.rows.iter().position(|row| row.figure == figure);
        let index = known.unwrap_or_else(|| {
            self.rows.push(Row { figure, values: Vec::new(), failure: None });
            self.rows.len() - 1
        });
        &mut self.rows[index]
    }

    pub(crate) fn print(&self) {
        let width = self.rows.iter().map(|row| row.figure.name.len()).max().unwrap_or_default();
        println!("\n{} (load {})\n", self.title, load());
        println!("| {:<width$} | {:>7} | {:>16} | {:>4} | {:>4} |", "figure", "median", "min to max", "must", "aim");
        println!("|{:-<1$}|---------|------------------|------|------|", "", width + 2);
        for Row { figure: Figure { name, goal: [must, aim] }, values, failure } in &self.rows {
            let (middle, range) = match (values.as_slice(), failure) {
                (_, Some(reason)) => ("failed".to_owned(), reason.clone()),
                ([], None) => continue,
                (values, None) => {
                    let (low, high) = values
                        .iter()
                        .fold((f64::MAX, f64::MIN), |(low, high), &value| (low.min(value), high.max(value)));
                    let middle = median(values.to_vec());
                    let decimals = usize::from(middle.abs() < 100.0 && values.iter().any(|value| value.fract() != 0.0));
                    (format!("{middle:.decimals$}"), format!("{low:.decimals$} to {high:.decimals$}"))
                }
            };
            println!("| {name:<width$} | {middle:>7} | {range:>16} | {must:>4} | {aim:>4} |");
        }
        if !self.notes.is_empty() {
            println!();
        }
        self.notes.iter().for_each(|note| println!("{note}"));
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
