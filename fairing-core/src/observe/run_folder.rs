//! Where a run's files lie.
//!
//! ```text
//! <runs>/latest                              link to the newest run
//! <runs>/<name>-<yyyymmdd>-<hhmmss>-<xxxx>/
//!   metrics.jsonl                            grows while the run goes on
//!   tensorboard/<run or worker>/events.…     grow while the run goes on
//!   model.<extension>                        whole or absent
//!   model.safetensors                        whole or absent
//!   report.html                              whole or absent
//!   summary.json                             whole or absent; written last
//!   logs/<role>-<rank>.log                   what each replica wrote
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::report::Summary;
use crate::topology::Replica;

/// A name that is taken gets another suffix; a free one is found at once unless something is very wrong.
const SUFFIXES_TRIED: usize = 16;

/// Longest part of a run's name that comes from the type. The name of a pod has 63 characters, of which the run's has 44, with a
/// second suffix too (18 + 21 + 5), and 19 are for what a cluster puts behind it: `-worker-0-999-abcde`.
const NAME_LENGTH: usize = 18;

/// The file name extension of the model in the form that programs in other languages read.
pub(super) const SAFETENSORS: &str = "safetensors";

/// Failure to keep something of a run. Returned by [`RunFolder`] and [`LogFiles`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunFolderError {
    /// The folder cannot be created.
    #[error("cannot create run folder `{}` (set FAIRING_RUNS to a folder that can be written)", path.display())]
    Create {
        /// The folder.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A file in the folder cannot be written. What stood there before, or nothing, still stands there.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A replica's log cannot be written.
    #[error("cannot write the log `{}`", path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

/// The name of a run of `job` that starts `now`: other runs have others, but for one in 65536 of the same second.
///
/// A DNS label that starts with a letter, whatever `job` is: one name for the run's folder and for what it has on a cluster.
pub fn run_name(job: &str, now: SystemTime) -> String {
    format!("{}-{}-{}", file_name(job), stamp(now), suffix())
}

/// The folder of one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// Creates a new folder called `name`, or a little longer if that is taken, below `runs`, which is created too if need
    /// be, and lets `runs/latest` point to it.
    ///
    /// The link is a convenience: where it cannot be made (no links on this file system, something else of that name)
    /// it is left out.
    ///
    /// # Errors
    ///
    /// [`RunFolderError::Create`].
    pub fn create(runs: &Path, name: &str) -> Result<Self, RunFolderError> {
        let failed = |path: &Path, source| RunFolderError::Create { path: path.to_owned(), source };
        fs::create_dir_all(runs).map_err(|source| failed(runs, source))?;
        // Absolute, so that a program that changes its folder later does not scatter its files.
        let runs = &std::path::absolute(runs).map_err(|source| failed(runs, source))?;
        let mut folder = name.to_owned();
        let mut tried = 0;
        loop {
            let path = runs.join(&folder);
            match fs::create_dir(&path) {
                Ok(()) => {
                    let logs = path.join("logs");
                    fs::create_dir(&logs).map_err(|source| failed(&logs, source))?;
                    // See above: a run does not fail for want of a link.
                    let _ = link_latest(runs, &folder);
                    return Ok(Self { path });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && tried < SUFFIXES_TRIED => {
                    tried += 1;
                    folder = format!("{name}-{}", suffix());
                }
                Err(source) => return Err(failed(&path, source)),
            }
        }
    }

    /// The folder itself, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metrics, one JSON object per line.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// The closing [`Summary`].
    pub fn summary(&self) -> PathBuf {
        self.path.join("summary.json")
    }

    /// The page that shows the run.
    pub fn report(&self) -> PathBuf {
        self.path.join("report.html")
    }

    /// The folder of the files for TensorBoard.
    pub fn tensorboard(&self) -> PathBuf {
        self.path.join("tensorboard")
    }

    /// The trained model; `extension` without a dot.
    pub fn model(&self, extension: &str) -> PathBuf {
        self.path.join(format!("model.{extension}"))
    }

    /// What one replica wrote to its two streams.
    pub fn log(&self, replica: Replica) -> PathBuf {
        self.path.join("logs").join(format!("{}.log", replica.file_name()))
    }

    /// Writes the summary.
    ///
    /// # Errors
    ///
    /// [`RunFolderError::Write`].
    pub fn write_summary(&self, summary: &Summary) -> Result<(), RunFolderError> {
        let mut text = serde_json::to_vec_pretty(summary).expect("a summary has string keys only");
        text.push(b'\n');
        write_whole(&self.summary(), &text)
    }

    /// Writes the page that shows the run.
    ///
    /// # Errors
    ///
    /// [`RunFolderError::Write`].
    pub fn write_report(&self, page: &str) -> Result<(), RunFolderError> {
        write_whole(&self.report(), page.as_bytes())
    }

    /// Writes the model as `model.safetensors` and returns its path.
    ///
    /// # Errors
    ///
    /// [`RunFolderError::Write`].
    pub fn write_safetensors(&self, bytes: &[u8]) -> Result<PathBuf, RunFolderError> {
        self.write_model(SAFETENSORS, bytes)
    }

    /// Writes the model and returns its path.
    ///
    /// # Errors
    ///
    /// [`RunFolderError::Write`].
    pub fn write_model(&self, extension: &str, bytes: &[u8]) -> Result<PathBuf, RunFolderError> {
        let path = self.model(extension);
        write_whole(&path, bytes)?;
        Ok(path)
    }
}

/// Writes a file so that at every moment, a crash included, the old content or the whole new one is there.
///
/// # Errors
///
/// [`RunFolderError::Write`]; nothing new is left behind then.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), RunFolderError> {
    let failed = |source| RunFolderError::Write { path: path.to_owned(), source };
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The rights of any other file that the user creates; a temporary file's default is the owner alone.
    let rights = Permissions::from_mode(0o666);
    let mut file = tempfile::Builder::new().prefix(".part-").permissions(rights).tempfile_in(folder).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    // The new name is on disk only with its folder.
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)
}

