//! Replicas without a launcher at their standard input, as processes on loopback: what a cluster starts from a folder with the
//! payload, and what the author of a TFJob starts with `TF_CONFIG`. This program is the test and the replica.

#![expect(clippy::print_stdout, reason = "replicas speak to the test by lines")]

#[path = "common/harness.rs"]
mod harness;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use fairing_core::exit::ExitCode;
use fairing_core::lifeline;
use fairing_core::prelude::*;
use fairing_core::runtime::layout::{Class, Layout, LayoutError, TensorSpec};
use fairing_core::runtime::optimizer::Adam;
use fairing_core::secure::Authority;
use fairing_core::topology::tf_config::{ANYONE, IDENTITY_FILE, IDENTITY_FOLDER, PLAINTEXT, TF_CONFIG};
use fairing_core::topology::{self, Address, KEEP_RESULT, Mode, Placement, Replica, Topology};
use fairing_core::{DistributedTraining, Gradient, Model, Train, Worker};
use harness::tests;
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

/// Far above what anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

const STEPS: usize = 60;

fn main() -> anyhow::Result<()> {
    let is_replica = std::env::var("FAIRING_PLACEMENT_ROLE").is_ok() || std::env::var(TF_CONFIG).is_ok();
    if is_replica {
        assert!(fairing_core::in_replica());
        // What a replica of `TF_CONFIG` trains with; the others get another one.
        Slope { steps: STEPS, pause_ms: 0 }.launch()?;
        unreachable!("a replica ends in `launch`");
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    harness::run(TESTS, &arguments, None);
    Ok(())
}

const TESTS: harness::Tests<'_> = tests![
    a_tfjob_of_somebody_else_trains_with_the_value_of_its_main,
    a_tfjob_without_identities_or_with_wrong_ones_is_refused,
    a_worker_that_is_told_to_end_comes_back_to_the_same_bits,
    a_server_that_is_told_to_end_fails_the_run_and_names_itself,
    a_replica_without_its_files_says_what_is_missing,
];

// What is trained.

/// Follows the data up: one number that becomes their mean, slowly.
#[distributed_training(workers = 2, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Slope {
    steps: usize,
    /// After each step.
    pause_ms: u64,
}

impl Train for Slope {
    type Model = Number;

    fn train(&self, worker: &Worker) -> anyhow::Result<Number> {
        let examples: Vec<f32> = (0..self.steps * 2).map(|i| i as f32).collect();
        let mut model = worker.join(Number(0.0), Adam::new())?;
        for epoch in worker.epochs(1) {
            for batch in epoch.batches(&examples[..], 2 / worker.workers()) {
                let mean = batch.iter().sum::<f32>() / batch.len().max(1) as f32;
                let gradient = Gradient::mean(model.0 - mean, batch.len());
                model = worker.step(model, gradient, 0.1)?;
                println!("round {}", worker.round());
                thread::sleep(Duration::from_millis(self.pause_ms));
            }
        }
        println!("model {:08x}", model.0.to_bits());
        Ok(model)
    }
}

#[derive(Clone)]
struct Number(f32);

impl Model for Number {
    type Gradients = f32;

    const EXTENSION: &'static str = "number";

    fn layout(&self) -> Result<Layout, LayoutError> {
        Layout::new(vec![TensorSpec { path: "it".into(), shape: vec![1], dtype: "f32".into(), class: Class::Trained }])
    }

    fn read_trained(&self, out: &mut [f32]) {
        out[0] = self.0;
    }

    fn write_trained(self, values: &[f32]) -> Self {
        Self(values[0])
    }

    fn read_frozen(&self) -> Vec<u8> {
        Vec::new()
    }

    fn write_frozen(self, _: &[u8]) -> Self {
        self
    }

    fn read_state(&self, _: &mut [f32]) {}

    fn write_state(self, _: &[f32]) -> Self {
        self
    }

    fn read_gradients(&self, gradient: f32, out: &mut [f32], present: &mut [bool]) {
        out[0] = gradient;
        present[0] = true;
    }

    fn to_bytes(&self) -> Result<Vec<u8>, String> {
        Ok(self.0.to_ne_bytes().to_vec())
    }

    fn load(self, _: &Path) -> Result<Self, String> {
        Err("it is only a test".into())
    }

    fn seed(_: u64) {}
}

// Helpers of the tests.

/// A replica's process, and its lines as they come.
struct Process {
    child: Child,
    lines: Receiver<String>,
}

