//! The shared libraries that a program needs, its loader included, and where in an image the loader finds them.
//!
//! They are looked for as the loader does it: `DT_RPATH` and `DT_RUNPATH`, `LD_LIBRARY_PATH`, the loader's cache, its
//! default folders. An image has no cache, so whatever was found through it goes into a default folder of that very loader.
//! Of a library that is there several times, for different generations of one processor, the baseline copy is taken,
//! since the machines that run the image may be older than this one.
//!
//! # Source
//!
//! `ld.so(8)`; musl's rules: `ldso/dynlink.c` in musl 1.2.5.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::Architecture;
use super::content::Content;
use super::elf::{Elf, ElfError, search};
use super::executable::{Program, strip};
use super::loader_cache::cached;

/// Where the program lies in an image.
pub const PROGRAM_FOLDER: &str = "/app";

/// Where libraries go that a base image does not have; found there through `LD_LIBRARY_PATH`.
pub const BESIDE_BASE: &str = "/app/lib";

/// The loader's cache of where libraries are.
const CACHE: &str = "/etc/ld.so.cache";

/// Caches and loaders are a few hundred kilobytes; more is not read.
const READ_LIMIT: u64 = 16 << 20;

/// From this version on glibc looks names up by itself; before, it loads the libraries [`NAME_LOOKUP`] for that.
const LOOKS_NAMES_UP_ITSELF: &[u8] = b"GLIBC_2.34\0";

/// What older C libraries load when a host's name is looked up.
const NAME_LOOKUP: [&str; 3] = ["libnss_files.so.2", "libnss_dns.so.2", "libresolv.so.2"];

/// How the names of libraries start that belong to a driver in the machine's kernel.
const DRIVERS: [&str; 8] = [
    "libcuda.",
    "libnvidia",
    "libnvcuvid.",
    "libvulkan.",
    "libGLX_nvidia",
    "libEGL_nvidia",
    "libamdhip64.",
    "libhsa-runtime64.",
];

/// The C library and what belongs to it: of these, a base image must use its own.
const C_LIBRARY: [&str; 14] = [
    "libc.",
    "libm.",
    "libpthread.",
    "libdl.",
    "librt.",
    "libutil.",
    "libresolv.",
    "libnsl.",
    "libnss_",
    "libanl.",
    "libmvec.",
    "libthread_db.",
    "libBrokenLocale.",
    "ld-",
];

/// Failure to find what a program needs. Returned by [`Libraries::of`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LibrariesError {
    /// A library is not on this machine.
    #[error(
        "library `{name}`, which `{}` needs, is not found in {} (install it, name its folder in LD_LIBRARY_PATH, or set \
         `base` to an image that has it)",
        needed_by.display(), places(looked_in)
    )]
    NotFound {
        /// As the program asks for it.
        name: String,
        /// The program or library that asks.
        needed_by: PathBuf,
        /// The folders and files that were looked at, in order.
        looked_in: Vec<PathBuf>,
    },
    /// A library belongs to a driver, so another machine's copy does not work.
    #[error(
        "library `{name}`, which `{}` needs, belongs to a driver and cannot be shipped (set `base` to an image that is made \
         for it, such as one of NVIDIA's)",
        needed_by.display()
    )]
    Driver {
        /// As the program asks for it.
        name: String,
        /// The program or library that asks.
        needed_by: PathBuf,
    },
    /// The loader that the program asks for cannot be used.
    #[error("the loader `{}`, which `{}` asks for, cannot be read or is no ELF file (`link = \"static\"` needs none)", loader.display(), program.display())]
    Loader {
        /// The loader.
        loader: PathBuf,
        /// The program.
        program: PathBuf,
    },
    /// A library cannot be read.
    #[error("cannot read library `{}`", path.display())]
    Read {
        /// The library.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
}

fn places(looked_in: &[PathBuf]) -> String {
    let mut text = String::new();
    for (index, place) in looked_in.iter().enumerate() {
        let comma = if index == 0 { "" } else { ", " };
        let _ = write!(text, "{comma}`{}`", place.display());
    }
    if text.is_empty() { "any folder".to_owned() } else { text }
}

