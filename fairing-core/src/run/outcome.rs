//! What a run brought home.

use std::path::{Path, PathBuf};

use crate::observe::metrics::Metrics;
use crate::observe::report::{Status, Summary};
use crate::observe::run_folder::RunFolder;
use crate::runtime::Model;

/// The result of a run: model, metrics and summary, all in the run's folder.
#[derive(Debug, Clone)]
pub struct Outcome {
    folder: PathBuf,
    model: PathBuf,
    metrics: Metrics,
    summary: Summary,
}

/// Failure to get something out of an [`Outcome`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutcomeError {
    /// No metric of this name was recorded.
    #[error("no metric `{name}` was recorded (recorded: {known})")]
    NoMetric {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// The model's file cannot be loaded into this model.
    #[error("cannot load the model from `{}`: {reason}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// The framework's words.
        reason: String,
    },
}

impl Outcome {
    pub(super) fn new(folder: RunFolder, extension: &str, metrics: Metrics, summary: Summary) -> Self {
        Self { model: folder.model(extension), folder: folder.path().to_owned(), metrics, summary }
    }

    /// The last value of a metric, for example of the accuracy.
    ///
    /// # Errors
    ///
    /// [`OutcomeError::NoMetric`] with the names that there are.
    pub fn metric(&self, name: &str) -> Result<f64, OutcomeError> {
        last(&self.metrics, name)
    }

    /// All metrics of all rounds.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The file of the trained model, as the framework's own loader reads it.
    pub fn model(&self) -> &Path {
        &self.model
    }

    /// The trained model as a safetensors file, for programs in other languages; `None` if it could not be written so.
    pub fn safetensors(&self) -> Option<PathBuf> {
        self.summary.files.safetensors.as_ref().map(|file| self.folder.join(file))
    }

    /// The trained model, loaded into `model`, which gives the shape.
    ///
    /// # Errors
    ///
    /// [`OutcomeError::Load`] if the file is gone, or of another model.
    pub fn load<M: Model>(&self, model: M) -> Result<M, OutcomeError> {
        model.load(&self.model).map_err(|reason| OutcomeError::Load { path: self.model.clone(), reason })
    }

    /// The run's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Topology, seed, times, versions.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Whether the run ended early because the caller asked it to.
    pub fn is_stopped(&self) -> bool {
        self.summary.status == Status::Stopped
    }
}

pub(super) fn last(metrics: &Metrics, name: &str) -> Result<f64, OutcomeError> {
    metrics.last(name).ok_or_else(|| {
        let known = metrics.names().join(", ");
        let known = if known.is_empty() { "none".to_owned() } else { known };
        OutcomeError::NoMetric { name: name.to_owned(), known }
    })
}
