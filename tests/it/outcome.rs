//! What a run leaves in its folder, and what `Outcome` gives of it.

use std::process::Command;

use burn::module::Module as _;
use burn::prelude::*;
use fairing_tests::law::{Law, Rule};
use fairing_tests::plain;
use serde_json::Value;

use crate::run::{Laws, SMALL, summary};

fn metrics(folder: &std::path::Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    assert!(text.ends_with('\n'));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn series<'a>(metrics: &'a [Value], name: &'a str) -> impl Iterator<Item = &'a Value> {
    metrics.iter().filter(move |metric| metric["name"] == name)
}

#[test]
fn the_model_is_a_file_that_burn_loads() {
    let ended = Laws::law(&SMALL, 2, 1, 3).run();
    let report = ended.report();
    let burns = SMALL.kind.model(0, &Device::flex()).load_file(&report.model);
    let burns: Vec<u32> = plain::flat(&burns).into_iter().map(f32::to_bits).collect();
    assert!(burns == report.loaded, "burn's own loader and `Outcome::load` differ");
    assert!(report.other_model.starts_with("cannot load the model from `"), "{}", report.other_model);
}

#[test]
fn the_loss_is_the_mean_by_examples_over_the_ranks() {
    let law = Law { examples: 41, rule: Rule::Adam, ..SMALL };
    let ended = Laws::law(&law, 3, 2, 0).run();
    let report = ended.report();
    let metrics = metrics(&report.folder);
    let steps = 2 * 41_usize.div_ceil(12);
    assert_eq!(series(&metrics, "loss").count(), steps);
    for (step, (loss, examples)) in series(&metrics, "loss").zip(series(&metrics, "examples")).enumerate() {
        assert_eq!(loss["round"], step);
        assert_eq!(loss["epoch"], step / 4);
        let numbers = |metric: &Value| -> Vec<f64> {
            metric["ranks"].as_array().unwrap().iter().map(|rank| rank.as_f64().unwrap()).collect()
        };
        let (losses, examples) = (numbers(loss), numbers(examples));
        let weighted: f64 = losses.iter().zip(&examples).map(|(loss, examples)| loss * examples).sum();
        let mean = weighted / examples.iter().sum::<f64>();
        assert!((loss["value"].as_f64().unwrap() - mean).abs() < 1e-12, "step {step}");
    }
    assert_eq!(report.loss, series(&metrics, "loss").last().unwrap()["value"].as_f64().unwrap());
}

#[test]
fn the_summary_says_what_was_trained_with_what() {
    let ended = Laws::law(&SMALL, 2, 2, 9).run();
    let folder = ended.report().folder;
    let summary = summary(&folder);
    assert_eq!(summary["status"], "succeeded");
    assert_eq!(summary["type_name"], "Law");
    assert_eq!(summary["run"], folder.file_name().unwrap().to_str().unwrap());
    assert_eq!(summary["topology"]["workers"], 2, "{summary}");
    assert_eq!(summary["topology"]["ps"], 2, "{summary}");
    assert_eq!(summary["seed"], 9);
    assert_eq!(summary["hyperparameters"], serde_json::to_value(SMALL).unwrap());
    assert_eq!(summary["examples"], 2 * 37);
    assert_eq!(summary["versions"]["burn"], "0.22.1", "{summary}");
    assert!(summary["versions"]["rustc"].as_str().unwrap().contains("1.95"), "{summary}");
    assert!(summary["versions"]["fairing"].is_string());
    assert_eq!(summary["files"]["model"], "model.bpk");
    assert_eq!(summary["files"]["metrics"], "metrics.jsonl");

    let phases = summary["phases"].as_array().unwrap();
    let names: Vec<_> = phases.iter().map(|phase| phase["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["start", "join", "train", "evaluate and save"]);
    let total: f64 = phases.iter().map(|phase| phase["seconds"].as_f64().unwrap()).sum();
    let seconds = summary["seconds"].as_f64().unwrap();
    assert!((total - seconds).abs() < 0.01, "the phases make {total} s, the run {seconds} s");
}

#[test]
fn the_summary_names_the_commit_of_the_project() {
    let project = tempfile::tempdir().unwrap();
    let git = |arguments: &[&str]| {
        let identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"];
        let output = Command::new("git").args(identity).args(arguments).current_dir(project.path()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    git(&["init", "--quiet"]);
    git(&["commit", "--quiet", "--allow-empty", "--message", "first"]);
    let commit = git(&["rev-parse", "HEAD"]);
    let ended = Laws::law(&SMALL, 1, 1, 0).env("CARGO_MANIFEST_DIR", project.path()).run();
    let summary = summary(&ended.report().folder);
    assert!(summary["git"].to_string().contains(&commit), "{}", summary["git"]);
}

#[test]
fn latest_is_the_newest_run() {
    let first = Laws::law(&SMALL, 1, 1, 0).run();
    let link = first.runs.path().join("latest").canonicalize().unwrap();
    assert_eq!(link, first.report().folder.canonicalize().unwrap());
}

#[test]
fn an_unknown_metric_lists_the_known_ones() {
    let report = Laws::law(&SMALL, 1, 1, 0).run().report();
    assert_eq!(report.unknown_metric, "no metric `los` was recorded (recorded: loss, examples, fingerprint)");
}

#[test]
fn numbers_that_json_does_not_have_break_no_file() {
    let ended = Laws::new(&["bad", "none"]).run();
    assert!(ended.output.status.success(), "{}", ended.stderr());
    let folder = &ended.folders()[0];
    let summary = summary(folder);
    assert_eq!(summary["status"], "succeeded");
    assert_eq!(summary["metrics"]["not a number"], "NaN");
    assert!(summary["hyperparameters"].as_object().unwrap().contains_key("learning_rate"), "{summary}");
    assert_eq!(metrics(folder).last().unwrap()["value"], "NaN");
}
