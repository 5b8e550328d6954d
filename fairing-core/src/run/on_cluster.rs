//! A launch on a cluster: what is asked before anything is built, and what is launched.

use std::path::Path;

use super::ship::Shipment;
use super::{RunError, Subject};
use crate::config::{Config, Env as _, ProcessEnv};
use crate::image::Architecture;
use crate::launch::LaunchPlan;
use crate::launch::kubernetes::manifest::{self, MAX_VALUE_BYTES, Provenance, Scene};
use crate::launch::kubernetes::{Cluster, ClusterRun, ClusterRunState, PreflightError};
use crate::observe::git;
use crate::observe::terminal::View;

/// Stands for the image as long as there is none.
pub(super) const NO_IMAGE: &str = "IMAGE";

/// Stands for the name of the run while the cluster is asked whether it would take its pods.
pub(super) const PREVIEW: &str = "preview";

/// What would be launched, but for the image.
pub(super) fn scene(config: &Config, manifest: &Path, subject: &Subject) -> Result<Scene, RunError> {
    if subject.value.len() > MAX_VALUE_BYTES {
        return Err(RunError::ValueTooLarge { size_bytes: subject.value.len() });
    }
    let commit = git::commit(manifest, git::GIT_DEADLINE);
    let provenance = Provenance {
        type_name: subject.type_name.to_owned(),
        commit: commit
            .map(|commit| if commit.dirty == Some(false) { commit.id } else { format!("{}-dirty", commit.id) }),
        user: ["USER", "LOGNAME"].into_iter().find_map(|name| ProcessEnv.get(name)).filter(|user| !user.is_empty()),
        extension: subject.extension.to_owned(),
    };
    Ok(Scene::new(config, NO_IMAGE.to_owned(), provenance))
}

/// Finds the cluster and asks it, and the registry, what can be known to go wrong before anything is built. `plan` gives
/// what the launch would be, with another name.
pub(super) fn cluster(
    config: &Config,
    scene: &mut Scene,
    value: &[u8],
    plan: &(dyn Fn(&Scene) -> LaunchPlan + Sync),
    view: &mut dyn View,
) -> Result<Cluster, RunError> {
    let settings = &config.kubernetes;
    let asking = |scene: &mut Scene| {
        Cluster::find(settings.context.as_deref(), settings.namespace.as_deref()).and_then(|cluster| {
            scene.settle(|| cluster.serves_jobsets())?;
            let checked = scene.preflight(&plan(scene)).check(&cluster, &architectures(config));
            Ok((cluster, checked))
        })
    };
    let (found, pushable) = super::watch::patiently(view, "the cluster and the registry to answer", || {
        std::thread::scope(|scope| {
            let pushing = scope.spawn(|| Shipment::check_push(config));
            let found = asking(scene);
            (found, pushing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    });
    let (cluster, notes) = match (found, pushable) {
        (Ok((cluster, Ok(notes))), Ok(())) => (cluster, notes),
        (Ok((_, Ok(_))), Err(error)) => return Err(error.into()),
        (Ok((_, Err(error))), Ok(())) => return Err(error.into()),
        (Ok((_, Err(error))), Err(pushing)) => return Err(error.and(super::watch::chain(&pushing)).into()),
        (Err(error), Ok(())) => return Err(error.into()),
        (Err(error), Err(pushing)) => {
            return Err(PreflightError::without_cluster(&error).and(super::watch::chain(&pushing)).into());
        }
    };
    for note in notes {
        view.say(&note);
    }
    if !settings.another {
        let value = manifest::value_hash(value);
        let same = |run: &ClusterRun| run.state == ClusterRunState::Alive && run.value_sha256 == value;
        let runs = super::watch::patiently(view, "the cluster to list its runs", || cluster.runs())?;
        if let Some(run) = runs.into_iter().find(same) {
            return Err(RunError::AlreadyRuns { run: run.name });
        }
    }
    Ok(cluster)
}

/// What the image can run on, if fairing makes it: names of architectures as Kubernetes has them too.
fn architectures(config: &Config) -> Vec<String> {
    match (&config.image.finished, config.image.architectures.as_slice()) {
        (Some(_), _) => Vec::new(),
        (None, []) => Architecture::current().map(|running| running.to_string()).into_iter().collect(),
        (None, named) => named.to_vec(),
    }
}
