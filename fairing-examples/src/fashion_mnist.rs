//! Fashion-MNIST from a folder: four IDX files, gzipped or not, verified down to the last byte.
//!
//! [`load`] gives [`FashionMnist`], whose two [`Images`] are data sets for `epoch.batches` and `worker.evaluate`.
//! Pixels stay bytes in memory (55 MB in all) and become floats batch by batch.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use fairing_core::prelude::Dataset;
use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};

/// Height and width of an image, in pixels.
pub const SIDE: usize = 28;

/// Number of kinds of clothing; labels are 0 to 9.
pub const CLASSES: usize = 10;

const PIXELS: usize = SIDE * SIDE;

/// The whole data set in its canonical split and order.
pub struct FashionMnist {
    /// 60,000 images, 6,000 of each class.
    pub train: Images,
    /// 10,000 images, 1,000 of each class.
    pub test: Images,
}

/// Loads the four files from `folder`; batches will be tensors on `device`.
///
/// A file may be there as `NAME` or as `NAME.gz`; the first is preferred, since unpacking takes most of the time
/// (the train images, on one core: 165 ms to unpack, 33 ms to check). Train and test set load at the same time.
///
/// # Errors
///
/// [`DatasetError`] says which file is wrong and how. What is returned has the published checksums, always.
pub fn load(folder: &Path, device: &Device) -> Result<FashionMnist, DatasetError> {
    let (train, test) = std::thread::scope(|scope| {
        let test = scope.spawn(|| Images::read(folder, &TEST_LABELS, &TEST_IMAGES, device));
        let train = Images::read(folder, &TRAIN_LABELS, &TRAIN_IMAGES, device);
        (train, test.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    Ok(FashionMnist { train: train?, test: test? })
}

/// Images with their labels, as bytes.
pub struct Images {
    pixels: Vec<u8>,
    labels: Vec<u8>,
    device: Device,
}

/// Some of the images, ready for a model.
pub struct ImageBatch {
    /// `[n, 1, 28, 28]`, `f32`, from 0 (background) to 1.
    pub images: Tensor<4>,
    /// `[n]`, each from 0 to 9.
    pub labels: Tensor<1, Int>,
}

impl Images {
    fn read(folder: &Path, labels: &IdxFile, images: &IdxFile, device: &Device) -> Result<Self, DatasetError> {
        // The small file first: if the folder is wrong altogether, this says so at once.
        let labels = labels.read(folder)?;
        let pixels = images.read(folder)?;
        Ok(Self { pixels, labels, device: device.clone() })
    }

    /// The labels of all images, 0 to 9.
    pub fn labels(&self) -> &[u8] {
        &self.labels
    }

    /// The images of `indices`, in that order.
    ///
    /// # Panics
    ///
    /// Panics if an index is not below the number of images.
    pub fn select(&self, indices: &[usize]) -> ImageBatch {
        let mut pixels = Vec::with_capacity(indices.len() * PIXELS);
        let mut labels = Vec::with_capacity(indices.len());
        for &index in indices {
            let image = &self.pixels[index * PIXELS..][..PIXELS];
            pixels.extend(image.iter().map(|&pixel| f32::from(pixel) / 255.0));
            labels.push(i32::from(self.labels[index]));
        }
        ImageBatch {
            images: Tensor::from_data(TensorData::new(pixels, [indices.len(), 1, SIDE, SIDE]), &self.device),
            labels: Tensor::from_data(TensorData::new(labels, [indices.len()]), &self.device),
        }
    }
}

impl Dataset for Images {
    type Batch = ImageBatch;

    fn len(&self) -> usize {
        self.labels.len()
    }

    fn batch(&self, indices: &[usize]) -> ImageBatch {
        self.select(indices)
    }
}

/// One of the four files, as published.
struct IdxFile {
    name: &'static str,
    content: Content,
    /// The dimensions after the magic number: examples, then height and width of an image.
    dimensions: &'static [u32],
    /// SHA-256 of the unpacked content.
    sha256: &'static str,
}

/// What an IDX file of bytes holds. The value is its magic number: two zeros, type 8 (unsigned byte), dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Labels = 0x0801,
    Images = 0x0803,
}

const TRAIN_IMAGES: IdxFile = IdxFile {
    name: "train-images-idx3-ubyte",
    content: Content::Images,
    dimensions: &[60_000, SIDE as u32, SIDE as u32],
    sha256: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
};
const TRAIN_LABELS: IdxFile = IdxFile {
    name: "train-labels-idx1-ubyte",
    content: Content::Labels,
    dimensions: &[60_000],
    sha256: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
};
const TEST_IMAGES: IdxFile = IdxFile {
    name: "t10k-images-idx3-ubyte",
    content: Content::Images,
    dimensions: &[10_000, SIDE as u32, SIDE as u32],
    sha256: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
};
const TEST_LABELS: IdxFile = IdxFile {
    name: "t10k-labels-idx1-ubyte",
    content: Content::Labels,
    dimensions: &[10_000],
    sha256: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
};

impl IdxFile {
    /// The file's bytes without its header.
    fn read(&self, folder: &Path) -> Result<Vec<u8>, DatasetError> {
        let plain = folder.join(self.name);
        let gzipped = folder.join(format!("{}.gz", self.name));
        for path in [&plain, &gzipped] {
            match File::open(path) {
                Ok(file) if path == &gzipped => return self.parse(path, MultiGzDecoder::new(BufReader::new(file))),
                Ok(file) => return self.parse(path, file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(DatasetError::Read { path: path.clone(), source }),
            }
        }
        Err(DatasetError::Missing { name: self.name, folder: folder.to_owned() })
    }

    fn parse(&self, path: &Path, reader: impl Read) -> Result<Vec<u8>, DatasetError> {
        let mut reader = Unpacked { path, reader, sha256: Sha256::new(), bytes: 0 };

        let found = reader.number()?;
        if found != self.content as u32 {
            return Err(DatasetError::WrongMagic { path: path.to_owned(), expected: self.content, found });
        }
        for (axis, &expected) in self.dimensions.iter().enumerate() {
            let found = reader.number()?;
            if found != expected {
                return Err(DatasetError::WrongSize {
                    path: path.to_owned(),
                    what: ["examples", "rows per image", "columns per image"][axis],
                    expected,
                    found,
                });
            }
        }

        // Zeroed by the operating system page by page: cheaper than a growing buffer.
        let mut content = vec![0; self.dimensions.iter().map(|&size| size as usize).product()];
        reader.fill(&mut content)?;
        reader.end()?;

        let found = hex(&reader.sha256.finalize());
        if found != self.sha256 {
            return Err(DatasetError::WrongChecksum { path: path.to_owned(), expected: self.sha256, found });
        }
        Ok(content)
    }
}

/// Reads the unpacked content of a file, hashes it on the way, and says precisely why it cannot go on.
struct Unpacked<'a, R> {
    path: &'a Path,
    reader: R,
    sha256: Sha256,
    bytes: u64,
}

impl<R: Read> Unpacked<'_, R> {
    /// The next four bytes as the big-endian number that IDX headers are made of.
    fn number(&mut self) -> Result<u32, DatasetError> {
        let mut bytes = [0; 4];
        self.fill(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn fill(&mut self, content: &mut [u8]) -> Result<(), DatasetError> {
        // Hashing what was just unpacked, while it is in the cache.
        for part in content.chunks_mut(64 * 1024) {
            let mut filled = 0;
            while filled < part.len() {
                match self.read(&mut part[filled..])? {
                    0 => return Err(DatasetError::Short { path: self.path.to_owned(), bytes: self.bytes }),
                    count => filled += count,
                }
            }
            self.sha256.update(part);
        }
        Ok(())
    }

    /// Checks that nothing follows; this also makes the decoder compare gzip's own checksum.
    fn end(&mut self) -> Result<(), DatasetError> {
        let bytes = self.bytes;
        match self.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(DatasetError::TrailingBytes { path: self.path.to_owned(), bytes }),
        }
    }

    fn read(&mut self, into: &mut [u8]) -> Result<usize, DatasetError> {
        loop {
            match self.reader.read(into) {
                Ok(count) => {
                    self.bytes += count as u64;
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failure(error)),
            }
        }
    }

    fn failure(&self, source: io::Error) -> DatasetError {
        let path = self.path.to_owned();
        match source.kind() {
            io::ErrorKind::UnexpectedEof => DatasetError::Truncated { path, bytes: self.bytes },
            // The decoder's words for "no gzip header", "corrupt stream" and "checksum differs".
            io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData => {
                DatasetError::Damaged { path, bytes: self.bytes, source }
            }
            _ => DatasetError::Read { path, source },
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Failure to load the data set. Returned by [`load`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// The folder does not hold one of the files, or is no folder.
    #[error(
        "no `{name}` and no `{name}.gz` in `{}` (the folder should hold the four files of Fashion-MNIST: {}, each plain \
         or with `.gz`; Debian's package `dataset-fashion-mnist` has them; name another folder with the attribute's \
         `data = \"FOLDER\"` or the variable `FAIRING_DATA`)",
        .folder.display(),
        [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS].map(|file| format!("`{}`", file.name)).join(", ")
    )]
    Missing {
        /// The file's name without `.gz`.
        name: &'static str,
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// The file is there and cannot be read.
    #[error("failed to read `{}`", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The gzip stream breaks off, as after an interrupted download.
    #[error("`{}` is cut off: its gzip stream ends in the middle, after {bytes} unpacked bytes (copy the file again)", .path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Unpacked bytes before the break.
        bytes: u64,
    },
    /// The file is no gzip file, or gzip's own checks fail.
    #[error("`{}` is not a sound gzip file, {bytes} bytes could be unpacked (copy the file again)", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Unpacked bytes before the damage.
        bytes: u64,
        /// The decoder's reason.
        source: io::Error,
    },
    /// The content ends before its last example, although the file itself is whole.
    #[error("`{}` is too short: its content ends after {bytes} bytes (copy the file again)", .path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// Length of the content.
        bytes: u64,
    },
    /// The content goes on after its last example.
    #[error("`{}` is too long: bytes follow the {bytes} that belong there (copy the file again)", .path.display())]
    TrailingBytes {
        /// The file.
        path: PathBuf,
        /// Length that the content should have.
        bytes: u64,
    },
    /// The file is not an IDX file of the right kind.
    #[error("`{}` {}", .path.display(), wrong_magic(*.expected, *.found))]
    WrongMagic {
        /// The file.
        path: PathBuf,
        #[doc(hidden)]
        #[expect(private_interfaces, reason = "a detail of the message")]
        expected: Content,
        /// The file's first four bytes, big-endian.
        found: u32,
    },
    /// An IDX file of the right kind, but not of this data set or not of this split.
    #[error("`{}` has {found} {what} where {expected} belong{}", .path.display(), other_split(*.found))]
    WrongSize {
        /// The file.
        path: PathBuf,
        /// What was counted.
        what: &'static str,
        /// The published value.
        expected: u32,
        /// The value in the file's header.
        found: u32,
    },
    /// Right shape, other bytes; for example the digits of MNIST, whose files have the same names and sizes.
    #[error(
        "`{}` is not the published file: the SHA-256 of its content is {found}, expected {expected} (the files of MNIST, \
         the handwritten digits, have the same names and sizes)",
        .path.display()
    )]
    WrongChecksum {
        /// The file.
        path: PathBuf,
        /// The published checksum, in hexadecimal.
        expected: &'static str,
        /// The file's.
        found: String,
    },
}

