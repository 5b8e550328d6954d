//! What a run on a cluster consists of, as values. Performs no IO, looks at no clock, draws nothing at random.
//!
//! ```text
//! pod      the pods of a role: closed by default, with what the settings say
//! shared   Secrets, Service, labels and annotations: the same in every rendering
//! jobs     the renderings: Jobs alone, a JobSet, a TFJob
//! jobset
//! tfjob
//! rights   what all of it takes, as a Role
//! ```
//!
//! A [`Scene`] and a [`LaunchPlan`] make [`Objects`]: the *held* ones, of which the last is the owner of the rest, and the
//! *released* one. The held owner runs nothing, and ends and goes away after a short while, whoever is left to see to it
//! (see `create`).

mod jobs;
mod jobset;
mod pod;
mod rights;
mod shared;
mod tfjob;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::api::rbac::v1::PolicyRule;
use kube::ResourceExt as _;
use kube::core::{ApiResource, Resource};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::super::LaunchPlan;
use super::Following;
use super::create::Named;
use crate::config::{KubernetesSettings, Renderer, Resources};
use crate::exit::ExitCode;
use crate::topology::{Address, Mode, Replica, Role, Topology};

pub(crate) use rights::role;
pub(crate) use shared::value_hash;

/// The label of everything of a run, with its name.
pub(crate) const RUN_LABEL: &str = "fairing.dev/run";
/// The label of what belongs to one role, `worker` or `ps`.
pub(crate) const ROLE_LABEL: &str = "fairing.dev/role";
/// The label of everything of the runs of one type, with the type's name as far as a label takes it.
pub(crate) const JOB_LABEL: &str = "fairing.dev/job";
/// The label by which tools find who looks after an object, and fairing its own.
pub(crate) const MANAGER_LABEL: (&str, &str) = ("app.kubernetes.io/managed-by", "fairing");

/// The annotation of a run's owner with the hash of the value that it trains with.
pub(crate) const VALUE_ANNOTATION: &str = "fairing.dev/value-sha256";
/// The label of everything that a launch creates, pods included, by which it is known from what others have: nobody else can
/// know beforehand what it is.
pub(crate) const LAUNCH_LABEL: &str = "fairing.dev/launch";
/// The annotation of a run's owner with [`Known`].
pub(crate) const PLAN_ANNOTATION: &str = "fairing.dev/plan";

/// The port on which replicas that host parameters listen.
const PORT: u16 = 7070;

/// Most bytes of the value that a run trains with: a Secret takes 1 MiB, and each replica's identity takes one kilobyte of it.
pub(crate) const MAX_VALUE_BYTES: usize = 512 << 10;

/// What is the same for all objects of a launch.
#[derive(Debug, Clone)]
pub(crate) struct Scene {
    /// How the objects look.
    pub(crate) format: Format,
    /// The image that the pods run, by digest.
    pub(crate) image: String,
    /// What the user wants of the cluster.
    pub(crate) settings: KubernetesSettings,
    /// What a worker asks for.
    pub(crate) worker: Resources,
    /// What a parameter server asks for.
    pub(crate) ps: Resources,
    /// Where the program comes from.
    pub(crate) provenance: Provenance,
}

/// The kind of objects that run the replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Format {
    /// An Indexed Job for each role.
    Jobs,
    /// A JobSet with one Job for each role.
    JobSet,
    /// A TFJob.
    TfJob,
}

/// Where a program comes from: for people, and for whoever looks for a run of the same type.
#[derive(Debug, Clone, Default)]
pub(crate) struct Provenance {
    /// `module_path::Type`.
    pub(crate) type_name: String,
    /// The extension of the model's file.
    pub(crate) extension: String,
    /// The commit of the program's sources.
    pub(crate) commit: Option<String>,
    /// Who launched it.
    pub(crate) user: Option<String>,
}

/// What somebody who comes later has to know of a run, in an annotation of its owner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Known {
    /// How its objects look.
    pub(crate) format: Format,
    /// Who takes part.
    pub(crate) topology: Topology,
    /// Where the servers listen, in the order of their shares.
    pub(crate) servers: Vec<String>,
    /// When gradients are applied.
    pub(crate) mode: Mode,
    /// The seed of all that is random.
    pub(crate) seed: u64,
    /// How long a lost worker is waited for, in milliseconds.
    pub(crate) rejoin_ms: u64,
    /// How long the replicas wait for each other at the beginning, in seconds.
    pub(crate) join_s: u64,
    /// How long a pod may be without a node, in seconds.
    pub(crate) schedule_timeout_s: u64,
    /// How long the run may take, in seconds.
    pub(crate) deadline_s: u64,
    /// How long the result is kept, in seconds.
    pub(crate) keep_result_s: u64,
    /// Bytes of memory of a worker and of a server.
    pub(crate) memory: [u64; 2],
    /// `module_path::Type`.
    pub(crate) type_name: String,
    /// The extension of the model's file.
    pub(crate) extension: String,
}

