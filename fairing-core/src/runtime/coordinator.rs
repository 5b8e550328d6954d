//! The one place that knows the whole run: who is there, what was first to fail, when it is complete.
//!
//! It lives beside the server of the first share. One thread owns the state and takes [`Event`]s; each control connection has a
//! thread that reads and forwards. What several replicas report of one failure is told apart by order of receipt: the
//! first is the cause, the rest follows from it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::history::{HISTORY_BYTES, History};
use super::parameter_server::seconds;
use super::status::RunStatus;
use serde_bytes::ByteBuf;

use crate::observe::events::Progress;
use crate::observe::metrics::Merger;
use crate::protocol::connection::{Connection, ConnectionError, at_most};
use crate::protocol::deadline::{FAREWELL, HEARTBEAT, LEASE, RECONNECT, ROUND, STALL, TICK};
use crate::protocol::failure::{Failure, FailureKind, TOLD_TO_END};
use crate::protocol::frame::Kind;
use crate::protocol::message::{
    CollectiveKey, Finished, FromCoordinator, Group, Incarnation, Numbered, Pace, Position, Report, Seat, SeatState,
    Speaker, ToCoordinator, WorkerEnd,
};
use crate::topology::{Mode, Placement, Replica, Role, Topology};

/// What happens to the coordinator.
pub(crate) enum Event {
    /// A replica said hello; the connection is for answering.
    Connected { source: Source, incarnation: Incarnation, connection: Connection, heard: Heard },
    /// The caller did, who has been told everything up to the message of this number.
    Called { source: Source, incarnation: Incarnation, connection: Connection, told: u64 },
    /// It said something; a model comes with the bytes of its files.
    Said { source: Source, message: Box<Numbered>, files: Option<ModelFiles> },
    /// Its connection ended.
    Gone { source: Source, why: ConnectionError },
}

/// The trained model as it comes home.
pub(crate) struct ModelFiles {
    model: Vec<Vec<u8>>,
    /// As safetensors; empty if the model cannot be written so.
    tensors: Vec<Vec<u8>>,
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

/// Processes that have been the caller and are told, if they come back, that they no longer are. They come back within
/// moments, or when their machine wakes up.
const REMEMBERED_CALLERS: usize = 64;

/// How long the coordinator speaks with a caller that has much to hear before it looks at what the replicas say again.
const BRIEFING: Duration = TICK.checked_div(4).expect("four is not zero");

/// Collectives that are remembered, open or complete, for a worker whose connection broke or that is started again. A worker
/// waits for each, so an honest run has one open, or two while answers travel.
const REMEMBERED_GATHERS: usize = 64;

/// Every how many messages of a replica it is told that they have been heard; fewer than a replica keeps.
const CONFIRM_EVERY: u64 = 8;

/// How long the coordinator waits for a peer that takes nothing of what it is told, before it hangs up. All others wait
/// meanwhile, and count as silent or give the coordinator up after a lease.
const SPEECH: Duration = HEARTBEAT;

/// Bytes of answers that are remembered for workers that ask again.
const REMEMBERED_BYTES: usize = 64 << 20;

/// Why a replica is lost whose process the caller saw end.
const PROCESS_ENDED: &str = "its process ended without a goodbye";

/// The least time between two warnings of one slow worker.
const SLOW_AGAIN: Duration = LEASE.checked_mul(6).expect("a minute");

pub(crate) fn queue() -> (SyncSender<Event>, Receiver<Event>) {
    sync_channel(QUEUE)
}

/// Reads one control connection and forwards what it says, until it ends.
pub(crate) fn forward(source: Source, mut connection: Connection, heard: &Heard, events: &SyncSender<Event>) {
    // Silence is judged by the coordinator, which knows leases; here it only ends with the connection.
    let patience = |_| Ok(());
    let why = loop {
        let message: Numbered = match connection.receive(&patience) {
            Ok(message) => message,
            Err(why) => break why,
        };
        heard.renew();
        let files = match &message.message {
            ToCoordinator::Model if matches!(source.speaker, Speaker::Replica(_)) => {
                // A large model takes longer than a lease, and reports wait behind it.
                let mut receive = |kind| connection.receive_pieces(kind, &at_most(STALL), &|| heard.renew());
                match receive(Kind::Model).and_then(|model| Ok(ModelFiles { model, tensors: receive(Kind::Tensors)? }))
                {
                    Ok(files) => Some(files),
                    Err(why) => break why,
                }
            }
            _ => None,
        };
        if events.send(Event::Said { source, message: Box::new(message), files }).is_err() {
            return;
        }
    };
    // Nobody listens any more once the run is over.
    let _ = events.send(Event::Gone { source, why });
}

/// What the coordinator knows of one replica.
struct Member {
    /// `None` while it is broken, since `absent`.
    connection: Option<Connection>,
    absent: Option<Instant>,
    number: u64,
    incarnation: Incarnation,
    heard: Heard,
    /// Number of the last message that was heard of this life.
    last_message: u64,
    finished: Option<Finished>,
    /// The caller has seen the process end.
    process_ended: bool,
    /// Lost since then; held for `rejoin`, or for good.
    lost: Option<Lost>,
    /// It has been released or told of the failure: its connection may end.
    dismissed: bool,
    /// It has heard that it is released.
    departed: bool,
    progress: Option<Progress>,
    pace: Pace,
    /// That of the process that it was before.
    pace_before: Pace,
    restarts: u32,
    restarted: Option<Instant>,
    /// The round that this life began with.
    began: Option<u64>,
    called_slow: Option<Instant>,
}

/// A worker that is lost without being the run's failure.
#[derive(Debug, Clone, Copy)]
struct Lost {
    since: Instant,
    /// Nobody waits for it any more.
    for_good: bool,
}

impl Member {
    fn new(incarnation: Incarnation) -> Self {
        Self {
            connection: None,
            absent: None,
            number: 0,
            incarnation,
            heard: Heard::now(),
            last_message: 0,
            finished: None,
            process_ended: false,
            lost: None,
            dismissed: false,
            departed: false,
            progress: None,
            pace: Pace::default(),
            pace_before: Pace::default(),
            restarts: 0,
            restarted: None,
            began: None,
            called_slow: None,
        }
    }

