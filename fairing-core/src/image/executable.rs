//! The program that is shipped: the one that is running, without its debug information.
//!
//! [`Program`] holds the file open, so that what is shipped is what runs, even if a compiler replaces the file meanwhile.
//! What the kernel and the loader read stays byte for byte as it was, and so do the names of functions, for readable
//! backtraces. Only sections such as `.debug_info`, most of a program built for development, are left out while it is
//! read, so the program is never in memory whole.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use object::elf;
use object::pod;

use super::Architecture;
use super::content::Content;
use super::elf::{Elf, ElfError, LE, Section, search};

/// The running program under Linux, whatever has become of the file that it was started from.
const RUNNING: &str = "/proc/self/exe";

/// Words in a program's constants that give away a library which it loads at run time, and what that library is.
///
/// `cudarc` puts the library's name together at run time, but its panics name its source files. Written backwards, since
/// this program's own constants are searched too.
const LOADED_AT_RUN_TIME: [(&[u8], &str); 4] =
    [(b"os.aducbil", "CUDA"), (b"-craduc/", "CUDA"), (b"os.nakluvbil", "Vulkan"), (b"os.46pihdmabil", "ROCm")];

/// Failure to use a file as the program of an image. Returned by [`Program::running`] and [`Program::open`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramError {
    /// The file cannot be read.
    #[error("cannot read the program `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The file is no Linux program, as on macOS.
    #[error("`{}` is not an ELF program, which images consist of (`link = \"static\"` builds one for Linux)", path.display())]
    NotElf {
        /// The file.
        path: PathBuf,
    },
    /// The file is for a processor that fairing builds no images for.
    #[error("`{}` is for another processor than amd64 and arm64 (build it on one of those, or with `link = \"static\"`)", path.display())]
    Processor {
        /// The file.
        path: PathBuf,
    },
    /// The file's headers contradict each other.
    #[error("`{}` is a broken ELF program: its {what} is not in it or too long (build it again)", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// The part.
        what: &'static str,
    },
}

/// A program on this machine, open.
#[derive(Debug, Clone)]
pub struct Program {
    file: Arc<File>,
    path: Arc<Path>,
    name: String,
    elf: Arc<Elf>,
    stripped: Content,
}

impl Program {
    /// The program that is running.
    ///
    /// # Errors
    ///
    /// [`ProgramError`]; among them [`ProgramError::NotElf`] wherever programs have another form than under Linux.
    pub fn running() -> Result<Self, ProgramError> {
        let path =
            std::env::current_exe().map_err(|source| ProgramError::Read { path: PathBuf::from(RUNNING), source })?;
        // A name of a file that was replaced meanwhile ends like this.
        let shown = path.to_str().and_then(|path| path.strip_suffix(" (deleted)")).map_or(path.clone(), PathBuf::from);
        let open = if Path::new(RUNNING).exists() { Path::new(RUNNING) } else { &path };
        Self::opened(open, &shown)
    }

    /// The program at `path`.
    ///
    /// # Errors
    ///
    /// [`ProgramError`].
    pub fn open(path: &Path) -> Result<Self, ProgramError> {
        Self::opened(path, path)
    }

    fn opened(open: &Path, path: &Path) -> Result<Self, ProgramError> {
        let failed = |error| program_error(path, error);
        let file = File::open(open).map_err(|source| failed(ElfError::Read(source)))?;
        if file.metadata().map_err(|source| failed(ElfError::Read(source)))?.is_dir() {
            return Err(failed(ElfError::NotElf));
        }
        let elf = Elf::read(&file).map_err(failed)?;
        if !matches!(elf.header.e_type.get(LE), elf::ET_EXEC | elf::ET_DYN) {
            return Err(failed(ElfError::NotElf));
        }
        let (file, path) = (Arc::new(file), Arc::<Path>::from(path));
        let stripped = strip(&file, &path, &elf).map_err(|error| program_error(&path, error))?;
        let name = path.file_name().unwrap_or(OsStr::new("program")).to_string_lossy();
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
        let name = name.chars().map(plain).collect();
        Ok(Self { file, path, name, elf: Arc::new(elf), stripped })
    }

    /// The processor that it is for.
    pub fn architecture(&self) -> Architecture {
        self.elf.architecture
    }

    /// The file's name, with `-` for what would need quoting somewhere.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it runs without any library.
    pub fn is_static(&self) -> bool {
        self.elf.interpreter.is_none() && self.elf.dynamic.needed.is_empty()
    }

    /// Number of its bytes once the debug information is left out.
    pub fn size_bytes(&self) -> u64 {
        self.stripped.size()
    }

    /// What it loads at run time, beyond the libraries that its headers name: `CUDA`, `Vulkan` and the like.
    ///
    /// Found by the names of such libraries among the program's constants, so it is a guess, and one that needs a pass
    /// over them.
    ///
    /// # Errors
    ///
    /// [`ProgramError::Read`].
    pub fn loads_at_run_time(&self) -> Result<Vec<&'static str>, ProgramError> {
        let constants = self.constants().map_err(|error| program_error(&self.path, error))?;
        let needles = LOADED_AT_RUN_TIME.map(|(needle, _)| needle.iter().rev().copied().collect::<Vec<_>>());
        let needles = needles.each_ref().map(Vec::as_slice);
        let mut libraries = Vec::new();
        for (offset, size) in constants {
            let found = search(&self.file, offset, size, &needles)
                .map_err(|source| program_error(&self.path, ElfError::Read(source)))?;
            libraries.extend(found.into_iter().map(|index| LOADED_AT_RUN_TIME[index].1));
        }
        libraries.sort_unstable();
        libraries.dedup();
        Ok(libraries)
    }

    pub(super) fn elf(&self) -> &Elf {
        &self.elf
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn content(&self) -> &Content {
        &self.stripped
    }

    /// Where the constants are: `.rodata`, or without section headers whatever is loaded and not executed.
    fn constants(&self) -> Result<Vec<(u64, u64)>, ElfError> {
        let names = self.elf.section_names(&self.file)?;
        let sections = names.iter().zip(&self.elf.sections).filter(|(name, _)| name.starts_with(".rodata"));
        let found: Vec<_> = sections.map(|(_, section)| (section.sh_offset.get(LE), section.sh_size.get(LE))).collect();
        if !found.is_empty() {
            return Ok(found);
        }
        let segments =
            self.elf.segments.iter().filter(|segment| {
                segment.p_type.get(LE) == elf::PT_LOAD && segment.p_flags.get(LE).0 & elf::PF_X.0 == 0
            });
        Ok(segments.map(|segment| (segment.p_offset.get(LE), segment.p_filesz.get(LE))).collect())
    }
}

