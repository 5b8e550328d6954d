//! Bringing an image to where the engine has it.

use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::pack::{Built, Packed, image_settings, to_append};
use super::{Goods, ImageError, Shipment};
use crate::config::ProcessEnv;
use crate::image::Image;
use crate::image::append;
use crate::image::archive::Archive;
use crate::image::cache::Cache;
use crate::launch::docker::{Dockerfile, Engine, LoadProgress, Logins, TransferProgress};
use crate::observe::git;
use crate::observe::terminal::View;
use crate::reactor::Reactor;
use crate::registry::{Client, Keychain, Login, Progress, Push, PushError, Reference, Repository, Settings, Tag};

/// An image that the engine has.
pub(crate) struct Delivered {
    /// What containers are created from: by digest if it came from a registry, else by its id.
    pub(crate) image: String,
    /// The engine's own name for it.
    pub(crate) id: String,
    /// The program in it; none if the image is not ours.
    pub(crate) program: Option<String>,
}

impl Shipment {
    /// Brings the image of the run `name` to where the engine has it.
    pub(crate) fn deliver(self, engine: &Engine, name: &str, view: &mut dyn View) -> Result<Delivered, ImageError> {
        let keychain = Keychain::from_env(&ProcessEnv);
        let program = self.program();
        let tag = tag(&self.manifest, name);
        let (image, id) = match self.goods {
            Goods::Finished(reference) => {
                let id = pull(engine, &keychain, &reference, view)?;
                (id.clone(), id)
            }
            Goods::Pushed { repository, built, base, cache } => {
                let pushed = push_built(&self.settings, &repository, built, base.as_ref(), &cache, tag.as_ref(), view)?;
                let id = pull(engine, &keychain, &pushed, view)?;
                (pushed.to_string(), id)
            }
            Goods::Loaded(packed) => {
                let id = load(engine, &keychain, &packed, view)?;
                (id.clone(), id)
            }
            Goods::ByEngine { packed, dockerfile, repository } => {
                let id = build_at(engine, &keychain, &packed, dockerfile.as_deref(), view)?;
                let mut image = id.clone();
                if let Some(repository) = repository {
                    image = push_from(engine, &keychain, &id, &repository, tag.as_ref(), view)?;
                }
                (image, id)
            }
        };
        Ok(Delivered { image, id, program })
    }

    /// Brings the image of the run `name` to where a cluster gets it. Returns its name there, by digest.
    #[cfg(feature = "kubernetes")]
    pub(crate) fn deliver_to_registry(self, name: &str, view: &mut dyn View) -> Result<Reference, ImageError> {
        let tag = tag(&self.manifest, name);
        match self.goods {
            Goods::Finished(reference) => Ok(super::pack::resolve(&self.settings, &reference)?),
            Goods::Pushed { repository, built, base, cache } => {
                push_built(&self.settings, &repository, built, base.as_ref(), &cache, tag.as_ref(), view)
            }
            Goods::ByEngine { packed, dockerfile, repository } => {
                let repository = repository.ok_or(ImageError::NoRepository)?;
                let engine = Engine::connect(&ProcessEnv)?;
                let keychain = Keychain::from_env(&ProcessEnv);
                let id = build_at(&engine, &keychain, &packed, dockerfile.as_deref(), view)?;
                Ok(push_from(&engine, &keychain, &id, &repository, tag.as_ref(), view)?.parse()?)
            }
            Goods::Loaded(_) => Err(ImageError::NoRepository),
        }
    }

    fn program(&self) -> Option<String> {
        match &self.goods {
            Goods::Finished(_) => None,
            Goods::Pushed { built, .. } => Some(built.first()?.program.name().to_owned()),
            Goods::Loaded(packed) | Goods::ByEngine { packed, .. } => Some(packed.program.clone()),
        }
    }
}

/// A name that people can read, beside the digest that everything refers to: the commit of the folder, or else the name of
/// the run. Never `latest`, which may be a user's own, and pushing it would move that.
///
/// It is no part of the image, so the digest does not depend on it.
fn tag(folder: &Path, run: &str) -> Option<Tag> {
    let Some(commit) = git::commit(folder, git::GIT_DEADLINE) else { return run.parse().ok() };
    let hash = &commit.id[..commit.id.len().min(COMMIT_DIGITS)];
    // What could not be found out in time counts as changed.
    let text = if commit.dirty == Some(false) { hash.to_owned() } else { format!("{hash}-dirty") };
    Some(text.parse().expect("hexadecimal digits are a tag"))
}

/// A tag for the image `id` that is nobody's own.
fn tag_of_image(id: &str) -> String {
    let digits = id.trim_start_matches("sha256:");
    format!("run-{}", &digits[..digits.len().min(IMAGE_DIGITS)])
}

/// Makes the engine send an image that it has built to a registry. Returns its name there, by digest.
fn push_from(
    engine: &Engine,
    keychain: &Keychain,
    id: &str,
    repository: &Repository,
    tag: Option<&Tag>,
    view: &mut dyn View,
) -> Result<String, ImageError> {
    let login = login(engine, keychain, repository)?;
    // An engine sends nothing without a tag.
    let tags = [tag.map_or_else(|| tag_of_image(id), ToString::to_string)];
    let image = engine.push_image(id, &repository.to_string(), &tags, login.as_ref(), &mut transferred(view))?;
    view.say(&format!("image {image} pushed by the engine"));
    Ok(image)
}

/// Digits of a commit that tell it from others.
const COMMIT_DIGITS: usize = 12;
/// Digits of an image's id that tell it from others; engines show as many.
const IMAGE_DIGITS: usize = 12;

