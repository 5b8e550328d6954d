//! Layers: the files of one part of an image, in an order and with attributes that depend on nothing but them.
//!
//! A [`Layer`] knows its files' names and sizes; their bytes are read when it is written. Two layers of the same files are
//! the same bytes wherever and whenever they are written: sorted by name, owned by root, without times, and of modes only
//! whether a file is executable.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use super::Digest;
use super::content::{BUFFER, Content, StreamError};
use super::executable::Program;
use super::libraries::{Libraries, PROGRAM_FOLDER};

/// The user and group that programs run as; the one that distroless images call `nonroot`.
pub const USER: u32 = 65532;

/// Where programs look for root certificates, on Debian and with what rustls and OpenSSL try.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// A tar archive is made of these.
const BLOCK: u64 = 512;

/// Nested deeper, a data folder most likely contains a link to itself through a mount.
const DEPTH_LIMIT: usize = 128;

/// Failure to lay out a layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// A file or folder cannot be looked at.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// Something in a folder is neither a file, a folder, nor a link that can be kept.
    #[error("`{}` is {what}, which an image cannot have (move it out of the folder)", path.display())]
    Kind {
        /// Where it is.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A link leads out of the folder that is packed, so it would lead nowhere in the image.
    #[error("`{}` links to `{}`, which is not in the folder (copy what it links to)", path.display(), target.display())]
    LinkOut {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// A place in the image that is not an absolute path.
    #[error("`{at}` is no place in an image (an absolute path without `..`, such as `/app/data`)")]
    Place {
        /// As it was given.
        at: String,
    },
    /// Two files for one place.
    #[error("two files for one place in the image, `{at}` (leave one out)")]
    Twice {
        /// The place.
        at: String,
    },
}

/// Which part of an image a layer holds; from the least to the most often changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerName {
    /// The shared libraries and what a bare image needs.
    Libraries,
    /// The data folder.
    Data,
    /// Further files.
    Files,
    /// The program.
    Program,
}

impl fmt::Display for LayerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LayerName::Libraries => "libraries",
            LayerName::Data => "data",
            LayerName::Files => "files",
            LayerName::Program => "program",
        })
    }
}

/// The files of one part of an image.
#[derive(Debug, Clone)]
pub struct Layer {
    name: LayerName,
    /// By the path in the archive, without the first `/`. Sorted by bytes, so a folder comes before what is in it.
    entries: BTreeMap<Vec<u8>, Entry>,
}

#[derive(Debug, Clone)]
enum Entry {
    Folder { mode: u32 },
    File { mode: u32, content: Content },
    Link { target: Vec<u8> },
}

impl Layer {
    /// An empty layer.
    pub fn new(name: LayerName) -> Self {
        Self { name, entries: BTreeMap::new() }
    }

    /// The libraries of a program. With `bare`, also what programs expect of any Linux system and what no base image
    /// brings: a folder for temporary files, a user with a name and a home, names of hosts from `/etc/hosts` before DNS.
    ///
    /// # Errors
    ///
    /// [`LayerError::Twice`] if two libraries claim one place.
    pub fn libraries(libraries: &Libraries, bare: bool) -> Result<Self, LayerError> {
        let mut layer = Self::new(LayerName::Libraries);
        if bare {
            let user = format!("root:x:0:0:root:/:/sbin/nologin\nfairing:x:{USER}:{USER}:fairing:/tmp:/sbin/nologin\n");
            let group = format!("root:x:0:\nfairing:x:{USER}:\n");
            layer.put_folder("/tmp", 0o1777)?;
            layer.put_file("/etc/passwd", 0o644, Content::bytes(user))?;
            layer.put_file("/etc/group", 0o644, Content::bytes(group))?;
            // Without it, glibc asks DNS before it reads /etc/hosts.
            let order = "passwd: files\ngroup: files\nhosts: files dns\n";
            layer.put_file("/etc/nsswitch.conf", 0o644, Content::bytes(order))?;
        }
        for library in libraries.iter() {
            let at = library.at.to_str().ok_or_else(|| place(&library.at.to_string_lossy()))?;
            layer.put_file(at, 0o755, library.content().clone())?;
        }
        Ok(layer)
    }

