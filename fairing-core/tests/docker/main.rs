//! Real containers: this program is the test, the launcher that gets killed, and the replica in the container.
//!
//! Waits are for events or for something to be gone, each with the same generous bound.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "replicas speak by lines, the test to its caller")]

#[expect(dead_code, reason = "the tests of whole runs use more of it")]
mod engine;
#[path = "../common/harness.rs"]
mod harness;
mod images;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use fairing_core::exit::ExitCode;
use fairing_core::launch::docker::{DockerLauncher, Engine as Connection, Limits, RoleLimits};
use fairing_core::launch::{LaunchError, LaunchPlan, Launched, Launcher, Program, ReplicaEvent};
use fairing_core::lifeline;
use fairing_core::observe::events::{Exit, Stream};
use fairing_core::topology::{JOIN, KEEP_RESULT, Mode, Placement, Replica, Topology};

use engine::Engine;
use harness::tests;

/// Far above what anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Long enough for a process to be still there when it should have been ended.
const FOREVER: Duration = Duration::from_secs(600);

/// Port of the servers in their containers.
const PORT: u16 = 7070;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["replica", behaviour] => replica(behaviour),
        ["launcher", run, behaviour] => launcher(run, behaviour),
        _ => run_tests(&arguments),
    }
}

// The tests of this program.

const TESTS: harness::Tests<'_> = tests![
    lines_and_exits_come_back,
    image_with_a_mere_command_gets_the_arguments_too,
    bare_image_has_what_a_program_needs,
    replicas_reach_each_other_by_name_and_nothing_else,
    payload_arrives_by_standard_input_and_nowhere_else,
    termination_ends_the_first_process_of_a_container,
    too_much_memory_is_named,
    killed_container_is_reported_and_others_go_on,
    restarted_replica_takes_its_place,
    relay_skips_what_the_program_prints,
    relay_without_a_launcher_says_so,
    coordinator_that_cannot_be_reached_is_named,
    launcher_killed_leaves_nothing,
    engine_that_goes_away_ends_the_run,
    frozen_engine_ends_the_run,
    two_runs_do_not_see_each_other,
];

fn run_tests(arguments: &[String]) {
    let tests: Vec<_> = TESTS.iter().chain(images::TESTS).copied().collect();
    harness::run(&tests, arguments, engine::missing());
    // Ends the engine, which a static would outlive.
    drop(ENGINE.get().and_then(|engine| engine.lock().unwrap_or_else(PoisonError::into_inner).take()));
}

static ENGINE: OnceLock<Mutex<Option<Engine>>> = OnceLock::new();

fn with_engine<T>(use_it: impl FnOnce(&Engine) -> T) -> T {
    let engine = ENGINE.get_or_init(|| {
        let engine = Engine::start();
        load_image(&engine);
        Mutex::new(Some(engine))
    });
    use_it(engine.lock().unwrap().as_ref().unwrap())
}

const IMAGE: &str = "fairing-tests/launcher";

fn load_image(engine: &Engine) {
    engine.import(&archive(), &["ENTRYPOINT [\"/app\"]"], IMAGE);
}

/// This program and its libraries, on an empty base.
fn archive() -> Vec<u8> {
    let program = fs::canonicalize("/proc/self/exe").unwrap();
    let listed = Command::new("ldd").arg(&program).output().unwrap();
    let libraries = String::from_utf8(listed.stdout).unwrap();
    let libraries = libraries.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    let mut archive = tar::Builder::new(Vec::new());
    archive.sparse(false);
    archive.append_path_with_name(&program, "app").unwrap();
    for library in libraries {
        archive.append_path_with_name(fs::canonicalize(library).unwrap(), &library[1..]).unwrap();
    }
    archive.into_inner().unwrap()
}

// The parts that the program plays.

