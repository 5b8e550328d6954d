//! What can be seen of a run while it goes on; every view, file and report is made from these.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::topology::{Rank, Replica};

/// Something that happened in a run, in the order in which the launcher learned of it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A replica reached `launch()` and is known to the coordinator.
    Joined(Replica),
    /// A worker advanced.
    Progress(Progress),
    /// A metric of one round, merged over the ranks.
    Metric(Metric),
    /// A replica wrote a line.
    Line {
        /// Who wrote it.
        replica: Replica,
        /// Where it wrote it.
        stream: Stream,
        /// The line without its end.
        text: String,
    },
    /// A replica's process ended.
    Exited {
        /// Whose.
        replica: Replica,
        /// How.
        exit: Exit,
    },
    /// A worker was lost, and the run does not fail of it.
    Lost {
        /// Which worker.
        replica: Replica,
        /// Why it counts as lost.
        reason: String,
        /// It is started again, and takes its place.
        rejoins: bool,
    },
    /// The caller asked the run to stop; the round in progress is finished first.
    Stopping,
    /// Something the user should know, in one sentence.
    Warning(String),
}

/// Which of its two streams a replica wrote to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Exit {
    /// It ended by itself with this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
}

impl fmt::Display for Exit {
    /// What to put behind a replica's name: `exited with code 3`, `was ended by signal 9 (SIGKILL)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // No process ends with such a code: it stands for one that ended where nobody saw how.
            Exit::Code(..0) => f.write_str("ended unseen"),
            Exit::Code(code) => write!(f, "exited with code {code}"),
            Exit::Signal(number) => {
                write!(f, "was ended by signal {number}")?;
                let name = match number {
                    1 => "SIGHUP",
                    2 => "SIGINT",
                    4 => "SIGILL",
                    6 => "SIGABRT",
                    7 => "SIGBUS",
                    8 => "SIGFPE",
                    9 => "SIGKILL",
                    11 => "SIGSEGV",
                    15 => "SIGTERM",
                    _ => return Ok(()),
                };
                write!(f, " ({name})")
            }
        }
    }
}

/// Where a worker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Which worker.
    pub rank: Rank,
    /// Current epoch, from 0.
    pub epoch: u64,
    /// Number of epochs asked for.
    pub epochs: u64,
    /// Finished batches of the current epoch.
    pub batch: u64,
    /// Batches of an epoch.
    pub batches: u64,
    /// Examples that this worker has trained on, all epochs together, also before it was started again.
    pub examples: u64,
}

/// A named number of one round, the example-weighted mean over the ranks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// As given to `worker.metric`.
    pub name: String,
    /// Epoch in which it was recorded, from 0.
    pub epoch: u64,
    /// Round in which it was recorded, from 0.
    pub round: u64,
    /// Mean over the ranks. In JSON a value that is no number is the string `"NaN"`, `"inf"` or `"-inf"`.
    #[serde(with = "super::float")]
    pub value: f64,
    /// Value per rank; `None` where a rank gave none.
    #[serde(with = "super::float::options")]
    pub ranks: Vec<Option<f64>>,
}
