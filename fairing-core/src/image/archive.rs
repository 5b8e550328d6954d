//! An image as one archive, which an engine loads without a registry (`docker load`).
//!
//! The engine knows the image by the digest of its configuration; the layers are not compressed. Nothing of the archive is
//! held in memory but the configuration.

use std::io::Write;

use serde_json::json;

use super::append::{Settings, config_on_nothing};
use super::content::StreamError;
use super::layer::{Layer, LayerName, diff_ids};
use super::{Architecture, Digest};

/// An image that can be loaded.
#[derive(Debug)]
pub struct Archive<'a> {
    image_id: Digest,
    config: Vec<u8>,
    manifest: Vec<u8>,
    layers: Vec<(&'a Layer, String)>,
}

impl<'a> Archive<'a> {
    /// The image with `layers`, the lowest first, called `tags` in the engine. Reads all that goes into the layers.
    ///
    /// # Errors
    ///
    /// [`StreamError`].
    pub fn new(
        layers: &'a [Layer],
        architecture: Architecture,
        settings: &Settings,
        tags: &[String],
    ) -> Result<Self, StreamError> {
        let names = layers.iter().map(Layer::name);
        let diff_ids: Vec<(LayerName, Digest)> = diff_ids(layers)
            .into_iter()
            .zip(names)
            .map(|(diff_id, name)| Ok((name, diff_id?)))
            .collect::<Result<_, _>>()?;
        let config = config_on_nothing(&diff_ids, architecture, settings);
        let image_id = Digest::of(&config);
        let names: Vec<String> = diff_ids.iter().map(|(_, diff_id)| format!("{}.tar", diff_id.hex())).collect();
        let manifest = json!([{ "Config": config_name(&image_id), "RepoTags": tags, "Layers": names }]).to_string();
        let layers = layers.iter().zip(names).collect();
        Ok(Self { image_id, config, manifest: manifest.into_bytes(), layers })
    }

    /// What the engine calls the image.
    pub fn image_id(&self) -> &Digest {
        &self.image_id
    }

    /// Writes the archive.
    ///
    /// # Errors
    ///
    /// [`StreamError`]. A file that keeps its size and changes its bytes meanwhile makes the engine refuse the archive,
    /// since the layer is then not the one that the configuration names.
    pub fn write_to(&self, to: &mut dyn Write) -> Result<(), StreamError> {
        write_bytes(to, "manifest.json", &self.manifest)?;
        write_bytes(to, &config_name(&self.image_id), &self.config)?;
        for (layer, name) in &self.layers {
            to.write_all(header(name, layer.size_bytes()).as_bytes()).map_err(StreamError::Write)?;
            layer.write_to(to)?;
        }
        to.write_all(&[0; 1024]).map_err(StreamError::Write)
    }
}

fn config_name(image_id: &Digest) -> String {
    format!("{}.json", image_id.hex())
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