    /// Everything in `folder`, at the place `at`.
    ///
    /// # Errors
    ///
    /// [`LayerError::Read`], [`LayerError::Kind`], [`LayerError::LinkOut`], [`LayerError::Place`].
    pub fn data(folder: &Path, at: &str) -> Result<Self, LayerError> {
        let mut layer = Self::new(LayerName::Data);
        let root = archive_path(at)?;
        // A link that the user names leads where the user wants it to.
        if !fs::metadata(folder).map_err(|source| unreadable(folder, source))?.is_dir() {
            return Err(LayerError::Kind { path: folder.to_owned(), what: "no folder" });
        }
        layer.insert(root.clone(), Entry::Folder { mode: 0o755 })?;
        layer.put_tree(folder, &root, 0)?;
        Ok(layer)
    }

    /// Single files, each with its place in the image.
    ///
    /// # Errors
    ///
    /// [`LayerError::Read`], [`LayerError::Kind`], [`LayerError::Place`], [`LayerError::Twice`].
    pub fn files<'a>(files: impl IntoIterator<Item = (&'a Path, &'a str)>) -> Result<Self, LayerError> {
        let mut layer = Self::new(LayerName::Files);
        for (path, at) in files {
            layer.put(path, at)?;
        }
        Ok(layer)
    }

    /// The program alone.
    pub fn program(program: &Program) -> Self {
        let mut layer = Self::new(LayerName::Program);
        layer
            .put_file(&program_path(program), 0o755, program.content().clone())
            .expect("a program's name has no `/` in it, and it is alone");
        layer
    }

    /// Adds the root certificates in the PEM file `path`, where programs look for them.
    ///
    /// # Errors
    ///
    /// [`LayerError::Read`], [`LayerError::Kind`].
    pub fn put_certificates(&mut self, path: &Path) -> Result<(), LayerError> {
        self.put(path, CERTIFICATES)
    }

    /// Which part of the image it is.
    pub fn name(&self) -> LayerName {
        self.name
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Number of its files.
    pub fn files_count(&self) -> usize {
        self.entries.values().filter(|entry| matches!(entry, Entry::File { .. })).count()
    }

    /// Number of bytes that [`Layer::write_to`] writes.
    pub fn size_bytes(&self) -> u64 {
        let entries = self.entries.iter().map(|(path, entry)| {
            let long = |text: &[u8]| if text.len() > 100 { BLOCK + padded(text.len() as u64 + 1) } else { 0 };
            let content = match entry {
                Entry::File { content, .. } => padded(content.size()),
                Entry::Link { target } => long(target),
                Entry::Folder { .. } => 0,
            };
            let slash = matches!(entry, Entry::Folder { .. }).then_some(b'/');
            long(&path.iter().copied().chain(slash).collect::<Vec<_>>()) + BLOCK + content
        });
        entries.sum::<u64>() + 2 * BLOCK
    }

    /// Writes the layer as a tar archive.
    ///
    /// # Errors
    ///
    /// [`StreamError`]; then what was written is not the layer.
    pub fn write_to(&self, to: &mut dyn Write) -> Result<(), StreamError> {
        let mut buffer = [0; BUFFER];
        let zeros = [0; BLOCK as usize];
        for (path, entry) in &self.entries {
            let mut header = tar::Header::new_gnu();
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            let mut name = path.clone();
            match entry {
                Entry::Folder { mode } => {
                    name.push(b'/');
                    header.set_entry_type(tar::EntryType::Directory);
                    header.set_mode(*mode);
                    header.set_size(0);
                }
                Entry::File { mode, content } => {
                    header.set_entry_type(tar::EntryType::Regular);
                    header.set_mode(*mode);
                    header.set_size(content.size());
                }
                Entry::Link { target } => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    header.set_mode(0o777);
                    header.set_size(0);
                    let field = &mut header.as_gnu_mut().expect("it was made so").linkname;
                    put_name(to, tar::EntryType::GNULongLink, target, field)?;
                }
            }
            put_name(to, tar::EntryType::GNULongName, &name, &mut header.as_gnu_mut().expect("it was made so").name)?;
            header.set_cksum();
            to.write_all(header.as_bytes()).map_err(StreamError::Write)?;
            if let Entry::File { content, .. } = entry {
                content.write_to(to, &mut buffer)?;
                let padding = padded(content.size()) - content.size();
                to.write_all(&zeros[..padding as usize]).map_err(StreamError::Write)?;
            }
        }
        to.write_all(&zeros).and_then(|()| to.write_all(&zeros)).map_err(StreamError::Write)
    }

    /// The SHA-256 of the archive, which names the layer in an image's configuration. Reads every file.
    ///
    /// # Errors
    ///
    /// [`StreamError`].
    pub fn diff_id(&self) -> Result<Digest, StreamError> {
        let mut sha256 = Hasher::default();
        self.write_to(&mut sha256)?;
        Ok(sha256.digest())
    }

    fn put(&mut self, path: &Path, at: &str) -> Result<(), LayerError> {
        let metadata = fs::metadata(path).map_err(|source| unreadable(path, source))?;
        if !metadata.is_file() {
            return Err(LayerError::Kind { path: path.to_owned(), what: "no file" });
        }
        self.put_file(at, file_mode(&metadata), Content::whole(path.to_owned(), metadata.len()))
    }

    fn put_file(&mut self, at: &str, mode: u32, content: Content) -> Result<(), LayerError> {
        let path = archive_path(at)?;
        self.put_parents(&path)?;
        self.insert(path, Entry::File { mode, content })
    }

    fn put_folder(&mut self, at: &str, mode: u32) -> Result<(), LayerError> {
        let path = archive_path(at)?;
        self.put_parents(&path)?;
        self.insert(path, Entry::Folder { mode })
    }

    /// Every folder is in the archive once, since engines differ in what they make of one that is not.
    fn put_parents(&mut self, path: &[u8]) -> Result<(), LayerError> {
        let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        for at in slashes {
            let parent = path[..at].to_vec();
            match self.entries.get(&parent) {
                None => drop(self.entries.insert(parent, Entry::Folder { mode: 0o755 })),
                Some(Entry::Folder { .. }) => {}
                Some(_) => return Err(twice(&parent)),
            }
        }
        Ok(())
    }

    fn insert(&mut self, path: Vec<u8>, entry: Entry) -> Result<(), LayerError> {
        if self.entries.contains_key(&path) {
            return Err(twice(&path));
        }
        self.put_parents(&path)?;
        self.entries.insert(path, entry);
        Ok(())
    }

    fn put_tree(&mut self, folder: &Path, at: &[u8], depth: usize) -> Result<(), LayerError> {
        if depth > DEPTH_LIMIT {
            return Err(LayerError::Kind { path: folder.to_owned(), what: "nested too deeply" });
        }
        for entry in fs::read_dir(folder).map_err(|source| unreadable(folder, source))? {
            let entry = entry.map_err(|source| unreadable(folder, source))?;
            let path = entry.path();
            let metadata = fs::symlink_metadata(&path).map_err(|source| unreadable(&path, source))?;
            let in_archive = [at, b"/", entry.file_name().as_bytes()].concat();
            if metadata.is_dir() {
                self.insert(in_archive.clone(), Entry::Folder { mode: 0o755 })?;
                self.put_tree(&path, &in_archive, depth + 1)?;
            } else if metadata.is_file() {
                let content = Content::whole(path, metadata.len());
                self.insert(in_archive, Entry::File { mode: file_mode(&metadata), content })?;
            } else if metadata.is_symlink() {
                let target = fs::read_link(&path).map_err(|source| unreadable(&path, source))?;
                if !stays_inside(&target, depth) {
                    return Err(LayerError::LinkOut { path, target });
                }
                self.insert(in_archive, Entry::Link { target: target.into_os_string().as_bytes().to_vec() })?;
            } else {
                return Err(LayerError::Kind { path, what: "a pipe, a socket or a device" });
            }
        }
        Ok(())
    }
}

