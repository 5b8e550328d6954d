//! The last layer: settings in code.

use std::path::PathBuf;
use std::time::Duration;

#[cfg(feature = "kubernetes")]
use super::PodMutators;
use super::{Builder, Link, Memory, OnDisconnect, Renderer, Resources, Target};
use crate::topology::Mode;
#[cfg(feature = "kubernetes")]
use crate::topology::Role;

/// Settings of one launch in code: the layer that wins over all others.
///
/// A relative path is meant from the current folder, but for [`LaunchOptions::files`]. What is not set here comes from the layers below.
///
/// # Example
///
/// ```
/// use fairing_core::config::{LaunchOptions, Resources};
///
/// let options = LaunchOptions::new()
///     .workers(4)
///     .seed(7)
///     .env(["HF_HOME"])
///     .worker_resources(Resources { cpu: Some("1.5".parse()?), memory: Some("2Gi".parse()?), ..Resources::default() });
/// # Ok::<(), fairing_core::config::UnitError>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
#[must_use = "options do nothing until a launch gets them"]
pub struct LaunchOptions {
    pub(super) workers: Option<u32>,
    pub(super) ps: Option<u32>,
    pub(super) mode: Option<Mode>,
    pub(super) rejoin: Option<Duration>,
    pub(super) seed: Option<u64>,
    pub(super) env: Option<Vec<String>>,
    pub(super) data: Option<PathBuf>,
    pub(super) target: Option<Target>,
    pub(super) repository: Option<String>,
    pub(super) image: Option<String>,
    pub(super) base: Option<String>,
    pub(super) dockerfile: Option<PathBuf>,
    pub(super) builder: Option<Builder>,
    pub(super) link: Option<Link>,
    pub(super) architectures: Option<Vec<String>>,
    pub(super) files: Option<Vec<PathBuf>>,
    pub(super) root_certificates: Option<bool>,
    pub(super) registry_ca: Option<PathBuf>,
    pub(super) plain_http: Option<Vec<String>>,
    pub(super) on_disconnect: Option<OnDisconnect>,
    pub(super) namespace: Option<String>,
    pub(super) context: Option<String>,
    pub(super) launcher: Option<Renderer>,
    pub(super) deadline: Option<Duration>,
    pub(super) keep_result: Option<Duration>,
    pub(super) ttl: Option<Duration>,
    pub(super) launch_timeout: Option<Duration>,
    pub(super) join_timeout: Option<Duration>,
    pub(super) schedule_timeout: Option<Duration>,
    pub(super) node_selector: Option<Vec<String>>,
    pub(super) tolerations: Option<Vec<String>>,
    pub(super) spread: Option<bool>,
    pub(super) priority_class: Option<String>,
    pub(super) runtime_class: Option<String>,
    pub(super) labels: Option<Vec<String>>,
    pub(super) annotations: Option<Vec<String>>,
    pub(super) image_pull_secrets: Option<Vec<String>>,
    pub(super) volumes: Option<Vec<String>>,
    pub(super) service_account: Option<String>,
    pub(super) tmp_size: Option<Memory>,
    pub(super) runs: Option<PathBuf>,
    pub(super) cache: Option<PathBuf>,
    pub(super) detach: Option<bool>,
    pub(super) another: Option<bool>,
    pub(super) check_nodes: Option<bool>,
    pub(super) dry_run: Option<bool>,
    pub(super) worker: Resources,
    pub(super) ps_resources: Resources,
    #[cfg(feature = "kubernetes")]
    pub(super) pod: PodMutators,
}

impl LaunchOptions {
    /// Options that change nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of workers; 0 is refused when the run is launched.
    pub fn workers(self, workers: u32) -> Self {
        Self { workers: Some(workers), ..self }
    }

    /// Number of parameter servers. With 0, every worker also hosts the server of its share of the parameters.
    pub fn ps(self, ps: u32) -> Self {
        Self { ps: Some(ps), ..self }
    }

    /// When a worker's gradient is applied, in place of both `mode` and `staleness` of the layers below.
    ///
    /// What is not [`Mode::Sync`] needs a parameter server; without one it is refused when the run is launched.
    pub fn mode(self, mode: Mode) -> Self {
        Self { mode: Some(mode), ..self }
    }

    /// How long the run is held for a lost worker, which is started again; with zero it is not.
    ///
    /// More than an hour, and any time above zero without a parameter server, is refused when the run is launched. What is
    /// below a millisecond is dropped.
    pub fn rejoin(self, rejoin: Duration) -> Self {
        Self { rejoin: Some(rejoin), ..self }
    }

    /// Seed of the initial parameters, of the data order and of the framework's generator.
    pub fn seed(self, seed: u64) -> Self {
        Self { seed: Some(seed), ..self }
    }

    /// Names of the variables that the replicas see, in place of those of the layers below.
    pub fn env<I, S>(self, names: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        Self { env: Some(names.into_iter().map(Into::into).collect()), ..self }
    }

