//! What happens inside a replica: a [`Worker`] trains its share, parameter servers average and apply, the coordinator
//! keeps the roll.

#[cfg(feature = "burn")]
pub mod burn;
pub(crate) mod control;
pub(crate) mod coordinator;
pub mod data;
mod exchange;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod history;
pub mod layout;
mod model;
pub mod optimizer;
mod pace;
pub(crate) mod parameter_server;
pub(crate) mod replica;
mod safetensors;
mod shard;
pub(crate) mod status;
#[cfg(test)]
mod tests;
pub mod worker;

pub use layout::{Layout, LayoutError};
pub use model::{Gradient, Model};
pub use worker::{Worker, WorkerError};
