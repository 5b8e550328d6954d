//! From a value to a trained model: the only module that both prepares and launches.
//!
//! ```text
//! start()   configuration → topology → plan → replicas (crate::launch)
//! watch     replicas' lines and exits, the coordinator's messages, Ctrl-C → view, files, one ending
//! wait()    ending → Outcome or RunError
//! replica   in each replica: placement → crate::runtime, never returns to `main`
//! memory    the same runtime between threads of one process
//! ```

mod caller;
#[cfg(feature = "kubernetes")]
mod cluster;
mod memory;
#[cfg(feature = "kubernetes")]
mod on_cluster;
mod outcome;
mod replica;
#[cfg(feature = "docker")]
mod ship;
mod signals;
mod target;
mod test_binary;
mod watch;

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use crate::__private::{Registration, Travels};
use crate::config::{
    Config, ConfigError, Env as _, Explanation, LaunchOptions, ProcessEnv, Renderer, Resolved, Surroundings,
};
use crate::exit::ExitCode;
#[cfg(feature = "kubernetes")]
use crate::launch::kubernetes::{ClusterError, PreflightError, manifest::MAX_VALUE_BYTES};
use crate::launch::{LaunchError, LaunchPlan, Launcher, Program};
use crate::lifeline;
use crate::observe::events::{Event, Exit};
use crate::observe::metrics::MetricsError;
use crate::observe::run_folder::{RunFolder, RunFolderError, run_name};
use crate::observe::tensorboard::TensorBoardError;
use crate::observe::terminal::{View, print, terminal};
use crate::protocol::failure::Failure;
use crate::runtime::Model;
use crate::secure::{Authority, Identity, IdentityError};
use crate::topology::{Address, JOIN, KEEP_RESULT, Member, Placement};
use crate::training::DistributedTraining;

#[cfg(feature = "kubernetes")]
pub use cluster::{attach, delete, logs, runs, stop, sweep_cluster};
pub(crate) use memory::train_in_memory;
pub use memory::{TrainError, Trained};
pub use outcome::{Outcome, OutcomeError};
pub(crate) use replica::dispatch;
#[cfg(feature = "docker")]
pub use ship::ImageError;

use target::{Prepared, Site, Target};

/// Stands for the name of the run in a dry run, where there is none.
const DRY_RUN: &str = "RUN";

/// Whether this process is a replica that a launcher started, so that `main` can skip what only the caller needs.
///
/// In a replica `main` runs up to its first `launch()`, which takes the replica's part and never returns.
///
/// Also true in a process of a TFJob that somebody else wrote: its variable `TF_CONFIG` says which part it takes, see
/// [`topology::tf_config`](crate::topology::tf_config).
pub fn in_replica() -> bool {
    lifeline::is_attached() || replica::is_of_a_tfjob()
}

/// What travels to every replica. What only one gets, its [`Identity`], travels beside it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Payload {
    /// `module_path::Type`, by which the replica finds what to train.
    pub(crate) name: String,
    /// The value, as [`Travels::to_bytes`] gives it.
    #[serde(with = "serde_bytes")]
    pub(crate) value: Vec<u8>,
}

/// What is trained, for those who look at the cluster.
#[cfg_attr(not(feature = "kubernetes"), expect(dead_code, reason = "who else looks is on a cluster"))]
pub(super) struct Subject<'a> {
    /// The annotated type, as a person calls it.
    pub(super) type_name: &'a str,
    /// The type and the value, serialised.
    pub(super) value: &'a [u8],
    /// Of the model's file.
    pub(super) extension: &'a str,
}

