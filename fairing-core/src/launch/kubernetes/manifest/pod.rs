//! The pods of a role. They pass the Pod Security Standard `restricted`; what opens them again is the user's own closure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar,
    EnvVarSource, KeyToPath, LocalObjectReference, ObjectFieldSelector, PersistentVolumeClaimVolumeSource,
    PodAffinityTerm, PodAntiAffinity, PodSecurityContext, PodSpec, PodTemplateSpec, ResourceRequirements,
    SeccompProfile, SecretVolumeSource, SecurityContext, Toleration, Volume, VolumeMount, WeightedPodAffinityTerm,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};

use super::super::super::{LaunchPlan, tuning};
use super::shared::{VALUE_KEY, labels, selector};
use super::{Format, PORT, Scene};
use crate::config::{self, VolumeSource};
use crate::lifeline::{IDENTITY_FILE, VALUE_FILE};
use crate::topology::{FOLDER, Placement, RANK, Role};

/// Nobody's user and group, as the image has it.
const USER: i64 = 65532;

/// Where a replica finds what it trains with, and with what it proves who it is.
const OWN_FOLDER: &str = "/run/fairing";

/// Thousandths of a core that are set aside for a replica, if nobody says. So little that a server and two workers fit on a
/// node of two cores beside what a cluster runs itself (0.95 cores on a kind node). It is a share and no limit: where cores
/// are idle a replica takes what its threads need.
const MILLICORES: [u64; 2] = [250, 100];

/// Memory of a worker and of a server, if nobody says: a small model with its data, on a laptop's cluster of 4 GB.
const MEMORY_BYTES: [u64; 2] = [1 << 30, 512 << 20];

/// Time for the round in progress, and for the coordinator's last word to its caller.
const GRACE_SECONDS: i64 = 30;

/// Stronger than the other wishes of the scheduler, and still a wish: on one node all workers run.
const SPREAD_WEIGHT: i32 = 100;

/// The folder that no other pod may be on, for workers that are spread.
const HOST_LABEL: &str = "kubernetes.io/hostname";

/// Name of the volume with the run's Secret.
const RUN_VOLUME: &str = "run";
/// Name of the volume at `/tmp`.
const TMP_VOLUME: &str = "tmp";

/// How many bytes of memory a replica of `role` may take.
pub(super) fn memory_bytes(scene: &Scene, role: Role) -> u64 {
    scene.resources(role).memory.map_or(MEMORY_BYTES[index(role)], |memory| memory.bytes())
}

fn index(role: Role) -> usize {
    usize::from(role == Role::Ps)
}

/// The pods of `role`, which differ in their index only.
pub(super) fn template(scene: &Scene, plan: &LaunchPlan, role: Role) -> PodTemplateSpec {
    let settings = &scene.settings;
    let mut annotations = settings.annotations.clone();
    // A proxy beside the replica would end what is between the replicas' own TLS, and not let a Job end.
    annotations.entry("sidecar.istio.io/inject".to_owned()).or_insert_with(|| "false".to_owned());
    let named = |(index, volume): (usize, &config::Volume)| Volume { name: volume_name(index), ..source(volume) };
    let volumes = [run_volume(plan, role), tmp_volume(scene)];
    let spec = PodSpec {
        containers: vec![container(scene, plan, role)],
        // A TFJob says it itself, and warns of a second opinion.
        restart_policy: (scene.format != Format::TfJob).then(|| "Never".to_owned()),
        // Names of servers are those of their hosts in the Service of that name. JobSet's controller does it for its pods.
        subdomain: (scene.format == Format::Jobs).then(|| plan.run.clone()),
        termination_grace_period_seconds: Some(GRACE_SECONDS),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            // The Secret's files belong to root; the group may read them.
            fs_group: Some(USER),
            // A claim with a million files is not gone through at each start.
            fs_group_change_policy: Some("OnRootMismatch".to_owned()),
            seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
            ..PodSecurityContext::default()
        }),
        affinity: affinity(scene, plan, role),
        node_selector: unless_empty(settings.node_selector.clone()),
        tolerations: unless_empty(settings.tolerations.iter().map(toleration).collect::<Vec<_>>()),
        priority_class_name: settings.priority_class.clone(),
        runtime_class_name: settings.runtime_class.clone(),
        service_account_name: settings.service_account.clone(),
        image_pull_secrets: unless_empty(
            settings
                .image_pull_secrets
                .iter()
                .map(|name| LocalObjectReference { name: name.clone() })
                .collect::<Vec<_>>(),
        ),
        volumes: Some(volumes.into_iter().chain(settings.volumes.iter().enumerate().map(named)).collect()),
        ..PodSpec::default()
    };
    let metadata = ObjectMeta {
        labels: Some(labels(scene, plan, Some(role))),
        annotations: Some(annotations),
        ..ObjectMeta::default()
    };
    let mut template = PodTemplateSpec { metadata: Some(metadata), spec: Some(spec) };
    settings.pod.apply(role, &mut template);
    template
}

