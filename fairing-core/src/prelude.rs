//! What a training program uses; import all of it with `use fairing_core::prelude::*;`.
//!
//! Serde's derives write `serde` into the user's crate, so that crate needs it as a dependency of its own
//! (`cargo add serde --features derive`).

pub use crate::runtime::data::Dataset;
pub use crate::runtime::optimizer::{AdaGrad, Adam, AdamW, RmsProp, Sgd};
pub use crate::{
    DistributedTraining as _, Gradient, LaunchOptions, Mode, Topology, Train, Worker, distributed_training,
};
pub use serde::{Deserialize, Serialize};
