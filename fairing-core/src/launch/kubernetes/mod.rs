//! Replicas as pods of a Kubernetes cluster.
//!
//! ```text
//! client      finding the cluster; requests with deadlines; what is wrong with it in words
//! manifest    what is created, as values
//! scene       what others ask of that: who prepares a launch, who finds one
//! preflight   what can be known to go wrong before anything is built
//! create      creating it, so that whatever dies in between, all of it goes away
//! watch       pods, Jobs and events → what happens to the replicas
//! logs        what containers wrote, without loss or repetition
//! way         to the coordinator, by a port-forward
//! runs        finding runs, and what it takes to attach to one
//! tidy        removing all of it, and looking that it is gone
//! ```
//!
//! The run does not need its launcher: value and identities lie in Secrets of its own, the Jobs see to lost workers, and
//! its owner (see `create`) ends and removes it in time, whoever else is gone.

mod client;
mod create;
mod logs;
pub(crate) mod manifest;
mod preflight;
mod runs;
mod scene;
mod tidy;
mod watch;
mod way;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, Preconditions};
use tokio::sync::watch::{Receiver, channel};
use tokio::task::JoinHandle;

use super::events::{Ending, Events, LastLines};
use super::{Cancel, LaunchError, LaunchPlan, Launched, Launcher, Patience, ReplicaEvent, Way};
use crate::observe::events::Exit;
use crate::topology::{Address, Replica, Role, Topology};

pub use client::{Cluster, ClusterError};
pub use preflight::{Preflight, PreflightError};
pub(crate) use runs::Attachment;
pub use runs::{ClusterRun, ClusterRunState};

use manifest::Format;
use tidy::Belongings;
use way::Forward;

/// Seconds that a pod gets to end when its end is wanted at once.
const KILL_SECONDS: u32 = 1;

/// How long whoever interrupts a launch waits for its objects to be removed.
const UNDONE: Duration = Duration::from_secs(60);

// What gives up before is the removal, which can say what is left.
const _: () = assert!(create::LAST_ANSWERS.as_secs() + tidy::REMOVED.as_secs() < UNDONE.as_secs());

/// The same after a second interrupt: what there is, the cluster removes by itself.
const UNDONE_AT_ONCE: Duration = Duration::from_secs(5);

/// Starts replicas as pods of a cluster.
pub struct KubernetesLauncher {
    cluster: Cluster,
    scene: manifest::Scene,
    cancel: Cancel,
}

impl KubernetesLauncher {
    /// A launcher that starts what `scene` describes.
    pub(crate) fn new(cluster: Cluster, scene: manifest::Scene) -> Self {
        Self { cluster, scene, cancel: Cancel::default() }
    }
}

impl Launcher for KubernetesLauncher {
    fn addresses(&self, run: &str, topology: &Topology) -> Vec<Address> {
        self.scene.addresses(run, topology)
    }

    fn heed(&mut self, cancel: Cancel) {
        self.cancel = cancel;
    }

    fn patience(&self, run: &str) -> Patience {
        let settings = &self.scene.settings;
        let time = humantime::format_duration(settings.launch_timeout + settings.ttl);
        Patience {
            what: "the cluster to create the objects of the run".to_owned(),
            first: UNDONE,
            second: UNDONE_AT_ONCE,
            then: format!(
                "the cluster removes what there is of the run `{run}` by itself: within {time}, or when it has ended if it was \
                 started after all (`fairing_core::delete(\"{run}\")` removes it now)"
            ),
        }
    }

    fn launch(
        self: Box<Self>,
        plan: &LaunchPlan,
        events: SyncSender<ReplicaEvent>,
    ) -> Result<Box<dyn Launched>, LaunchError> {
        let objects = manifest::objects(&self.scene, plan);
        let Self { cluster, cancel, .. } = self.as_ref();
        let created = cluster.reactor().wait(create::launch(cluster, &objects, cancel))?;
        let topology = plan.placements[0].topology;
        Ok(Box::new(KubernetesRun::follow(self.cluster, topology, created, self.scene.following(plan), events)))
    }
}

/// What of a run's plan matters to those who follow it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Following {
    /// The kind of objects that it consists of.
    pub(crate) format: Format,
    /// Whether the cluster starts a lost worker again.
    pub(crate) restarts: bool,
    /// Whether the others wait for a lost worker.
    pub(crate) is_sync: bool,
    /// How long a replica may take to start.
    pub(crate) schedule_timeout: Duration,
    /// How long the run may take.
    pub(crate) deadline: Duration,
    /// Bytes of memory of a worker and of a server.
    pub(crate) memory: [u64; 2],
    /// The port of the coordinator.
    pub(crate) port: u16,
}