fn unless_empty<T: Default + PartialEq>(value: T) -> Option<T> {
    (value != T::default()).then_some(value)
}

fn container(scene: &Scene, plan: &LaunchPlan, role: Role) -> Container {
    let mount = |name: &str, path: &str| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        ..VolumeMount::default()
    };
    let own = |path: String| VolumeMount { read_only: Some(true), ..mount(RUN_VOLUME, &path) };
    let (own_folder, _) = IDENTITY_FILE.split_once('/').expect("an identity has a folder of its own");
    let mut mounts = vec![
        VolumeMount { sub_path: Some(VALUE_KEY.to_owned()), ..own(format!("{OWN_FOLDER}/{VALUE_FILE}")) },
        // Of the identities a replica sees its own.
        VolumeMount { sub_path_expr: Some(format!("$({RANK})")), ..own(format!("{OWN_FOLDER}/{own_folder}")) },
        mount(TMP_VOLUME, "/tmp"),
    ];
    mounts.extend(scene.settings.volumes.iter().enumerate().map(|(index, volume)| VolumeMount {
        read_only: matches!(volume.source, VolumeSource::Claim { is_read_only: true, .. }).then_some(true),
        ..mount(&volume_name(index), &volume.path)
    }));
    let hosts_parameters = plan.placements[0].topology.coordinator().role == role;
    let port = ContainerPort {
        // The operator gives the container another one, if none has this name.
        name: Some(if scene.format == Format::TfJob { "tfjob-port" } else { "fairing" }.to_owned()),
        container_port: PORT.into(),
        ..ContainerPort::default()
    };
    let arguments = plan.program.arguments.iter().map(|argument| literal(&argument.to_string_lossy()));
    Container {
        name: scene.format.container().to_owned(),
        image: Some(scene.image.clone()),
        // It is named by its digest, so that what a node has is right.
        image_pull_policy: Some("IfNotPresent".to_owned()),
        args: unless_empty(arguments.collect::<Vec<_>>()),
        env: Some(environment(scene, plan, role)),
        ports: (hosts_parameters || scene.format == Format::TfJob).then(|| vec![port]),
        resources: Some(resources(scene, role)),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            read_only_root_filesystem: Some(true),
            ..SecurityContext::default()
        }),
        // A replica that cannot say why it ends has said it in its log.
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some(mounts),
        ..Container::default()
    }
}

/// The variables, each once: a list with one twice is refused. The placement is fairing's, and of the rest the user's win.
fn environment(scene: &Scene, plan: &LaunchPlan, role: Role) -> Vec<EnvVar> {
    let placement = of_role(plan, role);
    let users = plan.variables.iter().map(|(name, value)| (name.clone(), value.to_string_lossy().into_owned()));
    let placements = placement.to_env().into_iter().filter(|(name, _)| *name != RANK);
    let placements = placements.map(|(name, value)| (name.to_owned(), value));
    let folder = (FOLDER.to_owned(), OWN_FOLDER.to_owned());
    let all: BTreeMap<String, String> =
        tuning(placement).into_iter().chain(users).chain(placements).chain([folder]).collect();
    let rank = EnvVarSource {
        field_ref: Some(ObjectFieldSelector { field_path: scene.format.rank_field(), api_version: None }),
        ..EnvVarSource::default()
    };
    let rank = EnvVar { name: RANK.to_owned(), value: None, value_from: Some(rank) };
    let all = all.into_iter().map(|(name, value)| EnvVar { name, value: Some(literal(&value)), value_from: None });
    std::iter::once(rank).chain(all).collect()
}

/// The placement of the first replica of a role, from which those of the others differ in their rank only.
pub(super) fn of_role(plan: &LaunchPlan, role: Role) -> &Placement {
    let placement = plan.placements.iter().find(|placement| placement.replica.role == role);
    placement.expect("pods are made for roles that the plan has")
}

/// What arrives as `text`: `$(NAME)` in arguments and variables stands for another variable.
fn literal(text: &str) -> String {
    text.replace('$', "$$")
}

