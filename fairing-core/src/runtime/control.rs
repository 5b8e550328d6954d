//! A replica's side of its control connection: reports, collectives, and the word that the run is over.
//!
//! The connection may break and come back: every message has a number and is kept until the coordinator has heard it, and
//! what the coordinator said last it says again.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_bytes::ByteBuf;

use super::status::RunStatus;
use crate::observe::events::Progress;
use crate::observe::metrics::MetricPoint;
use crate::protocol::connection::{Connection, ConnectionError, at_most};
use crate::protocol::deadline::{HEARTBEAT, HELLO, LEASE, RECONNECT, REPORT, ROUND, TICK};
use crate::protocol::failure::{Failure, FailureKind};
use crate::protocol::frame::Kind;
use crate::protocol::message::{
    CollectiveKey, FromCoordinator, Group, Hello, Incarnation, Numbered, Pace, Position, Purpose, Report, Speaker,
    ToCoordinator,
};
use crate::protocol::transport::{Transport, connect_patiently};
use crate::topology::{Address, Placement, Replica};

/// Metrics that may wait for the next report; a worker that brings more waits until they are sent.
const OUTBOX: usize = 4096;

/// Messages that may wait to be heard; whoever brings more waits itself. The coordinator confirms every few.
const UNHEARD: usize = 64;

/// The outcome of a collective.
pub(crate) struct Gathered {
    /// Every part, in rank order; none of a rank that is lost.
    pub(crate) parts: Vec<Option<ByteBuf>>,
    /// The run is to stop.
    pub(crate) stopping: bool,
}

/// A replica's connection to the coordinator.
pub(crate) struct Control {
    placement: Placement,
    incarnation: Incarnation,
    coordinator: Replica,
    transport: Arc<dyn Transport>,
    status: Arc<RunStatus>,
    outgoing: Mutex<Outgoing>,
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    outbox: Mutex<Report>,
    wanted: Condvar,
}

/// What is on its way to the coordinator.
struct Outgoing {
    /// `None` while it is broken.
    connection: Option<Connection>,
    next: u64,
    unheard: VecDeque<Arc<Outgo>>,
}

/// A message and the payloads that follow it.
struct Outgo {
    numbered: Numbered,
    payloads: Vec<(Kind, Vec<u8>)>,
}

#[derive(Default)]
struct Inbox {
    /// The state that was averaged before this worker was started again.
    state: Option<Vec<Option<ByteBuf>>>,
    /// Collectives that this replica waits for, and their outcomes.
    wanted: Vec<CollectiveKey>,
    gathered: BTreeMap<CollectiveKey, Gathered>,
    bring: bool,
    released: bool,
    /// This replica has said that it leaves.
    left: bool,
    /// The coordinator has said itself that the run has failed, or that this replica is no part of it.
    told_failure: bool,
}

/// Opens a connection to a server and says hello on it; tries until `deadline`, as long as `waiting` agrees.
pub(crate) fn open(
    transport: &dyn Transport,
    address: &Address,
    hello: &Hello,
    deadline: Instant,
    waiting: &dyn Fn() -> std::io::Result<()>,
) -> Result<Connection, ConnectionError> {
    let stream = connect_patiently(transport, address, deadline, waiting).map_err(ConnectionError::Broken)?;
    let mut connection = Connection::new(stream);
    connection.send(hello)?;
    Ok(connection)
}

impl Outgo {
    fn write(&self, connection: &mut Connection) -> Result<(), ConnectionError> {
        connection.send(&self.numbered)?;
        self.payloads.iter().try_for_each(|(kind, payload)| connection.send_frame(*kind, payload))
    }
}

