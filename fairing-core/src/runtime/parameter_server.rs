//! One parameter server: owns a range of the flat vector, takes what the workers push, applies the optimizer.
//!
//! Each worker has a connection and a thread of its own here; a worker that hosts the server itself calls its [`Session`]
//! directly. Gradients arrive in chunks. In sync mode whoever completes a chunk adds it up **in rank order** and applies the
//! optimizer to it, while the next chunk is on its way. So the answer does not depend on the order of arrival, and a server
//! holds a few chunks per worker, never whole gradients; where there is more than one chunk, a thread of its own adds them up,
//! so that reading goes on meanwhile. When the last chunk is applied, the round is committed and every
//! worker gets the new parameters. In async mode a chunk is applied when it arrives.
//!
//! A push is named by rank, incarnation and round. A connection that breaks is no failure here: its worker comes back and
//! pushes again, and what had arrived is skipped. Who is lost is for the coordinator to say.

use std::collections::VecDeque;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, RwLock, Weak};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::layout::{Layout, TensorSpec};
use super::optimizer::{Cells, Clipping, Optimizer, Round, ShardOptimizer, mean};
use super::shard::{LARGEST_BLOCK, shard};
use super::status::RunStatus;
use crate::protocol::connection::{Connection, ConnectionError};
use crate::protocol::deadline::{HELLO, ROUND, STALL, TICK};
use crate::protocol::failure::{Failure, FailureKind};
use crate::protocol::frame::{Header, Kind, PushHead, bit};
use crate::protocol::message::{Incarnation, Position, SeatState};
use crate::topology::{Mode, Placement, Rank, Replica, Role};

/// Values per chunk: 256 KiB stay in the second-level cache while they are added and applied. Fewer in this crate's own
/// tests, so that small models have several.
pub(crate) const CHUNK: usize = if cfg!(test) { 4 << 10 } else { 64 << 10 };

// So that squares can be added up chunk by chunk.
const _: () = assert!(CHUNK.is_multiple_of(LARGEST_BLOCK));

/// More than any model that runs on processors has; a larger number is a fault of the peer, not a model.
const MOST_PARAMETERS: usize = 1 << 36;

/// More rounds, or examples of one, than any run has.
const MOST_STEPS: u64 = 1 << 53;

/// Chunks that a worker may be ahead of the slowest one within a round; bounds the memory of a server.
const CHUNKS_AHEAD: usize = 4;

/// What a worker tells a server when it joins the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Join {
    pub(crate) layout: Layout,
    pub(crate) optimizer: Optimizer,
}

/// What a worker says to a server, apart from gradients.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum ToServer {
    /// The first word of a worker's life.
    Join(Join),
    /// The first word on a connection that replaces a broken one, after [`Joined`].
    Resume { server: Incarnation },
    /// The parameters at the beginning of `round` are wanted, and at server 0 what is not trained.
    Fetch { round: u64 },
}

/// What a server says to a worker, apart from parameters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromServer {
    /// The join is noted. With `initial`, rank 0's parameters must follow, and at server 0 what is not trained.
    Seated { initial: bool },
    /// Everyone has joined.
    Joined(Joined),
    /// The connection takes the place of the broken one.
    Resumed,
    /// The connection is of no use: another process holds this rank, or this server is not the one that was joined.
    Refused { reason: String },
    /// The run has failed.
    RunFailed(Failure),
}

/// Where a worker that joins begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Joined {
    pub(crate) server: Incarnation,
    /// The round that this server waits for.
    pub(crate) round: u64,
    /// The run stops, and makes no further step.
    pub(crate) stopped: bool,
    /// Where the rank stands in its loops at the beginning of this round and, if known, of the one before or after.
    pub(crate) positions: Vec<Position>,
}

/// Who holds a rank here, and the connection if it is not this very process.
type Holder = (Incarnation, Option<Connection>);

/// Adds up sums of squares over all servers: given this server's, returns everyone's, in the order of their shares.
pub(crate) type ShareSquares = Box<dyn Fn(u64, Vec<f64>) -> Result<Vec<f64>, Failure> + Send + Sync>;

/// State of one server, shared by the threads that serve its workers.
pub(crate) struct ParameterServer {
    itself: Weak<Self>,
    index: usize,
    placement: Placement,
    incarnation: Incarnation,
    /// Where training starts.
    start: Position,
    status: Arc<RunStatus>,
    joining: Mutex<Joining>,
    joined: Condvar,
    /// Per rank, the number of the session that counts; sessions with another number have been replaced.
    sessions: Vec<AtomicU64>,
    /// Per rank, the connection of that session, so that it can be ended, and whose it is.
    connections: Mutex<Vec<Option<Holder>>>,
    share_squares: OnceLock<ShareSquares>,
}

/// What has arrived before training starts.
#[derive(Default)]
struct Joining {
    /// The first rank's join, which the others must equal.
    reference: Option<(Rank, Join)>,
    present: Vec<bool>,
    initial: Option<Vec<f32>>,
    unlearned: Arc<Vec<u8>>,
    shard: Option<Arc<Shard>>,
}

/// Why a session ends.
pub(crate) enum Ended {
    /// Nobody's fault: the connection broke, or was replaced, or the run is over.
    Over,
    /// This ends the run.
    Failed(Failure),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Ended::Failed(failure)
    }
}

impl ParameterServer {
    /// The server of share `index`, which begins at `start`.
    pub(crate) fn new(index: usize, placement: &Placement, start: Position, status: Arc<RunStatus>) -> Arc<Self> {
        let workers = placement.topology.worker_count();
        let server = Arc::new_cyclic(|itself| Self {
            itself: itself.clone(),
            index,
            placement: placement.clone(),
            incarnation: Incarnation::fresh(),
            start,
            status,
            joining: Mutex::new(Joining { present: vec![false; workers], ..Joining::default() }),
            joined: Condvar::new(),
            sessions: (0..workers).map(|_| AtomicU64::new(0)).collect(),
            connections: Mutex::new((0..workers).map(|_| None).collect()),
            share_squares: OnceLock::new(),
        });
        let waiting = Arc::downgrade(&server);
        server.status.on_change(move || {
            if let Some(server) = waiting.upgrade() {
                server.look_around();
            }
        });
        server
    }

