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

    /// Where its file is, or was when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn elf(&self) -> &Elf {
        &self.elf
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileExt, PermissionsExt};
    use std::process::Command;

    use super::super::content::BUFFER;
    use super::*;

    fn packed(program: &Program) -> Vec<u8> {
        let mut bytes = Vec::new();
        program.content().write_to(&mut bytes, &mut [0; BUFFER]).unwrap();
        assert_eq!(bytes.len() as u64, program.size_bytes());
        bytes
    }

    fn written(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
        let path = folder.join(name);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// This test's own program, which has debug sections.
    fn own() -> (Program, Vec<u8>) {
        (Program::running().unwrap(), fs::read(RUNNING).unwrap())
    }

    #[test]
    fn what_is_loaded_stays_as_it_was_but_for_the_place_of_the_section_headers() {
        let (program, whole) = own();
        let packed = packed(&program);
        let end = program.elf().loaded_end() as usize;
        assert!(packed.len() < whole.len() / 2, "{} of {} bytes are left", packed.len(), whole.len());
        assert_eq!(packed[..40], whole[..40]);
        assert!(packed[48..end] == whole[48..end], "bytes that are loaded differ");
    }

    #[test]
    fn every_section_is_kept_under_its_number_or_left_out_for_the_debugger() {
        let folder = tempfile::tempdir().unwrap();
        let (program, whole) = own();
        let bytes = packed(&program);
        let path = written(folder.path(), "packed", &bytes);
        let after = Program::open(&path).unwrap();
        let names = program.elf().section_names(&program.file).unwrap();
        assert_eq!(after.elf().section_names(&after.file).unwrap(), names);
        let range = |section: &Section| {
            let start = section.sh_offset.get(LE) as usize;
            start..start + section.sh_size.get(LE) as usize
        };
        let mut dropped = Vec::new();
        for ((name, old), new) in names.iter().zip(&program.elf().sections).zip(&after.elf().sections) {
            if old.sh_type.get(LE) != new.sh_type.get(LE) {
                dropped.push(name.as_str());
            } else if old.sh_type.get(LE) != elf::SHT_NOBITS {
                assert!(whole[range(old)] == bytes[range(new)], "{name}");
                assert_eq!(new.sh_offset.get(LE) % new.sh_addralign.get(LE).max(1), 0, "{name}");
            }
        }
        assert!(dropped.contains(&".debug_info") && dropped.contains(&".debug_line"), "{dropped:?}");
        assert!(dropped.iter().all(|name| name.starts_with(".debug_")), "{dropped:?}");
        for kept in [".symtab", ".strtab", ".eh_frame"] {
            assert!(names.iter().any(|name| name == kept) && !dropped.contains(&kept), "{kept}");
        }
    }

    #[test]
    fn other_tools_take_a_packed_program_for_a_sound_one() {
        let folder = tempfile::tempdir().unwrap();
        let (program, _) = own();
        let path = written(folder.path(), "packed", &packed(&program));
        for question in ["-lS", "-s", "-d", "-V", "-n"] {
            let output = Command::new("readelf").arg(question).arg("-W").arg(&path).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stderr), "", "readelf {question}");
            assert!(output.status.success(), "readelf {question}");
        }
    }

    #[test]
    fn a_program_without_debug_sections_is_packed_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let (program, whole) = own();
        let once = packed(&program);
        let again = Program::open(&written(folder.path(), "stripped", &once)).unwrap();
        assert!(packed(&again) == once, "packing twice is not packing once");

        let mut without_headers = once;
        without_headers[40..48].fill(0);
        without_headers[58..64].fill(0);
        let program = Program::open(&written(folder.path(), "bare", &without_headers)).unwrap();
        assert!(packed(&program) == without_headers, "a program without section headers changed");

        let mut with_more = whole;
        with_more.extend_from_slice(b"read by the program itself");
        let program = Program::open(&written(folder.path(), "more", &with_more)).unwrap();
        assert!(packed(&program) == with_more, "what was appended is not where it was");
    }

    #[test]
    fn what_is_no_program_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let (_, whole) = own();
        let mut object = whole[..4096].to_vec();
        object[16] = 1;
        let mut arm = whole[..4096].to_vec();
        arm[18] = 40;
        let cases = [
            ("script", b"#!/bin/sh\n".to_vec(), "is not an ELF program"),
            ("empty", Vec::new(), "is not an ELF program"),
            ("cut", whole[..4096].to_vec(), "broken"),
            ("header", whole[..64].to_vec(), "broken"),
            ("arm", arm, "another processor"),
            ("object", object, "broken"),
        ];
        for (name, bytes, expected) in cases {
            let error = Program::open(&written(folder.path(), name, &bytes)).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(name), "{error}");
        }
        assert!(matches!(Program::open(folder.path()), Err(ProgramError::NotElf { .. })));
        assert!(matches!(Program::open(&folder.path().join("none")), Err(ProgramError::Read { .. })));
    }

    #[test]
    fn broken_headers_are_an_error_or_a_program_of_the_size_that_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let (program, _) = own();
        let whole = packed(&program);
        let tables = program.elf().header.e_phoff.get(LE) as usize + size_of_val(program.elf().segments.as_slice());
        let sections = u64::from_le_bytes(whole[40..48].try_into().unwrap()) as usize;
        let path = written(folder.path(), "broken", &whole);
        let file = File::options().write(true).open(&path).unwrap();
        let mut refused = 0;
        for at in (0..tables).chain((sections..whole.len()).step_by(5)) {
            for value in [0, 0x7f, 0xff] {
                file.write_all_at(&[value], at as u64).unwrap();
                match Program::open(&path) {
                    Ok(program) => assert_eq!(program.size_bytes(), program.content().size()),
                    Err(_) => refused += 1,
                }
            }
            file.write_all_at(&whole[at..at + 1], at as u64).unwrap();
        }
        assert!(refused > 100, "{refused}");
    }

    #[test]
    fn libraries_of_drivers_are_noticed_by_their_names_and_only_by_those() {
        let folder = tempfile::tempdir().unwrap();
        let (program, whole) = own();
        assert_eq!(program.loads_at_run_time().unwrap(), Vec::<&str>::new());
        let names = program.elf().section_names(&program.file).unwrap();
        let rodata = &program.elf().sections[names.iter().position(|name| name == ".rodata").unwrap()];
        let (start, size) = (rodata.sh_offset.get(LE) as usize, rodata.sh_size.get(LE) as usize);
        // Written backwards for the reason that `LOADED_AT_RUN_TIME` gives. One lies across the border of two pieces that
        // are read, and the other at the very end.
        let cases = [(start + BUFFER - 5, "1.os.aducbil", "CUDA"), (start + size - 14, "1.os.nakluvbil", "Vulkan")];
        for (at, name, expected) in cases {
            let name: Vec<u8> = name.bytes().rev().collect();
            let mut bytes = whole.clone();
            bytes[at..at + name.len()].copy_from_slice(&name);
            let program = Program::open(&written(folder.path(), expected, &bytes)).unwrap();
            assert_eq!(program.loads_at_run_time().unwrap(), [expected]);
        }
    }
}
