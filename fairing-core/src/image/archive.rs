//! An image as one archive, which an engine loads without a registry (`docker load`).
//!
//! The engine knows the image by the digest of its configuration; the layers are not compressed. Nothing of the archive is
//! held in memory but the configuration.

use std::io::Write;

use serde_json::json;

use super::append::{AppendError, Base, Settings, configuration};
use super::content::StreamError;
use super::layer::{Layer, LayerName, diff_ids};
use super::{Architecture, Digest};

/// Failure to prepare an archive. Returned by [`Archive::new`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// What goes into a layer cannot be read.
    #[error("cannot pack the {layer}")]
    Layer {
        /// The layer.
        layer: LayerName,
        /// The reason.
        source: StreamError,
    },
    /// The layers cannot be put on the base.
    #[error(transparent)]
    Append(#[from] AppendError),
}

/// An image that can be loaded.
#[derive(Debug)]
pub struct Archive<'a> {
    image_id: Digest,
    config: Vec<u8>,
    /// Of all layers, also those of the base.
    diff_ids: Vec<String>,
    layers: &'a [Layer],
}

impl<'a> Archive<'a> {
    /// The image with `layers`, the lowest first, on `base` or on nothing. Reads all that goes into the layers.
    ///
    /// # Errors
    ///
    /// [`ArchiveError`].
    pub fn new(
        base: Option<&Base>,
        layers: &'a [Layer],
        architecture: Architecture,
        settings: &Settings,
    ) -> Result<Self, ArchiveError> {
        let named = |(layer, diff_id): (&Layer, Result<Digest, StreamError>)| {
            let layer = layer.name();
            Ok((layer, diff_id.map_err(|source| ArchiveError::Layer { layer, source })?))
        };
        let own = layers.iter().zip(diff_ids(layers)).map(named).collect::<Result<Vec<_>, ArchiveError>>()?;
        let (config, diff_ids) = configuration(base, &own, architecture, settings)?;
        Ok(Self { image_id: Digest::of(&config), config, diff_ids, layers })
    }

    /// What the engine calls the image.
    pub fn image_id(&self) -> &Digest {
        &self.image_id
    }

    /// The image's configuration, byte by byte.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// The layers that are put on the base, the lowest first.
    pub fn layers(&self) -> &'a [Layer] {
        self.layers
    }

    /// The digest of every layer's uncompressed archive, the lowest layer first, those of the base included.
    pub fn diff_ids(&self) -> &[String] {
        &self.diff_ids
    }

    /// How many layers are the base's.
    pub fn base_layers_count(&self) -> usize {
        self.diff_ids.len() - self.layers.len()
    }

    /// Number of bytes that [`Archive::write_to`] writes for the layers.
    pub fn size_bytes(&self, left_out: usize) -> u64 {
        self.sent(left_out).map(|(layer, _)| layer.size_bytes()).sum()
    }

    /// Writes the archive, in which the image is called `tag`.
    ///
    /// Of the lowest layers, `left_out` are only named, because the engine has them; those of the base always are.
    ///
    /// # Errors
    ///
    /// [`StreamError`]. A file that keeps its size and changes its bytes meanwhile makes the engine refuse the archive,
    /// since the layer is then not the one that the configuration names.
    pub fn write_to(&self, tag: &str, left_out: usize, to: &mut dyn Write) -> Result<(), StreamError> {
        let names: Vec<String> = self.diff_ids.iter().map(|diff_id| layer_name(diff_id)).collect();
        let manifest = json!([{ "Config": config_name(&self.image_id), "RepoTags": [tag], "Layers": names }]);
        write_bytes(to, "manifest.json", manifest.to_string().as_bytes())?;
        write_bytes(to, &config_name(&self.image_id), &self.config)?;
        for (layer, diff_id) in self.sent(left_out) {
            let header = header(&layer_name(diff_id), layer.size_bytes());
            to.write_all(header.as_bytes()).map_err(StreamError::Write)?;
            layer.write_to(to)?;
        }
        to.write_all(&[0; 1024]).map_err(StreamError::Write)
    }

    fn sent(&self, left_out: usize) -> impl Iterator<Item = (&'a Layer, &String)> {
        let base = self.base_layers_count();
        self.layers.iter().zip(&self.diff_ids[base..]).skip(left_out.saturating_sub(base))
    }
}

fn config_name(image_id: &Digest) -> String {
    format!("{}.json", image_id.hex())
}

fn layer_name(diff_id: &str) -> String {
    format!("{}.tar", diff_id.trim_start_matches("sha256:"))
}

fn header(name: &str, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_path(name).expect("a digest is short enough for a name");
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header.set_cksum();
    header
}

fn write_bytes(to: &mut dyn Write, name: &str, bytes: &[u8]) -> Result<(), StreamError> {
    let padding = vec![0; bytes.len().next_multiple_of(512) - bytes.len()];
    let header = header(name, bytes.len() as u64);
    [header.as_bytes().as_slice(), bytes, &padding]
        .into_iter()
        .try_for_each(|part| to.write_all(part))
        .map_err(StreamError::Write)
}
