//! fairing: distributed training of burn models, from `cargo run`.

extern crate self as fairing_core;

pub mod config;
pub mod observe;
pub mod runtime;
pub mod topology;
mod training;

pub mod prelude;

#[doc(hidden)]
pub mod __private;

pub use fairing_macros::distributed_training;
pub use runtime::{Gradient, Model};
pub use training::{DistributedTraining, Train};
