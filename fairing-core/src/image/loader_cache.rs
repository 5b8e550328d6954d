//! The file in which glibc's loader looks up where libraries are, as `ldconfig` writes it.
//!
//! # Source
//!
//! `sysdeps/generic/dl-cache.h` in glibc 2.36.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::elf::contains;

/// The paths of the library `name` in the loader's cache, but for copies that need more than the baseline processor.
pub(super) fn cached(cache: &[u8], name: &str) -> Vec<PathBuf> {
    const OLD_MAGIC: &[u8] = b"ld.so-1.7.0\0";
    const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
    const HEADER: usize = 48;
    const ENTRY: usize = 24;
    let number = |bytes: &[u8], at: usize| -> Option<usize> {
        Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize)
    };
    // Caches written for old loaders too have this format behind the old one.
    let cache = if cache.starts_with(OLD_MAGIC) {
        let entries = number(cache, OLD_MAGIC.len()).unwrap_or(usize::MAX);
        let end = entries.checked_mul(12).and_then(|size| size.checked_add(OLD_MAGIC.len() + 4));
        end.map(|end| end.next_multiple_of(8)).and_then(|at| cache.get(at..)).unwrap_or_default()
    } else {
        cache
    };
    if !cache.starts_with(MAGIC) {
        return Vec::new();
    }
    let text = |at: usize| -> Option<&[u8]> { cache.get(at..)?.split(|byte| *byte == 0).next() };
    let entries = cache.get(HEADER..).unwrap_or_default().chunks_exact(ENTRY);
    let paths = entries.take(number(cache, MAGIC.len()).unwrap_or(0)).filter_map(|entry| {
        let (key, path) = (text(number(entry, 4)?)?, text(number(entry, 8)?)?);
        let is_baseline = entry[16..24] == [0; 8] && !contains(path, b"/glibc-hwcaps/");
        (key == name.as_bytes() && is_baseline).then(|| PathBuf::from(OsStr::from_bytes(path)))
    });
    paths.collect()
}
