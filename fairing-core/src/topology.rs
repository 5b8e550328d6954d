//! Who takes part in a run, and what one of them must know.
//!
//! Pure: nothing here reads the environment or opens a socket. [`Topology`] says how many replicas of each role there
//! are, [`Placement`] is what one replica needs to find the others. The launcher writes a placement into the
//! environment with [`Placement::to_env`], the replica reads it back with [`Placement::from_env`]. In a TFJob of somebody
//! else's it is [`tf_config`] that says the same.

use std::fmt;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::Env;

pub mod tf_config;

/// The part that a replica plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Computes gradients on its share of each batch.
    Worker,
    /// Parameter server: owns a range of the parameters and applies the optimizer to it.
    Ps,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Worker => "worker",
            Role::Ps => "ps",
        })
    }
}

/// A replica's number within its role, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Rank(pub u32);

impl Rank {
    /// The rank as an index into per-rank tables.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One process of a run, shown as `worker 0` or `ps 1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Replica {
    /// What it does.
    pub role: Role,
    /// Its number within the role.
    pub rank: Rank,
}

impl Replica {
    /// The worker of this rank.
    pub fn worker(rank: u32) -> Self {
        Self { role: Role::Worker, rank: Rank(rank) }
    }

    /// The parameter server of this rank.
    pub fn ps(rank: u32) -> Self {
        Self { role: Role::Ps, rank: Rank(rank) }
    }

    /// The name used for files and objects: `worker-0`.
    pub fn file_name(self) -> String {
        format!("{}-{}", self.role, self.rank)
    }
}

impl fmt::Display for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role, self.rank)
    }
}

/// Whoever has a part in a run, shown as `worker 0` or `the caller`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Member {
    /// One of its processes.
    Replica(Replica),
    /// The process that called `launch()`.
    Caller,
}

impl Member {
    /// The name on its certificate: `worker-0`, `caller`.
    pub fn name(self) -> String {
        match self {
            Member::Replica(replica) => replica.file_name(),
            Member::Caller => "caller".to_owned(),
        }
    }
}

impl From<Replica> for Member {
    fn from(replica: Replica) -> Self {
        Member::Replica(replica)
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Member::Replica(replica) => replica.fmt(f),
            Member::Caller => f.write_str("the caller"),
        }
    }
}

/// How many replicas of each role a run has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Number of workers, at least 1.
    pub workers: NonZeroU32,
    /// Number of processes that are parameter servers and nothing else. With 0, every worker also hosts the server of
    /// its share of the parameters.
    pub ps: u32,
}

impl Topology {
    /// A topology of `workers` workers and `ps` parameter servers.
    ///
    /// # Panics
    ///
    /// If there is no worker. A checked way is to build the struct from a [`NonZeroU32`].
    pub const fn new(workers: u32, ps: u32) -> Self {
        match NonZeroU32::new(workers) {
            Some(workers) => Self { workers, ps },
            None => panic!("a topology needs at least one worker"),
        }
    }

    /// All replicas: the servers first, since workers connect to them.
    pub fn replicas(&self) -> impl Iterator<Item = Replica> + use<> {
        let servers = (0..self.ps).map(Replica::ps);
        servers.chain((0..self.workers.get()).map(Replica::worker))
    }

    /// The replicas that own a share of the parameters, in the order of their shares.
    pub fn servers(&self) -> impl Iterator<Item = Replica> + use<> {
        let this = *self;
        (0..this.server_count() as u32).map(move |index| this.server(index))
    }

    /// The replica that owns share `index` of the parameters.
    pub fn server(&self, index: u32) -> Replica {
        if self.ps == 0 { Replica::worker(index) } else { Replica::ps(index) }
    }

    /// The replica that hosts the coordinator: the one with the first share.
    pub fn coordinator(&self) -> Replica {
        self.server(0)
    }

    /// Whether the workers host the parameters themselves.
    pub fn is_serverless(&self) -> bool {
        self.ps == 0
    }

    /// Number of workers, as an index bound.
    pub fn worker_count(&self) -> usize {
        self.workers.get() as usize
    }

