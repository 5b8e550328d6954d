//! Control messages between replicas, the coordinator and the caller.

use std::hash::{BuildHasher, Hasher, RandomState};

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::failure::Failure;
use crate::observe::events::{Metric, Progress};
use crate::observe::metrics::MetricPoint;
use crate::topology::{Rank, Replica};

/// The first message on every connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// The run that the sender belongs to.
    pub(crate) run: String,
    /// Who is speaking.
    pub(crate) speaker: Speaker,
    /// Which of the processes that have been this replica, or the caller.
    pub(crate) incarnation: Incarnation,
    /// What the connection is for.
    pub(crate) purpose: Purpose,
}

/// One life of a replica: a process that is started again in its place has another one. Of the caller, one process that
/// attaches to the run, however often it calls.
///
/// Random and not an address or a number that the launcher counts, so that whoever starts the process has nothing to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Incarnation(u64);

impl Incarnation {
    /// A new one.
    pub(crate) fn fresh() -> Self {
        Self(RandomState::new().build_hasher().finish())
    }
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
    /// The caller's control messages with the coordinator, who tells it everything behind the message of this number; 0 is
    /// before the first one.
    Follow { heard: u64 },
}

/// Where a run stands; a worker starts there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Position {
    pub(crate) epoch: u64,
    /// Batches of the epoch that are done. All of them, and not the next epoch, after its last one: what the user's loop
    /// does behind the batches is still to be done.
    pub(crate) batch: u64,
    pub(crate) round: u64,
}

/// A message to the coordinator with its number, from 1, so that one that is sent again after a break is heard once.
/// The caller does not count; its messages have number 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Numbered {
    pub(crate) number: u64,
    pub(crate) message: ToCoordinator,
}

impl From<ToCoordinator> for Numbered {
    fn from(message: ToCoordinator) -> Self {
        Self { number: 0, message }
    }
}

/// Names a collective: all ranks count alike, also one that was started again in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct CollectiveKey {
    /// Steps that the rank has made before.
    pub(crate) round: u64,
    pub(crate) group: Group,
    /// Collectives of the group since then.
    pub(crate) index: u64,
}

/// Who takes part in a collective, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) enum Group {
    /// The workers average their models' state. One that was started again has none of its own to give.
    State,
    /// The workers, because `train` asked for it.
    User,
    /// The servers add up a norm.
    Servers,
}

/// What the coordinator is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum ToCoordinator {
    /// A replica lives; workers add what is new.
    Report(Report),
    /// One rank's part of a collective.
    Gather {
        key: CollectiveKey,
        #[serde(with = "serde_bytes")]
        part: Vec<u8>,
    },
    /// A worker has joined the model, and begins with this round.
    Began { round: u64 },
    /// Something ended this replica's part.
    Failed(Failure),
    /// `train` returned a model.
    Finished(Finished),
    /// The model follows as a model frame and a tensors frame, the latter empty if there is no such file.
    Model,
    /// This worker has been told to end, has finished its round, and makes no other.
    Leaving,
    /// The answer to [`FromCoordinator::Released`], so that whoever missed it can come back for it.
    Goodbye,
    /// Caller: finish the round, evaluate, save.
    Stop,
    /// Caller: a replica's process has ended.
    Ended(Replica),
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
    /// How its steps went so far.
    pub(crate) pace: Option<Pace>,
}

/// How one worker's steps went. Of one that was started again, steps and examples count from the beginning of the run, and
/// durations are of the process that it is now.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Pace {
    pub(crate) steps: u64,
    pub(crate) examples: u64,
    /// Examples whose gradient was pushed again, after a break or by a worker that was started again.
    pub(crate) repeated_examples: u64,
    /// Seconds from the end of one step's exchange to the beginning of the next one's, over the whole run.
    pub(crate) step_seconds_median: f64,
    pub(crate) step_seconds_p95: f64,
    /// The same over the last few steps; 0 while there are too few.
    pub(crate) recent_step_seconds: f64,
    /// Seconds spent in exchanges, which is mostly waiting for others.
    pub(crate) wait_seconds: f64,
    /// Sum and maximum over the steps of the updates by others between a pull and the push that followed.
    pub(crate) staleness_sum: u64,
    pub(crate) staleness_max: u64,
}

