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
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use super::compress::{self, Compressor, VERSION};
use super::content::{Content, StreamError};
use super::layer::{Hasher, Layer, LayerName};
use super::pages::SmallPages;
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

impl Packed {
    /// A layer whose blob has been compressed or read just now.
    #[cfg(test)]
    pub(super) fn checked(name: LayerName, diff_id: Digest, size_bytes: u64, blob: Blob) -> Self {
        Self { name, diff_id, size_bytes, blob, is_checked: true }
    }
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
        let mut packed = self.pack_all(std::slice::from_ref(layer))?;
        Ok(packed.pop().expect("one layer for one"))
    }

    /// [`Cache::pack`] for the layers of one image; in their order.
    ///
    /// # Errors
    ///
    /// [`CacheError`].
    pub fn pack_all(&self, layers: &[Layer]) -> Result<Vec<Packed>, CacheError> {
        let _pages = SmallPages::new();
        let diff_ids = diff_ids(layers)?;
        let known: Vec<_> = diff_ids.iter().map(|diff_id| self.known(diff_id)).collect();
        let all = layers.iter().zip(diff_ids).zip(known);
        let pack = |compressor: &mut Option<&mut Compressor<'_>>, ((layer, diff_id), known)| match (known, compressor) {
            (Some(descriptor), _) => Ok(self.packed(layer, diff_id, descriptor, false)),
            (None, Some(compressor)) => self.make(compressor, layer, &diff_id),
            (None, None) => unreachable!("threads are started if one layer is not known"),
        };
        if all.clone().all(|(_, known)| known.is_some()) {
            return all.map(|layer| pack(&mut None, layer)).collect();
        }
        compress::with_compressor(|compressor| {
            let mut compressor = Some(compressor);
            all.map(|layer| pack(&mut compressor, layer)).collect()
        })
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
        compress::with_compressor(|compressor| self.make(compressor, layer, &packed.diff_id))
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

    fn make(&self, compressor: &mut Compressor<'_>, layer: &Layer, diff_id: &Digest) -> Result<Packed, CacheError> {
        let mut file = self.temporary()?;
        let compressed = compressor.compress(layer, file.as_file_mut()).map_err(|error| match error {
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

/// The digests of the archives, in the order of the layers.
fn diff_ids(layers: &[Layer]) -> Result<Vec<Digest>, CacheError> {
    let failed = |layer: &Layer, source| CacheError::Layer { layer: layer.name(), source };
    super::layer::diff_ids(layers)
        .into_iter()
        .zip(layers)
        .map(|(diff_id, layer)| diff_id.map_err(|source| failed(layer, source)))
        .collect()
}

fn check(diff_id: &Digest, digest: &Digest, size: u64) -> Digest {
    Digest::of(format!("{VERSION} {diff_id} {digest} {size}").as_bytes())
}

/// Whether the file is exactly what the descriptor says.
fn is_whole(path: &Path, descriptor: &Descriptor) -> bool {
    let mut sha256 = Hasher::default();
    let mut buffer = [0; super::content::BUFFER];
    let content = Content::whole(path.to_owned(), descriptor.size);
    content.write_to(&mut sha256, &mut buffer).is_ok() && sha256.digest() == descriptor.digest
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    struct Place {
        folder: tempfile::TempDir,
        cache: Cache,
        layer: Layer,
    }

    impl Place {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("file");
            fs::write(&file, vec![7; 100_000]).unwrap();
            let layer = Layer::files([(file.as_path(), "/app/file")]).unwrap();
            let cache = Cache::open(&folder.path().join("a/cache")).unwrap();
            Self { folder, cache, layer }
        }

        fn pack(&self) -> Packed {
            self.cache.pack(&self.layer).unwrap()
        }

        fn blob(&self) -> PathBuf {
            let Source::File(path) = self.pack().blob.source else { panic!("a layer is in a file") };
            path
        }

        fn index(&self) -> PathBuf {
            self.cache.path(&self.pack().diff_id, "json")
        }

        #[track_caller]
        fn assert_whole(&self, packed: &Packed) {
            let Source::File(path) = &packed.blob.source else { panic!("a layer is in a file") };
            let bytes = fs::read(path).unwrap();
            assert_eq!(packed.blob.descriptor.digest, Digest::of(&bytes));
            assert_eq!(packed.blob.descriptor.size, bytes.len() as u64);
            assert_eq!(packed.diff_id, self.layer.diff_id().unwrap());
        }
    }

    #[test]
    fn a_layer_is_compressed_once() {
        let place = Place::new();
        let first = place.pack();
        place.assert_whole(&first);
        let file =
            |path: &Path| fs::metadata(path).map(|metadata| (metadata.modified().unwrap(), metadata.len())).unwrap();
        let before = file(&place.blob());
        let second = place.cache.pack_all(&[place.layer.clone(), place.layer.clone()]).unwrap();
        assert_eq!(file(&place.blob()), before);
        for packed in second {
            assert_eq!(Packed { is_checked: true, ..packed }, first);
        }
    }

    #[test]
    fn a_damaged_blob_is_made_again_before_it_is_sent() {
        let place = Place::new();
        let first = place.pack();
        let mut bytes = fs::read(place.blob()).unwrap();
        bytes[60] ^= 1;
        fs::write(place.blob(), &bytes).unwrap();
        let packed = place.pack();
        let checked = place.cache.check(&place.layer, packed).unwrap();
        assert_eq!(checked, first);
        place.assert_whole(&checked);
    }

    #[test]
    fn a_blob_that_is_cut_off_or_gone_or_something_else_is_made_again() {
        let place = Place::new();
        let first = place.pack();
        let blob = place.blob();
        File::options().write(true).open(&blob).unwrap().set_len(10).unwrap();
        assert_eq!(place.pack(), first);
        fs::remove_file(&blob).unwrap();
        assert_eq!(place.pack(), first);
        place.assert_whole(&place.pack());
    }

    #[test]
    fn an_entry_that_was_tampered_with_is_not_believed() {
        let place = Place::new();
        let first = place.pack();
        let text = fs::read_to_string(place.index()).unwrap();
        let mut other: Index = serde_json::from_str(&text).unwrap();
        other.digest = Digest::of(b"another layer");
        let forged = serde_json::to_string(&other).unwrap();
        for damaged in ["", "{}", "no JSON", &text[..text.len() - 1], &forged] {
            fs::write(place.index(), damaged).unwrap();
            assert_eq!(place.pack(), first, "{damaged}");
        }
        // One whose check fits is believed until the layer is to be sent.
        other.check = check(&first.diff_id, &other.digest, other.size);
        fs::write(place.index(), serde_json::to_string(&other).unwrap()).unwrap();
        let deceived = place.pack();
        assert_eq!(deceived.blob.descriptor.digest, other.digest);
        assert_eq!(place.cache.check(&place.layer, deceived).unwrap(), first);
    }

    #[test]
    fn several_processes_that_make_one_layer_do_not_disturb_each_other() {
        let place = Place::new();
        thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| place.pack())).collect();
            for thread in threads {
                place.assert_whole(&thread.join().unwrap());
            }
        });
        let names = fs::read_dir(&place.cache.folder).unwrap().count();
        assert_eq!(names, 2, "a layer and its entry, and nothing half done");
    }

    #[test]
    fn what_was_used_longest_ago_goes_when_there_is_too_much() {
        let mut place = Place::new();
        let old = |name: &str, hours: u64, bytes: usize| {
            let path = place.cache.folder.join(name);
            fs::write(&path, vec![0; bytes]).unwrap();
            let time = SystemTime::now() - Duration::from_secs(hours * 3600);
            File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
            path
        };
        let oldest = old("oldest.tar.gz", 50, 80_000);
        let older = old("older.tar.gz", 40, 60_000);
        let recent = old("recent.tar.gz", 0, 5_000_000);
        let left_over = old(".x.new", 2, 1);
        place.cache.limit_bytes = 5_100_000;
        place.pack();
        assert!(!oldest.exists() && !left_over.exists());
        assert!(older.exists() && recent.exists());
    }

    #[test]
    fn a_folder_that_cannot_be_written_to_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = Cache::open(&file.join("cache")).unwrap_err().to_string();
        assert!(error.contains("file/cache") && error.contains("FAIRING_CACHE"), "{error}");
        let place = Place::new();
        let full = place.cache.failed(io::Error::from(io::ErrorKind::StorageFull)).to_string();
        let folder = place.folder.path().join("a/cache");
        assert!(full.starts_with(&format!("no space in the cache folder `{}` (", folder.display())), "{full}");
    }

    #[test]
    fn a_file_that_changes_while_it_is_packed_is_an_error() {
        let place = Place::new();
        let file = place.folder.path().join("file");
        fs::write(&file, vec![7; 99_999]).unwrap();
        let error = place.cache.pack(&place.layer).unwrap_err();
        assert!(matches!(error, CacheError::Layer { source: StreamError::Changed { .. }, .. }), "{error}");
        fs::write(&file, vec![8; 100_000]).unwrap();
        let stale = Digest::of(b"what it was");
        let error =
            compress::with_compressor(|compressor| place.cache.make(compressor, &place.layer, &stale)).unwrap_err();
        assert!(matches!(error, CacheError::Changed { layer: LayerName::Files }), "{error}");
    }
}