    /// Number of shares of the parameters, as an index bound.
    pub fn server_count(&self) -> usize {
        if self.ps == 0 { self.worker_count() } else { self.ps as usize }
    }
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |n: u32, one: &str| if n == 1 { format!("{n} {one}") } else { format!("{n} {one}s") };
        let workers = plural(self.workers.get(), "worker");
        match self.ps {
            0 => write!(f, "{workers} that share the parameters"),
            ps => write!(f, "{workers} + {}", plural(ps, "parameter server")),
        }
    }
}

/// When a worker's gradient is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Once all workers have pushed: the mean of their gradients, added in rank order. The answer repeats to the bit.
    #[default]
    Sync,
    /// On arrival. No worker waits for another one.
    Async,
    /// On arrival, but a worker that is more than `staleness` completed steps ahead of the slowest one waits for it.
    Bounded {
        /// Steps by which the fastest worker may be ahead.
        staleness: u32,
    },
}

impl Mode {
    /// Whether all workers make each step together.
    pub fn is_sync(self) -> bool {
        self == Mode::Sync
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mode::Sync => f.write_str("sync"),
            Mode::Async => f.write_str("async"),
            Mode::Bounded { staleness } => write!(f, "async, staleness {staleness}"),
        }
    }
}

/// Where a parameter server listens, for example `unix:/run/x/ps-0.sock`, `memory:ps-0` or `tls:ps-0@fashion-ps-0:7700`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// A Unix socket in a private folder.
    Unix(PathBuf),
    /// A name within this process, for tests and `train_in_memory`.
    Memory(String),
    /// A TCP port behind which a replica proves by its certificate that it is `server`. Whoever answers there without
    /// is nobody: host and port say where to ask, not whom.
    Tls {
        /// Who must answer.
        server: Replica,
        /// A name that is resolved at each attempt, or an IP address without brackets.
        host: String,
        /// Where `server` listens.
        port: u16,
    },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Memory(name) => write!(f, "memory:{name}"),
            Address::Tls { server, host, port } if host.contains(':') => {
                write!(f, "tls:{}@[{host}]:{port}", server.file_name())
            }
            Address::Tls { server, host, port } => write!(f, "tls:{}@{host}:{port}", server.file_name()),
        }
    }
}

impl FromStr for Address {
    type Err = PlacementError;

    fn from_str(text: &str) -> Result<Self, PlacementError> {
        let address = match text.split_once(':') {
            Some(("unix", path)) => Some(Address::Unix(path.into())),
            Some(("memory", name)) => Some(Address::Memory(name.to_owned())),
            Some(("tls", rest)) => tls_address(rest),
            _ => None,
        };
        address.ok_or_else(|| PlacementError::Invalid { name: SERVERS, value: text.to_owned() })
    }
}

/// Reads what stands behind `tls:`.
fn tls_address(text: &str) -> Option<Address> {
    let (server, place) = text.split_once('@')?;
    let (host, port) = place.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(host) => host.strip_suffix(']').filter(|host| host.contains(':'))?,
        None => host,
    };
    // What would read back as another address, or as two in a list of them, is none.
    let address = Address::Tls { server: replica(server)?, host: host.to_owned(), port: port.parse().ok()? };
    (!host.is_empty() && !host.contains(['@', '[', ']', ',']) && address.to_string()[4..] == *text).then_some(address)
}

/// Inverse of [`Replica::file_name`].
fn replica(name: &str) -> Option<Replica> {
    let (role, rank) = name.split_once('-')?;
    let role = match role {
        "worker" => Role::Worker,
        "ps" => Role::Ps,
        _ => return None,
    };
    Some(Replica { role, rank: Rank(rank.parse().ok()?) })
}

/// What one replica needs to know to take its part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// Name of the run, unique on this machine.
    pub run: String,
    /// Who this is.
    pub replica: Replica,
    /// Who takes part.
    pub topology: Topology,
    /// Seed of data order, initial parameters and the process-wide generator.
    pub seed: u64,
    /// Compute threads that this replica may use.
    pub threads: u32,
    /// Addresses of the replicas of [`Topology::servers`], in that order.
    pub servers: Vec<Address>,
    /// The folder behind `worker.data_dir()`.
    pub data_dir: Option<PathBuf>,
    /// When a worker's gradient is applied.
    pub mode: Mode,
    /// How long the run is held for a lost worker to be started again; zero if its loss is the run's failure.
    pub rejoin: Duration,
    /// How long replicas wait for each other before training. Default [`JOIN`].
    pub join: Duration,
    /// How long the coordinator keeps the result of a finished run for its caller. Default [`KEEP_RESULT`].
    pub keep_result: Duration,
    /// Whether worker 0 stays until the result has been fetched: where its end is that of the run, and takes the coordinator
    /// with it.
    pub first_stays: bool,
}

