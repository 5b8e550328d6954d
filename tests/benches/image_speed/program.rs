//! The program that is shipped: an ELF file of 25 MB that exists nowhere else.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context as _;

/// What the figures of others in this folder were measured with.
const SIZE: usize = 25_000_064;

/// Bytes that a change touches.
const CHANGE: usize = 64;

/// An ELF file: this program without its sections, and behind it the code of another one, so that it compresses as
/// programs do.
pub(crate) struct Program {
    path: PathBuf,
    size: usize,
    changes: AtomicU64,
}

impl Program {
    /// Writes the program into `folder`.
    pub(crate) fn create(folder: &Path) -> anyhow::Result<Self> {
        let mut bytes = without_sections(fs::read(std::env::current_exe()?)?).context("this program's own file")?;
        let filling = example();
        let filling = fs::read(&filling).with_context(|| {
            let build = "cargo build -p fairing-examples --example fashion_mnist";
            format!("no `{}` (run `{build}`)", filling.display())
        })?;
        if bytes.len() < SIZE {
            let filling = without_sections(filling)?;
            // From its end on backwards: there is the code, and the beginning is much like this program's.
            let wanted = SIZE - bytes.len();
            anyhow::ensure!(filling.len() >= wanted, "the example is too small to fill the program");
            bytes.extend_from_slice(&filling[filling.len() - wanted..]);
        }
        let path = folder.join("app");
        fs::write(&path, &bytes)?;
        // As a compiler does; else fairing would ship a file that nobody may start.
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        Ok(Self { path, size: bytes.len(), changes: AtomicU64::new(0) })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn size_bytes(&self) -> usize {
        self.size
    }

    /// Changes 64 bytes in its middle to some that were never there before.
    pub(crate) fn change(&self) -> anyhow::Result<()> {
        let change = self.changes.fetch_add(1, Ordering::Relaxed) + 1;
        let mut state = change.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let bytes: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .take(CHANGE)
        .collect();
        File::options().write(true).open(&self.path)?.write_all_at(&bytes, self.size as u64 / 2)?;
        Ok(())
    }
}

/// The example, beside this program.
pub(crate) fn example() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    own.with_file_name("examples").join("fashion_mnist")
}

/// What the kernel and the loader read of an ELF file of 64 bits in little-endian order.
fn without_sections(mut bytes: Vec<u8>) -> anyhow::Result<Vec<u8>> {
    let number = |at: usize, length: usize| -> anyhow::Result<usize> {
        let bytes = bytes.get(at..at + length).context("the file is too short")?;
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    };
    anyhow::ensure!(bytes.starts_with(b"\x7fELF\x02\x01"), "it is no ELF file of 64 bits");
    let (segments, length, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    let ends = (0..count).map(|index| {
        let at = segments + index * length;
        Ok(number(at + 8, 8)? + number(at + 32, 8)?)
    });
    let end = ends.collect::<anyhow::Result<Vec<_>>>()?.into_iter().max().unwrap_or_default();
    bytes.truncate(end);
    // Place of the table of sections; number of its entries and the one with the names.
    bytes[40..48].fill(0);
    bytes[60..64].fill(0);
    Ok(bytes)
}
