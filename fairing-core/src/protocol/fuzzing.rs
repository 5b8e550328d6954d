//! Frames and messages from any bytes, for the fuzzer.

use std::io::{self, Cursor, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::connection::{Connection, at_most};
use super::deadline::STALL;
use super::frame::{HEADER_BYTES, Header, PushHead};
use super::message::{FromCoordinator, Hello, Numbered};
use super::transport::Stream;
use crate::topology::Member;

/// A peer that sends what is given, hears everything, and goes.
#[derive(Clone)]
pub(crate) struct Script(Cursor<Vec<u8>>);

impl Script {
    /// A connection to it.
    pub(crate) fn connection(bytes: &[u8]) -> Connection {
        Connection::new(Box::new(Self(Cursor::new(bytes.to_vec()))))
    }
}

impl Read for Script {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Script {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Script {
    fn try_clone(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.clone()))
    }

    fn shutdown(&self) {}

    fn is(&self, _: Member) -> bool {
        true
    }
}

/// Whatever can be read as a message is the same after it was written and read again.
pub(crate) fn round_trip<M: Serialize + DeserializeOwned>(bytes: &[u8]) -> Option<M> {
    let message: M = ciborium::from_reader(bytes).ok()?;
    let encode = |message: &M| {
        let mut bytes = Vec::new();
        ciborium::into_writer(message, &mut bytes).expect("it was read from bytes");
        bytes
    };
    let written = encode(&message);
    let again: M = ciborium::from_reader(written.as_slice()).expect("it was written just now");
    assert_eq!(encode(&again), written);
    Some(message)
}

/// Reads `bytes` as everything that may come.
pub(crate) fn messages(bytes: &[u8]) {
    if let Some(head) = bytes.first_chunk::<HEADER_BYTES>()
        && let Ok(header) = Header::decode(*head)
    {
        assert_eq!(Header::decode(header.encode()), Ok(header));
    }
    if let Some(head) = bytes.first_chunk::<{ PushHead::BYTES }>() {
        assert_eq!(PushHead::decode(*head).encode(), *head);
    }
    let mut connection = Script::connection(bytes);
    while connection.receive::<Numbered>(&at_most(STALL)).is_ok() {}
    round_trip::<Hello>(bytes);
    round_trip::<Numbered>(bytes);
    round_trip::<FromCoordinator>(bytes);
}
