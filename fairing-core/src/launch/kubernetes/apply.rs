//! Creating the objects of a run, so that whatever dies in between, all of them go away.
//!
//! The owner is created *held*: it makes no pods, and ends and is removed after a short while. Everything else has an owner
//! reference to it. Then it is *released* with its real deadline. Each request may be repeated, and finds what it has made
//! before. What others have made is never touched: a name that is taken is refused.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, Preconditions};
use serde_json::{Value, json};

use super::super::{Cancel, LaunchError};
use super::client::{Cluster, ClusterError};
use super::manifest::{Manifest, Objects, RUN_LABEL};
use super::runs::{self, ClusterRunState};

/// Who manages the fields of what is created.
pub(super) const MANAGER: &str = "fairing";

/// How long requests that are under way may go on once the launch is cancelled: what they make is easier removed when it is
/// known.
const LAST_ANSWERS: Duration = Duration::from_secs(3);

/// How often a launch looks whether it is cancelled.
const TICK: Duration = Duration::from_millis(50);

/// How long the cluster may be away when a launch is to be undone. It does the same by itself a little later.
const AWAY: Duration = Duration::from_secs(20);

/// How long the cluster may take to remove what a launch had created.
const REMOVED: Duration = Duration::from_secs(30);

/// Seconds that pods get to end, which have not begun to train.
const GRACE_SECONDS: u32 = 1;

/// The first pause between two looks whether it has; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What was created.
#[derive(Debug, Clone)]
pub(crate) struct Applied {
    /// What owns everything else of the run.
    pub(crate) owner: Named,
    /// The version of the cluster's objects before the first pod.
    pub(crate) version: String,
    /// The run.
    pub(crate) run: String,
}

/// An object by kind and name.
#[derive(Debug, Clone)]
pub(crate) struct Named {
    /// Its kind.
    pub(crate) resource: kube::core::ApiResource,
    /// Its name.
    pub(crate) name: String,
}

/// The owner, held, with everything that it owns.
#[derive(Debug)]
pub(super) struct Held {
    owner: DynamicObject,
    /// As it will be.
    pub(super) applied: Applied,
}

/// Creates everything, held.
pub(super) async fn create(cluster: &Cluster, objects: &Objects, cancel: &Cancel) -> Result<Held, LaunchError> {
    unless_cancelled(cancel, async {
        let mut owner: Option<DynamicObject> = None;
        for held in &objects.held {
            cancel.check()?;
            let object = held.owned_by(owner.as_ref().map(reference));
            owner = Some(create_one(cluster, held, &object).await?);
        }
        cancel.check()?;
        let owner = owner.expect("every rendering has an owner");
        let version = owner.resource_version().unwrap_or_default();
        let reference = reference(&owner);
        let rest = objects.rest.iter().map(|manifest| {
            let object = manifest.owned_by(Some(reference.clone()));
            async move { create_one(cluster, manifest, &object).await }
        });
        // All answers are waited for, so that what is there is known if one of them is a refusal.
        join_all(rest).await.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(Held { owner, applied: Applied { owner: objects.released.named(), version, run: objects.run.clone() } })
    })
    .await
}

/// Lets the owner go, with everything that it owns.
pub(super) async fn release(
    cluster: &Cluster,
    objects: &Objects,
    held: &Held,
    cancel: &Cancel,
) -> Result<(), LaunchError> {
    unless_cancelled(cancel, async {
        cancel.check()?;
        let mut change = objects.release();
        // The very object that was created, or none: names may be given again.
        change["metadata"]["uid"] = held.owner.uid().into();
        let (api, action) = (api(cluster, &objects.released.resource), format!("release the run `{}`", objects.run));
        let parameters = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let patch = Patch::Merge(&change);
        let released = cluster.ask(&action, || api.patch(&objects.released.name, &parameters, &patch)).await;
        let is_given_up = match &released {
            Ok(owner) => {
                matches!(runs::state(owner), ClusterRunState::Failed { .. })
                    || owner.metadata.deletion_timestamp.is_some()
            }
            Err(error) => error.is_absence(),
        };
        if is_given_up {
            // The time to launch is over, and the cluster is about to remove what there is.
            let reason = "it took too long to create its objects, and the cluster has given it up (is it overloaded? \
                          `launch_timeout` gives it more time)";
            return Err(ClusterError::Refused { action, reason: reason.to_owned(), status: 0 }.into());
        }
        released?;
        cancel.check()?;
        if let Some(anchor) = &objects.anchor {
            // If it stays it ends by itself, and takes nothing with it.
            let api = self::api(cluster, &anchor.resource);
            let parameters = DeleteParams::background();
            let _ = cluster.ask_once("remove the anchor of a launch", api.delete(&anchor.name, &parameters)).await;
        }
        Ok(())
    })
    .await
}

