//! Creating the objects of a run, so that whatever dies in between, all of them go away.
//!
//! The owner is created *held*: it makes no pods, and ends and is removed after a short while. Everything else has an owner
//! reference to it. Then it is *released* with its real deadline. Each step may be repeated: a second launch of the same run
//! finds its objects.

use futures_util::future::try_join_all;
use kube::ResourceExt as _;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use serde_json::Value;

use super::client::{Cluster, ClusterError};
use super::manifest::{Manifest, Objects};
use super::runs::{self, ClusterRunState};

/// Who manages the fields of what is applied.
pub(super) const MANAGER: &str = "fairing";

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

/// Creates everything and releases it.
pub(super) async fn apply(cluster: &Cluster, objects: &Objects) -> Result<Applied, ClusterError> {
    let mut owner: Option<DynamicObject> = None;
    for held in &objects.held {
        let object = held.owned_by(owner.as_ref().map(reference));
        owner = Some(apply_one(cluster, held, &object).await?);
    }
    let owner = owner.expect("every rendering has an owner");
    let version = owner.resource_version().unwrap_or_default();
    let reference = reference(&owner);
    let rest = objects.rest.iter().map(|manifest| {
        let object = manifest.owned_by(Some(reference.clone()));
        async move { apply_one(cluster, manifest, &object).await }
    });
    try_join_all(rest).await?;
    let mut released = objects.released.object.clone();
    // Applying creates what is not there. An owner that the cluster has removed meanwhile, with all that it owned, is not to
    // come back alone: an object that is named by its id is the one that there was, or a conflict.
    released["metadata"]["uid"] = owner.uid().into();
    let released = apply_one(cluster, &objects.released, &released).await?;
    if matches!(runs::state(&released), ClusterRunState::Failed { .. })
        || released.metadata.deletion_timestamp.is_some()
    {
        // The time to launch is over, and the cluster is about to remove what there is.
        return Err(ClusterError::Refused {
            action: format!("release the run `{}`", objects.run),
            reason: "it took too long to create its objects, and the cluster has given it up (is it overloaded?)"
                .to_owned(),
            status: 0,
        });
    }
    if let Some(anchor) = &objects.anchor {
        // If it stays it ends by itself, and takes nothing with it.
        let api = api(cluster, &anchor.resource);
        let parameters = kube::api::DeleteParams::background();
        let _ = cluster.ask("remove the anchor of a launch", || api.delete(&anchor.name, &parameters)).await;
    }
    Ok(Applied { owner: objects.released.named(), version, run: objects.run.clone() })
}

pub(super) fn api(cluster: &Cluster, resource: &kube::core::ApiResource) -> Api<DynamicObject> {
    Api::namespaced_with(cluster.client().clone(), cluster.namespace(), resource)
}

async fn apply_one(cluster: &Cluster, manifest: &Manifest, object: &Value) -> Result<DynamicObject, ClusterError> {
    let api = api(cluster, &manifest.resource);
    let parameters = PatchParams::apply(MANAGER).force();
    let patch = Patch::Apply(object);
    let action = format!("create the {} `{}`", manifest.resource.kind, manifest.name);
    cluster.ask(&action, || api.patch(&manifest.name, &parameters, &patch)).await
}

/// The owner reference to an object. It blocks nobody's deletion: that would need a right to the owner's finalizers.
fn reference(owner: &DynamicObject) -> Value {
    let types = owner.types.clone().unwrap_or_default();
    serde_json::json!({
        "apiVersion": types.api_version,
        "kind": types.kind,
        "name": owner.name_any(),
        "uid": owner.uid().unwrap_or_default(),
    })
}
