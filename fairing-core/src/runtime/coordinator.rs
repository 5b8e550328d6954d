//! The one place that knows the whole run: who is there, what was first to fail, when it is complete.
//!
//! It lives beside parameter server 0. One thread owns the state and takes [`Event`]s; each control connection has a
//! thread that reads and forwards. What several replicas report of one failure is told apart by order of receipt: the
//! first is the cause, the rest follows from it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::parameter_server::seconds;
use super::status::RunStatus;
use crate::observe::metrics::Merger;
use crate::protocol::connection::{Connection, ConnectionError, at_most};
use crate::protocol::deadline::{FAREWELL, HEARTBEAT, JOIN, KEEP_RESULT, LEASE, ROUND, STALL, TICK};
use crate::protocol::failure::{Failure, FailureKind};
use crate::protocol::frame::Kind;
use crate::protocol::message::{Finished, FromCoordinator, Position, Report, Speaker, ToCoordinator};
use crate::topology::{Replica, Role, Topology};

/// What happens to the coordinator.
pub(crate) enum Event {
    /// A replica or the caller said hello; the connection is for answering.
    Connected { source: Source, connection: Connection, heard: Heard },
    /// It said something; rank 0's `Finished` comes with its model.
    Said { source: Source, message: ToCoordinator, model: Option<Vec<u8>> },
    /// Its connection ended.
    Gone { source: Source, why: ConnectionError },
}

/// A connection and who speaks on it. Two connections may claim one speaker; only the first is listened to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) speaker: Speaker,
    pub(crate) connection: u64,
}

/// When something was last heard on a connection. The thread that reads it writes this, so that a coordinator that is kept
/// waiting by one peer does not take the others for silent.
#[derive(Clone)]
pub(crate) struct Heard(Arc<Mutex<Instant>>);

impl Heard {
    pub(crate) fn now() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    fn renew(&self) {
        *self.0.lock().expect("no holder panics") = Instant::now();
    }

    fn ago(&self) -> Duration {
        self.0.lock().expect("no holder panics").elapsed()
    }
}

/// Events that may wait; a thread that brings more waits itself, so a fast worker cannot fill the memory.
const QUEUE: usize = 1024;

/// Events kept for a caller that has not connected yet; older progress is worth nothing by then.
const BACKLOG: usize = 10_000;

/// Collectives that may be open at once: a worker waits for each, so an honest run has one, or two while answers travel.
const OPEN_GATHERS: usize = 4;

pub(crate) fn queue() -> (SyncSender<Event>, Receiver<Event>) {
    sync_channel(QUEUE)
}

/// Reads one control connection and forwards what it says, until it ends.
pub(crate) fn forward(source: Source, mut connection: Connection, heard: &Heard, events: &SyncSender<Event>) {
    // Silence is judged by the coordinator, which knows leases; here it only ends with the connection.
    let patience = |_| Ok(());
    let why = loop {
        let message = match connection.receive(&patience) {
            Ok(message) => message,
            Err(why) => break why,
        };
        heard.renew();
        let finished = matches!(message, ToCoordinator::Finished(_));
        let model = if finished && source.speaker == Speaker::Replica(Replica::worker(0)) {
            match connection.receive_frame(Kind::Model, &at_most(STALL)) {
                Ok(model) => Some(model),
                Err(why) => break why,
            }
        } else {
            None
        };
        if events.send(Event::Said { source, message, model }).is_err() {
            return;
        }
    };
    // Nobody listens any more once the run is over.
    let _ = events.send(Event::Gone { source, why });
}

/// What the coordinator knows of one replica.
struct Member {
    connection: Connection,
    number: u64,
    heard: Heard,
    finished: Option<Finished>,
    /// It has been released or told of the failure: its connection may end.
    dismissed: bool,
}

/// State of the coordinator.
pub(crate) struct Coordinator {
    topology: Topology,
    status: Arc<RunStatus>,
    position: Position,
    members: BTreeMap<Replica, Member>,
    caller: Option<(u64, Connection)>,
    backlog: VecDeque<FromCoordinator>,
    merger: Merger,
    gathers: HashMap<u64, Gather>,
    training: bool,
    model: Option<Vec<u8>>,
    started: Instant,
    first_finished: Option<Instant>,
    checked: Instant,
}

struct Gather {
    parts: Vec<Option<Vec<u8>>>,
    since: Instant,
}

