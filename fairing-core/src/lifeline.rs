//! What a replica gets from its launcher, and what ties it to it, from before `main` on.
//!
//! The launcher gives each replica a pipe as standard input, writes the [`Payload`] into it and then keeps the write end
//! open for as long as it lives. A constructor that runs before `main` moves the pipe out of the program's sight and
//! starts a thread that reads the payload and then waits for end of file, which comes when the launcher is gone,
//! however it died. Then the replica ends with its whole process group, also while it is still in its `main`.
//!
//! A parent-death signal would not do: it follows the thread that spawned the replica, not the launcher's process.
//! The other end of the pipe is in [`crate::launch`].
//!
//! In a cluster nobody is at a replica's standard input, and it is to live on without its launcher. There
//! [`FOLDER`] names a folder in which somebody has put the same payload as two files, [`VALUE_FILE`] and
//! [`IDENTITY_FILE`]. Whoever started the replica also ends it.

use std::ffi::OsStr;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, fs, thread};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::process::{Pid, Signal};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag::register_conditional_shutdown;
use signal_hook::iterator::Signals;

use crate::config::{Env as _, ProcessEnv};
use crate::exit::ExitCode;
use crate::relay;
use crate::topology::tf_config::TF_CONFIG;
use crate::topology::{Address, FOLDER, Placement};

/// Time from a replica's start to its first `launch()`. A `main` that parses arguments takes milliseconds; one that
/// takes this long does work that only the launcher's process should do.
pub const LAUNCH_DEADLINE: Duration = Duration::from_secs(30);

/// Largest payload. It holds the annotated value, not data or parameters, so more than this is a mistake such as a data
/// set in a field; the bound keeps a wrong length from becoming an allocation.
pub const MAX_PAYLOAD_BYTES: u64 = 512 << 20;

/// The file with [`Payload::value`] in the folder that [`FOLDER`] names.
pub const VALUE_FILE: &str = "value";

/// The file with [`Payload::identity`] in the same folder. In a folder of its own, since a replica is given only its own.
pub const IDENTITY_FILE: &str = "own/identity";

/// Largest file with an identity; one takes about a kilobyte.
const MAX_IDENTITY_BYTES: u64 = 64 << 10;

/// How the name of a run's private folder begins; a replica whose launcher died removes nothing else.
pub(crate) const PRIVATE_FOLDER_PREFIX: &str = "fairing-";

/// Where Kubernetes looks for a container's last words, if it has made the file.
const TERMINATION_LOG: &str = "/dev/termination-log";

/// What Kubernetes reads of them.
const TERMINATION_LOG_BYTES: usize = 4096;

/// Lowest descriptor that the pipe is moved to, out of the way of programs that expect inherited ones from 3 on.
const LOWEST_DESCRIPTOR: i32 = 10;

/// How long a replica that finds its launcher gone waits to be ended by its lifeline, which takes microseconds.
const LIFELINE_TIMEOUT: Duration = Duration::from_secs(2);

/// Name of the thread that holds the lifeline.
const WATCHER: &str = "fairing-lifeline";

/// Bytes taken from the pipe at once: what a Linux pipe holds.
const READ_BYTES: usize = 64 << 10;

static START_DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
/// The process that started this replica and holds its pipe.
static LAUNCHER: OnceLock<Option<Pid>> = OnceLock::new();
static ATTACHED: AtomicBool = AtomicBool::new(false);
/// This replica is one of a cluster.
static IN_CLUSTER: AtomicBool = AtomicBool::new(false);
/// Set while a signal to end ends this process at once; absent where signals do what they do without fairing.
static ENDS_AT_ONCE: OnceLock<Arc<AtomicBool>> = OnceLock::new();
static REACHED_LAUNCH: AtomicBool = AtomicBool::new(false);
static PAYLOAD: Mutex<Delivery> = Mutex::new(Delivery::Pending);
static PAYLOAD_CHANGED: Condvar = Condvar::new();

/// What the launcher sent.
#[derive(Clone, PartialEq, Eq)]
pub struct Payload {
    /// What every replica of the run gets.
    pub value: Vec<u8>,
    /// What this one proves with who it is; empty where only the run's own processes can reach it.
    pub identity: Vec<u8>,
}

