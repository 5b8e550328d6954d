//! What happens inside a replica.

pub mod layout;
mod model;
pub mod optimizer;
mod shard;
mod worker;

pub use layout::{Layout, LayoutError};
pub use model::{Gradient, Model};
pub use worker::Worker;
