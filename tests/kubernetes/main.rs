//! Runs on a real cluster. The test cluster is one, with the operators that some of the tests need:
//!
//!     cargo build -p fairing-examples --examples
//!     tests/cluster/run --with jobset,tfjob cargo test -p fairing-tests --test kubernetes -- --test-threads 2
//!
//! With a cluster of one's own (KUBECONFIG and FAIRING_REPOSITORY set, both operators installed) the second line begins with
//! `cargo`. What stops parts of the test cluster or looks into its only node says there that it is skipped.
//!
//! Each test has a namespace of its own. Nothing of a run is in there after each, and nothing at all at the end of the test.

#![expect(clippy::print_stdout, reason = "libtest shows what a test has printed if it fails")]

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

use std::fmt::Debug;
use std::fs;
use std::io::{Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::{Duration, Instant};

use fairing_core::{DistributedTraining as _, Topology};
use fairing_tests::law::{Kind, Law, Rule};

use runs::pushed_image;
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

/// The least accuracy of the example fashion_mnist: three seeds of the plain burn loop gave 0.864 to 0.876.
const LEAST_ACCURACY: f64 = 0.84;

/// The data of that example.
const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fairing-examples/data/fashion-mnist");

/// What may run the replicas. In each the objects of a run are others.
const LAUNCHERS: [&str; 3] = ["jobs", "jobset", "tfjob"];

/// Longer than the protocol lets a replica or a caller be silent, with the time that it may take to connect again.
const ASLEEP: Duration = Duration::from_secs(25);

/// The same without end, for runs that are ended.
fn endless() -> Law {
    Law { epochs: 10_000, ..LAW }
}

/// Held for writing by a test that stops a part of the cluster, which others need.
static CLUSTER: RwLock<()> = RwLock::new(());

/// How long the cluster may take to remove what a run's operator has made. An operator that has just been installed is known to
/// the garbage collector after up to half a minute.
const COLLECTED: Duration = Duration::from_secs(60);

/// Kinds of objects that every cluster has, and those of operators, which it may be without.
const KINDS: [(&str, bool); 3] = [("jobs,pods,services,secrets", true), ("jobsets", false), ("tfjobs", false)];

/// What kubectl says of a kind that the cluster does not have: without and with a memory of another cluster that had it.
const ABSENT: [&str; 2] = ["doesn't have a resource type", "the server could not find the requested resource"];

/// A namespace of a test's own. Dropping it removes it, and fails the test if something is left in there.
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
        said(&Command::new("kubectl").args(["--namespace", &self.name]).args(arguments).output().unwrap())
    }

    #[track_caller]
    fn kubectl(&self, arguments: &[&str]) -> String {
        self.try_kubectl(arguments).unwrap_or_else(|error| panic!("kubectl {arguments:?}: {error}"))
    }

    /// Creates what `yaml` says.
    #[track_caller]
    fn apply(&self, yaml: &str) {
        self.fed(&["apply", "--filename", "-"], yaml).unwrap_or_else(|error| panic!("{error}\n{yaml}"));
    }

    /// kubectl with `input`.
    fn fed(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(input.as_bytes()).unwrap();
        file.rewind().unwrap();
        let mut command = Command::new("kubectl");
        command.args(["--namespace", &self.name]).args(arguments).stdin(file);
        said(&command.output().unwrap())
    }

    /// Objects in here that have these labels, but for what the cluster itself puts into each namespace.
    #[track_caller]
    fn objects(&self, selector: &str) -> Vec<String> {
        let path = "jsonpath={range .items[*]}{.kind}/{.metadata.name} {.type}{\"\\n\"}{end}";
        let of = |(kinds, is_everywhere): (&str, bool)| match self.try_kubectl(&[
            "get",
            kinds,
            "--selector",
            selector,
            "--output",
            path,
        ]) {
            Ok(found) => found,
            Err(error) if !is_everywhere && ABSENT.iter().any(|text| error.contains(text)) => String::new(),
            Err(error) => panic!("kubectl get {kinds}: {error}"),
        };
        let found: Vec<String> = KINDS.into_iter().map(of).collect();
        let lines = found.iter().flat_map(|lines| lines.lines());
        let own = lines.filter(|line| !line.ends_with("kubernetes.io/service-account-token"));
        own.map(|line| line.split(' ').next().unwrap().to_owned()).collect()
    }

    /// What there is of runs, of what fairing itself has made or told others to make.
    #[track_caller]
    fn left(&self) -> Vec<String> {
        self.objects("fairing.dev/run")
    }

    #[track_caller]
    fn is_empty(&self) {
        assert_eq!(self.left(), Vec::<String>::new());
    }

    /// Waits until nothing at all is there any more.
    #[track_caller]
    fn becomes_empty(&self, within: Duration) {
        let deadline = Instant::now() + within;
        loop {
            let left = self.objects("");
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left in the namespace: {left:?}");
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

    /// Whether something has happened in here to an object whose kind and name begin and end so; events outlive their objects.
    #[track_caller]
    fn happened_to(&self, begin: &str, end: &str) -> bool {
        let path = "jsonpath={range .items[*]}{.involvedObject.kind}/{.involvedObject.name}{\"\\n\"}{end}";
        let events = self.kubectl(&["get", "events", "--output", path]);
        events.lines().any(|object| object.starts_with(begin) && object.ends_with(end))
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
        if thread::panicking() {
            // What libtest shows of a test that failed, for whoever asks why.
            for kinds in ["jobs,pods", "events"] {
                println!("{}", self.try_kubectl(&["get", kinds, "--output", "wide"]).unwrap_or_else(|error| error));
            }
        } else {
            // Not even after the last look of the test's: a controller could have made anew what was removed.
            self.is_empty();
            self.becomes_empty(COLLECTED);
        }
        let _ = Command::new("kubectl").args(["delete", "namespace", &self.name, "--wait=false"]).output();
    }
}

/// What a program printed, or why it failed.
fn said(output: &Output) -> Result<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
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
fn the_example_trains_to_its_accuracy_under_each_launcher() {
    let namespace = Namespace::new();
    for launcher in LAUNCHERS {
        let program = namespace.target(Program::new(&example("fashion_mnist"))).env("FAIRING_DATA", DATA);
        let ended = program.env("FAIRING_LAUNCHER", launcher).run().code(0);
        let ended = ended.says("2 workers + 1 parameter server joined");
        let own = ended.own_lines();
        let said = own.iter().find_map(|line| line.strip_prefix("accuracy ")?.split(',').next());
        let accuracy: f64 = said.expect("an accuracy").parse().unwrap();
        assert!(accuracy >= LEAST_ACCURACY, "{launcher}: {accuracy}");
        namespace.is_empty();
    }
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
    // Where JobSets are served, `auto` takes one, whose Jobs have a number.
    for (launcher, kind, suffix) in [("auto", "Job/", "-worker-0"), ("tfjob", "TFJob/", "")] {
        let ended = namespace.law(&law, 2, 1).env("FAIRING_LAUNCHER", launcher).run();
        trained_as_in_memory(&law, Topology::new(2, 1), ended);
        namespace.is_empty();
        assert!(namespace.happened_to(kind, suffix), "{launcher}");
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
    // Its process is sought on this machine.
    if control().is_none() {
        return;
    }
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
    // Its end does not come before the second one, which would be lost beside the first.
    let mut running = namespace.target(Program::fixture("endless --stubborn")).start();
    running.wait_for("training");
    // The launcher hears of it from the coordinator, and not as early as of the line in a log.
    thread::sleep(Duration::from_secs(3));
    running.signal(Signal::INT);
    running.wait_for("stopping after this round, then evaluating and saving (Ctrl-C again kills)");
    running.wait_for("evaluating");
    running.signal(Signal::INT);
    let ended = running.end().code(130).says("stopped before there was a result");
    assert!(!ended.has_model());
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
    for launcher in LAUNCHERS {
        let detached = |keep_result: &str| {
            let program = namespace.law(&law, 2, 1).env("FAIRING_DETACH", "1").env("FAIRING_LAUNCHER", launcher);
            let program = program.env("FAIRING_KEEP_RESULT", keep_result).env("FAIRING_TTL", "1s");
            program.env("FAIRING_ANOTHER", "1").run().code(0).own_lines()[0].to_owned()
        };
        let run = detached("60s");
        // Of a TFJob worker 0 stays.
        let ended = if launcher == "tfjob" { 1 } else { 2 };
        wait_for(|| namespace.kubectl(&["get", "pods"]), |pods| pods.matches("Completed").count() == ended);
        thread::sleep(Duration::from_secs(3));
        let attach = namespace.target(Program::new(&example("fairing_runs"))).argument("attach").argument(&run);
        let attached = attach.run().code(0);
        assert!(attached.has_model());
        namespace.is_empty();
        detached("1s");
        namespace.becomes_empty(PATIENCE * 2);
    }
}

/// Looks at something again and again until it is as it should be.
#[track_caller]
fn wait_for<S: Debug>(look: impl Fn() -> S, is_wanted: impl Fn(&S) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = look();
        if is_wanted(&seen) {
            return;
        }
        assert!(Instant::now() < deadline, "it did not come about; seen last: {seen:#?}");
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

/// The program that stops and starts parts of the test cluster. None, and a line that says so, in a cluster of the user's own.
fn control() -> Option<PathBuf> {
    let folder = std::env::var_os("TEST_CLUSTER").map(PathBuf::from);
    if folder.is_none() {
        let name = thread::current().name().unwrap_or("a test").to_owned();
        let skipped = format!("skipped: {name} (this is not the test cluster, tests/cluster/run)");
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{skipped}");
        // libtest shows what the macros print of failed tests only.
        std::io::stderr().write_all(format!("{skipped}\n").as_bytes()).unwrap();
    }
    Some(folder?.join("control"))
}

#[test]
fn a_quota_that_is_too_small_is_named_before_anything_is_built() {
    let namespace = Namespace::new();
    namespace.kubectl(&["create", "quota", "small", "--hard=requests.memory=1Gi,pods=10"]);
    // The quota says what is used once its controller has looked.
    let path = "jsonpath={.status.hard.pods}";
    wait_for(|| namespace.kubectl(&["get", "quota", "small", "--output", path]), |pods| pods == "10");
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
    let ended = namespace.target(Program::fixture("large 600000")).run().code(1).never_says("pushed");
    let ended = ended.says("the value to train with takes 6000").says("524288 at most on a cluster");
    assert!(!ended.run_folder().exists(), "nothing has begun");
    namespace.is_empty();
}

#[test]
fn an_image_that_is_not_there_and_one_of_another_program_fail_at_once() {
    let namespace = Namespace::new();
    let registry = std::env::var("FAIRING_REPOSITORY").unwrap();
    let missing = format!("{registry}/nobody:nothing");
    namespace.law(&LAW, 2, 1).env("FAIRING_IMAGE", &missing).run().code(1).says("nobody:nothing");
    namespace.is_empty();
    let other = pushed_image(&namespace);
    let program = namespace.target(Program::new(&example("fashion_mnist"))).env("FAIRING_DATA", DATA);
    program.env("FAIRING_IMAGE", &other).run().code(1).says("exited with code 2").says("Usage: fixture");
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

/// While it is, the replicas do without it, and their leases on it run out.
#[test]
fn a_launcher_whose_machine_slept_brings_its_model_home() {
    let namespace = Namespace::new();
    // One ends meanwhile, and keeps its result; the other goes on longer.
    let laws = [24, 120].map(|epochs| Law { epochs, learning_rate: 0.01 / epochs as f64, ..LAW });
    thread::scope(|scope| {
        for law in &laws {
            scope.spawn(|| {
                let running = in_second_epoch(namespace.law(law, 2, 1), law);
                running.signal(Signal::STOP);
                thread::sleep(ASLEEP);
                running.signal(Signal::CONT);
                let ended = running.end();
                for epoch in 1..=law.epochs {
                    ended.says_once(&format!("epoch {epoch}/{}  loss", law.epochs));
                }
                trained_as_in_memory(law, Topology::new(2, 1), ended);
            });
        }
    });
    namespace.is_empty();
}

/// Two Jobs are no gang: one role is there, and waits for the other.
#[test]
fn a_role_that_does_not_come_is_named_and_the_other_does_not_wait_for_ever() {
    let namespace = Namespace::new();
    let program = namespace.target(Program::fixture("broken nowhere")).env("FAIRING_CHECK_NODES", "false");
    let program = program.env("FAIRING_JOIN_TIMEOUT", "5s").env("FAIRING_SCHEDULE_TIMEOUT", "10m");
    let began = Instant::now();
    let ended = program.run().code(1);
    ended.says("Error: worker 0 ").says("nodes are available");
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    namespace.is_empty();
}

/// With every setting that says something to Kubernetes. None of the classes has to be there for that.
#[test]
fn what_the_dry_run_prints_is_valid_to_the_api_server_and_its_operators() {
    let namespace = Namespace::new();
    for launcher in LAUNCHERS {
        for (workers, ps) in [(1, 0), (2, 1), (100, 10)] {
            let settings = [
                ("FAIRING_DRY_RUN", "1"),
                ("FAIRING_LAUNCHER", launcher),
                ("FAIRING_NODE_SELECTOR", "disk=ssd"),
                ("FAIRING_TOLERATIONS", "dedicated=training:NoSchedule,nvidia.com/gpu,:NoExecute"),
                ("FAIRING_SPREAD", "true"),
                ("FAIRING_PRIORITY_CLASS", "low"),
                ("FAIRING_RUNTIME_CLASS", "gvisor"),
                ("FAIRING_LABELS", "team=vision"),
                ("FAIRING_ANNOTATIONS", "example.org/note=text"),
                ("FAIRING_IMAGE_PULL_SECRETS", "login"),
                ("FAIRING_VOLUMES", "pvc:datasets:/data:ro,secret:key:/key,configmap:names:/names,empty:1Gi:/scratch"),
                ("FAIRING_SERVICE_ACCOUNT", "trainer"),
                ("FAIRING_TMP_SIZE", "1Gi"),
                ("FAIRING_WORKER_CPU", "500m"),
                ("FAIRING_WORKER_MEMORY", "1Gi"),
                ("FAIRING_WORKER_GPU", "amd.com/gpu=2"),
                ("FAIRING_PS_CPU", "2"),
                ("FAIRING_PS_MEMORY", "2Gi"),
                ("FAIRING_PS_GPU", "1"),
            ];
            let program = namespace.law(&LAW, workers, ps);
            let program = settings.iter().fold(program, |program, (name, value)| program.env(name, value));
            let dry = program.run().code(0);
            // What stands before is for people; contents of Secrets and the name of the run stand for what they are in a run.
            let printed = dry.stdout().skip_while(|line| *line != "---");
            let filled = printed.map(|line| match line.split_once(": <") {
                Some((key, _)) => format!("{key}: \"\"\n"),
                None => format!(
                    "{}\n",
                    line.replace("RUN", "law-20260102-030405-0123").replace("_law-20260102-030405-0123", "_RUN")
                ),
            });
            let text: String = filled.collect();
            let created = namespace.fed(&["create", "--dry-run=server", "--validate=strict", "--filename", "-"], &text);
            let created = created.unwrap_or_else(|error| panic!("{launcher}, {workers} + {ps}: {error}"));
            let (objects, printed) = (created.lines().count(), text.lines().filter(|line| line.starts_with("kind: ")));
            assert_eq!(objects, printed.count(), "{created}");
        }
    }
    namespace.is_empty();
}
