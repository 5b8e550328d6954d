//! However a run ends, the caller learns why and nothing is left.

use std::fs;

use fairing_tests::law::{Kind, Law, Rule};

use crate::support::{Ended, Program, Running, Signal};

/// Runs a face in which `replica` fails, and checks all that is promised of every failed run.
#[track_caller]
fn failed(face: &str, replica: &str) -> Ended {
    let ended = Program::fixture(face).run().code(1).nothing_left();
    let ended = ended.says(&format!("cause: {replica}, ")).says(&format!("last lines of {replica}:"));
    assert_eq!(ended.summary()["status"], "failed");
    assert!(!ended.has_model());
    ended
}

#[test]
fn panic_is_told_with_its_place() {
    failed("fault panic 1", "worker 1")
        .says("worker 1 panicked in round 20: in round 20 on purpose (tests/src/bin/fixture.rs:")
        .says("| worker 1 is about to fail")
        .says("Some(Code(101))");
}

#[test]
fn panic_before_the_workers_have_joined_is_told() {
    failed("fault panic-before-join 0", "worker 0")
        .says("Error: worker 0 panicked: before join on purpose (tests/src/bin/fixture.rs:")
        .says("Some(Code(101))");
}

#[test]
fn error_of_the_user_is_told_with_its_causes() {
    failed("fault error 1", "worker 1")
        .says("Error: worker 1 returned an error in round 20: cannot read example 7: the disk is full")
        .says("  | worker 1 is about to fail")
        .says("Some(Code(64))");
}

#[test]
fn number_that_is_not_finite_is_told_with_its_tensor() {
    failed("fault nan 1", "worker 1")
        .says("Error: worker 1 computed a number that is not finite in round 20: the gradient of `weight`")
        .says("Some(Code(69))");
}

/// Neither model is the right one, so whichever comes second is the cause.
#[test]
fn other_model_is_told_with_the_tensor() {
    Program::fixture("fault layout 1")
        .run()
        .code(1)
        .nothing_left()
        .says(", Layout, Some(Code(65))")
        .says("has a model that cannot be trained here")
        .says("`weight` [1, 1] f32 trained")
        .says("`weight` [1, 2] f32 trained");
}

#[test]
fn return_in_the_middle_is_told() {
    failed("fault return-early 1", "worker 1")
        .says("it finished training after 20 rounds while other workers go on")
        .says("Some(Code(66))");
}

#[test]
fn exit_in_the_middle_is_told_with_its_code() {
    for (face, code) in [("fault exit-zero 1", 0), ("fault exit-three 1", 3)] {
        failed(face, "worker 1")
            .says("Error: worker 1 was lost in round ")
            .says(&format!("; it exited with code {code}"))
            .says("  | worker 1 is about to fail");
    }
}

#[test]
fn signal_of_its_own_is_told() {
    failed("fault abort 1", "worker 1").says("; it was ended by signal 6 (SIGABRT)");
}

#[test]
fn the_others_of_a_failed_run_are_not_blamed() {
    failed("fault panic 1", "worker 1")
        .says("worker 1 exited with code 101")
        .never_says("worker 0 exited")
        .never_says("ps 0 exited");
}

/// All replicas do the same, so whichever is first is the cause.
#[track_caller]
fn never_launched(face: &str) -> Ended {
    let ended =
        Program::fixture(face).run().code(1).nothing_left().says("did not reach `launch()`").says("NeverLaunched");
    assert_eq!(ended.summary()["status"], "failed");
    ended.says("skip what only the caller needs").says("last lines of ")
}

#[test]
fn main_that_returns_before_launch_is_told() {
    never_launched("return-before-launch").says("  | nothing to be done here").says("; it exited with code 0");
}

#[test]
fn main_that_fails_before_launch_is_told() {
    never_launched("fail-before-launch").says("  | Error: no such database").says("; it exited with code 1");
}

#[test]
fn main_that_panics_before_launch_is_told() {
    never_launched("panic-before-launch").says("  | not in a replica").says("; it exited with code 101");
}

/// A run that has trained at least one round, as its launcher knows.
#[track_caller]
fn in_training(face: &str) -> Running {
    trains(Program::fixture(face))
}

/// The same without a server process: both workers own half of the parameters, and worker 0 coordinates.
#[track_caller]
fn in_training_without_servers() -> Running {
    let running = trains(Program::fixture("endless").env("FAIRING_PS", "0"));
    assert_eq!(running.processes(), 3, "the launcher and two workers");
    running
}

#[track_caller]
fn trains(program: Program) -> Running {
    let mut running = program.start();
    running.wait_for("worker 0 | training");
    running.wait_for("worker 0 | epoch 1/");
    running
}

#[test]
fn killed_worker_is_named() {
    let running = in_training("endless");
    running.signal_replica("worker", 1, Signal::KILL);
    running
        .end()
        .code(1)
        .nothing_left()
        .says("cause: worker 1, Lost, Some(Signal(9))")
        .says("Error: worker 1 was lost in round ")
        .says("; it was ended by signal 9 (SIGKILL)");
}

#[test]
fn killed_coordinator_is_named() {
    let running = in_training("endless");
    running.signal_replica("ps", 0, Signal::KILL);
    running
        .end()
        .code(1)
        .nothing_left()
        .says("cause: ps 0, Lost, Some(Signal(9))")
        .says("; it was ended by signal 9 (SIGKILL)");
}

#[test]
fn killed_second_server_is_named() {
    let running = in_training("endless");
    running.signal_replica("ps", 1, Signal::KILL);
    running
        .end()
        .code(1)
        .nothing_left()
        .says("cause: ps 1, Lost, Some(Signal(9))")
        .says("; it was ended by signal 9 (SIGKILL)");
}

