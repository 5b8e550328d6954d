//! Waiting for asynchronous libraries from ordinary threads.

use std::io;
use std::thread;

use tokio::runtime::{Builder, Runtime};

/// The threads that the clients of registries and engines run on.
///
/// Made once per run; dropping it ends what still runs on it.
#[derive(Debug)]
pub(crate) struct Reactor {
    runtime: Option<Runtime>,
}

/// What waits is the network; one thread moves the bytes while another computes digests.
const THREADS: usize = 2;

impl Reactor {
    /// Starts the threads.
    pub(crate) fn start() -> io::Result<Self> {
        let runtime =
            Builder::new_multi_thread().worker_threads(THREADS).thread_name("fairing-io").enable_all().build()?;
        Ok(Self { runtime: Some(runtime) })
    }

    /// Runs `future` to its end; may also be called from inside another asynchronous runtime.
    pub(crate) fn wait<F>(&self, future: F) -> F::Output
    where
        F: Future + Send,
        F::Output: Send,
    {
        // A runtime refuses to block on a thread of another one, so the wait has a thread of its own.
        thread::scope(|scope| {
            let waiting = scope.spawn(|| self.runtime().block_on(future));
            waiting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// As [`Reactor::wait`], from a thread of fairing's own, which no runtime drives: no other thread is needed.
    pub(crate) fn here<F: Future>(&self, future: F) -> F::Output {
        self.runtime().block_on(future)
    }

    /// Runs `future` in the background.
    pub(crate) fn spawn<F>(&self, future: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.runtime().spawn(future)
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("it is taken when it is dropped")
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Does not wait: it may be dropped inside another runtime, where waiting panics.
            runtime.shutdown_background();
        }
    }
}
