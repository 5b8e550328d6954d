//! A TFJob of Kubeflow's training operator, for clusters on which that is how people train.
//!
//! What the operator does was read in its version 1.8.1.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::{ApiResource, GroupVersionKind};
use serde::Serialize;

use super::super::super::LaunchPlan;
use super::jobs::seconds;
use super::jobset::anchor;
use super::shared::{annotations, metadata, secrets};
use super::{Manifest, Objects, Scene, pod};
use crate::topology::Role;

const API_VERSION: &str = "kubeflow.org/v1";
const KIND: &str = "TFJob";

/// What fairing says of a TFJob, as its version v1 spells it.
#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct TfJob {
    api_version: &'static str,
    kind: &'static str,
    metadata: ObjectMeta,
    spec: TfJobSpec,
}

#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct TfJobSpec {
    run_policy: RunPolicy,
    success_policy: &'static str,
    enable_dynamic_worker: bool,
    tf_replica_specs: BTreeMap<&'static str, ReplicaSpec>,
}

#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct RunPolicy {
    clean_pod_policy: &'static str,
    ttl_seconds_after_finished: i32,
    active_deadline_seconds: i64,
    suspend: bool,
}

#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct ReplicaSpec {
    replicas: u32,
    restart_policy: &'static str,
    template: PodTemplateSpec,
}

pub(super) fn objects(scene: &Scene, plan: &LaunchPlan) -> Objects {
    let topology = plan.placements[0].topology;
    let placement = pod::of_role(plan, Role::Worker);
    let restarts = !placement.rejoin.is_zero();
    let deadline: i64 = seconds(scene.owner_deadline()).into();
    let replicas = |role: Role| match role {
        // What a server knows is lost with it.
        Role::Ps => ("PS", topology.ps, "Never"),
        // `ExitCode` starts a worker again that a signal has ended (128 and up, so 143 too), or whose pod is gone, and fails
        // the TFJob at once for any other code but 0. A worker that waited in vain for a peer (71) fails it too; there is no
        // finer rule.
        Role::Worker => ("Worker", topology.workers.get(), if restarts { "ExitCode" } else { "Never" }),
    };
    let specs = [Role::Ps, Role::Worker].map(|role| (role, replicas(role)));
    let specs = specs.into_iter().filter(|(_, (_, replicas, _))| *replicas > 0);
    let specs = specs.map(|(role, (name, replicas, restart_policy))| {
        let mut template = pod::template(scene, plan, role);
        if let Some(spec) = &mut template.spec {
            // The operator looks at the deadline of a TFJob only when something else happens to it. That a pod ends does.
            spec.active_deadline_seconds = Some(deadline);
        }
        (name, ReplicaSpec { replicas, restart_policy, template })
    });
    let tf_job = TfJob {
        api_version: API_VERSION,
        kind: KIND,
        metadata: ObjectMeta {
            annotations: Some(annotations(scene, plan)),
            ..metadata(scene, plan, plan.run.clone(), None)
        },
        spec: TfJobSpec {
            run_policy: RunPolicy {
                // What still runs when the TFJob ends is ended; what has ended can be read.
                clean_pod_policy: "Running",
                ttl_seconds_after_finished: seconds(scene.settings.ttl),
                active_deadline_seconds: deadline,
                // No `backoffLimit`: the operator counts restarts of containers, of which its pods have none, and failures
                // of its own requests, so that a busy API server could end a run. The coordinator bounds the returns.
                suspend: false,
            },
            // The default: the end of worker 0, which the coordinator releases last, is the end of the TFJob. `AllWorkers` would
            // wait until the deadline for one that is lost.
            success_policy: "",
            // Without it a pod that is being deleted counts as failed, and the TFJob fails before the pod's successor comes,
            // where the others get on without it, or before the coordinator has said who was lost. If the coordinator is a
            // worker itself, its own failure is to end the TFJob. What it changes besides is TF_CONFIG, which these replicas do
            // not read.
            enable_dynamic_worker: restarts || !placement.mode.is_sync() || topology.ps > 0,
            tf_replica_specs: specs.collect(),
        },
    };
    let manifest = |tf_job: &TfJob| {
        let kind = GroupVersionKind::gvk("kubeflow.org", "v1", KIND);
        Manifest::new(ApiResource::from_gvk_with_plural(&kind, "tfjobs"), plan.run.clone(), tf_job)
    };
    let mut suspended = tf_job.clone();
    suspended.spec.run_policy.suspend = true;
    let anchor = anchor(scene, plan);
    Objects {
        run: plan.run.clone(),
        held: vec![anchor.clone(), manifest(&suspended)],
        rest: secrets(scene, plan).into(),
        released: manifest(&tf_job),
        anchor: Some(anchor),
    }
}