fn wrong_magic(expected: Content, found: u32) -> String {
    let (belongs, other) = match expected {
        Content::Images => ("images", Content::Labels),
        Content::Labels => ("labels", Content::Images),
    };
    let hint = if found == other as u32 {
        " (are the files of images and labels swapped?)"
    } else if found >> 16 == 0x1f8b {
        " (it is gzipped: add `.gz` to its name)"
    } else {
        " (it is no IDX file of bytes)"
    };
    format!("starts with {found:#010x} where {:#010x} ({belongs}) belongs{hint}", expected as u32)
}

fn other_split(examples: u32) -> &'static str {
    match examples {
        10_000 => " (that is the size of the test set: are the files swapped?)",
        60_000 => " (that is the size of the train set: are the files swapped?)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn published() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("data/fashion-mnist")
    }

    fn device() -> Device {
        Device::flex().autodiff()
    }

    /// A label file: header, then `examples` zeros.
    fn labels(magic: u32, examples: u32) -> Vec<u8> {
        let mut content = [magic.to_be_bytes(), examples.to_be_bytes()].concat();
        content.resize(8 + examples as usize, 0);
        content
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    /// The published label file of the test set, unpacked.
    fn sound_labels() -> Vec<u8> {
        let mut content = labels(0x0801, 0);
        content[4..].copy_from_slice(&10_000_u32.to_be_bytes());
        content.extend(TEST_LABELS.read(&published()).unwrap());
        content
    }

    /// Reads `bytes` as the test set's label file and expects an error that says all of `parts`.
    #[track_caller]
    fn check(extension: &str, bytes: &[u8], parts: &[&str]) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(format!("t10k-labels-idx1-ubyte{extension}"));
        fs::write(&path, bytes).unwrap();
        let message = TEST_LABELS.read(folder.path()).unwrap_err().to_string();
        assert!(message.starts_with(&format!("`{}`", path.display())), "{message}");
        for part in parts {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
    }

    #[test]
    fn published_files_load_with_their_counts() {
        let data = load(&published(), &device()).unwrap();
        assert_eq!((data.train.len(), data.test.len()), (60_000, 10_000));
        for (images, each) in [(&data.train, 6_000), (&data.test, 1_000)] {
            for class in 0..CLASSES as u8 {
                assert_eq!(images.labels.iter().filter(|label| **label == class).count(), each);
            }
        }
    }

    #[test]
    fn batch_holds_the_named_images_in_order() {
        let data = load(&published(), &device()).unwrap();
        let batch = data.test.batch(&[9_999, 0, 9_999]);
        assert_eq!(batch.images.dims(), [3, 1, SIDE, SIDE]);
        let labels: Vec<i64> = batch.labels.into_data().iter().collect();
        // As published: the test set starts with an ankle boot and ends with a sandal.
        assert_eq!(labels, [5, 9, 5]);
        let pixels: Vec<f32> = batch.images.into_data().iter().collect();
        assert_eq!(pixels[..PIXELS], pixels[2 * PIXELS..]);
        assert!(pixels.iter().all(|pixel| (0.0..=1.0).contains(pixel)));
        assert_eq!(pixels.iter().copied().fold(0.0, f32::max), 1.0);
    }

    #[test]
    fn plain_files_are_read_too() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(TEST_LABELS.name), sound_labels()).unwrap();
        assert_eq!(TEST_LABELS.read(folder.path()).unwrap().len(), 10_000);
    }

    #[test]
    fn missing_file_names_the_folder_and_the_remedies() {
        let folder = tempfile::tempdir().unwrap();
        let message = load(folder.path(), &device()).map(drop).unwrap_err().to_string();
        for part in [
            "no `train-labels-idx1-ubyte` and no `train-labels-idx1-ubyte.gz` in ",
            &folder.path().display().to_string(),
            "`t10k-images-idx3-ubyte`",
            "`data = \"FOLDER\"`",
            "`FAIRING_DATA`",
            "`dataset-fashion-mnist`",
        ] {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
    }

    #[test]
    fn folder_in_place_of_a_file_is_a_read_error() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(TEST_LABELS.name)).unwrap();
        let error = TEST_LABELS.read(folder.path()).unwrap_err();
        assert!(matches!(error, DatasetError::Read { .. }), "{error}");
    }

    #[test]
    fn truncated_gzip_is_cut_off() {
        let whole = gzip(&sound_labels());
        check(".gz", &whole[..whole.len() / 2], &["is cut off", "unpacked bytes"]);
        // Only gzip's trailer is missing: every example could be read, and nobody has checked them.
        check(".gz", &whole[..whole.len() - 4], &["is cut off", "after 10008 unpacked bytes"]);
        check(".gz", &whole[..5], &["is cut off", "after 0 unpacked bytes"]);
    }

    #[test]
    fn damaged_gzip_is_not_sound() {
        check(".gz", b"<html>not found</html>", &["is not a sound gzip file"]);
        let mut damaged = gzip(&sound_labels());
        let middle = damaged.len() - 6;
        damaged[middle] ^= 1;
        check(".gz", &damaged, &["is not a sound gzip file"]);
    }

    #[test]
    fn empty_file_is_too_short() {
        check("", &[], &["is too short", "after 0 bytes"]);
    }

    #[test]
    fn short_content_is_too_short() {
        let content = sound_labels();
        check("", &content[..10_000], &["is too short", "after 10000 bytes"]);
        check(".gz", &gzip(&content[..6]), &["is too short", "after 6 bytes"]);
    }

    #[test]
    fn trailing_bytes_are_named() {
        let mut content = sound_labels();
        content.push(0);
        check("", &content, &["is too long", "the 10008 that belong"]);
        check(".gz", &gzip(&content), &["is too long", "the 10008 that belong"]);
    }

    #[test]
    fn wrong_magic_says_what_the_file_is() {
        check(".gz", &gzip(&labels(0x0803, 10_000)), &["0x00000803", "0x00000801 (labels)", "labels swapped?"]);
        check("", &gzip(&sound_labels()), &["0x1f8b", "add `.gz` to its name"]);
        check("", b"label,count\n", &["no IDX file"]);
    }

    #[test]
    fn wrong_count_says_whose_it_is() {
        check(".gz", &gzip(&labels(0x0801, 60_000)), &["60000 examples where 10000 belong", "size of the train set"]);
        check(".gz", &gzip(&labels(0x0801, 9_999)), &["9999 examples where 10000 belong"]);
    }

    #[test]
    fn wrong_image_size_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let header = [0x0803_u32, 10_000, 32, 32].map(u32::to_be_bytes).concat();
        fs::write(folder.path().join(TEST_IMAGES.name), header).unwrap();
        let message = TEST_IMAGES.read(folder.path()).unwrap_err().to_string();
        assert!(message.ends_with("has 32 rows per image where 28 belong"), "{message}");
    }

    #[test]
    fn other_content_fails_the_checksum() {
        let mut content = sound_labels();
        content[5_000] ^= 1;
        check(".gz", &gzip(&content), &["is not the published file", TEST_LABELS.sha256, "MNIST"]);
    }
}