/// One shared library or the loader.
#[derive(Debug, Clone)]
pub struct Library {
    /// As the loader asks for it, such as `libc.so.6`.
    pub name: String,
    /// Where it is on this machine.
    pub path: PathBuf,
    /// Where it goes in an image; absolute.
    pub at: PathBuf,
    content: Content,
    found: Found,
}

/// How a library was found, which decides where it is looked for in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// It is the loader.
    Loader,
    /// By a path relative to the file that asks for it.
    BesideTheAsking,
    /// By an absolute path in the file that asks for it.
    ByPath,
    /// By its name alone.
    ByName,
}

impl Library {
    /// Number of its bytes in the image.
    pub fn size_bytes(&self) -> u64 {
        self.content.size()
    }

    pub(super) fn content(&self) -> &Content {
        &self.content
    }

    fn is_of_the_c_library(&self) -> bool {
        self.found == Found::Loader || C_LIBRARY.iter().any(|name| self.name.starts_with(name))
    }
}

/// What a program needs to run.
#[derive(Debug, Clone, Default)]
pub struct Libraries {
    libraries: Vec<Library>,
    glibc: Option<(u32, u32)>,
}

impl Libraries {
    /// What `program` needs, the loader first; nothing if it is static.
    ///
    /// `library_path` is the value of `LD_LIBRARY_PATH`.
    ///
    /// # Errors
    ///
    /// [`LibrariesError`].
    pub fn of(program: &Program, library_path: Option<&OsStr>) -> Result<Self, LibrariesError> {
        if program.is_static() {
            return Ok(Self::default());
        }
        let mut finder = Finder::new(program, library_path)?;
        finder.find_all()?;
        Ok(Self { libraries: finder.libraries, glibc: finder.glibc })
    }

    /// The same for a program on a base image: without the C library and its loader, of which it uses the base's, and
    /// with everything else beside the program.
    #[must_use]
    pub fn beside_base(mut self) -> Self {
        self.libraries.retain(|library| !library.is_of_the_c_library());
        for library in &mut self.libraries {
            // A base may have a link where a folder would go, so nothing is put outside of the program's own folder.
            if library.found != Found::BesideTheAsking || !library.at.starts_with(PROGRAM_FOLDER) {
                library.at = Path::new(BESIDE_BASE).join(&library.name);
            }
        }
        self
    }

    /// The libraries, in the order in which the loader needs them.
    pub fn iter(&self) -> impl Iterator<Item = &Library> {
        self.libraries.iter()
    }

    /// Whether none is needed.
    pub fn is_empty(&self) -> bool {
        self.libraries.is_empty()
    }

    /// The oldest version of the GNU C library that has what the program and its libraries use, such as (2, 34).
    ///
    /// The C library's own files count only where they are shipped.
    pub fn glibc(&self) -> Option<(u32, u32)> {
        self.glibc
    }
}

/// A file that has been found and what of it decides about further ones.
struct Asking {
    path: PathBuf,
    /// Folder of the file on this machine.
    origin: PathBuf,
    /// Folder of the file in the image.
    origin_in_image: PathBuf,
    needed: Vec<String>,
    rpath: Option<String>,
    runpath: Option<String>,
    no_default_folders: bool,
    /// The file that asked for this one.
    parent: Option<usize>,
}

struct Finder {
    architecture: Architecture,
    is_musl: bool,
    library_path: Vec<PathBuf>,
    cache: Vec<u8>,
    /// The loader's default folders; where libraries go in the image is the first of them.
    folders: Vec<PathBuf>,
    files: Vec<Asking>,
    /// Names that have been looked for, and the names that the found files give themselves.
    known: BTreeMap<String, PathBuf>,
    libraries: Vec<Library>,
    glibc: Option<(u32, u32)>,
}

