//! Starting the replicas of a run, and making sure that they end.
//!
//! A [`LaunchPlan`] says what is to be started; a [`Launcher`] starts it and gives a [`Launched`], which ends what it
//! started when it is dropped. What happens meanwhile arrives as [`ReplicaEvent`]s. A launcher knows processes, lines and
//! exit codes, nothing of training: that goes over the run's own protocol. The replica's side is [`crate::lifeline`].

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use crate::lifeline;
use crate::observe::events::{Exit, Stream};
use crate::topology::{Address, Placement, Replica, Role, Topology};

#[cfg(feature = "docker")]
pub mod docker;
mod events;
#[cfg(feature = "kubernetes")]
pub mod kubernetes;
mod lines;
mod local;

pub use local::LocalLauncher;

/// Everything that starts the replicas of one run. Pure data.
#[derive(Clone, PartialEq, Eq)]
pub struct LaunchPlan {
    /// Name of the run.
    pub run: String,
    /// One replica each; started in this order.
    pub placements: Vec<Placement>,
    /// What every replica runs.
    pub program: Program,
    /// Variables that every replica gets besides its placement; it inherits no others.
    pub variables: Vec<(String, OsString)>,
    /// What every replica gets from [`lifeline::payload`]: by a private channel, never by environment or argument.
    pub value: Vec<u8>,
    /// What each replica gets besides, in the order of the placements and by as private a channel; empty where it needs none.
    pub identities: Vec<Vec<u8>>,
    /// What its caller proves with who it is, for those who come later from elsewhere; empty where nobody can.
    pub caller: Vec<u8>,
}

impl fmt::Debug for LaunchPlan {
    /// Without the value and the values of variables, which may be anything, and the identities, which hold keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.variables.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("LaunchPlan")
            .field("run", &self.run)
            .field("placements", &self.placements)
            .field("program", &self.program)
            .field("variables", &names)
            .finish_non_exhaustive()
    }
}

impl LaunchPlan {
    /// What the replicas of the plan are, and what each gets over its pipe.
    fn replicas(&self) -> impl Iterator<Item = (&Placement, Vec<u8>)> {
        let frame = |identity: &Vec<u8>| lifeline::frame(&self.value, identity);
        self.placements.iter().zip(self.identities.iter().map(frame))
    }

    /// The same of one of them.
    fn of(&self, replica: Replica) -> (&Placement, Vec<u8>) {
        let mut placements = self.placements.iter().zip(&self.identities);
        let found = placements.find(|(placement, _)| placement.replica == replica);
        let (placement, identity) = found.expect("only replicas of the plan are asked for");
        (placement, lifeline::frame(&self.value, identity))
    }

    fn check_payloads(&self) -> Result<(), LaunchError> {
        let identity_bytes = self.identities.iter().map(Vec::len).max().unwrap_or_default();
        let size_bytes = (self.value.len() + identity_bytes) as u64;
        if size_bytes > lifeline::MAX_PAYLOAD_BYTES {
            return Err(LaunchError::PayloadTooLarge { size_bytes });
        }
        Ok(())
    }
}

/// A program to be started, with its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The file that is executed.
    pub executable: PathBuf,
    /// Name by which the program is called.
    pub arg0: OsString,
    /// Arguments after the name.
    pub arguments: Vec<OsString>,
    /// Working directory.
    pub directory: PathBuf,
}

impl Program {
    /// This very program, called as this process was: name, arguments, and the working directory at its start.
    pub fn running() -> Self {
        let mut arguments = std::env::args_os();
        let arg0 = arguments.next().unwrap_or_default();
        let directory = lifeline::start_directory().to_owned();
        Self { executable: running_executable(), arg0, arguments: arguments.collect(), directory }
    }

    /// Whether all arguments can be written into the description of a container, which is text.
    #[cfg(feature = "docker")]
    pub(crate) fn check_arguments(&self) -> Result<(), LaunchError> {
        match self.arguments.iter().find(|argument| argument.to_str().is_none()) {
            None => Ok(()),
            Some(argument) => Err(LaunchError::ArgumentNotText { argument: argument.clone() }),
        }
    }
}

