//! Which program and which data a run had: their SHA-256, computed beside the run.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// More data than this is not hashed: reading it would take minutes of a processor and push what the run reads out of the
/// page cache.
pub const MOST_DATA_BYTES: u64 = 4 << 30;

/// How long the end of a run waits for hashes that are not complete, which happens to runs of seconds only.
pub const HASHES_DEADLINE: Duration = Duration::from_secs(2);

/// Read at a time, and the interval between two looks at whether the hashes are still wanted.
const CHUNK: usize = 1 << 20;

/// SHA-256 of what went into a run, as 64 hexadecimal digits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hashes {
    /// The program's file, if it could be read in time.
    pub program: Option<String>,
    /// The data folder: of each file in the order of paths, its path's length and bytes, its length and its content. Absent
    /// without a data folder, above [`MOST_DATA_BYTES`], or if it could not be read in time.
    pub data: Option<String>,
}

/// The file of the running program; on Linux the very file, even if another one has been put in its place since.
pub fn program() -> Option<PathBuf> {
    if cfg!(target_os = "linux") { Some("/proc/self/exe".into()) } else { std::env::current_exe().ok() }
}

/// Hashes that are being computed in a thread of their own. Dropping it ends the thread soon.
#[derive(Debug)]
pub struct Hashing {
    program: Receiver<Option<String>>,
    data: Receiver<Option<String>>,
    unwanted: Arc<AtomicBool>,
}

impl Hashing {
    /// Begins; the thread yields to everything else on this machine where the system allows it.
    pub fn start(program: Option<PathBuf>, data: Option<PathBuf>) -> Self {
        let (send_program, of_program) = sync_channel(1);
        let (send_data, of_data) = sync_channel(1);
        let unwanted = Arc::new(AtomicBool::new(false));
        let stop = unwanted.clone();
        let work = move || {
            // On Linux a thread has a priority of its own, and the workers of a local run need the processors now. With the
            // lowest one, a busy machine would not get to it within the run.
            #[cfg(target_os = "linux")]
            let _ = rustix::process::setpriority_process(None, 5);
            // Both fail only if nobody wants the hashes any more.
            let _ = send_program.send(program.and_then(|program| file(&program, &stop).ok()));
            let _ = send_data.send(data.and_then(|data| folder(&data, &stop)));
        };
        // Without a thread the senders are dropped, and the hashes are absent.
        let _ = std::thread::Builder::new().name("fairing-hashes".into()).spawn(work);
        Self { program: of_program, data: of_data, unwanted }
    }

    /// What there is after at most `deadline`; the rest is absent.
    pub fn finish(self, deadline: Duration) -> Hashes {
        let end = std::time::Instant::now() + deadline;
        let wait = |hash: &Receiver<Option<String>>| {
            hash.recv_timeout(end.saturating_duration_since(std::time::Instant::now())).ok().flatten()
        };
        Hashes { program: wait(&self.program), data: wait(&self.data) }
    }
}

impl Drop for Hashing {
    fn drop(&mut self) {
        self.unwanted.store(true, Ordering::Relaxed);
    }
}

fn file(path: &Path, stop: &AtomicBool) -> io::Result<String> {
    let mut hash = Sha256::new();
    content(path, &mut hash, stop)?;
    Ok(hex(&hash.finalize()))
}

fn folder(folder: &Path, stop: &AtomicBool) -> Option<String> {
    let mut files = Vec::new();
    let mut bytes = 0;
    list(folder, Path::new(""), &mut files, &mut bytes, stop).ok()?;
    files.sort();
    let mut hash = Sha256::new();
    for (path, length) in &files {
        let name = path.as_os_str().as_encoded_bytes();
        hash.update(format!("{} ", name.len()));
        hash.update(name);
        hash.update(format!(" {length} "));
        // A file that changes meanwhile has no hash worth keeping.
        if content(&folder.join(path), &mut hash, stop).ok()? != *length {
            return None;
        }
    }
    Some(hex(&hash.finalize()))
}

