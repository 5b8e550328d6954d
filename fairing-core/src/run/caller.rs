//! The caller's side of the protocol: listens to the coordinator and fetches the result.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::launch::Way;
use crate::protocol::connection::{Connection, ConnectionError, Patience, at_most};
use crate::protocol::deadline::{HELLO, STALL};
use crate::protocol::frame::Kind;
use crate::protocol::message::{FromCoordinator, Hello, Incarnation, Purpose, Speaker};
use crate::protocol::tcp::over;
use crate::protocol::transport::{Listener, Stream, Transport, connect_patiently, unix_stream};
use crate::secure::Identity;
use crate::topology::{Address, Member};

/// What the coordinator's connection brings.
pub(super) enum Heard {
    /// The connection stands; this half is for speaking.
    Attached(Connection),
    /// The coordinator said something.
    Said(FromCoordinator),
    /// The trained model, after [`FromCoordinator::Complete`]: as the framework writes it, and as safetensors, empty if it
    /// cannot be written so.
    Model { model: Vec<u8>, tensors: Vec<u8> },
    /// The connection is over; why is seen elsewhere, from the coordinator's process or from what it said before.
    Gone,
}

/// The caller's transport: whatever way the launcher has to the coordinator.
pub(super) struct Route {
    way: Arc<dyn Way>,
    /// With what the caller proves who it is, where others could be at either end.
    identity: Option<Identity>,
}

impl Route {
    pub(super) fn new(way: Arc<dyn Way>, identity: Option<Identity>) -> Self {
        Self { way, identity }
    }
}

impl Transport for Route {
    fn listen(&self, _: &Address) -> io::Result<Box<dyn Listener>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn connect(&self, address: &Address) -> io::Result<Box<dyn Stream>> {
        let stream = unix_stream(self.way.connect()?)?;
        match (address, &self.identity) {
            (Address::Tls { server, .. }, Some(identity)) => over(stream, identity, Member::Replica(*server)),
            // There is no way without TLS to an address with it.
            (Address::Tls { .. }, None) => Err(io::Error::other("the caller has no identity")),
            _ => Ok(stream),
        }
    }
}

/// How often a caller calls again; a coordinator that hangs up more often than this is not to be reached.
const CALLS: usize = 100;

/// Attaches to a run and calls `hear` with everything until the connection ends or `hear` returns `false`.
///
/// A coordinator is waited for as long as replicas `join`; `ended` stops the attempt to connect, for example when the coordinator's process has died.
pub(super) fn listen(
    transport: &dyn Transport,
    address: &Address,
    run: &str,
    join: Duration,
    ended: &AtomicBool,
    mut hear: impl FnMut(Heard) -> bool,
) {
    let waiting = || match ended.load(Ordering::Acquire) {
        false => Ok(()),
        true => Err(io::Error::other("the run has ended")),
    };
    // Between rounds the coordinator may have nothing to say for long; a dead one ends the connection.
    let patience = |_| waiting().map_err(|error| error.to_string());
    // A caller that was stopped for a while (Ctrl-Z) has been hung up on, and comes back.
    for _ in 0..CALLS {
        let connected = connect_patiently(transport, address, Instant::now() + join, &waiting)
            .map_err(ConnectionError::Broken)
            .and_then(|stream| attach(Connection::new(stream), run));
        // Why a connection ends is seen elsewhere, from the coordinator's process or from what it said before.
        if connected.and_then(|connection| converse(connection, &patience, &mut hear)).is_ok() {
            break;
        }
        if waiting().is_err() || !hear(Heard::Gone) {
            return;
        }
    }
    hear(Heard::Gone);
}

fn converse(
    mut connection: Connection,
    patience: Patience<'_>,
    hear: &mut impl FnMut(Heard) -> bool,
) -> Result<(), ConnectionError> {
    let writer = connection.try_clone().map_err(ConnectionError::Broken)?;
    let mut goes_on = hear(Heard::Attached(writer));
    while goes_on {
        let message: FromCoordinator = connection.receive(patience)?;
        let complete = matches!(message, FromCoordinator::Complete { .. });
        let failed = matches!(message, FromCoordinator::RunFailed(_));
        // Nothing follows either. Between threads the other end may stay open behind it: its reader waits for this one.
        goes_on = hear(Heard::Said(message)) && !failed;
        if complete {
            let mut receive = |kind| connection.receive_frame(kind, &at_most(STALL));
            hear(Heard::Model { model: receive(Kind::Model)?, tensors: receive(Kind::Tensors)? });
            goes_on = false;
        }
    }
    Ok(())
}

fn attach(mut connection: Connection, run: &str) -> Result<Connection, ConnectionError> {
    let incarnation = Incarnation::fresh();
    connection.send(&Hello {
        run: run.to_owned(),
        speaker: Speaker::Caller,
        incarnation,
        purpose: Purpose::Control,
    })?;
    match connection.receive(&at_most(HELLO))? {
        FromCoordinator::Welcome { .. } => Ok(connection),
        FromCoordinator::Refused { reason } => Err(ConnectionError::Protocol(reason)),
        other => Err(ConnectionError::Protocol(format!("{other:?} instead of a welcome"))),
    }
}
