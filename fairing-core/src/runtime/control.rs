//! A replica's side of its control connection: reports, collectives, and the word that the run is over.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Instant;

use serde_bytes::ByteBuf;

use super::status::RunStatus;
use crate::observe::events::Progress;
use crate::observe::metrics::MetricPoint;
use crate::protocol::connection::{Connection, ConnectionError, at_most};
use crate::protocol::deadline::{HEARTBEAT, HELLO, JOIN, REPORT, ROUND, TICK};
use crate::protocol::failure::{Failure, FailureKind};
use crate::protocol::message::{FromCoordinator, Hello, Position, Purpose, Report, Speaker, ToCoordinator};
use crate::protocol::transport::{Transport, connect_patiently};
use crate::topology::{Address, Placement, Replica};

/// Metrics that may wait for the next report; a worker that brings more waits until they are sent.
const OUTBOX: usize = 4096;

/// A replica's connection to the coordinator.
pub(crate) struct Control {
    replica: Replica,
    coordinator: Replica,
    status: Arc<RunStatus>,
    writer: Mutex<Connection>,
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    outbox: Mutex<Report>,
    wanted: Condvar,
}

#[derive(Default)]
struct Inbox {
    gathered: HashMap<u64, Vec<ByteBuf>>,
    released: bool,
}

/// Opens a connection to a server and says hello on it.
pub(crate) fn open(
    transport: &dyn Transport,
    address: &Address,
    hello: &Hello,
    waiting: &dyn Fn() -> std::io::Result<()>,
) -> Result<Connection, ConnectionError> {
    let stream =
        connect_patiently(transport, address, Instant::now() + JOIN, waiting).map_err(ConnectionError::Broken)?;
    let mut connection = Connection::new(stream);
    connection.send(hello)?;
    Ok(connection)
}

impl Control {
    /// Connects to the coordinator, and starts the threads that listen to it and report to it.
    ///
    /// # Errors
    ///
    /// A [`Failure`] of the coordinator if it cannot be reached, or of this replica if it is refused.
    pub(crate) fn connect(
        placement: &Placement,
        transport: &dyn Transport,
        status: &Arc<RunStatus>,
    ) -> Result<(Arc<Self>, Position), Failure> {
        let (replica, coordinator) = (placement.replica, placement.topology.coordinator());
        let failure = |replica, kind, message| Failure { replica, kind, message, round: None };
        let hello = Hello { run: placement.run.clone(), speaker: Speaker::Replica(replica), purpose: Purpose::Control };
        let lost = |error: ConnectionError| {
            failure(coordinator, FailureKind::Lost, format!("{replica} cannot reach the coordinator: {error}"))
        };
        let mut reader = open(transport, &placement.servers[0], &hello, &|| Ok(())).map_err(lost)?;
        let position = match reader.receive(&at_most(HELLO)).map_err(lost)? {
            FromCoordinator::Welcome { position } => position,
            FromCoordinator::Refused { reason } => return Err(failure(replica, FailureKind::Protocol, reason)),
            FromCoordinator::RunFailed(failure) => return Err(failure),
            other => {
                return Err(failure(coordinator, FailureKind::Protocol, format!("{other:?} instead of a welcome")));
            }
        };
        let writer = reader.try_clone().map_err(|error| lost(ConnectionError::Broken(error)))?;
        let control = Arc::new(Self {
            replica,
            coordinator,
            status: status.clone(),
            writer: Mutex::new(writer),
            inbox: Mutex::default(),
            arrived: Condvar::new(),
            outbox: Mutex::default(),
            wanted: Condvar::new(),
        });
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

    /// Breaks the connection, as the death of the process would.
    #[cfg(test)]
    pub(crate) fn break_connection(&self) {
        self.writer.lock().expect("no holder panics").shutdown();
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().expect("no holder panics")
    }

    fn outbox(&self) -> MutexGuard<'_, Report> {
        self.outbox.lock().expect("no holder panics")
    }

    fn listen(&self, mut reader: Connection) {
        // The coordinator speaks only when it has something to say; that it lives is seen by the open connection.
        let patience = |_| Ok(());
        loop {
            match reader.receive(&patience) {
                Ok(FromCoordinator::Gathered { sequence, parts }) => {
                    self.inbox().gathered.insert(sequence, parts);
                }
                Ok(FromCoordinator::RunFailed(failure)) => drop(self.status.fail(failure)),
                Ok(FromCoordinator::Released) => self.inbox().released = true,
                Ok(other) => self.lost_coordinator(FailureKind::Protocol, format!("an unexpected {other:?}")),
                Err(ConnectionError::Protocol(what)) => self.lost_coordinator(FailureKind::Protocol, what),
                Err(_) if self.inbox().released => {}
                Err(error) => self.lost_coordinator(FailureKind::Lost, format!("{error}, as {} saw it", self.replica)),
            }
            self.arrived.notify_all();
            if self.inbox().released || self.status.failure().is_some() {
                self.wanted.notify_all();
                return;
            }
        }
    }

