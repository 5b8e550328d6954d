//! The program becomes an image, and the image gets to where it is run.
//!
//! ```text
//! pack      program, libraries, data, files → layers → an image with its digest; nothing leaves the machine
//! deliver   image → registry, or straight to the engine
//! ```
//!
//! A dry run ends between the two.

mod deliver;
mod pack;

use std::fmt;
use std::path::{Path, PathBuf};

use super::target::limits;
use crate::config::{Builder, Config};
use crate::image::append::{self, AppendError};
use crate::image::archive::ArchiveError;
use crate::image::cache::{Cache, CacheError};
use crate::image::executable::ProgramError;
use crate::image::layer::LayerError;
use crate::image::libraries::LibrariesError;
use crate::image::static_build::StaticBuildError;
use crate::image::{Architecture, Digest};
use crate::launch::docker::{self, BuildError, EngineError, LoadError, RoleLimits, TransferError};
use crate::observe::terminal::View;
use crate::registry::{AuthError, BaseError, ClientError, PushError, Reference, ReferenceError, Repository, Settings};

pub(super) use deliver::Delivered;
use pack::{Built, Packed, Packing, fetch_bases};

/// Where the data folder is in an image.
const DATA: &str = "/data";

/// The working folder in an image, beside which `files` lie.
const HOME: &str = "/app";

