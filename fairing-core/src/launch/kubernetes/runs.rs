//! The runs of a namespace: finding them, and what it takes to attach to one.
//!
//! All that is needed lies in the cluster: the owner's annotations say what the run is, and a Secret holds what a caller
//! proves itself with.

use std::collections::BTreeMap;
use std::fmt;

use futures_util::AsyncReadExt as _;
use k8s_openapi::api::core::v1::{Pod, Secret};
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, ListParams, LogParams};
use kube::{Api, ResourceExt as _};

use super::client::{Cluster, ClusterError};
use super::create::api;
use super::manifest::{self, ROLE_LABEL, RUN_LABEL};
use super::scene::{self, Note, annotation};
use super::tidy::{self, Belongings};
use crate::topology::Replica;

/// Most bytes of a log that is asked for as a whole: more than nodes keep.
const MOST_LOG_BYTES: i64 = 64 << 20;

/// A run as its cluster has it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClusterRun {
    /// Its name.
    pub name: String,
    /// The annotated type.
    pub type_name: String,
    /// Who launched it, as far as that is known.
    pub user: Option<String>,
    /// When, in seconds since 1970 by the cluster's clock.
    pub created: i64,
    /// How far it has come.
    pub state: ClusterRunState,
    /// Hash of the type and of the value that it trains with, hexadecimal.
    pub value_sha256: String,
}

/// How far a run has come.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClusterRunState {
    /// Its launch is not complete. One that broke off is removed by the cluster in a while.
    Starting,
    /// It trains, or keeps its result for whoever comes for it.
    Alive,
    /// It has ended, and what is left of it is removed by the cluster in a while.
    Ended,
    /// It has failed, and what is left of it is removed by the cluster in a while.
    Failed {
        /// Why, in the cluster's words.
        reason: String,
    },
}

impl fmt::Display for ClusterRunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClusterRunState::Starting => f.write_str("starting"),
            ClusterRunState::Alive => f.write_str("alive"),
            ClusterRunState::Ended => f.write_str("ended"),
            ClusterRunState::Failed { reason } => write!(f, "failed ({reason})"),
        }
    }
}

/// What attaching to a run takes.
pub(crate) struct Attachment {
    pub(crate) run: ClusterRun,
    pub(crate) note: Note,
    /// With what a caller proves who it is.
    pub(crate) identity: Vec<u8>,
    pub(crate) belongings: Belongings,
}

impl Cluster {
    /// The runs of the namespace, the newest first.
    ///
    /// # Errors
    ///
    /// [`ClusterError`] if they cannot be listed.
    pub fn runs(&self) -> Result<Vec<ClusterRun>, ClusterError> {
        Ok(self.reactor().wait(owners(self, None))?.into_iter().map(|(run, ..)| run).collect())
    }

    /// What it takes to attach to the run `name`; `None` if there is none.
    pub(crate) fn attachment(&self, name: &str) -> Result<Option<Attachment>, ClusterError> {
        self.reactor().wait(async {
            let Some((run, owner, resource)) = owners(self, Some(name)).await?.into_iter().next() else {
                return Ok(None);
            };
            let note = scene::note(&owner).ok_or_else(|| ClusterError::Refused {
                action: format!("attach to the run `{name}`"),
                reason: "another version of fairing launched it".to_owned(),
                status: 0,
            })?;
            let secrets: Api<Secret> = self.api();
            let secret = scene::caller_secret(name);
            let found = self.ask("get the caller's identity", || secrets.get(&secret)).await?;
            let identity = found.data.and_then(|mut data| data.remove(scene::IDENTITY_KEY)).unwrap_or_default().0;
            Ok(Some(Attachment { run, note, identity, belongings: Belongings::found(name, &owner, resource) }))
        })
    }

    /// What removing the run `name` takes; `None` if there is none.
    pub(crate) fn owner(&self, name: &str) -> Result<Option<Belongings>, ClusterError> {
        self.reactor().wait(async {
            let Some((_, owner, resource)) = owners(self, Some(name)).await?.into_iter().next() else {
                return Ok(None);
            };
            Ok(Some(Belongings::found(name, &owner, resource)))
        })
    }

    /// Removes everything of the run `name`, alive or not. Returns what is left nevertheless, one thing and its reason a line.
    pub(crate) fn remove(&self, belongings: &Belongings) -> Vec<String> {
        self.reactor().wait(tidy::remove(self, belongings, false))
    }

