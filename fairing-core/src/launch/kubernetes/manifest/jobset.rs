//! A JobSet: one object for both roles, which queues such as Kueue admit as a whole.

use k8s_openapi::api::batch::v1::{Job, JobSpec, JobTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::{ApiResource, GroupVersionKind};
use serde::Serialize;

use super::super::super::LaunchPlan;
use super::jobs::{held, seconds, spec};
use super::shared::{annotations, labels, metadata, secrets};
use super::{Manifest, Objects, Scene, pod};
use crate::topology::Role;

const API_VERSION: &str = "jobset.x-k8s.io/v1alpha2";
const KIND: &str = "JobSet";

/// What fairing says of a JobSet, as its version v1alpha2 spells it.
#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct JobSet {
    api_version: &'static str,
    kind: &'static str,
    metadata: ObjectMeta,
    spec: JobSetSpec,
}

#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct JobSetSpec {
    suspend: bool,
    ttl_seconds_after_finished: i32,
    network: Network,
    failure_policy: FailurePolicy,
    success_policy: SuccessPolicy,
    replicated_jobs: Vec<ReplicatedJob>,
}

#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct Network {
    #[serde(rename = "enableDNSHostnames")]
    enable_dns_hostnames: bool,
    subdomain: String,
    publish_not_ready_addresses: bool,
}

#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct FailurePolicy {
    max_restarts: i32,
}

#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct SuccessPolicy {
    operator: &'static str,
}

#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct ReplicatedJob {
    name: String,
    replicas: i32,
    template: JobTemplateSpec,
}

pub(super) fn objects(scene: &Scene, plan: &LaunchPlan) -> Objects {
    let topology = plan.placements[0].topology;
    let owner = topology.coordinator().role;
    let roles = [(Role::Ps, topology.ps), (Role::Worker, topology.workers.get())];
    let replicated_job = |role: Role| {
        let deadline = if owner == role { scene.owner_deadline() } else { scene.settings.deadline };
        // The labels are those of the Job that the controller makes; a watch knows its role by them.
        let metadata = ObjectMeta { labels: Some(labels(scene, plan, Some(role))), ..ObjectMeta::default() };
        ReplicatedJob {
            name: role.to_string(),
            replicas: 1,
            // A lost worker comes back within its Job, by the same rules as without a JobSet.
            template: JobTemplateSpec { metadata: Some(metadata), spec: Some(spec(scene, plan, role, deadline)) },
        }
    };
    let job_set = JobSet {
        api_version: API_VERSION,
        kind: KIND,
        metadata: ObjectMeta {
            annotations: Some(annotations(scene, plan)),
            ..metadata(scene, plan, plan.run.clone(), None)
        },
        spec: JobSetSpec {
            suspend: false,
            ttl_seconds_after_finished: seconds(scene.settings.ttl),
            // The controller makes the Service of that name.
            network: Network {
                enable_dns_hostnames: true,
                subdomain: plan.run.clone(),
                publish_not_ready_addresses: true,
            },
            // All Jobs again, from nothing, is another run: what the servers knew would be lost.
            failure_policy: FailurePolicy { max_restarts: 0 },
            // Not the workers alone: at their end the controller would remove the server that keeps the result.
            success_policy: SuccessPolicy { operator: "All" },
            replicated_jobs: roles
                .into_iter()
                .filter(|(_, count)| *count > 0)
                .map(|(role, _)| replicated_job(role))
                .collect(),
        },
    };
    let manifest = |job_set: &JobSet| {
        let kind = GroupVersionKind::gvk("jobset.x-k8s.io", "v1alpha2", KIND);
        Manifest::new(ApiResource::from_gvk_with_plural(&kind, "jobsets"), plan.run.clone(), job_set)
    };
    let mut suspended = job_set.clone();
    suspended.spec.suspend = true;
    let anchor = anchor(scene, plan);
    Objects {
        run: plan.run.clone(),
        held: vec![anchor.clone(), manifest(&suspended)],
        rest: secrets(scene, plan).into(),
        released: manifest(&job_set),
        anchor: Some(anchor),
    }
}

/// A Job that makes no pods and goes away by itself: a suspended object has no end, and is held by the one of this.
///
/// The release drops the reference to it, and from then on it takes nothing with it.
pub(super) fn anchor(scene: &Scene, plan: &LaunchPlan) -> Manifest {
    // The cluster wants to know how the pod looks that never is, and its policies what a Job may make.
    let mut template = pod::template(scene, plan, plan.placements[0].topology.coordinator().role);
    if let Some(spec) = &mut template.spec {
        spec.restart_policy = Some("Never".to_owned());
    }
    let spec = JobSpec {
        completions: Some(1),
        backoff_limit: Some(0),
        ttl_seconds_after_finished: Some(seconds(scene.settings.ttl)),
        template,
        ..JobSpec::default()
    };
    let metadata = metadata(scene, plan, format!("{}-launch", plan.run), None);
    Manifest::of(&held(scene, Job { metadata, spec: Some(spec), status: None }))
}
