//! Settings of a run on Kubernetes.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

#[cfg(feature = "kubernetes")]
use std::sync::Arc;

use super::{Memory, UnitError, cluster};
#[cfg(feature = "kubernetes")]
use crate::topology::Role;

/// Longer than a night and a day; a run that hangs does not hold its nodes for ever.
const DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// Time to open the laptop again and fetch the result of a run that ended while it was closed.
const KEEP_RESULT: Duration = Duration::from_secs(3600);

/// Time to look at the pods of a run that failed.
const TTL: Duration = Duration::from_secs(600);

/// Time to create all objects over a slow line. A launcher that dies leaves what it has created for so long and [`TTL`].
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(120);

/// Long enough for an image pull on several cold nodes.
const JOIN_TIMEOUT: Duration = Duration::from_secs(600);

/// Long enough for an autoscaler to add a node.
const SCHEDULE_TIMEOUT: Duration = Duration::from_secs(300);

/// How long a run on a cluster waits for a lost worker if nobody says: until another node has the image.
pub(super) const REJOIN: Duration = Duration::from_secs(300);

/// Programs keep small files in `/tmp`; what is more is a volume.
const TMP_SIZE: &str = "256Mi";

/// What the user wants of a run on Kubernetes. Without meaning for other targets, but checked for them all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KubernetesSettings {
    /// The namespace, default that of the context.
    pub namespace: Option<String>,
    /// The context of the kubeconfig, default its current one.
    pub context: Option<String>,
    /// The objects that run the replicas, default [`Renderer::Jobs`].
    pub launcher: Renderer,
    /// How long the run may take before the cluster ends it, from the start of its replicas. Whole seconds, at least one,
    /// default 24 h.
    pub deadline: Duration,
    /// How long the coordinator keeps the result for a caller, once training has ended. Whole seconds, default 1 h.
    pub keep_result: Duration,
    /// How long what is left of an ended run stays to be looked at, if no caller deletes it. Whole seconds, default 10 min.
    pub ttl: Duration,
    /// How long a launch may take to create the objects of the run. What one that broke off has created stays for so long and
    /// [`ttl`](Self::ttl). Whole seconds, at least one, default 2 min.
    pub launch_timeout: Duration,
    /// How long the replicas wait for each other at the beginning. Whole seconds, at least one, default 10 min.
    pub join_timeout: Duration,
    /// How long a pod may be without a node. Whole seconds, at least one, default 5 min.
    pub schedule_timeout: Duration,
    /// Whether the launch ends once the replicas are started, default no.
    pub detach: bool,
    /// Whether another run is started although one trains the same type with the same value, default no.
    pub another: bool,
    /// Whether a launch is refused if no node that there is now could hold a pod, default yes. No where nodes are made when they
    /// are needed.
    pub check_nodes: bool,
    /// Labels of the nodes that may run the pods, default none: any node.
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that the pods bear, default none.
    pub tolerations: Vec<Toleration>,
    /// Whether workers go to different nodes where they can, default yes.
    pub spread: bool,
    /// The priority class of the pods, default the cluster's.
    pub priority_class: Option<String>,
    /// The runtime class of the pods, default the cluster's.
    pub runtime_class: Option<String>,
    /// Labels of all objects and pods, beside fairing's own. Default none.
    pub labels: BTreeMap<String, String>,
    /// Annotations of the pods, in front of fairing's own. Default none.
    pub annotations: BTreeMap<String, String>,
    /// Secrets with which the nodes pull the image, default none.
    pub image_pull_secrets: Vec<String>,
    /// Volumes of all replicas, default none. No two have one path.
    pub volumes: Vec<Volume>,
    /// The service account of the pods, default the namespace's. Its token is not mounted.
    pub service_account: Option<String>,
    /// The most that `/tmp` may hold, default 256 MiB. It counts against no memory.
    pub tmp_size: Memory,
    /// What changes the pods last of all.
    #[cfg(feature = "kubernetes")]
    pub pod: PodMutators,
}