fn link_latest(runs: &Path, folder: &str) -> io::Result<()> {
    let fresh = runs.join(format!(".latest-{:016x}", random()));
    symlink(folder, &fresh)?;
    // A rename replaces the old link in one step, so that `latest` always points somewhere.
    fs::rename(&fresh, runs.join("latest")).inspect_err(|_| {
        // The rename's own error is the one to report.
        let _ = fs::remove_file(&fresh);
    })
}

/// `FashionMnist` as `fashion-mnist`: lower case letters, digits and single `-`, a letter first and no `-` last.
fn file_name(name: &str) -> String {
    let mut words = String::new();
    let mut before = None;
    for (index, c) in name.char_indices() {
        let next = name[index..].chars().nth(1);
        // A word begins with a capital behind a small letter, or in front of one: `HTTPServer` is two words.
        let begins = c.is_ascii_uppercase()
            && before.is_some_and(|before: char| {
                !before.is_ascii_uppercase() || next.is_some_and(|next| next.is_ascii_lowercase())
            });
        if (begins || !c.is_ascii_alphanumeric()) && !words.is_empty() && !words.ends_with('-') {
            words.push('-');
        }
        if c.is_ascii_alphabetic() || (c.is_ascii_digit() && !words.is_empty()) {
            words.push(c.to_ascii_lowercase());
        }
        before = Some(c);
    }
    words.truncate(NAME_LENGTH);
    let words = words.trim_end_matches('-');
    if words.is_empty() { "run".to_owned() } else { words.to_owned() }
}

/// `20260102-030405`, UTC.
fn stamp(now: SystemTime) -> String {
    let text = humantime::format_rfc3339_seconds(now).to_string();
    text.chars().filter(|c| c.is_ascii_digit() || *c == 'T').map(|c| if c == 'T' { '-' } else { c }).collect()
}

fn suffix() -> String {
    format!("{:04x}", random() & 0xffff)
}

fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// The replicas' logs: every line as it was written, both streams of a replica in one file.
#[derive(Debug)]
pub struct LogFiles {
    folder: RunFolder,
    /// One open file per replica that has written something.
    open: BTreeMap<Replica, File>,
}

impl LogFiles {
    /// Logs of a run; the files appear with their first lines.
    pub fn new(folder: &RunFolder) -> Self {
        Self { folder: folder.clone(), open: BTreeMap::new() }
    }

    /// Adds a line, given without its end. It is with the operating system when this returns, so that it survives
    /// whatever happens to this process.
    ///
    /// # Errors
    ///
    /// [`RunFolderError::Log`].
    pub fn append(&mut self, replica: Replica, text: &str) -> Result<(), RunFolderError> {
        let path = self.folder.log(replica);
        self.try_append(replica, &path, text).map_err(|source| RunFolderError::Log { path, source })
    }