    /// Sets how sums of squares are added up over the servers; needed for norms over several of them.
    pub(crate) fn share_squares(&self, share: ShareSquares) {
        // A second call would bring the same.
        let _ = self.share_squares.set(share);
    }

    fn lock(&self) -> MutexGuard<'_, Joining> {
        self.joining.lock().expect("no holder panics")
    }

    fn connections(&self) -> MutexGuard<'_, Vec<Option<Holder>>> {
        self.connections.lock().expect("no holder panics")
    }

    /// The run has failed, or its roll has changed: ends the sessions of lives that are over, and wakes all that wait.
    fn look_around(&self) {
        for (rank, holder) in self.connections().iter_mut().enumerate() {
            let seat = self.status.seat(rank);
            if holder.as_ref().is_some_and(|(incarnation, _)| seat.incarnation != Some(*incarnation)) {
                self.sessions[rank].fetch_add(1, Ordering::AcqRel);
                if let Some((_, Some(connection))) = holder.take() {
                    connection.shutdown();
                }
            }
        }
        // Taking the lock first: a thread that has looked but does not wait yet is woken too.
        let shard = self.lock().shard.clone();
        self.joined.notify_all();
        if let Some(shard) = shard {
            drop(shard.lock());
            shard.changed.notify_all();
            if self.placement.mode.is_sync() && self.status.have_finished() {
                // Every worker has the parameters, and the model that comes home needs the memory.
                self.lock().shard = None;
                shard.completed.notify_all();
            }
        }
    }

    /// Serves one worker until its connection ends, is replaced, or the run is over. What goes wrong is recorded in the
    /// run's status.
    pub(crate) fn serve(self: &Arc<Self>, rank: Rank, incarnation: Incarnation, mut connection: Connection) {
        let handle = match connection.try_clone() {
            Ok(handle) => handle,
            // Out of descriptors, say; the worker tries again.
            Err(_) => return,
        };
        match self.admit(rank, incarnation, Some(handle)) {
            Ok(session) => {
                if let Err(Ended::Failed(failure)) = session.converse(&mut connection) {
                    self.status.fail(failure);
                }
            }
            // The failure is the better word if there is one.
            Err(_) if self.status.failure().is_some() => {}
            Err(reason) => drop(connection.send(&FromServer::Refused { reason })),
        }
        if let Some(failure) = self.status.failure() {
            // The worker learns the cause here and by its control connection, whichever is faster.
            let _ = connection.send(&FromServer::RunFailed(failure));
        }
        // Its handle is kept here for a while, and the worker would wait for an answer.
        connection.shutdown();
    }

    /// Gives `rank` a new session, once the coordinator has named `incarnation` as its holder.
    ///
    /// The worker has its welcome already, so the coordinator's word is on its way.
    pub(crate) fn admit(
        self: &Arc<Self>,
        rank: Rank,
        incarnation: Incarnation,
        connection: Option<Connection>,
    ) -> Result<Session, String> {
        let started = Instant::now();
        let mut joining = self.lock();
        while self.status.seat(rank.index()).incarnation != Some(incarnation) {
            self.status.unless_failed()?;
            // A server that has not met the coordinator itself knows nobody yet.
            let limit = if self.status.has_roll() { HELLO } else { self.placement.join };
            if started.elapsed() > limit {
                return Err(format!("another process is {} now, or it counts as lost", Replica::worker(rank.0)));
            }
            joining = self.joined.wait_timeout(joining, TICK).expect("no holder panics").0;
        }
        drop(joining);
        let mut connections = self.connections();
        // Under the lock that `look_around` takes too, so that a life that is over by now does not get in.
        if self.status.seat(rank.index()).incarnation != Some(incarnation) {
            return Err("it counts as lost".to_owned());
        }
        let number = self.sessions[rank.index()].fetch_add(1, Ordering::AcqRel) + 1;
        if let Some((_, Some(old))) = connections[rank.index()].replace((incarnation, connection)) {
            old.shutdown();
        }
        Ok(Session { server: self.clone(), rank, number })
    }

    /// A thread that served a connection panicked: a fault of fairing's, and the run's failure.
    pub(crate) fn panicked(&self, message: String) {
        let replica = self.placement.replica;
        self.status.fail(Failure { replica, kind: FailureKind::Panicked, message, round: None });
    }

    fn register(&self, rank: Rank, join: Join) -> Result<(), Failure> {
        let worker = Replica { role: Role::Worker, rank };
        let layout = |message| Failure { replica: worker, kind: FailureKind::Layout, message, round: None };
        if join.layout.trained_len() > MOST_PARAMETERS {
            return Err(protocol(worker, format!("a layout of more than {MOST_PARAMETERS} parameters")));
        }
        let mut joining = self.lock();
        if let Some((first, reference)) = &joining.reference {
            if let Some(difference) = reference.layout.difference(&join.layout) {
                let message = format!("its model differs from that of worker {first}: {difference}");
                return Err(layout(message));
            }
            if reference.optimizer != join.optimizer {
                let (theirs, mine) = (&reference.optimizer, &join.optimizer);
                return Err(layout(format!("it joined with {mine:?}, worker {first} with {theirs:?}")));
            }
        } else {
            join.optimizer.validate().map_err(|error| Failure {
                replica: worker,
                kind: FailureKind::Configuration,
                message: error.to_string(),
                round: None,
            })?;
            joining.reference = Some((rank, join));
        }
        joining.present[rank.index()] = true;
        self.begin_training(&mut joining);
        Ok(())
    }

    /// Takes rank 0's parameters and what is not trained.
    fn initialise(&self, initial: Vec<f32>, unlearned: Vec<u8>) {
        let mut joining = self.lock();
        joining.initial = Some(initial);
        joining.unlearned = Arc::new(unlearned);
        self.begin_training(&mut joining);
    }

    /// Begins training if nothing is missing.
    fn begin_training(&self, joining: &mut Joining) {
        if joining.shard.is_none()
            && joining.present.iter().all(|present| *present)
            && let (Some((_, reference)), Some(initial)) = (&joining.reference, joining.initial.take())
        {
            let shard = Arc::new(Shard::new(self, reference, initial));
            if shard.has_reducer() {
                let (server, shard) = (self.itself.clone(), Arc::downgrade(&shard));
                // Not joined: it ends with the server, or within a tick.
                std::thread::spawn(move || reduce_in_background(&server, &shard));
            }
            joining.shard = Some(shard);
            self.joined.notify_all();
        }
    }

    /// Adds up a chunk that all workers have brought, and applies it; the last one commits the round.
    fn reduce(&self, shard: &Shard, round: u64, chunk: usize) -> Result<(), Failure> {
        let last = chunk + 1 == shard.chunks();
        let weights = shard.lock().weights.clone();
        shard.apply(chunk, &weights);
        if last && let Some(norms) = &shard.norms {
            let own = norms.squares();
            let all = match self.placement.topology.server_count() {
                1 => own,
                _ => self.way_to_the_others()?(round, own)?,
            };
            if all.len() != norms.whole.len() {
                let message = format!("{} sums of squares instead of {}", all.len(), norms.whole.len());
                let replica = self.placement.replica;
                return Err(protocol(replica, message));
            }
            let present = shard.lock().present.clone();
            shard.apply_clipped(norms, &all, &present);
        }
        let mut progress = shard.lock();
        progress.reduced = chunk + 1;
        if last {
            shard.commit(&mut progress, self.index == 0 && self.status.is_stopping());
        }
        drop(progress);
        shard.changed.notify_all();
        Ok(())
    }

    /// How sums of squares are added up; set by another thread of this process, which may be behind the first push.
    fn way_to_the_others(&self) -> Result<&ShareSquares, Failure> {
        loop {
            if let Some(share) = self.share_squares.get() {
                return Ok(share);
            }
            if let Some(failure) = self.status.failure() {
                return Err(failure);
            }
            std::thread::sleep(TICK / 100);
        }
    }

    fn range(&self, layout: &Layout) -> Range<usize> {
        shard(layout.trained_len(), self.index, self.placement.topology.server_count())
    }
}

