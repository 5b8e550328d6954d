//! The bytes of a blob on their way: read in pieces, hashed in passing, and never held whole.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream;
use reqwest::Response;
use sha2::Digest as _;
use tokio::fs::File;
use tokio::io::AsyncReadExt;

use super::error::RequestError;
use super::patience::Patience;
use super::session::{Feed, Session};
use crate::image::{Blob, Descriptor, Digest, Source};

/// What is read and handed on at once: several uploads side by side hold less than a megabyte.
const PIECE_BYTES: usize = 128 * 1024;

/// Counts what an upload has taken, for the view and for the watch over it.
pub(super) struct Pulse {
    size: u64,
    /// Of the current attempt.
    taken: AtomicU64,
    /// Rises with every piece of every attempt.
    pieces: AtomicU64,
    whole: AtomicBool,
    fault: Mutex<Option<Fault>>,
    counted: Box<dyn Fn(Count) + Send + Sync>,
}

/// What an upload tells about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Count {
    /// So many bytes were handed over.
    Taken(u64),
    /// So many bytes will be sent again.
    Lost(u64),
}

/// Why the bytes did not come.
#[derive(Debug)]
pub(super) enum Fault {
    /// The file cannot be read.
    Read { path: PathBuf, source: io::Error },
    /// What came has another digest or length than the image says.
    Changed { path: Option<PathBuf> },
    /// The registry that they come from failed.
    Origin(RequestError),
}

impl Pulse {
    pub(super) fn new(size: u64, counted: Box<dyn Fn(Count) + Send + Sync>) -> Arc<Self> {
        Arc::new(Self {
            size,
            taken: AtomicU64::new(0),
            pieces: AtomicU64::new(0),
            whole: AtomicBool::new(false),
            fault: Mutex::default(),
            counted,
        })
    }

    /// A new attempt starts at the first byte.
    pub(super) fn begin(&self) {
        let lost = self.taken.swap(0, Ordering::Relaxed);
        self.whole.store(false, Ordering::Relaxed);
        if lost > 0 {
            (self.counted)(Count::Lost(lost));
        }
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Waits until nothing has moved for too long; gives how long that was.
    pub(super) async fn stands_still(&self, patience: &Patience) -> Duration {
        loop {
            let seen = self.pieces.load(Ordering::Relaxed);
            let wait = if self.whole.load(Ordering::Relaxed) { patience.commit } else { patience.stall };
            tokio::time::sleep(wait).await;
            if self.pieces.load(Ordering::Relaxed) == seen {
                return wait;
            }
        }
    }

    /// Why the bytes did not come, if that is what an upload failed for.
    pub(super) fn fault(&self) -> Option<Fault> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn take(&self, bytes: usize) {
        let taken = self.taken.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.whole.store(taken == self.size, Ordering::Relaxed);
        self.pieces.fetch_add(1, Ordering::Relaxed);
        (self.counted)(Count::Taken(bytes as u64));
    }

    fn fail(&self, fault: Fault) -> io::Error {
        let mut kept = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        *kept = Some(fault);
        io::Error::other("the bytes to send did not come")
    }
}

/// Opens the bytes of `blob`; those of a base come from `base`.
///
/// The last piece is held back until the digest of all is right: a registry never gets a blob whole that is another one.
pub(super) fn feed(blob: &Blob, base: Option<&Arc<Session>>, pulse: &Arc<Pulse>) -> Feed {
    let pieces = match (&blob.source, base) {
        (Source::Memory(bytes), _) => Pieces::Memory(Bytes::copy_from_slice(bytes)),
        (Source::File(path), _) => Pieces::Closed(path.clone()),
        (Source::Base, Some(base)) => Pieces::Unasked(base.clone()),
        (Source::Base, None) => unreachable!("a push checks that it knows the base of its layers"),
    };
    let path = match &blob.source {
        Source::File(path) => Some(path.clone()),
        _ => None,
    };
    let left = blob.descriptor.size;
    let descriptor = blob.descriptor.clone();
    let spare = VecDeque::new();
    let flow = Flow { pieces, path, descriptor, left, sha256: sha2::Sha256::new(), spare, pulse: pulse.clone() };
    stream::unfold(Some(flow), |flow| async move {
        let mut flow = flow?;
        match flow.next().await {
            Ok(Some(piece)) => {
                flow.pulse.take(piece.len());
                flow.keep(&piece);
                Some((Ok(piece), Some(flow)))
            }
            Ok(None) => None,
            Err(fault) => Some((Err(flow.pulse.fail(fault)), None)),
        }
    })
    .boxed()
}

/// A blob that is being read.
struct Flow {
    pieces: Pieces,
    path: Option<PathBuf>,
    descriptor: Descriptor,
    left: u64,
    sha256: sha2::Sha256,
    /// Pieces that may still be on their way, the oldest first. Their memory is filled again: an allocator would keep what
    /// other threads give back for a while, and of a fast upload that is most of the blob.
    spare: VecDeque<Bytes>,
    pulse: Arc<Pulse>,
}

/// Where the next piece comes from.
enum Pieces {
    Memory(Bytes),
    Closed(PathBuf),
    Open(File),
    Unasked(Arc<Session>),
    Download(Arc<Session>, Response),
}

impl Flow {
    async fn next(&mut self) -> Result<Option<Bytes>, Fault> {
        if self.left == 0 {
            // An empty blob has no last piece to hold back.
            return if self.descriptor.size == 0 { self.check().map(|()| None) } else { Ok(None) };
        }
        let piece = self.piece().await?;
        let taken = piece.len() as u64;
        if taken == 0 || taken > self.left {
            return Err(self.changed());
        }
        self.left -= taken;
        self.sha256.update(&piece);
        if self.left == 0 {
            self.check()?;
        }
        Ok(Some(piece))
    }

