//! What the program `laws` tells the test that started it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What a run brought home, as seen through `Outcome`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The run's folder.
    pub folder: PathBuf,
    /// The model's file.
    pub model: PathBuf,
    /// Bits of all parameters and running statistics of the model that `Outcome::load` gave.
    pub loaded: Vec<u32>,
    /// Last value of the metric `loss`.
    pub loss: f64,
    /// The error for a metric that does not exist.
    pub unknown_metric: String,
    /// The error for the file loaded into another model.
    pub other_model: String,
}
