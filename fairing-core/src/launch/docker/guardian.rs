//! Cleans up after a launcher that died without a chance to do so.
//!
//! Containers and networks outlive whoever made them, so the launcher starts this program once more as a guardian, before
//! it creates anything. The guardian waits, at no cost, for the end of its standard input. If the launcher has said
//! goodbye on it, there is nothing to do; if not, the launcher is dead, and the guardian removes what is left of the run.

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

/// Makes a process a guardian, of the run that it names.
const VARIABLE: &str = "FAIRING_PLACEMENT_GUARDIAN";

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
        let child = Command::new(running_executable())
            .env(VARIABLE, run)
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

/// Runs before `main`, in every process of a program that uses fairing; touches nothing unless it is to be a guardian.
///
/// The `unsafe` is the promise to use nothing that needs `main` to have begun: of the standard library only what works
/// without its runtime's start, namely environment, clock, files, sockets and threads.
#[ctor::ctor(unsafe)]
fn attach() {
    let Some(run) = ProcessEnv.get(VARIABLE) else { return };
    ignore_closed_pipes();
    let mut said = Vec::new();
    let heard = io::stdin().lock().read_to_end(&mut said);
    if heard.is_ok() && said == GOODBYE || clean_up(&run) {
        ExitCode::Success.exit()
    }
    ExitCode::Protocol.exit()
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