/// On Linux the link names the running file even after a rebuild has replaced it.
#[cfg(target_os = "linux")]
fn running_executable() -> PathBuf {
    "/proc/self/exe".into()
}

#[cfg(not(target_os = "linux"))]
fn running_executable() -> PathBuf {
    std::env::current_exe().unwrap_or_default()
}

/// Variables that make a replica quick, on every target.
fn tuning(placement: &Placement) -> Vec<(String, String)> {
    // A worker's step frees and takes the same tensors again. With mimalloc's 10 ms their pages would go back to the system
    // in between, and getting them again was a third of the time of a model of 20 million parameters. A server frees only
    // when it is done, and then the model that comes home needs the memory.
    let purge_delay = if placement.replica.role == Role::Worker { "1000" } else { "0" };
    vec![
        // rayon, which computes burn's tensors, would take every core in every replica.
        ("RAYON_NUM_THREADS".to_owned(), placement.threads.to_string()),
        ("MIMALLOC_PURGE_DELAY".to_owned(), purge_delay.to_owned()),
    ]
}

/// What a launcher learns about a replica.
///
/// The events of one replica arrive in order; its last one is [`ReplicaEvent::Exited`] or [`ReplicaEvent::Doomed`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplicaEvent {
    /// It wrote a line.
    Line {
        /// Who wrote it.
        replica: Replica,
        /// Where it wrote it.
        stream: Stream,
        /// The line without its end; invalid UTF-8 is replaced. Of a line that a carriage return starts anew, as
        /// progress bars do, what a terminal would show in the end.
        text: String,
    },
    /// Its process ended, and its leftover children with it.
    Exited {
        /// Whose.
        replica: Replica,
        /// How.
        exit: Exit,
    },
    /// Its process ended, and the target starts another one in its place without being asked. Not its last event.
    Replaced {
        /// Whose.
        replica: Replica,
        /// How.
        exit: Exit,
    },
    /// It does not run and never will. Its last event.
    Doomed {
        /// Which.
        replica: Replica,
        /// Why, in the target's words.
        reason: String,
    },
    /// The target ends it, or has ended it, for a reason that would be the same the next time. Not its last event.
    Condemned {
        /// Which.
        replica: Replica,
        /// Why, and the remedy.
        reason: String,
    },
    /// The run has taken longer than it may, and the target ends all of it.
    OutOfTime {
        /// What it may take.
        deadline: Duration,
    },
    /// Something about the run that the user should know, in one sentence.
    Note {
        /// The sentence.
        text: String,
    },
}

/// Says that a launch is not wanted any more. Clones are one.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// From now on it is not.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether it is not.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    #[cfg(feature = "kubernetes")]
    fn check(&self) -> Result<(), LaunchError> {
        if self.is_set() { Err(LaunchError::Cancelled) } else { Ok(()) }
    }
}

/// What a launch is waited for, how long if it is cancelled, and what becomes of it if it takes longer.
#[derive(Debug, Clone)]
pub struct Patience {
    /// What is waited for, after "waiting for".
    pub what: String,
    /// How long after a first interrupt.
    pub first: Duration,
    /// How long after a second one.
    pub second: Duration,
    /// Who removes what there is of the run when nobody waits any more.
    pub then: String,
}

/// How long the start of the replicas may go on after an interrupt: what works is done by then, and a person still waits.
const LAUNCH_GRACE: Duration = Duration::from_secs(3);

/// Starts the replicas of one run on one kind of target.
pub trait Launcher: Send {
    /// Hands over what says that the run is not wanted any more. Who looks at it undoes what has been started by then, and fails
    /// with [`LaunchError::Cancelled`].
    fn heed(&mut self, cancel: Cancel) {
        // What starts its replicas in a moment need not look.
        drop(cancel);
    }

    /// How long to wait for the launch, and for that.
    fn patience(&self, run: &str) -> Patience {
        // Nothing outlives its launcher, which may end at once.
        let then = format!("what there is of the run `{run}` is removed as soon as possible");
        Patience { what: "the replicas to be started".to_owned(), first: LAUNCH_GRACE, second: Duration::ZERO, then }
    }