fn resources(scene: &Scene, role: Role) -> ResourceRequirements {
    let asked = scene.resources(role);
    let millicores = asked.cpu.map_or(MILLICORES[index(role)], |cpu| cpu.millicores());
    let quantity = |text: String| Quantity(text);
    let cpu = || ("cpu".to_owned(), quantity(format!("{millicores}m")));
    // What a node promises to several pods at once it cannot keep: memory that is used is not taken back.
    let memory = ("memory".to_owned(), bytes(memory_bytes(scene, role)));
    let gpu = asked.gpu.iter().map(|gpu| (gpu.resource().to_owned(), quantity(gpu.count().to_string())));
    let common: BTreeMap<_, _> = gpu.chain([memory]).collect();
    let with_cpu = common.clone().into_iter().chain([cpu()]).collect();
    // Who names a number of cores means it: no more, whatever else the node has to do.
    let limits = if asked.cpu.is_some() { BTreeMap::clone(&with_cpu) } else { common };
    ResourceRequirements { requests: Some(with_cpu), limits: Some(limits), claims: None }
}

/// An amount of bytes as people write it, if it is a whole number of MiB.
fn bytes(count: u64) -> Quantity {
    Quantity(if count.is_multiple_of(1 << 20) { format!("{}Mi", count >> 20) } else { count.to_string() })
}

/// The run's Secret: for every replica of the role the value, and a folder with its identity.
fn run_volume(plan: &LaunchPlan, role: Role) -> Volume {
    let (_, identity_file) = IDENTITY_FILE.split_once('/').expect("an identity has a folder of its own");
    let item = |key: String, path: String| KeyToPath { key, path, ..KeyToPath::default() };
    let replicas = plan.placements.iter().map(|placement| placement.replica).filter(|replica| replica.role == role);
    let identities = replicas.map(|replica| item(replica.file_name(), format!("{}/{identity_file}", replica.rank)));
    let value = item(VALUE_KEY.to_owned(), VALUE_KEY.to_owned());
    Volume {
        name: RUN_VOLUME.to_owned(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(plan.run.clone()),
            // The files belong to root and to the group that the replica is in.
            default_mode: Some(0o440),
            items: Some(std::iter::once(value).chain(identities).collect()),
            ..SecretVolumeSource::default()
        }),
        ..Volume::default()
    }
}

fn tmp_volume(scene: &Scene) -> Volume {
    Volume { name: TMP_VOLUME.to_owned(), empty_dir: Some(empty(scene.settings.tmp_size)), ..Volume::default() }
}

fn empty(size: config::Memory) -> EmptyDirVolumeSource {
    EmptyDirVolumeSource { size_limit: Some(bytes(size.bytes())), ..EmptyDirVolumeSource::default() }
}

fn volume_name(index: usize) -> String {
    format!("volume-{index}")
}

/// A volume of the user's, without its name.
fn source(volume: &config::Volume) -> Volume {
    let mut made = Volume::default();
    match &volume.source {
        VolumeSource::Claim { name, is_read_only } => {
            made.persistent_volume_claim = Some(PersistentVolumeClaimVolumeSource {
                claim_name: name.clone(),
                read_only: is_read_only.then_some(true),
            });
        }
        VolumeSource::Secret { name } => {
            made.secret = Some(SecretVolumeSource { secret_name: Some(name.clone()), ..SecretVolumeSource::default() });
        }
        VolumeSource::ConfigMap { name } => {
            made.config_map = Some(ConfigMapVolumeSource { name: name.clone(), ..ConfigMapVolumeSource::default() });
        }
        VolumeSource::Empty { size } => made.empty_dir = Some(empty(*size)),
    }
    made
}

fn toleration(toleration: &config::Toleration) -> Toleration {
    let config::Toleration { key, value, effect } = toleration.clone();
    let operator = if value.is_some() { "Equal" } else { "Exists" };
    Toleration { key, value, effect, operator: Some(operator.to_owned()), toleration_seconds: None }
}

/// Keeps workers off each other's nodes, where that is wanted and there are several.
fn affinity(scene: &Scene, plan: &LaunchPlan, role: Role) -> Option<Affinity> {
    let is_spread = scene.settings.spread && role == Role::Worker && plan.placements[0].topology.worker_count() > 1;
    let term = || PodAffinityTerm {
        label_selector: Some(LabelSelector { match_labels: Some(selector(plan, role)), ..LabelSelector::default() }),
        topology_key: HOST_LABEL.to_owned(),
        ..PodAffinityTerm::default()
    };
    is_spread.then(|| Affinity {
        pod_anti_affinity: Some(PodAntiAffinity {
            preferred_during_scheduling_ignored_during_execution: Some(vec![WeightedPodAffinityTerm {
                weight: SPREAD_WEIGHT,
                pod_affinity_term: term(),
            }]),
            ..PodAntiAffinity::default()
        }),
        ..Affinity::default()
    })
}