impl Process {
    fn start(mut command: Command) -> Self {
        // As the first process of a container leads its group.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (said, lines) = mpsc::channel();
        thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| said.send(line)));
        Self { child, lines }
    }

    /// Waits for a line.
    #[track_caller]
    fn says(&self, expected: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())).expect("a line in time")
            != expected
        {}
    }

    fn tell_to_end(&self) {
        let pid = Pid::from_raw(self.child.id().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::TERM).unwrap();
    }

    /// Its exit code, its lines that were not waited for, and what it complained about.
    #[track_caller]
    fn end(mut self) -> (i32, Vec<String>, String) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None => assert!(Instant::now() < deadline, "it does not end"),
            }
            thread::sleep(Duration::from_millis(5));
        };
        let mut complaint = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut complaint).unwrap();
        (status.code().expect("it ends by itself"), self.lines.iter().collect(), complaint)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn program() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.env("RUST_BACKTRACE", "0");
    // Cargo gives the tests of a crate what its build script gives the crate.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("FAIRING_")) {
        command.env_remove(name);
    }
    command
}

#[track_caller]
fn model(lines: &[String]) -> String {
    lines.iter().find(|line| line.starts_with("model ")).expect("a worker that has trained says its model").clone()
}

// A TFJob of somebody else's.

/// The parts of a TFJob with a chief, a worker and a server.
const PARTS: [(&str, u32, &str); 3] = [("ps", 0, "ps-0"), ("chief", 0, "worker-0"), ("worker", 0, "worker-1")];