impl Control {
    /// Connects to the coordinator, and starts the threads that listen to it and report to it.
    ///
    /// # Errors
    ///
    /// A [`Failure`] of the coordinator if it cannot be reached, or of this replica if it is refused.
    pub(crate) fn connect(
        placement: &Placement,
        transport: &Arc<dyn Transport>,
        status: &Arc<RunStatus>,
    ) -> Result<(Arc<Self>, Position), Failure> {
        let control = Arc::new(Self {
            placement: placement.clone(),
            incarnation: Incarnation::fresh(),
            coordinator: placement.topology.coordinator(),
            transport: transport.clone(),
            status: status.clone(),
            outgoing: Mutex::new(Outgoing { connection: None, next: 1, unheard: VecDeque::new() }),
            inbox: Mutex::default(),
            arrived: Condvar::new(),
            outbox: Mutex::default(),
            wanted: Condvar::new(),
        });
        let (reader, position) = control.call(Instant::now() + placement.join)?;
        let (listening, reporting) = (control.clone(), Arc::downgrade(&control));
        std::thread::spawn(move || listening.listen(reader));
        std::thread::spawn(move || {
            while let Some(control) = reporting.upgrade() {
                if !control.report_when_due() {
                    return;
                }
            }
        });
        Ok((control, position))
    }

    /// Which life of its replica this is.
    pub(crate) fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Says hello until the coordinator answers, at the latest at `deadline`, and then everything that was not heard.
    fn call(&self, mut deadline: Instant) -> Result<(Connection, Position), Failure> {
        loop {
            match self.call_once(deadline) {
                Ok(called) => return Ok(called),
                Err(CallError::Failed(failure)) => return Err(failure),
                // Of another version, say: it would answer the same again.
                Err(CallError::Connection(ConnectionError::Protocol(what))) => {
                    return Err(self.failure(self.coordinator, FailureKind::Protocol, what));
                }
                Err(CallError::Connection(error)) => {
                    if let Some(failure) = self.status.failure() {
                        return Err(failure);
                    }
                    // Somebody was there. That a coordinator is still to be started was waited for within the call.
                    deadline = deadline.min(Instant::now() + RECONNECT);
                    if Instant::now() >= deadline {
                        let message = format!("{} cannot reach the coordinator: {error}", self.placement.replica);
                        return Err(self.failure(self.coordinator, FailureKind::Lost, message));
                    }
                    std::thread::sleep(TICK / 10);
                }
            }
        }
    }

    /// Where the coordinator is. Its own host need not wait until a name is known that says so to others.
    fn address(&self) -> Address {
        match &self.placement.servers[0] {
            Address::Tls { server, port, .. } if *server == self.placement.replica => {
                Address::Tls { server: *server, host: Ipv4Addr::LOCALHOST.to_string(), port: *port }
            }
            address => address.clone(),
        }
    }

    fn call_once(&self, deadline: Instant) -> Result<(Connection, Position), CallError> {
        let hello = Hello {
            run: self.placement.run.clone(),
            speaker: Speaker::Replica(self.placement.replica),
            incarnation: self.incarnation,
            purpose: Purpose::Control,
        };
        let waiting = || self.status.unless_failed().map_err(std::io::Error::other);
        let mut reader = open(self.transport.as_ref(), &self.address(), &hello, deadline, &waiting)?;
        let (position, heard) = match reader.receive(&at_most(HELLO))? {
            FromCoordinator::Welcome { position, heard, state } => {
                if state.is_some() {
                    self.inbox().state = state;
                }
                (position, heard)
            }
            FromCoordinator::Refused { reason } => {
                let failure = self.failure(self.placement.replica, FailureKind::Lost, reason);
                return Err(CallError::Failed(failure));
            }
            FromCoordinator::RunFailed(failure) => return Err(CallError::Failed(failure)),
            other => {
                let message = format!("{other:?} instead of a welcome");
                return Err(CallError::Failed(self.failure(self.coordinator, FailureKind::Protocol, message)));
            }
        };
        let mut writer = reader.try_clone().map_err(ConnectionError::Broken)?;
        let mut outgoing = self.outgoing();
        outgoing.unheard.retain(|outgo| outgo.numbered.number > heard);
        for outgo in &outgoing.unheard {
            outgo.write(&mut writer)?;
        }
        outgoing.connection = Some(writer);
        Ok((reader, position))
    }