/// The objects that run the replicas on a cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Renderer {
    /// Jobs of Kubernetes itself: nothing has to be installed.
    #[default]
    Jobs,
    /// A JobSet (`jobset.x-k8s.io`).
    JobSet,
    /// A TFJob of Kubeflow's training operator.
    TfJob,
    /// A JobSet if the cluster has that kind, else Jobs.
    Auto,
}

/// A taint that the pods bear; what is `None` may be anything.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Toleration {
    /// The taint's key.
    pub key: Option<String>,
    /// The taint's value.
    pub value: Option<String>,
    /// `NoSchedule`, `PreferNoSchedule` or `NoExecute`.
    pub effect: Option<String>,
}

/// A volume of every replica.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Volume {
    /// What is mounted.
    pub source: VolumeSource,
    /// Where, absolute.
    pub path: String,
}

/// What a volume holds.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum VolumeSource {
    /// What a claim has been given.
    Claim {
        /// The PersistentVolumeClaim.
        name: String,
        /// Whether it may only be read.
        is_read_only: bool,
    },
    /// The entries of a Secret, a file each.
    Secret {
        /// The Secret.
        name: String,
    },
    /// The entries of a ConfigMap, a file each.
    ConfigMap {
        /// The ConfigMap.
        name: String,
    },
    /// An empty folder on the node's disk that ends with its pod.
    Empty {
        /// The most that it may hold.
        size: Memory,
    },
}

/// GPUs of one replica, as the cluster's device plugin names them.
///
/// # Example
///
/// ```
/// use fairing_core::config::Gpu;
///
/// let gpu: Gpu = "2".parse()?;
/// assert_eq!((gpu.resource(), gpu.count()), ("nvidia.com/gpu", 2));
/// assert_eq!("amd.com/gpu=1".parse::<Gpu>()?.resource(), "amd.com/gpu");
/// # Ok::<(), fairing_core::config::UnitError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    resource: String,
    count: u32,
}

/// What changes the pods of one role or of both, in code: the way to everything that has no key.
///
/// Made by [`LaunchOptions::pod`](super::LaunchOptions::pod).
#[cfg(feature = "kubernetes")]
#[derive(Clone, Default)]
pub struct PodMutators(Vec<Arc<PodMutator>>);

#[cfg(feature = "kubernetes")]
type PodMutator = dyn Fn(Role, &mut k8s_openapi::api::core::v1::PodTemplateSpec) + Send + Sync;

#[cfg(feature = "kubernetes")]
impl PodMutators {
    pub(super) fn push(
        &mut self,
        mutate: impl Fn(Role, &mut k8s_openapi::api::core::v1::PodTemplateSpec) + Send + Sync + 'static,
    ) {
        self.0.push(Arc::new(mutate));
    }

    /// Changes the pods of `role`, in the order in which the changes were given.
    pub fn apply(&self, role: Role, pod: &mut k8s_openapi::api::core::v1::PodTemplateSpec) {
        self.0.iter().for_each(|mutate| mutate(role, pod));
    }
}

#[cfg(feature = "kubernetes")]
impl fmt::Debug for PodMutators {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PodMutators({})", self.0.len())
    }
}

/// The same closures are equal: code cannot be compared.
#[cfg(feature = "kubernetes")]
impl PartialEq for PodMutators {
    fn eq(&self, other: &Self) -> bool {
        self.0.len() == other.0.len() && self.0.iter().zip(&other.0).all(|(one, other)| Arc::ptr_eq(one, other))
    }
}

#[cfg(feature = "kubernetes")]
impl Eq for PodMutators {}

impl Default for KubernetesSettings {
    fn default() -> Self {
        Self {
            namespace: None,
            context: None,
            launcher: Renderer::default(),
            deadline: DEADLINE,
            keep_result: KEEP_RESULT,
            ttl: TTL,
            launch_timeout: LAUNCH_TIMEOUT,
            join_timeout: JOIN_TIMEOUT,
            schedule_timeout: SCHEDULE_TIMEOUT,
            detach: false,
            another: false,
            check_nodes: true,
            node_selector: BTreeMap::new(),
            tolerations: Vec::new(),
            spread: true,
            priority_class: None,
            runtime_class: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            image_pull_secrets: Vec::new(),
            volumes: Vec::new(),
            service_account: None,
            tmp_size: TMP_SIZE.parse().expect("a size"),
            #[cfg(feature = "kubernetes")]
            pod: PodMutators::default(),
        }
    }
}

