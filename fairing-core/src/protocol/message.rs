//! Control messages between replicas, the coordinator and the caller.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::failure::Failure;
use crate::observe::events::{Metric, Progress};
use crate::observe::metrics::MetricPoint;
use crate::topology::Replica;

/// The first message on every connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// The run that the sender belongs to.
    pub(crate) run: String,
    /// Who is speaking.
    pub(crate) speaker: Speaker,
    /// What the connection is for.
    pub(crate) purpose: Purpose,
}

/// Who opened a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Speaker {
    Replica(Replica),
    /// The process that called `launch()`.
    Caller,
}

/// What a connection carries after its hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Purpose {
    /// Control messages with the coordinator.
    Control,
    /// A worker's pushes and pulls with one server.
    Data,
}

/// Where a run stands; a worker starts there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Position {
    pub(crate) epoch: u64,
    pub(crate) batch: u64,
    pub(crate) round: u64,
}

/// What the coordinator is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum ToCoordinator {
    /// A replica lives; workers add what is new.
    Report(Report),
    /// One rank's part of a collective.
    Gather {
        sequence: u64,
        #[serde(with = "serde_bytes")]
        part: Vec<u8>,
    },
    /// Something ended this replica's part.
    Failed(Failure),
    /// `train` returned a model; rank 0's follows as a model frame.
    Finished(Finished),
    /// Caller: finish the round, evaluate, save.
    Stop,
    /// Caller: the result has arrived.
    Acknowledged,
}

/// What is new at a worker.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) progress: Option<Progress>,
    pub(crate) metrics: Vec<MetricPoint>,
    /// Where the worker stands.
    pub(crate) position: Position,
    /// Rounds before this one get no more metrics from this worker.
    pub(crate) rounds_done: u64,
}

/// How a worker ended well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Finished {
    /// Rounds that it took part in.
    pub(crate) rounds: u64,
    /// SHA-256 of the model's parameters and state, hexadecimal; equal on all ranks of a sync run.
    pub(crate) digest: String,
}

/// What the coordinator says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum FromCoordinator {
    /// The answer to a hello.
    Welcome { position: Position },
    /// The answer to a hello that cannot be accepted.
    Refused { reason: String },
    /// Every rank's part of a collective, in rank order.
    Gathered { sequence: u64, parts: Vec<ByteBuf> },
    /// The run has failed; end.
    RunFailed(Failure),
    /// The run is complete; end.
    Released,
    /// To the caller: a replica has said hello.
    Joined(Replica),
    /// To the caller: a worker's progress.
    Progress(Progress),
    /// To the caller: a merged metric.
    Metric(Metric),
    /// To the caller: all workers have joined the model, training begins.
    Training,
    /// To the caller: all workers have finished; the model follows as a model frame.
    Complete { rounds: u64, stopped: bool },
}
