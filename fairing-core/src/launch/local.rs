//! Replicas as processes on this machine.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use tempfile::TempDir;

use super::events::{Ending, Events, LastLines, lock};
use super::lines::Lines;
use super::{LaunchError, LaunchPlan, Launched, Launcher, ReplicaEvent, Way, tuning};
use crate::config::{Env, ProcessEnv};
use crate::lifeline;
use crate::observe::events::{Exit, Stream};
use crate::topology::{Address, Placement, Replica, Topology};

/// Longest path of a socket: `sun_path` holds 108 bytes on Linux and 104 elsewhere, the last one a NUL.
const SOCKET_PATH_BYTES: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// Time that a replica's output may take to end after its process has. It ends at once, unless a grandchild that left the
/// process group holds the pipe, and that one must not hold up the run.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// Time for a killed process group to be gone. Takes milliseconds; longer where nobody reaps orphans, as in a
/// container without an init process, and there is nothing more to be done about those.
const GROUP_TIMEOUT: Duration = Duration::from_secs(1);

/// Time for a killed replica to be reaped, drained and reported; longer only if the kernel cannot end the process.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause between two looks at something that cannot be waited for.
const NAP: Duration = Duration::from_millis(2);

/// Bytes read from a replica at once: what a Linux pipe holds.
const READ_BYTES: usize = 64 << 10;

/// Bytes that may still be in a pipe when its writer is gone: the most that Linux lets a pipe hold.
const PIPE_BYTES: usize = 1 << 20;

/// Starts replicas as processes on this machine that run the plan's program.
///
/// Parameter servers listen on Unix sockets in a private folder (mode 0700), which lives as long as the run.
#[derive(Debug)]
pub struct LocalLauncher {
    folder: TempDir,
}

impl LocalLauncher {
    /// A launcher with its private folder in the system's folder for temporary files.
    ///
    /// # Errors
    ///
    /// [`LaunchError::CreateFolder`], [`LaunchError::FolderTooLong`] and [`LaunchError::FolderUnspeakable`]; the remedy for
    /// each is another `TMPDIR`.
    pub fn new() -> Result<Self, LaunchError> {
        Self::within(&std::env::temp_dir())
    }

    /// As [`LocalLauncher::new`], with the private folder in `parent`.
    ///
    /// # Errors
    ///
    /// As [`LocalLauncher::new`].
    pub fn within(parent: &Path) -> Result<Self, LaunchError> {
        let create_folder = |source| LaunchError::CreateFolder { parent: parent.to_owned(), source };
        // Replicas may run in another directory.
        let absolute = std::path::absolute(parent).map_err(create_folder)?;
        let folder = tempfile::Builder::new()
            .prefix(lifeline::PRIVATE_FOLDER_PREFIX)
            .permissions(std::fs::Permissions::from_mode(0o700))
            .tempdir_in(absolute)
            .map_err(create_folder)?;
        let longest = socket(folder.path(), Replica::worker(u32::MAX));
        if longest.as_os_str().len() > SOCKET_PATH_BYTES {
            return Err(LaunchError::FolderTooLong {
                folder: folder.path().to_owned(),
                limit_bytes: SOCKET_PATH_BYTES,
            });
        }
        if folder.path().to_str().is_none_or(|path| path.contains(',')) {
            return Err(LaunchError::FolderUnspeakable { folder: folder.path().to_owned() });
        }
        Ok(Self { folder })
    }
}

fn socket(folder: &Path, replica: Replica) -> PathBuf {
    folder.join(format!("{}.sock", replica.file_name()))
}

impl Launcher for LocalLauncher {
    fn addresses(&self, _: &str, topology: &Topology) -> Vec<Address> {
        topology.servers().map(|server| Address::Unix(socket(self.folder.path(), server))).collect()
    }

    fn launch(
        self: Box<Self>,
        plan: &LaunchPlan,
        events: SyncSender<ReplicaEvent>,
    ) -> Result<Box<dyn Launched>, LaunchError> {
        plan.check_payloads()?;
        let ending = Arc::<Ending>::default();
        let events = Events::new(events, ending.clone());
        let way = Arc::new(ToSocket(socket(self.folder.path(), plan.placements[0].topology.coordinator())));
        let mut run = LocalRun { processes: Vec::new(), ending, folder: Some(self.folder), way };
        for (placement, payload) in plan.replicas() {
            // On failure `run` is dropped, which ends the replicas before this one.
            run.processes.push(Process::start(plan, placement, payload, events.clone())?);
        }
        Ok(Box::new(run))
    }
}

