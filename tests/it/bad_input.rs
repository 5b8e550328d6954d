//! What cannot work is refused by name, with the remedy, and leaves nothing that looks whole.

use std::path::{Path, PathBuf};

use crate::run::{Ended, Laws, SMALL, summary};

/// The run did not end well, says all of `parts`, and left no model and no summary that claims success.
#[track_caller]
fn refused(ended: &Ended, parts: &[&str]) {
    let error = ended.stderr();
    assert_eq!(ended.output.status.code(), Some(1), "{error}");
    for part in parts {
        assert!(error.contains(part), "no `{part}` in:\n{error}");
    }
    assert!(!error.contains("panicked"), "{error}");
    // Replicas that still wait for others are ended by the launcher, which is no news and never the cause.
    assert!(!error.contains("SIGKILL"), "{error}");
    for folder in ended.folders() {
        let names = names(&folder);
        assert!(!names.iter().any(|name| name.starts_with("model") || name.contains(".tmp")), "{names:?}");
        let summary = summary(&folder);
        assert_eq!(summary["status"], "failed", "{summary}");
    }
}

/// As [`refused`], before anything is started: not even a folder is left.
#[track_caller]
fn refused_at_once(ended: &Ended, parts: &[&str]) {
    refused(ended, parts);
    assert_eq!(names(ended.runs.path()), [""; 0]);
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[track_caller]
fn mistake(name: &str, parts: &[&str]) {
    let ended = Laws::new(&["bad", name]).run();
    refused(&ended, parts);
    assert_eq!(ended.folders().len(), 1);
}

#[test]
fn a_data_folder_that_is_missing_is_named_with_its_layer() {
    let ended = Laws::new(&["absent"]).run();
    refused_at_once(&ended, &["no-such-folder` is no folder", "`data` in the attribute", "FAIRING_DATA"]);
    let ended = Laws::new(&["absent"]).env("FAIRING_DATA", "nor/this").run();
    refused_at_once(&ended, &["nor/this` is no folder", "FAIRING_DATA"]);
}

/// A copy of the data set in which `damage` has changed one file.
fn damaged(name: &str, damage: impl Fn(&Path)) -> Ended {
    let whole = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fairing-examples/data/fashion-mnist");
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(whole).unwrap() {
        let entry = entry.unwrap();
        let copy = folder.path().join(entry.file_name());
        if entry.file_name() == name {
            std::fs::copy(entry.path(), &copy).unwrap();
            damage(&copy);
        } else {
            std::os::unix::fs::symlink(entry.path(), &copy).unwrap();
        }
    }
    Laws::new(&["images"]).env("FAIRING_DATA", folder.path()).run()
}

#[test]
fn a_damaged_data_set_comes_home_in_the_loaders_words() {
    let labels = "train-labels-idx1-ubyte.gz";
    let truncated = damaged(labels, |path| {
        let bytes = std::fs::read(path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    });
    refused(&truncated, &["worker ", labels, "is cut off"]);
    let missing = damaged(labels, |path| std::fs::remove_file(path).unwrap());
    refused(&missing, &["worker ", "train-labels-idx1-ubyte"]);
    let wrong = damaged("t10k-labels-idx1-ubyte.gz", |path| std::fs::write(path, "no data").unwrap());
    refused(&wrong, &["worker ", "t10k-labels-idx1-ubyte.gz"]);
}

#[test]
fn what_train_does_wrong_is_named_with_its_remedy() {
    mistake(
        "more_workers_than_examples",
        &["1 examples cannot be shared by 2 workers", "lower `workers` to at most 1"],
    );
    mistake("empty_batch", &["a batch size of 0 makes no steps; pass at least 1"]);
    mistake("step_before_join", &["`worker.step` needs a joined model; call `worker.join(model, optimizer)` first"]);
    mistake("join_twice", &["`worker.join` was called twice"]);
    mistake("learning_rate_nan", &["the learning rate is NaN; it must be a finite number"]);
    mistake("learning_rate_differs", &["it stepped with learning rate", "0.25", "0.5", "all workers need the same"]);
}

#[test]
fn a_model_that_cannot_be_trained_is_named_with_its_remedy() {
    mistake("no_tensor", &["the model has no trained parameter"]);
    mistake("nothing_to_train", &["the model has no trained parameter", "`require_grad`"]);
    mistake("half_precision", &["`0.weight` is `f16`, but only `f32` can be trained", "`no_grad()`"]);
    mistake("double_precision", &["`0.weight` is `f64`, but only `f32` can be trained", "cast it"]);
    mistake("no_autodiff", &["`0.weight` is on a device without gradients", "worker.device()"]);
    mistake("model_differs", &["its model differs from that of worker", "`0.weight` [2, 1]", "`0.weight` [2, 2]"]);
    mistake("optimizer_differs", &["it joined with", "momentum: Some(0.5)", "momentum: None"]);
    mistake("optimizer_impossible", &["`weight_decay` of `Sgd` is NaN"]);
}

#[test]
fn a_runs_folder_that_cannot_be_written_is_named() {
    let base = tempfile::tempdir().unwrap();
    let file = base.path().join("file");
    std::fs::write(&file, "").unwrap();
    // Permissions would not stop a test that runs as root; these places stop everybody.
    for runs in [file.clone(), file.join("below"), "/proc/fairing".into()] {
        let ended = Laws::law(&SMALL, 1, 1, 0).env("FAIRING_RUNS", &runs).run();
        let name = format!("cannot create run folder `{}", runs.display());
        refused_at_once(&ended, &[&name, "set FAIRING_RUNS to a folder that can be written", "os error"]);
    }
}

#[test]
fn a_variable_that_does_not_exist_is_suggested() {
    let ended = Laws::law(&SMALL, 1, 1, 0).env("FAIRING_WORKER", "3").run();
    refused_at_once(&ended, &["unknown variable `FAIRING_WORKER`; did you mean `FAIRING_WORKERS`?"]);
}

#[test]
fn every_mistake_of_file_and_variables_is_listed_at_once() {
    let project = tempfile::tempdir().unwrap();
    std::fs::write(project.path().join("Fairing.toml"), "wrokers = 2\nps = -1\n").unwrap();
    let ended = Laws::law(&SMALL, 1, 1, 0)
        .env("CARGO_MANIFEST_DIR", project.path())
        .env("FAIRING_SEED", "minus one")
        .env("FAIRING_SEEED", "1")
        .run();
    let parts = [
        "invalid configuration, 4 problems",
        "Fairing.toml:1: unknown key `wrokers`; did you mean `workers`?",
        "Fairing.toml:2: `ps` is -1; expected a whole number from 0",
        "unknown variable `FAIRING_SEEED`; did you mean `FAIRING_SEED`?",
        "FAIRING_SEED: `seed` is \"minus one\"",
    ];
    refused_at_once(&ended, &parts);
}

#[test]
fn settings_that_do_not_go_together_are_refused_with_the_places_of_both() {
    let project = tempfile::tempdir().unwrap();
    std::fs::write(project.path().join("Fairing.toml"), "mode = \"sync\"\n").unwrap();
    let ended = Laws::law(&SMALL, 2, 0, 0)
        .env("CARGO_MANIFEST_DIR", project.path())
        .env("FAIRING_STALENESS", "4")
        .env("FAIRING_REJOIN", "30s")
        .run();
    let parts = [
        "invalid configuration, 2 problems",
        "FAIRING_STALENESS: `staleness` has no meaning with `mode = \"sync\"` (`mode` is set by ",
        "Fairing.toml:1)",
        "FAIRING_REJOIN: `rejoin` needs a parameter server",
        "set `ps = 1` (`ps` is set by LaunchOptions)",
    ];
    refused_at_once(&ended, &parts);
    for (variable, value, setting) in
        [("FAIRING_MODE", "async", "`mode = \"async\"`"), ("FAIRING_STALENESS", "0", "`staleness`")]
    {
        let ended = Laws::law(&SMALL, 2, 0, 0).env(variable, value).run();
        let message =
            format!("{variable}: {setting} needs a parameter server; set `ps = 1` (`ps` is set by LaunchOptions)");
        refused_at_once(&ended, &[&message]);
    }
}

#[test]
fn a_mode_or_a_duration_that_cannot_be_meant_is_refused() {
    let ended = Laws::law(&SMALL, 1, 1, 0)
        .env("FAIRING_MODE", "asynch")
        .env("FAIRING_REJOIN", "2h")
        .env("FAIRING_STALENESS", "-1");
    let parts = [
        "FAIRING_MODE: `mode` is \"asynch\"; expected \"sync\" or \"async\"; did you mean \"async\"?",
        "FAIRING_REJOIN: `rejoin` is \"2h\"; expected at most \"1h\"",
        "FAIRING_STALENESS: `staleness` is \"-1\"; expected a whole number from 0",
    ];
    refused_at_once(&ended.run(), &parts);
}

#[test]
fn a_temporary_folder_with_too_long_a_path_is_named() {
    let base = tempfile::tempdir().unwrap();
    let long = base.path().join("long".repeat(25));
    std::fs::create_dir(&long).unwrap();
    let ended = Laws::law(&SMALL, 1, 1, 0).env("TMPDIR", &long).run();
    refused_at_once(&ended, &["longer than", "set TMPDIR to a shorter path"]);
    assert_eq!(names(&long), [""; 0]);
}