/// The login for what the engine itself fetches or sends.
fn login(engine: &Engine, keychain: &Keychain, repository: &Repository) -> Result<Option<Login>, ImageError> {
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
    let logins = match dockerfile {
        Dockerfile::Own(path) => logins(engine, keychain, path)?,
        Dockerfile::Generated { .. } => Logins::new(),
    };
    let built = engine.build(&packed.program, &archive, dockerfile, &logins, &mut |line| view.say(line))?;
    view.say(&format!("image {} built", built.tag));
    Ok(built.id)
}

/// The logins for the images that a Dockerfile stands on.
fn logins(engine: &Engine, keychain: &Keychain, dockerfile: &Path) -> Result<Logins, ImageError> {
    // One that cannot be read is named when it is built.
    let text = std::fs::read_to_string(dockerfile).unwrap_or_default();
    let mut logins = Logins::new();
    // What was built earlier in the same file, and nothing at all, come from no registry.
    let mut local = vec!["scratch".to_owned()];
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if !words.next().is_some_and(|word| word.eq_ignore_ascii_case("from")) {
            continue;
        }
        let Some(image) = words.find(|word| !word.starts_with("--")) else { continue };
        let is_local = local.iter().any(|name| name.eq_ignore_ascii_case(image));
        if words.next().is_some_and(|word| word.eq_ignore_ascii_case("as")) {
            local.extend(words.next().map(str::to_owned));
        }
        let Some(image) = image.parse::<Reference>().ok().filter(|_| !is_local) else { continue };
        if let Some(login) = login(engine, keychain, image.repository())? {
            logins.insert(image.repository().registry().to_string(), login);
        }
    }
    Ok(logins)
}

/// Does `work` in another thread, and says about once a second how many bytes it has come to.
fn following<T: Send>(view: &mut dyn View, what: &str, work: impl FnOnce(&(dyn Fn(u64, u64) + Sync)) -> T + Send) -> T {
    let (told, progress) = mpsc::sync_channel::<(u64, u64)>(1);
    thread::scope(|scope| {
        let working = scope.spawn(move || {
            // What finds no room is followed by something newer.
            work(&|done, total| _ = told.try_send((done, total)))
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

/// Pushes what was packed; anew if a layer is not what the cache said of it.
fn push_built(
    settings: &Settings,
    repository: &Repository,
    mut built: Vec<Built>,
    base: Option<&Repository>,
    cache: &Cache,
    tag: Option<&Tag>,
    view: &mut dyn View,
) -> Result<Reference, ImageError> {
    let images = |built: &[Built]| built.iter().map(|built| built.image.clone()).collect::<Vec<_>>();
    match push(settings, &images(&built), repository, base, tag, view) {
        // What the cache said about a layer is read only when the layer is sent.
        Err(ImageError::Push(PushError::Changed { .. } | PushError::ReadLayer { .. })) => {
            built.iter_mut().try_for_each(|built| built.check(cache))?;
            push(settings, &images(&built), repository, base, tag, view)
        }
        pushed => pushed,
    }
}

/// Pushes the image of one architecture, or those of several with their index.
fn push(
    settings: &Settings,
    images: &[Image],
    repository: &Repository,
    base: Option<&Repository>,
    tag: Option<&Tag>,
    view: &mut dyn View,
) -> Result<Reference, ImageError> {
    let client = Client::new(settings.clone(), Keychain::from_env(&ProcessEnv))?;
    let reactor = Reactor::start().map_err(ImageError::Reactor)?;
    let index = (images.len() > 1).then(|| append::index(images));
    let mut push = match &index {
        None => Push::image(&images[0], repository),
        Some((descriptor, bytes)) => Push::index(images, descriptor, bytes, repository),
    };
    if let Some(tag) = tag {
        push = push.tagged(tag.clone());
    }
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
    for (tag, words) in &pushed.refused_tags {
        view.say(&format!("warning: the registry refused the tag `{tag}`, and the image has its digest only: {words}"));
    }
    Ok(pushed.reference)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::observe::run_folder::run_name;

    #[test]
    fn an_image_is_tagged_with_the_commit_and_outside_of_git_with_the_run() {
        let folder = tempfile::tempdir().unwrap();
        let run = run_name("Fashion", std::time::SystemTime::UNIX_EPOCH);
        let tag = |folder: &Path| tag(folder, &run);
        assert_eq!(tag(folder.path()).unwrap().to_string(), run);
        let git = |arguments: &[&str]| {
            let mut git = Command::new("git");
            git.arg("-C").arg(folder.path()).args(["-c", "user.name=a", "-c", "user.email=a@example.org"]);
            assert!(git.args(arguments).stdout(Stdio::null()).status().unwrap().success(), "git {arguments:?}");
        };
        git(&["init", "--quiet"]);
        git(&["commit", "--quiet", "--allow-empty", "-m", "first"]);
        let commit = git::commit(folder.path(), git::GIT_DEADLINE).unwrap().id;
        assert_eq!(tag(folder.path()).unwrap().to_string(), commit[..12]);
        std::fs::write(folder.path().join("new"), "x").unwrap();
        assert_eq!(tag(folder.path()).unwrap().to_string(), format!("{}-dirty", &commit[..12]));
    }

    #[test]
    fn what_an_engine_pushes_without_another_tag_has_its_id() {
        let id = format!("sha256:{}", "0123456789abcdef".repeat(4));
        assert_eq!(tag_of_image(&id), "run-0123456789ab");
        assert!(tag_of_image(&id).parse::<Tag>().is_ok());
    }
}
