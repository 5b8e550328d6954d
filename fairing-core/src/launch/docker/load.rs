//! Handing an image to the engine without any registry.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use bollard::models::{BuildInfo, ImageConfig, ImageInspect};
use bollard::query_parameters as query;
use futures_util::future::join_all;

use super::build::{BuildError, Dockerfile, Logins};
use super::container::MANAGER_LABEL;
use super::engine::{Engine, EngineError, in_time};
use super::stream::{ExchangeError, exchange};
use super::tidy::renew;
use crate::image::StreamError;
use crate::image::archive::Archive;

/// Label of an image with the name of the program that it was made of.
pub const PROGRAM_LABEL: &str = "fairing.dev/program";

/// How the names of fairing's images begin.
pub(super) const OWN_NAMES: &str = "fairing/";

/// How long the engine may neither take a byte nor say a word. Unpacking is silent and a large layer on a slow disk takes
/// its time.
const SILENCE: Duration = Duration::from_secs(300);

/// Images whose layers are looked at in search of what need not be sent. Runs leave one image of each program.
const MOST_LOOKED_AT: usize = 16;

/// How often an image is sent that another launcher removes as soon as it is there, each time by its own bad luck.
const ATTEMPTS: usize = 3;

/// Longest name in a tag; engines allow some more.
const NAME_BYTES: usize = 128;

/// Hexadecimal digits of the image's id in its tag: enough to tell apart all the images of a program there will ever be.
const ID_DIGITS: usize = 12;

/// Failure to hand an image to the engine. Returned by [`Engine::load`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The image cannot be read here.
    #[error("failed to read the image `{image}`")]
    Read {
        /// Its tag.
        image: String,
        /// The reason.
        source: StreamError,
    },
    /// The engine lacks the image that the layers are put on, so it was removed after it had been pulled.
    #[error("the engine does not have the base of the image `{image}` (pull it again)")]
    NoBase {
        /// The tag.
        image: String,
    },
    /// The engine said that it has the image, and then it had not: another run of the program has tidied up in between.
    #[error("the image `{image}` was removed from the engine as soon as it was there (start the run again)")]
    Gone {
        /// Its tag.
        image: String,
    },
    /// The engine has to build an image that is put on a base, and failed.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// An image that the engine has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// What containers are created from.
    pub id: String,
    /// What people call it.
    pub tag: String,
    /// Bytes of layers that were sent; 0 if the engine had the image.
    pub sent_bytes: u64,
}

/// How far the sending of an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Bytes to be sent.
    pub total_bytes: u64,
}