impl Finder {
    fn new(program: &Program, library_path: Option<&OsStr>) -> Result<Self, LibrariesError> {
        let elf = program.elf();
        let loader = elf.interpreter.as_ref().map(PathBuf::from);
        let loader_name =
            loader.as_deref().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
        let is_musl = loader_name.starts_with("ld-musl-");
        let mut finder = Self {
            architecture: elf.architecture,
            is_musl,
            library_path: library_path.map(folders_of).unwrap_or_default(),
            cache: if is_musl { Vec::new() } else { bounded(Path::new(CACHE)).unwrap_or_default() },
            folders: Vec::new(),
            files: Vec::new(),
            known: BTreeMap::new(),
            libraries: Vec::new(),
            glibc: elf.dynamic.glibc,
        };
        if let Some(loader) = loader {
            let unusable = || LibrariesError::Loader { loader: loader.clone(), program: program.path().to_owned() };
            let bytes = bounded(&loader).ok_or_else(unusable)?;
            finder.folders = if is_musl { musl_folders(&loader_name) } else { built_in_folders(&bytes) };
            drop(bytes);
            let (file, elf) = finder.suitable(&loader).ok_or_else(unusable)?;
            finder.add(&loader_name, &loader, loader.clone(), Found::Loader, &file, &elf)?;
        }
        if finder.folders.is_empty() {
            finder.folders = ["/lib64", "/usr/lib64", "/lib", "/usr/lib"].map(PathBuf::from).into();
        }
        finder.files.push(Asking {
            path: program.path().to_owned(),
            origin: folder_of(&fs::canonicalize(program.path()).unwrap_or_else(|_| program.path().to_owned())),
            origin_in_image: PathBuf::from(PROGRAM_FOLDER),
            needed: elf.dynamic.needed.clone(),
            rpath: elf.dynamic.rpath.clone(),
            runpath: elf.dynamic.runpath.clone(),
            no_default_folders: elf.dynamic.no_default_folders,
            parent: None,
        });
        Ok(finder)
    }

    /// Breadth first, as the loader does it: which library has a name first decides for everyone who asks for it.
    fn find_all(&mut self) -> Result<(), LibrariesError> {
        let mut queue: VecDeque<usize> = (0..self.files.len()).collect();
        while let Some(asking) = queue.pop_front() {
            for name in self.files[asking].needed.clone() {
                let before = self.files.len();
                self.find(&name, asking)?;
                queue.extend(before..self.files.len());
            }
        }
        Ok(())
    }

    fn find(&mut self, name: &str, asking: usize) -> Result<(), LibrariesError> {
        if self.known.contains_key(name) || self.is_musl && is_musl_itself(name) {
            return Ok(());
        }
        let needed_by = || self.files[asking].path.clone();
        if DRIVERS.iter().any(|driver| name.starts_with(driver)) {
            return Err(LibrariesError::Driver { name: name.to_owned(), needed_by: needed_by() });
        }
        let mut looked_in = Vec::new();
        let Some((path, at, found, file, elf)) = self.look_for(name, asking, &mut looked_in) else {
            return Err(LibrariesError::NotFound { name: name.to_owned(), needed_by: needed_by(), looked_in });
        };
        self.add(name, &path, at.clone(), found, &file, &elf)?;
        let mut needed = elf.dynamic.needed.clone();
        if name == "libc.so.6" {
            let read = |source| LibrariesError::Read { path: path.clone(), source };
            if search(&file, 0, elf.size, &[LOOKS_NAMES_UP_ITSELF]).map_err(read)?.is_empty() {
                needed.extend(NAME_LOOKUP.map(str::to_owned));
            }
        }
        self.files.push(Asking {
            origin: folder_of(&path),
            origin_in_image: folder_of(&at),
            path,
            needed,
            rpath: elf.dynamic.rpath,
            runpath: elf.dynamic.runpath,
            no_default_folders: elf.dynamic.no_default_folders,
            parent: Some(asking),
        });
        Ok(())
    }

    fn add(
        &mut self,
        name: &str,
        path: &Path,
        at: PathBuf,
        found: Found,
        file: &Arc<File>,
        elf: &Elf,
    ) -> Result<(), LibrariesError> {
        let broken = |error| match error {
            ElfError::Read(source) => source,
            other => std::io::Error::other(other),
        };
        let content = strip(file, &Arc::from(path), elf)
            .map_err(|error| LibrariesError::Read { path: path.to_owned(), source: broken(error) })?;
        self.known.insert(name.to_owned(), path.to_owned());
        if let Some(soname) = &elf.dynamic.soname {
            self.known.entry(soname.clone()).or_insert_with(|| path.to_owned());
        }
        let library = Library { name: name.to_owned(), path: path.to_owned(), at, content, found };
        // The C library's files need versions of each other; they come together from one place.
        if !library.is_of_the_c_library() {
            self.glibc = self.glibc.max(elf.dynamic.glibc);
        }
        self.libraries.push(library);
        Ok(())
    }

