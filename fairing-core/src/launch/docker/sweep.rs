//! What earlier runs have left at the engine: found by its labels, and removed.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;

use bollard::Docker;
use bollard::models::{ContainerSummary, ContainerSummaryStateEnum, ImageSummary, Network};
use bollard::query_parameters as query;

use super::build::UNFINISHED;
use super::container::{CREATED_LABEL, MANAGER_LABEL, RUN_LABEL};
use super::engine::{Engine, EngineError, in_time};
use super::tidy::{FRESH, is_labelled, is_own_name, remove_unused, tags};
use super::{now, remove};
use crate::config::ProcessEnv;

/// A run with something younger than this may be about to start; the first container runs some seconds after its network
/// is made, on a busy engine.
const YOUNG: Duration = Duration::from_secs(60);

/// What was found at the engine and what became of it. Its text says so in words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Swept {
    /// The runs of which something was left and is removed now.
    pub runs: Vec<SweptRun>,
    /// The names of the images that were removed.
    pub images: Vec<String>,
    /// The runs that are alive and were left alone.
    pub alive: Vec<String>,
    /// What could not be removed, and why.
    pub failures: Vec<String>,
}

/// What was left of one run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SweptRun {
    /// The run's name.
    pub run: String,
    /// The names of its containers.
    pub containers: Vec<String>,
    /// The names of its networks.
    pub networks: Vec<String>,
}

impl fmt::Display for Swept {
    /// Several lines, without a line break after the last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted = |names: &[String]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let mut lines = Vec::new();
        for SweptRun { run, containers, networks } in &self.runs {
            let left =
                [("container", containers), ("network", networks)].into_iter().filter(|(_, names)| !names.is_empty());
            let left = left.map(|(kind, names)| {
                let plural = if names.len() == 1 { "" } else { "s" };
                format!("{} {kind}{plural} ({})", names.len(), quoted(names))
            });
            lines.push(format!("removed what the run `{run}` had left: {}", left.collect::<Vec<_>>().join(", ")));
        }
        if !self.images.is_empty() {
            let plural = if self.images.len() == 1 { "" } else { "s" };
            lines.push(format!(
                "removed {} image{plural} that nothing uses: {}",
                self.images.len(),
                quoted(&self.images)
            ));
        }
        if lines.is_empty() && self.failures.is_empty() {
            lines.push("nothing was left of earlier runs".to_owned());
        }
        lines.extend(self.alive.iter().map(|run| format!("left the run `{run}` alone: it is alive")));
        lines.extend(self.failures.iter().map(|failure| format!("not removed: {failure}")));
        f.write_str(&lines.join("\n"))
    }
}

/// Removes what earlier runs have left at the container engine, and says what that was.
///
/// Runs clean up after themselves, also when they fail or are killed. This is for what is left when engine and launcher went
/// away together, and for the disk space of images: those of programs that no container uses, and bases that were fetched
/// for them. A run that is alive is left alone: one of which a container runs, or something is younger than a minute; so is an
/// image that was named less than ten minutes ago.
///
/// # Errors
///
/// [`EngineError`] if there is no engine to ask. What could be found and not be removed is in [`Swept::failures`].
pub fn sweep() -> Result<Swept, EngineError> {
    Engine::connect(&ProcessEnv)?.sweep()
}

impl Engine {
    /// As [`sweep`], at this engine.
    ///
    /// # Errors
    ///
    /// [`EngineError`]
    pub fn sweep(&self) -> Result<Swept, EngineError> {
        self.sweep_older(FRESH)
    }

    /// As [`Engine::sweep`], with another age of images than ten minutes.
    #[doc(hidden)]
    pub fn sweep_older(&self, age: Duration) -> Result<Swept, EngineError> {
        self.reactor().wait(async { sweep_all(self.docker(), age).await })
    }
}

async fn sweep_all(docker: &Docker, age: Duration) -> Result<Swept, EngineError> {
    let mut swept = Swept::default();
    for (run, found) in find(docker).await? {
        if found.is_alive(now()) {
            swept.alive.push(run);
            continue;
        }
        match remove(docker, &run).await {
            Ok(_) => swept.runs.push(found.into_swept(run)),
            Err(error) => swept.failures.push(format!("the run `{run}`: {error}")),
        }
    }
    let is_ours = |image: &ImageSummary| {
        let is_unfinished = |tag: &str| tag.ends_with(UNFINISHED);
        let has_only_own_names = tags(image).next().is_some() && tags(image).all(is_own_name);
        is_labelled(image) || has_only_own_names && (!image.repo_digests.is_empty() || tags(image).any(is_unfinished))
    };
    match remove_unused(docker, is_ours, age).await {
        Ok(images) => swept.images = images,
        Err(error) => swept.failures.push(format!("images: {error}")),
    }
    Ok(swept)
}