impl Pace {
    /// Adds what the process that this worker was before waited for and missed.
    pub(crate) fn behind(self, before: Pace) -> Pace {
        Pace {
            repeated_examples: before.repeated_examples + self.repeated_examples,
            wait_seconds: before.wait_seconds + self.wait_seconds,
            staleness_sum: before.staleness_sum + self.staleness_sum,
            staleness_max: before.staleness_max.max(self.staleness_max),
            ..self
        }
    }
}

/// How a worker ended well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Finished {
    /// Rounds that it took part in.
    pub(crate) rounds: u64,
    /// SHA-256 of the model's parameters and state, hexadecimal; equal on all ranks of a sync run.
    pub(crate) digest: String,
}

/// What the coordinator says. What is meant for the caller, from [`FromCoordinator::Joined`] to
/// [`FromCoordinator::Workers`], it is told within a [`FromCoordinator::Told`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum FromCoordinator {
    /// The answer to a hello: where the run stands, the number of the last message that was heard of this life, and the
    /// state that was averaged last, for a worker that was started again.
    Welcome { position: Position, heard: u64, state: Option<Vec<Option<ByteBuf>>> },
    /// The answer to a hello that cannot be accepted.
    Refused { reason: String },
    /// All messages up to this number have been heard. Also said to give a sign of life.
    Heard { number: u64 },
    /// To those who own parameters: who the workers are, by rank.
    Roll(Vec<Seat>),
    /// Every rank's part of a collective, in rank order; none of a rank that is lost. And whether the run is to stop.
    Gathered { key: CollectiveKey, parts: Vec<Option<ByteBuf>>, stopping: bool },
    /// All have finished; this worker's model is wanted.
    Bring,
    /// The run has failed; end.
    RunFailed(Failure),
    /// The run is complete; end.
    Released,
    /// To the caller: another process has attached to the run as its caller; do not come back.
    Replaced,
    /// To the caller: the message of this number.
    Told { number: u64, message: Box<FromCoordinator> },
    /// To the caller: a replica has said hello.
    Joined(Replica),
    /// To the caller: a worker is lost, and the run goes on; it may be started again if `rejoin`.
    Lost { replica: Replica, reason: String, rejoin: bool },
    /// To the caller: this worker's steps take more than twice as long as the others'; seconds per step.
    Slow { rank: Rank, step_seconds: f64, others_seconds: f64 },
    /// To the caller: a worker's progress.
    Progress(Progress),
    /// To the caller: a merged metric.
    Metric(Metric),
    /// To the caller: all workers have joined the model, training begins.
    Training,
    /// To the caller: how every worker's steps went, by rank. Comes before the end.
    Workers(Vec<WorkerEnd>),
    /// To the caller: all workers have finished; the model follows as a model frame and a tensors frame.
    Complete { rounds: u64, stopped: bool },
}

impl FromCoordinator {
    /// What is told, without its number.
    #[cfg(test)]
    pub(crate) fn untold(self) -> Self {
        match self {
            FromCoordinator::Told { message, .. } => *message,
            other => other,
        }
    }
}

/// One rank as the servers must know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Seat {
    /// The life that holds the rank now; `None` before its hello, and after it is lost.
    pub(crate) incarnation: Option<Incarnation>,
    pub(crate) state: SeatState,
}

/// Whether a rank still trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) enum SeatState {
    #[default]
    Training,
    /// It has returned from `train` after this many steps.
    Finished { rounds: u64 },
    /// It is lost and nobody waits for it.
    Lost,
}

/// What a run knows of one of its workers in the end.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct WorkerEnd {
    pub(crate) pace: Pace,
    /// Examples that it was to train on and did not, because it was lost.
    pub(crate) dropped_examples: u64,
    pub(crate) restarts: u32,
}