/// Adds up chunks as they are complete, as long as the server is there.
fn reduce_in_background(server: &Weak<ParameterServer>, shard: &Weak<Shard>) {
    while let Some(shard) = shard.upgrade() {
        let (chunk, round) = {
            let mut progress = shard.lock();
            if progress.complete.is_empty() {
                // Not until there is a chunk: it is also woken to let go of the shard.
                progress = shard.completed.wait_timeout(progress, TICK).expect("no holder panics").0;
            }
            (progress.complete.pop_front(), progress.round)
        };
        let Some(server) = server.upgrade() else { return };
        let Some(chunk) = chunk else { continue };
        let reduced = catch_unwind(AssertUnwindSafe(|| server.reduce(&shard, round, chunk)));
        let failure = match reduced {
            Ok(Ok(())) => continue,
            Ok(Err(failure)) => failure,
            // Nobody else would notice, and all would wait for the round.
            Err(_) => Failure {
                replica: server.placement.replica,
                kind: FailureKind::Panicked,
                message: "its server panicked while it applied a gradient".to_owned(),
                round: Some(round),
            },
        };
        server.status.fail(failure);
        return;
    }
}

/// One worker's way through one server, from its join or its return on.
pub(crate) struct Session {
    server: Arc<ParameterServer>,
    rank: Rank,
    number: u64,
}

/// How a step ended at one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Closed {
    /// The run stops with this step.
    pub(crate) stop: bool,
    /// Updates by others between this worker's last pull and this push.
    pub(crate) staleness: u32,
}

impl Session {
    fn worker(&self) -> Replica {
        Replica { role: Role::Worker, rank: self.rank }
    }

    /// Over, if the run has failed or another session has taken the rank.
    fn check(&self) -> Result<(), Ended> {
        let current = self.server.sessions[self.rank.index()].load(Ordering::Acquire) == self.number;
        if current && self.server.status.failure().is_none() { Ok(()) } else { Err(Ended::Over) }
    }

    fn patience(&self, waited: Duration, limit: Duration) -> Result<(), String> {
        match self.check() {
            Ok(()) if waited > limit => Err(format!("nothing came for {}", seconds(limit))),
            Ok(()) => Ok(()),
            Err(_) => Err("the session is over".to_owned()),
        }
    }

    /// What to make of an exchange that did not work: the worker comes back, unless it said something odd.
    fn broken(&self, error: ConnectionError) -> Ended {
        match error {
            ConnectionError::Protocol(message) if self.check().is_ok() => {
                Ended::Failed(protocol(self.worker(), message))
            }
            _ => Ended::Over,
        }
    }

    fn converse(&self, connection: &mut Connection) -> Result<(), Ended> {
        let mut shard = None;
        loop {
            // Between two frames a worker computes for as long as it likes; whether it lives, its lease says.
            let header = connection.read_header(&|_| self.patience(Duration::ZERO, STALL));
            let header = header.map_err(|error| self.broken(error))?;
            match (header.kind, &shard) {
                (Kind::Message, _) => match connection.read_message(header).map_err(|error| self.broken(error))? {
                    ToServer::Join(join) => shard = Some(self.join(join, connection)?),
                    ToServer::Resume { server } => shard = Some(self.resume(server, connection)?),
                    ToServer::Fetch { round } => self.send_start(round, connection)?,
                },
                (Kind::Push, Some(shard)) => self.round(shard, header, connection)?,
                (kind, _) => {
                    let message = format!("a {kind:?} frame where it does not belong");
                    return Err(protocol(self.worker(), message).into());
                }
            }
        }
    }

    fn send(&self, connection: &mut Connection, message: &FromServer) -> Result<(), Ended> {
        connection.send(message).map_err(|error| self.broken(error))
    }

    /// Takes the join, and rank 0's parameters if they are needed; waits for everyone's.
    fn join(&self, join: Join, connection: &mut Connection) -> Result<Arc<Shard>, Ended> {
        let (range, has_state) = (self.server.range(&join.layout), self.server.index == 0);
        self.server.register(self.rank, join)?;
        let initial = self.rank.0 == 0 && self.server.lock().shard.is_none();
        self.send(connection, &FromServer::Seated { initial })?;
        if initial {
            let patience = |waited| self.patience(waited, STALL);
            let parameters = read_values(connection, range.len(), &patience).map_err(|error| self.broken(error))?;
            let unlearned = match has_state {
                true => connection.receive_frame(Kind::Frozen, &patience).map_err(|error| self.broken(error))?,
                false => Vec::new(),
            };
            self.check()?;
            self.server.initialise(parameters, unlearned);
        }
        let shard = self.wait_for_all()?;
        let joined = self.joined(&shard);
        self.send(connection, &FromServer::Joined(joined))?;
        Ok(shard)
    }

