//! What is sent to the engine for a build: a folder without what is of no use, and the layers.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::ignore::Patterns;
use crate::image::StreamError;
use crate::image::layer::Layer;

/// The layers are files in this folder, each with the name of its layer.
const LAYERS_FOLDER: &str = "fairing";

/// Deeper folders most likely contain themselves through a mount.
const DEPTH_LIMIT: usize = 128;

/// What a build starts from.
pub(super) struct Context<'a> {
    /// The text of the Dockerfile and its name in the context.
    pub(super) dockerfile: (String, Vec<u8>),
    /// The user's folder and which part of it is sent.
    pub(super) folder: Option<(PathBuf, Patterns)>,
    /// The layers.
    pub(super) layers: &'a [Layer],
}

/// The place of a layer in the context.
pub(super) fn place(layer: &Layer) -> String {
    format!("{LAYERS_FOLDER}/{}.tar", layer.name())
}

impl Context<'_> {
    /// Writes it as a tar archive.
    pub(super) fn write_to(&self, to: &mut dyn Write) -> Result<(), StreamError> {
        let mut archive = tar::Builder::new(to);
        let (name, text) = &self.dockerfile;
        archive
            .append_data(&mut header(tar::EntryType::Regular, 0o644, text.len() as u64), name, text.as_slice())
            .map_err(StreamError::Write)?;
        if let Some((folder, patterns)) = &self.folder {
            self.write_folder(&mut archive, folder, "", patterns, 0)?;
        }
        for layer in self.layers {
            // Each is a whole number of blocks, so nothing has to follow it.
            let mut header = header(tar::EntryType::Regular, 0o644, layer.size_bytes());
            header.set_path(place(layer)).expect("the names of layers are short");
            header.set_cksum();
            archive.get_mut().write_all(header.as_bytes()).map_err(StreamError::Write)?;
            layer.write_to(archive.get_mut())?;
        }
        archive.finish().map_err(StreamError::Write)
    }

    fn write_folder(
        &self,
        archive: &mut tar::Builder<&mut dyn Write>,
        folder: &Path,
        at: &str,
        patterns: &Patterns,
        depth: usize,
    ) -> Result<(), StreamError> {
        let unreadable = |path: &Path, source| StreamError::Read { path: path.to_owned(), source };
        if depth > DEPTH_LIMIT {
            return Err(unreadable(folder, io::Error::other("nested too deeply")));
        }
        let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let mut entries = entries.map_err(|source| unreadable(folder, source))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            let Ok(name) = entry.file_name().into_string() else {
                return Err(unreadable(&path, io::Error::other("its name is not UTF-8")));
            };
            let at = if at.is_empty() { name } else { format!("{at}/{name}") };
            let is_excluded = patterns.excludes(&at);
            // The engine is to see the Dockerfile even if it is left out, and no list of what is not there.
            if at == self.dockerfile.0 || at == ".dockerignore" || is_excluded && !patterns.may_include() {
                continue;
            }
            let metadata = fs::symlink_metadata(&path).map_err(|source| unreadable(&path, source))?;
            let mode = std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o7777;
            if metadata.is_dir() {
                if !is_excluded {
                    let mut header = header(tar::EntryType::Directory, mode, 0);
                    archive.append_data(&mut header, format!("{at}/"), io::empty()).map_err(StreamError::Write)?;
                }
                self.write_folder(archive, &path, &at, patterns, depth + 1)?;
            } else if is_excluded {
                continue;
            } else if metadata.is_symlink() {
                let target = fs::read_link(&path).map_err(|source| unreadable(&path, source))?;
                let mut header = header(tar::EntryType::Symlink, 0o777, 0);
                archive.append_link(&mut header, &at, target).map_err(StreamError::Write)?;
            } else if metadata.is_file() {
                let file = File::open(&path).map_err(|source| unreadable(&path, source))?;
                let mut file = Exactly { file, left: metadata.len(), failure: None };
                let mut header = header(tar::EntryType::Regular, mode, metadata.len());
                let appended = archive.append_data(&mut header, &at, &mut file);
                match file.failure {
                    Some(source) => return Err(unreadable(&path, source)),
                    None => appended.map_err(StreamError::Write)?,
                }
                if file.left > 0 {
                    return Err(StreamError::Changed { path });
                }
            }
            // Sockets and the like are left out, as Docker's own client does.
        }
        Ok(())
    }
}

/// Owned by root and without times, as in a layer: engines do not look at them to find out what they have built before.
fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header
}

/// As many bytes of a file as its header says, whatever becomes of it; tells a file that cannot be read from a body that
/// cannot be written.
struct Exactly {
    file: File,
    left: u64,
    failure: Option<io::Error>,
}

impl Read for Exactly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        match self.file.read(&mut buffer[..wanted]) {
            Ok(size) => {
                self.left -= size as u64;
                Ok(size)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                let kind = error.kind();
                self.failure = Some(error);
                Err(kind.into())
            }
        }
    }
}
