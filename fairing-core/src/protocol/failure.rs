//! Why a run failed: the first failure in the coordinator's order of receipt.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::topology::Replica;

/// The cause of a failed run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The replica that caused it.
    pub replica: Replica,
    /// What kind of thing happened.
    pub kind: FailureKind,
    /// What happened, in words.
    pub message: String,
    /// The round that was in progress, if training had begun.
    pub round: Option<u64>,
}

impl Failure {
    /// A replica was told to end by whoever runs its process: evicted, deleted, stopped.
    pub(crate) fn told_to_end(replica: Replica, round: Option<u64>) -> Self {
        Self { replica, kind: FailureKind::Lost, message: TOLD_TO_END.to_owned(), round }
    }
}

/// Why a replica is lost that was told to end.
pub(crate) const TOLD_TO_END: &str = "it was told to end (SIGTERM)";

/// What kind of thing ended a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureKind {
    /// `train` returned an error of the user's own.
    User,
    /// `train` panicked.
    Panicked,
    /// A gradient or loss is NaN or infinite.
    NotFinite,
    /// The replicas do not train the same model, or not a trainable one.
    Layout,
    /// A worker's model or number of steps differs from the others' at the end.
    Diverged,
    /// The run cannot be as it is configured, for example more workers than examples.
    Configuration,
    /// A replica ended, or fell silent, without a word.
    Lost,
    /// A replica did not reach `launch()`.
    NeverLaunched,
    /// A replica's process could not be started.
    NeverStarted,
    /// The target ended a replica, which took more memory than it may.
    Condemned,
    /// A wait for a living replica took too long.
    Timeout,
    /// A replica said something that it must not say.
    Protocol,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.replica)?;
        match self.kind {
            FailureKind::User => write!(f, "returned an error")?,
            FailureKind::Panicked => write!(f, "panicked")?,
            FailureKind::NotFinite => write!(f, "computed a number that is not finite")?,
            FailureKind::Layout => write!(f, "has a model that cannot be trained here")?,
            FailureKind::Diverged => write!(f, "no longer agrees with the others")?,
            FailureKind::Configuration => write!(f, "cannot run as configured")?,
            FailureKind::Lost => write!(f, "was lost")?,
            FailureKind::NeverLaunched => write!(f, "did not reach `launch()`")?,
            FailureKind::NeverStarted => write!(f, "could not be started")?,
            FailureKind::Condemned => write!(f, "was ended by the cluster")?,
            FailureKind::Timeout => write!(f, "kept the run waiting")?,
            FailureKind::Protocol => write!(f, "broke the protocol")?,
        }
        if let Some(round) = self.round {
            write!(f, " in round {round}")?;
        }
        write!(f, ": {}", self.message)
    }
}
