//! Cleans up after a launcher that died without a chance to do so.
//!
//! Containers and networks outlive whoever made them, so the launcher starts this program once more as a guardian, before
//! it creates anything. The guardian waits, at no cost, for the end of its standard input. If the launcher has said
//! goodbye on it, there is nothing to do; if not, the launcher is dead, and the guardian removes what is left of the run.
//!
//! A build has one too. What it leaves are its steps, which no label of ours marks; the launcher tells the guardian of each.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{Engine, remove};
use crate::config::{Env, ProcessEnv};
use crate::exit::ExitCode;
use crate::launch::running_executable;
use crate::relay::ignore_closed_pipes;

/// Makes a process a guardian, of the run or the build that it names.
const VARIABLE: &str = "FAIRING_PLACEMENT_GUARDIAN";

/// Stands before the name of a program whose image is built; no run's name has a blank in it.
const BUILD: &str = "build ";

/// What the launcher says when it has cleaned up itself.
const GOODBYE: &[u8] = b"goodbye";

/// How long a guardian tries; an engine that is restarted takes seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// Time between two looks.
const PAUSE: Duration = Duration::from_secs(1);

/// How long nothing must have been found. An engine goes on with what it was asked for when whoever asked is dead or does not
/// wait any longer, and a busy one takes tens of seconds for it.
const CLEAN: Duration = Duration::from_secs(30);

/// The launcher's end of a guardian. Dropping it without [`Guardian::dismiss`] is the launcher's death.
pub(super) struct Guardian(Child);

impl Guardian {
    /// Starts the guardian of `run` at `engine`.
    pub(super) fn start(run: &str, engine: &Engine) -> io::Result<Self> {
        Self::of(run, engine)
    }

    fn of(charge: &str, engine: &Engine) -> io::Result<Self> {
        let child = Command::new(running_executable())
            .env(VARIABLE, charge)
            .env("DOCKER_HOST", engine.address())
            // Ctrl-C is for the launcher.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self(child))
    }

    /// There is nothing left to be guarded.
    pub(super) fn dismiss(mut self) {
        let told = self.0.stdin.take().map(|mut stdin| stdin.write_all(GOODBYE));
        if matches!(told, Some(Ok(()))) {
            // It ends at once, and should not stay as a zombie.
            let _ = self.0.wait();
        }
    }
}

/// The launcher's end of the guardian of a build. Dropping it is the end of the build, however it went: only this process's
/// death is none.
pub(super) struct BuildGuardian(Option<Guardian>);

impl BuildGuardian {
    /// Starts the guardian of a build of `program`'s image at `engine`. Without one, which only a machine lacks that is short
    /// of something, a build that is killed leaves a step without a name.
    pub(super) fn start(program: &str, engine: &Engine) -> Self {
        Self(Guardian::of(&format!("{BUILD}{program}"), engine).ok())
    }

    /// The build has come to `step`, an image.
    pub(super) fn hear(&mut self, step: &str) {
        if let Some(stdin) = self.0.as_mut().and_then(|guardian| guardian.0.stdin.as_mut()) {
            // One that has gone is missed only if this process dies as well.
            let _ = writeln!(stdin, "{step}");
        }
    }
}

impl Drop for BuildGuardian {
    fn drop(&mut self) {
        if let Some(guardian) = self.0.take() {
            guardian.dismiss();
        }
    }
}

/// Runs before `main`, in every process of a program that uses fairing; touches nothing unless it is to be a guardian.
///
/// The `unsafe` is the promise to use nothing that needs `main` to have begun: of the standard library only what works
/// without its runtime's start, namely environment, clock, files, sockets and threads.
#[ctor::ctor(unsafe)]
fn attach() {
    let Some(charge) = ProcessEnv.get(VARIABLE) else { return };
    ignore_closed_pipes();
    let mut said = Vec::new();
    let heard = io::stdin().lock().read_to_end(&mut said);
    let is_dismissed = heard.is_ok() && said.ends_with(GOODBYE);
    let is_done = is_dismissed
        || match charge.strip_prefix(BUILD) {
            None => clean_up(&charge),
            Some(program) => name_last_step(program, &String::from_utf8_lossy(&said)),
        };
    if is_done { ExitCode::Success.exit() } else { ExitCode::Protocol.exit() }
}

/// Gives the last of the `steps` of a build that nobody waits for any more the name by which the next build, or `sweep`,
/// finds it.
fn name_last_step(program: &str, steps: &str) -> bool {
    let Some(step) = steps.lines().last() else { return true };
    let deadline = Instant::now() + PATIENCE;
    let mut until = None;
    while Instant::now() < deadline {
        // The engine stops when whoever asked has gone, but may finish what it is at.
        thread::sleep(PAUSE);
        if let Ok(engine) = Engine::connect(&ProcessEnv) {
            engine.keep_unfinished(program, Some(&engine.last_step_after(step)));
            if *until.get_or_insert_with(|| Instant::now() + CLEAN) <= Instant::now() {
                return true;
            }
        }
    }
    false
}

/// Removes what there is of `run` until nothing has been found for [`CLEAN`].
fn clean_up(run: &str) -> bool {
    let deadline = Instant::now() + PATIENCE;
    let mut clean_since = None;
    while Instant::now() < deadline {
        let removed = Engine::connect(&ProcessEnv)
            .and_then(|engine| engine.reactor().wait(async { remove(engine.docker(), run).await }));
        match removed {
            Ok(removed) if removed.is_empty() => {
                if clean_since.get_or_insert_with(Instant::now).elapsed() >= CLEAN {
                    return true;
                }
            }
            _ => clean_since = None,
        }
        thread::sleep(PAUSE);
    }
    false
}
