//! Removing everything of a run, and looking that it is gone.

use std::collections::BTreeSet;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, DynamicObject, ListParams, WatchEvent, WatchParams};
use kube::core::Request;
use kube::{Api, Resource as _, ResourceExt as _};
use reqwest::header::{ACCEPT, HeaderValue};

use super::apply::{Applied, Named, api};
use super::client::{Cluster, ClusterError};
use super::manifest::RUN_LABEL;
use super::scene;

/// How long the cluster may take to remove a run's objects; pods get seconds to end.
const REMOVED: Duration = Duration::from_secs(60);

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

/// Removes a run's objects and waits until they are gone. Returns what is left nevertheless, one thing and its reason a line.
///
/// The owner would take all with it; asking for each spares the wait for the cluster's garbage collector. If the containers
/// of all pods are known to have ended (`has_ended`), the cluster need not wait until the nodes say so once more, which takes
/// them seconds.
pub(super) async fn remove(cluster: &Cluster, applied: &Applied, has_ended: bool) -> Vec<String> {
    let deadline = Instant::now() + AWAY;
    let Applied { owner, run, .. } = applied;
    // The API's default for Jobs leaves their pods behind.
    let parameters = DeleteParams::background();
    let named = std::iter::once(owner.clone()).chain(scene::companions(run, owner));
    let deleting = named.map(|named| {
        let parameters = &parameters;
        async move {
            let api = api(cluster, &named.resource);
            let action = format!("remove the {} `{}`", named.resource.kind, named.name);
            let answer = cluster.ask_until(&action, deadline, || api.delete(&named.name, parameters)).await;
            // Only what somebody has still to do something for is not gone with the answer.
            let stays = answer.map(|answer| answer.left().is_some_and(|object| !object.finalizers().is_empty()));
            (named, api, stays)
        }
    });
    let selector = format!("{RUN_LABEL}={run}");
    let ending = async {
        let grace_seconds = if has_ended { 0 } else { GRACE_SECONDS };
        let end = || end_pods(cluster, &selector, grace_seconds);
        cluster.ask_until("end the pods of a run", deadline, end).await
    };
    let (deleted, ended) = tokio::join!(join_all(deleting), ending);
    let mut staying = Vec::new();
    let mut failed = ended.err();
    for (named, api, stays) in deleted {
        match stays {
            Ok(true) => staying.push((named, api)),
            Ok(false) => {}
            Err(error) if error.is_absence() => {}
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    if let Some(error) = failed {
        return vec![format!(
            "something of the run `{run}` is left in the namespace `{}`: {error} (it ends and is removed by itself, at the \
             latest when its deadline has passed; `fairing_core::delete(\"{run}\")` removes it now)",
            cluster.namespace()
        )];
    }
    let deadline = Instant::now() + REMOVED;
    match left(cluster, &staying, owner, &selector, deadline).await {
        Ok(left) if left.is_empty() => Vec::new(),
        Ok(left) => {
            let within = humantime::format_duration(REMOVED);
            vec![format!("not gone within {within}, though it is being removed: {}", left.join(", "))]
        }
        Err(error) => vec![format!("whether the run `{run}` is gone is not known: {error}")],
    }
}

/// Ends all pods that are selected.
async fn end_pods(cluster: &Cluster, selector: &str, grace_seconds: u32) -> Result<(), kube::Error> {
    let parameters = DeleteParams::background().grace_period(grace_seconds);
    let selected = ListParams::default().labels(selector);
    let pods = Request::new(Pod::url_path(&(), Some(cluster.namespace())));
    let mut request = pods.delete_collection(&parameters, &selected).map_err(kube::Error::BuildRequest)?;
    // The answer lists them all, and nobody reads it: 25 MiB for a hundred of them, if they came whole.
    request.headers_mut().insert(ACCEPT, HeaderValue::from_static(METADATA_ONLY));
    cluster.client().request_text(request).await.map(drop)
}

/// Waits until everything is gone, and says what is left at the deadline.
async fn left(
    cluster: &Cluster,
    staying: &[(Named, Api<DynamicObject>)],
    owner: &Named,
    selector: &str,
    deadline: Instant,
) -> Result<Vec<String>, ClusterError> {
    // Pods go last.
    let pods = pods_left(cluster, selector, deadline).await?;
    if !pods.is_empty() {
        return Ok(pods.into_iter().map(|name| format!("the Pod `{name}`")).collect());
    }
    let jobs: Api<Job> = cluster.api();
    let selected = ListParams::default().labels(selector);
    let mut pause = FIRST_PAUSE;
    loop {
        let mut left = Vec::new();
        for (named, api) in staying {
            match cluster.ask_once("look for what is left", api.get_metadata(&named.name)).await {
                Err(error) if error.is_absence() => {}
                Err(error) => left.push(format!("the {} `{}` perhaps ({error})", named.resource.kind, named.name)),
                Ok(_) => left.push(format!("the {} `{}`", named.resource.kind, named.name)),
            }
        }
        if owner.resource.kind != "Job" {
            // There are some that operators have made.
            let list = cluster.ask_until("list the Jobs of a run", deadline, || jobs.list_metadata(&selected)).await?;
            left.extend(list.items.iter().map(|job| format!("the Job `{}`", job.name_any())));
        }
        if left.is_empty() || Instant::now() > deadline {
            return Ok(left);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Waits until no pod is left, and says which are at the deadline.
async fn pods_left(cluster: &Cluster, selector: &str, deadline: Instant) -> Result<BTreeSet<String>, ClusterError> {
    let pods: Api<Pod> = cluster.api();
    let selected = ListParams::default().labels(selector);
    loop {
        let list = cluster.ask_until("list the pods of a run", deadline, || pods.list_metadata(&selected)).await?;
        let mut left: BTreeSet<String> = list.items.iter().map(|pod| pod.name_any()).collect();
        if left.is_empty() || Instant::now() > deadline {
            return Ok(left);
        }
        let watching = async {
            let parameters = WatchParams::default().labels(selector);
            let version = list.metadata.resource_version.unwrap_or_default();
            let Ok(events) = pods.watch_metadata(&parameters, &version).await else { return };
            let mut events = pin!(events);
            while let Some(Ok(event)) = events.next().await {
                match event {
                    WatchEvent::Added(pod) => _ = left.insert(pod.name_any()),
                    WatchEvent::Deleted(pod) => _ = left.remove(&pod.name_any()),
                    WatchEvent::Error(_) => return,
                    WatchEvent::Modified(_) | WatchEvent::Bookmark(_) => {}
                }
                if left.is_empty() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(WATCHED.min(deadline.saturating_duration_since(Instant::now())), watching).await;
        if left.is_empty() {
            return Ok(left);
        }
        // A cluster that ends its watches at once is not to be asked again at once.
        tokio::time::sleep(FIRST_PAUSE).await;
    }
}
