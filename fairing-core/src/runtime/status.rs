//! What every thread of a replica must know of the run: whether it has failed, and whether it is to stop.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::protocol::failure::Failure;

/// Shared by the threads of one replica.
#[derive(Default)]
pub(crate) struct RunStatus {
    failure: Mutex<Option<Failure>>,
    failed: AtomicBool,
    stopping: AtomicBool,
    wake: Mutex<Vec<Box<dyn Fn() + Send + Sync>>>,
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

    /// Asks for the run to stop when the round in progress is complete.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Registers what wakes a waiting part when the run fails.
    pub(crate) fn on_failure(&self, wake: impl Fn() + Send + Sync + 'static) {
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
