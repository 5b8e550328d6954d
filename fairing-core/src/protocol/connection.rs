//! Frames over a stream, with every wait bounded.

use std::io::{self, IoSlice, Read, Write};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::deadline::STALL;
use super::frame::{FrameError, HEADER_BYTES, Header, Kind};
use super::transport::Stream;
use crate::topology::Member;

/// Failure to exchange frames with a peer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    /// The stream ended or broke.
    #[error("the connection broke")]
    Broken(#[source] io::Error),
    /// The peer sent bytes that are no frame, or not the expected one.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// The wait was given up.
    #[error("{0}")]
    GivenUp(String),
}

impl From<FrameError> for ConnectionError {
    fn from(error: FrameError) -> Self {
        ConnectionError::Protocol(error.to_string())
    }
}

/// Decides whether to go on waiting; asked about twice a second with the time waited so far.
pub(crate) type Patience<'a> = &'a dyn Fn(Duration) -> Result<(), String>;

/// Waits at most `limit`.
pub(crate) fn at_most(limit: Duration) -> impl Fn(Duration) -> Result<(), String> {
    move |waited| if waited < limit { Ok(()) } else { Err(format!("no answer within {} s", limit.as_secs())) }
}

/// A stream of frames.
pub(crate) struct Connection {
    stream: Box<dyn Stream>,
}

/// Memory that a payload of unknown origin may take before its bytes have arrived.
const FIRST_ALLOCATION: usize = 1 << 20;

impl Connection {
    pub(crate) fn new(stream: Box<dyn Stream>) -> Self {
        Self { stream }
    }

    /// A second handle, so that one thread can read while another writes.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { stream: self.stream.try_clone()? })
    }

    /// Ends both directions, also for those who hold a clone; what was sent before still arrives.
    pub(crate) fn shutdown(&self) {
        self.stream.shutdown();
    }

    /// Whether `member` is at the other end, as far as this transport can tell.
    pub(crate) fn is(&self, member: Member) -> bool {
        self.stream.is(member)
    }

    /// Sends a control message.
    pub(crate) fn send<M: Serialize>(&mut self, message: &M) -> Result<(), ConnectionError> {
        self.send_patiently(message, &at_most(STALL))
    }

    /// As [`Connection::send`], asking `patience` while the peer takes nothing. After a failure the connection is of no use:
    /// the message may have left in part.
    pub(crate) fn send_patiently<M: Serialize>(
        &mut self,
        message: &M,
        patience: Patience<'_>,
    ) -> Result<(), ConnectionError> {
        let mut bytes = vec![0; HEADER_BYTES];
        ciborium::into_writer(message, &mut bytes).map_err(|error| ConnectionError::Protocol(error.to_string()))?;
        let header = Header::of(Kind::Message, bytes.len() - HEADER_BYTES).encode();
        // Checked here as well: a message over the limit is this side's fault, and the other side could only hang up.
        Header::decode(header)?;
        bytes[..HEADER_BYTES].copy_from_slice(&header);
        self.write_all(&bytes, patience)
    }

    /// Sends a frame whose payload is at hand.
    pub(crate) fn send_frame(&mut self, kind: Kind, payload: &[u8]) -> Result<(), ConnectionError> {
        self.write_both(&Header::of(kind, payload.len()).encode(), payload)
    }

    /// Waits for a control message.
    pub(crate) fn receive<M: DeserializeOwned>(&mut self, patience: Patience<'_>) -> Result<M, ConnectionError> {
        let header = self.read_header(patience)?;
        self.read_message(header)
    }

    /// Waits for the header of the next frame.
    pub(crate) fn read_header(&mut self, patience: Patience<'_>) -> Result<Header, ConnectionError> {
        let mut bytes = [0; HEADER_BYTES];
        self.read_exact(&mut bytes, patience)?;
        Ok(Header::decode(bytes)?)
    }

    /// Reads the control message that `header` announced.
    pub(crate) fn read_message<M: DeserializeOwned>(&mut self, header: Header) -> Result<M, ConnectionError> {
        if header.kind != Kind::Message {
            return Err(ConnectionError::Protocol(format!("a {:?} frame where a message belongs", header.kind)));
        }
        let bytes = self.read_payload(header)?;
        ciborium::from_reader(bytes.as_slice())
            .map_err(|error| ConnectionError::Protocol(format!("an unreadable message ({error})")))
    }

    /// Waits for a frame of `kind` and reads its payload.
    pub(crate) fn receive_frame(&mut self, kind: Kind, patience: Patience<'_>) -> Result<Vec<u8>, ConnectionError> {
        let header = self.read_header(patience)?;
        if header.kind != kind {
            return Err(ConnectionError::Protocol(format!("a {:?} frame where {kind:?} belongs", header.kind)));
        }
        self.read_payload(header)
    }

    /// As [`Connection::receive_frame`], in pieces that are never moved, for what is as large as a model; `advanced` is called
    /// with each.
    pub(crate) fn receive_pieces(
        &mut self,
        kind: Kind,
        patience: Patience<'_>,
        advanced: &dyn Fn(),
    ) -> Result<Vec<Vec<u8>>, ConnectionError> {
        let header = self.read_header(patience)?;
        if header.kind != kind {
            return Err(ConnectionError::Protocol(format!("a {:?} frame where {kind:?} belongs", header.kind)));
        }
        let mut rest = header.length_bytes;
        let mut pieces = Vec::new();
        while rest > 0 {
            let mut piece = vec![0; rest.min(FIRST_ALLOCATION as u64) as usize];
            self.read_exact(&mut piece, &at_most(STALL))?;
            rest -= piece.len() as u64;
            pieces.push(piece);
            advanced();
        }
        Ok(pieces)
    }

    /// Sends a frame whose payload is in pieces.
    pub(crate) fn send_pieces(&mut self, kind: Kind, pieces: &[Vec<u8>]) -> Result<(), ConnectionError> {
        let length = pieces.iter().map(Vec::len).sum();
        self.write_all(&Header::of(kind, length).encode(), &at_most(STALL))?;
        pieces.iter().try_for_each(|piece| self.write_all(piece, &at_most(STALL)))
    }

    /// Reads a payload whose length only the peer knows: memory grows with what has arrived, not with what was claimed.
    fn read_payload(&mut self, header: Header) -> Result<Vec<u8>, ConnectionError> {
        let length = usize::try_from(header.length_bytes)
            .map_err(|_| ConnectionError::Protocol("a frame that is larger than the memory".into()))?;
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let start = bytes.len();
            let part = (length - start).min(FIRST_ALLOCATION.max(start));
            bytes.resize(start + part, 0);
            self.read_exact(&mut bytes[start..], &at_most(STALL))?;
        }
        Ok(bytes)
    }

    /// Fills `buffer`; `patience` is asked while nothing arrives.
    pub(crate) fn read_exact(&mut self, buffer: &mut [u8], patience: Patience<'_>) -> Result<(), ConnectionError> {
        let mut filled = 0;
        let mut silent_since = None;
        while filled < buffer.len() {
            match self.stream.read(&mut buffer[filled..]) {
                Ok(0) => return Err(ConnectionError::Broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => {
                    filled += count;
                    silent_since = None;
                }
                Err(error) => wait(error, &mut silent_since, patience)?,
            }
        }
        Ok(())
    }

    /// Sends all of `bytes`; `patience` is asked while the peer takes nothing.
    pub(crate) fn write_all(&mut self, bytes: &[u8], patience: Patience<'_>) -> Result<(), ConnectionError> {
        let mut sent = 0;
        let mut silent_since = None;
        while sent < bytes.len() {
            match self.stream.write(&bytes[sent..]) {
                Ok(count) => {
                    sent += count;
                    silent_since = None;
                }
                Err(error) => wait(error, &mut silent_since, patience)?,
            }
        }
        // An encrypted stream may have taken bytes which have not left yet.
        let mut silent_since = None;
        while let Err(error) = self.stream.flush() {
            wait(error, &mut silent_since, patience)?;
        }
        Ok(())
    }

    /// Sends `head` and `body` with one system call if the peer takes them.
    pub(crate) fn write_both(&mut self, head: &[u8], body: &[u8]) -> Result<(), ConnectionError> {
        self.write_both_patiently(head, body, &at_most(STALL))
    }

    /// As [`Connection::write_both`], asking `patience` while the peer takes nothing.
    pub(crate) fn write_both_patiently(
        &mut self,
        head: &[u8],
        body: &[u8],
        patience: Patience<'_>,
    ) -> Result<(), ConnectionError> {
        let sent = match self.stream.write_vectored(&[IoSlice::new(head), IoSlice::new(body)]) {
            Ok(sent) => sent,
            Err(error) => {
                wait(error, &mut None, patience)?;
                0
            }
        };
        if sent < head.len() {
            self.write_all(&head[sent..], patience)?;
        }
        self.write_all(&body[sent.saturating_sub(head.len())..], patience)
    }
}

