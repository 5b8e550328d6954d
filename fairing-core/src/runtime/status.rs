//! What every thread of a replica must know of the run: whether it has failed, whether it is to stop, and who takes part.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::protocol::failure::Failure;
use crate::protocol::message::{Seat, SeatState};
use crate::topology::{Placement, Role};

/// Shared by the threads of one replica.
#[derive(Default)]
pub(crate) struct RunStatus {
    failure: Mutex<Option<Failure>>,
    failed: AtomicBool,
    stopping: AtomicBool,
    /// This replica has been told to end.
    leaving: AtomicBool,
    /// The workers by rank, as the coordinator told last; empty before.
    roll: Mutex<Vec<Seat>>,
    wake: Mutex<Vec<Box<dyn Fn() + Send + Sync>>>,
    /// Says that this replica goes although its round is not finished.
    parting: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// A planted bug: a server of this replica forgets which chunks it has of a push that comes again, and takes them twice.
    #[cfg(test)]
    pub(crate) forgets: AtomicBool,
}

impl RunStatus {
    /// Records the cause and wakes whoever waits; only the first cause is kept. Returns whether this was it.
    pub(crate) fn fail(&self, failure: Failure) -> bool {
        let first = {
            let mut slot = self.failure.lock().expect("no holder panics");
            let first = slot.is_none();
            slot.get_or_insert(failure);
            self.failed.store(true, Ordering::Release);
            first
        };
        if first {
            self.wake();
        }
        first
    }

    /// The cause, if the run has failed.
    pub(crate) fn failure(&self) -> Option<Failure> {
        if !self.failed.load(Ordering::Acquire) {
            return None;
        }
        self.failure.lock().expect("no holder panics").clone()
    }

    /// An error with the cause, if the run has failed: for waits.
    pub(crate) fn unless_failed(&self) -> Result<(), String> {
        match self.failure() {
            None => Ok(()),
            Some(failure) => Err(failure.to_string()),
        }
    }

    /// Asks for the run to stop when the round in progress is complete.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// Notes that this replica is told to end. A worker whose parameters are elsewhere finishes its round before it goes;
    /// without any other replica the run fails at once.
    pub(crate) fn leave(&self, placement: &Placement) {
        self.leaving.store(true, Ordering::Release);
        if placement.replica.role != Role::Worker || placement.topology.is_serverless() {
            self.fail(Failure::told_to_end(placement.replica, None));
        }
    }

    /// Registers what is said if this replica goes before its round is finished.
    pub(crate) fn at_parting(&self, say: impl FnOnce() + Send + 'static) {
        *self.parting.lock().expect("no holder panics") = Some(Box::new(say));
    }

    /// Says it, once.
    pub(crate) fn part(&self) {
        let say = self.parting.lock().expect("no holder panics").take();
        say.into_iter().for_each(|say| say());
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Takes the coordinator's word on who the workers are, and wakes whoever waits for it.
    pub(crate) fn set_roll(&self, roll: Vec<Seat>) {
        *self.roll.lock().expect("no holder panics") = roll;
        self.wake();
    }

    /// Whether the coordinator has said who the workers are.
    pub(crate) fn has_roll(&self) -> bool {
        !self.roll.lock().expect("no holder panics").is_empty()
    }

    /// What is known of the worker of this rank.
    pub(crate) fn seat(&self, rank: usize) -> Seat {
        self.roll.lock().expect("no holder panics").get(rank).copied().unwrap_or_default()
    }

    /// Whether all workers have returned from `train`.
    pub(crate) fn have_finished(&self) -> bool {
        let roll = self.roll.lock().expect("no holder panics");
        !roll.is_empty() && roll.iter().all(|seat| matches!(seat.state, SeatState::Finished { .. }))
    }

    /// The first worker that has returned from `train`, after how many steps, if any has.
    pub(crate) fn finished(&self) -> Option<(usize, u64)> {
        let roll = self.roll.lock().expect("no holder panics");
        roll.iter().enumerate().find_map(|(rank, seat)| match seat.state {
            SeatState::Finished { rounds } => Some((rank, rounds)),
            SeatState::Training | SeatState::Lost => None,
        })
    }

    /// Registers what wakes a waiting part when the run fails or its roll changes.
    pub(crate) fn on_change(&self, wake: impl Fn() + Send + Sync + 'static) {
        self.wake.lock().expect("no holder panics").push(Box::new(wake));
        if self.failed.load(Ordering::Acquire) {
            self.wake();
        }
    }

    fn wake(&self) {
        for wake in self.wake.lock().expect("no holder panics").iter() {
            wake();
        }
    }
}
