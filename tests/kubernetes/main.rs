//! Runs on a real cluster. Started in the test cluster by `tests/cluster/run cargo test -p fairing-tests --test kubernetes`, or
//! with a cluster of one's own: KUBECONFIG and FAIRING_REPOSITORY set.
//!
//! Each test has a namespace of its own, which is empty after each run.

#[expect(dead_code, reason = "the other tests of programs use more of it")]
#[path = "../it/support.rs"]
mod support;

mod formats;
mod inside;
mod launching;
mod refusals;
mod relay;
mod runs;
mod tf_config;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::{Duration, Instant};

use fairing_core::{DistributedTraining as _, Topology};
use fairing_tests::law::{Kind, Law, Rule};

use support::{Ended, PATIENCE, Program, Running, Signal};

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

/// The same without end, for runs that are ended.
fn endless() -> Law {
    Law { epochs: 10_000, ..LAW }
}

/// Held for writing by a test that stops a part of the cluster, which others need.
static CLUSTER: RwLock<()> = RwLock::new(());

/// A namespace of a test's own. Dropping it removes it.
struct Namespace {
    name: String,
    _shared: Option<RwLockReadGuard<'static, ()>>,
    _alone: Option<RwLockWriteGuard<'static, ()>>,
}

impl Namespace {
    fn new() -> Self {
        Self::with(Some(CLUSTER.read().unwrap_or_else(PoisonError::into_inner)), None)
    }

    /// For a test that disturbs the cluster: no other one runs meanwhile.
    fn alone() -> Self {
        Self::with(None, Some(CLUSTER.write().unwrap_or_else(PoisonError::into_inner)))
    }

