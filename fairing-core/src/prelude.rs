//! What a training program uses; import all of it with `use fairing_core::prelude::*;`.
//!
//! Serde's derives write `serde` into the user's crate, so that crate needs it as a dependency of its own
//! (`cargo add serde --features derive`).

pub use crate::runtime::Worker;
pub use crate::{DistributedTraining, Gradient, Model, Train, distributed_training};
pub use serde::{Deserialize, Serialize};