impl Gpu {
    /// The resource that the device plugin offers, such as `nvidia.com/gpu`.
    pub fn resource(&self) -> &str {
        &self.resource
    }

    /// Number of GPUs; 0 takes back what the layers below ask for.
    pub fn count(&self) -> u32 {
        self.count
    }
}

impl FromStr for Gpu {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (resource, count) = cluster::gpu(text).map_err(|expected| UnitError::new(text, expected))?;
        Ok(Self { resource: resource.to_owned(), count })
    }
}

impl Renderer {
    /// The one that is spelt so, if it is one.
    pub(super) fn read(word: &str) -> Result<Self, String> {
        cluster::launcher(word)?;
        Ok(match word {
            "jobs" => Renderer::Jobs,
            "jobset" => Renderer::JobSet,
            "tfjob" => Renderer::TfJob,
            _ => Renderer::Auto,
        })
    }
}

impl Toleration {
    pub(super) fn read(text: &str) -> Result<Self, String> {
        let (key, value, effect) = cluster::toleration(text)?;
        let [key, value, effect] = [key, value, effect].map(|part| part.map(str::to_owned));
        Ok(Self { key, value, effect })
    }
}

impl Volume {
    pub(super) fn read(text: &str) -> Result<Self, String> {
        let (kind, source, path, is_read_only) = cluster::volume(text)?;
        let name = source.to_owned();
        let source = match kind {
            "pvc" => VolumeSource::Claim { name, is_read_only },
            "secret" => VolumeSource::Secret { name },
            "configmap" => VolumeSource::ConfigMap { name },
            _ => VolumeSource::Empty { size: source.parse().expect("the rule has read it") },
        };
        Ok(Self { source, path: path.to_owned() })
    }
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.resource, self.count)
    }
}

impl fmt::Display for Renderer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Renderer::Jobs => "jobs",
            Renderer::JobSet => "jobset",
            Renderer::TfJob => "tfjob",
            Renderer::Auto => "auto",
        })
    }
}

impl fmt::Display for Toleration {
    /// As it is written in a list of them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Toleration { key: None, effect: None, .. } = self {
            return f.write_str("*");
        }
        f.write_str(self.key.as_deref().unwrap_or_default())?;
        self.value.iter().try_for_each(|value| write!(f, "={value}"))?;
        self.effect.iter().try_for_each(|effect| write!(f, ":{effect}"))
    }
}

impl fmt::Display for Volume {
    /// As it is written in a list of them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = &self.path;
        match &self.source {
            VolumeSource::Claim { name, is_read_only } => {
                write!(f, "pvc:{name}:{path}{}", if *is_read_only { ":ro" } else { "" })
            }
            VolumeSource::Secret { name } => write!(f, "secret:{name}:{path}"),
            VolumeSource::ConfigMap { name } => write!(f, "configmap:{name}:{path}"),
            VolumeSource::Empty { size } => write!(f, "empty:{size}:{path}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_lists_are_shown_as_they_are_written() {
        for text in ["a=b:NoSchedule", "a:NoExecute", "a=b", "a", ":NoExecute", "*"] {
            assert_eq!(Toleration::read(text).unwrap().to_string(), text);
        }
        for text in ["pvc:a:/b:ro", "pvc:a:/b", "secret:a:/b", "configmap:a:/b", "empty:1Gi:/b"] {
            assert_eq!(Volume::read(text).unwrap().to_string(), text);
        }
        for text in ["jobs", "jobset", "tfjob", "auto"] {
            assert_eq!(Renderer::read(text).unwrap().to_string(), text);
        }
    }
}
