//! Compressed layers, kept between runs.
//!
//! ```text
//! <folder>/<SHA-256 of the archive>-<compressor>.tar.gz    the compressed layer
//! <folder>/<SHA-256 of the archive>-<compressor>.json      its digest and size
//! ```
//!
//! What goes into a layer is read and hashed in every run, so a layer in the cache is one of the same bytes and never one
//! of the same name or time. Whatever is wrong in the folder is made again. Several processes may use it at once: files
//! appear in it whole, by renaming, and two that make the same layer make the same bytes.

use std::fs::{self, File, FileTimes};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use super::compress::{self, VERSION};
use super::content::{Content, StreamError};
use super::layer::{Hasher, Layer, LayerName};
use super::{Blob, Descriptor, Digest, LAYER, Source};

/// Some hundreds of versions of a program; beyond, the oldest go.
const SIZE_LIMIT: u64 = 2 << 30;

/// Nothing younger is removed: another process may be about to send it.
const KEPT: Duration = Duration::from_secs(60 * 60);

/// Failure to keep compressed layers. Returned by [`Cache`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The folder cannot be created or written to.
    #[error("cannot write to the cache folder `{}` (set FAIRING_CACHE to a folder that can be written)", folder.display())]
    Write {
        /// The folder.
        folder: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The folder's disk is full, or the user's share of it.
    #[error("no space in the cache folder `{}` (make some, or set FAIRING_CACHE to a folder on another disk)", folder.display())]
    NoSpace {
        /// The folder.
        folder: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// What goes into the layer cannot be read.
    #[error("cannot pack the {layer}")]
    Layer {
        /// The layer.
        layer: LayerName,
        /// The reason.
        source: StreamError,
    },
    /// A file was written to while the layer was made.
    #[error("the {layer} changed while it was packed (start the run again when nothing writes to it)")]
    Changed {
        /// The layer.
        layer: LayerName,
    },
}

/// A layer as an image has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    /// Which part of the image it is.
    pub name: LayerName,
    /// The SHA-256 of the uncompressed archive.
    pub diff_id: Digest,
    /// Number of bytes of the uncompressed archive.
    pub size_bytes: u64,
    /// The compressed archive.
    pub blob: Blob,
    /// Whether the compressed archive was made now or has been checked byte by byte.
    is_checked: bool,
}

/// A folder with compressed layers.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
    limit_bytes: u64,
}

/// What is known of a compressed layer without reading it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Index {
    digest: Digest,
    size: u64,
    /// Over everything else, so that a damaged entry is told from a whole one.
    check: Digest,
}

impl Cache {
    /// The cache in `folder`, which is created if need be.
    ///
    /// # Errors
    ///
    /// [`CacheError::Write`], [`CacheError::NoSpace`].
    pub fn open(folder: &Path) -> Result<Self, CacheError> {
        let cache = Self { folder: folder.to_owned(), limit_bytes: SIZE_LIMIT };
        fs::create_dir_all(folder).map_err(|source| cache.failed(source))?;
        Ok(cache)
    }

    /// The compressed form of `layer`: the one in the cache, or one that is made now.
    ///
    /// Reads all that goes into the layer. Of a compressed layer in the cache it looks at the size only; before it is
    /// sent, [`Cache::check`] reads it.
    ///
    /// # Errors
    ///
    /// [`CacheError`].
    pub fn pack(&self, layer: &Layer) -> Result<Packed, CacheError> {
        self.pack_hashed(layer, layer.diff_id())
    }

    fn pack_hashed(&self, layer: &Layer, diff_id: Result<Digest, StreamError>) -> Result<Packed, CacheError> {
        let diff_id = diff_id.map_err(|source| CacheError::Layer { layer: layer.name(), source })?;
        match self.known(&diff_id) {
            Some(descriptor) => Ok(self.packed(layer, diff_id, descriptor, false)),
            None => self.make(layer, &diff_id),
        }
    }

