//! The headers of an ELF file: what the loader reads to start it, and what is in it beside that.
//!
//! Only the tables are read, piece by piece at their offsets: a program can be larger than what packing it may take of the
//! memory. Every length in a file is bounded before it becomes an allocation, so a broken file is an error.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use object::LittleEndian;
use object::elf::{self, Dyn64, FileHeader64, ProgramHeader64, SectionHeader64};
use object::pod::{self, Pod};

use super::Architecture;
use super::content::BUFFER;

pub(super) type FileHeader = FileHeader64<LittleEndian>;
pub(super) type Segment = ProgramHeader64<LittleEndian>;
pub(super) type Section = SectionHeader64<LittleEndian>;

/// Both processors that fairing builds images for are used with this byte order.
pub(super) const LE: LittleEndian = LittleEndian;

/// No table that a linker writes comes near; a broken length must not become an allocation.
const TABLE_LIMIT: u64 = 4 << 20;

/// Longest name or search path that is read; the kernel's own limit for paths.
const NAME_LIMIT: usize = 4096;

/// Why a file is not an ELF file that can be shipped.
#[derive(Debug, thiserror::Error)]
pub(super) enum ElfError {
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    #[error("it does not start as an ELF file does")]
    NotElf,
    #[error("it is for another processor than amd64 and arm64")]
    Processor,
    #[error("its {0} is broken")]
    Broken(&'static str),
}

/// What the headers of one file say.
#[derive(Debug)]
pub(super) struct Elf {
    pub(super) architecture: Architecture,
    /// Length of the file.
    pub(super) size: u64,
    pub(super) header: FileHeader,
    pub(super) segments: Vec<Segment>,
    /// Empty if the file has no section headers.
    pub(super) sections: Vec<Section>,
    /// The loader that the file asks for; `None` in a static program and in libraries.
    pub(super) interpreter: Option<String>,
    pub(super) dynamic: Dynamic,
}

/// What the loader is told about libraries.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Dynamic {
    pub(super) needed: Vec<String>,
    pub(super) soname: Option<String>,
    pub(super) rpath: Option<String>,
    pub(super) runpath: Option<String>,
    /// Whether the loader's cache and default folders are not searched for what this file needs.
    pub(super) no_default_folders: bool,
    /// The newest version of the GNU C library whose functions are used, such as (2, 34).
    pub(super) glibc: Option<(u32, u32)>,
}

impl Elf {
    pub(super) fn read(file: &File) -> Result<Self, ElfError> {
        let size = file.metadata().map_err(ElfError::Read)?.len();
        if size < size_of::<FileHeader>() as u64 {
            return Err(ElfError::NotElf);
        }
        let header: FileHeader = table::<FileHeader>(file, 0, 1, size, "header")?[0];
        let ident = header.e_ident;
        if ident.magic != elf::ELFMAG {
            return Err(ElfError::NotElf);
        }
        if ident.class != elf::ELFCLASS64 || ident.data != elf::ELFDATA2LSB {
            return Err(ElfError::Processor);
        }
        let architecture = match header.e_machine.get(LE) {
            elf::EM_X86_64 => Architecture::Amd64,
            elf::EM_AARCH64 => Architecture::Arm64,
            _ => return Err(ElfError::Processor),
        };
        let sections = sections(file, &header, size)?;
        let segments = segments(file, &header, size)?;
        let mut elf =
            Self { architecture, size, header, segments, sections, interpreter: None, dynamic: Dynamic::default() };
        elf.interpreter = elf.segment(elf::PT_INTERP).map(|at| elf.text(file, at.p_offset.get(LE))).transpose()?;
        elf.dynamic = elf.dynamic(file)?;
        Ok(elf)
    }

    /// Where the part of the file ends that programs see of themselves once they are loaded.
    pub(super) fn loaded_end(&self) -> u64 {
        let ends = self.segments.iter().map(|at| at.p_offset.get(LE).saturating_add(at.p_filesz.get(LE)));
        let tables = size_of::<FileHeader>() as u64;
        let tables = tables.max(self.header.e_phoff.get(LE) + size_of_val(self.segments.as_slice()) as u64);
        ends.chain([tables]).max().expect("the tables' end is in it")
    }

