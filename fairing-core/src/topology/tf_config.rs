//! `TF_CONFIG`, by which the Training Operator tells the processes of a TFJob who they are and where the others listen.
//!
//! Pure. A TFJob that somebody else wrote runs any program in its pods; one that uses fairing then takes the part that this
//! variable gives it, without a launcher of fairing's. Chief and Master are worker 0, and the other workers come behind it.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;

use serde::Deserialize;

use super::{Address, Replica, Topology};

/// The variable.
pub const TF_CONFIG: &str = "TF_CONFIG";

/// Names the folder, a mounted Secret, that holds what a replica of `TF_CONFIG` proves with who it is: the file
/// `identity`, with the bytes of [`Identity::to_bytes`](crate::secure::Identity::to_bytes). Each replica needs its own, all
/// issued by one [`Authority`](crate::secure::Authority); the chief's is that of worker 0, and that of the TFJob's worker `I`
/// behind a chief is that of worker `I + 1`.
pub const IDENTITY_FOLDER: &str = "FAIRING_IDENTITY";

/// The file in the folder that [`IDENTITY_FOLDER`] names.
pub const IDENTITY_FILE: &str = "identity";

/// Gives encryption and identities up for the replicas of `TF_CONFIG`, if its value is [`ANYONE`]: whoever reaches their
/// ports can read the parameters, change them and take part.
pub const PLAINTEXT: &str = "FAIRING_PLAINTEXT_TF_CONFIG";

/// The one value of [`PLAINTEXT`].
pub const ANYONE: &str = "yes-anyone-may-join";

/// Who a process is and who takes part, as `TF_CONFIG` says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TfConfig {
    /// This process.
    pub replica: Replica,
    /// Who takes part.
    pub topology: Topology,
    /// Where the replicas of [`Topology::servers`] listen, in that order.
    pub servers: Vec<Address>,
}

/// Failure to read `TF_CONFIG`. Returned by [`TfConfig::parse`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TfConfigError {
    /// It is not what the Training Operator writes.
    #[error(
        "`TF_CONFIG` cannot be read (expected {{\"cluster\": {{\"worker\": [\"host:port\"]}}, \"task\": {{\"type\": \"worker\", \"index\": 0}}}})"
    )]
    Unreadable {
        /// Where it is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// A part of a TFJob that has no part in a run.
    #[error(
        "`TF_CONFIG` makes this process an evaluator, which fairing does not have: all workers evaluate together (take `Evaluator` out of the TFJob)"
    )]
    Evaluator,
    /// The role is none that the Training Operator knows.
    #[error("`TF_CONFIG` gives this process the unknown role `{role}` (known: chief, master, worker, ps)")]
    Role {
        /// What it says.
        role: String,
    },
    /// The process is not among those of its role.
    #[error("`TF_CONFIG` makes this process {role} {index}, but its cluster has {count} of that role")]
    Index {
        /// The role.
        role: String,
        /// The index.
        index: u32,
        /// How many there are.
        count: usize,
    },
    /// More than one process would be worker 0.
    #[error("the cluster in `TF_CONFIG` has {count} chiefs and masters (one of them at most is worker 0)")]
    Chiefs {
        /// How many there are.
        count: usize,
    },
    /// Nobody computes gradients.
    #[error("the cluster in `TF_CONFIG` has no worker")]
    NoWorkers,
    /// An entry of the cluster is no address.
    #[error("the cluster in `TF_CONFIG` has the entry `{entry}`, which is no host:port")]
    Address {
        /// The entry.
        entry: String,
    },
    /// Two processes would listen at one address.
    #[error("the cluster in `TF_CONFIG` has `{entry}` twice")]
    Twice {
        /// The entry.
        entry: String,
    },
}

#[derive(Deserialize)]
struct Written {
    cluster: BTreeMap<String, Vec<String>>,
    task: Task,
}

#[derive(Deserialize)]
struct Task {
    #[serde(rename = "type")]
    role: String,
    index: u32,
}

impl TfConfig {
    /// Reads the variable's value.
    ///
    /// # Errors
    ///
    /// [`TfConfigError`] with the first thing that is wrong.
    pub fn parse(text: &str) -> Result<Self, TfConfigError> {
        let written: Written = serde_json::from_str(text).map_err(|source| TfConfigError::Unreadable { source })?;
        // Some versions of the operator write kinds as the TFJob does: `Chief`.
        let cluster: BTreeMap<String, &Vec<String>> =
            written.cluster.iter().map(|(role, entries)| (role.to_lowercase(), entries)).collect();
        let of = |role: &str| cluster.get(role).map_or(&[] as &[String], |entries| entries.as_slice());
        let chiefs = [of("chief"), of("master")].concat();
        if chiefs.len() > 1 {
            return Err(TfConfigError::Chiefs { count: chiefs.len() });
        }
        let workers = [&chiefs, of("worker")].concat();
        let servers = of("ps");
        // An evaluator among the others takes no part, and need not be known.
        let mut seen = BTreeSet::new();
        if let Some(entry) = workers.iter().chain(servers).find(|entry| !seen.insert(*entry)) {
            return Err(TfConfigError::Twice { entry: entry.clone() });
        }
        let Task { role, index } = written.task;
        let role = role.to_lowercase();
        let count = of(&role).len();
        let (behind, make): (u32, fn(u32) -> Replica) = match role.as_str() {
            "chief" | "master" => (0, Replica::worker),
            "worker" => (chiefs.len() as u32, Replica::worker),
            "ps" => (0, Replica::ps),
            "evaluator" => return Err(TfConfigError::Evaluator),
            _ => return Err(TfConfigError::Role { role }),
        };
        if index as usize >= count {
            return Err(TfConfigError::Index { role, index, count });
        }
        let too_many = |_| TfConfigError::NoWorkers;
        let count = |entries: &[String]| u32::try_from(entries.len()).map_err(too_many);
        let workers_count = NonZeroU32::new(count(&workers)?).ok_or(TfConfigError::NoWorkers)?;
        let topology = Topology { workers: workers_count, ps: count(servers)? };
        let hosts = if servers.is_empty() { &workers[..] } else { servers };
        let servers =
            topology.servers().zip(hosts).map(|(server, entry)| address(server, entry)).collect::<Result<_, _>>()?;
        Ok(Self { replica: make(index + behind), topology, servers })
    }
}

