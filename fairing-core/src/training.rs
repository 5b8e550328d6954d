//! What a user writes: the type that is trained, and what the attribute adds to it.

use crate::__private::Travels;
use crate::config::{Attribute, Explanation, LaunchOptions};
use crate::run::{self, Outcome, Run, RunError, TrainError, Trained};
use crate::runtime::{Model, Worker};
use crate::topology::Topology;

/// What the user implements: how one worker trains.
///
/// The fields of the type are the hyperparameters of one run.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not say how it trains",
    label = "`Train` is not implemented for `{Self}`",
    note = "add `impl Train for {Self} {{ type Model = ...; fn train(&self, worker: &Worker) -> anyhow::Result<Self::Model> {{ ... }} }}`"
)]
pub trait Train: Sized + 'static {
    /// What is trained: a burn module, or anything else that implements [`Model`].
    type Model: Model;

    /// Trains one worker's part and returns the model, which all workers then have alike.
    ///
    /// Every worker calls this with the same `self`.
    ///
    /// # Errors
    ///
    /// The user's own; the run fails and names the worker.
    fn train(&self, worker: &Worker) -> anyhow::Result<Self::Model>;
}

/// A type that can be launched; implemented by [`#[distributed_training]`](macro@crate::distributed_training).
///
/// The value travels to every replica, so the type derives serde's `Serialize` and `Deserialize`. Their derives write
/// `serde` into the user's crate, which therefore needs it among its own dependencies, with its feature `derive`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be launched",
    label = "the attribute is missing on `{Self}`",
    note = "put `#[distributed_training(workers = 2, ps = 1)]` above the struct"
)]
pub trait DistributedTraining: Train + Travels {
    /// What stands in the attribute.
    #[doc(hidden)]
    const ATTRIBUTE: Attribute;

    /// `module_path::Type`, by which a replica knows what to train.
    #[doc(hidden)]
    const NAME: &'static str;

    /// Trains with the configured workers and parameter servers, shows how it goes, and brings model and metrics home.
    ///
    /// Blocks until nothing of the run is left. In a replica, the first call in `main` takes the replica's part and never
    /// returns. Ctrl-C once stops the run: its result is saved and shown, and the process ends with 130; twice, everything
    /// ends at once. May be called inside an async runtime, where it blocks the thread that it is called on.
    ///
    /// # Errors
    ///
    /// [`RunError`]: a configuration that cannot be meant, with all its mistakes, before anything is started; or the cause
    /// of a failed run, with the replica, how it ended and its last lines.
    fn launch(&self) -> Result<Outcome, RunError> {
        run::launch(self, &LaunchOptions::new())
    }

    /// As [`launch`](DistributedTraining::launch), with options that win over attribute, `Fairing.toml` and variables.
    ///
    /// # Errors
    ///
    /// As `launch`.
    fn launch_with(&self, options: LaunchOptions) -> Result<Outcome, RunError> {
        run::launch(self, &options)
    }

    /// Starts the run and returns while it goes on; [`Run::wait`] gives its outcome, also if it was stopped.
    ///
    /// # Errors
    ///
    /// [`RunError`] if it cannot be started.
    fn start(&self) -> Result<Run, RunError> {
        run::start(self, &LaunchOptions::new())
    }

    /// As [`start`](DistributedTraining::start), with options that win over attribute, `Fairing.toml` and variables.
    ///
    /// # Errors
    ///
    /// As `start`.
    fn start_with(&self, options: LaunchOptions) -> Result<Run, RunError> {
        run::start(self, &options)
    }

    /// Runs `train` in this thread, as the only worker: no process, no socket, no file.
    ///
    /// `data` and `seed` are as configured.
    ///
    /// # Errors
    ///
    /// [`TrainError`] with what `train` returned, or a configuration that cannot be meant.
    fn train_here(&self) -> Result<Trained<Self::Model>, TrainError> {
        self.train_in_memory(Topology::new(1, 1))
    }

    /// Trains with the replicas of `topology` as threads of this process, over the same protocol: for tests.
    ///
    /// The calling thread is worker 0. All threads share the framework's one generator, so with several workers only models
    /// without random layers repeat to the bit.
    ///
    /// # Errors
    ///
    /// [`TrainError`] with the first failure.
    fn train_in_memory(&self, topology: Topology) -> Result<Trained<Self::Model>, TrainError> {
        run::train_in_memory(self, topology)
    }

    /// Every configured value and the layer that set it, for printing.
    ///
    /// # Errors
    ///
    /// [`RunError::Config`] with every mistake in every layer.
    fn explain() -> Result<Explanation, RunError> {
        run::explain::<Self>(&LaunchOptions::new())
    }
}