/// What a replica does in its `main`, before any call of fairing.
fn replica(behaviour: &str) {
    match behaviour {
        "sleep" => {
            println!("ready");
            thread::sleep(FOREVER);
        }
        "lines" => {
            println!("to standard output");
            eprintln!("to standard error");
            std::process::exit(if std::env::var("FAIRING_PLACEMENT_ROLE").unwrap() == "ps" { 3 } else { 0 });
        }
        "files" => {
            list("/context");
            println!("variable {}", std::env::var("VARIABLE").unwrap_or_default());
        }
        "fail" => {
            println!("this step fails");
            std::process::exit(3);
        }
        "look" => {
            println!("user {}", rustix::process::getuid().as_raw());
            println!("process {}", std::process::id());
            println!("root {}", fs::write("/new", "").map_err(|error| error.kind().to_string()).unwrap_err());
            fs::write("/tmp/new", "").unwrap();
            println!("thread {}", thread::spawn(|| 7).join().unwrap());
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
            println!("time {now}");
            println!("capabilities {}", status("CapEff:"));
            println!("privileges {}", status("NoNewPrivs:"));
        }
        "names" => {
            let listener = TcpListener::bind(("0.0.0.0", PORT)).unwrap();
            let other = if std::env::var("FAIRING_PLACEMENT_ROLE").unwrap() == "ps" { "worker-0" } else { "ps-0" };
            eventually("the other replica listens", || std::net::TcpStream::connect((other, PORT)).is_ok());
            println!("met {other}");
            drop(listener.accept().unwrap());
            // An address that is nobody's: with a way out this would be tried for long, without one it fails at once.
            println!("outside {}", std::net::TcpStream::connect("192.0.2.1:1").unwrap_err().kind());
        }
        "payload" => {
            let payload = lifeline::payload(PATIENCE).unwrap();
            println!(
                "payload {} {}",
                payload.value.len(),
                payload.value.iter().map(|byte| u64::from(*byte)).sum::<u64>()
            );
            println!("identity {}", String::from_utf8(payload.identity).unwrap());
            let environment = fs::read("/proc/self/environ").unwrap();
            println!("environment {}", environment.windows(6).any(|window| window == b"secret"));
        }
        "eat" => {
            let mut eaten: Vec<Vec<u8>> = Vec::new();
            loop {
                eaten.push(vec![1; 1 << 20]);
                std::hint::black_box(&eaten);
            }
        }
        "echo" => {
            // Prints much and goes on printing while it is a server; a relay of the same program must not be disturbed.
            println!("{}", "x".repeat(1 << 20));
            thread::spawn(|| {
                loop {
                    println!("more");
                    thread::sleep(Duration::from_millis(1));
                }
            });
            let listener = TcpListener::bind(("0.0.0.0", PORT)).unwrap();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut reader = stream.try_clone().unwrap();
                thread::spawn(move || std::io::copy(&mut reader, &mut stream));
            }
        }
        other => panic!("unknown behaviour {other}"),
    }
}

fn list(folder: &str) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        println!("file {}", path.display());
        if path.is_dir() {
            list(path.to_str().unwrap());
        }
    }
}

fn status(field: &str) -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    status.lines().find_map(|line| line.strip_prefix(field)).unwrap().trim().to_owned()
}

/// Launches two replicas, repeats their lines, and waits to be killed.
fn launcher(run: &str, behaviour: &str) {
    let run = Run::with(run, Topology::new(1, 1), behaviour, RoleLimits::default(), vec![]);
    for event in &run.events {
        if let ReplicaEvent::Line { text, .. } = event {
            println!("{text}");
        }
    }
}

// Helpers of the tests.

/// Who wrote it, where, and what.
type Line = (Replica, Stream, String);

struct Run {
    launched: Box<dyn Launched>,
    plan: LaunchPlan,
    events: Receiver<ReplicaEvent>,
    sender: mpsc::SyncSender<ReplicaEvent>,
}

impl Run {
    fn start(topology: Topology, behaviour: &str) -> Self {
        Self::with(&name(), topology, behaviour, RoleLimits::default(), vec![])
    }

    fn with(run: &str, topology: Topology, behaviour: &str, limits: RoleLimits, payload: Vec<u8>) -> Self {
        Self::of_image(IMAGE, run, topology, behaviour, limits, payload)
    }

    fn of_image(
        image: &str,
        run: &str,
        topology: Topology,
        behaviour: &str,
        limits: RoleLimits,
        payload: Vec<u8>,
    ) -> Self {
        Self::launch(connect(), image, run, topology, behaviour, limits, payload).unwrap()
    }

