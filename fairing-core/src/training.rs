//! What a user writes: the type that is trained, and what the attribute adds to it.

use crate::__private::Travels;
use crate::config::Attribute;
use crate::runtime::{Model, Worker};

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
}
