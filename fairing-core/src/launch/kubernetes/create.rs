//! Creating the objects of a run, so that whatever dies in between, all of them go away.
//!
//! The owner is created *held*: it makes no pods, and ends and is removed after a short while. Everything else has an owner
//! reference to it. Then it is *released* with its real deadline. Each request may be repeated, and finds what it has made
//! before.
//!
//! What others have made is never touched: a name that is taken is refused. That is why nothing is applied: server-side apply
//! takes over what there is under a name, whoever has made it, and cannot be told not to. A creation can only fail, and the
//! release names the very object that it changes by its id.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use serde_json::{Value, json};

use super::super::{Cancel, LaunchError};
use super::client::{Cluster, ClusterError};
use super::manifest::{LAUNCH_LABEL, Manifest, Objects};
use super::runs::{self, ClusterRunState};
use super::tidy::{self, Belongings};

/// Who manages the fields of what is created.
pub(super) const MANAGER: &str = "fairing";

/// How long requests that are under way may go on once the launch is cancelled: what they make is easier removed when it is
/// known.
pub(super) const LAST_ANSWERS: Duration = Duration::from_secs(3);

/// How often a launch looks whether it is cancelled.
const TICK: Duration = Duration::from_millis(50);

/// How long the cluster may refuse to create an object because others create some at the same time, of which its quota takes
/// one after the other.
const CONTENDED: Duration = Duration::from_secs(20);

/// The first pause before it is asked again; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// An object by kind and name.
#[derive(Debug, Clone)]
pub(crate) struct Named {
    /// Its kind.
    pub(crate) resource: kube::core::ApiResource,
    /// Its name.
    pub(crate) name: String,
}

/// Creates everything and lets it go. What a launch that breaks off has created is removed, and nothing that others have.
pub(super) async fn launch(cluster: &Cluster, objects: &Objects, cancel: &Cancel) -> Result<Belongings, LaunchError> {
    let mut belongings = Belongings::of(objects);
    let work = async {
        create(cluster, objects, &mut belongings, cancel).await?;
        release(cluster, objects, &belongings, cancel).await
    };
    let done = tokio::select! {
        done = work => Some(done),
        () = given_up(cancel) => None,
    };
    let is_cut = done.is_none();
    let Err(error) = done.unwrap_or(Err(LaunchError::Cancelled)) else { return Ok(belongings) };
    let mut left = tidy::remove(cluster, &belongings, false).await;
    if is_cut && left.is_empty() && belongings.objects.iter().any(|own| own.uid.is_none()) {
        left.push(format!(
            "something of the run `{}` may still appear in the namespace `{}`: the cluster had not answered all requests to \
             create it {} after the interrupt (it goes by itself, at the latest when `launch_timeout` and `ttl` have passed)",
            objects.run,
            cluster.namespace(),
            humantime::format_duration(LAST_ANSWERS)
        ));
    }
    Err(error.leaving(left))
}

/// Creates everything, held, and notes what it is.
async fn create(
    cluster: &Cluster,
    objects: &Objects,
    belongings: &mut Belongings,
    cancel: &Cancel,
) -> Result<(), LaunchError> {
    let mut owner: Option<DynamicObject> = None;
    let (held, rest) = belongings.objects.split_at_mut(objects.held.len());
    for (manifest, own) in objects.held.iter().zip(held) {
        cancel.check()?;
        let object = manifest.owned_by(owner.as_ref().map(reference));
        let created = create_one(cluster, manifest, &object).await?;
        own.uid = created.uid();
        owner = Some(created);
    }
    cancel.check()?;
    let owner = owner.expect("every rendering has an owner");
    belongings.version = owner.resource_version().unwrap_or_default();
    let reference = reference(&owner);
    let creating = objects.rest.iter().zip(rest).map(|(manifest, own)| {
        let object = manifest.owned_by(Some(reference.clone()));
        async move {
            own.uid = create_one(cluster, manifest, &object).await?.uid();
            Ok(())
        }
    });
    // All answers are waited for, so that what is there is known if one of them is a refusal.
    join_all(creating).await.into_iter().collect()
}

/// Lets the owner go, with everything that it owns.
async fn release(
    cluster: &Cluster,
    objects: &Objects,
    belongings: &Belongings,
    cancel: &Cancel,
) -> Result<(), LaunchError> {
    cancel.check()?;
    let mut change = objects.release();
    let held = &belongings.objects[..objects.held.len()];
    // The very object that was created, or none: names may be given again.
    change["metadata"]["uid"] = held.last().and_then(|owner| owner.uid.clone()).into();
    let (api, action) = (api(cluster, &objects.released.resource), format!("release the run `{}`", objects.run));
    let parameters = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
    let patch = Patch::Merge(&change);
    let released = cluster.ask(&action, || api.patch(&objects.released.name, &parameters, &patch)).await;
    let is_given_up = match &released {
        Ok(owner) => {
            matches!(runs::state(owner), ClusterRunState::Failed { .. }) || owner.metadata.deletion_timestamp.is_some()
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
        let same = Preconditions { uid: held[0].uid.clone(), ..Preconditions::default() };
        let parameters = DeleteParams::background().preconditions(same);
        let _ = cluster.ask_once("remove the anchor of a launch", api.delete(&anchor.name, &parameters)).await;
    }
    Ok(())
}

/// Returns when a launch is not wanted any more, and its last requests have had their time.
async fn given_up(cancel: &Cancel) {
    while !cancel.is_set() {
        tokio::time::sleep(TICK).await;
    }
    tokio::time::sleep(LAST_ANSWERS).await;
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
    let create = format!("create the {} `{name}`", resource.kind);
    let look = format!("look at the {} `{name}`", resource.kind);
    let (deadline, mut pause) = (Instant::now() + CONTENDED, FIRST_PAUSE);
    loop {
        let conflict = match cluster.ask(&create, || api.create(&parameters, &object)).await {
            Err(error) if error.is_conflict() => error,
            answer => return answer,
        };
        match cluster.ask(&look, || api.get(name)).await {
            Ok(found) => {
                let launch = found.labels().get(LAUNCH_LABEL).map(String::as_str);
                if launch.is_some() && launch == manifest.launch() {
                    return Ok(found);
                }
                return Err(ClusterError::Taken {
                    kind: resource.kind.clone(),
                    name: name.clone(),
                    namespace: cluster.namespace().to_owned(),
                });
            }
            Err(error) if !error.is_absence() => return Err(error),
            // Nothing has the name: the cluster's account of its quota was about to be changed by somebody else too, most
            // probably by the creation of another object of this run.
            Err(_) if Instant::now() + pause > deadline => return Err(conflict),
            Err(_) => {}
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
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