    /// The first file of that name that the loader would take.
    fn look_for(
        &self,
        name: &str,
        asking: usize,
        looked_in: &mut Vec<PathBuf>,
    ) -> Option<(PathBuf, PathBuf, Found, Arc<File>, Elf)> {
        if name.contains('/') {
            // Relative ones depend on the folder that the program is started in, which an image does not have.
            let path = normal(Path::new(name)).filter(|path| path.is_absolute())?;
            looked_in.push(path.clone());
            return self.suitable(&path).map(|(file, elf)| (path.clone(), path, Found::ByPath, file, elf));
        }
        let in_default_folder = self.folders[0].join(name);
        let asking = &self.files[asking];
        for (folder, in_image, found) in self.search_path(asking) {
            let path = folder.join(name);
            if let Some((file, elf)) = self.suitable(&path) {
                let at = in_image.map_or(in_default_folder, |folder| folder.join(name));
                return Some((path, at, found, file, elf));
            }
            looked_in.push(folder);
        }
        if asking.no_default_folders {
            return None;
        }
        if !self.cache.is_empty() {
            for path in cached(&self.cache, name) {
                if let Some((file, elf)) = self.suitable(&path) {
                    return Some((path, in_default_folder, Found::ByName, file, elf));
                }
            }
            looked_in.push(PathBuf::from(CACHE));
        }
        for folder in &self.folders {
            let path = folder.join(name);
            if let Some((file, elf)) = self.suitable(&path) {
                return Some((path, in_default_folder, Found::ByName, file, elf));
            }
            looked_in.push(folder.clone());
        }
        None
    }

    /// The folders that are searched before the loader's own, each with its place in the image if it has one there.
    fn search_path(&self, asking: &Asking) -> Vec<(PathBuf, Option<PathBuf>, Found)> {
        let mut folders = Vec::new();
        // musl makes no difference between the two kinds, and asks the parents in either case.
        if asking.runpath.is_none() || self.is_musl {
            let mut file = Some(asking);
            while let Some(at) = file {
                if at.runpath.is_none() {
                    folders.extend(at.rpath.iter().flat_map(|path| self.expanded(path, at)));
                } else if self.is_musl {
                    folders.extend(at.runpath.iter().flat_map(|path| self.expanded(path, at)));
                }
                file = at.parent.map(|parent| &self.files[parent]);
            }
        }
        folders.extend(self.library_path.iter().map(|folder| (folder.clone(), None, Found::ByName)));
        if !self.is_musl {
            folders.extend(asking.runpath.iter().flat_map(|path| self.expanded(path, asking)));
        }
        folders
    }

    /// The folders of a `DT_RPATH` or `DT_RUNPATH` of `file`.
    fn expanded(&self, path: &str, file: &Asking) -> Vec<(PathBuf, Option<PathBuf>, Found)> {
        let folders = path.split(':').filter(|folder| !folder.is_empty()).filter_map(|folder| {
            let folder = self.without_platform(folder)?;
            let rest = ["$ORIGIN", "${ORIGIN}"].iter().find_map(|origin| folder.strip_prefix(origin));
            let (here, in_image, found) = match rest {
                Some(rest) => {
                    let join = |origin: &Path| PathBuf::from(format!("{}{rest}", origin.display()));
                    (join(&file.origin), join(&file.origin_in_image), Found::BesideTheAsking)
                }
                None => (PathBuf::from(&folder), PathBuf::from(&folder), Found::ByPath),
            };
            // Relative folders depend on where the program is started; `$` is something that the loader does not know.
            let in_image = normal(&in_image).filter(|folder| folder.is_absolute())?;
            (!folder.trim_start_matches(['$', '{']).contains('$')).then_some((here, Some(in_image), found))
        });
        folders.collect()
    }

    /// `$LIB` and `$PLATFORM` replaced by what they stand for with this loader.
    fn without_platform(&self, folder: &str) -> Option<String> {
        let lib = self.folders.first()?.strip_prefix("/").ok()?.to_str()?;
        let platform = match self.architecture {
            Architecture::Amd64 => "x86_64",
            Architecture::Arm64 => "aarch64",
        };
        let replaced = folder.replace("${LIB}", lib).replace("$LIB", lib);
        Some(replaced.replace("${PLATFORM}", platform).replace("$PLATFORM", platform))
    }

