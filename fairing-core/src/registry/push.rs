//! Pushing an image: what is there is not sent again, and nothing is named before all of it is there.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{FutureExt, StreamExt, TryStreamExt, stream};

use super::client::Client;
use super::error::RequestError;
use super::patience::Attempts;
use super::reference::{Reference, Repository, Tag};
use super::session::{Feed, Opened, Payload, Session};
use super::upload::{Count, Fault, Pulse, feed};
use crate::image::pages::SmallPages;
use crate::image::{Blob, Descriptor, Digest, Image, Source};

/// Uploads side by side. More would not be faster on one line, and each holds a piece of its layer in memory.
const PARALLEL: usize = 3;

/// Called whenever something has moved; from several threads, so it should only note what it is told.
pub type Watcher = Arc<dyn Fn(&Progress) + Send + Sync>;

/// How far a push is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Blobs that the registry has by now.
    pub done_blobs: usize,
    /// Blobs of the image: its layers and its configurations.
    pub blobs: usize,
    /// Bytes of blobs that were sent. Goes back when a broken blob starts again.
    pub sent_bytes: u64,
    /// Bytes of blobs that the registry lacked.
    pub missing_bytes: u64,
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pushed {
    /// What was pushed, by its digest.
    pub reference: Reference,
    /// Bytes of blobs and manifests that were sent, those sent again included. Headers come on top.
    pub sent_bytes: u64,
    /// Blobs that were sent, from here or from the base's registry.
    pub sent: usize,
    /// Blobs that were taken over from the base's repository.
    pub mounted: usize,
    /// Blobs that were there. Nobody asks for those of an image that is there.
    pub existed: usize,
    /// Whether the image was there as a whole, so that at most tags were set.
    pub unchanged: bool,
    /// Tags that the registry did not let be set, with its words: many can be told that tags never move.
    pub refused_tags: Vec<(Tag, String)>,
}

/// What to push, and where.
#[derive(Clone)]
pub struct Push<'a> {
    repository: &'a Repository,
    images: &'a [Image],
    index: Option<(&'a Descriptor, &'a [u8])>,
    tags: Vec<Tag>,
    base: Option<&'a Repository>,
    watcher: Option<Watcher>,
}

/// Failure to publish an image. Returned by [`Client::push`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// A request failed.
    #[error("failed to push to `{repository}`")]
    Request {
        /// Where to.
        repository: Repository,
        /// Why.
        #[source]
        source: Box<RequestError>,
    },
    /// A layer or a configuration did not arrive. Safe to repeat: what arrived is not sent again.
    #[error("failed to push blob `{digest}` ({size_bytes} bytes) to `{repository}`")]
    Blob {
        /// Where to.
        repository: Repository,
        /// The blob.
        digest: Digest,
        /// Its size.
        size_bytes: u64,
        /// Why.
        #[source]
        source: Box<RequestError>,
    },
    /// The base image's registry did not give a layer.
    #[error("failed to copy layer `{digest}` of the base image from `{base}`")]
    Copy {
        /// Where it comes from.
        base: Repository,
        /// The layer.
        digest: Digest,
        /// Why.
        #[source]
        source: Box<RequestError>,
    },
    /// The registry does not take the manifest.
    #[error("registry `{}` refused the manifest `{name}` with status {status}: {words}", repository.registry())]
    ManifestRefused {
        /// Where to.
        repository: Repository,
        /// Its digest or its tag.
        name: String,
        /// HTTP's status code.
        status: u16,
        /// What the registry says.
        words: String,
    },
    /// A layer cannot be read.
    #[error("failed to read layer `{digest}` from `{}`", path.display())]
    ReadLayer {
        /// The layer.
        digest: Digest,
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A blob is not what the image says it is: its file was changed meanwhile.
    #[error("the bytes of blob `{digest}`{} have another digest (were they changed during the push?)", of(path))]
    Changed {
        /// What it was.
        digest: Digest,
        /// Its file, if it has one.
        path: Option<PathBuf>,
    },
    /// An image stands on a base that the push was not told.
    #[error("layer `{digest}` is one of a base image, and nobody said where that is")]
    NoBase {
        /// The layer.
        digest: Digest,
    },
}

impl PushError {
    /// The failed request, if one is the reason.
    pub fn request(&self) -> Option<&RequestError> {
        match self {
            PushError::Request { source, .. } | PushError::Blob { source, .. } | PushError::Copy { source, .. } => {
                Some(source.last())
            }
            _ => None,
        }
    }
}

impl<'a> Push<'a> {
    /// One image.
    pub fn image(image: &'a Image, repository: &'a Repository) -> Self {
        let images = std::slice::from_ref(image);
        Self { repository, images, index: None, tags: Vec::new(), base: None, watcher: None }
    }

