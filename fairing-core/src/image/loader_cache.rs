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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::process::Command;

    use super::*;

    /// `ldconfig` is often not on a user's search path.
    fn ldconfig() -> Option<&'static Path> {
        ["/sbin/ldconfig", "/usr/sbin/ldconfig"].map(Path::new).into_iter().find(|path| path.exists())
    }

    /// A cache that the real `ldconfig` wrote of a folder with one library, also in a copy for newer processors.
    fn written(format: &str) -> Option<(Vec<u8>, tempfile::TempDir)> {
        let folder = tempfile::tempdir().unwrap();
        let newer = folder.path().join("lib/glibc-hwcaps/x86-64-v3");
        fs::create_dir_all(&newer).unwrap();
        let library = folder.path().join("lib/libsome.so.1");
        let compiler = Command::new("cc")
            .args(["-shared", "-Wl,-soname,libsome.so.1", "-x", "c", "/dev/null", "-o"])
            .arg(&library)
            .status();
        assert!(compiler.unwrap().success());
        fs::copy(&library, newer.join("libsome.so.1")).unwrap();
        let conf = folder.path().join("conf");
        fs::write(&conf, format!("{}\n", folder.path().join("lib").display())).unwrap();
        let cache = folder.path().join("cache");
        let mut command = Command::new(ldconfig()?);
        let output = command.arg("-X").args(["-c", format, "-f"]).arg(&conf).arg("-C").arg(&cache).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some((fs::read(&cache).unwrap(), folder))
    }

    #[test]
    fn the_baseline_copy_is_found_in_either_format() {
        for format in ["new", "compat"] {
            let Some((cache, folder)) = written(format) else { return };
            assert_eq!(cached(&cache, "libsome.so.1"), [folder.path().join("lib/libsome.so.1")], "{format}");
            assert!(contains(&cache, b"/glibc-hwcaps/"), "the other copy is in it too");
            assert!(cached(&cache, "libsome.so").is_empty());
        }
    }

    #[test]
    fn a_broken_cache_has_nothing_in_it() {
        let Some((cache, _folder)) = written("compat") else { return };
        for length in 0..cache.len() {
            cached(&cache[..length], "libsome.so.1");
        }
        for at in 0..cache.len() {
            let mut broken = cache.clone();
            broken[at] = 0xff;
            cached(&broken, "libsome.so.1");
        }
        assert!(cached(b"", "libsome.so.1").is_empty());
        assert!(cached(b"ld.so-1.7.0\0\xff\xff\xff\xff", "libsome.so.1").is_empty());
    }
}
