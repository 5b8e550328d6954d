//! fairing: distributed training of burn models, from `cargo run`.
//!
//! A training job is a value that flows one way: attribute → configuration → topology → plan → launch; inside each
//! process, environment → placement → runtime.

extern crate self as fairing_core;

mod build;
pub mod config;
pub mod exit;
pub mod launch;
pub mod lifeline;
pub mod observe;
pub mod prelude;
mod protocol;
mod run;
pub mod runtime;
pub mod topology;
mod training;

#[doc(hidden)]
pub mod __private;

pub use config::LaunchOptions;
pub use fairing_macros::distributed_training;
pub use protocol::failure::{Failure, FailureKind};
pub use run::{Outcome, OutcomeError, Run, RunError, TrainError, Trained, in_replica};
pub use runtime::data;
pub use runtime::{Gradient, Model, Worker};
pub use topology::Topology;
pub use training::{DistributedTraining, Train};

#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
