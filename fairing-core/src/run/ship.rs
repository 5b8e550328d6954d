//! The program becomes an image, and the image gets to where it is run.
//!
//! ```text
//! pack      program, libraries, data, files → layers → an image with its digest; nothing leaves the machine
//! deliver   image → registry, or straight to the engine
//! ```
//!
//! A dry run ends between the two.

use std::fmt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::target::limits;
use crate::config::{Builder, Config, Env as _, Link, ProcessEnv};
use crate::image::append::{self, AppendError, ImagePlan};
use crate::image::archive::{Archive, ArchiveError};
use crate::image::cache::{Cache, CacheError};
use crate::image::executable::{Program, ProgramError};
use crate::image::layer::{Layer, LayerError};
use crate::image::libraries::{Libraries, LibrariesError};
use crate::image::static_build::{Origin, StaticBuild, StaticBuildError};
use crate::image::{Architecture, Digest, Image, Notice};
use crate::launch::docker::{
    BuildError, Dockerfile, Engine, EngineError, LoadError, LoadProgress, Logins, RoleLimits, TransferError,
    TransferProgress, image_labels,
};
use crate::observe::git;
use crate::observe::terminal::View;
use crate::reactor::Reactor;
use crate::registry::{
    AuthError, Base, BaseError, Client, ClientError, Keychain, Progress, Push, PushError, Reference, ReferenceError,
    Repository, Settings, Tag,
};

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
    /// No thread could be started for talking to a registry.
    #[error("cannot start the threads that talk to the registry")]
    Reactor(#[source] std::io::Error),
}

/// The image of a run, packed as far as that is possible on this machine alone.
pub(super) struct Shipment {
    goods: Goods,
    /// What the roles may use.
    pub(super) limits: RoleLimits,
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
    Pushed { repository: Repository, built: Vec<Built>, base: Option<Repository> },
    /// Layers for the engine, on a base or on nothing.
    Loaded(Packed),
}

/// The layers of a program's image, and what they are put on.
struct Packed {
    program: String,
    layers: Vec<Layer>,
    architecture: Architecture,
    base: Option<Base>,
}

/// An image for one architecture, and what it was made of.
struct Built {
    program: String,
    image: Image,
    plan: ImagePlan,
}

impl Shipment {
    /// Packs the program and what goes with it.
    pub(super) fn pack(config: &Config, manifest: &Path, view: &mut dyn View) -> Result<Self, ImageError> {
        let wanted = &config.image;
        let settings = Settings { registry_ca: wanted.registry_ca.clone(), plain_http: wanted.plain_http.clone() };
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
        let packing = Packing { config, manifest, is_on_base: reference.is_some() };
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
            built.push(build(&cache, &program, &layers, base.as_ref())?);
        }
        let base = bases.into_iter().flatten().next().map(|base| base.reference.repository().clone());
        Ok(shipment(Goods::Pushed { repository, built, base }))
    }

    /// The data folder as a replica sees it.
    pub(super) fn data_dir(&self) -> Option<PathBuf> {
        self.has_data.then(|| DATA.into())
    }

    /// What containers would be made from.
    pub(super) fn name_at_the_engine(&self) -> String {
        match &self.goods {
            Goods::Finished(reference) => reference.to_string(),
            Goods::Pushed { repository, built, .. } => repository.at(index_digest(built)).to_string(),
            Goods::Loaded(packed) | Goods::ByEngine { packed, .. } => packed.program.clone(),
        }
    }
}

/// What goes into the layers.
struct Packing<'a> {
    config: &'a Config,
    /// The folder of the user's Cargo.toml.
    manifest: &'a Path,
    is_on_base: bool,
}