/// Removes what a launch that broke off has created, and nothing that others have. Returns what is left nevertheless, one thing
/// and its reason a line.
pub(super) async fn undo(cluster: &Cluster, objects: &Objects) -> Vec<String> {
    let deadline = Instant::now() + AWAY;
    let removing = objects.held.iter().chain(&objects.rest).map(|manifest| remove_own(cluster, manifest, deadline));
    let removed: Result<Vec<_>, ClusterError> = join_all(removing).await.into_iter().collect();
    let gone = match removed {
        Ok(removed) => wait_until_gone(cluster, &objects.run, removed.into_iter().flatten().collect()).await,
        Err(error) => Err(error),
    };
    let left = match gone {
        Ok(left) if left.is_empty() => return Vec::new(),
        Ok(left) => format!("not gone within {}: {}", humantime::format_duration(REMOVED), left.join(", ")),
        Err(error) => error.to_string(),
    };
    let (namespace, run) = (cluster.namespace(), &objects.run);
    vec![format!(
        "something of the run `{run}` may be left in the namespace `{namespace}`: {left} (the cluster removes it by itself, at \
         the latest when `launch_timeout` and `ttl` have passed; `fairing_core::delete(\"{run}\")` removes it now)"
    )]
}

/// Has an object removed if this launch has made it. Returns its id then.
async fn remove_own<'a>(
    cluster: &Cluster,
    manifest: &'a Manifest,
    deadline: Instant,
) -> Result<Option<(&'a Manifest, String)>, ClusterError> {
    let api = api(cluster, &manifest.resource);
    let action = format!("look at the {} `{}`", manifest.resource.kind, manifest.name);
    let found = match cluster.ask_until(&action, deadline, || api.get_metadata(&manifest.name)).await {
        Ok(found) => found,
        Err(error) if error.is_absence() => return Ok(None),
        Err(error) => return Err(error),
    };
    let Some(id) = found.metadata.uid.filter(|_| manifest.is_of_the_same_launch(found.metadata.annotations.as_ref()))
    else {
        return Ok(None);
    };
    let same = Preconditions { uid: Some(id.clone()), ..Preconditions::default() };
    let parameters = DeleteParams::background().preconditions(same);
    let action = format!("remove the {} `{}`", manifest.resource.kind, manifest.name);
    match cluster.ask_until(&action, deadline, || api.delete(&manifest.name, &parameters)).await {
        Ok(_) => Ok(Some((manifest, id))),
        // Gone meanwhile, perhaps with another one in its place.
        Err(error) if error.is_absence() || error.is_conflict() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Waits until the objects are gone, and the Jobs and pods that controllers have made for them. Returns what is still there.
async fn wait_until_gone(
    cluster: &Cluster,
    run: &str,
    mut removed: Vec<(&Manifest, String)>,
) -> Result<Vec<String>, ClusterError> {
    let (deadline, mut pause) = (Instant::now() + REMOVED, FIRST_PAUSE);
    let mut owners: BTreeSet<String> = removed.iter().map(|(_, id)| id.clone()).collect();
    let mut ended = BTreeSet::new();
    let (jobs, pods): (Api<Job>, Api<Pod>) = (cluster.api(), cluster.api());
    let selector = ListParams::default().labels(&format!("{RUN_LABEL}={run}"));
    let at_once = DeleteParams::default().grace_period(GRACE_SECONDS);
    while !owners.is_empty() {
        let mut left = Vec::new();
        for (manifest, id) in removed {
            let api = api(cluster, &manifest.resource);
            match cluster.ask_until("look for what is left", deadline, || api.get_metadata(&manifest.name)).await {
                Ok(found) if found.metadata.uid.as_ref() == Some(&id) => left.push((manifest, id)),
                Ok(_) => {}
                Err(error) if error.is_absence() => {}
                Err(error) => return Err(error),
            }
        }
        removed = left;
        let mut names: Vec<String> =
            removed.iter().map(|(manifest, _)| format!("the {} `{}`", manifest.resource.kind, manifest.name)).collect();
        let list = cluster.ask_until("list the Jobs of a run", deadline, || jobs.list_metadata(&selector)).await?;
        let made: Vec<_> = list.items.into_iter().filter(|job| is_owned(&job.metadata, &owners)).collect();
        names.extend(made.iter().map(|job| format!("the Job `{}`", job.name_any())));
        owners.extend(made.iter().filter_map(|job| job.uid()));
        let list = cluster.ask_until("list the pods of a run", deadline, || pods.list_metadata(&selector)).await?;
        for pod in list.items.iter().filter(|pod| is_owned(&pod.metadata, &owners)) {
            let name = pod.name_any();
            if ended.insert(pod.uid()) {
                // The garbage collector would give it all its time. If this fails it does.
                let _ = cluster.ask_once("end a pod", pods.delete(&name, &at_once)).await;
            }
            names.push(format!("the Pod `{name}`"));
        }
        if names.is_empty() || Instant::now() > deadline {
            return Ok(names);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    Ok(Vec::new())
}

/// Whether an object belongs to one with one of these ids.
fn is_owned(metadata: &ObjectMeta, owners: &BTreeSet<String>) -> bool {
    metadata.owner_references.iter().flatten().any(|reference| owners.contains(&reference.uid))
}

/// Does `work`, but not for long once it is not wanted any more.
async fn unless_cancelled<T>(
    cancel: &Cancel,
    work: impl Future<Output = Result<T, LaunchError>>,
) -> Result<T, LaunchError> {
    let cut = async {
        while !cancel.is_set() {
            tokio::time::sleep(TICK).await;
        }
        tokio::time::sleep(LAST_ANSWERS).await;
    };
    tokio::select! {
        done = work => done,
        () = cut => Err(LaunchError::Cancelled),
    }
}

pub(super) fn api(cluster: &Cluster, resource: &kube::core::ApiResource) -> Api<DynamicObject> {
    Api::namespaced_with(cluster.client().clone(), cluster.namespace(), resource)
}

/// Creates an object. One that is there already is as good if this launch has made it, by a request whose answer was lost.
async fn create_one(cluster: &Cluster, manifest: &Manifest, object: &Value) -> Result<DynamicObject, ClusterError> {
    let Manifest { resource, name, .. } = manifest;
    let api = api(cluster, resource);
    let parameters = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
    let object: DynamicObject = serde_json::from_value(object.clone()).expect("every manifest has metadata");
    let action = format!("create the {} `{name}`", resource.kind);
    let error = match cluster.ask(&action, || api.create(&parameters, &object)).await {
        Err(error) if error.is_conflict() => error,
        answer => return answer,
    };
    let action = format!("look at the {} `{name}`", resource.kind);
    match cluster.ask(&action, || api.get(name)).await {
        Ok(found) if manifest.is_of_the_same_launch(found.metadata.annotations.as_ref()) => Ok(found),
        Ok(_) => Err(ClusterError::Taken {
            kind: resource.kind.clone(),
            name: name.clone(),
            namespace: cluster.namespace().to_owned(),
        }),
        Err(absence) if absence.is_absence() => Err(error),
        Err(error) => Err(error),
    }
}

/// The owner reference to an object. It blocks nobody's deletion: that would need a right to the owner's finalizers.
fn reference(owner: &DynamicObject) -> Value {
    let types = owner.types.clone().unwrap_or_default();
    json!({
        "apiVersion": types.api_version,
        "kind": types.kind,
        "name": owner.name_any(),
        "uid": owner.uid().unwrap_or_default(),
    })
}