/// After a failed read or write: returns if it may be tried again.
fn wait(error: io::Error, silent_since: &mut Option<Instant>, patience: Patience<'_>) -> Result<(), ConnectionError> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            // The failed call has waited one tick already.
            let since = silent_since.get_or_insert_with(|| Instant::now() - super::deadline::TICK);
            patience(since.elapsed()).map_err(ConnectionError::GivenUp)
        }
        _ => Err(ConnectionError::Broken(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::transport::{Memory, Transport};
    use crate::topology::Address;

    fn pair() -> (Connection, Connection) {
        let transport = Memory::default();
        let address = Address::Memory("peer".into());
        let listener = transport.listen(&address).unwrap();
        let near = transport.connect(&address).unwrap();
        let far = listener.accept(STALL).unwrap().unwrap();
        (Connection::new(near), Connection::new(far))
    }

    #[test]
    fn messages_and_frames_arrive_as_sent() {
        let (mut near, mut far) = pair();
        near.send(&("a", f64::NAN.to_bits(), f64::MIN_POSITIVE)).unwrap();
        near.send_frame(Kind::Model, &[7; 100_000]).unwrap();
        let (text, nan, tiny): (String, u64, f64) = far.receive(&at_most(STALL)).unwrap();
        assert_eq!((text.as_str(), nan, tiny), ("a", f64::NAN.to_bits(), f64::MIN_POSITIVE));
        assert_eq!(far.receive_frame(Kind::Model, &at_most(STALL)).unwrap(), [7; 100_000]);
    }

    #[test]
    fn a_claimed_length_allocates_nothing() {
        let (mut near, mut far) = pair();
        near.write_all(&Header::of(Kind::Model, 1 << 40).encode(), &at_most(STALL)).unwrap();
        drop(near);
        let error = far.receive_frame(Kind::Model, &at_most(STALL)).unwrap_err();
        assert!(matches!(error, ConnectionError::Broken(_)), "{error}");
    }

    #[test]
    fn a_wait_ends_when_patience_does() {
        let (_near, mut far) = pair();
        let error = far.receive::<u8>(&|_| Err("the run has failed".into())).unwrap_err();
        assert_eq!(error.to_string(), "the run has failed");
    }

    #[test]
    fn garbage_is_an_error_not_a_panic() {
        let (mut near, mut far) = pair();
        near.send_frame(Kind::Message, &[0xff; 40]).unwrap();
        assert!(matches!(far.receive::<u8>(&at_most(STALL)), Err(ConnectionError::Protocol(_))));
    }
}
