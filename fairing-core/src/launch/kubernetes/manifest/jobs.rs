//! Jobs alone: nothing has to be installed. `RUN-ps` and `RUN-worker` are Indexed Jobs, and the one whose pods host the
//! coordinator is the owner of everything.

use std::time::Duration;

use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyOnPodConditionsPattern,
    PodFailurePolicyRule,
};

use super::super::super::LaunchPlan;
use super::shared::{annotations, metadata, secrets, service};
use super::{HOPELESS, Manifest, Objects, Scene, pod};
use crate::topology::Role;

/// How often one worker is started again, not counting what the cluster took away itself: a machine with a fault is named
/// before it has cost an hour.
const RESTARTS: i32 = 3;

/// A worker that ended because it was told to, by the deletion of its pod.
const TERMINATED: i32 = 143;

pub(super) fn objects(scene: &Scene, plan: &LaunchPlan) -> Objects {
    let topology = plan.placements[0].topology;
    let owner = topology.coordinator().role;
    let deadline = if owner == Role::Ps { scene.settings.deadline } else { scene.owner_deadline() };
    let workers = job(scene, plan, Role::Worker, deadline);
    let [secret, caller] = secrets(scene, plan);
    let mut rest = vec![secret, caller, service(scene, plan)];
    let owner = if owner == Role::Ps {
        rest.push(Manifest::of(&workers));
        job(scene, plan, Role::Ps, scene.owner_deadline())
    } else {
        workers
    };
    let owner = owned_by_itself(scene, plan, owner);
    Objects {
        run: plan.run.clone(),
        held: vec![Manifest::of(&held(scene, owner.clone()))],
        rest,
        released: Manifest::of(&owner),
        anchor: None,
    }
}

/// The Job of one role.
fn job(scene: &Scene, plan: &LaunchPlan, role: Role, deadline: Duration) -> Job {
    Job {
        metadata: metadata(scene, plan, format!("{}-{role}", plan.run), Some(role)),
        spec: Some(spec(scene, plan, role, deadline)),
        ..Job::default()
    }
}

/// The owner goes by itself, and takes the rest with it; the rest has no time of its own, so that logs stay as long.
fn owned_by_itself(scene: &Scene, plan: &LaunchPlan, mut owner: Job) -> Job {
    owner.metadata.annotations = Some(annotations(scene, plan));
    if let Some(spec) = &mut owner.spec {
        spec.ttl_seconds_after_finished = Some(seconds(scene.settings.ttl));
    }
    owner
}

/// A Job that makes no pods and fails after a short while. A suspended one would stay for ever: it never ends.
pub(super) fn held(scene: &Scene, mut job: Job) -> Job {
    if let Some(spec) = &mut job.spec {
        spec.parallelism = Some(0);
        spec.active_deadline_seconds = Some(seconds(scene.settings.launch_timeout).into());
    }
    job
}

/// Whole seconds, of which the configuration lets no more pass than there are in a year.
pub(super) fn seconds(time: Duration) -> i32 {
    i32::try_from(time.as_secs()).unwrap_or(i32::MAX)
}

pub(super) fn spec(scene: &Scene, plan: &LaunchPlan, role: Role, deadline: Duration) -> JobSpec {
    let topology = plan.placements[0].topology;
    let count = match role {
        Role::Worker => topology.workers.get(),
        Role::Ps => topology.ps,
    };
    let count = i32::try_from(count).unwrap_or(i32::MAX);
    let spec = JobSpec {
        completion_mode: Some("Indexed".to_owned()),
        completions: Some(count),
        parallelism: Some(count),
        active_deadline_seconds: Some(i64::from(seconds(deadline))),
        // A replica that is on its way out still has its identity; its successor comes when it is gone.
        pod_replacement_policy: Some("Failed".to_owned()),
        template: pod::template(scene, plan, role),
        ..JobSpec::default()
    };
    match role {
        // What a server knows is lost with it.
        Role::Ps => JobSpec { backoff_limit: Some(0), ..spec },
        Role::Worker => {
            let placement = pod::of_role(plan, role);
            let restarts = !placement.rejoin.is_zero();
            JobSpec {
                backoff_limit_per_index: Some(if restarts { RESTARTS } else { 0 }),
                // In sync mode nobody gets on without a worker that is lost for good. In async mode the others do, and its
                // Job lets them; how the run ends is the coordinator's to say.
                max_failed_indexes: Some(if placement.mode.is_sync() { 0 } else { count }),
                pod_failure_policy: Some(PodFailurePolicy { rules: failure_rules(scene, restarts) }),
                ..spec
            }
        }
    }
}

/// What the end of a worker's pod means, the first rule that applies. What none is about counts for the worker's index.
fn failure_rules(scene: &Scene, restarts: bool) -> Vec<PodFailurePolicyRule> {
    let on_codes = |action: &str, values: Vec<i32>| PodFailurePolicyRule {
        action: action.to_owned(),
        on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
            container_name: Some(scene.format.container().to_owned()),
            operator: "In".to_owned(),
            values,
        }),
        on_pod_conditions: None,
    };
    let disrupted = PodFailurePolicyRule {
        action: "Ignore".to_owned(),
        on_exit_codes: None,
        on_pod_conditions: Some(vec![PodFailurePolicyOnPodConditionsPattern {
            type_: "DisruptionTarget".to_owned(),
            status: Some("True".to_owned()),
        }]),
    };
    // Without `rejoin` nobody waits for a successor, whyever the worker went.
    let ignored = restarts.then(|| [disrupted, on_codes("Ignore", vec![TERMINATED])]);
    let hopeless = on_codes("FailJob", HOPELESS.map(|known| known.code().into()).into());
    ignored.into_iter().flatten().chain([hopeless]).collect()
}
