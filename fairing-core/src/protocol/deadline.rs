//! Every deadline of a run, derived from one value so that they nest.

use std::time::Duration;

/// How often a waiting thread looks whether the run has failed meanwhile.
pub(crate) const TICK: Duration = Duration::from_millis(500);

/// How long a replica may be silent before it counts as lost. All other deadlines follow from it.
///
/// Long enough for a stop of the whole machine by a debugger or a snapshot, short enough to notice a frozen process.
pub(crate) const LEASE: Duration = Duration::from_secs(10);

/// How often a replica says that it lives: a lease survives the loss of several of these.
pub(crate) const HEARTBEAT: Duration = LEASE.checked_div(10).expect("ten is not zero");

/// How often a worker reports metrics and progress while it trains.
pub(crate) const REPORT: Duration = LEASE.checked_div(100).expect("a hundred is not zero");

/// How long the other end of a connection may take to accept it and say hello.
pub(crate) const HELLO: Duration = LEASE;

/// How long a transfer may stand still before the other end counts as lost.
pub(crate) const STALL: Duration = LEASE.checked_mul(2).expect("twenty seconds");

/// How long replicas wait for each other before training: a slow data set or an image pull on a cold node.
pub(crate) const JOIN: Duration = LEASE.checked_mul(60).expect("ten minutes");

/// How long a round, a collective or the end of training waits for the slowest worker.
pub(crate) const ROUND: Duration = LEASE.checked_mul(60).expect("ten minutes");

/// How long a replica of a failed run may take to end by itself.
pub(crate) const FAREWELL: Duration = LEASE.checked_div(2).expect("two is not zero");

/// How long the coordinator keeps the result of a finished run for its caller.
pub(crate) const KEEP_RESULT: Duration = Duration::from_secs(3600);

// An inner wait must end before the outer one that would hide its reason.
const _: () = {
    assert!(REPORT.as_millis() < TICK.as_millis());
    assert!(TICK.as_millis() < HEARTBEAT.as_millis());
    assert!(HEARTBEAT.as_millis() * 3 < LEASE.as_millis());
    assert!(FAREWELL.as_millis() < LEASE.as_millis());
    assert!(LEASE.as_millis() < STALL.as_millis());
    assert!(STALL.as_millis() < ROUND.as_millis());
    assert!(ROUND.as_millis() < KEEP_RESULT.as_millis());
};
