//! What other programs make of a run's files: TensorBoard's own package reads the event files.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;
use serde_json::Value;

use crate::run::{Laws, SMALL, folders, summary};

/// Prints what the package finds in a folder: by tag all steps, times and values, and the texts.
const READER: &str = r#"
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "tensors": 0})
found.Reload()
text = lambda tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode()
scalars = {tag: [[e.step, e.wall_time, repr(e.value)] for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
json.dump({"scalars": scalars, "texts": {tag: text(tag) for tag in found.Tags()["tensors"]}}, sys.stdout)
"#;

/// What [`READER`] prints.
#[derive(Deserialize)]
struct Found {
    /// Step, seconds since 1970, and the value as Python shows it, since JSON has no NaN.
    scalars: BTreeMap<String, Vec<(u64, f64, String)>>,
    texts: BTreeMap<String, String>,
}

/// A Python that has the package, if there is one.
#[track_caller]
fn python() -> Option<PathBuf> {
    let python = std::env::var_os("TENSORBOARD_PYTHON").map(PathBuf::from);
    let works = |python: &PathBuf| {
        let import = Command::new(python).args(["-c", "import tensorboard"]).output();
        import.is_ok_and(|output| output.status.success())
    };
    let python = python.filter(works);
    if python.is_none() {
        let how = "`python3 -m venv DIR && DIR/bin/pip install tensorboard`, then TENSORBOARD_PYTHON=DIR/bin/python";
        let skipped = format!("skipped: no Python with the package tensorboard ({how}; `.ci/run` does this by itself)");
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{skipped}");
        // libtest shows what the macros print of failed tests only.
        std::io::stderr().write_all(format!("{skipped}\n").as_bytes()).unwrap();
    }
    python
}

#[track_caller]
fn read(python: &Path, folder: &Path) -> Found {
    let output = Command::new(python).args(["-c", READER]).arg(folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn metrics(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A value of `metrics.jsonl`.
fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| value.as_str().unwrap().parse().unwrap())
}

/// Compares one folder of event files with the values that it should have, `None` for a metric without one.
#[track_caller]
fn agree(found: &Found, metrics: &[Value], value: impl Fn(&Value) -> Option<f64>) {
    let mut expected: BTreeMap<String, Vec<(u64, f32)>> = BTreeMap::new();
    for metric in metrics {
        if let Some(value) = value(metric) {
            let name = metric["name"].as_str().unwrap().to_owned();
            expected.entry(name).or_default().push((metric["round"].as_u64().unwrap(), value as f32));
        }
    }
    let bits = |values: &[(u64, f32)]| -> Vec<(u64, u32)> {
        values.iter().map(|(step, value)| (*step, if value.is_nan() { 0x7fc0_0000 } else { value.to_bits() })).collect()
    };
    assert!(!expected.is_empty());
    assert_eq!(found.scalars.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, expected) in &expected {
        let values: Vec<(u64, f32)> =
            found.scalars[name].iter().map(|(step, _, value)| (*step, value.parse::<f64>().unwrap() as f32)).collect();
        assert_eq!(bits(&values), bits(expected), "{name}");
    }
}

#[test]
fn tensorboard_reads_what_metrics_jsonl_holds() {
    let Some(python) = python() else { return };
    let begin = seconds();
    let ended = Laws::law(&SMALL, 3, 1, 5).run();
    let folder = ended.report().folder;
    let end = seconds();
    let metrics = metrics(&folder);
    let run = read(&python, &folder.join("tensorboard/run"));
    agree(&run, &metrics, |metric| Some(number(&metric["value"])));
    for rank in 0..3 {
        let worker = read(&python, &folder.join(format!("tensorboard/worker-{rank}")));
        agree(&worker, &metrics, |metric| Some(&metric["ranks"][rank]).filter(|value| !value.is_null()).map(number));
    }
    let times: Vec<f64> = run.scalars["loss"].iter().map(|(_, time, _)| *time).collect();
    assert!(times.is_sorted() && begin <= times[0] && times[times.len() - 1] <= end, "{begin} {times:?} {end}");
    assert!(run.texts["hyperparameters"].contains("\"batch_size\": 12"), "{:?}", run.texts);
    assert!(run.texts["summary"].contains("Law trained by 3 workers + 1 parameter server"), "{:?}", run.texts);
}

#[test]
fn tensorboard_reads_what_is_no_number() {
    let Some(python) = python() else { return };
    let ended = Laws::new(&["bad", "none"]).run();
    let folder = &ended.folders()[0];
    let run = read(&python, &folder.join("tensorboard/run"));
    assert_eq!(run.scalars["not a number"].last().unwrap().2, "nan");
    agree(&run, &metrics(folder), |metric| Some(number(&metric["value"])));
}

#[test]
fn every_run_has_a_report_and_hashes() {
    let ended = Laws::law(&SMALL, 2, 1, 3).run();
    let folder = ended.report().folder;
    let summary = summary(&folder);
    assert_eq!(summary["files"]["report"], "report.html");
    assert_eq!(summary["files"]["tensorboard"], "tensorboard");
    let program = summary["hashes"]["program"].as_str().unwrap();
    assert_eq!(program, hash(Path::new(env!("CARGO_BIN_EXE_laws"))));
    let page = std::fs::read_to_string(folder.join("report.html")).unwrap();
    let fingerprint = summary["metrics"]["fingerprint"].as_f64().unwrap();
    for part in ["succeeded", "worker 1", "model.bpk", "batch_size", program, &format!("{fingerprint:.3e}")] {
        assert!(page.contains(part), "no `{part}` in the report");
    }
}

#[test]
fn the_report_of_a_failed_run_names_the_cause() {
    let ended = Laws::new(&["bad", "learning_rate_nan"]).run();
    let all = folders(ended.runs.path());
    let page = std::fs::read_to_string(all[0].join("report.html")).unwrap();
    let cause = summary(&all[0])["cause"].as_str().unwrap().to_owned();
    let first = cause.lines().next().unwrap().replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&#39;");
    assert!(page.contains("class=\"status failed\"") && page.contains(&first), "no `{first}` in {page}");
}

/// Since 1970.
fn seconds() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64()
}

fn hash(path: &Path) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(std::fs::read(path).unwrap()).iter().map(|byte| format!("{byte:02x}")).collect()
}
