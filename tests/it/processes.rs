//! The ways in which a program launches, and what arrives in its replicas.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::nn::Linear;
use fairing_core::RunError;
use fairing_core::prelude::*;
use fairing_tests::line;

use crate::support::Program;

/// Checks a line like `slope 2.998` for about the right number.
#[track_caller]
fn about(line: &str, name: &str, expected: f64) {
    let value = line.strip_prefix(name).and_then(|rest| rest.trim().parse::<f64>().ok());
    assert!(value.is_some_and(|value| (value - expected).abs() < 0.02), "{line} instead of {name} {expected}");
}

#[test]
fn two_types_of_one_program_are_told_apart() {
    let ended = Program::fixture("two-types").run().code(0).nothing_left();
    assert_eq!(ended.stdout_of("worker 0"), ["up with a text", "down with -7"]);
    assert_eq!(ended.stdout_of("worker 2"), ["down with -7"]);
    let [up, down] = ended.own_lines()[..] else { panic!("{:?}", ended.own_lines()) };
    about(up, "up", 1.0);
    about(down, "down", -1.0);
}

#[test]
fn one_type_launched_three_times_trains_each_value() {
    let ended = Program::fixture("three-values").run().code(0).nothing_left();
    let [first, second, third] = ended.own_lines()[..] else { panic!("{:?}", ended.own_lines()) };
    about(first, "slope", 1.0);
    about(second, "slope", -2.0);
    about(third, "slope", 3.0);
    assert_eq!(ended.summary()["hyperparameters"]["slope"], 3.0);
}

#[test]
fn main_may_print_change_directory_and_run_in_a_runtime() {
    let ended = Program::fixture("busy-main").run().code(0).nothing_left();
    let [speaks, slope, runtime, directory] = ended.own_lines()[..] else { panic!("{:?}", ended.own_lines()) };
    assert_eq!([speaks, runtime, directory], ["main speaks", "runtime works", "directory /"]);
    about(slope, "slope", 4.0);
    assert_eq!(ended.stdout_of("worker 0"), ["main speaks"]);
}

#[test]
fn training_here_and_in_memory_starts_no_process() {
    let ended = Program::fixture("in-process").run().code(0).nothing_left();
    let [here, memory, asked] = ended.own_lines()[..] else { panic!("{:?}", ended.own_lines()) };
    about(here, "here", 2.0);
    about(memory, "memory", 2.0);
    about(asked, "asked", 2.0);
    assert_eq!(ended.stderr(), "");
    assert!(!ended.run_folder().exists());
}

#[test]
fn train_may_wait_for_a_thread_that_computes_with_rayon() {
    Program::fixture("prefetch").run().code(0).nothing_left();
}

#[test]
fn started_run_is_waited_for() {
    let ended = Program::fixture("start-and-wait").run().code(0).nothing_left();
    let [started, slope] = ended.own_lines()[..] else { panic!("{:?}", ended.own_lines()) };
    assert!(started.starts_with("started line-"), "{started}");
    about(slope, "slope", 2.0);
}

#[test]
fn stopped_run_is_an_outcome_of_wait() {
    let ended = Program::fixture("start-and-stop").run().code(0).nothing_left();
    assert_eq!(ended.own_lines(), ["stopped true"]);
    assert_eq!(ended.summary()["status"], "stopped");
}

#[test]
fn main_knows_whether_it_is_in_a_replica() {
    let ended = Program::fixture("in-replica").run().code(0).nothing_left();
    assert_eq!(ended.own_lines()[0], "in_replica false");
    for replica in ["ps 0", "worker 0", "worker 1"] {
        assert_eq!(ended.stdout_of(replica), ["in_replica true"]);
    }
}

#[test]
fn two_types_of_one_name_are_refused_with_both_places() {
    let ended = Program::fixture("twins").run().code(1).nothing_left();
    assert!(!ended.run_folder().exists());
    let source = include_str!("../src/bin/fixture.rs");
    let lines = source.lines().enumerate();
    let places = lines.filter(|(_, line)| line.trim() == "#[distributed_training]").map(|(index, _)| index + 1);
    let [first, second] = places.collect::<Vec<_>>()[..] else { panic!("the fixture has two twins") };
    let place = |line| format!("tests/src/bin/fixture.rs:{line}");
    ended.says(&format!(
        "two annotated types are called `fixture::twins::Twin` ({} and {}); rename one",
        place(first),
        place(second)
    ));
}