/// Smaller layers are hashed one after another: a thread costs an allocator some MiB.
const HASHED_BESIDE: u64 = 8 << 20;

/// The digests of the archives, in the order of the layers. Large ones are read at the same time.
pub(super) fn diff_ids(layers: &[Layer]) -> Vec<Result<Digest, StreamError>> {
    let largest = layers.iter().map(Layer::size_bytes).enumerate().max_by_key(|(_, size)| *size).map(|(at, _)| at);
    std::thread::scope(|scope| {
        let start = |(at, layer): (usize, &'_ Layer)| {
            let beside = Some(at) != largest && layer.size_bytes() >= HASHED_BESIDE;
            beside.then(|| {
                let layer = layer.clone();
                scope.spawn(move || layer.diff_id())
            })
        };
        let threads: Vec<_> = layers.iter().enumerate().map(start).collect();
        let here: Vec<_> =
            layers.iter().zip(&threads).map(|(layer, thread)| thread.is_none().then(|| layer.diff_id())).collect();
        let join =
            |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join().expect("hashing a layer does not panic");
        here.into_iter()
            .zip(threads)
            .map(|(here, thread)| here.unwrap_or_else(|| join(thread.expect("one of the two"))))
            .collect()
    })
}

/// Where the program is in the image.
pub(super) fn program_path(program: &Program) -> String {
    format!("{PROGRAM_FOLDER}/{}", program.name())
}

