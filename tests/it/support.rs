//! Starts a program with folders of its own, follows what it prints, and looks at its processes.
//!
//! Looks at them in /proc, so the process tests are for Linux. Waits are for events or for a process to be gone.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use fairing_tests::law::Law;
use rustix::process::Pid;
pub(crate) use rustix::process::Signal;
use tempfile::TempDir;

/// Far above what anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Pause between two looks at something that cannot be waited for.
const NAP: Duration = Duration::from_millis(5);

/// A program to be started, with folders of its own.
pub(crate) struct Program {
    folder: TempDir,
    command: Command,
}

impl Program {
    /// The fixture with one of its faces; `face` is cut at blanks.
    pub(crate) fn fixture(face: &str) -> Self {
        Self::fixture_at(Path::new(env!("CARGO_BIN_EXE_fixture")), face)
    }

    /// A copy of the fixture at `path`.
    pub(crate) fn fixture_at(path: &Path, face: &str) -> Self {
        let mut program = Self::new(path);
        program.command.arg("--marker").arg(program.folder.path()).args(face.split(' '));
        program
    }

    /// Trains `law`, and prints `fingerprint` with that of its model.
    pub(crate) fn law(law: &Law, workers: u32, ps: u32) -> Self {
        Self::fixture(&format!("law {} {workers} {ps}", serde_json::to_string(law).unwrap()))
    }

    /// Another program.
    pub(crate) fn new(path: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(path);
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("FAIRING_") || text.starts_with("RUST_") || text == "TERM" {
                command.env_remove(name);
            }
        }
        for (name, variable) in [("runs", "FAIRING_RUNS"), ("tmp", "TMPDIR")] {
            let path = folder.path().join(name);
            fs::create_dir(&path).unwrap();
            command.env(variable, path);
        }
        Self { folder, command }
    }

    /// Lets the program keep its runs on a disk of `kilobytes`, which only it sees and which goes with it.
    ///
    /// `None`, and a line that says so, where this user may not mount one; in CI that is a failure.
    pub(crate) fn with_disk_of(self, kilobytes: u32) -> Option<Self> {
        let runs = self.folder.path().join("runs");
        let options = format!("size={kilobytes}k");
        let mounting = |ways: &[&str], then: &str| {
            let mut command = Command::new("unshare");
            command.args(ways).args(["--mount", "sh", "-c"]);
            command.arg(format!("mount -t tmpfs -o {options} fairing-test \"$0\" && {then}")).arg(&runs);
            command
        };
        let may_mount = |ways: &&&[&str]| mounting(ways, "true").output().is_ok_and(|output| output.status.success());
        // The second way is for those who are not root.
        let ways: [&[&str]; 2] = [&[], &["--user", "--map-root-user"]];
        let Some(ways) = ways.iter().find(may_mount) else {
            let name = thread::current().name().unwrap_or("a test").to_owned();
            let skipped = format!("skipped: {name} (`unshare --mount` and `mount` are not allowed here)");
            assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{skipped}");
            // libtest shows what the macros print of failed tests only.
            std::io::stderr().write_all(format!("{skipped}\n").as_bytes()).unwrap();
            return None;
        };
        Some(self.behind(mounting(ways, "exec \"$@\"")))
    }

    /// Lets the program have the network of the process `id`.
    pub(crate) fn beside(self, id: u32) -> Self {
        let mut command = Command::new("nsenter");
        command.args(["--target", &id.to_string(), "--net"]);
        self.behind(command)
    }

    /// Has the program started by another command, which takes its place.
    fn behind(mut self, mut command: Command) -> Self {
        command.arg(self.command.get_program()).args(self.command.get_args());
        for (name, value) in self.command.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        self.command = command;
        self
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn argument(mut self, argument: &str) -> Self {
        self.command.arg(argument);
        self
    }

    /// Runs it to its end.
    #[track_caller]
    pub(crate) fn run(self) -> Ended {
        self.start().end()
    }

    #[track_caller]
    pub(crate) fn start(mut self) -> Running {
        // A group of its own, as a shell gives a job, so that a test can signal all of it.
        self.command.process_group(0).current_dir(self.folder.path());
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.command.spawn().unwrap();
        let (sender, lines) = channel();
        forward(From::Stdout, child.stdout.take().unwrap(), sender.clone());
        forward(From::Stderr, child.stderr.take().unwrap(), sender);
        let stdin = child.stdin.take();
        Running { folder: Some(self.folder), child, stdin, lines, seen: Vec::new() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    Stdout,
    Stderr,
}

fn forward(from: From, pipe: impl Read + Send + 'static, sender: Sender<(From, String)>) {
    thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            if sender.send((from, String::from_utf8_lossy(&line).into_owned())).is_err() {
                return;
            }
        }
    });
}