    /// Speaks if it is connected; a broken connection is noticed by its reader, and what matters is said again.
    ///
    /// A replica that takes nothing for a while is hung up on, so that the others do not wait for it. The error is that the
    /// message is too long.
    fn tell(&mut self, message: &FromCoordinator) -> Result<(), ConnectionError> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        match connection.send_patiently(message, &at_most(SPEECH)) {
            Err(error @ ConnectionError::Protocol(_)) => Err(error),
            Err(_) => {
                // What left in part cannot be gone on with; the replica calls again.
                connection.shutdown();
                self.connection = None;
                self.absent.get_or_insert_with(Instant::now);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Tells it that the run is complete.
    fn release(&mut self) {
        self.dismissed = true;
        let _ = self.tell(&FromCoordinator::Released);
    }

    /// Whether the run needs nothing of it any more.
    fn is_done(&self) -> bool {
        self.finished.is_some() || self.is_lost_for_good()
    }

    fn is_lost_for_good(&self) -> bool {
        self.lost.is_some_and(|lost| lost.for_good)
    }
}

/// The process that follows the run.
struct Caller {
    /// Of its connection.
    number: u64,
    incarnation: Incarnation,
    connection: Connection,
    /// The number of the last message that it was told.
    told: u64,
}

/// State of the coordinator.
pub(crate) struct Coordinator {
    topology: Topology,
    mode: Mode,
    rejoin: Duration,
    join: Duration,
    keep_result: Duration,
    /// Worker 0 is released last, and until then stays.
    first_stays: bool,
    status: Arc<RunStatus>,
    position: Position,
    members: BTreeMap<Replica, Member>,
    caller: Option<Caller>,
    /// Who was the caller last, and those who were before and must not come back.
    last_caller: Option<Incarnation>,
    replaced: VecDeque<Incarnation>,
    history: History,
    merger: Merger,
    gathers: BTreeMap<CollectiveKey, Gather>,
    /// The state that was averaged last, kept where a worker may be started again.
    last_state: Option<Vec<Option<ByteBuf>>>,
    training: bool,
    /// The worker whose model is wanted.
    bringer: Option<Replica>,
    model: Option<ModelFiles>,
    started: Instant,
    first_finished: Option<Instant>,
    checked: Instant,
    /// When the replicas were last told that the coordinator lives.
    signed: Instant,
}

struct Gather {
    /// Set with the answer: whether the run was to stop then.
    answered: Option<bool>,
    /// What has arrived of each rank; `None` within for one that has nothing to give.
    parts: Vec<Option<Option<ByteBuf>>>,
    since: Instant,
}

impl Gather {
    fn is_complete(&self) -> bool {
        self.answered.is_some()
    }

    fn bytes(&self) -> usize {
        self.parts.iter().flatten().flatten().map(|part| part.len()).sum()
    }
}

impl Coordinator {
    pub(crate) fn new(placement: &Placement, status: Arc<RunStatus>, position: Position) -> Self {
        let Placement { topology, mode, rejoin, join, keep_result, first_stays, .. } = *placement;
        Self {
            topology,
            mode,
            rejoin,
            join,
            keep_result,
            first_stays,
            status,
            position,
            members: BTreeMap::new(),
            caller: None,
            last_caller: None,
            replaced: VecDeque::new(),
            history: History::new(HISTORY_BYTES),
            merger: Merger::new(topology.worker_count()),
            gathers: BTreeMap::new(),
            last_state: None,
            training: false,
            bringer: None,
            model: None,
            started: Instant::now(),
            first_finished: None,
            checked: Instant::now(),
            signed: Instant::now(),
        }
    }

    /// Runs until the result has been fetched, or everyone knows why there is none.
    pub(crate) fn run(mut self, events: &Receiver<Event>) -> Result<(), Failure> {
        let outcome = self.train(events);
        match outcome {
            Ok(()) => self.hand_over(events),
            Err(failure) => {
                self.announce(&failure, events);
                Err(failure)
            }
        }
    }

    fn train(&mut self, events: &Receiver<Event>) -> Result<(), Failure> {
        loop {
            // What happens meanwhile is not to wait for a caller that has much to hear.
            let patience = if self.brief_caller() { TICK } else { Duration::ZERO };
            match events.recv_timeout(patience) {
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("the acceptor holds a sender"),
            }
            for _ in 1..QUEUE {
                // What comes behind a failure is for those who announce it.
                if self.status.failure().is_some() {
                    break;
                }
                let Ok(event) = events.try_recv() else { break };
                self.handle(event);
            }
            self.check_waits();
            if let Some(failure) = self.status.failure() {
                return Err(failure);
            }
            if self.have_finished() {
                self.compare_models()?;
                if self.model.is_some() {
                    return Ok(());
                }
                self.ask_for_the_model();
            }
        }
    }

    pub(crate) fn handle(&mut self, event: Event) {
        match event {
            Event::Called { source, incarnation, connection, told } => {
                self.welcome_caller(Caller { number: source.connection, incarnation, connection, told });
            }
            Event::Connected { source: Source { speaker: Speaker::Caller, .. }, .. } => {
                unreachable!("the door lets callers in as such")
            }
            Event::Connected {
                source: Source { speaker: Speaker::Replica(replica), connection: number },
                incarnation,
                connection,
                heard,
            } => {
                self.welcome(replica, incarnation, number, connection, heard);
            }
            // Of a connection that was refused, or replaced.
            Event::Said { source, .. } | Event::Gone { source, .. } if !self.knows(source) => {}
            Event::Said { source: Source { speaker: Speaker::Caller, .. }, message, .. } => match message.message {
                ToCoordinator::Stop => self.status.stop(),
                ToCoordinator::Ended(replica) => self.process_ended(replica),
                _ => {}
            },
            Event::Said { source: Source { speaker: Speaker::Replica(replica), .. }, message, files } => {
                self.listen(replica, *message, files);
            }
            Event::Gone { source: Source { speaker: Speaker::Caller, .. }, .. } => self.caller = None,
            Event::Gone { source: Source { speaker: Speaker::Replica(replica), .. }, why } => {
                let Some(member) = self.members.get_mut(&replica) else { return };
                member.connection = None;
                if member.dismissed || member.lost.is_some() {
                    return;
                }
                if let ConnectionError::Protocol(what) = why {
                    return self.fail(replica, FailureKind::Protocol, what);
                }
                // It may come back; until then it is neither here nor lost.
                member.absent.get_or_insert_with(Instant::now);
                if member.process_ended {
                    self.lose(replica, PROCESS_ENDED.to_owned());
                }
            }
        }
    }

    /// Whether this is the connection that its speaker was welcomed on last.
    fn knows(&self, source: Source) -> bool {
        let welcomed = match source.speaker {
            Speaker::Caller => self.caller.as_ref().map(|caller| caller.number),
            Speaker::Replica(replica) => self.members.get(&replica).map(|member| member.number),
        };
        welcomed == Some(source.connection)
    }

    fn fail(&mut self, replica: Replica, kind: FailureKind, message: String) {
        let round = self.training.then_some(self.position.round);
        self.status.fail(Failure { replica, kind, message, round });
    }

    fn welcome(
        &mut self,
        replica: Replica,
        incarnation: Incarnation,
        number: u64,
        mut connection: Connection,
        heard: Heard,
    ) {
        let known = self.members.get(&replica);
        let returns = known.is_some_and(|member| member.incarnation == incarnation && member.lost.is_none());
        let rejoins = known.is_some_and(|member| member.lost.is_some_and(|lost| !lost.for_good));
        if known.is_some() && !returns && !rejoins {
            let reason = match known.is_some_and(|member| member.incarnation == incarnation) {
                true => format!("{replica} was silent for too long and counts as lost; the run goes on without it"),
                false => format!("{replica} is already part of this run"),
            };
            let _ = connection.send(&FromCoordinator::Refused { reason });
            // What it says from now on is nobody's word.
            connection.shutdown();
            return;
        }
        if rejoins && known.is_some_and(|member| member.incarnation == incarnation) {
            // It was only slow. What it missed it can be told, but its rank may be given away at any moment.
            let reason = format!("{replica} was silent for too long, and another process takes its place");
            let _ = connection.send(&FromCoordinator::Refused { reason });
            connection.shutdown();
            return;
        }
        let member = self.members.entry(replica).or_insert_with(|| Member::new(incarnation));
        if rejoins {
            let restarts = member.restarts + 1;
            let (pace, progress) = (member.pace, member.progress);
            *member = Member {
                restarts,
                pace: Pace { recent_step_seconds: 0.0, ..pace },
                pace_before: pace,
                progress,
                restarted: Some(Instant::now()),
                ..Member::new(incarnation)
            };
        }
        if let Some(old) = member.connection.take() {
            old.shutdown();
        }
        (member.number, member.heard, member.absent) = (number, heard, None);
        let state = if rejoins { self.last_state.clone() } else { None };
        let (position, heard) = (self.position, member.last_message);
        member.connection = Some(connection);
        // As everything that it is told: a peer that does not even read this must not hold the others up.
        let _ = member.tell(&FromCoordinator::Welcome { position, heard, state });
        if returns {
            self.say_again(replica);
            return;
        }
        if rejoins {
            self.complete_gathers();
        }
        self.send_roll();
        self.say_again(replica);
        self.tell_caller(FromCoordinator::Joined(replica));
    }

    /// Repeats to a replica whose connection is new what it may have missed.
    fn say_again(&mut self, replica: Replica) {
        let roll = self.roll();
        let gathered = self.gathers.iter().filter(|(_, gather)| gather.is_complete());
        let mut again: Vec<_> = gathered.map(|(key, gather)| gathered_message(*key, gather)).collect();
        again.push(FromCoordinator::Roll(roll));
        if self.bringer == Some(replica) && self.model.is_none() {
            again.push(FromCoordinator::Bring);
        }
        let Some(member) = self.members.get_mut(&replica) else { return };
        if member.dismissed {
            again.push(match self.status.failure() {
                Some(failure) => FromCoordinator::RunFailed(failure),
                None => FromCoordinator::Released,
            });
        }
        for message in again {
            let _ = member.tell(&message);
        }
    }

    fn roll(&self) -> Vec<Seat> {
        let seat = |rank| match self.members.get(&Replica::worker(rank)) {
            None => Seat::default(),
            Some(member) => Seat {
                incarnation: member.lost.is_none().then_some(member.incarnation),
                state: match &member.finished {
                    Some(finished) => SeatState::Finished { rounds: finished.rounds },
                    None if member.is_lost_for_good() => SeatState::Lost,
                    None => SeatState::Training,
                },
            },
        };
        (0..self.topology.workers.get()).map(seat).collect()
    }

    /// Tells those who own parameters who the workers are.
    fn send_roll(&mut self) {
        let roll = FromCoordinator::Roll(self.roll());
        for server in self.topology.servers() {
            if let Some(member) = self.members.get_mut(&server) {
                let _ = member.tell(&roll);
            }
        }
    }

    /// The caller saw a replica's process end, so its connection will not come back once it has ended too.
    fn process_ended(&mut self, replica: Replica) {
        if let Some(member) = self.members.get_mut(&replica) {
            member.process_ended = true;
            if member.absent.is_some() && member.lost.is_none() {
                self.lose(replica, PROCESS_ENDED.to_owned());
            }
        }
    }

    /// A replica is lost: the run fails, is held, or goes on without it.
    fn lose(&mut self, replica: Replica, reason: String) {
        let Some(member) = self.members.get_mut(&replica) else { return };
        let is_lone_worker = replica.role == Role::Worker && !self.topology.is_serverless();
        let held = !self.rejoin.is_zero();
        let once = member.restarted.is_none_or(|restarted| restarted.elapsed() > self.rejoin);
        let has_finished = member.finished.is_some();
        let others = self.topology.worker_count() > 1;
        let goes_on =
            is_lone_worker && (has_finished || (held && once) || (!self.mode.is_sync() && self.training && others));
        if !goes_on {
            let reason = match held && is_lone_worker {
                true => format!("{reason}, again within {} of its restart", seconds(self.rejoin)),
                false => reason,
            };
            return self.fail(replica, FailureKind::Lost, reason);
        }
        if let Some(connection) = member.connection.take() {
            // If it is only frozen, it must not disturb the run when it wakes up.
            connection.shutdown();
        }
        let for_good = has_finished || !(held && once);
        member.lost = Some(Lost { since: Instant::now(), for_good });
        member.absent = None;
        if self.bringer == Some(replica) {
            self.bringer = None;
        }
        self.send_roll();
        if !has_finished {
            self.tell_caller(FromCoordinator::Lost { replica, reason, rejoin: !for_good });
        }
        if for_good {
            self.go_on_without(replica);
        }
    }

    fn go_on_without(&mut self, replica: Replica) {
        for metric in self.merger.gone(replica.rank) {
            self.tell_caller(FromCoordinator::Metric(metric));
        }
        self.complete_gathers();
        if self.workers().all(|(_, member)| member.is_lost_for_good()) {
            self.fail(replica, FailureKind::Lost, "no worker is left".to_owned());
        }
    }

    /// A process follows the run. It takes over from one that did: that one's machine may be asleep, with a connection that
    /// nobody has told of it.
    fn welcome_caller(&mut self, mut caller: Caller) {
        if self.replaced.contains(&caller.incarnation) {
            let _ = caller.connection.send_patiently(&FromCoordinator::Replaced, &at_most(SPEECH));
            return caller.connection.shutdown();
        }
        let former = self.last_caller.replace(caller.incarnation).filter(|former| *former != caller.incarnation);
        if let Some(former) = former {
            self.replaced.push_back(former);
            if self.replaced.len() > REMEMBERED_CALLERS {
                self.replaced.pop_front();
            }
        }
        if let Some(mut old) = self.caller.take() {
            if former.is_some() {
                let _ = old.connection.send_patiently(&FromCoordinator::Replaced, &at_most(SPEECH));
            }
            old.connection.shutdown();
        }
        caller.told = caller.told.min(self.history.last());
        let welcome = FromCoordinator::Welcome { position: self.position, heard: 0, state: None };
        self.caller = Some(caller);
        self.speak_to_caller(&welcome);
    }

    /// Leaves a message for the caller, whenever there is one.
    fn tell_caller(&mut self, message: FromCoordinator) {
        self.history.push(message);
    }

    /// Tells the caller what it has not heard yet, for a moment at most; `true` if it has heard all, or is not there.
    fn brief_caller(&mut self) -> bool {
        let began = Instant::now();
        while let Some(caller) = &mut self.caller
            && let Some((number, message)) = self.history.after(caller.told)
        {
            if began.elapsed() > BRIEFING {
                return false;
            }
            caller.told = number;
            let told = FromCoordinator::Told { number, message: Box::new(message.clone()) };
            self.speak_to_caller(&told);
        }
        true
    }

    fn speak_to_caller(&mut self, message: &FromCoordinator) {
        if let Some(caller) = &mut self.caller
            && caller.connection.send_patiently(message, &at_most(SPEECH)).is_err()
        {
            // Of a message that was written in part the rest cannot follow; the caller comes back on a new connection.
            caller.connection.shutdown();
            self.caller = None;
        }
    }

    fn listen(&mut self, replica: Replica, Numbered { number, message }: Numbered, files: Option<ModelFiles>) {
        let Some(member) = self.members.get_mut(&replica) else { return };
        if number <= member.last_message {
            // It was heard before the connection broke.
            return;
        }
        if number != member.last_message + 1 {
            let what = format!("message {number} after message {}", member.last_message);
            return self.fail(replica, FailureKind::Protocol, what);
        }
        member.last_message = number;
        if number % CONFIRM_EVERY == 0 {
            let _ = member.tell(&FromCoordinator::Heard { number });
        }
        match message {
            ToCoordinator::Report(report) => self.report(replica, report),
            ToCoordinator::Gather { key, part } => self.gather(replica, key, part),
            ToCoordinator::Began { round } => {
                member.began = Some(round);
                self.complete_gathers();
            }
            ToCoordinator::Failed(failure) => _ = self.status.fail(failure),
            ToCoordinator::Leaving if replica.role == Role::Worker => {
                // It waits for this word before it ends.
                let _ = member.tell(&FromCoordinator::Heard { number });
                // That the next one is told so too is no sign of a life that cannot go on.
                member.restarted = None;
                self.lose(replica, TOLD_TO_END.to_owned());
            }
            ToCoordinator::Finished(finished) if replica.role == Role::Worker => {
                self.first_finished.get_or_insert_with(Instant::now);
                member.finished = Some(finished);
                self.send_roll();
            }
            ToCoordinator::Model if self.bringer == Some(replica) => self.model = files,
            ToCoordinator::Goodbye if member.dismissed => member.departed = true,
            ToCoordinator::Finished(_)
            | ToCoordinator::Leaving
            | ToCoordinator::Goodbye
            | ToCoordinator::Model
            | ToCoordinator::Stop
            | ToCoordinator::Ended(_)
            | ToCoordinator::Acknowledged => {
                self.fail(replica, FailureKind::Protocol, "a message that it must not send".to_owned());
            }
        }
    }

    fn report(&mut self, replica: Replica, report: Report) {
        if replica.role != Role::Worker {
            return;
        }
        let Some(member) = self.members.get_mut(&replica) else { return };
        member.pace = report.pace.map_or(member.pace, |pace| pace.behind(member.pace_before));
        if let Some(progress) = report.progress {
            member.progress = Some(progress);
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

    fn gather(&mut self, replica: Replica, key: CollectiveKey, part: Vec<u8>) {
        let servers = key.group == Group::Servers;
        let index = match servers {
            true => self.topology.servers().position(|server| server == replica),
            false => (replica.role == Role::Worker).then(|| replica.rank.index()),
        };
        let Some(index) = index else {
            return self.fail(replica, FailureKind::Protocol, "a collective that it has no part in".to_owned());
        };
        let bytes: usize = self.gathers.values().filter(|gather| gather.is_complete()).map(Gather::bytes).sum();
        if !self.gathers.contains_key(&key) && (self.gathers.len() >= REMEMBERED_GATHERS || bytes > REMEMBERED_BYTES) {
            // What came before training is asked for again by every worker that is started again.
            let mut complete = self.gathers.iter().filter(|(_, gather)| gather.is_complete()).map(|(key, _)| *key);
            let oldest = complete.clone().find(|key| key.round > 0).or_else(|| complete.next());
            let Some(oldest) = oldest else {
                let message = format!("a collective while {REMEMBERED_GATHERS} others are open");
                return self.fail(replica, FailureKind::Protocol, message);
            };
            self.gathers.remove(&oldest);
        }
        let count = if servers { self.topology.server_count() } else { self.topology.worker_count() };
        let gather = self.gathers.entry(key).or_insert_with(|| Gather {
            answered: None,
            parts: vec![None; count],
            since: Instant::now(),
        });
        if gather.is_complete() {
            // It was started again and asks a second time.
            let answer = gathered_message(key, gather);
            if let Some(member) = self.members.get_mut(&replica) {
                let _ = member.tell(&answer);
            }
            return;
        }
        gather.parts[index] = Some(Some(part.into()));
        self.complete_gathers();
    }

    /// Answers the collectives that miss only parts that nobody can bring.
    fn complete_gathers(&mut self) {
        // Without rounds, a rank that waits in a later collective never comes to this one.
        let mut latest: BTreeMap<usize, CollectiveKey> = BTreeMap::new();
        for (key, gather) in self.gathers.iter().filter(|(key, _)| key.group == Group::User && !self.mode.is_sync()) {
            for (rank, _) in gather.parts.iter().enumerate().filter(|(_, part)| part.is_some()) {
                latest.insert(rank, *key);
            }
        }
        let members = &self.members;
        let gone = |rank: usize, key: &CollectiveKey| {
            members.get(&Replica::worker(rank as u32)).is_some_and(|member| match key.group {
                // A life that began behind this step has no state to give.
                Group::State => {
                    member.is_lost_for_good()
                        || member.began.is_some_and(|began| key.round <= began && member.restarts > 0)
                }
                Group::User => member.is_lost_for_good() || latest.get(&rank).is_some_and(|later| later > key),
                Group::Servers => false,
            })
        };
        let mut answers = Vec::new();
        for (key, gather) in self.gathers.iter_mut().filter(|(_, gather)| !gather.is_complete()) {
            if gather.parts.iter().enumerate().all(|(rank, part)| part.is_some() || gone(rank, key)) {
                gather.parts.iter_mut().for_each(|part| _ = part.get_or_insert(None));
                gather.answered = Some(self.status.is_stopping());
                if key.group == Group::State && !self.rejoin.is_zero() {
                    self.last_state = Some(gather.parts.iter().map(|part| part.clone().flatten()).collect());
                }
                answers.push((key.group, gathered_message(*key, gather)));
            }
        }
        for (group, answer) in answers {
            let takes_part = |replica: &Replica| match group {
                Group::Servers => self.topology.servers().any(|server| server == *replica),
                Group::State | Group::User => replica.role == Role::Worker,
            };
            let mut too_long = None;
            for (replica, member) in self.members.iter_mut().filter(|(replica, _)| takes_part(replica)) {
                if let Err(ConnectionError::Protocol(reason)) = member.tell(&answer) {
                    too_long = Some((*replica, reason));
                }
            }
            if let Some((replica, reason)) = too_long {
                let message = format!("the workers' numbers in one `sum` or state are too many: {reason}");
                self.fail(replica, FailureKind::Configuration, message);
            }
        }
    }

    /// Says to all replicas and to the caller that the coordinator lives: a frozen one keeps its connections open.
    fn give_sign_of_life(&mut self) {
        if self.signed.elapsed() > HEARTBEAT {
            self.signed = Instant::now();
            for member in self.members.values_mut() {
                let number = member.last_message;
                let _ = member.tell(&FromCoordinator::Heard { number });
            }
            self.speak_to_caller(&FromCoordinator::Heard { number: 0 });
        }
    }

    /// Finds leases that have run out and waits that take too long, and says who is missing.
    pub(crate) fn check_waits(&mut self) {
        self.give_sign_of_life();
        let missing: Vec<Replica> =
            self.topology.replicas().filter(|replica| !self.members.contains_key(replica)).collect();
        if let Some(first) = missing.first()
            && self.started.elapsed() > self.join
        {
            let names = missing.iter().map(Replica::to_string).collect::<Vec<_>>().join(", ");
            let message = format!("no word from {names} within {} of the start", seconds(self.join));
            return self.fail(*first, FailureKind::Timeout, message);
        }
        if std::mem::replace(&mut self.checked, Instant::now()).elapsed() > LEASE / 2 {
            // This process itself was kept from working, perhaps with the whole machine: what was sent meanwhile is still unread.
            self.members.values().for_each(|member| member.heard.renew());
        }
        let judged = |member: &Member| !member.dismissed && member.lost.is_none();
        let present = self.members.iter().filter(|(_, member)| judged(member));
        let late = present.filter_map(|(replica, member)| match member.absent {
            Some(since) if since.elapsed() > RECONNECT => {
                Some((*replica, format!("its connection broke and did not come back within {}", seconds(RECONNECT))))
            }
            None if member.heard.ago() > LEASE => {
                Some((*replica, format!("nothing was heard of it for {} (frozen, or its machine is)", seconds(LEASE))))
            }
            _ => None,
        });
        for (replica, reason) in late.collect::<Vec<_>>() {
            self.lose(replica, reason);
        }
        self.give_up_rejoins();
        self.check_collectives();
        self.name_slow_workers();
    }

    /// Ends the wait for lost workers that were not started again in time.
    fn give_up_rejoins(&mut self) {
        let overdue =
            |member: &&mut Member| member.lost.is_some_and(|lost| !lost.for_good && lost.since.elapsed() > self.rejoin);
        let overdue: Vec<Replica> =
            self.members.iter_mut().filter_map(|(replica, member)| overdue(&member).then_some(*replica)).collect();
        for replica in overdue {
            if self.mode.is_sync() || !self.training {
                let message = format!("it was lost and nobody took its place within {}", seconds(self.rejoin));
                self.fail(replica, FailureKind::Lost, message);
            } else if let Some(lost) = self.members.get_mut(&replica).and_then(|member| member.lost.as_mut()) {
                lost.for_good = true;
                self.send_roll();
                let reason = format!("nobody took its place within {}", seconds(self.rejoin));
                self.tell_caller(FromCoordinator::Lost { replica, reason, rejoin: false });
                self.go_on_without(replica);
            }
        }
    }

    fn check_collectives(&mut self) {
        let limit = ROUND + self.rejoin;
        let overdue = self.gathers.values().find(|gather| !gather.is_complete() && gather.since.elapsed() > limit);
        if let Some(rank) = overdue.and_then(|gather| gather.parts.iter().position(Option::is_none)) {
            let message = format!("the others waited {} for its part of `evaluate` or `sum`", seconds(limit));
            return self.fail(Replica::worker(rank as u32), FailureKind::Timeout, message);
        }
        if self.first_finished.is_some_and(|since| since.elapsed() > limit) {
            let late = self.workers().find(|(_, member)| !member.is_done()).map(|(replica, _)| *replica);
            if let Some(replica) = late.or(self.bringer) {
                let message = format!("it did not return from `train` within {} of the first worker", seconds(limit));
                self.fail(replica, FailureKind::Timeout, message);
            }
        }
    }

    /// Names a worker that takes more than twice as long for a step as the others, while it does.
    fn name_slow_workers(&mut self) {
        let trains = |(_, member): &(&Replica, &Member)| !member.is_done() && member.pace.recent_step_seconds > 0.0;
        let paces = self.workers().filter(trains).map(|(replica, member)| (*replica, member.pace));
        let paces: Vec<(Replica, Pace)> = paces.collect();
        if paces.len() < 2 {
            return;
        }
        for (replica, pace) in &paces {
            let mut others: Vec<f64> =
                paces.iter().filter(|(other, _)| other != replica).map(|(_, pace)| pace.recent_step_seconds).collect();
            others.sort_by(f64::total_cmp);
            let others_seconds = others[others.len() / 2];
            let Some(member) = self.members.get_mut(replica) else { continue };
            let was_named = member.called_slow.is_some_and(|named| named.elapsed() < SLOW_AGAIN);
            if pace.recent_step_seconds > 2.0 * others_seconds && !was_named && !member.is_done() {
                member.called_slow = Some(Instant::now());
                let step_seconds = pace.recent_step_seconds;
                self.tell_caller(FromCoordinator::Slow { rank: replica.rank, step_seconds, others_seconds });
            }
        }
    }

    fn workers(&self) -> impl Iterator<Item = (&Replica, &Member)> {
        self.members.iter().filter(|(replica, _)| replica.role == Role::Worker)
    }

    /// Whether all replicas are there and no worker trains any more.
    fn have_finished(&self) -> bool {
        self.members.len() == self.topology.replicas().count() && self.workers().all(|(_, member)| member.is_done())
    }

    fn compare_models(&self) -> Result<(), Failure> {
        if !self.mode.is_sync() {
            return Ok(());
        }
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

    /// Asks the first worker that is there for its model; all have the same, or the servers'.
    fn ask_for_the_model(&mut self) {
        if self.bringer.is_some() {
            return;
        }
        let there = self.workers().find(|(_, member)| member.finished.is_some() && member.lost.is_none());
        let Some(replica) = there.map(|(replica, _)| *replica) else {
            let replica = Replica::worker(0);
            return self.fail(replica, FailureKind::Lost, "no worker is left to bring the model".to_owned());
        };
        self.bringer = Some(replica);
        let member = self.members.get_mut(&replica).expect("found just now");
        let _ = member.tell(&FromCoordinator::Bring);
    }

    /// How every worker ended, for the caller.
    fn worker_ends(&self) -> Vec<WorkerEnd> {
        let end = |rank| {
            let Some(member) = self.members.get(&Replica::worker(rank)) else { return WorkerEnd::default() };
            let (pace, restarts) = (member.pace, member.restarts);
            WorkerEnd { pace, dropped_examples: self.dropped_examples(member), restarts }
        };
        (0..self.topology.workers.get()).map(end).collect()
    }

    /// Examples that a worker that is lost for good would still have trained on, as far as those who stayed tell.
    fn dropped_examples(&self, member: &Member) -> u64 {
        if !member.is_lost_for_good() || member.finished.is_some() {
            return 0;
        }
        let of_others = self.workers().filter(|(_, other)| !other.is_lost_for_good());
        let most = of_others.filter_map(|(_, other)| other.progress).map(|progress| progress.examples).max();
        most.unwrap_or(0).saturating_sub(member.progress.map_or(0, |progress| progress.examples))
    }

    /// Releases the replicas and keeps the result until the caller has it.
    ///
    /// # Errors
    ///
    /// What ended this process before somebody had the result or its time was over.
    fn hand_over(&mut self, events: &Receiver<Event>) -> Result<(), Failure> {
        for metric in self.merger.finish() {
            self.tell_caller(FromCoordinator::Metric(metric));
        }
        let ends = self.worker_ends();
        self.tell_caller(FromCoordinator::Workers(ends));
        let first = Replica::worker(0);
        for (_, member) in self.members.iter_mut().filter(|(replica, _)| !self.first_stays || **replica != first) {
            member.release();
        }
        let rounds = self.workers().filter_map(|(_, member)| Some(member.finished.as_ref()?.rounds)).max().unwrap_or(0);
        let complete = FromCoordinator::Complete { rounds, stopped: self.status.is_stopping() };
        let files = self.model.take().expect("the run is complete");
        let mut deadline = Instant::now() + self.keep_result;
        // To every caller that comes, since one that goes without a word of thanks may not have it.
        let mut given = None;
        let mut thanked = None;
        // A replica whose connection broke just now comes back to hear that it is released.
        let is_gone = |member: &Member| member.departed || member.process_ended || member.lost.is_some();
        while thanked.is_none() || !self.members.values().all(is_gone) {
            let is_behind = !self.brief_caller();
            if let Some(caller) = self.caller.as_mut().filter(|_| !is_behind)
                && given.replace(caller.number) != Some(caller.number)
            {
                let connection = &mut caller.connection;
                let sent = connection.send(&complete).and_then(|()| connection.send_pieces(Kind::Model, &files.model));
                if sent.and_then(|()| connection.send_pieces(Kind::Tensors, &files.tensors)).is_err() {
                    connection.shutdown();
                    self.caller = None;
                }
                // A large model may have taken the rest of the time, and the thanks are on their way.
                deadline = deadline.max(Instant::now() + FAREWELL);
            }
            self.give_sign_of_life();
            let until = thanked.map_or(deadline, |since: Instant| since + FAREWELL);
            match Self::next_after_the_end(events, until, is_behind) {
                Some(event) if is_thanked(&event, given) => {
                    thanked.get_or_insert_with(Instant::now);
                    self.release_first();
                }
                Some(event) => self.handle(event),
                None if Instant::now() >= until => break,
                None => {}
            }
            // What others say of a run that is complete changes nothing.
            if self.status.is_leaving() && thanked.is_none() {
                return self.status.failure().map_or(Ok(()), Err);
            }
        }
        self.release_first();
        Ok(())
    }

    /// Lets worker 0 go, if it has stayed.
    fn release_first(&mut self) {
        if let Some(first) = self.members.get_mut(&Replica::worker(0)).filter(|first| !first.dismissed) {
            first.release();
        }
    }

    /// Tells everyone the cause and waits a moment until they have heard it.
    fn announce(&mut self, failure: &Failure, events: &Receiver<Event>) {
        for metric in self.merger.finish() {
            self.tell_caller(FromCoordinator::Metric(metric));
        }
        let ends = self.worker_ends();
        self.tell_caller(FromCoordinator::Workers(ends));
        for member in self.members.values_mut() {
            member.dismissed = true;
            let _ = member.tell(&FromCoordinator::RunFailed(failure.clone()));
        }
        let deadline = Instant::now() + FAREWELL;
        // A caller that comes back may have missed it.
        let mut told = None;
        while Instant::now() < deadline {
            let is_behind = !self.brief_caller();
            if let Some(caller) = self.caller.as_ref().filter(|_| !is_behind)
                && told.replace(caller.number) != Some(caller.number)
            {
                self.speak_to_caller(&FromCoordinator::RunFailed(failure.clone()));
            }
            match Self::next_after_the_end(events, deadline, is_behind) {
                Some(event) if is_thanked(&event, told) => return,
                Some(Event::Connected { mut connection, .. }) => {
                    let _ = connection.send(&FromCoordinator::RunFailed(failure.clone()));
                }
                Some(event) => self.handle(event),
                None => {}
            }
        }
    }

    /// The next event until `deadline`, or none within a moment; at once while somebody has still much to hear.
    fn next_after_the_end(events: &Receiver<Event>, deadline: Instant, at_once: bool) -> Option<Event> {
        let left = deadline.saturating_duration_since(Instant::now()).min(TICK);
        events.recv_timeout(if at_once { Duration::ZERO } else { left }).ok()
    }
}

/// Whether the caller on the connection that was given the end says that it has what it came for. It may have gone by now,
/// which the coordinator notices by itself when it speaks.
fn is_thanked(event: &Event, given: Option<u64>) -> bool {
    matches!(event, Event::Said { source: Source { speaker: Speaker::Caller, connection }, message, .. }
        if message.message == ToCoordinator::Acknowledged && given == Some(*connection))
}

fn gathered_message(key: CollectiveKey, gather: &Gather) -> FromCoordinator {
    let parts = gather.parts.iter().map(|part| part.clone().flatten()).collect();
    FromCoordinator::Gathered { key, parts, stopping: gather.answered.unwrap_or(false) }
}