    /// [`Cache::pack`] for the layers of one image, which are read at the same time; in their order.
    ///
    /// # Errors
    ///
    /// [`CacheError`].
    pub fn pack_all(&self, layers: &[Layer]) -> Result<Vec<Packed>, CacheError> {
        let diff_ids: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = layers.iter().map(|layer| scope.spawn(|| layer.diff_id())).collect();
            threads.into_iter().map(|thread| thread.join().expect("hashing a layer does not panic")).collect()
        });
        // Compressing takes every core by itself.
        layers.iter().zip(diff_ids).map(|(layer, diff_id)| self.pack_hashed(layer, diff_id)).collect()
    }

    /// Reads the compressed form of `layer`, and makes it again if it is not what it should be.
    ///
    /// Its digest differs from the one before only if what the cache said about it was wrong; then the image has to be
    /// assembled again.
    ///
    /// # Errors
    ///
    /// [`CacheError`].
    pub fn check(&self, layer: &Layer, packed: Packed) -> Result<Packed, CacheError> {
        let blob = self.path(&packed.diff_id, "tar.gz");
        if packed.is_checked || is_whole(&blob, &packed.blob.descriptor) {
            return Ok(Packed { is_checked: true, ..packed });
        }
        self.make(layer, &packed.diff_id)
    }

    /// The descriptor of a compressed layer that seems to be there.
    fn known(&self, diff_id: &Digest) -> Option<Descriptor> {
        let index: Index = serde_json::from_slice(&fs::read(self.path(diff_id, "json")).ok()?).ok()?;
        if index.check != check(diff_id, &index.digest, index.size) {
            return None;
        }
        let blob = File::options().read(true).open(self.path(diff_id, "tar.gz")).ok()?;
        let metadata = blob.metadata().ok().filter(|metadata| metadata.is_file() && metadata.len() == index.size)?;
        // The time of its last use decides when it is removed. Not owned by this user, it stays as it is.
        if metadata.modified().ok()?.elapsed().is_ok_and(|age| age > KEPT / 2) {
            let _ = blob.set_times(FileTimes::new().set_modified(SystemTime::now()));
        }
        Some(Descriptor { media_type: LAYER.to_owned(), digest: index.digest, size: index.size })
    }

    fn make(&self, layer: &Layer, diff_id: &Digest) -> Result<Packed, CacheError> {
        let mut file = self.temporary()?;
        let compressed = compress::compress(layer, file.as_file_mut()).map_err(|error| match error {
            StreamError::Write(source) => self.failed(source),
            source => CacheError::Layer { layer: layer.name(), source },
        })?;
        if compressed.diff_id != *diff_id {
            return Err(CacheError::Changed { layer: layer.name() });
        }
        let descriptor = compressed.descriptor;
        self.appear(file, &self.path(diff_id, "tar.gz"))?;
        let index = Index {
            check: check(diff_id, &descriptor.digest, descriptor.size),
            digest: descriptor.digest.clone(),
            size: descriptor.size,
        };
        let mut file = self.temporary()?;
        let text = serde_json::to_vec(&index).expect("digests and numbers are JSON");
        file.write_all(&text).map_err(|source| self.failed(source))?;
        self.appear(file, &self.path(diff_id, "json"))?;
        self.shrink();
        Ok(self.packed(layer, diff_id.clone(), descriptor, true))
    }

    fn packed(&self, layer: &Layer, diff_id: Digest, descriptor: Descriptor, is_checked: bool) -> Packed {
        let source = Source::File(self.path(&diff_id, "tar.gz"));
        let (name, size_bytes) = (layer.name(), layer.size_bytes());
        Packed { name, diff_id, size_bytes, blob: Blob { descriptor, source }, is_checked }
    }

    fn path(&self, diff_id: &Digest, extension: &str) -> PathBuf {
        self.folder.join(format!("{}-{VERSION}.{extension}", diff_id.hex()))
    }

    fn temporary(&self) -> Result<NamedTempFile, CacheError> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".").suffix(".new").tempfile_in(&self.folder).map_err(|source| self.failed(source))
    }

    fn appear(&self, file: NamedTempFile, path: &Path) -> Result<(), CacheError> {
        file.persist(path).map(drop).map_err(|error| self.failed(error.error))
    }

    fn failed(&self, source: io::Error) -> CacheError {
        let folder = self.folder.clone();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                CacheError::NoSpace { folder, source }
            }
            _ => CacheError::Write { folder, source },
        }
    }

    /// Removes the layers used longest ago until the rest fits, and what processes that were killed left half done.
    ///
    /// Nothing depends on it: what cannot be removed stays.
    fn shrink(&self) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        let files = entries.filter_map(|entry| {
            let entry = entry.ok()?;
            let metadata = entry.metadata().ok().filter(fs::Metadata::is_file)?;
            Some((metadata.modified().ok()?, metadata.len(), entry.path()))
        });
        let mut files: Vec<_> = files.collect();
        files.sort();
        let mut size: u64 = files.iter().map(|(_, size, _)| size).sum();
        for (modified, bytes, path) in files {
            let is_old = modified.elapsed().is_ok_and(|age| age > KEPT);
            let is_left_over = path.extension().is_some_and(|extension| extension == "new");
            if is_old && (is_left_over || size > self.limit_bytes) && fs::remove_file(&path).is_ok() {
                size -= bytes;
            }
        }
    }
}

fn check(diff_id: &Digest, digest: &Digest, size: u64) -> Digest {
    Digest::of(format!("{VERSION} {diff_id} {digest} {size}").as_bytes())
}

/// Whether the file is exactly what the descriptor says.
fn is_whole(path: &Path, descriptor: &Descriptor) -> bool {
    let mut sha256 = Hasher::default();
    let mut buffer = Box::new([0; super::content::BUFFER]);
    let content = Content::whole(path.to_owned(), descriptor.size);
    content.write_to(&mut sha256, &mut buffer).is_ok() && sha256.digest() == descriptor.digest
}