    /// Images for several architectures under one index: its descriptor and its bytes.
    pub fn index(images: &'a [Image], descriptor: &'a Descriptor, index: &'a [u8], repository: &'a Repository) -> Self {
        Self { repository, images, index: Some((descriptor, index)), tags: Vec::new(), base: None, watcher: None }
    }

    /// Names the image `tag` too, once it is there.
    #[must_use]
    pub fn tagged(mut self, tag: Tag) -> Self {
        self.tags.push(tag);
        self
    }

    /// Where the layers with [`Source::Base`] are.
    #[must_use]
    pub fn on_base(mut self, base: &'a Repository) -> Self {
        self.base = Some(base);
        self
    }

    /// Tells `watcher` how far it is.
    #[must_use]
    pub fn watched(mut self, watcher: Watcher) -> Self {
        self.watcher = Some(watcher);
        self
    }

    /// What names all of it.
    fn top(&self) -> (&'a Descriptor, &'a [u8]) {
        match self.index {
            Some(index) => index,
            None => {
                let image = &self.images[0];
                (&image.descriptor, &image.manifest)
            }
        }
    }
}

impl fmt::Debug for Push<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Push")
            .field("repository", &self.repository)
            .field("top", &self.top().0)
            .field("tags", &self.tags)
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Brings an image into a repository.
    ///
    /// Asks for the whole image first; if it is there, at most tags are set. Else the blobs that the registry lacks are
    /// mounted from the base's repository, copied from the base's registry or sent from here, three at a time. What breaks
    /// is tried again, blob by blob. Manifests follow when all blobs are there, then the index, then the tags: whoever pulls
    /// meanwhile gets the old image or the new one. A tag that the registry refuses is no failure: it is named in
    /// [`Pushed::refused_tags`].
    ///
    /// # Errors
    ///
    /// - [`PushError::Request`] and [`PushError::Blob`] with the failed request: see [`RequestError`].
    /// - [`PushError::Copy`] if the base's registry fails.
    /// - [`PushError::ManifestRefused`] if the registry does not take a manifest by its digest; its words are in the error.
    /// - [`PushError::ReadLayer`] and [`PushError::Changed`] if a blob's file is gone or is no longer what it was.
    /// - [`PushError::NoBase`] if an image has a base that [`Push::on_base`] does not name.
    pub async fn push(&self, push: &Push<'_>) -> Result<Pushed, PushError> {
        let _pages = SmallPages::new();
        let session = Session::write(self, push.repository, push.base);
        let base = push.base.map(|base| Session::read(self, base));
        let work = Work { client: self, push, session, base, meter: Arc::new(Meter::new(push.watcher.clone())) };
        work.run().await
    }
}

impl Client {
    /// Asks whether an image could be pushed to `repository`. Changes nothing there, and does not ask twice: a registry that
    /// is away for a moment may be there when it is needed.
    ///
    /// # Errors
    ///
    /// [`PushError::Request`] with what the registry says.
    pub async fn check_push(&self, repository: &Repository) -> Result<(), PushError> {
        let tried = Session::write(self, repository, None).try_upload().await;
        tried.map_err(|source| PushError::Request { repository: repository.clone(), source: Box::new(source) })
    }
}

/// A push that goes on.
struct Work<'a> {
    client: &'a Client,
    push: &'a Push<'a>,
    session: Arc<Session>,
    /// Reads from the base's repository.
    base: Option<Arc<Session>>,
    meter: Arc<Meter>,
}

/// What is to be done for a blob.
enum Step {
    Existed,
    Mounted,
    /// To be sent, to an address if one is open already.
    Missing(Option<reqwest::Url>),
}

