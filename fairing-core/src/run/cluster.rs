//! Runs on a cluster that go on without the process that launched them.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Instant, SystemTime};

use super::{Outcome, Run, RunError, watch};
use crate::config::{Attribute, Config, LaunchOptions, ProcessEnv, Resolved, Surroundings, Target};
use crate::launch::kubernetes::{Attachment, Cluster, ClusterRun, KubernetesRun};
use crate::launch::{LaunchError, LaunchPlan, Launched, Launcher, Program, ReplicaEvent};
use crate::observe::run_folder::RunFolder;
use crate::observe::terminal::terminal;
use crate::secure::Identity;
use crate::topology::{Address, Replica, Topology};

/// The runs in the namespace that `Fairing.toml` and the variables name, the newest first; for example
/// `FAIRING_NAMESPACE=team`.
///
/// # Errors
///
/// [`RunError::Config`] and [`RunError::Cluster`].
pub fn runs() -> Result<Vec<ClusterRun>, RunError> {
    let (cluster, _) = cluster()?;
    Ok(patiently(&cluster, || cluster.runs())?)
}

/// Attaches to a run that goes on, or that keeps its result, on any machine that may read its Secrets: shows it from the
/// beginning, and [`Run::wait`] brings the result home and removes it from the cluster. Whoever was attached before hears so
/// and leaves it alone.
///
/// # Errors
///
/// [`RunError::NoSuchRun`] if there is none of this name.
pub fn attach(run: &str) -> Result<Run, RunError> {
    let started = (Instant::now(), SystemTime::now());
    let (cluster, config) = cluster()?;
    let Attachment { note, identity, belongings, run: found } = attachment(&cluster, run)?;
    let topology = note.placements[0].topology;
    let folder = RunFolder::create(&config.runs, run)?;
    let plan = LaunchPlan {
        run: run.to_owned(),
        placements: note.placements,
        program: Program::running(),
        variables: Vec::new(),
        value: Vec::new(),
        identities: Vec::new(),
        caller: Vec::new(),
    };
    let (messages, received) = sync_channel(watch::QUEUE);
    let seed = plan.placements[0].seed;
    let following = note.following;
    let follow = move |events| KubernetesRun::follow(cluster, topology, belongings, following, events);
    let watch = watch::Watch {
        plan,
        launcher: Box::new(Attach { follow }),
        identity: Some(Identity::from_bytes(&identity)?),
        view: terminal(topology, &ProcessEnv),
        folder: folder.clone(),
        type_name: found.type_name,
        hyperparameters: serde_json::Value::Null,
        manifest: Surroundings::read(&ProcessEnv)?.manifest,
        data_dir: None,
        seed,
        extension: note.extension,
        started,
        messages: messages.clone(),
        attached: true,
    };
    let watcher = watch.start(received)?;
    Ok(Run { name: run.to_owned(), folder, messages, watcher: Some(watcher) })
}

/// Asks a run to stop: the round in progress is finished, the model is evaluated, saved and brought home.
///
/// # Errors
///
/// Those of [`attach`] and of [`Run::wait`].
pub fn stop(run: &str) -> Result<Outcome, RunError> {
    let run = attach(run)?;
    run.stop();
    run.wait()
}

/// Ends a run at once and removes all of it; its result is lost.
///
/// # Errors
///
/// [`RunError::NoSuchRun`] if there is none of this name, [`RunError::LeftBehind`] if something could not be removed.
pub fn delete(run: &str) -> Result<(), RunError> {
    let (cluster, _) = cluster()?;
    // Of a launch that broke off there may be an owner and nothing else.
    let Some(belongings) = patiently(&cluster, || cluster.owner(run))? else { return Err(no_such_run(&cluster, run)?) };
    let left = patiently(&cluster, || cluster.remove(&belongings));
    if left.is_empty() { Ok(()) } else { Err(RunError::LeftBehind { left }) }
}

/// What a replica of a run has written so far; `None` if it has no pod.
///
/// # Errors
///
/// [`RunError::NoSuchRun`] if there is none of this name, [`RunError::Cluster`].
pub fn logs(run: &str, replica: Replica) -> Result<Option<String>, RunError> {
    let (cluster, _) = cluster()?;
    let log = patiently(&cluster, || cluster.logs(run, replica))?;
    if log.is_none() && patiently(&cluster, || cluster.owner(run))?.is_none() {
        return Err(no_such_run(&cluster, run)?);
    }
    Ok(log)
}

/// Removes what is left of the runs of the namespace that have ended, and says of each what became of it.
///
/// Runs clean up after themselves, and what a dead launcher leaves the cluster removes in time. This is for those who do not
/// want to wait.
///
/// # Errors
///
/// [`RunError::Cluster`].
pub fn sweep_cluster() -> Result<Vec<String>, RunError> {
    let (cluster, _) = cluster()?;
    Ok(patiently(&cluster, || cluster.sweep())?)
}

/// Asks the cluster, and says so if that takes long.
fn patiently<T: Send>(cluster: &Cluster, ask: impl FnOnce() -> T + Send) -> T {
    let what = format!("the cluster at {} to answer", cluster.server());
    let mut view = terminal(Topology::new(1, 0), &ProcessEnv);
    watch::patiently(view.as_mut(), &what, ask)
}

/// The cluster and the configuration, as far as they are not about one program.
fn cluster() -> Result<(Cluster, Config), RunError> {
    let surroundings = Surroundings::read(&ProcessEnv)?;
    // Nothing is launched, so that what a launch on a cluster needs may be missing.
    let options = LaunchOptions::new().target(Target::Local);
    let Resolved { config, .. } = Config::resolve(&Attribute::NONE, &surroundings, &ProcessEnv, &options)?;
    let settings = &config.kubernetes;
    let cluster = Cluster::find(settings.context.as_deref(), settings.namespace.as_deref())?;
    Ok((cluster, config))
}

fn attachment(cluster: &Cluster, run: &str) -> Result<Attachment, RunError> {
    match patiently(cluster, || cluster.attachment(run))? {
        Some(attachment) => Ok(attachment),
        None => Err(no_such_run(cluster, run)?),
    }
}

fn no_such_run(cluster: &Cluster, run: &str) -> Result<RunError, RunError> {
    let known = cluster.runs()?.into_iter().map(|run| run.name).collect();
    Ok(RunError::NoSuchRun { run: run.to_owned(), namespace: cluster.namespace().to_owned(), known })
}

/// Follows a run that has been launched.
struct Attach<F> {
    follow: F,
}

impl<F> Launcher for Attach<F>
where
    F: FnOnce(SyncSender<ReplicaEvent>) -> KubernetesRun + Send,
{
    fn addresses(&self, _: &str, _: &Topology) -> Vec<Address> {
        unreachable!("the run has its addresses")
    }

    fn launch(
        self: Box<Self>,
        _: &LaunchPlan,
        events: SyncSender<ReplicaEvent>,
    ) -> Result<Box<dyn Launched>, LaunchError> {
        Ok(Box::new((self.follow)(events)))
    }
}