    fn try_append(&mut self, replica: Replica, path: &Path, text: &str) -> io::Result<()> {
        use std::collections::btree_map::Entry;
        let file = match self.open.entry(replica) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(closed) => closed.insert(File::options().create(true).append(true).open(path)?),
        };
        file.write_all(format!("{text}\n").as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_767_323_045)
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn folder_is_named_after_run_and_time() {
        let runs = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(&runs.path().join("a/b"), &run_name("../Fashion Mnist", now())).unwrap();
        let name = folder.path().file_name().unwrap().to_str().unwrap();
        let (stem, suffix) = name.rsplit_once('-').unwrap();
        assert_eq!(stem, "fashion-mnist-20260102-030405");
        assert!(suffix.len() == 4 && suffix.bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert_eq!(names(folder.path()), ["logs"]);
        assert_eq!(folder.log(Replica::ps(1)), folder.path().join("logs/ps-1.log"));
        assert_eq!(folder.model("bpk"), folder.path().join("model.bpk"));
    }

    #[test]
    fn name_that_is_taken_gets_another_suffix() {
        let runs = tempfile::tempdir().unwrap();
        let name = run_name("a", now());
        assert_eq!(RunFolder::create(runs.path(), &name).unwrap().path(), runs.path().join(&name));
        let second = RunFolder::create(runs.path(), &name).unwrap();
        let second = second.path().file_name().unwrap().to_str().unwrap();
        assert!(second.len() == name.len() + 5 && second.starts_with(&name), "{second}");
    }

    #[test]
    fn a_type_gives_its_runs_a_name() {
        for (job, expected) in [
            ("FashionMnist", "fashion-mnist"),
            ("Line", "line"),
            ("MyHTTPServer2", "my-http-server2"),
            ("snake_case_job", "snake-case-job"),
            ("_Private", "private"),
            ("_9Lives", "lives"),
            ("Größe", "gr-e"),
            ("模型", "run"),
            ("", "run"),
            ("ANameThatIsLongerThanItMayBe", "a-name-that-is-lon"),
            ("ANameThatIsLongBy", "a-name-that-is-lon"),
            ("SeventeenLettersXx", "seventeen-letters"),
        ] {
            assert_eq!(file_name(job), expected, "{job}");
        }
    }

    proptest::proptest! {
        #[test]
        fn every_run_is_called_by_a_dns_label(job in "\\PC{0,120}|[A-Za-z_0-9]{0,120}") {
            let name = run_name(&job, now());
            assert!(name.len() <= 39 && name.starts_with(|c: char| c.is_ascii_lowercase()), "{name}");
            assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'), "{name}");
            assert!(!name.contains("--"), "{name}");
        }
    }

    #[test]
    fn latest_points_to_the_newest() {
        let runs = tempfile::tempdir().unwrap();
        for _ in 0..3 {
            let folder = RunFolder::create(runs.path(), &run_name("a", now())).unwrap();
            let latest = fs::canonicalize(runs.path().join("latest")).unwrap();
            assert_eq!(latest, fs::canonicalize(folder.path()).unwrap());
        }
        assert_eq!(names(runs.path()).len(), 4);
    }

    #[test]
    fn run_goes_on_without_the_link() {
        let runs = tempfile::tempdir().unwrap();
        fs::create_dir_all(runs.path().join("latest/something")).unwrap();
        let folder = RunFolder::create(runs.path(), &run_name("a", now())).unwrap();
        assert_eq!(names(runs.path()), [folder.path().file_name().unwrap().to_str().unwrap(), "latest"]);
    }

    #[test]
    fn unusable_place_is_named_with_reason_and_remedy() {
        let base = tempfile::tempdir().unwrap();
        let file = base.path().join("file");
        fs::write(&file, "").unwrap();
        let error = RunFolder::create(&file.join("runs"), &run_name("a", now())).unwrap_err();
        let shown = format!("{:#}", anyhow::Error::from(error)).replace(base.path().to_str().unwrap(), "BASE");
        assert_eq!(
            shown,
            "cannot create run folder `BASE/file/runs` (set FAIRING_RUNS to a folder that can be written): \
             Not a directory (os error 20)"
        );
    }

    #[test]
    fn files_are_whole_or_absent() {
        let runs = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(runs.path(), &run_name("a", now())).unwrap();
        let path = folder.write_model("bpk", b"first").unwrap();
        folder.write_model("bpk", b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(names(folder.path()), ["logs", "model.bpk"], "no temporary file stays");
        let other = folder.path().join("other");
        fs::write(&other, "").unwrap();
        let rights = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(rights(&path), rights(&other));

        // A folder in the place of the file makes the last step fail.
        let blocked = folder.path().join("blocked");
        fs::create_dir_all(blocked.join("full")).unwrap();
        assert!(matches!(write_whole(&blocked, b"x"), Err(RunFolderError::Write { .. })));
        assert_eq!(names(folder.path()), ["blocked", "logs", "model.bpk", "other"]);
    }

    #[test]
    fn logs_are_kept_apart() {
        let runs = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(runs.path(), &run_name("a", now())).unwrap();
        let mut logs = LogFiles::new(&folder);
        for (replica, text) in [(Replica::worker(0), "a\tb"), (Replica::ps(0), "c"), (Replica::worker(0), "d\u{1b}[1m")]
        {
            logs.append(replica, text).unwrap();
        }
        assert_eq!(names(&folder.path().join("logs")), ["ps-0.log", "worker-0.log"]);
        assert_eq!(fs::read_to_string(folder.log(Replica::worker(0))).unwrap(), "a\tb\nd\u{1b}[1m\n");
        fs::create_dir(folder.log(Replica::worker(1))).unwrap();
        assert!(matches!(logs.append(Replica::worker(1), "x"), Err(RunFolderError::Log { .. })));
    }
}