    /// The file at `path` if the loader would take it: one that is not for this processor is passed over.
    fn suitable(&self, path: &Path) -> Option<(Arc<File>, Elf)> {
        if !fs::metadata(path).ok()?.is_file() {
            return None;
        }
        let file = File::open(path).ok()?;
        let elf = Elf::read(&file).ok()?;
        (elf.architecture == self.architecture).then(|| (Arc::new(file), elf))
    }
}

/// The folders of a `LD_LIBRARY_PATH`; its empty entries mean the folder that the program is started in.
fn folders_of(path: &OsStr) -> Vec<PathBuf> {
    let folders = path.as_bytes().split(|byte| [b':', b';'].contains(byte));
    let folder =
        |bytes: &[u8]| PathBuf::from(if bytes.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(bytes) });
    folders.map(folder).collect()
}

fn folder_of(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("/")).to_owned()
}

/// `path` without `.` and `..`; `None` if it leads out of its start.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            // The root's parent is the root.
            Component::ParentDir if normal == Path::new("/") => {}
            Component::ParentDir => {
                normal.pop().then_some(())?;
            }
            other => normal.push(other),
        }
    }
    Some(normal)
}

/// The whole file, if it is not longer than [`READ_LIMIT`].
fn bounded(path: &Path) -> Option<Vec<u8>> {
    let file = File::open(path).ok()?;
    let size = file.metadata().ok()?.len();
    let mut bytes = Vec::with_capacity(size.min(READ_LIMIT) as usize + 1);
    file.take(READ_LIMIT + 1).read_to_end(&mut bytes).ok()?;
    (bytes.len() as u64 <= READ_LIMIT).then_some(bytes)
}

/// The default folders that stand in a glibc loader: `/lib/x86_64-linux-gnu/` on Debian, `/lib64/` on Fedora.
fn built_in_folders(loader: &[u8]) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = Vec::new();
    for text in loader.split(|byte| *byte == 0) {
        let is_folder = text.len() > 1 && text.starts_with(b"/") && text.ends_with(b"/");
        let is_plain = text.iter().all(|byte| byte.is_ascii_alphanumeric() || b"/._+-".contains(byte));
        if is_folder && is_plain && text.windows(4).any(|part| part == b"/lib") {
            let folder = PathBuf::from(OsStr::from_bytes(&text[..text.len() - 1]));
            if !folders.contains(&folder) {
                folders.push(folder);
            }
        }
    }
    folders
}

/// The default folders of musl's loader, of which the first also works where `/etc/ld-musl-ARCH.path` is absent.
fn musl_folders(loader: &str) -> Vec<PathBuf> {
    let architecture = loader.trim_start_matches("ld-musl-").split('.').next().unwrap_or_default();
    let written = bounded(&PathBuf::from(format!("/etc/ld-musl-{architecture}.path"))).unwrap_or_default();
    let written = written.split(|byte| [b':', b'\n'].contains(byte)).filter(|folder| !folder.is_empty());
    let mut folders = ["/lib", "/usr/local/lib", "/usr/lib"].map(PathBuf::from).to_vec();
    folders.extend(written.map(|folder| PathBuf::from(OsString::from(OsStr::from_bytes(folder)))));
    folders
}

