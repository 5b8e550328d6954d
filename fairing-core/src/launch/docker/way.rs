//! The launcher's way to the coordinator: a relay that the engine starts in the coordinator's container.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use bollard::container::LogOutput;
use bollard::errors::Error;
use bollard::exec::StartExecResults;
use bollard::models::ExecConfig;
use futures_util::{Stream, StreamExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;

use super::container::PORT;
use super::{Engine, EngineError, in_time};
use crate::launch::Way;
use crate::launch::events::lock;
use crate::relay::{Request, VARIABLE};

/// How long a relay may take until it has connected to the coordinator; more than the relay's own patience.
const RELAYED: Duration = Duration::from_secs(30);

/// Bytes passed on at once.
const CHUNK_BYTES: usize = 256 << 10;

/// Most bytes of other writers that are skipped before the relay's first word.
const MOST_SKIPPED: usize = 64 << 20;

/// Bytes of what a failed relay wrote that are kept for the error.
const KEPT_BYTES: usize = 4 << 10;

/// How long relays may fail before it is said: a replica that starts on a busy machine takes seconds until it listens.
const QUIET: Duration = Duration::from_secs(10);

/// Starts relays in the container of the coordinator.
pub(super) struct Exec {
    engine: Engine,
    container: String,
    command: Vec<String>,
    /// Since when every relay has failed.
    failing: Mutex<Option<Instant>>,
    /// What there is to be said of it, once.
    trouble: watch::Sender<Option<String>>,
}

impl Exec {
    /// `command` runs the program in the container.
    pub(super) fn new(engine: Engine, container: String, command: Vec<String>) -> Self {
        Self { engine, container, command, failing: Mutex::default(), trouble: watch::Sender::new(None) }
    }

    /// Hears once why the coordinator cannot be reached, if it cannot for long.
    pub(super) fn trouble(&self) -> watch::Receiver<Option<String>> {
        self.trouble.subscribe()
    }

    /// Whoever connects tries again and again and asks for no reason, so the last one is kept for who reads the run's output.
    fn note(&self, begun: Instant, result: &io::Result<()>) {
        let mut failing = lock(&self.failing);
        let Err(error) = result else {
            *failing = None;
            return;
        };
        if failing.get_or_insert(begun).elapsed() >= QUIET {
            let text = format!("fairing: the coordinator cannot be reached through the engine: {error}");
            self.trouble.send_if_modified(|said| {
                let is_first = said.is_none();
                said.get_or_insert(text);
                is_first
            });
        }
    }
}

impl Way for Exec {
    fn connect(&self) -> io::Result<UnixStream> {
        let nonce = nonce()?;
        let (near, far) = UnixStream::pair()?;
        far.set_nonblocking(true)?;
        let begun = Instant::now();
        let relayed = self.engine.reactor().wait(self.relay(nonce, far));
        self.note(begun, &relayed);
        relayed.map(|()| near)
    }
}

/// 128 random bits: no program writes them by chance, and none can foresee them.
fn nonce() -> io::Result<String> {
    let mut bits = [0; 16];
    let random = rustls::crypto::ring::default_provider().secure_random;
    random.fill(&mut bits).map_err(|_| io::Error::other("the system gives no random numbers"))?;
    Ok(bits.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}")))
}

impl Exec {
    /// Starts a relay and passes bytes on between it and `far` in the background.
    async fn relay(&self, nonce: String, far: UnixStream) -> io::Result<()> {
        let docker = self.engine.docker();
        let request = Request { port: PORT, nonce: nonce.clone() };
        let config = ExecConfig {
            attach_stdin: Some(true),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            cmd: Some(self.command.clone()),
            env: Some(vec![format!("{VARIABLE}={request}")]),
            ..ExecConfig::default()
        };
        let created = in_time("start a relay", docker.create_exec(&self.container, config)).await.map_err(not_yet)?;
        let started = in_time("start a relay", docker.start_exec(&created.id, None)).await.map_err(not_yet)?;
        let StartExecResults::Attached { mut output, mut input } = started else {
            return Err(io::Error::other("the engine started the relay without its streams"));
        };
        let first = tokio::time::timeout(RELAYED, skip_to(&mut output, nonce.as_bytes()));
        let first = match first.await {
            Ok(first) => first?,
            Err(_) => return Err(refused(format!("no relay within {} s", RELAYED.as_secs()))),
        };
        let (mut reader, mut writer) = tokio::net::UnixStream::from_std(far)?.into_split();
        tokio::spawn(async move {
            let mut chunk = vec![0; CHUNK_BYTES];
            while let Ok(size @ 1..) = reader.read(&mut chunk).await {
                if input.write_all(&chunk[..size]).await.and(input.flush().await).is_err() {
                    break;
                }
            }
            let _ = input.shutdown().await;
        });
        tokio::spawn(async move {
            if writer.write_all(&first).await.is_err() {
                return;
            }
            // Standard error is of no interest once the relay stands.
            while let Some(Ok(piece)) = output.next().await {
                if let LogOutput::StdOut { message } = piece
                    && writer.write_all(&message).await.is_err()
                {
                    break;
                }
            }
        });
        Ok(())
    }
}

/// Reads up to the end of `nonce` and returns what came with it.
async fn skip_to(
    output: &mut (impl Stream<Item = Result<LogOutput, Error>> + Unpin),
    nonce: &[u8],
) -> io::Result<Vec<u8>> {
    let (mut seen, mut said, mut skipped) = (Vec::new(), Vec::new(), 0);
    loop {
        match output.next().await {
            Some(Ok(LogOutput::StdOut { message })) => {
                seen.extend_from_slice(&message);
                if let Some(start) = seen.windows(nonce.len()).position(|window| window == nonce) {
                    return Ok(seen.split_off(start + nonce.len()));
                }
                // The nonce may be cut in two.
                let settled = seen.len().saturating_sub(nonce.len() - 1);
                skipped += settled;
                seen.drain(..settled);
                if skipped > MOST_SKIPPED {
                    return Err(io::Error::other("the program writes too much before `main`"));
                }
            }
            Some(Ok(LogOutput::StdErr { message })) => {
                said.extend_from_slice(&message[..message.len().min(KEPT_BYTES - said.len().min(KEPT_BYTES))]);
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(refused(super::engine::words(&error))),
            None => return Err(refused(format!("the relay ended: {}", String::from_utf8_lossy(&said).trim()))),
        }
    }
}

/// Of the kind that is tried again: the container may not run yet, or its program may not listen yet.
fn refused(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionRefused, reason)
}

fn not_yet(error: EngineError) -> io::Error {
    refused(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skipped(pieces: &[&[u8]]) -> io::Result<Vec<u8>> {
        let pieces = pieces.iter().map(|piece| Ok(LogOutput::StdOut { message: piece.to_vec().into() }));
        let mut output = futures_util::stream::iter(pieces.collect::<Vec<_>>());
        futures_util::future::FutureExt::now_or_never(skip_to(&mut output, b"nonce")).expect("nothing to wait for")
    }

    #[test]
    fn whatever_comes_before_the_nonce_is_skipped_however_it_is_cut() {
        let sent = b"printed by others\nnonnonceTLS";
        for first in 0..=sent.len() {
            for second in first..=sent.len() {
                let pieces = [&sent[..first], &sent[first..second], &sent[second..]];
                let mut rest = skipped(&pieces).unwrap();
                // What follows in later pieces is passed on by the relay itself.
                let came = pieces.iter().scan(0, |end, piece| {
                    *end += piece.len();
                    Some(*end)
                });
                let last = came.into_iter().find(|end| *end >= sent.len() - 3).unwrap();
                rest.extend_from_slice(&sent[last..]);
                assert_eq!(rest, b"TLS");
            }
        }
        assert_eq!(skipped(&[b"never comes"]).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