    /// As [`ToServer::Join`], for a worker in this very process. Returns where it begins.
    pub(crate) fn join_here(
        &self,
        join: Join,
        initial: impl FnOnce(Range<usize>) -> (Vec<f32>, Vec<u8>),
    ) -> Result<Joined, Ended> {
        let range = self.server.range(&join.layout);
        self.server.register(self.rank, join)?;
        if self.rank.0 == 0 && self.server.lock().shard.is_none() {
            let (parameters, unlearned) = initial(range);
            self.server.initialise(parameters, unlearned);
        }
        let shard = self.wait_for_all()?;
        Ok(self.joined(&shard))
    }

    fn joined(&self, shard: &Shard) -> Joined {
        let (round, positions, stopped) = shard.standing(self.rank);
        Joined { server: self.server.incarnation, round, stopped: stopped && self.server.index == 0, positions }
    }

    fn wait_for_all(&self) -> Result<Arc<Shard>, Ended> {
        let started = Instant::now();
        let mut joining = self.server.lock();
        loop {
            if let Some(shard) = &joining.shard {
                return Ok(shard.clone());
            }
            self.check()?;
            let Placement { join, rejoin, .. } = self.server.placement;
            if started.elapsed() > join + rejoin {
                let missing = joining.present.iter().position(|present| !present).unwrap_or(0);
                let message = format!("it did not call `worker.join` within {}", seconds(join));
                return Err(timeout(missing, None, message).into());
            }
            joining = self.server.joined.wait_timeout(joining, TICK).expect("no holder panics").0;
        }
    }

    fn resume(&self, server: Incarnation, connection: &mut Connection) -> Result<Arc<Shard>, Ended> {
        let shard = self.server.lock().shard.clone();
        match shard.filter(|_| server == self.server.incarnation) {
            Some(shard) => {
                self.send(connection, &FromServer::Resumed)?;
                Ok(shard)
            }
            None => {
                let reason = "this server is not the one that was joined; its parameters are lost".to_owned();
                self.send(connection, &FromServer::Refused { reason })?;
                Err(Ended::Over)
            }
        }
    }

    /// The shard, which exists once everyone has joined.
    fn shard(&self) -> Result<Arc<Shard>, Ended> {
        let early = || protocol(self.worker(), "a request before everyone has joined".to_owned());
        self.server.lock().shard.clone().ok_or_else(|| early().into())
    }

    /// What is not trained, as rank 0 gave it; empty at all servers but the first.
    pub(crate) fn unlearned(&self) -> Arc<Vec<u8>> {
        self.server.lock().unlearned.clone()
    }

    /// Sends the parameters at the beginning of `round`.
    fn send_start(&self, round: u64, connection: &mut Connection) -> Result<(), Ended> {
        let shard = self.shard()?;
        let patience = |waited| self.patience(waited, STALL);
        let sent = |sent: Result<(), ConnectionError>| sent.map_err(|error| self.broken(error));
        sent(connection.write_all(&Header::of(Kind::Parameters, shard.range.len() * 4).encode(), &patience))?;
        let mut chunk_values = Vec::new();
        for chunk in 0..shard.chunks() {
            chunk_values.resize(shard.chunk(chunk).len(), 0.0);
            self.start_of_round(&shard, round, chunk, &mut chunk_values)?;
            sent(connection.write_all(bytemuck::cast_slice(&chunk_values), &patience))?;
        }
        shard.pulled(self.rank);
        if self.server.index == 0 {
            sent(connection.send_frame(Kind::Frozen, &self.unlearned()))?;
        }
        Ok(())
    }

    /// Copies the parameters at the beginning of `round`, for a worker in this very process.
    pub(crate) fn copy_start(&self, round: u64, out: &mut [f32]) -> Result<(), Ended> {
        let shard = self.shard()?;
        for chunk in 0..shard.chunks() {
            self.start_of_round(&shard, round, chunk, &mut out[shard.chunk(chunk)])?;
        }
        Ok(())
    }

    fn start_of_round(&self, shard: &Shard, round: u64, chunk: usize, out: &mut [f32]) -> Result<(), Ended> {
        let range = shard.chunk(chunk);
        let values = shard.values.read().expect("no holder panics");
        let source = match (&values.previous, shard.mode.is_sync()) {
            (Some(previous), true) if values.round.checked_sub(1) == Some(round) && values.applied == 0 => previous,
            (Some(previous), true) if round == values.round && chunk < values.applied => previous,
            (_, true) if round != values.round => {
                let message = format!("it asked for the parameters of round {round} in round {}", values.round);
                return Err(protocol(self.worker(), message).into());
            }
            _ => &values.parameters,
        };
        out.copy_from_slice(&source[range]);
        Ok(())
    }