    /// Where the parameter servers of `run` will listen, in rank order; goes into the plan's placements.
    fn addresses(&self, run: &str, topology: &Topology) -> Vec<Address>;

    /// Starts every replica of `plan`.
    ///
    /// Returns when all are started; does not wait until they are ready. `events` is bounded: while it is full, replicas
    /// that write wait. Nothing waits for a receiver that is gone.
    ///
    /// # Errors
    ///
    /// [`LaunchError`]; what was started before the failure is ended, or named with it if that cannot be.
    fn launch(
        self: Box<Self>,
        plan: &LaunchPlan,
        events: SyncSender<ReplicaEvent>,
    ) -> Result<Box<dyn Launched>, LaunchError>;
}

/// A way to a run's coordinator, wherever that is.
pub trait Way: Send + Sync {
    /// A new stream of bytes to the coordinator.
    ///
    /// # Errors
    ///
    /// One of kind `NotFound` or `ConnectionRefused` if the coordinator does not listen yet, and a later call may succeed.
    fn connect(&self) -> io::Result<UnixStream>;
}

/// The started replicas of one run. Dropping it ends them.
pub trait Launched: Send {
    /// The way to the run's coordinator.
    fn way(&self) -> Arc<dyn Way>;

    /// Ends at once what still runs, waits a bounded time until nothing of the run is left, and clears its private files.
    /// Events that find no room from then on are dropped. A second call does nothing.
    ///
    /// Returns what is left behind nevertheless, one thing and its reason a line.
    fn end(&mut self) -> Vec<String>;

    /// Leaves the run to itself: from now on neither [`Launched::end`] nor dropping this ends or removes anything of it. Does
    /// nothing where replicas live only as long as their launcher.
    fn let_go(&mut self) {}

    /// Ends one replica and its children at once, as a crash would. Does nothing if it has ended.
    fn kill(&self, replica: Replica);

    /// Starts a replica of `plan` again, after its [`ReplicaEvent::Exited`].
    ///
    /// # Errors
    ///
    /// [`LaunchError`]; the other replicas are not touched.
    fn restart(
        &mut self,
        plan: &LaunchPlan,
        replica: Replica,
        events: SyncSender<ReplicaEvent>,
    ) -> Result<(), LaunchError>;

    /// Whether the target starts a lost worker again unasked; [`Launched::restart`] does nothing then.
    fn restarts_by_itself(&self) -> bool {
        false
    }

    /// Its process id on this machine, while it runs.
    fn process_id(&self, replica: Replica) -> Option<u32>;

    /// The last lines that it wrote to both streams, oldest first, for an error message.
    fn last_lines(&self, replica: Replica) -> Vec<String>;
}