    /// The names of the sections, in their order.
    pub(super) fn section_names(&self, file: &File) -> Result<Vec<String>, ElfError> {
        let mut index = u32::from(self.header.e_shstrndx.get(LE).0);
        if index == u32::from(elf::SHN_XINDEX.0) {
            index = self.sections.first().map_or(0, |first| first.sh_link.get(LE));
        }
        let Some(names) = self.sections.get(index as usize).filter(|_| index != 0) else {
            return Ok(vec![String::new(); self.sections.len()]);
        };
        let broken = ElfError::Broken("table of section names");
        let bytes =
            table::<u8>(file, names.sh_offset.get(LE), names.sh_size.get(LE), self.size, "table of section names")?;
        let name = |section: &Section| {
            let bytes = bytes.get(section.sh_name.get(LE) as usize..)?;
            let end = bytes.iter().position(|byte| *byte == 0)?;
            Some(String::from_utf8_lossy(&bytes[..end]).into_owned())
        };
        self.sections.iter().map(name).collect::<Option<_>>().ok_or(broken)
    }

    fn segment(&self, kind: elf::ProgramType) -> Option<&Segment> {
        self.segments.iter().find(|segment| segment.p_type.get(LE) == kind)
    }

    /// Where the byte at `address` of the loaded program lies in the file.
    fn offset_of(&self, address: u64) -> Option<u64> {
        self.segments.iter().filter(|segment| segment.p_type.get(LE) == elf::PT_LOAD).find_map(|segment| {
            let into = address.checked_sub(segment.p_vaddr.get(LE))?;
            (into < segment.p_filesz.get(LE)).then(|| segment.p_offset.get(LE).checked_add(into)).flatten()
        })
    }

    /// The text that starts at `offset` and ends with a zero byte.
    fn text(&self, file: &File, offset: u64) -> Result<String, ElfError> {
        let length = self.size.saturating_sub(offset).min(NAME_LIMIT as u64);
        let bytes = table::<u8>(file, offset, length, self.size, "text")?;
        let end = bytes.iter().position(|byte| *byte == 0).ok_or(ElfError::Broken("text"))?;
        String::from_utf8(bytes[..end].to_vec()).map_err(|_| ElfError::Broken("text"))
    }

    fn dynamic(&self, file: &File) -> Result<Dynamic, ElfError> {
        let mut dynamic = Dynamic::default();
        let Some(segment) = self.segment(elf::PT_DYNAMIC) else { return Ok(dynamic) };
        let count = segment.p_filesz.get(LE) / size_of::<Dyn64<LittleEndian>>() as u64;
        let entries =
            table::<Dyn64<LittleEndian>>(file, segment.p_offset.get(LE), count, self.size, "dynamic section")?;
        let entries: Vec<_> = entries.iter().map(|entry| (entry.d_tag.get(LE), entry.d_val.get(LE))).collect();
        let end = entries.iter().position(|(tag, _)| *tag == elf::DT_NULL).unwrap_or(entries.len());
        let entries = &entries[..end];
        let value = |wanted| entries.iter().find(|(tag, _)| *tag == wanted).map(|(_, value)| *value);
        let Some(strings) = value(elf::DT_STRTAB) else { return Ok(dynamic) };
        let strings = self.offset_of(strings).ok_or(ElfError::Broken("dynamic string table"))?;
        let text = |at: u64| self.text(file, strings.checked_add(at).ok_or(ElfError::Broken("dynamic string table"))?);
        for (tag, value) in entries {
            match *tag {
                elf::DT_NEEDED => dynamic.needed.push(text(*value)?),
                elf::DT_SONAME => dynamic.soname = Some(text(*value)?),
                elf::DT_RPATH => dynamic.rpath = Some(text(*value)?),
                elf::DT_RUNPATH => dynamic.runpath = Some(text(*value)?),
                elf::DT_FLAGS_1 => dynamic.no_default_folders = value & elf::DF_1_NODEFLIB.0 != 0,
                _ => {}
            }
        }
        if let Some(at) = value(elf::DT_VERNEED).and_then(|at| self.offset_of(at)) {
            dynamic.glibc = self.newest_glibc(file, at, value(elf::DT_VERNEEDNUM).unwrap_or(0), &text)?;
        }
        Ok(dynamic)
    }