impl Coordinator {
    pub(crate) fn new(topology: Topology, status: Arc<RunStatus>, position: Position) -> Self {
        Self {
            topology,
            status,
            position,
            members: BTreeMap::new(),
            caller: None,
            backlog: VecDeque::new(),
            merger: Merger::new(topology.worker_count()),
            gathers: HashMap::new(),
            training: false,
            model: None,
            started: Instant::now(),
            first_finished: None,
            checked: Instant::now(),
        }
    }

    /// Runs until the result has been fetched, or everyone knows why there is none.
    pub(crate) fn run(mut self, events: &Receiver<Event>) -> Result<(), Failure> {
        let outcome = self.train(events);
        match &outcome {
            Ok(()) => self.hand_over(events),
            Err(failure) => self.announce(failure, events),
        }
        outcome
    }

    fn train(&mut self, events: &Receiver<Event>) -> Result<(), Failure> {
        while !self.is_complete() {
            match events.recv_timeout(TICK.min(HEARTBEAT)) {
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("the acceptor holds a sender"),
            }
            self.check_waits();
            if let Some(failure) = self.status.failure() {
                return Err(failure);
            }
        }
        self.compare_models()
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Connected {
                source: Source { speaker: Speaker::Caller, connection: number }, connection, ..
            } => {
                self.welcome_caller(number, connection);
            }
            Event::Connected {
                source: Source { speaker: Speaker::Replica(replica), connection: number },
                connection,
                heard,
            } => {
                self.welcome(replica, Member { connection, number, heard, finished: None, dismissed: false });
            }
            // Of a connection that was refused.
            Event::Said { source, .. } | Event::Gone { source, .. } if !self.knows(source) => {}
            Event::Said { source: Source { speaker: Speaker::Caller, .. }, message: ToCoordinator::Stop, .. } => {
                self.status.stop();
            }
            Event::Said { source: Source { speaker: Speaker::Caller, .. }, .. } => {}
            Event::Said { source: Source { speaker: Speaker::Replica(replica), .. }, message, model } => {
                self.listen(replica, message, model);
            }
            Event::Gone { source: Source { speaker: Speaker::Caller, .. }, .. } => self.caller = None,
            Event::Gone { source: Source { speaker: Speaker::Replica(replica), .. }, why } => {
                let kind = match why {
                    ConnectionError::Protocol(_) => FailureKind::Protocol,
                    _ => FailureKind::Lost,
                };
                let ended = self.members.get(&replica).is_none_or(|member| member.dismissed);
                if !ended {
                    self.fail(replica, kind, "its connection ended without a goodbye".to_owned());
                }
            }
        }
    }

    /// Whether this is the connection that its speaker was welcomed on.
    fn knows(&self, source: Source) -> bool {
        let welcomed = match source.speaker {
            Speaker::Caller => self.caller.as_ref().map(|(number, _)| *number),
            Speaker::Replica(replica) => self.members.get(&replica).map(|member| member.number),
        };
        welcomed == Some(source.connection)
    }

    fn fail(&mut self, replica: Replica, kind: FailureKind, message: String) {
        let round = self.training.then_some(self.position.round);
        self.status.fail(Failure { replica, kind, message, round });
    }

    fn welcome(&mut self, replica: Replica, mut member: Member) {
        if self.members.contains_key(&replica) {
            let reason = format!("{replica} is already part of this run");
            let _ = member.connection.send(&FromCoordinator::Refused { reason });
            return;
        }
        // A connection that broke at once is noticed by its reader.
        let _ = member.connection.send(&FromCoordinator::Welcome { position: self.position });
        self.members.insert(replica, member);
        self.tell_caller(FromCoordinator::Joined(replica));
    }

    fn welcome_caller(&mut self, number: u64, mut connection: Connection) {
        if self.caller.is_some() {
            let reason = "another caller watches this run".to_owned();
            let _ = connection.send(&FromCoordinator::Refused { reason });
            return;
        }
        let _ = connection.send(&FromCoordinator::Welcome { position: self.position });
        self.caller = Some((number, connection));
        for message in std::mem::take(&mut self.backlog) {
            self.tell_caller(message);
        }
    }

    fn tell_caller(&mut self, message: FromCoordinator) {
        if let Some((_, caller)) = &mut self.caller {
            if caller.send(&message).is_ok() {
                return;
            }
            // Of a message that was written in part the rest cannot follow; the caller comes back on a new connection.
            caller.shutdown();
            self.caller = None;
        }
        if self.backlog.len() >= BACKLOG {
            let progress = self.backlog.iter().position(|old| matches!(old, FromCoordinator::Progress(_)));
            self.backlog.remove(progress.unwrap_or(0));
        }
        self.backlog.push_back(message);
    }

    fn listen(&mut self, replica: Replica, message: ToCoordinator, model: Option<Vec<u8>>) {
        match message {
            ToCoordinator::Report(report) => self.report(replica, report),
            ToCoordinator::Gather { sequence, part } => self.gather(replica, sequence, part),
            ToCoordinator::Failed(failure) => drop(self.status.fail(failure)),
            ToCoordinator::Finished(finished) if replica.role == Role::Worker => {
                self.first_finished.get_or_insert_with(Instant::now);
                self.model = model.or(self.model.take());
                if let Some(member) = self.members.get_mut(&replica) {
                    member.finished = Some(finished);
                }
            }
            ToCoordinator::Finished(_) | ToCoordinator::Stop | ToCoordinator::Acknowledged => {
                self.fail(replica, FailureKind::Protocol, "a message that it must not send".to_owned());
            }
        }
    }

    fn report(&mut self, replica: Replica, report: Report) {
        if replica.role != Role::Worker {
            return;
        }
        if let Some(progress) = report.progress {
            if !std::mem::replace(&mut self.training, true) {
                self.tell_caller(FromCoordinator::Training);
            }
            self.tell_caller(FromCoordinator::Progress(progress));
        }
        if report.position.round > self.position.round {
            self.position = report.position;
        }
        if report.metrics.iter().any(|point| point.rank != replica.rank) {
            return self.fail(replica, FailureKind::Protocol, "a metric in another worker's name".to_owned());
        }
        for point in report.metrics {
            self.merger.push(point);
        }
        if let Some(last) = report.rounds_done.checked_sub(1) {
            for metric in self.merger.round_done(replica.rank, last) {
                self.tell_caller(FromCoordinator::Metric(metric));
            }
        }
    }

    fn gather(&mut self, replica: Replica, sequence: u64, part: Vec<u8>) {
        if replica.role != Role::Worker {
            return;
        }
        if !self.gathers.contains_key(&sequence) && self.gathers.len() >= OPEN_GATHERS {
            let message = format!("collective {sequence} while {OPEN_GATHERS} others are open");
            return self.fail(replica, FailureKind::Protocol, message);
        }
        let workers = self.topology.worker_count();
        let gather = self
            .gathers
            .entry(sequence)
            .or_insert_with(|| Gather { parts: vec![None; workers], since: Instant::now() });
        gather.parts[replica.rank.index()] = Some(part);
        if gather.parts.iter().all(Option::is_some) {
            let gather = self.gathers.remove(&sequence).expect("looked at just now");
            let parts = gather.parts.into_iter().flatten().map(Into::into).collect();
            let answer = FromCoordinator::Gathered { sequence, parts };
            let mut too_long = None;
            for (_, worker) in self.members.iter_mut().filter(|(member, _)| member.role == Role::Worker) {
                // A broken connection is noticed by its reader.
                if let Err(ConnectionError::Protocol(reason)) = worker.connection.send(&answer) {
                    too_long = Some(reason);
                }
            }
            if let Some(reason) = too_long {
                let message = format!("the workers' numbers in one `sum` or state are too many: {reason}");
                self.fail(replica, FailureKind::Configuration, message);
            }
        }
    }

    /// Finds leases that have run out and waits that take too long, and says who is missing.
    fn check_waits(&mut self) {
        let missing: Vec<Replica> =
            self.topology.replicas().filter(|replica| !self.members.contains_key(replica)).collect();
        if let Some(first) = missing.first()
            && self.started.elapsed() > JOIN
        {
            let names = missing.iter().map(Replica::to_string).collect::<Vec<_>>().join(", ");
            let message = format!("no word from {names} within {} of the start", seconds(JOIN));
            return self.fail(*first, FailureKind::Timeout, message);
        }
        if std::mem::replace(&mut self.checked, Instant::now()).elapsed() > LEASE / 2 {
            // This process itself was kept from working, perhaps with the whole machine: what was sent meanwhile is still unread.
            self.members.values().for_each(|member| member.heard.renew());
        }
        let present = self.members.iter().filter(|(_, member)| !member.dismissed);
        let longest = present.max_by_key(|(_, member)| member.heard.ago());
        if let Some((&replica, _)) = longest.filter(|(_, member)| member.heard.ago() > LEASE) {
            let message = format!("nothing was heard of it for {} (frozen, or its machine is)", seconds(LEASE));
            return self.fail(replica, FailureKind::Lost, message);
        }
        let overdue = self.gathers.values().find(|gather| gather.since.elapsed() > ROUND);
        if let Some(rank) = overdue.and_then(|gather| gather.parts.iter().position(Option::is_none)) {
            let message = format!("the others waited {} for its part of `evaluate` or `sum`", seconds(ROUND));
            return self.fail(Replica::worker(rank as u32), FailureKind::Timeout, message);
        }
        if self.first_finished.is_some_and(|since| since.elapsed() > ROUND) {
            let late = self.workers().find(|(_, member)| member.finished.is_none()).map(|(replica, _)| *replica);
            if let Some(replica) = late {
                let message = format!("it did not return from `train` within {} of the first worker", seconds(ROUND));
                self.fail(replica, FailureKind::Timeout, message);
            }
        }
    }

    fn workers(&self) -> impl Iterator<Item = (&Replica, &Member)> {
        self.members.iter().filter(|(replica, _)| replica.role == Role::Worker)
    }

    fn is_complete(&self) -> bool {
        self.members.len() == self.topology.replicas().count()
            && self.workers().all(|(_, member)| member.finished.is_some())
    }

    fn compare_models(&self) -> Result<(), Failure> {
        let finished = |(replica, member): (&Replica, &Member)| Some((*replica, member.finished.clone()?));
        let mut all = self.workers().filter_map(finished);
        let Some((_, first)) = all.next() else { return Ok(()) };
        for (replica, other) in all {
            let message = if other.rounds != first.rounds {
                format!(
                    "it made {} steps, worker 0 made {}; all workers must step equally often",
                    other.rounds, first.rounds
                )
            } else if other.digest != first.digest {
                "its model differs from worker 0's at the end; `train` must return the model that `worker.step` gave, and \
                 state such as running means is averaged only inside `worker.epochs` and `batches`, and must not move in `evaluate` (use \
                 `model.valid()` on the device without gradients there)"
                    .to_owned()
            } else {
                continue;
            };
            return Err(Failure { replica, kind: FailureKind::Diverged, message, round: Some(other.rounds) });
        }
        Ok(())
    }

    /// Releases the replicas and gives the result to the caller.
    fn hand_over(&mut self, events: &Receiver<Event>) {
        for metric in self.merger.finish() {
            self.tell_caller(FromCoordinator::Metric(metric));
        }
        for member in self.members.values_mut() {
            member.dismissed = true;
            let _ = member.connection.send(&FromCoordinator::Released);
        }
        let rounds = self.workers().find_map(|(_, member)| Some(member.finished.as_ref()?.rounds)).unwrap_or(0);
        self.tell_caller(FromCoordinator::Complete { rounds, stopped: self.status.is_stopping() });
        let model = self.model.take().unwrap_or_default();
        let mut sent = false;
        let deadline = Instant::now() + KEEP_RESULT;
        loop {
            if let Some((_, caller)) = &mut self.caller
                && !std::mem::replace(&mut sent, true)
            {
                let _ = caller.send_frame(Kind::Model, &model);
            }
            match self.next_after_the_end(events, deadline) {
                None => return,
                Some(event) if self.is_farewell(&event) => return,
                Some(event) => self.handle(event),
            }
        }
    }

    /// Tells everyone the cause and waits a moment until they have heard it.
    fn announce(&mut self, failure: &Failure, events: &Receiver<Event>) {
        for metric in self.merger.finish() {
            self.tell_caller(FromCoordinator::Metric(metric));
        }
        self.tell_caller(FromCoordinator::RunFailed(failure.clone()));
        for member in self.members.values_mut() {
            member.dismissed = true;
            let _ = member.connection.send(&FromCoordinator::RunFailed(failure.clone()));
        }
        let deadline = Instant::now() + FAREWELL;
        loop {
            match self.next_after_the_end(events, deadline) {
                None => return,
                Some(event) if self.is_farewell(&event) => return,
                Some(Event::Connected {
                    source: Source { speaker: Speaker::Replica(_), .. }, mut connection, ..
                }) => {
                    let _ = connection.send(&FromCoordinator::RunFailed(failure.clone()));
                }
                Some(event @ Event::Connected { .. }) => self.handle(event),
                Some(_) => {}
            }
        }
    }

    /// Whether the caller has what it came for, or does not want it any more.
    fn is_farewell(&self, event: &Event) -> bool {
        match event {
            Event::Said { source, message: ToCoordinator::Acknowledged, .. } | Event::Gone { source, .. } => {
                source.speaker == Speaker::Caller && self.knows(*source)
            }
            _ => false,
        }
    }

    fn next_after_the_end(&self, events: &Receiver<Event>, deadline: Instant) -> Option<Event> {
        events.recv_timeout(deadline.saturating_duration_since(Instant::now()).max(Duration::ZERO)).ok()
    }
}
