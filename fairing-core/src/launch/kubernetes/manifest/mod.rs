//! stub
use super::super::LaunchPlan;
use super::Following;
use super::apply::Named;
use crate::topology::{Address, Topology};
use k8s_openapi::api::core::v1::Pod;
use kube::core::ApiResource;
use serde_json::Value;
use std::time::Duration;
pub(crate) const RUN_LABEL: &str = "fairing.dev/run";
pub(crate) const ROLE_LABEL: &str = "fairing.dev/role";
#[derive(Debug)]
pub(crate) struct Scene;
impl Scene {
    pub(crate) fn following(&self, _: &LaunchPlan) -> Following {
        Following { restarts: true, schedule_timeout: Duration::ZERO, memory: [0, 0], port: 7070 }
    }
}
pub(crate) struct Manifest {
    pub(crate) resource: ApiResource,
    pub(crate) name: String,
    pub(crate) object: Value,
}
impl Manifest {
    pub(crate) fn named(&self) -> Named {
        Named { resource: self.resource.clone(), name: self.name.clone() }
    }
    pub(crate) fn owned_by(&self, owner: Option<Value>) -> Value {
        let mut object = self.object.clone();
        if let Some(owner) = owner {
            object["metadata"]["ownerReferences"] = Value::Array(vec![owner]);
        }
        object
    }
}
pub(crate) struct Objects {
    pub(crate) run: String,
    pub(crate) held: Vec<Manifest>,
    pub(crate) rest: Vec<Manifest>,
    pub(crate) released: Manifest,
    pub(crate) anchor: Option<Manifest>,
}
pub(crate) fn addresses(_: &Scene, _: &str, _: &Topology) -> Vec<Address> {
    Vec::new()
}
pub(crate) fn objects(_: &Scene, _: &LaunchPlan) -> Objects {
    todo!()
}
pub(crate) fn rank_of(_: &Pod) -> Option<u32> {
    None
}
pub(crate) fn fails_the_job(_: i32) -> bool {
    false
}

pub(crate) const RANK_LABEL: &str = "fairing.dev/rank";
pub(crate) const MANAGER_LABEL: (&str, &str) = ("app.kubernetes.io/managed-by", "fairing");
pub(crate) const TYPE_ANNOTATION: &str = "fairing.dev/type";
pub(crate) const USER_ANNOTATION: &str = "fairing.dev/user";
pub(crate) const VALUE_ANNOTATION: &str = "fairing.dev/value-sha256";
pub(crate) const IDENTITY_KEY: &str = "identity";
pub(crate) struct Note {
    pub(crate) placements: Vec<crate::topology::Placement>,
    pub(crate) following: Following,
    pub(crate) extension: String,
}
pub(crate) fn note(_: &kube::api::DynamicObject) -> Option<Note> {
    None
}
pub(crate) fn caller_secret(run: &str) -> String {
    format!("{run}-caller")
}
pub(crate) fn owner_kinds() -> Vec<ApiResource> {
    Vec::new()
}
pub(crate) fn companions(_: &str) -> Vec<Named> {
    Vec::new()
}
