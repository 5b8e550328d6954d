//! The closing account of a run: `summary.json`, and the block at the end of the terminal's output.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::git::Commit;
use super::hashes::Hashes;
use super::run_folder::SAFETENSORS;
use super::{clean, words};
use crate::topology::{Rank, Replica, Topology};

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
    /// How the workers' gradients are combined, for example `sync` or `async`, if known.
    #[serde(default)]
    pub mode: Option<String>,
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
    /// What is known of each worker, in rank order; empty if nothing was measured.
    #[serde(default)]
    pub workers: Vec<WorkerFacts>,
    /// What the program was made of.
    pub versions: Versions,
    /// Optimisation level that fairing was compiled with, if known.
    pub opt_level: Option<String>,
    /// The commit of the folder of the user's manifest, if it is in a repository.
    pub git: Option<Commit>,
    /// Of the program and its data.
    #[serde(default)]
    pub hashes: Hashes,
    /// Where the run was started.
    pub host: Host,
    /// What is in the run's folder.
    pub files: Files,
}

/// How a run ended; in JSON `"status": "succeeded"`, `"stopped"`, `"incomplete"` beside `"lost"`, or
/// `"failed"` beside a `"cause"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "lowercase")]
pub enum Status {
    /// All workers came to the end.
    Succeeded,
    /// The caller asked it to stop; what was trained until then is kept.
    Stopped,
    /// It came to its end, but without some of its workers; `"lost"` says which, and why.
    Incomplete {
        /// The workers, why they were lost, and what that cost.
        lost: String,
    },
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

/// What one worker did and waited for. All times are wall-clock seconds; what was not measured is 0.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct WorkerFacts {
    /// Which worker.
    pub rank: Rank,
    /// Steps that it finished.
    pub steps: u64,
    /// Examples that it trained on and that count.
    pub examples: u64,
    /// Examples of its part that no update contains, because it was lost before they were applied.
    pub dropped_examples: u64,
    /// Examples that it was given a second time after a restart.
    pub repeated_examples: u64,
    /// Median time of a step without the waiting for others, in seconds.
    pub step_seconds_median: f64,
    /// The time that 95 of 100 steps stay below, likewise.
    pub step_seconds_p95: f64,
    /// All time that it waited for other workers and for servers, in seconds.
    pub wait_seconds: f64,
    /// Mean over its pushes of the number of updates that happened since it had pulled; 0 in sync mode.
    pub staleness_mean: f64,
    /// The most of them.
    pub staleness_max: u64,
    /// How often it was started again.
    pub restarts: u32,
}

/// A worker whose steps take this many times the others' is worth a word.
const SLOW: f64 = 2.0;

impl WorkerFacts {
    /// What a person should know of this worker beside the others, if anything.
    fn remark(&self, all: &[WorkerFacts]) -> Option<String> {
        let mut remarks = Vec::new();
        let mut others: Vec<f64> =
            all.iter().filter(|other| other.rank != self.rank).map(|other| other.step_seconds_median).collect();
        others.sort_by(f64::total_cmp);
        if let Some(others) = median(&others).filter(|others| *others > 0.0 && self.step_seconds_median > SLOW * others)
        {
            let (own, others) = (words::short_time(self.step_seconds_median), words::short_time(others));
            remarks.push(format!("slow, {own} per step where the others take {others}"));
        }
        for (examples, what) in [(self.dropped_examples, "dropped"), (self.repeated_examples, "repeated")] {
            if examples > 0 {
                let plural = if examples == 1 { "" } else { "s" };
                remarks.push(format!("{} example{plural} {what}", words::thousands(examples)));
            }
        }
        match self.restarts {
            0 => {}
            1 => remarks.push("restarted once".to_owned()),
            restarts => remarks.push(format!("restarted {restarts} times")),
        }
        (!remarks.is_empty()).then(|| remarks.join("; "))
    }
}

