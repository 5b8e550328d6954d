//! What was measured, as a table of medians.

use crate::processes::load;

/// Rows in the order in which they were first recorded.
pub(crate) struct Table {
    title: &'static str,
    rows: Vec<Row>,
}

/// What a row measures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Figure {
    /// With its unit.
    pub(crate) name: &'static str,
    /// Digits behind the point.
    pub(crate) decimals: usize,
    /// What it must reach and should reach, as text; empty for floors.
    pub(crate) goal: &'static str,
}

struct Row {
    figure: Figure,
    values: Vec<f64>,
    failure: Option<String>,
}

/// A floor, or a fact without a goal.
pub(crate) const fn fact(name: &'static str, decimals: usize) -> Figure {
    Figure { name, decimals, goal: "" }
}

/// A figure with a goal: what it must and should reach.
pub(crate) const fn goal(name: &'static str, decimals: usize, goal: &'static str) -> Figure {
    Figure { name, decimals, goal }
}

impl Table {
    pub(crate) fn new(title: &'static str) -> Self {
        Self { title, rows: Vec::new() }
    }

    /// Adds one repetition's value to a figure's row.
    pub(crate) fn record(&mut self, figure: Figure, value: f64) {
        self.row(figure).values.push(value);
    }

    /// Notes that a figure cannot be measured; its row says why.
    pub(crate) fn fail(&mut self, figure: Figure, error: &anyhow::Error) {
        let reason = format!("{error:#}").lines().collect::<Vec<_>>().join(" ");
        self.row(figure).failure = Some(reason.chars().take(100).collect());
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
        println!("\n{} (load {})", self.title, load());
        println!("{:<62}{:>10}{:>22}   must / aim", "", "median", "min to max");
        for Row { figure: Figure { name, decimals, goal }, values, failure } in &self.rows {
            if let Some(reason) = failure {
                println!("{name:<62}    failed: {reason}");
                continue;
            }
            let (low, high) =
                values.iter().fold((f64::MAX, f64::MIN), |(low, high), &value| (low.min(value), high.max(value)));
            let range = format!("{low:.decimals$} to {high:.decimals$}");
            println!("{name:<62}{:>10.decimals$}{range:>22}   {goal}", median(values.clone()));
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
