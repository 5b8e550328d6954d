//! The closing account of a run: `summary.json`, and the block at the end of the terminal's output.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::git::Commit;
use super::{clean, words};
use crate::topology::Topology;

/// What is known of a run when it is over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Name of the run, as in its folder's.
    pub run: String,
    /// The annotated type without its path, for example `FashionMnist`.
    pub type_name: String,
    /// How it ended.
    #[serde(flatten)]
    pub status: Status,
    /// Who took part.
    pub topology: Topology,
    /// Seed of data order, initial parameters and the process-wide generator.
    pub seed: u64,
    /// The user's value, as every replica got it.
    pub hyperparameters: serde_json::Value,
    /// When `launch()` was called; RFC 3339, UTC, in JSON.
    #[serde(with = "rfc3339")]
    pub started: SystemTime,
    /// From `launch()` to the end, in seconds.
    pub seconds: f64,
    /// Its parts, in the order of time.
    pub phases: Vec<Phase>,
    /// Examples that all workers together trained on.
    pub examples: u64,
    /// Of the training phase; absent if nothing was trained.
    pub examples_per_second: Option<f64>,
    /// Last value of each metric.
    #[serde(with = "super::float::map")]
    pub metrics: BTreeMap<String, f64>,
    /// What the program was made of.
    pub versions: Versions,
    /// Optimisation level that fairing was compiled with, if known.
    pub opt_level: Option<String>,
    /// The commit of the folder of the user's manifest, if it is in a repository.
    pub git: Option<Commit>,
    /// Where the run was started.
    pub host: Host,
    /// What is in the run's folder.
    pub files: Files,
}

/// How a run ended; in JSON `"status": "succeeded"`, `"stopped"`, or `"failed"` beside a `"cause"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "lowercase")]
pub enum Status {
    /// All workers came to the end.
    Succeeded,
    /// The caller asked it to stop; what was trained until then is kept.
    Stopped,
    /// It failed.
    Failed {
        /// The first failure, with the causes behind it.
        cause: String,
    },
}

/// A part of a run's time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// `start`, `join`, `train`, `evaluate` or `save`.
    pub name: String,
    /// How long it took.
    pub seconds: f64,
}

/// Versions of what takes part in the result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// This crate's.
    pub fairing: String,
    /// The compiler's, if known.
    pub rustc: Option<String>,
    /// burn's, if the program uses it.
    pub burn: Option<String>,
}

impl Default for Versions {
    /// This crate's version alone.
    fn default() -> Self {
        Self { fairing: env!("CARGO_PKG_VERSION").to_owned(), rustc: None, burn: None }
    }
}

/// The machine on which `launch()` was called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// For example `linux`.
    pub os: String,
    /// For example `x86_64`.
    pub arch: String,
    /// Processors that this process may use; 0 if unknown.
    pub cpus: usize,
}

impl Host {
    /// This machine.
    pub fn current() -> Self {
        Self {
            os: std::env::consts::OS.to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
        }
    }
}

/// The files of a run, relative to its folder, so that the folder can be moved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// The trained model, if there is one.
    pub model: Option<PathBuf>,
    /// The metrics, if any were recorded.
    pub metrics: Option<PathBuf>,
    /// What the replicas wrote.
    pub logs: Vec<PathBuf>,
}

impl Files {
    /// What lies in a run's folder now.
    ///
    /// Never fails: what cannot be listed is not listed.
    pub fn list(folder: &Path) -> Self {
        let names = |folder: &Path| -> Vec<PathBuf> {
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            let mut names: Vec<PathBuf> = entries.map(|entry| entry.file_name().into()).collect();
            names.sort();
            names
        };
        let inside = names(folder);
        Self {
            model: inside.iter().find(|name| name.file_stem().is_some_and(|stem| stem == "model")).cloned(),
            metrics: inside.iter().find(|name| *name == Path::new("metrics.jsonl")).cloned(),
            logs: names(&folder.join("logs")).into_iter().map(|name| Path::new("logs").join(name)).collect(),
        }
    }
}

