//! Starts the program `laws` and looks at what it left behind.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use fairing_tests::law::{Kind, Law, Rule};
use fairing_tests::report::Report;
use tempfile::TempDir;

/// A small training: 37 examples by 12 are three steps and a last batch of one.
pub(crate) const SMALL: Law = Law {
    kind: Kind::Odd,
    rule: Rule::Momentum,
    examples: 37,
    epochs: 2,
    batch_size: 12,
    learning_rate: 0.05,
    pause_ms: 0,
};

/// The program, with a runs folder of its own.
pub(crate) struct Laws {
    pub(crate) command: Command,
    pub(crate) runs: TempDir,
}

/// A run that has ended.
pub(crate) struct Ended {
    pub(crate) output: Output,
    pub(crate) runs: TempDir,
}

impl Laws {
    pub(crate) fn new(arguments: &[&str]) -> Self {
        let runs = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_laws"));
        command.args(arguments).stdin(Stdio::null()).env("FAIRING_RUNS", runs.path());
        Self { command, runs }
    }

    pub(crate) fn law(law: &Law, workers: u32, ps: u32, seed: u64) -> Self {
        let numbers = [workers.to_string(), ps.to_string(), seed.to_string()];
        Self::new(&["law", &serde_json::to_string(law).unwrap(), &numbers[0], &numbers[1], &numbers[2]])
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn run(mut self) -> Ended {
        Ended { output: self.command.output().unwrap(), runs: self.runs }
    }
}

impl Ended {
    pub(crate) fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }

    /// What the program found in the outcome of a run that succeeded.
    #[track_caller]
    pub(crate) fn report(&self) -> Report {
        assert!(self.output.status.success(), "{}\n{}", self.output.status, self.stderr());
        serde_json::from_slice(&self.output.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout()))
    }

    /// The folders of all runs.
    pub(crate) fn folders(&self) -> Vec<PathBuf> {
        folders(self.runs.path())
    }
}

/// The folders in `runs`, without the link to the newest.
pub(crate) fn folders(runs: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(runs).unwrap().map(|entry| entry.unwrap());
    entries.filter(|entry| entry.file_type().unwrap().is_dir()).map(|entry| entry.path()).collect()
}

/// The summary in a run's folder.
#[track_caller]
pub(crate) fn summary(folder: &Path) -> serde_json::Value {
    let text = std::fs::read(folder.join("summary.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}