/// Failure to start a run. Returned by [`Launcher::launch`] and [`LocalLauncher::new`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// No folder for the run's sockets could be made.
    #[error("failed to create a private folder in `{}` (set TMPDIR to a folder that you can write to)", parent.display())]
    CreateFolder {
        /// Where it was to be.
        parent: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The path of a socket would not fit into a socket address.
    #[error(
        "the path of a Unix socket in `{}` is longer than the {limit_bytes} bytes that the system allows \
         (set TMPDIR to a shorter path, for example /tmp)",
        folder.display()
    )]
    FolderTooLong {
        /// The private folder.
        folder: PathBuf,
        /// Longest possible path of a socket.
        limit_bytes: usize,
    },
    /// The path of the folder cannot be written into a placement.
    #[error("the path `{}` holds a comma or is not UTF-8 (set TMPDIR to another folder, for example /tmp)", folder.display())]
    FolderUnspeakable {
        /// The private folder.
        folder: PathBuf,
    },
    /// The annotated value is too large to be a set of hyperparameters.
    #[error(
        "the value to train with takes {size_bytes} bytes ({} at most; keep data out of its fields)",
        lifeline::MAX_PAYLOAD_BYTES
    )]
    PayloadTooLarge {
        /// Its size when serialised.
        size_bytes: u64,
    },
    /// A replica's process could not be started.
    #[error("failed to start {replica} from `{}` in `{}`", program.display(), directory.display())]
    Start {
        /// Which.
        replica: Replica,
        /// What was to be executed.
        program: PathBuf,
        /// Its working directory.
        directory: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The process that would clean up after this one could not be started.
    #[cfg(feature = "docker")]
    #[error("failed to start the process that cleans up if this one dies")]
    Guardian {
        /// Why not.
        source: io::Error,
    },
    /// The image does not say what it runs.
    #[cfg(feature = "docker")]
    #[error("the image `{image}` has no entry point (its Dockerfile needs `ENTRYPOINT [\"/path/of/the/program\"]`)")]
    NoEntrypoint {
        /// The image.
        image: String,
    },
    /// An argument of the program cannot be given to it in a container.
    #[cfg(feature = "docker")]
    #[error(
        "the argument {argument:?} is not UTF-8, as arguments in containers have to be (give it another way, for example \
             by a file that `files` names)"
    )]
    ArgumentNotText {
        /// The argument.
        argument: OsString,
    },
    /// The launch was cancelled, and what it had started is gone.
    #[error("the launch was cancelled")]
    Cancelled,
    /// The replicas could not be started, and something of them could not be removed either.
    #[cfg(feature = "docker")]
    #[error("failed to start the replicas, and {}", left.join("; "))]
    LeftBehind {
        /// What is left, with the reason.
        left: Vec<String>,
        /// Why they could not be started.
        source: Box<LaunchError>,
    },
    /// The container engine failed.
    #[cfg(feature = "docker")]
    #[error(transparent)]
    Engine(#[from] docker::EngineError),
    /// The cluster failed.
    #[cfg(feature = "kubernetes")]
    #[error(transparent)]
    Cluster(#[from] kubernetes::ClusterError),
    /// A replica was started but could not be watched; it was ended.
    #[error("failed to watch {replica}")]
    Watch {
        /// Which.
        replica: Replica,
        /// Why not.
        source: io::Error,
    },
}

impl LaunchError {
    /// Whether nobody wanted the replicas to be started any more, and what is left of them then, one thing a line.
    pub(crate) fn cancelled(&self) -> Option<&[String]> {
        match self {
            LaunchError::Cancelled => Some(&[]),
            #[cfg(feature = "docker")]
            LaunchError::LeftBehind { left, source } if matches!(**source, LaunchError::Cancelled) => Some(left),
            _ => None,
        }
    }
}

#[cfg(feature = "docker")]
impl LaunchError {
    /// The same, if something of the run is left behind nevertheless.
    fn leaving(self, left: Vec<String>) -> Self {
        if left.is_empty() { self } else { LaunchError::LeftBehind { left, source: Box::new(self) } }
    }
}

#[cfg(all(test, feature = "docker"))]
mod tests {
    use super::*;

    #[test]
    fn what_a_failed_launch_leaves_is_named_with_the_failure() {
        let error = || LaunchError::NoEntrypoint { image: "a".into() };
        assert_eq!(error().leaving(vec![]).to_string(), error().to_string());
        let left = error().leaving(vec!["something of the run `r` may be left at `e`".into()]);
        let shown = format!("{:#}", anyhow::Error::from(left));
        let expected =
            format!("failed to start the replicas, and something of the run `r` may be left at `e`: {}", error());
        assert_eq!(shown, expected);
    }

    #[test]
    fn an_argument_that_is_no_text_is_named() {
        use std::os::unix::ffi::OsStringExt as _;
        let program = |argument: &[u8]| Program {
            arguments: vec!["--fine".into(), OsString::from_vec(argument.to_vec())],
            ..Program::running()
        };
        assert!(program("größe".as_bytes()).check_arguments().is_ok());
        let error = program(b"caf\xe9").check_arguments().unwrap_err().to_string();
        assert!(error.starts_with("the argument \"caf\\xE9\" is not UTF-8"), "{error}");
    }
}