impl Summary {
    /// The block that closes the terminal's output; several lines, each with its end.
    ///
    /// `folder` is the run's folder; paths below `current`, the caller's current folder, are shown relative to it.
    pub fn text(&self, folder: &Path, current: &Path) -> String {
        let time = words::duration(Duration::try_from_secs_f64(self.seconds).unwrap_or_default());
        let (name, topology) = (&self.type_name, self.topology);
        let mut rows = Vec::new();
        let head = match &self.status {
            Status::Succeeded => format!("{name} trained by {topology} in {time}"),
            Status::Stopped => format!("{name} stopped by the caller after {time}, trained by {topology}"),
            Status::Failed { cause } => {
                rows.push(("cause".to_owned(), cause.clone()));
                format!("{name} failed after {time}, with {topology}")
            }
        };
        rows.extend(self.metrics.iter().map(|(name, value)| (clean::plain(name), words::number(*value))));
        let column = rows.iter().map(|(name, _)| name.chars().count()).fold("run folder".len(), usize::max);

        let mut text = format!("{head}\n");
        for (name, value) in &rows {
            // A cause of several lines stays in its column. It may quote what a replica wrote.
            let lines: Vec<String> = value.trim_end().split('\n').map(clean::plain).collect();
            let value = lines.join(&format!("\n  {:column$} ", ""));
            writeln!(text, "  {name:column$} {value}").expect("a string can be written");
        }
        let phases: Vec<String> = self.phases.iter().map(|phase| self.phase(phase)).collect();
        if !phases.is_empty() {
            writeln!(text, "  {}", phases.join("   ")).expect("a string can be written");
        }
        let mut row = |name: &str, path: &Path| {
            let path = path.strip_prefix(current).unwrap_or(path).display();
            writeln!(text, "  {name:column$} {path}").expect("a string can be written");
        };
        if let Some(model) = &self.files.model {
            row("model", &folder.join(model));
        }
        row("run folder", folder);
        text
    }

    fn phase(&self, phase: &Phase) -> String {
        let time = words::duration(Duration::try_from_secs_f64(phase.seconds).unwrap_or_default());
        let rate = self.examples_per_second.filter(|rate| phase.name == TRAIN && rate.is_finite());
        let rate = rate.map(|rate| format!(" ({} examples/s)", words::thousands(rate.round() as u64)));
        format!("{} {time}{}", phase.name, rate.unwrap_or_default())
    }
}

/// The phase that [`Summary::examples_per_second`] belongs to.
const TRAIN: &str = "train";