/// An object to be created, without the reference to its owner.
#[derive(Debug, Clone)]
pub(crate) struct Manifest {
    pub(crate) resource: ApiResource,
    pub(crate) name: String,
    pub(crate) object: Value,
}

/// All objects of a run.
#[derive(Debug, Clone)]
pub(crate) struct Objects {
    pub(crate) run: String,
    /// In their order; each is the owner of the next one, and the last one of the rest.
    pub(crate) held: Vec<Manifest>,
    /// What the owner takes with it.
    pub(crate) rest: Vec<Manifest>,
    /// The owner as it is once everything is there, owned by nobody.
    pub(crate) released: Manifest,
    /// What only held the owner and is not needed any more.
    pub(crate) anchor: Option<Manifest>,
}

impl Objects {
    /// What has to be changed of the held owner so that it becomes the released one, as a merge patch. No more than that: what
    /// the cluster's policies have added to the rest stays.
    pub(crate) fn release(&self) -> Value {
        let held = self.held.last().expect("every rendering has an owner");
        let mut change = difference(&held.object, &self.released.object);
        if self.anchor.is_some() {
            change["metadata"] = json!({ "ownerReferences": null });
        }
        change
    }
}

/// The merge patch that makes `to` of `from`, which has every field of `to` and no others.
fn difference(from: &Value, to: &Value) -> Value {
    let (Value::Object(from), Value::Object(to)) = (from, to) else { return to.clone() };
    let changed = to.iter().filter(|(key, value)| from.get(*key) != Some(*value));
    changed.map(|(key, value)| (key.clone(), difference(from.get(key).unwrap_or(&Value::Null), value))).collect()
}

impl Format {
    /// The format that the settings ask for; `has_job_sets` says whether the cluster serves JobSets.
    pub(crate) fn of(renderer: Renderer, has_job_sets: bool) -> Self {
        match renderer {
            Renderer::Jobs => Format::Jobs,
            Renderer::JobSet => Format::JobSet,
            Renderer::TfJob => Format::TfJob,
            Renderer::Auto if has_job_sets => Format::JobSet,
            Renderer::Auto => Format::Jobs,
        }
    }

    /// The container that trains.
    fn container(self) -> &'static str {
        match self {
            Format::Jobs | Format::JobSet => "fairing",
            // The operator looks at the exit code of the container that has this name.
            Format::TfJob => "tensorflow",
        }
    }

    /// What an index says in a pod, as a field of the pod.
    fn rank_field(self) -> String {
        match self {
            Format::Jobs | Format::JobSet => format!("metadata.annotations['{INDEX_ANNOTATION}']"),
            Format::TfJob => format!("metadata.labels['{INDEX_LABEL}']"),
        }
    }
}

/// The annotation in which an Indexed Job says which of its pods one is.
const INDEX_ANNOTATION: &str = "batch.kubernetes.io/job-completion-index";
/// The label in which Kubeflow's operator does.
const INDEX_LABEL: &str = "training.kubeflow.org/replica-index";

impl Scene {
    /// What matters to those who follow the run.
    pub(crate) fn following(&self, plan: &LaunchPlan) -> Following {
        self.known(plan).following()
    }

    /// What whoever comes later has to know.
    fn known(&self, plan: &LaunchPlan) -> Known {
        let placement = &plan.placements[0];
        let settings = &self.settings;
        Known {
            format: self.format,
            topology: placement.topology,
            servers: placement.servers.iter().map(Address::to_string).collect(),
            mode: placement.mode,
            seed: placement.seed,
            rejoin_ms: u64::try_from(placement.rejoin.as_millis()).unwrap_or(u64::MAX),
            join_s: placement.join.as_secs(),
            schedule_timeout_s: settings.schedule_timeout.as_secs(),
            deadline_s: settings.deadline.as_secs(),
            keep_result_s: settings.keep_result.as_secs(),
            memory: [Role::Worker, Role::Ps].map(|role| pod::memory_bytes(self, role)),
            type_name: self.provenance.type_name.clone(),
            extension: self.provenance.extension.clone(),
        }
    }

    fn resources(&self, role: Role) -> &Resources {
        match role {
            Role::Worker => &self.worker,
            Role::Ps => &self.ps,
        }
    }

    /// The owner's real deadline: nothing ends a coordinator that keeps a result for its caller.
    fn owner_deadline(&self) -> Duration {
        self.settings.deadline + self.settings.keep_result
    }
}

impl Known {
    /// What the annotations of a run's owner say of it, if that can be read.
    pub(crate) fn read(annotations: &BTreeMap<String, String>) -> Option<Self> {
        serde_json::from_str(annotations.get(PLAN_ANNOTATION)?).ok()
    }

    /// What matters to those who follow the run.
    pub(crate) fn following(&self) -> Following {
        Following {
            format: self.format,
            restarts: self.rejoin_ms > 0,
            is_sync: self.mode.is_sync(),
            schedule_timeout: Duration::from_secs(self.schedule_timeout_s),
            deadline: Duration::from_secs(self.deadline_s),
            memory: self.memory,
            port: PORT,
        }
    }
}

