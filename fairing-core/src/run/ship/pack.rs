//! What goes into an image: the program, what it needs, and what the user adds.

use std::fmt;
use std::path::{Path, PathBuf};

use super::{DATA, HOME, ImageError};
use crate::config::{Config, Env as _, Link, ProcessEnv};
use crate::image::append::{self, AppendError, ImagePlan};
use crate::image::cache::{self, Cache};
use crate::image::executable::Program;
use crate::image::layer::Layer;
use crate::image::libraries::Libraries;
use crate::image::static_build::{Origin, StaticBuild};
use crate::image::{Architecture, Image, Notice};
use crate::launch::docker::image_labels;
use crate::observe::terminal::View;
use crate::reactor::Reactor;
#[cfg(feature = "kubernetes")]
use crate::registry::Repository;
use crate::registry::{Base, Client, Keychain, Reference, Settings};

/// The layers of a program's image, and what they are put on.
pub(super) struct Packed {
    pub(super) program: String,
    pub(super) layers: Vec<Layer>,
    pub(super) architecture: Architecture,
    pub(super) base: Option<Base>,
}

/// An image for one architecture, and what it was made of.
pub(super) struct Built {
    pub(super) program: Program,
    layers: Vec<Layer>,
    base: Option<append::Base>,
    packed: Vec<cache::Packed>,
    pub(super) image: Image,
}

/// What goes into the layers.
pub(super) struct Packing<'a> {
    pub(super) config: &'a Config,
    /// The folder of the user's Cargo.toml.
    pub(super) manifest: &'a Path,
    /// The architecture of the engine, if it is known.
    pub(super) engine: Option<Architecture>,
    pub(super) is_on_base: bool,
}

impl Packing<'_> {
    pub(super) fn architectures(&self) -> Result<Vec<Architecture>, ImageError> {
        let named = self.config.image.architectures.iter();
        let named: Vec<Architecture> = named.map(|name| name.parse().expect("checked in the configuration")).collect();
        match (named.is_empty(), self.engine.or(Architecture::current())) {
            (false, _) => Ok(named),
            (true, Some(own)) => Ok(vec![own]),
            (true, None) => Err(ImageError::NoArchitecture { found: std::env::consts::ARCH }),
        }
    }

    /// The program for `architecture`: the one that runs, or one that is built for it.
    fn program(&self, architecture: Architecture, view: &mut dyn View) -> Result<Program, ImageError> {
        if self.config.image.link == Link::Dynamic && Architecture::current() == Some(architecture) {
            return Ok(Program::running()?);
        }
        let env = |name: &str| ProcessEnv.get(name).map(Into::into);
        let build = StaticBuild::new(&Origin::read(&env)?, architecture, &env)?;
        view.say(&format!("building the program for {architecture}: {build}"));
        Ok(build.run(&mut |line| view.say(line))?)
    }

    /// The program and the layers of its image, the lowest first.
    pub(super) fn layers(
        &self,
        architecture: Architecture,
        view: &mut dyn View,
    ) -> Result<(Program, Vec<Layer>), ImageError> {
        let program = self.program(architecture, view)?;
        let library_path = ProcessEnv.get("LD_LIBRARY_PATH");
        let mut libraries = Libraries::of(&program, library_path.as_deref().map(AsRef::as_ref))?;
        let mut notices = Vec::new();
        if self.is_on_base {
            notices.extend(libraries.glibc().map(|version| Notice::NewestGlibc { version }));
            libraries = libraries.beside_base();
        } else {
            let loaded = program.loads_at_run_time()?;
            notices.extend((!loaded.is_empty()).then_some(Notice::LoadsAtRunTime { libraries: loaded }));
        }
        notices.extend(crate::build::is_for_native_processor().then_some(Notice::NativeProcessor));
        for notice in notices {
            view.say(&format!("warning: {notice}"));
        }
        let mut lowest = Layer::libraries(&libraries, !self.is_on_base)?;
        if self.config.image.root_certificates {
            lowest.put_certificates(&root_certificates()?)?;
        }
        let data = self.config.data_dir.as_deref().map(|folder| Layer::data(folder, DATA)).transpose()?;
        let files =
            self.config.image.files.iter().map(|file| (self.manifest.join(file), format!("{HOME}/{}", file.display())));
        let files: Vec<_> = files.collect();
        let files = Layer::files(files.iter().map(|(path, at)| (path.as_path(), at.as_str())))?;
        let layers = [Some(lowest), data, Some(files), Some(Layer::program(&program))];
        let layers = layers.into_iter().flatten().filter(|layer| !layer.is_empty()).collect();
        Ok((program, layers))
    }
}