impl Following {
    fn memory_of(&self, role: Role) -> u64 {
        self.memory[usize::from(role == Role::Ps)]
    }

    /// Whether the cluster starts a replica again that ended so.
    fn starts_again(&self, replica: Replica, exit: Exit) -> bool {
        let counts = match (exit, self.format) {
            (Exit::Code(0), _) => false,
            (Exit::Signal(_), _) => true,
            // The rule of Kubeflow's operator.
            (Exit::Code(code), Format::TfJob) => code >= 128,
            (Exit::Code(code), Format::Jobs | Format::JobSet) => !manifest::fails_the_job(code),
        };
        counts && self.restarts && replica.role == Role::Worker
    }
}

/// A run on a cluster, as somebody follows it.
pub(crate) struct KubernetesRun {
    cluster: Cluster,
    belongings: Belongings,
    last_lines: BTreeMap<Replica, Arc<LastLines>>,
    pods: Receiver<watch::Pods>,
    ending: Arc<Ending>,
    observing: JoinHandle<()>,
    way: Arc<Forward>,
    /// Whether it has been removed, or is to be left alone.
    done: bool,
}

impl KubernetesRun {
    /// Follows what was created.
    pub(crate) fn follow(
        cluster: Cluster,
        topology: Topology,
        belongings: Belongings,
        following: Following,
        events: SyncSender<ReplicaEvent>,
    ) -> Self {
        let ending = Arc::<Ending>::default();
        let last_lines: BTreeMap<_, _> = topology.replicas().map(|replica| (replica, Arc::default())).collect();
        let (coordinator, runs_at) = channel(None);
        let (told, pods) = channel(watch::Pods::default());
        let observed = watch::Observed {
            cluster: cluster.clone(),
            run: belongings.run.clone(),
            owner: belongings.owner.clone(),
            topology,
            events_since: belongings.version.clone(),
            events: Events::new(events, ending.clone()),
            last_lines: last_lines.clone(),
            coordinator,
            pods: told,
            following,
        };
        let observing = cluster.reactor().spawn(watch::observe(observed));
        let way = Arc::new(Forward::new(cluster.clone(), following.port, runs_at));
        Self { cluster, belongings, last_lines, pods, ending, observing, way, done: false }
    }
}

impl Launched for KubernetesRun {
    fn way(&self) -> Arc<dyn Way> {
        self.way.clone()
    }

    fn end(&mut self) -> Vec<String> {
        if std::mem::replace(&mut self.done, true) {
            return Vec::new();
        }
        self.ending.begin();
        self.observing.abort();
        let have_ended = self.pods.borrow().have_ended;
        self.cluster.reactor().wait(tidy::remove(&self.cluster, &self.belongings, have_ended))
    }

    fn let_go(&mut self) {
        self.done = true;
        self.ending.begin();
        self.observing.abort();
    }

    fn kill(&self, replica: Replica) {
        let Some((name, uid)) = self.pods.borrow().living.get(&replica).cloned() else { return };
        let cluster = self.cluster.clone();
        self.cluster.reactor().spawn(async move {
            let pods: Api<Pod> = cluster.api();
            // Its successor may have the same name.
            let it = Preconditions { uid: Some(uid), resource_version: None };
            let parameters = DeleteParams::default().grace_period(KILL_SECONDS).preconditions(it);
            // Fails if it has ended, or if the cluster is gone; the watch tells of either.
            let _ = cluster.ask_once("end a pod", pods.delete(&name, &parameters)).await;
        });
    }

    fn restart(&mut self, _: &LaunchPlan, _: Replica, _: SyncSender<ReplicaEvent>) -> Result<(), LaunchError> {
        // Its Job does that, unasked.
        Ok(())
    }

    fn restarts_by_itself(&self) -> bool {
        true
    }

    fn process_id(&self, _: Replica) -> Option<u32> {
        None
    }

    fn last_lines(&self, replica: Replica) -> Vec<String> {
        self.last_lines.get(&replica).map(|lines| lines.get()).unwrap_or_default()
    }
}

impl Drop for KubernetesRun {
    fn drop(&mut self) {
        self.end();
    }
}