/// The file without the sections that only a debugger reads.
///
/// Everything up to the end of what is loaded stays in its place. Behind it come the sections that are kept, and a new
/// table of sections. A section that is left out keeps its entry there, as an unused one, since symbols refer to sections
/// by number.
pub(super) fn strip(file: &Arc<File>, path: &Arc<Path>, elf: &Elf) -> Result<Content, ElfError> {
    let mut whole = Content::default();
    whole.push_part(file, path, 0, elf.size);
    let names = elf.section_names(file)?;
    let loaded_end = elf.loaded_end();
    let is_stored = |section: &Section| {
        !matches!(section.sh_type.get(LE), elf::SHT_NULL | elf::SHT_NOBITS) && section.sh_size.get(LE) > 0
    };
    let end = |section: &Section| section.sh_offset.get(LE).saturating_add(section.sh_size.get(LE));
    let is_dropped = |section: &Section, name: &str| {
        section.sh_flags.get(LE).0 & elf::SHF_ALLOC.0 == 0
            && section.sh_offset.get(LE) >= loaded_end
            && is_debug_section(name)
    };
    let table_end = elf.header.e_shoff.get(LE) + size_of_val(elf.sections.as_slice()) as u64;
    let stored = || elf.sections.iter().filter(|section| is_stored(section));
    let known_end = stored().map(end).chain([loaded_end, table_end]).max().expect("the loaded part's end is in it");
    if loaded_end > elf.size || stored().any(|section| end(section) > elf.size) {
        return Err(ElfError::Broken("last section"));
    }
    // Bytes behind everything that the headers know: the program may read them itself, at their distance from its end.
    if known_end < elf.size || !elf.sections.iter().zip(&names).any(|(section, name)| is_dropped(section, name)) {
        return Ok(whole);
    }

    let mut sections = elf.sections.clone();
    let mut kept: Vec<usize> = Vec::new();
    for (index, (section, name)) in elf.sections.iter().zip(&names).enumerate() {
        if is_dropped(section, name) {
            // Zero in every field but the name, which costs nothing and tells a reader what was there.
            let unused = &mut sections[index];
            unused.sh_type.set(LE, elf::SHT_NULL);
            unused.sh_flags.set(LE, Default::default());
            unused.sh_offset.set(LE, 0);
            unused.sh_size.set(LE, 0);
            unused.sh_link.set(LE, 0);
            unused.sh_info.set(LE, 0);
            unused.sh_addralign.set(LE, 0);
            unused.sh_entsize.set(LE, 0);
        } else if is_stored(section) && section.sh_offset.get(LE) >= loaded_end {
            kept.push(index);
        }
    }
    kept.sort_by_key(|index| elf.sections[*index].sh_offset.get(LE));

    let mut behind = Content::default();
    let mut position = loaded_end;
    for index in kept {
        let section = &elf.sections[index];
        position = pad(&mut behind, position, section.sh_addralign.get(LE))?;
        behind.push_part(file, path, section.sh_offset.get(LE), section.sh_size.get(LE));
        sections[index].sh_offset.set(LE, position);
        position += section.sh_size.get(LE);
    }
    position = pad(&mut behind, position, 8)?;
    behind.push_bytes(pod::bytes_of_slice(&sections).to_vec());

    let mut header = elf.header;
    header.e_shoff.set(LE, position);
    let header = pod::bytes_of(&header).to_vec();
    let header_size = header.len() as u64;
    let mut content = Content::bytes(header);
    content.push_part(file, path, header_size, loaded_end - header_size);
    content.append(behind);
    Ok(content)
}

/// Zeros up to the next multiple of `alignment`, which is where the position then is.
fn pad(content: &mut Content, position: u64, alignment: u64) -> Result<u64, ElfError> {
    // No section behind the loaded part asks for more than a page.
    if alignment > 64 << 10 {
        return Err(ElfError::Broken("alignment of a section"));
    }
    let next = position.next_multiple_of(alignment.max(1));
    content.push_bytes(vec![0; (next - position) as usize]);
    Ok(next)
}

fn is_debug_section(name: &str) -> bool {
    let name = name.strip_prefix(".rela").unwrap_or(name);
    [".debug_", ".zdebug_", ".gnu.debuglto_", ".stab"].iter().any(|prefix| name.starts_with(prefix))
        || [".debug", ".line", ".gdb_index"].contains(&name)
}

fn program_error(path: &Path, error: ElfError) -> ProgramError {
    let path = path.to_owned();
    match error {
        ElfError::Read(source) => ProgramError::Read { path, source },
        ElfError::NotElf => ProgramError::NotElf { path },
        ElfError::Processor => ProgramError::Processor { path },
        ElfError::Broken(what) => ProgramError::Broken { path, what },
    }
}