    fn failure(&self, replica: Replica, kind: FailureKind, message: String) -> Failure {
        Failure { replica, kind, message, round: None }
    }

    /// Breaks the connection, as the death of the process would.
    #[cfg(test)]
    pub(crate) fn break_connection(&self) {
        self.outgoing().connection.iter().for_each(Connection::shutdown);
    }

    fn outgoing(&self) -> MutexGuard<'_, Outgoing> {
        self.outgoing.lock().expect("no holder panics")
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().expect("no holder panics")
    }

    fn outbox(&self) -> MutexGuard<'_, Report> {
        self.outbox.lock().expect("no holder panics")
    }

    fn is_over(&self) -> bool {
        let inbox = self.inbox();
        inbox.released || inbox.left || self.status.failure().is_some()
    }

    fn listen(&self, mut reader: Connection) {
        // The coordinator gives a sign of life every heartbeat. If it is frozen, it answers no new hello either.
        let patience = |waited| self.status.unless_failed().and_then(|()| at_most(LEASE)(waited));
        loop {
            match reader.receive(&patience) {
                Ok(FromCoordinator::Gathered { key, parts, stopping }) => {
                    let mut inbox = self.inbox();
                    // What comes again after a break may have been taken already.
                    if inbox.wanted.contains(&key) {
                        inbox.gathered.insert(key, Gathered { parts, stopping });
                    }
                }
                Ok(FromCoordinator::Heard { number }) => {
                    self.outgoing().unheard.retain(|outgo| outgo.numbered.number > number);
                }
                Ok(FromCoordinator::Roll(roll)) => self.status.set_roll(roll),
                Ok(FromCoordinator::Bring) => self.inbox().bring = true,
                Ok(FromCoordinator::RunFailed(failure)) => {
                    self.inbox().told_failure = true;
                    self.status.fail(failure);
                }
                Ok(FromCoordinator::Released) => {
                    // Before this replica may end. Without it the coordinator waits a moment in vain.
                    let _ = self.send(Vec::new(), || ToCoordinator::Goodbye);
                    self.inbox().released = true;
                }
                Ok(FromCoordinator::Refused { reason }) => {
                    self.inbox().told_failure = true;
                    self.status.fail(self.failure(self.placement.replica, FailureKind::Lost, reason));
                }
                Ok(other) => self.lost_coordinator(FailureKind::Protocol, format!("an unexpected {other:?}")),
                Err(ConnectionError::Protocol(what)) => self.lost_coordinator(FailureKind::Protocol, what),
                Err(_) if self.is_over() => {}
                Err(_) => {
                    self.outgoing().connection = None;
                    match self.call(Instant::now() + RECONNECT) {
                        Ok((called, _)) => reader = called,
                        Err(_) if self.is_over() => {}
                        Err(failure) => _ = self.status.fail(failure),
                    }
                }
            }
            self.arrived.notify_all();
            if self.is_over() {
                self.wanted.notify_all();
                return;
            }
        }
    }

    fn lost_coordinator(&self, kind: FailureKind, message: String) {
        self.status.fail(self.failure(self.coordinator, kind, message));
    }

    /// Sends the outbox if there is something new, a sign of life otherwise. `false` once nobody listens.
    fn report_when_due(&self) -> bool {
        let is_empty = |report: &mut Report| report.progress.is_none() && report.metrics.is_empty();
        {
            let outbox = self.outbox();
            let (outbox, _) = self.wanted.wait_timeout_while(outbox, HEARTBEAT, is_empty).expect("no holder panics");
            drop(outbox);
        }
        if self.is_over() || self.flush().is_err() {
            return false;
        }
        // Let reports fill, but not so long that a view seems to stand still.
        std::thread::sleep(REPORT);
        !self.is_over()
    }

    /// Sends what is in the outbox now.
    pub(crate) fn flush(&self) -> Result<(), Failure> {
        self.send(Vec::new(), || {
            let mut outbox = self.outbox();
            let (rounds_done, position, pace) = (outbox.rounds_done, outbox.position, outbox.pace);
            let report = Report { rounds_done, position, pace, ..Report::default() };
            ToCoordinator::Report(std::mem::replace(&mut *outbox, report))
        })
    }

    /// Sends a message, which is made once its turn has come, so that messages leave in the order in which they were taken.
    ///
    /// A broken connection is no error: the message leaves when it is back. The error is the run's failure, or the message
    /// is too long.
    fn send(&self, payloads: Vec<(Kind, Vec<u8>)>, message: impl FnOnce() -> ToCoordinator) -> Result<(), Failure> {
        let mut outgoing = self.outgoing();
        let started = Instant::now();
        while outgoing.unheard.len() >= UNHEARD {
            drop(outgoing);
            if let Some(failure) = self.status.failure() {
                return Err(failure);
            }
            if started.elapsed() > ROUND {
                let message = format!("it confirms no message of {}", self.placement.replica);
                return Err(self.failure(self.coordinator, FailureKind::Timeout, message));
            }
            std::thread::sleep(Duration::from_millis(1));
            outgoing = self.outgoing();
        }
        let numbered = Numbered { number: outgoing.next, message: message() };
        let outgo = Arc::new(Outgo { numbered, payloads });
        if let Some(connection) = &mut outgoing.connection {
            match outgo.write(connection) {
                Ok(()) => {}
                Err(ConnectionError::Protocol(reason)) => {
                    return Err(self.failure(self.placement.replica, FailureKind::Configuration, reason));
                }
                Err(_) => {
                    // The reader notices it too and calls again; what was written in part must not be gone on with.
                    connection.shutdown();
                    outgoing.connection = None;
                }
            }
        }
        outgoing.next += 1;
        outgoing.unheard.push_back(outgo);
        Ok(())
    }

    /// Leaves a metric for the next report.
    pub(crate) fn metric(&self, point: MetricPoint) {
        let is_full = {
            let mut outbox = self.outbox();
            outbox.metrics.push(point);
            outbox.metrics.len() >= OUTBOX
        };
        if is_full {
            // A failure ends the worker's next call.
            let _ = self.flush();
        }
    }

    /// Leaves the newest progress for the next report.
    pub(crate) fn progress(&self, progress: Progress, position: Position, pace: impl FnOnce() -> Pace) {
        let was_empty = {
            let mut outbox = self.outbox();
            outbox.position = position;
            let was_empty = outbox.progress.replace(progress).is_none();
            if was_empty {
                outbox.pace = Some(pace());
            }
            was_empty
        };
        if was_empty {
            self.wanted.notify_all();
        }
    }

    /// Leaves the final pace for the next report.
    pub(crate) fn pace(&self, pace: Pace) {
        self.outbox().pace = Some(pace);
    }

    /// Says that rounds before this one get no more metrics.
    pub(crate) fn rounds_done(&self, rounds: u64) {
        self.outbox().rounds_done = rounds;
    }

    /// Sends a message after everything that was left for reports.
    pub(crate) fn say(&self, message: ToCoordinator) -> Result<(), Failure> {
        self.flush()?;
        self.send(Vec::new(), || message)
    }

    /// Says that this worker was told to end and makes no other round, and waits a moment until that is heard: what is still on
    /// its way when a process ends may be lost. From then on it has no more to say. A second call does nothing.
    pub(crate) fn leave(&self) {
        if std::mem::replace(&mut self.inbox().told_failure, true) {
            return;
        }
        // If the coordinator cannot be told, it finds out in its own time.
        let said = self.say(ToCoordinator::Leaving);
        let deadline = Instant::now() + HEARTBEAT * 2;
        while said.is_ok() && !self.outgoing().unheard.is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.inbox().left = true;
    }

    /// Says what failed, unless the coordinator has said so itself. If it is gone, its own end is what the launcher sees.
    pub(crate) fn report_failure(&self, failure: &Failure) {
        if !self.inbox().told_failure {
            let _ = self.say(ToCoordinator::Failed(failure.clone()));
        }
    }

    /// Sends `message` and then payloads of their own.
    pub(crate) fn say_with(&self, message: ToCoordinator, payloads: Vec<(Kind, Vec<u8>)>) -> Result<(), Failure> {
        self.flush()?;
        self.send(payloads, || message)
    }

    /// One collective: every part, in rank order.
    pub(crate) fn gather(&self, key: CollectiveKey, part: Vec<u8>) -> Result<Gathered, Failure> {
        let message = ToCoordinator::Gather { key, part };
        self.inbox().wanted.push(key);
        let said = if key.group == Group::Servers { self.send(Vec::new(), || message) } else { self.say(message) };
        said.map_err(|failure| match failure.kind {
            FailureKind::Configuration => {
                let message = format!("too many numbers in one `sum` or state: {}", failure.message);
                Failure { message, ..failure }
            }
            _ => failure,
        })?;
        let gathered = self.wait(|inbox| inbox.gathered.remove(&key), "a collective");
        self.inbox().wanted.retain(|other| *other != key);
        gathered
    }

    /// The state that was averaged last, for a worker that was started again.
    pub(crate) fn last_state(&self) -> Option<Vec<Option<ByteBuf>>> {
        self.inbox().state.take()
    }

    /// Waits until the coordinator wants this worker's model, or says that the run is complete. Returns whether it is wanted.
    pub(crate) fn wait_for_the_end(&self) -> Result<bool, Failure> {
        let end = |inbox: &mut Inbox| match std::mem::take(&mut inbox.bring) {
            true => Some(true),
            false => inbox.released.then_some(false),
        };
        let stays = self.placement.first_stays && self.placement.replica == Replica::worker(0);
        let more = if stays { self.placement.keep_result } else { Duration::ZERO };
        self.wait_longer(end, "the end of the run", more)
    }

    /// Waits without limit of its own until the run is complete or has failed: for servers, whose work is elsewhere.
    pub(crate) fn serve_until_released(&self) -> Result<(), Failure> {
        let mut inbox = self.inbox();
        loop {
            if inbox.released {
                return Ok(());
            }
            if let Some(failure) = self.status.failure() {
                return Err(failure);
            }
            inbox = self.arrived.wait_timeout(inbox, TICK).expect("no holder panics").0;
        }
    }

    fn wait<T>(&self, ready: impl FnMut(&mut Inbox) -> Option<T>, what: &str) -> Result<T, Failure> {
        self.wait_longer(ready, what, Duration::ZERO)
    }

    fn wait_longer<T>(
        &self,
        mut ready: impl FnMut(&mut Inbox) -> Option<T>,
        what: &str,
        more: Duration,
    ) -> Result<T, Failure> {
        // The coordinator names the late worker after one ROUND; waiting longer here leaves it the first word.
        let limit = ROUND + self.placement.rejoin + HEARTBEAT * 2 + more;
        let deadline = Instant::now() + limit;
        let mut inbox = self.inbox();
        loop {
            if let Some(value) = ready(&mut inbox) {
                return Ok(value);
            }
            if let Some(failure) = self.status.failure() {
                return Err(failure);
            }
            if Instant::now() > deadline {
                let message = format!("no answer for {what} within {} s", limit.as_secs());
                return Err(self.failure(self.coordinator, FailureKind::Timeout, message));
            }
            inbox = self.arrived.wait_timeout(inbox, TICK).expect("no holder panics").0;
        }
    }
}

/// Why a call got no welcome.
enum CallError {
    Failed(Failure),
    Connection(ConnectionError),
}

impl From<ConnectionError> for CallError {
    fn from(error: ConnectionError) -> Self {
        CallError::Connection(error)
    }
}