struct LocalRun {
    processes: Vec<Process>,
    ending: Arc<Ending>,
    /// Given up by [`Launched::end`].
    folder: Option<TempDir>,
    way: Arc<ToSocket>,
}

/// The coordinator's socket.
struct ToSocket(PathBuf);

impl Way for ToSocket {
    fn connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect(&self.0)
    }
}

impl LocalRun {
    fn process(&self, replica: Replica) -> Option<&Process> {
        self.processes.iter().find(|process| process.shared.replica == replica)
    }
}

impl Launched for LocalRun {
    fn way(&self) -> Arc<dyn Way> {
        self.way.clone()
    }

    fn end(&mut self) -> Vec<String> {
        self.ending.begin();
        for process in &self.processes {
            process.shared.kill();
        }
        let deadline = Instant::now() + END_TIMEOUT;
        for process in &mut self.processes {
            process.join(deadline);
        }
        if let Some(folder) = self.folder.take() {
            // A folder that cannot be removed holds sockets without listeners; that is no reason to fail a run.
            let _ = folder.close();
        }
        Vec::new()
    }

    fn kill(&self, replica: Replica) {
        if let Some(process) = self.process(replica) {
            process.shared.kill();
        }
    }

    fn restart(
        &mut self,
        plan: &LaunchPlan,
        replica: Replica,
        events: SyncSender<ReplicaEvent>,
    ) -> Result<(), LaunchError> {
        let (placement, payload) = plan.of(replica);
        let events = Events::new(events, self.ending.clone());
        let started = Process::start(plan, placement, payload, events)?;
        match self.processes.iter_mut().find(|process| process.shared.replica == replica) {
            Some(process) => std::mem::replace(process, started).join(Instant::now() + END_TIMEOUT),
            None => self.processes.push(started),
        }
        Ok(())
    }

    fn process_id(&self, replica: Replica) -> Option<u32> {
        let shared = &self.process(replica)?.shared;
        (!*lock(&shared.reaped)).then(|| shared.pid.as_raw_nonzero().get().unsigned_abs())
    }

    fn last_lines(&self, replica: Replica) -> Vec<String> {
        self.process(replica).map(|process| process.shared.last_lines.get()).unwrap_or_default()
    }
}

impl Drop for LocalRun {
    fn drop(&mut self) {
        self.end();
    }
}

/// One replica's process and the thread that waits for it.
struct Process {
    shared: Arc<Shared>,
    waiter: Option<JoinHandle<()>>,
    /// Closed when the waiter is done.
    waited: Receiver<()>,
}

/// What the launcher's caller and a replica's threads both use.
struct Shared {
    replica: Replica,
    pid: Pid,
    /// Once it is set, the process id may belong to somebody else.
    reaped: Mutex<bool>,
    last_lines: LastLines,
}

impl Process {
    fn start(plan: &LaunchPlan, placement: &Placement, payload: Vec<u8>, events: Events) -> Result<Self, LaunchError> {
        let replica = placement.replica;
        let mut child = command(plan, placement).spawn().map_err(|source| LaunchError::Start {
            replica,
            program: plan.program.executable.clone(),
            directory: plan.program.directory.clone(),
            source,
        })?;
        let shared = Arc::new(Shared {
            replica,
            pid: Pid::from_child(&child),
            reaped: Mutex::new(false),
            last_lines: LastLines::default(),
        });
        let watched = Self::watch(&mut child, &shared, payload, events);
        let (waiter, child_sender, waited) = match watched {
            Ok(watched) => watched,
            Err(source) => {
                shared.kill();
                let _ = child.wait();
                return Err(LaunchError::Watch { replica, source });
            }
        };
        // The waiter cannot be gone: it first waits for this.
        let _ = child_sender.send(child);
        Ok(Self { shared, waiter: Some(waiter), waited })
    }