impl fmt::Debug for Payload {
    /// Without the bytes: the value may be anything, and the identity holds a key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (value_bytes, identity_bytes) = (self.value.len(), self.identity.len());
        write!(f, "Payload({value_bytes} + {identity_bytes} bytes)")
    }
}

/// Failure to get what the launcher sent. Returned by [`payload`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LifelineError {
    /// This process has no launcher at the other end of its standard input.
    #[error("no launcher is attached to this process (a replica is started by fairing's launcher, not by hand)")]
    NotAttached,
    /// The launcher is alive but its payload did not arrive.
    #[error("the launcher's payload did not arrive within {} s", waited.as_secs_f64())]
    TimedOut {
        /// How long it was waited for.
        waited: Duration,
    },
    /// A file that should hold a part of the payload cannot be read.
    #[error(
        "cannot read `{}`, which should hold a part of what this replica needs: {source} (is the Secret mounted there?)",
        path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The launcher announced more than [`MAX_PAYLOAD_BYTES`].
    #[error("the launcher announced a payload of {size_bytes} bytes ({MAX_PAYLOAD_BYTES} at most)")]
    TooLarge {
        /// What it announced.
        size_bytes: u64,
    },
    /// The payload was handed out before.
    #[error("the launcher's payload was taken before")]
    Taken,
}

/// The working directory at process start, before `main` could change it; `.` if the system could not tell.
pub fn start_directory() -> &'static Path {
    START_DIRECTORY.get_or_init(current_directory)
}

/// Whether this process is a replica: a launcher holds the other end of its lifeline, or its payload is in a folder.
///
/// Placement variables alone do not make a replica: its own children inherit them.
pub fn is_attached() -> bool {
    ATTACHED.load(Ordering::Acquire)
}

/// Whether this is a container of a run whose first process holds no lifeline, so that nobody in it can be the replica: an
/// entry script stands between the engine and the program, or has taken its standard input.
///
/// A child of a replica is none of that. It has the variables too, and may start a run of its own.
#[cfg(feature = "image")]
pub(crate) fn is_cut_off() -> bool {
    let is_tls = |address: &Address| matches!(address, Address::Tls { .. });
    !is_attached()
        && Placement::from_env(&ProcessEnv).is_ok_and(|placement| placement.servers.iter().any(is_tls))
        && holds_lifeline(1) == Some(false)
}

/// Whether a thread of the process is a lifeline's; `None` if that cannot be seen.
#[cfg(feature = "image")]
fn holds_lifeline(process: u32) -> Option<bool> {
    let threads = fs::read_dir(format!("/proc/{process}/task")).ok()?.filter_map(Result::ok);
    let mut names = threads.filter_map(|thread| fs::read_to_string(thread.path().join("comm")).ok());
    // The system keeps 15 bytes of a thread's name.
    Some(names.any(|name| name.trim_end() == &WATCHER[..15]))
}

/// Tells the watchdog that this replica reached `launch()`; without it the replica ends [`LAUNCH_DEADLINE`] after its
/// start, with [`ExitCode::NeverLaunched`].
pub fn reached_launch() {
    REACHED_LAUNCH.store(true, Ordering::Release);
}

/// What the launcher sent; the first call gets it.
///
/// Blocks until it is complete, at most `timeout`.
///
/// # Errors
///
/// - [`LifelineError::NotAttached`] in a process that no launcher started.
/// - [`LifelineError::TimedOut`] if the payload is not complete in time; the call may be repeated.
/// - [`LifelineError::TooLarge`] if more than [`MAX_PAYLOAD_BYTES`] were announced.
/// - [`LifelineError::Unreadable`] if a file of the folder is missing, is no file, is too large or cannot be read.
/// - [`LifelineError::Taken`] from the second call on.
pub fn payload(timeout: Duration) -> Result<Payload, LifelineError> {
    if !is_attached() {
        return Err(LifelineError::NotAttached);
    }
    let pending = |delivery: &mut Delivery| matches!(delivery, Delivery::Pending);
    let (mut delivery, _) =
        PAYLOAD_CHANGED.wait_timeout_while(lock_payload(), timeout, pending).unwrap_or_else(PoisonError::into_inner);
    match std::mem::replace(&mut *delivery, Delivery::Taken) {
        Delivery::Ready(result) => result,
        Delivery::InFolder(folder) => read_folder(&folder),
        Delivery::Taken => Err(LifelineError::Taken),
        Delivery::Pending => {
            *delivery = Delivery::Pending;
            Err(LifelineError::TimedOut { waited: timeout })
        }
    }
}

