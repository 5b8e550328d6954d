//! What a training program needs: `use fairing_core::prelude::*;`.

pub use crate::runtime::data::Dataset;
pub use crate::runtime::optimizer::{Adam, AdamW, Sgd};
pub use crate::{DistributedTraining as _, Gradient, LaunchOptions, Topology, Train, Worker, distributed_training};
pub use serde::{Deserialize, Serialize};
