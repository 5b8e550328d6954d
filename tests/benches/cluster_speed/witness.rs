//! What happens to the objects of the namespace, as the API server tells it to a client of the benchmark's own.

use std::fmt::Debug;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, Secret, Service};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;

use crate::{PATIENCE, now_ms};

/// Between two looks at what has been seen.
const NAP: Duration = Duration::from_millis(2);

/// Sees everything from its making on.
#[derive(Clone, Default)]
pub(crate) struct Witness {
    seen: Arc<Mutex<Vec<Seen>>>,
}

/// One change of an object.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// When it was heard of, in ms.
    pub(crate) at: f64,
    pub(crate) kind: &'static str,
    pub(crate) name: String,
    pub(crate) state: State,
}

/// How far an object has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum State {
    /// It is there, and of a pod no more is known.
    There,
    /// The container runs.
    Running,
    /// The container has ended.
    Ended,
    Deleted,
}

impl Witness {
    pub(crate) fn start(runtime: &Runtime, client: &Client, namespace: &str) -> Self {
        let witness = Self::default();
        let api = |client: &Client| client.clone();
        runtime.spawn(witness.clone().watch::<Pod>("pod", Api::namespaced(api(client), namespace), pod_state));
        runtime.spawn(witness.clone().watch::<Job>("job", Api::namespaced(api(client), namespace), |_| State::There));
        runtime.spawn(
            witness.clone().watch::<Secret>("secret", Api::namespaced(api(client), namespace), |_| State::There),
        );
        runtime.spawn(
            witness.clone().watch::<Service>("service", Api::namespaced(api(client), namespace), |_| State::There),
        );
        witness
    }

    async fn watch<K>(self, kind: &'static str, api: Api<K>, state: fn(&K) -> State)
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + Debug
            + DeserializeOwned
            + Send
            + 'static,
    {
        let mut events = pin!(watcher(api, Config::default()).default_backoff());
        while let Some(event) = events.next().await {
            let (object, state) = match event {
                Ok(Event::Apply(object) | Event::InitApply(object)) => {
                    let state = state(&object);
                    (object, state)
                }
                Ok(Event::Delete(object)) => (object, State::Deleted),
                _ => continue,
            };
            let seen = Seen { at: now_ms(), kind, name: object.name_any(), state };
            self.seen.lock().unwrap_or_else(PoisonError::into_inner).push(seen);
        }
    }

    /// What was seen behind the time `since`.
    pub(crate) fn since(&self, since: f64) -> Vec<Seen> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().filter(|seen| seen.at >= since).cloned().collect()
    }

    /// Waits until `count` pods whose names begin with `prefix` have come so far.
    pub(crate) fn wait(&self, prefix: &str, count: usize, state: State, since: f64) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while pods(&self.since(since), prefix, state).count() < count {
            anyhow::ensure!(
                Instant::now() < deadline,
                "{count} pods `{prefix}...` are not {state:?} within {PATIENCE:?}"
            );
            thread::sleep(NAP);
        }
        Ok(())
    }
}

/// The pods whose names begin with `prefix` and that have come so far, each as it was first seen so.
pub(crate) fn pods<'a>(seen: &'a [Seen], prefix: &'a str, state: State) -> impl Iterator<Item = &'a Seen> {
    let is_it = move |one: &Seen| one.kind == "pod" && one.name.starts_with(prefix) && one.state >= state;
    let is_first =
        move |index: usize, one: &Seen| !seen[..index].iter().any(|before| is_it(before) && before.name == one.name);
    seen.iter().enumerate().filter(move |(index, one)| is_it(one) && is_first(*index, one)).map(|(_, one)| one)
}

fn pod_state(pod: &Pod) -> State {
    let containers = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    let state = containers.and_then(|containers| containers.first()?.state.as_ref());
    match state {
        Some(state) if state.terminated.is_some() => State::Ended,
        Some(state) if state.running.is_some() => State::Running,
        _ => State::There,
    }
}
