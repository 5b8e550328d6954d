//! Cores and memory, with their units as people write them.

use std::fmt;
use std::str::FromStr;

use super::{Gpu, grammar};

/// What one replica of a role asks for; `None` leaves it to the target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    /// Processor time, default: the target's choice (local: the cores are divided among the workers).
    pub cpu: Option<Cpu>,
    /// Main memory, default: the target's choice (local: no limit).
    pub memory: Option<Memory>,
    /// GPUs, default none. On a cluster only.
    pub gpu: Option<Gpu>,
}

/// Processor time in thousandths of a core, at least one.
///
/// # Example
///
/// ```
/// use fairing_core::config::Cpu;
///
/// let cpu: Cpu = "1.5".parse()?;
/// assert_eq!(cpu.millicores(), 1500);
/// assert_eq!(cpu, "1500m".parse()?);
/// # Ok::<(), fairing_core::config::UnitError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cpu(u64);

/// Main memory in bytes, at least one.
///
/// # Example
///
/// ```
/// use fairing_core::config::Memory;
///
/// let memory: Memory = "512Mi".parse()?;
/// assert_eq!(memory.bytes(), 512 * 1024 * 1024);
/// assert_ne!(memory, "512M".parse()?);
/// # Ok::<(), fairing_core::config::UnitError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Memory(u64);

/// A text that is no amount of processor time, memory or GPUs. Returned by the `parse` of [`Cpu`], [`Memory`] and
/// [`Gpu`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` cannot be read; expected {expected}")]
pub struct UnitError {
    text: String,
    expected: String,
}

impl Cpu {
    /// Thousandths of a core.
    pub fn millicores(self) -> u64 {
        self.0
    }
}

impl Memory {
    /// Number of bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Cpu {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        grammar::millicores(text).map(Self).map_err(|expected| UnitError::new(text, expected))
    }
}

impl FromStr for Memory {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        grammar::bytes(text).map(Self).map_err(|expected| UnitError::new(text, expected))
    }
}

impl UnitError {
    pub(super) fn new(text: &str, expected: String) -> Self {
        Self { text: text.to_owned(), expected }
    }

    /// What would have been right, without what was found.
    pub(crate) fn expected(self) -> String {
        self.expected
    }
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            millicores if millicores % 1000 == 0 => write!(f, "{}", millicores / 1000),
            millicores => write!(f, "{millicores}m"),
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let binary = [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")].map(|(power, unit)| (1u64 << power, unit));
        let decimal = [(12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, "B")].map(|(power, unit)| (10u64.pow(power), unit));
        let units = binary.into_iter().chain(decimal).filter(|(size, _)| self.0.is_multiple_of(*size));
        // The shortest is the one that was typed, but for oddities such as 1024Mi.
        let shortest = units.map(|(size, unit)| format!("{}{unit}", self.0 / size)).min_by_key(String::len);
        f.write_str(&shortest.expect("bytes divide every number"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_shown_as_they_are_written() {
        for text in ["2", "500m", "1500m"] {
            assert_eq!(text.parse::<Cpu>().unwrap().to_string(), text);
        }
        for text in ["1Gi", "512Mi", "512M", "1G", "3k", "1000001B", "7Ti"] {
            assert_eq!(text.parse::<Memory>().unwrap().to_string(), text);
        }
    }
}