/// The labels by which fairing knows its images; an image without them is never removed.
pub fn image_labels(program: &str) -> BTreeMap<String, String> {
    let pairs = [MANAGER_LABEL, (PROGRAM_LABEL, program)];
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

impl Engine {
    /// Hands the image of `program` to the engine, unless the engine has it.
    ///
    /// Layers that another image of fairing has already are not sent, where the engine can do without them. For an image
    /// on a base, `base` is what [`Engine::pull`] returned for it: the layers of a base are never sent. An engine that takes
    /// only whole images has to build such an image, as by [`Engine::build`], and calls it by another id than the archive's.
    ///
    /// # Errors
    ///
    /// [`LoadError`]; also if nothing moves for five minutes.
    pub fn load(
        &self,
        program: &str,
        archive: &Archive<'_>,
        base: Option<&str>,
        progress: &(dyn Fn(LoadProgress) + Sync),
    ) -> Result<Loaded, LoadError> {
        if archive.base_layers_count() > 0 && !self.takes_parts() {
            return Ok(self.build(program, archive, Dockerfile::Generated { base }, &Logins::new(), &mut |_| {})?);
        }
        let tag = tag(program, &archive.image_id().hex());
        if let Some(id) = self.loaded(&tag, archive)? {
            return Ok(Loaded { id, tag, sent_bytes: 0 });
        }
        let before = self.called(&tag);
        let mut sent_bytes = 0;
        for _ in 0..ATTEMPTS {
            sent_bytes += self.send_missing(&tag, archive, base, progress)?;
            if let Some(id) = self.loaded(&tag, archive)? {
                self.forget(before, &id);
                return Ok(Loaded { id, tag, sent_bytes });
            }
        }
        Err(LoadError::Gone { image: tag })
    }

    /// Sends what the engine lacks of the image, and returns how many bytes that were.
    fn send_missing(
        &self,
        tag: &str,
        archive: &Archive<'_>,
        base: Option<&str>,
        progress: &(dyn Fn(LoadProgress) + Sync),
    ) -> Result<u64, LoadError> {
        let base_layers = archive.base_layers_count();
        let known = if self.takes_parts() { self.known_layers(archive, base)? } else { 0 };
        if known < base_layers {
            return Err(LoadError::NoBase { image: tag.to_owned() });
        }
        match self.send(tag, archive, known, progress) {
            // An image with these layers may have been removed meanwhile.
            Err(LoadError::Engine(error)) if known > base_layers && !error.is_silence() => {
                self.send(tag, archive, base_layers, progress)?;
                Ok(archive.size_bytes(base_layers))
            }
            sent => sent.map(|()| archive.size_bytes(known)),
        }
    }

    /// The id of the image called `tag`, if it is the archive's.
    fn loaded(&self, tag: &str, archive: &Archive<'_>) -> Result<Option<String>, EngineError> {
        let inspected = self.call(&format!("look for the image `{tag}`"), self.docker().inspect_image(tag));
        match inspected {
            Ok(image) if is_of(&image, archive) => {
                // Another run of the program may end before this one begins.
                self.reactor().wait(renew(self.docker(), &image));
                Ok(image.id)
            }
            Err(error) if !error.is_absence() => Err(error),
            _ => Ok(None),
        }
    }

    /// How many layers of the archive, from the lowest on, the engine has for certain.
    fn known_layers(&self, archive: &Archive<'_>, base: Option<&str>) -> Result<usize, EngineError> {
        let docker = self.docker();
        let most = async {
            let label = format!("{}={}", MANAGER_LABEL.0, MANAGER_LABEL.1);
            let filters = HashMap::from([("label".to_owned(), vec![label])]);
            let options = query::ListImagesOptionsBuilder::default().filters(&filters).build();
            let images = in_time("list the images", docker.list_images(Some(options))).await?;
            let ids = images.into_iter().map(|image| image.id).take(MOST_LOOKED_AT);
            let looked_at = ids.chain(base.map(str::to_owned)).map(|id| async move {
                // One that has just been removed has nothing to offer.
                let image = in_time("look at an image", docker.inspect_image(&id)).await.unwrap_or_default();
                common_layers(&image, archive)
            });
            Ok(join_all(looked_at).await.into_iter().max().unwrap_or(0))
        };
        self.reactor().wait(most)
    }

    fn send(
        &self,
        tag: &str,
        archive: &Archive<'_>,
        known: usize,
        progress: &(dyn Fn(LoadProgress) + Sync),
    ) -> Result<(), LoadError> {
        let total_bytes = archive.size_bytes(known);
        // The archive is a little more than its layers.
        let sent = |bytes: u64| progress(LoadProgress { sent_bytes: bytes.min(total_bytes), total_bytes });
        let options = query::ImportImageOptionsBuilder::default().quiet(true).build();
        let sending = exchange(
            self,
            &format!("load the image `{tag}`"),
            SILENCE,
            |to| archive.write_to(tag, known, to),
            &sent,
            |body| self.docker().import_image_stream(options, body, None),
            &mut |_: BuildInfo| {},
        );
        sending.map_err(|error| match error {
            ExchangeError::Body(source) => LoadError::Read { image: tag.to_owned(), source },
            ExchangeError::Engine(error) => error.into(),
        })
    }
}

/// Whether `image` is the archive's.
///
/// Not every engine calls an image by the digest of its configuration, so what matters of the configuration is compared.
fn is_of(image: &ImageInspect, archive: &Archive<'_>) -> bool {
    let count = image.root_fs.as_ref().and_then(|root| root.layers.as_ref()).map_or(0, Vec::len);
    if count != archive.diff_ids().len() || common_layers(image, archive) != count {
        return false;
    }
    if image.id.as_deref() == Some(&archive.image_id().to_string()) {
        return true;
    }
    let wanted = serde_json::from_slice::<serde_json::Value>(archive.config()).unwrap_or_default();
    let wanted = serde_json::from_value::<ImageConfig>(wanted["config"].clone()).unwrap_or_default();
    image.config.as_ref().is_some_and(|found| {
        found.entrypoint == wanted.entrypoint
            && found.env == wanted.env
            && found.user == wanted.user
            && found.working_dir == wanted.working_dir
            && found.labels == wanted.labels
    })
}

/// How many layers `image` and the archive have in common, from the lowest on.
fn common_layers(image: &ImageInspect, archive: &Archive<'_>) -> usize {
    let layers = image.root_fs.iter().flat_map(|root| root.layers.iter().flatten());
    layers.zip(archive.diff_ids()).take_while(|(found, wanted)| found == wanted).count()
}

/// What people call the image of a program, by the hexadecimal digits of its id.
pub(super) fn tag(program: &str, hex: &str) -> String {
    format!("{}:{}", repository(program), &hex[..ID_DIGITS])
}

/// The name that all images of a program have in common.
pub(super) fn repository(program: &str) -> String {
    let parts = program.split(|character: char| !character.is_ascii_alphanumeric()).filter(|part| !part.is_empty());
    let mut name = parts.collect::<Vec<_>>().join("-").to_ascii_lowercase();
    name.truncate(NAME_BYTES);
    let name = name.trim_end_matches('-');
    format!("{OWN_NAMES}{}", if name.is_empty() { "program" } else { name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_a_program_gives_a_tag_that_engines_take() {
        #[track_caller]
        fn check(program: &str, expected: &str) {
            assert_eq!(repository(program), format!("fairing/{expected}"));
        }
        check("fashion_mnist", "fashion-mnist");
        check("Fashion.Mnist", "fashion-mnist");
        check("--a__b--", "a-b");
        check("größe", "gr-e");
        check("学習", "program");
        check("", "program");
        check(&format!("{}-b", "a".repeat(NAME_BYTES - 1)), &"a".repeat(NAME_BYTES - 1));
        assert_eq!(tag("a", &"0123456789abcdef".repeat(4)), "fairing/a:0123456789ab");
    }
}