/// Adds the files below `folder`/`inside`, links followed to files but not to folders, which could lead in a circle.
fn list(
    folder: &Path,
    inside: &Path,
    files: &mut Vec<(PathBuf, u64)>,
    bytes: &mut u64,
    stop: &AtomicBool,
) -> io::Result<()> {
    for entry in std::fs::read_dir(folder.join(inside))? {
        if stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let entry = entry?;
        let path = inside.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            list(folder, &path, files, bytes, stop)?;
            continue;
        }
        // A broken link and a link to a folder have no content of their own; nor has a pipe, which would also block.
        let Some(facts) = std::fs::metadata(folder.join(&path)).ok().filter(std::fs::Metadata::is_file) else {
            continue;
        };
        *bytes += facts.len();
        if *bytes > MOST_DATA_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        files.push((path, facts.len()));
    }
    Ok(())
}

/// Hashes a file's content and returns its length.
fn content(path: &Path, hash: &mut Sha256, stop: &AtomicBool) -> io::Result<u64> {
    let mut file = File::open(path)?;
    let mut chunk = vec![0; CHUNK];
    let mut length = 0;
    loop {
        if stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let read = match file.read(&mut chunk) {
            Ok(0) => return Ok(length),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hash.update(&chunk[..read]);
        length += read as u64;
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string can be written");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn of(data: &Path) -> Option<String> {
        Hashing::start(None, Some(data.into())).finish(PATIENCE).data
    }

    #[test]
    fn a_file_has_the_hash_that_others_give_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        std::fs::write(&path, "abc").unwrap();
        let hashes = Hashing::start(Some(path), None).finish(PATIENCE);
        // FIPS 180-2, appendix B.1.
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hashes, Hashes { program: Some(expected.into()), data: None });
    }

    #[test]
    fn this_program_has_a_hash() {
        assert_eq!(Hashing::start(program(), None).finish(PATIENCE).program.unwrap().len(), 64);
    }

    #[test]
    fn data_differs_by_content_and_by_name() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("a/deep")).unwrap();
        std::fs::write(folder.path().join("a/deep/x"), "1").unwrap();
        std::fs::write(folder.path().join("b"), "23").unwrap();
        let first = of(folder.path()).unwrap();
        assert_eq!(of(folder.path()).unwrap(), first);

        std::fs::write(folder.path().join("b"), "24").unwrap();
        assert_ne!(of(folder.path()).unwrap(), first, "another content");
        std::fs::write(folder.path().join("b"), "23").unwrap();
        std::fs::rename(folder.path().join("b"), folder.path().join("c")).unwrap();
        assert_ne!(of(folder.path()).unwrap(), first, "another name");
        std::fs::rename(folder.path().join("c"), folder.path().join("b")).unwrap();
        assert_eq!(of(folder.path()).unwrap(), first);
        assert_eq!(of(&folder.path().join("absent")), None);
    }

    #[test]
    fn links_end_nowhere_unless_at_a_file() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a"), "1").unwrap();
        let alone = of(folder.path()).unwrap();
        symlink(".", folder.path().join("circle")).unwrap();
        symlink("missing", folder.path().join("broken")).unwrap();
        assert_eq!(of(folder.path()).unwrap(), alone);
        symlink("a", folder.path().join("b")).unwrap();
        assert_ne!(of(folder.path()).unwrap(), alone);
    }

    #[test]
    fn too_much_data_has_no_hash() {
        let folder = tempfile::tempdir().unwrap();
        // It takes no room on disk.
        File::create(folder.path().join("large")).unwrap().set_len(MOST_DATA_BYTES + 1).unwrap();
        assert_eq!(of(folder.path()), None);
    }

    #[test]
    fn the_end_of_a_run_does_not_wait_for_long() {
        let folder = tempfile::tempdir().unwrap();
        File::create(folder.path().join("large")).unwrap().set_len(MOST_DATA_BYTES).unwrap();
        let begin = std::time::Instant::now();
        let hashes = Hashing::start(None, Some(folder.path().into())).finish(Duration::from_millis(10));
        assert_eq!(hashes.data, None);
        assert!(begin.elapsed() < PATIENCE / 2);
    }
}
