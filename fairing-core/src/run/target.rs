//! Where the replicas of a run are, and what has to be there before they can be started.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::RunError;
use crate::config::{Config, Target as Kind};
use crate::launch::{LaunchPlan, Launcher, LocalLauncher};
use crate::observe::terminal::View;
use crate::topology::Address;
#[cfg(feature = "docker")]
use {
    super::ship::{Delivered, Shipment},
    crate::config::{ProcessEnv, Resources},
    crate::launch::docker::{self, DockerLauncher, Engine, Limits, RoleLimits},
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
    /// Where the servers listen, in the order of their shares.
    pub(super) servers: Vec<Address>,
    /// Processor cores that all replicas share.
    pub(super) cores: u32,
    /// The data folder as a replica sees it.
    pub(super) data_dir: Option<PathBuf>,
}

impl Prepared {
    pub(super) fn new(config: &Config, manifest: &std::path::Path, view: &mut dyn View) -> Result<Self, RunError> {
        match config.target {
            Kind::Local => Ok(Prepared::Local(LocalLauncher::new()?)),
            #[cfg(feature = "docker")]
            Kind::Docker => {
                // Asked first: an engine that is not there should not be found out about after a minute of packing.
                let engine = (!config.dry_run).then(engine).transpose()?;
                let architecture = engine.as_ref().and_then(Engine::architecture);
                let shipment = Box::new(Shipment::pack(config, manifest, architecture, view)?);
                Ok(Prepared::Docker { shipment, engine })
            }
            #[cfg(not(feature = "docker"))]
            target @ Kind::Docker => {
                let _ = (manifest, view);
                Err(RunError::MissingFeature { target, feature: "docker" })
            }
        }
    }

    /// As far as it is known before anything is started.
    pub(super) fn site(&self, config: &Config) -> Site {
        match self {
            Prepared::Local(launcher) => local_site(launcher, config),
            #[cfg(feature = "docker")]
            Prepared::Docker { shipment, .. } => {
                let servers = docker::addresses(&config.topology);
                Site { servers, cores: cores(), data_dir: shipment.data_dir() }
            }
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
        }
        text
    }

    /// Brings what is needed to where it is needed.
    pub(super) fn deliver(self, config: &Config, view: &mut dyn View) -> Result<Target, RunError> {
        match self {
            Prepared::Local(launcher) => {
                let site = local_site(&launcher, config);
                let _ = view;
                Ok(Target { launcher: Box::new(launcher), site, is_remote: false })
            }
            #[cfg(feature = "docker")]
            Prepared::Docker { shipment, engine } => {
                let engine = engine.expect("only a dry run has none, and it delivers nothing");
                let data_dir = shipment.data_dir();
                let limits = shipment.limits;
                let Delivered { image, id, program } = shipment.deliver(&engine, view)?;
                let site = Site { servers: docker::addresses(&config.topology), cores: engine.cores(), data_dir };
                let launcher = DockerLauncher::new(engine, image, limits).tidying(program.map(|program| (program, id)));
                Ok(Target { launcher: Box::new(launcher), site, is_remote: true })
            }
        }
    }
}

fn local_site(launcher: &LocalLauncher, config: &Config) -> Site {
    Site { servers: launcher.addresses(&config.topology), cores: cores(), data_dir: config.data_dir.clone() }
}

/// The cores of this machine.
pub(super) fn cores() -> u32 {
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
