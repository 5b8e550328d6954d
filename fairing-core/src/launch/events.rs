//! What every launcher needs to tell of its replicas: the bounded way to whoever follows the run, and a replica's last lines.

use std::collections::VecDeque;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::ReplicaEvent;
#[cfg(feature = "image")]
use crate::observe::events::Exit;
use crate::observe::events::Stream;
use crate::topology::Replica;

/// Lines of a replica kept for error messages: a panic with its notes, or a chain of causes.
const LAST_LINES: usize = 20;

/// Pause between two attempts to send into a full channel.
const NAP: Duration = Duration::from_millis(2);

/// The way to whoever follows the run.
#[derive(Clone)]
pub(super) struct Events {
    sender: SyncSender<ReplicaEvent>,
    ending: Arc<Ending>,
}

impl Events {
    pub(super) fn new(sender: SyncSender<ReplicaEvent>, ending: Arc<Ending>) -> Self {
        Self { sender, ending }
    }

    /// Waits while the channel is full; gives up when the receiver is gone or the run is being ended, perhaps by the very
    /// thread that would have received.
    pub(super) fn send(&self, mut event: ReplicaEvent) {
        while let Err(TrySendError::Full(unsent)) = self.sender.try_send(event) {
            if self.ending.wait(NAP) {
                return;
            }
            event = unsent;
        }
    }

    /// As [`Events::send`], in a task that must not hold up others.
    #[cfg(feature = "kubernetes")]
    pub(super) async fn send_async(&self, mut event: ReplicaEvent) {
        while let Err(TrySendError::Full(unsent)) = self.sender.try_send(event) {
            if self.ending.wait(Duration::ZERO) {
                return;
            }
            tokio::time::sleep(NAP).await;
            event = unsent;
        }
    }
}

/// Whether [`Launched::end`](super::Launched::end) was called.
#[derive(Default)]
pub(super) struct Ending {
    begun: Mutex<bool>,
    changed: Condvar,
}

impl Ending {
    pub(super) fn begin(&self) {
        *lock(&self.begun) = true;
        self.changed.notify_all();
    }

    /// Waits for it, at most `timeout`.
    fn wait(&self, timeout: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(lock(&self.begun), timeout, |begun| !*begun);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// The last lines that a replica wrote, oldest first.
#[derive(Default)]
pub(super) struct LastLines(Mutex<VecDeque<String>>);

impl LastLines {
    /// Keeps a line and passes it on.
    pub(super) fn deliver(&self, events: &Events, replica: Replica, stream: Stream, text: String) {
        self.keep(&text);
        events.send(ReplicaEvent::Line { replica, stream, text });
    }

    /// As [`LastLines::deliver`], in a task that must not hold up others.
    #[cfg(feature = "kubernetes")]
    pub(super) async fn deliver_async(&self, events: &Events, replica: Replica, stream: Stream, text: String) {
        self.keep(&text);
        events.send_async(ReplicaEvent::Line { replica, stream, text }).await;
    }

    fn keep(&self, text: &str) {
        let mut lines = lock(&self.0);
        if lines.len() == LAST_LINES {
            lines.pop_front();
        }
        lines.push_back(text.to_owned());
    }

    pub(super) fn get(&self) -> Vec<String> {
        lock(&self.0).iter().cloned().collect()
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a container ended: engines and clusters report a signal as shells do.
#[cfg(feature = "image")]
pub(super) fn exit(code: i64) -> Exit {
    let code = i32::try_from(code).unwrap_or(UNSEEN);
    if (129..160).contains(&code) { Exit::Signal(code - 128) } else { Exit::Code(code) }
}

/// Code of a replica whose end nobody saw.
#[cfg(feature = "image")]
pub(super) const UNSEEN: i32 = -1;