    /// The folder behind `worker.data_dir()`.
    pub fn data(self, folder: impl Into<PathBuf>) -> Self {
        Self { data: Some(folder.into()), ..self }
    }

    /// Where the replicas run.
    pub fn target(self, target: Target) -> Self {
        Self { target: Some(target), ..self }
    }

    /// Where the image is pushed, as `host[:port]/path`.
    pub fn repository(self, repository: impl Into<String>) -> Self {
        Self { repository: Some(repository.into()), ..self }
    }

    /// A finished image that is used as it is, in place of all that the layers below say of building one.
    pub fn image(self, reference: impl Into<String>) -> Self {
        Self { image: Some(reference.into()), ..self }
    }

    /// The image that the program is put on, in place of an `image` or a `dockerfile` of the layers below.
    pub fn base(self, reference: impl Into<String>) -> Self {
        Self { base: Some(reference.into()), ..self }
    }

    /// A Dockerfile of your own, in place of an `image` or a `base` of the layers below. The builder is then
    /// [`Builder::Docker`].
    pub fn dockerfile(self, path: impl Into<PathBuf>) -> Self {
        Self { dockerfile: Some(path.into()), ..self }
    }

    /// Who builds the image.
    pub fn builder(self, builder: Builder) -> Self {
        Self { builder: Some(builder), ..self }
    }

    /// How the program in the image finds its libraries.
    pub fn link(self, link: Link) -> Self {
        Self { link: Some(link), ..self }
    }

    /// The architectures that the image is built for, `amd64` or `arm64`, in place of those of the layers below; none means
    /// that of this program.
    pub fn architectures<I, S>(self, architectures: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        Self { architectures: Some(architectures.into_iter().map(Into::into).collect()), ..self }
    }

    /// Files that are put beside the program, in place of those of the layers below: relative paths without `..`, meant from
    /// the folder of your `Cargo.toml` here and from the working folder in the image.
    pub fn files<I, P>(self, paths: I) -> Self
    where
        I: IntoIterator<Item = P>,
        P: Into<PathBuf>,
    {
        Self { files: Some(paths.into_iter().map(Into::into).collect()), ..self }
    }

    /// Whether the root certificates of this machine go into the image.
    pub fn root_certificates(self, are_shipped: bool) -> Self {
        Self { root_certificates: Some(are_shipped), ..self }
    }

    /// The certificate authority of the registry, a PEM file.
    pub fn registry_ca(self, path: impl Into<PathBuf>) -> Self {
        Self { registry_ca: Some(path.into()), ..self }
    }

    /// Registries that are spoken to without TLS, as `host[:port]`, in place of those of the layers below.
    pub fn plain_http<I, S>(self, hosts: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        Self { plain_http: Some(hosts.into_iter().map(Into::into).collect()), ..self }
    }

    /// What the run does when this process is gone.
    ///
    /// [`OnDisconnect::Continue`] is refused when the run is launched, unless its target is a cluster.
    pub fn on_disconnect(self, on_disconnect: OnDisconnect) -> Self {
        Self { on_disconnect: Some(on_disconnect), ..self }
    }

    /// The namespace of the cluster that the run is created in; without one that of the context.
    pub fn namespace(self, name: impl Into<String>) -> Self {
        Self { namespace: Some(name.into()), ..self }
    }

    /// The context of the kubeconfig; without one its current one.
    pub fn context(self, name: impl Into<String>) -> Self {
        Self { context: Some(name.into()), ..self }
    }

    /// The objects that run the replicas on a cluster.
    pub fn launcher(self, launcher: Renderer) -> Self {
        Self { launcher: Some(launcher), ..self }
    }

    /// How long a run on a cluster may take before the cluster ends it, in whole seconds.
    ///
    /// Less than a second, and more than a year, is refused when the run is launched; so it is with all times of a cluster.
    pub fn deadline(self, deadline: Duration) -> Self {
        Self { deadline: Some(deadline), ..self }
    }

    /// How long a run on a cluster keeps its result for a caller once training has ended, in whole seconds.
    pub fn keep_result(self, time: Duration) -> Self {
        Self { keep_result: Some(time), ..self }
    }

    /// How long what is left of an ended run stays in the cluster, if no caller deletes it, in whole seconds.
    pub fn ttl(self, time: Duration) -> Self {
        Self { ttl: Some(time), ..self }
    }

    /// How long a launch on a cluster may take to create the objects of the run, in whole seconds.
    pub fn launch_timeout(self, time: Duration) -> Self {
        Self { launch_timeout: Some(time), ..self }
    }

    /// How long the replicas wait for each other at the beginning, in whole seconds.
    pub fn join_timeout(self, time: Duration) -> Self {
        Self { join_timeout: Some(time), ..self }
    }

    /// How long a pod may be without a node, in whole seconds.
    pub fn schedule_timeout(self, time: Duration) -> Self {
        Self { schedule_timeout: Some(time), ..self }
    }

