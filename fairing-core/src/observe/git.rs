//! Which commit the user's program was built from.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Both questions together: `git` answers within milliseconds unless its folder is on a file system that hangs, and a
/// summary without a commit is better than a run that waits.
pub const GIT_DEADLINE: Duration = Duration::from_secs(2);

/// How often an ended `git` is looked for once its output is complete.
const POLL: Duration = Duration::from_millis(2);

/// The state of the user's repository when a run started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Full hash of `HEAD`.
    pub id: String,
    /// Whether something differed from it, untracked files included; `None` if that took too long to find out.
    pub dirty: Option<bool>,
}

/// The commit of the repository around `folder`, if there is one and `git` is installed.
///
/// Never fails, and ends within `deadline`: whatever goes wrong is `None`.
pub fn commit(folder: &Path, deadline: Duration) -> Option<Commit> {
    let end = Instant::now() + deadline;
    let id = answer(folder, &["rev-parse", "--verify", "HEAD"], end)?.trim().to_owned();
    if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let dirty = answer(folder, &["status", "--porcelain"], end).map(|changes| !changes.trim().is_empty());
    Some(Commit { id, dirty })
}

fn answer(folder: &Path, arguments: &[&str], end: Instant) -> Option<String> {
    let mut git = Command::new("git");
    // No lock and no file system monitor: a run only looks, beside whatever the user does in the repository.
    git.args(["--no-optional-locks", "-c", "core.fsmonitor=false", "-C"]).arg(folder).args(arguments);
    ask(git, end)
}

/// The standard output of a command that ends with 0 before `end`.
fn ask(mut command: Command, end: Instant) -> Option<String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().ok()?;
    let mut stdout = child.stdout.take().expect("stdout is piped");
    let (send, receive) = mpsc::sync_channel(1);
    // Reading in a thread keeps a full pipe from blocking the command and a silent command from blocking us.
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let whole = stdout.read_to_end(&mut bytes).is_ok();
        // Nobody listens any more if the deadline has passed.
        let _ = send.send(whole.then_some(bytes));
    });
    let bytes = receive.recv_timeout(end.saturating_duration_since(Instant::now())).ok().flatten();
    let succeeded = ended_well(&mut child, end);
    bytes.filter(|_| succeeded).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn ended_well(child: &mut Child, end: Instant) -> bool {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return status.success(),
            Ok(None) if Instant::now() < end => thread::sleep(POLL),
            _ => {
                // Both fail only if it has ended meanwhile.
                let _ = child.kill();
                let _ = child.wait();
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn git(folder: &Path, arguments: &[&str]) {
        let mut git = Command::new("git");
        git.arg("-C").arg(folder).args(["-c", "user.name=a", "-c", "user.email=a@example.org"]).args(arguments);
        assert!(git.stdout(Stdio::null()).status().unwrap().success(), "git {arguments:?}");
    }

    #[test]
    fn a_commit_is_named_with_what_differs() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(commit(folder.path(), GIT_DEADLINE), None, "no repository");
        git(folder.path(), &["init", "--quiet"]);
        assert_eq!(commit(folder.path(), GIT_DEADLINE), None, "no commit");
        git(folder.path(), &["commit", "--quiet", "--allow-empty", "-m", "first"]);
        let clean = commit(folder.path(), GIT_DEADLINE).unwrap();
        assert_eq!((clean.id.len(), clean.dirty), (40, Some(false)));
        std::fs::write(folder.path().join("new"), "x").unwrap();
        assert_eq!(commit(folder.path(), GIT_DEADLINE), Some(Commit { dirty: Some(true), ..clean }));
    }

    #[test]
    fn a_command_that_hangs_ends_at_the_deadline() {
        let begin = Instant::now();
        let mut hanging = Command::new("sleep");
        hanging.arg("60");
        assert_eq!(ask(hanging, begin + Duration::from_millis(50)), None);
        assert!(begin.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_missing_command_is_no_failure() {
        assert_eq!(ask(Command::new("no-such-command"), Instant::now() + GIT_DEADLINE), None);
    }
}