impl Work<'_> {
    async fn run(&self) -> Result<Pushed, PushError> {
        let (top, manifest) = self.push.top();
        let mut pushed = Pushed {
            reference: self.push.repository.at(top.digest.clone()),
            sent_bytes: 0,
            sent: 0,
            mounted: 0,
            existed: 0,
            unchanged: false,
            refused_tags: Vec::new(),
        };
        // A tag that stands for the image says that it is there, in one question.
        let mut tags = Vec::new();
        for tag in &self.push.tags {
            if self.find(&tag.to_string(), top).await? != Some(Some(top.digest.clone())) {
                tags.push(tag);
            }
        }
        let told = tags.len() < self.push.tags.len();
        pushed.unchanged = told || self.find(&top.digest.to_string(), top).await?.is_some();
        if !pushed.unchanged {
            self.store(&mut pushed).await?;
        }
        for tag in tags {
            if let Err(error) = self.put(&tag.to_string(), top, manifest).await {
                // The image is there and has its digest; a tag is a name for people.
                let words = refusal(&error).ok_or(error)?;
                pushed.refused_tags.push((tag.clone(), words));
            }
        }
        pushed.sent_bytes = self.meter.all.load(Ordering::Relaxed);
        Ok(pushed)
    }

    /// Brings blobs and manifests there.
    ///
    /// A registry may lose sight of a blob for a moment while another push brings the same one: docker-registry then
    /// refuses the manifest. The blobs are asked for once more and the manifest is offered again, within bounds.
    async fn store(&self, pushed: &mut Pushed) -> Result<(), PushError> {
        let patience = self.client.patience();
        for attempt in 1.. {
            self.send_blobs(pushed, attempt == 1).await?;
            match self.put_manifests().await {
                Err(error) if attempt < patience.attempts && self.lost_sight(&error) => {
                    let pause = patience.pause.saturating_mul(1 << (attempt - 1).min(16));
                    tokio::time::sleep(pause.min(patience.longest_pause)).await;
                }
                stored => return stored,
            }
        }
        unreachable!("the last attempt returns")
    }

    async fn put_manifests(&self) -> Result<(), PushError> {
        for Image { descriptor, manifest, .. } in self.push.images {
            self.put(&descriptor.digest.to_string(), descriptor, manifest).await?;
        }
        if let Some((descriptor, index)) = self.push.index {
            self.put(&descriptor.digest.to_string(), descriptor, index).await?;
        }
        Ok(())
    }

    /// Whether a manifest was refused for a blob that is there, by all that is known.
    fn lost_sight(&self, error: &PushError) -> bool {
        let PushError::ManifestRefused { words, .. } = error else { return false };
        let mut blobs = self.push.images.iter().flat_map(|image| image.layers.iter().chain([&image.config]));
        words.contains("BLOB_UNKNOWN") && blobs.any(|blob| words.contains(&blob.descriptor.digest.to_string()))
    }

    /// Asks for the manifest `name`.
    async fn find(&self, name: &str, descriptor: &Descriptor) -> Result<Option<Option<Digest>>, PushError> {
        let found = self.session.find_manifest(name, &descriptor.media_type, true).await;
        found.map_err(|source| self.failed(source))
    }

    /// Brings every blob of every image there; `first` counts those that were there before.
    async fn send_blobs(&self, pushed: &mut Pushed, first: bool) -> Result<(), PushError> {
        let mut seen = HashSet::new();
        let blobs = self.push.images.iter().flat_map(|image| image.layers.iter().chain([&image.config]));
        let blobs: Vec<&Blob> = blobs.filter(|blob| seen.insert(&blob.descriptor.digest)).collect();
        if let Some(blob) = blobs.iter().find(|blob| blob.source == Source::Base && self.push.base.is_none()) {
            return Err(PushError::NoBase { digest: blob.descriptor.digest.clone() });
        }
        self.meter.update(|progress| progress.blobs = blobs.len());

        // All are asked for before the first is sent, so that a view knows how much there is to do.
        // The futures are collected first: a stream that made them would not be `Send`.
        let looks: Vec<_> = blobs.iter().map(|blob| self.look(blob).boxed()).collect();
        let steps: Vec<(&Blob, Step)> = stream::iter(looks).buffer_unordered(PARALLEL).try_collect().await?;
        let mut missing = Vec::new();
        for (blob, step) in steps {
            match step {
                // In a second look these are the ones of the first.
                Step::Existed => pushed.existed += usize::from(first),
                Step::Mounted => pushed.mounted += 1,
                Step::Missing(url) => missing.push((blob, url)),
            }
        }
        self.meter.update(|progress| {
            progress.done_blobs = progress.blobs - missing.len();
            progress.missing_bytes += missing.iter().map(|(blob, _)| blob.descriptor.size).sum::<u64>();
        });
        pushed.sent += missing.len();
        let sends: Vec<_> = missing.into_iter().map(|(blob, url)| self.send(blob, url).boxed()).collect();
        stream::iter(sends).buffer_unordered(PARALLEL).try_collect().await
    }

    /// Finds out what is to be done for a blob; mounts it if that is possible.
    async fn look<'b>(&self, blob: &'b Blob) -> Result<(&'b Blob, Step), PushError> {
        let digest = &blob.descriptor.digest;
        let failed = |source| self.blob_failed(blob, source);
        if self.session.has_blob(digest).await.map_err(failed)? {
            return Ok((blob, Step::Existed));
        }
        let beside = self
            .push
            .base
            .filter(|base| blob.source == Source::Base && base.registry() == self.push.repository.registry());
        match beside.filter(|base| *base != self.push.repository) {
            None => Ok((blob, Step::Missing(None))),
            Some(base) => match self.session.mount(digest, base).await.map_err(failed)? {
                Opened::Mounted => Ok((blob, Step::Mounted)),
                Opened::Upload(url) => Ok((blob, Step::Missing(url))),
            },
        }
    }

    /// Sends a blob, and again from its first byte while that may help.
    async fn send(&self, blob: &Blob, mut url: Option<reqwest::Url>) -> Result<(), PushError> {
        let Blob { descriptor: Descriptor { digest, size, .. }, .. } = blob;
        let meter = self.meter.clone();
        let pulse = Pulse::new(*size, Box::new(move |count| meter.count(count)));
        let open = || -> Feed { feed(blob, self.base.as_ref(), &pulse) };
        let mut attempts = Attempts::new(self.client.patience());
        loop {
            let attempt = async {
                let url = match url.take() {
                    Some(url) => url,
                    None => self.session.open_upload(digest).await?,
                };
                let payload = Payload::Stream { size: *size, pulse: &pulse, open: &open };
                self.session.send_blob(url, digest, payload).await
            };
            let Err(error) = attempt.await else { break };
            let again = match pulse.fault() {
                Some(Fault::Read { path, source }) => {
                    return Err(PushError::ReadLayer { digest: digest.clone(), path, source });
                }
                Some(Fault::Changed { path }) => return Err(PushError::Changed { digest: digest.clone(), path }),
                Some(Fault::Origin(source)) => attempts.again(source, true).await.map_err(|source| {
                    let base = self.push.base.unwrap_or(self.push.repository).clone();
                    PushError::Copy { base, digest: digest.clone(), source: Box::new(source) }
                }),
                None => attempts.again(error, true).await.map_err(|source| self.blob_failed(blob, source)),
            };
            again?;
        }
        self.meter.update(|progress| progress.done_blobs += 1);
        Ok(())
    }

    /// Stores a manifest under a tag or its digest.
    async fn put(&self, name: &str, descriptor: &Descriptor, manifest: &[u8]) -> Result<(), PushError> {
        self.meter.all.fetch_add(manifest.len() as u64, Ordering::Relaxed);
        let stored = self.session.put_manifest(name, &descriptor.media_type, manifest, &descriptor.digest).await;
        stored.map_err(|source| match source.last() {
            RequestError::Answer { status: status @ 400..=499, words, .. } if !source.last().is_transient() => {
                let (repository, words) = (self.push.repository.clone(), words.clone());
                PushError::ManifestRefused { repository, name: name.to_owned(), status: *status, words }
            }
            _ => self.failed(source),
        })
    }

    fn failed(&self, source: RequestError) -> PushError {
        PushError::Request { repository: self.push.repository.clone(), source: Box::new(source) }
    }

    fn blob_failed(&self, blob: &Blob, source: RequestError) -> PushError {
        let Descriptor { digest, size, .. } = &blob.descriptor;
        let (repository, digest) = (self.push.repository.clone(), digest.clone());
        PushError::Blob { repository, digest, size_bytes: *size, source: Box::new(source) }
    }
}

