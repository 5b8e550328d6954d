//! Bytes that are not here yet: parts of files and a few bytes in between, of a size that is known before they are read.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One read and one write; small enough for a stack, and to stay in the processor's cache until it is hashed.
pub(super) const BUFFER: usize = 64 << 10;

/// Failure to pass a layer's bytes on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// A file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A file has another size than when it was looked at.
    #[error("`{}` changed while it was packed (start the run again when nothing writes to it)", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The bytes cannot be written where they go.
    #[error("cannot write the layer")]
    Write(#[source] io::Error),
}

/// The content of one file of a layer.
#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone)]
enum Piece {
    Bytes(Vec<u8>),
    /// Part of a file that stays open, so that it is the same file even if another takes its name.
    Part {
        file: Arc<File>,
        path: Arc<Path>,
        offset: u64,
        size: u64,
    },
    /// A whole file, opened when its turn comes: a folder can have more files than a process may have open.
    Whole {
        path: PathBuf,
        size: u64,
    },
}

impl Content {
    pub(super) fn bytes(bytes: impl Into<Vec<u8>>) -> Self {
        let mut content = Self::default();
        content.push_bytes(bytes.into());
        content
    }

    /// The whole file at `path`, which has `size` bytes and must still have them when it is read.
    pub(super) fn whole(path: PathBuf, size: u64) -> Self {
        Self { pieces: vec![Piece::Whole { path, size }] }
    }

    pub(super) fn push_bytes(&mut self, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.pieces.push(Piece::Bytes(bytes));
        }
    }

    pub(super) fn push_part(&mut self, file: &Arc<File>, path: &Arc<Path>, offset: u64, size: u64) {
        if size > 0 {
            self.pieces.push(Piece::Part { file: Arc::clone(file), path: Arc::clone(path), offset, size });
        }
    }

    /// What is in `other`, behind what is in this.
    pub(super) fn append(&mut self, other: Self) {
        self.pieces.extend(other.pieces);
    }

    pub(super) fn size(&self) -> u64 {
        let sizes = self.pieces.iter().map(|piece| match piece {
            Piece::Bytes(bytes) => bytes.len() as u64,
            Piece::Part { size, .. } | Piece::Whole { size, .. } => *size,
        });
        sizes.sum()
    }

    /// Writes exactly [`Content::size`] bytes to `to`, or fails.
    pub(super) fn write_to(&self, to: &mut dyn Write, buffer: &mut [u8; BUFFER]) -> Result<(), StreamError> {
        for piece in &self.pieces {
            match piece {
                Piece::Bytes(bytes) => to.write_all(bytes).map_err(StreamError::Write)?,
                Piece::Part { file, path, offset, size } => copy(file, path, *offset, *size, to, buffer)?,
                Piece::Whole { path, size } => {
                    let file = open_regular(path)?;
                    copy(&file, path, 0, *size, to, buffer)?;
                    let longer = file.read_at(&mut buffer[..1], *size).map_err(|source| unreadable(path, source))?;
                    if longer != 0 {
                        return Err(StreamError::Changed { path: path.clone() });
                    }
                }
            }
        }
        Ok(())
    }
}

/// Opens a file that must be a regular one: opening a pipe that has taken its place would wait for a writer.
fn open_regular(path: &Path) -> Result<File, StreamError> {
    let mut options = File::options();
    options.read(true).custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32);
    let file = options.open(path).map_err(|source| unreadable(path, source))?;
    let is_file = file.metadata().map_err(|source| unreadable(path, source))?.is_file();
    if is_file { Ok(file) } else { Err(StreamError::Changed { path: path.to_owned() }) }
}

fn copy(
    file: &File,
    path: &Path,
    mut offset: u64,
    mut left: u64,
    to: &mut dyn Write,
    buffer: &mut [u8; BUFFER],
) -> Result<(), StreamError> {
    while left > 0 {
        let wanted = left.min(BUFFER as u64) as usize;
        let read = match file.read_at(&mut buffer[..wanted], offset) {
            Ok(0) => return Err(StreamError::Changed { path: path.to_owned() }),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(unreadable(path, source)),
        };
        to.write_all(&buffer[..read]).map_err(StreamError::Write)?;
        offset += read as u64;
        left -= read as u64;
    }
    Ok(())
}

fn unreadable(path: &Path, source: io::Error) -> StreamError {
    StreamError::Read { path: path.to_owned(), source }
}