/// A program that runs; dropping it ends all its processes.
pub(crate) struct Running {
    /// Given up by [`Running::end`].
    folder: Option<TempDir>,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<(From, String)>,
    seen: Vec<(From, String)>,
}

impl Running {
    fn folder(&self) -> &Path {
        self.folder.as_ref().expect("given up only at the end").path()
    }

    /// Waits until some line contains `text`.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.seen.iter().any(|(_, line)| line.contains(text)) {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.seen.push(line),
                Err(_) => panic!("`{text}` did not come; what came:\n{}", all(&self.seen)),
            }
        }
    }

    pub(crate) fn write_line(&mut self) {
        self.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }

    /// Sends a signal to the program itself, which is the launcher.
    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    /// Sends a signal to the program's whole process group, as a terminal does.
    pub(crate) fn signal_group(&self, signal: Signal) {
        rustix::process::kill_process_group(self.pid(), signal).unwrap();
    }

    /// Kills the process that would clean up after the program, and then the program.
    #[track_caller]
    pub(crate) fn kill_with_guardian(&self) {
        let launcher = self.pid().as_raw_nonzero();
        let children = fs::read_dir(format!("/proc/{launcher}/task")).unwrap().flat_map(|task| {
            let children = fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default();
            children.split_whitespace().map(|child| child.parse().unwrap()).collect::<Vec<i32>>()
        });
        let is_guardian = |child: &i32| {
            let environment = fs::read(format!("/proc/{child}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|pair| pair.starts_with(b"FAIRING_PLACEMENT_GUARDIAN="))
        };
        let guardian = children.into_iter().find(is_guardian).expect("a guardian");
        rustix::process::kill_process(Pid::from_raw(guardian).unwrap(), Signal::KILL).unwrap();
        self.signal(Signal::KILL);
    }

    /// Of the program itself, which is the launcher.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// The process of one replica.
    #[track_caller]
    pub(crate) fn replica(&self, role: &str, rank: u32) -> Pid {
        let role = format!("FAIRING_PLACEMENT_ROLE={role}");
        let rank = format!("FAIRING_PLACEMENT_RANK={rank}");
        // A replica's children inherit its variables but lead no group; in a container there may be a relay beside it.
        let is_replica = |process: &&Process| {
            let is_relay = process.environment.iter().any(|pair| pair.starts_with("FAIRING_PLACEMENT_RELAY="));
            let has = |pair| process.environment.contains(pair);
            has(&role) && has(&rank) && process.leads_its_group && !is_relay
        };
        let processes = processes(self.folder());
        processes.values().find(is_replica).unwrap_or_else(|| panic!("no {role} {rank} in {processes:?}")).pid
    }

    #[track_caller]
    pub(crate) fn signal_replica(&self, role: &str, rank: u32, signal: Signal) {
        rustix::process::kill_process(self.replica(role, rank), signal).unwrap();
    }

    /// The number of all processes of the program.
    pub(crate) fn processes(&self) -> usize {
        processes(self.folder()).len()
    }

    /// Waits until only `count` processes of the program are left.
    #[track_caller]
    pub(crate) fn wait_for_processes(&self, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.processes() > count {
            assert!(Instant::now() < deadline, "{:?}", processes(self.folder()));
            thread::sleep(NAP);
        }
    }

    /// Waits for the end, and for all output.
    #[track_caller]
    pub(crate) fn end(mut self) -> Ended {
        let deadline = Instant::now() + PATIENCE;
        drop(self.stdin.take());
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            self.seen.push(line);
        }
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() < deadline => thread::sleep(NAP),
                None => panic!("the program did not end; what came:\n{}", all(&self.seen)),
            }
        };
        let folder = self.folder.take().expect("given up only here");
        Ended { folder, status, lines: std::mem::take(&mut self.seen) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(folder) = &self.folder {
            for process in processes(folder.path()).values() {
                let _ = rustix::process::kill_process(process.pid, Signal::KILL);
            }
            let _ = self.child.wait();
        }
    }
}

/// What is left of a program that has ended.
pub(crate) struct Ended {
    folder: TempDir,
    status: ExitStatus,
    lines: Vec<(From, String)>,
}

impl Ended {
    /// Checks the exit code.
    #[track_caller]
    pub(crate) fn code(self, code: i32) -> Self {
        assert_eq!(self.status.code(), Some(code), "{:?}\n{}", self.status, all(&self.lines));
        self
    }

