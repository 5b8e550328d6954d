//! Removing everything of a run, and looking that it is gone.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, ListParams};

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

/// Seconds that pods get to end: they have had their time before.
const GRACE_SECONDS: u32 = 1;

/// Removes a run's objects and waits until they are gone. Returns what is left nevertheless, one thing and its reason a line.
///
/// The owner would take all with it; asking for each spares the wait for the cluster's garbage collector.
pub(super) async fn remove(cluster: &Cluster, applied: &Applied) -> Vec<String> {
    let deadline = Instant::now() + AWAY;
    let Applied { owner, run, .. } = applied;
    // The API's default for Jobs leaves their pods behind.
    let parameters = DeleteParams::background();
    let named = std::iter::once(owner.clone()).chain(scene::companions(run, owner));
    let named: Vec<(Named, Api<DynamicObject>)> =
        named.map(|named| (named.clone(), api(cluster, &named.resource))).collect();
    let deleting = named.iter().map(|(named, api)| {
        let parameters = &parameters;
        let action = format!("remove the {} `{}`", named.resource.kind, named.name);
        async move { cluster.ask_until(&action, deadline, || api.delete(&named.name, parameters)).await.map(drop) }
    });
    let selector = ListParams::default().labels(&format!("{RUN_LABEL}={run}"));
    let pods: Api<Pod> = cluster.api();
    let ending = async {
        let parameters = DeleteParams::background().grace_period(GRACE_SECONDS);
        let end = || pods.delete_collection(&parameters, &selector);
        cluster.ask_until("end the pods of a run", deadline, end).await.map(drop)
    };
    let (deleted, ended) = tokio::join!(join_all(deleting), ending);
    let failed: Vec<ClusterError> =
        deleted.into_iter().chain([ended]).filter_map(Result::err).filter(|error| !error.is_absence()).collect();
    if let Some(error) = failed.first() {
        return vec![format!(
            "something of the run `{run}` is left in the namespace `{}`: {error} (it ends and is removed by itself, at the \
             latest when its deadline has passed; `fairing_core::delete(\"{run}\")` removes it now)",
            cluster.namespace()
        )];
    }
    wait_until_gone(cluster, &named, run, &selector).await
}

async fn wait_until_gone(
    cluster: &Cluster,
    named: &[(Named, Api<DynamicObject>)],
    run: &str,
    selector: &ListParams,
) -> Vec<String> {
    let deadline = Instant::now() + REMOVED;
    let mut pause = FIRST_PAUSE;
    let (jobs, pods): (Api<Job>, Api<Pod>) = (cluster.api(), cluster.api());
    let unknown = |error: ClusterError| vec![format!("whether the run `{run}` is gone is not known: {error}")];
    loop {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
        let list = cluster.ask_until("list the pods of a run", deadline, || pods.list_metadata(selector)).await;
        let mut left = match list {
            Ok(list) => list.items.iter().map(|pod| format!("the Pod `{}`", name(&pod.metadata))).collect::<Vec<_>>(),
            Err(error) => return unknown(error),
        };
        if left.is_empty() {
            // Pods go last; the others need one look. Of Jobs there may be some that operators have made.
            match cluster.ask_until("list the Jobs of a run", deadline, || jobs.list_metadata(selector)).await {
                Ok(list) => left.extend(list.items.iter().map(|job| format!("the Job `{}`", name(&job.metadata)))),
                Err(error) => return unknown(error),
            }
            for (named, api) in named.iter().filter(|(named, _)| named.resource.kind != "Job") {
                match cluster.ask_once("look for what is left", api.get_metadata(&named.name)).await {
                    Err(error) if error.is_absence() => {}
                    Err(error) => left.push(format!("the {} `{}` perhaps ({error})", named.resource.kind, named.name)),
                    Ok(_) => left.push(format!("the {} `{}`", named.resource.kind, named.name)),
                }
            }
        }
        if left.is_empty() {
            return Vec::new();
        }
        if Instant::now() > deadline {
            let within = humantime::format_duration(REMOVED);
            return vec![format!("not gone within {within}, though it is being removed: {}", left.join(", "))];
        }
    }
}

fn name(metadata: &kube::core::ObjectMeta) -> &str {
    metadata.name.as_deref().unwrap_or_default()
}
