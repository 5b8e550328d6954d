//! What a run survives: lost, frozen and slow workers.

use std::thread;
use std::time::Duration;

use fairing_core::{DistributedTraining as _, Topology};
use fairing_tests::law::{Kind, Law, Rule};

use crate::support::{Ended, Program, Running, Signal};

/// Four epochs of twenty steps, slow enough to be disturbed in the middle.
const LAW: Law = Law {
    kind: Kind::Cnn,
    rule: Rule::Adam,
    examples: 240,
    epochs: 4,
    batch_size: 12,
    learning_rate: 0.01,
    pause_ms: 20,
};

const FROZEN: &str = "warning: worker 1 was lost: nothing was heard of it for 10s (frozen, or its machine is)";

/// Starts `law` with two workers and two servers, and waits for its second epoch.
#[track_caller]
fn in_second_epoch(law: &Law, settings: &[(&str, &str)]) -> Running {
    second_epoch(Program::law(law, 2, 2), law, settings)
}

#[track_caller]
fn second_epoch(program: Program, law: &Law, settings: &[(&str, &str)]) -> Running {
    let program = settings.iter().fold(program, |program, (name, value)| program.env(name, value));
    let mut running = program.start();
    running.wait_for(&format!("epoch 1/{}  loss", law.epochs));
    running
}

/// Checks that a run that was disturbed has trained what an undisturbed one trains, to the bit.
#[track_caller]
fn trained_as_if_nothing_had_been(law: &Law, ended: Ended) {
    let at_once = Law { pause_ms: 0, ..law.clone() };
    let undisturbed = at_once.train_in_memory(Topology::new(2, 2)).unwrap();
    let ended = ended.code(0).nothing_left();
    assert_eq!(ended.own_lines(), [format!("fingerprint {}", undisturbed.model.fingerprint())]);
    let summary = ended.summary();
    assert_eq!(
        (summary["status"].as_str(), summary["examples"].as_u64()),
        (Some("succeeded"), Some((law.epochs * law.examples) as u64))
    );
}

/// Checks that a run came to its end without worker 1, and says so.
#[track_caller]
fn incomplete(ended: Ended, reason: &str) -> Ended {
    let ended = ended.code(1).nothing_left();
    assert_eq!(ended.summary()["status"], "incomplete");
    assert!(ended.has_model());
    ended.says(&format!("Error: the run is incomplete: worker 1 was lost ({reason}"))
}

#[test]
fn killed_worker_is_started_again_and_no_bit_differs() {
    for rank in [0, 1] {
        let mut running = in_second_epoch(&LAW, &[("FAIRING_REJOIN", "30s")]);
        running.signal_replica("worker", rank, Signal::KILL);
        running.wait_for(&format!("worker {rank} was ended by signal 9 (SIGKILL)"));
        running.wait_for(&format!("warning: worker {rank} was lost: its process ended without a goodbye"));
        running.wait_for(&format!("warning: worker {rank} is started again"));
        trained_as_if_nothing_had_been(&LAW, running.end());
    }
}

#[test]
fn worker_killed_again_within_the_time_fails_the_run() {
    let law = Law { epochs: 20, ..LAW };
    let mut running = in_second_epoch(&law, &[("FAIRING_REJOIN", "30s")]);
    let first = running.replica("worker", 1);
    running.signal_replica("worker", 1, Signal::KILL);
    running.wait_for("worker 1 is started again");
    running.wait_for("epoch 3/20  loss");
    assert_ne!(running.replica("worker", 1), first);
    running.signal_replica("worker", 1, Signal::KILL);
    let ended = running.end().code(1).nothing_left();
    assert_eq!(ended.summary()["status"], "failed");
    ended.says("cause: worker 1, Lost, Some(Signal(9))").says("Error: worker 1 was lost in round ").says(
        "its process ended without a goodbye, again within 30s of its restart; it was ended by signal 9 (SIGKILL)",
    );
}

/// It is killed for its place, and another process takes it.
#[test]
fn frozen_worker_is_replaced_and_no_bit_differs() {
    let mut running = in_second_epoch(&LAW, &[("FAIRING_REJOIN", "30s")]);
    running.signal_replica("worker", 1, Signal::STOP);
    running.wait_for(FROZEN);
    running.wait_for("warning: worker 1 is started again");
    let ended = running.end().never_says("its process ended without a goodbye").never_says("SIGKILL");
    let start = ended.summary()["phases"][0].clone();
    assert_eq!(start["name"], "start");
    assert!(start["seconds"].as_f64() < Some(10.0), "it joined again, but the run had long begun: {start}");
    trained_as_if_nothing_had_been(&LAW, ended);
}

#[test]
fn worker_that_is_frozen_for_less_than_its_lease_is_waited_for() {
    let running = in_second_epoch(&LAW, &[]);
    running.signal_replica("worker", 1, Signal::STOP);
    thread::sleep(Duration::from_secs(4));
    running.signal_replica("worker", 1, Signal::CONT);
    trained_as_if_nothing_had_been(&LAW, running.end().never_says("warning"));
}