    /// One push over a connection, and the parameters in return.
    fn round(&self, shard: &Arc<Shard>, header: Header, connection: &mut Connection) -> Result<(), Ended> {
        let presence_bytes = shard.tensors.div_ceil(8);
        let expected = PushHead::BYTES + presence_bytes + shard.range.len() * 4;
        if header.length_bytes != expected as u64 {
            let message = format!("a push of {} bytes instead of {expected}", header.length_bytes);
            return Err(protocol(self.worker(), message).into());
        }
        let patience = |waited| self.patience(waited, STALL);
        let mut head = vec![0; PushHead::BYTES + presence_bytes];
        connection.read_exact(&mut head, &patience).map_err(|error| self.broken(error))?;
        let (fixed, presence) = head.split_at(PushHead::BYTES);
        let head = PushHead::decode(fixed.try_into().expect("split at its size"));
        let missing = self.begin(shard, head, presence)?;
        let mut known = Vec::new();
        for chunk in 0..missing {
            // It was here before the connection broke, or before the worker was started again.
            known.resize(shard.chunk(chunk).len(), 0f32);
            let read = connection.read_exact(bytemuck::cast_slice_mut(&mut known), &patience);
            read.map_err(|error| self.broken(error))?;
        }
        for chunk in missing..shard.chunks() {
            self.fill(shard, head.round, chunk, |values| {
                let read = connection.read_exact(bytemuck::cast_slice_mut(values), &patience);
                read.map_err(|error| self.broken(error))
            })?;
        }
        let closed = self.close(shard, head.round)?;
        let kind = if closed.stop { Kind::LastParameters } else { Kind::Parameters };
        let length_bytes = shard.range.len() as u64 * 4;
        let header = Header { kind, detail: closed.staleness, length_bytes }.encode();
        if shard.mode.is_sync() {
            // Nobody writes before this worker has pushed again.
            let values = shard.values.read().expect("no holder panics");
            let values = bytemuck::cast_slice(&values.parameters);
            return connection.write_both_patiently(&header, values, &patience).map_err(|error| self.broken(error));
        }
        connection.write_all(&header, &patience).map_err(|error| self.broken(error))?;
        for chunk in 0..shard.chunks() {
            // Copied, so that no other worker's push waits until this worker has taken it.
            known.clear();
            known.extend_from_slice(&shard.values.read().expect("no holder panics").parameters[shard.chunk(chunk)]);
            let sent = connection.write_all(bytemuck::cast_slice(&known), &patience);
            sent.map_err(|error| self.broken(error))?;
        }
        Ok(())
    }

    /// One push by a worker in this very process, and the parameters in return.
    pub(crate) fn begin_here(&self, head: PushHead, presence: &[u8]) -> Result<Push<'_>, Ended> {
        let shard = self.shard()?;
        let missing = self.begin(&shard, head, presence)?;
        Ok(Push { session: self, shard, round: head.round, missing })
    }

    /// Takes note of a push; returns the first of its chunks that has not arrived before.
    fn begin(&self, shard: &Shard, head: PushHead, presence: &[u8]) -> Result<usize, Ended> {
        // In async mode, not while an old session applies a chunk that it has not counted yet.
        let buffer =
            (!shard.mode.is_sync()).then(|| shard.slot(self.rank.index(), 0).lock().expect("no holder panics"));
        let mut progress = shard.lock();
        self.check()?;
        let missing = shard.begin(&mut progress, self.rank, head, presence)?;
        drop(buffer);
        Ok(missing)
    }

    /// Waits for room, lets `read` fill it with a chunk, and takes note of the chunk.
    fn fill(
        &self,
        shard: &Shard,
        round: u64,
        chunk: usize,
        read: impl FnOnce(&mut [f32]) -> Result<(), Ended>,
    ) -> Result<(), Ended> {
        if shard.mode.is_sync() {
            // In a session that was replaced meanwhile, the chunk may lie behind what is reduced.
            drop(self.wait(shard, round, |progress| chunk < progress.reduced + CHUNKS_AHEAD)?);
        }
        let mut slot = shard.slot(self.rank.index(), chunk).lock().expect("no holder panics");
        // The buffer may hold a later chunk of the session that replaced this one. If none has done so yet, it needs this
        // buffer first.
        self.check()?;
        let gradient = &mut slot[..shard.chunk(chunk).len()];
        read(gradient)?;
        let mut progress = shard.lock();
        // A session that was replaced while it read must not count what the new one reads again.
        self.check()?;
        if !shard.mode.is_sync() {
            let steps = progress.ranks[self.rank.index()].steps.clone().expect("set when the push began");
            drop(progress);
            // The buffer is still locked, so no new session begins before this chunk is applied and counted.
            shard.apply_alone(chunk, &steps, gradient);
            shard.count_alone(&mut shard.lock(), self.rank, chunk);
            shard.changed.notify_all();
            return Ok(());
        }
        drop(slot);
        if !shard.arrived(&mut progress, self.rank, chunk) {
            return Ok(());
        }
        if shard.has_reducer() {
            progress.complete.push_back(chunk);
            drop(progress);
            shard.completed.notify_one();
            return Ok(());
        }
        drop(progress);
        Ok(self.server.reduce(shard, round, chunk)?)
    }

    /// Waits until the push counts: in sync mode for the others, with bounded staleness for the slow ones.
    fn close(&self, shard: &Shard, round: u64) -> Result<Closed, Ended> {
        if shard.mode.is_sync() {
            let progress = self.wait(shard, round, |progress| progress.round > round)?;
            return Ok(Closed { stop: progress.stop, staleness: 0 });
        }
        let mut progress = match shard.mode {
            Mode::Bounded { staleness } => self.wait(shard, round, |progress| {
                let done = progress.ranks[self.rank.index()].next;
                let training = |rank: &usize| self.server.status.seat(*rank).state == SeatState::Training;
                let others = (0..shard.workers).filter(training).map(|rank| progress.ranks[rank].next);
                done.saturating_sub(others.min().unwrap_or(done)) <= u64::from(staleness)
            })?,
            Mode::Sync | Mode::Async => shard.lock(),
        };
        let version = progress.version;
        let rank = &mut progress.ranks[self.rank.index()];
        rank.pulled = version;
        let stop = self.server.index == 0 && self.server.status.is_stopping();
        Ok(Closed { stop, staleness: rank.staleness })
    }

    /// Waits until `ready`, or in sync mode until the round is over.
    fn wait<'s>(
        &self,
        shard: &'s Shard,
        round: u64,
        ready: impl Fn(&Progress) -> bool,
    ) -> Result<MutexGuard<'s, Progress>, Ended> {
        let limit = ROUND + self.server.placement.rejoin;
        let mut progress = shard.lock();
        let mut started = None;
        loop {
            let over = shard.mode.is_sync() && progress.round > round;
            if over || ready(&progress) {
                return Ok(progress);
            }
            self.check()?;
            if shard.mode.is_sync()
                && let Some((rank, rounds)) = self.server.status.finished()
                && progress.ranks[rank].head.is_none()
            {
                let failure = Failure {
                    replica: Replica::worker(rank as u32),
                    kind: FailureKind::Configuration,
                    message: format!(
                        "it finished training after {rounds} rounds while other workers go on; all workers must call \
                         `worker.step` equally often (loop over `worker.epochs` and `batches`)"
                    ),
                    round: Some(round),
                };
                return Err(failure.into());
            }
            if started.get_or_insert_with(Instant::now).elapsed() > limit {
                let message = format!("it did not push its gradient within {}", seconds(limit));
                return Err(timeout(progress.slowest(&self.server.status), Some(round), message).into());
            }
            progress = shard.changed.wait_timeout(progress, TICK).expect("no holder panics").0;
        }
    }
}