    /// Checks that a signal ended the program.
    #[track_caller]
    pub(crate) fn signalled(self, signal: Signal) -> Self {
        assert_eq!(self.status.signal(), Some(signal.as_raw()), "{:?}\n{}", self.status, all(&self.lines));
        self
    }

    /// Checks that some line contains `text`.
    #[track_caller]
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(self.lines.iter().any(|(_, line)| line.contains(text)), "no `{text}` in:\n{}", all(&self.lines));
        self
    }

    /// Checks that exactly one line contains `text`.
    #[track_caller]
    pub(crate) fn says_once(&self, text: &str) {
        let count = self.lines.iter().filter(|(_, line)| line.contains(text)).count();
        assert_eq!(count, 1, "`{text}` in:\n{}", all(&self.lines));
    }

    /// Checks that no line contains `text`.
    #[track_caller]
    pub(crate) fn never_says(self, text: &str) -> Self {
        assert!(!self.lines.iter().any(|(_, line)| line.contains(text)), "`{text}` in:\n{}", all(&self.lines));
        self
    }

    /// Checks that now, without any more waiting, no process and no private folder is left.
    #[track_caller]
    pub(crate) fn nothing_left(self) -> Self {
        let left = processes(self.folder.path());
        assert!(left.is_empty(), "{left:?}\n{}", all(&self.lines));
        self.no_private_folder()
    }

    /// Waits until all processes have ended of themselves, and checks that no private folder is left.
    #[track_caller]
    pub(crate) fn nothing_stays(self) -> Self {
        let deadline = Instant::now() + PATIENCE;
        while !processes(self.folder.path()).is_empty() {
            assert!(Instant::now() < deadline, "{:?}", processes(self.folder.path()));
            thread::sleep(NAP);
        }
        self.no_private_folder()
    }

    #[track_caller]
    fn no_private_folder(self) -> Self {
        let left: Vec<_> =
            fs::read_dir(self.folder.path().join("tmp")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(left.is_empty(), "{left:?}");
        self
    }

    /// The program's own lines on standard output, without those of replicas.
    pub(crate) fn own_lines(&self) -> Vec<&str> {
        self.stdout().filter(|line| !line.contains(" | ")).collect()
    }

    /// What a replica wrote on standard output, for example of `worker 0`, each line without its prefix.
    pub(crate) fn stdout_of(&self, replica: &str) -> Vec<&str> {
        let prefix = format!("{replica} | ");
        self.stdout().filter_map(|line| line.strip_prefix(&prefix)).collect()
    }

    pub(crate) fn stdout(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().filter(|(from, _)| *from == From::Stdout).map(|(_, line)| line.as_str())
    }

    pub(crate) fn stderr(&self) -> String {
        let lines = self.lines.iter().filter(|(from, _)| *from == From::Stderr);
        lines.map(|(_, line)| format!("{line}\n")).collect()
    }

    /// The folder of the program's last run.
    pub(crate) fn run_folder(&self) -> PathBuf {
        self.folder.path().join("runs/latest")
    }

    /// The summary of the program's last run.
    #[track_caller]
    pub(crate) fn summary(&self) -> serde_json::Value {
        serde_json::from_slice(&fs::read(self.run_folder().join("summary.json")).unwrap()).unwrap()
    }

    /// Whether the last run left a model.
    pub(crate) fn has_model(&self) -> bool {
        let mut files = fs::read_dir(self.run_folder()).unwrap();
        files.any(|entry| entry.unwrap().file_name().to_string_lossy().starts_with("model."))
    }
}

fn all(lines: &[(From, String)]) -> String {
    lines.iter().map(|(from, line)| format!("  {from:?}: {line}\n")).collect()
}

#[derive(Debug)]
struct Process {
    pid: Pid,
    leads_its_group: bool,
    environment: Vec<String>,
}

/// All processes that have `marker` among their arguments.
fn processes(marker: &Path) -> BTreeMap<i32, Process> {
    let numbers = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    numbers.filter_map(|number| Some((number, process(number, marker)?))).collect()
}

/// `None` if it has ended or is another program's. A process that has ended and waits to be reaped has no arguments.
fn process(number: i32, marker: &Path) -> Option<Process> {
    let texts = |file: &str| {
        let bytes = fs::read(format!("/proc/{number}/{file}")).ok()?;
        Some(bytes.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned()).collect::<Vec<_>>())
    };
    texts("cmdline")?.iter().find(|argument| Path::new(argument) == marker)?;
    let environment = texts("environ")?;
    let pid = Pid::from_raw(number)?;
    let leads_its_group = rustix::process::getpgid(Some(pid)) == Ok(pid);
    Some(Process { pid, leads_its_group, environment })
}