/// Whether a link with this target, `depth` folders below the root of a tree, leads to something in the tree.
///
/// Links on the way are not followed, so a link through another link may be refused although it stays inside.
fn stays_inside(target: &Path, depth: usize) -> bool {
    let mut depth = depth as isize;
    for component in target.components() {
        match component {
            Component::Normal(_) => depth += 1,
            Component::CurDir => {}
            Component::ParentDir => depth -= 1,
            Component::RootDir | Component::Prefix(_) => return false,
        }
        if depth < 0 {
            return false;
        }
    }
    true
}

/// A place in an image as an archive spells it.
fn archive_path(at: &str) -> Result<Vec<u8>, LayerError> {
    let path = Path::new(at);
    let inside = path.strip_prefix("/").map_err(|_| place(at))?;
    let is_plain = inside.components().all(|component| matches!(component, Component::Normal(_)));
    let names: Vec<&OsStr> = inside.iter().collect();
    if names.is_empty() || !is_plain || at.contains('\0') {
        return Err(place(at));
    }
    Ok(names.join(OsStr::new("/")).as_bytes().to_vec())
}

fn place(at: &str) -> LayerError {
    LayerError::Place { at: at.to_owned() }
}

fn twice(path: &[u8]) -> LayerError {
    LayerError::Twice { at: format!("/{}", String::from_utf8_lossy(path)) }
}

fn unreadable(path: &Path, source: io::Error) -> LayerError {
    LayerError::Read { path: path.to_owned(), source }
}

/// Of a file's permissions only whether it is a program is the same on every machine.
fn file_mode(metadata: &fs::Metadata) -> u32 {
    if metadata.permissions().mode() & 0o111 == 0 { 0o644 } else { 0o755 }
}

fn padded(size: u64) -> u64 {
    size.next_multiple_of(BLOCK)
}