/// Ends what this replica has started. To be called right before the replica ends by itself. A container of a cluster needs
/// no help with that: it ends with its first process.
///
/// The launcher does it too, unless it has just died: then other replicas end, and a replica that ends because of them
/// could do so before its own lifeline has told it, and leave its children behind.
pub(crate) fn end_children() {
    if LAUNCHER.get().is_none() {
        return;
    }
    if leads_its_group() && !join_launchers_group() {
        if LAUNCHER.get() != Some(&rustix::process::getppid()) {
            // The launcher is gone: the lifeline ends this process and its group at any moment.
            thread::sleep(LIFELINE_TIMEOUT);
        }
        return;
    }
    kill_own_group();
}

/// Leaves the group that bears this process's number, so that it can be ended without this process.
fn join_launchers_group() -> bool {
    let launcher = rustix::process::getppid().filter(|parent| LAUNCHER.get() == Some(&Some(*parent)));
    let group = launcher.and_then(group_of);
    group.is_some_and(|group| rustix::process::setpgid(None, Some(group)).is_ok())
}

/// Read as text, since the number is 0 where the group's leader is outside of this container, and `getpgid` takes that
/// for impossible.
#[cfg(target_os = "linux")]
fn group_of(process: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero())).ok()?;
    // The name in parentheses may hold anything; after it come state, parent and group.
    let (_, fields) = stat.rsplit_once(')')?;
    Pid::from_raw(fields.split_whitespace().nth(2)?.parse().ok()?)
}

#[cfg(not(target_os = "linux"))]
fn group_of(process: Pid) -> Option<Pid> {
    rustix::process::getpgid(Some(process)).ok()
}

/// Kills the group that the launcher made, also where this process has left it: its number is this process's own, so it
/// cannot be another's meanwhile.
fn kill_own_group() {
    // The only failure is that nothing is left to be killed.
    let _ = rustix::process::kill_process_group(rustix::process::getpid(), Signal::KILL);
}

/// How far the payload is on its way from the launcher to whoever calls [`payload`].
enum Delivery {
    Pending,
    Ready(Result<Payload, LifelineError>),
    /// Read when it is wanted: whoever mounted the folder did so before the replica's start.
    InFolder(PathBuf),
    Taken,
}

fn lock_payload() -> MutexGuard<'static, Delivery> {
    PAYLOAD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs before `main`, in every process of a program that uses fairing; touches nothing unless it is a replica.
///
/// The `unsafe` is the promise to use nothing that needs `main` to have begun: of the standard library only what works
/// without its runtime's start, namely environment, clock, files, threads and locks.
#[ctor::ctor(unsafe)]
fn attach() {
    START_DIRECTORY.get_or_init(current_directory);
    if relay::is_asked() {
        return;
    }
    if !Placement::is_in(&ProcessEnv) {
        // Of a TFJob that somebody else wrote: it has its value from `main`, and only its end is looked after.
        if ProcessEnv.get(TF_CONFIG).is_some() && rustix::process::getpid().is_init() {
            IN_CLUSTER.store(true, Ordering::Release);
            end_at_termination();
        }
        return;
    }
    if !leads_its_group() {
        return;
    }
    let folder = ProcessEnv.get(FOLDER).map(PathBuf::from);
    if rustix::process::getpid().is_init() || folder.is_some() {
        end_at_termination();
    }
    let pipe = if folder.is_none() { take_stdin() } else { None };
    // Read here, while no other thread can change the environment.
    let placement = Placement::from_env(&ProcessEnv).ok();
    let launch_by = Instant::now() + LAUNCH_DEADLINE;
    let watch: Box<dyn FnOnce() + Send> = match (folder, pipe) {
        (Some(folder), _) => {
            *lock_payload() = Delivery::InFolder(start_directory().join(folder));
            IN_CLUSTER.store(true, Ordering::Release);
            Box::new(move || expect_launch(placement.as_ref(), launch_by))
        }
        (None, Some(pipe)) => {
            LAUNCHER.get_or_init(rustix::process::getppid);
            Box::new(move || hold(&pipe, placement.as_ref(), launch_by))
        }
        (None, None) => return,
    };
    ATTACHED.store(true, Ordering::Release);
    let watcher = thread::Builder::new().name(WATCHER.into());
    if let Err(error) = watcher.spawn(watch) {
        // Unwatched, the replica could outlive its launcher.
        complain(&format!("cannot watch the launcher: {error}"));
        ExitCode::Configuration.exit();
    }
}

