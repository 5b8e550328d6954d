//! A base image: its manifest and its configuration, without its layers.

use serde::Deserialize;

use super::auth::CredentialOrigin;
use super::client::Client;
use super::error::RequestError;
use super::reference::Reference;
use super::session::Session;
use crate::image::pages::SmallPages;
use crate::image::{Architecture, CONFIG, Descriptor, Digest, INDEX, MANIFEST};

/// What Docker called an image's manifest before OCI did.
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// What Docker called an index before OCI did.
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// What Docker called a configuration before OCI did.
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// An image to build on. Its layers stay where they are.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Base {
    /// What it is called: as it was asked for, with the digest of [`Base::manifest`].
    pub reference: Reference,
    /// Of its programs.
    pub architecture: Architecture,
    /// What its manifest is called.
    pub descriptor: Descriptor,
    /// Its manifest, byte by byte.
    pub manifest: Vec<u8>,
    /// What its configuration is called.
    pub config_descriptor: Descriptor,
    /// Its configuration, byte by byte: JSON.
    pub config: Vec<u8>,
    /// Its layers, the lowest one first.
    pub layers: Vec<Descriptor>,
}

/// Failure to look up a base image. Returned by [`Client::base`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BaseError {
    /// The registry has no such image, or does not show it to us.
    #[error(
        "base image `{reference}` does not exist, or may not be seen: {words} (is its name right? a private image needs \
         `docker login`)"
    )]
    Missing {
        /// The image.
        reference: Box<Reference>,
        /// What the registry says.
        words: String,
    },
    /// The image is there, but not for the architecture.
    #[error("base image `{reference}` has no `{wanted}` variant (it has {})", list(found))]
    Architecture {
        /// The image.
        reference: Box<Reference>,
        /// The architecture that was asked for.
        wanted: Architecture,
        /// The ones that there are, as `system/architecture`.
        found: Vec<String>,
    },
    /// What is there is no image that can be built on.
    #[error("base image `{reference}` cannot be built on: {reason}")]
    Unusable {
        /// The image.
        reference: Box<Reference>,
        /// Why.
        reason: String,
    },
    /// A request failed.
    #[error("failed to look up base image `{reference}`")]
    Request {
        /// The image.
        reference: Box<Reference>,
        /// Why.
        #[source]
        source: Box<RequestError>,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Variant>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Variant {
    media_type: String,
    digest: String,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    variant: Option<String>,
}

impl Platform {
    fn fits(&self, wanted: Architecture) -> bool {
        let variant = match wanted {
            Architecture::Amd64 => self.variant.as_deref().is_none_or(|variant| variant == "v1"),
            Architecture::Arm64 => self.variant.as_deref().is_none_or(|variant| variant == "v8"),
        };
        self.os == "linux" && self.architecture == wanted.to_string() && variant
    }
}

impl Client {
    /// Looks up a base image: manifest and configuration of its variant for `architecture`. Layers are not fetched.
    ///
    /// What comes back is pinned: its digest is in [`Base::reference`].
    ///
    /// # Errors
    ///
    /// - [`BaseError::Missing`] if the registry has no such image or does not show it.
    /// - [`BaseError::Architecture`] if it has none for `architecture`; the error lists those that it has.
    /// - [`BaseError::Unusable`] if it is of a kind that cannot be built on, such as an artifact or Docker's first format.
    /// - [`BaseError::Request`] if the registry cannot be asked.
    pub async fn base(&self, reference: &Reference, architecture: Architecture) -> Result<Base, BaseError> {
        let _pages = SmallPages::new();
        let session = Session::read(self, reference.repository());
        let name = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.to_string(),
            (None, None) => unreachable!("a reference has a tag or a digest"),
        };
        let named = || Box::new(reference.clone());
        let unusable = |reason: &str| BaseError::Unusable { reference: named(), reason: reason.to_owned() };
        let failed = |error: RequestError| match error.last() {
            RequestError::Answer { status: 404, words, .. } => {
                BaseError::Missing { reference: named(), words: words.clone() }
            }
            // Docker Hub asks strangers for a password where there is nothing.
            RequestError::Unauthorized(refused) if matches!(refused.origin, CredentialOrigin::Nowhere { .. }) => {
                BaseError::Missing { reference: named(), words: refused.words.clone() }
            }
            _ => BaseError::Request { reference: named(), source: Box::new(error) },
        };

        let every = [MANIFEST, INDEX, DOCKER_MANIFEST, DOCKER_INDEX].join(", ");
        let (mut media_type, mut digest, mut manifest) = session.get_manifest(&name, &every).await.map_err(failed)?;
        if media_type == INDEX || media_type == DOCKER_INDEX {
            let index: Index =
                serde_json::from_slice(&manifest).map_err(|_| unusable("its index cannot be read as one"))?;
            let variant = index.variant(architecture);
            let Some(variant) = variant else {
                let found = index.platforms();
                return Err(BaseError::Architecture { reference: named(), wanted: architecture, found });
            };
            let wanted: Digest = variant.digest.parse().map_err(|_| unusable("its index names no SHA-256 digest"))?;
            let accept = variant.media_type.clone();
            (media_type, digest, manifest) =
                session.get_manifest(&wanted.to_string(), &accept).await.map_err(failed)?;
        }
        if media_type != MANIFEST && media_type != DOCKER_MANIFEST {
            return Err(unusable(&format!("its manifest is of the kind `{}`", media_type.escape_default())));
        }
        let Manifest { config: config_descriptor, layers } =
            serde_json::from_slice(&manifest).map_err(|_| unusable("its manifest cannot be read as one"))?;
        if ![CONFIG, DOCKER_CONFIG].contains(&config_descriptor.media_type.as_str()) {
            let kind = config_descriptor.media_type.escape_default();
            return Err(unusable(&format!("it is an artifact of the kind `{kind}`, not an image")));
        }
        let config = session.get_blob(&config_descriptor.digest).await.map_err(failed)?;
        let platform: Platform =
            serde_json::from_slice(&config).map_err(|_| unusable("its configuration cannot be read as one"))?;
        if platform.os != "linux" || platform.architecture != architecture.to_string() {
            let found = vec![format!("{}/{}", platform.os.escape_default(), platform.architecture.escape_default())];
            return Err(BaseError::Architecture { reference: named(), wanted: architecture, found });
        }
        let size = manifest.len() as u64;
        Ok(Base {
            reference: reference.clone().pinned(digest.clone()),
            architecture,
            descriptor: Descriptor { media_type, digest, size },
            manifest,
            config_descriptor,
            config,
            layers,
        })
    }
}

impl Index {
    /// The first variant that fits, and that is an image.
    fn variant(&self, wanted: Architecture) -> Option<&Variant> {
        self.manifests.iter().find(|variant| {
            let image = [MANIFEST, DOCKER_MANIFEST].contains(&variant.media_type.as_str());
            image && variant.platform.as_ref().is_some_and(|platform| platform.fits(wanted))
        })
    }

    /// What there is; attestations, whose platform is unknown, are passed over.
    fn platforms(&self) -> Vec<String> {
        let platforms = self.manifests.iter().filter_map(|variant| variant.platform.as_ref());
        let known = platforms.filter(|platform| platform.os != "unknown");
        known
            .map(|Platform { os, architecture, variant }| {
                let variant = variant.as_ref().map(|variant| format!("/{variant}")).unwrap_or_default();
                format!("{os}/{architecture}{variant}").escape_default().to_string()
            })
            .collect()
    }
}

fn list(found: &[String]) -> String {
    if found.is_empty() {
        return "none that are named".to_owned();
    }
    found.iter().map(|platform| format!("`{platform}`")).collect::<Vec<_>>().join(", ")
}