/// How long replicas wait for each other before training: enough for a slow data set, or an image pull on a cold node. This
/// crate's own tests wait less long for the end of it.
pub const JOIN: Duration = Duration::from_secs(if cfg!(test) { 20 } else { 600 });

/// How long the coordinator keeps the result of a finished run for its caller: for one that waits, the time of a lost
/// connection; for one that left, a lunch.
pub const KEEP_RESULT: Duration = Duration::from_secs(3600);

const RUN: &str = "FAIRING_PLACEMENT_RUN";
const ROLE: &str = "FAIRING_PLACEMENT_ROLE";
/// The variable with a replica's rank: the one that differs between replicas of a role.
pub const RANK: &str = "FAIRING_PLACEMENT_RANK";
const WORKERS: &str = "FAIRING_PLACEMENT_WORKERS";
const PS: &str = "FAIRING_PLACEMENT_PS";
const SEED: &str = "FAIRING_PLACEMENT_SEED";
const THREADS: &str = "FAIRING_PLACEMENT_THREADS";
const SERVERS: &str = "FAIRING_PLACEMENT_SERVERS";
const DATA: &str = "FAIRING_PLACEMENT_DATA";
const STALENESS: &str = "FAIRING_PLACEMENT_STALENESS";
const REJOIN: &str = "FAIRING_PLACEMENT_REJOIN_MS";
const JOIN_MS: &str = "FAIRING_PLACEMENT_JOIN_MS";
const KEEP_RESULT_MS: &str = "FAIRING_PLACEMENT_KEEP_RESULT_MS";
const FIRST_STAYS: &str = "FAIRING_PLACEMENT_FIRST_STAYS";

/// The variable with the folder that holds a replica's payload, where no launcher is at its standard input. No part of
/// [`Placement`]: it says how the replica gets what it trains with, see [`crate::lifeline`], not what it is.
pub const FOLDER: &str = "FAIRING_PLACEMENT_FOLDER";

/// Every variable that carries a placement; its presence makes a process a replica.
pub const PLACEMENT_VARIABLES: [&str; 15] = [
    RUN,
    ROLE,
    RANK,
    WORKERS,
    PS,
    SEED,
    THREADS,
    SERVERS,
    DATA,
    STALENESS,
    REJOIN,
    JOIN_MS,
    KEEP_RESULT_MS,
    FIRST_STAYS,
    FOLDER,
];

/// How [`Mode::Async`] is written into [`STALENESS`]; it is absent in sync mode.
const UNBOUNDED: &str = "unbounded";

/// Failure to read a placement. Returned by [`Placement::from_env`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlacementError {
    /// A variable is absent.
    #[error("`{name}` is not set; a replica is started by fairing's launcher, not by hand")]
    Missing {
        /// The variable.
        name: &'static str,
    },
    /// A variable has a value that cannot be meant.
    #[error("`{name}` has the unusable value `{value}`")]
    Invalid {
        /// The variable.
        name: &'static str,
        /// What it held.
        value: String,
    },
}

impl Placement {
    /// Whether the environment makes this process a replica.
    pub fn is_in(env: &impl Env) -> bool {
        env.get(ROLE).is_some()
    }