/// The first process of a container is not ended by a signal unless it says so itself.
fn end_at_termination() {
    let at_once = ENDS_AT_ONCE.get_or_init(|| Arc::new(AtomicBool::new(true)));
    for signal in [SIGINT, SIGTERM] {
        // As a shell reports a process that such a signal ended. The only failure is a signal that cannot be caught.
        let _ = register_conditional_shutdown(signal, 128 + signal, at_once.clone());
    }
}

/// Calls `end` in a thread of its own when the process is told to end by SIGTERM, instead of ending at once. Only for the first
/// process of a container, docker's included (`docker stop` waits ten seconds before it uses force, a pod's grace is longer),
/// and for replicas in a cluster: elsewhere a signal does what it does without fairing.
pub(crate) fn at_termination(end: impl FnOnce() + Send + 'static) {
    let Some(at_once) = ENDS_AT_ONCE.get() else { return };
    // Either fails only if the system is out of something; then the signal goes on ending the process at once.
    let Ok(mut signals) = Signals::new([SIGTERM]) else { return };
    let waiting = thread::Builder::new().name("fairing-signals".into());
    let waiting = waiting.spawn(move || {
        if signals.forever().next().is_some() {
            end();
        }
    });
    if waiting.is_ok() {
        at_once.store(false, Ordering::Release);
    }
}

/// Says why this process ends: on its standard error, and in a cluster where the cluster keeps it when the pod's log is gone.
pub(crate) fn last_words(text: &str) {
    complain(text);
    echo(text);
}

/// As [`last_words`] of a process that ends because of another one: only where they are kept, so that the cause does not die with
/// the coordinator; its own log need not repeat it.
pub(crate) fn echo(text: &str) {
    if IN_CLUSTER.load(Ordering::Acquire) {
        leave_in(Path::new(TERMINATION_LOG), text);
    }
}

/// Writes as much of `text` as is read into a file that exists.
fn leave_in(path: &Path, text: &str) {
    // Whoever ends has nobody left to complain to about that.
    let _ = fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(path)
        .and_then(|mut file| file.write_all(shortened(text, TERMINATION_LOG_BYTES).as_bytes()));
}

/// The beginning, which names the cause, and the end, which says where: of a panic its place, of an error its root.
fn shortened(text: &str, most_bytes: usize) -> String {
    const GAP: &str = "\n[...]\n";
    if text.len() <= most_bytes {
        return text.to_owned();
    }
    let part_bytes = (most_bytes - GAP.len()) / 2;
    let (head, tail) = (text.floor_char_boundary(part_bytes), text.ceil_char_boundary(text.len() - part_bytes));
    [&text[..head], GAP, &text[tail..]].concat()
}

fn current_directory() -> PathBuf {
    std::env::current_dir().unwrap_or_else(|_| ".".into())
}

/// The launcher gives each replica a process group; the replica's children, which inherit its variables, are not leaders.
fn leads_its_group() -> bool {
    let own = rustix::process::getpid();
    group_of(own) == Some(own)
}

/// Moves the pipe on standard input to a descriptor that no child inherits and leaves an empty input in its place.
fn take_stdin() -> Option<OwnedFd> {
    let stdin = rustix::stdio::stdin();
    let status = rustix::fs::fstat(stdin).ok()?;
    if FileType::from_raw_mode(status.st_mode) != FileType::Fifo {
        return None;
    }
    let pipe = rustix::io::fcntl_dupfd_cloexec(stdin, LOWEST_DESCRIPTOR).ok()?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    // A container may lack /dev/null; a pipe without a writer is as empty.
    let empty = null.or_else(|_| io::pipe().map(|(read_end, _)| read_end.into())).ok()?;
    rustix::stdio::dup2_stdin(&empty).ok()?;
    Some(pipe)
}

