//! How long to wait for a registry, and how often to try again.

use std::time::{Duration, Instant};

use super::error::RequestError;

/// Deadlines and retries of a [`Client`](super::Client).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Patience {
    /// Until a connection must be open; names are looked up in it. Ten seconds by default: a lost packet is sent again
    /// after one and after three.
    pub connect: Duration,
    /// Until a question must be answered. 30 seconds by default: a registry may ask its own storage first.
    pub answer: Duration,
    /// How long an upload or a download may stand still. One minute by default.
    pub stall: Duration,
    /// Until a blob that was sent whole must be acknowledged. Five minutes by default: some storages move the bytes once
    /// more before they answer.
    pub commit: Duration,
    /// How often one thing is tried, the first time included. Five times by default.
    pub attempts: u32,
    /// Pause before the second attempt; it doubles before each further one. A quarter of a second by default.
    pub pause: Duration,
    /// The longest pause, also where a registry asks for a longer one. 30 seconds by default.
    pub longest_pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            answer: Duration::from_secs(30),
            stall: Duration::from_secs(60),
            commit: Duration::from_secs(300),
            attempts: 5,
            pause: Duration::from_millis(250),
            longest_pause: Duration::from_secs(30),
        }
    }
}

/// What was tried so far.
#[derive(Debug)]
pub(super) struct Attempts<'a> {
    patience: &'a Patience,
    began: Instant,
    failed: Vec<String>,
}

impl<'a> Attempts<'a> {
    pub(super) fn new(patience: &'a Patience) -> Self {
        Self { patience, began: Instant::now(), failed: Vec::new() }
    }

    /// Waits before the next attempt, or says that there is none.
    ///
    /// `unreachable` says whether a registry that does not take connections is worth another attempt: in the middle of a
    /// push it may be starting again, at its beginning its address is probably wrong.
    pub(super) async fn again(&mut self, error: RequestError, unreachable: bool) -> Result<(), RequestError> {
        let worth = error.is_transient() || (unreachable && error.is_unreachable());
        self.failed.push(error.to_string());
        let tried = u32::try_from(self.failed.len()).unwrap_or(u32::MAX);
        if worth && tried < self.patience.attempts {
            let pause = self.patience.pause.saturating_mul(1 << (tried - 1).min(16));
            let pause = error.retry_after().unwrap_or_default().max(pause).min(self.patience.longest_pause);
            tokio::time::sleep(pause).await;
            return Ok(());
        }
        if self.failed.len() == 1 {
            return Err(error);
        }
        let (attempts, elapsed) = (std::mem::take(&mut self.failed), self.began.elapsed());
        Err(RequestError::GaveUp { attempts, elapsed, last: Box::new(error) })
    }
}
