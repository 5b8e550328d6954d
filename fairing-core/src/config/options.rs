//! The last layer: settings in code.

use std::path::PathBuf;
use std::time::Duration;

use super::{Resources, Target};
use crate::topology::Mode;

/// Settings of one launch in code: the layer that wins over all others.
///
/// A relative folder is meant from the current folder. What is not set here comes from the layers below.
///
/// # Example
///
/// ```
/// use fairing_core::config::{LaunchOptions, Resources};
///
/// let options = LaunchOptions::new()
///     .workers(4)
///     .seed(7)
///     .env(["HF_HOME"])
///     .worker_resources(Resources { cpu: Some("1.5".parse()?), memory: Some("2Gi".parse()?) });
/// # Ok::<(), fairing_core::config::UnitError>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
#[must_use = "options do nothing until a launch gets them"]
pub struct LaunchOptions {
    pub(super) workers: Option<u32>,
    pub(super) ps: Option<u32>,
    pub(super) mode: Option<Mode>,
    pub(super) rejoin: Option<Duration>,
    pub(super) seed: Option<u64>,
    pub(super) env: Option<Vec<String>>,
    pub(super) data: Option<PathBuf>,
    pub(super) target: Option<Target>,
    pub(super) runs: Option<PathBuf>,
    pub(super) worker: Resources,
    pub(super) ps_resources: Resources,
}

impl LaunchOptions {
    /// Options that change nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of workers; 0 is refused when the run is launched.
    pub fn workers(self, workers: u32) -> Self {
        Self { workers: Some(workers), ..self }
    }

    /// Number of parameter servers. With 0, every worker also hosts the server of its share of the parameters.
    pub fn ps(self, ps: u32) -> Self {
        Self { ps: Some(ps), ..self }
    }

    /// When a worker's gradient is applied, in place of both `mode` and `staleness` of the layers below.
    ///
    /// What is not [`Mode::Sync`] needs a parameter server; without one it is refused when the run is launched.
    pub fn mode(self, mode: Mode) -> Self {
        Self { mode: Some(mode), ..self }
    }

    /// How long the run is held for a lost worker, which is started again; with zero it is not.
    ///
    /// More than an hour, and any time above zero without a parameter server, is refused when the run is launched. What is
    /// below a millisecond is dropped.
    pub fn rejoin(self, rejoin: Duration) -> Self {
        Self { rejoin: Some(rejoin), ..self }
    }

    /// Seed of the initial parameters, of the data order and of the framework's generator.
    pub fn seed(self, seed: u64) -> Self {
        Self { seed: Some(seed), ..self }
    }

    /// Names of the variables that the replicas see, in place of those of the layers below.
    pub fn env<I, S>(self, names: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        Self { env: Some(names.into_iter().map(Into::into).collect()), ..self }
    }

    /// The folder behind `worker.data_dir()`.
    pub fn data(self, folder: impl Into<PathBuf>) -> Self {
        Self { data: Some(folder.into()), ..self }
    }

    /// Where the replicas run.
    pub fn target(self, target: Target) -> Self {
        Self { target: Some(target), ..self }
    }

    /// The folder that gets a folder for each run.
    pub fn runs(self, folder: impl Into<PathBuf>) -> Self {
        Self { runs: Some(folder.into()), ..self }
    }

    /// What a worker asks for; a part that is `None` stays as the layers below have it.
    pub fn worker_resources(self, resources: Resources) -> Self {
        Self { worker: resources, ..self }
    }

    /// What a parameter server asks for; a part that is `None` stays as the layers below have it.
    pub fn ps_resources(self, resources: Resources) -> Self {
        Self { ps_resources: resources, ..self }
    }
}