fn hold(pipe: &OwnedFd, placement: Option<&Placement>, launch_by: Instant) {
    let deliver = |result| {
        *lock_payload() = Delivery::Ready(result);
        PAYLOAD_CHANGED.notify_all();
    };
    match watch(pipe, launch_by, &REACHED_LAUNCH, deliver) {
        End::LauncherGone => {
            if let Some(placement) = placement {
                remove_private_folder(placement);
            }
            kill_own_group();
            // Reached only if this process has left the group that the launcher made.
            let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
            // The first process of a container cannot kill itself; the others in it end with it.
            ExitCode::LostPeer.exit();
        }
        End::NeverLaunched => end_unlaunched(placement),
    }
}

/// Of a replica without a pipe only its way to `launch()` is watched.
fn expect_launch(placement: Option<&Placement>, launch_by: Instant) {
    thread::sleep(launch_by.saturating_duration_since(Instant::now()));
    if !REACHED_LAUNCH.load(Ordering::Acquire) {
        end_unlaunched(placement);
    }
}

fn end_unlaunched(placement: Option<&Placement>) -> ! {
    let name = placement.map_or_else(|| "this replica".to_owned(), |placement| placement.replica.to_string());
    last_words(&format!(
        "{name} did not reach `launch()` within {} s of its start (`main` runs in every replica: skip what only the \
         caller needs where `fairing_core::in_replica()` is true)",
        LAUNCH_DEADLINE.as_secs()
    ));
    ExitCode::NeverLaunched.exit();
}

/// Reads a payload that lies in files.
fn read_folder(folder: &Path) -> Result<Payload, LifelineError> {
    let value = read_file(&folder.join(VALUE_FILE), MAX_PAYLOAD_BYTES)?;
    let identity = read_identity(&folder.join(IDENTITY_FILE))?;
    Ok(Payload { value, identity })
}

/// Reads a file that should hold what a replica proves with who it is.
pub(crate) fn read_identity(path: &Path) -> Result<Vec<u8>, LifelineError> {
    read_file(path, MAX_IDENTITY_BYTES)
}

