//! Requests with a long body, which a thread writes while the engine reads it, and with a long answer.
//!
//! The body is never held whole, and a failure of either side ends the other one.

use std::io::{self, Write};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Context;
use std::thread;
use std::time::Duration;

use bollard::errors::Error;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream, Stream, StreamExt as _};
use tokio::sync::mpsc;

use super::engine::{Engine, EngineError, refused};

/// Bytes passed on at once.
const CHUNK_BYTES: usize = 256 << 10;

/// Chunks that may be under way beside the ones that are written and sent, so that neither side waits for the other.
const CHUNKS: usize = 2;

/// The body of a request, as the client library takes it.
pub(super) type Body = BoxStream<'static, io::Result<Bytes>>;

/// How an exchange failed.
pub(super) enum ExchangeError<E> {
    /// The body could not be made.
    Body(E),
    /// The engine did not do it.
    Engine(EngineError),
}

/// Sends what `write` writes as the body of `request`, and hands every piece of the answer to `hear`.
///
/// `sent` hears how many bytes have been passed on so far. It is a failure if nothing moves in either direction for as long
/// as `silence`.
pub(super) fn exchange<T, E, S>(
    engine: &Engine,
    action: &str,
    silence: Duration,
    write: impl FnOnce(&mut dyn Write) -> Result<(), E> + Send,
    sent: &(dyn Fn(u64) + Sync),
    request: impl FnOnce(Body) -> S,
    hear: &mut (dyn FnMut(T) + Send),
) -> Result<(), ExchangeError<E>>
where
    E: Send,
    S: Stream<Item = Result<T, Error>> + Send,
{
    let (sender, receiver) = mpsc::channel(CHUNKS);
    // Taken away at the end, so that the writer gets to know whatever the client library still holds of the body.
    let receiver = Arc::new(Mutex::new(Some(receiver)));
    let lent = receiver.clone();
    let body = move |context: &mut Context<'_>| match &mut *lent.lock().unwrap_or_else(PoisonError::into_inner) {
        Some(receiver) => receiver.poll_recv(context),
        None => None.into(),
    };
    let answer = request(stream::poll_fn(body).boxed());
    let sent_bytes = AtomicU64::new(0);
    thread::scope(|scope| {
        let writing = scope.spawn(|| {
            let chunk = Vec::with_capacity(CHUNK_BYTES);
            let mut writer = Writer { sender, chunk, sent_bytes: &sent_bytes, sent, is_closed: false };
            let written = write(&mut writer);
            if written.is_ok() {
                let _ = writer.flush();
            } else {
                // A body that just ended would look whole.
                let _ = writer.sender.blocking_send(Err(io::Error::other("the body could not be made")));
            }
            (written, writer.is_closed)
        });
        let answered = engine.reactor().wait(listen(action, silence, &sent_bytes, answer, hear));
        drop(receiver.lock().unwrap_or_else(PoisonError::into_inner).take());
        match writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)) {
            (Err(error), false) => Err(ExchangeError::Body(error)),
            // An engine need not read what comes after the end that it saw.
            _ => answered.map_err(ExchangeError::Engine),
        }
    })
}

/// As [`exchange`], without a body.
pub(super) fn ask<T>(
    engine: &Engine,
    action: &str,
    silence: Duration,
    answer: impl Stream<Item = Result<T, Error>> + Send,
    hear: &mut (dyn FnMut(T) + Send),
) -> Result<(), EngineError> {
    engine.reactor().wait(listen(action, silence, &AtomicU64::new(0), answer, hear))
}

async fn listen<T>(
    action: &str,
    silence: Duration,
    sent_bytes: &AtomicU64,
    answer: impl Stream<Item = Result<T, Error>> + Send,
    hear: &mut (dyn FnMut(T) + Send),
) -> Result<(), EngineError> {
    let mut answer = pin!(answer);
    let mut seen = 0;
    loop {
        match tokio::time::timeout(silence, answer.next()).await {
            Ok(Some(Ok(piece))) => hear(piece),
            Ok(Some(Err(error))) => return Err(refused(action, &error)),
            Ok(None) => return Ok(()),
            Err(_) => {
                let now = sent_bytes.load(Ordering::Relaxed);
                if now == seen {
                    let reason = format!("nothing moved for {} s", silence.as_secs());
                    return Err(EngineError::Refused { action: action.to_owned(), reason, status: None });
                }
                seen = now;
            }
        }
    }
}

/// Passes bytes on in large pieces.
struct Writer<'a> {
    sender: mpsc::Sender<io::Result<Bytes>>,
    chunk: Vec<u8>,
    sent_bytes: &'a AtomicU64,
    sent: &'a (dyn Fn(u64) + Sync),
    /// Whether nobody takes the bytes any more.
    is_closed: bool,
}

impl Write for Writer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.chunk.len() == CHUNK_BYTES {
            self.flush()?;
        }
        let size = bytes.len().min(CHUNK_BYTES - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..size]);
        Ok(size)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::replace(&mut self.chunk, Vec::with_capacity(CHUNK_BYTES));
        let size = chunk.len() as u64;
        if self.sender.blocking_send(Ok(chunk.into())).is_err() {
            self.is_closed = true;
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        (self.sent)(self.sent_bytes.fetch_add(size, Ordering::Relaxed) + size);
        Ok(())
    }
}