impl Manifest {
    /// Of an object that Kubernetes itself has.
    fn of<K: Resource<DynamicType = ()> + Serialize>(object: &K) -> Self {
        Self::new(ApiResource::erase::<K>(&()), object.name_any(), object)
    }

    fn new(resource: ApiResource, name: String, object: &impl Serialize) -> Self {
        let object = serde_json::to_value(object).expect("objects have text keys only");
        Self { resource, name, object }
    }

    pub(crate) fn named(&self) -> Named {
        Named { resource: self.resource.clone(), name: self.name.clone() }
    }

    /// The launch that it is of; none in a dry run.
    pub(crate) fn launch(&self) -> Option<&str> {
        self.object["metadata"]["labels"][LAUNCH_LABEL].as_str()
    }

    /// The object with a reference to its owner.
    pub(crate) fn owned_by(&self, owner: Option<Value>) -> Value {
        let mut object = self.object.clone();
        if let Some(owner) = owner {
            object["metadata"]["ownerReferences"] = Value::Array(vec![owner]);
        }
        object
    }
}

/// Where the servers of `run` listen, in the order of their shares: names that the cluster's DNS knows.
pub(crate) fn addresses(scene: &Scene, run: &str, topology: &Topology) -> Vec<Address> {
    let host = |server: Replica| match scene.format {
        Format::Jobs => format!("{run}-{}.{run}", server.file_name()),
        // Of each role there is one Job, number 0.
        Format::JobSet => format!("{run}-{}-0-{}.{run}", server.role, server.rank),
        // The operator gives each replica a Service of its name.
        Format::TfJob => format!("{run}-{}", server.file_name()),
    };
    topology.servers().map(|server| Address::Tls { server, host: host(server), port: PORT }).collect()
}

/// Everything that runs `plan`.
pub(crate) fn objects(scene: &Scene, plan: &LaunchPlan) -> Objects {
    match scene.format {
        Format::Jobs => jobs::objects(scene, plan),
        Format::JobSet => jobset::objects(scene, plan),
        Format::TfJob => tfjob::objects(scene, plan),
    }
}

/// The pods of each role, and how many of them there are.
pub(crate) fn pods(scene: &Scene, plan: &LaunchPlan) -> Vec<(Role, u32, PodTemplateSpec)> {
    let topology = plan.placements[0].topology;
    let roles = [(Role::Ps, topology.ps), (Role::Worker, topology.workers.get())];
    let present = roles.into_iter().filter(|(_, count)| *count > 0);
    present.map(|(role, count)| (role, count, pod::template(scene, plan, role))).collect()
}

/// What a launch and those who follow it must be allowed to do in the namespace.
pub(crate) fn rules(scene: &Scene) -> Vec<PolicyRule> {
    rights::rules(scene.format)
}

/// All objects as YAML for a person, without the contents of Secrets.
pub(crate) fn describe(objects: &Objects) -> String {
    let mut text = String::new();
    // The owner once, as it will be; that it is held before is the launch's affair.
    let manifests = std::iter::once(&objects.released).chain(&objects.rest);
    for manifest in manifests {
        let mut object = manifest.object.clone();
        if let Some(data) = object.get_mut("data").and_then(Value::as_object_mut) {
            for value in data.values_mut() {
                let base64 = value.as_str().unwrap_or_default();
                let padding = base64.bytes().rev().take_while(|byte| *byte == b'=').count();
                *value = format!("<{} bytes>", base64.len() / 4 * 3 - padding).into();
            }
        }
        write!(text, "---\n{}", yaml(&object)).expect("a string");
    }
    text
}

fn yaml(object: &impl Serialize) -> String {
    serde_saphyr::to_string(object).expect("objects are plain data")
}

/// The rank of a pod's replica in its role, if the pod is one of a run.
pub(crate) fn rank_of(pod: &Pod) -> Option<u32> {
    let index = pod.annotations().get(INDEX_ANNOTATION).or_else(|| pod.labels().get(INDEX_LABEL));
    index?.parse().ok()
}

/// Codes after which a worker is not started again, since it would end the same way, or has nothing to come back to.
///
/// A replica that broke the protocol or waited in vain may have been cut off with its node, and may have more luck on
/// another.
const HOPELESS: [ExitCode; 7] = [
    ExitCode::UserError,
    ExitCode::Layout,
    ExitCode::Configuration,
    ExitCode::NeverLaunched,
    // The run has failed already.
    ExitCode::LostPeer,
    ExitCode::NotFinite,
    ExitCode::Panic,
];

/// Whether a worker that exits with `code` is not started again, and its Job fails at once.
pub(crate) fn fails_the_job(code: i32) -> bool {
    HOPELESS.iter().any(|known| i32::from(known.code()) == code)
}

#[cfg(test)]
mod tests;