/// Failure to make the image of a run or to bring it where it is needed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The program cannot be shipped.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A shared library of the program cannot be shipped.
    #[error(transparent)]
    Libraries(#[from] LibrariesError),
    /// The program cannot be built for the image.
    #[error(transparent)]
    StaticBuild(#[from] StaticBuildError),
    /// Data or files cannot be shipped.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// Compressed layers cannot be kept.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The layers do not fit the base image.
    #[error(transparent)]
    Append(#[from] AppendError),
    /// A name of an image or of a repository is none.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The client of the registry cannot be made.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The base image cannot be had.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// The image cannot be pushed.
    #[error(transparent)]
    Push(#[from] PushError),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The image cannot be packed for the engine.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The engine does not take the image.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The engine does not build the image.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The engine does not get an image from a registry, or to it.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The credentials for a registry cannot be read.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// Images are not built for this processor.
    #[error("this program is for {found}, and images are built for amd64 and arm64")]
    NoArchitecture {
        /// What it is for.
        found: &'static str,
    },
    /// There are no root certificates to be shipped.
    #[error("this machine has no file of root certificates (install Debian's ca-certificates, or set SSL_CERT_FILE)")]
    NoRootCertificates,
    /// A cluster gets images from a registry only.
    #[cfg(feature = "kubernetes")]
    #[error("a cluster needs an image in a registry (set `repository` or FAIRING_REPOSITORY to one, as host/name)")]
    NoRepository,
    /// No thread could be started for talking to a registry.
    #[error("cannot start the threads that talk to the registry")]
    Reactor(#[source] std::io::Error),
}

/// The image of a run, packed as far as that is possible on this machine alone.
pub(crate) struct Shipment {
    goods: Goods,
    /// What the roles may use.
    pub(crate) limits: RoleLimits,
    has_data: bool,
    settings: Settings,
    /// The folder of the user's Cargo.toml.
    manifest: PathBuf,
}

enum Goods {
    /// An image that is there already.
    Finished(Reference),
    /// Layers that the engine makes an image of, and sends to the repository if there is one.
    ByEngine { packed: Packed, dockerfile: Option<PathBuf>, repository: Option<Repository> },
    /// An image for a registry: one for each architecture, on a base or on nothing.
    Pushed { repository: Repository, built: Vec<Built>, base: Option<Repository>, cache: Cache },
    /// Layers for the engine, on a base or on nothing.
    Loaded(Packed),
}

impl Shipment {
    /// Packs the program and what goes with it.
    ///
    /// `engine` is the architecture that the image is for where the user does not say, if it is known.
    pub(crate) fn pack(
        config: &Config,
        manifest: &Path,
        engine: Option<Architecture>,
        view: &mut dyn View,
    ) -> Result<Self, ImageError> {
        let wanted = &config.image;
        // Named before the minute that packing may take.
        if let (Builder::Docker, Some(path)) = (wanted.builder, &wanted.dockerfile) {
            docker::check_dockerfile(path)?;
        }
        let settings = settings(config);
        let shipment = |goods| Self {
            goods,
            limits: limits(config),
            has_data: config.data_dir.is_some(),
            settings: settings.clone(),
            manifest: manifest.to_owned(),
        };
        if let Some(finished) = &wanted.finished {
            return Ok(shipment(Goods::Finished(finished.parse()?)));
        }
        let repository = wanted.repository.as_deref().map(str::parse::<Repository>).transpose()?;
        let reference = wanted.base.as_deref().map(str::parse::<Reference>).transpose()?;
        let packing = Packing { config, manifest, engine, is_on_base: reference.is_some() };
        let architectures = packing.architectures()?;
        let mut bases = match &reference {
            None => vec![None; architectures.len()],
            Some(reference) => fetch_bases(&settings, reference, &architectures)?.into_iter().map(Some).collect(),
        };
        let by_engine = wanted.builder == Builder::Docker;
        let Some(repository) = repository.clone().filter(|_| !by_engine) else {
            // Several architectures are refused here with the configuration.
            let (architecture, base) = (architectures[0], bases.swap_remove(0));
            let (program, layers) = packing.layers(architecture, view)?;
            let packed = Packed { program: program.name().to_owned(), layers, architecture, base };
            let dockerfile = wanted.dockerfile.clone();
            return Ok(shipment(match by_engine {
                true => Goods::ByEngine { packed, dockerfile, repository },
                false => Goods::Loaded(packed),
            }));
        };
        let cache = Cache::open(&config.cache)?;
        let mut built = Vec::new();
        for (architecture, base) in architectures.into_iter().zip(&bases) {
            let (program, layers) = packing.layers(architecture, view)?;
            built.push(Built::new(&cache, program, layers, base.as_ref())?);
        }
        let base = bases.into_iter().flatten().next().map(|base| base.reference.repository().clone());
        Ok(shipment(Goods::Pushed { repository, built, base, cache }))
    }

    /// Asks whether what is to be pushed may be.
    #[cfg(feature = "kubernetes")]
    pub(crate) fn check_push(config: &Config) -> Result<(), ImageError> {
        let wanted = &config.image;
        let Some(repository) = wanted.repository.as_deref().filter(|_| wanted.finished.is_none()) else {
            return Ok(());
        };
        pack::check_push(&settings(config), &repository.parse()?)
    }

    /// The data folder as a replica sees it.
    pub(crate) fn data_dir(&self) -> Option<PathBuf> {
        self.has_data.then(|| DATA.into())
    }

    /// What containers would be made from.
    pub(crate) fn name_at_the_engine(&self) -> String {
        match &self.goods {
            Goods::Finished(reference) => reference.to_string(),
            Goods::Pushed { repository, built, .. } => repository.at(index_digest(built)).to_string(),
            Goods::Loaded(packed) | Goods::ByEngine { packed, .. } => packed.program.clone(),
        }
    }
}

fn settings(config: &Config) -> Settings {
    Settings { registry_ca: config.image.registry_ca.clone(), plain_http: config.image.plain_http.clone() }
}

/// The digest of what is pushed: the one image, or the index of all.
fn index_digest(built: &[Built]) -> Digest {
    match built {
        [one] => one.image.descriptor.digest.clone(),
        several => append::index(&several.iter().map(|built| built.image.clone()).collect::<Vec<_>>()).0.digest,
    }
}

impl fmt::Display for Shipment {
    /// For a dry run.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.goods {
            Goods::Finished(reference) => write!(f, "image {reference}, used as it is"),
            Goods::Pushed { repository, built, .. } => {
                for built in built {
                    writeln!(f, "{}", built.plan())?;
                }
                write!(f, "  pushed to {repository}")
            }
            Goods::Loaded(packed) => {
                writeln!(f, "{packed}")?;
                write!(f, "  handed to the engine (set `repository` to push it to a registry)")
            }
            Goods::ByEngine { packed, dockerfile, repository } => {
                writeln!(f, "{packed}")?;
                match dockerfile {
                    Some(path) => write!(f, "  built by the engine from {}", path.display())?,
                    None => write!(f, "  built by the engine from a generated Dockerfile")?,
                }
                repository.as_ref().map_or(Ok(()), |repository| write!(f, "\n  pushed to {repository}"))
            }
        }
    }
}