    /// The newest `GLIBC_x.y` among the versions that the file asks for, whose list starts at `at`.
    fn newest_glibc(
        &self,
        file: &File,
        mut at: u64,
        libraries: u64,
        text: &dyn Fn(u64) -> Result<String, ElfError>,
    ) -> Result<Option<(u32, u32)>, ElfError> {
        const WHAT: &str = "table of versions";
        let mut newest = None;
        for _ in 0..libraries.min(NAME_LIMIT as u64) {
            let library = table::<elf::Verneed<LittleEndian>>(file, at, 1, self.size, WHAT)?[0];
            let mut version = at.saturating_add(library.vn_aux.get(LE).into());
            for _ in 0..library.vn_cnt.get(LE) {
                let entry = table::<elf::Vernaux<LittleEndian>>(file, version, 1, self.size, WHAT)?[0];
                let name = text(entry.vna_name.get(LE).into())?;
                newest = newest.max(name.strip_prefix("GLIBC_").and_then(two_numbers));
                version = version.saturating_add(entry.vna_next.get(LE).into());
            }
            at = at.saturating_add(library.vn_next.get(LE).into());
        }
        Ok(newest)
    }
}

/// `2.34` and `2.2.5` as numbers, without what comes after the second.
fn two_numbers(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

fn segments(file: &File, header: &FileHeader, size: u64) -> Result<Vec<Segment>, ElfError> {
    let count = header.e_phnum.get(LE);
    if count == 0 {
        return Ok(Vec::new());
    }
    if usize::from(header.e_phentsize.get(LE)) != size_of::<Segment>() || count == elf::PN_XNUM {
        return Err(ElfError::Broken("table of segments"));
    }
    table(file, header.e_phoff.get(LE), count.into(), size, "table of segments")
}

fn sections(file: &File, header: &FileHeader, size: u64) -> Result<Vec<Section>, ElfError> {
    const WHAT: &str = "table of sections";
    let at = header.e_shoff.get(LE);
    if at == 0 {
        return Ok(Vec::new());
    }
    if usize::from(header.e_shentsize.get(LE)) != size_of::<Section>() {
        return Err(ElfError::Broken(WHAT));
    }
    let count = match header.e_shnum.get(LE) {
        // A number too large for its field stands in the first header.
        0 => table::<Section>(file, at, 1, size, WHAT)?[0].sh_size.get(LE),
        count => count.into(),
    };
    table(file, at, count, size, WHAT)
}

/// `count` values that lie one after another at `offset` of a file of `size` bytes.
fn table<T: Pod>(file: &File, offset: u64, count: u64, size: u64, what: &'static str) -> Result<Vec<T>, ElfError> {
    let bytes = count.checked_mul(size_of::<T>() as u64).filter(|bytes| *bytes <= TABLE_LIMIT);
    let bytes = bytes.filter(|bytes| offset.checked_add(*bytes).is_some_and(|end| end <= size));
    let bytes = bytes.ok_or(ElfError::Broken(what))? as usize;
    // Words, since the values need their alignment.
    let mut words = vec![0_u64; bytes.div_ceil(8)];
    file.read_exact_at(&mut pod::bytes_of_slice_mut(&mut words)[..bytes], offset).map_err(ElfError::Read)?;
    let (values, _) = pod::slice_from_bytes(pod::bytes_of_slice(&words), count as usize)
        .expect("the words hold that many values, aligned");
    Ok(values.to_vec())
}

/// Which of `needles`, each of eight to 32 bytes, are in the `size` bytes at `offset`; by their index.
pub(super) fn search(file: &File, offset: u64, size: u64, needles: &[&[u8]]) -> io::Result<Vec<usize>> {
    const OVERLAP: usize = 32;
    let mut found = vec![false; needles.len()];
    let mut buffer = [0; BUFFER];
    let end = offset.saturating_add(size);
    let (mut at, mut kept) = (offset, 0);
    while at < end {
        let wanted = (end - at).min((BUFFER - kept) as u64) as usize;
        file.read_exact_at(&mut buffer[kept..kept + wanted], at)?;
        let length = kept + wanted;
        for (needle, found) in needles.iter().zip(&mut found) {
            *found = *found || contains(&buffer[..length], needle);
        }
        // A needle may lie across the border of two pieces.
        kept = OVERLAP.min(length);
        buffer.copy_within(length - kept..length, 0);
        at += wanted as u64;
    }
    Ok(found.iter().enumerate().filter(|(_, found)| **found).map(|(index, _)| index).collect())
}

/// Whether `needle`, of at least eight bytes, is somewhere in `bytes`.
pub(super) fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes[..8].try_into().expect("eight bytes"));
    let start = word(needle);
    // Comparing words is several times as fast as comparing slices.
    bytes.windows(8).enumerate().any(|(at, window)| word(window) == start && bytes[at..].starts_with(needle))
}
