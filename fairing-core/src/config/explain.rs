//! Every value of a configuration with the layer that set it, as a table for a person.

use std::fmt;

use super::Origin;

/// Each value of a configuration with the layer that set it; its text is a table.
///
/// # Example
///
/// ```text
/// workers                  4      FAIRING_WORKERS
/// ps                       1      default
/// resources.worker.memory  512Mi  attribute
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    rows: Vec<Row>,
}

/// One line of an [`Explanation`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Row {
    /// The key as `Fairing.toml` spells it.
    pub key: &'static str,
    /// Its value, `-` if there is none.
    pub value: String,
    /// Who set it.
    pub origin: Origin,
}

impl Explanation {
    pub(super) fn new(rows: Vec<Row>) -> Self {
        Self { rows }
    }

    /// The lines, in the order of the table of keys.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Who set `key`, if there is such a key.
    pub fn origin(&self, key: &str) -> Option<&Origin> {
        self.rows.iter().find(|row| row.key == key).map(|row| &row.origin)
    }
}

impl fmt::Display for Explanation {
    /// One line per key, its columns aligned; every line ends with a newline.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: fn(&Row) -> &str| self.rows.iter().map(|row| column(row).chars().count()).max();
        let keys = width(|row| row.key).unwrap_or(0);
        let values = width(|row| &row.value).unwrap_or(0);
        self.rows
            .iter()
            .try_for_each(|Row { key, value, origin }| writeln!(f, "{key:keys$}  {value:values$}  {origin}"))
    }
}