/// A push by a worker in the server's own process: chunk by chunk, then the parameters.
pub(crate) struct Push<'s> {
    session: &'s Session,
    shard: Arc<Shard>,
    round: u64,
    missing: usize,
}

impl Push<'_> {
    /// Brings a chunk of the gradient.
    pub(crate) fn chunk(&self, chunk: usize, gradient: &[f32]) -> Result<(), Ended> {
        if chunk < self.missing || chunk >= self.shard.chunks() {
            return Ok(());
        }
        self.session.fill(&self.shard, self.round, chunk, |slot| {
            slot.copy_from_slice(gradient);
            Ok(())
        })
    }

    /// Waits for the others and copies the new parameters.
    pub(crate) fn close(self, parameters: &mut [f32]) -> Result<Closed, Ended> {
        let closed = self.session.close(&self.shard, self.round)?;
        parameters.copy_from_slice(&self.shard.values.read().expect("no holder panics").parameters);
        Ok(closed)
    }
}

/// Reads a frame of `count` parameters; memory grows with what has arrived, since the count is only claimed.
fn read_values(
    connection: &mut Connection,
    count: usize,
    patience: crate::protocol::connection::Patience<'_>,
) -> Result<Vec<f32>, ConnectionError> {
    let header = connection.read_header(patience)?;
    let expected = Header::of(Kind::Parameters, count * 4);
    if header != expected {
        return Err(ConnectionError::Protocol(format!("{header:?} instead of {expected:?}")));
    }
    let mut values = Vec::new();
    // Reserved and not touched: pages that nothing arrives for are never there, and nothing is copied as it grows.
    values.try_reserve_exact(count).map_err(|_| {
        ConnectionError::Protocol(format!("a model of {count} parameters, for which there is no memory"))
    })?;
    while values.len() < count {
        let start = values.len();
        values.resize(count.min(start + CHUNK), 0f32);
        connection.read_exact(bytemuck::cast_slice_mut(&mut values[start..]), patience)?;
    }
    Ok(values)
}

fn protocol(replica: Replica, message: String) -> Failure {
    Failure { replica, kind: FailureKind::Protocol, message, round: None }
}

fn timeout(rank: usize, round: Option<u64>, message: String) -> Failure {
    Failure { replica: Replica::worker(rank as u32), kind: FailureKind::Timeout, message, round }
}

pub(crate) fn seconds(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

/// The parameters of one server while it trains.
struct Shard {
    mode: Mode,
    range: Range<usize>,
    /// Number of trained tensors of the whole model: one presence bit each.
    tensors: usize,
    /// Which trained tensor each piece of this shard belongs to.
    pieces: Vec<usize>,
    workers: usize,
    /// Buffers per worker: `CHUNKS_AHEAD` in sync mode, where a chunk waits for the others', else one.
    ahead: usize,
    slots: Vec<Mutex<Vec<f32>>>,
    /// For clipping by norm, in sync mode; elsewhere the worker has the whole gradient and clips it itself.
    norms: Option<Norms>,
    /// Squares are added up over several servers.
    shares_norms: bool,
    values: RwLock<Values>,
    progress: Mutex<Progress>,
    changed: Condvar,
    completed: Condvar,
    #[cfg(test)]
    forgets: bool,
}

/// What clipping by norm needs: the gradient of the whole round, before the first of it is applied.
struct Norms {
    clipping: Clipping,
    /// Those of the whole flat vector, and of this shard.
    whole: Cells,
    own: Cells,
    gathered: Mutex<Gathered>,
}

/// The averaged gradient of a round as far as it has arrived.
struct Gathered {
    gradient: Vec<f32>,
    squares: Vec<f64>,
}

impl Norms {
    fn new(clipping: Clipping, layout: &Layout, range: Range<usize>) -> Self {
        let tensors: Vec<usize> = layout.trained().map(TensorSpec::len).collect();
        let own = Cells::new(&tensors, range.clone());
        let gathered = Gathered { gradient: vec![0.0; range.len()], squares: vec![0.0; own.len()] };
        Self { clipping, whole: Cells::new(&tensors, 0..layout.trained_len()), own, gathered: Mutex::new(gathered) }
    }

    fn lock(&self) -> MutexGuard<'_, Gathered> {
        self.gathered.lock().expect("no holder panics")
    }

    fn squares(&self) -> Vec<f64> {
        self.lock().squares.clone()
    }
}

struct Values {
    parameters: Vec<f32>,
    /// The parameters at the beginning of the round, as far as it is applied; kept where a worker may be started again.
    previous: Option<Vec<f32>>,
    optimizer: ShardOptimizer,
    /// What the optimizer does in the round in progress of sync mode.
    steps: Round,
    /// The mean gradient of the chunk in hand.
    mean: Vec<f32>,
    round: u64,
    /// Chunks of the round that have been applied.
    applied: usize,
}

/// Where the round in progress stands.
struct Progress {
    /// The round of sync mode; of async mode, the one that training started with.
    round: u64,
    ranks: Vec<RankProgress>,
    /// Per trained tensor: whether some worker has a gradient for it in this round.
    present: Vec<bool>,
    /// Per rank: its share of the mean.
    weights: Vec<f32>,
    /// Workers whose buffer holds the chunk, by chunk modulo `CHUNKS_AHEAD`.
    arrived: [usize; CHUNKS_AHEAD],
    /// Chunks that all workers have brought, for the thread that adds them up.
    complete: VecDeque<usize>,
    /// Chunks that have been applied.
    reduced: usize,
    /// Whether the run stops with the round that was committed last.
    stop: bool,
    /// Pushes applied so far, in async mode.
    version: u64,
}

/// Where one worker stands.
struct RankProgress {
    /// The push in progress.
    head: Option<PushHead>,
    /// Chunks of it that have arrived.
    received: usize,
    /// The round of its next push.
    next: u64,
    /// Where its loops stand at the beginning of its last rounds.
    positions: Vec<Position>,
    /// What the optimizer does with its push, in async mode.
    steps: Option<Arc<Round>>,
    /// The version that it pulled last, and how far behind its last push was, in async mode.
    pulled: u64,
    staleness: u32,
}