/// Whether musl's loader is what goes by that name: all of the C library is in it.
fn is_musl_itself(name: &str) -> bool {
    let Some(rest) = name.strip_prefix("lib") else { return false };
    ["c.", "pthread.", "rt.", "m.", "dl.", "util.", "xnet."].iter().any(|own| rest.starts_with(own))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// A folder in which small libraries and programs are compiled.
    struct Workshop(tempfile::TempDir);

    impl Workshop {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn at(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        /// Compiles a library or, without a `.so` in its name, a program that calls what it is linked to.
        fn build(&self, name: &str, calls: &[&str], arguments: &[&str]) -> PathBuf {
            let path = self.at(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let declared: String = calls.iter().map(|call| format!("int {call}(void);")).collect();
            let called: String = calls.iter().map(|call| format!(" + {call}()")).collect();
            let file = path.file_name().unwrap().to_string_lossy().into_owned();
            let (function, kind) = match file.split_once(".so") {
                Some((name, _)) => (name.trim_start_matches("lib").to_owned(), vec!["-shared".to_owned()]),
                None => ("main".to_owned(), Vec::new()),
            };
            let source = self.at("source.c");
            fs::write(&source, format!("{declared} int {function}(void) {{ return 0{called}; }}")).unwrap();
            let mut compiler = Command::new("cc");
            compiler.args(["-fPIC", "-o"]).arg(&path).arg(&source).args(kind).args(arguments);
            compiler.arg(format!("-Wl,-rpath-link,{}", self.0.path().display()));
            let output = compiler.current_dir(self.0.path()).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            path
        }
    }

    fn of(program: &Path, library_path: Option<&str>) -> Result<Libraries, LibrariesError> {
        Libraries::of(&Program::open(program).unwrap(), library_path.map(OsStr::new))
    }

    #[track_caller]
    fn library<'a>(libraries: &'a Libraries, name: &str) -> &'a Library {
        libraries.iter().find(|library| library.name == name).unwrap_or_else(|| panic!("no {name} in {libraries:?}"))
    }

    /// What the loader itself says that it would load, by name.
    fn asked(program: &Path, loader: &Path) -> Vec<(String, PathBuf)> {
        let output = Command::new(loader).arg("--list").arg(program).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let lines = text.lines().filter_map(|line| line.trim().split_once(" => "));
        let mut all: Vec<_> =
            lines.map(|(name, path)| (name.to_owned(), PathBuf::from(path.rsplit_once(" (").unwrap().0))).collect();
        all.sort();
        all
    }

    #[test]
    fn what_is_found_is_what_the_loader_loads() {
        let mut compared = 0;
        let programs =
            ["/usr/bin/git", "/usr/bin/python3", "/usr/bin/perl", "/usr/bin/tar", "/usr/bin/curl", "/bin/bash"];
        let own = std::env::current_exe().unwrap();
        for program in programs.iter().map(Path::new).chain([own.as_path()]).filter(|program| program.exists()) {
            let Ok(opened) = Program::open(program) else { continue };
            let Some(loader) = opened.elf().interpreter.clone().filter(|loader| !loader.contains("musl")) else {
                continue;
            };
            let libraries = Libraries::of(&opened, None).unwrap();
            let baseline = |path: &Path| fs::canonicalize(path).unwrap();
            let mut found: Vec<_> =
                libraries.iter().skip(1).map(|library| (library.name.clone(), baseline(&library.path))).collect();
            found.sort();
            let loaded = asked(program, Path::new(&loader)).into_iter();
            // The loader takes the copy for this very processor, which is not what is shipped.
            let loaded: Vec<_> = loaded
                .filter(|(name, _)| *name != loader)
                .filter(|(_, path)| !path.to_string_lossy().contains("glibc-hwcaps"))
                .map(|(name, path)| (name, baseline(&path)))
                .collect();
            let names = |list: &[(String, PathBuf)]| list.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
            assert!(loaded.iter().all(|entry| found.contains(entry)), "{}: {loaded:?} {found:?}", program.display());
            assert!(names(&found).len() >= loaded.len());
            compared += 1;
        }
        assert!(compared >= 2, "{compared} programs were compared");
    }

    #[test]
    fn a_search_path_beside_the_program_is_the_same_in_the_image() {
        let shop = Workshop::new();
        shop.build("lib/liblow.so", &[], &[]);
        shop.build("lib/libmid.so", &["low"], &["-Llib", "-llow", "-Wl,-rpath,$ORIGIN"]);
        let program = shop.build("fit", &["mid"], &["-Llib", "-lmid", "-Wl,-rpath,$ORIGIN/../none:$ORIGIN/lib"]);
        let libraries = of(&program, None).unwrap();
        assert_eq!(library(&libraries, "libmid.so").at, Path::new("/app/lib/libmid.so"));
        assert_eq!(library(&libraries, "liblow.so").at, Path::new("/app/lib/liblow.so"));
        let in_base = libraries.beside_base();
        let names: Vec<_> = in_base.iter().map(|library| library.name.as_str()).collect();
        assert_eq!(names, ["libmid.so", "liblow.so"], "of a base, the C library is used");
    }

    #[test]
    fn the_old_kind_of_search_path_holds_for_what_libraries_need_and_the_new_one_does_not() {
        let shop = Workshop::new();
        shop.build("lib/liblow.so", &[], &[]);
        shop.build("lib/libmid.so", &["low"], &["-Llib", "-llow"]);
        let link = |kind: &str| {
            ["-Llib", "-lmid", "-Wl,-rpath-link,lib", "-Wl,-rpath,$ORIGIN/lib"]
                .map(str::to_owned)
                .into_iter()
                .chain([kind.to_owned()])
                .collect::<Vec<_>>()
        };
        let build = |name: &str, kind: &str| {
            let arguments = link(kind);
            shop.build(name, &["mid"], &arguments.iter().map(String::as_str).collect::<Vec<_>>())
        };
        let libraries = of(&build("old", "-Wl,--disable-new-dtags"), None).unwrap();
        assert_eq!(library(&libraries, "liblow.so").at, Path::new("/app/lib/liblow.so"));
        let error = of(&build("new", "-Wl,--enable-new-dtags"), None).unwrap_err();
        let LibrariesError::NotFound { name, needed_by, .. } = &error else { panic!("{error}") };
        assert_eq!((name.as_str(), needed_by.as_path()), ("liblow.so", shop.at("lib/libmid.so").as_path()));
        assert!(error.to_string().contains("liblow.so"), "{error}");
    }

    #[test]
    fn a_library_from_the_environment_goes_where_the_loader_looks_by_itself() {
        let shop = Workshop::new();
        shop.build("lib/liblow.so", &[], &[]);
        let program = shop.build("fit", &["low"], &["-Llib", "-llow"]);
        let error = of(&program, Some("/none")).unwrap_err().to_string();
        assert!(error.contains("`/none`") && error.contains("`/etc/ld.so.cache`"), "{error}");
        // Something else of that name, and one for another processor, are passed over.
        fs::create_dir_all(shop.at("text")).unwrap();
        fs::write(shop.at("text/liblow.so"), "INPUT(liblow.a)").unwrap();
        fs::create_dir_all(shop.at("other")).unwrap();
        let mut other = fs::read(shop.at("lib/liblow.so")).unwrap();
        other[18] ^= 0xff;
        fs::write(shop.at("other/liblow.so"), other).unwrap();
        let folders = ["text", "other", "lib"].map(|name| shop.at(name).display().to_string()).join(":");
        let libraries = of(&program, Some(&folders)).unwrap();
        let low = library(&libraries, "liblow.so");
        assert_eq!(low.path, shop.at("lib/liblow.so"));
        let libc = library(&libraries, "libc.so.6");
        assert_eq!(low.at.parent(), libc.at.parent());
        let in_base = libraries.beside_base();
        assert_eq!(library(&in_base, "liblow.so").at, Path::new("/app/lib/liblow.so"));
    }

    #[test]
    fn a_library_of_a_driver_is_not_shipped() {
        let shop = Workshop::new();
        shop.build("libnvcuvid.so.1", &[], &["-Wl,-soname,libnvcuvid.so.1"]);
        let program = shop.build("fit", &["nvcuvid"], &["-L.", "-l:libnvcuvid.so.1", "-Wl,-rpath,$ORIGIN"]);
        let error = of(&program, None).unwrap_err();
        assert!(matches!(error, LibrariesError::Driver { .. }), "{error}");
        assert!(error.to_string().contains("set `base`"), "{error}");
    }

    #[test]
    fn a_static_program_needs_nothing() {
        let shop = Workshop::new();
        let program = shop.build("fit", &[], &["-static"]);
        assert!(of(&program, Some("/none")).unwrap().is_empty());
    }

    #[test]
    fn a_loader_that_is_not_there_is_named() {
        let shop = Workshop::new();
        let program = shop.build("fit", &[], &["-Wl,--dynamic-linker=/none/ld.so"]);
        let error = of(&program, None).unwrap_err().to_string();
        assert!(error.contains("`/none/ld.so`") && error.contains("link = \"static\""), "{error}");
    }
}