    fn with(shared: Option<RwLockReadGuard<'static, ()>>, alone: Option<RwLockWriteGuard<'static, ()>>) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("fairing-test-{}-{number}", std::process::id());
        let created =
            Command::new("kubectl").args(["create", "namespace", &name]).output().expect("kubectl on the PATH");
        assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
        let namespace = Self { name, _shared: shared, _alone: alone };
        // Pods are refused as long as a namespace has no service account, which takes a moment.
        let deadline = Instant::now() + PATIENCE;
        while namespace.try_kubectl(&["get", "serviceaccount", "default"]).is_err() {
            assert!(Instant::now() < deadline, "a namespace without a service account");
            thread::sleep(Duration::from_millis(50));
        }
        namespace
    }

    fn try_kubectl(&self, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new("kubectl").args(["--namespace", &self.name]).args(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    #[track_caller]
    fn kubectl(&self, arguments: &[&str]) -> String {
        self.try_kubectl(arguments).unwrap_or_else(|error| panic!("kubectl {arguments:?}: {error}"))
    }

    /// Creates what `yaml` says.
    #[track_caller]
    fn apply(&self, yaml: &str) {
        let mut command = Command::new("kubectl");
        command.args(["--namespace", &self.name, "apply", "--filename", "-"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(yaml.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "{yaml}");
    }

    /// What there is of runs.
    fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        for kinds in ["jobs,pods,services,secrets", "jobsets", "tfjobs"] {
            // A cluster without an operator has not its kind.
            let found = self.try_kubectl(&["get", kinds, "--selector", "fairing.dev/run", "--output", "name"]);
            left.extend(found.unwrap_or_default().lines().map(str::to_owned));
        }
        left
    }

    #[track_caller]
    fn is_empty(&self) {
        assert_eq!(self.left(), Vec::<String>::new());
    }

    /// Waits until nothing of runs is there any more.
    #[track_caller]
    fn becomes_empty(&self, within: Duration) {
        let deadline = Instant::now() + within;
        while !self.left().is_empty() {
            assert!(Instant::now() < deadline, "{:?}", self.left());
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// `program` with this namespace as its target.
    fn target(&self, program: Program) -> Program {
        let repository = std::env::var("FAIRING_REPOSITORY").expect("FAIRING_REPOSITORY: see the head of this file");
        program
            .env("FAIRING_TARGET", "kubernetes")
            .env("FAIRING_REPOSITORY", &repository)
            .env("FAIRING_NAMESPACE", &self.name)
    }

    fn law(&self, law: &Law, workers: u32, ps: u32) -> Program {
        self.target(Program::law(law, workers, ps))
    }

    /// The pod of a replica.
    #[track_caller]
    fn pod(&self, role: &str, rank: u32) -> String {
        let selector = format!("fairing.dev/role={role}");
        let path = "jsonpath={range .items[*]}{.metadata.name}{\"\\n\"}{end}";
        let names = self.kubectl(&["get", "pods", "--selector", &selector, "--output", path]);
        let pod = names.lines().find(|name| name.contains(&format!("-{role}-{rank}")));
        pod.unwrap_or_else(|| panic!("no {role} {rank} in {names}")).to_owned()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("kubectl").args(["delete", "namespace", &self.name, "--wait=false"]).output();
    }
}

#[track_caller]
fn in_second_epoch(program: Program, law: &Law) -> Running {
    let mut running = program.start();
    running.wait_for(&format!("epoch 1/{}  loss", law.epochs));
    running
}

/// Checks that a run has trained what one in memory trains, to the bit.
#[track_caller]
fn trained_as_in_memory(law: &Law, topology: Topology, ended: Ended) {
    let at_once = Law { pause_ms: 0, ..law.clone() };
    let in_memory = at_once.train_in_memory(topology).unwrap();
    let ended = ended.code(0);
    assert_eq!(ended.own_lines(), [format!("fingerprint {}", in_memory.model.fingerprint())]);
    assert_eq!(ended.summary()["status"], "succeeded");
    assert!(ended.has_model());
}

/// An example, built beside the tests' programs.
fn example(name: &str) -> PathBuf {
    let programs = Path::new(env!("CARGO_BIN_EXE_fixture")).parent().unwrap();
    programs.join("examples").join(name)
}

#[test]
fn the_example_trains_to_its_accuracy() {
    let namespace = Namespace::new();
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/../fairing-examples/data/fashion-mnist");
    let ended = namespace.target(Program::new(&example("fashion_mnist"))).env("FAIRING_DATA", data).run().code(0);
    ended.says("accuracy 0.86").says("2 workers + 1 parameter server joined");
    namespace.is_empty();
}

#[test]
fn pods_train_the_same_bits_as_threads() {
    let namespace = Namespace::new();
    let law = Law { pause_ms: 0, ..LAW };
    for topology in [Topology::new(3, 2), Topology::new(2, 0)] {
        let ended = namespace.law(&law, topology.workers.get(), topology.ps).run();
        trained_as_in_memory(&law, topology, ended);
        namespace.is_empty();
    }
}

#[test]
fn a_job_set_and_a_tf_job_train_the_same_bits() {
    let namespace = Namespace::new();
    let law = Law { pause_ms: 0, ..LAW };
    for launcher in ["jobset", "tfjob"] {
        let ended = namespace.law(&law, 2, 1).env("FAIRING_LAUNCHER", launcher).run();
        trained_as_in_memory(&law, Topology::new(2, 1), ended);
        namespace.is_empty();
    }
}

#[test]
fn async_workers_train_in_pods() {
    let namespace = Namespace::new();
    let ended = namespace.law(&LAW, 2, 1).env("FAIRING_MODE", "async").run().code(0);
    assert!(ended.has_model());
    namespace.is_empty();
}

#[test]
fn a_restricted_namespace_admits_the_pods() {
    let namespace = Namespace::new();
    let label = "pod-security.kubernetes.io/enforce=restricted";
    namespace.kubectl(&["label", "namespace", &namespace.name, label]);
    let law = Law { pause_ms: 0, ..LAW };
    trained_as_in_memory(&law, Topology::new(2, 1), namespace.law(&law, 2, 1).run());
    namespace.is_empty();
}

#[test]
fn a_deleted_worker_leaves_is_replaced_and_no_bit_differs() {
    let namespace = Namespace::new();
    let law = Law { epochs: 12, ..LAW };
    let mut running = in_second_epoch(namespace.law(&law, 2, 2), &law);
    namespace.kubectl(&["delete", "pod", &namespace.pod("worker", 1), "--wait=false"]);
    running.wait_for("warning: worker 1 was lost: it was told to end (SIGTERM)");
    trained_as_in_memory(&law, Topology::new(2, 2), running.end().says("restarted once"));
    namespace.is_empty();
}

/// Its pod stays beside that of its successor, unlike one that was deleted.
#[test]
fn a_worker_that_crashes_is_replaced_and_no_bit_differs() {
    let namespace = Namespace::new();
    let law = Law { epochs: 12, ..LAW };
    let mut running = in_second_epoch(namespace.law(&law, 2, 2), &law);
    running.signal_replica("worker", 1, Signal::KILL);
    running.wait_for("warning: worker 1 was ended by signal 9 (SIGKILL); the cluster starts it again");
    let ended = running.end();
    ended.says_once("the cluster starts it again");
    trained_as_in_memory(&law, Topology::new(2, 2), ended.says("restarted once"));
    namespace.is_empty();
}

#[test]
fn a_deleted_replica_fails_a_run_that_does_not_wait_for_it_and_is_named() {
    let namespace = Namespace::new();
    for (role, rank, name, rejoin) in
        [("worker", 1, "worker 1", "0s"), ("ps", 0, "ps 0", "5m"), ("ps", 1, "ps 1", "5m")]
    {
        let law = endless();
        let running = in_second_epoch(namespace.law(&law, 2, 2).env("FAIRING_REJOIN", rejoin), &law);
        namespace.kubectl(&["delete", "pod", &namespace.pod(role, rank), "--wait=false"]);
        running.end().code(1).says(&format!("Error: {name} was lost")).says("it was told to end (SIGTERM)");
        namespace.is_empty();
    }
}

#[test]
fn an_interrupted_run_saves_its_model_and_a_second_interrupt_ends_it() {
    let namespace = Namespace::new();
    let law = endless();
    let running = in_second_epoch(namespace.law(&law, 2, 1), &law);
    running.signal(Signal::INT);
    let ended = running.end().code(130);
    assert_eq!(ended.summary()["status"], "stopped");
    assert!(ended.has_model());
    namespace.is_empty();
    let running = in_second_epoch(namespace.law(&law, 2, 1), &law);
    running.signal(Signal::INT);
    running.signal(Signal::INT);
    running.end().code(130);
    namespace.is_empty();
}

#[test]
fn a_run_goes_on_without_its_launcher_and_can_be_attached_to_from_elsewhere() {
    let namespace = Namespace::new();
    let law = Law { epochs: 8, ..LAW };
    let ended = namespace.law(&law, 2, 1).env("FAIRING_DETACH", "1").run().code(0);
    let run = ended.own_lines()[0].to_owned();
    let runs = |arguments: &[&str]| {
        let program = namespace.target(Program::new(&example("fairing_runs")));
        arguments.iter().fold(program, |program, argument| program.argument(argument))
    };
    runs(&["list"]).run().code(0).says(&run).says("alive");
    // The same again is offered, not started.
    namespace.law(&law, 2, 1).run().code(1).says(&format!("the run `{run}` trains the same type with the same value"));
    let attached = runs(&["attach", &run]).run().code(0);
    for epoch in 1..=law.epochs {
        attached.says_once(&format!("epoch {epoch}/{}  loss", law.epochs));
    }
    assert!(attached.has_model());
    namespace.is_empty();
    runs(&["list"]).run().code(0).says("no runs");
    runs(&["attach", &run]).run().code(1).says(&format!("there is no run `{run}`"));
}

/// In each format, whose operators have views of their own on when a run is over.
#[test]
fn a_result_waits_for_whoever_comes_for_it_and_goes_when_nobody_does() {
    let namespace = Namespace::new();
    let law = Law { epochs: 1, pause_ms: 0, ..LAW };
    for launcher in ["jobs", "jobset", "tfjob"] {
        let detached = |keep_result: &str| {
            let program = namespace.law(&law, 2, 1).env("FAIRING_DETACH", "1").env("FAIRING_LAUNCHER", launcher);
            let program = program.env("FAIRING_KEEP_RESULT", keep_result).env("FAIRING_TTL", "1s");
            program.env("FAIRING_ANOTHER", "1").run().code(0).own_lines()[0].to_owned()
        };
        let run = detached("60s");
        // Of a TFJob worker 0 stays.
        let ended = if launcher == "tfjob" { 1 } else { 2 };
        wait_for(|| namespace.kubectl(&["get", "pods"]).matches("Completed").count() == ended);
        thread::sleep(Duration::from_secs(3));
        let attach = namespace.target(Program::new(&example("fairing_runs"))).argument("attach").argument(&run);
        let attached = attach.run().code(0);
        assert!(attached.has_model());
        namespace.is_empty();
        detached("1s");
        namespace.becomes_empty(PATIENCE * 2);
    }
}

#[track_caller]
fn wait_for(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "it did not come about");
        thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_killed_launcher_leaves_a_run_that_ends_and_goes_by_itself() {
    let namespace = Namespace::new();
    let law = Law { epochs: 6, ..LAW };
    let program = namespace.law(&law, 2, 1).env("FAIRING_KEEP_RESULT", "1s").env("FAIRING_TTL", "1s");
    let running = in_second_epoch(program, &law);
    running.signal(Signal::KILL);
    running.end().signalled(Signal::KILL);
    assert!(!namespace.left().is_empty());
    namespace.becomes_empty(PATIENCE * 2);
}

#[test]
fn two_runs_at_once_do_not_see_each_other() {
    let namespace = Namespace::new();
    let start = || namespace.law(&LAW, 2, 1).env("FAIRING_ANOTHER", "1").start();
    let (one, other) = (start(), start());
    trained_as_in_memory(&LAW, Topology::new(2, 1), one.end());
    trained_as_in_memory(&LAW, Topology::new(2, 1), other.end());
    namespace.is_empty();
}

/// A token of a service account with the Role that the dry run prints, and nothing else.
#[test]
fn the_rights_that_the_dry_run_prints_suffice() {
    let Some(control) = control() else { return };
    let namespace = Namespace::new();
    let law = Law { pause_ms: 0, ..LAW };
    let dry = namespace.law(&law, 2, 1).env("FAIRING_DRY_RUN", "1").run().code(0);
    let text = dry.stdout().collect::<Vec<_>>().join("\n");
    let role = text.rsplit("---").next().unwrap();
    assert!(role.contains("kind: Role"), "{text}");
    namespace.apply(role);
    namespace.kubectl(&["create", "serviceaccount", "trainer"]);
    let account = format!("--serviceaccount={}:trainer", namespace.name);
    namespace.kubectl(&["create", "rolebinding", "trainer", "--role=fairing", &account]);
    let kubeconfig = Command::new(control).args(["kubeconfig", &namespace.name, "trainer"]).output().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kubeconfig");
    fs::write(&path, kubeconfig.stdout).unwrap();
    let program = namespace.law(&law, 2, 1).env("KUBECONFIG", path.to_str().unwrap());
    let ended = program.run().says("whether a node is large enough and of the image's architecture was not checked");
    trained_as_in_memory(&law, Topology::new(2, 1), ended);
    namespace.is_empty();
    namespace.kubectl(&["delete", "rolebinding", "trainer"]);
    let ended = namespace.law(&law, 2, 1).env("KUBECONFIG", path.to_str().unwrap()).run().code(1);
    ended.says("you lack the right to").says("secrets");
}

/// The program that stops and starts parts of the test cluster; none in a cluster of the user's own.
fn control() -> Option<PathBuf> {
    let folder = std::env::var_os("TEST_CLUSTER").map(PathBuf::from);
    if folder.is_none() {
        let skipped = "skipped: this is not the test cluster (tests/cluster/run)";
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{skipped}");
        std::io::stderr().write_all(format!("{skipped}\n").as_bytes()).unwrap();
    }
    Some(folder?.join("control"))
}

#[test]
fn a_quota_that_is_too_small_is_named_before_anything_is_built() {
    let namespace = Namespace::new();
    namespace.kubectl(&["create", "quota", "small", "--hard=requests.memory=1Gi,pods=10"]);
    // The quota says what is used once its controller has looked.
    wait_for(|| namespace.kubectl(&["get", "quota", "small", "--output", "jsonpath={.status.hard.pods}"]) == "10");
    let ended = namespace.law(&LAW, 2, 1).run().code(1);
    ended.says("the quota `small` leaves 1024Mi of requests.memory, and the run takes 2560Mi").never_says("pushed");
    namespace.is_empty();
}

#[test]
fn what_cannot_be_is_named_before_anything_is_built() {
    let namespace = Namespace::new();
    for (name, value, text) in [
        ("FAIRING_NAMESPACE", "nowhere", "there is no such namespace (`kubectl create namespace nowhere`"),
        ("FAIRING_CONTEXT", "nowhere", "the kubeconfig has no context `nowhere` (it has "),
        ("KUBECONFIG", "/nowhere", "no cluster is known: there is no kubeconfig at `/nowhere`"),
        ("FAIRING_WORKER_CPU", "1000", "no node can hold a worker, which asks for 1000 of cpu (the largest node has "),
        ("FAIRING_WORKER_MEMORY", "900Gi", "no node can hold a worker"),
        ("FAIRING_NODE_SELECTOR", "disk=none", "no node has the labels disk=none"),
        ("FAIRING_REPOSITORY", "127.0.0.1:1/fairing", "127.0.0.1:1"),
    ] {
        let ended = namespace.law(&LAW, 2, 1).env(name, value).run().code(1).says(text).never_says("pushed");
        assert!(!ended.run_folder().exists(), "{name}: nothing has begun");
    }
    namespace.is_empty();
}

#[test]
fn an_image_that_is_not_there_and_one_that_has_no_program_fail_at_once() {
    let namespace = Namespace::new();
    let registry = std::env::var("FAIRING_REPOSITORY").unwrap();
    let missing = format!("{registry}/nobody:nothing");
    namespace.law(&LAW, 2, 1).env("FAIRING_IMAGE", &missing).run().code(1).says("nobody:nothing");
    namespace.is_empty();
}

#[test]
fn a_replica_without_enough_memory_is_named_with_its_limit() {
    let namespace = Namespace::new();
    let ended = namespace.target(Program::fixture("memory 600")).env("FAIRING_WORKER_MEMORY", "200Mi");
    let ended = ended.env("FAIRING_REJOIN", "0s").run().code(1);
    ended.says("ended by the kernel: out of memory (limit 200 MiB; raise `memory` of this role)").says("cause: worker");
    namespace.is_empty();
}

#[test]
fn an_error_of_the_users_own_fails_the_run_with_its_words() {
    let namespace = Namespace::new();
    let ended = namespace.target(Program::fixture("fault error 1")).run().code(1);
    let ended = ended.says("worker 1 exited with code 64").says("Error: worker 1 returned an error in round ");
    ended.says("cannot read example 7: the disk is full");
    namespace.is_empty();
}

/// Ten seconds of 200 kB each per second and worker, a line of a megabyte, and one that is no text.
#[test]
fn all_that_replicas_write_arrives_once_and_in_order() {
    let namespace = Namespace::new();
    let ended = namespace.target(Program::fixture("flood 10 200000")).run().code(0);
    for rank in 0..2 {
        let log = fs::read(ended.run_folder().join(format!("logs/worker-{rank}.log"))).unwrap();
        let log = String::from_utf8(log).unwrap();
        let numbers =
            log.lines().filter_map(|line| line.strip_prefix("line ")?.split(' ').next()?.parse::<usize>().ok());
        let numbers: Vec<usize> = numbers.collect();
        assert_eq!(numbers, (0..numbers.len()).collect::<Vec<_>>());
        assert_eq!(numbers.len(), 10 * 200_000 / 100, "lines of 100 bytes");
        assert_eq!(log.matches('m').count(), 1 << 20, "the long line");
        assert!(log.contains("no text: \u{fffd}\u{fffd}"));
    }
    namespace.is_empty();
}

#[test]
fn a_stopped_kubelet_and_a_restarted_api_server_do_not_disturb_a_run() {
    let Some(control) = control() else { return };
    let namespace = Namespace::alone();
    let law = Law { epochs: 60, ..LAW };
    let mut running = in_second_epoch(namespace.law(&law, 2, 1), &law);
    let control = |arguments: &[&str]| {
        let done = Command::new(&control).args(arguments).output().unwrap();
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    };
    control(&["restart", "kube-apiserver"]);
    running.wait_for("epoch 8/60  loss");
    control(&["stop", "kubelet"]);
    thread::sleep(Duration::from_secs(20));
    control(&["start", "kubelet"]);
    let ended = running.end();
    for epoch in 1..=law.epochs {
        ended.says_once(&format!("epoch {epoch}/{}  loss", law.epochs));
    }
    trained_as_in_memory(&law, Topology::new(2, 1), ended);
    namespace.is_empty();
}