impl Packing<'_> {
    fn architectures(&self) -> Result<Vec<Architecture>, ImageError> {
        let named = self.config.image.architectures.iter();
        let named: Vec<Architecture> = named.map(|name| name.parse().expect("checked in the configuration")).collect();
        match (named.is_empty(), Architecture::current()) {
            (false, _) => Ok(named),
            (true, Some(current)) => Ok(vec![current]),
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
    fn layers(&self, architecture: Architecture, view: &mut dyn View) -> Result<(Program, Vec<Layer>), ImageError> {
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

fn fetch_bases(
    settings: &Settings,
    reference: &Reference,
    architectures: &[Architecture],
) -> Result<Vec<Base>, ImageError> {
    let client = Client::new(settings.clone(), Keychain::from_env(&ProcessEnv))?;
    let reactor = Reactor::start().map_err(ImageError::Reactor)?;
    let fetch = |architecture: &Architecture| Ok(reactor.wait(client.base(reference, *architecture))?);
    architectures.iter().map(fetch).collect()
}

fn build(cache: &Cache, program: &Program, layers: &[Layer], base: Option<&Base>) -> Result<Built, ImageError> {
    let settings = image_settings(program.name());
    let base = base.map(to_append);
    let packed = layers.iter().map(|layer| cache.pack(layer)).collect::<Result<Vec<_>, _>>()?;
    let image = append::assemble(base.as_ref(), &packed, program.architecture(), &settings)?;
    let plan = ImagePlan::new(&image, base.as_ref(), &packed, &settings);
    Ok(Built { program: program.name().to_owned(), image, plan })
}

fn image_settings(program: &str) -> append::Settings {
    append::Settings { labels: image_labels(program), ..append::Settings::of_program(program) }
}

fn to_append(base: &Base) -> append::Base {
    append::Base {
        reference: base.reference.to_string(),
        digest: base.descriptor.digest.clone(),
        layers: base.layers.clone(),
        config: base.config.clone(),
    }
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
                    writeln!(f, "{}", built.plan)?;
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

/// An image that the engine has.
pub(super) struct Delivered {
    /// What the engine calls it.
    pub(super) image: String,
    /// The program in it; none if the image is not ours.
    pub(super) program: Option<String>,
}

impl Shipment {
    /// Brings the image to where the engine has it.
    pub(super) fn deliver(self, engine: &Engine, view: &mut dyn View) -> Result<Delivered, ImageError> {
        let keychain = Keychain::from_env(&ProcessEnv);
        let program = self.program();
        let tag = self.tag();
        let image = match self.goods {
            Goods::Finished(reference) => pull(engine, &keychain, &reference, view)?,
            Goods::Pushed { repository, built, base } => {
                let images: Vec<Image> = built.into_iter().map(|built| built.image).collect();
                let pushed = push(&self.settings, &images, &repository, base.as_ref(), tag, view)?;
                pull(engine, &keychain, &pushed, view)?
            }
            Goods::Loaded(packed) => load(engine, &keychain, &packed, view)?,
            Goods::ByEngine { packed, dockerfile, repository } => {
                let image = build_at(engine, &keychain, &packed, dockerfile.as_deref(), view)?;
                if let Some(repository) = repository {
                    let login = login(engine, &keychain, &repository)?;
                    let (name, tags) = (repository.to_string(), [tag.to_string()]);
                    let reference = engine.push_image(&image, &name, &tags, login.as_ref(), &mut transferred(view))?;
                    view.say(&format!("image {reference} pushed by the engine"));
                }
                image
            }
        };
        Ok(Delivered { image, program })
    }

    fn program(&self) -> Option<String> {
        match &self.goods {
            Goods::Finished(_) => None,
            Goods::Pushed { built, .. } => Some(built.first()?.program.clone()),
            Goods::Loaded(packed) | Goods::ByEngine { packed, .. } => Some(packed.program.clone()),
        }
    }

    /// A name that people can read, beside the digest that everything refers to: the commit, if there is one.
    fn tag(&self) -> Tag {
        let commit = git::commit(&self.manifest, git::GIT_DEADLINE);
        let text = commit.map(|commit| {
            let hash = &commit.id[..commit.id.len().min(COMMIT_DIGITS)];
            // What could not be found out in time counts as changed.
            if commit.dirty == Some(false) { hash.to_owned() } else { format!("{hash}-dirty") }
        });
        text.as_deref().unwrap_or("latest").parse().expect("hexadecimal digits are a tag")
    }
}

/// Digits of a commit that tell it from others.
const COMMIT_DIGITS: usize = 12;

/// User name and password for what the engine itself fetches or sends.
fn login(
    engine: &Engine,
    keychain: &Keychain,
    repository: &Repository,
) -> Result<Option<(String, String)>, ImageError> {
    Ok(engine.wait(keychain.login(repository))?)
}

/// Makes the engine fetch an image, unless it has it.
fn pull(
    engine: &Engine,
    keychain: &Keychain,
    reference: &Reference,
    view: &mut dyn View,
) -> Result<String, ImageError> {
    let login = login(engine, keychain, reference.repository())?;
    Ok(engine.pull(&reference.to_string(), login.as_ref(), &mut transferred(view))?)
}

/// Says about once a second what the engine is doing.
fn transferred(view: &mut dyn View) -> impl FnMut(TransferProgress) + Send + '_ {
    let mut next = Instant::now() + EVERY;
    move |progress| {
        if Instant::now() < next {
            return;
        }
        next = Instant::now() + EVERY;
        let bytes =
            progress.bytes.map(|(done, total)| format!(" {:.1} of {:.1} MB", done as f64 / 1e6, total as f64 / 1e6));
        view.say(&format!("the engine: {} {}{}", progress.layer, progress.status, bytes.unwrap_or_default()));
    }
}

/// Hands the image to the engine.
fn load(engine: &Engine, keychain: &Keychain, packed: &Packed, view: &mut dyn View) -> Result<String, ImageError> {
    let pulled = packed.base.as_ref().map(|base| pull(engine, keychain, &base.reference, view)).transpose()?;
    let base = packed.base.as_ref().map(to_append);
    let settings = image_settings(&packed.program);
    let archive = Archive::new(base.as_ref(), &packed.layers, packed.architecture, &settings)?;
    let began = Instant::now();
    let loaded = following(view, "loading the image", |progress| {
        let told = |step: LoadProgress| progress(step.sent_bytes, step.total_bytes);
        engine.load(&packed.program, &archive, pulled.as_deref(), &told)
    })?;
    let (megabytes, seconds) = (loaded.sent_bytes as f64 / 1e6, began.elapsed().as_secs_f64());
    view.say(&match loaded.sent_bytes {
        0 => format!("image {} is at the engine already", loaded.tag),
        _ => format!("image {} loaded: {megabytes:.1} MB in {seconds:.1} s", loaded.tag),
    });
    Ok(loaded.id)
}

/// Has the image built by the engine, from the user's Dockerfile or a generated one.
fn build_at(
    engine: &Engine,
    keychain: &Keychain,
    packed: &Packed,
    dockerfile: Option<&Path>,
    view: &mut dyn View,
) -> Result<String, ImageError> {
    let pulled = packed.base.as_ref().map(|base| pull(engine, keychain, &base.reference, view)).transpose()?;
    let base = packed.base.as_ref().map(to_append);
    let settings = image_settings(&packed.program);
    let archive = Archive::new(base.as_ref(), &packed.layers, packed.architecture, &settings)?;
    let dockerfile = match dockerfile {
        Some(path) => Dockerfile::Own(path),
        None => Dockerfile::Generated { base: pulled.as_deref() },
    };
    let logins = Logins::new();
    let built = engine.build(&packed.program, &archive, dockerfile, &logins, &mut |line| view.say(line))?;
    view.say(&format!("image {} built", built.tag));
    Ok(built.id)
}

/// Does `work` in another thread, and says about once a second how many bytes it has come to.
fn following<T: Send>(view: &mut dyn View, what: &str, work: impl FnOnce(&(dyn Fn(u64, u64) + Sync)) -> T + Send) -> T {
    let (told, progress) = mpsc::channel::<(u64, u64)>();
    let told = Mutex::new(told);
    thread::scope(|scope| {
        let working = scope.spawn(move || {
            // Nobody follows any more only if the view is gone.
            work(&|done, total| _ = told.lock().expect("no holder panics").send((done, total)))
        });
        let mut next = Instant::now() + EVERY;
        for (done, total) in progress {
            if Instant::now() >= next {
                next = Instant::now() + EVERY;
                let megabytes = |bytes: u64| bytes as f64 / 1e6;
                view.say(&format!("{what}: {:.1} of {:.1} MB", megabytes(done), megabytes(total)));
            }
        }
        working.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Time between two words about something that takes long.
const EVERY: Duration = Duration::from_secs(1);

/// Pushes the image of one architecture, or those of several with their index.
fn push(
    settings: &Settings,
    images: &[Image],
    repository: &Repository,
    base: Option<&Repository>,
    tag: Tag,
    view: &mut dyn View,
) -> Result<Reference, ImageError> {
    let client = Client::new(settings.clone(), Keychain::from_env(&ProcessEnv))?;
    let reactor = Reactor::start().map_err(ImageError::Reactor)?;
    let index = (images.len() > 1).then(|| append::index(images));
    let mut push = match &index {
        None => Push::image(&images[0], repository),
        Some((descriptor, bytes)) => Push::index(images, descriptor, bytes, repository),
    };
    push = push.tagged(tag);
    if let Some(base) = base {
        push = push.on_base(base);
    }
    let began = Instant::now();
    let pushed = following(view, "pushing the image", |progress| {
        // The watcher outlives the call as far as the compiler knows, so it only notes.
        let seen = Arc::new(Mutex::new((0, 0)));
        let noted = seen.clone();
        let push = push.watched(Arc::new(move |step: &Progress| {
            *noted.lock().expect("no holder panics") = (step.sent_bytes, step.missing_bytes);
        }));
        let pushing = async {
            let mut pushing = pin!(client.push(&push));
            loop {
                match tokio::time::timeout(EVERY, &mut pushing).await {
                    Ok(pushed) => return pushed,
                    Err(_) => {
                        let (done, total) = *seen.lock().expect("no holder panics");
                        progress(done, total);
                    }
                }
            }
        };
        reactor.wait(pushing)
    })?;
    let seconds = began.elapsed().as_secs_f64();
    view.say(&match pushed.unchanged {
        true => format!("image {} is there already ({:.1} KB asked)", pushed.reference, pushed.sent_bytes as f64 / 1e3),
        false => {
            format!("image {} pushed: {:.1} MB in {seconds:.1} s", pushed.reference, pushed.sent_bytes as f64 / 1e6)
        }
    });
    Ok(pushed.reference)
}
