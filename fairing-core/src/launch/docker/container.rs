//! What the engine is asked to create, as values. Performs no IO.

use std::collections::HashMap;
use std::time::Duration;

use bollard::models::{
    ContainerCreateBody, EndpointSettings, HostConfig, HostConfigLogConfig, NetworkCreateRequest, NetworkingConfig,
    RestartPolicy, RestartPolicyNameEnum,
};

use super::super::LaunchPlan;
use super::engine::{Engine, EngineError};
use crate::topology::{Address, Placement, Replica, Role, Topology};

/// Label with the name of the run.
pub(super) const RUN_LABEL: &str = "fairing.dev/run";
/// Label with the role of a replica.
const ROLE_LABEL: &str = "fairing.dev/role";
/// Label with the rank of a replica.
const RANK_LABEL: &str = "fairing.dev/rank";
/// Label with the time at which something was made, in seconds since 1970 by the launcher's clock.
pub(super) const CREATED_LABEL: &str = "fairing.dev/created";
/// Label that says who made something.
pub(super) const MANAGER_LABEL: (&str, &str) = ("app.kubernetes.io/managed-by", "fairing");

/// Port of every server. Nothing is published: the containers of a run have a network of their own.
pub(super) const PORT: u16 = 7070;

/// The user and group of the replicas: no user of any system, as in images without a shell.
const USER: &str = "65532:65532";

/// Processes and threads of a replica: enough for any thread pool, too few to harm the machine.
const MOST_PROCESSES: i64 = 4096;

/// The folder for temporary files: the only one that a program may fill, beside the engine's own 64 MiB of shared memory at
/// `/dev/shm`.
const TEMPORARY: (&str, &str) = ("/tmp", "rw,nosuid,nodev,noexec,mode=1777,size=256m");

/// What one replica may use of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Thousandths of a processor core; `None`: as much as there is.
    pub millicores: Option<u64>,
    /// Bytes of memory; `None`: as much as there is.
    pub memory_bytes: Option<u64>,
}

/// The limits of both roles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RoleLimits {
    /// Of each worker.
    pub worker: Limits,
    /// Of each parameter server.
    pub ps: Limits,
}

impl RoleLimits {
    /// Whether `engine` can give each replica so many cores; engines say that it cannot only when the container is made.
    ///
    /// # Errors
    ///
    /// [`EngineError::TooFewCores`].
    pub fn check(&self, topology: &Topology, engine: &Engine) -> Result<(), EngineError> {
        let cores = engine.cores();
        let roles = topology.replicas().map(|replica| replica.role);
        let asked = roles.filter_map(|role| Some((role, self.of(role).millicores?)));
        match asked.into_iter().find(|(_, millicores)| *millicores > u64::from(cores) * 1000) {
            None => Ok(()),
            Some((role, millicores)) => Err(EngineError::TooFewCores { role, millicores, cores }),
        }
    }

    pub(super) fn of(&self, role: Role) -> Limits {
        match role {
            Role::Worker => self.worker,
            Role::Ps => self.ps,
        }
    }
}

/// Name of a replica's container.
pub(super) fn name(run: &str, replica: Replica) -> String {
    format!("{run}-{}", replica.file_name())
}

/// The servers' addresses: each replica's short name is its alias on the run's network.
pub fn addresses(topology: &Topology) -> Vec<Address> {
    let address = |server: Replica| Address::Tls { server, host: server.file_name(), port: PORT };
    topology.servers().map(address).collect()
}