#[test]
fn type_of_a_library_crate_is_launched_from_another_package() {
    let ended = Program::fixture("library").run().code(0).nothing_left();
    about(ended.own_lines()[0], "slope", 0.5);
}

#[test]
fn value_arrives_bit_by_bit() {
    let ended = Program::fixture("exact-value").run().code(0).nothing_left();
    let sent = ended.own_lines()[0].strip_prefix("sent ").unwrap();
    assert!(sent.contains("7ff8000000000000, 7ff0000000000000, fff0000000000000, 8000000000000000"), "{sent}");
    let got = ended.stdout_of("worker 0");
    assert_eq!(got.iter().find_map(|line| line.strip_prefix("got ")), Some(sent));
}

#[test]
fn executable_replaced_while_running_still_launches() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("program");
    // Not copied: a process that another test starts meanwhile could still hold the copy open for writing.
    fs::hard_link(env!("CARGO_BIN_EXE_fixture"), &path).unwrap();
    let mut running = Program::fixture_at(&path, "wait-then-launch").start();
    running.wait_for("ready");
    let other = folder.path().join("other");
    fs::write(&other, "not a program").unwrap();
    fs::rename(&other, &path).unwrap();
    running.write_line();
    let ended = running.end().code(0).nothing_left();
    about(ended.own_lines()[1], "slope", 1.0);
}

#[test]
fn replica_finds_what_was_named_and_nothing_else() {
    let program = Program::fixture("surroundings").argument("two words").argument("").argument("*");
    let program =
        program.env("NAMED", "a = b").env("OTHER", "secret").env("RUST_LOG", "info").env("RUST_BACKTRACE", "0");
    let ended = program.run().code(0).nothing_left().never_says("secret");
    let cores = std::thread::available_parallelism().unwrap().get();
    let threads = (cores / 2).max(1);
    for worker in ["worker 0", "worker 1"] {
        let lines = ended.stdout_of(worker);
        let with = |prefix: &str| lines.iter().filter_map(|line| line.strip_prefix(prefix)).collect::<Vec<_>>();
        assert_eq!(with("stdin "), ["0 bytes"]);
        assert_eq!(with("threads "), [threads.to_string()]);
        let mut variables = with("variable ");
        variables.retain(|variable| !variable.starts_with("FAIRING_PLACEMENT_"));
        // Of the machine's own, the loader's search path alone is passed on, which cargo sets.
        variables.retain(|variable| !variable.starts_with("LD_LIBRARY_PATH="));
        variables.sort_unstable();
        let rayon = format!("RAYON_NUM_THREADS={threads}");
        let expected = ["MIMALLOC_PURGE_DELAY=1000", "NAMED=a = b", &rayon, "RUST_BACKTRACE=0", "RUST_LOG=info"];
        assert_eq!(variables, expected);
        let arguments = with("argument ");
        assert_eq!(arguments[0], "\"--marker\"");
        assert_eq!(arguments[2..], ["\"surroundings\"", "\"two words\"", "\"\"", "\"*\""]);
    }
}

#[test]
fn lines_of_replicas_come_with_their_name_to_their_stream_and_into_the_log() {
    let ended = Program::fixture("lines").run().code(0).nothing_left();
    for rank in 0..2 {
        let worker = format!("worker {rank}");
        assert_eq!(ended.stdout_of(&worker), ["to stdout", "no end of stdout"]);
        let errors = ended.stderr();
        let prefix = format!("{worker} | ");
        let errors: Vec<_> = errors.lines().filter_map(|line| line.strip_prefix(&prefix)).collect();
        assert!(errors.contains(&"to stderr") && errors.contains(&"no end of stderr"), "{errors:?}");
        let log = fs::read_to_string(ended.run_folder().join(format!("logs/worker-{rank}.log"))).unwrap();
        let mut lines: Vec<_> = log.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["no end of stderr", "no end of stdout", "to stderr", "to stdout"]);
    }
}

