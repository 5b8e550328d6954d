//! Every deadline of a run, derived from one value so that they nest.

use std::time::Duration;

use crate::topology::{JOIN, KEEP_RESULT, Placement};

/// How long a replica may be silent before it counts as lost. All other deadlines follow from it.
///
/// Long enough for a stop of the whole machine by a debugger or a snapshot, short enough to notice a frozen process. This
/// crate's own tests break a thousand connections on purpose and wait less long for each.
pub(crate) const LEASE: Duration = Duration::from_secs(if cfg!(test) { 4 } else { 10 });

/// How often a waiting thread looks whether the run has failed meanwhile.
pub(crate) const TICK: Duration = LEASE.checked_div(20).expect("twenty is not zero");

/// How long a connection that broke may take to come back before its replica counts as lost.
pub(crate) const RECONNECT: Duration = LEASE;

/// How often a replica says that it lives: a lease survives the loss of several of these.
pub(crate) const HEARTBEAT: Duration = LEASE.checked_div(10).expect("ten is not zero");

/// How often a worker reports metrics and progress while it trains.
pub(crate) const REPORT: Duration = LEASE.checked_div(100).expect("a hundred is not zero");

/// How long one attempt to connect to another machine may take, and before it the resolution of its name. Enough for the first
/// packet to be lost and sent again, which happens after a second; the next attempt may find another address.
pub(crate) const CONNECT: Duration = LEASE.checked_div(4).expect("four is not zero");

/// How long the other end of a connection may take to accept it and say hello.
pub(crate) const HELLO: Duration = LEASE;

/// How long a transfer may stand still before the other end counts as lost.
pub(crate) const STALL: Duration = LEASE.checked_mul(2).expect("twenty seconds");

/// How many leases a wait for others' work takes at most; few where tests wait for the end of it.
const PATIENCE: u32 = if cfg!(test) { 5 } else { 60 };

/// How long a round, a collective or the end of training waits for the slowest worker.
pub(crate) const ROUND: Duration = LEASE.checked_mul(PATIENCE).expect("ten minutes");

/// How long a replica of a failed run may take to end by itself.
pub(crate) const FAREWELL: Duration = LEASE.checked_div(2).expect("two is not zero");

/// How long a replica that is told to end may take to finish its round and to say so; then it ends all the same. Whoever tells
/// it ends it by force after [`MERCY`].
pub(crate) const PARTING: Duration = LEASE.checked_mul(2).expect("twenty seconds");

/// How long a pod has between the order to end and its end by force, by Kubernetes' default.
pub(crate) const MERCY: Duration = Duration::from_secs(30);

/// How long replicas have to end after a failure is known, beyond what they take by themselves; then they are killed.
pub(crate) const GRACE: Duration = FAREWELL.checked_mul(2).expect("ten seconds");

/// The longest that it takes until the caller knows of a replica that is dead, frozen or cut off: it is silent for a lease,
/// its connection does not come back, and the others end.
pub(crate) const WORST_LOSS: Duration = LEASE.checked_add(RECONNECT).expect("short").checked_add(GRACE).expect("short");

/// The longest that it takes until the caller knows of a worker that lives but does not take part: it deadlocked, say.
pub(crate) const WORST_WAIT: Duration = ROUND.checked_add(WORST_LOSS).expect("short");

/// The least that `join` of a placement may be: time for two attempts to connect, the first of which found nobody.
const LEAST_JOIN: Duration = CONNECT.checked_mul(2).expect("five seconds");

/// The least that `keep_result` of a placement may be, so that a caller who is there has time to say that it has the result.
pub(crate) const LEAST_KEEP_RESULT: Duration = HEARTBEAT;

/// Whether the deadlines that a placement brings fit to the constants here.
///
/// # Errors
///
/// In words, to follow "the placement cannot be used: ".
pub(crate) fn check(placement: &Placement) -> Result<(), String> {
    let rules = [("join", placement.join, LEAST_JOIN), ("keep_result", placement.keep_result, LEAST_KEEP_RESULT)];
    match rules.into_iter().find(|(_, duration, least)| duration < least) {
        None => Ok(()),
        Some((name, duration, least)) => Err(format!(
            "`{name}` is {}, which is less than {}",
            humantime::format_duration(duration),
            humantime::format_duration(least)
        )),
    }
}

// An inner wait must end before the outer one that would hide its reason.
const _: () = {
    assert!(REPORT.as_millis() < TICK.as_millis());
    assert!(TICK.as_millis() < HEARTBEAT.as_millis());
    assert!(HEARTBEAT.as_millis() * 3 < LEASE.as_millis());
    assert!(FAREWELL.as_millis() < LEASE.as_millis());
    assert!(FAREWELL.as_millis() < GRACE.as_millis());
    assert!(CONNECT.as_millis() * 2 < RECONNECT.as_millis());
    assert!(RECONNECT.as_millis() < STALL.as_millis());
    assert!(LEASE.as_millis() < STALL.as_millis());
    assert!(STALL.as_millis() < WORST_LOSS.as_millis());
    assert!(WORST_LOSS.as_millis() < ROUND.as_millis());
    assert!(STALL.as_millis() < ROUND.as_millis());
    assert!(ROUND.as_millis() < KEEP_RESULT.as_millis());
    assert!(PARTING.as_millis() + FAREWELL.as_millis() < MERCY.as_millis());
    assert!(WORST_LOSS.as_millis() < JOIN.as_millis());
    assert!(LEAST_JOIN.as_millis() < JOIN.as_millis());
    assert!(TICK.as_millis() < LEAST_KEEP_RESULT.as_millis());
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{Mode, Replica, Topology};

    #[test]
    fn a_placement_brings_deadlines_that_can_be_kept() {
        let placement = |join, keep_result| Placement {
            run: "test".into(),
            replica: Replica::worker(0),
            topology: Topology::new(1, 0),
            seed: 0,
            threads: 1,
            servers: Vec::new(),
            data_dir: None,
            mode: Mode::Sync,
            rejoin: Duration::ZERO,
            join,
            keep_result,
            first_stays: false,
        };
        assert_eq!(check(&placement(JOIN, KEEP_RESULT)), Ok(()));
        assert_eq!(check(&placement(LEAST_JOIN, LEAST_KEEP_RESULT)), Ok(()));
        let short = Duration::from_millis(1);
        assert!(check(&placement(short, KEEP_RESULT)).unwrap_err().starts_with("`join` is 1ms, which is less than"));
        assert!(check(&placement(JOIN, short)).unwrap_err().starts_with("`keep_result` is 1ms, which is less than"));
    }
}