/// Adds up what the uploads say.
struct Meter {
    /// Bytes sent, those sent again included.
    all: AtomicU64,
    progress: Mutex<Progress>,
    watcher: Option<Watcher>,
}

impl Meter {
    fn new(watcher: Option<Watcher>) -> Self {
        Self { all: AtomicU64::new(0), progress: Mutex::default(), watcher }
    }

    fn count(&self, count: Count) {
        match count {
            Count::Taken(bytes) => {
                self.all.fetch_add(bytes, Ordering::Relaxed);
                self.update(|progress| progress.sent_bytes += bytes);
            }
            Count::Lost(bytes) => self.update(|progress| progress.sent_bytes -= bytes),
        }
    }

    fn update(&self, change: impl FnOnce(&mut Progress)) {
        let now = {
            let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut progress);
            *progress
        };
        if let Some(watcher) = &self.watcher {
            watcher(&now);
        }
    }
}

/// The words of a registry that refused a tag, if that is the failure.
fn refusal(error: &PushError) -> Option<String> {
    match error {
        PushError::ManifestRefused { status, words, .. } => Some(format!("status {status}, {words}")),
        PushError::Request { source, .. } => match source.last() {
            RequestError::Forbidden(refused) | RequestError::Unauthorized(refused) => Some(refused.words.clone()),
            _ => None,
        },
        _ => None,
    }
}

fn of(path: &Option<PathBuf>) -> String {
    path.as_ref().map(|path| format!(" in `{}`", path.display())).unwrap_or_default()
}