/// Trains, and leaves a file for each process in which it did.
#[distributed_training(workers = 2, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Traced {
    folder: PathBuf,
}

impl Train for Traced {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        fs::write(self.folder.join(format!("worker-{}", worker.rank())), arguments.join(" "))?;
        line::fit(worker, 1.0, 5)
    }
}

/// What [`any_other_test`] leaves in a replica of `launcher`.
fn trace(launcher: u32) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("other-test-in-replica-of-{launcher}"))
}

/// Stands for all other tests of this program.
#[test]
fn any_other_test() {
    if fairing_core::in_replica() {
        fs::write(trace(std::os::unix::process::parent_id()), "").unwrap();
    }
}

#[test]
fn launch_in_a_test_runs_no_other_test_in_the_replicas() {
    let folder = tempfile::tempdir().unwrap();
    let _ = fs::remove_file(trace(std::process::id()));
    let traced = Traced { folder: folder.path().to_owned() };
    let outcome = traced.launch_with(LaunchOptions::new().runs(folder.path().join("runs"))).unwrap();
    assert!((outcome.metric("slope").unwrap() - 1.0).abs() < 0.02);
    for rank in 0..2 {
        let arguments = fs::read_to_string(folder.path().join(format!("worker-{rank}"))).unwrap();
        let name = "processes::launch_in_a_test_runs_no_other_test_in_the_replicas";
        assert_eq!(arguments, format!("{name} --exact --nocapture --test-threads=1"));
    }
    assert!(!trace(std::process::id()).exists());
}

#[test]
fn launch_from_another_thread_of_a_test_names_train_in_memory() {
    let launching = std::thread::spawn(|| Traced { folder: PathBuf::new() }.launch());
    let error = launching.join().unwrap().unwrap_err();
    assert!(matches!(error, RunError::UnknownTest), "{error}");
    assert!(error.to_string().contains("or use `train_in_memory`, which starts no process"), "{error}");
}

/// libtest gives a test its own thread also where only one test runs at a time.
#[test]
fn launch_in_a_test_needs_no_second_test_thread() {
    // The program started here runs the other test only, so nothing is started without end.
    let ended = Program::new(&std::env::current_exe().unwrap())
        .argument("launch_in_a_test_runs_no_other_test_in_the_replicas")
        .argument("--test-threads=1")
        .run();
    ended.code(0).nothing_left().says("1 passed");
}

#[test]
fn crate_outside_the_workspace_trains_and_is_told_of_its_profile() {
    let built = build_outside();
    let ended = Program::new(&built).run().code(0).nothing_left();
    about(ended.own_lines()[0], "slope", 3.0);
    assert!(ended.has_model());
    let warning = "\
warning: fairing was compiled with little or no optimisation, so training is about ten times slower than it could be. Use \
`--release`, or add to the Cargo.toml of your workspace:

    [profile.dev]
    opt-level = 1

    [profile.dev.package.\"*\"]
    opt-level = 3
";
    assert!(ended.stderr().contains(warning), "{}", ended.stderr());
}

/// Builds `tests/outside` as somebody else's crate, with the versions of this workspace, and returns its program.
fn build_outside() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let workspace = tests.parent().unwrap();
    let outside = Path::new(env!("CARGO_TARGET_TMPDIR")).join("outside");
    fs::create_dir_all(outside.join("src")).unwrap();
    let manifest = fs::read_to_string(tests.join("outside/Cargo.toml")).unwrap();
    let core = workspace.join("fairing-core");
    let moved = manifest.replace("../../fairing-core", core.to_str().unwrap());
    assert_ne!(moved, manifest, "the path of fairing-core");
    fs::write(outside.join("Cargo.toml"), moved).unwrap();
    fs::copy(tests.join("outside/src/main.rs"), outside.join("src/main.rs")).unwrap();
    // Cargo drops from it what this crate does not need.
    fs::copy(workspace.join("Cargo.lock"), outside.join("Cargo.lock")).unwrap();
    let target = outside.join("target");
    let built = Command::new(env!("CARGO"))
        .args(["build", "--offline", "--quiet", "--target-dir"])
        .arg(&target)
        .current_dir(&outside)
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    target.join("debug/outside")
}