    /// Variables that tell a process which part it plays.
    pub fn to_env(&self) -> Vec<(&'static str, String)> {
        let servers = self.servers.iter().map(Address::to_string).collect::<Vec<_>>().join(",");
        let mut variables = vec![
            (RUN, self.run.clone()),
            (ROLE, self.replica.role.to_string()),
            (RANK, self.replica.rank.to_string()),
            (WORKERS, self.topology.workers.to_string()),
            (PS, self.topology.ps.to_string()),
            (SEED, self.seed.to_string()),
            (THREADS, self.threads.to_string()),
            (SERVERS, servers),
        ];
        if let Some(data_dir) = &self.data_dir {
            variables.push((DATA, data_dir.display().to_string()));
        }
        match self.mode {
            Mode::Sync => {}
            Mode::Async => variables.push((STALENESS, UNBOUNDED.to_owned())),
            Mode::Bounded { staleness } => variables.push((STALENESS, staleness.to_string())),
        }
        if !self.rejoin.is_zero() {
            variables.push((REJOIN, self.rejoin.as_millis().to_string()));
        }
        for (name, duration, default) in [(JOIN_MS, self.join, JOIN), (KEEP_RESULT_MS, self.keep_result, KEEP_RESULT)] {
            if duration != default {
                variables.push((name, duration.as_millis().to_string()));
            }
        }
        if self.first_stays {
            variables.push((FIRST_STAYS, "1".to_owned()));
        }
        variables
    }

    /// Inverse of [`Placement::to_env`].
    ///
    /// # Errors
    ///
    /// [`PlacementError`] naming the first variable that is missing or does not parse, and a rank outside its role.
    pub fn from_env(env: &impl Env) -> Result<Self, PlacementError> {
        let text = |name| env.get(name).ok_or(PlacementError::Missing { name });
        let role = match text(ROLE)?.as_str() {
            "worker" => Role::Worker,
            "ps" => Role::Ps,
            other => return Err(PlacementError::Invalid { name: ROLE, value: other.to_owned() }),
        };
        let topology = Topology { workers: parse(env, WORKERS)?, ps: parse(env, PS)? };
        let rank: u32 = parse(env, RANK)?;
        let bound = match role {
            Role::Worker => topology.workers.get(),
            Role::Ps => topology.ps,
        };
        if rank >= bound {
            return Err(PlacementError::Invalid { name: RANK, value: rank.to_string() });
        }
        let servers = text(SERVERS)?;
        let servers = servers.split(',').map(Address::from_str).collect::<Result<Vec<_>, _>>()?;
        if servers.len() != topology.server_count() {
            return Err(PlacementError::Invalid { name: SERVERS, value: text(SERVERS)? });
        }
        let duration = |name, default| match env.get(name) {
            None => Ok(default),
            Some(_) => parse(env, name).map(Duration::from_millis),
        };
        Ok(Self {
            run: text(RUN)?,
            replica: Replica { role, rank: Rank(rank) },
            topology,
            seed: parse(env, SEED)?,
            threads: parse(env, THREADS)?,
            servers,
            data_dir: env.get(DATA).map(PathBuf::from),
            mode: match env.get(STALENESS).as_deref() {
                None => Mode::Sync,
                Some(UNBOUNDED) => Mode::Async,
                Some(_) => Mode::Bounded { staleness: parse(env, STALENESS)? },
            },
            rejoin: duration(REJOIN, Duration::ZERO)?,
            join: duration(JOIN_MS, JOIN)?,
            keep_result: duration(KEEP_RESULT_MS, KEEP_RESULT)?,
            first_stays: env.get(FIRST_STAYS).is_some(),
        })
    }
}

