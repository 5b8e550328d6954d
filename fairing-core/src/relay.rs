//! A way into a container for the launcher: this program, started once more beside the coordinator, passes bytes on.
//!
//! The launcher may not reach a container's address (a remote engine, Docker Desktop, a rootless one), but every engine can
//! start a second program in a container and be its standard input and output. That second program is the one that the
//! image holds anyway. It becomes a relay before `main`, connects to the coordinator's port, and passes bytes both ways,
//! encrypted from the launcher to the coordinator. Constructors of other libraries may have written something by then, so
//! the relay's first word is a nonce of the launcher's, which skips everything before it. What the program would write
//! later goes nowhere: the relay keeps the stream for itself.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use signal_hook::consts::SIGPIPE;

use crate::config::{Env, ProcessEnv};
use crate::exit::ExitCode;

/// Makes a process a relay.
pub(crate) const VARIABLE: &str = "FAIRING_PLACEMENT_RELAY";

/// Lowest descriptor that the two streams are moved to.
const LOWEST_DESCRIPTOR: i32 = 10;

/// How long the coordinator may take to listen, from the relay's start. It begins when its replica reaches `launch()`,
/// which has a deadline of its own; this one only bounds the time that one relay is kept.
const PATIENCE: Duration = Duration::from_secs(20);

/// Pause between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(5);

/// Bytes passed on at once.
const CHUNK_BYTES: usize = 256 << 10;

/// What a relay is asked to do, as it stands in [`VARIABLE`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    /// Port of the coordinator in the container.
    pub(crate) port: u16,
    /// What is written before the first byte that is passed on: nothing that a program writes by chance.
    pub(crate) nonce: String,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.port, self.nonce)
    }
}

impl FromStr for Request {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once(' ').and_then(|(port, nonce)| Some((port.parse().ok()?, nonce)));
        let (port, nonce) = parts.ok_or_else(|| format!("`{text}` is no port and nonce"))?;
        Ok(Self { port, nonce: nonce.to_owned() })
    }
}

/// Whether this process was started as a relay.
pub(crate) fn is_asked() -> bool {
    ProcessEnv.get(VARIABLE).is_some()
}

/// Runs before `main`, in every process of a program that uses fairing; touches nothing unless it is to be a relay.
///
/// The `unsafe` is the promise to use nothing that needs `main` to have begun: of the standard library only what works
/// without its runtime's start, namely environment, clock, files, sockets and threads.
#[ctor::ctor(unsafe)]
fn attach() {
    let Some(request) = ProcessEnv.get(VARIABLE) else { return };
    ignore_closed_pipes();
    match request.parse().map_err(io::Error::other).and_then(|request| run(&request)) {
        Ok(()) => ExitCode::Success.exit(),
        Err(error) => {
            // Nobody is left to tell if standard error is closed.
            let _ = writeln!(io::stderr(), "fairing: the relay failed: {error}");
            ExitCode::Protocol.exit()
        }
    }
}

/// Makes writing to somebody who has gone an error, as the standard library does, but only right before `main`; until then it
/// ends the process.
pub(crate) fn ignore_closed_pipes() {
    // A handler that does nothing of interest is as good as ignoring. It can only fail for signals that have no handler.
    let _ = signal_hook::flag::register(SIGPIPE, Arc::default());
}

fn run(request: &Request) -> io::Result<()> {
    let (input, output) = take_streams()?;
    let (mut input, mut output) = (std::fs::File::from(input), std::fs::File::from(output));
    let mut socket = connect(request.port)?;
    socket.set_nodelay(true)?;
    output.write_all(request.nonce.as_bytes())?;
    let mut far = socket.try_clone()?;
    thread::Builder::new().name("fairing-relay".into()).spawn(move || {
        // Either way the launcher is gone or done; the coordinator sees the end of the stream.
        let _ = pass(&mut input, &mut far);
        let _ = far.shutdown(Shutdown::Write);
    })?;
    pass(&mut socket, &mut output)
}

/// Moves standard input and output out of the program's sight; what it writes from now on goes nowhere.
fn take_streams() -> io::Result<(OwnedFd, OwnedFd)> {
    let input = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), LOWEST_DESCRIPTOR)?;
    let output = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), LOWEST_DESCRIPTOR)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok((input, output))
}

fn connect(port: u16) -> io::Result<TcpStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && Instant::now() < deadline => {
                thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}

/// Passes bytes on until the end of the stream.
fn pass(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(size) => to.write_all(&chunk[..size])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_its_variable() {
        let request = Request { port: 7070, nonce: "a1b2".into() };
        assert_eq!(request.to_string().parse(), Ok(request));
        for wrong in ["", "7070", "x a", "70700 a"] {
            assert!(wrong.parse::<Request>().is_err(), "{wrong}");
        }
    }
}
