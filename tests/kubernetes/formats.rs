//! Faults under operators, which have views of their own on what is to be done.

use super::runs::fairing_runs;
use super::*;

/// What else than plain Jobs runs replicas.
const OPERATORS: [&str; 2] = ["jobset", "tfjob"];

/// The pod of a replica, whoever made it.
#[track_caller]
fn pod(namespace: &Namespace, role: &str, rank: u32) -> String {
    let index = ["batch.kubernetes.io/job-completion-index", "training.kubeflow.org/replica-index"];
    let found = index.into_iter().flat_map(|index| {
        let selector = format!("fairing.dev/role={role},{index}={rank}");
        let names = namespace.kubectl(&["get", "pods", "--selector", &selector, "--output", "name"]);
        names.lines().map(str::to_owned).collect::<Vec<_>>()
    });
    found.last().expect("a pod")
}

fn law(namespace: &Namespace, law: &Law, operator: &str) -> Program {
    namespace.law(law, 2, 1).env("FAIRING_LAUNCHER", operator)
}

#[test]
fn a_run_that_takes_longer_than_its_deadline_fails_for_that_reason() {
    let namespace = Namespace::new();
    for launcher in LAUNCHERS {
        let program = law(&namespace, &endless(), launcher).env("FAIRING_DEADLINE", "6s");
        let ended = program.env("FAIRING_KEEP_RESULT", "1s").run().code(1);
        ended.says("Error: the run took longer than its `deadline` of 6s, and the cluster ended it (set `deadline` or");
        namespace.is_empty();
    }
    // Whoever attaches afterwards hears the same.
    let program = law(&namespace, &endless(), "jobs").env("FAIRING_DEADLINE", "3s").env("FAIRING_DETACH", "1");
    let ended = program.run().code(0);
    let path = "jsonpath={.items[*].status.conditions[*].reason}";
    wait_for(|| namespace.kubectl(&["get", "jobs", "--output", path]), |reasons| reasons.contains("DeadlineExceeded"));
    let attached = fairing_runs(&namespace, &["attach", ended.own_lines()[0]]).run().code(1);
    attached.says("Error: the run took longer than its `deadline` of 3s");
    namespace.is_empty();
}

#[test]
fn an_operator_replaces_workers_that_were_deleted_or_killed_and_no_bit_differs() {
    // Their processes are sought on this machine.
    if control().is_none() {
        return;
    }
    let namespace = Namespace::new();
    let long = Law { epochs: 20, ..LAW };
    for operator in OPERATORS {
        let mut running = in_second_epoch(law(&namespace, &long, operator), &long);
        namespace.kubectl(&["delete", &pod(&namespace, "worker", 1), "--wait=false"]);
        running.wait_for("warning: worker 1 was lost: it was told to end (SIGTERM)");
        running.wait_for("epoch 8/20  loss");
        running.signal_replica("worker", 0, Signal::KILL);
        running.wait_for("warning: worker 0 was ended by signal 9 (SIGKILL); the cluster starts it again");
        trained_as_in_memory(&long, Topology::new(2, 1), running.end().says("restarted once"));
        namespace.is_empty();
    }
}

#[test]
fn an_operators_run_fails_naming_whom_nobody_replaces() {
    let namespace = Namespace::new();
    for operator in OPERATORS {
        for (role, rank, name, rejoin) in [("worker", 1, "worker 1", "0s"), ("ps", 0, "ps 0", "5m")] {
            let program = law(&namespace, &endless(), operator).env("FAIRING_REJOIN", rejoin);
            let running = in_second_epoch(program, &endless());
            namespace.kubectl(&["delete", &pod(&namespace, role, rank), "--wait=false"]);
            running.end().code(1).says(&format!("Error: {name} was lost")).says("it was told to end (SIGTERM)");
            namespace.is_empty();
        }
    }
}

/// Of a TFJob's workers only those that a signal has ended are started again.
#[test]
fn an_operators_run_fails_naming_a_worker_that_would_fail_again() {
    let namespace = Namespace::new();
    for (operator, fault, text) in
        [("tfjob", "exit-three", "exited with code 3"), ("tfjob", "panic", "panicked"), ("jobset", "panic", "panicked")]
    {
        let program = namespace.target(Program::fixture(&format!("fault {fault} 1"))).env("FAIRING_LAUNCHER", operator);
        let began = Instant::now();
        program.run().code(1).says("Error: worker 1 ").says(text).never_says("the cluster starts it again");
        assert!(began.elapsed() < Duration::from_secs(60), "{operator}, {fault}: {:?}", began.elapsed());
        namespace.is_empty();
    }
}

#[test]
fn an_operators_run_ends_with_its_launcher_or_without_it() {
    let namespace = Namespace::new();
    for operator in OPERATORS {
        let running = in_second_epoch(law(&namespace, &endless(), operator), &endless());
        running.signal(Signal::INT);
        let ended = running.end().code(130);
        assert_eq!(ended.summary()["status"], "stopped");
        assert!(ended.has_model());
        namespace.is_empty();
        let short = Law { epochs: 6, ..LAW };
        let program = law(&namespace, &short, operator).env("FAIRING_KEEP_RESULT", "1s").env("FAIRING_TTL", "1s");
        let running = in_second_epoch(program, &short);
        running.signal(Signal::KILL);
        running.end().signalled(Signal::KILL);
        assert!(!namespace.left().is_empty());
        namespace.becomes_empty(PATIENCE * 2);
    }
}
