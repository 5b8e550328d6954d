//! The caller's side of the protocol: listens to the coordinator and fetches the result.
//!
//! The connection may break and come back: the caller says up to which message it has heard, and hears the rest.

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
    /// Another process has attached to the run as its caller. This is the last word; there is no way back.
    Replaced,
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

/// How often a caller calls without hearing anything new; a coordinator that hangs up more often than this is not to be
/// reached.
const CALLS: u32 = 100;

/// The pause before a caller calls again, at first and at last: one break heals at once, and who is hung up on again and again
/// leaves the coordinator time for its work.
const PAUSES: [Duration; 2] = [Duration::from_millis(10), Duration::from_secs(1)];

/// Attaches to a run and calls `hear` with everything from the run's beginning on, until there is no more to be heard or
/// `hear` returns `false`.
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
    // Between rounds the coordinator has nothing to say for long but that it lives. One that was cut off ends no connection.
    let patience = |waited| waiting().map_err(|error| error.to_string()).and_then(|()| at_most(STALL)(waited));
    let mut call = Call { run, incarnation: Incarnation::fresh(), heard: 0 };
    let mut in_vain = 0;
    let mut pause = PAUSES[0];
    while in_vain < CALLS {
        let before = call.heard;
        let connected = connect_patiently(transport, address, Instant::now() + join, &waiting)
            .map_err(ConnectionError::Broken)
            .and_then(|stream| call.attach(Connection::new(stream)));
        let conversed = match connected {
            Ok(Some(connection)) => call.converse(connection, &patience, &mut hear),
            Ok(None) => Ok(Ended::Replaced),
            Err(error) => Err(error),
        };
        match conversed {
            Ok(Ended::Well) => break,
            Ok(Ended::Replaced) => {
                hear(Heard::Replaced);
                return;
            }
            // Why a connection ends is seen elsewhere, from the coordinator's process or from what it said before. A caller
            // that was stopped for a while (Ctrl-Z) has been hung up on, and comes back.
            Err(_) if waiting().is_err() || !hear(Heard::Gone) => return,
            Err(_) if call.heard > before => (in_vain, pause) = (0, PAUSES[0]),
            Err(_) => (in_vain, pause) = (in_vain + 1, (pause * 2).min(PAUSES[1])),
        }
        std::thread::sleep(pause);
    }
    hear(Heard::Gone);
}

/// One process that follows a run.
struct Call<'a> {
    run: &'a str,
    incarnation: Incarnation,
    /// The number of the last message that was heard.
    heard: u64,
}

/// How a conversation ended, unless its connection broke.
enum Ended {
    /// Everything was said, or nobody wants to hear more.
    Well,
    Replaced,
}

impl Call<'_> {
    fn converse(
        &mut self,
        mut connection: Connection,
        patience: Patience<'_>,
        hear: &mut impl FnMut(Heard) -> bool,
    ) -> Result<Ended, ConnectionError> {
        let writer = connection.try_clone().map_err(ConnectionError::Broken)?;
        let mut goes_on = hear(Heard::Attached(writer));
        while goes_on {
            let message = match connection.receive(patience)? {
                FromCoordinator::Told { number, message } => {
                    if std::mem::replace(&mut self.heard, number) >= number {
                        return Err(ConnectionError::Protocol(format!("message {number} a second time")));
                    }
                    *message
                }
                FromCoordinator::Replaced => return Ok(Ended::Replaced),
                FromCoordinator::Heard { .. } => continue,
                other => other,
            };
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
        Ok(Ended::Well)
    }

    /// Says hello. `None` if another process has taken over.
    fn attach(&self, mut connection: Connection) -> Result<Option<Connection>, ConnectionError> {
        connection.send(&Hello {
            run: self.run.to_owned(),
            speaker: Speaker::Caller,
            incarnation: self.incarnation,
            purpose: Purpose::Follow { heard: self.heard },
        })?;
        match connection.receive(&at_most(HELLO))? {
            FromCoordinator::Welcome { .. } => Ok(Some(connection)),
            FromCoordinator::Replaced => Ok(None),
            FromCoordinator::Refused { reason } => Err(ConnectionError::Protocol(reason)),
            other => Err(ConnectionError::Protocol(format!("{other:?} instead of a welcome"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::transport::Memory;
    use crate::topology::Replica;

    /// Plays a coordinator that says what each call is to hear and then hangs up; gives what was heard, as text, and the
    /// numbers that the caller said it had heard.
    fn listened(calls: &[&[FromCoordinator]]) -> (Vec<String>, Vec<u64>) {
        let (transport, address) = (Memory::default(), Address::Memory("ps-0".into()));
        let listener = transport.listen(&address).unwrap();
        let (mut heard, mut asked) = (Vec::new(), Vec::new());
        std::thread::scope(|scope| {
            let asked = &mut asked;
            scope.spawn(move || {
                let mut incarnations = Vec::new();
                for call in calls {
                    let mut connection = Connection::new(listener.accept(STALL).unwrap().unwrap());
                    let hello: Hello = connection.receive(&at_most(STALL)).unwrap();
                    let Purpose::Follow { heard } = hello.purpose else { panic!("{hello:?}") };
                    incarnations.push(hello.incarnation);
                    asked.push(heard);
                    call.iter().for_each(|message| connection.send(message).unwrap());
                    // As a network does: also what was not read yet is lost only behind what was.
                    connection.shutdown();
                }
                assert!(incarnations.windows(2).all(|pair| pair[0] == pair[1]), "one process is one life");
            });
            let ended = AtomicBool::new(false);
            listen(&transport, &address, "test", STALL, &ended, |what| {
                heard.push(match what {
                    Heard::Attached(_) => "attached".to_owned(),
                    Heard::Said(FromCoordinator::Joined(replica)) => replica.to_string(),
                    Heard::Said(other) => format!("{other:?}"),
                    Heard::Model { .. } => "a model".to_owned(),
                    Heard::Gone => "gone".to_owned(),
                    Heard::Replaced => "replaced".to_owned(),
                });
                true
            });
        });
        (heard, asked)
    }

    fn welcome() -> FromCoordinator {
        FromCoordinator::Welcome { position: Default::default(), heard: 0, state: None }
    }

    fn told(number: u64) -> FromCoordinator {
        FromCoordinator::Told { number, message: Box::new(FromCoordinator::Joined(Replica::worker(number as u32))) }
    }

    #[test]
    fn a_caller_comes_back_for_what_it_has_not_heard_and_not_after_it_was_replaced() {
        let sign = FromCoordinator::Heard { number: 0 };
        let calls: [&[FromCoordinator]; 4] = [
            &[welcome(), told(1), sign.clone(), told(2)],
            &[],
            // Behind messages that were thinned out.
            &[welcome(), sign, told(5)],
            &[welcome(), told(6), FromCoordinator::Replaced],
        ];
        let (heard, asked) = listened(&calls);
        assert_eq!(asked, [0, 2, 2, 5]);
        let expected = [
            "attached", "worker 1", "worker 2", "gone", "gone", "attached", "worker 5", "gone", "attached", "worker 6",
            "replaced",
        ];
        assert_eq!(heard, expected);
        let (heard, asked) = listened(&[&[FromCoordinator::Replaced]]);
        assert_eq!((heard, asked), (vec!["replaced".to_owned()], vec![0]));
    }
}
