//! What happens inside a replica.

#[cfg(feature = "burn")]
pub mod burn;
pub mod layout;
mod model;
pub mod optimizer;
mod shard;

pub use layout::{Layout, LayoutError};
pub use model::{Gradient, Model};