#[test]
fn stopped_worker_is_named_when_its_lease_has_run_out() {
    let running = in_training("endless");
    running.signal_replica("worker", 1, Signal::STOP);
    running
        .end()
        .code(1)
        .nothing_left()
        // That the launcher ended it then is no part of the story.
        .says("cause: worker 1, Lost, None")
        .never_says("SIGKILL")
        .says("nothing was heard of it for 10")
        .says("(frozen, or its machine is)");
}

#[test]
fn launcher_killed_in_training_leaves_nothing() {
    let running = in_training("endless");
    assert_eq!(running.processes(), 5);
    running.signal(Signal::KILL);
    running.end().signalled(Signal::KILL).nothing_stays();
}

#[test]
fn launcher_killed_before_launch_in_a_replica_leaves_nothing() {
    let mut running = Program::fixture("sleep-before-launch").start();
    for replica in ["ps 0", "worker 0", "worker 1"] {
        running.wait_for(&format!("{replica} | asleep"));
    }
    assert_eq!(running.processes(), 4);
    running.signal(Signal::KILL);
    running.end().signalled(Signal::KILL).nothing_stays();
}

#[test]
fn launcher_killed_with_a_child_of_a_replica_alive_leaves_nothing() {
    let running = in_training("endless --child");
    assert_eq!(running.processes(), 6);
    running.signal(Signal::KILL);
    running.end().signalled(Signal::KILL).nothing_stays();
}

#[test]
fn child_of_a_replica_ends_with_the_run() {
    let running = in_training("endless --child");
    running.signal(Signal::INT);
    running.end().code(130).nothing_left();
}

#[test]
fn dropped_run_leaves_nothing() {
    let mut running = Program::fixture("start-and-drop").start();
    running.wait_for("dropped");
    assert_eq!(running.processes(), 1);
    running.end().code(0).nothing_left();
}

/// Checks what a run keeps that was asked to stop.
#[track_caller]
fn stopped(ended: Ended) {
    let ended = ended.code(130).nothing_left().says("stopping after this round");
    let summary = ended.summary();
    assert_eq!(summary["status"], "stopped");
    assert!(summary["examples"].as_u64() > Some(0), "{summary}");
    assert_eq!(summary["metrics"]["evaluated"], 250.432, "three parts of 256 and one of 232, weighted by their sizes");
    assert!(ended.has_model());
    assert!(fs::read_to_string(ended.run_folder().join("metrics.jsonl")).unwrap().contains("evaluated"));
}

#[test]
fn interrupt_finishes_the_round_evaluates_and_saves() {
    let running = in_training("endless");
    running.signal(Signal::INT);
    stopped(running.end());
}

#[test]
fn interrupt_of_the_whole_group_does_not_reach_the_replicas() {
    let running = in_training("endless");
    running.signal_group(Signal::INT);
    stopped(running.end());
}

#[test]
fn second_interrupt_kills() {
    let mut running = in_training("endless --stubborn");
    running.signal(Signal::INT);
    running.wait_for("worker 0 | evaluating");
    running.signal(Signal::INT);
    let ended = running.end().code(130).nothing_left();
    assert!(!ended.has_model());
    assert_eq!(ended.summary()["status"], "failed");
}

#[test]
fn interrupt_before_training_ends_everything() {
    let mut running = Program::fixture("sleep-before-launch").start();
    running.wait_for("worker 0 | asleep");
    running.signal(Signal::INT);
    let ended = running.end().code(130).nothing_left();
    assert!(!ended.has_model());
}

#[test]
fn killed_worker_takes_its_share_of_the_parameters_with_it() {
    for rank in [0, 1] {
        let running = in_training_without_servers();
        running.signal_replica("worker", rank, Signal::KILL);
        running
            .end()
            .code(1)
            .nothing_left()
            .says(&format!("cause: worker {rank}, Lost, Some(Signal(9))"))
            .says(&format!("Error: worker {rank} was lost"))
            .says("; it was ended by signal 9 (SIGKILL)")
            .never_says(&format!("worker {} exited", 1 - rank));
    }
}

#[test]
fn interrupt_without_servers_finishes_the_round_evaluates_and_saves() {
    let running = in_training_without_servers();
    running.signal(Signal::INT);
    stopped(running.end());
}

/// 2,690 parameters of 4 bytes, and 24 lines of metrics.
const LOPSIDED: Law = Law {
    kind: Kind::Lopsided,
    rule: Rule::Momentum,
    examples: 48,
    epochs: 3,
    batch_size: 12,
    learning_rate: 0.01,
    pause_ms: 0,
};

#[test]
fn full_disk_is_told_with_the_file_after_training_to_the_end() {
    // The short training leaves no room for both forms of its model, the long one fills the disk with metrics. How much of
    // them waits in memory, and so which file is the first that does not fit, depends on time.
    for (kilobytes, epochs, file) in [(20, 3, "/model."), (8, 30, "/runs/law-")] {
        let law = Law { epochs, ..LOPSIDED };
        let Some(program) = Program::law(&law, 2, 1).with_disk_of(kilobytes) else { return };
        let ended = program.run().code(1).nothing_left();
        assert_eq!(ended.own_lines().len(), 0, "there is no outcome");
        let told = ended.stderr();
        let error = told.lines().find(|line| line.starts_with("Error: cannot write")).expect(&told);
        assert!(error.contains(file), "{error}");
        let warning = error.replace("Error", "warning");
        assert!(told.contains(&format!("{warning}: No space left on device")), "{told}");
        ended.says(&format!("epoch {epochs}/{epochs}  loss"));
    }
}