    /// Removes what is left of runs that have ended, and says of which, or why not.
    ///
    /// # Errors
    ///
    /// [`ClusterError`] if the runs cannot be listed.
    pub fn sweep(&self) -> Result<Vec<String>, ClusterError> {
        self.reactor().wait(async {
            let mut said = Vec::new();
            for (run, owner, resource) in owners(self, None).await? {
                let name = &run.name;
                if matches!(run.state, ClusterRunState::Starting | ClusterRunState::Alive) {
                    said.push(format!("left the run `{name}` alone: it is alive"));
                    continue;
                }
                let left = tidy::remove(self, &Belongings::found(name, &owner, resource), false).await;
                match left.is_empty() {
                    true => said.push(format!("removed what the run `{name}` had left")),
                    false => said.extend(left.into_iter().map(|left| format!("not removed: {left}"))),
                }
            }
            if said.is_empty() {
                said.push(format!("nothing was left of earlier runs in the namespace `{}`", self.namespace()));
            }
            Ok(said)
        })
    }

    /// What a replica of the run `name` has written so far, its last pod's. `None` if it has no pod.
    ///
    /// # Errors
    ///
    /// [`ClusterError`] if the log cannot be had.
    pub fn logs(&self, name: &str, replica: Replica) -> Result<Option<String>, ClusterError> {
        self.reactor().wait(async {
            let pods: Api<Pod> = self.api();
            let selector = format!("{RUN_LABEL}={name},{ROLE_LABEL}={}", replica.role);
            let parameters = ListParams::default().labels(&selector);
            let list = self.ask("list the pods of a run", || pods.list(&parameters)).await?;
            let own = list.items.into_iter().filter(|pod| manifest::rank_of(pod) == Some(replica.rank.0));
            let Some(pod) = own.max_by_key(|pod| pod.metadata.creation_timestamp.clone().map(|time| time.0)) else {
                return Ok(None);
            };
            let (pod, parameters) =
                (pod.name_any(), LogParams { limit_bytes: Some(MOST_LOG_BYTES), ..LogParams::default() });
            let mut bytes = Vec::new();
            let stream = self.ask("get a log", || pods.log_stream(&pod, &parameters)).await?;
            let read = async { Box::pin(stream).read_to_end(&mut bytes).await.map_err(kube::Error::ReadEvents) };
            self.ask_once("get a log", read).await?;
            Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
        })
    }
}

/// The owners of all runs, or of one, the newest first.
async fn owners(
    cluster: &Cluster,
    name: Option<&str>,
) -> Result<Vec<(ClusterRun, DynamicObject, ApiResource)>, ClusterError> {
    let (key, value) = manifest::MANAGER_LABEL;
    let mut selector = format!("{key}={value}");
    if let Some(name) = name {
        selector += &format!(",{RUN_LABEL}={name}");
    }
    let parameters = ListParams::default().labels(&selector);
    let mut found = Vec::new();
    for resource in scene::owner_kinds() {
        let api = api(cluster, &resource);
        let list = match cluster.ask("list the runs", || api.list(&parameters)).await {
            Ok(list) => list,
            // This cluster has no such operator, or they are none of our business there.
            Err(error) if resource.group != "batch" && error.is_without() => continue,
            Err(error) => return Err(error),
        };
        for owner in list {
            let annotations = owner.annotations();
            let text = |name: &str| annotation(annotations, name);
            // Of the Jobs of a run only one is its owner.
            let (Some(type_name), Some(name)) = (text("type"), owner.labels().get(RUN_LABEL).cloned()) else {
                continue;
            };
            let created = owner.creation_timestamp().map_or(0, |time| seconds(time.0));
            let run = ClusterRun {
                name,
                type_name,
                user: text("user"),
                created,
                state: state(&owner),
                value_sha256: text("value-sha256").unwrap_or_default(),
            };
            found.push((run, owner, resource.clone()));
        }
    }
    found.sort_by_key(|(run, ..)| std::cmp::Reverse(run.created));
    Ok(found)
}

fn seconds(time: Timestamp) -> i64 {
    time.as_second()
}

/// Whether an owner has not been released.
fn is_held(owner: &DynamicObject) -> bool {
    let spec = &owner.data["spec"];
    spec["parallelism"] == 0 || spec["suspend"] == true || spec["runPolicy"]["suspend"] == true
}

/// How far the run of an owner has come.
pub(super) fn state(owner: &DynamicObject) -> ClusterRunState {
    let conditions = owner.data["status"]["conditions"].as_array();
    let holding: BTreeMap<&str, String> = conditions
        .into_iter()
        .flatten()
        .filter(|condition| condition["status"] == "True")
        .filter_map(|condition| {
            let words = ["reason", "message"].map(|key| condition[key].as_str().unwrap_or_default());
            Some((condition["type"].as_str()?, words.join(": ")))
        })
        .collect();
    // The names of Jobs, of JobSets and of TFJobs.
    let of = |kinds: &[&str]| kinds.iter().find_map(|kind| holding.get(kind).cloned());
    match (of(&["Failed", "FailureTarget"]), of(&["Complete", "SuccessCriteriaMet", "Completed", "Succeeded"])) {
        (Some(reason), _) => ClusterRunState::Failed { reason },
        (None, Some(_)) => ClusterRunState::Ended,
        (None, None) if is_held(owner) => ClusterRunState::Starting,
        (None, None) => ClusterRunState::Alive,
    }
}