mod rfc3339 {
    use std::time::SystemTime;

    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_rfc3339_millis(*time))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SystemTime, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_rfc3339(&text).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use expect_test::{Expect, expect};

    use super::*;

    fn summary() -> Summary {
        let phases = [("start", 0.06), ("join", 0.1), ("train", 9.1), ("evaluate", 0.2), ("save", 0.04)];
        Summary {
            run: "FashionMnist-20260102-030405-a1b2".into(),
            type_name: "FashionMnist".into(),
            status: Status::Succeeded,
            topology: Topology::new(2, 1),
            seed: 0,
            hyperparameters: serde_json::json!({"epochs": 5, "learning_rate": 1e-3}),
            started: UNIX_EPOCH + Duration::from_millis(1_767_323_045_250),
            seconds: 9.8,
            phases: phases.map(|(name, seconds)| Phase { name: name.into(), seconds }).into(),
            examples: 300_000,
            examples_per_second: Some(32_967.03),
            metrics: [("loss".to_owned(), 0.31214), ("accuracy".to_owned(), 0.8659)].into(),
            versions: Versions { fairing: "0.1.0".into(), rustc: Some("1.95.0".into()), burn: Some("0.22.1".into()) },
            opt_level: Some("3".into()),
            git: Some(Commit { id: "0123456789abcdef0123456789abcdef01234567".into(), dirty: Some(false) }),
            host: Host { os: "linux".into(), arch: "x86_64".into(), cpus: 2 },
            files: Files {
                model: Some("model.bpk".into()),
                metrics: Some("metrics.jsonl".into()),
                logs: vec!["logs/ps-0.log".into()],
            },
        }
    }

    const FOLDER: &str = "/project/target/fairing/runs/FashionMnist-20260102-030405-a1b2";

    #[track_caller]
    fn check(summary: &Summary, current: &str, expected: Expect) {
        expected.assert_eq(&summary.text(Path::new(FOLDER), Path::new(current)));
    }

    #[test]
    fn success_names_metrics_times_and_places() {
        check(
            &summary(),
            "/project",
            expect![[r#"
            FashionMnist trained by 2 workers + 1 parameter server in 9.8 s
              accuracy   0.8659
              loss       0.3121
              start 0.1 s   join 0.1 s   train 9.1 s (32,967 examples/s)   evaluate 0.2 s   save 0.0 s
              model      target/fairing/runs/FashionMnist-20260102-030405-a1b2/model.bpk
              run folder target/fairing/runs/FashionMnist-20260102-030405-a1b2
        "#]],
        );
    }

    #[test]
    fn paths_elsewhere_are_absolute() {
        let summary = Summary { metrics: BTreeMap::new(), phases: Vec::new(), ..summary() };
        check(
            &summary,
            "/other",
            expect![[r#"
            FashionMnist trained by 2 workers + 1 parameter server in 9.8 s
              model      /project/target/fairing/runs/FashionMnist-20260102-030405-a1b2/model.bpk
              run folder /project/target/fairing/runs/FashionMnist-20260102-030405-a1b2
        "#]],
        );
    }

    #[test]
    fn failure_leads_with_its_cause() {
        let mut summary = summary();
        let cause = "worker 1 exited with code 101\nlast \x1b[2Jlines:\n  thread 'main' panicked".into();
        summary.status = Status::Failed { cause };
        summary.metrics = [("loss".to_owned(), f64::NAN)].into();
        summary.files.model = None;
        summary.phases.truncate(3);
        summary.examples_per_second = None;
        check(
            &summary,
            "/project",
            expect![[r#"
            FashionMnist failed after 9.8 s, with 2 workers + 1 parameter server
              cause      worker 1 exited with code 101
                         last lines:
                           thread 'main' panicked
              loss       NaN
              start 0.1 s   join 0.1 s   train 9.1 s
              run folder target/fairing/runs/FashionMnist-20260102-030405-a1b2
        "#]],
        );
    }

    #[test]
    fn stopped_run_says_by_whom() {
        let mut summary = Summary { status: Status::Stopped, seconds: 125.0, ..summary() };
        summary.metrics.insert("a rather long name".into(), 1e-7);
        check(
            &summary,
            "/project",
            expect![[r#"
            FashionMnist stopped by the caller after 2 min 05 s, trained by 2 workers + 1 parameter server
              a rather long name 1.000e-7
              accuracy           0.8659
              loss               0.3121
              start 0.1 s   join 0.1 s   train 9.1 s (32,967 examples/s)   evaluate 0.2 s   save 0.0 s
              model              target/fairing/runs/FashionMnist-20260102-030405-a1b2/model.bpk
              run folder         target/fairing/runs/FashionMnist-20260102-030405-a1b2
        "#]],
        );
    }

    #[test]
    fn json_is_for_other_programs_too() {
        let json = serde_json::to_string_pretty(&summary()).unwrap();
        expect![[r#"
            {
              "run": "FashionMnist-20260102-030405-a1b2",
              "type_name": "FashionMnist",
              "status": "succeeded",
              "topology": {
                "workers": 2,
                "ps": 1
              },
              "seed": 0,
              "hyperparameters": {
                "epochs": 5,
                "learning_rate": 0.001
              },
              "started": "2026-01-02T03:04:05.250Z",
              "seconds": 9.8,
              "phases": [
                {
                  "name": "start",
                  "seconds": 0.06
                },
                {
                  "name": "join",
                  "seconds": 0.1
                },
                {
                  "name": "train",
                  "seconds": 9.1
                },
                {
                  "name": "evaluate",
                  "seconds": 0.2
                },
                {
                  "name": "save",
                  "seconds": 0.04
                }
              ],
              "examples": 300000,
              "examples_per_second": 32967.03,
              "metrics": {
                "accuracy": 0.8659,
                "loss": 0.31214
              },
              "versions": {
                "fairing": "0.1.0",
                "rustc": "1.95.0",
                "burn": "0.22.1"
              },
              "opt_level": "3",
              "git": {
                "id": "0123456789abcdef0123456789abcdef01234567",
                "dirty": false
              },
              "host": {
                "os": "linux",
                "arch": "x86_64",
                "cpus": 2
              },
              "files": {
                "model": "model.bpk",
                "metrics": "metrics.jsonl",
                "logs": [
                  "logs/ps-0.log"
                ]
              }
            }"#]]
        .assert_eq(&json);
    }

    #[test]
    fn json_can_be_read_back() {
        let cause = "peer silent".to_owned();
        for status in [Status::Succeeded, Status::Stopped, Status::Failed { cause }] {
            let mut written = Summary { status, ..summary() };
            written.metrics.insert("diverged".into(), f64::INFINITY);
            let json = serde_json::to_string(&written).unwrap();
            assert_eq!(serde_json::from_str::<Summary>(&json).unwrap(), written);
        }
    }

    #[test]
    fn files_are_found() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("logs")).unwrap();
        for name in ["model.bpk", "metrics.jsonl", "logs/worker-0.log", "logs/ps-0.log"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let expected = Files {
            model: Some("model.bpk".into()),
            metrics: Some("metrics.jsonl".into()),
            logs: vec!["logs/ps-0.log".into(), "logs/worker-0.log".into()],
        };
        assert_eq!(Files::list(folder.path()), expected);
        assert_eq!(Files::list(&folder.path().join("absent")), Files::default());
    }
}
