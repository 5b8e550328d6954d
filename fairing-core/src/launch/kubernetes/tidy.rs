//! Removing everything of a run, and looking that it is gone: at its end, after a launch that broke off, and for whoever finds
//! it.
//!
//! The owner would take all with it; asking for each spares the wait for the cluster's garbage collector. Nothing that others
//! have is touched, whatever its name is: an object is deleted by its id, and who does not know that looks first whether the
//! object has the label of the launch. So have the pods, and the Jobs that an operator makes.

use std::collections::BTreeSet;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, Preconditions, WatchEvent, WatchParams};
use kube::core::Request;
use kube::{Api, Resource as _, ResourceExt as _};
use reqwest::header::{ACCEPT, HeaderValue};

use super::client::{Cluster, ClusterError};
use super::create::{Named, api};
use super::manifest::{LAUNCH_LABEL, Objects, RUN_LABEL};
use super::scene;

/// How long removing a run may take, all in all; pods get seconds to end. Whoever interrupts a launch waits that long.
pub(super) const REMOVED: Duration = Duration::from_secs(50);

/// How long the cluster may be away when a run is to be removed. Longer would keep the caller for what the cluster does by
/// itself later.
const AWAY: Duration = Duration::from_secs(20);

/// The first pause between two looks; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A watch for pods that go is opened again after that time: one that was cut off says nothing for ever.
const WATCHED: Duration = Duration::from_secs(10);

/// Asks for a list of which only the metadata matter.
const METADATA_ONLY: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";

/// Seconds that pods get to end: they have had their time before.
const GRACE_SECONDS: u32 = 1;

/// What there is of a run.
#[derive(Debug, Clone)]
pub(crate) struct Belongings {
    /// The run.
    pub(crate) run: String,
    /// What owns everything else of the run.
    pub(crate) owner: Named,
    /// The version of the cluster's objects before the first pod.
    pub(crate) version: String,
    /// A label that everything of the run has, and its value.
    pub(super) mark: (&'static str, String),
    /// What was created, or may have been.
    pub(super) objects: Vec<Own>,
}

/// An object of a run.
#[derive(Debug, Clone)]
pub(super) struct Own {
    named: Named,
    /// Its id, if it is known to be there. Otherwise it may be somebody else's.
    pub(super) uid: Option<String>,
}

impl Belongings {
    /// What a launch that has yet to begin will have created.
    pub(super) fn of(objects: &Objects) -> Self {
        let run = objects.run.clone();
        let launch = objects.released.launch().map(|launch| (LAUNCH_LABEL, launch.to_owned()));
        Self {
            owner: objects.released.named(),
            version: String::new(),
            mark: launch.unwrap_or_else(|| (RUN_LABEL, run.clone())),
            objects: objects.held.iter().chain(&objects.rest).map(|manifest| Own::perhaps(manifest.named())).collect(),
            run,
        }
    }