/// The labels of everything that belongs to a run.
fn labels(run: &str, now: Duration) -> HashMap<String, String> {
    let created = now.as_secs().to_string();
    let pairs = [(RUN_LABEL, run), (CREATED_LABEL, &created), MANAGER_LABEL];
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

/// The private network of a run, made `now`: its containers reach each other and nothing else.
pub(super) fn network(run: &str, now: Duration) -> NetworkCreateRequest {
    NetworkCreateRequest {
        name: run.to_owned(),
        driver: Some("bridge".to_owned()),
        internal: Some(true),
        labels: Some(labels(run, now)),
        ..NetworkCreateRequest::default()
    }
}

/// The container of one replica, from the image `image`, made `now`.
pub(super) fn container(
    plan: &LaunchPlan,
    placement: &Placement,
    image: &str,
    limits: &RoleLimits,
    now: Duration,
) -> ContainerCreateBody {
    let replica = placement.replica;
    let mut labels = labels(&plan.run, now);
    labels.insert(ROLE_LABEL.to_owned(), replica.role.to_string());
    labels.insert(RANK_LABEL.to_owned(), replica.rank.to_string());
    let limits = limits.of(replica.role);
    let host = HostConfig {
        network_mode: Some(plan.run.clone()),
        nano_cpus: limits.millicores.and_then(|millicores| i64::try_from(millicores * 1_000_000).ok()),
        memory: limits.memory_bytes.and_then(|bytes| i64::try_from(bytes).ok()),
        // Swap would make a run that is over its limit slow instead of ending it.
        memory_swap: limits.memory_bytes.and_then(|bytes| i64::try_from(bytes).ok()),
        pids_limit: Some(MOST_PROCESSES),
        readonly_rootfs: Some(true),
        cap_drop: Some(vec!["ALL".to_owned()]),
        security_opt: Some(vec!["no-new-privileges".to_owned()]),
        tmpfs: Some(HashMap::from([(TEMPORARY.0.to_owned(), TEMPORARY.1.to_owned())])),
        restart_policy: Some(RestartPolicy { name: Some(RestartPolicyNameEnum::NO), maximum_retry_count: None }),
        // The launcher reads every line as it is written and keeps it; a second copy at the engine would only fill its disk.
        log_config: Some(HostConfigLogConfig { typ: Some("none".to_owned()), config: None }),
        ..HostConfig::default()
    };
    let endpoint = EndpointSettings { aliases: Some(vec![replica.file_name()]), ..EndpointSettings::default() };
    ContainerCreateBody {
        image: Some(image.to_owned()),
        // Checked to be text before anything was made.
        cmd: Some(plan.program.arguments.iter().map(|argument| argument.to_string_lossy().into_owned()).collect()),
        env: Some(environment(plan, placement)),
        user: Some(USER.to_owned()),
        labels: Some(labels),
        // The value and the identity arrive here, and its end is the launcher's end.
        open_stdin: Some(true),
        stdin_once: Some(true),
        attach_stdin: Some(true),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        tty: Some(false),
        host_config: Some(host),
        networking_config: Some(NetworkingConfig {
            endpoints_config: Some(HashMap::from([(plan.run.clone(), endpoint)])),
        }),
        ..ContainerCreateBody::default()
    }
}

/// What the engine would be asked to create for `plan`, in words.
pub fn describe(plan: &LaunchPlan, image: &str, limits: &RoleLimits) -> String {
    let mut text = format!("network {}: private, without a way out\n", plan.run);
    for placement in &plan.placements {
        let replica = placement.replica;
        let Limits { millicores, memory_bytes } = limits.of(replica.role);
        let cpu = millicores.map_or("all cores".to_owned(), |millicores| format!("{} cores", millicores as f64 / 1e3));
        let memory = memory_bytes.map_or("all memory".to_owned(), |bytes| format!("{} MiB of memory", bytes >> 20));
        text += &format!("container {}: {image}, {cpu}, {memory}\n", name(&plan.run, replica));
        text += "  user 65532, read-only but for /tmp and /dev/shm, no capabilities, no new privileges, no published port\n";
        let arguments: Vec<_> = plan.program.arguments.iter().map(|argument| argument.to_string_lossy()).collect();
        if !arguments.is_empty() {
            text += &format!("  arguments {}\n", arguments.join(" "));
        }
        // Names alone: the user's variables may hold what is nobody's business.
        let names =
            environment(plan, placement).into_iter().filter_map(|pair| Some(pair.split_once('=')?.0.to_owned()));
        text += &format!("  variables {}\n", names.collect::<Vec<_>>().join(" "));
    }
    text
}

fn environment(plan: &LaunchPlan, placement: &Placement) -> Vec<String> {
    let mut variables = super::super::tuning(placement);
    variables.extend(plan.variables.iter().map(|(name, value)| (name.clone(), value.to_string_lossy().into_owned())));
    variables.extend(placement.to_env().into_iter().map(|(name, value)| (name.to_owned(), value)));
    variables.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
}