    /// The digest of all that came is the promised one, and nothing follows.
    fn check(&self) -> Result<(), Fault> {
        let digest = Digest::from_sha256(self.sha256.clone().finalize().into());
        if digest == self.descriptor.digest { Ok(()) } else { Err(self.changed()) }
    }

    fn changed(&self) -> Fault {
        match &self.pieces {
            Pieces::Download(session, _) => {
                let doing = session.blob_download(&self.descriptor.digest).doing;
                Fault::Origin(session.content(&doing, "its bytes have another digest".to_owned()))
            }
            _ => Fault::Changed { path: self.path.clone() },
        }
    }

    /// Notes the memory of a piece that was read from a file, for later ones.
    fn keep(&mut self, piece: &Bytes) {
        if matches!(self.pieces, Pieces::Open(_)) {
            self.spare.push_back(piece.clone());
        }
    }

    /// The next piece; an empty one at the end.
    async fn piece(&mut self) -> Result<Bytes, Fault> {
        loop {
            match &mut self.pieces {
                Pieces::Memory(bytes) => return Ok(bytes.split_to(bytes.len().min(PIECE_BYTES))),
                Pieces::Closed(path) => {
                    let file = File::open(&*path).await.map_err(|source| Fault::Read { path: path.clone(), source })?;
                    self.pieces = Pieces::Open(file);
                }
                Pieces::Open(file) => {
                    let path = self.path.as_deref().unwrap_or(Path::new(""));
                    let room = room(&mut self.spare);
                    return read(file, self.left, room)
                        .await
                        .map_err(|source| Fault::Read { path: path.to_owned(), source });
                }
                Pieces::Unasked(session) => {
                    let response = session.open_blob(&self.descriptor.digest).await.map_err(Fault::Origin)?;
                    self.pieces = Pieces::Download(session.clone(), response);
                }
                Pieces::Download(session, response) => {
                    let doing = session.blob_download(&self.descriptor.digest).doing;
                    let deadline = session.client().patience().stall;
                    let chunk = tokio::time::timeout(deadline, response.chunk()).await;
                    let chunk = chunk.map_err(|_| Fault::Origin(session.silent(&doing, deadline)))?;
                    let url = response.url().clone();
                    let chunk = chunk.map_err(|error| Fault::Origin(session.transport(&url, &doing, &error)))?;
                    match chunk {
                        // An empty piece would look like the end.
                        Some(chunk) if chunk.is_empty() => {}
                        chunk => return Ok(chunk.unwrap_or_default()),
                    }
                }
            }
        }
    }
}

/// Room for a piece: that of the oldest one if it has been sent.
fn room(spare: &mut VecDeque<Bytes>) -> BytesMut {
    match spare.pop_front().map(Bytes::try_into_mut) {
        Some(Ok(mut room)) => {
            room.clear();
            room
        }
        Some(Err(piece)) => {
            spare.push_front(piece);
            BytesMut::with_capacity(PIECE_BYTES)
        }
        None => BytesMut::with_capacity(PIECE_BYTES),
    }
}

/// Reads one piece, and never beyond the length that the image knows.
async fn read(file: &mut File, left: u64, mut piece: BytesMut) -> io::Result<Bytes> {
    let length = usize::try_from(left).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
    while piece.len() < length {
        let missing = length - piece.len();
        if file.take(missing as u64).read_buf(&mut piece).await? == 0 {
            break;
        }
    }
    Ok(piece.freeze())
}