fn tf_config(cluster: &str, (role, index, _): (&str, u32, &str)) -> Command {
    let mut command = program();
    command.env(TF_CONFIG, format!(r#"{{"cluster": {cluster}, "task": {{"type": "{role}", "index": {index}}}}}"#));
    command
}

fn cluster() -> String {
    let [ps, chief, worker] = [(); 3].map(|()| format!("127.0.0.1:{}", free_port()));
    format!(r#"{{"ps": ["{ps}"], "chief": ["{chief}"], "worker": ["{worker}"]}}"#)
}

fn a_tfjob_of_somebody_else_trains_with_the_value_of_its_main() {
    let authority = Authority::new("any").unwrap();
    let secrets = tempfile::tempdir().unwrap();
    let mut models = Vec::new();
    for is_secret in [false, true] {
        let cluster = cluster();
        let start = |part: &(&str, u32, &str)| {
            let mut command = tf_config(&cluster, *part);
            if is_secret {
                let folder = secrets.path().join(part.2);
                fs::create_dir(&folder).unwrap();
                let replica =
                    if part.0 == "ps" { Replica::ps(0) } else { Replica::worker(u32::from(part.0 == "worker")) };
                fs::write(folder.join(IDENTITY_FILE), authority.issue(replica.into()).unwrap().to_bytes()).unwrap();
                command.env(IDENTITY_FOLDER, folder);
            } else {
                command.env(PLAINTEXT, ANYONE);
            }
            Process::start(command)
        };
        let processes: Vec<_> = PARTS.iter().map(start).collect();
        for (process, part) in processes.into_iter().zip(PARTS) {
            let (code, lines, complaint) = process.end();
            assert_eq!((code, complaint.as_str()), (0, ""), "{}", part.2);
            if part.0 != "ps" {
                assert!(lines.contains(&format!("round {STEPS}")), "{lines:?}");
                models.push(model(&lines));
            }
        }
    }
    assert!(models.iter().all(|model| *model == models[0]), "{models:?}");
}

fn a_tfjob_without_identities_or_with_wrong_ones_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = |part, adjust: &dyn Fn(&mut Command)| {
        let mut command = tf_config(&cluster(), part);
        adjust(&mut command);
        let (code, _, complaint) = Process::start(command).end();
        assert_eq!(code, i32::from(ExitCode::Configuration.code()), "{complaint}");
        complaint
    };
    let nothing = refusal(PARTS[1], &|_| {});
    assert!(nothing.contains("FAIRING_IDENTITY") && nothing.contains("yes-anyone-may-join"), "{nothing}");
    let half = refusal(PARTS[1], &|command| _ = command.env(PLAINTEXT, "yes"));
    assert!(half.contains("its one value is `yes-anyone-may-join`"), "{half}");
    let both = refusal(PARTS[1], &|command| _ = command.env(PLAINTEXT, ANYONE).env(IDENTITY_FOLDER, "/"));
    assert!(both.contains("unset one"), "{both}");
    let named = |command: &mut Command| _ = command.env(IDENTITY_FOLDER, folder.path());
    let missing = refusal(PARTS[1], &named);
    assert!(missing.contains("No such file"), "{missing}");
    fs::write(folder.path().join(IDENTITY_FILE), b"nothing of the kind").unwrap();
    let damaged = refusal(PARTS[1], &named);
    assert!(damaged.contains("there is no identity in what should be one"), "{damaged}");
    let other = Authority::new("any").unwrap().issue(Replica::worker(0).into()).unwrap();
    fs::write(folder.path().join(IDENTITY_FILE), other.to_bytes()).unwrap();
    // Behind a chief it is worker 1.
    let wrong = refusal(PARTS[2], &named);
    assert!(wrong.contains("the identity that worker 1 was given is that of worker 0"), "{wrong}");
    let evaluator = refusal(("evaluator", 0, ""), &named);
    assert!(evaluator.contains("evaluator, which fairing does not have"), "{evaluator}");
}

// What a cluster starts for fairing.

/// What the launcher writes of a value, see `run`.
#[derive(Serialize)]
struct Payload {
    name: String,
    #[serde(with = "serde_bytes")]
    value: Vec<u8>,
}

struct Cluster {
    authority: Authority,
    secrets: TempDir,
    placement: Placement,
}

impl Cluster {
    fn new(pause_ms: u64, rejoin: Duration) -> Self {
        let secrets = tempfile::tempdir().unwrap();
        let mut value = Vec::new();
        ciborium::into_writer(&Slope { steps: STEPS, pause_ms }, &mut value).unwrap();
        let mut payload = Vec::new();
        ciborium::into_writer(&Payload { name: Slope::NAME.to_owned(), value }, &mut payload).unwrap();
        fs::write(secrets.path().join("value"), payload).unwrap();
        let placement = Placement {
            run: "slope-1".into(),
            replica: Replica::ps(0),
            topology: Topology::new(2, 1),
            seed: 0,
            threads: 1,
            servers: vec![Address::Tls { server: Replica::ps(0), host: "127.0.0.1".into(), port: free_port() }],
            data_dir: None,
            mode: Mode::Sync,
            rejoin,
            join: PATIENCE,
            // Nobody comes for the result.
            keep_result: Duration::from_secs(1),
            first_stays: false,
        };
        assert_ne!(placement.keep_result, KEEP_RESULT);
        Self { authority: Authority::new("slope-1").unwrap(), secrets, placement }
    }

    fn start(&self, replica: Replica) -> Process {
        let folder = tempfile::tempdir_in(self.secrets.path()).unwrap().keep();
        fs::create_dir(folder.join("own")).unwrap();
        fs::write(folder.join(lifeline::IDENTITY_FILE), self.authority.issue(replica.into()).unwrap().to_bytes())
            .unwrap();
        fs::copy(self.secrets.path().join("value"), folder.join(lifeline::VALUE_FILE)).unwrap();
        self.start_in(replica, &folder)
    }

    fn start_in(&self, replica: Replica, folder: &Path) -> Process {
        let mut command = program();
        let placement = Placement { replica, ..self.placement.clone() };
        command.envs(placement.to_env()).env(topology::FOLDER, folder);
        Process::start(command)
    }

    fn start_all(&self) -> BTreeMap<Replica, Process> {
        self.placement.topology.replicas().map(|replica| (replica, self.start(replica))).collect()
    }
}

fn a_worker_that_is_told_to_end_comes_back_to_the_same_bits() {
    let mut models = Vec::new();
    for is_interrupted in [false, true] {
        let cluster = Cluster::new(if is_interrupted { 20 } else { 0 }, PATIENCE);
        let mut processes = cluster.start_all();
        if is_interrupted {
            let leaving = processes.remove(&Replica::worker(1)).unwrap();
            leaving.says("round 10");
            leaving.tell_to_end();
            let (code, lines, complaint) = leaving.end();
            assert_eq!(code, 143, "{complaint}");
            assert!(complaint.contains("worker 1 was lost in round"), "{complaint}");
            assert!(complaint.contains("it was told to end (SIGTERM)"), "{complaint}");
            assert!(!lines.contains(&format!("round {STEPS}")));
            processes.insert(Replica::worker(1), cluster.start(Replica::worker(1)));
        }
        for (replica, process) in processes {
            let (code, lines, complaint) = process.end();
            assert_eq!((code, complaint.as_str()), (0, ""), "{replica}");
            models.extend((replica != Replica::ps(0)).then(|| model(&lines)));
        }
    }
    assert!(models.iter().all(|model| *model == models[0]), "{models:?}");
}

fn a_server_that_is_told_to_end_fails_the_run_and_names_itself() {
    let cluster = Cluster::new(20, PATIENCE);
    let mut processes = cluster.start_all();
    processes[&Replica::worker(0)].says("round 10");
    let server = processes.remove(&Replica::ps(0)).unwrap();
    server.tell_to_end();
    let (code, _, complaint) = server.end();
    assert_eq!(code, 143);
    assert!(complaint.contains("ps 0 was lost") && complaint.contains("(SIGTERM)"), "{complaint}");
    for (replica, process) in processes {
        assert_eq!(process.end().0, i32::from(ExitCode::LostPeer.code()), "{replica}");
    }
}

fn a_replica_without_its_files_says_what_is_missing() {
    let cluster = Cluster::new(0, Duration::ZERO);
    let empty = tempfile::tempdir().unwrap();
    let (code, _, complaint) = cluster.start_in(Replica::worker(0), empty.path()).end();
    assert_eq!(code, i32::from(ExitCode::Configuration.code()));
    assert!(complaint.contains("/value`, which should hold") && complaint.contains("No such file"), "{complaint}");
}