/// Without `rejoin` the others of an async run go on. The frozen one is ended, so that it can neither wake up and disturb
/// them nor keep the end of the run waiting.
#[test]
fn frozen_worker_does_not_disturb_an_async_run() {
    let law = Law { epochs: 35, ..LAW };
    let mut running = in_second_epoch(&law, &[("FAIRING_MODE", "async")]);
    running.signal_replica("worker", 1, Signal::STOP);
    running.wait_for(FROZEN);
    running.wait_for_processes(4);
    incomplete(running.end().says("epoch 35/35  loss").never_says("SIGKILL"), "nothing was heard of it for 10s");
}

#[test]
fn async_run_goes_on_without_a_killed_worker() {
    let mut running = in_second_epoch(&LAW, &[("FAIRING_MODE", "async")]);
    running.signal_replica("worker", 1, Signal::KILL);
    running.wait_for("warning: worker 1 was lost: its process ended without a goodbye");
    let ended = running.end().says("epoch 4/4  loss").never_says("is started again");
    let ended = incomplete(ended, "its process ended without a goodbye");
    let dropped = ended.summary()["workers"][1]["dropped_examples"].as_u64().unwrap();
    assert!((1..=360).contains(&dropped), "{dropped} of its 360 examples after the first epoch");
    ended.says(&format!("and about {dropped} examples that were its part were not trained on"));
}

#[test]
fn interrupt_after_a_loss_stops_an_async_run_as_any_other() {
    let law = Law { epochs: 1000, ..LAW };
    let mut running = in_second_epoch(&law, &[("FAIRING_MODE", "async")]);
    running.signal_replica("worker", 1, Signal::KILL);
    running.wait_for("warning: worker 1 was lost: its process ended without a goodbye");
    running.signal(Signal::INT);
    let ended = running.end().code(130).nothing_left();
    assert_eq!(ended.summary()["status"], "stopped");
    assert!(ended.has_model());
}

#[test]
fn async_run_takes_a_worker_back() {
    let mut running = in_second_epoch(&LAW, &[("FAIRING_MODE", "async"), ("FAIRING_REJOIN", "30s")]);
    running.signal_replica("worker", 1, Signal::KILL);
    running.wait_for("warning: worker 1 is started again");
    let ended = running.end().code(0).nothing_left().says("restarted once");
    ended.says_once("warning: worker 1 is started again");
    let summary = ended.summary();
    assert_eq!(summary["status"], "succeeded");
    let worker = &summary["workers"][1];
    assert_eq!((worker["restarts"].as_u64(), worker["dropped_examples"].as_u64()), (Some(1), Some(0)), "{worker}");
    assert_eq!((worker["steps"].as_u64(), worker["examples"].as_u64()), (Some(80), Some(480)), "{worker}");
}

/// Its second process never says hello: an async run waits for it in vain and then goes on, a sync run fails.
#[test]
fn worker_that_does_not_come_back_is_given_up() {
    let law = Law { epochs: 10, ..LAW };
    for mode in ["sync", "async"] {
        let program = Program::law(&law, 2, 2).argument("--once");
        let running = second_epoch(program, &law, &[("FAIRING_MODE", mode), ("FAIRING_REJOIN", "1s")]);
        running.signal_replica("worker", 1, Signal::KILL);
        let ended = running.end().nothing_left();
        match mode {
            "sync" => ended
                .code(1)
                .says("Error: worker 1 was lost in round ")
                .says("it was lost and nobody took its place within 1s"),
            _ => incomplete(ended, "nobody took its place within 1s")
                .says("warning: worker 1 was lost: nobody took its place within 1s")
                .says("epoch 10/10  loss"),
        };
    }
}

#[test]
fn worker_killed_again_after_the_time_is_started_again_too() {
    let law = Law { epochs: 10, ..LAW };
    let mut running = in_second_epoch(&law, &[("FAIRING_REJOIN", "1s")]);
    running.signal_replica("worker", 1, Signal::KILL);
    running.wait_for("epoch 6/10  loss");
    running.signal_replica("worker", 1, Signal::KILL);
    trained_as_if_nothing_had_been(&law, running.end());
}

#[test]
fn lost_worker_does_not_keep_an_interrupt_waiting() {
    let law = Law { epochs: 1000, ..LAW };
    let mut running = in_second_epoch(&law, &[("FAIRING_REJOIN", "30s")]);
    running.signal_replica("worker", 1, Signal::KILL);
    running.wait_for("warning: worker 1 is started again");
    running.signal(Signal::INT);
    let ended = running.end().code(130).nothing_left();
    assert_eq!(ended.summary()["status"], "stopped");
    assert!(ended.has_model());
}

#[test]
fn slow_worker_is_named_while_it_runs() {
    let mut running = Program::fixture("uneven").start();
    running.wait_for("warning: worker 1 is slow: it computes ");
    running.end().code(0).nothing_left().says(" ms per step, the others ").never_says("worker 0 is slow");
}
