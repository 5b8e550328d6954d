//! Real processes: this program is the test, the launcher that gets killed, the replica and the replica's child.
//! Looks at them in /proc, so it is for Linux.
//!
//! Waits are for events or for a process to be gone, each with the same generous bound.

#![expect(clippy::print_stdout, reason = "replicas speak to their launcher by lines, the test to its caller")]

#[path = "common/harness.rs"]
mod harness;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use fairing_core::exit::ExitCode;
use fairing_core::launch::{LaunchError, LaunchPlan, Launched, Launcher, LocalLauncher, Program, ReplicaEvent};
use fairing_core::lifeline::{self, LifelineError};
use fairing_core::observe::events::{Exit, Stream};
use fairing_core::topology::{self, JOIN, KEEP_RESULT, Mode, Placement, Replica, Topology};
use harness::tests;
use tempfile::TempDir;

/// Far above what anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Long enough for a process to be still there when it should have been ended.
const FOREVER: Duration = Duration::from_secs(600);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["replica", behaviour, ..] => replica(behaviour),
        ["child", behaviour, ..] => child(behaviour),
        ["launcher", behaviour, folder] => launcher(behaviour, Path::new(folder)),
        _ => harness::run(TESTS, &arguments, None),
    }
}

// The tests of this program.

const TESTS: harness::Tests<'_> = tests![
    launcher_killed_ends_replicas_and_their_children,
    launcher_killed_during_the_payload_ends_a_replica,
    replaced_executable_still_starts_the_old_program,
    lifeline_reaches_nobody_else,
    replica_sees_an_empty_standard_input,
    replica_sees_only_the_variables_it_was_given,
    replica_starts_in_the_directory_of_the_plan,
    exit_by_code_and_by_signal_is_told_apart,
    lines_arrive_in_order_and_the_last_ones_are_kept,
    large_payload_arrives_whole_and_once,
    replica_without_a_launcher_reads_its_folder,
    replica_of_a_folder_outlives_whoever_started_it,
    program_that_never_reads_does_not_block_the_launcher,
    leftover_child_ends_with_its_replica,
    escaped_grandchild_does_not_hold_up_the_exit,
    killed_replica_is_reported_and_others_go_on,
    unread_events_do_not_block_the_end,
    receiver_that_is_gone_does_not_block_replicas,
    failure_in_the_middle_ends_what_was_started,
    missing_program_is_named,
    unusable_temporary_folder_is_named,
];

// The parts that the program plays.

/// What a replica does in its `main`, before any call of fairing.
#[expect(clippy::zombie_processes, reason = "whether the launcher ends such children is tested")]
fn replica(behaviour: &str) {
    match behaviour {
        "sleep" => {
            println!("pid {}", std::process::id());
            thread::sleep(FOREVER);
        }
        "sleep-with-child" => {
            let child = start_child("sleep", |command| command);
            println!("pid {}", std::process::id());
            println!("pid {}", child.id());
            thread::sleep(FOREVER);
        }
        "leave-child" => {
            println!("pid {}", start_child("sleep", |command| command).id());
        }
        "leave-escaped-child" => {
            println!("pid {}", start_child("sleep", |command| command.process_group(0)).id());
        }
        "say" => println!("the program that was started"),
        "links" => {
            print_links("replica");
            assert!(start_child("links", |command| command).wait().unwrap().success());
        }
        "stdin" => {
            let mut input = Vec::new();
            std::io::stdin().read_to_end(&mut input).unwrap();
            println!("read {}", input.len());
        }
        "environment" => std::env::vars().for_each(|(name, value)| println!("{name}={value}")),
        "directory" => println!("{}", std::env::current_dir().unwrap().display()),
        "exit" if std::env::var("FAIRING_PLACEMENT_ROLE").unwrap() == "ps" => ExitCode::NotFinite.exit(),
        "exit" => std::process::abort(),
        "lines" => {
            for line in 0..100 {
                println!("line {line}");
            }
            println!("10 %\r20 %\r30 %");
            std::io::stdout().write_all(b"bad \xff byte\nno end").unwrap();
        }
        "write" => {
            // Dies of the broken pipe, or is killed, at the latest.
            while writeln!(std::io::stdout(), "more").is_ok() {}
        }
        "write-some" => (0..10_000).for_each(|line| println!("line {line}")),
        "payload" => {
            let payload = lifeline::payload(PATIENCE).unwrap();
            println!("payload {} {}", payload.value.len(), checksum(&payload.value));
            println!("identity {} {}", payload.identity.len(), checksum(&payload.identity));
            println!("{}", lifeline::payload(PATIENCE).unwrap_err());
        }
        other => panic!("unknown behaviour {other}"),
    }
}

