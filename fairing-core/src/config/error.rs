//! What can be wrong with a configuration, each mistake with the layer that it stands in.

use std::fmt;
use std::path::PathBuf;

/// Failure to find out what the user wants. Returned by [`Config::resolve`](super::Config::resolve) and
/// [`Surroundings::read`](super::Surroundings::read).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Some settings cannot be meant as they are written; all of them are listed.
    #[error("{}", list(problems))]
    Invalid {
        /// What is wrong, in the order of the layers.
        problems: Vec<Problem>,
    },
    /// `Fairing.toml` is there but cannot be read.
    #[error("failed to read `{}`", path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The current folder is gone or may not be entered.
    #[error("failed to find out the current folder")]
    CurrentFolder {
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// The layer that set a value, in the order in which they are read: a later one wins.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// `#[distributed_training(...)]`.
    Attribute,
    /// `Fairing.toml`.
    File {
        /// The file.
        path: PathBuf,
        /// Line of the key, from 1.
        line: usize,
    },
    /// A variable of the environment.
    Variable(String),
    /// [`LaunchOptions`](super::LaunchOptions).
    Options,
}

/// One thing that is wrong with the settings.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// A key or variable that fairing does not know.
    Unknown {
        /// Where it is.
        origin: Origin,
        /// The key or variable as written.
        name: String,
        /// What may have been meant.
        suggestion: Option<String>,
    },
    /// A value that cannot be meant.
    Value {
        /// Where it is.
        origin: Origin,
        /// Its key.
        key: &'static str,
        /// The value as written.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// Settings that can be meant one by one but not together.
    Together {
        /// Where the one is that asks for too much.
        origin: Origin,
        /// The key that it does not go with.
        other_key: &'static str,
        /// Where that one is.
        other: Origin,
        /// What is wrong.
        reason: String,
    },
    /// `Fairing.toml` is not TOML.
    Syntax {
        /// Where it is.
        origin: Origin,
        /// The parser's words.
        message: String,
    },
}

impl Origin {
    /// Its place among the layers, and within the file.
    pub(super) fn place(&self) -> (u8, usize) {
        match self {
            Origin::Default => (0, 0),
            Origin::Attribute => (1, 0),
            Origin::File { line, .. } => (2, *line),
            Origin::Variable(_) => (3, 0),
            Origin::Options => (4, 0),
        }
    }
}

impl Problem {
    /// Where it is.
    pub fn origin(&self) -> &Origin {
        match self {
            Problem::Unknown { origin, .. }
            | Problem::Value { origin, .. }
            | Problem::Together { origin, .. }
            | Problem::Syntax { origin, .. } => origin,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::Attribute => f.write_str("attribute"),
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Variable(name) => f.write_str(name),
            Origin::Options => f.write_str("LaunchOptions"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Unknown { origin, name, suggestion } => {
                match origin {
                    Origin::Variable(_) => write!(f, "unknown variable `{name}`")?,
                    _ => write!(f, "{origin}: unknown key `{name}`")?,
                }
                suggestion.iter().try_for_each(|word| write!(f, "; did you mean `{word}`?"))
            }
            Problem::Value { origin, key, found, expected } => {
                write!(f, "{origin}: `{key}` is {found}; expected {expected}")
            }
            Problem::Together { origin, other_key, other, reason } => {
                write!(f, "{origin}: {reason}")?;
                if origin == other { Ok(()) } else { write!(f, " (`{other_key}` is set by {other})") }
            }
            Problem::Syntax { origin, message } => write!(f, "{origin}: {message}"),
        }
    }
}

fn list(problems: &[Problem]) -> String {
    match problems {
        [only] => format!("invalid configuration: {only}"),
        _ => {
            let lines = problems.iter().map(|problem| format!("\n  {problem}"));
            format!("invalid configuration, {} problems:{}", problems.len(), lines.collect::<String>())
        }
    }
}