    fn lost_coordinator(&self, kind: FailureKind, message: String) {
        self.status.fail(Failure { replica: self.coordinator, kind, message, round: None });
    }

    /// Sends the outbox if there is something new, a sign of life otherwise. `false` once nobody listens.
    fn report_when_due(&self) -> bool {
        let is_empty = |report: &mut Report| report.progress.is_none() && report.metrics.is_empty();
        {
            let outbox = self.outbox();
            let (outbox, _) = self.wanted.wait_timeout_while(outbox, HEARTBEAT, is_empty).expect("no holder panics");
            drop(outbox);
        }
        if self.inbox().released || self.status.failure().is_some() || self.flush().is_err() {
            return false;
        }
        // Let reports fill, but not so long that a view seems to stand still.
        std::thread::sleep(REPORT);
        true
    }

    /// Sends what is in the outbox now.
    pub(crate) fn flush(&self) -> Result<(), ConnectionError> {
        // The writer is locked first, so that reports leave in the order in which they were taken.
        let mut writer = self.writer.lock().expect("no holder panics");
        let report = {
            let mut outbox = self.outbox();
            let (rounds_done, position) = (outbox.rounds_done, outbox.position);
            std::mem::replace(&mut *outbox, Report { rounds_done, position, ..Report::default() })
        };
        writer.send(&ToCoordinator::Report(report))
    }

    /// Leaves a metric for the next report.
    pub(crate) fn metric(&self, point: MetricPoint) {
        let is_full = {
            let mut outbox = self.outbox();
            outbox.metrics.push(point);
            outbox.metrics.len() >= OUTBOX
        };
        if is_full {
            // A broken connection is noticed by the reader.
            let _ = self.flush();
        }
    }

    /// Leaves the newest progress for the next report.
    pub(crate) fn progress(&self, progress: Progress, position: Position) {
        let was_empty = {
            let mut outbox = self.outbox();
            outbox.position = position;
            outbox.progress.replace(progress).is_none()
        };
        if was_empty {
            self.wanted.notify_all();
        }
    }

    /// Says that rounds before this one get no more metrics.
    pub(crate) fn rounds_done(&self, rounds: u64) {
        self.outbox().rounds_done = rounds;
    }

    /// Sends a message after everything that was left for reports.
    pub(crate) fn say(&self, message: &ToCoordinator) -> Result<(), ConnectionError> {
        self.flush()?;
        self.writer.lock().expect("no holder panics").send(message)
    }

    /// Sends `message` and then a payload of its own.
    pub(crate) fn say_with(
        &self,
        message: &ToCoordinator,
        kind: crate::protocol::frame::Kind,
        payload: &[u8],
    ) -> Result<(), ConnectionError> {
        self.flush()?;
        let mut writer = self.writer.lock().expect("no holder panics");
        writer.send(message)?;
        writer.send_frame(kind, payload)
    }

    /// One collective: every worker's part, in rank order.
    pub(crate) fn gather(&self, sequence: u64, part: Vec<u8>) -> Result<Vec<ByteBuf>, Failure> {
        // A broken connection is noticed by the reader, which records the failure that ends the wait.
        if let Err(ConnectionError::Protocol(reason)) = self.say(&ToCoordinator::Gather { sequence, part }) {
            let message = format!("too many numbers in one `sum` or state: {reason}");
            return Err(Failure { replica: self.replica, kind: FailureKind::Configuration, message, round: None });
        }
        self.wait(|inbox| inbox.gathered.remove(&sequence), "a collective")
    }

    /// Waits until the coordinator says that the run is complete.
    pub(crate) fn wait_until_released(&self) -> Result<(), Failure> {
        self.wait(|inbox| inbox.released.then_some(()), "the end of the run")
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

    fn wait<T>(&self, mut ready: impl FnMut(&mut Inbox) -> Option<T>, what: &str) -> Result<T, Failure> {
        // The coordinator names the late worker after one ROUND; waiting longer here leaves it the first word.
        let deadline = Instant::now() + ROUND + HEARTBEAT * 2;
        let mut inbox = self.inbox();
        loop {
            if let Some(value) = ready(&mut inbox) {
                return Ok(value);
            }
            if let Some(failure) = self.status.failure() {
                return Err(failure);
            }
            if Instant::now() > deadline {
                let message = format!("no answer for {what} within {} s", ROUND.as_secs());
                let (replica, kind) = (self.coordinator, FailureKind::Timeout);
                return Err(Failure { replica, kind, message, round: None });
            }
            inbox = self.arrived.wait_timeout(inbox, TICK).expect("no holder panics").0;
        }
    }
}
