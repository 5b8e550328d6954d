//! Starting the replicas of a run, and making sure that they end.
//!
//! A [`LaunchPlan`] says what is to be started; a [`Launcher`] starts it and gives a [`Launched`], which ends what it
//! started when it is dropped. What happens meanwhile arrives as [`ReplicaEvent`]s. A launcher knows processes, lines and
//! exit codes, nothing of training: that goes over the run's own protocol. The replica's side is [`crate::lifeline`].

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::SyncSender;

use crate::lifeline;
use crate::observe::events::{Exit, Stream};
use crate::topology::{Address, Placement, Replica, Topology};

mod lines;
mod local;

pub use local::LocalLauncher;

/// Everything that starts the replicas of one run. Pure data.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    pub payload: Vec<u8>,
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

/// What a launcher learns about a replica.
///
/// The events of one replica arrive in order; its last one is [`ReplicaEvent::Exited`].
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
}

/// Starts the replicas of one run on one kind of target.
pub trait Launcher {
    /// Where the parameter servers of the run will listen, in rank order; goes into the plan's placements.
    fn addresses(&self, topology: &Topology) -> Vec<Address>;

    /// Starts every replica of `plan`.
    ///
    /// Returns when all are started; does not wait until they are ready. `events` is bounded: while it is full, replicas
    /// that write wait. Nothing waits for a receiver that is gone.
    ///
    /// # Errors
    ///
    /// [`LaunchError`]; what was started before the failure is ended.
    fn launch(
        self: Box<Self>,
        plan: &LaunchPlan,
        events: SyncSender<ReplicaEvent>,
    ) -> Result<Box<dyn Launched>, LaunchError>;
}

/// The started replicas of one run. Dropping it ends them.
pub trait Launched: Send {
    /// Ends at once what still runs, waits a bounded time until nothing of the run is left, and clears its private files.
    /// Events that find no room from then on are dropped. A second call does nothing.
    fn end(&mut self);

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
    /// A replica was started but could not be watched; it was ended.
    #[error("failed to watch {replica}")]
    Watch {
        /// Which.
        replica: Replica,
        /// Why not.
        source: io::Error,
    },
}
