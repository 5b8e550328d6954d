//! What of the manifests others ask for: whoever prepares a launch, and whoever comes later and finds what was launched.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Secret, Service};
use kube::ResourceExt as _;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind};

use super::super::LaunchPlan;
use super::create::Named;
use super::manifest::{self, Format, Known, Provenance, Scene};
use super::{ClusterError, Following, Preflight};
use crate::config::{Config, Renderer};
use crate::topology::{Address, Placement, Role, Topology};

/// The key of the caller's identity in its Secret.
pub(super) const IDENTITY_KEY: &str = "identity";

impl Scene {
    /// What `config` says, with an image that is yet to be made.
    pub(crate) fn new(config: &Config, image: String, provenance: Provenance) -> Self {
        Self {
            format: Format::of(config.kubernetes.launcher, false),
            image,
            settings: config.kubernetes.clone(),
            worker: config.worker.clone(),
            ps: config.ps.clone(),
            provenance,
        }
    }

    /// Decides for a kind of objects, if the user leaves that to what the cluster has.
    pub(crate) fn settle(
        &mut self,
        has_job_sets: impl FnOnce() -> Result<bool, ClusterError>,
    ) -> Result<(), ClusterError> {
        if self.settings.launcher == Renderer::Auto {
            self.format = Format::of(Renderer::Auto, has_job_sets()?);
        }
        Ok(())
    }

    /// The same with the image that was made.
    #[must_use]
    pub(crate) fn with_image(&self, image: String) -> Self {
        Self { image, ..self.clone() }
    }

    /// Where the servers of `run` will listen.
    pub(crate) fn addresses(&self, run: &str, topology: &Topology) -> Vec<Address> {
        manifest::addresses(self, run, topology)
    }

    /// Cores that all workers share: as many as they ask for, one each if they do not.
    pub(crate) fn cores(&self, topology: Topology) -> u32 {
        let each = self.worker.cpu.map_or(1, |cpu| u32::try_from(cpu.millicores().div_ceil(1000)).unwrap_or(u32::MAX));
        topology.workers.get().saturating_mul(each)
    }

    /// What the cluster can be asked before the launch.
    pub(crate) fn preflight(&self, plan: &LaunchPlan) -> Preflight {
        let pods = manifest::pods(self, plan);
        let roles = pods.len() as u32;
        let all = manifest::objects(self, plan);
        let quota_name = |resource: &ApiResource| match resource.group.as_str() {
            "" => resource.plural.clone(),
            group => format!("{}.{group}", resource.plural),
        };
        let named = all.held.iter().chain(&all.rest).map(|manifest| (quota_name(&manifest.resource), 1));
        // What operators make of theirs.
        let made: &[(&str, u32)] = match self.format {
            Format::Jobs => &[],
            Format::JobSet => &[("jobs.batch", roles), ("services", 1)],
            Format::TfJob => &[("services", pods.iter().map(|(_, count, _)| count).sum())],
        };
        let mut objects = BTreeMap::new();
        for (name, count) in named.chain(made.iter().map(|(name, count)| ((*name).to_owned(), *count))) {
            *objects.entry(name).or_insert(0) += count;
        }
        Preflight { pods, objects, check_nodes: self.settings.check_nodes, rules: manifest::rules(self) }
    }

    /// All objects, and the rights that creating and following them takes, for people.
    pub(crate) fn describe(&self, plan: &LaunchPlan) -> String {
        let objects = manifest::describe(&manifest::objects(self, plan));
        let role = manifest::role(self);
        format!("{objects}# The rights that it takes in the namespace, as a Role for your user:\n---\n{role}")
    }
}

/// What is known of a run that somebody launched.
pub(crate) struct Note {
    pub(crate) placements: Vec<Placement>,
    pub(crate) following: Following,
    pub(crate) extension: String,
}

/// What a run's owner says of it; `None` if that cannot be read.
pub(super) fn note(owner: &DynamicObject) -> Option<Note> {
    let known = Known::read(owner.annotations())?;
    let run = owner.labels().get(manifest::RUN_LABEL)?;
    let servers: Vec<Address> = known.servers.iter().map(|address| address.parse().ok()).collect::<Option<_>>()?;
    let placement = |replica| Placement {
        run: run.clone(),
        replica,
        topology: known.topology,
        seed: known.seed,
        threads: 1,
        servers: servers.clone(),
        data_dir: None,
        mode: known.mode,
        rejoin: Duration::from_millis(known.rejoin_ms),
        join: Duration::from_secs(known.join_s),
        keep_result: Duration::from_secs(known.keep_result_s),
        first_stays: false,
    };
    let placements = known.topology.replicas().map(placement).collect();
    Some(Note { placements, following: known.following(), extension: known.extension })
}

/// The Secret with what a caller of `run` proves itself with.
pub(super) fn caller_secret(run: &str) -> String {
    format!("{run}-caller")
}

/// The kinds of objects that own runs.
pub(super) fn owner_kinds() -> Vec<ApiResource> {
    vec![
        ApiResource::erase::<Job>(&()),
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("jobset.x-k8s.io", "v1alpha2", "JobSet"), "jobsets"),
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("kubeflow.org", "v1", "TFJob"), "tfjobs"),
    ]
}

/// What a launch creates beside the owner of `run`, by name. Some of it may be gone.
pub(super) fn companions(run: &str, owner: &Named) -> Vec<Named> {
    let named = |resource: ApiResource, name: String| Named { resource, name };
    let secret = || ApiResource::erase::<Secret>(&());
    let mut companions = vec![named(secret(), run.to_owned()), named(secret(), caller_secret(run))];
    if owner.resource.kind == "Job" {
        companions.push(named(ApiResource::erase::<Service>(&()), run.to_owned()));
        let workers = named(ApiResource::erase::<Job>(&()), format!("{run}-{}", Role::Worker));
        // Without servers they are the owner.
        companions.extend(Some(workers).filter(|workers| workers.name != owner.name));
    } else {
        companions.push(named(ApiResource::erase::<Job>(&()), format!("{run}-launch")));
    }
    companions
}

/// An annotation of a run's owner.
pub(super) fn annotation(annotations: &BTreeMap<String, String>, name: &str) -> Option<String> {
    annotations.get(&format!("fairing.dev/{name}")).cloned()
}