/// Of sorted numbers.
fn median(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        len if len % 2 == 1 => Some(sorted[middle]),
        _ => Some(sorted[middle - 1].midpoint(sorted[middle])),
    }
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
    /// The same in the form that programs in other languages read.
    #[serde(default)]
    pub safetensors: Option<PathBuf>,
    /// The page that shows the run.
    #[serde(default)]
    pub report: Option<PathBuf>,
    /// The folder of the files for TensorBoard.
    #[serde(default)]
    pub tensorboard: Option<PathBuf>,
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
        let named = |wanted: &str| inside.iter().find(|name| *name == Path::new(wanted)).cloned();
        let is_model = |name: &&PathBuf| {
            let other_form = name.extension().is_some_and(|extension| extension == SAFETENSORS);
            name.file_stem().is_some_and(|stem| stem == "model") && !other_form
        };
        Self {
            model: inside.iter().find(is_model).cloned(),
            safetensors: named(&format!("model.{SAFETENSORS}")),
            report: named("report.html"),
            tensorboard: named("tensorboard"),
            metrics: named("metrics.jsonl"),
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
            Status::Incomplete { lost } => {
                rows.push(("lost".to_owned(), lost.clone()));
                format!("{name} trained by {topology} in {time}, but not by all of them to the end")
            }
            Status::Failed { cause } => {
                rows.push(("cause".to_owned(), cause.clone()));
                format!("{name} failed after {time}, with {topology}")
            }
        };
        rows.extend(self.metrics.iter().map(|(name, value)| (clean::plain(name), words::number(*value))));
        let remarks = self.workers.iter().filter_map(|worker| Some((worker.rank, worker.remark(&self.workers)?)));
        rows.extend(remarks.map(|(rank, remark)| (Replica::worker(rank.0).to_string(), remark)));
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
        if let Some(report) = &self.files.report {
            row("report", &folder.join(report));
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
            mode: Some("sync".into()),
            seed: 0,
            hyperparameters: serde_json::json!({"epochs": 5, "learning_rate": 1e-3}),
            started: UNIX_EPOCH + Duration::from_millis(1_767_323_045_250),
            seconds: 9.8,
            phases: phases.map(|(name, seconds)| Phase { name: name.into(), seconds }).into(),
            examples: 300_000,
            examples_per_second: Some(32_967.03),
            metrics: [("loss".to_owned(), 0.31214), ("accuracy".to_owned(), 0.8659)].into(),
            workers: Vec::new(),
            versions: Versions { fairing: "0.1.0".into(), rustc: Some("1.95.0".into()), burn: Some("0.22.1".into()) },
            opt_level: Some("3".into()),
            git: Some(Commit { id: "0123456789abcdef0123456789abcdef01234567".into(), dirty: Some(false) }),
            hashes: Hashes { program: Some("ab".repeat(32)), data: None },
            host: Host { os: "linux".into(), arch: "x86_64".into(), cpus: 2 },
            files: Files {
                model: Some("model.bpk".into()),
                safetensors: Some("model.safetensors".into()),
                report: Some("report.html".into()),
                tensorboard: Some("tensorboard".into()),
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
                  report     target/fairing/runs/FashionMnist-20260102-030405-a1b2/report.html
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
                  report     /project/target/fairing/runs/FashionMnist-20260102-030405-a1b2/report.html
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
                  report     target/fairing/runs/FashionMnist-20260102-030405-a1b2/report.html
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
                  report             target/fairing/runs/FashionMnist-20260102-030405-a1b2/report.html
                  run folder         target/fairing/runs/FashionMnist-20260102-030405-a1b2
            "#]],
        );
    }

    #[test]
    fn a_worker_is_named_if_there_is_something_to_say() {
        let facts = |rank, step_seconds_median| WorkerFacts {
            rank: Rank(rank),
            steps: 10,
            examples: 320,
            dropped_examples: 0,
            repeated_examples: 0,
            step_seconds_median,
            step_seconds_p95: 2.0 * step_seconds_median,
            wait_seconds: 1.0,
            staleness_mean: 0.0,
            staleness_max: 0,
            restarts: 0,
        };
        let workers = vec![
            facts(0, 0.0123),
            WorkerFacts { dropped_examples: 1, repeated_examples: 1_234, restarts: 1, ..facts(1, 0.010) },
            facts(2, 0.0247),
            facts(3, 0.0112),
        ];
        let summary = Summary { workers, metrics: BTreeMap::new(), phases: Vec::new(), ..summary() };
        check(
            &summary,
            "/project",
            expect![[r#"
                FashionMnist trained by 2 workers + 1 parameter server in 9.8 s
                  worker 1   1 example dropped; 1,234 examples repeated; restarted once
                  worker 2   slow, 24.7 ms per step where the others take 11.2 ms
                  model      target/fairing/runs/FashionMnist-20260102-030405-a1b2/model.bpk
                  report     target/fairing/runs/FashionMnist-20260102-030405-a1b2/report.html
                  run folder target/fairing/runs/FashionMnist-20260102-030405-a1b2
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
              "mode": "sync",
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
              "workers": [],
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
              "hashes": {
                "program": "abababababababababababababababababababababababababababababababab",
                "data": null
              },
              "host": {
                "os": "linux",
                "arch": "x86_64",
                "cpus": 2
              },
              "files": {
                "model": "model.bpk",
                "safetensors": "model.safetensors",
                "report": "report.html",
                "tensorboard": "tensorboard",
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
        let lost = "worker 1".to_owned();
        for status in [Status::Succeeded, Status::Stopped, Status::Incomplete { lost }, Status::Failed { cause }] {
            let mut written = Summary { status, ..summary() };
            written.metrics.insert("diverged".into(), f64::INFINITY);
            let json = serde_json::to_string(&written).unwrap();
            assert_eq!(serde_json::from_str::<Summary>(&json).unwrap(), written);
        }
    }

    #[test]
    fn a_summary_without_the_newer_fields_can_be_read() {
        let mut json = serde_json::to_value(summary()).unwrap();
        let fields = json.as_object_mut().unwrap();
        for name in ["mode", "workers", "hashes"] {
            fields.remove(name).unwrap();
        }
        let files = fields["files"].as_object_mut().unwrap();
        for name in ["safetensors", "report", "tensorboard"] {
            files.remove(name).unwrap();
        }
        let read: Summary = serde_json::from_value(json).unwrap();
        let files = Files { safetensors: None, report: None, tensorboard: None, ..summary().files };
        assert_eq!(read, Summary { mode: None, hashes: Hashes::default(), files, ..summary() });
    }

    #[test]
    fn files_are_found() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("logs")).unwrap();
        let names =
            ["model.bpk", "model.safetensors", "report.html", "metrics.jsonl", "logs/worker-0.log", "logs/ps-0.log"];
        for name in names {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let expected = Files {
            model: Some("model.bpk".into()),
            safetensors: Some("model.safetensors".into()),
            report: Some("report.html".into()),
            tensorboard: None,
            metrics: Some("metrics.jsonl".into()),
            logs: vec!["logs/ps-0.log".into(), "logs/worker-0.log".into()],
        };
        assert_eq!(Files::list(folder.path()), expected);
        assert_eq!(Files::list(&folder.path().join("absent")), Files::default());
    }
}