/// Failure of a run. Returned by `launch()`, `start()` and [`Run::wait`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The configuration cannot be meant.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The value cannot be sent to the replicas.
    #[error("the value of `{type_name}` cannot travel to its replicas ({reason})")]
    Value {
        /// The annotated type.
        type_name: String,
        /// serde's own words.
        reason: String,
    },
    /// Two annotated types have one name, so that a replica could train the wrong one.
    #[error(
        "two annotated types are called `{name}` ({first} and {second}); rename one, or move it to a module of its own"
    )]
    AmbiguousType {
        /// `module_path::Type`.
        name: &'static str,
        /// Where the first attribute stands.
        first: String,
        /// Where the second attribute stands.
        second: String,
    },
    /// The data folder does not exist.
    #[error("the data folder `{}` is no folder (`data` in the attribute or Fairing.toml is meant from the folder of \
             Cargo.toml, FAIRING_DATA from the current one)", path.display())]
    DataFolder {
        /// What was configured.
        path: PathBuf,
    },
    /// The launch happens in a test, and it cannot be told in which.
    #[error(
        "`launch()` in a test needs the test's own thread, which is named after it (call it directly in the `#[test]` \
             function), or use `train_in_memory`, which starts no process"
    )]
    UnknownTest,
    /// The run's folder or a file in it cannot be written.
    #[error(transparent)]
    Folder(#[from] RunFolderError),
    /// The metrics cannot be written or read back.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The values for TensorBoard cannot be written.
    #[error(transparent)]
    TensorBoard(#[from] TensorBoardError),
    /// The target needs a feature of fairing-core that this program was built without.
    #[error("the target `{target}` needs the feature `{feature}` of fairing-core, which is on by default")]
    MissingFeature {
        /// What was asked for.
        target: crate::config::Target,
        /// What is missing.
        feature: &'static str,
    },
    /// The image could not be made or brought where it is run.
    #[cfg(feature = "docker")]
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The replicas could not be given identities.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The replicas could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A replica failed; what the others said of it is folded under this.
    #[error("{}", watch::describe_failure(failure, exit.as_ref(), last_lines, logs))]
    Failed {
        /// The cause.
        failure: Failure,
        /// How the replica that caused it ended, if it did.
        exit: Option<Exit>,
        /// The last lines that it wrote.
        last_lines: Vec<String>,
        /// The folder of the replicas' logs.
        logs: PathBuf,
    },
    /// The run took longer than it may, and the cluster ended it.
    #[error(
        "the run took longer than its `deadline` of {}, and the cluster ended it (set `deadline` or FAIRING_DEADLINE to more)",
        humantime::format_duration(*deadline)
    )]
    OutOfTime {
        /// What it may take.
        deadline: Duration,
    },
    /// The run came to its end without some of its workers: not a success, but what the others trained is there.
    #[error("the run is incomplete: {lost} (the model of the others is {})", outcome.model().display())]
    Incomplete {
        /// Who was lost, why, and what that cost.
        lost: String,
        /// What the others brought home.
        outcome: Box<Outcome>,
    },
    /// The caller went before it had heard of the run, which goes on.
    #[error("the run `{run}` is left alone, and goes on")]
    Left {
        /// The run.
        run: String,
    },
    /// There is no run of this name.
    #[cfg(feature = "kubernetes")]
    #[error(
        "there is no run `{run}` in the namespace `{namespace}` ({}; set `namespace` or FAIRING_NAMESPACE to look in another)",
        match known.as_slice() {
            [] => "it has none".to_owned(),
            known => format!("it has {}", known.join(", ")),
        }
    )]
    NoSuchRun {
        /// What was asked for.
        run: String,
        /// Where it was looked for.
        namespace: String,
        /// The runs that there are.
        known: Vec<String>,
    },
    /// The same type is being trained with the same value.
    #[cfg(feature = "kubernetes")]
    #[error(
        "the run `{run}` trains the same type with the same value at this moment (attach to it with `fairing_core::attach(\"{run}\")`, \
         or set FAIRING_ANOTHER=1 to start another one)"
    )]
    AlreadyRuns {
        /// The run.
        run: String,
    },
    /// Something of a run could not be removed.
    #[cfg(feature = "kubernetes")]
    #[error("{}", left.join("; "))]
    LeftBehind {
        /// What, with the reason.
        left: Vec<String>,
    },
    /// The value to train with is too large for a cluster's Secret.
    #[cfg(feature = "kubernetes")]
    #[error(
        "the value to train with takes {size_bytes} bytes ({MAX_VALUE_BYTES} at most on a cluster; keep data out of its \
         fields: `data` ships a folder)"
    )]
    ValueTooLarge {
        /// Its size when serialised.
        size_bytes: usize,
    },
    /// The cluster failed.
    #[cfg(feature = "kubernetes")]
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The run cannot be launched on the cluster.
    #[cfg(feature = "kubernetes")]
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// The caller ended the run before there was a result: a second Ctrl-C, or one before training began.
    #[error("stopped before there was a result")]
    Killed,
    /// The run goes on, but its end is another process's to hear.
    #[error("another process has attached to the run, which goes on and answers to that one")]
    Replaced,
    /// The watching thread panicked: a fault of fairing's.
    #[error("fairing itself failed while watching the run: {0}")]
    Watcher(String),
}