    fn launch(
        connection: Connection,
        image: &str,
        run: &str,
        topology: Topology,
        behaviour: &str,
        limits: RoleLimits,
        payload: Vec<u8>,
    ) -> Result<Self, LaunchError> {
        let launcher = DockerLauncher::new(connection, image.to_owned(), limits);
        let servers = launcher.addresses("run", &topology);
        let placement = |replica| Placement {
            run: run.into(),
            replica,
            topology,
            seed: 0,
            threads: 1,
            servers: servers.clone(),
            data_dir: None,
            mode: Mode::Sync,
            rejoin: Duration::ZERO,
            join: JOIN,
            keep_result: KEEP_RESULT,
            first_stays: false,
        };
        let arguments: Vec<OsString> = ["replica", behaviour].map(OsString::from).into();
        let plan = LaunchPlan {
            run: run.into(),
            placements: topology.replicas().map(placement).collect(),
            program: Program { arguments, ..Program::running() },
            variables: vec![],
            value: payload,
            identities: topology.replicas().map(|replica| replica.file_name().into()).collect(),
            caller: Vec::new(),
        };
        let (sender, events) = mpsc::sync_channel(64);
        let launched = Box::new(launcher).launch(&plan, sender.clone())?;
        Ok(Self { launched, plan, events, sender })
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

    /// Everything until `replicas` have ended.
    #[track_caller]
    fn finish(&self, replicas: usize) -> (Vec<Line>, BTreeMap<Replica, Exit>) {
        let (mut lines, mut exits) = (Vec::new(), BTreeMap::new());
        while exits.len() < replicas {
            match self.next() {
                ReplicaEvent::Line { replica, stream, text } => lines.push((replica, stream, text)),
                ReplicaEvent::Exited { replica, exit } => assert_eq!(exits.insert(replica, exit), None),
                other => panic!("no engine says {other:?}"),
            }
        }
        (lines, exits)
    }
}

/// fairing's connection to the engine.
fn connect() -> Connection {
    let host = std::env::var("DOCKER_HOST").unwrap_or_else(|_| with_engine(Engine::host));
    Connection::connect(&BTreeMap::from([("DOCKER_HOST".to_owned(), host)])).unwrap()
}

/// A name for a run that no other test has.
fn name() -> String {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    format!("run-{}", NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
}

#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Containers, networks of runs, volumes and dangling images of the engine.
fn left(engine: &Engine) -> Vec<String> {
    let mut left = engine.lines(&["ps", "--all", "--format", "container {{.Names}} {{.Status}}"]);
    left.extend(engine.lines(&["network", "ls", "--filter", "label=fairing.dev/run", "--format", "network {{.Name}}"]));
    left.extend(engine.lines(&["volume", "ls", "--format", "volume {{.Name}}"]));
    left.extend(engine.lines(&["images", "--filter", "dangling=true", "--format", "image {{.ID}}"]));
    left
}

#[track_caller]
fn nothing_is_left() {
    assert_eq!(with_engine(left), Vec::<String>::new());
}

// The tests.

fn image_with_a_mere_command_gets_the_arguments_too() {
    const COMMAND_ONLY: &str = "fairing-tests/command";
    with_engine(|engine| engine.import(&archive(), &["CMD [\"/app\"]"], COMMAND_ONLY));
    let run = Run::of_image(COMMAND_ONLY, &name(), Topology::new(1, 1), "lines", RoleLimits::default(), vec![]);
    let (lines, exits) = run.finish(2);
    assert_eq!(exits[&Replica::worker(0)], Exit::Code(0), "{lines:?}");
}

fn lines_and_exits_come_back() {
    let mut run = Run::start(Topology::new(2, 1), "lines");
    let (lines, exits) = run.finish(3);
    let expected =
        [(Replica::ps(0), Exit::Code(3)), (Replica::worker(0), Exit::Code(0)), (Replica::worker(1), Exit::Code(0))];
    assert_eq!(exits, expected.into());
    for replica in exits.keys() {
        assert!(lines.contains(&(*replica, Stream::Stdout, "to standard output".into())), "{lines:?}");
        assert!(lines.contains(&(*replica, Stream::Stderr, "to standard error".into())), "{lines:?}");
    }
    assert_eq!(run.launched.last_lines(Replica::ps(0)).len(), 2);
    assert_eq!(run.launched.end(), Vec::<String>::new());
    nothing_is_left();
    assert_eq!(run.launched.end(), Vec::<String>::new());
}

fn bare_image_has_what_a_program_needs() {
    let run = Run::start(Topology::new(1, 1), "look");
    let (lines, _) = run.finish(2);
    let said: Vec<&str> = lines.iter().filter(|line| line.0 == Replica::ps(0)).map(|line| line.2.as_str()).collect();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let time: u64 = said.iter().find_map(|line| line.strip_prefix("time ")).unwrap().parse().unwrap();
    assert!(now.abs_diff(time) < PATIENCE.as_secs());
    for expected in
        ["user 65532", "process 1", "root read-only filesystem or storage medium", "thread 7", "privileges 1"]
    {
        assert!(said.contains(&expected), "{expected} in {said:?}");
    }
    assert!(said.contains(&"capabilities 0000000000000000"), "{said:?}");
}

fn replicas_reach_each_other_by_name_and_nothing_else() {
    let run = Run::start(Topology::new(1, 1), "names");
    let (lines, exits) = run.finish(2);
    assert!(exits.values().all(|exit| *exit == Exit::Code(0)), "{lines:?}");
    assert!(lines.iter().any(|line| line.2 == "met ps-0") && lines.iter().any(|line| line.2 == "met worker-0"));
    assert_eq!(lines.iter().filter(|line| line.2 == "outside network unreachable").count(), 2, "{lines:?}");
}

fn payload_arrives_by_standard_input_and_nowhere_else() {
    let payload = b"secret".repeat(1_000_000);
    let sum: u64 = payload.iter().map(|byte| u64::from(*byte)).sum();
    let run_name = name();
    let run = Run::with(&run_name, Topology::new(1, 1), "payload", RoleLimits::default(), payload.clone());
    let seen = with_engine(|engine| engine.docker(&["inspect", &format!("{run_name}-worker-0")]));
    assert!(seen.status.success());
    assert!(!String::from_utf8_lossy(&seen.stdout).contains("secret"));
    let (lines, exits) = run.finish(2);
    assert!(exits.values().all(|exit| *exit == Exit::Code(0)), "{lines:?}");
    let expected = format!("payload {} {sum}", payload.len());
    assert_eq!(lines.iter().filter(|line| line.2 == expected).count(), 2, "{lines:?}");
    for replica in [Replica::ps(0), Replica::worker(0)] {
        let own = format!("identity {}", replica.file_name());
        assert!(lines.iter().any(|line| line.0 == replica && line.2 == own), "{lines:?}");
    }
    assert_eq!(lines.iter().filter(|line| line.2 == "environment false").count(), 2, "{lines:?}");
}

fn termination_ends_the_first_process_of_a_container() {
    let run_name = name();
    let run = Run::with(&run_name, Topology::new(1, 1), "sleep", RoleLimits::default(), vec![]);
    let _ready = [run.line(), run.line()];
    with_engine(|engine| engine.lines(&["kill", "--signal", "TERM", &format!("{run_name}-worker-0")]));
    let (_, exits) = run.finish(1);
    assert_eq!(exits, [(Replica::worker(0), Exit::Signal(15))].into());
}

fn too_much_memory_is_named() {
    let limits = Limits { memory_bytes: Some(64 << 20), millicores: Some(500) };
    let run = Run::with(&name(), Topology::new(1, 1), "eat", RoleLimits { worker: limits, ps: limits }, vec![]);
    let (_, exits) = run.finish(2);
    assert!(exits.values().all(|exit| *exit == Exit::Signal(9)), "{exits:?}");
    let last = run.launched.last_lines(Replica::worker(0));
    // The engine does not always hear of it from the kernel; the remedy is named all the same.
    assert!(last.len() == 1 && last[0].ends_with("memory (limit 64 MiB; raise `memory` of this role)"), "{last:?}");
}

fn killed_container_is_reported_and_others_go_on() {
    let run_name = name();
    let run = Run::with(&run_name, Topology::new(2, 1), "sleep", RoleLimits::default(), vec![]);
    (0..3).for_each(|_| _ = run.line());
    with_engine(|engine| engine.lines(&["kill", &format!("{run_name}-worker-1")]));
    assert_eq!(run.next(), ReplicaEvent::Exited { replica: Replica::worker(1), exit: Exit::Signal(9) });
    run.launched.kill(Replica::worker(0));
    assert_eq!(run.next(), ReplicaEvent::Exited { replica: Replica::worker(0), exit: Exit::Signal(9) });
    let running = with_engine(|engine| engine.lines(&["ps", "--format", "{{.Names}}"]));
    assert_eq!(running, [format!("{run_name}-ps-0")]);
    drop(run);
    nothing_is_left();
}

fn restarted_replica_takes_its_place() {
    let mut run = Run::start(Topology::new(1, 1), "sleep");
    (0..2).for_each(|_| _ = run.line());
    run.launched.kill(Replica::worker(0));
    let (_, exits) = run.finish(1);
    assert_eq!(exits, [(Replica::worker(0), Exit::Signal(9))].into());
    run.launched.restart(&run.plan, Replica::worker(0), run.sender.clone()).unwrap();
    assert_eq!(run.line(), "ready");
    drop(run);
    nothing_is_left();
}

fn relay_skips_what_the_program_prints() {
    let run = Run::start(Topology::new(1, 1), "echo");
    // Whoever follows the run must not be held up by what it prints meanwhile.
    let Run { launched, events, sender, .. } = run;
    drop(sender);
    let reader = thread::spawn(move || while events.recv_timeout(PATIENCE).is_ok() {});
    let mut streams = Vec::new();
    let way = launched.way();
    eventually("the coordinator's container is reached", || way.connect().map(|stream| streams.push(stream)).is_ok());
    streams.push(way.connect().unwrap());
    let sent: Vec<u8> = (0..10_000_000u32).map(|i| (i >> 3) as u8).collect();
    for mut stream in streams {
        let mut writer = stream.try_clone().unwrap();
        let bytes = sent.clone();
        let writing = thread::spawn(move || writer.write_all(&bytes));
        let mut received = vec![0; sent.len()];
        stream.read_exact(&mut received).unwrap();
        assert!(received == sent);
        writing.join().unwrap().unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    drop(launched);
    reader.join().unwrap();
    nothing_is_left();
}

fn relay_without_a_launcher_says_so() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut relay = Command::new("/proc/self/exe")
        .env("FAIRING_PLACEMENT_RELAY", format!("{port} nonce"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(relay.stdout.take());
    let mut stream = None;
    eventually("the relay connects", || listener.accept().map(|(accepted, _)| stream = Some(accepted)).is_ok());
    let mut stream = stream.unwrap();
    stream.set_nonblocking(false).unwrap();
    while stream.write_all(&[0; 1 << 16]).is_ok() {}
    let relay = relay.wait_with_output().unwrap();
    let said = String::from_utf8(relay.stderr).unwrap();
    assert!(said.starts_with("fairing: the relay failed: Broken pipe"), "{:?} {said}", relay.status);
    assert_eq!(relay.status.code(), Some(ExitCode::Protocol.code().into()));
}

fn coordinator_that_cannot_be_reached_is_named() {
    let run_name = name();
    let run = Run::with(&run_name, Topology::new(1, 1), "sleep", RoleLimits::default(), vec![]);
    (0..2).for_each(|_| _ = run.line());
    let coordinator = format!("{run_name}-ps-0");
    // No engine starts a second program in a container that is paused.
    with_engine(|engine| engine.lines(&["pause", &coordinator]));
    let way = run.launched.way();
    let mut said = None;
    eventually("the reason is said", || {
        assert!(way.connect().is_err());
        said = run.events.try_recv().ok();
        said.is_some()
    });
    // Once is enough.
    assert!(way.connect().is_err());
    with_engine(|engine| engine.lines(&["unpause", &coordinator]));
    run.launched.kill(Replica::worker(0));
    let (lines, _) = run.finish(1);
    assert_eq!(lines, []);
    let Some(ReplicaEvent::Line { replica, stream, text }) = said else { panic!("{said:?}") };
    assert_eq!((replica, stream), (Replica::ps(0), Stream::Stderr));
    let expected = "fairing: the coordinator cannot be reached through the engine: ";
    assert!(text.starts_with(expected) && text.contains("paused"), "{text}");
    drop(run);
    nothing_is_left();
}

fn launcher_killed_leaves_nothing() {
    let host = with_engine(Engine::host);
    let run_name = name();
    let mut launcher: Child = Command::new("/proc/self/exe")
        .args(["launcher", &run_name, "sleep"])
        .env("DOCKER_HOST", host)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut output = launcher.stdout.take().unwrap();
    let mut byte = [0];
    while said.matches("ready").count() < 2 {
        output.read_exact(&mut byte).unwrap();
        said.push(char::from(byte[0]));
    }
    assert!(!with_engine(left).is_empty());
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    eventually("nothing is left of the run", || with_engine(left).is_empty());
    // The engine may have been making something, and finish it only now.
    thread::sleep(Duration::from_secs(5));
    let label = format!("--label=fairing.dev/run={run_name}");
    with_engine(|engine| engine.lines(&["network", "create", &label, &run_name]));
    eventually("what was made late is removed as well", || with_engine(left).is_empty());
}

fn engine_that_goes_away_ends_the_run() {
    let engine = Engine::start();
    load_image(&engine);
    let env = BTreeMap::from([("DOCKER_HOST".to_owned(), engine.host())]);
    let connection = Connection::connect(&env).unwrap();
    let topology = Topology::new(1, 1);
    let launcher = DockerLauncher::new(connection, IMAGE.to_owned(), RoleLimits::default());
    let mut other = Run::start(topology, "sleep");
    let (sender, events) = mpsc::sync_channel(64);
    let plan = LaunchPlan { run: name(), ..other.plan.clone() };
    let launched = Box::new(launcher).launch(&plan, sender).unwrap();
    let mut run = Run { launched, plan, events, sender: other.sender.clone() };
    (0..2).for_each(|_| _ = run.line());
    drop(engine);
    let (lines, exits) = run.finish(2);
    assert!(exits.values().all(|exit| *exit == Exit::Code(-1)), "{exits:?}");
    assert!(
        lines.iter().all(|line| line.2.starts_with("fairing: how its container ended was not seen: ")),
        "{lines:?}"
    );
    let left = run.launched.end();
    assert!(left.len() == 1 && left[0].contains("may be left at"), "{left:?}");
    assert_eq!(other.launched.end(), Vec::<String>::new());
}

fn frozen_engine_ends_the_run() {
    let engine = Engine::start();
    load_image(&engine);
    let connection = Connection::connect(&BTreeMap::from([("DOCKER_HOST".to_owned(), engine.host())])).unwrap();
    let topology = Topology::new(1, 1);
    let launched = Run::launch(connection, IMAGE, &name(), topology, "sleep", RoleLimits::default(), vec![]);
    let mut run = launched.unwrap();
    (0..2).for_each(|_| _ = run.line());
    let frozen = engine.freeze();
    run.launched.kill(Replica::worker(0));
    assert!(run.events.try_recv().is_err(), "killing waits for nobody");
    let (lines, exits) = run.finish(2);
    assert!(exits.values().all(|exit| *exit == Exit::Code(-1)), "{exits:?}");
    let expected = "fairing: how its container ended was not seen: the engine does not answer";
    assert!(lines.len() == 2 && lines.iter().all(|line| line.2.starts_with(expected)), "{lines:?}");
    let not_removed = run.launched.end();
    assert!(not_removed.len() == 1 && not_removed[0].contains("may be left at"), "{not_removed:?}");
    drop(frozen);
    eventually("the guardian cleans up", || left(&engine).is_empty());
}

fn two_runs_do_not_see_each_other() {
    let first = Run::start(Topology::new(1, 1), "names");
    let second = Run::start(Topology::new(1, 1), "names");
    for run in [&first, &second] {
        let (lines, exits) = run.finish(2);
        assert!(exits.values().all(|exit| *exit == Exit::Code(0)), "{lines:?}");
        // Each pair has met once: had a name led to the other run, one would have waited in vain.
        assert_eq!(lines.iter().filter(|line| line.2.starts_with("met ")).count(), 2);
    }
}