fn parse<T: FromStr>(env: &impl Env, name: &'static str) -> Result<T, PlacementError> {
    let value = env.get(name).ok_or(PlacementError::Missing { name })?;
    value.parse().map_err(|_| PlacementError::Invalid { name, value })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn placement() -> Placement {
        Placement {
            run: "fashion-1".into(),
            replica: Replica::worker(2),
            topology: Topology::new(3, 2),
            seed: 7,
            threads: 4,
            servers: vec![Address::Unix("/run/x/ps-0.sock".into()), Address::Unix("/run/x/ps-1.sock".into())],
            data_dir: Some("/data/set".into()),
            mode: Mode::Bounded { staleness: 4 },
            rejoin: Duration::from_secs(30),
            join: Duration::from_secs(7),
            keep_result: Duration::from_secs(8),
            first_stays: true,
        }
    }

    #[test]
    fn placement_survives_the_environment() {
        let modes = [Mode::Sync, Mode::Async, Mode::Bounded { staleness: 0 }];
        let sparse = modes.map(|mode| Placement {
            mode,
            rejoin: Duration::ZERO,
            join: JOIN,
            keep_result: KEEP_RESULT,
            first_stays: false,
            data_dir: None,
            ..placement()
        });
        for written in [placement()].into_iter().chain(sparse) {
            let env: BTreeMap<String, String> = written.to_env().into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
            assert!(Placement::is_in(&env));
            assert_eq!(Placement::from_env(&env).unwrap(), written);
        }
    }

    #[test]
    fn addresses_survive_their_text() {
        let tls = |server, host: &str| Address::Tls { server, host: host.into(), port: 7700 };
        let addresses = [
            (Address::Unix("/run/x/ps-0.sock".into()), "unix:/run/x/ps-0.sock"),
            (Address::Memory("ps-0".into()), "memory:ps-0"),
            (tls(Replica::ps(0), "fashion-1-ps-0"), "tls:ps-0@fashion-1-ps-0:7700"),
            (tls(Replica::worker(12), "a.b.svc"), "tls:worker-12@a.b.svc:7700"),
            (tls(Replica::worker(0), "127.0.0.1"), "tls:worker-0@127.0.0.1:7700"),
            (tls(Replica::ps(1), "fe80::1"), "tls:ps-1@[fe80::1]:7700"),
        ];
        for (address, text) in &addresses {
            assert_eq!(address.to_string(), *text);
            assert_eq!(text.parse().as_ref(), Ok(address));
        }
        let servers: Vec<_> = addresses[2..4].iter().map(|(address, _)| address.clone()).collect();
        let written = Placement { servers, ..placement() };
        let env: BTreeMap<String, String> = written.to_env().into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        assert_eq!(Placement::from_env(&env).unwrap(), written);
    }

    #[test]
    fn a_text_that_names_no_server_host_or_port_is_no_address() {
        for text in [
            "",
            "tls:",
            "tls:host:1",
            "tls:caller@host:1",
            "tls:ps@host:1",
            "tls:ps-@host:1",
            "tls:ps-01@host:1",
            "tls:ps-+1@host:1",
            "tls:chief-0@host:1",
            "tls:ps-0@:1",
            "tls:ps-0@host",
            "tls:ps-0@host:",
            "tls:ps-0@host:65536",
            "tls:ps-0@host:01",
            "tls:ps-0@fe80::1:1",
            "tls:ps-0@[host]:1",
            "tls:ps-0@[fe80::1:1",
            "tls:ps-0@a@b:1",
            "tcp:host:1",
        ] {
            let expected = PlacementError::Invalid { name: SERVERS, value: text.to_owned() };
            assert_eq!(text.parse::<Address>(), Err(expected));
        }
    }

    #[test]
    fn without_servers_the_workers_are_the_servers() {
        let topology = Topology::new(3, 0);
        assert_eq!(topology.servers().collect::<Vec<_>>(), topology.replicas().collect::<Vec<_>>());
        assert_eq!((topology.coordinator(), topology.server_count()), (Replica::worker(0), 3));
        assert_eq!(Topology::new(3, 2).servers().collect::<Vec<_>>(), [Replica::ps(0), Replica::ps(1)]);
    }

    #[test]
    fn every_broken_variable_is_named() {
        const OPTIONAL: [&str; 7] = [DATA, STALENESS, REJOIN, JOIN_MS, KEEP_RESULT_MS, FIRST_STAYS, FOLDER];
        let whole: BTreeMap<String, String> =
            placement().to_env().into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        for name in PLACEMENT_VARIABLES.into_iter().filter(|name| !OPTIONAL.contains(name)) {
            let mut without = whole.clone();
            without.remove(name);
            assert_eq!(Placement::from_env(&without).unwrap_err(), PlacementError::Missing { name });
        }
        for (name, value) in [
            (ROLE, "chief"),
            (RANK, "3"),
            (WORKERS, "0"),
            (SEED, "-1"),
            (SERVERS, "unix:/one"),
            (STALENESS, "-1"),
            (REJOIN, "1s"),
            (JOIN_MS, ""),
            (KEEP_RESULT_MS, "1h"),
        ] {
            let mut broken = whole.clone();
            broken.insert(name.to_owned(), value.to_owned());
            let expected = PlacementError::Invalid { name, value: value.to_owned() };
            assert_eq!(Placement::from_env(&broken).unwrap_err(), expected);
        }
    }
}