fn address(server: Replica, entry: &str) -> Result<Address, TfConfigError> {
    // As in a placement, where the same rules hold.
    format!("tls:{}@{entry}", server.file_name())
        .parse()
        .map_err(|_| TfConfigError::Address { entry: entry.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is understood, in short; or what is said.
    fn read(text: &str) -> String {
        match TfConfig::parse(text) {
            Ok(TfConfig { replica, topology, servers }) => {
                let servers: Vec<_> = servers.iter().map(ToString::to_string).collect();
                format!("{replica} of {topology} at {}", servers.join(" "))
            }
            Err(error) => error.to_string(),
        }
    }

    fn task(cluster: &str, role: &str, index: u32) -> String {
        read(&format!(
            r#"{{"cluster": {cluster}, "task": {{"type": "{role}", "index": {index}}}, "environment": "cloud"}}"#
        ))
    }

    #[test]
    fn a_process_finds_its_part() {
        let plain = r#"{"ps": ["a-ps-0.ns.svc:2222"], "worker": ["a-worker-0.ns.svc:2222", "a-worker-1.ns.svc:2222"]}"#;
        let at = "of 2 workers + 1 parameter server at tls:ps-0@a-ps-0.ns.svc:2222";
        assert_eq!(task(plain, "worker", 1), format!("worker 1 {at}"));
        assert_eq!(task(plain, "ps", 0), format!("ps 0 {at}"));
        // Workers behind a chief shift by one, and without servers all of them host the parameters.
        for chief in ["chief", "master", "Chief"] {
            let cluster = format!(r#"{{"{chief}": ["c:1"], "worker": ["w0:1", "w1:1"]}}"#);
            let at = "of 3 workers that share the parameters at tls:worker-0@c:1 tls:worker-1@w0:1 tls:worker-2@w1:1";
            assert_eq!(task(&cluster, chief, 0), format!("worker 0 {at}"));
            assert_eq!(task(&cluster, "worker", 1), format!("worker 2 {at}"));
        }
        let alone = r#"{"chief": ["c:1"], "ps": ["[::1]:7"], "evaluator": ["e:1"]}"#;
        assert_eq!(task(alone, "chief", 0), "worker 0 of 1 worker + 1 parameter server at tls:ps-0@[::1]:7");
    }

    #[test]
    fn what_cannot_be_meant_is_named() {
        let cluster = r#"{"chief": ["c:1"], "worker": ["w0:1"], "evaluator": ["e:1"]}"#;
        assert!(task(cluster, "evaluator", 0).contains("evaluator, which fairing does not have"));
        assert_eq!(
            task(cluster, "worker", 1),
            "`TF_CONFIG` makes this process worker 1, but its cluster has 1 of that role"
        );
        assert_eq!(task(cluster, "ps", 0), "`TF_CONFIG` makes this process ps 0, but its cluster has 0 of that role");
        assert!(task(cluster, "boss", 0).contains("unknown role `boss`"));
        assert!(task(r#"{"chief": ["c:1"], "master": ["m:1"]}"#, "chief", 0).contains("2 chiefs and masters"));
        assert!(task(r#"{"ps": ["p:1"]}"#, "ps", 0).contains("no worker"));
        assert!(task(r#"{"ps": ["a:1"], "worker": ["a:1"]}"#, "ps", 0).contains("`a:1` twice"));
        for entry in ["a", "a:", "a:x", ":1", "a:1,b:2", "a:70000", "x@a:1"] {
            let cluster = format!(r#"{{"worker": ["{entry}"]}}"#);
            assert!(task(&cluster, "worker", 0).contains(&format!("`{entry}`, which is no host:port")), "{entry}");
        }
        for text in [
            "",
            "{",
            "[]",
            "{}",
            r#"{"cluster": {}}"#,
            r#"{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker"}}"#,
            r#"{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": -1}}"#,
            r#"{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": "0"}}"#,
            // Dynamic workers, of whom a process knows some only.
            r#"{"cluster": {"worker": {"0": "a:1"}}, "task": {"type": "worker", "index": 0}}"#,
        ] {
            assert!(read(text).starts_with("`TF_CONFIG` cannot be read"), "{text}");
        }
    }
}