impl Progress {
    /// The rank that is waited for, of those who still train.
    fn slowest(&self, status: &RunStatus) -> usize {
        let trains = |(rank, _): &(usize, &RankProgress)| status.seat(*rank).state == SeatState::Training;
        let ranks = self.ranks.iter().enumerate().filter(trains);
        let slowest = ranks.min_by_key(|(_, rank)| (rank.next, rank.head.is_some(), rank.received));
        slowest.map_or(0, |(rank, _)| rank)
    }
}

impl Shard {
    fn new(server: &ParameterServer, join: &Join, parameters: Vec<f32>) -> Self {
        let placement = &server.placement;
        let range = server.range(&join.layout);
        let (pieces, ranges) = pieces(join.layout.trained(), &range);
        let workers = placement.topology.worker_count();
        let slot_len = CHUNK.min(range.len());
        let round = server.start.round;
        let ahead = if placement.mode.is_sync() { CHUNKS_AHEAD } else { 1 };
        let rank = || RankProgress {
            head: None,
            received: 0,
            next: round,
            positions: vec![server.start],
            steps: None,
            pulled: 0,
            staleness: 0,
        };
        let clipping = join.optimizer.clipping().filter(|_| placement.mode.is_sync() && join.optimizer.needs_norms());
        let keeps_previous = placement.mode.is_sync() && !placement.rejoin.is_zero();
        Self {
            mode: placement.mode,
            tensors: join.layout.trained().count(),
            shares_norms: clipping.is_some() && placement.topology.server_count() > 1,
            norms: clipping.map(|clipping| Norms::new(clipping, &join.layout, range.clone())),
            values: RwLock::new(Values {
                previous: keeps_previous.then(|| parameters.clone()),
                parameters,
                optimizer: ShardOptimizer::new(join.optimizer, ranges),
                steps: Round::default(),
                mean: vec![0.0; slot_len],
                round,
                applied: 0,
            }),
            progress: Mutex::new(Progress {
                round,
                ranks: (0..workers).map(|_| rank()).collect(),
                present: vec![false; join.layout.trained().count()],
                weights: vec![0.0; workers],
                arrived: [0; CHUNKS_AHEAD],
                complete: VecDeque::with_capacity(CHUNKS_AHEAD),
                reduced: 0,
                stop: false,
                version: 0,
            }),
            changed: Condvar::new(),
            completed: Condvar::new(),
            #[cfg(test)]
            forgets: server.status.forgets.load(Ordering::Relaxed),
            slots: (0..workers * ahead).map(|_| Mutex::new(vec![0.0; slot_len])).collect(),
            pieces,
            workers,
            ahead,
            range,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().expect("no holder panics")
    }

    /// The round that this server waits for from `rank`, where the rank's loops stand, and whether no step follows.
    fn standing(&self, rank: Rank) -> (u64, Vec<Position>, bool) {
        let progress = self.lock();
        let of_rank = &progress.ranks[rank.index()];
        let round = if self.mode.is_sync() { progress.round } else { of_rank.next };
        (round, of_rank.positions.clone(), progress.stop)
    }

    /// The worker has pulled without a push.
    fn pulled(&self, rank: Rank) {
        let mut progress = self.lock();
        progress.ranks[rank.index()].pulled = progress.version;
    }

    /// Chunks of a round; an empty shard has one empty chunk, so that its rounds are committed like all others.
    fn chunks(&self) -> usize {
        self.range.len().div_ceil(CHUNK).max(1)
    }

    /// Whether a thread of its own adds up chunks. For a single one it would only be another change of thread; but whoever waits
    /// for the squares of other servers must not be a worker that still owes these a chunk.
    fn has_reducer(&self) -> bool {
        self.mode.is_sync() && (self.chunks() > 1 || self.shares_norms)
    }

    fn chunk(&self, chunk: usize) -> Range<usize> {
        let start = chunk * CHUNK;
        start..(start + CHUNK).min(self.range.len())
    }

    fn slot(&self, rank: usize, chunk: usize) -> &Mutex<Vec<f32>> {
        &self.slots[rank * self.ahead + chunk % self.ahead]
    }

    /// Takes note of a push that begins, or comes again; returns the number of its chunks that are here already. The last
    /// push of a sync round fixes the weights.
    fn begin(&self, progress: &mut Progress, rank: Rank, head: PushHead, presence: &[u8]) -> Result<usize, Failure> {
        let worker = Replica { role: Role::Worker, rank };
        let of_rank = &mut progress.ranks[rank.index()];
        // An integer below 2^53 is exact in f64, and no sum of them over the ranks overflows.
        if head.round >= MOST_STEPS || head.examples >= MOST_STEPS {
            let message = format!("a push for round {} of {} examples", head.round, head.examples);
            return Err(protocol(worker, message));
        }
        if head.round + 1 == of_rank.next {
            return Ok(self.chunks());
        }
        if head.round != of_rank.next {
            let message = format!("a push for round {} while round {} is open", head.round, of_rank.next);
            return Err(protocol(worker, message));
        }
        if let Some(known) = of_rank.head {
            if known.examples != head.examples {
                let message = format!("a push of {} examples that was one of {}", head.examples, known.examples);
                return Err(protocol(worker, message));
            }
            #[cfg(test)]
            if self.forgets {
                return Ok(0);
            }
            return Ok(of_rank.received);
        }
        if self.mode.is_sync() {
            self.agree(progress, rank, head)?;
        }
        let of_rank = &mut progress.ranks[rank.index()];
        (of_rank.head, of_rank.received) = (Some(head), 0);
        let position = Position { epoch: head.epoch, batch: head.batches_done, round: head.round + 1 };
        // Of the last two rounds: servers are at most one round apart.
        of_rank.positions.drain(..of_rank.positions.len() - 1);
        of_rank.positions.push(position);
        if !self.mode.is_sync() {
            let present: Vec<bool> = self.pieces.iter().map(|tensor| bit(presence, *tensor)).collect();
            of_rank.staleness = u32::try_from(progress.version - of_rank.pulled).unwrap_or(u32::MAX);
            let mut values = self.values.write().expect("no holder panics");
            let mut steps = values.optimizer.begin_round(&present, head.learning_rate);
            // By norm, the worker has clipped it already.
            steps.scale(self.pieces.iter().map(|_| 1.0));
            of_rank.steps = Some(Arc::new(steps));
            return Ok(0);
        }
        for (tensor, present) in progress.present.iter_mut().enumerate() {
            *present |= bit(presence, tensor);
        }
        if progress.ranks.iter().all(|rank| rank.head.is_some()) {
            let examples = |rank: &RankProgress| rank.head.map_or(0, |head| head.examples);
            let total: u64 = progress.ranks.iter().map(examples).sum();
            for (weight, rank) in progress.weights.iter_mut().zip(&progress.ranks) {
                // An integer below 2^53 is exact in f64; the quotient is rounded once.
                *weight = (examples(rank) as f64 / total.max(1) as f64) as f32;
            }
            let mut values = self.values.write().expect("no holder panics");
            let present: Vec<bool> = self.pieces.iter().map(|tensor| progress.present[*tensor]).collect();
            values.steps = values.optimizer.begin_round(&present, head.learning_rate);
        }
        Ok(0)
    }

    /// All pushes of a sync round must mean the same step.
    fn agree(&self, progress: &Progress, rank: Rank, head: PushHead) -> Result<(), Failure> {
        let first = progress.ranks.iter().enumerate().find_map(|(rank, other)| Some((rank, other.head?)));
        match first {
            Some((first, other)) if other.learning_rate.to_bits() != head.learning_rate.to_bits() => Err(Failure {
                replica: Replica { role: Role::Worker, rank },
                kind: FailureKind::Configuration,
                message: format!(
                    "it stepped with learning rate {}, worker {first} with {}; in a sync round all workers need the same",
                    head.learning_rate, other.learning_rate
                ),
                round: Some(head.round),
            }),
            _ => Ok(()),
        }
    }

    /// Takes note of a chunk. Returns whether it is complete now, and so to be added up by the caller.
    fn arrived(&self, progress: &mut Progress, rank: Rank, chunk: usize) -> bool {
        progress.ranks[rank.index()].received = chunk + 1;
        let arrived = &mut progress.arrived[chunk % CHUNKS_AHEAD];
        *arrived += 1;
        if *arrived < self.workers {
            return false;
        }
        *arrived = 0;
        true
    }

    /// Applies a chunk of one worker's own push.
    fn apply_alone(&self, chunk: usize, steps: &Round, gradient: &[f32]) {
        let range = self.chunk(chunk);
        let mut values = self.values.write().expect("no holder panics");
        let Values { parameters, optimizer, .. } = &mut *values;
        optimizer.apply(steps, range.clone(), &mut parameters[range], gradient);
    }

    /// Takes note of a chunk that was applied alone; the last one completes the push.
    fn count_alone(&self, progress: &mut Progress, rank: Rank, chunk: usize) {
        let of_rank = &mut progress.ranks[rank.index()];
        of_rank.received = chunk + 1;
        if of_rank.received == self.chunks() {
            (of_rank.head, of_rank.steps) = (None, None);
            of_rank.next += 1;
            progress.version += 1;
        }
    }

    /// The mean gradient of one chunk, added in rank order, then the optimizer.
    fn apply(&self, chunk: usize, weights: &[f32]) {
        let range = self.chunk(chunk);
        let mut values = self.values.write().expect("no holder panics");
        let Values { parameters, previous, optimizer, steps, mean: buffer, applied, .. } = &mut *values;
        let gradient = &mut buffer[..range.len()];
        let slots: Vec<_> =
            (0..self.workers).map(|rank| self.slot(rank, chunk).lock().expect("no holder panics")).collect();
        mean(gradient, weights.iter().zip(&slots).map(|(weight, slot)| (*weight, &slot[..range.len()])));
        if let Some(norms) = &self.norms {
            let mut gathered = norms.lock();
            gathered.gradient[range.clone()].copy_from_slice(gradient);
            norms.own.squares(range, gradient, &mut gathered.squares);
            return;
        }
        let parameters = &mut parameters[range.clone()];
        if let Some(previous) = previous {
            previous[range.clone()].copy_from_slice(parameters);
        }
        optimizer.apply(steps, range, parameters, gradient);
        *applied = chunk + 1;
    }

    /// Applies a whole round, given the sums of squares of all servers' cells.
    fn apply_clipped(&self, norms: &Norms, squares: &[f64], present: &[bool]) {
        let scales = norms.clipping.scales(&norms.whole, squares, present);
        let gathered = norms.lock();
        let mut values = self.values.write().expect("no holder panics");
        let Values { parameters, previous, optimizer, steps, applied, .. } = &mut *values;
        steps.scale(self.pieces.iter().map(|tensor| scales[*tensor]));
        if let Some(previous) = previous {
            previous.copy_from_slice(parameters);
        }
        for chunk in 0..self.chunks() {
            let range = self.chunk(chunk);
            optimizer.apply(steps, range.clone(), &mut parameters[range.clone()], &gathered.gradient[range]);
        }
        *applied = self.chunks();
    }

    /// Closes the round: everyone gets the new parameters.
    fn commit(&self, progress: &mut Progress, stop: bool) {
        progress.round += 1;
        progress.reduced = 0;
        progress.present.fill(false);
        progress.stop = stop;
        for rank in &mut progress.ranks {
            (rank.head, rank.received) = (None, 0);
            rank.next += 1;
        }
        let mut values = self.values.write().expect("no holder panics");
        (values.round, values.applied) = (progress.round, 0);
    }
}

/// The parts of tensors that lie in `range`: tensor number and shard-local range of each, in order.
fn pieces<'a>(tensors: impl Iterator<Item = &'a TensorSpec>, range: &Range<usize>) -> (Vec<usize>, Vec<Range<usize>>) {
    let mut start = 0;
    let mut pieces = (Vec::new(), Vec::new());
    for (index, tensor) in tensors.enumerate() {
        let (from, to) = (start.max(range.start), (start + tensor.len()).min(range.end));
        if from < to {
            pieces.0.push(index);
            pieces.1.push(from - range.start..to - range.start);
        }
        start += tensor.len();
    }
    pieces
}