/// Where systems keep the root certificates that they trust, in one file.
const ROOT_CERTIFICATES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

fn root_certificates() -> Result<PathBuf, ImageError> {
    let named = ProcessEnv.get("SSL_CERT_FILE").map(PathBuf::from);
    let known = ROOT_CERTIFICATES.iter().map(PathBuf::from).find(|path| path.is_file());
    named.or(known).ok_or(ImageError::NoRootCertificates)
}

/// What the registry has of `reference` for each of the architectures.
pub(super) fn fetch_bases(
    settings: &Settings,
    reference: &Reference,
    architectures: &[Architecture],
) -> Result<Vec<Base>, ImageError> {
    let client = Client::new(settings.clone(), Keychain::from_env(&ProcessEnv))?;
    let reactor = Reactor::start().map_err(ImageError::Reactor)?;
    let fetch = |architecture: &Architecture| Ok(reactor.wait(client.base(reference, *architecture))?);
    architectures.iter().map(fetch).collect()
}

/// Asks the registry whether an image may be pushed to `repository`.
#[cfg(feature = "kubernetes")]
pub(super) fn check_push(settings: &Settings, repository: &Repository) -> Result<(), ImageError> {
    let client = Client::new(settings.clone(), Keychain::from_env(&ProcessEnv))?;
    let reactor = Reactor::start().map_err(ImageError::Reactor)?;
    Ok(reactor.wait(client.check_push(repository))?)
}

/// The digest that `reference` stands for now, for this program's architecture.
#[cfg(feature = "kubernetes")]
pub(super) fn resolve(settings: &Settings, reference: &Reference) -> Result<Reference, ImageError> {
    let architecture = Architecture::current().unwrap_or(Architecture::Amd64);
    let base = fetch_bases(settings, reference, &[architecture])?.swap_remove(0);
    Ok(base.reference)
}

impl Built {
    /// Packs the layers, or takes them from the cache.
    pub(super) fn new(
        cache: &Cache,
        program: Program,
        layers: Vec<Layer>,
        base: Option<&Base>,
    ) -> Result<Self, ImageError> {
        let packed = cache.pack_all(&layers)?;
        let base = base.map(to_append);
        let image = assemble(&program, base.as_ref(), &packed)?;
        Ok(Self { program, layers, base, packed, image })
    }

    /// Reads what the cache has of the layers, and makes anew what is damaged.
    pub(super) fn check(&mut self, cache: &Cache) -> Result<(), ImageError> {
        let packed = std::mem::take(&mut self.packed);
        let checked = self.layers.iter().zip(packed).map(|(layer, packed)| cache.check(layer, packed));
        self.packed = checked.collect::<Result<_, _>>()?;
        self.image = assemble(&self.program, self.base.as_ref(), &self.packed)?;
        Ok(())
    }

    pub(super) fn plan(&self) -> ImagePlan {
        ImagePlan::new(&self.image, self.base.as_ref(), &self.packed, &image_settings(self.program.name()))
    }
}

fn assemble(program: &Program, base: Option<&append::Base>, packed: &[cache::Packed]) -> Result<Image, AppendError> {
    append::assemble(base, packed, program.architecture(), &image_settings(program.name()))
}

/// What the image of `program` says of itself.
pub(super) fn image_settings(program: &str) -> append::Settings {
    append::Settings { labels: image_labels(program), ..append::Settings::of_program(program) }
}

pub(super) fn to_append(base: &Base) -> append::Base {
    append::Base {
        reference: base.reference.to_string(),
        digest: base.descriptor.digest.clone(),
        layers: base.layers.clone(),
        config: base.config.clone(),
    }
}

impl fmt::Display for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "image for linux/{}", self.architecture)?;
        match &self.base {
            Some(base) => writeln!(f, "  on {}", base.reference)?,
            None => writeln!(f, "  on an empty base")?,
        }
        for layer in &self.layers {
            let megabytes = layer.size_bytes() as f64 / 1e6;
            let digest = layer.diff_id().map_err(|_| fmt::Error)?;
            writeln!(f, "  layer {:<9} {megabytes:>7.1} MB, {digest}", layer.name().to_string())?;
        }
        write!(f, "  starts {}", image_settings(&self.program).entrypoint.join(" "))
    }
}