fn read_file(path: &Path, most_bytes: u64) -> Result<Vec<u8>, LifelineError> {
    let read = || {
        let file = fs::File::open(path)?;
        let metadata = file.metadata()?;
        // Asked before anything is read: a device gives bytes without end.
        if !metadata.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        if metadata.len() > most_bytes {
            return Err(io::Error::other(format!("it has {} bytes ({most_bytes} at most)", metadata.len())));
        }
        let mut bytes = Vec::with_capacity(metadata.len() as usize);
        // A file that grows meanwhile is none that was mounted for this replica.
        file.take(most_bytes).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map_err(|source| LifelineError::Unreadable { path: path.to_owned(), source })
}

fn complain(message: &str) {
    // Nobody is left to tell if standard error is closed.
    let _ = writeln!(io::stderr(), "fairing: {message}");
}

#[derive(Debug, PartialEq, Eq)]
enum End {
    LauncherGone,
    NeverLaunched,
}

/// Delivers the payload, then waits for the launcher's end or for `launch_by` to pass without `reached`.
fn watch(
    pipe: impl AsFd,
    launch_by: Instant,
    reached: &AtomicBool,
    deliver: impl FnOnce(Result<Payload, LifelineError>),
) -> End {
    let mut deliver = Some(deliver);
    let mut received = Vec::new();
    let mut chunk = vec![0; READ_BYTES];
    loop {
        let remaining = (!reached.load(Ordering::Acquire)).then(|| launch_by.saturating_duration_since(Instant::now()));
        if remaining.is_some_and(|remaining| remaining.is_zero()) {
            return End::NeverLaunched;
        }
        let timeout = remaining.and_then(|remaining| Timespec::try_from(remaining).ok());
        let mut polled = [PollFd::new(&pipe, PollFlags::IN)];
        match rustix::event::poll(&mut polled, timeout.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(_) => return End::LauncherGone,
        }
        let size = match rustix::io::read(&pipe, &mut chunk[..]) {
            Ok(0) => return End::LauncherGone,
            Ok(size) => size,
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return End::LauncherGone,
        };
        // What follows the payload has no meaning yet.
        if deliver.is_none() {
            continue;
        }
        received.extend_from_slice(&chunk[..size]);
        if let Some(result) = take_frame(&mut received) {
            let deliver = deliver.take().expect("a payload is delivered once");
            deliver(result);
        }
    }
}

/// Bytes in front of a payload: the lengths of its parts.
const LENGTHS_BYTES: usize = 16;

/// A payload as the launcher writes it: the lengths of both parts, and the parts.
pub(crate) fn frame(value: &[u8], identity: &[u8]) -> Vec<u8> {
    let mut framed = Vec::with_capacity(LENGTHS_BYTES + value.len() + identity.len());
    for part in [value, identity] {
        framed.extend_from_slice(&(part.len() as u64).to_le_bytes());
    }
    framed.extend_from_slice(value);
    framed.extend_from_slice(identity);
    framed
}

/// Inverse of [`frame`]; `None` while something is missing.
fn take_frame(received: &mut Vec<u8>) -> Option<Result<Payload, LifelineError>> {
    let lengths = received.first_chunk::<LENGTHS_BYTES>()?;
    let (value_bytes, identity_bytes) = lengths.split_at(8);
    let [value_bytes, identity_bytes] =
        [value_bytes, identity_bytes].map(|length| u64::from_le_bytes(length.try_into().expect("half of sixteen")));
    let size_bytes = value_bytes.saturating_add(identity_bytes);
    if size_bytes > MAX_PAYLOAD_BYTES {
        return Some(Err(LifelineError::TooLarge { size_bytes }));
    }
    let between = LENGTHS_BYTES + value_bytes as usize;
    let end = between + identity_bytes as usize;
    if received.len() < end {
        return None;
    }
    let mut value = std::mem::take(received);
    let identity = value[between..end].to_vec();
    value.truncate(between);
    value.drain(..LENGTHS_BYTES);
    Some(Ok(Payload { value, identity }))
}

/// Removes the folder of the run's sockets, which the dead launcher can no longer remove.
fn remove_private_folder(placement: &Placement) {
    for address in &placement.servers {
        let Address::Unix(socket) = address else { continue };
        if let Some(folder) = socket.parent().filter(|folder| is_private_folder(folder)) {
            // The other replicas of the run do the same at the same time.
            let _ = fs::remove_dir_all(folder);
        }
    }
}

fn is_private_folder(folder: &Path) -> bool {
    let name = folder.file_name().and_then(OsStr::to_str);
    name.is_some_and(|name| name.starts_with(PRIVATE_FOLDER_PREFIX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets [`watch`] read `sent`, after which the launcher "dies", and returns what it delivered.
    fn watched(sent: &[u8]) -> (End, Option<Result<Payload, String>>) {
        let (read_end, mut write_end) = io::pipe().unwrap();
        let mut delivered = None;
        let end = thread::scope(|scope| {
            scope.spawn(move || write_end.write_all(sent).unwrap());
            let launch_by = Instant::now() + LAUNCH_DEADLINE;
            watch(&read_end, launch_by, &AtomicBool::new(true), |result| delivered = Some(result))
        });
        (end, delivered.map(|result| result.map_err(|error: LifelineError| error.to_string())))
    }

    #[test]
    fn payload_arrives_whole_and_end_of_file_ends_the_watch() {
        for size in [0, 1, READ_BYTES - LENGTHS_BYTES, READ_BYTES, 3 * READ_BYTES + 1] {
            let bytes: Vec<u8> = (0..size).map(|i| i as u8).collect();
            for split in [0, size / 3, size] {
                let (value, identity) = bytes.split_at(split);
                let payload = Payload { value: value.to_vec(), identity: identity.to_vec() };
                assert_eq!(watched(&frame(value, identity)), (End::LauncherGone, Some(Ok(payload))));
            }
        }
    }

    #[test]
    fn bytes_after_the_payload_are_ignored() {
        let mut sent = frame(b"value", b"key");
        sent.extend_from_slice(&[7; 100]);
        let payload = Payload { value: b"value".to_vec(), identity: b"key".to_vec() };
        assert_eq!(format!("{payload:?}"), "Payload(5 + 3 bytes)");
        assert_eq!(watched(&sent), (End::LauncherGone, Some(Ok(payload))));
    }

    #[test]
    fn launcher_that_dies_in_the_middle_of_the_payload_ends_the_watch() {
        assert_eq!(watched(&[]), (End::LauncherGone, None));
        assert_eq!(watched(&frame(b"value", b"key")[..23]), (End::LauncherGone, None));
    }

    #[test]
    fn absurd_length_is_refused() {
        for (value_bytes, identity_bytes) in [(MAX_PAYLOAD_BYTES, 1), (1, MAX_PAYLOAD_BYTES), (u64::MAX, u64::MAX)] {
            let sent = [value_bytes.to_le_bytes(), identity_bytes.to_le_bytes()].concat();
            let error = LifelineError::TooLarge { size_bytes: value_bytes.saturating_add(identity_bytes) };
            assert_eq!(watched(&sent), (End::LauncherGone, Some(Err(error.to_string()))));
        }
    }

    #[test]
    fn replica_that_never_reaches_launch_is_ended() {
        let (read_end, _write_end) = io::pipe().unwrap();
        let launch_by = Instant::now() + Duration::from_millis(20);
        assert_eq!(watch(&read_end, launch_by, &AtomicBool::new(false), |_| ()), End::NeverLaunched);
    }

    #[test]
    fn only_a_private_folder_is_removed() {
        assert!(is_private_folder(Path::new("/tmp/fairing-x1y2z3")));
        for other in ["/", "/tmp", "/tmp/other", "fairing-x/sub"] {
            assert!(!is_private_folder(Path::new(other)), "{other}");
        }
    }

    #[test]
    #[cfg(all(target_os = "linux", feature = "image"))]
    fn lifeline_is_seen_from_outside() {
        let process = std::process::id();
        assert_eq!(holds_lifeline(process), Some(false));
        thread::scope(|scope| {
            let (stop, stopped) = std::sync::mpsc::channel::<()>();
            let holder = thread::Builder::new().name(WATCHER.into());
            holder.spawn_scoped(scope, move || stopped.recv()).unwrap();
            let deadline = Instant::now() + Duration::from_secs(60);
            // A thread gives itself its name when it begins to run.
            while holds_lifeline(process) != Some(true) {
                assert!(Instant::now() < deadline);
                thread::sleep(Duration::from_millis(1));
            }
            drop(stop);
        });
    }

    #[test]
    fn process_without_launcher_has_no_payload() {
        assert!(matches!(payload(Duration::ZERO), Err(LifelineError::NotAttached)));
    }

    #[test]
    fn last_words_fit_and_are_left_only_where_somebody_looks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("termination-log");
        leave_in(&path, "nobody looks");
        assert!(!path.exists());
        fs::write(&path, b"of another life, and longer").unwrap();
        leave_in(&path, "short");
        assert_eq!(fs::read_to_string(&path).unwrap(), "short");
        for text in [
            "cause ".to_owned() + &"x".repeat(10_000) + " (place)",
            "cause ü".to_owned() + &"ü".repeat(5_000) + "(place)",
        ] {
            leave_in(&path, &text);
            let left = fs::read_to_string(&path).unwrap();
            assert!(left.len() <= TERMINATION_LOG_BYTES && left.len() > TERMINATION_LOG_BYTES - 16, "{}", left.len());
            assert!(left.starts_with("cause ") && left.ends_with("(place)") && left.contains("[...]"));
        }
        let whole = "y".repeat(TERMINATION_LOG_BYTES);
        assert_eq!(shortened(&whole, TERMINATION_LOG_BYTES), whole);
    }

    #[test]
    fn a_folder_holds_both_parts_and_whatever_is_wrong_with_a_file_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let (value, identity) = (folder.path().join(VALUE_FILE), folder.path().join(IDENTITY_FILE));
        let complaint = |path: &Path| {
            let complaint = read_folder(folder.path()).unwrap_err().to_string();
            let rest = complaint.strip_prefix(&format!("cannot read `{}`, ", path.display())).expect(&complaint);
            rest.to_owned()
        };
        assert!(complaint(&value).contains("No such file"));
        fs::write(&value, b"value").unwrap();
        assert!(complaint(&identity).contains("No such file"));
        fs::create_dir_all(&identity).unwrap();
        assert!(complaint(&identity).contains("it is no file"));
        fs::remove_dir(&identity).unwrap();
        fs::write(&identity, b"key").unwrap();
        let payload = Payload { value: b"value".to_vec(), identity: b"key".to_vec() };
        assert_eq!(read_folder(folder.path()).unwrap(), payload);
        fs::File::create(&identity).unwrap().set_len(MAX_IDENTITY_BYTES + 1).unwrap();
        assert!(complaint(&identity).contains("it has 65537 bytes (65536 at most)"));
        // Sparse: nothing of it is on the disk.
        fs::File::create(&value).unwrap().set_len(MAX_PAYLOAD_BYTES + 1).unwrap();
        assert!(complaint(&value).contains("at most"));
    }
}