    /// What there is of a run whose owner was found.
    pub(super) fn found(run: &str, owner: &DynamicObject, resource: ApiResource) -> Self {
        let named = Named { resource, name: owner.name_any() };
        let launch = owner.labels().get(LAUNCH_LABEL).map(|launch| (LAUNCH_LABEL, launch.clone()));
        let companions = scene::companions(run, &named).into_iter().map(Own::perhaps);
        Self {
            run: run.to_owned(),
            version: owner.resource_version().unwrap_or_default(),
            mark: launch.unwrap_or_else(|| (RUN_LABEL, run.to_owned())),
            objects: std::iter::once(Own { named: named.clone(), uid: owner.uid() }).chain(companions).collect(),
            owner: named,
        }
    }
}

impl Own {
    fn perhaps(named: Named) -> Self {
        Self { named, uid: None }
    }
}

/// Removes what belongs to a run and waits until it is gone. Returns what is left nevertheless, with the reason.
///
/// If the containers of all pods are known to have ended (`has_ended`), the cluster need not wait until the nodes say so once
/// more, which takes them seconds.
pub(super) async fn remove(cluster: &Cluster, belongings: &Belongings, has_ended: bool) -> Vec<String> {
    let mut left = belongings.objects.iter().map(|own| described(&own.named)).collect();
    let removal = Removal {
        cluster,
        belongings,
        selector: format!("{}={}", belongings.mark.0, belongings.mark.1),
        grace_seconds: if has_ended { 0 } else { GRACE_SECONDS },
        answered_by: Instant::now() + AWAY,
    };
    let reason = match tokio::time::timeout(REMOVED, removal.work(&mut left)).await {
        Ok(Ok(())) => return Vec::new(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => {
            let left: Vec<_> = left.into_iter().collect();
            format!("not gone within {}: {}", humantime::format_duration(REMOVED), left.join(", "))
        }
    };
    let (run, namespace) = (&belongings.run, cluster.namespace());
    vec![format!(
        "something of the run `{run}` is left in the namespace `{namespace}`, as far as is known: {reason} (it ends and is \
         removed by itself, at the latest when its deadline has passed, or `launch_timeout` if it was not started; \
         `fairing_core::delete(\"{run}\")` removes it now)"
    )]
}

fn described(named: &Named) -> String {
    format!("the {} `{}`", named.resource.kind, named.name)
}

/// One removal.
struct Removal<'a> {
    cluster: &'a Cluster,
    belongings: &'a Belongings,
    /// What the run's pods and Jobs are found by.
    selector: String,
    grace_seconds: u32,
    /// When the cluster has to be back.
    answered_by: Instant,
}

impl Removal<'_> {
    /// Does all of it; `left` says at any time what may be left.
    async fn work(&self, left: &mut BTreeSet<String>) -> Result<(), ClusterError> {
        let deleted = join_all(self.belongings.objects.iter().map(|own| self.delete(own))).await;
        let staying: Vec<_> = deleted.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect();
        let mut pause = FIRST_PAUSE;
        loop {
            // Only now: while its owner is there, a controller makes another one of what goes.
            let made = self.delete_made_jobs().await?;
            self.end_pods().await?;
            self.pods_gone(left).await?;
            *left = made;
            for (named, uid) in &staying {
                let looked = self.look(named).await?;
                left.extend(looked.filter(|found| found.uid().as_ref() == Some(uid)).map(|_| described(named)));
            }
            if left.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// What there is under a name, whosever it is.
    async fn look(&self, named: &Named) -> Result<Option<kube::core::PartialObjectMeta<DynamicObject>>, ClusterError> {
        let api = api(self.cluster, &named.resource);
        let action = format!("look at {}", described(named));
        match self.cluster.ask_until(&action, self.answered_by, || api.get_metadata(&named.name)).await {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.is_absence() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes an object if it is the run's. Returns it with its id if it is not gone with the answer.
    async fn delete<'o>(&self, own: &'o Own) -> Result<Option<(&'o Named, String)>, ClusterError> {
        let named = &own.named;
        let uid = match &own.uid {
            Some(uid) => Some(uid.clone()),
            None => {
                let (key, value) = &self.belongings.mark;
                self.look(named)
                    .await?
                    .filter(|found| found.labels().get(*key) == Some(value))
                    .and_then(|found| found.uid())
            }
        };
        let Some(uid) = uid else { return Ok(None) };
        let api = api(self.cluster, &named.resource);
        let (action, parameters) = (format!("remove {}", described(named)), only(&uid));
        match self.cluster.ask_until(&action, self.answered_by, || api.delete(&named.name, &parameters)).await {
            // Only what somebody has still to do something for is not gone with the answer.
            Ok(answer) => {
                let stays = answer.left().is_some_and(|object| !object.finalizers().is_empty());
                Ok(stays.then_some((named, uid)))
            }
            // Gone before, perhaps with another one in its place.
            Err(error) if error.is_absence() || error.is_conflict() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes the Jobs that an operator has made for the run, and says which there were.
    async fn delete_made_jobs(&self) -> Result<BTreeSet<String>, ClusterError> {
        if self.belongings.owner.resource.kind == "Job" {
            return Ok(BTreeSet::new());
        }
        let jobs: Api<Job> = self.cluster.api();
        let selected = ListParams::default().labels(&self.selector);
        let list = || jobs.list_metadata(&selected);
        let list = self.cluster.ask_until("list the Jobs of a run", self.answered_by, list).await?;
        let resource = ApiResource::erase::<Job>(&());
        let made = list
            .items
            .into_iter()
            .map(|job| Own { named: Named { resource: resource.clone(), name: job.name_any() }, uid: job.uid() });
        let made: Vec<_> = made.collect();
        join_all(made.iter().map(|own| self.delete(own))).await.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(made.iter().map(|own| described(&own.named)).collect())
    }

    /// Ends all pods of the run.
    async fn end_pods(&self) -> Result<(), ClusterError> {
        let parameters = DeleteParams::background().grace_period(self.grace_seconds);
        let selected = ListParams::default().labels(&self.selector);
        let end = || async {
            let pods = Request::new(Pod::url_path(&(), Some(self.cluster.namespace())));
            let mut request = pods.delete_collection(&parameters, &selected).map_err(kube::Error::BuildRequest)?;
            // The answer lists them all, and nobody reads it: 25 MiB for a hundred of them, if they came whole.
            request.headers_mut().insert(ACCEPT, HeaderValue::from_static(METADATA_ONLY));
            self.cluster.client().request_text(request).await.map(drop)
        };
        self.cluster.ask_until("end the pods of a run", self.answered_by, end).await
    }

    /// Waits until no pod of the run is left; `left` says which are.
    async fn pods_gone(&self, left: &mut BTreeSet<String>) -> Result<(), ClusterError> {
        let pods: Api<Pod> = self.cluster.api();
        let selected = ListParams::default().labels(&self.selector);
        let described = |name: String| format!("the Pod `{name}`");
        loop {
            // However long the pods take: that the cluster is away meanwhile does them no harm.
            let list = self.cluster.ask("list the pods of a run", || pods.list_metadata(&selected)).await?;
            *left = list.items.iter().map(|pod| described(pod.name_any())).collect();
            if left.is_empty() {
                return Ok(());
            }
            let watching = async {
                let parameters = WatchParams::default().labels(&self.selector);
                let version = list.metadata.resource_version.unwrap_or_default();
                let Ok(events) = pods.watch_metadata(&parameters, &version).await else { return };
                let mut events = pin!(events);
                while let Some(Ok(event)) = events.next().await {
                    match event {
                        WatchEvent::Added(pod) => _ = left.insert(described(pod.name_any())),
                        WatchEvent::Deleted(pod) => _ = left.remove(&described(pod.name_any())),
                        WatchEvent::Error(_) => return,
                        WatchEvent::Modified(_) | WatchEvent::Bookmark(_) => {}
                    }
                    if left.is_empty() {
                        return;
                    }
                }
            };
            let _ = tokio::time::timeout(WATCHED, watching).await;
            if left.is_empty() {
                return Ok(());
            }
            // A cluster that ends its watches at once is not to be asked again at once.
            tokio::time::sleep(FIRST_PAUSE).await;
        }
    }
}

/// How the object with that id is deleted, and no other. The API's default for Jobs leaves their pods behind.
fn only(uid: &str) -> DeleteParams {
    let same = Preconditions { uid: Some(uid.to_owned()), ..Preconditions::default() };
    DeleteParams::background().preconditions(same)
}
