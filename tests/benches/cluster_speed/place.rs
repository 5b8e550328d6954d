//! Where everything is measured: a namespace of the test cluster, and a user who may do there what a launch takes.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, Secret, Service};
use kube::api::ListParams;
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::audit::Audit;
use crate::witness::Witness;
use crate::{PATIENCE, replica};

/// Everything is in this namespace.
const NAMESPACE: &str = "speed";

/// The launcher's service account, so that its requests can be told from all others.
const ACCOUNT: &str = "launcher";

/// Who launches, as the audit log names it.
pub(crate) const USER: &str = "system:serviceaccount:speed:launcher";

pub(crate) struct Place {
    pub(crate) runtime: Runtime,
    pub(crate) client: Client,
    pub(crate) witness: Witness,
    pub(crate) audit: Audit,
    /// The state folder of the test cluster.
    pub(crate) cluster: PathBuf,
    repository: String,
    folder: TempDir,
}

impl Place {
    pub(crate) fn make() -> anyhow::Result<Self> {
        let variable = |name: &str| {
            std::env::var(name).ok().with_context(|| {
                format!(
                    "{name} is not set: this program measures the test cluster; run `tests/cluster/run --with kwok cargo run \
                     -p fairing-tests --bin cluster_speed`"
                )
            })
        };
        let (cluster, repository) = (PathBuf::from(variable("TEST_CLUSTER")?), variable("FAIRING_REPOSITORY")?);
        kubectl(&["create", "namespace", NAMESPACE], "")?;
        // Pods are refused as long as a namespace has no service account, which takes a moment.
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = kubectl(&["get", "serviceaccount", "default"], "") {
            anyhow::ensure!(Instant::now() < deadline, "the namespace does not get its service account: {error:#}");
            thread::sleep(Duration::from_millis(50));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let client = runtime.block_on(Client::try_default())?;
        let witness = Witness::start(&runtime, &client, NAMESPACE);
        let audit = Audit::new(cluster.join("audit.log"));
        let folder = tempfile::Builder::new().prefix("cluster-speed-").tempdir()?;
        let place = Self { runtime, client, witness, audit, cluster, repository, folder };
        place.make_user()?;
        Ok(place)
    }

    /// A user with the rights that a dry run prints, and no others.
    fn make_user(&self) -> anyhow::Result<()> {
        let admin = PathBuf::from(std::env::var_os("KUBECONFIG").context("KUBECONFIG is not set")?);
        let described = self.launcher(3, Duration::ZERO, &admin)?.env("FAIRING_DRY_RUN", "1").output()?;
        let (described, error) = (text(&described.stdout), text(&described.stderr));
        let role = described.rsplit("---\n").next().filter(|last| last.contains("kind: Role"));
        kubectl(&["apply", "--filename", "-"], role.with_context(|| format!("a dry run printed no Role: {error}"))?)?;
        kubectl(&["create", "serviceaccount", ACCOUNT], "")?;
        let account = format!("--serviceaccount={NAMESPACE}:{ACCOUNT}");
        kubectl(&["create", "rolebinding", ACCOUNT, "--role=fairing", &account], "")?;
        let control = Command::new(self.cluster.join("control")).args(["kubeconfig", NAMESPACE, ACCOUNT]).output()?;
        anyhow::ensure!(control.status.success(), "no kubeconfig: {}", text(&control.stderr));
        Ok(std::fs::write(self.kubeconfig(), control.stdout)?)
    }

    fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    /// This program as the launcher of so many replicas, one server for nine workers, which train for so long.
    pub(crate) fn launch(&self, replicas: u32, training: Duration) -> anyhow::Result<Command> {
        self.launcher(replicas, training, &self.kubeconfig())
    }

    fn launcher(&self, replicas: u32, training: Duration, kubeconfig: &Path) -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("FAIRING_") || name.starts_with("RUST_") || name == "TERM" {
                command.env_remove(name.as_ref());
            }
        }
        let servers = replicas.div_ceil(10);
        command
            .arg(replica::ARGUMENT)
            .arg(training.as_millis().to_string())
            .env("KUBECONFIG", kubeconfig)
            .env("FAIRING_TARGET", "kubernetes")
            .env("FAIRING_NAMESPACE", NAMESPACE)
            .env("FAIRING_REPOSITORY", &self.repository)
            .env("FAIRING_WORKERS", (replicas - servers).to_string())
            .env("FAIRING_PS", servers.to_string())
            .env("FAIRING_RUNS", self.folder.path().join("runs"))
            .env("FAIRING_CACHE", self.folder.path().join("cache"))
            .current_dir(self.folder.path())
            .stdin(Stdio::null());
        Ok(command)
    }

    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    /// What is there now of what runs are made of.
    pub(crate) fn left(&self) -> anyhow::Result<Vec<String>> {
        self.runtime.block_on(async {
            let (pods, jobs, secrets, services) = tokio::try_join!(
                names(self.api::<Pod>()),
                names(self.api::<Job>()),
                names(self.api::<Secret>()),
                names(self.api::<Service>())
            )?;
            Ok([pods, jobs, secrets, services].concat())
        })
    }
}

async fn names<K>(api: Api<K>) -> kube::Result<Vec<String>>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned,
{
    let list = api.list(&ListParams::default()).await?;
    Ok(list.iter().map(|object| format!("{} {}", K::kind(&()), object.name_any())).collect())
}

/// Runs kubectl in the namespace, with `input` at its standard input.
pub(crate) fn kubectl(arguments: &[&str], input: &str) -> anyhow::Result<()> {
    let mut command = Command::new("kubectl");
    command.args(["--namespace", NAMESPACE]).args(arguments);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().expect("piped").write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    anyhow::ensure!(output.status.success(), "kubectl {}: {}", arguments.join(" "), text(&output.stderr));
    Ok(())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}