fn child(behaviour: &str) {
    // It has the replica's variables, and must not take itself for a replica.
    assert!(matches!(lifeline::payload(Duration::ZERO), Err(LifelineError::NotAttached)));
    match behaviour {
        "sleep" => thread::sleep(FOREVER),
        "links" => print_links("child"),
        other => panic!("unknown behaviour {other}"),
    }
}

fn start_child(behaviour: &str, adjust: impl FnOnce(&mut Command) -> &mut Command) -> Child {
    adjust(Command::new("/proc/self/exe").args(["child", behaviour])).spawn().unwrap()
}

/// Launches two replicas in `folder`, repeats their lines, and waits to be killed.
fn launcher(behaviour: &str, folder: &Path) {
    let mut go = String::new();
    std::io::stdin().read_line(&mut go).unwrap();
    // Larger than a pipe, so that a launcher can be killed while it is being written.
    let run = Run::start(folder, Topology::new(1, 1), behaviour, vec![1; 1 << 20]);
    for event in &run.events {
        if let ReplicaEvent::Line { text, .. } = event {
            println!("{text}");
        }
    }
}

fn print_links(who: &str) {
    for (descriptor, link) in links() {
        println!("{who} {descriptor} {link}");
    }
}

/// This process's open descriptors and what they are.
fn links() -> Vec<(String, String)> {
    let descriptors = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    let link = |path: PathBuf| {
        Some((path.file_name()?.to_str()?.to_owned(), fs::read_link(&path).ok()?.display().to_string()))
    };
    descriptors.filter_map(link).collect()
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(7, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}

// Helpers of the tests.

type Line = (Replica, Stream, String);

struct Run {
    launched: Box<dyn Launched>,
    events: Receiver<ReplicaEvent>,
}

impl Run {
    fn start(folder: &Path, topology: Topology, behaviour: &str, payload: Vec<u8>) -> Self {
        let launcher = LocalLauncher::within(folder).unwrap();
        let mut plan = plan(&launcher, topology, behaviour);
        plan.value = payload;
        let (sender, events) = mpsc::sync_channel(64);
        Self { launched: Box::new(launcher).launch(&plan, sender).unwrap(), events }
    }

    #[track_caller]
    fn next(&self) -> ReplicaEvent {
        self.events.recv_timeout(PATIENCE).expect("an event in time")
    }

    /// The next line; fails at an exit.
    #[track_caller]
    fn line(&self) -> String {
        match self.next() {
            ReplicaEvent::Line { text, .. } => text,
            other => panic!("expected a line, got {other:?}"),
        }
    }

    #[track_caller]
    fn pids(&self, count: usize) -> Vec<u32> {
        (0..count).map(|_| pid(&self.line())).collect()
    }

    /// Everything until all `replicas` have ended.
    #[track_caller]
    fn finish(&self, replicas: usize) -> (Vec<Line>, BTreeMap<Replica, Exit>) {
        let (mut lines, mut exits) = (Vec::new(), BTreeMap::new());
        while exits.len() < replicas {
            match self.next() {
                ReplicaEvent::Line { replica, stream, text } => {
                    assert!(!exits.contains_key(&replica), "{replica} wrote after its exit");
                    lines.push((replica, stream, text));
                }
                ReplicaEvent::Exited { replica, exit } => assert_eq!(exits.insert(replica, exit), None),
                other => panic!("no process says {other:?}"),
            }
        }
        (lines, exits)
    }
}

fn plan(launcher: &LocalLauncher, topology: Topology, behaviour: &str) -> LaunchPlan {
    let servers = launcher.addresses("run", &topology);
    let placement = |replica| Placement {
        run: "test".into(),
        replica,
        topology,
        seed: 0,
        threads: 3,
        servers: servers.clone(),
        data_dir: None,
        mode: Mode::Sync,
        rejoin: Duration::ZERO,
        join: JOIN,
        keep_result: KEEP_RESULT,
        first_stays: false,
    };
    let arguments: Vec<OsString> = ["replica", behaviour].map(OsString::from).into();
    LaunchPlan {
        run: "test".into(),
        placements: topology.replicas().map(placement).collect(),
        program: Program { arguments, ..Program::running() },
        variables: vec![("RUST_BACKTRACE".into(), "0".into())],
        value: Vec::new(),
        identities: topology.replicas().map(|replica| replica.file_name().into()).collect(),
        caller: Vec::new(),
    }
}

/// A launcher in a process of its own that can be killed.
struct OtherLauncher {
    process: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl OtherLauncher {
    fn start(program: &Path, behaviour: &str, folder: &Path) -> Self {
        let mut process = Command::new(program)
            .args(["launcher", behaviour])
            .arg(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        Self { process, output }
    }

    fn go(&mut self) {
        self.process.stdin.take().unwrap().write_all(b"go\n").unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

#[track_caller]
fn pid(line: &str) -> u32 {
    line.strip_prefix("pid ").and_then(|pid| pid.parse().ok()).unwrap_or_else(|| panic!("no pid in {line:?}"))
}

/// Whether the process is there and not a zombie, which an orphan stays where nobody reaps it.
fn is_alive(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let state = stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next());
    !matches!(state, Some('Z' | 'X'))
}

#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[track_caller]
fn all_gone(pids: &[u32]) {
    for &pid in pids {
        eventually(&format!("end of process {pid}"), || !is_alive(pid));
    }
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).unwrap().next().is_none()
}

fn folder() -> TempDir {
    tempfile::Builder::new().prefix("test-").tempdir().unwrap()
}

/// Processes whose command line holds `marker` as an argument of its own.
fn marked(marker: &str) -> HashSet<u32> {
    let processes = fs::read_dir("/proc").unwrap();
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let carries = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|argument| argument == marker.as_bytes())
    };
    pids.filter(carries).collect()
}

// The tests.

fn launcher_killed_ends_replicas_and_their_children() {
    let folder = folder();
    let mut launcher = OtherLauncher::start(Path::new("/proc/self/exe"), "sleep-with-child", folder.path());
    launcher.go();
    let pids: Vec<u32> = (0..4).map(|_| pid(&launcher.line())).collect();
    assert!(pids.iter().all(|&pid| is_alive(pid)));
    assert!(!is_empty(folder.path()));
    launcher.kill();
    all_gone(&pids);
    eventually("removal of the private folder", || is_empty(folder.path()));
}

fn launcher_killed_during_the_payload_ends_a_replica() {
    let (read_end, mut lifeline) = std::io::pipe().unwrap();
    let launcher = LocalLauncher::new().unwrap();
    let plan = plan(&launcher, Topology::new(1, 1), "sleep");
    let mut replica = Command::new("/proc/self/exe")
        .args(&plan.program.arguments)
        .envs(plan.placements[0].to_env())
        .process_group(0)
        .stdin(read_end)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    lifeline.write_all(&[100, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3]).unwrap();
    assert!(is_alive(replica.id()));
    drop(lifeline);
    eventually("end of the replica", || replica.try_wait().unwrap().is_some());
}

fn replaced_executable_still_starts_the_old_program() {
    let folder = folder();
    let program = folder.path().join("program");
    fs::copy("/proc/self/exe", &program).unwrap();
    let sockets = folder.path().join("sockets");
    fs::create_dir(&sockets).unwrap();
    let mut launcher = OtherLauncher::start(&program, "say", &sockets);
    let other = folder.path().join("other");
    fs::write(&other, "not a program").unwrap();
    fs::rename(&other, &program).unwrap();
    launcher.go();
    for _ in 0..2 {
        assert_eq!(launcher.line(), "the program that was started");
    }
    launcher.process.wait().unwrap();
    assert!(is_empty(&sockets));
}

fn lifeline_reaches_nobody_else() {
    let folder = folder();
    // What whoever started this test left open is inherited by everybody.
    let foreign: HashSet<String> = links().into_iter().map(|(_, link)| link).collect();
    let run = Run::start(folder.path(), Topology::new(2, 1), "links", Vec::new());
    let (lines, exits) = run.finish(3);
    assert!(exits.values().all(|exit| *exit == Exit::Code(0)), "{exits:?}");
    let pipes = |replica: Replica, who: &str| -> BTreeMap<String, String> {
        let of_replica = lines.iter().filter(|(of, ..)| *of == replica).map(|(.., text)| text);
        let links = of_replica.filter_map(|text| text.strip_prefix(who)?.trim().split_once(' '));
        let pipes = links.filter(|(_, link)| link.starts_with("pipe:") && !foreign.contains(*link));
        pipes.map(|(descriptor, link)| (descriptor.into(), link.into())).collect()
    };
    let mut all = BTreeSet::new();
    for replica in Topology::new(2, 1).replicas() {
        // A replica has both its outputs and the lifeline, and none of a sibling's pipes; its child the outputs.
        let mut own = pipes(replica, "replica");
        assert_eq!(own.len(), 3, "{own:?}");
        all.extend(own.values().cloned());
        own.retain(|descriptor, _| descriptor == "1" || descriptor == "2");
        assert_eq!(pipes(replica, "child"), own);
    }
    assert_eq!(all.len(), 9);
}

fn replica_sees_an_empty_standard_input() {
    let folder = folder();
    let run = Run::start(folder.path(), Topology::new(1, 1), "stdin", b"not for main".to_vec());
    let (lines, _) = run.finish(2);
    assert_eq!(lines.iter().map(|(.., text)| text.as_str()).collect::<Vec<_>>(), ["read 0", "read 0"]);
}

fn replica_sees_only_the_variables_it_was_given() {
    let folder = folder();
    let run = Run::start(folder.path(), Topology::new(1, 1), "environment", Vec::new());
    let (lines, _) = run.finish(2);
    let of_worker = lines.iter().filter(|(replica, ..)| *replica == Replica::worker(0));
    let variables: BTreeMap<&str, &str> = of_worker.filter_map(|(.., text)| text.split_once('=')).collect();
    let own = variables.keys().filter(|name| !name.starts_with("FAIRING_PLACEMENT_") && **name != "LD_LIBRARY_PATH");
    assert_eq!(own.copied().collect::<Vec<_>>(), ["MIMALLOC_PURGE_DELAY", "RAYON_NUM_THREADS", "RUST_BACKTRACE"]);
    assert_eq!(variables["RAYON_NUM_THREADS"], "3");
    assert_eq!(variables["FAIRING_PLACEMENT_ROLE"], "worker");
}

fn replica_starts_in_the_directory_of_the_plan() {
    let folder = folder();
    let launcher = LocalLauncher::within(folder.path()).unwrap();
    let mut plan = plan(&launcher, Topology::new(1, 1), "directory");
    let directory = folder.path().canonicalize().unwrap();
    plan.program.directory = directory.clone();
    let (sender, events) = mpsc::sync_channel(64);
    let run = Run { launched: Box::new(launcher).launch(&plan, sender).unwrap(), events };
    assert_eq!(PathBuf::from(run.line()), directory);
}

fn exit_by_code_and_by_signal_is_told_apart() {
    let folder = folder();
    let run = Run::start(folder.path(), Topology::new(1, 1), "exit", Vec::new());
    let (_, exits) = run.finish(2);
    let expected = [(Replica::worker(0), Exit::Signal(6)), (Replica::ps(0), Exit::Code(69))];
    assert_eq!(exits, BTreeMap::from(expected));
    assert_eq!(run.launched.process_id(Replica::ps(0)), None);
}

fn lines_arrive_in_order_and_the_last_ones_are_kept() {
    let folder = folder();
    let run = Run::start(folder.path(), Topology::new(1, 1), "lines", Vec::new());
    let (lines, _) = run.finish(2);
    let mut expected: Vec<String> = (0..100).map(|line| format!("line {line}")).collect();
    expected.extend(["30 %", "bad \u{fffd} byte", "no end"].map(String::from));
    for replica in [Replica::ps(0), Replica::worker(0)] {
        let of_replica = lines.iter().filter(|(of, ..)| *of == replica);
        assert_eq!(of_replica.map(|(.., text)| text).collect::<Vec<_>>(), expected.iter().collect::<Vec<_>>());
        assert_eq!(run.launched.last_lines(replica), expected[expected.len() - 20..]);
    }
}

fn large_payload_arrives_whole_and_once() {
    let folder = folder();
    let payload: Vec<u8> = (0..10_000_000_u32).map(|i| (i ^ (i >> 8)) as u8).collect();
    let expected = format!("payload {} {}", payload.len(), checksum(&payload));
    let run = Run::start(folder.path(), Topology::new(1, 1), "payload", payload);
    let (lines, exits) = run.finish(2);
    let count = |text: &str| lines.iter().filter(|(.., line)| line == text).count();
    assert_eq!(count(&expected), 2, "{lines:?}");
    for replica in [Replica::ps(0), Replica::worker(0)] {
        let own = replica.file_name();
        let own = format!("identity {} {}", own.len(), checksum(own.as_bytes()));
        assert!(lines.iter().any(|(of, _, line)| *of == replica && *line == own), "{lines:?}");
    }
    assert_eq!(count("the launcher's payload was taken before"), 2, "{lines:?}");
    assert!(exits.values().all(|exit| *exit == Exit::Code(0)));
}

/// A replica as a cluster starts it: in a group of its own, with a folder instead of somebody at its standard input.
fn start_in_a_cluster(behaviour: &str, folder: &Path) -> Command {
    let servers = "tls:ps-0@127.0.0.1:1";
    let mut command = Command::new("/proc/self/exe");
    command.args(["replica", behaviour]).process_group(0).stdin(Stdio::null()).stdout(Stdio::piped());
    for (name, value) in [
        ("RUN", "test"),
        ("ROLE", "worker"),
        ("RANK", "0"),
        ("WORKERS", "1"),
        ("PS", "1"),
        ("SEED", "0"),
        ("THREADS", "1"),
        ("SERVERS", servers),
    ] {
        command.env(format!("FAIRING_PLACEMENT_{name}"), value);
    }
    command.env(topology::FOLDER, folder);
    command
}

fn replica_without_a_launcher_reads_its_folder() {
    let folder = folder();
    fs::create_dir(folder.path().join("own")).unwrap();
    fs::write(folder.path().join(lifeline::VALUE_FILE), b"value").unwrap();
    fs::write(folder.path().join(lifeline::IDENTITY_FILE), b"key").unwrap();
    // Also by a path from where the program starts.
    for (path, directory) in [(folder.path(), Path::new("/")), (Path::new("."), folder.path())] {
        let ended = start_in_a_cluster("payload", path).current_dir(directory).output().unwrap();
        assert!(ended.status.success(), "{ended:?}");
        let expected = format!(
            "payload 5 {}\nidentity 3 {}\nthe launcher's payload was taken before\n",
            checksum(b"value"),
            checksum(b"key")
        );
        assert_eq!(String::from_utf8(ended.stdout).unwrap(), expected);
    }
    // A process that is no replica's own group is a child of one.
    let mut child = Command::new("/proc/self/exe");
    let child = child.args(["child", "links"]).env("FAIRING_PLACEMENT_ROLE", "worker");
    assert!(child.env(topology::FOLDER, folder.path()).output().unwrap().status.success());
}

fn replica_of_a_folder_outlives_whoever_started_it() {
    let folder = folder();
    let mut replica = start_in_a_cluster("sleep", folder.path()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(replica.stdout.take().unwrap()).read_line(&mut line).unwrap();
    // A replica with a pipe would have seen its end by now.
    thread::sleep(Duration::from_millis(200));
    assert!(is_alive(pid(line.trim_end())));
    replica.kill().unwrap();
    replica.wait().unwrap();
}

fn program_that_never_reads_does_not_block_the_launcher() {
    let folder = folder();
    let launcher = LocalLauncher::within(folder.path()).unwrap();
    let mut plan = plan(&launcher, Topology::new(1, 1), "");
    plan.program.executable = "/bin/sleep".into();
    plan.program.arguments = vec!["600".into()];
    plan.value = vec![0; 10_000_000];
    let (sender, _events) = mpsc::sync_channel(64);
    let mut launched = Box::new(launcher).launch(&plan, sender).unwrap();
    let pids = [Replica::ps(0), Replica::worker(0)].map(|replica| launched.process_id(replica).unwrap());
    assert!(pids.iter().all(|&pid| is_alive(pid)));
    launched.end();
    // Not `all_gone`: `end` has waited.
    assert!(!pids.iter().any(|&pid| is_alive(pid)));
    assert!(is_empty(folder.path()));
}

fn leftover_child_ends_with_its_replica() {
    let folder = folder();
    let run = Run::start(folder.path(), Topology::new(1, 1), "leave-child", Vec::new());
    let (lines, exits) = run.finish(2);
    let pids: Vec<u32> = lines.iter().map(|(.., text)| pid(text)).collect();
    assert_eq!(pids.len(), 2);
    assert!(!pids.iter().any(|&pid| is_alive(pid)), "ended before the exit is reported");
    assert!(exits.values().all(|exit| *exit == Exit::Code(0)), "{exits:?}");
}

fn escaped_grandchild_does_not_hold_up_the_exit() {
    let folder = folder();
    let run = Run::start(folder.path(), Topology::new(1, 1), "leave-escaped-child", Vec::new());
    let (lines, exits) = run.finish(2);
    let pids: Vec<u32> = lines.iter().map(|(.., text)| pid(text)).collect();
    assert_eq!((pids.len(), exits.len()), (2, 2));
    for pid in pids {
        let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
}

fn killed_replica_is_reported_and_others_go_on() {
    let folder = folder();
    let mut run = Run::start(folder.path(), Topology::new(1, 1), "sleep", Vec::new());
    let pids = run.pids(2);
    let server = run.launched.process_id(Replica::ps(0)).unwrap();
    run.launched.kill(Replica::worker(0));
    let exited = ReplicaEvent::Exited { replica: Replica::worker(0), exit: Exit::Signal(9) };
    assert_eq!(run.next(), exited);
    assert!(is_alive(server));
    run.launched.end();
    run.launched.end();
    assert!(!pids.iter().any(|&pid| is_alive(pid)));
    assert!(is_empty(folder.path()));
    let exited = ReplicaEvent::Exited { replica: Replica::ps(0), exit: Exit::Signal(9) };
    assert_eq!(run.next(), exited);
    assert!(run.events.recv().is_err(), "nothing sends any more");
}

fn unread_events_do_not_block_the_end() {
    let folder = folder();
    let run = Run::start(folder.path(), Topology::new(1, 1), "write", Vec::new());
    // The channel is full soon after its first event.
    run.line();
    let started = Instant::now();
    let Run { launched, events } = run;
    drop(launched);
    assert!(started.elapsed() < Duration::from_secs(5));
    assert!(is_empty(folder.path()));
    drop(events);
}

fn receiver_that_is_gone_does_not_block_replicas() {
    let folder = folder();
    let Run { launched, events } = Run::start(folder.path(), Topology::new(1, 1), "write-some", Vec::new());
    drop(events);
    eventually("end of both replicas", || {
        [Replica::ps(0), Replica::worker(0)].iter().all(|&replica| launched.process_id(replica).is_none())
    });
}

fn failure_in_the_middle_ends_what_was_started() {
    let folder = folder();
    let launcher = LocalLauncher::within(folder.path()).unwrap();
    let marker = format!("marker-{}", std::process::id());
    let mut plan = plan(&launcher, Topology::new(1, 1), "sleep");
    plan.program.arguments.push(OsString::from(&marker));
    // No variable can hold this.
    plan.placements[1].run = "nul\0".into();
    let (sender, _events) = mpsc::sync_channel(64);
    let error = Box::new(launcher).launch(&plan, sender).err().expect("the second replica cannot start");
    assert!(matches!(error, LaunchError::Start { replica, .. } if replica == Replica::worker(0)), "{error:?}");
    assert_eq!(marked(&marker), HashSet::new());
    assert!(is_empty(folder.path()));
}

fn missing_program_is_named() {
    let folder = folder();
    let launcher = LocalLauncher::within(folder.path()).unwrap();
    let mut plan = plan(&launcher, Topology::new(1, 1), "say");
    plan.program.executable = "/no/such/program".into();
    plan.program.directory = "/".into();
    let (sender, _events) = mpsc::sync_channel(64);
    let error = Box::new(launcher).launch(&plan, sender).err().expect("there is no such program");
    assert_eq!(error.to_string(), "failed to start ps 0 from `/no/such/program` in `/`");
}

fn unusable_temporary_folder_is_named() {
    let folder = folder();
    let error = LocalLauncher::within(&folder.path().join("missing")).unwrap_err().to_string();
    assert!(error.starts_with("failed to create a private folder in `/") && error.contains("TMPDIR"), "{error}");

    let long = folder.path().join("x".repeat(100));
    fs::create_dir(&long).unwrap();
    let error = LocalLauncher::within(&long).unwrap_err().to_string();
    assert!(error.contains("is longer than the 107 bytes") && error.contains("TMPDIR"), "{error}");
    assert!(is_empty(&long));

    let comma = folder.path().join("a,b");
    fs::create_dir(&comma).unwrap();
    let error = LocalLauncher::within(&comma).unwrap_err().to_string();
    assert!(error.contains("holds a comma") && error.contains("TMPDIR"), "{error}");
}