/// A run that has been started. Dropping it ends all its replicas.
///
/// Made by [`DistributedTraining::start`].
pub struct Run {
    name: String,
    folder: RunFolder,
    messages: SyncSender<watch::Message>,
    watcher: Option<JoinHandle<Result<Outcome, RunError>>>,
}

impl Run {
    /// Name of the run.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder with the run's logs, metrics, model and summary.
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// Asks the run to stop: the round in progress is finished, `train` evaluates and returns, the model is saved.
    pub fn stop(&self) {
        // A run that has ended needs no stop.
        let _ = self.messages.send(watch::Message::Stop);
    }

    /// Waits for the end of the run; nothing of it is left running afterwards.
    ///
    /// # Errors
    ///
    /// [`RunError::Failed`] with the cause, [`RunError::Killed`], or what kept the result from being saved;
    /// [`RunError::Replaced`] if the run goes on and is no longer this process's.
    pub fn wait(mut self) -> Result<Outcome, RunError> {
        let watcher = self.watcher.take().expect("only `wait` and `drop` take it");
        watcher.join().unwrap_or_else(|panic| Err(RunError::Watcher(panic_text(panic.as_ref()))))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if let Some(watcher) = self.watcher.take() {
            let _ = self.messages.send(watch::Message::Kill);
            // Its result has no reader any more.
            let _ = watcher.join();
        }
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a panic without a message").to_owned()
}

/// The configuration of `T` with all its layers.
pub(crate) fn resolve<T: DistributedTraining>(options: &LaunchOptions) -> Result<(Resolved, Surroundings), RunError> {
    let surroundings = Surroundings::read(&ProcessEnv)?;
    let resolved = Config::resolve(&T::ATTRIBUTE, &surroundings, &ProcessEnv, options)?;
    Ok((resolved, surroundings))
}

pub(crate) fn explain<T: DistributedTraining>(options: &LaunchOptions) -> Result<Explanation, RunError> {
    Ok(resolve::<T>(options)?.0.explanation)
}

/// Ends with the outcome of a run as `launch()` means it: a stopped run has its result saved and shown, and then the
/// process ends with 130, since success is 0 and nothing else is.
pub(crate) fn launch<T: DistributedTraining>(value: &T, options: &LaunchOptions) -> Result<Outcome, RunError> {
    match start(value, options).and_then(Run::wait) {
        Ok(outcome) if outcome.is_stopped() => ExitCode::Stopped.exit(),
        Err(RunError::Killed) => ExitCode::Stopped.exit(),
        result => result,
    }
}

pub(crate) fn start<T: DistributedTraining>(value: &T, options: &LaunchOptions) -> Result<Run, RunError> {
    if lifeline::is_attached() {
        replica::take_part();
    }
    #[cfg(feature = "image")]
    if lifeline::is_cut_off() {
        replica::refuse_cut_off();
    }
    if replica::is_of_a_tfjob() {
        replica::take_part_in_a_tfjob(value);
    }
    let started = (Instant::now(), SystemTime::now());
    let (Resolved { config, .. }, surroundings) = resolve::<T>(options)?;
    find_registration(T::NAME)?;
    let arguments = test_binary::arguments()?;
    let payload = payload(value)?;
    if let Some(path) = config.data_dir.clone().filter(|path| !path.is_dir()) {
        return Err(RunError::DataFolder { path });
    }
    let type_name = short_name(T::NAME);
    let mut view = terminal(config.topology, &ProcessEnv);
    // Before the run's folder, so that a run that cannot be launched leaves none.
    let program = Program { arguments, ..Program::running() };
    let subject = Subject { type_name, value: &payload, extension: T::Model::EXTENSION };
    let target = Prepared::new(&config, &surroundings.manifest, &program, &subject, view.as_mut())?;
    if config.dry_run {
        let servers = target.addresses(DRY_RUN, &config.topology);
        print(&target.describe(&dry_plan(DRY_RUN, &config, &program, &subject, &target.site(&config), &servers)));
        ExitCode::Success.exit();
    }
    let name = run_name(type_name, started.1);
    let Target { launcher, site, is_remote } = target.deliver(&config, &name, view.as_mut())?;
    let planned = |run: String| {
        let servers = launcher.addresses(&run, &config.topology);
        let placements = placements(&run, &config, &site, &servers);
        let (identities, identity) = identities(&run, &placements, is_remote)?;
        let caller = identity.as_ref().map(Identity::to_bytes).unwrap_or_default();
        let variables = forwarded(&config);
        let plan = LaunchPlan { run, placements, program, variables, value: payload, identities, caller };
        Ok::<_, RunError>((plan, identity))
    };
    if config.kubernetes.detach {
        let (plan, _) = planned(name)?;
        detach(launcher, plan, view.as_mut())?;
        ExitCode::Success.exit();
    }
    let folder = RunFolder::create(&config.runs, &name)?;
    let name = folder.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
    let (plan, identity) = planned(name.clone())?;
    let (messages, received) = sync_channel(watch::QUEUE);
    let watch = watch::Watch {
        plan,
        launcher,
        identity,
        view,
        folder: folder.clone(),
        type_name: type_name.to_owned(),
        hyperparameters: value.to_json(),
        manifest: surroundings.manifest,
        data_dir: config.data_dir,
        seed: config.seed,
        extension: T::Model::EXTENSION.to_owned(),
        started,
        messages: messages.clone(),
        attached: false,
    };
    let watcher = watch.start(received)?;
    Ok(Run { name, folder, messages, watcher: Some(watcher) })
}

/// Starts the replicas and leaves them to themselves. Says on standard output what the run is called, and nothing else there.
fn detach(launcher: Box<dyn Launcher>, plan: LaunchPlan, view: &mut dyn View) -> Result<(), RunError> {
    let interrupts = signals::Interrupts::count();
    // What happens to them, others will hear.
    let (events, _) = sync_channel(1);
    let (plan, mut launched) = watch::launch(launcher, plan, &events, &interrupts, view)?;
    if interrupts.so_far() > 0 {
        for left in watch::patiently(view, "what was started to be removed", || launched.end()) {
            view.show(&Event::Warning(left), Instant::now());
        }
        view.say("stopped as soon as the replicas were started");
        return Err(RunError::Killed);
    }
    launched.let_go();
    view.say(&format!(
        "`{0}` runs without this process (`fairing_core::attach(\"{0}\")` brings its result home)",
        plan.run
    ));
    print(&format!("{}\n", plan.run));
    Ok(())
}

/// What would be launched, under a name that stands for one.
fn dry_plan(
    run: &str,
    config: &Config,
    program: &Program,
    subject: &Subject,
    site: &Site,
    servers: &[Address],
) -> LaunchPlan {
    let placements = placements(run, config, site, servers);
    LaunchPlan {
        run: run.to_owned(),
        program: program.clone(),
        variables: forwarded(config),
        value: subject.value.to_owned(),
        // Issued for a run that will be.
        identities: vec![Vec::new(); placements.len()],
        caller: Vec::new(),
        placements,
    }
}

/// The part of `module_path::Type` that a person calls it by.
fn short_name(name: &str) -> &str {
    name.rsplit("::").next().unwrap_or(name)
}

fn find_registration(name: &'static str) -> Result<&'static Registration, RunError> {
    let mut found = inventory::iter::<Registration>().filter(|registration| registration.name == name);
    let first = found.next().expect("the attribute that gives a type its name also registers it");
    match found.next() {
        None => Ok(first),
        Some(second) => {
            let place = |registration: &Registration| format!("{}:{}", registration.file, registration.line);
            // The linker decides the order of registrations; the message should not depend on it.
            let mut places = [place(first), place(second)];
            places.sort();
            let [first, second] = places;
            Err(RunError::AmbiguousType { name, first, second })
        }
    }
}

/// What every replica gets.
fn payload<T: DistributedTraining>(value: &T) -> Result<Vec<u8>, RunError> {
    let failed = |reason: String| RunError::Value { type_name: short_name(T::NAME).to_owned(), reason };
    let value = value.to_bytes().map_err(failed)?;
    // A value that cannot be read back is better known here than from a replica.
    T::from_bytes(&value).map_err(|error| failed(format!("what was written cannot be read back: {error}")))?;
    Payload { name: T::NAME.to_owned(), value }.to_bytes().map_err(failed)
}

/// What each replica proves with who it is, and what the caller does. Where others could reach the replicas, each has an
/// identity of its own, from an authority that is forgotten here; elsewhere nobody has one.
fn identities(
    run: &str,
    placements: &[Placement],
    is_remote: bool,
) -> Result<(Vec<Vec<u8>>, Option<Identity>), RunError> {
    if !is_remote {
        return Ok((vec![Vec::new(); placements.len()], None));
    }
    let authority = Authority::new(run)?;
    let bytes = |placement: &Placement| Ok(authority.issue(placement.replica.into())?.to_bytes());
    let identities = placements.iter().map(bytes).collect::<Result<Vec<_>, RunError>>()?;
    Ok((identities, Some(authority.issue(Member::Caller)?)))
}

fn placements(run: &str, config: &Config, site: &Site, servers: &[Address]) -> Vec<Placement> {
    let (join, keep_result) = match config.target {
        crate::config::Target::Kubernetes => (config.kubernetes.join_timeout, config.kubernetes.keep_result),
        _ => (JOIN, KEEP_RESULT),
    };
    // The operator takes the end of worker 0 for that of the TFJob, and ends the servers.
    let is_tfjob = config.target == crate::config::Target::Kubernetes && config.kubernetes.launcher == Renderer::TfJob;
    let placement = |replica| Placement {
        run: run.to_owned(),
        replica,
        topology: config.topology,
        seed: config.seed,
        threads: threads(site.cores, config),
        servers: servers.to_owned(),
        data_dir: site.data_dir.clone(),
        mode: config.mode,
        rejoin: config.rejoin,
        join,
        keep_result,
        first_stays: is_tfjob,
    };
    config.topology.replicas().map(placement).collect()
}

/// The cores divided among the workers, or what the worker's `cpu` asks for if that is less.
fn threads(cores: u32, config: &Config) -> u32 {
    let share = cores / config.topology.workers;
    let asked =
        config.worker.cpu.map_or(u32::MAX, |cpu| u32::try_from(cpu.millicores().div_ceil(1000)).unwrap_or(u32::MAX));
    NonZeroU32::new(share.min(asked)).map_or(1, NonZeroU32::get)
}

/// What of this environment every replica gets.
fn forwarded(config: &Config) -> Vec<(String, std::ffi::OsString)> {
    let always = ["RUST_LOG", "RUST_BACKTRACE"].into_iter().map(str::to_owned);
    let named = always.chain(config.env.iter().cloned());
    named.filter_map(|name| Some((name.clone(), ProcessEnv.get(&name)?.into()))).collect()
}