    /// Starts both threads. The waiter gets the child by a channel, so that it can still be reaped if a thread cannot start.
    fn watch(
        child: &mut Child,
        shared: &Arc<Shared>,
        payload: Vec<u8>,
        events: Events,
    ) -> io::Result<(JoinHandle<()>, Sender<Child>, Receiver<()>)> {
        let (stopped, stop) = io::pipe()?;
        let (drained_sender, drained) = mpsc::channel();
        let stdin = OwnedFd::from(child.stdin.take().expect("stdin is piped"));
        // The payload may exceed what the pipe holds, and the replica need not read it.
        rustix::fs::fcntl_setfl(&stdin, rustix::fs::fcntl_getfl(&stdin)? | OFlags::NONBLOCK)?;
        let pump = Pump {
            stdin,
            payload,
            written: 0,
            outputs: [
                Output::new(Stream::Stdout, child.stdout.take().expect("stdout is piped").into()),
                Output::new(Stream::Stderr, child.stderr.take().expect("stderr is piped").into()),
            ],
            stop: stopped.into(),
            drained: Some(drained_sender),
            shared: shared.clone(),
            events: events.clone(),
        };
        let name = shared.replica.file_name();
        let pump = thread::Builder::new().name(format!("{name}-io")).spawn(move || pump.run())?;
        let (child_sender, child) = mpsc::channel();
        let (waited_sender, waited) = mpsc::channel();
        let waiter =
            Waiter { pump, stop: stop.into(), drained, shared: shared.clone(), events, _waited: waited_sender };
        let waiter = thread::Builder::new().name(format!("{name}-wait")).spawn(move || waiter.run(&child))?;
        Ok((waiter, child_sender, waited))
    }

    fn join(&mut self, deadline: Instant) {
        let remaining = deadline.saturating_duration_since(Instant::now());
        let done = self.waited.recv_timeout(remaining) == Err(mpsc::RecvTimeoutError::Disconnected);
        if let Some(waiter) = self.waiter.take_if(|_| done) {
            waiter.join().expect("a waiter does not panic");
        }
    }
}

fn command(plan: &LaunchPlan, placement: &Placement) -> Command {
    let program = &plan.program;
    let mut command = Command::new(&program.executable);
    command
        .arg0(&program.arg0)
        .args(&program.arguments)
        .current_dir(&program.directory)
        // Ctrl-C reaches the launcher only, and the replica's children can be ended with it.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env_clear();
    // The program already runs, so the loader needs the folders it was started with: `cargo run` sets them for shared
    // libraries that build scripts made.
    for name in ["LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH"] {
        command.envs(ProcessEnv.get(name).map(|value| (name, value)));
    }
    command
        .envs(tuning(placement))
        .envs(plan.variables.iter().map(|(name, value)| (name, value)))
        .envs(placement.to_env());
    command
}

impl Shared {
    /// Kills the replica with its whole process group, unless it has been reaped.
    fn kill(&self) {
        let reaped = lock(&self.reaped);
        if !*reaped {
            self.kill_unreaped();
        }
    }

    fn kill_unreaped(&self) {
        // The only failure is that nothing is left to be killed. The second call is for a replica that left its group.
        let _ = rustix::process::kill_process_group(self.pid, Signal::KILL);
        let _ = rustix::process::kill_process(self.pid, Signal::KILL);
    }
}

/// Waits for a replica's end, ends what it leaves behind, and reports it.
struct Waiter {
    pump: JoinHandle<()>,
    /// Dropping this ends the pump.
    stop: OwnedFd,
    /// Closed by the pump when both outputs have ended.
    drained: Receiver<()>,
    shared: Arc<Shared>,
    events: Events,
    /// Dropped last: tells [`Process::join`] that nothing more will block.
    _waited: Sender<()>,
}

impl Waiter {
    fn run(self, child: &Receiver<Child>) {
        let Ok(mut child) = child.recv() else { return };
        let pid = self.shared.pid;
        // Until the process is reaped its number names its group, so the children go first.
        let exited = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while matches!(rustix::process::waitid(WaitId::Pid(pid), exited), Err(Errno::INTR)) {}
        let status = {
            let mut reaped = lock(&self.shared.reaped);
            self.shared.kill_unreaped();
            *reaped = true;
            child.wait()
        };
        wait_for_group(pid);
        // Closed and silent both mean that nothing more can be hoped for.
        let _ = self.drained.recv_timeout(DRAIN_TIMEOUT);
        drop(self.stop);
        self.pump.join().expect("a pump does not panic");
        // Fails only where the user's program ignores SIGCHLD or reaps children of its own accord.
        let exit = status.map_or(Exit::Code(-1), exit);
        self.events.send(ReplicaEvent::Exited { replica: self.shared.replica, exit });
    }
}

fn exit(status: ExitStatus) -> Exit {
    match status.signal() {
        Some(signal) => Exit::Signal(signal),
        None => Exit::Code(status.code().expect("a process ends by code or by signal")),
    }
}