    /// Labels of the nodes that may run the pods, as `key=value`, in place of those of the layers below.
    pub fn node_selector<I, S>(self, labels: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        Self { node_selector: Some(labels.into_iter().map(Into::into).collect()), ..self }
    }

    /// Taints that the pods bear, in place of those of the layers below: `key=value:Effect`, `key:Effect`, `key=value`, `key`,
    /// `:Effect`, or `*` for any.
    pub fn tolerations<I, S>(self, taints: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        Self { tolerations: Some(taints.into_iter().map(Into::into).collect()), ..self }
    }

    /// Whether workers go to different nodes where they can.
    pub fn spread(self, is_spread: bool) -> Self {
        Self { spread: Some(is_spread), ..self }
    }

    /// The priority class of the pods.
    pub fn priority_class(self, name: impl Into<String>) -> Self {
        Self { priority_class: Some(name.into()), ..self }
    }

    /// The runtime class of the pods.
    pub fn runtime_class(self, name: impl Into<String>) -> Self {
        Self { runtime_class: Some(name.into()), ..self }
    }

    /// Labels of all objects in the cluster, as `key=value`, in place of those of the layers below.
    pub fn labels<I, S>(self, labels: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        Self { labels: Some(labels.into_iter().map(Into::into).collect()), ..self }
    }

    /// Annotations of the pods, as `key=value`, in place of those of the layers below.
    pub fn annotations<I, S>(self, annotations: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        Self { annotations: Some(annotations.into_iter().map(Into::into).collect()), ..self }
    }

    /// Secrets with which the nodes pull the image, in place of those of the layers below.
    pub fn image_pull_secrets<I, S>(self, names: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        Self { image_pull_secrets: Some(names.into_iter().map(Into::into).collect()), ..self }
    }

    /// Volumes of all replicas, in place of those of the layers below: `pvc:CLAIM:/path`, of which `:ro` may be said behind the
    /// path, `secret:NAME:/path`, `configmap:NAME:/path` or `empty:SIZE:/path`.
    pub fn volumes<I, S>(self, volumes: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        Self { volumes: Some(volumes.into_iter().map(Into::into).collect()), ..self }
    }

    /// The service account of the pods. Its token is not mounted.
    pub fn service_account(self, name: impl Into<String>) -> Self {
        Self { service_account: Some(name.into()), ..self }
    }

    /// The most that `/tmp` of a pod may hold.
    pub fn tmp_size(self, size: Memory) -> Self {
        Self { tmp_size: Some(size), ..self }
    }

    /// The folder that gets a folder for each run.
    pub fn runs(self, folder: impl Into<PathBuf>) -> Self {
        Self { runs: Some(folder.into()), ..self }
    }

    /// The folder in which compressed layers are kept from one run to the next.
    pub fn cache(self, folder: impl Into<PathBuf>) -> Self {
        Self { cache: Some(folder.into()), ..self }
    }

    /// Whether the launch ends once the replicas are started; for a cluster, where a run goes on without its launcher.
    pub fn detach(self, is_detached: bool) -> Self {
        Self { detach: Some(is_detached), ..self }
    }

    /// Whether a launch on a cluster starts another run although one trains the same type with the same value there.
    pub fn another(self, is_another: bool) -> Self {
        Self { another: Some(is_another), ..self }
    }

    /// Whether a launch on a cluster is refused if no node that there is now could hold a pod.
    pub fn check_nodes(self, is_checked: bool) -> Self {
        Self { check_nodes: Some(is_checked), ..self }
    }

    /// Whether the launch only says what it would do.
    pub fn dry_run(self, is_dry: bool) -> Self {
        Self { dry_run: Some(is_dry), ..self }
    }

    /// What a worker asks for; a part that is `None` stays as the layers below have it.
    pub fn worker_resources(self, resources: Resources) -> Self {
        Self { worker: resources, ..self }
    }

    /// What a parameter server asks for; a part that is `None` stays as the layers below have it.
    pub fn ps_resources(self, resources: Resources) -> Self {
        Self { ps_resources: resources, ..self }
    }

    /// Changes the pods of a cluster after all that the settings say of them, for what has no setting. Called once for each
    /// role that the run has; a second closure changes what the first one left.
    ///
    /// The container that trains is called `fairing` (in a TFJob `tensorflow`). What is changed there is not checked: the run
    /// needs its own volumes, variables and security context.
    ///
    /// # Example
    ///
    /// ```
    /// use fairing_core::LaunchOptions;
    /// use fairing_core::topology::Role;
    ///
    /// let options = LaunchOptions::new().pod(|role, pod| {
    ///     if role == Role::Worker {
    ///         pod.spec.as_mut().expect("a pod has one").scheduler_name = Some("volcano".into());
    ///     }
    /// });
    /// ```
    #[cfg(feature = "kubernetes")]
    pub fn pod(
        mut self,
        change: impl Fn(Role, &mut k8s_openapi::api::core::v1::PodTemplateSpec) + Send + Sync + 'static,
    ) -> Self {
        self.pod.push(change);
        self
    }
}