/// Puts `name` into `field`, or in front of the header as an entry of the kind `long` if it is too long for it.
fn put_name(to: &mut dyn Write, long: tar::EntryType, name: &[u8], field: &mut [u8; 100]) -> Result<(), StreamError> {
    let fits = name.len().min(field.len());
    field[..fits].copy_from_slice(&name[..fits]);
    if fits == name.len() {
        return Ok(());
    }
    let mut header = tar::Header::new_gnu();
    let field = &mut header.as_gnu_mut().expect("it was made so").name;
    field[..13].copy_from_slice(b"././@LongLink");
    header.set_entry_type(long);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    let size = name.len() as u64 + 1;
    header.set_size(size);
    header.set_cksum();
    let padding = vec![0; (padded(size) - name.len() as u64) as usize];
    let all = [header.as_bytes().as_slice(), name, &padding];
    all.into_iter().try_for_each(|bytes| to.write_all(bytes)).map_err(StreamError::Write)
}

/// Computes the SHA-256 of what is written to it.
#[derive(Default)]
pub(super) struct Hasher(sha2::Sha256);

impl Hasher {
    pub(super) fn digest(self) -> Digest {
        Digest::from_sha256(sha2::Digest::finalize(self.0).into())
    }
}

impl Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        sha2::Digest::update(&mut self.0, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::symlink;
    use std::process::Command;
    use std::time::SystemTime;

    use super::*;

    fn archive(layer: &Layer) -> Vec<u8> {
        let mut bytes = Vec::new();
        layer.write_to(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, layer.size_bytes());
        assert_eq!(layer.diff_id().unwrap(), Digest::of(&bytes));
        bytes
    }

    /// A folder with a bit of everything that a layer can have.
    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("deep/er")).unwrap();
        fs::create_dir(at("empty")).unwrap();
        fs::write(at("b"), "bb").unwrap();
        fs::write(at("a.csv"), "1,2\n").unwrap();
        fs::write(at("deep/er/none"), "").unwrap();
        fs::write(at("tool"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(at("tool"), fs::Permissions::from_mode(0o700)).unwrap();
        let long = "long".repeat(40);
        fs::write(at(&long), vec![1; 3 * BUFFER + 1]).unwrap();
        fs::create_dir(at("deep").join("er".repeat(60))).unwrap();
        symlink("../b", at("deep/link")).unwrap();
        symlink(&long, at("to long")).unwrap();
        folder
    }

    #[test]
    fn equal_files_are_an_equal_layer_wherever_and_whenever_they_were_written() {
        let (here, there) = (folder(), folder());
        let layer = |folder: &tempfile::TempDir| archive(&Layer::data(folder.path(), "/app/data").unwrap());
        let first = layer(&here);
        assert!(first == layer(&there), "two places");
        let b = fs::File::options().write(true).open(there.path().join("b")).unwrap();
        b.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        fs::set_permissions(there.path().join("b"), fs::Permissions::from_mode(0o600)).unwrap();
        assert!(first == layer(&there), "touched");
        fs::write(there.path().join("b"), "bc").unwrap();
        assert!(first != layer(&there), "one byte changed");
    }

    #[test]
    fn an_archive_is_read_back_as_what_went_in() {
        let folder = folder();
        let bytes = archive(&Layer::data(folder.path(), "/app/data").unwrap());
        let mut names = Vec::new();
        let mut archive = tar::Archive::new(bytes.as_slice());
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
            let header = entry.header();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap()), (0, 0, 0), "{name}");
            let mode = header.mode().unwrap();
            let original = folder
                .path()
                .join(name.strip_prefix("app/").unwrap().trim_start_matches("data").trim_start_matches('/'));
            if header.entry_type().is_file() {
                let mut content = Vec::new();
                entry.read_to_end(&mut content).unwrap();
                assert!(content == fs::read(&original).unwrap(), "{name}");
                assert_eq!(mode, if name == "app/data/tool" { 0o755 } else { 0o644 }, "{name}");
            } else if header.entry_type().is_symlink() {
                assert_eq!(entry.link_name().unwrap().unwrap(), fs::read_link(&original).unwrap());
            } else {
                assert_eq!((name.ends_with('/'), mode), (true, 0o755), "{name}");
            }
            names.push(name);
        }
        let mut sorted = names.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(names.len(), sorted.len(), "each once");
        assert_eq!(names.len(), 13);
        assert_eq!(names[..2], ["app/", "app/data/"]);
    }

    #[test]
    fn tar_itself_unpacks_it() {
        let (folder, out) = (folder(), tempfile::tempdir().unwrap());
        let path = out.path().join("layer.tar");
        fs::write(&path, archive(&Layer::data(folder.path(), "/data").unwrap())).unwrap();
        let tar = Command::new("tar").arg("-C").arg(out.path()).arg("-xf").arg(&path).output().unwrap();
        assert!(tar.status.success() && tar.stderr.is_empty(), "{}", String::from_utf8_lossy(&tar.stderr));
        let diff = Command::new("diff").arg("-r").arg(folder.path()).arg(out.path().join("data")).output().unwrap();
        assert!(diff.status.success(), "{}", String::from_utf8_lossy(&diff.stdout));
    }

    #[test]
    fn what_an_image_cannot_have_is_refused_by_name() {
        let check = |name: &str, make: &dyn Fn(&Path)| {
            let folder = folder();
            make(&folder.path().join(name));
            let error = Layer::data(folder.path(), "/data").unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
            error
        };
        let link = |target: &'static str| move |path: &Path| symlink(target, path).unwrap();
        for target in ["/etc/passwd", "../../outside", "er/../../../outside"] {
            let error = check("deep/way-out", &link(target));
            assert!(matches!(error, LayerError::LinkOut { .. }), "{target}: {error}");
        }
        let error = Layer::data(&folder().path().join("b"), "/data").unwrap_err();
        assert!(matches!(error, LayerError::Kind { what: "no folder", .. }), "{error}");
    }

    #[test]
    fn a_pipe_in_a_folder_is_refused_rather_than_waited_for() {
        let folder = folder();
        assert!(Command::new("mkfifo").arg(folder.path().join("pipe")).status().unwrap().success());
        let error = Layer::data(folder.path(), "/data").unwrap_err();
        assert!(matches!(&error, LayerError::Kind { path, .. } if path.ends_with("pipe")), "{error}");
    }

    #[test]
    fn a_file_that_becomes_a_pipe_or_another_size_is_an_error() {
        let folder = folder();
        let layer = Layer::data(folder.path(), "/data").unwrap();
        let b = folder.path().join("b");
        for content in ["", "b", "bbb"] {
            fs::write(&b, content).unwrap();
            let error = layer.write_to(&mut io::sink()).unwrap_err();
            assert!(matches!(&error, StreamError::Changed { path } if *path == b), "{error}");
        }
        fs::remove_file(&b).unwrap();
        let error = layer.write_to(&mut io::sink()).unwrap_err();
        assert!(matches!(&error, StreamError::Read { path, .. } if *path == b), "{error}");
        assert!(Command::new("mkfifo").arg(&b).status().unwrap().success());
        let error = layer.write_to(&mut io::sink()).unwrap_err();
        assert!(matches!(&error, StreamError::Changed { path } if *path == b), "{error}");
    }

    #[test]
    fn files_have_a_place_of_their_own() {
        let folder = folder();
        let (a, b) = (folder.path().join("a.csv"), folder.path().join("b"));
        let wrong = |files: &[(&Path, &str)]| Layer::files(files.iter().copied()).unwrap_err().to_string();
        for place in ["", "/", "app/x", "/app/../x", "../x", "/app/./../x"] {
            assert!(wrong(&[(&a, place)]).contains("is no place in an image"), "{place}");
        }
        assert!(wrong(&[(&a, "/x"), (&b, "/x")]).contains("two files for one place in the image, `/x`"));
        assert!(wrong(&[(&a, "/x"), (&b, "/x/y")]).contains("two files for one place in the image, `/x`"));
        assert!(wrong(&[(folder.path(), "/x")]).contains("is no file"));
        assert!(wrong(&[(&folder.path().join("none"), "/x")]).contains("none"));
        let layer = Layer::files([(a.as_path(), "/app/x/a"), (b.as_path(), "/app/b")]).unwrap();
        assert_eq!(layer.files_count(), 2);
        archive(&layer);
    }
}