/// Waits until the last member of a killed group is gone, at most [`GROUP_TIMEOUT`].
fn wait_for_group(group: Pid) {
    let deadline = Instant::now() + GROUP_TIMEOUT;
    while rustix::process::test_kill_process_group(group).is_ok() && Instant::now() < deadline {
        thread::sleep(NAP);
    }
}

/// Moves bytes between the launcher and one replica, and holds the replica's lifeline.
struct Pump {
    /// Held open until the replica has ended: its end of file ends the replica.
    stdin: OwnedFd,
    payload: Vec<u8>,
    /// Bytes of the payload that are in the pipe.
    written: usize,
    outputs: [Output; 2],
    stop: OwnedFd,
    drained: Option<Sender<()>>,
    shared: Arc<Shared>,
    events: Events,
}

struct Output {
    stream: Stream,
    /// `None` once it has ended.
    pipe: Option<OwnedFd>,
    lines: Lines,
}

impl Output {
    fn new(stream: Stream, pipe: OwnedFd) -> Self {
        Self { stream, pipe: Some(pipe), lines: Lines::default() }
    }
}

impl Pump {
    fn run(mut self) {
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let [stopped, writable, stdout, stderr] = self.poll();
            if stopped {
                break;
            }
            if writable {
                self.write();
            }
            for (index, _) in [stdout, stderr].into_iter().enumerate().filter(|(_, readable)| *readable) {
                self.read(index, &mut buffer);
            }
            if self.outputs.iter().all(|output| output.pipe.is_none()) {
                self.drained = None;
            }
        }
        // A slow receiver may have left something in the pipes.
        for index in 0..self.outputs.len() {
            let mut taken = 0;
            while taken < PIPE_BYTES && self.outputs[index].pipe.as_ref().is_some_and(readable_now) {
                taken += self.read(index, &mut buffer);
            }
            self.finish(index);
        }
    }

    /// Waits until something can be done: stop, write the payload, read either output.
    fn poll(&self) -> [bool; 4] {
        // What needs no waiting for is represented by `stop` with no flags: its hang-up ends the loop anyway.
        let idle = (self.stop.as_fd(), PollFlags::empty());
        let unwritten = self.written < self.payload.len();
        let [stdout, stderr] = &self.outputs;
        let awaited: [(BorrowedFd<'_>, PollFlags); 4] = [
            (self.stop.as_fd(), PollFlags::IN),
            if unwritten { (self.stdin.as_fd(), PollFlags::OUT) } else { idle },
            stdout.pipe.as_ref().map_or(idle, |pipe| (pipe.as_fd(), PollFlags::IN)),
            stderr.pipe.as_ref().map_or(idle, |pipe| (pipe.as_fd(), PollFlags::IN)),
        ];
        let mut polled = awaited.map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags));
        match rustix::event::poll(&mut polled, None) {
            Ok(_) => polled.map(|fd| !fd.revents().is_empty()),
            Err(_) => [false; 4],
        }
    }

    fn write(&mut self) {
        match rustix::io::write(&self.stdin, &self.payload[self.written..]) {
            Ok(size) => self.written += size,
            Err(Errno::INTR | Errno::AGAIN) => {}
            // The replica is gone or has closed its input; how it ends tells the rest.
            Err(_) => self.written = self.payload.len(),
        }
    }

    /// Reads once from an output that has something; returns the number of bytes.
    fn read(&mut self, index: usize, buffer: &mut [u8]) -> usize {
        let output = &mut self.outputs[index];
        let Some(pipe) = &output.pipe else { return 0 };
        match rustix::io::read(pipe, &mut *buffer) {
            Err(Errno::INTR | Errno::AGAIN) => 0,
            Ok(0) | Err(_) => {
                self.finish(index);
                0
            }
            Ok(size) => {
                let stream = output.stream;
                let (shared, events) = (&self.shared, &self.events);
                output.lines.push(&buffer[..size], |text| deliver(shared, events, stream, text));
                size
            }
        }
    }

    fn finish(&mut self, index: usize) {
        let output = &mut self.outputs[index];
        output.pipe = None;
        if let Some(text) = output.lines.finish() {
            deliver(&self.shared, &self.events, output.stream, text);
        }
    }
}

fn deliver(shared: &Shared, events: &Events, stream: Stream, text: String) {
    shared.last_lines.deliver(events, shared.replica, stream, text);
}

fn readable_now(pipe: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(pipe, PollFlags::IN)];
    matches!(rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..))
}
