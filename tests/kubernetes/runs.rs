//! The command line for runs that go on without their launcher.

use super::*;

/// The command line, for this namespace.
pub(super) fn fairing_runs(namespace: &Namespace, arguments: &[&str]) -> Program {
    let program = namespace.target(Program::new(&example("fairing_runs")));
    arguments.iter().fold(program, |program, argument| program.argument(argument))
}

/// Launches a face of the fixture and leaves it to itself; its name.
fn detached(namespace: &Namespace, face: &str) -> String {
    let program = namespace.target(Program::fixture(face)).env("FAIRING_DETACH", "1").env("FAIRING_ANOTHER", "1");
    // Some are there at once, beside those of another test: none waits for room on the node.
    let program = program.env("FAIRING_WORKER_MEMORY", "256Mi").env("FAIRING_PS_MEMORY", "256Mi");
    let ended = program.run().code(0);
    assert_eq!(ended.own_lines().len(), 1, "{:?}", ended.own_lines());
    ended.own_lines()[0].to_owned()
}

#[test]
fn a_command_line_that_cannot_be_meant_and_a_run_that_is_not_there_are_named() {
    let namespace = Namespace::new();
    let runs = |arguments: &[&str]| fairing_runs(&namespace, arguments).run();
    let help = runs(&["--help"]).code(0).says("FAIRING_NAMESPACE");
    for command in ["list", "attach", "stop", "delete", "logs", "sweep"] {
        help.says_once(&format!("  {command} "));
        runs(&[command, "--help"]).code(0).says(&format!("Usage: fairing_runs {command}"));
    }
    for arguments in [&[] as &[&str], &["lists"], &["attach"], &["list", "more"]] {
        runs(arguments).code(2).says("Usage: fairing_runs");
    }
    runs(&["logs", "run", "boss", "0"]).code(2).says("[possible values: worker, ps]");
    runs(&["list"]).code(0).says("no runs");
    runs(&["sweep"]).code(0).says("nothing was left of earlier runs in the namespace");
    for arguments in [
        &["attach", "nowhere"] as &[&str],
        &["stop", "nowhere"],
        &["delete", "nowhere"],
        &["logs", "nowhere", "ps", "0"],
    ] {
        let text = format!("there is no run `nowhere` in the namespace `{}` (it has none", namespace.name);
        runs(arguments).code(1).says(&text);
    }
    namespace.is_empty();
}

#[test]
fn a_run_is_listed_read_stopped_deleted_and_swept_by_its_name() {
    let namespace = Namespace::new();
    let runs = |arguments: &[&str]| fairing_runs(&namespace, arguments).run();
    let endless = detached(&namespace, "endless");
    runs(&["list"]).code(0).says(&endless).says("Endless").says("alive");
    // With what is said instead, if it does not come.
    let log = || {
        let ended = runs(&["logs", &endless, "worker", "1"]);
        (ended.stdout().map(str::to_owned).collect::<Vec<_>>(), ended.stderr())
    };
    wait_for(log, |(log, _)| log.iter().any(|line| line == "training"));
    runs(&["logs", &endless, "ps", "0"]).code(0);
    runs(&["logs", &endless, "worker", "7"]).code(1).says(&format!("worker 7 of the run `{endless}` has no pod"));
    runs(&["delete", "nowhere"]).code(1).says(&format!("(it has {endless}"));
    let list = || runs(&["list"]).code(0).stdout().map(str::to_owned).collect::<Vec<_>>();
    let has_failed = |run: &str| {
        wait_for(list, |lines| lines.iter().any(|line| line.contains(run) && line.contains("failed (")));
    };
    // Another one fails beside it, and what is left of that is swept.
    let failing = detached(&namespace, "fault error 1");
    has_failed(&failing);
    runs(&["attach", &failing]).code(1).says("worker 1 returned an error").says("the disk is full");
    let failing = detached(&namespace, "fault error 1");
    has_failed(&failing);
    let swept = runs(&["sweep"]).code(0).says(&format!("removed what the run `{failing}` had left"));
    swept.says(&format!("left the run `{endless}` alone: it is alive"));
    // Whoever wants it to stop has a success of it, and the result.
    let stopped = runs(&["stop", &endless]).code(0).says("evaluated ").says("model ");
    assert!(stopped.has_model());
    namespace.is_empty();
    let deleted = detached(&namespace, "endless");
    runs(&["delete", &deleted]).code(0).says(&format!("removed the run `{deleted}`"));
    namespace.is_empty();
}

/// The image of the fixture, where the cluster gets it.
pub(super) fn pushed_image(namespace: &Namespace) -> String {
    let run = detached(namespace, "endless");
    let path = "jsonpath={.items[0].spec.template.spec.containers[0].image}";
    let image = namespace.kubectl(&["get", "jobs", "--output", path]);
    fairing_runs(namespace, &["delete", &run]).run().code(0);
    namespace.is_empty();
    image
}
