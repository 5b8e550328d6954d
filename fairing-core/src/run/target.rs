//! Where the replicas of a run are, and what has to be there before they can be started.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::{RunError, Subject};
use crate::config::{Config, Target as Kind};
use crate::launch::{LaunchPlan, Launcher, LocalLauncher, Program};
use crate::observe::terminal::View;
use crate::topology::{Address, Topology};
#[cfg(feature = "docker")]
use {
    super::ship::{Delivered, Shipment},
    crate::config::{ProcessEnv, Resources},
    crate::launch::docker::{self, DockerLauncher, Engine, Limits, RoleLimits},
};
#[cfg(feature = "kubernetes")]
use {
    super::{dry_plan, on_cluster},
    crate::launch::kubernetes::manifest::Scene,
    crate::launch::kubernetes::{Cluster, KubernetesLauncher},
};

/// A target for which everything is ready that can be made ready on this machine.
pub(super) enum Prepared {
    Local(LocalLauncher),
    #[cfg(feature = "docker")]
    Docker {
        shipment: Box<Shipment>,
        /// None in a dry run, which asks no engine.
        engine: Option<Engine>,
    },
    #[cfg(feature = "kubernetes")]
    Kubernetes {
        shipment: Box<Shipment>,
        /// None in a dry run, which asks no cluster.
        cluster: Option<Cluster>,
        scene: Box<Scene>,
    },
}

/// A target whose replicas can be started.
pub(super) struct Target {
    pub(super) launcher: Box<dyn Launcher>,
    pub(super) site: Site,
    /// Whether others than the run's own processes could reach the replicas, so that these have to prove who they are.
    pub(super) is_remote: bool,
}

/// What a replica's placement says of where it is.
pub(super) struct Site {
    /// Processor cores that all replicas share.
    pub(super) cores: u32,
    /// The data folder as a replica sees it.
    pub(super) data_dir: Option<PathBuf>,
}

impl Prepared {
    /// Finds out what can be found out before anything is started, and gets everything ready that needs nobody else.
    pub(super) fn new(
        config: &Config,
        manifest: &std::path::Path,
        program: &Program,
        subject: &Subject,
        view: &mut dyn View,
    ) -> Result<Self, RunError> {
        match config.target {
            Kind::Local => Ok(Prepared::Local(LocalLauncher::new()?)),
            #[cfg(feature = "docker")]
            Kind::Docker => {
                program.check_arguments()?;
                // Asked first: an engine that is not there should not be found out about after a minute of packing.
                let engine = (!config.dry_run).then(engine).transpose()?;
                if let Some(engine) = &engine {
                    limits(config).check(&config.topology, engine).map_err(super::ImageError::from)?;
                }
                let architecture = engine.as_ref().and_then(Engine::architecture);
                let shipment = Box::new(Shipment::pack(config, manifest, architecture, view)?);
                Ok(Prepared::Docker { shipment, engine })
            }
            #[cfg(not(feature = "docker"))]
            target @ Kind::Docker => {
                let _ = (manifest, program, subject, view);
                Err(RunError::MissingFeature { target, feature: "docker" })
            }
            #[cfg(feature = "kubernetes")]
            Kind::Kubernetes => {
                program.check_arguments()?;
                let mut scene = Box::new(on_cluster::scene(config, manifest, subject)?);
                let preview = |scene: &Scene| {
                    let servers = scene.addresses(on_cluster::PREVIEW, &config.topology);
                    let site = Site { cores: scene.cores(config.topology), data_dir: None };
                    dry_plan(on_cluster::PREVIEW, config, program, subject, &site, &servers)
                };
                let cluster = match config.dry_run {
                    true => None,
                    false => Some(on_cluster::cluster(config, &mut scene, subject.value, &preview, view)?),
                };
                let shipment = Box::new(Shipment::pack(config, manifest, None, view)?);
                Ok(Prepared::Kubernetes { shipment, cluster, scene })
            }
            #[cfg(not(feature = "kubernetes"))]
            target @ Kind::Kubernetes => Err(RunError::MissingFeature { target, feature: "kubernetes" }),
        }
    }