/// What there is of a run.
#[derive(Default)]
struct Found {
    containers: Vec<ContainerSummary>,
    networks: Vec<Network>,
}

async fn find(docker: &Docker) -> Result<BTreeMap<String, Found>, EngineError> {
    let labels = vec![RUN_LABEL.to_owned(), format!("{}={}", MANAGER_LABEL.0, MANAGER_LABEL.1)];
    let filters = HashMap::from([("label".to_owned(), labels)]);
    let mut runs = BTreeMap::<String, Found>::new();
    let run_of =
        |labels: &Option<HashMap<String, String>>| labels.as_ref().and_then(|labels| labels.get(RUN_LABEL).cloned());
    // The networks first: a run that begins in between is then seen with its containers or not at all.
    let options = query::ListNetworksOptionsBuilder::default().filters(&filters).build();
    for network in in_time("list the networks of runs", docker.list_networks(Some(options))).await? {
        if let Some(run) = run_of(&network.labels) {
            runs.entry(run).or_default().networks.push(network);
        }
    }
    let options = query::ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
    for container in in_time("list the containers of runs", docker.list_containers(Some(options))).await? {
        if let Some(run) = run_of(&container.labels) {
            runs.entry(run).or_default().containers.push(container);
        }
    }
    Ok(runs)
}

impl Found {
    fn is_alive(&self, now: Duration) -> bool {
        use ContainerSummaryStateEnum::{PAUSED, RESTARTING, RUNNING};
        let runs = |container: &ContainerSummary| matches!(container.state, Some(RUNNING | PAUSED | RESTARTING));
        let labels = self.containers.iter().map(|container| &container.labels);
        let mut labels = labels.chain(self.networks.iter().map(|network| &network.labels)).flatten();
        let is_young = |labels: &HashMap<String, String>| {
            let created = labels.get(CREATED_LABEL).and_then(|created| created.parse().ok()).map(Duration::from_secs);
            // A clock may be behind that of the launcher's machine.
            created.is_some_and(|created| now.saturating_sub(created) < YOUNG)
        };
        self.containers.iter().any(runs) || labels.any(is_young)
    }

    fn into_swept(self, run: String) -> SweptRun {
        let container = |container: ContainerSummary| {
            let names = container.names.unwrap_or_default();
            let name = names.first().map(|name| name.trim_start_matches('/').to_owned());
            name.or(container.id).unwrap_or_default()
        };
        let network = |network: Network| network.name.or(network.id).unwrap_or_default();
        let mut containers: Vec<String> = self.containers.into_iter().map(container).collect();
        containers.sort();
        SweptRun { run, containers, networks: self.networks.into_iter().map(network).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn what_was_found_is_said_in_words() {
        let mut swept = Swept::default();
        assert_eq!(swept.to_string(), "nothing was left of earlier runs");
        let run = |run: &str, containers: &[&str]| SweptRun {
            run: run.to_owned(),
            containers: names(containers),
            networks: names(&[run]),
        };
        swept.runs = vec![run("a", &["a-ps-0", "a-worker-0"]), run("b", &[])];
        swept.images = names(&["fairing/a:012"]);
        swept.alive = names(&["c"]);
        swept.failures = names(&["the run `d`: no answer"]);
        let expected = "removed what the run `a` had left: 2 containers (`a-ps-0`, `a-worker-0`), 1 network (`a`)\n\
                        removed what the run `b` had left: 1 network (`b`)\n\
                        removed 1 image that nothing uses: `fairing/a:012`\n\
                        left the run `c` alone: it is alive\n\
                        not removed: the run `d`: no answer";
        assert_eq!(swept.to_string(), expected);
    }

    #[test]
    fn a_run_is_alive_while_it_runs_or_is_young() {
        use ContainerSummaryStateEnum::{CREATED, EXITED, PAUSED, RUNNING};
        let now = Duration::from_secs(1_000_000);
        let is_alive = |state, age_s: i64| {
            let created = now.as_secs().strict_add_signed(-age_s).to_string();
            let labels = HashMap::from([(CREATED_LABEL.to_owned(), created)]);
            let container = ContainerSummary { state: Some(state), labels: Some(labels), ..Default::default() };
            Found { containers: vec![container], networks: vec![] }.is_alive(now)
        };
        assert!(is_alive(RUNNING, 1000) && is_alive(PAUSED, 1000));
        assert!(is_alive(CREATED, 59) && is_alive(EXITED, 59) && is_alive(CREATED, -100));
        assert!(!is_alive(CREATED, 60) && !is_alive(EXITED, 1000));
        assert!(!Found::default().is_alive(now));
    }
}
