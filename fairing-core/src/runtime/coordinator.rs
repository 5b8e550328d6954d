//! The one place that knows the whole run: who is there, what was first to fail, when it is complete.
//!
//! It lives beside parameter server 0. One thread owns the state and takes [`Event`]s; each control connection has a
//! thread that reads and forwards. What several replicas report of one failure is told apart by order of receipt: the
//! first is the cause, the rest follows from it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
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
    Connected { speaker: Speaker, connection: Connection },
    /// It said something; rank 0's `Finished` comes with its model.
    Said { speaker: Speaker, message: ToCoordinator, model: Option<Vec<u8>> },
    /// Its connection ended.
    Gone { speaker: Speaker, why: ConnectionError },
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
pub(crate) fn forward(speaker: Speaker, mut connection: Connection, events: &SyncSender<Event>) {
    // Silence is judged by the coordinator, which knows leases; here it only ends with the connection.
    let patience = |_| Ok(());
    let why = loop {
        let message = match connection.receive(&patience) {
            Ok(message) => message,
            Err(why) => break why,
        };
        let finished = matches!(message, ToCoordinator::Finished(_));
        let model = if finished && speaker == Speaker::Replica(Replica::worker(0)) {
            match connection.receive_frame(Kind::Model, &at_most(STALL)) {
                Ok(model) => Some(model),
                Err(why) => break why,
            }
        } else {
            None
        };
        if events.send(Event::Said { speaker, message, model }).is_err() {
            return;
        }
    };
    // Nobody listens any more once the run is over.
    let _ = events.send(Event::Gone { speaker, why });
}

/// What the coordinator knows of one replica.
struct Member {
    connection: Connection,
    heard: Instant,
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
    caller: Option<Connection>,
    caller_came: bool,
    backlog: VecDeque<FromCoordinator>,
    merger: Merger,
    gathers: HashMap<u64, Gather>,
    training: bool,
    model: Option<Vec<u8>>,
    started: Instant,
    first_finished: Option<Instant>,
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
            caller_came: false,
            backlog: VecDeque::new(),
            merger: Merger::new(topology.worker_count()),
            gathers: HashMap::new(),
            training: false,
            model: None,
            started: Instant::now(),
            first_finished: None,
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
            Event::Connected { speaker: Speaker::Caller, connection } => self.welcome_caller(connection),
            Event::Connected { speaker: Speaker::Replica(replica), connection } => self.welcome(replica, connection),
            Event::Said { speaker: Speaker::Caller, message: ToCoordinator::Stop, .. } => self.status.stop(),
            Event::Said { speaker: Speaker::Caller, .. } => {}
            Event::Said { speaker: Speaker::Replica(replica), message, model } => {
                if let Some(member) = self.members.get_mut(&replica) {
                    member.heard = Instant::now();
                }
                self.listen(replica, message, model);
            }
            Event::Gone { speaker: Speaker::Caller, .. } => self.caller = None,
            Event::Gone { speaker: Speaker::Replica(replica), why } => {
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

    fn fail(&mut self, replica: Replica, kind: FailureKind, message: String) {
        let round = self.training.then_some(self.position.round);
        self.status.fail(Failure { replica, kind, message, round });
    }

    fn welcome(&mut self, replica: Replica, mut connection: Connection) {
        if self.members.contains_key(&replica) {
            let reason = format!("{replica} is already part of this run");
            let _ = connection.send(&FromCoordinator::Refused { reason });
            return;
        }
        // A connection that broke at once is noticed by its reader.
        let _ = connection.send(&FromCoordinator::Welcome { position: self.position });
        let member = Member { connection, heard: Instant::now(), finished: None, dismissed: false };
        self.members.insert(replica, member);
        self.tell_caller(FromCoordinator::Joined(replica));
    }

    fn welcome_caller(&mut self, mut connection: Connection) {
        if self.caller.is_some() {
            let reason = "another caller watches this run".to_owned();
            let _ = connection.send(&FromCoordinator::Refused { reason });
            return;
        }
        let _ = connection.send(&FromCoordinator::Welcome { position: self.position });
        self.caller = Some(connection);
        self.caller_came = true;
        for message in std::mem::take(&mut self.backlog) {
            self.tell_caller(message);
        }
    }

    fn tell_caller(&mut self, message: FromCoordinator) {
        match &mut self.caller {
            // A broken connection is noticed by its reader.
            Some(caller) => drop(caller.send(&message)),
            None if self.backlog.len() < BACKLOG => self.backlog.push_back(message),
            None => {
                let progress = self.backlog.iter().position(|old| matches!(old, FromCoordinator::Progress(_)));
                self.backlog.remove(progress.unwrap_or(0));
                self.backlog.push_back(message);
            }
        }
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
        self.position.round = self.position.round.max(report.rounds_done);
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
            let parts = gather.parts.into_iter().flatten().collect();
            let answer = FromCoordinator::Gathered { sequence, parts };
            for (_, worker) in self.members.iter_mut().filter(|(member, _)| member.role == Role::Worker) {
                let _ = worker.connection.send(&answer);
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
        let silent = self.members.iter().find(|(_, member)| !member.dismissed && member.heard.elapsed() > LEASE);
        if let Some((&replica, _)) = silent {
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
                 state such as running means is averaged only inside `worker.epochs` and `batches`"
                    .to_owned()
            } else {
                continue;
            };
            return Err(Failure { replica, kind: FailureKind::Layout, message, round: Some(other.rounds) });
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
            if let Some(caller) = &mut self.caller
                && !std::mem::replace(&mut sent, true)
            {
                let _ = caller.send_frame(Kind::Model, &model);
            }
            match self.next_after_the_end(events, deadline) {
                Some(Event::Said { speaker: Speaker::Caller, message: ToCoordinator::Acknowledged, .. })
                | Some(Event::Gone { speaker: Speaker::Caller, .. })
                | None => return,
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
                Some(Event::Said { speaker: Speaker::Caller, message: ToCoordinator::Acknowledged, .. })
                | Some(Event::Gone { speaker: Speaker::Caller, .. })
                | None => return,
                Some(Event::Connected { speaker: Speaker::Replica(_), mut connection }) => {
                    let _ = connection.send(&FromCoordinator::RunFailed(failure.clone()));
                }
                Some(event @ Event::Connected { .. }) => self.handle(event),
                Some(_) => {}
            }
        }
    }

    fn next_after_the_end(&self, events: &Receiver<Event>, deadline: Instant) -> Option<Event> {
        events.recv_timeout(deadline.saturating_duration_since(Instant::now()).max(Duration::ZERO)).ok()
    }
}