    /// As far as it is known before anything is started.
    pub(super) fn site(&self, config: &Config) -> Site {
        match self {
            Prepared::Local(_) => local_site(config),
            #[cfg(feature = "docker")]
            Prepared::Docker { shipment, .. } => Site { cores: cores(), data_dir: shipment.data_dir() },
            #[cfg(feature = "kubernetes")]
            Prepared::Kubernetes { shipment, scene, .. } => {
                Site { cores: scene.cores(config.topology), data_dir: shipment.data_dir() }
            }
        }
    }

    /// Where the servers of `run` would listen.
    pub(super) fn addresses(&self, run: &str, topology: &Topology) -> Vec<Address> {
        match self {
            Prepared::Local(launcher) => launcher.addresses(run, topology),
            #[cfg(feature = "docker")]
            Prepared::Docker { .. } => docker::addresses(topology),
            #[cfg(feature = "kubernetes")]
            Prepared::Kubernetes { scene, .. } => scene.addresses(run, topology),
        }
    }

    /// What would be done, in words, for a dry run.
    pub(super) fn describe(&self, plan: &LaunchPlan) -> String {
        let mut text = String::new();
        match self {
            Prepared::Local(_) => {
                for placement in &plan.placements {
                    let threads = placement.threads;
                    writeln!(text, "process {}: {threads} compute threads", placement.replica).expect("a string");
                }
            }
            #[cfg(feature = "docker")]
            Prepared::Docker { shipment, .. } => {
                writeln!(text, "{shipment}").expect("a string");
                text += &docker::describe(plan, &shipment.name_at_the_engine(), &shipment.limits);
            }
            #[cfg(feature = "kubernetes")]
            Prepared::Kubernetes { shipment, scene, .. } => {
                writeln!(text, "{shipment}").expect("a string");
                text += &scene.with_image(shipment.name_at_the_engine()).describe(plan);
            }
        }
        text
    }

    /// Brings what is needed for the run `name` to where it is needed.
    pub(super) fn deliver(self, config: &Config, name: &str, view: &mut dyn View) -> Result<Target, RunError> {
        match self {
            Prepared::Local(launcher) => {
                let site = local_site(config);
                let _ = (name, view);
                Ok(Target { launcher: Box::new(launcher), site, is_remote: false })
            }
            #[cfg(feature = "docker")]
            Prepared::Docker { shipment, engine } => {
                let engine = engine.expect("only a dry run has none, and it delivers nothing");
                let data_dir = shipment.data_dir();
                let limits = shipment.limits;
                let Delivered { image, id, program } = shipment.deliver(&engine, name, view)?;
                let site = Site { cores: engine.cores(), data_dir };
                let launcher = DockerLauncher::new(engine, image, limits).tidying(program.map(|program| (program, id)));
                Ok(Target { launcher: Box::new(launcher), site, is_remote: true })
            }
            #[cfg(feature = "kubernetes")]
            Prepared::Kubernetes { shipment, cluster, scene } => {
                let cluster = cluster.expect("only a dry run has none, and it delivers nothing");
                let site = Site { cores: scene.cores(config.topology), data_dir: shipment.data_dir() };
                let image = shipment.deliver_to_registry(name, view)?;
                let launcher = KubernetesLauncher::new(cluster, scene.with_image(image.to_string()));
                Ok(Target { launcher: Box::new(launcher), site, is_remote: true })
            }
        }
    }
}

fn local_site(config: &Config) -> Site {
    Site { cores: cores(), data_dir: config.data_dir.clone() }
}

/// The cores of this machine.
fn cores() -> u32 {
    std::thread::available_parallelism().ok().and_then(|cores| u32::try_from(cores.get()).ok()).unwrap_or(1)
}

#[cfg(feature = "docker")]
fn engine() -> Result<Engine, RunError> {
    Ok(Engine::connect(&ProcessEnv).map_err(super::ImageError::from)?)
}

/// What the roles may use, as configured.
#[cfg(feature = "docker")]
pub(super) fn limits(config: &Config) -> RoleLimits {
    let limits = |resources: &Resources| Limits {
        millicores: resources.cpu.map(|cpu| cpu.millicores()),
        memory_bytes: resources.memory.map(|memory| memory.bytes()),
    };
    RoleLimits { worker: limits(&config.worker), ps: limits(&config.ps) }
}
